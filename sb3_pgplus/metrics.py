"""Metrics of one ``train()``: tensors are collected, the device is read once."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import torch as th


def _max(values: Any) -> Any:
    return values.max() if isinstance(values, th.Tensor) else max(values)


#: Metrics that are not a mean over all minibatches: name → function of the collected values ``[n]``.
_REDUCTIONS: dict[str, Callable[[Any], Any]] = {
    "train/loss": lambda values: values[-1],  # as in SB3: the last minibatch
    "train/approx_kl_max": _max,
    "train/grad_norm_max": _max,
}


class Metrics:
    """Collects scalar tensors under the logger's names and reduces them in one go."""

    def __init__(self) -> None:
        self._values: defaultdict[str, list[th.Tensor | float]] = defaultdict(list)

    def add(self, values: Mapping[str, th.Tensor | float]) -> None:
        """
        Add one minibatch's scalars.

        :param values: logger key → number, or scalar tensor on any device
        """
        for name, value in values.items():
            self._values[name].append(value.detach() if isinstance(value, th.Tensor) else value)

    def restart(self, name: str) -> None:
        """Forget what was collected under a name (SB3's ``approx_kl`` is the mean of the last epoch alone)."""
        self._values.pop(name, None)

    def reduce(self) -> dict[str, float]:
        """
        Mean of each metric (or its own reduction), with one transfer from the device.

        :return: logger key → number
        """
        numbers = {name: values for name, values in self._values.items() if _are_numbers(values)}
        tensors = {name: _stack(values) for name, values in self._values.items() if name not in numbers}
        reduced = {name: float(_REDUCTIONS.get(name, _mean)(values)) for name, values in numbers.items()}
        if tensors:
            on_device = [_REDUCTIONS.get(name, th.mean)(values) for name, values in tensors.items()]
            reduced |= dict(zip(tensors, th.stack(on_device).tolist(), strict=True))
        return {name: reduced[name] for name in self._values}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _are_numbers(values: list[th.Tensor | float]) -> TypeGuard[list[float]]:
    """Whether no device has to be asked (a compiled update gives numbers, an eager one tensors)."""
    return not any(isinstance(value, th.Tensor) for value in values)


def _stack(values: list[th.Tensor | float]) -> th.Tensor:
    """``[n]``, double precision; one minibatch may have given a number and the next a tensor."""
    tensors = [value for value in values if isinstance(value, th.Tensor)]
    if len(tensors) == len(values):
        return th.stack(tensors).double()
    return th.tensor([float(value) for value in values], dtype=th.float64)
