"""The best trials once more, with seeds that the search has never seen: search scores are the maximum of much noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from sb3_pgplus.statistics import iqm, iqm_interval
from sb3_pgplus.tuning.objective import Objective, SurplusTrialError, stored_runs
from sb3_pgplus.tuning.plan import TuningPlan
from sb3_pgplus.tuning.spaces import default_settings
from sb3_pgplus.tuning.trainings import TrainingFailedError


@dataclass(frozen=True)
class Candidate:
    """A trial of the search, ranked."""

    number: int | None
    """Nothing for the defaults where the search has not tried them."""
    origin: str
    """``"default"``, ``"config"`` or ``"search"``."""
    exact: dict[str, Any]
    """Its settings: ``n_envs`` and ``hyperparameters``."""
    search_score: float | None
    test_scores: list[float] = field(default_factory=list)
    """One for each test seed."""
    interval: tuple[float, float] | None = None
    """95 % bootstrap interval of the test score."""

    @property
    def test_score(self) -> float | None:
        """IQM over the test seeds."""
        return iqm(self.test_scores) if self.test_scores else None


def is_feasible(trial: FrozenTrial) -> bool:
    """
    :param trial: a finished one
    """
    return all(value <= 0 for value in trial.constraints.values())


def best_trials(study: optuna.Study, plan: TuningPlan) -> list[FrozenTrial]:
    """
    Complete trials within the limits, best return first; with several goals the Pareto front only.

    :param study: the study
    :param plan: its plan
    """
    if len(plan.goals) > 1:
        trials = study.best_trials
    else:
        trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    feasible = [trial for trial in trials if is_feasible(trial)]
    return sorted(feasible, key=lambda trial: (-trial.values[0], trial.number))


def candidates_of(study: optuna.Study, plan: TuningPlan) -> list[Candidate]:
    """
    The ``plan.top`` best trials and, beside them, the constructor's defaults, whatever their score.

    :param study: the study
    :param plan: its plan
    """
    trials = best_trials(study, plan)[: plan.top]
    if not trials:
        return []
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    defaults = [trial for trial in finished if trial.user_attrs.get("origin") == "default"]
    numbers = {trial.number for trial in trials}
    candidates = [_candidate(trial) for trial in [*trials, *(t for t in defaults[:1] if t.number not in numbers)]]
    if not defaults:
        settings = default_settings(plan.settings)
        exact = {"n_envs": settings.n_envs, "hyperparameters": settings.hyperparameters}
        candidates.append(Candidate(None, "default", exact, None))
    return candidates


def _candidate(trial: FrozenTrial) -> Candidate:
    score = trial.values[0] if trial.state == TrialState.COMPLETE and trial.values else None
    return Candidate(trial.number, trial.user_attrs.get("origin", "search"), trial.user_attrs["settings"], score)


class RankingObjective(Objective):
    """
    What the search does in a trial, with the test seeds and without giving up.

    :param plan: the search's
    :param on_wait: called now and then
    """

    def __init__(self, plan: TuningPlan, on_wait: Callable[[], None] = lambda: None) -> None:
        assert not {*plan.seeds} & {*plan.test_seeds}
        options: dict[str, Any] = {"space": {}, "goals": ("return",), "prune": "none", "top": 0}
        limits: dict[str, Any] = {"max_seconds": None, "max_memory": None}
        super().__init__(replace(plan, seeds=plan.test_seeds, test_seeds=(), **options, **limits), on_wait)

    def __call__(self, trial: optuna.Trial) -> float | tuple[float, ...]:
        """
        :param trial: a candidate; one that fails here is not ranked
        """
        if "candidate" not in trial.user_attrs:  # the queue ran empty between looking and asking
            trial.set_user_attr("error", "not needed: all candidates are taken")
            raise SurplusTrialError("all candidates are taken")
        try:
            return super().__call__(trial)
        except TrainingFailedError as error:
            raise optuna.TrialPruned(str(error)) from error

    def _reject_surplus(self, trial: optuna.Trial) -> None:
        """All candidates are to run."""


def enqueue(test: optuna.Study, candidate: Candidate) -> None:
    """
    :param test: the study of the ranking
    :param candidate: one to run
    """
    known = {"number": candidate.number, "origin": candidate.origin, "search_score": candidate.search_score}
    test.enqueue_trial({}, user_attrs={"candidate": known, "exact": candidate.exact})


def ranked(test: optuna.Study, plan: TuningPlan) -> list[Candidate]:
    """
    :param test: the study of the ranking
    :param plan: the search's
    :return: best first
    """
    candidates = []
    for tested in test.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        scores = [run.score(plan.objective) for run in sorted(stored_runs(tested), key=lambda run: run.seed)]
        known = {**tested.user_attrs["candidate"], "exact": tested.user_attrs["exact"]}
        candidates.append(Candidate(**known, test_scores=scores, interval=iqm_interval(scores)))
    return sorted(candidates, key=lambda candidate: iqm(candidate.test_scores), reverse=True)
