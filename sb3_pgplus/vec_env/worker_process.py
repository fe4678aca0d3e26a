"""
The worker process of :mod:`sb3_pgplus.vec_env.workers`: steps several environments in turn, on request.

A request is the byte ``STEP`` or a pickled ``(method of Worker, arguments)``, a reply is ``DONE`` or ``FAILED`` and
something pickled. Actions, observations, rewards and dones do not travel: they lie in shared memory.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import cloudpickle
import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.vec_env.base_vec_env import CloudpickleWrapper
from stable_baselines3.common.vec_env.patch_gym import _patch_env
from stable_baselines3.common.vec_env.util import obs_space_info

from sb3_pgplus.vec_env.common import Array
from sb3_pgplus.vec_env.shared_arrays import ArraySpec, SharedArrays
from sb3_pgplus.vec_env.state_layers import check_env, env_to_tree, restore_env
from sb3_pgplus.vec_env.state_trees import Tree, process_generators, set_process_generators

STEP, CLOSE = b"s", b"c"
DONE, FAILED = b"+", b"-"
NOBODY = -1
_WIDEST_ACTION = 8  # bytes of a number
_SECONDS_TO_CLOSE = 3.0


class Failure(NamedTuple):
    """What went wrong in an environment."""

    env: int
    report: str
    #: The exception as :func:`pack` makes it, if it can be pickled.
    packed: bytes | None


class Event(NamedTuple):
    """The infos of one environment's step; the third only if the episode ended."""

    env: int
    info: dict[str, Any]
    reset_info: dict[str, Any] | None


def pack(thing: Any) -> bytes:
    """
    Pickle functions and classes, too, with cloudpickle as SB3 does.

    :param thing: what another process shall :func:`unpack`
    """
    return pickle.dumps(CloudpickleWrapper(thing))


def unpack(packed: bytes) -> Any:
    """
    Undo :func:`pack`.

    :param packed: what it returned
    """
    return pickle.loads(packed).var


def array_specs(
    observation_space: spaces.Space[Any], action_space: spaces.Space[Any], n_envs: int
) -> dict[Any, ArraySpec]:
    """
    List what lies in shared memory. Actions come in whatever type the caller has, so that bytes are reserved for them.

    :param observation_space: of one environment
    :param action_space: of one environment
    :param n_envs: N
    :return: ``("observation", key)``, one for each key of a Dict space, ``"actions"``, ``"rewards"``, ``"dones"``
    :raises ValueError: if observations have no shape
    """
    parts = observation_space.spaces if isinstance(observation_space, spaces.Dict | spaces.Tuple) else observation_space
    for part in parts.values() if isinstance(parts, Mapping) else parts if isinstance(parts, tuple) else (parts,):
        if part.shape is None:
            raise ValueError(f"SB3 cannot learn from observations of {observation_space}")
    keys, shapes, dtypes = obs_space_info(observation_space)
    n_numbers = int(np.prod(action_space.shape or (), dtype=np.int64))
    specs: dict[Any, ArraySpec] = {("observation", key): ArraySpec((n_envs, *shapes[key]), dtypes[key]) for key in keys}
    specs["actions"] = ArraySpec((n_envs * n_numbers * _WIDEST_ACTION,), np.uint8)
    specs["rewards"] = ArraySpec((n_envs,), np.float32)
    specs["dones"] = ArraySpec((n_envs,), np.bool_)
    return specs


def action_array(buffer: Array, dtype: str, shape: Sequence[int]) -> Array:
    """
    View the bytes reserved for actions as an array.

    :param buffer: ``"actions"`` of the shared arrays
    :param dtype: the actions' type
    :param shape: theirs, ``[N, ...]``
    """
    return np.ndarray(tuple(shape), np.dtype(dtype), buffer=buffer.data)


