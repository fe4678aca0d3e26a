"""
What SB3 promises to callbacks, buffers and scripts, and ours keep.

The oracle is SB3's PPO where it has an answer.
"""

import functools
import os
import stat
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from stable_baselines3.common.vec_env import VecFrameStack

from sb3_pgplus import PPOPlus, TorchRolloutBuffer, TRPOPlus, presets
from sb3_pgplus.files import write_atomically
from sb3_pgplus.policies import normalizable_keys

SMALL: dict[str, Any] = {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "seed": 0, "device": "cpu"}
EXACT: dict[str, Any] = {**presets.SB3_PPO, **SMALL}


class AtEnd(BaseCallback):
    """A function of the callback at the end of each rollout."""

    def __init__(self, function: Callable[[Any], None]) -> None:
        super().__init__()
        self.function = function

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.function(self)


class Cut(gym.Env):  # type: ignore[type-arg]
    """Rewards of 1, and a time limit after 5 steps."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self.observation_space.sample() * 0, {}

    def step(self, action: Any) -> Any:
        self.t += 1
        return np.full(2, self.t / 5, np.float32), 1.0, False, self.t == 5, {}


def parameters_of(model: Any) -> list[th.Tensor]:
    return [parameter.detach().clone() for parameter in model.policy.parameters()]


def equal(model: Any, other: Any) -> bool:
    return all(map(th.equal, parameters_of(model), parameters_of(other)))


# --- what callbacks see and do ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [EXACT, SMALL, SMALL | {"normalize_value_targets": True}])
def test_values_at_the_end_of_a_rollout_are_those_of_the_last_observations(settings: dict[str, Any]) -> None:
    seen = []

    def look(callback: Any) -> None:
        model = callback.model
        with th.no_grad():
            wanted = model.policy.predict_values(th.as_tensor(callback.locals["new_obs"]))
        seen.append((callback.locals["values"], model._denormalized(wanted)))

    PPOPlus("MlpPolicy", "Pendulum-v1", **settings).learn(64, callback=AtEnd(look))
    for values, wanted in seen:
        assert values.shape == (1, 1)
        assert th.allclose(values, wanted, rtol=1e-5, atol=1e-5)


def test_a_bonus_and_new_advantages_are_those_of_sb3() -> None:
    def add_bonus(callback: Any) -> None:
        buffer = callback.model.rollout_buffer
        buffer.rewards += 0.1
        buffer.compute_returns_and_advantage(callback.locals["values"], callback.locals["dones"])

    ours = PPOPlus("MlpPolicy", Cut(), **EXACT).learn(64, callback=AtEnd(add_bonus))
    stock = PPO("MlpPolicy", Cut(), **SMALL).learn(64, callback=AtEnd(add_bonus))
    for own, theirs in zip(parameters_of(ours), parameters_of(stock), strict=True):
        assert th.allclose(own, theirs, atol=1e-6)


def test_new_advantages_without_a_change_are_the_old_ones() -> None:
    def again(callback: Any) -> None:
        buffer = callback.model.rollout_buffer
        before = buffer.advantages.copy()
        buffer.compute_returns_and_advantage(callback.locals["values"], callback.locals["dones"])
        assert np.allclose(buffer.advantages, before, atol=1e-6)  # scaled rewards, time limits and all

    PPOPlus("MlpPolicy", Cut(), **SMALL, clip_rewards=0.5).learn(64, callback=AtEnd(again))


def test_arrays_taken_from_the_buffer_stay_what_they_were() -> None:
    kept, copies = [], []

    def keep(callback: Any) -> None:
        for name in ("actions", "rewards", "observations", "advantages"):
            kept.append(getattr(callback.model.rollout_buffer, name))
            copies.append(kept[-1].copy())

    model = PPOPlus("MlpPolicy", "Pendulum-v1", **SMALL).learn(96, callback=AtEnd(keep))
    assert all(map(np.array_equal, kept, copies))
    unseen = model.rollout_buffer.tensor("rewards")
    model.learn(64, reset_num_timesteps=False)
    assert model.rollout_buffer.tensor("rewards") is not unseen  # of the rollout that was looked at last
    unseen = model.rollout_buffer.tensor("rewards")
    model.learn(64, reset_num_timesteps=False)
    assert model.rollout_buffer.tensor("rewards") is unseen  # nobody looks: the memory is used again


def test_rewards_changed_in_place_at_the_end_of_a_rollout_change_nothing() -> None:
    def scale(callback: Any) -> None:
        rewards = callback.model.rollout_buffer.rewards
        rewards *= 0.0

    changed = PPOPlus("MlpPolicy", "Pendulum-v1", **SMALL).learn(96, callback=AtEnd(scale))
    same = PPOPlus("MlpPolicy", "Pendulum-v1", **SMALL, recompute_advantages=False).learn(96)
    assert equal(changed, same)


def test_a_method_put_into_one_of_sb3s_callbacks_is_heard(tmp_path: Any) -> None:
    def zero(callback: Any) -> None:
        buffer = callback.model.rollout_buffer
        buffer.advantages = np.zeros_like(buffer.advantages)

    patched = CheckpointCallback(10_000, str(tmp_path))
    patched._on_rollout_end = lambda: zero(patched)  # type: ignore[method-assign]
    models = [PPOPlus("MlpPolicy", "Pendulum-v1", **SMALL).learn(64, callback=c) for c in (patched, AtEnd(zero))]
    assert equal(*models)


# --- what a buffer of one's own may do --------------------------------------------------------------------------------


class OwnAdvantages(TorchRolloutBuffer):
    calls: list[tuple[Any, ...]]

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:  # type: ignore[type-arg]
        self.__dict__.setdefault("calls", []).append((last_values.shape, dones.shape))
        super().compute_returns_and_advantage(last_values, dones)
        self.advantages = np.full_like(self.advantages, 7.0)


class OwnSamples(TorchRolloutBuffer):
    def _get_samples(self, batch_inds: Any, env: Any = None) -> Any:
        self.__dict__.setdefault("sizes", []).append(len(batch_inds))
        samples = super()._get_samples(batch_inds, env)
        return samples._replace(advantages=samples.advantages * 0)


def test_advantages_of_a_buffers_own_are_used_in_every_epoch() -> None:
    model = PPOPlus("MlpPolicy", "Pendulum-v1", rollout_buffer_class=OwnAdvantages, **SMALL)
    advantages = []
    loss = model.loss

    def record(batch: Any, *args: Any, **kwargs: Any) -> Any:
        advantages.extend(batch.advantages.tolist())
        return loss(batch, *args, **kwargs)

    model.loss = record  # type: ignore[method-assign]
    model.learn(64)
    assert model.rollout_buffer.calls == [((1, 1), (1,))] * 2  # once a rollout, as SB3 calls it
    assert len(advantages) == 2 * 2 * 32 and set(advantages) == {7.0}


class SB3sOwn(TorchRolloutBuffer):
    """SB3's arithmetic, which expects the values of steps that a time limit cut in the rewards."""

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:  # type: ignore[type-arg]
        last = last_values.clone().cpu().numpy().flatten()
        advantage, advantages, rewards, values = 0.0, np.zeros_like(self.rewards), self.rewards, self.values
        for step in reversed(range(self.buffer_size)):
            is_last = step == self.buffer_size - 1
            going_on = 1.0 - (dones.astype(np.float32) if is_last else self.episode_starts[step + 1])
            delta = rewards[step] + self.gamma * (last if is_last else values[step + 1]) * going_on - values[step]
            advantage = delta + self.gamma * self.gae_lambda * going_on * advantage
            advantages[step] = advantage
        self.advantages = advantages
        self.returns = advantages + values


