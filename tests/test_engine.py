"""The engine: compiled updates and policy steps equal the eager ones, and what cannot be compiled safely is not."""

import dataclasses
import functools
import math
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO as PPO_OF_SB3
from stable_baselines3.common.callbacks import BaseCallback, EveryNTimesteps, StopTrainingOnMaxEpisodes
from stable_baselines3.common.policies import ActorCriticPolicy, BaseModel
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, MlpExtractor
from torch import nn

from sb3_pgplus import A2CPlus, PPOPlus, TorchRolloutBuffer, TRPOPlus, presets, updates
from sb3_pgplus.compiled_update import CompiledUpdate, clip_by_norm
from sb3_pgplus.compiler import Compiled, UntraceableError, compile_function, compile_in_two
from sb3_pgplus.core import losses
from sb3_pgplus.engine import COSTS, Engine
from sb3_pgplus.policies import NormalizesObservations, normalized_policy_class, set_training_mode
from sb3_pgplus.sampling import noise_of
from sb3_pgplus.tracing import Snapshot, Tensors, check_policy, fingerprint, is_patched

SMALL = {"n_steps": 32, "n_envs": 2, "seed": 3, "device": "cpu"}
PPO = {**SMALL, "batch_size": 32, "n_epochs": 2}
ITERATION = 64


