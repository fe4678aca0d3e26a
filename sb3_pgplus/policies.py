"""
SB3's policies with observation normalisation inside, and what the algorithms need to know about any policy.
"""

import functools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import CombinedExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.distributions import Bernoulli, Categorical, Normal

from sb3_pgplus.core.distributions import (
    fisher_bernoulli,
    fisher_categorical,
    fisher_normal,
    kl_bernoulli,
    kl_categorical,
    kl_normal,
)
from sb3_pgplus.core.natural_gradient import MatVec, flatten, unflatten
from sb3_pgplus.core.running_stats import Moments, merge_moments, moments_of

#: Names of the ``activation_fn`` argument.
ACTIVATION_CLASSES: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
}

# VecNormalize's constants: its statistics start from 1e-4 samples of mean 0 and variance 1.
_INITIAL_COUNT = 1e-4
_EPSILON = 1e-8


class RunningMoments(nn.Module):
    """
    Running mean and variance as float64 buffers, so that they travel in ``state_dict`` and with ``to(device)``.

    :param shape: shape of one sample
    """

    mean: th.Tensor
    var: th.Tensor
    count: th.Tensor

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.register_buffer("mean", th.zeros(shape, dtype=th.float64))
        self.register_buffer("var", th.ones(shape, dtype=th.float64))
        self.register_buffer("count", th.tensor(_INITIAL_COUNT, dtype=th.float64))

    @property
    def is_initial(self) -> bool:
        """Whether no data has been merged yet."""
        return float(self.count) <= _INITIAL_COUNT

    def std(self) -> th.Tensor:
        """``√(var + ε)``, VecNormalize's denominator."""
        return th.sqrt(self.var + _EPSILON)

    @th.no_grad()
    def merge(self, batch: Any) -> None:
        """
        Add a batch of samples.

        :param batch: ``[B, *shape]``, a tensor or an array
        :raises ValueError: if the samples have another shape
        """
        old = Moments(*[self._buffers[name] for name in Moments._fields])  # past nn.Module.__getattr__
        mean = old.mean
        if batch.shape[1:] != mean.shape:
            raise ValueError(f"`batch` must have shape [B, {str([*mean.shape])[1:-1]}], got {[*batch.shape]}")
        if mean.device.type != "cpu" or mean.dtype is not th.float64:
            new = moments_of(th.as_tensor(batch, device=mean.device))
            for stored, merged in zip(old, merge_moments(old, new), strict=True):
                stored.copy_(merged)
            return
        # The same arithmetic in the same memory, with a fifth of torch's overhead, and as silent.
        samples = batch.detach().double().numpy() if isinstance(batch, th.Tensor) else batch
        arrays = [tensor.numpy() for tensor in old]
        old = Moments(*(arrays if mean.ndim else [float(array) for array in arrays]))  # numbers are quicker still
        with np.errstate(all="ignore"):
            for stored, merged in zip(arrays, merge_moments(old, moments_of(samples)), strict=True):
                stored[...] = merged


class ObservationNormalizer(nn.Module):
    """
    ``clip((obs − mean) / √(var + ε), −c, c)`` for the float observations of a space, VecNormalize's formula.

    :param observation_space: the policy's observation space
    :param clip: c, or None for no clipping
    :param floats_only: leave integer boxes as they are. Images are always left as they are.
    """

    def __init__(self, observation_space: spaces.Space[Any], clip: float | None, floats_only: bool) -> None:
        super().__init__()
        self.clip = math.inf if clip is None else clip
        #: Normalised keys of a Dict space, in the order of ``moments``; None for any other space.
        self.keys: list[str] | None = None
        if isinstance(observation_space, spaces.Dict):
            self.keys = normalizable_keys(observation_space, floats_only)
            shapes = [observation_space[key].shape for key in self.keys]
        else:
            shapes = [observation_space.shape]
        # A list, because keys of a Dict space may hold characters that module names may not.
        self.moments = nn.ModuleList(RunningMoments(shape or ()) for shape in shapes)

    @property
    def is_initial(self) -> bool:
        """Whether no data has been merged yet."""
        return all(moments.is_initial for moments in self.moments)

    def forward(self, observations: PyTorchObs) -> PyTorchObs:
        """Normalise a batch ``[B, ...]``; float32 comes out."""
        if isinstance(observations, dict):
            normalized = {key: self._normalize(observations[key], m) for key, m in self._by_key()}
            return {**observations, **normalized}
        return self._normalize(observations, self.moments[0])

    def merge(self, observations: PyTorchObs) -> None:
        """Add a batch ``[B, ...]`` to the statistics."""
        if isinstance(observations, dict):
            for key, moments in self._by_key():
                moments.merge(observations[key])
        else:
            self.moments[0].merge(observations)  # type: ignore[operator]  # ModuleList of RunningMoments

    def _by_key(self) -> list[tuple[str, Any]]:
        return list(zip(self.keys or [], self.moments, strict=True))

    def _normalize(self, observations: th.Tensor, moments: Any) -> th.Tensor:
        scaled: th.Tensor = (observations - moments.mean) / moments.std()
        return scaled.clamp(-self.clip, self.clip).float()


