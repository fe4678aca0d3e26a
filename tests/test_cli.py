"""The command line with real, tiny trainings: what a run leaves, what is refused in which words, what Ctrl-C does."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import pytest
import torch as th
import yaml
from typer.testing import CliRunner

from sb3_pgplus import PPOPlus, playing
from sb3_pgplus.cli import app
from sb3_pgplus.configs import ConfigError, resolve_settings
from sb3_pgplus.run_folder import create_run_folder
from sb3_pgplus.training import TrainingError, train

TINY = ("--n-envs", "2", "--set", "n_steps=64", "--set", "n_epochs=1", "--set", "batch_size=64", "--no-progress")
TRAIN = ("train", "--env", "CartPole-v1", "--n-timesteps", "1e3", "--eval-episodes", "2", *TINY)


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return str(result.output)


def unwrapped(output: str) -> str:
    """The text of a panel or table, without its lines."""
    return " ".join(re.sub("[─│╭╮╰╯┏┓┗┛━┃┡┩└┘┳╇┴]", " ", output).split())


def parameters(path: Path) -> dict[str, th.Tensor]:
    return PPOPlus.load(path, device="cpu").policy.state_dict()


def same_parameters(first: Path, second: Path) -> bool:
    a, b = parameters(first), parameters(second)
    return a.keys() == b.keys() and all(th.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One finished run and what was printed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return folder, succeed(*TRAIN, "--seed", "3", "--out", folder)


@pytest.fixture
def copied(trained: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


# --- train ------------------------------------------------------------------------------------------------------------


def test_a_run_folder_is_complete(trained: tuple[Path, str]) -> None:
    folder, _ = trained
    assert {path.name for path in folder.iterdir()} == {
        "config.yml",
        "episodes.csv",
        "evaluation.yml",
        "learning_curve.png",
        "model.zip",
        "progress.csv",
    }
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert PPOPlus.load(folder / "model.zip").num_timesteps == 1024  # whole rollouts of 2 x 64


def test_the_config_holds_every_hyperparameter_with_its_value(trained: tuple[Path, str]) -> None:
    config = yaml.safe_load((trained[0] / "config.yml").read_text(encoding="utf-8"))
    expected = {"algo": "ppoplus", "env": "CartPole-v1", "seed": 3, "n_envs": 2, "n_timesteps": 1000, "backend": "auto"}
    assert config.items() >= (expected | {"policy": "MlpPolicy", "n_epochs": 1, "learning_rate": "lin_0.001"}).items()
    assert config.keys() >= set(PPOPlus.hparams_class.names())
    assert config["made_with"].keys() >= {"python", "sb3_pgplus", "stable_baselines3", "torch", "gymnasium", "numpy"}


def test_progress_and_episodes_are_recorded(trained: tuple[Path, str]) -> None:
    with (trained[0] / "progress.csv").open(encoding="utf-8") as file:
        progress = list(csv.DictReader(file))
    assert [int(row["time/total_timesteps"]) for row in progress] == list(range(128, 1025, 128))
    with (trained[0] / "episodes.csv").open(encoding="utf-8") as file:
        episodes = list(csv.DictReader(file))
    steps = [int(row["step"]) for row in episodes]
    assert steps == sorted(steps) and 0 < steps[-1] <= 1024
    # What is missing in the sum are the two episodes that were still running; CartPole pays 1 per step.
    assert 0 <= 1024 - sum(int(row["length"]) for row in episodes) <= 2 * 500
    assert all(float(row["return"]) == float(row["length"]) for row in episodes)


def test_the_start_names_settings_and_changes_the_end_names_results_and_commands(trained: tuple[Path, str]) -> None:
    output = unwrapped(trained[1])
    for text in (
        "PPOPlus on CartPole-v1",
        "1,000 in 2 environments (serial), seed 3",
        "zoo_configs/ppoplus.yml, block CartPole-v1",
        "n_steps=64 (2048)",
        "n_epochs=1 (10)",
        "2 episodes, deterministic",
        "1,024 steps in",
        "steps/s",
    ):
        assert text in output
    assert f"evaluate {trained[0]}" in trained[1] and f"enjoy {trained[0]} --record" in trained[1]


def test_the_config_of_a_run_repeats_it_in_the_same_process(trained: tuple[Path, str], tmp_path: Path) -> None:
    again = tmp_path / "again"
    succeed("train", "--config", trained[0] / "config.yml", "--out", again, "--no-progress", "--eval-episodes", "0")
    assert same_parameters(trained[0] / "model.zip", again / "model.zip")
    assert not (again / "evaluation.yml").exists()


def test_another_seed_gives_another_run(trained: tuple[Path, str], tmp_path: Path) -> None:
    config = trained[0] / "config.yml"
    other = tmp_path / "other"
    succeed("train", "--config", config, "--seed", "4", "--out", other, "--no-progress", "--eval-episodes", "0")
    assert not same_parameters(trained[0] / "model.zip", other / "model.zip")


def test_the_fastest_exact_backend_runs_the_environments_and_another_one_gives_the_same_run(tmp_path: Path) -> None:
    pytest.importorskip("mujoco", minversion="3.17")
    reacher = (*TRAIN, "--env", "Reacher-v5", "--eval-episodes", "1")
    evaluations = []
    for options, backend in (
        ((), "mujoco"),
        (("--backend", "workers"), "workers"),
        (("--set", "backend=dummy"), "dummy"),
    ):
        assert f"2 environments ({backend})" in unwrapped(succeed(*reacher, *options, "--out", tmp_path / backend))
        config = yaml.safe_load((tmp_path / backend / "config.yml").read_text(encoding="utf-8"))
        assert (config["backend"], config["made_with"]["backend"]) == (backend if options else "auto", backend)
        assert same_parameters(tmp_path / "mujoco" / "model.zip", tmp_path / backend / "model.zip")
        evaluations.append((tmp_path / backend / "evaluation.yml").read_text(encoding="utf-8"))
    assert evaluations[0] == evaluations[1] == evaluations[2]
    outputs = {
        succeed("evaluate", tmp_path / "dummy", "--n-episodes", "1", "--backend", name) for name in ("mujoco", "auto")
    }
    assert len(outputs) == 1


def test_wrappers_and_stacked_frames_work_with_every_backend_that_has_single_environments(tmp_path: Path) -> None:
    wrapper = "env_wrapper={gymnasium.wrappers.RescaleAction: {min_action: -2.0, max_action: 2.0}}"
    options = ("--env", "Pendulum-v1", "--eval-episodes", "0", "--set", wrapper, "--set", "frame_stack=2")
    succeed(*TRAIN, *options, "--out", tmp_path / "auto")
    succeed(*TRAIN, *options, "--out", tmp_path / "workers", "--backend", "workers")
    assert same_parameters(tmp_path / "auto" / "model.zip", tmp_path / "workers" / "model.zip")
    refused = run(*TRAIN, *options, "--out", tmp_path / "gymnasium", "--backend", "gymnasium")
    assert refused.exit_code == 2 and "`wrapper_class` wraps single environments" in refused.output


def test_an_envpool_run_is_evaluated_in_envpool_also_where_gymnasium_knows_no_such_environment(tmp_path: Path) -> None:
    pytest.importorskip("envpool")
    options = ("--env", "CheetahRun-v1", "--set", "policy=MultiInputPolicy", "--eval-episodes", "1")
    succeed(*TRAIN, *options, "--backend", "envpool", "--out", tmp_path / "run")
    assert "CheetahRun-v1, 1 episode" in succeed("evaluate", tmp_path / "run", "--n-episodes", "1")
    assert "unknown environment" in run("evaluate", tmp_path / "run", "--backend", "dummy").output


def test_set_reaches_the_constructor(tmp_path: Path) -> None:
    overrides = ("learning_rate=lin_1e-3", "clip_range_vf=null", "policy_kwargs.net_arch=[16]", "ent_coef=1e-2")
    options = [part for text in overrides for part in ("--set", text)]
    succeed(*TRAIN, "--n-timesteps", "100", "--eval-episodes", "0", *options, "--out", tmp_path / "run")
    model = PPOPlus.load(tmp_path / "run" / "model.zip")
    assert (model.learning_rate, model.clip_range_vf, model.ent_coef) == ("lin_1e-3", None, 0.01)
    assert model.policy.action_net.in_features == 16
    config = yaml.safe_load((tmp_path / "run" / "config.yml").read_text(encoding="utf-8"))
    assert config["policy_kwargs"] == {"net_arch": [16]} and config["ent_coef"] == 0.01


def test_progress_without_a_terminal_is_a_few_plain_lines(tmp_path: Path) -> None:
    arguments = [argument for argument in TRAIN if argument != "--no-progress"]
    output = succeed(*arguments, "--eval-episodes", "0", "--out", tmp_path / "run")
    lines = [line for line in output.splitlines() if "/1,000 steps" in line]
    assert len(lines) == 10 and lines[-1].split()[0] == "1,000/1,000"  # one for every tenth of the steps
    steps = [int(line.split("/")[0].replace(",", "")) for line in lines]
    assert steps == sorted(set(steps))
    assert all("steps/s  return" in line for line in lines)


def test_verbose_prints_sb3s_tables(tmp_path: Path) -> None:
    assert "ep_rew_mean" in succeed(*TRAIN, "--verbose", "1", "--eval-episodes", "0", "--out", tmp_path / "run")


def test_default_folders_are_numbered_and_never_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        succeed(*TRAIN, "--n-timesteps", "100", "--eval-episodes", "0", "--seed", "7")
    folders = sorted(path.name for path in (tmp_path / "runs" / "ppoplus" / "CartPole-v1").iterdir())
    assert folders == ["seed7", "seed7-2"]


def test_runs_started_at_once_get_different_folders(tmp_path: Path) -> None:
    def create(_: int) -> Path:
        return create_run_folder(None, algo="ppoplus", env="ALE/Pong-v5", seed=0, root=tmp_path).path

    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(create, range(32)))
    assert len(set(paths)) == 32
    assert {path.parent for path in paths} == {tmp_path / "ppoplus" / "ALE-Pong-v5"}


def test_of_two_runs_started_at_once_in_one_folder_one_is_refused(tmp_path: Path) -> None:
    first, second = (create_run_folder(tmp_path / "run", algo="ppoplus", env="E", seed=0) for _ in range(2))
    first.write_config({"seed": 0})
    with pytest.raises(ConfigError, match="already holds a run"):
        second.write_config({"seed": 1})
    assert yaml.safe_load(first.config.read_text(encoding="utf-8")) == {"seed": 0}


def test_without_matplotlib_a_run_only_lacks_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    output = succeed(*TRAIN, "--n-timesteps", "100", "--eval-episodes", "0", "--out", tmp_path / "run")
    assert 'No learning_curve.png: learning curves need matplotlib: pip install "sb3_pgplus[report]"' in output
    assert (tmp_path / "run" / "model.zip").exists()


# --- failures ---------------------------------------------------------------------------------------------------------


class Breaking(gym.Env[Any, Any]):
    """Works for 200 steps."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(2)
    steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        if self.steps > 200:
            raise ValueError("the simulator broke")
        return np.zeros(2, np.float32), 1.0, self.steps % 20 == 0, False, {}


