"""make_vec_env: SB3's function, and which backend it chooses or refuses."""

import inspect
import logging
import re
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import SyncVectorEnv
from rollout_comparison import assert_same_rollouts, random_actions
from stable_baselines3.common.env_util import make_vec_env as make_with_sb3
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize

pytest.importorskip("mujoco", minversion="3.17")

from sb3_pgplus.vec_env import MujocoVecEnv, WorkersVecEnv, backend_of, make_vec_env, mujoco_tasks
from sb3_pgplus.vec_env.make import BACKENDS


def reacher():
    return gym.make("Reacher-v5")


class MyReacher(gym.envs.registration.load_env_creator("gymnasium.envs.mujoco.reacher_v5:ReacherEnv")):
    """A class of the user's, which may do anything."""


@pytest.fixture
def registered():
    """Ids that look like MuJoCo tasks and are not quite."""
    point = "gymnasium.envs.mujoco.reacher_v5:ReacherEnv"
    clip = gym.envs.registration.WrapperSpec("ClipAction", "gymnasium.wrappers:ClipAction", {})
    gym.register("MyReacher-v0", MyReacher, max_episode_steps=5)
    gym.register("ShortReacher-v0", point, max_episode_steps=5)
    gym.register("ClippedReacher-v0", point, max_episode_steps=5, additional_wrappers=(clip,))
    yield
    for name in ("MyReacher-v0", "ShortReacher-v0", "ClippedReacher-v0"):
        del gym.registry[name]


# --- SB3's function ---------------------------------------------------------------------------------------------------


