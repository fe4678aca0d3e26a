"""
Losses as functions of tensors and numbers; each returns a scalar to *minimise*. Then diagnostics without gradient.

All inputs are ``[B]`` (a minibatch of B samples); shapes must agree, nothing is broadcast.

References: PPO is "Proximal Policy Optimization Algorithms" (Schulman et al. 2017, https://arxiv.org/abs/1707.06347).
"""

from collections.abc import Callable

import torch as th
from torch.nn import functional as F

from sb3_pgplus.core.checks import check_same_shape
from sb3_pgplus.core.running_stats import moments_of


def policy_gradient(log_probs: th.Tensor, advantages: th.Tensor) -> th.Tensor:
    """
    ``−E[log π_θ(a|s) Ψ]``, whose gradient is the policy gradient (Sutton et al. 1999, theorem 1; A2C's loss, Mnih et
    al. 2016, section 4).

    :param log_probs: log π_θ(a|s), ``[B]``
    :param advantages: Ψ, ``[B]``
    :return: scalar
    :raises ValueError: on different shapes
    """
    check_same_shape(log_probs=log_probs, advantages=advantages)
    return -(advantages * log_probs).mean()


def surrogate(ratio: th.Tensor, advantages: th.Tensor) -> th.Tensor:
    """
    Policy-gradient surrogate ``−E[ρ Ψ]`` with ``ρ = π_θ/π_old`` (PPO paper, equation 6; TRPO paper, equation 14).
    Its gradient at θ_old is the policy gradient.

    :param ratio: ρ, ``[B]``
    :param advantages: Ψ, ``[B]``
    :return: scalar
    :raises ValueError: on different shapes
    """
    check_same_shape(ratio=ratio, advantages=advantages)
    return -(advantages * ratio).mean()


def clipped_surrogate(ratio: th.Tensor, advantages: th.Tensor, *, clip_range: float) -> th.Tensor:
    """
    PPO's pessimistic surrogate ``−E[min(ρΨ, clip(ρ, 1−ε, 1+ε) Ψ)]`` (PPO paper, equation 7).

    The gradient vanishes where moving further is what the clip forbids: Ψ ≥ 0 and ρ > 1+ε, or Ψ < 0 and ρ < 1−ε.

    :param ratio: ρ = π_θ/π_old, ``[B]``
    :param advantages: Ψ, ``[B]``
    :param clip_range: ε > 0
    :return: scalar
    :raises ValueError: on different shapes
    """
    check_same_shape(ratio=ratio, advantages=advantages)
    clipped = advantages * th.clamp(ratio, 1 - clip_range, 1 + clip_range)
    return -th.min(advantages * ratio, clipped).mean()


def kl_penalty(kl: th.Tensor, *, kl_coef: float) -> th.Tensor:
    """
    ``β E[KL(π_old‖π_θ)]`` (the second term of the PPO paper's equation 8).

    :param kl: KL(π_old‖π_θ) of each state, ``[B]``, in nats
    :param kl_coef: β ≥ 0
    :return: scalar
    """
    return kl_coef * kl.mean()


def kl_penalized_surrogate(ratio: th.Tensor, advantages: th.Tensor, kl: th.Tensor, *, kl_coef: float) -> th.Tensor:
    """
    KL-penalised surrogate ``−E[ρΨ] + β E[KL(π_old‖π_θ)]`` (PPO paper, equation 8).

    :param ratio: ρ = π_θ/π_old, ``[B]``
    :param advantages: Ψ, ``[B]``
    :param kl: KL(π_old‖π_θ) of each state, ``[B]``, in nats
    :param kl_coef: β ≥ 0
    :return: scalar
    :raises ValueError: on different shapes
    """
    check_same_shape(ratio=ratio, kl=kl)
    return surrogate(ratio, advantages) + kl_penalty(kl, kl_coef=kl_coef)


def value_loss(values: th.Tensor, returns: th.Tensor) -> th.Tensor:
    """
    Mean squared error ``E[(y − V)²]`` (without ½, as SB3 counts it).

    :param values: V, ``[B]``
    :param returns: targets y, ``[B]``
    :return: scalar
    :raises ValueError: on different shapes
    """
    check_same_shape(values=values, returns=returns)
    return F.mse_loss(returns, values)


