"""
Exact tier: with ``presets.SB3_PPO`` PPOPlus is SB3's PPO bit for bit (eager, CPU, same seed), and with
``presets.SB3_A2C`` A2CPlus its A2C.

Each case runs both for several iterations and compares every parameter, the optimiser's state, ``predict`` and the
number of updates with ``==``; nothing there has a tolerance.

Then TRPOPlus with ``presets.SB3_TRPO``, which follows sb3-contrib's TRPO up to rounding: the Fisher products are other
formulas for the same matrix.
"""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import TRPO
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.vec_env import VecNormalize

from sb3_pgplus import A2CPlus, PPOPlus, TRPOPlus, presets
from sb3_pgplus.on_policy import PolicyGradientPlus
from sb3_pgplus.vec_env import backend_of


class DictEnv(gym.Env[Any, Any]):
    """Two keys of different types; episodes end by termination and by truncation."""

    observation_space = spaces.Dict(
        {"vector": spaces.Box(-1, 1, (3,), np.float32), "token": spaces.Discrete(4), "bits": spaces.MultiBinary(3)}
    )
    action_space = spaces.MultiDiscrete([3, 2])

    def _observe(self) -> Any:
        return {
            "vector": self.np_random.uniform(-1, 1, 3).astype(np.float32),
            "token": int(self.np_random.integers(4)),
            "bits": self.np_random.integers(0, 2, 3).astype(np.int8),
        }

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        terminated = bool(self.np_random.random() < 0.05)
        return self._observe(), float(action[0] - action[1]), terminated, self.steps >= 13, {}


class MultiDiscreteEnv(DictEnv):
    """The same with its vector alone, which then says more about the reward."""

    observation_space = spaces.Box(-1, 1, (3,), np.float32)  # type: ignore[assignment]  # another space

    def _observe(self) -> Any:
        return super()._observe()["vector"]


class MultiBinaryEnv(MultiDiscreteEnv):
    action_space = spaces.MultiBinary(3)  # type: ignore[assignment]  # another space


class ImageEnv(gym.Env[Any, Any]):
    """Noise images from the environment's own generator (SB3's FakeImageEnv cannot be seeded)."""

    observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    action_space = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.integers(0, 256, (36, 36, 1), dtype=np.uint8), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        image = self.np_random.integers(0, 256, (36, 36, 1), dtype=np.uint8)
        return image, float(action), self.steps % 10 == 0, self.steps % 7 == 0, {}


def make_env(env: Any, n_envs: int, normalize: bool, time_limit: int | None) -> Any:
    wrapper = {"wrapper_class": gym.wrappers.TimeLimit, "wrapper_kwargs": {"max_episode_steps": time_limit}}
    venv = make_vec_env(env, n_envs, seed=11, **(wrapper if time_limit else {}))
    return VecNormalize(venv, gamma=0.97) if normalize else venv