class Worker:
    """
    Environments ``first``, ``first + 1``, … of a vector environment, and what can be asked of them.

    :param pipe: to the parent process
    :param env_fns: what makes each environment, packed
    :param first: index of the first one
    :param progress: two integers that the parent can see: how many calls of an environment began, and whose is running
    :param full_infos: report the infos of every step, not only those of an episode's last
    """

    def __init__(self, pipe: Connection, env_fns: Sequence[bytes], first: int, progress: Any, full_infos: bool) -> None:
        self._pipe, self._env_fns, self._first = pipe, env_fns, first
        self._progress = progress
        self._full_infos = full_infos
        self._asked: Sequence[int] = ()
        self.envs: list[gym.Env[Any, Any]] = []

    def serve(self) -> None:
        """Make the environments, then answer requests until one says to close."""
        self._pipe.send_bytes(self._answer(self.build))
        while (request := self._pipe.recv_bytes()) != CLOSE:
            self._pipe.send_bytes(self._answer(self.step if request == STEP else lambda: self._perform(request)))

    def _perform(self, request: bytes) -> Any:
        method, arguments = unpack(request)
        return getattr(self, method)(*arguments)

    def _answer(self, perform: Callable[[], Any]) -> bytes:
        try:
            result = perform()
            reply = DONE if result is None else DONE + self._pickled(result)
        except BaseException as error:  # whatever happens in an environment, `sys.exit()` too, is the parent's to tell
            reply = FAILED + pickle.dumps(Failure(self._progress[1], traceback.format_exc(), _packed(error)))
        self._progress[1] = NOBODY
        return reply

    def _pickled(self, result: Any) -> bytes:
        """As pickle has it, which is fast, or cloudpickle, which also takes what is defined in ``__main__``."""
        try:
            return pickle.dumps(result, pickle.HIGHEST_PROTOCOL)
        except Exception:  # objects may raise anything
            try:
                packed: bytes = cloudpickle.dumps(result)
                return packed
            except Exception as error:
                self._find_unsendable(result)
                raise TypeError(f"its info or answer cannot be sent to another process: {error}") from None

    def _find_unsendable(self, result: Sequence[Any]) -> None:
        """Note for the parent which environment's part of a result cannot be pickled."""
        for index, part in zip(self._asked, result, strict=False):  # a step has parts of some environments only
            try:
                cloudpickle.dumps(part)
            except Exception:
                self._begin(part.env if isinstance(part, Event) else index)
                return

    def _each(self, indices: Sequence[int]) -> Iterator[tuple[int, gym.Env[Any, Any]]]:
        """Environments by index, with a note for the parent whose turn it is."""
        self._asked = indices
        for index in indices:
            self._begin(index)
            yield index, self.envs[index - self._first]

    def _begin(self, index: int) -> None:
        self._progress[0] += 1
        self._progress[1] = index

    # --- requests ---------------------------------------------------------------------------------------------------

    def build(self) -> tuple[Any, Any, Any]:
        """
        Make the environments.

        :return: observation space, action space and metadata of the first one
        """
        for offset, env_fn in enumerate(self._env_fns):
            self._begin(self._first + offset)
            self.envs.append(_patch_env(unpack(env_fn)()))
        self._indices = range(self._first, self._first + len(self.envs))
        self._begin(self._first)
        return self.envs[0].observation_space, self.envs[0].action_space, self.envs[0].metadata

    def attach(self, specs: Mapping[Any, ArraySpec]) -> None:
        """
        Take the shared memory that follows through the pipe.

        :param specs: of the arrays in it
        """
        self._shared = SharedArrays.receive(self._pipe, specs).arrays
        self._observations = {name[1]: array for name, array in self._shared.items() if isinstance(name, tuple)}

    def use_actions(self, dtype: str, shape: Sequence[int]) -> None:
        """
        Read actions in another type or shape from now on.

        :param dtype: the actions' type
        :param shape: ``[N, ...]``
        """
        self._actions = action_array(self._shared["actions"], dtype, shape)

    def step(self) -> list[Event] | None:
        """Step every environment, and reset those whose episode ended."""
        # A copy, since an environment may keep its action, and the next one is written to the same place.
        actions = self._actions[self._first : self._first + len(self.envs)].copy()
        events = []
        for index, env in self._each(self._indices):
            observation, reward, terminated, truncated, info = env.step(actions[index - self._first])
            self._shared["rewards"][index] = reward
            done = bool(terminated or truncated)
            self._shared["dones"][index] = done
            info["TimeLimit.truncated"] = truncated and not terminated
            reset_info = None
            if done:
                info["terminal_observation"] = observation
                observation, reset_info = env.reset()
            self._write(index, observation)
            # A wrapper around the Monitor may go on where an episode has ended.
            if done or self._full_infos or "episode" in info:
                events.append(Event(index, info, reset_info))
        return events or None

    def reset(self, seeds: Sequence[int | None], options: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """
        Reset every environment.

        :param seeds: one for each
        :param options: one for each
        :return: the infos
        """
        infos = []
        for index, env in self._each(self._indices):
            offset = index - self._first
            options_given = {"options": options[offset]} if options[offset] else {}
            observation, info = env.reset(seed=seeds[offset], **options_given)
            self._write(index, observation)
            infos.append(info)
        return infos

    def _write(self, index: int, observation: Any) -> None:
        for key, array in self._observations.items():
            array[index] = observation if key is None else observation[key]

    def get_attr(self, indices: Sequence[int], name: str) -> list[Any]:
        """Read an attribute of some environments."""
        return [env.get_wrapper_attr(name) for _, env in self._each(indices)]

    def has_attr(self, indices: Sequence[int], name: str) -> list[bool]:
        """Tell which environments have an attribute."""
        return [env.has_wrapper_attr(name) for _, env in self._each(indices)]

    def set_attr(self, indices: Sequence[int], name: str, value: Any) -> list[None]:
        """Set an attribute of some environments, on their outermost wrapper as SB3 does."""
        for _, env in self._each(indices):
            setattr(env, name, value)
        return [None] * len(indices)

    def env_method(self, indices: Sequence[int], name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        """Call a method of some environments."""
        return [env.get_wrapper_attr(name)(*args, **kwargs) for _, env in self._each(indices)]

    def env_is_wrapped(
        self, indices: Sequence[int], wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]]
    ) -> list[bool]:
        """Tell which environments are in a wrapper."""
        return [is_wrapped(env, wrapper_class) for _, env in self._each(indices)]

    def render(self, indices: Sequence[int]) -> list[Any]:
        """Render some environments."""
        return [env.render() for _, env in self._each(indices)]

    def envs_to_trees(self, indices: Sequence[int]) -> list[tuple[Tree, list[str]]]:
        """Take the state of some environments; the first has the random generators of this process with it."""
        answers = [env_to_tree(env) for _, env in self._each(indices)]
        answers[0][0]["process"] = process_generators()
        return answers

    def restore_envs(self, trees: Sequence[Tree], restarts: bool) -> None:
        """Put all environments into a state."""
        pairs = [*zip(self._indices, trees, strict=True)]
        for index, tree in pairs:
            self._begin(index)
            check_env(self.envs[index - self._first], tree)
        for index, tree in pairs:
            self._begin(index)
            restore_env(self.envs[index - self._first], tree, restarts)
        if "process" in trees[0]:
            set_process_generators(trees[0]["process"])


