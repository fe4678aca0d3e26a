"""
WandbCallback with the real W&B in offline mode: what is in its files afterwards, and what happens when it fails.

Online there is a stand-in for the server, which keeps no artifacts: using one is asked for, and that is all.
"""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.logger import CSVOutputFormat, Logger
from stable_baselines3.common.vec_env import VecNormalize
from typer.testing import CliRunner
from wandb_files import OfflineRun, offline_runs, records
from wandb_server import Server

from sb3_pgplus import PPOPlus, TRPOPlus, make_vec_env
from sb3_pgplus.callback_tree import callbacks_in
from sb3_pgplus.cli import app

wandb = pytest.importorskip("wandb")

from sb3_pgplus.callbacks import WandbCallback  # noqa: E402
from sb3_pgplus.callbacks.description import describe_environment, describe_training, plain  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
STEPS = 128
"""Of a rollout: 2 environments, 64 steps each."""
CONSTANT = {"learning_rate": 3e-4, "clip_range": 0.2}
"""Several calls of `learn` with schedules have a warning of their own."""


@pytest.fixture(scope="module", autouse=True)
def settings_of_wandb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """W&B reads its environment once. All of its files go to a temporary folder."""
    folder = tmp_path_factory.mktemp("wandb")
    names = {name: str(folder / name) for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR")}
    before = dict(os.environ)
    os.environ |= names | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_X_DISABLE_STATS": "true"}
    wandb.teardown()
    yield
    wandb.teardown()
    os.environ.clear()
    os.environ |= before


@pytest.fixture(autouse=True)
def finished_runs() -> Iterator[None]:
    yield
    if wandb.run is not None:
        wandb.run.finish()


def model_on(env: Any = "CartPole-v1", cls: Any = PPOPlus, **settings: Any) -> Any:
    env = make_vec_env(env, n_envs=2, seed=0) if isinstance(env, str) else env
    small = {"n_steps": 64, "policy_kwargs": {"net_arch": [8]}, "seed": 0, "device": "cpu"}
    if cls is not TRPOPlus:
        small |= {"n_epochs": 1, "batch_size": 64}
    return cls("MlpPolicy", env, **small | settings)


def tracked(folder: Path, **settings: Any) -> WandbCallback:
    return WandbCallback("a-project", init_kwargs={"dir": str(folder)}, **settings)


def written(folder: Path, callback: WandbCallback | None = None) -> OfflineRun:
    """The only run below a folder."""
    if callback is not None:
        callback.finish()
    [run] = offline_runs(folder)
    return run


def steps_of(run: OfflineRun) -> list[int]:
    return [row["global_step"] for row in run.rows]


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_every_dump_of_the_logger_is_a_row_with_the_values_of_progress_csv(tmp_path: Path) -> None:
    model, callback = model_on(), tracked(tmp_path)
    model.set_logger(Logger(str(tmp_path), [CSVOutputFormat(str(tmp_path / "progress.csv"))]))
    model.learn(4 * STEPS, callback=callback)
    model.logger.close()
    run = written(tmp_path, callback)
    with (tmp_path / "progress.csv").open() as file:
        expected = [{name: float(text) for name, text in row.items() if text} for row in csv.DictReader(file)]
    assert len(expected) == 4 and "train/loss" in expected[1] and "time/total_timesteps" in expected[0]
    own = {"global_step", "_step", "_runtime", "_timestamp"}
    assert [{name: value for name, value in row.items() if name not in own} for row in run.rows] == expected
    assert steps_of(run) == [row["time/total_timesteps"] for row in expected] == [128, 256, 384, 512]


def test_environment_steps_are_the_x_axis_of_every_metric(tmp_path: Path) -> None:
    callback = tracked(tmp_path)
    model_on().learn(STEPS, callback=callback)
    metrics = written(tmp_path, callback).of("metric")
    assert [metric.name or metric.glob_name for metric in metrics] == ["global_step", "*"]
    assert metrics[1].step_metric == "global_step"


def test_a_dump_by_hand_without_a_step_has_the_environment_steps(tmp_path: Path) -> None:
    class Dumping(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 10:
                self.logger.record("mine/number", np.float32(0.5))
                self.logger.record("mine/text", "words")
                self.logger.record("mine/array", np.zeros(3))  # W&B has no form for it
                self.logger.record("mine/hidden", 1, exclude="wandb")
                self.logger.dump()
            return True

    callback = tracked(tmp_path)
    model_on().learn(STEPS, callback=[Dumping(), callback])
    first = written(tmp_path, callback).rows[0]
    assert first["global_step"] == 20  # 10 steps of 2 environments
    assert {name: value for name, value in first.items() if "/" in name} == {"mine/number": 0.5, "mine/text": "words"}


def test_tracking_does_not_change_the_training(tmp_path: Path) -> None:
    plain_model = model_on().learn(3 * STEPS)
    tracked_model = model_on().learn(3 * STEPS, callback=tracked(tmp_path, histograms="all", histogram_freq=1))
    both = zip(plain_model.policy.parameters(), tracked_model.policy.parameters(), strict=True)
    assert all(th.equal(a, b) for a, b in both)


# --- several trainings, one run ---------------------------------------------------------------------------------------


def test_further_calls_of_learn_go_on_in_the_same_run_and_its_steps_never_fall(tmp_path: Path) -> None:
    model, callback = model_on(**CONSTANT), tracked(tmp_path)
    model.learn(2 * STEPS, callback=callback)
    model.learn(STEPS, callback=callback, reset_num_timesteps=False)
    model.learn(2 * STEPS, callback=tracked(tmp_path))  # counts from 0 again, and with another callback
    assert model.num_timesteps == 2 * STEPS
    run = written(tmp_path, callback)
    assert steps_of(run) == [128, 256, 384, 512, 640]
    assert [row["_step"] for row in run.rows] == [0, 1, 2, 3, 4]
    assert run.exit_code == 0 and run.run.run_id == model.wandb_run_id


def test_a_loaded_model_that_continues_resumes_its_run(tmp_path: Path) -> None:
    model, callback = model_on(**CONSTANT), tracked(tmp_path / "first")
    model.learn(2 * STEPS, callback=callback)
    callback.finish()
    model.save(tmp_path / "model.zip")
    loaded = PPOPlus.load(tmp_path / "model.zip", env=make_vec_env("CartPole-v1", n_envs=2), device="cpu")
    again = tracked(tmp_path / "second")
    loaded.learn(STEPS, callback=again, reset_num_timesteps=False)
    first, second = written(tmp_path / "first"), written(tmp_path / "second", again)
    assert first.run.run_id == second.run.run_id == model.wandb_run_id
    assert second.run.resume  # `wandb sync` appends it
    assert steps_of(first) + steps_of(second) == [128, 256, 384]


def test_steps_of_a_resumed_run_count_on_after_learns_that_began_at_zero(tmp_path: Path) -> None:
    model, callback = model_on(**CONSTANT), tracked(tmp_path / "first")
    model.learn(STEPS, callback=callback)
    model.learn(STEPS, callback=callback)
    model.save(tmp_path / "model.zip")
    callback.finish()
    loaded = PPOPlus.load(tmp_path / "model.zip", env=make_vec_env("CartPole-v1", n_envs=2), device="cpu")
    again = tracked(tmp_path / "second")
    loaded.learn(STEPS, callback=again, reset_num_timesteps=False)
    assert steps_of(written(tmp_path / "first")) == [128, 256]
    assert steps_of(written(tmp_path / "second", again)) == [384]


def test_rows_that_a_run_has_already_are_not_logged_again(tmp_path: Path) -> None:
    """A training that was killed after its last checkpoint repeats some steps; here the run is still open."""
    model, callback = model_on(**CONSTANT), tracked(tmp_path)
    model.learn(2 * STEPS, callback=callback)
    model.save(tmp_path / "checkpoint.zip")
    model.learn(2 * STEPS, callback=callback, reset_num_timesteps=False)
    loaded = PPOPlus.load(tmp_path / "checkpoint.zip", env=make_vec_env("CartPole-v1", n_envs=2), device="cpu")
    loaded.learn(3 * STEPS, callback=callback, reset_num_timesteps=False)
    assert steps_of(written(tmp_path, callback)) == [128, 256, 384, 512, 640]


def test_a_loaded_model_that_begins_anew_is_a_new_run(tmp_path: Path) -> None:
    model, callback = model_on(), tracked(tmp_path / "first")
    model.learn(STEPS, callback=callback)
    callback.finish()
    model.save(tmp_path / "model.zip")
    loaded = PPOPlus.load(tmp_path / "model.zip", env=make_vec_env("CartPole-v1", n_envs=2), device="cpu")
    again = tracked(tmp_path / "second")
    loaded.learn(STEPS, callback=again)
    assert written(tmp_path / "second", again).run.run_id == loaded.wandb_run_id != model.wandb_run_id


def test_the_next_model_has_a_run_of_its_own_and_ends_the_one_before(tmp_path: Path) -> None:
    models = [model_on(seed=seed).learn(STEPS, callback=tracked(tmp_path)) for seed in (0, 1)]
    [first] = offline_runs(tmp_path, models[0].wandb_run_id)
    assert first.exit_code == 0 and steps_of(first) == [128]
    assert wandb.run is not None and wandb.run.id == models[1].wandb_run_id != models[0].wandb_run_id


def test_a_run_that_the_user_has_begun_is_used_and_left_open(tmp_path: Path) -> None:
    with wandb.init(project="mine", dir=tmp_path, config={"note": "kept"}) as own:
        model, callback = model_on(), tracked(tmp_path)
        model.learn(STEPS, callback=callback)
        assert callback.run is own and model.wandb_run_id == own.id
        callback.finish()
        assert wandb.run is own
        own.log({"after": 1})
    run = written(tmp_path)
    assert run.run.project == "mine" and run.config["note"] == "kept" and run.config["algo"] == "PPOPlus"
    assert [row.get("after") for row in run.rows] == [None, 1] and len(run.models) == 1


def test_rows_are_on_the_disk_before_the_run_ends(tmp_path: Path) -> None:
    """So that a process that is killed has not been tracked in vain."""
    callback = tracked(tmp_path)
    model_on().learn(2 * STEPS, callback=callback)
    [file] = tmp_path.rglob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 8  # W&B's own interval is 15 seconds
    while len([record for record in records(file) if record.HasField("history")]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    callback.finish()


def test_a_disabled_run_leaves_nothing(tmp_path: Path) -> None:
    model, callback = model_on(), tracked(tmp_path, mode="disabled", histograms="all")
    model.learn(STEPS, callback=callback)
    callback.finish()
    assert not list(tmp_path.iterdir()) and not hasattr(model, "wandb_run_id")


# --- configuration ----------------------------------------------------------------------------------------------------


def git(*arguments: str, folder: Path) -> str:
    identity = ("-c", "user.name=me", "-c", "user.email=me@example.org")
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_the_configuration_is_what_was_set_in_plain_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "script.py").touch()
    git("init", "-q", folder=tmp_path)
    git("add", "script.py", folder=tmp_path)
    git("commit", "-qm", "one", folder=tmp_path)
    monkeypatch.chdir(tmp_path)
    env = make_vec_env("CartPole-v1", n_envs=2, wrapper_class=gym.wrappers.TimeAwareObservation)
    settings = {"policy_kwargs": {"net_arch": [8], "activation_fn": th.nn.ReLU}, "clip_range": lambda p: 0.1 + 0.1 * p}
    model, callback = model_on(env, **settings), tracked(tmp_path, config={"mine": object, "numbers": np.arange(2)})
    model.learn(STEPS, callback=callback)
    config = written(tmp_path, callback).config
    assert not re.search(r" at 0x|\bobject at\b", json.dumps(config))
    assert config.items() >= model.hyperparameters().items()
    assert config["clip_range"].endswith("<lambda>: 0.2 → 0.15 → 0.1") and config["learning_rate"] == "lin_3e-4"
    assert config["policy_kwargs"] == {"net_arch": [8], "activation_fn": "torch.nn.modules.activation.ReLU"}
    assert config["algo"] == "PPOPlus" and config["seed"] == 0 and config["total_timesteps"] == STEPS
    assert config["mine"] == "builtins.object" and config["numbers"] == [0, 1]
    environment = config["environment"]
    assert environment["id"] == "CartPole-v1" and environment["max_episode_steps"] == 500
    assert environment["wrappers"][-2:] == ["Monitor", "TimeAwareObservation"]
    assert config["n_envs"] == 2  # what there is, not the constructor's argument, which is 1
    assert config["versions"]["torch"] == th.__version__
    assert config["git"] == {"commit": git("rev-parse", "HEAD", folder=tmp_path).strip(), "changed": False}


def test_a_change_in_the_work_tree_is_noted(tmp_path: Path) -> None:
    from sb3_pgplus.callbacks.description import git_state

    assert git_state(tmp_path) is None  # no repository
    git("init", "-q", folder=tmp_path)
    assert git_state(tmp_path) is None  # no commit
    (tmp_path / "script.py").touch()
    git("add", "script.py", folder=tmp_path)
    git("commit", "-qm", "one", folder=tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "new").touch()
    state = git_state(tmp_path)
    assert state is not None and not state["changed"]  # files that git does not know are results
    (tmp_path / "script.py").write_text("print()")
    changed = git_state(tmp_path)
    assert changed is not None and changed["changed"] and changed["commit"] == state["commit"]


@pytest.mark.parametrize("backend", ["dummy", "subproc", "workers", "gymnasium"])
def test_every_backend_names_its_environment(backend: str) -> None:
    env = make_vec_env("CartPole-v1", n_envs=2, backend=backend)
    described = describe_environment(VecNormalize(env))
    env.close()
    assert described["id"] == "CartPole-v1" and described["backend"] == backend
    assert described["vec_wrappers"] == ["VecNormalize"]
    assert backend == "gymnasium" or described["wrappers"][-1] == "Monitor"


def test_stock_models_are_described_as_well() -> None:
    config = describe_training(PPO("MlpPolicy", "CartPole-v1", n_steps=64, device="cpu"))
    assert config.items() >= {"algo": "PPO", "learning_rate": 3e-4, "clip_range": 0.2, "n_steps": 64}.items()
    assert " at 0x" not in json.dumps(config)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.zeros((8, 8)), "array of shape (8, 8), float64"),
        ({1: (2, None)}, {"1": [2, None]}),
        (th.nn.Tanh, "torch.nn.modules.activation.Tanh"),
        (th.nn.Tanh(), "Tanh()"),
        (json.dumps, "json.dumps"),
        (object(), "builtins.object"),
        ([lambda: 0], [f"{__name__}.<lambda>"]),
        ("<f at 0x7f12>", "<f>"),
    ],
)
def test_plain_values(value: Any, expected: Any) -> None:
    assert plain(value) == expected


