"""
Gymnasium's MuJoCo v5 tasks in one batch: N simulations step in MuJoCo's own threads, without N Python environments.

Observations, rewards and ends of episodes are those of SB3's ``DummyVecEnv`` bit for bit.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
from gymnasium.utils import seeding
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

from sb3_pgplus.errors import BackendError
from sb3_pgplus.vec_env.common import Array, check_integer, find_spec, indices_of, usable_cpus
from sb3_pgplus.vec_env.episodes import RUNNING, EpisodeMonitor, running_infos
from sb3_pgplus.vec_env.mujoco_data import hidden_state
from sb3_pgplus.vec_env.mujoco_tasks import ALL, TASKS, Outcome, Rows, Task
from sb3_pgplus.vec_env.placement import WorkerPlacement, thread_ids
from sb3_pgplus.vec_env.state_trees import generator_from, to_tree

WRAPPERS_OF_MAKE = (TimeLimit, OrderEnforcing, PassiveEnvChecker)
#: RL Zoo, once imported, puts its own in Gymnasium's place; through a vector environment both say the same.
TIME_LIMIT_OF_RL_ZOO = "rl_zoo3.gym_patches:PatchedTimeLimit"
#: Attributes of a Gymnasium environment that follow its simulation, which the template's does not.
STATE_ATTRIBUTES = frozenset({"model", "data", "mujoco_renderer", "_np_random", "_np_random_seed"})
#: What comes from classes and wrappers instead, and is the same for all copies.
SHARED_ATTRIBUTES = frozenset(
    {"spec", "dt", "metadata", "render_mode", "action_space", "observation_space"}
) | frozenset({"_max_episode_steps"})
MONITOR_ATTRIBUTES = ("episode_returns", "episode_lengths", "episode_times")
MONITOR_GETTERS = {
    "get_episode_rewards": "episode_returns",
    "get_episode_lengths": "episode_lengths",
    "get_episode_times": "episode_times",
    "get_total_steps": "total_steps",
}


class MujocoVecEnv(VecEnv):
    """
    N copies of a Gymnasium MuJoCo v5 task, each as in a ``Monitor``, on one ``mujoco.batch.Batch``.

    :param env_id: registered id of one of the eleven tasks
    :param n_envs: N
    :param env_kwargs: for ``gymnasium.make``; the settings of all copies are read from one environment made so
    :param n_threads: of the simulation, by default one per copy, and at most one per CPU that this process may use
    :param full_infos: give the task's own info entries in every step, not only where an episode ends
    :raises BackendError: if what is asked for cannot be had here, or might differ from Gymnasium
    """

    backend = "mujoco"
    actions: Array

    def __init__(
        self,
        env_id: str,
        n_envs: int,
        *,
        env_kwargs: Mapping[str, Any] | None = None,
        n_threads: int | None = None,
        full_infos: bool = False,
    ) -> None:
        task_class, batch_class = find_task(env_id), find_batch_class()
        self._env = make_template(env_id, env_kwargs or {}, task_class)
        self.n_threads = min(n_envs, usable_cpus()) if n_threads is None else check_integer("n_threads", n_threads, 1)
        model = self._env.unwrapped.model
        before = thread_ids()
        self._batch = make_batch(batch_class, model, n_envs, self.n_threads, task_class.needs_contact_forces)
        started = thread_ids() - before
        # Should others have started meanwhile, they cannot be told apart; and /proc may be another namespace's.
        is_clear = len(started) == self.n_threads - 1 and threading.get_native_id() in before
        self._placement = WorkerPlacement(started if is_clear else ())
        self._task: Task | None = task_class(self._env.unwrapped, self._batch)
        observed, declared = self._task.observations(ALL).shape[1:], self._env.observation_space.shape
        if observed != declared:  # Gymnasium's humanoids count 1 as True in their space only
            raise BackendError(f"the observations of {env_id} are of shape {observed}, and its space of {declared}")
        self._owner = os.getpid()
        super().__init__(n_envs, self._env.observation_space, self._env.action_space)
        self.metadata = self._env.metadata
        self.full_infos = full_infos
        is_limited = is_wrapped(self._env, TimeLimit)
        self._time_limit = self._env.get_wrapper_attr("_max_episode_steps") if is_limited else np.iinfo(np.int64).max
        self._frame_skip = self._env.unwrapped.frame_skip
        self._generators: list[np.random.Generator | None] = [None] * n_envs
        self._was_reset = False
        # The states before the last step, for rendering, and where each copy's camera looks.
        self._states_before: Array | None = self._batch.state.copy() if self.render_mode == "rgb_array" else None
        self._lookat: dict[int, Array] = {}
        self.episodes = EpisodeMonitor(n_envs)

    # --- stepping ---

    def reset(self) -> Array:
        task = self._usable_task()
        self.episodes.start_all()
        for i, seed in enumerate(self._seeds):
            if seed is not None or self._generators[i] is None:
                self._generators[i] = seeding.np_random(seed)[0]
        self._was_reset, task.is_restored = True, False
        observations = self._start_episodes(task, np.arange(self.num_envs))
        # Used once, as everywhere in SB3. None of these tasks has options.
        self._reset_seeds()
        self._reset_options()
        return observations

    def step_async(self, actions: Array) -> None:
        actions = np.ascontiguousarray(actions)
        expected = (self.num_envs, *(self.action_space.shape or ()))
        if actions.shape != expected:
            raise ValueError(f"`actions` must have shape {expected}, got {actions.shape}")
        self.actions = actions

    def step_wait(self) -> tuple[Array, Array, Array, list[dict[str, Any]]]:
        task = self._usable_task()
        if not self._was_reset:
            raise RuntimeError("Tried to step environment that needs reset")
        if task.is_restored:
            task.is_restored = False
        else:
            task.before_step()
        task.ctrl[...] = self.actions
        if self._states_before is not None:
            np.copyto(self._states_before, self._batch.state)
        self._placement.keep_apart()
        self._batch.step(nstep=self._frame_skip)
        task.after_step()
        outcome = task.outcome(self.actions)
        observations = task.observations(ALL)
        self.episodes.add(outcome.rewards)
        dones: Array = outcome.terminated | (self.episodes.lengths >= self._time_limit)
        infos = self._infos(task, outcome)
        if np.count_nonzero(dones):  # faster than any() on a few bytes
            self._end_episodes(task, outcome, np.flatnonzero(dones), observations, infos)
        return observations, outcome.rewards.astype(np.float32), dones, infos

    def _infos(self, task: Task, outcome: Outcome) -> list[dict[str, Any]]:
        if not self.full_infos:
            return running_infos(self.num_envs)
        return [info | RUNNING for info in split(task.step_info() | outcome.terms, ALL)]

    def _end_episodes(
        self, task: Task, outcome: Outcome, rows: Array, observations: Array, infos: list[dict[str, Any]]
    ) -> None:
        """
        Put in place the infos of episodes that end here, and the first observations of the next ones.

        :param rows: which copies
        :param observations: of the step, ``[N, d]``; those of ``rows`` are replaced
        :param infos: of the step, changed in place
        """
        own_infos = split(task.step_info() | outcome.terms, rows)
        for i, own_info, final_observation in zip(rows.tolist(), own_infos, observations[rows], strict=True):
            infos[i] = self.episodes.finish(i, own_info, outcome.terminated[i], final_observation)
        observations[rows] = self._start_episodes(task, rows)

    def _start_episodes(self, task: Task, rows: Array) -> Array:
        """:return: the first observations of the copies ``rows``, ``[K, d]``"""
        import mujoco

        self._batch.reset(rows, stage=mujoco.mjtStage.mjSTAGE_NONE.value)
        for i in rows.tolist():
            generator = self._generators[i]
            assert generator is not None  # reset() made it
            task.qpos[i], task.qvel[i] = task.sample_state(generator)
        self._batch.forward(rows)
        task.after_reset(rows)
        reset_info = task.reset_info()
        for i, info in zip(rows.tolist(), split(reset_info, rows) if reset_info else [{} for _ in rows], strict=True):
            self.reset_infos[i] = info
        return task.observations(rows)

    def _usable_task(self) -> Task:
        if self._task is None:
            raise RuntimeError("this MujocoVecEnv was closed; make another one")
        if os.getpid() != self._owner and self.n_threads > 1:
            raise RuntimeError(
                "this MujocoVecEnv was made in the process that forked this one, and its threads stayed there: make it "
                "inside the process that uses it, start that process with 'spawn' or 'forkserver', or pass n_threads=1"
            )
        return self._task

    def close(self) -> None:
        if self._task is not None:
            self._task = self._batch = None
            self._env.close()
            self.episodes.close()

    # --- the state, for checkpoints ---

    def get_state(self) -> dict[str, Any]:
        """:return: everything that the next steps and resets depend on, as a plain tree"""
        task = self._usable_task()
        return {
            "task": task.get_state(),
            "simulations": self._batch.state.copy(),
            "before": None if self._states_before is None else self._states_before.copy(),
            "lookat": {str(env): point.copy() for env, point in self._lookat.items()},
            "generators": to_tree(self._generators),
            "was_reset": self._was_reset,
            "episodes": self.episodes.get_state(),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """
        Go on from where another batch of the same task was.

        :param state: what :meth:`get_state` returned there
        :raises ValueError: if it is the state of another model
        """
        task, rows = self._usable_task(), state["simulations"]
        if rows.shape != self._batch.state.shape:
            raise ValueError(f"the state has simulations of shape {rows.shape}, not {self._batch.state.shape}")
        self._batch.state[...] = rows
        task.set_state(state["task"])
        if self._states_before is not None:
            self._states_before[...] = rows if state["before"] is None else state["before"]
        self._lookat = {int(env): point.copy() for env, point in state["lookat"].items()}
        self._generators = [None if tree is None else generator_from(tree) for tree in state["generators"]]
        self._was_reset = state["was_reset"]
        self.episodes.set_state(state["episodes"])

    # --- pictures ---

    def get_images(self) -> Sequence[Array | None]:
        return self._images(range(self.num_envs))

    def _images(self, copies: Sequence[int]) -> list[Array | None]:
        """Only of those asked for: the first picture of a copy decides where its camera looks."""
        if self.render_mode != "rgb_array":
            warnings.warn(
                f"The render mode is {self.render_mode}, but this method assumes it is `rgb_array` to obtain images.",
                stacklevel=3,
            )
            return [None] * len(copies)
        self._usable_task()
        if not self._was_reset:
            raise gym.error.ResetNeeded("Cannot render before calling reset()")
        return [self._image(i) for i in copies]

    def _image(self, env: int) -> Array:
        """
        Gymnasium's camera on copy ``env``.

        Gymnasium draws the pose of the last substep's beginning, which a batch does not keep. So the step is taken once
        more, in the template's simulation.
        """
        import mujoco

        template = self._env.unwrapped
        model, data, state = template.model, template.data, mujoco.mjtState.mjSTATE_INTEGRATION
        mujoco.mj_resetData(model, data)
        if self.episodes.lengths[env] == 0:
            mujoco.mj_setState(model, data, self._batch.state[env], state)
            mujoco.mj_forward(model, data)
        else:
            assert self._states_before is not None  # render_mode is rgb_array
            mujoco.mj_setState(model, data, self._states_before[env], state)
            mujoco.mj_step(model, data, nstep=self._frame_skip)
        renderer = template.mujoco_renderer
        # Gymnasium points a copy's camera once, at the first picture of that copy.
        lookat = (renderer.default_cam_config or {}).get("lookat")
        if env not in self._lookat:
            self._lookat[env] = np.median(data.geom_xpos, axis=0) if lookat is None else lookat
        if renderer.viewer is not None:  # the first picture of all makes it, and points it so
            renderer.viewer.cam.lookat[:] = self._lookat[env]
        image: Array = renderer.render("rgb_array")
        return image

    # --- the copies, as far as there are any ---

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """
        An attribute of the copies, if it is the same for all of them or one of the ``Monitor``'s.

        :param attr_name: its name
        :param indices: which copies, by default all
        :raises AttributeError: if there is none, or if it belongs to the state of a simulation
        """
        copies = indices_of(indices, self.num_envs)
        if attr_name in MONITOR_ATTRIBUTES:
            return [getattr(self.episodes, attr_name)[i] for i in copies]
        if attr_name == "total_steps":
            return [self.episodes.total_steps for _ in copies]
        value = self._env.get_wrapper_attr(attr_name)
        settings = vars(self._env.unwrapped).keys() - STATE_ATTRIBUTES
        if attr_name not in settings | SHARED_ATTRIBUTES:
            self._refuse(f"the attribute {attr_name!r} of single copies")
        return [value for _ in copies]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """
        Refused: settings are read once.

        :raises AttributeError: always
        """
        self._refuse(f"setting {attr_name!r} after the environments are made (pass it in env_kwargs)")

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """
        The ``Monitor``'s getters, ``render`` and ``get_wrapper_attr``.

        :param method_name: its name
        :param indices: which copies, by default all
        :raises AttributeError: on any other method
        """
        copies = indices_of(indices, self.num_envs)
        methods: dict[str, Callable[..., list[Any]]] = {
            name: lambda attribute=attribute: self.get_attr(attribute, copies)
            for name, attribute in MONITOR_GETTERS.items()
        }
        methods["get_wrapper_attr"] = lambda name: self.get_attr(name, copies)
        methods["render"] = lambda: self._images(copies)
        if method_name not in methods:
            self._env.get_wrapper_attr(method_name)
            self._refuse(f"the method {method_name!r} of single copies")
        return methods[method_name](*method_args, **method_kwargs)

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Any = None) -> list[bool]:
        """
        :param wrapper_class: ``Monitor`` or one of ``gymnasium.make``'s own wrappers, to have True
        :param indices: which copies, by default all
        """
        return [is_wrapped(self._env, wrapper_class) for _ in indices_of(indices, self.num_envs)]

    def _refuse(self, what: str) -> NoReturn:
        raise AttributeError(
            f"MujocoVecEnv simulates all copies in one batch and does not offer {what}: "
            'make_vec_env(..., backend="dummy") has one Gymnasium environment per copy'
        )

    def __getstate__(self) -> NoReturn:
        raise TypeError("MujocoVecEnv cannot be pickled or copied, its simulations live in MuJoCo: make another one")


def split(columns: Mapping[str, Array], rows: Rows) -> list[dict[str, Any]]:
    """
    Turn one array per entry into one dictionary per environment.

    :param columns: name → ``[N]`` or ``[N, d]``
    :param rows: which K environments
    :return: K dictionaries
    """
    values = zip(*(column[rows] for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in values]


# --- can it be had? ---------------------------------------------------------------------------------------------------


def find_task(env_id: Any) -> type[Task]:
    """
    Look the task up without building an environment.

    :param env_id: what ``make_vec_env`` was given
    :raises BackendError: if it is not the id of one of the eleven tasks
    """
    spec = find_spec(env_id) if isinstance(env_id, str) else None
    point: Any = None if spec is None else spec.entry_point
    name = point if isinstance(point, str) else f"{point.__module__}:{point.__qualname__}" if point else ""
    if name not in TASKS:
        what = env_id if isinstance(env_id, str) else "a class or function that builds environments"
        raise BackendError(f"it has Gymnasium's eleven MuJoCo tasks of version v5, and {what} is none of them")
    return TASKS[name]


def find_batch_class() -> Any:
    """
    :return: ``mujoco.batch.Batch``
    :raises BackendError: if what is installed has none, or rounds differently
    """
    try:
        batch_class = importlib.import_module("mujoco.batch").Batch
    except ImportError as error:
        raise BackendError('it needs MuJoCo 3.17 or newer, run: pip install "sb3_pgplus[mujoco]"') from error
    if not hasattr(np, "vecdot"):
        # NumPy 1 promotes float32 scalars and float32 arrays differently, so rewards would not be Gymnasium's.
        raise BackendError(f"it needs NumPy 2 or newer, and {np.__version__} is installed")
    return batch_class


def make_template(env_id: str, env_kwargs: Mapping[str, Any], task_class: type[Task]) -> Any:
    """
    Build the one environment that settings, spaces and camera are taken from.

    :param env_id: registered id
    :param env_kwargs: for ``gymnasium.make``
    :param task_class: what its id promises
    :raises BackendError: if it is not what its id promises, or wrapped, or draws in a window
    """
    env = Monitor(gym.make(env_id, **{"render_mode": "rgb_array", **env_kwargs}))
    layer: Any = env.env
    while isinstance(layer, gym.Wrapper):
        name = f"{type(layer).__module__}:{type(layer).__qualname__}"
        if type(layer) not in WRAPPERS_OF_MAKE and name != TIME_LIMIT_OF_RL_ZOO:
            raise BackendError(f"{env_id} comes in a {type(layer).__name__}, and it cannot serve wrappers")
        layer = layer.env
    if TASKS.get(f"{type(layer).__module__}:{type(layer).__qualname__}") is not task_class:
        raise BackendError(f"{env_id} is a {type(layer).__name__}, not the task that its id promises")
    if env.render_mode not in (None, "rgb_array"):
        raise BackendError(f"`render_mode` may be 'rgb_array' or None here, not {env.render_mode!r}")
    if reason := hidden_state(layer.model):
        raise BackendError(f"the model of {env_id} has {reason}")
    if task_class.needs_contact_forces and _has_force_sensors(layer.model):
        raise BackendError(f"the model of {env_id} has sensors that compute contact forces, also at a reset")
    return env


def _has_force_sensors(model: Any) -> bool:
    """:return: whether MuJoCo computes the forces between bodies for sensors; otherwise it does on request only"""
    import mujoco

    kinds = ("ACCELEROMETER", "FORCE", "TORQUE", "FRAMELINACC", "FRAMEANGACC")
    return bool(np.isin(model.sensor_type, [getattr(mujoco.mjtSensor, f"mjSENS_{kind}") for kind in kinds]).any())


def make_batch(batch_class: Any, model: Any, n_envs: int, n_threads: int, persistent: bool) -> Any:
    """
    :param batch_class: ``mujoco.batch.Batch``
    :param model: of the template
    :param n_envs: N
    :param n_threads: see :class:`MujocoVecEnv`
    :param persistent: whether each simulation keeps its data between steps
    :raises BackendError: if the batch refuses the model
    """
    try:
        batch = batch_class(model, n_envs, n_threads, persistent)
    except ValueError as error:
        raise BackendError(f"MuJoCo does not take this model in a batch: {error}") from error
    BATCHES.add(batch)
    return batch


BATCHES: weakref.WeakSet[Any] = weakref.WeakSet()


def _never_free_batches_of_the_parent() -> None:
    """In a forked child, freeing a batch would wait for ever: its threads stayed in the parent."""
    for batch in BATCHES:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(batch))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_never_free_batches_of_the_parent)
