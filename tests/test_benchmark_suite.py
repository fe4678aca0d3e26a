"""The results suite: what is planned, that a run is made once, what its file holds, statistics, tables from files."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from importlib.util import find_spec
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from scipy.stats import mannwhitneyu
from stable_baselines3.common.vec_env import VecNormalize
from typer.testing import CliRunner

from sb3_pgplus import make_vec_env, statistics
from sb3_pgplus.benchmarking import command, figures, page, runner, stock, store, suites, tables, trainings
from sb3_pgplus.benchmarking.results import Results, published
from sb3_pgplus.benchmarking.runner import Outcome
from sb3_pgplus.benchmarking.suites import MUJOCO_TASKS, Run, parse_seeds, plan
from sb3_pgplus.benchmarking.trainings import Ended, Protocol
from sb3_pgplus.cli import app
from sb3_pgplus.configs import ConfigError, algorithm_class, resolve_settings
from sb3_pgplus.vec_env.common import usable_cpus

ROOT = Path(__file__).resolve().parents[1]
PROTOCOL = Protocol(n_evaluations=12, n_episodes=2)
STEPS = 1024


def tiny_plan(**changes: Any) -> list[Run]:
    options: dict[str, Any] = {"algos": ["ppoplus", "a2cplus"], "envs": ["CartPole-v1"], "seeds": [0, 1]}
    return plan("classic", n_timesteps=STEPS, **options | changes)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two algorithms, two seeds, and what stands beside them: never changed by a test."""
    folder = tmp_path_factory.mktemp("suite")
    assert runner.make(tiny_plan(), folder, jobs=2, protocol=PROTOCOL) == Outcome(4, 0, 0)
    return folder


def copied(made: Path, target: Path) -> Path:
    for file in made.rglob("*.json.gz"):
        copy = target / file.relative_to(made)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    return target


def a_run(
    returns: list[float], variant: str = "ppoplus", env: str = "HalfCheetah-v5", seed: int = 0
) -> store.StoredRun:
    n = len(returns)
    return store.StoredRun(
        {
            "variant": variant,
            "env": env,
            "seed": seed,
            "settings": {"n_timesteps": 100 * n},
            "evaluations": {
                "steps": [100 * (i + 1) for i in range(n)],
                "seconds": [60.0 * (i + 1) for i in range(n)],
                "returns": [[value - 1, value + 1] for value in returns],
            },
            "training": {"episodes": [1] * n, "returns": returns},
            "seconds": 60.0 * n,
            "evaluation_seconds": 1.0,
            "building_seconds": 1.0,
            "machine": "a processor",
            "jobs": 2,
            "source": "a file",
            "protocol": {},
        }
    )


# --- statistics -------------------------------------------------------------------------------------------------------


def test_the_iqm_leaves_out_a_quarter_at_each_end_of_all_runs_pooled() -> None:
    assert statistics.iqm([0.0, 1.0, 2.0, 9.0]) == 1.5
    assert statistics.iqm([[0.0, 9.0], [2.0, 1.0]]) == 1.5
    assert statistics.iqm([1.0, 2.0, 6.0]) == 3.0  # a quarter of three is none: the mean


def test_the_interval_of_two_seeds_goes_from_one_to_the_other() -> None:
    # Draws from {0, 1}: mean 0 with probability 1/4, 1/2 with 1/2, 1 with 1/4, so 2.5 % and 97.5 % are 0 and 1.
    assert statistics.iqm_interval([0.0, 1.0]) == (0.0, 1.0)
    assert statistics.iqm_interval([3.0]) == (3.0, 3.0)


def test_the_bootstrap_draws_seeds_within_each_task() -> None:
    # Every draw within the tasks is {0, 0, 1, 1}, whose IQM is 1/2; drawing from all four would give 0 to 1.
    assert statistics.aggregate([[0.0, 0.0], [1.0, 1.0]]) == (0.5, (0.5, 0.5))
    assert statistics.aggregate([[0.0, 0.0], [1.0]]) == (0.0 + 1 / 3, None)


def test_the_interval_of_many_seeds_is_about_that_of_the_mean_of_the_middle_half() -> None:
    values = np.random.default_rng(1).normal(size=400)
    low, high = statistics.iqm_interval(values)
    assert low < statistics.iqm(values) < high
    # The 25 % trimmed mean of a normal sample has standard error 1.09/√n (asymptotic variance 1.19).
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(1.19 / 400), rel=0.2)


def test_the_probability_of_improvement_is_the_mann_whitney_statistic_and_averages_tasks() -> None:
    x, y = [1.0, 2.0, 5.0], [0.0, 2.0]
    # 1>0, 2>0, 5>0, 5>2 win, 2=2 is half: 4.5 of 6.
    value, interval = statistics.probability_of_improvement([x], [y])
    assert value == 4.5 / 6 == mannwhitneyu(x, y).statistic / 6
    assert interval is not None and interval[0] <= value <= interval[1] == 1.0
    both, _ = statistics.probability_of_improvement([x, [0.0, 0.0]], [y, [1.0, 1.0]])
    assert both == pytest.approx((4.5 / 6 + 0) / 2)
    back, _ = statistics.probability_of_improvement([y], [x])
    assert value + back == pytest.approx(1.0)
    assert statistics.probability_of_improvement([x], [x])[0] == 0.5
    with pytest.raises(ValueError, match="1 tasks beside 2"):
        statistics.probability_of_improvement([x], [x, y])


def test_a_performance_profile_counts_runs_above_the_threshold_task_by_task() -> None:
    fractions, interval = statistics.performance_profile([[0.0, 1.0], [2.0, 3.0, 4.0]], [-1.0, 0.5, 2.0, 9.0])
    np.testing.assert_allclose(fractions, [1.0, (1 / 2 + 1) / 2, (0 + 2 / 3) / 2, 0.0])
    assert interval is not None
    assert (interval[0] <= fractions).all() and (fractions <= interval[1]).all()


def test_a_curve_is_the_iqm_of_each_column() -> None:
    returns = np.array([[0.0, 10.0], [1.0, 11.0], [2.0, 12.0], [9.0, 90.0]])
    value, interval = statistics.curve(returns)
    np.testing.assert_array_equal(value, [1.5, 11.5])
    assert interval is not None and interval[0][0] == statistics.iqm_interval(returns[:, 0])[0]
    assert statistics.curve(returns[:1])[1] is None


