"""SB3's PPO and sb3-contrib's TRPO, with PPOPlus's settings as far as they have them, or with RL Zoo's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stable_baselines3 import PPO
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_pgplus import presets
from sb3_pgplus.configs import (
    ConfigError,
    EnvironmentSpec,
    RunSettings,
    algorithm_class,
    parse_python_value,
    read_mapping,
    resolve_objects,
    whole_number,
)
from sb3_pgplus.construction import PLUMBING
from sb3_pgplus.policies import ACTIVATION_CLASSES
from sb3_pgplus.schedules import as_schedule

STOCK = {"sb3-ppo": "ppo", "sb3-contrib-trpo": "trpo"}
"""Our name for it → RL Zoo's."""
SCHEDULES = ("learning_rate", "clip_range", "clip_range_vf")
SHARED_ARGUMENTS = (
    *("learning_rate", "n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "clip_range", "clip_range_vf"),
    *("normalize_advantage", "ent_coef", "vf_coef", "max_grad_norm", "target_kl"),
)
"""Hyperparameters of PPOPlus that SB3's PPO has under the same name."""
_TRANSLATED = (
    *SHARED_ARGUMENTS,
    "n_envs",
    *("policy_kwargs", "log_std_init", "ortho_init", "activation_fn", "adam_eps"),
    *("normalize_observations", "normalize_rewards", "clip_observations", "clip_rewards"),
)


def same_settings(ours: RunSettings) -> RunSettings:
    """
    PPOPlus's settings for SB3's PPO: what SB3 lacks is left out, normalisation becomes a ``VecNormalize``.

    :param ours: of PPOPlus
    """
    values = algorithm_class(ours.algo).hparams_class.defaults() | ours.hyperparameters
    policy = dict(values.get("policy_kwargs") or {})
    for name in ("log_std_init", "ortho_init"):
        if values[name] is not None:
            policy[name] = values[name]
    if values["activation_fn"] is not None:
        found = ACTIVATION_CLASSES[values["activation_fn"]]
        policy["activation_fn"] = f"{found.__module__}.{found.__qualname__}"
    if values["adam_eps"] is not None:
        policy["optimizer_kwargs"] = {"eps": values["adam_eps"]}
    normalize = {
        "norm_obs": bool(values["normalize_observations"]),
        "norm_reward": bool(values["normalize_rewards"]),
        "clip_obs": values["clip_observations"],
        "clip_reward": values["clip_rewards"],
    }
    shared = {name: values[name] for name in SHARED_ARGUMENTS}
    return replace(
        ours,
        algo="sb3-ppo",
        policy="MlpPolicy",
        hyperparameters={**shared, "policy_kwargs": policy, "normalize": normalize},
        source=f"{ours.source}, {left_out(values)}",
    )


def left_out(ours: Mapping[str, Any]) -> str:
    """
    What of PPOPlus's settings SB3's PPO lacks, in words; what is on by default counts.

    :param ours: hyperparameters; what is not said has its default
    """
    defaults = algorithm_class("ppoplus").hparams_class.defaults() | PLUMBING
    values = defaults | dict(ours)
    theirs = defaults | presets.SB3_PPO | {"sb3_exact": defaults["sb3_exact"]}  # which changes the rounding
    if values["clip_range_vf"] is None:
        theirs["value_clip"] = values["value_clip"]  # of no clip
    lacking = [f"{n}={values[n]}" for n in defaults if n not in _TRANSLATED and values[n] != theirs[n]]
    return f"without {', '.join(lacking)}" if lacking else "all of it"


def zoo_settings(algo: str, env: str) -> RunSettings:
    """
    What RL Zoo's own file says; its MuJoCo settings are for v4, whose tasks are v5's up to details.

    :param algo: name in :data:`STOCK`
    :param env: environment id
    :raises ConfigError: if rl_zoo3 is missing or has no settings for it
    """
    content = read_mapping(zoo_file(STOCK[algo]))
    known = next((name for name in (env, env.replace("-v5", "-v4")) if name in content), None)
    if known is None:
        raise ConfigError(f"RL Zoo has no settings of {STOCK[algo]} for {env}")
    block = dict(content[known])
    run = {name: block.pop(name, default) for name, default in (("n_envs", 1), ("n_timesteps", 1e6), ("policy", None))}
    if isinstance(block.get("policy_kwargs"), str):
        block["policy_kwargs"] = parse_python_value(block["policy_kwargs"])
    if isinstance(block.get("normalize"), str):
        block["normalize"] = parse_python_value(block["normalize"])
    return RunSettings(
        algo=algo,
        environment=EnvironmentSpec(env),
        seed=0,
        n_envs=whole_number("n_envs", run["n_envs"]),
        backend="auto",
        n_timesteps=whole_number("n_timesteps", run["n_timesteps"]),
        policy=run["policy"],
        hyperparameters=block,
        source=f"RL Zoo's {STOCK[algo]}.yml, block {known}",
    )


def zoo_file(name: str) -> Path:
    """
    Where rl_zoo3's settings are; nothing of it is imported.

    :param name: its name of the algorithm
    :raises ConfigError: if it is not installed
    """
    spec = find_spec("rl_zoo3")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError('RL Zoo\'s settings come from rl_zoo3: pip install "sb3_pgplus[zoo,contrib]"')
    return Path(next(iter(spec.submodule_search_locations))) / "hyperparams" / f"{name}.yml"


def stock_class(algo: str) -> type[OnPolicyAlgorithm]:
    """
    :param algo: name in :data:`STOCK`
    :raises ConfigError: if it is not installed
    """
    if algo == "sb3-ppo":
        return PPO
    try:
        from sb3_contrib import TRPO
    except ImportError as error:
        raise ConfigError('TRPO comes from sb3-contrib: pip install "sb3_pgplus[contrib]"') from error
    found: type[OnPolicyAlgorithm] = TRPO
    return found


def build(settings: RunSettings, env: VecEnv) -> OnPolicyAlgorithm:
    """
    Construct the algorithm, around a ``VecNormalize`` where the settings say so.

    :param settings: from this module
    :param env: the environments to train in
    """
    arguments = dict(settings.hyperparameters)
    env = normalized(env, arguments.pop("normalize", None), arguments.get("gamma", 0.99))
    for name in SCHEDULES:
        if arguments.get(name) is not None:
            arguments[name] = as_schedule(name, arguments[name])
    algorithm = stock_class(settings.algo)
    policy = settings.policy or "MlpPolicy"
    return algorithm(policy, env, seed=settings.seed, device="cpu", **resolve_objects(arguments))


def normalized(env: VecEnv, normalize: bool | Mapping[str, Any] | None, gamma: float) -> VecEnv:
    """
    :param env: raw
    :param normalize: RL Zoo's entry: whether, or with which arguments; a clip of ``None`` is none
    :param gamma: discount factor of the rewards' statistics
    """
    if not normalize:
        return env
    arguments: dict[str, Any] = {"gamma": gamma} | ({} if normalize is True else dict(normalize))
    for name in ("clip_obs", "clip_reward"):
        if name in arguments and arguments[name] is None:
            arguments[name] = math.inf
    return VecNormalize(env, **arguments)
