"""Advantage estimators: hand-derived values, identities, a plain loop and SB3's rollout buffer as oracles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_pgplus.core.advantages import (
    discounted_returns,
    gae,
    gae_sequential,
    monte_carlo_advantages,
    n_step_advantages,
    normalize,
    td_errors,
)

F64 = torch.float64
SEEDS = (0, 1, 2)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
GAMMA_LAMBDA = ((0.99, 0.95), (0.98, 0.8), (0.5, 0.5), (1.0, 1.0), (0.9, 0.0), (0.0, 0.9), (1.0, 0.3), (0.3, 1.0))


class Rollout(NamedTuple):
    """`rewards`, `values`, `next_values`, `dones`, each [T, N]: the positional arguments of the estimators."""

    rewards: Tensor
    values: Tensor
    next_values: Tensor
    dones: Tensor


def random_rollout(seed: int, n_steps: int, n_envs: int, *, dtype: torch.dtype = F64, end: float = 0.15) -> Rollout:
    """Random numbers with terminated (bootstrap 0) and truncated (bootstrap: a value of its own) steps in between."""
    rng = torch.Generator().manual_seed(seed)
    rewards = torch.randn(n_steps, n_envs, generator=rng, dtype=F64)
    values = torch.randn(n_steps + 1, n_envs, generator=rng, dtype=F64)
    final_values = torch.randn(n_steps, n_envs, generator=rng, dtype=F64)
    terminated = torch.rand(n_steps, n_envs, generator=rng) < end / 2
    truncated = (torch.rand(n_steps, n_envs, generator=rng) < end / 2) & ~terminated
    next_values = torch.where(truncated, final_values, values[1:]) * ~terminated
    return Rollout(rewards.to(dtype), values[:-1].to(dtype), next_values.to(dtype), terminated | truncated)


def gae_by_loop(rollout: Rollout, gamma: float, gae_lambda: float) -> Tensor:
    """A_t = delta_t + gamma lambda (1 - done_t) A_{t+1}, step by step in float64."""
    rewards, values, next_values, dones = (x.to("cpu", F64).numpy() for x in rollout)
    advantages = np.zeros_like(rewards)
    following = np.zeros(rewards.shape[1])
    for t in reversed(range(rewards.shape[0])):
        delta = rewards[t] + gamma * next_values[t] - values[t]
        following = delta + gamma * gae_lambda * (1.0 - dones[t]) * following
        advantages[t] = following
    return torch.from_numpy(advantages)


def n_step_by_definition(rollout: Rollout, gamma: float, horizon: int) -> Tensor:
    """r_t + ... + gamma^{m-1} r_{t+m-1} + gamma^m bootstrap - V(s_t), m cut at the episode's and the rollout's end."""
    rewards, values, next_values, dones = (x.to(F64) for x in rollout)
    n_steps, n_envs = rewards.shape
    advantages = torch.empty_like(rewards)
    for env in range(n_envs):
        for t in range(n_steps):
            total, discount, k = 0.0, 1.0, t
            while True:
                total += discount * float(rewards[k, env])
                discount *= gamma
                if k - t + 1 == horizon or k == n_steps - 1 or dones[k, env]:
                    break
                k += 1
            advantages[t, env] = total + discount * float(next_values[k, env]) - float(values[t, env])
    return advantages


def steps_left(dones: Tensor) -> Tensor:
    """K[t]: number of steps of the trace that starts at t, up to and with the end of its episode or the rollout."""
    left = torch.ones_like(dones, dtype=torch.long)
    for t in reversed(range(dones.shape[0] - 1)):
        left[t] = torch.where(dones[t].bool(), 1, left[t + 1] + 1)
    return left


def column(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=F64).unsqueeze(1)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Error relative to the largest number that appears, absolute where that is below 1."""
    assert actual.shape == expected.shape
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(actual.to("cpu", F64), expected.to("cpu", F64), rtol=0.0, atol=tolerance * scale)


# ---------------------------------------------------------------------------------------------------------------------
# Hand-derived: four steps, gamma = lambda = 1/2, so every number is a dyadic fraction and equality is exact
#
#   t                 0   1   2   3
#   r_t               1   2   4   8
#   V(s_t)            2   4   6   8      V(s_4) = 10
#   delta_t (no end)  1 + 4/2 - 2 = 1    2 + 6/2 - 4 = 1    4 + 8/2 - 6 = 2    8 + 10/2 - 8 = 5
#   terminated at 1:  delta_1 = 2 + 0 - 4 = -2
#   truncated at 1:   V(s_T) = 12 of the final observation, delta_1 = 2 + 12/2 - 4 = 4

R, V = column(1, 2, 4, 8), column(2, 4, 6, 8)
GOES_ON = Rollout(R, V, column(4, 6, 8, 10), column(0, 0, 0, 0).bool())
TERMINATED = Rollout(R, V, column(4, 0, 8, 10), column(0, 1, 0, 0).bool())
TRUNCATED = Rollout(R, V, column(4, 12, 8, 10), column(0, 1, 0, 0).bool())

