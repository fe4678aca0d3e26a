"""What `sb3-pgplus benchmark` does."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sb3_pgplus.benchmarking import runner, store
from sb3_pgplus.benchmarking.suites import Run
from sb3_pgplus.benchmarking.trainings import Protocol
from sb3_pgplus.configs import ConfigError, this_command

STORE, PAGE = Path("benchmarks/results/suite"), Path("docs/results.md")


def names(option: str, text: str | None) -> list[str] | None:
    """
    :param option: whose text it is
    :param text: comma-separated, or nothing
    :raises ConfigError: if it names nothing
    """
    found = [name.strip() for name in (text or "").split(",") if name.strip()]
    if text is not None and not found:
        raise ConfigError(f"{option} {text!r} names nothing: write names with commas between them, or leave it out")
    return found or None


def run(
    runs: Sequence[Run],
    folder: Path,
    *,
    jobs: int,
    replace: bool = False,
    progress: bool = True,
    console: Console,
) -> runner.Outcome:
    """
    Train what is missing and say what became of it.

    :param runs: the plan
    :param folder: of all results
    :param jobs: processes side by side
    :param replace: make runs anew that are there with other settings
    :param progress: draw a bar, or print a line for each run where there is no terminal
    :param console: where to report to
    """
    name_damaged(folder, console)
    try:
        outcome = runner.make(runs, folder, jobs=jobs, replace=replace, progress=progress, console=console)
    except KeyboardInterrupt:
        console.print("Stopped. Finished runs are kept, and the same command continues.")
        raise
    store_option = "" if folder == STORE else f" --store {shlex.quote(str(folder))}"
    console.print(
        f"{outcome.finished} runs made, {outcome.skipped} were there, {outcome.failed} failed. "
        f"Tables and figures: {this_command()} benchmark --table{store_option}",
        highlight=False,
        soft_wrap=True,
    )
    for path, why in store.failures(folder):
        console.print(f"{folder / path}: {why}", style="red", highlight=False, markup=False, soft_wrap=True)
    return outcome


def name_damaged(folder: Path, console: Console) -> None:
    """
    Say which files are not whole: their runs are made anew, over them.

    :param folder: of all results
    :param console: where to print
    """
    for path in store.damaged(folder):
        text = f"{folder / path} is damaged and counts as missing"
        console.print(text, style="red", highlight=False, markup=False, soft_wrap=True)


def plan_table(runs: Sequence[Run], folder: Path) -> Table:
    """
    The cells of a plan: seeds that are there and missing, how long these take, and which only ``--replace`` would make.

    :param runs: the plan
    :param folder: of all results
    """
    estimates = runner.Estimates.of(runs, folder)
    table = Table(title=f"{len(runs)} runs in {folder / runs[0].group}" if runs else "nothing", title_justify="left")
    changed = [r for r in runs if _is_changed(r, folder)]
    for column in ("algorithm", "environment"):
        table.add_column(column, overflow="fold", no_wrap=True)  # `--algos` and `--envs` take these names
    for column in ("steps", "stored seeds", "missing seeds", "missing, time"):
        table.add_column(column)
    if changed:
        table.add_column("with other settings")
    for variant, env, n_timesteps in dict.fromkeys((r.variant.name, r.env, r.settings.n_timesteps) for r in runs):
        cell = [r for r in runs if (r.variant.name, r.env) == (variant, env)]
        missing = [r for r in cell if store.read(store.path_of(folder, r)) is None]
        seconds = [estimates.seconds(r) for r in missing]
        time = runner.duration(sum(s for s in seconds if s)) if missing and all(seconds) else "?" if missing else ""
        others = [r.seed for r in cell if r in changed]
        there = sorted({r.seed for r in cell} - {r.seed for r in missing} - set(others))
        stored_seeds, missing_seeds, other_seeds = (
            ", ".join(map(str, seeds)) for seeds in (there, [r.seed for r in missing], others)
        )
        row = [variant, env, f"{n_timesteps:,}", stored_seeds, missing_seeds, time]
        table.add_row(*row, *([other_seeds] if changed else []))
    return table


def _is_changed(run: Run, folder: Path) -> bool:
    stored = store.read(store.path_of(folder, run))
    return stored is not None and bool(runner.changes(stored, run, Protocol()))


def write_tables(folder: Path, page: Path | None, *, with_figures: bool, console: Console) -> Path:
    """
    Recompute tables and figures, print the tables.

    :param folder: of all results
    :param page: Markdown file; by default docs/results.md where there is one, else a file beside the results
    :param with_figures: the figures, too
    :param console: where to print
    :return: the page
    :raises ConfigError: if a package is missing, or there are no results
    """
    if not folder.is_dir():
        raise ConfigError(f"there are no results in {folder}: run a suite first, or give --store")
    try:
        from sb3_pgplus.benchmarking.page import write
    except ImportError as error:
        raise ConfigError(str(error)) from error
    target = page or (PAGE if PAGE.is_file() and folder == STORE else folder / "results.md")
    console.out(write(folder, target, with_figures=with_figures))
    console.print(f"Page: {target}", highlight=False, markup=False, soft_wrap=True)
    return target
