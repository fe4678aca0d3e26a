"""Steps of torch's optimisers with less overhead: for small networks it is most of an update's time."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch as th
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


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
        plain = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in group["params"])
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


def drop_gradients(optimizer: th.optim.Optimizer) -> None:
    """Set all gradients to None, which makes optimisers leave parameters alone; a lean ``zero_grad``."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def step(optimizer: th.optim.Optimizer) -> None:
    """
    ``optimizer.step()``; a fused Adam or a plain RMSprop that nobody watches goes to its kernels without torch's
    profiling and checks.

    :param optimizer: any, gradients in place
    """
    work = _lean_work(optimizer)
    if work is None:
        optimizer.step()
        return
    for group, parameters, states in work:
        _KERNELS[type(optimizer)](group, parameters, states)


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

    They stay tensors of their own to torch, as its optimisers and its state dicts have them.
    """
    base = states[0]["step"]._base
    if base is None or len(base) != len(states) or any(state["step"]._base is not base for state in states):
        base = th.stack([state["step"] for state in states])
        for state, view in zip(states, base.unbind(), strict=True):
            state["step"] = view
    base += 1


# --- a step as a function of tensors ----------------------------------------------------------------------------------

#: What torch's RMSprop keeps of each parameter.
_RMSPROP_STATE = ("step", "square_avg")
#: Entries of a parameter group that are no settings of the step's formula.
_NO_SETTINGS = ("params", "lr", "initial_lr")


@dataclass(frozen=True)
class StepRule:
    """
    A plain RMSprop's step on some parameters as a function of tensors, which a trace can contain.

    Adam has none: torch steps it with one kernel of its own, which a compiler does not beat.

    :param key: what the function depends on besides tensors: settings, which parameter has which
    """

    key: Hashable
    _optimizer: th.optim.Optimizer
    _parameters: Sequence[th.Tensor]
    #: Index of each parameter's group.
    _group_of: tuple[int, ...]

    @classmethod
    def of(cls, optimizer: th.optim.Optimizer, parameters: Sequence[th.Tensor]) -> Self | None:
        """
        The rule of an optimiser. States that torch makes at a parameter's first step are made now.

        :param optimizer: any
        :param parameters: those that are stepped
        :return: None if the optimiser has to make its steps itself
        """
        groups, kind = optimizer.param_groups, type(optimizer)
        if kind is not th.optim.RMSprop or _is_watched(optimizer):
            return None
        if not all(_is_plain(kind, group) and isinstance(group["lr"], float) for group in groups):
            return None
        index = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        if not all(id(p) in index and p.device.type == "cpu" for p in parameters):  # where torch's step counters are
            return None
        for parameter in parameters:
            if not optimizer.state.get(parameter):
                counter = th.zeros((), dtype=th.float64 if th.get_default_dtype() is th.float64 else th.float32)
                optimizer.state[parameter] = {"step": counter, "square_avg": th.zeros_like(parameter.detach())}
        group_of = tuple([index[id(p)] for p in parameters])
        settings = repr([(k, v) for group in groups for k, v in group.items() if k not in _NO_SETTINGS])
        return cls((group_of, settings), optimizer, parameters, group_of)

    def states(self) -> list[th.Tensor]:
        """The optimiser's own tensors, parameter after parameter, as they are now: a step may put others in place."""
        states = self._optimizer.state
        return [states[parameter][name] for parameter in self._parameters for name in _RMSPROP_STATE]

    def rates(self) -> list[float]:
        """The learning rate of each group as it is now."""
        return [group["lr"] for group in self._optimizer.param_groups]

    def stepped(
        self, parameters: Sequence[th.Tensor], gradients: Sequence[th.Tensor], states: Sequence[th.Tensor], rates: Any
    ) -> list[th.Tensor]:
        """
        New parameters, then new states; nothing is changed in place.

        ``v ← αv + (1−α)g²,  θ ← θ − lr g/(√v + ε)`` (Tieleman & Hinton 2012)

        :param parameters: in the rule's order, as are the rest
        :param gradients: clipped
        :param states: like :meth:`states`
        :param rates: of each group, scalar tensors
        """
        new_parameters, new_states = [], []
        counters, averages = states[0::2], states[1::2]
        for index, p, g, n, v in zip(self._group_of, parameters, gradients, counters, averages, strict=True):
            group, rate = self._optimizer.param_groups[index], rates[index].to(p.dtype)
            average = group["alpha"] * v + (1 - group["alpha"]) * g * g
            new_parameters.append(p - rate * g / (average.sqrt() + group["eps"]))
            new_states += [n + 1, average]
        return new_parameters + new_states
