"""The critic's short cut: taken for SB3's own critic alone, with the values and gradients of the long way."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import FakeImageEnv
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from stable_baselines3.common.utils import obs_as_tensor
from torch import nn
from torch.nn.utils import parametrizations

from sb3_pgplus import PPOPlus, TorchRolloutBuffer, TRPOPlus
from sb3_pgplus.critics import StockCritic
from sb3_pgplus.policies import critic_only_parameters, normalized_policy_class, observation_normalizer

BOX = spaces.Box(-5, 5, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (1, 36, 36), np.uint8)
DICT = spaces.Dict({"vector": BOX, "number": spaces.Discrete(4), "image": IMAGE})
NORMALIZED = normalized_policy_class(ActorCriticPolicy)
NORMALIZED_DICT = normalized_policy_class(MultiInputActorCriticPolicy)
SMALL_CNN = {"features_extractor_kwargs": {"features_dim": 16}}
SMALL_DICT = {"features_extractor_kwargs": {"cnn_output_dim": 16}}


def build(
    policy_class: type[ActorCriticPolicy] = ActorCriticPolicy, space: spaces.Space[Any] = BOX, **settings: Any
) -> ActorCriticPolicy:
    th.manual_seed(0)
    policy = policy_class(space, spaces.Box(-1, 1, (2,), np.float32), lambda _: 1e-3, **settings)
    normalizer = observation_normalizer(policy)
    if normalizer is not None:
        normalizer.merge(observations(policy, 20))
    return policy


def observations(policy: ActorCriticPolicy, n: int = 9) -> Any:
    policy.observation_space.seed(1)
    samples = [policy.observation_space.sample() for _ in range(n)]
    if isinstance(policy.observation_space, spaces.Dict):
        stacked = {key: np.stack([sample[key] for sample in samples]) for key in policy.observation_space}
        return obs_as_tensor(stacked, policy.device)
    return obs_as_tensor(np.stack(samples), policy.device)


def critic_of(policy: ActorCriticPolicy) -> StockCritic | None:
    return StockCritic.of(policy, critic_only_parameters(policy))


# --- SB3's critics ----------------------------------------------------------------------------------------------------

STOCK: dict[str, Callable[[], ActorCriticPolicy]] = {
    "mlp_box": build,
    "mlp_discrete": lambda: build(space=spaces.Discrete(5)),
    "mlp_multi_discrete": lambda: build(space=spaces.MultiDiscrete([3, 4])),
    "relu_three_layers": lambda: build(activation_fn=nn.ReLU, net_arch={"pi": [8], "vf": [16, 8, 4]}),
    "no_hidden_layer": lambda: build(net_arch=[]),
    # extractors of its own that have no parameters
    "mlp_not_shared": lambda: build(share_features_extractor=False),
    # the actor moves the shared extractor, the critic's own epochs do not
    "cnn": lambda: build(ActorCriticCnnPolicy, IMAGE, **SMALL_CNN),
    "cnn_with_layers": lambda: build(ActorCriticCnnPolicy, IMAGE, net_arch=[8], **SMALL_CNN),
    "multi_input": lambda: build(MultiInputActorCriticPolicy, DICT, **SMALL_DICT),
    "normalized": lambda: build(NORMALIZED, clip_observations=1.0),
    "normalized_not_shared": lambda: build(NORMALIZED, share_features_extractor=False),
    "normalized_multi_input": lambda: build(NORMALIZED_DICT, DICT, **SMALL_DICT),
    "sde": lambda: build(use_sde=True),
}


@pytest.mark.filterwarnings("ignore:Provided features_extractor will be ignored")
@pytest.mark.parametrize("name", STOCK)
def test_stock_critics_have_the_values_and_gradients_of_the_policy(name: str) -> None:
    policy = STOCK[name]()
    critic, obs = critic_of(policy), observations(policy)
    assert critic is not None

    expected = policy.predict_values(obs)
    d_values = th.randn(len(expected), generator=th.Generator().manual_seed(2))
    own = critic_only_parameters(policy)
    gradients = th.autograd.grad(expected.flatten(), own, d_values)

    features = critic.features(obs)
    outputs = critic.evaluate(features)
    assert not features.requires_grad and not outputs[-1].requires_grad
    assert outputs[-1].shape == expected.shape
    th.testing.assert_close(outputs[-1], expected.detach(), rtol=1e-6, atol=1e-6)
    assert float(expected.detach().std()) > 1e-3

    policy.optimizer.zero_grad()
    critic.set_gradients(d_values, outputs)
    for parameter, gradient in zip(own, gradients, strict=True):
        th.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-5)
    moving = {id(parameter) for parameter in own}
    assert all(p.grad is None for p in policy.parameters() if id(p) not in moving)

    critic.set_gradients(d_values, outputs)  # sets, does not add
    assert all(
        th.allclose(p.grad, g, rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]
        for p, g in zip(own, gradients, strict=True)
    )


@pytest.mark.parametrize("name", ["normalized", "normalized_multi_input"])
def test_features_are_those_of_normalised_observations(name: str) -> None:
    """Normalised once, although the policy's method for it is passed by."""
    policy = STOCK[name]()
    critic, obs = critic_of(policy), observations(policy)
    normalizer = observation_normalizer(policy)
    assert critic is not None and normalizer is not None
    features = critic.features(obs)
    for times, given in enumerate([obs, normalizer(obs), normalizer(normalizer(obs))]):
        raw = BasePolicy.extract_features(policy, given, policy.vf_features_extractor).detach()
        assert th.allclose(features, raw, rtol=1e-6, atol=1e-6) == (times == 1)


