"""How many of torch's CPU threads a piece of work gets: threads that wait for each other are slower than one."""

import math
from types import TracebackType
from typing import Self
from weakref import WeakKeyDictionary

import torch as th
from torch import nn

#: Multiply-adds of one pass through the network that are worth another thread.
_WORK_OF_A_THREAD = 4_000_000

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

    :param policy: whose matrices are multiplied; one with convolutions is left all threads
    :param n_samples: B, samples of a batch
    """
    if policy not in _work_of:
        _work_of[policy] = _multiply_adds(policy)
    return ThreadLimit(max(1.0, n_samples * _work_of[policy] / _WORK_OF_A_THREAD))


def _multiply_adds(policy: nn.Module) -> float:
    """Per sample: a matrix takes one per entry; what a convolution or a recurrence takes does not show in its size."""
    if any(isinstance(module, nn.RNNBase | nn.modules.conv._ConvNd) for module in policy.modules()):
        return math.inf
    return float(sum(parameter.numel() for parameter in policy.parameters() if parameter.dim() > 1))
