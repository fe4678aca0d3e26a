"""MujocoVecEnv gives what SB3's DummyVecEnv gives, bit for bit; what it cannot do it refuses."""

import copy
import functools
import gc
import os
import pickle
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium.wrappers import TimeLimit
from rollout_comparison import MUJOCO_TASKS, assert_same_rollouts, random_actions
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env as make_with_sb3
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecFrameStack, VecMonitor, VecNormalize

pytest.importorskip("mujoco", minversion="3.17")

from sb3_pgplus.vec_env import backend_of, make_vec_env, mujoco_tasks
from sb3_pgplus.vec_env.common import usable_cpus
from sb3_pgplus.vec_env.mujoco import MujocoVecEnv
from sb3_pgplus.vec_env.placement import find_current_cpu

ASSETS = Path(gym.__file__).parent / "envs" / "mujoco" / "assets"
CAMERA = {"width": 64, "height": 48, "default_camera_config": {"distance": 5.0}}
LOCOMOTION = {
    "ctrl_cost_weight": [0.0, 0.3],
    "reset_noise_scale": [0.0, 0.2],
    "frame_skip": [1, 3],
    "exclude_current_positions_from_observation": [False],
}
FORWARD = LOCOMOTION | {"forward_reward_weight": [0.5, 3]}
SURVIVAL = FORWARD | {"healthy_reward": [2, 0.5], "terminate_when_unhealthy": [False]}
PARTS = ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")
HUMANOID_PARTS = {f"include_{part}_in_observation": [False] for part in PARTS}
#: Keyword arguments of each task, and values unlike the defaults.
KWARGS = {
    "HalfCheetah": FORWARD,
    "Hopper": SURVIVAL | {"healthy_state_range": [(-2.0, 2.0)], "healthy_angle_range": [(-0.05, 0.2)]},
    "Walker2d": SURVIVAL | {"healthy_z_range": [(1.1, 1.4)], "healthy_angle_range": [(-0.1, 0.3)]},
    "Swimmer": FORWARD,
    "Ant": SURVIVAL
    | {"contact_cost_weight": [0.1], "contact_force_range": [(-0.1, 0.4)], "main_body": ["torso", 3]}
    | {"healthy_z_range": [(0.5, 0.8)], "include_cfrc_ext_in_observation": [False]},
    "Humanoid": SURVIVAL | HUMANOID_PARTS | {"contact_cost_weight": [1e-3], "contact_cost_range": [(0.0, 0.2)]},
    "HumanoidStandup": LOCOMOTION
    | HUMANOID_PARTS
    | {"uph_cost_weight": [2], "impact_cost_weight": [1e-3], "impact_cost_range": [(0.0, 0.2)]},
    "Reacher": {"frame_skip": [1, 4], "reward_dist_weight": [0.3, 2], "reward_control_weight": [0.1, 3]},
    "Pusher": {"frame_skip": [2], "reward_near_weight": [2], "reward_dist_weight": [0.5], "reward_control_weight": [1]},
    "InvertedPendulum": {"frame_skip": [1, 3], "reset_noise_scale": [0.15]},
    "InvertedDoublePendulum": {"frame_skip": [2], "reset_noise_scale": [0.2], "healthy_reward": [3, 0.5]},
}


def pair(task, n_envs=3, seed=7, full_infos=True, n_threads=1, **env_kwargs):
    """SB3's environments and ours."""
    reference = make_with_sb3(f"{task}-v5", n_envs, seed=seed, env_kwargs=env_kwargs)
    env = MujocoVecEnv(f"{task}-v5", n_envs, env_kwargs=env_kwargs, full_infos=full_infos, n_threads=n_threads)
    env.seed(seed)
    return reference, env


def edited_model(tmp_path, name, *replacements):
    text = (ASSETS / name).read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / name
    path.write_text(text)
    return str(path)


# --- equal to SB3, bit for bit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", MUJOCO_TASKS)
def test_whole_episodes_equal_those_of_dummy_vec_env(task):
    reference, env = pair(task, n_threads=2, max_episode_steps=25)
    counts = assert_same_rollouts(reference, env, random_actions(env, 60))
    assert counts["ended"] >= 6
    # The same objects once more: what a reset in the middle of episodes leaves, and generators that go on.
    assert_same_rollouts(reference, env, random_actions(env, 10, seed=1))
    # And seeded again.
    reference.seed(3), env.seed(3)
    assert_same_rollouts(reference, env, random_actions(env, 5, seed=2))


