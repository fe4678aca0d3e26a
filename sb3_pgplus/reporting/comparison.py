"""Learning curves and metrics of several runs: one line per experiment, a band over its seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sb3_pgplus.configs import ConfigError
from sb3_pgplus.reporting.learning_curve import decorate, new_figure
from sb3_pgplus.reporting.runs import Axis, FloatArray, Run, Series, grouped
from sb3_pgplus.statistics import curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Okabe and Ito's colours, which people with any colour vision can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f", "#000000")
N_POINTS = 200
ENDINGS = (".png", ".svg", ".pdf")
#: Shown by the metrics grid, in this order, as far as a run has them.
METRICS = {
    "rollout/ep_rew_mean": "episode return",
    "rollout/ep_len_mean": "episode length",
    "eval/iqm": "evaluation, IQM of returns",
    "train/approx_kl": "approximate KL",
    "train/kl_divergence_loss": "KL of the step",
    "train/clip_fraction": "clip fraction",
    "train/step_length": "step length",
    "train/is_line_search_success": "line search succeeded",
    "train/cg_residual": "conjugate gradient residual",
    "train/explained_variance": "explained variance",
    "train/value_loss": "value loss",
    "train/entropy_loss": "entropy loss (−entropy)",
    "train/std": "std of the actions",
    "train/grad_norm": "gradient norm",
    "train/learning_rate": "learning rate",
    "time/fps": "steps per second",
}


def plot_curves(runs: Sequence[Run], path: Path, *, x: Axis = "steps", source: str = "training") -> list[str]:
    """
    Draw learning curves, a panel for each environment: IQM over seeds and its 95 % bootstrap interval.

    :param runs: of any algorithms, environments and settings; those that differ in their seed alone make one line
    :param path: the picture; its ending chooses the format (png, svg, pdf)
    :param x: ``"steps"`` or ``"time"``
    :param source: ``"training"`` episodes or ``"evaluations"``
    :return: remarks for the reader, such as a seed that ended early or a run that has no curve yet
    :raises ConfigError: if there is nothing to draw, or the ending is unknown
    :raises ImportError: if matplotlib is missing, naming the extra that installs it
    """
    _check_ending(path)
    runs, remarks = with_curves(runs, source)
    groups = grouped(runs)
    n_columns = min(len(groups), 3)
    n_rows = math.ceil(len(groups) / n_columns)
    figure = new_figure(max(6.4, 4.6 * n_columns), 3.9 * n_rows)
    panels = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for axes, (env, members) in zip(panels, groups.items(), strict=False):
        for colour, (label, group) in zip(_colours(len(members)), members.items(), strict=True):
            draw_group(axes, [run.curve(source) for run in group], label, colour, x)
            remarks += _short_ones(group)
        what = "return of evaluations" if source == "evaluations" else "return of training episodes"
        decorate(axes, env, x=x, y_label=what)
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    figure.savefig(path)
    return remarks


def with_curves(runs: Sequence[Run], source: str = "training") -> tuple[list[Run], list[str]]:
    """
    Leave runs out that have no training curve yet, as one that has only just begun.

    :param runs: any
    :param source: ``"training"`` episodes or ``"evaluations"``, which nobody leaves out: they were asked for
    :return: the others, and remarks that name those left out
    :raises ConfigError: if none is left
    """
    if source == "evaluations":
        return list(runs), []
    has_one = [bool(np.isfinite(run.episodes.returns).any()) for run in runs]
    kept = [run for run, has in zip(runs, has_one, strict=True) if has]
    if not kept:
        raise ConfigError("none of these runs has a learning curve: no training episode has ended with a number")
    return kept, [
        f"{run.folder.path} is left out: no training episode has ended with a number"
        for run, has in zip(runs, has_one, strict=True)
        if not has
    ]


def plot_metrics(runs: Sequence[Run], path: Path, *, x: Axis = "steps") -> list[str]:
    """
    Draw a grid of small plots, one for each metric that the runs have: IQM over seeds and its 95 % interval.

    :param runs: as for :func:`plot_curves`
    :param path: the picture; its ending chooses the format (png, svg, pdf)
    :param x: ``"steps"`` or ``"time"``
    :return: remarks for the reader
    :raises ConfigError: if there is nothing to draw, or the ending is unknown
    :raises ImportError: if matplotlib is missing, naming the extra that installs it
    """
    _check_ending(path)
    groups = grouped(runs)
    members = {
        (label if len(groups) == 1 else f"{label}, {env}"): g for env, m in groups.items() for label, g in m.items()
    }
    names = [name for name in METRICS if any(name in run.progress for run in runs)]
    if not names:
        raise ConfigError("none of these runs has metrics in its progress.csv")
    n_columns = min(len(names), 4)
    n_rows = math.ceil(len(names) / n_columns)
    figure = new_figure(3.4 * n_columns, 2.5 * n_rows + 0.4)
    panels = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        for colour, (label, group) in zip(_colours(len(members)), members.items(), strict=True):
            series = [run.progress[name] for run in group if name in run.progress]
            if series:
                draw_group(axes, series, label, colour, x)
        decorate(axes, METRICS[name], x=x, y_label="", legend=False, size=10)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    handles = {line.get_label(): line for axes in panels[: len(names)] for line in axes.get_lines()}
    shown = {label: line for label, line in handles.items() if not str(label).startswith("_")}
    figure.legend(list(shown.values()), [str(s) for s in shown], loc="outside upper left", frameon=False, fontsize=9)
    figure.savefig(path)
    return [remark for group in members.values() for remark in _short_ones(group)]


def draw_group(axes: Axes, curves: Sequence[Series], label: str, colour: str, x: Axis) -> None:
    """
    Draw one line with its band; each seed's own line is thin behind it.

    :param axes: where to
    :param curves: one for each seed
    :param label: for the legend
    :param colour: of the line
    :param x: ``"steps"`` or ``"time"``
    """
    grid, values = on_common_points(curves, x)
    middle, low, high = band_of(values)
    seeds = f"{len(curves)} seeds" if len(curves) > 1 else "1 seed"
    if len(curves) > 1:
        axes.fill_between(grid, low, high, color=colour, alpha=0.2, linewidth=0)
        for row in values:
            axes.plot(grid, row, color=colour, linewidth=0.6, alpha=0.35)
    axes.plot(grid, middle, color=colour, linewidth=2.0, label=f"{label} ({seeds})")


def band_of(values: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """
    IQM over seeds at each point, and its interval.

    :param values: ``[n_seeds, n_points]``
    :return: IQM, lower and upper end, each ``[n_points]``; of a single seed all three are its values
    """
    middle, interval = curve(values)
    return (middle, *(interval or (middle, middle)))


def on_common_points(curves: Sequence[Series], x: Axis) -> tuple[FloatArray, FloatArray]:
    """
    Interpolate curves at points that all of them reach.

    :param curves: one for each seed
    :param x: ``"steps"`` or ``"time"``
    :return: points ``[n]`` and values ``[n_curves, n]``
    :raises ConfigError: if a curve has no such axis
    """
    if any(not np.isfinite(curve.over(x)).all() for curve in curves):
        raise ConfigError("these runs do not say how long they took: --x steps can be drawn")
    start, end = max(curve.over(x)[0] for curve in curves), min(curve.over(x)[-1] for curve in curves)
    grid = np.linspace(min(start, end), end, N_POINTS)
    return grid, np.stack([np.interp(grid, curve.over(x), curve.values) for curve in curves])


def _short_ones(group: Sequence[Run]) -> list[str]:
    longest = max(run.steps for run in group)
    return [
        f"{run.folder.path} ends at {run.steps:,} of {longest:,} steps, and so does the line of its group"
        for run in group
        if run.steps < 0.95 * longest
    ]


def _colours(n: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(n)]


def _check_ending(path: Path) -> None:
    if path.suffix not in ENDINGS:
        raise ConfigError(f"{path} must end in {', '.join(ENDINGS)}: the ending chooses the format of the picture")
