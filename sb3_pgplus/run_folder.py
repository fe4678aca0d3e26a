"""One folder per training run: nothing in it is ever overwritten by another run, and no file is left half written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from platform import python_version
from typing import Any

import yaml

from sb3_pgplus import __version__
from sb3_pgplus.configs import ConfigError

CONFIG_HEADER = "# One training run: `sb3-pgplus train --config` with this file repeats it, without its `options`.\n"
REPORTED_PACKAGES = ("stable_baselines3", "torch", "gymnasium", "numpy", "mujoco")


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: Path

    @property
    def model(self) -> Path:
        """The trained model, only there once training ended."""
        return self.path / "model.zip"

    @property
    def config(self) -> Path:
        """All settings, written before training begins."""
        return self.path / "config.yml"

    @property
    def progress(self) -> Path:
        """SB3's logger, one row per dump."""
        return self.path / "progress.csv"

    @property
    def episodes(self) -> Path:
        """One row per finished training episode."""
        return self.path / "episodes.csv"

    @property
    def learning_curve(self) -> Path:
        """Episode returns against environment steps."""
        return self.path / "learning_curve.png"

    @property
    def evaluation(self) -> Path:
        """The evaluation at the end of training."""
        return self.path / "evaluation.yml"

    @property
    def evaluations(self) -> Path:
        """Returns and lengths of the evaluations while training, as SB3 writes them."""
        return self.path / "evaluations.npz"

    @property
    def best_model(self) -> Path:
        """The model with the best of these evaluations."""
        return self.path / "best_model.zip"

    @property
    def videos(self) -> Path:
        """Videos of these evaluations."""
        return self.path / "videos"

    @property
    def report(self) -> Path:
        """The page of ``sb3-pgplus report``."""
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        """What the run can be resumed from."""
        return self.path / "checkpoints"

    @property
    def error(self) -> Path:
        """Traceback of a run that failed."""
        return self.path / "error.txt"

    def holds_a_run(self) -> bool:
        """Tell whether a run has begun here."""
        return any(file.exists() for file in (self.config, self.model, self.progress))

    def write_config(self, settings: Mapping[str, Any]) -> None:
        """
        Write ``config.yml``; it must not be there, so that of two runs started at once only one gets the folder.

        :param settings: plain values
        """
        try:
            with self.config.open("x", encoding="utf-8") as file:
                file.write(CONFIG_HEADER + yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))
                os.fsync(file.fileno())
        except FileExistsError:
            raise _already_used(self.path) from None


def check_unused(out: Path) -> None:
    """
    Refuse a folder that holds a run, before time is spent on anything else.

    :param out: where the run shall go
    :raises ConfigError: if it cannot go there
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: give --out a folder")
    if RunFolder(out).holds_a_run():
        raise _already_used(out)


def create_run_folder(out: Path | None, *, algo: str, env: str, seed: int, root: Path = Path("runs")) -> RunFolder:
    """
    Make the folder of a new run.

    :param out: the folder the user asked for, by default ``runs/<algo>/<env>/seed<S>``, with ``-2``, ``-3``, … if taken
    :param algo: name of the algorithm
    :param env: environment id
    :param seed: random seed
    :param root: where the default folders are
    :raises ConfigError: if the user's folder holds a run or cannot be made
    """
    try:
        if out is not None:
            check_unused(out)
            out.mkdir(parents=True, exist_ok=True)
            return RunFolder(out)
        parent = root / algo / env.replace("/", "-").replace(":", "-")
        parent.mkdir(parents=True, exist_ok=True)
        for number in count(1):
            path = parent / (f"seed{seed}" if number == 1 else f"seed{seed}-{number}")
            try:
                path.mkdir(exist_ok=False)  # atomic: two runs started at once cannot both succeed
            except FileExistsError:
                continue
            return RunFolder(path)
    except OSError as error:
        raise ConfigError(f"cannot make the run folder {error.filename}: {error.strerror}") from error
    raise AssertionError("unreachable: the numbers do not end")


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a run's result."""
    versions = {"python": python_version(), "sb3_pgplus": __version__}
    for package in REPORTED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _already_used(path: Path) -> ConfigError:
    return ConfigError(f"{path} already holds a run, which is never overwritten: choose another --out or remove it")
