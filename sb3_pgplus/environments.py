"""From an environment's description to SB3's vector environment; a missing package or an unknown id is explained."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import torch as th
from gymnasium import spaces
from gymnasium.envs.registration import find_highest_version
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack

from sb3_pgplus.configs import ConfigError, EnvironmentSpec, import_object, parse_python_value
from sb3_pgplus.errors import BackendError
from sb3_pgplus.vec_env.make import make_vec_env

Wrapper = Callable[[gym.Env[Any, Any]], gym.Env[Any, Any]]
REQUIREMENTS = {
    "mujoco": "sb3_pgplus[mujoco]",
    "box2d": "sb3_pgplus[box2d]",
    "ale_py": "sb3_pgplus[atari]",
    "classic_control": "gymnasium[classic-control]",
    "toy_text": "gymnasium[toy-text]",
}
"""Part of an environment's entry point → what installs everything it needs."""


def make_environments(
    spec: EnvironmentSpec,
    *,
    n_envs: int = 1,
    seed: int | None = None,
    backend: str = "auto",
    render_mode: str | None = None,
    outer_wrapper: Wrapper | None = None,
    n_threads: int | None = None,
) -> VecEnv:
    """
    Build ``n_envs`` copies, each in a ``Monitor``, then in the configuration's wrappers.

    :param spec: which environment
    :param n_envs: how many copies
    :param seed: copy ``i`` gets ``seed + i``
    :param backend: what runs them, see :func:`sb3_pgplus.vec_env.make_vec_env`
    :param render_mode: ``"human"`` or ``"rgb_array"``, by default SB3's choice
    :param outer_wrapper: one more wrapper around each copy
    :param n_threads: of the simulation, where the backend has some
    :raises ConfigError: if the environment is unknown, needs a package that is missing or refuses its arguments
    """
    if backend != "envpool":  # which has its own
        find_environment(spec.env)
    wrappers = [*configured_wrappers(spec.env_wrapper), *([outer_wrapper] if outer_wrapper else [])]

    def wrap(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
        for wrapper in wrappers:
            env = wrapper(env)
        return env

    env_kwargs = spec.env_kwargs | ({"render_mode": render_mode} if render_mode else {})
    wrapper_class = wrap if wrappers else None
    try:
        env = make_vec_env(
            _importing_atari(spec.env) if backend != "envpool" else spec.env,
            n_envs,
            seed,
            env_kwargs=env_kwargs,
            wrapper_class=wrapper_class,
            backend=backend,
            n_threads=n_threads,
        )
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        advice = installation_advice(spec.env)
        raise ConfigError(f"{spec.env} needs a package that is missing: {one_line(error)}; {advice}") from error
    except BackendError as error:
        raise ConfigError(f"{spec.env}: {one_line(error)}") from error
    except Exception as error:  # the environment's own constructor may raise anything
        raise ConfigError(f"cannot make {spec.env}: {one_line(error)}{_renderer_hint(spec.env)}") from error
    return VecFrameStack(env, spec.frame_stack) if spec.frame_stack else env


def find_environment(env: str) -> None:
    """
    Look an environment id up without building it.

    :param env: ``"CartPole-v1"``, or ``"package:MyEnv-v0"`` where importing the package registers it
    :raises ConfigError: if Gymnasium does not know it
    """
    module, colon, env_id = env.partition(":")
    try:
        if colon:
            importlib.import_module(module)
        elif _is_atari(env):
            gym.register_envs(importlib.import_module("ale_py"))
        gym.spec(env_id if colon else env)
    except ImportError as error:
        extra = ' (pip install "sb3_pgplus[atari]")' if not colon else ""
        raise ConfigError(f"{env} needs the package {error.name or module}, which cannot be imported{extra}") from error
    except gym.error.Error as error:
        advice = newest_version(env) or "an environment of your own: --env package:MyEnv-v0"
        raise ConfigError(f"unknown environment: {one_line(error)} ({advice})") from error


def newest_version(name: str) -> str:
    """
    :param name: an environment's id, perhaps without its version and with a package
    :return: a sentence with the id to write instead; empty if there is none
    """
    namespace, _, rest = name.rpartition(":")[2].rpartition("/")
    newest = find_highest_version(namespace or None, rest)
    return "" if newest is None else f"runs are recorded with a version: write {name}-v{newest}"


def _importing_atari(env: str) -> str:
    """The id with which other processes know Atari's games as well: they import only what an id says."""
    return f"ale_py:{env}" if ":" not in env and _is_atari(env) else env


def _is_atari(env: str) -> bool:
    return env.startswith("ALE/") or "NoFrameskip" in env


def configured_wrappers(env_wrapper: Any) -> list[Wrapper]:
    """
    Read rl_zoo3's ``env_wrapper``: a dotted class name, ``{name: keyword arguments}``, or a list of these.

    The first of a list is the innermost wrapper.

    :param env_wrapper: the entry of the configuration
    :raises ConfigError: if it is something else or cannot be imported
    """
    entries = env_wrapper if isinstance(env_wrapper, list) else [env_wrapper] if env_wrapper else []
    wrappers: list[Wrapper] = []
    for entry in entries:
        named = {entry: {}} if isinstance(entry, str) else entry
        if not isinstance(named, dict) or len(named) != 1:
            raise ConfigError(f"env_wrapper: expected module.Class or {{module.Class: {{…}}}}, got {entry!r}")
        [(name, arguments)] = named.items()
        arguments = parse_python_value(arguments) if isinstance(arguments, str) else arguments or {}
        wrappers.append(_bind(import_object(name), arguments))
    return wrappers


def _bind(wrapper_class: Any, arguments: Mapping[str, Any]) -> Wrapper:
    def wrap(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
        wrapped: gym.Env[Any, Any] = wrapper_class(env, **arguments)
        return wrapped

    return wrap


def policy_for(observation_space: spaces.Space[Any]) -> str:
    """
    Choose the policy as SB3's documentation recommends.

    :param observation_space: of the environment
    """
    if isinstance(observation_space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if is_image_space(observation_space) else "MlpPolicy"


@contextmanager
def torch_threads(observation_space: spaces.Space[Any], number: int | None = None) -> Iterator[None]:
    """
    Set the number of torch's CPU threads for a while; ``OMP_NUM_THREADS`` is respected.

    By default one, unless there are images to convolve: matrices of 64 columns gain nothing from a second thread, and
    when the cores are shared with other processes the threads' waiting for each other costs several times the work.

    :param observation_space: what the policy sees
    :param number: how many, if the user has said so
    """
    if number is None and "OMP_NUM_THREADS" not in os.environ and policy_for(observation_space) == "MlpPolicy":
        number = 1
    before = th.get_num_threads()
    try:
        if number is not None:
            th.set_num_threads(number)
        yield
    finally:
        th.set_num_threads(before)


def installation_advice(env: str) -> str:
    """
    Say how to install what an environment needs.

    :param env: id of a registered environment
    """
    entry_point = str(gym.spec(env.partition(":")[2] or env).entry_point)
    requirement = next((name for part, name in REQUIREMENTS.items() if part in entry_point), None)
    return f'run: pip install "{requirement}"' if requirement else "install what it asks for"


def _renderer_hint(env: str) -> str:
    """MuJoCo loads the renderer it is told to when it is imported, so a wrong one breaks what renders nothing, too."""
    backend = os.environ.get("MUJOCO_GL")
    if backend is None or "mujoco" not in str(gym.spec(env.partition(":")[2] or env).entry_point):
        return ""
    return f" (MUJOCO_GL={backend} is set: unset it, or install that renderer: libegl1 for egl, libosmesa6 for osmesa)"


def one_line(error: BaseException) -> str:
    """
    Return an error's message without line breaks, its type if it has none.

    :param error: any exception
    """
    return " ".join(str(error).split()) or type(error).__name__