@pytest.mark.parametrize("task", ["Hopper", "Ant", "Reacher", "InvertedDoublePendulum"])
@pytest.mark.parametrize(("seed", "n_envs"), [(0, 1), (11, 4)])
def test_other_seeds_and_numbers_of_copies_are_equal_too(task, seed, n_envs):
    reference, env = pair(task, n_envs, seed, full_infos=False, max_episode_steps=20)
    assert_same_rollouts(reference, env, random_actions(env, 30, seed), full_infos=False)


def test_both_ways_to_end_an_episode_occur_in_these_comparisons():
    reference, env = pair("Hopper", max_episode_steps=20)
    counts = assert_same_rollouts(reference, env, random_actions(env, 60))
    assert 0 < counts["truncated"] < counts["ended"]


@pytest.mark.parametrize("task", MUJOCO_TASKS)
@pytest.mark.parametrize("draw", range(2))
def test_keyword_arguments_of_the_task_act_as_in_gymnasium(task, draw):
    generator = np.random.default_rng([MUJOCO_TASKS.index(task), draw])
    kwargs = {name: values[generator.integers(len(values))] for name, values in KWARGS[task].items()}
    kwargs = {name: value for name, value in kwargs.items() if generator.random() < 0.6}
    reference, env = pair(task, 2, max_episode_steps=15, **kwargs)
    assert env.observation_space == reference.observation_space
    assert_same_rollouts(reference, env, random_actions(env, 20, draw))


@pytest.mark.parametrize("task", ["HalfCheetah", "Humanoid", "Pusher"])
def test_float64_actions_outside_their_range_are_equal(task):
    reference, env = pair(task, 2, max_episode_steps=15)
    assert_same_rollouts(reference, env, random_actions(env, 20, scale=3.0, dtype=np.float64))


def test_the_double_pendulum_at_its_rail_stops_is_equal(tmp_path):
    stops = ('range="-1 1"', 'range="-0.02 0.02"')
    reference, env = pair(
        "InvertedDoublePendulum", xml_file=edited_model(tmp_path, "inverted_double_pendulum.xml", stops)
    )
    actions = random_actions(env, 60)
    env.reset()
    forces = np.array([env.step(action)[0][:, -1] for action in actions])
    assert np.count_nonzero(forces) > 20  # the constraint force, which is 0 away from the stops
    reference, env = pair("InvertedDoublePendulum", xml_file=str(tmp_path / "inverted_double_pendulum.xml"))
    assert_same_rollouts(reference, env, actions)


@pytest.mark.parametrize(("task", "model"), [("HalfCheetah", "half_cheetah.xml"), ("Ant", "ant.xml")])
def test_simulations_that_diverge_and_are_reset_inside_a_step_are_equal(task, model, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log about it
    path = edited_model(tmp_path, model, ('timestep="0.01"', 'timestep="0.3"'))
    reference, env = pair(task, 2, xml_file=path, max_episode_steps=15)
    assert_same_rollouts(reference, env, random_actions(env, 30))
    assert "unstable" in capfd.readouterr().err


@pytest.mark.parametrize(("addition", "why"), [
    ('<sensor><accelerometer name="a" site="s"/></sensor>', "sensors that compute contact forces"),
    ('<option sleep_tolerance="1e-2"><flag sleep="enable"/></option>', "bodies that may sleep"),
])  # fmt: skip
def test_models_whose_results_would_differ_are_refused_and_auto_steps_them_one_by_one(addition, why, tmp_path):
    sites = ('<geom name="torso_geom"', '<site name="s"/><geom name="torso_geom"')
    path = edited_model(tmp_path, "ant.xml", sites, ("</mujoco>", f"{addition}</mujoco>"))
    arguments = {"env_id": "Ant-v5", "n_envs": 2, "env_kwargs": {"xml_file": path}}
    with pytest.raises(ValueError, match=why):
        make_vec_env(**arguments, backend="mujoco")
    assert backend_of(make_vec_env(**arguments)) == "serial"


def test_settings_with_which_space_and_observations_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match=r"observations of Humanoid-v5 are of shape \(218,\), .* space of \(348,\)"):
        MujocoVecEnv("Humanoid-v5", 2, env_kwargs={"include_cinert_in_observation": 1})


def test_squares_and_norms_round_as_those_of_single_numbers_and_vectors():
    generator = np.random.default_rng(0)
    values, vectors = generator.normal(size=20_000), generator.normal(size=(5000, 3))
    assert mujoco_tasks.squares(values).tolist() == [value**2 for value in values]  # NumPy's float64, one by one
    assert mujoco_tasks.norm(vectors).tolist() == [np.linalg.norm(vector) for vector in vectors]


