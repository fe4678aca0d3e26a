"""
How the tuner's sampler was chosen: final choices of a search against the best of random search at equal budget.

The noisy objectives over PPOPlus's space are others than those of ``tests/learning/test_tuning_search.py``.

    python benchmarks/samplers.py --repetitions 20
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import optuna
import typer
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from rich.console import Console
from rich.table import Table

from sb3_pgplus.statistics import iqm
from sb3_pgplus.tuning.spaces import SPACES, suggest

SPACE = SPACES["ppoplus"]
#: Of a search; each trial is seen through the noise of its seeds, and the best few once more on test seeds.
N_TRIALS, N_SEEDS, NOISE, TOP, TEST_SEEDS = 60, 5, 0.3, 3, 10
SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "multivariate": lambda seed: TPESampler(seed=seed, multivariate=True),
    "univariate": lambda seed: TPESampler(seed=seed, multivariate=False),
    "univariate, 5 random": lambda seed: TPESampler(seed=seed, multivariate=False, n_startup_trials=5),
    "univariate, 20 random": lambda seed: TPESampler(seed=seed, multivariate=False, n_startup_trials=20),
}
Values = dict[str, Any]


def cliff(x: Values) -> float:
    """The larger the steps the better, until it breaks."""
    work = math.log10(x["learning_rate"]) + 0.5 * math.log10(x["n_epochs"]) + 3
    horizon = abs(math.log10(x["one_minus_gamma"]) + 2.3)
    return min(work, 0) - (3 * max(work, 0)) ** 2 - 0.3 * horizon + 0.3 * (x["normalize_observations"] == "auto")


def horizons(x: Values) -> float:
    """γ has a best value, and λ one beside it."""
    gamma, lambda_ = math.log10(x["one_minus_gamma"]), math.log10(x["one_minus_gae_lambda"])
    return -((gamma + 2.5) ** 2) - 0.5 * (gamma - lambda_ + 1) ** 2 - 0.1 * abs(x["log2_rollout_size"] - 11)


def mixed(x: Values) -> float:
    """Large networks are better with smaller rates; two switches count only together."""
    is_large = x["net_arch"] in ("[128, 128]", "[256, 256]")
    rate = math.log10(x["learning_rate"]) + (3.8 if is_large else 3.2)
    both = x["activation_fn"] == "tanh" and x["normalize_advantage"] is True
    entropy = (math.log10(x["ent_coef"]) + 3) ** 2 / 8
    return -(rate**2) + 0.4 * is_large + 0.4 * both - entropy + 0.2 * (x["advantage_estimator"] == "gae")


def bowl(x: Values) -> float:
    """Five numbers, each with a best value."""
    logs = {"max_grad_norm": -0.2, "vf_coef": -0.3, "learning_rate": -3.5}
    distance = sum((math.log10(x[name]) - best) ** 2 for name, best in logs.items())
    return -distance - (x["log_std_init"] + 0.7) ** 2 - 20 * (x["clip_range"] - 0.2) ** 2


OBJECTIVES = (cliff, horizons, mixed, bowl)


def search(sampler: BaseSampler, n_trials: int, rng: np.random.Generator, f: Callable[[Values], float]) -> list[float]:
    """
    :param sampler: proposes
    :param n_trials: how many
    :param rng: of the noise
    :param f: the objective
    :return: true values, best score first
    """
    study = optuna.create_study(direction="maximize", sampler=sampler)
    found = []
    for _ in range(n_trials):
        trial = study.ask()
        value = f(suggest(trial, SPACE))
        found.append((iqm(list(value + NOISE * rng.standard_normal(N_SEEDS))), value))
        study.tell(trial, found[-1][0])
    return [value for _, value in sorted(found, reverse=True)]


def main(repetitions: Annotated[int, typer.Option(min=1, help="Searches of each kind.")] = 20) -> None:
    """Print for each sampler and objective how many repetitions it wins, and the mean value of its choices."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    n_random = N_TRIALS + TOP * TEST_SEEDS // N_SEEDS
    table = Table("sampler", *(f"{f.__name__}" for f in OBJECTIVES))
    seeds = range(2000, 2000 + repetitions)  # the test has 0 to 19
    rivals = {
        f: [search(RandomSampler(seed=s), n_random, np.random.default_rng(s), f)[0] for s in seeds] for f in OBJECTIVES
    }
    table.add_row("random", *(f"{np.mean(values):.2f}" for values in rivals.values()))
    for name, make in SAMPLERS.items():
        cells = []
        for f in OBJECTIVES:
            chosen = []
            for seed in seeds:
                rng = np.random.default_rng(seed)
                best = search(make(seed), N_TRIALS, rng, f)[:TOP]
                chosen.append(max((iqm(list(v + NOISE * rng.standard_normal(TEST_SEEDS))), v) for v in best)[1])
            wins = sum(ours > theirs for ours, theirs in zip(chosen, rivals[f], strict=True))
            cells.append(f"{wins} of {repetitions} ({np.mean(chosen):.2f})")
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
