"""Model files: nothing in them runs without trust, damage is always noticed, and SB3's files go on as SB3 would."""

import base64
import contextlib
import copy
import functools
import io
import itertools
import json
import pathlib
import pickle
import random
import zipfile
from collections import OrderedDict, deque

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import TRPO, MaskablePPO, RecurrentPPO
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule, LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn
from typer.testing import CliRunner

from sb3_pgplus import A2CPlus, PPOPlus, TorchRolloutBuffer, TRPOPlus, presets
from sb3_pgplus.cli import app
from sb3_pgplus.conversion import convert
from sb3_pgplus.errors import ModelFileError, UntrustedModelError
from sb3_pgplus.model_file import pickled_attributes, read
from sb3_pgplus.schedules import CosineSchedule
from sb3_pgplus.serialization import decode, encode, pickled_parts

SMALL = {"n_steps": 16, "batch_size": 16, "n_epochs": 1, "seed": 0, "device": "cpu"}
TINY = {**SMALL, "policy_kwargs": {"net_arch": [2]}}


def parameters_of(model):
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(th.equal(value, b[name]) for name, value in a.items())


def rewritten(path, changes, leave_out=()):
    """The zip file with members replaced or added; ``data`` is given as a dictionary to update it with."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if name not in leave_out}
    for name, content in changes.items():
        is_data = name == "data"
        members[name] = json.dumps({**json.loads(members["data"]), **content}).encode() if is_data else content
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "model.zip"
    PPOPlus("MlpPolicy", "CartPole-v1", **TINY).learn(16).save(path)
    return path


# --- values to JSON and back ------------------------------------------------------------------------------------------


def seeded(space, seed=7):
    space.seed(seed)
    return space


EXACT = {
    "numbers": [1, 2.5, -0.0, 1e-320, float("inf"), 10**30, True, None, "ü\n"],
    "containers": {"a": (1, [2, (3,)]), "b": {"c": {4, 5}, ":type:": "class"}, "d": {1: "x", (1, 2): b"\x00\xff"}},
    "deque": deque([{"r": 1.5, "l": 3}], maxlen=7),
    "ordered": OrderedDict([("z", 1), ("a", 2)]),
    "numpy scalars": [np.float32(0.1), np.int64(-3), np.bool_(True), np.float64(1 / 3), np.uint8(255), np.str_("a")],
    "dtypes": [np.dtype("float32"), np.dtype(">i4"), np.float64],
    "classes": [nn.Tanh, th.optim.AdamW, RMSpropTFLike, CombinedExtractor, ActorCriticPolicy, TorchRolloutBuffer],
    "path": pathlib.Path("logs") / "tensorboard",
}


def same(a, b):
    if isinstance(a, dict):
        return type(a) is type(b) and [*a] == [*b] and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple, deque)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b and str(a) == str(b)


@pytest.mark.parametrize("name", EXACT)
def test_a_value_comes_back_with_its_type_and_without_a_pickle(name):
    entry = json.loads(json.dumps(encode(EXACT[name]), allow_nan=False))
    assert not list(pickled_parts(entry, name))
    back = decode(entry, trusted=False)
    assert same(back, EXACT[name])
    if isinstance(back, deque):
        assert back.maxlen == 7


ARRAYS = [
    np.arange(6, dtype=np.float32).reshape(2, 3).T,
    np.zeros((0, 3)),
    np.array(2.5),
    np.array([np.nan, -np.inf]),
    np.array([True, False]),
    np.array(["ä", "bc"]),
    np.arange(3, dtype=">i2"),
]


@pytest.mark.parametrize("index", range(len(ARRAYS)))
def test_an_array_comes_back_bit_for_bit_and_writable(index):
    array = ARRAYS[index]
    back = decode(json.loads(json.dumps(encode(array))), trusted=False)
    assert back.dtype == array.dtype and back.shape == array.shape and back.tobytes() == array.tobytes()
    assert back.flags.writeable


def test_a_tensor_comes_back():
    tensor = th.arange(6.0).reshape(2, 3)
    entry = encode(tensor)
    assert not list(pickled_parts(entry, "x"))
    assert th.equal(decode(entry, trusted=False), tensor)


SPACES = {
    "box": spaces.Box(-np.inf, 3.5, (2, 3)),
    "half-open box": spaces.Box(np.array([-np.inf, 0]), np.array([1, np.inf]), dtype=np.float64),
    "image": spaces.Box(0, 255, (4, 4, 3), np.uint8),
    "discrete": spaces.Discrete(5, start=-2),
    "small discrete": spaces.Discrete(5, dtype=np.int32),
    "multidiscrete": spaces.MultiDiscrete([[2, 3], [4, 5]]),
    "multibinary": spaces.MultiBinary(4),
    "multibinary 2d": spaces.MultiBinary([2, 3]),
    "dict": spaces.Dict([("z", spaces.Discrete(2)), ("a", spaces.Box(-1, 1, (2,)))]),
    "tuple": spaces.Tuple([spaces.Discrete(2), spaces.Dict(x=spaces.MultiBinary(2))]),
}


@pytest.mark.parametrize("is_seeded", [True, False])
@pytest.mark.parametrize("name", SPACES)
def test_a_space_comes_back_and_goes_on_sampling_where_it_was(name, is_seeded):
    space = copy.deepcopy(SPACES[name])
    if is_seeded:
        seeded(space).sample()
    entry = json.loads(json.dumps(encode(space)))
    assert not list(pickled_parts(entry, name))
    back = decode(entry, trusted=False)
    assert back == space and repr(back) == repr(space)
    if isinstance(space, spaces.Dict):
        assert list(back.spaces) == list(space.spaces)
    if is_seeded:
        samples = [[str(each.sample()) for _ in range(5)] for each in (space, back)]
        assert samples[0] == samples[1]
    else:
        assert back._np_random is None


def test_a_space_that_its_arguments_do_not_describe_is_pickled_whole():
    class Mine(spaces.Box):
        pass

    box = spaces.Box(-1, 1, (2,))
    box.unit = "m/s"
    for space in (Mine(-1, 1, (2,)), box):
        entry = encode(space)
        assert list(pickled_parts(entry, "space"))
        assert vars(decode(entry, trusted=True)).keys() == vars(space).keys()


@pytest.mark.parametrize("name", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
def test_a_random_generator_goes_on_where_it_was_and_spawns_alike(name):
    generator = np.random.Generator(getattr(np.random, name)(5))
    generator.normal(size=3)
    generator.spawn(2)
    entry = json.loads(json.dumps(encode(generator)))
    assert not list(pickled_parts(entry, name))
    back = decode(entry, trusted=False)
    for each in (lambda g: g.normal(size=4), lambda g: g.integers(9, size=4), lambda g: g.spawn(1)[0].normal(size=4)):
        assert np.array_equal(each(generator), each(back))


SCHEDULES = [
    FloatSchedule(0.2),
    FloatSchedule(LinearSchedule(3e-4, 1e-5, 0.5)),
    FloatSchedule(CosineSchedule(1e-3, 0.0)),
    ConstantSchedule(0.3),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_schedule_comes_back(schedule):
    entry = json.loads(json.dumps(encode(schedule)))
    assert not list(pickled_parts(entry, "x"))
    back = decode(entry, trusted=False)
    assert type(back) is type(schedule) and repr(back) == repr(schedule)
    assert [back(p) for p in (1.0, 0.6, 0.3, 0.0)] == [schedule(p) for p in (1.0, 0.6, 0.3, 0.0)]


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "torch.nn.modules.activation.torch", "torch.optim.adam._use_grad_for", "x"]
)
def test_a_name_that_is_no_part_of_a_model_is_no_class(name):
    with pytest.raises(ValueError, match="no class that models are made of"):
        decode({":type:": "class", "name": name}, trusted=False)


@pytest.mark.parametrize("dtype", ["O", "object", "i4,O"])
def test_arrays_of_python_objects_are_refused(dtype):
    with pytest.raises(ValueError, match="dtype"):
        decode({":type:": "array", "dtype": dtype, "shape": [1], "data": "AAAAAAAAAAA="}, trusted=False)
    objects = np.array([object], dtype=object)
    assert list(pickled_parts(encode(objects), "x"))  # pickled as a whole, which asks for trust


# --- round trips of models --------------------------------------------------------------------------------------------


class Spaces(gym.Env):
    """Any observation and action space; an episode lasts five steps."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = copy.deepcopy(observation_space), copy.deepcopy(action_space)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), float(np.sum(action)), self.steps == 5, False, {}


