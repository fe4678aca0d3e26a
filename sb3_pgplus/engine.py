"""
Runs the functions that training spends its time in: eagerly, or compiled where that pays back, with the same result.

What is compiled is the update on a minibatch (:mod:`sb3_pgplus.compiled_update`) and the policy's step in the rollout.
Anything that cannot be compiled safely runs eagerly, and :meth:`Engine.report` says why.
"""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch as th
from torch import nn

from sb3_pgplus.compiled_update import (
    PACKAGE,
    CompiledUpdate,
    Gradient,
    GradientProblem,
    Ready,
    agree,
    flat_observations,
    shapes,
    unflat_observations,
)
from sb3_pgplus.compiler import Compiled, UntraceableError, compile_function, compile_in_two, first_line
from sb3_pgplus.core.natural_gradient import MatVec, fisher_vector_product
from sb3_pgplus.device_graphs import RecordedCall, TensorFunction, copy_in_place_of, is_recordable
from sb3_pgplus.errors import warn_user
from sb3_pgplus.guards import broken_policy, without_distribution_checks
from sb3_pgplus.optimizers import has_own_zero_grad
from sb3_pgplus.policies import fisher_outputs, submodules
from sb3_pgplus.recorded_update import RecordedUpdate
from sb3_pgplus.sampling import Draw, noise_of, sample
from sb3_pgplus.tracing import Known, Snapshot, Tensors, check_policy, fingerprint, foreign_method

T = TypeVar("T")


class Cost(NamedTuple):
    """What compiling a unit takes and what each call then saves, in seconds on an ordinary core; fixed numbers."""

    to_compile: float
    saved_per_call: float


#: The functions that can be compiled. The choice must not depend on a clock: the same seed has to give the same run.
COSTS = {
    "update": Cost(12.0, 0.8e-3),
    "critic update": Cost(8.0, 0.3e-3),
    "policy step": Cost(6.0, 0.25e-3),
    "Fisher product": Cost(6.0, 1.2e-3),
}
#: Compile once the saving is this many times the cost.
_MARGIN = 1.5
#: After this many different versions of a unit something keeps changing, and compiling again and again is a loss.
_MAX_VERSIONS = 4
#: States of the modules that are remembered.
_MAX_KNOWN = 8


