"""
The one class that subclasses SB3's ``OnPolicyAlgorithm``: construction, collection, schedules, save and load.
The algorithms only add their update.
"""

import inspect
import math
import operator
import time
from collections.abc import Callable
from numbers import Real
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from stable_baselines3.common.utils import update_learning_rate
from stable_baselines3.common.vec_env import VecEnv

from sb3_pgplus.buffers import RolloutEnd, TorchRolloutBuffer
from sb3_pgplus.building import ModelBuilding, normalized_outside
from sb3_pgplus.callback_tree import is_known, is_nobody, tell_failure, tell_return
from sb3_pgplus.construction import PLUMBING, bind, check_policy, checked_plumbing, signature_of
from sb3_pgplus.engine import Engine
from sb3_pgplus.errors import HyperparameterError, warn_user
from sb3_pgplus.guards import check_finite_step, without_distribution_checks
from sb3_pgplus.hparams import PolicyGradientHparams
from sb3_pgplus.metrics import Metrics
from sb3_pgplus.persistence import Persistence
from sb3_pgplus.policies import (
    RunningMoments,
    has_convolutions,
    has_stock_features,
    plain_modules,
    set_training_mode,
    submodules,
)
from sb3_pgplus.resuming import Resuming
from sb3_pgplus.rollouts import RolloutProcessing
from sb3_pgplus.schedules import as_schedule, depends_on_progress_alone, describe_schedule, is_constant
from sb3_pgplus.tracing import foreign_methods, is_known_class
from sb3_pgplus.training_state import ActsBetweenIterations, between_iterations
from sb3_pgplus.updates import GradientUpdates
from sb3_pgplus.vec_env.make import make_vec_env
from sb3_pgplus.vec_env.tensors import TensorVecEnv

H = TypeVar("H", bound=PolicyGradientHparams)


