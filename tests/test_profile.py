"""The profile of a training: its phases are all there, add up, and the training it measures is the ordinary one."""

import re
from typing import Any

import pytest
import torch as th
from typer.testing import CliRunner

from sb3_pgplus import A2CPlus, PPOPlus, TRPOPlus, profiling
from sb3_pgplus.cli import app
from sb3_pgplus.configs import ConfigError, resolve_settings
from sb3_pgplus.profiling import PHASES, PhaseClock, Profile, profile, profile_model
from sb3_pgplus.training import TrainingError

SHORT = ("n_steps=16", "compile=false")
ALGORITHMS = {"ppoplus": PPOPlus, "a2cplus": A2CPlus, "trpoplus": TRPOPlus}


def settings(algo: str = "ppoplus", env: str = "CartPole-v1", overrides: tuple[str, ...] = SHORT) -> Any:
    sizes = () if algo == "a2cplus" else ("batch_size=16",)
    return resolve_settings(algo=algo, env=env, n_envs=2, overrides=[*overrides, *sizes])


def a_profile(**changes: Any) -> Profile:
    values: dict[str, Any] = {
        "title": "PPOPlus on CartPole-v1",
        "seconds": {name: 0.25 * (i + 1) for i, name in enumerate(PHASES)},
        "n_rollouts": 2,
        "steps_per_rollout": 1000,
        "warm_up_rollouts": 1,
        "warm_up_seconds": 3.0,
        "engine": "update: eager",
    }
    return Profile(**(values | changes))


