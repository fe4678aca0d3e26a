"""
The one class that subclasses SB3's ``OnPolicyAlgorithm``: construction, collection, schedules, save and load.
The algorithms only add their update.
"""

import inspect
import io
import pathlib
import time
import warnings
from collections.abc import Iterable
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BasePolicy
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticCnnPolicy, ActorCriticPolicy, MultiInputActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.utils import obs_as_tensor, update_learning_rate
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_pgplus.buffers import RolloutEnd, TorchDictRolloutBuffer, TorchRolloutBuffer
from sb3_pgplus.construction import PLUMBING, bind, locate_class, reject_unknown, signature_of
from sb3_pgplus.errors import HyperparameterError
from sb3_pgplus.files import write_atomically
from sb3_pgplus.guards import check_finite_step, without_distribution_checks
from sb3_pgplus.hparams import PolicyGradientHparams
from sb3_pgplus.metrics import Metrics
from sb3_pgplus.policies import (
    ACTIVATION_CLASSES,
    RunningMoments,
    critic_only_parameters,
    is_normalizable,
    normalized_policy_class,
)
from sb3_pgplus.rollouts import RolloutProcessing, value_layer
from sb3_pgplus.schedules import as_schedule, describe_schedule, is_constant
from sb3_pgplus.updates import GradientUpdates

H = TypeVar("H", bound=PolicyGradientHparams)

#: What `load` accepts besides constructor arguments: SB3's own attributes that scripts replace there.
_LOADABLE = ("lr_schedule", "n_envs", "num_timesteps", "policy_class", "observation_space", "action_space", "start_time")

#: Hyperparameters that shape the networks or what is saved with them.
_FIXED_AT_CONSTRUCTION = ("normalize_observations", "normalize_rewards", "normalize_value_targets", "activation_fn")


