"""Conjugate gradient, Fisher products, trust region and line search against dense algebra and enumeration.

Then natural-gradient steps on the random tabular MDPs of `test_tabular_mdp`, where every expectation is a finite sum.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import test_tabular_mdp as tabular
import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import Tensor, nn

from sb3_pgplus.core.distributions import (
    fisher_bernoulli,
    fisher_categorical,
    fisher_normal,
    kl_bernoulli,
    kl_categorical,
    kl_normal,
)
from sb3_pgplus.core.natural_gradient import (
    NEGATIVE_CURVATURE,
    NON_FINITE,
    LineSearchResult,
    MatVec,
    backtracking_line_search,
    conjugate_gradient,
    fisher_vector_product,
    flatten,
    trust_region_scale,
    unflatten,
)
from sb3_pgplus.policies import critic_only_parameters, distribution_parameters, fisher_outputs, kl_old_new

F64 = torch.float64
EPS = {torch.float32: 1.2e-7, F64: 2.3e-16}

problem = tabular.problem  # the fixture: an MDP and the logits of a policy in it


def normal(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def rotated(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    q = torch.linalg.qr(normal(seed, len(eigenvalues), len(eigenvalues))).Q
    return (q * eigenvalues) @ q.T


def spd(n: int, condition: float, seed: int = 0) -> Tensor:
    return rotated(torch.logspace(0, -math.log10(condition), n, dtype=F64) if n > 1 else torch.ones(1, dtype=F64), seed)


class Counted:
    """v ↦ Av, and how often it was asked."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.calls = matrix, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.calls += 1
        return self.matrix @ v


# ---------------------------------------------------------------------------------------------------------------------
# Conjugate gradient: what it finds


# a float32 matrix of condition 1e6 need not even be positive definite
SYSTEMS = [(c, F64, 1e-14) for c in (1.0, 1e1, 1e3, 1e6)] + [(c, torch.float32, 1e-6) for c in (1.0, 1e1, 1e3)]


@pytest.mark.parametrize(("condition", "dtype", "tol"), SYSTEMS)
@pytest.mark.parametrize("n", [1, 2, 7, 20, 60])
def test_conjugate_gradient_solves_the_system(n: int, condition: float, dtype: torch.dtype, tol: float) -> None:
    a, b = spd(n, condition, seed=n).to(dtype), normal(n + 100, n, dtype=dtype)
    found = conjugate_gradient(lambda v: a @ v, b, max_steps=40 * n, tol=tol)
    assert found.problem == ""
    assert found.x.dtype == dtype
    # ‖x − x*‖ / ‖x*‖ ≤ κ ‖b − Ax‖ / ‖b‖, and the recursion's residual drifts by some roundings of ‖A‖ ‖x‖ ≤ κ ‖b‖.
    exact = torch.linalg.solve(a.to(F64), b.to(F64))
    error = float((found.x.to(F64) - exact).norm() / exact.norm())
    assert error <= 2 * condition * (tol + 5 * EPS[dtype])


@pytest.mark.parametrize("n_steps", [1, 2, 5, 9])
def test_every_iterate_is_the_best_in_its_krylov_space(n_steps: int) -> None:
    """After k steps x minimises ½ xᵀAx − bᵀx over span{b, Ab, …, Aᵏ⁻¹b}: K (KᵀAK)⁻¹ Kᵀb for a basis K of it."""
    a, b = spd(20, 100.0), normal(1, 20)
    krylov = [b / b.norm()]
    for _ in range(n_steps - 1):
        following = a @ krylov[-1]
        krylov.append(following / following.norm())
    k = torch.linalg.qr(torch.stack(krylov, dim=1)).Q
    best = k @ torch.linalg.solve(k.T @ a @ k, k.T @ b)
    found = conjugate_gradient(lambda v: a @ v, b, max_steps=n_steps, tol=0.0)
    assert found.n_steps == n_steps
    torch.testing.assert_close(found.x, best, rtol=0, atol=1e-9)


