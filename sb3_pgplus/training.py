"""One training run from settings to a complete run folder: what `sb3-pgplus train` does, as a function."""

from __future__ import annotations

import math
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import (
    HumanOutputFormat,
    KVWriter,
    Logger,
    TensorBoardOutputFormat,
)
from stable_baselines3.common.vec_env import VecEnv

from sb3_pgplus.callbacks.checkpoint import CheckpointCallback
from sb3_pgplus.callbacks.evaluation import EvalCallback
from sb3_pgplus.configs import ConfigError, RunSettings, algorithm_class, resolve_objects
from sb3_pgplus.construction import PLUMBING
from sb3_pgplus.environments import make_environments, one_line, policy_for, torch_threads
from sb3_pgplus.errors import WorkerError
from sb3_pgplus.files import write_atomically
from sb3_pgplus.interruptions import Interruption
from sb3_pgplus.on_policy import PolicyGradientPlus
from sb3_pgplus.playing import Evaluation, evaluate, prepare_offscreen_rendering
from sb3_pgplus.reporting.learning_curve import Episodes, plot_learning_curve
from sb3_pgplus.reporting.progress_bar import EpisodeRecorder, TrainingProgress
from sb3_pgplus.reporting.progress_csv import ProgressCSV
from sb3_pgplus.resumed_runs import resume_model
from sb3_pgplus.run_folder import RunFolder, check_unused, create_run_folder, package_versions
from sb3_pgplus.vec_env import backend_of

if TYPE_CHECKING:
    from sb3_pgplus.callbacks.wandb import WandbCallback

#: A longer run logs every few iterations.
MOST_ROWS = 500
#: Signals after which a training finishes its iteration, writes a checkpoint and ends; the second one ends it at once.
STOPPING = (signal.SIGINT, signal.SIGTERM)


class TrainingError(RuntimeError):
    """Training began and raised; the run folder's ``error.txt`` holds the traceback."""


@dataclass(frozen=True)
class FinishedRun:
    """What a training run leaves in memory; the rest is in its folder."""

    model: PolicyGradientPlus[Any]
    folder: RunFolder
    episodes: Episodes
    seconds: float
    interrupted: bool
    evaluation: Evaluation | None
    """Missing after an interruption, and where none was asked for."""
    signal: int | None = None
    """What interrupted it."""


def train(
    settings: RunSettings,
    *,
    out: Path | None = None,
    device: str = "auto",
    num_threads: int | None = None,
    verbose: int = 0,
    progress: bool = False,
    eval_episodes: int = 10,
    eval_freq: int | None = None,
    eval_video: bool = False,
    tracking: Mapping[str, Any] | None = None,
    checkpoint_freq: int | None = None,
    resume: Path | None = None,
    console: Console | None = None,
) -> FinishedRun:
    """
    Train one model and leave a complete run folder: config, progress, episodes, model, learning curve, evaluation.

    :param settings: from :func:`sb3_pgplus.configs.resolve_settings`
    :param out: run folder, by default the next free one under ``runs/``
    :param device: as SB3's
    :param num_threads: torch's CPU threads, see :func:`sb3_pgplus.environments.torch_threads`
    :param verbose: as SB3's; from 1 on its tables are printed as well
    :param progress: draw a progress bar
    :param eval_episodes: length of the evaluation at the end, and of those before; 0 for none
    :param eval_freq: environment steps from one evaluation to the next while training; None: only at the end
    :param eval_video: record the first episode of each of these evaluations
    :param tracking: arguments of :class:`sb3_pgplus.callbacks.WandbCallback`; None: no tracking
    :param checkpoint_freq: environment steps from one checkpoint to the next; None: only after a signal, or as before
        in a resumed run
    :param resume: folder of an interrupted run to go on with; ``settings`` are then its own
    :param console: where to report to, by default nowhere
    :raises ConfigError: if the settings are impossible, before anything is written
    :raises TrainingError: if training itself raises; then no model is left, and ``error.txt`` says why
    """
    console = console or Console(quiet=True)
    _check_evaluations(eval_freq, eval_episodes, eval_video)
    if out is not None:
        check_unused(out)
    tracker = None if tracking is None else _tracker(tracking, settings)
    env = make_environments(settings.environment, n_envs=settings.n_envs, seed=settings.seed, backend=settings.backend)
    try:
        if resume is None:
            model = build_model(settings, env, device=device, verbose=verbose)
            folder = create_run_folder(out, algo=settings.algo, env=settings.environment.env, seed=settings.seed)
            options = {
                "num_threads": num_threads,
                "eval_episodes": eval_episodes,
                "eval_freq": eval_freq,
                "eval_video": eval_video,
                "tracking": None if tracking is None else dict(tracking),
            }
            folder.write_config(run_config(settings, model) | {"options": options})
        else:
            model, folder = resume_model(settings, resume, env, device=device, verbose=verbose)
        console.print(start_panel(settings, model, folder))
        evaluator = None if eval_freq is None else _evaluator(settings, folder, eval_freq, eval_episodes, eval_video)
        if tracker is not None:
            tracker.init_kwargs["dir"] = str(folder.path)
            tracker.start(model)
        with torch_threads(env.observation_space, num_threads), Interruption(STOPPING) as interruption:
            checkpoints = CheckpointCallback(folder.checkpoints, checkpoint_freq, interruption=interruption)
            shown = console if progress else None
            episodes, interrupted = _learn(model, settings, folder, shown, checkpoints, evaluator, tracker)
        seconds = (time.time_ns() - model.start_time) / 1e9  # those before an interruption included
    finally:
        with suppress(EOFError, ConnectionError):  # of worker processes that the same signal has ended
            env.close()
    try:
        model.save(folder.model)  # whole or not at all
    except OSError as error:
        raise TrainingError(f"{folder.model} could not be written: {error.strerror or error}") from error
    _draw(folder, settings, model, episodes, console)
    evaluation = _final_evaluation(model, settings, folder, 0 if interrupted else eval_episodes)
    if tracker is not None:
        summary = {} if evaluation is None else evaluation.summary()
        tracker.log_summary({f"evaluation/{name}": value for name, value in summary.items()})
        tracker.finish(255 if interrupted else 0)  # 255: "killed", unless `learn` has told it already
    return FinishedRun(model, folder, episodes, seconds, interrupted, evaluation, interruption.signal)