def test_an_environment_without_time_limit_goes_on():
    reference, env = pair("Swimmer", 2, max_episode_steps=-1, frame_skip=1)
    actions = random_actions(env, 1100)  # longer than the default limit, and than the room for rewards
    counts = assert_same_rollouts(reference, env, actions)
    assert counts["ended"] == 0


def test_returns_of_long_episodes_are_summed_in_the_monitors_order():
    reference, env = pair("Reacher", 2, max_episode_steps=1500)
    counts = assert_same_rollouts(reference, env, random_actions(env, 1510), full_infos=True)
    assert counts == {"ended": 2, "truncated": 2}


@pytest.fixture
def graphics(monkeypatch):
    """Lets MuJoCo draw without a display."""
    if sys.platform == "linux" and "DISPLAY" not in os.environ:
        monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL") or "egl")


# Reacher: the camera looks where its copy began. Ant: the pose drawn is older than the state, and costs more to draw.
@pytest.mark.parametrize(("task", "n_envs", "steps_between"), [("Reacher", 3, 1), ("Ant", 2, 5)])
@pytest.mark.usefixtures("graphics")
def test_pictures_are_equal_pixel_by_pixel(task, n_envs, steps_between):
    reference, env = pair(task, n_envs, max_episode_steps=4, **CAMERA)
    reference.reset(), env.reset()
    for t, action in enumerate(random_actions(env, 6)):
        if t % steps_between == 0:
            try:
                expected = reference.render()
            except Exception as error:  # whatever a machine without OpenGL comes up with
                pytest.skip(f"cannot render here: {error}")
            np.testing.assert_array_equal(env.render(), expected)
        reference.step(action), env.step(action)
    np.testing.assert_array_equal(env.env_method("render", indices=1)[0], reference.get_images()[1])
    reference.close(), env.close()


@pytest.mark.usefixtures("graphics")
def test_a_picture_of_one_copy_leaves_the_others_cameras_alone():
    reference, env = pair("Reacher", 3, **CAMERA)
    reference.reset(), env.reset()
    try:
        expected = reference.env_method("render", indices=[1])
    except Exception as error:  # whatever a machine without OpenGL comes up with
        pytest.skip(f"cannot render here: {error}")
    np.testing.assert_array_equal(env.env_method("render", indices=[1]), expected)
    for action in random_actions(env, 10):
        reference.step(action), env.step(action)
    np.testing.assert_array_equal(env.get_images(), reference.get_images())
    reference.close(), env.close()
    with pytest.raises(RuntimeError, match="closed"):
        env.env_method("render", indices=[1])


def test_nothing_is_drawn_without_a_render_mode():
    _, env = pair("Reacher", 2, render_mode=None)
    env.reset()
    with pytest.warns(UserWarning, match="render mode is None"):
        assert env.get_images() == [None, None]
    with pytest.warns(UserWarning, match="render mode is None"):
        assert env.env_method("render", indices=1) == [None]


# --- inside SB3 -------------------------------------------------------------------------------------------------------


def test_training_sb3s_ppo_gives_the_same_parameters_and_normalisation():
    models = []
    for env in pair("Hopper", 2, full_infos=False, max_episode_steps=50):
        normalized = VecNormalize(env)
        model = PPO("MlpPolicy", normalized, n_steps=64, batch_size=32, n_epochs=2, seed=5, device="cpu")
        models.append(model.learn(384))
    ours, theirs = (model.policy.state_dict() for model in models)
    assert all(th.equal(ours[name], theirs[name]) for name in theirs)
    for name in ("obs_rms", "ret_rms"):
        ours, theirs = (getattr(model.get_env(), name) for model in models)
        np.testing.assert_array_equal(ours.mean, theirs.mean)
        np.testing.assert_array_equal(ours.var, theirs.var)
    buffers = [[(e["r"], e["l"]) for e in model.ep_info_buffer] for model in models]
    assert buffers[0] == buffers[1] and buffers[0]


def test_evaluate_policy_finds_the_monitor_and_the_same_returns(recwarn):
    results = []
    for env in pair("InvertedPendulum", 2, full_infos=False):
        model = PPO("MlpPolicy", env, seed=0, device="cpu")
        env.seed(1)
        results.append(evaluate_policy(model, env, n_eval_episodes=5, return_episode_rewards=True))
    assert results[0] == results[1]
    assert not [warning for warning in recwarn if "Monitor" in str(warning.message)]


