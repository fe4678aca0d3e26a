"""
Runs the functions that training spends its time in: eagerly, or compiled where that pays back, with the same result.

What is compiled is loss, gradient and clipping of a minibatch, and the policy's step in the rollout. The optimiser's
step stays torch's own. Anything that cannot be compiled safely runs eagerly, and :meth:`Engine.report` says why.
"""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch as th
from torch import nn

from sb3_pgplus.errors import warn_user
from sb3_pgplus.guards import broken_policy, without_distribution_checks
from sb3_pgplus.hparams import PolicyGradientHparams
from sb3_pgplus.optimizers import drop_gradients
from sb3_pgplus.sampling import Draw, noise_of, sample
from sb3_pgplus.tracing import Tensors, UntraceableError, check_policy, compile_function, fingerprint, foreign_method

PACKAGE = __name__.partition(".")[0]


class Cost(NamedTuple):
    """What compiling a unit takes and what each call then saves, in seconds on an ordinary core; fixed numbers."""

    to_compile: float
    saved_per_call: float


#: The functions that can be compiled. The choice must not depend on a clock: the same seed has to give the same run.
COSTS = {
    "update": Cost(12.0, 0.8e-3),
    "critic update": Cost(8.0, 0.3e-3),
    "policy step": Cost(6.0, 0.25e-3),
}
#: Compile once the saving is this many times the cost.
_MARGIN = 1.5
#: After this many different versions of a unit something keeps changing, and compiling again and again is a loss.
_MAX_VERSIONS = 4
#: States of the modules that are remembered.
_MAX_KNOWN = 8
#: A compiled gradient is compared with the eager one at calls 1, 2, 4, …, and then every so many.
_CHECK_EVERY = 4096
_TOLERANCE = 1e-3

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


@dataclass
class _Compiled:
    """A compiled function with what is needed to call it."""

    call: Callable[[list[th.Tensor]], Sequence[th.Tensor]]
    names: list[str] = field(default_factory=list)
    has_gradient: list[bool] = field(default_factory=list)
    n_calls: int = 0

    def is_due(self) -> bool:
        """Count a call; whether this one is to be compared with the eager result."""
        self.n_calls += 1
        is_power_of_two = self.n_calls & (self.n_calls - 1) == 0
        return is_power_of_two if self.n_calls < _CHECK_EVERY else self.n_calls % _CHECK_EVERY == 0


@dataclass(frozen=True)
class _Known:
    """Modules in one state: what a trace of them bakes in, their tensors, and why they cannot be traced."""

    plain: tuple[Any, ...]
    tensors: Tensors
    refusal: str | None