@dataclass
class Engine:
    """
    Decides what is compiled, keeps the compiled functions, and reports.

    :param setting: the hyperparameter ``compile``
    :param announce: say when compiling begins and ends
    """

    setting: bool | str
    announce: bool = False
    #: Whether nobody else's code runs between two looks at the modules, so that a second one would find the same.
    is_undisturbed: bool = False
    _wanted: set[str] = field(default_factory=set)
    _functions: dict[str, dict[Hashable, Compiled]] = field(default_factory=dict)
    #: Unit → why it runs eagerly.
    _reasons: dict[str, str] = field(default_factory=dict)
    _refused: dict[tuple[str, Hashable], str] = field(default_factory=dict)
    _known: dict[Hashable, Known] = field(default_factory=dict)
    #: Everything plain of modules → its number, which is quicker to look up.
    _numbers: dict[Hashable, int] = field(default_factory=dict)
    #: Names of modules → what was found last.
    _inspected: dict[tuple[str, ...], tuple[Snapshot, Known]] = field(default_factory=dict)
    #: Unit and what a loss depends on → which of the trained parameters it depends on.
    used: dict[Hashable, tuple[bool, ...]] = field(default_factory=dict)
    #: Unit → what its last update found.
    ready: dict[str, Ready] = field(default_factory=dict)
    #: What :meth:`remembered` found.
    _remembered: dict[Hashable, Any] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: compiled code stays in its process, and what is known of modules goes by their addresses."""
        fresh = Engine(self.setting, self.announce, _wanted=set(self._wanted), _reasons=dict(self._reasons))
        return dict(fresh.__dict__)

    def plan(self, calls: Mapping[str, int]) -> None:
        """
        Choose what to compile.

        :param calls: unit → how often the whole training calls it
        """
        self._wanted.clear()
        self._remembered.clear()
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

    def remembered(self, what: Hashable, find: Callable[[], T]) -> T:
        """
        What was found before, where nobody can have changed it since; otherwise it is looked for again.

        :param what: its name
        :param find: looks for it
        """
        if not self.is_undisturbed or what not in self._remembered:
            self._remembered[what] = find()
        found: T = self._remembered[what]
        return found

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
        known, reason = self.remembered((unit, problem.methods), lambda: self._examine(problem))
        if reason is not None:
            self._reasons[unit] = reason
            return eager
        kind = RecordedUpdate if is_recordable(known.tensors.values[0].device) else CompiledUpdate
        return kind(self, unit, problem, known, eager)

    def _examine(self, problem: GradientProblem) -> tuple[Known, str | None]:
        """What is known about the modules of a loss, and why its gradient must not be compiled."""
        known = self._inspect(problem.modules)
        if has_own_zero_grad(problem.owner.policy.optimizer):  # it may add up gradients, and looking costs one
            return known, "the optimiser has a zero_grad of its own"
        return known, known.refusal or foreign_method(problem.owner, problem.methods, PACKAGE)

    def _inspect(self, modules: dict[str, nn.Module]) -> Known:
        """What is known about some modules, the policy among them, in the state in which they are now."""
        names = tuple(modules)
        if names in self._inspected:  # nearly always
            snapshot, known = self._inspected[names]
            if snapshot.is_of(modules.values()) and (self.is_undisturbed or snapshot.still_holds()):
                return known
        if any(isinstance(module, th.jit.ScriptModule) for module in submodules(*modules.values())):
            return Known(0, Tensors({}), "a part of the policy is a ScriptModule")
        fingerprints = fingerprint(modules.values())
        if fingerprints not in self._known:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            refusal = None
            try:
                check_policy(modules["policy"])
            except UntraceableError as error:
                refusal = str(error)
            # Those that are refused are never looked up by it.
            number = 0 if refusal else self._numbers.setdefault(fingerprints[0], 1 + len(self._numbers))
            self._known[fingerprints] = Known(number, Tensors(modules), refusal)
        self._inspected[names] = Snapshot(modules.values()), self._known[fingerprints]
        return self._known[fingerprints]

    def version(self, unit: str, key: Hashable, build: Callable[[], Compiled]) -> Compiled | None:
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
            self._reasons[unit] = self._refused[unit, key]
            return None
        if self.keeps_changing(unit):
            return None
        try:
            versions[key] = self._announced(unit, build)
        except UntraceableError as error:
            self.reject(unit, key, str(error))
            return None
        except Exception as error:  # no C++ compiler, for example: training goes on without
            self.reject(unit, key, f"the compiler failed: {first_line(error)}")
            return None
        return versions[key]

    def keeps_changing(self, unit: str) -> bool:
        """
        Whether a unit has had so many versions that no further one is made.

        :param unit: its name
        """
        if len(self._functions.get(unit, {})) >= _MAX_VERSIONS:
            self._reasons[unit] = f"what it depends on changed more than {_MAX_VERSIONS - 1} times"
            return True
        refusals = [reason for (of, _), reason in self._refused.items() if of == unit]
        if len(refusals) >= _MAX_VERSIONS:
            self._reasons[unit] = refusals[-1]
        return len(refusals) >= _MAX_VERSIONS

    def reject(self, unit: str, key: Hashable, reason: str) -> None:
        """
        Never use a version again.

        :param unit: its name
        :param key: its key
        :param reason: for the report
        """
        self._functions.get(unit, {}).pop(key, None)
        self._refused[unit, key] = self._reasons[unit] = reason

    def _announced(self, unit: str, build: Callable[[], Compiled]) -> Compiled:
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
        known, flat = self._inspect({"policy": policy}), flat_observations(observations)
        if known.refusal is not None:
            self._reasons[unit] = known.refusal
            return eager
        dtype = next((x.dtype for x in policy.parameters()), th.get_default_dtype())
        draws = noise_of(policy.action_space, len(flat[0]), flat[0].device, dtype)
        key = (known.number, shapes(flat), dtype)
        found = self.version(unit, key, lambda: _compile_policy_step(policy, known.tensors, observations, draws))
        if found is None:
            return eager
        snapshot = self._inspected["policy",][0]
        try:
            return _PolicyStep(found, policy, known.tensors.values, flat, draws, snapshot)
        except Exception as error:  # a kernel that cannot be recorded, or no memory: training goes on without
            self.reject(unit, key, f"it cannot be recorded for the device: {first_line(error)}")
            return eager

    # --- products with the Fisher matrix ------------------------------------------------------------------------------

    def fisher_product(
        self, policy: Any, observations: Any, parameters: Sequence[nn.Parameter], eager: Callable[[], MatVec]
    ) -> MatVec:
        """
        The products of a trust-region step.

        :param policy: an actor-critic policy in evaluation mode
        :param observations: the states that the Fisher matrix is an average over, as tensors
        :param parameters: the actor's
        :param eager: makes the same function without a compiler
        :return: v ↦ Fv, ``[P] → [P]``
        """
        unit = "Fisher product"
        if unit not in self._wanted:
            return eager()
        known, flat = self._inspect({"policy": policy}), flat_observations(observations)
        if known.refusal is not None:
            self._reasons[unit] = known.refusal
            return eager()
        position = {id(tensor): i for i, tensor in enumerate(known.tensors.values)}
        positions = tuple([position[id(parameter)] for parameter in parameters])
        key = (known.number, shapes(flat), positions)
        found = self.version(unit, key, lambda: _compile_fisher_product(policy, known.tensors, observations, positions))
        if found is None:
            return eager()
        product = _FisherProduct(found, [*known.tensors.values, *flat], eager, partial(self.drifted, unit, key))
        try:
            product.record(parameters)
        except Exception as error:  # a kernel that cannot be recorded, or no memory: training goes on without
            self.reject(unit, key, f"it cannot be recorded for the device: {first_line(error)}")
            return eager()
        return product

    def drifted(self, unit: str, key: Hashable) -> None:
        """
        Never use a version again, because it gave something else than the eager function.

        :param unit: its name
        :param key: its key
        """
        reason = "its compiled result differed from the eager one, which is used from now on"
        self.reject(unit, key, reason)
        warn_user(f"{unit}: {reason}. Something that it depends on is not a tensor of the policy or the batch.")


@th.no_grad()
def _eager_step(policy: Any, observations: Any) -> Any:
    with without_distribution_checks():  # NaN is found in the log-probabilities
        try:
            return policy(observations)
        except RuntimeError as error:
            if "nan" in str(error):  # torch draws from no such probabilities
                raise broken_policy(policy) from error
            raise


class _PolicyStep:
    """
    A compiled policy step; the noise is drawn outside, from the same random stream as the policy's own. Observations of
    another type or layout than the first ones go to the policy itself.
    """

    def __init__(
        self,
        compiled: Compiled,
        policy: Any,
        tensors: list[th.Tensor],
        example: list[th.Tensor],
        draws: list[Draw],
        snapshot: Snapshot,
    ) -> None:
        self._compiled, self._policy, self._tensors, self._draws = compiled, policy, tensors, draws
        self._shapes, self._snapshot = shapes(example), snapshot
        self._noise: list[th.Tensor] = []
        self._call: TensorFunction = compiled.call
        if is_recordable(example[0].device):
            self._call = self._recorded(example)

    def _recorded(self, example: list[th.Tensor]) -> RecordedCall:
        """The function as the device keeps it for the tensors of now."""
        found = self._compiled.recorded
        if found is None or not found.is_of(self._tensors):
            inputs = [*self._tensors, *example, *_examples_of(self._draws, example)]
            found = self._compiled.recorded = RecordedCall(self._compiled.call, inputs, len(self._tensors))
        return found

    def __call__(self, observations: Any) -> tuple[th.Tensor, ...]:
        flat = flat_observations(observations)
        if shapes(flat) != self._shapes:
            result: tuple[th.Tensor, ...] = _eager_step(self._policy, observations)
            return result
        self._compiled.n_calls += 1
        self._noise = [draw() for draw in self._draws]
        return tuple(self._call([*self._tensors, *flat, *self._noise]))

    def values(self, observations: Any) -> th.Tensor:
        """V of as many observations as a step has, ``[N, 1]``; the noise of the last step serves, none is drawn."""
        flat = flat_observations(observations)
        if shapes(flat) != self._shapes or not self._noise:
            values: th.Tensor = self._policy.predict_values(observations)
            return values
        return self._call([*self._tensors, *flat, *self._noise])[1]

    def is_outdated(self) -> bool:
        """Whether the policy's modules are no longer what they were, or where they were, when this was made."""
        is_moved = isinstance(self._call, RecordedCall) and not self._call.is_of(self._tensors)
        return is_moved or not self._snapshot.still_holds()