def test_long_rollouts_are_cut_into_pieces_without_a_seam() -> None:
    policy = STOCK["normalized"]()
    critic, obs = critic_of(policy), observations(policy, 4500)
    assert critic is not None
    values = critic.evaluate(critic.features(obs))[-1]
    th.testing.assert_close(values, policy.predict_values(obs).detach(), rtol=1e-5, atol=1e-6)


def test_parameters_are_the_policys_own_and_move_with_it() -> None:
    policy = build()
    critic, obs = critic_of(policy), observations(policy)
    assert critic is not None
    features, before = critic.features(obs), policy.predict_values(obs).detach()
    with th.no_grad():
        for parameter in critic_only_parameters(policy):
            parameter.mul_(1.5)
    values = critic.evaluate(features)[-1]
    th.testing.assert_close(values, policy.predict_values(obs).detach(), rtol=1e-6, atol=1e-6)
    assert not th.allclose(values, before)


# --- all others -------------------------------------------------------------------------------------------------------


class OwnValues(ActorCriticPolicy):
    def predict_values(self, obs: Any) -> th.Tensor:
        return 2.0 * super().predict_values(obs)


class OwnFeatures(ActorCriticPolicy):
    def extract_features(self, obs: Any, features_extractor: Any = None) -> Any:
        return 2.0 * super().extract_features(obs, features_extractor)


class OwnExtractor(FlattenExtractor):
    def forward(self, observations: th.Tensor) -> th.Tensor:
        return 2.0 * super().forward(observations)


class OwnMlp(nn.Module):
    def __init__(self, features_dim: int) -> None:
        super().__init__()
        self.latent_dim_pi = self.latent_dim_vf = 4
        self.policy_net = nn.Sequential(nn.Linear(features_dim, 4), nn.Tanh())
        self.value_net = nn.Sequential(nn.Linear(features_dim, 4), nn.Tanh())

    def forward(self, features: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: th.Tensor) -> th.Tensor:
        return self.policy_net(features)

    def forward_critic(self, features: th.Tensor) -> th.Tensor:
        return 2.0 * self.value_net(features)


class WithOwnMlp(ActorCriticPolicy):
    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = OwnMlp(self.features_dim)  # type: ignore[assignment]


