"""Reading run folders: whatever is there, of runs that ended, were interrupted, failed, or are still training."""

from __future__ import annotations

import csv
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import yaml

from sb3_pgplus.configs import ALGORITHMS, ConfigError, read_mapping
from sb3_pgplus.reporting.learning_curve import Episodes, read_episodes, smooth, window_of
from sb3_pgplus.run_folder import RunFolder

FloatArray = npt.NDArray[np.float64]
Axis = Literal["steps", "time"]
STEPS, SECONDS = "time/total_timesteps", "time/time_elapsed"
#: Settings that do not make two runs different experiments.
NOT_SETTINGS = ("algo", "env", "seed", "made_with", "options")


@dataclass(frozen=True)
class Series:
    """A metric over a training, without the rows that have none."""

    steps: FloatArray
    values: FloatArray
    seconds: FloatArray
    """Since training began; NaN where nobody says."""

    def __len__(self) -> int:
        return len(self.values)

    def over(self, axis: Axis) -> FloatArray:
        """
        :param axis: ``"steps"`` or ``"time"``
        """
        return self.steps if axis == "steps" else self.seconds


@dataclass(frozen=True)
class Evaluations:
    """The evaluations while training."""

    steps: FloatArray
    returns: FloatArray
    """``[n_evaluations, n_episodes]``"""
    lengths: FloatArray
    """``[n_evaluations, n_episodes]``"""
    seconds: FloatArray
    """``[n_evaluations]``, empty in a file of SB3's"""


@dataclass(frozen=True)
class Run:
    """What a run folder tells."""

    folder: RunFolder
    settings: dict[str, Any]
    """``config.yml``"""
    episodes: Episodes = field(default_factory=Episodes)
    progress: Mapping[str, Series] = field(default_factory=dict)
    """Column of ``progress.csv`` → its values"""
    evaluations: Evaluations | None = None
    final: dict[str, Any] | None = None
    """``evaluation.yml``"""
    error: str | None = None
    """``error.txt``"""

    @property
    def algorithm(self) -> str:
        """Name of the class."""
        return ALGORITHMS.get(self.settings["algo"], str(self.settings["algo"]))

    @property
    def steps(self) -> int:
        """Environment steps that are on record."""
        ends = [series.steps[-1] for series in self.progress.values() if len(series)]
        return int(max([*ends, *self.episodes.steps[-1:], 0]))

    @property
    def status(self) -> str:
        """How the training ended."""
        if self.error is not None:
            return "failed"
        if not self.folder.model.is_file():
            return "unfinished"  # still training, or killed
        return "finished" if self.steps >= 0.98 * int(self.settings.get("n_timesteps", 0)) else "interrupted"

    def curve(self, source: str = "training") -> Series:
        """
        The learning curve.

        :param source: ``"training"``: running mean of the training episodes' returns; ``"evaluations"``: their means
        :raises ConfigError: if there is none
        """
        if source == "evaluations":
            if self.evaluations is None:
                raise ConfigError(f"{self.folder.path} has no evaluations.npz: train with --eval-freq")
            found = self.evaluations
            seconds = found.seconds if len(found.seconds) else np.full(len(found.steps), np.nan)
            return Series(found.steps, found.returns.mean(axis=1), seconds)
        if not np.isfinite(self.episodes.returns).any():
            raise ConfigError(f"{self.folder.path} has no learning curve: no training episode has ended with a number")
        means, _ = smooth(self.episodes.returns, window_of(len(self.episodes)))
        steps, seconds = (np.asarray(x, dtype=np.float64) for x in (self.episodes.steps, self.episodes.seconds))
        known = np.isfinite(means)
        return Series(steps[known], means[known], seconds[known])


# --- reading ----------------------------------------------------------------------------------------------------------


def find_runs(paths: Iterable[Path]) -> list[Run]:
    """
    Read the runs in some folders, at any depth. What a run folder itself holds is no run of its own: ``push --dry-run``
    leaves a copy of the configuration there.

    :param paths: run folders, or folders that hold some
    :raises ConfigError: if one of them holds none
    """
    folders: dict[Path, None] = {}
    for path in paths:
        inside = {file.parent for file in path.rglob("config.yml")}
        found = sorted(folder for folder in inside if inside.isdisjoint(folder.parents))
        if not found:
            raise ConfigError(f"{path} is no run folder and holds none: there is no config.yml in it")
        folders |= dict.fromkeys(found)
    return [read_run(folder) for folder in folders]


