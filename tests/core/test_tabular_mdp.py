"""The theory on random tabular MDPs, where every expectation is a finite sum, through the package's own functions.

V, Q, A and the visitation distribution come from linear solves; trajectories of a few steps are enumerated with their
probabilities. The package supplies the estimators, the losses and the KL. All of it in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sb3_pgplus.core.advantages import gae, monte_carlo_advantages, n_step_advantages, td_errors
from sb3_pgplus.core.distributions import kl_categorical
from sb3_pgplus.core.losses import clip_fraction, clipped_surrogate, kl_penalized_surrogate, surrogate

F64 = torch.float64


@dataclass(frozen=True)
class MDP:
    """`transitions[s, a, s']` may sum to less than one: the rest is the probability of termination."""

    transitions: Tensor  # [S, A, S]
    rewards: Tensor  # [S, A]
    start: Tensor  # [S]
    gamma: float

    @property
    def n_states(self) -> int:
        return self.rewards.shape[0]

    @property
    def n_actions(self) -> int:
        return self.rewards.shape[1]

    def chain(self, policy: Tensor) -> tuple[Tensor, Tensor]:
        """I - gamma P_pi [S, S] and r_pi [S] of the Markov chain under a policy [S, A]."""
        step = torch.einsum("sa,sat->st", policy, self.transitions)
        return torch.eye(self.n_states, dtype=F64) - self.gamma * step, (policy * self.rewards).sum(-1)

    def value(self, policy: Tensor) -> Tensor:
        return torch.linalg.solve(*self.chain(policy))

    def action_value(self, policy: Tensor) -> Tensor:
        return self.rewards + self.gamma * self.transitions @ self.value(policy)

    def advantage(self, policy: Tensor) -> Tensor:
        return self.action_value(policy) - self.value(policy).unsqueeze(-1)

    def visitation(self, policy: Tensor) -> Tensor:
        """d_pi(s) = (1 - gamma) sum_t gamma^t P(s_t = s), the episode not yet over."""
        return (1.0 - self.gamma) * torch.linalg.solve(self.chain(policy)[0].T, self.start)

    def objective(self, policy: Tensor) -> Tensor:
        """J(pi) = E sum_t gamma^t r_t, differentiable in the policy."""
        return self.start @ self.value(policy)


class Problem(NamedTuple):
    mdp: MDP
    logits: Tensor  # of the old policy, [S, A]


#      seed, states, actions, gamma, terminates
SIZES = [
    (0, 4, 2, 0.9, False),
    (1, 5, 3, 0.8, False),
    (2, 6, 2, 0.95, True),
    (3, 4, 3, 0.95, True),
    (4, 6, 3, 0.9, False),
]


@pytest.fixture(params=SIZES, ids=lambda p: f"seed{p[0]}-S{p[1]}-A{p[2]}-gamma{p[3]}-{'ends' if p[4] else 'endless'}")
def problem(request: pytest.FixtureRequest) -> Problem:
    seed, n_states, n_actions, gamma, terminates = request.param
    rng = torch.Generator().manual_seed(seed)
    transitions = torch.randn(n_states, n_actions, n_states, generator=rng, dtype=F64).mul(1.5).softmax(-1)
    survival = 1.0 - 0.3 * torch.rand(n_states, n_actions, 1, generator=rng, dtype=F64) * terminates
    rewards = torch.randn(n_states, n_actions, generator=rng, dtype=F64)
    start = torch.randn(n_states, generator=rng, dtype=F64).softmax(-1)
    logits = torch.randn(n_states, n_actions, generator=rng, dtype=F64)
    return Problem(MDP(transitions * survival, rewards, start, gamma), logits)


def direction(problem: Problem, seed: int = 0) -> Tensor:
    return torch.randn(problem.logits.shape, generator=torch.Generator().manual_seed(100 + seed), dtype=F64)


# ---------------------------------------------------------------------------------------------------------------------
# Every trajectory of a few steps, one per column, with its probability


class Trajectories(NamedTuple):
    states: Tensor  # [T + 1, M]; the state `n_states` means that the episode has terminated
    actions: Tensor  # [T, M]
    probability: Tensor  # [M], given the first state and the first action

    def rollout(self, mdp: MDP, values: Tensor, last_values: Tensor, truncated: bool) -> tuple[Tensor, ...]:
        """Rewards, values, next values, dones [T, M] for one critic inside the rollout and one where it ends.

        After a termination the column goes on with numbers that belong to another episode and must not count.
        """
        n_steps = self.actions.shape[0]
        here, there = self.states[:-1], self.states[1:]
        alive = here < mdp.n_states
        dones = there == mdp.n_states
        padded = torch.cat([values, torch.tensor([123.0], dtype=F64)])
        state_rewards = torch.cat([mdp.rewards, torch.full((1, mdp.n_actions), -321.0, dtype=F64)])
        next_values = torch.where(dones & alive, 0.0, padded[there])
        last_padded = torch.cat([last_values, torch.zeros(1, dtype=F64)])
        next_values[n_steps - 1] = last_padded[there[-1]]
        dones[n_steps - 1] |= truncated
        return state_rewards[here, self.actions], padded[here], next_values, dones

    def expectation(self, mdp: MDP, per_trajectory: Tensor) -> Tensor:
        """E[x | s_0 = s, a_0 = a], [S, A]."""
        index = self.states[0] * mdp.n_actions + self.actions[0]
        total = torch.zeros(mdp.n_states * mdp.n_actions, dtype=F64)
        total.index_add_(0, index, self.probability * per_trajectory)
        return total.reshape(mdp.n_states, mdp.n_actions)


def enumerate_trajectories(mdp: MDP, policy: Tensor, n_steps: int) -> Trajectories:
    """All (s_0, a_0, s_1, ..., s_T); once the episode has terminated there is one way to go on."""
    ending = 1.0 - mdp.transitions.sum(-1, keepdim=True)
    outcomes = torch.cat([mdp.transitions, ending.clamp(min=0.0)], dim=-1)  # [S, A, S + 1]
    stay = torch.zeros(1, mdp.n_actions, mdp.n_states + 1, dtype=F64)
    stay[..., -1] = 1.0
    outcomes = torch.cat([outcomes, stay])
    only_first = torch.eye(mdp.n_actions, dtype=F64)[:1]
    choices = torch.cat([policy, only_first])

    grid = torch.cartesian_prod(torch.arange(mdp.n_states), torch.arange(mdp.n_actions))
    states, actions = [grid[:, 0]], [grid[:, 1]]
    probability = torch.ones(len(grid), dtype=F64)
    for step in range(n_steps):
        if step > 0:
            probability, states, actions, action = _branch(probability, choices[states[-1]], states, actions)
            actions.append(action)
        probability, states, actions, state = _branch(probability, outcomes[states[-1], actions[-1]], states, actions)
        states.append(state)
    return Trajectories(torch.stack(states), torch.stack(actions), probability)


def _branch(
    probability: Tensor, weights: Tensor, states: list[Tensor], actions: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Split every column into its possible continuations (`weights` [M, K]), leaving out the impossible ones."""
    column, choice = weights.nonzero(as_tuple=True)
    kept = probability[column] * weights[column, choice]
    return kept, [x[column] for x in states], [x[column] for x in actions], choice


