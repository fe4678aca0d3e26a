"""The stored runs of a group by cell, the published figures, and the numbers that tables and figures show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sb3_pgplus import statistics
from sb3_pgplus.benchmarking import store
from sb3_pgplus.configs import read_mapping
from sb3_pgplus.statistics import Interval

FloatArray = npt.NDArray[np.float64]
GOAL = 0.8
"""Share of another's final score that a time is measured to."""


@dataclass(frozen=True)
class Summary:
    """IQM over the seeds of a cell."""

    value: float
    interval: Interval
    n_seeds: int


@dataclass(frozen=True)
class Curve:
    """IQM over the seeds of a cell at each evaluation, all ``[K]``."""

    steps: FloatArray
    seconds: FloatArray
    """Mean over seeds of the training time."""
    returns: FloatArray
    interval: tuple[FloatArray, FloatArray] | None
    """Pointwise; ``None`` for a single seed."""


def _condition(run: store.StoredRun) -> tuple[str, int]:
    return str(run.data["machine"]), int(run.data["jobs"])


class Results:
    """
    All stored runs of a group.

    :param group: its folder
    :param runs: from :func:`sb3_pgplus.benchmarking.store.read_all`
    """

    def __init__(self, group: str, runs: Iterable[store.StoredRun]) -> None:
        self.group, self.kind = group, group.partition("-")[0]
        self.cells: dict[tuple[str, str], list[store.StoredRun]] = {}
        for run in runs:
            self.cells.setdefault((run.variant, run.env), []).append(run)

    @property
    def runs(self) -> list[store.StoredRun]:
        """All of them."""
        return [run for runs in self.cells.values() for run in runs]

    def scores(self, variant: str, env: str) -> FloatArray:
        """
        :param variant: name
        :param env: environment id
        :return: one score for each seed
        """
        return np.array([run.score for run in self.cells.get((variant, env), [])], dtype=np.float64)

    def summary(self, variant: str, env: str, *, training: bool = False) -> Summary | None:
        """
        :param variant: name
        :param env: environment id
        :param training: of the training's episodes, actions sampled, in place of the evaluations
        """
        runs = self.cells.get((variant, env), [])
        values = [run.training_return if training else run.score for run in runs]
        values = [value for value in values if np.isfinite(value)]
        if not values:
            return None
        return Summary(statistics.iqm(values), statistics.iqm_interval(values), len(values))

    def curve(self, variant: str, env: str) -> Curve | None:
        """
        :param variant: name
        :param env: environment id
        """
        runs = self.cells.get((variant, env), [])
        if not runs:
            return None
        k = min(len(run.steps) for run in runs)
        steps, seconds, returns = (
            np.array([getattr(run, name)[:k] for run in runs]) for name in ("steps", "seconds", "returns")
        )
        value, interval = statistics.curve(returns)
        return Curve(steps.mean(axis=0), seconds.mean(axis=0), value, interval)

    def normalized(self, variant: str, tasks: Sequence[str]) -> list[FloatArray] | None:
        """
        Scores with random actions at 0 and the published PPO figure at 1.

        :param variant: name
        :param tasks: environment ids
        :return: one array for each task; ``None`` unless all tasks have runs and both figures
        """
        return self._scaled(tasks, [self.scores(variant, env) for env in tasks])

    def _scaled(self, tasks: Sequence[str], scores: Sequence[FloatArray]) -> list[FloatArray] | None:
        low, high = published()["random"], published().get(self.kind, {}).get("ppoplus", {})
        if not all(len(values) and env in low and env in high for env, values in zip(tasks, scores, strict=True)):
            return None
        return [(v - low[env]) / (high[env][0] - low[env]) for env, v in zip(tasks, scores, strict=True)]

    def improvement(
        self, ours: str, theirs: str, tasks: Sequence[str]
    ) -> tuple[float, Interval | None, list[str]] | None:
        """
        Probability of improvement over the tasks that both have runs of.

        :param ours: name of a variant
        :param theirs: name of another
        :param tasks: environment ids
        :return: probability, interval, tasks; ``None`` if there is no common task
        """
        common = [env for env in tasks if len(self.scores(ours, env)) and len(self.scores(theirs, env))]
        if not common:
            return None
        pairs = [[self.scores(variant, env) for env in common] for variant in (ours, theirs)]
        value, interval = statistics.probability_of_improvement(*pairs)
        return value, interval, common

    def conditions(self, variant: str, env: str) -> set[tuple[str, int]]:
        """
        Under which a cell's times were measured: machines, trainings side by side.

        :param variant: name
        :param env: environment id
        """
        return {_condition(run) for run in self.cells.get((variant, env), [])}

    def of_one_condition(self) -> Results:
        """
        The runs whose times can be compared: of a cell with some under the most frequent condition these alone.
        """
        found = Counter(_condition(run) for run in self.runs)
        usual = min(found, key=lambda condition: (-found[condition], condition), default=None)
        kept = {cell: [run for run in runs if _condition(run) == usual] or runs for cell, runs in self.cells.items()}
        return Results(self.group, [run for runs in kept.values() for run in runs])

    def seconds_to(self, variant: str, env: str, goal: float) -> float | None:
        """
        Training time until the IQM of an evaluation first reaches a goal.

        :param variant: name
        :param env: environment id
        :param goal: return
        :return: ``None`` if it never does, or there are no runs
        """
        found = self.curve(variant, env)
        if found is None or not (found.returns >= goal).any():
            return None
        return float(found.seconds[np.argmax(found.returns >= goal)])

    def others_on_other_tasks(self, variants: Iterable[str]) -> list[str]:
        """
        Of variants that have one set for all tasks, those whose runs have not.

        :param variants: names
        """
        found = []
        for name in variants:
            # What belongs to the task is left out.
            settings = [run.data["settings"] | {"env": None} for run in self.runs if run.variant == name]
            if any(store.differences(settings[0], other) for other in settings[1:]):
                found.append(name)
        return found

    def differs_from_ours(self, ours: str, theirs: str, names: Iterable[str]) -> list[str]:
        """
        Tasks on which two variants were not trained with the same settings.

        :param ours: name of a variant
        :param theirs: name of another
        :param names: settings that have to be the same
        """
        names = list(names)

        def settings(variant: str, env: str) -> list[Any]:
            return [[run.data["settings"].get(name) for name in names] for run in self.cells.get((variant, env), [])]

        common = [env for variant, env in self.cells if variant == theirs and (ours, env) in self.cells]
        return [env for env in common if any(a != b for a in settings(ours, env) for b in settings(theirs, env))]

    def with_mixed_settings(self) -> list[tuple[str, str]]:
        """Cells whose runs were not all made with the same settings."""
        return [
            cell
            for cell, runs in self.cells.items()
            if any(store.differences(runs[0].data["settings"], run.data["settings"]) for run in runs[1:])
        ]


@cache
def published() -> dict[str, Any]:
    """Content of ``published.yml``."""
    return read_mapping(Path(__file__).with_name("published.yml"))