def test_scores_without_a_task_or_a_seed_are_refused() -> None:
    for scores in ([], [[]], [[[1.0]]]):
        with pytest.raises(ValueError, match="non-empty array"):
            statistics.aggregate(scores)


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_the_mujoco_suite_is_complete_stage_by_stage() -> None:
    runs = plan("mujoco")
    first, second, third = runs[:81], runs[81:120], runs[120:174]
    assert {(r.variant.name, r.env, r.seed) for r in first} == {
        (name, env, seed) for name in ("ppoplus", "trpoplus", "a2cplus") for env in MUJOCO_TASKS for seed in range(3)
    }
    assert [r.seed for r in first] == sorted(r.seed for r in first)
    assert Counter((r.variant.name, r.seed) for r in second) == {
        (name, s): 4 for name in ("sb3-ppo-same", "sb3-ppo-zoo", "sb3-contrib-trpo-zoo") for s in range(3)
    } | {("sb3-ppo-own", s): 1 for s in range(3)}
    assert {r.seed for r in third} == {3, 4} and {r.variant.name for r in third} == {"ppoplus", "trpoplus", "a2cplus"}
    assert {(r.variant.name, r.env) for r in runs[174:]} >= {
        (f"{name}-per-task", "Swimmer-v5") for name in ("ppoplus", "trpoplus", "a2cplus")
    }
    assert {r.settings.n_timesteps for r in runs} == {1_000_000}
    assert len({str(r) for r in runs}) == len(runs)


def test_the_time_suite_trains_ours_and_theirs_by_turns() -> None:
    assert [(r.group, r.variant.name, r.env, r.seed) for r in plan("time")] == [
        ("time", name, "HalfCheetah-v5", seed) for seed in range(3) for name in ("ppoplus", "sb3-ppo-own")
    ]
    assert all(r.is_timed for r in plan("time")) and not any(r.is_timed for r in plan("mujoco"))
    assert {r.env for r in plan("time", envs=["Hopper-v5"])} == {"Hopper-v5"}


def test_further_seeds_come_after_all_stages() -> None:
    usual, more = plan("mujoco"), plan("mujoco", seeds=range(10))
    assert more[: len(usual)] == usual
    assert {r.seed for r in more[len(usual) :] if r.variant.name == "ppoplus"} == {5, 6, 7, 8, 9}
    assert {r.seed for r in more[len(usual) :] if r.variant.name == "sb3-ppo-zoo"} == {3, 4, 5, 6, 7, 8, 9}
    assert {r.seed for r in plan("mujoco", seeds=[7])} == {7}


def test_a_suite_has_one_set_of_hyperparameters_and_the_stage_per_task_only_what_differs() -> None:
    runs = plan("mujoco")
    for name in ("ppoplus", "trpoplus", "a2cplus"):
        shared = suites.shared_settings(name)
        [only] = {
            repr((r.settings.n_envs, sorted(r.settings.hyperparameters.items())))
            for r in runs
            if r.variant.name == name
        }
        assert only == repr((shared.n_envs, sorted(shared.hyperparameters.items())))
        for run in (r for r in runs if r.variant.name == f"{name}-per-task"):
            own = resolve_settings(algo=name, env=run.env)
            assert run.settings.hyperparameters == own.hyperparameters
            assert (own.n_envs, own.hyperparameters) != (shared.n_envs, shared.hyperparameters)


def test_sb3_gets_the_settings_of_ppoplus_that_it_has() -> None:
    ours = suites.shared_settings("ppoplus")
    same = stock.same_settings(ours)
    values = algorithm_class("ppoplus").hparams_class.defaults() | ours.hyperparameters
    for name in stock.SHARED_ARGUMENTS:
        assert same.hyperparameters[name] == values[name]
    assert same.n_envs == ours.n_envs
    env = make_vec_env("Pendulum-v1", 2, seed=0)
    model: Any = stock.build(replace(same, hyperparameters=same.hyperparameters | {"n_steps": 32}), env)
    assert model.policy.log_std[0].item() == values["log_std_init"]
    assert (model.clip_range(0.5), model.lr_schedule(0.5)) == (0.1, 1.5e-4)  # lin_0.2 and lin_3e-4, half way
    normalizer = model.get_env()
    assert isinstance(normalizer, VecNormalize)
    assert (normalizer.clip_obs, normalizer.gamma) == (values["clip_observations"], values["gamma"])
    env.close()


def test_no_clip_of_ours_is_an_infinite_one_of_vec_normalize() -> None:
    env = make_vec_env("Pendulum-v1")
    wrapped: Any = stock.normalized(env, {"norm_obs": True, "clip_obs": None}, 0.9)
    assert (wrapped.clip_obs, wrapped.gamma) == (np.inf, 0.9)
    assert stock.normalized(env, False, 0.9) is stock.normalized(env, None, 0.9) is env
    env.close()


def test_the_zoos_settings_are_those_of_its_own_file() -> None:
    if find_spec("rl_zoo3") is None:  # importing it changes Gymnasium's TimeLimit for all tests
        pytest.skip("rl_zoo3 is not installed")
    cheetah = stock.zoo_settings("sb3-ppo", "HalfCheetah-v5")
    assert cheetah.n_envs == 1 and cheetah.source.endswith("block HalfCheetah-v4")
    assert {"gamma": 0.98, "learning_rate": 2.0633e-05, "n_epochs": 20, "clip_range": 0.1}.items() <= (
        cheetah.hyperparameters.items()
    )
    assert cheetah.hyperparameters["policy_kwargs"]["net_arch"] == {"pi": [256, 256], "vf": [256, 256]}
    assert stock.zoo_settings("sb3-contrib-trpo", "HalfCheetah-v5").hyperparameters["target_kl"] == 0.04
    with pytest.raises(ConfigError, match="RL Zoo has no settings of ppo for Reacher-v5"):
        stock.zoo_settings("sb3-ppo", "Reacher-v5")


def test_the_ablation_has_every_file_and_the_suites_rollouts() -> None:
    runs = plan("ablation")
    files = {path.stem for path in (ROOT / "zoo_configs" / "ablation").glob("*.yml")}
    assert {r.variant.name for r in runs} == files
    assert {r.env for r in runs} == {"Hopper-v5", "Walker2d-v5"}
    assert {r.settings.n_timesteps for r in runs} == {500_000}
    n_envs = suites.shared_settings("ppoplus").n_envs
    sizes = {(r.settings.n_envs, r.settings.hyperparameters["n_steps"]) for r in runs}
    assert sizes == {(n_envs, 2048 // n_envs)}
    assert [r.variant.name for r in runs[:6]] == ["ppoplus", *suites.PAPER]
    # All tricks are on where one at a time is taken away, whatever the suite's set switches off.
    assert runs[0].settings.hyperparameters == {"n_steps": 2048 // n_envs, "gae_lambda": 0.95}
    assert {r.env for r in plan("ablation", envs=["Humanoid-v5"])} == {"Humanoid-v5"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "mujco"}, "unknown suite 'mujco', did you mean 'mujoco'"),
        ({"name": "mujoco", "algos": ["ppplus"]}, "no algorithm 'ppplus', did you mean 'ppoplus'"),
        ({"name": "classic", "algos": ["sb3-ppo-zoo"]}, "suite classic has no algorithm 'sb3-ppo-zoo'"),
        ({"name": "mujoco", "envs": ["Hopper-v4"]}, "no environment 'Hopper-v4', did you mean 'Hopper-v5'"),
    ],
)
def test_what_a_suite_does_not_have_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message).replace("'", ".?")):
        plan(**options)


