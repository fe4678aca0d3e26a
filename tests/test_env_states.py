"""
A restored environment goes on as the one that it was taken from: every observation, reward, done and info is equal bit
for bit, over ends of episodes and resets. The oracle is the same environment, uninterrupted.
"""

import copy
import importlib.util
import io
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import wrappers
from gymnasium.vector import AutoresetMode
from sb3_contrib.common.wrappers import TimeFeatureWrapper
from stable_baselines3.common.atari_wrappers import AtariWrapper, ClipRewardEnv, MaxAndSkipEnv, WarpFrame
from stable_baselines3.common.envs import BitFlippingEnv, FakeImageEnv, IdentityEnv, IdentityEnvBox, SimpleMultiObsEnv
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecExtractDictObs,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
)

from sb3_pgplus import make_vec_env
from sb3_pgplus.vec_env import GymnasiumVecEnv, record_episodes
from sb3_pgplus.vec_env.states import capture_state, restore_state
from sb3_pgplus.vec_env.tensors import TensorStep, TensorVecEnv

try:
    from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
except gym.error.DependencyNotInstalled:
    HopperEnv = None  # type: ignore[assignment,misc]  # the tests that need it are skipped

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


@pytest.mark.parametrize("backend", ["serial", "mujoco"])
def test_the_clock_goes_on_without_the_time_in_between(backend: str) -> None:
    pytest.importorskip("mujoco.batch")
    settings: dict[str, Any] = {"env_kwargs": {"max_episode_steps": 4}, "backend": backend}
    original, restored = (make_vec_env("HalfCheetah-v5", 2, seed=0, **settings) for _ in range(2))
    original.reset()
    for counter in [original.episodes] if backend == "mujoco" else original.envs:
        counter.t_start -= 1000  # as if it had run for that long
    state, _ = capture_state(original)
    assert state is not None
    restore_state(restored, state)
    *_, infos, _ = steps(restored, random_actions(restored, 4, seed=0))[-1]
    assert all(1000 <= info["episode"]["t"] < 1060 for info in infos)


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


# --- wrappers and other environments ----------------------------------------------------------------------------------


def limited(build: Callable[[], gym.Env[Any, Any]], limit: int = 17) -> Callable[[int], VecEnv]:
    """Two copies in a time limit and a Monitor, seeded."""

    def vec_env(seed: int) -> VecEnv:
        env = DummyVecEnv([lambda: Monitor(wrappers.TimeLimit(build(), limit)) for _ in range(2)])
        env.seed(seed)
        env.action_space.seed(seed)
        return env

    return vec_env


def cart_pole() -> gym.Env[Any, Any]:
    return gym.make("CartPole-v1", max_episode_steps=17)


def pendulum() -> gym.Env[Any, Any]:
    return gym.make("Pendulum-v1", max_episode_steps=17)


