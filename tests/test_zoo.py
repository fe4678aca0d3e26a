"""RL Zoo as it is installed, in processes of its own, with tiny trainings: what it leaves, loads and hands on."""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from itertools import chain, islice
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch as th
import yaml

from sb3_pgplus import configs, zoo
from sb3_pgplus.schedules import describe_schedule

ROOT = Path(__file__).resolve().parents[1]
#: Several commands in one process: importing everything takes longer than what they do.
COMMANDS = """
import logging, shlex, sys
from sb3_pgplus.zoo import main
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
for command in sys.argv[1:]:
    sys.argv = ["zoo", *shlex.split(command)]
    print("$", command, flush=True)
    try:
        main()
    except SystemExit as stop:  # after --help
        assert not stop.code, stop.code
"""
#: Settings that make an update take milliseconds.
TINY = {
    "ppoplus": "-params n_envs:2 n_steps:64 batch_size:64 n_epochs:1",
    "a2cplus": "-params n_envs:2 n_steps:64",
    "trpoplus": "-params n_envs:2 n_steps:64 batch_size:64 n_critic_updates:1",
}


def run_python(folder: Path, *arguments: str, **environment: str) -> str:
    variables = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def run_zoo(folder: Path, *commands: str) -> list[str]:
    """What each command printed."""
    return re.split(r"^\$ .*$", run_python(folder, "-c", COMMANDS, *commands), flags=re.MULTILINE)[1:]


def load(path: Path, algo: str = "ppoplus") -> Any:
    return configs.algorithm_class(algo).load(path, device="cpu")


def parameters(path: Path, algo: str = "ppoplus") -> dict[str, th.Tensor]:
    return dict(load(path, algo).policy.named_parameters())


# --- train, continue, enjoy, optimise, take a trial -------------------------------------------------------------------


def session_commands(algo: str) -> list[str]:
    base = f"--algo {algo} --env CartPole-v1"
    train = f"train {base} --seed 3 --eval-episodes 1"  # a seed with short trials
    study = f"--storage {algo}.log --study-name study --pruner none --no-optim-plots"
    return [
        f"{train} -n 512 --eval-freq 256 --save-freq 256 {TINY[algo]}",
        f"{train} -n 256 --eval-freq -1 -i logs/{algo}/CartPole-v1_1/CartPole-v1.zip {TINY[algo]} learning_rate:0.0",
        f"enjoy {base} --exp-id 1 --no-render -n 600",  # at least one episode, none is longer than 500
        f"enjoy {base} --exp-id 1 --no-render -n 50 --load-best",
        f"enjoy {base} --exp-id 1 --no-render -n 50 --load-checkpoint 256",
        f"{train} -n 64 -optimize --n-trials 2 --n-evaluations 1 {study} -params n_envs:1",
        f"{train} -n 64 --eval-freq -1 {study} --trial-id 0 -params n_envs:1",
        f"{train} -n 64 --eval-freq -1 {study} --trial-id 1 -params n_envs:1",
    ]


Session = tuple[str, Path, list[str]]


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Session]:
    """A whole session with each algorithm: its name, its folder, what each command printed."""
    folder = tmp_path_factory.mktemp("sessions")
    commands = {algo: session_commands(algo) for algo in configs.ALGORITHMS}
    printed = iter(run_zoo(folder, *chain(*commands.values())))
    return {algo: (algo, folder, list(islice(printed, len(own)))) for algo, own in commands.items()}


@pytest.fixture(params=list(configs.ALGORITHMS))
def session(request: pytest.FixtureRequest, sessions: dict[str, Session]) -> Session:
    return sessions[request.param]


def run_folder(session: Session, number: int) -> Path:
    return session[1] / "logs" / session[0] / f"CartPole-v1_{number}"


def test_training_takes_our_settings_and_leaves_what_rl_zoo3_leaves(session: Session) -> None:
    algo, folder = session[0], run_folder(session, 1)
    model = load(folder / "CartPole-v1.zip", algo)
    packaged = configs.resolve_settings(algo=algo, env="CartPole-v1").hyperparameters
    tiny = {"n_steps": 64, "batch_size": 64, "n_epochs": 1, "n_critic_updates": 1}
    for name, value in packaged.items():
        saved = getattr(model, name)
        assert (describe_schedule(saved) if name == "clip_range" else saved) == tiny.get(name, value), name
    assert model.num_timesteps == 512
    left = {path.name for path in folder.iterdir()}
    assert left >= {"best_model.zip", "evaluations.npz", "0.monitor.csv", "1.monitor.csv", "rl_model_256_steps.zip"}


