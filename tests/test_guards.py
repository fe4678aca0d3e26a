"""NaN and infinity: reported where they come from, and kept out of the parameters."""

import math
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv
from torch.distributions import Distribution

from sb3_pgplus import PPOPlus
from sb3_pgplus.errors import NonFinitePolicyError
from sb3_pgplus.guards import check_finite_step, without_distribution_checks

SMALL = {"n_steps": 8, "batch_size": 16, "n_epochs": 2, "device": "cpu", "seed": 0}
BAD = [math.nan, math.inf, -math.inf]


class Breaks(gym.Env):
    """Environment ``index`` of several; one of them returns a bad number at its step ``at``."""

    def __init__(self, index=0, what=None, at=None, value=math.nan, broken=2, length=100, is_dict=False):
        box = spaces.Box(-np.inf, np.inf, (3,))
        self.is_dict = is_dict
        self.observation_space = spaces.Dict({"a": box, "n": spaces.Discrete(9)}) if is_dict else box
        self.action_space = spaces.Discrete(2)
        self.what, self.at, self.value = (what if index == broken else None), at, value
        self.length = length
        self.total = 0

    def _observation(self, broken):
        obs = self.np_random.normal(size=3).astype(np.float32)
        if broken:
            obs[1] = self.value
        return {"a": obs, "n": 3} if self.is_dict else obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observation(self.what == "reset"), {}

    def step(self, action):
        self.steps += 1
        self.total += 1
        now = self.total == self.at
        truncated = self.steps >= self.length or (now and self.what == "terminal")
        reward = self.value if now and self.what == "reward" else float(action)
        broken = now and self.what in ("observation", "terminal")
        return self._observation(broken), reward, False, truncated, {}


def breaking(n_envs=4, **kwargs):
    return DummyVecEnv([lambda i=i: Breaks(i, **kwargs) for i in range(n_envs)])


# --- the environment ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("at", [1, 5, 8, 11])
def test_a_bad_reward_is_reported_with_environment_and_step(value, at):
    model = PPOPlus("MlpPolicy", breaking(what="reward", at=at, value=value), **SMALL)
    with pytest.raises(ValueError, match=rf"environment 2 returned the reward {value} at its step {at} "):
        model.learn(64)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("is_dict", [False, True])
def test_a_bad_observation_is_reported_with_environment_step_and_index(value, is_dict):
    policy = "MultiInputPolicy" if is_dict else "MlpPolicy"
    model = PPOPlus(policy, breaking(what="observation", at=10, value=value, is_dict=is_dict), **SMALL)
    what = "observation 'a'" if is_dict else "observation"
    with pytest.raises(ValueError, match=rf"environment 2 returned the {what} {value} at index \[1\] at its step 10 "):
        model.learn(64)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("is_dict", [False, True])
def test_a_bad_final_observation_is_reported_with_environment_step_and_index(value, is_dict):
    policy = "MultiInputPolicy" if is_dict else "MlpPolicy"
    model = PPOPlus(policy, breaking(what="terminal", at=6, value=value, is_dict=is_dict), **SMALL)
    what = "observation 'a'" if is_dict else "observation"
    with pytest.raises(ValueError, match=rf"environment 2 .*{what} {value} at index \[1\] at its step 6 "):
        model.learn(64)