HAND_GAE = {
    # A_3 = 5, A_2 = 2 + 5/4 = 3.25, A_1 = 1 + 3.25/4 = 1.8125, A_0 = 1 + 1.8125/4 = 1.453125
    "goes_on": (GOES_ON, column(1.453125, 1.8125, 3.25, 5.0)),
    # A_1 = delta_1 = -2 (nothing from step 2), A_0 = 1 - 2/4 = 0.5
    "terminated": (TERMINATED, column(0.5, -2.0, 3.25, 5.0)),
    # A_1 = delta_1 = 4 (nothing from step 2), A_0 = 1 + 4/4 = 2
    "truncated": (TRUNCATED, column(2.0, 4.0, 3.25, 5.0)),
}
HAND_TD = {
    "goes_on": (GOES_ON, column(1, 1, 2, 5)),
    "terminated": (TERMINATED, column(1, -2, 2, 5)),
    "truncated": (TRUNCATED, column(1, 4, 2, 5)),
}
HAND_MONTE_CARLO = {
    # A_0 = 1 + 2/2 + 4/4 + 8/8 + 10/16 - 2 = 2.625     A_1 = 2 + 4/2 + 8/4 + 10/8 - 4 = 3.25
    # A_2 = 4 + 8/2 + 10/4 - 6 = 4.5                     A_3 = 8 + 10/2 - 8 = 5
    "goes_on": (GOES_ON, column(2.625, 3.25, 4.5, 5.0)),
    # A_0 = 1 + 2/2 - 2 = 0                              A_1 = 2 - 4 = -2
    "terminated": (TERMINATED, column(0.0, -2.0, 4.5, 5.0)),
    # A_0 = 1 + 2/2 + 12/4 - 2 = 3                       A_1 = 2 + 12/2 - 4 = 4
    "truncated": (TRUNCATED, column(3.0, 4.0, 4.5, 5.0)),
}
HAND_TWO_STEP = {
    # A_0 = 1 + 2/2 + 6/4 - 2 = 1.5    A_1 = 2 + 4/2 + 8/4 - 4 = 2    A_2 = 4 + 8/2 + 10/4 - 6 = 4.5
    # A_3 = 8 + 10/2 - 8 = 5: the rollout ends after one step
    "goes_on": (GOES_ON, column(1.5, 2.0, 4.5, 5.0)),
    # A_0 = 1 + 2/2 + 0 - 2 = 0        A_1 = 2 - 4 = -2: the episode ends after one step
    "terminated": (TERMINATED, column(0.0, -2.0, 4.5, 5.0)),
    # A_0 = 1 + 2/2 + 12/4 - 2 = 3     A_1 = 2 + 12/2 - 4 = 4
    "truncated": (TRUNCATED, column(3.0, 4.0, 4.5, 5.0)),
}


