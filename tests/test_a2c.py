"""A2CPlus: every hyperparameter changes something, the gradient by hand, RMSprop, environments, hooks, saving."""

import functools
import inspect
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3 import A2C
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from torch import nn

from sb3_pgplus import A2CPlus, presets
from sb3_pgplus.buffers import RolloutSamples
from sb3_pgplus.hparams import A2CHparams
from sb3_pgplus.metrics import Metrics

# A constant rate: the default anneals over each test's few updates.
TINY: dict[str, Any] = {"n_steps": 20, "learning_rate": 1e-3, "seed": 0, "device": "cpu"}


def pendulum(n_envs: int = 2, limit: int = 15) -> Any:
    return make_vec_env(
        "Pendulum-v1", n_envs, seed=0, wrapper_class=TimeLimit, wrapper_kwargs={"max_episode_steps": limit}
    )


def trained(n_iterations: int = 3, env: Any = None, **settings: Any) -> A2CPlus:
    model = A2CPlus("MlpPolicy", env or pendulum(), **{**TINY, **settings})
    return model.learn(n_iterations * model.n_steps * model.n_envs)


def vector(parameters: Any) -> th.Tensor:
    return nn.utils.parameters_to_vector(parameters).detach().clone()


def actor_of(model: A2CPlus) -> th.Tensor:
    policy = model.policy
    return vector([*policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters(), policy.log_std])


def critic_of(model: A2CPlus) -> th.Tensor:
    return vector([*model.policy.mlp_extractor.value_net.parameters(), *model.policy.value_net.parameters()])


def with_rollout(model: A2CPlus) -> A2CPlus:
    """The model as it is between its first rollout and the update on it."""
    model._setup_learn(10**6)
    model.collect_rollouts(model.env, model._init_callback(None), model.rollout_buffer, model.n_steps)
    return model


def batch_of(model: A2CPlus) -> RolloutSamples:
    return next(iter(model.rollout_buffer.get(None)))


# --- hyperparameters --------------------------------------------------------------------------------------------------

# (name, other value, settings under which it can bite)
KNOBS: list[tuple[str, Any, dict[str, Any]]] = [
    ("learning_rate", "lin_1e-3", {}),
    ("n_steps", 10, {}),
    ("gamma", 0.9, {}),
    ("gae_lambda", 0.5, {}),
    ("normalize_advantage", True, {}),
    ("n_envs", 3, {"env": "Pendulum-v1"}),
    ("ent_coef", 0.1, {}),
    ("vf_coef", 5.0, {}),
    ("max_grad_norm", 0.01, {"rms_prop_eps": 0.1}),
    ("critic_learning_rate", 1e-2, {}),
    ("use_rms_prop", False, {}),
    ("use_rms_prop", "tf_like", {}),
    ("rms_prop_eps", 1e-2, {}),
    ("advantage_estimator", "td", {}),
    ("n_step_horizon", 2, {"advantage_estimator": "n_step"}),
    ("bootstrap_truncated", False, {}),
    ("normalize_observations", False, {}),
    ("clip_observations", 0.5, {}),
    ("normalize_rewards", False, {}),
    ("clip_rewards", 0.01, {}),
    ("normalize_value_targets", True, {}),
    ("ortho_init", False, {}),
    ("activation_fn", "relu", {}),
    ("log_std_init", -1.0, {}),
    ("adam_eps", 1e-2, {"use_rms_prop": False}),
    ("schedule_timesteps", 10_000, {"learning_rate": "lin_1e-3"}),
    ("sb3_exact", True, {"learning_rate": "lin_1e-3"}),
]


def test_every_hyperparameter_is_in_the_list_above() -> None:
    # max_nonfinite_updates acts on failures alone, see below; compile on speed alone (tests/test_engine.py).
    assert {name for name, _, _ in KNOBS} | {"max_nonfinite_updates", "compile"} == set(A2CHparams.names())


