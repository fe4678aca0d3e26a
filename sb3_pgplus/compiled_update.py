"""
A minibatch's update as one compiled function: loss, gradient, clipping, non-finite guard, and the optimiser's step
where that is torch's plain Adam or RMSprop. It is compared with the eager update now and then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples, RolloutBufferSamples
from torch import nn

from sb3_pgplus.buffers import RolloutSamples, TorchDictRolloutBuffer, TorchRolloutBuffer, has_stock_sampling
from sb3_pgplus.compiler import Compiled, compile_function
from sb3_pgplus.hparams import PolicyGradientHparams
from sb3_pgplus.optimizers import StepRule, common_base, drop_gradients, views_like
from sb3_pgplus.tracing import Known, foreign_method

if TYPE_CHECKING:
    from sb3_pgplus.engine import Engine

PACKAGE = __name__.partition(".")[0]
_TOLERANCE = 1e-3
#: On a GPU, where convolutions have the eleven bits of TF32, and each library adds them up in an order of its own.
_TOLERANCE_ON_CUDA = 1e-2
#: Some ten roundings of float32: a gradient that parameters so much larger change as much is not known any better.
_ROUNDINGS = 1e-6
#: Where a clip begins, a loss has a bend: rounding then decides whether a sample has a gradient at all. A function that
#: is wrong is so for the next minibatches, too.
_MOST_DISAGREEMENTS = 3
#: What stands between a gradient and its step: where somebody has changed it, the step is left to it.
_STEP_METHODS = ("train", "update", "_epoch", "_fit_critic", "_apply", "_count_nonfinite")

#: Hyperparameters that are about rollouts, targets or how often the losses are taken, and enter none of them.
_OUTSIDE_LOSSES = frozenset(
    {"gamma", "gae_lambda", "advantage_estimator", "n_step_horizon", "clip_rewards", "bootstrap_truncated"}
    | {"n_epochs", "n_critic_epochs", "n_critic_updates", "desired_kl", "adaptive_kl_target"}
)

#: Buffers whose minibatches have one layout.
_BUFFERS = (TorchRolloutBuffer, TorchDictRolloutBuffer)

LossFunction = Callable[[Any, Any], tuple[th.Tensor, dict[str, th.Tensor]]]


@dataclass(frozen=True)
class GradientProblem:
    """A loss whose gradient is wanted for minibatch after minibatch."""

    #: Whose methods the loss goes through, and their names.
    owner: Any
    methods: tuple[str, ...]
    modules: dict[str, nn.Module]
    loss: LossFunction
    hp: PolicyGradientHparams
    parameters: list[nn.Parameter]
    batch_size: int
    #: What else tells one loss from another under the same hyperparameters.
    variant: Hashable = None
    #: Name of a logged scalar → the value above which no step is to be made.
    limits: Mapping[str, float] = field(default_factory=dict)

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that are not frozen."""
        return [parameter for parameter in self.parameters if parameter.requires_grad]


class Gradient(NamedTuple):
    """Result on a minibatch; the gradient itself, clipped, is in the parameters' ``grad``."""

    loss: th.Tensor | float
    #: Before clipping.
    norm: th.Tensor | float
    #: What is logged.
    diagnostics: Mapping[str, th.Tensor | float]
    #: The optimiser's step has been made, or left out because loss or gradient is not finite or a limit is exceeded.
    is_stepped: bool = False


#: Minibatches of a pass over a rollout, with what an update of each found.
Minibatches = Iterator[tuple[Any, Gradient]]


class Ready(NamedTuple):
    """What an update found, for the next one: nearly always nothing has changed in between."""

    known: Known
    key: Hashable
    compiled_key: Hashable
    used: list[nn.Parameter]
    rule: StepRule
    buffer: th.Tensor
    compiled: Compiled


