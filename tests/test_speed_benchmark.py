"""The speed benchmark without its trainings: what is run, what counts as the fastest way, ratios, table, chart."""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3 import A2C, PPO

from benchmarks.speed import __main__ as command
from benchmarks.speed import libraries, report
from benchmarks.speed.cases import (
    CASES,
    CLEANRL,
    CONTRIB,
    OURS,
    RLOX,
    SB3,
    SBX,
    SWEEPS,
    Variant,
    chosen_cases,
    variants,
)
from benchmarks.speed.environments import SyntheticImages
from benchmarks.speed.measuring import Stopwatch, measured
from benchmarks.speed.report import Row, Spread
from benchmarks.speed.runners.sb3_style import our_class
from sb3_pgplus import A2CPlus, PPOPlus, presets

CHEETAH = CASES["ppo-halfcheetah-8x256"]
TRPO = CASES["trpo-halfcheetah-8x256"]


def a_run(library: str = SB3, index: int = 1, speed: float = 100.0, **changes: Any) -> dict[str, Any]:
    values = {
        "case": CHEETAH.name,
        "library": library,
        "variant": f"{library}-dummy-1",
        "words": "DummyVecEnv, 1 thread",
        "phase": "round",
        "index": index,
        "seed": index,
        "steps": 4096,
        "seconds": 4096 / speed,
        "steps_per_second": speed,
        "import_seconds": 2.0,
        "build_seconds": 0.5,
        "compile_seconds": 10.0 / index,
        "peak_memory_mb": 300.0,
        "workers_memory_mb": 50.0,
        "machine": "a processor, 2 cores",
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
    }
    return values | changes


# --- cases and ways to run --------------------------------------------------------------------------------------------


def test_all_cases_are_the_default_and_sweeps_are_asked_for() -> None:
    assert chosen_cases([], []) == list(CASES.values())
    assert chosen_cases([], ["width"]) == SWEEPS["width"]
    assert chosen_cases(["cold-20k"], ["envs"]) == [CASES["cold-20k"], *SWEEPS["envs"]]
    with pytest.raises(ValueError, match="unknown case cold; known: ppo-halfcheetah-8x256"):
        chosen_cases(["cold"], [])


def test_stock_libraries_are_tried_with_both_vector_environments_and_both_thread_counts() -> None:
    ways = variants(CHEETAH, SB3, "true", n_cores=2)
    assert {(way.threads, way.vec_env) for way in ways} == {(1, "dummy"), (1, "subproc"), (2, "dummy"), (2, "subproc")}
    assert variants(CHEETAH, SB3, "true", n_cores=1) == [Variant(SB3, 1, "dummy")]  # 8 processes would be too many
    assert {way.vec_env for way in variants(CASES["ppo-halfcheetah-1x2048"], SB3, "true", 2)} == {"dummy"}


def test_there_are_no_more_processes_than_four_per_core() -> None:
    _, _, _, many = SWEEPS["envs"]
    assert many.n_envs == 128
    assert {way.vec_env for way in variants(many, SB3, "true", n_cores=31)} == {"dummy"}
    assert {way.vec_env for way in variants(many, SB3, "true", n_cores=32)} == {"dummy", "subproc"}


def test_ours_is_run_one_way_and_a_cold_run_decides_by_itself_what_to_compile() -> None:
    assert variants(CHEETAH, OURS, "true", 2) == [Variant(OURS, 1, "fast", "true")]
    assert variants(CASES["cold-20k"], OURS, "true", 2) == [Variant(OURS, 1, "fast", "auto")]
    assert [way.threads for way in variants(CASES["ppo-naturecnn-84x84x4-8x128"], OURS, "true", 2)] == [1, 2]


def test_the_recipe_says_what_is_not_a_default() -> None:
    assert CASES["ppo-cartpole-8x32"].recipe == "PPO CartPole-v1, 8 × 32, batch_size=256, n_epochs=20"
    assert SWEEPS["width"][1].recipe == "PPO HalfCheetah-v5, 8 × 256, 256x256, normalised"


