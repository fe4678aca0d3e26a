"""
Compare MujocoVecEnv with SB3's DummyVecEnv over full-length episodes of all eleven tasks: equal in every bit?

Takes some minutes, so it is no test of its own; tests/test_vec_env_mujoco.py has short episodes. Worth a run after an
update of MuJoCo, Gymnasium or NumPy::

    python tests/conformance/vec_env_exactness.py
    python tests/conformance/vec_env_exactness.py Ant Humanoid --n-envs 16 --n-threads 8 --seed 3
"""

import argparse
import sys
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np
from stable_baselines3.common.env_util import make_vec_env

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rollout_comparison import MUJOCO_TASKS, assert_same_rollouts, random_actions

from sb3_pgplus.vec_env import MujocoVecEnv


def compare(task: str, n_envs: int, n_threads: int, n_steps: int, seed: int, scale: float) -> str:
    """One task with Gymnasium's defaults; the counts, or the first difference."""
    reference = make_vec_env(f"{task}-v5", n_envs, seed=seed)
    env = MujocoVecEnv(f"{task}-v5", n_envs, n_threads=n_threads, full_infos=True)
    env.seed(seed)
    try:
        counts = assert_same_rollouts(reference, env, random_actions(env, n_steps, seed, scale))
    except AssertionError as error:
        return f"DIFFERS: {str(error).splitlines()[0]}"
    finally:
        reference.close()
        env.close()
    return f"equal, {counts['ended']} episodes, {counts['truncated']} of them cut by the time limit"


def main() -> int:
    """Returns the number of tasks that differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=MUJOCO_TASKS, help="names without -v5, by default all")
    parser.add_argument("--n-envs", type=int, default=3)
    parser.add_argument("--n-threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1050, help="a little more than an episode of 1000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="of the actions; small ones make long episodes")
    args = parser.parse_args()
    print(f"mujoco {mujoco.__version__}, gymnasium {gym.__version__}, numpy {np.__version__}")
    outcomes = []
    for task in args.tasks:
        outcomes.append(compare(task, args.n_envs, args.n_threads, args.steps, args.seed, args.scale))
        print(f"{task:24}{outcomes[-1]}", flush=True)
    return sum(outcome.startswith("DIFFERS") for outcome in outcomes)


if __name__ == "__main__":
    sys.exit(main())
