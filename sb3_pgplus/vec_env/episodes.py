"""What vector environments tell about episodes in SB3's ``infos``: statistics, and a dict for each environment."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from stable_baselines3.common.monitor import Monitor

Array = np.ndarray[Any, Any]


class EpisodeStatistics:
    """
    Return, length and time of the episodes of N environments, as SB3's ``Monitor`` reports them for one.

    :param n_envs: N
    """

    def __init__(self, n_envs: int) -> None:
        self.returns = np.zeros(n_envs)
        self.lengths = np.zeros(n_envs, dtype=np.int64)
        self._start = time.time()

    def reset(self) -> None:
        """Forget the episodes that are under way."""
        self.returns[:] = 0.0
        self.lengths[:] = 0

    def add(self, rewards: Array) -> None:
        """
        Count a step of every environment.

        :param rewards: ``[N]``
        """
        self.returns += rewards
        self.lengths += 1

    def finish(self, index: int) -> dict[str, float]:
        """
        End the episode of one environment.

        :param index: which environment
        :return: return ``"r"``, length ``"l"`` and seconds since the start ``"t"``
        """
        record = {
            "r": round(float(self.returns[index]), 6),
            "l": int(self.lengths[index]),
            "t": round(time.time() - self._start, 6),
        }
        self.returns[index] = 0.0
        self.lengths[index] = 0
        return record


def running_infos(n_envs: int) -> list[dict[str, Any]]:
    """
    Infos of a step in which no episode ended, a dict of its own for each environment.

    :param n_envs: N
    """
    return [{"TimeLimit.truncated": False} for _ in range(n_envs)]


def info_of(infos: Mapping[str, Any], index: int, n_envs: int) -> dict[str, Any]:
    """
    Take one environment's info out of Gymnasium's dict of arrays, where ``infos["_key"]`` says who has ``"key"``.

    :param infos: arrays ``[N, ...]``, dicts of such, or values that all environments share
    :param index: which environment
    :param n_envs: N
    :return: what that environment told, in arrays of its own
    """
    info = {}
    for key, value in infos.items():
        if key.startswith("_") and key[1:] in infos:
            continue
        has_it = infos.get(f"_{key}")
        if has_it is None or has_it[index]:
            info[key] = _entry(value, index, n_envs)
    return info


def _entry(value: Any, index: int, n_envs: int) -> Any:
    if isinstance(value, Mapping):
        return info_of(value, index, n_envs)
    batched = isinstance(value, (list, tuple)) or np.ndim(value) > 0
    if not batched or len(value) != n_envs:
        return value
    entry = value[index]
    return entry.copy() if isinstance(entry, np.ndarray) else entry


def observation_of(observations: Any, index: int) -> Any:
    """
    Copy one environment's observation out of a batch.

    :param observations: ``[N, ...]``, or a dict of such
    :param index: which environment
    """
    if isinstance(observations, Mapping):
        return {key: np.array(values[index]) for key, values in observations.items()}
    if isinstance(observations[index], Mapping):  # an array of dicts
        return {key: np.array(value) for key, value in observations[index].items()}
    return np.array(observations[index])


def array_pairs(first: Any, second: Any) -> list[tuple[Array, Any]]:
    """
    The arrays of two batches of observations, side by side.

    :param first: ``[N, ...]``, or a dict of such
    :param second: likewise, with the same keys
    """
    return [(first[key], second[key]) for key in first] if isinstance(first, dict) else [(first, second)]


def monitors_episodes(wrapper_class: type[Any]) -> bool:
    """
    Tell whether a wrapper is SB3's ``Monitor``, whose work a vector environment with statistics of its own has done.

    :param wrapper_class: what ``env_is_wrapped`` was asked for
    """
    return issubclass(wrapper_class, Monitor)


def indices_of(indices: int | Iterable[int] | None, n_envs: int) -> list[int]:
    """
    SB3's ways to name environments, as a list.

    :param indices: an index, several, or None for all; negative ones count from the end
    :param n_envs: N
    :raises IndexError: if there is no such environment
    """
    if indices is None:
        return list(range(n_envs))
    named = [indices] if isinstance(indices, (int, np.integer)) else indices
    return [range(n_envs)[int(i)] for i in named]