@pytest.mark.parametrize(("algo", "ours", "stock"), [("ppo", PPOPlus, PPO), ("a2c", A2CPlus, A2C)])
def test_our_side_has_the_stock_settings(algo: str, ours: Any, stock: Any) -> None:
    found, settings = our_class({"algo": algo, "normalize": True, "compile": "true"})
    assert found is ours
    model, reference = ours("MlpPolicy", "Pendulum-v1", **settings), stock("MlpPolicy", "Pendulum-v1")
    common = set(vars(reference)) & set(ours.hparams_class.names())
    changed = {name for name in common if getattr(model, name) != getattr(reference, name)}
    assert {name for name in changed if name not in ("clip_range", "lr_schedule")} == set()
    if algo == "ppo":
        assert settings["clip_range"] == 0.2 and reference.clip_range(1.0) == 0.2
        assert (settings["recompute_advantages"], settings["n_critic_epochs"]) == (False, None)
    assert (settings["sb3_exact"], settings["compile"], settings["normalize_observations"]) == (False, True, True)
    assert presets.SB3_PPO["sb3_exact"] is True


def test_the_image_environment_is_a_gymnasium_environment() -> None:
    env: gym.Env[Any, Any] = SyntheticImages()
    check_env(env, skip_render_check=True)
    assert env.observation_space.shape == (84, 84, 4)


# --- the stopwatch ----------------------------------------------------------------------------------------------------


def test_speed_is_that_after_the_warm_up_and_the_rest_of_the_warm_up_is_compiling() -> None:
    # Two iterations of warm-up take 13 s, three measured ones 2 s each: 4 s of the 13 are training.
    result = measured([0.0, 10.0, 13.0, 15.0, 17.0, 19.0], n_warm_up=2, steps_per_iteration=100)
    assert (result["steps"], result["seconds"], result["steps_per_second"]) == (300, 6.0, 50.0)
    assert (result["warm_up_seconds"], result["compile_seconds"]) == (13.0, 9.0)


def test_a_run_without_measured_iterations_is_an_error() -> None:
    with pytest.raises(ValueError, match="too few"):
        measured([0.0, 1.0], n_warm_up=1, steps_per_iteration=100)


