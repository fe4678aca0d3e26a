"""
The state of an environment in its wrappers, layer by layer.

A layer's state is what the table of known classes says, and what the class adds to that with ``get_state()`` and
``set_state(state)``. A class that does neither must have nothing that changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
from gymnasium import spaces
from gymnasium.vector import VectorWrapper

from sb3_pgplus.vec_env.constancy import change_in_function, first_change
from sb3_pgplus.vec_env.known_states import IMPOSSIBLE, KNOWN, Known, kind_of
from sb3_pgplus.vec_env.state_trees import (
    NotPlainError,
    Tree,
    from_tree,
    generator_from,
    restore_space,
    space_to_tree,
    to_tree,
)

ADVICE = "To go on exactly, give it get_state() and set_state(state), see docs/vec_env.md"


def kinds_of(layers: Iterator[Any]) -> list[str]:
    """:return: the class of each layer"""
    return [kind_of(type(layer)) for layer in layers]


# --- one layer --------------------------------------------------------------------------------------------------------


def layer_to_tree(layer: Any) -> tuple[Tree, str | None]:
    """
    The state of an environment or wrapper without what it wraps.

    :param layer: the object
    :return: its state, or None and the reason
    """
    name = f"{type(layer).__name__} ({type(layer).__module__})"
    try:
        reason = _obstacle(layer)
        if reason is not None:
            return None, f"{name} {reason}"
        known, tree = _nearest_known(type(layer))[1], {}
        if known is not None:
            tree["known"] = known.to_tree(layer)
        if speaks_protocol(layer):
            tree["own"] = to_tree(layer.get_state())
        return tree, None
    except NotPlainError as error:
        return None, f"{name} has a state that cannot be stored: {error}"
    except NotImplementedError as error:
        return None, f"{name} cannot give its state: {error}"


def restore_layer(layer: Any, tree: Tree, restarts: bool) -> None:
    """
    Undo :func:`layer_to_tree`.

    :param layer: an object of the same class
    :param tree: what that returned
    :param restarts: whether the running episode cannot go on, so that the next ``reset()`` has to begin one
    :raises ValueError: if the object was built differently
    """
    known = _nearest_known(type(layer))[1] or Known()
    if tree is not None and "known" in tree:
        known.restore(layer, tree["known"])
    if tree is not None and "own" in tree:
        layer.set_state(from_tree(tree["own"]))
    if restarts:
        vars(layer).update(known.restart)


def speaks_protocol(layer: Any) -> bool:
    """
    :param layer: an environment or wrapper. Its class is asked, since wrappers pass attributes on
    :return: whether it has ``get_state()`` and ``set_state(state)`` of its own
    """
    getter, setter = (getattr(type(layer), name, None) for name in ("get_state", "set_state"))
    return _takes(getter, layer) and _takes(setter, layer, {})  # MujocoEnv.set_state takes positions and velocities


def _takes(method: Any, *arguments: Any) -> bool:
    try:
        inspect.signature(method).bind(*arguments)
    except (TypeError, ValueError):  # not callable, other arguments, or nothing is known about them
        return False
    return True


def _nearest_known(cls: type[Any]) -> tuple[type[Any] | None, Known | None]:
    return next(((base, KNOWN[kind_of(base)]) for base in cls.__mro__ if kind_of(base) in KNOWN), (None, None))


def _obstacle(layer: Any) -> str | None:
    """Why there is no way to the state of a layer."""
    cls = type(layer)
    base, known = _nearest_known(cls)
    if not speaks_protocol(layer) and base is not cls:
        for prefix, why in IMPOSSIBLE.items():
            if any(kind_of(ancestor).startswith(prefix) for ancestor in cls.__mro__):
                return f"does not give its state: {why}"
        change = None if base is None else first_change(layer, base)
        if base is None or change is not None:
            return f"does not give its state{'' if change is None else f', and {change}'}. {ADVICE}"
    for name in known.functions if known else ():
        change = change_in_function(vars(layer)[name])
        if change is not None:
            return f"has a function {name} that may keep something: it {change}. Make it a class with get_state()"
    return None


# --- an environment in its wrappers -----------------------------------------------------------------------------------


def layers_of(env: Any) -> Iterator[Any]:
    """
    :param env: an environment or a vector environment of Gymnasium
    :return: its wrappers, the outermost first, and at last the environment
    """
    while isinstance(env, (gym.Wrapper, VectorWrapper)):
        yield env
        env = env.env
    yield env


def env_to_tree(env: Any) -> tuple[Tree, list[str]]:
    """
    The state of an environment and of its wrappers.

    :param env: the outermost layer
    :return: a plain tree, and the reasons why something is missing in it
    """
    layers, reasons, covered = [], [], False
    for layer in layers_of(env):
        state, reason = (None, None) if covered else layer_to_tree(layer)
        covered = covered or getattr(type(layer), "covers_inner", False)
        reasons += [reason] if reason is not None else []
        attributes = vars(layer)
        own_spaces = {name: value for name, value in attributes.items() if isinstance(value, spaces.Space)}
        layers.append(
            {
                "kind": kind_of(type(layer)),
                "state": state,
                "generator": to_tree(attributes.get("_np_random")),
                "seed": to_tree(attributes.get("_np_random_seed")),
                "spaces": {name: space_to_tree(space) for name, space in own_spaces.items()},
            }
        )
    return {"layers": layers}, reasons


def check_env(env: Any, tree: Tree) -> None:
    """
    :param env: a fresh environment
    :param tree: of :func:`env_to_tree`
    :raises ValueError: if it is of other classes
    """
    kinds, expected = kinds_of(layers_of(env)), [layer["kind"] for layer in tree["layers"]]
    if kinds != expected:
        raise ValueError(f"the state is of {' around '.join(expected)}, not of {' around '.join(kinds)}")


def restore_env(env: Any, tree: Tree, restarts: bool) -> None:
    """
    Undo :func:`env_to_tree`.

    :param env: a fresh environment of the same classes, reset or not
    :param tree: what that returned
    :param restarts: whether the running episode cannot go on, so that the next ``reset()`` has to begin one
    :raises ValueError: if the environment was built differently
    """
    for layer, saved in zip(layers_of(env), tree["layers"], strict=True):
        restore_layer(layer, saved["state"], restarts)
        if saved["generator"] is not None:
            layer._np_random = generator_from(saved["generator"])
            layer._np_random_seed = saved["seed"]
        for name, space in saved["spaces"].items():
            restore_space(vars(layer).get(name), space)