# --- models, videos, histograms ---------------------------------------------------------------------------------------


def same_parameters(model: Any, path: Path) -> bool:
    loaded = PPOPlus.load(path, device="cpu")
    return all(th.equal(a, b) for a, b in zip(model.policy.parameters(), loaded.policy.parameters(), strict=True))


def test_models_are_artifacts_with_aliases(tmp_path: Path) -> None:
    model, callback = model_on(), tracked(tmp_path, model_freq=2 * STEPS)
    model.learn(3 * STEPS, callback=callback)
    run = written(tmp_path, callback)
    assert [aliases for aliases, _ in run.models] == [{"latest", "step-256"}, {"latest", "step-384"}]
    assert same_parameters(model, run.models[1][1]) and not same_parameters(model, run.models[0][1])
    assert model.wandb_artifact == f"a-project/model-{run.run.run_id}:step-384"
    metadata = json.loads(run.of("artifact")[1].metadata)
    assert metadata == {"algo": "PPOPlus", "step": 384}


def test_the_model_of_the_best_evaluation_is_the_artifact_best(tmp_path: Path) -> None:
    model = model_on()
    evaluation = EvalCallback(make_vec_env("CartPole-v1", seed=9), eval_freq=64, n_eval_episodes=3, verbose=0)
    evaluation.best_model_save_path = str(tmp_path)  # the folder of best_model.zip
    callback = tracked(tmp_path)
    model.learn(4 * STEPS, callback=[evaluation, callback])
    run = written(tmp_path, callback)
    best = [(aliases, file) for aliases, file in run.models if "best" in aliases]
    scores = [row["eval/mean_reward"] for row in run.rows if "eval/mean_reward" in row]
    assert len(best) == sum(score > max(scores[:i], default=-math.inf) for i, score in enumerate(scores)) >= 1
    assert best[-1][1].read_bytes() == (tmp_path / "best_model.zip").read_bytes()
    assert run.summary["eval/best_mean_reward"] == max(scores) == evaluation.best_mean_reward


