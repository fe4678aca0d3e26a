"""What a trial is: trainings with several seeds, their score, and when to give up."""

from __future__ import annotations

import os
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import optuna

from sb3_pgplus.configs import RunSettings
from sb3_pgplus.statistics import iqm
from sb3_pgplus.tuning.plan import TuningPlan
from sb3_pgplus.tuning.spaces import suggest, trial_settings
from sb3_pgplus.tuning.trainings import (
    LimitExceededError,
    Measured,
    Protocol,
    SeedRun,
    TrainingFailedError,
    train_seeds,
)

LONGEST_TRACEBACK = 8000
SIGN_OF_LIFE_SECONDS = 30.0
RESULT_OF_THE_SETTINGS = (
    "ConfigError",
    "FloatingPointError",
    "HyperparameterError",
    "MemoryError",
    "NonFiniteEnvironmentError",
    "NonFinitePolicyError",
    "NonFiniteUpdateError",
    "OutOfMemoryError",
)
"""A training that ends so tells something about its settings: the trial is pruned, and the sampler learns from it."""


class SurplusTrialError(RuntimeError):
    """Several workers asked for the last trial at the same moment; this one is not needed."""


def worker_name() -> str:
    """Name this process among all that share a study."""
    return f"{platform.node()}:{os.getpid()}:{_start_time(os.getpid())}"


def _start_time(pid: int) -> str:
    """Tells a process from a later one with the same number; empty where the system does not say."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def is_alive(worker: str) -> bool | None:
    """
    Tell whether a worker still runs.

    :param worker: a :func:`worker_name`
    :return: ``None`` if this machine cannot tell, as it is or was on another one
    """
    host, pid, started = worker.rsplit(":", 2)
    if host != platform.node() or os.name != "posix":  # elsewhere `kill` has no way to ask only
        return None
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return _start_time(int(pid)) == started


class Objective:
    """
    Optuna's objective function.

    :param plan: the study
    :param on_wait: called now and then while trainings run
    """

    def __init__(self, plan: TuningPlan, on_wait: Callable[[], None] = lambda: None) -> None:
        self.plan = plan
        self._on_wait = on_wait
        self._seen = 0.0

    def __call__(self, trial: optuna.Trial) -> float | tuple[float, ...]:
        """
        Train with all seeds, or with fewer if the pruner gives up.

        :param trial: Optuna's
        :raises optuna.TrialPruned: if it gives up, or the settings turn out impossible
        :raises TrainingFailedError: if a training fails for another reason
        """
        self._reject_surplus(trial)
        trial.set_user_attr("worker", worker_name())
        settings = self.settings_of(trial)
        trial.set_user_attr("settings", {"n_envs": settings.n_envs, "hyperparameters": settings.hyperparameters})
        runs: list[SeedRun] = []
        try:
            self._train(trial, settings, runs)
        except LimitExceededError as error:
            trial.set_constraint(error.limit, error.excess)
            raise optuna.TrialPruned(str(error)) from error
        except TrainingFailedError as error:
            trial.set_user_attr("error", error.failure.details[-LONGEST_TRACEBACK:])
            if error.failure.kind in RESULT_OF_THE_SETTINGS:
                raise optuna.TrialPruned(str(error)) from error
            raise
        finally:
            trial.set_user_attr("runs", [asdict(run) for run in runs])
        self._set_constraints(trial, runs)
        return self.values(runs)

    def values(self, runs: Sequence[SeedRun]) -> float | tuple[float, ...]:
        """
        :param runs: all trainings of a trial
        :return: what Optuna optimises: the score, or the score and what it cost
        """
        measured = {
            "return": iqm([run.score(self.plan.objective) for run in runs]),
            "time": float(np.mean([run.seconds for run in runs])),
            "memory": float(np.max([run.memory for run in runs])),
        }
        values = tuple(measured[name] for name in self.plan.goals)
        return values if len(values) > 1 else values[0]

    def settings_of(self, trial: optuna.Trial) -> RunSettings:
        """
        :param trial: one with settings of its own (the defaults were put into the queue with theirs), or a sampled one
        """
        params = suggest(trial, self.plan.space)
        exact = trial.user_attrs.get("exact")
        if exact is not None:
            return replace(self.plan.settings, **exact)
        return trial_settings(self.plan.settings, self.plan.space, params)

    def _reject_surplus(self, trial: optuna.Trial) -> None:
        """Of all trials that have not failed, only the first ``n_trials`` may run: exact, without any lock."""
        earlier = trial.study.get_trials(deepcopy=False)[: trial.number]
        if sum(t.state != optuna.trial.TrialState.FAIL for t in earlier) >= self.plan.n_trials:
            trial.set_user_attr("error", "not needed: another worker was faster")
            raise SurplusTrialError("another worker was faster")

    def _train(self, trial: optuna.Trial, settings: RunSettings, runs: list[SeedRun]) -> None:
        plan = self.plan
        # Another order in each trial, so that the pruner does not always look at the same seeds first.
        seeds = random.Random(f"{plan.seed} {trial.number}").sample(plan.seeds, len(plan.seeds))
        together = seeds[: plan.jobs]
        by_index: dict[int, list[float]] = {}

        def report_over_time(measured: Measured) -> None:
            if plan.prune == "time" and measured.seed in together:
                by_index.setdefault(measured.index, []).append(measured.mean_return)
                if len(by_index[measured.index]) == len(together):
                    trial.report(iqm(sorted(by_index[measured.index])), measured.index)
                    if measured.index < plan.n_evaluations:
                        _prune(trial, f"after evaluation {measured.index}")

        def sign_of_life() -> None:
            self._on_wait()
            if time.monotonic() - self._seen > SIGN_OF_LIFE_SECONDS:
                self._seen = time.monotonic()
                trial.set_user_attr("seen", time.time())

        results = train_seeds(
            settings,
            seeds,
            plan.jobs,
            Protocol(plan.n_evaluations, plan.eval_episodes, plan.max_seconds, plan.max_memory, plan.device),
            on_evaluation=report_over_time,
            on_wait=sign_of_life,
        )
        try:
            for run in results:
                runs.append(run)
                if plan.prune == "seeds":
                    trial.report(run.score(plan.objective), run.seed)
                    if len(runs) < len(seeds):
                        _prune(trial, f"after {len(runs)} seeds")
        finally:
            results.close()

    def _set_constraints(self, trial: optuna.Trial, runs: Sequence[SeedRun]) -> None:
        if self.plan.max_seconds is not None:
            trial.set_constraint("time", max(run.seconds for run in runs) - self.plan.max_seconds)
        if self.plan.max_memory is not None:
            trial.set_constraint("memory", max(run.memory for run in runs) - self.plan.max_memory)


def _prune(trial: optuna.Trial, when: str) -> None:
    if trial.should_prune():
        trial.set_user_attr("pruned", when)
        raise optuna.TrialPruned(when)


def stored_runs(trial: optuna.trial.FrozenTrial) -> list[SeedRun]:
    """
    :param trial: of a study
    :return: its finished trainings
    """
    runs: Sequence[Mapping[str, Any]] = trial.user_attrs.get("runs", [])
    return [SeedRun(**run) for run in runs]
