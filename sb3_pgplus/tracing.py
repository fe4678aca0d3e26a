"""
What of an algorithm can be written down once as a graph of tensor operations.

A trace has no guards: a Python number that changes later stays what it was, and a hook is not called. So only what is
known to depend on nothing but its tensors is traced, and :func:`fingerprint` says when that something changed.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import chain
from operator import attrgetter, is_
from types import FunctionType
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, MlpExtractor, NatureCNN
from torch import nn
from torch.nn.modules import module as module_hooks

from sb3_pgplus.compiler import UntraceableError
from sb3_pgplus.policies import (
    NormalizesObservations,
    ObservationNormalizer,
    RunningMoments,
    normalized_policy_class,
    submodules,
)

#: Layers whose output depends on input, parameters and plain attributes alone: no chance, no batch statistics.
_LAYERS: set[type[nn.Module]] = {FlattenExtractor, MlpExtractor, NatureCNN, CombinedExtractor}
_LAYERS |= {nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity, nn.Flatten, nn.Linear, nn.Conv2d, nn.LayerNorm}
_LAYERS |= {nn.Tanh, nn.ReLU, nn.ELU, nn.GELU, nn.LeakyReLU, nn.SiLU, nn.Sigmoid, nn.Softplus}
_LAYERS |= {ObservationNormalizer, RunningMoments}
_POLICIES: set[type[nn.Module]] = {ActorCriticPolicy, ActorCriticCnnPolicy, MultiInputActorCriticPolicy}
_DISTRIBUTIONS = {
    DiagGaussianDistribution,
    CategoricalDistribution,
    MultiCategoricalDistribution,
    BernoulliDistribution,
}
#: Packages whose code a trace may run through: what it reads besides tensors is known.
_KNOWN_PACKAGES = ("torch", "stable_baselines3", __name__.partition(".")[0])
#: Modules whose functions a trace runs through.
_MODULES = (
    *(f"stable_baselines3.common.{name}" for name in ("policies", "distributions", "preprocessing", "torch_layers")),
    *(f"{__package__}.{name}" for name in ("a2c", "ppo", "policies", "sampling", "updates")),
    *(f"{__package__}.core.{name}" for name in ("advantages", "distributions", "losses")),
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (bool, int, float, str, type(None), np.generic)


def check_policy(policy: nn.Module) -> None:
    """
    Refuse a policy whose outputs may depend on more than its tensors.

    :param policy: any
    :raises UntraceableError: saying what stands in the way
    """
    if has_global_hooks():
        raise UntraceableError("there are hooks on all modules")
    policy_class = type(policy)
    if isinstance(policy, NormalizesObservations) and policy_class is normalized_policy_class(policy.policy_class):
        policy_class = policy.policy_class
    if policy_class not in _POLICIES:
        raise UntraceableError(f"{policy_class.__name__} is not one of SB3's own policies")
    if policy.use_sde:
        raise UntraceableError("state-dependent exploration draws noise inside the policy")
    if type(policy.action_dist) not in _DISTRIBUTIONS:
        raise UntraceableError(f"{type(policy.action_dist).__name__} is not one of the known action distributions")
    if is_patched():
        raise UntraceableError("a function or a method that it is made of was replaced")
    extractors = (policy.features_extractor, policy.pi_features_extractor, policy.vf_features_extractor)
    if policy.share_features_extractor and len({*map(id, extractors)}) > 1:
        raise UntraceableError("it shares its features extractor, but has several")
    _check_methods("the action distribution", policy.action_dist)
    for name, module in policy.named_modules():
        if module is not policy and type(module) not in _LAYERS:
            raise UntraceableError(f"{name} is a {type(module).__name__}, which is not on the list of known layers")
        _check_unwatched(name or "the policy", module)


def has_global_hooks() -> bool:
    """Whether somebody registered hooks for all modules there are."""
    hooks = (module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks)
    return any((*hooks, module_hooks._global_backward_hooks, module_hooks._global_backward_pre_hooks))


def is_patched() -> bool:
    """Whether somebody replaced a function, or a method of a class, that a trace runs through."""
    originals = _originals()
    try:
        return originals is None or not all([found(owner) == functions for owner, found, functions in originals])
    except AttributeError:  # taken away
        return True


@cache
def _originals() -> list[tuple[Any, Callable[[Any], Any], Any]] | None:
    """Of each owner its functions, and how to look them up; None if one was replaced before this was first asked."""
    policies: list[type] = [normalized_policy_class(kind) for kind in _POLICIES]  # type: ignore[arg-type]  # hashable
    # Base classes on their own, too: a method may call the one it overrides.
    found: list[type] = [*policies, *_DISTRIBUTIONS, *_LAYERS]
    kinds = {base for kind in found for base in (kind, *_known_bases(kind))}
    names: dict[Any, Iterable[str]] = {kind: _traced_names(kind) for kind in kinds} | {nn.Module: ["__call__"]}
    for module in map(import_module, _MODULES):
        functions = {name: value for name, value in vars(module).items() if isinstance(value, FunctionType)}
        names[module] = [name for name, value in functions.items() if not _is_of(value, *sys.stdlib_module_names)]
    if not all(_is_of(getattr(owner, name), *_KNOWN_PACKAGES) for owner in names for name in names[owner]):
        return None
    getters = {owner: attrgetter(*of) for owner, of in names.items() if of}
    return [(owner, getter, getter(owner)) for owner, getter in getters.items()]


def _known_bases(kind: type) -> list[type]:
    """Those that are SB3's or ours."""
    return [base for base in kind.__mro__ if base.__module__.startswith(_KNOWN_PACKAGES[1:])]


