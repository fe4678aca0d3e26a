"""Verdicts on a run's learning curve and on its evaluations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from sb3_pgplus.reporting.diagnostics import GOOD, NOTE, PROBLEM, WARNING, Verdict
from sb3_pgplus.reporting.learning_curve import smooth, window_of
from sb3_pgplus.reporting.runs import Evaluations
from sb3_pgplus.statistics import iqm_interval


def judge_curve(returns: Any, steps: Any) -> Verdict:
    """
    Tell whether a training has learned, fell back, or could go on; differences within the noise are none.

    :param returns: of all training episodes, ``[n]``
    :param steps: environment steps when they ended, ``[n]``
    """
    returns = np.asarray(returns, dtype=np.float64)
    if n_broken := int(np.sum(~np.isfinite(returns))):
        text = f"The return of {n_broken:,} episode{'s' * (n_broken != 1)} is NaN or infinite: look at the rewards."
        return Verdict(PROBLEM, text)
    return _judge_finite(returns, steps)


def _judge_finite(returns: npt.NDArray[np.float64], steps: Any) -> Verdict:
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
    lowest_of_best, highest_of_last = (
        iqm_interval(evaluations.returns[best])[0],
        iqm_interval(evaluations.returns[-1])[1],
    )
    if lowest_of_best > highest_of_last:
        text = f"The last one ({means[-1]:,.1f}) is worse than the one at step {int(evaluations.steps[best]):,} "
        return Verdict(WARNING, text + f"({means[best]:,.1f}), whose model is best_model.zip.")
    return Verdict(GOOD, f"None is clearly better than the last one ({means[-1]:,.1f}).")