def test_continuing_starts_from_the_saved_parameters(session: Session) -> None:
    # At a rate of 0 they stay what they were; TRPO's policy takes its step all the same.
    before = parameters(run_folder(session, 1) / "CartPole-v1.zip", session[0])
    after = parameters(run_folder(session, 2) / "CartPole-v1.zip", session[0])
    kept = [name for name in before if session[0] != "trpoplus" or "value" in name]
    assert len(kept) >= 6
    assert all(th.equal(before[name], after[name]) for name in kept)


def test_enjoy_plays_the_last_the_best_and_a_checkpoint(session: Session) -> None:
    algo, _, printed = session
    for output, file in zip(printed[2:5], ("CartPole-v1", "best_model", "rl_model_256_steps"), strict=True):
        assert f"Loading logs/{algo}/CartPole-v1_1/{file}.zip" in output
    episodes = re.search(r"(\d+) Episodes\nMean reward: ([\d.]+)", printed[2])
    assert episodes and int(episodes[1]) >= 1 and float(episodes[2]) > 0


def test_a_trial_trains_again_with_its_own_settings_the_first_one_too(session: Session) -> None:
    algo, folder, _ = session
    [report] = (folder / "logs" / algo).glob("report_*.csv")
    with report.open(encoding="utf-8") as file:
        trials = list(csv.DictReader(file))
    assert [trial["state"] for trial in trials] == ["COMPLETE", "COMPLETE"]
    for trial in trials:
        sampled = {key.removeprefix("params_"): value for key, value in trial.items() if key.startswith("params_")}
        wanted = zoo.convert({name: zoo._as_meant(value) for name, value in sampled.items()})
        config = run_folder(session, 4 + int(trial["number"])) / "CartPole-v1" / "config.yml"
        saved = dict(yaml.unsafe_load(config.read_text(encoding="utf-8")))
        assert {name: saved[name] for name in wanted} == wanted


# --- search spaces ----------------------------------------------------------------------------------------------------


def test_a_trials_parameters_become_arguments_of_the_constructor() -> None:
    sampled = {"one_minus_gamma": 0.25, "one_minus_gae_lambda": 0.5, "n_steps_pow": 5, "learning_rate": 1e-3}
    assert zoo.convert({**sampled, "clip_range": "lin_0.1"}) == {
        "gamma": 0.75,
        "gae_lambda": 0.5,
        "n_steps": 32,
        "learning_rate": "lin_0.001",
        "clip_range": "lin_0.1",
    }
    assert "one_minus_gamma" in sampled  # the study's own dictionary stays as it is


@pytest.mark.parametrize("algo", zoo.SEARCH_SPACES)
def test_every_sample_is_allowed_and_repeats_from_what_the_study_stores(algo: str) -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    hparams = configs.algorithm_class(algo).hparams_class
    for _ in range(20):
        trial = study.ask()
        settings = zoo._sample(zoo.SEARCH_SPACES[algo], trial, 2, 1, {})
        assert settings.keys() <= set(hparams.names())
        hparams.resolve(hparams.defaults() | settings)
        assert zoo.convert(trial.params) == settings
        assert settings.get("batch_size", 0) <= settings["n_steps"]  # so never above a rollout, whatever n_envs is


# --- what rl_zoo3's parser refuses or misreads ------------------------------------------------------------------------

READINGS = """
import argparse, json, sys
import gymnasium, yaml
from sb3_pgplus import zoo
zoo.register()
import rl_zoo3.exp_manager
manager = type("Manager", (zoo.PlusSettings, rl_zoo3.exp_manager.ExperimentManager), {})
def read(algo, env, config=None):
    reader = manager(argparse.Namespace(), algo, env, "logs", verbose=0, config=config)
    settings, *_ = reader._preprocess_hyperparams(reader.read_hyperparameters()[0])
    return {**settings, "n_envs": reader.n_envs, "n_timesteps": reader.n_timesteps}
open("short.yml", "w").write("default: {n_timesteps: 100, policy: MlpPolicy, normalize: false}")
found = [("a2cplus", "CartPole-v1", "short.yml", read("a2cplus", "CartPole-v1", "short.yml"))]
for algo in ("ppoplus", "a2cplus", "trpoplus"):
    packaged = zoo.packaged_config(algo)
    for block in yaml.safe_load(packaged.read_text()):
        env = {"atari": "BreakoutNoFrameskip-v4", "default": "FrozenLake-v1"}.get(block, block)
        found.append((algo, env, None, read(algo, env)))
for path in sorted(packaged.with_name("ablation").iterdir()):
    algo = "trpoplus" if path.name.startswith("trpo") else "ppoplus"
    found.append((algo, "CartPole-v1", str(path), read(algo, "CartPole-v1", str(path))))
print("READ", json.dumps(found))
"""


