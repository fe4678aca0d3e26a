"""
Gymnasium's vector environments as an SB3 ``VecEnv``.

The two libraries disagree about the step after an episode's end. SB3 returns the next episode's first observation at
once and puts the last one into ``infos``; Gymnasium's default spends a step on it, whose action and reward belong to no
transition. That step never reaches the learner here: ended environments are reset by a masked ``reset`` instead.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv, VectorWrapper
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.preprocessing import check_for_nested_spaces
from stable_baselines3.common.vec_env import VecEnv

from sb3_pgplus.errors import BackendError
from sb3_pgplus.vec_env.common import Array, Indices, find_spec, indices_of
from sb3_pgplus.vec_env.episodes import RUNNING, EpisodeMonitor, running_infos

_ADVICE = (
    "Build it with gym.make_vec(..., vectorization_mode='sync', "
    "vector_kwargs={'autoreset_mode': gym.vector.AutoresetMode.SAME_STEP})."
)
_PROBING_STEPS = 30  # until observations are no longer those of a reset
_FINAL_KEYS = ("final_obs", "_final_obs", "final_info", "_final_info")


class GymnasiumVecEnv(VecEnv):
    """
    Any ``gymnasium.vector.VectorEnv`` with SB3's semantics and ``Monitor``'s episode statistics.

    :param env: the vector environment, in any autoreset mode
    :param full_infos: give the environment's own info entries in every step, not only where an episode ends
    :raises TypeError: if it is no vector environment
    :raises ValueError: if its autoreset mode is unknown or does not allow correct transitions, if SB3 cannot use its
        observations, or if a wrapper around it cannot work here
    """

    backend = "gymnasium"

    def __init__(self, env: VectorEnv[Any, Any], full_infos: bool = False) -> None:
        if not isinstance(env, VectorEnv):
            raise TypeError(f"expected a gymnasium.vector.VectorEnv, got {type(env).__name__}")
        if "DictInfoToList" in _wrappers_of(env):
            raise ValueError(
                "DictInfoToList takes apart infos that are read here as Gymnasium gives them: leave it out"
            )
        self.env = env
        self._is_closed = False
        self.full_infos = full_infos
        self.autoreset_mode = _autoreset_mode(env)
        self.episodes = EpisodeMonitor(env.num_envs)
        self._actions: Array | None = None
        _check_observation_space(env.single_observation_space)
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)
        self.metadata = {**env.metadata, **self.metadata}

    # --- stepping ---------------------------------------------------------------------------------------------------

    def reset(self) -> Any:
        """
        Start a new episode in every environment; environment ``i`` is seeded with ``i`` more than :meth:`seed` was.

        :return: observations ``[N, ...]``, a dict of such for Dict spaces
        :raises ValueError: if the environments were given different options
        """
        self._check_open()
        every = self._options
        self._reset_options()  # used only once, also if they are refused
        options = every[0]
        if any(other != options for other in every):
            raise ValueError("a Gymnasium vector environment takes the same reset options for all its environments")
        self.episodes.start_all()
        observations, infos = self._reset_all(self._seeds[0], options)
        self.reset_infos = [info_of(infos, i, self.num_envs) for i in range(self.num_envs)]
        self._reset_seeds()  # used only once
        return self._own_copy(observations)

    def step_async(self, actions: Array) -> None:
        """
        :param actions: ``[N, ...]``
        """
        self._actions = np.asarray(actions)

    def step_wait(self) -> Any:
        """
        Take the step.

        :return: observations ``[N, ...]``, rewards ``[N]``, dones ``[N]``, infos
        """
        self._check_open()
        observations, rewards, terminated, truncated, infos = self.env.step(self._actions)
        rewards = np.asarray(rewards)
        terminated, truncated = np.asarray(terminated, dtype=bool), np.asarray(truncated, dtype=bool)
        dones = terminated | truncated
        observations = self._own_copy(observations)
        self.episodes.add(rewards)
        if self.full_infos:
            sb3_infos = [{**self._info(infos, index), **RUNNING} for index in range(self.num_envs)]
        else:
            sb3_infos = running_infos(self.num_envs)
        if dones.any():
            self._end_episodes(dones, terminated, observations, infos, sb3_infos)
        return observations, rewards.astype(np.float32), dones, sb3_infos

    def _end_episodes(
        self,
        dones: Array,
        terminated: Array,
        observations: Any,
        infos: Mapping[str, Any],
        sb3_infos: list[dict[str, Any]],
    ) -> None:
        """Write the next episodes' first observations into ``observations``, and what ended into ``sb3_infos``."""
        ended = np.flatnonzero(dones).tolist()
        same_step = self.autoreset_mode is AutoresetMode.SAME_STEP
        finals = _final_observations(infos) if same_step else observations
        final_infos = infos.get("final_info", {}) if same_step else infos
        for index in ended:
            info, final_observation = self._info(final_infos, index), observation_of(finals, index)
            sb3_infos[index] = self.episodes.finish(index, info, terminated[index], final_observation)
        reset_infos = infos if same_step else self._reset_ended(dones, observations)
        for index in ended:
            self.reset_infos[index] = self._info(reset_infos, index)

    def _reset_ended(self, dones: Array, observations: Any) -> Mapping[str, Any]:
        """Reset some environments and write their observations into ``observations``; return Gymnasium's infos."""
        if dones.all():
            new, infos = self.env.reset()
        else:
            new, infos = self.env.reset(options={"reset_mask": dones.copy()})
            self._check_partial_reset(~dones, observations, new)
        for target, source in array_pairs(observations, new):
            target[dones] = np.asarray(source)[dones]
        return infos

    def _check_partial_reset(self, running: Array, before: Any, after: Any) -> None:
        """
        Environments may ignore the mask. Looked at each time, since it does not show where those that go on happen to
        be where episodes begin.
        """
        for old, new in array_pairs(before, after):
            if np.shape(new) != old.shape or not _same(old[running], np.asarray(new, dtype=old.dtype)[running]):
                raise ValueError(
                    f"{self.env} resets in mode {self.autoreset_mode.name} and ignores "
                    "reset(options={'reset_mask': ...}): when some episodes end and others go on, there is no way to "
                    f"get the correct next observations from it. {_ADVICE}"
                )

    def _reset_all(self, seed: int | None, options: dict[str, Any]) -> tuple[Any, Mapping[str, Any]]:
        return self.env.reset(seed=seed, options=options or None)

    def _info(self, infos: Mapping[str, Any], index: int) -> dict[str, Any]:
        if not isinstance(infos, Mapping):  # an array of dicts
            return dict(infos[index] or {})
        return info_of({k: v for k, v in infos.items() if k not in _FINAL_KEYS}, index, self.num_envs)

    def _own_copy(self, observations: Any) -> Any:
        """Copies, because environments may write the next step into the same memory; in the space's type."""
        if isinstance(self.observation_space, spaces.Dict):
            return {
                key: np.array(observations[key], dtype=space.dtype) for key, space in self.observation_space.items()
            }
        return np.array(observations, dtype=self.observation_space.dtype)

    def get_state(self) -> dict[str, Any]:
        """:return: the statistics of the episodes; the vector environment has a state of its own"""
        return {"episodes": self.episodes.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """
        Undo :meth:`get_state`.

        :param state: what it returned
        """
        self.episodes.set_state(state["episodes"])

    def close(self) -> None:
        """Close the vector environment."""
        self._is_closed = True
        self.env.close()
        self.episodes.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError(f"this {type(self).__name__} was closed; make another one")

    # --- the single environments ------------------------------------------------------------------------------------

    def has_attr(self, attr_name: str) -> bool:
        """
        :param attr_name: an attribute of the environments
        """
        if hasattr(self.env.unwrapped, "call"):  # asked for a missing attribute, AsyncVectorEnv stops its workers
            return all(self.env.unwrapped.call("has_wrapper_attr", attr_name))
        return hasattr(self.env, attr_name) or hasattr(self.env.unwrapped, attr_name)

    def get_attr(self, attr_name: str, indices: Indices = None) -> list[Any]:
        """
        Read an attribute of the environments. One that is computed for all at once has the same for each.

        :param attr_name: which attribute
        :param indices: which environments
        :raises AttributeError: if there is no such attribute
        """
        chosen = indices_of(indices, self.num_envs)
        base: Any = self.env.unwrapped
        if hasattr(base, "envs"):
            return [base.envs[i].get_wrapper_attr(attr_name) for i in chosen]
        if not self.has_attr(attr_name):
            raise AttributeError(f"{self.env} has no attribute {attr_name!r}")
        if hasattr(base, "get_attr"):
            values = base.get_attr(attr_name)
            return [values[i] for i in chosen]
        owner = self.env if hasattr(self.env, attr_name) else base
        return [getattr(owner, attr_name)] * len(chosen)

    def set_attr(self, attr_name: str, value: Any, indices: Indices = None) -> None:
        """
        Set an attribute where the environments, or wrappers around them, have it.

        :param attr_name: which attribute
        :param value: the same for all of them
        :param indices: which environments
        :raises NotImplementedError: for some of several environments that share a process or a computation
        """
        chosen = indices_of(indices, self.num_envs)
        base: Any = self.env.unwrapped
        if hasattr(base, "envs"):
            for i in chosen:
                base.envs[i].set_wrapper_attr(attr_name, value)
            return
        self._refuse_some_of_many(chosen, "set an attribute")
        if hasattr(base, "set_attr"):
            base.set_attr(attr_name, [value] * self.num_envs)
        else:
            setattr(base, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: Indices = None, **method_kwargs: Any
    ) -> list[Any]:
        """
        Call a method of the environments.

        :param method_name: which method
        :param indices: which environments
        :return: what each of them returned
        :raises NotImplementedError: for some of several environments that share a process or a computation
        """
        chosen = indices_of(indices, self.num_envs)
        base: Any = self.env.unwrapped
        if hasattr(base, "envs"):
            return [base.envs[i].get_wrapper_attr(method_name)(*method_args, **method_kwargs) for i in chosen]
        self._refuse_some_of_many(chosen, "call a method")
        if not self.has_attr(method_name):
            raise AttributeError(f"{self.env} has no method {method_name!r}")
        if hasattr(base, "call"):
            return list(base.call(method_name, *method_args, **method_kwargs))
        return [getattr(base, method_name)(*method_args, **method_kwargs)] * self.num_envs

    def _refuse_some_of_many(self, chosen: list[int], what: str) -> None:
        if sorted(chosen) != list(range(self.num_envs)):
            raise NotImplementedError(f"{self.env} can {what} for all its environments only")

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Indices = None
    ) -> list[bool]:
        """
        Tell whether the environments are in a wrapper. ``Monitor``: yes, its statistics are in ``infos``.

        :param wrapper_class: which wrapper
        :param indices: which environments
        """
        chosen = indices_of(indices, self.num_envs)
        if issubclass(wrapper_class, Monitor):
            return [True] * len(chosen)
        envs: Sequence[Any] | None = getattr(self.env.unwrapped, "envs", None)
        return [envs is not None and is_wrapped(envs[i], wrapper_class) for i in chosen]

    def get_images(self) -> Sequence[Array | None]:
        """Render every environment to an RGB image; None without ``render_mode="rgb_array"``."""
        frames: Any = self.env.render() if self.render_mode == "rgb_array" else None
        return [None] * self.num_envs if frames is None else list(frames)