class NamesakeOfTheNormalizer(ActorCriticPolicy):
    """Somebody else's attribute of this name, which SB3's way to the value does not use."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.observation_normalizer = nn.Softmax(dim=-1)


class OwnValuesOfNormalized(NORMALIZED):  # type: ignore[misc,valid-type]
    def predict_values(self, obs: Any) -> th.Tensor:
        return 2.0 * super().predict_values(obs)


def changed(change: Callable[[ActorCriticPolicy], Any], **settings: Any) -> Callable[[], ActorCriticPolicy]:
    """A stock policy after something was done to it."""

    def make() -> ActorCriticPolicy:
        policy = build(**settings)
        assert critic_of(policy) is not None
        change(policy)
        return policy

    return make


def set_bias(layer: nn.Linear, bias: nn.Parameter | None) -> None:
    layer.bias = bias  # type: ignore[assignment]


def replace(owner: Any, name: str) -> None:
    """An instance's method doubled."""
    original = getattr(owner, name)
    owner.__dict__[name] = lambda *args, **kwargs: 2.0 * original(*args, **kwargs)


CUSTOM: dict[str, Callable[[], ActorCriticPolicy]] = {
    "predict_values": lambda: build(OwnValues),
    "predict_values_normalized": lambda: build(normalized_policy_class(OwnValues)),
    "predict_values_of_a_normalized_class": lambda: build(OwnValuesOfNormalized),
    "predict_values_of_an_instance": changed(lambda p: replace(p, "predict_values")),
    "extract_features": lambda: build(OwnFeatures),
    "extract_features_normalized": lambda: build(normalized_policy_class(OwnFeatures)),
    "extract_features_of_an_instance": changed(lambda p: replace(p, "extract_features")),
    "features_extractor_class": lambda: build(features_extractor_class=OwnExtractor),
    "mlp_extractor": lambda: build(WithOwnMlp),
    "elu": lambda: build(activation_fn=nn.ELU),
    "extractor_of_its_own": lambda: build(ActorCriticCnnPolicy, IMAGE, share_features_extractor=False, **SMALL_CNN),
    "forward_hook": changed(lambda p: p.value_net.register_forward_hook(lambda *_: None)),
    "forward_hook_of_a_hidden_layer": changed(
        lambda p: p.mlp_extractor.value_net[0].register_forward_hook(lambda *_: None)
    ),
    "forward_pre_hook": changed(lambda p: p.value_net.register_forward_pre_hook(lambda *_: None)),
    "backward_hook": changed(lambda p: p.value_net.register_full_backward_hook(lambda *_: None)),
    "backward_pre_hook": changed(lambda p: p.value_net.register_full_backward_pre_hook(lambda *_: None)),
    "hook_of_the_extractor": changed(lambda p: p.features_extractor.register_forward_hook(lambda *_: None)),
    "hook_of_a_parameter": changed(lambda p: p.value_net.weight.register_hook(lambda gradient: 2 * gradient)),
    "hook_after_accumulation": changed(lambda p: p.value_net.weight.register_post_accumulate_grad_hook(lambda _: None)),
    "forward_of_an_instance": changed(lambda p: replace(p.value_net, "forward")),
    "forward_critic_of_an_instance": changed(lambda p: replace(p.mlp_extractor, "forward_critic")),
    "no_bias": changed(lambda p: set_bias(p.value_net, None)),
    "no_bias_in_a_hidden_layer": changed(lambda p: set_bias(p.mlp_extractor.value_net[0], None)),
    "parametrized": changed(lambda p: parametrizations.weight_norm(p.value_net)),
    "spectral_norm": changed(lambda p: nn.utils.spectral_norm(p.value_net)),
    "frozen": changed(lambda p: p.value_net.bias.requires_grad_(False)),
    "tied_to_the_actor": changed(
        lambda p: setattr(p.mlp_extractor.value_net[0], "weight", p.mlp_extractor.policy_net[0].weight)
    ),
    "dropout_in_the_extractor": changed(lambda p: setattr(p.features_extractor, "flatten", nn.Dropout())),
    "another_layer": changed(lambda p: p.mlp_extractor.value_net.append(nn.Dropout())),
    "another_activation_in_place": changed(lambda p: p.mlp_extractor.value_net.__setitem__(1, nn.Sigmoid())),
    "subclass_of_sequential": changed(
        lambda p: setattr(p.mlp_extractor, "value_net", type("Own", (nn.Sequential,), {})(*p.mlp_extractor.value_net))
    ),
    "value_net_that_is_no_linear_layer": changed(lambda p: setattr(p, "value_net", nn.Sequential(p.value_net))),
}


