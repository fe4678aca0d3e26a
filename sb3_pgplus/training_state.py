"""What a training goes on from besides the model's own zip: random generators, counters, callbacks, pending logs."""

from __future__ import annotations

import inspect
import platform
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecEnv

from sb3_pgplus.callback_tree import callbacks_in
from sb3_pgplus.errors import warn_user
from sb3_pgplus.vec_env.state_trees import NotPlainError, Tree, from_tree, restore_space, space_to_tree, to_tree
from sb3_pgplus.vec_env.states import capture_state, restore_state

#: What decides how numbers are rounded and drawn.
_PACKAGES = ("torch", "numpy", "stable_baselines3", "gymnasium", "mujoco")
#: Attributes of SB3's callbacks that are references, or set anew in every training.
_REFERENCES = frozenset({"model", "locals", "globals", "parent", "verbose", "logger"})


@runtime_checkable
class Stateful(Protocol):
    """
    A callback that says itself what a checkpoint has to hold of it.

    ``load_state_dict`` is called before ``on_training_start``, so that a callback can continue a file or a run.
    """

    def state_dict(self) -> Mapping[str, Any]:
        """What :meth:`load_state_dict` takes: a plain tree."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        :param state: what :meth:`state_dict` returned when the checkpoint was made
        """
        ...


@runtime_checkable
class ActsBetweenIterations(Protocol):
    """A callback that is called between an update and the next rollout, where nothing is under way."""

    def on_iteration_end(self, callback: BaseCallback) -> bool:
        """
        :param callback: the training's callback, which may hold others
        :return: False to end the training
        """
        ...


# --- attributes -------------------------------------------------------------------------------------------------------


def plain_attributes(owner: object, left_out: Iterable[str]) -> dict[str, Tree]:
    """
    The attributes of an object that are plain data or tensors.

    :param owner: any object
    :param left_out: names
    """
    names, found = set(left_out), {}
    for name, value in vars(owner).items():
        if name not in names:
            with suppress(NotPlainError, TypeError):  # a tensor of a type that NumPy has not
                found[name] = to_tree(map_tensors(value))
    return found


def map_tensors(value: Any) -> Any:
    """Tensors, and dicts of tensors, as arrays that are marked; anything else as it is."""
    if isinstance(value, th.Tensor):
        return {"tensor": value.detach().cpu().numpy(), "on_cpu": value.device.type == "cpu"}
    if isinstance(value, dict) and value and all(isinstance(item, th.Tensor) for item in value.values()):
        return {key: map_tensors(item) for key, item in value.items()}
    return value


def unmap_tensors(value: Any, device: th.device) -> Any:
    """
    Undo :func:`map_tensors`.

    :param value: what it returned
    :param device: for tensors that were not on the CPU
    """
    if not isinstance(value, dict):
        return value
    if value.keys() == {"tensor", "on_cpu"}:
        return th.as_tensor(value["tensor"], device="cpu" if value["on_cpu"] else device)
    like = value.copy()  # a defaultdict keeps its factory
    like.update({key: unmap_tensors(item, device) for key, item in value.items()})
    return like


# --- random generators ------------------------------------------------------------------------------------------------


def capture_generators(action_space: spaces.Space[Any]) -> dict[str, Tree]:
    """
    The states of Python's, NumPy's and torch's random generators and of an action space's.

    :param action_space: of the model
    """
    # A device that nobody has used has no generator yet, and asking for it would start the device.
    on_device = th.cuda.get_rng_state_all() if th.cuda.is_available() and th.cuda.is_initialized() else []
    return {
        "python": random.getstate(),
        "numpy": to_tree(np.random.get_state()),  # SB3 draws from it
        "torch": th.get_rng_state().numpy(),
        "cuda": [state.numpy() for state in on_device],
        "action_space": space_to_tree(action_space),
    }


def restore_generators(state: Mapping[str, Tree], action_space: spaces.Space[Any]) -> None:
    """
    Undo :func:`capture_generators`.

    :param state: what it returned
    :param action_space: of the model
    """
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    th.set_rng_state(th.as_tensor(state["torch"]))
    if state["cuda"] and th.cuda.is_available():
        th.cuda.set_rng_state_all([th.as_tensor(each) for each in state["cuda"][: th.cuda.device_count()]])
    restore_space(action_space, state["action_space"])


# --- versions ---------------------------------------------------------------------------------------------------------


