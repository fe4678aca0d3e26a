"""Policy-gradient algorithms for Stable-Baselines3: ``from sb3_pgplus import PPOPlus``."""

from sb3_pgplus import presets
from sb3_pgplus.a2c import A2CPlus
from sb3_pgplus.buffers import TorchDictRolloutBuffer, TorchRolloutBuffer
from sb3_pgplus.ppo import PPOPlus
from sb3_pgplus.trpo import TRPOPlus
from sb3_pgplus.vec_env import make_vec_env

__version__ = "0.1.0"

__all__ = [
    "A2CPlus",
    "PPOPlus",
    "TRPOPlus",
    "TorchDictRolloutBuffer",
    "TorchRolloutBuffer",
    "__version__",
    "make_vec_env",
    "presets",
]