@pytest.mark.parametrize("distinct", [1, 2, 3, 5])
def test_as_many_steps_as_there_are_distinct_eigenvalues(distinct: int) -> None:
    a, b = rotated(torch.arange(1, distinct + 1, dtype=F64).repeat(6)), normal(1, 6 * distinct)
    found = conjugate_gradient(lambda v: a @ v, b, max_steps=50, tol=1e-10)
    assert found.n_steps == distinct
    torch.testing.assert_close(found.x, torch.linalg.solve(a, b), rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_multiples_of_the_identity_are_solved_exactly_in_one_step(scale: float) -> None:
    b = normal(0, 10)
    x, residual_norm, n_steps = conjugate_gradient(lambda v: scale * v, b, max_steps=10, tol=0.0)
    assert torch.equal(x, b / scale)
    assert (residual_norm, n_steps) == (0.0, 1)


@pytest.mark.parametrize("tol", [0.0, 1e-8])
def test_nothing_to_solve_for_takes_no_step_and_no_product(tol: float) -> None:
    matvec = Counted(spd(5, 10.0))
    found = conjugate_gradient(matvec, torch.zeros(5, dtype=F64), max_steps=10, tol=tol)
    assert torch.equal(found.x, torch.zeros(5, dtype=F64))
    assert (found.residual_norm, found.n_steps, found.problem, matvec.calls) == (0.0, 0, "", 0)


def test_same_inputs_give_the_same_bits_and_stay_as_they_were() -> None:
    a, b = spd(30, 1e3), normal(1, 30)
    kept = b.clone()
    first, second = (conjugate_gradient(lambda v: a @ v, b, max_steps=25, tol=1e-12) for _ in range(2))
    assert torch.equal(first.x, second.x) and torch.equal(first.residual, second.residual)
    assert first[1:] == second[1:]
    assert torch.equal(b, kept)


@pytest.mark.parametrize("factor", [-1.0, 0.25, 1024.0, 3.0, 1e5, 1e-5])
def test_solution_scales_with_the_right_hand_side(factor: float) -> None:
    a, b = spd(12, 30.0), normal(1, 12)
    x, residual_norm, n_steps = conjugate_gradient(lambda v: a @ v, b, max_steps=8, tol=1e-9)
    scaled = conjugate_gradient(lambda v: a @ v, factor * b, max_steps=8, tol=1e-9)
    assert scaled.n_steps == n_steps
    assert scaled.residual_norm == pytest.approx(abs(factor) * residual_norm, rel=1e-9)
    exact = math.frexp(abs(factor))[0] == 0.5  # multiplying with a power of two does not round
    torch.testing.assert_close(scaled.x, factor * x, rtol=0.0 if exact else 1e-10, atol=0.0)


@pytest.mark.parametrize("max_steps", [0, 1, 4, 100])
def test_residual_is_the_true_one(max_steps: int) -> None:
    """By a product with x itself: after a hundred steps the recursion would say 1e-30 or so."""
    a, b = spd(15, 1e3), normal(1, 15)
    found = conjugate_gradient(lambda v: a @ v, b, max_steps=max_steps, tol=0.0)
    true = b - a @ found.x
    assert torch.equal(found.residual, true)
    assert found.residual_norm == float(true.norm())


# ---------------------------------------------------------------------------------------------------------------------
# Conjugate gradient: where it ends


@pytest.mark.parametrize("tol", [0.5, 1e-2, 1e-5, 1e-8])
@pytest.mark.parametrize("scale", [1.0, 1e6, 1e-6])
def test_ends_at_the_first_residual_within_the_relative_tolerance(scale: float, tol: float) -> None:
    a, b = spd(30, 100.0), scale * normal(1, 30)
    threshold = tol * float(b.norm())
    found = conjugate_gradient(lambda v: a @ v, b, max_steps=200, tol=tol)
    before = conjugate_gradient(lambda v: a @ v, b, max_steps=found.n_steps - 1, tol=0.0)
    assert found.residual_norm <= threshold * (1 + 1e-6)
    assert before.residual_norm > threshold


@pytest.mark.parametrize("max_steps", [0, 1, 3, 10])
def test_one_product_per_step_and_one_for_the_residual(max_steps: int) -> None:
    matvec = Counted(spd(30, 1e3))
    found = conjugate_gradient(matvec, normal(1, 30), max_steps=max_steps, tol=0.0)
    assert found.n_steps == max_steps
    assert matvec.calls == (max_steps + 1 if max_steps else 0)
    assert bool(found.x.any()) == (max_steps > 0)


def test_a_tolerance_of_one_is_met_at_the_start() -> None:
    found = conjugate_gradient(lambda v: 2.0 * v, normal(0, 4), max_steps=5, tol=1.0)
    assert found.n_steps == 0 and not found.x.any()


@pytest.mark.parametrize(
    ("diagonal", "b", "x", "n_steps"),
    [
        ([-1.0, -1.0], [3.0, 4.0], [0.0, 0.0], 0),
        ([0.0, 0.0], [3.0, 4.0], [0.0, 0.0], 0),  # no curvature at all: no minimum
        # bᵀAb = 2 − 1/4 > 0, so one step of ‖b‖² / bᵀAb = (5/4) / (7/4); the conjugate direction has the other sign
        ([2.0, -1.0], [1.0, 0.5], [5 / 7, 2.5 / 7], 1),
        ([1.0, -9.0], [1.0, 1.0], [0.0, 0.0], 0),  # bᵀAb = −8 at once
    ],
)
def test_negative_curvature_is_reported_with_the_last_iterate(
    diagonal: list[float], b: list[float], x: list[float], n_steps: int
) -> None:
    a = torch.tensor(diagonal, dtype=F64)
    found = conjugate_gradient(lambda v: a * v, torch.tensor(b, dtype=F64), max_steps=10, tol=1e-10)
    assert (found.problem, found.n_steps) == (NEGATIVE_CURVATURE, n_steps)
    torch.testing.assert_close(found.x, torch.tensor(x, dtype=F64), rtol=1e-15, atol=0)
    torch.testing.assert_close(found.residual, torch.tensor(b, dtype=F64) - a * found.x, rtol=0, atol=0)


def turning_bad(good: int, value: float) -> MatVec:
    """A product that gives `value` after some good ones."""
    a, calls = spd(6, 10.0), itertools.count()
    return lambda v: a @ v if next(calls) < good else torch.full_like(v, value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("good", [0, 1, 3])
def test_products_that_are_not_finite_are_reported_with_the_last_iterate(good: int, value: float) -> None:
    found = conjugate_gradient(turning_bad(good, value), normal(1, 6), max_steps=10, tol=0.0)
    assert (found.problem, found.n_steps) == (NON_FINITE, good)
    expected = conjugate_gradient(turning_bad(10, value), normal(1, 6), max_steps=good, tol=0.0)
    assert torch.equal(found.x, expected.x)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_right_hand_sides_that_are_not_finite_are_reported(value: float) -> None:
    matvec = Counted(torch.eye(2))
    found = conjugate_gradient(matvec, torch.tensor([1.0, value]), max_steps=10, tol=1e-5)
    assert (found.problem, found.n_steps, matvec.calls) == (NON_FINITE, 0, 0)
    assert torch.equal(found.x, torch.zeros(2))


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 1e20), (torch.float32, 1e-25), (F64, 1e200), (F64, 1e-200)]
)
def test_a_right_hand_side_whose_square_over_or_underflows_is_solved_all_the_same(
    dtype: torch.dtype, size: float
) -> None:
    """(2I) x = b: x = b/2, exactly, though ‖b‖² is inf or 0 in its type."""
    b = torch.tensor([1.0, -3.0], dtype=dtype) * size
    found = conjugate_gradient(lambda v: 2 * v, b, max_steps=10, tol=1e-5)
    assert (found.problem, found.n_steps, found.residual_norm) == ("", 1, 0.0)
    assert torch.equal(found.x, b / 2)


