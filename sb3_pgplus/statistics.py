"""
Statistics of scores over tasks and seeds, as *Deep Reinforcement Learning at the Edge of the Statistical Precipice*
defines them (Agarwal et al. 2021, https://arxiv.org/abs/2108.13264).

Scores come as one array ``[n_seeds]`` for each task; tasks may have different numbers of seeds. An interval is the 95 %
percentile interval of the stratified bootstrap (section 4.1): seeds are drawn with replacement within each task, so
tasks are fixed and seeds are what varies. The same scores give the same interval every time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import bootstrap, trim_mean

FloatArray = npt.NDArray[np.float64]
Interval = tuple[float, float]
RESAMPLES = 5000
CONFIDENCE = 0.95


def iqm(values: npt.ArrayLike) -> float:
    """
    Interquartile mean: the mean without the lowest and the highest quarter (below four values: the mean).

    :param values: scores of any shape, pooled: seeds of one task, or ``[n_tasks, n_seeds]``
    """
    return float(trim_mean(np.asarray(values, dtype=np.float64), 0.25, axis=None))


def iqm_interval(scores: npt.ArrayLike) -> Interval:
    """
    Interval of the IQM over the seeds of one task.

    :param scores: ``[n_seeds]``; of a single one, the interval is that score
    """
    values = np.asarray(scores, dtype=np.float64)
    if len(values) < 2 or np.ptp(values) == 0:
        return float(values.min()), float(values.max())
    low, high = _interval([values], _pooled_iqm)
    return float(low), float(high)


def aggregate(scores: Sequence[npt.ArrayLike]) -> tuple[float, Interval | None]:
    """
    IQM over all runs of all tasks, with its interval.

    :param scores: one array ``[n_seeds]`` for each task, normalised so that tasks can be compared
    :return: the IQM; its interval, or ``None`` where a task has a single seed
    """
    arrays = _arrays(scores)
    value = iqm(np.concatenate(arrays))
    return value, None if _too_few(arrays) else _numbers(_interval(arrays, _pooled_iqm))


def probability_of_improvement(
    ours: Sequence[npt.ArrayLike], theirs: Sequence[npt.ArrayLike]
) -> tuple[float, Interval | None]:
    """
    How likely a run of X is better than a run of Y: ``1/M Σ_m P(X_m > Y_m)``, a tie counting one half.

    For one task it is the Mann-Whitney statistic ``U / (n_X n_Y)`` (appendix A.3).

    :param ours: X, one array ``[n_seeds]`` for each task
    :param theirs: Y, for the same tasks in the same order
    :return: the probability; its interval, or ``None`` where a task has a single seed
    :raises ValueError: if the tasks are not as many
    """
    x, y = _arrays(ours), _arrays(theirs)
    if len(x) != len(y):
        raise ValueError(f"probability of improvement: {len(x)} tasks beside {len(y)}")

    def statistic(*samples: FloatArray, axis: int = -1) -> FloatArray:
        pairs = zip(samples[: len(x)], samples[len(x) :], strict=True)
        by_task = [_mann_whitney(*(np.moveaxis(s, axis, -1) for s in pair)) for pair in pairs]
        return np.asarray(np.mean(by_task, axis=0))

    value = float(statistic(*x, *y))
    return value, None if _too_few([*x, *y]) else _numbers(_interval([*x, *y], statistic))


def performance_profile(
    scores: Sequence[npt.ArrayLike], thresholds: npt.ArrayLike
) -> tuple[FloatArray, tuple[FloatArray, FloatArray] | None]:
    """
    Fraction of runs above each threshold, ``F(τ) = 1/M Σ_m 1/N Σ_n 1[x_mn > τ]`` (section 4.2).

    :param scores: one array ``[n_seeds]`` for each task
    :param thresholds: τ, ``[K]``
    :return: F, ``[K]``; low and high end of the pointwise intervals, or ``None`` where a task has a single seed
    """
    tau = np.asarray(thresholds, dtype=np.float64)
    above = [(values[:, None] > tau).astype(np.float64) for values in _arrays(scores)]

    def statistic(*samples: FloatArray, axis: int = -1) -> FloatArray:
        return np.asarray(np.mean([sample.mean(axis=axis) for sample in samples], axis=0))

    return statistic(*above, axis=0), None if _too_few(above) else _interval(above, statistic, axis=0)


def curve(returns: npt.ArrayLike) -> tuple[FloatArray, tuple[FloatArray, FloatArray] | None]:
    """
    IQM over seeds at each of K evaluations.

    :param returns: ``[n_seeds, K]``
    :return: IQM, ``[K]``; low and high end of its pointwise intervals, or ``None`` for a single seed
    """
    values = np.asarray(returns, dtype=np.float64)
    return trim_mean(values, 0.25, axis=0), None if _too_few([values]) else _interval([values], _pooled_iqm, axis=0)


def _arrays(scores: Sequence[npt.ArrayLike]) -> list[FloatArray]:
    arrays = [np.asarray(values, dtype=np.float64) for values in scores]
    if not arrays or any(values.ndim != 1 or not len(values) for values in arrays):
        raise ValueError("scores must be one non-empty array [n_seeds] for each task, for at least one task")
    return arrays


def _too_few(arrays: Sequence[FloatArray]) -> bool:
    return any(len(values) < 2 for values in arrays)


def _pooled_iqm(*samples: FloatArray, axis: int = -1) -> FloatArray:
    pooled: FloatArray = trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)
    return pooled


def _mann_whitney(x: FloatArray, y: FloatArray) -> FloatArray:
    """``[…, n_X]`` and ``[…, n_Y]`` → ``[…]``."""
    wins = (x[..., :, None] > y[..., None, :]) + 0.5 * (x[..., :, None] == y[..., None, :])
    result: FloatArray = wins.mean(axis=(-2, -1))
    return result


def _interval(
    samples: Sequence[FloatArray], statistic: Callable[..., Any], axis: int = -1
) -> tuple[FloatArray, FloatArray]:
    """SciPy draws from each sample by itself: with one sample for each task, that is the stratified bootstrap."""
    found = bootstrap(
        tuple(samples),
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        axis=axis,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return found.low, found.high


def _numbers(interval: tuple[FloatArray, FloatArray]) -> Interval:
    return float(interval[0]), float(interval[1])
