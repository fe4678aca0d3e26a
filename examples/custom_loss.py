"""
A published PPO variant by overriding one method: Simple Policy Optimization (https://arxiv.org/abs/2401.16025).

PPO's clip stops pushing a ratio that has left [1−ε, 1+ε] but does not pull it back. SPO replaces it by a parabola whose
maximum lies exactly at the edge of that interval, on the side where the advantage points::

    maximise E[ρ A − |A| / (2ε) · (ρ − 1)²]

What you learn here: `policy_loss` gets tensors and numbers and returns a scalar to minimise. Collection, advantages,
minibatches, the critic, normalisation, schedules, save and load come from PPOPlus unchanged.

    python examples/custom_loss.py
"""

import argparse

import torch as th
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_pgplus import PPOPlus
from sb3_pgplus.hparams import PPOHparams


class SPO(PPOPlus):
    """Simple Policy Optimization. ε is `clip_range`: a number > 0, and no schedule that ends at 0."""

    def policy_loss(self, ratio: th.Tensor, advantages: th.Tensor, hp: PPOHparams) -> th.Tensor:
        assert hp.clip_range, "SPO divides by clip_range"
        penalty = advantages.abs() / (2 * hp.clip_range) * (ratio - 1) ** 2
        return -(advantages * ratio - penalty).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train SPO, a PPO variant, on Pendulum.")
    parser.add_argument("--timesteps", type=float, default=100_000, help="environment steps")
    parser.add_argument("--eval-episodes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    env = make_vec_env("Pendulum-v1", n_envs=4, seed=args.seed)
    model = SPO("MlpPolicy", env, clip_range=0.2, n_steps=256, gamma=0.9, learning_rate="lin_1e-3", seed=args.seed)
    model.learn(args.timesteps)
    mean, std = evaluate_policy(model, make_vec_env("Pendulum-v1", seed=args.seed + 1000), args.eval_episodes)
    print(f"SPO: mean return {mean:.1f} ± {std:.1f} over {args.eval_episodes} episodes")


if __name__ == "__main__":
    main()
