"""A recorder for the CPU that is like CUDA graphs: operations on tensors in their places, and no Python."""

from collections.abc import Callable
from typing import Any

import torch as th
from torch.utils._python_dispatch import TorchDispatchMode

#: Operations that tell Python a value: with a GPU they wait for it, and CUDA refuses to record them.
READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "item")


class Tape(TorchDispatchMode):
    """Keeps every operation with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in READS, f"{name} looks at a value"
        result = func(*args, **(kwargs or {}))
        if not func.is_view:  # views stay views of what they are views of
            self.operations.append((func, args, kwargs or {}, result))
        return result

    @th.no_grad()
    def play(self) -> None:
        for func, args, kwargs, recorded in self.operations:
            result = func(*args, **kwargs)
            if func._schema.is_mutable:
                continue
            for place, value in zip(_tensors(recorded), _tensors(result), strict=True):
                place.copy_(value)


def _tensors(results: Any) -> list[th.Tensor]:
    if isinstance(results, th.Tensor):
        return [results]
    return [tensor for part in results or () for tensor in _tensors(part)] if isinstance(results, list | tuple) else []


def record_on_tape(function: Callable[[], Any], device: th.device) -> tuple[Callable[[], None], Any]:
    """
    A recorder for `device_graphs.RECORDERS`.

    :param function: on tensors of a device
    :param device: any
    """
    function()  # a warm-up, which changes things, as on a GPU
    tape = Tape()
    with tape:
        results = function()
    return tape.play, results
