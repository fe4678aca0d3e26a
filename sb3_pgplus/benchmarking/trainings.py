"""One training of a suite, in a process of its own: train, evaluate at equal distances, write the file."""

from __future__ import annotations

import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, sync_envs_normalization

from sb3_pgplus.benchmarking import stock, store
from sb3_pgplus.benchmarking.suites import Run
from sb3_pgplus.environments import make_environments
from sb3_pgplus.evaluation import EVALUATION_SEED, play_episodes
from sb3_pgplus.run_folder import package_versions
from sb3_pgplus.training import build_model
from sb3_pgplus.vec_env import backend_of
from sb3_pgplus.vec_env.common import usable_cpus


@dataclass(frozen=True)
class Protocol:
    """How a training is evaluated."""

    n_evaluations: int = 50
    """Equally far apart, the last one of the trained policy: every 20,000 steps of a million."""
    n_episodes: int = 10
    """Of each evaluation, from the same ten initial states every time."""
    seed: int = EVALUATION_SEED


@dataclass(frozen=True)
class Evaluated:
    """What a training's process tells after each evaluation."""

    steps: int
    mean_return: float


@dataclass(frozen=True)
class Ended:
    """The last thing it tells."""

    error: str = ""
    """The traceback, if it failed."""


def train(connection: Connection, run: Run, protocol: Protocol, path: Path, made_with: dict[str, Any]) -> None:
    """
    Train, and write the file.

    :param connection: tells how far it is
    :param run: what to train
    :param protocol: how to evaluate
    :param path: the file
    :param made_with: about code and machine, for the file
    """
    try:
        store.write(path, result(run, protocol, made_with, connection))
        ended = Ended()
    except BaseException as error:
        ended = Ended("".join(traceback.format_exception(error)))
    with suppress(OSError):
        connection.send(ended)


def result(run: Run, protocol: Protocol, made_with: dict[str, Any], connection: Connection) -> dict[str, Any]:
    """
    Train, and return what the file holds.

    :param run: what to train
    :param protocol: how to evaluate
    :param made_with: about code and machine
    :param connection: tells how far it is
    """
    began = datetime.now(UTC).isoformat(timespec="seconds")
    settings = run.settings
    is_stock = settings.algo in stock.STOCK
    # One thread each where several trainings run side by side. SB3's own environments have none to choose.
    n_threads = None if settings.backend == "dummy" or run.is_timed else 1
    if run.is_timed:
        th.set_num_threads(usable_cpus())
    env = make_environments(
        settings.environment, n_envs=settings.n_envs, seed=run.seed, backend=settings.backend, n_threads=n_threads
    )
    eval_env = make_environments(settings.environment, n_envs=protocol.n_episodes, n_threads=1)
    try:
        start = time.perf_counter()
        model: Any = stock.build(settings, env) if is_stock else build_model(settings, env, device="cpu")
        building = time.perf_counter() - start
        if is_stock:
            gamma = settings.hyperparameters.get("gamma", 0.99)
            eval_env = stock.normalized(eval_env, settings.hyperparameters.get("normalize"), gamma)
        evaluations = Evaluations(eval_env, protocol, settings.n_timesteps, connection)
        model.learn(settings.n_timesteps, callback=evaluations, log_interval=None)
        backend = backend_of(env)
    finally:
        env.close()
        eval_env.close()
    return {
        "format": store.FORMAT,
        "group": run.group,
        "variant": run.variant.name,
        "env": run.env,
        "seed": run.seed,
        "settings": store.described_settings(run),
        "source": settings.source,
        "protocol": asdict(protocol),
        "evaluations": evaluations.record,
        "training": evaluations.training,
        "seconds": round(evaluations.training_seconds, 3),
        "evaluation_seconds": round(evaluations.evaluation_seconds, 3),
        "building_seconds": round(building, 3),
        "engine": None if is_stock else model.engine_report(),
        "backend": backend,
        "threads": th.get_num_threads(),
        "versions": _versions(settings.algo),
        "began": began,
        **made_with,
    }


def _versions(algo: str) -> dict[str, str]:
    found = package_versions()
    with suppress(PackageNotFoundError):
        if algo == "sb3-contrib-trpo":
            found["sb3_contrib"] = version("sb3-contrib")
        if algo in stock.STOCK:
            found["rl_zoo3"] = version("rl_zoo3")
    return found


class Evaluations(BaseCallback):
    """
    Evaluates at equal distances, and after the last update; keeps every episode's return, and the training's clock.

    :param env: raw, one copy for each episode; a ``VecNormalize`` around it gets the training's statistics
    :param protocol: how many, and from which states
    :param n_timesteps: length of the training
    :param connection: tells how far it is
    """

    def __init__(self, env: VecEnv, protocol: Protocol, n_timesteps: int, connection: Connection) -> None:
        super().__init__()
        self.record: dict[str, list[Any]] = {"steps": [], "seconds": [], "returns": [], "lengths": []}
        self.training: dict[str, list[Any]] = {"episodes": [], "returns": [], "lengths": []}
        self.training_seconds = self.evaluation_seconds = 0.0
        self._env, self._protocol, self._n_timesteps, self._connection = env, protocol, n_timesteps, connection
        self._episodes: list[tuple[float, int]] = []
        self._start = 0.0
        if isinstance(env, VecNormalize):
            env.training = env.norm_reward = False

    def _on_training_start(self) -> None:
        self._start = time.perf_counter()

    def _on_step(self) -> bool:
        if self.locals["dones"].any():
            ended = [info["episode"] for info in self.locals["infos"] if "episode" in info]
            self._episodes += [(float(episode["r"]), int(episode["l"])) for episode in ended]
        interval = self._n_timesteps / self._protocol.n_evaluations
        number = len(self.record["steps"])
        if number < self._protocol.n_evaluations - 1 and self.num_timesteps >= interval * (number + 1):
            self._evaluate()
        return True

    def _on_training_end(self) -> None:
        self._evaluate()

    def _evaluate(self) -> None:
        begin = time.perf_counter()
        self.training_seconds = begin - self._start - self.evaluation_seconds
        returns, lengths = _play(self.model, self._env, self._protocol)
        if not np.isfinite(returns).all():
            raise FloatingPointError(f"an evaluation at {self.num_timesteps} steps gave the returns {returns}")
        row = {"steps": self.num_timesteps, "seconds": round(self.training_seconds, 3)}
        for name, value in {**row, "returns": returns, "lengths": lengths}.items():
            self.record[name].append(value)
        self._close_interval()
        self._connection.send(Evaluated(self.num_timesteps, float(np.mean(returns))))
        self.evaluation_seconds += time.perf_counter() - begin

    def _close_interval(self) -> None:
        """Training episodes since the last evaluation: a mean, since some tasks have tens of thousands of them."""
        returns, lengths = zip(*self._episodes, strict=True) if self._episodes else ((), ())
        self.training["episodes"].append(len(returns))
        self.training["returns"].append(round(float(np.mean(returns)), 3) if returns else 0.0)
        self.training["lengths"].append(round(float(np.mean(lengths)), 1) if lengths else 0.0)
        self._episodes = []


def _play(model: BaseAlgorithm, env: VecEnv, protocol: Protocol) -> tuple[list[float], list[int]]:
    """One episode in each copy, always from the same states; the actions are the policy's mode, so nothing is drawn."""
    training_env = model.get_env()
    if isinstance(env, VecNormalize) and training_env is not None:
        sync_envs_normalization(training_env, env)
    played = play_episodes(model, env, n_episodes=protocol.n_episodes, seed=protocol.seed, warn=False)
    return played.returns, played.lengths