# ---------------------------------------------------------------------------------------------------------------------
# The exact quantities themselves


def test_exact_quantities_satisfy_their_definitions(problem: Problem) -> None:
    """The oracle is checked too: Bellman equations, E_pi A = 0, and J = E_{d_pi} r_pi / (1 - gamma)."""
    mdp, policy = problem.mdp, problem.logits.softmax(-1)
    value, zero = mdp.value(policy), torch.zeros(mdp.n_states, dtype=F64)
    torch.testing.assert_close((policy * mdp.action_value(policy)).sum(-1), value)
    torch.testing.assert_close((policy * mdp.advantage(policy)).sum(-1), zero, rtol=0, atol=1e-12)
    from_visits = mdp.visitation(policy) @ (policy * mdp.rewards).sum(-1) / (1.0 - mdp.gamma)
    torch.testing.assert_close(from_visits, mdp.objective(policy))


@pytest.mark.parametrize("n_steps", [1, 2, 3])
def test_enumerated_probabilities_sum_to_one(problem: Problem, n_steps: int) -> None:
    trajectories = enumerate_trajectories(problem.mdp, problem.logits.softmax(-1), n_steps)
    total = trajectories.expectation(problem.mdp, torch.ones_like(trajectories.probability))
    torch.testing.assert_close(total, torch.ones_like(total))


# ---------------------------------------------------------------------------------------------------------------------
# 1. Estimators: expectation, bias and variance by enumeration


