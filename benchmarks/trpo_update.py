"""
The update of one TRPO iteration against sb3-contrib's, with the same settings and without compilation.

    python benchmarks/trpo_update.py
    python benchmarks/trpo_update.py --rounds 30 --env HalfCheetah-v5

2048 samples (8 environments × 256 steps), 64×64 networks, sb3-contrib's defaults on both sides (15 conjugate-gradient
steps, 10 passes of the critic over minibatches of 128), no normalisation. Each round times one ``train()`` of each, on
a rollout that stays the same, in alternating order; one thread. The figure is the ratio of the medians, and beside it
the median of the rounds' own ratios with its interquartile range.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch as th
from sb3_contrib import TRPO
from stable_baselines3.common.env_util import make_vec_env

from sb3_pgplus import TRPOPlus, presets

N_ENVS, N_STEPS = 8, 256


def with_rollout(cls: Any, env_id: str, settings: dict[str, Any]) -> Any:
    """A model that has collected a rollout."""
    arch = {"net_arch": [64, 64]}
    env = make_vec_env(env_id, N_ENVS, seed=0)
    model = cls("MlpPolicy", env, seed=0, device="cpu", policy_kwargs=arch, **{**settings, "n_steps": N_STEPS})
    _, callback = model._setup_learn(1_000_000)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, N_STEPS)
    return model


def seconds_of(model: Any) -> float:
    """Seconds of one update."""
    started = time.perf_counter()
    model.train()
    return time.perf_counter() - started


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Pendulum-v1")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    th.set_num_threads(1)
    models = {
        "sb3-contrib TRPO": with_rollout(TRPO, options.env, {}),
        "TRPOPlus": with_rollout(TRPOPlus, options.env, {**presets.SB3_TRPO, "sb3_exact": False}),
    }
    for model in models.values():
        seconds_of(model)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(options.rounds):
        for name in list(models)[:: 1 if round_ % 2 else -1]:
            seconds[name].append(seconds_of(models[name]))
    theirs, ours = (np.array(seconds[name]) for name in models)
    low, middle, high = np.percentile(theirs / ours, [25, 50, 75])
    for name, values in seconds.items():
        print(f"{name:>18}: median {np.median(values) * 1e3:6.1f} ms")
    print(f"{'ratio':>18}: {np.median(theirs) / np.median(ours):.2f} of the medians; per round {middle:.2f}", end=" ")
    print(f"[{low:.2f}, {high:.2f}]")


if __name__ == "__main__":
    main()
