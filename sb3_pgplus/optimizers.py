"""Steps of torch's optimisers with less overhead: for small networks it is most of an update's time."""

from collections.abc import Callable
from typing import Any

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
    if not _is_lean(optimizer):
        optimizer.step()
        return
    for group in optimizer.param_groups:
        parameters = _with_gradient(group)
        if parameters:
            _KERNELS[type(optimizer)](optimizer, group, parameters)


def _is_lean(optimizer: th.optim.Optimizer) -> bool:
    """Whether we have its kernels and state for all gradients, no hook and no scheduler that wraps its ``step``."""
    if type(optimizer) not in _KERNELS or "step" in optimizer.__dict__:
        return False
    own = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    if any((*own, _global_optimizer_pre_hooks, _global_optimizer_post_hooks)):
        return False
    plain = all(_is_plain(type(optimizer), group) for group in optimizer.param_groups)
    return plain and all(p in optimizer.state for group in optimizer.param_groups for p in _with_gradient(group))


def _is_plain(kind: type[th.optim.Optimizer], group: dict[str, Any]) -> bool:
    if kind is th.optim.Adam:
        return bool(group["fused"]) and not group["amsgrad"]
    unusual = ("momentum", "centered", "weight_decay", "maximize", "capturable", "differentiable")
    return group["foreach"] is None and not any(group[name] for name in unusual)


def _with_gradient(group: dict[str, Any]) -> list[th.Tensor]:
    return [p for p in group["params"] if p.grad is not None]


@th.no_grad()
def _adam_step(optimizer: th.optim.Optimizer, group: dict[str, Any], parameters: list[th.Tensor]) -> None:
    states = [optimizer.state[p] for p in parameters]
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
def _rmsprop_step(optimizer: th.optim.Optimizer, group: dict[str, Any], parameters: list[th.Tensor]) -> None:
    """``v ← αv + (1−α)g²,  θ ← θ − lr g/(√v + ε)``: torch's operations in torch's order, for all parameters at once."""
    states = [optimizer.state[p] for p in parameters]
    _count_up(states)
    gradients: Any = [p.grad for p in parameters]
    averages = [state["square_avg"] for state in states]
    th._foreach_mul_(averages, group["alpha"])
    th._foreach_addcmul_(averages, gradients, gradients, 1 - group["alpha"])
    roots = th._foreach_sqrt(averages)
    th._foreach_add_(roots, group["eps"])
    th._foreach_addcdiv_(parameters, gradients, roots, -group["lr"])


_KERNELS: dict[type[th.optim.Optimizer], Callable[[th.optim.Optimizer, dict[str, Any], list[th.Tensor]], None]] = {
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
