"""Schedules: numbers, strings and callables, for every coefficient that takes one."""

import copy
import math
import pickle
import warnings

import cloudpickle
import pytest
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule

from sb3_pgplus import PPOPlus
from sb3_pgplus.hparams import PPOHparams
from sb3_pgplus.schedules import CosineSchedule, as_schedule, describe_schedule, is_constant

SMALL = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "device": "cpu", "seed": 0}
SCHEDULED = ["learning_rate", "critic_learning_rate", "ent_coef", "vf_coef", "max_grad_norm", "clip_range"]
SCHEDULED += ["clip_range_vf", "target_kl", "kl_coef"]


def half_square(progress):
    return 0.5 * progress**2


class Recorder(PPOPlus):
    """Keeps the hyperparameters and the optimiser's rates of every update."""

    def before_update(self, hp):
        rates = [group["lr"] for group in self.policy.optimizer.param_groups]
        self.seen = [*getattr(self, "seen", []), (hp, rates)]


def recorded(steps=32, callback=None, **kwargs):
    return Recorder("MlpPolicy", "CartPole-v1", **{**SMALL, **kwargs}).learn(steps, callback)


# --- the forms ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),  # at progress 1, 0.75, 0.5, 0
    [
        (0.3, [0.3, 0.3, 0.3, 0.3]),
        (3, [3, 3, 3, 3]),
        ("3e-4", [3e-4] * 4),
        (" 0.5 ", [0.5] * 4),
        ("lin_0.4", [0.4, 0.3, 0.2, 0.0]),
        ("lin_0.4_0.2", [0.4, 0.35, 0.3, 0.2]),
        ("lin_1e-3_3e-3", [1e-3, 1.5e-3, 2e-3, 3e-3]),
        ("cos_0.4", [0.4, 0.2 * (1 + math.sqrt(0.5)), 0.2, 0.0]),
        ("cos_1_0.5", [1, 0.5 + 0.25 * (1 + math.sqrt(0.5)), 0.75, 0.5]),
        pytest.param(half_square, [0.5, 0.28125, 0.125, 0.0], id="a function"),
        (LinearSchedule(0.4, 0.0, 0.5), [0.4, 0.2, 0.0, 0.0]),
        (FloatSchedule(FloatSchedule(0.7)), [0.7] * 4),
    ],
    ids=str,
)
def test_a_schedule_has_its_values_at_every_progress(given, expected):
    schedule = as_schedule("x", given)
    assert [schedule(p) for p in (1.0, 0.75, 0.5, 0.0)] == pytest.approx(expected, abs=1e-12)
    for clone in (pickle.loads(pickle.dumps(schedule)), cloudpickle.loads(cloudpickle.dumps(schedule))):
        assert clone(0.3) == schedule(0.3)
    assert copy.deepcopy(schedule)(0.3) == schedule(0.3)
    assert type(schedule(0.3)) is float


@pytest.mark.parametrize("value", [True, None, [0.1], {"a": 1}])
def test_what_is_neither_number_string_nor_callable_is_a_type_error(value):
    with pytest.raises(TypeError, match="`rate` must be a number, a string such as 'lin_3e-4'"):
        as_schedule("rate", value)


@pytest.mark.parametrize(
    ("given", "constant"),
    [
        (0.1, True),
        ("lin_1_1", True),
        ("cos_2_2", True),
        ("lin_1", False),
        ("cos_1_2", False),
        pytest.param(half_square, False, id="a function"),
    ],
)
def test_constant_schedules_are_told_from_changing_ones(given, constant):
    assert is_constant(as_schedule("x", given)) == constant


@pytest.mark.parametrize(
    "given",
    ["lin_0.0003", "lin_0.0003_1e-05", "cos_0.2", "cos_0.2_0.1", 0.25, "lin_0.123456789", "lin_0.1_0.0123456789"],
)
def test_a_schedule_described_for_a_file_is_the_same_schedule_when_read_again(given):
    schedule = as_schedule("x", given)
    again = as_schedule("x", describe_schedule(schedule))
    assert [again(p) for p in (1.0, 0.3, 0.0)] == [schedule(p) for p in (1.0, 0.3, 0.0)]


def test_describe_gives_text_or_numbers_for_every_hyperparameter():
    described = PPOPlus("MlpPolicy", "CartPole-v1", **SMALL, clip_range_vf="cos_0.3_0.1").hyperparameters()
    assert described["clip_range"] == "lin_0.2"
    assert described["clip_range_vf"] == "cos_0.3_0.1"
    assert described["learning_rate"] == "lin_3e-4"
    assert all(value is None or isinstance(value, (bool, int, float, str)) for value in described.values())
    assert describe_schedule(CosineSchedule(1.0, 0.5)) == "cos_1_0.5"


# --- taking effect ------------------------------------------------------------------------------------------


def test_the_list_of_scheduled_names_is_complete():
    assert set(PPOHparams.scheduled_names()) == set(SCHEDULED)


