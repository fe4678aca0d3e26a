"""
Work that a device is given as a whole: recorded once, launched again and again, and not waited for.

For small networks a GPU spends most of an update waiting for the next kernel's launch. A CUDA graph launches all
kernels of a minibatch at once, on tensors that stay where they are
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch as th

#: A function of a list of tensors.
TensorFunction = Callable[[list[th.Tensor]], Sequence[th.Tensor]]
#: Function, device ↦ what does again all that the function did there, and what it returned: tensors this writes to.
Recorder = Callable[[Callable[[], Any], th.device], tuple[Callable[[], None], Any]]

#: So many calls come before a recording: in the first ones libraries choose their kernels and ask for memory.
_WARM_UPS = 3


def _record_on_cuda(function: Callable[[], Any], device: th.device) -> tuple[Callable[[], None], Any]:
    if _broken:
        raise RuntimeError(f"a recording failed before in this process ({_broken[0]})")
    with th.cuda.device(device):
        stream, current = th.cuda.Stream(), th.cuda.current_stream()
        stream.wait_stream(current)
        try:
            with th.cuda.stream(stream):  # the default one cannot be recorded
                for _ in range(_WARM_UPS):
                    function()
        finally:
            current.wait_stream(stream)
        graph = th.cuda.CUDAGraph()
        try:
            # Other threads, those of environments for example, may use the device meanwhile.
            with th.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                results = function()
        except BaseException as error:
            _broken.append(type(error).__name__)  # torch's allocator is left in the middle of a recording
            raise
        finally:
            th.cuda.set_stream(current)
            current.wait_stream(stream)
    return graph.replay, results


#: What ended a recording in the middle of it.
_broken: list[str] = []
#: Type of device → how its work is recorded.
RECORDERS: dict[str, Recorder] = {"cuda": _record_on_cuda}


def is_recordable(device: th.device) -> bool:
    """
    Whether work on a device can be recorded.

    :param device: any
    """
    return device.type in RECORDERS


def sent(values: Any, device: th.device | str) -> th.Tensor:
    """
    Numbers on their way to a device, without waiting for what it does.

    :param values: a NumPy array, or numbers, which become double precision
    :param device: where they shall be
    """
    tensor = th.from_numpy(np.asarray(values))
    if th.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # a copy of other memory waits for all work before it


@th.no_grad()
def record(function: Callable[[], Any], changed: Sequence[th.Tensor]) -> tuple[Callable[[], None], Any]:
    """
    Record a function of tensors on a device. These tensors are afterwards what they were before.

    :param function: reads and writes tensors that stay where they are; it looks at no value and draws no numbers
    :param changed: all tensors that it writes to, at least one, and perhaps more
    :return: what does it again, and what it returned
    """
    before = [tensor.detach().clone() for tensor in changed]
    try:
        return RECORDERS[changed[0].device.type](function, changed[0].device)
    finally:
        for tensor, old in zip(changed, before, strict=True):
            if not tensor.equal(old):  # what did not change may be a view that cannot be written to
                tensor.copy_(old)


def copy_in_place_of(tensor: th.Tensor) -> th.Tensor:
    """
    A copy that lies in memory as the tensor does, gaps included: a compiled function counts on that.

    :param tensor: no two of whose elements are in the same place
    """
    copied = th.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return copied.copy_(tensor.detach())


class RecordedCall:
    """
    A function of tensors, with a single launch.

    :param function: of a list of tensors, none of which it changes
    :param inputs: examples
    :param n_fixed: so many of them, the first ones, stay where they are; the others are copied in
    """

    def __init__(self, function: TensorFunction, inputs: Sequence[th.Tensor], n_fixed: int) -> None:
        self._fixed, self._moving = inputs[:n_fixed], [copy_in_place_of(tensor) for tensor in inputs[n_fixed:]]
        self._held: Sequence[th.Tensor] | None = None
        self._places = places(self._fixed)
        self._launch, self._results = record(lambda: function([*self._fixed, *self._moving]), self._moving)

    def is_of(self, fixed: Sequence[th.Tensor]) -> bool:
        """
        Whether the inputs that stay are where they were.

        :param fixed: those of now
        """
        return places(fixed) == self._places

    @th.no_grad()
    def hold(self, values: Sequence[th.Tensor]) -> None:
        """
        Write to the inputs that stay, which are then nobody else's. The same values again cost nothing.

        :param values: of these inputs; nobody changes them
        """
        if values is not self._held:
            for place, value in zip(self._fixed, values, strict=True):
                place.copy_(value)
            self._held = values

    @th.no_grad()
    def __call__(self, inputs: Sequence[th.Tensor]) -> list[th.Tensor]:
        """
        :param inputs: like the examples
        :return: new tensors
        """
        for place, tensor in zip(self._moving, inputs[len(self._fixed) :], strict=True):
            place.copy_(tensor)
        self._launch()
        return [result.clone() for result in self._results]


class RecordedLoop:
    """
    An update on one minibatch of b samples after the other, a launch for each. The device picks them from the rollout
    itself, and keeps what each of them found until somebody asks.

    :param update: ``[*fixed, *minibatch, numbers, control, *states]`` ↦ one vector of results ``[K]``
    :param fixed: tensors that stay where they are
    :param minibatch: an example, each ``[b, ...]``
    :param n_samples: of a rollout, B
    :param n_minibatches: as many as are launched at once, M
    :param numbers: examples of what is the same for all minibatches
    :param control: an example of what is set before the first minibatch, and which the update changes
    :param states: tensors that the update changes, besides some of the fixed ones
    :param n_results: K
    """

    def __init__(
        self,
        update: TensorFunction,
        fixed: Sequence[th.Tensor],
        minibatch: Sequence[th.Tensor],
        n_samples: int,
        n_minibatches: int,
        numbers: Sequence[float],
        control: Sequence[float],
        states: Sequence[th.Tensor],
        n_results: int,
    ) -> None:
        self._update, self._fixed, self._states = update, fixed, states
        self._places, device, batch_size = places([*fixed, *states]), minibatch[0].device, len(minibatch[0])
        self._samples = [tensor.new_zeros((n_samples, *tensor.shape[1:])) for tensor in minibatch]
        self._rows = th.arange(batch_size, device=device).expand(n_minibatches, batch_size).clone()
        self._numbers, self._control = (th.zeros(len(x), dtype=th.float64, device=device) for x in (numbers, control))
        self._position = th.zeros(1, dtype=th.int64, device=device)
        self._results = th.zeros((n_minibatches, n_results), dtype=th.float64, device=device)
        self._set(minibatch, numbers, control)
        self._launch, _ = record(self._step, [self._position, self._control, self._results, *states, *fixed])

    def is_of(self, fixed: Sequence[th.Tensor], states: Sequence[th.Tensor], n_samples: int) -> bool:
        """
        Whether the tensors that stay are where they were, and rollouts are as large.

        :param fixed: those of now
        :param states: those of now
        :param n_samples: B
        """
        return len(self._samples[0]) == n_samples and places([*fixed, *states]) == self._places

    def run(
        self,
        samples: Sequence[th.Tensor],
        rows: np.ndarray[Any, Any],
        numbers: Sequence[float],
        control: Sequence[float],
    ) -> th.Tensor:
        """
        Launch the update on n minibatches.

        :param samples: at most B
        :param rows: which of them are in which minibatch, ``[n, b]``
        :param numbers: like the examples
        :param control: like the example
        :return: what each found, ``[n, K]``, once the device gets there
        """
        results = []
        for first in range(0, len(rows), len(self._rows)):
            some = rows[first : first + len(self._rows)]
            with th.no_grad():
                if first == 0:
                    self._set(samples, numbers, control)
                self._rows[: len(some)].copy_(sent(some, self._rows.device))
                self._position.zero_()
            for _ in some:
                self._launch()
            results.append(self._results[: len(some)].clone())
        return th.cat(results)

    @th.no_grad()
    def _set(self, samples: Sequence[th.Tensor], numbers: Sequence[float], control: Sequence[float]) -> None:
        for place, tensor in zip(self._samples, samples, strict=True):
            place[: len(tensor)].copy_(tensor)
        values = sent([*numbers, *control], self._position.device)
        self._numbers.copy_(values[: len(numbers)])
        self._control.copy_(values[len(numbers) :])

    def _step(self) -> None:
        rows = self._rows.index_select(0, self._position).squeeze(0)
        minibatch = [tensor.index_select(0, rows) for tensor in self._samples]
        (found,) = self._update([*self._fixed, *minibatch, self._numbers, self._control, *self._states])
        self._results.index_copy_(0, self._position, found.unsqueeze(0))
        self._position.add_(1).remainder_(len(self._results))  # warm-ups go on from the first, too


def places(tensors: Sequence[th.Tensor]) -> list[int]:
    """
    Where tensors lie.

    :param tensors: any
    """
    return [tensor.data_ptr() for tensor in tensors]
