"""Trainings that are interrupted and resumed, and everything of them that has to be equal afterwards."""

import csv
import math
import multiprocessing
import os
import signal
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack, VecNormalize

from sb3_pgplus import A2CPlus, PPOPlus, TRPOPlus, checkpoints, make_vec_env
from sb3_pgplus.configs import EnvironmentSpec, RunSettings
from sb3_pgplus.run_folder import RunFolder
from sb3_pgplus.training import train

ALGORITHMS: dict[str, Any] = {"ppoplus": PPOPlus, "a2cplus": A2CPlus, "trpoplus": TRPOPlus}
#: Short rollouts with more than one minibatch; steps of one environment.
SETTINGS: dict[str, dict[str, Any]] = {
    "ppoplus": {"n_steps": 32, "batch_size": 16, "n_epochs": 3, "desired_kl": 0.01},
    "a2cplus": {"n_steps": 8},
    "trpoplus": {"n_steps": 32, "batch_size": 16, "n_critic_updates": 3},
}


class DictPoint(gym.Env[dict[str, Any], Any]):
    """A point on a line that noise pushes about; episodes end and are cut in turn."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}  # what SB3 asks for

    def __init__(self) -> None:
        position, sign = spaces.Box(-np.inf, np.inf, (2,)), spaces.Discrete(2)
        self.observation_space: Any = spaces.Dict({"position": position, "sign": sign})
        self.action_space: Any = spaces.Discrete(3)
        self._point, self._steps, self._episodes = np.zeros(2, np.float32), 0, 0

    def _observation(self) -> dict[str, Any]:
        return {"position": self._point.copy(), "sign": np.int64(self._point[0] > 0)}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        self._point = self.np_random.normal(size=2).astype(np.float32)
        self._steps, self._episodes = 0, self._episodes + 1
        return self._observation(), {}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self._steps += 1
        push = np.array([action - 1, 0])
        self._point += (self.np_random.normal(size=2) + push).astype(np.float32)
        ended, cut = self._steps >= 7 and self._episodes % 2 == 0, self._steps >= 7 and self._episodes % 2 == 1
        return self._observation(), -float(self._point[0] ** 2), ended, cut, {}

    def get_state(self) -> dict[str, Any]:
        return {"point": self._point.copy(), "steps": self._steps, "episodes": self._episodes}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._point, self._steps, self._episodes = state["point"], state["steps"], state["episodes"]


gym.register("DictPoint-v0", DictPoint)

#: kind → environment, its number, backend, further settings
KINDS: dict[str, tuple[str, int, str, dict[str, Any]]] = {
    "one environment": ("CartPole-v1", 1, "auto", {}),
    "eight environments": ("CartPole-v1", 8, "auto", {}),
    "mujoco": ("Hopper-v5", 2, "mujoco", {}),
    "gsde": ("Pendulum-v1", 2, "auto", {"use_sde": True, "sde_sample_freq": 5}),
    "dict": ("DictPoint-v0", 3, "auto", {}),
}


def environments(kind: str) -> VecEnv:
    """Those of a case; "wrappers" is one more, with what a user may put around them."""
    if kind != "wrappers":
        env_id, n_envs, backend, _ = KINDS[kind]
        return make_vec_env(env_id, n_envs, seed=7, backend=backend)
    return VecNormalize(VecFrameStack(make_vec_env("CartPole-v1", 2, seed=7), 3))


def model_of(algorithm: str, kind: str) -> Any:
    settings = {**SETTINGS[algorithm], **(KINDS[kind][3] if kind in KINDS else {})}
    policy = "MultiInputPolicy" if kind == "dict" else "MlpPolicy"
    return ALGORITHMS[algorithm](policy, environments(kind), seed=3, device="cpu", **settings)


def run_settings(algorithm: str, kind: str, n_iterations: int) -> RunSettings:
    """The same case as a run of the command line."""
    env_id, n_envs, backend, extra = KINDS[kind]
    settings = {**SETTINGS[algorithm], **extra}
    n_timesteps = n_iterations * settings["n_steps"] * n_envs
    return RunSettings(
        algorithm, EnvironmentSpec(env_id), 3, n_envs, backend, n_timesteps, None, settings, source="a test"
    )


# --- a training in a process of its own -------------------------------------------------------------------------------


def train_or_resume(settings: RunSettings, folder: Path, every: int, dies_at: tuple[str, int] | None = None) -> None:
    """
    Begin a run or go on with it.

    :param settings: of the run
    :param folder: of the run
    :param every: steps between checkpoints
    :param dies_at: a place in the writing of a checkpoint, and how many times it is passed before SIGKILL comes there
    """
    th.set_num_threads(1)
    if dies_at is not None:
        _die_while_writing(*dies_at)
    begun = bool(checkpoints.in_folder(RunFolder(folder).checkpoints))
    if folder.exists() and not begun:  # killed before the first checkpoint
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    out, resume = (None, folder) if begun else (folder, None)
    train(settings, out=out, resume=resume, device="cpu", eval_episodes=0, checkpoint_freq=every)


_CONTEXT = multiprocessing.get_context("forkserver")
# What takes seconds to import is imported once, by a process without threads.
_CONTEXT.set_forkserver_preload([__name__, "matplotlib.figure", "matplotlib.backends.backend_agg"])


def process_of(
    settings: RunSettings, folder: Path, every: int, dies_at: tuple[str, int] | None = None
) -> multiprocessing.process.BaseProcess:
    """:func:`train_or_resume` in a process of its own, started."""
    process = _CONTEXT.Process(target=train_or_resume, args=(settings, folder, every, dies_at), daemon=True)
    process.start()
    return process


def killed(settings: RunSettings, folder: Path, every: int, seconds: float) -> bool:
    """
    Begin a run or go on with it, and kill it after some time.

    :return: whether it was still running; if not, it has ended well
    """
    process = process_of(settings, folder, every)
    process.join(seconds)
    was_running = process.is_alive()
    process.kill()
    process.join()
    assert process.exitcode in ((0, -signal.SIGKILL) if was_running else (0,)), process.exitcode
    return process.exitcode != 0


def finish(settings: RunSettings, folder: Path, every: int) -> None:
    """Begin a run or go on with it until its end."""
    process = process_of(settings, folder, every)
    process.join(300)
    assert process.exitcode == 0, process.exitcode


def is_finished(settings: RunSettings, folder: Path) -> bool:
    """Whether a run has its last checkpoint and its model."""
    done = checkpoints.in_folder(RunFolder(folder).checkpoints)
    return bool(done) and checkpoints.steps_of(done[0]) >= settings.n_timesteps and RunFolder(folder).model.is_file()


def finish_unless_finished(settings: RunSettings, folder: Path, every: int) -> None:
    """:func:`finish`, unless the kill came when all was done."""
    if not is_finished(settings, folder):
        finish(settings, folder, every)


def seed_of(text: str) -> int:
    """A number that depends on a text alone."""
    return zlib.crc32(text.encode())


#: Where write_atomically can die: the function of ``os`` that it calls there, and whether before or after.
PLACES = {"half written": ("fsync", "before"), "written": ("replace", "before"), "in place": ("replace", "after")}


def _die_while_writing(place: str, times: int) -> None:
    """
    Have SIGKILL come in the middle of writing a checkpoint.

    :param place: of :data:`PLACES`
    :param times: how many checkpoints are written well before
    """
    name, when = PLACES[place]
    real, make_file, handles, left = getattr(os, name), tempfile.mkstemp, set(), [times]

    def mkstemp(**arguments: Any) -> tuple[int, str]:
        handle, path = make_file(**arguments)
        if arguments["prefix"].startswith(".step-"):
            handles.add(handle)
        return handle, path

    def function(*args: Any) -> Any:
        is_checkpoint = args[0] in handles or (name == "replace" and "step-" in str(args[1]))
        handles.clear()
        left[0] -= is_checkpoint
        dies = is_checkpoint and left[0] < 0
        if dies and place == "half written":
            os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
        if dies and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        real(*args)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, name, function)
    tempfile.mkstemp = mkstemp  # type: ignore[assignment]  # takes what write_atomically gives


# --- what has to be equal ---------------------------------------------------------------------------------------------

#: Readings of clocks, and what they are derived from.
CLOCKS = ("nanoseconds", "surroundings", "callbacks", "log/values/time", "episode_times", "t_start", "elapsed")


def everything_in(checkpoint: Path) -> dict[str, Any]:
    """Parameters, optimiser, statistics and the whole training state, clocks left out."""
    found = checkpoints.find(checkpoint)
    model = ALGORITHMS[found.state["algorithm"].lower()].load(checkpoint, device="cpu")
    parameters = {name: _tensors(value) for name, value in model.get_parameters().items()}
    everything = dict(_leaves({"parameters": parameters, "state": found.state}))
    return {path: value for path, value in everything.items() if not _is_clock(path)}


def _is_clock(path: str) -> bool:
    return any(name in path for name in CLOCKS) or ("ep_info_buffer" in path and path.endswith("/t"))


def _tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _tensors(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_tensors(item) for item in value]
    return value.detach().numpy() if isinstance(value, th.Tensor) else value


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}/{key}")
    elif isinstance(tree, (list, tuple)):
        yield f"{path}/length", len(tree)
        for index, value in enumerate(tree):
            yield from _leaves(value, f"{path}/{index}")
    else:
        yield path, (tree.dtype.str, tree.shape, tree.tobytes()) if isinstance(tree, np.ndarray) else tree


def assert_same(first: Path, second: Path) -> None:
    """Two checkpoints hold the same training."""
    a, b = everything_in(first), everything_in(second)
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    different = [path for path in a if a[path] != b[path] and not _both_nan(a[path], b[path])]
    assert not different, different


def _both_nan(a: Any, b: Any) -> bool:
    return all(isinstance(value, float) and math.isnan(value) for value in (a, b))


def rows(path: Path) -> list[dict[str, str]]:
    """Of a CSV file, without columns of times."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


TIMES = {"time/fps", "time/time_elapsed", "time/rollout_fps", "time/update_seconds", "seconds"}


def assert_same_runs(first: Path, second: Path) -> None:
    """Two run folders hold the same training: everything at its end, and every row on the way."""
    a, b = RunFolder(first), RunFolder(second)
    assert_same(checkpoints.in_folder(a.checkpoints)[0], checkpoints.in_folder(b.checkpoints)[0])
    assert rows(a.progress) == rows(b.progress)
    assert rows(a.episodes) == rows(b.episodes)