UNIT = spaces.Box(-1, 1, (3,))
SETTINGS = {
    "defaults": (UNIT, UNIT, {}),
    "schedules": (UNIT, UNIT, {"learning_rate": "cos_3e-4_1e-5", "clip_range": "lin_0.3", "ent_coef": 1e-3}),
    "schedule objects": (UNIT, UNIT, {"learning_rate": LinearSchedule(1e-3, 0, 1), "clip_range": FloatSchedule(0.1)}),
    "numpy numbers": (UNIT, UNIT, {"learning_rate": np.float64(1e-3), "gamma": np.float32(0.5)}),
    "networks": (
        UNIT,
        UNIT,
        {
            "policy_kwargs": {
                "net_arch": {"pi": [4, 3], "vf": [5]},
                "activation_fn": nn.ELU,
                "optimizer_class": th.optim.AdamW,
                "optimizer_kwargs": {"betas": (0.8, 0.9), "weight_decay": 0.1},
                "features_extractor_class": FlattenExtractor,
                "share_features_extractor": False,
            }
        },
    ),
    "buffer": (UNIT, UNIT, {"rollout_buffer_class": RolloutBuffer, "normalize_value_targets": False}),
    "gSDE": (UNIT, UNIT, {"use_sde": True, "sde_sample_freq": 4}),
    "critic": (UNIT, UNIT, {"critic_learning_rate": "lin_1e-3", "normalize_value_targets": True}),
    "multidiscrete": (spaces.MultiDiscrete([2, 3]), spaces.MultiDiscrete([2, 3]), {}),
    "multibinary": (spaces.MultiBinary(3), spaces.MultiBinary(3), {}),
    "discrete": (spaces.Discrete(4), spaces.Discrete(3), {}),
    "dict": (spaces.Dict({"z": spaces.Discrete(2), "a": UNIT}), UNIT, {"tensorboard_log": pathlib.Path("logs")}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_travel_without_a_pickle_and_training_goes_on_as_if_nothing_had_happened(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    observation_space, action_space, settings = SETTINGS[name]
    policy = "MultiInputPolicy" if name == "dict" else "MlpPolicy"

    def environment():
        return DummyVecEnv([lambda: Spaces(observation_space, action_space)])

    model = PPOPlus(policy, environment(), **{**SMALL, **settings}, schedule_timesteps=100).learn(32)
    model.save("model.zip")
    assert pickled_attributes("model.zip") == []
    loaded = PPOPlus.load("model.zip", env=environment(), device="cpu", trusted=False)
    assert loaded.hyperparameters() == model.hyperparameters()
    assert loaded.policy_kwargs == model.policy_kwargs
    assert list(loaded.ep_info_buffer) == list(model.ep_info_buffer)
    model.set_env(model.get_env())  # both begin at a reset
    for each in (model, loaded):
        each.get_env().seed(3)
        each.action_space.seed(3)
        each.set_random_seed(3)
        if each.use_sde:
            each.policy.reset_noise(1)
        each.learn(32, reset_num_timesteps=False)
    assert_equal(parameters_of(model), parameters_of(loaded))
    assert model.num_timesteps == loaded.num_timesteps == 64


def rate(progress):
    return 1e-3 * progress


class Extractor(FlattenExtractor):
    """Stands for a user's own network."""


class Policy(ActorCriticPolicy):
    """Stands for a user's own policy."""


OWN_CODE = {
    "function": ({"learning_rate": rate}, ["learning_rate", "lr_schedule.value_schedule"]),
    "lambda": ({"clip_range": lambda p: 0.2 * p}, ["clip_range.value_schedule"]),
    "class": (
        {"policy_kwargs": {"features_extractor_class": Extractor, "net_arch": [3]}},
        ["policy_kwargs['features_extractor_class']"],
    ),
    "policy": ({"policy": Policy}, ["policy_class"]),
}


@pytest.mark.parametrize("name", OWN_CODE)
def test_own_code_is_pickled_reported_and_refused_without_trust_until_it_is_given(name, tmp_path, capsys):
    settings, places = OWN_CODE[name]
    arguments = {"policy": "MlpPolicy", "env": "CartPole-v1", **SMALL, **settings, "verbose": 1}
    model = PPOPlus(**arguments)
    model.save(tmp_path / "model.zip")
    assert [part.split(" (")[0] for part in pickled_attributes(tmp_path / "model.zip")] == places
    assert all(place in capsys.readouterr().out for place in places[:1])

    with pytest.raises(UntrustedModelError) as caught:
        PPOPlus.load(tmp_path / "model.zip", device="cpu", trusted=False)
    attributes = {place.split(".")[0].split("[")[0] for place in places}
    for text in ("model.zip", "trusted=True", *places, *(f"{attribute!r}: …" for attribute in attributes)):
        assert text in str(caught.value)

    given = {attribute: getattr(model, attribute) for attribute in attributes}
    for loaded in (
        PPOPlus.load(tmp_path / "model.zip", device="cpu", trusted=False, custom_objects=given),
        PPOPlus.load(tmp_path / "model.zip", device="cpu"),
    ):
        assert_equal(parameters_of(loaded), parameters_of(model))
        assert loaded.hyperparameters_at(0.5) == model.hyperparameters_at(0.5)


def test_what_cannot_be_pickled_is_named_with_the_way_out(tmp_path):
    model = PPOPlus("MlpPolicy", "CartPole-v1", **TINY)
    model.camera = (i for i in range(3))
    with pytest.raises(TypeError, match=r"cannot save `camera` \(generator\).*exclude=\['camera'\]"):
        model.save(tmp_path / "model.zip")
    assert not list(tmp_path.iterdir())
    model.save(tmp_path / "model.zip", exclude=["camera"])


def test_a_file_of_the_format_before_this_one_still_loads_with_trust(tmp_path):
    """Its attributes were SB3's JSON: what is no plain value is pickled."""
    model = PPOPlus("MlpPolicy", "CartPole-v1", **TINY, learning_rate="lin_1e-3").learn(16)
    BaseAlgorithm.save(model, tmp_path / "old.zip")  # which wrote those files
    loaded = PPOPlus.load(tmp_path / "old.zip", device="cpu")
    assert_equal(parameters_of(loaded), parameters_of(model))
    assert loaded.hyperparameters() == model.hyperparameters()
    with pytest.raises(UntrustedModelError, match="observation_space"):
        PPOPlus.load(tmp_path / "old.zip", trusted=False)


def test_sb3_reads_the_parameters_of_our_file(tmp_path):
    model = PPOPlus("MlpPolicy", "CartPole-v1", **{**presets.SB3_PPO, **SMALL}).learn(16)
    model.save(tmp_path / "model.zip")
    theirs = PPO("MlpPolicy", "CartPole-v1", device="cpu")
    theirs.set_parameters(str(tmp_path / "model.zip"), device="cpu")
    assert_equal(parameters_of(theirs), parameters_of(model))
    data, params, _ = load_from_zip_file(tmp_path / "model.zip", device="cpu")
    assert data["n_steps"] == 16 and set(params) == {"policy", "policy.optimizer"}


def test_extra_members_do_not_disturb_and_open_files_work(tmp_path):
    model = PPOPlus("MlpPolicy", "CartPole-v1", **TINY).learn(16)
    with open(tmp_path / "checkpoint.zip", "wb") as file:
        model.save(file)
    with zipfile.ZipFile(tmp_path / "checkpoint.zip", "a") as archive:
        archive.writestr("state/rng.json", "{}")
        archive.writestr("state/more.pth", b"not for load")
        archive.comment = b"a comment behind everything"
    with open(tmp_path / "checkpoint.zip", "rb") as file:
        loaded = PPOPlus.load(file, env=gym.make("CartPole-v1"), device="cpu")
    assert_equal(parameters_of(loaded), parameters_of(model))
    loaded.learn(16)


# --- malice -----------------------------------------------------------------------------------------------------------


class Bomb:
    """A pickle of it creates a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def entry_of(bomb):
    return {":type:": "<class 'object'>", ":serialized:": base64.b64encode(cloudpickle.dumps(bomb)).decode()}


def torch_zip_with(bomb):
    """What ``torch.save`` writes around a pickle."""
    buffer = io.BytesIO()
    th.save({"weight": th.zeros(1), "bomb": bomb}, buffer)
    return buffer.getvalue()


def bombs(bomb):
    """Place → what to change in the file so that there is a bomb."""
    entry = entry_of(bomb)
    with io.BytesIO() as legacy:
        th.save(bomb, legacy, _use_new_zipfile_serialization=False)
        old_torch = legacy.getvalue()
    raw = pickle.dumps(bomb)
    in_data = {
        "policy_class": entry,
        "observation_space": entry,
        "learning_rate": entry,
        "policy_kwargs": {"net_arch": [2, entry]},
        "clip_range": {":type:": "schedule", "class": "FloatSchedule", "value_schedule": entry},
        "ep_info_buffer": {":type:": "deque", "items": [entry], "maxlen": 3},
        "_last_obs": {":type:": "array", "dtype": entry, "shape": [1], "data": ""},
        "seed": {":type:": "tuple", "items": [entry]},
        "gamma": {":type:": "float", "value": entry, ":serialized:": entry[":serialized:"]},
        "unheard of": entry,
    }
    places = {f"data: {name}": {"data": {name: value}} for name, value in in_data.items()}
    contents = {"pickle": raw, "torch": torch_zip_with(bomb), "old torch": old_torch}
    for member, (kind, content) in itertools.product(
        ("policy.pth", "policy.optimizer.pth", "reward_normalizer.pth", "pytorch_variables.pth", "more.pth"),
        contents.items(),
    ):
        places[f"{member}: {kind}"] = {member: content}
    for member in ("system_info.txt", "_stable_baselines3_version", "_sb3_pgplus_format", "data.pkl", "code.py"):
        places[member] = {member: raw}
    everywhere = {"data": in_data}
    for change in places.values():
        everywhere |= {member: content for member, content in change.items() if member != "data"}
    return {**places, "everywhere": everywhere}


HARMLESS = ("_stable_baselines3_version", "data.pkl", "code.py")
IN_DATA = [place for place in bombs(Bomb("x")) if place.startswith("data: ")]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("place", bombs(Bomb("x")))
def test_a_pickle_anywhere_runs_nothing_without_trust(place, tiny_file, tmp_path):
    path, trace = tmp_path / "model.zip", tmp_path / "bomb"
    path.write_bytes(tiny_file.read_bytes())
    rewritten(path, bombs(Bomb(trace))[place])
    loaded = []
    for use in (
        lambda: loaded.append(PPOPlus.load(path, device="cpu", trusted=False, print_system_info=True)),
        lambda: PPOPlus("MlpPolicy", "CartPole-v1", **TINY).set_parameters(path),
        lambda: pickled_attributes(path),
    ):
        try:
            use()
        except ModelFileError as error:
            assert "model.zip" in str(error)
    assert not trace.exists()
    assert bool(loaded) == (place in HARMLESS)


@pytest.mark.filterwarnings("ignore:cannot read", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("place", IN_DATA)
def test_the_bombs_are_real(place, tiny_file, tmp_path):
    """With trust they go off, as in SB3, so that the test above says something."""
    path, trace = tmp_path / "model.zip", tmp_path / "bomb"
    path.write_bytes(tiny_file.read_bytes())
    rewritten(path, bombs(Bomb(trace))[place])
    with contextlib.suppress(Exception):  # an open file is no space, no number, ...
        PPOPlus.load(path, device="cpu")
    assert trace.exists()


def test_the_bombs_for_torch_are_real(tmp_path):
    th.load(io.BytesIO(torch_zip_with(Bomb(tmp_path / "bomb"))), weights_only=False)
    assert (tmp_path / "bomb").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"env": "evil_module:Env-v0"},
        {"rollout_buffer_class": "evil_module.Buffer"},
        {"policy_class": {":type:": "class", "name": "evil_module.Policy"}},
        {"policy_kwargs": {"features_extractor_class": {":type:": "class", "name": "evil_module.Policy"}}},
    ],
    ids=str,
)
def test_no_module_that_the_file_names_is_imported(changes, tiny_file, tmp_path, monkeypatch):
    path, trace = tmp_path / "model.zip", tmp_path / "imported"
    path.write_bytes(tiny_file.read_bytes())
    (tmp_path / "evil_module.py").write_text(f"open({str(trace)!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    rewritten(path, {"data": changes})
    with pytest.raises(ModelFileError, match=next(iter(changes))):
        PPOPlus.load(path, device="cpu", trusted=False)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["_setup_model", "learn", "predict", "hparams_class", "__class__"])
def test_a_file_cannot_replace_a_method(name, tiny_file, tmp_path):
    path = tmp_path / "model.zip"
    path.write_bytes(tiny_file.read_bytes())
    rewritten(path, {"data": {name: {":type:": "class", "name": "torch.nn.modules.activation.Tanh"}}})
    with pytest.raises(UntrustedModelError, match=f"sets `{name}`"):
        PPOPlus.load(path, device="cpu", trusted=False)


def changed_tensors(path, member, change):
    with zipfile.ZipFile(path) as archive:
        tensors = th.load(io.BytesIO(archive.read(member)), weights_only=True)
    change(tensors)
    buffer = io.BytesIO()
    th.save(tensors, buffer)
    rewritten(path, {member: buffer.getvalue()})


@pytest.mark.parametrize(
    ("name", "value"),
    [("exp_avg", th.zeros(1)), ("exp_avg_sq", th.zeros(1).expand(2, 4)), ("step", th.zeros(9))],
    ids=["other shape", "no memory of its own", "step"],
)
def test_moments_that_a_kernel_would_write_past_are_refused(name, value, tiny_file, tmp_path):
    """Torch's fused Adam writes as far as the parameter goes, wherever the moment ends: measured, a broken heap."""
    path = tmp_path / "model.zip"
    path.write_bytes(tiny_file.read_bytes())
    model = PPOPlus("MlpPolicy", "CartPole-v1", **TINY)
    assert model.policy.mlp_extractor.policy_net[0].weight.shape == (2, 4)

    def put(optimizer):
        assert optimizer["state"][0]["exp_avg"].shape == (2, 4)
        optimizer["state"][0][name] = value

    changed_tensors(path, "policy.optimizer.pth", put)
    for use in (lambda: PPOPlus.load(path, device="cpu", trusted=False), lambda: model.set_parameters(path)):
        with pytest.raises(ValueError, match=f"`{name}` of parameter 0"):
            use()


def test_a_file_sets_no_tensors_but_those_that_the_class_saves(tiny_file, tmp_path):
    path = tmp_path / "model.zip"
    path.write_bytes(tiny_file.read_bytes())
    variables = {"policy.action_net.weight": th.zeros(1)}
    changed_tensors(path, "pytorch_variables.pth", lambda saved: saved.update(variables))
    with pytest.raises(ModelFileError, match=r"policy\.action_net\.weight"):
        PPOPlus.load(path, device="cpu", trusted=False)


class WithTemperature(PPOPlus):
    """Stands for an algorithm with a tensor of its own, as SB3's SAC has one."""

    def _setup_model(self):
        super()._setup_model()
        self.temperature = th.zeros(1, requires_grad=True)

    def _excluded_save_params(self):
        return [*super()._excluded_save_params(), "temperature"]

    def _get_torch_save_params(self):
        return super()._get_torch_save_params()[0], ["temperature"]


def test_tensors_that_a_class_saves_by_name_travel(tmp_path):
    model = WithTemperature("MlpPolicy", "CartPole-v1", **TINY)
    model.temperature.data += 3
    model.save(tmp_path / "model.zip")
    loaded = WithTemperature.load(tmp_path / "model.zip", device="cpu", trusted=False)
    assert loaded.temperature.requires_grad and loaded.temperature.item() == 3


def test_a_file_that_would_unpack_to_many_times_its_size_is_refused(tiny_file, tmp_path):
    path = tmp_path / "model.zip"
    path.write_bytes(tiny_file.read_bytes())
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("more.pth", bytes(50_000_000))
    with pytest.raises(ModelFileError, match="would unpack to 50,"):
        PPOPlus.load(path, device="cpu")
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(50_000_000))
    path.write_bytes(tiny_file.read_bytes())
    rewritten(path, {"policy.pth": inner.getvalue()})
    with pytest.raises(ModelFileError, match="would unpack to 50,"):
        PPOPlus.load(path, device="cpu")


def test_nesting_without_end_is_refused(tiny_file, tmp_path):
    path = tmp_path / "model.zip"
    path.write_bytes(tiny_file.read_bytes())
    rewritten(path, {"data.txt": b""}, leave_out=["data"])
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("data", '{"seed": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(ModelFileError):
        PPOPlus.load(path, device="cpu", trusted=False)


def paths_in(value, path=()):
    """The places of all entries in JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from paths_in(item, (*path, key))


STRANGE = [None, True, -1, 1e308, "x", "", [], {}, {"a": 1}, {":type:": "tuple", "items": []}, [[1]]]
STRANGE += [{":type:": "class", "name": "torch.nn.modules.activation.Tanh"}, {":type:": "x"}]


@pytest.mark.parametrize("seed", range(4))
def test_settings_of_any_shape_load_or_are_an_error_of_value_or_type(seed, tiny_file, tmp_path):
    path, chance = tmp_path / "model.zip", random.Random(seed)
    with zipfile.ZipFile(tiny_file) as archive:
        original = json.loads(archive.read("data"))
    refused = 0
    for place in chance.sample(list(paths_in(original)), 15):
        *outer, last = place
        data = copy.deepcopy(original)
        inner = functools.reduce(lambda entry, key: entry[key], outer, data)
        inner[last] = chance.choice(STRANGE)
        path.write_bytes(tiny_file.read_bytes())
        rewritten(path, {"data": data})
        try:
            PPOPlus.load(path, device="cpu", trusted=False)
        except (ValueError, TypeError) as error:
            assert str(error)
            refused += 1
    assert refused > 3


# --- damage -----------------------------------------------------------------------------------------------------------


def headers_of(path):
    """Positions of all bytes that are no member's content."""
    size = path.stat().st_size
    inside = set()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            start = info.header_offset
            with open(path, "rb") as file:
                file.seek(start + 26)
                lengths = int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little")
            inside.update(range(start + 30 + lengths, start + 30 + lengths + info.compress_size))
    return [position for position in range(size) if position not in inside]


def test_a_file_cut_anywhere_is_refused_by_name(tiny_file, tmp_path):
    content, path = tiny_file.read_bytes(), tmp_path / "model.zip"
    for length in [round(k * (len(content) - 1) / 49) for k in range(50)]:
        path.write_bytes(content[:length])
        for load in (lambda: PPOPlus.load(path, device="cpu"), lambda: PPOPlus.load(path, trusted=False)):
            with pytest.raises(ModelFileError, match=r"model\.zip is damaged"):
                load()


def test_a_flipped_bit_anywhere_is_noticed_or_does_not_matter(tiny_file, tmp_path):
    """All bytes between the members, and 50 inside them; what is read from the damaged file is the whole one's."""
    content, path = bytearray(tiny_file.read_bytes()), tmp_path / "model.zip"
    path.write_bytes(content)
    whole, chance = read(path), random.Random(0)
    headers = headers_of(path)
    inside = chance.sample(sorted(set(range(len(content))) - set(headers)), 50)
    refused = 0
    for position in headers + inside:
        damaged = content.copy()
        damaged[position] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            assert read(path) == whole, position
        except ModelFileError as error:
            assert "model.zip is damaged" in str(error)
            refused += 1
        else:
            assert position not in inside
    assert refused > 50


@pytest.mark.parametrize("member", ["policy.pth", "policy.optimizer.pth", "reward_normalizer.pth"])
@pytest.mark.parametrize("how", ["load", "set_parameters"])
def test_a_changed_weight_is_noticed_though_torch_does_not(member, how, tiny_file, tmp_path):
    """Torch reads its zip inside ours without comparing sums, and jumps about, which ends zipfile's comparing."""
    path, content = tmp_path / "model.zip", bytearray(tiny_file.read_bytes())
    with zipfile.ZipFile(tiny_file) as archive:
        inner = archive.read(member)
        records = zipfile.ZipFile(io.BytesIO(inner))
        weights = next(name for name in records.namelist() if name.endswith("data/0"))
        value = records.read(weights)
    place = content.index(inner) + inner.index(value)
    content[place + len(value) - 1] ^= 1
    path.write_bytes(content)
    model = PPOPlus("MlpPolicy", "CartPole-v1", **TINY)
    before = parameters_of(model)
    with pytest.raises(ModelFileError, match=r"model\.zip is damaged.*CRC"):
        PPOPlus.load(path) if how == "load" else model.set_parameters(path)
    assert_equal(before, parameters_of(model))


@pytest.mark.parametrize("missing", ["data", "policy.pth", "policy.optimizer.pth", "reward_normalizer.pth"])
def test_a_missing_member_is_an_error(missing, tiny_file, tmp_path):
    path = tmp_path / "model.zip"
    path.write_bytes(tiny_file.read_bytes())
    rewritten(path, {}, leave_out=[missing])
    with pytest.raises(ValueError):
        PPOPlus.load(path, device="cpu", trusted=False)


def test_a_member_that_is_there_twice_is_refused(tiny_file, tmp_path):
    path = tmp_path / "model.zip"
    path.write_bytes(tiny_file.read_bytes())
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("data", archive.read("data"))
    with pytest.raises(ModelFileError, match="twice"):
        PPOPlus.load(path, device="cpu")


def test_a_file_of_a_later_format_says_so(tiny_file, tmp_path):
    path = tmp_path / "model.zip"
    path.write_bytes(tiny_file.read_bytes())
    rewritten(path, {"_sb3_pgplus_format": b"2"})
    with pytest.raises(ModelFileError, match="newer version of sb3_pgplus"):
        PPOPlus.load(path, device="cpu")


# --- SB3's files ------------------------------------------------------------------------------------------------------

ROLLOUT = {"n_steps": 32, "batch_size": 16}
STOCK = {
    "PPO": (PPO, PPOPlus, {**ROLLOUT, "n_epochs": 2, "clip_range": 0.1, "clip_range_vf": 0.3, "target_kl": 0.5}),
    "PPO with schedules": (PPO, PPOPlus, {**ROLLOUT, "learning_rate": LinearSchedule(1e-3, 0, 1)}),
    "PPO with gSDE": (PPO, PPOPlus, {**ROLLOUT, "use_sde": True}),
    "A2C": (A2C, A2CPlus, {"n_steps": 8}),
    "A2C with Adam": (A2C, A2CPlus, {"n_steps": 8, "use_rms_prop": False, "ent_coef": 0.01}),
    "A2C with another eps": (A2C, A2CPlus, {"n_steps": 8, "rms_prop_eps": 1e-3}),
    "A2C with TensorFlow's RMSprop": (
        A2C,
        A2CPlus,
        {"policy_kwargs": {"optimizer_class": RMSpropTFLike, "optimizer_kwargs": {"eps": 1e-5}}},
    ),
    "TRPO": (TRPO, TRPOPlus, {**ROLLOUT, "n_critic_updates": 3, "target_kl": 0.02}),
}


@pytest.mark.filterwarnings("ignore:learn.. continues", "ignore:Converting a tensor")
@pytest.mark.parametrize("via", ["load", "convert"])
@pytest.mark.parametrize("name", STOCK)
def test_a_model_that_sb3_saved_predicts_and_goes_on_as_in_sb3(name, via, tmp_path):
    stock, ours, settings = STOCK[name]
    stock("MlpPolicy", "Pendulum-v1", seed=0, device="cpu", **settings).learn(128).save(tmp_path / "sb3.zip")
    path = tmp_path / "sb3.zip"
    if via == "convert":
        path = tmp_path / "ours.zip"
        assert convert(tmp_path / "sb3.zip", path) == []
    states = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    continued = []
    for algorithm, file in ((stock, tmp_path / "sb3.zip"), (ours, path)):
        trust = {"trusted": False} if via == "convert" and algorithm is ours else {}
        model = algorithm.load(file, env=DummyVecEnv([lambda: gym.make("Pendulum-v1")]), device="cpu", **trust)
        predicted = model.predict(states, deterministic=True)[0]
        model.set_random_seed(3)
        model.learn(192, reset_num_timesteps=False)
        continued.append((predicted, parameters_of(model), model.num_timesteps, model._n_updates))
    (predicted, parameters, steps, updates), (predicted_here, parameters_here, steps_here, updates_here) = continued
    assert np.array_equal(predicted, predicted_here)
    assert (steps, updates) == (steps_here, updates_here)
    if stock is TRPO:  # its products with the Fisher matrix are rounded differently (docs/exactness.md)
        assert all(th.allclose(value, parameters_here[name], atol=1e-5) for name, value in parameters.items())
    else:
        assert_equal(parameters, parameters_here)


def test_a_file_of_sb3_with_dict_observations_goes_on(tmp_path):
    space = spaces.Dict({"a": UNIT, "b": spaces.Discrete(2)})
    PPO("MultiInputPolicy", Spaces(space, UNIT), n_steps=16, batch_size=16, device="cpu").save(tmp_path / "sb3.zip")
    loaded = PPOPlus.load(tmp_path / "sb3.zip", env=Spaces(space, UNIT), device="cpu")
    assert loaded.policy_class.__name__ == "MultiInputActorCriticPolicy"
    loaded.learn(16)


def test_a_file_of_sb3_shows_sb3s_settings_and_can_be_changed(tmp_path):
    PPO("MlpPolicy", "Pendulum-v1", n_steps=64, gamma=0.9, device="cpu").save(tmp_path / "sb3.zip")
    loaded = PPOPlus.load(tmp_path / "sb3.zip", device="cpu", ent_coef=0.01)
    expected = PPOPlus("MlpPolicy", "Pendulum-v1", **{**presets.SB3_PPO, "n_steps": 64, "gamma": 0.9, "ent_coef": 0.01})
    assert loaded.hyperparameters() == expected.hyperparameters()


@pytest.mark.parametrize(
    ("stock", "ours", "message"),
    [
        (A2C, PPOPlus, "a file of A2C.*load it with A2CPlus"),
        (PPO, TRPOPlus, "a file of PPO.*load it with PPOPlus"),
        (TRPO, A2CPlus, "a file of TRPO.*load it with TRPOPlus"),
        (DQN, PPOPlus, "neither of this package nor of SB3's"),
    ],
)
def test_another_algorithm_s_file_is_refused_by_name(stock, ours, message, tmp_path):
    stock("MlpPolicy", "CartPole-v1", device="cpu").save(tmp_path / "sb3.zip")
    with pytest.raises(ModelFileError, match=f"sb3.zip is {message}|sb3.zip is a file {message}"):
        ours.load(tmp_path / "sb3.zip", device="cpu")


def test_policies_that_need_more_than_observations_are_refused(tmp_path):
    RecurrentPPO("MlpLstmPolicy", "CartPole-v1", device="cpu").save(tmp_path / "recurrent.zip")
    with pytest.raises(ModelFileError, match=r"recurrent\.zip has the policy Recurrent.*not supported"):
        PPOPlus.load(tmp_path / "recurrent.zip", device="cpu")
    MaskablePPO("MlpPolicy", InvalidActionEnvDiscrete(), device="cpu").save(tmp_path / "maskable.zip")
    with pytest.raises(ModelFileError, match=r"maskable\.zip has the policy .*Maskable.*no ActorCriticPolicy"):
        PPOPlus.load(tmp_path / "maskable.zip", device="cpu")


def test_a_file_of_sb3_without_trust_is_refused_with_the_way_to_convert_it(tmp_path):
    PPO("MlpPolicy", "CartPole-v1", device="cpu").save(tmp_path / "sb3.zip")
    with pytest.raises(UntrustedModelError, match=r"policy_class.*observation_space.*sb3-pgplus convert"):
        PPOPlus.load(tmp_path / "sb3.zip", device="cpu", trusted=False)


# --- the command ------------------------------------------------------------------------------------------------------


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_converts_reports_what_stays_pickled_and_overwrites_nothing(tmp_path):
    source, target = tmp_path / "sb3.zip", tmp_path / "ours.zip"
    PPO("MlpPolicy", "CartPole-v1", learning_rate=rate, device="cpu").save(source)
    done = command("convert", source, target)
    assert done.exit_code == 0, done.output
    assert "learning_rate" in done.stderr and "trust" in done.stderr
    before = target.read_bytes()
    again = command("convert", source, target)
    assert again.exit_code == 2 and "not overwritten" in again.stderr
    assert target.read_bytes() == before
    source.write_bytes(b"no zip")
    damaged = command("convert", source, tmp_path / "other.zip")
    assert damaged.exit_code == 2 and "sb3.zip is damaged" in damaged.stderr
    DQN("MlpPolicy", "CartPole-v1", device="cpu", buffer_size=10).save(source)
    foreign = command("convert", source, tmp_path / "other.zip")
    assert foreign.exit_code == 2 and "no other can be converted" in " ".join(foreign.stderr.split())
    missing = command("convert", tmp_path / "nothing", tmp_path / "other.zip")
    said = "".join(missing.stderr.splitlines())
    assert missing.exit_code != 0 and "there is no model file" in said and f"{tmp_path / 'nothing'}'" in said
    assert not (tmp_path / "other.zip").exists()
