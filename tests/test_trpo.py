"""TRPOPlus: the trust region measured from outside, failed searches, whose parameters move, NaN, batch norm, knobs."""

import copy
import functools
import inspect
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from sb3_contrib import TRPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import Distribution, kl_divergence
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_pgplus import TRPOPlus, presets
from sb3_pgplus.errors import NonFiniteUpdateError
from sb3_pgplus.hparams import TRPOHparams
from sb3_pgplus.metrics import Metrics

# A constant rate: the default anneals over each test's few updates.
TINY: dict[str, Any] = {"n_steps": 40, "batch_size": 40, "n_critic_updates": 2, "learning_rate": 1e-3}
TINY |= {"seed": 0, "device": "cpu"}
DELTA = 0.01
# The KL is a mean of float32 numbers.
ROUNDING = 1e-6
# Undamped, the quadratic model of the KL is wrong enough for candidates to be rejected.
SEARCHES = {"cg_damping": 1e-3}


def pendulum(n_envs: int = 2, limit: int = 15) -> Any:
    return make_vec_env(
        "Pendulum-v1", n_envs, seed=0, wrapper_class=TimeLimit, wrapper_kwargs={"max_episode_steps": limit}
    )


class Arms(gym.Env[Any, Any]):
    """Rewards the sum of the action's entries times the first observation; ends and is cut in turn."""

    def __init__(self, action_space: spaces.Space[Any] | None = None, is_dict: bool = False) -> None:
        box = spaces.Box(-3, 3, (3,), np.float32)
        self.observation_space = spaces.Dict({"vector": box, "token": spaces.Discrete(4)}) if is_dict else box
        self.action_space = action_space or spaces.Box(-1, 1, (2,), np.float32)
        self.is_dict = is_dict
        self.episodes = 0

    def _observe(self) -> Any:
        self.last = self.np_random.normal([0, 0, 1], [1, 0.5, 0.5]).astype(np.float32).clip(-3, 3)
        return {"vector": self.last, "token": int(self.np_random.integers(4))} if self.is_dict else self.last

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        self.episodes += 1
        return self._observe(), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        reward = float(np.sum(action) * self.last[0])
        done = self.steps >= 11
        cut = done and self.episodes % 2 == 0
        return self._observe(), reward, done and not cut, cut, {}


def arms(action_space: spaces.Space[Any] | None = None, is_dict: bool = False) -> Any:
    return make_vec_env(lambda: Arms(action_space, is_dict), 2, seed=0)


def vector(parameters: Any) -> th.Tensor:
    return nn.utils.parameters_to_vector(parameters).detach().clone()


def actor_of(model: Any) -> th.Tensor:
    policy = model.policy
    return vector([*policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters(), policy.log_std])


def critic_of(model: Any) -> th.Tensor:
    return vector([*model.policy.mlp_extractor.value_net.parameters(), *model.policy.value_net.parameters()])


def logged(model: Any, name: str) -> float:
    return float(model.logger.name_to_value[f"train/{name}"])


def with_rollout(model: Any) -> Any:
    """The model as it is between its first rollout and the update on it."""
    model._setup_learn(10**6)
    model.collect_rollouts(model.env, model._init_callback(None), model.rollout_buffer, model.n_steps)
    return model


def distribution_on_rollout(model: Any) -> Distribution:
    """π_θ on all states of the rollout, as it acts (no dropout, running batch statistics)."""
    was_training = model.policy.training
    model.policy.set_training_mode(False)
    found = copy.copy(model.policy.get_distribution(model.rollout_buffer.flat("observations")))
    model.policy.set_training_mode(was_training)
    return found


def mean_kl(old: Distribution, new: Distribution) -> th.Tensor:
    """torch's closed form of KL(π_old‖π_θ), summed over the action's entries and averaged over states."""
    return kl_divergence(old, new).flatten(1).sum(1).mean() if _by_entry(old) else kl_divergence(old, new).mean()


def _by_entry(distribution: Distribution) -> bool:
    return isinstance(distribution.distribution, (th.distributions.Normal, th.distributions.Bernoulli))


class Measured(TRPOPlus):
    """Keeps the mean KL(π_old‖π_θ) over all states of the rollout of every update, the critic's fit included."""

    def _setup_model(self) -> None:
        super()._setup_model()
        self.kls: list[float] = []

    @th.no_grad()
    def before_update(self, hp: TRPOHparams) -> None:
        self.old = distribution_on_rollout(self)

    @th.no_grad()
    def after_update(self, hp: TRPOHparams) -> None:
        self.kls.append(float(mean_kl(self.old, distribution_on_rollout(self))))


class Stubborn(TRPOPlus):
    """
    A surrogate that no step along the gradient improves: the penalty has no slope at ρ = 1, and E(ρ−1)² ≈ dᵀFd = 2δ
    of a full step outweighs what the step gains.
    """

    def policy_loss(self, ratio: th.Tensor, advantages: th.Tensor, hp: TRPOHparams) -> th.Tensor:
        return super().policy_loss(ratio, advantages, hp) + 1e5 * ((ratio - 1) ** 2).mean()


# --- hyperparameters --------------------------------------------------------------------------------------------------