class CompiledUpdate:
    """
    Minibatch ↦ gradient, and the step: compiled for minibatches of the full size, eager for the ragged last one.

    It is made anew for every update, so that hyperparameters, parameters and modes are today's.
    """

    def __init__(
        self, engine: Engine, unit: str, problem: GradientProblem, known: Known, eager: Callable[[Any], Gradient]
    ) -> None:
        self._engine, self._unit, self._problem, self._known, self._eager = engine, unit, problem, known, eager
        self._values, self._trained = known.tensors.values, problem.trained
        hp = problem.hp
        self._scheduled = [name for name in hp.scheduled_names() if isinstance(getattr(hp, name), float)]
        # Double precision, so that they act as Python's numbers do.
        self._numbers = [*(float(getattr(hp, name)) for name in self._scheduled), *problem.limits.values()]
        #: With limits and what changes from step to step: an array to write to, and what is passed.
        self._packed = np.zeros(0)
        self._passed = th.zeros(0)
        self._found: Compiled | None = None
        self._key: Hashable = None
        self._rule: StepRule | None = None
        #: Where the gradient goes if the step is compiled too.
        self._buffer: th.Tensor | None = None
        self._looked_up = False
        #: Of the first minibatch, where later ones may have others; our own buffers' are all alike.
        self._shapes: tuple[Hashable, ...] | None = None

    def __call__(self, batch: Any) -> Gradient:
        if len(batch.advantages) != self._problem.batch_size or not self._is_known(batch):
            return self._eager(batch)
        flat = flat_batch(batch)
        self._prepare(batch, flat)
        if self._found is None or (self._shapes is not None and shapes(flat) != self._shapes):
            return self._eager(batch)
        return self._checked(batch, flat) if self._found.is_due() else self._run(flat)

    def _is_known(self, batch: Any) -> bool:
        """Whether a minibatch is of the kind whose tensors can be told apart."""
        if isinstance(batch, (RolloutSamples, RolloutBufferSamples, DictRolloutBufferSamples)):
            return True
        self._engine.refuse([self._unit], f"its minibatches are a {type(batch).__name__}, not RolloutSamples")
        return False

    # --- finding the compiled function --------------------------------------------------------------------------------

    def _prepare(self, batch: Any, flat: list[th.Tensor]) -> None:
        """Once, find or make the function for things as they are now."""
        if not self._looked_up:
            self._looked_up = True
            self._look_up(batch, flat)

    def _look_up(self, batch: Any, flat: list[th.Tensor]) -> None:
        problem, what = self._problem, (self._unit, self._problem.variant, *self._problem.limits)
        is_stock, self._shapes, key = self._engine.remembered(what, lambda: self._inspected(flat))
        if is_stock and self._take_over(self._engine.ready.get(self._unit), key):
            return
        if (self._unit, key) not in self._engine.used:
            if self._engine.keeps_changing(self._unit):
                return
            self._eager(batch)  # shows which parameters the loss depends on
            self._engine.used[self._unit, key] = tuple([p.grad is not None for p in self._trained])
        is_used = self._engine.used[self._unit, key]
        self._used = [p for p, used in zip(self._trained, is_used, strict=True) if used]
        optimizer = problem.owner.policy.optimizer
        if self._used and is_stock:
            self._rule = StepRule.of(optimizer, self._used)
        if self._rule is not None:
            drop_gradients(optimizer, besides=self._used)
            self._buffer = gradient_buffer(self._used)
        self._key = (key, is_used, self._rule and (self._rule.key, shapes(self._states())))
        self._found = self._engine.version(self._unit, self._key, lambda: self._compile(batch, flat))
        if self._found is not None and self._rule is not None and self._buffer is not None:
            ready = Ready(self._known, key, self._key, self._used, self._rule, self._buffer, self._found)
            self._engine.ready[self._unit] = ready

    def _inspected(self, flat: list[th.Tensor]) -> tuple[bool, tuple[Hashable, ...] | None, Hashable]:
        """
        Whether nobody has changed what stands between gradient and step, the layout of the minibatches where they may
        differ from each other, and everything that the function depends on.
        """
        problem, trained_ids = self._problem, {id(parameter) for parameter in self._trained}
        is_stock = foreign_method(problem.owner, _STEP_METHODS, PACKAGE) is None
        buffer = problem.owner.rollout_buffer
        is_uniform = is_stock and type(buffer) in _BUFFERS and has_stock_sampling(buffer)
        left_out = _OUTSIDE_LOSSES.union(self._scheduled)
        constants = tuple([value for name, value in problem.hp.__dict__.items() if name not in left_out])
        # An optimiser may have more parameters than the modules.
        trained = (len(self._trained), *(id(tensor) in trained_ids for tensor in self._values))
        key = (problem.variant, constants, self._known.number, shapes(flat), trained, tuple(problem.limits))
        return is_stock, None if is_uniform else shapes(flat), key

    def _take_over(self, ready: Ready | None, key: Hashable) -> bool:
        """Use what the last update found, if it still holds."""
        if ready is None or ready.known is not self._known or ready.key != key:
            return False
        if not ready.rule.still_holds(self._problem.owner.policy.optimizer):
            return False
        _, _, self._key, self._used, self._rule, self._buffer, self._found = ready
        drop_gradients(self._problem.owner.policy.optimizer, besides=self._used)
        if not all([getattr(parameter.grad, "_base", None) is self._buffer for parameter in self._used]):
            self._show_gradients()  # another update had gradients of some of them
        return True

    def _compile(self, batch: Any, flat: list[th.Tensor]) -> Compiled:
        compiled = Compiled(_not_compiled)
        inputs = self._inputs(flat)
        used_ids = {id(parameter) for parameter in self._used}
        position = {id(value): i for i, value in enumerate(self._values) if id(value) in used_ids}
        positions = [position[id(parameter)] for parameter in self._used]
        counts = [len(self._values), len(flat), 1, len(self._controls())]
        n_numbers = [len(self._scheduled), len(self._problem.limits)]

        def function(*inputs: th.Tensor) -> list[th.Tensor]:
            values, samples, (packed,), controls, states = _cut(inputs, counts)
            scalars, limits, of_step = _cut(packed.unbind(), n_numbers)
            hp = _with_tensors(self._problem.hp, dict(zip(self._scheduled, scalars, strict=True)))
            parameters = [values[i] for i in positions]
            loss, diagnostics = self._known.tensors.replaced(
                values, self._problem.loss, _unflat_batch(batch, samples), hp
            )
            compiled.names = list(diagnostics)
            gradients, norm = clip_by_norm(list(th.autograd.grad(loss, parameters)), hp.max_grad_norm)
            numbers = th.stack([number.detach().double() for number in (loss, norm, *diagnostics.values())])
            if self._rule is None:
                return [*gradients, numbers]
            is_finite = th.isfinite(loss.detach() + norm.detach())
            is_within = _is_within(diagnostics, dict(zip(self._problem.limits, limits, strict=True)))
            with th.no_grad():
                buffer, *states = states
                gradient = th.cat([gradient.flatten() for gradient in gradients])
                new = self._rule.stepped(parameters, gradient, states, of_step)
                may_step, gradient = self._gated(is_finite, is_within, gradient, buffer, controls)
                buffer.copy_(gradient)
                for old, value in zip([*parameters, *states], new, strict=True):
                    old.copy_(th.where(may_step, value, old))
            return [numbers]

        may_change = [*positions, *range(sum(counts[:3]), len(inputs))] if self._rule else []
        examples = [x.detach().requires_grad_(id(x) in used_ids) for x in inputs]
        compiled.call = compile_function(function, examples, may_change)
        return compiled

    def _inputs(self, flat: list[th.Tensor]) -> list[th.Tensor]:
        numbers = self._all_numbers()
        if len(self._packed) != len(numbers):
            self._packed = np.full(len(numbers), np.nan)
        if self._packed.tolist() != numbers:
            self._packed[:] = numbers  # on a CPU that is all: the tensor is the same memory
            self._passed = th.from_numpy(self._packed).to(self._values[0].device)
        return [*self._values, *flat, self._passed, *self._controls(), *self._states()]

    def _all_numbers(self) -> list[float]:
        return [*self._numbers, *self._rule.numbers()] if self._rule else self._numbers

    def _states(self) -> list[th.Tensor]:
        """What the step changes besides the parameters, and where the gradient goes."""
        return [self._buffer, *self._rule.states()] if self._rule and self._buffer is not None else []

    def _controls(self) -> list[th.Tensor]:
        """What :meth:`_gated` reads and writes."""
        return []

    def _gated(
        self,
        is_finite: th.Tensor,
        is_within: th.Tensor | bool,
        gradient: th.Tensor,
        buffer: th.Tensor,
        controls: Sequence[th.Tensor],
    ) -> tuple[th.Tensor, th.Tensor]:
        """
        Whether the step is made, and what the gradient is afterwards: a part of the compiled function.

        :param is_finite: loss and gradient are
        :param is_within: no limit is exceeded
        :param gradient: of this minibatch
        :param buffer: the gradient before it
        :param controls: :meth:`_controls`
        """
        return is_finite & is_within, gradient

    # --- running it ---------------------------------------------------------------------------------------------------

    def _gradient_of(self, numbers: list[float]) -> Gradient:
        assert self._found is not None
        loss, norm, *logged = numbers
        return Gradient(loss, norm, dict(zip(self._found.names, logged, strict=True)), self._rule is not None)

    def _run(self, flat: list[th.Tensor]) -> Gradient:
        assert self._found is not None
        with th.no_grad():
            *gradients, numbers = self._found.call(self._inputs(flat))
        if self._rule is None:
            # Whatever another loss left in parameters that this one does not train must not be stepped on.
            drop_gradients(self._problem.owner.policy.optimizer)
            for parameter, gradient in zip(self._used, gradients, strict=True):
                parameter.grad = gradient
        elif getattr(self._used[0].grad, "_base", None) is not self._buffer:
            self._show_gradients()  # an eager minibatch, or one that was not finite, came between
        return self._gradient_of(numbers.tolist())

    def _show_gradients(self) -> None:
        """Let the parameters' gradients be those of the compiled function."""
        assert self._buffer is not None
        for parameter, view in zip(self._used, views_like(self._buffer, self._used), strict=True):
            parameter.grad = view

    def _checked(self, batch: Any, flat: list[th.Tensor]) -> Gradient:
        """The compiled update, or the eager gradient where that is another one: several times, and it is wrong."""
        expected = self._eager(batch)
        wanted = [parameter.grad for parameter in self._trained]
        changed = [*self._used, *self._states()]
        before = [tensor.detach().clone() for tensor in changed]
        result = self._run(flat)
        assert self._found is not None
        if agree([parameter.grad for parameter in self._trained], wanted):
            self._found.n_disagreements = 0
            return result
        found = [None if p.grad is None else p.grad.clone() for p in self._trained]
        with th.no_grad():
            for tensor, old in zip(changed, before, strict=True):
                tensor.copy_(old)
        is_rounding = self._is_rounding(batch, found, wanted)
        for parameter, gradient in zip(self._trained, wanted, strict=True):
            parameter.grad = gradient
        self._found.n_disagreements += not is_rounding
        if self._found.n_disagreements == _MOST_DISAGREEMENTS:
            self._engine.drifted(self._unit, self._key)
            self._engine.ready.pop(self._unit, None)
            self._found = None
        return expected

    def _is_rounding(self, batch: Any, found: list[Any], wanted: list[Any]) -> bool:
        """
        Whether two gradients differ by no more than the eager one moves when parameters grow by some roundings: where a
        critic fits to the last digits, what is left is their noise.
        """
        with th.no_grad():
            before = [parameter.clone() for parameter in self._trained]
            for parameter in self._trained:
                parameter.mul_(1 + _ROUNDINGS)
        for parameter in self._trained:
            parameter.grad = None  # the others are somebody's
        self._eager(batch)
        moved = [parameter.grad for parameter in self._trained]
        with th.no_grad():
            for parameter, old in zip(self._trained, before, strict=True):
                parameter.copy_(old)
        return distance(found, wanted) <= distance(moved, wanted)