CASES: dict[str, dict[str, Any]] = {
    "CartPole, 1 env": {"env": "CartPole-v1", "n_envs": 1, "n_steps": 256},
    "CartPole, 4 envs": {"env": "CartPole-v1", "n_envs": 4, "n_steps": 64},
    "CartPole, several truncations in one rollout": {"env": "CartPole-v1", "n_envs": 4, "n_steps": 64, "time_limit": 9},
    "Pendulum, 1 env": {"env": "Pendulum-v1", "n_envs": 1, "n_steps": 512},
    "Pendulum, truncations of 4 envs": {"env": "Pendulum-v1", "n_envs": 4, "n_steps": 128, "time_limit": 30},
    "HalfCheetah, 1 env": {"env": "HalfCheetah-v5", "n_envs": 1, "n_steps": 256, "time_limit": 100},
    "HalfCheetah, 4 envs": {"env": "HalfCheetah-v5", "n_envs": 4, "n_steps": 64, "time_limit": 50},
    "VecNormalize outside": {
        "env": "Pendulum-v1",
        "n_envs": 3,
        "n_steps": 128,
        "time_limit": 40,
        "normalize": True,
    },
    "Dict observations": {"env": DictEnv, "n_envs": 2, "n_steps": 64, "policy": "MultiInputPolicy"},
    "images": {"env": ImageEnv, "n_envs": 2, "n_steps": 32, "policy": "CnnPolicy", "batch_size": 32, "n_epochs": 2},
    "gSDE": {"env": "Pendulum-v1", "n_envs": 2, "n_steps": 128, "use_sde": True, "sde_sample_freq": 4},
    "squashed gSDE (no closed-form entropy)": {
        "env": "Pendulum-v1",
        "n_envs": 2,
        "n_steps": 128,
        "use_sde": True,
        "ent_coef": 0.01,
        "policy_kwargs": {"squash_output": True},
    },
    "target_kl": {"env": "Pendulum-v1", "n_envs": 2, "n_steps": 128, "target_kl": 0.001},
    "clip_range_vf": {"env": "Pendulum-v1", "n_envs": 2, "n_steps": 128, "clip_range_vf": 0.1},
    "annealed rate and clip": {
        "env": "CartPole-v1",
        "n_envs": 2,
        "n_steps": 128,
        "learning_rate": lambda progress: 1e-3 * progress,
        "clip_range": lambda progress: 0.2 * progress,
    },
    "no advantage normalisation, entropy bonus": {
        "env": "CartPole-v1",
        "n_envs": 2,
        "n_steps": 128,
        "normalize_advantage": False,
        "ent_coef": 0.01,
    },
    "ragged last minibatch": {"env": "CartPole-v1", "n_envs": 2, "n_steps": 100, "batch_size": 64},
    "separate features extractors": {
        "env": "CartPole-v1",
        "n_envs": 2,
        "n_steps": 64,
        "policy_kwargs": {"share_features_extractor": False},
    },
    "SB3's own buffer class": {"env": "Pendulum-v1", "n_envs": 2, "n_steps": 128, "time_limit": 30, "stock": True},
}


TF_LIKE = {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"eps": 1e-5}}

#: "ours" and "theirs" are what one side alone is told.
A2C_CASES: dict[str, dict[str, Any]] = {
    "CartPole, 1 env": {"env": "CartPole-v1", "n_envs": 1},
    "CartPole, 4 envs": {"env": "CartPole-v1", "n_envs": 4},
    "Pendulum, truncations inside rollouts": {"env": "Pendulum-v1", "n_envs": 4, "n_steps": 16, "time_limit": 7},
    "HalfCheetah, 4 envs": {"env": "HalfCheetah-v5", "n_envs": 4, "n_steps": 8, "time_limit": 50},
    "VecNormalize outside": {"env": "Pendulum-v1", "n_envs": 3, "n_steps": 8, "time_limit": 20, "normalize": True},
    "Dict observations": {"env": DictEnv, "n_envs": 2, "n_steps": 8, "policy": "MultiInputPolicy"},
    "images": {"env": ImageEnv, "n_envs": 2, "policy": "CnnPolicy"},
    "gSDE": {"env": "Pendulum-v1", "n_envs": 2, "n_steps": 16, "use_sde": True, "sde_sample_freq": 4},
    "squashed gSDE (no closed-form entropy)": {
        "env": "Pendulum-v1",
        "n_envs": 2,
        "use_sde": True,
        "ent_coef": 0.01,
        "policy_kwargs": {"squash_output": True},
    },
    "advantage normalisation": {"env": "CartPole-v1", "n_envs": 2, "normalize_advantage": True},
    "entropy bonus": {"env": "Pendulum-v1", "n_envs": 2, "ent_coef": 0.01},
    "Adam": {"env": "CartPole-v1", "n_envs": 2, "use_rms_prop": False},
    "RMSprop as TensorFlow has it": {
        "env": "CartPole-v1",
        "n_envs": 2,
        "theirs": {"policy_kwargs": TF_LIKE},
        "ours": {"use_rms_prop": "tf_like"},
    },
    "ε of RMSprop": {"env": "CartPole-v1", "n_envs": 2, "rms_prop_eps": 0.1},
    "annealed rate": {"env": "CartPole-v1", "n_envs": 2, "learning_rate": lambda progress: 1e-3 * progress},
    "gae_lambda, gamma, vf_coef": {
        "env": "Pendulum-v1",
        "n_envs": 2,
        "n_steps": 16,
        "time_limit": 10,
        "gae_lambda": 0.9,
        "gamma": 0.9,
        "vf_coef": 0.1,
    },
    "separate features extractors": {
        "env": "CartPole-v1",
        "n_envs": 2,
        "policy_kwargs": {"share_features_extractor": False},
    },
    "SB3's own buffer class": {"env": "Pendulum-v1", "n_envs": 2, "n_steps": 16, "time_limit": 7, "stock": True},
}