def read_run(path: Path) -> Run:
    """
    Read one run folder.

    :param path: the folder
    :raises ConfigError: if it is none, or a file in it is no such file
    """
    folder = RunFolder(path)
    if not folder.config.is_file():
        raise ConfigError(f"{path} is no run folder: there is no config.yml in it")
    settings = read_mapping(folder.config)
    if missing := {"algo", "env"} - settings.keys():
        raise ConfigError(f"{folder.config} is not of a run: it does not name its {' and '.join(sorted(missing))}")
    try:
        return Run(
            folder,
            settings,
            read_episodes(folder.episodes) if folder.episodes.is_file() else Episodes(),
            read_metrics(folder.progress) if folder.progress.is_file() else {},
            read_evaluations(folder.evaluations) if folder.evaluations.is_file() else None,
            read_final(folder.evaluation) if folder.evaluation.is_file() else None,
            folder.error.read_text("utf-8", errors="replace") if folder.error.is_file() else None,
        )
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def read_metrics(path: Path) -> dict[str, Series]:
    """
    Read SB3's ``progress.csv``.

    :param path: the file
    :return: column → its values; cells that are empty or no numbers are left out
    """
    points: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(line for line in file if line.endswith("\n")):
            numbers = {name: number for name, text in row.items() if name and (number := _number(text)) is not None}
            for name in numbers.keys() - {STEPS} if STEPS in numbers else ():
                points[name].append((numbers[STEPS], numbers[name]))
    columns = {name: np.array(pairs, dtype=np.float64).T for name, pairs in sorted(points.items())}
    clock = columns.get(SECONDS)  # which rows of evaluations leave out
    return {
        name: Series(steps, values, np.full(len(steps), np.nan) if clock is None else np.interp(steps, *clock))
        for name, (steps, values) in columns.items()
    }


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def read_evaluations(path: Path) -> Evaluations:
    """
    Read ``evaluations.npz``, SB3's or ours.

    :param path: the file
    """
    with np.load(path, allow_pickle=False) as file:
        steps, returns, lengths = (file[name].astype(np.float64) for name in ("timesteps", "results", "ep_lengths"))
        seconds = file["seconds"].astype(np.float64) if "seconds" in file else np.empty(0)
    return Evaluations(steps, returns, lengths, seconds)


def read_final(path: Path) -> dict[str, Any]:
    """
    Read ``evaluation.yml``.

    :param path: the file
    :raises ConfigError: if it has no returns and lengths of episodes
    """
    final = read_mapping(path)
    for name in ("returns", "lengths"):
        numbers = final.get(name)
        if not isinstance(numbers, list) or not numbers or not all(isinstance(x, int | float) for x in numbers):
            raise ConfigError(f"{path.name} has no list of numbers {name!r}")
    return final


# --- which runs are the same experiment -------------------------------------------------------------------------------


def grouped(runs: Sequence[Run]) -> dict[str, dict[str, list[Run]]]:
    """
    Put runs together that differ in nothing but their seed.

    :param runs: any
    :return: environment → what tells a group from the others (algorithm, settings) → its runs
    """
    groups: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        label = ", ".join([run.algorithm, *(f"{name}={_shown(run, name)}" for name in _differing(run, runs))])
        groups.setdefault(str(run.settings["env"]), {}).setdefault(label, []).append(run)
    return groups


def _differing(run: Run, runs: Sequence[Run]) -> list[str]:
    """Settings that runs of the same algorithm and environment do not agree on."""
    kin = [other for other in runs if all(other.settings[key] == run.settings[key] for key in ("algo", "env"))]
    names = dict.fromkeys(name for other in kin for name in other.settings if name not in NOT_SETTINGS)
    return [name for name in names if any(_shown(other, name) != _shown(run, name) for other in kin)]


def _shown(run: Run, name: str) -> str:
    value = run.settings.get(name)
    if isinstance(value, dict | list):
        return yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    return str(value)
