"""Callbacks for ``learn(callback=…)``."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sb3_pgplus.callbacks.checkpoint import CheckpointCallback
    from sb3_pgplus.callbacks.evaluation import EvalCallback
    from sb3_pgplus.callbacks.wandb import WandbCallback

__all__ = ["CheckpointCallback", "EvalCallback", "WandbCallback"]

#: Imported when they are asked for: some need an optional package.
_MODULES = {"CheckpointCallback": "checkpoint", "EvalCallback": "evaluation", "WandbCallback": "wandb"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