def _traced_names(kind: type) -> set[str]:
    """Of a class of torch's how it computes; of others all methods, inherited ones too, since they call each other."""
    entries = [entry for base in _known_bases(kind) for entry in vars(base).items()]
    return {name for name, value in entries if isinstance(value, (FunctionType, staticmethod))} or {"forward"}


def _check_methods(name: str, owner: object) -> None:
    """Refuse methods that somebody replaced on the object."""
    for attribute, value in owner.__dict__.items():
        if callable(value) and not isinstance(value, type) and callable(getattr(type(owner), attribute, None)):
            raise UntraceableError(f"{name}.{attribute} was replaced")


def _check_unwatched(name: str, module: nn.Module) -> None:
    """Refuse hooks and methods that somebody replaced on the object."""
    if any(getattr(module, hooks) for hooks in _HOOKS):
        raise UntraceableError(f"{name} has hooks")
    _check_methods(name, module)
    for attribute, value in module.__dict__.items():
        if isinstance(value, (th.Tensor, np.ndarray)):
            raise UntraceableError(f"{name}.{attribute} is a tensor or an array, but no buffer")
    for parameter in module.parameters(recurse=False):
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise UntraceableError(f"a parameter of {name} has hooks")


def foreign_method(owner: object, names: Iterable[str], package: str) -> str | None:
    """
    Look for methods that are not the package's own: what they read besides tensors is unknown.

    :param owner: the algorithm
    :param names: methods that a trace runs through
    :param package: name of the package
    :return: a sentence that names the first foreign method, or None
    """
    for name in names:
        method = owner.__dict__.get(name) or getattr(type(owner), name, None)
        if method is not None and not _is_of(getattr(method, "__func__", method), package):
            return f"{type(owner).__name__}.{name} is overridden"
    return None


def is_known_class(kind: type) -> bool:
    """
    Whether a class is torch's, SB3's or this package's.

    :param kind: the class; of a policy with normalised observations, what that was made of counts
    """
    return getattr(kind, "policy_class", kind).__module__.partition(".")[0] in _KNOWN_PACKAGES


def foreign_methods(owner: object, base: type, package: str) -> bool:
    """
    Look for any method below a base class that is not the package's own, in the object as well.

    :param owner: the algorithm
    :param base: where the package's classes begin
    :param package: name of the package
    """
    kinds = (FunctionType, classmethod, staticmethod)
    classes = [c for c in type(owner).__mro__ if issubclass(c, base)]
    names = {name for c in classes for name, value in vars(c).items() if isinstance(value, kinds)}
    names |= {name for name in vars(owner) if isinstance(getattr(type(owner), name, None), FunctionType)}
    return foreign_method(owner, names, package) is not None


def _is_of(function: object, *packages: str) -> bool:
    """By where its code is: a wrapper calls itself what it wraps."""
    home = function.__globals__.get("__name__", "") if isinstance(function, FunctionType) else ""
    return str(home).partition(".")[0] in packages


