"""
Episodes of N environments at once: the statistics that SB3's ``Monitor`` keeps for one, and SB3's ``infos``.

A dictionary per environment and step costs more than the step of a fast environment, and training reads none of it. So
an info has the environment's own entries only where an episode ends, or where ``full_infos`` asks for them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from stable_baselines3.common.monitor import ResultsWriter

from sb3_pgplus.vec_env.common import Array

#: Keyword arguments of ``Monitor`` that :class:`EpisodeMonitor` has, too.
MONITOR_ARGUMENTS = ("allow_early_resets", "info_keywords", "override_existing")

#: Lists of finished episodes, one for each environment.
_COLUMNS = ("episode_returns", "episode_lengths", "episode_times")


class LeanInfo(dict[str, Any]):
    """The info of a step inside an episode. It says how to get the entries that it lacks."""

    __slots__ = ()  # N of them are made in every step

    def __missing__(self, key: str) -> Any:
        if key in ("episode", "terminal_observation"):
            raise KeyError(key)
        raise KeyError(
            f"{key!r} is not in this info: inside an episode an environment's own entries cost time, so they are there "
            "only with full_infos=True"
        )


#: What SB3's vector environments say about time limits in every step.
RUNNING = {"TimeLimit.truncated": False}


def running_infos(n_envs: int) -> list[dict[str, Any]]:
    """
    Infos of a step in which no episode ends, a dictionary of its own for each environment.

    :param n_envs: N
    """
    return [LeanInfo(RUNNING) for _ in range(n_envs)]


class EpisodeMonitor:
    """
    Returns, lengths and times of the episodes of N environments, with the numbers that a ``Monitor`` around each gives.

    :param n_envs: N
    :param env_id: for the head of the files
    :param monitor_dir: folder for a file ``{start_index + i}.monitor.csv`` per environment, or None
    :param start_index: number of the first file
    :param allow_early_resets: whether a reset may cut an episode short
    :param info_keywords: entries of the final step's info to put into the statistics
    :param override_existing: whether to overwrite files instead of appending to them
    """

    def __init__(
        self,
        n_envs: int,
        env_id: str = "",
        monitor_dir: str | None = None,
        start_index: int = 0,
        *,
        allow_early_resets: bool = True,
        info_keywords: Sequence[str] = (),
        override_existing: bool = True,
    ) -> None:
        self.t_start = time.time()
        self.allow_early_resets = allow_early_resets
        self.info_keywords = tuple(info_keywords)
        self.total_steps = 0
        #: Steps of each running episode, ``[N]``.
        self.lengths: Array = np.zeros(n_envs, dtype=np.int64)
        self.episode_returns: list[list[float]] = [[] for _ in range(n_envs)]
        self.episode_lengths: list[list[int]] = [[] for _ in range(n_envs)]
        self.episode_times: list[list[float]] = [[] for _ in range(n_envs)]
        # Rewards of the last steps, at least those of all running episodes, `[capacity, N]`; `_row` is the next one.
        self._rewards: Array = np.empty((1024, n_envs))
        self._row = 0
        self._started = False
        self._writers: list[ResultsWriter] = []
        if monitor_dir is not None:
            header: dict[str, float | str] = {"t_start": self.t_start, "env_id": env_id}
            paths = [os.path.join(monitor_dir, str(start_index + i)) for i in range(n_envs)]
            os.makedirs(monitor_dir, exist_ok=True)
            self._writers = [ResultsWriter(path, header, self.info_keywords, override_existing) for path in paths]

    def start_all(self) -> None:
        """
        Begin an episode in every environment.

        :raises RuntimeError: if that cuts one short and may not
        """
        if self._started and not self.allow_early_resets:
            raise RuntimeError(
                "Tried to reset an environment before done. If you want to allow early resets, "
                "pass monitor_kwargs={'allow_early_resets': True}"
            )
        self._started = True
        self.lengths[:] = 0

    def add(self, rewards: Array) -> None:
        """
        Count one step of every environment.

        :param rewards: float64, ``[N]``
        """
        if self._row == len(self._rewards):
            self._make_room()
        self._rewards[self._row] = rewards
        self._row += 1
        self.lengths += 1
        self.total_steps += 1

    def _make_room(self) -> None:
        """Forget the rewards before the longest running episode; room for twice its length makes this rare."""
        longest = int(self.lengths.max())
        rewards = np.empty((max(len(self._rewards), 2 * longest), len(self.lengths)))
        rewards[:longest] = self._rewards[self._row - longest : self._row]
        self._rewards, self._row = rewards, longest

    def finish(self, env: int, info: Mapping[str, Any], terminated: Any, final_observation: Any) -> dict[str, Any]:
        """
        End an episode.

        :param env: index of the environment
        :param info: the environment's own info of the final step
        :param terminated: whether it ended by itself; then it is not truncated, whatever the clock says
        :param final_observation: the episode's last
        :return: SB3's info of that step
        """
        return {
            **info,
            "episode": self._statistics(env, info),
            "TimeLimit.truncated": not terminated,
            "terminal_observation": final_observation,
        }

    def _statistics(self, env: int, info: Mapping[str, Any]) -> dict[str, Any]:
        """Return, length, time and keywords of the episode that ends."""
        length = int(self.lengths[env])
        # Python's sum, as Monitor takes it: from 3.12 on it compensates rounding, which NumPy's does not.
        episode_return = sum(self._rewards[self._row - length : self._row, env].tolist())
        elapsed = time.time() - self.t_start
        episode = {"r": round(episode_return, 6), "l": length, "t": round(elapsed, 6)}
        episode |= {keyword: info[keyword] for keyword in self.info_keywords}
        self.episode_returns[env].append(episode_return)
        self.episode_lengths[env].append(length)
        self.episode_times[env].append(elapsed)
        if self._writers:
            self._writers[env].write_row(episode)
        self.lengths[env] = 0
        return episode

    def get_state(self) -> dict[str, Any]:
        """:return: everything that is counted, as a plain tree: arrays are ``[N]`` or of all episodes in a row"""
        longest = int(self.lengths.max(initial=0))
        columns = {name: np.array([*chain(*getattr(self, name))]) for name in _COLUMNS}
        return columns | {
            "finished": np.array([len(of_one) for of_one in self.episode_lengths]),
            "elapsed": time.time() - self.t_start,
            "total_steps": self.total_steps,
            "started": self._started,
            "running_lengths": self.lengths.copy(),
            "running_rewards": self._rewards[self._row - longest : self._row].copy(),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """
        Count on from where another monitor stopped; the time in between does not count.

        :param state: what :meth:`get_state` returned there
        """
        ends = np.cumsum(state["finished"])[:-1]
        for name in _COLUMNS:
            setattr(self, name, [of_one.tolist() for of_one in np.split(state[name], ends)])
        self.t_start = time.time() - state["elapsed"]
        self.total_steps, self._started = state["total_steps"], state["started"]
        self.lengths[:] = state["running_lengths"]
        rewards = state["running_rewards"]
        self._rewards = np.empty((max(1024, 2 * len(rewards)), len(self.lengths)))
        self._rewards[: len(rewards)], self._row = rewards, len(rewards)

    def abandon(self) -> None:
        """The running episodes cannot go on: the next reset does not cut them short."""
        self._started = False

    def close(self) -> None:
        """Close the files."""
        for writer in self._writers:
            writer.close()
