"""
The state of one Gymnasium environment in its wrappers, layer by layer: which attributes hold it.

What is not listed here gives its state itself, with ``get_state()`` and ``set_state(state)``, or has none to give.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np

from sb3_pgplus.vec_env.mujoco_data import restore_simulation, simulation_to_tree
from sb3_pgplus.vec_env.state_trees import (
    NotPlainError,
    Tree,
    from_tree,
    generator_from,
    restore_space,
    space_to_tree,
    to_tree,
)

ADVICE = "Give it get_state() and set_state(state), see docs/vec_env.md"


@dataclass(frozen=True)
class Known:
    """What the state of objects of a class consists of. Attributes that an object lacks are left out."""

    #: Attributes that :func:`to_tree` takes.
    fields: tuple[str, ...] = ()
    #: Lists of numbers that may be long, stored as arrays.
    columns: tuple[str, ...] = ()
    #: Attributes that are readings of a clock → the clock. Times go on where they stopped.
    clocks: Mapping[str, Callable[[], float]] = field(default_factory=dict)
    #: Attributes that are made by the constructor, and must be equal.
    same: tuple[str, ...] = ()
    #: What more there is, and how to put it back.
    extra: tuple[Callable[[Any], Tree], Callable[[Any, Tree], None]] | None = None


def _checker_to_tree(layer: Any) -> Tree:
    return {"checked_reset": layer.checked_reset, "checked_render": layer.checked_render}


def _restore_checker(layer: Any, tree: Tree) -> None:
    # It compares the data of the first calls, which are over: all it does is to warn.
    layer.checked_reset, layer.checked_render = tree["checked_reset"], tree["checked_render"]
    layer.checked_step = layer.checked_data_reuse = tree["checked_reset"]
    layer._previous_data = None


_COLUMNS = ("rewards", "episode_returns", "episode_lengths", "episode_times")
_MONITOR = Known(("needs_reset", "total_steps", "current_reset_info"), _COLUMNS, clocks={"t_start": time.time})
_MUJOCO = Known(("goal", "goal_pos", "cylinder_pos"), extra=(simulation_to_tree, restore_simulation))

KNOWN: dict[str, Known] = {
    "stable_baselines3.common.monitor:Monitor": _MONITOR,
    "gymnasium.wrappers.common:TimeLimit": Known(("_elapsed_steps",)),
    "gymnasium.wrappers.common:OrderEnforcing": Known(("_has_reset",)),
    "gymnasium.wrappers.common:PassiveEnvChecker": Known(extra=(_checker_to_tree, _restore_checker)),
    "gymnasium.envs.classic_control.cartpole:CartPoleEnv": Known(("state", "steps_beyond_terminated")),
    "gymnasium.envs.classic_control.acrobot:AcrobotEnv": Known(("state",)),
    "gymnasium.envs.classic_control.mountain_car:MountainCarEnv": Known(("state",)),
    "gymnasium.envs.classic_control.continuous_mountain_car:Continuous_MountainCarEnv": Known(("state",)),
    "gymnasium.envs.classic_control.pendulum:PendulumEnv": Known(("state", "last_u")),
}
for _module, _name in {
    "ant": "Ant",
    "half_cheetah": "HalfCheetah",
    "hopper": "Hopper",
    "humanoid": "Humanoid",
    "humanoidstandup": "HumanoidStandup",
    "inverted_double_pendulum": "InvertedDoublePendulum",
    "inverted_pendulum": "InvertedPendulum",
    "pusher": "Pusher",
    "reacher": "Reacher",
    "swimmer": "Swimmer",
    "walker2d": "Walker2d",
}.items():
    KNOWN |= {f"gymnasium.envs.mujoco.{_module}_{version}:{_name}Env": _MUJOCO for version in ("v4", "v5")}
"""Class, as ``module:name`` → what its state is. Nothing has to be installed for its name to be here."""


def kind_of(thing: Any) -> str:
    """:return: ``module:name`` of the class"""
    return f"{type(thing).__module__}:{type(thing).__qualname__}"


def speaks_protocol(thing: Any) -> bool:
    """
    :param thing: an environment or wrapper. Its class is asked, since wrappers pass attributes on
    :return: whether it has ``get_state()`` and ``set_state(state)`` of its own
    """
    return all(callable(getattr(type(thing), name, None)) for name in ("get_state", "set_state"))


# --- one layer --------------------------------------------------------------------------------------------------------


def known_to_tree(thing: Any, known: Known) -> Tree:
    """
    :param thing: an object of a known class
    :param known: what its state is
    :raises NotPlainError: if an attribute is not plain
    """
    tree: dict[str, Tree] = {name: to_tree(getattr(thing, name)) for name in known.fields if hasattr(thing, name)}
    tree |= {name: np.array(getattr(thing, name)) for name in known.columns}
    tree |= {name: clock() - getattr(thing, name) for name, clock in known.clocks.items()}
    tree |= {name: to_tree(getattr(thing, name)) for name in known.same}
    if known.extra:
        tree["extra"] = known.extra[0](thing)
    return tree


def restore_known(thing: Any, known: Known, tree: Tree) -> None:
    """
    Undo :func:`known_to_tree`.

    :param thing: a fresh object of that class
    :param known: what its state is
    :param tree: what that returned
    :raises ValueError: if the object was built differently
    """
    for name in known.same:
        if not _equal(to_tree(getattr(thing, name)), tree[name]):
            raise ValueError(f"the state is of a {type(thing).__name__} with another {name}")
    for name in known.fields:
        if name in tree:
            setattr(thing, name, from_tree(tree[name], getattr(thing, name, None)))
    for name in known.columns:
        setattr(thing, name, tree[name].tolist())
    for name, clock in known.clocks.items():
        setattr(thing, name, clock() - tree[name])
    if known.extra:
        known.extra[1](thing, tree["extra"])


def _equal(first: Tree, second: Tree) -> bool:
    if isinstance(first, np.ndarray):
        return np.array_equal(first, second)
    return bool(first == second)


def own_state(thing: Any) -> tuple[Tree, str | None]:
    """
    The state of an environment or wrapper without what it wraps.

    :param thing: the object
    :return: its state, or None and the reason
    """
    known = KNOWN.get(kind_of(thing))
    name = f"{type(thing).__name__} ({type(thing).__module__})"
    try:
        if speaks_protocol(thing):
            return {"own": to_tree(thing.get_state())}, None
        if known is not None:
            return {"known": known_to_tree(thing, known)}, None
    except NotPlainError as error:
        return None, f"the state of {name} is not plain data: {error}"
    except NotImplementedError as error:
        return None, str(error) or f"{name} cannot give its state"
    return None, f"{name} does not give its state. {ADVICE}"


def restore_own(thing: Any, tree: Tree) -> None:
    """
    Undo :func:`own_state`.

    :param thing: an object of the same class
    :param tree: what that returned
    :raises ValueError: if the object was built differently
    """
    if tree is None:
        return
    if "known" in tree:
        restore_known(thing, KNOWN[kind_of(thing)], tree["known"])
    if "own" in tree:
        thing.set_state(from_tree(tree["own"]))


# --- an environment in its wrappers -----------------------------------------------------------------------------------


def layers_of(env: gym.Env[Any, Any]) -> Iterator[Any]:
    """:return: the wrappers of an environment, the outermost first, and at last the environment"""
    layer: Any = env
    while isinstance(layer, gym.Wrapper):
        yield layer
        layer = layer.env
    yield layer


_SPACES = ("action_space", "observation_space", "_action_space", "_observation_space")


def env_to_tree(env: gym.Env[Any, Any]) -> tuple[Tree, list[str]]:
    """
    The state of an environment and of its wrappers.

    :param env: the outermost layer
    :return: a plain tree, and the reasons why something is missing in it
    """
    layers, reasons = [], []
    for layer in layers_of(env):
        state, reason = own_state(layer)
        reasons += [reason] if reason is not None else []
        attributes = vars(layer)
        layers.append(
            {
                "kind": kind_of(layer),
                "state": state,
                "generator": to_tree(attributes.get("_np_random")),
                "seed": to_tree(attributes.get("_np_random_seed")),
                "spaces": {name: space_to_tree(attributes[name]) for name in _SPACES if name in attributes},
            }
        )
    return {"complete": not reasons, "layers": layers}, reasons


def check_env(env: gym.Env[Any, Any], tree: Tree) -> None:
    """
    :param env: a fresh environment
    :param tree: of :func:`env_to_tree`
    :raises ValueError: if it is of other classes
    """
    kinds, expected = [*map(kind_of, layers_of(env))], [layer["kind"] for layer in tree["layers"]]
    if kinds != expected:
        raise ValueError(
            f"the state is of an environment of {' in '.join(expected[::-1])}, not {' in '.join(kinds[::-1])}"
        )


def restore_env(env: gym.Env[Any, Any], tree: Tree) -> None:
    """
    Undo :func:`env_to_tree`.

    :param env: a fresh environment of the same classes, reset or not
    :param tree: what that returned
    :raises ValueError: if the environment was built differently
    """
    check_env(env, tree)
    for layer, saved in zip(layers_of(env), tree["layers"], strict=True):
        restore_own(layer, saved["state"])
        if saved["generator"] is not None:
            layer._np_random = generator_from(saved["generator"])
            layer._np_random_seed = saved["seed"]
        for name, space in saved["spaces"].items():
            restore_space(vars(layer).get(name), space)
        if not tree["complete"] and kind_of(layer) in RESTARTS:
            vars(layer).update(RESTARTS[kind_of(layer)])


#: What makes the next ``reset()`` begin an episode, where the running one cannot go on.
RESTARTS: Mapping[str, Mapping[str, Any]] = {"stable_baselines3.common.monitor:Monitor": {"needs_reset": True}}
