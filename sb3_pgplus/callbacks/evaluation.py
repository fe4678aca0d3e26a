"""Evaluation while a model trains: always on the same episodes, and without any effect on the training."""

from __future__ import annotations

import io
import time
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common import callbacks as sb3_callbacks
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, is_vecenv_wrapped, sync_envs_normalization

from sb3_pgplus.configs import EnvironmentSpec
from sb3_pgplus.environments import make_environments, one_line
from sb3_pgplus.errors import warn_not_written
from sb3_pgplus.evaluation import EVALUATION_SEED, PlayedEpisodes, play_episodes, random_state_kept
from sb3_pgplus.files import write_atomically
from sb3_pgplus.playing import EVALUATION_ENVS, check_spaces, record_episodes, record_vec_env
from sb3_pgplus.statistics import iqm, iqm_interval
from sb3_pgplus.vec_env.common import check_integer

DEFAULT_EVERY = 10_000
#: What `state_dict` holds: all of it plain numbers, strings and lists.
_STATE = (
    "n_calls",
    "best_mean_reward",
    "last_mean_reward",
    "last_video_path",
    "evaluations_timesteps",
    "evaluations_results",
    "evaluations_length",
    "evaluations_successes",
    "evaluations_seconds",
)


class EvalCallback(sb3_callbacks.EvalCallback):
    """
    SB3's ``EvalCallback`` on fixed evaluation seeds: episode ``i`` of every evaluation begins with ``seed + i``.

    Environments play side by side, each seed's first episode counts, so short ones are not preferred. The random
    generators of the training stay as they are: a training with evaluations is the training without. SB3's arguments
    and attributes have SB3's meaning; ``every`` counts environment steps where ``eval_freq`` counts calls.

    It logs SB3's ``eval/mean_reward``, ``eval/mean_ep_length`` and ``eval/success_rate``, and ``eval/std_reward``,
    ``eval/iqm`` with its 95 % bootstrap interval ``eval/iqm_low`` to ``eval/iqm_high``, and ``eval/seconds``.

    :param eval_env: an id, an :class:`~sb3_pgplus.configs.EnvironmentSpec`, or environments of your own
    :param callback_on_new_best: called when the mean return is higher than ever
    :param callback_after_eval: called after every evaluation
    :param n_eval_episodes: episodes of an evaluation
    :param eval_freq: calls of this callback (steps of all environments at once) from one evaluation to the next
    :param log_path: folder for ``evaluations.npz``, None for none
    :param best_model_save_path: folder for ``best_model.zip``, None for none
    :param deterministic: the policy's mode, or samples from it
    :param render: show the environments
    :param verbose: from 1 on, print every evaluation
    :param warn: tell where no ``Monitor`` keeps the rewards from other wrappers
    :param every: environment steps from one evaluation to the next; by default 10,000
    :param seed: of the first evaluation episode
    :param n_envs: environments side by side where ``eval_env`` is an id; by default one per episode, at most ten
    :param backend: what runs them, see :func:`sb3_pgplus.vec_env.make_vec_env`
    :param video_folder: folder for a video of the first episode of every evaluation, None for none
    :raises TypeError: if a number is no integer
    :raises ValueError: if it is too small, or both ``every`` and ``eval_freq`` are given
    :raises ConfigError: if the environment cannot be made
    """

    def __init__(
        self,
        eval_env: str | EnvironmentSpec | gym.Env[Any, Any] | VecEnv,
        callback_on_new_best: sb3_callbacks.BaseCallback | None = None,
        callback_after_eval: sb3_callbacks.BaseCallback | None = None,
        n_eval_episodes: int = 10,
        eval_freq: int | None = None,
        log_path: str | Path | None = None,
        best_model_save_path: str | Path | None = None,
        deterministic: bool = True,
        render: bool = False,
        verbose: int = 1,
        warn: bool = True,
        *,
        every: int | None = None,
        seed: int = EVALUATION_SEED,
        n_envs: int | None = None,
        backend: str = "auto",
        video_folder: str | Path | None = None,
    ) -> None:
        if every is not None and eval_freq is not None:
            raise ValueError(f"give `every` (steps) or `eval_freq` (calls), not both: got {every!r} and {eval_freq!r}")
        n_eval_episodes = check_integer("n_eval_episodes", n_eval_episodes, 1)
        self.every = check_integer("every", DEFAULT_EVERY if every is None else every, 1)
        if eval_freq is not None:
            eval_freq = check_integer("eval_freq", eval_freq, 1)
        self.seed = check_integer("seed", seed, 0)
        self.video_folder = None if video_folder is None else Path(video_folder)
        self._spec: EnvironmentSpec | None = None
        if isinstance(eval_env, str | EnvironmentSpec):
            self._spec = EnvironmentSpec(eval_env) if isinstance(eval_env, str) else eval_env
            n_envs = check_integer("n_envs", min(n_eval_episodes, EVALUATION_ENVS) if n_envs is None else n_envs, 1)
            with random_state_kept():
                eval_env = make_environments(self._spec, n_envs=n_envs, seed=self.seed, backend=backend)
        elif n_envs is not None:
            raise ValueError(f"`n_envs`={n_envs} is for an id; the environments given are as many as they are")
        super().__init__(
            eval_env,
            callback_on_new_best,
            callback_after_eval,
            n_eval_episodes,
            eval_freq or 0,
            None if log_path is None else str(log_path),
            None if best_model_save_path is None else str(best_model_save_path),
            deterministic,
            render,
            verbose,
            warn,
        )
        self.last_video_path: str | None = None
        self.evaluations_seconds: list[float] = []
        """Since training began, of each evaluation."""
        self._intervals: list[tuple[float, float]] = []
        self._counts_calls = eval_freq is not None
        self._next_evaluation = 0
        self._start = time.perf_counter()

    def _init_callback(self) -> None:
        if self.model.get_vec_normalize_env() is not None and not is_vecenv_wrapped(self.eval_env, VecNormalize):
            raise ValueError(
                "the training environment is in a VecNormalize and `eval_env` is not: wrap it in "
                "VecNormalize(…, training=False, norm_reward=False), its statistics are kept in step"
            )
        check_spaces(self.model, self.eval_env, "`eval_env`" if self._spec is None else self._spec.env)
        for folder in (self.best_model_save_path, self.log_path and str(Path(self.log_path).parent)):
            if folder is not None:
                Path(folder).mkdir(parents=True, exist_ok=True)
        if self.callback_on_new_best is not None:
            self.callback_on_new_best.init_callback(self.model)

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self._start = time.perf_counter() - (self.evaluations_seconds[-1] if self.evaluations_seconds else 0.0)
        self._next_evaluation = self._following(self.num_timesteps)

    def _following(self, steps: int) -> int:
        return (steps // self.every + 1) * self.every

    def _is_due(self) -> bool:
        if self._counts_calls:
            return self.n_calls % self.eval_freq == 0
        return self.num_timesteps >= self._next_evaluation

    # --- one evaluation -----------------------------------------------------------------------------------------------

    def _on_step(self) -> bool:
        if not self._is_due():
            return True
        self._next_evaluation = self._following(self.num_timesteps)
        started = time.perf_counter()
        with random_state_kept():
            played = self._play()
            self._record_video()
        self._keep(played)
        self._log(played, time.perf_counter() - started)
        going_on = True
        if self.last_mean_reward > self.best_mean_reward:
            self.best_mean_reward = self.last_mean_reward
            if self.verbose >= 1:
                print("New best mean reward!")
            if self.best_model_save_path is not None:
                self._save_best(Path(self.best_model_save_path) / "best_model.zip")
            if self.callback_on_new_best is not None:
                going_on = self.callback_on_new_best.on_step()
        return going_on and self._on_event()

    def _play(self) -> PlayedEpisodes:
        if self.model.get_vec_normalize_env() is not None:
            sync_envs_normalization(self.training_env, self.eval_env)
        return play_episodes(
            self.model,
            self.eval_env,
            n_episodes=self.n_eval_episodes,
            seed=self.seed,
            deterministic=self.deterministic,
            after_step=self.eval_env.render if self.render else None,
            warn=self.warn,
        )

    def _keep(self, played: PlayedEpisodes) -> None:
        """Add to the attributes, and write them as SB3 does, with what it leaves out."""
        self.last_mean_reward = float(np.mean(played.returns))
        self.evaluations_timesteps.append(self.num_timesteps)
        self.evaluations_results.append(played.returns)
        self.evaluations_length.append(played.lengths)
        self.evaluations_seconds.append(time.perf_counter() - self._start)
        if played.successes:
            self.evaluations_successes.append(played.successes)
        # Each is computed once, also those of a state that was loaded: a bootstrap takes milliseconds.
        self._intervals += [iqm_interval(returns) for returns in self.evaluations_results[len(self._intervals) :]]
        if self.log_path is None:
            return
        arrays: dict[str, Any] = {
            "timesteps": self.evaluations_timesteps,
            "results": self.evaluations_results,
            "ep_lengths": self.evaluations_length,
            **({"successes": self.evaluations_successes} if self.evaluations_successes else {}),
            "seconds": self.evaluations_seconds,
            "seeds": np.arange(self.seed, self.seed + self.n_eval_episodes),
            "iqm": [iqm(returns) for returns in self.evaluations_results],
            "iqm_interval_95": self._intervals,
        }
        data = io.BytesIO()
        np.savez(data, **arrays)
        try:
            write_atomically(f"{self.log_path}.npz", data.getvalue())
        except OSError as error:
            warn_not_written(f"{self.log_path}.npz", error)

    def _save_best(self, path: Path) -> None:
        try:
            self.model.save(path)
        except OSError as error:
            warn_not_written(path, error)

    def _log(self, played: PlayedEpisodes, seconds: float) -> None:
        low, high = self._intervals[-1]
        values = {
            "mean_reward": self.last_mean_reward,
            "std_reward": float(np.std(played.returns)),
            "mean_ep_length": float(np.mean(played.lengths)),
            "iqm": iqm(played.returns),
            "iqm_low": low,
            "iqm_high": high,
            "seconds": seconds,
        }
        if played.successes:
            values["success_rate"] = float(np.mean(played.successes))
        for name, value in values.items():
            self.logger.record(f"eval/{name}", value)
        # Dumped at once, so that it has its own step and not that of the rollout's end.
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)
        if self.verbose >= 1:
            mean, std = values["mean_reward"], values["std_reward"]
            interval = f"IQM {values['iqm']:.2f} (95 % interval {low:.2f} to {high:.2f})"
            print(f"Eval num_timesteps={self.num_timesteps}, episode_reward={mean:.2f} +/- {std:.2f}, {interval}")
            print(f"Episode length: {values['mean_ep_length']:.2f}")

    def _record_video(self) -> None:
        """What cannot be rendered costs the videos, with one warning, and not the training."""
        if self.video_folder is None:
            return
        video = self.video_folder / f"step-{self.num_timesteps}.mp4"
        try:
            if self._spec is not None:
                record_episodes(self.model, self._spec, video, seed=self.seed, deterministic=self.deterministic)
            else:
                record_vec_env(self.model, self.eval_env, video, seed=self.seed, deterministic=self.deterministic)
        except Exception as error:  # each renderer fails in its own way
            warnings.warn(f"no videos of the evaluations: {one_line(error)}", stacklevel=2)
            self.video_folder = None
        else:
            self.last_video_path = str(video)

    # --- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What an exact continuation needs, as plain values."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        :param state: of :meth:`state_dict`
        :raises ValueError: if an entry is missing
        """
        if missing := set(_STATE) - state.keys():
            raise ValueError(f"the state of an EvalCallback must have {', '.join(sorted(missing))}")
        self._intervals = []
        for name in _STATE:
            setattr(self, name, [*state[name]] if isinstance(state[name], list) else state[name])

    def close(self) -> None:
        """Close the evaluation environments that were made from an id; those given are their maker's to close."""
        if self._spec is not None:
            self.eval_env.close()