def test_without_a_file_the_best_model_is_the_one_that_was_evaluated(tmp_path: Path) -> None:
    before: list[th.Tensor] = []

    class Evaluation(BaseCallback):
        best_mean_reward = -math.inf

        def _on_step(self) -> bool:
            if self.n_calls == 40:  # in the middle of the first rollout
                self.best_mean_reward = 5.0
                before.extend(parameter.detach().clone() for parameter in self.model.policy.parameters())
            return True

    model, callback = model_on(), tracked(tmp_path, model_freq=STEPS)
    model.learn(STEPS, callback=[Evaluation(), callback])
    run = written(tmp_path, callback)
    assert [aliases for aliases, _ in run.models] == [{"best", "latest", "step-128"}, {"latest", "step-128"}]
    loaded = PPOPlus.load(run.models[0][1], device="cpu")
    assert all(th.equal(a, b) for a, b in zip(before, loaded.policy.parameters(), strict=True))


def test_the_statistics_of_a_vec_normalize_are_in_the_artifact(tmp_path: Path) -> None:
    env = VecNormalize(make_vec_env("CartPole-v1", n_envs=2))
    callback = tracked(tmp_path)
    with pytest.warns(UserWarning, match="VecNormalize normalises"):
        model = model_on(env)
    model.learn(STEPS, callback=callback)
    [artifact] = written(tmp_path, callback).of("artifact")
    assert {entry.path for entry in artifact.manifest.contents} == {"model.zip", "vecnormalize.pkl"}