# name → (other value, settings under which it can bite)
KNOBS: dict[str, tuple[Any, dict[str, Any]]] = {
    "learning_rate": ("lin_1e-3", {}),
    "n_steps": (20, {}),
    "gamma": (0.9, {}),
    "gae_lambda": (0.5, {}),
    "normalize_advantage": (False, {}),
    "n_envs": (2, {"env": "Pendulum-v1"}),
    "ent_coef": (0.1, {}),
    "max_grad_norm": (0.01, {}),
    "advantage_estimator": ("td", {}),
    "n_step_horizon": (2, {"advantage_estimator": "n_step"}),
    "bootstrap_truncated": (False, {}),
    "normalize_observations": (False, {}),
    "clip_observations": (0.5, {}),
    "normalize_rewards": (False, {}),
    "clip_rewards": (0.01, {}),
    "normalize_value_targets": (True, {}),
    "ortho_init": (False, {}),
    "activation_fn": ("relu", {}),
    "log_std_init": (-1.0, {}),
    "adam_eps": (1e-2, {}),
    "schedule_timesteps": (10_000, {"learning_rate": "lin_1e-3"}),
    "sb3_exact": (True, {}),
    "batch_size": (20, {}),
    "clip_range_vf": (1e-4, {}),
    "value_clip": ("clipped_only", {"clip_range_vf": 1e-3, "learning_rate": 1e-2, "n_critic_updates": 5}),
    "n_critic_updates": (3, {}),
    "target_kl": (0.02, {}),
    "kl_reduction": ("mean", {"env": "Swimmer-v5"}),  # two entries
    "max_step_size": (1e-3, {}),
    "cg_max_steps": (3, {}),
    "cg_tol": (0.5, {}),
    "cg_damping": (0.2, {}),
    "line_search": (False, SEARCHES),
    "line_search_shrinking_factor": (0.5, SEARCHES),
    "line_search_max_iter": (1, SEARCHES),
    "sub_sampling_factor": (2, {}),
    "fisher_sub_sampling_factor": (2, {}),
}


def parameters_after(env: Any = None, **settings: Any) -> th.Tensor:
    model = TRPOPlus("MlpPolicy", env or pendulum(), **{**TINY, **settings})
    model.learn(2 * model.n_steps * model.n_envs)
    return vector(model.policy.parameters())


@functools.cache
def reference(scenario: tuple[tuple[str, Any], ...]) -> th.Tensor:
    """The parameters under a scenario, the same in two runs."""
    first, second = (parameters_after(**dict(scenario)) for _ in range(2))
    assert th.equal(first, second)
    return first


def test_every_hyperparameter_is_in_the_list_above() -> None:
    # max_nonfinite_updates acts on failures alone, see below; compile on speed alone (tests/test_engine.py).
    assert set(KNOBS) | {"max_nonfinite_updates", "compile"} == set(TRPOHparams.names())


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
@pytest.mark.parametrize("name", KNOBS)
def test_no_dead_knobs(name: str) -> None:
    value, scenario = KNOBS[name]
    assert not th.equal(reference(tuple(scenario.items())), parameters_after(**{**scenario, name: value}))


# --- the trust region -------------------------------------------------------------------------------------------------

GSDE: dict[str, Any] = {"use_sde": True}
POLICIES: dict[str, tuple[spaces.Space[Any] | None, dict[str, Any]]] = {
    "Box": (None, {}),
    "Discrete": (spaces.Discrete(3), {}),
    "MultiDiscrete": (spaces.MultiDiscrete([3, 2]), {}),
    "MultiBinary": (spaces.MultiBinary(3), {}),
    "gSDE": (None, GSDE),
    "squashed gSDE": (None, {**GSDE, "policy_kwargs": {"squash_output": True}}),
    "sb3_exact": (spaces.Discrete(3), {"sb3_exact": True}),
    "thinned Fisher": (None, {"fisher_sub_sampling_factor": 7}),
    "hardly damped": (None, SEARCHES),
    "without normalisation": (None, {"normalize_observations": False, "normalize_advantage": False}),
    "entropy bonus": (spaces.Discrete(3), {"ent_coef": 0.01}),
}


@pytest.mark.parametrize("name", POLICIES)
def test_the_kl_of_every_update_stays_within_the_trust_region_and_makes_use_of_it(name: str) -> None:
    action_space, options = POLICIES[name]
    model = Measured("MlpPolicy", arms(action_space), **TINY, **options, target_kl=DELTA).learn(5 * 80)
    assert len(model.kls) == 5
    if name == "sb3_exact":  # which bounds the KL the other way round, equal up to third order
        assert max(model.kls) < 1.2 * DELTA
    else:
        assert max(model.kls) <= DELTA + ROUNDING
        assert logged(model, "kl_divergence_loss") == pytest.approx(model.kls[-1], abs=ROUNDING)
    assert sum(kl > 0.1 * DELTA for kl in model.kls) > 2


@pytest.mark.parametrize("space", [spaces.Box(-1, 1, (2,), np.float32), spaces.MultiBinary(2)])
def test_the_mean_kl_over_two_entries_is_half_of_their_sum(space: spaces.Space[Any]) -> None:
    # With d entries x = (F/d + ηI)⁻¹g is d times y = (F + dηI)⁻¹g, and √(2δ/xᵀ(F/d + ηI)x) x = √(2dδ/yᵀ(F + dηI)y) y.
    def trained(**options: Any) -> Measured:
        return Measured("MlpPolicy", arms(space), **TINY, **options).learn(80)

    mean = trained(kl_reduction="mean", target_kl=DELTA, cg_damping=0.1)
    total = trained(kl_reduction="sum", target_kl=2 * DELTA, cg_damping=0.2)
    th.testing.assert_close(vector(mean.policy.parameters()), vector(total.policy.parameters()), rtol=1e-4, atol=1e-5)
    assert mean.kls == pytest.approx(total.kls, rel=1e-3)
    assert logged(mean, "kl_divergence_loss") == pytest.approx(mean.kls[-1] / 2, abs=ROUNDING)