def _check_evaluations(every: int | None, n_episodes: int, video: bool) -> None:
    if every is None and video:
        raise ConfigError("--eval-video records the evaluations while training: give --eval-freq, too")
    if every is not None and not n_episodes:
        raise ConfigError("--eval-freq asks for evaluations and --eval-episodes 0 for none")
    if video:
        prepare_offscreen_rendering()


def _final_evaluation(
    model: PolicyGradientPlus[Any], settings: RunSettings, folder: RunFolder, n_episodes: int
) -> Evaluation | None:
    if not n_episodes:
        return None
    evaluation = evaluate(model, settings.environment, n_episodes=n_episodes, backend=settings.backend)
    write_atomically(folder.evaluation, yaml.safe_dump(evaluation.summary(), sort_keys=False).encode())
    return evaluation


def build_model(
    settings: RunSettings, env: VecEnv, *, device: str = "auto", verbose: int = 0
) -> PolicyGradientPlus[Any]:
    """
    Construct the algorithm; it is the constructor that judges the hyperparameters.

    :param settings: the run's settings
    :param env: the environments to train in
    :param device: as SB3's
    :param verbose: as SB3's
    :raises ConfigError: if the constructor refuses something
    """
    algorithm = algorithm_class(settings.algo)
    policy = settings.policy or policy_for(env.observation_space)
    try:
        return algorithm(
            policy,
            env,
            seed=settings.seed,
            device=device,
            verbose=verbose,
            **resolve_objects(settings.hyperparameters),
        )
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        message = one_line(error)
        prefix = "" if algorithm.__name__ in message else f"{algorithm.__name__}: "
        raise ConfigError(f"{prefix}{message} (settings from {settings.source})") from error


def run_config(settings: RunSettings, model: PolicyGradientPlus[Any]) -> dict[str, Any]:
    """
    Collect ``config.yml``: flat, every hyperparameter with its resolved value, readable again as ``--config``.

    :param settings: the run's settings
    :param model: as constructed from them
    """
    return {
        "algo": settings.algo,
        **settings.environment.settings(),
        "seed": settings.seed,
        "n_envs": settings.n_envs,
        "backend": settings.backend,
        "n_timesteps": settings.n_timesteps,
        "policy": settings.policy or policy_for(model.observation_space),
        **settings.hyperparameters,
        **model.hyperparameters(),
        "made_with": package_versions() | {"device": str(model.device), "backend": _backend(model)},
    }


def changed_settings(settings: RunSettings, model: PolicyGradientPlus[Any]) -> dict[str, tuple[Any, Any]]:
    """
    Compare the run's hyperparameters with the constructor's defaults.

    :param settings: the run's settings
    :param model: as constructed from them
    :return: name → (value, default) of what differs
    """
    defaults = PLUMBING | model.hparams_class.defaults()
    values = settings.hyperparameters | model.hyperparameters()
    changed = {name: (value, defaults.get(name)) for name, value in values.items() if value != defaults.get(name)}
    changed.pop("n_envs", None)  # shown with the steps
    return changed


def start_panel(settings: RunSettings, model: PolicyGradientPlus[Any], folder: RunFolder) -> Panel:
    """
    Describe the run before it begins.

    :param settings: the run's settings
    :param model: as constructed from them
    :param folder: where the results go
    """
    changed = changed_settings(settings, model)
    rows = {
        "steps": f"{settings.n_timesteps:,} in {_copies(settings)} ({_backend(model)}), seed {settings.seed}, "
        f"on {model.device}",
        "settings": settings.source,
        "changed": ", ".join(_changes(changed)) or "nothing: all hyperparameters are the defaults",
        "folder": escape(str(folder.path)),
    }
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        table.add_row(f"[bold]{name}", text)
    title = f"[bold]{type(model).__name__}[/] on [bold]{escape(settings.environment.env)}"
    return Panel(table, title=title, title_align="left", border_style="blue", expand=False)