def test_rl_zoo3_and_our_command_read_files_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = json.loads(run_python(tmp_path, "-c", READINGS).rpartition("READ ")[2])
    assert len(found) > 80
    assert found[0][3]["n_envs"] == 8  # not rl_zoo3's 1
    for algo, env, config, settings in found:
        ours = configs.resolve_settings(algo=algo, env=env, config=config)
        run = {"n_envs": ours.n_envs, "n_timesteps": ours.n_timesteps}
        # The default block's policy is chosen by the observations in our command.
        run["policy"] = ours.policy or "MlpPolicy"
        assert settings == {**ours.hyperparameters, **run}, (algo, env, config)


TRAPS = """
Pendulum-v1:
  n_timesteps: 1e2
  n_envs: 2
  policy: stable_baselines3.common.policies.ActorCriticPolicy
  n_steps: 32
  batch_size: 32
  n_epochs: 1
  learning_rate: 1e-3
  adam_eps: 1e-7
  max_grad_norm: None
  clip_range: cos_0.3_0.1
  clip_range_vf: null
  ent_coef: lin_0.01
  policy_kwargs: {net_arch: [8], activation_fn: nn.ReLU}
  rollout_buffer_class: stable_baselines3.common.buffers.RolloutBuffer
"""
VEC_ENVS = ("dummy", "subproc", "auto", "serial", "workers")
IN_PYTHON = """
from stable_baselines3.common.utils import LinearSchedule
hyperparams = {"CartPole-v1": dict(
    n_timesteps=128, n_envs=2, policy="MlpPolicy", n_steps=32, batch_size=32, n_epochs=1,
    learning_rate=LinearSchedule(1e-3, 1e-4, 1.0), normalize="dict(norm_obs=True, norm_reward=False)",
)}
"""
ENVIRONMENTS = """
import gymnasium
for name, cls in (("Dict", "multi_input_envs:SimpleMultiObsEnv"), ("Image", "identity_env:FakeImageEnv")):
    gymnasium.register(f"{name}-v0", entry_point=f"stable_baselines3.common.envs.{cls}", max_episode_steps=20)
"""


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Settings, environments and vector environments of several kinds."""
    folder = tmp_path_factory.mktemp("variants")
    (folder / "traps.yml").write_text(TRAPS, encoding="utf-8")
    (folder / "in_python.py").write_text(IN_PYTHON, encoding="utf-8")
    (folder / "zoo_environments.py").write_text(ENVIRONMENTS, encoding="utf-8")
    small = f"--eval-freq 64 --eval-episodes 1 --seed 3 -n 128 {TINY['ppoplus']}"
    own = "--gym-packages zoo_environments"
    compared = f"train --env InvertedPendulum-v5 {small} --eval-freq -1 --vec-env"
    commands = [
        "train --env Pendulum-v1 -conf traps.yml --eval-freq -1",
        "train --env CartPole-v1 -conf in_python.py --eval-freq -1",
        "enjoy --env CartPole-v1 --no-render -n 50",
        f"train --env Dict-v0 {own} {small} policy:'\"MultiInputPolicy\"'",
        f"enjoy --env Dict-v0 {own} --no-render -n 40",
        f"train --env Image-v0 {own} --vec-env workers {small} policy:'\"CnnPolicy\"'",
        f"enjoy --env Image-v0 {own} --no-render -n 40",
        *(f"{compared} {name} -f {name}" for name in VEC_ENVS),
        "train --help",
        "enjoy --help",
    ]
    return folder, run_zoo(folder, *commands)


def test_settings_that_rl_zoo3_cannot_read_reach_the_constructor_as_written(variants: tuple[Path, list[str]]) -> None:
    model = load(variants[0] / "logs/ppoplus/Pendulum-v1_1/Pendulum-v1.zip")
    assert model.num_timesteps == 128  # two rollouts of 2 x 32 steps are the first to reach 100
    assert (model.learning_rate, model.adam_eps, model.max_grad_norm, model.clip_range_vf) == (1e-3, 1e-7, None, None)
    assert model.clip_range(1.0) == 0.3
    assert model.clip_range(0.0) == pytest.approx(0.1)
    assert model.clip_range(0.5) == pytest.approx(0.2)
    assert model.clip_range(0.75) != pytest.approx(0.25)  # a cosine, no line
    assert model.ent_coef == "lin_0.01"
    assert model.policy.activation_fn is th.nn.ReLU
    assert model.rollout_buffer_class.__name__ == "RolloutBuffer"


def test_a_python_file_may_hold_schedules_and_its_normalize_is_the_models_own(variants: tuple[Path, list[str]]) -> None:
    folder = variants[0] / "logs/ppoplus/CartPole-v1_1"
    model = load(folder / "CartPole-v1.zip")
    assert [model.learning_rate(progress) for progress in (1.0, 0.0)] == pytest.approx([1e-3, 1e-4])
    assert (model.normalize_observations, model.normalize_rewards) == (True, False)
    assert not list(folder.rglob("vecnormalize.pkl"))  # the statistics are in the zip file


@pytest.mark.parametrize(("position", "env"), [(3, "Dict"), (5, "Image")])
def test_dict_and_image_observations_are_trained_on_and_played(
    variants: tuple[Path, list[str]], position: int, env: str
) -> None:
    folder, printed = variants
    assert load(folder / f"logs/ppoplus/{env}-v0_1/{env}-v0.zip").num_timesteps == 128
    assert re.search(r"[1-9]\d* Episodes", printed[position + 1])


def test_every_vector_environment_gives_the_same_model(variants: tuple[Path, list[str]]) -> None:
    folder, printed = variants
    run = "ppoplus/InvertedPendulum-v5_1"
    trained = {name: parameters(folder / name / run / "InvertedPendulum-v5.zip") for name in VEC_ENVS}
    for name, found in trained.items():
        assert all(th.equal(trained["dummy"][key], value) for key, value in found.items()), name
    episodes = {name: _episodes(folder / name / run) for name in trained}
    assert len(episodes["dummy"]) > 2
    assert all(found == episodes["dummy"] for found in episodes.values())
    for name, backend in {"auto": "mujoco", "serial": "serial", "workers": "workers"}.items():
        assert f"2 copies with backend '{backend}'" in printed[7 + VEC_ENVS.index(name)]


def _episodes(folder: Path) -> list[tuple[str, ...]]:
    """Return and length of every episode in Monitor's files."""
    lines = [line for path in sorted(folder.glob("*.monitor.csv")) for line in path.read_text().splitlines()[2:]]
    return [tuple(line.split(",")[:2]) for line in lines]