@pytest.mark.filterwarnings("ignore:The environment is already wrapped with a `Monitor`")
def test_sb3s_wrappers_around_it_give_the_same():
    for wrapper in (VecMonitor, lambda env: VecFrameStack(env, 3)):
        reference, env = (wrapper(env) for env in pair("Walker2d", 2, max_episode_steps=15))
        assert_same_rollouts(reference, env, random_actions(env, 40))


# --- Monitor ----------------------------------------------------------------------------------------------------------


def test_monitor_files_have_the_rows_of_sb3s(tmp_path):
    arguments = {"monitor_kwargs": {"info_keywords": ("x_position",)}, "start_index": 3}
    arguments["env_kwargs"] = {"max_episode_steps": 10}
    rows = []
    for name, make in (("sb3", make_with_sb3), ("ours", functools.partial(make_vec_env, backend="mujoco"))):
        env = make("HalfCheetah-v5", 2, monitor_dir=str(tmp_path / name), **arguments)
        env.seed(0)
        env.reset()
        episodes = [info["episode"] for a in random_actions(env, 25) for info in env.step(a)[3] if "episode" in info]
        assert len(episodes) == 4 and all("x_position" in episode for episode in episodes)
        env.close()
        files = [tmp_path / name / f"{i}.monitor.csv" for i in (3, 4)]
        lines = [file.read_text().splitlines()[1:] for file in files]
        rows.append([[cell for i, cell in enumerate(line.split(",")) if i != 2] for file in lines for line in file])
        assert all('"env_id": "HalfCheetah-v5"' in file.read_text() for file in files)
    assert rows[0] == rows[1] and len(rows[0]) == 6


def test_the_monitors_getters_answer_for_each_copy():
    reference, env = pair("InvertedPendulum", 3)
    assert_same_rollouts(reference, env, random_actions(env, 40))
    for method in ("get_episode_rewards", "get_episode_lengths", "get_total_steps"):
        assert env.env_method(method) == reference.env_method(method)
        assert env.env_method(method, indices=[1]) == reference.env_method(method, indices=[1])
    assert env.get_attr("episode_returns", 2) == reference.get_attr("episode_returns", 2)
    assert [len(times) for times in env.env_method("get_episode_times")] == list(
        map(len, env.get_attr("episode_lengths"))
    )


def test_an_early_reset_is_refused_if_the_monitor_is_told_so():
    env = make_vec_env("Reacher-v5", 2, backend="mujoco", monitor_kwargs={"allow_early_resets": False})
    env.reset()
    with pytest.raises(RuntimeError, match="Tried to reset an environment before done"):
        env.reset()


# --- what it returns --------------------------------------------------------------------------------------------------


def test_returned_arrays_and_infos_can_be_kept():
    _, env = pair("Ant", 2, max_episode_steps=3)
    kept = [(env.reset(),)]
    kept += [env.step(action) for action in random_actions(env, 8)]
    before = copy.deepcopy(kept)
    reset_infos = copy.deepcopy(env.reset_infos)
    old_reset_infos = list(env.reset_infos)
    for action in random_actions(env, 8, seed=1):
        env.step(action)
    np.testing.assert_equal(kept, before)
    np.testing.assert_equal(old_reset_infos, reset_infos)


def test_a_lean_info_says_how_to_get_what_it_lacks():
    _, env = pair("HalfCheetah", 2, full_infos=False)
    env.reset()
    info = env.step(random_actions(env, 1)[0])[3][0]
    assert info == {"TimeLimit.truncated": False} and info.get("episode") is None
    assert pickle.loads(pickle.dumps(info)) == copy.deepcopy(info) == info
    with pytest.raises(KeyError, match="full_infos=True"):
        info["x_position"]
    with pytest.raises(KeyError, match="episode"):
        info["episode"]


def test_an_unseeded_environment_starts_anywhere():
    env = MujocoVecEnv("Reacher-v5", 2)
    first = env.reset()
    assert not np.array_equal(first[0], first[1]) and not np.array_equal(first, MujocoVecEnv("Reacher-v5", 2).reset())


def test_it_uses_a_thread_per_copy_but_not_more_than_there_are_cpus():
    assert [MujocoVecEnv("Reacher-v5", n).n_threads for n in (1, 1000)] == [1, usable_cpus()]


# --- attributes of single copies --------------------------------------------------------------------------------------


