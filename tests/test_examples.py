"""Every program in examples/ runs, as a user would start it, and does what its docstring says."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch as th

from sb3_pgplus import PPOPlus

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, *arguments: str, cwd: Path) -> str:
    # Without the variable by which a program would find a service of W&B that this process has started.
    own = {variable: value for variable, value in os.environ.items() if variable != "WANDB_SERVICE"}
    environment = own | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(name).stem, EXAMPLES / name)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_has_a_test() -> None:
    tested = set(re.findall(r"run\(\s*\"(\w+\.py)\"", Path(__file__).read_text(encoding="utf-8")))
    tested.add("wandb_sweep.py")  # in test_wandb.py: what W&B's agent does has to be done for it
    assert tested == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_says_what_a_reader_learns_and_takes_timesteps(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring and "What you learn here:" in docstring
    assert f"python examples/{path.name}" in docstring
    assert '"--timesteps"' in path.read_text(encoding="utf-8")


def test_quickstart_trains_evaluates_saves_and_loads(tmp_path: Path) -> None:
    output = run("quickstart.py", "--timesteps", "1024", "--eval-episodes", "1", "--out", "out", cwd=tmp_path)
    assert re.search(r"mean return \d+\.\d ± 0\.0 over 1 episodes", output)
    assert (tmp_path / "out" / "cartpole.zip").stat().st_size < 1_000_000
    before, after = re.findall(r"\d", output.splitlines()[-1])
    assert before == after


def test_continuous_control_evaluates_both_ways_and_films_or_says_why_not(tmp_path: Path) -> None:
    pytest.importorskip("mujoco")
    sizes = ("--timesteps", "2048", "--eval-episodes", "1", "--video-length", "10")
    output = run("continuous_control.py", *sizes, "--no-progress", "--out", "out", cwd=tmp_path)
    assert re.search(r"deterministic: mean return -?\d+\.\d ± 0\.0 over 1 episodes", output)
    assert re.search(r"stochastic: mean return -?\d+\.\d ± 0\.0 over 1 episodes", output)
    assert (tmp_path / "out" / "model.zip").is_file()
    videos = list((tmp_path / "out").glob("*.mp4"))
    assert (len(videos) == 1 and videos[0].stat().st_size > 0) or "no video: HalfCheetah-v5" in output


def test_continuous_control_takes_another_environment_and_no_video(tmp_path: Path) -> None:
    sizes = ("--timesteps", "256", "--n-envs", "32", "--eval-episodes", "1", "--seed", "3")
    output = run("continuous_control.py", "--env", "Pendulum-v1", *sizes, "--no-video", "--no-progress", cwd=tmp_path)
    assert "stochastic: mean return -" in output
    assert not list(tmp_path.rglob("*.mp4"))


def test_custom_loss_trains(tmp_path: Path) -> None:
    output = run("custom_loss.py", "--timesteps", "1024", "--eval-episodes", "1", cwd=tmp_path)
    assert re.search(r"SPO: mean return -\d+\.\d", output)


def test_custom_loss_is_short_and_overrides_the_policy_loss_only() -> None:
    assert len((EXAMPLES / "custom_loss.py").read_text(encoding="utf-8").splitlines()) < 60
    spo = load("custom_loss.py").SPO
    assert spo.__bases__ == (PPOPlus,)
    assert [name for name in vars(spo) if not name.startswith("_")] == ["policy_loss"]


def test_the_policy_loss_of_spo_has_its_extremum_at_the_edge_of_the_clip_range() -> None:
    # d/dρ [ρA − |A|/(2ε)(ρ−1)²] = A − |A|(ρ−1)/ε, which is 0 at ρ = 1 + ε for A > 0 and at ρ = 1 − ε for A < 0.
    spo = load("custom_loss.py").SPO("MlpPolicy", "CartPole-v1", clip_range=0.2, device="cpu")
    ratio = th.tensor([1.2, 0.8, 1.0, 1.0], requires_grad=True)
    advantages = th.tensor([2.0, -3.0, 2.0, -3.0])
    loss = spo.policy_loss(ratio, advantages, spo.hyperparameters_at(1.0))
    # −[(1.2·2 − 2/0.4·0.04) + (−3·0.8 − 3/0.4·0.04) + 2 − 3]/4 = −[2.2 − 2.7 − 1]/4
    assert loss.item() == pytest.approx(1.5 / 4)
    loss.backward()
    assert ratio.grad is not None
    assert ratio.grad.tolist() == pytest.approx([0.0, 0.0, -2 / 4, 3 / 4], abs=1e-6)


def test_custom_policy_keeps_its_networks_and_statistics_in_the_zip(tmp_path: Path) -> None:
    output = run("custom_policy.py", "--timesteps", "1024", "--out", "out", cwd=tmp_path)
    assert "NormalizedLayerNormPolicy" in output and "WithSquares" in output
    before, after = re.findall(r"\[[^\[\]]+\]", output.splitlines()[-1])
    assert before == after


def test_training_with_tracking_leaves_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    output = run("train_and_track.py", "--timesteps", "4096", "--out", "best", cwd=tmp_path)
    found = re.search(r"best mean return \d+\.\d, run (\w+)", output)
    assert found and list(tmp_path.glob(f"wandb/offline-run-*/run-{found[1]}.wandb"))
    assert (tmp_path / "best" / "best_model.zip").is_file()
    assert len((EXAMPLES / "train_and_track.py").read_text(encoding="utf-8").splitlines()) <= 40


def test_tuning_with_plain_optuna_names_the_best(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    output = run("tune_ppoplus.py", "--timesteps", "640", "--trials", "3", cwd=tmp_path)
    assert re.search(r"3 trials, \d of them pruned", output)
    assert re.search(r"best mean return \d+\.\d with \{'learning_rate': [\d.e-]+, 'one_minus_gamma': ", output)
    assert len((EXAMPLES / "tune_ppoplus.py").read_text(encoding="utf-8").splitlines()) <= 40
