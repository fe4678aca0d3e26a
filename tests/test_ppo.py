"""PPOPlus: every hyperparameter changes something, gradients go where they should, KL control, hooks."""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_pgplus import PPOPlus, presets
from sb3_pgplus.buffers import RolloutSamples
from sb3_pgplus.hparams import PPOHparams
from sb3_pgplus.metrics import Metrics

TINY: dict[str, Any] = {"n_steps": 40, "batch_size": 40, "n_epochs": 2, "seed": 0, "device": "cpu"}
TINY["learning_rate"] = 1e-3  # the default anneals to 0 at the last update, which is the only one in some tests


def pendulum(n_envs: int = 2, limit: int = 15) -> Any:
    return make_vec_env(
        "Pendulum-v1", n_envs, seed=0, wrapper_class=TimeLimit, wrapper_kwargs={"max_episode_steps": limit}
    )


def parameters_after(n_iterations: int = 3, env: Any = None, **settings: Any) -> th.Tensor:
    model = PPOPlus("MlpPolicy", env or pendulum(), **{**TINY, **settings})
    model.learn(n_iterations * model.n_steps * model.n_envs)
    return nn.utils.parameters_to_vector(model.policy.parameters()).detach()


# name → (other value, settings under which it can bite)
KNOBS: dict[str, tuple[Any, dict[str, Any]]] = {
    "learning_rate": ("lin_1e-3", {}),
    "n_steps": (20, {}),
    "n_envs": (2, {"env": "Pendulum-v1"}),
    "gamma": (0.9, {}),
    "gae_lambda": (0.5, {}),
    "normalize_advantage": (False, {}),
    "advantage_estimator": ("td", {}),
    "n_step_horizon": (2, {"advantage_estimator": "n_step"}),
    "bootstrap_truncated": (False, {}),
    "normalize_observations": (False, {}),
    "clip_observations": (0.5, {}),
    "normalize_rewards": (False, {}),
    "clip_rewards": (0.01, {}),
    "normalize_value_targets": (True, {}),
    "critic_learning_rate": (1e-2, {}),
    "ortho_init": (False, {}),
    "activation_fn": ("relu", {}),
    "log_std_init": (-1.0, {}),
    "adam_eps": (1e-2, {}),
    "schedule_timesteps": (10_000, {"learning_rate": "lin_1e-3"}),
    "sb3_exact": (True, {"clip_range_vf": None}),
    "ent_coef": (0.1, {}),
    "vf_coef": (5.0, {}),
    "max_grad_norm": (0.01, {}),
    "batch_size": (20, {}),
    "n_epochs": (3, {}),
    "clip_range": (1e-4, {}),
    "clip_range_vf": (1e-4, {}),
    "value_clip": ("clipped_only", {"clip_range_vf": 1e-3, "learning_rate": 1e-2}),
    "target_kl": (1e-7, {}),
    "kl_coef": (10.0, {}),
    "adaptive_kl_target": (1e-6, {"kl_coef": 1.0}),
    "desired_kl": (1e-8, {}),
    "recompute_advantages": (False, {}),
    "n_critic_epochs": (4, {}),
}


def test_every_hyperparameter_is_in_the_list_below() -> None:
    # max_nonfinite_updates acts on failures alone (tests/test_guards.py), compile on speed (tests/test_engine.py).
    assert set(KNOBS) | {"max_nonfinite_updates", "compile"} == set(PPOHparams.names())


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
@pytest.mark.parametrize("name", KNOBS)
def test_no_dead_knobs(name: str) -> None:
    value, scenario = KNOBS[name]
    reference = parameters_after(**scenario)
    assert th.equal(reference, parameters_after(**scenario))  # the same settings give the same parameters
    assert not th.equal(reference, parameters_after(**scenario, **{name: value}))


def test_fewer_critic_epochs_than_epochs_leave_the_critic_alone_in_the_rest() -> None:
    critic = []
    for n_epochs in (2, 5):
        model = PPOPlus("MlpPolicy", pendulum(), **{**TINY, "n_epochs": n_epochs, "n_critic_epochs": 2})
        model.learn(80)
        critic.append(nn.utils.parameters_to_vector(model.policy.value_net.parameters()).detach())
    # The global norm is clipped over actor and critic together in both, and the epochs draw the same permutations.
    assert th.equal(critic[0], critic[1])


