"""One small file for each finished run: JSON, compressed. ``gzip -dc FILE`` shows it."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import platform
import subprocess
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import sb3_pgplus
from sb3_pgplus.benchmarking.suites import Run
from sb3_pgplus.configs import ConfigError, algorithm_class, algorithm_names
from sb3_pgplus.construction import PLUMBING
from sb3_pgplus.files import write_atomically

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
ENDING, FAILED, CLAIMED = ".json.gz", ".failed.txt", ".lock"
LAST_EVALUATIONS = 10
"""A run's score is their mean."""
FloatArray = npt.NDArray[np.float64]

#: What tables, estimates and comparisons are made of; :data:`_PARTS` have further entries.
_NEEDED = {
    *("variant", "env", "seed", "settings", "source", "protocol", "evaluations", "training", "seconds"),
    *("evaluation_seconds", "building_seconds", "versions", "code", "machine", "jobs"),
}
_PARTS = {
    "settings": {"n_timesteps"},
    "evaluations": {"steps", "seconds", "returns"},
    "training": {"episodes", "returns"},
}


@dataclass(frozen=True)
class StoredRun:
    """One finished run, as its file has it."""

    data: Mapping[str, Any]

    @property
    def variant(self) -> str:
        """Name of the variant."""
        return str(self.data["variant"])

    @property
    def env(self) -> str:
        """Environment id."""
        return str(self.data["env"])

    @property
    def seed(self) -> int:
        """Random seed."""
        return int(self.data["seed"])

    @property
    def n_timesteps(self) -> int:
        """Length that was asked for."""
        return int(self.data["settings"]["n_timesteps"])

    @cached_property
    def steps(self) -> FloatArray:
        """Environment steps at each evaluation, ``[K]``."""
        return np.array(self.data["evaluations"]["steps"], dtype=np.float64)

    @cached_property
    def seconds(self) -> FloatArray:
        """Training time at each evaluation, without what the evaluations took, ``[K]``."""
        return np.array(self.data["evaluations"]["seconds"], dtype=np.float64)

    @cached_property
    def returns(self) -> FloatArray:
        """Mean return of each evaluation, ``[K]``."""
        return np.array([np.mean(episodes) for episodes in self.data["evaluations"]["returns"]], dtype=np.float64)

    @property
    def score(self) -> float:
        """Mean of the last ten evaluations; never the best one."""
        return float(self.returns[-LAST_EVALUATIONS:].mean())

    @property
    def training_return(self) -> float:
        """Mean return of the training episodes, actions sampled, that ended in the time of the last ten evaluations."""
        counts = np.array(self.data["training"]["episodes"][-LAST_EVALUATIONS:], dtype=np.float64)
        means = np.array(self.data["training"]["returns"][-LAST_EVALUATIONS:], dtype=np.float64)
        return float(np.sum(counts[counts > 0] * means[counts > 0]) / counts.sum()) if counts.sum() else float("nan")


# --- files ------------------------------------------------------------------------------------------------------------


def path_of(store: Path, run: Run) -> Path:
    """
    Where the file of a run is.

    :param store: the folder of all results
    :param run: a training
    """
    return store / run.group / run.variant.name / run.env.replace("/", "-") / f"seed{run.seed}{ENDING}"


def failure_of(store: Path, run: Run) -> Path:
    """
    Where the traceback of a run that failed is.

    :param store: the folder of all results
    :param run: a training
    """
    path = path_of(store, run)
    return path.with_name(path.name.removesuffix(ENDING) + FAILED)


def claim(store: Path, run: Run) -> ExitStack | None:
    """
    Take a run, so that no other process makes it at the same time; of a process that dies the kernel takes it back.
    Where there are no locks of files, it is always free.

    :param store: the folder of all results
    :param run: a training
    :return: to close when the run is made; ``None`` if another process has it
    """
    held = ExitStack()
    if fcntl is None:
        return held
    path = path_of(store, run)
    path = path.with_name(path.name.removesuffix(ENDING) + CLAIMED)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = held.enter_context(path.open("ab"))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise FileNotFoundError  # who had it has removed this file since, and somebody made another
    except (BlockingIOError, FileNotFoundError):
        held.close()
        return None
    except OSError:  # not every file system can, and a full one has no place for it
        return held
    held.callback(path.unlink, missing_ok=True)  # before it is closed, which frees it
    return held


def write(path: Path, data: Mapping[str, Any]) -> None:
    """
    Write a run's file, whole or not at all; the same data give the same bytes.

    :param path: where
    :param data: plain values
    """
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    write_atomically(path, gzip.compress(text.encode(), compresslevel=9, mtime=0))


def read(path: Path) -> StoredRun | None:
    """
    Read a run's file.

    :param path: where
    :return: ``None`` if there is none, or one that is not whole
    :raises ConfigError: if it may be whole and cannot be read: a run made anew would replace it
    """
    try:
        data = json.loads(gzip.decompress(path.read_bytes()))
    except (FileNotFoundError, gzip.BadGzipFile, EOFError, ValueError, zlib.error):  # ValueError: no JSON, or no text
        return None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    number = data.get("format") if isinstance(data, dict) else None
    if isinstance(number, int) and number > FORMAT:
        raise ConfigError(f"{path} cannot be read: format {number} is of a later sb3_pgplus, which made it")
    return StoredRun(data) if number == FORMAT and _is_complete(data) else None