def clipped_value_loss(
    values: th.Tensor,
    old_values: th.Tensor,
    returns: th.Tensor,
    *,
    clip_range_vf: float,
    value_clip: str = "max",
) -> th.Tensor:
    """
    Clipped critic loss. With ``V_clip = V_old + clip(V − V_old, −ε̂, ε̂)``:

    * ``"max"``: ``E[max((y − V)², (y − V_clip)²)]`` (*Implementation Matters*, Engstrom et al. 2020, section 3);
    * ``"clipped_only"``: ``E[(y − V_clip)²]``, what SB3 minimises.

    :param values: V, ``[B]``
    :param old_values: V_old, the critic that collected the rollout, ``[B]``
    :param returns: targets y, ``[B]``
    :param clip_range_vf: ε̂ > 0, in units of the (normalised) return
    :param value_clip: ``"max"`` or ``"clipped_only"``
    :return: scalar
    :raises ValueError: on different shapes or an unknown ``value_clip``
    """
    check_same_shape(values=values, old_values=old_values, returns=returns)
    clipped = old_values + th.clamp(values - old_values, -clip_range_vf, clip_range_vf)
    if value_clip == "clipped_only":
        return F.mse_loss(returns, clipped)
    if value_clip == "max":
        return th.max((returns - values) ** 2, (returns - clipped) ** 2).mean()
    raise ValueError(f"`value_clip` must be 'max' or 'clipped_only', got {value_clip!r}")


def entropy_loss(entropy: th.Tensor) -> th.Tensor:
    """
    ``−E[H(π_θ(·|s))]``: with a positive coefficient it is the entropy bonus (PPO paper, equation 9).

    :param entropy: H of each state, ``[B]``, in nats (``−log π`` of a sample where no closed form exists)
    :return: scalar
    """
    return -entropy.mean()


# --- diagnostics, without gradient ----------------------------------------------------------------------------------

# Estimators of KL(π_old‖π_θ) from samples of π_old, with ρ = π_θ/π_old (http://joschu.net/blog/kl-approx.html):
# k1 is unbiased and may be negative, k2 is biased, k3 is unbiased, never negative and of low variance.
_KL_ESTIMATORS: dict[str, Callable[[th.Tensor], th.Tensor]] = {
    "k1": lambda log_ratio: -log_ratio,
    "k2": lambda log_ratio: 0.5 * log_ratio**2,
    "k3": lambda log_ratio: (th.exp(log_ratio) - 1) - log_ratio,
}


@th.no_grad()
def kl_old_new(log_ratio: th.Tensor, *, estimator: str = "k3") -> th.Tensor:
    """
    Monte Carlo estimate of KL(π_old‖π_θ) in nats, from actions drawn by π_old.

    :param log_ratio: ``log π_θ(a|s) − log π_old(a|s)``, ``[B]``
    :param estimator: ``"k1"`` = E[−log ρ], ``"k2"`` = E[(log ρ)²/2], ``"k3"`` = E[(ρ−1) − log ρ] (SB3's)
    :return: scalar
    :raises ValueError: on an unknown estimator
    """
    if estimator not in _KL_ESTIMATORS:
        raise ValueError(f"`estimator` must be one of {sorted(_KL_ESTIMATORS)}, got {estimator!r}")
    return _KL_ESTIMATORS[estimator](log_ratio).mean()


@th.no_grad()
def clip_fraction(ratio: th.Tensor, *, clip_range: float) -> th.Tensor:
    """
    Share of samples whose ratio lies outside ``[1−ε, 1+ε]``.

    :param ratio: ρ, ``[B]``
    :param clip_range: ε
    :return: scalar in [0, 1]
    """
    return ((ratio - 1).abs() > clip_range).float().mean()


@th.no_grad()
def value_clip_fraction(values: th.Tensor, old_values: th.Tensor, *, clip_range_vf: float) -> th.Tensor:
    """
    Share of samples whose value moved by more than ε̂ since the rollout.

    :param values: V, ``[B]``
    :param old_values: V_old, ``[B]``
    :param clip_range_vf: ε̂
    :return: scalar in [0, 1]
    :raises ValueError: on different shapes
    """
    check_same_shape(values=values, old_values=old_values)
    return ((values - old_values).abs() > clip_range_vf).float().mean()


@th.no_grad()
def explained_variance(values: th.Tensor, returns: th.Tensor) -> th.Tensor:
    """
    ``1 − Var[y − V] / Var[y]``: 1 is a perfect critic, 0 no better than a constant, below 0 worse than that.

    :param values: V, any shape, a tensor or an array
    :param returns: y, same shape
    :return: scalar; NaN where the returns do not vary
    :raises ValueError: on different shapes
    """
    check_same_shape(values=values, returns=returns)
    # Equality of the extremes, since rounding leaves a tiny variance in constant returns.
    if bool(returns.max() == returns.min()):
        return th.tensor(th.nan)
    unexplained, total = (moments_of(x.reshape(-1)).var for x in (returns - values, returns))
    return th.as_tensor(1.0 - unexplained / total)