@pytest.mark.parametrize("name", SCHEDULED)
@pytest.mark.parametrize(
    ("given", "factors"),
    [
        ("lin_0.2_0.1", [0.2, 0.175, 0.15, 0.125]),
        ("cos_0.2_0.1", [0.15 + 0.05 * math.cos(math.pi * x) for x in (0, 0.25, 0.5, 0.75)]),
        (lambda progress: 0.1 + 0.1 * progress, [0.2, 0.175, 0.15, 0.125]),
        ("0.2", [0.2] * 4),
    ],
    ids=["lin", "cos", "callable", "number"],
)
def test_every_coefficient_follows_its_schedule(name, given, factors):
    model = recorded(**{name: given})
    assert [getattr(hp, name) for hp, _ in model.seen] == pytest.approx(factors, rel=1e-12)


@pytest.mark.parametrize("name", ["learning_rate", "critic_learning_rate"])
def test_rates_reach_the_optimiser(name):
    model = recorded(**{"critic_learning_rate": 0.5, "learning_rate": 0.25, name: "lin_0.2_0.1"})
    group = ["learning_rate", "critic_learning_rate"].index(name)
    assert [rates[group] for _, rates in model.seen] == pytest.approx([0.2, 0.175, 0.15, 0.125], rel=1e-12)
    other = {0.5, 0.25} - {0.25 if group == 0 else 0.5}
    assert {rates[1 - group] for _, rates in model.seen} == other


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_learning_rate_after_k_iterations_is_exact(k):
    class Stop(BaseCallback):
        def _on_step(self):
            return self.num_timesteps <= 8 * k

    model = recorded(callback=Stop(), learning_rate="lin_3e-4", clip_range="cos_0.2")
    assert len(model.seen) == k
    progress = 1 - (k - 1) / 4  # where rollout k began
    hp, rates = model.seen[-1]
    assert rates == [pytest.approx(3e-4 * progress, rel=1e-12, abs=1e-18)]
    assert hp.clip_range == pytest.approx(0.1 * (1 + math.cos(math.pi * (1 - progress))), abs=1e-15)
    assert model.logger.name_to_value["train/learning_rate"] == pytest.approx(3e-4 * progress, abs=1e-18)
    assert model.logger.name_to_value["train/clip_range"] == pytest.approx(hp.clip_range)


def test_logged_coefficients_are_those_in_effect():
    coefficients = {"ent_coef": "lin_0.2_0.1", "kl_coef": "lin_0.4", "clip_range_vf": "lin_0.6"}
    model = recorded(24, **coefficients, critic_learning_rate="lin_0.9_0.3", schedule_timesteps=48)
    logged = model.logger.name_to_value
    # Rollout 3 begins at step 16 of 48: progress 2/3.
    assert logged["train/ent_coef"] == pytest.approx(0.1 + 0.1 * 2 / 3)
    assert logged["train/kl_coef"] == pytest.approx(0.4 * 2 / 3)
    assert logged["train/clip_range_vf"] == pytest.approx(0.6 * 2 / 3)
    assert logged["train/critic_learning_rate"] == pytest.approx(0.3 + 0.6 * 2 / 3)


def test_an_overshooting_last_rollout_does_not_push_a_schedule_past_its_end():
    # With SB3's timing (the end of each rollout) 3 rollouts of 8 steps overshoot a total of 20.
    model = recorded(20, learning_rate="lin_0.2_0.1", clip_range="lin_0.2", sb3_exact=True)
    assert [rates[0] for _, rates in model.seen] == pytest.approx([0.16, 0.12, 0.1])
    assert model.seen[-1][0].clip_range == 0


def test_the_first_update_has_the_start_value_and_the_last_one_still_learns():
    model = recorded(20, learning_rate="lin_0.2_0.1", clip_range="lin_0.2")
    assert [rates[0] for _, rates in model.seen] == pytest.approx([0.2, 0.16, 0.12])
    assert model.seen[-1][0].clip_range == pytest.approx(0.04)


def test_the_horizon_may_be_longer_than_learning():
    model = recorded(32, learning_rate="lin_0.2", schedule_timesteps=64)
    assert [rates[0] for _, rates in model.seen] == pytest.approx([0.2, 0.175, 0.15, 0.125])


def test_the_horizon_may_be_shorter_than_learning():
    model = recorded(32, learning_rate="lin_0.2_0.1", schedule_timesteps=16)
    assert [rates[0] for _, rates in model.seen] == pytest.approx([0.2, 0.15, 0.1, 0.1])


# --- several calls of learn ---------------------------------------------------------------------------------


def loop(model, calls=4, steps=8):
    for _ in range(calls):
        model.learn(steps, reset_num_timesteps=False)
    return model