def test_what_the_best_evaluation_was_outlives_a_checkpoint(tmp_path: Path) -> None:
    class Evaluation(BaseCallback):
        best_mean_reward = 5.0

        def _on_step(self) -> bool:
            return True

    model, callback = model_on(**CONSTANT), tracked(tmp_path / "first")
    model.learn(STEPS, callback=[Evaluation(), callback])
    state = json.loads(json.dumps(callback.state_dict()))
    callback.finish()
    again = tracked(tmp_path / "second")
    again.load_state_dict(state)
    model.learn(STEPS, callback=[Evaluation(), again], reset_num_timesteps=False)
    assert [aliases for aliases, _ in written(tmp_path / "first").models] == [
        {"best", "latest", "step-128"},
        {"latest", "step-128"},
    ]
    assert [aliases for aliases, _ in written(tmp_path / "second", again).models] == [{"latest", "step-256"}]


def test_no_artifacts_if_not_wanted(tmp_path: Path) -> None:
    callback = tracked(tmp_path, save_model=False, model_freq=STEPS)
    model_on().learn(STEPS, callback=callback)
    assert not written(tmp_path, callback).models


def test_a_video_that_an_evaluation_leaves_is_logged_once(tmp_path: Path) -> None:
    clips = pytest.importorskip("moviepy")
    film = tmp_path / "film.mp4"
    frames = [np.full((32, 32, 3), 60 * i, np.uint8) for i in range(4)]
    clips.ImageSequenceClip(frames, fps=10).write_videofile(str(film), logger=None)

    class Evaluation(BaseCallback):
        best_mean_reward = -math.inf
        last_video_path: str | None = None

        def _on_step(self) -> bool:
            if self.n_calls == 40:
                self.last_video_path = str(film)
            return True

    callback = tracked(tmp_path)
    model_on().learn(3 * STEPS, callback=[Evaluation(), callback])
    videos = [row for row in written(tmp_path, callback).rows if "eval/video/path" in row]
    assert [row["global_step"] for row in videos] == [128]
    [run_folder] = tmp_path.rglob("offline-run-*")
    assert (run_folder / "files" / videos[0]["eval/video/path"]).read_bytes() == film.read_bytes()


