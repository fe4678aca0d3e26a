"""
The environments' own state, so that a training that is resumed from a checkpoint goes on bit for bit.

What is stored is a plain tree (:mod:`sb3_pgplus.vec_env.state_trees`): nothing in it needs pickle.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper

from sb3_pgplus.vec_env.serial import SerialVecEnv
from sb3_pgplus.vec_env.state_layers import check_env, env_to_tree, kind_of, own_state, restore_env, restore_own
from sb3_pgplus.vec_env.state_trees import NotPlainError, Tree, from_tree, restore_space, space_to_tree, to_tree

_FORMAT = 1


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
        state, missing = _vec_state(layer)
        reasons += missing
        layers.append({"kind": kind_of(layer), "state": state, "spaces": _spaces_to_tree(layer)})
    pending, missing = _pending_to_tree(env.unwrapped)
    reasons += missing
    if all(layer["state"] is None for layer in layers):
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
    layers = [*_layers_of(env)]
    kinds, expected = [*map(kind_of, layers)], [layer["kind"] for layer in state["layers"]]
    if kinds != expected:
        raise ValueError(f"the state is of {' around '.join(expected)}, not of {' around '.join(kinds)}")
    for layer, saved in reversed([*zip(layers, state["layers"], strict=True)]):
        _restore_vec(layer, saved["state"])
        for name, space in saved["spaces"].items():
            restore_space(getattr(layer, name), space)
    _restore_pending(env.unwrapped, state["pending"])


def _layers_of(env: VecEnv) -> Iterator[Any]:
    layer: Any = env
    while isinstance(layer, VecEnvWrapper):
        yield layer
        layer = layer.venv
    yield layer


def _spaces_to_tree(layer: Any) -> dict[str, Tree]:
    """Of the spaces that are this layer's own."""
    inner = getattr(layer, "venv", None) if isinstance(layer, VecEnvWrapper) else None
    names = ("action_space", "observation_space")
    return {n: space_to_tree(getattr(layer, n)) for n in names if getattr(layer, n) is not getattr(inner, n, None)}


def _vec_state(layer: Any) -> tuple[Tree, list[str]]:
    if type(layer) in (DummyVecEnv, SerialVecEnv):
        return _single_envs_to_tree(layer)
    state, reason = own_state(layer)
    return state, [] if reason is None else [reason]


def _restore_vec(layer: Any, tree: Tree) -> None:
    if type(layer) in (DummyVecEnv, SerialVecEnv):
        _restore_single_envs(layer, tree)
    else:
        restore_own(layer, tree)


# --- one Gymnasium environment per copy -------------------------------------------------------------------------------


def _single_envs_to_tree(env: DummyVecEnv) -> tuple[Tree, list[str]]:
    envs, reasons = zip(*map(env_to_tree, env.envs), strict=True)
    buffers = {"observations": [*env.buf_obs.values()], "dones": env.buf_dones, "rewards": env.buf_rews}
    actions = to_tree(np.asarray(env.actions)) if hasattr(env, "actions") else None
    return {"envs": [*envs], "buffers": to_tree(buffers), "actions": actions}, merge_reasons(reasons)


def _restore_single_envs(env: DummyVecEnv, tree: Tree) -> None:
    for single, state in zip(env.envs, tree["envs"], strict=True):
        check_env(single, state)
    for single, state in zip(env.envs, tree["envs"], strict=True):
        restore_env(single, state)
    saved = tree["buffers"]
    for array, values in zip(env.buf_obs.values(), saved["observations"], strict=True):
        if array.shape != values.shape:
            raise ValueError(f"the state has observations of shape {values.shape}, and these have {array.shape}")
        array[...] = values
    env.buf_dones[:], env.buf_rews[:] = saved["dones"], saved["rewards"]
    if tree["actions"] is not None:
        env.actions = from_tree(tree["actions"])


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


def merge_reasons(reasons: Any) -> list[str]:
    """
    Say once what is the same for several environments.

    :param reasons: of each environment
    """
    where: dict[str, list[int]] = {}
    for index, of_one in enumerate(reasons):
        for reason in of_one:
            where.setdefault(reason, []).append(index)
    return [f"{_span(indices)}: {reason}" for reason, indices in where.items()]


def _span(indices: list[int]) -> str:
    """``environments 0-3, 7``"""
    runs = []
    for _, group in groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        members = [index for _, index in group]
        runs.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return f"environment{'s' if len(indices) > 1 else ''} {', '.join(runs)}"