def test_the_positional_arguments_are_sb3s_with_its_defaults():
    theirs = list(inspect.signature(make_with_sb3).parameters.values())
    ours = list(inspect.signature(make_vec_env).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(theirs)]] == [(p.name, p.default) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Reacher-v5"])
@pytest.mark.parametrize("backend", ["auto", "dummy"])
def test_it_gives_what_sb3s_function_gives(env_id, backend):
    arguments = {"n_envs": 2, "seed": 4, "start_index": 2, "env_kwargs": {"max_episode_steps": 8}}
    reference, env = (
        make_with_sb3(env_id, **arguments),
        make_vec_env(env_id, **arguments, backend=backend, full_infos=True),
    )
    assert [reference.action_space.sample().tolist() for _ in range(3)] == [
        env.action_space.sample().tolist() for _ in range(3)
    ]
    actions = [[0, 1]] * 20 if env_id == "CartPole-v1" else random_actions(env, 20)
    assert_same_rollouts(reference, env, np.asarray(actions))


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Reacher-v5"])
def test_without_a_seed_numpys_global_generator_decides_as_in_sb3(env_id):
    drawn = []
    for make_env in (make_with_sb3, make_vec_env):
        np.random.seed(3)
        drawn.append((make_env(env_id, 2).reset(), np.random.random()))
    np.testing.assert_array_equal(drawn[0][0], drawn[1][0])
    assert drawn[0][1] == drawn[1][1]  # nothing else was drawn


@pytest.mark.parametrize("backend", ["workers", "gymnasium"])
@pytest.mark.parametrize("full_infos", [False, True])
def test_the_backends_of_ordinary_environments_give_the_same_rollouts(backend, full_infos, tmp_path):
    arguments = {"n_envs": 3, "seed": 4, "start_index": 1, "env_kwargs": {"max_episode_steps": 8}}
    arguments["monitor_kwargs"] = {"allow_early_resets": False}
    reference = make_with_sb3("Pendulum-v1", **arguments, monitor_dir=str(tmp_path / "sb3"))
    env = make_vec_env(
        "Pendulum-v1", **arguments, monitor_dir=str(tmp_path / "ours"), backend=backend, full_infos=full_infos
    )
    try:
        assert backend_of(env) == backend
        assert env.action_space.sample() == reference.action_space.sample()
        counts = assert_same_rollouts(reference, env, random_actions(env, 20), full_infos)
        assert counts == {"ended": 6, "truncated": 6}
        assert env.env_is_wrapped(Monitor) == [True] * 3 and env.render_mode == "rgb_array"
    finally:
        env.close()
        reference.close()
    for i in (1, 2, 3):
        files = [tmp_path / name / f"{i}.monitor.csv" for name in ("sb3", "ours")]
        rows = [[line.split(",")[:2] for line in file.read_text().splitlines()[1:]] for file in files]
        assert rows[0] == rows[1] and len(rows[0]) == 3
        assert all('"env_id": "Pendulum-v1"' in file.read_text() for file in files)


def test_workers_take_wrappers_and_their_own_arguments():
    env = make_vec_env(
        reacher,
        3,
        backend="workers",
        n_threads=2,
        wrapper_class=gym.wrappers.RescaleAction,
        wrapper_kwargs={"min_action": -2.0, "max_action": 2.0},
        vec_env_kwargs={"timeout": 50.0},
    )
    assert isinstance(env, WorkersVecEnv) and len(env._processes) == 2 and env.timeout == 50
    assert env.env_is_wrapped(gym.wrappers.RescaleAction) == [True] * 3
    env.close()


def test_gymnasiums_own_vector_environment_is_taken_only_if_its_transitions_can_be_correct():
    env = make_vec_env("CartPole-v1", 2, backend="gymnasium")
    assert isinstance(env.env, SyncVectorEnv)  # the one of CartPole resets all copies or none
    env = make_vec_env("CartPole-v1", 1, backend="gymnasium")
    assert isinstance(env.env.unwrapped, CartPoleVectorEnv)


def test_envpools_environments_are_seeded_and_counted(tmp_path):
    pytest.importorskip("envpool")
    arguments = {"backend": "envpool", "seed": 3, "env_kwargs": {"max_episode_steps": 4}, "n_threads": 1}
    env = make_vec_env("Pendulum-v1", 2, **arguments, monitor_dir=str(tmp_path))
    other = make_vec_env("Pendulum-v1", 2, **arguments, full_infos=True)
    assert backend_of(env) == "envpool" and env.env.config["num_threads"] == 1
    np.testing.assert_array_equal(env.reset(), other.reset())
    steps = [(env.step(a)[3], other.step(a)[3]) for a in random_actions(env, 4)]
    assert steps[0][0] == [{"TimeLimit.truncated": False}] * 2 and "elapsed_step" in steps[0][1][0]
    assert all("elapsed_step" in infos[0] and infos[0]["TimeLimit.truncated"] for infos in steps[-1])
    assert [infos[1]["episode"]["l"] for infos in steps[-1]] == [4, 4]
    env.close()
    assert len((tmp_path / "1.monitor.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("backend", "arguments", "why"),
    [
        ("gymnasium", {"env_id": reacher}, "it needs an environment's id"),
        ("gymnasium", {"n_threads": 2}, "no threads to choose"),
        ("gymnasium", {"wrapper_class": gym.wrappers.ClipAction}, "`wrapper_class`"),
        ("gymnasium", {"vec_env_kwargs": {"copy": False}}, "`vec_env_kwargs`.*copy"),
        ("gymnasium", {"monitor_kwargs": {"reset_keywords": ("a",)}}, "`monitor_kwargs` .* not reset_keywords"),
        ("envpool", {"wrapper_class": gym.wrappers.ClipAction}, "`wrapper_class`"),
        ("envpool", {"env_id": "CartPole-v2"}, "EnvPool has no environment 'CartPole-v2'.*CartPole-v1|not installed"),
        ("envpool", {"env_id": reacher}, "EnvPool has no environment <function|not installed"),
        ("subproc", {"n_threads": 2}, "no threads to choose"),
    ],
)
def test_a_backend_refuses_what_it_cannot_honour(backend, arguments, why):
    with pytest.raises(ValueError, match=f"`backend='{backend}'` cannot serve this: .*({why})"):
        make_vec_env(**{"env_id": "CartPole-v1", "n_envs": 2, "backend": backend} | arguments)


def test_subproc_runs_one_process_per_copy():
    env = make_vec_env("CartPole-v1", 2, backend="subproc", vec_env_kwargs={"start_method": "fork"})
    assert isinstance(env, SubprocVecEnv) and backend_of(env) == "subproc"
    env.close()


# --- which backend ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env_id", "arguments", "backend"),
    [
        ("HalfCheetah-v5", {"n_envs": 2}, "mujoco"),
        ("ShortReacher-v0", {"n_envs": 2}, "mujoco"),
        ("gymnasium:Reacher-v5", {"n_envs": 2}, "mujoco"),
        ("Reacher-v5", {"n_envs": 2, "monitor_kwargs": {"info_keywords": ("reward_dist",)}}, "mujoco"),
        ("Reacher-v5", {"n_envs": 1}, "serial"),
        ("MyReacher-v0", {"n_envs": 2}, "serial"),
        ("ClippedReacher-v0", {"n_envs": 2}, "serial"),
        (reacher, {"n_envs": 2}, "serial"),
        (MyReacher, {"n_envs": 2}, "serial"),
        ("Reacher-v5", {"n_envs": 2, "wrapper_class": gym.wrappers.ClipAction}, "serial"),
        ("Reacher-v5", {"n_envs": 2, "vec_env_cls": DummyVecEnv}, "dummy"),
        ("Reacher-v5", {"n_envs": 2, "env_kwargs": {"render_mode": "depth_array"}}, "serial"),
        ("CartPole-v1", {"n_envs": 2}, "serial"),
        ("CartPole-v1", {"n_envs": 2, "n_threads": 3}, "serial"),
    ],
)
@pytest.mark.usefixtures("registered")
def test_auto_takes_mujocos_batch_only_where_it_cannot_differ(env_id, arguments, backend):
    assert backend_of(make_vec_env(env_id, **arguments)) == backend


@pytest.mark.parametrize(
    ("env_id", "arguments", "why"),
    [
        ("CartPole-v1", {}, "CartPole-v1 is none of them"),
        ("MyReacher-v0", {}, "MyReacher-v0 is none of them"),
        ("ClippedReacher-v0", {}, "comes in a ClipAction"),
        (reacher, {}, "a class or function"),
        ("Reacher-v5", {"wrapper_class": gym.wrappers.ClipAction}, "`wrapper_class`"),
        ("Reacher-v5", {"vec_env_kwargs": {"start_method": "fork"}}, "`vec_env_kwargs`.*start_method"),
        ("Reacher-v5", {"env_kwargs": {"render_mode": "human"}}, "`render_mode` may be .* not 'human'"),
        (
            "Reacher-v5",
            {"monitor_kwargs": {"reset_keywords": ("a",)}},
            "`monitor_kwargs` may have .* not reset_keywords",
        ),
    ],
)
@pytest.mark.usefixtures("registered")
def test_an_explicit_backend_that_cannot_serve_says_why(env_id, arguments, why):
    with pytest.raises(ValueError, match=f"`backend='mujoco'` cannot serve this: .*{why}"):
        make_vec_env(env_id, 2, backend="mujoco", **arguments)


def test_an_explicit_mujoco_backend_serves_a_single_copy():
    assert isinstance(make_vec_env("Reacher-v5", backend="mujoco"), MujocoVecEnv)


def test_without_mujocos_batch_auto_falls_back_and_the_explicit_choice_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mujoco.batch", None)
    assert backend_of(make_vec_env("Reacher-v5", 2)) == "serial"
    with pytest.raises(ValueError, match=r"MuJoCo 3\.17 or newer.*pip install"):
        make_vec_env("Reacher-v5", 2, backend="mujoco")


def test_auto_notices_if_the_installed_versions_differ_in_a_bit(monkeypatch):
    monkeypatch.setattr(mujoco_tasks, "norm", lambda vectors: np.linalg.norm(vectors, axis=1) * (1 + 1e-7))
    assert backend_of(make_vec_env("Reacher-v5", 2)) == "serial"


def test_the_choice_and_its_reason_are_logged_and_printed_on_demand(caplog, capsys):
    with caplog.at_level(logging.INFO, "sb3_pgplus"):
        make_vec_env("CartPole-v1", 2)
        assert capsys.readouterr().out == ""
        make_vec_env("Reacher-v5", 2, verbose=1)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("CartPole-v1: 2 copies with backend 'serial' (not 'mujoco': ") and "none of them" in first
    assert second == "Reacher-v5: 2 copies with backend 'mujoco'" == capsys.readouterr().out.strip()


def test_backend_of_looks_through_wrappers():
    assert backend_of(VecNormalize(VecFrameStack(make_vec_env("Reacher-v5", 2), 2))) == "mujoco"

    class MyVecEnv(DummyVecEnv):
        pass

    assert backend_of(make_vec_env("CartPole-v1", vec_env_cls=MyVecEnv)) == "MyVecEnv"


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n_envs": 0}, ValueError, "`n_envs` must be an integer of at least 1, got 0"),
        ({"n_envs": -2}, ValueError, "`n_envs` must be an integer of at least 1, got -2"),
        ({"n_envs": True}, TypeError, "`n_envs` must be an integer of at least 1, got True"),
        ({"n_envs": "x"}, TypeError, "`n_envs` must be an integer of at least 1, got 'x'"),
        ({"n_envs": 2.0}, TypeError, "`n_envs` must be"),
        ({"seed": -1}, ValueError, "`seed` must be an integer of at least 0, got -1"),
        ({"seed": "0"}, TypeError, "`seed` must be"),
        ({"start_index": -1}, ValueError, "`start_index` must be"),
        ({"n_threads": 0}, ValueError, "`n_threads` must be"),
        ({"full_infos": 1}, TypeError, "`full_infos` must be True or False, got 1"),
        ({"backend": "cuda"}, ValueError, "`backend` must be one of 'auto', 'dummy', .*'mujoco'.*, got 'cuda'"),
        ({"backend": None}, ValueError, "`backend` must be one of .*, got None"),
        ({"backend": "dummy", "n_threads": 2}, ValueError, "it has no threads to choose, and `n_threads` is 2"),
        ({"vec_env_cls": DummyVecEnv, "n_threads": 2}, ValueError, "`vec_env_cls` has no threads to choose"),
        (
            {"backend": "workers", "n_threads": 2, "vec_env_kwargs": {"n_workers": 1}},
            ValueError,
            "`n_threads` and `n_workers` in `vec_env_kwargs` say the same",
        ),
        ({"backend": "dummy", "vec_env_cls": DummyVecEnv}, ValueError, "`vec_env_cls` names a class and `backend="),
        ({"env_id": "HalfCheeta-v5"}, ValueError, "`env_id` 'HalfCheeta-v5' is unknown: .*HalfCheetah"),
        ({"env_id": "no_such_package:Env-v0"}, ValueError, "`env_id` 'no_such_package:Env-v0' is unknown"),
        ({"env_id": 5}, TypeError, "`env_id` must be an id, a class or a function, got 5"),
        ({"env_kwargs": {"fish": 1}}, TypeError, "fish"),
    ],
)
def test_bad_input_is_refused_at_once(arguments, error, message):
    with pytest.raises(error, match=message):
        make_vec_env(**{"env_id": "Reacher-v5", "n_envs": 2} | arguments)


