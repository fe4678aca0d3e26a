"""A study from its first trial to the ranking of the best ones; any number of workers may share it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from sb3_pgplus.configs import ConfigError, RunSettings
from sb3_pgplus.environments import make_environments
from sb3_pgplus.training import build_model
from sb3_pgplus.tuning.objective import Objective, SurplusTrialError
from sb3_pgplus.tuning.plan import GOALS, TuningPlan, differences
from sb3_pgplus.tuning.ranking import Candidate, RankingObjective, candidates_of, enqueue, ranked
from sb3_pgplus.tuning.spaces import default_settings, known_params
from sb3_pgplus.tuning.storage import open_storage, quiet_optuna, recover_dead_trials, requeue

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
FAILURES_IN_A_ROW = 5
POLL_SECONDS = 1.0
JOIN_SECONDS = 30.0


class TuningError(RuntimeError):
    """The search cannot go on; the message says why."""


@dataclass(frozen=True)
class TuningResult:
    """What is known when this worker ends."""

    study: optuna.Study
    plan: TuningPlan
    ranking: list[Candidate]
    """Best first, on the test seeds; empty without a ranking."""


def tune(
    plan: TuningPlan,
    storage: str,
    name: str,
    *,
    resume: bool = True,
    heartbeat: int = 30,
    on_wait: Callable[[optuna.Study], None] = lambda _: None,
    on_trial: Callable[[optuna.Study, FrozenTrial], None] = lambda *_: None,
) -> TuningResult:
    """
    Work on a study until it has ``plan.n_trials`` finished trials, then rank the best ones on the test seeds.

    Started several times with one storage, also on several machines, the workers share the trials, and each returns
    when all is done. Trials that are interrupted, or whose worker dies, go back into the queue.

    :param plan: what is tuned
    :param storage: see :func:`sb3_pgplus.tuning.storage.open_storage`
    :param name: of the study in the storage
    :param resume: continue, or join, a study that is there; otherwise that is an error
    :param heartbeat: seconds between two signs of life
    :param on_wait: called about once a second
    :param on_trial: called after every finished or failed trial of this worker
    :raises ConfigError: if the settings are impossible, or the stored study is about something else
    :raises TuningError: if several trials in a row fail
    """
    _try_settings(plan.settings, plan.device)
    where = open_storage(storage, heartbeat)
    study = _create_or_join(plan, where, name, resume)
    objective = Objective(plan, lambda: on_wait(study))
    _search(study, where, objective, on_wait, on_trial)
    return TuningResult(study, plan, _rank(study, where, plan, on_wait))


def _try_settings(settings: RunSettings, device: str) -> None:
    """Whatever is wrong with environment or settings is found before the first trial."""
    env = make_environments(settings.environment, n_envs=settings.n_envs, backend=settings.backend)
    try:
        build_model(settings, env, device=device)
    finally:
        env.close()


# --- creating and joining ---------------------------------------------------------------------------------------------


class _SeededByTrial(BaseSampler):
    """
    A fresh sampler for every trial, seeded by the study's seed and the trial's number.

    So one worker repeats its trials from the same seed, workers with the same seed draw different ones, and a study
    that is continued does not draw the first ones again.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make, self._seed = make, seed
        self._sampler = make(seed)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Any:
        self._sampler = self._make((self._seed * 1_000_003 + trial.number) % 2**32)
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Any) -> Any:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, name: str, distribution: Any) -> Any:
        return self._sampler.sample_independent(study, trial, name, distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._sampler.before_trial(study, trial)

    def after_trial(self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        self._sampler.after_trial(study, trial, state, values)


def make_sampler(name: str, seed: int) -> BaseSampler:
    """
    :param name: ``"tpe"``, ``"gp"`` or ``"random"``
    :param seed: the study's
    """
    makers: dict[str, Callable[[int], BaseSampler]] = {
        # Univariate: with two dozen parameters, a joint density of a few dozen trials says less (docs/design.md).
        "tpe": lambda s: optuna.samplers.TPESampler(seed=s, multivariate=False, constant_liar=True),
        "gp": lambda s: optuna.samplers.GPSampler(seed=s),
        "random": lambda s: optuna.samplers.RandomSampler(seed=s),
    }
    return _SeededByTrial(makers[name], seed)


def make_pruner(plan: TuningPlan) -> optuna.pruners.BasePruner:
    """
    :param plan: says which, and how long a training is
    """
    if plan.prune == "none":
        return optuna.pruners.NopPruner()
    if plan.prune == "seeds":
        return optuna.pruners.WilcoxonPruner(p_threshold=plan.prune_p)
    # Slow starters get a third of the budget, and after that whatever still improves goes on.
    hyperband = optuna.pruners.HyperbandPruner(
        min_resource=max(plan.n_evaluations // 3, 1), max_resource=plan.n_evaluations, reduction_factor=3
    )
    return optuna.pruners.PatientPruner(hyperband, patience=1)


def _create_or_join(plan: TuningPlan, storage: BaseStorage, name: str, resume: bool) -> optuna.Study:
    with quiet_optuna():
        options: dict[str, Any] = {"sampler": make_sampler(plan.sampler, plan.seed), "pruner": make_pruner(plan)}
    options["directions"] = [GOALS[goal] for goal in plan.goals]
    try:
        study = optuna.create_study(storage=storage, study_name=name, **options)
    except optuna.exceptions.DuplicatedStudyError:
        if not resume:
            raise ConfigError(f"there is a study {name} already: add --resume to continue it") from None
        del options["directions"]
        study = optuna.load_study(storage=storage, study_name=name, **options)
        _check_same(study, plan, storage)
        return study
    _enqueue_known(study, plan)
    study.set_user_attr("plan", plan.signature())  # last: who joins waits for it
    return study


def _check_same(study: optuna.Study, plan: TuningPlan, storage: BaseStorage) -> None:
    deadline = time.monotonic() + JOIN_SECONDS
    while "plan" not in study.user_attrs:
        if time.monotonic() > deadline:
            raise ConfigError(f"the study {study.study_name} in this storage was not made by sb3-pgplus tune")
        time.sleep(0.1)
    different = differences(plan.signature(), study.user_attrs["plan"])
    if different:
        raise ConfigError(f"the stored study {study.study_name} is another one: {'; '.join(different)}")
    recover_dead_trials(study, storage)


def _enqueue_known(study: optuna.Study, plan: TuningPlan) -> None:
    """The defaults and the configuration's settings come first: they cost two trials, and everything is beside them."""
    if not plan.enqueue:
        return
    queued: list[dict[str, object]] = []
    for origin, settings in (("default", default_settings(plan.settings)), ("config", plan.settings)):
        exact = {"n_envs": settings.n_envs, "hyperparameters": settings.hyperparameters}
        if exact not in queued:
            queued.append(exact)
            study.enqueue_trial(known_params(plan.space, settings), user_attrs={"origin": origin, "exact": exact})


# --- working ----------------------------------------------------------------------------------------------------------


def count(study: optuna.Study, *states: TrialState) -> int:
    """
    :param study: the study
    :param states: which trials to count
    """
    return len(study.get_trials(deepcopy=False, states=states))


def _search(
    study: optuna.Study,
    storage: BaseStorage,
    objective: Objective,
    on_wait: Callable[[optuna.Study], None],
    on_trial: Callable[[optuna.Study, FrozenTrial], None],
) -> None:
    failures = 0
    while (finished := count(study, *FINISHED)) < objective.plan.n_trials:
        on_wait(study)
        recover_dead_trials(study, storage)
        if finished + count(study, TrialState.RUNNING) >= objective.plan.n_trials:
            time.sleep(POLL_SECONDS)  # the others run the last ones; one of them may fail or die
            continue
        trial = _one_trial(study, objective)
        if trial is None:
            continue
        on_trial(study, trial)
        failures = failures + 1 if trial.state == TrialState.FAIL else 0
        if failures >= FAILURES_IN_A_ROW:
            last = trial.user_attrs.get("error", "").strip().splitlines() or ["no reason"]
            raise TuningError(f"{failures} trials in a row failed, the last one with: {last[-1]}")


def _one_trial(
    study: optuna.Study, objective: Callable[[optuna.Trial], float | tuple[float, ...]]
) -> FrozenTrial | None:
    number = None

    def remember_number(trial: optuna.Trial) -> float | tuple[float, ...]:
        nonlocal number
        number = trial.number
        try:
            return objective(trial)
        except SurplusTrialError:
            number = None
            raise

    try:
        with quiet_optuna():
            study.optimize(remember_number, n_trials=1, catch=(Exception,))
    except KeyboardInterrupt:
        if number is not None:
            requeue(study, study.get_trials()[number])
        raise
    except optuna.exceptions.UpdateFinishedTrialError:
        return None  # it was taken for dead, and is tried again: the machine was suspended or overloaded
    return None if number is None else study.get_trials()[number]


# --- ranking ----------------------------------------------------------------------------------------------------------


def _rank(
    study: optuna.Study, storage: BaseStorage, plan: TuningPlan, on_wait: Callable[[optuna.Study], None]
) -> list[Candidate]:
    """The ranking is a study as well, of as many trials as there are candidates: workers share it in the same way."""
    candidates = candidates_of(study, plan) if plan.top else []
    if not candidates:
        return []
    name = f"{study.study_name}-test-{plan.n_trials}"
    try:
        test = optuna.create_study(storage=storage, study_name=name, direction="maximize")
    except optuna.exceptions.DuplicatedStudyError:
        test = optuna.load_study(storage=storage, study_name=name)
    else:
        for candidate in candidates:
            enqueue(test, candidate)
        test.set_user_attr("test_seeds", list(plan.test_seeds))  # last: who joins waits for it
    while "test_seeds" not in test.user_attrs:
        time.sleep(0.1)
    objective = RankingObjective(plan, lambda: on_wait(study))
    while count(test, TrialState.WAITING, TrialState.RUNNING):
        on_wait(study)
        recover_dead_trials(test, storage)
        if not count(test, TrialState.WAITING) or _one_trial(test, objective) is None:
            time.sleep(POLL_SECONDS)
    return ranked(test, plan)
