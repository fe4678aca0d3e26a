"""Make the runs of a plan that are missing, several side by side; what is finished stays, a failure stops no other."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from sb3_pgplus.benchmarking import store
from sb3_pgplus.benchmarking.suites import Run
from sb3_pgplus.benchmarking.trainings import Ended, Evaluated, Protocol, train
from sb3_pgplus.configs import ConfigError
from sb3_pgplus.files import write_atomically
from sb3_pgplus.processes import Child, ProcessDiedError

POLL_SECONDS = 0.5
TRAININGS = "sb3_pgplus.benchmarking.trainings"


@dataclass(frozen=True)
class Outcome:
    """What became of a plan."""

    finished: int
    """Runs made now."""
    skipped: int
    """Runs that were there."""
    failed: int


@dataclass
class _Active:
    run: Run
    child: Child
    claim: ExitStack = field(default_factory=ExitStack)
    steps: int = 0
    mean_return: float | None = None
    task: Any = None


def changes(stored: store.StoredRun, run: Run, protocol: Protocol) -> list[str]:
    """
    What a stored run was made with otherwise.

    :param stored: the file
    :param run: the training that is asked for
    :param protocol: how it would be evaluated
    :return: ``"name: old → new"``
    """
    old, new = stored.data["protocol"], asdict(protocol)
    return [
        *store.differences(stored.data["settings"], store.described_settings(run)),
        *(f"{name} of the protocol: {old.get(name)!r} → {new[name]!r}" for name in new if old.get(name) != new[name]),
    ]


def missing(runs: Sequence[Run], folder: Path, protocol: Protocol, *, replace: bool = False) -> list[Run]:
    """
    Runs of a plan without a whole file.

    :param runs: the plan
    :param folder: of all results
    :param protocol: how to evaluate
    :param replace: make runs anew that are there with other settings
    :raises ConfigError: if some are, and shall not be replaced
    """
    result, others = [], []
    for run in runs:
        stored = store.read(store.path_of(folder, run))
        changed = changes(stored, run, protocol) if stored else []
        if changed:
            others.append(f"{run} ({'; '.join(changed)})")
        if stored is None or changed:
            result.append(run)
    if others and not replace:
        raise ConfigError(
            f"{len(others)} stored runs have other settings than they would have now, the first: {others[0]}; "
            "use --replace to make them anew, or another --store"
        )
    return result


def make(
    runs: Sequence[Run],
    folder: Path,
    *,
    jobs: int = 1,
    replace: bool = False,
    protocol: Protocol | None = None,
    progress: bool = False,
    console: Console | None = None,
) -> Outcome:
    """
    Train what is missing.

    :param runs: the plan, in its order
    :param folder: of all results
    :param jobs: processes side by side
    :param replace: make runs anew that are there with other settings
    :param protocol: how to evaluate
    :param progress: draw a bar, or print a line for each run where there is no terminal
    :param console: where to report to, by default nowhere
    :raises ConfigError: if stored runs have other settings, or several jobs would falsify times
    :raises KeyboardInterrupt: if Ctrl-C is pressed; finished runs are kept, those under way are given up
    """
    store.check_folder(folder)
    if jobs > 1 and any(run.is_timed for run in runs):
        raise ConfigError(f"--jobs {jobs}: what is measured here is time, and each training needs the machine alone")
    protocol = protocol or Protocol()
    queue = missing(runs, folder, protocol, replace=replace)
    _forget_failures([run for run in runs if run not in queue], folder)
    estimates = Estimates.of(runs, folder)
    with Display(console or Console(quiet=True), runs, queue, jobs, estimates, show=progress) as display:
        found, failed = _train(deque(queue), folder, jobs, protocol, display)
    return Outcome(len(queue) - failed - found, len(runs) - len(queue) + found, failed)


def _train(waiting: deque[Run], folder: Path, jobs: int, protocol: Protocol, display: Display) -> tuple[int, int]:
    """
    Make runs side by side until none is left.

    :return: how many another process made meanwhile, and how many failed
    """
    made_with = {"code": store.code(), "machine": store.machine(), "jobs": jobs}
    active: dict[Any, _Active] = {}
    found = failed = 0
    try:
        while waiting or active:
            while len(active) < jobs and (taken := _take(waiting, folder)):
                run, claim = taken
                if _is_there(run, folder, protocol):
                    claim.close()
                    found += 1
                    display.skipped()
                    continue
                started = _start(run, folder, protocol, made_with)
                started.claim = claim
                active[started.child.connection] = started
                display.began(started)
            display.others_make(waiting if len(active) < jobs else ())
            for ready in wait(list(active), timeout=POLL_SECONDS):
                ended = _hear(active[ready])
                if ended is not None:
                    gone = active.pop(ready)
                    ended = _finish(gone, ended, folder, protocol)
                    failed += bool(ended.error)
                    display.ended(gone, ended)
            display.refresh(waiting, active.values())
    finally:
        for unfinished in active.values():
            unfinished.child.end(terminate=True)
            unfinished.claim.close()
    return found, failed


def _take(waiting: deque[Run], folder: Path) -> tuple[Run, ExitStack] | None:
    """The next run that no other process is making, and its claim; by their next turn others may be made, or free."""
    for _ in range(len(waiting)):
        run = waiting.popleft()
        claim = store.claim(folder, run)
        if claim is not None:
            return run, claim
        waiting.append(run)
    return None


def _is_there(run: Run, folder: Path, protocol: Protocol) -> bool:
    try:
        return not missing([run], folder, protocol, replace=True)
    except ConfigError:  # there is one, and the next start says why it cannot be read
        return True


def _start(run: Run, folder: Path, protocol: Protocol, made_with: dict[str, Any]) -> _Active:
    arguments = (run, protocol, store.path_of(folder, run), made_with)
    return _Active(run, Child(train, arguments, name=str(run), preload=[TRAININGS]))


def _hear(active: _Active) -> Ended | None:
    """What a process says next; it is remembered unless it is the last thing."""
    try:
        message = active.child.receive()
    except ProcessDiedError as error:
        return Ended(f"ProcessDiedError: {error}")
    if isinstance(message, Ended):
        return message
    assert isinstance(message, Evaluated)
    active.steps, active.mean_return = message.steps, message.mean_return
    return None


def _finish(active: _Active, ended: Ended, folder: Path, protocol: Protocol) -> Ended:
    """Note a failure beside the place of the run's file, if that can be done; it is none if that file is there."""
    active.child.end()
    with suppress(ConfigError):  # it cannot be read: the failure stands
        if ended.error and not missing([active.run], folder, protocol, replace=True):
            ended = Ended()
    if ended.error:
        with suppress(OSError):
            write_atomically(store.failure_of(folder, active.run), ended.error.encode())
    else:
        _forget_failures([active.run], folder)
    active.claim.close()
    return ended


