"""
The command ``sb3-pgplus`` with its subcommands; ``python -m sb3_pgplus.cli`` is the same.

Torch and Stable-Baselines3 are imported inside the commands, so ``--help`` answers at once.
"""

from __future__ import annotations

import shlex
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from sb3_pgplus.playing import Evaluation
    from sb3_pgplus.training import FinishedRun

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

app = typer.Typer(
    name="sb3-pgplus",
    help="Train, evaluate and watch policy-gradient agents: [bold]ppoplus[/], [bold]a2cplus[/], [bold]trpoplus[/].",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Run = Annotated[Path, typer.Argument(help="A run folder, or a model's .zip file.", show_default=False)]
Untrusted = Annotated[
    bool, typer.Option("--untrusted", help="Run no code from the file; a model that needs its pickles is refused.")
]
PlayedEnv = Annotated[str | None, typer.Option("--env", help="Environment; by default the one it was trained in.")]
PlayedAlgo = Annotated[str | None, typer.Option("--algo", help="Only for a .zip without its config.yml.")]
PlaySeed = Annotated[int | None, typer.Option("--seed", help="Of the environment; by default a fixed one.")]
Stochastic = Annotated[bool, typer.Option("--stochastic", help="Sample the actions instead of taking the mode.")]
Env = Annotated[str | None, typer.Option("--env", help="Environment id; package:MyEnv-v0 for your own.")]
Algo = Annotated[str | None, typer.Option("--algo", help="ppoplus (default), a2cplus or trpoplus.")]
NumEnvs = Annotated[int | None, typer.Option("--n-envs", help="Environments side by side.")]
Config = Annotated[
    Path | None, typer.Option("--config", help="YAML settings: rl_zoo3 format, flat, or a run's config.yml.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="One setting, the value in YAML; repeat it for more."),
]
TrainSeed = Annotated[int | None, typer.Option("--seed", help="Random seed; by default 0.", show_default=False)]
Progress = Annotated[bool, typer.Option("--progress/--no-progress", help="Progress bar.")]
Backend = Annotated[
    str | None,
    typer.Option(
        "--backend", help="Runs the environments: auto, serial, dummy, subproc, workers, mujoco, gymnasium, envpool."
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, … or auto.")]
Project = Annotated[str, typer.Option("--project", envvar="WANDB_PROJECT", help="Of Weights & Biases.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main() -> None:
    """Entry point of the console script."""
    app()


@app.callback()
def _group() -> None:
    """Keeps the commands' names: with a single command typer would drop its name."""


@app.command()
def train(
    *,
    env: Env = None,
    algo: Algo = None,
    n_timesteps: Annotated[
        float | None, typer.Option("--n-timesteps", help="Environment steps in total; 1e6 is fine.", show_default=False)
    ] = None,
    seed: TrainSeed = None,
    n_envs: NumEnvs = None,
    backend: Backend = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder; by default runs/ALGO/ENV/seedS, numbered on if taken.")
    ] = None,
    config: Config = None,
    overrides: Overrides = None,
    device: Device = "auto",
    num_threads: Annotated[
        int | None, typer.Option("--num-threads", min=1, help="Torch's CPU threads; by default 1 without images.")
    ] = None,
    progress: Progress = True,
    eval_episodes: Annotated[
        int | None, typer.Option("--eval-episodes", min=0, help="Of an evaluation, by default 10; 0: none.")
    ] = None,
    eval_freq: Annotated[
        int | None, typer.Option("--eval-freq", min=1, help="Evaluate every so many steps, keep the best model.")
    ] = None,
    eval_video: Annotated[
        bool | None, typer.Option("--eval-video/--no-eval-video", help="A video of each of these evaluations.")
    ] = None,
    checkpoint_freq: Annotated[
        int | None, typer.Option("--checkpoint-freq", min=1, help="A checkpoint every so many steps, for --resume.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Folder of an interrupted run, which goes on.", show_default=False)
    ] = None,
    verbose: Annotated[int, typer.Option("--verbose", min=0, max=2, help="From 1 on: SB3's tables as well.")] = 0,
    track: Annotated[
        bool | None,
        typer.Option("--track/--no-track", help="In Weights & Biases; WANDB_MODE=offline for `wandb sync` later."),
    ] = None,
    project: Project = "sb3_pgplus",
    entity: Annotated[str | None, typer.Option("--entity", help="User or team of Weights & Biases.")] = None,
    group: Annotated[str | None, typer.Option("--group", help="Of runs, such as the seeds of an experiment.")] = None,
    tags: Annotated[str | None, typer.Option("--tags", help="Of the run, separated by commas.")] = None,
    debug: Debug = False,
) -> None:
    """Train an agent; leaves a run folder with model, config, metrics and learning curve."""
    with _errors_as_one_line(debug):
        from sb3_pgplus.configs import resolve_settings
        from sb3_pgplus.resumed_runs import options_of, refuse_settings, settings_of
        from sb3_pgplus.training import train as run_training

        given: dict[str, Any] = {
            "algo": algo,
            "env": env,
            "config": config,
            "overrides": overrides or [],
            "n_envs": n_envs,
            "backend": backend,
            "n_timesteps": n_timesteps,
            "seed": seed,
        }
        if resume is not None:
            refuse_settings(given | {"out": out})
        settings = resolve_settings(**given) if resume is None else settings_of(resume)
        options: dict[str, Any] = {} if resume is None else options_of(resume)
        asked = {
            "num_threads": num_threads,
            "eval_episodes": eval_episodes,
            "eval_freq": eval_freq,
            "eval_video": eval_video,
        }
        options |= {name: value for name, value in asked.items() if value is not None}
        if track:
            split = [tag.strip() for tag in (tags or "").split(",") if tag.strip()]
            options["tracking"] = {"project": project, "entity": entity, "group": group, "tags": split}
        elif track is False:
            options.pop("tracking", None)
        console = Console()
        run = run_training(
            settings,
            out=out,
            device=device,
            verbose=verbose,
            progress=progress,
            checkpoint_freq=checkpoint_freq,
            resume=resume,
            console=console,
            **options,
        )
        _report(run, console)
    if run.interrupted:
        raise typer.Exit(EXIT_INTERRUPTED if run.signal is None else 128 + run.signal)


@app.command()
def evaluate(
    run: Run,
    *,
    n_episodes: Annotated[int, typer.Option("--n-episodes", min=1, help="Number of episodes.")] = 10,
    seed: PlaySeed = None,
    stochastic: Stochastic = False,
    env: PlayedEnv = None,
    algo: PlayedAlgo = None,
    backend: Backend = None,
    untrusted: Untrusted = False,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Play whole episodes and print the statistics of their returns."""
    with _errors_as_one_line(debug):
        from sb3_pgplus.configs import known_backend
        from sb3_pgplus.evaluation import EVALUATION_SEED
        from sb3_pgplus.playing import evaluate as play
        from sb3_pgplus.playing import load_run

        loaded = load_run(run, env=env, algo=algo, device=device, trusted=not untrusted)
        evaluation = play(
            loaded.model,
            loaded.environment,
            n_episodes=n_episodes,
            seed=EVALUATION_SEED if seed is None else seed,
            deterministic=not stochastic,
            backend=loaded.backend if backend is None else known_backend(backend),
        )
        Console().print(_table(evaluation))


@app.command()
def enjoy(
    run: Run,
    *,
    record: Annotated[bool, typer.Option("--record", help="Write an mp4 instead of opening a window.")] = False,
    video: Annotated[
        Path | None, typer.Option("--video", help="The mp4 file; by default video.mp4 in the run folder.")
    ] = None,
    n_episodes: Annotated[int, typer.Option("--n-episodes", min=1, help="Number of episodes.")] = 1,
    seed: PlaySeed = None,
    stochastic: Stochastic = False,
    env: PlayedEnv = None,
    algo: PlayedAlgo = None,
    untrusted: Untrusted = False,
    device: Device = "auto",
    debug: Debug = False,
) -> None:
    """Watch an agent in a window, or record it to a video (also on a machine without a screen)."""
    with _errors_as_one_line(debug):
        from sb3_pgplus import playing
        from sb3_pgplus.evaluation import EVALUATION_SEED

        console = Console()
        loaded = playing.load_run(run, env=env, algo=algo, device=device, trusted=not untrusted)
        start = EVALUATION_SEED if seed is None else seed
        if not (record or video) and not playing.has_display():
            console.print("There is no screen to show it on: recording a video instead.")
            record = True
        if record or video:
            name = "video.mp4" if loaded.path.name == "model.zip" else f"{loaded.path.stem}.mp4"
            target = video or loaded.path.with_name(name)
            with console.status(f"Recording {target} (rendering without a graphics card takes minutes) …"):
                evaluation = playing.record(
                    loaded, target, n_episodes=n_episodes, seed=start, deterministic=not stochastic
                )
            console.print(f"Video: {target}", highlight=False, markup=False, soft_wrap=True)
        else:
            evaluation = playing.watch(loaded, n_episodes=n_episodes, seed=start, deterministic=not stochastic)
        console.print(_table(evaluation))


@app.command()
def profile(
    *,
    env: Env = None,
    algo: Algo = None,
    n_envs: NumEnvs = None,
    backend: Backend = None,
    compiled: Annotated[
        str | None, typer.Option("--compile", help="auto, true or false; auto decides for the whole training.")
    ] = None,
    n_timesteps: Annotated[
        float | None, typer.Option("--n-timesteps", help="Length of the whole training.", show_default=False)
    ] = None,
    n_rollouts: Annotated[
        int | None, typer.Option("--n-rollouts", min=1, help="Rollouts to measure; by default 5, or more short ones.")
    ] = None,
    warm_up: Annotated[int, typer.Option("--warm-up", min=1, help="Rollouts before that; compiling is there.")] = 2,
    seed: TrainSeed = None,
    config: Config = None,
    overrides: Overrides = None,
    device: Device = "auto",
    num_threads: Annotated[int | None, typer.Option("--num-threads", min=1, help="Torch's CPU threads.")] = None,
    debug: Debug = False,
) -> None:
    """Train a few rollouts and show where the time goes."""
    with _errors_as_one_line(debug):
        from sb3_pgplus.configs import resolve_settings
        from sb3_pgplus.profiling import profile as run_profile

        settings = resolve_settings(
            algo=algo,
            env=env,
            config=config,
            overrides=[*(overrides or []), *([] if compiled is None else [f"compile={compiled}"])],
            n_envs=n_envs,
            backend=backend,
            n_timesteps=n_timesteps,
            seed=seed,
        )
        console = Console()
        with console.status("Training a few rollouts …"):
            measured = run_profile(
                settings, n_rollouts=n_rollouts, warm_up=warm_up, device=device, num_threads=num_threads
            )
        console.print(measured.table())
        console.print(measured.summary(), highlight=False, markup=False, soft_wrap=True)


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or folders that hold some.", show_default=False)],
    *,
    x: Annotated[str, typer.Option("--x", help="steps or time.")] = "steps",
    evaluations: Annotated[
        bool, typer.Option("--evaluations", help="Evaluations (--eval-freq) instead of training episodes.")
    ] = False,
    metrics: Annotated[bool, typer.Option("--metrics", help="A grid of all metrics instead of the curve.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The picture, .png, .svg or .pdf; by default curves.png or metrics.png."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Draw learning curves of several runs: interquartile mean over seeds and its interval."""
    with _errors_as_one_line(debug):
        from sb3_pgplus.reporting.command import draw

        for line in draw(runs, out, x=x, evaluations=evaluations, metrics=metrics):
            Console().print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)],
    *,
    out: Annotated[Path | None, typer.Option("--out", help="The page; by default report.html in the folder.")] = None,
    debug: Debug = False,
) -> None:
    """Write one HTML page about a run: curve, evaluation, diagnostics in plain words, settings, time, video."""
    with _errors_as_one_line(debug):
        from sb3_pgplus.reporting.command import write_report

        for line in write_report(run, out):
            Console().print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def tune(
    *,
    env: Env = None,
    algo: Algo = None,
    n_timesteps: Annotated[
        float | None, typer.Option("--n-timesteps", help="Length of one training.", show_default=False)
    ] = None,
    n_trials: Annotated[int, typer.Option("--n-trials", help="Finished trials of the study, by all workers.")] = 50,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Trainings of a trial.")] = 5,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Trainings side by side; by default one for each processor.")
    ] = None,
    space: Annotated[
        Path | None, typer.Option("--space", help="YAML search space in place of the built-in one.")
    ] = None,
    objective: Annotated[
        str, typer.Option("--objective", help="final (last evaluations) or auc (mean of all).")
    ] = "final",
    multi_objective: Annotated[
        str, typer.Option("--multi-objective", help="return,time or return,memory or all three: a Pareto front.")
    ] = "return",
    prune: Annotated[
        str, typer.Option("--prune", help="seeds (Wilcoxon test), time (Hyperband within a training) or none.")
    ] = "seeds",
    prune_p: Annotated[float, typer.Option("--prune-p", help="Of the Wilcoxon test; higher gives up sooner.")] = 0.1,
    sampler: Annotated[str, typer.Option("--sampler", help="tpe, gp or random.")] = "tpe",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the sampler.")] = 0,
    evaluations: Annotated[int, typer.Option("--evaluations", min=1, help="In a training, equally far apart.")] = 10,
    eval_episodes: Annotated[int, typer.Option("--eval-episodes", min=1, help="Of each evaluation.")] = 5,
    max_time: Annotated[float | None, typer.Option("--max-time", help="Most seconds of a training.")] = None,
    max_memory: Annotated[float | None, typer.Option("--max-memory", help="Most MiB of a training's process.")] = None,
    top: Annotated[int, typer.Option("--top", min=0, help="Trials to rank on test seeds at the end; 0: none.")] = 3,
    test_seeds: Annotated[int, typer.Option("--test-seeds", min=1, help="Number of test seeds.")] = 10,
    enqueue: Annotated[
        bool, typer.Option("--enqueue/--no-enqueue", help="Begin with the defaults and the configuration's settings.")
    ] = True,
    storage: Annotated[
        str | None, typer.Option("--storage", help="Shared study: database URL, grpc://host:port or a .log journal.")
    ] = None,
    study: Annotated[str | None, typer.Option("--study", help="Name; by default ALGO-ENV-STEPS.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder; by default runs/tune/STUDY.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue, or join, the study in the folder.")] = False,
    heartbeat: Annotated[
        int, typer.Option("--heartbeat", min=1, help="Seconds; a worker that misses four is taken for dead.")
    ] = 30,
    dashboard: Annotated[bool, typer.Option("--dashboard", help="Only serve optuna-dashboard on the storage.")] = False,
    port: Annotated[int, typer.Option("--port", help="Of the dashboard.")] = 8080,
    track: Annotated[bool, typer.Option("--track", help="One run in Weights & Biases for each trial.")] = False,
    project: Project = "sb3_pgplus",
    n_envs: NumEnvs = None,
    backend: Backend = None,
    config: Config = None,
    overrides: Overrides = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, … or auto.")] = "cpu",
    progress: Progress = True,
    debug: Debug = False,
) -> None:
    """Search for better hyperparameters; start it several times with one storage to share the work."""
    with _errors_as_one_line(debug):
        from sb3_pgplus.configs import ConfigError, resolve_settings

        try:
            from sb3_pgplus.tuning import command
            from sb3_pgplus.tuning.plan import FIRST_TEST_SEED, processors
        except ImportError as error:
            raise ConfigError(str(error)) from error
        settings = resolve_settings(
            algo=algo,
            env=env,
            config=config,
            overrides=overrides or [],
            n_envs=n_envs,
            backend=backend,
            n_timesteps=n_timesteps,
        )
        place = command.place_of(settings, storage=storage, name=study, out=out)
        if dashboard:
            command.serve_dashboard(place, port)
            return
        plan = command.plan_of(
            settings,
            space,
            n_trials=n_trials,
            seeds=tuple(range(seeds)),
            test_seeds=tuple(range(FIRST_TEST_SEED, FIRST_TEST_SEED + test_seeds)),
            top=top,
            objective=objective,
            goals=tuple(name.strip() for name in multi_objective.split(",")),
            prune=prune,
            prune_p=prune_p,
            sampler=sampler,
            seed=seed,
            n_evaluations=evaluations,
            eval_episodes=eval_episodes,
            max_seconds=max_time,
            max_memory=max_memory,
            enqueue=enqueue,
            jobs=jobs or processors(),
            device=device,
        )
        command.run(
            plan,
            place,
            resume=resume,
            heartbeat=heartbeat,
            project=project if track else None,
            progress=progress,
            console=Console(),
        )


@app.command()
def benchmark(
    *,
    suite: Annotated[str, typer.Option("--suite", help="mujoco, sb3, time, classic or ablation.")] = "mujoco",
    algos: Annotated[str | None, typer.Option("--algos", help="Some of the suite's, with commas; see --list.")] = None,
    envs: Annotated[str | None, typer.Option("--envs", help="Some of the suite's tasks, with commas.")] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", help="10 (the first ten), 0-2 or 0,3; by default the suite's.")
    ] = None,
    steps: Annotated[
        float | None, typer.Option("--steps", help="Of a training; results of another length have their own folder.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", min=1, help="Trainings side by side; by default one per processor (time: one)."),
    ] = None,
    store: Annotated[
        Path | None, typer.Option("--store", help="Folder of the results; by default benchmarks/results/suite.")
    ] = None,
    show_list: Annotated[bool, typer.Option("--list", help="Show what is stored and what is missing.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Make runs anew that have other settings.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Tables and figures of the stored runs; no training.")] = False,
    figures: Annotated[bool, typer.Option("--figures/--no-figures", help="With --table: draw the figures.")] = True,
    page: Annotated[
        Path | None, typer.Option("--page", help="Markdown file for them; by default docs/results.md, if it is there.")
    ] = None,
    progress: Progress = True,
    debug: Debug = False,
) -> None:
    """Learning curves of many tasks and seeds, with statistics; a stopped suite continues."""
    with _errors_as_one_line(debug):
        from sb3_pgplus.benchmarking import command
        from sb3_pgplus.benchmarking.suites import parse_seeds, plan
        from sb3_pgplus.configs import whole_number
        from sb3_pgplus.vec_env.common import usable_cpus

        console, folder = Console(), store or command.STORE
        if table:
            command.write_tables(folder, page, with_figures=figures, console=console)
            return
        runs = plan(
            suite,
            algos=command.names("--algos", algos),
            envs=command.names("--envs", envs),
            seeds=None if seeds is None else parse_seeds(seeds),
            n_timesteps=None if steps is None else whole_number("steps", steps),
        )
        if show_list:
            console.print(command.plan_table(runs, folder))
            command.name_damaged(folder, console)
            return
        jobs = jobs or (1 if any(run.is_timed for run in runs) else usable_cpus())
        outcome = command.run(runs, folder, jobs=jobs, replace=replace, progress=progress, console=console)
    if outcome.failed:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Zip file of SB3's PPO, A2C or TRPO; the file is trusted.")],
    target: Annotated[Path, typer.Argument(help="The new file.")],
    *,
    algo: Annotated[str | None, typer.Option("--algo", help="Only where the file does not tell.")] = None,
    debug: Debug = False,
) -> None:
    """Turn a model that SB3 saved into one of ours, which loads without pickle."""
    with _errors_as_one_line(debug):
        from sb3_pgplus.conversion import convert as run_conversion

        pickled = run_conversion(source, target, algo)
        Console().print(f"Converted: {target}", highlight=False, markup=False, soft_wrap=True)
        if pickled:
            _print_error(f"Loading it still asks for trust, because of {', '.join(pickled)}.")


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)],
    *,
    repo: Annotated[str, typer.Option("--repo", help="user/name on the hub; made if it is not there.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only write the folder that would be uploaded.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="The folder of --dry-run; by default hub/ in the run folder.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository a private one.")] = False,
    message: Annotated[str, typer.Option("--message", help="Of the commit.")] = "Upload a model",
    debug: Debug = False,
) -> None:
    """Upload a run to the Hugging Face hub, with a model card."""
    with _errors_as_one_line(debug):
        from sb3_pgplus.configs import ConfigError

        try:
            from sb3_pgplus import hub
        except ImportError as error:
            raise ConfigError(str(error)) from error
        if dry_run:
            package = hub.prepare(run, repo, out or run / "hub")
            what = f"Nothing is uploaded; see {package.folder}"
        else:
            address, package = hub.push(run, repo, private=private, message=message)
            what = f"Uploaded: {address}"
        if package.pickled:
            _print_error(f"Loading the model asks for trust, because it holds pickles: {', '.join(package.pickled)}.")
        Console().print(what, highlight=False, markup=False, soft_wrap=True)


# --- what is printed --------------------------------------------------------------------------------------------------


@contextmanager
def _errors_as_one_line(debug: bool) -> Iterator[None]:
    """Turn what a user can put right into one red line; anything else keeps its traceback."""
    from sb3_pgplus.configs import ConfigError
    from sb3_pgplus.errors import ModelFileError

    try:
        yield
    except KeyboardInterrupt:
        _print_error("Interrupted.")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except (ConfigError, ModelFileError) as error:
        _fail(error, EXIT_BAD_INPUT, debug)
    except OSError as error:
        _fail(error, EXIT_FAILED, debug)
    except RuntimeError as error:
        if type(error).__name__ not in ("TrainingError", "TuningError"):
            raise
        _fail(error, EXIT_FAILED, debug)


def _fail(error: Exception, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    _print_error(f"Error: {' '.join(str(error).split())}")
    raise typer.Exit(code) from error


def _print_error(message: str) -> None:
    Console(stderr=True).print(Text(message, style="bold red"), soft_wrap=True)


def _report(run: FinishedRun, console: Console) -> None:
    from sb3_pgplus.configs import this_command

    steps = run.model.num_timesteps
    if run.interrupted:
        console.print(f"[yellow]Interrupted after {steps:,} steps; what was learned until then is saved.")
    elif run.evaluation is not None:
        console.print(_table(run.evaluation))
    speed = steps / max(run.seconds, 1e-9)
    console.print(f"{steps:,} steps in {_duration(run.seconds)}, {speed:,.0f} steps/s", highlight=False)
    command, folder = this_command(), shlex.quote(str(run.folder.path))
    lines = [f"{command} evaluate {folder}", f"{command} enjoy {folder} --record"]
    if run.interrupted:
        lines.insert(0, f"{command} train --resume {folder}")
    for line in lines:
        console.print(f"  {line}", style="cyan", highlight=False, markup=False, soft_wrap=True)


def _table(evaluation: Evaluation) -> Table:
    summary = evaluation.summary()
    actions = "deterministic" if evaluation.deterministic else "sampled actions"
    episodes = f"{summary['n_episodes']} episode" + ("s" if summary["n_episodes"] != 1 else "")
    table = Table(title=f"{evaluation.env}, {episodes}, {actions}", title_justify="left")
    for name in ("return: mean ± std", "min", "max", "episode length"):
        table.add_column(name, justify="right")
    table.add_row(
        f"[bold]{summary['mean_return']:,.2f}[/] ± {summary['std_return']:,.2f}",
        f"{summary['min_return']:,.2f}",
        f"{summary['max_return']:,.2f}",
        f"{summary['mean_length']:,.1f}",
    )
    return table


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


if __name__ == "__main__":
    main()
