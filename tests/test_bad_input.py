"""What a user can get wrong, and what the error says: the argument's name, the value given, what is allowed."""

import inspect
import math
import re

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn, optim

from sb3_pgplus import A2CPlus, PPOPlus, TRPOPlus, presets
from sb3_pgplus.hparams import A2CHparams, PPOHparams, TRPOHparams

SMALL = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "device": "cpu"}
#: Every algorithm with small sizes of its own.
ALGORITHMS = {
    PPOPlus: SMALL,
    A2CPlus: {"n_steps": 8, "n_envs": 1, "device": "cpu"},
    TRPOPlus: {"n_steps": 8, "batch_size": 8, "n_critic_updates": 1, "device": "cpu"},
}

NUMBERS = ["gamma", "gae_lambda", "clip_observations", "clip_rewards", "log_std_init", "adam_eps"]
NUMBERS += ["adaptive_kl_target", "desired_kl", "rms_prop_eps", "cg_tol", "cg_damping", "line_search_shrinking_factor"]
NUMBERS += ["max_step_size"]
SCHEDULED = ["learning_rate", "critic_learning_rate", "ent_coef", "vf_coef", "max_grad_norm", "clip_range"]
SCHEDULED += ["clip_range_vf", "target_kl", "kl_coef"]
INTEGERS = ["n_steps", "batch_size", "n_epochs", "n_step_horizon", "max_nonfinite_updates", "n_envs", "cg_max_steps"]
INTEGERS += ["line_search_max_iter", "sub_sampling_factor", "fisher_sub_sampling_factor"]
INTEGERS_FROM_0 = ["n_critic_updates"]
OPTIONAL_INTEGERS = ["schedule_timesteps", "n_critic_epochs"]
SWITCHES = ["normalize_advantage", "bootstrap_truncated", "normalize_value_targets", "sb3_exact", "ortho_init"]
SWITCHES += ["line_search"]
CHOICES = ["advantage_estimator", "normalize_observations", "normalize_rewards", "activation_fn", "value_clip"]
CHOICES += ["recompute_advantages", "use_rms_prop", "compile", "kl_reduction"]
#: Names that `load` refuses whatever the value is, if it is another one.
FIXED = ("normalize_observations", "normalize_rewards", "normalize_value_targets", "activation_fn")

REQUIRED = ["gamma", "gae_lambda", "learning_rate", "ent_coef", "vf_coef", *INTEGERS, *INTEGERS_FROM_0]
REQUIRED += ["rms_prop_eps", "cg_tol", "cg_damping", "line_search_shrinking_factor"]
REQUIRED += [name for name in (*SWITCHES, *CHOICES) if name not in ("ortho_init", "activation_fn")]

WRONG_TYPE = [(name, bad) for name in NUMBERS for bad in (True, "many", [0.1], {}, 1j)]
WRONG_TYPE += [(name, bad) for name in SCHEDULED for bad in (True, [0.1], {}, 1j)]
WRONG_TYPE += [(name, bad) for name in INTEGERS + OPTIONAL_INTEGERS for bad in (True, "8", 8.0, [8], math.nan)]
WRONG_TYPE += [(name, bad) for name in INTEGERS_FROM_0 for bad in (True, "8", 8.0, [8], math.nan)]
WRONG_TYPE += [(name, bad) for name in SWITCHES for bad in (1, 0.0, "yes", "True", [])]
WRONG_TYPE += [(name, None) for name in REQUIRED if name not in CHOICES]