def _compile_policy_step(policy: Any, tensors: Tensors, observations: Any, draws: list[Draw]) -> Compiled:
    n_tensors, n_observations = len(tensors.values), len(flat_observations(observations))

    def act(inputs: Any, noise: list[th.Tensor]) -> tuple[th.Tensor, ...]:
        distribution = policy.get_distribution(inputs)
        actions = sample(distribution, noise)
        values, log_probs = policy.predict_values(inputs), distribution.log_prob(actions)
        return actions.reshape((-1, *policy.action_space.shape)), values, log_probs

    def function(*flat: th.Tensor) -> tuple[th.Tensor, ...]:
        inputs = unflat_observations(observations, flat[n_tensors : n_tensors + n_observations])
        noise = list(flat[n_tensors + n_observations :])
        results: tuple[th.Tensor, ...] = tensors.replaced(flat[:n_tensors], act, inputs, noise)
        return results

    inputs = [*tensors.values, *flat_observations(observations)]
    example = [*inputs, *_examples_of(draws, inputs)]
    before = dict(vars(policy.action_dist))
    try:
        with without_distribution_checks(), th.no_grad():
            return Compiled(compile_function(function, [tensor.detach() for tensor in example]))
    finally:  # a trace leaves the distribution of tensors that have no values
        vars(policy.action_dist).clear()
        vars(policy.action_dist).update(before)