def test_the_documented_commands_have_options_that_exist(variants: tuple[Path, list[str]]) -> None:
    known = {
        name: set(re.findall(r"(?<![\w-])--?[\w-]+", variants[1][i])) for name, i in (("train", -2), ("enjoy", -1))
    }
    pages = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/zoo.md"))
    commands = [shlex.split(line) for line in re.findall(r"^python -m sb3_pgplus\.zoo (.*)$", pages, re.MULTILINE)]
    assert len(commands) > 10
    for command, *arguments in commands:
        used = {argument for argument in arguments if argument.startswith("-")}
        assert used <= known[command], (command, used - known[command])


# --- registration and errors ------------------------------------------------------------------------------------------

REGISTERED = """
import rl_zoo3
from rl_zoo3 import hyperparams_opt
from sb3_pgplus import zoo
tables = (rl_zoo3.ALGOS, hyperparams_opt.HYPERPARAMS_SAMPLER, hyperparams_opt.HYPERPARAMS_CONVERTER)
before = [dict(table) for table in tables]
zoo.register()
once = [dict(table) for table in tables]
zoo.register()
for table, stock, first in zip(tables, before, once):
    assert table.keys() == first.keys() == stock.keys() | {"ppoplus", "a2cplus", "trpoplus"}
    assert all(table[name] is stock[name] for name in stock)
assert rl_zoo3.ALGOS == once[0]
"""


def test_registering_twice_adds_our_algorithms_once_and_leaves_the_others(tmp_path: Path) -> None:
    run_python(tmp_path, "-c", REGISTERED)


CLASS_OF_THE_USER = """
import argparse
from stable_baselines3.common.vec_env import DummyVecEnv
from sb3_pgplus import zoo
zoo.register()
from rl_zoo3.exp_manager import ExperimentManager
manager = type("Manager", (zoo.PlusSettings, ExperimentManager), {"backend": "auto"})
made = [manager(argparse.Namespace(), "ppoplus", "CartPole-v1", "logs", verbose=0).create_envs(2)]
ExperimentManager.default_vec_env_cls = DummyVecEnv
made.append(manager(argparse.Namespace(), "ppoplus", "CartPole-v1", "logs", verbose=0).create_envs(2))
assert [type(env).__name__ for env in made] == ["SerialVecEnv", "DummyVecEnv"]
"""