IMAGES: dict[str, Any] = {"env": ImageEnv, "n_envs": 2, "policy": "CnnPolicy"}
IMAGES |= {"n_steps": 32, "batch_size": 32, "n_critic_updates": 3, "cg_max_steps": 5}

TRPO_CASES: dict[str, dict[str, Any]] = {
    "CartPole": {"env": "CartPole-v1", "n_envs": 1},
    # With episodes of 30 steps, conjugate gradient's residual comes within 3 % of where it stops, and the processor
    # decides which of the two takes another step.
    "Pendulum, truncations of 4 envs": {"env": "Pendulum-v1", "n_envs": 4, "n_steps": 64, "time_limit": 25},
    "HalfCheetah, 4 envs": {"env": "HalfCheetah-v5", "n_envs": 4, "n_steps": 64, "time_limit": 50},
    "MultiDiscrete actions": {"env": MultiDiscreteEnv, "n_envs": 2},
    "MultiBinary actions": {"env": MultiBinaryEnv, "n_envs": 2},
    "VecNormalize outside": {"env": "Pendulum-v1", "n_envs": 3, "n_steps": 64, "time_limit": 20, "normalize": True},
    "gSDE": {"env": "Pendulum-v1", "n_envs": 2, "use_sde": True, "sde_sample_freq": 4},
    "every 4th sample": {"env": "Pendulum-v1", "n_envs": 2, "sub_sampling_factor": 4},
    "images": IMAGES,
    "images, separate features extractors": {**IMAGES, "policy_kwargs": {"share_features_extractor": False}},
    "Dict observations": {"env": DictEnv, "n_envs": 2, "policy": "MultiInputPolicy"},
    "no advantage normalisation": {"env": "CartPole-v1", "n_envs": 2, "normalize_advantage": False},
    "SB3's own buffer class": {"env": "Pendulum-v1", "n_envs": 2, "time_limit": 30, "stock": True},
    "a search that fails": {"env": "CartPole-v1", "n_envs": 2, "cg_damping": 1e-5, "line_search_max_iter": 1},
}

#: SB3's class, ours, the preset, the cases, iterations.
EXACT: dict[str, tuple[Any, Any, dict[str, Any], dict[str, dict[str, Any]], int]] = {
    "PPO": (PPO, PPOPlus, presets.SB3_PPO, CASES, 4),
    "A2C": (A2C, A2CPlus, presets.SB3_A2C, A2C_CASES, 20),
}


def train(cls: Any, case: dict[str, Any], extra: dict[str, Any], n_iterations: int = 4) -> Any:
    case = dict(case)
    policy, normalize, limit = (
        case.pop("policy", "MlpPolicy"),
        case.pop("normalize", False),
        case.pop("time_limit", None),
    )
    env = make_env(case.pop("env"), case.pop("n_envs"), normalize, limit)
    ours, theirs = case.pop("ours", {}), case.pop("theirs", {})
    if case.pop("stock", False):
        ours = {**ours, "rollout_buffer_class": RolloutBuffer}
    extra = {**extra, **(ours if issubclass(cls, PolicyGradientPlus) else theirs)}
    model = cls(policy, env, seed=11, device="cpu", **{**extra, **case})
    model.learn(n_iterations * model.n_steps * model.n_envs)
    return model