def test_a_bad_final_observation_that_nothing_reads_does_no_harm():
    env = breaking(what="terminal", at=6)
    model = PPOPlus("MlpPolicy", env, **SMALL, bootstrap_truncated=False).learn(64)
    assert all(bool(p.isfinite().all()) for p in model.policy.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("extra", [{}, {"normalize_observations": False}])
def test_a_bad_observation_of_the_very_first_reset_is_reported_with_its_environment(value, extra):
    model = PPOPlus("MlpPolicy", breaking(what="reset", value=value), **SMALL, **extra)
    with pytest.raises(ValueError, match=rf"environment 2 returned the observation {value}"):
        model.learn(64)


def test_a_bad_observation_after_a_reset_in_the_middle_is_reported():
    env = breaking(length=3)
    model = PPOPlus("MlpPolicy", env, **SMALL, schedule_timesteps=96).learn(32)
    env.envs[2].what = "reset"
    with pytest.raises(ValueError, match="environment 2 returned the observation nan"):
        model.learn(64, reset_num_timesteps=False)


def test_a_bad_step_is_not_counted_as_learned_from():
    model = PPOPlus("MlpPolicy", breaking(what="reward", at=11), **SMALL)
    with pytest.raises(ValueError, match="reward nan"):
        model.learn(64)
    assert model._n_updates == 2
    assert bool(th.isfinite(model.reward_normalizer.var))
    assert all(bool(p.isfinite().all()) for p in model.policy.parameters())


LARGE = {
    "float32": np.full((3, 2), 3e38, np.float32),
    "float16": np.full((3, 2), 6e4, np.float16),
    "float64": np.full((3, 2), 1.7e308),
    "cancelling": np.array([[1.7e308, 1.7e308, -1.7e308, -1.7e308]]),
    "int64": np.full((3, 2), 2**62, np.int64),
    "bool": np.array([[True, False]]),
    "dict": {"a": np.full((3, 2), 3e38, np.float32), "b": np.zeros((3, 1), np.uint8)},
}


@pytest.mark.parametrize("name", LARGE)
def test_large_finite_observations_pass_without_a_warning(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_finite_step(LARGE[name], np.zeros(3), 1)


def test_large_finite_rewards_pass_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_finite_step(np.zeros((3, 2)), np.full(3, 3e38, np.float32), 1)


def test_infinities_that_cancel_are_found_without_another_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"environment 0 returned the observation inf .*\(2 such value"):
            check_finite_step(np.array([[np.inf, -np.inf], [0.0, 0.0]]), np.zeros(2), 1)


# --- the update ---------------------------------------------------------------------------------------------


class Poisoned(PPOPlus):
    """Its policy loss is multiplied by whatever the plan says for each minibatch (1 when the plan is over)."""

    plan: list
    where = "loss"

    def policy_loss(self, ratio, advantages, hp):
        loss = super().policy_loss(ratio, advantages, hp)
        factor = self.plan.pop(0) if self.plan else 1.0
        if factor == 1.0:
            return loss
        if self.where == "gradient":
            # Zero, with an infinite derivative.
            weight = self.policy.action_net.weight
            return loss + (th.sqrt((weight - weight.detach()).abs().sum())) * factor
        return loss * factor


def poisoned(plan, where="loss", **kwargs):
    model = Poisoned("MlpPolicy", breaking(), **{**SMALL, **kwargs})
    model.plan, model.where = list(plan), where
    return model


def state_of(model):
    parameters = {key: value.clone() for key, value in model.policy.state_dict().items() if "observation" not in key}
    entries = model.policy.optimizer.state_dict()["state"].items()
    optimiser = {f"{i}.{key}": th.as_tensor(value).clone() for i, entry in entries for key, value in entry.items()}
    return {**parameters, **optimiser}


def same(a, b):
    return a.keys() == b.keys() and all(th.equal(a[key], b[key]) for key in a)


class States(BaseCallback):
    def _on_training_start(self):
        self.states = []

    def _on_step(self):
        return True

    def _on_rollout_start(self):
        self.states.append(state_of(self.model))


@pytest.mark.parametrize(("where", "value"), [("loss", bad) for bad in BAD] + [("gradient", 1.5)])
@pytest.mark.parametrize("max_grad_norm", [0.5, None])
@pytest.mark.parametrize("critic_learning_rate", [None, 1e-3])
def test_a_bad_loss_or_gradient_leaves_parameters_and_optimiser_bit_for_bit(
    where, value, max_grad_norm, critic_learning_rate
):
    plan = [1.0] * 4 + [value] * 4  # two minibatches in each of two epochs and rollouts
    options = {"max_grad_norm": max_grad_norm, "critic_learning_rate": critic_learning_rate}
    model = poisoned(plan, where, max_nonfinite_updates=5, **options)
    callback = States()
    model.learn(96, callback)
    before, after_good, after_bad = callback.states
    assert not same(before, after_good)
    assert same(after_good, after_bad)
    # The third rollout is a good one again.
    assert not same(after_bad, state_of(model))
    assert model._nonfinite_updates == 4
    assert model._nonfinite_in_a_row == 0
    assert model.logger.name_to_value["train/nonfinite_updates"] == 4


def test_the_count_is_logged_at_every_update():
    class Counts(BaseCallback):
        def _on_training_start(self):
            self.counts = []

        def _on_step(self):
            return True

        def _on_rollout_start(self):
            self.counts.append(self.logger.name_to_value.get("train/nonfinite_updates"))

    model = poisoned([1.0, math.nan, 1.0, 1.0, math.inf, 1.0, math.nan, 1.0])
    callback = Counts()
    model.learn(96, callback)
    assert callback.counts == [None, 1, 3]


def test_good_updates_between_bad_ones_reset_the_count_in_a_row():
    model = poisoned([math.nan, math.nan, 1.0] * 4, max_nonfinite_updates=3)
    model.learn(96)
    assert model._nonfinite_updates == 8


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_after_the_allowed_number_in_a_row_training_stops_with_a_cause(limit):
    model = poisoned([1.0] + [math.nan] * 9, max_nonfinite_updates=limit)
    with pytest.raises(ValueError, match=rf"{limit} updates? in a row .*Likely cause: the loss overflows on finite"):
        model.learn(96)
    assert model._nonfinite_updates == limit
    assert all(bool(p.isfinite().all()) for p in model.policy.parameters())


def test_a_gradient_that_is_bad_alone_is_named_as_the_cause():
    model = poisoned([1.5] * 9, where="gradient")
    with pytest.raises(ValueError, match="the loss is finite but its gradient is not"):
        model.learn(64)


def test_parameters_that_were_bad_from_the_start_are_named_as_the_cause():
    model = PPOPlus("MlpPolicy", breaking(), **SMALL)
    with th.no_grad():
        model.policy.value_net.bias.fill_(math.nan)
    with pytest.raises(ValueError, match=r"policy's parameters are not finite themselves \(value_net.bias\)"):
        model.learn(64)


class Huge(Breaks):
    def step(self, action):
        obs, _, terminated, truncated, info = super().step(action)
        return obs, 3e38, terminated, truncated, info


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("options", [{"normalize_rewards": False}, {"sb3_exact": True, "normalize_rewards": False}])
@pytest.mark.parametrize("normalize_value_targets", [False, True])
def test_rewards_that_overflow_are_named_as_the_cause_and_spoil_nothing(options, normalize_value_targets):
    env = DummyVecEnv([Huge] * 2)
    options = {**options, "normalize_value_targets": normalize_value_targets}
    model = PPOPlus("MlpPolicy", env, **SMALL, **options)
    before = state_of(model)
    with pytest.raises(ValueError, match="advantages or returns are not finite: rewards .* far too large"):
        model.learn(64)
    assert same(before, state_of(model))
    assert bool(th.isfinite(model.value_normalizer.mean))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_scaled_rewards_learn_from_the_largest_floats():
    model = PPOPlus("MlpPolicy", DummyVecEnv([Huge] * 2), **SMALL).learn(32)
    assert model._nonfinite_updates == 0


def test_bad_critic_epochs_are_guarded_too():
    model = PPOPlus("MlpPolicy", breaking(), **SMALL, n_critic_epochs=4, max_nonfinite_updates=100, vf_coef=1.0)
    model.recompute_advantages = False  # which would replace the returns that are spoilt here

    class Overflow(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            self.model.rollout_buffer.returns = np.full((8, 4), np.inf)

    model.learn(32, Overflow())
    assert model._nonfinite_updates == 8  # 2 minibatches in each of 4 epochs
    assert all(bool(p.isfinite().all()) for p in model.policy.parameters())


def test_the_check_of_distributions_is_as_before_after_an_update_and_after_an_error():
    before = Distribution._validate_args
    poisoned([]).learn(32)
    assert Distribution._validate_args is before
    with pytest.raises(ValueError, match="in a row"):
        poisoned([math.nan] * 9).learn(32)
    assert Distribution._validate_args is before


def test_the_check_of_distributions_is_as_before_after_users_that_overlap_in_any_order():
    # As trainings in threads do: the first to come is not the last to leave.
    before, first, second = Distribution._validate_args, without_distribution_checks(), without_distribution_checks()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert Distribution._validate_args is False
    second.__exit__(None, None, None)
    assert Distribution._validate_args is before is True


def test_the_count_travels_with_the_model(tmp_path):
    model = PPOPlus("MlpPolicy", breaking(), **SMALL)
    model._nonfinite_updates = 7
    model.save(tmp_path / "model")
    assert PPOPlus.load(tmp_path / "model", device="cpu")._nonfinite_updates == 7


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("env", ["Pendulum-v1", "CartPole-v1"])
def test_a_policy_with_nan_parameters_does_not_act(env: str, compile: bool) -> None:
    model = PPOPlus("MlpPolicy", env, **SMALL, compile=compile)
    with th.no_grad():
        model.policy.action_net.bias[0] = math.nan
    with pytest.raises(NonFinitePolicyError, match=r"parameters are not finite \(action_net.bias\): they were set or"):
        model.learn(100)
