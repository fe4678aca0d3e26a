"""Figures of stored runs: sample efficiency by steps and by time, performance profiles, the ablation."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sb3_pgplus import statistics
from sb3_pgplus.benchmarking.results import Curve, Results
from sb3_pgplus.benchmarking.suites import (
    CLASSIC_TASKS,
    EXTRA_TASKS,
    MUJOCO_TASKS,
    OTHERS,
    OURS,
    OWN,
    REFERENCE_TASKS,
    TIMED,
    TIMED_TASKS,
    Variant,
    ablation_variants,
)
from sb3_pgplus.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "ppoplus": "#1f6fb2",
    "trpoplus": "#3a9d5d",
    "a2cplus": "#8e5bb5",
    "sb3-ppo-same": "#d9822b",
    "sb3-ppo-own": "#b3423a",
    "sb3-ppo-zoo": "#8a8f98",
    "sb3-contrib-trpo-zoo": "#b8a13a",
}
GREY, GRID = "#8a8f98", "#e3e6ea"
THRESHOLDS = np.linspace(0, 1.6, 161)
MINUTES = "minutes of training"


def draw(results: Results, folder: Path, *, anew: bool = True) -> list[tuple[str, Path]]:
    """
    Draw what there are runs for.

    :param results: of a group
    :param folder: of the pictures
    :param anew: otherwise only look which pictures are there
    :return: what each one shows, and its file
    :raises ImportError: if matplotlib is missing, naming the extra that installs it
    """
    drawn = []
    for name, title, make in _figures(results):
        path = folder / f"results-{results.group}-{name}.svg"
        figure = make() if anew else None
        if figure is not None:
            _save(figure, path)
        elif anew:
            path.unlink(missing_ok=True)  # of runs that are no longer there
        if figure is not None or (not anew and path.exists()):
            drawn.append((title, path))
    return drawn


def _figures(results: Results) -> list[tuple[str, str, Callable[[], Figure | None]]]:
    everything, timed = [*OURS, *OTHERS], results.of_one_condition()
    steps, minutes = (lambda curve: curve.steps), (lambda curve: curve.seconds / 60)
    beside = [OURS[0], *OTHERS[:2], OWN]
    compared = [env for env in REFERENCE_TASKS if any((other.name, env) in results.cells for other in OTHERS[:2])]
    classic = [*CLASSIC_TASKS, *EXTRA_TASKS["classic"]]
    kinds: dict[str, list[tuple[str, str, Callable[[], Figure | None]]]] = {
        "mujoco": [
            (
                "steps",
                "Return by environment steps",
                lambda: _curves(results, everything, MUJOCO_TASKS, steps, "steps"),
            ),
            (
                "time",
                "Return by training time",
                lambda: _curves(timed, beside, _timed(timed, beside, compared), minutes, MINUTES),
            ),
            (
                "time-all",
                "Return by training time, all algorithms",
                lambda: _curves(timed, everything, _timed(timed, everything, MUJOCO_TASKS), minutes, MINUTES),
            ),
            ("profile", "Performance profile", lambda: _profile(results, OURS, MUJOCO_TASKS, "Nine tasks")),
            (
                "profile-four",
                "Performance profile on the tasks beside SB3",
                lambda: _profile(results, everything, REFERENCE_TASKS, "Four tasks"),
            ),
        ],
        "time": [
            ("time", "Return by training time", lambda: _curves(results, TIMED, TIMED_TASKS, minutes, MINUTES)),
        ],
        "classic": [("steps", "Return by environment steps", lambda: _curves(results, OURS, classic, steps, "steps"))],
        "ablation": [("scores", "The ablation", lambda: _ablation(results))],
    }
    return kinds.get(results.kind, [])


def _timed(results: Results, variants: Sequence[Variant], tasks: Sequence[str]) -> list[str]:
    """Of some tasks those whose times can be compared: all measured on one machine, so many trainings side by side."""
    conditions = {env: {c for variant in variants for c in results.conditions(variant.name, env)} for env in tasks}
    return [env for env, found in conditions.items() if len(found) == 1]


def _new(**options: Any) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "sb3_pgplus[report]"') from error
    # A bare Figure draws without a window and without pyplot's state, which may be the user's.
    return Figure(layout="constrained", **options)


def _save(figure: Figure, path: Path) -> None:
    """The same figure gives the same bytes: no date, and names inside that depend on the file's name alone."""
    import matplotlib as mpl

    content = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    write_atomically(path, content.getvalue())