def values_in(row: dict[str, Any], name: str) -> int:
    return sum(row[f"{name}/values"])


def test_histograms_of_parameters_and_gradients_count_every_value(tmp_path: Path) -> None:
    model, callback = model_on(), tracked(tmp_path, histograms="all", histogram_freq=2)
    model.learn(3 * STEPS, callback=callback)
    rows = written(tmp_path, callback).rows
    sizes = {name: parameter.numel() for name, parameter in model.policy.named_parameters()}
    for name, size in sizes.items():
        assert values_in(rows[0], f"parameters/{name}") == values_in(rows[2], f"gradients/{name}") == size
    assert not any("gradients" in name for name in rows[0])  # no update has been
    assert not any("parameters" in name or "gradients" in name for name in rows[1])


@pytest.mark.slow  # it compiles
def test_gradients_of_a_compiled_update_are_those_of_the_eager_one(tmp_path: Path) -> None:
    rows = []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        model, callback = model_on(compile=compiled), tracked(folder, histograms="gradients", histogram_freq=1)
        model.learn(2 * STEPS, callback=callback)
        assert ("update: compiled" in model.engine_report()) == compiled, model.engine_report()
        rows.append(written(folder, callback).rows[1])
    for name, parameter in model_on().policy.named_parameters():
        eager, found = (row[f"gradients/{name}/bins"] for row in rows)
        assert found == pytest.approx(eager, rel=1e-3, abs=1e-6)
        assert sum(rows[1][f"gradients/{name}/values"]) == parameter.numel()


@pytest.mark.parametrize(("which", "other"), [("parameters", "gradients"), ("gradients", "parameters")])
def test_one_kind_of_histograms(which: str, other: str, tmp_path: Path) -> None:
    callback = tracked(tmp_path, histograms=which, histogram_freq=1)
    model_on().learn(2 * STEPS, callback=callback)
    names = set().union(*written(tmp_path, callback).rows)
    assert any(name.startswith(which) for name in names) and not any(name.startswith(other) for name in names)


def test_gradients_that_an_algorithm_does_not_leave_are_named_once(tmp_path: Path) -> None:
    callback = tracked(tmp_path, histograms="gradients", histogram_freq=1)
    with pytest.warns(UserWarning, match=r"no gradient histograms of .*action_net.weight.*: TRPOPlus") as found:
        model_on(cls=TRPOPlus).learn(3 * STEPS, callback=callback)
    assert len([w for w in found if "gradient histograms" in str(w.message)]) == 1
    last = written(tmp_path, callback).rows[-1]
    assert values_in(last, "gradients/value_net.weight") == 8


# --- alerts and failures of the training ------------------------------------------------------------------------------


class BadReward(gym.Wrapper):
    """The reward of step 100 is what it is given."""

    def __init__(self, env: gym.Env, reward: float) -> None:
        super().__init__(env)
        self.reward, self.n_steps = reward, 0

    def step(self, action: Any) -> Any:
        observation, reward, *others = self.env.step(action)
        self.n_steps += 1
        return observation, self.reward if self.n_steps == 100 else reward, *others


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_raises_an_alert_and_the_run_has_failed(reward: float, tmp_path: Path) -> None:
    env = make_vec_env("CartPole-v1", n_envs=2, wrapper_class=BadReward, wrapper_kwargs={"reward": reward})
    with pytest.raises(ValueError, match="returned the reward"):
        model_on(env).learn(4 * STEPS, callback=tracked(tmp_path))
    run = written(tmp_path)
    [alert] = run.of("alert")
    assert alert.level == "ERROR" and alert.title == "Non-finite value"
    assert alert.text.startswith("Step 200: ") and f"the reward {reward}" in alert.text
    assert run.exit_code == 1 and steps_of(run) == [128]


