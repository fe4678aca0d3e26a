"""
How the hyperparameters of zoo_configs were chosen: candidates against each other, on seeds that no table reports.

    python benchmarks/candidates.py benchmarks/candidates/ppoplus.yml --jobs 2
    python benchmarks/candidates.py benchmarks/candidates/ppoplus.yml --only baseline,no_value_clip --table

A file names an algorithm, tasks, seeds and steps, a base, and its candidates: what each changes in the base. What
neither names has the constructor's default, so a candidate stays what it was when zoo_configs changes; if a default
changes, the base has to name the old one. Finished runs are kept; a stopped command continues.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from sb3_pgplus.benchmarking import runner, store, suites
from sb3_pgplus.benchmarking.trainings import Protocol
from sb3_pgplus.configs import read_mapping, resolve_settings

RESULTS = Path(__file__).parent / "results" / "candidates"
#: Fewer evaluations than in the suite; a score is the mean of the last ten all the same, here the last quarter.
PROTOCOL = Protocol(n_evaluations=40, n_episodes=5)
#: What chooses nothing else than the number of environments and their steps.
RUN_SETTINGS = ("n_envs",)


def main(
    file: Annotated[Path, typer.Argument(help="YAML: algo, tasks, seeds, n_timesteps, base, candidates.")],
    *,
    only: Annotated[str, typer.Option(help="Names of candidates, separated by commas; all by default.")] = "",
    tasks: Annotated[str, typer.Option(help="Environment ids; all of the file by default.")] = "",
    seeds: Annotated[str, typer.Option(help="Seeds; all of the file by default.")] = "",
    jobs: Annotated[int, typer.Option(min=1, help="Processes side by side.")] = 1,
    table: Annotated[bool, typer.Option("--table", help="Train nothing, only print.")] = False,
    results: Annotated[Path, typer.Option(help="Folder of the finished runs.")] = RESULTS,
) -> None:
    """Train the candidates of a file and print their scores."""
    plan = read_mapping(file)
    plan["tasks"] = split(tasks) or plan["tasks"]
    plan["seeds"] = [int(seed) for seed in split(seeds)] or plan["seeds"]
    chosen = split(only) or list(plan["candidates"])
    runs = [run for seed in plan["seeds"] for name in chosen for run in runs_of(plan, name, seed, file.stem)]
    console = Console()
    if not table:
        runner.make(runs, results, jobs=jobs, protocol=PROTOCOL, progress=True, console=console)
    console.print(scores(runs, plan, results))


def split(text: str) -> list[str]:
    """
    :param text: separated by commas
    """
    return [name.strip() for name in text.split(",") if name.strip()]


def runs_of(plan: dict[str, Any], name: str, seed: int, group: str) -> list[suites.Run]:
    """
    The trainings of one candidate and seed.

    :param plan: content of the file
    :param name: of the candidate
    :param seed: random seed
    :param group: folder of the results
    """
    values = plan["base"] | (plan["candidates"][name] or {})
    found = []
    for env in plan["tasks"]:
        settings = replace(
            resolve_settings(algo=plan["algo"], env=env),
            n_timesteps=int(plan["n_timesteps"]),
            n_envs=values["n_envs"],
            hyperparameters={k: v for k, v in values.items() if k not in RUN_SETTINGS},
            seed=seed,
            source=f"candidate {name}",
        )
        found.append(suites.Run(group, suites.Variant(name, name, plan["algo"], name), settings))
    return found


def scores(runs: list[suites.Run], plan: dict[str, Any], folder: Path) -> Table:
    """
    A row for each candidate: mean over seeds on each task, of runs with the settings that the file says.

    :param runs: what was planned
    :param plan: content of the file
    :param folder: of the results
    """
    table = Table(
        title=f"{plan['algo']}, {plan['n_timesteps']:,} steps: mean over seeds (each seed)", title_justify="left"
    )
    for column in ("candidate", *plan["tasks"]):
        table.add_column(column)
    for name in dict.fromkeys(run.variant.name for run in runs):
        cells = []
        for env in plan["tasks"]:
            cell = [run for run in runs if (run.variant.name, run.env) == (name, env)]
            stored = [(run, store.read(store.path_of(folder, run))) for run in cell]
            found = [each.score for run, each in stored if each and not runner.changes(each, run, PROTOCOL)]
            cells.append(f"{np.mean(found):.0f} ({', '.join(f'{s:.0f}' for s in found)})" if found else "–")
        table.add_row(name, *cells)
    return table


if __name__ == "__main__":
    typer.run(main)
