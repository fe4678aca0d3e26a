"""Callbacks for ``learn(callback=…)``."""

from sb3_pgplus.callbacks.evaluation import EvalCallback

__all__ = ["EvalCallback"]
