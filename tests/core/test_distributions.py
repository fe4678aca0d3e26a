"""Closed-form KL(old || new): torch.distributions as oracle, hand-derived values, the Fisher matrix as its Hessian."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Independent, Normal, kl_divergence

from sb3_pgplus.core.distributions import kl_bernoulli, kl_categorical, kl_normal

F64 = torch.float64
SEEDS = (0, 1, 2)
DTYPES = ((torch.float32, 1e-5), (F64, 1e-12))


def normal(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Values


def test_kl_normal_equals_the_hand_derived_numbers() -> None:
    # log(s'/s) + (s^2 + (m - m')^2) / (2 s'^2) - 1/2, one term per dimension:
    #   N(0, 1) || N(1, 1):  0 + (1 + 1)/2 - 1/2 = 1/2
    #   N(0, 1) || N(0, 2):  log 2 + 1/8 - 1/2 = log 2 - 3/8
    old_mean, old_std = torch.zeros(1, 2, dtype=F64), torch.ones(1, 2, dtype=F64)
    mean, std = torch.tensor([[1.0, 0.0]], dtype=F64), torch.tensor([[1.0, 2.0]], dtype=F64)
    actual = kl_normal(old_mean, old_std, mean, std)
    assert actual.shape == (1,)
    assert float(actual) == pytest.approx(0.5 + math.log(2) - 3 / 8)


def test_kl_categorical_equals_the_hand_derived_numbers() -> None:
    # (1/2, 1/2) || (1/4, 3/4):  (log 2)/2 + (log 2/3)/2 = log(4/3) / 2;  the other way: (log 1/2)/4 + 3 (log 3/2)/4
    half = torch.tensor([[0.5, 0.5]], dtype=F64).log()
    quarter = torch.tensor([[0.25, 0.75]], dtype=F64).log()
    assert float(kl_categorical(half, quarter)) == pytest.approx(math.log(4 / 3) / 2)
    assert float(kl_categorical(quarter, half)) == pytest.approx(-math.log(2) / 4 + 3 * math.log(1.5) / 4)


def test_kl_bernoulli_equals_the_hand_derived_numbers() -> None:
    # p = 1/2 (logit 0) || p = 3/4 (logit log 3): as the two-way categorical above, log(4/3) / 2; twice for two bits
    old, new = torch.zeros(1, 2, dtype=F64), torch.full((1, 2), math.log(3), dtype=F64)
    assert float(kl_bernoulli(old, new)) == pytest.approx(2 * math.log(4 / 3) / 2)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_kl_normal_equals_torch_distributions(seed: int, dtype: torch.dtype, tolerance: float) -> None:
    old_mean, mean = normal(seed, 20, 3, dtype=dtype), normal(seed + 10, 20, 3, dtype=dtype)
    old_std, std = (normal(seed + shift, 20, 3, dtype=dtype).mul(0.5).exp() for shift in (20, 30))
    expected = kl_divergence(Independent(Normal(old_mean, old_std), 1), Independent(Normal(mean, std), 1))
    actual = kl_normal(old_mean, old_std, mean, std)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("n_actions", [2, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_kl_categorical_equals_torch_distributions(
    seed: int, n_actions: int, dtype: torch.dtype, tolerance: float
) -> None:
    old, new = normal(seed, 20, n_actions, dtype=dtype), normal(seed + 10, 20, n_actions, dtype=dtype)
    actual = kl_categorical(old, new)
    assert actual.dtype == dtype
    expected = kl_divergence(Categorical(logits=old), Categorical(logits=new))
    torch.testing.assert_close(actual, expected, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_kl_bernoulli_equals_torch_distributions(seed: int, dtype: torch.dtype, tolerance: float) -> None:
    old, new = normal(seed, 20, 4, dtype=dtype), normal(seed + 10, 20, 4, dtype=dtype)
    expected = kl_divergence(Independent(Bernoulli(logits=old), 1), Independent(Bernoulli(logits=new), 1))
    actual = kl_bernoulli(old, new)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=10 * tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------------------
# Properties that all three share

Kl = Callable[[Tensor, Tensor], Tensor]


def kl_normal_of_parameters(old: Tensor, new: Tensor) -> Tensor:
    """[B, 2 A]: means, then log standard deviations."""
    (old_mean, old_log_std), (mean, log_std) = old.chunk(2, dim=-1), new.chunk(2, dim=-1)
    return kl_normal(old_mean, old_log_std.exp(), mean, log_std.exp())


KLS: dict[str, Kl] = {"normal": kl_normal_of_parameters, "categorical": kl_categorical, "bernoulli": kl_bernoulli}


@pytest.mark.parametrize("name", KLS)
@pytest.mark.parametrize("seed", SEEDS)
def test_kl_is_positive_and_one_number_per_sample(seed: int, name: str) -> None:
    kl = KLS[name](normal(seed, 50, 4), normal(seed + 10, 50, 4))
    assert kl.shape == (50,)
    assert (kl > 0).all()


@pytest.mark.parametrize("name", KLS)
@pytest.mark.parametrize("seed", SEEDS)
def test_kl_is_zero_with_zero_gradient_at_equality(seed: int, name: str) -> None:
    """No first-order term: this is why every surrogate has the policy gradient at theta_old."""
    old = normal(seed, 50, 4)
    new = old.clone().requires_grad_()
    kl = KLS[name](old, new)
    (slope,) = torch.autograd.grad(kl.sum(), new)
    torch.testing.assert_close(kl.detach(), torch.zeros(50, dtype=F64), rtol=0, atol=1e-14)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", KLS)
def test_kl_is_not_symmetric(name: str) -> None:
    """Old first: the two directions differ, so exchanged arguments cannot go unnoticed."""
    a, b = normal(0, 10, 4), normal(1, 10, 4)
    assert ((KLS[name](a, b) - KLS[name](b, a)).abs() > 1e-6).all()


@pytest.mark.parametrize("name", KLS)
def test_samples_do_not_mix(name: str) -> None:
    old, new = normal(0, 12, 4), normal(1, 12, 4)
    one_by_one = torch.cat([KLS[name](old[i : i + 1], new[i : i + 1]) for i in range(12)])
    torch.testing.assert_close(KLS[name](old, new), one_by_one)


@pytest.mark.parametrize("name", ["normal", "bernoulli"])
def test_kl_sums_over_independent_action_dimensions(name: str) -> None:
    old, new = normal(0, 12, 4), normal(1, 12, 4)
    # (mean, log std) of the normal's dimension i are the columns i and i + 2
    columns = [[0, 2], [1, 3]] if name == "normal" else [[0], [1], [2], [3]]
    parts = sum(KLS[name](old[:, c], new[:, c]) for c in columns)
    torch.testing.assert_close(KLS[name](old, new), parts)


@pytest.mark.parametrize("name", KLS)
def test_inputs_are_not_modified(name: str) -> None:
    old, new = normal(0, 12, 4), normal(1, 12, 4)
    copies = old.clone(), new.clone()
    KLS[name](old, new)
    assert torch.equal(old, copies[0]) and torch.equal(new, copies[1])


@pytest.mark.parametrize("seed", SEEDS)
def test_kl_categorical_ignores_a_constant_added_to_the_logits(seed: int) -> None:
    old, new = normal(seed, 10, 3), normal(seed + 10, 10, 3)
    torch.testing.assert_close(kl_categorical(old + 5.0, new - 7.0), kl_categorical(old, new))


@pytest.mark.parametrize("seed", SEEDS)
def test_kl_bernoulli_is_the_two_way_categorical(seed: int) -> None:
    """A bit with logit x is the softmax of (x, 0)."""
    old, new = normal(seed, 10, 1), normal(seed + 10, 10, 1)
    zero = torch.zeros_like(old)
    expected = kl_categorical(torch.cat([old, zero], -1), torch.cat([new, zero], -1))
    torch.testing.assert_close(kl_bernoulli(old, new), expected)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("kl", [kl_categorical, kl_bernoulli])
def test_extreme_logits_stay_finite(kl: Kl, dtype: torch.dtype) -> None:
    """Probabilities that round to 0 and 1 must not make 0 * inf; the gradient is finite as well."""
    old = torch.tensor([[200.0, -200.0], [-200.0, 200.0], [0.0, 0.0], [200.0, -200.0]], dtype=dtype)
    new = torch.tensor([[200.0, -200.0], [200.0, -200.0], [200.0, -200.0], [0.0, 0.0]], dtype=dtype).requires_grad_()
    value = kl(old, new)
    (slope,) = torch.autograd.grad(value.sum(), new)
    assert value.isfinite().all()
    assert (value >= 0).all()
    assert slope.isfinite().all()
    assert float(value[0].detach()) == 0.0


def test_masked_actions_add_nothing_to_kl_categorical() -> None:
    """A logit of -inf on both sides leaves the KL over the other actions, with finite derivatives of both orders."""
    old, new = normal(0, 10, 3), normal(1, 10, 3).requires_grad_()
    mask = torch.full((10, 1), float("-inf"), dtype=F64)
    masked_kl = kl_categorical(torch.cat([old, mask], -1), torch.cat([new, mask], -1))
    kl = kl_categorical(old, new)
    torch.testing.assert_close(masked_kl, kl)
    slope, masked_slope = (torch.autograd.grad(x.sum(), new, create_graph=True)[0] for x in (kl, masked_kl))
    torch.testing.assert_close(masked_slope, slope)
    curvature, masked_curvature = (torch.autograd.grad(x[:, 0].sum(), new)[0] for x in (slope, masked_slope))
    torch.testing.assert_close(masked_curvature, curvature)


@pytest.mark.parametrize("name", KLS)
def test_shapes_that_differ_raise(name: str) -> None:
    """A policy of one row against a batch would broadcast without a word."""
    for old, new in ((normal(0, 1, 4), normal(1, 6, 4)), (normal(0, 6, 4), normal(1, 4))):
        with pytest.raises(ValueError, match=r"(?i)shape"):
            KLS[name](old, new)


# ---------------------------------------------------------------------------------------------------------------------
# Second order: KL = 1/2 d^T F d, F the Fisher matrix E[grad log pi grad log pi^T]


def hessian_at_equality(kl: Kl, parameters: Tensor) -> Tensor:
    """Hessian of KL(parameters || x) in x at x = parameters, for one sample."""
    return torch.autograd.functional.hessian(lambda x: kl(parameters.unsqueeze(0), x.unsqueeze(0)).sum(), parameters)


@pytest.mark.parametrize("n_actions", [2, 3, 6])
@pytest.mark.parametrize("seed", SEEDS)
def test_hessian_of_kl_categorical_is_the_fisher_matrix_by_enumeration(seed: int, n_actions: int) -> None:
    logits = normal(seed, n_actions)
    scores = torch.autograd.functional.jacobian(lambda x: x.log_softmax(-1), logits)  # row a: grad log pi(a)
    fisher = (logits.softmax(-1)[:, None, None] * scores[:, :, None] * scores[:, None, :]).sum(0)
    torch.testing.assert_close(hessian_at_equality(kl_categorical, logits), fisher, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_hessian_of_kl_bernoulli_is_the_fisher_matrix_by_enumeration(seed: int) -> None:
    """Four outcomes of two bits; the scores are x - p, so F = diag(p (1 - p))."""
    logits = normal(seed, 2)
    outcomes = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=F64)
    probabilities = Bernoulli(logits=logits).log_prob(outcomes).sum(-1).exp()
    scores = outcomes - logits.sigmoid()
    fisher = (probabilities[:, None, None] * scores[:, :, None] * scores[:, None, :]).sum(0)
    torch.testing.assert_close(fisher, torch.diag(logits.sigmoid() * (1 - logits.sigmoid())))
    torch.testing.assert_close(hessian_at_equality(kl_bernoulli, logits), fisher, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_hessian_of_kl_normal_is_its_known_fisher_matrix(seed: int) -> None:
    """In (mean, log std): E[((x - m) / s^2)^2] = 1 / s^2, E[((x - m)^2 / s^2 - 1)^2] = 3 - 2 + 1 = 2, no cross term."""
    parameters = normal(seed, 4)
    fisher = torch.diag(torch.cat([(-2.0 * parameters[2:]).exp(), torch.full((2,), 2.0, dtype=F64)]))
    torch.testing.assert_close(hessian_at_equality(kl_normal_of_parameters, parameters), fisher, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", KLS)
@pytest.mark.parametrize("seed", SEEDS)
def test_kl_of_a_small_step_is_half_its_fisher_norm(seed: int, name: str) -> None:
    """KL(old || old + d) = d^T F d / 2 + O(|d|^3): the error divided by |d|^2 shrinks with the step."""
    parameters, direction = normal(seed, 4), normal(seed + 10, 4)
    quadratic = float(direction @ hessian_at_equality(KLS[name], parameters) @ direction) / 2.0
    for step in (1e-2, 1e-3):
        kl = float(KLS[name](parameters.unsqueeze(0), (parameters + step * direction).unsqueeze(0)))
        assert kl / step**2 == pytest.approx(quadratic, rel=20.0 * step)