@pytest.mark.parametrize("truncated", [False, True], ids=["rollout_ends", "time_limit"])
@pytest.mark.parametrize("n_steps", [1, 2, 3])
def test_expected_monte_carlo_advantage_is_the_advantage_of_the_policy(
    problem: Problem, n_steps: int, truncated: bool
) -> None:
    """E[Psi | s, a] = A(s, a), whether the steps end with the rollout or with a time limit: both bootstrap V."""
    mdp, policy = problem.mdp, problem.logits.softmax(-1)
    trajectories = enumerate_trajectories(mdp, policy, n_steps)
    value = mdp.value(policy)
    estimates = monte_carlo_advantages(*trajectories.rollout(mdp, value, value, truncated), gamma=mdp.gamma)
    expected = trajectories.expectation(mdp, estimates[0])
    torch.testing.assert_close(expected, mdp.advantage(policy), rtol=0, atol=1e-11)


def test_expected_monte_carlo_advantage_does_not_depend_on_the_critic_in_between(problem: Problem) -> None:
    """With lambda = 1 a wrong critic V' inside the rollout shifts the baseline only: E Psi = Q(s, a) - V'(s)."""
    mdp, policy = problem.mdp, problem.logits.softmax(-1)
    wrong = 5.0 * direction(problem)[:, 0]
    trajectories = enumerate_trajectories(mdp, policy, 3)
    rollout = trajectories.rollout(mdp, wrong, mdp.value(policy), truncated=False)
    expected = trajectories.expectation(mdp, monte_carlo_advantages(*rollout, gamma=mdp.gamma)[0])
    torch.testing.assert_close(expected, mdp.action_value(policy) - wrong.unsqueeze(-1), rtol=0, atol=1e-11)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
def test_gae_is_unbiased_for_every_lambda_when_the_critic_is_exact(problem: Problem, gae_lambda: float) -> None:
    mdp, policy = problem.mdp, problem.logits.softmax(-1)
    trajectories = enumerate_trajectories(mdp, policy, 3)
    value = mdp.value(policy)
    estimates = gae(*trajectories.rollout(mdp, value, value, False), gamma=mdp.gamma, gae_lambda=gae_lambda)
    expected = trajectories.expectation(mdp, estimates[0])
    torch.testing.assert_close(expected, mdp.advantage(policy), rtol=0, atol=1e-11)


def test_one_step_estimate_with_a_wrong_critic_is_the_one_step_bellman_error(problem: Problem) -> None:
    """E delta = r + gamma P V' - V': the bias of TD is that of the critic at the next state."""
    mdp, policy = problem.mdp, problem.logits.softmax(-1)
    wrong = mdp.value(policy) + direction(problem)[:, 0]
    trajectories = enumerate_trajectories(mdp, policy, 1)
    rewards, values, next_values, _ = trajectories.rollout(mdp, wrong, wrong, truncated=False)
    expected = trajectories.expectation(mdp, td_errors(rewards, values, next_values, gamma=mdp.gamma)[0])
    by_definition = mdp.rewards + mdp.gamma * mdp.transitions @ wrong - wrong.unsqueeze(-1)
    torch.testing.assert_close(expected, by_definition, rtol=0, atol=1e-12)


@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_bias_of_n_steps_is_at_most_gamma_to_the_n_times_the_error_of_the_critic(
    problem: Problem, horizon: int
) -> None:
    mdp, policy = problem.mdp, problem.logits.softmax(-1)
    error = direction(problem)[:, 0]
    wrong = mdp.value(policy) + error
    trajectories = enumerate_trajectories(mdp, policy, 3)
    rollout = trajectories.rollout(mdp, wrong, wrong, truncated=False)
    estimates = n_step_advantages(*rollout, gamma=mdp.gamma, horizon=horizon)
    bias = trajectories.expectation(mdp, estimates[0]) - (mdp.action_value(policy) - wrong.unsqueeze(-1))
    assert float(bias.abs().max()) <= mdp.gamma**horizon * float(error.abs().max()) + 1e-12
    assert float(bias.abs().max()) > 0.0