class SometimesNan(PPOPlus):
    """Its third loss is NaN."""

    n_losses = 0

    def policy_loss(self, ratio: th.Tensor, advantages: th.Tensor, hp: Any) -> th.Tensor:
        self.n_losses += 1
        return super().policy_loss(ratio, advantages, hp) * (math.nan if self.n_losses == 3 else 1.0)


def test_an_update_that_the_guard_skips_raises_an_alert_and_training_goes_on(tmp_path: Path) -> None:
    callback = tracked(tmp_path)
    model = model_on(cls=SometimesNan)
    model.learn(4 * STEPS, callback=callback)
    run = written(tmp_path, callback)
    assert model._nonfinite_updates == 1 and run.exit_code == 0
    [alert] = run.of("alert")
    assert alert.level == "WARN" and alert.title == "Non-finite update" and alert.text.startswith("1 update(s)")


def test_any_other_error_is_an_alert_too(tmp_path: Path) -> None:
    class Failing(BaseCallback):
        def _on_step(self) -> bool:
            raise KeyError("lost")

    with pytest.raises(KeyError):
        model_on().learn(STEPS, callback=[tracked(tmp_path), Failing()])
    run = written(tmp_path)
    assert [(alert.title, alert.text) for alert in run.of("alert")] == [("Training failed", "Step 2: 'lost'")]
    assert run.exit_code == 1


