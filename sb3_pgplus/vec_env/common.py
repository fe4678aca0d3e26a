"""What all vector environments need: how many CPUs there are, SB3's ways to name environments, and checks."""

from __future__ import annotations

import os
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import numpy as np

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
