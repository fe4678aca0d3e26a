"""Markdown tables of stored runs. No number comes from anywhere else, but for the published ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from string import ascii_lowercase

import numpy as np

from sb3_pgplus import statistics
from sb3_pgplus.benchmarking.results import GOAL, Results, Summary, published
from sb3_pgplus.benchmarking.suites import (
    CLASSIC_TASKS,
    EXTRA_TASKS,
    MUJOCO_TASKS,
    OTHERS,
    OURS,
    OWN,
    PER_TASK_OURS,
    REFERENCE_TASKS,
    TIMED,
    TIMED_TASKS,
    VARIANTS,
    Variant,
    ablation_variants,
    per_task_cells,
)
from sb3_pgplus.statistics import Interval

Rows = list[list[str]]
NONE = "–"
PAIRS = (
    ("ppoplus", "sb3-ppo-same"),
    ("ppoplus", "sb3-ppo-zoo"),
    ("trpoplus", "sb3-contrib-trpo-zoo"),
)
TIMED_PAIRS = (*PAIRS, ("ppoplus", OWN.name))
SHARED_TARGET_TASKS = tuple(env for env in MUJOCO_TASKS if env != "Swimmer-v5")
"""Swimmer's published figures are with another discount factor: a matter of the settings per task."""


def table(header: Sequence[str], rows: Rows) -> str:
    """
    A Markdown table, numbers to the right.

    :param header: names of the columns, the first of words
    :param rows: cells
    :return: nothing without rows
    """
    if not rows:
        return ""
    rule = "|---" + "|--:" * (len(header) - 1) + "|"
    return "\n".join(["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows), ""])


def number(value: float) -> str:
    """
    :param value: a return
    """
    text = f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"
    return "0.0" if text == "-0.0" else text.replace("-", "−")


def list_item(text: str, width: int = 120) -> list[str]:
    """
    An item of a Markdown list, in lines that fit the page.

    :param text: one paragraph
    :param width: most characters of a line
    """
    lines, current = [], "*"
    for word in text.split():
        if len(current) + len(word) + 1 > width:
            lines.append(current)
            current = " "
        current += f" {word}"
    return [*lines, current]


def cell(summary: Summary | None) -> str:
    """
    IQM, interval and number of seeds.

    :param summary: of a cell; nothing without runs
    """
    if summary is None:
        return NONE
    low, high = map(number, summary.interval)
    interval = f" [{low}, {high}]" if summary.n_seeds > 1 else ""
    return f"{number(summary.value)}{interval} ({summary.n_seeds})"


def share(value: float, interval: Interval | None) -> str:
    """
    A number near 1 with its interval.

    :param value: a probability or a normalised score
    :param interval: nothing where seeds are too few
    """
    return f"{value:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


# --- scores -----------------------------------------------------------------------------------------------------------


def scores(results: Results, variants: Sequence[Variant], tasks: Sequence[str]) -> str:
    """
    Scores of each task beside the published ones; "as above" where a task has no settings of its own.

    :param results: of a group
    :param variants: columns
    :param tasks: rows; those without any run are left out
    """
    figures = published().get(results.kind, {})
    header = ["Task"] + [name for variant in variants for name in (variant.label, "published")]
    rows = []
    for env in tasks:
        row = [env]
        for variant in variants:
            figure = figures.get(variant.algo, {}).get(env)
            own = results.summary(variant.name, env)
            text = "as above" if own is None and stand_in(variant, env) != variant.name else cell(own)
            row += [text, figure[1] if figure else NONE]
        if _has_runs(results, variants, [env]):
            rows.append(row)
    return table(header, rows)


def plain(results: Results, variants: Sequence[Variant], tasks: Sequence[str], *, training: bool = False) -> str:
    """
    Scores alone, or the returns of the training's own episodes.

    :param results: of a group
    :param variants: columns
    :param tasks: rows; those without any run are left out
    :param training: of training episodes
    """
    shown = [variant for variant in variants if _has_runs(results, [variant], tasks)]
    rows = [
        [env, *(cell(results.summary(variant.name, env, training=training)) for variant in shown)]
        for env in tasks
        if _has_runs(results, shown, [env])
    ]
    return table(["Task", *(variant.label for variant in shown)], rows)


def targets(results: Results, variants: Sequence[Variant], tasks: Sequence[str]) -> str:
    """
    On how many tasks a variant is at or above the published figure, as a list.

    :param results: of a group
    :param variants: one line each
    :param tasks: those that count
    """
    lines = []
    for variant in variants:
        figures = published().get(results.kind, {}).get(variant.algo, {})
        found = {env: results.summary(stand_in(variant, env), env) for env in tasks if env in figures}
        trained = {env: summary for env, summary in found.items() if summary}
        above = [env for env, summary in trained.items() if summary.value >= figures[env][0]]
        if trained:
            names = f": {', '.join(above)}" if above else ""
            text = f"{variant.label}: {len(above)} of {len(tasks)} tasks, {len(trained)} of them trained{names}."
            lines += list_item(text)
    return "\n".join(lines) + "\n"


def stand_in(variant: Variant, env: str) -> str:
    """
    Whose runs count for a variant: those with the one set where it has no settings of its own for a task.

    :param variant: any
    :param env: environment id
    :return: its own name, or another's
    """
    return variant.algo if variant in PER_TASK_OURS and (variant, env) not in per_task_cells() else variant.name


def _has_runs(results: Results, variants: Sequence[Variant], tasks: Sequence[str]) -> bool:
    return any((variant.name, env) in results.cells for variant in variants for env in tasks)


# --- comparisons ------------------------------------------------------------------------------------------------------


def improvements(results: Results, pairs: Sequence[tuple[str, str]], tasks: Sequence[str]) -> str:
    """
    Probability that a run of ours is better than one of theirs, by task and on all of them.

    :param results: of a group
    :param pairs: names of variants, ours first
    :param tasks: columns
    """
    rows = []
    for ours, theirs in pairs:
        over_all = results.improvement(ours, theirs, tasks)
        if over_all is None:
            continue
        by_task = [results.improvement(ours, theirs, [env]) for env in tasks]
        texts = [*(share(*found[:2]) if found else NONE for found in by_task), _together(*over_all, tasks)]
        rows.append([f"{VARIANTS[ours].label} over {VARIANTS[theirs].label}", *texts])
    return table(["Probability of improvement", *tasks, "together"], rows)


def _together(value: float, interval: Interval | None, common: Sequence[str], tasks: Sequence[str]) -> str:
    return share(value, interval) + (f" ({len(common)} of {len(tasks)} tasks)" if len(common) < len(tasks) else "")


def aggregates(results: Results, variants: Sequence[Variant], task_sets: Mapping[str, Sequence[str]]) -> str:
    """
    IQM of normalised scores over tasks and seeds.

    :param results: of a group
    :param variants: rows
    :param task_sets: name → tasks, columns
    """
    rows = []
    for variant in variants:
        found = [results.normalized(variant.name, tasks) for tasks in task_sets.values()]
        texts = [share(*statistics.aggregate(each)) if each else NONE for each in found]
        if any(found):
            rows.append([variant.label, *texts])
    return table(["Normalised score", *task_sets], rows)


def times(results: Results, variants: Sequence[Variant], tasks: Sequence[str]) -> str:
    """
    Minutes of a whole training, evaluations left out: median over those seeds that ran on the most frequent machine
    with the most frequent number of trainings side by side. Cells without any are marked.

    :param results: of a group
    :param variants: columns
    :param tasks: rows
    """
    results = results.of_one_condition()
    shown = [variant for variant in variants if _has_runs(results, [variant], tasks)]
    found = Counter(c for env in tasks for variant in shown for c in results.conditions(variant.name, env))
    usual, *others = sorted(found, key=lambda c: (-found[c], c)) or [("", 0)]
    marks = dict(zip(others, ascii_lowercase, strict=False))

    def text(variant: Variant, env: str) -> str:
        seconds = [float(run.data["seconds"]) for run in results.cells.get((variant.name, env), [])]
        marked = sorted(marks[c] for c in results.conditions(variant.name, env) if c in marks)
        return " ".join([f"{np.median(seconds) / 60:.1f}", *marked]) if seconds else NONE

    rows = [[env, *(text(v, env) for v in shown)] for env in tasks if _has_runs(results, shown, [env])]
    words = [f"{mark}: on {_condition(*condition)}" for condition, mark in marks.items()]
    lines = ["", *list_item(f"{'; '.join(words)}. All others on {_condition(*usual)}."), ""] if words else []
    return table(["Minutes of training", *(variant.label for variant in shown)], rows) + "\n".join(lines)


def _condition(machine: str, jobs: int) -> str:
    return f"{machine}, {jobs} at a time"


def times_to_goal(results: Results, pairs: Sequence[tuple[str, str]], tasks: Sequence[str]) -> str:
    """
    Training time until the IQM reaches 80 % of theirs at the end, of those seeds that ran on the most frequent machine
    with the most frequent number of trainings side by side; no ratio where there are none.

    :param results: of a group
    :param pairs: names of variants, ours first
    :param tasks: those whose returns begin near 0
    """
    results, rows = results.of_one_condition(), []
    for env in tasks:
        for ours, theirs in pairs:
            final = results.summary(theirs, env)
            if final is None or (ours, env) not in results.cells:
                continue
            goal = GOAL * final.value
            ours_seconds, their_seconds = (results.seconds_to(name, env, goal) for name in (ours, theirs))
            texts = [f"{s / 60:.2f}" if s is not None else "not reached" for s in (ours_seconds, their_seconds)]
            comparable = len({c for name in (ours, theirs) for c in results.conditions(name, env)}) == 1
            ratio = f"{ours_seconds / their_seconds:.2f}" if ours_seconds and their_seconds and comparable else NONE
            rows.append([env, VARIANTS[theirs].label, number(goal), *texts, ratio])
    header = ["Task", "beside", "80 % of its score", "ours, minutes", "its minutes", "ours / its"]
    return table(header, rows)


def ablation(results: Results, tasks: Sequence[str]) -> str:
    """
    Each file of the ablation beside PPOPlus and the paper; no probability of a single seed.

    :param results: of the group
    :param tasks: columns
    """
    shown = [env for env in tasks if _has_runs(results, ablation_variants(), [env])]
    figures = published()["ablation"]
    rows = []
    for variant in ablation_variants():
        if not _has_runs(results, [variant], shown):
            continue
        against = results.improvement("ppoplus", variant.name, shown) if variant.name != "ppoplus" else None
        row = [
            variant.label + (", all tricks" if variant.name == "ppoplus" else ""),
            *(cell(results.summary(variant.name, env)) for env in shown),
        ]
        row.append(_together(*against, shown) if against and against[1] else NONE)
        row += [figures.get(variant.name, {}).get(env, [0, NONE])[1] for env in shown]
        rows.append(row)
    paper = [f"paper (1M steps), {env.partition('-')[0]}" for env in shown]
    lengths = " or ".join(f"{n:,}" for n in sorted({run.n_timesteps for run in results.runs}))
    sentence = f"\nOurs are after {lengths} steps on v5, the paper's after 1,000,000 on v2, at least 80 agents each.\n"
    return table(["Settings", *shown, "P(all tricks are better)", *paper], rows) + sentence


# --- sections ---------------------------------------------------------------------------------------------------------


def sections(results: Results) -> list[tuple[str, str]]:
    """
    Headings and contents for a group's results.

    :param results: of a group
    """
    kinds = {
        "mujoco": _mujoco_sections,
        "time": _time_sections,
        "classic": _classic_sections,
        "ablation": _ablation_sections,
    }
    return [(title, text) for title, text in kinds[results.kind](results) if text.strip()]


def _tasks(kind: str) -> list[str]:
    return [*{"classic": CLASSIC_TASKS, "ablation": ("Hopper-v5", "Walker2d-v5")}[kind], *EXTRA_TASKS[kind]]


def _mujoco_sections(results: Results) -> list[tuple[str, str]]:
    everything = [*OURS, *OTHERS]
    task_sets = {"nine tasks": MUJOCO_TASKS, "the four beside SB3": REFERENCE_TASKS}
    met = targets(results, OURS, SHARED_TARGET_TASKS)
    sentence = f"IQM at or above the published figure, tasks other than Swimmer:\n\n{met}" if met.strip() else ""
    per_task = scores(results, PER_TASK_OURS, MUJOCO_TASKS)
    if per_task:
        met = targets(results, PER_TASK_OURS, MUJOCO_TASKS)
        per_task += f"\nIQM at or above the published figure, all nine tasks:\n\n{met}"
    return [
        ("One set of hyperparameters per algorithm", scores(results, OURS, MUJOCO_TASKS) + "\n" + sentence),
        ("Beside SB3 and sb3-contrib", plain(results, everything, REFERENCE_TASKS)),
        ("Probability of improvement", improvements(results, PAIRS, REFERENCE_TASKS)),
        ("All tasks together", aggregates(results, everything, task_sets)),
        ("Settings per task", per_task),
        ("Time", times(results, [*everything, OWN], MUJOCO_TASKS)),
        ("Time to 80 % of SB3's score", times_to_goal(results, TIMED_PAIRS, REFERENCE_TASKS)),
        ("Returns of the training's own episodes", plain(results, everything, MUJOCO_TASKS, training=True)),
    ]


def _time_sections(results: Results) -> list[tuple[str, str]]:
    return [
        ("Minutes", times(results, TIMED, TIMED_TASKS)),
        ("Time to 80 % of the score", times_to_goal(results, [(OURS[0].name, OWN.name)], TIMED_TASKS)),
    ]


def _classic_sections(results: Results) -> list[tuple[str, str]]:
    return [("Settings per task", scores(results, OURS, _tasks("classic")))]


def _ablation_sections(results: Results) -> list[tuple[str, str]]:
    return [("Each trick", ablation(results, _tasks("ablation")))]
