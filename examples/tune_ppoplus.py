"""
Tune PPOPlus with a plain Optuna study: your objective, your space, one callback of this package.

What you learn here: OptunaCallback evaluates, reports to the trial and ends a training that the pruner gives up.
Several seeds per trial, shared studies and a ranking on test seeds come with the command `sb3-pgplus tune`.

    python examples/tune_ppoplus.py
    python examples/tune_ppoplus.py --timesteps 50000 --trials 50
"""

import argparse

import optuna
from stable_baselines3.common.env_util import make_vec_env

from sb3_pgplus import PPOPlus
from sb3_pgplus.tuning import OptunaCallback

parser = argparse.ArgumentParser(description="Tune PPOPlus on CartPole.")
parser.add_argument("--timesteps", type=float, default=20_000, help="environment steps of each trial")
parser.add_argument("--trials", type=int, default=20)
args = parser.parse_args()


def objective(trial: optuna.Trial) -> float:
    rate = trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)
    gamma = 1 - trial.suggest_float("one_minus_gamma", 1e-3, 0.1, log=True)
    model = PPOPlus("MlpPolicy", "CartPole-v1", n_envs=4, n_steps=64, learning_rate=rate, gamma=gamma, seed=0)
    callback = OptunaCallback(trial, make_vec_env("CartPole-v1"), eval_freq=int(args.timesteps / 5))
    model.learn(args.timesteps, callback=callback)
    if callback.pruned:
        raise optuna.TrialPruned
    return callback.last_mean_reward


study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner())
study.optimize(objective, n_trials=args.trials)
n_pruned = len(study.get_trials(states=[optuna.trial.TrialState.PRUNED]))
print(f"{args.trials} trials, {n_pruned} of them pruned")
print(f"best mean return {study.best_value:.1f} with {study.best_params}")
