"""
States of environments that cannot be put into a state: the running episode is played once more.

Box2D's physics and Atari's emulator keep more than can be read out and set. But an episode is determined by its actions
and by the state of the random generators that it began with.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from sb3_pgplus.vec_env.known_states import kind_of
from sb3_pgplus.vec_env.state_trees import Tree, from_tree, generator_from

#: Classes whose ``reset`` leaves nothing of what was before. Those of Box2D that keep their world are not among them:
#: the order of its contacts depends on the episodes before, and shows later.
FORGETFUL = frozenset({"gymnasium.envs.box2d.lunar_lander:LunarLander", "ale_py.env:AtariEnv"})


class EpisodeRecorder(gym.Wrapper[Any, Any, Any, Any]):
    """
    Records the running episode of the environment that it wraps: its beginning, its actions, and where other wrappers
    drew from its random generator. Its state is this record, and to restore it is to play it.

    :param env: Gymnasium's LunarLander or an Atari game of ALE, without wrappers
    :raises ValueError: if it is something else
    """

    #: What it wraps needs no state of its own.
    covers_inner = True

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        if kind_of(type(env)) not in FORGETFUL:
            raise ValueError(
                f"{type(env).__name__} may not be the same after each reset, so that an episode played once more may "
                f"end elsewhere: episodes can be recorded of {', '.join(sorted(FORGETFUL))}"
            )
        super().__init__(env)
        self._start: Tree = None
        self._actions: list[Any] = []
        self._draws: dict[str, Tree] = {}
        self._expected: Tree = None
        self._observation: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode, and its record."""
        self._start = {
            "generator": self._generator(),
            "seed": seed,
            "options": options,
            "emulator": _emulator(self.env),
        }
        self._actions, self._draws = [], {}
        self._observation, info = self.env.reset(seed=seed, options=options)
        self._expected = self._generator()
        return self._observation, info

    def step(self, action: Any) -> Any:
        """Take a step, and record it."""
        generator = self._generator()
        if generator != self._expected:
            self._draws[str(len(self._actions))] = generator
        self._actions.append(np.array(action))
        result = self.env.step(action)
        self._observation, self._expected = result[0], self._generator()
        return result

    def _generator(self) -> Tree:
        generator = self.env.unwrapped._np_random
        return None if generator is None else generator.bit_generator.state

    def get_state(self) -> Tree:
        """:return: the record"""
        if self._start is None:
            return None
        actions = np.array(self._actions)
        return {"start": self._start, "actions": actions, "draws": self._draws, "observation": self._observation}

    def set_state(self, state: Tree) -> None:
        """
        Play the record.

        :param state: what :meth:`get_state` returned
        :raises ValueError: if that leads to another observation
        """
        if state is None:
            return
        start, draws, base = state["start"], state["draws"], self.env.unwrapped
        _restore_emulator(self.env, start["emulator"])
        base._np_random = None if start["generator"] is None else generator_from(start["generator"])
        self.reset(seed=start["seed"], options=start["options"])
        self._start = from_tree(start)  # with the emulator's state as it was
        for index, action in enumerate(state["actions"]):
            if str(index) in draws:
                base._np_random = generator_from(draws[str(index)])
            self.step(action[()])
        if not _same(self._observation, state["observation"]):
            raise ValueError(f"{base} played its episode once more and came to another observation")


def record_episodes(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    """
    Put an :class:`EpisodeRecorder` around the innermost environment: a ``wrapper_class`` for ``make_vec_env``.

    :param env: maybe in wrappers, which stay
    :return: the same, with the recorder inside
    """
    if not isinstance(env, gym.Wrapper):
        return EpisodeRecorder(env)
    layer: Any = env
    while isinstance(layer.env, gym.Wrapper):
        layer = layer.env
    layer.env = EpisodeRecorder(layer.env)
    return env


def _emulator(env: Any) -> Tree:
    """The state of Atari's emulator. A reset leaves nothing of it but its random generator."""
    if not hasattr(env.unwrapped, "ale"):
        return None
    return np.frombuffer(env.unwrapped.clone_state(include_rng=True).serialize(), dtype=np.uint8)


def _restore_emulator(env: Any, tree: Tree) -> None:
    if tree is not None:
        import ale_py

        env.unwrapped.restore_state(ale_py.ALEState(tree.tobytes()))


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return all(_same(first[key], second[key]) for key in first)
    if isinstance(first, (tuple, list)):
        return all(map(_same, first, second))
    return np.array_equal(first, second, equal_nan=np.asarray(first).dtype.kind == "f")