@pytest.mark.parametrize("diagonal", [1e-300, 1e-290, 1e-320])
def test_steps_that_overflow_are_reported_with_a_finite_x(diagonal: float) -> None:
    """A⁻¹b = 1e20 / 1e-300 is beyond float64, although every product on the way may be finite."""
    found = conjugate_gradient(lambda v: diagonal * v, torch.full((3,), 1e20, dtype=F64), max_steps=5, tol=1e-5)
    assert found.x.isfinite().all()
    assert found.problem == NON_FINITE


@pytest.mark.parametrize(
    ("b", "limits", "message"),
    [
        (torch.ones(2, 2), {}, r"`b` must be a vector \[P\], got shape \[2, 2\]"),
        (torch.tensor(1.0), {}, r"`b` must be a vector \[P\], got shape \[\]"),
        (torch.ones(2), {"max_steps": -1}, r"`max_steps` and `tol` must be >= 0, got -1 and 0\.1"),
        (torch.ones(2), {"tol": -0.5}, r"`max_steps` and `tol` must be >= 0, got 3 and -0\.5"),
        (torch.ones(2), {"tol": math.nan}, r"`max_steps` and `tol` must be >= 0, got 3 and nan"),
    ],
)
def test_bad_input_of_conjugate_gradient_raises(b: Tensor, limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conjugate_gradient(lambda v: v, b, **{"max_steps": 3, "tol": 0.1, **limits})


# ---------------------------------------------------------------------------------------------------------------------
# Fisher matrices of distributions in their own parameters, each as (KL, product) of parameters [B, 4]


def kl_mean_std(old: Tensor, new: Tensor) -> Tensor:
    return kl_normal(*old.chunk(2, dim=-1), *new.chunk(2, dim=-1))


def fisher_mean_std(y: Tensor, dy: Tensor) -> Tensor:
    return torch.cat(fisher_normal(y.chunk(2, dim=-1)[1], *dy.chunk(2, dim=-1)), dim=-1)


FISHERS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "normal": (kl_mean_std, fisher_mean_std),
    "categorical": (kl_categorical, fisher_categorical),
    "bernoulli": (kl_bernoulli, fisher_bernoulli),
}