def test_seeds_are_a_number_a_range_or_a_list() -> None:
    assert parse_seeds("3") == [0, 1, 2]
    assert parse_seeds("3-5") == [3, 4, 5]
    assert parse_seeds("0, 3,7-8,3") == [0, 3, 7, 8]
    for text in ("", "0", "a", "5-3", "1-", "-1"):
        with pytest.raises(ConfigError, match="--seeds"):
            parse_seeds(text)


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_keeps_every_return_with_steps_seconds_settings_and_versions(made: Path) -> None:
    [run] = [r for r in tiny_plan() if (r.variant.name, r.seed) == ("ppoplus", 1)]
    path = store.path_of(made, run)
    assert path.relative_to(made).as_posix() == f"classic-{STEPS}/ppoplus/CartPole-v1/seed1.json.gz"
    assert path.stat().st_size < 10_000
    data = json.loads(gzip.decompress(path.read_bytes()))
    evaluations = data["evaluations"]
    assert np.shape(evaluations["returns"]) == np.shape(evaluations["lengths"]) == (12, 2)
    assert evaluations["returns"] == evaluations["lengths"]  # CartPole: a reward of 1 for each step
    # Eight environments: the first step of all of them at or above 1024/12, 2·1024/12, …; the last one after the end.
    assert evaluations["steps"] == [-(-STEPS * (i + 1) // 12 // 8) * 8 for i in range(12)]
    assert evaluations["seconds"] == sorted(evaluations["seconds"]) and evaluations["seconds"][-1] == data["seconds"]
    assert data["settings"]["n_envs"] == 8 and data["settings"]["n_steps"] == 32 and data["settings"]["gamma"] == 0.98
    assert data["settings"]["recompute_advantages"] == "auto"  # a default, not in the file of settings
    assert data["protocol"] == {"n_evaluations": 12, "n_episodes": 2, "seed": 1_000_000}
    assert {"python", "torch", "stable_baselines3"} <= data["versions"].keys()
    assert len(data["code"]["digest"]) == 16 and data["jobs"] == 2
    assert sum(data["training"]["episodes"]) > 10


class Silent:
    def send(self, message: Any) -> None:
        pass


def test_evaluations_neither_change_the_training_nor_count_as_its_time() -> None:
    connection: Any = Silent()
    [run] = tiny_plan(algos=["a2cplus"], seeds=[0])
    results = [
        trainings.result(run, Protocol(n_evaluations=n, n_episodes=2), {}, connection)["evaluations"] for n in (1, 6)
    ]
    assert [len(result["steps"]) for result in results] == [1, 6]
    assert results[0]["returns"][-1] == results[1]["returns"][-1]


def test_a_run_of_sb3_evaluates_with_the_trainings_statistics() -> None:
    pytest.importorskip("mujoco")
    connection: Any = Silent()
    runs = plan("mujoco", algos=["sb3-ppo-same"], envs=["Hopper-v5"], seeds=[0], n_timesteps=2048)
    first, again = (trainings.result(runs[0], PROTOCOL, {}, connection) for _ in range(2))
    assert first["evaluations"]["returns"] == again["evaluations"]["returns"]
    assert first["backend"] == "mujoco" and first["engine"] is None
    # The statistics move with every step, and with them the actions of a policy that has not been updated yet.
    assert first["evaluations"]["returns"][0] != first["evaluations"]["returns"][5]


def test_sb3_in_its_own_environments_gives_the_same_returns_to_the_bit_so_that_only_its_time_is_new() -> None:
    pytest.importorskip("mujoco")
    connection: Any = Silent()
    runs = plan("mujoco", algos=["sb3-ppo-same", "sb3-ppo-own"], envs=["HalfCheetah-v5"], seeds=[0], n_timesteps=4096)
    ours, own = (trainings.result(run, PROTOCOL, {}, connection) for run in runs)
    assert [ours["backend"], own["backend"]] == ["mujoco", "dummy"]
    assert own["evaluations"]["returns"] == ours["evaluations"]["returns"]
    assert own["training"] == ours["training"]


def test_a_timed_run_has_as_many_threads_as_there_are_processors() -> None:
    connection: Any = Silent()
    [run] = tiny_plan(algos=["a2cplus"], seeds=[0])
    before = th.get_num_threads()
    try:
        th.set_num_threads(1)  # as the suite's processes have it
        beside, alone = (
            trainings.result(replace(run, is_timed=timed), PROTOCOL, {}, connection) for timed in (False, True)
        )
    finally:
        th.set_num_threads(before)
    assert [beside["threads"], alone["threads"]] == [1, usable_cpus()]
    assert alone["evaluations"]["steps"] == beside["evaluations"]["steps"]


def test_where_time_is_measured_several_jobs_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--jobs 2: what is measured here is time"):
        runner.make(plan("time"), tmp_path / "store", jobs=2)
    assert not any(tmp_path.rglob("*.json.gz"))


# --- a suite ----------------------------------------------------------------------------------------------------------


def test_a_finished_suite_makes_nothing(made: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in made.rglob("*.json.gz")}
    assert len(files) == 4
    assert runner.make(tiny_plan(), made, protocol=PROTOCOL) == Outcome(0, 4, 0)
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*.json.gz")} == files


def test_a_torn_file_is_made_again_with_the_same_result_and_the_others_stay(made: Path, tmp_path: Path) -> None:
    folder = copied(made, tmp_path / "store")
    torn, *others = [store.path_of(folder, run) for run in tiny_plan()]
    whole, times = store.read(torn), [path.stat().st_mtime_ns for path in others]
    torn.write_bytes(torn.read_bytes()[:1000])
    assert store.read(torn) is None
    assert runner.make(tiny_plan(), folder, protocol=PROTOCOL) == Outcome(1, 3, 0)
    again = store.read(torn)
    assert whole is not None and again is not None
    assert again.data["evaluations"]["returns"] == whole.data["evaluations"]["returns"]
    assert [path.stat().st_mtime_ns for path in others] == times


def test_runs_with_other_settings_are_neither_mixed_nor_lost(made: Path, tmp_path: Path) -> None:
    folder = copied(made, tmp_path)
    changed = [
        replace(run, settings=replace(run.settings, hyperparameters=run.settings.hyperparameters | {"gamma": 0.5}))
        for run in tiny_plan(algos=["a2cplus"], seeds=[0])
    ]
    with pytest.raises(ConfigError, match=r"1 stored runs have other .*a2cplus CartPole-v1 seed 0 \(gamma: 0.99 → 0.5"):
        runner.make(changed, folder, protocol=PROTOCOL)
    assert runner.make(changed, folder, protocol=PROTOCOL, replace=True) == Outcome(1, 0, 0)
    mixed = Results(f"classic-{STEPS}", store.read_all(folder, f"classic-{STEPS}")).with_mixed_settings()
    assert mixed == [("a2cplus", "CartPole-v1")]


def test_a_setting_that_is_new_since_a_run_is_a_difference_unless_it_has_its_default() -> None:
    ours = {"algo": "ppoplus", "gamma": 0.9}
    assert store.differences(ours | {"old": 1}, ours | {"target_kl": None}) == []
    assert store.differences(ours, ours | {"target_kl": 0.01}) == ["target_kl: None → 0.01"]
    # Of SB3's algorithms no defaults are known.
    theirs = {"algo": "sb3-ppo", "gamma": 0.9}
    assert store.differences(theirs, theirs | {"target_kl": None}) == []
    assert store.differences(theirs, theirs | {"max_grad_norm": 0.3}) == ["max_grad_norm: None → 0.3"]
    assert store.differences(theirs | {"max_grad_norm": 0.3}, theirs) == ["max_grad_norm: 0.3 → None"]
    assert store.differences({"net": [64, 64]}, {"net": (64, 64)}) == []
    assert store.differences({"gamma": 0.9}, {"gamma": 0.99}) == ["gamma: 0.9 → 0.99"]
    # What is left out where it has its default is one.
    assert store.differences({}, {"use_sde": True}) == ["use_sde: False → True"]
    assert store.differences({"frame_stack": 4}, {}) == ["frame_stack: 4 → None"]


def test_runs_that_were_evaluated_otherwise_are_not_mixed(made: Path, tmp_path: Path) -> None:
    folder, runs = copied(made, tmp_path), tiny_plan(algos=["a2cplus"], seeds=[0])
    more = replace(PROTOCOL, n_episodes=3)
    with pytest.raises(ConfigError, match="n_episodes of the protocol: 2 → 3"):
        runner.make(runs, folder, protocol=more)
    assert runner.missing(runs, folder, more, replace=True) == runs


def test_a_damaged_file_counts_as_missing_wherever_the_damage_is(made: Path, tmp_path: Path) -> None:
    [run] = tiny_plan(algos=["a2cplus"], seeds=[0])
    whole = store.path_of(made, run).read_bytes()
    damaged = tmp_path / "seed0.json.gz"
    for position in range(10, len(whole)):  # behind gzip's header, whose date and flags may be anything
        damaged.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        assert store.read(damaged) is None


def stored_run(folder: Path, run: Run, **changes: Any) -> Path:
    """A whole file of a run, without a training."""
    made_with = {"format": store.FORMAT, "versions": {}, "code": {}, "protocol": asdict(PROTOCOL)}
    settings = {"settings": store.described_settings(run)}
    data = a_run([0.0] * 12, run.variant.name, run.env, run.seed).data
    store.write(path := store.path_of(folder, run), {**data, **made_with, **settings, **changes})
    return path


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(24, "Too many open files")])
def test_a_file_that_cannot_be_read_for_a_moment_is_not_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    [run] = tiny_plan(algos=["a2cplus"], seeds=[0])
    path = stored_run(tmp_path, run)
    content = path.read_bytes()

    def fail(path: Path) -> bytes:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(ConfigError, match=rf"seed0\.json\.gz cannot be read: {error.strerror}"):
            runner.make([run], tmp_path, protocol=PROTOCOL)
    assert path.read_bytes() == content
    assert runner.make([run], tmp_path, protocol=PROTOCOL) == Outcome(0, 1, 0)


