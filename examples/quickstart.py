"""
Train, evaluate, save and load: the life of a model in one file.

What you learn here: PPOPlus takes SB3's arguments and works with SB3's tools, and one zip file is the whole model.
The running mean and standard deviation of the observations are inside it, so nothing else is saved or loaded.

    python examples/quickstart.py
    python examples/quickstart.py --timesteps 100000
"""

import argparse
from pathlib import Path

import gymnasium as gym
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_pgplus import PPOPlus


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train PPOPlus on CartPole, evaluate it, save it, load it.")
    parser.add_argument("--timesteps", type=float, default=50_000, help="environment steps, 5e4 is fine")
    parser.add_argument("--eval-episodes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder for the model")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()

    # Eight environments side by side, 128 steps in each: a rollout is 1024 samples.
    env = make_vec_env("CartPole-v1", n_envs=8, seed=args.seed)
    model = PPOPlus("MlpPolicy", env, n_steps=128, batch_size=256, learning_rate="lin_1e-3", seed=args.seed)
    model.learn(args.timesteps)

    # An environment of its own for the evaluation. It is raw: the policy normalises what it sees by itself.
    eval_env = make_vec_env("CartPole-v1", n_envs=1, seed=args.seed + 1000)
    mean, std = evaluate_policy(model, eval_env, n_eval_episodes=args.eval_episodes)
    print(f"trained:  mean return {mean:.1f} ± {std:.1f} over {args.eval_episodes} episodes")

    path = args.out / "cartpole.zip"
    model.save(path)
    print(f"saved:    {path}, {path.stat().st_size / 1024:.0f} KiB")

    loaded = PPOPlus.load(path)
    observation, _ = gym.make("CartPole-v1").reset(seed=args.seed)
    before, _ = model.predict(observation, deterministic=True)
    after, _ = loaded.predict(observation, deterministic=True)
    print(f"loaded:   chooses action {after}, the model that was saved {before}")


if __name__ == "__main__":
    main()