def test_further_critic_epochs_never_move_the_actor() -> None:
    actors = []
    for n_critic_epochs in (2, 6):
        model = PPOPlus("MlpPolicy", pendulum(), **{**TINY, "n_critic_epochs": n_critic_epochs})
        model.learn(80)
        actor = [*model.policy.mlp_extractor.policy_net.parameters(), *model.policy.action_net.parameters()]
        actors.append(nn.utils.parameters_to_vector([*actor, model.policy.log_std]).detach())
    assert th.equal(actors[0], actors[1])


def losses_of(**settings: Any) -> tuple[PPOPlus, Any, RolloutSamples, PPOHparams]:
    model = PPOPlus("MlpPolicy", pendulum(), **{**TINY, **settings})
    model._setup_learn(80)
    model.collect_rollouts(model.env, model._init_callback(None), model.rollout_buffer, model.n_steps)
    hp = model.hyperparameters_at(1.0)
    batch = next(iter(model.rollout_buffer.get(None)))
    loss, _ = model.loss(batch, hp)
    return model, loss, batch, hp


def gradient_norms(loss: th.Tensor, modules: list[nn.Module]) -> list[float]:
    result = []
    for module in modules:
        gradients = th.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True)
        result.append(sum(0.0 if g is None else float(g.abs().sum()) for g in gradients))
    return result


def test_the_policy_loss_never_reaches_the_critic_nor_the_value_loss_the_actor() -> None:
    model, _, batch, hp = losses_of()
    actor, critic = model.policy.mlp_extractor.policy_net, model.policy.mlp_extractor.value_net
    values, log_prob, _ = model.policy.evaluate_actions(batch.observations, batch.actions)
    policy_loss = model.policy_loss(th.exp(log_prob - batch.old_log_prob), batch.advantages, hp)
    value_loss, _ = model._critic_loss(values.flatten(), batch, hp)
    assert gradient_norms(policy_loss, [critic, model.policy.value_net]) == [0, 0]
    assert min(gradient_norms(policy_loss, [actor, model.policy.action_net])) > 0
    assert gradient_norms(value_loss, [actor, model.policy.action_net]) == [0, 0]
    assert min(gradient_norms(value_loss, [critic, model.policy.value_net])) > 0


def test_targets_and_advantages_carry_no_gradient() -> None:
    _, _, batch, _ = losses_of()
    assert not any(tensor.requires_grad for tensor in (batch.advantages, batch.returns, batch.old_values))


def test_at_the_first_minibatch_the_clipped_gradient_is_the_policy_gradient() -> None:
    # At ρ = 1 the surrogate's gradient is −E[∇log π Ψ].
    model, _, batch, hp = losses_of(normalize_advantage=False)
    _, log_prob, _ = model.policy.evaluate_actions(batch.observations, batch.actions)
    surrogate = model.policy_loss(th.exp(log_prob - batch.old_log_prob), batch.advantages, hp)
    policy_gradient = -(log_prob * batch.advantages).mean()
    parameters = list(model.policy.action_net.parameters())
    a = th.autograd.grad(surrogate, parameters, retain_graph=True)
    b = th.autograd.grad(policy_gradient, parameters)
    for x, y in zip(a, b, strict=True):
        assert th.allclose(x, y, atol=1e-5)


def test_truncated_steps_bootstrap_from_the_true_final_observation() -> None:
    model, _, _, _ = losses_of(normalize_observations=False)
    buffer, end = model.rollout_buffer, model._rollout_end
    assert end.steps == [14, 14, 29, 29]  # a limit of 15 steps, 40 steps per rollout, 2 environments
    with th.no_grad():
        for step, env, final in zip(end.steps, end.envs, end.final_observations, strict=True):
            expected = model.policy.predict_values(final).item()
            assert buffer.next_values[step, env] == pytest.approx(expected, abs=1e-6)
            # V(s_{T−1}), or V of the next episode's first observation, would be wrong.
            assert buffer.next_values[step, env] != pytest.approx(float(buffer.values[step, env]), abs=1e-6)
    assert buffer.dones[end.steps, end.envs].all() and buffer.dones.sum() == len(end.steps)