@functools.cache
def reference(scenario: tuple[tuple[str, Any], ...]) -> th.Tensor:
    """The parameters under a scenario, the same in two runs."""
    first, second = (vector(trained(**dict(scenario)).policy.parameters()) for _ in range(2))
    assert th.equal(first, second)
    return first


@pytest.mark.parametrize(("name", "value", "scenario"), KNOBS, ids=[f"{name}={value}" for name, value, _ in KNOBS])
def test_no_dead_knobs(name: str, value: Any, scenario: dict[str, Any]) -> None:
    changed = vector(trained(**{**scenario, name: value}).policy.parameters())
    assert not th.equal(reference(tuple(scenario.items())), changed)


@pytest.mark.parametrize("limit", [1, 3])
def test_after_the_allowed_number_of_nan_losses_in_a_row_training_stops_and_no_parameter_has_moved(limit: int) -> None:
    class Broken(A2CPlus):
        def policy_loss(self, log_probs: th.Tensor, advantages: th.Tensor, hp: A2CHparams) -> th.Tensor:
            return super().policy_loss(log_probs, advantages, hp) * th.nan

    model = Broken("MlpPolicy", pendulum(), **TINY, max_nonfinite_updates=limit)
    before = vector(model.policy.parameters())
    with pytest.raises(ValueError, match=rf"{limit} updates in a row .*the loss overflows on finite data"):
        model.learn(400)
    assert model._nonfinite_updates == limit
    assert th.equal(vector(model.policy.parameters()), before)
    assert not model.policy.optimizer.state


def test_one_gradient_step_per_rollout() -> None:
    model = trained(5)
    assert model._n_updates == 5
    assert {int(state["step"]) for state in model.policy.optimizer.state.values()} == {5}
    assert model.num_timesteps == 5 * 20 * 2


# --- the gradient -----------------------------------------------------------------------------------------------------


class ThreeStates(gym.Env[Any, Any]):
    """States 0, 1, 2 in turn, reward 2 for action 1 and −1 otherwise, no end."""

    observation_space = spaces.Discrete(3)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.state = 0
        return self.state, {}

    def step(self, action: Any) -> Any:
        self.state = (self.state + 1) % 3
        return self.state, 2.0 if action == 1 else -1.0, False, False, {}


def tabular(**settings: Any) -> A2CPlus:
    """Logits and value are a row of a table each: a linear policy of one-hot states."""
    sgd = {"net_arch": [], "optimizer_class": th.optim.SGD}
    options = {"n_steps": 1, "normalize_rewards": False, "max_grad_norm": None, "learning_rate": 0.5, "device": "cpu"}
    return A2CPlus("MlpPolicy", ThreeStates(), policy_kwargs=sgd, **{**options, **settings})


@pytest.mark.parametrize("seed", range(4))
def test_the_step_on_one_sample_is_that_of_the_formulas_by_hand(seed: int) -> None:
    model = tabular(seed=seed, vf_coef=0.25)
    actor, critic = model.policy.action_net, model.policy.value_net
    with th.no_grad():
        actor.weight.normal_(generator=th.Generator().manual_seed(seed))  # [2 actions, 3 states]
        critic.weight.normal_(generator=th.Generator().manual_seed(seed + 1))  # [1, 3 states]
    weights, values = actor.weight.detach().clone(), critic.weight.detach().clone()[0]
    model.learn(1)
    # The one sample: state 0, then state 1. Ψ = r + γ V(1) − V(0), the target is Ψ + V(0).
    action = int(model.rollout_buffer.actions.item())
    psi = (2.0 if action == 1 else -1.0) + 0.99 * values[1] - values[0]
    # ∂ log π(a|0) / ∂ logit_k = 1[k = a] − π(k|0); the loss −log π Ψ is descended at rate ½.
    one_hot = th.nn.functional.one_hot(th.tensor(action), 2)
    ascent = (one_hot - weights[:, 0].softmax(0)) * psi
    expected = weights.clone()
    expected[:, 0] += 0.5 * ascent  # the other states' rows stay
    th.testing.assert_close(actor.weight.detach(), expected, atol=1e-6, rtol=1e-5)
    th.testing.assert_close(actor.bias.detach(), 0.5 * ascent, atol=1e-6, rtol=1e-5)
    # ∂ ¼ (y − V)² / ∂V = −½ (y − V) = −½ Ψ.
    values[0] += 0.5 * 0.5 * psi
    th.testing.assert_close(critic.weight.detach()[0], values, atol=1e-6, rtol=1e-5)