def assert_same_tree(ours: Any, theirs: Any) -> None:
    """Equality of nested dicts and lists of tensors, bit for bit."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_same_tree(ours[key], theirs[key])
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same_tree(a, b)
    elif isinstance(theirs, th.Tensor):
        assert th.equal(ours, theirs)
    else:
        assert ours == theirs


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
@pytest.mark.parametrize(
    ("algorithm", "name"), [(algorithm, name) for algorithm, entry in EXACT.items() for name in entry[3]]
)
def test_the_preset_gives_the_parameters_of_sb3_bit_for_bit(algorithm: str, name: str) -> None:
    sb3, plus, preset, cases, n_iterations = EXACT[algorithm]
    case = cases[name]
    theirs, ours = train(sb3, case, {}, n_iterations), train(plus, case, preset, n_iterations)
    assert ours._n_updates == theirs._n_updates
    assert_same_tree(ours.policy.state_dict(), theirs.policy.state_dict())
    assert_same_tree(ours.policy.optimizer.state_dict(), theirs.policy.optimizer.state_dict())
    observations = theirs.env.reset()
    for deterministic in (True, False):
        th.manual_seed(0)
        expected, _ = theirs.predict(observations, deterministic=deterministic)
        th.manual_seed(0)
        actual, _ = ours.predict(observations, deterministic=deterministic)
        assert np.array_equal(actual, expected)


def test_target_kl_stops_early_in_the_parity_case() -> None:
    # Otherwise the case above would not test early stopping: 4 iterations of 10 epochs without a stop are 40 updates.
    assert train(PPOPlus, CASES["target_kl"], presets.SB3_PPO)._n_updates < 40


class RecordRollouts(BaseCallback):
    """Copies of what callbacks can read at the end of each rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.rollouts: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer  # type: ignore[union-attr]
        names = ("observations", "actions", "values", "log_probs", "advantages", "returns", "episode_starts")
        self.rollouts.append({name: np.array(getattr(buffer, name)) for name in names})


@pytest.mark.parametrize("algorithm", EXACT)
def test_callbacks_read_the_rollout_that_sb3_shows_them(algorithm: str) -> None:
    sb3, plus, preset, _, _ = EXACT[algorithm]
    records = []
    for cls, extra in ((sb3, {}), (plus, preset)):
        record = RecordRollouts()
        env = make_env("Pendulum-v1", 3, False, 30)
        cls("MlpPolicy", env, seed=5, **{**extra, "n_steps": 64}).learn(3 * 64 * 3, callback=record)
        records.append(record.rollouts)
    for theirs, ours in zip(*records, strict=True):
        for name, expected in theirs.items():
            assert ours[name].shape == expected.shape
            assert np.array_equal(ours[name], expected), name


@pytest.mark.parametrize(
    ("sb3", "plus", "preset"),
    [(PPO, PPOPlus, presets.SB3_PPO), (A2C, A2CPlus, presets.SB3_A2C), (TRPO, TRPOPlus, presets.SB3_TRPO)],
)
def test_state_dict_keys_are_those_of_sb3_without_observation_normalisation(
    sb3: Any, plus: Any, preset: dict[str, Any]
) -> None:
    ours, theirs = plus("MlpPolicy", "CartPole-v1", **preset), sb3("MlpPolicy", "CartPole-v1")
    assert list(ours.policy.state_dict()) == list(theirs.policy.state_dict())
    assert ours.get_parameters().keys() == theirs.get_parameters().keys()


def test_the_fast_path_equals_the_exact_one_to_1e_5_after_an_iteration() -> None:
    models = []
    for exact in (True, False):
        env = make_env("Pendulum-v1", 4, False, 30)
        settings = {**presets.SB3_PPO, "sb3_exact": exact, "n_steps": 128, "n_epochs": 1}
        models.append(PPOPlus("MlpPolicy", env, seed=3, **settings).learn(128 * 4))
    exact_parameters, fast_parameters = (list(model.policy.parameters()) for model in models)
    for a, b in zip(exact_parameters, fast_parameters, strict=True):
        assert th.allclose(a, b, atol=1e-5, rtol=0)


# --- TRPO, up to rounding ---------------------------------------------------------------------------------------------