def test_without_bootstrap_a_truncation_counts_as_a_termination() -> None:
    model, _, _, _ = losses_of(bootstrap_truncated=False)
    assert (model.rollout_buffer.next_values[14] == 0).all()


def test_target_kl_stops_before_the_step_that_would_follow() -> None:
    model = PPOPlus("MlpPolicy", pendulum(), **{**TINY, "n_epochs": 50, "target_kl": 1e-6, "learning_rate": 1e-2})
    model.learn(80)
    # Minibatch 1 has a KL of 0 and steps; minibatch 2 sees a large one and stops epoch 1.
    assert model._n_updates == 1
    steps = {int(state["step"]) for state in model.policy.optimizer.state.values()}
    assert steps == {1}


def test_beta_doubles_above_and_halves_below_its_target() -> None:
    for target, expected in ((1e-9, 2.0), (1e3, 0.5)):
        model = PPOPlus("MlpPolicy", pendulum(), **TINY, kl_coef=0.1, clip_range=None, adaptive_kl_target=target)
        model.learn(80)
        assert model._kl_coef_scale == expected


def test_the_learning_rate_follows_the_kl_within_its_bounds() -> None:
    low = PPOPlus("MlpPolicy", pendulum(), **TINY, desired_kl=1e-9).learn(80)
    assert low._kl_lr_scale == pytest.approx(1.5**-2)  # two epochs, both above twice the target
    assert low.policy.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 1.5**2)
    high = PPOPlus("MlpPolicy", pendulum(), **{**TINY, "n_epochs": 9, "learning_rate": 1e-6}, desired_kl=1e3).learn(80)
    assert high._kl_lr_scale == 10.0  # 1.5⁹ = 38, held at 10


def test_the_kl_penalty_holds_the_policy_back() -> None:
    def kl_after(kl_coef: float | None) -> float:
        settings = {**TINY, "n_epochs": 20, "learning_rate": 3e-3, "clip_range": None, "kl_coef": kl_coef}
        model = PPOPlus("MlpPolicy", pendulum(), **settings)
        model.learn(80)
        buffer = model.rollout_buffer
        with th.no_grad():
            batch = next(iter(buffer.get(None)))
            _, log_prob, _ = model.policy.evaluate_actions(batch.observations, batch.actions)
        log_ratio = log_prob - batch.old_log_prob
        return float(((log_ratio.exp() - 1) - log_ratio).mean())

    assert kl_after(100.0) < 0.2 * kl_after(None)


def test_recomputed_advantages_use_todays_critic_and_keep_v_old() -> None:
    model, _, _, hp = losses_of()
    buffer = model.rollout_buffer
    before = {name: buffer.tensor(name).clone() for name in ("values", "advantages", "returns")}
    with th.no_grad():
        model.policy.value_net.bias += 1.0  # every value rises by 1
    model._recompute_advantages(buffer, hp)
    assert th.equal(buffer.tensor("values"), before["values"])
    assert not th.allclose(buffer.tensor("advantages"), before["advantages"])
    # Inside an episode, far from its end, raising V by 1 changes δ by γ − 1 and Ψ by Σ(γλ)^k (γ − 1).
    k = np.arange(14)
    expected = ((hp.gamma * hp.gae_lambda) ** k).sum() * (hp.gamma - 1)
    change = buffer.tensor("advantages")[0, 0] - before["advantages"][0, 0]
    # Step 14 is truncated and bootstraps from V(s_T), which rose too.
    expected += (hp.gamma * hp.gae_lambda) ** 14 * (hp.gamma - 1)
    assert float(change) == pytest.approx(expected, abs=1e-4)
    # Recomputing with an unchanged critic changes nothing.
    with th.no_grad():
        model.policy.value_net.bias -= 1.0
    model._recompute_advantages(buffer, hp)
    assert th.allclose(buffer.tensor("advantages"), before["advantages"], atol=1e-5)