NOT_ALLOWED = [(name, bad) for name in NUMBERS + SCHEDULED for bad in (math.nan, math.inf, -math.inf)]
NOT_ALLOWED += [(name, "nan") for name in SCHEDULED]
NOT_ALLOWED += [(name, -1e-9) for name in NUMBERS + SCHEDULED if name != "log_std_init"]
NOT_ALLOWED += [("gamma", 1.0001), ("gae_lambda", 2)]
NOT_ALLOWED += [(name, 0) for name in ("clip_observations", "clip_rewards", "adam_eps", "desired_kl", "max_step_size")]
NOT_ALLOWED += [(name, 0) for name in ("adaptive_kl_target", "max_grad_norm", "clip_range", "clip_range_vf")]
NOT_ALLOWED += [(name, 0.0) for name in ("target_kl", "clip_range")]
NOT_ALLOWED += [("rms_prop_eps", 0), ("line_search_shrinking_factor", 0), ("line_search_shrinking_factor", 1)]
NOT_ALLOWED += [(name, bad) for name in INTEGERS for bad in (0, -1)]
NOT_ALLOWED += [("schedule_timesteps", 0), ("n_critic_epochs", -1), ("n_critic_updates", -1)]
NOT_ALLOWED += [(name, bad) for name in CHOICES for bad in ("no such", 1, 0, [])]
NOT_ALLOWED += [("value_clip", None), ("advantage_estimator", None), ("normalize_rewards", None)]
NOT_ALLOWED += [("kl_reduction", None)]
NOT_ALLOWED += [("use_rms_prop", None), ("use_rms_prop", "tf-like")]

NO_SCHEDULE = ["fast", "", "lin", "lin_", "lin_a", "cos_1_2_3", "lin_1__2", "linear_3e-4", "3e-4_lin", "lin-3e-4"]


def algorithm_with(name):
    """PPOPlus, or whichever algorithm has a hyperparameter that it lacks."""
    return next(cls for cls in ALGORITHMS if name in cls.hparams_class.names())


def kwargs_with(name, value):
    companions = {"adaptive_kl_target": {"kl_coef": 0.1}}
    return {**ALGORITHMS[algorithm_with(name)], **companions.get(name, {}), name: value}


def companions_of(name, value):
    """The same for ``load``, which is given no sizes."""
    small = ALGORITHMS[algorithm_with(name)]
    return {key: value for key, value in kwargs_with(name, value).items() if key not in small or key == name}


def allowed_words(name):
    return algorithm_with(name).hparams_class.spec(name).allowed()


def construct(**kwargs):
    return PPOPlus("MlpPolicy", "CartPole-v1", **kwargs)


def construct_with(name, value):
    return algorithm_with(name)("MlpPolicy", "CartPole-v1", **kwargs_with(name, value))


