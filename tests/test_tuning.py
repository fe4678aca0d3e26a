"""Studies on real storages with tiny trainings: what workers share, what survives, what is ranked and left behind."""

import csv
import glob
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

optuna = pytest.importorskip("optuna")
pytest.importorskip("scipy")
pytest.importorskip("plotly")

from browser import complaints, foreign_requests, opened  # noqa: E402
from optuna.trial import TrialState  # noqa: E402

from sb3_pgplus import PPOPlus, make_vec_env  # noqa: E402
from sb3_pgplus.cli import app  # noqa: E402
from sb3_pgplus.configs import ConfigError, algorithm_class, algorithm_names, resolve_settings  # noqa: E402
from sb3_pgplus.statistics import iqm, iqm_interval  # noqa: E402
from sb3_pgplus.tuning import OptunaCallback, TuningPlan, tune  # noqa: E402
from sb3_pgplus.tuning import objective as objectives  # noqa: E402
from sb3_pgplus.tuning.plan import FIRST_TEST_SEED  # noqa: E402
from sb3_pgplus.tuning.report import page, write_results  # noqa: E402
from sb3_pgplus.tuning.spaces import (  # noqa: E402
    SPACES,
    default_settings,
    known_params,
    read_space,
    suggest,
    trial_settings,
)
from sb3_pgplus.tuning.storage import open_storage, quiet_optuna  # noqa: E402
from sb3_pgplus.tuning.study import TuningError, count, make_sampler  # noqa: E402
from sb3_pgplus.tuning.trainings import Measured, SeedRun  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
SMALL = ("n_steps=64", "batch_size=64", "n_epochs=1")
SMALL_SPACE = {"learning_rate": {"low": 1e-5, "high": 1e-2, "log": True}, "gae_lambda": {"low": 0.8, "high": 1.0}}


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


@pytest.fixture
def small_space(tmp_path: Path) -> Path:
    path = tmp_path / "space.yml"
    path.write_text(yaml.safe_dump(SMALL_SPACE), encoding="utf-8")
    return path


def tiny(space: Path, **options: Any) -> TuningPlan:
    """Trainings of two rollouts of 64 steps."""
    env = options.pop("env", "CartPole-v1")
    settings = resolve_settings(env=env, n_timesteps=128, n_envs=1, overrides=SMALL)
    sizes: dict[str, Any] = {"n_trials": 4, "seeds": (0,), "top": 0, "n_evaluations": 2, "eval_episodes": 1, "jobs": 2}
    return TuningPlan(settings, read_space(space, "ppoplus"), **{**sizes, "enqueue": False, **options})


def sqlite(folder: Path) -> str:
    return f"sqlite:///{folder / 'study.db'}"


def journal(folder: Path) -> str:
    return str(folder / "journal.log")


Score = Callable[[dict[str, Any], int], float]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[[Score], list[int]]:
    """Replaces the trainings by a function of settings and seed; returns the seeds that were trained."""

    def install(score: Score) -> list[int]:
        trained: list[int] = []

        def train_seeds(settings: Any, seeds: Any, jobs: int, protocol: Any, **hooks: Any) -> Iterator[SeedRun]:
            together = seeds[:jobs]
            for index in range(1, protocol.n_evaluations + 1):
                for seed in together:
                    value = score(settings.hyperparameters | {"index": index}, seed)
                    hooks["on_evaluation"](Measured(seed, index, value, 100.0))
            for seed in seeds:
                trained.append(seed)
                value = score(settings.hyperparameters, seed)
                yield SeedRun(seed, [value] * protocol.n_evaluations, 1.0 + value % 1, 100.0)

        monkeypatch.setattr(objectives, "train_seeds", train_seeds)
        return trained

    return install


# --- spaces -----------------------------------------------------------------------------------------------------------


def sampled(algo: str, number: int) -> Iterator[dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=number))
    for _ in range(number):
        trial = study.ask()
        yield suggest(trial, SPACES[algo])
        study.tell(trial, 0.0)


@pytest.mark.parametrize("algo", algorithm_names())
def test_every_point_of_a_space_is_allowed_and_no_minibatch_is_larger_than_the_rollout(algo: str) -> None:
    hparams = algorithm_class(algo).hparams_class
    for n_envs in (1, 3, 64):
        base = resolve_settings(algo=algo, env="CartPole-v1", n_envs=n_envs)
        for params in sampled(algo, 100):
            settings = trial_settings(base, SPACES[algo], params)
            known = {name: value for name, value in settings.hyperparameters.items() if name in hparams.names()}
            resolved = hparams.resolve(hparams.defaults() | known)
            assert getattr(resolved, "batch_size", 1) <= resolved.n_steps * settings.n_envs
            assert settings.hyperparameters.keys() - known.keys() <= {"policy_kwargs"}