def test_a_file_of_a_later_format_is_not_made_anew(tmp_path: Path) -> None:
    [run] = tiny_plan(algos=["a2cplus"], seeds=[0])
    stored_run(tmp_path, run, format=store.FORMAT + 1)
    with pytest.raises(ConfigError, match=r"seed0\.json\.gz cannot be read: format 2 is of a later"):
        runner.make([run], tmp_path, protocol=PROTOCOL)


def test_damaged_files_are_named_by_the_table_the_list_and_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, torn, incomplete = tiny_plan(algos=["a2cplus"], seeds=[0, 1, 2])
    for run in (whole, torn):
        stored_run(tmp_path, run)
    store.path_of(tmp_path, torn).write_bytes(b"")
    stored_run(tmp_path, incomplete, training={"returns": []})
    [folder] = {store.path_of(tmp_path, run).parent for run in (torn, incomplete)}
    names = [(folder / f"seed{seed}.json.gz").relative_to(tmp_path).as_posix() for seed in (1, 2)]
    assert [path.as_posix() for path in store.damaged(tmp_path)] == names
    text = page.write(tmp_path, tmp_path / "results.md", with_figures=False)
    assert [line for line in text.splitlines() if "amaged" in line] == [f"* Damaged, and left out: {n}" for n in names]
    assert "1 runs" in text
    monkeypatch.setattr(runner, "make", lambda *arguments, **options: Outcome(0, 0, 0))
    for options in (["--list"], []):
        arguments = ["--suite", "classic", "--algos", "a2cplus", "--envs", "CartPole-v1", "--steps", str(STEPS)]
        output = invoke(*arguments, *options, "--store", str(tmp_path)).output
        assert all(f"{tmp_path / name} is damaged and counts as missing" in output for name in names), output


