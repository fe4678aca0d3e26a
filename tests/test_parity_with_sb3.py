"""
Exact tier: with ``presets.SB3_PPO`` PPOPlus is SB3's PPO bit for bit (eager, CPU, same seed).

Each case runs both for several iterations and compares every parameter, the optimiser's state, ``predict`` and the
number of updates with ``==``; nothing here has a tolerance.
"""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_pgplus import PPOPlus, presets

N_ITERATIONS = 4


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


def train(cls: Any, case: dict[str, Any], extra: dict[str, Any]) -> Any:
    case = dict(case)
    policy, normalize, limit = (
        case.pop("policy", "MlpPolicy"),
        case.pop("normalize", False),
        case.pop("time_limit", None),
    )
    env = make_env(case.pop("env"), case.pop("n_envs"), normalize, limit)
    case.pop("stock", None)
    model = cls(policy, env, seed=11, device="cpu", **{**extra, **case})
    model.learn(N_ITERATIONS * model.n_steps * model.n_envs)
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
@pytest.mark.parametrize("name", CASES)
def test_the_preset_gives_the_parameters_of_sb3_bit_for_bit(name: str) -> None:
    case = CASES[name]
    extra = {**presets.SB3_PPO, **({"rollout_buffer_class": RolloutBuffer} if case.get("stock") else {})}
    theirs, ours = train(PPO, case, {}), train(PPOPlus, case, extra)
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


def test_callbacks_read_the_rollout_that_sb3_shows_them() -> None:
    records = []
    for cls, extra in ((PPO, {}), (PPOPlus, presets.SB3_PPO)):
        record = RecordRollouts()
        env = make_env("Pendulum-v1", 3, False, 30)
        cls("MlpPolicy", env, seed=5, **{**extra, "n_steps": 64}).learn(3 * 64 * 3, callback=record)
        records.append(record.rollouts)
    for theirs, ours in zip(*records, strict=True):
        for name, expected in theirs.items():
            assert ours[name].shape == expected.shape
            assert np.array_equal(ours[name], expected), name


def test_state_dict_keys_are_those_of_sb3_without_observation_normalisation() -> None:
    ours = PPOPlus("MlpPolicy", "CartPole-v1", **presets.SB3_PPO)
    theirs = PPO("MlpPolicy", "CartPole-v1")
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