@pytest.fixture(scope="module")
def saved_by(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for cls, small in ALGORITHMS.items():
        cls("MlpPolicy", "CartPole-v1", **small).save(folder / f"{cls.__name__}.zip")
    return {cls: folder / f"{cls.__name__}.zip" for cls in ALGORITHMS}


@pytest.fixture
def saved(saved_by):
    return saved_by[PPOPlus]


def test_the_lists_cover_every_hyperparameter():
    known = {*NUMBERS, *SCHEDULED, *INTEGERS, *INTEGERS_FROM_0, *OPTIONAL_INTEGERS, *SWITCHES, *CHOICES}
    assert known == {*PPOHparams.names(), *A2CHparams.names(), *TRPOHparams.names()}


# --- one value ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), WRONG_TYPE)
def test_a_value_of_the_wrong_type_is_a_type_error_that_names_it(name, value):
    with pytest.raises(TypeError) as caught:
        construct_with(name, value)
    text = str(caught.value)
    assert f"`{name}`" in text
    assert repr(value) in text
    assert "must be" in text


@pytest.mark.parametrize(("name", "value"), NOT_ALLOWED)
def test_a_value_that_is_not_allowed_is_a_value_error_that_says_what_is(name, value):
    with pytest.raises(ValueError) as caught:
        construct_with(name, value)
    text = str(caught.value)
    assert f"`{name}` must be {allowed_words(name)}, got" in text
    assert repr(value) in text or str(value) in text


@pytest.mark.parametrize("value", NO_SCHEDULE)
@pytest.mark.parametrize("name", ["learning_rate", "ent_coef", "clip_range_vf"])
def test_a_string_that_is_no_schedule_is_a_value_error_that_shows_how_to_write_one(name, value):
    with pytest.raises(ValueError, match="write a number, 'lin_<start>'") as caught:
        construct_with(name, value)
    assert f"`{name}` is {value!r}" in str(caught.value)


@pytest.mark.parametrize("name", [*SCHEDULED])
@pytest.mark.parametrize("value", ["lin_0.2_-1", "cos_0.2_-0.1", lambda progress: progress - 0.5])
def test_a_schedule_that_will_leave_the_allowed_range_is_refused_before_training(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        construct_with(name, value)


@pytest.mark.parametrize(
    "given", [lambda progress: None, lambda progress: "fast", lambda: 0.1], ids=["None", "str", "()"]
)
def test_a_callable_that_is_no_schedule_is_an_error_that_names_the_argument(given):
    with pytest.raises((TypeError, ValueError), match="ent_coef"):
        construct(**SMALL, ent_coef=given)


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_schedule_that_ends_at_zero_is_allowed_for_every_coefficient(name):
    assert construct(**kwargs_with(name, "lin_0.2")).hyperparameters()[name] == "lin_0.2"


@pytest.mark.parametrize(("name", "value"), [("gamma", np.float32(0.5)), ("n_steps", np.int64(8)), ("gamma", 1)])
def test_numpys_and_pythons_numbers_are_numbers(name, value):
    resolved = getattr(construct_with(name, value).hyperparameters_at(1.0), name)
    assert resolved == value
    assert type(resolved) in (int, float)


@pytest.mark.parametrize("name", sorted({*SCHEDULED, *NUMBERS} - {*REQUIRED}))
def test_optional_values_may_be_none(name):
    assert getattr(construct_with(name, None).hyperparameters_at(1.0), name) is None


# --- the same through load ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [case for case in WRONG_TYPE if case[0] not in FIXED])
def test_load_refuses_a_value_of_the_wrong_type(saved_by, name, value):
    cls = algorithm_with(name)
    with pytest.raises(TypeError, match=f"`{name}`.*must be|`{name}` must be"):
        cls.load(saved_by[cls], device="cpu", **companions_of(name, value))


@pytest.mark.parametrize(("name", "value"), [case for case in NOT_ALLOWED if case[0] not in FIXED])
def test_load_refuses_a_value_that_is_not_allowed(saved_by, name, value):
    cls = algorithm_with(name)
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        cls.load(saved_by[cls], device="cpu", **companions_of(name, value))


@pytest.mark.parametrize("name", FIXED)
def test_load_refuses_to_change_what_is_part_of_the_saved_model(saved, name):
    other = {"activation_fn": "relu", "normalize_value_targets": True}.get(name, False)
    with pytest.raises(ValueError, match=f"`{name}` is part of the saved model and cannot be changed"):
        PPOPlus.load(saved, device="cpu", **{name: other})


# --- where the algorithms differ ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["constructor", "load"])
@pytest.mark.parametrize(
    ("value", "error", "allowed"),
    [
        (None, TypeError, "a number, a string such as 'lin_3e-4'"),
        (0, ValueError, "a number > 0 (or a schedule of such numbers), got 0"),
        (-0.1, ValueError, "a number > 0 (or a schedule of such numbers), got -0.1"),
        ("nan", ValueError, "a number > 0 (or a schedule of such numbers), got nan"),
    ],
)
def test_trpo_cannot_do_without_a_trust_region(
    saved_by, how: str, value: object, error: type[Exception], allowed: str
) -> None:
    with pytest.raises(error, match=re.escape(f"`target_kl` must be {allowed}")):
        if how == "load":
            TRPOPlus.load(saved_by[TRPOPlus], device="cpu", target_kl=value)
        else:
            TRPOPlus("MlpPolicy", "CartPole-v1", **{**ALGORITHMS[TRPOPlus], "target_kl": value})


@pytest.mark.parametrize("cls", ALGORITHMS)
@pytest.mark.parametrize("value", [0, "3", None, 2.0])
def test_the_number_of_environments_is_checked_before_any_is_made(cls: type, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(f"`n_envs` must be an integer >= 1, got {value!r}")):
        cls("MlpPolicy", "NoSuchEnvironment-v0", **{**ALGORITHMS[cls], "n_envs": value})


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
@pytest.mark.parametrize("cls", [A2CPlus, TRPOPlus])
def test_normalising_one_advantage_is_refused(cls: type) -> None:
    settings = {**ALGORITHMS[cls], "n_steps": 1, "normalize_advantage": True}
    with pytest.raises(ValueError, match=r"`n_steps \* n_envs` must be greater than 1 .*n_steps=1 and n_envs=1"):
        cls("MlpPolicy", "CartPole-v1", **settings)
    cls("MlpPolicy", "CartPole-v1", **{**settings, "n_envs": 2})
    cls("MlpPolicy", "CartPole-v1", **{**settings, "normalize_advantage": False})


def test_trpos_ragged_minibatch_is_mentioned_as_by_sb3() -> None:
    with pytest.warns(UserWarning, match="truncated mini-batch of size 3"):
        TRPOPlus("MlpPolicy", "CartPole-v1", **{**ALGORITHMS[TRPOPlus], "batch_size": 5})


# --- names --------------------------------------------------------------------------------------------------

UNKNOWN = [
    ("learning_rat", "learning_rate"),
    ("lr", None),
    ("clip_rang", "clip_range"),
    ("entropy_coef", "ent_coef"),
    ("nsteps", "n_steps"),
    ("normalise_advantage", "normalize_advantage"),
    ("batchsize", "batch_size"),
    ("xyzzy", None),
    ("policy_kwarg", "policy_kwargs"),
]


@pytest.mark.parametrize(("wrong", "right"), UNKNOWN)
@pytest.mark.parametrize("where", ["constructor", "load"])
def test_an_unknown_name_is_a_type_error_with_the_nearest_known_one(saved, where, wrong, right):
    with pytest.raises(TypeError) as caught:
        if where == "load":
            PPOPlus.load(saved, device="cpu", **{wrong: 1})
        else:
            construct(**{wrong: 1})
    assert f"PPOPlus{'.load' if where == 'load' else ''} got an unknown argument `{wrong}`" in str(caught.value)
    if right is not None:
        assert f"did you mean `{right}`?" in str(caught.value)
    if wrong == "xyzzy":
        assert "did you mean" not in str(caught.value)


UNKNOWN_ELSEWHERE = [
    (A2CPlus, "use_rmsprop", "use_rms_prop"),
    (A2CPlus, "rmsprop_eps", "rms_prop_eps"),
    (A2CPlus, "clip_range_vf", None),
    (A2CPlus, "n_epochs", "n_steps"),
    (TRPOPlus, "damping", "cg_damping"),
    (TRPOPlus, "fisher_subsampling_factor", "fisher_sub_sampling_factor"),
    (TRPOPlus, "critic_learning_rate", "learning_rate"),
]


@pytest.mark.parametrize(("cls", "wrong", "right"), UNKNOWN_ELSEWHERE)
@pytest.mark.parametrize("where", ["constructor", "load"])
def test_an_argument_of_another_algorithm_is_unknown(
    saved_by, where: str, cls: type, wrong: str, right: str | None
) -> None:
    with pytest.raises(TypeError) as caught:
        if where == "load":
            cls.load(saved_by[cls], device="cpu", **{wrong: 1})
        else:
            cls("MlpPolicy", "CartPole-v1", **{wrong: 1})
    assert f"{cls.__name__}{'.load' if where == 'load' else ''} got an unknown argument `{wrong}`" in str(caught.value)
    assert right is None or f"did you mean `{right}`?" in str(caught.value)


def test_a_value_given_twice_is_a_type_error():
    with pytest.raises(TypeError, match="PPOPlus got multiple values for argument `learning_rate`"):
        PPOPlus("MlpPolicy", "CartPole-v1", 1e-3, learning_rate=1e-3)


def test_too_many_positional_arguments_are_a_type_error():
    with pytest.raises(TypeError, match="PPOPlus takes at most 26 positional arguments, got 27"):
        PPOPlus("MlpPolicy", "CartPole-v1", *range(25))


@pytest.mark.parametrize(("cls", "most"), [(A2CPlus, 23), (TRPOPlus, 26)])
def test_too_many_positional_arguments_are_a_type_error_of_every_algorithm(cls: type, most: int) -> None:
    with pytest.raises(TypeError, match=f"{cls.__name__} takes at most {most} positional arguments, got {most + 1}"):
        cls("MlpPolicy", "CartPole-v1", *range(most - 1))


@pytest.mark.parametrize("arguments", [(), ("MlpPolicy",)])
def test_policy_and_environment_are_required(arguments):
    with pytest.raises(TypeError, match=r"missing \d required positional argument"):
        PPOPlus(*arguments)


def test_an_unknown_policy_name_lists_the_known_ones_or_names_it():
    with pytest.raises(ValueError, match="NoPolicy"):
        PPOPlus("NoPolicy", "CartPole-v1")


# --- contradictions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip_observations", "normalize_floats_only"])
def test_what_the_algorithm_tells_its_policy_is_not_taken_from_policy_kwargs(name):
    with pytest.raises(ValueError, match=rf"policy_kwargs\['{name}'\].*give `clip_observations`"):
        construct(**SMALL, policy_kwargs={name: 5.0})


@pytest.mark.parametrize(
    ("flat", "value", "policy_kwargs"),
    [
        ("activation_fn", "relu", {"activation_fn": nn.Tanh}),
        ("ortho_init", True, {"ortho_init": False}),
        ("ortho_init", False, {"ortho_init": True}),
        ("log_std_init", -1.0, {"log_std_init": 0.0}),
        ("adam_eps", 1e-8, {"optimizer_kwargs": {"eps": 1e-5}}),
    ],
)
def test_a_flat_argument_that_contradicts_policy_kwargs_is_refused(flat, value, policy_kwargs):
    with pytest.raises(ValueError, match=f"`{flat}`.*contradicts.*policy_kwargs") as caught:
        construct(**SMALL, policy_kwargs=policy_kwargs, **{flat: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("flat", "value", "policy_kwargs"),
    [
        ("activation_fn", "relu", {"activation_fn": nn.ReLU}),
        ("ortho_init", True, {"ortho_init": True, "net_arch": [4]}),
        ("adam_eps", 1e-5, {"optimizer_kwargs": {"eps": 1e-5, "weight_decay": 0.1}}),
    ],
)
def test_a_flat_argument_that_agrees_with_policy_kwargs_is_fine(flat, value, policy_kwargs):
    model = construct(**SMALL, policy_kwargs=policy_kwargs, **{flat: value})
    assert model.policy_kwargs == policy_kwargs  # the user's dictionary is left alone
    assert model.policy.optimizer.param_groups[0].get("weight_decay", 0) in (0, 0.1)


def test_adam_eps_for_an_optimiser_without_it_is_refused_by_name():
    with pytest.raises((TypeError, ValueError), match="adam_eps"):
        construct(**SMALL, adam_eps=1e-5, policy_kwargs={"optimizer_class": optim.SGD})


def test_an_adaptive_kl_target_needs_a_coefficient_to_start_from():
    with pytest.raises(ValueError, match=r"`adaptive_kl_target`=0.01 adapts `kl_coef`, which is None"):
        construct(**SMALL, adaptive_kl_target=0.01)


def test_normalising_advantages_of_single_samples_is_refused():
    with pytest.raises(ValueError, match="`batch_size` must be greater than 1 .* got 1"):
        construct(**{**SMALL, "batch_size": 1})
    with pytest.raises(AssertionError, match="`n_steps \\* n_envs` must be greater than 1"):
        construct(**{**SMALL, "n_steps": 1})


@pytest.mark.filterwarnings("ignore:VecNormalize normalises")
@pytest.mark.parametrize("what", ["observations", "rewards"])
@pytest.mark.parametrize("preset", [{}, presets.SB3_PPO])
def test_normalising_on_top_of_vecnormalize_is_refused(what, preset):
    env = VecNormalize(make_vec_env("CartPole-v1"))
    with pytest.raises(ValueError, match=f"normalises {what}.*VecNormalize: switch one of them off"):
        PPOPlus("MlpPolicy", env, **{**preset, **SMALL, f"normalize_{what}": True})


@pytest.mark.parametrize("what", ["observations", "rewards"])
def test_a_vecnormalize_that_leaves_something_alone_leaves_it_to_the_model(what):
    other = {"observations": "rewards", "rewards": "observations"}[what]
    env = VecNormalize(make_vec_env("CartPole-v1"), norm_obs=what != "observations", norm_reward=what != "rewards")
    with pytest.warns(UserWarning, match=f"VecNormalize normalises .*{other}.* already"):
        model = PPOPlus("MlpPolicy", env, **{**SMALL, f"normalize_{what}": True})
    assert getattr(model, f"_normalizes_{what}") is True
    assert getattr(model, f"_normalizes_{other}") is False


def test_a_model_that_normalises_refuses_a_vecnormalize_environment_later(saved):
    env = VecNormalize(make_vec_env("CartPole-v1"))
    with pytest.raises(ValueError, match="VecNormalize: switch one of them off"):
        PPOPlus.load(saved, env=env, device="cpu")
    with pytest.raises(ValueError, match="the model normalises observations and so does the new environment's VecNorm"):
        construct(**SMALL).set_env(env)


class Blind(gym.Env):
    """An environment of any observation space whose observations are drawn from it."""

    action_space = spaces.Discrete(2)

    def __init__(self, space):
        self.observation_space = space

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 1.0, False, False, {}


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(3),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiBinary(4),
        spaces.Dict({"a": spaces.Discrete(3), "b": spaces.MultiBinary(2)}),
    ],
    ids=lambda space: type(space).__name__,
)
def test_normalising_observations_without_a_mean_is_refused(space):
    policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy"
    with pytest.raises(ValueError, match="`normalize_observations`=True, but there is nothing to normalise in"):
        PPOPlus(policy, Blind(space), **SMALL, normalize_observations=True)
    assert PPOPlus(policy, Blind(space), **SMALL)._normalizes_observations is False


def test_a_policy_without_a_critic_of_its_own_has_no_critic_learning_rate():
    class OneTrunk(ActorCriticPolicy):
        """Its value is a function of the action's mean: no parameter belongs to the critic alone."""

        def _build(self, lr_schedule):
            super()._build(lr_schedule)
            self.value_net = nn.Identity()
            self.mlp_extractor.value_net = nn.Identity()
            self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1))

    with pytest.raises(ValueError, match="`critic_learning_rate` is set, but no parameter belongs to the critic"):
        PPOPlus(OneTrunk, "CartPole-v1", **SMALL, critic_learning_rate=1e-3)
    with pytest.raises(ValueError, match="`normalize_value_targets`=True needs a policy .* \\w*OneTrunk has Identity"):
        PPOPlus(OneTrunk, "CartPole-v1", **SMALL, normalize_value_targets=True)


