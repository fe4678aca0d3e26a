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


def test_bias_and_variance_prints_every_estimator_and_draws(tmp_path: Path) -> None:
    sizes = ("--timesteps", "2048", "--states", "2", "--rollouts", "4", "--gamma", "0.9")
    output = run("bias_variance.py", "--env", "Pendulum-v1", *sizes, "--figure", "figure.svg", cwd=tmp_path)
    rows = {line.split("|")[1].strip(): line for line in output.splitlines() if line.startswith("| ")}
    assert {"GAE, λ = 0.95", "5-step", "Monte Carlo"} <= rows.keys()
    assert rows["Monte Carlo"].split("|")[2].strip() == "0.00"
    assert rows["GAE, λ = 0"].split("|")[2:] == rows["1-step"].split("|")[2:]
    assert (tmp_path / "figure.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        *((option, value, "at least 2") for option in ("--states", "--rollouts") for value in ("0", "1")),
        *(("--gamma", value, "between 0 and 1") for value in ("0", "1", "nan")),
    ],
)
def test_bias_and_variance_refuses_what_has_none_before_it_trains(
    option: str, value: str, allowed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bias_variance.py", option, value])
    with pytest.raises(SystemExit, match="2"):
        load("bias_variance.py").parse_arguments()
    message = capsys.readouterr().err
    assert f"{option} {value}: " in message and allowed in message


def test_bias_and_variance_of_a_chain_of_two_states_are_those_by_hand() -> None:
    # s0 → s1 → end, rewards 0 and then ±1 with probability 1/2, no discount, critic V(s0) = 3, V(s1) = c = 0.5.
    # Ψ(λ) = δ0 + λ δ1 with δ0 = c − 3 and δ1 = ±1 − c; Q = 0, so the bias is (1 − λ) c and the variance λ².
    example, c, m = load("bias_variance.py"), 0.5, 1000
    final = th.tensor([1.0, -1.0]).repeat(m // 2).double()
    zeros = th.zeros(m).double()
    rollouts = example.Rollouts(
        rewards=th.stack([zeros, final]),
        values=th.stack([zeros + 3.0, zeros + c]),
        next_values=th.stack([zeros + c, zeros]),
        dones=th.stack([zeros, zeros + 1]).bool(),
    )
    for name, estimator in example.estimators(1.0).items():
        gae_lambda = {"Monte Carlo": 1.0, "1-step": 0.0}.get(name, 1.0 if "-step" in name else None)
        gae_lambda = float(name.rpartition(" ")[2]) if gae_lambda is None else gae_lambda
        bias_squared, variance = example.bias_and_variance(estimator(rollouts) + 3.0, final)
        # Of m returns, half of them 1 and half −1, the unbiased variance is m / (m − 1).
        assert variance == pytest.approx(gae_lambda**2 * m / (m - 1)), name
        assert bias_squared == pytest.approx((1 - gae_lambda) ** 2 * (c**2 - 1 / (m - 1))), name


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1", "Hopper-v5"])
def test_bias_and_variance_begins_every_episode_in_the_given_state(env_id: str) -> None:
    if env_id == "Hopper-v5":
        pytest.importorskip("mujoco")
    example = load("bias_variance.py")
    model = PPOPlus("MlpPolicy", env_id, seed=0, device="cpu")
    player = example.Player(model, env_id, 3, 0.5)
    [(state, observation, action)] = player.visited(1, 5, seed=0)
    rollouts = player.play(state, observation, action)
    # The same state and action: the same first reward and second state in all copies, and then other actions.
    for first in (rollouts.rewards[0], rollouts.next_values[0]):
        assert th.allclose(first, first[0].expand(3))
    assert rollouts.next_values[2].std() > 1e-4
    assert player.horizon == 8  # 0.5⁸ is the first power below 0.005
    weights = 0.5 ** th.arange(8).double()
    expected = (weights[:, None] * rollouts.rewards).sum(0) + 0.5**8 * rollouts.next_values[-1]
    assert th.allclose(player.returns(rollouts), expected)
