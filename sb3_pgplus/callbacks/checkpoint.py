"""Checkpoints that a training can be resumed from, bit for bit."""

from __future__ import annotations

import math
import signal
from collections.abc import Mapping
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import Any, cast

from stable_baselines3.common.callbacks import BaseCallback

from sb3_pgplus import checkpoints
from sb3_pgplus.errors import CheckpointError, warn_user
from sb3_pgplus.interruptions import Interruption, act_on
from sb3_pgplus.on_policy import PolicyGradientPlus
from sb3_pgplus.training_state import named_callbacks


class CheckpointCallback(BaseCallback):
    """
    Write checkpoints for ``PPOPlus.resume``: at the beginning, every so many steps, at the end, and when asked to stop.

    They are made between two iterations, the first time that is possible after ``every`` steps. Where the disk is full
    a warning names the file, training goes on and older checkpoints stay.

    :param path: folder for ``step-000010240.zip``, …; it must not hold checkpoints of another training
    :param every: environment steps from one checkpoint to the next; None: only when asked to stop
    :param keep: how many of the newest stay, and the best besides
    :param on_signals: on Ctrl-C, and on SIGTERM, which cluster schedulers send, finish the iteration, write a
        checkpoint, and only then raise ``KeyboardInterrupt`` or end the process with exit code 143. Signals that the
        program handles itself are left alone
    :param interruption: the signals of a program that handles them itself: training ends after the checkpoint
    :param verbose: from 1 on, print the name of each checkpoint
    :raises TypeError: on an argument of the wrong type
    :raises ValueError: on a number that is too small
    """

    def __init__(
        self,
        path: str | PathLike[str],
        every: float | None = None,
        keep: int = 3,
        *,
        on_signals: bool = True,
        interruption: Interruption | None = None,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        self.folder = Path(path)
        self.every = None if every is None else _whole("every", every)
        self.keep = _whole("keep", keep)
        handles = on_signals and interruption is None
        self._own_signals = Interruption([signal.SIGINT, signal.SIGTERM], only_unhandled=True) if handles else None
        self._interruption = interruption or self._own_signals
        #: Steps of the newest checkpoint, its file, and the best evaluation so far.
        self._newest_steps = -1
        self._newest: Path | None = None
        self._best_score = -math.inf
        self._wants_best: float | None = None
        #: Callbacks that evaluate.
        self._judges: list[Any] | None = None

    # --- what SB3 calls -----------------------------------------------------------------------------------------------

    def _init_callback(self) -> None:
        if not isinstance(self.model, PolicyGradientPlus):
            raise TypeError(f"checkpoints are for PPOPlus, A2CPlus and TRPOPlus, not for {type(self.model).__name__}")
        if self.every is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        checkpoints.remove_leftovers(self.folder)

    def _on_training_start(self) -> None:
        self._check_folder()
        self._judges = None
        if self._own_signals is not None:
            self._own_signals.__enter__()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        self._release_signals()

    def on_learn_return(self) -> None:
        """Called when ``learn`` is over: after a signal the program ends, now that all callbacks have ended well."""
        if self._own_signals is not None and self._own_signals.signal is not None:
            number, self._own_signals.signal = self._own_signals.signal, None
            act_on(number)

    def on_training_failure(self, error: BaseException) -> None:
        """
        Called when training ends with an error.

        :param error: which
        """
        self._release_signals()

    def _release_signals(self) -> None:
        if self._own_signals is not None:
            self._own_signals.__exit__()

    # --- between two iterations ---------------------------------------------------------------------------------------

    def on_iteration_end(self, callback: BaseCallback) -> bool:
        """
        Write a checkpoint if one is due.

        :param callback: the training's callback, whose state it will hold
        :return: False after a signal
        """
        steps = self.model.num_timesteps
        self._look_for_best(callback)
        is_new = steps != self._newest_steps
        if self._wants_best is not None or (is_new and (self.is_asked_to_stop or self._is_due(steps))):
            self._write(steps, callback)
        self._wants_best = None
        return not self.is_asked_to_stop

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether a signal has come."""
        return self._interruption is not None and self._interruption.signal is not None

    def _is_due(self, steps: int) -> bool:
        if self.every is None:
            return False
        is_over = steps >= self.model._total_timesteps
        return is_over or self._newest_steps < 0 or steps // self.every > self._newest_steps // self.every

    def mark_best(self, score: float) -> None:
        """
        Write a checkpoint when this iteration is over, and keep it as the best until this is called again.

        SB3's ``EvalCallback``, and ours, need not: their ``best_mean_reward`` is watched.

        :param score: of the evaluation
        """
        self._wants_best = float(score)

    def _look_for_best(self, callback: BaseCallback) -> None:
        if self._judges is None:
            members = named_callbacks(callback).values()
            self._judges = [member for member in members if hasattr(member, "best_mean_reward")]
        best = max((float(judge.best_mean_reward) for judge in self._judges), default=-math.inf)
        if best > self._best_score:
            self._best_score = best
            if self.every is not None:
                self.mark_best(best)

    def _write(self, steps: int, callback: BaseCallback) -> None:
        self._newest_steps = steps  # whether or not it can be written: it is tried again when the next one is due
        content = cast(PolicyGradientPlus[Any], self.model).checkpoint(callback)
        try:
            self._newest = checkpoints.write(self.folder, steps, content, keep=self.keep)
            if self._wants_best is not None:
                checkpoints.mark_best(self._newest, self._wants_best)
        except OSError as error:
            self._newest = None
            warn_user(
                f"The checkpoint {checkpoints.path_of(self.folder, steps)} could not be written "
                f"({error.strerror or error}). Training goes on, and older checkpoints stay."
            )
            return
        if self.verbose >= 1:
            print(f"Checkpoint: {self._newest}", flush=True)

    # --- the folder ---------------------------------------------------------------------------------------------------

    def _check_folder(self) -> None:
        """Refuse to mix the checkpoints of two trainings: the newest file would not be the newest state."""
        model = cast(PolicyGradientPlus[Any], self.model)
        found = checkpoints.in_folder(self.folder)
        origin = model._resumed_from
        is_own = self.folder.resolve() == model._checkpoint_folder
        if origin is not None and origin.resolve().parent == self.folder.resolve():
            for path in found:
                if checkpoints.steps_of(path) > model.num_timesteps:  # damaged, or passed over by the user
                    path.rename(path.with_suffix(".zip.passed-over"))
            if origin.is_file():
                self._newest_steps, self._newest = model.num_timesteps, origin
        elif found and not (is_own and checkpoints.steps_of(found[0]) <= model.num_timesteps):
            raise CheckpointError(
                f"{self.folder} holds checkpoints of another training ({found[0].name}): resume that one with "
                f"{type(model).__name__}.resume({str(self.folder)!r}), or give another folder"
            )
        model._checkpoint_folder = self.folder.resolve()

    # --- its own state ------------------------------------------------------------------------------------------------

    def state_dict(self) -> Mapping[str, Any]:
        """What the callback of a resumed training goes on from."""
        return {"every": self.every, "best_score": self._best_score, "n_calls": self.n_calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Go on as the callback of the interrupted training, with its ``every`` if this one has none.

        :param state: of :meth:`state_dict`
        """
        self.every = state["every"] if self.every is None else self.every
        self._best_score, self.n_calls = state["best_score"], state["n_calls"]


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` must be a whole number of at least 1, got {value!r}")
    number = float(value)
    if not (number >= 1 and number.is_integer()):
        raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}")
    return int(number)