def test_a_default_vec_env_cls_goes_before_our_vector_environments(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    run_python(tmp_path, "-c", CLASS_OF_THE_USER)


MUJOCO = """
import sys
for module in {imports}:
    __import__(module)
import numpy as np
from sb3_pgplus.vec_env import backend_of, make_vec_env
short = {{"max_episode_steps": 5}}
fast, dummy = (make_vec_env("HalfCheetah-v5", 2, seed=3, env_kwargs=short, backend=b) for b in ("auto", "dummy"))
assert backend_of(fast) == "mujoco", backend_of(fast)
np.testing.assert_array_equal(fast.reset(), dummy.reset())
generator = np.random.default_rng(0)
for step in range(1, 13):
    actions = generator.uniform(-1, 1, (2, 6)).astype(np.float32)
    obs, rewards, dones, infos = fast.step(actions)
    their_obs, their_rewards, their_dones, their_infos = dummy.step(actions)
    np.testing.assert_array_equal(obs, their_obs)
    np.testing.assert_array_equal(rewards, their_rewards)
    assert dones.tolist() == their_dones.tolist() == [step % 5 == 0] * 2
    for ours, theirs in zip(infos, their_infos, strict=True):
        assert ours["TimeLimit.truncated"] == theirs["TimeLimit.truncated"] == (step % 5 == 0)
fast.close(), dummy.close()
"""


@pytest.mark.parametrize("imports", [["rl_zoo3", "sb3_pgplus"], ["sb3_pgplus", "rl_zoo3"]])
def test_mujoco_stays_fast_and_exact_with_the_time_limit_that_rl_zoo3_puts_into_gymnasium(
    imports: list[str], tmp_path: Path
) -> None:
    run_python(tmp_path, "-c", MUJOCO.format(imports=imports))


def test_rl_zoo3s_own_command_finds_us_through_custom_envs(tmp_path: Path) -> None:
    (tmp_path / "custom_envs.py").write_text("from sb3_pgplus import zoo\nzoo.register()\n", encoding="utf-8")
    command = f"--algo a2cplus --env CartPole-v1 -n 128 --eval-freq -1 {TINY['a2cplus']}".split()
    run_python(tmp_path, "-m", "rl_zoo3.train", "-conf", str(ROOT / "zoo_configs" / "a2cplus.yml"), *command)
    assert load(tmp_path / "logs/a2cplus/CartPole-v1_1/CartPole-v1.zip", "a2cplus").num_timesteps == 128


def test_without_rl_zoo3_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rl_zoo3", None)
    monkeypatch.setattr(sys, "argv", ["zoo", "train"])
    with pytest.raises(SystemExit, match=r"^Error: .*pip install 'sb3_pgplus\[zoo\]'"):
        zoo.main()
    with pytest.raises(ImportError, match=r"pip install 'sb3_pgplus\[zoo\]'"):
        zoo.register()


@pytest.mark.parametrize("arguments", [[], ["plot"], ["--algo", "ppoplus"]])
def test_a_command_that_does_not_exist_is_answered_with_those_that_do(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["zoo", *arguments])
    with pytest.raises(SystemExit, match=r"usage: python -m sb3_pgplus\.zoo \{train,enjoy\}"):
        zoo.main()


@pytest.mark.parametrize("option", [["--algo", "ppo"], ["--vec-env", "isaac"]])
def test_an_unknown_algorithm_or_vector_environment_is_answered_with_the_known_ones(
    option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        zoo.train(option)
    known = {"--algo": ["ppoplus", "a2cplus", "trpoplus"], "--vec-env": ["auto", "dummy", "workers", "mujoco"]}
    message = capsys.readouterr().err
    assert all(name in message for name in [option[1], *known[option[0]]])


@pytest.mark.slow
def test_tracking_writes_a_run_of_weights_and_biases(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    command = f"train --env CartPole-v1 -n 128 --eval-freq -1 --track {TINY['ppoplus']}".split()
    run_python(tmp_path, "-m", "sb3_pgplus.zoo", *command, WANDB_MODE="offline", WANDB_SILENT="true")
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert list(tmp_path.glob("runs/*/CartPole-v1/PPOPlus_1/events.*"))