@pytest.mark.parametrize("case", HAND_GAE)
@pytest.mark.parametrize("estimator", [gae, gae_sequential])
def test_gae_equals_the_hand_derived_numbers(estimator: Callable[..., Tensor], case: str) -> None:
    rollout, expected = HAND_GAE[case]
    torch.testing.assert_close(estimator(*rollout, gamma=0.5, gae_lambda=0.5), expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", HAND_TD)
def test_td_errors_equal_the_hand_derived_numbers(case: str) -> None:
    rollout, expected = HAND_TD[case]
    torch.testing.assert_close(td_errors(*rollout[:3], gamma=0.5), expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", HAND_MONTE_CARLO)
def test_monte_carlo_equals_the_hand_derived_numbers(case: str) -> None:
    rollout, expected = HAND_MONTE_CARLO[case]
    torch.testing.assert_close(monte_carlo_advantages(*rollout, gamma=0.5), expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", HAND_TWO_STEP)
def test_two_step_equals_the_hand_derived_numbers(case: str) -> None:
    rollout, expected = HAND_TWO_STEP[case]
    torch.testing.assert_close(n_step_advantages(*rollout, gamma=0.5, horizon=2), expected, rtol=0, atol=0)


def test_three_step_equals_the_hand_derived_numbers() -> None:
    # A_0 = 1 + 2/2 + 4/4 + 8/8 - 2 = 2, A_1 = 2 + 4/2 + 8/4 + 10/8 - 4 = 3.25, A_2 and A_3 shortened as above
    expected = column(2.0, 3.25, 4.5, 5.0)
    torch.testing.assert_close(n_step_advantages(*GOES_ON, gamma=0.5, horizon=3), expected, rtol=0, atol=0)


def test_termination_and_truncation_give_different_advantages() -> None:
    terminated = gae(*TERMINATED, gamma=0.5, gae_lambda=0.5)
    truncated = gae(*TRUNCATED, gamma=0.5, gae_lambda=0.5)
    # Step 1 differs by gamma V(s_T) = 12/2, step 0 by gamma lambda times that, the next episode not at all.
    torch.testing.assert_close(truncated - terminated, column(6 / 4, 6, 0, 0), rtol=0, atol=0)


def test_environments_in_one_rollout_do_not_mix() -> None:
    cases = [HAND_GAE[case] for case in ("goes_on", "terminated", "truncated")]
    together = Rollout(*(torch.cat(parts, dim=1) for parts in zip(*(case[0] for case in cases), strict=True)))
    expected = torch.cat([case[1] for case in cases], dim=1)
    torch.testing.assert_close(gae(*together, gamma=0.5, gae_lambda=0.5), expected, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Identities


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("estimator", [gae, gae_sequential])
def test_lambda_zero_is_the_td_error(estimator: Callable[..., Tensor], seed: int) -> None:
    rollout = random_rollout(seed, 31, 5)
    actual = estimator(*rollout, gamma=0.97, gae_lambda=0.0)
    torch.testing.assert_close(actual, td_errors(*rollout[:3], gamma=0.97), rtol=0, atol=1e-14)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("estimator", [gae, gae_sequential])
def test_lambda_one_is_monte_carlo(estimator: Callable[..., Tensor], seed: int) -> None:
    rollout = random_rollout(seed, 31, 5)
    actual = estimator(*rollout, gamma=0.97, gae_lambda=1.0)
    assert_close(actual, monte_carlo_advantages(*rollout, gamma=0.97), 1e-12)
    assert_close(actual, n_step_by_definition(rollout, 0.97, horizon=31), 1e-12)


def test_undiscounted_monte_carlo_is_the_sum_of_rewards_plus_bootstrap_minus_value() -> None:
    rollout = random_rollout(3, 64, 4, end=0.0)
    expected = rollout.rewards.sum(0) + rollout.next_values[-1] - rollout.values[0]
    assert_close(monte_carlo_advantages(*rollout, gamma=1.0)[0], expected, 1e-12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("horizon", [1, 2, 3, 7, 8, 30, 31, 32, 1000])
def test_n_step_equals_its_definition_shortened_at_episode_and_rollout_ends(horizon: int, seed: int) -> None:
    rollout = random_rollout(seed, 31, 5)
    actual = n_step_advantages(*rollout, gamma=0.9, horizon=horizon)
    assert_close(actual, n_step_by_definition(rollout, 0.9, horizon), 1e-12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("horizon", [1, 2, 5, 16, 40])
def test_n_step_telescopes_into_td_errors(horizon: int, seed: int) -> None:
    """Psi_(n)(s_t) = sum_{k=0}^{n-1} gamma^k delta_{t+k}: n terms, and none from beyond the trace's end."""
    rollout = random_rollout(seed, 24, 3)
    gamma, n_steps = 0.95, 24
    deltas, left = td_errors(*rollout[:3], gamma=gamma), steps_left(rollout.dones)
    expected = torch.zeros_like(deltas)
    for t in range(n_steps):
        for k in range(min(horizon, n_steps - t)):
            expected[t] += torch.where(k < left[t], gamma**k * deltas[t + k], 0.0)
    assert_close(n_step_advantages(*rollout, gamma=gamma, horizon=horizon), expected, 1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_horizon_one_is_td_and_horizon_of_the_rollout_is_monte_carlo(seed: int) -> None:
    rollout = random_rollout(seed, 20, 4)
    one = n_step_advantages(*rollout, gamma=0.97, horizon=1)
    longest = n_step_advantages(*rollout, gamma=0.97, horizon=20)
    assert_close(one, td_errors(*rollout[:3], gamma=0.97), 1e-14)
    assert_close(longest, monte_carlo_advantages(*rollout, gamma=0.97), 1e-12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("gae_lambda", [0.0, 0.3, 0.95, 1.0])
def test_gae_is_the_lambda_mixture_of_n_step_advantages(gae_lambda: float, seed: int) -> None:
    """(1 - lambda) sum_{n<K} lambda^{n-1} Psi_(n) + lambda^{K-1} Psi_(K), K the length of the trace from t."""
    n_steps, gamma = 17, 0.93
    rollout = random_rollout(seed, n_steps, 4)
    left = steps_left(rollout.dones)
    mixture, total_weight = torch.zeros_like(rollout.rewards), torch.zeros_like(rollout.rewards)
    for n in range(1, n_steps + 1):
        inside = torch.full_like(mixture, (1.0 - gae_lambda) * gae_lambda ** (n - 1))
        tail = torch.full_like(mixture, gae_lambda ** (n - 1))
        weight = torch.where(n < left, inside, torch.where(n == left, tail, 0.0))
        mixture += weight * n_step_advantages(*rollout, gamma=gamma, horizon=n)
        total_weight += weight
    torch.testing.assert_close(total_weight, torch.ones_like(total_weight))  # a mixture: the weights sum to one
    assert_close(gae(*rollout, gamma=gamma, gae_lambda=gae_lambda), mixture, 1e-12)


def test_gamma_zero_leaves_reward_minus_value() -> None:
    rollout = random_rollout(0, 12, 3)
    expected = rollout.rewards - rollout.values
    for actual in (
        td_errors(*rollout[:3], gamma=0.0),
        gae(*rollout, gamma=0.0, gae_lambda=0.95),
        n_step_advantages(*rollout, gamma=0.0, horizon=4),
        monte_carlo_advantages(*rollout, gamma=0.0),
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-15)


def test_perfect_critic_of_a_constant_reward_gives_zero_advantage() -> None:
    """Reward 1 for ever: V = 1 / (1 - gamma) everywhere, so every estimator says zero, truncated or not."""
    gamma = 0.9
    constant = torch.full((40, 3), 1.0 / (1.0 - gamma), dtype=F64)
    dones = random_rollout(0, 40, 3).dones  # all of them truncations: the bootstrap stays V
    rollout = Rollout(torch.ones_like(constant), constant, constant, dones)
    for actual in (
        gae(*rollout, gamma=gamma, gae_lambda=0.95),
        n_step_advantages(*rollout, gamma=gamma, horizon=5),
        monte_carlo_advantages(*rollout, gamma=gamma),
    ):
        torch.testing.assert_close(actual, torch.zeros_like(constant), rtol=0, atol=1e-12)


ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    "gae": lambda *rollout: gae(*rollout, gamma=0.97, gae_lambda=0.9),
    "gae_sequential": lambda *rollout: gae_sequential(*rollout, gamma=0.97, gae_lambda=0.9),
    "n_step": lambda *rollout: n_step_advantages(*rollout, gamma=0.97, horizon=5),
    "monte_carlo": lambda *rollout: monte_carlo_advantages(*rollout, gamma=0.97),
    "td": lambda *rollout: td_errors(*rollout[:3], gamma=0.97),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_done_cuts_the_trace_completely(name: str) -> None:
    """What happens after an episode's end changes nothing before it, bit for bit."""
    rollout = random_rollout(0, 20, 3, end=0.0)
    dones = rollout.dones.clone()
    dones[8] = True
    before = ESTIMATORS[name](*rollout[:3], dones)
    other = random_rollout(1, 20, 3, end=0.0)
    changed = [torch.cat([x[:9], 100.0 * y[9:]]) for x, y in zip(rollout[:3], other[:3], strict=True)]
    after = ESTIMATORS[name](*changed, dones)
    assert torch.equal(before[:9], after[:9])
    assert not torch.equal(before[9:], after[9:])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_advantage_depends_on_no_earlier_step_and_on_no_other_environment(name: str) -> None:
    rollout, other = random_rollout(0, 20, 3, end=0.0), random_rollout(1, 20, 3, end=0.0)
    reference = ESTIMATORS[name](*rollout)
    earlier = [torch.cat([100.0 * y[:7], x[7:]]) for x, y in zip(rollout[:3], other[:3], strict=True)]
    assert torch.equal(ESTIMATORS[name](*earlier, rollout.dones)[7:], reference[7:])
    neighbour = [torch.cat([x[:, :2], 100.0 * y[:, 2:]], 1) for x, y in zip(rollout[:3], other[:3], strict=True)]
    assert torch.equal(ESTIMATORS[name](*neighbour, rollout.dones)[:, :2], reference[:, :2])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_bool_and_float_dones_mean_the_same(name: str) -> None:
    rollout = random_rollout(0, 20, 3)
    as_float = ESTIMATORS[name](*rollout[:3], rollout.dones.to(F64))
    assert torch.equal(as_float, ESTIMATORS[name](*rollout))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_are_linear_in_rewards_and_values(name: str) -> None:
    a, b = random_rollout(0, 20, 3), random_rollout(1, 20, 3)
    mixed = [2.0 * x - 3.0 * y for x, y in zip(a[:3], b[:3], strict=True)]
    estimate = ESTIMATORS[name]
    expected = 2.0 * estimate(*a) - 3.0 * estimate(*b[:3], a.dones)
    assert_close(estimate(*mixed, a.dones), expected, 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# The fast path against a plain loop


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (F64, 1e-12)])
@pytest.mark.parametrize(
    ("n_steps", "n_envs"),
    [(1, 1), (1, 64), (2, 3), (3, 1), (7, 64), (8, 1), (15, 2), (16, 2), (17, 2), (128, 64), (333, 5), (2048, 1)],
)
def test_gae_equals_the_plain_loop(
    n_steps: int, n_envs: int, dtype: torch.dtype, tolerance: float, device: str
) -> None:
    for seed, (gamma, gae_lambda) in enumerate(GAMMA_LAMBDA):
        for end in (0.0, 0.15):
            rollout = random_rollout(seed, n_steps, n_envs, dtype=dtype, end=end)
            actual = gae(*(x.to(device) for x in rollout), gamma=gamma, gae_lambda=gae_lambda)
            assert actual.dtype == dtype
            assert actual.device.type == device
            assert_close(actual, gae_by_loop(rollout, gamma, gae_lambda), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (F64, 1e-12)])
def test_gae_equals_the_plain_loop_on_a_large_rollout(dtype: torch.dtype, tolerance: float) -> None:
    rollout = random_rollout(7, 2048, 64, dtype=dtype, end=0.01)
    actual = gae(*rollout, gamma=0.99, gae_lambda=0.95)
    assert_close(actual, gae_by_loop(rollout, 0.99, 0.95), tolerance)


@pytest.mark.parametrize("dones_every_step", [True, False])
def test_gae_with_an_end_at_every_step_and_at_none(dones_every_step: bool) -> None:
    rollout = random_rollout(0, 50, 4, end=0.0)
    rollout = rollout._replace(dones=torch.full_like(rollout.dones, dones_every_step))
    assert_close(gae(*rollout, gamma=0.99, gae_lambda=0.95), gae_by_loop(rollout, 0.99, 0.95), 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (F64, 1e-12)])
@pytest.mark.parametrize("n_steps", [1, 2, 17, 2048])
def test_monte_carlo_equals_the_plain_loop(n_steps: int, dtype: torch.dtype, tolerance: float) -> None:
    for gamma in (1.0, 0.99, 0.5):
        rollout = random_rollout(n_steps, n_steps, 3, dtype=dtype, end=0.02)
        assert_close(monte_carlo_advantages(*rollout, gamma=gamma), gae_by_loop(rollout, gamma, 1.0), tolerance)


class CountOperations(TorchDispatchMode):
    """Counts the tensor operations that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["gae", "monte_carlo", "n_step"])
def test_fast_path_has_no_loop_over_the_steps(name: str) -> None:
    """A loop needs several operations a step; a scan of logarithmic depth needs several a level (11 levels here)."""
    rollout = random_rollout(0, 2048, 1, dtype=torch.float32)
    with CountOperations() as counter:
        ESTIMATORS[name](*rollout)
    assert counter.count < 2048 / 4


@pytest.mark.parametrize("n_steps", [1, 2, 64, 65, 200])  # one after the other up to 64, by halves from there on
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_numpy_arrays_give_the_numbers_of_tensors(name: str, dtype: torch.dtype, n_steps: int) -> None:
    rollout = random_rollout(0, n_steps, 3, dtype=dtype)
    before = [x.clone() for x in rollout]
    result: Any = ESTIMATORS[name](*(x.numpy() for x in rollout))  # type: ignore[arg-type]
    assert isinstance(result, np.ndarray)
    torch.testing.assert_close(torch.from_numpy(result), ESTIMATORS[name](*rollout))
    assert all(torch.equal(x, y) for x, y in zip(rollout, before, strict=True))


@pytest.mark.parametrize("n_steps", [1, 5, 64, 65])
def test_discounted_returns_of_numpy_arrays_are_those_of_tensors(n_steps: int) -> None:
    rewards, _, _, dones = random_rollout(0, n_steps, 3)
    initial = torch.tensor([1.0, -2.0, 0.0], dtype=F64)
    arrays: Any = (rewards.numpy(), dones.numpy(), initial.numpy())
    result: Any = discounted_returns(*arrays, gamma=0.9)
    assert isinstance(result, np.ndarray)
    torch.testing.assert_close(torch.from_numpy(result), discounted_returns(rewards, dones, initial, gamma=0.9))


@pytest.mark.parametrize("n_steps", [5, 100])
def test_gae_can_be_differentiated_through_all_of_its_tensors(n_steps: int) -> None:
    rollout = [x.to(F64).requires_grad_() for x in random_rollout(0, n_steps, 2)]
    gradients = torch.autograd.grad(gae(*rollout, gamma=0.9, gae_lambda=0.9).sum(), rollout)
    assert all(bool(gradient.isfinite().all()) and bool(gradient.any()) for gradient in gradients)


def test_integer_arrays_raise() -> None:
    integers: Any = np.zeros((3, 2), dtype=np.int64)
    with pytest.raises(TypeError, match="`rewards` must be a floating-point tensor"):
        td_errors(integers, integers, integers, gamma=0.9)


# ---------------------------------------------------------------------------------------------------------------------
# SB3's rollout buffer as oracle, bit for bit


def sb3_buffer(rollout: Rollout, last_values: Tensor, gamma: float, gae_lambda: float) -> RolloutBuffer:
    """SB3's buffer over the same numbers; SB3 keeps `episode_starts[t + 1]` where we keep `dones[t]`."""
    n_steps, n_envs = rollout.rewards.shape
    box = spaces.Box(-1.0, 1.0, (1,))
    buffer = RolloutBuffer(n_steps, box, box, device="cpu", gae_lambda=gae_lambda, gamma=gamma, n_envs=n_envs)
    buffer.rewards = rollout.rewards.numpy().copy()
    buffer.values = rollout.values.numpy().copy()
    buffer.episode_starts[1:] = rollout.dones[:-1].numpy()
    buffer.compute_returns_and_advantage(last_values, rollout.dones[-1].numpy())
    return buffer


@pytest.mark.parametrize("n_steps", [1, 2, 5, 128, 2048])
@pytest.mark.parametrize("n_envs", [1, 4])
@pytest.mark.parametrize(("gamma", "gae_lambda"), GAMMA_LAMBDA)
def test_gae_sequential_is_bit_equal_to_sb3(gamma: float, gae_lambda: float, n_envs: int, n_steps: int) -> None:
    rng = torch.Generator().manual_seed(n_steps + n_envs)
    rewards = torch.randn(n_steps, n_envs, generator=rng)
    values = torch.randn(n_steps + 1, n_envs, generator=rng)
    terminated = torch.rand(n_steps, n_envs, generator=rng) < 0.1
    rollout = Rollout(rewards, values[:-1], values[1:] * ~terminated, terminated)
    buffer = sb3_buffer(rollout, values[-1], gamma, gae_lambda)
    actual = gae_sequential(*rollout, gamma=gamma, gae_lambda=gae_lambda)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, torch.from_numpy(buffer.advantages))
    assert torch.equal(actual + rollout.values, torch.from_numpy(buffer.returns))


@pytest.mark.parametrize("seed", SEEDS)
def test_gae_sequential_is_bit_equal_to_sb3_with_the_truncation_value_folded_into_the_reward(seed: int) -> None:
    """SB3 adds gamma V(s_T) to the truncated reward and masks the bootstrap; here V(s_T) is `next_values`."""
    gamma, gae_lambda = 0.99, 0.95
    rng = torch.Generator().manual_seed(seed)
    rewards, final_values = torch.randn(200, 4, generator=rng), torch.randn(200, 4, generator=rng)
    values = torch.randn(201, 4, generator=rng)
    truncated = torch.rand(200, 4, generator=rng) < 0.1
    next_values = torch.where(truncated, final_values, values[1:])
    ours = Rollout(rewards, values[:-1], next_values, truncated)
    folded = ours._replace(rewards=torch.where(truncated, rewards + gamma * final_values, rewards))
    buffer = sb3_buffer(folded, values[-1], gamma, gae_lambda)
    actual = gae_sequential(*ours, gamma=gamma, gae_lambda=gae_lambda)
    assert torch.equal(actual, torch.from_numpy(buffer.advantages))


@pytest.mark.parametrize("seed", SEEDS)
def test_gae_sequential_agrees_with_gae(seed: int) -> None:
    rollout = random_rollout(seed, 129, 6)
    assert_close(
        gae(*rollout, gamma=0.99, gae_lambda=0.95), gae_sequential(*rollout, gamma=0.99, gae_lambda=0.95), 1e-12
    )


# ---------------------------------------------------------------------------------------------------------------------
# Dtypes, layouts, side effects


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_dtype_is_kept_and_low_precision_stays_close(dtype: torch.dtype, name: str) -> None:
    rollout = random_rollout(0, 16, 3, dtype=dtype)
    actual = ESTIMATORS[name](*rollout)
    expected = ESTIMATORS[name](*(x.to(F64) for x in rollout[:3]), rollout.dones)
    assert actual.dtype == dtype
    # At most a few roundings for each of 16 terms, each relative to numbers no larger than the largest one here.
    tolerance = 3 * 16 * torch.finfo(dtype).eps
    assert_close(actual, expected, tolerance)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_inputs_are_not_modified_and_the_result_shares_no_memory(name: str) -> None:
    rollout = random_rollout(0, 12, 3)
    copies = [x.clone() for x in rollout]
    result = ESTIMATORS[name](*rollout)
    result.fill_(float("nan"))
    assert all(torch.equal(x, copy) for x, copy in zip(rollout, copies, strict=True))


def transposed(x: Tensor) -> Tensor:
    return x.T.contiguous().T


def strided(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=0).repeat_interleave(3, dim=1)[::2, ::3]


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("layout", [transposed, strided])
def test_non_contiguous_inputs_give_the_same_numbers(layout: Callable[[Tensor], Tensor], name: str) -> None:
    rollout = random_rollout(0, 12, 3)
    views = [layout(x) for x in rollout]
    assert not views[0].is_contiguous()
    assert torch.equal(ESTIMATORS[name](*views), ESTIMATORS[name](*rollout))


# ---------------------------------------------------------------------------------------------------------------------
# Discounted returns (forward recursion)


def test_discounted_returns_equal_the_hand_derived_numbers() -> None:
    # gamma = 1/2, carry 6, an end at step 1:  1 + 6/2 = 4,  2 + 4/2 = 4,  4 (starts anew),  8 + 4/2 = 10
    actual = discounted_returns(
        column(1, 2, 4, 8), column(0, 1, 0, 0).bool(), torch.tensor([6.0], dtype=F64), gamma=0.5
    )
    torch.testing.assert_close(actual, column(4, 4, 4, 10), rtol=0, atol=0)


@pytest.mark.parametrize("n_steps", [1, 8, 9, 40])  # a loop up to eight steps, then a scan
def test_discounted_returns_have_the_type_of_the_rewards(n_steps: int) -> None:
    rewards, dones = torch.ones(n_steps, 2), torch.zeros(n_steps, 2)
    returns = discounted_returns(rewards, dones, torch.ones(2, dtype=torch.float64), gamma=0.5)
    assert returns.dtype is torch.float32
    # R_t = 2 for all t: 1 + 0.5 · 2 = 2, from R_{-1} = 1 on 2 − 0.5^(t+1).
    expected = 2 - 0.5 ** (torch.arange(n_steps) + 1.0)
    torch.testing.assert_close(returns, expected[:, None].expand(-1, 2))


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_discounted_returns_can_be_taken_in_two_halves(gamma: float) -> None:
    """The carry into the second half is the last return, or nothing where the first half ended on a done."""
    rollout = random_rollout(0, 21, 40, end=0.3)
    rewards, dones = rollout.rewards, rollout.dones
    initial = torch.randn(40, generator=torch.Generator().manual_seed(5), dtype=F64)
    whole = discounted_returns(rewards, dones, initial, gamma=gamma)
    first = discounted_returns(rewards[:10], dones[:10], initial, gamma=gamma)
    second = discounted_returns(rewards[10:], dones[10:], first[-1] * ~dones[9], gamma=gamma)
    assert dones[9].any() and not dones[9].all()
    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=0, atol=1e-12)


def test_discounted_returns_of_one_step() -> None:
    rollout = random_rollout(0, 1, 4)
    initial = torch.arange(4.0, dtype=F64)
    actual = discounted_returns(rollout.rewards, rollout.dones, initial, gamma=0.9)
    torch.testing.assert_close(actual, rollout.rewards + 0.9 * initial)


def test_discounted_returns_do_not_modify_their_inputs_and_accept_float_dones() -> None:
    rollout = random_rollout(0, 9, 3)
    inputs = (rollout.rewards, rollout.dones.to(F64), torch.ones(3, dtype=F64))
    copies = [x.clone() for x in inputs]
    result = discounted_returns(*inputs, gamma=0.9)
    assert result.dtype == F64
    assert torch.equal(result, discounted_returns(rollout.rewards, rollout.dones, inputs[2], gamma=0.9))
    result.fill_(float("nan"))
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


class ScriptedRewards(gym.Env[Any, Any]):
    """Pays out the given rewards; an episode ends where told."""

    observation_space = spaces.Box(-1.0, 1.0, (1,))
    action_space = spaces.Discrete(2)

    def __init__(self, rewards: Any, dones: Any) -> None:
        self.script = iter(zip(rewards.tolist(), dones.tolist(), strict=True))

    def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
        return np.zeros(1, np.float32), {}

    def step(self, _: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward, done = next(self.script)
        return np.zeros(1, np.float32), reward, done, False, {}


def test_discounted_returns_equal_those_of_vec_normalize() -> None:
    """SB3's VecNormalize keeps R = gamma R + r per environment and zeroes it once the episode has ended."""
    gamma = 0.9
    rewards = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).to(F64)
    dones = random_rollout(0, 40, 3).dones
    scripts = [ScriptedRewards(rewards[:, env], dones[:, env]) for env in range(3)]
    normalizer = VecNormalize(DummyVecEnv([lambda env=env: env for env in scripts]), norm_obs=False, gamma=gamma)
    normalizer.reset()
    carries = []
    for _ in range(40):
        normalizer.step(np.zeros(3, dtype=np.int64))
        carries.append(torch.from_numpy(normalizer.returns.copy()))
    actual = discounted_returns(rewards, dones, torch.zeros(3, dtype=F64), gamma=gamma) * ~dones
    torch.testing.assert_close(actual, torch.stack(carries), rtol=0, atol=1e-5)  # SB3 stores rewards as float32


# ---------------------------------------------------------------------------------------------------------------------
# Normalisation


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(64,), (2,), (16, 4)])
def test_normalized_advantages_have_mean_zero_and_unbiased_std_one(shape: tuple[int, ...], seed: int) -> None:
    raw = 5.0 + 3.0 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    actual = normalize(raw)
    assert actual.shape == raw.shape
    assert float(actual.mean()) == pytest.approx(0.0, abs=1e-10)
    # sum (x - mean)^2 / (B - 1) = 1: divided by B - 1, not by B
    assert float(actual.square().sum() / (actual.numel() - 1)) == pytest.approx(1.0, abs=1e-6)


def test_normalize_equals_the_hand_derived_numbers() -> None:
    # (1, 3): mean 2, unbiased variance ((-1)^2 + 1^2) / 1 = 2, so (-1, 1) / sqrt(2)
    actual = normalize(torch.tensor([1.0, 3.0], dtype=F64), epsilon=0.0)
    torch.testing.assert_close(actual, torch.tensor([-1.0, 1.0], dtype=F64) / 2.0**0.5)


@pytest.mark.parametrize("seed", SEEDS)
def test_normalize_ignores_positive_affine_maps_and_keeps_signs_under_a_negative_one(seed: int) -> None:
    raw = torch.randn(50, generator=torch.Generator().manual_seed(seed), dtype=F64)
    torch.testing.assert_close(normalize(7.0 * raw - 4.0), normalize(raw), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(normalize(-2.0 * raw + 1.0), -normalize(raw), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(normalize(normalize(raw)), normalize(raw), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_normalize_is_bit_equal_to_the_expression_in_sb3(seed: int) -> None:
    raw = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(normalize(raw), (raw - raw.mean()) / (raw.std() + 1e-8))


@pytest.mark.parametrize("size", [0, 1])
def test_normalize_returns_fewer_than_two_elements_unchanged(size: int) -> None:
    raw = torch.full((size,), 3.5)
    assert torch.equal(normalize(raw), raw)


def test_normalize_of_equal_advantages_is_zero_and_finite() -> None:
    assert torch.equal(normalize(torch.full((8,), 2.0)), torch.zeros(8))


def test_normalize_epsilon_is_added_to_the_std() -> None:
    raw = torch.tensor([1.0, 3.0], dtype=F64)
    # std sqrt(2), so with epsilon sqrt(2) the result is half of what it is without
    torch.testing.assert_close(normalize(raw, epsilon=2.0**0.5), normalize(raw, epsilon=0.0) / 2.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_normalize_keeps_the_dtype_and_does_not_modify_its_input(dtype: torch.dtype) -> None:
    raw = torch.randn(32, generator=torch.Generator().manual_seed(0)).to(dtype)
    copy = raw.clone()
    result = normalize(raw)
    assert result.dtype == dtype
    assert result.isfinite().all()
    assert torch.equal(raw, copy)


def test_normalize_refuses_integers() -> None:
    with pytest.raises(TypeError):
        normalize(torch.arange(8))


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("wrong", [(5, 1), (5,), (3,), (1, 3), (6, 3), (3, 5), (5, 3, 1)])
def test_shapes_that_differ_raise(wrong: tuple[int, ...], position: int, name: str) -> None:
    if name == "td" and position == 3:
        return  # takes no dones
    arguments = list(random_rollout(0, 5, 3))
    arguments[position] = torch.zeros(wrong, dtype=arguments[position].dtype)
    with pytest.raises(ValueError, match=r"(?i)shape"):
        ESTIMATORS[name](*arguments)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("position", range(3))
def test_integer_inputs_raise(position: int, name: str) -> None:
    arguments = list(random_rollout(0, 5, 3))
    arguments[position] = arguments[position].long()
    with pytest.raises(TypeError):
        ESTIMATORS[name](*arguments)


@pytest.mark.parametrize("gamma", [-0.01, 1.01, float("nan"), float("inf")])
def test_gamma_outside_the_unit_interval_raises(gamma: float) -> None:
    rollout = random_rollout(0, 5, 3)
    calls: list[Callable[[], Tensor]] = [
        lambda: td_errors(*rollout[:3], gamma=gamma),
        lambda: gae(*rollout, gamma=gamma, gae_lambda=0.9),
        lambda: gae_sequential(*rollout, gamma=gamma, gae_lambda=0.9),
        lambda: n_step_advantages(*rollout, gamma=gamma, horizon=2),
        lambda: monte_carlo_advantages(*rollout, gamma=gamma),
        lambda: discounted_returns(rollout.rewards, rollout.dones, torch.zeros(3, dtype=F64), gamma=gamma),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="gamma"):
            call()


@pytest.mark.parametrize("gae_lambda", [-0.01, 1.01, float("nan")])
@pytest.mark.parametrize("estimator", [gae, gae_sequential])
def test_lambda_outside_the_unit_interval_raises(estimator: Callable[..., Tensor], gae_lambda: float) -> None:
    with pytest.raises(ValueError, match="gae_lambda"):
        estimator(*random_rollout(0, 5, 3), gamma=0.9, gae_lambda=gae_lambda)


@pytest.mark.parametrize("horizon", [0, -1])
def test_horizon_below_one_raises(horizon: int) -> None:
    with pytest.raises(ValueError, match="horizon"):
        n_step_advantages(*random_rollout(0, 5, 3), gamma=0.9, horizon=horizon)


@pytest.mark.parametrize(
    ("dones", "initial"), [((5, 1), (3,)), ((5,), (3,)), ((5, 3), (1,)), ((5, 3), (5,)), ((5, 3), (1, 3)), ((5, 3), ())]
)
def test_discounted_returns_refuse_shapes_that_differ(dones: tuple[int, ...], initial: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"(?i)shape"):
        discounted_returns(torch.zeros(5, 3), torch.zeros(dones), torch.zeros(initial), gamma=0.9)


def test_discounted_returns_refuse_integers() -> None:
    with pytest.raises(TypeError):
        discounted_returns(torch.zeros(5, 3).long(), torch.zeros(5, 3), torch.zeros(3), gamma=0.9)
