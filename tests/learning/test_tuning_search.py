"""Does the search find something? Its sampler against random search, and 20 trials on CartPole (``make learning``)."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.learning
optuna = pytest.importorskip("optuna")
stats = pytest.importorskip("scipy.stats")

from sb3_pgplus.configs import resolve_settings  # noqa: E402
from sb3_pgplus.tuning import TuningPlan, tune  # noqa: E402
from sb3_pgplus.tuning.objective import iqm  # noqa: E402
from sb3_pgplus.tuning.spaces import SPACES, suggest  # noqa: E402
from sb3_pgplus.tuning.study import make_sampler  # noqa: E402

N_TRIALS = 100
REPETITIONS = 20
SEEDS = 5
NOISE = 0.1


def valley(x: dict[str, Any]) -> float:
    """One best place in three numbers; the rest of the space does nothing."""
    rate = math.log10(x["learning_rate"]) + 3.5
    horizon = math.log10(x["one_minus_gamma"]) + 2
    return -(rate**2 + horizon**2 + (math.log2(x["n_epochs"]) - 3) ** 2 / 4)


def ridge(x: dict[str, Any]) -> float:
    """Many epochs need a small learning rate and a small clip range."""
    work = math.log10(x["learning_rate"]) + math.log10(x["n_epochs"]) + 2.5
    return -4 * work**2 - 20 * (x["clip_range"] - 0.15) ** 2 - 0.2 * abs(x["log2_n_minibatches"] - 4)


def switches(x: dict[str, Any]) -> float:
    """Mostly choices."""
    good = (x["normalize_observations"] == "auto") + (x["normalize_rewards"] == "auto") + (x["activation_fn"] == "tanh")
    good += (x["clip_range_vf"] is None) + (x["learning_rate_shape"] == "linear") + (x["net_arch"] == "[64, 64]")
    return 0.5 * good - (math.log10(x["learning_rate"]) + 3) ** 2


def best_found(sampler: str, seed: int, function: Callable[[dict[str, Any]], float]) -> float:
    """The true value of what looked best through the noise of five seeds."""
    noise = np.random.default_rng(seed)
    true_values: dict[int, float] = {}
    study = optuna.create_study(direction="maximize", sampler=make_sampler(sampler, seed))
    for _ in range(N_TRIALS):
        trial = study.ask()
        true_values[trial.number] = function(suggest(trial, SPACES["ppoplus"]))
        study.tell(trial, iqm(list(true_values[trial.number] + NOISE * noise.standard_normal(SEEDS))))
    return true_values[study.best_trial.number]


@pytest.mark.parametrize("function", [valley, ridge, switches])
def test_the_sampler_beats_random_search(function: Callable[[dict[str, Any]], float]) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pairs = [[best_found(sampler, seed, function) for sampler in ("tpe", "random")] for seed in range(REPETITIONS)]
    wins = sum(tpe > rand for tpe, rand in pairs)
    ties = sum(tpe == rand for tpe, rand in pairs)
    print(f"{function.__name__}: {wins} of {REPETITIONS} repetitions won, {ties} equal")
    assert stats.binomtest(wins, REPETITIONS - ties, alternative="greater").pvalue < 0.05


def test_twenty_trials_on_cartpole_end_above_the_defaults_on_seeds_never_seen(tmp_path: Path) -> None:
    settings = resolve_settings(env="CartPole-v1", n_timesteps=10_000)
    plan = TuningPlan(settings, SPACES["ppoplus"], n_trials=20, seeds=(0, 1, 2), enqueue=False, top=2)
    result = tune(plan, f"sqlite:///{tmp_path / 'study.db'}", "cartpole")
    winner = result.ranking[0]
    [default] = [candidate for candidate in result.ranking if candidate.origin == "default"]
    print(f"winner: trial {winner.number}, {winner.test_score} {winner.interval}; defaults: {default.test_score}")
    assert winner.number is not None and winner.interval[0] > default.test_score
