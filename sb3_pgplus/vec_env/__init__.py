"""Vector environments: SB3's ``make_vec_env`` with a choice of what runs the copies."""

from typing import TYPE_CHECKING, Any

from sb3_pgplus.vec_env.make import backend_of, make_vec_env

if TYPE_CHECKING:
    from sb3_pgplus.vec_env.mujoco import MujocoVecEnv

__all__ = ["MujocoVecEnv", "backend_of", "make_vec_env"]


def __getattr__(name: str) -> Any:
    if name == "MujocoVecEnv":
        from sb3_pgplus.vec_env.mujoco import MujocoVecEnv

        return MujocoVecEnv
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