class Arms(gym.Env[np.ndarray, Any]):
    """A random environment with any action space: what is observed depends on what is done."""

    def __init__(self, action_space: spaces.Space[Any], observation_space: spaces.Space[Any] | None = None) -> None:
        self.action_space = action_space
        self.observation_space = observation_space or spaces.Box(-10, 10, (3,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self._observe(0.0), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        felt = float(np.sum(action))
        return self._observe(felt), np.sin(felt), self.t % 7 == 0, self.t % 5 == 0, {}

    def _observe(self, felt: float) -> Any:
        if isinstance(self.observation_space, spaces.Dict):
            return {key: self._draw(space, felt) for key, space in self.observation_space.spaces.items()}
        return self._draw(self.observation_space, felt)

    def _draw(self, space: Any, felt: float) -> Any:
        return (self.np_random.normal(size=space.shape) + 0.1 * felt).clip(-9, 9).astype(space.dtype)


def parameters_of(model: Any) -> th.Tensor:
    return nn.utils.parameters_to_vector(model.policy.parameters()).detach()


def trained(cls: Any, env: Any, total: int, **kwargs: Any) -> Any:
    return cls(kwargs.pop("policy", "MlpPolicy"), env, **kwargs).learn(total)


def compiled_and_eager(cls: Any, env: Callable[[], Any] | str, total: int, **kwargs: Any) -> tuple[Any, Any]:
    make = env if callable(env) else lambda: env
    return trained(cls, make(), total, compile=True, **kwargs), trained(cls, make(), total, compile=False, **kwargs)


# --- equality ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "env", "kwargs"),
    [
        (PPOPlus, "Pendulum-v1", PPO),
        (PPOPlus, "CartPole-v1", {**PPO, "batch_size": 48, "clip_range_vf": None}),  # ragged last minibatch
        (PPOPlus, "Pendulum-v1", {**PPO, "kl_coef": 0.1, "adaptive_kl_target": 0.01, "normalize_value_targets": True}),
        (PPOPlus, "Pendulum-v1", {**PPO, "critic_learning_rate": 1e-3, "n_critic_epochs": 4, "max_grad_norm": None}),
        (A2CPlus, "Pendulum-v1", {**SMALL, "ent_coef": 0.01}),
        (A2CPlus, "CartPole-v1", {**SMALL, "use_rms_prop": "tf_like"}),
        (TRPOPlus, "Pendulum-v1", {**SMALL, "batch_size": 32, "n_critic_updates": 3}),
    ],
)
def test_a_compiled_iteration_equals_the_eager_one(cls: Any, env: str, kwargs: dict[str, Any]) -> None:
    compiled, eager = compiled_and_eager(cls, env, 2 * ITERATION, **kwargs)
    assert "compiled" in compiled.engine_report()
    assert "compiled" not in eager.engine_report()
    # Two iterations: single-precision rounding has not grown beyond 1e-5 yet.
    th.testing.assert_close(parameters_of(compiled), parameters_of(eager), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("optimizer", [th.optim.Adam, th.optim.NAdam])  # NAdam steps itself
def test_an_early_stop_by_target_kl_comes_at_the_same_minibatch(optimizer: Any) -> None:
    kwargs = {**PPO, "n_epochs": 20, "learning_rate": 1e-2, "target_kl": 0.005}
    kwargs["policy_kwargs"] = {"optimizer_class": optimizer, "optimizer_kwargs": {"eps": 1e-5}}
    compiled, eager = compiled_and_eager(PPOPlus, "Pendulum-v1", ITERATION, **kwargs)
    assert 0 < eager._n_updates < 20  # it did stop early
    assert compiled._n_updates == eager._n_updates
    th.testing.assert_close(parameters_of(compiled), parameters_of(eager), rtol=1e-5, atol=1e-5)


ACTION_SPACES = [
    spaces.Box(-1, 1, (2, 2)),
    spaces.Discrete(5),
    spaces.MultiDiscrete([3, 2, 4]),
    spaces.MultiBinary(3),
]


@pytest.mark.parametrize("space", ACTION_SPACES, ids=lambda space: type(space).__name__)
def test_a_compiled_policy_takes_the_actions_of_the_eager_one_from_the_same_seed(space: spaces.Space[Any]) -> None:
    compiled, eager = compiled_and_eager(A2CPlus, lambda: Arms(space), 32, **{**SMALL, "n_envs": 1})
    assert "policy step: compiled" in compiled.engine_report()
    np.testing.assert_allclose(compiled.rollout_buffer.actions, eager.rollout_buffer.actions, atol=1e-5)
    np.testing.assert_allclose(compiled.rollout_buffer.log_probs, eager.rollout_buffer.log_probs, atol=1e-5)
    np.testing.assert_allclose(compiled.rollout_buffer.values, eager.rollout_buffer.values, atol=1e-5)


def test_dict_observations_are_compiled_whatever_the_order_of_their_keys() -> None:
    space = spaces.Dict({"b": spaces.Box(-10, 10, (2,)), "a": spaces.Box(-10, 10, (3,))})
    kwargs = {**PPO, "n_envs": 1, "n_steps": 64, "policy": "MultiInputPolicy"}
    compiled, eager = compiled_and_eager(PPOPlus, lambda: Arms(spaces.Discrete(2), space), 128, **kwargs)
    assert "update: compiled" in compiled.engine_report()
    th.testing.assert_close(parameters_of(compiled), parameters_of(eager), rtol=1e-5, atol=1e-5)


def state_of(model: Any) -> list[th.Tensor]:
    """Parameters and everything the optimiser keeps."""
    states = [value for state in model.policy.optimizer.state_dict()["state"].values() for value in state.values()]
    return [tensor.detach().clone() for tensor in (*model.policy.parameters(), *states)]


@pytest.mark.parametrize(("cls", "kwargs"), [(PPOPlus, {**PPO, "n_epochs": 1}), (A2CPlus, SMALL)])
def test_a_compiled_update_that_is_not_finite_leaves_parameters_and_optimizer_bit_equal(
    cls: Any, kwargs: dict[str, Any]
) -> None:
    model = cls("MlpPolicy", "Pendulum-v1", compile=True, **kwargs).learn(ITERATION)
    before = state_of(model)
    model.rollout_buffer.tensor("returns").fill_(1e30)  # squared, that is beyond float32
    model.train()
    assert "update: compiled" in model.engine_report()
    assert model._nonfinite_updates == (2 if cls is PPOPlus else 1)
    assert all(th.equal(x, y) for x, y in zip(before, state_of(model), strict=True))
    model.learn(ITERATION, reset_num_timesteps=False)
    assert not any(th.equal(x, y) for x, y in zip(before, state_of(model), strict=True) if x.numel() > 1)


@pytest.mark.parametrize(("cls", "kwargs"), [(PPOPlus, PPO), (A2CPlus, SMALL)])
def test_the_optimizers_state_after_compiled_steps_is_that_of_eager_ones(cls: Any, kwargs: dict[str, Any]) -> None:
    compiled, eager = compiled_and_eager(cls, "Pendulum-v1", 2 * ITERATION, **kwargs)
    ours, theirs = (model.policy.optimizer.state_dict() for model in (compiled, eager))
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for key, state in ours["state"].items():
        for name, value in state.items():
            th.testing.assert_close(value, theirs["state"][key][name], rtol=1e-4, atol=1e-6)
    # The last minibatch's gradients, clipped, are where they are without a compiler.
    gradients = [[p.grad for p in model.policy.parameters()] for model in (compiled, eager)]
    th.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_gradients_taken_away_between_updates_are_there_again_after_the_next() -> None:
    model = PPOPlus("MlpPolicy", "Pendulum-v1", compile=True, **PPO).learn(ITERATION)
    model.policy.optimizer.zero_grad()
    model.learn(ITERATION, reset_num_timesteps=False)
    norms = [float(p.grad.norm()) for p in model.policy.parameters() if p.grad is not None]
    assert len(norms) == len(list(model.policy.parameters()))
    assert math.hypot(*norms) > 0


def test_after_an_update_that_was_not_finite_gradients_are_those_of_the_next() -> None:
    """The guard takes them away; the compiled function writes where they were."""
    model = PPOPlus("MlpPolicy", "Pendulum-v1", compile=True, **{**PPO, "n_epochs": 1}).learn(ITERATION)
    buffer = model.rollout_buffer
    returns = buffer.tensor("returns").clone()
    buffer.tensor("returns").fill_(th.inf)
    model.train()
    assert all(p.grad is None for p in model.policy.parameters())
    buffer.tensor("returns").copy_(returns)
    model.train()
    assert all(p.grad is not None for p in model.policy.parameters())


def test_an_optimizer_with_a_hook_makes_its_steps_itself() -> None:
    model = A2CPlus("MlpPolicy", "Pendulum-v1", **SMALL, compile=True).learn(ITERATION)
    calls: list[int] = []
    model.policy.optimizer.register_step_post_hook(lambda *_: calls.append(1))
    model.learn(ITERATION, reset_num_timesteps=False)
    assert len(calls) == 1
    assert "update: compiled (2 version(s)" in model.engine_report()


def test_a_subclass_that_decides_about_steps_is_obeyed() -> None:
    class NeverStepping(A2CPlus):
        def _apply(self, gradient: Any, batch: Any) -> None:
            pass

    model = NeverStepping("MlpPolicy", "Pendulum-v1", **SMALL, compile=True)
    before = parameters_of(model)
    model.learn(ITERATION)
    assert "update: compiled" in model.engine_report()
    assert th.equal(parameters_of(model), before)


def _replace_moments(optimizer: Any) -> None:
    for state in optimizer.state.values():
        for name in state.keys() - {"step"}:
            state[name] = th.zeros_like(state[name])


def _replace_data(optimizer: Any) -> None:
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.data = th.zeros_like(tensor)


def _replace_counters(optimizer: Any) -> None:
    for state in optimizer.state.values():
        state["step"] = th.tensor(0.0, dtype=th.float64)


def _clear_states(optimizer: Any) -> None:
    for state in optimizer.state.values():
        state.clear()


@pytest.mark.parametrize("change", [_replace_moments, _replace_data, _replace_counters, _clear_states])
@pytest.mark.parametrize("cls", [PPOPlus, A2CPlus])
def test_an_optimizers_state_that_is_reset_between_two_updates_is_reset(
    cls: Any, change: Callable[[Any], None]
) -> None:
    class Reset(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            if self.num_timesteps == 3 * ITERATION:
                change(self.model.policy.optimizer)

    kwargs = PPO if cls is PPOPlus else SMALL
    models = [
        cls("MlpPolicy", "Pendulum-v1", **kwargs, compile=compile).learn(4 * ITERATION, Reset())
        for compile in (True, False)
    ]
    compiled, eager = models
    assert "update: compiled" in compiled.engine_report()
    th.testing.assert_close(parameters_of(compiled), parameters_of(eager), rtol=1e-3, atol=1e-4)
    states = [[float(state["step"]) for state in model.policy.optimizer.state.values()] for model in models]
    assert states[0] == states[1]


def test_a_policy_moved_between_two_updates_trains_on() -> None:
    def moved(compile: bool) -> Any:
        model = PPOPlus("MlpPolicy", "Pendulum-v1", **PPO, compile=compile).learn(ITERATION)
        model.policy.to("cpu")
        for parameter in model.policy.parameters():  # what moving to another device and back does
            parameter.data = parameter.data.clone()
        return model.learn(ITERATION, reset_num_timesteps=False)

    compiled, eager = moved(True), moved(False)
    assert "update: compiled (1 version(s)" in compiled.engine_report()
    th.testing.assert_close(parameters_of(compiled), parameters_of(eager), rtol=1e-5, atol=1e-5)


def test_a_policy_of_images_is_compiled_and_equals_the_eager_one() -> None:
    frames = spaces.Box(0, 255, (1, 36, 36), np.uint8)
    kwargs = {**PPO, "n_steps": 16, "n_envs": 1, "batch_size": 8, "policy": "CnnPolicy"}
    compiled, eager = compiled_and_eager(PPOPlus, lambda: Arms(spaces.Discrete(3), frames), 16, **kwargs)
    assert "update: compiled" in compiled.engine_report()
    th.testing.assert_close(parameters_of(compiled), parameters_of(eager), rtol=1e-5, atol=1e-5)


def test_convolutions_on_a_cpu_are_not_compiled_unless_asked_for() -> None:
    frames = spaces.Box(0, 255, (1, 36, 36), np.uint8)
    kwargs = {**PPO, "n_steps": 16, "n_envs": 1, "batch_size": 8}
    model = PPOPlus("CnnPolicy", Arms(spaces.Discrete(3), frames), **kwargs)
    model._total_timesteps = 10_000_000  # long enough for anything else
    model._plan_engine()
    assert not model._engine.wants("update") and not model._engine.wants("policy step")
    assert "update: eager, convolutions on a CPU" in model.engine_report()
    vectors = PPOPlus("MlpPolicy", Arms(spaces.Discrete(3)), **kwargs)
    vectors._total_timesteps = 10_000_000
    vectors._plan_engine()
    assert vectors._engine.wants("update") and vectors._engine.wants("policy step")


@pytest.mark.parametrize("space", ACTION_SPACES, ids=lambda space: type(space).__name__)
@pytest.mark.parametrize("thinning", [1, 3])
def test_a_compiled_step_in_the_trust_region_is_the_eager_one(space: spaces.Space[Any], thinning: int) -> None:
    kwargs = {**SMALL, "n_envs": 1, "n_critic_updates": 1, "batch_size": 32, "fisher_sub_sampling_factor": thinning}
    compiled, eager = compiled_and_eager(TRPOPlus, lambda: Arms(space), 32, **kwargs)
    assert "Fisher product: compiled (1 version(s)" in compiled.engine_report()
    assert "Fisher product" not in eager.engine_report().replace("Fisher product: eager, compile=False", "")
    # Conjugate gradient enlarges rounding by the condition of the Fisher matrix.
    th.testing.assert_close(parameters_of(compiled), parameters_of(eager), rtol=1e-3, atol=1e-4)


def test_the_compiled_tanh_is_torchs_within_seven_roundings_everywhere() -> None:
    x = th.cat([th.linspace(-12, 12, 400_001), th.logspace(-38, 1, 400_001), -th.logspace(-38, 1, 400_001)])
    [y] = compile_function(lambda x: [th.tanh(x)], [x])([x])
    exact = th.tanh(x.double())
    # float32 rounds by half of 2⁻²³ = 1.2e-7 of the value.
    assert ((y - exact).abs() <= 7 * 2**-24 * exact.abs() + 1e-45).all()
    assert y.abs().max() == 1.0
    assert y.unique().numel() > 800_000  # small values keep all their digits
    ends = th.tensor([0.0, -0.0, th.inf, -th.inf, th.nan])
    [limits] = compile_function(lambda x: [th.tanh(x)], [ends])([ends])
    assert limits[:2].tolist() == [0.0, -0.0] and limits[4].isnan()
    assert limits[2] == -limits[3] and 1 - 2**-23 <= limits[2] <= 1


def test_the_compiled_tanh_of_double_precision_is_torchs() -> None:
    x = th.linspace(-12, 12, 10_001, dtype=th.float64)
    [y] = compile_function(lambda x: [th.tanh(x)], [x])([x])
    assert (y - th.tanh(x)).abs().max() <= 2**-52


def test_what_products_share_keeps_its_layout_where_the_compiler_would_change_it() -> None:
    frames = spaces.Box(0, 255, (3, 40, 44), np.uint8)  # convolutions, which it would lay out by channels
    kwargs = {**SMALL, "n_steps": 24, "n_envs": 1, "n_critic_updates": 1, "batch_size": 24, "policy": "CnnPolicy"}
    compiled, eager = compiled_and_eager(TRPOPlus, lambda: Arms(spaces.Discrete(3), frames), 24, **kwargs)
    assert "Fisher product: compiled (1 version(s)" in compiled.engine_report()
    assert "Fisher product: eager" not in compiled.engine_report()
    th.testing.assert_close(parameters_of(compiled), parameters_of(eager), rtol=1e-3, atol=1e-4)


def test_a_compiled_fisher_product_that_drifts_is_put_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs = {**SMALL, "batch_size": 32, "n_critic_updates": 1}
    model = TRPOPlus("MlpPolicy", "Pendulum-v1", **kwargs, compile=True).learn(ITERATION)
    (version,) = model._engine._functions["Fisher product"].values()
    monkeypatch.setattr(version, "call", lambda inputs: [2 * inputs[-1]])
    monkeypatch.setattr(version, "n_calls", 15)  # the next is compared
    with pytest.warns(UserWarning, match="Fisher product: its compiled result differed"):
        model.learn(ITERATION, reset_num_timesteps=False)
    assert "Fisher product: eager, its compiled result differed" in model.engine_report()


def test_frozen_layers_stay_and_the_rest_moves_as_without_a_compiler() -> None:
    def frozen(compile: bool) -> Any:
        model = PPOPlus("MlpPolicy", "Pendulum-v1", **PPO, compile=compile)
        layer = model.policy.mlp_extractor.policy_net[0].weight.requires_grad_(False)
        before = layer.clone()
        model.learn(ITERATION)
        assert th.equal(layer, before)
        return model

    compiled, eager = frozen(True), frozen(False)
    assert "update: compiled" in compiled.engine_report()
    th.testing.assert_close(parameters_of(compiled), parameters_of(eager), rtol=1e-5, atol=1e-5)


def test_a_layer_frozen_between_two_updates_is_noticed() -> None:
    model = PPOPlus("MlpPolicy", "Pendulum-v1", **PPO, compile=True).learn(ITERATION)
    layer = model.policy.mlp_extractor.policy_net[0].weight.requires_grad_(False)
    before = layer.clone()
    model.learn(ITERATION, reset_num_timesteps=False)
    assert th.equal(layer, before)
    assert "update: compiled (2 version(s)" in model.engine_report()


class _Overriding(PPOPlus):
    def after_update(self, hp: Any) -> None:
        pass


class _Watching(BaseCallback):
    def _on_step(self) -> bool:
        return True


def _replaced(**kwargs: Any) -> Any:
    model: Any = PPOPlus(**kwargs)
    model.before_update = lambda hp: None
    return model


@pytest.mark.parametrize(
    ("make", "callback", "expected"),
    [
        (PPOPlus, None, [False, False, True, True]),
        (TRPOPlus, EveryNTimesteps(64, StopTrainingOnMaxEpisodes(1000)), [False, False, True, True]),
        (PPOPlus, _Watching(), [False] * 4),
        (PPOPlus, lambda *_: True, [False] * 4),
        (_replaced, None, [False] * 4),
        (_Overriding, None, [False] * 4),
    ],
    ids=["ours alone", "SB3's callbacks", "a callback", "a function", "a replaced method", "an overridden method"],
)
def test_modules_are_looked_at_in_every_iteration_where_somebody_elses_code_runs(
    make: Any, callback: Any, expected: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    remembered = Engine.remembered

    def observed(engine: Engine, what: Any, find: Any) -> Any:
        if what == "policy step":
            seen.append(engine.is_undisturbed)
        return remembered(engine, what, find)

    monkeypatch.setattr(Engine, "remembered", observed)
    model = make(policy="MlpPolicy", env="Pendulum-v1", **SMALL)
    model.learn(4 * ITERATION, callback)
    assert seen == expected
    assert not model._engine.is_undisturbed  # whatever comes after `learn` is looked at


def test_what_was_remembered_is_forgotten_between_two_trainings() -> None:
    model = A2CPlus("MlpPolicy", "Pendulum-v1", n_steps=8, n_envs=2, seed=0, compile=True).learn(160)
    layer = model.policy.mlp_extractor.policy_net[0].weight.requires_grad_(False)
    before = [x.clone() for x in model.policy.parameters()]
    model.learn(160, reset_num_timesteps=False)
    stayed = [th.equal(x, y) for x, y in zip(model.policy.parameters(), before, strict=True)]
    assert [x is layer for x in model.policy.parameters()] == stayed


@pytest.mark.parametrize("callback", [None, lambda *_: True])
def test_a_layer_that_a_schedule_puts_in_place_is_trained_with_and_without_a_callback(callback: Any) -> None:
    found: dict[str, Any] = {}

    def rate(progress: float) -> float:
        if progress < 0.5 and not found.get("layer") and "model" in found:
            policy, layer = found["model"].policy, nn.Linear(64, 1)
            found.update(layer=layer, before=layer.weight.detach().clone())
            policy.value_net = layer
            policy.optimizer.add_param_group({"params": list(layer.parameters())})
        return 1e-3

    found["model"] = A2CPlus("MlpPolicy", "Pendulum-v1", n_steps=8, seed=0, learning_rate=rate)
    found["model"].learn(800, callback)
    assert not th.equal(found["layer"].weight, found["before"])


def test_a_parameter_that_the_optimiser_gets_between_two_trainings_is_another_update() -> None:
    model = A2CPlus("MlpPolicy", "Pendulum-v1", n_steps=8, seed=0, compile=True).learn(160)
    model.policy.value_net = nn.Linear(64, 1)
    before = model.policy.value_net.weight.detach().clone()
    model.policy.optimizer.add_param_group({"params": list(model.policy.value_net.parameters())})
    model.learn(160, reset_num_timesteps=False)
    assert not th.equal(model.policy.value_net.weight, before)


def test_a_failed_training_leaves_nobody_undisturbed() -> None:
    class Failing(Arms):
        def step(self, action: Any) -> Any:
            self.taken = getattr(self, "taken", 0) + 1
            return ({}[0], 0.0, False, False, {}) if self.taken > 120 else super().step(action)

    model = A2CPlus("MlpPolicy", Failing(spaces.Discrete(2)), **{**SMALL, "n_envs": 1})
    with pytest.raises(KeyError):
        model.learn(1000)
    assert not model._engine.is_undisturbed


def test_what_enters_no_loss_changes_in_mid_training_without_compiling_again() -> None:
    change = {"gamma": 0.9, "gae_lambda": 0.5, "advantage_estimator": "n_step", "n_step_horizon": 3}
    change |= {"n_epochs": 3, "clip_rewards": 1.0, "bootstrap_truncated": False, "desired_kl": 0.01}

    def changed(compile: bool) -> Any:
        model = PPOPlus("MlpPolicy", "Pendulum-v1", **PPO, compile=compile).learn(ITERATION)
        for name, value in change.items():
            setattr(model, name, value)
        return model.learn(ITERATION, reset_num_timesteps=False)

    compiled, eager = changed(True), changed(False)
    assert "update: compiled (1 version(s), 10 calls)" in compiled.engine_report()  # 2 epochs × 2, then 3 × 2
    th.testing.assert_close(parameters_of(compiled), parameters_of(eager), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": "lin_1e-3", "clip_range": "lin_0.3", "clip_range_vf": "lin_0.3", "ent_coef": "lin_0.01"},
        {"max_grad_norm": "lin_0.5", "vf_coef": "lin_0.5"},
    ],
)
def test_scheduled_hyperparameters_change_without_compiling_again(change: dict[str, Any]) -> None:
    compiled, eager = compiled_and_eager(PPOPlus, "Pendulum-v1", 3 * ITERATION, **{**PPO, **change})
    assert "update: compiled (1 version(s), 12 calls)" in compiled.engine_report()  # 3 iterations × 2 epochs × 2
    th.testing.assert_close(parameters_of(compiled), parameters_of(eager), rtol=1e-4, atol=1e-5)


def test_parameters_loaded_between_updates_are_the_ones_that_are_trained_on() -> None:
    compiled = PPOPlus("MlpPolicy", "Pendulum-v1", **PPO, compile=True).learn(ITERATION)
    eager = PPOPlus("MlpPolicy", "Pendulum-v1", **PPO, compile=False).learn(ITERATION)
    other = PPOPlus("MlpPolicy", "Pendulum-v1", **{**PPO, "seed": 8}).get_parameters()
    for model in (compiled, eager):
        model.set_parameters(other)
        model.set_random_seed(0)
        model.learn(ITERATION, reset_num_timesteps=False)
    th.testing.assert_close(parameters_of(compiled), parameters_of(eager), rtol=1e-5, atol=1e-5)
    assert "update: compiled (1 version(s)" in compiled.engine_report()


def test_a_model_saved_while_compiled_continues_like_an_uninterrupted_one(tmp_path: Any) -> None:
    model = PPOPlus("MlpPolicy", "Pendulum-v1", **PPO, compile=True).learn(ITERATION)
    model.save(tmp_path / "model")
    loaded = PPOPlus.load(tmp_path / "model", env=model.get_env())
    for each in (model, loaded):
        each.get_env().seed(0)
        each.set_random_seed(0)
        each._last_obs = None
        each.learn(ITERATION, reset_num_timesteps=False)
    th.testing.assert_close(parameters_of(loaded), parameters_of(model), rtol=0, atol=0)


# --- what is not compiled ---------------------------------------------------------------------------------------------


class OwnPolicy(ActorCriticPolicy):
    """Multiplies its log-probabilities by a number that may change at any time."""

    factor = 1.0

    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> Any:
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        return values, self.factor * log_prob, entropy


class WithDropout(BaseFeaturesExtractor):
    def __init__(self, observation_space: Any) -> None:
        super().__init__(observation_space, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.drop(x)


class WithOwnLoss(PPOPlus):
    scale = 1.0

    def policy_loss(self, ratio: th.Tensor, advantages: th.Tensor, hp: Any) -> th.Tensor:
        return self.scale * losses.surrogate(ratio, advantages)


@pytest.mark.parametrize(
    ("cls", "kwargs", "reason"),
    [
        (PPOPlus, {"policy": OwnPolicy}, "OwnPolicy is not one of SB3's own policies"),
        (
            PPOPlus,
            {"policy_kwargs": {"features_extractor_class": WithDropout}},
            "WithDropout, which is not on the list",
        ),
        (PPOPlus, {"use_sde": True}, "state-dependent exploration"),
        (WithOwnLoss, {}, "WithOwnLoss.policy_loss is overridden"),
        (PPOPlus, {"sb3_exact": True}, "sb3_exact=True keeps SB3's order of operations"),
    ],
)
def test_what_a_trace_could_get_wrong_runs_eagerly_and_says_why(cls: Any, kwargs: dict[str, Any], reason: str) -> None:
    compiled, eager = compiled_and_eager(cls, "Pendulum-v1", ITERATION, **PPO, **kwargs)
    assert "update: compiled" not in compiled.engine_report()
    assert reason in compiled.engine_report()
    if reason != "WithOwnLoss.policy_loss is overridden":  # there the policy step is compiled: equal up to rounding
        assert th.equal(parameters_of(compiled), parameters_of(eager))


def test_batch_norm_is_not_compiled_and_its_statistics_move_as_without_a_compiler() -> None:
    def with_batch_norm(compile: bool) -> Any:
        model = PPOPlus("MlpPolicy", "Pendulum-v1", **PPO, compile=compile)
        model.policy.mlp_extractor.policy_net.append(nn.BatchNorm1d(64))
        return model.learn(ITERATION)

    compiled, eager = with_batch_norm(True), with_batch_norm(False)
    assert "BatchNorm1d, which is not on the list" in compiled.engine_report()
    assert th.equal(parameters_of(compiled), parameters_of(eager))
    for one, other in zip(compiled.policy.buffers(), eager.policy.buffers(), strict=True):
        assert th.equal(one, other)


def test_a_hook_added_between_two_updates_is_called_for_every_minibatch() -> None:
    model = PPOPlus("MlpPolicy", "Pendulum-v1", **PPO, compile=True).learn(ITERATION)
    calls: list[int] = []
    model.policy.value_net.register_forward_hook(lambda *_: calls.append(1))
    model.learn(ITERATION, reset_num_timesteps=False)
    assert "value_net has hooks" in model.engine_report()
    assert len(calls) >= 32 + 4  # steps of the rollout and minibatches


@pytest.mark.parametrize("where", ["parameter", "accumulated", "everywhere"])
def test_other_hooks_added_between_two_updates_are_called(where: str) -> None:
    model = PPOPlus("MlpPolicy", "Pendulum-v1", **PPO, compile=True).learn(ITERATION)
    calls: list[int] = []
    weight = model.policy.value_net.weight
    register: Any = {
        "parameter": weight.register_hook,
        "accumulated": weight.register_post_accumulate_grad_hook,
        "everywhere": nn.modules.module.register_module_forward_hook,
    }[where]
    handle = register(lambda *_: calls.append(1))
    try:
        model.learn(ITERATION, reset_num_timesteps=False)
    finally:
        handle.remove()
    assert "hooks" in model.engine_report()
    assert len(calls) >= 4  # minibatches


def test_a_plain_attribute_that_changes_after_compiling_takes_effect() -> None:
    def slopes(compile: bool) -> Any:
        kwargs = {**PPO, "activation_fn": "leaky_relu", "compile": compile}
        model = PPOPlus("MlpPolicy", "Pendulum-v1", **kwargs).learn(ITERATION)
        for module in model.policy.modules():
            if isinstance(module, nn.LeakyReLU):
                module.negative_slope = 0.7
        return model.learn(ITERATION, reset_num_timesteps=False)

    compiled, eager = slopes(True), slopes(False)
    assert "update: compiled (2 version(s)" in compiled.engine_report()
    th.testing.assert_close(parameters_of(compiled), parameters_of(eager), rtol=1e-5, atol=1e-5)


def test_a_policy_put_in_the_place_of_another_is_the_one_that_acts_and_learns() -> None:
    def replaced(compile: bool) -> Any:
        model = PPOPlus("MlpPolicy", "Pendulum-v1", **PPO, compile=compile).learn(2 * ITERATION)
        other = PPOPlus("MlpPolicy", "Pendulum-v1", **{**PPO, "seed": 8}).policy
        with th.no_grad():
            other.value_net.bias.fill_(1000.0)
        model.predict(np.zeros((2, 3), np.float32))  # leaves the old one in evaluation mode
        model.policy = other
        return model.learn(ITERATION)

    compiled, eager = replaced(True), replaced(False)
    assert "policy step: compiled" in compiled.engine_report()
    assert compiled.rollout_buffer.values.mean() > 900
    th.testing.assert_close(parameters_of(compiled), parameters_of(eager), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compile", [True, False])
def test_a_policy_replaced_in_mid_rollout_acts_from_the_next_step_on(compile: bool) -> None:
    other = PPOPlus("MlpPolicy", "Pendulum-v1", **{**PPO, "seed": 8}).policy
    with th.no_grad():
        other.value_net.bias.fill_(1000.0)

    values: list[float] = []

    class Replaces(BaseCallback):
        def _on_step(self) -> bool:
            values.append(float(self.locals["values"].mean()))
            if self.n_calls == 10:
                self.model.policy = other
            return True

    PPOPlus("MlpPolicy", "Pendulum-v1", **PPO, compile=compile).learn(ITERATION, Replaces())
    assert max(values[:10]) < 100 and min(values[10:]) > 900


def test_minibatches_of_another_layout_than_the_first_are_not_misread() -> None:
    class Transposes(TorchRolloutBuffer):
        """As an augmentation of images may: equal numbers, other strides."""

        def get(self, *args: Any, **kwargs: Any) -> Any:
            for i, samples in enumerate(super().get(*args, **kwargs)):
                observations = samples.observations
                yield samples._replace(observations=observations.t().contiguous().t() if i % 4 == 2 else observations)

    kwargs = {**PPO, "n_steps": 64, "rollout_buffer_class": Transposes}  # four minibatches
    compiled, eager = compiled_and_eager(PPOPlus, "Pendulum-v1", 128, **kwargs)
    assert "update: compiled" in compiled.engine_report()
    th.testing.assert_close(parameters_of(compiled), parameters_of(eager), rtol=1e-5, atol=1e-5)


def test_minibatches_of_a_users_own_kind_are_left_to_the_eager_update() -> None:
    @dataclasses.dataclass
    class Sample:
        observations: Any
        actions: Any
        old_values: Any
        old_log_prob: Any
        advantages: Any
        returns: Any

    class Own(TorchRolloutBuffer):
        def get(self, *args: Any, **kwargs: Any) -> Any:
            for samples in super().get(*args, **kwargs):
                yield Sample(*samples[:6])

    kwargs = {**PPO, "recompute_advantages": False}
    model = trained(PPOPlus, "Pendulum-v1", ITERATION, **kwargs, rollout_buffer_class=Own, compile=True)
    assert "update: eager, its minibatches are a Sample, not RolloutSamples" in model.engine_report()


def test_a_features_extractor_replaced_under_one_of_its_names_is_not_compiled() -> None:
    model = PPOPlus("MlpPolicy", "Pendulum-v1", **PPO, compile=True)
    model.policy.features_extractor = nn.Sequential(nn.Flatten(), nn.Linear(3, 3))
    with pytest.raises(UntraceableError, match="shares its features extractor, but has several"):
        check_policy(model.policy)


def test_the_fingerprint_sees_numpys_numbers_and_which_module_is_where() -> None:
    first, second = (nn.Sequential(nn.Linear(3, 3)) for _ in range(2))
    pair, turned = nn.ModuleList([first, second, first]), nn.ModuleList([second, first, first])
    assert fingerprint([pair])[0] != fingerprint([turned])[0]
    slopes = [nn.LeakyReLU(np.float64(slope)) for slope in (0.1, 0.1, 0.2)]
    assert [fingerprint([x])[0] == fingerprint(slopes[:1])[0] for x in slopes] == [True, True, False]


def test_a_tensor_that_is_no_buffer_is_not_baked_in() -> None:
    policy = PPOPlus("MlpPolicy", "Pendulum-v1", **PPO, activation_fn="leaky_relu").policy
    policy.mlp_extractor.policy_net[1].negative_slope = th.tensor(0.1)
    with pytest.raises(UntraceableError, match=r"policy_net\.1\.negative_slope is a tensor or an array, but no buffer"):
        check_policy(policy)


def test_another_default_type_after_compiling_changes_nothing() -> None:
    def widened(compile: bool) -> Any:
        model = PPOPlus("MlpPolicy", "Pendulum-v1", **PPO, compile=compile).learn(ITERATION)
        th.set_default_dtype(th.float64)
        try:
            return model.learn(ITERATION)
        finally:
            th.set_default_dtype(th.float32)

    compiled, eager = widened(True), widened(False)
    assert "policy step: compiled" in compiled.engine_report()
    th.testing.assert_close(parameters_of(compiled), parameters_of(eager), rtol=1e-5, atol=1e-5)


def test_a_subclass_of_the_class_that_normalises_is_a_policy_of_ones_own() -> None:
    class Own(normalized_policy_class(ActorCriticPolicy)):  # type: ignore[misc]  # a class made at run time
        pass

    policy = PPOPlus("MlpPolicy", "Pendulum-v1", **PPO).policy
    check_policy(policy)
    policy.__class__ = Own
    with pytest.raises(UntraceableError, match="Own is not one of SB3's own policies"):
        check_policy(policy)


def test_scripted_modules_train_eagerly() -> None:
    class Scripted(BaseFeaturesExtractor):
        def __init__(self, observation_space: Any) -> None:
            super().__init__(observation_space, 8)
            self.net = th.jit.script(nn.Sequential(nn.Linear(3, 8), nn.Tanh()))

        def forward(self, observations: th.Tensor) -> th.Tensor:
            return self.net(observations)

    kwargs = {**PPO, "policy_kwargs": {"features_extractor_class": Scripted}}
    model = trained(PPOPlus, "Pendulum-v1", ITERATION, **kwargs, compile=True)
    assert "update: eager, a part of the policy is a ScriptModule" in model.engine_report()


def test_the_distribution_of_the_policy_has_values_also_after_compiling() -> None:
    class Looks(BaseCallback):
        seen: tuple[float, ...] = ()

        def _on_step(self) -> bool:
            self.seen += (float(self.model.policy.action_dist.distribution.stddev.mean()),)
            cloudpickle.dumps(self.model.policy)
            return self.n_calls < 40

    looks = Looks()
    model = PPOPlus("MlpPolicy", "Pendulum-v1", **PPO, compile=True)
    model.policy(th.zeros(1, 3))
    model.learn(2 * ITERATION, looks)  # ends in mid-rollout
    assert len(looks.seen) == 40 and all(np.isfinite(looks.seen))
    assert "policy step: compiled (1 version(s)" in model.engine_report()
    cloudpickle.dumps(model)


def test_a_method_replaced_on_the_policy_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PPOPlus("MlpPolicy", "Pendulum-v1", **PPO, compile=True)
    original, calls = model.policy.evaluate_actions, []
    monkeypatch.setattr(model.policy, "evaluate_actions", lambda *args: calls.append(1) or original(*args))
    model.learn(ITERATION)
    assert "evaluate_actions was replaced" in model.engine_report()
    assert len(calls) >= 4


def test_a_class_that_somebody_patched_after_compiling_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = PPOPlus("MlpPolicy", "Pendulum-v1", **PPO, compile=True).learn(ITERATION)
    original = ActorCriticPolicy.evaluate_actions

    def doubled(self: Any, obs: Any, actions: th.Tensor) -> Any:
        values, log_prob, entropy = original(self, obs, actions)
        return 2 * values, log_prob, entropy

    monkeypatch.setattr(ActorCriticPolicy, "evaluate_actions", doubled)
    model.learn(ITERATION, reset_num_timesteps=False)
    assert "update: eager, a function or a method that it is made of was replaced" in model.engine_report()


def test_a_function_of_torchs_that_somebody_replaced_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = PPOPlus("MlpPolicy", "Pendulum-v1", **PPO, compile=True).learn(ITERATION)
    original = nn.functional.linear  # nothing looks for torch's functions
    monkeypatch.setattr(nn.functional, "linear", lambda *args: 2 * original(*args))
    with pytest.warns(UserWarning, match="its compiled result differed from the eager one"):
        model.learn(2 * ITERATION, reset_num_timesteps=False)  # calls 5 to 12; call 8 is compared
    assert "update: eager, its compiled result differed" in model.engine_report()


def test_a_sample_on_the_edge_of_the_clip_does_not_end_compiling() -> None:
    kwargs = {**PPO, "batch_size": ITERATION, "normalize_advantage": False}
    model = PPOPlus("MlpPolicy", "Pendulum-v1", **kwargs, compile=True).learn(2 * ITERATION)
    (version,) = model._engine._functions["update"].values()
    hp = model.hyperparameters_at(0.5)
    (batch,) = model.rollout_buffer.get(ITERATION)
    # Every ratio is 1 + ε up to rounding, which decides for each sample whether the policy's loss is clipped.
    with th.no_grad():
        model.policy.action_net.weight.mul_(100)  # with small weights the last bits are the same
        values, log_probs, _ = model.policy.evaluate_actions(batch.observations, batch.actions)
    edge = batch._replace(
        old_log_prob=log_probs - np.log1p(hp.clip_range),
        advantages=th.ones_like(log_probs),
        returns=values.flatten(),
        old_values=values.flatten(),
    )
    version.n_calls = 2**10 - 1  # the next call is compared
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = model._loss_gradient(hp, True)(edge)
    assert version.n_disagreements == 1
    assert not result.is_stepped
    found = th.cat([parameter.grad.flatten() for parameter in model.policy.parameters()])
    model._eager_gradient(partial(model.loss, with_critic=True), hp, list(model.policy.parameters()), edge)
    assert th.equal(found, th.cat([parameter.grad.flatten() for parameter in model.policy.parameters()]))
    # The next minibatch is compared, too, and they agree again.
    assert model._loss_gradient(hp, True)(batch).is_stepped
    assert version.n_disagreements == 0
    assert "eager" not in model.engine_report()


def test_a_critic_that_fits_to_the_last_digits_does_not_end_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs = {**PPO, "batch_size": ITERATION, "normalize_advantage": False, "clip_range_vf": None}
    model = PPOPlus("MlpPolicy", "Pendulum-v1", **kwargs, compile=True).learn(2 * ITERATION)
    (version,) = model._engine._functions["update"].values()
    hp, (batch,) = model.hyperparameters_at(0.5), model.rollout_buffer.get(ITERATION)
    compared: list[bool] = []
    is_rounding = CompiledUpdate._is_rounding
    monkeypatch.setattr(
        CompiledUpdate, "_is_rounding", lambda *args: compared.append(is_rounding(*args)) or compared[-1]
    )
    # float32 knows values around 100 up to 8e-6, and the returns are within 1e-4 of them. Whether the last digit of one
    # is another one when compiled depends on the processor, so several sets of values are tried.
    for offset in range(40):
        with th.no_grad():
            model.policy.value_net.bias.fill_(100.0 + 0.37 * offset)
            values = model.policy.predict_values(batch.observations).flatten()
        returns = values + 1e-4 * th.linspace(-1, 1, ITERATION)
        fitted = batch._replace(advantages=th.zeros(ITERATION), returns=returns, old_values=values)
        version.n_calls = 2**10 - 1  # the next is compared
        before = [parameter.detach().clone() for parameter in model.policy.parameters()]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gradient = model._loss_gradient(hp, True)(fitted)
        if compared:
            break
    assert compared == [True]
    assert not gradient.is_stepped  # it is the eager one
    assert version.n_disagreements == 0
    assert all(map(th.equal, model.policy.parameters(), before))


def test_something_that_keeps_changing_is_not_compiled_again_and_again() -> None:
    engine, built = Engine(True), list[int]()

    def build() -> Any:
        built.append(1)
        return Compiled(lambda inputs: inputs)

    versions = [engine.version("update", number, build) for number in range(6)]
    assert [version is None for version in versions] == [False] * 4 + [True] * 2
    assert len(built) == 4
    assert "changed more than 3 times" in engine.report()


def test_what_cannot_be_compiled_is_not_tried_again_and_again() -> None:
    engine, tried = Engine(True), list[int]()

    def build() -> Any:
        tried.append(1)
        raise RuntimeError("no room on the disk")

    assert all(engine.version("update", number, build) is None for number in range(20))
    assert len(tried) == 4
    assert engine.report() == "update: eager, the compiler failed: no room on the disk"


def test_the_report_still_says_why_in_a_later_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx

    monkeypatch.setattr(compile_fx, "compile_fx_inner", lambda *_, **__: 1 / 0)
    model = PPOPlus("MlpPolicy", "Pendulum-v1", **PPO, compile=True)
    for _ in range(3):
        model.learn(ITERATION)
        lines = model.engine_report().splitlines()
        assert [line.partition(":")[0] for line in lines] == ["update", "policy step"]
        assert all("the compiler failed: division by zero" in line for line in lines)


def test_without_a_compiler_training_goes_on_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(compile_fx, "compile_fx_inner", fails)
    model = trained(PPOPlus, "Pendulum-v1", ITERATION, **PPO, compile=True)
    eager = trained(PPOPlus, "Pendulum-v1", ITERATION, **PPO, compile=False)
    assert "update: eager, the compiler failed: No working C++ compiler found" in model.engine_report()
    assert th.equal(parameters_of(model), parameters_of(eager))


# --- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", COSTS)
def test_auto_compiles_once_the_calls_save_one_and_a_half_times_the_cost(unit: str) -> None:
    enough = int(1.5 * COSTS[unit].to_compile / COSTS[unit].saved_per_call)
    for n_calls, wanted in ((enough - 1, False), (enough, True)):
        engine = Engine("auto")
        engine.plan({unit: n_calls})
        assert engine.wants(unit) is wanted
        assert (f"{n_calls} calls do not pay for compiling" in engine.report()) is not wanted


@pytest.mark.parametrize(("setting", "wanted"), [(True, True), (False, False)])
def test_true_and_false_do_not_ask_how_long_training_is(setting: bool, wanted: bool) -> None:
    engine = Engine(setting)
    engine.plan({"update": 1})
    assert engine.wants("update") is wanted


def test_a_short_training_is_not_compiled_and_a_long_one_is_planned_to_be() -> None:
    model = PPOPlus("MlpPolicy", "Pendulum-v1", n_envs=1, device="cpu")  # 2048 steps, 320 minibatches per rollout
    model._setup_learn(20_000)
    assert not model._engine.wants("update")
    model._setup_learn(1_000_000)  # 489 rollouts × 320
    assert model._engine.wants("update")
    assert model._engine.wants("policy step")


def test_training_continued_in_pieces_is_planned_by_its_whole_length() -> None:
    model = PPOPlus("MlpPolicy", "Pendulum-v1", n_envs=1, device="cpu")
    model.num_timesteps = 990_000
    model._setup_learn(10_000, reset_num_timesteps=False)
    assert model._engine.wants("update")


def test_compile_refuses_other_values() -> None:
    with pytest.raises(ValueError, match="`compile` must be one of 'auto', True, False, got 'always'"):
        PPOPlus("MlpPolicy", "Pendulum-v1", compile="always")


def test_compilation_is_announced(capsys: pytest.CaptureFixture[str]) -> None:
    trained(A2CPlus, "Pendulum-v1", ITERATION, **SMALL, compile=True, verbose=1)
    assert "Compiling the policy step (kept on disk for later runs)" in (printed := capsys.readouterr().out)
    assert "Compiled the update in" in printed


# --- parts ------------------------------------------------------------------------------------------------------------


def test_clipping_in_the_graph_is_that_of_torch() -> None:
    gradients = [th.tensor([3.0, 0.0]), th.tensor([[4.0]])]  # norm 5
    clipped, norm = clip_by_norm(gradients, 0.5)
    assert float(norm) == 5.0
    parameters = [nn.Parameter(th.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    nn.utils.clip_grad_norm_(parameters, 0.5)
    for parameter, gradient in zip(parameters, clipped, strict=True):
        th.testing.assert_close(parameter.grad, gradient)
    assert clip_by_norm(gradients, None)[0] is gradients


def test_a_function_that_looks_at_values_is_refused() -> None:
    with pytest.raises(UntraceableError, match="cannot be traced"):
        compile_function(lambda x: [x if bool(x.sum() > 0) else -x], [th.ones(2)])


def test_a_function_compiled_in_two_parts_is_the_whole_and_the_first_part_serves_many_calls() -> None:
    def product(w: th.Tensor, x: th.Tensor, v: th.Tensor) -> list[th.Tensor]:
        wide, narrow = (x @ w.t()).tanh().split([3, 1], dim=1)  # w is needed by both parts, and so is a view of it
        return [(wide @ v[:, None] + narrow + th.ones(5, 1)) @ w[:1], x + v.sum()]

    th.manual_seed(0)
    w, x, *vectors = th.randn(4, 2), th.randn(5, 2), th.randn(3), th.randn(3)
    before, after = compile_in_two(product, [w, x, vectors[0]])
    between = before([w, x])
    for v in vectors:
        for found, wanted in zip(after([*between, v]), product(w, x, v), strict=True):
            th.testing.assert_close(found, wanted)
    # What the second part is given in the tanh's place is what it uses: it does not compute it again.
    (i,) = [i for i, tensor in enumerate(between) if tensor.shape == (5, 4)]
    between[i] = th.zeros(5, 4)
    th.testing.assert_close(after([*between, vectors[0]])[0], th.ones(5, 1) @ w[:1])


def test_a_function_that_writes_to_its_input_is_refused() -> None:
    with pytest.raises(UntraceableError, match="in place"):
        compile_function(lambda x: [x.add_(1)], [th.ones(2)])


def test_a_captured_tensor_is_refused() -> None:
    captured = th.ones(2)
    with pytest.raises(UntraceableError):
        compile_function(lambda x: [x + captured], [th.ones(2)])


def test_a_fingerprint_sees_modes_numbers_and_types() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.LeakyReLU(0.1))
    seen = {fingerprint([net])[0]}
    net.eval()
    seen.add(fingerprint([net])[0])
    net[1].negative_slope = 0.2
    seen.add(fingerprint([net])[0])
    net[1] = nn.Tanh().eval()
    seen.add(fingerprint([net])[0])
    net[0].bias.requires_grad_(False)
    seen.add(fingerprint([net])[0])
    assert len(seen) == 5


def test_replaced_tensors_are_back_afterwards() -> None:
    net = nn.Linear(2, 1)
    weight = net.weight
    tensors = Tensors({"net": net})
    outputs = tensors.replaced([th.ones(1, 2), th.ones(1)], lambda x: net(x), th.ones(1, 2))
    assert float(outputs) == 3.0  # 1 + 1 + 1
    assert net.weight is weight


def test_a_module_with_two_names_gets_its_tensors_back_too() -> None:
    # torch's functional_call alone leaves the replacement in it. Stock policies hold their features extractor so.
    net = nn.ModuleDict({"first": nn.Linear(2, 1)})
    net["second"] = net["first"]
    weight = net["first"].weight
    tensors = Tensors({"net": net})
    outputs = tensors.replaced([th.ones(1, 2), th.ones(1)], lambda x: net["second"](x), th.ones(1, 2))
    assert float(outputs) == 3.0
    assert net["first"].weight is weight is net["second"].weight


def test_a_tensor_in_two_places_is_replaced_in_both() -> None:
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    net[1].weight = net[0].weight
    weight = net[0].weight
    tensors = Tensors({"net": net})
    assert len(tensors.values) == 1
    assert float(tensors.replaced([th.full((1, 1), 3.0)], net, th.ones(1, 1))) == 9.0
    assert net[0].weight is weight is net[1].weight


def test_no_noise_is_known_for_a_tuple() -> None:
    with pytest.raises(TypeError, match="no noise is known for"):
        noise_of(spaces.Tuple([spaces.Discrete(2)]), 1, th.device("cpu"), th.float32)


def test_stock_policies_pass_the_check() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_policy(PPOPlus("MlpPolicy", "CartPole-v1", device="cpu").policy)


# --- changes behind the engine's back ---------------------------------------------------------------------------------


def step_of(model: Any) -> Any:
    """The compiled policy step for the policy as it is now."""
    model.policy.set_training_mode(False)
    return model._engine.policy_step(model.policy, th.zeros(2, 3))


def assert_values_agree(model: Any, observations: th.Tensor) -> None:
    th.testing.assert_close(step_of(model)(observations)[1], model.policy.predict_values(observations))


def test_tied_or_transposed_parameters_are_another_version_of_the_policy_step() -> None:
    kwargs = {**PPO, "policy_kwargs": {"net_arch": {"pi": [3, 3], "vf": [3, 3]}}}
    model = trained(PPOPlus, "Pendulum-v1", ITERATION, compile=True, **kwargs)
    observations, policy = th.randn(2, 3), model.policy
    weight = policy.mlp_extractor.value_net[2].weight
    weight.data = weight.data.t()  # the same object and shape, another layout
    assert_values_agree(model, observations)
    policy.mlp_extractor.value_net[0].weight = policy.mlp_extractor.policy_net[0].weight
    assert_values_agree(model, observations)


def test_observations_of_another_type_or_layout_than_the_first_are_taken_as_they_are() -> None:
    model = trained(PPOPlus, "Pendulum-v1", ITERATION, compile=True, **PPO)
    step, observations = step_of(model), th.randn(2, 3)
    expected = model.policy.predict_values(observations)
    for changed in (observations.double(), observations.t().contiguous().t()):
        th.testing.assert_close(step(changed)[1], expected)
        th.testing.assert_close(step.values(changed), expected)


@pytest.mark.parametrize("compile", [True, False])
def test_what_a_callback_changes_in_a_rollout_takes_effect_at_the_next_step(compile: bool) -> None:
    class Hook(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 10:
                self.model.policy.value_net.register_forward_hook(lambda module, inputs, output: output * 0 + 7)
            return True

    model = PPOPlus("MlpPolicy", "Pendulum-v1", compile=compile, normalize_observations=False, **PPO)
    model.learn(ITERATION, callback=Hook())
    values = model.rollout_buffer.values
    assert (values[10:] == 7).all() and not (values[:10] == 7).any()


@pytest.mark.parametrize(
    ("callback", "looks_per_rollout"), [(None, 0), (lambda locals_, globals_: True, PPO["n_steps"])]
)
def test_steps_of_a_rollout_look_at_the_policy_only_where_a_callback_may_change_it(
    monkeypatch: pytest.MonkeyPatch, callback: Any, looks_per_rollout: int
) -> None:
    model = PPOPlus("MlpPolicy", "Pendulum-v1", compile=True, **PPO)
    model.learn(ITERATION)
    n_looks = 0

    def counting(snapshot: Snapshot) -> bool:
        nonlocal n_looks
        n_looks += 1
        return still_holds(snapshot)

    still_holds = Snapshot.still_holds
    monkeypatch.setattr(Snapshot, "still_holds", counting)
    model.learn(ITERATION, callback=callback)
    # Once for the compiled step, and once for the loss.
    assert n_looks == 2 + looks_per_rollout


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "mode": lambda net: net.train(not net.training),
    "number": lambda net: setattr(net[0], "in_features", 99),
    "attribute": lambda net: setattr(net[0], "forward", lambda x: x),
    "layer": lambda net: net.__setitem__(1, nn.ReLU()),
    "type": lambda net: setattr(net[1], "__class__", nn.ReLU),
    "parameter": lambda net: setattr(net[0], "weight", nn.Parameter(net[0].weight.detach())),
    "tied parameters": lambda net: setattr(net[2], "bias", net[0].bias),
    "frozen": lambda net: net[0].weight.requires_grad_(False),
    "layout": lambda net: setattr(net[2].weight, "data", net[2].weight.data.T.contiguous().T),
    "precision": lambda net: net.double(),
    "hook": lambda net: net[0].register_forward_hook(lambda module, inputs, output: None),
    "hook on a parameter": lambda net: net[0].weight.register_hook(lambda gradient: gradient * 2),
    "buffer": lambda net: net[0].register_buffer("scale", th.ones(1)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_snapshot_of_modules_sees_a_change_and_not_an_optimizers_step(name: str) -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    snapshot, before = Snapshot([net]), fingerprint([net])
    optimizer = th.optim.Adam(net.parameters())
    net(th.ones(2, 3)).sum().backward()
    optimizer.step()
    assert snapshot.still_holds()
    CHANGES[name](net)
    assert not snapshot.still_holds() and fingerprint([net]) != before


def test_a_hook_that_comes_back_to_a_parameter_is_called_again() -> None:
    def gradient(weight: th.Tensor, compile: bool) -> th.Tensor:
        model = PPOPlus("MlpPolicy", "Pendulum-v1", compile=compile, **PPO)
        model.policy.value_net.bias.register_hook(lambda gradient: gradient).remove()
        model.learn(ITERATION)
        model.policy.value_net.bias.register_hook(lambda gradient: gradient * weight)
        model.learn(ITERATION)
        return model.policy.value_net.bias.detach()

    th.testing.assert_close(gradient(th.tensor(0.0), True), gradient(th.tensor(0.0), False))
    assert not th.equal(gradient(th.tensor(0.0), True), gradient(th.tensor(1.0), True))


def test_a_method_wrapped_from_outside_is_foreign_whatever_it_calls_itself() -> None:
    def scaled(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self.scale * function(self, *args, **kwargs)

        return wrapper

    class Scaled(PPOPlus):
        scale = 1.0
        policy_loss = scaled(PPOPlus.policy_loss)

    assert Scaled.policy_loss.__module__ == "sb3_pgplus.ppo"
    model = Scaled("MlpPolicy", "Pendulum-v1", compile=True, **PPO)
    model.scale = 0.0
    model.learn(ITERATION)
    assert "Scaled.policy_loss is overridden" in model.engine_report()
    assert model.logger.name_to_value["train/policy_gradient_loss"] == 0


def test_parameters_that_share_memory_are_stepped_one_after_the_other() -> None:
    def tied(compile: bool) -> th.Tensor:
        model = PPOPlus("MlpPolicy", "Pendulum-v1", compile=compile, **PPO)
        extractor = model.policy.mlp_extractor
        extractor.value_net[0].weight.data = extractor.policy_net[0].weight.data
        return parameters_of(model.learn(ITERATION))

    th.testing.assert_close(tied(True), tied(False), rtol=1e-5, atol=1e-5)


def test_methods_replaced_on_the_distribution_or_on_a_class_stand_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = PPOPlus("MlpPolicy", "Pendulum-v1", **PPO).policy
    before = fingerprint([policy])
    policy.action_dist.log_prob = lambda actions: actions.sum(-1)
    assert fingerprint([policy]) != before
    with pytest.raises(UntraceableError, match=r"the action distribution.log_prob was replaced"):
        check_policy(policy)
    del policy.action_dist.log_prob
    assert fingerprint([policy]) == before
    check_policy(policy)
    original = ActorCriticPolicy.evaluate_actions
    monkeypatch.setattr(ActorCriticPolicy, "evaluate_actions", lambda *args: original(*args))
    assert fingerprint([policy]) != before
    with pytest.raises(UntraceableError, match="a function or a method that it is made of was replaced"):
        check_policy(policy)


def test_a_model_with_compiled_functions_can_be_pickled() -> None:
    model = trained(PPOPlus, "Pendulum-v1", ITERATION, compile=True, **PPO)
    assert "update: compiled" in model.engine_report()
    copied = pickle.loads(cloudpickle.dumps(model))
    observations = np.zeros((2, 3), dtype=np.float32)
    np.testing.assert_array_equal(
        copied.predict(observations, deterministic=True)[0], model.predict(observations, deterministic=True)[0]
    )
    copied.learn(ITERATION)
    assert "update: compiled" in copied.engine_report()


def test_dropout_in_a_scripted_module_is_off_in_rollouts_and_on_in_updates() -> None:
    class Extractor(BaseFeaturesExtractor):
        def __init__(self, space: Any) -> None:
            super().__init__(space, 8)
            self.net = th.jit.script(nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5)))

        def forward(self, observations: th.Tensor) -> th.Tensor:
            return self.net(observations)

    policy = PPOPlus("MlpPolicy", "Pendulum-v1", policy_kwargs={"features_extractor_class": Extractor}, **PPO).policy
    observations = th.ones(2, 3)
    for mode in (True, False, True):
        set_training_mode(policy, mode)
        first, second = (policy.features_extractor.net(observations) for _ in range(2))
        assert th.equal(first, second) != mode


# --- what belongs to others -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (ActorCriticPolicy, "_get_action_dist_from_latent"),
        (MlpExtractor, "forward_actor"),
        (NormalizesObservations, "extract_features"),
        (BaseModel, "extract_features"),
        (losses, "entropy_loss"),
        (updates, "value_loss"),
        (th.nn.Linear, "forward"),
        (th.nn.Module, "__call__"),
    ],
)
def test_whatever_a_trace_runs_through_is_missed_when_it_is_replaced(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    assert not is_patched()
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: original(*args, **kwargs))
    assert is_patched()


def test_a_method_replaced_before_the_package_was_imported_is_found_out() -> None:
    code = """
from stable_baselines3.common.policies import ActorCriticPolicy
original = ActorCriticPolicy.evaluate_actions
ActorCriticPolicy.evaluate_actions = lambda *args: original(*args)
from sb3_pgplus.tracing import is_patched
print(is_patched())
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["True"]


class _FrozenNorm(BaseFeaturesExtractor):
    """Batch norm that is frozen the usual way: by a ``train`` that does nothing."""

    def __init__(self, space: Any) -> None:
        super().__init__(space, 8)
        self.linear, self.norm = nn.Linear(3, 8), nn.BatchNorm1d(8)
        self.norm.train = lambda mode=True: self.norm  # type: ignore[method-assign]  # that is the point
        self.norm.training = False

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.norm(self.linear(observations))  # type: ignore[no-any-return]  # modules return Any


def test_a_layer_that_refuses_to_train_stays_as_it_is() -> None:
    kwargs = {**PPO, "policy_kwargs": {"features_extractor_class": _FrozenNorm}}
    model = trained(PPOPlus, "Pendulum-v1", ITERATION, **kwargs)
    assert not model.policy.features_extractor.norm.running_mean.any()


def test_a_policy_with_its_own_set_training_mode_is_asked() -> None:
    model, modes = PPOPlus("MlpPolicy", "Pendulum-v1", **PPO), list[bool]()
    model.policy.set_training_mode = modes.append
    set_training_mode(model.policy, True)
    set_training_mode(model.policy, False)
    assert modes == [True, False]


class _EveryFourth(th.optim.Adam):
    """Steps on the sum of four minibatches' gradients."""

    n_calls = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.n_calls += 1
        if self.n_calls % 4 == 0:
            super().step(closure)
            super().zero_grad()

    def zero_grad(self, set_to_none: bool = True) -> None:
        pass


def test_an_optimizer_that_adds_up_gradients_gets_all_of_them_as_in_sb3() -> None:
    kwargs = {**PPO, "n_envs": 1, "n_epochs": 4, "policy_kwargs": {"optimizer_class": _EveryFourth}}
    ours = PPOPlus("MlpPolicy", "Pendulum-v1", **{**presets.SB3_PPO, **kwargs}).learn(ITERATION)
    kwargs.pop("n_envs")
    th.testing.assert_close(
        parameters_of(ours), parameters_of(PPO_OF_SB3("MlpPolicy", "Pendulum-v1", **kwargs).learn(64))
    )
    compiled = trained(PPOPlus, "Pendulum-v1", ITERATION, compile=True, **{**kwargs, "n_envs": 1})
    assert "zero_grad of its own" in compiled.engine_report()


def test_the_gradient_of_a_parameter_that_no_optimizer_has_does_not_pile_up() -> None:
    norms = []
    for compiled in (False, True):
        model = PPOPlus("MlpPolicy", "Pendulum-v1", compile=compiled, **PPO)
        rest = [p for name, p in model.policy.named_parameters() if name != "log_std"]
        model.policy.optimizer = th.optim.Adam(rest, lr=1e-3, eps=1e-5)
        before = model.policy.log_std.detach().clone()
        norms.append(parameters_of(model.learn(2 * ITERATION)))
        assert th.equal(model.policy.log_std, before)
    th.testing.assert_close(norms[1], norms[0], rtol=1e-5, atol=1e-5)


class _WithModel(PPOPlus):
    """A network beside the policy that learns to predict returns, by a term of the loss."""

    def _setup_model(self) -> None:
        super()._setup_model()
        self.predictor = nn.Linear(3, 1)
        self.policy.optimizer.add_param_group({"params": list(self.predictor.parameters())})

    def loss(self, batch: Any, hp: Any, with_critic: bool = True) -> Any:
        loss, diagnostics = super().loss(batch, hp, with_critic)
        return loss + ((self.predictor(batch.observations).flatten() - batch.returns) ** 2).mean(), diagnostics


def test_a_network_beside_the_policy_that_the_optimizer_has_is_trained() -> None:
    model = _WithModel("MlpPolicy", "Pendulum-v1", **PPO)
    before = model.predictor.weight.detach().clone()
    model.learn(ITERATION)
    assert not th.equal(model.predictor.weight, before)


def test_with_nothing_left_to_train_the_error_says_so() -> None:
    model = PPOPlus("MlpPolicy", "Pendulum-v1", **{**PPO, "n_critic_epochs": 1})
    for name, parameter in model.policy.named_parameters():
        parameter.requires_grad_("value" in name)
    with pytest.raises(ValueError, match="the loss depends on no parameter that requires a gradient"):
        model.learn(ITERATION)