@dataclass
class Engine:
    """
    Decides what is compiled, keeps the compiled functions, and reports.

    :param setting: the hyperparameter ``compile``
    :param announce: say when compiling begins and ends
    """

    setting: bool | str
    announce: bool = False
    _wanted: set[str] = field(default_factory=set)
    _functions: dict[str, dict[Hashable, _Compiled]] = field(default_factory=dict)
    #: Unit → why it runs eagerly.
    _reasons: dict[str, str] = field(default_factory=dict)
    _refused: dict[tuple[str, Hashable], str] = field(default_factory=dict)
    _known: dict[Hashable, "_Known"] = field(default_factory=dict)

    def plan(self, calls: Mapping[str, int]) -> None:
        """
        Choose what to compile.

        :param calls: unit → how often the whole training calls it
        """
        self._wanted.clear()
        for unit, n_calls in calls.items():
            cost = COSTS[unit]
            needed = int(_MARGIN * cost.to_compile / cost.saved_per_call)
            if self.setting is False:
                self._reasons[unit] = "compile=False"
            elif self.setting == "auto" and n_calls < needed:
                self._reasons[unit] = f"{n_calls} calls do not pay for compiling, {needed} would"
            else:
                self._wanted.add(unit)
                self._reasons.pop(unit, None)

    def wants(self, unit: str) -> bool:
        """
        Whether a unit is to be compiled, as far as the plan goes.

        :param unit: its name
        """
        return unit in self._wanted

    def refuse(self, units: Sequence[str], reason: str) -> None:
        """
        Run units eagerly.

        :param units: their names
        :param reason: for the report
        """
        self._wanted -= set(units)
        self._reasons |= dict.fromkeys(units, reason)

    def report(self) -> str:
        """One line for each function that training calls: compiled, or eager and why."""
        lines = []
        for unit in COSTS:
            versions = self._functions.get(unit, {})
            n_calls = sum(version.n_calls for version in versions.values())
            if versions:
                lines.append(f"{unit}: compiled ({len(versions)} version(s), {n_calls} calls)")
            if unit in self._reasons:
                lines.append(f"{unit}: eager, {self._reasons[unit]}")
        return "\n".join(lines) or "nothing has run yet"

    # --- gradients of a minibatch -------------------------------------------------------------------------------------

    def gradient(
        self, unit: str, problem: GradientProblem, eager: Callable[[Any], Gradient]
    ) -> Callable[[Any], Gradient]:
        """
        The function that computes a minibatch's gradient.

        :param unit: its name in the report
        :param problem: the loss
        :param eager: the same function without a compiler
        :return: minibatch ↦ gradient
        """
        if unit not in self._wanted:
            return eager
        known = self._inspect(problem.modules)
        reason = known.refusal or foreign_method(problem.owner, problem.methods, PACKAGE)
        if reason is not None:
            self._reasons[unit] = reason
            return eager
        return _GradientFunction(self, unit, problem, known, eager)

    def _inspect(self, modules: dict[str, nn.Module]) -> "_Known":
        """What is known about some modules, the policy among them, in the state in which they are now."""
        fingerprints = fingerprint(modules.values())
        if fingerprints not in self._known:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            refusal = None
            try:
                check_policy(modules["policy"])
            except UntraceableError as error:
                refusal = str(error)
            self._known[fingerprints] = _Known(fingerprints[0], Tensors(modules), refusal)
        return self._known[fingerprints]

    def version(self, unit: str, key: Hashable, build: Callable[[], _Compiled]) -> _Compiled | None:
        """
        A compiled function, compiled now if need be.

        :param unit: its name
        :param key: everything that is baked into it
        :param build: compiles it
        :return: None if it has to run eagerly
        """
        versions = self._functions.setdefault(unit, {})
        if key in versions:
            return versions[key]
        if (unit, key) in self._refused:
            return None
        if len(versions) >= _MAX_VERSIONS:
            self._reasons[unit] = f"what it depends on changed more than {_MAX_VERSIONS - 1} times"
            return None
        try:
            versions[key] = self._announced(unit, build)
        except UntraceableError as error:
            self.reject(unit, key, str(error))
            return None
        except Exception as error:  # no C++ compiler, for example: training goes on without
            first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.reject(unit, key, f"the compiler failed: {first_line[:200]}")
            return None
        return versions[key]

    def reject(self, unit: str, key: Hashable, reason: str) -> None:
        """
        Never use a version again.

        :param unit: its name
        :param key: its key
        :param reason: for the report
        """
        self._functions.get(unit, {}).pop(key, None)
        self._refused[unit, key] = self._reasons[unit] = reason

    def _announced(self, unit: str, build: Callable[[], _Compiled]) -> _Compiled:
        started = time.perf_counter()
        if self.announce:
            print(f"Compiling the {unit} (kept on disk for later runs) …", flush=True)
        result = build()
        if self.announce:
            print(f"Compiled the {unit} in {time.perf_counter() - started:.1f} s", flush=True)
        return result

    # --- the policy's step --------------------------------------------------------------------------------------------

    def policy_step(self, policy: Any, observations: Any) -> Callable[[Any], tuple[Any, ...]]:
        """
        The function of a rollout's steps.

        :param policy: an actor-critic policy in evaluation mode
        :param observations: a batch like those to come, as tensors
        :return: observations ↦ actions, values, log-probabilities
        """
        unit, eager = "policy step", partial(_eager_step, policy)
        if unit not in self._wanted:
            return eager
        known, flat = self._inspect({"policy": policy}), _flat(observations)
        if known.refusal is not None:
            self._reasons[unit] = known.refusal
            return eager
        draws = noise_of(policy.action_space, len(flat[0]), flat[0].device)
        key = (known.plain, _shapes(flat))
        found = self.version(unit, key, lambda: _compile_policy_step(policy, known.tensors, observations, draws))
        return eager if found is None else _PolicyStep(found, known.tensors.values, draws)


def _eager_step(policy: Any, observations: Any) -> Any:
    with without_distribution_checks():  # NaN is found in the log-probabilities
        try:
            return policy(observations)
        except RuntimeError as error:
            if "inf, nan" in str(error):  # torch draws from no such probabilities
                raise broken_policy(policy) from error
            raise


