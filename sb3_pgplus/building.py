"""The part of the base class that makes buffer and policy from the hyperparameters."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_pgplus.buffers import TorchDictRolloutBuffer, TorchRolloutBuffer, has_own_advantages, note_discounts
from sb3_pgplus.construction import locate_class
from sb3_pgplus.core.advantages import gae_sequential
from sb3_pgplus.errors import HyperparameterError, warn_user
from sb3_pgplus.hparams import PolicyGradientHparams
from sb3_pgplus.optimizers import fuse
from sb3_pgplus.policies import (
    ACTIVATION_CLASSES,
    critic_only_parameters,
    is_normalizable,
    normalized_policy_class,
)
from sb3_pgplus.rollouts import value_layer

if TYPE_CHECKING:  # a mix-in of one class: let the type checker see what it is mixed into
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm as _Base
else:
    _Base = object


class ModelBuilding(_Base):
    """Normalisation settings, rollout buffer, policy and optimiser."""

    #: Hyperparameters that only our own buffer can serve.
    needs_torch_buffer: ClassVar[tuple[str, ...]] = ("normalize_value_targets",)
    _normalizes_observations: bool | None

    def _decide_normalization(self, hp: PolicyGradientHparams) -> None:
        """Resolve ``"auto"`` once; a loaded model keeps what it was trained with."""
        outside = normalized_outside(self.env)
        left: list[str] = []
        for what, is_outside in outside.items():
            decided, setting = getattr(self, f"_normalizes_{what}"), getattr(hp, f"normalize_{what}")
            if is_outside and (decided or setting is True):
                raise ValueError(
                    f"the model normalises {what} (`normalize_{what}`={setting!r}) and so does the environment's "
                    "VecNormalize: switch one of them off"
                )
            if decided is None:
                setattr(self, f"_normalizes_{what}", not is_outside and self._decide(what, setting))
                self._refuse_arguments_of_ours()
                left += [what] * (is_outside and setting == "auto")
        if left:
            warn_user(f"VecNormalize normalises {' and '.join(left)} already, so the model leaves them to it.")

    def _refuse_arguments_of_ours(self) -> None:
        """Not in files, which had them before this was refused."""
        for name in ("clip_observations", "normalize_floats_only"):
            if self._normalizes_observations and name in self.policy_kwargs:
                raise HyperparameterError(
                    f"policy_kwargs[{name!r}] is set by the algorithm, which normalises observations: give "
                    "`clip_observations` and `normalize_observations` to it"
                )

    def _decide(self, what: str, setting: bool | str) -> bool:
        if what == "observations" and not is_normalizable(self.observation_space, floats_only=setting == "auto"):
            if setting is True:
                raise ValueError(
                    f"`normalize_observations`=True, but there is nothing to normalise in {self.observation_space}"
                )
            return False
        return bool(setting)

    def _make_rollout_buffer(self, hp: PolicyGradientHparams) -> RolloutBuffer:
        if isinstance(self.rollout_buffer_class, str):  # RL Zoo's YAML can only name a class
            self.rollout_buffer_class = locate_class(self.rollout_buffer_class)
        is_dict = isinstance(self.observation_space, spaces.Dict)
        buffer_class = self.rollout_buffer_class or (TorchDictRolloutBuffer if is_dict else TorchRolloutBuffer)
        buffer = buffer_class(
            self.n_steps,
            self.observation_space,
            self.action_space,
            device=self.device,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
            n_envs=self.n_envs,
            **self.rollout_buffer_kwargs,
        )
        note_discounts(buffer)
        if not isinstance(buffer, TorchRolloutBuffer):
            self._check_foreign_buffer(hp, buffer)
        elif has_own_advantages(buffer) and hp.advantage_estimator != "gae":
            raise HyperparameterError(
                f"`advantage_estimator`={hp.advantage_estimator!r} has no effect with `rollout_buffer_class`="
                f"{type(buffer).__name__}, whose compute_returns_and_advantage is its own"
            )
        elif hp.sb3_exact:
            buffer.memory_format, buffer.estimate = th.contiguous_format, gae_sequential
        return buffer

    def _check_foreign_buffer(self, hp: PolicyGradientHparams, buffer: RolloutBuffer) -> None:
        wanted = [name for name in self.needs_torch_buffer if getattr(hp, name) not in (None, False, "auto")]
        if hp.advantage_estimator != "gae":
            wanted.append("advantage_estimator")
        if wanted:
            raise HyperparameterError(
                f"`{wanted[0]}`={getattr(hp, wanted[0])!r} needs sb3_pgplus.TorchRolloutBuffer, "
                f"but `rollout_buffer_class` is {type(buffer).__name__}"
            )

    def _make_policy(self, hp: PolicyGradientHparams) -> ActorCriticPolicy:
        policy_class = cast(type[ActorCriticPolicy], self.policy_class)
        kwargs = self._policy_arguments(hp)
        if self._normalizes_observations:
            policy_class = normalized_policy_class(policy_class)
            kwargs["clip_observations"] = hp.clip_observations
            kwargs["normalize_floats_only"] = hp.normalize_observations == "auto"
        policy = self._new_policy(policy_class, kwargs, hp).to(self.device)
        if hp.normalize_value_targets:
            value_layer(policy)
        if getattr(hp, "critic_learning_rate", None) is not None:
            self._split_optimizer(policy)
        if not hp.sb3_exact:
            fuse(policy.optimizer)
        return policy

    def _new_policy(
        self, policy_class: type[ActorCriticPolicy], kwargs: Mapping[str, Any], hp: PolicyGradientHparams
    ) -> ActorCriticPolicy:
        """A class that fixes an argument for itself, and hands on all others, goes before a default of ours."""
        try:
            return policy_class(
                self.observation_space, self.action_space, self.lr_schedule, use_sde=self.use_sde, **kwargs
            )
        except TypeError as error:
            name = str(error).partition("multiple values for keyword argument '")[2].rstrip("'")
            is_default = name in kwargs and name not in self.policy_kwargs and name in hp.names()
            if not is_default or getattr(hp, name) != hp.defaults()[name]:
                raise
            return self._new_policy(policy_class, {n: value for n, value in kwargs.items() if n != name}, hp)

    def _policy_arguments(self, hp: PolicyGradientHparams) -> dict[str, Any]:
        """``policy_kwargs`` together with the flat hyperparameters that concern the policy."""
        kwargs, defaults = dict(self.policy_kwargs), hp.defaults()
        activation = kwargs.get("activation_fn")
        if isinstance(activation, str):
            if activation not in ACTIVATION_CLASSES:
                raise HyperparameterError(
                    f"policy_kwargs['activation_fn'] is {activation!r}; allowed are a module class and "
                    f"{', '.join(map(repr, ACTIVATION_CLASSES))}"
                )
            kwargs["activation_fn"] = ACTIVATION_CLASSES[activation]
        for name in ("ortho_init", "log_std_init", "activation_fn"):
            value, is_default = getattr(hp, name), getattr(hp, name) == defaults[name]
            value = ACTIVATION_CLASSES.get(value, value)
            # What the user writes in policy_kwargs goes before a default; two things that were both written must agree.
            if value is None or (is_default and (name in kwargs or not _accepts(self.policy_class, name))):
                continue
            if kwargs.setdefault(name, value) != value:
                raise HyperparameterError(
                    f"`{name}`={getattr(hp, name)!r} contradicts policy_kwargs[{name!r}]={kwargs[name]!r}: give one"
                )
        if hp.adam_eps is not None:
            kwargs["optimizer_kwargs"] = self._with_eps(kwargs, hp.adam_eps)
        return kwargs

    @staticmethod
    def _with_eps(policy_kwargs: dict[str, Any], eps: float) -> dict[str, Any]:
        optimizer_class = policy_kwargs.get("optimizer_class", th.optim.Adam)
        given = policy_kwargs.get("optimizer_kwargs") or {}
        if "eps" not in inspect.signature(optimizer_class).parameters:
            raise HyperparameterError(f"`adam_eps`={eps}, but {optimizer_class.__name__} takes no eps")
        if given.get("eps", eps) != eps:
            raise HyperparameterError(
                f"`adam_eps`={eps} contradicts policy_kwargs['optimizer_kwargs']['eps']={given['eps']}: give one"
            )
        return {**given, "eps": eps}

    def _split_optimizer(self, policy: ActorCriticPolicy) -> None:
        """Give the critic's own parameters a group of their own: group 0 is the actor's (and shared ones)."""
        critic = critic_only_parameters(policy)
        if not critic:
            raise HyperparameterError("`critic_learning_rate` is set, but no parameter belongs to the critic alone")
        groups, own = policy.optimizer.param_groups, {id(parameter) for parameter in policy.parameters()}
        made_by: Any = policy.optimizer_class  # or a function that makes one
        is_stock = not isinstance(made_by, type) or type(policy.optimizer) is made_by
        if not is_stock or len(groups) != 1 or {id(parameter) for parameter in groups[0]["params"]} != own:
            raise HyperparameterError(
                f"`critic_learning_rate` is set, but {cast(Any, self.policy_class).__name__} made its own optimiser "
                f"({type(policy.optimizer).__name__}), which another would replace: give the critic's parameters a "
                "group with a rate of its own there"
            )
        critic_ids = {id(parameter) for parameter in critic}
        actor = [parameter for parameter in policy.parameters() if id(parameter) not in critic_ids]
        optimizer_class: Any = policy.optimizer_class
        both = [{"params": actor}, {"params": critic}]
        policy.optimizer = optimizer_class(both, lr=self.lr_schedule(1), **policy.optimizer_kwargs)


def _accepts(policy_class: type[Any], name: str) -> bool:
    """Whether a policy's constructor takes an argument of that name."""
    parameters = inspect.signature(policy_class).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def normalized_outside(env: VecEnv | None) -> dict[str, bool]:
    """What a VecNormalize around the environments normalises: ``{"observations": …, "rewards": …}``."""
    wrapper = unwrap_vec_normalize(env) if env is not None else None
    if wrapper is None:
        return {"observations": False, "rewards": False}
    return {"observations": wrapper.norm_obs, "rewards": wrapper.norm_reward}
