"""Gymnasium's vector environments behind SB3's interface: the same numbers as DummyVecEnv, in every autoreset mode."""

import functools
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import TimeLimit
from gymnasium.wrappers import vector as vector_wrappers
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecNormalize
from vec_env_cases import CASES, Scripted, ScriptedDict, assert_plays_like_sb3, play, registered, scripted

from sb3_pgplus.vec_env import GymnasiumVecEnv
from sb3_pgplus.vec_env.gymnasium_adapter import make_vector_env

MODES = list(AutoresetMode)


class OneState(VectorEnv[Any, Any, Any]):
    """A native vector environment: N counters, reset together or, if it honours the mask, one by one."""

    def __init__(self, num_envs: int, limits: list[int], mode: AutoresetMode, honours_mask: bool) -> None:
        self.num_envs, self.limits, self.honours_mask = num_envs, np.array(limits), honours_mask
        self.metadata = {"autoreset_mode": mode}
        self.single_observation_space = gym.spaces.Box(0, 100, (1,), np.float32)
        self.single_action_space = gym.spaces.Discrete(2)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.gravity = 9.81
        self.counts = np.zeros((num_envs, 1), np.float32)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        mask = (options or {}).get("reset_mask") if self.honours_mask else None
        self.counts[slice(None) if mask is None else mask] = 0
        return self.counts, {"shared": 7, "own": np.arange(self.num_envs)}

    def step(self, actions: Any) -> Any:
        self.counts += 1
        truncated = self.counts[:, 0] >= self.limits
        infos = {"own": np.arange(self.num_envs) * 10, "_own": np.arange(self.num_envs) > 0}
        return self.counts, np.ones(self.num_envs), np.zeros(self.num_envs, bool), truncated, infos

    def double_gravity(self) -> float:
        self.gravity *= 2
        return self.gravity


class Corridor(OneState):
    """Action 1 goes forward, 2 ends the episode, 0 stays; observations are positions, and begin at 0."""

    def __init__(self, num_envs: int = 2, honours_mask: bool = False) -> None:
        super().__init__(num_envs, [100] * num_envs, AutoresetMode.NEXT_STEP, honours_mask)
        self.single_observation_space, self.single_action_space = gym.spaces.Discrete(100), gym.spaces.Discrete(3)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.counts = np.zeros(num_envs, np.int64)

    def step(self, actions: Any) -> Any:
        self.counts += actions == 1
        return self.counts, np.ones(self.num_envs), actions == 2, np.zeros(self.num_envs, bool), {}


# --- the same numbers as SB3 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full_infos", [False, True], ids=["brief infos", "full infos"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("case", CASES)
def test_a_sync_vector_env_plays_bit_for_bit_like_dummy_vec_env(case, mode, full_infos):
    env = GymnasiumVecEnv(SyncVectorEnv(CASES[case](), copy=False, autoreset_mode=mode), full_infos=full_infos)
    assert_plays_like_sb3(env, CASES[case](), full_infos)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_an_async_vector_env_plays_bit_for_bit_like_dummy_vec_env(mode):
    fns = scripted((3, 1), (4,), cls=ScriptedDict)
    env = GymnasiumVecEnv(AsyncVectorEnv(fns, context="fork", copy=False, autoreset_mode=mode), full_infos=True)
    try:
        assert_plays_like_sb3(env, fns, full_infos=True, steps=12)
        assert env.has_attr("steps") and not env.has_attr("nothing")
        with pytest.raises(AttributeError, match="nothing"):
            env.get_attr("nothing")
        env.set_attr("ending", "truncated")
        assert env.get_attr("ending", [1]) == ["truncated"]
        assert env.env_method("shift", 2) == [n + 2 for n in env.get_attr("episodes")]
        with pytest.raises(NotImplementedError, match="for all its environments"):
            env.env_method("shift", 2, indices=[0])
        assert len(env.get_images()) == 2
    finally:
        env.close()


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED], ids=lambda mode: mode.name)
def test_a_native_vector_env_that_honours_the_mask_gives_correct_transitions(mode):
    env = GymnasiumVecEnv(OneState(3, [2, 3, 3], mode, honours_mask=True), full_infos=True)
    assert env.reset().tolist() == [[0], [0], [0]]
    assert env.reset_infos[1] == {"shared": 7, "own": 1}
    taken = [env.step(np.zeros(3, int)) for _ in range(4)]
    # Observations count the steps since the last reset; they stay what they were although the environment reuses them.
    assert [obs[:, 0].tolist() for obs, *_ in taken] == [[1, 1, 1], [0, 2, 2], [1, 0, 0], [0, 1, 1]]
    assert [dones.tolist() for _, _, dones, _ in taken] == [[0, 0, 0], [1, 0, 0], [0, 1, 1], [1, 0, 0]]
    assert [taken[1][3][0]["terminal_observation"].item(), taken[2][3][2]["terminal_observation"].item()] == [2, 3]
    assert taken[1][3][0]["TimeLimit.truncated"] and "own" not in taken[1][3][0]
    assert taken[0][3][2] == {"TimeLimit.truncated": False, "own": 20}


