"""What a study is about: the environment, the seeds, what is maximised, and when a trial is given up."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sb3_pgplus.configs import ConfigError, RunSettings
from sb3_pgplus.tuning.spaces import Space, check_setting

FIRST_TEST_SEED = 10_000
"""Tuning seeds count up from 0, test seeds from here."""
EVALUATION_SEEDS = 1_000_000
"""The n evaluation episodes of a training with seed s are the first ones of the seeds from this plus s·n on."""
LAST_EVALUATIONS = 3
"""``objective="final"`` is the mean of so many."""
GOALS = {"return": "maximize", "time": "minimize", "memory": "minimize"}
OBJECTIVES = ("final", "auc")
PRUNERS = ("seeds", "time", "none")
SAMPLERS = ("tpe", "gp", "random")


def processors() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class TuningPlan:
    """
    A study, complete. Every worker that shares it must have the same one but for ``n_trials``, ``jobs`` and ``device``.

    :raises ConfigError: if the parts do not fit together
    """

    settings: RunSettings
    """Environment, budget of one training, and every setting that the space says nothing about."""
    space: Space
    n_trials: int = 50
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    test_seeds: tuple[int, ...] = tuple(range(FIRST_TEST_SEED, FIRST_TEST_SEED + 10))
    """Only for the ranking after the search."""
    top: int = 3
    """So many trials are ranked beside the defaults; 0 for no ranking."""
    objective: str = "final"
    goals: tuple[str, ...] = ("return",)
    prune: str = "seeds"
    prune_p: float = 0.1
    sampler: str = "tpe"
    seed: int = 0
    """Of the sampler."""
    n_evaluations: int = 10
    eval_episodes: int = 5
    max_seconds: float | None = None
    """A training that takes longer is infeasible, and ended there."""
    max_memory: float | None = None
    """In MiB, the same for a training's process."""
    enqueue: bool = True
    jobs: int = field(default_factory=processors)
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, row in self.space.items():
            check_setting(row.setting, self.settings.algo, f"space, {name}")
        _require_one_of("objective", self.objective, OBJECTIVES)
        _require_one_of("prune", self.prune, PRUNERS)
        _require_one_of("sampler", self.sampler, SAMPLERS)
        for name in ("n_trials", "n_evaluations", "eval_episodes", "jobs", "top", "seed"):
            _require_integers(name, [getattr(self, name)])
        for name in ("seeds", "test_seeds"):
            values = getattr(self, name)
            _require_integers(name, values)
            _require(len({*values}) == len(values), f"{name} must differ from each other, got {values}")
        for name in ("top", "seed"):
            _require(getattr(self, name) >= 0, f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("n_trials", "n_evaluations", "eval_episodes", "jobs"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_seconds", "max_memory"):
            limit = getattr(self, name)
            _require(limit is None or limit > 0, f"{name} must be above 0, or None for no limit, got {limit}")
        _require(bool(self.seeds), "a trial needs at least one seed")
        _require(self.top == 0 or bool(self.test_seeds), "a ranking needs at least one test seed")
        _require(0 < self.prune_p < 1, f"prune_p must be between 0 and 1, got {self.prune_p}")
        shared = sorted({*self.seeds} & {*self.test_seeds})
        _require(not shared, f"test seeds must not be tuning seeds, but these are both: {shared}")
        for name in self.goals:
            _require_one_of("multi-objective", name, tuple(GOALS))
        _require(self.goals[:1] == ("return",), f"the first goal must be return, got {', '.join(self.goals)}")
        _require(
            len(self.goals) == 1 or self.prune == "none",
            "Optuna cannot prune with several goals: add --prune none",
        )
        _require(
            self.sampler != "gp" or self.prune == "none",
            "the gp sampler learns from complete trials only: add --prune none",
        )

    def signature(self) -> dict[str, Any]:
        """What workers must agree on, as plain values that are stored with the study."""
        settings = self.settings
        return {
            "algo": settings.algo,
            **settings.environment.settings(),
            "n_timesteps": settings.n_timesteps,
            "n_envs": settings.n_envs,
            "base": {name: repr(value) for name, value in settings.hyperparameters.items()},
            "space": {name: f"{row.setting}: {row.distribution}" for name, row in self.space.items()},
            "seeds": list(self.seeds),
            "test_seeds": list(self.test_seeds),
            "objective": self.objective,
            "goals": list(self.goals),
            "evaluations": [self.n_evaluations, self.eval_episodes],
            "limits": [self.max_seconds, self.max_memory],
        }


def differences(ours: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """
    :param ours: :meth:`TuningPlan.signature` of this worker
    :param stored: that of the study
    :return: what differs, in words
    """
    names = [name for name in {**ours, **stored} if ours.get(name) != stored.get(name)]
    return [f"{name} is {stored.get(name)!r} there and {ours.get(name)!r} here" for name in names]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_integers(name: str, values: Any) -> None:
    is_right = isinstance(values, Sequence) and all([type(value) is int for value in values])
    _require(is_right, f"{name} must be whole, got {values!r}")


def _require_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{name} must be one of {', '.join(allowed)}, got {value!r}")
