"""
What a step of N MuJoCo environments costs: SB3's DummyVecEnv against one batch, with the same actions and results.

    python benchmarks/vec_env_step.py
    python benchmarks/vec_env_step.py Ant-v5 --n-envs 16 --n-threads 8

The two take turns in short rounds, so that both see the same load of the machine. Microseconds per step of all copies,
the median and the fastest round; the share of the batch's time that MuJoCo's own step takes, in the fastest round.
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np

from sb3_pgplus.vec_env import make_vec_env


class TimedBatch:
    """A batch that adds up the seconds of its steps."""

    def __init__(self, batch: Any) -> None:
        self.batch, self.seconds = batch, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batch, name)

    def step(self, **kwargs: Any) -> None:
        started = time.perf_counter()
        self.batch.step(**kwargs)
        self.seconds += time.perf_counter() - started


def seconds_of(env: Any, actions: Any) -> float:
    """One round from the same seed: the same trajectories every time."""
    env.seed(0)
    env.reset()
    started = time.perf_counter()
    for action in actions:
        env.step(action)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env_id", nargs="?", default="HalfCheetah-v5")
    parser.add_argument("--n-envs", type=int, default=8)
    parser.add_argument("--n-threads", type=int)
    parser.add_argument("--steps", type=int, default=100, help="per round")
    parser.add_argument("--rounds", type=int, default=31)
    args = parser.parse_args()
    dummy = make_vec_env(args.env_id, args.n_envs, backend="dummy")
    batched: Any = make_vec_env(args.env_id, args.n_envs, backend="mujoco", n_threads=args.n_threads)
    batched._batch = timer = TimedBatch(batched._batch)
    space: Any = dummy.action_space
    shape = (args.steps, args.n_envs, *space.shape)
    actions = np.random.default_rng(0).uniform(space.low, space.high, shape).astype(np.float32)
    times: dict[str, list[float]] = {"dummy": [], "mujoco": []}
    inside = []
    for _ in range(args.rounds):
        times["dummy"].append(seconds_of(dummy, actions))
        timer.seconds = 0.0
        times["mujoco"].append(seconds_of(batched, actions))
        inside.append(timer.seconds)
    print(f"{args.env_id}, {args.n_envs} copies, {batched.n_threads} threads")
    for name, seconds in times.items():
        micro = [1e6 * s / args.steps for s in seconds]
        print(f"{name:8} median {statistics.median(micro):8.1f} us   fastest {min(micro):8.1f} us")
    ratios = [a / b for a, b in zip(times["dummy"], times["mujoco"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    print(f"speed-up of a round: median {quartiles[1]:.2f}, quartiles {quartiles[0]:.2f} to {quartiles[2]:.2f}")
    fastest = int(np.argmin(times["mujoco"]))
    print(f"share of MuJoCo's own step: {inside[fastest] / times['mujoco'][fastest]:.1%}")


if __name__ == "__main__":
    main()
