"""What is seen while a study runs: a bar with the best score so far, or a line per trial where there is no terminal."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sb3_pgplus.tuning.plan import TuningPlan
from sb3_pgplus.tuning.ranking import best_trials

REFRESH_SECONDS = 1.0


class StudyProgress:
    """
    Counts the trials of the whole study, also those of other workers.

    :param console: where to draw
    :param plan: the study's
    :param show: draw a bar; lines for this worker's trials are printed where there is no terminal
    """

    def __init__(self, console: Console, plan: TuningPlan, show: bool = True) -> None:
        self._console, self._plan, self._show = console, plan, show
        self._next = 0.0
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("trials  {task.description}"), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console)
        self._task = self._bar.add_task("", total=plan.n_trials)

    def __enter__(self) -> Self:
        if self._show and self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def refresh(self, study: optuna.Study) -> None:
        """
        :param study: read about once a second
        """
        if time.monotonic() < self._next or not (self._show and self._console.is_terminal):
            return
        self._next = time.monotonic() + REFRESH_SECONDS
        states = [trial.state for trial in study.get_trials(deepcopy=False)]
        done = states.count(TrialState.COMPLETE) + states.count(TrialState.PRUNED)
        parts = [f"{states.count(TrialState.RUNNING)} running", _best(study, self._plan)]
        if failed := states.count(TrialState.FAIL):
            parts.insert(1, f"[red]{failed} failed[/]")
        if done >= self._plan.n_trials:
            parts[0] = "ranking on test seeds"
        self._bar.update(self._task, completed=min(done, self._plan.n_trials), description="  ".join(parts))

    def trial_ended(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """
        :param study: the study
        :param trial: the one that this worker has just ended
        """
        self._next = 0.0
        self.refresh(study)
        failed = trial.state == TrialState.FAIL
        if not self._show or (self._console.is_terminal and not failed):
            return
        values = " ".join(f"{value:,.2f}" for value in trial.values or [])
        why = trial.user_attrs.get("error", "").strip().splitlines()
        told = values if trial.state == TrialState.COMPLETE else trial.user_attrs.get("pruned") or "".join(why[-1:])
        line = f"trial {trial.number}: {trial.state.name.lower()} {told}"
        self._console.print(f"{escape(line)}  {_best(study, self._plan)}", highlight=False, soft_wrap=True)


def _best(study: optuna.Study, plan: TuningPlan) -> str:
    best = best_trials(study, plan)
    return f"best [bold green]{best[0].values[0]:,.2f}[/] (trial {best[0].number})" if best else "best –"