def test_a_run_that_another_process_made_meanwhile_is_not_made_twice(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tiny_plan(algos=["a2cplus"])
    real_start = runner._start

    def start_while_another_finishes(run: Any, *arguments: Any) -> Any:
        copied(made, tmp_path)
        return real_start(run, *arguments)

    monkeypatch.setattr(runner, "_start", start_while_another_finishes)
    assert runner.make(runs, tmp_path, jobs=1, protocol=PROTOCOL) == Outcome(1, 1, 0)


class Finished:
    """In place of a process: one that says how it ended at once."""

    def __init__(self, ended: Ended) -> None:
        self.connection, theirs = Pipe(duplex=False)
        theirs.send(ended)
        self.started = time.perf_counter()

    def receive(self) -> Any:
        return self.connection.recv()

    def end(self, *, terminate: bool = False) -> None:
        self.connection.close()


HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "ab")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(store.fcntl is None, reason="no locks of files here")
def test_a_run_has_one_process_at_a_time_and_is_free_when_that_dies(tmp_path: Path) -> None:
    first, second = tiny_plan(algos=["a2cplus"])
    claim = store.claim(tmp_path, first)
    assert claim is not None and store.claim(tmp_path, first) is None
    other = store.claim(tmp_path, second)
    assert other is not None
    other.close()
    claim.close()
    assert not list(tmp_path.rglob("*.lock"))
    lock = store.path_of(tmp_path, first).with_name("seed0.lock")
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        assert store.claim(tmp_path, first) is None
        holder.kill()
        holder.wait()
        assert lock.exists()
        free = store.claim(tmp_path, first)
    assert free is not None
    free.close()
    assert not lock.exists()


@pytest.mark.parametrize("other_finishes", [True, False])
@pytest.mark.skipif(store.fcntl is None, reason="no locks of files here")
def test_a_run_that_another_process_is_making_is_left_for_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_finishes: bool
) -> None:
    first, second = runs = tiny_plan(algos=["a2cplus"])
    claim = store.claim(tmp_path, first)
    assert claim is not None
    started = []

    def start(run: Run, *arguments: Any) -> Any:
        assert store.claim(tmp_path, run) is None
        started.append(run)
        stored_run(tmp_path, run)
        if run == second:
            if other_finishes:
                stored_run(tmp_path, first)
            claim.close()
        return runner._Active(run, Finished(Ended()))  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "_start", start)
    outcome = runner.make(runs, tmp_path, jobs=2, protocol=PROTOCOL)
    assert started == ([second] if other_finishes else [second, first])
    assert outcome == (Outcome(1, 1, 0) if other_finishes else Outcome(2, 0, 0))
    assert not list(tmp_path.rglob("*.lock"))


def test_without_locks_of_files_every_run_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "fcntl", None)
    [run] = tiny_plan(algos=["a2cplus"], seeds=[0])
    assert store.claim(tmp_path, run) is not None and store.claim(tmp_path, run) is not None
    assert not list(tmp_path.iterdir())


def test_a_failure_that_cannot_be_noted_stops_no_other_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = tiny_plan(algos=["a2cplus"])
    broken = replace(bad, settings=replace(bad.settings, hyperparameters={"gamma": 2.0}))

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runner, "write_atomically", full)  # in this process; the trainings have their own
    assert runner.make([broken, good], tmp_path, jobs=1, protocol=PROTOCOL) == Outcome(1, 0, 1)
    assert store.read(store.path_of(tmp_path, good)) is not None


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_store_that_cannot_be_written_to_is_found_before_the_first_training(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="nothing can be written to --store"):
        runner.make(tiny_plan(), tmp_path / "store", protocol=PROTOCOL)


def test_a_store_below_a_file_is_found_before_the_first_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="nothing can be written to --store"):
        runner.make(tiny_plan(), tmp_path / "file" / "store", protocol=PROTOCOL)


def test_a_failing_run_is_noted_with_its_traceback_and_stops_no_other(tmp_path: Path) -> None:
    good, bad = tiny_plan(algos=["a2cplus"])
    broken = replace(bad, settings=replace(bad.settings, hyperparameters={"gamma": 2.0}))
    assert runner.make([broken, good], tmp_path, jobs=1, protocol=PROTOCOL) == Outcome(1, 0, 1)
    note = store.failure_of(tmp_path, bad)
    assert "Traceback" in note.read_text() and "`gamma` must be" in note.read_text()
    [(path, why)] = store.failures(tmp_path)
    assert path.as_posix() == f"classic-{STEPS}/a2cplus/CartPole-v1/seed1.failed.txt" and "gamma" in why
    assert runner.make([good, bad], tmp_path, protocol=PROTOCOL) == Outcome(1, 1, 0)
    assert not note.exists()


