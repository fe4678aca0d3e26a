"""All of SB3's surface: policies and spaces, custom policies, callbacks, logging, parameters, construction."""

import copy
import inspect
import io
import os
import subprocess
import sys
import warnings

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize
from torch import nn

from sb3_pgplus import PPOPlus, presets
from sb3_pgplus.hparams import PPOHparams
from sb3_pgplus.policies import NormalizesObservations, observation_normalizer

SMALL = {"n_steps": 8, "batch_size": 8, "n_epochs": 2, "device": "cpu", "seed": 0}

IMAGE = spaces.Box(0, 255, (36, 36, 3), np.uint8)
OBSERVATIONS = {
    "box": spaces.Box(-5, 5, (3,)),
    "box 2d": spaces.Box(-5, 5, (2, 3)),
    "box float64": spaces.Box(-5, 5, (3,), np.float64),
    "box int64": spaces.Box(-5, 5, (3,), np.int64),
    "box uint16": spaces.Box(0, 60000, (3,), np.uint16),
    "discrete": spaces.Discrete(4),
    "multidiscrete": spaces.MultiDiscrete([2, 4]),
    "multibinary": spaces.MultiBinary(3),
    "image": IMAGE,
    "image channel first": spaces.Box(0, 255, (1, 36, 36), np.uint8),
    "dict": spaces.Dict(
        {"vec-tor": spaces.Box(-5, 5, (3,)), "number": spaces.Discrete(3), "img": IMAGE, "bits": spaces.MultiBinary(2)}
    ),
}
ACTIONS = {
    "box": spaces.Box(-2, 2, (2,)),
    "box float64": spaces.Box(-2, 2, (2,), np.float64),
    "discrete": spaces.Discrete(3),
    "multidiscrete": spaces.MultiDiscrete([2, 3]),
    "multibinary": spaces.MultiBinary(3),
}


class Anything(gym.Env):
    """Samples observations, rewards the parity of its step, alternately ends and is cut after five steps."""

    def __init__(self, observation_space=OBSERVATIONS["box"], action_space=ACTIONS["box"], scale=1.0):
        self.observation_space, self.action_space = observation_space, action_space
        self.steps = self.episodes = 0
        self.scale = scale

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.steps = 0
        self.episodes += 1
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        done = self.steps >= 5
        truncated = done and self.episodes % 2 == 0
        return self.observation_space.sample(), float(self.steps % 2), done and not truncated, truncated, {}


