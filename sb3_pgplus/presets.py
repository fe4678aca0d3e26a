"""
Named settings as plain keyword arguments: ``PPOPlus("MlpPolicy", env, **presets.SB3_PPO)``.

A preset is a dictionary; to change one value, ``{**presets.LECTURE, "clip_range_vf": None}``.
"""

from typing import Any

#: Everything that the package adds to SB3 switched off.
_SB3_COMMON: dict[str, Any] = {
    "n_envs": 1,
    "advantage_estimator": "gae",
    "bootstrap_truncated": True,
    "normalize_observations": False,
    "normalize_rewards": False,
    "normalize_value_targets": False,
    "ortho_init": None,
    "activation_fn": None,
    "log_std_init": None,
    "adam_eps": None,
    "sb3_exact": True,
}

#: SB3's PPO with its defaults: eager on a CPU, the same seed gives the same parameters bit for bit.
SB3_PPO: dict[str, Any] = {
    **_SB3_COMMON,
    "learning_rate": 3e-4,
    "n_steps": 2048,
    "batch_size": 64,
    "n_epochs": 10,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "clip_range": 0.2,
    "clip_range_vf": None,
    "value_clip": "clipped_only",
    "normalize_advantage": True,
    "ent_coef": 0.0,
    "vf_coef": 0.5,
    "max_grad_norm": 0.5,
    "target_kl": None,
    "kl_coef": None,
    "adaptive_kl_target": None,
    "desired_kl": None,
    "recompute_advantages": False,
    "n_critic_epochs": None,
    "critic_learning_rate": None,
}

#: SB3's A2C with its defaults: eager on a CPU, the same seed gives the same parameters bit for bit.
SB3_A2C: dict[str, Any] = {
    **_SB3_COMMON,
    "learning_rate": 7e-4,
    "n_steps": 5,
    "gamma": 0.99,
    "gae_lambda": 1.0,
    "normalize_advantage": False,
    "ent_coef": 0.0,
    "vf_coef": 0.5,
    "max_grad_norm": 0.5,
    "critic_learning_rate": None,
    "use_rms_prop": True,
    "rms_prop_eps": 1e-5,
}

#: sb3-contrib's TRPO with its defaults, its random start of conjugate gradient and its KL(π_θ‖π_old) included: the same
#: seed gives the same parameters up to rounding.
SB3_TRPO: dict[str, Any] = {
    **_SB3_COMMON,
    "learning_rate": 1e-3,
    "n_steps": 2048,
    "batch_size": 128,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "normalize_advantage": True,
    "ent_coef": 0.0,
    "max_grad_norm": None,
    "clip_range_vf": None,
    "n_critic_updates": 10,
    "target_kl": 0.01,
    "kl_reduction": "mean",
    "max_step_size": None,
    "cg_max_steps": 15,
    "cg_damping": 0.1,
    "line_search": True,
    "line_search_shrinking_factor": 0.8,
    "line_search_max_iter": 10,
    "sub_sampling_factor": 1,
    "fisher_sub_sampling_factor": 1,
}

#: The lecture's PPO: every implementation trick of its table on, nothing beyond.
LECTURE: dict[str, Any] = {
    **SB3_PPO,
    "learning_rate": "lin_3e-4",
    "clip_range": "lin_0.2",
    "clip_range_vf": 0.2,
    "value_clip": "max",
    "normalize_observations": "auto",
    "clip_observations": 10.0,
    "normalize_rewards": "auto",
    "clip_rewards": 10.0,
    "ortho_init": True,
    "activation_fn": "tanh",
    "adam_eps": 1e-5,
    "sb3_exact": False,
}

#: PPO-M of *Implementation Matters* (Engstrom et al. 2020): PPO's clipped loss without the code-level optimisations.
PPO_MINIMAL: dict[str, Any] = {
    **LECTURE,
    "learning_rate": 3e-4,
    "clip_range": 0.2,
    "clip_range_vf": None,
    "normalize_rewards": False,
    "clip_observations": None,
    "ortho_init": False,
}

#: PPO-NoClip of *Implementation Matters*: the code-level optimisations without PPO's clipped loss.
PPO_NO_CLIP: dict[str, Any] = {**LECTURE, "clip_range": None}

#: TRPO+ of *Implementation Matters* (Engstrom et al. 2020): TRPO with the code-level optimisations that apply to it.
TRPO_PLUS: dict[str, Any] = {
    **SB3_TRPO,
    "learning_rate": "lin_3e-4",
    "max_grad_norm": 0.5,
    "clip_range_vf": 0.2,
    "value_clip": "max",
    "kl_reduction": "sum",
    "cg_max_steps": 10,
    "line_search_shrinking_factor": 0.5,
    "fisher_sub_sampling_factor": 10,
    "normalize_observations": "auto",
    "clip_observations": 10.0,
    "normalize_rewards": "auto",
    "clip_rewards": 10.0,
    "ortho_init": True,
    "activation_fn": "tanh",
    "sb3_exact": False,
}

#: The natural policy gradient (Kakade 2001): the full step to the border of the trust region, unchecked.
NPG: dict[str, Any] = {**TRPO_PLUS, "clip_range_vf": None, "line_search": False, "fisher_sub_sampling_factor": 1}
