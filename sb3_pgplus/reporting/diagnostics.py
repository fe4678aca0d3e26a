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

from sb3_pgplus.reporting.learning_curve import smooth, window_of
from sb3_pgplus.reporting.runs import Evaluations, Run
from sb3_pgplus.schedules import as_schedule
from sb3_pgplus.statistics import interval_of

GOOD, NOTE, WARNING, PROBLEM = "good", "note", "warning", "problem"
SEVERITY = (PROBLEM, WARNING, NOTE, GOOD)
INF = math.inf
ENOUGH_ROWS = 3

SCHULMAN = "Schulman, Nuts and Bolts of Deep RL Experimentation, 2017"
DETAILS = "Huang et al., The 37 Implementation Details of PPO, 2022"
SPINNING_UP = "Spinning Up, PPO: target_kl 0.01, stop at 1.5 times that"
WHAT_MATTERS = "Andrychowicz et al., What Matters in On-Policy RL, 2021"
SB3_DOCS = "Stable-Baselines3's documentation, Logger"
TRPO_PAPER = "Schulman et al., Trust Region Policy Optimization, 2015"
OURS = "rule of thumb"


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
class Check:
    """One row of the table."""

    metric: str
    title: str
    statistic: Callable[[Run, str], float | None]
    bands: tuple[Band, ...]
    source: str

    def judge(self, value: float) -> Verdict:
        """
        :param value: of the statistic
        """
        band = next((band for band in self.bands if value <= band.up_to), None)
        if band is None:  # NaN
            return Verdict(PROBLEM, f"{self.title} is {value}: training has broken down.")
        return Verdict(band.level, band.text.format(value=value))

    def verdict(self, run: Run) -> Verdict:
        """
        :param run: that has the metric
        """
        n_rows = len(run.progress[self.metric])
        if n_rows < ENOUGH_ROWS:
            return Verdict(NOTE, f"Too short to judge: {n_rows} update{'s' * (n_rows != 1)} logged.")
        value = self.statistic(run, self.metric)
        return Verdict(NOTE, "Nothing to compare it with.") if value is None else self.judge(value)


# --- statistics -------------------------------------------------------------------------------------------------------


def typical(run: Run, metric: str) -> float:
    """
    :param run: that has the metric
    :param metric: column of ``progress.csv``
    :return: median over the training
    """
    return float(np.median(run.progress[metric].values))


