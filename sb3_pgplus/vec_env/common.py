"""What all vector environments need: how many CPUs there are, SB3's ways to name environments, and checks."""

from __future__ import annotations

import os
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec, find_highest_version, get_env_id, parse_env_id

Array = np.ndarray[Any, Any]
Indices = int | Iterable[int] | None


def usable_cpus() -> int:
    """:return: the number of CPUs this process may use, which a container or ``taskset`` may have limited"""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def indices_of(indices: Indices, n_envs: int) -> list[int]:
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


def find_spec(env_id: str) -> EnvSpec | None:
    """
    What ``gymnasium.make`` would build, without its warnings: these come when it does.

    :param env_id: an id, with a module or not; one without a version means the newest
    :return: None if there is no such environment
    """
    name = env_id.rpartition(":")[2]
    if name in gym.registry:
        return gym.registry[name]
    try:
        namespace, base, version = parse_env_id(name)
    except gym.error.Error:
        return None
    if version is None:
        version = find_highest_version(namespace, base)
    return gym.registry.get(get_env_id(namespace, base, version))


def check_integer(name: str, value: Any, minimum: int) -> int:
    """
    :param name: of the argument
    :param value: what was given
    :param minimum: the smallest value allowed
    :raises TypeError: if it is not an integer
    :raises ValueError: if it is too small
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be an integer of at least {minimum}, got {value!r}")
    if value < minimum:
        raise ValueError(f"`{name}` must be an integer of at least {minimum}, got {value}")
    return int(value)


def check_switch(name: str, value: Any) -> bool:
    """
    :param name: of the argument
    :param value: what was given
    :raises TypeError: if it is not a bool
    """
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r}")
    return value