def test_the_loss_is_the_sum_of_its_weighted_parts() -> None:
    model = with_rollout(A2CPlus("MlpPolicy", pendulum(), **TINY, ent_coef=0.3, vf_coef=0.7))
    loss, parts = model.loss(batch_of(model), model.hyperparameters_at(1.0))
    policy_loss, entropy_loss, value_loss = (parts[f"train/{x}_loss"].item() for x in ("policy", "entropy", "value"))
    assert loss.item() == pytest.approx(policy_loss + 0.3 * entropy_loss + 0.7 * value_loss, rel=1e-6)
    # A Gaussian's entropy is ½ log(2πe) + log σ, and log σ starts at −½.
    assert entropy_loss == pytest.approx(-(0.5 * np.log(2 * np.pi * np.e) - 0.5), rel=1e-6)


def gradient_norms(loss: th.Tensor, modules: list[nn.Module]) -> list[float]:
    result = []
    for module in modules:
        gradients = th.autograd.grad(loss, list(module.parameters()), retain_graph=True, allow_unused=True)
        result.append(sum(0.0 if g is None else float(g.abs().sum()) for g in gradients))
    return result


def test_the_policy_loss_never_reaches_the_critic_nor_the_value_loss_the_actor() -> None:
    model = with_rollout(A2CPlus("MlpPolicy", pendulum(), **TINY))
    _, parts = model.loss(batch_of(model), model.hyperparameters_at(1.0))
    policy = model.policy
    actor, critic = [policy.mlp_extractor.policy_net, policy.action_net], [policy.mlp_extractor.value_net]
    critic.append(policy.value_net)
    assert gradient_norms(parts["train/policy_loss"], critic) == [0, 0]
    assert min(gradient_norms(parts["train/policy_loss"], actor)) > 0
    assert gradient_norms(parts["train/value_loss"], actor) == [0, 0]
    assert min(gradient_norms(parts["train/value_loss"], critic)) > 0


def test_normalised_advantages_are_those_of_the_whole_rollout() -> None:
    seen: list[th.Tensor] = []

    class Spy(A2CPlus):
        def policy_loss(self, log_probs: th.Tensor, advantages: th.Tensor, hp: A2CHparams) -> th.Tensor:
            seen.append(advantages)
            return super().policy_loss(log_probs, advantages, hp)

    model = Spy("MlpPolicy", pendulum(), **TINY, normalize_advantage=True).learn(40)
    (advantages,) = seen
    assert advantages.shape == (40,)
    raw = model.rollout_buffer.advantages
    expected = (raw - raw.mean()) / raw.std(ddof=1)
    np.testing.assert_allclose(np.sort(advantages.numpy()), np.sort(expected.flatten()), atol=1e-5)


def test_parameters_that_the_user_froze_stay_and_the_rest_trains_as_in_sb3() -> None:
    models = []
    for cls, settings in ((A2C, {}), (A2CPlus, presets.SB3_A2C)):
        model = cls("MlpPolicy", pendulum(), **{**settings, **TINY})
        model.policy.mlp_extractor.policy_net.requires_grad_(False)
        models.append(model.learn(120))
    theirs, ours = (model.policy.state_dict() for model in models)
    assert all(th.equal(ours[key], value) for key, value in theirs.items())