def test_a_native_vector_env_whose_episodes_end_together_needs_no_mask():
    env = GymnasiumVecEnv(OneState(2, [3, 3], AutoresetMode.NEXT_STEP, honours_mask=False))
    _, taken = play(env, 7)
    assert [step.observations[:, 0].tolist() for step in taken] == [[n, n] for n in (1, 2, 0, 1, 2, 0, 1)]
    assert [step.infos[1].get("episode", {}).get("l") for step in taken] == [None, None, 3, None, None, 3, None]


@pytest.mark.parametrize("build", [
    lambda: gym.make_vec("CartPole-v1", 4, vectorization_mode="vector_entry_point"),
    lambda: OneState(2, [2, 3], AutoresetMode.NEXT_STEP, honours_mask=False),
    lambda: OneState(2, [2, 3], AutoresetMode.DISABLED, honours_mask=False),
], ids=["Gymnasium's CartPole", "next step", "disabled"])  # fmt: skip
def test_transitions_that_cannot_be_correct_are_refused_with_what_to_build_instead(build):
    with pytest.raises(ValueError, match=r"ignores reset.*SAME_STEP"):
        play(GymnasiumVecEnv(build()), 60)


def test_an_ignored_mask_is_noticed_also_if_the_first_partial_reset_did_not_show_it():
    env = GymnasiumVecEnv(Corridor())
    env.reset()
    env.step(np.array([2, 0]))  # the other one is where it began
    env.step(np.array([0, 1]))
    with pytest.raises(ValueError, match=r"ignores reset.*SAME_STEP"):
        env.step(np.array([2, 1]))


@pytest.mark.filterwarnings("ignore:.*The environment is being initialised with render_mode")
@pytest.mark.parametrize("honours_mask", [False, True])
def test_a_native_vector_env_is_only_taken_if_it_visibly_honours_the_mask(honours_mask):
    native = functools.partial(Corridor, honours_mask=honours_mask)
    gym.register("Corridor-v0", Scripted, vector_entry_point=native)
    try:
        env = make_vector_env("Corridor-v0", 2, {})
    finally:
        del gym.registry["Corridor-v0"]
    assert isinstance(env.unwrapped, Corridor if honours_mask else SyncVectorEnv)


def test_async_workers_that_would_reset_twice_are_refused():
    env = AsyncVectorEnv(scripted((3,)), context="fork", shared_memory=False)
    try:
        with pytest.raises(ValueError, match="shared_memory=True"):
            GymnasiumVecEnv(env)
    finally:
        env.close()


