"""Steps of torch's optimisers with less overhead: for small networks it is most of an update's time."""

import copy
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import is_
from typing import Any, Self

import numpy as np
import torch as th
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from sb3_pgplus.device_graphs import is_recordable


def fuse(optimizer: th.optim.Optimizer) -> None:
    """
    Let Adam step with one kernel instead of ten per parameter (it rounds differently from the loop that SB3 uses).

    :param optimizer: any; only Adam whose way of stepping nobody has chosen is changed
    """
    if type(optimizer) is not th.optim.Adam:
        return
    for group in optimizer.param_groups:
        chosen = any(group[name] for name in ("capturable", "differentiable", "amsgrad"))
        chosen |= any(group[name] is not None for name in ("fused", "foreach"))
        plain = all([p.is_floating_point() and (p.is_cpu or is_recordable(p.device)) for p in group["params"]])
        if plain and not chosen:
            group["fused"] = True


#: What torch's optimisers keep for each element of a parameter.
_PER_ELEMENT = frozenset(
    {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg", "momentum_buffer", "sum"}
)


def check_fits(state_dict: Any, optimizer: th.optim.Optimizer) -> None:
    """
    Check that moments have the shapes of their parameters. Torch does not, and its fused kernels, told to go through a
    parameter, would write behind the end of a smaller tensor.

    :param state_dict: of an optimiser, from a file
    :param optimizer: what it shall be loaded into
    :raises ValueError: naming the parameter's number
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    groups, states = (
        state_dict.get(part, ()) for part in ("param_groups", "state")
    )  # a missing one is torch's to tell
    numbers = [number for group in groups for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=False):  # so is a wrong number of them
        for name, value in states[number].items() if number in states else ():
            if not isinstance(value, th.Tensor) or name not in (*_PER_ELEMENT, "step"):
                continue
            expected = th.Size() if name == "step" else parameter.shape
            plain = value.layout == th.strided and value.is_contiguous()
            if value.shape != expected or not (plain or value.stride() == parameter.stride()):
                raise ValueError(
                    f"`{name}` of parameter {number} in the optimiser's state has the shape {tuple(value.shape)} with "
                    f"strides {value.stride() if value.layout == th.strided else None}, where {tuple(expected)} belongs"
                )


def has_own_zero_grad(optimizer: th.optim.Optimizer) -> bool:
    """
    Whether ``zero_grad`` does something else than torch's, such as keeping gradients until a later step.

    :param optimizer: any
    """
    return type(optimizer).zero_grad is not th.optim.Optimizer.zero_grad or "zero_grad" in optimizer.__dict__


def zero_grad(optimizer: th.optim.Optimizer, besides: Sequence[th.Tensor] = ()) -> None:
    """
    ``optimizer.zero_grad()``; a lean one where it is torch's, for further parameters too.

    :param optimizer: any
    :param besides: what the optimiser may not have
    """
    if has_own_zero_grad(optimizer):
        optimizer.zero_grad()
        return
    drop_gradients(optimizer)
    for parameter in besides:
        parameter.grad = None


def drop_gradients(optimizer: th.optim.Optimizer, besides: Sequence[th.Tensor] = ()) -> None:
    """
    Set gradients to None, which makes optimisers leave parameters alone.

    :param optimizer: any
    :param besides: parameters that keep theirs
    """
    kept = {id(parameter) for parameter in besides}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in kept:
                parameter.grad = None


def step(optimizer: th.optim.Optimizer) -> None:
    """
    ``optimizer.step()``; a fused Adam or a plain RMSprop that nobody watches goes to its kernels without torch's
    profiling and checks.

    :param optimizer: any, gradients in place
    """
    _unfuse_where_layouts_differ(optimizer)
    work = _lean_work(optimizer)
    if work is None:
        optimizer.step()
        return
    for group, parameters, states in work:
        _KERNELS[type(optimizer)](group, parameters, states)


def _unfuse_where_layouts_differ(optimizer: th.optim.Optimizer) -> None:
    """
    Torch's fused kernels on a CPU go through memory, so with a transposed parameter they would take other elements'
    gradients and moments. Its loop goes by index.
    """
    for group in optimizer.param_groups:
        if group.get("fused") and not all([_lie_alike(p, optimizer.state.get(p, {})) for p in group["params"]]):
            group["fused"] = None


def _lie_alike(parameter: th.Tensor, state: Mapping[str, Any]) -> bool:
    """Whether a parameter, its gradient and its moments have their elements in the same order, without gaps."""
    tensors = [parameter, parameter.grad, state.get("exp_avg"), state.get("exp_avg_sq")]
    if parameter.grad is None or all([x is None or x.is_contiguous() for x in tensors]):
        return True
    is_dense = th.ops.aten.is_non_overlapping_and_dense(parameter)
    return is_dense and all([x is None or x.stride() == parameter.stride() for x in tensors])


def _lean_work(
    optimizer: th.optim.Optimizer,
) -> list[tuple[dict[str, Any], list[th.Tensor], list[dict[str, Any]]]] | None:
    """Groups with their parameters that have gradients and their states; None if torch's own method has to step."""
    if _is_watched(optimizer):
        return None
    work = []
    for group in optimizer.param_groups:
        parameters = [p for p in group["params"] if p.grad is not None]
        states: list[Any] = [optimizer.state.get(p) for p in parameters]
        if not _is_plain(type(optimizer), group) or not all(states):
            return None
        if parameters:
            work.append((group, parameters, states))
    return work


def _is_watched(optimizer: th.optim.Optimizer) -> bool:
    """Whether its ``step`` is not simply torch's Adam's or RMSprop's."""
    own = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    is_hooked = any((*own, _global_optimizer_pre_hooks, _global_optimizer_post_hooks))
    return is_hooked or type(optimizer) not in _KERNELS or "step" in optimizer.__dict__


def _is_plain(kind: type[th.optim.Optimizer], group: dict[str, Any]) -> bool:
    if kind is th.optim.Adam:
        return bool(group["fused"]) and not group["amsgrad"]
    unusual = ("momentum", "centered", "weight_decay", "maximize", "capturable", "differentiable")
    return group["foreach"] is None and not any(group[name] for name in unusual)


@th.no_grad()
def _adam_step(group: dict[str, Any], parameters: list[th.Tensor], states: list[dict[str, Any]]) -> None:
    _count_up(states)
    beta1, beta2 = group["betas"]
    kernel = th._fused_adamw_ if group["decoupled_weight_decay"] else th._fused_adam_
    kernel(
        parameters,
        [p.grad for p in parameters],  # type: ignore[misc]  # those without were left out
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=group["maximize"],
    )


@th.no_grad()
def _rmsprop_step(group: dict[str, Any], parameters: list[th.Tensor], states: list[dict[str, Any]]) -> None:
    """``v ← αv + (1−α)g²,  θ ← θ − lr g/(√v + ε)``: torch's operations in torch's order, for all parameters at once."""
    _count_up(states)
    gradients: Any = [p.grad for p in parameters]
    averages = [state["square_avg"] for state in states]
    th._foreach_mul_(averages, group["alpha"])
    th._foreach_addcmul_(averages, gradients, gradients, 1 - group["alpha"])
    roots = th._foreach_sqrt(averages)
    th._foreach_add_(roots, group["eps"])
    th._foreach_addcdiv_(parameters, gradients, roots, -group["lr"])


_KERNELS: dict[type[th.optim.Optimizer], Callable[[dict[str, Any], list[th.Tensor], list[dict[str, Any]]], None]] = {
    th.optim.Adam: _adam_step,
    th.optim.RMSprop: _rmsprop_step,
}


def _count_up(states: list[dict[str, Any]]) -> None:
    """
    Add 1 to the parameters' step counters, which are made views of one tensor: that takes one operation.

    They stay tensors of their own to torch, as its optimisers and its state dicts have them. Where they are views
    already, of a tensor that has others' counters too, they stay that: a compiled step counts on it.
    """
    counters = [state["step"] for state in states]
    base = common_base(counters)
    if base is None and any(
        [counter._base is not None or counter.device != counters[0].device for counter in counters]
    ):
        th._foreach_add_(counters, 1)
        return
    base = joined(states, "step") if base is None else base
    base += 1


# --- a step as a function of tensors ----------------------------------------------------------------------------------

#: What torch's optimisers keep of each parameter, the step counter first.
_STATE_OF: dict[type[th.optim.Optimizer], tuple[str, ...]] = {
    th.optim.Adam: ("step", "exp_avg", "exp_avg_sq"),
    th.optim.RMSprop: ("step", "square_avg"),
}
#: Entries of a parameter group that are no settings of the step's formula.
_NO_SETTINGS = ("params", "lr", "initial_lr")


@dataclass
class StepRule:
    """
    The step of a plain Adam or RMSprop on some parameters as a function of tensors, which a trace can contain.

    Of each kind of state, all parameters' are joined to one vector, of which the optimiser's own tensors are made
    views. To torch, and in a state dict, they are what they were; a compiled function takes one tensor, not many.

    :param key: what the function depends on besides tensors: settings, which parameter has which rate
    """

    key: Hashable
    _optimizer: th.optim.Optimizer
    _parameters: Sequence[th.Tensor]
    #: Index of each parameter's group.
    _group_of: tuple[int, ...]
    _settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        self._owners = [self._optimizer.state[parameter] for parameter in self._parameters]
        #: The states as they were joined last, the counters that became views then, and their memory as an array.
        self._joined: list[th.Tensor] = []
        self._counters: list[th.Tensor] = []
        self._counts = np.zeros(0)
        #: All of these views, held so that no other object gets their identity, and where they lie.
        self._views: list[th.Tensor] = []
        self._places: list[int] = []
        self._layout = self._layout_of_parameters()
        #: Whether steps are recorded: nobody outside then knows how many there were.
        self._is_recorded = is_recordable(self._parameters[0].device)

    def _layout_of_parameters(self) -> list[Any]:
        """Which parameters there are in which group, and where those that are stepped lie."""
        groups = self._optimizer.param_groups
        return [*([*map(id, group["params"])] for group in groups), *(p.data_ptr() for p in self._parameters)]

    def still_holds(self, optimizer: th.optim.Optimizer) -> bool:
        """
        Whether :meth:`of` would find the same rule again; much quicker.

        :param optimizer: the one of now
        """
        if optimizer is not self._optimizer or _is_watched(optimizer) or not self._states_stay():
            return False
        for group in optimizer.param_groups:
            if not isinstance(group["lr"], float) or _settings(group) != self._settings:
                return False
        if type(optimizer) is th.optim.Adam:
            counts = self._joined[0].cpu().numpy() if self._is_recorded else self._counts
            if not (counts == counts[0]).all():
                return False  # its numbers are for all
        return self._layout == self._layout_of_parameters()

    def _states_stay(self) -> bool:
        """Whether the optimiser's tensors are those that were joined last, in the same memory."""
        state, names = self._optimizer.state, _STATE_OF[type(self._optimizer)]
        if not all([state.get(p) is owner for p, owner in zip(self._parameters, self._owners, strict=True)]):
            return False
        found = [owner.get(name) for name in names for owner in self._owners]
        if len(found) != len(self._views) or not all(map(is_, found, self._views)):
            return False
        return [view.data_ptr() for view in self._views] == self._places

    @classmethod
    def of(cls, optimizer: th.optim.Optimizer, parameters: Sequence[th.Tensor]) -> Self | None:
        """
        The rule of an optimiser. States that torch makes at a parameter's first step are made now.

        :param optimizer: any
        :param parameters: those that are stepped
        :return: None if the optimiser has to make its steps itself
        """
        groups, kind = optimizer.param_groups, type(optimizer)
        if kind not in _STATE_OF or _is_watched(optimizer):
            return None
        if not all(_is_plain(kind, group) and isinstance(group["lr"], float) for group in groups):
            return None
        settings = [*map(_settings, groups)]
        if any(other != settings[0] for other in settings) or settings[0]["weight_decay"] or settings[0]["maximize"]:
            return None
        index = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        like = {(p.device, p.dtype) for p in parameters}
        plain = all(id(p) in index and p.is_contiguous() for p in parameters)
        if len(like) != 1 or not plain or not _has_kernels(parameters[0]) or _overlap(parameters):
            return None
        for parameter in parameters:
            state = optimizer.state[parameter]
            if not state:
                is_double = kind is th.optim.RMSprop and th.get_default_dtype() is th.float64  # as torch has them
                state["step"] = th.zeros((), dtype=th.float64 if is_double else th.float32)
                state |= {name: th.zeros_like(parameter.detach()) for name in _STATE_OF[kind][1:]}
            state["step"] = state["step"].to(parameter.device)  # torch's RMSprop counts on the CPU, and takes either
        if kind is th.optim.Adam and len({float(optimizer.state[p]["step"]) for p in parameters}) > 1:
            return None  # its numbers below are for all
        group_of = tuple([index[id(p)] for p in parameters])
        key = (kind, group_of, len(groups), repr(settings[0]))
        return cls(key, optimizer, parameters, group_of, copy.deepcopy(settings[0]))

    def states(self) -> list[th.Tensor]:
        """
        The optimiser's own tensors, joined: step counters ``[n]``, then each moment ``[P]``. They are those of now: a
        step outside of this rule may have put others in place.
        """
        # Whatever joins others joins counters, so they tell.
        if not self._joined or any([o["step"] is not c for o, c in zip(self._owners, self._counters, strict=True)]):
            self._joined = [joined(self._owners, name) for name in _STATE_OF[type(self._optimizer)]]
            self._counters = [owner["step"] for owner in self._owners]
            self._counts = np.zeros(0) if self._is_recorded else self._joined[0].numpy()
            self._views = [owner[name] for name in _STATE_OF[type(self._optimizer)] for owner in self._owners]
            self._places = [view.data_ptr() for view in self._views]
        return self._joined

    def numbers(self) -> list[float]:
        """
        What changes from step to step: of each group ``lr``, for Adam ``lr/(1−β₁ⁿ)`` in its place and ``√(1−β₂ⁿ)``.
        They are computed here because a compiled loop would take powers for every few elements; where steps are
        recorded, these are the rates alone.
        """
        rates = [group["lr"] for group in self._optimizer.param_groups]
        if type(self._optimizer) is not th.optim.Adam or self._is_recorded:
            return rates
        self.states()
        (beta1, beta2), count = self._settings["betas"], 1 + float(self._counts[0])
        return [*(rate / (1 - beta1**count) for rate in rates), math.sqrt(1 - beta2**count)]

    def stepped(
        self, parameters: Sequence[th.Tensor], gradient: th.Tensor, states: Sequence[th.Tensor], numbers: Any
    ) -> list[th.Tensor]:
        """
        New parameters, then new states; nothing is changed in place.

        * Adam: ``m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²,  θ ← θ − lr/(1−β₁ⁿ) · m/(√v/√(1−β₂ⁿ) + ε)``
          (Kingma & Ba 2015, algorithm 1)
        * RMSprop: ``v ← αv + (1−α)g²,  θ ← θ − lr g/(√v + ε)`` (Tieleman & Hinton 2012)

        :param parameters: in the rule's order, as are the rest
        :param gradient: clipped and joined, ``[P]``
        :param states: like :meth:`states`
        :param numbers: like :meth:`numbers`, scalar tensors
        """
        settings, dtype, (counts, *moments) = self._settings, gradient.dtype, states
        if type(self._optimizer) is th.optim.Adam:
            beta1, beta2 = settings["betas"]
            if self._is_recorded:
                n = counts[0].double() + 1
                numbers = [*(rate / (1 - beta1**n) for rate in numbers), (1 - beta2**n).sqrt()]
            mean = moments[0] + (1 - beta1) * (gradient - moments[0])
            square = beta2 * moments[1] + (1 - beta2) * gradient * gradient
            root, moments = square.sqrt() / numbers[-1].to(dtype), [mean, square]
        else:
            square = settings["alpha"] * moments[0] + (1 - settings["alpha"]) * gradient * gradient
            mean, root, moments = gradient, square.sqrt(), [square]
        directions = views_like(mean / (root + settings["eps"]), parameters)
        rates = [numbers[group].to(dtype) for group in self._group_of]
        new = [p - rate * direction for p, rate, direction in zip(parameters, rates, directions, strict=True)]
        return [*new, counts + 1, *moments]


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in _NO_SETTINGS}