def normalizable_keys(observation_space: spaces.Dict, floats_only: bool) -> list[str]:
    """Keys of a Dict space whose entries can be normalised. Floats of three dimensions are a picture among them."""
    found = {key: space for key, space in observation_space.spaces.items() if is_normalizable(space, floats_only)}
    return [key for key, space in found.items() if not (_is_float(space) and len(space.shape or ()) == 3)]


def is_normalizable(space: spaces.Space[Any], floats_only: bool) -> bool:
    """
    Whether running mean and std of a space make sense: a Box of numbers that is no image.

    :param space: one observation space; a Dict counts if one of its entries does
    :param floats_only: leave out integer boxes, and those of three dimensions, which may be pictures scaled already
    """
    if isinstance(space, spaces.Dict):
        return bool(normalizable_keys(space, floats_only))
    if not isinstance(space, spaces.Box) or is_image_space(space) or space.dtype == bool:
        return False
    return not floats_only or (_is_float(space) and len(space.shape) < 3)


def _is_float(space: spaces.Space[Any]) -> bool:
    return bool(np.issubdtype(space.dtype, np.floating))


class _Inside(threading.local):
    """The policies (by id) that this thread is inside a method of: another thread's observations are still raw."""

    def __init__(self) -> None:
        self.policies: set[int] = set()


_inside = _Inside()