@pytest.mark.parametrize("space", [spaces.Discrete(3), spaces.MultiDiscrete([2, 3])])
def test_kl_reduction_leaves_actions_of_one_distribution_alone(space: spaces.Space[Any]) -> None:
    found = [parameters_after(arms(space), kl_reduction=reduction) for reduction in ("sum", "mean")]
    assert th.equal(*found)


def first_step(env: Any, **settings: Any) -> float:
    """Length of the policy's first step, with rewards as they are."""
    options = {**TINY, "n_critic_updates": 0, "normalize_rewards": False, "compile": False}
    model = TRPOPlus("MlpPolicy", env, **{**options, **settings})
    with_rollout(model).train()
    return logged(model, "step_length")


class TenTimes(gym.RewardWrapper[Any, Any]):
    def reward(self, reward: Any) -> Any:
        return 10 * reward


@pytest.mark.parametrize("normalize_advantage", [True, False])
def test_a_limited_step_is_as_long_as_the_advantages_are_large(normalize_advantage: bool) -> None:
    # αF⁻¹g is linear in α, and in the rewards: V ≈ 0 at the start, so ten times the rewards are ten times the
    # advantages, up to the little that V has in them. √(2δ/gᵀF⁻¹g) F⁻¹g does not change with them.
    options = {"normalize_advantage": normalize_advantage}
    small, double = (first_step(arms(), max_step_size=alpha, **options) for alpha in (1e-3, 2e-3))
    assert double == pytest.approx(2 * small, rel=1e-4)
    tenfold = make_vec_env(lambda: TenTimes(Arms()), 2, seed=0)
    assert first_step(tenfold, max_step_size=1e-3, **options) == pytest.approx(10 * small, rel=0.1)
    assert first_step(tenfold, **options) == pytest.approx(first_step(arms(), **options), rel=0.1)


def test_a_limit_beyond_the_trust_region_changes_nothing() -> None:
    assert th.equal(parameters_after(max_step_size=1e9), parameters_after())


def test_the_trust_region_follows_its_schedule() -> None:
    model = Measured("MlpPolicy", arms(), **TINY, target_kl="lin_0.04").learn(4 * 80)
    for kl, bound in zip(model.kls, (0.04, 0.03, 0.02, 0.01), strict=True):  # positions at the rollouts' starts
        assert 0.3 * bound < kl <= bound + ROUNDING


@pytest.mark.parametrize("name", ["Box", "Discrete"])
def test_a_small_step_gains_what_the_gradient_promises(name: str) -> None:
    action_space, _ = POLICIES[name]
    model = TRPOPlus("MlpPolicy", arms(action_space), **TINY, target_kl=1e-6)
    for _ in range(3):
        model.learn(80, reset_num_timesteps=False)
        assert logged(model, "is_line_search_success") == 1
        assert logged(model, "surrogate_improvement_expected") > 0
        ratio = logged(model, "surrogate_improvement") / logged(model, "surrogate_improvement_expected")
        assert ratio == pytest.approx(1, abs=0.2)


def test_the_natural_gradient_step_goes_to_the_border_of_the_trust_region() -> None:
    # No search, small networks, conjugate gradient to the end: d = √(2δ/xᵀFx) x with Fx = g, all of it checked with
    # a Hessian that autograd takes of torch's KL.
    damping, options = 0.05, {"line_search": False, "cg_max_steps": 200, "cg_tol": 1e-6, "n_critic_updates": 0}
    options |= {"cg_damping": damping, "policy_kwargs": {"net_arch": [8]}, "target_kl": DELTA}
    model = with_rollout(TRPOPlus("MlpPolicy", arms(), **{**TINY, **options}))
    policy = model.policy
    actor = [*policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters(), policy.log_std]
    before, untrained = vector(actor), copy.deepcopy(policy.state_dict())
    model.train()
    d = vector(actor) - before
    policy.load_state_dict(untrained)

    batch = next(iter(model.rollout_buffer.get(None)))
    _, log_prob, _ = policy.evaluate_actions(batch.observations, batch.actions)
    psi = (batch.advantages - batch.advantages.mean()) / batch.advantages.std()
    # parameters_to_vector's order is `actor`'s.
    surrogate = ((log_prob - batch.old_log_prob).exp() * psi).mean()
    g = nn.utils.parameters_to_vector(th.autograd.grad(surrogate, actor))
    with th.no_grad():
        old = distribution_on_rollout(model)
    slopes = th.autograd.grad(mean_kl(old, distribution_on_rollout(model)), actor, create_graph=True)
    hessian_d = th.autograd.grad(nn.utils.parameters_to_vector(slopes) @ d, actor)
    damped_d = nn.utils.parameters_to_vector(hessian_d) + damping * d

    assert 0.5 * float(d @ damped_d) == pytest.approx(DELTA, rel=1e-3)
    # F d is parallel to g: d = √(2δ/c) x, c = xᵀFx = gᵀx.
    c = logged(model, "curvature")
    th.testing.assert_close(damped_d, np.sqrt(2 * DELTA / c) * g, rtol=1e-2, atol=1e-3 * float(damped_d.abs().max()))
    assert logged(model, "step_length") == pytest.approx(float(d.norm()), rel=1e-4)
    # The gain that the gradient promises is gᵀd = √(2δ/c) gᵀx = √(2δc).
    assert logged(model, "surrogate_improvement_expected") == pytest.approx(float(g @ d), rel=1e-3)
    assert float(g @ d) == pytest.approx(np.sqrt(2 * DELTA * c), rel=1e-3)
    assert logged(model, "is_line_search_success") == 1
    assert logged(model, "line_search_steps") == 0