def late(run: Run, metric: str) -> float:
    """
    :param run: that has the metric
    :param metric: column of ``progress.csv``
    :return: median over its last quarter
    """
    values = run.progress[metric].values
    return float(np.median(values[-max(1, len(values) // 4) :]))


def average(run: Run, metric: str) -> float:
    """
    :param run: that has the metric
    :param metric: column of ``progress.csv``
    :return: mean over the training
    """
    return float(np.mean(run.progress[metric].values))


def largest(run: Run, metric: str) -> float:
    """
    :param run: that has the metric
    :param metric: column of ``progress.csv``
    :return: maximum over the training
    """
    return float(np.max(run.progress[metric].values))


def end_to_start(run: Run, metric: str) -> float | None:
    """
    :param run: that has the metric
    :param metric: column of ``progress.csv``
    :return: median of the last tenth over the median of the first tenth; nothing where that is 0
    """
    values = run.progress[metric].values
    n = max(1, len(values) // 10)
    start, end = float(np.median(values[:n])), float(np.median(values[-n:]))
    return end / start if start else None


def relative_to(name: str) -> Callable[[Run, str], float | None]:
    """
    :param name: of a hyperparameter; a schedule counts with its first value
    :return: the statistic: median over the training, in units of the hyperparameter
    """

    def statistic(run: Run, metric: str) -> float | None:
        limit = start_value(run.settings, name)
        return None if not limit else typical(run, metric) / limit

    return statistic


def of_other(other: str, statistic: Callable[[Run, str], float | None]) -> Callable[[Run, str], float | None]:
    """
    :param other: column whose statistic judges this metric
    :param statistic: which
    """
    return lambda run, _: statistic(run, other) if other in run.progress else None


def as_expected(run: Run, metric: str) -> float | None:
    """
    :param run: that has the metric and ``…_expected``
    :param metric: column of ``progress.csv``
    :return: median ratio of what an update achieved to what its linear model promised; failed ones left out
    """
    got, promised = run.progress[metric].values, run.progress[f"{metric}_expected"].values
    n = min(len(got), len(promised))
    ratios = got[-n:][promised[-n:] > 0] / promised[-n:][promised[-n:] > 0]
    return float(np.median(ratios)) if len(ratios) else None


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
        typical,
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
        largest,
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
        typical,
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
            Band(0.3, WARNING, "Steps use {value:.0%} of the trust region: the line search cuts them short."),
            Band(1.0001, GOOD, "Steps use {value:.0%} of the trust region."),
            Band(INF, PROBLEM, "Steps are {value:.1f} times the trust region: switch line_search on, or damp more."),
        ),
        TRPO_PAPER,
    ),
    Check(
        "train/is_line_search_success",
        "Line search",
        average,
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
        average,
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
        of_other("train/cg_steps", relative_to("cg_max_steps")),
        (
            Band(0.999, GOOD, "Solved to cg_tol with {value:.0%} of the allowed steps."),
            Band(INF, WARNING, "Conjugate gradient ends at cg_max_steps, unsolved: raise cg_max_steps or cg_damping."),
        ),
        TRPO_PAPER,
    ),
    Check(
        "train/step_length",
        "Length of the step",
        end_to_start,
        (
            Band(0.05, WARNING, "Steps have shrunk to {value:.1%} of the first ones: the policy is nearly fixed."),
            Band(INF, GOOD, "Steps are {value:.2g} times as long as the first ones."),
        ),
        OURS,
    ),
    Check(
        "train/surrogate_improvement",
        "Improvement of the surrogate",
        as_expected,
        (
            Band(0.25, WARNING, "{value:.0%} of what the gradient promised: a smaller target_kl would fit better."),
            Band(INF, GOOD, "{value:.0%} of what the gradient promised."),
        ),
        TRPO_PAPER,
    ),
    Check(
        "train/explained_variance",
        "Explained variance of the critic",
        late,
        (
            Band(0.0, PROBLEM, "{value:.2f}: the critic is worse than a constant; train it longer, normalise rewards."),
            Band(0.3, WARNING, "{value:.2f}: the critic knows little (harmless if all returns are alike)."),
            Band(INF, GOOD, "{value:.2f}: the critic predicts the returns."),
        ),
        f"{SB3_DOCS} (0: as good as nothing); {SCHULMAN}",
    ),
    Check(
        "train/entropy_loss",
        "Entropy of the policy",
        end_to_start,
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
        end_to_start,
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
        end_to_start,
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
        largest,
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
    return check.judge(value) if check is not None and check.statistic in (typical, late) else None


# --- the curve itself -------------------------------------------------------------------------------------------------


def judge_curve(returns: Any, steps: Any) -> Verdict:
    """
    Tell whether a training has learned, fell back, or could go on; differences within the noise are none.

    :param returns: of all training episodes, ``[n]``
    :param steps: environment steps when they ended, ``[n]``
    """
    returns = np.asarray(returns, dtype=np.float64)
    n, window = len(returns), window_of(len(returns))
    if n < 4 * window:
        return Verdict(NOTE, f"Too short to judge: {n} episode{'s' * (n != 1)}.")
    means = smooth(returns, window)[0]
    noise = float(np.std(returns[window:] - means[window:])) / math.sqrt(window)  # of a running mean
    means = means[window:]
    # A tenth of the run, but no less than what is averaged.
    tenth = max(window, n // 10)
    start, before, end = (
        float(part.mean()) for part in (returns[:tenth], returns[-2 * tenth : -tenth], returns[-tenth:])
    )
    best, spread = float(means.max()), float(np.ptp(means))
    where = f"{int(steps[window + int(means.argmax())]):,}"
    if spread == 0:
        return Verdict(NOTE, f"The return is {end:,.1f} all the time.")
    if end - start <= max(0.1 * spread, 2 * noise):
        return Verdict(PROBLEM, f"Not clearly better at the end ({end:,.1f}) than at the start ({start:,.1f}).")
    if best - end > max(0.3 * spread, 3 * noise):
        text = f"Fell back from {best:,.1f} (at step {where}) to {end:,.1f}: lower the learning rate or anneal it; "
        return Verdict(WARNING, text + "train with --eval-freq keeps the best model.")
    if end - before > max(0.1 * spread, 2 * noise):
        return Verdict(NOTE, f"From {start:,.1f} to {end:,.1f} and still rising: more steps would help.")
    return Verdict(GOOD, f"From {start:,.1f} to {end:,.1f}, and level at the end.")


def judge_evaluations(evaluations: Evaluations) -> Verdict:
    """
    Tell whether the last policy is the best one.

    :param evaluations: of a run
    """
    means = evaluations.returns.mean(axis=1)
    best = int(np.argmax(means))
    lowest_of_best, highest_of_last = interval_of(evaluations.returns[best])[0], interval_of(evaluations.returns[-1])[1]
    if lowest_of_best > highest_of_last:
        text = f"The last one ({means[-1]:,.1f}) is worse than the one at step {int(evaluations.steps[best]):,} "
        return Verdict(WARNING, text + f"({means[best]:,.1f}), whose model is best_model.zip.")
    return Verdict(GOOD, f"None is clearly better than the last one ({means[-1]:,.1f}).")
