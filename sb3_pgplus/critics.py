"""What the critic's own epochs can leave out: features that are constant in them, and autograd for a perceptron."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeGuard

import torch as th
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, MlpExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_pgplus.buffers import split_observations
from sb3_pgplus.core.mlp import Layer, mlp_backward, mlp_forward
from sb3_pgplus.policies import NormalizesObservations, observation_normalizer
from sb3_pgplus.tracing import has_global_hooks, is_patched

# Modules whose output depends on input and parameters alone: no dropout, no batch statistics, no noise.
_DETERMINISTIC = {FlattenExtractor, NatureCNN, CombinedExtractor}
_DETERMINISTIC |= {nn.ModuleDict, nn.Sequential, nn.Flatten, nn.Linear, nn.Conv2d, nn.ReLU}
_ACTIVATIONS: dict[type[nn.Module], str] = {nn.Tanh: "tanh", nn.ReLU: "relu"}
_CHUNK = 2048


@dataclass(frozen=True)
class StockCritic:
    """
    SB3's critic behind its features: ``value_net(mlp_extractor.forward_critic(features))``.

    It exists for policies that leave SB3's way to the value alone; for all others :meth:`of` gives None.
    """

    policy: ActorCriticPolicy
    layers: tuple[Layer, ...]

    @classmethod
    def of(cls, policy: ActorCriticPolicy, own: list[nn.Parameter]) -> Self | None:
        """
        The critic of a policy, if it is SB3's and its features are constant while only ``own`` parameters move.

        :param policy: any actor-critic policy
        :param own: the parameters that move
        """
        if any(_owner(policy, name) is not ActorCriticPolicy for name in ("predict_values", "extract_features")):
            return None
        extractor, layers = policy.vf_features_extractor, _layers(policy)
        if any(type(module) not in _DETERMINISTIC for module in extractor.modules()):
            return None
        if layers is None or _is_watched(policy):
            return None
        moving = {id(parameter) for parameter in own}
        head = [id(tensor) for layer in layers for tensor in (layer.weight, layer.bias)]
        if len({*head}) < len(head):  # a layer that is there twice has the sum of two gradients
            return None
        return cls(policy, layers) if moving == {*head} and moving.isdisjoint(map(id, extractor.parameters())) else None

    @property
    def has_learned_features(self) -> bool:
        """Whether features take a network of their own, as those of images do."""
        return any(True for _ in self.policy.vf_features_extractor.parameters())

    @th.no_grad()
    def features(self, observations: PyTorchObs) -> th.Tensor:
        """
        Features of all observations, ``[B, F]``.

        :param observations: a batch ``[B, ...]``
        """
        extract = partial(BasePolicy.extract_features, self.policy)
        pieces = [self._normalized(piece) for piece in split_observations(observations, _CHUNK)]
        return th.cat([extract(piece, self.policy.vf_features_extractor) for piece in pieces])

    def _normalized(self, observations: PyTorchObs) -> PyTorchObs:
        normalizer = observation_normalizer(self.policy) if isinstance(self.policy, NormalizesObservations) else None
        return observations if normalizer is None else normalizer(observations)

    def evaluate(self, features: th.Tensor) -> list[th.Tensor]:
        """
        The layers' outputs on a minibatch, the last of which is V ``[B, 1]``.

        :param features: ``[B, F]``
        """
        return mlp_forward(features, self.layers)

    def set_gradients(self, d_values: th.Tensor, outputs: list[th.Tensor]) -> None:
        """
        Give the parameters the gradient of a loss.

        :param d_values: the loss's gradient with respect to V, ``[B]``
        :param outputs: from :meth:`evaluate`
        """
        gradients = mlp_backward(d_values.unsqueeze(1), outputs, self.layers)
        tensors = [tensor for layer in self.layers for tensor in (layer.weight, layer.bias)]
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.grad = gradient


def _owner(policy: ActorCriticPolicy, method: str) -> Any:
    """What defines a method of a policy, normalisation left aside: a class, or the policy itself."""
    if method in policy.__dict__:
        return policy
    return next(cls for cls in type(policy).__mro__ if method in cls.__dict__ and cls is not NormalizesObservations)


def _layers(policy: ActorCriticPolicy) -> tuple[Layer, ...] | None:
    """The critic's layers, if it is a plain perceptron."""
    if type(policy.mlp_extractor) is not MlpExtractor or type(policy.mlp_extractor.value_net) is not nn.Sequential:
        return None
    hidden, layers = list(policy.mlp_extractor.value_net), list[Layer]()
    for linear, activation in zip(hidden[::2], hidden[1::2], strict=False):
        name = _ACTIVATIONS.get(type(activation))
        if not _is_plain(linear) or name is None:
            return None
        layers.append(Layer(linear.weight, linear.bias, name))
    if len(hidden) % 2 or not _is_plain(policy.value_net):
        return None
    return (*layers, Layer(policy.value_net.weight, policy.value_net.bias, None))


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    return type(module) is nn.Linear and module.bias is not None


def _is_watched(policy: ActorCriticPolicy) -> bool:
    """Whether somebody hooked into the critic's modules or parameters, or replaced a ``forward``."""
    head = (*policy.mlp_extractor.value_net.modules(), policy.value_net, policy.mlp_extractor)
    modules = (*head, *policy.vf_features_extractor.modules())
    hooked = any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules
    )
    replaced = any("forward" in m.__dict__ or "forward_critic" in m.__dict__ for m in modules)
    watched = any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in policy.parameters())
    return hooked or replaced or watched or has_global_hooks() or is_patched()
