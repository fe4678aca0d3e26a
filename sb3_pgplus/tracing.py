"""
What of an algorithm can be written down once as a graph of tensor operations, and the compiler behind it.

A trace has no guards: a Python number that changes later stays what it was, and a hook is not called. So only what is
known to depend on nothing but its tensors is traced, and :func:`fingerprint` says when that something changed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import getitem, is_
from types import FunctionType
from typing import Any

import torch as th
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, MlpExtractor, NatureCNN
from torch import nn
from torch.nn.modules import module as module_hooks

from sb3_pgplus.policies import NormalizesObservations, ObservationNormalizer, RunningMoments, submodules

#: Layers whose output depends on input, parameters and plain attributes alone: no chance, no batch statistics.
_LAYERS: set[type[nn.Module]] = {FlattenExtractor, MlpExtractor, NatureCNN, CombinedExtractor}
_LAYERS |= {nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity, nn.Flatten, nn.Linear, nn.Conv2d, nn.LayerNorm}
_LAYERS |= {nn.Tanh, nn.ReLU, nn.ELU, nn.GELU, nn.LeakyReLU, nn.SiLU, nn.Sigmoid, nn.Softplus}
_LAYERS |= {ObservationNormalizer, RunningMoments}
_POLICIES: set[type[nn.Module]] = {ActorCriticPolicy, ActorCriticCnnPolicy, MultiInputActorCriticPolicy}
_DISTRIBUTIONS = {
    DiagGaussianDistribution,
    CategoricalDistribution,
    MultiCategoricalDistribution,
    BernoulliDistribution,
}
#: Methods that a trace of a policy runs through, as they are when this module is imported.
_METHODS = {
    (kind, name): getattr(kind, name)
    for kinds, names in (
        (_POLICIES, ("evaluate_actions", "get_distribution", "predict_values", "extract_features", "forward")),
        (_LAYERS, ("forward",)),
        (_DISTRIBUTIONS, ("proba_distribution", "log_prob", "entropy", "sample", "mode")),
    )
    for kind in kinds
    for name in names
}
_OWNERS, _NAMES = zip(*_METHODS, strict=True)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = frozenset({bool, int, float, str, type(None)})
#: A layer's bias apart from its product: it then goes into the same loop as the activation.
_DECOMPOSITIONS = {th.ops.aten.addmm.default: lambda bias, a, b: th.ops.aten.mm.default(a, b) + bias}


#: A compiled function, of a list of tensors.
TensorFunction = Callable[[list[th.Tensor]], Sequence[th.Tensor]]


class UntraceableError(Exception):
    """Why something cannot be compiled; its message is what the user reads."""


def check_policy(policy: nn.Module) -> None:
    """
    Refuse a policy whose outputs may depend on more than its tensors.

    :param policy: any
    :raises UntraceableError: saying what stands in the way
    """
    if has_global_hooks():
        raise UntraceableError("there are hooks on all modules")
    policy_class = policy.policy_class if isinstance(policy, NormalizesObservations) else type(policy)
    if policy_class not in _POLICIES:
        raise UntraceableError(f"{policy_class.__name__} is not one of SB3's own policies")
    if policy.use_sde:
        raise UntraceableError("state-dependent exploration draws noise inside the policy")
    if type(policy.action_dist) not in _DISTRIBUTIONS:
        raise UntraceableError(f"{type(policy.action_dist).__name__} is not one of the known action distributions")
    if _is_patched():
        raise UntraceableError("a method of a class that it is made of was replaced")
    _check_methods("the action distribution", policy.action_dist)
    for name, module in policy.named_modules():
        if module is not policy and type(module) not in _LAYERS:
            raise UntraceableError(f"{name} is a {type(module).__name__}, which is not on the list of known layers")
        _check_unwatched(name or "the policy", module)


def has_global_hooks() -> bool:
    """Whether somebody registered hooks for all modules there are."""
    hooks = (module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks)
    return any((*hooks, module_hooks._global_backward_hooks, module_hooks._global_backward_pre_hooks))


def _is_patched() -> bool:
    """Whether somebody replaced a method of a class that a trace runs through."""
    return not all(map(is_, map(getattr, _OWNERS, _NAMES), _METHODS.values()))


def _check_methods(name: str, owner: object) -> None:
    """Refuse methods that somebody replaced on the object."""
    for attribute, value in owner.__dict__.items():
        if callable(value) and not isinstance(value, type) and callable(getattr(type(owner), attribute, None)):
            raise UntraceableError(f"{name}.{attribute} was replaced")


def _check_unwatched(name: str, module: nn.Module) -> None:
    """Refuse hooks and methods that somebody replaced on the object."""
    if any(getattr(module, hooks) for hooks in _HOOKS):
        raise UntraceableError(f"{name} has hooks")
    _check_methods(name, module)
    for parameter in module.parameters(recurse=False):
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise UntraceableError(f"a parameter of {name} has hooks")


def foreign_method(owner: object, names: Iterable[str], package: str) -> str | None:
    """
    Look for methods that are not the package's own: what they read besides tensors is unknown.

    :param owner: the algorithm
    :param names: methods that a trace runs through
    :param package: name of the package
    :return: a sentence that names the first foreign method, or None
    """
    for name in names:
        method = owner.__dict__.get(name) or getattr(type(owner), name, None)
        if method is not None and not _is_of(getattr(method, "__func__", method), package):
            return f"{type(owner).__name__}.{name} is overridden"
    return None


def _is_of(function: object, package: str) -> bool:
    """By where its code is: a wrapper calls itself what it wraps."""
    home = function.__globals__.get("__name__", "") if isinstance(function, FunctionType) else ""
    return str(home).partition(".")[0] == package


def fingerprint(modules: Iterable[nn.Module]) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """
    What a trace of these modules depends on besides the values of their tensors.

    :param modules: the traced modules
    :return: everything plain that the trace bakes in (types, modes, numbers, what is frozen, shapes, devices), and the
        identities of the tensors
    """
    plain: list[Any] = [has_global_hooks(), _is_patched()]
    identities: list[int] = []
    first: dict[int, int] = {}  # which tensors are the same
    for module in submodules(*modules):
        attributes = module.__dict__
        # Their number, because a method may be replaced by an attribute.
        plain += (type(module), len(attributes), any([attributes[hooks] for hooks in _HOOKS]))
        plain += [v for v in attributes.values() if type(v) in _PLAIN or (type(v) is tuple and _is_plain_tuple(v))]
        if "action_dist" in attributes:
            distribution = attributes["action_dist"]
            plain += (id(distribution), len(vars(distribution)))
        for tensor in (*attributes["_parameters"].values(), *attributes["_buffers"].values()):
            if tensor is not None:
                plain += (*_layout(tensor), first.setdefault(id(tensor), len(first)))
                identities.append(id(tensor))
    return tuple(plain), tuple(identities)


def _layout(tensor: Any) -> tuple[Any, ...]:
    """What can change of a tensor without its becoming another one."""
    hooks = not tensor._backward_hooks, not tensor._post_accumulate_grad_hooks
    return (tensor.requires_grad, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, *hooks)


def _is_plain_tuple(value: tuple[Any, ...]) -> bool:
    return all([type(entry) in _PLAIN for entry in value])


class Snapshot:
    """
    Modules as they are now, for a quick look whether they still are: at every update, and at every step of a rollout
    where a callback may change something. What differs here may still have the same :func:`fingerprint`.

    :param modules: the traced modules
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = submodules(*modules)
        attributes = [module.__dict__ for module in self._modules]
        members = [entries[name] for entries in attributes for name in ("_parameters", "_buffers", "_modules")]
        distributions = [vars(entries["action_dist"]) for entries in attributes if "action_dist" in entries]
        #: Everything that is looked up by name, and what was found there. Holding that keeps its identity from reuse.
        self._tables: list[dict[str, Any]] = [*attributes, *members]
        self._entries = self._found()
        #: Distributions get new parameters in every forward pass, and a new entry only where something is replaced.
        self._sized = [*self._tables, *distributions]
        self._sizes = [*map(len, self._sized)]
        self._tensors = [x for table in members for x in table.values() if isinstance(x, th.Tensor)]
        self._hooks = [entries[hooks] for entries in attributes for hooks in _HOOKS]
        self._plain = self._changing()

    def still_holds(self) -> bool:
        """Whether nothing has been replaced, added or taken away since."""
        is_same = [*map(len, self._sized)] == self._sizes and all(map(is_, self._found(), self._entries))
        return is_same and self._changing() == self._plain

    def _found(self) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, self._tables))]

    def _changing(self) -> tuple[Any, ...]:
        """What can change in place."""
        layouts, types = [*map(_layout, self._tensors)], [*map(type, self._modules)]
        return layouts, types, any(self._hooks), has_global_hooks(), _is_patched()