def test_the_search_takes_the_first_candidate_that_passes() -> None:
    factor, delta = 0.7, 0.3
    options = {**TINY, "cg_damping": 1e-5, "n_critic_updates": 0, "target_kl": delta}
    options["line_search_shrinking_factor"] = factor
    # A model without a search shows what the full step d is.
    full = with_rollout(TRPOPlus("MlpPolicy", pendulum(), **options, line_search=False))
    before = actor_of(full)
    full.train()
    found = with_rollout(TRPOPlus("MlpPolicy", pendulum(), **options))
    found.train()
    n = int(logged(found, "line_search_steps"))
    assert n > 1  # otherwise there was no search
    step, d = actor_of(found) - before, actor_of(full) - before
    th.testing.assert_close(step, factor ** (n - 1) * d, atol=1e-6, rtol=1e-4)
    assert 0 < logged(found, "kl_divergence_loss") <= delta
    assert logged(found, "surrogate_improvement") > 0
    assert logged(found, "step_length") == pytest.approx(float(step.norm()), rel=1e-4)
    # With one candidate less it finds nothing.
    none = with_rollout(TRPOPlus("MlpPolicy", pendulum(), **options, line_search_max_iter=n - 1))
    none.train()
    assert logged(none, "is_line_search_success") == 0
    assert th.equal(actor_of(none), before)


# --- steps that are not made ------------------------------------------------------------------------------------------


def test_a_search_that_finds_nothing_leaves_every_bit_of_the_policy() -> None:
    model = Stubborn("MlpPolicy", arms(), **TINY)
    actor, critic = actor_of(model), critic_of(model)
    model.learn(3 * 80)
    assert th.equal(actor_of(model), actor)
    assert not th.equal(critic_of(model), critic)  # which is fitted all the same
    for name in ("is_line_search_success", "kl_divergence_loss", "step_length", "surrogate_improvement"):
        assert logged(model, name) == 0, name
    assert logged(model, "line_search_steps") == TRPOHparams.defaults()["line_search_max_iter"]
    assert model._nonfinite_updates == 0
    assert model._n_updates == 3


def test_a_surrogate_without_a_gradient_makes_no_step() -> None:
    class Flat(TRPOPlus):
        def policy_loss(self, ratio: th.Tensor, advantages: th.Tensor, hp: TRPOHparams) -> th.Tensor:
            return (ratio * 0).mean()

    for line_search in (True, False):
        model = Flat("MlpPolicy", arms(), **TINY, line_search=line_search)
        actor = actor_of(model)
        model.learn(2 * 80)
        assert th.equal(actor_of(model), actor)
        assert logged(model, "is_line_search_success") == 0
        assert model._nonfinite_updates == 0


class Fragile(ActorCriticPolicy):
    """Raises when its distribution is asked for the ``fails_at``-th time."""

    calls = 0
    fails_at: int | None = None

    def get_distribution(self, obs: Any) -> Distribution:
        self.calls += 1
        if self.calls == self.fails_at:
            raise MemoryError("no memory left")
        return super().get_distribution(obs)


@pytest.mark.parametrize("fails_at", [1, 2, 3, 6])
def test_an_exception_inside_the_search_leaves_every_bit_of_the_policy(fails_at: int) -> None:
    # Call 1 is π_old, call 2 the full step, further ones the shorter candidates.
    model = Stubborn(Fragile, arms(), **TINY)
    before = vector(model.policy.parameters())
    model.policy.fails_at = fails_at
    with pytest.raises(MemoryError, match="no memory left"):
        model.learn(80)
    assert model.policy.calls == fails_at
    assert th.equal(vector(model.policy.parameters()), before)
    model.learn(80)  # and training can go on
    assert not th.equal(critic_of(model), before[-critic_of(model).numel() :])


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_updates_of_the_policy_are_skipped_counted_and_end_training_though_the_critic_does_well(where: str) -> None:
    counts: list[float | None] = []

    class Broken(TRPOPlus):
        def before_update(self, hp: TRPOHparams) -> None:
            counts.append(self.logger.name_to_value.get("train/nonfinite_updates"))

        def policy_loss(self, ratio: th.Tensor, advantages: th.Tensor, hp: TRPOHparams) -> th.Tensor:
            loss = super().policy_loss(ratio, advantages, hp)
            return loss * th.nan if where == "loss" else loss + ((ratio - ratio.detach()) ** 2).sum().sqrt()

    model = Broken("MlpPolicy", arms(), **TINY)
    actor, critic = actor_of(model), critic_of(model)
    cause = "the loss overflows" if where == "loss" else "the loss is finite but its gradient is not"
    with pytest.raises(NonFiniteUpdateError, match=f"3 updates in a row .*{cause}"):
        model.learn(10 * 80, log_interval=None)
    assert counts == [None, 1, 2]
    assert model._nonfinite_updates == 3
    assert th.equal(actor_of(model), actor)
    assert not th.equal(critic_of(model), critic)