class PolicyGradientPlus(
    ModelBuilding, RolloutProcessing, GradientUpdates, Resuming, Persistence, OnPolicyAlgorithm, Generic[H]
):
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
    schedule_timesteps: int | None
    sb3_exact: bool
    positional: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            own = inspect.signature(cls.__dict__["__init__"])
            cls.__signature__ = own.replace(parameters=list(own.parameters.values())[1:])  # type: ignore[attr-defined]
        elif "hparams_class" in cls.__dict__:
            cls.__signature__ = signature_of(cls.hparams_class, cls.positional)  # type: ignore[attr-defined]
            cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or '')}\n\n{cls.hparams_class.describe()}"

    def __init__(
        self, policy: str | type[ActorCriticPolicy], env: GymEnv | str | None, *args: Any, **kwargs: Any
    ) -> None:
        defaults = {**self.hparams_class.defaults(), **PLUMBING}
        arguments = bind(type(self).__name__, self.positional, defaults, args, kwargs)
        plumbing = checked_plumbing({name: arguments.pop(name) for name in PLUMBING})
        check_policy(policy)
        set_up = plumbing.pop("_init_setup_model")
        super().__init__(
            policy,
            make_environments(env, arguments.pop("n_envs")),  # type: ignore[arg-type]  # SB3 takes None too
            **{name: arguments.get(name, 0.0) for name in _SB3_HPARAMS},
            supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
            _init_setup_model=False,
            **plumbing,
        )
        self.__dict__.update(arguments)
        self._reset_training_state()
        self._env_id = env if isinstance(env, str) else None
        if set_up:
            self._setup_model()

    def _reset_training_state(self) -> None:
        """State beyond SB3's; plain values, so that saving them needs no pickle."""
        # What "auto" came to: a loaded model must not depend on the environment it is loaded with.
        self._normalizes_observations: bool | None = None
        self._normalizes_rewards: bool | None = None
        self._observations_merged = True
        self._device_infos = []
        self._carried_returns: list[float] = []
        self._rollout_started_at = 0
        self._kl_lr_scale = 1.0
        self._kl_coef_scale = 1.0
        self._nonfinite_updates = 0
        self._nonfinite_in_a_row = 0
        self._warned_short_learns = False
        self._iteration = 0
        self._is_logged = True
        self._unfinished = None
        self._resumed_from = None
        self._checkpoint_folder = None
        #: Of the last `hyperparameters_at`: values, progress, result, and whether that depends on the progress alone.
        self._resolved: tuple[list[Any], float, H, bool] | None = None
        self._built_with = {}

    # --- set-up -------------------------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        if not hasattr(self, "observation_space"):
            raise ValueError("`env` is None: a new model needs an environment (load() can do without)")
        # Validates, also what `load` put in place, and schedules along the way rather than in the middle of training.
        _, _, hp = (self.hyperparameters_at(progress) for progress in (0.0, 0.5, 1.0))
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        self._decide_normalization(hp)
        if self.env is not None:
            self._check_batch(hp, self.env.num_envs)
        self.rollout_buffer = self._make_rollout_buffer(hp)
        self.policy = self._make_policy(hp)
        if isinstance(self.rollout_buffer, TorchRolloutBuffer) and not hp.sb3_exact and has_stock_features(self.policy):
            self.rollout_buffer.memory_format = th.channels_last
        self.reward_normalizer = RunningMoments().to(self.device)
        self.value_normalizer = RunningMoments().to(self.device)
        self._rollout_end = RolloutEnd()
        self._engine = Engine(hp.compile, announce=self.verbose >= 1)
        self._maybe_recommend_cpu()
        self._note_what_is_built()

    def _setup_lr_schedule(self) -> None:
        self.lr_schedule = as_schedule("learning_rate", self.learning_rate)
        self._lr_schedule_source = self.learning_rate

    def _check_batch(self, hp: H, n_envs: int) -> None:
        """Checks that need the number of environments; algorithms with minibatches add theirs."""

    # --- hyperparameters ----------------------------------------------------------------------------------------------

    def hyperparameters_at(self, progress_remaining: float) -> H:
        """
        The hyperparameters as validated numbers.

        :param progress_remaining: 1 at the start of training, 0 at its end
        :raises TypeError: on a value of the wrong type
        :raises ValueError: on a value that is not allowed
        """
        names = self.hparams_class.names()
        values = [self.__dict__[name] for name in names]
        if self._resolved is None or any(map(operator.is_not, values, self._resolved[0])):
            self._refuse_changes_of_what_is_built()
            found = self.hparams_class.resolve(self.__dict__, progress_remaining)
            scheduled = [self.__dict__[name] for name in self.hparams_class.scheduled_names()]
            is_fixed = all(map(depends_on_progress_alone, scheduled))
        elif progress_remaining == self._resolved[1]:
            return self._resolved[2]
        else:
            found, is_fixed = self._resolved[2].later(self.__dict__, progress_remaining), self._resolved[3]
        self._resolved = (values, progress_remaining, found, is_fixed)
        return found

    def hyperparameters(self) -> dict[str, Any]:
        """Name → value of every hyperparameter as it is set now, fit for a YAML file (schedules as strings)."""
        return {name: describe_schedule(self.__dict__[name]) for name in self.hparams_class.names()}

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        """
        The position on the schedules of the update that follows: where its rollout began, so that the first update has
        the start value and the last one is not empty. SB3's is where the rollout ended (``sb3_exact``).
        """
        horizon = self.schedule_timesteps or total_timesteps
        steps = num_timesteps if self.sb3_exact else self._rollout_started_at
        # SB3 lets the progress fall below 0 when the last rollout overshoots, and rates with it.
        self._current_progress_remaining = max(0.0, 1.0 - float(steps) / float(horizon))

    def _update_learning_rate(self, optimizers: list[th.optim.Optimizer] | th.optim.Optimizer) -> None:
        source = self._lr_schedule_source  # an equal number in a copy of the model
        if self.learning_rate is not source and self.learning_rate != source:  # assigned, which SB3 would ignore
            self._setup_lr_schedule()
        progress = self._current_progress_remaining
        rate = as_schedule("lr_schedule", self.lr_schedule)(progress) * self._kl_lr_scale
        self.logger.record("train/learning_rate", rate)
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            update_learning_rate(optimizer, rate)
        critic_rate = getattr(self.hyperparameters_at(progress), "critic_learning_rate", None)
        if critic_rate is not None:
            if len(self.policy.optimizer.param_groups) < 2:
                raise HyperparameterError("`critic_learning_rate` was None at construction: set it there")
            self.policy.optimizer.param_groups[1]["lr"] = critic_rate
            self.logger.record("train/critic_learning_rate", critic_rate)

    # --- learning -----------------------------------------------------------------------------------------------------

    def learn(
        self,
        total_timesteps: float,
        callback: MaybeCallback = None,
        log_interval: int | None = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """
        Train for at least ``total_timesteps`` environment steps (whole rollouts). After :meth:`resume`, finish the
        interrupted training: ``total_timesteps`` is then what that was given, steps that are done included.

        :param total_timesteps: a number ≥ 0, ``1e6`` is fine
        :param callback: called at every step and around rollouts; one that has a method ``on_training_failure(error)``
            is told when an error, or Ctrl-C, ends the training
        :param log_interval: iterations between two logs; None: never
        :param tb_log_name: name of the TensorBoard run; None: the class's name
        :param reset_num_timesteps: count steps (and run schedules) from 0 again
        :param progress_bar: show a bar
        :return: the model
        :raises TypeError: if the number of steps is no number
        :raises ValueError: if it is negative or not finite, ``log_interval`` is not positive, there is no environment,
            or a setting was assigned that a model has from the start
        """
        steps = _whole_steps(total_timesteps)
        if self.env is None:
            raise ValueError("the model has no environment to learn in: set_env(env), or load(path, env=env)")
        if not th.is_grad_enabled() or th.is_inference_mode_enabled():
            raise RuntimeError("learn() takes gradients: call it outside of no_grad() and inference_mode()")
        if log_interval is not None and log_interval < 1:
            raise ValueError(f"`log_interval` must be at least 1, or None for no logs, got {log_interval}")
        self._refuse_changes_of_what_is_built()
        if not reset_num_timesteps and self._unfinished is None:
            self._warn_about_short_learns()
        name = tb_log_name or type(self).__name__
        try:
            self._iterate(steps, callback, log_interval, name, reset_num_timesteps, progress_bar)
        except BaseException as error:
            if self._unlogged is not None:
                self._log_update(*self._unlogged)
            tell_failure(callback, error)
            raise
        finally:
            self._engine.is_undisturbed, self._is_logged = False, True
        self._merge_observations(self.rollout_buffer)
        tell_return(callback)
        return self

    def _iterate(
        self,
        total_timesteps: int,
        callback: Any,
        log_interval: int | None,
        tb_log_name: str,
        reset_num_timesteps: bool,
        progress_bar: bool,
    ) -> None:
        """SB3's loop, with a place between iterations and a counter of them that a checkpoint can keep."""
        found = self._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        total_timesteps, callback = found
        iteration = self._iteration  # callbacks read local variables under SB3's names
        callback.on_training_start(locals(), globals())
        self._finish_resuming(callback)
        assert self.env is not None
        listeners = between_iterations(callback)
        first, ours_alone = iteration, self._runs_ours_alone(callback)
        alone = ours_alone and is_nobody(callback) and type(self.logger) is Logger
        while self._may_go_on(listeners, callback) and self.num_timesteps < total_timesteps:
            if not self.collect_rollouts(self.env, callback, self.rollout_buffer, n_rollout_steps=self.n_steps):
                break
            self._check_collected()
            self._iteration = iteration = iteration + 1
            self._update_current_progress_remaining(self.num_timesteps, total_timesteps)
            is_last = self.num_timesteps >= total_timesteps
            # Nobody sees what the next update overwrites.
            self._is_logged = is_last or not alone or bool(log_interval and (iteration + 1) % log_interval == 0)
            if log_interval is not None and iteration % log_interval == 0:
                self.dump_logs(iteration)
            self.train()
            # The first pass through the policy still changes something: which distribution it has.
            self._engine.is_undisturbed = ours_alone and iteration > first + 1
        callback.on_training_end()

    def _check_collected(self) -> None:
        """
        :raises RuntimeError: if somebody else collected the rollout: statistics and schedules stand still then
        """
        if self._rollout_end.last_observations is None and not self.sb3_exact:
            raise RuntimeError(
                f"{type(self).__name__}.collect_rollouts is not that of sb3_pgplus, which statistics, schedules and "
                "bootstraps need: let it call super().collect_rollouts(), or use a preset of SB3"
            )

    def _runs_ours_alone(self, callback: BaseCallback) -> bool:
        """Whether the training runs nobody's code but this package's, torch's, SB3's and the environments'."""
        kinds = [type(part) for part in (*submodules(self.policy), self.policy.optimizer)]
        schedules = [self.__dict__[name] for name in self.hparams_class.scheduled_names()]
        kinds += [type(schedule) for schedule in schedules if callable(schedule)]
        if not all(map(is_known_class, kinds)):
            return False
        return is_known(callback) and not foreign_methods(self, PolicyGradientPlus, __name__.partition(".")[0])

    def _may_go_on(self, listeners: list[ActsBetweenIterations], callback: BaseCallback) -> bool:
        """Between two iterations nothing is under way: no rollout, no update."""
        self._merge_observations(self.rollout_buffer)
        return all([listener.on_iteration_end(callback) for listener in listeners])

    def _warn_about_short_learns(self) -> None:
        """Schedules over "this learn's total" start again in every further call: rates would jump up and down."""
        if self._warned_short_learns or self.num_timesteps == 0 or self.schedule_timesteps is not None:
            return
        given = {name: self.__dict__[name] for name in self.hparams_class.scheduled_names()}
        changing = [n for n, value in given.items() if value is not None and not is_constant(as_schedule(n, value))]
        if changing:
            self._warned_short_learns = True
            warn_user(
                f"learn() continues with reset_num_timesteps=False while `{'`, `'.join(changing)}` follow schedules "
                "over each call's own total, so they jump back up at every call. Set "
                "`schedule_timesteps=<steps of all calls together>` to let them run once over the whole training."
            )

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Replace the training environments, as SB3 does.

        :param env: the new environments
        :param force_reset: reset them before training goes on
        :raises ValueError: if they normalise what the model normalises itself
        """
        for what, is_outside in normalized_outside(env if isinstance(env, VecEnv) else None).items():
            if is_outside and getattr(self, f"_normalizes_{what}"):
                raise ValueError(f"the model normalises {what} and so does the new environment's VecNormalize")
        super().set_env(env, force_reset)
        self._env_id = None

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if self._unfinished is not None:
            self._restore_environments(self._unfinished)
        is_reset = self._last_obs is None or (self._unfinished is None and reset_num_timesteps)
        if self._unfinished is None:
            result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args, **kwargs)
            self._iteration = 0
        else:
            result = self._resume_learn(total_timesteps, callback, reset_num_timesteps, *args, **kwargs)
        if is_reset or len(self._carried_returns) != self.n_envs:
            self._carried_returns = [0.0] * self.n_envs  # the environments were reset
            check_finite_step(self._last_obs, None, 0)
        self._plan_engine()
        return result

    # --- the engine ---------------------------------------------------------------------------------------------------

    def engine_report(self) -> str:
        """What of the training is compiled, and why the rest is not: one line each."""
        return self._engine.report()

    def _plan_engine(self) -> None:
        """Decide what to compile from the length of the whole training, so that a continued one decides alike."""
        hp = self.hyperparameters_at(self._current_progress_remaining)
        n_rollouts = math.ceil(self._total_timesteps / (hp.n_steps * self.n_envs))
        calls = {unit: n * n_rollouts for unit, n in self._calls_per_rollout(hp).items()}
        self._engine.setting = hp.compile
        self._engine.plan(calls)
        if hp.compile == "auto" and self.device.type == "cpu" and has_convolutions(self.policy):
            units = [unit for unit in calls if unit != "Fisher product"]
            self._engine.refuse(units, "convolutions on a CPU, nearly all of the time, are no faster compiled")
        if hp.sb3_exact:
            self._engine.refuse(list(calls), "sb3_exact=True keeps SB3's order of operations")

    def _calls_per_rollout(self, hp: H) -> dict[str, int]:
        """How often each function the engine knows is called per rollout; algorithms add their updates."""
        return {"policy step": hp.n_steps}

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
        self._set_training_mode(False)
        n_steps = 0
        self._merge_observations(rollout_buffer)  # those of the last rollout, now that its update is over
        rollout_buffer.reset()
        self._rollout_end = RolloutEnd()
        self._device_infos = []
        self._rollout_started_at = self.num_timesteps
        if self.use_sde:
            self.policy.reset_noise(env.num_envs)
        callback.on_rollout_start()
        on_device = self._trains_on_tensors_of(env)
        to_environment = self._action_converter(on_device)
        policy_step, limited = self._policy_step(), self._threads_for(env.num_envs)
        policy, watched, heard = self.policy, not is_known(callback), not is_nobody(callback)

        while n_steps < n_rollout_steps:
            if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
                self.policy.reset_noise(env.num_envs)
            obs_tensor = self._observation_tensor()
            with limited:
                actions, values, log_probs = policy_step(obs_tensor)
            if not on_device:
                actions = actions.cpu().numpy()
            clipped_actions = to_environment(actions)
            new_obs, rewards, dones, infos = env.step(clipped_actions)
            self.num_timesteps += env.num_envs
            if not on_device:
                check_finite_step(new_obs, rewards, self.num_timesteps // env.num_envs, policy=self.policy)

            # Callbacks read these local variables under SB3's names.
            if heard:
                callback.update_locals(locals())
            if not callback.on_step():
                self._value_function = self.policy.predict_values
                return False
            if watched and (self.policy is not policy or getattr(policy_step, "is_outdated", bool)()):
                policy, policy_step = self.policy, self._policy_step()  # what a callback changes takes effect at once

            self._keep_episode_ends(n_steps, dones, infos)
            n_steps += 1
            self._store(rollout_buffer, actions, rewards, values, log_probs)
            self._last_obs = new_obs  # type: ignore[assignment]  # SB3 leaves out tuples, which no policy takes
            self._last_episode_starts = dones

        with limited:
            values = self._finish_rollout(rollout_buffer)  # SB3's name for those of the last observations
        self._log_rollout(n_steps * env.num_envs, time.perf_counter() - started)
        found = self._advantages_in(rollout_buffer) if watched else []
        callback.update_locals(locals())
        callback.on_rollout_end()
        self._advantages_replaced = watched and not all(map(th.equal, found, self._advantages_in(rollout_buffer)))
        self._value_function = self.policy.predict_values  # of whatever the policy is by now
        return True

    def _set_training_mode(self, mode: bool) -> None:
        plain = self._engine.remembered("modules", lambda: plain_modules(self.policy))
        set_training_mode(self.policy, mode, plain)

    def _policy_step(self) -> Callable[[Any], Any]:
        """The quickest function of a rollout's steps for the policy as it is now."""
        step = self._engine.remembered("policy step", self._find_policy_step)
        self._value_function = getattr(step, "values", self.policy.predict_values)
        return step

    def _find_policy_step(self) -> Callable[[Any], Any]:
        with th.no_grad(), self._threads_for(self.n_envs):
            return self._engine.policy_step(self.policy, self._observation_tensor())

    def _trains_on_tensors_of(self, env: VecEnv) -> bool:
        """Whether the environments take and give tensors of the training device."""
        if not isinstance(env, TensorVecEnv) or self.policy.squash_output:
            return False
        return env.device.type == th.device(self.device).type and isinstance(self.rollout_buffer, TorchRolloutBuffer)

    def _action_converter(self, on_device: bool) -> Callable[[Any], Any]:
        """
        What makes the environments' actions of those that the policy sampled.

        :param on_device: of tensors; otherwise of NumPy arrays
        """
        if not isinstance(self.action_space, spaces.Box):
            return lambda actions: actions
        if self.policy.squash_output:
            return self.policy.unscale_action
        low, high = self.action_space.low, self.action_space.high
        if on_device:
            bounds = [th.as_tensor(bound, device=self.device) for bound in (low, high)]
            return lambda actions: actions.clamp(*bounds)
        # The two halves of np.clip: without its Python wrapper they take a third of the time.
        return lambda actions: np.minimum(np.maximum(actions, low), high)

    def _policy_actions(self, actions: th.Tensor) -> th.Tensor:
        """What ``evaluate_actions`` takes for what a buffer stores."""
        return actions.long().flatten() if isinstance(self.action_space, spaces.Discrete) else actions

    def _store(
        self,
        buffer: RolloutBuffer,
        actions: Any,
        rewards: Any,
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
        self._set_training_mode(True)
        if self._resolved is not None and not self._resolved[3]:
            # A user's function may depend on more than the progress: it is asked once an update.
            self._resolved = (self._resolved[0], math.nan, *self._resolved[2:])
        hp = self.hyperparameters_at(self._current_progress_remaining)
        self._update_learning_rate(self.policy.optimizer)
        metrics = Metrics()
        with without_distribution_checks():
            self.before_update(hp)
            with self._threads_for(hp.n_steps * self.n_envs):  # parts of it have fewer
                self.update(hp, metrics)
            self.after_update(hp)
        # Threads spin for milliseconds after an operation on several, on the cores that the next rollout needs.
        if self._is_logged:
            with self._threads_for(self.n_envs):
                self._log_update(metrics)
        else:
            self._keep_for_log(metrics)
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


#: Hyperparameters that SB3's own constructor asks for (TRPO has no use for the last three).
_SB3_HPARAMS = ("learning_rate", "n_steps", "gamma", "gae_lambda", "ent_coef", "vf_coef", "max_grad_norm")


def make_environments(env: GymEnv | str | None, n_envs: Any) -> GymEnv | str | None:
    """
    Several environments side by side where only an id is given, by the fastest backend with SB3's numbers.

    Anything else is left to SB3.

    :param env: the constructor's argument
    :param n_envs: how many
    :raises TypeError: if the number is no integer
    :raises ValueError: if it is below 1
    """
    n_envs = PolicyGradientHparams.spec("n_envs").check("n_envs", n_envs, 1.0)
    return make_vec_env(env, n_envs) if isinstance(env, str) and n_envs > 1 else env


def _whole_steps(total_timesteps: Any) -> int:
    if isinstance(total_timesteps, bool) or not isinstance(total_timesteps, Real):
        raise TypeError(f"`total_timesteps` must be a number, got {total_timesteps!r}")
    steps = float(total_timesteps)
    if not 0 <= steps < math.inf:
        raise ValueError(f"`total_timesteps` must be finite and >= 0, got {total_timesteps!r}")
    return int(steps)
