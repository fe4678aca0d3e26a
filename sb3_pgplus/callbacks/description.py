"""What a training is, in plain values: for trackers, where people filter and compare by them."""

from __future__ import annotations

import inspect
import re
import subprocess
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv, VecEnvWrapper

from sb3_pgplus.construction import PLUMBING
from sb3_pgplus.run_folder import package_versions
from sb3_pgplus.schedules import describe_schedule
from sb3_pgplus.vec_env import backend_of

#: A longer array is described and not written out.
MOST_ELEMENTS = 32
_NOT_SETTINGS = ("policy", "env", "tensorboard_log", "verbose", "_init_setup_model", "device")
_GIT_SECONDS = 5.0


def describe_training(model: BaseAlgorithm) -> dict[str, Any]:
    """
    Algorithm, hyperparameters as they are set now, environment, versions and commit; hyperparameters are on top, under
    the names that the constructor has for them.

    :param model: one of ours, or of SB3's
    :return: nested dictionaries and lists of text, numbers, booleans and None
    """
    return {
        "algo": type(model).__name__,
        "policy": model.policy_class.__name__,
        **_hyperparameters(model),
        "n_envs": model.n_envs,
        "total_timesteps": getattr(model, "_total_timesteps", None),
        "device": str(model.device),
        "environment": {} if model.env is None else describe_environment(model.env),
        "versions": package_versions(),
        "git": git_state(Path.cwd()),
    }


def _hyperparameters(model: BaseAlgorithm) -> dict[str, Any]:
    named = [name for name in (*inspect.signature(type(model)).parameters, *PLUMBING) if name not in _NOT_SETTINGS]
    values = {name: getattr(model, name) for name in named if hasattr(model, name)}
    described = {name: value if isinstance(value, type) else describe_schedule(value) for name, value in values.items()}
    # Also those that the constructor of a subclass does not name.
    own: dict[str, Any] = getattr(model, "hyperparameters", dict)()
    return {name: plain(value) for name, value in (described | own).items()}


def describe_environment(env: VecEnv) -> dict[str, Any]:
    """
    Id, arguments and wrappers, as far as they can be known from here.

    :param env: the training environments
    """
    vec_wrappers = []
    inner = env
    while isinstance(inner, VecEnvWrapper):
        vec_wrappers.append(type(inner).__name__)
        inner = inner.venv
    spec = _spec_of(inner)
    described: dict[str, Any] = {
        "id": spec.id if spec else None,
        "kwargs": plain(spec.kwargs) if spec else {},
        "max_episode_steps": spec.max_episode_steps if spec else None,
        "wrappers": [],
    }
    if hasattr(inner, "envs"):
        described["wrappers"] = list(_wrappers_of(inner.envs[0]))
    elif isinstance(inner, SubprocVecEnv) or backend_of(inner) == "workers":
        described |= _described_by_name(inner)
    return described | {
        "vec_wrappers": vec_wrappers[::-1],
        "backend": backend_of(env),
        "observation_space": plain(env.observation_space),
        "action_space": plain(env.action_space),
    }


def _spec_of(env: VecEnv) -> EnvSpec | None:
    """Not of another process: what cannot be pickled there, such as a function among the arguments, would end it."""
    if isinstance(env, SubprocVecEnv) or backend_of(env) == "workers":
        return None
    try:
        spec = env.get_attr("spec", [0])[0]
    except Exception:  # environments of all makes
        return None
    return spec if isinstance(spec, EnvSpec) else None


def _wrappers_of(env: Any) -> Iterator[str]:
    """Names from the inside to the outside."""
    if getattr(env, "unwrapped", env) is not env:
        yield from _wrappers_of(env.env)
        yield type(env).__name__


def _described_by_name(env: VecEnv) -> dict[str, Any]:
    """Gymnasium's text for an environment, ``<Monitor<TimeLimit<CartPoleEnv<CartPole-v1>>>>``, read backwards."""
    try:
        text = str(env.env_method("__str__", indices=[0])[0])
    except Exception:  # environments of all makes
        return {}
    if re.fullmatch(r"(<\w+)+<[\w./:-]+>+", text) is None:
        return {}
    *wrappers, _, env_id = re.findall(r"[\w./:-]+", text)
    return {"id": env_id, "wrappers": wrappers[::-1]}


# --- any value as a plain one -----------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """
    A value as JSON has them: what has no such form becomes a name or a short description, never an address in memory.

    :param value: anything
    """
    if isinstance(value, str):
        return _without_addresses(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic | np.ndarray):
        small = value.size <= MOST_ELEMENTS
        return plain(value.tolist()) if small else f"array of shape {value.shape}, {value.dtype}"
    return _name_or_text(value)


def _name_or_text(value: Any) -> str:
    if isinstance(value, partial):
        arguments = [*map(str, map(plain, value.args)), *(f"{k}={plain(v)}" for k, v in value.keywords.items())]
        return f"{_name_or_text(value.func)}({', '.join(arguments)})"
    if isinstance(value, type) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    text = str(value)
    if text == object.__repr__(value):
        text = f"{type(value).__module__}.{type(value).__qualname__}"
    return _without_addresses(" ".join(text.split()))


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


# --- the user's code --------------------------------------------------------------------------------------------------


def git_state(folder: Path) -> dict[str, Any] | None:
    """
    The commit that is checked out, and whether files that git knows have changed since.

    :param folder: inside a work tree
    :return: ``commit`` and ``changed``; None without git or a commit
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "changed": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
