"""
The stopwatch of a run. It is used in every library's environment, so it needs Python alone.

A run writes one JSON object. Times of day are used for the process's start, which only another process knows.
"""

import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

PACKAGES = ("stable-baselines3", "sb3-contrib", "sbx-rl", "rlox", "torch", "jax", "gymnasium", "mujoco", "numpy")


class Enough(Exception):  # noqa: N818  # it ends a run, it is no error
    """Raised at the start of an iteration when all that was wanted has been measured."""


class Stopwatch:
    """
    Marks the start of each iteration (rollout and update) and stops the run when enough was measured.

    :param spec: the case, ``seconds`` to measure, ``spawned_at`` (time of day) and more
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.steps_per_iteration = spec["n_envs"] * spec["n_steps"]
        self.n_warm_up = -(-spec["warm_up_steps"] // self.steps_per_iteration)
        self.marks: list[float] = []
        self.began_at = time.time()
        self.imported_at = self.learning_at = self.ended_at = self.began_at

    @property
    def total_steps(self) -> int:
        """What ``learn`` is asked for: a long training of which the beginning is measured, unless it is a cold one."""
        return self.spec["cold_steps"] or 1_000_000

    def imported(self) -> None:
        """Everything is imported."""
        self.imported_at = time.time()

    def learning(self) -> None:
        """Model and environments are built, learning begins."""
        self.learning_at = time.time()

    def iteration_begins(self) -> None:
        """
        Mark the start of an iteration.

        :raises Enough: after the last one wanted
        """
        self.marks.append(time.perf_counter())
        n_measured = len(self.marks) - 1 - self.n_warm_up
        if self.spec["cold_steps"] or n_measured < 1:
            return
        if self.marks[-1] - self.marks[self.n_warm_up] >= self.spec["seconds"]:
            raise Enough

    def run(self, learn: Callable[[], Any]) -> None:
        """Learn until enough is measured, or to the end of a cold run."""
        self.learning()
        try:
            learn()
            self.marks.append(time.perf_counter())
        except Enough:
            pass
        self.ended_at = time.time()

    def result(self) -> dict[str, Any]:
        """Everything measured."""
        whole = self.ended_at - self.imported_at
        result = measured(self.marks, self.n_warm_up, self.steps_per_iteration)
        if self.spec["cold_steps"]:
            steps = (len(self.marks) - 1) * self.steps_per_iteration
            result |= {"steps": steps, "seconds": whole, "steps_per_second": steps / whole}
        return {
            **result,
            "import_seconds": self.imported_at - self.spec["spawned_at"],
            "build_seconds": self.learning_at - self.imported_at,
            "peak_memory_mb": peak_memory_mb(),
            "workers_memory_mb": workers_memory_mb(),
            "machine": machine(),
            "versions": versions(),
        }


def measured(marks: Sequence[float], n_warm_up: int, steps_per_iteration: int) -> dict[str, Any]:
    """
    Speed after the warm-up, and what the warm-up took beyond that speed: compiling, mostly.

    :param marks: start of each iteration and the end of the last one
    :param n_warm_up: iterations that are not measured
    :param steps_per_iteration: environment steps
    """
    n_measured = len(marks) - 1 - n_warm_up
    if n_measured < 1:
        raise ValueError(f"{len(marks) - 1} iterations are too few after a warm-up of {n_warm_up}")
    seconds = marks[-1] - marks[n_warm_up]
    durations = [after - before for before, after in zip(marks[n_warm_up:], marks[n_warm_up + 1 :], strict=False)]
    warm_up = marks[n_warm_up] - marks[0]
    return {
        "steps": n_measured * steps_per_iteration,
        "seconds": seconds,
        "steps_per_second": n_measured * steps_per_iteration / seconds,
        "median_iteration_seconds": statistics.median(durations),
        "warm_up_seconds": warm_up,
        "compile_seconds": max(0.0, warm_up - n_warm_up * seconds / n_measured),
    }


# --- machine ----------------------------------------------------------------------------------------------------------


def peak_memory_mb(process: int | str = "self") -> float | None:
    """Largest resident memory of a process so far; None where the system does not say."""
    # Not getrusage: its maximum begins with the size of the process that started this one.
    found = _proc_number(f"/proc/{process}/status", "VmHWM:")
    return None if found is None else found / 1024


def workers_memory_mb() -> float | None:
    """Memory of all processes below this one, pages they share counted once, now."""
    children: dict[int, list[int]] = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    if not children:
        return None
    total, waiting = 0.0, list(children.get(os.getpid(), []))
    while waiting:
        process = waiting.pop()
        waiting += children.get(process, [])
        total += _proc_number(f"/proc/{process}/smaps_rollup", "Pss:") or 0.0
    return total / 1024


def _proc_number(path: str, name: str) -> float | None:
    try:
        lines = pathlib.Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((float(line.split()[1]) for line in lines if line.startswith(name)), None)


def machine() -> str:
    """Processor, usable cores and system in a line."""
    model = platform.processor() or platform.machine()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    return f"{model}, {n_cores()} cores, {platform.system()}"


def n_cores() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Package → version of what is installed here."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


# --- between the benchmark and a run ----------------------------------------------------------------------------------


def read_spec() -> dict[str, Any]:
    """The argument of a runner: a JSON object."""
    spec: dict[str, Any] = json.loads(sys.argv[1])
    return spec


def write_result(spec: dict[str, Any], result: dict[str, Any]) -> None:
    """Leave the result where the benchmark looks for it; standard output belongs to the libraries."""
    pathlib.Path(spec["result"]).write_text(json.dumps(result), encoding="utf-8")
