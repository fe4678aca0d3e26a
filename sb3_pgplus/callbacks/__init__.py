"""Callbacks for ``learn(callback=…)``."""

from sb3_pgplus.callbacks.checkpoint import CheckpointCallback

__all__ = ["CheckpointCallback"]