def _examples_of(draws: list[Draw], inputs: list[th.Tensor]) -> list[th.Tensor]:
    """Noise like that of a step, without moving the random stream."""
    with th.random.fork_rng({x.device.index for x in inputs if x.is_cuda}):
        return [draw() for draw in draws]


class _FisherProduct:
    """
    v ↦ Fv at the parameters of now, which have to stay until the last product: by a compiled function, compared with
    the eager one now and then.
    """

    def __init__(
        self, compiled: Compiled, inputs: list[th.Tensor], eager: Callable[[], MatVec], on_drift: Callable[[], None]
    ) -> None:
        assert compiled.prepare is not None
        self._compiled, self._make_eager, self._on_drift = compiled, eager, on_drift
        self._eager: MatVec | None = None
        with th.no_grad():
            #: What all products have in common.
            self._inputs = compiled.prepare(inputs)

    def record(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give the function to the device, if that keeps functions and has not got it yet."""
        if self._compiled.recorded is None and is_recordable(parameters[0].device):
            own = [copy_in_place_of(tensor) for tensor in self._inputs]
            v = parameters[0].detach().new_ones(sum(parameter.numel() for parameter in parameters))
            self._compiled.recorded = RecordedCall(self._compiled.call, [*own, v], len(own))

    def __call__(self, v: th.Tensor) -> th.Tensor:
        if self._eager is not None:
            return self._eager(v)
        with th.no_grad():
            product = self._call()([*self._inputs, v])[0]
        if self._compiled.is_due():
            eager = self._make_eager()
            wanted = eager(v)
            if not agree([product], [wanted]):
                self._eager = eager
                self._on_drift()
                return wanted
        return product

    def _call(self) -> TensorFunction:
        recorded = self._compiled.recorded
        if recorded is None:
            return self._compiled.call
        recorded.hold(self._inputs)
        return recorded


def _compile_fisher_product(policy: Any, tensors: Tensors, observations: Any, positions: Sequence[int]) -> Compiled:
    n_tensors = len(tensors.values)

    def function(*flat: th.Tensor) -> list[th.Tensor]:
        def outputs() -> Any:
            return fisher_outputs(policy.get_distribution(unflat_observations(observations, flat[n_tensors:-1])))

        y, metric = tensors.replaced(flat[:n_tensors], outputs)
        return [fisher_vector_product(y, metric, [flat[i] for i in positions])(flat[-1])]

    n_entries = sum(tensors.values[i].numel() for i in positions)
    example = [*tensors.values, *flat_observations(observations), tensors.values[positions[0]].new_ones(n_entries)]
    with without_distribution_checks():
        # Conjugate gradient takes many products at the same parameters: their forward pass is that of all.
        examples = [x.detach().requires_grad_(i in positions) for i, x in enumerate(example)]
        prepare, product = compile_in_two(function, examples)
        return Compiled(product, prepare=prepare)
