"""
Sampling with the noise drawn outside: a compiled policy then takes its actions from the same random stream as SB3's.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from torch.distributions import Bernoulli, Normal

Draw = Callable[[], th.Tensor]


def noise_of(action_space: spaces.Space[Any], n_envs: int, device: th.device, dtype: th.dtype) -> list[Draw]:
    """
    What draws the noise of one step, in the order in which torch's distributions draw it.

    :param action_space: of the policy
    :param n_envs: N
    :param device: of the policy
    :param dtype: of the policy
    :return: one function for each independent distribution
    :raises TypeError: on a space that SB3's policies do not know
    """
    if isinstance(action_space, spaces.Box):
        return [_reused(n_envs, int(np.prod(action_space.shape)), device, dtype).normal_]
    if isinstance(action_space, spaces.MultiBinary):
        return [_reused(n_envs, int(np.prod(action_space.shape)), device, dtype).uniform_]
    if isinstance(action_space, spaces.Discrete):
        return [_reused(n_envs, int(action_space.n), device, dtype).exponential_]
    if isinstance(action_space, spaces.MultiDiscrete):
        return [_reused(n_envs, int(n), device, dtype).exponential_ for n in action_space.nvec]
    raise TypeError(f"no noise is known for {action_space}")


def _reused(n_envs: int, size: int, device: th.device, dtype: th.dtype) -> th.Tensor:
    return th.empty((n_envs, size), device=device, dtype=dtype)  # every step draws into the same memory


def sample(distribution: Distribution, noise: list[th.Tensor]) -> th.Tensor:
    """
    Actions as torch would draw them: ``μ + σ ε`` (Gaussian), ``u < p`` (Bernoulli), ``argmax_k p_k/e_k`` with
    exponential e (categorical).

    :param distribution: SB3's, of N states
    :param noise: from :func:`noise_of`
    :return: actions ``[N, …]``, as the distribution's own ``sample``
    """
    inner: Any = distribution.distribution
    if isinstance(inner, Normal):
        action: th.Tensor = inner.loc + noise[0] * inner.scale
        return action
    if isinstance(inner, Bernoulli):
        return (noise[0] < inner.probs).to(inner.probs.dtype)
    if isinstance(inner, list):
        picked = [(part.probs / e).argmax(dim=-1) for part, e in zip(inner, noise, strict=True)]
        return th.stack(picked, dim=1)
    best: th.Tensor = (inner.probs / noise[0]).argmax(dim=-1)
    return best