def test_an_attribute_named_like_the_normalizer_is_not_taken_for_it() -> None:
    policy = build(NamesakeOfTheNormalizer)
    critic, obs = critic_of(policy), observations(policy)
    assert critic is None or th.allclose(critic.evaluate(critic.features(obs))[-1], policy.predict_values(obs))


@pytest.mark.parametrize("name", CUSTOM)
def test_critics_that_are_not_sb3s_go_the_long_way(name: str) -> None:
    assert critic_of(CUSTOM[name]()) is None


def test_the_parameters_that_move_must_be_those_of_the_head() -> None:
    policy = build()
    own = critic_only_parameters(policy)
    assert StockCritic.of(policy, own) is not None
    assert StockCritic.of(policy, own[::-1]) is not None
    assert StockCritic.of(policy, []) is None
    for i in range(len(own)):
        assert StockCritic.of(policy, own[:i] + own[i + 1 :]) is None
    assert StockCritic.of(policy, [*own, policy.action_net.weight]) is None


def test_an_extractor_that_moves_must_be_run_again() -> None:
    policy = STOCK["cnn"]()
    own = critic_only_parameters(policy)
    assert StockCritic.of(policy, own) is not None
    assert StockCritic.of(policy, [*own, *policy.features_extractor.parameters()]) is None


# --- training ---------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {"n_steps": 48, "batch_size": 24, "learning_rate": 3e-3, "seed": 0, "device": "cpu"}
ALGORITHMS: dict[str, tuple[type[PPOPlus] | type[TRPOPlus], dict[str, Any]]] = {
    "trpo": (TRPOPlus, {"n_critic_updates": 5}),
    "trpo_clipped_raw": (TRPOPlus, {"clip_range_vf": 0.01, "normalize_observations": False, "max_grad_norm": None}),
    "ppo": (PPOPlus, {"n_epochs": 2, "n_critic_epochs": 6}),
    "ppo_relu_targets": (
        PPOPlus,
        {"n_epochs": 1, "n_critic_epochs": 4, "activation_fn": "relu", "normalize_value_targets": True},
    ),
}


