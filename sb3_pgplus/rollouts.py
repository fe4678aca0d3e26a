"""Between the last step of a rollout and the update: statistics, bootstrap values, advantages."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from sb3_pgplus.buffers import (
    RolloutEnd,
    TorchRolloutBuffer,
    agree_on_discounts,
    cat_observations,
    double,
    has_own_advantages,
    like,
    map_observations,
    scaled_rewards,
    select,
    split_observations,
    stored_array,
    stored_field,
)
from sb3_pgplus.core.advantages import (
    discounted_returns,
    gae,
    gae_sequential,
    monte_carlo_advantages,
    n_step_advantages,
    td_errors,
)
from sb3_pgplus.errors import HyperparameterError
from sb3_pgplus.guards import check_finite_policy, check_finite_step
from sb3_pgplus.hparams import PolicyGradientHparams
from sb3_pgplus.policies import RunningMoments, observation_normalizer, set_training_mode
from sb3_pgplus.threads import ThreadLimit, threads_for
from sb3_pgplus.vec_env.tensors import TensorInfos, episodes_of

if TYPE_CHECKING:  # a mix-in of one class: let the type checker see what it is mixed into
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm as _Base
else:
    _Base = object

# Values are recomputed in pieces of this many samples: a whole rollout of images would not fit otherwise.
_CHUNK = 2048

Estimator = Callable[[PolicyGradientHparams, th.Tensor, th.Tensor, th.Tensor, th.Tensor], th.Tensor]


def _gae(hp: PolicyGradientHparams, *rollout: th.Tensor) -> th.Tensor:
    recursion = gae_sequential if hp.sb3_exact else gae
    return recursion(*rollout, gamma=hp.gamma, gae_lambda=hp.gae_lambda)


#: name → Ψ(hp, rewards, values, next_values, dones)
ESTIMATORS: dict[str, Estimator] = {
    "gae": _gae,
    "td": lambda hp, rewards, values, next_values, dones: td_errors(rewards, values, next_values, gamma=hp.gamma),
    "monte_carlo": lambda hp, *rollout: monte_carlo_advantages(*rollout, gamma=hp.gamma),
    "n_step": lambda hp, *rollout: n_step_advantages(*rollout, gamma=hp.gamma, horizon=hp.n_step_horizon),
}


class RolloutProcessing(_Base):
    """The part of the base class that turns a collected rollout into advantages and targets."""

    bootstrap_truncated: bool
    normalize_value_targets: bool
    sb3_exact: bool
    reward_normalizer: RunningMoments
    value_normalizer: RunningMoments
    _normalizes_observations: bool | None
    _normalizes_rewards: bool | None
    _carried_returns: list[float]
    _rollout_end: RolloutEnd
    _observations_merged: bool
    #: Whether a callback put others in the buffer at the end of the rollout.
    _advantages_replaced = False
    _device_infos: list[TensorInfos]
    #: Observations as many as environments ↦ V, by the quickest way there is.
    _value_function: Callable[[Any], th.Tensor]

    def hyperparameters_at(self, progress_remaining: float) -> Any:
        raise NotImplementedError

    def _policy_actions(self, actions: th.Tensor) -> th.Tensor:
        raise NotImplementedError

    def _observation_tensor(self) -> Any:
        """The last observations on the training device."""
        observations: Any = self._last_obs
        if isinstance(observations, np.ndarray):
            return th.as_tensor(observations, device=self.device)
        return map_observations(observations, lambda x: th.as_tensor(x, device=self.device))

    def _keep_episode_ends(self, step: int, dones: Any, infos: Any) -> None:
        """Remember the statistics and the final observations of the episodes that ended in a step."""
        if isinstance(infos, TensorInfos):  # on the device, where looking would wait for it
            self._device_infos.append(infos)
            if self.bootstrap_truncated:
                self._rollout_end.device_truncations.append(infos.truncated)
                self._rollout_end.device_observations.append(infos.final_observations)
        elif dones.any() or any(["episode" in info for info in infos]):  # a wrapper may hide an end from us
            self._update_info_buffer(infos, dones)
            self._keep_final_observations(step, dones, infos)

    def _read_device(self, buffer: RolloutBuffer) -> None:
        """What environments on the device brought in a rollout, read at its end: episodes, cuts, NaN and infinity."""
        if not self._device_infos:
            return
        assert isinstance(buffer, TorchRolloutBuffer)
        assert self.ep_info_buffer is not None
        self.ep_info_buffer.extend(episodes_of(self._device_infos)[1])
        self._device_infos = []
        self._rollout_end.read_device()
        observations = buffer.tensor("observations")
        arrays = [*(observations.values() if isinstance(observations, dict) else [observations])]
        if not bool(th.stack([x.isfinite().all() for x in (*arrays, buffer.tensor("rewards"))]).all()):
            self._name_nonfinite_step(buffer)

    def _name_nonfinite_step(self, buffer: TorchRolloutBuffer) -> None:
        first_step = self.num_timesteps // self.n_envs - buffer.buffer_size
        for step in range(buffer.buffer_size):
            check_finite_step(select(buffer.observations, step), None, first_step + step)
            check_finite_step(np.zeros(0), buffer.rewards[step], first_step + step + 1)

    def _keep_final_observations(self, step: int, dones: np.ndarray[Any, Any], infos: list[dict[str, Any]]) -> None:
        """Remember where a time limit cut an episode, and the observation V(s_T) will be taken of."""
        if not self.bootstrap_truncated:
            return
        for index in np.flatnonzero(dones):
            info = infos[index]
            if info.get("TimeLimit.truncated", False) and info.get("terminal_observation") is not None:
                final, _ = self.policy.obs_to_tensor(info["terminal_observation"])
                arrays = map_observations(final, lambda x: x.cpu().numpy())
                check_finite_step(arrays, None, self.num_timesteps // self.n_envs, first_env=int(index))
                self._rollout_end.add_truncation(step, int(index), final)

    @np.errstate(all="ignore")  # NaN and infinity are the guards' business; torch is silent about them, too
    def _finish_rollout(self, buffer: RolloutBuffer) -> th.Tensor:
        """All between a rollout's last step and ``on_rollout_end``; gives V of the last observations, ``[N, 1]``."""
        agree_on_discounts(self, buffer)
        hp = self.hyperparameters_at(self._current_progress_remaining)
        self._read_device(buffer)
        check_finite_policy(stored_array(buffer, "log_probs"), self.policy)
        self._rollout_end.last_observations = self._observation_tensor()
        self._rollout_end.last_dones = self._last_episode_starts
        # Rollout 1 was collected on raw observations. It is merged first and evaluated again, so that its update sees
        # normalised ones; later rollouts are merged when the next one begins, so that statistics are constant from a
        # rollout's first step to the end of the update on it.
        normalizer = observation_normalizer(self.policy)
        first = normalizer is not None and normalizer.is_initial
        self._observations_merged = False
        if first:
            self._merge_observations(buffer)
        self._merge_rewards(buffer, hp)
        if isinstance(buffer, TorchRolloutBuffer):
            if first:
                self._reevaluate(buffer)
            self._compute_bootstraps(buffer, hp)
            self._compute_advantages(buffer, hp)
            self._update_value_normalizer(buffer, hp)
        else:
            self._finish_foreign_buffer(buffer, hp, reevaluate=first)
        assert self._rollout_end.last_values is not None
        return self._rollout_end.last_values.unsqueeze(1)

    def _threads_for(self, n_samples: int) -> ThreadLimit:
        """
        The context in which batches go through the policy: with as many threads as are of use.

        :param n_samples: B, of a batch
        """
        if self.sb3_exact or self.device.type != "cpu":
            return ThreadLimit(math.inf)
        return threads_for(self.policy, n_samples)

    # --- running statistics -------------------------------------------------------------------------------------------

    def _merge_observations(self, buffer: RolloutBuffer) -> None:
        """Add a rollout's observations to the running statistics, once."""
        normalizer = observation_normalizer(self.policy)
        if normalizer is None or self._observations_merged:
            return
        with self._threads_for(self.n_envs):
            normalizer.merge(self._flat_observations(buffer))
        self._observations_merged = True

    def _flat_observations(self, buffer: RolloutBuffer) -> PyTorchObs:
        """The rollout's observations ``[T·N, ...]``, in any order, from our buffer or SB3's."""

        def flat(array: Any, shape: tuple[int, ...]) -> th.Tensor:
            return th.as_tensor(array, device=self.device).reshape(-1, *shape)

        stored = stored_field(buffer, "observations")
        if isinstance(buffer.obs_shape, dict):
            return {key: flat(stored[key], shape) for key, shape in buffer.obs_shape.items()}
        return flat(stored, buffer.obs_shape)

    def _merge_rewards(self, buffer: RolloutBuffer, hp: PolicyGradientHparams) -> None:
        """Add the rollout's discounted returns to the running statistics that scale rewards."""
        if not self._normalizes_rewards:
            return
        rewards, dones = (double(stored_array(buffer, name)) for name in ("rewards", "episode_starts"))
        dones[:-1] = double(dones[1:])  # each step's end is the next one's start
        dones[-1] = like(self._rollout_end.last_dones, dones)
        returns = discounted_returns(rewards, dones, like(self._carried_returns, rewards), gamma=hp.gamma)
        self.reward_normalizer.merge(returns.reshape(-1))
        self._carried_returns = (returns[-1] * (1.0 - dones[-1])).tolist()

    def _reward_scale(self, hp: PolicyGradientHparams) -> tuple[Any, float]:
        """By what rewards are divided, this rollout's statistics included, and where they are cut."""
        if not self._normalizes_rewards:
            return 1.0, math.inf
        return self.reward_normalizer.std(), math.inf if hp.clip_rewards is None else hp.clip_rewards

    # --- values and bootstraps ----------------------------------------------------------------------------------------

    def _values_of(self, observations: PyTorchObs, chunk: int) -> th.Tensor:
        """V of a batch of observations in units of the (scaled) reward, ``[B]``, without gradient."""
        with th.no_grad():
            pieces = [self.policy.predict_values(piece) for piece in split_observations(observations, chunk)]
        return self._denormalized(th.cat(pieces).flatten())

    def _final_values(self, hp: PolicyGradientHparams) -> th.Tensor:
        """V(s_T) of the steps that a time limit cut, ``[K]``; one by one where SB3's rounding is wanted."""
        finals = self._rollout_end.final_observations
        if not finals:
            return th.zeros(0, device=self.device)
        return self._values_of(cat_observations(finals), 1 if hp.sb3_exact else _CHUNK)

    def _last_values(self) -> th.Tensor:
        """V of the observations after the last step, ``[N]``, in one batch as SB3 has it."""
        assert self._rollout_end.last_observations is not None
        with th.no_grad():
            values = self._value_function(self._rollout_end.last_observations)
        self._rollout_end.last_values = self._denormalized(values.flatten())
        return self._rollout_end.last_values

    def _compute_bootstraps(self, buffer: TorchRolloutBuffer, hp: PolicyGradientHparams) -> None:
        end = self._rollout_end
        buffer.set_bootstraps(self._last_values(), end.last_dones, end, self._final_values(hp))

    def _compute_advantages(self, buffer: TorchRolloutBuffer, hp: PolicyGradientHparams) -> None:
        """Ψ and the critic's targets from what is in the buffer."""
        buffer.reward_scale = self._reward_scale(hp)
        if has_own_advantages(buffer):
            with buffer.in_sb3_terms():
                self._compute_in(buffer)
            return
        stored = buffer.arrays
        rewards = scaled_rewards(stored["rewards"], *buffer.reward_scale)
        rest = (stored[name] for name in ("values", "next_values", "dones"))
        buffer.set_advantages(ESTIMATORS[hp.advantage_estimator](hp, rewards, *rest))

    def _advantages_in(self, buffer: RolloutBuffer) -> list[th.Tensor]:
        """Copies of the advantages, of the critic's targets, and of what they are computed from."""
        names = ("advantages", "returns", "rewards", "values", "episode_starts")
        return [th.as_tensor(stored_field(buffer, name)).clone() for name in names]

    def _compute_in(self, buffer: RolloutBuffer) -> None:
        """Advantages by the buffer's own method, called as SB3 calls it."""
        end = self._rollout_end
        assert end.last_values is not None
        buffer.compute_returns_and_advantage(
            last_values=end.last_values.unsqueeze(1),
            dones=end.last_dones,  # type: ignore[arg-type]  # set when the rollout ended
        )

    def _reevaluate(self, buffer: TorchRolloutBuffer) -> None:
        """Replace V_old and log π_old by those under today's observation statistics."""
        values, log_probs = self._evaluate(buffer)
        buffer.tensor("values").copy_(values.view(buffer.buffer_size, buffer.n_envs))
        buffer.tensor("log_probs").copy_(log_probs.view(buffer.buffer_size, buffer.n_envs))

    @np.errstate(all="ignore")
    def _recompute_advantages(self, buffer: TorchRolloutBuffer, hp: PolicyGradientHparams) -> None:
        """
        Ψ and targets under today's critic (Andrychowicz et al. 2021, section 3.5). V_old, which the critic's clip
        refers to, stays that of the rollout.
        """
        old_values = buffer.tensor("values").clone()
        set_training_mode(self.policy, False)
        observations = map_observations(buffer.tensor("observations"), lambda x: x.flatten(0, 1))
        buffer.tensor("values").copy_(self._values_of(observations, _CHUNK).view_as(old_values))
        self._compute_bootstraps(buffer, hp)
        self._compute_advantages(buffer, hp)
        set_training_mode(self.policy, True)
        buffer.tensor("values").copy_(old_values)

    def _evaluate(self, buffer: TorchRolloutBuffer) -> tuple[th.Tensor, th.Tensor]:
        """V and log π of all samples, time-major ``[T·N]``, without gradient."""
        observations = map_observations(buffer.tensor("observations"), lambda x: x.flatten(0, 1))
        actions = buffer.tensor("actions").flatten(0, 1).split(_CHUNK)
        values, log_probs = [], []
        with th.no_grad():
            for piece, piece_actions in zip(split_observations(observations, _CHUNK), actions, strict=True):
                value, log_prob, _ = self.policy.evaluate_actions(piece, self._policy_actions(piece_actions))
                values.append(value.flatten())
                log_probs.append(log_prob)
        return self._denormalized(th.cat(values)), th.cat(log_probs)

    def _finish_foreign_buffer(self, buffer: RolloutBuffer, hp: PolicyGradientHparams, reevaluate: bool) -> None:
        """SB3's convention for its own buffers: the reward holds γ V(s_T), the buffer computes the advantages."""
        if reevaluate:
            self._reevaluate_foreign(buffer)
        rewards = scaled_rewards(buffer.rewards, *self._reward_scale(hp))
        final_values = self._final_values(hp).cpu().numpy()
        for step, env, value in zip(self._rollout_end.steps, self._rollout_end.envs, final_values, strict=True):
            # In float32, as SB3 rounds it.
            rewards[step, env] += np.float32(hp.gamma) * value
        buffer.rewards[:] = rewards
        self._last_values()
        self._compute_in(buffer)

    def _reevaluate_foreign(self, buffer: RolloutBuffer) -> None:
        """:meth:`_reevaluate` for NumPy storage ``[T, N, ...]``."""
        actions = th.as_tensor(buffer.actions, device=self.device).flatten(0, 1).float().split(_CHUNK)
        observations = split_observations(self._flat_observations(buffer), _CHUNK)
        with th.no_grad():
            results = [
                self.policy.evaluate_actions(obs, self._policy_actions(act))
                for obs, act in zip(observations, actions, strict=True)
            ]
        shape = buffer.values.shape
        buffer.values[:] = th.cat([result[0].flatten() for result in results]).view(shape).cpu().numpy()
        buffer.log_probs[:] = th.cat([result[1] for result in results]).view(shape).cpu().numpy()

    # --- value-target normalisation -----------------------------------------------------------------------------------

    def _denormalized(self, values: th.Tensor) -> th.Tensor:
        """The critic's output in units of the (scaled) reward."""
        if not self.normalize_value_targets:
            return values
        return (values * self.value_normalizer.std() + self.value_normalizer.mean).to(values.dtype)

    def _normalized(self, values: th.Tensor) -> th.Tensor:
        """Returns and old values in units of the critic's output: the inverse of :meth:`_denormalized`."""
        if not self.normalize_value_targets:
            return values
        return ((values - self.value_normalizer.mean) / self.value_normalizer.std()).to(values.dtype)

    def _update_value_normalizer(self, buffer: TorchRolloutBuffer, hp: PolicyGradientHparams) -> None:
        """
        Merge the rollout's targets, and rescale the critic's last layer so that its denormalised output stays what it
        was (Pop-Art, van Hasselt et al. 2016, section 2.2)::

            w' = w σ/σ',  b' = (σ b + μ − μ') / σ'
        """
        returns = buffer.tensor("returns").flatten()
        # Non-finite targets are left to the guard on the gradient, which names the cause.
        if not hp.normalize_value_targets or not bool(returns.isfinite().all()):
            return
        stats = self.value_normalizer
        mean, std = stats.mean.clone(), stats.std()
        stats.merge(returns)
        layer = value_layer(self.policy)
        with th.no_grad():
            layer.weight.copy_(layer.weight * (std / stats.std()))
            layer.bias.copy_((std * layer.bias + mean - stats.mean) / stats.std())


def value_layer(policy: nn.Module) -> nn.Linear:
    """
    The linear layer that the critic ends with.

    :raises ValueError: if the policy has no ``value_net`` of that kind
    """
    layer = getattr(policy, "value_net", None)
    if not isinstance(layer, nn.Linear) or layer.bias is None or is_parametrized(layer):
        raise HyperparameterError(
            "`normalize_value_targets`=True needs a policy whose critic ends in a linear layer with bias, without "
            f"parametrisations, called `value_net` (as SB3's do), but {type(policy).__name__} has {layer!r} there"
        )
    return layer