def make_vector_env(env_id: Any, n_envs: int, env_kwargs: Mapping[str, Any]) -> VectorEnv[Any, Any]:
    """
    Build an id's own vector environment if it has one that gives correct transitions, else N environments in a row.

    :param env_id: registered id
    :param n_envs: N
    :param env_kwargs: for the environments
    :raises BackendError: if the environment is not given by its id
    """
    if not isinstance(env_id, str):
        raise BackendError("it needs an environment's id, and this is a class or function that builds environments")
    spec = find_spec(env_id)
    if spec is not None and spec.vector_entry_point is not None:
        native = gym.make_vec(env_id, n_envs, "vector_entry_point", **env_kwargs)
        if spec.entry_point is None or _resets_partially(native):
            return native
        native.close()
    arguments: Any = {"vectorization_mode": "sync", "vector_kwargs": {"autoreset_mode": AutoresetMode.SAME_STEP}}
    try:  # as SB3 does
        return gym.make_vec(env_id, n_envs, **arguments, **{"render_mode": "rgb_array", **env_kwargs})
    except TypeError:
        return gym.make_vec(env_id, n_envs, **arguments, **env_kwargs)


def _resets_partially(env: VectorEnv[Any, Any]) -> bool:
    """:return: whether it resets at the end of an episode, or visibly just the environments that a mask names"""
    if env.metadata.get("autoreset_mode") is AutoresetMode.SAME_STEP:
        return True
    if env.num_envs == 1:
        return True  # its episodes all end at once
    mask = np.arange(env.num_envs) == 0

    def others_same(first: Any, second: Any) -> bool:
        return all(_same(old[~mask], new[~mask]) for old, new in array_pairs(first, second))

    actions = copy.deepcopy(env.action_space)
    actions.seed(0)  # the same answer every time
    first = before = copy.deepcopy(env.reset(seed=0)[0])
    for _ in range(_PROBING_STEPS):  # where all episodes begin alike, a reset only shows after a step
        observations, _, terminated, truncated, _ = env.step(actions.sample())
        before = copy.deepcopy(observations)
        if not others_same(first, before):
            break
        if np.any(terminated) or np.any(truncated):
            env.reset()
    after, _ = env.reset(options={"reset_mask": mask.copy()})
    return not others_same(first, before) and others_same(before, after)