def fingerprint(modules: Iterable[nn.Module]) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """
    What a trace of these modules depends on besides the values of their tensors.

    :param modules: the traced modules
    :return: everything plain that the trace bakes in (types, modes, numbers, what is frozen, shapes, devices), and the
        identities of the tensors
    """
    plain: list[Any] = [has_global_hooks(), is_patched(), th.get_default_dtype()]
    identities: list[int] = []
    first: dict[int, int] = {}  # which tensors and which modules are the same
    for module in submodules(*modules):
        attributes = module.__dict__
        plain.append(first.setdefault(id(module), len(first)))
        plain += [(name, first.setdefault(id(child), len(first))) for name, child in module._modules.items()]
        # Their number, because a method may be replaced by an attribute.
        plain += (type(module), len(attributes), any([attributes[hooks] for hooks in _HOOKS]))
        plain += [v for v in attributes.values() if isinstance(v, _PLAIN) or (type(v) is tuple and _is_plain_tuple(v))]
        if "action_dist" in attributes:
            distribution = attributes["action_dist"]
            # The first forward pass adds the distribution of its states.
            entries = sorted(_entries_of(distribution).keys() - {"distribution"})
            plain += (id(distribution), type(distribution), *entries)
        for tensor in (*attributes["_parameters"].values(), *attributes["_buffers"].values()):
            if tensor is not None:
                plain += (*_layout(tensor), first.setdefault(id(tensor), len(first)))
                identities.append(id(tensor))
    return tuple(plain), tuple(identities)


def _layout(tensor: Any) -> tuple[Any, ...]:
    """What can change of a tensor without its becoming another one."""
    hooks = not tensor._backward_hooks, not tensor._post_accumulate_grad_hooks
    return (tensor.requires_grad, tensor.shape, tensor.stride(), tensor.dtype, tensor.device, *hooks)


def _is_plain_tuple(value: tuple[Any, ...]) -> bool:
    return all([isinstance(entry, _PLAIN) for entry in value])


def _entries_of(distribution: object) -> dict[str, Any]:
    return getattr(distribution, "__dict__", {})


class Snapshot:
    """
    Modules as they are now, for a quick look whether they still are: at every update, and at every step of a rollout
    where a callback may change something. What differs here may still have the same :func:`fingerprint`.

    :param modules: the traced modules
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._roots = list(modules)
        self._modules = submodules(*self._roots)
        attributes = [module.__dict__ for module in self._modules]
        members = [entries[name] for entries in attributes for name in ("_parameters", "_buffers", "_modules")]
        distributions = [_entries_of(entries["action_dist"]) for entries in attributes if "action_dist" in entries]
        #: Everything that is looked up by name, and what was found there. Holding that keeps its identity from reuse.
        self._tables: list[dict[str, Any]] = [*attributes, *members]
        self._entries = self._found()
        #: Distributions get new parameters in every forward pass, and a new entry only where something is replaced.
        self._sized = [*self._tables, *distributions]
        self._sizes = [*map(len, self._sized)]
        self._tensors = [x for table in members for x in table.values() if isinstance(x, th.Tensor)]
        self._hooks = [entries[hooks] for entries in attributes for hooks in _HOOKS]
        self._plain = self._changing()

    def is_of(self, modules: Iterable[nn.Module]) -> bool:
        """
        Whether it is these modules'.

        :param modules: as many as it was made of
        """
        return all(map(is_, modules, self._roots))

    def still_holds(self) -> bool:
        """Whether nothing has been replaced, added or taken away since."""
        is_same = [*map(len, self._sized)] == self._sizes and all(map(is_, self._found(), self._entries))
        return is_same and self._changing() == self._plain

    def _found(self) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, self._tables))]

    def _changing(self) -> tuple[Any, ...]:
        """What can change in place."""
        layouts, types = [*map(_layout, self._tensors)], [*map(type, self._modules)]
        return layouts, types, any(self._hooks), has_global_hooks(), is_patched(), th.get_default_dtype()


class _Parts(nn.Module):
    """Several modules as one, so that their tensors can be replaced by a trace's inputs."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call the function while the tensors are replaced."""
        return function(*args)


class Tensors:
    """
    The parameters and buffers of some modules, in a fixed order.

    :param modules: name → module
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._parts = _Parts(modules)
        named: dict[str, th.Tensor] = {**dict(self._parts.named_parameters()), **dict(self._parts.named_buffers())}
        #: The tensors themselves.
        self.values = list(named.values())

    def replaced(self, values: Sequence[th.Tensor], function: Callable[..., Any], *args: Any) -> Any:
        """
        ``function(*args)`` with other tensors in the modules' place.

        :param values: in the order of :attr:`values`
        """
        new = {id(old): value for old, value in zip(self.values, values, strict=True)}
        # A module with several names, as the features extractor of a stock policy, is one place here: with two, putting
        # the tensors back would leave the replacement in the second.
        replacement = {
            f"{prefix}.{name}": new[id(tensor)]
            for prefix, module in self._parts.named_modules()
            for name, tensor in {**module._parameters, **module._buffers}.items()
            if tensor is not None
        }
        return th.func.functional_call(self._parts, replacement, (function, *args), tie_weights=False)


@dataclass(frozen=True)
class Known:
    """Modules in one state: the number of all that a trace of them bakes in, their tensors, why none can be made."""

    number: int
    tensors: Tensors
    refusal: str | None