TRPO_SIZES: dict[str, Any] = {"n_steps": 128, "batch_size": 64}


@pytest.mark.parametrize("name", TRPO_CASES)
def test_the_trpo_preset_follows_sb3_contrib_to_1e_5_for_an_iteration(name: str) -> None:
    case = {**TRPO_SIZES, **TRPO_CASES[name]}
    theirs, ours = train(TRPO, case, {}, 1), train(TRPOPlus, case, presets.SB3_TRPO, 1)
    untrained = train(TRPOPlus, case, presets.SB3_TRPO, 0).policy.state_dict()
    keys = ("train/is_line_search_success", "train/kl_divergence_loss", "train/policy_objective", "train/value_loss")
    for key in keys:
        expected = theirs.logger.name_to_value[key]
        assert ours.logger.name_to_value[key] == pytest.approx(expected, rel=1e-3, abs=1e-6), key
    assert ours.logger.name_to_value[keys[0]] == (0 if name == "a search that fails" else 1)
    expected, actual = theirs.policy.state_dict(), ours.policy.state_dict()
    assert list(actual) == list(expected)
    for key, value in expected.items():
        th.testing.assert_close(actual[key], value, atol=1e-5, rtol=0, msg=key)
    # Policy and critic moved, and further than the tolerance: agreement is not that of two models that stood still.
    moved = {key for key, value in expected.items() if (value - untrained[key]).abs().max() > 1e-4}
    assert ("action_net.weight" in moved) == (name != "a search that fails")
    assert "value_net.weight" in moved
    observations = theirs.env.reset()
    expected, _ = theirs.predict(observations, deterministic=True)
    actual, _ = ours.predict(observations, deterministic=True)
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)


def test_dict_observations_can_be_thinned_where_sb3_contrib_fails() -> None:
    case = {**TRPO_SIZES, **TRPO_CASES["Dict observations"], "sub_sampling_factor": 4}
    with pytest.raises(TypeError, match="unhashable type: 'slice'"):
        train(TRPO, case, {}, 1)
    ours = train(TRPOPlus, case, presets.SB3_TRPO, 1)
    assert ours.logger.name_to_value["train/is_line_search_success"] == 1


# --- environments of the constructor's own ----------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Hopper-v5"])
def test_environments_that_the_constructor_makes_are_sb3s_whatever_runs_them(env_id: str) -> None:
    settings: dict[str, Any] = {"n_steps": 32, "batch_size": 32, "n_epochs": 2, "seed": 4, "device": "cpu"}
    ours = PPOPlus("MlpPolicy", env_id, **{**presets.SB3_PPO, **settings, "n_envs": 3}).learn(200)
    theirs = PPO("MlpPolicy", make_vec_env(env_id, 3), **settings).learn(200)
    assert ours.env is not None and backend_of(ours.env) == ("mujoco" if env_id == "Hopper-v5" else "serial")
    assert all(th.equal(a, b) for a, b in zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True))
    returns = [[episode["r"] for episode in model.ep_info_buffer or ()] for model in (ours, theirs)]
    assert returns[0] == returns[1] and returns[0]


class Trials(gym.Wrapper):  # type: ignore[type-arg]
    """Several episodes of what is inside are one outside; a Monitor inside counts each of them."""

    ended = 0

    def step(self, action: Any) -> Any:
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            self.ended += 1
            if self.ended % 5:
                return self.env.reset()[0], reward, False, False, info
        return observation, reward, terminated, truncated, info


def test_episodes_that_a_wrapper_hides_are_counted_as_sb3_counts_them() -> None:
    settings: dict[str, Any] = {"n_steps": 256, "batch_size": 64, "n_epochs": 1, "seed": 4, "device": "cpu"}
    counts = []
    for algorithm, preset in ((PPO, {}), (PPOPlus, presets.SB3_PPO)):
        env = make_vec_env("CartPole-v1", 1, seed=0, wrapper_class=Trials)
        model: Any = algorithm("MlpPolicy", env, **{**preset, **settings}).learn(512)
        counts.append(len(model.ep_info_buffer))
    assert counts[0] == counts[1] > 10
