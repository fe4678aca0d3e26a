"""
What a step of N environments costs: SB3's DummyVecEnv against another backend, with the same actions.

    python benchmarks/vec_env_step.py
    python benchmarks/vec_env_step.py Ant-v5 --n-envs 16 --n-threads 8
    python benchmarks/vec_env_step.py Humanoid-v5 --backend workers

The two take turns in short rounds, so that both see the same load of the machine. Microseconds per step of all copies,
the median and the fastest round. Of MuJoCo's batch also the share of the time that its own step takes, in the fastest
round.
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
    parser.add_argument("--backend", default="mujoco")
    parser.add_argument("--n-envs", type=int, default=8)
    parser.add_argument("--n-threads", type=int)
    parser.add_argument("--steps", type=int, default=100, help="per round")
    parser.add_argument("--rounds", type=int, default=31)
    args = parser.parse_args()
    dummy = make_vec_env(args.env_id, args.n_envs, backend="dummy")
    other: Any = make_vec_env(args.env_id, args.n_envs, backend=args.backend, n_threads=args.n_threads)
    timer = TimedBatch(other._batch) if args.backend == "mujoco" else None
    if timer is not None:
        other._batch = timer
    dummy.action_space.seed(0)
    actions = [np.stack([dummy.action_space.sample() for _ in range(args.n_envs)]) for _ in range(args.steps)]
    times: dict[str, list[float]] = {"dummy": [], args.backend: []}
    inside = []
    for _ in range(args.rounds):
        times["dummy"].append(seconds_of(dummy, actions))
        before = timer.seconds if timer is not None else 0.0
        times[args.backend].append(seconds_of(other, actions))
        inside.append(timer.seconds - before if timer is not None else 0.0)
    print(f"{args.env_id}, {args.n_envs} copies")
    for name, seconds in times.items():
        micro = [1e6 * s / args.steps for s in seconds]
        print(f"{name:9} median {statistics.median(micro):8.1f} us   fastest {min(micro):8.1f} us")
    ratios = [a / b for a, b in zip(times["dummy"], times[args.backend], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    print(f"speed-up of a round: median {quartiles[1]:.2f}, quartiles {quartiles[0]:.2f} to {quartiles[2]:.2f}")
    if timer is not None:
        fastest = int(np.argmin(times[args.backend]))
        print(f"share of MuJoCo's own step: {inside[fastest] / times[args.backend][fastest]:.1%}")
    other.close()


if __name__ == "__main__":
    main()