def test_a_same_step_env_without_final_observations_is_refused():
    env = GymnasiumVecEnv(OneState(2, [2, 2], AutoresetMode.SAME_STEP, honours_mask=False))
    with pytest.raises(ValueError, match="last observation is lost"):
        play(env, 3)


@pytest.mark.parametrize("declared", [None, "sometimes"])
def test_an_unknown_autoreset_mode_is_refused(declared):
    env = OneState(1, [2], AutoresetMode.DISABLED, honours_mask=True)
    env.metadata = {"autoreset_mode": declared}
    with pytest.raises(ValueError, match="autoreset mode"):
        GymnasiumVecEnv(env)


class OwnNormalization(vector_wrappers.NormalizeObservation):
    """A user's subclass."""


@pytest.mark.parametrize(
    "wrapper",
    [
        vector_wrappers.DictInfoToList,
        lambda env: vector_wrappers.ClipReward(vector_wrappers.DictInfoToList(env), 0, 1),
    ],
)
def test_infos_that_were_taken_apart_are_refused_at_once(wrapper):
    env = wrapper(gym.make_vec("Pendulum-v1", 2, vectorization_mode="sync"))
    with pytest.raises(ValueError, match="DictInfoToList.*leave it out"):
        GymnasiumVecEnv(env)


@pytest.mark.parametrize("wrapper", [vector_wrappers.NormalizeObservation, OwnNormalization])
def test_gymnasium_itself_refuses_normalisation_from_outside_once_an_episode_ends_alone(wrapper):
    env = GymnasiumVecEnv(wrapper(gym.make_vec("CartPole-v1", 2, vectorization_mode="sync")))
    with pytest.raises(ValueError, match="NormalizeObservation does not support partial resets"):
        play(env, 200)


def test_one_environment_alone_may_be_normalised_from_outside():
    env = GymnasiumVecEnv(
        vector_wrappers.NormalizeObservation(gym.make_vec("CartPole-v1", 1, vectorization_mode="sync"))
    )
    env.reset()
    dones = [env.step(np.ones(1, dtype=int))[2][0] for _ in range(30)]
    assert sum(dones) >= 2  # pushed to one side, the pole falls after some ten steps


def test_wrappers_around_single_transitions_stay_welcome():
    env = GymnasiumVecEnv(vector_wrappers.ClipReward(gym.make_vec("Pendulum-v1", 2, vectorization_mode="sync"), -1, 0))
    env.reset()
    assert (env.step(np.zeros((2, 1)))[1] >= -1).all()


@pytest.mark.parametrize("call", [lambda env: env.step(np.zeros(2, dtype=int)), lambda env: env.reset()])
def test_a_closed_one_says_so(call):
    env = GymnasiumVecEnv(gym.make_vec("CartPole-v1", 2, vectorization_mode="sync"))
    env.reset()
    env.close()
    with pytest.raises(RuntimeError, match="was closed; make another one"):
        call(env)


def test_what_is_no_vector_env_is_refused():
    with pytest.raises(TypeError, match=r"gymnasium\.vector\.VectorEnv"):
        GymnasiumVecEnv(Scripted())  # type: ignore[arg-type]  # the point of the test


# --- seeds, options, resets -------------------------------------------------------------------------------------------


def test_seeds_are_used_once_and_counted_up():
    env, other = (GymnasiumVecEnv(SyncVectorEnv(registered("CartPole-v1", 3))) for _ in range(2))
    env.seed(10)
    other.seed(11)
    first = env.reset()
    np.testing.assert_array_equal(first[1:], other.reset()[:-1])
    assert not np.array_equal(env.reset(), first)


def test_reset_options_reach_the_environments_once():
    env = GymnasiumVecEnv(SyncVectorEnv(scripted((3,), (3,))))
    env.set_options({"option": 5})
    env.reset()
    assert [info["option"] for info in env.reset_infos] == [5, 5]
    env.reset()
    assert [info["option"] for info in env.reset_infos] == [0, 0]
    env.set_options([{"option": 1}, {"option": 2}])
    with pytest.raises(ValueError, match="same reset options"):
        env.reset()
    env.reset()  # which were refused once
    env.set_options([{"option": 1}, {"option": 2}])
    with pytest.raises(ValueError, match="same reset options"):
        env.reset()


