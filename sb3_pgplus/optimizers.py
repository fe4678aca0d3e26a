"""Steps of torch's optimisers with less overhead: for small networks it is most of an update's time."""

from typing import Any

import torch as th
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

_ADAM_STATE = ("exp_avg", "exp_avg_sq", "step")


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
    ``optimizer.step()``; a fused Adam that nobody watches goes to its kernel without torch's profiling and checks.

    :param optimizer: any, gradients in place
    """
    if not _is_lean(optimizer):
        optimizer.step()
        return
    for group in optimizer.param_groups:
        parameters = _with_gradient(group)
        if parameters:
            _adam_step(optimizer, group, parameters)


def _is_lean(optimizer: th.optim.Optimizer) -> bool:
    """Whether it is a fused Adam with state for all gradients, no hook and no scheduler that wraps its ``step``."""
    if type(optimizer) is not th.optim.Adam or "step" in optimizer.__dict__:
        return False
    own = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    if any((*own, _global_optimizer_pre_hooks, _global_optimizer_post_hooks)):
        return False
    plain = all(group["fused"] and not group["amsgrad"] for group in optimizer.param_groups)
    return plain and all(p in optimizer.state for group in optimizer.param_groups for p in _with_gradient(group))


def _with_gradient(group: dict[str, Any]) -> list[th.Tensor]:
    return [p for p in group["params"] if p.grad is not None]


@th.no_grad()
def _adam_step(optimizer: th.optim.Optimizer, group: dict[str, Any], parameters: list[th.Tensor]) -> None:
    states = [optimizer.state[p] for p in parameters]
    exp_avgs, exp_avg_sqs, steps = ([state[name] for state in states] for name in _ADAM_STATE)
    counter = _shared_counter(states, steps)
    counter += 1
    beta1, beta2 = group["betas"]
    kernel = th._fused_adamw_ if group["decoupled_weight_decay"] else th._fused_adam_
    kernel(
        parameters,
        [p.grad for p in parameters],  # type: ignore[misc]  # those without were left out
        exp_avgs,
        exp_avg_sqs,
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


def _shared_counter(states: list[dict[str, Any]], steps: list[th.Tensor]) -> th.Tensor:
    """
    The parameters' step counters as views of one tensor, which is counted up in one operation.

    They stay tensors of their own to torch, as its optimiser and its state dict have them.
    """
    base = steps[0]._base
    if base is None or len(base) != len(steps) or any(step._base is not base for step in steps):
        base = th.stack(steps)
        for state, view in zip(states, base.unbind(), strict=True):
            state["step"] = view
    return base
