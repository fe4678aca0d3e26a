"""The rollout buffer, with SB3's as the oracle wherever both promise the same."""

import gc
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_pgplus import PPOPlus, TorchDictRolloutBuffer, TorchRolloutBuffer, presets
from sb3_pgplus.buffers import RolloutEnd
from sb3_pgplus.compiled_update import flat_batch

T, N = 5, 3
BOX = spaces.Box(-1e6, 1e6, (2,), np.float32)
SMALL = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "device": "cpu", "seed": 0}


class Counter(gym.Env):
    """Counts its steps in observations of any type and is cut by a time limit."""

    def __init__(self, space=None, length=3):
        self.observation_space = space or spaces.Box(0, 1000, (2,), np.int64)
        self.action_space = spaces.Discrete(2)
        self.length = length

    def _observation(self):
        return np.full(self.observation_space.shape, self.steps % 2, self.observation_space.dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observation(), {}

    def step(self, action):
        self.steps += 1
        return self._observation(), float(self.steps), False, self.steps >= self.length, {}


def numbered_steps(dict_observations=False):
    """T steps of N environments in which every field of a sample holds its number t·N + n."""
    for t in range(T):
        number = np.arange(N, dtype=np.float32) + t * N
        obs = np.stack([number, -number], axis=1)
        if dict_observations:
            obs = {"a": obs, "b": number[:, None].astype(np.uint8)}
        starts = np.zeros(N, dtype=np.float32)
        yield obs, number[:, None], number, starts, th.as_tensor(number)[:, None], th.as_tensor(-number)


def filled(buffer_class, space=BOX, **kwargs):
    buffer = buffer_class(T, space, spaces.Box(-1e6, 1e6, (1,), np.float32), device="cpu", n_envs=N, **kwargs)
    for step in numbered_steps(isinstance(space, spaces.Dict)):
        buffer.add(*step)
    buffer.compute_returns_and_advantage(th.zeros(N), np.zeros(N))
    return buffer


def random_rollout(buffer, seed=0, last_dones=(1.0, 0.0, 1.0)):
    rng = np.random.default_rng(seed)
    for _ in range(buffer.buffer_size):
        n = buffer.n_envs
        starts = (rng.random(n) < 0.3).astype(np.float32)
        value, log_prob = (th.as_tensor(rng.normal(size=n), dtype=th.float32) for _ in range(2))
        obs = rng.normal(size=(n, 2)).astype(np.float32)
        buffer.add(obs, rng.normal(size=(n, 1)), rng.normal(size=n), starts, value, log_prob)
    last_values = th.as_tensor(rng.normal(size=buffer.n_envs), dtype=th.float32)
    buffer.compute_returns_and_advantage(last_values, np.array(last_dones))
    return buffer


DICT = spaces.Dict({"a": BOX, "b": spaces.Box(0, 255, (1,), np.uint8)})


# --- storage ------------------------------------------------------------------------------------------------


def tensor_bytes():
    gc.collect()
    return sum(t.numel() * t.element_size() for t in gc.get_objects() if type(t) is th.Tensor)


def test_a_model_that_is_loaded_to_predict_allocates_no_rollout(tmp_path):
    image = spaces.Box(0, 255, (36, 36, 3), np.uint8)
    model = PPOPlus("CnnPolicy", Counter(image), **SMALL)
    model.save(tmp_path / "model")
    del model
    before = tensor_bytes()
    loaded = PPOPlus.load(tmp_path / "model", device="cpu", n_steps=2000)
    loaded.predict(np.zeros((3, 36, 36), np.uint8))
    rollout_bytes = 2000 * 36 * 36 * 3
    assert tensor_bytes() - before < rollout_bytes
    assert loaded.rollout_buffer._storage is None


@pytest.mark.parametrize("use", ["construct", "save", "predict"])
def test_nothing_is_allocated_before_the_first_step(use, tmp_path):
    model = PPOPlus("MlpPolicy", "CartPole-v1", **SMALL)
    if use == "save":
        model.save(tmp_path / "model")
    elif use == "predict":
        model.predict(np.zeros(4, np.float32))
    assert model.rollout_buffer._storage is None


def test_every_rollout_lies_in_the_same_storage():
    class Pointers(BaseCallback):
        seen: list

        def _on_training_start(self):
            self.seen = []

        def _on_step(self):
            return True

        def _on_rollout_end(self):
            buffer = self.model.rollout_buffer
            names = ("observations", "actions", "rewards", "values", "log_probs", "advantages", "returns")
            self.seen.append([buffer.tensor(name).data_ptr() for name in names])

    callback = Pointers()
    model = PPOPlus("MlpPolicy", "CartPole-v1", **SMALL).learn(24, callback)
    model.learn(8, callback_list := Pointers())
    assert len(callback.seen) == 3
    assert callback.seen[0] == callback.seen[1] == callback.seen[2] == callback_list.seen[0]


IMAGE = spaces.Box(0, 255, (4, 6, 5), np.uint8)


def image_rollout(space, *, memory_format=th.preserve_format, channels_last=True):
    """A rollout of random pictures, C × H × W as SB3 hands them over: transposed, and so with the channels last."""
    is_dict = isinstance(space, spaces.Dict)
    buffer_class = TorchDictRolloutBuffer if is_dict else TorchRolloutBuffer
    buffer = buffer_class(T, space, spaces.Discrete(2), device="cpu", n_envs=N)
    buffer.memory_format = memory_format
    rng = np.random.default_rng(0)
    for _ in range(T):
        pixels = rng.integers(0, 256, (N, 6, 5, 4), dtype=np.uint8).transpose(0, 3, 1, 2)
        pixels = pixels if channels_last else np.ascontiguousarray(pixels)
        obs = {"image": pixels, "b": pixels[:, :1, 0, 0]} if is_dict else pixels
        buffer.add(obs, np.zeros((N, 1)), np.zeros(N), np.zeros(N), th.zeros(N), th.zeros(N))
    buffer.compute_returns_and_advantage(th.zeros(N), np.zeros(N))
    return buffer


def picture_of(observations):
    return observations["image"] if isinstance(observations, dict) else observations


@pytest.mark.parametrize("space", [IMAGE, spaces.Dict({"image": IMAGE, "b": spaces.Box(0, 255, (1,), np.uint8)})])
def test_pictures_stay_in_memory_as_they_come_and_hold_the_same_pixels(space):
    """Strides of a C × H × W = 4 × 6 × 5 picture: channels last (1, 5·4, 4), the usual (6·5, 5, 1)."""
    kept, plain = image_rollout(space), image_rollout(space, memory_format=th.contiguous_format)
    usual = image_rollout(space, channels_last=False)
    moved = image_rollout(space, channels_last=False, memory_format=th.channels_last)
    strides = {}
    for name, buffer in {"kept": kept, "plain": plain, "usual": usual, "moved": moved}.items():
        np.random.seed(7)
        [whole] = list(buffer.get())
        np.random.seed(7)
        pieces = list(buffer.get(4))
        found = [whole, *pieces]
        strides[name] = {picture_of(samples.observations).stride()[1:] for samples in found}
        strides[name].add(picture_of(buffer.flat("observations")).stride()[1:])
        strides[name].add(picture_of(buffer.tensor("observations")).flatten(0, 1).stride()[1:])
        parts = th.cat([picture_of(samples.observations) for samples in pieces])
        assert th.equal(parts, picture_of(whole.observations))
        np.random.seed(7)
        [expected] = list(plain.get())
        assert th.equal(picture_of(whole.observations), picture_of(expected.observations))
        assert th.equal(picture_of(buffer.flat("observations")), picture_of(plain.flat("observations")))
        np.testing.assert_array_equal(picture_of(buffer.observations), picture_of(plain.observations))
    last, usual_strides = {(1, 20, 4)}, {(30, 5, 1)}
    assert strides == {"kept": last, "plain": usual_strides, "usual": usual_strides, "moved": last}


@pytest.mark.parametrize(
    "pixels",
    [
        np.broadcast_to(np.arange(5, dtype=np.uint8), (N, 4, 6, 5)),  # repeats its memory
        np.arange(N * 480, dtype=np.int64).astype(np.uint8).reshape(N, 4, 6, 20)[..., ::4],  # has gaps
        np.arange(N * 120, dtype=np.int64)
        .astype(np.uint8)
        .reshape(N, 6, 5, 4)[:, ::-1]
        .transpose(0, 3, 1, 2),  # mirrored
    ],
    ids=["broadcast", "gaps", "mirrored"],
)
def test_pictures_of_any_memory_are_stored_with_their_pixels(pixels):
    buffer = TorchRolloutBuffer(1, IMAGE, spaces.Discrete(2), device="cpu", n_envs=N)
    buffer.add(pixels, np.zeros((N, 1)), np.zeros(N), np.zeros(N), th.zeros(N), th.zeros(N))
    np.testing.assert_array_equal(buffer.observations[0], pixels)


class Noise(Counter):
    """Random pixels."""

    def _observation(self):
        return self.np_random.integers(0, 256, self.observation_space.shape, dtype=np.uint8)


def test_pictures_give_the_gradient_of_contiguous_ones_up_to_rounding():
    model = PPOPlus("CnnPolicy", Noise(spaces.Box(0, 255, (36, 36, 3), np.uint8)), **SMALL, compile=False).learn(8)
    assert model.rollout_buffer.tensor("observations").stride()[2:] == (1, 108, 3)
    [samples] = list(model.rollout_buffer.get())
    gradients = []
    for observations in (samples.observations, samples.observations.contiguous()):
        values, log_probs, _ = model.policy.evaluate_actions(observations, samples.actions.flatten())
        outputs = (values.square().mean() + log_probs.mean(), model.policy.parameters())
        gradients.append(th.cat([g.flatten() for g in th.autograd.grad(*outputs)]))
    kept, plain = gradients
    assert samples.observations.stride() != samples.observations.contiguous().stride()
    assert (kept - plain).norm() < 1e-5 * plain.norm()


class Mean(BaseFeaturesExtractor):
    """Features of the user's own."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 1)

    def forward(self, observations):
        return observations.view(len(observations), -1).mean(dim=1, keepdim=True)


def test_pictures_with_the_channels_first_are_moved_for_sb3s_features_and_left_alone_for_ones_own():
    image = spaces.Box(0, 255, (3, 36, 40), np.uint8)
    ours = {"policy_kwargs": {"features_extractor_class": Mean}}
    models = [PPOPlus("CnnPolicy", Noise(image), **SMALL, **kwargs).learn(8) for kwargs in ({}, ours)]
    strides = [next(model.rollout_buffer.get()).observations.stride()[1:] for model in models]
    assert strides == [(1, 120, 3), (1440, 40, 1)]


def test_sb3s_rounding_needs_sb3s_contiguous_minibatches():
    image = spaces.Box(0, 255, (36, 36, 3), np.uint8)
    model = PPOPlus("CnnPolicy", Counter(image), **{**presets.SB3_PPO, **SMALL}).learn(8)
    [samples] = list(model.rollout_buffer.get())
    assert samples.observations.is_contiguous()


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (np.float32, th.float32),
        (np.float64, th.float64),
        (np.float16, th.float16),
        (np.uint8, th.uint8),
        (np.int8, th.int8),
        (np.int64, th.int64),
        (np.bool_, th.bool),
        (np.uint16, th.int32),
        (np.uint32, th.int64),
    ],
)
def test_observations_keep_their_type_and_every_value(dtype, stored):
    info = None if np.issubdtype(dtype, np.bool_) else (np.finfo if np.issubdtype(dtype, np.floating) else np.iinfo)
    low, high = (0, 1) if info is None else (info(dtype).min, info(dtype).max)
    buffer = TorchRolloutBuffer(2, spaces.Box(0, 1, (2,)), spaces.Discrete(2), device="cpu", n_envs=2)
    rows = [np.array([[low, high], [high, 0]]).astype(dtype), np.array([[0, 1], [1, low]]).astype(dtype)]
    for row in rows:
        buffer.add(row, np.zeros((2, 1)), np.zeros(2), np.zeros(2), th.zeros(2), th.zeros(2))
    assert buffer.tensor("observations").dtype == stored
    assert np.array_equal(buffer.observations, np.stack(rows))
    batch = next(buffer.get())
    assert batch.observations.dtype == stored
    assert sorted(map(tuple, batch.observations.tolist())) == sorted(map(tuple, np.concatenate(rows).tolist()))


def test_uint64_observations_beyond_int64_are_not_turned_negative():
    buffer = TorchRolloutBuffer(1, spaces.Box(0, 1, (1,)), spaces.Discrete(2), device="cpu")
    large = np.array([[np.iinfo(np.uint64).max]], dtype=np.uint64)
    try:
        buffer.add(large, np.zeros((1, 1)), np.zeros(1), np.zeros(1), th.zeros(1), th.zeros(1))
    except (TypeError, ValueError):
        return  # refusing is as good
    assert float(buffer.tensor("observations").float()) > 0


def normalized_integers():
    return VecNormalize(DummyVecEnv([lambda: Counter(length=7)]))


def test_integer_observations_that_vecnormalize_made_floats_are_not_cut_to_integers():
    env = normalized_integers()
    model = PPOPlus("MlpPolicy", env, **{**presets.SB3_PPO, **SMALL}).learn(16)
    observations = model.rollout_buffer.observations
    assert observations.dtype == np.float32
    assert np.any(observations != np.round(observations))
    # What is learned from is what was acted on.
    batch = next(model.rollout_buffer.get())
    assert th.any(batch.observations != batch.observations.round())


class ReadsRewardsEarly(BaseCallback):
    def _on_step(self):
        return True

    def _on_training_start(self):
        assert self.model.rollout_buffer.rewards.shape == (8, 1)


def test_reading_the_buffer_before_the_first_step_does_not_fix_the_type_of_observations():
    model = PPOPlus("MlpPolicy", normalized_integers(), **{**presets.SB3_PPO, **SMALL})
    model.learn(8, ReadsRewardsEarly())
    assert model.rollout_buffer.observations.dtype == np.float32


def test_a_later_observation_that_the_stored_type_cannot_hold_is_refused():
    buffer = TorchRolloutBuffer(2, spaces.Box(0, 1, (1,)), spaces.Discrete(2), device="cpu")
    rest = (np.zeros((1, 1)), np.zeros(1), np.zeros(1), th.zeros(1), th.zeros(1))
    buffer.add(np.ones((1, 1), np.int64), *rest)
    with pytest.raises(TypeError, match="int64 at first and now as .*float32"):
        buffer.add(np.full((1, 1), 0.5, np.float32), *rest)


def test_a_later_wider_integer_is_refused_or_kept_but_never_wrapped():
    buffer = TorchRolloutBuffer(2, spaces.Box(0, 1, (1,)), spaces.Discrete(2), device="cpu")
    rest = (np.zeros((1, 1)), np.zeros(1), np.zeros(1), th.zeros(1), th.zeros(1))
    buffer.add(np.ones((1, 1), np.uint8), *rest)
    try:
        buffer.add(np.full((1, 1), 300, np.int64), *rest)
    except TypeError:
        return
    assert buffer.observations[1].item() == 300


def test_dict_observations_keep_the_type_of_each_key():
    buffer = filled(TorchDictRolloutBuffer, DICT)
    assert buffer.tensor("observations")["a"].dtype == th.float32
    assert buffer.tensor("observations")["b"].dtype == th.uint8
    assert buffer.observations["a"].shape == (T, N, 2)
    assert next(buffer.get()).observations["b"].dtype == th.uint8


@pytest.mark.parametrize(
    ("space", "dtype"),
    [
        (spaces.Discrete(4), th.int64),
        (spaces.MultiDiscrete([2, 3]), th.int64),
        (spaces.MultiBinary(3), th.float32),
        (spaces.Box(-1, 1, (2, 2), np.float64), th.float32),
    ],
)
def test_actions_of_every_space_are_stored_flat_and_exact(space, dtype):
    space.seed(0)
    buffer = TorchRolloutBuffer(2, BOX, space, device="cpu", n_envs=2)
    given = [np.stack([space.sample(), space.sample()]) for _ in range(2)]
    for action in given:
        buffer.add(np.zeros((2, 2)), action, np.zeros(2), np.zeros(2), th.zeros(2), th.zeros(2))
    assert buffer.tensor("actions").dtype == dtype
    assert np.array_equal(buffer.actions, np.stack(given).reshape(2, 2, -1).astype(buffer.actions.dtype))


def test_the_buffer_keeps_values_of_its_own_when_the_environment_reuses_its_arrays():
    buffer = TorchRolloutBuffer(2, spaces.Box(-9, 9, (1,)), spaces.Discrete(2), device="cpu")
    obs, action, reward, start = np.ones((1, 1), np.float32), np.ones((1, 1)), np.ones(1), np.ones(1)
    value, log_prob = th.ones(1), th.ones(1)
    buffer.add(obs, action, reward, start, value, log_prob)
    for array in (obs, action, reward, start, value, log_prob):
        array[:] = 7
    for name in ("observations", "actions", "rewards", "episode_starts", "values", "log_probs"):
        assert getattr(buffer, name)[0].item() == 1, name


@pytest.mark.parametrize("what", ["obs", "action", "reward", "episode_start", "dones", "assigned"])
@pytest.mark.parametrize("kind", ["broadcast", "flag"])
def test_read_only_arrays_are_taken_without_a_warning(what, kind):
    def frozen(shape):
        if kind == "broadcast":
            return np.broadcast_to(np.float32(1), shape)
        array = np.ones(shape, np.float32)
        array.setflags(write=False)
        return array

    buffer = TorchRolloutBuffer(1, BOX, spaces.Discrete(2), device="cpu", n_envs=N)
    shapes = {"obs": (N, 2), "action": (N, 1), "reward": (N,), "episode_start": (N,)}
    arguments = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    if what in shapes:
        arguments[what] = frozen(shapes[what])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # torch says it once per process unless asked to say it always.
        th.set_warn_always(True)
        try:
            buffer.add(**arguments, value=th.ones(N), log_prob=th.ones(N))
            buffer.compute_returns_and_advantage(th.ones(N), frozen((N,)) if what == "dones" else np.ones(N))
            if what == "assigned":
                buffer.rewards = frozen((1, N))
        finally:
            th.set_warn_always(False)
    assert buffer.rewards.tolist() == [[1.0] * N]


# --- reading and assigning as NumPy -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["actions", "rewards", "values", "log_probs", "advantages", "returns"])
def test_fields_read_as_numpy_and_can_be_assigned_in_place_and_by_item(name):
    buffer = filled(TorchRolloutBuffer)
    before = getattr(buffer, name).copy()
    assert isinstance(before, np.ndarray)
    assert before.shape[:2] == (T, N)
    setattr(buffer, name, getattr(buffer, name) + 1)
    exec(f"buffer.{name} += 1", {"buffer": buffer})
    getattr(buffer, name)[0, 0] = 42
    expected = before + 2
    expected[0, 0] = 42
    assert np.array_equal(getattr(buffer, name), expected)
    field = {"values": "old_values", "log_probs": "old_log_prob"}.get(name, name)
    if name != "rewards":
        handed_out = np.sort(getattr(next(buffer.get()), field).numpy().ravel())
        assert np.array_equal(handed_out, np.sort(expected.ravel()))


def test_dict_observations_can_be_assigned():
    buffer = filled(TorchDictRolloutBuffer, DICT)
    buffer.observations = {key: array * 0 for key, array in buffer.observations.items()}
    assert all(np.all(array == 0) for array in buffer.observations.values())


def test_size_and_full_follow_the_steps_added():
    buffer = TorchRolloutBuffer(T, BOX, spaces.Box(-9, 9, (1,)), device="cpu", n_envs=N)
    for count, step in enumerate(numbered_steps()):
        assert (buffer.size(), buffer.full) == (count, False)
        buffer.add(*step)
    assert (buffer.size(), buffer.full) == (T, True)
    buffer.reset()
    assert (buffer.size(), buffer.full) == (0, False)


def test_minibatches_of_an_incomplete_rollout_are_refused():
    buffer = TorchRolloutBuffer(T, BOX, spaces.Box(-9, 9, (1,)), device="cpu", n_envs=N)
    buffer.add(*next(numbered_steps()))
    with pytest.raises(AssertionError):
        next(buffer.get(2))


# --- minibatches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_dict", [False, True])
def test_the_whole_rollout_is_the_batch_of_everything_in_the_order_of_storage_without_a_copy(is_dict):
    buffer = filled(TorchDictRolloutBuffer, DICT) if is_dict else filled(TorchRolloutBuffer)
    buffer.extras = (th.as_tensor(buffer.values.T.ravel().copy()),)  # environment-major, as `flat` gives
    whole, (batch,) = buffer.whole(), buffer.get()
    assert th.equal(whole.old_values, buffer.tensor("values").flatten())
    order = batch.old_values.argsort()  # the values number the samples
    by_storage = whole.old_values.argsort()
    for one, other in zip(flat_batch(whole), flat_batch(batch), strict=True):
        assert th.equal(one[by_storage], other[order])
    assert whole.advantages.data_ptr() == buffer.tensor("advantages").data_ptr()


@pytest.mark.parametrize("batch_size", [1, 4, T * N, 100, None])
@pytest.mark.parametrize("is_dict", [False, True])
def test_an_epoch_hands_out_each_sample_once_with_all_its_fields(batch_size, is_dict):
    buffer = filled(TorchDictRolloutBuffer, DICT) if is_dict else filled(TorchRolloutBuffer)
    advantages, returns = buffer.advantages.ravel(), buffer.returns.ravel()
    buffer.extras = (th.as_tensor(np.arange(T * N).reshape(T, N).T.ravel().copy()),)
    seen = []
    sizes = []
    for batch in buffer.get(batch_size):
        number = batch.old_values.long().numpy()
        first = batch.observations["a"] if is_dict else batch.observations
        assert th.equal(first, th.stack([batch.old_values, -batch.old_values], dim=1))
        if is_dict:
            assert th.equal(batch.observations["b"].flatten(), th.as_tensor(number).to(th.uint8))
        assert th.equal(batch.actions.flatten(), batch.old_values)
        assert th.equal(batch.old_log_prob, -batch.old_values)
        assert np.array_equal(batch.advantages.numpy(), advantages[number])
        assert np.array_equal(batch.returns.numpy(), returns[number])
        assert np.array_equal(batch.old_distribution[0].numpy(), number)
        seen += number.tolist()
        sizes.append(len(number))
    assert sorted(seen) == list(range(T * N))
    size = min(batch_size or T * N, T * N)
    assert sizes == [size] * (T * N // size) + ([T * N % size] if T * N % size else [])


def test_epochs_are_shuffled_and_differ():
    buffer = filled(TorchRolloutBuffer)
    np.random.seed(0)
    orders = [tuple(next(buffer.get()).old_values.tolist()) for _ in range(3)]
    assert len({*orders, tuple(range(T * N))}) == 4


@pytest.mark.parametrize(
    ("ours", "theirs", "space"),
    [(TorchRolloutBuffer, RolloutBuffer, BOX), (TorchDictRolloutBuffer, DictRolloutBuffer, DICT)],
)
@pytest.mark.parametrize("batch_size", [4, None])
def test_the_same_numpy_seed_gives_sb3s_minibatches_in_every_epoch(ours, theirs, space, batch_size):
    epochs = []
    for buffer_class in (ours, theirs):
        buffer = filled(buffer_class, space)
        np.random.seed(7)
        epochs.append([batch for _ in range(2) for batch in buffer.get(batch_size)])
    assert len(epochs[0]) == len(epochs[1])
    for mine, sb3 in zip(*epochs, strict=True):
        for field in sb3._fields:
            got, wanted = getattr(mine, field), getattr(sb3, field)
            if isinstance(wanted, dict):
                assert all(th.equal(got[key], wanted[key]) for key in wanted)
            elif field in ("advantages", "returns"):
                assert th.allclose(got, wanted, rtol=1e-5, atol=1e-4)
            else:
                assert th.equal(got, wanted), field


# --- advantages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("last_dones", [(0, 0, 0), (1, 0, 1), (True, True, True)])
def test_compute_returns_and_advantage_agrees_with_sb3s(gae_lambda, last_dones):
    ours, theirs = (
        random_rollout(cls(17, BOX, spaces.Box(-9, 9, (1,)), "cpu", gae_lambda, 0.97, N), last_dones=last_dones)
        for cls in (TorchRolloutBuffer, RolloutBuffer)
    )
    np.testing.assert_allclose(ours.advantages, theirs.advantages, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.returns, theirs.returns, rtol=1e-5, atol=1e-5)


def test_a_truncated_step_keeps_its_reward_and_bootstraps_from_its_final_observation():
    buffer = TorchRolloutBuffer(3, BOX, spaces.Discrete(2), device="cpu", gae_lambda=1.0, gamma=0.5, n_envs=2)
    # Environment 0 is cut by a time limit at t = 1, environment 1 terminates there.
    for t in range(3):
        starts = np.full(2, float(t == 2))
        values = th.tensor([10.0 + t, 20.0 + t])
        buffer.add(np.zeros((2, 2)), np.zeros((2, 1)), np.ones(2), starts, values, th.zeros(2))
    end = RolloutEnd()
    end.add_truncation(1, 0, th.zeros(1, 2))
    buffer.set_bootstraps(th.tensor([7.0, 8.0]), np.array([False, True]), end, th.tensor([99.0]))
    assert buffer.rewards.tolist() == [[1, 1], [1, 1], [1, 1]]
    assert buffer.next_values.tolist() == [[11, 21], [99, 0], [7, 0]]
    assert buffer.dones.tolist() == [[0, 0], [1, 1], [0, 1]]


class Values(BaseCallback):
    """Records what SB3's convention would have in the buffer, from the environment's own infos."""

    def _on_training_start(self):
        self.rewards, self.bootstraps = [], {}

    def _on_step(self):
        assert self.locals["rewards"] is not None
        step = len(self.rewards)
        self.rewards.append(self.locals["rewards"].copy())
        for env, info in enumerate(self.locals["infos"]):
            if info.get("TimeLimit.truncated"):
                final, _ = self.model.policy.obs_to_tensor(info["terminal_observation"])
                with th.no_grad():
                    self.bootstraps[step, env] = self.model.policy.predict_values(final).item()
        return True

    def _on_rollout_end(self):
        buffer = self.model.rollout_buffer
        self.stored, self.next_values = buffer.rewards.copy(), getattr(buffer, "next_values", np.zeros(0)).copy()


def test_collected_truncations_lie_beside_raw_rewards():
    env = make_vec_env(Counter, 2, env_kwargs={"space": spaces.Box(-1, 1, (2,)), "length": 3})
    model = PPOPlus("MlpPolicy", env, **{**presets.SB3_PPO, **SMALL})
    callback = Values()
    model.learn(16, callback)
    assert set(callback.bootstraps) == {(t, n) for t in (2, 5) for n in (0, 1)}
    assert np.array_equal(callback.stored, np.stack(callback.rewards))
    for (step, index), value in callback.bootstraps.items():
        assert callback.next_values[step, index] == pytest.approx(value, rel=1e-6)


# --- SB3's and other classes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [RolloutBuffer, "stable_baselines3.common.buffers.RolloutBuffer", "sb3_pgplus.TorchRolloutBuffer"],
)
def test_buffer_classes_are_taken_as_class_and_as_dotted_name(given, tmp_path):
    model = PPOPlus("MlpPolicy", "CartPole-v1", rollout_buffer_class=given, **SMALL).learn(16)
    name = given if isinstance(given, str) else given.__name__
    assert type(model.rollout_buffer).__name__ == name.rsplit(".", 1)[-1]
    model.save(tmp_path / "model")
    loaded = PPOPlus.load(tmp_path / "model", env=gym.make("CartPole-v1"), device="cpu")
    assert type(loaded.rollout_buffer) is type(model.rollout_buffer)
    loaded.learn(8)


class Pair(Counter):
    def __init__(self):
        super().__init__()
        self.observation_space = spaces.Dict({"a": spaces.Box(-1, 9, (2,)), "b": spaces.Discrete(9)})

    def _observation(self):
        return {"a": np.full(2, self.steps, np.float32), "b": self.steps}


@pytest.mark.parametrize("preset", [presets.SB3_PPO, {}], ids=["SB3_PPO", "defaults"])
def test_sb3s_dict_buffer_is_taken(preset):
    models = [
        PPOPlus("MultiInputPolicy", Pair(), **{**preset, **SMALL}, rollout_buffer_class=cls).learn(24)
        for cls in (DictRolloutBuffer, TorchDictRolloutBuffer, None)
    ]
    first = models[0].policy.state_dict()
    for model in models[1:]:
        assert all(th.allclose(first[key], value, atol=1e-6) for key, value in model.policy.state_dict().items())


def test_sb3s_buffer_and_ours_train_alike_with_all_tricks_on():
    def train(buffer_class):
        env = make_vec_env(Counter, 2, env_kwargs={"space": spaces.Box(-1, 1, (2,)), "length": 3})
        # SB3's buffers cannot recompute advantages, so "auto" differs between the two.
        settings = {**SMALL, "n_epochs": 2, "recompute_advantages": False}
        model = PPOPlus("MlpPolicy", env, rollout_buffer_class=buffer_class, **settings)
        return model.learn(64).policy.state_dict()

    ours, theirs = train(None), train(RolloutBuffer)
    for key, value in theirs.items():
        assert th.allclose(ours[key], value, atol=1e-5), key


@pytest.mark.parametrize(
    "option",
    [
        {"normalize_value_targets": True},
        {"recompute_advantages": True},
        {"kl_coef": 0.1},
        {"advantage_estimator": "td"},
    ],
)
def test_what_sb3s_buffer_cannot_serve_is_refused_by_name(option):
    (name,) = option
    with pytest.raises(ValueError, match=rf"`{name}`=.* needs sb3_pgplus.TorchRolloutBuffer.*RolloutBuffer"):
        PPOPlus("MlpPolicy", "CartPole-v1", rollout_buffer_class=RolloutBuffer, **option, **SMALL)


@pytest.mark.parametrize("path", ["no.such.Buffer", "sb3_pgplus.presets", "numpy.pi"])
def test_a_dotted_name_that_is_no_class_is_refused(path):
    with pytest.raises(ValueError, match=f"`rollout_buffer_class` is '{path}', which names no importable class"):
        PPOPlus("MlpPolicy", "CartPole-v1", rollout_buffer_class=path, **SMALL)


def test_a_subclass_of_our_buffer_may_use_every_option():
    class Mine(TorchRolloutBuffer):
        pass

    model = PPOPlus(
        "MlpPolicy", "CartPole-v1", rollout_buffer_class=Mine, advantage_estimator="td", kl_coef=0.1, **SMALL
    ).learn(8)
    assert type(model.rollout_buffer) is Mine


@pytest.mark.filterwarnings("error")
def test_advantages_of_enormous_rewards_are_as_silent_as_torch():
    buffer = filled(TorchRolloutBuffer)
    buffer.rewards = np.full((T, N), 3e38, dtype=np.float32)
    buffer.compute_returns_and_advantage(th.full((N,), 3e38), np.zeros(N))
    assert not np.isfinite(buffer.advantages).all()


def test_last_values_of_another_precision_are_rounded():
    buffer = filled(TorchRolloutBuffer)
    buffer.compute_returns_and_advantage(th.full((N,), 1.5, dtype=th.bfloat16), np.zeros(N))
    assert (buffer.next_values[-1] == 1.5).all()
