"""The numbers below the progress bar: newest value, verdict as its colour, course of the training as a small curve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean

import numpy as np
from rich.table import Table
from rich.text import Text

from sb3_pgplus.reporting.diagnostics import GOOD, NOTE, PROBLEM, WARNING, judge_number

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 12
"""Characters of a small curve."""
CELL = 38
"""Characters of a name, its number and its curve."""
STYLES = {GOOD: "green", NOTE: "default", WARNING: "yellow", PROBLEM: "bold red"}
#: Shown as far as the algorithm logs them, in this order.
NAMES = {
    "return": "return",
    "length": "length",
    "evaluation": "evaluation",
    "train/approx_kl": "KL",
    "train/kl_divergence_loss": "KL",
    "train/clip_fraction": "clip fraction",
    "train/is_line_search_success": "line search",
    "train/entropy_loss": "entropy",
    "train/std": "action std",
    "train/explained_variance": "expl. variance",
    "train/grad_norm": "gradient norm",
}


class Trend:
    """The course of a number in constant memory: means of equally many values each, more values the longer it gets."""

    def __init__(self) -> None:
        self.newest = math.nan
        self._means: list[float] = []
        self._pending: list[float] = []
        self._size = 1

    def add(self, value: float) -> None:
        """
        :param value: the newest one
        """
        self.newest = value
        self._pending.append(value)
        if len(self._pending) < self._size:
            return
        self._means.append(fmean(self._pending))
        self._pending = []
        if len(self._means) == 2 * WIDTH:
            self._means = [fmean(pair) for pair in zip(self._means[::2], self._means[1::2], strict=True)]
            self._size *= 2

    def sparkline(self) -> str:
        """The course in at most ``WIDTH`` characters, lowest to highest value."""
        values = np.asarray(self._means)
        values = values[np.isfinite(values)]
        if len(values) > WIDTH:
            values = np.array([part.mean() for part in np.array_split(values, WIDTH)])
        if len(values) < 2 or np.ptp(values) == 0:
            return ""
        heights = (values - values.min()) / np.ptp(values) * (len(BARS) - 1)
        return "".join(BARS[round(height)] for height in heights)


class LiveTable:
    """Trends of the important numbers."""

    def __init__(self) -> None:
        self._trends: dict[str, Trend] = {}

    def add(self, values: Mapping[str, float | None]) -> None:
        """
        :param values: keys of ``NAMES`` → newest values; others, and what is missing, are left out
        """
        for name, value in values.items():
            if name in NAMES and value is not None:
                shown = -float(value) if name == "train/entropy_loss" else float(value)
                self._trends.setdefault(name, Trend()).add(shown)

    def shown(self) -> dict[str, Trend]:
        """Key → course of what there is, in the order of ``NAMES``."""
        return {name: self._trends[name] for name in NAMES if name in self._trends}

    def line(self) -> str:
        """The newest numbers of the updates in one line, for a log file."""
        parts = [f"{NAMES[name]} {number(trend.newest)}" for name, trend in self.shown().items() if "/" in name]
        return "".join(f"  {part}" for part in parts)

    def table(self, width: int, with_curves: bool = True) -> Table:
        """
        :param width: of the terminal, in characters
        :param with_curves: show the small curves
        """
        n_columns = max(1, min(4, width // CELL))
        table = Table.grid(padding=(0, 1), expand=False)
        for _ in range(n_columns):
            table.add_column(style="dim", no_wrap=True, width=14)
            table.add_column(justify="right", no_wrap=True, width=9)
            table.add_column(style="cyan", no_wrap=True, width=WIDTH)
        cells = [self._cell(name, trend, with_curves) for name, trend in self.shown().items()]
        for start in range(0, len(cells), n_columns):
            table.add_row(*(part for cell in cells[start : start + n_columns] for part in cell))
        return table

    @staticmethod
    def _cell(name: str, trend: Trend, with_curves: bool) -> tuple[str, Text, str]:
        verdict = judge_number(name, trend.newest)
        style = "default" if verdict is None else STYLES[verdict.level]
        return NAMES[name], Text(number(trend.newest), style=style), trend.sparkline() if with_curves else ""


def number(value: float) -> str:
    """
    :param value: any
    :return: three or four digits of it
    """
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"
