"""Environments of the benchmark: Gymnasium's, and pictures that cost next to nothing to make."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

SYNTHETIC_IMAGES = "SyntheticImages-v0"
N_PICTURES = 16
EPISODE = 500


class SyntheticImages(gym.Env[np.ndarray[Any, Any], np.int64]):
    """
    Frames of random pixels, 84 × 84 × 4 as of a stacked Atari game, drawn once; rewards by a rule that can be learned.

    What is measured is everything around an image environment: its own step is the copy of a frame.
    """

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0, 255, (84, 84, 4), np.uint8)
        self.action_space = spaces.Discrete(6)
        pixels = np.random.default_rng(0).integers(0, 256, (N_PICTURES, 84, 84, 4), dtype=np.uint8)
        self._pictures, self._shown, self._step = pixels, 0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        """Begin with a random picture."""
        super().reset(seed=seed)
        self._shown, self._step = int(self.np_random.integers(N_PICTURES)), 0
        return self._pictures[self._shown].copy(), {}

    def step(self, action: Any) -> Any:
        """Reward 1 for the picture's number modulo 6."""
        reward = float(int(action) == self._shown % 6)
        self._step += 1
        self._shown = (self._shown * 5 + self._step) % N_PICTURES
        return self._pictures[self._shown].copy(), reward, False, self._step >= EPISODE, {}


def env_id_or_class(name: str) -> Any:
    """What ``make_vec_env`` takes."""
    return SyntheticImages if name == SYNTHETIC_IMAGES else name
