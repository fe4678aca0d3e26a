"""
On which CPUs a simulation's threads run.

A thread that is woken for a tenth of a millisecond is put by Linux onto the CPU of the one that wakes it, again and
again, although another CPU is idle: two threads then take longer than one. Batches of few simulations are that short.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

_TASKS = Path("/proc/self/task")


def thread_ids() -> frozenset[int]:
    """:return: the kernel's numbers of this process's threads; none where it is not Linux"""
    try:
        return frozenset(int(entry.name) for entry in _TASKS.iterdir())
    except OSError:
        return frozenset()


def find_current_cpu() -> Callable[[], int] | None:
    """:return: a function that tells on which CPU the calling thread runs, or None where there is none"""
    if not hasattr(os, "sched_setaffinity"):
        return None
    with suppress(OSError, AttributeError):
        found: Callable[[], int] = ctypes.CDLL(None).sched_getcpu
        return found if found() >= 0 else None
    return None


class WorkerPlacement:
    """
    Keeps threads off the CPU of the thread that calls them. Only theirs are moved, never the caller. More threads than
    there are other CPUs are left where they are.

    :param workers: the kernel's numbers of the threads
    """

    def __init__(self, workers: Iterable[int]) -> None:
        self.workers = tuple(workers)
        self._current_cpu = find_current_cpu() if self.workers else None
        self._caller_cpu = -1
        if self._current_cpu is not None:
            self._cpus = os.sched_getaffinity(0)  # as theirs, of which they are never given others
            if len(self._cpus) <= len(self.workers):
                self._current_cpu = None

    def keep_apart(self) -> None:
        """Called before each piece of work: 0.1 µs, unless the caller runs on another CPU than the last time."""
        if self._current_cpu is None:
            return
        cpu = self._current_cpu()
        if cpu == self._caller_cpu:
            return
        self._caller_cpu = cpu
        for worker in self.workers:
            with suppress(OSError):  # a sandbox may forbid it, and speed is all that is lost
                os.sched_setaffinity(worker, self._cpus - {cpu})