class Calls(TorchRolloutBuffer):
    def compute_returns_and_advantage(self, *args: Any, **kwargs: Any) -> None:
        super().compute_returns_and_advantage(*args, **kwargs)


@pytest.mark.parametrize("buffer_class", [SB3sOwn, Calls])
def test_sb3s_arithmetic_in_a_buffer_of_ours_gives_sb3s_bits(buffer_class: Any) -> None:
    ours = PPOPlus("MlpPolicy", Cut(), rollout_buffer_class=buffer_class, **EXACT).learn(64)
    assert equal(ours, PPO("MlpPolicy", Cut(), **SMALL).learn(64))
    assert set(ours.rollout_buffer.rewards.flatten()) == {1.0}  # raw again


@pytest.mark.parametrize("buffer_class", [SB3sOwn, Calls])
def test_a_buffers_own_arithmetic_gets_scaled_rewards(buffer_class: Any) -> None:
    models = [
        PPOPlus("MlpPolicy", Cut(), rollout_buffer_class=kind, **SMALL, recompute_advantages=False).learn(64)
        for kind in (buffer_class, TorchRolloutBuffer)
    ]
    for own, stock in zip(*map(parameters_of, models), strict=True):
        assert th.allclose(own, stock, atol=1e-5)


def test_a_method_put_into_a_buffer_hands_out_its_minibatches() -> None:
    model = PPOPlus("MlpPolicy", "Pendulum-v1", **SMALL, compile=False)
    buffer, sizes = model.rollout_buffer, []
    stock = buffer._get_samples
    buffer._get_samples = lambda indices, env=None: sizes.append(len(indices)) or stock(indices, env)
    model.learn(32)
    assert sizes == [16, 16] * 2


