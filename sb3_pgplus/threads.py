"""
How many of torch's CPU threads a piece of work gets: threads that wait for each other are slower than one.

The number is the process's: two trainings in threads of one process see each other's.
"""

import math
from types import TracebackType
from typing import Self
from weakref import WeakKeyDictionary

import torch as th
from torch import nn

#: Multiply-adds of one pass through the network that are worth another thread.
_WORK_OF_A_THREAD = 4_000_000
#: Layers with parameters that take one multiply-add per entry of their matrices.
_LAYERS = (nn.Linear, nn.LayerNorm, nn.BatchNorm1d)
#: Where classes come from that apply a layer once per sample.
_KNOWN_PACKAGES = ("torch", "stable_baselines3", __name__.partition(".")[0])

#: Policy → multiply-adds per sample. Found once: it decides about speed alone.
_work_of: "WeakKeyDictionary[nn.Module, float]" = WeakKeyDictionary()


class ThreadLimit:
    """
    A context in which torch has fewer threads, never more than outside. It can be entered many times, one by one.

    :param limit: most threads
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._before = 0

    def __enter__(self) -> Self:
        self._before = th.get_num_threads()
        if self._before > self._limit:
            th.set_num_threads(int(self._limit))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before > self._limit:
            th.set_num_threads(self._before)


def threads_for(policy: nn.Module, n_samples: int) -> ThreadLimit:
    """
    As many threads as a batch can keep busy: for the usual networks one in a rollout and on a minibatch, several on
    thousands of states.

    :param policy: whose matrices are multiplied; one whose work does not show in them is left all threads
    :param n_samples: B, samples of a batch
    """
    if policy not in _work_of:
        _work_of[policy] = _multiply_adds(policy)
    return ThreadLimit(max(1.0, n_samples * _work_of[policy] / _WORK_OF_A_THREAD))


def _multiply_adds(policy: nn.Module) -> float:
    """Per sample; infinite where it is unknown: with convolutions, attention, recurrences, layers of the user's own."""
    for module in policy.modules():
        own = [*module.parameters(recurse=False)]
        if module is policy:
            is_known = all(parameter.dim() < 2 for parameter in own)  # log_std
        else:
            is_known = type(module).__module__.partition(".")[0] in _KNOWN_PACKAGES
            is_known &= not own or type(module) in _LAYERS
        if not is_known:
            return math.inf
    return float(sum(parameter.numel() for parameter in policy.parameters() if parameter.dim() > 1))