def test_hooks_run_around_every_update_and_a_loss_is_one_function() -> None:
    calls: list[str] = []

    class Mine(PPOPlus):
        def before_update(self, hp: PPOHparams) -> None:
            calls.append("before")

        def update(self, hp: PPOHparams, metrics: Metrics) -> None:
            calls.append("update")
            super().update(hp, metrics)

        def after_update(self, hp: PPOHparams) -> None:
            calls.append("after")

        def policy_loss(self, ratio: th.Tensor, advantages: th.Tensor, hp: PPOHparams) -> th.Tensor:
            return (ratio * advantages).mean()  # the wrong sign

    mine = Mine("MlpPolicy", pendulum(), **TINY).learn(160)
    assert calls == ["before", "update", "after"] * 2
    theirs = PPOPlus("MlpPolicy", pendulum(), **TINY).learn(160)
    assert not th.equal(*(next(iter(model.policy.action_net.parameters())) for model in (mine, theirs)))


def test_presets_name_only_known_hyperparameters_and_train() -> None:
    for name in ("SB3_PPO", "LECTURE", "PPO_MINIMAL", "PPO_NO_CLIP"):
        preset = getattr(presets, name)
        assert set(preset) <= set(PPOHparams.names())
        model = PPOPlus("MlpPolicy", pendulum(), **{**preset, **TINY}).learn(80)
        assert model.num_timesteps == 80


def test_the_lecture_preset_has_every_trick_on() -> None:
    hp = PPOHparams.resolve({**PPOHparams.defaults(), **presets.LECTURE})
    assert hp.clip_range == 0.2 and hp.clip_range_vf == 0.2 and hp.value_clip == "max"
    assert hp.advantage_estimator == "gae" and hp.normalize_advantage and hp.kl_coef is None
    assert hp.normalize_rewards == "auto" and hp.clip_rewards == 10 and hp.clip_observations == 10
    assert hp.normalize_observations == "auto" and hp.ortho_init and hp.activation_fn == "tanh"
    assert hp.adam_eps == 1e-5 and hp.max_grad_norm == 0.5
    at_the_end = PPOHparams.resolve({**PPOHparams.defaults(), **presets.LECTURE}, progress_remaining=0.0)
    assert at_the_end.clip_range == 0 and at_the_end.learning_rate == 0


class _HalfDropped(BaseFeaturesExtractor):
    """Features half of which are dropped while training."""

    def __init__(self, space: Any) -> None:
        super().__init__(space, 32)
        self.layers = nn.Sequential(nn.Linear(3, 32), nn.Dropout(0.5))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layers(observations)  # type: ignore[no-any-return]  # modules return Any


def test_the_kl_that_adapts_its_coefficient_is_without_dropouts_chance() -> None:
    # The policy does not move, so the KL is 0 and the coefficient is halved every time.
    kwargs = {"kl_coef": 1.0, "adaptive_kl_target": 0.01, "policy_kwargs": {"features_extractor_class": _HalfDropped}}
    model = PPOPlus("MlpPolicy", "Pendulum-v1", n_steps=64, batch_size=32, n_epochs=1, learning_rate=1e-12, **kwargs)
    scales = [model.learn(64, reset_num_timesteps=False)._kl_coef_scale for _ in range(3)]
    assert scales == [0.5, 0.25, 0.125]


class _Indifferent(BaseCallback):
    """Leaves the policy and the critic nothing to learn."""

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        buffer.advantages[:] = 0.0
        buffer.returns[:] = buffer.values

    def _on_step(self) -> bool:
        return True


def test_advantages_that_a_callback_put_in_the_buffer_stay_unless_recomputing_was_asked_for() -> None:
    moved = {}
    for choice in ("auto", True, False):
        kwargs = {"n_steps": 64, "batch_size": 32, "n_epochs": 3, "normalize_advantage": False, "seed": 0}
        model = PPOPlus("MlpPolicy", "Pendulum-v1", recompute_advantages=choice, **kwargs)
        before = model.policy.action_net.weight.detach().clone()
        model.learn(64, callback=_Indifferent())
        moved[choice] = not th.equal(model.policy.action_net.weight, before)
    assert moved == {"auto": False, True: True, False: False}