@pytest.fixture
def breaking() -> Any:
    gym.register("Breaking-v0", entry_point=lambda: Breaking())
    yield "Breaking-v0"
    del gym.registry["Breaking-v0"]


def test_a_run_that_breaks_leaves_its_reason_and_no_model(breaking: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = run("train", "--env", breaking, "--n-timesteps", "1e4", "--out", folder, *TINY)
    assert result.exit_code == 1
    assert "Error: ValueError: the simulator broke (traceback in " in result.output
    assert "Traceback" not in result.output
    assert "the simulator broke" in (folder / "error.txt").read_text(encoding="utf-8")
    assert {path.name for path in folder.iterdir()} == {"config.yml", "episodes.csv", "error.txt", "progress.csv"}
    assert (folder / "progress.csv").read_text(encoding="utf-8")
    assert "the run failed, see" in run("evaluate", folder).output


def test_a_run_that_breaks_reports_to_a_caller_as_an_exception(breaking: str, tmp_path: Path) -> None:
    settings = resolve_settings(env=breaking, n_timesteps=1e4, overrides=["n_steps=64"])
    with pytest.raises(TrainingError, match="the simulator broke"):
        train(settings, out=tmp_path / "run")


BAD_INPUT = [
    (("--algo", "ppo"), r"unknown algorithm 'ppo', did you mean `ppoplus`\?; known: ppoplus"),
    (("--env", "CartPol-v1"), r"unknown environment: Environment `CartPol` doesn't exist\. Did you mean: `CartPole`\?"),
    (("--env", "CartPole"), r"unknown environment: .* write CartPole-v1\)"),
    (("--env", "CartPole-v9"), r"unknown environment: .*version `v9`"),
    (("--env", "no_such_package:Foo-v0"), r"needs the package no_such_package, which cannot be imported"),
    (("--set", "n_epoch=3"), r"unknown argument `n_epoch`, did you mean `n_epochs`\?"),
    (("--set", "n_epochs=-3"), r"`n_epochs` must be an integer >= 1, got -3"),
    (("--set", "learning_rate=fast"), r"learning_rate.*fast"),
    (("--set", "n_epochs"), r"--set n_epochs: expected name=value, as in --set n_epochs=5"),
    (("--set", "n_epochs=[3"), r"--set n_epochs=\[3, line 1, column 3: not valid YAML"),
    (("--set", "policy=NoPolicy"), r"PPOPlus: Policy NoPolicy unknown"),
    (("--set", "policy_kwargs.net_arhc=[64]"), r"unexpected keyword argument 'net_arhc'"),
    (("--n-timesteps", "0.5"), r"n_timesteps must be a whole number of at least 1, got 0\.5"),
    (("--n-envs", "0"), r"n_envs must be a whole number of at least 1, got 0"),
    (("--backend", "muhoco"), r"unknown backend 'muhoco', did you mean `mujoco`\?; known: auto, dummy, .*envpool"),
    (("--backend", "mujoco"), r"CartPole-v1: `backend='mujoco'` cannot serve this: .*CartPole-v1 is none of them"),
    (("--seed", "-1"), r"seed must be a whole number of at least 0, got -1"),
    (("--device", "abacus"), r"device.*abacus"),
    (("--config", "missing.yml"), r"cannot read the configuration missing\.yml: No such file or directory"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT, ids=[" ".join(bad) for bad, _ in BAD_INPUT])
def test_bad_input_is_one_clear_line_and_leaves_nothing(
    arguments: Sequence[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*TRAIN, *arguments)
    assert result.exit_code == 2
    assert re.match(f"Error: .*{message}", result.output), result.output
    assert result.output.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n_epochs: [1", r"settings\.yml, line 1, column \d+: not valid YAML"),
        ("- 1\n- 2", r"settings\.yml: expected a mapping of names to values, got list"),
        ("Pendulum-v1: {n_envs: 1}", r"has no block for CartPole-v1 and no default; it has: Pendulum-v1"),
        ("gama: 0.9", r"unknown argument `gama`, did you mean `gamma`\? \(settings from .*settings\.yml\)"),
    ],
)
def test_a_bad_configuration_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yml"
    path.write_text(text, encoding="utf-8")
    result = run("train", "--env", "CartPole-v1", "--config", path)
    assert result.exit_code == 2
    assert re.search(message, result.output), result.output


def test_a_wrong_value_on_the_command_line_is_not_blamed_on_the_file_alone() -> None:
    result = run("train", "--env", "CartPole-v1", "--set", "gamma=2")
    assert result.exit_code == 2
    assert re.search(r"`gamma`.*\(settings from zoo_configs/ppoplus\.yml, block CartPole-v1 and --set\)", result.output)


def test_no_environment_at_all_asks_for_one() -> None:
    result = run("train")
    assert result.exit_code == 2
    assert "Give --env, for example --env CartPole-v1" in result.output


def test_a_folder_with_a_run_is_refused_and_untouched(trained: tuple[Path, str]) -> None:
    folder, _ = trained
    before = {path: path.read_bytes() for path in folder.iterdir()}
    result = run(*TRAIN, "--out", folder)
    assert result.exit_code == 2
    assert f"{folder} already holds a run, which is never overwritten: choose another --out" in result.output
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "is a file: give --out a folder" in run(*TRAIN, "--out", tmp_path / "file").output


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = run(*TRAIN, "--set", "n_epochs=-3", "--out", tmp_path / "run", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.output and "HyperparameterError" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "missing"), r"there is no missing: give a run folder or a model's \.zip file"),
        (("evaluate", "."), r"\. holds no model\.zip: is it a run folder, and has training ended\?"),
        (("enjoy", "broken.zip", "--env", "CartPole-v1"), r"broken\.zip cannot be loaded as PPOPlus"),
        (("evaluate", "broken.zip"), r"no config\.yml beside broken\.zip .*: give --env"),
    ],
)
def test_a_run_that_cannot_be_loaded_is_explained(
    arguments: Sequence[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.zip").write_bytes(b"not a zip file")
    result = run(*arguments)
    assert result.exit_code == 2
    assert re.search(message, result.output), result.output


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def test_ctrl_c_saves_what_was_learned(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ["train", "--env", "CartPole-v1", "--n-timesteps", "1e7", *TINY, "--out", str(folder)]
    # A shell starts background jobs with SIGINT ignored, and children inherit that.
    code = "import signal as s; s.signal(s.SIGINT, s.default_int_handler); from sb3_pgplus.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        progress = folder / "progress.csv"
        wait_for(lambda: process.poll() is not None or (progress.exists() and progress.read_text().count("\n") > 2))
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert re.search(r"Interrupted after [\d,]+ steps; what was learned until then is saved", unwrapped(output))
    assert "Traceback" not in output
    assert PPOPlus.load(folder / "model.zip").num_timesteps > 0
    assert (folder / "learning_curve.png").exists() and not (folder / "evaluation.yml").exists()


# --- evaluate and enjoy -----------------------------------------------------------------------------------------------


def test_evaluate_repeats_the_evaluation_of_the_training(trained: tuple[Path, str]) -> None:
    folder, printed = trained
    table = unwrapped(printed).partition("2 episodes, deterministic")[2].partition("1,024 steps")[0]
    for path in (folder, folder / "model.zip"):
        assert table.strip() in unwrapped(succeed("evaluate", path, "--n-episodes", "2"))
    saved = yaml.safe_load((folder / "evaluation.yml").read_text(encoding="utf-8"))
    assert saved["seed"] == playing.EVALUATION_SEED and len(saved["returns"]) == 2
    assert saved["mean_return"] == np.mean(saved["returns"])
    assert f"{saved['mean_return']:,.2f} ± {saved['std_return']:,.2f}" in table


def test_sampled_actions_are_repeatable_and_depend_on_the_seed(trained: tuple[Path, str]) -> None:
    options = ("--n-episodes", "3", "--stochastic")
    first, second, other = (succeed("evaluate", trained[0], *options, "--seed", seed) for seed in ("1", "1", "2"))
    assert first == second != other
    assert "sampled actions" in first


def test_a_model_file_alone_needs_to_be_told_its_environment(trained: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copy(trained[0] / "model.zip", tmp_path / "policy.zip")
    assert "CartPole-v1, 1 episode" in succeed(
        "evaluate", tmp_path / "policy", "--env", "CartPole-v1", "--n-episodes", "1"
    )
    result = run("evaluate", tmp_path / "policy.zip", "--env", "Pendulum-v1")
    assert result.exit_code == 2
    assert "this model was not trained for Pendulum-v1: Observation spaces do not match" in result.output


def test_enjoy_records_a_video_of_every_step(copied: Path) -> None:
    output = succeed("enjoy", copied, "--record", "--n-episodes", "2")
    video = copied / "video.mp4"
    assert f"Video: {video}" in output
    steps = sum(playing.evaluate(*_played(copied), n_episodes=2).lengths)
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(video))
    assert frames == steps + 2  # and the first frame of each episode
    assert seconds == pytest.approx(frames / 50, rel=0.05)  # CartPole's own frame rate
    assert not [path for path in copied.iterdir() if path.name.startswith(".")]


def _played(folder: Path) -> tuple[Any, Any]:
    loaded = playing.load_run(folder)
    return loaded.model, loaded.environment


def test_enjoy_without_a_screen_records_instead(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playing, "has_display", lambda: False)
    output = succeed("enjoy", copied)
    assert "no screen" in output
    assert (copied / "video.mp4").stat().st_size > 1000


def test_enjoy_with_a_screen_opens_a_window(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playing, "has_display", lambda: True)  # SDL's dummy driver plays the screen
    assert "CartPole-v1, 1 episode" in succeed("enjoy", copied)
    assert not (copied / "video.mp4").exists()


def test_a_renderer_that_fails_is_explained_and_leaves_no_file(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("no GL context")

    monkeypatch.setattr("gymnasium.envs.classic_control.cartpole.CartPoleEnv.render", fail)
    result = run("enjoy", copied, "--video", copied / "videos" / "new.mp4")
    assert result.exit_code == 2
    assert "cannot render CartPole-v1 (no GL context); run: pip install" in result.output
    assert not list((copied / "videos").iterdir())


def test_advice_for_mujoco_without_a_screen_names_package_and_variable() -> None:
    env = gym.make("CartPole-v1")
    assert env.unwrapped.spec is not None
    env.unwrapped.spec.entry_point = "gymnasium.envs.mujoco.ant_v5:AntEnv"
    advice = playing._rendering_advice(env, RuntimeError("no EGL"))
    assert "libegl1 (or libosmesa6) and set MUJOCO_GL=egl (or MUJOCO_GL=osmesa)" in advice


def test_the_users_choice_of_renderer_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(playing, "has_display", lambda: False)
    monkeypatch.setattr(playing, "_mujoco_can_render", lambda backend: backend == "osmesa")
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    playing.prepare_offscreen_rendering()
    assert os.environ["MUJOCO_GL"] == "glfw"
    monkeypatch.delenv("MUJOCO_GL")
    playing.prepare_offscreen_rendering()
    assert os.environ["MUJOCO_GL"] == "osmesa"  # the first that works


def test_without_the_video_package_the_extra_is_named(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    result = run("enjoy", copied, "--record")
    assert result.exit_code == 2
    assert 'pip install "sb3_pgplus[report]"' in result.output


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "evaluate", "enjoy", "convert", "push"])
def test_every_option_is_explained(command: str) -> None:
    output = unwrapped(succeed(command, "--help"))
    assert f"{command} [OPTIONS]" in output
    assert "--debug" in output


def test_the_module_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sb3_pgplus.cli", "--help"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert all(name in output for name in ("train", "evaluate", "enjoy"))


def test_a_run_of_short_rollouts_logs_some_hundred_rows_and_not_thousands(tmp_path: Path) -> None:
    # At most 500 rows. 900 steps in rollouts of 2: 450 iterations, every one logged; 1400: 700, every second logged.
    for steps, rows in ((900, 450), (1400, 350)):
        settings = ["--set", "n_steps=1", "--n-envs", "2", "--algo", "a2cplus", "--env", "CartPole-v1", "--no-progress"]
        out = tmp_path / str(steps)
        succeed("train", *settings, "--n-timesteps", str(steps), "--out", out)
        assert len((out / "progress.csv").read_text().splitlines()) == rows + 1  # and the header
