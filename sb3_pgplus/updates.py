"""The part of the base class that changes parameters: one gradient step, the critic's own epochs, what is logged."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from torch import nn

from sb3_pgplus.core.losses import explained_variance
from sb3_pgplus.errors import NonFiniteUpdateError
from sb3_pgplus.guards import likely_cause
from sb3_pgplus.metrics import Metrics
from sb3_pgplus.policies import critic_only_parameters

if TYPE_CHECKING:  # a mix-in of one class: let the type checker see what it is mixed into
    from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm as _Base
else:
    _Base = object


CriticLoss = Callable[[th.Tensor, Any], tuple[th.Tensor, dict[str, th.Tensor]]]


class GradientUpdates(_Base):
    """Steps of the optimiser with the non-finite guard."""

    max_nonfinite_updates: int
    _nonfinite_updates: int
    _nonfinite_in_a_row: int

    def _gradient_step(
        self, loss: th.Tensor, batch: Any, parameters: list[nn.Parameter], max_grad_norm: float | None
    ) -> th.Tensor:
        """
        One optimiser step on ``loss``, unless the loss or its gradient is not finite: then parameters and optimiser
        stay as they are.

        :param loss: scalar
        :param batch: the minibatch, to name the cause of a failure
        :param parameters: what is stepped; gradients of others are dropped
        :param max_grad_norm: largest global norm, or None
        :return: the gradient's norm before clipping, scalar
        :raises ValueError: after ``max_nonfinite_updates`` failures in a row
        """
        optimizer = self.policy.optimizer
        optimizer.zero_grad()
        loss.backward()
        drop_other_gradients(optimizer, parameters)
        if max_grad_norm is None:
            norm = th.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        else:
            norm = th.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        if bool(th.isfinite(loss.detach() + norm)):
            optimizer.step()
            self._nonfinite_in_a_row = 0
        else:
            self._count_nonfinite(loss, batch)
        return norm

    def _count_nonfinite(self, loss: th.Tensor, batch: Any) -> None:
        self.policy.optimizer.zero_grad()
        self._nonfinite_updates += 1
        self._nonfinite_in_a_row += 1
        if self._nonfinite_in_a_row >= self.max_nonfinite_updates:
            cause = likely_cause(batch.advantages, batch.returns, loss, self.policy)
            raise NonFiniteUpdateError(
                f"{self._nonfinite_in_a_row} updates in a row had a NaN or infinite loss or gradient (they were "
                f"skipped: the parameters are those before them). Likely cause: {cause}."
            )

    def _fit_critic(
        self,
        n_epochs: int,
        batch_size: int | None,
        critic_loss: CriticLoss,
        max_grad_norm: float | None,
        metrics: Metrics,
    ) -> None:
        """
        Epochs on the critic's loss alone. Only parameters that the actor does not use are moved.

        :param n_epochs: passes over the rollout
        :param batch_size: samples per minibatch; None: all
        :param critic_loss: loss and metrics of values ``[B]`` on a minibatch
        :param max_grad_norm: largest gradient norm, or None
        :param metrics: collects the loss's
        """
        if n_epochs < 1:
            return
        own = critic_only_parameters(self.policy)
        if not own:
            return
        for _ in range(n_epochs):
            for batch in self.rollout_buffer.get(batch_size):
                values = self.policy.predict_values(batch.observations).flatten()
                loss, diagnostics = critic_loss(values, batch)
                self._gradient_step(loss, batch, own, max_grad_norm)
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


def drop_other_gradients(optimizer: th.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Set the gradients of all parameters but these to None, which makes optimisers leave them alone."""
    wanted = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in wanted:
                parameter.grad = None
