"""The part of the base class that makes checkpoints, and goes on from one as if nothing had happened."""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback

from sb3_pgplus import checkpoints
from sb3_pgplus.construction import PLUMBING
from sb3_pgplus.errors import CheckpointError, warn_user
from sb3_pgplus.hparams import PolicyGradientHparams
from sb3_pgplus.training_state import (
    capture_callbacks,
    capture_generators,
    capture_log,
    hand_out_states,
    plain_attributes,
    restore_attributes,
    restore_generators,
    restore_log,
    surroundings,
    unmap_tensors,
    warn_about_surroundings,
)
from sb3_pgplus.vec_env.make import make_vec_env
from sb3_pgplus.vec_env.state_trees import Tree, from_tree
from sb3_pgplus.vec_env.states import capture_state, restore_state

if TYPE_CHECKING:  # a mix-in of one class: let the type checker see what it is mixed into
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm as _Base
else:
    _Base = object

#: What the environments returned last.
_LAST = ("_last_obs", "_last_original_obs", "_last_episode_starts")
#: Deques of SB3's, which know how many episodes they keep.
_WINDOWS = ("ep_info_buffer", "ep_success_buffer")


class Resuming(_Base):
    """Checkpoints and :meth:`resume`."""

    hparams_class: type[PolicyGradientHparams]
    #: The id that the environments were made from, if it was one.
    _env_id: str | None
    #: Iterations of this training.
    _iteration: int
    #: What a resumed training still has to put in place.
    _unfinished: dict[str, Tree] | None
    #: The checkpoint that the model was resumed from.
    _resumed_from: Path | None
    #: Where this training has written checkpoints.
    _checkpoint_folder: Path | None

    @classmethod
    def resume(
        cls, path: str | PathLike[str], env: GymEnv | None = None, device: Any = "auto", **load_arguments: Any
    ) -> Self:
        """
        Take up an interrupted training.

        The first ``learn`` afterwards finishes the interrupted one: give it the same arguments, the total number of
        steps included. Everything goes on as it would have without the interruption, bit for bit, if the environments
        give their state; otherwise they begin new episodes, and a warning says so.

        :param path: a checkpoint, a folder of them or a run folder: then its newest intact checkpoint
        :param env: environments like those of the interrupted training; None suffices if the model made them from an id
        :param device: as SB3's
        :param load_arguments: further ones of :meth:`load`
        :return: the model
        :raises CheckpointError: if there is no intact checkpoint, or it belongs to another class or other environments
        """
        found = checkpoints.find(Path(path))
        state = found.state
        if state["algorithm"] != cls.__name__:
            raise CheckpointError(f"{found.path} is of {state['algorithm']}: resume it with that class")
        env = _environments(found) if env is None else env
        n_envs = getattr(env, "num_envs", 1)
        if n_envs != state["n_envs"]:
            raise CheckpointError(f"{found.path} is of {state['n_envs']} environments, and `env` has {n_envs}")
        model = cls.load(io.BytesIO(found.content), env, device, force_reset=False, **load_arguments)
        model._take_over(found)
        return model

    def _take_over(self, found: checkpoints.Checkpoint) -> None:
        self._unfinished, self._resumed_from = found.state, found.path
        self._env_id, self._iteration = found.state["env_id"], found.state["iteration"]
        self.ep_info_buffer, self.ep_success_buffer = (deque(maxlen=self._stats_window_size) for _ in _WINDOWS)
        self._restore(found.state["model"])

    def _restore(self, attributes: Mapping[str, Tree]) -> None:
        for name, tree in attributes.items():
            value = from_tree(tree, getattr(self, name, None))
            setattr(self, name, unmap_tensors(value, self.device))

    # --- making a checkpoint ------------------------------------------------------------------------------------------

    def checkpoint(self, callback: BaseCallback) -> bytes:
        """
        Everything that a training goes on from, as the content of a checkpoint file. Only between two iterations.

        :param callback: the training's callback, which may hold others
        """
        model = io.BytesIO()
        self.save(model)
        return checkpoints.pack(model.getvalue(), self._training_state(callback))

    def _training_state(self, callback: BaseCallback) -> dict[str, Tree]:
        assert self.env is not None
        environments, reasons = capture_state(self.env)
        left_out = {*self.hparams_class.names(), *PLUMBING, *self._excluded_save_params(), "start_time"}
        return {
            "algorithm": type(self).__name__,
            "env_id": self._env_id,
            "n_envs": self.n_envs,
            "iteration": self._iteration,
            "surroundings": surroundings(self.device),
            "model": plain_attributes(self, left_out),
            "nanoseconds": time.time_ns() - int(self.start_time),
            "log": capture_log(self.logger),
            "generators": capture_generators(self.action_space),
            "callbacks": capture_callbacks(callback),
            "environments": environments,
            "missing": reasons,
        }

    # --- going on from one --------------------------------------------------------------------------------------------

    def _resume_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> Any:
        """``_setup_learn`` of a training that was interrupted: clocks and counters go on, whatever is to be reset."""
        state = self._unfinished
        assert state is not None
        before = state["model"]
        result = super()._setup_learn(total_timesteps, callback, False, tb_log_name, progress_bar)
        callback = result[1]
        self.start_time = time.time_ns() - state["nanoseconds"]
        self._num_timesteps_at_start = before["_num_timesteps_at_start"]
        self._total_timesteps = total_timesteps + self._num_timesteps_at_start
        self._warn_about_total(before["_total_timesteps"])
        warn_about_surroundings(state["surroundings"], surroundings(self.device))
        restore_log(self.logger, state["log"])
        hand_out_states(callback, state["callbacks"])
        return self._total_timesteps, callback

    def _warn_about_total(self, before: int) -> None:
        done, total = self.num_timesteps, self._total_timesteps
        if done >= total:
            warn_user(f"Nothing is left to train: the checkpoint has {done} of {total} steps.")
        elif total != before:
            warn_user(
                f"The interrupted training was to have {before} steps, and this one has {total}: schedules go on over "
                "the new total, so the result is not that of the interrupted one."
            )

    def _restore_environments(self, state: Mapping[str, Tree]) -> None:
        """Put the environments where they were, or have new episodes begin."""
        assert self.env is not None
        reasons = state["missing"]
        if state["environments"] is not None:
            try:
                restore_state(self.env, state["environments"])
            except ValueError as error:
                raise CheckpointError(f"{self._resumed_from} does not fit the environments: {error}") from error
        # Once more: `set_env` may have come in between.
        self._restore({name: tree for name, tree in state["model"].items() if name in _LAST})
        if state["environments"] is None or reasons:
            why = "; ".join(reasons) or "the environments give no state"
            warn_user(f"The environments begin new episodes, because their state is not in the checkpoint ({why}).")
            self._last_obs = None
            if self.seed is not None:
                self.env.seed((self.seed + self.num_timesteps) % 2**31)  # not the episodes of the beginning once more

    def _finish_resuming(self, callback: BaseCallback) -> None:
        """What comes last, after everything that a training's beginning may draw or reset."""
        if self._unfinished is None:
            return
        state, self._unfinished, self._resumed_from = self._unfinished, None, None
        restore_attributes(callback, state["callbacks"])
        restore_generators(state["generators"], self.action_space)


def _environments(found: checkpoints.Checkpoint) -> GymEnv:
    """Make the environments as the model's constructor did."""
    env_id, n_envs = found.state["env_id"], found.state["n_envs"]
    if env_id is None:
        raise CheckpointError(f"{found.path} does not say how its {n_envs} environment(s) are made: give `env`")
    return make_vec_env(env_id, n_envs) if n_envs > 1 else maybe_make_env(env_id, 0)