def _forget_failures(runs: Sequence[Run], folder: Path) -> None:
    for run in runs:
        with suppress(OSError):
            store.failure_of(folder, run).unlink(missing_ok=True)


# --- how long it takes ------------------------------------------------------------------------------------------------


@dataclass
class Estimates:
    """Seconds that a run takes, by those that are stored: of the same cell, else of the variant, else of all."""

    seconds_per_step: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, runs: Sequence[Run], folder: Path) -> Estimates:
        """
        :param runs: the plan; stored runs of its cells, with any seed, are looked at
        :param folder: of all results
        """
        estimates = cls()
        for group in {run.group for run in runs}:
            for stored in store.read_all(folder, group):
                total = sum(float(stored.data[name]) for name in ("seconds", "evaluation_seconds", "building_seconds"))
                estimates.add(stored.variant, stored.env, total / stored.n_timesteps)
        return estimates

    def add(self, variant: str, env: str, seconds_per_step: float) -> None:
        """
        :param variant: name of the variant
        :param env: environment id
        :param seconds_per_step: of a whole run, evaluations included
        """
        self.seconds_per_step.setdefault((variant, env), []).append(seconds_per_step)

    def seconds(self, run: Run, steps: int = 0) -> float | None:
        """
        What is left of a run.

        :param run: a training
        :param steps: made already
        :return: ``None`` before anything is known
        """
        left = max(run.settings.n_timesteps - steps, 0)
        same_cell = self.seconds_per_step.get((run.variant.name, run.env), [])
        everything = [(variant, x) for (variant, _), found in self.seconds_per_step.items() for x in found]
        same_variant = [x for variant, x in everything if variant == run.variant.name]
        known = same_cell or same_variant or [x for _, x in everything]
        return statistics.median(known) * left if known else None