def test_minibatches_without_the_old_distribution_are_named_where_it_is_needed() -> None:
    class Plain(TorchRolloutBuffer):
        def _get_samples(self, batch_inds: Any, env: Any = None) -> Any:
            return RolloutBufferSamples(*super()._get_samples(batch_inds, env)[:6])

    PPOPlus("MlpPolicy", "Pendulum-v1", rollout_buffer_class=Plain, **SMALL).learn(32)
    with pytest.raises(ValueError, match="`kl_coef` needs minibatches with `old_distribution`"):
        PPOPlus("MlpPolicy", "Pendulum-v1", rollout_buffer_class=Plain, kl_coef=1.0, **SMALL).learn(32)


def test_asked_to_recompute_them_the_buffer_does() -> None:
    model = PPOPlus(
        "MlpPolicy", "Pendulum-v1", rollout_buffer_class=OwnAdvantages, **SMALL, recompute_advantages=True
    ).learn(32)
    assert len(model.rollout_buffer.calls) == 2  # before each of the two epochs


def test_minibatches_of_a_buffers_own_are_used() -> None:
    model = PPOPlus("MlpPolicy", "Pendulum-v1", rollout_buffer_class=OwnSamples, **SMALL, compile=False).learn(32)
    assert model.rollout_buffer.sizes == [16, 16] * 2
    whole = next(model.rollout_buffer.get())
    assert len(whole.advantages) == 32 and not whole.advantages.any()


def test_another_estimator_beside_a_buffers_own_advantages_is_refused() -> None:
    with pytest.raises(ValueError, match="`advantage_estimator`='td' has no effect with .*OwnAdvantages"):
        PPOPlus("MlpPolicy", "Pendulum-v1", rollout_buffer_class=OwnAdvantages, advantage_estimator="td")


def test_a_buffer_of_sb3s_kind_gets_values_in_sb3s_shape() -> None:
    shapes = []

    class Own(RolloutBuffer):
        def compute_returns_and_advantage(self, last_values: th.Tensor, dones: Any) -> None:
            shapes.append(last_values.shape)
            super().compute_returns_and_advantage(last_values.squeeze(1), dones)

    PPOPlus("MlpPolicy", "Pendulum-v1", n_envs=3, rollout_buffer_class=Own, **SMALL).learn(96)
    assert shapes == [(3, 1)]


@pytest.mark.parametrize("buffer_class", [TorchRolloutBuffer, RolloutBuffer])
def test_discounts_assigned_to_the_buffer_count_as_in_sb3(buffer_class: Any) -> None:
    def trained(model: Any) -> Any:
        model.rollout_buffer.gamma, model.rollout_buffer.gae_lambda = 0.5, 0.6
        return model.learn(64)

    ours = trained(PPOPlus("MlpPolicy", "Pendulum-v1", rollout_buffer_class=buffer_class, **EXACT))
    stock = trained(PPO("MlpPolicy", "Pendulum-v1", **SMALL))
    assert equal(ours, stock)
    assert (ours.gamma, ours.gae_lambda) == (0.5, 0.6)
    ours.gae_lambda = 0.7
    ours.learn(32)
    assert ours.rollout_buffer.gae_lambda == 0.7
    new = buffer_class(32, ours.observation_space, ours.action_space, "cpu", gamma=0.1)
    ours.rollout_buffer = new
    ours.learn(32)
    assert (ours.gamma, new.gamma, new.gae_lambda) == (0.5, 0.5, 0.7)