def test_what_all_copies_have_in_common_can_be_asked_for():
    reference, env = pair("Hopper", 2, frame_skip=2, healthy_reward=3.0)
    names = ("dt", "frame_skip", "render_mode", "metadata", "_healthy_reward", "_max_episode_steps", "fullpath")
    for name in names:
        assert env.get_attr(name) == reference.get_attr(name), name
    assert env.get_attr("spec")[0].id == "Hopper-v5"
    assert env.env_method("get_wrapper_attr", "dt", indices=0) == reference.get_attr("dt", 0)
    assert env.env_is_wrapped(Monitor) == [True, True] and env.env_is_wrapped(TimeLimit) == [True, True]
    assert env.env_is_wrapped(gym.wrappers.ClipAction) == [False, False]


@pytest.mark.parametrize("name", ["data", "model", "np_random", "is_healthy", "state_vector", "unwrapped", "env"])
def test_what_belongs_to_one_copy_is_refused_with_advice(name):
    env = MujocoVecEnv("Hopper-v5", 2)
    assert not env.has_attr(name)
    with pytest.raises(AttributeError, match='backend="dummy"'):
        env.get_attr(name)
    with pytest.raises(AttributeError, match='backend="dummy"'):
        env.set_attr(name, 1)
    with pytest.raises(AttributeError, match='backend="dummy"'):
        env.env_method("state_vector")


def test_what_no_copy_has_is_an_attribute_error():
    env = MujocoVecEnv("Hopper-v5", 2)
    with pytest.raises(AttributeError, match="fish"):
        env.get_attr("fish")
    with pytest.raises(AttributeError, match="fish"):
        env.env_method("fish")
    assert not env.has_attr("fish")


# --- misuse -----------------------------------------------------------------------------------------------------------


def test_a_step_before_the_first_reset_is_an_error_as_in_the_monitor():
    env = MujocoVecEnv("Reacher-v5", 2)
    with pytest.raises(RuntimeError, match="needs reset"):
        env.step(np.zeros((2, 2)))
    with pytest.raises(gym.error.ResetNeeded):
        env.render()


@pytest.mark.parametrize("shape", [(2,), (2, 3), (1, 2), (3, 2), (2, 2, 1)])
def test_actions_of_the_wrong_shape_are_refused(shape):
    env = MujocoVecEnv("Reacher-v5", 2)
    env.reset()
    with pytest.raises(ValueError, match=r"`actions` must have shape \(2, 2\)"):
        env.step(np.zeros(shape))


def test_closing_twice_is_fine_and_stepping_afterwards_is_not():
    env = MujocoVecEnv("Reacher-v5", 2)
    env.reset()
    env.close()
    env.close()
    with pytest.raises(RuntimeError, match="closed"):
        env.step(np.zeros((2, 2)))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_closing_leaves_no_threads():
    before = len(os.listdir("/proc/self/task"))
    env = MujocoVecEnv("Ant-v5", 4, n_threads=3)
    env.reset()
    assert len(os.listdir("/proc/self/task")) == before + 2
    env.close()
    gc.collect()
    assert len(os.listdir("/proc/self/task")) == before


CAN_PLACE = pytest.mark.skipif(
    usable_cpus() < 2 or find_current_cpu() is None, reason="needs two CPUs that can be told apart"
)


@CAN_PLACE
def test_the_other_threads_may_run_on_every_cpu_but_the_callers_which_may_run_on_all():
    usable = os.sched_getaffinity(0)
    env = MujocoVecEnv("Reacher-v5", 3, n_threads=2)
    env.reset()
    [worker] = env._placement.workers
    for cpu in [*usable] * 2:
        os.sched_setaffinity(0, {cpu})  # the caller is here for the step
        try:
            env.step(np.zeros((3, 2)))
        finally:
            os.sched_setaffinity(0, usable)
        assert os.sched_getaffinity(worker) == usable - {cpu}
    assert os.sched_getaffinity(0) == usable


@CAN_PLACE
def test_threads_without_a_cpu_of_their_own_are_left_where_they_are():
    usable = os.sched_getaffinity(0)
    env = MujocoVecEnv("Reacher-v5", 3, n_threads=len(usable) + 1)
    env.reset()
    env.step(np.zeros((3, 2)))
    assert [os.sched_getaffinity(worker) for worker in env._placement.workers] == [usable] * len(usable)


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps])
def test_copying_is_refused(copier):
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        copier(MujocoVecEnv("Reacher-v5", 2))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_gets_an_error_and_not_a_deadlock():
    program = """
import gc, os, sys
from sb3_pgplus.vec_env.mujoco import MujocoVecEnv
env = MujocoVecEnv("Reacher-v5", 2, n_threads=2)
env.reset()
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
try:
    env.reset()
except RuntimeError as error:
    assert "spawn" in str(error)
    env.close()
    del env
    gc.collect()
    sys.exit(7)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 7, done.stderr
