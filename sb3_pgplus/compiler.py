"""From a function of tensors to machine code: the trace, what may be in it, and torch's compiler."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import getitem
from typing import Any, TypeVar

import torch as th

from sb3_pgplus.device_graphs import RecordedCall, RecordedLoop, TensorFunction, copy_in_place_of, is_recordable
from sb3_pgplus.interruptions import deferred

T = TypeVar("T")
#: Graph, examples of its inputs ↦ what runs it.
Backend = Callable[[th.fx.GraphModule, Sequence[th.Tensor]], TensorFunction]

#: tanh x ≈ x P(x²)/Q(x²) for |x| ≤ 9, from where on it is 1 in float32: coefficients of ascending powers. The relative
#: error is 2e-8 before rounding, the least that four powers allow (``benchmarks/rational_tanh.py`` computes them).
_TANH_END = 9.0
_TANH_NUMERATOR = (1.0, 0.133810242, 3.49558654e-3, 2.06090585e-5, 1.33546325e-8)
_TANH_DENOMINATOR = (1.0, 0.467143398, 2.5876976e-2, 3.28563233e-4, 7.77654562e-7)


def _tanh(x: th.Tensor) -> Any:
    """
    Compute tanh x by multiplications, additions and one division, which the compiler makes vector instructions of.

    A call of its mathematical library for every vector takes four times as long, and is a sixth of a whole update of
    two small networks. The result differs by 4e-7 of itself at most, six roundings.
    """
    if x.dtype != th.float32 or x.device.type != "cpu":
        return NotImplemented  # left as it is
    bounded = x.clamp(-_TANH_END, _TANH_END)
    square = bounded * bounded
    numerator, denominator = _polynomial(_TANH_NUMERATOR, square), _polynomial(_TANH_DENOMINATOR, square)
    return (bounded * numerator / denominator).clamp(-1.0, 1.0)


def _polynomial(coefficients: Sequence[float], x: th.Tensor) -> th.Tensor:
    """Σ cₖxᵏ by Horner's rule."""
    *rest, highest = coefficients
    result = x * highest + rest.pop()
    for coefficient in reversed(rest):
        result = result * x + coefficient
    return result


_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    # A layer's bias apart from its product: it then goes into the same loop as the activation.
    th.ops.aten.addmm.default: lambda bias, a, b: th.ops.aten.mm.default(a, b) + bias,
    th.ops.aten.tanh.default: _tanh,
}


class UntraceableError(Exception):
    """Why something cannot be compiled; its message is what the user reads."""


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
    #: How many of the last comparisons, one after the other, found another result.
    n_disagreements: int = 0
    #: The function as a device was given it, for tensors in their places of now.
    loop: RecordedLoop | None = None
    #: How often it was given.
    n_recordings: int = 0
    recorded: RecordedCall | None = None

    def is_due(self) -> bool:
        """Count a call; whether this one is to be compared with the eager result."""
        is_next = self.n_before_due() == 0
        self.n_calls += 1
        return is_next

    def n_before_due(self) -> int:
        """How many calls from now on are not to be compared."""
        if self.n_disagreements:
            return 0
        following = self.n_calls + 1
        due = (
            1 << (following - 1).bit_length()
            if following < _CHECK_EVERY
            else -(-following // _CHECK_EVERY) * _CHECK_EVERY
        )
        return due - following


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
    examples = [tensor.detach() for tensor in inputs]
    return _made(function, inputs, may_change, lambda graph, compiled: compiled(graph, examples))


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
    return _made(function, inputs, (), lambda graph, compiled: _in_two(graph, compiled, examples))


def _made(
    function: Callable[..., Sequence[th.Tensor]],
    inputs: Sequence[th.Tensor],
    may_change: Iterable[int],
    make: Callable[[th.fx.GraphModule, Backend], T],
) -> T:
    """What is made of a function's graph by the compiler, or, for a device that keeps its work, without it."""
    graph = _trace(function, inputs, may_change)
    try:
        return make(graph, _compile)
    except Exception:
        if not is_recordable(inputs[0].device):
            raise
        # Its kernels as they are: what is recorded has no other overhead.
        return make(_trace(function, inputs, may_change, is_compiled=False), _plain)


def _in_two(
    graph: th.fx.GraphModule, compiled: Backend, examples: Sequence[th.Tensor]
) -> tuple[TensorFunction, TensorFunction]:
    before, after, needed = _split_before_last_input(graph)
    compute = compiled(before, examples[:-1])

    def call_before(inputs: list[th.Tensor]) -> list[th.Tensor]:
        return [*(inputs[i] for i in needed), *compute(inputs)]

    between = call_before(list(examples[:-1]))
    expected = [node.meta["val"] for node in after.graph.nodes if node.op == "placeholder"]
    for tensor, known in zip(between, expected, strict=False):
        if (tensor.shape, tensor.stride(), tensor.dtype) != (known.shape, known.stride(), known.dtype):
            raise UntraceableError("an intermediate result has another layout than in the trace")
    return call_before, compiled(after, [*between, examples[-1]])


def _trace(
    function: Callable[..., Sequence[th.Tensor]],
    inputs: Sequence[th.Tensor],
    may_change: Iterable[int],
    is_compiled: bool = True,
) -> th.fx.GraphModule:
    """The function as a graph of operations without side effects, but for copies to what may change."""
    # Imported here: the compiler takes seconds to import, and most runs never need it.
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    table = {**select_decomp_table(), **_DECOMPOSITIONS} if is_compiled else {}
    plain = [tensor.detach() for tensor in inputs]
    try:
        with deferred():  # an exception in the middle of a trace can end the process: torch has its modes on a stack
            graph = _without_detach(make_fx(function, tracing_mode="fake")(*inputs))
            # Backward formulas change intermediate results in place; once more without, for what the compiler takes.
            functional = th.func.functionalize(graph, remove="mutations")
            graph = make_fx(functional, decomposition_table=table, tracing_mode="fake")(*plain)
    except Exception as error:  # whatever a loss may do that cannot be traced
        raise UntraceableError(f"it cannot be traced: {first_line(error)}") from error
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
    # Without CUDA graphs of its own: the whole call becomes a part of one.
    options = {"cpp_wrapper": on_cpu, "size_asserts": False, "pattern_matcher": False, "triton.cudagraphs": False}
    settings = config.patch(options)
    with th._guards.tracing(context), settings, th.no_grad():
        compiled: Any = compile_fx_inner(graph, examples, cpp_wrapper=on_cpu)
        compiled([_expendable(tensor) for tensor in inputs])  # the first call finishes the compiler's own records
    # What is called from now on, without the records that the compiler keeps of every call.
    call: TensorFunction = (getattr(compiled, "current_callable", None) if on_cpu else None) or compiled
    return call


def _expendable(tensor: th.Tensor) -> th.Tensor:
    """A copy that may be changed; what shares memory with itself cannot be changed."""
    try:
        return copy_in_place_of(tensor)
    except RuntimeError:
        return tensor


def _plain(graph: th.fx.GraphModule, _: Sequence[th.Tensor]) -> TensorFunction:
    """A graph without the compiler: one operation after the other."""
    return lambda tensors: graph(*tensors)


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


def first_line(error: BaseException) -> str:
    """
    The beginning of an error's message, for a report.

    :param error: any
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