WRAPPED: dict[str, Callable[[], gym.Env[Any, Any]]] = {
    "FrameStackObservation": lambda: wrappers.FrameStackObservation(pendulum(), 4),
    "FrameStackObservation zero": lambda: wrappers.FrameStackObservation(pendulum(), 4, padding_type="zero"),
    "DelayObservation": lambda: wrappers.DelayObservation(pendulum(), 3),
    "TimeAwareObservation": lambda: wrappers.TimeAwareObservation(pendulum()),
    "NormalizeObservation": lambda: wrappers.NormalizeObservation(pendulum()),
    "NormalizeReward": lambda: wrappers.NormalizeReward(pendulum()),
    "MaxAndSkipObservation": lambda: wrappers.MaxAndSkipObservation(pendulum(), 2),
    "StickyAction": lambda: wrappers.StickyAction(pendulum(), 0.4, (2, 4)),
    "RepeatAction": lambda: wrappers.RepeatAction(pendulum(), 2),
    "RecordEpisodeStatistics": lambda: wrappers.RecordEpisodeStatistics(pendulum(), stats_key="statistics"),
    "RescaleAction": lambda: wrappers.RescaleAction(pendulum(), np.float32(-1), np.float32(1)),
    "ClipAction": lambda: wrappers.ClipAction(pendulum()),
    "FlattenObservation": lambda: wrappers.FlattenObservation(wrappers.FrameStackObservation(pendulum(), 2)),
    "TransformReward": lambda: wrappers.TransformReward(pendulum(), lambda reward: reward / 10),
    "ClipReward": lambda: wrappers.ClipReward(pendulum(), -1, 1),
    "DtypeObservation": lambda: wrappers.DtypeObservation(pendulum(), np.float64),
    "FrozenLake": lambda: gym.make("FrozenLake-v1"),
    "CliffWalking": lambda: gym.make("CliffWalking-v1", is_slippery=True),
    "Taxi": lambda: gym.make("Taxi-v4", is_rainy=True, fickle_passenger=True),
    "Blackjack": lambda: gym.make("Blackjack-v1"),
    "IdentityEnv": lambda: IdentityEnv(dim=4, ep_length=9),
    "IdentityEnvBox": lambda: IdentityEnvBox(ep_length=9),
    "SimpleMultiObsEnv": lambda: SimpleMultiObsEnv(random_start=False),
    "FakeImageEnv": FakeImageEnv,  # samples its observation space
    "WarpFrame": lambda: ClipRewardEnv(WarpFrame(MaxAndSkipEnv(FakeImageEnv(4, 40, 40, 3), 2), 24, 24)),
    "BitFlippingEnv": lambda: BitFlippingEnv(n_bits=4),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapped_and_other_environments_go_on_bit_for_bit(name: str) -> None:
    assert_goes_on(limited(WRAPPED[name]))


def test_observed_pictures_go_on_bit_for_bit() -> None:
    def build() -> gym.Env[Any, Any]:
        return wrappers.AddRenderObservation(gym.make("FrozenLake-v1", render_mode="rgb_array"))

    assert_goes_on(limited(build, 5), 3, 6)


@pytest.mark.parametrize("version", ["Ant-v4", "Humanoid-v4", "Reacher-v4"])
def test_the_older_mujoco_tasks_go_on_bit_for_bit(version: str) -> None:
    assert_goes_on(limited(lambda: gym.make(version), 9), 12, 20)


def zoo_wrappers() -> Any:
    """``rl_zoo3.wrappers`` without its package, which puts another TimeLimit into Gymnasium for all tests."""
    package = importlib.util.find_spec("rl_zoo3")
    if package is None or package.origin is None:
        pytest.skip("rl_zoo3 is not installed")
    spec = importlib.util.spec_from_file_location("rl_zoo3.wrappers", Path(package.origin).with_name("wrappers.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ZOO = ("ActionSmoothingWrapper", "DelayedRewardWrapper", "HistoryWrapper", "FrameSkip", "MaskVelocityWrapper")


@pytest.mark.parametrize("name", [*ZOO, "ActionNoiseWrapper", "TimeFeatureWrapper"])
def test_wrappers_of_rl_zoo_and_sb3_contrib_go_on_bit_for_bit(name: str) -> None:
    wrapper = TimeFeatureWrapper if name == "TimeFeatureWrapper" else getattr(zoo_wrappers(), name)
    settings = {"ActionSmoothingWrapper": {"smoothing_coef": 0.5}, "DelayedRewardWrapper": {"delay": 4}}
    if name != "ActionNoiseWrapper":  # it draws from NumPy's global generator
        assert_goes_on(limited(lambda: wrapper(pendulum(), **settings.get(name, {}))))
    assert capture_state(limited(lambda: wrapper(pendulum()))(0))[1] == []


def test_the_state_of_a_randomly_made_map_is_refused_by_another_map() -> None:
    def build(map_name: str) -> VecEnv:
        return make_vec_env("FrozenLake-v1", 1, seed=0, env_kwargs={"map_name": map_name})

    state, _ = capture_state(build("4x4"))
    assert state is not None
    with pytest.raises(ValueError, match="FrozenLakeEnv with another desc"):
        restore_state(build("8x8"), state)


VEC_WRAPPED: dict[str, Callable[[VecEnv], VecEnv]] = {
    "VecMonitor": VecMonitor,
    "VecNormalize": VecNormalize,
    "VecNormalize without rewards": lambda env: VecNormalize(env, norm_reward=False),
    "VecFrameStack": lambda env: VecFrameStack(env, 3),
    "VecCheckNan": VecCheckNan,
    "all": lambda env: VecCheckNan(VecFrameStack(VecNormalize(VecMonitor(env)), 2)),
}


@pytest.mark.parametrize("name", VEC_WRAPPED)
@pytest.mark.filterwarnings("ignore:The environment is already wrapped with a `Monitor`")
def test_wrapped_vector_environments_go_on_bit_for_bit(name: str) -> None:
    assert_goes_on(lambda seed: VEC_WRAPPED[name](limited(pendulum)(seed)))


@pytest.mark.parametrize("wrap", [VecNormalize, lambda env: VecFrameStack(env, 2), VecTransposeImage])
def test_wrapped_dict_observations_go_on_bit_for_bit(wrap: Callable[[VecEnv], VecEnv]) -> None:
    assert_goes_on(lambda seed: wrap(limited(lambda: SimpleMultiObsEnv(random_start=False, channel_last=True))(seed)))
    assert_goes_on(lambda seed: VecExtractDictObs(limited(lambda: SimpleMultiObsEnv(random_start=False))(seed), "vec"))


# --- other backends ---------------------------------------------------------------------------------------------------


class RandomStart(gym.Wrapper[Any, Any, Any, Any]):
    """Draws from NumPy's global generator, as some environments do. It has no state of its own."""

    def reset(self, **kwargs: Any) -> Any:
        observation, info = self.env.reset(**kwargs)
        return observation + np.float32(np.random.random()), info


#: Quick to start, where there are no threads that it could break.
FORKED: dict[str, Any] = {"vec_env_kwargs": {"start_method": "fork"}}


def test_workers_go_on_bit_for_bit_with_the_generators_of_their_processes() -> None:
    settings: dict[str, Any] = {"env_kwargs": {"max_episode_steps": 13}, "wrapper_class": RandomStart, **FORKED}
    assert_goes_on(
        lambda seed: make_vec_env("Pendulum-v1", 3, seed=seed, backend="workers", n_threads=2, **settings), 20, 30
    )


def test_workers_refuse_the_state_of_other_environments_and_live_on() -> None:
    env, other = (make_vec_env(name, 2, seed=0, backend="workers", **FORKED) for name in ("CartPole-v1", "Acrobot-v1"))
    state, _ = capture_state(env)
    assert state is not None
    with pytest.raises(ValueError, match="AcrobotEnv"):
        restore_state(other, state)
    other.reset()
    other.step_async(np.zeros(2, dtype=np.int64))
    with pytest.raises(RuntimeError, match="middle of a step"):
        capture_state(other)
    other.step_wait()
    env.close()
    other.close()


@pytest.mark.parametrize("mode", [*AutoresetMode])
def test_gymnasiums_vector_environments_go_on_bit_for_bit(mode: AutoresetMode) -> None:
    def build(seed: int) -> VecEnv:
        settings: Any = {"vectorization_mode": "sync", "vector_kwargs": {"autoreset_mode": mode}}
        env = GymnasiumVecEnv(gym.make_vec("CartPole-v1", 3, max_episode_steps=17, **settings))
        env.seed(seed)
        env.action_space.seed(seed)
        return env

    assert_goes_on(build)


def test_wrappers_around_gymnasiums_vector_environments_go_on_bit_for_bit() -> None:
    def build(seed: int) -> VecEnv:
        vector_env = gym.make_vec("Pendulum-v1", 3, max_episode_steps=17, vectorization_mode="sync")
        wrapped = wrappers.vector.NormalizeObservation(wrappers.vector.RecordEpisodeStatistics(vector_env))
        env = GymnasiumVecEnv(wrappers.vector.NormalizeReward(wrapped))
        env.seed(seed)
        env.action_space.seed(seed)
        return env

    assert_goes_on(build)


def test_a_native_vector_environment_goes_on_bit_for_bit() -> None:
    def build(seed: int) -> VecEnv:
        # A time limit shorter than the pole takes to fall: all episodes end at once, so that no mask is needed.
        env = GymnasiumVecEnv(gym.make_vec("CartPole-v1", 2, "vector_entry_point", max_episode_steps=6))
        env.seed(seed)
        env.action_space.seed(seed)
        return env

    assert_goes_on(build, 15, 20)


class Fall(TensorVecEnv):
    """Falls until it is below zero, from a random height."""

    def __init__(self, num_envs: int) -> None:
        super().__init__(num_envs, gym.spaces.Box(-9, 9, (1,)), gym.spaces.Box(0, 1, (1,)))
        self.random = th.Generator()

    def reset_tensors(self, seed: int | None) -> th.Tensor:
        self.height = self._start()
        return self.height

    def _start(self) -> th.Tensor:
        return 5 * th.rand(self.num_envs, 1, generator=self.random)

    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        below = self.height - actions
        ended = below[:, 0] < 0
        self.height = th.where(ended[:, None], self._start(), below)
        return TensorStep(self.height, below[:, 0], ended, th.zeros_like(ended), below)


class TellingFall(Fall):
    """With ``get_state`` and ``set_state``."""

    def get_state(self) -> Any:
        return {"height": self.height.numpy(), "random": self.random.get_state().numpy()}

    def set_state(self, state: Any) -> None:
        self.height = th.from_numpy(state["height"])
        self.random.set_state(th.from_numpy(state["random"]))


def test_tensors_go_on_bit_for_bit_where_the_simulator_tells_its_state() -> None:
    def build(seed: int) -> VecEnv:
        env = TellingFall(3)
        env.action_space.seed(seed)
        return env

    assert_goes_on(build)
    reason = reasons_of(Fall(2))
    assert "Fall" in reason and "get_state" in reason


# --- states of one's own ----------------------------------------------------------------------------------------------


class Walk(gym.Env[Any, Any]):
    """A random walk that keeps its position and the path so far, and says so."""

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(-100, 100, (1,))
        self.action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.position = self.np_random.normal()
        self.path: dict[int, float] = {}
        return self.observe(), {}

    def step(self, action: Any) -> Any:
        self.position += 2 * int(action) - 1 + self.np_random.normal()
        self.path[len(self.path)] = self.position
        return self.observe(), sum(self.path.values()), abs(self.position) > 5, False, {}

    def observe(self) -> Any:
        return np.array([self.position], dtype=np.float32)


class TellingWalk(Walk):
    """With ``get_state`` and ``set_state``."""

    def get_state(self) -> Any:
        return {"position": self.position, "path": [*self.path.values()]}

    def set_state(self, state: Any) -> None:
        self.position, self.path = state["position"], dict(enumerate(state["path"]))


class Averaging(gym.ObservationWrapper[Any, Any, Any]):
    """A wrapper with a state."""

    average = 0.0

    def observation(self, observation: Any) -> Any:
        self.average = 0.9 * self.average + 0.1 * float(observation[0])
        return observation - np.float32(self.average)

    def get_state(self) -> Any:
        return {"average": self.average}

    def set_state(self, state: Any) -> None:
        self.average = state["average"]


class Summing(VecEnvWrapper):
    """A wrapper around a vector environment, with a state."""

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self.sums = np.zeros(venv.num_envs)

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        observations, rewards, dones, infos = self.venv.step_wait()
        self.sums += rewards
        return observations, rewards + self.sums, dones, infos

    def get_state(self) -> Any:
        return {"sums": self.sums}

    def set_state(self, state: Any) -> None:
        self.sums = state["sums"]


class Hopping(HopperEnv if HopperEnv else object):  # type: ignore[misc]  # without MuJoCo there is no such class
    """A MuJoCo task with a state besides the simulation's; ``set_state`` is MuJoCo's own, too."""

    pushes = 0

    def step(self, action: Any) -> Any:
        self.pushes += 1
        return super().step(action * np.cos(self.pushes))

    def get_state(self) -> Any:
        return {"pushes": self.pushes}

    def set_state(self, *state: Any) -> None:
        if len(state) == 2:
            super().set_state(*state)
        else:
            self.pushes = state[0]["pushes"]


class Tired(HopperEnv if HopperEnv else object):  # type: ignore[misc]
    """A MuJoCo task whose state is the simulation's alone."""

    def step(self, action: Any) -> Any:
        observation, reward, *rest = super().step(action)
        return (observation, reward - abs(self.data.qvel).sum(), *rest)


def test_environments_and_wrappers_that_tell_their_state_go_on_bit_for_bit() -> None:
    assert_goes_on(lambda seed: Summing(limited(lambda: Averaging(TellingWalk()))(seed)))


def test_a_mujoco_environment_adds_its_own_state_to_the_simulations() -> None:
    pytest.importorskip("mujoco")
    assert_goes_on(limited(Hopping, 30), 20, 60)
    assert_goes_on(limited(Tired, 30), 20, 60)


def test_the_state_does_not_change_with_the_environment_nor_the_environment_with_it() -> None:
    env = Summing(limited(TellingWalk)(3))
    env.reset()
    actions = random_actions(env, 12, seed=0)
    steps(env, actions[:6])
    state, _ = capture_state(env)
    assert state is not None
    before = copy.deepcopy(state)
    steps(env, actions[6:])
    assert_same(state, before)
    restore_state(env, state)
    steps(env, actions[6:])
    assert_same(state, before)


# --- where there is none ----------------------------------------------------------------------------------------------


def reasons_of(env: VecEnv) -> str:
    state, reasons = capture_state(env)
    assert state is None or state["complete"] is (not reasons)
    env.close()
    return " ".join(reasons)


def test_a_recorded_lunar_lander_goes_on_bit_for_bit() -> None:
    pytest.importorskip("Box2D")
    settings: dict[str, Any] = {"env_kwargs": {"max_episode_steps": 70}, "wrapper_class": record_episodes}
    assert_goes_on(lambda seed: make_vec_env("LunarLander-v3", 2, seed=seed, **settings), 100, 150)
    # Outer wrappers that draw from the environment's own generator are recorded with it.
    assert_goes_on(
        limited(lambda: wrappers.StickyAction(record_episodes(gym.make("LunarLander-v3")), 0.3), 70), 100, 150
    )


def test_recorded_atari_games_go_on_bit_for_bit_with_screen_and_sticky_actions() -> None:
    gym.register_envs(pytest.importorskip("ale_py"))
    pytest.importorskip("cv2")

    def build() -> gym.Env[Any, Any]:
        env = record_episodes(gym.make("ALE/Qbert-v5", frameskip=1, repeat_action_probability=0.25))
        return AtariWrapper(env, action_repeat_probability=0.2)

    assert_goes_on(limited(build, 25), 40, 40)


def test_only_what_forgets_at_a_reset_is_recorded() -> None:
    pytest.importorskip("Box2D")
    with pytest.raises(ValueError, match="BipedalWalker may not be the same after each reset"):
        record_episodes(gym.make("BipedalWalker-v3"))


def test_a_record_that_leads_elsewhere_is_noticed() -> None:
    pytest.importorskip("Box2D")
    env = make_vec_env("LunarLander-v3", 1, seed=0, wrapper_class=record_episodes)
    env.reset()
    steps(env, random_actions(env, 30, seed=0))
    state, _ = capture_state(env)
    assert state is not None
    windy = make_vec_env("LunarLander-v3", 1, wrapper_class=record_episodes, env_kwargs={"gravity": -5.0})
    with pytest.raises(ValueError, match="came to another observation"):
        restore_state(windy, state)


@pytest.mark.parametrize(
    ("env_id", "package", "words"),
    [("BipedalWalker-v3", "Box2D", "Box2D"), ("ALE/Pong-v5", "ale_py", "record_episodes")],
)
def test_what_cannot_be_had_is_said(env_id: str, package: str, words: str) -> None:
    module = pytest.importorskip(package)
    if package == "ale_py":
        gym.register_envs(module)
    assert words in reasons_of(make_vec_env(env_id, 1, backend="dummy"))


def test_other_processes_of_other_libraries_are_said_to_have_none() -> None:
    assert "'workers'" in reasons_of(SubprocVecEnv([cart_pole], start_method="fork"))
    assert "'workers'" in reasons_of(GymnasiumVecEnv(gym.make_vec("CartPole-v1", 1, vectorization_mode="async")))


class Scaled(gym.RewardWrapper[Any, Any]):
    """Has a setting and nothing else."""

    def __init__(self, env: Any, scale: float) -> None:
        super().__init__(env)
        self.scale = scale

    def reward(self, reward: Any) -> Any:
        return reward * self.scale


class Counting(Scaled):
    """Stores an attribute."""

    def reward(self, reward: Any) -> Any:
        self.scale += 1
        return reward * self.scale


class Keeping(Scaled):
    """Stores a list in its constructor."""

    def __init__(self, env: Any) -> None:
        super().__init__(env, 1.0)
        self.kept: list[Any] = []


class Tuned(gym.Wrapper[Any, Any, Any, Any]):
    """Changes a setting of the environment."""

    def reset(self, **kwargs: Any) -> Any:
        self.unwrapped.gravity = self.unwrapped.np_random.uniform(9, 10)
        return self.env.reset(**kwargs)


class Noted(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """Has an array, and notes its arguments."""

    def __init__(self, env: Any, **settings: Any) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, **settings)
        super().__init__(env)
        self.shift = np.ones(1)

    def step(self, action: Any) -> Any:
        observation, *rest = self.env.step(action)
        return (observation + self.shift.astype(np.float32), *rest)


class Nameless(Scaled):
    """Stores without a name."""

    def __init__(self, env: Any) -> None:
        super().__init__(env, 1.0)
        setattr(self, "ke" + "pt", [])


class Aliasing(Noted):
    """Changes an array in place."""

    def step(self, action: Any) -> Any:
        shift = self.shift
        shift += 1.0
        return super().step(action)


class Highest(Noted):
    """Changes an array by a keyword of a function."""

    def step(self, action: Any) -> Any:
        observation, *rest = super().step(action)
        return (np.maximum(self.shift, observation, out=self.shift), *rest)


class Lowest(Noted):
    """Changes an array by its position among the arguments."""

    def step(self, action: Any) -> Any:
        observation, *rest = super().step(action)
        return (np.minimum(self.shift, observation, self.shift), *rest)


class Sorting(Noted):
    """Changes an array by a method of it."""

    def step(self, action: Any) -> Any:
        self.shift.sort()
        return super().step(action)


#: As another module of a user's.
helpers = types.ModuleType("helpers")
exec("def bump(wrapper): wrapper.scale += 1\ndef double(number): return 2 * number", vars(helpers))
bump, double = helpers.bump, helpers.double


class Bumping(Scaled):
    """Is changed by a function of another module."""

    def reward(self, reward: Any) -> Any:
        bump(self)
        return reward * self.scale


class BumpingByModule(Scaled):
    """Is changed by a function of another module, called through that."""

    def reward(self, reward: Any) -> Any:
        helpers.bump(self)
        return reward * self.scale


class BumpingByImport(Scaled):
    """Is changed by a function that is imported where it is called."""

    def reward(self, reward: Any) -> Any:
        from helpers import bump  # type: ignore[import-not-found]  # is never called

        bump(self)
        return reward * self.scale


class Doubling(Scaled):
    """Only computes with a function of another module."""

    def reward(self, reward: Any) -> Any:
        return double(reward) * self.scale


class Tally:
    """A class as a container."""

    n = 0

    @classmethod
    def push(cls) -> int:
        cls.n += 1
        return cls.n


class Tallying(Scaled):
    """Keeps something in a class."""

    def reward(self, reward: Any) -> Any:
        return reward * Tally.push()


@pytest.mark.parametrize(
    ("wrap", "why"),
    [
        (Highest, "Highest.step uses out in step()"),
        (Lowest, "Lowest.step may change shift in step()"),
        (Sorting, "Sorting.step may change shift in step()"),
    ],
)
def test_a_wrapper_that_may_change_its_array_by_a_call_has_a_state(wrap: Any, why: str) -> None:
    assert why in reasons_of(limited(lambda: wrap(pendulum()))(0))


@pytest.mark.parametrize(
    ("wrap", "why"),
    [
        (Bumping, "Bumping.reward uses bump, which stores something in bump()"),
        (BumpingByModule, "BumpingByModule.reward uses helpers, which is a module"),
        (BumpingByImport, "BumpingByImport.reward imports helpers in reward()"),
        (Tallying, "Tallying.reward uses Tally, which is a type"),
    ],
)
def test_a_wrapper_that_other_code_of_its_user_may_change_has_a_state(wrap: Any, why: str) -> None:
    assert why in reasons_of(limited(lambda: wrap(pendulum(), 1.0))(0))


def test_a_wrapper_that_computes_with_a_function_of_another_module_has_no_state() -> None:
    assert_goes_on(limited(lambda: Doubling(pendulum(), 3.0)))


def test_a_subclass_without_state_is_as_its_base_and_one_with_state_is_not() -> None:
    assert_goes_on(limited(lambda: Scaled(pendulum(), 3.0)))
    assert_goes_on(limited(lambda: Noted(pendulum(), something=[])))
    for build, why in {
        lambda: Counting(pendulum(), 1.0): "Counting.reward stores something in reward()",
        lambda: Keeping(pendulum()): "Keeping.__init__ stores kept, which is a list",
        lambda: Nameless(pendulum()): "Nameless.__init__ uses setattr",
        lambda: Aliasing(pendulum()): "Aliasing.step stores something in step()",
        lambda: Tuned(cart_pole()): "Tuned.reset stores something in reset()",
    }.items():
        assert why in reasons_of(limited(build)(0))


def test_methods_of_these_names_with_other_arguments_are_not_the_protocol() -> None:
    class Other(Walk):
        def get_state(self, index: int) -> Any:
            raise AssertionError("never called")

        def set_state(self, state: Any) -> None:
            raise AssertionError("never called")

    assert "Other" in reasons_of(limited(Other)(0))


def test_a_state_that_is_not_plain_or_not_to_be_had_is_a_reason() -> None:
    class Opaque(TellingWalk):
        def get_state(self) -> Any:
            return {"environment": self}

    class Refusing(TellingWalk):
        def get_state(self) -> Any:
            raise NotImplementedError("the robot is real")

    assert "Opaque is not plain data" in reasons_of(limited(Opaque)(0))
    assert "the robot is real" in reasons_of(limited(Refusing)(0))


def test_functions_given_to_wrappers_are_looked_at() -> None:
    seen: list[float] = []
    scale = 0.1

    def remembering(reward: Any) -> Any:
        seen.append(float(reward))
        return reward

    assert_goes_on(limited(lambda: wrappers.TransformReward(pendulum(), lambda reward: scale * reward)))
    reason = reasons_of(limited(lambda: wrappers.TransformReward(pendulum(), remembering))(0))
    assert "has a function func that may keep something: it uses append" in reason


# --- at the end, since nothing should be forked after JAX was imported ------------------------------------------------


def test_tensors_from_jax_go_on_bit_for_bit() -> None:
    jax = pytest.importorskip("jax")
    from gymnasium.experimental.functional import FuncEnv

    from sb3_pgplus.vec_env.jax_adapter import JaxVecEnv

    class Drift(FuncEnv):  # type: ignore[misc,type-arg]  # its type parameters need JAX's types
        observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
        action_space = gym.spaces.Box(-1, 1, (2,))

        def initial(self, rng: Any, params: Any = None) -> Any:
            return {"position": jax.random.normal(rng, (2,)), "age": 0}

        def transition(self, state: Any, action: Any, rng: Any, params: Any = None) -> Any:
            noise = jax.random.normal(rng, (2,))
            return {"position": state["position"] + action + noise, "age": state["age"] + 1}

        def observation(self, state: Any, rng: Any, params: Any = None) -> Any:
            return state["position"]

        def reward(self, state: Any, action: Any, next_state: Any, rng: Any, params: Any = None) -> Any:
            return next_state["position"].sum() * next_state["age"]

        def terminal(self, state: Any, rng: Any, params: Any = None) -> Any:
            return abs(state["position"]).max() > 5

    compiled = JaxVecEnv(Drift(), 3, max_episode_steps=13)  # once, which takes seconds

    def build(seed: int) -> VecEnv:
        env = JaxVecEnv(Drift(), 3, max_episode_steps=13, seed=seed)
        env._reset, env._step = compiled._reset, compiled._step
        env.action_space = copy.deepcopy(env.action_space)  # a class attribute otherwise, shared by all
        env.action_space.seed(seed)
        return env

    assert_goes_on(build)