class PolicyGradientPlus(RolloutProcessing, GradientUpdates, OnPolicyAlgorithm, Generic[H]):
    """
    Base of A2CPlus, PPOPlus and TRPOPlus. See :class:`sb3_pgplus.PPOPlus` for what a user sees.

    A subclass names its hyperparameters (``hparams_class``) and SB3's order of positional arguments (``positional``),
    and implements :meth:`update`. To extend an algorithm, override one of its small methods; :meth:`before_update` and
    :meth:`after_update` run around every update.

    :param policy: ``"MlpPolicy"``, ``"CnnPolicy"``, ``"MultiInputPolicy"`` or an ``ActorCriticPolicy`` subclass
    :param env: environment, its id, or None (a loaded model that only predicts)
    :raises TypeError: on an unknown argument or a value of the wrong type
    :raises ValueError: on a value that is not allowed
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": ActorCriticPolicy,
        "CnnPolicy": ActorCriticCnnPolicy,
        "MultiInputPolicy": MultiInputActorCriticPolicy,
    }
    hparams_class: type[H]
    positional: ClassVar[tuple[str, ...]]
    #: Hyperparameters that only our own buffer can serve.
    needs_torch_buffer: ClassVar[tuple[str, ...]] = ("normalize_value_targets",)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            own = inspect.signature(cls.__dict__["__init__"])
            cls.__signature__ = own.replace(parameters=list(own.parameters.values())[1:])  # type: ignore[attr-defined]
        elif "hparams_class" in cls.__dict__:
            cls.__signature__ = signature_of(cls.hparams_class, cls.positional)  # type: ignore[attr-defined]

    def __init__(
        self, policy: str | type[ActorCriticPolicy], env: GymEnv | str | None, *args: Any, **kwargs: Any
    ) -> None:
        defaults = {**self.hparams_class.defaults(), **PLUMBING}
        arguments = bind(type(self).__name__, self.positional, defaults, args, kwargs)
        plumbing = {name: arguments.pop(name) for name in PLUMBING}
        set_up = plumbing.pop("_init_setup_model")
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]  # SB3 takes None too
            **{name: arguments.get(name, 0.0) for name in _SB3_HPARAMS},
            supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
            _init_setup_model=False,
            **plumbing,
        )
        self.__dict__.update(arguments)
        self._reset_training_state()
        if set_up:
            self._setup_model()

    def _reset_training_state(self) -> None:
        """State beyond SB3's; plain values, so that saving them needs no pickle."""
        # What "auto" came to: a loaded model must not depend on the environment it is loaded with.
        self._normalizes_observations: bool | None = None
        self._normalizes_rewards: bool | None = None
        self._observations_merged = False
        self._carried_returns: list[float] = []
        self._kl_lr_scale = 1.0
        self._kl_coef_scale = 1.0
        self._nonfinite_updates = 0
        self._nonfinite_in_a_row = 0
        self._warned_short_learns = False

    # --- set-up -------------------------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        self.hyperparameters_at(1.0)  # validates, also what `load` put in place
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        self._decide_normalization()
        self._check_batch()
        self.rollout_buffer = self._make_rollout_buffer()
        self.policy = self._make_policy()
        self.reward_normalizer = RunningMoments().to(self.device)
        self.value_normalizer = RunningMoments().to(self.device)
        self._rollout_end = RolloutEnd()
        self._maybe_recommend_cpu()

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule = as_schedule("learning_rate", self.learning_rate)
        self._lr_schedule_source = self.learning_rate

    def _check_batch(self) -> None:
        """Checks that need the number of environments; algorithms with minibatches add theirs."""

    def _decide_normalization(self) -> None:
        """Resolve ``"auto"`` once; a loaded model keeps what it was trained with."""
        wrapper = unwrap_vec_normalize(self.env) if self.env is not None else None
        outside = {
            "observations": wrapper is not None and wrapper.norm_obs,
            "rewards": wrapper is not None and wrapper.norm_reward,
        }
        for what, is_outside in outside.items():
            decided = getattr(self, f"_normalizes_{what}")
            if is_outside and (decided or getattr(self, f"normalize_{what}") is True):
                raise ValueError(
                    f"the model normalises {what} (`normalize_{what}`={getattr(self, f'normalize_{what}')!r}) and so does "
                    "the environment's VecNormalize: switch one of them off"
                )
            if decided is None:
                setattr(self, f"_normalizes_{what}", self._decide(what, is_outside))

    def _decide(self, what: str, is_outside: bool) -> bool:
        setting = getattr(self, f"normalize_{what}")
        if setting == "auto" and is_outside:
            warnings.warn(f"VecNormalize normalises the {what} already, so the model leaves them to it.", stacklevel=2)
            return False
        if what == "observations" and not is_normalizable(self.observation_space, floats_only=setting == "auto"):
            if setting is True:
                raise ValueError(
                    f"`normalize_observations`=True, but there is nothing to normalise in {self.observation_space}"
                )
            return False
        return bool(setting)

    def _make_rollout_buffer(self) -> RolloutBuffer:
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
        if not isinstance(buffer, TorchRolloutBuffer):
            self._check_foreign_buffer(buffer)
        return buffer

    def _check_foreign_buffer(self, buffer: RolloutBuffer) -> None:
        wanted = [name for name in self.needs_torch_buffer if getattr(self, name) not in (None, False)]
        if self.__dict__["advantage_estimator"] != "gae":
            wanted.append("advantage_estimator")
        if wanted:
            raise HyperparameterError(
                f"`{wanted[0]}`={getattr(self, wanted[0])!r} needs sb3_pgplus.TorchRolloutBuffer, "
                f"but `rollout_buffer_class` is {type(buffer).__name__}"
            )

    def _make_policy(self) -> ActorCriticPolicy:
        policy_class = cast(type[ActorCriticPolicy], self.policy_class)
        kwargs = self._policy_arguments()
        if self._normalizes_observations:
            policy_class = normalized_policy_class(policy_class)
            kwargs["clip_observations"] = self.__dict__["clip_observations"]
            kwargs["normalize_floats_only"] = self.__dict__["normalize_observations"] == "auto"
        policy = policy_class(
            self.observation_space, self.action_space, self.lr_schedule, use_sde=self.use_sde, **kwargs
        ).to(self.device)
        if self.normalize_value_targets:
            value_layer(policy)
        if self.__dict__["critic_learning_rate"] is not None:
            self._split_optimizer(policy)
        return policy

    def _policy_arguments(self) -> dict[str, Any]:
        """``policy_kwargs`` together with the flat hyperparameters that concern the policy."""
        given = {name: self.__dict__[name] for name in ("ortho_init", "log_std_init", "activation_fn")}
        flat = {name: ACTIVATION_CLASSES.get(value, value) for name, value in given.items() if value is not None}
        kwargs = dict(self.policy_kwargs)
        for name in flat.keys() & kwargs.keys():
            if flat[name] != kwargs[name]:
                raise HyperparameterError(
                    f"`{name}`={given[name]!r} contradicts policy_kwargs[{name!r}]={kwargs[name]!r}: give one of them"
                )
        if self.__dict__["adam_eps"] is not None:
            kwargs["optimizer_kwargs"] = {
                **(kwargs.get("optimizer_kwargs") or {}),
                "eps": self.__dict__["adam_eps"],
            }
        return {**kwargs, **flat}

    def _split_optimizer(self, policy: ActorCriticPolicy) -> None:
        """Give the critic's own parameters a group of their own: group 0 is the actor's (and shared ones)."""
        critic = critic_only_parameters(policy)
        if not critic:
            raise HyperparameterError("`critic_learning_rate` is set, but no parameter belongs to the critic alone")
        critic_ids = {id(parameter) for parameter in critic}
        actor = [parameter for parameter in policy.parameters() if id(parameter) not in critic_ids]
        optimizer_class: Any = policy.optimizer_class
        groups = [{"params": actor}, {"params": critic}]
        policy.optimizer = optimizer_class(groups, lr=self.lr_schedule(1), **policy.optimizer_kwargs)

    # --- hyperparameters ----------------------------------------------------------------------------------------------

    def hyperparameters_at(self, progress_remaining: float) -> H:
        """
        The hyperparameters as validated numbers.

        :param progress_remaining: 1 at the start of training, 0 at its end
        :raises TypeError: on a value of the wrong type
        :raises ValueError: on a value that is not allowed
        """
        return self.hparams_class.resolve(self.__dict__, progress_remaining)

    def hyperparameters(self) -> dict[str, Any]:
        """Name → value of every hyperparameter as it is set now, fit for a YAML file (schedules as strings)."""
        return {name: describe_schedule(self.__dict__[name]) for name in self.hparams_class.names()}

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        horizon = self.__dict__["schedule_timesteps"] or total_timesteps
        # SB3 lets the progress fall below 0 when the last rollout overshoots, and rates with it.
        self._current_progress_remaining = max(0.0, 1.0 - float(num_timesteps) / float(horizon))

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        if self.learning_rate is not self._lr_schedule_source:  # assigned since, which SB3 would ignore
            self._setup_lr_schedule()
        progress = self._current_progress_remaining
        rate = as_schedule("lr_schedule", self.lr_schedule)(progress) * self._kl_lr_scale
        self.logger.record("train/learning_rate", rate)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            update_learning_rate(optimizer, rate)
        critic_learning_rate = self.__dict__["critic_learning_rate"]
        if critic_learning_rate is not None:
            critic_rate = as_schedule("critic_learning_rate", critic_learning_rate)(progress)
            self.policy.optimizer.param_groups[1]["lr"] = critic_rate
            self.logger.record("train/critic_learning_rate", critic_rate)

    # --- learning -----------------------------------------------------------------------------------------------------

    def learn(  # type: ignore[override]  # takes a float, and names the log after the class
        self,
        total_timesteps: float,
        callback: MaybeCallback = None,
        log_interval: int | None = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """
        Train for at least ``total_timesteps`` environment steps (whole rollouts).

        :param total_timesteps: a number ≥ 0, ``1e6`` is fine
        :param callback: called at every step and around rollouts
        :param log_interval: iterations between two logs; None: never
        :param tb_log_name: name of the TensorBoard run; None: the class's name
        :param reset_num_timesteps: count steps (and run schedules) from 0 again
        :param progress_bar: show a bar
        :return: the model
        :raises TypeError: if the number of steps is no number
        :raises ValueError: if it is negative or not finite
        """
        steps = _whole_steps(total_timesteps)
        if not reset_num_timesteps:
            self._warn_about_short_learns()
        name = tb_log_name or type(self).__name__
        super().learn(steps, callback, log_interval, name, reset_num_timesteps, progress_bar)  # type: ignore[arg-type]
        return self

    def _warn_about_short_learns(self) -> None:
        """Schedules over "this learn's total" start again in every further call: rates would jump up and down."""
        if self._warned_short_learns or self.num_timesteps == 0 or self.__dict__["schedule_timesteps"] is not None:
            return
        given = {name: self.__dict__[name] for name in self.hparams_class.scheduled_names()}
        changing = [n for n, value in given.items() if value is not None and not is_constant(as_schedule(n, value))]
        if changing:
            self._warned_short_learns = True
            warnings.warn(
                f"learn() continues with reset_num_timesteps=False while `{'`, `'.join(changing)}` follow schedules over "
                "each call's own total, so they jump back up at every call. Set "
                "`schedule_timesteps=<steps of all calls together>` to let them run once over the whole training.",
                stacklevel=3,
            )

    def _setup_learn(self, total_timesteps: int, callback: MaybeCallback = None, *args: Any, **kwargs: Any) -> Any:
        before = self._last_obs
        result = super()._setup_learn(total_timesteps, callback, *args, **kwargs)
        if self._last_obs is not before or len(self._carried_returns) != self.n_envs:
            self._carried_returns = [0.0] * self.n_envs  # the environments were reset
        return result

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """
        Collect a rollout with the current policy and compute its advantages.

        Callbacks see SB3's local variables. Rewards are stored as they come and the final observations of truncated
        steps are kept, so that bootstrap values can be computed in one batch, and again later.

        :param env: the training environments
        :param callback: called at every step
        :param rollout_buffer: filled with the rollout
        :param n_rollout_steps: steps per environment
        :return: False if the callback asked to stop
        :raises ValueError: on a NaN or infinite observation or reward
        """
        assert self._last_obs is not None, "No previous observation was provided"
        started = time.perf_counter()
        # Batch norm and dropout in their evaluation mode.
        self.policy.set_training_mode(False)
        n_steps = 0
        rollout_buffer.reset()
        self._rollout_end = RolloutEnd()
        if self.use_sde:
            self.policy.reset_noise(env.num_envs)
        callback.on_rollout_start()

        while n_steps < n_rollout_steps:
            if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
                self.policy.reset_noise(env.num_envs)
            with th.no_grad():
                obs_tensor = obs_as_tensor(self._last_obs, self.device)
                actions, values, log_probs = self.policy(obs_tensor)
            actions = actions.cpu().numpy()
            clipped_actions = self._environment_actions(actions)
            new_obs, rewards, dones, infos = env.step(clipped_actions)
            self.num_timesteps += env.num_envs
            check_finite_step(new_obs, rewards, self.num_timesteps // env.num_envs)

            # Callbacks read these local variables under SB3's names.
            callback.update_locals(locals())
            if not callback.on_step():
                return False

            self._update_info_buffer(infos, dones)
            self._keep_final_observations(n_steps, dones, infos)
            n_steps += 1
            self._store(rollout_buffer, actions, rewards, values, log_probs)
            self._last_obs = new_obs  # type: ignore[assignment]
            self._last_episode_starts = dones

        self._finish_rollout(rollout_buffer, self.hyperparameters_at(self._current_progress_remaining))
        self._log_rollout(n_steps * env.num_envs, time.perf_counter() - started)
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _environment_actions(self, actions: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """What the environment gets for what the policy sampled."""
        if not isinstance(self.action_space, spaces.Box):
            return actions
        if self.policy.squash_output:
            return self.policy.unscale_action(actions)
        return np.clip(actions, self.action_space.low, self.action_space.high)

    def _policy_actions(self, actions: th.Tensor) -> th.Tensor:
        """What ``evaluate_actions`` takes for what a buffer stores."""
        return actions.long().flatten() if isinstance(self.action_space, spaces.Discrete) else actions

    def _store(
        self,
        buffer: RolloutBuffer,
        actions: np.ndarray[Any, Any],
        rewards: np.ndarray[Any, Any],
        values: th.Tensor,
        log_probs: th.Tensor,
    ) -> None:
        if isinstance(self.action_space, spaces.Discrete):
            actions = actions.reshape(-1, 1)
        last: Any = self._last_obs
        starts: Any = self._last_episode_starts
        buffer.add(last, actions, rewards, starts, self._denormalized(values), log_probs)

    def _log_rollout(self, n_samples: int, seconds: float) -> None:
        self.logger.record("time/rollout_fps", int(n_samples / max(seconds, 1e-9)))

    def train(self) -> None:
        """Update the policy on the rollout that was just collected."""
        started = time.perf_counter()
        self.policy.set_training_mode(True)
        hp = self.hyperparameters_at(self._current_progress_remaining)
        self._update_learning_rate(self.policy.optimizer)
        metrics = Metrics()
        with without_distribution_checks():
            self.before_update(hp)
            self.update(hp, metrics)
            self.after_update(hp)
        self._log_update(metrics)
        self._merge_observations(self.rollout_buffer)
        self.logger.record("time/update_seconds", time.perf_counter() - started)

    def update(self, hp: H, metrics: Metrics) -> None:
        """
        The algorithm: change the policy's parameters.

        :param hp: hyperparameters of this update, schedules evaluated
        :param metrics: collects what is logged
        """
        raise NotImplementedError

    def before_update(self, hp: H) -> None:
        """
        Called before every update. Override to prepare a loss of your own.

        :param hp: hyperparameters of this update
        """

    def after_update(self, hp: H) -> None:
        """
        Called after every update. Override for an auxiliary phase of your own.

        :param hp: hyperparameters of this update
        """

    # --- save and load ------------------------------------------------------------------------------------------------

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "reward_normalizer", "value_normalizer", "_rollout_end"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        names = ["policy", "policy.optimizer"]
        if self._normalizes_rewards:
            names.append("reward_normalizer")
        if self.normalize_value_targets:
            names.append("value_normalizer")
        return names, []

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """
        Save the model, its optimiser and its normalisation statistics in one zip file.

        The file is written beside its place and renamed, so an interrupted save leaves the old one.

        :param path: where to, ``.zip`` is added if the name has no suffix; or a file opened for writing
        :param exclude: names of attributes to leave out
        :param include: names of attributes to keep that would be left out
        """
        if not isinstance(path, (str, pathlib.Path)) or pathlib.Path(path).is_dir():
            super().save(path, exclude, include)  # nothing to rename, or SB3's rule for folders
            return
        archive = io.BytesIO()
        super().save(archive, exclude, include)
        target = pathlib.Path(path)
        write_atomically(target if target.suffix else target.with_name(f"{target.name}.zip"), archive.getvalue())

    @classmethod
    def load(
        cls, path: str | pathlib.Path | io.BufferedIOBase, env: GymEnv | None = None, *args: Any, **kwargs: Any
    ) -> Self:
        """
        Load a model. Arguments are those of SB3's ``load``; hyperparameters may be changed by keyword.

        :param path: file name, with or without ``.zip``, or an open file
        :param env: environment to continue on; None suffices to predict
        :raises TypeError: on an unknown keyword
        :raises ValueError: on a value that is not allowed, or that cannot change after construction
        """
        own = inspect.signature(OnPolicyAlgorithm.load).parameters
        settings = [name for name in kwargs if name not in own]
        reject_unknown(f"{cls.__name__}.load", settings, [*cls.hparams_class.names(), *PLUMBING, *_LOADABLE])
        for name in _FIXED_AT_CONSTRUCTION:
            if name in kwargs:
                raise ValueError(f"`{name}` is part of the saved model and cannot be changed by load()")
        return super().load(path, env, *args, **kwargs)


#: Hyperparameters that SB3's own constructor asks for (TRPO has no use for the last three).
_SB3_HPARAMS = ("learning_rate", "n_steps", "gamma", "gae_lambda", "ent_coef", "vf_coef", "max_grad_norm")


def _whole_steps(total_timesteps: Any) -> int:
    if isinstance(total_timesteps, (bool, str)) or not np.isscalar(total_timesteps):
        raise TypeError(f"`total_timesteps` must be a number, got {total_timesteps!r}")
    if not 0 <= total_timesteps < float("inf"):
        raise ValueError(f"`total_timesteps` must be finite and >= 0, got {total_timesteps!r}")
    return int(total_timesteps)