@pytest.mark.parametrize("buffer", [RolloutBuffer, DictRolloutBuffer])
def test_a_buffer_for_other_observations_is_refused_as_by_sb3(buffer):
    is_dict = buffer is RolloutBuffer  # the wrong way round
    space = spaces.Dict({"a": spaces.Box(-1, 1, (2,))}) if is_dict else spaces.Box(-1, 1, (2,))
    policy = "MultiInputPolicy" if is_dict else "MlpPolicy"
    with pytest.raises((AssertionError, TypeError)):
        PPOPlus(policy, Blind(space), **SMALL, rollout_buffer_class=buffer).learn(8)


def test_rollout_buffer_kwargs_that_the_buffer_does_not_know_are_a_type_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'wrong'"):
        construct(**SMALL, rollout_buffer_kwargs={"wrong": 1})


# --- learn --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "error"),
    [
        (-1, ValueError),
        (-1e-9, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        ("1000", TypeError),
        ("x", TypeError),
        (None, TypeError),
        (True, TypeError),
        ([8], TypeError),
    ],
)
def test_learn_refuses_what_is_no_number_of_steps(steps, error):
    model = construct(**SMALL)
    with pytest.raises(error, match="`total_timesteps` must be") as caught:
        model.learn(steps)
    assert repr(steps) in str(caught.value)
    assert model.num_timesteps == 0


