"""Environments for the tests of devices."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class DictTask(gym.Env[Any, Any]):
    """Dict observations and several discrete actions; an episode ends after 7 steps, or is cut after 20."""

    observation_space = spaces.Dict({"a": spaces.Box(-1, 1, (3,)), "b": spaces.Discrete(4)})
    action_space = spaces.MultiDiscrete([3, 2])
    #: In how many steps it ends by itself.
    length = 7

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self._observation(), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        reward = float(np.ravel(action)[0])
        return self._observation(), reward, self.t >= self.length, self.t >= 20, {}

    def _observation(self) -> Any:
        return {"a": self.np_random.uniform(-1, 1, 3).astype(np.float32), "b": int(self.np_random.integers(4))}