# --- the optimiser ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_rms_prop", [True, "tf_like"])
def test_the_first_step_of_both_rmsprops_by_hand(use_rms_prop: bool | str) -> None:
    epsilon, rate = 0.1, 1e-3  # an ε that shows where it stands
    settings = {**TINY, "use_rms_prop": use_rms_prop, "rms_prop_eps": epsilon, "max_grad_norm": None}
    model = with_rollout(A2CPlus("MlpPolicy", pendulum(), **settings))
    parameters = list(model.policy.parameters())
    loss, _ = model.loss(batch_of(model), model.hyperparameters_at(1.0))
    gradients = th.autograd.grad(loss, parameters)
    before = [parameter.detach().clone() for parameter in parameters]
    model.train()
    for parameter, old, g in zip(parameters, before, gradients, strict=True):
        # v = 0.99 v₀ + 0.01 g². torch: v₀ = 0 and √v + ε. TensorFlow: v₀ = 1 and √(v + ε).
        v = 0.01 * g**2
        denominator = v.sqrt() + epsilon if use_rms_prop is True else (0.99 + v + epsilon).sqrt()
        th.testing.assert_close(parameter.detach() - old, -rate * g / denominator, atol=2e-7, rtol=1e-3)


def test_each_value_of_use_rms_prop_has_its_optimiser() -> None:
    expected = {True: th.optim.RMSprop, "tf_like": RMSpropTFLike, False: th.optim.Adam}
    for value, cls in expected.items():
        optimizer = A2CPlus("MlpPolicy", "CartPole-v1", use_rms_prop=value, n_envs=1).policy.optimizer
        assert type(optimizer) is cls
        assert optimizer.param_groups[0]["eps"] == 1e-5
        assert optimizer.param_groups[0].get("alpha") == (None if value is False else 0.99)


@pytest.mark.parametrize("use_rms_prop", [True, "tf_like"])
def test_an_epsilon_of_adam_is_refused_while_rmsprop_is_the_optimiser(use_rms_prop: bool | str) -> None:
    text = rf"`adam_eps`=1e-08 is for Adam, but `use_rms_prop`={use_rms_prop!r}: set it to False, or use `rms_prop_eps`"
    with pytest.raises(ValueError, match=text):
        A2CPlus("MlpPolicy", "CartPole-v1", adam_eps=1e-8, use_rms_prop=use_rms_prop)


def test_an_epsilon_of_adam_reaches_adam() -> None:
    model = A2CPlus("MlpPolicy", "CartPole-v1", adam_eps=1e-8, use_rms_prop=False)
    assert model.policy.optimizer.param_groups[0]["eps"] == 1e-8


def test_what_the_user_writes_about_the_optimiser_wins() -> None:
    sgd = {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {"momentum": 0.5}}
    optimizer = A2CPlus("MlpPolicy", "CartPole-v1", policy_kwargs=sgd).policy.optimizer
    assert type(optimizer) is th.optim.SGD
    assert optimizer.param_groups[0]["momentum"] == 0.5
    # Settings of the default optimiser are merged: SB3 would drop the user's without a word.
    given = {"optimizer_kwargs": {"alpha": 0.9, "momentum": 0.1}}
    (group,) = A2CPlus("MlpPolicy", "CartPole-v1", policy_kwargs=given).policy.optimizer.param_groups
    assert (group["alpha"], group["momentum"], group["eps"]) == (0.9, 0.1, 1e-5)
    assert given == {"optimizer_kwargs": {"alpha": 0.9, "momentum": 0.1}}


def test_the_critics_learning_rate_moves_only_the_critics_own() -> None:
    # One update: later ones see the other critic's advantages. The norm is clipped over both together in all three.
    plain, fast, still = (trained(1, critic_learning_rate=rate) for rate in (None, 1e-2, 0.0))
    fresh = A2CPlus("MlpPolicy", pendulum(), **TINY)
    assert th.equal(actor_of(fast), actor_of(plain))
    assert th.equal(actor_of(still), actor_of(plain))
    assert not th.equal(actor_of(plain), actor_of(fresh))
    assert not th.equal(critic_of(fast), critic_of(plain))
    assert th.equal(critic_of(still), critic_of(fresh))


