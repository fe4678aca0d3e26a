"""Observation and reward normalisation inside the model."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_pgplus import PPOPlus
from sb3_pgplus.buffers import scaled_rewards
from sb3_pgplus.policies import ObservationNormalizer, RunningMoments, observation_normalizer


class Scripted(gym.Env[Any, Any]):
    """Observations and rewards on scales that a network cannot take as they are; ends every ``length`` steps."""

    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, length: int = 7, dtype: Any = np.float64) -> None:
        self.observation_space = spaces.Box(-1e6, 1e6, (2,), dtype)
        self.length = length

    def _observe(self) -> Any:
        return np.array([10 + self.np_random.normal(), 0.1 * self.np_random.normal()]).astype(
            self.observation_space.dtype
        )

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        return self._observe(), 50 + 10 * self.np_random.normal(), self.steps % self.length == 0, False, {}


class AtRolloutEnd(BaseCallback):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.function(self.model)


def scripted(n_envs: int = 2, **kwargs: Any) -> DummyVecEnv:
    env = make_vec_env(lambda: Scripted(**kwargs), n_envs)
    env.seed(0)
    return env  # type: ignore[return-value]


def model_on(env: Any, **kwargs: Any) -> PPOPlus:
    return PPOPlus("MlpPolicy", env, **{"n_steps": 32, "batch_size": 32, "n_epochs": 2, "seed": 0, **kwargs})


def test_observations_are_normalised_with_the_formula_of_vec_normalize() -> None:
    data = np.random.default_rng(0).normal([5, -3], [2, 0.01], (100, 2))
    normalizer = ObservationNormalizer(spaces.Box(-9, 9, (2,)), clip=1.5, floats_only=True)
    normalizer.merge(th.as_tensor(data))
    oracle = VecNormalize(scripted(), clip_obs=1.5)
    oracle.obs_rms.update(data)  # type: ignore[union-attr]
    probe = np.random.default_rng(1).normal([5, -3], [4, 0.02], (50, 2))
    expected = oracle.normalize_obs(probe)
    assert np.abs(expected).max() == 1.5  # so that clipping is tested too
    assert np.allclose(normalizer(th.as_tensor(probe)), expected, atol=1e-6)


def test_the_first_update_sees_normalised_observations_and_a_ratio_of_one() -> None:
    seen: list[th.Tensor] = []
    ratios: list[th.Tensor] = []

    class Spy(PPOPlus):
        def policy_loss(self, ratio: th.Tensor, advantages: th.Tensor, hp: Any) -> th.Tensor:
            ratios.append(ratio.detach())
            return super().policy_loss(ratio, advantages, hp)

    model = Spy("MlpPolicy", scripted(), n_steps=32, batch_size=64, n_epochs=1, seed=0)
    model._setup_learn(64)
    model.policy.features_extractor.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.collect_rollouts(model.env, model._init_callback(None), model.rollout_buffer, 32)
    assert seen[0].abs().max() > 1  # acting in rollout 1 happens on raw observations, clipped at 10
    seen.clear()
    model.train()
    features = seen[0]
    # VecNormalize's prior of 1e-4 samples at 0 shifts the mean of 10 by 10 · 1e-4 / 64 = 1.6e-5.
    assert th.allclose(features.mean(0), th.zeros(2), atol=1e-4)
    assert th.allclose(features.std(0, correction=0), th.ones(2), atol=1e-2)
    assert th.allclose(ratios[0], th.ones_like(ratios[0]), atol=1e-5)


def test_statistics_are_constant_from_the_first_step_of_a_rollout_to_its_last_minibatch() -> None:
    means: list[tuple[str, th.Tensor]] = []

    class Spy(PPOPlus):
        def before_update(self, hp: Any) -> None:
            means.append(("update", self.policy.observation_normalizer.moments[0].mean.clone()))

        def after_update(self, hp: Any) -> None:
            means.append(("updated", self.policy.observation_normalizer.moments[0].mean.clone()))

    class AtFirstStep(BaseCallback):
        def _on_step(self) -> bool:
            if len(means) % 3 == 0:
                means.append(("rollout", self.model.policy.observation_normalizer.moments[0].mean.clone()))
            return True

    Spy("MlpPolicy", scripted(), n_steps=32, batch_size=32, n_epochs=2, seed=0).learn(4 * 64, AtFirstStep())
    assert [name for name, _ in means] == ["rollout", "update", "updated"] * 4
    by_iteration = [means[i : i + 3] for i in range(0, len(means), 3)]
    for index, iteration in enumerate(by_iteration):
        (_, at_rollout), (_, at_update), (_, after) = iteration
        assert th.equal(at_update, after)
        if index > 0:  # rollout 1 is the exception: it is merged before its update and evaluated again
            assert th.equal(at_rollout, at_update)
    assert not th.equal(by_iteration[1][0][1], by_iteration[2][0][1])  # and they do move on


def test_every_observation_is_merged_exactly_once() -> None:
    model = model_on(scripted()).learn(3 * 64)
    count = observation_normalizer(model.policy).moments[0].count  # type: ignore[union-attr]
    assert float(count) == pytest.approx(3 * 64 + 1e-4)


def test_later_rollouts_have_a_ratio_of_one_at_the_first_minibatch() -> None:
    firsts: list[float] = []

    class Spy(PPOPlus):
        def before_update(self, hp: Any) -> None:
            self.fresh = True

        def policy_loss(self, ratio: th.Tensor, advantages: th.Tensor, hp: Any) -> th.Tensor:
            if self.fresh:
                firsts.append(float((ratio.detach() - 1).abs().max()))
            self.fresh = False
            return super().policy_loss(ratio, advantages, hp)

    Spy("MlpPolicy", scripted(), n_steps=32, batch_size=32, n_epochs=2, seed=0).learn(4 * 64)
    assert len(firsts) == 4
    assert max(firsts) < 1e-5


def test_rewards_are_divided_by_the_std_of_the_discounted_return_as_vec_normalize_does() -> None:
    # Oracle: VecNormalize's own statistics over the same reward stream. It scales each step with the statistics so
    # far; ours scales the whole rollout with the statistics that include it, i.e. VecNormalize's at the rollout's end.
    oracle = VecNormalize(scripted(length=7), norm_obs=False, gamma=0.9, clip_reward=1.0)
    oracle.reset()
    raw, dones = [], []
    for _ in range(96):
        _, _, done, _ = oracle.step([oracle.action_space.sample()] * 2)
        raw.append(oracle.get_original_reward())
        dones.append(done)
    scaled: list[th.Tensor] = []

    def record(model: Any) -> None:
        buffer = model.rollout_buffer
        scaled.append(scaled_rewards(buffer.tensor("rewards"), *buffer.reward_scale).clone())

    env = scripted(length=7)
    model = model_on(env, normalize_observations=False, gamma=0.9, clip_rewards=1.0, n_steps=96)
    model.learn(192, callback=AtRolloutEnd(record))
    assert np.array_equal(np.array(raw, dtype=np.float32), model.rollout_buffer.rewards)  # stored as they came
    assert float(model.reward_normalizer.var) == pytest.approx(float(oracle.ret_rms.var), rel=1e-9)
    expected = np.clip(np.array(raw) / np.sqrt(oracle.ret_rms.var + 1e-8), -1, 1)
    assert np.allclose(scaled[0], expected, atol=1e-6)
    assert any(done.any() for done in dones)


def test_the_discounted_return_is_carried_over_rollouts_and_dropped_at_a_reset() -> None:
    one = model_on(scripted(length=50), n_steps=64, normalize_observations=False).learn(128)
    two = model_on(scripted(length=50), n_steps=32, normalize_observations=False)
    two.learn(128)
    assert float(two.reward_normalizer.var) == pytest.approx(float(one.reward_normalizer.var), rel=1e-2)
    assert all(carried != 0 for carried in two._carried_returns)
    two._setup_learn(64)
    assert two._carried_returns == [0.0, 0.0]


def test_an_outer_vec_normalize_is_respected_and_said_once() -> None:
    with pytest.warns(UserWarning, match="VecNormalize normalises observations and rewards already") as warned:
        model = model_on(VecNormalize(scripted()))
    assert len([w for w in warned if "VecNormalize" in str(w.message)]) == 1
    assert observation_normalizer(model.policy) is None
    assert model.get_parameters().keys() == {"policy", "policy.optimizer"}


@pytest.mark.filterwarnings("ignore:VecNormalize normalises")
@pytest.mark.parametrize("what", ["observations", "rewards"])
def test_normalising_twice_is_an_error(what: str) -> None:
    with pytest.raises(ValueError, match=f"normalises {what}.*VecNormalize"):
        model_on(VecNormalize(scripted()), **{f"normalize_{what}": True})


@pytest.mark.filterwarnings("ignore:VecNormalize normalises")
def test_a_vec_normalize_of_rewards_alone_leaves_the_observations_to_the_model() -> None:
    model = model_on(VecNormalize(scripted(), norm_obs=False))
    assert observation_normalizer(model.policy) is not None
    assert not model._normalizes_rewards


def test_integers_and_images_are_left_alone_unless_asked_for() -> None:
    integers = scripted(dtype=np.int64)
    assert observation_normalizer(model_on(integers).policy) is None
    assert observation_normalizer(model_on(integers, normalize_observations=True).policy) is not None


def test_evaluation_needs_nothing_but_the_model() -> None:
    env = make_vec_env("Pendulum-v1", 2, seed=0)
    model = PPOPlus("MlpPolicy", env, n_steps=128, seed=0).learn(1024)
    before = {key: value.clone() for key, value in model.policy.state_dict().items()}
    evaluate_policy(model, make_vec_env("Pendulum-v1", 1, seed=5), 2)
    for key, value in model.policy.state_dict().items():
        assert th.equal(value, before[key])  # predicting never moves the statistics


def test_sb3s_own_buffer_learns_the_same_as_ours() -> None:
    # Same samples, same statistics, same convention up to rounding: r/σ + γV(s_T) against bootstrapping beside r/σ.
    models = [
        PPOPlus(
            "MlpPolicy",
            make_vec_env("Pendulum-v1", 2, seed=0),
            n_steps=250,
            n_epochs=1,
            batch_size=500,
            seed=0,
            rollout_buffer_class=buffer_class,
        ).learn(500)
        for buffer_class in (None, RolloutBuffer)
    ]
    for a, b in zip(*(model.policy.parameters() for model in models), strict=True):
        assert th.allclose(a, b, atol=1e-5)


def test_pop_art_keeps_the_denormalised_values_when_statistics_move() -> None:
    model = model_on(scripted(), normalize_value_targets=True, normalize_rewards=False)
    observations = th.randn(5, 2, dtype=th.float64)
    model._setup_learn(64)
    model.collect_rollouts(model.env, model._init_callback(None), model.rollout_buffer, 32)
    before = model._values_of(observations, 5)
    model.rollout_buffer.tensor("returns").add_(1000.0)
    model._update_value_normalizer(model.rollout_buffer, model.hyperparameters_at(1.0))
    after = model._values_of(observations, 5)
    assert float(model.value_normalizer.mean) > 400
    assert th.allclose(before, after, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", [th.float64, th.float32, th.float16, th.bfloat16])
def test_statistics_of_any_float_type_are_merged(dtype):
    """1, 3 and 5: mean 3, variance (4 + 0 + 4)/3 = 8/3; the first 1e-4 samples of mean 0 are nearly nothing."""
    moments = RunningMoments((2,)).to(dtype)
    for row in (1.0, 3.0, 5.0):
        moments.merge(th.full((1, 2), row))
    assert moments.mean.dtype is dtype
    th.testing.assert_close(moments.mean.double(), th.full((2,), 3.0, dtype=th.float64), rtol=0.02, atol=0)
    th.testing.assert_close(moments.var.double(), th.full((2,), 8 / 3, dtype=th.float64), rtol=0.05, atol=0)


def test_statistics_are_merged_where_numpy_would_raise():
    with np.errstate(all="raise"):
        moments = RunningMoments(())
        moments.merge(th.tensor([1e-170, 2e-170], dtype=th.float64))
    assert moments.mean.isfinite() and moments.var.isfinite()


@pytest.mark.parametrize("shape", [(4, 2), (4, 1, 3), (4,)])
def test_statistics_of_samples_of_another_shape_are_refused(shape):
    moments = RunningMoments((3,))
    with pytest.raises(ValueError, match=r"`batch` must have shape \[B, 3\]"):
        moments.merge(th.ones(shape))
    assert moments.is_initial


def test_threads_that_predict_at_once_each_normalise_their_own_observations() -> None:
    model = PPOPlus("MlpPolicy", DummyVecEnv([Scripted]), n_steps=64, batch_size=64, device="cpu", seed=0).learn(128)
    observations = np.array([[10.0, 0.1], [11.0, 0.2]], np.float32).repeat(64, 0)
    alone = model.predict(observations, deterministic=True)[0]

    def wrong(_: int) -> int:
        actions = (model.predict(observations, deterministic=True)[0] for _ in range(100))
        return sum(not np.allclose(action, alone) for action in actions)

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(wrong, range(4))) == 0


def test_there_is_nothing_to_normalise_in_a_box_of_booleans() -> None:
    class Flags(gym.Env[Any, Any]):
        observation_space, action_space = spaces.Box(0, 1, (3,), np.bool_), spaces.Discrete(2)

        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            return np.array([True, False, True]), {}

        def step(self, action: Any) -> Any:
            return np.array([False, False, True]), 1.0, False, False, {}

    with pytest.raises(ValueError, match="`normalize_observations`=True, but there is nothing to normalise"):
        PPOPlus("MlpPolicy", Flags(), n_steps=8, batch_size=8, normalize_observations=True)
    assert PPOPlus("MlpPolicy", Flags(), n_steps=8, batch_size=8, n_epochs=1).learn(8).num_timesteps == 8