def warnings_of(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [w for w in caught if "schedule_timesteps" in str(w.message)]


def make(**kwargs):
    return Recorder("MlpPolicy", "CartPole-v1", **{**SMALL, **kwargs})


def test_a_loop_of_short_learns_is_warned_about_once_naming_what_changes_and_the_users_line():
    model = make(learning_rate="lin_3e-4", clip_range=0.2, ent_coef="cos_0.1")
    caught = warnings_of(lambda: loop(model))
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "`learning_rate`" in text
    assert "`ent_coef`" in text
    assert "clip_range" not in text
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "quiet",
    [
        {"learning_rate": 1e-3, "clip_range": 0.2},
        {"learning_rate": "lin_1e-3", "schedule_timesteps": 32},
        {"learning_rate": lambda _: 1e-3, "clip_range": None},
    ],
)
def test_a_loop_of_short_learns_is_fine_when_nothing_jumps(quiet):
    assert warnings_of(lambda: loop(make(**quiet))) == []


def test_single_learns_and_restarts_are_not_warned_about():
    assert warnings_of(lambda: make().learn(8, reset_num_timesteps=False)) == []
    model = make()
    assert warnings_of(lambda: [model.learn(8) for _ in range(3)]) == []


def test_a_loop_of_short_learns_with_a_horizon_equals_one_long_learn():
    long = make(learning_rate="lin_0.2").learn(32)
    short = loop(make(learning_rate="lin_0.2", schedule_timesteps=32))
    assert [rates for _, rates in short.seen] == [rates for _, rates in long.seen]


def test_a_loaded_model_that_goes_on_is_warned_too(tmp_path):
    make().learn(16).save(tmp_path / "model")
    model = Recorder.load(tmp_path / "model", env=make_vec_env("CartPole-v1"), device="cpu")
    assert len(warnings_of(lambda: loop(model))) == 1


# --- assigned while training --------------------------------------------------------------------------------


class Assign(BaseCallback):
    """Assigns one attribute at the start of the second rollout."""

    def __init__(self, name, value):
        super().__init__()
        self.name, self.value = name, value

    def _on_step(self):
        return True

    def _on_rollout_start(self):
        if self.num_timesteps == 8:
            setattr(self.model, self.name, self.value)


@pytest.mark.parametrize("name", [*SCHEDULED, "n_epochs", "batch_size", "gamma", "gae_lambda"])
def test_a_number_assigned_in_a_callback_takes_effect_in_the_next_update(name):
    value = {"n_epochs": 3, "batch_size": 4}.get(name, 0.0625)
    start = {"critic_learning_rate": 0.5} if name == "critic_learning_rate" else {}
    model = recorded(24, Assign(name, value), **start)
    before, *after = [getattr(hp, name) for hp, _ in model.seen]
    assert before != value
    assert after == [value, value]


@pytest.mark.parametrize("name", ["learning_rate", "lr_schedule"])
@pytest.mark.parametrize("value", [0.0625, "0.0625", lambda progress: 0.0625])
def test_a_learning_rate_assigned_in_a_callback_reaches_the_optimiser(name, value):
    model = recorded(24, Assign(name, value))
    rates = [rates[0] for _, rates in model.seen]
    assert rates[0] == pytest.approx(3e-4)
    assert rates[1:] == [0.0625, 0.0625]


def test_a_critic_learning_rate_assigned_later_is_used_or_refused_by_name():
    try:
        model = recorded(24, Assign("critic_learning_rate", 0.0625))
    except ValueError as error:
        assert "critic_learning_rate" in str(error)
    else:
        assert model.policy.optimizer.param_groups[1]["lr"] == 0.0625


def test_an_assigned_clip_range_of_none_takes_the_clip_away():
    model = recorded(24, Assign("clip_range", None))
    assert [hp.clip_range for hp, _ in model.seen][1:] == [None, None]


# --- adapted by the KL --------------------------------------------------------------------------------------


def test_the_rate_adapted_to_a_kl_multiplies_the_schedule_within_its_bounds():
    up = recorded(160, learning_rate=1e-9, desired_kl=1.0, n_epochs=2)
    assert up._kl_lr_scale == 10
    assert up.policy.optimizer.param_groups[0]["lr"] == pytest.approx(1e-8)
    down = recorded(160, learning_rate=1e-3, desired_kl=1e-12, n_epochs=2, batch_size=2)
    assert down._kl_lr_scale == pytest.approx(0.01)
    assert down.policy.optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)


def test_the_rate_of_one_full_minibatch_can_be_adapted_downwards():
    model = recorded(160, learning_rate=1e-2, desired_kl=1e-12, n_epochs=1)
    assert model._kl_lr_scale < 1


def test_the_penalty_adapted_to_a_kl_doubles_and_halves():
    up = recorded(32, learning_rate=0.1, kl_coef=0.5, adaptive_kl_target=1e-9)
    down = recorded(32, learning_rate=1e-9, kl_coef=0.5, adaptive_kl_target=1.0)
    assert (up._kl_coef_scale, down._kl_coef_scale) == (16, 1 / 16)