def _copies(settings: RunSettings) -> str:
    return "1 environment" if settings.n_envs == 1 else f"{settings.n_envs} environments"


def _backend(model: PolicyGradientPlus[Any]) -> str:
    assert model.env is not None  # it is trained in one
    return backend_of(model.env)


def _changes(changed: Mapping[str, tuple[Any, Any]]) -> Iterator[str]:
    for name, (value, default) in changed.items():
        yield f"{name}={escape(str(value))} [dim]({escape(str(default))})[/]"


# --- while it trains --------------------------------------------------------------------------------------------------


class _StandardOutput:
    """Looks ``sys.stdout`` up at each write: the progress bar replaces it so that tables appear above the bar."""

    def write(self, text: str) -> int:
        return sys.stdout.write(text)

    def flush(self) -> None:
        sys.stdout.flush()


def _evaluator(settings: RunSettings, folder: RunFolder, every: int, n_episodes: int, video: bool) -> EvalCallback:
    return EvalCallback(
        settings.environment,
        n_eval_episodes=n_episodes,
        log_path=folder.path,
        best_model_save_path=folder.path,
        verbose=0,
        every=every,
        backend=settings.backend,
        video_folder=folder.videos if video else None,
    )


def _learn(
    model: PolicyGradientPlus[Any],
    settings: RunSettings,
    folder: RunFolder,
    console: Console | None,
    checkpoints: CheckpointCallback,
    evaluator: EvalCallback | None,
    tracker: WandbCallback | None,
) -> tuple[Episodes, bool]:
    """Train; an interruption ends it in good order, anything else is written down and leaves no model."""
    recorder = EpisodeRecorder(folder.episodes)
    bar = TrainingProgress(console, settings.n_timesteps, evaluator) if console else None
    logger = _logger(model, folder)
    model.set_logger(logger)
    interrupted = False
    try:
        # The tracker is the last one, so that it sees what the others have logged and saved.
        members = (recorder, evaluator, bar, checkpoints, tracker)
        callbacks: list[BaseCallback] = [callback for callback in members if callback is not None]
        model.learn(settings.n_timesteps, callback=callbacks, log_interval=rows_between(model, settings.n_timesteps))
        interrupted = checkpoints.is_asked_to_stop and model.num_timesteps < settings.n_timesteps
    except KeyboardInterrupt:
        interrupted = True
    except Exception as error:
        # A signal to all of the group, as Ctrl-C in a terminal is one, ends worker processes, too.
        interrupted = checkpoints.is_asked_to_stop and isinstance(error, (EOFError, ConnectionError, WorkerError))
        if not interrupted:
            with suppress(OSError):
                folder.error.write_text(traceback.format_exc(), encoding="utf-8")
            raise TrainingError(f"{type(error).__name__}: {error} (traceback in {folder.error})") from error
    finally:
        recorder.close()
        if evaluator:
            evaluator.close()
        if bar:
            bar.close()
        logger.close()
    return recorder.episodes, interrupted


def _tracker(tracking: Mapping[str, Any], settings: RunSettings) -> WandbCallback:
    try:
        from sb3_pgplus.callbacks.wandb import WandbCallback
    except ImportError as error:
        raise ConfigError(str(error)) from error
    name = f"{settings.algo}-{settings.environment.env}-seed{settings.seed}"
    return WandbCallback(**{"name": name, "config": settings.environment.settings(), **tracking})


def rows_between(model: PolicyGradientPlus[Any], n_timesteps: int) -> int:
    """
    Iterations from one row of ``progress.csv`` to the next: 1, or more where short rollouts would give thousands.

    :param model: knows the length of its rollouts
    :param n_timesteps: length of the run
    """
    return math.ceil(n_timesteps / (model.n_steps * model.n_envs * MOST_ROWS))


def _logger(model: PolicyGradientPlus[Any], folder: RunFolder) -> Logger:
    formats: list[KVWriter] = [ProgressCSV(folder.progress, model.num_timesteps or None)]
    if model.verbose >= 1:
        formats.append(HumanOutputFormat(_StandardOutput()))  # type: ignore[arg-type]
    if model.tensorboard_log is not None:
        formats.append(TensorBoardOutputFormat(str(Path(model.tensorboard_log) / folder.path.name)))
    return Logger(str(folder.path), formats)


def _draw(
    folder: RunFolder, settings: RunSettings, model: PolicyGradientPlus[Any], episodes: Episodes, console: Console
) -> None:
    """Draw the learning curve; a missing plotting package costs the picture, not the run."""
    title = f"{type(model).__name__} on {settings.environment.env}"
    subtitle = f"seed {settings.seed}, {_copies(settings)}, {model.num_timesteps:,} steps"
    try:
        plot_learning_curve(episodes, folder.learning_curve, title=title, subtitle=subtitle)
    except (ImportError, ValueError) as error:
        console.print(f"[yellow]No {folder.learning_curve.name}: {escape(str(error))}", soft_wrap=True)