class _Parts(nn.Module):
    """Several modules as one, so that their tensors can be replaced by a trace's inputs."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call the function while the tensors are replaced."""
        return function(*args)


class Tensors:
    """
    The parameters and buffers of some modules, in a fixed order.

    :param modules: name → module
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._parts = _Parts(modules)
        named: dict[str, th.Tensor] = {**dict(self._parts.named_parameters()), **dict(self._parts.named_buffers())}
        #: The tensors themselves.
        self.values = list(named.values())

    def replaced(self, values: Sequence[th.Tensor], function: Callable[..., Any], *args: Any) -> Any:
        """
        ``function(*args)`` with other tensors in the modules' place.

        :param values: in the order of :attr:`values`
        """
        new = {id(old): value for old, value in zip(self.values, values, strict=True)}
        # A module with several names, as the features extractor of a stock policy, is one place here: with two, putting
        # the tensors back would leave the replacement in the second.
        replacement = {
            f"{prefix}.{name}": new[id(tensor)]
            for prefix, module in self._parts.named_modules()
            for name, tensor in {**module._parameters, **module._buffers}.items()
            if tensor is not None
        }
        return th.func.functional_call(self._parts, replacement, (function, *args), tie_weights=False)


#: A compiled gradient is compared with the eager one at calls 1, 2, 4, …, and then every so many.
_CHECK_EVERY = 4096


@dataclass
class Compiled:
    """
    A compiled function with what is needed to call it.

    :param call: the function, of a list of tensors
    :param names: of the scalars it returns
    :param prepare: what is computed once for many calls, from the inputs that they have in common
    """

    call: TensorFunction
    names: list[str] = field(default_factory=list)
    prepare: TensorFunction | None = None
    n_calls: int = 0

    def is_due(self) -> bool:
        """Count a call; whether this one is to be compared with the eager result."""
        self.n_calls += 1
        is_power_of_two = self.n_calls & (self.n_calls - 1) == 0
        return is_power_of_two if self.n_calls < _CHECK_EVERY else self.n_calls % _CHECK_EVERY == 0


@dataclass(frozen=True)
class Known:
    """Modules in one state: the number of all that a trace of them bakes in, their tensors, why none can be made."""

    number: int
    tensors: Tensors
    refusal: str | None


def compile_function(
    function: Callable[..., Sequence[th.Tensor]], inputs: Sequence[th.Tensor], may_change: Iterable[int] = ()
) -> TensorFunction:
    """
    Trace a function of tensors and compile the trace. The compiler keeps its results on disk for later runs.

    :param function: tensors ↦ new tensors; may differentiate with ``torch.autograd.grad``
    :param inputs: examples; those that are differentiated require grad
    :param may_change: positions of the inputs that it changes in place; the examples stay as they are
    :return: the compiled function, of a list of tensors like the inputs
    :raises UntraceableError: if the function's course depends on values, or it changes anything else in place
    """
    return _compile(_trace(function, inputs, may_change), [tensor.detach() for tensor in inputs])


def compile_in_two(
    function: Callable[..., Sequence[th.Tensor]], inputs: Sequence[th.Tensor]
) -> tuple[TensorFunction, TensorFunction]:
    """
    :func:`compile_function` for calls in which the last input alone changes: what does not depend on it is computed
    once for all of them.

    :param function: tensors ↦ new tensors
    :param inputs: examples
    :return: ``before``, all inputs but the last ↦ intermediate results, and ``after``, these, then the last input ↦ the
        function's results
    :raises UntraceableError: as :func:`compile_function`
    """
    examples = [tensor.detach() for tensor in inputs]
    before, after, needed = _split_before_last_input(_trace(function, inputs, ()))
    compute = _compile(before, examples[:-1])

    def call_before(inputs: list[th.Tensor]) -> list[th.Tensor]:
        return [*(inputs[i] for i in needed), *compute(inputs)]

    between = call_before(examples[:-1])
    expected = [node.meta["val"] for node in after.graph.nodes if node.op == "placeholder"]
    for tensor, known in zip(between, expected, strict=False):
        if (tensor.shape, tensor.stride(), tensor.dtype) != (known.shape, known.stride(), known.dtype):
            raise UntraceableError("an intermediate result has another layout than in the trace")
    return call_before, _compile(after, [*between, examples[-1]])


def _trace(
    function: Callable[..., Sequence[th.Tensor]], inputs: Sequence[th.Tensor], may_change: Iterable[int]
) -> th.fx.GraphModule:
    """The function as a graph of operations without side effects, but for copies to what may change."""
    # Imported here: the compiler takes seconds to import, and most runs never need it.
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    try:
        graph = _without_detach(make_fx(function, tracing_mode="fake")(*inputs))
        # Backward formulas change intermediate results in place; once more without, for what the compiler takes.
        functional = th.func.functionalize(graph, remove="mutations")
        table, plain = {**select_decomp_table(), **_DECOMPOSITIONS}, [tensor.detach() for tensor in inputs]
        graph = make_fx(functional, decomposition_table=table, tracing_mode="fake")(*plain)
    except Exception as error:  # whatever a loss may do that cannot be traced
        raise UntraceableError(f"it cannot be traced: {_first_line(error)}") from error
    _check_graph(graph, frozenset(may_change))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _compile(graph: th.fx.GraphModule, inputs: Sequence[th.Tensor]) -> TensorFunction:
    """Machine code of a graph, for inputs like these."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    examples = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    # One call from Python into C++ instead of one per kernel, where there is no device to talk to.
    on_cpu = all(tensor.device.type == "cpu" for tensor in inputs)
    context = th._guards.TracingContext(examples[0].fake_mode)
    # Without the pattern matcher, which would join again what _DECOMPOSITIONS took apart.
    settings = config.patch(cpp_wrapper=on_cpu, size_asserts=False, pattern_matcher=False)
    with th._guards.tracing(context), settings, th.no_grad():
        compiled: Any = compile_fx_inner(graph, examples, cpp_wrapper=on_cpu)
        compiled([tensor.clone() for tensor in inputs])  # the first call finishes the compiler's own records
    # What is called from now on, without the records that the compiler keeps of every call.
    call: TensorFunction = getattr(compiled, "current_callable", None) or compiled
    return call