def test_a_reset_in_the_middle_starts_the_statistics_anew():
    env = GymnasiumVecEnv(SyncVectorEnv(scripted((4,))))
    env.reset()
    env.step(np.zeros((1, 2)))
    _, taken = play(env, 4)
    assert taken[-1].infos[0]["episode"]["l"] == 4


# --- attributes and rendering -----------------------------------------------------------------------------------------


def test_attributes_are_read_and_set_where_they_are():
    fns = [lambda: TimeLimit(Scripted((9,)), 5), lambda: TimeLimit(Scripted((9,)), 5)]
    env = GymnasiumVecEnv(SyncVectorEnv(fns))
    env.set_attr("ending", "both", indices=1)
    assert env.get_attr("ending") == ["terminated", "both"]
    assert env.get_attr("unwrapped")[1].ending == "both"
    assert env.env_method("shift", 2, scale=3, indices=[-1]) == [6]
    assert env.has_attr("lengths") and not env.has_attr("nothing")
    assert env.env_is_wrapped(TimeLimit) == [True, True]
    assert env.env_is_wrapped(Monitor, indices=0) == [True]
    assert env.env_is_wrapped(gym.wrappers.RescaleAction) == [False, False]


def test_a_native_vector_env_has_one_attribute_for_all():
    env = GymnasiumVecEnv(OneState(3, [2, 2, 2], AutoresetMode.DISABLED, honours_mask=True))
    env.set_attr("gravity", 1.5)
    assert env.get_attr("gravity", [0, 2]) == [1.5, 1.5]
    assert env.env_method("double_gravity") == [3.0, 3.0, 3.0]
    with pytest.raises(NotImplementedError, match="set an attribute"):
        env.set_attr("gravity", 1.0, indices=1)
    with pytest.raises(AttributeError):
        env.get_attr("nothing")
    assert not env.env_is_wrapped(TimeLimit)[0]


def test_frames_are_tiled_into_one_image():
    env = GymnasiumVecEnv(SyncVectorEnv(scripted((3,), (3,))))
    env.reset()
    assert env.render_mode == "rgb_array"
    assert env.render().shape == (4, 2, 3)  # SB3 tiles two images one above the other


# --- with SB3 around it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_sb3_learns_the_same_parameters_as_with_dummy_vec_env(mode):
    from vec_env_cases import oracle

    def trained(env: Any) -> Any:
        env = VecNormalize(env)
        return PPO("MlpPolicy", env, n_steps=32, batch_size=32, n_epochs=2, seed=1, device="cpu").learn(256)

    fns = registered("Pendulum-v1", 2, max_episode_steps=11)
    ours = trained(GymnasiumVecEnv(SyncVectorEnv(fns, autoreset_mode=mode)))
    theirs = trained(oracle(fns))
    for name, parameter in theirs.policy.state_dict().items():
        assert parameter.equal(ours.policy.state_dict()[name]), name
    assert [record["r"] for record in ours.ep_info_buffer] == [record["r"] for record in theirs.ep_info_buffer]


def test_evaluate_policy_reads_the_statistics_without_a_warning(recwarn):
    env = GymnasiumVecEnv(gym.make_vec("CartPole-v1", 2, vectorization_mode="sync"))
    model = PPO("MlpPolicy", env, n_steps=8, batch_size=16, device="cpu")
    rewards, lengths = evaluate_policy(model, env, n_eval_episodes=4, return_episode_rewards=True)
    assert rewards == [float(length) for length in lengths]
    assert not [w for w in recwarn if "Monitor" in str(w.message)]