def test_a_wrong_discount_in_the_buffer_is_named() -> None:
    model = PPOPlus("MlpPolicy", "Pendulum-v1", **SMALL)
    model.rollout_buffer.gae_lambda = 2.0
    with pytest.raises(ValueError, match="`gae_lambda`"):
        model.learn(32)


# --- schedules, statistics, optimisers --------------------------------------------------------------------------------


def test_a_function_as_schedule_is_asked_at_every_update() -> None:
    value = {"clip": 0.2}
    model = PPOPlus("MlpPolicy", "Pendulum-v1", clip_range=lambda _: value["clip"], **SMALL)
    for clip in (0.2, 0.1, 0.05):
        value["clip"] = clip
        model.learn(32)
        assert model.logger.name_to_value["train/clip_range"] == clip


def test_a_function_as_schedule_is_asked_once_an_update() -> None:
    calls: list[float] = []
    model = PPOPlus("MlpPolicy", "Pendulum-v1", clip_range=lambda p: calls.append(p) or 0.2, **SMALL)  # type: ignore
    before = len(calls)
    model.learn(5 * 32)
    assert len(calls) - before <= 5 + 1  # and once to begin with


def test_statistics_of_rewards_forget_an_episode_that_a_reset_cut_off() -> None:
    # VecFrameStack returns the array that it returned before.
    stds = []
    for wrap in (lambda env: env, lambda env: VecFrameStack(env, 1)):
        model = PPOPlus("MlpPolicy", wrap(make_vec_env(Cut, 1)), **SMALL, normalize_rewards=True)
        stds.append(float(model.learn(32).learn(32).reward_normalizer.std()))
    assert stds[0] == stds[1]


class OwnOptimizer(ActorCriticPolicy):
    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.optimizer = th.optim.SGD(self.parameters(), lr=lr_schedule(1), momentum=0.9)


class OwnParameters(ActorCriticPolicy):
    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.optimizer.add_param_group({"params": [th.nn.Parameter(th.zeros(3))]})


def test_a_function_that_makes_an_optimiser_makes_that_of_two_rates() -> None:
    made = functools.partial(th.optim.Adam, betas=(0.8, 0.9))
    model = PPOPlus(
        "MlpPolicy", "Pendulum-v1", critic_learning_rate=1e-3, policy_kwargs={"optimizer_class": made}, **SMALL
    )
    assert [group["betas"] for group in model.policy.optimizer.param_groups] == [(0.8, 0.9)] * 2


@pytest.mark.parametrize("policy", [OwnOptimizer, OwnParameters])
def test_a_policys_own_optimiser_is_not_replaced(policy: Any) -> None:
    with pytest.raises(
        ValueError, match=f"`critic_learning_rate` is set, but {policy.__name__} made its own optimiser"
    ):
        PPOPlus(policy, "Pendulum-v1", critic_learning_rate=1e-3, **SMALL)
    PPOPlus("MlpPolicy", "Pendulum-v1", critic_learning_rate=1e-3, **SMALL)


def test_collecting_rollouts_past_the_package_is_refused_where_it_would_be_wrong() -> None:
    class Own(PPOPlus):
        collect_rollouts = OnPolicyAlgorithm.collect_rollouts  # type: ignore[assignment]

    with pytest.raises(RuntimeError, match="Own.collect_rollouts is not that of sb3_pgplus"):
        Own("MlpPolicy", "Pendulum-v1", **SMALL).learn(64)
    assert equal(Own("MlpPolicy", "Pendulum-v1", **EXACT).learn(64), PPO("MlpPolicy", "Pendulum-v1", **SMALL).learn(64))