class NormalizesObservations:
    """
    Mix-in that lets any :class:`ActorCriticPolicy` take raw observations.

    Every public method that takes observations normalises them once, at the outermost call: what a policy's methods
    hand to each other is normalised already. So it makes no difference which of them a custom policy overrides.
    """

    #: The class that is mixed into.
    policy_class: type[ActorCriticPolicy]
    observation_normalizer: ObservationNormalizer
    observation_space: spaces.Space[Any]
    _modules: dict[str, Any]

    def __init__(
        self, *args: Any, clip_observations: float | None = 10.0, normalize_floats_only: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._normalizer_arguments = {
            "clip_observations": clip_observations,
            "normalize_floats_only": normalize_floats_only,
        }
        self.observation_normalizer = ObservationNormalizer(
            self.observation_space, clip_observations, normalize_floats_only
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time, so a pickle must name the class that it is made from.
        return _new_normalized, (self.policy_class,), self.__dict__

    def _call_normalized(self, method: Callable[..., Any], obs: PyTorchObs, *args: Any, **kwargs: Any) -> Any:
        # A policy may run itself while it is being built, before the normaliser exists.
        normalizer = self._modules.get("observation_normalizer")
        if normalizer is None or id(self) in _inside.policies:
            return method(obs, *args, **kwargs)
        _inside.policies.add(id(self))
        try:
            return method(normalizer(obs), *args, **kwargs)
        finally:
            _inside.policies.discard(id(self))

    def forward(self, obs: PyTorchObs, *args: Any, **kwargs: Any) -> Any:
        return self._call_normalized(super().forward, obs, *args, **kwargs)  # type: ignore[misc]  # mix-in

    def evaluate_actions(self, obs: PyTorchObs, *args: Any, **kwargs: Any) -> Any:
        return self._call_normalized(super().evaluate_actions, obs, *args, **kwargs)  # type: ignore[misc]  # mix-in

    def get_distribution(self, obs: PyTorchObs, *args: Any, **kwargs: Any) -> Any:
        return self._call_normalized(super().get_distribution, obs, *args, **kwargs)  # type: ignore[misc]  # mix-in

    def predict_values(self, obs: PyTorchObs, *args: Any, **kwargs: Any) -> Any:
        return self._call_normalized(super().predict_values, obs, *args, **kwargs)  # type: ignore[misc]  # mix-in

    def extract_features(self, obs: PyTorchObs, *args: Any, **kwargs: Any) -> Any:
        return self._call_normalized(super().extract_features, obs, *args, **kwargs)  # type: ignore[misc]  # mix-in

    def _predict(self, observation: PyTorchObs, *args: Any, **kwargs: Any) -> Any:
        return self._call_normalized(super()._predict, observation, *args, **kwargs)  # type: ignore[misc]  # mix-in

    def _get_constructor_parameters(self) -> dict[str, Any]:
        parameters: dict[str, Any] = super()._get_constructor_parameters()  # type: ignore[misc]  # mix-in
        return {**parameters, **self._normalizer_arguments}


@functools.cache
def normalized_policy_class(policy_class: type[ActorCriticPolicy]) -> type[ActorCriticPolicy]:
    """The policy class with observation normalisation inside (always the same class for the same argument)."""
    return type(
        f"Normalized{policy_class.__name__}", (NormalizesObservations, policy_class), {"policy_class": policy_class}
    )


def _new_normalized(policy_class: type[ActorCriticPolicy]) -> ActorCriticPolicy:
    cls = normalized_policy_class(policy_class)
    return cls.__new__(cls)


def observation_normalizer(policy: nn.Module) -> ObservationNormalizer | None:
    """The policy's normaliser, if it has one."""
    found = getattr(policy, "observation_normalizer", None)
    return found if isinstance(found, ObservationNormalizer) else None


#: Parameters of an action distribution: mean and std, or logits.
Parameters = tuple[th.Tensor, ...]


def distribution_parameters(distribution: Distribution) -> Parameters:
    """
    What a closed-form KL needs to know about SB3's action distribution, without gradient.

    :param distribution: any of SB3's: (squashed, state-dependent) Gaussian, (multi-)categorical, Bernoulli
    :return: mean and std, or logits (one tensor per action of a multi-categorical), each ``[B, ...]``
    :raises TypeError: on a distribution without a known closed form
    """
    return tuple(p.detach() for p in _parameters(distribution))


def kl_old_new(old_parameters: Parameters, distribution: Distribution) -> th.Tensor:
    """
    Closed-form KL(π_old‖π_θ) of each state in nats.

    :param old_parameters: from :func:`distribution_parameters` of π_old
    :param distribution: π_θ on the same states
    :return: ``[B]``
    :raises TypeError: on a distribution without a known closed form
    """
    return _kl(distribution, old_parameters, _parameters(distribution))


def kl_new_old(old_parameters: Parameters, distribution: Distribution) -> th.Tensor:
    """:func:`kl_old_new` the other way round, KL(π_θ‖π_old): what sb3-contrib's TRPO bounds."""
    return _kl(distribution, _parameters(distribution), old_parameters)


def _kl(distribution: Distribution, first: Parameters, second: Parameters) -> th.Tensor:
    inner: Any = distribution.distribution
    if isinstance(inner, Normal):
        return kl_normal(*first, *second)
    if isinstance(inner, Bernoulli):
        return kl_bernoulli(*first, *second)
    return th.stack([kl_categorical(p, q) for p, q in zip(first, second, strict=True)]).sum(dim=0)


def fisher_outputs(distribution: Distribution) -> tuple[Parameters, MatVec]:
    """
    What :func:`sb3_pgplus.core.natural_gradient.fisher_vector_product` needs to know about a policy's distribution.

    :param distribution: π_θ on B states, with its graph
    :return: its parameters y, each ``[B, ...]``, and the product with their Fisher matrix, on y flattened and joined
    :raises TypeError: on a distribution without a known closed form
    """
    outputs = _parameters(distribution)
    fixed = tuple(output.detach() for output in outputs)
    kind = type(distribution.distribution)

    def metric(dy: th.Tensor) -> th.Tensor:
        changes = unflatten(dy, fixed)
        if issubclass(kind, Normal):
            return flatten(fisher_normal(fixed[1], *changes))
        fisher = fisher_bernoulli if issubclass(kind, Bernoulli) else fisher_categorical
        return flatten([fisher(logits, change) for logits, change in zip(fixed, changes, strict=True)])

    return outputs, metric


def _parameters(distribution: Distribution) -> Parameters:
    inner: Any = distribution.distribution
    if isinstance(inner, Normal):
        return inner.loc, inner.scale
    if isinstance(inner, (Categorical, Bernoulli)):
        return (inner.logits,)
    if isinstance(inner, list) and all(isinstance(part, Categorical) for part in inner):
        return tuple(part.logits for part in inner)
    raise TypeError(f"no closed-form KL is known for {type(distribution).__name__}")


def critic_only_parameters(policy: ActorCriticPolicy) -> list[nn.Parameter]:
    """
    Parameters that only the critic uses: those the log-probability and the entropy do not depend on.

    Found from the autograd graph and not from names, so custom policies and shared trunks work.

    :param policy: any actor-critic policy
    :return: its parameters without the actor's (a shared trunk counts as the actor's)
    """
    was_training = policy.training
    policy.set_training_mode(False)  # batch statistics must not see the dummy observations
    observations = dummy_observations(policy.observation_space, policy.device)
    with th.no_grad():
        actions = policy._predict(observations, deterministic=True)
    with th.enable_grad():
        _, log_prob, entropy = policy.evaluate_actions(observations, actions)
        actor_outputs = log_prob.sum() if entropy is None else log_prob.sum() + entropy.sum()
    policy.set_training_mode(was_training)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    if not actor_outputs.requires_grad:  # the actor is frozen
        return parameters
    gradients = th.autograd.grad(actor_outputs, parameters, allow_unused=True)
    return [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is None]


def submodules(*roots: nn.Module) -> list[nn.Module]:
    """
    Modules with everything inside them, each once; ``nn.Module.modules`` without its cost, for use at every update.

    :param roots: where to begin
    """
    found: dict[int, nn.Module] = {}
    stack = list(roots)
    while stack:
        module = stack.pop()
        if id(module) not in found:
            found[id(module)] = module
            stack += [child for child in module._modules.values() if child is not None]
    return list(found.values())


def has_convolutions(module: nn.Module) -> bool:
    """
    :param module: a policy, for example
    """
    return any(isinstance(part, nn.modules.conv._ConvNd) for part in submodules(module))


def has_stock_features(policy: BasePolicy) -> bool:
    """
    :param policy: any
    :return: whether its features are SB3's, which ask nothing of how pictures lie in memory
    """
    extractor = getattr(policy, "features_extractor", None)
    return type(extractor) in (NatureCNN, CombinedExtractor)


def set_training_mode(policy: BasePolicy, mode: bool, plain: Sequence[nn.Module] | None = None) -> None:
    """
    ``policy.set_training_mode(mode)``, the quick way where nobody has changed what that does.

    :param policy: any
    :param mode: True for updates, False for rollouts
    :param plain: what :func:`plain_modules` found
    """
    plain = plain_modules(policy) if plain is None else plain
    if not plain:
        policy.set_training_mode(mode)
    for module in plain:  # past nn.Module.__setattr__, which looks for parameters in everything
        module.__dict__["training"] = mode


def plain_modules(policy: BasePolicy) -> list[nn.Module]:
    """
    A policy's modules, itself among them, if their mode is an attribute and nothing else; otherwise none.

    :param policy: any
    """
    modules = submodules(policy)
    if _owns(policy, "set_training_mode", BasePolicy):
        return []
    has_others = any([_owns(module, "train", nn.Module) or _is_scripted(module) for module in modules])
    return [] if has_others else modules


def _owns(module: nn.Module, method: str, base: type[nn.Module]) -> bool:
    """Whether a method is not the base class's, but the module's own or that of its class."""
    return method in module.__dict__ or getattr(type(module), method) is not getattr(base, method)


def _is_scripted(module: nn.Module) -> bool:
    return isinstance(module, th.jit.ScriptModule)  # its mode is where Python's attributes are not


def dummy_observations(space: spaces.Space[Any], device: th.device, batch_size: int = 2) -> PyTorchObs:
    """A batch of zeros that fits an observation space, made without touching any random generator."""
    if isinstance(space, spaces.Dict):
        return {key: _zeros(sub, device, batch_size) for key, sub in space.spaces.items()}
    return _zeros(space, device, batch_size)


def _zeros(space: spaces.Space[Any], device: th.device, batch_size: int) -> th.Tensor:
    dtype = np.dtype(space.dtype)
    zeros = th.zeros((batch_size, *(space.shape or ())), device=device)
    return zeros if np.issubdtype(dtype, np.floating) else zeros.long()
