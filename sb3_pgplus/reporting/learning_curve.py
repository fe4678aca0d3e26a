"""The learning curve: every training episode's return as a dot, their running mean and spread as a line and a band."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FloatArray = npt.NDArray[np.float64]
MAX_DOTS = 5000
BLUE, GREY = "#1f6fb2", "#8a8f98"
TIME_UNITS = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
EPISODE_COLUMNS = ("step", "return", "length", "seconds")


@dataclass
class Episodes:
    """Finished training episodes, in the order they ended."""

    steps: list[int] = field(default_factory=list)
    """Environment steps taken in the whole run when the episode ended."""
    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list, compare=False)
    """Since the training began; empty where nobody measured them."""

    def __len__(self) -> int:
        return len(self.steps)


def read_episodes(path: Path) -> Episodes:
    """
    Read a run's ``episodes.csv``; a last line that was torn by a crash is left out.

    :param path: the file
    :raises ValueError: if another line is damaged
    """
    episodes = Episodes()
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(line for line in file if line.endswith("\n"))
        for row in reader:
            if None in row.values():
                raise ValueError(f"line {reader.line_num} of {path.name} is too short")
            episodes.steps.append(int(row["step"]))
            episodes.returns.append(float(row["return"]))
            episodes.lengths.append(int(row["length"]))
            episodes.seconds.append(float(row["seconds"]))
    return episodes


def read_progress(path: Path) -> tuple[FloatArray, FloatArray]:
    """
    Read the mean training return from SB3's ``progress.csv``.

    :param path: the file
    :return: environment steps and SB3's mean over the last 100 episodes, rows without one left out
    :raises ValueError: if the file has no such columns
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ("time/total_timesteps", "rollout/ep_rew_mean")
    complete = [[float(row[name]) for name in columns] for row in rows if all(row.get(name) for name in columns)]
    if not complete:
        raise ValueError(f"{path} holds no {columns[1]} against {columns[0]}: has an episode ended?")
    steps, means = np.array(complete, dtype=np.float64).T
    return steps, means