class _PolicyStep:
    """A compiled policy step; the noise is drawn outside, from the same random stream as the policy's own."""

    def __init__(self, compiled: _Compiled, tensors: list[th.Tensor], draws: list[Draw]) -> None:
        self._compiled, self._tensors, self._draws = compiled, tensors, draws

    def __call__(self, observations: Any) -> tuple[th.Tensor, ...]:
        self._compiled.n_calls += 1
        noise = [draw() for draw in self._draws]
        return tuple(self._compiled.call([*self._tensors, *_flat(observations), *noise]))


def _compile_policy_step(policy: Any, tensors: Tensors, observations: Any, draws: list[Draw]) -> _Compiled:
    n_tensors, n_observations = len(tensors.values), len(_flat(observations))

    def act(inputs: Any, noise: list[th.Tensor]) -> tuple[th.Tensor, ...]:
        distribution = policy.get_distribution(inputs)
        actions = sample(distribution, noise)
        values, log_probs = policy.predict_values(inputs), distribution.log_prob(actions)
        return actions.reshape((-1, *policy.action_space.shape)), values, log_probs

    def function(*flat: th.Tensor) -> tuple[th.Tensor, ...]:
        inputs = _unflat(observations, flat[n_tensors : n_tensors + n_observations])
        noise = list(flat[n_tensors + n_observations :])
        results: tuple[th.Tensor, ...] = tensors.replaced(flat[:n_tensors], act, inputs, noise)
        return results

    state = th.get_rng_state()  # examples of noise must not move the random stream
    example = [*tensors.values, *_flat(observations), *(draw() for draw in draws)]
    th.set_rng_state(state)
    with without_distribution_checks(), th.no_grad():
        return _Compiled(compile_function(function, [tensor.detach() for tensor in example]))


class _GradientFunction:
    """
    Minibatch ↦ gradient: compiled for minibatches of the full size, eager for the ragged last one.

    It is made anew for every update, so that hyperparameters, parameters and modes are today's.
    """

    def __init__(
        self, engine: Engine, unit: str, problem: GradientProblem, known: _Known, eager: Callable[[Any], Gradient]
    ) -> None:
        self._engine, self._unit, self._problem, self._known, self._eager = engine, unit, problem, known, eager
        self._values = known.tensors.values
        self._trained = problem.trained
        hp = problem.hp
        self._scheduled = [name for name in hp.scheduled_names() if isinstance(getattr(hp, name), float)]
        # Double precision, so that they act as Python's numbers do.
        self._scalars = [th.tensor(getattr(hp, name), dtype=th.float64) for name in self._scheduled]
        self._constants = tuple(value for name, value in hp.__dict__.items() if name not in self._scheduled)
        self._found: _Compiled | None = None
        self._looked_up = False

    def __call__(self, batch: Any) -> Gradient:
        if len(batch.advantages) != self._problem.batch_size:
            return self._eager(batch)
        flat = _flat_batch(batch)
        if not self._looked_up:
            trained_ids = {id(parameter) for parameter in self._trained}
            trained = tuple([id(tensor) in trained_ids for tensor in self._values])
            self._key = (self._problem.variant, self._constants, self._known.plain, _shapes(flat), trained)
            self._found = self._engine.version(self._unit, self._key, lambda: self._compile(batch, flat))
            self._looked_up = True
        if self._found is None:
            return self._eager(batch)
        if self._found.is_due():
            return self._checked(batch, flat)
        return self._run(flat)

    def _run(self, flat: list[th.Tensor]) -> Gradient:
        assert self._found is not None
        with th.no_grad():
            *gradients, numbers = self._found.call([*self._values, *flat, *self._scalars])
        # Whatever another loss left in parameters that this one does not train must not be stepped on.
        drop_gradients(self._problem.owner.policy.optimizer)
        found = iter(gradients)
        for parameter, has_gradient in zip(self._trained, self._found.has_gradient, strict=True):
            parameter.grad = next(found) if has_gradient else None
        loss, norm, *logged = numbers.tolist()
        return Gradient(loss, norm, dict(zip(self._found.names, logged, strict=True)))

    def _checked(self, batch: Any, flat: list[th.Tensor]) -> Gradient:
        """The compiled gradient, unless the eager one on the same minibatch says that it is wrong."""
        expected = self._eager(batch)
        wanted = [parameter.grad for parameter in self._trained]
        result = self._run(flat)
        if _agree([parameter.grad for parameter in self._trained], wanted):
            return result
        for parameter, gradient in zip(self._trained, wanted, strict=True):
            parameter.grad = gradient
        reason = "its compiled gradient differed from the eager one, which is used from now on"
        self._engine.reject(self._unit, self._key, reason)
        self._found = None
        warn_user(f"{self._unit}: {reason}. Something that it depends on is not a tensor of the policy or the batch.")
        return expected

    def _compile(self, batch: Any, flat: list[th.Tensor]) -> _Compiled:
        problem, n_tensors, n_batch = self._problem, len(self._values), len(flat)
        trained_ids = {id(parameter) for parameter in self._trained}
        positions = [i for i, tensor in enumerate(self._values) if id(tensor) in trained_ids]
        order = {id(self._values[i]): i for i in positions}
        compiled = _Compiled(_not_compiled)

        def function(*inputs: th.Tensor) -> list[th.Tensor]:
            tensors, rest = inputs[:n_tensors], inputs[n_tensors:]
            scheduled = dict(zip(self._scheduled, rest[n_batch:], strict=True))
            hp = _with_tensors(problem.hp, scheduled)
            samples = _unflat_batch(batch, rest[:n_batch])
            loss, diagnostics = self._known.tensors.replaced(tensors, problem.loss, samples, hp)
            wanted = [tensors[order[id(parameter)]] for parameter in self._trained]
            gradients = th.autograd.grad(loss, wanted, allow_unused=True)
            compiled.names = list(diagnostics)
            compiled.has_gradient = [gradient is not None for gradient in gradients]
            clipped, norm = clip_by_norm([g for g in gradients if g is not None], hp.max_grad_norm)
            numbers = [loss, norm, *diagnostics.values()]
            return [*clipped, th.stack([number.detach().double() for number in numbers])]

        inputs = [*self._values, *flat, *self._scalars]
        examples = [x.detach().requires_grad_(id(x) in trained_ids) for x in inputs]
        compiled.call = compile_function(function, examples)
        return compiled


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