def _wrappers_of(env: VectorEnv[Any, Any]) -> set[str]:
    """:return: names of Gymnasium's classes around a vector environment, those of a user's subclasses included"""
    names: set[str] = set()
    layer: Any = env
    while isinstance(layer, VectorWrapper):
        names |= {c.__name__ for c in type(layer).__mro__ if c.__module__.startswith("gymnasium.")}
        layer = layer.env
    return names


def _autoreset_mode(env: VectorEnv[Any, Any]) -> AutoresetMode:
    declared = env.metadata.get("autoreset_mode")
    try:
        mode = AutoresetMode(declared)
    except ValueError as error:
        raise ValueError(
            f"{env} declares the autoreset mode {declared!r} in its metadata; without one of {list(AutoresetMode)} "
            "nobody can tell which observations are an episode's last"
        ) from error
    base = env.unwrapped
    if mode is AutoresetMode.NEXT_STEP and isinstance(base, AsyncVectorEnv) and not base.shared_memory:
        raise ValueError(
            "AsyncVectorEnv without shared memory resets an environment once more after a masked reset "
            "(as of Gymnasium 1.4), which would make garbage transitions. Set shared_memory=True, or choose another "
            "autoreset mode: vector_kwargs={'autoreset_mode': gym.vector.AutoresetMode.SAME_STEP}."
        )
    return mode


