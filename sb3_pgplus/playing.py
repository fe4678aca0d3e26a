"""Use a trained run: load it, evaluate it on fixed seeds, watch it, record it to a video."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import check_for_correct_spaces

from sb3_pgplus.configs import ConfigError, EnvironmentSpec, algorithm_class, known_backend, read_mapping
from sb3_pgplus.environments import Wrapper, installation_advice, make_environments, one_line, torch_threads
from sb3_pgplus.evaluation import EVALUATION_SEED, play_episodes
from sb3_pgplus.run_folder import RunFolder
from sb3_pgplus.statistics import iqm, iqm_interval
from sb3_pgplus.videos import video_writer

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env import VecEnv

EVALUATION_ENVS = 10
"""Most environments side by side, where the user has not said how many."""


# --- evaluation -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """Undiscounted returns and lengths of whole episodes in the raw environment."""

    env: str
    seed: int
    deterministic: bool
    returns: list[float]
    lengths: list[int]

    def summary(self) -> dict[str, Any]:
        """Return the statistics as plain values, for ``evaluation.yml``."""
        return {
            "env": self.env,
            "n_episodes": len(self.returns),
            "deterministic": self.deterministic,
            "seed": self.seed,
            "mean_return": float(np.mean(self.returns)),
            "std_return": float(np.std(self.returns)),
            "min_return": float(np.min(self.returns)),
            "max_return": float(np.max(self.returns)),
            "iqm_return": iqm(self.returns),
            "iqm_interval_95": list(iqm_interval(self.returns)),
            "mean_length": float(np.mean(self.lengths)),
            "returns": self.returns,
            "lengths": self.lengths,
        }


def evaluate(
    model: BaseAlgorithm,
    spec: EnvironmentSpec,
    *,
    n_episodes: int = 10,
    seed: int = EVALUATION_SEED,
    deterministic: bool = True,
    backend: str = "auto",
    render_mode: str | None = None,
    outer_wrapper: Wrapper | None = None,
) -> Evaluation:
    """
    Play whole episodes, side by side unless somebody watches; the same arguments give the same episodes.

    :param model: the model; its own observation normalisation is part of ``predict``
    :param spec: the environment
    :param n_episodes: number of episodes; episode ``i`` is the first one of the seed ``seed + i``
    :param seed: of the environments, and of the actions where they are sampled
    :param deterministic: the policy's mode, or samples from it
    :param backend: what runs the environment, see :func:`sb3_pgplus.vec_env.make_vec_env`
    :param render_mode: ``"human"`` shows the episodes
    :param outer_wrapper: one more wrapper around the environment
    :raises ConfigError: if the model is not made for this environment
    """
    n_envs = 1 if render_mode or outer_wrapper else min(n_episodes, EVALUATION_ENVS)
    env = make_environments(
        spec, n_envs=n_envs, seed=seed, backend=backend, render_mode=render_mode, outer_wrapper=outer_wrapper
    )
    try:
        check_spaces(model, env, spec.env)
        with torch_threads(env.observation_space):
            played = play_episodes(model, env, n_episodes=n_episodes, seed=seed, deterministic=deterministic)
    finally:
        env.close()
    return Evaluation(spec.env, seed, deterministic, played.returns, played.lengths)


def check_spaces(model: BaseAlgorithm, env: VecEnv, env_id: str) -> None:
    """
    Refuse environments that a model was not made for.

    :param model: the model
    :param env: the environments, raw
    :param env_id: their name, for the message
    :raises ConfigError: if observations or actions are of another kind
    """
    try:
        # The model's own spaces are those after SB3's wrapping (images channel first), so wrap before comparing.
        check_for_correct_spaces(model._wrap_env(env, 0), model.observation_space, model.action_space)
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"this model was not trained for {env_id}: {error}") from error


# --- loading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadedRun:
    """A model, ready to play, and the environment it was trained in."""

    model: BaseAlgorithm
    environment: EnvironmentSpec
    path: Path
    """The model's file."""
    backend: str = "auto"
    """What ran the environments of the training."""


