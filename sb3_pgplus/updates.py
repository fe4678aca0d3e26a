"""The part of the base class that changes parameters: one gradient step, the critic's own epochs, what is logged."""

import math
from collections.abc import Callable, Generator, Hashable, Mapping
from contextlib import closing
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch as th
from stable_baselines3.common.policies import BasePolicy
from torch import nn

from sb3_pgplus.buffers import RolloutSamples, TorchRolloutBuffer, double, has_stock_sampling, stored_array
from sb3_pgplus.compiled_update import Gradient, GradientProblem, LossFunction, Minibatches
from sb3_pgplus.core.advantages import normalize
from sb3_pgplus.core.losses import clipped_value_loss, explained_variance, value_clip_fraction, value_loss
from sb3_pgplus.core.running_stats import moments_of
from sb3_pgplus.critics import StockCritic
from sb3_pgplus.engine import Engine
from sb3_pgplus.errors import HyperparameterError, NonFiniteUpdateError, warn_user
from sb3_pgplus.guards import likely_cause
from sb3_pgplus.hparams import MinibatchHparams, PolicyGradientHparams
from sb3_pgplus.metrics import Metrics
from sb3_pgplus.optimizers import drop_gradients, has_own_zero_grad, step, zero_grad
from sb3_pgplus.policies import RunningMoments
from sb3_pgplus.recorded_update import RecordedUpdate

if TYPE_CHECKING:  # a mix-in of one class: let the type checker see what it is mixed into
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm as _Base
else:
    _Base = object


#: values ``[B]``, minibatch, hyperparameters ↦ loss, scalars to log
CriticLoss = Callable[[th.Tensor, Any, Any], tuple[th.Tensor, dict[str, th.Tensor]]]


#: What the losses of the package run through.
_TRACED_METHODS = ("loss", "policy_loss", "_evaluate_batch", "_critic_loss", "_policy_actions", "_normalized")


#: What is told about a rollout.
_LOGGED_FIELDS = ("values", "returns", "advantages")


class BatchOutputs(NamedTuple):
    """What a loss is made of: the policy's outputs on a minibatch of B samples, and its advantages; each ``[B]``."""

    values: th.Tensor
    log_probs: th.Tensor
    entropy: th.Tensor
    advantages: th.Tensor


