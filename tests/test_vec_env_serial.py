"""The serial backend: ``DummyVecEnv`` result for result, without deep copies of what cannot change."""

import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv
from vec_env_cases import CASES, assert_plays_like_sb3, monitored, scripted

from sb3_pgplus.vec_env.serial import SerialVecEnv, copy_info


@pytest.mark.parametrize("case", CASES)
def test_it_plays_like_sb3s_dummy_vec_env(case: str) -> None:
    env_fns = CASES[case]()
    env = SerialVecEnv(monitored(env_fns))
    assert isinstance(env, DummyVecEnv)
    assert_plays_like_sb3(env, env_fns, full_infos=True)


def test_what_was_handed_out_does_not_change_with_the_next_step() -> None:
    env = SerialVecEnv(monitored(scripted((9,), (2,))))
    env.seed(0)
    first = env.reset()
    kept, copy = [first], [first.copy()]
    for _ in range(5):
        observations, rewards, dones, infos = env.step(np.ones((2, 2), dtype=np.float32))
        kept += [observations, rewards, dones, infos[0]["where"]]
        copy += [observations.copy(), rewards.copy(), dones.copy(), infos[0]["where"].copy()]
    for one, other in zip(kept, copy, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_copied_info_shares_nothing_that_can_change() -> None:
    info = {"n": 1, "x": np.float64(2.0), "array": np.zeros(2), "nested": {"list": [1]}, "none": None, "name": "a"}
    copied = copy_info(info)
    copied["array"][0] = 5
    copied["nested"]["list"].append(2)
    assert (info["array"][0], info["nested"]) == (0, {"list": [1]})
    assert {key: copied[key] for key in ("n", "x", "none", "name")} == {"n": 1, "x": 2.0, "none": None, "name": "a"}
