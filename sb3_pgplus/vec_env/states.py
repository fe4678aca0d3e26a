"""
The environments' own state, so that a training that is resumed from a checkpoint goes on bit for bit.

What is stored is a plain tree (:mod:`sb3_pgplus.vec_env.state_trees`): nothing in it needs pickle.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from gymnasium.vector import SyncVectorEnv, VectorEnv
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper

from sb3_pgplus.vec_env.episodes import EpisodeMonitor
from sb3_pgplus.vec_env.known_states import kind_of
from sb3_pgplus.vec_env.state_layers import (
    check_env,
    env_to_tree,
    kinds_of,
    layer_to_tree,
    restore_env,
    restore_layer,
)
from sb3_pgplus.vec_env.state_trees import NotPlainError, Tree, from_tree, restore_space, space_to_tree, to_tree

_FORMAT = 1
#: Of a layer: what it is itself, each of its copies, Gymnasium's vector environment in it.
_PARTS = ("own", "envs", "vector")
_SPACES = ("action_space", "observation_space")


def capture_state(env: VecEnv) -> tuple[dict[str, Tree] | None, list[str]]:
    """
    Take the state of environments and their wrappers, between two steps.

    Where reasons are given the state is incomplete: the running episodes cannot go on, and the environments have to be
    reset after :func:`restore_state`. What could be had is kept all the same: statistics, random generators.

    :param env: vector environment, maybe in wrappers
    :return: the state as a plain tree, or None if there is nothing, and the reasons why something is missing in it
    """
    layers: list[dict[str, Tree]] = []
    reasons: list[str] = []
    for layer in _layers_of(env):
        tree, missing = _layer_to_tree(layer)
        layers.append(tree)
        reasons += missing
    pending, missing = _pending_to_tree(env.unwrapped)
    reasons += missing
    if not any(layer[part] for layer in layers for part in _PARTS):
        return None, reasons
    head = {"format": _FORMAT, "n_envs": env.num_envs, "complete": not reasons}
    return head | {"layers": layers, "pending": pending}, reasons


def restore_state(env: VecEnv, state: dict[str, Tree]) -> None:
    """
    Put a state into environments that were just built: what comes next is what would have come after the capture.

    If :func:`capture_state` gave reasons (``state["complete"]`` is False), call ``env.reset()`` afterwards.

    :param env: of the same kinds and number as that one, reset or not
    :param state: what :func:`capture_state` returned
    :raises ValueError: if it is of another kind or number of environments
    """
    if state.get("format") != _FORMAT:
        raise ValueError(f"the state has format {state.get('format')!r}, and this version reads {_FORMAT}")
    if state["n_envs"] != env.num_envs:
        raise ValueError(f"the state is of {state['n_envs']} environments, and there are {env.num_envs}")
    kinds, expected = kinds_of(_layers_of(env)), [layer["kind"] for layer in state["layers"]]
    if kinds != expected:
        raise ValueError(f"the state is of {' around '.join(expected)}, not of {' around '.join(kinds)}")
    for layer, saved in reversed([*zip(_layers_of(env), state["layers"], strict=True)]):
        _restore_layer(layer, saved, restarts=not state["complete"])
    _restore_pending(env.unwrapped, state["pending"])


# --- one layer --------------------------------------------------------------------------------------------------------


def _layers_of(env: VecEnv) -> Iterator[Any]:
    """The wrappers, the outermost first, and at last the environments."""
    layer: Any = env
    while isinstance(layer, VecEnvWrapper):
        yield layer
        layer = layer.venv
    yield layer


def _layer_to_tree(layer: Any) -> tuple[dict[str, Tree], list[str]]:
    own, reason = layer_to_tree(layer)
    vector, missing = env_to_tree(layer.env) if _has_vector_env(layer) else (None, [])
    envs = _envs_to_trees(layer)
    inner = layer.venv if isinstance(layer, VecEnvWrapper) else None
    names = [name for name in _SPACES if getattr(layer, name) is not getattr(inner, name, None)]
    tree = {
        "kind": kind_of(type(layer)),
        "own": own,
        "envs": [env for env, _ in envs],
        "vector": vector,
        "spaces": {name: space_to_tree(getattr(layer, name)) for name in names},
    }
    return tree, [*([] if reason is None else [reason]), *missing, *_merged(of_one for _, of_one in envs)]


def _restore_layer(layer: Any, tree: dict[str, Tree], restarts: bool) -> None:
    if tree["envs"]:
        _restore_envs(layer, tree["envs"], restarts)
    if tree["vector"] is not None:
        check_env(layer.env, tree["vector"])
        restore_env(layer.env, tree["vector"], restarts)
    restore_layer(layer, tree["own"], restarts)
    if restarts and isinstance(vars(layer).get("episodes"), EpisodeMonitor):
        layer.episodes.abandon()
    for name, space in tree["spaces"].items():
        restore_space(getattr(layer, name), space)


def _has_vector_env(layer: Any) -> bool:
    return isinstance(vars(layer).get("env"), VectorEnv)


def _envs_of(layer: Any) -> Sequence[Any]:
    """Gymnasium's environments in a vector environment, as far as this process has them."""
    if isinstance(layer, DummyVecEnv):
        return layer.envs
    base: Any = layer.env.unwrapped if _has_vector_env(layer) else None
    return base.envs if isinstance(base, SyncVectorEnv) else []


