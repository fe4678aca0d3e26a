"""
What environments' states are made of: plain trees, random generators, and the few objects that hold running statistics.

A plain tree has dicts, lists, tuples, strings, integers of any size, floats, bools, None, NumPy arrays and NumPy
scalars. A dict's keys are any of these that can be keys. It shares no memory with what it was made from.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.wrappers.utils import RunningMeanStd as GymnasiumRunningMeanStd
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env.stacked_observations import StackedObservations

Tree = Any
"""A plain tree, as described above."""

#: Objects that are not plain themselves → the attributes that they are made of.
_MOMENTS = ("mean", "var", "count")
PARTS: Mapping[type[Any], tuple[str, ...]] = {
    RunningMeanStd: _MOMENTS,
    GymnasiumRunningMeanStd: _MOMENTS,
    StackedObservations: ("stacked_obs", "sub_stacked_observations"),
}
_CONSTANTS = (bool, int, float, type(None))


class NotPlainError(TypeError):
    """Something is not, and has no, plain tree."""


def to_tree(value: Any) -> Tree:
    """
    Copy a value into a plain tree.

    :param value: a plain tree, or one with deques, NumPy's random generators and :data:`PARTS`
    :raises NotPlainError: if it is anything else
    """
    if isinstance(value, str):
        return str(value)  # maybe a np.str_
    if isinstance(value, (np.ndarray, np.generic)) and _is_plain(value.dtype):
        return value.copy()
    if type(value) in _CONSTANTS:
        return value
    if type(value) is tuple:
        return tuple(map(to_tree, value))
    if isinstance(value, (list, deque)):
        return [*map(to_tree, value)]
    return {to_tree(name): to_tree(part) for name, part in _parts(value).items()}


def _is_plain(dtype: np.dtype[Any]) -> bool:
    """Whether its short name says all of it: it does not of dtypes with fields."""
    return not dtype.hasobject and np.dtype(dtype.str) == dtype


def _parts(value: Any) -> dict[Any, Any]:
    if isinstance(value, dict):
        return value
    if isinstance(value, np.random.Generator):
        return dict(value.bit_generator.state)
    if type(value) in PARTS:
        return {name: getattr(value, name) for name in PARTS[type(value)] if hasattr(value, name)}
    raise NotPlainError(f"{type(value).__name__} is not plain data")


def from_tree(tree: Tree, current: Any = None) -> Any:
    """
    Undo :func:`to_tree`.

    :param tree: what it returned
    :param current: what is in the place of the value now. Generators and :data:`PARTS` are filled in place, deques and
        kinds of dicts (as ``defaultdict``) are made like it; without it their tree is returned as it is
    :return: the value; it shares no memory with the tree
    :raises ValueError: if the value does not fit into what is there
    """
    if type(current) in PARTS:
        return _fill(current, tree)
    if isinstance(current, np.random.Generator):
        return generator_from(tree)
    if isinstance(current, deque):
        return deque(map(from_tree, tree), current.maxlen)
    if isinstance(tree, dict):
        known = current if isinstance(current, dict) else {}
        like = known.copy()  # a defaultdict keeps its factory
        like.clear()
        like.update({key: from_tree(item, known.get(key)) for key, item in tree.items()})
        return like
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(from_tree, tree))
    return np.array(tree) if isinstance(tree, np.ndarray) else tree


def _fill(target: Any, tree: Mapping[str, Tree]) -> Any:
    for name, part in tree.items():
        before = getattr(target, name)
        if isinstance(before, np.ndarray) and before.shape != np.shape(part):
            raise ValueError(f"the state has {name} of shape {np.shape(part)}, and {before.shape} is needed")
        setattr(target, name, from_tree(part, before))
    return target


# --- random generators ------------------------------------------------------------------------------------------------


def generator_from(tree: Tree) -> np.random.Generator:
    """
    :param tree: of a generator
    :return: a generator that draws what that one would have drawn
    :raises ValueError: if NumPy has no such generator
    """
    bit_generator = getattr(np.random, str(tree["bit_generator"]), None)
    if not (isinstance(bit_generator, type) and issubclass(bit_generator, np.random.BitGenerator)):
        raise ValueError(f"NumPy has no bit generator {tree['bit_generator']!r}")
    generator = np.random.Generator(bit_generator())
    generator.bit_generator.state = tree
    return generator


def process_generators() -> Tree:
    """:return: the state of Python's and NumPy's global generators in this process"""
    version, numbers, gauss = random.getstate()
    python = {"version": version, "numbers": np.array(numbers, dtype=np.int64), "gauss": gauss}
    return {"python": python, "numpy": to_tree(dict(np.random.get_state(legacy=False)))}


def set_process_generators(tree: Tree) -> None:
    """
    Undo :func:`process_generators`.

    :param tree: what that returned
    """
    python = tree["python"]
    random.setstate((python["version"], tuple(python["numbers"].tolist()), python["gauss"]))
    np.random.set_state(tree["numpy"])


def space_to_tree(space: spaces.Space[Any] | None) -> Tree:
    """
    The random generators of a space and of the spaces in it.

    :param space: the space, or None
    :return: None if it has drawn nothing and was not seeded
    """
    if space is None:
        return None
    generators = [to_tree(part._np_random) for part in _parts_of(space)]
    return generators if any(tree is not None for tree in generators) else None


def restore_space(space: spaces.Space[Any] | None, tree: Tree) -> None:
    """
    Undo :func:`space_to_tree`.

    :param space: the space, or None
    :param tree: what that returned
    :raises ValueError: if it is of a space with other parts
    """
    parts = [] if space is None or tree is None else list(_parts_of(space))
    if len(parts) != len(tree or []):
        raise ValueError(f"the state has generators of {len(tree or [])} spaces, and {space} has {len(parts)} parts")
    for part, generator in zip(parts, tree or [], strict=True):
        if generator is not None:
            part._np_random = generator_from(generator)


def _parts_of(space: spaces.Space[Any]) -> Iterator[spaces.Space[Any]]:
    """The space itself and all below it."""
    yield space
    below: list[Any] = []
    if isinstance(space, spaces.Dict):
        below = list(space.spaces.values())
    elif isinstance(space, (spaces.Tuple, spaces.OneOf)):
        below = list(space.spaces)
    elif isinstance(space, spaces.Sequence):
        below = [space.feature_space]
    elif isinstance(space, spaces.Graph):
        below = [part for part in (space.node_space, space.edge_space) if part is not None]
    for part in below:
        yield from _parts_of(part)