def _check_observation_space(space: spaces.Space[Any]) -> None:
    check_for_nested_spaces(space)
    parts = space.values() if isinstance(space, spaces.Dict) else [space]
    if isinstance(space, spaces.Tuple) or any(part.shape is None for part in parts):
        raise ValueError(f"SB3 cannot learn from observations of {space}")


def _final_observations(infos: Mapping[str, Any]) -> Any:
    if "final_obs" not in infos:
        raise ValueError(
            "an episode ended, but the vector environment, whose autoreset mode is SAME_STEP, gave no "
            "infos['final_obs']: its last observation is lost"
        )
    return infos["final_obs"]


def _same(first: Array, second: Array) -> bool:
    return np.array_equal(first, second, equal_nan=first.dtype.kind == "f")


# --- Gymnasium's batches ----------------------------------------------------------------------------------------------


def info_of(infos: Mapping[str, Any], index: int, n_envs: int) -> dict[str, Any]:
    """
    Take one environment's info out of Gymnasium's dict of arrays, where ``infos["_key"]`` says who has ``"key"``.

    :param infos: arrays ``[N, ...]``, dicts of such, or values that all environments share
    :param index: which environment
    :param n_envs: N
    :return: what that environment told, in arrays of its own
    """
    info = {}
    for key, value in infos.items():
        if key.startswith("_") and key[1:] in infos:
            continue
        has_it = infos.get(f"_{key}")
        if has_it is None or has_it[index]:
            info[key] = _entry(value, index, n_envs)
    return info


def _entry(value: Any, index: int, n_envs: int) -> Any:
    if isinstance(value, Mapping):
        return info_of(value, index, n_envs)
    batched = isinstance(value, (list, tuple)) or np.ndim(value) > 0
    if not batched or len(value) != n_envs:
        return value
    entry = value[index]
    return entry.copy() if isinstance(entry, np.ndarray) else entry


def observation_of(observations: Any, index: int) -> Any:
    """
    Copy one environment's observation out of a batch.

    :param observations: ``[N, ...]``, or a dict of such
    :param index: which environment
    """
    if isinstance(observations, Mapping):
        return {key: np.array(values[index]) for key, values in observations.items()}
    if isinstance(observations[index], Mapping):  # an array of dicts
        return {key: np.array(value) for key, value in observations[index].items()}
    return np.array(observations[index])


def array_pairs(first: Any, second: Any) -> list[tuple[Array, Any]]:
    """
    The arrays of two batches of observations, side by side.

    :param first: ``[N, ...]``, or a dict of such
    :param second: likewise, with the same keys
    """
    return [(first[key], second[key]) for key in first] if isinstance(first, dict) else [(first, second)]