def load_run(
    path: Path, *, env: str | None = None, algo: str | None = None, device: str = "auto", trusted: bool = True
) -> LoadedRun:
    """
    Load a run folder or a model file; ``config.yml`` beside the model (or one folder up) says what it is.

    :param path: folder or ``.zip``
    :param env: environment to play in, by default the one it was trained in
    :param algo: name of the algorithm, by default the configuration's
    :param device: where the policy runs
    :param trusted: False: load no pickle, and import nothing that ``config.yml`` names
    :raises ConfigError: if there is no model or it is not known what to do with it
    """
    file = _model_file(path)
    folders = [RunFolder(folder) for folder in (file.parent, file.parent.parent)]
    config = next((folder.config for folder in folders if folder.config.is_file()), None)
    settings = read_mapping(config) if config else {}
    if env is not None and (env != settings.get("env") or not trusted):
        # Wrappers belong to the environment they were written for, and are code.
        spec, backend = EnvironmentSpec(env), "auto"
    elif "env" in settings:
        spec, backend = EnvironmentSpec.from_settings(settings), known_backend(settings.get("backend", "auto"))
    else:
        raise ConfigError(f"there is no config.yml beside {file} to say which environment it plays: give --env")
    if not trusted and env is None and (spec.env_wrapper or ":" in spec.env):
        raise ConfigError(f"{config} names code to import, {spec.env_wrapper or spec.env}: trust it, or give --env")
    algorithm = algorithm_class(str(algo or settings.get("algo") or "ppoplus"))
    try:
        model = algorithm.load(file, device=device, trusted=trusted)
    except (ValueError, TypeError, KeyError, RuntimeError, AssertionError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{file} cannot be loaded as {algorithm.__name__}: {error}") from error
    return LoadedRun(model, spec, file, backend)


def _model_file(path: Path) -> Path:
    if path.is_dir():
        folder = RunFolder(path)
        if not folder.model.is_file():
            failed = f"; the run failed, see {folder.error}" if folder.error.is_file() else ""
            raise ConfigError(f"{path} holds no model.zip{failed or ': is it a run folder, and has training ended?'}")
        return folder.model
    if not path.is_file():
        with_ending = path.with_name(path.name + ".zip")
        if with_ending.is_file():  # SB3's `model.save("name")` writes name.zip
            return with_ending
        raise ConfigError(f"there is no {path}: give a run folder or a model's .zip file")
    return path


# --- watching and recording -------------------------------------------------------------------------------------------


def has_display() -> bool:
    """Tell whether a window can be opened."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def prepare_offscreen_rendering() -> None:
    """
    Where there is no display, choose how to render without one; what the user has set is left alone.

    Must be called before the environment is made: MuJoCo and SDL read these variables when they are first used.
    """
    if has_display():
        return
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    if "MUJOCO_GL" not in os.environ and find_spec("mujoco") is not None:
        backend = next((name for name in ("egl", "osmesa") if _mujoco_can_render(name)), None)
        if backend is not None:
            os.environ["MUJOCO_GL"] = backend


def _mujoco_can_render(backend: str) -> bool:
    # In a process of its own: PyOpenGL keeps the first platform it loads, a failed attempt here would spoil the next.
    code = "import mujoco; mujoco.GLContext(8, 8).make_current()"
    command, environment = [sys.executable, "-c", code], os.environ | {"MUJOCO_GL": backend}
    try:
        return not subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False).returncode
    except (OSError, subprocess.TimeoutExpired):
        return False


class _FrameTap(gym.Wrapper[Any, Any, Any, Any]):
    """Render after every reset and step; SB3's vector environments would reset before the last frame is seen."""

    def __init__(self, env: gym.Env[Any, Any], write: Callable[[Any], None], n_episodes: int) -> None:
        super().__init__(env)
        self._write = write
        self._episodes_left = n_episodes
        self._first_frame: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        result = self.env.reset(seed=seed, options=options)
        if self._episodes_left > 0:
            # Shown once a step follows: between two episodes the environment is reset twice.
            self._first_frame = self._frame()
        return result

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        result = self.env.step(action)
        if self._episodes_left > 0:
            if self._first_frame is not None:
                self._write(self._first_frame)
                self._first_frame = None
            self._write(self._frame())
        self._episodes_left -= bool(result[2] or result[3])
        return result

    def _frame(self) -> Any:
        try:
            return self.env.render()
        except Exception as error:  # each renderer fails in its own way
            raise ConfigError(_rendering_advice(self.env, error)) from error


def _rendering_advice(env: gym.Env[Any, Any], error: Exception) -> str:
    spec = env.unwrapped.spec
    name, entry_point = (spec.id, str(spec.entry_point)) if spec else ("the environment", "")
    reason = one_line(error)
    if "mujoco" in entry_point:
        return (
            f"cannot render {name} ({reason}): without a screen MuJoCo needs EGL or OSMesa. Install the system package "
            "libegl1 (or libosmesa6) and set MUJOCO_GL=egl (or MUJOCO_GL=osmesa)"
        )
    return f"cannot render {name} ({reason}); {installation_advice(name) if spec else 'install what it asks for'}"


def watch(
    run: LoadedRun, *, n_episodes: int = 1, seed: int = EVALUATION_SEED, deterministic: bool = True
) -> Evaluation:
    """
    Show episodes in a window.

    :param run: what to play
    :param n_episodes: number of episodes
    :param seed: of the environment
    :param deterministic: the policy's mode, or samples from it
    :raises ConfigError: if the environment cannot be shown
    """
    try:
        return evaluate(
            run.model,
            run.environment,
            n_episodes=n_episodes,
            seed=seed,
            deterministic=deterministic,
            render_mode="human",
        )
    except ConfigError:
        raise
    except Exception as error:  # each renderer fails in its own way
        raise ConfigError(
            f"cannot show {run.environment.env} in a window ({one_line(error)}): add --record to make a video instead"
        ) from error


def record(
    run: LoadedRun, video: Path, *, n_episodes: int = 1, seed: int = EVALUATION_SEED, deterministic: bool = True
) -> Evaluation:
    """
    Record episodes of a run to an mp4 file, see :func:`record_episodes`.

    :param run: what to play
    :param video: the file
    :param n_episodes: number of episodes, one after the other in the same video
    :param seed: of the environment
    :param deterministic: the policy's mode, or samples from it
    :raises ConfigError: if the environment cannot be rendered or a package is missing
    """
    return record_episodes(
        run.model, run.environment, video, n_episodes=n_episodes, seed=seed, deterministic=deterministic
    )


def record_episodes(
    model: BaseAlgorithm,
    spec: EnvironmentSpec,
    video: Path,
    *,
    n_episodes: int = 1,
    seed: int = EVALUATION_SEED,
    deterministic: bool = True,
) -> Evaluation:
    """
    Record episodes to an mp4 file, with or without a screen; the file appears only once it is complete.

    :param model: the model
    :param spec: the environment
    :param video: the file
    :param n_episodes: number of episodes, one after the other in the same video
    :param seed: of the environment
    :param deterministic: the policy's mode, or samples from it
    :raises ConfigError: if the environment cannot be rendered or a package is missing
    """
    prepare_offscreen_rendering()
    with video_writer(video) as writer:
        return evaluate(
            model,
            spec,
            n_episodes=n_episodes,
            seed=seed,
            deterministic=deterministic,
            render_mode="rgb_array",
            outer_wrapper=lambda env: _FrameTap(env, writer.at_speed(env.metadata), n_episodes),
        )


def record_vec_env(
    model: BaseAlgorithm, env: VecEnv, video: Path, *, seed: int = EVALUATION_SEED, deterministic: bool = True
) -> None:
    """
    Record one episode of the first of these environments; its last frame is lost, as they reset by themselves.

    :param model: the model
    :param env: made with ``render_mode="rgb_array"``
    :param video: the file
    :param seed: of the environment
    :param deterministic: the policy's mode, or samples from it
    :raises ConfigError: if they render no frames or a package is missing
    """
    with video_writer(video) as writer:
        write = writer.at_speed(env.metadata)
        play_episodes(
            model,
            env,
            n_episodes=1,
            seed=seed,
            deterministic=deterministic,
            after_step=lambda: write(env.get_images()[0]),
            warn=False,
        )