def test_variance_grows_with_the_horizon_when_the_critic_is_exact(problem: Problem) -> None:
    """With the exact critic TD errors are martingale differences: the variances of Psi_(1), Psi_(2), ... add up."""
    mdp, policy = problem.mdp, problem.logits.softmax(-1)
    value, advantage = mdp.value(policy), mdp.advantage(policy)
    trajectories = enumerate_trajectories(mdp, policy, 3)
    rollout = trajectories.rollout(mdp, value, value, truncated=False)
    variances = []
    for horizon in (1, 2, 3):
        estimates = n_step_advantages(*rollout, gamma=mdp.gamma, horizon=horizon)[0]
        variances.append(trajectories.expectation(mdp, estimates.square()) - advantage.square())
    deltas = td_errors(*rollout[:3], gamma=mdp.gamma)
    alive = trajectories.states[1] < mdp.n_states
    second = trajectories.expectation(mdp, (mdp.gamma * deltas[1] * alive).square())
    torch.testing.assert_close(variances[1] - variances[0], second, rtol=0, atol=1e-10)
    assert (variances[1] >= variances[0] - 1e-12).all()
    assert (variances[2] >= variances[1] - 1e-12).all()
    assert float((variances[2] - variances[0]).max()) > 1e-3


def test_complete_episodes_need_no_bootstrap(problem: Problem) -> None:
    """In an MDP that terminates after three steps Monte Carlo with any critic V' gives Q_0(s, a) - V'(s)."""
    mdp, policy = problem.mdp, problem.logits.softmax(-1)
    to_go = torch.zeros(mdp.n_states, dtype=F64)  # backward induction from the last step, where the rest is 0
    for _ in range(3):
        action_value = mdp.rewards + mdp.gamma * mdp.transitions @ to_go
        to_go = (policy * action_value).sum(-1)
    wrong = direction(problem)[:, 0]
    trajectories = enumerate_trajectories(mdp, policy, 3)
    rollout = trajectories.rollout(mdp, wrong, torch.zeros(mdp.n_states, dtype=F64), truncated=True)
    expected = trajectories.expectation(mdp, monte_carlo_advantages(*rollout, gamma=mdp.gamma)[0])
    torch.testing.assert_close(expected, action_value - wrong.unsqueeze(-1), rtol=0, atol=1e-11)


# ---------------------------------------------------------------------------------------------------------------------
# 2. - 4. Surrogate: one entry per state and action, the batch mean turned into an expectation


class Batch(NamedTuple):
    """B = S A entries; `advantages` are B d_old(s) pi_old(a|s) A(s, a) / (1 - gamma), so that mean(ratio A) = L."""

    mdp: MDP
    old_logits: Tensor
    advantages: Tensor

    def policy(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def ratio(self, logits: Tensor) -> Tensor:
        return (logits.log_softmax(-1) - self.old_logits.log_softmax(-1)).exp().flatten()

    def objective(self, logits: Tensor) -> Tensor:
        return self.mdp.objective(logits.softmax(-1))

    def surrogate(self, logits: Tensor) -> Tensor:
        """L(theta) of the theory, which is to be maximised: the package's loss is its negative."""
        return -surrogate(self.ratio(logits), self.advantages)

    def max_kl(self, logits: Tensor) -> Tensor:
        return kl_categorical(self.old_logits, logits).max()

    def penalty(self) -> float:
        """C = 4 gamma max|A| / (1 - gamma)^2."""
        largest = float(self.mdp.advantage(self.old_logits.softmax(-1)).abs().max())
        return 4.0 * self.mdp.gamma * largest / (1.0 - self.mdp.gamma) ** 2


def estimated_advantage(mdp: MDP, policy: Tensor) -> Tensor:
    """A(s, a) as the package estimates it: the expectation of its Monte Carlo advantages over two steps."""
    trajectories, value = enumerate_trajectories(mdp, policy, 2), mdp.value(policy)
    rollout = trajectories.rollout(mdp, value, value, truncated=False)
    return trajectories.expectation(mdp, monte_carlo_advantages(*rollout, gamma=mdp.gamma)[0])


def make_batch(mdp: MDP, old_logits: Tensor) -> Batch:
    old = old_logits.softmax(-1)
    weights = mdp.visitation(old).unsqueeze(-1) * old * old.numel() / (1.0 - mdp.gamma)
    return Batch(mdp, old_logits, (weights * estimated_advantage(mdp, old)).flatten())


def gradient(function: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(function, logits)[0]


@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0])
def test_relative_performance_identity(problem: Problem, scale: float) -> None:
    """J(new) - J(old) = 1 / (1 - gamma) E_{d_new} E_new A_old, with A_old from the package's estimator."""
    mdp, old = problem.mdp, problem.logits.softmax(-1)
    new_logits = problem.logits + scale * direction(problem)
    new = new_logits.softmax(-1)
    difference = float(mdp.objective(new) - mdp.objective(old))
    advantage = estimated_advantage(mdp, old)
    expected = float(mdp.visitation(new) @ (new * advantage).sum(-1)) / (1.0 - mdp.gamma)
    assert difference == pytest.approx(expected, abs=1e-9)
    # The same with actions of the old policy and their ratios, as the package's surrogate writes it.
    weights = mdp.visitation(new).unsqueeze(-1) * old * old.numel() / (1.0 - mdp.gamma)
    ratio = (new_logits.log_softmax(-1) - problem.logits.log_softmax(-1)).exp()
    by_ratio = -float(surrogate(ratio.flatten(), (weights * advantage).flatten()))
    assert difference == pytest.approx(by_ratio, abs=1e-9)
    assert abs(difference) > 1e-6