def test_numpys_integers_are_integers():
    assert make_vec_env("Reacher-v5", np.int64(2), seed=np.int64(3)).num_envs == 2


@pytest.mark.filterwarnings("ignore:.*Using the latest versioned environment")
def test_an_id_without_a_version_is_completed_by_gymnasium():
    assert make_vec_env("CartPole").num_envs == 1


@pytest.mark.filterwarnings("ignore:.*Using the latest versioned environment")
def test_an_id_without_a_version_has_the_backends_of_the_newest_one(tmp_path):
    env = make_vec_env("gymnasium:Reacher", 2, monitor_dir=str(tmp_path))
    env.close()
    assert backend_of(env) == "mujoco"
    assert all('"env_id": "Reacher-v5"' in file.read_text() for file in tmp_path.iterdir())
    assert isinstance(make_vec_env("CartPole", backend="gymnasium").env.unwrapped, CartPoleVectorEnv)


@pytest.mark.filterwarnings("ignore:.*Using the latest versioned environment")
def test_an_id_without_a_version_may_have_a_namespace():
    gym.register("Somewhere/Reacher-v3", entry_point=reacher)
    try:
        assert make_vec_env("Somewhere/Reacher").num_envs == 1
        with pytest.raises(ValueError, match="unknown"):
            make_vec_env("Elsewhere/Reacher")
    finally:
        del gym.registry["Somewhere/Reacher-v3"]


def test_workers_named_as_a_class_get_their_settings():
    env = make_vec_env("CartPole-v1", 2, vec_env_cls=WorkersVecEnv, n_threads=1, full_infos=True)
    assert len(env._processes) == 1
    env.reset()
    assert "TimeLimit.truncated" in dict(env.step([0, 0])[3][0])
    env.close()


def test_monitors_files_have_the_id_without_its_module(tmp_path):
    for backend in ("mujoco", "dummy"):
        folder = tmp_path / backend
        make_vec_env("gymnasium:Reacher-v5", 2, backend=backend, monitor_dir=str(folder)).close()
        for file in folder.iterdir():
            assert '"env_id": "Reacher-v5"' in file.read_text()


def test_every_backend_is_documented_by_its_name():
    page = (Path(__file__).parents[1] / "docs" / "vec_env.md").read_text("utf-8")
    table = page.partition("## Backends\n")[2].partition("\n## ")[0]
    assert re.findall(r'^\| `"(\w+)"` \|', table, re.MULTILINE) == list(BACKENDS)
