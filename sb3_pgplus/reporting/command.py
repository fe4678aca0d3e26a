"""What ``sb3-pgplus plot`` and ``sb3-pgplus report`` do, as functions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from sb3_pgplus.configs import ConfigError
from sb3_pgplus.files import write_atomically
from sb3_pgplus.reporting.comparison import plot_curves, plot_metrics, with_curves
from sb3_pgplus.reporting.report import page
from sb3_pgplus.reporting.runs import Axis, find_runs, grouped, read_run


def draw(runs: Sequence[Path], out: Path | None, *, x: str, evaluations: bool, metrics: bool) -> list[str]:
    """
    Draw runs into a picture.

    :param runs: run folders, or folders that hold some
    :param out: the picture, by default ``curves.png`` or ``metrics.png`` here
    :param x: ``"steps"`` or ``"time"``
    :param evaluations: draw evaluations instead of training episodes
    :param metrics: draw all metrics instead of the learning curve
    :return: what to tell the user
    :raises ConfigError: if there is nothing to draw, or a package is missing
    """
    if x not in ("steps", "time"):
        raise ConfigError(f"--x must be steps or time, got {x!r}")
    if evaluations and metrics:
        raise ConfigError(
            "--evaluations chooses the learning curve and --metrics draws another thing: give one of them"
        )
    axis = cast(Axis, x)
    found = find_runs(runs)
    out = out or Path("metrics.png" if metrics else "curves.png")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if metrics:
            remarks = plot_metrics(found, out, x=axis)
        else:
            source = "evaluations" if evaluations else "training"
            remarks = plot_curves(found, out, x=axis, source=source)
            found, _ = with_curves(found, source)
    except ImportError as error:
        raise ConfigError(str(error)) from error
    groups = [
        f"{env}: {label}, {len(members)} seed{'s' * (len(members) > 1)}"
        for env, group in grouped(found).items()
        for label, members in group.items()
    ]
    return [*groups, *remarks, f"Picture: {out}"]


def write_report(run: Path, out: Path | None) -> list[str]:
    """
    Write the page about a run.

    :param run: its folder
    :param out: the page, by default ``report.html`` in the folder
    :return: what to tell the user
    :raises ConfigError: if it is no run folder, or a package is missing
    """
    found = read_run(run)
    try:
        text, problems = page(found)
    except ImportError as error:
        raise ConfigError(str(error)) from error
    target = out or found.folder.report
    write_atomically(target, text.encode())
    return [*problems, f"Report: {target}"]