class SpoilRollouts(BaseCallback):
    """Overwrites a field of the rollouts whose indices are given."""

    def __init__(self, field: str, value: float, which: set[int]) -> None:
        super().__init__()
        self.field, self.value, self.which, self.index = field, value, which, -1

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.index += 1
        if self.index in self.which:
            buffer = self.model.rollout_buffer  # type: ignore[union-attr]
            setattr(buffer, self.field, np.full((40, 2), self.value))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_advantages_are_named_as_the_cause(value: float) -> None:
    model = TRPOPlus("MlpPolicy", arms(), **TINY)
    actor = actor_of(model)
    with pytest.raises(NonFiniteUpdateError, match="3 updates in a row .*advantages or returns are not finite"):
        model.learn(10 * 80, SpoilRollouts("advantages", value, {0, 1, 2}))
    assert th.equal(actor_of(model), actor)


def test_a_good_update_of_the_policy_ends_a_series_of_failures() -> None:
    model = TRPOPlus("MlpPolicy", arms(), **TINY)
    model.learn(8 * 80, SpoilRollouts("advantages", np.nan, {0, 1, 3, 4, 6, 7}))
    assert model._nonfinite_updates == 6
    assert logged(model, "nonfinite_updates") == 6
    assert all(bool(p.isfinite().all()) for p in model.policy.parameters())


def test_failures_of_the_critic_leave_it_as_it_was_and_the_policys_step_in_place() -> None:
    model = TRPOPlus("MlpPolicy", arms(), **{**TINY, "n_critic_updates": 5}, max_nonfinite_updates=5)
    actor, critic = actor_of(model), critic_of(model)
    with pytest.raises(NonFiniteUpdateError, match="5 updates in a row .*advantages or returns are not finite"):
        model.learn(80, SpoilRollouts("returns", np.inf, {0}))
    assert th.equal(critic_of(model), critic)
    assert not th.equal(actor_of(model), actor)
    assert logged(model, "is_line_search_success") == 1


# --- whose parameters move --------------------------------------------------------------------------------------------


class SharedNet(nn.Module):
    """A layer that both use, and one for each."""

    def __init__(self, features_dim: int) -> None:
        super().__init__()
        self.latent_dim_pi = self.latent_dim_vf = 8
        self.trunk = nn.Sequential(nn.Linear(features_dim, 8), nn.Tanh())
        self.pi = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.vf = nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    def forward(self, features: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: th.Tensor) -> th.Tensor:
        return self.pi(self.trunk(features))

    def forward_critic(self, features: th.Tensor) -> th.Tensor:
        return self.vf(self.trunk(features))


class MisnamedNet(SharedNet):
    """Two networks, each with a name that speaks of the other."""

    def __init__(self, features_dim: int) -> None:
        super().__init__(features_dim)
        del self.trunk, self.pi, self.vf
        self.value_actor = nn.Sequential(nn.Linear(features_dim, 8), nn.Tanh())
        self.pi_like = nn.Sequential(nn.Linear(features_dim, 8), nn.Tanh())

    def forward_actor(self, features: th.Tensor) -> th.Tensor:
        return self.value_actor(features)

    def forward_critic(self, features: th.Tensor) -> th.Tensor:
        return self.pi_like(features)


class SharedTrunk(ActorCriticPolicy):
    net: type[SharedNet] = SharedNet

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = self.net(self.features_dim)  # type: ignore[assignment]  # any module with its methods


class Misnamed(SharedTrunk):
    net = MisnamedNet


@pytest.mark.parametrize(
    ("policy", "critics_own"),
    [(SharedTrunk, "mlp_extractor.vf"), (Misnamed, "mlp_extractor.pi_like"), ("MlpPolicy", "mlp_extractor.value_net")],
)
def test_the_critics_fit_moves_what_only_the_critic_uses_and_nothing_else(policy: Any, critics_own: str) -> None:
    unfitted, fitted = (
        Measured(policy, arms(), **{**TINY, "n_critic_updates": n_updates}).learn(80) for n_updates in (0, 20)
    )
    untrained = dict(TRPOPlus(policy, arms(), **TINY).policy.named_parameters())
    after_fit = dict(fitted.policy.named_parameters())
    for name, parameter in unfitted.policy.named_parameters():
        is_critics = name.startswith((critics_own, "value_net"))
        # The policy's step moved all of the actor's, the critic's 20 epochs all of the rest.
        assert th.equal(parameter, untrained[name]) == is_critics, name
        assert th.equal(parameter, after_fit[name]) == (not is_critics), name
    assert fitted.kls == unfitted.kls
    assert 0 < fitted.kls[0] <= DELTA + ROUNDING


