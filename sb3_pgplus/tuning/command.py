"""What ``sb3-pgplus tune`` does between its options and :func:`sb3_pgplus.tuning.tune`."""

from __future__ import annotations

import importlib
import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import optuna
from optuna.trial import FrozenTrial
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sb3_pgplus.configs import ConfigError, RunSettings, this_command
from sb3_pgplus.tuning import tracking
from sb3_pgplus.tuning.plan import TuningPlan
from sb3_pgplus.tuning.progress import StudyProgress
from sb3_pgplus.tuning.report import RANKING_COLUMNS, ranking_row, write_results
from sb3_pgplus.tuning.spaces import SPACES, read_space
from sb3_pgplus.tuning.storage import open_storage
from sb3_pgplus.tuning.study import TuningError, TuningResult, tune


@dataclass(frozen=True)
class Place:
    """Where a study is."""

    name: str
    folder: Path
    storage: str
    embedded: bool
    """The storage is a file in the folder."""


def place_of(settings: RunSettings, *, storage: str | None, name: str | None, out: Path | None) -> Place:
    """
    :param settings: of the study, for its name
    :param storage: the user's, by default a SQLite file in the folder
    :param name: the user's
    :param out: the user's folder
    """
    env = settings.environment.env.replace("/", "-").replace(":", "-")
    name = name or f"{settings.algo}-{env}-{settings.n_timesteps}"
    folder = out or Path("runs") / "tune" / name
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: give --out a folder")
    return Place(name, folder, storage or f"sqlite:///{(folder / 'study.db').absolute()}", storage is None)


def plan_of(settings: RunSettings, space: Path | None, **options: Any) -> TuningPlan:
    """
    :param settings: of the trainings
    :param space: the user's file, by default the built-in table
    :param options: of the plan
    """
    table = read_space(space, settings.algo) if space else SPACES[settings.algo]
    return TuningPlan(settings, table, **options)


def run(
    plan: TuningPlan,
    place: Place,
    *,
    resume: bool,
    heartbeat: int,
    project: str | None,
    progress: bool,
    console: Console,
) -> None:
    """
    Tune, and leave the results in the folder; after an interruption, those so far.

    :param plan: the study
    :param place: where it is
    :param resume: an embedded study that is there may be continued
    :param heartbeat: see :func:`sb3_pgplus.tuning.tune`
    :param project: of W&B, if trials are tracked
    :param progress: show it
    :param console: where to
    """
    if project is not None:
        _as_config_error(tracking.require_wandb)
    place.folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    _refuse_folder_of_another(place)
    console.print(f"Study {place.name} in {place.folder}", highlight=False, markup=False, soft_wrap=True)
    bar = StudyProgress(console, plan, progress)

    def on_trial(study: optuna.Study, trial: FrozenTrial) -> None:
        bar.trial_ended(study, trial)
        if project is not None:
            try:
                tracking.track(study, trial, project)
            except Exception as error:  # a tracker that cannot be reached costs its picture, not the study
                console.print(f"[yellow]Trial {trial.number} is not tracked: {escape(str(error))}", soft_wrap=True)
        write_results(TuningResult(study, plan, []), place.folder, with_page=False)

    try:
        with bar, _termination_as_interruption():
            result = tune(
                plan,
                place.storage,
                place.name,
                resume=resume or not place.embedded,
                heartbeat=heartbeat,
                on_wait=bar.refresh,
                on_trial=on_trial,
            )
    except (KeyboardInterrupt, TuningError):
        _report_so_far(plan, place, console)
        raise
    _report(result, place, console)


def _refuse_folder_of_another(place: Place) -> None:
    """
    :raises ConfigError: if the results in the folder are of another study, and would be replaced
    """
    best, database = place.folder / "best.yml", place.folder / "study.db"
    owners = optuna.get_all_study_names(open_storage(place.storage)) if place.embedded and database.is_file() else []
    is_another = bool(owners) and place.name not in owners
    if best.is_file():  # "# Trial 3 of the study NAME: …"
        header = best.read_text(encoding="utf-8").partition("\n")[0]
        is_another |= " of the study " in header and f" of the study {place.name}: " not in header
    if is_another:
        raise ConfigError(f"{place.folder} has the results of another study than {place.name}: give another --out")


def serve_dashboard(place: Place, port: int) -> None:
    """
    Serve optuna-dashboard until Ctrl-C.

    :param place: of the study
    :param port: to listen on
    """
    if place.embedded and not (place.folder / "study.db").is_file():
        raise ConfigError(f"there is no study in {place.folder}: give --out or --storage")
    try:
        optuna_dashboard = importlib.import_module("optuna_dashboard")
    except ImportError as error:
        raise ConfigError("--dashboard needs optuna-dashboard: pip install 'sb3_pgplus[tune]'") from error
    optuna_dashboard.run_server(open_storage(place.storage), host="127.0.0.1", port=port)


@contextmanager
def _termination_as_interruption() -> Iterator[None]:
    """SIGTERM, which cluster schedulers send, puts the running trial back into the queue as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _as_config_error(check: Callable[[], None]) -> None:
    try:
        check()
    except ImportError as error:
        raise ConfigError(str(error)) from error


def _report_so_far(plan: TuningPlan, place: Place, console: Console) -> None:
    storage = open_storage(place.storage)
    if place.name in optuna.get_all_study_names(storage):
        result = TuningResult(optuna.load_study(study_name=place.name, storage=storage), plan, [])
        write_results(result, place.folder)
        again = "the same command" + (" with --resume" if place.embedded else "")
        console.print(f"What is known so far is in {place.folder}; {again} continues.", soft_wrap=True)


def _report(result: TuningResult, place: Place, console: Console) -> None:
    for problem in write_results(result, place.folder):
        console.print(f"[yellow]{escape(problem)}", soft_wrap=True)
    if result.ranking:
        table = Table(title="On test seeds, which the search never saw", title_justify="left")
        for column in RANKING_COLUMNS:
            table.add_column(column, justify="right")
        for candidate in result.ranking:
            table.add_row(*ranking_row(candidate))
        console.print(table)
    best = place.folder / "best.yml"
    if best.is_file():
        env = shlex.quote(result.plan.settings.environment.env)
        line = f"  {this_command()} train --env {env} --config {shlex.quote(str(best))}"
        console.print(line, style="cyan", highlight=False, markup=False, soft_wrap=True)
