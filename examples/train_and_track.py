"""
Train with tracking: curves, settings and the best model in Weights & Biases, evaluations along the way.

What you learn here: WandbCallback needs no TensorBoard and no set-up, and it picks up what the evaluation before it
leaves. Without a network or an account: WANDB_MODE=offline, and `wandb sync` later. Needs the extra `wandb`.

    python examples/train_and_track.py
    WANDB_MODE=offline python examples/train_and_track.py --timesteps 20000
"""

import argparse

from sb3_pgplus import PPOPlus, make_vec_env
from sb3_pgplus.callbacks import EvalCallback, WandbCallback

parser = argparse.ArgumentParser(description="Train PPOPlus on CartPole and track it.")
parser.add_argument("--timesteps", type=float, default=100_000, help="environment steps")
parser.add_argument("--project", default="sb3_pgplus", help="of Weights & Biases")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--out", default="runs/train_and_track", help="folder of the best model")
args = parser.parse_args()

env = make_vec_env("CartPole-v1", n_envs=8, seed=args.seed)
model = PPOPlus("MlpPolicy", env, n_steps=128, batch_size=256, learning_rate="lin_1e-3", seed=args.seed)
evaluation = EvalCallback("CartPole-v1", every=2000, best_model_save_path=args.out, verbose=0)
tracking = WandbCallback(args.project, name=f"cartpole-seed{args.seed}", tags=["example"])
model.learn(args.timesteps, callback=[evaluation, tracking])
print(f"best mean return {evaluation.best_mean_reward:.1f}, run {model.wandb_run_id}")
tracking.finish()
