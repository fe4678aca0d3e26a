"""
Ordinary Python environments in a few worker processes.

SB3's ``SubprocVecEnv`` has a process for each environment and pickles every observation. Here a process steps several
environments, and actions, observations, rewards and dones lie in memory that all processes share; through the pipes go
a byte for "step" and a byte for "done", and infos where an episode ended.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing as mp
import os
import pickle
import select
import signal
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.util import dict_to_obs

from sb3_pgplus.errors import WorkerError
from sb3_pgplus.vec_env.common import Array, Indices, check_integer, indices_of, usable_cpus
from sb3_pgplus.vec_env.episodes import running_infos
from sb3_pgplus.vec_env.shared_arrays import SharedArrays
from sb3_pgplus.vec_env.worker_process import (
    CLOSE,
    FAILED,
    NOBODY,
    STEP,
    Event,
    Failure,
    action_array,
    array_specs,
    kill_group,
    pack,
    run_worker,
    unpack,
)

_SECONDS_TO_START = 120.0  # to start Python and to import the environments' packages, on a busy machine
_SECONDS_TO_CLOSE = 10.0
_LONGEST_TIMEOUT = 1_000_000  # a poll takes milliseconds in an int


class WorkersVecEnv(VecEnv):
    """
    Environments in worker processes, several in each; the same numbers as with SB3's ``DummyVecEnv``.

    Linux and macOS.

    :param env_fns: what makes each environment
    :param n_workers: how many processes; by default as many as there are cores, and never more than environments
    :param start_method: how they are started, ``"forkserver"`` (default), ``"spawn"`` or ``"fork"``. With the first two
        a script needs ``if __name__ == "__main__":``, as with ``SubprocVecEnv``
    :param timeout: seconds that one call of one environment may take before it counts as hanging; None for any time
    :param full_infos: give the environment's own info entries in every step, not only where an episode ends
    :raises WorkerError: here and in every other method, if an environment raises an error, hangs or ends its process.
        All processes are ended then
    """

    backend = "workers"

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env[Any, Any]]],
        n_workers: int | None = None,
        start_method: str | None = None,
        timeout: float | None = 60.0,
        full_infos: bool = False,
    ) -> None:
        if not env_fns:
            raise ValueError("there are no environments")
        n_envs = len(env_fns)
        n_workers = min(n_envs, usable_cpus() if n_workers is None else check_integer("n_workers", n_workers, 1))
        self.timeout = _check_timeout(timeout)
        self._waiting = False
        self._step_replies: dict[int, bytes] = {}
        self._request = "starting"
        self._pending = [False] * n_workers
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        # Also when nobody refers to this object any more, and at the end of the interpreter or of a process of
        # multiprocessing's, before that would wait for workers that do not listen to SIGTERM. Not in a fork.
        self._owner = os.getpid()
        self._finalizer = Finalize(self, _stop, (self._pipes, self._processes), exitpriority=10)
        try:
            self._start(env_fns, n_workers, start_method or _default_start_method(), full_infos)
            observation_space, action_space, metadata = self._share_memory(n_envs)
            super().__init__(n_envs, observation_space, action_space)
        except BaseException:
            self.close()
            raise
        self.metadata = metadata

    def _start(self, env_fns: Sequence[Any], n_workers: int, start_method: str, full_infos: bool) -> None:
        context: Any = mp.get_context(start_method)
        bounds = [worker * len(env_fns) // n_workers for worker in range(n_workers + 1)]
        self._envs_of = [range(first, end) for first, end in itertools.pairwise(bounds)]
        self._progress: list[Any] = [context.RawArray("q", [0, NOBODY]) for _ in range(n_workers)]
        self._pollers = []
        for worker, envs in enumerate(self._envs_of):
            ours, theirs = context.Pipe()
            # One by one: functions that share an object would otherwise share it in the worker, too.
            pickled = [pack(env_fns[i]) for i in envs]
            process = context.Process(
                target=run_worker, args=(theirs, pickled, envs.start, self._progress[worker], full_infos), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
            self._pending[worker] = True  # a worker begins with a report on its environments
            poller = select.poll()
            poller.register(ours, select.POLLIN)
            self._pollers.append(poller)

    def _share_memory(self, n_envs: int) -> tuple[Any, Any, Any]:
        reports = [self._result(self._receive(worker)) for worker in range(len(self._pipes))]
        observation_space, action_space, metadata = reports[0]
        specs = array_specs(observation_space, action_space, n_envs)
        shared = SharedArrays(specs)
        self._shared = shared.arrays
        self._actions = action_array(self._shared["actions"], "u1", (0,))
        for worker, process in enumerate(self._processes):
            self._send(worker, pack(("attach", (specs,))))
            shared.send(self._pipes[worker], process.pid or 0)
        for worker in range(len(self._pipes)):
            self._result(self._receive(worker))
        shared.forget_descriptor()
        return observation_space, action_space, metadata

    # --- stepping ---------------------------------------------------------------------------------------------------

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """
        Environment ``i`` is seeded with ``i`` more at the next reset.

        :param seed: None for a random one
        :raises TypeError: if it is no integer
        :raises ValueError: if it is negative
        """
        return super().seed(None if seed is None else check_integer("seed", seed, 0))

    def reset(self) -> Any:
        """
        Start a new episode in every environment, also while a step is under way.

        :return: observations ``[N, ...]``, a dict of such for Dict spaces
        """
        self._discard_step()
        requests = {
            worker: (self._seeds[envs.start : envs.stop], self._options[envs.start : envs.stop])
            for worker, envs in enumerate(self._envs_of)
        }
        replies = self._ask("reset", requests)
        self.reset_infos = [info for reply in replies.values() for info in self._result(reply)]
        # Seeds and options are only used once.
        self._reset_seeds()
        self._reset_options()
        return self._observations()

    def step_async(self, actions: Array) -> None:
        """
        :param actions: ``[N, ...]``
        """
        self._discard_step()
        actions = np.asarray(actions)
        if actions.dtype != self._actions.dtype or actions.shape != self._actions.shape:
            self._use_actions(actions)
        self._actions[...] = actions
        self._request = "step"
        for worker in range(len(self._pipes)):
            self._send(worker, STEP)
        self._waiting = True

    def _use_actions(self, actions: Array) -> None:
        """Agree with the workers on the actions' type and shape, which environments then see as they were given."""
        room = self._shared["actions"].nbytes
        if actions.ndim < 1 or len(actions) != self.num_envs or actions.dtype.hasobject or actions.nbytes > room:
            raise ValueError(
                f"{self.num_envs} actions of {self.action_space} cannot be of shape {actions.shape} and {actions.dtype}"
            )
        layout = (actions.dtype.str, actions.shape)
        for reply in self._ask("use_actions", dict.fromkeys(range(len(self._pipes)), layout)).values():
            self._result(reply)
        self._actions = action_array(self._shared["actions"], *layout)

    def step_wait(self) -> Any:
        """
        Wait for the step to be taken.

        :return: observations ``[N, ...]``, rewards ``[N]``, dones ``[N]``, infos
        """
        self._check_open()
        if not self._waiting:
            raise RuntimeError("step_wait() needs a step_async() before it")
        self._finish_requests()
        replies, self._step_replies = self._step_replies, {}
        self._waiting = False
        infos = running_infos(self.num_envs)
        for worker in range(len(self._pipes)):
            events: list[Event] = self._result(replies[worker]) or []
            for index, info, reset_info in events:
                infos[index] = info
                if reset_info is not None:
                    self.reset_infos[index] = reset_info
        return self._observations(), self._shared["rewards"].copy(), self._shared["dones"].copy(), infos

    def _observations(self) -> Any:
        """Copies, since the next step is written to the same place."""
        copies = {name[1]: array.copy() for name, array in self._shared.items() if isinstance(name, tuple)}
        return dict_to_obs(self.observation_space, copies)

    def close(self) -> None:
        """Close the environments and end the processes; those that have not closed after 10 s are killed."""
        self._finalizer()

    def __getstate__(self) -> NoReturn:
        # A copy of a pipe would share its descriptor and close it, so that this object could not go on.
        raise TypeError(
            "WorkersVecEnv cannot be pickled or copied, its environments live in other processes: make another one"
        )

    # --- the single environments ------------------------------------------------------------------------------------

    def has_attr(self, attr_name: str) -> bool:
        """
        :param attr_name: an attribute of the environments
        """
        return all(self._call("has_attr", None, attr_name))

    def get_attr(self, attr_name: str, indices: Indices = None) -> list[Any]:
        """
        Read an attribute of the environments.

        :param attr_name: which attribute
        :param indices: which environments
        :raises AttributeError: if there is no such attribute
        """
        return self._call("get_attr", indices, attr_name)

    def set_attr(self, attr_name: str, value: Any, indices: Indices = None) -> None:
        """
        Set an attribute of the environments, on their outermost wrapper.

        :param attr_name: which attribute
        :param value: the same for all of them
        :param indices: which environments
        """
        self._call("set_attr", indices, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: Indices = None, **method_kwargs: Any
    ) -> list[Any]:
        """
        Call a method of the environments. What it raises is raised here.

        :param method_name: which method
        :param indices: which environments
        :return: what each of them returned
        """
        return self._call("env_method", indices, method_name, method_args, method_kwargs)

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Indices = None
    ) -> list[bool]:
        """
        Tell whether the environments are in a wrapper.

        :param wrapper_class: which wrapper
        :param indices: which environments
        """
        return self._call("env_is_wrapped", indices, wrapper_class)

    def get_images(self) -> Sequence[Array | None]:
        """Render every environment to an RGB image; None without ``render_mode="rgb_array"``."""
        if self.render_mode != "rgb_array":
            warnings.warn(
                f"there are images with the render mode `rgb_array`, not with {self.render_mode}", stacklevel=2
            )
            return [None] * self.num_envs
        return self._call("render", None)

    def envs_to_trees(self) -> list[tuple[Any, list[str]]]:
        """
        :return: the state of each environment and what is missing in it, see :mod:`sb3_pgplus.vec_env.states`
        :raises RuntimeError: in the middle of a step
        """
        if self._waiting:
            raise RuntimeError("the environments are in the middle of a step: call step_wait() first")
        return self._call("envs_to_trees", None)

    def restore_envs(self, trees: Sequence[Any], restarts: bool) -> None:
        """
        Undo :meth:`envs_to_trees`.

        :param trees: the state of each environment
        :param restarts: whether the running episodes cannot go on
        :raises ValueError: if it is of another kind of environment
        """
        requests = {worker: (trees[envs.start : envs.stop], restarts) for worker, envs in enumerate(self._envs_of)}
        for reply in self._ask("restore_envs", requests).values():
            self._result(reply, raise_original=True)

    def _call(self, method: str, indices: Indices, *arguments: Any) -> list[Any]:
        """Ask the workers of some environments something, and return the answers in the environments' order."""
        chosen = indices_of(indices, self._envs_of[-1].stop)
        asked = {worker: [i for i in envs if i in chosen] for worker, envs in enumerate(self._envs_of)}
        asked = {worker: envs for worker, envs in asked.items() if envs}
        replies = self._ask(method, {worker: (envs, *arguments) for worker, envs in asked.items()})
        answers: dict[int, Any] = {}
        for worker, reply in replies.items():
            answers |= zip(asked[worker], self._result(reply, raise_original=True), strict=True)
        return [answers[i] for i in chosen]

    # --- talking to the workers -------------------------------------------------------------------------------------

    def _ask(self, method: str, arguments: Mapping[int, Any]) -> dict[int, bytes]:
        """Send requests, and wait for all replies, so that none is left over if one of them is a failure."""
        self._finish_requests()
        self._request = method
        for worker, arguments_of_worker in arguments.items():
            self._send(worker, pack((method, arguments_of_worker)))
        return {worker: self._receive(worker) for worker in arguments}

    def _check_open(self) -> None:
        if os.getpid() != self._owner:  # two processes that talk through the same pipes read each other's answers
            raise RuntimeError(
                "this WorkersVecEnv was made in the process that forked this one: make it inside the process that uses "
                "it, or start that process with 'spawn' or 'forkserver'"
            )
        if not self._finalizer.still_active():
            raise WorkerError("this WorkersVecEnv is closed")

    def _finish_requests(self) -> None:
        """Receive what is under way: a step's replies are kept, others an interruption, such as Ctrl-C, has left."""
        self._check_open()
        for worker in np.flatnonzero(self._pending).tolist():
            reply = self._receive(worker)
            if self._waiting:
                self._step_replies[worker] = reply

    def _discard_step(self) -> None:
        """End a step that nobody waited for; if it failed, that is told all the same."""
        self._finish_requests()
        replies, self._step_replies = self._step_replies, {}
        self._waiting = False
        for reply in replies.values():
            self._result(reply)

    def _send(self, worker: int, request: bytes) -> None:
        self._pending[worker] = True
        try:
            self._pipes[worker].send_bytes(request)
        except OSError:
            raise self._end_of(worker) from None

    def _receive(self, worker: int) -> bytes:
        self._wait_for(worker)
        try:
            reply = self._pipes[worker].recv_bytes()
        except (EOFError, OSError):
            raise self._end_of(worker) from None
        except BaseException:  # an interruption within a message: the rest of it would be taken for the next one
            self.close()
            raise
        self._pending[worker] = False
        return reply

    def _wait_for(self, worker: int) -> None:
        """Wait until there is something to read; a worker that begins with its next environment has not hung."""
        calls = self._progress[worker][0]
        while not self._pollers[worker].poll(self._patience(calls)):
            if self._progress[worker][0] == calls:
                raise self._hang_of(worker)
            calls = self._progress[worker][0]

    def _patience(self, calls: int) -> float | None:
        if self.timeout is None:
            return None
        return 1000 * (self.timeout if calls else max(self.timeout, _SECONDS_TO_START))

    def _result(self, reply: bytes, raise_original: bool = False) -> Any:
        """Unpickle a reply, and raise what it reports."""
        if not reply.startswith(FAILED):
            return pickle.loads(memoryview(reply)[1:]) if len(reply) > 1 else None
        failure: Failure = pickle.loads(memoryview(reply)[1:])
        original = _unpacked(failure.packed)
        if raise_original and (original is None or isinstance(original, Exception)):
            original = original or RuntimeError("the environment's own exception cannot be sent to another process")
            original.add_note(f"environment {failure.env}, in a worker process:\n{failure.report}")
            raise original
        self.close()
        raise WorkerError(
            f"environment {failure.env} raised an error in {self._request}:\n\n{failure.report}"
        ) from original

    def _hang_of(self, worker: int) -> WorkerError:
        process = self._processes[worker]
        env = self._progress[worker][1]
        kill_group(process.pid)  # it would not listen to a request to close
        process.kill()
        self.close()
        who = self._name(worker, env)
        return WorkerError(f"{who} did not finish {self._request} within {self.timeout:g} s (`timeout`), and was ended")

    def _end_of(self, worker: int) -> WorkerError:
        process = self._processes[worker]
        process.join(1.0)
        code, env = process.exitcode, self._progress[worker][1]
        self.close()
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            hint = ". The system kills processes when memory runs out." if -code == signal.SIGKILL else "."
        else:
            how, hint = f"ended with exit code {code}", "."
        if self._request == "starting" and env == NOBODY:
            hint += ' A script has to start its workers below `if __name__ == "__main__":`.'
        return WorkerError(f"the process of {self._name(worker, env)} {how} in {self._request}{hint}")

    def _name(self, worker: int, env: int) -> str:
        if env != NOBODY:
            return f"environment {env}"
        envs = self._envs_of[worker]
        return f"environments {envs.start} to {envs.stop - 1}" if len(envs) > 1 else f"environment {envs.start}"