class Time:
    """A clock that is moved by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(profiling.time, "perf_counter", lambda: self.now)

    def passes(self, seconds: float) -> None:
        self.now += seconds


# --- the clock --------------------------------------------------------------------------------------------------------


def test_a_phase_inside_another_interrupts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time(monkeypatch)
    clock = PhaseClock()
    inner = clock.timed("buffer", lambda: time.passes(4))

    def outer() -> None:
        time.passes(1)
        inner()
        time.passes(2)

    clock.timed("update", outer)()
    time.passes(8)
    seconds = clock.read()
    assert {name: s for name, s in seconds.items() if s} == {"update": 3, "buffer": 4, "other": 8}


def test_a_phase_ends_with_an_exception_too(monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time(monkeypatch)
    clock = PhaseClock()

    def failing() -> None:
        time.passes(1)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        clock.timed("environment", failing)()
    time.passes(2)
    assert (clock.read()["environment"], clock.read()["other"]) == (1, 2)


def test_a_restart_inside_a_phase_goes_on_counting_it(monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time(monkeypatch)
    clock = PhaseClock()

    def restarting() -> None:
        time.passes(1)
        clock.restart()
        time.passes(2)

    clock.timed("update", restarting)()
    assert clock.read()["update"] == 2


def test_what_is_timed_gives_its_result_takes_its_arguments_and_keeps_its_attributes() -> None:
    def function(a: int, b: int) -> tuple[int, int]:
        return a, b

    function.values = "kept"  # type: ignore[attr-defined]
    timed: Any = PhaseClock().timed("buffer", function)
    assert timed(1, b=2) == (1, 2)
    assert timed.values == "kept" and not hasattr(timed, "other")


# --- the table --------------------------------------------------------------------------------------------------------


def test_rows_are_per_rollout_and_per_step_and_end_with_the_total() -> None:
    *phases, total = a_profile().rows()
    assert [row[0] for row in phases] == list(PHASES)
    # 7 seconds in all, over 2 rollouts of 1000 steps; the first phase took a quarter of a second.
    assert phases[0] == ("environment", 125.0, 0.25 / 7, 125.0)
    assert total == ("total", 3500.0, 1.0, 3500.0)


def test_the_summary_names_speed_warm_up_and_engine() -> None:
    lines = a_profile().summary().splitlines()
    assert lines == [
        "286 env steps/s over 2 rollouts",
        "warm-up of 1 rollout: 3.0 s, compiling included",
        "update: eager",
    ]


# --- trainings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_phase_of_every_algorithm_takes_time(algo: str) -> None:
    measured = profile(settings(algo), n_rollouts=2, warm_up=1)
    assert list(measured.seconds) == list(PHASES)
    assert all(seconds > 0 for seconds in measured.seconds.values())
    assert measured.title.startswith(f"{ALGORITHMS[algo].__name__} on CartPole-v1, 2 × 16 steps")
    assert (measured.n_rollouts, measured.steps_per_rollout) == (2, 32)


def test_phases_add_up_to_the_time_from_the_first_rollout_to_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time(monkeypatch)
    model = PPOPlus("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, n_epochs=1, device="cpu")
    env: Any = model.env
    step, train = env.step, model.train

    def slow_step(actions: Any) -> Any:
        time.passes(1)
        return step(actions)

    def slow_train() -> None:
        time.passes(100)
        train()

    env.step, model.train = slow_step, slow_train  # type: ignore[method-assign]
    measured = profile_model(model, n_timesteps=1000, n_rollouts=3, warm_up=2)
    # The only clock is the one moved here: 3 rollouts of 8 steps and an update.
    assert measured.seconds == dict.fromkeys(PHASES, 0.0) | {"environment": 24.0, "update": 300.0}
    assert measured.total == 324.0
    assert measured.warm_up_seconds == 2 * 108.0


def test_a_profiled_training_learns_what_an_ordinary_one_learns() -> None:
    def model(**arguments: Any) -> PPOPlus:
        return PPOPlus("MlpPolicy", "CartPole-v1", n_steps=16, batch_size=16, seed=0, device="cpu", **arguments)

    profiled = model()
    profile_model(profiled, n_timesteps=1000, n_rollouts=2, warm_up=1)
    ordinary = model(schedule_timesteps=1000).learn(3 * 16)
    pairs = zip(profiled.policy.parameters(), ordinary.policy.parameters(), strict=True)
    assert all(th.equal(a, b) for a, b in pairs)


def test_short_rollouts_are_measured_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_STEPS", 64)
    model = PPOPlus("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, n_epochs=1, device="cpu")
    assert profile_model(model, n_timesteps=1, n_rollouts=None, warm_up=1).n_rollouts == 8


def test_the_length_of_the_whole_training_decides_what_is_compiled() -> None:
    asked = settings(overrides=("n_steps=16", "n_timesteps=3200"))
    # 100 rollouts of 2 x 16 steps
    assert "policy step: eager, 1600 calls" in profile(asked, n_rollouts=1, warm_up=1).engine


# --- the command ------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["profile", *arguments])


def test_the_command_prints_every_phase_and_the_engine() -> None:
    sets = [f"--set={text}" for text in ("n_steps=16", "batch_size=16")]
    result = run("--env", "CartPole-v1", "--n-envs", "2", "--compile", "false", "--n-rollouts", "1", *sets)
    assert result.exit_code == 0, result.output
    for name in (*PHASES, "total"):
        assert re.search(rf"{name}[ │|]+[\d.,]+[ │|]+[\d.]+%[ │|]+[\d.,]+", result.output), name
    assert "update: eager, compile=False" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "which environment?"),
        (("--env", "CartPoleee-v1"), "unknown environment"),
        (("--env", "CartPole-v1", "--algo", "ppo"), "did you mean `ppoplus`?"),
        (("--env", "CartPole-v1", "--compile", "maybe"), "`compile` must be one of"),
        (("--env", "CartPole-v1", "--n-rollouts", "0"), "n-rollouts"),
        (("--env", "CartPole-v1", "--set", "n_epochs=0"), "n_epochs"),
    ],
)
def test_bad_input_is_one_message(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_failing_training_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Any) -> None:
        raise ZeroDivisionError("in the update")

    monkeypatch.setattr(PPOPlus, "train", failing)
    with pytest.raises(TrainingError, match="ZeroDivisionError: in the update"):
        profile(settings(), n_rollouts=1)


def test_settings_that_the_constructor_refuses_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match="clip_range"):
        profile(settings(overrides=(*SHORT, "clip_range=-1")), n_rollouts=1)
