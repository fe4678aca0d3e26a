"""
The coefficients of the compiled tanh, its error, and its time against torch's own compiled tanh.

    python benchmarks/rational_tanh.py
    python benchmarks/rational_tanh.py --end 8 --numerator 5 --denominator 3

tanh x = x P(x²)/Q(x²) on [−end, end], P and Q of the given degrees, with the smallest largest relative error: Lawson's
iteration (weighted least squares, the weights multiplied by the error) on the linearised problem P − fQ, divided by the
last Q (Sanathanan and Koerner). Chebyshev polynomials in between, because powers are ill conditioned.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch as th
from numpy.polynomial import Chebyshev, Polynomial
from numpy.polynomial.chebyshev import chebvander

from sb3_pgplus import compiler
from sb3_pgplus.compiler import compile_function

N_POINTS, N_ITERATIONS, N_ROUNDS = 600, 600, 3000


def fit(end: float, numerator: int, denominator: int) -> tuple[np.ndarray, np.ndarray, float]:
    """
    :param end: of the interval
    :param numerator: degree of P in x²
    :param denominator: degree of Q
    :return: coefficients of P and Q, ascending powers of x², and the largest relative error before rounding
    """
    angles = np.pi * (np.arange(N_POINTS) + 0.5) / N_POINTS
    squares = end**2 * (1 - np.cos(angles)) / 2
    values = np.tanh(np.sqrt(squares)) / np.sqrt(squares)
    scaled = 2 * squares / end**2 - 1
    above, below = chebvander(scaled, numerator), chebvander(scaled, denominator)
    weights, last, best, least = np.ones(N_POINTS), np.ones(N_POINTS), np.empty(0), np.inf
    for _ in range(N_ITERATIONS):
        scale = np.sqrt(weights) / last
        system = np.hstack([above / values[:, None], -below[:, 1:]]) * scale[:, None]
        solution = np.linalg.lstsq(system, below[:, 0] * scale, rcond=None)[0]
        last = below @ np.append(1.0, solution[numerator + 1 :])
        errors = np.abs(above @ solution[: numerator + 1] / last / values - 1)
        if errors.max() < least:
            best, least = solution, float(errors.max())
        weights = weights * (errors / errors.max() + 1e-3)
        weights /= weights.sum()
    p, q = (
        Chebyshev(c, domain=[0, end**2]).convert(kind=Polynomial).coef
        for c in (best[: numerator + 1], np.append(1.0, best[numerator + 1 :]))
    )
    return p / q[0], q / q[0], least


def microseconds(function: Callable[[list[th.Tensor]], object], x: th.Tensor) -> float:
    """
    :param function: of a list of one tensor
    :param x: the tensor
    :return: median time of a call
    """
    times = []
    for _ in range(N_ROUNDS):
        start = time.perf_counter()
        function([x])
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--end", type=float, default=9.0)
    parser.add_argument("--numerator", type=int, default=4)
    parser.add_argument("--denominator", type=int, default=4)
    options = parser.parse_args()
    p, q, error = fit(options.end, options.numerator, options.denominator)
    print("numerator  ", ", ".join(f"{c:.9g}" for c in p))
    print("denominator", ", ".join(f"{c:.9g}" for c in q))
    print(f"largest relative error before rounding: {error:.2g}")

    th.set_num_threads(1)
    x = th.randn(256, 64)
    ours = compile_function(lambda x: [th.tanh(x)], [x])
    del compiler._DECOMPOSITIONS[th.ops.aten.tanh.default]
    torchs = compile_function(lambda x: [th.tanh(x)], [x])
    nothing = compile_function(lambda x: [x + 1.0], [x])
    for name, function in {"ours": ours, "torch's": torchs, "x + 1": nothing}.items():
        print(f"{name:12s} {microseconds(function, x):6.1f} µs for 256×64")


if __name__ == "__main__":
    main()
