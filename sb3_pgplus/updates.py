"""The part of the base class that changes parameters: one gradient step, the critic's own epochs, what is logged."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch as th
from torch import nn

from sb3_pgplus.buffers import RolloutSamples, TorchRolloutBuffer
from sb3_pgplus.core.advantages import normalize
from sb3_pgplus.core.losses import clipped_value_loss, explained_variance, value_clip_fraction, value_loss
from sb3_pgplus.critics import StockCritic
from sb3_pgplus.errors import HyperparameterError, NonFiniteUpdateError, warn_user
from sb3_pgplus.guards import likely_cause
from sb3_pgplus.hparams import MinibatchHparams, PolicyGradientHparams
from sb3_pgplus.metrics import Metrics
from sb3_pgplus.optimizers import drop_gradients, step

if TYPE_CHECKING:  # a mix-in of one class: let the type checker see what it is mixed into
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm as _Base
else:
    _Base = object


CriticLoss = Callable[[th.Tensor, Any], tuple[th.Tensor, dict[str, th.Tensor]]]


class BatchOutputs(NamedTuple):
    """What a loss is made of: the policy's outputs on a minibatch of B samples, and its advantages; each ``[B]``."""

    values: th.Tensor
    log_probs: th.Tensor
    entropy: th.Tensor
    advantages: th.Tensor


class GradientUpdates(_Base):
    """Steps of the optimiser with the non-finite guard."""

    max_nonfinite_updates: int
    _nonfinite_updates: int
    _nonfinite_in_a_row: int

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

    def _gradient_step(
        self, loss: th.Tensor, batch: Any, parameters: list[nn.Parameter], max_grad_norm: float | None
    ) -> th.Tensor:
        """
        One optimiser step on ``loss``, unless the loss or its gradient is not finite: then parameters and optimiser
        stay as they are.

        :param loss: scalar
        :param batch: the minibatch, to name the cause of a failure
        :param parameters: what is stepped; frozen ones stay
        :param max_grad_norm: largest global norm, or None
        :return: the gradient's norm before clipping, scalar
        :raises ValueError: after ``max_nonfinite_updates`` failures in a row
        """
        drop_gradients(self.policy.optimizer)
        loss.backward(inputs=[parameter for parameter in parameters if parameter.requires_grad])
        return self._apply_gradients(loss.detach(), batch, parameters, max_grad_norm)

    def _apply_gradients(
        self, loss: th.Tensor, batch: Any, parameters: list[nn.Parameter], max_grad_norm: float | None
    ) -> th.Tensor:
        """The second half of :meth:`_gradient_step`: the gradients are in place."""
        if max_grad_norm is None:
            gradients = [p.grad.flatten() for p in parameters if p.grad is not None]
            norm: th.Tensor = th.linalg.vector_norm(th.cat(gradients)) if gradients else th.zeros_like(loss)
        else:
            norm = th.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        if math.isfinite(float(loss + norm)):
            step(self.policy.optimizer)
            self._nonfinite_in_a_row = 0
        else:
            self._count_nonfinite(loss, batch)
        return norm

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
        if critic is not None and isinstance(buffer, TorchRolloutBuffer):
            self._fit_stock_critic(critic, buffer, own, n_epochs, hp, critic_loss, metrics)
            return
        for batch in (batch for _ in range(n_epochs) for batch in buffer.get(hp.batch_size)):
            values = self.policy.predict_values(batch.observations).flatten()
            loss, diagnostics = critic_loss(values, batch)
            self._gradient_step(loss, batch, own, hp.max_grad_norm)
            metrics.add(diagnostics)

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
            loss, diagnostics = critic_loss(values, batch)
            (d_values,) = th.autograd.grad(loss, values)
            critic.set_gradients(d_values, outputs)
            self._apply_gradients(loss.detach(), batch, own, hp.max_grad_norm)
            metrics.add(diagnostics)

    def _log_update(self, metrics: Metrics) -> None:
        """Write what an update collected, and what the whole rollout tells, under SB3's keys."""
        for name, value in metrics.reduce().items():
            self.logger.record(name, value)
        buffer = self.rollout_buffer
        values, returns = (th.as_tensor(np.asarray(x)).flatten() for x in (buffer.values, buffer.returns))
        advantages = np.asarray(buffer.advantages)
        self.logger.record("train/explained_variance", float(explained_variance(values, returns)))
        self.logger.record("train/advantage_mean", float(advantages.mean()))
        self.logger.record("train/advantage_std", float(advantages.std()))
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", th.exp(self.policy.log_std).mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/nonfinite_updates", self._nonfinite_updates)


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


def check_normalizable(hp: PolicyGradientHparams, n_envs: int) -> None:
    """
    :raises ValueError: if advantages are normalised over a single sample
    """
    if hp.normalize_advantage and hp.n_steps * n_envs < 2:
        raise HyperparameterError(
            "`n_steps * n_envs` must be greater than 1 when advantages are normalised. "
            f"Currently n_steps={hp.n_steps} and n_envs={n_envs}"
        )
