"""
Trainings of one setting with several seeds, each in a process of its own.

A process per training means: one torch thread each, memory measured where it was used, and whatever ends it ends that
training only (:mod:`sb3_pgplus.processes`).
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_pgplus.configs import RunSettings
from sb3_pgplus.environments import make_environments
from sb3_pgplus.evaluation import play_episodes
from sb3_pgplus.processes import Child, ProcessDiedError
from sb3_pgplus.training import build_model
from sb3_pgplus.tuning.plan import EVALUATION_SEEDS, LAST_EVALUATIONS

POLL_SECONDS = 0.5
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Protocol:
    """How a training is evaluated, and when it is ended."""

    n_evaluations: int
    eval_episodes: int
    max_seconds: float | None = None
    max_memory: float | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class SeedRun:
    """One finished training."""

    seed: int
    returns: list[float]
    """Mean return of each evaluation; they are equally far apart, and the last one is of the trained policy."""
    seconds: float
    memory: float
    """Most that its process had, in MiB."""

    def score(self, objective: str) -> float:
        """
        :param objective: ``"final"``: mean of the last evaluations; ``"auc"``: mean of all, the area under the curve
        """
        return float(np.mean(self.returns[-LAST_EVALUATIONS:] if objective == "final" else self.returns))


@dataclass(frozen=True)
class Measured:
    """What a training's process tells after each evaluation."""

    seed: int
    index: int
    """Counts evaluations from 1."""
    mean_return: float
    memory: float


@dataclass(frozen=True)
class Failure:
    """What a training's process tells about an exception, which itself may not travel between processes."""

    seed: int
    kind: str
    """Name of the exception's class."""
    message: str
    details: str
    """The traceback."""


class TrainingFailedError(RuntimeError):
    """
    A training ended with an exception, or its process died.

    :param failure: what is known about it
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"seed {failure.seed}: {failure.kind}: {failure.message}")
        self.failure = failure


class LimitExceededError(RuntimeError):
    """
    A training took more time or memory than allowed.

    :param limit: which
    :param excess: how much more
    """

    def __init__(self, limit: str, excess: float) -> None:
        super().__init__(f"{limit} exceeded by {excess:.6g}")
        self.limit = limit
        self.excess = excess


# --- in the parent ----------------------------------------------------------------------------------------------------


def train_seeds(
    settings: RunSettings,
    seeds: Sequence[int],
    jobs: int,
    protocol: Protocol,
    *,
    on_evaluation: Callable[[Measured], None] = lambda _: None,
    on_wait: Callable[[], None] = lambda: None,
) -> Generator[SeedRun, None, None]:
    """
    Train with each seed, ``jobs`` at a time; closing the iterator ends what still runs.

    Results come in the order of ``seeds``, whichever is ready first, so that what is decided on them does not depend on
    the machine's load.

    :param settings: of the training; their seed is replaced
    :param seeds: one training each
    :param jobs: processes side by side
    :param protocol: evaluation and limits
    :param on_evaluation: told every evaluation
    :param on_wait: called now and then; what it raises ends all
    :raises TrainingFailedError: if a training fails
    :raises LimitExceededError: if one takes too much
    """
    queue, running, finished = list(seeds), dict[Connection, tuple[int, Child]](), dict[int, SeedRun]()
    try:
        for seed in seeds:
            while seed not in finished:
                while queue and len(running) < jobs:
                    first, child = queue[0], _start(replace(settings, seed=queue.pop(0)), protocol)
                    running[child.connection] = first, child
                for ready in wait(list(running), timeout=POLL_SECONDS):
                    assert isinstance(ready, Connection)
                    message = _receive(*running[ready])
                    _check_memory(message.memory, protocol)
                    if isinstance(message, Measured):
                        on_evaluation(message)
                    else:
                        finished[message.seed] = message
                        running.pop(ready)[1].end()
                _check_time([child for _, child in running.values()], protocol)
                on_wait()
            yield finished.pop(seed)
    finally:
        for _, child in running.values():
            child.end(terminate=True)


def _start(settings: RunSettings, protocol: Protocol) -> Child:
    return Child(_train, (settings, protocol), name=f"seed {settings.seed}", preload=[__name__])


def _receive(seed: int, child: Child) -> Measured | SeedRun:
    try:
        message = child.receive()
    except ProcessDiedError as error:
        raise TrainingFailedError(Failure(seed, "ProcessDied", str(error), str(error))) from None
    if isinstance(message, Failure):
        raise TrainingFailedError(message)
    assert isinstance(message, Measured | SeedRun)
    return message


def _check_memory(used: float, protocol: Protocol) -> None:
    if protocol.max_memory is not None and used > protocol.max_memory:
        raise LimitExceededError("memory", used - protocol.max_memory)


def _check_time(running: Sequence[Child], protocol: Protocol) -> None:
    if protocol.max_seconds is None:
        return
    longest = max((time.perf_counter() - child.started for child in running), default=0.0)
    if longest > protocol.max_seconds:
        raise LimitExceededError("time", longest - protocol.max_seconds)


# --- in the child -----------------------------------------------------------------------------------------------------


def _train(connection: Connection, settings: RunSettings, protocol: Protocol) -> None:
    try:
        connection.send(_run(connection, settings, protocol))
    except BaseException as error:
        details = "".join(traceback.format_exception(error))
        with suppress(OSError):
            connection.send(Failure(settings.seed, type(error).__name__, str(error), details))


def _run(connection: Connection, settings: RunSettings, protocol: Protocol) -> SeedRun:
    start = time.perf_counter()
    env = make_environments(settings.environment, n_envs=settings.n_envs, seed=settings.seed, backend=settings.backend)
    eval_env = make_environments(settings.environment, n_envs=protocol.eval_episodes, backend=settings.backend)
    try:
        model = build_model(settings, env, device=protocol.device)
        callback = _Evaluations(connection, settings, eval_env, protocol)
        model.learn(settings.n_timesteps, callback=callback, log_interval=None)
    finally:
        env.close()
        eval_env.close()
    return SeedRun(settings.seed, callback.returns, time.perf_counter() - start, _peak_memory())


class _Evaluations(BaseCallback):
    """Equally spaced evaluations; the last one after the last update."""

    def __init__(self, connection: Connection, settings: RunSettings, env: VecEnv, protocol: Protocol) -> None:
        super().__init__()
        self.returns: list[float] = []
        self._connection, self._settings, self._env, self._protocol = connection, settings, env, protocol

    def _on_step(self) -> bool:
        interval = self._settings.n_timesteps / self._protocol.n_evaluations
        while len(self.returns) < self._protocol.n_evaluations - 1 and self.num_timesteps >= interval * (
            len(self.returns) + 1
        ):
            self._evaluate()
        return True

    def _on_training_end(self) -> None:
        self._evaluate()

    def _evaluate(self) -> None:
        n_episodes = self._protocol.eval_episodes
        seed = EVALUATION_SEEDS + self._settings.seed * n_episodes
        mean = np.mean(play_episodes(self.model, self._env, n_episodes=n_episodes, seed=seed, warn=False).returns)
        if not np.isfinite(mean):
            raise FloatingPointError(f"the mean return of evaluation {len(self.returns) + 1} is {mean}")
        self.returns.append(float(mean))
        self._connection.send(Measured(self._settings.seed, len(self.returns), self.returns[-1], _peak_memory()))


def _peak_memory() -> float:
    """Most memory this process has had, in MiB; NaN where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MEBIBYTE if sys.platform == "darwin" else peak / 1024