def window_of(n_episodes: int) -> int:
    """
    How many episodes a learning curve averages over.

    :param n_episodes: of the run
    """
    return int(np.clip(n_episodes // 20, 5, 100))


def smooth(values: npt.ArrayLike, window: int) -> tuple[FloatArray, FloatArray]:
    """
    Mean and standard deviation of the last ``window`` values, of fewer at the beginning; never of later ones.
    NaN and infinity are left out: they would spread over all later sums.

    ``m_i = 1/w Σ_{k=i−w+1}^{i} x_k``,  ``s_i² = 1/w Σ_{k=i−w+1}^{i} x_k² − m_i²``, ``w = min(window, i+1)``

    :param values: ``[n]``
    :param window: number of values to average over
    :return: means ``[n]`` and standard deviations ``[n]``; NaN where none of the values is finite
    """
    array = np.asarray(values, dtype=np.float64)
    # The sums of squares cancel badly when the values are far from 0 (Pendulum's returns), so centre them first.
    finite = np.isfinite(array)
    centre = array[finite].mean() if finite.any() else 0.0
    centred = np.where(finite, array, centre) - centre
    sums = np.concatenate([[0.0], np.cumsum(centred)])
    squares = np.concatenate([[0.0], np.cumsum(centred**2)])
    counts = np.concatenate([[0], np.cumsum(finite)])
    ends = np.arange(1, array.size + 1)
    starts = np.maximum(ends - window, 0)
    count = counts[ends] - counts[starts]
    count = np.where(count, count, np.nan)
    mean = (sums[ends] - sums[starts]) / count
    variance = (squares[ends] - squares[starts]) / count - mean**2
    return mean + centre, np.sqrt(np.maximum(variance, 0.0))


def plot_learning_curve(
    source: Episodes | Path | str, path: Path | str, *, title: str = "Learning curve", subtitle: str = ""
) -> Path:
    """
    Draw a learning curve into a picture file.

    :param source: finished episodes, a run folder, its ``episodes.csv``, or SB3's ``progress.csv`` (its mean alone)
    :param path: the picture; its ending chooses the format (png, pdf, svg)
    :param title: bold, above the picture
    :param subtitle: below the title
    :return: ``path``
    :raises ImportError: if matplotlib is missing, naming the extra that installs it
    :raises ValueError: if there is nothing to draw
    """
    figure = new_figure(8.0, 4.5)
    source = _as_episodes(Path(source)) if isinstance(source, Path | str) else source
    axes = figure.add_subplot()
    if isinstance(source, Episodes):
        draw_episodes(axes, source)
    else:
        axes.plot(*read_progress(source), color=BLUE, linewidth=2.0, label="mean of the last 100 episodes")
    decorate(axes, title, subtitle)
    figure.savefig(path)
    return Path(path)


def new_figure(width: float, height: float) -> Figure:
    """
    An empty figure.

    :param width: in inches
    :param height: in inches
    :raises ImportError: if matplotlib is missing, naming the extra that installs it
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('learning curves need matplotlib: pip install "sb3_pgplus[report]"') from error
    # A bare Figure draws with Agg: no pyplot, no window, no state shared with the user's own plots.
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _as_episodes(path: Path) -> Episodes | Path:
    path = path / "episodes.csv" if path.is_dir() else path
    with path.open(encoding="utf-8") as file:
        header = file.readline().strip().split(",")
    return read_episodes(path) if header[:2] == list(EPISODE_COLUMNS[:2]) else path


def draw_episodes(axes: Axes, episodes: Episodes, max_dots: int = MAX_DOTS) -> None:
    """
    Draw every episode as a dot, running mean and spread as a line and a band.

    :param axes: where to
    :param episodes: at least one
    :param max_dots: of more episodes, so many are shown, and the line has so many points
    :raises ValueError: if there is none
    """
    if not len(episodes):
        raise ValueError("no episode has ended, so there is no learning curve to draw")
    steps = np.asarray(episodes.steps, dtype=np.float64)
    returns = np.asarray(episodes.returns, dtype=np.float64)
    window = window_of(len(episodes))
    mean, std = smooth(returns, window)
    shown = np.unique(np.linspace(0, len(episodes) - 1, min(len(episodes), max_dots)).astype(int))
    x, mean, std = steps[shown], mean[shown], std[shown]
    axes.plot(x, returns[shown], ".", color=GREY, markersize=4, alpha=0.55, markeredgewidth=0, label="one episode")
    low, high = mean - std, mean + std
    axes.fill_between(x, low, high, color=BLUE, alpha=0.18, linewidth=0, label="± 1 standard deviation")
    axes.plot(x, mean, color=BLUE, linewidth=2.0, label=f"mean of the last {window} episodes")


def decorate(
    axes: Axes,
    title: str = "",
    subtitle: str = "",
    *,
    x: str = "steps",
    y_label: str = "episode return (sum of rewards)",
    legend: bool = True,
    size: float = 13,
) -> None:
    """
    Give axes the package's look.

    :param axes: with everything drawn
    :param title: bold, above them
    :param subtitle: below the title
    :param x: ``"steps"`` or ``"time"``
    :param y_label: what is shown
    :param legend: show the labels
    :param size: of the title
    """
    axes.set_title(title, loc="left", fontsize=size, fontweight="bold", pad=22 if subtitle else 10)
    if subtitle:
        axes.text(0.0, 1.03, subtitle, transform=axes.transAxes, fontsize=9, color="#5a5f66", va="bottom")
    _label_x(axes, x)
    axes.set_ylabel(y_label)
    axes.grid(visible=True, color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    if legend:
        axes.legend(frameon=False, fontsize=8, loc="best", markerscale=2)


def _label_x(axes: Axes, x: str) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

    if x == "steps":
        axes.set_xlabel("environment steps")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        return
    longest = axes.get_xlim()[1]
    unit, name = next((unit, name) for unit, name in TIME_UNITS if longest >= 2 * unit or unit == 1)
    axes.set_xlabel(f"{name} of training")
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 1.2, 1.5, 1.8, 3, 6, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds / unit:g}"))