@pytest.mark.parametrize("steps", [16, 16.0, 1.6e1, np.int64(16), np.float32(16)])
def test_learn_takes_integers_and_floats(steps):
    assert construct(**SMALL).learn(steps).num_timesteps == 16


def test_learn_of_zero_steps_does_nothing():
    assert construct(**SMALL).learn(0).num_timesteps == 0


# --- values assigned later ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value", "error"), [("gamma", 2, ValueError), ("clip_range", "x", ValueError)])
def test_a_bad_value_assigned_later_is_reported_when_it_is_used(name, value, error):
    model = construct(**SMALL)
    setattr(model, name, value)
    with pytest.raises(error, match=f"`{name}`"):
        model.learn(8)


@pytest.mark.parametrize("cls", ALGORITHMS)
def test_every_hyperparameter_has_a_description_and_a_legal_default(cls):
    hparams = cls.hparams_class
    hparams.resolve(hparams.defaults())
    for name in hparams.names():
        assert len(hparams.spec(name).doc) > 10, name
    assert set(hparams.names()) <= set(inspect.signature(cls).parameters)


PRESETS = {name: PPOHparams for name in ("SB3_PPO", "LECTURE", "PPO_MINIMAL", "PPO_NO_CLIP")}
PRESETS |= {"SB3_A2C": A2CHparams} | {name: TRPOHparams for name in ("SB3_TRPO", "TRPO_PLUS", "NPG")}