# --- what is seen -----------------------------------------------------------------------------------------------------


class Display:
    """
    A bar over all runs, with the time that is left, and a line for each run under way.

    :param console: where to draw
    :param runs: the plan
    :param queue: what of it is made now
    :param jobs: processes side by side
    :param estimates: of seconds
    :param show: draw it, or print lines where there is no terminal
    """

    def __init__(
        self,
        console: Console,
        runs: Sequence[Run],
        queue: Sequence[Run],
        jobs: int,
        estimates: Estimates,
        *,
        show: bool,
    ) -> None:
        self._console, self._show, self._jobs, self._estimates = console, show, jobs, estimates
        self._done, self._total = len(runs) - len(queue), len(runs)
        self._left: float | None = None
        self._others_make = 0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(30),
            TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(),
        )
        self._bar = Progress(*columns, console=console)
        self._all = self._bar.add_task("all runs", total=self._total, completed=self._done, told="")

    def __enter__(self) -> Self:
        if self._show and self._console.is_terminal:
            self._bar.start()
        if self._show:
            self._console.print(f"{self._total} runs, {self._done} of them are there", highlight=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def began(self, active: _Active) -> None:
        """
        :param active: a run that has been started
        """
        active.task = self._bar.add_task(f"  {escape(str(active.run))}", total=active.run.settings.n_timesteps, told="")

    def skipped(self) -> None:
        """A run that is there by now."""
        self._done += 1

    def others_make(self, waiting: Sequence[Run] | deque[Run]) -> None:
        """
        :param waiting: runs that other processes make
        """
        if self._show and len(waiting) > self._others_make:
            self._console.print(f"{len(waiting)} runs are made by another process: waiting for it", highlight=False)
        self._others_make = len(waiting)

    def ended(self, active: _Active, ended: Ended) -> None:
        """
        :param active: a run that has ended
        :param ended: how
        """
        self._done += 1
        seconds = time.perf_counter() - active.child.started
        self._bar.remove_task(active.task)
        if not ended.error:
            self._estimates.add(active.run.variant.name, active.run.env, seconds / active.run.settings.n_timesteps)
        if not self._show:
            return
        if ended.error:
            told = f"[red]failed: {escape(ended.error.strip().splitlines()[-1])}"
        else:
            told = f"{_return(active)}  {duration(seconds)}"
        left = f", {duration(self._left)} left" if self._left else ""
        line = f"{self._done}/{self._total}{left}  {escape(str(active.run))}  {told}"
        self._console.print(line, highlight=False, soft_wrap=True)

    def refresh(self, waiting: Sequence[Run] | deque[Run], active: Any) -> None:
        """
        :param waiting: runs to come
        :param active: runs under way
        """
        active = list(active)
        left = [self._estimates.seconds(run) for run in waiting]
        left += [self._estimates.seconds(each.run, each.steps) for each in active]
        known = [seconds for seconds in left if seconds is not None]
        self._left = sum(known) / self._jobs if known and len(known) == len(left) else None
        told = f"{self._done}/{self._total}" + (f", {duration(self._left)} left" if self._left else "")
        self._bar.update(self._all, completed=self._done, told=told)
        for each in active:
            speed = each.steps / max(time.perf_counter() - each.child.started, 1e-9)
            told = f"{_return(each)}  {speed:,.0f} steps/s" if each.steps else "starting"
            self._bar.update(each.task, completed=each.steps, told=told)


def _return(active: _Active) -> str:
    return "" if active.mean_return is None else f"return {active.mean_return:,.1f}"


def duration(seconds: float) -> str:
    """
    In words, for a person who waits.

    :param seconds: any number
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