def run_worker(pipe: Connection, env_fns: Sequence[bytes], first: int, progress: Any, full_infos: bool) -> None:
    """
    Be a worker process.

    :param pipe: to the parent process
    :param env_fns: what makes each environment, packed
    :param first: index of the first one
    :param progress: shared array of two integers
    :param full_infos: report the infos of every step
    """
    # Ctrl-C reaches every process of the terminal, and SIGTERM every process of a cluster's job; the parent decides
    # what becomes of this one.
    # Not SIG_IGN: programs that an environment starts would inherit that, and not end when it asks them to.
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: None)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # what environments start belongs to it, see kill_group
    threading.Thread(target=_end_with_parent, daemon=True).start()
    worker = Worker(pipe, env_fns, first, progress, full_infos)
    try:
        with contextlib.suppress(EOFError, OSError):  # the parent hung up
            worker.serve()
    finally:
        for env in worker.envs:
            try:
                env.close()
            except BaseException:  # SystemExit as well: the others want to be closed, too
                traceback.print_exc()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(0)  # without waiting for threads that environments have left


def _end_with_parent() -> None:
    """If the parent is killed while an environment is busy, nobody will read the result."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    time.sleep(_SECONDS_TO_CLOSE)  # an idle worker sees the closed pipe and closes its environments
    kill_group(os.getpid())
    os._exit(1)


def kill_group(pid: int | None) -> None:
    """
    End the processes that a worker's environments have started and not ended, and the worker if it is still there.

    :param pid: of the worker, which leads a group of its own where the system has such
    """
    if pid is not None and hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _packed(error: BaseException) -> bytes | None:
    try:
        return pack(error)
    except Exception:  # exceptions may hold anything
        return None