def test_every_preset_is_in_the_list():
    assert set(PRESETS) == {name for name in vars(presets) if name.isupper() and not name.startswith("_")}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_hold_only_legal_values(preset):
    values, hparams = getattr(presets, preset), PRESETS[preset]
    assert set(values) <= set(hparams.names())
    hparams.resolve({**hparams.defaults(), **values})


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("name", "value", "error", "allowed"),
    [
        ("stats_window_size", -1, ValueError, "at least 1 and at most .*"),
        ("stats_window_size", "abc", TypeError, "a whole number"),
        ("stats_window_size", True, TypeError, "a whole number"),
        ("use_sde", "False", TypeError, "True or False"),
        ("sde_sample_freq", 2.5, TypeError, "a whole number"),
        ("sde_sample_freq", -7, ValueError, "at least -1 and at most .*"),
        ("seed", 2.0, TypeError, "a whole number or None"),
        ("seed", -1, ValueError, "at least 0 and at most 4294967295"),
        ("tensorboard_log", 3, TypeError, "a path or None"),
        ("verbose", None, TypeError, "0, 1 or 2"),
        ("policy_kwargs", "abc", TypeError, "a dict or None"),
        ("rollout_buffer_kwargs", 3, TypeError, "a dict or None"),
        ("rollout_buffer_class", 5, TypeError, "a class, its dotted path or None"),
    ],
)
def test_sb3s_own_arguments_are_checked_too(algorithm, name, value, error, allowed):
    with pytest.raises(error, match=f"`{name}` must be {allowed}, got {value!r}"):
        algorithm("MlpPolicy", "CartPole-v1", **ALGORITHMS[algorithm], **{name: value})