def test_a_run_whose_file_is_there_has_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = runs = tiny_plan(algos=["a2cplus"])
    note = store.failure_of(tmp_path, first)

    def write_and_die(run: Run, *arguments: Any) -> Any:
        stored_run(tmp_path, run)
        return runner._Active(run, Finished(Ended("ProcessDiedError: after its last word")))  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "_start", write_and_die)
    assert runner.make(runs, tmp_path, protocol=PROTOCOL) == Outcome(2, 0, 0)
    assert not note.exists()
    # One that came with the store, older or newer than the file.
    note.write_text("Traceback\nValueError: of another day")
    assert list(store.failures(tmp_path)) == []
    store.failure_of(tmp_path, second).write_text("ValueError: of the same")
    assert runner.make(runs, tmp_path, protocol=PROTOCOL) == Outcome(0, 2, 0)
    assert not list(tmp_path.rglob("*.failed.txt"))


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is a POSIX signal here")
def test_ctrl_c_keeps_what_is_finished_and_leaves_no_process(tmp_path: Path) -> None:
    options = ["--suite", "classic", "--algos", "a2cplus", "--envs", "CartPole-v1", "--steps", "512", "--jobs", "1"]
    arguments = [
        sys.executable,
        "-m",
        "sb3_pgplus.cli",
        "benchmark",
        *options,
        "--seeds",
        "100",
        "--store",
        str(tmp_path),
    ]
    started = subprocess.Popen(
        arguments, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("*.json.gz")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(started.pid, signal.SIGINT)  # a terminal sends it to all processes
    output, _ = started.communicate(timeout=60)
    assert started.returncode == 130, output
    assert "Finished runs are kept" in output and "Traceback" not in output
    finished = list(tmp_path.rglob("*.json.gz"))
    assert 0 < len(finished) < 100 and all(store.read(path) for path in finished)
    assert not list(tmp_path.rglob("*.failed.txt")) and not list(tmp_path.rglob("*.tmp"))


_ASK_A_NEW_PROCESS = """
import os, signal
from multiprocessing import forkserver
from sb3_pgplus.processes import process_context

def tell(connection):
    os.kill(os.getpid(), signal.SIGINT)
    heard = []
    signal.signal(signal.SIGINT, lambda *_: heard.append("heard"))  # who wants to hear of it can
    os.kill(os.getpid(), signal.SIGINT)
    connection.send(("alive", *heard))

if __name__ == "__main__":
    context = process_context()
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGINT)  # which has hardly begun
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=tell, args=(theirs,))
    process.start()
    print(*ours.recv())
    process.join()
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        print("stopped")
"""


def test_ctrl_c_does_not_reach_a_process_before_it_gets_to_its_own_code(tmp_path: Path) -> None:
    script = tmp_path / "ask.py"
    script.write_text(_ASK_A_NEW_PROCESS)
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["alive", "heard", "stopped"]  # it does not come there, and as ever in the parent
    assert run.stderr == ""


def test_the_time_left_is_that_of_the_same_cell_else_of_the_variant_else_of_all() -> None:
    runs = plan("mujoco", algos=["ppoplus", "a2cplus"], envs=["Hopper-v5", "Ant-v5"], seeds=[0])
    found = {(run.variant.name, run.env): run for run in runs}
    estimates = runner.Estimates()
    assert estimates.seconds(runs[0]) is None
    estimates.add("ppoplus", "Hopper-v5", 1e-4)
    estimates.add("ppoplus", "Hopper-v5", 3e-4)
    assert estimates.seconds(found["ppoplus", "Hopper-v5"]) == pytest.approx(200)  # the median of 100 s and 300 s
    assert estimates.seconds(found["ppoplus", "Hopper-v5"], steps=750_000) == pytest.approx(50)
    estimates.add("a2cplus", "Ant-v5", 9e-4)
    assert estimates.seconds(found["ppoplus", "Ant-v5"]) == pytest.approx(200)
    assert estimates.seconds(found["a2cplus", "Hopper-v5"]) == pytest.approx(900)


# --- tables and figures -----------------------------------------------------------------------------------------------


def test_a_score_is_the_mean_of_the_last_ten_evaluations_and_never_the_best() -> None:
    run = a_run([1000.0, *range(10)])
    assert run.score == 4.5
    assert run.training_return == 4.5


def test_training_returns_are_weighted_by_the_number_of_episodes() -> None:
    data = a_run([0.0, 0.0]).data | {"training": {"episodes": [3, 0], "returns": [8.0, 0.0]}}
    assert store.StoredRun(data).training_return == 8.0


def test_normalised_scores_have_random_actions_at_0_and_the_published_figure_at_1() -> None:
    low, (high, *_) = published()["random"]["HalfCheetah-v5"], published()["mujoco"]["ppoplus"]["HalfCheetah-v5"]
    results = Results("mujoco", [a_run([low] * 10), a_run([high] * 10, seed=1), a_run([2 * high - low] * 10, seed=2)])
    found = results.normalized("ppoplus", ["HalfCheetah-v5"])
    assert found is not None
    np.testing.assert_allclose(found[0], [0.0, 1.0, 2.0], atol=1e-12)
    assert results.normalized("ppoplus", ["HalfCheetah-v5", "Hopper-v5"]) is None


def test_the_time_to_a_goal_is_that_of_the_first_evaluation_there() -> None:
    results = Results("mujoco", [a_run([0, 50, 90, 70, 100]), a_run([0, 30, 70, 90, 100], seed=1)])
    assert results.seconds_to("ppoplus", "HalfCheetah-v5", 80) == 180  # means 0, 40, 80, 80, 100
    assert results.seconds_to("ppoplus", "HalfCheetah-v5", 101) is None
    theirs = [a_run([0, 0, 0, 20, 125], "sb3-ppo-same")]
    results = Results("mujoco", [*results.runs, *theirs])
    # Their score is the mean of all five, 29; 80 % of it are 23.2: ours after 2 minutes, theirs after 5.
    text = tables.times_to_goal(results, [("ppoplus", "sb3-ppo-same")], ["HalfCheetah-v5"])
    assert "| 23.2 | 2.00 | 5.00 | 0.40 |" in text
    elsewhere = [store.StoredRun({**run.data, "jobs": 1}) for run in theirs]
    results = Results("mujoco", [run for run in results.runs if run.variant == "ppoplus"] + elsewhere)
    text = tables.times_to_goal(results, [("ppoplus", "sb3-ppo-same")], ["HalfCheetah-v5"])
    assert "| 23.2 | 2.00 | 5.00 | – |" in text


def test_the_time_group_has_its_own_tables_of_the_minutes_and_of_the_time_to_the_goal() -> None:
    results = Results("time", [a_run([0, 50, 90, 70, 100]), a_run([0, 0, 0, 20, 125], "sb3-ppo-own")])
    texts = dict(tables.sections(results))
    assert texts["Minutes"].splitlines()[2] == "| HalfCheetah-v5 | 5.0 | 5.0 |"
    assert "| 23.2 | 2.00 | 5.00 | 0.40 |" in texts["Time to 80 % of the score"]
    assert [title for title, _ in figures.draw(results, Path("nowhere"), anew=False)] == []


def test_minutes_are_of_the_usual_machine_and_those_of_another_are_marked() -> None:
    def on(machine: str, jobs: int, *run: Any, **which: Any) -> store.StoredRun:
        data = {**a_run([0.0] * 10, *run, **which).data, "machine": machine, "jobs": jobs}
        return store.StoredRun(data | ({"seconds": 60.0} if machine == "B" else {}))

    one = [on("A", 2), on("A", 2, "a2cplus"), on("A", 2, "ppoplus", "Hopper-v5")]
    text = tables.times(Results("mujoco", one), suites.OURS, MUJOCO_TASKS)
    assert text.splitlines()[2:] == ["| HalfCheetah-v5 | 10.0 | 10.0 |", "| Hopper-v5 | 10.0 | – |"]
    mixed = [*one, on("B", 2, seed=1), on("A", 1, "a2cplus", "Hopper-v5")]
    text = tables.times(Results("mujoco", mixed), suites.OURS, MUJOCO_TASKS)
    assert text.splitlines()[2:] == [
        "| HalfCheetah-v5 | 10.0 | 10.0 |",
        "| Hopper-v5 | 10.0 | 10.0 a |",
        "",
        "* a: on A, 1 at a time. All others on A, 2 at a time.",
    ]


def test_the_ablation_has_no_probability_of_a_single_seed_and_says_of_how_many_tasks_one_is() -> None:
    tasks = ["Hopper-v5", "Walker2d-v5"]
    runs = [a_run([0.0] * 10, "ppoplus", env, seed) for env in tasks for seed in range(2)]
    runs += [a_run([1.0] * 10, "ppo", "Hopper-v5", seed) for seed in range(2)] + [a_run([1.0] * 10, "trpo", tasks[0])]
    text = tables.ablation(Results("ablation", runs), tasks)
    column = {line.split(" | ")[0]: line.split(" | ")[3] for line in text.splitlines() if line.startswith("| ")}
    assert column["| PPO"] == "0.00 [0.00, 0.00] (1 of 2 tasks)"
    assert column["| TRPO"] == column["| PPOPlus, all tricks"] == "–"


def test_a_cell_says_how_many_seeds_it_has_and_an_interval_needs_two() -> None:
    results = Results("mujoco", [a_run([5650.0] * 10)])
    text = tables.scores(results, suites.OURS, MUJOCO_TASKS)
    [row] = text.splitlines()[2:]
    assert row.startswith("| HalfCheetah-v5 | 5650 (1) | 5650 ± 1226 | – | 4527 ± 603 | – | 1936 ± 1160 |")
    results = Results("mujoco", [a_run([-4.0] * 10), a_run([-6.0] * 10, seed=1)])
    assert "| −5.0 [−6.0, −4.0] (2) |" in tables.scores(results, suites.OURS, MUJOCO_TASKS)


def test_the_targets_count_tasks_at_or_above_the_published_figure() -> None:
    results = Results("mujoco", [a_run([5650.0] * 10), a_run([2713.0] * 10, env="Hopper-v5")])
    text = tables.targets(results, suites.OURS, tables.SHARED_TARGET_TASKS)
    assert text == "* PPOPlus: 1 of 8 tasks, 2 of them trained: HalfCheetah-v5.\n"


def test_published_figures_are_there_for_every_cell_of_the_suites_with_their_sources() -> None:
    for kind, tasks in (("mujoco", MUJOCO_TASKS), ("classic", suites.CLASSIC_TASKS)):
        for algo in ("ppoplus", "trpoplus", "a2cplus"):
            for env in tasks:
                score, text, source = published()[kind][algo][env]
                assert float(text.replace("−", "-").split()[0]) == score and source
                assert env in published()["random"]
    assert set(published()["ablation"]) == set(suites.PAPER)


def test_the_page_is_made_of_the_files_byte_for_byte(made: Path, tmp_path: Path) -> None:
    pages = [tmp_path / name / "results.md" for name in ("one", "two")]
    for target in pages:
        page.write(made, target)
    files = [sorted(path.relative_to(target.parent) for path in target.parent.rglob("*.*")) for target in pages]
    assert files[0] == files[1] == [Path(f"images/results-classic-{STEPS}-steps.svg"), Path("results.md")]
    for name in files[0]:
        assert (pages[0].parent / name).read_bytes() == (pages[1].parent / name).read_bytes()
    text = pages[0].read_text(encoding="utf-8")
    returns = [store.read(store.path_of(made, run)) for run in tiny_plan(algos=["ppoplus"])]
    scores = [np.mean([np.mean(e) for e in run.data["evaluations"]["returns"][-10:]]) for run in returns if run]
    low, high = sorted(map(tables.number, scores), key=float)
    assert f"| CartPole-v1 | {tables.number(float(np.mean(scores)))} [{low}, {high}] (2) | 500 |" in text
    assert f"## Classic control and Box2D, {STEPS:,} steps" in text and "4 runs, 2 at a time" in text


def test_a_page_keeps_what_stands_outside_of_its_markers(made: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.md"
    target.write_text(f"before\n{page.BEGIN}old\n{page.END}\nafter\n")
    page.write(made, target, with_figures=False)
    text = target.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{page.BEGIN}## Classic") and text.endswith(f"{page.END}\nafter\n")
    assert "old" not in text and "![" not in text
    target.write_text("nothing")
    with pytest.raises(ConfigError, match="no place for the tables"):
        page.write(made, target)


def test_a_cell_of_another_set_is_named_under_the_tables(tmp_path: Path) -> None:
    made_with = {"machine": "m", "code": {"commit": "a" * 40 + " with changes"}, "versions": {}, "jobs": 2}

    def stored(env: str, gamma: float, variant: str = "ppoplus") -> store.StoredRun:
        run = a_run([0.0] * 10, variant, env)
        algo = "sb3-ppo" if variant.startswith("sb3") else variant
        settings = {"algo": algo, "env": env, "gamma": gamma, "n_timesteps": 1000}
        return store.StoredRun(
            {**run.data, **made_with, "settings": settings | {"clip_range_vf": None}, "source": "of that day"}
        )

    same = Results(
        "mujoco", [stored("Hopper-v5", 0.99), stored("Ant-v5", 0.99), stored("Ant-v5", 0.99, "sb3-ppo-same")]
    )
    assert "Not one set" not in page._notes(same) and "earlier settings" not in page._notes(same)
    # Of the stored settings, whatever was known of SB3 when its run was made.
    assert "* SB3 PPO, same settings: of that day, without recompute_advantages=auto." in page._notes(same)
    assert "* Code: aaaaaaaaaa with changes." in page._notes(same)
    other = Results("mujoco", [stored("Hopper-v5", 0.9), stored("Ant-v5", 0.99), stored("Ant-v5", 0.9, "sb3-ppo-same")])
    assert "* Not one set of settings for all tasks yet: ppoplus." in page._notes(other)
    assert "trained with earlier settings of ours on Ant-v5." in page._notes(other)


def test_settings_per_task_count_the_one_set_where_a_task_has_none_of_its_own() -> None:
    own = "Swimmer-v5"
    assert own in [env for variant, env in suites.per_task_cells() if variant.name == "trpoplus-per-task"]
    runs = [a_run([400.0] * 10, "trpoplus-per-task", own), a_run([9000.0] * 10, "trpoplus", "Hopper-v5")]
    runs += [a_run([9000.0] * 10, "ppoplus-per-task", "HalfCheetah-v5")]
    results = Results("mujoco", runs)
    text = tables.scores(results, suites.PER_TASK_OURS, MUJOCO_TASKS)
    assert "| Swimmer-v5 | – | 274 ± 88 | 400 (1) | 359 ± 2 SE | – | 38 ± 2 |" in text
    assert "| HalfCheetah-v5 | 9000 (1) | 5650 ± 1226 | – | 4527 ± 603 | as above |" in text
    lines = tables.targets(results, suites.PER_TASK_OURS, MUJOCO_TASKS)
    assert "* TRPOPlus, per task: 2 of 9 tasks, 2 of them trained: Hopper-v5, Swimmer-v5." in lines


def test_what_sb3_lacks_of_the_set_is_named_where_it_is_on_by_default_too() -> None:
    def source(**hyperparameters: Any) -> str:
        ours = replace(suites.shared_settings("ppoplus"), hyperparameters=hyperparameters, source="a file")
        return stock.same_settings(ours).source

    on_by_default = "value_clip=max, recompute_advantages=auto"
    assert source(gamma=0.9, log_std_init=-1.0) == f"a file, without {on_by_default}"
    assert source(clip_range_vf=None, desired_kl=0.01) == "a file, without desired_kl=0.01, recompute_advantages=auto"
    assert source(use_sde=True, recompute_advantages=False, value_clip="clipped_only") == "a file, without use_sde=True"
    assert source(clip_range_vf=None, recompute_advantages=False, sb3_exact=False) == "a file, all of it"


def test_no_frame_of_a_figure_is_empty() -> None:
    results = Results("classic", [a_run([0.0] * 12, env=env) for env in suites.CLASSIC_TASKS])
    figure = figures._curves(results, suites.OURS, suites.CLASSIC_TASKS, lambda curve: curve.steps, "steps")
    assert figure is not None
    assert [axis.get_visible() for axis in figure.axes] == [True] * 5 + [False]


def panels(runs: list[store.StoredRun], name: str) -> list[str]:
    [make] = [make for key, _, make in figures._figures(Results("mujoco", runs)) if key == name]
    figure = make()
    assert figure is not None
    return [axis.get_title(loc="left") for axis in figure.axes if axis.get_visible()]


def test_a_figure_of_times_has_only_tasks_measured_under_one_condition(tmp_path: Path) -> None:
    def stored(env: str, variant: str, machine: str) -> store.StoredRun:
        return store.StoredRun({**a_run([0.0] * 12, variant, env).data, "machine": machine, "jobs": 2})

    runs = [stored(env, name, "one") for env in ("Hopper-v5", "Ant-v5") for name in ("ppoplus", "sb3-ppo-same")]
    runs += [stored("Walker2d-v5", "ppoplus", "one")]  # with nothing beside it
    assert panels(runs, "time") == ["Hopper-v5", "Ant-v5"]
    runs += [stored("Hopper-v5", "ppoplus", "another")]  # left out, since there is one of the usual machine
    assert panels(runs, "time") == ["Hopper-v5", "Ant-v5"]
    runs = [*(run for run in runs if run.env != "Hopper-v5"), runs[0], stored("Hopper-v5", "sb3-ppo-same", "another")]
    assert panels(runs, "time") == ["Ant-v5"]
    assert panels(runs, "steps") == ["Hopper-v5", "Walker2d-v5", "Ant-v5"]
    stale = tmp_path / "results-mujoco-time.svg"
    stale.write_text("of runs that were removed")
    figures.draw(Results("mujoco", runs[-2:]), tmp_path)  # Hopper alone, on two machines
    assert not stale.exists()


NAMES_OF_FIGURES = (
    *("ablation-scores", "mujoco-profile-four", "mujoco-profile"),
    *("mujoco-steps", "mujoco-time-all", "mujoco-time"),
)


def test_every_section_and_figure_is_drawn_from_runs_of_all_variants(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    made_with = {"machine": "a processor", "code": {}, "versions": {"torch": "2"}, "jobs": 2, "format": store.FORMAT}
    for run in [*plan("mujoco", seeds=[0, 1]), *plan("ablation", seeds=[0, 1])]:
        curve = list(np.linspace(0, 1000, 12) + rng.normal(scale=50, size=12))
        data = {**a_run(curve, run.variant.name, run.env, run.seed).data, **made_with}
        store.write(store.path_of(tmp_path, run), data)
    text = page.write(tmp_path, tmp_path / "results.md")
    headings = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert headings == [
        "One set of hyperparameters per algorithm",
        "Beside SB3 and sb3-contrib",
        "Probability of improvement",
        "All tasks together",
        "Settings per task",
        "Time",
        "Time to 80 % of SB3's score",
        "Returns of the training's own episodes",
        "Each trick",
    ]
    drawn = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert drawn == sorted(f"results-{n}.svg" for n in NAMES_OF_FIGURES)
    assert all(f"images/{name}" in text for name in drawn)
    links = re.findall(r"^!\[.*$", text, re.MULTILINE)
    again = page.write(tmp_path, tmp_path / "results.md", with_figures=False)
    assert re.findall(r"^!\[.*$", again, re.MULTILINE) == links
    assert "| PPO-NoClip |" in text and "2867 [2701, 3024]" in text


# --- the command ------------------------------------------------------------------------------------------------------


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["benchmark", *arguments], env={"COLUMNS": "200"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "nothing"), "unknown suite 'nothing'"),
        (("--algos", "ppo"), "suite mujoco has no algorithm 'ppo'"),
        (("--envs", "Hopper"), "suite mujoco has no environment 'Hopper'"),
        (("--algos", ""), "--algos '' names nothing"),
        (("--envs", " ,"), "--envs ' ,' names nothing"),
        (("--seeds", "x"), "--seeds x: write a number"),
        (("--steps", "0"), "steps must be a whole number"),
        (("--table", "--store", "missing"), "there are no results in missing"),
    ],
)
def test_bad_input_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")


