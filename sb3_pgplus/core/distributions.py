"""
Closed-form KL(π_old‖π_θ) in nats, per state, from distribution parameters. The old policy always comes first.
"""

import torch as th
from torch.nn import functional as F

from sb3_pgplus.core.checks import check_same_shape


def kl_normal(old_mean: th.Tensor, old_std: th.Tensor, mean: th.Tensor, std: th.Tensor) -> th.Tensor:
    """
    Diagonal Gaussians: ``Σ_i log(σ_i/σ_old,i) + (σ_old,i² + (μ_old,i − μ_i)²) / (2σ_i²) − ½``.

    A squashed Gaussian has the same KL, since tanh is a bijection.

    :param old_mean: μ_old, ``[B, A]``
    :param old_std: σ_old, ``[B, A]``
    :param mean: μ, ``[B, A]``
    :param std: σ, ``[B, A]``
    :return: ``[B]``
    :raises ValueError: on different shapes
    """
    check_same_shape(old_mean=old_mean, old_std=old_std, mean=mean, std=std)
    ratio = (old_std / std) ** 2
    shift = ((old_mean - mean) / std) ** 2
    return 0.5 * (ratio + shift - 1 - ratio.log()).sum(dim=-1)


def kl_categorical(old_logits: th.Tensor, logits: th.Tensor) -> th.Tensor:
    """
    Categorical: ``Σ_k p_old,k (log p_old,k − log p_k)``. Logits need not be normalised.

    :param old_logits: ``[B, K]``
    :param logits: ``[B, K]``
    :return: ``[B]``
    :raises ValueError: on different shapes
    """
    check_same_shape(old_logits=old_logits, logits=logits)
    old_log_probs, log_probs = F.log_softmax(old_logits, dim=-1), F.log_softmax(logits, dim=-1)
    # An action masked by a logit of −∞ has p_old = 0 and adds nothing; 0·∞ would make it NaN.
    return th.where(old_log_probs.isneginf(), 0.0, old_log_probs.exp() * (old_log_probs - log_probs)).sum(dim=-1)


def kl_bernoulli(old_logits: th.Tensor, logits: th.Tensor) -> th.Tensor:
    """
    Independent Bernoullis: ``Σ_i p_old,i (log p_old,i − log p_i) + (1 − p_old,i)(log(1−p_old,i) − log(1−p_i))``.

    :param old_logits: ``[B, A]``
    :param logits: ``[B, A]``
    :return: ``[B]``
    :raises ValueError: on different shapes
    """
    check_same_shape(old_logits=old_logits, logits=logits)
    old_probs = th.sigmoid(old_logits)
    ones = F.logsigmoid(old_logits) - F.logsigmoid(logits)
    zeros = F.logsigmoid(-old_logits) - F.logsigmoid(-logits)
    return (old_probs * ones + (1 - old_probs) * zeros).sum(dim=-1)


# --- Fisher matrices of a distribution in its own parameters, as products --------------------------------------------


def fisher_normal(std: th.Tensor, d_mean: th.Tensor, d_std: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """
    Diagonal Gaussians in (μ, σ): ``M = diag(1/σ², 2/σ²)``.

    :param std: σ, ``[B, A]``
    :param d_mean: change of μ, ``[B, A]``
    :param d_std: change of σ, ``[B, A]``
    :return: M times the change, ``[B, A]`` each
    :raises ValueError: on different shapes
    """
    check_same_shape(std=std, d_mean=d_mean, d_std=d_std)
    return d_mean / std**2, 2 * d_std / std**2


def fisher_categorical(logits: th.Tensor, d_logits: th.Tensor) -> th.Tensor:
    """
    Categorical in its logits: ``M = diag(p) − p pᵀ``.

    :param logits: ``[B, K]``, need not be normalised
    :param d_logits: their change, ``[B, K]``
    :return: M times the change, ``[B, K]``
    :raises ValueError: on different shapes
    """
    check_same_shape(logits=logits, d_logits=d_logits)
    weighted = F.softmax(logits, dim=-1) * d_logits
    return weighted - F.softmax(logits, dim=-1) * weighted.sum(dim=-1, keepdim=True)


def fisher_bernoulli(logits: th.Tensor, d_logits: th.Tensor) -> th.Tensor:
    """
    Independent Bernoullis in their logits: ``M = diag(p (1 − p))``.

    :param logits: ``[B, A]``
    :param d_logits: their change, ``[B, A]``
    :return: M times the change, ``[B, A]``
    :raises ValueError: on different shapes
    """
    check_same_shape(logits=logits, d_logits=d_logits)
    return th.sigmoid(logits) * th.sigmoid(-logits) * d_logits
