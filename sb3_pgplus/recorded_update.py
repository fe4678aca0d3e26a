"""
The compiled update of a minibatch as a device keeps it, a GPU as a CUDA graph: launched for the minibatches of all
epochs before the first of them has been looked at. The device decides itself which steps it makes.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch as th

from sb3_pgplus.buffers import RolloutSamples, TorchRolloutBuffer, pick
from sb3_pgplus.compiled_update import CompiledUpdate, Gradient, Minibatches, flat_batch
from sb3_pgplus.compiler import first_line
from sb3_pgplus.device_graphs import RecordedLoop, sent

#: After so many recordings of a function its tensors keep moving, and it is only called.
_MOST_RECORDINGS = 8


class RecordedUpdate(CompiledUpdate):
    """A compiled update that the device keeps where the step is a part of it; otherwise only a compiled one."""

    def epochs(self, buffer: TorchRolloutBuffer, n: int, ahead: bool) -> Iterator[Minibatches]:
        """
        Passes over a rollout, each a series of minibatches with their gradients. The device has been given the next
        minibatches before the first of them is looked at.

        :param buffer: the rollout
        :param n: how many passes
        :param ahead: nothing else happens between them, so that the device may be given several
        """
        size, n_samples = self._problem.batch_size, buffer.buffer_size * buffer.n_envs
        if n_samples < size or not self._is_kept(buffer):
            for _ in range(n):
                yield ((batch, self(batch)) for batch in buffer.get(size))
            return
        at_once = n if ahead and n_samples % size == 0 else 1
        for _ in range(0, n, at_once):
            yield from self._epochs_ahead(buffer, at_once)

    def _is_kept(self, buffer: TorchRolloutBuffer) -> bool:
        """Whether the device keeps the function, now if it did not yet."""
        batch = pick(buffer.whole(), sent(np.arange(self._problem.batch_size), self._device))
        flat = flat_batch(batch)
        self._prepare(batch, flat)
        return self._loop(flat) is not None

    def _epochs_ahead(self, buffer: TorchRolloutBuffer, n: int) -> Iterator[Minibatches]:
        rows, states = [], []
        for _ in range(n):
            rows.append(buffer.rows(np.random.permutation(buffer.buffer_size * buffer.n_envs)))
            states.append(np.random.get_state())
        minibatches = self._in_turn(buffer.whole(), np.concatenate(rows))
        for i, state in enumerate(states, start=1):
            try:
                yield islice(minibatches, -(-len(rows[0]) // self._problem.batch_size))
            except GeneratorExit:
                if i < n:  # an early stop: what was drawn for later passes was not drawn
                    np.random.set_state(state)
                raise

    def _in_turn(self, samples: RolloutSamples, rows: np.ndarray[Any, Any]) -> Minibatches:
        """Minibatch after minibatch. With a finite gradient comes the whole rollout, to save the device work."""
        size, flat, done = self._problem.batch_size, flat_batch(samples), 0
        while done < len(rows):
            n = self._n_ahead((len(rows) - done) // size)
            loop = self._loop([tensor[:size] for tensor in flat]) if n else None
            if loop is not None and self._found is not None:
                self._found.n_calls += n
                some = rows[done : done + n * size].reshape(n, size)
                for gradient, own in zip(self._launched(loop, flat, some), some, strict=True):
                    is_finite = math.isfinite(float(gradient.loss + gradient.norm))
                    yield samples if is_finite else pick(samples, sent(own, self._device)), gradient
                done += n * size
            else:
                batch = pick(samples, sent(rows[done : done + size], self._device))
                yield batch, self(batch)
                done += size

    def _n_ahead(self, n: int) -> int:
        """How many of the next n minibatches are not to be compared with the eager update."""
        return 0 if self._found is None else min(n, self._found.n_before_due())

    @property
    def _device(self) -> th.device:
        return self._values[0].device

    # --- giving it to the device --------------------------------------------------------------------------------------

    def _prepare(self, batch: Any, flat: list[th.Tensor]) -> None:
        super()._prepare(batch, flat)
        self._loop(flat)

    def _loop(self, flat: Sequence[th.Tensor]) -> RecordedLoop | None:
        """The function as the device keeps it for the tensors of now, recorded if need be, and if it can be."""
        found = self._found
        if found is None or self._rule is None or not all([tensor.is_contiguous() for tensor in flat]):
            return None
        buffer, states, size = self._problem.owner.rollout_buffer, self._states(), self._problem.batch_size
        n = max(size, buffer.buffer_size * buffer.n_envs)
        if found.loop is not None and found.loop.is_of(self._values, states, n):
            return found.loop
        found.loop, room, n_results = None, n // size, 2 + len(found.names)
        if found.n_recordings == _MOST_RECORDINGS:
            return None
        found.n_recordings += 1
        numbers, control = self._all_numbers(), self._control()
        try:
            found.loop = RecordedLoop(found.call, self._values, flat, n, room, numbers, control, states, n_results)
        except Exception as error:  # a kernel that cannot be recorded, or no memory: training goes on without
            self._engine.reject(self._unit, self._key, f"it cannot be recorded for the device: {first_line(error)}")
            self._engine.ready.pop(self._unit, None)
            self._found = None
        return found.loop

    def _control(self) -> tuple[float, float, float]:
        """The update runs, after so many failures in a row, of which so many end it."""
        owner = self._problem.owner
        return 1.0, float(owner._nonfinite_in_a_row), float(owner.max_nonfinite_updates)

    # --- running it ---------------------------------------------------------------------------------------------------

    def _run(self, flat: list[th.Tensor]) -> Gradient:
        assert self._found is not None
        if self._found.loop is None:
            return super()._run(flat)
        return self._launched(self._found.loop, flat, np.arange(self._problem.batch_size)[None])[0]

    def _launched(self, loop: RecordedLoop, flat: Sequence[th.Tensor], rows: np.ndarray[Any, Any]) -> list[Gradient]:
        """Give the device minibatches, ``[n, b]`` rows of samples, and read what became of them."""
        results = loop.run(flat, rows, self._all_numbers(), self._control()).tolist()
        if getattr(self._used[0].grad, "_base", None) is not self._buffer:
            self._show_gradients()
        return [self._gradient_of(numbers) for numbers in results]

    def _controls(self) -> list[th.Tensor]:
        """:meth:`_control` as a tensor, where the function makes the step."""
        return [th.tensor(self._control(), dtype=th.float64, device=self._device)] if self._rule is not None else []

    def _gated(
        self,
        is_finite: th.Tensor,
        is_within: th.Tensor | bool,
        gradient: th.Tensor,
        buffer: th.Tensor,
        controls: Sequence[th.Tensor],
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        What the host does between two minibatches, which the device is not asked for: nothing is stepped any more after
        a limit was exceeded, or after too many losses or gradients in a row that were not finite.
        """
        is_running, n_failures, most_failures = controls[0].unbind()
        n_failures = th.where(is_finite, 0.0, n_failures + 1)
        goes_on = is_running * is_within * (n_failures < most_failures)
        was_running = is_running > 0
        may_step, shown = is_finite & is_within & was_running, th.where(was_running, gradient, buffer)
        controls[0].copy_(th.stack([goes_on, n_failures, most_failures]))
        return may_step, shown