def test_numpys_integers_are_taken_for_pythons():
    model = PPOPlus("MlpPolicy", "CartPole-v1", **SMALL, seed=np.int64(3), stats_window_size=np.int32(5))
    model.learn(8)
    assert (model.seed, model.ep_info_buffer.maxlen) == (3, 5)


@pytest.mark.parametrize("policy", [None, 3, dict, nn.Linear])
def test_what_is_no_policy_is_refused(policy):
    with pytest.raises(TypeError, match="`policy` must be a name such as 'MlpPolicy', or a class of policies, got"):
        PPOPlus(policy, "CartPole-v1", **SMALL)


def test_an_activation_in_policy_kwargs_may_be_a_name_too():
    model = PPOPlus("MlpPolicy", "CartPole-v1", **SMALL, policy_kwargs={"activation_fn": "relu"})
    assert model.policy.activation_fn is nn.ReLU
    with pytest.raises(ValueError, match=r"policy_kwargs\['activation_fn'\] is 'rely'; allowed are .*'relu'"):
        PPOPlus("MlpPolicy", "CartPole-v1", **SMALL, policy_kwargs={"activation_fn": "rely"})


@pytest.mark.parametrize("log_interval", [0, -1])
def test_a_log_interval_of_no_iterations_is_refused(log_interval):
    with pytest.raises(ValueError, match=f"`log_interval` must be at least 1, or None for no logs, got {log_interval}"):
        PPOPlus("MlpPolicy", "CartPole-v1", **SMALL).learn(8, log_interval=log_interval)


class FixedDeviation(ActorCriticPolicy):
    """Fixes one argument for itself, and hands on all others."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, log_std_init=-2.0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_policy_that_fixes_an_argument_goes_before_our_default_and_not_before_what_is_written(algorithm):
    model = algorithm(FixedDeviation, "Pendulum-v1", **ALGORITHMS[algorithm])
    assert model.policy.log_std.tolist() == [-2.0]
    with pytest.raises(TypeError, match="multiple values for keyword argument 'log_std_init'"):
        algorithm(FixedDeviation, "Pendulum-v1", **ALGORITHMS[algorithm], log_std_init=-1.0)
