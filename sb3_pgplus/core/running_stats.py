"""
Running mean and variance, merged batch by batch.

Reference: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances" (1979).
"""

from typing import Any, NamedTuple

import torch as th


class Moments(NamedTuple):
    """
    Mean and population variance of ``count`` samples; ``mean`` and ``var`` have the shape of one sample. Tensors, or
    arrays in their place.
    """

    mean: Any
    var: Any
    count: Any  # `tuple.count` is not needed here


def moments_of(batch: Any) -> Moments:
    """
    Moments of a batch along its first dimension, in float64.

    :param batch: ``[B, ...]``, a tensor, or an array, which is quicker where it is small
    :return: mean and population variance ``[...]``, count ``[]``
    """
    if not isinstance(batch, th.Tensor):
        samples, n = batch.astype("float64", copy=False), len(batch)
        mean = samples.sum(0) / n
        return Moments(mean, ((samples - mean) ** 2).sum(0) / n, float(n))
    var, mean = th.var_mean(batch.to(th.float64), dim=0, correction=0)
    return Moments(mean, var, mean.new_tensor(float(len(batch))))


def merge_moments(a: Moments, b: Moments) -> Moments:
    """
    Moments of the union of two sets of samples, from theirs alone::

        mean = mean_a + Δ n_b/n,  Δ = mean_b − mean_a,  n = n_a + n_b
        var  = (n_a var_a + n_b var_b + Δ² n_a n_b/n) / n

    :param a: moments of the first set
    :param b: moments of the second
    :return: moments of both together
    """
    count = a.count + b.count
    delta = b.mean - a.mean
    mean = a.mean + delta * b.count / count
    squares = a.var * a.count + b.var * b.count + delta * delta * a.count * b.count / count
    return Moments(mean, squares / count, count)