def _default_start_method() -> str:
    """SB3's choice: forking a process that has threads, as torch's do, can deadlock."""
    return "forkserver" if "forkserver" in mp.get_all_start_methods() else "spawn"


def _check_timeout(timeout: Any) -> float | None:
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float, np.number)):
        raise TypeError(f"`timeout` must be a number of seconds or None, got {timeout!r}")
    if not 0 < timeout <= _LONGEST_TIMEOUT:
        raise ValueError(f"`timeout` must be above 0 and at most {_LONGEST_TIMEOUT} s, or None, got {timeout}")
    return float(timeout)


def _stop(pipes: Sequence[Connection], processes: Sequence[BaseProcess]) -> None:
    """End worker processes, and what their environments have started and not ended."""
    deadline = time.monotonic() + _SECONDS_TO_CLOSE
    try:
        for pipe in pipes:
            with contextlib.suppress(OSError):  # it may have ended already
                pipe.send_bytes(CLOSE)
            with contextlib.suppress(OSError):  # the others are to be closed all the same
                pipe.close()
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            kill_group(process.pid)
            process.kill()
            process.join()


def _unpacked(error: bytes | None) -> BaseException | None:
    try:
        original = unpack(error) if error is not None else None
    except Exception:  # a class that the parent process cannot import, or whose constructor wants other arguments
        return None
    return original if isinstance(original, BaseException) else None