def clip_by_norm(gradients: list[th.Tensor], max_norm: th.Tensor | float | None) -> tuple[list[th.Tensor], th.Tensor]:
    """
    ``g · min(1, c/(‖g‖ + 1e-6))`` with the norm over all gradients, what ``clip_grad_norm_`` does in place.

    :param gradients: of each parameter
    :param max_norm: c, or None: no clipping
    :return: the clipped gradients, the norm before clipping
    """
    norm = th.linalg.vector_norm(th.stack([th.linalg.vector_norm(gradient) for gradient in gradients]))
    if max_norm is None:
        return gradients, norm
    coefficient = th.clamp(max_norm / (norm + 1e-6), max=1.0)
    return [gradient * coefficient for gradient in gradients], norm


def _is_within(diagnostics: Mapping[str, th.Tensor], limits: Mapping[str, th.Tensor]) -> th.Tensor | bool:
    """Whether no logged value is above its limit."""
    is_within: th.Tensor | bool = True
    for name, limit in limits.items():
        is_within = is_within & ~(diagnostics[name].detach().double() > limit)
    return is_within


def gradient_buffer(parameters: Sequence[nn.Parameter]) -> th.Tensor:
    """
    One vector of which the parameters' gradients are views, made so where they are not: a compiled function then has
    one place to write to.

    :param parameters: of one kind
    """
    buffer = common_base([parameter.grad for parameter in parameters])
    if buffer is None:
        buffer = th.cat([th.zeros_like(parameter).flatten() for parameter in parameters])
        for parameter, view in zip(parameters, views_like(buffer, parameters), strict=True):
            parameter.grad = view
    return buffer


