"""
Mean return of uniform random actions: the zero of normalised scores in sb3_pgplus/benchmarking/published.yml.

    python benchmarks/random_returns.py          # prints the lines of that file
"""

import argparse

import numpy as np

from sb3_pgplus import make_vec_env
from sb3_pgplus.benchmarking.suites import CLASSIC_TASKS, MUJOCO_TASKS


def random_returns(env_id: str, n_episodes: int, seed: int) -> list[float]:
    """Returns of whole episodes, the same number in each of ten copies so that short ones are not preferred."""
    n_envs = 10
    env = make_vec_env(env_id, n_envs, seed=seed)
    env.action_space.seed(seed)
    returns: list[list[float]] = [[] for _ in range(n_envs)]
    env.reset()
    while min(map(len, returns)) < n_episodes // n_envs:
        _, _, dones, infos = env.step(np.stack([env.action_space.sample() for _ in range(n_envs)]))
        for copy in np.flatnonzero(dones):
            returns[copy].append(float(infos[copy]["episode"]["r"]))
    env.close()
    return [value for found in returns for value in found[: n_episodes // n_envs]]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=2_000_000)
    options = parser.parse_args()
    for env_id in (*MUJOCO_TASKS, *CLASSIC_TASKS):
        print(f"  {env_id}: {np.mean(random_returns(env_id, options.episodes, options.seed)):.2f}", flush=True)


if __name__ == "__main__":
    main()