def _envs_to_trees(layer: Any) -> list[tuple[Tree, list[str]]]:
    if hasattr(type(layer), "envs_to_trees"):  # they are in other processes
        return list(layer.envs_to_trees())
    return [*map(env_to_tree, _envs_of(layer))]


def _restore_envs(layer: Any, trees: Sequence[Tree], restarts: bool) -> None:
    if hasattr(type(layer), "restore_envs"):
        layer.restore_envs(trees, restarts)
        return
    pairs = [*zip(_envs_of(layer), trees, strict=True)]
    for env, tree in pairs:
        check_env(env, tree)
    for env, tree in pairs:
        restore_env(env, tree, restarts)


# --- what all have ----------------------------------------------------------------------------------------------------


def _pending_to_tree(env: VecEnv) -> tuple[dict[str, Tree], list[str]]:
    """Seeds and options that wait for the next reset, and the infos of the last one."""
    tree = {"reset_infos": [*map(_plain_info, env.reset_infos)], "seeds": to_tree([*env._seeds]), "options": None}
    try:
        return tree | {"options": to_tree([*env._options])}, []
    except NotPlainError as error:
        return tree, [f"the options of the next reset are not plain data: {error}"]


def _restore_pending(env: VecEnv, tree: Tree) -> None:
    env.reset_infos, env._seeds = from_tree(tree["reset_infos"]), from_tree(tree["seeds"])
    if tree["options"] is not None:
        env._options = from_tree(tree["options"])


def _plain_info(info: Mapping[str, Any]) -> dict[str, Tree]:
    """The entries of an info that can be stored; nothing in a training depends on the others."""
    kept: dict[str, Tree] = {}
    for key, value in info.items():
        with contextlib.suppress(NotPlainError):
            kept |= to_tree({key: value})
    return kept


def _merged(reasons: Iterable[list[str]]) -> list[str]:
    """The reasons of each environment; what is the same for several is said once."""
    where: dict[str, list[int]] = {}
    for index, of_one in enumerate(reasons):
        for reason in dict.fromkeys(of_one):
            where.setdefault(reason, []).append(index)
    return [f"{_span(indices)}: {reason}" for reason, indices in where.items()]


def _span(indices: list[int]) -> str:
    """``environments 0-3, 7``"""
    runs = []
    for _, group in groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        members = [index for _, index in group]
        runs.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return f"environment{'s' if len(indices) > 1 else ''} {', '.join(runs)}"