@pytest.mark.parametrize("n_steps", [2, 5, 32, 1000])
def test_a_minibatch_of_the_users_own_space_is_cut_to_the_rollout(n_steps: int, tmp_path: Path) -> None:
    path = tmp_path / "space.yml"
    path.write_text(f"batch_size: [16, 4096]\nn_steps: [{n_steps}]\n", encoding="utf-8")
    base = resolve_settings(env="CartPole-v1", n_envs=2)
    for batch_size in (16, 4096):
        params = {"batch_size": batch_size, "n_steps": n_steps}
        settings = trial_settings(base, read_space(path, "ppoplus"), params)
        assert settings.hyperparameters["batch_size"] == min(batch_size, 2 * n_steps)


@pytest.mark.parametrize("algo", algorithm_names())
def test_the_defaults_have_their_place_in_the_space(algo: str) -> None:
    base = default_settings(resolve_settings(algo=algo, env="Hopper-v5"))
    params = known_params(SPACES[algo], base)
    # Only what is switched off has no place: where a policy has a value of its own, that is the place.
    assert SPACES[algo].keys() - params.keys() <= {"target_kl", "max_step_size", "clip_range_vf", "max_grad_norm"}
    assert params["activation_fn"] == "tanh"
    assert params["log_std_init"] == (algorithm_class(algo).hparams_class.defaults()["log_std_init"] or 0.0)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial(params)
    settings = trial_settings(base, SPACES[algo], suggest(study.ask(), SPACES[algo]))
    hparams = algorithm_class(algo).hparams_class
    names = ("learning_rate", "n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "vf_coef", "use_rms_prop")
    ours = {name: value for name, value in settings.hyperparameters.items() if name in hparams.names()}
    for progress in (1.0, 0.5):
        found, default = (hparams.resolve(hparams.defaults() | known, progress) for known in (ours, {}))
        for name in {*names} & {*hparams.names()}:
            assert getattr(found, name) == pytest.approx(getattr(default, name)), name
    assert settings.n_envs == base.n_envs


def test_a_row_without_a_learning_rate_keeps_that_of_the_configuration_in_either_shape(tmp_path: Path) -> None:
    path = tmp_path / "space.yml"
    path.write_text("learning_rate_shape: [constant, linear]\npolicy_kwargs.net_arch: [[8], [16, 16]]\n")
    space = read_space(path, "ppoplus")
    base = resolve_settings(env="CartPole-v1", overrides=["learning_rate=lin_0.002"])
    for shape, rate in (("constant", 0.002), ("linear", "lin_0.002")):
        settings = trial_settings(base, space, {"learning_rate_shape": shape, "policy_kwargs.net_arch": "[16, 16]"})
        assert settings.hyperparameters["learning_rate"] == rate
        assert settings.hyperparameters["policy_kwargs"] == {"net_arch": [16, 16]}
    assert "policy_kwargs" not in base.hyperparameters


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_epoch: [1, 2]", r"n_epoch: no setting of ppoplus, did you mean `n_epochs`\?"),
        ("n_epochs: 3", r"n_epochs: expected a list of choices, or \{low: …, high: …, log: true\}, got 3"),
        ("n_epochs: {low: 9, high: 1}", r"n_epochs: .*low"),
        ("n_epochs: {low: a, high: b}", r"n_epochs: low and high must be numbers, got 'a' and 'b'"),
        ("gamma: default", r"gamma: the built-in space has no such row; it has learning_rate,"),
        ("{}", r"is empty"),
    ],
)
def test_a_space_that_cannot_be_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "space.yml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_space(path, "ppoplus")


def test_a_space_of_another_algorithm_is_refused_before_the_first_trial() -> None:
    settings = resolve_settings(env="CartPole-v1", n_timesteps=128)
    with pytest.raises(ConfigError, match=r"space, kl_reduction: no setting of ppoplus"):
        TuningPlan(settings, SPACES["trpoplus"])
    assert all(TuningPlan(replace(settings, algo=algo), space).space is space for algo, space in SPACES.items())