def _curves(
    results: Results, variants: Sequence[Variant], tasks: Sequence[str], x: Callable[[Curve], Any], label: str
) -> Figure | None:
    shown = [env for env in tasks if any((variant.name, env) in results.cells for variant in variants)]
    if not shown:
        return None
    columns = min(3 if len(shown) != 4 else 2, len(shown))
    lines = -(-len(shown) // columns)
    figure = _new(figsize=(3.6 * columns, 2.7 * lines + 0.5))
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    legend: dict[str, Any] = {}
    for axis, env in zip(axes, shown, strict=False):
        for variant in variants:
            found = results.curve(variant.name, env)
            if found is not None:
                n = len(results.cells[variant.name, env])
                [line] = axis.plot(x(found), found.returns, color=COLORS[variant.name], linewidth=1.6)
                legend.setdefault(variant.label, line)
                if found.interval is not None and n > 1:
                    band = {"color": COLORS[variant.name], "alpha": 0.18, "linewidth": 0}
                    axis.fill_between(x(found), *found.interval, **band)
        _decorate(axis, env, label)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _profile(results: Results, variants: Sequence[Variant], tasks: Sequence[str], title: str) -> Figure | None:
    found = {variant: results.normalized(variant.name, tasks) for variant in variants}
    if not any(found.values()):
        return None
    figure = _new(figsize=(6.4, 3.6))
    axis = figure.subplots()
    for variant, scores in found.items():
        if scores is not None:
            fractions, interval = statistics.performance_profile(scores, THRESHOLDS)
            axis.plot(THRESHOLDS, fractions, color=COLORS[variant.name], label=variant.label)
            if interval is not None:
                axis.fill_between(THRESHOLDS, *interval, color=COLORS[variant.name], alpha=0.18, linewidth=0)
    _decorate(axis, title, "normalised score τ: random actions 0, published PPO 1")
    axis.set_ylabel("fraction of runs above τ")
    axis.legend(frameon=False, fontsize=8)
    return figure


def _ablation(results: Results) -> Figure | None:
    tasks = [env for env in ("Hopper-v5", "Walker2d-v5", *EXTRA_TASKS["ablation"]) if _any(results, env)]
    if not tasks:
        return None
    variants = [v for v in ablation_variants() if any((v.name, env) in results.cells for env in tasks)]
    figure = _new(figsize=(3.6 * len(tasks) + 2.0, 0.26 * len(variants) + 1.2))
    axes = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    for axis, env in zip(axes, tasks, strict=True):
        base = results.summary("ppoplus", env)
        if base is not None:
            axis.axvline(base.value, color=GREY, linewidth=0.8, linestyle=":")
            axis.axvspan(*base.interval, color=GREY, alpha=0.15, linewidth=0)
        for row, variant in enumerate(variants):
            found = results.summary(variant.name, env)
            if found is not None:
                color = COLORS["trpoplus" if variant.algo == "trpoplus" else "ppoplus"]
                axis.hlines(row, *found.interval, color=color, linewidth=1.4)
                axis.plot(found.value, row, "o", color=color, markersize=4)
        _decorate(axis, env, "score: IQM and 95 % interval")
    axes[0].set_yticks(range(len(variants)), [variant.label for variant in variants])
    axes[0].invert_yaxis()
    return figure


def _any(results: Results, env: str) -> bool:
    return any(task == env for _, task in results.cells)


def _decorate(axis: Axes, title: str, label: str) -> None:
    from matplotlib.ticker import EngFormatter

    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel(label, fontsize=8)
    axis.tick_params(labelsize=8)
    if label == "steps":
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(visible=True, color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
