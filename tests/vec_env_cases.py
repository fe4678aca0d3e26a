"""Environments and a comparison for the tests of vector environments: SB3's DummyVecEnv is the oracle."""

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

EnvFns = list[Callable[[], gym.Env[Any, Any]]]


class Scripted(gym.Env[Any, Any]):
    """
    Episodes of given lengths that end in a given way, over and over; random observations, infos at every step.

    :param lengths: steps of the first episode, of the second, …
    :param ending: "terminated", "truncated" or "both", which is what a termination on the last allowed step is
    """

    observation_space: Any = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space: Any = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, lengths: tuple[int, ...] = (4,), ending: str = "terminated") -> None:
        self.lengths, self.ending = lengths, ending
        self.episodes = 0
        self.render_mode = "rgb_array"
        self.last_action: Any = None

    def render(self) -> Any:
        return np.full((2, 2, 3), self.episodes, dtype=np.uint8)

    def observe(self) -> Any:
        return self.np_random.normal(size=3).astype(np.float32)

    def shift(self, by: int, *, scale: int = 1) -> int:
        return self.episodes + by * scale

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.episodes += 1
        self.steps = 0
        return self.observe(), {"number": self.episodes, "option": (options or {}).get("option", 0)}

    def step(self, action: Any) -> Any:
        # An environment may compare an action with the one before, so that it must not change afterwards.
        change = 0.0 if self.last_action is None else float(np.sum(np.subtract(action, self.last_action)))
        self.last_action = action
        self.steps += 1
        ended = self.steps >= self.lengths[(self.episodes - 1) % len(self.lengths)]
        info = {"steps": self.steps, "where": np.full(2, self.steps), "nested": {"change": change}}
        reward = float(self.np_random.normal()) + change
        return self.observe(), reward, ended and self.ending != "truncated", ended and self.ending != "terminated", info


class ScriptedDict(Scripted):
    """Observations in a dict, and actions of several discrete parts."""

    observation_space = spaces.Dict(
        {
            "vector": Scripted.observation_space,
            "token": spaces.Discrete(4),
            "image": spaces.Box(0, 255, (2, 2), np.uint8),
        }
    )
    action_space = spaces.MultiDiscrete([3, 2])

    def observe(self) -> Any:
        image = self.np_random.integers(0, 256, (2, 2)).astype(np.uint8)
        return {"vector": super().observe(), "token": int(self.np_random.integers(4)), "image": image}


def scripted(*lengths: tuple[int, ...], ending: str = "terminated", cls: type[Scripted] = Scripted) -> EnvFns:
    """Functions that make one environment for each tuple of episode lengths."""
    return [lambda each=each: cls(each, ending) for each in lengths]  # type: ignore[misc]  # a default binds `each`


def registered(env_id: str, n_envs: int, **kwargs: Any) -> EnvFns:
    """Functions that make Gymnasium's own environments."""
    return [lambda: gym.make(env_id, **kwargs) for _ in range(n_envs)]


#: Together: time limits, consecutive ends, one-step episodes, ends on the limit, Dict and Discrete observations.
CASES: dict[str, Callable[[], EnvFns]] = {
    "CartPole": lambda: registered("CartPole-v1", 3),
    "Pendulum cut by its time limit": lambda: registered("Pendulum-v1", 2, max_episode_steps=7),
    "discrete observations": lambda: registered("FrozenLake-v1", 2, is_slippery=False, max_episode_steps=9),
    "ends on consecutive steps": lambda: scripted((3, 1, 1, 2), (4, 1), (5,)),
    "every step ends an episode": lambda: scripted((1,), (1,)),
    "truncations": lambda: scripted((3,), (5, 1), ending="truncated"),
    "terminations on the last allowed step": lambda: scripted((3,), (5, 1), ending="both"),
    "dict observations, several discrete actions": lambda: scripted((3, 1), (4,), cls=ScriptedDict),
    "a single environment": lambda: scripted((3, 1)),
}


class Step(NamedTuple):
    """What one ``step`` returned, and the ``reset_infos`` after it."""

    observations: Any
    rewards: Any
    dones: Any
    infos: list[dict[str, Any]]
    reset_infos: list[dict[str, Any]]


def monitored(env_fns: EnvFns) -> EnvFns:
    """Functions that put each environment into SB3's Monitor."""
    return [lambda fn=fn: Monitor(fn()) for fn in env_fns]  # type: ignore[misc]  # a default binds `fn`


def oracle(env_fns: EnvFns) -> VecEnv:
    """SB3's vector environment with SB3's statistics."""
    return DummyVecEnv(monitored(env_fns))


def play(env: VecEnv, steps: int = 40, seed: int = 3) -> tuple[Any, list[Step]]:
    """Seed, reset, and act by chance: the first observations, and the steps. Nothing is copied: aliasing shows."""
    env.action_space.seed(seed)
    env.seed(seed)
    first, taken = env.reset(), []
    for _ in range(steps):
        actions = np.stack([env.action_space.sample() for _ in range(env.num_envs)])
        observations, rewards, dones, infos = env.step(actions)
        taken.append(Step(observations, rewards, dones, list(infos), [dict(info) for info in env.reset_infos]))
    return first, taken


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    """Bitwise equality of nested dicts, lists and arrays, except for the time ``"t"``."""
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs), where
        for key in theirs.keys() - {"t"}:
            assert_same(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), where
        for index, (our, their) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(our, their, f"{where}[{index}]")
    else:
        assert np.asarray(ours).shape == np.asarray(theirs).shape, where
        np.testing.assert_array_equal(ours, theirs, err_msg=where)


def assert_plays_like_sb3(ours: VecEnv, env_fns: EnvFns, full_infos: bool, steps: int = 40) -> None:
    """Observations, rewards, dones and infos are DummyVecEnv's; brief infos only where no episode ended."""
    theirs = oracle(env_fns)
    (our_first, our_steps), (their_first, their_steps) = play(ours, steps), play(theirs, steps)
    assert_same(our_first, their_first, "reset")
    for number, (our, their) in enumerate(zip(our_steps, their_steps, strict=True)):
        where = f"step {number}: "
        for name in ("observations", "rewards", "dones", "reset_infos"):
            assert_same(getattr(our, name), getattr(their, name), where + name)
        assert (our.rewards.dtype, our.dones.dtype) == (their.rewards.dtype, their.dones.dtype)
        for index, done in enumerate(their.dones):
            expected = their.infos[index] if done or full_infos else {"TimeLimit.truncated": False}
            assert_same(our.infos[index], expected, f"{where}infos[{index}]")
        pieces = (
            [(our.observations, their.observations)]
            if not isinstance(our.observations, dict)
            else [(our.observations[key], their.observations[key]) for key in their.observations]
        )
        assert all(a.dtype == b.dtype for a, b in pieces)
    assert any(step.dones.any() for step in our_steps)
    theirs.close()
