"""EnvPool behind SB3's interface: every final observation is the episode's own, and no reset step is learned from."""

import sys

import numpy as np
import pytest
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecNormalize
from vec_env_cases import assert_same, play

from sb3_pgplus.vec_env import EnvpoolVecEnv, make_vec_env
from sb3_pgplus.vec_env.envpool import make_envpool


def test_without_envpool_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(ValueError, match=r"`backend='envpool'` cannot serve this: .*sb3_pgplus\[envpool\]"):
        make_vec_env("CartPole-v1", backend="envpool")


envpool = pytest.importorskip("envpool")


def cartpole_step(state, action):
    """Gymnasium's equations of motion for one CartPole state, to tell real transitions from others."""
    x, v, angle, turn = state
    force = 10.0 if action == 1 else -10.0
    temp = (force + 0.05 * turn**2 * np.sin(angle)) / 1.1
    turning = (9.8 * np.sin(angle) - np.cos(angle) * temp) / (0.5 * (4 / 3 - 0.1 * np.cos(angle) ** 2 / 1.1))
    pushing = temp - 0.05 * turning * np.cos(angle) / 1.1
    return np.array([x + 0.02 * v, v + 0.02 * pushing, angle + 0.02 * turn, turn + 0.02 * turning])


def test_every_transition_follows_the_equations_of_motion_final_ones_included():
    env = make_envpool("CartPole-v1", 3, seed=1)
    before, ends = env.reset(), 0
    for _ in range(150):
        actions = np.random.randint(0, 2, 3)
        after, rewards, dones, infos = env.step(actions)
        assert rewards.tolist() == [1.0, 1.0, 1.0]
        for i in range(3):
            reached = infos[i]["terminal_observation"] if dones[i] else after[i]
            np.testing.assert_allclose(reached, cartpole_step(before[i], actions[i]), atol=1e-5)
            assert not dones[i] or np.abs(after[i]).max() <= 0.05  # where episodes of CartPole begin
        ends += dones.sum()
        before = after
    assert ends > 10


def test_the_statistics_are_the_sums_and_counts_of_the_steps():
    env = make_envpool("Pendulum-v1", 2, seed=1, max_episode_steps=6)
    _, taken = play(env, 12)
    rewards = np.array([step.rewards for step in taken], dtype=np.float64)
    for start in (0, 6):
        ended = taken[start + 5]
        assert ended.dones.all() and not any(step.dones.any() for step in taken[start : start + 5])
        for i, info in enumerate(ended.infos):
            assert info["TimeLimit.truncated"]
            assert info["episode"]["l"] == info["elapsed_step"] == 6
            assert info["episode"]["r"] == pytest.approx(rewards[start : start + 6, i].sum(), abs=1e-6)
    assert taken[0].infos[0] == {"TimeLimit.truncated": False}


def test_episodes_that_end_at_different_times_count_their_own_steps():
    env = make_envpool("CartPole-v1", 4, seed=2, full_infos=True)
    _, taken = play(env, 120)
    lengths = np.zeros(4, int)
    for step in taken:
        lengths += 1
        # EnvPool's own counter agrees: no step was spent on a reset.
        assert [info["elapsed_step"] for info in step.infos] == lengths.tolist()
        assert [info["env_id"] for info in step.infos] == [0, 1, 2, 3]
        for i in np.flatnonzero(step.dones):
            assert step.infos[i]["episode"]["l"] == lengths[i]
            assert (step.reset_infos[i]["env_id"], step.reset_infos[i]["elapsed_step"]) == (i, 0)
        lengths[step.dones] = 0


def test_the_same_seed_gives_the_same_episodes_and_neighbours_share_streams():
    env = make_envpool("CartPole-v1", 3, seed=5)
    built = env.reset()
    env.seed(5)
    seeded = env.reset()
    np.testing.assert_array_equal(built, seeded)
    env.seed(6)
    np.testing.assert_array_equal(env.reset()[:-1], seeded[1:])
    assert_same(play(env, 60)[1], play(make_envpool("CartPole-v1", 3, seed=99), 60)[1])


def test_a_pool_is_made_anew_only_for_a_seed_that_it_does_not_have():
    env = make_envpool("CartPole-v1", 2, seed=5)
    pool = env.env
    env.seed(5)
    env.reset()
    assert env.env is pool
    env.seed(5)  # its streams have gone on
    env.reset()
    assert env.env is not pool


def test_random_seeds_of_any_size_are_accepted():
    env = make_envpool("CartPole-v1", 2)
    env.seed(2**32 - 1)
    assert np.isfinite(env.reset()).all()


def test_a_pool_that_nobody_can_rebuild_warns_when_seeded():
    env = EnvpoolVecEnv(envpool.make("CartPole-v1", env_type="gymnasium", num_envs=2))
    env.seed(1)
    with pytest.warns(UserWarning, match="seeds are fixed"):
        env.reset()


def test_unknown_environments_are_named_with_similar_ones():
    with pytest.raises(ValueError, match="'ALE/Pong-v5'.*Pong-v5"):
        make_envpool("ALE/Pong-v5")


def test_asynchronous_pools_are_refused():
    with pytest.raises(ValueError, match="batch_size"):
        make_envpool("CartPole-v1", 4, batch_size=2)


def test_reset_options_are_refused():
    env = make_envpool("CartPole-v1")
    env.set_options({"low": 0.0})
    with pytest.raises(ValueError, match="no reset options"):
        env.reset()


def test_images_of_all_environments():
    env = make_envpool("CartPole-v1", 2, render_mode="rgb_array")
    env.reset()
    frames = env.get_images()
    assert len(frames) == 2 and frames[0].ndim == 3 and frames[0].dtype == np.uint8


def test_sb3_trains_and_evaluates_on_a_pool(recwarn):
    env = make_envpool("CartPole-v1", 4, seed=0)
    assert env.env_is_wrapped(Monitor) == [True] * 4
    model = PPO("MlpPolicy", VecNormalize(env), n_steps=64, seed=4, device="cpu").learn(512)
    assert len(model.ep_info_buffer) > 5
    rewards, lengths = evaluate_policy(model, make_envpool("CartPole-v1", 2), 4, return_episode_rewards=True)
    assert rewards == [float(length) for length in lengths]
    assert not [w for w in recwarn if "Monitor" in str(w.message)]


def test_dict_observations_of_mujoco():
    env = make_envpool("CheetahRun-v1", 2, seed=0, max_episode_steps=4)
    _, taken = play(env, 5)
    assert set(taken[3].infos[1]["terminal_observation"]) == set(env.observation_space.spaces)
    assert taken[4].observations["position"].shape == (2, 8)
