"""Saving and loading: nothing that training or playing needs is left behind."""

import builtins
import copy
import io
import os
import pathlib
import warnings
import zipfile

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_pgplus import A2CPlus, PPOPlus, TRPOPlus, files, presets
from sb3_pgplus.errors import HyperparameterError, ModelFileError
from sb3_pgplus.policies import observation_normalizer

SMALL = {"n_steps": 8, "batch_size": 8, "n_epochs": 2, "device": "cpu", "seed": 0}
EVERYTHING = {
    **SMALL,
    "normalize_value_targets": True,
    "critic_learning_rate": "lin_1e-3",
    "n_critic_epochs": 3,
    "kl_coef": 0.1,
    "adaptive_kl_target": 0.001,
    "desired_kl": 0.001,
    "schedule_timesteps": 500,
}
RAW = np.array([[0.1, 300.0, -20.0]], np.float32)


class Drift(gym.Env):
    """Observations and rewards of very different sizes, from a generator of its own; ends and is cut in turn."""

    def __init__(self):
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,))
        self.action_space = spaces.Box(-1, 1, (2,))
        self.episodes = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.episodes = 0 if seed is not None else self.episodes + 1
        return self._observation(), {}

    def _observation(self):
        return (self.np_random.normal(size=3) * [1, 300, 20] + [0, 100, -5]).astype(np.float32)

    def step(self, action):
        self.steps += 1
        done = self.steps >= 5
        cut = done and self.episodes % 2 == 0
        return self._observation(), float(action.sum() * 50 + self.np_random.normal()), done and not cut, cut, {}


def drift(n_envs=2):
    return DummyVecEnv([Drift for _ in range(n_envs)])


def seeded(env, seed=5):
    env.seed(seed)
    np.random.seed(seed)
    th.manual_seed(seed)
    return env


def everything_of(model):
    state = {name: value for name, value in model.get_parameters().items() if name != "policy.optimizer"}
    tensors = {f"{name}.{key}": tensor for name, entries in state.items() for key, tensor in entries.items()}
    for index, entry in model.policy.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in entry.items()}
    for index, group in enumerate(model.policy.optimizer.param_groups):
        tensors[f"lr.{index}"] = th.tensor(group["lr"])
    return tensors


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert th.equal(th.as_tensor(value), th.as_tensor(b[key])), key


@pytest.fixture(scope="module")
def trained():
    return PPOPlus("MlpPolicy", seeded(drift()), **EVERYTHING).learn(64)


# --- continue -----------------------------------------------------------------------------------------------

OPTIONS = {
    "everything": EVERYTHING,
    "defaults": SMALL,
    "sb3": {**presets.SB3_PPO, **SMALL},
    "gsde": {**SMALL, "use_sde": True},
    "recompute": {**SMALL, "recompute_advantages": True, "advantage_estimator": "n_step"},
}


@pytest.mark.filterwarnings("ignore:learn.. continues")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("reset_num_timesteps", [True, False])
def test_save_load_and_continue_equals_going_on(name, reset_num_timesteps, tmp_path):
    model = PPOPlus("MlpPolicy", seeded(drift()), **OPTIONS[name]).learn(64)
    model.save(tmp_path / "model")
    loaded = PPOPlus.load(tmp_path / "model", env=drift(), device="cpu")
    assert_same(everything_of(model), everything_of(loaded))
    results = []
    for each in (model, loaded):
        each.set_env(each.get_env())  # both start from a reset environment
        if name == "gsde":
            th.manual_seed(0)
            each.policy.reset_noise(2)
        seeded(each.get_env(), 11)
        each.learn(64, reset_num_timesteps=reset_num_timesteps)
        results.append(each)
    assert_same(*(everything_of(each) for each in results))
    for attribute in ("num_timesteps", "_n_updates", "_kl_coef_scale", "_kl_lr_scale", "_carried_returns"):
        assert getattr(results[0], attribute) == getattr(results[1], attribute), attribute
    assert results[0].num_timesteps == (64 if reset_num_timesteps else 128)


