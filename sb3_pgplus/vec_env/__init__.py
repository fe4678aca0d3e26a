"""Vector environments: SB3's ``make_vec_env`` with a choice of what runs the copies."""

import importlib
from typing import TYPE_CHECKING, Any

from sb3_pgplus.vec_env.make import backend_of, make_vec_env

if TYPE_CHECKING:
    from sb3_pgplus.vec_env.envpool import EnvpoolVecEnv
    from sb3_pgplus.vec_env.gymnasium_adapter import GymnasiumVecEnv
    from sb3_pgplus.vec_env.mujoco import MujocoVecEnv
    from sb3_pgplus.vec_env.replay import record_episodes
    from sb3_pgplus.vec_env.states import capture_state, restore_state
    from sb3_pgplus.vec_env.tensors import TensorVecEnv
    from sb3_pgplus.vec_env.workers import WorkersVecEnv

__all__ = [
    "EnvpoolVecEnv",
    "GymnasiumVecEnv",
    "MujocoVecEnv",
    "TensorVecEnv",
    "WorkersVecEnv",
    "backend_of",
    "capture_state",
    "make_vec_env",
    "record_episodes",
    "restore_state",
]

#: Imported when they are asked for: not everybody needs them, or has what they need.
_MODULES = {
    "EnvpoolVecEnv": "envpool",
    "GymnasiumVecEnv": "gymnasium_adapter",
    "JaxVecEnv": "jax_adapter",  # not in __all__: without JAX it is an ImportError
    "MujocoVecEnv": "mujoco",
    "TensorVecEnv": "tensors",
    "WorkersVecEnv": "workers",
    "capture_state": "states",
    "record_episodes": "replay",
    "restore_state": "states",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
