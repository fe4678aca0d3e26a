"""One HTML page about one run, with everything inside: it opens anywhere, without a network."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sb3_pgplus.configs import IGNORED_KEYS, algorithm_class
from sb3_pgplus.construction import PLUMBING
from sb3_pgplus.reporting import figures
from sb3_pgplus.reporting.curve_verdicts import judge_curve, judge_evaluations
from sb3_pgplus.reporting.diagnostics import (
    GOOD,
    NOTE,
    PROBLEM,
    SEVERITY,
    WARNING,
    Check,
    Verdict,
    verdicts,
)
from sb3_pgplus.reporting.html_page import document, table
from sb3_pgplus.reporting.runs import Run
from sb3_pgplus.statistics import iqm, iqm_interval

MARKS = {GOOD: "✔ good", NOTE: "· note", WARNING: "! look", PROBLEM: "✘ problem"}
LARGEST_VIDEO = 20 * 2**20
STATUS = {
    "finished": "finished",
    "interrupted": "interrupted: what was learned until then is saved",
    "failed": "failed, see the error below",
    "unfinished": "still training, or ended without saving a model",
}
PHASE_COLOURS = ("var(--accent)", "var(--second)", "var(--good)", "var(--line)")


def page(run: Run) -> tuple[str, list[str]]:
    """
    Write the page.

    :param run: finished, interrupted, failed or still training
    :return: HTML, and what could not be put into it, in words
    :raises ImportError: if matplotlib is missing, naming the extra that installs it
    """
    problems: list[str] = []
    judged = {check.title: (check, verdict) for check, verdict in verdicts(run)}
    curve_verdict = judge_curve(run.episodes.returns, run.episodes.steps)
    evaluation_verdict = judge_evaluations(run.evaluations) if run.evaluations is not None else None
    found = [("Learning curve", curve_verdict), *((title, verdict) for title, (_, verdict) in judged.items())]
    if evaluation_verdict is not None:
        found.insert(1, ("Evaluation", evaluation_verdict))
    cards = [
        _card(title, _metric(run, check), verdict, f"{check.statistic.words} · {check.source}")
        for title, (check, verdict) in judged.items()
    ]
    title = f"{run.algorithm} on {run.settings['env']}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _summary(run),
        _overview(found),
        _error(run),
        "<h2>Learning curve</h2>",
        _curve(run, curve_verdict),
        "<h2>Evaluation</h2>",
        _evaluation(run),
        f"<p>{html.escape(evaluation_verdict.text)}</p>" if evaluation_verdict is not None else "",
        "<h2>Diagnostics</h2>",
        f'<div class="cards">{"".join(cards)}</div>' if cards else "<p>No update has been logged.</p>",
        "<h2>Time</h2>",
        _time(run),
        _video(run, problems),
        "<h2>Hyperparameters that are not the defaults</h2>",
        _hyperparameters(run),
        _versions(run),
    ]
    return document(title, parts), problems


# --- top --------------------------------------------------------------------------------------------------------------


def _summary(run: Run) -> str:
    settings = run.settings
    wanted = int(settings.get("n_timesteps", 0))
    facts = [
        f"{run.steps:,} of {wanted:,} steps",
        f"seed {settings.get('seed')}",
        f"{settings.get('n_envs')} environment{'s' * (settings.get('n_envs') != 1)}",
        STATUS[run.status],
    ]
    return f'<p class="soft">{html.escape(" · ".join(facts))}<br><code>{html.escape(str(run.folder.path))}</code></p>'


def _overview(found: list[tuple[str, Verdict]]) -> str:
    """What to look at first, worst first."""
    notable = [(title, verdict) for level in SEVERITY[:2] for title, verdict in found if verdict.level == level]
    if not notable:
        return f'<div class="card good"><p><span class="mark">{MARKS[GOOD]}</span> Nothing stands out.</p></div>'
    lines = "".join(
        f'<p class="{verdict.level}"><span class="mark">{MARKS[verdict.level]}</span> '
        f"<b>{html.escape(title)}</b>: {html.escape(verdict.text)}</p>"
        for title, verdict in notable
    )
    return f'<div class="card {notable[0][1].level}">{lines}</div>'


def _error(run: Run) -> str:
    return "" if run.error is None else f"<h2>Error</h2><pre>{html.escape(run.error)}</pre>"


def _card(title: str, figure: str, verdict: Verdict, source: str = "") -> str:
    return (
        f'<div class="card {verdict.level}"><h3>{html.escape(title)}</h3>{figure}'
        f'<p><span class="mark">{MARKS[verdict.level]}</span> {html.escape(verdict.text)}</p>'
        + (f"<small>{html.escape(source)}</small>" if source else "")
        + "</div>"
    )


def _metric(run: Run, check: Check) -> str:
    series = run.progress[check.metric]
    if check.metric == "train/entropy_loss":
        series = replace(series, values=-series.values)
    if np.isnan(series.values).all():
        return "<p>no number</p>"
    if np.ptp(series.values) == 0:
        return f"<p>{series.values[0]:g} all the time</p>"
    return figures.metric(series, check.title)


# --- curve and evaluation ---------------------------------------------------------------------------------------------


def _curve(run: Run, verdict: Verdict) -> str:
    drawn = figures.learning_curve(run) if len(run.episodes) or run.evaluations is not None else ""
    return f'<div class="curve">{_card("Return of the training episodes", drawn, verdict)}</div>'


def _evaluation(run: Run) -> str:
    rows = []
    if run.evaluations is not None:
        means = run.evaluations.returns.mean(axis=1)
        for name, index in (("best while training", int(np.argmax(means))), ("last while training", -1)):
            at = f"{name}, step {int(run.evaluations.steps[index]):,}"
            rows.append(_evaluation_row(at, run.evaluations.returns[index], run.evaluations.lengths[index]))
    if run.final is not None:
        actions = "deterministic" if run.final.get("deterministic") else "sampled actions"
        rows.append(_evaluation_row(f"trained model, {actions}", run.final["returns"], run.final["lengths"]))
    if not rows:
        return "<p>There was none: <code>sb3-pgplus train --eval-freq 10000</code> makes one every 10,000 steps.</p>"
    head = ("evaluation", "episodes", "mean ± std", "IQM", "95 % interval of the IQM", "min", "max", "mean length")
    return table(head, rows)


def _evaluation_row(name: str, returns: Any, lengths: Any) -> tuple[str, ...]:
    low, high = iqm_interval(returns)
    return (
        name,
        str(len(returns)),
        f"{np.mean(returns):,.2f} ± {np.std(returns):,.2f}",
        f"{iqm(returns):,.2f}",
        f"{low:,.2f} to {high:,.2f}",
        f"{np.min(returns):,.2f}",
        f"{np.max(returns):,.2f}",
        f"{np.mean(lengths):,.1f}",
    )


# --- time -------------------------------------------------------------------------------------------------------------


def phases(run: Run) -> dict[str, float]:
    """
    Where the time of a training went, as far as its metrics tell.

    Rows of ``progress.csv`` stand for all iterations, also where only every tenth was logged.

    :param run: any
    :return: phase → seconds; empty if there are no metrics, or the settings do not say how long a rollout is
    """
    progress, settings = run.progress, run.settings
    if "time/iterations" not in progress or "time/rollout_fps" not in progress:
        return {}
    if settings.get("n_steps") is None or settings.get("n_envs") is None:
        return {}
    n_iterations = float(progress["time/iterations"].values[-1])
    rollout = float(np.mean(1.0 / np.maximum(progress["time/rollout_fps"].values, 1.0)))
    rollouts = rollout * float(settings["n_steps"]) * float(settings["n_envs"]) * n_iterations
    evaluations = float(progress["eval/seconds"].values.sum()) if "eval/seconds" in progress else 0.0
    updates = float(progress["time/update_seconds"].values.mean()) * n_iterations if _has_updates(run) else 0.0
    elapsed = float(np.nanmax([*run.episodes.seconds[-1:], progress["time/iterations"].seconds[-1]]))
    found = {"environments and policy": max(rollouts - evaluations, 0.0), "updates": updates}
    if evaluations:
        found["evaluations"] = evaluations
    return found | {"logging and the rest": max(elapsed - sum(found.values()), 0.0)}


def _has_updates(run: Run) -> bool:
    return "time/update_seconds" in run.progress


def _time(run: Run) -> str:
    seconds = phases(run)
    total = sum(seconds.values())
    if not total:
        return "<p>Nothing was logged.</p>"
    pieces = "".join(
        f'<span style="width:{100 * s / total:.2f}%;background:{colour}" title="{html.escape(name)}"></span>'
        for (name, s), colour in zip(seconds.items(), PHASE_COLOURS, strict=False)
    )
    rows = [(name, f"{s:,.1f} s", f"{s / total:.0%}") for name, s in seconds.items()]
    return f'<div class="bar">{pieces}</div>{table(("phase", "time", "share"), rows)}<p>{_time_verdict(seconds)}</p>'


def _time_verdict(seconds: Mapping[str, float]) -> str:
    largest = max(seconds, key=lambda name: seconds[name])
    advice = {
        "environments and policy": "More environments side by side or another <code>--backend</code> would save most; ",
        "updates": "Larger minibatches, fewer epochs or <code>compile=True</code> would save most; ",
        "evaluations": "Fewer or shorter evaluations would save most; ",
    }
    return advice.get(largest, "") + "<code>sb3-pgplus profile</code> measures the phases one by one."


# --- video, settings, versions ----------------------------------------------------------------------------------------


def _video(run: Run, problems: list[str]) -> str:
    video = newest_video(run)
    if video is None:
        return ""
    heading = f"<h2>Video</h2><p><code>{html.escape(video.name)}</code></p>"
    if video.stat().st_size > LARGEST_VIDEO:
        problems.append(f"{video} is too large to be put into the page")
        return f"{heading}<p>Too large for this page: <code>{html.escape(str(video))}</code></p>"
    data = base64.b64encode(video.read_bytes()).decode()
    return f'{heading}<video controls muted playsinline src="data:video/mp4;base64,{data}"></video>'


def newest_video(run: Run) -> Path | None:
    """
    The newest of a run's videos.

    :param run: any
    """
    videos = [*run.folder.videos.glob("*.mp4"), *run.folder.path.glob("*.mp4")]
    shown = [video for video in videos if not video.name.startswith(".")]
    return max(shown, key=lambda video: video.stat().st_mtime, default=None)


def changed_hyperparameters(run: Run) -> dict[str, tuple[Any, Any]]:
    """
    Compare a run's settings with the constructor's defaults of today.

    :param run: any
    :return: name → (value, default) of what differs
    """
    defaults = PLUMBING | algorithm_class(str(run.settings["algo"])).hparams_class.defaults()
    given = {name: run.settings[name] for name in defaults if name in run.settings and name != "seed"}
    return {name: (value, defaults[name]) for name, value in given.items() if value != defaults[name]}


def _hyperparameters(run: Run) -> str:
    changed = changed_hyperparameters(run)
    rows = [(name, value, default) for name, (value, default) in changed.items()]
    diff = table(("name", "this run", "default"), rows) if rows else "<p>None: all are the defaults.</p>"
    everything = table(("name", "value"), [(k, v) for k, v in run.settings.items() if k not in IGNORED_KEYS])
    return f"{diff}<details><summary>All settings</summary>{everything}</details>"


def _versions(run: Run) -> str:
    made_with = run.settings.get("made_with") or {}
    text = ", ".join(f"{name} {version}" for name, version in made_with.items())
    return f'<p class="soft">Made with {html.escape(text)}</p>' if text else ""