def surroundings(device: th.device) -> dict[str, str]:
    """
    What the bits of a training depend on besides its own settings.

    :param device: of the model
    """
    found = {"python": platform.python_version(), "device": device.type, "torch's threads": str(th.get_num_threads())}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def warn_about_surroundings(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """
    Say what differs from where the checkpoint was made.

    :param before: of the checkpoint
    :param now: of this process
    """
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        changes = ", ".join(f"{name}: {before.get(name, 'none')} then, {now.get(name, 'none')} now" for name in names)
        warn_user(f"The training goes on, but not with the same bits as without the interruption ({changes}).")


# --- the log ----------------------------------------------------------------------------------------------------------


def capture_log(logger: Logger) -> dict[str, Tree]:
    """
    What was recorded since the last row was written: it belongs to the next one.

    :param logger: of the model
    """
    values: dict[str, Tree] = {}
    for name, value in logger.name_to_value.items():
        with suppress(NotPlainError):  # a figure or a video
            values[name] = to_tree(map_tensors(value))
    return {
        "values": values,
        "counts": {name: count for name, count in logger.name_to_count.items() if name in values},
        "excluded": {name: to_tree(names) for name, names in logger.name_to_excluded.items() if name in values},
    }


def restore_log(logger: Logger, state: Mapping[str, Tree]) -> None:
    """
    Undo :func:`capture_log`.

    :param logger: of the resumed model
    :param state: what it returned
    """
    values = {name: unmap_tensors(value, th.device("cpu")) for name, value in state["values"].items()}
    logger.name_to_value.update(values)
    logger.name_to_count.update(state["counts"])
    logger.name_to_excluded.update(state["excluded"])


# --- callbacks --------------------------------------------------------------------------------------------------------


def named_callbacks(callback: Any) -> dict[str, BaseCallback]:
    """
    The callbacks of a training by class and number, which does not depend on how they are nested.

    :param callback: what ``learn`` made of its argument
    """
    found: dict[str, BaseCallback] = {}
    seen: set[int] = set()
    for member in callbacks_in(callback):
        if id(member) not in seen:
            seen.add(id(member))
            name = type(member).__qualname__
            found[f"{name}#{sum(key.rpartition('#')[0] == name for key in found)}"] = member
    return found


def between_iterations(callback: Any) -> list[ActsBetweenIterations]:
    """
    :param callback: what ``learn`` made of its argument
    :return: the callbacks in it that are called between two iterations
    """
    return [member for member in named_callbacks(callback).values() if isinstance(member, ActsBetweenIterations)]


def capture_callbacks(callback: Any) -> dict[str, Tree]:
    """
    The states of all callbacks: ``state_dict()`` where there is one, plain attributes and environments otherwise.

    :param callback: what ``learn`` made of its argument
    """
    return {name: _callback_state(member) for name, member in named_callbacks(callback).items()}


def _callback_state(callback: BaseCallback) -> dict[str, Tree]:
    if isinstance(callback, Stateful):
        return {"state": to_tree(dict(callback.state_dict()))}
    # What the constructor was given stays as this process gives it.
    own = plain_attributes(callback, _REFERENCES | set(_constructor_arguments(type(callback))))
    return {"attributes": own, "environments": {n: capture_state(e)[0] for n, e in _environments_of(callback)}}


def _environments_of(callback: BaseCallback) -> Iterator[tuple[str, VecEnv]]:
    training = callback.model.get_env()
    for name, value in vars(callback).items():
        if isinstance(value, VecEnv) and value is not training:
            yield name, value


def _constructor_arguments(cls: type[Any]) -> Iterator[str]:
    for each in cls.__mro__[:-1]:
        if "__init__" in vars(each):
            yield from inspect.signature(vars(each)["__init__"]).parameters


def hand_out_states(callback: Any, states: Mapping[str, Tree]) -> None:
    """
    Call ``load_state_dict`` of the callbacks that have one.

    :param callback: what ``learn`` made of its argument
    :param states: of the checkpoint
    """
    members = named_callbacks(callback)
    for name, state in states.items():
        member = members.get(name)
        if member is not None and isinstance(member, Stateful) and "state" in state:
            member.load_state_dict(from_tree(state["state"]))
    missing = [name.rpartition("#")[0] for name in states if name not in members and _says_something(states[name])]
    if missing:
        warn_user(f"The checkpoint has the state of callbacks that are not there now: {', '.join(missing)}.")


def _says_something(state: Mapping[str, Tree]) -> bool:
    """Whether a callback has more than SB3's counters: lists and progress bars have not."""
    return bool(state.get("state")) or bool(state.get("environments")) or len(state.get("attributes", ())) > 2


def restore_attributes(callback: Any, states: Mapping[str, Tree]) -> None:
    """
    Give the other callbacks their attributes and environments back, after ``on_training_start`` has begun them anew.

    :param callback: what ``learn`` made of its argument
    :param states: of the checkpoint
    """
    for name, member in named_callbacks(callback).items():
        state = states.get(name)
        if state is None or isinstance(member, Stateful):
            continue
        device = th.device(member.model.device)
        for attribute, tree in state.get("attributes", {}).items():
            value = unmap_tensors(from_tree(tree, getattr(member, attribute, None)), device)
            setattr(member, attribute, value)
        for attribute, tree in state.get("environments", {}).items():
            _restore_environments(member, attribute, tree)


def _restore_environments(callback: BaseCallback, attribute: str, tree: Tree) -> None:
    """Evaluation environments of another kind begin new episodes, as they would without a checkpoint."""
    env = getattr(callback, attribute, None)
    if tree is None or not isinstance(env, VecEnv):
        return
    try:
        restore_state(env, tree)
    except ValueError as error:
        warn_user(f"`{attribute}` of {type(callback).__name__} begins new episodes: {error}")