def stopwatch(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Stopwatch:
    ticks = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    spec = {"n_envs": 8, "n_steps": 256, "warm_up_steps": 4096, "cold_steps": None, "seconds": 5.0}
    return Stopwatch({**spec, **changes, "spawned_at": time.time()})


def test_the_warm_up_is_whole_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stopwatch(monkeypatch).n_warm_up == 2
    assert stopwatch(monkeypatch, n_steps=300).n_warm_up == 2
    assert stopwatch(monkeypatch, n_envs=128).n_warm_up == 1


def test_a_run_ends_when_enough_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = stopwatch(monkeypatch)

    def learn() -> None:
        while True:
            watch.iteration_begins()

    watch.run(learn)
    # One second per iteration: two of warm-up, five measured.
    assert watch.marks == [float(i) for i in range(8)]
    result = watch.result()
    assert result["steps_per_second"] == 2048.0
    assert result["versions"]["torch"]


def test_a_cold_run_goes_to_its_end_and_counts_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = stopwatch(monkeypatch, cold_steps=20_000, seconds=0.0)
    times = iter([50.0, 60.0])
    watch.imported()

    def learn() -> None:
        for _ in range(10):
            watch.iteration_begins()

    monkeypatch.setattr(time, "time", lambda: next(times))
    watch.imported_at = 40.0
    watch.run(learn)
    result = watch.result()
    assert (result["steps"], result["seconds"], result["steps_per_second"]) == (20480, 20.0, 1024.0)


# --- best of, ratios --------------------------------------------------------------------------------------------------


def test_the_fastest_way_is_the_one_with_the_largest_median() -> None:
    runs = [a_run(variant="a", speed=s) for s in (1, 2, 100)] + [a_run(variant="b", speed=s) for s in (3, 4, 5)]
    assert report.best_variant(runs) == "b"
    assert report.best_variant([]) is None


def test_ratios_are_taken_within_rounds() -> None:
    ours = {i: a_run(OURS, i, speed) for i, speed in {1: 300.0, 2: 100.0, 4: 7.0}.items()}
    theirs = {i: a_run(SB3, i, speed) for i, speed in {1: 100.0, 2: 50.0, 3: 9.0}.items()}
    assert report.ratios(ours, theirs) == [3.0, 2.0]


def test_rounds_are_those_of_the_way_that_took_part_most_often() -> None:
    few = [a_run(index=1, speed=500.0, variant="few")]
    many = [a_run(index=i, variant="many") for i in (1, 2)]
    pilots = [a_run(index=i, variant="pilot", phase="pilot") for i in (1, 2, 3)]
    found = report.rounds_of([*few, *many, *pilots], CHEETAH.name, SB3)
    assert {index: run["variant"] for index, run in found.items()} == {1: "many", 2: "many"}
    assert report.rounds_of(pilots, CHEETAH.name, SB3) == {}


# --- table, notes, chart ----------------------------------------------------------------------------------------------


RUNS = [
    *(a_run(OURS, i, speed) for i, speed in ((1, 800.0), (2, 900.0), (3, 1000.0))),
    *(a_run(SB3, i, speed) for i, speed in ((1, 100.0), (2, 150.0), (3, 200.0))),
]
FAILURES = {(CHEETAH.name, RLOX): "no wheel | for this Python"}


def test_a_row_has_medians_and_ranges() -> None:
    ours, theirs, failed = report.rows(RUNS, FAILURES)
    assert ours.speed == Spread(900.0, 800.0, 1000.0)
    assert ours.ratio == Spread(6.0, 5.0, 8.0)
    assert ours.compile_seconds == (10.0, (10 / 2 + 10 / 3) / 2)
    assert (ours.start_seconds, ours.memory_mb, ours.n_rounds) == (2.5, 350.0, 3)
    assert theirs.ratio == Spread(1.0, 1.0, 1.0) and theirs.compile_seconds == ()
    assert failed == Row(CHEETAH.name, RLOX, failed=FAILURES[CHEETAH.name, RLOX])


def test_trpo_is_compared_with_sb3_contrib_and_a_script_has_a_row() -> None:
    trpo = [a_run(OURS, 1, 300.0, case=TRPO.name), a_run(CONTRIB, 1, 100.0, case=TRPO.name)]
    assert [row.ratio.median for row in report.rows(trpo, {}) if row.ratio] == [3.0, 1.0]
    script = [*RUNS, a_run(CLEANRL, 1, 50.0)]
    assert [row.library for row in report.rows(script, {})] == [OURS, SB3, CLEANRL]


def test_the_table_has_a_line_for_each_library_and_for_each_failure() -> None:
    lines = report.table(report.rows(RUNS, FAILURES)).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == (
        "| ppo-halfcheetah-8x256 | sb3_pgplus | DummyVecEnv, 1 thread | 900 (800–1,000) | 6.00 (5.00–8.00) | 2.5 "
        "| 10.0 / 4.2 | 350 |"
    )
    assert lines[3].endswith("| 150 (100–200) | 1.00 | 2.5 | – | 350 |")
    assert "failed: no wheel / for this Python" in lines[4]


def test_notes_say_machine_seeds_versions_cold_seconds_and_the_share_of_physics() -> None:
    cold = [a_run(OURS, i, case="cold-20k", steps=20480, seconds=s) for i, s in ((1, 4.0), (2, 5.0), (3, 9.0))]
    share = [a_run(OURS, i, case="rollout-physics-share", physics_share=s) for i, s in ((1, 0.5), (2, 0.6))]
    text = report.notes([*cold, *share])
    assert "* cold-20k: sb3_pgplus takes 5.0 (4.0–9.0) s for 20,480 steps." in text
    assert "* rollout-physics-share: 55 (50–60) % of a rollout's time is MuJoCo's own step." in text
    assert "* Measured on: a processor, 2 cores; seeds 1 to 3, one per round." in text
    assert "python 3.11.7" in text and "torch 2.13.0" in text


def test_a_block_is_replaced_between_its_markers() -> None:
    page = f"before\n{report.BEGIN}old\n{report.END}\nafter\n"
    assert report.replaced_block(page, "new\n") == f"before\n{report.BEGIN}new\n{report.END}\nafter\n"
    with pytest.raises(ValueError, match="no block"):
        report.replaced_block("nothing", "new")


def test_the_chart_is_the_same_file_every_time(tmp_path: Path) -> None:
    rows = report.rows(RUNS, FAILURES)
    for name in ("a.svg", "b.svg"):
        report.draw(rows, tmp_path / name)
    drawn = (tmp_path / "a.svg").read_bytes()
    assert drawn == (tmp_path / "b.svg").read_bytes()
    assert b"sb3_pgplus, 900 steps/s" in drawn


def test_the_pages_hold_what_the_stored_results_give(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pages = {"PAGE": tmp_path / "page.md", "README": tmp_path / "readme.md", "CHART": tmp_path / "images" / "speed.svg"}
    for name, path in pages.items():
        monkeypatch.setattr(command, name, path)
    store = tmp_path / "store"
    monkeypatch.setattr(command, "STORE", store)
    for page in (pages["PAGE"], pages["README"]):
        page.write_text(f"{report.BEGIN}{report.END}\n", encoding="utf-8")
    console, options = SimpleNamespace(), argparse.Namespace(store=store)

    command.write_report(options, console)  # type: ignore[arg-type]
    assert "`make benchmark` measures" in pages["PAGE"].read_text(encoding="utf-8")
    assert "![" not in pages["README"].read_text(encoding="utf-8") and not pages["CHART"].exists()

    for run in RUNS:
        path = store / run["case"] / f"{run['variant']}-round{run['index']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run), encoding="utf-8")
    command.write_report(options, console)  # type: ignore[arg-type]
    assert "6.00 (5.00–8.00)" in pages["PAGE"].read_text(encoding="utf-8")
    assert "docs/images/speed.svg" in pages["README"].read_text(encoding="utf-8") and pages["CHART"].exists()


def test_the_pages_of_the_repository_hold_what_its_stored_results_give() -> None:
    runs, failures = report.stored_runs(command.STORE), report.stored_failures(command.STORE)
    block = command.PAGE.read_text(encoding="utf-8").partition(report.BEGIN)[2].partition(report.END)[0]
    shown = report.table(report.rows(runs, failures)) if runs else "Nothing is stored yet."
    assert shown in block, "write it anew: make benchmark ARGS=--table"


# --- making the runs --------------------------------------------------------------------------------------------------


def benchmark(monkeypatch: pytest.MonkeyPatch, store: Path, execute: Any) -> command.Benchmark:
    monkeypatch.setattr(command, "execute", execute)
    monkeypatch.setattr(command, "python_of", lambda library: Path("python"))
    monkeypatch.setattr(command, "n_cores", lambda: 2)
    monkeypatch.setattr(command, "CACHE", store / "cache")
    options = argparse.Namespace(
        cases=[CHEETAH], rounds=2, pilots=1, seconds=1, pilot_seconds=1, compile="true", cleanrl=None, store=store
    )
    progress = SimpleNamespace(add_task=lambda *a, **k: 0, update=lambda *a, **k: None, advance=lambda *a: None)
    progress.console = SimpleNamespace(print=lambda *a, **k: None)
    return command.Benchmark(options, progress)  # type: ignore[arg-type]


def test_pilots_choose_rounds_take_turns_and_a_second_call_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[tuple[str, str, int]] = []

    def execute(spec: dict[str, Any], _: dict[str, str]) -> dict[str, Any]:
        made.append((spec["library"], spec["vec_env"], spec["threads"]))
        return {"steps_per_second": 10.0 * spec["threads"] + (spec["vec_env"] == "subproc")}

    benchmark(monkeypatch, tmp_path, execute).measure(CHEETAH)
    # Pilots of 4 + 4 + 2 ways; ours has only one. SB3 and SBX are fastest with processes and two threads.
    assert len(made[:10]) == len(set(made[:10])) and OURS not in {library for library, _, _ in made[:10]}
    one_round = [(OURS, "fast", 1), (SB3, "subproc", 2), (SBX, "subproc", 2), (RLOX, "dummy", 2)]
    assert made[10:] == one_round * 2
    made.clear()
    benchmark(monkeypatch, tmp_path, execute).measure(CHEETAH)
    assert made == []


def test_a_library_that_fails_is_reported_and_tried_again_and_stops_nobody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    works = {OURS, SB3, RLOX}
    calls: list[str] = []
    is_installed = True

    def python_of(library: str) -> Path:
        if library == RLOX and not is_installed:
            raise libraries.InstallationError("no wheel")
        return Path("python")

    def execute(spec: dict[str, Any], _: dict[str, str]) -> dict[str, Any]:
        calls.append(spec["library"])
        if spec["library"] not in works:
            raise command.RunError("it broke")
        return {"steps_per_second": 10.0}

    made = benchmark(monkeypatch, tmp_path, execute)
    monkeypatch.setattr(command, "python_of", python_of)
    is_installed = False
    made.measure(CHEETAH)
    # All four ways of SBX are tried once, and no round after that.
    assert (calls.count(SBX), calls.count(RLOX), calls.count(OURS)) == (4, 0, 2)
    wanted = {(CHEETAH.name, SBX): "it broke", (CHEETAH.name, RLOX): "no wheel"}
    assert report.stored_failures(tmp_path) == wanted
    works.add(SBX)
    calls.clear()
    is_installed = True
    made.measure(CHEETAH)
    assert set(calls) == {SBX, RLOX} and report.stored_failures(tmp_path) == {}


def test_a_way_that_fails_leaves_the_library_its_other_ways(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def execute(spec: dict[str, Any], _: dict[str, str]) -> dict[str, Any]:
        if (spec["library"], spec["vec_env"]) == (SB3, "subproc"):
            raise command.RunError("no processes here")
        return {"steps_per_second": 10.0 * spec["threads"]}

    benchmark(monkeypatch, tmp_path, execute).measure(CHEETAH)
    rounds = report.rounds_of(report.stored_runs(tmp_path), CHEETAH.name, SB3)
    assert {index: run["variant"] for index, run in rounds.items()} == dict.fromkeys((1, 2), "SB3-dummy-2")


def test_a_script_is_measured_by_the_lines_it_prints(tmp_path: Path) -> None:
    script = tmp_path / "ppo.py"
    script.write_text("import sys\nfor i in range(10**6):\n    print('SPS:', i, sys.argv[1])\n", encoding="utf-8")
    spec = {
        **CASES["ppo-halfcheetah-1x2048"].spec(),
        **{"library": CLEANRL, "python": sys.executable, "script": str(script), "seed": 1, "seconds": 0.1},
        **{"result": str(tmp_path / "result.json"), "spawned_at": time.time()},
    }
    result: Any = command.execute(spec, dict(os.environ))
    assert result["steps"] > 0 and result["steps"] % 2048 == 0 and result["seconds"] >= 0.1

    script.write_text("raise SystemExit('no such option')", encoding="utf-8")
    (tmp_path / "result.json").unlink()
    with pytest.raises(command.RunError, match="the script ended early: no such option"):
        command.execute(spec, dict(os.environ))


def test_a_failed_installation_says_the_last_line_without_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"Collecting it\nERROR: no file {libraries.ROOT}/x\n\n"
    assert libraries.last_line(text) == "ERROR: no file ./x"
    monkeypatch.setattr(libraries, "REQUIREMENTS", {})
    assert libraries.python_of(SB3).is_file()


@pytest.mark.parametrize(("phase", "index", "kept"), [("round", 1, False), ("round", 2, True), ("pilot", 1, True)])
def test_only_the_first_round_begins_with_an_empty_compiler_cache(
    phase: str, index: int, kept: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "CACHE", tmp_path)
    cached = tmp_path / "inductor" / CHEETAH.name / "kernel"
    cached.mkdir(parents=True)
    ours = Variant(OURS, 1, "fast", "true")
    found = command.environment(command.Run(CHEETAH, ours, phase, index), tmp_path / "run")
    assert (found["TORCHINDUCTOR_CACHE_DIR"], cached.exists()) == (str(cached.parent), kept)
    cold = command.environment(command.Run(CASES["cold-20k"], ours, phase, index), tmp_path / "run")
    assert cold["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "run" / "inductor")