def test_the_returns_that_rewards_are_scaled_by_go_on_without_a_reset(tmp_path):
    model = PPOPlus("MlpPolicy", seeded(drift()), **{**SMALL, "schedule_timesteps": 64}).learn(32)
    model.save(tmp_path / "model")
    assert any(value != 0 for value in model._carried_returns)  # 16 steps end inside an episode
    loaded = PPOPlus.load(tmp_path / "model", env=copy.deepcopy(model.get_env()), device="cpu", force_reset=False)
    assert loaded._carried_returns == model._carried_returns
    for each in (model, loaded):
        th.manual_seed(3)
        np.random.seed(3)
        each.learn(32, reset_num_timesteps=False)
    assert_same(everything_of(model), everything_of(loaded))


# --- play ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("via", ["name", "suffix", "path", "bytes", "file"])
def test_a_loaded_model_plays_raw_observations_without_an_environment(trained, tmp_path, via):
    where = {"name": str(tmp_path / "m"), "suffix": str(tmp_path / "m.zip"), "path": tmp_path / "m"}.get(via)
    if via == "bytes":
        where = io.BytesIO()
        trained.save(where)
        where.seek(0)
    elif via == "file":
        with open(tmp_path / "f.zip", "wb") as file:
            trained.save(file)
        where = open(tmp_path / "f.zip", "rb")  # noqa: SIM115
    else:
        trained.save(where)
        assert [path.name for path in tmp_path.iterdir()] == ["m.zip"]
    loaded = PPOPlus.load(where, device="cpu")
    if via == "file":
        where.close()
    assert loaded.get_env() is None
    expected = trained.predict(RAW, deterministic=True)[0]
    assert np.array_equal(loaded.predict(RAW, deterministic=True)[0], expected)
    assert np.array_equal(loaded.predict(RAW[0], deterministic=True)[0], expected[0])
    # The statistics do it: without them the answer is another one.
    moments = observation_normalizer(loaded.policy).moments[0]
    moments.mean.zero_()
    assert not np.array_equal(loaded.predict(RAW, deterministic=True)[0], expected)


def test_statistics_travel(trained, tmp_path):
    trained.save(tmp_path / "model")
    loaded = PPOPlus.load(tmp_path / "model", device="cpu")
    for name in ("reward_normalizer", "value_normalizer"):
        before, after = getattr(trained, name), getattr(loaded, name)
        assert float(before.count) == pytest.approx(64, abs=1e-3)
        assert_same(before.state_dict(), after.state_dict())
    assert float(observation_normalizer(loaded.policy).moments[0].count) == pytest.approx(64, abs=1e-3)
    assert loaded._normalizes_observations is True


def test_a_name_with_a_dot_keeps_it_as_in_sb3(trained, tmp_path):
    trained.save(tmp_path / "model.v2")
    PPO("MlpPolicy", "CartPole-v1", device="cpu").save(tmp_path / "sb3.v2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.v2", "sb3.v2"]
    PPOPlus.load(tmp_path / "model.v2", device="cpu")


def test_missing_folders_are_made(trained, tmp_path):
    trained.save(tmp_path / "a" / "b" / "model")
    assert (tmp_path / "a" / "b" / "model.zip").exists()


def test_saving_does_not_disturb_the_model(trained, tmp_path):
    before = {key: th.as_tensor(value).clone() for key, value in everything_of(trained).items()}
    keys = set(trained.__dict__)
    trained.save(tmp_path / "model")
    assert set(trained.__dict__) == keys
    assert_same(before, everything_of(trained))


# --- the file -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [SMALL, EVERYTHING])
def test_the_file_of_an_mlp_is_under_one_megabyte(options, tmp_path):
    PPOPlus("MlpPolicy", drift(), **options).learn(16).save(tmp_path / "model")
    assert (tmp_path / "model.zip").stat().st_size < 1_000_000