# --- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": (0, 7), "test_seeds": (7, 8)}, r"test seeds must not be tuning seeds, but these are both: \[7\]"),
        ({"objective": "best"}, r"objective must be one of final, auc, got 'best'"),
        ({"goals": ("return", "time")}, r"cannot prune with several goals: add --prune none"),
        ({"goals": ("time",), "prune": "none"}, r"the first goal must be return, got time"),
        ({"sampler": "gp"}, r"the gp sampler learns from complete trials only: add --prune none"),
        ({"n_trials": 0}, r"n_trials must be at least 1, got 0"),
        ({"max_seconds": -1.0}, r"max_seconds must be above 0, or None for no limit, got -1"),
        ({"max_memory": 0}, r"max_memory must be above 0, or None for no limit, got 0"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(options: dict[str, Any], message: str, small_space: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(small_space, **options)


def test_a_study_is_joined_only_by_workers_with_the_same_plan(small_space: Path, tmp_path: Path, pretend: Any) -> None:
    pretend(lambda settings, seed: 1.0)
    tune(tiny(small_space, n_trials=2), sqlite(tmp_path), "study")
    with pytest.raises(ConfigError, match=r"there is a study study already: add --resume"):
        tune(tiny(small_space), sqlite(tmp_path), "study", resume=False)
    with pytest.raises(ConfigError, match=r"is another one: seeds is \[0\] there and \[0, 1\] here"):
        tune(tiny(small_space, seeds=(0, 1)), sqlite(tmp_path), "study")
    assert count(tune(tiny(small_space, n_trials=5), sqlite(tmp_path), "study").study, *FINISHED) == 5


# --- one worker -------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_trials_and_another_seed_others(small_space: Path, tmp_path: Path) -> None:
    def trials(name: str, seed: int, n_trials: int) -> list[tuple[dict[str, Any], Any]]:
        plan = tiny(small_space, seed=seed, n_trials=n_trials)
        return [(trial.params, trial.values) for trial in tune(plan, sqlite(tmp_path), name).study.trials]

    first = trials("first", 0, 3)
    assert len({json.dumps(params) for params, _ in first}) == 3
    assert trials("second", 0, 3) == first
    assert trials("third", 1, 1)[0] != first[0]


def test_a_continued_study_draws_no_trial_twice(small_space: Path, tmp_path: Path, pretend: Any) -> None:
    pretend(lambda settings, seed: settings["gae_lambda"])
    for n_trials in (3, 6, 30):
        study = tune(tiny(small_space, n_trials=n_trials), journal(tmp_path), "study").study
    assert len({json.dumps(trial.params) for trial in study.trials}) == len(study.trials) == 30


def test_the_defaults_and_the_configuration_come_first_with_their_exact_settings(
    small_space: Path, tmp_path: Path, pretend: Any
) -> None:
    pretend(lambda settings, seed: 1.0)
    plan = tiny(small_space, enqueue=True, n_trials=3)
    first, second, third = tune(plan, journal(tmp_path), "study").study.trials
    assert [trial.user_attrs.get("origin") for trial in (first, second, third)] == ["default", "config", None]
    assert first.user_attrs["settings"] == {"n_envs": 1, "hyperparameters": {}}
    assert second.user_attrs["settings"] == {"n_envs": 1, "hyperparameters": plan.settings.hyperparameters}
    assert (first.params["learning_rate"], second.params["learning_rate"]) == (3e-4, 1e-3)
    none = tune(replace(plan, enqueue=False), journal(tmp_path), "another").study.trials
    assert all("origin" not in trial.user_attrs for trial in none)


def test_the_score_is_the_interquartile_mean_over_seeds_of_the_last_evaluations_or_of_all() -> None:
    run = SeedRun(0, [0.0, 10.0, 20.0, 30.0, 40.0], 1.0, 1.0)
    assert run.score("final") == 30.0  # (20 + 30 + 40) / 3
    assert run.score("auc") == 20.0
    assert iqm([0.0, 1.0, 2.0, 3.0, 1000.0]) == 2.0  # a quarter of 5 is 1 at each end


def test_a_trial_that_is_worse_with_every_seed_is_given_up_before_the_last_seed(
    small_space: Path, tmp_path: Path, pretend: Any
) -> None:
    # One-sided Wilcoxon: n seeds that are all worse have p = 2^-n, which is below 0.1 from 4 on.
    trained = pretend(lambda settings, seed: seed - 1e5 * settings.get("learning_rate", 0) % 97)
    plan = tiny(small_space, seeds=tuple(range(8)), n_trials=12)
    study = tune(plan, journal(tmp_path), "study").study
    pruned = [trial for trial in study.trials if trial.state == TrialState.PRUNED]
    assert pruned and len(trained) < 12 * 8
    for trial in pruned:
        assert 4 <= len(trial.user_attrs["runs"]) < 8
        assert trial.user_attrs["pruned"] == f"after {len(trial.user_attrs['runs'])} seeds"
    assert len(study.best_trial.user_attrs["runs"]) == 8
    everything = tune(replace(plan, prune="none"), journal(tmp_path), "none").study
    assert all(trial.state == TrialState.COMPLETE for trial in everything.trials)


def test_hyperband_gives_up_within_a_training_but_not_in_its_first_third(
    small_space: Path, tmp_path: Path, pretend: Any
) -> None:
    # Bad trials fall from the start: patience does not protect them.
    pretend(lambda settings, seed: (0.9 - settings["gae_lambda"]) * settings.get("index", 1))
    plan = tiny(small_space, prune="time", n_evaluations=9, n_trials=25, seeds=(0, 1))
    trials = tune(plan, journal(tmp_path), "study").study.trials
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
    assert pruned and all(3 <= trial.last_step < 9 for trial in pruned)


@pytest.mark.parametrize("with_defaults", [False, True])
def test_what_costs_too_much_is_infeasible_and_never_ranked(
    small_space: Path, tmp_path: Path, with_defaults: bool
) -> None:
    options = {"enqueue": with_defaults, "top": 1, "test_seeds": (FIRST_TEST_SEED,)}
    slow = tiny(small_space, max_seconds=1e-3, n_trials=2, **options)
    result = tune(slow, sqlite(tmp_path), "time")
    assert [trial.state for trial in result.study.trials] == [TrialState.PRUNED] * 2
    assert all(trial.constraints["time"] > 0 for trial in result.study.trials)
    assert result.ranking == [] and write_results(result, tmp_path) == [
        "no best.yml: no trial was completed within the limits"
    ]
    large = tune(tiny(small_space, max_memory=1.0, n_trials=1), sqlite(tmp_path), "memory").study.trials[0]
    assert large.state == TrialState.PRUNED and large.constraints["memory"] > 0
    within = tune(tiny(small_space, max_memory=1e6, max_seconds=1e6, n_trials=1), sqlite(tmp_path), "within").study
    assert within.best_trial.constraints.keys() == {"time", "memory"}


def test_defaults_beyond_the_limits_are_ranked_as_a_yardstick_but_not_recommended(
    small_space: Path, tmp_path: Path, pretend: Any
) -> None:
    # A pretended training of score x takes 1 + x % 1 seconds: the defaults have 5.9 in 1.9 s, the others 5.1 in 1.1 s.
    pretend(lambda settings, seed: 5.1 if "gae_lambda" in settings else 5.9)
    plan = tiny(small_space, n_trials=3, top=1, test_seeds=(FIRST_TEST_SEED,), enqueue=True, max_seconds=1.5)
    result = tune(plan, sqlite(tmp_path), "study")
    assert [candidate.test_score for candidate in result.ranking] == [5.9, 5.1]
    assert result.ranking[0].origin == "default"
    write_results(result, tmp_path)
    assert f"# Trial {result.ranking[1].number} of the study" in (tmp_path / "best.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize("sampler", ["gp", "random"])
def test_the_other_samplers_search_too(sampler: str, small_space: Path, tmp_path: Path, pretend: Any) -> None:
    pretend(lambda settings, seed: settings["gae_lambda"])
    plan = tiny(small_space, sampler=sampler, prune="none", n_trials=13)
    trials = tune(plan, journal(tmp_path), "study").study.trials
    assert len({json.dumps(trial.params) for trial in trials}) == 13
    later = max(trial.value for trial in trials[10:])
    assert sampler != "gp" or later >= max(trial.value for trial in trials[:10])  # it has found the slope


def test_several_goals_give_a_pareto_front(small_space: Path, tmp_path: Path, pretend: Any) -> None:
    pretend(lambda settings, seed: 100 * settings.get("gae_lambda", 0.95))
    plan = tiny(small_space, goals=("return", "time"), prune="none", n_trials=8, top=2, test_seeds=(FIRST_TEST_SEED,))
    result = tune(plan, journal(tmp_path), "study")
    assert [direction.name for direction in result.study.directions] == ["MAXIMIZE", "MINIMIZE"]
    front = {trial.number for trial in result.study.best_trials}
    assert {candidate.number for candidate in result.ranking} <= front | {None}  # None: the defaults, never tried
    assert [candidate.origin for candidate in result.ranking].count("default") == 1
    assert "Pareto front" in page(result) and "Not drawn" not in page(result).partition("Importances")[0]


# --- failures ---------------------------------------------------------------------------------------------------------

BAD_ENVIRONMENTS = '''
import os, signal
import gymnasium as gym
import numpy as np

class Bad(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(2)
    marks = {marks!r}

    def __init__(self, what):
        self.what, self.steps = what, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {{}}

    def step(self, action):
        self.steps += 1
        if self.steps == 40:
            getattr(self, self.what)()
        return np.zeros(2, np.float32), self.reward, self.steps % 20 == 0, False, {{}}

    reward = 1.0

    def always(self):
        raise ValueError("the simulator broke")

    def once(self):
        """Only in the first training of all."""
        try:
            open(os.path.join(self.marks, "broke"), "x").close()
        except FileExistsError:
            return
        raise ValueError("the simulator broke")

    def memory(self):
        raise MemoryError("no more")

    def nan(self):
        self.reward = float("nan")

    def killed(self):
        os.kill(os.getpid(), signal.SIGKILL)

for what in ("always", "once", "memory", "nan", "killed"):
    gym.register("Bad-" + what + "-v0", entry_point=Bad, kwargs={{"what": what}})
'''


@pytest.fixture
def bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "bad_environments.py").write_text(BAD_ENVIRONMENTS.format(marks=str(tmp_path)), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "bad_environments:Bad-"
    sys.modules.pop("bad_environments", None)


def test_a_failing_environment_fails_the_trial_with_its_traceback_and_the_study_goes_on(
    bad: str, small_space: Path, tmp_path: Path
) -> None:
    study = tune(tiny(small_space, env=f"{bad}once-v0"), sqlite(tmp_path), "study").study
    failed, *others = study.trials
    assert failed.state == TrialState.FAIL
    assert "Traceback" in failed.user_attrs["error"] and "ValueError: the simulator broke" in failed.user_attrs["error"]
    assert [trial.state for trial in others] == [TrialState.COMPLETE] * 4


@pytest.mark.parametrize(("what", "error"), [("always", "the simulator broke"), ("killed", "SIGKILL")])
def test_an_environment_that_always_fails_ends_the_study_with_the_reason(
    what: str, error: str, bad: str, small_space: Path, tmp_path: Path
) -> None:
    with pytest.raises(TuningError, match=rf"5 trials in a row failed, the last one with: .*{error}"):
        tune(tiny(small_space, env=f"{bad}{what}-v0"), sqlite(tmp_path), "study")
    study = optuna.load_study(study_name="study", storage=sqlite(tmp_path))
    assert [trial.state for trial in study.trials] == [TrialState.FAIL] * 5


@pytest.mark.parametrize(("what", "error"), [("memory", "MemoryError: no more"), ("nan", "NonFiniteEnvironmentError")])
def test_running_out_of_memory_or_numbers_is_a_result_that_the_sampler_learns_from(
    what: str, error: str, bad: str, small_space: Path, tmp_path: Path
) -> None:
    study = tune(tiny(small_space, env=f"{bad}{what}-v0", n_trials=2), sqlite(tmp_path), "study").study
    assert [trial.state for trial in study.trials] == [TrialState.PRUNED] * 2
    assert all(error in trial.user_attrs["error"] for trial in study.trials)


def test_impossible_settings_are_refused_before_anything_is_stored(small_space: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown environment"):
        tune(tiny(small_space, env="CartPol-v1"), sqlite(tmp_path), "study")
    assert not (tmp_path / "study.db").exists()


# --- several workers --------------------------------------------------------------------------------------------------


def free_port() -> int:
    with closing(socket.socket()) as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PostgreSQL server of our own; it refuses to run as root, so then it runs as `nobody`."""
    pytest.importorskip("psycopg")
    # Debian keeps the server's programs out of the path.
    path = os.pathsep.join([os.environ["PATH"], *sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)])
    initdb, server = shutil.which("initdb", path=path), shutil.which("postgres", path=path)
    if not (initdb and server):
        pytest.skip("there is no PostgreSQL server on this machine (initdb and postgres)")
    as_nobody = ["runuser", "-u", "nobody", "--"] if os.geteuid() == 0 else []
    if as_nobody and not shutil.which("runuser"):
        pytest.skip("PostgreSQL does not run as root, and there is no runuser")
    folder = Path(f"/tmp/sb3_pgplus_postgres_{os.getpid()}_{random.randrange(10**9)}")
    folder.mkdir(mode=0o700)
    if as_nobody:
        shutil.chown(folder, "nobody")
    data, port = folder / "data", free_port()
    made = subprocess.run(
        [*as_nobody, initdb, "-D", str(data), "-U", "tuner", "--auth=trust", "--no-sync"],
        cwd="/",
        capture_output=True,
        text=True,
    )
    if made.returncode:
        shutil.rmtree(folder)
        pytest.skip(f"initdb fails here: {made.stderr}")
    options = ["-D", str(data), "-p", str(port), "-k", str(folder), "-h", "127.0.0.1", "-F"]
    process = subprocess.Popen([*as_nobody, server, *options], cwd="/", stderr=subprocess.DEVNULL)
    try:
        url = f"postgresql+psycopg://tuner@127.0.0.1:{port}/postgres"
        wait_until(lambda: can_connect(port), 30)
        yield url
    finally:
        # Not through runuser, which does not pass every signal on. SIGQUIT: at once, there is nothing to keep.
        os.kill(int((data / "postmaster.pid").read_text().split()[0]), signal.SIGQUIT)
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def can_connect(port: int) -> bool:
    import psycopg

    try:
        psycopg.connect(host="127.0.0.1", port=port, user="tuner", dbname="postgres", connect_timeout=1).close()
    except psycopg.OperationalError:
        return False
    return True


def wait_until(condition: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.05)
    raise TimeoutError(f"not within {seconds} s")


def tune_options(space: Path, *options: str) -> list[str]:
    """Trials of two seeds with five rollouts each: short, but long enough to be caught in the middle."""
    sizes = ("--env", "CartPole-v1", "--n-envs", "1", "--evaluations", "2", "--eval-episodes", "1", "--no-enqueue")
    settings = [part for text in SMALL for part in ("--set", text)]
    lengths = ("--n-timesteps", "320", "--seeds", "2", "--jobs", "1", "--top", "0")
    return [*sizes, *settings, *lengths, "--space", str(space), *options]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    pipe = subprocess.PIPE
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def running_trial(storage: str, name: str) -> Any:
    """A trial in the middle of its trainings."""
    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except Exception:  # not created yet, tables included
        return None
    running = [trial for trial in study.get_trials(states=(TrialState.RUNNING,)) if "settings" in trial.user_attrs]
    return running[0] if running else None


def pid_of(trial: Any) -> int:
    return int(trial.user_attrs["worker"].rsplit(":", 2)[1])


@pytest.mark.parametrize(("kind", "n_workers"), [("sqlite", 2), ("postgres", 4)])
def test_workers_share_a_study_exactly_and_a_killed_ones_trial_is_tried_again(
    kind: str, n_workers: int, small_space: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    storage = sqlite(tmp_path) if kind == "sqlite" else request.getfixturevalue("postgres")
    options = ("--storage", storage, "--study", "shared", "--n-trials", "8", "--heartbeat", "2")
    program = (str(Path(__file__).with_name("tuning_workers.py")), str(n_workers))
    workers = start(tmp_path, *program, *tune_options(small_space, *options, "--out", str(tmp_path / "out")))
    try:
        killed = wait_until(lambda: running_trial(storage, "shared"), 120)
        os.kill(pid_of(killed), signal.SIGKILL)
        output, _ = workers.communicate(timeout=180)
    finally:
        workers.kill()
    codes = json.loads(output.splitlines()[-1])
    assert codes.pop(str(pid_of(killed))) == -signal.SIGKILL
    assert [*codes.values()] == [0] * (n_workers - 1), output
    trials = optuna.load_study(study_name="shared", storage=storage).trials
    assert sum(trial.state in FINISHED for trial in trials) == 8
    assert not [trial for trial in trials if trial.state in (TrialState.RUNNING, TrialState.WAITING)]
    # Read again: a look at a running trial reads parameters before attributes, and may miss the first.
    killed = trials[killed.number]
    assert killed.state == TrialState.FAIL
    assert killed.params
    retries = [trial for trial in trials if trial.system_attrs.get("failed_trial") == killed.number]
    assert [(trial.params, trial.state in FINISHED) for trial in retries] == [(killed.params, True)]
    finished = [json.dumps(trial.params) for trial in trials if trial.state in FINISHED]
    assert len(set(finished)) == 8
    assert len({trial.user_attrs["worker"] for trial in trials if trial.state in FINISHED}) >= n_workers - 1


def test_a_folder_with_another_study_is_refused_before_anything_is_replaced(small_space: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["tune", *tune_options(small_space, "--n-trials", "1", "--out", str(out))]
    assert CliRunner().invoke(app, command).exit_code == 0
    results = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".db"}
    assert {"best.yml", "trials.csv"} <= results.keys()
    storage = sqlite(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    longer = ["--n-timesteps", "640"]
    for other in (longer, [*longer, "--resume"], ["--study", "b", "--storage", storage]):
        refused = CliRunner().invoke(app, [*command, *other])
        assert refused.exit_code == 2 and "has the results of another study" in refused.output, refused.output
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".db"} == results


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_trial_goes_back_into_the_queue_and_resume_counts_finished_ones(
    how: signal.Signals, small_space: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["tune", *tune_options(small_space, "--n-trials", "3", "--out", str(out))]
    storage, name, seen = sqlite(out), "ppoplus-CartPole-v1-320", []

    def interrupt() -> None:
        seen.append(wait_until(lambda: running_trial(storage, name), 60))
        os.kill(os.getpid(), how)

    thread = threading.Thread(target=interrupt)
    thread.start()
    stopped = CliRunner().invoke(app, command)
    thread.join()
    [interrupted] = seen
    assert stopped.exit_code == 130 and "with --resume continues" in stopped.output, stopped.output
    assert (out / "report.html").is_file() and (out / "trials.csv").is_file()
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2 and "add --resume to continue it" in refused.output
    resumed = CliRunner().invoke(app, [*command, "--resume"])
    assert resumed.exit_code == 0, resumed.output
    trials = optuna.load_study(study_name="ppoplus-CartPole-v1-320", storage=storage).trials
    assert sum(trial.state in FINISHED for trial in trials) == 3
    assert trials[interrupted.number].state == TrialState.FAIL
    [retry] = [trial for trial in trials if trial.system_attrs.get("failed_trial") == interrupted.number]
    # Looked at while it was running, it may have had its settings before its parameters: storages read them in turn.
    params = trials[interrupted.number].params
    assert params and retry.params == params and retry.state in FINISHED


def leave_a_dead_trial(study: Any) -> Any:
    """As a worker that was killed leaves it, on a machine where its process number is free again."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    trial = study.ask()
    suggest(trial, {"learning_rate": SPACES["ppoplus"]["learning_rate"]})
    trial.set_user_attr("worker", f"{os.uname().nodename}:{gone.pid}:1")
    return trial


def test_a_worker_that_died_before_its_first_heartbeat_blocks_nobody(
    small_space: Path, tmp_path: Path, pretend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(lambda settings, seed: settings["gae_lambda"])
    storage = sqlite(tmp_path)
    study = tune(tiny(small_space, n_trials=1), storage, "study").study
    dead = study.ask()
    monkeypatch.setattr("sb3_pgplus.tuning.storage.SIGN_OF_LIFE_SECONDS", 0.01)
    trials = tune(tiny(small_space, n_trials=3), storage, "study").study.trials
    assert trials[dead.number].state == TrialState.FAIL
    assert sum(trial.state in FINISHED for trial in trials) == 3


@pytest.mark.parametrize("kind", ["sqlite", "journal", "grpc"])
def test_dead_trials_without_a_heartbeat_are_found_and_requeued_at_the_start(
    kind: str, small_space: Path, tmp_path: Path, pretend: Any
) -> None:
    # In a database as well: Optuna writes the first heartbeat from a thread, and a worker may be dead by then.
    pretend(lambda settings, seed: settings["gae_lambda"])
    storage = sqlite(tmp_path) if kind == "sqlite" else journal(tmp_path)
    if kind == "grpc":
        port, served = free_port(), open_storage(storage)
        with quiet_optuna():
            server = threading.Thread(
                target=optuna.storages.run_grpc_proxy_server,
                args=(served,),
                kwargs={"host": "127.0.0.1", "port": port},
                daemon=True,
            )
            server.start()
            time.sleep(1.0)
        storage = f"grpc://127.0.0.1:{port}"
    plan = tiny(small_space)
    study = tune(replace(plan, n_trials=2), storage, "study").study
    dead = leave_a_dead_trial(study)
    trials = tune(replace(plan, n_trials=4), storage, "study").study.trials
    assert trials[dead.number].state == TrialState.FAIL
    [retry] = [trial for trial in trials if trial.system_attrs.get("failed_trial") == dead.number]
    assert retry.params["learning_rate"] == dead.params["learning_rate"]
    assert sum(trial.state in FINISHED for trial in trials) == 4


def test_a_trial_of_a_living_worker_is_left_alone(small_space: Path, tmp_path: Path, pretend: Any) -> None:
    pretend(lambda settings, seed: settings["gae_lambda"])
    storage = journal(tmp_path)
    plan = tiny(small_space)
    study = tune(replace(plan, n_trials=2), storage, "study").study
    living = study.ask()
    living.set_user_attr("worker", objectives.worker_name())
    # It is one of the four, so this worker runs one trial and then waits for it.
    threading.Timer(2.0, lambda: study.tell(living, 0.5)).start()
    trials = tune(replace(plan, n_trials=4), storage, "study").study.trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 4 and trials[living.number].value == 0.5


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("study.txt", r"storage must be a database URL, grpc://host:port or a \.log file, got 'study\.txt'"),
        ("sqlite:////no/such/folder/x.db", r"cannot open the storage sqlite:"),
        (
            "postgresql+psycopg://me:secret@127.0.0.1:1/x",
            r"cannot open the storage postgresql\+psycopg://…@127\.0\.0\.1:1",
        ),
    ],
)
def test_a_storage_that_cannot_be_opened_is_named_without_its_password(storage: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        open_storage(storage)
    assert "secret" not in str(caught.value)


# --- the end: ranking, files ------------------------------------------------------------------------------------------


def test_the_ranking_is_on_seeds_that_no_trial_of_the_search_has_seen(
    small_space: Path, tmp_path: Path, pretend: Any
) -> None:
    trained = pretend(lambda settings, seed: settings.get("gae_lambda", 0.95) + seed % 7)
    plan = tiny(
        small_space,
        enqueue=True,
        n_trials=8,
        top=3,
        seeds=(0, 1),
        test_seeds=tuple(range(10_000, 10_006)),
        prune="none",
    )
    result = tune(plan, journal(tmp_path), "study")
    searched = {run["seed"] for trial in result.study.trials for run in trial.user_attrs["runs"]}
    test = optuna.load_study(study_name="study-test-8", storage=open_storage(journal(tmp_path)))
    tested = {run["seed"] for trial in test.trials for run in trial.user_attrs["runs"]}
    assert searched == {0, 1} and tested == set(range(10_000, 10_006)) == set(test.user_attrs["test_seeds"])
    assert len(trained) == 8 * 2 + len(test.trials) * 6
    best = sorted(result.study.trials, key=lambda trial: -trial.value)[:3]
    assert {candidate.number for candidate in result.ranking} == {0} | {trial.number for trial in best}
    scores = [candidate.test_score for candidate in result.ranking]
    assert scores == sorted(scores, reverse=True)
    for candidate in result.ranking:
        low, high = candidate.interval
        assert low <= candidate.test_score <= high


def test_the_bootstrap_interval_covers_the_middle_and_shrinks_with_more_seeds() -> None:
    few = [float(x) for x in range(10)]
    low, high = iqm_interval(few)
    assert 0 < low < 4.5 < high < 9
    more_low, more_high = iqm_interval(few * 16)
    assert more_high - more_low < (high - low) / 2
    assert iqm_interval([3.0]) == (3.0, 3.0) and iqm_interval([2.0, 2.0]) == (2.0, 2.0)


def test_the_command_leaves_settings_that_train_a_table_and_a_page_that_needs_no_network(
    small_space: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    sizes = ("--n-trials", "3", "--seeds", "1", "--test-seeds", "2", "--top", "1", "--evaluations", "2")
    options = (
        "--env",
        "CartPole-v1",
        "--algo",
        "a2cplus",
        "--n-timesteps",
        "128",
        "--eval-episodes",
        "1",
        "--set",
        "n_steps=4",
    )
    result = CliRunner().invoke(app, ["tune", *options, *sizes, "--space", str(small_space), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert len(re.findall(r"^trial \d+: complete", result.output, re.MULTILINE)) == 3
    assert "On test seeds, which the search never saw" in result.output and "best.yml" in result.output
    best = yaml.safe_load((out / "best.yml").read_text(encoding="utf-8"))
    assert best.items() >= {"algo": "a2cplus", "env": "CartPole-v1", "n_timesteps": 128}.items()
    with (out / "trials.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["state"], row["origin"]) for row in rows] == [
        ("COMPLETE", "default"),
        ("COMPLETE", "config"),
        ("COMPLETE", "search"),
    ]
    text = (out / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", text) and "Plotly.newPlot" in text
    for title in ("History", "Importances", "Slices", "Parallel coordinates", "Timeline", "On test seeds"):
        assert title in text
    trained = ["train", "--config", str(out / "best.yml"), "--eval-episodes", "0", "--no-progress"]
    result = CliRunner().invoke(app, [*trained, "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    config = yaml.safe_load((tmp_path / "run" / "config.yml").read_text(encoding="utf-8"))
    assert config.items() >= {name: value for name, value in best.items() if name != "made_with"}.items()


def test_the_page_shows_its_plots_in_a_browser_without_a_network(
    small_space: Path, tmp_path: Path, pretend: Any
) -> None:
    pretend(lambda settings, seed: settings.get("gae_lambda", 0.95) + seed % 7)
    result = tune(tiny(small_space, n_trials=12, top=2), journal(tmp_path), "study")
    write_results(result, tmp_path)
    with opened(tmp_path / "report.html") as driver:
        plots = driver.find_elements("css selector", ".plotly-graph-div")
        drawn = driver.find_elements("css selector", ".plotly-graph-div .main-svg")
        assert len(plots) == 5  # history, importances, slices, parallel coordinates, timeline
        assert {svg.find_element("xpath", "ancestor::*[contains(@class, 'plotly-graph-div')]").id for svg in drawn} == {
            plot.id for plot in plots
        }
        assert complaints(driver) == [] and foreign_requests(driver) == []
        assert driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def test_a_missing_package_is_named_with_the_extra_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("sb3_pgplus.tuning")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "optuna", None)
    result = CliRunner().invoke(app, ["tune", "--env", "CartPole-v1"])
    assert result.exit_code == 2
    assert "Error: tuning needs optuna: pip install 'sb3_pgplus[tune]'" in result.output


def test_without_plotly_only_the_page_is_missing(
    small_space: Path, tmp_path: Path, pretend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(lambda settings, seed: 1.0)
    result = tune(tiny(small_space, n_trials=1), journal(tmp_path), "study")
    monkeypatch.setitem(sys.modules, "plotly.io", None)
    assert write_results(result, tmp_path) == [
        "no report.html: the report needs plotly: pip install 'sb3_pgplus[tune]'"
    ]
    assert (tmp_path / "best.yml").is_file() and not (tmp_path / "report.html").exists()


def test_the_dashboard_serves_the_study(small_space: Path, tmp_path: Path, pretend: Any) -> None:
    pytest.importorskip("optuna_dashboard")
    pretend(lambda settings, seed: 1.0)
    tune(tiny(small_space, n_trials=1), sqlite(tmp_path), "served")
    port = free_port()
    options = ("--env", "CartPole-v1", "--storage", sqlite(tmp_path), "--dashboard", "--port", str(port))
    server = start(tmp_path, "-m", "sb3_pgplus.cli", "tune", *options)

    def served() -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=5) as answer:
                return str(answer.read().decode())
        except OSError:
            return ""

    try:
        assert "served" in wait_until(served, 60)
    finally:
        server.kill()
        server.wait()


def test_tracked_trials_are_runs_of_one_group(
    small_space: Path, tmp_path: Path, pretend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    from sb3_pgplus.tuning.tracking import track

    pretend(lambda settings, seed: 1.0)
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    seen = []
    study = tune(tiny(small_space, n_trials=2), journal(tmp_path), "tracked", on_trial=lambda *both: seen.append(both))
    for where, trial in seen:
        track(where, trial, "a-project")
    written = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(written) == count(study.study, *FINISHED) == 2
    # W&B's own process writes, and on a busy machine it does so after the run has finished here.
    words = (b"tracked", b"trial-", b"return/iqm")
    assert wait_until(lambda: all(word in written[0].read_bytes() for word in words), 60)


def test_the_callback_reports_evaluations_and_ends_a_training_that_the_pruner_gives_up() -> None:
    def run(lowest: float) -> tuple[OptunaCallback, Any]:
        trial = optuna.create_study(direction="maximize", pruner=optuna.pruners.ThresholdPruner(lower=lowest)).ask()
        callback = OptunaCallback(trial, make_vec_env("CartPole-v1"), eval_freq=128, n_eval_episodes=1)
        PPOPlus("MlpPolicy", "CartPole-v1", n_envs=2, n_steps=64, n_epochs=1, device="cpu").learn(
            512, callback=callback
        )
        return callback, trial.study.trials[0]

    callback, trial = run(lowest=0.0)
    assert not callback.pruned and [*trial.intermediate_values] == [128, 256, 384, 512]
    assert trial.intermediate_values[512] == callback.last_mean_reward
    callback, trial = run(lowest=1e6)
    assert callback.pruned and [*trial.intermediate_values] == [128] and callback.num_timesteps == 128


def test_workers_with_the_same_seed_draw_different_trials() -> None:
    study = optuna.create_study(sampler=make_sampler("tpe", 0))
    trials = [study.ask() for _ in range(8)]  # all running at once, as in eight workers
    drawn = {json.dumps(suggest(trial, SPACES["ppoplus"])) for trial in trials}
    assert len(drawn) == 8