def trained(name: str) -> Any:
    algorithm, settings = ALGORITHMS[name]
    env = make_vec_env("Pendulum-v1", 2, seed=0, wrapper_class=TimeLimit, wrapper_kwargs={"max_episode_steps": 20})
    model = algorithm("MlpPolicy", env, **{**SETTINGS, **settings})
    return model.learn(3 * model.n_steps * model.n_envs)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_training_is_the_same_either_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, original = list[StockCritic | None](), StockCritic.of

    def recorded(policy: ActorCriticPolicy, own: list[nn.Parameter]) -> StockCritic | None:
        answers.append(original(policy, own))
        return answers[-1]

    monkeypatch.setattr(StockCritic, "of", recorded)
    short = trained(name)
    assert len(answers) == 3 and None not in answers
    monkeypatch.setattr(StockCritic, "of", lambda policy, own: None)
    long = trained(name)
    for (key, x), y in zip(short.policy.state_dict().items(), long.policy.state_dict().values(), strict=True):
        th.testing.assert_close(x, y, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    states = [model.policy.optimizer.state_dict()["state"] for model in (short, long)]
    th.testing.assert_close(states[0], states[1], rtol=1e-3, atol=1e-5)
    for model in (short, long):  # the critic's own epochs did something
        steps = [float(state["step"]) for state in model.policy.optimizer.state.values()]
        assert len(set(steps)) == (2 if isinstance(model, PPOPlus) else 1) and max(steps) >= 3 * 4 * 4


def test_a_compiled_critic_does_not_compute_features_of_images_for_every_minibatch() -> None:
    model = TRPOPlus(
        "CnnPolicy", FakeImageEnv(), n_steps=16, batch_size=8, n_critic_updates=3, device="cpu", compile=True
    )
    calls: list[int] = []
    original = model._fit_stock_critic
    model._fit_stock_critic = lambda *args: calls.append(1) or original(*args)  # type: ignore[method-assign,func-returns-value]  # to see the call
    model.learn(16)
    assert calls == [1]


# --- a frozen actor ---------------------------------------------------------------------------------------------------


def with_frozen_actor(cls: Any, **kwargs: Any) -> Any:
    model = cls("MlpPolicy", "Pendulum-v1", n_steps=64, batch_size=32, seed=0, device="cpu", **kwargs)
    for part in (model.policy.mlp_extractor.policy_net, model.policy.action_net):
        part.requires_grad_(False)
    model.policy.log_std.requires_grad_(False)
    return model


def test_the_critics_own_epochs_warm_it_up_beside_a_frozen_actor() -> None:
    model = with_frozen_actor(PPOPlus, n_epochs=1, n_critic_epochs=4, compile=False)
    before = {name: parameter.clone() for name, parameter in model.policy.named_parameters()}
    model.learn(64)
    moved = {name for name, parameter in model.policy.named_parameters() if not parameter.equal(before[name])}
    assert moved == {name for name in before if "value" in name}


def test_a_trust_region_step_of_a_frozen_actor_says_that_there_is_none() -> None:
    with pytest.raises(ValueError, match="no parameter of the actor requires a gradient"):
        with_frozen_actor(TRPOPlus).learn(64)


def test_normalised_targets_refuse_a_parametrised_last_layer_that_they_could_not_rescale() -> None:
    model = PPOPlus("MlpPolicy", "Pendulum-v1", n_steps=64, batch_size=32, normalize_value_targets=True, device="cpu")
    parametrizations.weight_norm(model.policy.value_net)
    model.policy.optimizer = th.optim.Adam(model.policy.parameters())
    with pytest.raises(ValueError, match="without parametrisations"):
        model.learn(64)


def test_a_layer_that_is_there_twice_takes_the_long_way_which_adds_its_gradients() -> None:
    policy = build(net_arch={"pi": [16], "vf": [16, 16, 16]})
    assert critic_of(policy) is not None
    policy.mlp_extractor.value_net[4] = policy.mlp_extractor.value_net[2]
    assert critic_of(policy) is None


def test_a_method_replaced_on_a_class_takes_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, original = build(), MlpExtractor.forward_critic
    assert critic_of(policy) is not None
    monkeypatch.setattr(MlpExtractor, "forward_critic", lambda self, x: 2 * original(self, x))
    assert critic_of(policy) is None


def test_a_buffer_with_a_way_of_its_own_to_sample_is_asked_its_way() -> None:
    class Doubling(TorchRolloutBuffer):
        """Hands every minibatch out twice."""

        def get(self, batch_size: int | None = None) -> Any:  # type: ignore[override]
            for batch in super().get(batch_size):
                yield from (batch, batch)

    kwargs: dict[str, Any] = {"n_steps": 64, "batch_size": 32, "n_critic_updates": 1, "seed": 0, "device": "cpu"}
    steps = []
    for kind in (TorchRolloutBuffer, Doubling):
        model = TRPOPlus("MlpPolicy", "Pendulum-v1", rollout_buffer_class=kind, **kwargs).learn(64)
        steps.append(float(model.policy.optimizer.state[model.policy.value_net.weight]["step"]))
    assert steps == [2, 4]