def rows_of_the_list(folder: Path) -> list[list[str]]:
    tiny = ("--suite", "classic", "--envs", "CartPole-v1", "--steps", str(STEPS), "--algos", "ppoplus,trpoplus")
    result = invoke(*tiny, "--seeds", "3", "--store", str(folder), "--list")
    assert result.exit_code == 0, result.output
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.output.splitlines() if "│" in line]


def test_the_list_shows_stored_and_missing_seeds(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "Protocol", lambda: PROTOCOL)
    rows = rows_of_the_list(made)
    assert ["ppoplus", "CartPole-v1", "1,024", "0, 1", "2"] in [row[:5] for row in rows]
    assert ["trpoplus", "CartPole-v1", "1,024", "", "0, 1, 2"] in [row[:5] for row in rows]


def test_the_list_does_not_count_runs_that_were_made_otherwise(made: Path) -> None:
    # Twelve evaluations of two episodes, where the command makes fifty of ten.
    [row] = [row for row in rows_of_the_list(made) if row[0] == "ppoplus"]
    assert row[:5] == ["ppoplus", "CartPole-v1", "1,024", "", "2"] and row[6] == "0, 1"


def test_the_table_of_a_folder_goes_to_a_page_in_it_and_not_into_the_documentation(made: Path, tmp_path: Path) -> None:
    folder, docs = copied(made, tmp_path), (ROOT / "docs" / "results.md").read_bytes()
    result = invoke("--table", "--store", str(folder))
    assert result.exit_code == 0, result.output
    assert (folder / "results.md").is_file() and "CartPole-v1" in result.output
    assert (ROOT / "docs" / "results.md").read_bytes() == docs