def test_an_interrupted_training_keeps_its_model_and_the_run_is_killed(tmp_path: Path) -> None:
    class Interrupting(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 100:
                raise KeyboardInterrupt
            return True

    model = model_on()
    with pytest.raises(KeyboardInterrupt):
        model.learn(4 * STEPS, callback=[tracked(tmp_path), Interrupting()])
    run = written(tmp_path)
    assert run.exit_code == 255 and not run.of("alert")
    [(aliases, file)] = run.models
    assert aliases == {"latest", "step-200"} and same_parameters(model, file)


# --- failures of W&B --------------------------------------------------------------------------------------------------


def test_errors_of_the_arguments_come_at_once() -> None:
    for wrong, message in (
        ({"histograms": "weights"}, "`histograms` must be one of"),
        ({"histogram_freq": 0}, "`histogram_freq` must be"),
        ({"model_freq": -1}, "`model_freq` must be"),
    ):
        with pytest.raises(ValueError, match=message):
            WandbCallback(**wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`tags` must be a list"):
        WandbCallback(tags="one,two")


def test_training_goes_on_without_a_run_that_cannot_begin(tmp_path: Path) -> None:
    callback = tracked(tmp_path)
    callback.init_kwargs["id"] = "not/allowed"
    model = model_on()
    with pytest.warns(UserWarning, match="Weights & Biases: UsageError: Run ID cannot contain") as found:
        model.learn(2 * STEPS, callback=callback)
    assert len(found) == 1 and found[0].filename == __file__
    assert model.num_timesteps == 2 * STEPS and callback.run is None
    callback.log_video("nothing.mp4")
    callback.log_summary({"a": 1})
    callback.log_model()
    callback.finish()


def test_training_goes_on_when_the_run_is_finished_behind_its_back(tmp_path: Path) -> None:
    class Finishing(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 100:
                wandb.finish()
            return True

    model, callback = model_on(), tracked(tmp_path)
    with pytest.warns(UserWarning, match=r"Weights & Biases: UsageError: Run \(\w+\) is finished") as found:
        model.learn(4 * STEPS, callback=[Finishing(), callback])
    assert len(found) == 1 and model.num_timesteps == 4 * STEPS
    assert steps_of(written(tmp_path, callback)) == [128]


def test_a_file_that_is_no_video_costs_a_warning(tmp_path: Path) -> None:
    callback = tracked(tmp_path)
    callback.start(model_on())
    with pytest.warns(UserWarning, match="Weights & Biases: ValueError: wandb.Video accepts"):
        callback.log_video(tmp_path / "film.txt")


PROGRAM = """
import os, signal, sys
from pathlib import Path
from sb3_pgplus import PPOPlus, make_vec_env
from sb3_pgplus.callbacks import WandbCallback
from stable_baselines3.common.callbacks import BaseCallback
import wandb

class KillService(BaseCallback):
    def _on_step(self):
        if self.n_calls == 100 and sys.argv[1] == "kill":
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    command, parent = (process / "cmdline").read_text(), (process / "stat").read_text().split()[3]
                except OSError:
                    continue
                if "wandb-core" in command and parent == str(os.getpid()):
                    os.kill(int(process.name), signal.SIGKILL)
                    print("killed")
        return True

model = PPOPlus("MlpPolicy", make_vec_env("CartPole-v1", n_envs=2), n_steps=64, n_epochs=1, device="cpu")
settings = wandb.Settings(init_timeout=2)
model.learn(512, callback=[KillService(), WandbCallback("a-project", init_kwargs={"settings": settings})])
print("trained", model.num_timesteps)
"""


def environment(**variables: str) -> dict[str, str]:
    """Of a program that has W&B to itself: by these variables it would find the service of this process."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_SERVICE")}
    return own | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables


def run_program(folder: Path, argument: str, **variables: str) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(PROGRAM)
    return subprocess.run(
        [sys.executable, "program.py", argument],
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_where_no_server_answers_the_run_is_offline(tmp_path: Path) -> None:
    done = run_program(tmp_path, "-", WANDB_MODE="online", WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="a" * 40)
    assert done.returncode == 0 and "trained 512" in done.stdout, done.stderr
    [warning] = re.findall("Weights & Biases: .*", done.stderr)
    assert "CommError" in warning and "connection refused" in warning
    assert "the run is recorded offline, for `wandb sync` later" in done.stderr
    assert steps_of(written(tmp_path)) == [128, 256, 384, 512]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds W&B's process in /proc")
def test_training_goes_on_when_the_process_of_wandb_dies(tmp_path: Path) -> None:
    done = run_program(tmp_path, "kill")
    assert done.returncode == 0 and "killed\ntrained 512" in done.stdout, done.stderr
    assert len(re.findall("UserWarning: Weights & Biases: ", done.stderr)) == 1


# --- online, with a stand-in for the server ---------------------------------------------------------------------------


def online(server: Server, folder: Path, **settings: Any) -> WandbCallback:
    """Settings that W&B has from its environment otherwise."""
    own = {"base_url": server.url, "api_key": "a" * 40, "init_timeout": 60, "finish_timeout": 30}
    own |= {"x_disable_meta": True, "x_disable_stats": True}
    init_kwargs = {"dir": str(folder), "settings": wandb.Settings(**own | settings)}
    return WandbCallback("p", entity="me", mode="online", init_kwargs=init_kwargs)


def test_a_resumed_run_gets_only_rows_that_the_server_does_not_have(tmp_path: Path) -> None:
    model = model_on(**CONSTANT)
    with Server() as server:
        callback = online(server, tmp_path)
        model.learn(2 * STEPS, callback=callback)
        model.save(tmp_path / "checkpoint.zip")
        model.learn(2 * STEPS, callback=callback, reset_num_timesteps=False)
        callback.finish(255)
        loaded = PPOPlus.load(tmp_path / "checkpoint.zip", env=make_vec_env("CartPole-v1", n_envs=2), device="cpu")
        again = online(server, tmp_path)
        loaded.learn(3 * STEPS, callback=again, reset_num_timesteps=False)
        assert again.run.resumed
        again.finish()
    assert server.rows.keys() == {model.wandb_run_id}
    rows = server.rows[model.wandb_run_id]
    assert [row["global_step"] for row in rows] == [128, 256, 384, 512, 640]
    assert server.exit_codes[model.wandb_run_id] == 0


def test_a_new_run_with_a_loaded_model_asks_for_the_artifact_it_comes_from(tmp_path: Path) -> None:
    with Server() as server:
        model = model_on()
        first = online(server, tmp_path)
        model.learn(STEPS, callback=first)
        first.finish()
        model.save(tmp_path / "model.zip")
        loaded = PPOPlus.load(tmp_path / "model.zip", env=make_vec_env("CartPole-v1", n_envs=2), device="cpu")
        second = online(server, tmp_path)
        loaded.learn(STEPS, callback=second)
        second.finish()
    origin = {"entity": "me", "project": "p", "name": f"model-{model.wandb_run_id}:step-128"}
    assert ("ArtifactMembershipByName", origin) in server.asked
    made = [variables["input"] for name, variables in server.asked if name == "CreateArtifact"]
    assert [{entry["alias"] for entry in artifact["aliases"]} for artifact in made] == [{"latest", "step-128"}] * 2


def test_a_network_that_goes_away_does_not_hold_up_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server().__enter__()

    class Cutting(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 100:
                server.__exit__()
            return True

    monkeypatch.setattr("sb3_pgplus.callbacks.wandb_run.UPLOAD_TIMEOUT", 1.0)
    model, callback = model_on(), online(server, tmp_path, finish_timeout=2)
    callback.model_freq = STEPS  # the question about an artifact is one that W&B repeats for a minute
    callback.start(model)
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # W&B's answer to the upload may come in time, or not
        model.learn(5 * STEPS, callback=[Cutting(), callback])
    assert model.num_timesteps == 5 * STEPS and time.monotonic() - began < 30
    callback.finish()
    [file] = tmp_path.rglob("run-*/run-*.wandb")
    assert steps_of(OfflineRun(file)) == [128, 256, 384, 512, 640]  # for `wandb sync`


# --- command line, examples, neighbours -------------------------------------------------------------------------------

TRAIN = ["train", "--env", "CartPole-v1", "--n-envs", "2", "--no-progress"]
TRAIN += ["--set", "n_steps=64", "--set", "n_epochs=1", "--set", "batch_size=64"]


def test_the_command_tracks_a_whole_training(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    names = ["--track", "--project", "p", "--entity", "me", "--group", "g", "--tags", "a, b"]
    result = CliRunner().invoke(
        app, [*TRAIN, "--n-timesteps", "500", "--eval-episodes", "2", "--out", str(folder), *names]
    )
    assert result.exit_code == 0, result.output
    run = written(folder / "wandb")
    assert (run.run.project, run.run.entity, run.run.run_group, [*run.run.tags]) == ("p", "me", "g", ["a", "b"])
    assert run.run.display_name == "ppoplus-CartPole-v1-seed0"
    with (folder / "progress.csv").open() as file:
        progress = list(csv.DictReader(file))
    assert steps_of(run) == [128, 256, 384, 512] == [int(row["time/total_timesteps"]) for row in progress]
    assert [row["rollout/ep_rew_mean"] for row in run.rows] == [float(row["rollout/ep_rew_mean"]) for row in progress]
    config = yaml.safe_load((folder / "config.yml").read_text())
    common = {name for name in PPOPlus.hparams_class.names() if name in run.config} | {"env", "seed"}
    assert len(common) > 30 and {n: run.config[n] for n in common} == {n: config[n] for n in common}
    evaluation = yaml.safe_load((folder / "evaluation.yml").read_text())
    assert run.summary["evaluation/mean_return"] == evaluation["mean_return"]
    assert run.exit_code == 0 and run.models[-1][0] == {"latest", "step-512"}
    assert PPOPlus.load(folder / "model.zip").wandb_run_id == run.run.run_id


def test_ctrl_c_in_the_command_ends_run_and_training_in_good_order(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sb3_pgplus.cli", *TRAIN, "--n-timesteps", "2e5", "--out", "run", "--track"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    progress, deadline = tmp_path / "run" / "progress.csv", time.monotonic() + 120
    while not (progress.exists() and len(progress.read_text().splitlines()) > 2) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output.decode()
    run = written(tmp_path / "run")
    assert run.exit_code == 255 and (tmp_path / "run" / "model.zip").is_file()
    assert len(run.models) == 1 and "latest" in run.models[0][0]


def test_without_wandb_the_command_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("sb3_pgplus.callbacks.wandb")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "wandb", None)
    result = CliRunner().invoke(app, [*TRAIN, "--track", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2 and "sb3_pgplus[wandb]" in result.output
    assert not (tmp_path / "run").exists()


def test_a_training_in_a_sweep_has_the_sweeps_settings(tmp_path: Path) -> None:
    """The server is left out; what its agent does is to set these variables and to start the program."""
    parameters = {"learning_rate": {"value": 0.002}, "n_epochs": {"value": 2}}
    (tmp_path / "parameters.yaml").write_text(yaml.safe_dump(parameters))
    sweep = {"WANDB_SWEEP_ID": "abcd1234", "WANDB_SWEEP_PARAM_PATH": str(tmp_path / "parameters.yaml")}
    program = str(ROOT / "examples" / "wandb_sweep.py")
    done = subprocess.run(
        [sys.executable, program, "--timesteps", "2048"],
        cwd=tmp_path,
        env=environment(**sweep),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    run = written(tmp_path)
    assert run.run.sweep_id == "abcd1234"
    swept = {update.key: json.loads(update.value_json) for update in run.run.config.update}
    assert swept["learning_rate"] == 0.002 == run.config["learning_rate"] and run.config["n_epochs"] == 2
    assert run.config["gamma"] == 0.99  # ours, beside the sweep's
    assert "eval/mean_reward" in run.summary and run.exit_code == 0  # the metric of the sweep
    assert "locked" not in done.stderr


def test_all_callbacks_of_a_training_are_found() -> None:
    inner = CheckpointCallback(1, "folder")
    evaluation = EvalCallback(make_vec_env("CartPole-v1"), callback_after_eval=inner, verbose=0)
    assert list(callbacks_in([evaluation, lambda *_: True]))[:2] == [evaluation, inner]
    assert list(callbacks_in(None)) == []


def test_no_warning_where_nothing_is_wrong(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model_on().learn(STEPS, callback=tracked(tmp_path, histograms="all", histogram_freq=1))
