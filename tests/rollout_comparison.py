"""Two vector environments side by side: everything they return has to be equal, bit for bit."""

from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

MUJOCO_TASKS = ("HalfCheetah", "Hopper", "Walker2d", "Swimmer", "Ant", "Humanoid", "HumanoidStandup", "Reacher")
MUJOCO_TASKS += ("Pusher", "InvertedPendulum", "InvertedDoublePendulum")


def random_actions(env: VecEnv, n_steps: int, seed: int = 0, scale: float = 1.0, dtype: Any = np.float32) -> Any:
    """Uniform over ``scale`` times the action space, ``[T, N, d]``."""
    space: Any = env.action_space
    shape = (n_steps, env.num_envs, *space.shape)
    return np.random.default_rng(seed).uniform(scale * space.low, scale * space.high, shape).astype(dtype)


def is_same(a: Any, b: Any) -> bool:
    """Equal values of equal shape and type; NaN equals NaN, and the time of an episode is not compared."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(key == "t" or is_same(a[key], b[key]) for key in a)
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def lean(info: dict[str, Any]) -> dict[str, Any]:
    """What is left of a full info where the environments' own entries are there at the end of an episode only."""
    return info if "episode" in info else {"TimeLimit.truncated": False}


def assert_same_rollouts(reference: VecEnv, env: VecEnv, actions: Any, full_infos: bool = True) -> dict[str, int]:
    """
    Reset both, step both, and compare observations, rewards, dones, infos and reset infos.

    Returns how often episodes ended, and how many of the ends were time limits.
    """
    counts = {"ended": 0, "truncated": 0}
    assert is_same(reference.reset(), env.reset())
    assert all(map(is_same, reference.reset_infos, env.reset_infos))
    for t, action in enumerate(actions):
        *expected, expected_infos = reference.step(action)
        *actual, infos = env.step(action)
        for name, a, b in zip(("observations", "rewards", "dones"), expected, actual, strict=True):
            assert is_same(a, b), f"step {t}: {name}\n{a}\n{b}"
        for a, b in zip(expected_infos, infos, strict=True):
            assert is_same(a if full_infos else lean(a), dict(b)), f"step {t}: info\n{a}\n{b}"
        assert all(map(is_same, reference.reset_infos, env.reset_infos)), f"step {t}"
        counts["ended"] += int(actual[2].sum())
        counts["truncated"] += sum(info["TimeLimit.truncated"] for info in infos)
    return counts