def test_normalised_value_targets_leave_the_critics_predictions_as_they_were() -> None:
    model = trained(2, normalize_value_targets=True, normalize_rewards=False)
    before = (model.value_normalizer.mean.clone(), model.value_normalizer.std(), critic_of(model))
    model.collect_rollouts(model.env, model._init_callback(None), model.rollout_buffer, model.n_steps)
    # Pop-Art: statistics and last layer changed together, in rewards the critic says what it said in the rollout.
    assert not th.equal(model.value_normalizer.mean, before[0])
    assert not th.equal(model.value_normalizer.std(), before[1])
    assert not th.equal(critic_of(model), before[2])
    with th.no_grad():
        values = model._denormalized(model.policy.predict_values(model.rollout_buffer.flat("observations")))
    th.testing.assert_close(values.flatten(), model.rollout_buffer.flat("values"), atol=1e-3, rtol=1e-4)


# --- environments -----------------------------------------------------------------------------------------------------


def test_an_id_becomes_as_many_environments_as_asked_for() -> None:
    assert A2CPlus("MlpPolicy", "CartPole-v1").get_env().num_envs == A2CHparams.defaults()["n_envs"] == 8
    model = A2CPlus("MlpPolicy", "CartPole-v1", n_envs=3, n_steps=4).learn(24)
    assert model.n_envs == model.get_env().num_envs == 3
    assert model.rollout_buffer.rewards.shape == (4, 3)
    assert model.num_timesteps == 24
    assert model.get_env().env_is_wrapped(Monitor) == [True] * 3


def test_an_environment_object_decides_for_itself() -> None:
    assert A2CPlus("MlpPolicy", pendulum(2), n_envs=5).n_envs == 2
    assert A2CPlus("MlpPolicy", gym.make("CartPole-v1"), n_envs=5).n_envs == 1
    assert A2CPlus("MlpPolicy", pendulum(2), n_envs=5).hyperparameters()["n_envs"] == 2


def test_the_preset_of_sb3_with_an_id_makes_one_as_sb3_does() -> None:
    assert A2CPlus("MlpPolicy", "CartPole-v1", **presets.SB3_A2C).n_envs == A2C("MlpPolicy", "CartPole-v1").n_envs == 1


def test_environments_made_from_an_id_are_seeded_and_differ() -> None:
    first, second = (A2CPlus("MlpPolicy", "CartPole-v1", n_envs=4, seed=3).get_env().reset() for _ in range(2))
    assert np.array_equal(first, second)
    assert len(np.unique(first, axis=0)) == 4


# --- the interface ----------------------------------------------------------------------------------------------------


def test_the_positional_arguments_are_those_of_sb3() -> None:
    theirs = [name for name in inspect.signature(A2C).parameters if name not in ("policy", "env")]
    assert list(A2CPlus.positional) == theirs


def test_the_preset_of_sb3_has_sb3s_defaults() -> None:
    theirs = inspect.signature(A2C).parameters
    shared = set(presets.SB3_A2C) & set(theirs)
    assert shared == set(A2CHparams.names()) & set(theirs)
    assert {name: presets.SB3_A2C[name] for name in shared} == {name: theirs[name].default for name in shared}
    assert set(presets.SB3_A2C) <= set(A2CHparams.names())