def _is_complete(data: Mapping[str, Any]) -> bool:
    return data.keys() >= _NEEDED and all(
        isinstance(data[part], dict) and data[part].keys() >= names for part, names in _PARTS.items()
    )


def read_all(store: Path, group: str) -> list[StoredRun]:
    """
    All runs of a group, in the order of their names.

    :param store: the folder of all results
    :param group: its folder
    """
    found = (read(path) for path in sorted((store / group).glob(f"*/*/*{ENDING}"), key=_natural))
    return [run for run in found if run is not None]


def damaged(store: Path) -> list[Path]:
    """
    Files that are not whole, below the store. Their runs count as missing.

    :param store: the folder of all results
    """
    return [path.relative_to(store) for path in sorted(store.glob(f"*/*/*/*{ENDING}")) if read(path) is None]


def failures(store: Path) -> Iterator[tuple[Path, str]]:
    """
    Runs that failed and are not there: file below the store, last line of the traceback.

    :param store: the folder of all results
    """
    for path in sorted(store.glob(f"*/*/*/*{FAILED}")):
        if read(path.with_name(path.name.removesuffix(FAILED) + ENDING)) is None:
            lines = path.read_text(encoding="utf-8").strip().splitlines()
            yield path.relative_to(store), lines[-1] if lines else ""


def groups(store: Path) -> list[str]:
    """
    Folders with results.

    :param store: the folder of all results
    """
    return sorted({path.parents[2].name for path in store.glob(f"*/*/*/*{ENDING}")})


def _natural(path: Path) -> tuple[Path, int]:
    digits = path.name.removeprefix("seed").removesuffix(ENDING)
    return path.parent, int(digits) if digits.isdecimal() else -1


# --- what a run was made with -----------------------------------------------------------------------------------------


def described_settings(run: Run) -> dict[str, Any]:
    """
    Everything that decides a run's result, defaults included, as plain values.

    :param run: a training
    """
    settings = run.settings
    values = dict(settings.hyperparameters)
    if settings.algo in algorithm_names():
        values = algorithm_class(settings.algo).hparams_class.defaults() | values
    return {
        **{name: value for name, value in values.items() if name not in PLUMBING or value != PLUMBING[name]},
        "algo": settings.algo,
        **settings.environment.settings(),
        "n_envs": settings.n_envs,
        "n_timesteps": settings.n_timesteps,
        "policy": settings.policy,
    }


#: What :func:`described_settings` leaves out where it has its default.
_LEFT_OUT: dict[str, Any] = {**PLUMBING, **dict.fromkeys(("env_kwargs", "env_wrapper", "frame_stack"))}


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """
    Settings that a stored run has otherwise. A hyperparameter that is new since then counts with its default, and one
    that there is no more does not count. Of other libraries' algorithms a setting that is not said is ``None``.

    :param stored: of the file
    :param wanted: of the training that is asked for
    :return: ``"name: old → new"``
    """
    is_ours = wanted.get("algo") in algorithm_names()
    known = _LEFT_OUT | (algorithm_class(wanted["algo"]).hparams_class.defaults() if is_ours else {})
    wanted, known = json.loads(json.dumps([wanted, known]))  # tuples become lists
    found = []
    for name in dict.fromkeys((*wanted, *stored)):
        if is_ours and name not in wanted and name not in known:
            continue
        old, new = (side.get(name, known.get(name)) for side in (stored, wanted))
        if old != new:
            found.append(f"{name}: {old!r} → {new!r}")
    return found


@cache
def code() -> dict[str, str]:
    """Commit of the package's repository where it is one, and a digest of the package's source."""
    package = Path(sb3_pgplus.__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package).as_posix()}\n".encode() + path.read_bytes())
    found = {"digest": digest.hexdigest()[:16]}
    if commit := _git(package, "rev-parse", "HEAD"):
        changed = _git(package, "status", "--porcelain", "--", str(package), str(package.parent / "zoo_configs"))
        found["commit"] = commit + (" with changes" if changed else "")
    return found


def _git(folder: Path, *arguments: str) -> str:
    if not (folder.parent / ".git").exists():  # an installed package may lie in a repository of something else
        return ""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@cache
def machine() -> str:
    """Processor, number of CPUs, system."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} CPUs, {platform.system()}"


def check_folder(store: Path) -> None:
    """
    See to it that there is a folder to write to, before hours of training have nowhere to go.

    :param store: the folder of all results; made if it is not there
    :raises ConfigError: if it is a file, or nothing can be written there
    """
    if store.exists() and not store.is_dir():
        raise ConfigError(f"--store {store} is a file: give a folder")
    try:
        store.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=store) as probe:
            probe.write(bytes(100_000))
    except OSError as error:
        raise ConfigError(f"nothing can be written to --store {store}: {error.strerror}") from error