def policy_for(space):
    if isinstance(space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if len(space.shape or ()) == 3 else "MlpPolicy"


def pair(space, action_space=ACTIONS["discrete"]):
    envs = make_vec_env(lambda: Anything(space, action_space), 2)
    envs.seed(0)
    return envs


def finite(policy):
    return all(bool(p.isfinite().all()) for p in policy.parameters())


def snapshot(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


# --- spaces -------------------------------------------------------------------------------------------------


def check_training(policy, env, **kwargs):
    model = PPOPlus(policy, env, **{**SMALL, **kwargs})
    before = [p.clone() for p in model.policy.parameters()]
    model.learn(32)  # two rollouts
    assert any(not th.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
    assert finite(model.policy)
    raw = model.get_env().observation_space.sample()
    action, _ = model.predict(raw, deterministic=True)
    assert model.action_space.contains(np.asarray(action, model.action_space.dtype)), action
    many, _ = model.predict(model.get_env().reset())
    assert len(many) == 2
    return model


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_the_defaults_train_on_every_observation_space_and_predict_from_raw_observations(name):
    space = OBSERVATIONS[name]
    model = check_training(policy_for(space), pair(space), n_epochs=1)
    floats = name in ("box", "box 2d", "box float64", "dict")
    assert isinstance(model.policy, NormalizesObservations) == floats


@pytest.mark.parametrize("name", ACTIONS)
@pytest.mark.parametrize("extra", [{}, {"kl_coef": 0.1, "recompute_advantages": True, "critic_learning_rate": 1e-3}])
def test_the_defaults_train_on_every_action_space(name, extra):
    check_training("MlpPolicy", pair(OBSERVATIONS["box"], ACTIONS[name]), **extra)


def test_mlp_policy_takes_images_flattened():
    check_training("MlpPolicy", pair(spaces.Box(0, 255, (4, 4, 3), np.uint8)))


@pytest.mark.parametrize("name", ["box", "dict"])
@pytest.mark.parametrize("action", ["box", "multidiscrete"])
def test_dict_and_vector_observations_with_other_actions(name, action):
    space = OBSERVATIONS[name]
    check_training(policy_for(space), pair(space, ACTIONS[action]), n_epochs=1)


def test_integer_boxes_are_normalised_on_request():
    space = OBSERVATIONS["box uint16"]
    model = check_training("MlpPolicy", pair(space), normalize_observations=True)
    features = model.policy.extract_features(th.as_tensor(space.sample()[None].astype(np.int32)))
    assert float(features.abs().max()) < 10


def test_normalised_keys_of_a_dict_are_its_float_vectors():
    model = check_training("MultiInputPolicy", pair(OBSERVATIONS["dict"]), n_epochs=1)
    assert observation_normalizer(model.policy).keys == ["vec-tor"]


@pytest.mark.parametrize("name", ["box", "dict"])
@pytest.mark.parametrize("options", [{}, {"sde_sample_freq": 4}, {"kl_coef": 0.1}, {"recompute_advantages": True}])
def test_gsde_trains(name, options):
    env = pair(OBSERVATIONS[name], ACTIONS["box"])
    check_training(policy_for(OBSERVATIONS[name]), env, use_sde=True, n_epochs=1, **options)


def test_gsde_with_squashed_actions_trains_and_stays_inside_the_action_space():
    check_training(
        "MlpPolicy", pair(OBSERVATIONS["box"], ACTIONS["box"]), use_sde=True, policy_kwargs={"squash_output": True}
    )


def test_a_vecnormalize_outside_still_works_and_is_left_to_do_it():
    env = VecNormalize(pair(OBSERVATIONS["box"]))
    with pytest.warns(UserWarning, match="VecNormalize normalises"):
        model = PPOPlus("MlpPolicy", env, **SMALL)
    model.learn(32)
    assert observation_normalizer(model.policy) is None
    assert not model._normalizes_rewards


def test_frame_stacked_images_train():
    check_training("CnnPolicy", VecFrameStack(pair(spaces.Box(0, 255, (36, 36, 1), np.uint8)), 2), n_epochs=1)


@pytest.mark.parametrize("estimator", ["gae", "td", "n_step", "monte_carlo"])
def test_every_estimator_trains(estimator):
    check_training("MlpPolicy", pair(OBSERVATIONS["box"]), advantage_estimator=estimator, normalize_value_targets=True)


@pytest.mark.parametrize("preset", ["SB3_PPO", "LECTURE", "PPO_MINIMAL", "PPO_NO_CLIP"])
def test_every_preset_trains(preset):
    check_training("MlpPolicy", pair(OBSERVATIONS["box"]), **{**getattr(presets, preset), **SMALL})


# --- warnings name the user's line --------------------------------------------------------------------------


def test_the_ragged_minibatch_warning_names_the_users_line():
    with pytest.warns(UserWarning, match="truncated mini-batch of size 3") as caught:
        PPOPlus("MlpPolicy", "CartPole-v1", **{**SMALL, "batch_size": 5})
    assert {os.path.basename(w.filename) for w in caught} == {os.path.basename(__file__)}


def test_the_vecnormalize_notice_names_the_users_line_and_is_given_once():
    env = VecNormalize(pair(OBSERVATIONS["box"]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PPOPlus("MlpPolicy", env, **SMALL)
        model.learn(32)
    notices = [w for w in caught if "VecNormalize" in str(w.message)]
    assert len(notices) == 1
    assert "observations" in str(notices[0].message)
    assert "rewards" in str(notices[0].message)
    assert {os.path.basename(w.filename) for w in notices} == {os.path.basename(__file__)}


def test_loading_a_model_that_leaves_normalisation_outside_says_nothing(tmp_path):
    env = VecNormalize(pair(OBSERVATIONS["box"]))
    with pytest.warns(UserWarning, match="VecNormalize"):
        PPOPlus("MlpPolicy", env, **SMALL).save(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PPOPlus.load(tmp_path / "model", env=env, device="cpu")


# --- custom policies normalise exactly once -----------------------------------------------------------------


class OverridesForward(ActorCriticPolicy):
    def forward(self, obs, deterministic=False):
        features = self.extract_features(obs)
        latent_pi, latent_vf = self.mlp_extractor(features)
        distribution = self._get_action_dist_from_latent(latent_pi)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, self.value_net(latent_vf), distribution.log_prob(actions)


class OverridesEvaluateActions(ActorCriticPolicy):
    def evaluate_actions(self, obs, actions):
        distribution = self.get_distribution(obs)
        return self.predict_values(obs), distribution.log_prob(actions), distribution.entropy()


class OverridesPredictValues(ActorCriticPolicy):
    def predict_values(self, obs):
        features = super().extract_features(obs, self.vf_features_extractor)
        return self.value_net(self.mlp_extractor.forward_critic(features))


class OverridesExtractFeatures(ActorCriticPolicy):
    def extract_features(self, obs, features_extractor=None):
        return 2 * super().extract_features(obs, features_extractor)


class ReadsObservationsDirectly(ActorCriticPolicy):
    def get_distribution(self, obs):
        return self._get_action_dist_from_latent(self.mlp_extractor.forward_actor(obs.float()))


class SeparateExtractors(ActorCriticPolicy):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "share_features_extractor": False})


POLICIES = [
    ActorCriticPolicy,
    OverridesForward,
    OverridesEvaluateActions,
    OverridesPredictValues,
    OverridesExtractFeatures,
    ReadsObservationsDirectly,
    SeparateExtractors,
]


def wide_env():
    envs = DummyVecEnv([lambda: Anything(spaces.Box(-500, 700, (3,))) for _ in range(2)])
    envs.seed(0)
    return envs


@pytest.mark.parametrize("policy_class", POLICIES)
def test_a_custom_policy_gets_normalised_observations_exactly_once_in_every_method(policy_class):
    model = PPOPlus(policy_class, wide_env(), **SMALL).learn(32)
    policy = model.policy
    assert isinstance(policy, policy_class)

    # The same policy without normalisation, fed by hand.
    plain = policy_class(model.observation_space, model.action_space, lambda _: 0.0)
    plain.load_state_dict({k: v for k, v in policy.state_dict().items() if not k.startswith("observation_normalizer")})
    plain.set_training_mode(False)
    policy.set_training_mode(False)
    moments = observation_normalizer(policy).moments[0]
    rng = np.random.default_rng(0)
    raw = th.as_tensor(rng.uniform(-500, 700, (6, 3)), dtype=th.float32)
    by_hand = ((raw - moments.mean) / th.sqrt(moments.var + 1e-8)).clamp(-10, 10).float()
    assert not th.allclose(raw, by_hand)

    with th.no_grad():
        for deterministic in (True, False):
            th.manual_seed(1)
            got = policy(raw, deterministic=deterministic)
            th.manual_seed(1)
            wanted = plain(by_hand, deterministic=deterministic)
            assert all(th.equal(a, b) for a, b in zip(got, wanted, strict=True))
        actions = wanted[0]
        got, wanted = policy.evaluate_actions(raw, actions), plain.evaluate_actions(by_hand, actions)
        assert all(th.equal(a, b) for a, b in zip(got, wanted, strict=True))
        assert th.equal(policy.predict_values(raw), plain.predict_values(by_hand))
        assert th.equal(policy.get_distribution(raw).mode(), plain.get_distribution(by_hand).mode())
    action, _ = model.predict(raw.numpy(), deterministic=True)
    assert np.array_equal(action, plain.predict(by_hand.numpy(), deterministic=True)[0])


class LooksAtItsFeatures(ActorCriticPolicy):
    """Runs its feature extractor while it is built, to learn a size."""

    def _build(self, lr_schedule):
        sample = th.zeros(1, *self.observation_space.shape)
        assert self.extract_features(sample, self.features_extractor).shape == (1, self.features_dim)
        super()._build(lr_schedule)


def test_a_custom_policy_may_run_itself_while_it_is_built():
    PPOPlus(LooksAtItsFeatures, "CartPole-v1", **{**SMALL, **presets.SB3_PPO, "n_steps": 64})
    PPOPlus(LooksAtItsFeatures, "CartPole-v1", **SMALL)


def test_an_error_inside_a_policy_does_not_switch_normalisation_off():
    model = PPOPlus("MlpPolicy", wide_env(), **SMALL).learn(16)
    obs = th.full((1, 3), 300.0)
    before = model.policy.predict_values(obs)
    with pytest.raises(RuntimeError):
        model.policy.predict_values(th.zeros(1, 3, 2, 2))
    assert th.equal(model.policy.predict_values(obs), before)


class Net(nn.Module):
    def __init__(self, features_dim):
        super().__init__()
        self.latent_dim_pi = self.latent_dim_vf = 8
        self.trunk = nn.Sequential(nn.Linear(features_dim, 8), nn.Tanh())

    def forward(self, features):
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features):
        return self.trunk(features)

    def forward_critic(self, features):
        return self.trunk(features)


class SharedTrunk(ActorCriticPolicy):
    def _build_mlp_extractor(self):
        self.mlp_extractor = Net(self.features_dim)


def test_a_custom_network_with_a_shared_trunk_trains_with_every_critic_option():
    model = check_training(
        SharedTrunk,
        pair(OBSERVATIONS["box"]),
        critic_learning_rate=1e-3,
        n_critic_epochs=4,
        normalize_value_targets=True,
    )
    critic_group = model.policy.optimizer.param_groups[1]["params"]
    assert {id(p) for p in critic_group} == {id(p) for p in model.policy.value_net.parameters()}


def test_policies_of_sb3_keep_their_state_dict_keys_when_normalisation_is_off():
    ours = PPOPlus("MlpPolicy", "CartPole-v1", **SMALL, normalize_observations=False)
    assert set(ours.policy.state_dict()) == set(PPO("MlpPolicy", "CartPole-v1", device="cpu").policy.state_dict())
    assert type(ours.policy) is ActorCriticPolicy


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: cloudpickle.loads(cloudpickle.dumps(x))])
@pytest.mark.parametrize("policy_class", [ActorCriticPolicy, OverridesForward])
def test_a_normalising_policy_can_be_copied_and_pickled(policy_class, clone):
    model = PPOPlus(policy_class, wide_env(), **SMALL).learn(16)
    obs = np.array([[300.0, -20.0, 5.0]], np.float32)
    model.predict(obs)  # SB3's policies keep their last distribution, and torch copies none that has a graph
    other = clone(model.policy)
    assert type(other) is type(model.policy)
    assert np.array_equal(other.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    # A copy of its own: training goes on without touching it.
    before = snapshot(other)
    model.learn(16)
    assert all(th.equal(before[key], value) for key, value in other.state_dict().items())
    own = {id(p) for p in other.parameters()}
    assert {id(p) for group in other.optimizer.param_groups for p in group["params"]} == own


def test_a_pickled_policy_predicts_in_a_fresh_process(tmp_path):
    model = PPOPlus("MlpPolicy", wide_env(), **SMALL).learn(16)
    path = tmp_path / "policy.pkl"
    path.write_bytes(cloudpickle.dumps(model.policy))
    obs = np.array([[300.0, -20.0, 5.0]], np.float32)
    code = (
        "import pickle, sys, numpy as np\n"
        "policy = pickle.load(open(sys.argv[1], 'rb'))\n"
        "obs = np.array([[300.0, -20.0, 5.0]], np.float32)\n"
        "print(policy.predict(obs, deterministic=True)[0].tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    np.testing.assert_allclose(eval(out.stdout), model.predict(obs, deterministic=True)[0], rtol=1e-5)


def test_a_saved_policy_carries_its_statistics(tmp_path):
    model = PPOPlus("MlpPolicy", wide_env(), **SMALL, clip_observations=0.7).learn(16)
    model.policy.save(tmp_path / "policy")
    loaded = type(model.policy).load(tmp_path / "policy", device="cpu")
    obs = np.array([[300.0, -20.0, 5.0]], np.float32)
    assert np.array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    assert all(th.equal(loaded.state_dict()[key], value) for key, value in model.policy.state_dict().items())


# --- callbacks ----------------------------------------------------------------------------------------------


class Spy(BaseCallback):
    def __init__(self, stop_after=None):
        super().__init__()
        self.stop_after = stop_after
        self.events, self.step_locals, self.end_locals = [], set(), set()

    def _on_training_start(self):
        self.events.append("training start")
        self.training_locals = set(self.locals)

    def _on_rollout_start(self):
        self.events.append("rollout start")

    def _on_step(self):
        self.step_locals |= set(self.locals)
        self.last_types = {name: type(self.locals[name]) for name in ("rewards", "dones", "actions", "infos", "values")}
        assert self.num_timesteps == self.model.num_timesteps == 2 * self.n_calls
        return self.stop_after is None or self.n_calls < self.stop_after

    def _on_rollout_end(self):
        self.events.append("rollout end")
        self.end_locals |= set(self.locals)
        buffer = self.model.rollout_buffer
        assert buffer.full
        assert buffer.size() == 8
        assert buffer.advantages.shape == (8, 2)
        assert np.allclose(buffer.returns, buffer.advantages + buffer.values, atol=1e-6)

    def _on_training_end(self):
        self.events.append("training end")


STEP_LOCALS = {"infos", "dones", "rewards", "actions", "clipped_actions", "new_obs", "values", "log_probs", "n_steps"}
STEP_LOCALS |= {"env", "callback", "rollout_buffer", "n_rollout_steps", "obs_tensor", "self"}


def test_callbacks_see_sb3s_locals_and_events_in_sb3s_order():
    ours, theirs = Spy(), Spy()
    PPOPlus("MlpPolicy", pair(OBSERVATIONS["box"]), **SMALL).learn(32, ours)
    PPO("MlpPolicy", pair(OBSERVATIONS["box"]), **SMALL).learn(32, theirs)
    assert ours.events == theirs.events
    assert STEP_LOCALS <= ours.step_locals
    assert theirs.step_locals - {"terminal_obs", "terminal_value", "idx", "done"} <= ours.step_locals
    assert STEP_LOCALS <= ours.end_locals
    assert ours.last_types == theirs.last_types
    assert {"total_timesteps", "tb_log_name", "progress_bar", "reset_num_timesteps"} <= ours.training_locals
    assert theirs.training_locals <= ours.training_locals


def test_the_locals_of_a_step_hold_what_sb3s_hold():
    class Record(BaseCallback):
        def _on_training_start(self):
            self.rows = []

        def _on_step(self):
            names = ("rewards", "dones", "actions", "clipped_actions", "new_obs", "values", "log_probs", "n_steps")
            row = {name: copy.deepcopy(self.locals[name]) for name in names}
            self.rows.append({**row, "obs": self.locals["obs_tensor"].clone()})
            return True

    records = []
    for cls, extra in ((PPOPlus, {**presets.SB3_PPO, **SMALL}), (PPO, SMALL)):
        env = pair(OBSERVATIONS["box"], ACTIONS["box"])
        callback = Record()
        cls("MlpPolicy", env, **extra).learn(32, callback)
        records.append(callback.rows)
    assert len(records[0]) == len(records[1]) == 16
    for ours, theirs in zip(*records, strict=True):
        for name, value in theirs.items():
            assert np.array_equal(ours[name], value), name


def test_on_step_false_stops_at_once_without_an_update():
    callback = Spy(stop_after=11)
    model = PPOPlus("MlpPolicy", pair(OBSERVATIONS["box"]), **SMALL)
    model.learn(1000, callback)
    assert model.num_timesteps == 22
    assert model._n_updates == SMALL["n_epochs"]
    assert callback.events[-1] == "training end"


def test_stop_training_on_max_episodes_reads_what_it_needs():
    model = PPOPlus("MlpPolicy", pair(OBSERVATIONS["box"]), **SMALL)
    model.learn(1000, StopTrainingOnMaxEpisodes(max_episodes=2))
    assert model.num_timesteps < 1000


def test_evaluation_and_checkpoints_need_nothing_but_a_raw_environment(tmp_path):
    evaluate = EvalCallback(
        make_vec_env(Anything),
        eval_freq=8,
        n_eval_episodes=2,
        log_path=tmp_path,
        best_model_save_path=tmp_path,
        verbose=0,
    )
    checkpoint = CheckpointCallback(8, str(tmp_path), save_vecnormalize=True)
    model = PPOPlus("MlpPolicy", make_vec_env(lambda: Anything(), 2), **SMALL).learn(32, [evaluate, checkpoint])
    assert evaluate.last_mean_reward == pytest.approx(3.0)  # steps 1, 3 and 5 of five
    names = {path.name for path in tmp_path.iterdir()}
    assert {"best_model.zip", "evaluations.npz", "rl_model_16_steps.zip", "rl_model_32_steps.zip"} <= names
    assert not any("vecnormalize" in name for name in names)
    resumed = PPOPlus.load(tmp_path / "rl_model_32_steps", device="cpu")
    assert resumed.num_timesteps == 32
    mean, _ = evaluate_policy(model, make_vec_env(lambda: Anything()), n_eval_episodes=2)
    assert mean == pytest.approx(3.0)


def test_an_evaluation_in_the_middle_of_a_rollout_changes_nothing_but_random_draws():
    class Deterministic(BaseCallback):
        def _on_step(self):
            self.model.predict(np.full(3, 100.0, np.float32), deterministic=True)
            return True

    def train(callback):
        model = PPOPlus("MlpPolicy", wide_env(), **SMALL)
        return snapshot(model.learn(32, callback).policy)

    quiet, busy = train(None), train(Deterministic())
    assert all(th.equal(quiet[key], busy[key]) for key in quiet)


# --- logging ------------------------------------------------------------------------------------------------

SB3_KEYS = {"time/fps", "time/iterations", "time/time_elapsed", "time/total_timesteps", "train/approx_kl"}
SB3_KEYS |= {"train/clip_fraction", "train/clip_range", "train/entropy_loss", "train/explained_variance"}
SB3_KEYS |= {"train/learning_rate", "train/loss", "train/n_updates", "train/policy_gradient_loss", "train/std"}
SB3_KEYS |= {"train/value_loss", "train/clip_range_vf", "rollout/ep_len_mean", "rollout/ep_rew_mean"}
NEW_KEYS = {"train/grad_norm", "train/value_loss_clip_fraction", "time/rollout_fps", "time/update_seconds"}
NEW_KEYS |= {"train/nonfinite_updates", "train/advantage_mean", "train/advantage_std", "train/ent_coef"}


def test_the_csv_holds_sb3s_keys_and_the_new_ones_as_finite_numbers(tmp_path):
    model = PPOPlus("MlpPolicy", make_vec_env(lambda: Anything(), 2), **SMALL)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(64)
    header, *rows = (tmp_path / "progress.csv").read_text().strip().split("\n")
    columns = dict(zip(header.split(","), rows[-1].split(","), strict=True))
    assert set(columns) >= SB3_KEYS | NEW_KEYS
    values = {key: float(value) for key, value in columns.items()}
    assert all(np.isfinite(value) for value in values.values()), values
    assert values["time/total_timesteps"] == 64
    assert values["train/n_updates"] == 3 * SMALL["n_epochs"]  # logs are written before the update
    assert values["train/grad_norm"] > 0
    assert 0 <= values["train/value_loss_clip_fraction"] <= 1


def test_metrics_of_a_preset_equal_sb3s(tmp_path):
    loggers = []
    for cls, extra in ((PPOPlus, {**presets.SB3_PPO, **SMALL}), (PPO, SMALL)):
        model = cls("MlpPolicy", pair(OBSERVATIONS["box"], ACTIONS["box"]), **extra)
        model.set_logger(configure(None, []))
        model.learn(48)
        loggers.append({k: v for k, v in model.logger.name_to_value.items() if k.startswith("train/")})
    ours, theirs = loggers
    assert set(theirs) <= set(ours)
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-7), key


def test_tensorboard_gets_events_under_the_class_name(tmp_path):
    env = make_vec_env(Anything)
    PPOPlus("MlpPolicy", env, **SMALL, tensorboard_log=str(tmp_path)).learn(24)
    PPOPlus("MlpPolicy", "CartPole-v1", **SMALL, tensorboard_log=str(tmp_path)).learn(16, tb_log_name="mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["PPOPlus_1", "mine_1"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "PPOPlus_1")).Reload()
    assert {"train/grad_norm", "rollout/ep_rew_mean"} <= set(events.Tags()["scalars"])


@pytest.mark.filterwarnings("ignore:rich is experimental")
def test_the_progress_bar_runs():
    model = PPOPlus("MlpPolicy", "CartPole-v1", **SMALL)
    assert model.learn(16, progress_bar=True).num_timesteps == 16


def test_log_interval_none_logs_nothing(tmp_path):
    model = PPOPlus("MlpPolicy", "CartPole-v1", **SMALL)
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(16, log_interval=None)
    assert (tmp_path / "progress.csv").read_text() == ""


# --- parameters and environments ----------------------------------------------------------------------------


def test_parameters_travel_from_model_to_model_with_statistics_and_optimiser():
    options = {**SMALL, "normalize_value_targets": True, "critic_learning_rate": 1e-3}
    source = PPOPlus("MlpPolicy", wide_env(), **options).learn(32)
    target = PPOPlus("MlpPolicy", wide_env(), **{**options, "seed": 1})
    target.set_parameters(copy.deepcopy(source.get_parameters()))
    obs = np.array([[300.0, -20.0, 5.0]], np.float32)
    assert np.array_equal(target.predict(obs, deterministic=True)[0], source.predict(obs, deterministic=True)[0])
    for name in ("reward_normalizer", "value_normalizer"):
        assert all(th.equal(a, b) for a, b in zip(
            getattr(source, name).state_dict().values(), getattr(target, name).state_dict().values(), strict=True
        ))  # fmt: skip
    assert float(source.reward_normalizer.count) > 1
    assert target.policy.optimizer.state_dict()["state"].keys() == source.policy.optimizer.state_dict()["state"].keys()


def test_parameters_can_be_read_from_a_file(tmp_path):
    source = PPOPlus("MlpPolicy", wide_env(), **SMALL).learn(16)
    source.save(tmp_path / "model")
    target = PPOPlus("MlpPolicy", wide_env(), **{**SMALL, "seed": 1})
    target.set_parameters(tmp_path / "model.zip", device="cpu")
    for key, value in source.policy.state_dict().items():
        assert th.equal(target.policy.state_dict()[key], value)


def test_set_env_continues_on_another_environment_and_refuses_another_number_of_them():
    model = PPOPlus("MlpPolicy", make_vec_env(lambda: Anything(), 2), **SMALL, schedule_timesteps=32).learn(16)
    model.set_env(make_vec_env(lambda: Anything(), 2))
    model.learn(16, reset_num_timesteps=False)
    assert model.num_timesteps == 32
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(make_vec_env(lambda: Anything(), 3))
    with pytest.raises(ValueError, match="spaces do not match"):
        model.set_env(make_vec_env("CartPole-v1", 2))


def test_learn_can_be_called_again_in_the_same_process():
    model = PPOPlus("MlpPolicy", pair(OBSERVATIONS["box"]), **SMALL)
    model.learn(32)
    after_one = snapshot(model.policy)
    model.learn(32)
    assert model.num_timesteps == 32
    assert any(not th.equal(after_one[key], value) for key, value in model.policy.state_dict().items())


def test_an_exception_in_a_callback_leaves_a_model_that_can_learn_on():
    class Bang(BaseCallback):
        def _on_step(self):
            if self.n_calls == 11:
                raise KeyboardInterrupt
            return True

    model = PPOPlus("MlpPolicy", pair(OBSERVATIONS["box"]), **SMALL, schedule_timesteps=64)
    with pytest.raises(KeyboardInterrupt):
        model.learn(64, Bang())
    model.learn(32, reset_num_timesteps=False)
    assert finite(model.policy)


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("extra", [{}, {"sb3_exact": True, "use_sde": False}, {"kl_coef": 0.1, "desired_kl": 0.01}])
def test_the_same_seed_gives_the_same_parameters_and_another_seed_others(env, extra):
    def train(seed):
        model = PPOPlus("MlpPolicy", env, **{**SMALL, **extra, "seed": seed}).learn(24)
        return snapshot(model.policy)

    first, second, other = train(3), train(3), train(4)
    assert all(th.equal(first[key], second[key]) for key in first)
    assert any(not th.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_devices(device):
    model = PPOPlus("MlpPolicy", "CartPole-v1", **{**SMALL, "device": device}).learn(16)
    expected = "cuda" if device == "auto" and th.cuda.is_available() else "cpu"
    assert model.device.type == expected
    assert {p.device.type for p in model.policy.parameters()} == {expected}
    assert observation_normalizer(model.policy).moments[0].mean.device.type == expected
    assert model.rollout_buffer.tensor("rewards").device.type == expected
    model.predict(np.zeros(4, np.float32))


# --- construction -------------------------------------------------------------------------------------------


def test_positional_arguments_are_sb3s():
    sb3 = list(inspect.signature(PPO).parameters)
    ours = [p.name for p in inspect.signature(PPOPlus).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert ours == sb3
    values = ["MlpPolicy", "CartPole-v1", 1e-3, 16, 4, 3, 0.9, 0.8, 0.1, 0.3, False, 0.01, 0.4, 0.6, False, -1]
    model = PPOPlus(*values, None, None, 0.05, 50, None, {"net_arch": [4]}, 0, 7, "cpu")
    hp = model.hyperparameters_at(1.0)
    for name, value in zip(sb3[2:14], values[2:14], strict=True):
        assert getattr(hp, name) == value, name
    assert (hp.target_kl, model.seed, model.policy_kwargs) == (0.05, 7, {"net_arch": [4]})


def test_the_signature_shows_every_hyperparameter_with_its_default():
    parameters = inspect.signature(PPOPlus).parameters
    for name, default in PPOHparams.defaults().items():
        assert parameters[name].default == default, name
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())


class WithInit(PPOPlus):
    def __init__(self, policy, env, temperature=1.0, **kwargs):
        self.temperature = temperature
        super().__init__(policy, env, **kwargs)


class WithoutInit(PPOPlus):
    def policy_loss(self, ratio, advantages, hp):
        return -(ratio * advantages).mean()


def test_subclasses_train_save_and_load(tmp_path):
    assert list(inspect.signature(WithInit).parameters) == ["policy", "env", "temperature", "kwargs"]
    assert inspect.signature(WithoutInit) == inspect.signature(PPOPlus)
    WithInit("MlpPolicy", "CartPole-v1", temperature=2.0, **SMALL).learn(16).save(tmp_path / "model")
    loaded = WithInit.load(tmp_path / "model", env=gym.make("CartPole-v1"), device="cpu")
    assert loaded.temperature == 2.0
    loaded.learn(16)
    with pytest.raises(TypeError, match="WithInit got an unknown argument `clip_rang`"):
        WithInit("MlpPolicy", "CartPole-v1", clip_rang=0.1)
    assert WithoutInit("MlpPolicy", "CartPole-v1", **SMALL).learn(16).num_timesteps == 16


def test_the_arguments_of_a_subclass_can_be_changed_by_load(tmp_path):
    WithInit("MlpPolicy", "CartPole-v1", temperature=2.0, **SMALL).save(tmp_path / "model")
    assert WithInit.load(tmp_path / "model", device="cpu", temperature=3.0).temperature == 3.0


def test_hooks_run_around_every_update():
    class Hooked(PPOPlus):
        def before_update(self, hp):
            self.log = [*getattr(self, "log", []), ("before", self._n_updates)]

        def after_update(self, hp):
            self.log.append(("after", self._n_updates))

    model = Hooked("MlpPolicy", "CartPole-v1", **SMALL).learn(16)
    assert model.log == [("before", 0), ("after", 2), ("before", 2), ("after", 4)]


def test_an_overridden_policy_loss_is_what_is_trained_on():
    class Frozen(PPOPlus):
        def policy_loss(self, ratio, advantages, hp):
            return (ratio * 0).mean()

    model = Frozen("MlpPolicy", "CartPole-v1", **SMALL)
    before = model.policy.action_net.weight.clone()
    critic = model.policy.value_net.weight.clone()
    model.learn(16)
    assert th.equal(model.policy.action_net.weight, before)
    assert not th.equal(model.policy.value_net.weight, critic)


def test_a_model_can_be_made_without_setting_it_up():
    model = PPOPlus("MlpPolicy", "CartPole-v1", _init_setup_model=False, **SMALL)
    assert getattr(model, "policy", None) is None
    model._setup_model()
    assert model.learn(8).num_timesteps == 8


def test_clip_range_is_sb3s_schedule_object():
    model = PPOPlus("MlpPolicy", "CartPole-v1", **{**SMALL, "clip_range": 0.2, "clip_range_vf": 0.3})
    assert model.clip_range(0.5) == 0.2
    assert model.clip_range.value_schedule.val == 0.2
    assert model.clip_range_vf(0.5) == 0.3
    assert PPOPlus("MlpPolicy", "CartPole-v1", **SMALL, clip_range_vf=None).clip_range_vf is None


def test_an_environment_id_becomes_a_monitored_environment():
    model = PPOPlus("MlpPolicy", "CartPole-v1", **SMALL).learn(64)
    assert len(model.ep_info_buffer) > 0


def test_verbose_prints_sb3s_table():
    out = io.StringIO()
    model = PPOPlus("MlpPolicy", "CartPole-v1", **SMALL)
    from stable_baselines3.common.logger import HumanOutputFormat, Logger

    model.set_logger(Logger(None, [HumanOutputFormat(out)]))
    model.learn(32)
    assert "approx_kl" in out.getvalue()
    assert "rollout_fps" in out.getvalue()


# --- epochs -------------------------------------------------------------------------------------------------


def steps_taken(model, parameter):
    return int(model.policy.optimizer.state.get(parameter, {"step": 0})["step"])


@pytest.mark.parametrize(("n_critic_epochs", "expected"), [(None, 3), (0, 0), (1, 1), (3, 3), (5, 5)])
@pytest.mark.parametrize("critic_learning_rate", [None, 1e-3])
def test_actor_and_critic_take_their_own_numbers_of_epochs(n_critic_epochs, expected, critic_learning_rate):
    options = {"n_critic_epochs": n_critic_epochs, "critic_learning_rate": critic_learning_rate}
    model = PPOPlus("MlpPolicy", "CartPole-v1", **{**SMALL, "batch_size": 4, "n_epochs": 3}, **options).learn(8)
    assert steps_taken(model, model.policy.action_net.weight) == 3 * 2
    assert steps_taken(model, model.policy.mlp_extractor.policy_net[0].weight) == 3 * 2
    assert steps_taken(model, model.policy.value_net.weight) == expected * 2
    assert steps_taken(model, model.policy.mlp_extractor.value_net[0].weight) == expected * 2


def test_the_critic_gets_its_epochs_when_the_kl_stops_the_actor():
    options = {**SMALL, "n_epochs": 4, "target_kl": 1e-12, "learning_rate": 1e-2}
    model = PPOPlus("MlpPolicy", "CartPole-v1", **options, n_critic_epochs=4).learn(8)
    assert steps_taken(model, model.policy.action_net.weight) == 1  # the second minibatch saw the KL of the first step
    assert steps_taken(model, model.policy.value_net.weight) == 4


def test_target_kl_alone_stops_both_as_in_sb3():
    options = {**SMALL, "n_epochs": 4, "target_kl": 1e-12, "learning_rate": 1e-2}
    ours = PPOPlus("MlpPolicy", "CartPole-v1", **{**presets.SB3_PPO, **options}).learn(8)
    theirs = PPO("MlpPolicy", "CartPole-v1", **options).learn(8)
    assert ours._n_updates == theirs._n_updates
    for model in (ours, theirs):
        assert steps_taken(model, model.policy.action_net.weight) == 1
        assert steps_taken(model, model.policy.value_net.weight) == 1


# --- numbers that the tricks stand on -----------------------------------------------------------------------


class FirstRatio(PPOPlus):
    def policy_loss(self, ratio, advantages, hp):
        self.ratios = [*getattr(self, "ratios", []), ratio.detach().clone()]
        return super().policy_loss(ratio, advantages, hp)


@pytest.mark.parametrize("action", ["box", "discrete", "multidiscrete", "multibinary"])
@pytest.mark.parametrize("options", [{}, {"use_sde": True}, {"use_sde": True, "squash": True}])
def test_the_ratio_is_one_in_the_first_minibatch_of_every_rollout(action, options):
    options = dict(options)
    if options and action != "box":
        options = {}
    kwargs = {"squash_output": True} if options.pop("squash", False) else {}
    env = DummyVecEnv([lambda: Anything(spaces.Box(-500, 700, (3,)), ACTIONS[action]) for _ in range(2)])
    env.seed(0)
    settings = {**SMALL, "batch_size": 16, "n_epochs": 3, "learning_rate": 0.01}
    model = FirstRatio("MlpPolicy", env, **settings, policy_kwargs=kwargs, **options).learn(48)
    assert len(model.ratios) == 9
    for rollout in range(3):
        np.testing.assert_allclose(model.ratios[3 * rollout].numpy(), 1.0, atol=2e-4)
        assert not np.allclose(model.ratios[3 * rollout + 1].numpy(), 1.0, atol=2e-4)


def test_after_a_rollout_the_statistics_are_those_of_all_observations_and_returns():
    model = PPOPlus("MlpPolicy", wide_env(), **SMALL)

    class Collect(BaseCallback):
        def _on_training_start(self):
            self.obs, self.rewards, self.dones = [], [], []

        def _on_step(self):
            self.obs.append(self.locals["obs_tensor"].numpy().copy())
            self.rewards.append(self.locals["rewards"].copy())
            self.dones.append(self.locals["dones"].copy())
            return True

    callback = Collect()
    model.learn(64, callback)
    obs = np.concatenate(callback.obs).astype(np.float64)
    moments = observation_normalizer(model.policy).moments[0]
    np.testing.assert_allclose(moments.mean, obs.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(moments.var, obs.var(axis=0), rtol=1e-3)
    assert float(moments.count) == pytest.approx(64, abs=1e-3)
    returns, running = [], np.zeros(2)
    for rewards, dones in zip(callback.rewards, callback.dones, strict=True):
        running = running * 0.99 + rewards
        returns.append(running.copy())
        running[dones] = 0
    np.testing.assert_allclose(model.reward_normalizer.var, np.var(returns), rtol=1e-4)
    np.testing.assert_allclose(model.reward_normalizer.mean, np.mean(returns), rtol=1e-4)