class GradientUpdates(_Base):
    """Steps of the optimiser with the non-finite guard."""

    max_nonfinite_updates: int
    value_normalizer: RunningMoments
    _engine: Engine
    _nonfinite_updates: int
    _nonfinite_in_a_row: int
    #: Metrics and fields of the last update, if they are not logged.
    _unlogged: tuple[Metrics, list[Any]] | None = None

    def _policy_actions(self, actions: th.Tensor) -> th.Tensor:
        raise NotImplementedError

    def _normalized(self, values: th.Tensor) -> th.Tensor:
        raise NotImplementedError

    def _evaluate_batch(self, batch: Any, hp: PolicyGradientHparams) -> BatchOutputs:
        """
        Run the policy on a minibatch.

        :param batch: B samples
        :param hp: says whether advantages are normalised
        """
        actions = self._policy_actions(batch.actions)
        values, log_probs, entropy = self.policy.evaluate_actions(batch.observations, actions)
        advantages = normalize(batch.advantages) if hp.normalize_advantage else batch.advantages
        # −log π of the sample estimates the entropy where no closed form exists.
        return BatchOutputs(values.flatten(), log_probs, -log_probs if entropy is None else entropy, advantages)

    def _gradient_of(
        self,
        unit: str,
        loss: LossFunction,
        hp: Any,
        parameters: list[nn.Parameter],
        batch_size: int,
        variant: Hashable = None,
        limits: Mapping[str, float] | None = None,
    ) -> Callable[[Any], Gradient]:
        """
        The function that gives ``parameters`` the gradient of a loss on a minibatch, clipped.

        :param unit: its name in the engine's report
        :param loss: minibatch, hyperparameters ↦ scalar loss, scalars to log
        :param hp: hyperparameters of this update
        :param parameters: what is stepped; frozen ones stay
        :param batch_size: of full minibatches
        :param variant: what tells this loss from others of the same unit
        :param limits: name of a logged scalar → value above which the caller makes no step
        """
        modules: dict[str, nn.Module] = {"policy": self.policy, "value_normalizer": self.value_normalizer}
        size = min(batch_size, self.rollout_buffer.buffer_size * self.n_envs)
        problem = GradientProblem(self, _TRACED_METHODS, modules, loss, hp, parameters, size, variant, limits or {})
        return self._engine.gradient(unit, problem, partial(self._eager_gradient, loss, hp, parameters))

    def _epochs(
        self, gradient_of: Callable[[Any], Gradient], batch_size: int, n: int, ahead: bool = True
    ) -> Generator[Minibatches, None, None]:
        """
        Passes over the rollout, each a series of minibatches with their gradients. Close it as soon as you are done.

        :param gradient_of: result of :meth:`_gradient_of`
        :param batch_size: samples of a minibatch
        :param n: how many passes
        :param ahead: nothing else happens between them
        """
        buffer: Any = self.rollout_buffer
        if isinstance(gradient_of, RecordedUpdate) and has_stock_sampling(buffer):
            yield from gradient_of.epochs(buffer, n, ahead)
            return
        for _ in range(n):
            # SB3's buffers hand out the same fields but `old_distribution`, which they are not asked for.
            yield ((batch, gradient_of(batch)) for batch in buffer.get(batch_size))

    def _trained_parameters(self) -> list[nn.Parameter]:
        return self._engine.remembered("parameters", lambda: trained_parameters(self.policy))

    def _eager_gradient(self, loss: LossFunction, hp: Any, parameters: list[nn.Parameter], batch: Any) -> Gradient:
        value, diagnostics = loss(batch, hp)
        if not value.requires_grad:
            raise ValueError(
                "the loss depends on no parameter that requires a gradient, so there is no step to take: unfreeze one"
            )
        zero_grad(self.policy.optimizer, besides=() if hp.sb3_exact else parameters)
        value.backward(inputs=[parameter for parameter in parameters if parameter.requires_grad])
        return Gradient(value.detach(), clip_gradients(parameters, hp.max_grad_norm), diagnostics)

    def _apply(self, gradient: Gradient, batch: Any) -> None:
        """
        One optimiser step, if it is not made yet, unless the loss or its gradient is not finite: then parameters and
        optimiser stay as they are.

        :param gradient: result of :meth:`_gradient_of`'s function, which put it in place
        :param batch: the minibatch, to name the cause of a failure
        :raises ValueError: after ``max_nonfinite_updates`` failures in a row
        """
        if math.isfinite(float(gradient.loss + gradient.norm)):
            if not gradient.is_stepped:
                step(self.policy.optimizer)
            self._nonfinite_in_a_row = 0
        else:
            self._count_nonfinite(th.as_tensor(gradient.loss), batch)

    def _count_nonfinite(self, loss: th.Tensor, batch: Any) -> None:
        drop_gradients(self.policy.optimizer)
        self._nonfinite_updates += 1
        self._nonfinite_in_a_row += 1
        if self._nonfinite_in_a_row >= self.max_nonfinite_updates:
            cause = likely_cause(batch.advantages, batch.returns, loss, self.policy)
            raise NonFiniteUpdateError(
                f"{self._nonfinite_in_a_row} updates in a row had a NaN or infinite loss or gradient (they were "
                f"skipped: the parameters are those before them). Likely cause: {cause}."
            )

    def _critic_loss(
        self, values: th.Tensor, batch: RolloutSamples, hp: MinibatchHparams
    ) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        The critic's loss, clipped if so set, with what is logged.

        :param values: V, ``[B]``
        :param batch: the minibatch they belong to
        :param hp: hyperparameters of this update
        """
        returns = self._normalized(batch.returns)
        if hp.clip_range_vf is None:
            loss = value_loss(values, returns)
            return loss, {"train/value_loss": loss}
        old_values = self._normalized(batch.old_values)
        clip = hp.clip_range_vf
        loss = clipped_value_loss(values, old_values, returns, clip_range_vf=clip, value_clip=hp.value_clip)
        fraction = value_clip_fraction(values, old_values, clip_range_vf=clip)
        return loss, {"train/value_loss": loss, "train/value_loss_clip_fraction": fraction}

    def _fit_critic(
        self, own: list[nn.Parameter], n_epochs: int, hp: MinibatchHparams, critic_loss: CriticLoss, metrics: Metrics
    ) -> None:
        """
        Epochs of minibatches on the critic's loss alone.

        :param own: the parameters that may move: those that the actor does not use
        :param n_epochs: passes over the rollout
        :param hp: says how large minibatches and gradients are
        :param critic_loss: loss and metrics of values ``[B]`` on a minibatch
        :param metrics: collects the loss's
        """
        if not own or n_epochs < 1:
            return
        buffer, critic = self.rollout_buffer, StockCritic.of(self.policy, own)
        # A graph computes features anew for every minibatch, which for images costs more than it saves.
        prefers_graph = self._engine.wants("critic update") and not (critic and critic.has_learned_features)
        by_hand = critic is not None and not has_own_zero_grad(self.policy.optimizer) and not prefers_graph
        if critic is not None and by_hand and has_stock_sampling(buffer):
            self._fit_stock_critic(critic, buffer, own, n_epochs, hp, critic_loss, metrics)
            return

        def loss_of(batch: Any, hp: Any) -> tuple[th.Tensor, dict[str, th.Tensor]]:
            return critic_loss(self.policy.predict_values(batch.observations).flatten(), batch, hp)

        gradient_of = self._gradient_of("critic update", loss_of, hp, own, hp.batch_size)
        with closing(self._epochs(gradient_of, hp.batch_size, n_epochs)) as passes:
            for batch, gradient in chain.from_iterable(passes):
                self._apply(gradient, batch)
                metrics.add(gradient.diagnostics)

    def _fit_stock_critic(
        self,
        critic: StockCritic,
        buffer: TorchRolloutBuffer,
        own: list[nn.Parameter],
        n_epochs: int,
        hp: MinibatchHparams,
        critic_loss: CriticLoss,
        metrics: Metrics,
    ) -> None:
        """:meth:`_fit_critic` for SB3's critic: features are computed once, the perceptron's gradient by hand."""
        features = critic.features(buffer.flat("observations"))
        drop_gradients(self.policy.optimizer)
        for batch in (batch for _ in range(n_epochs) for batch in buffer.get(hp.batch_size, observations=features)):
            outputs = critic.evaluate(cast(th.Tensor, batch.observations))
            values = outputs[-1].flatten().requires_grad_()
            loss, diagnostics = critic_loss(values, batch, hp)
            (d_values,) = th.autograd.grad(loss, values)
            critic.set_gradients(d_values, outputs)
            self._apply(Gradient(loss.detach(), clip_gradients(own, hp.max_grad_norm), diagnostics), batch)
            metrics.add(diagnostics)

    def _keep_for_log(self, metrics: Metrics) -> None:
        """Keep what :meth:`_log_update` needs, in case that no other update follows."""
        self._unlogged = metrics, [double(stored_array(self.rollout_buffer, name)) for name in _LOGGED_FIELDS]

    @np.errstate(all="ignore")
    def _log_update(self, metrics: Metrics, fields: list[Any] | None = None) -> None:
        """
        Write what an update collected, and what the whole rollout tells, under SB3's keys.

        :param metrics: of the update
        :param fields: what to take for the rollout's ``_LOGGED_FIELDS``
        """
        self._unlogged = None
        for name, value in metrics.reduce().items():
            self.logger.record(name, value)
        fields = fields or [stored_array(self.rollout_buffer, name) for name in _LOGGED_FIELDS]
        values, returns, advantages = fields
        self.logger.record("train/explained_variance", float(explained_variance(values, returns)))
        moments = moments_of(advantages.reshape(-1))
        self.logger.record("train/advantage_mean", float(moments.mean))
        self.logger.record("train/advantage_std", math.sqrt(moments.var))
        log_std = getattr(self.policy, "log_std", None)
        if log_std is not None:
            self.logger.record("train/std", float(log_std.detach().exp().mean()))
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/nonfinite_updates", self._nonfinite_updates)


def trained_parameters(policy: BasePolicy) -> list[nn.Parameter]:
    """
    What the joint loss moves: the policy, and what else its optimiser was given (a network of a term of one's own).

    :param policy: any, with its optimiser
    """
    found = {id(parameter): parameter for parameter in policy.parameters()}
    found |= {id(p): p for group in policy.optimizer.param_groups for p in group["params"]}
    return list(found.values())


def clip_gradients(parameters: list[nn.Parameter], max_grad_norm: float | None) -> th.Tensor:
    """
    Scale the gradients in place so that their global norm is at most ``max_grad_norm``.

    :param parameters: those without gradient are left out
    :param max_grad_norm: None: leave the gradients as they are
    :return: the norm before, scalar
    """
    if max_grad_norm is not None:
        return th.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    return th.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def check_minibatches(hp: MinibatchHparams, n_envs: int) -> None:
    """
    Checks of the batch size that need the number of environments.

    :raises ValueError: if advantages are normalised over a single sample
    """
    samples, batch_size = hp.n_steps * n_envs, hp.batch_size
    check_normalizable(hp, n_envs)
    if samples % batch_size:
        warn_user(
            f"You have specified a mini-batch size of {batch_size}, but because the `RolloutBuffer` is of size "
            f"`n_steps * n_envs = {samples}`, after every {samples // batch_size} untruncated mini-batches, there "
            f"will be a truncated mini-batch of size {samples % batch_size}\nWe recommend using a `batch_size` "
            f"that is a factor of `n_steps * n_envs`.\nInfo: (n_steps={hp.n_steps} and n_envs={n_envs})"
        )


def full_minibatches(hp: MinibatchHparams, n_envs: int) -> int:
    """How many minibatches of the full size, or of a whole smaller rollout, an epoch has."""
    return max(1, hp.n_steps * n_envs // hp.batch_size)


def check_normalizable(hp: PolicyGradientHparams, n_envs: int) -> None:
    """
    :raises ValueError: if advantages are normalised over a single sample
    """
    if hp.normalize_advantage and hp.n_steps * n_envs < 2:
        raise HyperparameterError(
            "`n_steps * n_envs` must be greater than 1 when advantages are normalised. "
            f"Currently n_steps={hp.n_steps} and n_envs={n_envs}"
        )