def _cut(tensors: Sequence[th.Tensor], counts: Sequence[int]) -> list[Sequence[th.Tensor]]:
    """Consecutive pieces of these lengths, and the rest."""
    pieces, start = [], 0
    for count in counts:
        pieces.append(tensors[start : start + count])
        start += count
    return [*pieces, tensors[start:]]


def _not_compiled(_: list[th.Tensor]) -> Sequence[th.Tensor]:
    raise AssertionError("called before it was compiled")


def _with_tensors(hp: PolicyGradientHparams, values: Mapping[str, th.Tensor]) -> PolicyGradientHparams:
    """Hyperparameters some of which are tensors: inputs of a trace, where numbers would be baked in."""
    copied = object.__new__(type(hp))
    copied.__dict__.update(hp.__dict__ | dict(values))
    return copied


def agree(gradients: Sequence[th.Tensor | None], wanted: Sequence[th.Tensor | None]) -> bool:
    """Whether two gradients are equal up to rounding, measured by the length of their difference."""
    if [g is None for g in gradients] != [w is None for w in wanted]:
        return False
    if not all(w is None or bool(w.isfinite().all()) for w in wanted):
        return True  # the guard deals with it
    length = sum(float((w.double() ** 2).sum()) for w in wanted if w is not None) ** 0.5
    is_on_cuda = any(w is not None and w.is_cuda for w in wanted)
    return bool(distance(gradients, wanted) <= (_TOLERANCE_ON_CUDA if is_on_cuda else _TOLERANCE) * length + 1e-7)