def test_the_coefficient_of_the_kl_comes_back_from_its_least_value() -> None:
    model = PPOPlus("MlpPolicy", "Pendulum-v1", **SMALL, kl_coef=1.0, adaptive_kl_target=1e9)
    model._kl_coef_scale = 2.0**-19
    model.learn(96)  # the KL is far below: halved in each of three rollouts
    assert model._kl_coef_scale == 2.0**-20
    model.adaptive_kl_target = 1e-12
    model.learn(32)
    assert model._kl_coef_scale == 2.0**-19


@pytest.mark.parametrize("algorithm", [PPOPlus, TRPOPlus])
def test_a_batch_larger_than_the_rollout_is_compiled_and_reported(algorithm: Any) -> None:
    settings = SMALL | {"batch_size": 64, "compile": True}
    if algorithm is TRPOPlus:
        del settings["n_epochs"]
    report = algorithm("MlpPolicy", "Pendulum-v1", **settings).learn(64).engine_report()
    unit = "update" if algorithm is PPOPlus else "critic update"
    assert f"{unit}: compiled" in report or "compiler" in report


# --- boxes, gradients, files ------------------------------------------------------------------------------------------


class Volume(Cut):
    observation_space = spaces.Box(-5, 5, (2, 3, 4), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros((2, 3, 4), np.float32), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        return np.full((2, 3, 4), self.t, np.float32), 1.0, False, self.t == 5, {}


def test_a_box_of_three_dimensions_is_normalised_where_that_is_asked_for() -> None:
    model = PPOPlus("MlpPolicy", Volume(), **SMALL, normalize_observations=True).learn(32)
    assert model.policy.observation_normalizer.moments[0].mean.shape == (2, 3, 4)
    assert not hasattr(PPOPlus("MlpPolicy", Volume(), **SMALL).policy, "observation_normalizer")
    in_a_dict = spaces.Dict({"volume": Volume.observation_space, "vector": Cut.observation_space})
    assert normalizable_keys(in_a_dict, floats_only=False) == ["vector"]  # as in files there are


@pytest.mark.parametrize("mode", [th.no_grad, th.inference_mode])
def test_learning_without_gradients_is_refused_and_leaves_the_model_as_it_is(mode: Any) -> None:
    model = PPOPlus("MlpPolicy", "Pendulum-v1", **SMALL)
    with mode(), pytest.raises(RuntimeError, match=r"outside of no_grad\(\) and inference_mode\(\)"):
        model.learn(32)
    model.learn(32)


def test_a_schedule_put_in_the_place_of_sb3s_survives_pickling() -> None:
    import cloudpickle

    model = PPOPlus("MlpPolicy", "Pendulum-v1", **SMALL, learning_rate=1e-3 + 0.0)
    model.lr_schedule = lambda _: 5e-5  # type: ignore[assignment]
    env, model.env = model.env, None
    copy = cloudpickle.loads(cloudpickle.dumps(model))
    copy.set_env(env)
    copy.learn(32)
    assert copy.logger.name_to_value["train/learning_rate"] == 5e-5


def test_a_private_file_stays_private_and_a_new_one_is_as_others(tmp_path: Any) -> None:
    path, other = tmp_path / "model.zip", tmp_path / "other"
    write_atomically(path, b"one")
    other.write_bytes(b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)
    path.chmod(0o600)
    write_atomically(path, b"two")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.read_bytes() == b"two"


def test_a_name_as_long_as_names_may_be_is_written(tmp_path: Any) -> None:
    path = tmp_path / ("x" * (os.pathconf(tmp_path, "PC_NAME_MAX") - 4) + ".zip")
    write_atomically(path, b"long")
    assert path.read_bytes() == b"long" and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("where", ["in no folder", "onto a folder"])
def test_what_cannot_be_written_is_called_as_the_user_calls_it(where: str, tmp_path: Any) -> None:
    path = "/proc/model.zip" if where == "in no folder" else str(tmp_path)
    with pytest.raises(OSError) as caught:
        write_atomically(path, b"")
    assert (caught.value.filename, caught.value.filename2) == (path, None)
