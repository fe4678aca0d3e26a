"""SB3's ``make_vec_env`` with one more choice: the backend that runs the copies of an environment."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common import env_util
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from sb3_pgplus.errors import BackendError
from sb3_pgplus.vec_env.common import check_integer, check_switch, find_spec
from sb3_pgplus.vec_env.episodes import MONITOR_ARGUMENTS, EpisodeMonitor
from sb3_pgplus.vec_env.serial import SerialVecEnv

if TYPE_CHECKING:
    from sb3_pgplus.vec_env.gymnasium_adapter import GymnasiumVecEnv
    from sb3_pgplus.vec_env.mujoco import MujocoVecEnv

logger = logging.getLogger("sb3_pgplus")


@dataclass(frozen=True)
class Request:
    """The arguments of :func:`make_vec_env`, checked."""

    env_id: Any
    n_envs: int
    seed: int | None
    start_index: int
    monitor_dir: str | None
    wrapper_class: Any
    env_kwargs: dict[str, Any]
    vec_env_cls: Any
    vec_env_kwargs: dict[str, Any]
    monitor_kwargs: dict[str, Any]
    wrapper_kwargs: dict[str, Any]
    n_threads: int | None
    full_infos: bool


def make_vec_env(
    env_id: str | Callable[..., gym.Env[Any, Any]],
    n_envs: int = 1,
    seed: int | None = None,
    start_index: int = 0,
    monitor_dir: str | None = None,
    wrapper_class: Callable[..., gym.Env[Any, Any]] | None = None,
    env_kwargs: dict[str, Any] | None = None,
    vec_env_cls: type[VecEnv] | None = None,
    vec_env_kwargs: dict[str, Any] | None = None,
    monitor_kwargs: dict[str, Any] | None = None,
    wrapper_kwargs: dict[str, Any] | None = None,
    *,
    backend: str = "auto",
    n_threads: int | None = None,
    full_infos: bool = False,
    verbose: int = 0,
) -> VecEnv:
    """
    Create N copies of an environment, each in a ``Monitor``: SB3's function, with a choice of backend.

    ``"auto"`` takes the fastest backend whose observations, rewards and episodes are exactly those of SB3's
    ``DummyVecEnv``; :func:`backend_of` says which it is.

    :param env_id: id, class or function that builds an environment
    :param n_envs: N
    :param seed: copy ``i`` gets ``seed + i`` at the first reset
    :param start_index: number of the first copy, for files and seeds of action spaces
    :param monitor_dir: folder for ``Monitor``'s files, or None
    :param wrapper_class: one more wrapper around each ``Monitor``
    :param env_kwargs: for the environment
    :param vec_env_cls: SB3's way to choose; only with ``backend="auto"``
    :param vec_env_kwargs: for the class that has a Python environment per copy: SB3's or ``WorkersVecEnv``
    :param monitor_kwargs: for ``Monitor``
    :param wrapper_kwargs: for ``wrapper_class``
    :param backend: ``"auto"`` or a name of ``BACKENDS``
    :param n_threads: threads of ``"mujoco"`` and ``"envpool"``, processes of ``"workers"``; by default one per copy or
        usable CPU, whichever are fewer. Without effect where ``"auto"`` comes to ``"serial"``
    :param full_infos: all info entries of the environment in every step, also from a backend that leaves them out
        inside an episode for speed
    :param verbose: 1 prints which backend it is
    :raises TypeError: on an argument of the wrong type
    :raises ValueError: on an unknown id or backend, a number out of range, or what the named backend cannot do
    """
    request = Request(
        env_id if backend == "envpool" else check_env_id(env_id),  # EnvPool has its own
        check_integer("n_envs", n_envs, 1),
        None if seed is None else check_integer("seed", seed, 0),
        check_integer("start_index", start_index, 0),
        monitor_dir,
        wrapper_class,
        env_kwargs or {},
        vec_env_cls,
        vec_env_kwargs or {},
        monitor_kwargs or {},
        wrapper_kwargs or {},
        None if n_threads is None else check_integer("n_threads", n_threads, 1),
        check_switch("full_infos", full_infos),
    )
    env, why = build(request, backend)
    announce(request, env, why, verbose)
    return env


def announce(request: Request, env: VecEnv, why: str, verbose: int) -> None:
    """
    :param request: what was asked for
    :param env: what was made of it
    :param why: a remark on why it is this backend
    :param verbose: whether to print it, too
    """
    message = f"{request.env_id}: {request.n_envs} copies with backend {backend_of(env)!r}{why}"
    logger.info(message)
    if verbose:
        print(message)


def build(request: Request, backend: str) -> tuple[VecEnv, str]:
    """
    :param request: what to build
    :param backend: ``"auto"`` or a name of ``BACKENDS``
    :return: the environments, and a remark on why it is this backend
    :raises ValueError: if the backend is unknown or cannot serve the request
    """
    if backend == "auto":
        return build_fastest(request)
    builder = BACKENDS.get(backend) if isinstance(backend, str) else None
    if builder is None:
        raise ValueError(f"`backend` must be one of {', '.join(map(repr, ('auto', *BACKENDS)))}, got {backend!r}")
    if request.vec_env_cls is not None:
        raise ValueError(f"`vec_env_cls` names a class and `backend={backend!r}` another: give one of the two")
    try:
        return builder(request), ""
    except BackendError as error:
        raise BackendError(f"`backend={backend!r}` cannot serve this: {error}") from error


def build_fastest(request: Request) -> tuple[VecEnv, str]:
    """
    Take the batch of MuJoCo simulations where it gives the same results, one copy after the other elsewhere.

    :param request: what to build
    :return: the environments, and the reason if it is not the batch
    """
    if request.vec_env_cls is not None:
        return _named_class(request), " (`vec_env_cls` says so)"
    try:
        if request.n_envs == 1:
            raise BackendError("there is nothing to gain with one copy")
        return _mujoco(request, verify=True), ""
    except BackendError as error:
        return build_with_sb3(request, SerialVecEnv), f" (not 'mujoco': {error})"


def build_with_sb3(request: Request, vec_env_cls: type[VecEnv] | None = None) -> VecEnv:
    """
    :param request: what to build
    :param vec_env_cls: class to build it with, by default the requested one, or SB3's choice
    :raises ValueError: if the environment's id is unknown
    """
    r = request
    arguments = (r.env_id, r.n_envs, r.seed, r.start_index, r.monitor_dir, r.wrapper_class, r.env_kwargs)
    chosen: Any = vec_env_cls or r.vec_env_cls
    return env_util.make_vec_env(*arguments, chosen, r.vec_env_kwargs, r.monitor_kwargs, r.wrapper_kwargs)


# --- backends ---------------------------------------------------------------------------------------------------------


def _dummy(request: Request) -> VecEnv:
    refuse_threads(request)
    return build_with_sb3(request, DummyVecEnv)


def _serial(request: Request) -> VecEnv:
    refuse_threads(request)
    return build_with_sb3(request, SerialVecEnv)


def _subproc(request: Request) -> VecEnv:
    refuse_threads(request)
    return build_with_sb3(request, SubprocVecEnv)


def _workers(request: Request) -> VecEnv:
    from sb3_pgplus.vec_env.workers import WorkersVecEnv

    if request.n_threads is not None and "n_workers" in request.vec_env_kwargs:
        raise BackendError("`n_threads` and `n_workers` in `vec_env_kwargs` say the same: give one of the two")
    settings = {"n_workers": request.n_threads, "full_infos": request.full_infos, **request.vec_env_kwargs}
    return build_with_sb3(replace(request, vec_env_kwargs=settings), request.vec_env_cls or WorkersVecEnv)


def _named_class(request: Request) -> VecEnv:
    from sb3_pgplus.vec_env.workers import WorkersVecEnv

    if isinstance(request.vec_env_cls, type) and issubclass(request.vec_env_cls, WorkersVecEnv):
        return _workers(request)
    if request.n_threads is not None:
        raise ValueError(f"`vec_env_cls` has no threads to choose, and `n_threads` is {request.n_threads}")
    return build_with_sb3(request)


def _mujoco(request: Request, verify: bool = False) -> VecEnv:
    # Imported where it is used, as each backend: not everybody needs it, or has what it needs.
    from sb3_pgplus.vec_env.mujoco import MujocoVecEnv, find_task

    find_task(request.env_id)
    refuse_single_environments(request)
    if verify:
        verify_installed_versions(request.env_id, request.env_kwargs)
    env = MujocoVecEnv(
        request.env_id,
        request.n_envs,
        env_kwargs=request.env_kwargs,
        n_threads=request.n_threads,
        full_infos=request.full_infos,
    )
    return finish(env, request)


def _gymnasium(request: Request) -> VecEnv:
    from sb3_pgplus.vec_env.gymnasium_adapter import GymnasiumVecEnv, make_vector_env

    refuse_threads(request)
    refuse_single_environments(request)
    vector_env = make_vector_env(request.env_id, request.n_envs, request.env_kwargs)
    return finish(GymnasiumVecEnv(vector_env, request.full_infos), request)


def _envpool(request: Request) -> VecEnv:
    from sb3_pgplus.vec_env.envpool import make_envpool

    refuse_single_environments(request)
    settings: dict[str, Any] = {"n_threads": request.n_threads, "full_infos": request.full_infos, **request.env_kwargs}
    return finish(make_envpool(request.env_id, request.n_envs, request.seed, **settings), request)


BACKENDS: dict[str, Callable[[Request], VecEnv]] = {
    "dummy": _dummy,
    "serial": _serial,
    "subproc": _subproc,
    "workers": _workers,
    "mujoco": _mujoco,
    "gymnasium": _gymnasium,
    "envpool": _envpool,
}
"""Name → what builds it, and raises :class:`~sb3_pgplus.errors.BackendError` where it cannot."""
CLASSES: Mapping[type[VecEnv], str] = {DummyVecEnv: "dummy", SubprocVecEnv: "subproc"}


def finish(env: MujocoVecEnv | GymnasiumVecEnv, request: Request) -> VecEnv:
    """
    What SB3's function does besides making environments: ``Monitor``'s files, and seeds.

    :param env: without single environments
    :param request: what was asked for
    """
    r = request
    spec = find_spec(str(r.env_id))
    name = r.env_id if spec is None else spec.id  # without the module and with the version, as `Monitor` has it
    env.episodes = EpisodeMonitor(r.n_envs, name, r.monitor_dir, r.start_index, **r.monitor_kwargs)
    if request.seed is not None:
        env.action_space.seed(request.seed + request.start_index)
    env.seed(request.seed)
    return env


def backend_of(env: VecEnv) -> str:
    """
    Say what runs the copies of an environment.

    :param env: a vector environment, maybe in wrappers
    :return: a name of ``BACKENDS``, or the class's name if it came from elsewhere
    """
    innermost = env.unwrapped
    own_name = vars(type(innermost)).get("backend")
    return own_name if isinstance(own_name, str) else CLASSES.get(type(innermost), type(innermost).__name__)


def verify_installed_versions(env_id: str, env_kwargs: dict[str, Any]) -> None:
    """
    Take some steps with Gymnasium and with the batch: the installed versions may not be those we were tested with.

    :param env_id: id of one of the MuJoCo tasks
    :param env_kwargs: for the environment
    :raises BackendError: if the two differ in a single bit
    """
    from sb3_pgplus.vec_env.mujoco import MujocoVecEnv

    both: list[Any] = [MujocoVecEnv(env_id, 1, env_kwargs=env_kwargs)]  # first: it refuses to open windows
    both.append(env_util.make_vec_env(env_id, 1, env_kwargs=env_kwargs, seed=0))
    both[0].seed(0)
    space: Any = both[0].action_space
    actions = np.random.default_rng(0).uniform(space.low, space.high, (12, 1, *space.shape)).astype(np.float32)
    runs = [[(env.reset(), 0.0, False), *(env.step(action)[:3] for action in actions)] for env in both]
    for env in both:
        env.close()
    if not all(np.array_equal(*pair) for steps in zip(*runs, strict=True) for pair in zip(*steps, strict=True)):
        raise BackendError("with the installed versions of MuJoCo, Gymnasium and NumPy its results differ")


# --- checks -----------------------------------------------------------------------------------------------------------


def check_env_id(env_id: Any) -> Any:
    """
    :param env_id: the argument
    :raises TypeError: if it is neither a string nor callable
    :raises ValueError: if Gymnasium knows no environment of that name
    """
    if not isinstance(env_id, str):
        if not callable(env_id):
            raise TypeError(f"`env_id` must be an id, a class or a function, got {env_id!r}")
        return env_id
    module, colon, name = env_id.rpartition(":")
    try:
        if colon:
            importlib.import_module(module)
        unversioned = {
            f"{spec.namespace}/{spec.name}" if spec.namespace else spec.name for spec in gym.registry.values()
        }
        if gym.registry.get(name) is None and name not in unversioned:
            gym.spec(name)  # knows similar names; an id without a version is for gymnasium.make to complete
    except (ImportError, gym.error.Error) as error:
        raise ValueError(f"`env_id` {env_id!r} is unknown: {error}") from error
    return env_id


def refuse_threads(request: Request) -> None:
    """
    :param request: of a backend without threads
    :raises BackendError: if it names a number of threads
    """
    if request.n_threads is not None:
        raise BackendError(f"it has no threads to choose, and `n_threads` is {request.n_threads}")


def refuse_single_environments(request: Request) -> None:
    """
    :param request: of a backend that computes all copies at once
    :raises BackendError: if it is about single environments
    """
    for name in request.monitor_kwargs:
        if name not in MONITOR_ARGUMENTS:
            raise BackendError(f"`monitor_kwargs` may have {', '.join(MONITOR_ARGUMENTS)} here, not {name}")
    if request.wrapper_class is not None:
        raise BackendError("`wrapper_class` wraps single environments, and it has none")
    if request.vec_env_kwargs:
        names = sorted(request.vec_env_kwargs)
        raise BackendError(f"`vec_env_kwargs` are for classes with single environments, got {names}")
