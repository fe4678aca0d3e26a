"""SB3's ``DummyVecEnv`` without the time it spends on deep copies."""

from copy import deepcopy
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.common.vec_env.util import dict_to_obs

#: What nobody can change, and so need not be copied.
_IMMUTABLE = frozenset({bool, int, float, complex, str, bytes, type(None), np.bool_})
_IMMUTABLE |= {np.float16, np.float32, np.float64, np.int8, np.int16, np.int32, np.int64, np.uint8}


class SerialVecEnv(DummyVecEnv):
    """
    Copies of an environment one after the other in this process: ``DummyVecEnv``, result for result.

    SB3 copies every step's infos and observations with ``deepcopy``, which for a cheap environment takes longer than
    the environment. Numbers and strings are handed over as they are here, and only the rest is copied.

    :param env_fns: functions that build the copies
    """

    backend = "serial"

    def step_wait(self) -> Any:
        """
        :return: observations, rewards, dones, infos of one step of all copies
        """
        for index, env in enumerate(self.envs):
            obs, reward, terminated, truncated, info = env.step(self.actions[index])
            done = terminated or truncated
            info["TimeLimit.truncated"] = truncated and not terminated
            if done:
                info["terminal_observation"] = obs
                obs, self.reset_infos[index] = env.reset()
            self.buf_rews[index], self.buf_dones[index], self.buf_infos[index] = reward, done, info
            self._save_obs(index, obs)
        return self._obs_from_buf(), self.buf_rews.copy(), self.buf_dones.copy(), [*map(copy_info, self.buf_infos)]

    def _obs_from_buf(self) -> Any:
        return dict_to_obs(self.observation_space, {key: array.copy() for key, array in self.buf_obs.items()})


def copy_info(info: dict[str, Any]) -> dict[str, Any]:
    """
    A copy of an info that shares nothing changeable with it: ``deepcopy``, quick for numbers and strings.

    :param info: of one environment
    """
    return {key: value if type(value) in _IMMUTABLE else deepcopy(value) for key, value in info.items()}