def _not_compiled(_: list[th.Tensor]) -> Sequence[th.Tensor]:
    raise AssertionError("called before it was compiled")


def _with_tensors(hp: PolicyGradientHparams, values: Mapping[str, th.Tensor]) -> PolicyGradientHparams:
    """Hyperparameters some of which are tensors: inputs of a trace, where numbers would be baked in."""
    copied = object.__new__(type(hp))
    copied.__dict__.update(hp.__dict__ | dict(values))
    return copied


def _agree(gradients: Sequence[th.Tensor | None], wanted: Sequence[th.Tensor | None]) -> bool:
    """Whether two gradients are equal up to rounding, measured by the length of their difference."""
    if [g is None for g in gradients] != [w is None for w in wanted]:
        return False
    pairs = [(g, w) for g, w in zip(gradients, wanted, strict=True) if g is not None and w is not None]
    if not all(bool(w.isfinite().all()) for _, w in pairs):
        return True  # the guard deals with it
    difference = sum(float(((g - w).double() ** 2).sum()) for g, w in pairs) ** 0.5
    length = sum(float((w.double() ** 2).sum()) for _, w in pairs) ** 0.5
    return bool(difference <= _TOLERANCE * length + 1e-7)


def _flat(observations: Any) -> list[th.Tensor]:
    if isinstance(observations, dict):
        return [observations[key] for key in sorted(observations)]
    return [observations]


def _unflat(template: Any, tensors: Sequence[th.Tensor]) -> Any:
    return dict(zip(sorted(template), tensors, strict=True)) if isinstance(template, dict) else tensors[0]


def _flat_batch(batch: Any) -> list[th.Tensor]:
    extras = batch[6] if len(batch) > 6 else ()
    return [*_flat(batch[0]), *batch[1:6], *extras]


def _unflat_batch(template: Any, tensors: Sequence[th.Tensor]) -> Any:
    n_observations = len(_flat(template[0]))
    fields = [_unflat(template[0], tensors[:n_observations]), *tensors[n_observations : n_observations + 5]]
    if len(template) > 6:
        fields.append(tuple(tensors[n_observations + 5 :]))
    return template._make(fields)


def _shapes(tensors: Sequence[th.Tensor]) -> tuple[Hashable, ...]:
    return tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