@pytest.mark.parametrize("name", FISHERS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fisher_of_a_distribution_is_the_hessian_of_its_kl_in_any_direction(seed: int, name: str) -> None:
    """Changes of logits that are no changes of the policy among them."""
    kl, fisher = FISHERS[name]
    y, dy = normal(seed, 5, 4).exp(), normal(seed + 10, 5, 4)
    dy[0] = 1.0  # shifts all logits
    for row, change, product in zip(y, dy, fisher(y, dy), strict=True):
        hessian = torch.autograd.functional.hessian(lambda x, at=row: kl(at[None], x[None]).sum(), row)
        torch.testing.assert_close(product, hessian @ change, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", FISHERS)
def test_shapes_that_differ_raise(name: str) -> None:
    with pytest.raises(ValueError, match="(?i)shape"):
        FISHERS[name][1](normal(0, 1, 4).exp(), normal(1, 5, 4))


# ---------------------------------------------------------------------------------------------------------------------
# Fisher products of SB3's policies


class DoubleFlatten(FlattenExtractor):
    """SB3 preprocesses to float32; from here on it is float64."""

    def forward(self, observations: Tensor) -> Tensor:
        return super().forward(observations.double())


POLICIES: dict[str, tuple[spaces.Space[Any], dict[str, Any]]] = {
    "gaussian": (spaces.Box(-1, 1, (2,), np.float32), {"log_std_init": -0.3}),
    "state_dependent": (spaces.Box(-1, 1, (2,), np.float32), {"use_sde": True, "log_std_init": -0.3}),
    "squashed": (spaces.Box(-1, 1, (2,), np.float32), {"use_sde": True, "squash_output": True, "log_std_init": -0.3}),
    "categorical": (spaces.Discrete(3), {}),
    "multi_categorical": (spaces.MultiDiscrete([2, 3]), {}),
    "bernoulli": (spaces.MultiBinary(2), {}),
}
ETA = 0.1


class Case(NamedTuple):
    policy: ActorCriticPolicy
    observations: Tensor
    parameters: list[nn.Parameter]  # the critic's too: they must get rows of zeros

    def fisher(self, damping: float = 0.0) -> MatVec:
        return fisher_vector_product(
            *fisher_outputs(self.policy.get_distribution(self.observations)), self.parameters, damping=damping
        )

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def vector(self, seed: int) -> Tensor:
        return normal(seed, self.n_parameters)


def case_of(name: str) -> Case:
    action_space, settings = POLICIES[name]
    torch.manual_seed(0)
    policy = ActorCriticPolicy(
        spaces.Box(-10, 10, (3,), np.float32),
        action_space,
        lambda _: 0.0,
        net_arch={"pi": [4], "vf": [2]},
        ortho_init=False,  # with SB3's gain of 0.01 all actions would be equally likely
        features_extractor_class=DoubleFlatten,
        **settings,
    ).double()
    return Case(policy, normal(1, 5, 3), list(policy.parameters()))


@pytest.fixture(params=POLICIES)
def case(request: pytest.FixtureRequest) -> Case:
    return case_of(request.param)


def dense(matvec: MatVec, n: int) -> Tensor:
    return torch.stack([matvec(unit) for unit in torch.eye(n, dtype=F64)], dim=1)


def test_fisher_products_are_those_of_the_hessian_of_the_mean_kl(case: Case) -> None:
    """F = ∇²_θ E KL(π_old‖π_θ) at θ_old, the closed-form KL differentiated twice, row by row."""
    distribution = case.policy.get_distribution(case.observations)
    kl = kl_old_new(distribution_parameters(distribution), distribution).mean()
    slope = flatten(torch.autograd.grad(kl, case.parameters, create_graph=True, materialize_grads=True))
    rows = [torch.autograd.grad(s, case.parameters, retain_graph=True, materialize_grads=True) for s in slope]
    hessian = torch.stack([flatten(row) for row in rows])
    assert float(hessian.abs().max()) > 1e-2
    torch.testing.assert_close(dense(case.fisher(), case.n_parameters), hessian, rtol=1e-10, atol=1e-13)


# Of the discrete spaces above: every action.
ACTIONS: dict[str, list[Any]] = {
    "categorical": list(range(3)),
    "multi_categorical": list(itertools.product(range(2), range(3))),
    "bernoulli": list(itertools.product(range(2), repeat=2)),
}
# Three-point Gauss–Hermite in units of σ: exact for polynomials up to degree 5, and a squared score has degree 4.
NODES = ((-math.sqrt(3.0), 1 / 6), (0.0, 2 / 3), (math.sqrt(3.0), 1 / 6))


def outcomes(distribution: Distribution, name: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights [B] and actions [B, ...] whose weighted sum is the exact expectation of a squared score."""
    if name in ACTIONS:
        for choice in ACTIONS[name]:
            action = torch.tensor(choice, dtype=F64).expand(5, *np.shape(choice))
            yield distribution.log_prob(action).exp().detach(), action
        return
    inner = distribution.distribution
    for points in itertools.product(NODES, repeat=2):
        action = (inner.loc + inner.scale * torch.tensor([node for node, _ in points], dtype=F64)).detach()
        weight = math.prod(weight for _, weight in points)
        yield torch.full((5,), weight, dtype=F64), action.tanh() if name == "squashed" else action


@pytest.mark.parametrize("name", POLICIES)
def test_fisher_products_are_those_of_the_expected_outer_product_of_scores(name: str) -> None:
    """F = E_s E_a ∇log π(a|s) ∇log π(a|s)ᵀ, by enumeration of actions (by exact quadrature for Gaussians)."""
    case = case_of(name)
    distribution = case.policy.get_distribution(case.observations)
    fisher, total = torch.zeros(case.n_parameters, case.n_parameters, dtype=F64), torch.zeros(5, dtype=F64)
    for weights, actions in outcomes(distribution, name):
        total += weights
        for weight, log_prob in zip(weights, distribution.log_prob(actions), strict=True):
            score = torch.autograd.grad(log_prob, case.parameters, retain_graph=True, materialize_grads=True)
            fisher += weight * torch.outer(flatten(score), flatten(score)) / 5
    torch.testing.assert_close(total, torch.ones(5, dtype=F64))
    # tanh and back loses some digits
    atol = 1e-7 if name == "squashed" else 1e-12
    torch.testing.assert_close(dense(case.fisher(), case.n_parameters), fisher, rtol=0, atol=atol)


def test_fisher_matrix_is_symmetric_and_positive_semi_definite(case: Case) -> None:
    fisher, product = dense(case.fisher(), case.n_parameters), case.fisher()
    u, v = case.vector(1), case.vector(2)
    assert float(u @ product(v)) == pytest.approx(float(v @ product(u)), rel=1e-12)
    eigenvalues = torch.linalg.eigvalsh((fisher + fisher.T) / 2)
    assert float(eigenvalues[-1]) > 1e-2
    assert float(eigenvalues[0]) >= -1e-14 * case.n_parameters * float(eigenvalues[-1])


def test_fisher_products_are_linear_and_damping_adds_its_multiple(case: Case) -> None:
    product, damped = case.fisher(), case.fisher(damping=ETA)
    u, v = case.vector(1), case.vector(2)
    torch.testing.assert_close(product(2.0 * u - 3.0 * v), 2.0 * product(u) - 3.0 * product(v), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(damped(v), product(v) + ETA * v, rtol=1e-15, atol=0)


def test_parameters_without_influence_get_rows_and_columns_of_zeros(case: Case) -> None:
    """Here the critic's, which are found independently: the log-probability does not depend on them."""
    own = {id(p) for p in critic_only_parameters(case.policy)}
    idle = flatten([torch.full_like(p, float(id(p) in own)) for p in case.parameters]).bool()
    assert int(idle.sum()) == 3 * 2 + 2 + 2 + 1  # layers 3 → 2 → 1
    v = case.vector(3)
    product = case.fisher()(v)
    assert not product[idle].any()
    assert torch.equal(case.fisher(damping=ETA)(v)[idle], ETA * v[idle])
    assert torch.equal(case.fisher()(torch.where(idle, 7.0, v)), product)


def test_fisher_products_change_nothing(case: Case) -> None:
    """No ``grad``, no used-up graph, the same bits again, also where gradients are switched off."""
    distribution = case.policy.get_distribution(case.observations)
    outputs, metric = fisher_outputs(distribution)
    before = [p.detach().clone() for p in case.parameters]
    with torch.no_grad():
        product = fisher_vector_product(outputs, metric, case.parameters)
        first, second = product(case.vector(1)), product(case.vector(1))
    assert torch.equal(first, second) and not first.requires_grad
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(case.parameters, before, strict=True))
    torch.autograd.grad(outputs[0].sum(), case.parameters, allow_unused=True)  # the graph is still there


def test_kl_of_a_small_step_is_half_its_fisher_norm(case: Case) -> None:
    """KL(θ_old‖θ_old + d) = ½ dᵀFd + O(‖d‖³), so the quotient's error is of the order of the step."""
    old = distribution_parameters(case.policy.get_distribution(case.observations))
    # SB3 detaches the features that scale state-dependent noise: autograd sees those of the later layers move it only.
    fixed = {id(p) for p in case.policy.mlp_extractor.parameters()} if case.policy.use_sde else set()
    direction = (
        case.vector(4) * flatten([torch.full_like(p, float(id(p) not in fixed)) for p in case.parameters]).detach()
    )
    half = 0.5 * float(direction @ case.fisher()(direction))
    start = nn.utils.parameters_to_vector(case.parameters).detach()
    for step in (1e-3, 1e-4):
        nn.utils.vector_to_parameters(start + step * direction, case.parameters)
        kl = float(kl_old_new(old, case.policy.get_distribution(case.observations)).mean().detach())
        assert kl / step**2 == pytest.approx(half, rel=20.0 * step)


def test_fisher_of_a_linear_map_is_its_hand_derived_matrix() -> None:
    """y = Wx per state with M = c I: F = c/B Σ_b (I ⊗ x_b x_bᵀ), which is here c (I ⊗ XᵀX / B)."""
    x, weight = normal(0, 6, 3), normal(1, 2, 3).requires_grad_()
    matvec = fisher_vector_product([x @ weight.T], lambda dy: 5.0 * dy, [weight])
    expected = torch.kron(torch.eye(2, dtype=F64), 5.0 * x.T @ x / 6)
    torch.testing.assert_close(dense(matvec, 6), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("damping", [-1e-9, -1.0, math.nan])
def test_damping_that_is_not_positive_raises(damping: float) -> None:
    y = torch.ones(2, 1, requires_grad=True)
    with pytest.raises(ValueError, match=f"`damping` must be >= 0, got {damping}"):
        fisher_vector_product([y * 2], lambda dy: dy, [y], damping=damping)


# ---------------------------------------------------------------------------------------------------------------------
# Vectors, trust region, line search


def test_unflatten_undoes_flatten() -> None:
    tensors = [normal(0, 2, 3), torch.tensor(5.0, dtype=F64), normal(2, 0, 4), normal(3, 3, 2).T, normal(4, 1)]
    vector = flatten(tensors)
    assert vector.shape == (6 + 1 + 0 + 6 + 1,)
    assert torch.equal(vector[:6], tensors[0].reshape(-1)) and vector[-1] == tensors[-1]
    pieces = unflatten(vector, tensors)
    assert all(torch.equal(piece, tensor) for piece, tensor in zip(pieces, tensors, strict=True))
    vector[0] = 7.0
    assert pieces[0][0, 0] == 7.0  # views, not copies


@pytest.mark.parametrize("length", [13, 15])
def test_unflatten_refuses_vectors_of_another_length(length: int) -> None:
    with pytest.raises(RuntimeError, match="split"):
        unflatten(torch.zeros(length), [torch.zeros(2, 7)])


def test_trust_region_scale_by_hand() -> None:
    assert trust_region_scale(8.0, 0.01) == pytest.approx(0.05)  # √(2 · 0.01 / 8) = √0.0025


@pytest.mark.parametrize("max_kl", [1e-4, 0.01, 3.0])
def test_scaled_steps_lie_on_the_edge_of_the_trust_region(max_kl: float) -> None:
    """½ dᵀFd = δ."""
    fisher, x = spd(8, 100.0), normal(1, 8)
    d = trust_region_scale(float(x @ fisher @ x), max_kl) * x
    assert 0.5 * float(d @ fisher @ d) == pytest.approx(max_kl, rel=1e-14)


@pytest.mark.parametrize("curvature", [0.0, -0.0, -1.0, math.nan, math.inf, -math.inf])
def test_there_is_no_step_without_positive_finite_curvature(curvature: float) -> None:
    assert trust_region_scale(curvature, 0.01) == 0.0


class Asked(list[float]):
    """A line search's function, and the fractions it was asked for."""

    def __init__(self, evaluate: Callable[[float], tuple[float, float]]) -> None:
        super().__init__()
        self.evaluate = evaluate

    def __call__(self, fraction: float) -> tuple[float, float]:
        self.append(fraction)
        return self.evaluate(fraction)


NEVER = LineSearchResult(False, 0.0, 10, 0.0, 0.0)


@pytest.mark.parametrize(
    ("evaluate", "settings", "found", "asked"),
    [
        # KL f²: 1 > 0.3, then 0.25 ≤ 0.3
        (lambda f: (f, f**2), {"max_kl": 0.3}, LineSearchResult(True, 0.5, 2, 0.5, 0.25), [1.0, 0.5]),
        # f (1/2 − f) > 0 below 1/2 only: equality at the second candidate is no improvement
        (lambda f: (f * (0.5 - f), 0.0), {"max_kl": 1.0}, LineSearchResult(True, 0.25, 3, 0.0625, 0.0), [1, 0.5, 0.25]),
        # KL f: a KL of exactly δ is within the region
        (lambda f: (1.0, f), {"max_kl": 0.25}, LineSearchResult(True, 0.25, 3, 1.0, 0.25), [1.0, 0.5, 0.25]),
        (lambda f: (2.0, 0.0), {"max_kl": 0.01}, LineSearchResult(True, 1.0, 1, 2.0, 0.0), [1.0]),
        # 0.8³ = 0.512 is the first at or below 0.6
        (
            lambda f: (f, f),
            {"max_kl": 0.6, "shrinking_factor": 0.8},
            LineSearchResult(True, 0.8**3, 4, 0.8**3, 0.8**3),
            [1.0, 0.8, 0.8**2, 0.8**3],
        ),
        # what passes comes one candidate too late
        (lambda f: (f, f), {"max_kl": 0.2, "max_steps": 3}, NEVER._replace(n_steps=3), [1.0, 0.5, 0.25]),
        (lambda f: (f, f), {"max_kl": 2.0, "max_steps": 0}, NEVER._replace(n_steps=0), []),
        (lambda f: (-f, 0.0), {"max_kl": 1.0}, NEVER, [0.5**n for n in range(10)]),
        (lambda f: (0.0, 0.0), {"max_kl": 1.0}, NEVER, [0.5**n for n in range(10)]),
        (lambda f: (math.nan, 0.0), {"max_kl": 1.0}, NEVER, [0.5**n for n in range(10)]),
        (lambda f: (1.0, math.nan), {"max_kl": 1.0}, NEVER, [0.5**n for n in range(10)]),
        (lambda f: (1.0, math.inf), {"max_kl": 1.0}, NEVER, [0.5**n for n in range(10)]),
        # NaN at the longest step only
        (
            lambda f: (f, 0.0) if f < 1 else (math.nan, math.nan),
            {"max_kl": 1.0},
            LineSearchResult(True, 0.5, 2, 0.5, 0.0),
            [1.0, 0.5],
        ),
    ],
    ids=[
        *("second_fits", "strict_improvement", "kl_may_be_equal", "full_step", "own_factor", "too_few_steps"),
        *("no_steps", "worse", "equal", "nan_improvement", "nan_kl", "infinite_kl", "nan_at_first"),
    ],
)
def test_line_search_finds_the_longest_acceptable_step(
    evaluate: Callable[[float], tuple[float, float]],
    settings: dict[str, Any],
    found: LineSearchResult,
    asked: list[float],
) -> None:
    spy = Asked(evaluate)
    assert backtracking_line_search(spy, **settings) == found
    assert spy == asked


@pytest.mark.parametrize("factor", [0.0, 1.0, -0.5, 2.0, math.nan])
def test_shrinking_factors_that_do_not_shrink_raise(factor: float) -> None:
    with pytest.raises(ValueError, match=rf"`shrinking_factor` must be in \(0, 1\), got {factor}"):
        backtracking_line_search(lambda f: (f, f), max_kl=1.0, shrinking_factor=factor)


# ---------------------------------------------------------------------------------------------------------------------
# Steps on tabular MDPs


Parametrisation = Callable[[Tensor], Tensor]  # φ ↦ logits [S, A]


class Tabular(NamedTuple):
    """The exact TRPO problem at π_old: surrogate and mean KL under the normalised visitation distribution."""

    batch: tabular.Batch
    visited: Tensor  # [S]

    def kl(self, logits: Tensor) -> float:
        return float(self.visited @ kl_categorical(self.batch.old_logits, logits))

    def improvement(self, logits: Tensor) -> float:
        return float(self.batch.surrogate(logits) - self.batch.surrogate(self.batch.old_logits))

    @property
    def problem(self) -> tabular.Problem:
        return tabular.Problem(self.batch.mdp, self.batch.old_logits)

    def evaluator(self, improvement: Callable[[Tensor], float], step: Tensor) -> Callable[[float], tuple[float, float]]:
        def evaluate(fraction: float) -> tuple[float, float]:
            logits = self.batch.old_logits + fraction * step
            return improvement(logits), self.kl(logits)

        return evaluate

    def gradient(self, logits_of: Parametrisation, phi: Tensor) -> Tensor:
        point = phi.clone().requires_grad_()
        return tabular.gradient(self.batch.surrogate(logits_of(point)), point)

    def natural_step(self, logits_of: Parametrisation, phi: Tensor, max_kl: float, damping: float = 0.0) -> Tensor:
        """√(2δ / xᵀFx) x with Fx = g. Undamped, F is singular (logits may be shifted), but g is in its range."""
        point = phi.clone().requires_grad_()
        logits = logits_of(point)
        # The package averages over states; weights S d(s) make it the expectation under d.
        weights = len(self.visited) * self.visited.unsqueeze(-1)

        def metric(dy: Tensor) -> Tensor:
            return (weights * fisher_categorical(logits.detach(), dy.view(logits.shape))).flatten()

        matvec = fisher_vector_product([logits], metric, [point], damping=damping)
        b = self.gradient(logits_of, phi)
        found = conjugate_gradient(matvec, b, max_steps=500, tol=1e-11)
        assert found.problem == "" and found.residual_norm <= 1e-9 * float(b.norm())
        return trust_region_scale(float(found.x @ (b - found.residual)), max_kl) * found.x


def tabular_problem(mdp: tabular.MDP, logits: Tensor) -> Tabular:
    visitation = mdp.visitation(logits.softmax(-1))
    return Tabular(tabular.make_batch(mdp, logits), visitation / visitation.sum())


def linear(problem: tabular.Problem) -> tuple[Parametrisation, Tensor]:
    """θ = Aφ with a random invertible A, and the φ of the old policy."""
    n = problem.logits.numel()
    a = torch.eye(n, dtype=F64) + 0.5 * normal(7, n, n) / math.sqrt(n)
    return lambda phi: (a @ phi).view(problem.logits.shape), torch.linalg.solve(a, problem.logits.flatten())


def plain(problem: tabular.Problem) -> tuple[Parametrisation, Tensor]:
    return lambda phi: phi.view(problem.logits.shape), problem.logits.flatten()


def cubic(problem: tabular.Problem) -> tuple[Parametrisation, Tensor]:
    """θ = φ + φ³/3, φ by Newton's method."""
    phi = problem.logits.flatten()
    for _ in range(50):
        phi = phi - (phi + phi**3 / 3 - problem.logits.flatten()) / (1 + phi**2)
    return lambda phi: (phi + phi**3 / 3).view(problem.logits.shape), phi


def test_natural_steps_are_invariant_to_a_linear_reparametrisation_and_gradient_steps_are_not(
    problem: tabular.Problem,
) -> None:
    exact = tabular_problem(*problem)
    natural, steepest = [], []
    for logits_of, phi in (plain(problem), linear(problem)):
        torch.testing.assert_close(logits_of(phi), problem.logits)
        natural.append(logits_of(phi + exact.natural_step(logits_of, phi, max_kl=0.01)).softmax(-1))
        steepest.append(logits_of(phi + 0.01 * exact.gradient(logits_of, phi)).softmax(-1))
    old = problem.logits.softmax(-1)
    assert all(float((new - old).abs().max()) > 1e-3 for new in (*natural, *steepest))
    torch.testing.assert_close(natural[1], natural[0], rtol=0, atol=1e-8)
    assert float((steepest[1] - steepest[0]).abs().max()) > 0.05 * float((steepest[0] - old).abs().max())


def test_natural_steps_are_invariant_to_any_reparametrisation_in_the_first_order(problem: tabular.Problem) -> None:
    """Steps have length √δ: with a quarter of δ the policies move half as far and differ by a quarter."""
    exact, old = tabular_problem(*problem), problem.logits.softmax(-1)
    moves, gaps = [], []
    for max_kl in (1e-7, 1e-7 / 4):
        new = [f(phi + exact.natural_step(f, phi, max_kl)).softmax(-1) for f, phi in (plain(problem), cubic(problem))]
        moves.append(float((new[0] - old).norm()))
        gaps.append(float((new[1] - new[0]).norm()))
    assert moves[0] / moves[1] == pytest.approx(2.0, rel=0.02)
    assert gaps[0] / gaps[1] == pytest.approx(4.0, rel=0.02)


def test_full_natural_steps_have_the_kl_of_the_trust_region_and_the_expected_improvement(
    problem: tabular.Problem,
) -> None:
    """For small δ: KL → δ, and L improves by gᵀd, which is more than any other step of this KL improves it."""
    exact, (logits_of, phi) = tabular_problem(*problem), plain(problem)
    step, gradient = exact.natural_step(logits_of, phi, max_kl=1e-8), exact.gradient(logits_of, phi)
    assert exact.kl(logits_of(phi + step)) == pytest.approx(1e-8, rel=1e-2)
    improvement = exact.improvement(logits_of(phi + step))
    assert improvement == pytest.approx(float(gradient @ step), rel=1e-2)
    for seed in range(5):
        other = normal(seed, len(phi)) + (gradient if seed == 0 else 0.0)
        other *= math.sqrt(1e-8 / exact.kl(logits_of(phi + 1e-3 * other))) * 1e-3
        assert exact.improvement(logits_of(phi + other)) < improvement


@pytest.mark.parametrize("max_kl", [0.01, 0.1])
def test_trpo_steps_stay_in_the_trust_region_and_reach_a_better_policy(problem: tabular.Problem, max_kl: float) -> None:
    mdp, logits = problem.mdp, problem.logits
    start = float(mdp.objective(logits.softmax(-1)))
    for _ in range(12):
        exact = tabular_problem(mdp, logits)
        # damped as in practice: where the policy is deterministic by now, F is zero
        step = exact.natural_step(*plain(exact.problem), max_kl, damping=1e-3).view(logits.shape)
        evaluate = exact.evaluator(exact.improvement, step)
        found = backtracking_line_search(evaluate, max_kl=max_kl)
        assert found.accepted and found.improvement > 0.0 and found.kl <= max_kl
        assert (found.improvement, found.kl) == evaluate(found.fraction)
        logits = logits + found.fraction * step
    assert float(mdp.objective(logits.softmax(-1))) > start + 0.05


def test_minorisation_maximisation_along_natural_gradients_improves_monotonically(problem: tabular.Problem) -> None:
    """Rounds of M = L − C KL^max > 0 by a line search: J grows in each, by no less than M promised."""
    mdp, logits = problem.mdp, problem.logits
    start = current = float(mdp.objective(logits.softmax(-1)))
    for _ in range(15):
        exact = tabular_problem(mdp, logits)
        step = exact.natural_step(*plain(exact.problem), max_kl=1e-3).view(logits.shape)

        def bound(new: Tensor, batch: tabular.Batch = exact.batch) -> float:
            return float(tabular.lower_bound(batch, new, batch.penalty()))

        found = backtracking_line_search(exact.evaluator(bound, step), max_kl=math.inf, max_steps=40)
        assert found.accepted
        logits = logits + found.fraction * step
        improved = float(mdp.objective(logits.softmax(-1)))
        assert improved - current >= found.improvement > 0.0
        current = improved
    assert current > start
