"""
A sweep of Weights & Biases: its server chooses the settings, agents on any number of machines train with them.

What you learn here: WandbCallback uses the run that the sweep has begun, and the sweep's metric is the evaluation's.
A sweep needs the server, so log in first. A search without one, with several seeds for each trial: `sb3-pgplus tune`.

    python examples/wandb_sweep.py                     # makes the sweep and trains ten times
    wandb agent ENTITY/sb3_pgplus/SWEEP                # more of it, elsewhere; the program prints the name
"""

import argparse
import os

import wandb
from stable_baselines3.common.callbacks import EvalCallback

from sb3_pgplus import PPOPlus, make_vec_env
from sb3_pgplus.callbacks import WandbCallback

parser = argparse.ArgumentParser(description="Sweep over PPOPlus's settings on CartPole.")
parser.add_argument("--timesteps", type=float, default=50_000, help="environment steps of each run")
parser.add_argument("--count", type=int, default=10, help="runs of this agent")
parser.add_argument("--project", default="sb3_pgplus")
args = parser.parse_args()

SWEEP = {
    "program": "examples/wandb_sweep.py",
    "command": ["${env}", "python", "${program}", "--timesteps", str(args.timesteps)],
    "method": "bayes",
    "metric": {"name": "eval/mean_reward", "goal": "maximize"},
    "parameters": {  # names of the constructor
        "learning_rate": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
        "n_epochs": {"values": [4, 8, 16]},
        "gamma": {"values": [0.98, 0.99, 0.995]},
    },
}


def train() -> None:
    with wandb.init() as run:
        model = PPOPlus("MlpPolicy", "CartPole-v1", n_envs=8, n_steps=128, batch_size=256, seed=0, **dict(run.config))
        evaluation = EvalCallback(make_vec_env("CartPole-v1", seed=1000), eval_freq=256, verbose=0)
        model.learn(args.timesteps, callback=[evaluation, WandbCallback()])


if "WANDB_SWEEP_ID" in os.environ:  # `wandb agent` has started this program
    train()
else:
    wandb.agent(wandb.sweep(SWEEP, project=args.project), train, count=args.count)
