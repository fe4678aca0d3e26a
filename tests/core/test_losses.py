"""Losses and diagnostics: hand-derived values and gradients, identities, SB3's expressions as oracles."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from stable_baselines3.common.utils import explained_variance as sb3_explained_variance
from torch import Tensor
from torch.nn import functional as F

from sb3_pgplus.core.losses import (
    clip_fraction,
    clipped_surrogate,
    clipped_value_loss,
    entropy_loss,
    explained_variance,
    kl_old_new,
    kl_penalized_surrogate,
    surrogate,
    value_clip_fraction,
    value_loss,
)

F64 = torch.float64
SEEDS = (0, 1, 2)


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=F64)


def normal(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> tuple[float, Tensor]:
    """The loss and its gradient with respect to its one argument."""
    point = at.clone().requires_grad_()
    value = loss(point)
    assert value.shape == ()
    (slope,) = torch.autograd.grad(value, point)
    return float(value.detach()), slope


# ---------------------------------------------------------------------------------------------------------------------
# Actor


def test_surrogate_equals_the_hand_derived_numbers() -> None:
    # -(1 * 2 + 0.5 * (-4) + 2 * 3) / 3 = -6/3 = -2; the slope in each ratio is -A/3
    value, slope = gradient(lambda ratio: surrogate(ratio, vector(2, -4, 3)), vector(1.0, 0.5, 2.0))
    assert value == -2.0
    torch.testing.assert_close(slope, vector(-2, 4, -3) / 3)


RATIO_CASES = {
    # clip range 0.2. Objective min(ratio A, clip(ratio, 0.8, 1.2) A); the loss is its negative.
    # A >= 0 above the range: min(3, 2.4) = 2.4 is the clipped term, so no gradient
    "positive_above": (1.5, 2.0, -2.4, 0.0),
    # A >= 0 below the range: min(1, 1.6) = 1 is the unclipped term, gradient -A unchanged
    "positive_below": (0.5, 2.0, -1.0, -2.0),
    # A < 0 above the range: min(-3, -2.4) = -3 is the unclipped term, gradient -A unchanged
    "negative_above": (1.5, -2.0, 3.0, 2.0),
    # A < 0 below the range: min(-1, -1.6) = -1.6 is the clipped term, so no gradient
    "negative_below": (0.5, -2.0, 1.6, 0.0),
    # inside the range both terms are ratio A
    "positive_inside": (1.1, 2.0, -2.2, -2.0),
    "negative_inside": (0.9, -2.0, 1.8, 2.0),
}


@pytest.mark.parametrize("case", RATIO_CASES)
def test_clipped_surrogate_by_sign_and_side(case: str) -> None:
    ratio, advantage, expected_loss, expected_slope = RATIO_CASES[case]
    value, slope = gradient(lambda r: clipped_surrogate(r, vector(advantage), clip_range=0.2), vector(ratio))
    assert value == pytest.approx(expected_loss, abs=1e-12)
    assert float(slope) == expected_slope


def test_clipped_surrogate_averages_the_cases_over_the_batch() -> None:
    ratios, advantages, losses, slopes = (vector(*numbers) for numbers in zip(*RATIO_CASES.values(), strict=True))
    value, slope = gradient(lambda r: clipped_surrogate(r, advantages, clip_range=0.2), ratios)
    assert value == pytest.approx(float(losses.mean()), abs=1e-12)
    torch.testing.assert_close(slope, slopes / len(RATIO_CASES))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("clip_range", [0.05, 0.2, 0.5])
def test_clipped_surrogate_never_promises_more_than_the_surrogate(clip_range: float, seed: int) -> None:
    """min(...) is a lower bound of the objective, so the loss is an upper bound."""
    ratio, advantages = normal(seed, 200).mul(0.5).exp(), normal(seed + 10, 200)
    assert clipped_surrogate(ratio, advantages, clip_range=clip_range) >= surrogate(ratio, advantages)


@pytest.mark.parametrize("seed", SEEDS)
def test_clipped_surrogate_is_the_surrogate_while_no_ratio_leaves_the_range(seed: int) -> None:
    ratio = 1.0 + 0.19 * normal(seed, 50).tanh()
    advantages = normal(seed + 10, 50)
    clipped = gradient(lambda r: clipped_surrogate(r, advantages, clip_range=0.2), ratio)
    plain = gradient(lambda r: surrogate(r, advantages), ratio)
    assert clipped[0] == pytest.approx(plain[0], abs=1e-14)
    torch.testing.assert_close(clipped[1], plain[1], rtol=0, atol=1e-14)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("clip_range", [0.01, 0.2])
def test_at_ratio_one_the_gradient_is_that_of_the_policy_gradient(clip_range: float, seed: int) -> None:
    """grad of -mean(ratio A) at theta_old is -mean(A grad log pi), in the parameters of a softmax policy."""
    states, actions, advantages = normal(seed, 40, 3), torch.arange(40) % 4, normal(seed + 20, 40)
    weights = normal(seed + 30, 3, 4).requires_grad_()
    log_prob = (states @ weights).log_softmax(-1)[torch.arange(40), actions]
    ratio = (log_prob - log_prob.detach()).exp()
    assert torch.equal(ratio, torch.ones(40, dtype=F64))
    policy_gradient = torch.autograd.grad(-(log_prob * advantages).mean(), weights, retain_graph=True)[0]
    kl = normal(seed + 40, 40).abs()
    for loss in (
        surrogate(ratio, advantages),
        clipped_surrogate(ratio, advantages, clip_range=clip_range),
        kl_penalized_surrogate(ratio, advantages, kl, kl_coef=3.0),
    ):
        (actual,) = torch.autograd.grad(loss, weights, retain_graph=True)
        torch.testing.assert_close(actual, policy_gradient, rtol=0, atol=1e-14)


@pytest.mark.parametrize("seed", SEEDS)
def test_clipped_surrogate_is_bit_equal_to_the_expression_in_sb3(seed: int) -> None:
    ratio = normal(seed, 64, dtype=torch.float32).mul(0.3).exp()
    advantages = normal(seed + 10, 64, dtype=torch.float32)

    def sb3(r: Tensor) -> Tensor:
        return -torch.min(advantages * r, advantages * torch.clamp(r, 1 - 0.2, 1 + 0.2)).mean()

    actual = gradient(lambda r: clipped_surrogate(r, advantages, clip_range=0.2), ratio)
    expected = gradient(sb3, ratio)
    assert actual[0] == expected[0]
    assert torch.equal(actual[1], expected[1])


def test_kl_penalized_surrogate_equals_the_hand_derived_numbers() -> None:
    # -(1 * 2 + 2 * (-3)) / 2 + 0.5 * (1 + 3) / 2 = 2 + 1 = 3
    actual = kl_penalized_surrogate(vector(1, 2), vector(2, -3), vector(1, 3), kl_coef=0.5)
    assert float(actual) == 3.0


def test_kl_penalized_surrogate_without_a_coefficient_is_the_surrogate() -> None:
    ratio, advantages, kl = normal(0, 20).exp(), normal(1, 20), normal(2, 20).abs()
    actual = kl_penalized_surrogate(ratio, advantages, kl, kl_coef=0.0)
    torch.testing.assert_close(actual, surrogate(ratio, advantages))


def test_kl_penalty_has_the_coefficient_over_the_batch_as_gradient() -> None:
    _, slope = gradient(lambda kl: kl_penalized_surrogate(normal(0, 8), normal(1, 8), kl, kl_coef=2.0), normal(2, 8))
    torch.testing.assert_close(slope, torch.full((8,), 2.0 / 8.0, dtype=F64))


def test_entropy_loss_is_the_negative_mean_entropy() -> None:
    value, slope = gradient(entropy_loss, vector(1.0, 2.0, 6.0))  # -(1 + 2 + 6) / 3
    assert value == -3.0
    torch.testing.assert_close(slope, torch.full((3,), -1.0 / 3.0, dtype=F64))


# ---------------------------------------------------------------------------------------------------------------------
# Critic


def test_value_loss_equals_the_hand_derived_numbers() -> None:
    # ((1 - 3)^2 + (2 - 1)^2) / 2 = 2.5, no factor 1/2; the slope is 2 (V - y) / 2
    value, slope = gradient(lambda values: value_loss(values, vector(3, 1)), vector(1, 2))
    assert value == 2.5
    torch.testing.assert_close(slope, vector(-2, 1))


# V_old = 0, clip range 1.  Columns: V, y, loss "max", slope "max", loss "clipped_only", slope "clipped_only"
VALUE_CASES = {
    # inside the range both terms are (2 - 0.5)^2 = 2.25, slope 2 (V - y) = -3
    "inside": (0.5, 2.0, 2.25, -3.0, 2.25, -3.0),
    # above the range and still below the target: (3 - 2)^2 = 1 against (3 - 1)^2 = 4, which V does not move
    "above_and_towards": (2.0, 3.0, 4.0, 0.0, 4.0, 0.0),
    # above the range and past the target: (0 - 2)^2 = 4 pulls back, slope 2 * 2; the clipped term (0 - 1)^2 = 1 cannot
    "above_and_past": (2.0, 0.0, 4.0, 4.0, 1.0, 0.0),
    # the mirror images below the range
    "below_and_towards": (-2.0, -3.0, 4.0, 0.0, 4.0, 0.0),
    "below_and_past": (-2.0, 0.0, 4.0, -4.0, 1.0, 0.0),
}


@pytest.mark.parametrize("case", VALUE_CASES)
@pytest.mark.parametrize("old_value", [0.0, 5.0])
def test_clipped_value_loss_by_side(old_value: float, case: str) -> None:
    """Value and gradient in every case; adding one number to V, V_old and y changes neither."""
    value, target, loss_max, slope_max, loss_only, slope_only = VALUE_CASES[case]
    old, returns = vector(old_value), vector(target + old_value)
    for value_clip, loss, slope in (("max", loss_max, slope_max), ("clipped_only", loss_only, slope_only)):
        actual = gradient(
            lambda v, value_clip=value_clip: clipped_value_loss(
                v, old, returns, clip_range_vf=1.0, value_clip=value_clip
            ),
            vector(value + old_value),
        )
        assert actual[0] == loss
        assert float(actual[1]) == slope


def test_value_clip_defaults_to_max_and_averages_over_the_batch() -> None:
    values, returns, losses, slopes, _, _ = (vector(*column) for column in zip(*VALUE_CASES.values(), strict=True))
    old = torch.zeros_like(values)
    value, slope = gradient(lambda v: clipped_value_loss(v, old, returns, clip_range_vf=1.0), values)
    assert value == pytest.approx(float(losses.mean()))
    torch.testing.assert_close(slope, slopes / len(VALUE_CASES))


@pytest.mark.parametrize("seed", SEEDS)
def test_max_is_an_upper_bound_of_both_of_its_terms(seed: int) -> None:
    values, old, returns = normal(seed, 100), normal(seed + 10, 100), normal(seed + 20, 100)
    both = clipped_value_loss(values, old, returns, clip_range_vf=0.2, value_clip="max")
    assert both >= value_loss(values, returns)
    assert both >= clipped_value_loss(values, old, returns, clip_range_vf=0.2, value_clip="clipped_only")


@pytest.mark.parametrize("value_clip", ["max", "clipped_only"])
def test_clipped_value_loss_is_the_value_loss_while_no_value_leaves_the_range(value_clip: str) -> None:
    old, returns = normal(0, 50), normal(1, 50)
    values = old + 0.19 * normal(2, 50).tanh()
    clipped = gradient(lambda v: clipped_value_loss(v, old, returns, clip_range_vf=0.2, value_clip=value_clip), values)
    plain = gradient(lambda v: value_loss(v, returns), values)
    assert clipped[0] == pytest.approx(plain[0], abs=1e-12)
    torch.testing.assert_close(clipped[1], plain[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_critic_losses_are_bit_equal_to_the_expressions_in_sb3(seed: int) -> None:
    values, old, returns = (normal(seed + 10 * i, 64, dtype=torch.float32) for i in range(3))
    plain = gradient(lambda v: value_loss(v, returns), values)
    sb3_plain = gradient(lambda v: F.mse_loss(returns, v), values)
    clipped = gradient(
        lambda v: clipped_value_loss(v, old, returns, clip_range_vf=0.2, value_clip="clipped_only"), values
    )
    sb3_clipped = gradient(lambda v: F.mse_loss(returns, old + torch.clamp(v - old, -0.2, 0.2)), values)
    for actual, expected in ((plain, sb3_plain), (clipped, sb3_clipped)):
        assert actual[0] == expected[0]
        assert torch.equal(actual[1], expected[1])


# ---------------------------------------------------------------------------------------------------------------------
# Diagnostics

# pi_old = (4, 2, 1, 1) / 8: eight equally likely samples enumerate it, so a mean over them is an exact expectation.
ENUMERATED_ACTIONS = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])
OLD_LOG_PROBS = vector(4 / 8, 2 / 8, 1 / 8, 1 / 8).log()


def enumerated(step: float, seed: int = 0) -> tuple[Tensor, float]:
    """log(pi_new / pi_old) of the eight samples, and the exact KL(old || new) = sum pi_old log(pi_old / pi_new)."""
    new_log_probs = (OLD_LOG_PROBS + step * normal(seed, 4)).log_softmax(-1)
    exact = float((OLD_LOG_PROBS.exp() * (OLD_LOG_PROBS - new_log_probs)).sum())
    return (new_log_probs - OLD_LOG_PROBS)[ENUMERATED_ACTIONS], exact


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("step", [0.01, 0.5, 2.0])
def test_k1_and_k3_are_unbiased_for_the_exact_kl(step: float, estimator: str, seed: int) -> None:
    log_ratio, exact = enumerated(step, seed)
    assert float(kl_old_new(log_ratio, estimator=estimator)) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_k2_agrees_with_the_exact_kl_to_third_order(seed: int) -> None:
    """E k2 - KL = O(step^3): halving the step divides the difference by about 8."""
    errors = []
    for step in (0.02, 0.01):
        log_ratio, exact = enumerated(step, seed)
        errors.append(abs(float(kl_old_new(log_ratio, estimator="k2")) - exact))
    assert errors[0] / errors[1] == pytest.approx(8.0, rel=0.15)
    assert errors[1] < 0.02 * enumerated(0.01, seed)[1]


def test_kl_estimators_equal_the_hand_derived_numbers() -> None:
    # log ratio log 2, one sample: k1 = -log 2, k2 = (log 2)^2 / 2, k3 = (2 - 1) - log 2
    log_ratio = vector(2.0).log()
    assert float(kl_old_new(log_ratio, estimator="k1")) == pytest.approx(-math.log(2))
    assert float(kl_old_new(log_ratio, estimator="k2")) == pytest.approx(math.log(2) ** 2 / 2)
    assert float(kl_old_new(log_ratio, estimator="k3")) == pytest.approx(1 - math.log(2))


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k2_and_k3_are_positive_sample_by_sample(estimator: str) -> None:
    for log_ratio in torch.linspace(-3.0, 3.0, 25, dtype=F64):
        assert float(kl_old_new(log_ratio.reshape(1), estimator=estimator)) >= 0.0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators_are_zero_for_the_same_policy(estimator: str) -> None:
    assert float(kl_old_new(torch.zeros(5), estimator=estimator)) == 0.0


@pytest.mark.parametrize("seed", SEEDS)
def test_kl_defaults_to_k3_and_is_bit_equal_to_the_expression_in_sb3(seed: int) -> None:
    """The early stop compares this number with `target_kl`, so parity needs its every bit."""
    log_ratio = 0.1 * normal(seed, 64, dtype=torch.float32)
    expected = torch.mean((torch.exp(log_ratio) - 1) - log_ratio)
    assert float(kl_old_new(log_ratio)) == float(expected)
    assert float(kl_old_new(log_ratio, estimator="k3")) == float(expected)


def test_clip_fraction_counts_the_ratios_outside_on_both_sides() -> None:
    # 0.7 and 1.3 and 2 of six are further than 0.2 from 1
    actual = clip_fraction(vector(0.7, 0.9, 1.0, 1.1, 1.3, 2.0), clip_range=0.2)
    assert float(actual) == 3 / 6


@pytest.mark.parametrize("seed", SEEDS)
def test_clip_fraction_equals_the_expression_in_sb3(seed: int) -> None:
    ratio = normal(seed, 100, dtype=torch.float32).mul(0.3).exp()
    expected = torch.mean((torch.abs(ratio - 1) > 0.2).float())
    assert float(clip_fraction(ratio, clip_range=0.2)) == pytest.approx(float(expected), abs=1e-7)


def test_value_clip_fraction_counts_the_values_that_left_the_range() -> None:
    # moves -2, 0.5, 0, 1.5: two of four are larger than 1
    values, old = vector(-1.0, 2.5, 3.0, 5.5), vector(1.0, 2.0, 3.0, 4.0)
    assert float(value_clip_fraction(values, old, clip_range_vf=1.0)) == 2 / 4


@pytest.mark.parametrize("seed", SEEDS)
def test_explained_variance_equals_that_of_sb3(seed: int) -> None:
    values, returns = normal(seed, 100), normal(seed + 10, 100)
    expected = sb3_explained_variance(values.numpy(), returns.numpy())
    assert float(explained_variance(values, returns)) == pytest.approx(expected, rel=1e-9)


def test_explained_variance_of_a_perfect_a_constant_and_an_inverted_critic() -> None:
    returns = vector(1, 2, 3, 6)
    assert float(explained_variance(returns, returns)) == 1.0
    assert float(explained_variance(torch.full_like(returns, 7.0), returns)) == 0.0
    # y - V = 2 y has four times the variance of y: 1 - 4
    assert float(explained_variance(-returns, returns)) == pytest.approx(-3.0)
    # an error that is the same everywhere has no variance
    assert float(explained_variance(returns + 10.0, returns)) == pytest.approx(1.0)


def test_explained_variance_is_nan_where_the_returns_do_not_vary() -> None:
    assert math.isnan(float(explained_variance(vector(1, 2, 3), vector(5, 5, 5))))
    assert math.isnan(sb3_explained_variance(np.arange(3.0), np.full(3, 5.0)))


DIAGNOSTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "kl_k1": lambda x: kl_old_new(x, estimator="k1"),
    "kl_k2": lambda x: kl_old_new(x, estimator="k2"),
    "kl_k3": lambda x: kl_old_new(x, estimator="k3"),
    "clip_fraction": lambda x: clip_fraction(x, clip_range=0.2),
    "value_clip_fraction": lambda x: value_clip_fraction(x, torch.zeros_like(x), clip_range_vf=0.2),
    "explained_variance": lambda x: explained_variance(x, torch.arange(8, dtype=x.dtype)),
}


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_diagnostics_build_no_graph(name: str) -> None:
    result = DIAGNOSTICS[name](normal(0, 8).requires_grad_())
    assert not getattr(result, "requires_grad", False)


# ---------------------------------------------------------------------------------------------------------------------
# All of them: dtypes, side effects, bad input

Call = Callable[..., Tensor]
LOSSES: dict[str, tuple[Call, int]] = {
    "surrogate": (surrogate, 2),
    "clipped_surrogate": (lambda r, a: clipped_surrogate(r, a, clip_range=0.2), 2),
    "kl_penalized_surrogate": (lambda r, a, k: kl_penalized_surrogate(r, a, k, kl_coef=0.5), 3),
    "value_loss": (value_loss, 2),
    "clipped_value_loss_max": (lambda v, o, y: clipped_value_loss(v, o, y, clip_range_vf=0.2), 3),
    "clipped_value_loss_only": (
        lambda v, o, y: clipped_value_loss(v, o, y, clip_range_vf=0.2, value_clip="clipped_only"),
        3,
    ),
    "entropy_loss": (entropy_loss, 1),
}
PAIRED_DIAGNOSTICS: dict[str, tuple[Call, int]] = {
    "value_clip_fraction": (lambda v, o: value_clip_fraction(v, o, clip_range_vf=0.2), 2),
    "explained_variance": (explained_variance, 2),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_losses_are_finite_scalars_of_the_same_dtype_and_leave_their_inputs_alone(
    dtype: torch.dtype, name: str
) -> None:
    loss, n_inputs = LOSSES[name]
    inputs = [normal(i, 16, dtype=dtype) for i in range(n_inputs)]
    copies = [x.clone() for x in inputs]
    result = loss(*inputs)
    assert result.shape == ()
    assert result.dtype == dtype
    assert result.isfinite()
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_means_a_repeated_batch_changes_nothing(name: str) -> None:
    loss, n_inputs = LOSSES[name]
    inputs = [normal(i, 16) for i in range(n_inputs)]
    torch.testing.assert_close(loss(*(torch.cat([x, x, x]) for x in inputs)), loss(*inputs))


@pytest.mark.parametrize("name", [name for name, (_, n) in (LOSSES | PAIRED_DIAGNOSTICS).items() if n > 1])
@pytest.mark.parametrize("wrong", [(6, 1), (1, 6), (1,), (), (5,), (7,)])
def test_shapes_that_differ_raise(wrong: tuple[int, ...], name: str) -> None:
    """`[B]` against `[B, 1]` would broadcast to `[B, B]` and train on nonsense."""
    function, n_inputs = (LOSSES | PAIRED_DIAGNOSTICS)[name]
    for position in range(n_inputs):
        inputs = [normal(i, 6) for i in range(n_inputs)]
        inputs[position] = torch.zeros(wrong, dtype=F64)
        with pytest.raises(ValueError, match=r"(?i)shape"):
            function(*inputs)


def test_unknown_value_clip_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="min") as error:
        clipped_value_loss(vector(1), vector(1), vector(1), clip_range_vf=0.2, value_clip="min")
    assert "max" in str(error.value)
    assert "clipped_only" in str(error.value)


def test_unknown_kl_estimator_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="k4") as error:
        kl_old_new(vector(0.1), estimator="k4")
    assert all(name in str(error.value) for name in ("k1", "k2", "k3"))
