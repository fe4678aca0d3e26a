"""What watches for NaN and infinity, at the two places where they enter: the environment and the update."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch as th
from torch import nn
from torch.distributions import Distribution

from sb3_pgplus.errors import NonFiniteEnvironmentError, NonFinitePolicyError


def check_finite_step(
    observations: Any,
    rewards: np.ndarray[Any, Any] | None,
    step: int,
    first_env: int = 0,
    policy: nn.Module | None = None,
) -> None:
    """
    Refuse NaN and infinity from an environment.

    :param observations: ``[N, ...]``, or a dict of such
    :param rewards: ``[N]``, or None
    :param step: steps each environment has taken, for the message
    :param first_env: index of the environment that row 0 belongs to
    :param policy: whose actions led there: NaN from a broken policy comes back from the environment
    :raises NonFiniteEnvironmentError: naming the environment's index and the step
    :raises NonFinitePolicyError: if the policy's parameters are not finite themselves
    """
    if _is_finite(observations) and _is_finite(rewards):
        return  # nearly always: what follows is for all other kinds, and for the message
    try:
        _check_step(observations, rewards, step, first_env)
    except NonFiniteEnvironmentError as error:
        if policy is not None and _broken_parameter(policy):
            raise broken_policy(policy) from error
        raise


def _is_finite(array: Any) -> bool:
    """Whether it is an array of floats without NaN and infinity."""
    return isinstance(array, np.ndarray) and array.dtype.kind == "f" and bool(np.isfinite(array).all())


def _check_step(observations: Any, rewards: np.ndarray[Any, Any] | None, step: int, first_env: int) -> None:
    if rewards is not None:
        _check_array("reward", rewards, step, first_env)
    if isinstance(observations, dict):
        for key, array in observations.items():
            _check_array(f"observation {key!r}", array, step, first_env)
    else:
        _check_array("observation", observations, step, first_env)


def _check_array(what: str, array: Any, step: int, first_env: int) -> None:
    array = np.asarray(array)
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return
    bad = np.argwhere(~np.isfinite(array))
    first = tuple(int(i) for i in bad[0])
    env = f"environment {first_env + first[0]}" if array.ndim else "the environment"
    entry = f" at index {list(first[1:])}" if len(first) > 1 else ""
    raise NonFiniteEnvironmentError(
        f"{env} returned the {what} {array[first]}{entry} at its step {step} of this training "
        f"({len(bad)} such value(s) in that step). Look for a division by zero, a diverging simulation or an "
        "unbounded reward; stable_baselines3.common.vec_env.VecCheckNan finds the action that led there."
    )


def check_finite_policy(log_probs: Any, policy: nn.Module) -> None:
    """
    Refuse to learn from a broken policy: NaN in its outputs is NaN in the log-probabilities of its actions.

    :param log_probs: of the rollout's actions, a tensor or an array
    :param policy: whose they are, to name the cause
    :raises NonFinitePolicyError: naming the first parameter that is not finite
    """
    # A sum is finite where all of it is, nearly always, and one operation instead of five.
    if not math.isfinite(float(log_probs.sum())) and not bool(th.as_tensor(log_probs).isfinite().all()):
        raise broken_policy(policy)


def broken_policy(policy: nn.Module) -> NonFinitePolicyError:
    """
    The error for a policy whose outputs are not finite.

    :param policy: to name the cause
    """
    broken = _broken_parameter(policy)
    cause = f"its parameters are not finite ({broken}): they were set or loaded so" if broken else "they overflow"
    return NonFinitePolicyError(f"the policy's outputs are NaN or infinite in the rollout: {cause}.")


def _broken_parameter(policy: nn.Module) -> str | None:
    return next((name for name, p in policy.named_parameters() if not bool(p.detach().isfinite().all())), None)


def likely_cause(advantages: th.Tensor, returns: th.Tensor, loss: th.Tensor, policy: nn.Module) -> str:
    """
    Name what most likely made a loss or gradient non-finite.

    :param advantages: the minibatch's advantages
    :param returns: its critic targets
    :param loss: the loss
    :param policy: the policy, whose parameters may be non-finite themselves
    :return: a sentence
    """
    broken = _broken_parameter(policy)
    if broken:
        return f"the policy's parameters are not finite themselves ({broken}): they were set or loaded so"
    if not bool(advantages.isfinite().all()) or not bool(returns.isfinite().all()):
        return "the advantages or returns are not finite: rewards or the critic's values are far too large"
    if not bool(loss.detach().isfinite().all()):
        return "the loss overflows on finite data: the learning rate is too high, or a loss of your own divides by zero"
    return "the loss is finite but its gradient is not: a square root, logarithm or norm at zero in a policy or loss"


class _DistributionChecks:
    """The switch is the whole process's, so what trainings in several threads found there is one thing, too."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.before = True

    def off(self) -> None:
        with self.lock:
            if not self.users:
                self.before = Distribution._validate_args
                Distribution.set_default_validate_args(False)
            self.users += 1

    def back(self) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                Distribution.set_default_validate_args(self.before)


_checks = _DistributionChecks()


@contextmanager
def without_distribution_checks() -> Iterator[None]:
    """
    Switch torch's argument checks of distributions off for a while.

    They would raise an unspecific error where the guard on the gradient can name the cause, and they cost time.
    """
    _checks.off()
    try:
        yield
    finally:
        _checks.back()
