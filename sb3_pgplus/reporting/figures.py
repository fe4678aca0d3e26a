"""Figures as SVG inside a page: their text is text, their colours are the page's, so they follow light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from sb3_pgplus.reporting.learning_curve import BLUE, GREY, decorate, draw_episodes, new_figure
from sb3_pgplus.reporting.runs import Run, Series
from sb3_pgplus.statistics import iqm, iqm_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEXT, ORANGE, GRID = "#1d2430", "#c2571a", "#e3e6ea"
#: matplotlib's colour → the page's.
THEME = {TEXT: "--text", BLUE: "--accent", GREY: "--soft", ORANGE: "--second", GRID: "--line"}
MOST_DOTS = 1000


def svg(draw: Callable[[Axes], object], name: str, size: tuple[float, float]) -> str:
    """
    Draw one figure.

    :param draw: draws into axes
    :param name: what it shows, for those who cannot see it; different for each figure of a page
    :param size: width and height in inches
    :return: an ``<svg>`` element
    :raises ImportError: if matplotlib is missing, naming the extra that installs it
    """
    figure = new_figure(*size)  # raises where matplotlib is missing
    import matplotlib as mpl

    coloured = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9.5} | dict.fromkeys(coloured, TEXT)
    with mpl.rc_context(settings):
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return _embedded(buffer.getvalue(), name)


def _embedded(text: str, name: str) -> str:
    """What a page needs of matplotlib's file."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", text)  # the same in every figure; nothing refers to them
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{name}"', text, count=1)
    for colour, variable in THEME.items():
        text = text.replace(colour, f"var({variable})")
    return text


def learning_curve(run: Run) -> str:
    """
    :param run: with training episodes or evaluations
    :return: its learning curve with the evaluations, an ``<svg>``
    """

    def draw(axes: Axes) -> None:
        if len(run.episodes):
            draw_episodes(axes, run.episodes, MOST_DOTS)
        if run.evaluations is not None:
            rows, steps = run.evaluations.returns, run.evaluations.steps
            middle, ends = np.array([iqm(row) for row in rows]), np.array([iqm_interval(row) for row in rows]).T
            axes.errorbar(
                steps,
                middle,
                yerr=np.abs(ends - middle),
                color=ORANGE,
                marker="o",
                markersize=4,
                linewidth=1.6,
                capsize=3,
                label="evaluation: IQM, 95 % interval",
            )
        decorate(axes)

    return svg(draw, "learning curve", (5.8, 3.3))


def metric(series: Series, name: str) -> str:
    """
    :param series: to draw
    :param name: of the metric
    :return: a small ``<svg>``
    """

    def draw(axes: Axes) -> None:
        axes.plot(series.steps, series.values, color=BLUE, linewidth=1.6)
        decorate(axes, y_label="", legend=False)
        axes.set_xlabel("")
        axes.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=False)

    return svg(draw, name, (3.8, 1.9))