def test_a_critic_with_nothing_of_its_own_is_not_fitted() -> None:
    class OneTrunk(ActorCriticPolicy):
        """Its value is the mean of the policy's latent features."""

        def _build(self, lr_schedule: Any) -> None:
            super()._build(lr_schedule)
            self.value_net = nn.Identity()  # type: ignore[assignment]  # no layer of its own
            self.mlp_extractor.value_net = self.mlp_extractor.policy_net
            self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1))

        def predict_values(self, obs: Any) -> th.Tensor:
            return super().predict_values(obs).mean(1, keepdim=True)

        def forward(self, obs: Any, deterministic: bool = False) -> Any:
            actions, values, log_prob = super().forward(obs, deterministic)
            return actions, values.mean(1, keepdim=True), log_prob

        def evaluate_actions(self, obs: Any, actions: th.Tensor) -> Any:
            values, log_prob, entropy = super().evaluate_actions(obs, actions)
            return values.mean(1, keepdim=True), log_prob, entropy

    model = Measured(OneTrunk, arms(), **TINY).learn(2 * 80)
    assert 0 < max(model.kls) <= DELTA + ROUNDING
    assert not model.policy.optimizer.state


def test_parameters_that_the_user_froze_stay() -> None:
    model = TRPOPlus("MlpPolicy", arms(), **TINY)
    frozen = [model.policy.mlp_extractor.policy_net[0], model.policy.mlp_extractor.value_net[0]]
    for module in frozen:
        module.requires_grad_(False)
    before, rest = vector([*frozen[0].parameters(), *frozen[1].parameters()]), vector(model.policy.parameters())
    model.learn(2 * 80)
    assert th.equal(vector([*frozen[0].parameters(), *frozen[1].parameters()]), before)
    assert not th.equal(vector(model.policy.parameters()), rest)
    assert logged(model, "is_line_search_success") == 1


# --- thinning ---------------------------------------------------------------------------------------------------------


