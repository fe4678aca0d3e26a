"""For studies of your own: a callback that evaluates, reports to Optuna and stops what Optuna prunes."""

from __future__ import annotations

import optuna
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_pgplus.vec_env.common import check_integer


class OptunaCallback(EvalCallback):
    """
    SB3's ``EvalCallback`` that reports every evaluation to a trial and ends a training that the pruner gives up.

    After ``learn``, raise ``optuna.TrialPruned()`` if ``pruned``, otherwise return ``last_mean_reward``.

    :param trial: Optuna's trial
    :param eval_env: the environment to evaluate in, raw
    :param n_eval_episodes: episodes of an evaluation
    :param eval_freq: environment steps from one evaluation to the next
    :param deterministic: the policy's mode, or samples from it
    """

    def __init__(
        self,
        trial: optuna.Trial,
        eval_env: VecEnv,
        *,
        n_eval_episodes: int = 5,
        eval_freq: int = 10_000,
        deterministic: bool = True,
    ) -> None:
        eval_freq = check_integer("eval_freq", eval_freq, 1)
        super().__init__(
            eval_env, n_eval_episodes=n_eval_episodes, eval_freq=eval_freq, deterministic=deterministic, verbose=0
        )
        self.trial = trial
        self._steps_between = eval_freq
        self.pruned = False

    def _on_training_start(self) -> None:
        super()._on_training_start()
        # EvalCallback counts its calls, and there is one for a step of all environments.
        self.eval_freq = max(self._steps_between // self.training_env.num_envs, 1)

    def _on_step(self) -> bool:
        going_on = super()._on_step()
        if self.n_calls % self.eval_freq == 0:
            self.trial.report(float(self.last_mean_reward), self.num_timesteps)
            self.pruned = self.trial.should_prune()
        return going_on and not self.pruned
