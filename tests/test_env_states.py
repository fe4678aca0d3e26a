"""
A restored environment goes on as the one that it was taken from: every observation, reward, done and info is equal bit
for bit, over ends of episodes and resets. The oracle is the same environment, uninterrupted.
"""

import copy
import io
import json
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.vec_env import VecEnv

from sb3_pgplus import make_vec_env
from sb3_pgplus.vec_env.states import capture_state, restore_state

CLASSIC = ("CartPole-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1")
MUJOCO = ("HalfCheetah", "Hopper", "Walker2d", "Swimmer", "Ant", "Humanoid", "HumanoidStandup", "Reacher", "Pusher")
MUJOCO += ("InvertedPendulum", "InvertedDoublePendulum")


# --- what the tests share ---------------------------------------------------------------------------------------------


def stored(tree: Any) -> Any:
    """The tree after it was written and read without pickle: as JSON, and the arrays as an npz file."""
    arrays: dict[str, np.ndarray[Any, Any]] = {}

    def split(value: Any) -> Any:
        if isinstance(value, (np.ndarray, np.generic)):
            name = f"{len(arrays)}{'' if isinstance(value, np.ndarray) else ' scalar'}"
            arrays[name] = np.asarray(value)
            return {"array": name}
        if isinstance(value, dict):
            assert all(type(key) is str for key in value)
            return {"dict": {key: split(item) for key, item in value.items()}}
        if isinstance(value, (list, tuple)):
            return {type(value).__name__: [split(item) for item in value]}
        assert type(value) in (str, int, float, bool, type(None)), type(value)
        return value

    def join(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "array":
            return loaded[content][()] if content.endswith("scalar") else loaded[content]
        if kind == "dict":
            return {key: join(item) for key, item in content.items()}
        return {"list": list, "tuple": tuple}[kind](map(join, content))

    text, file = json.dumps(split(tree)), io.BytesIO()
    np.savez(file, **arrays)
    file.seek(0)
    loaded = np.load(file, allow_pickle=False)
    return join(json.loads(text))


def assert_same(first: Any, second: Any, where: str = "") -> None:
    """Equal in type and in every bit, but for the clock (``t``)."""
    assert type(first) is type(second), where
    if isinstance(first, dict):
        assert first.keys() == second.keys(), where
        for key in first.keys() - {"t"}:
            assert_same(first[key], second[key], f"{where}[{key!r}]")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(first, (np.ndarray, np.generic, float)):
        one, other = np.asarray(first), np.asarray(second)
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes()), where
    else:
        assert first == second, where


def random_actions(env: VecEnv, n_steps: int, seed: int) -> list[Any]:
    """Drawn from a copy of the space, whose own generator belongs to the state."""
    space = copy.deepcopy(env.action_space)
    space.seed(seed)
    return [np.array([space.sample() for _ in range(env.num_envs)]) for _ in range(n_steps)]


def steps(env: VecEnv, actions: list[Any]) -> list[Any]:
    """Everything that comes out of some steps, copied, since wrappers may give views of their buffers."""
    return [copy.deepcopy([*env.step(action), env.reset_infos]) for action in actions]


def assert_goes_on(build: Callable[[int], VecEnv], n_before: int = 25, n_after: int = 60) -> None:
    """
    :param build: makes the environments from a seed
    :param n_before: steps before the capture; it is done in the middle of episodes
    :param n_after: steps that have to be equal
    """
    original, fresh, reset = build(7), build(8), build(9)
    original.reset()
    actions = random_actions(original, n_before + n_after, seed=1)
    steps(original, actions[:n_before])
    state, reasons = capture_state(original)
    assert reasons == [] and state is not None and state["complete"] is True
    saved = stored(state)
    expected = steps(original, actions[n_before:])
    assert any(done.any() for _, _, done, _, _ in expected), "the test has to go over the end of an episode"
    reset.reset()
    for other in (fresh, reset):  # built and not yet reset, or reset already
        restore_state(other, saved)
        assert_same([*steps(other, actions[n_before:])], expected)
        assert_same(other.action_space.sample(), copy.deepcopy(original.action_space).sample())
    for env in (original, fresh, reset):
        env.close()


# --- one environment per copy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["dummy", "serial"])
@pytest.mark.parametrize("env_id", CLASSIC)
def test_classic_control_goes_on_bit_for_bit(env_id: str, backend: str) -> None:
    assert_goes_on(
        lambda seed: make_vec_env(env_id, 3, seed=seed, env_kwargs={"max_episode_steps": 21}, backend=backend)
    )


@pytest.mark.parametrize("task", MUJOCO)
@pytest.mark.parametrize("backend", ["serial", "mujoco"])
def test_mujoco_goes_on_bit_for_bit_with_its_warm_start_and_lagged_fields(task: str, backend: str) -> None:
    pytest.importorskip("mujoco.batch")
    kwargs = {"max_episode_steps": 13}
    assert_goes_on(lambda seed: make_vec_env(f"{task}-v5", 2, seed=seed, env_kwargs=kwargs, backend=backend), 18, 30)


def test_a_state_of_other_environments_is_refused() -> None:
    def build(env_id: str, n_envs: int, **kwargs: Any) -> VecEnv:
        return make_vec_env(env_id, n_envs, seed=0, **kwargs)

    state, _ = capture_state(build("CartPole-v1", 2, backend="serial"))
    assert state is not None
    with pytest.raises(ValueError, match="of 2 environments, and there are 3"):
        restore_state(build("CartPole-v1", 3, backend="serial"), state)
    with pytest.raises(ValueError, match="AcrobotEnv"):
        restore_state(build("Acrobot-v1", 2, backend="serial"), state)
    with pytest.raises(ValueError, match="DummyVecEnv"):
        restore_state(build("CartPole-v1", 2, backend="dummy"), state)


def test_an_unknown_environment_gives_a_reason_and_its_episode_restarts() -> None:
    class Counter(gym.Env[Any, Any]):
        observation_space = gym.spaces.Box(0, 100, (1,))
        action_space = gym.spaces.Discrete(2)

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            self.count = 0
            self.start = self.np_random.integers(50)
            return self.observe(), {}

        def step(self, action: Any) -> Any:
            self.count += 1
            return self.observe(), 1.0, self.count == 5, False, {}

        def observe(self) -> Any:
            return np.array([self.start + self.count], dtype=np.float32)

    original, restored = (make_vec_env(Counter, 2, seed=seed) for seed in (0, 5))
    original.reset()
    steps(original, random_actions(original, 8, seed=0))
    state, (reason,) = capture_state(original)
    assert state is not None and state["complete"] is False
    for words in ("environments 0-1", "Counter", "get_state", "set_state", "docs/vec_env.md"):
        assert words in reason
    restore_state(restored, stored(state))
    # Statistics and random numbers go on, and the new episodes are those that would have come next.
    assert restored.get_attr("episode_lengths") == [[5], [5]] and restored.get_attr("total_steps") == [8, 8]
    assert_same(restored.reset(), original.reset())