class Counting(MultiInputActorCriticPolicy):
    """Keeps the number of states of every call for a distribution."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sizes: list[int] = []

    def get_distribution(self, obs: Any) -> Distribution:
        self.sizes.append(len(obs["vector"]))
        assert len(obs["token"]) == len(obs["vector"])
        return super().get_distribution(obs)


class FirstRatio(TRPOPlus):
    ratios: list[th.Tensor]

    def policy_loss(self, ratio: th.Tensor, advantages: th.Tensor, hp: TRPOHparams) -> th.Tensor:
        self.ratios.append(ratio.detach())
        return super().policy_loss(ratio, advantages, hp)


# 80 samples; every 3rd are 27, every 2nd of those 14, every 10th of all 8.
@pytest.mark.parametrize(
    ("policy_factor", "fisher_factor", "states", "fisher_states"),
    [(1, 1, 80, []), (3, 1, 27, []), (3, 2, 27, [14]), (1, 10, 80, [8]), (1, 1000, 80, [1])],
)
def test_each_part_of_the_step_sees_the_samples_it_is_told_to_in_dict_observations(
    policy_factor: int, fisher_factor: int, states: int, fisher_states: list[int]
) -> None:
    options = {"sub_sampling_factor": policy_factor, "fisher_sub_sampling_factor": fisher_factor, "target_kl": DELTA}
    model = FirstRatio(Counting, arms(is_dict=True), **TINY, **options)
    model.ratios = []
    model.learn(80)
    n_candidates = int(logged(model, "line_search_steps"))
    assert n_candidates >= 1
    # π_old, the Fisher product's states if they are others, the candidates of the search.
    assert model.policy.sizes == [states, *fisher_states, *[states] * n_candidates]
    # Observations, actions and probabilities belong together: π_old's ratio is 1.
    assert [len(ratio) for ratio in model.ratios] == [states] * (1 + n_candidates)
    np.testing.assert_allclose(model.ratios[0].numpy(), 1, atol=1e-4)
    assert logged(model, "is_line_search_success") == 1
    assert 0 < logged(model, "kl_divergence_loss") <= DELTA


def test_a_thinned_fisher_matrix_changes_the_step_but_not_what_it_is_judged_by() -> None:
    models = []
    for factor in (1, 10):
        model = FirstRatio("MlpPolicy", arms(), **TINY, fisher_sub_sampling_factor=factor)
        model.ratios = []
        models.append(model.learn(80))
    all_states, thinned = models
    assert th.equal(all_states.ratios[0], thinned.ratios[0])
    assert logged(all_states, "curvature") != logged(thinned, "curvature")
    # The critic is fitted to all samples in both.
    assert logged(all_states, "explained_variance") == logged(thinned, "explained_variance")
    assert th.equal(critic_of(all_states), critic_of(thinned))


# --- the entropy bonus ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {**GSDE, "policy_kwargs": {"squash_output": True}}])
def test_an_entropy_bonus_raises_the_entropy(options: dict[str, Any]) -> None:
    spread = {}
    for ent_coef in (0.0, 1.0):
        model = TRPOPlus("MlpPolicy", arms(), **TINY, **options, ent_coef=ent_coef)
        before = model.policy.log_std.mean().item()
        spread[ent_coef] = model.learn(4 * 80).policy.log_std.mean().item() - before
    assert spread[1.0] > 0
    assert spread[1.0] > spread[0.0] + 0.01


# --- batch norm and dropout -------------------------------------------------------------------------------------------


class NormDropout(BaseFeaturesExtractor):
    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, observation_space.shape[0])
        self.norm = nn.BatchNorm1d(observation_space.shape[0])
        self.dropout = nn.Dropout(0.3)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.dropout(self.norm(observations.flatten(1)))


NORM_DROPOUT: dict[str, Any] = {"policy_kwargs": {"features_extractor_class": NormDropout}}


def running_statistics(model: Any) -> tuple[th.Tensor, th.Tensor]:
    norm = model.policy.features_extractor.norm
    return norm.running_mean.clone(), norm.running_var.clone()


def test_batch_norm_and_dropout_leave_the_kl_as_the_search_measured_it() -> None:
    successes: list[float] = []

    class Spy(Measured):
        def after_update(self, hp: TRPOHparams) -> None:
            super().after_update(hp)
            successes.append(logged(self, "is_line_search_success"))

    model = Spy("MlpPolicy", arms(), **TINY, **NORM_DROPOUT, target_kl=DELTA).learn(6 * 80)
    assert max(model.kls) <= DELTA + ROUNDING
    assert sum(successes) > 3
    assert sum(kl > 0.1 * DELTA for kl in model.kls) > 3


def test_running_statistics_move_with_training_and_with_nothing_else() -> None:
    model = with_rollout(TRPOPlus("MlpPolicy", arms(), **TINY, **NORM_DROPOUT))
    start = running_statistics(model)
    assert th.equal(start[0], th.zeros(3)) and th.equal(start[1], th.ones(3))
    model.train()
    # Not yet: the policy must stay the one that the search accepted.
    assert all(th.equal(a, b) for a, b in zip(running_statistics(model), start, strict=True))
    model.learn(80)  # collects a second rollout and trains on it
    after = running_statistics(model)
    assert not any(th.equal(a, b) for a, b in zip(after, start, strict=True))
    # The next rollout begins with the statistics of the last; collecting without training adds none.
    model.collect_rollouts(model.env, model._init_callback(None), model.rollout_buffer, model.n_steps)
    model.collect_rollouts(model.env, model._init_callback(None), model.rollout_buffer, model.n_steps)
    assert all(th.equal(a, b) for a, b in zip(running_statistics(model), after, strict=True))
    model.predict(np.ones((5, 3), np.float32))
    assert all(th.equal(a, b) for a, b in zip(running_statistics(model), after, strict=True))


def test_running_statistics_approach_those_of_the_observations() -> None:
    options = {**TINY, **NORM_DROPOUT, "normalize_observations": False}
    model = TRPOPlus("MlpPolicy", arms(), **options)
    seen: list[np.ndarray[Any, Any]] = []

    class Keep(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            seen.append(self.model.rollout_buffer.observations.reshape(-1, 3).copy())  # type: ignore[union-attr]

    # One pass per update moves them by torch's momentum of 0.1: after 24, 0.9²⁴ = 0.08 of where they began is left.
    model.learn(24 * 80, Keep())
    observations = np.concatenate(seen)
    mean, var = running_statistics(model)
    # They began at mean 0 and variance 1, where the third entry's mean is 1 and two variances are ¼.
    np.testing.assert_allclose(mean.numpy(), observations.mean(0), atol=0.2)
    np.testing.assert_allclose(var.numpy(), observations.var(0), atol=0.2)


def test_a_file_that_a_callback_saves_at_the_end_of_training_continues_with_the_statistics_in_it(
    tmp_path: Path,
) -> None:
    class Save(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_training_end(self) -> None:
            self.model.save(tmp_path / "model")

    class AtFirstStep(BaseCallback):
        statistics: Any = None

        def _on_step(self) -> bool:
            self.statistics = self.statistics or running_statistics(self.model)
            return True

    options = {**TINY, **NORM_DROPOUT, "normalize_observations": False}
    TRPOPlus("MlpPolicy", arms(), **options).learn(5 * 80, Save())
    loaded = TRPOPlus.load(tmp_path / "model", env=arms(), device="cpu")
    before, callback = running_statistics(loaded), AtFirstStep()
    loaded.learn(80, callback)
    assert all(th.equal(a, b) for a, b in zip(callback.statistics, before, strict=True))


# --- the interface ----------------------------------------------------------------------------------------------------

LOGGED = ["policy_objective", "kl_divergence_loss", "is_line_search_success", "surrogate_improvement"]
LOGGED += ["surrogate_improvement_expected", "cg_steps", "cg_residual", "curvature", "line_search_steps", "step_length"]
LOGGED += ["value_loss", "explained_variance", "std", "n_updates", "learning_rate", "nonfinite_updates"]


def test_what_sb3_contrib_logs_is_logged_under_its_names_and_more() -> None:
    model = TRPOPlus("MlpPolicy", arms(), **TINY).learn(2 * 80)
    for name in LOGGED:
        assert np.isfinite(logged(model, name)), name
    theirs = TRPO("MlpPolicy", arms(), n_steps=40, batch_size=40, device="cpu").learn(80).logger.name_to_value
    assert {key.removeprefix("train/") for key in theirs if key.startswith("train/")} <= set(LOGGED)
    assert logged(model, "n_updates") == model._n_updates == 2
    # Normalised advantages have mean 0, so at ρ = 1 the surrogate is 0 and what is gained is where it ends.
    improvement = logged(model, "surrogate_improvement")
    assert logged(model, "policy_objective") == pytest.approx(improvement, abs=1e-5)
    assert improvement > 0
    assert 1 <= logged(model, "cg_steps") <= TRPOHparams.defaults()["cg_max_steps"]


def test_more_steps_of_conjugate_gradient_leave_a_smaller_residual() -> None:
    residuals = {}
    for n_steps in (1, 4, 40):
        model = TRPOPlus("MlpPolicy", arms(), **TINY, cg_max_steps=n_steps).learn(80)
        residuals[n_steps] = logged(model, "cg_residual")
    assert residuals[1] > residuals[4] > residuals[40] > 0


def test_hooks_run_around_every_update_and_a_loss_is_one_function() -> None:
    calls: list[str] = []

    class Mine(TRPOPlus):
        def before_update(self, hp: TRPOHparams) -> None:
            calls.append("before")

        def update(self, hp: TRPOHparams, metrics: Metrics) -> None:
            calls.append("update")
            super().update(hp, metrics)

        def after_update(self, hp: TRPOHparams) -> None:
            calls.append("after")

        def policy_loss(self, ratio: th.Tensor, advantages: th.Tensor, hp: TRPOHparams) -> th.Tensor:
            assert ratio.shape == advantages.shape == (80,)
            return (ratio * advantages).mean()  # the wrong sign

    mine = Mine("MlpPolicy", arms(), **TINY).learn(80)
    assert calls == ["before", "update", "after"]
    fresh, usual = TRPOPlus("MlpPolicy", arms(), **TINY), TRPOPlus("MlpPolicy", arms(), **TINY).learn(80)
    # The opposite gradient makes the opposite full step.
    steps = [actor_of(model) - actor_of(fresh) for model in (mine, usual)]
    assert logged(mine, "line_search_steps") == logged(usual, "line_search_steps") == 1
    th.testing.assert_close(steps[0], -steps[1], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["SB3_TRPO", "TRPO_PLUS", "NPG"])
def test_presets_name_only_known_hyperparameters_and_train(name: str) -> None:
    preset = getattr(presets, name)
    assert set(preset) <= set(TRPOHparams.names())
    model = TRPOPlus("MlpPolicy", pendulum(), **{**preset, **TINY})
    actor, critic = actor_of(model), critic_of(model)
    model.learn(80)
    assert logged(model, "is_line_search_success") == 1
    assert not th.equal(actor_of(model), actor)
    assert not th.equal(critic_of(model), critic)


def test_the_preset_of_sb3_has_sb3_contribs_defaults() -> None:
    theirs = inspect.signature(TRPO).parameters
    shared = set(presets.SB3_TRPO) & set(theirs)
    assert shared == set(TRPOHparams.names()) & set(theirs)
    assert {name: presets.SB3_TRPO[name] for name in shared} == {name: theirs[name].default for name in shared}


def test_the_positional_arguments_are_those_of_sb3_contrib() -> None:
    theirs = [name for name in inspect.signature(TRPO).parameters if name not in ("policy", "env")]
    assert list(TRPOPlus.positional) == theirs


# --- save and load ----------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "sb3": presets.SB3_TRPO,
    "trpo_plus": presets.TRPO_PLUS,
    "npg": presets.NPG,
    "everything": {
        "learning_rate": "lin_1e-3",
        "target_kl": "cos_0.02",
        "schedule_timesteps": 600,
        "normalize_value_targets": True,
        "sub_sampling_factor": 2,
        "fisher_sub_sampling_factor": 2,
        "ent_coef": 0.01,
    },
    "gsde": GSDE,
    "batch norm": NORM_DROPOUT,
}


def everything_of(model: TRPOPlus) -> dict[str, th.Tensor]:
    state = {name: value for name, value in model.get_parameters().items() if name != "policy.optimizer"}
    tensors = {f"{name}.{key}": tensor for name, entries in state.items() for key, tensor in entries.items()}
    for index, entry in model.policy.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": th.as_tensor(value) for key, value in entry.items()}
    return tensors


@pytest.mark.filterwarnings("ignore:learn.. continues")
@pytest.mark.parametrize("name", OPTIONS)
def test_save_load_and_continue_equals_going_on(name: str, tmp_path: Path) -> None:
    sizes = {key: TINY[key] for key in ("n_steps", "batch_size", "n_critic_updates")}
    model = TRPOPlus("MlpPolicy", arms(), **{**TINY, **OPTIONS[name], **sizes}).learn(2 * 80)
    model.save(tmp_path / "model")
    loaded = TRPOPlus.load(tmp_path / "model", env=arms(), device="cpu")
    results = []
    for each in (model, loaded):
        each.set_env(each.get_env())  # both start from a reset environment
        each.get_env().seed(11)
        each.get_env().set_attr("episodes", 0)
        np.random.seed(11)
        th.manual_seed(11)
        each.learn(2 * 80, reset_num_timesteps=False)
        results.append(everything_of(each))
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        assert th.equal(value, results[1][key]), key
    assert model.num_timesteps == loaded.num_timesteps == 320
    assert model._n_updates == loaded._n_updates == 4


def test_the_trust_region_can_be_changed_by_load(tmp_path: Path) -> None:
    Measured("MlpPolicy", arms(), **TINY).learn(80).save(tmp_path / "model")
    loaded = Measured.load(tmp_path / "model", env=arms(), device="cpu", target_kl=1e-4, line_search_max_iter=20)
    loaded.learn(3 * 80)
    assert 0 < max(loaded.kls) <= 1e-4 + ROUNDING
