"""Weights & Biases: metrics by environment steps, settings that can be compared, models, videos, alerts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from sb3_pgplus.callback_tree import callbacks_in
from sb3_pgplus.callbacks.description import describe_training, plain
from sb3_pgplus.callbacks.wandb_run import (
    Uploads,
    WandbOutputFormat,
    as_wandb_value,
    begin,
    end,
    histograms,
    is_own,
    model_artifact,
    uploads_of,
    wandb,  # with an error that names the extra
)
from sb3_pgplus.errors import warn_user
from sb3_pgplus.vec_env.common import check_integer

STEP = "global_step"
"""The x-axis of every metric: environment steps."""
HISTOGRAMS = ("parameters", "gradients", "all")
EXIT_FAILED = 1
EXIT_INTERRUPTED = 255  # what W&B itself reports after Ctrl-C: the run is "killed"


class WandbCallback(BaseCallback):
    """
    Track a training in Weights & Biases.

    Everything that SB3's logger gets is logged once per dump, over ``global_step``, the environment steps of the run;
    no TensorBoard is needed. The run's configuration is :func:`~sb3_pgplus.callbacks.description.describe_training`.
    Models are artifacts ``model-<run id>`` of type ``model``: ``step-<N>`` and ``latest``, and ``best`` where a
    callback before this one evaluates. What that one leaves is picked up from its attributes when a rollout ends:
    ``best_mean_reward`` (a new best makes the artifact), ``best_model_save_path`` (folder of ``best_model.zip``;
    without it the model is saved as it is) and ``last_video_path``.

    Further calls of ``learn``, and a loaded model that continues with ``reset_num_timesteps=False``, go on in the same
    run: its id is the model's attribute ``wandb_run_id``, and so in its zip file. The run stays open for that until
    :meth:`finish`, the next run or the end of the process. A run that you have begun with ``wandb.init`` is used and
    left open. Errors of W&B are a warning, once: training goes on.

    :param project: of W&B, by default what W&B itself chooses
    :param entity: user or team
    :param name: of the run
    :param group: of runs that belong together, such as the seeds of one experiment
    :param tags: of the run
    :param mode: ``"online"``, ``"offline"`` (then ``wandb sync``) or ``"disabled"``; by default as W&B is set up
    :param config: entries for the run's configuration besides those above
    :param save_model: keep the model as an artifact at the end of training, and new best ones
    :param model_freq: keep it every so many environment steps as well
    :param histograms: of ``"parameters"``, ``"gradients"`` (of the last minibatch, clipped) or ``"all"``; None: none
    :param histogram_freq: dumps of the logger from one set of histograms to the next
    :param init_kwargs: further arguments of ``wandb.init``, such as ``notes`` or ``dir``
    :param verbose: as SB3's
    :raises TypeError: if a number is no integer
    :raises ValueError: if a value is not allowed
    """

    def __init__(
        self,
        project: str | None = None,
        *,
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        mode: str | None = None,
        config: Mapping[str, Any] | None = None,
        save_model: bool = True,
        model_freq: int | None = None,
        histograms: str | None = None,
        histogram_freq: int = 10,
        init_kwargs: Mapping[str, Any] | None = None,
        verbose: int = 0,
    ) -> None:
        super().__init__(verbose)
        if isinstance(tags, str):
            raise TypeError(f"`tags` must be a list of strings, got {tags!r}")
        if histograms is not None and histograms not in HISTOGRAMS:
            raise ValueError(
                f"`histograms` must be one of {', '.join(map(repr, HISTOGRAMS))} or None, got {histograms!r}"
            )
        named = {"project": project, "entity": entity, "name": name, "group": group, "mode": mode}
        self.init_kwargs = {key: value for key, value in named.items() if value is not None} | dict(init_kwargs or {})
        if tags:
            self.init_kwargs["tags"] = list(tags)
        self.config = dict(config or {})
        self.save_model = save_model
        self.model_freq = None if model_freq is None else check_integer("model_freq", model_freq, 1)
        self.histograms = histograms
        self.histogram_freq = check_integer("histogram_freq", histogram_freq, 1)
        self.run: Any = None
        """The run of W&B; None before training, after :meth:`finish`, and where none could be begun."""
        self._uploads = Uploads()
        self._evaluations: list[Any] = []
        self._videos: dict[int, Any] = {}
        self._best = -np.inf
        self._logged_before = -1
        self._next_model: int | None = None
        self._nonfinite_before = 0
        self._n_dumps = 0
        self._warned: set[str] = set()

    # --- the run ------------------------------------------------------------------------------------------------------

    def start(self, model: BaseAlgorithm) -> None:
        """
        Begin the run before ``learn``, which does it otherwise: then connecting is not part of the training's time.

        :param model: the one that will learn
        """
        self.model = model
        with self._training_goes_on():
            self.run = self._run_of_this_training()

    def _on_training_start(self) -> None:
        with self._training_goes_on():
            self.run = self._run_of_this_training()
        if self.run is None or self.run.disabled:
            return
        with self._training_goes_on():
            self._describe()
            self._follow_steps()
        self._nonfinite_before = self._nonfinite_updates()
        self._next_model = self._next_multiple()
        self._evaluations = [c for c in callbacks_in(self.locals.get("callback")) if hasattr(c, "best_mean_reward")]
        self._videos = {id(c): getattr(c, "last_video_path", None) for c in self._evaluations}
        # A logger that the user has set is the same one for every `learn`.
        formats = [writer for writer in self.logger.output_formats if not isinstance(writer, WandbOutputFormat)]
        self.logger.output_formats = [*formats, WandbOutputFormat(self._log_row)]

    def _run_of_this_training(self) -> Any:
        """The user's own, that of the model's last ``learn``, or a new one."""
        known = getattr(self.model, "wandb_run_id", None)
        run = wandb.run
        if run is not None and is_own(run) and run.id != known:
            end(run)  # it was another model's
            run = None
        if run is None:
            run = begin(known if self._is_continued() else None, self.init_kwargs, self._warn)
        self._uploads = uploads_of(run)
        if run.disabled:
            return run
        if known not in (None, run.id):
            self._declare_origin(run)
        if run.id != known:
            self._set_on_model(wandb_run_id=run.id, wandb_steps_before=0)
            self._best = -np.inf
        return run

    def _is_continued(self) -> bool:
        """Not so if steps are counted from 0, but for a training that is resumed before its first rollout ended."""
        return self.model.num_timesteps > 0 or getattr(self.model, "_unfinished", None) is not None

    def _declare_origin(self, run: Any) -> None:
        """A run that goes on from the model of another run has that as its input; offline, W&B cannot know it."""
        origin = getattr(self.model, "wandb_artifact", None)
        if origin is not None and not run.offline and not run.disabled:
            # It may never have got there, or be gone: that is not worth a warning.
            self._uploads.start(lambda: run.use_artifact(origin, type="model"), lambda error: None)

    def _describe(self) -> None:
        config = describe_training(self.model) | plain(self.config)
        if self.run.sweep_id:  # the sweep's own values stay as it has them
            config = {name: value for name, value in config.items() if name not in self.run.config}
        self.run.config.update(config, allow_val_change=True)
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP)

    def _follow_steps(self) -> None:
        """Where this training's steps are among those of the whole run."""
        logged = self.run.summary.get(STEP)
        self._logged_before = -1 if logged is None else int(logged)
        if not self._is_continued():
            self._set_on_model(wandb_steps_before=max(self._logged_before, 0))
        best = self.run.summary.get("eval/best_mean_reward")
        self._best = self._best if best is None else max(self._best, float(best))

    def _set_on_model(self, **attributes: Any) -> None:
        """Plain values: saved with the model."""
        self.model.__dict__.update(attributes)

    @property
    def steps(self) -> int:
        """Environment steps of the run: those of this count, and of counts before it."""
        return int(self.model.num_timesteps + getattr(self.model, "wandb_steps_before", 0))

    # --- while it trains ----------------------------------------------------------------------------------------------

    def _on_step(self) -> bool:
        return True

    def _log_row(self, values: dict[str, Any]) -> None:
        """One dump of the logger."""
        if self.run is None or self.steps <= self._logged_before:
            return  # a run that was interrupted after its last checkpoint has these rows already
        with self._training_goes_on():
            row = {name: found for name, value in values.items() if (found := as_wandb_value(value)) is not None}
            if self.histograms is not None and self._n_dumps % self.histogram_freq == 0:
                row |= self._histograms()
            self._n_dumps += 1
            self.run.log({**row, STEP: self.steps})
            self._alert_of_nonfinite_updates()

    def _on_rollout_end(self) -> None:
        if self.run is None or self.run.disabled:
            return
        is_kept = self._pick_up_evaluations()
        if self.save_model and self._next_model is not None and self.num_timesteps >= self._next_model:
            self._next_model = self._next_multiple()
            if not is_kept:
                self.log_model()

    def _next_multiple(self) -> int | None:
        return None if self.model_freq is None else (self.num_timesteps // self.model_freq + 1) * self.model_freq

    def _pick_up_evaluations(self) -> bool:
        """
        No update has come between an evaluation and the end of its rollout: the model is still the one evaluated.

        :return: whether it is an artifact now
        """
        is_kept = False
        for evaluation in self._evaluations:
            video = getattr(evaluation, "last_video_path", None)
            if video is not None and video != self._videos[id(evaluation)]:
                self._videos[id(evaluation)] = video
                self.log_video(video)
            if evaluation.best_mean_reward > self._best and np.isfinite(evaluation.best_mean_reward):
                self._best = float(evaluation.best_mean_reward)
                self._keep_best(evaluation)
                is_kept = self.save_model
        return is_kept

    def _keep_best(self, evaluation: Any) -> None:
        with self._training_goes_on():
            self.run.summary["eval/best_mean_reward"] = self._best
        if self.save_model:
            folder = getattr(evaluation, "best_model_save_path", None)
            file = None if folder is None else Path(folder) / "best_model.zip"
            self.log_model(
                file if file and file.is_file() else None, aliases=["best"], metadata={"mean_reward": self._best}
            )

    def _nonfinite_updates(self) -> int:
        return int(getattr(self.model, "_nonfinite_updates", 0))

    def _alert_of_nonfinite_updates(self) -> None:
        n_new = self._nonfinite_updates() - self._nonfinite_before
        if n_new > 0:
            self._nonfinite_before += n_new
            text = (
                f"{n_new} update(s) before step {self.steps:,} had a NaN or infinite loss or gradient and were skipped."
            )
            self.run.alert("Non-finite update", text, level="WARN")

    def _histograms(self) -> dict[str, Any]:
        policy = self.model.policy
        logged: dict[str, Any] = {}
        if self.histograms != "gradients":
            logged |= histograms("parameters", policy.named_parameters())
        if self.histograms != "parameters" and getattr(self.model, "_n_updates", 0) > 0:
            logged |= histograms("gradients", ((n, p.grad) for n, p in policy.named_parameters() if p.grad is not None))
            self._tell_missing_gradients()
        return logged

    def _tell_missing_gradients(self) -> None:
        trained = ((name, p) for name, p in self.model.policy.named_parameters() if p.requires_grad)
        missing = [name for name, parameter in trained if parameter.grad is None]
        if missing and "gradients" not in self._warned:
            self._warned.add("gradients")
            algo = type(self.model).__name__
            warn_user(f"no gradient histograms of {', '.join(missing)}: {algo} leaves no gradient there")

    # --- what others may log ------------------------------------------------------------------------------------------

    def log_video(self, path: str | Path, name: str = "eval/video") -> None:
        """
        Log a video file at the present step.

        :param path: an mp4, gif, webm or ogg file
        :param name: of the metric
        """
        if self.run is not None and self.steps >= self._logged_before:  # else it has the video already
            with self._training_goes_on():
                self.run.log({name: wandb.Video(str(path)), STEP: self.steps})

    def log_model(
        self,
        path: str | Path | None = None,
        aliases: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Keep a model as an artifact, besides ``latest`` under the alias ``step-<N>``. The upload is in the background.

        :param path: a zip file; None: the model as it is now
        :param aliases: further ones
        :param metadata: besides class, environment and steps
        """
        if self.run is None or self.run.disabled:
            return
        with self._training_goes_on(), tempfile.TemporaryDirectory() as folder:
            name, version = f"model-{self.run.id}", f"step-{self.steps}"
            place = [part for part in (self.run.entity, self.run.project) if part]
            self._set_on_model(wandb_artifact=f"{'/'.join([*place, name])}:{version}")
            about = {"algo": type(self.model).__name__, "step": self.steps, **plain(metadata or {})}
            artifact = model_artifact(name, about, self._files(Path(folder), path))
            run, names = self.run, [*aliases, version]
            self._uploads.start(lambda: run.log_artifact(artifact, aliases=names), self._warn)

    def _files(self, folder: Path, model: str | Path | None) -> dict[str, Path]:
        """Name in the artifact → file; what does not exist is written to the folder."""
        files = {"model.zip": Path(model or folder / "model.zip")}
        if model is None:
            self.model.save(files["model.zip"])
        normalize = self.model.get_vec_normalize_env()
        if normalize is not None:
            files["vecnormalize.pkl"] = folder / "vecnormalize.pkl"
            normalize.save(str(files["vecnormalize.pkl"]))
        return files

    def log_summary(self, values: Mapping[str, Any]) -> None:
        """
        Set entries of the run's summary, such as the results of a final evaluation.

        :param values: name → number or text
        """
        if self.run is not None:
            with self._training_goes_on():
                self.run.summary.update(plain(values))

    # --- the end ------------------------------------------------------------------------------------------------------

    def _on_training_end(self) -> None:
        if self.run is not None and not self.run.disabled:
            self._pick_up_evaluations()
            if self.save_model:
                self.log_model()
            self.log_summary({STEP: self.steps})  # the last row may be some rollouts old
            self._uploads.wait()  # the run may be finished right after `learn`

    def on_training_failure(self, error: BaseException) -> None:
        """
        Called by ``learn`` when an error or Ctrl-C ends it: an alert, or the model so far; the run ends accordingly.

        :param error: what ended it
        """
        if self.run is None:
            return
        if isinstance(error, KeyboardInterrupt):
            if self.save_model:
                self.log_model()
            self.finish(EXIT_INTERRUPTED)
            return
        with self._training_goes_on():
            title = "Non-finite value" if "NonFinite" in type(error).__name__ else "Training failed"
            self.run.alert(title, f"Step {self.steps:,}: {error}", level="ERROR")
        self.finish(EXIT_FAILED)

    def finish(self, exit_code: int = 0) -> None:
        """
        Wait for uploads and end the run, unless it is the user's own.

        :param exit_code: 0: finished, 255: killed, others: failed
        """
        run, self.run = self.run, None
        with self._training_goes_on():
            if run is not None and is_own(run):
                end(run, exit_code)
            else:
                self._uploads.wait()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps. Arguments are those of the program that continues."""
        return {"best_mean_reward": float(self._best), "n_dumps": self._n_dumps, "n_calls": self.n_calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        :param state: of :meth:`state_dict`
        """
        self._best, self._n_dumps, self.n_calls = (state[name] for name in ("best_mean_reward", "n_dumps", "n_calls"))

    @contextmanager
    def _training_goes_on(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # network, server, disk, or a run that somebody has finished
            self._warn(error)

    def _warn(self, error: BaseException, consequence: str = "training goes on, without what it did not take") -> None:
        if "wandb" not in self._warned:
            self._warned.add("wandb")
            warn_user(
                f"Weights & Biases: {type(error).__name__}: {error}; {consequence}. Further errors are not shown."
            )