def test_surrogate_is_zero_at_the_old_policy(problem: Problem) -> None:
    """L(theta_old) = 1 / (1 - gamma) E A_old = 0: the bound touches J there."""
    assert float(make_batch(*problem).surrogate(problem.logits)) == pytest.approx(0.0, abs=1e-11)


def test_gradient_of_every_surrogate_at_the_old_policy_is_the_gradient_of_the_objective(problem: Problem) -> None:
    """grad L(theta_old) = grad J(theta_old): J by differentiating the linear solve, L through the package's losses."""
    batch, logits = make_batch(*problem), problem.logits.clone().requires_grad_()
    expected = gradient(batch.objective(logits), logits)
    assert float(expected.norm()) > 1e-3
    n_actions = problem.mdp.n_actions
    kl = kl_categorical(batch.old_logits, logits).repeat_interleave(n_actions)
    ratio = batch.ratio(logits)
    for loss in (
        surrogate(ratio, batch.advantages),
        clipped_surrogate(ratio, batch.advantages, clip_range=0.2),
        kl_penalized_surrogate(ratio, batch.advantages, kl, kl_coef=10.0),
    ):
        actual = torch.autograd.grad(-loss, logits, retain_graph=True)[0]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


def test_gradient_is_the_policy_gradient_theorem(problem: Problem) -> None:
    """grad J = 1 / (1 - gamma) E_{d_pi} E_pi grad log pi A."""
    mdp, logits = problem.mdp, problem.logits.clone().requires_grad_()
    policy = problem.logits.softmax(-1)
    weights = mdp.visitation(policy).unsqueeze(-1) * policy * estimated_advantage(mdp, policy) / (1.0 - mdp.gamma)
    by_theorem = gradient((weights * logits.log_softmax(-1)).sum(), logits)
    by_solve = gradient(mdp.objective(logits.softmax(-1)), logits)
    torch.testing.assert_close(by_theorem, by_solve, rtol=0, atol=1e-9)


def test_surrogate_is_wrong_to_second_order_only(problem: Problem) -> None:
    """Away from theta_old the visitation changes: J - J_old - L = O(step^2), a quarter for half the step."""
    batch = make_batch(*problem)
    old = batch.objective(problem.logits)
    gaps = []
    for step in (1e-3, 5e-4):
        logits = problem.logits + step * direction(problem)
        gaps.append(float(batch.objective(logits) - old - batch.surrogate(logits)))
    assert gaps[0] != 0.0
    assert gaps[0] / gaps[1] == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [1e-3, 0.03, 0.3, 1.0, 3.0, 10.0])
def test_error_of_the_surrogate_is_bounded_by_the_largest_kl(problem: Problem, scale: float, seed: int) -> None:
    """|J(new) - J(old) - L| <= C KL^max(old || new) for small steps and large ones alike."""
    batch = make_batch(*problem)
    logits = problem.logits + scale * direction(problem, seed)
    gap = abs(float(batch.objective(logits) - batch.objective(problem.logits) - batch.surrogate(logits)))
    bound = batch.penalty() * float(batch.max_kl(logits))
    assert 0.0 < gap <= bound


def test_bound_is_not_met_by_a_tiny_constant(problem: Problem) -> None:
    """The bound has a subject: at some step the gap is a visible part of max|A| KL^max / (1 - gamma)."""
    batch = make_batch(*problem)
    largest = float(problem.mdp.advantage(problem.logits.softmax(-1)).abs().max())
    shares = []
    for seed in range(4):
        logits = problem.logits + 0.3 * direction(problem, seed)
        gap = abs(float(batch.objective(logits) - batch.objective(problem.logits) - batch.surrogate(logits)))
        shares.append(gap * (1.0 - problem.mdp.gamma) / (largest * float(batch.max_kl(logits))))
    assert max(shares) > 0.01


