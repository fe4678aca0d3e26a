"""The statistics that results are reported with: interquartile mean and bootstrap interval (Agarwal et al. 2021)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
RESAMPLES = 5000
CURVE_RESAMPLES = 1000
"""At each point of a curve, of which there are hundreds."""
COLUMNS_AT_ONCE = 50
"""Points of a curve whose resamples are in memory together."""


def iqm(values: npt.ArrayLike) -> float:
    """
    Interquartile mean: the mean without the lowest and the highest quarter.

    :param values: ``[n]``
    """
    return float(_iqm(np.asarray(values, dtype=np.float64), 0))


def interval_of(scores: npt.ArrayLike) -> tuple[float, float]:
    """
    95 % interval of the IQM by the percentile bootstrap; always the same one for the same scores.

    :param scores: ``[n]``, one for each seed or episode
    """
    values = np.asarray(scores, dtype=np.float64)
    if len(values) < 2 or np.ptp(values) == 0:
        return float(values.min()), float(values.max())
    low, high = _bootstrap(values)
    return float(low), float(high)


def curve_of(values: npt.ArrayLike) -> tuple[FloatArray, FloatArray, FloatArray]:
    """
    IQM over seeds at every point of a curve, with its 95 % bootstrap interval, point by point.

    :param values: ``[n_seeds, n_points]``
    :return: IQM, lower and upper end, each ``[n_points]``; of a single seed all three are its values
    """
    array = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if len(array) == 1:
        return array[0], array[0], array[0]
    starts = range(0, array.shape[1], COLUMNS_AT_ONCE)
    parts = [_bootstrap(array[:, start : start + COLUMNS_AT_ONCE], CURVE_RESAMPLES) for start in starts]
    low, high = (np.concatenate([part[end] for part in parts]) for end in (0, 1))
    return np.asarray(_iqm(array, 0)), low, high


def _iqm(values: FloatArray, axis: int) -> Any:
    from scipy.stats import trim_mean

    return trim_mean(values, 0.25, axis=axis)


def _bootstrap(values: FloatArray, n_resamples: int = RESAMPLES) -> tuple[Any, Any]:
    from scipy.stats import bootstrap

    found = bootstrap(
        (values,), _iqm, axis=0, n_resamples=n_resamples, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return found.low, found.high