def test_the_file_can_be_read_by_torch_without_trusting_it(trained, tmp_path):
    trained.save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        names = {name for name in archive.namelist() if name.endswith(".pth")}
        expected = {"policy.pth", "policy.optimizer.pth", "reward_normalizer.pth", "value_normalizer.pth"}
        assert expected <= names
        for name in names:
            th.load(io.BytesIO(archive.read(name)), weights_only=True)


def test_a_preset_s_file_holds_sb3s_parameters_only(tmp_path):
    PPOPlus("MlpPolicy", drift(), **{**presets.SB3_PPO, **SMALL}).save(tmp_path / "model")
    _, params, _ = load_from_zip_file(tmp_path / "model.zip", device="cpu")
    assert set(params) == {"policy", "policy.optimizer"}
    plain = PPO("MlpPolicy", drift(), **SMALL)
    plain.set_parameters(params)  # exact match


@pytest.mark.parametrize("failing", ["write", "rename", "serialise"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(failing, tmp_path, monkeypatch):
    model = PPOPlus("MlpPolicy", "CartPole-v1", **SMALL)
    path = tmp_path / "model.zip"
    model.save(path)
    old = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    if failing == "write":
        monkeypatch.setattr(files.os, "fsync", fail)
    elif failing == "rename":
        monkeypatch.setattr(files.os, "replace", fail)
    else:
        monkeypatch.setattr(th, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        model.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == old
    assert [each.name for each in tmp_path.iterdir()] == ["model.zip"]
    PPOPlus.load(path, device="cpu")


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
def test_a_saved_file_has_the_mode_of_any_new_file(trained, tmp_path):
    (tmp_path / "ordinary").write_text("")
    trained.save(tmp_path / "model")
    assert (tmp_path / "model.zip").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.skipif(os.name != "posix", reason="needs symbolic links")
def test_saving_through_a_symbolic_link_writes_the_file_it_points_to(trained, tmp_path):
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "model.zip", tmp_path / "latest.zip"
    trained.save(target)
    old = target.read_bytes()
    link.symlink_to(target)
    trained.num_timesteps += 1
    try:
        trained.save(link)
    finally:
        trained.num_timesteps -= 1
    assert link.is_symlink()
    assert target.read_bytes() != old


@pytest.mark.parametrize("bad", ["missing", "no zip", "folder"])
def test_loading_what_is_no_model_is_an_error(bad, tmp_path):
    path = tmp_path / "model.zip"
    if bad == "no zip":
        path.write_bytes(b"hello")
    elif bad == "folder":
        path.mkdir()
    with pytest.raises((OSError, ValueError)):
        PPOPlus.load(path, device="cpu")


@pytest.mark.parametrize("name", ["nothing", "nothing.zip"])
def test_a_missing_file_is_called_as_the_user_calls_it(name, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        PPOPlus.load(tmp_path / name, device="cpu")
    assert (caught.value.filename, caught.value.strerror) == (str(tmp_path / name), "there is no model file")


# --- changes while loading ----------------------------------------------------------------------------------


def test_hyperparameters_can_be_changed_by_keyword(trained, tmp_path):
    trained.save(tmp_path / "model")
    changes = {"clip_range": 0.1, "learning_rate": "cos_1e-4", "ent_coef": 0.01, "n_steps": 16, "target_kl": 0.02}
    loaded = PPOPlus.load(tmp_path / "model", env=drift(), device="cpu", **changes)
    assert loaded.clip_range(0.3) == 0.1
    hp = loaded.hyperparameters_at(1.0)
    assert (hp.clip_range, hp.learning_rate, hp.ent_coef, hp.n_steps, hp.target_kl) == (0.1, 1e-4, 0.01, 16, 0.02)
    assert loaded.learn(32).num_timesteps == 32
    assert loaded.rollout_buffer.rewards.shape == (16, 2)
    unchanged = PPOPlus.load(tmp_path / "model", device="cpu")
    assert unchanged.clip_range(0.5) == pytest.approx(0.1)  # lin_0.2 half way


@pytest.mark.parametrize("n_envs", [1, 5])
def test_the_number_of_environments_may_change(trained, tmp_path, n_envs):
    trained.save(tmp_path / "model")
    loaded = PPOPlus.load(tmp_path / "model", env=drift(n_envs), device="cpu")
    loaded.learn(8 * n_envs)
    assert loaded.n_envs == n_envs
    assert loaded.rollout_buffer.rewards.shape == (8, n_envs)
    assert len(loaded._carried_returns) == n_envs


FIXED = {
    "normalize_observations": False,
    "normalize_rewards": False,
    "normalize_value_targets": False,
    "activation_fn": "relu",
}


@pytest.mark.parametrize("name", FIXED)
def test_what_is_part_of_the_model_cannot_be_changed(trained, tmp_path, name):
    trained.save(tmp_path / "model")
    with pytest.raises(ValueError, match=f"`{name}` is part of the saved model and cannot be changed by load"):
        PPOPlus.load(tmp_path / "model", device="cpu", **{name: FIXED[name]})


def test_passing_every_setting_again_unchanged_is_no_change(trained, tmp_path):
    """RL Zoo's `-i` hands all settings of its file to `load` again."""
    trained.save(tmp_path / "model")
    settings = {name: value for name, value in EVERYTHING.items() if name != "device"}
    loaded = PPOPlus.load(tmp_path / "model", env=drift(), device="cpu", **settings)
    loaded.learn(16)


def test_every_setting_of_the_constructor_passed_again_is_no_change(tmp_path):
    settings = {**presets.LECTURE, **SMALL}
    PPOPlus("MlpPolicy", drift(), **settings).save(tmp_path / "model")
    settings.pop("device")
    PPOPlus.load(tmp_path / "model", env=drift(), device="cpu", **settings).learn(16)


@pytest.mark.parametrize(("saved_with", "loaded_with"), [(None, 1e-3), (1e-3, None)])
def test_giving_the_critic_its_own_rate_or_taking_it_while_loading_works_or_is_refused_by_name(
    saved_with, loaded_with, tmp_path
):
    PPOPlus("MlpPolicy", drift(), **SMALL, critic_learning_rate=saved_with).learn(16).save(tmp_path / "model")
    try:
        loaded = PPOPlus.load(tmp_path / "model", env=drift(), device="cpu", critic_learning_rate=loaded_with)
        loaded.learn(16)
    except ValueError as error:
        assert "critic_learning_rate" in str(error)
    else:
        assert len(loaded.policy.optimizer.param_groups) == (1 if loaded_with is None else 2)


@pytest.mark.parametrize(("name", "value"), [("adam_eps", 1e-3), ("log_std_init", -2.0), ("ortho_init", False)])
def test_a_setting_that_loading_cannot_apply_is_refused_and_not_ignored(name, value, tmp_path):
    PPOPlus("MlpPolicy", drift(), **SMALL).learn(16).save(tmp_path / "model")
    try:
        loaded = PPOPlus.load(tmp_path / "model", device="cpu", **{name: value})
    except ValueError as error:
        assert name in str(error)
    else:
        assert name == "adam_eps"
        assert loaded.policy.optimizer.param_groups[0]["eps"] == value


def test_clip_observations_can_be_changed_and_takes_effect(trained, tmp_path):
    trained.save(tmp_path / "model")
    loaded = PPOPlus.load(tmp_path / "model", device="cpu", clip_observations=0.01)
    obs = th.as_tensor(RAW * 100)
    assert float(loaded.policy.extract_features(obs).abs().max()) == pytest.approx(0.01)
    assert float(trained.policy.extract_features(obs).abs().max()) == pytest.approx(10)


def test_what_rl_zoos_enjoy_replaces_can_be_replaced(trained, tmp_path):
    trained.save(tmp_path / "model")
    replaced = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0}
    loaded = PPOPlus.load(tmp_path / "model", custom_objects=replaced, device="cpu", seed=1)
    assert loaded.lr_schedule(1) == 0
    assert loaded.predict(RAW)[0].shape == (1, 2)


def test_other_policy_kwargs_are_refused_as_by_sb3(trained, tmp_path):
    trained.save(tmp_path / "model")
    with pytest.raises(ValueError, match="policy kwargs do not equal"):
        PPOPlus.load(tmp_path / "model", device="cpu", policy_kwargs={"net_arch": [3]})


def test_other_spaces_are_refused_as_by_sb3(trained, tmp_path):
    trained.save(tmp_path / "model")
    with pytest.raises(ValueError, match="spaces do not match"):
        PPOPlus.load(tmp_path / "model", env=make_vec_env("CartPole-v1"), device="cpu")


def test_exclude_and_include(trained, tmp_path):
    trained.save(
        tmp_path / "model", exclude=["learning_rate", "gamma", "clip_range_vf"], include=["_lr_schedule_source"]
    )
    data, _, _ = load_from_zip_file(tmp_path / "model.zip", device="cpu")
    assert {"learning_rate", "gamma", "clip_range_vf"}.isdisjoint(data)
    assert "_lr_schedule_source" in data
    loaded = PPOPlus.load(tmp_path / "model", device="cpu")
    assert loaded.gamma == 0.99  # the defaults fill in
    assert np.array_equal(loaded.predict(RAW, deterministic=True)[0], trained.predict(RAW, deterministic=True)[0])


def test_callables_survive(tmp_path):
    rate = 0.25
    model = PPOPlus("MlpPolicy", "CartPole-v1", **SMALL, learning_rate=lambda p: rate * p, ent_coef=lambda p: 0.1 * p)
    model.save(tmp_path / "model")
    hp = PPOPlus.load(tmp_path / "model", device="cpu").hyperparameters_at(0.5)
    assert (hp.learning_rate, hp.ent_coef) == (0.125, 0.05)


def test_loading_does_not_warn(trained, tmp_path):
    trained.save(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PPOPlus.load(tmp_path / "model", env=drift(), device="cpu")


def test_dict_observations_and_custom_policies_travel(tmp_path):
    from stable_baselines3.common.policies import MultiInputActorCriticPolicy

    class Mine(MultiInputActorCriticPolicy):
        pass

    class Dicts(Drift):
        def __init__(self):
            super().__init__()
            box = self.observation_space
            self.observation_space = spaces.Dict({"a": box, "b": spaces.Discrete(2)})

        def _observation(self):
            return {"a": super()._observation(), "b": 1}

    model = PPOPlus(Mine, Dicts(), **SMALL).learn(16)
    model.save(tmp_path / "model")
    loaded = PPOPlus.load(tmp_path / "model", device="cpu")
    raw = {"a": RAW, "b": np.array([1])}
    assert np.array_equal(loaded.predict(raw, deterministic=True)[0], model.predict(raw, deterministic=True)[0])
    assert loaded.policy_class.__name__ == "Mine"


@pytest.mark.parametrize("when", ["before training", "inside a rollout"])
def test_a_checkpoint_at_any_moment_can_be_continued(when, tmp_path):
    model = PPOPlus("MlpPolicy", drift(), **EVERYTHING)
    if when == "before training":
        model.save(tmp_path / "model")
    else:

        def checkpoint(locals_, globals_):
            if model.num_timesteps == 22:
                model.save(tmp_path / "model")
            return True

        model.learn(32, checkpoint)
    loaded = PPOPlus.load(tmp_path / "model", env=drift(), device="cpu")
    loaded.learn(32)
    assert all(bool(p.isfinite().all()) for p in loaded.policy.parameters())


def test_write_atomically_never_opens_the_target_itself(tmp_path, monkeypatch):
    opened = []
    real = builtins.open
    monkeypatch.setattr(builtins, "open", lambda name, *a, **k: opened.append(str(name)) or real(name, *a, **k))
    files.write_atomically(tmp_path / "x.bin", b"data")
    monkeypatch.undo()
    assert str(tmp_path / "x.bin") not in opened
    assert pathlib.Path(tmp_path / "x.bin").read_bytes() == b"data"


@pytest.mark.parametrize("loader", [PPOPlus, A2CPlus, TRPOPlus])
@pytest.mark.parametrize("saver", [PPOPlus, A2CPlus, TRPOPlus])
def test_a_model_is_loaded_by_its_own_algorithm_and_by_no_other(saver, loader, tmp_path):
    saver("MlpPolicy", "CartPole-v1", n_steps=128, device="cpu").save(tmp_path / "model")
    if loader is saver:
        assert type(loader.load(tmp_path / "model")) is loader
    else:
        with pytest.raises(ModelFileError, match=f"is a model of {saver.__name__}: load it with that"):
            loader.load(tmp_path / "model")


def test_a_subclass_loads_what_it_saved_and_its_parents_files(tmp_path):
    class Own(A2CPlus):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.clip_range, self.n_epochs = 0.2, 1  # as PPO's are called

    for cls in (Own, A2CPlus):
        cls("MlpPolicy", "CartPole-v1", device="cpu").save(tmp_path / "model")
        assert type(Own.load(tmp_path / "model")) is Own


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("activation_fn", "relu", "make a new model$"),
        ("adam_eps", 1e-3, "make a new model$"),
        ("normalize_observations", False, "make a new model$"),
        ("clip_observations", 0.5, "or load the saved one with clip_observations=0.5$"),
        ("n_steps", 16, "or load the saved one with n_steps=16$"),
    ],
)
def test_what_a_model_is_built_with_cannot_be_assigned_later(name, value, instead, tmp_path):
    model = PPOPlus("MlpPolicy", Drift(), **SMALL)
    before = getattr(model, name)
    setattr(model, name, value)
    for act in (lambda: model.learn(8), lambda: model.save(tmp_path / "model")):
        with pytest.raises(HyperparameterError, match=f"`{name}` was .*, and cannot become {value!r}: .*{instead}"):
            act()
    assert not (tmp_path / "model.zip").exists()
    setattr(model, name, before)
    model.learn(8).save(tmp_path / "model")
    if not instead.startswith("make"):
        assert getattr(PPOPlus.load(tmp_path / "model", env=Drift(), **{name: value}).learn(16), name) == value


def test_other_rollouts_may_be_assigned_together_with_a_buffer_of_their_length(tmp_path):
    model = PPOPlus("MlpPolicy", Drift(), **SMALL)
    model.n_steps = 16
    model.rollout_buffer = type(model.rollout_buffer)(
        16, model.observation_space, model.action_space, device="cpu", gamma=0.99, gae_lambda=0.9, n_envs=1
    )
    model.learn(16).save(tmp_path / "model")
    assert model.num_timesteps == 16
    assert PPOPlus.load(tmp_path / "model", env=Drift()).learn(16).num_timesteps == 16


def test_a_change_of_what_is_built_in_the_middle_of_training_is_refused_at_the_next_update():
    class Change(BaseCallback):
        def _on_step(self):
            self.model.clip_observations = 1.0
            return True

    with pytest.raises(HyperparameterError, match=r"`clip_observations` was 10\.0"):
        PPOPlus("MlpPolicy", Drift(), **SMALL).learn(32, Change())


def test_a_loaded_model_without_environment_says_how_to_give_it_one(tmp_path):
    PPOPlus("MlpPolicy", Drift(), **SMALL).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"no environment to learn in: set_env\(env\)"):
        PPOPlus.load(tmp_path / "model").learn(8)
    with pytest.raises(ValueError, match="`use_sde` is part of the saved model"):
        PPOPlus.load(tmp_path / "model", use_sde=True)
