"""Policy-gradient algorithms for Stable-Baselines3: ``from sb3_pgplus import PPOPlus``."""

from sb3_pgplus import presets
from sb3_pgplus.buffers import TorchDictRolloutBuffer, TorchRolloutBuffer
from sb3_pgplus.ppo import PPOPlus

__version__ = "0.1.0"

__all__ = ["PPOPlus", "TorchDictRolloutBuffer", "TorchRolloutBuffer", "__version__", "presets"]
