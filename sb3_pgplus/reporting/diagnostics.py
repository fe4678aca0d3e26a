"""
What an expert reads from a training's metrics, as one table: a number, the ranges it may be in, what each range means.

The ranges are rules of thumb with their sources named, not laws: a run with a warning may be fine, and a verdict says
what to try first where it is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sb3_pgplus.reporting.runs import Run
from sb3_pgplus.schedules import as_schedule

GOOD, NOTE, WARNING, PROBLEM = "good", "note", "warning", "problem"
SEVERITY = (PROBLEM, WARNING, NOTE, GOOD)
INF = math.inf
ENOUGH_ROWS = 3

SCHULMAN = "Schulman, Nuts and Bolts of Deep RL Experimentation, 2017"
DETAILS = "Huang et al., The 37 Implementation Details of PPO, 2022"
SPINNING_UP = "Spinning Up, PPO: target_kl 0.01, stop at 1.5 times that"
WHAT_MATTERS = "Andrychowicz et al., What Matters in On-Policy RL, 2021"
SB3_DOCS = "Stable-Baselines3's documentation, Logger"
OURS = "rule of thumb"
TRPO_PAPER = f"Schulman et al., Trust Region Policy Optimization, 2015; the numbers: {OURS}"


@dataclass(frozen=True)
class Band:
    """Values up to ``up_to`` that no earlier band has."""

    up_to: float
    level: str
    text: str
    """Format string of ``value``."""


@dataclass(frozen=True)
class Verdict:
    """A judgement in plain words."""

    level: str
    text: str


@dataclass(frozen=True)
class Statistic:
    """The number that a metric is judged by."""

    words: str
    of: Callable[[Run, str], float | None]
    """Run, metric ↦ the number; nothing where there is nothing to compare with."""


@dataclass(frozen=True)
class Check:
    """One row of the table."""

    metric: str
    title: str
    statistic: Statistic
    bands: tuple[Band, ...]
    source: str
    if_nan: Verdict | None = None
    """For a metric that is NaN by design somewhere: what it means there."""

    def judge(self, value: float) -> Verdict:
        """
        :param value: of the statistic
        """
        band = next((band for band in self.bands if value <= band.up_to), None)
        if band is None:  # NaN
            return self.if_nan or Verdict(PROBLEM, f"{self.title} is {value}: training has broken down.")
        return Verdict(band.level, band.text.format(value=value))

    def verdict(self, run: Run) -> Verdict:
        """
        :param run: that has the metric
        """
        n_rows = len(run.progress[self.metric])
        if n_rows < ENOUGH_ROWS:
            return Verdict(NOTE, f"Too short to judge: {n_rows} update{'s' * (n_rows != 1)} logged.")
        value = self.statistic.of(run, self.metric)
        return Verdict(NOTE, "Nothing to compare it with.") if value is None else self.judge(value)


# --- statistics -------------------------------------------------------------------------------------------------------


def _typical(run: Run, metric: str) -> float:
    return float(np.median(run.progress[metric].values))


def _late(run: Run, metric: str) -> float:
    values = run.progress[metric].values
    values = values[~np.isnan(values)]  # the explained variance has none where the returns do not vary
    return float(np.median(values[-max(1, len(values) // 4) :])) if len(values) else math.nan


def _average(run: Run, metric: str) -> float:
    return float(np.mean(run.progress[metric].values))


def _largest(run: Run, metric: str) -> float:
    return float(np.max(run.progress[metric].values))


def _end_to_start(run: Run, metric: str) -> float | None:
    values = run.progress[metric].values
    n = max(1, len(values) // 10)
    start, end = float(np.median(values[:n])), float(np.median(values[-n:]))
    return end / start if start else None


def _as_expected(run: Run, metric: str) -> float | None:
    """What an update achieved of what its linear model promised; failed ones, which promise nothing, are left out."""
    if f"{metric}_expected" not in run.progress:
        return None
    got, promised = run.progress[metric].values, run.progress[f"{metric}_expected"].values
    n = min(len(got), len(promised))
    ratios = got[-n:][promised[-n:] > 0] / promised[-n:][promised[-n:] > 0]
    return float(np.median(ratios)) if len(ratios) else None


TYPICAL = Statistic("median", _typical)
LATE = Statistic("median of the last quarter", _late)
AVERAGE = Statistic("mean", _average)
LARGEST = Statistic("maximum", _largest)
END_TO_START = Statistic("last tenth / first tenth", _end_to_start)
AS_EXPECTED = Statistic("median of improvement / expected improvement", _as_expected)


def relative_to(name: str, metric: str | None = None) -> Statistic:
    """
    :param name: of a hyperparameter; a schedule counts with its first value
    :param metric: another column to look at than the one that is judged
    :return: the statistic: median over the training, in units of the hyperparameter
    """

    def of(run: Run, judged: str) -> float | None:
        limit = start_value(run.settings, name)
        return None if not limit or (metric or judged) not in run.progress else _typical(run, metric or judged) / limit

    return Statistic(f"median{f' of {metric}' if metric else ''} / {name}", of)


def start_value(settings: Mapping[str, Any], name: str) -> float | None:
    """
    :param settings: of a run
    :param name: of a hyperparameter
    :return: its value at the start of training, nothing where it is off or unknown
    """
    value = settings.get(name)
    try:
        return None if value is None else float(as_schedule(name, value)(1.0))
    except (TypeError, ValueError):
        return None


# --- the table --------------------------------------------------------------------------------------------------------

CHECKS: tuple[Check, ...] = (
    Check(
        "train/approx_kl",
        "Approximate KL of an update",
        TYPICAL,
        (
            Band(0.0005, NOTE, "KL {value:.2g}: the policy hardly moves; raise the learning rate or n_epochs."),
            Band(0.02, GOOD, "KL {value:.2g}: steps of a healthy size."),
            Band(0.05, WARNING, "KL {value:.2g}: large steps; if the return is unsteady, set target_kl=0.02."),
            Band(INF, PROBLEM, "KL {value:.2g}: steps too large; lower the learning rate or n_epochs."),
        ),
        f"{DETAILS} (usually below 0.02); {SPINNING_UP}",
    ),
    Check(
        "train/approx_kl_max",
        "Largest KL of a minibatch",
        LARGEST,
        (
            Band(0.1, GOOD, "No spikes: at most {value:.2g}."),
            Band(0.5, WARNING, "Spikes up to {value:.2g}: if the return falls there, set target_kl=0.02."),
            Band(INF, PROBLEM, "Spikes up to {value:.2g}: single updates throw the policy away; set target_kl=0.02."),
        ),
        f"{SCHULMAN} (spikes of the KL cost performance); the numbers: {OURS}",
    ),
    Check(
        "train/clip_fraction",
        "Clip fraction",
        TYPICAL,
        (
            Band(0.01, NOTE, "Clip fraction {value:.2g}: the clip has nothing to do; larger steps are possible."),
            Band(0.3, GOOD, "Clip fraction {value:.2g}: most samples count."),
            Band(0.5, WARNING, "Clip fraction {value:.2g}: rather large steps; fewer epochs lose little."),
            Band(INF, PROBLEM, "Clip fraction {value:.2g}: steps too large; lower the learning rate or n_epochs."),
        ),
        OURS,
    ),
    Check(
        "train/kl_divergence_loss",
        "KL of the step, against target_kl",
        relative_to("target_kl"),
        (
            Band(
                0.3,
                NOTE,
                "Steps use {value:.0%} of the trust region: a schedule or a limit keeps them short.",
            ),
            Band(1.0001, GOOD, "Steps use {value:.0%} of the trust region."),
            Band(INF, PROBLEM, "Steps are {value:.1f} times the trust region: switch line_search on, or damp more."),
        ),
        TRPO_PAPER,
    ),
    Check(
        "train/is_line_search_success",
        "Line search",
        AVERAGE,
        (
            Band(0.5, PROBLEM, "Only {value:.0%} of the steps are accepted: raise cg_damping, n_steps or n_envs."),
            Band(0.9, WARNING, "{value:.0%} of the steps are accepted: more samples per update would help."),
            Band(INF, GOOD, "{value:.0%} of the steps are accepted."),
        ),
        TRPO_PAPER,
    ),
    Check(
        "train/line_search_steps",
        "Candidates of the line search",
        AVERAGE,
        (
            Band(3, GOOD, "{value:.1f} candidates on average: the full step nearly always fits."),
            Band(6, NOTE, "{value:.1f} candidates on average: full steps are somewhat too long."),
            Band(INF, WARNING, "{value:.1f} candidates on average: full steps are far too long; raise cg_damping."),
        ),
        OURS,
    ),
    Check(
        "train/cg_residual",
        "Residual of conjugate gradient",
        relative_to("cg_max_steps", "train/cg_steps"),
        (
            Band(0.999, GOOD, "Solved to cg_tol with {value:.0%} of the allowed steps."),
            Band(INF, WARNING, "Conjugate gradient ends at cg_max_steps, unsolved: raise cg_max_steps or cg_damping."),
        ),
        TRPO_PAPER,
    ),
    Check(
        "train/step_length",
        "Length of the step",
        END_TO_START,
        (
            Band(0.05, WARNING, "Steps have shrunk to {value:.1%} of the first ones: the policy is nearly fixed."),
            Band(INF, GOOD, "Steps are {value:.2g} times as long as the first ones."),
        ),
        OURS,
    ),
    Check(
        "train/surrogate_improvement",
        "Improvement of the surrogate",
        AS_EXPECTED,
        (
            Band(0.25, WARNING, "{value:.0%} of what the gradient promised: a smaller target_kl would fit better."),
            Band(INF, GOOD, "{value:.0%} of what the gradient promised."),
        ),
        TRPO_PAPER,
    ),
    Check(
        "train/explained_variance",
        "Explained variance of the critic",
        LATE,
        (
            Band(0.0, PROBLEM, "{value:.2f}: the critic is worse than a constant; train it longer, normalise rewards."),
            Band(0.3, WARNING, "{value:.2f}: the critic knows little (harmless if all returns are alike)."),
            Band(INF, GOOD, "{value:.2f}: the critic predicts the returns."),
        ),
        f"{SB3_DOCS} (0: as good as nothing); {SCHULMAN}",
        if_nan=Verdict(NOTE, "The returns do not vary, so there is nothing to explain."),
    ),
    Check(
        "train/entropy_loss",
        "Entropy of the policy",
        END_TO_START,
        (
            Band(0.05, WARNING, "Down to {value:.1%}: nearly deterministic; if the return is poor, raise ent_coef."),
            Band(0.97, GOOD, "Down to {value:.0%} of its start: the policy makes up its mind."),
            Band(INF, WARNING, "Still {value:.0%} of its start: nothing preferred yet, or ent_coef is too high."),
        ),
        f"{SCHULMAN} (it should neither collapse nor stay)",
    ),
    Check(
        "train/std",
        "Standard deviation of the actions",
        END_TO_START,
        (
            Band(0.1, WARNING, "Down to {value:.1%} of its start: hardly any exploration is left."),
            Band(1.1, GOOD, "At {value:.0%} of its start."),
            Band(2, WARNING, "Grown to {value:.0%} of its start: little signal, or ent_coef is too high."),
            Band(INF, PROBLEM, "Grown to {value:.0%} of its start: noise wins; lower ent_coef, normalise rewards."),
        ),
        f"{WHAT_MATTERS} (it falls as training succeeds); the numbers: {OURS}",
    ),
    Check(
        "train/grad_norm",
        "Gradient norm, against max_grad_norm",
        relative_to("max_grad_norm"),
        (
            Band(1, GOOD, "{value:.2f} times the limit: mostly not clipped."),
            Band(50, GOOD, "{value:.1f} times the limit: clipped, as is usual."),
            Band(
                INF, WARNING, "{value:.0f} times the limit: the loss is on a large scale; normalise rewards or targets."
            ),
        ),
        f"{WHAT_MATTERS} (clipping at 0.5); the numbers: {OURS}",
    ),
    Check(
        "train/learning_rate",
        "Learning rate",
        END_TO_START,
        (
            Band(0.98, GOOD, "Annealed to {value:.0%} of its start."),
            Band(1.02, NOTE, "Constant; annealing it to 0 often gains a little at the end."),
            Band(INF, NOTE, "Grown to {value:.1f} times its start by desired_kl."),
        ),
        WHAT_MATTERS,
    ),
    Check(
        "train/nonfinite_updates",
        "Updates with NaN or infinity",
        LARGEST,
        (
            Band(0, GOOD, "None."),
            Band(INF, PROBLEM, "{value:.0f} updates were skipped: look at the rewards' scale and the learning rate."),
        ),
        "the guard of this package",
    ),
)
#: The entropy of a density has no natural zero, so ratios of it say nothing: the standard deviation is judged instead.
DENSITY_ENTROPY = Verdict(NOTE, "Of a density, which may be negative: read the standard deviation of the actions.")


def verdicts(run: Run) -> list[tuple[Check, Verdict]]:
    """
    Judge all metrics that a run has.

    :param run: any
    :return: rows of the table, with the verdict on this run
    """
    present = [check for check in CHECKS if check.metric in run.progress]
    continuous = "train/std" in run.progress
    return [
        (check, DENSITY_ENTROPY if continuous and check.metric == "train/entropy_loss" else check.verdict(run))
        for check in present
    ]


def judge_number(metric: str, value: float) -> Verdict | None:
    """
    Judge a single value, as the console does while training.

    :param metric: column of ``progress.csv``
    :param value: the newest one
    :return: nothing where a single value says nothing
    """
    check = next((check for check in CHECKS if check.metric == metric), None)
    return check.judge(value) if check is not None and check.statistic in (TYPICAL, LATE) else None