def _has_kernels(tensor: th.Tensor) -> bool:
    """Whether steps on tensors of its device and type can be compiled or recorded."""
    return tensor.dtype in (th.float32, th.float64) and (tensor.is_cpu or is_recordable(tensor.device))


def _overlap(tensors: Sequence[th.Tensor]) -> bool:
    """Whether any of these contiguous tensors share memory: the optimiser then steps it more than once."""
    places = sorted([(tensor.data_ptr(), tensor.nbytes) for tensor in tensors])
    return any([start + n > following for (start, n), (following, _) in pairwise(places)])


def joined(owners: Sequence[dict[str, Any]], name: str) -> th.Tensor:
    """
    One vector of which the tensors of a name are consecutive views, made so where they are not: their values stay.

    :param owners: hold a tensor each under the name
    :param name: a key
    """
    tensors = [owner[name] for owner in owners]
    base = common_base(tensors)
    if base is None:
        base = th.cat([tensor.flatten() for tensor in tensors])
        for owner, view in zip(owners, views_like(base, tensors), strict=True):
            owner[name] = view
    return base


def common_base(tensors: Sequence[th.Tensor | None]) -> th.Tensor | None:
    """The vector that these tensors are all of, one after the other; None if they are not."""
    base, end = None if tensors[0] is None else tensors[0]._base, 0
    if base is None:
        return None
    for tensor in tensors:
        if tensor is None or tensor._base is not base or tensor.dtype != base.dtype or not tensor.is_contiguous():
            return None
        # By address: torch still names the old base of a tensor whose data was replaced.
        if tensor.data_ptr() != base.data_ptr() + end * base.itemsize:
            return None
        end += tensor.numel()
    return base if base.shape == (end,) else None


def views_like(vector: th.Tensor, tensors: Sequence[th.Tensor]) -> list[th.Tensor]:
    """Consecutive pieces of a vector in the shapes of these tensors."""
    pieces = vector.split([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]