# ---------------------------------------------------------------------------------------------------------------------
# 5. Minorisation-maximisation


def lower_bound(batch: Batch, logits: Tensor, coefficient: float) -> Tensor:
    """M(theta) = L(theta) - C KL^max, by the package's loss with the largest KL in every entry."""
    kl = batch.max_kl(logits).expand(batch.advantages.shape)
    return -kl_penalized_surrogate(batch.ratio(logits), batch.advantages, kl, kl_coef=coefficient)


def maximise_lower_bound(batch: Batch, n_steps: int = 4) -> Tensor:
    """Gradient ascent that halves its step until the bound grows, so the result is never below M(theta_old) = 0."""
    coefficient, logits, step = batch.penalty(), batch.old_logits.clone(), 1.0
    for _ in range(n_steps):
        point = logits.clone().requires_grad_()
        current = lower_bound(batch, point, coefficient)
        slope = gradient(current, point)
        while step > 1e-12 and lower_bound(batch, logits + step * slope, coefficient) <= current:
            step /= 2.0
        if step <= 1e-12:
            break
        logits = logits + step * slope
        step *= 4.0
    return logits


def test_minorisation_maximisation_improves_monotonically(problem: Problem) -> None:
    """Twenty rounds: J grows in each, and by no less than the lower bound promised."""
    mdp, logits = problem.mdp, problem.logits
    start = current = float(mdp.objective(logits.softmax(-1)))
    for _ in range(20):
        batch = make_batch(mdp, logits)
        logits = maximise_lower_bound(batch)
        promised = float(lower_bound(batch, logits, batch.penalty()))
        improved = float(mdp.objective(logits.softmax(-1)))
        assert promised > 0.0
        assert improved - current >= promised
        current = improved
    assert current > start


# ---------------------------------------------------------------------------------------------------------------------
# 6. Clipping


def test_one_step_on_the_clipped_surrogate_ascends_inside_the_clip_region(problem: Problem) -> None:
    batch, logits = make_batch(*problem), problem.logits.clone().requires_grad_()
    loss = clipped_surrogate(batch.ratio(logits), batch.advantages, clip_range=0.2)
    slope = gradient(-loss, logits)
    # d log pi(a|s) = d theta(s, a) - E_pi d theta(s), so a step of at most 0.05 moves log pi by at most 0.1 < log 1.2
    stepped = problem.logits + 0.05 * slope / slope.abs().max()
    assert float(clip_fraction(batch.ratio(stepped), clip_range=0.2)) == 0.0
    assert float(batch.objective(stepped)) > float(batch.objective(problem.logits))
    after = clipped_surrogate(batch.ratio(stepped), batch.advantages, clip_range=0.2)
    assert float(after) < float(loss.detach())
    torch.testing.assert_close(after, surrogate(batch.ratio(stepped), batch.advantages))


def test_clipping_stops_the_policy_where_the_plain_surrogate_runs_on() -> None:
    """One state, two equally likely actions, the first better: the ratios are 2 p and 2 (1 - p).

    Both leave the clip range at p = (1 + 0.2) / 2 = 0.6, where the gradient vanishes; without a clip p goes on to 1.
    """
    mdp = MDP(torch.zeros(1, 2, 1, dtype=F64), torch.tensor([[1.0, -1.0]], dtype=F64), torch.ones(1, dtype=F64), 0.0)
    batch = make_batch(mdp, torch.zeros(1, 2, dtype=F64))
    learning_rate = 0.1
    reached = {}
    for name in ("clipped", "plain"):
        logits = torch.zeros(1, 2, dtype=F64)
        for _ in range(500):
            point = logits.clone().requires_grad_()
            ratio = batch.ratio(point)
            if name == "clipped":
                loss = clipped_surrogate(ratio, batch.advantages, clip_range=0.2)
            else:
                loss = surrogate(ratio, batch.advantages)
            slope = gradient(loss, point)
            logits = logits - learning_rate * slope
        reached[name] = float(logits.softmax(-1)[0, 0])
        if name == "clipped":
            assert torch.equal(slope, torch.zeros_like(slope))
    # J = 2 p - 1 has a slope of at most 1/2 in each logit and dp = p (1 - p) d(l_1 - l_2) <= (0.1 + 0.1) / 2 / 4
    assert 0.6 <= reached["clipped"] <= 0.6 + learning_rate / 4
    assert reached["plain"] > 0.95