class Dumps(KVWriter):
    """The steps at which the logger wrote its table."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def write(self, key_values: Any, key_excluded: Any, step: int = 0) -> None:
        self.steps.append(step)

    def close(self) -> None:
        pass


@pytest.mark.parametrize(("arguments", "expected"), [({}, [100]), ({"log_interval": 40}, [40, 80, 120])])
def test_progress_is_logged_every_100_iterations_by_default(arguments: dict[str, Any], expected: list[int]) -> None:
    assert inspect.signature(A2C.learn).parameters["log_interval"].default == 100
    model = A2CPlus("MlpPolicy", "CartPole-v1", n_envs=1, n_steps=1, device="cpu")
    dumps = Dumps()
    model.set_logger(Logger(None, [dumps]))
    model.learn(130, **arguments)
    assert dumps.steps == expected


def test_what_sb3_logs_is_logged_under_its_names() -> None:
    names = {"policy_loss", "entropy_loss", "value_loss", "explained_variance", "learning_rate", "n_updates", "std"}
    logged = trained(2).logger.name_to_value
    theirs = A2C("MlpPolicy", pendulum(), n_steps=20, device="cpu").learn(80).logger.name_to_value
    assert {key for key in theirs if key.startswith("train/")} == {f"train/{name}" for name in names}
    for name in {*names, "grad_norm", "loss", "nonfinite_updates", "ent_coef"}:
        assert np.isfinite(logged[f"train/{name}"]), name


def test_hooks_run_around_every_update_and_a_loss_is_one_function() -> None:
    calls: list[str] = []

    class Mine(A2CPlus):
        def before_update(self, hp: A2CHparams) -> None:
            calls.append("before")

        def update(self, hp: A2CHparams, metrics: Metrics) -> None:
            calls.append("update")
            super().update(hp, metrics)

        def after_update(self, hp: A2CHparams) -> None:
            calls.append("after")

        def policy_loss(self, log_probs: th.Tensor, advantages: th.Tensor, hp: A2CHparams) -> th.Tensor:
            assert log_probs.shape == advantages.shape == (40,)
            return log_probs.mean() * 0

    mine = Mine("MlpPolicy", pendulum(), **TINY).learn(80)
    assert calls == ["before", "update", "after"] * 2
    fresh = A2CPlus("MlpPolicy", pendulum(), **TINY)
    assert th.equal(actor_of(mine), actor_of(fresh))  # nothing pulls at the policy
    assert not th.equal(critic_of(mine), critic_of(fresh))


# --- save and load ----------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "sb3": {**presets.SB3_A2C, "n_steps": 20},
    "tf_like": {"use_rms_prop": "tf_like"},
    "adam": {"use_rms_prop": False},
    "everything": {
        "learning_rate": "lin_1e-3",
        "schedule_timesteps": 500,
        "normalize_value_targets": True,
        "critic_learning_rate": "cos_1e-3",
        "normalize_advantage": True,
    },
    "gsde": {"use_sde": True},
}


def everything_of(model: A2CPlus) -> dict[str, th.Tensor]:
    state = {name: value for name, value in model.get_parameters().items() if name != "policy.optimizer"}
    tensors = {f"{name}.{key}": tensor for name, entries in state.items() for key, tensor in entries.items()}
    for index, entry in model.policy.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": th.as_tensor(value) for key, value in entry.items()}
    return tensors


@pytest.mark.filterwarnings("ignore:learn.. continues")
@pytest.mark.parametrize("name", OPTIONS)
def test_save_load_and_continue_equals_going_on(name: str, tmp_path: Path) -> None:
    model = trained(**{**TINY, **OPTIONS[name]})
    model.save(tmp_path / "model")
    loaded = A2CPlus.load(tmp_path / "model", env=pendulum(), device="cpu")
    results = []
    for each in (model, loaded):
        each.set_env(each.get_env())  # both start from a reset environment
        each.get_env().seed(11)
        np.random.seed(11)
        th.manual_seed(11)
        each.learn(120, reset_num_timesteps=False)
        results.append(everything_of(each))
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        assert th.equal(value, results[1][key]), key
    assert model.num_timesteps == loaded.num_timesteps == 240
    assert model._n_updates == loaded._n_updates == 6


def test_a_loaded_model_remembers_how_many_environments_there_were_and_takes_others(tmp_path: Path) -> None:
    A2CPlus("MlpPolicy", "CartPole-v1", n_envs=3, n_steps=4).learn(12).save(tmp_path / "model")
    assert A2CPlus.load(tmp_path / "model").n_envs == 3
    loaded = A2CPlus.load(tmp_path / "model", env=make_vec_env("CartPole-v1", 2), n_envs=3)  # the environments decide
    assert loaded.n_envs == 2
    assert loaded.learn(8).rollout_buffer.rewards.shape == (4, 2)


@pytest.mark.parametrize(
    ("name", "value"), [("use_rms_prop", False), ("use_rms_prop", "tf_like"), ("rms_prop_eps", 0.1)]
)
def test_another_optimiser_is_refused_by_load_or_takes_effect(name: str, value: Any, tmp_path: Path) -> None:
    trained().save(tmp_path / "model")
    try:
        loaded = A2CPlus.load(tmp_path / "model", env=pendulum(), device="cpu", **{name: value})
    except ValueError as error:
        assert f"`{name}`" in str(error)
    else:
        loaded.learn(40)
        expected = {False: th.optim.Adam, "tf_like": RMSpropTFLike}.get(value, th.optim.RMSprop)
        assert type(loaded.policy.optimizer) is expected
        assert loaded.policy.optimizer.param_groups[0]["eps"] == loaded.rms_prop_eps


class _Rows(KVWriter):
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
        self.rows.append(dict(key_values))

    def close(self) -> None:
        pass


@pytest.mark.parametrize("log_interval", [1, 3, 100])
def test_every_row_has_the_last_updates_values_whether_or_not_somebody_watches(log_interval: int) -> None:
    """Alone, an update whose values the next one overwrites computes none; what is written is the same."""

    def rows(callback: Any) -> tuple[list[Any], Any]:
        model, writer = A2CPlus("MlpPolicy", "Pendulum-v1", n_steps=8, n_envs=2, seed=0), _Rows()
        model.set_logger(Logger(None, [writer]))
        model.learn(10 * 16, callback, log_interval=log_interval)
        names = [name for name in model.logger.name_to_value if name.startswith("train/") and "seconds" not in name]
        last = {name: model.logger.name_to_value[name] for name in names}
        kept = [{k: v for k, v in row.items() if k.startswith("train/") and "seconds" not in k} for row in writer.rows]
        return kept, last

    alone, watched = rows(None), rows(lambda *_: True)
    assert alone == watched
    assert len(alone[0]) == 10 // log_interval
    assert all("train/explained_variance" in row for row in [*alone[0][log_interval == 1 :], alone[1]])


class _Stopped(gym.Wrapper[Any, Any, Any, Any]):
    steps = 0

    def step(self, action: Any) -> Any:
        self.steps += 1
        if self.steps == 43:
            raise KeyboardInterrupt
        return super().step(action)


def test_after_ctrl_c_the_last_update_is_logged_whether_or_not_somebody_watches() -> None:
    def row(callback: Any) -> dict[str, Any]:
        model, writer = A2CPlus("MlpPolicy", _Stopped(gym.make("Pendulum-v1")), n_steps=8, seed=0), _Rows()
        model.set_logger(Logger(None, [writer]))
        with pytest.raises(KeyboardInterrupt):
            model.learn(1000, callback)
        model.logger.dump()
        (only,) = writer.rows
        return {name: value for name, value in only.items() if name.startswith("train/") and "seconds" not in name}

    alone, watched = row(None), row(lambda *_: True)
    assert alone.keys() == watched.keys()
    assert alone == pytest.approx(watched, rel=1e-6)
    assert "train/explained_variance" in alone


@pytest.mark.parametrize("n_steps", [5, 16, 100])
def test_a_copied_model_trains_on_bit_for_bit(n_steps: int) -> None:
    model = A2CPlus("MlpPolicy", "Pendulum-v1", n_steps=n_steps, n_envs=2, seed=0).learn(4 * n_steps)
    copied = cloudpickle.loads(cloudpickle.dumps(model))
    for one in (model, copied):
        one.set_random_seed(1)
        one.learn(8 * n_steps)
    assert all(map(th.equal, model.policy.parameters(), copied.policy.parameters()))