def distance(gradients: Sequence[th.Tensor | None], others: Sequence[th.Tensor | None]) -> float:
    """The length of the difference of two gradients; infinite where one is of other parameters than the other."""
    if [g is None for g in gradients] != [o is None for o in others]:
        return math.inf
    pairs = [(g, o) for g, o in zip(gradients, others, strict=True) if g is not None and o is not None]
    return math.sqrt(sum(float(((g - o).double() ** 2).sum()) for g, o in pairs))


# --- minibatches as lists of tensors ----------------------------------------------------------------------------------


def flat_observations(observations: Any) -> list[th.Tensor]:
    """The tensors of observations, in a fixed order."""
    if isinstance(observations, dict):
        return [observations[key] for key in sorted(observations)]
    return [observations]


def unflat_observations(template: Any, tensors: Sequence[th.Tensor]) -> Any:
    """The reverse of :func:`flat_observations`, given observations of the same kind."""
    return dict(zip(sorted(template), tensors, strict=True)) if isinstance(template, dict) else tensors[0]


def flat_batch(batch: Any) -> list[th.Tensor]:
    """The tensors of a minibatch, in a fixed order."""
    extras = batch[6] if len(batch) > 6 else ()
    return [*flat_observations(batch[0]), *batch[1:6], *extras]


def _unflat_batch(template: Any, tensors: Sequence[th.Tensor]) -> Any:
    n_observations = len(flat_observations(template[0]))
    fields = [unflat_observations(template[0], tensors[:n_observations])]
    fields += tensors[n_observations : n_observations + 5]
    if len(template) > 6:
        fields.append(tuple(tensors[n_observations + 5 :]))
    return template._make(fields)


def shapes(tensors: Sequence[th.Tensor]) -> tuple[Hashable, ...]:
    """What a compiled function assumes of its inputs."""
    return tuple([(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors])
