"""The state of a MuJoCo simulation, with everything that is computed from it a substep late."""

from __future__ import annotations

from typing import Any

import numpy as np

from sb3_pgplus.vec_env.common import Array
from sb3_pgplus.vec_env.state_trees import Tree

#: Types of MjData's fields; pointers are neither.
_TYPES = (np.dtype(np.float64), np.dtype(np.int32), np.dtype(bool))


def simulation_to_tree(env: Any) -> Tree:
    """
    The whole state of a simulation.

    MuJoCo's integration state, warm start included, determines the simulation. But Gymnasium's tasks also read what the
    step before computed, positions of bodies for instance, and these are those of the last substep's beginning. They
    cannot be computed again from the state, so that all of these fields are kept.

    :param env: an unwrapped ``MujocoEnv``
    :return: ``"integration"``, and the derived fields in one array for each type
    :raises NotImplementedError: if there is more to the state, see :func:`hidden_state`
    """
    import mujoco

    model, data, spec = env.model, env.data, mujoco.mjtState.mjSTATE_INTEGRATION
    if reason := hidden_state(model):
        raise NotImplementedError(f"the model of {type(env).__name__} has {reason}")
    integration = np.empty(mujoco.mj_stateSize(model, spec))
    mujoco.mj_getState(model, data, integration, spec)
    fields = _derived(model, data)
    derived = {str(dtype): np.concatenate([a.ravel() for a in arrays]) for dtype, arrays in fields.items() if arrays}
    return {"integration": integration, **derived}


def restore_simulation(env: Any, tree: Tree) -> None:
    """
    Undo :func:`simulation_to_tree`.

    :param env: an unwrapped ``MujocoEnv`` with the same model
    :param tree: what that returned
    :raises ValueError: if the model is another one
    """
    import mujoco

    model, data, spec = env.model, env.data, mujoco.mjtState.mjSTATE_INTEGRATION
    fields = _derived(model, data)
    sizes = {str(dtype): sum(array.size for array in arrays) for dtype, arrays in fields.items() if arrays}
    sizes["integration"] = mujoco.mj_stateSize(model, spec)
    if {name: array.size for name, array in tree.items()} != sizes:
        raise ValueError(
            f"the state is of another model, or another version of MuJoCo, than this {type(env).__name__} has"
        )
    mujoco.mj_resetData(model, data)
    mujoco.mj_setState(model, data, tree["integration"], spec)
    for dtype, arrays in fields.items():
        start = 0
        for array in arrays:
            array[...] = tree[str(dtype)][start : start + array.size].reshape(array.shape)
            start += array.size


def hidden_state(model: Any) -> str:
    """
    Say what of a model's state MuJoCo does not count among it.

    :param model: MuJoCo's
    :return: empty if there is nothing
    """
    import mujoco

    if model.nplugin:
        return "engine plugins, which may keep a state of their own"
    if model.opt.enableflags & getattr(mujoco.mjtEnableBit, "mjENBL_SLEEP", 0):  # MuJoCo 3.4 and newer
        return "bodies that may sleep, and which ones do is not part of the state"
    return ""


def _derived(model: Any, data: Any) -> dict[np.dtype[Any], list[Array]]:
    """
    Fields of MjData by their type. Left out are those about contacts and constraints, whose number changes: a step
    computes them before it reads them.
    """
    import mujoco

    fresh = mujoco.MjData(model)
    arrays = {name: getattr(fresh, name) for name in sorted(dir(fresh)) if not name.startswith("_")}
    sized = [name for name, array in arrays.items() if isinstance(array, np.ndarray) and array.size]
    return {dtype: [getattr(data, name) for name in sized if arrays[name].dtype == dtype] for dtype in _TYPES}