def _split_before_last_input(graph: th.fx.GraphModule) -> tuple[th.fx.GraphModule, th.fx.GraphModule, list[int]]:
    """
    Two graphs in sequence: what does not depend on the last input, and the rest. The second one's inputs are those of
    the whole at the positions that are returned, then the first one's results, then the last input.
    """
    nodes = list(graph.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    dependent = {placeholders[-1], nodes[-1]}
    for node in nodes:
        if not dependent.isdisjoint(node.all_input_nodes):
            dependent.add(node)
    after = set(dependent)
    for node in reversed(nodes):
        if _is_free(node) and not after.isdisjoint(node.users):
            after.add(node)  # as well
    passed = [node for node in nodes if node not in after and not after.isdisjoint(node.users)]
    needed = [node for node in passed if node.op == "placeholder"]
    computed = [node for node in passed if node.op != "placeholder"]

    first, second = th.fx.Graph(), th.fx.Graph()
    of_first: dict[th.fx.Node, th.fx.Node] = {}
    for node in nodes:
        if node not in dependent:
            of_first[node] = first.node_copy(node, of_first.__getitem__)
    first.output([of_first[node] for node in computed])
    # The compiler would lay results out as it likes; the second graph is compiled for those of the trace.
    first.output_node().meta["user_visible_output_idxs"] = list(range(len(computed)))
    first.eliminate_dead_code()
    of_second = {node: second.placeholder(f"given_{node.name}") for node in (*needed, *computed, placeholders[-1])}
    for node, given in of_second.items():
        given.meta = dict(node.meta)
    for node in nodes:
        if node in after and node not in of_second:
            of_second[node] = second.node_copy(node, of_second.__getitem__)
    modules = [th.fx.GraphModule(graph, part) for part in (first, second)]
    return modules[0], modules[1], [placeholders.index(node) for node in needed]


def _is_free(node: th.fx.Node) -> bool:
    """Whether it takes no time: a constant, or a view, which only reads in another way what is there."""
    if node.target is getitem:
        return _is_free(node.all_input_nodes[0])
    return node.op == "call_function" and (not node.all_input_nodes or getattr(node.target, "is_view", False))


def _without_detach(graph: th.fx.GraphModule) -> th.fx.GraphModule:
    """Drop what only speaks to autograd, which has done its part."""
    for node in list(graph.graph.nodes):
        if node.target is th.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _check_graph(graph: th.fx.GraphModule, may_change: frozenset[int]) -> None:
    """Refuse tensors that were captured instead of passed in, and operations in place on what may not change."""
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    changing = {node for i, node in enumerate(inputs) if i in may_change}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            raise UntraceableError("it reads a tensor that belongs neither to the policy nor to the batch")
        schema = getattr(node.target, "_schema", None)
        is_allowed = node.target is th.ops.aten.copy_.default and node.args[0] in changing
        if node.op == "call_function" and schema is not None and schema.is_mutable and not is_allowed:
            raise UntraceableError(f"it changes a tensor in place ({node.target})")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
