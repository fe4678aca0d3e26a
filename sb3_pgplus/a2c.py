"""
Advantage actor-critic, synchronous (Mnih et al. 2016, https://arxiv.org/abs/1602.01783), with tuned GAE.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Self, cast

import torch as th
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike
from stable_baselines3.common.type_aliases import MaybeCallback

from sb3_pgplus import presets
from sb3_pgplus.buffers import RolloutSamples, has_stock_sampling
from sb3_pgplus.core import losses
from sb3_pgplus.hparams import A2CHparams, PolicyGradientHparams
from sb3_pgplus.metrics import Metrics
from sb3_pgplus.on_policy import PolicyGradientPlus
from sb3_pgplus.updates import check_normalizable

#: Values of ``use_rms_prop`` other than False.
_RMS_PROP: dict[bool | str, type[th.optim.Optimizer]] = {True: th.optim.RMSprop, "tf_like": RMSpropTFLike}


class A2CPlus(PolicyGradientPlus[A2CHparams]):
    """A2C. Every hyperparameter is declared in :class:`sb3_pgplus.hparams.A2CHparams`."""

    hparams_class = A2CHparams
    sb3_name = "A2C"
    sb3_preset = presets.SB3_A2C
    # SB3's order of positional arguments.
    positional: ClassVar[tuple[str, ...]] = (
        "learning_rate",
        "n_steps",
        "gamma",
        "gae_lambda",
        "ent_coef",
        "vf_coef",
        "max_grad_norm",
        "rms_prop_eps",
        "use_rms_prop",
        "use_sde",
        "sde_sample_freq",
        "rollout_buffer_class",
        "rollout_buffer_kwargs",
        "normalize_advantage",
        "stats_window_size",
        "tensorboard_log",
        "policy_kwargs",
        "verbose",
        "seed",
        "device",
        "_init_setup_model",
    )

    def _check_batch(self, hp: A2CHparams, n_envs: int) -> None:
        check_normalizable(hp, n_envs)

    def _policy_arguments(self, hp: PolicyGradientHparams) -> dict[str, Any]:
        kwargs, settings = super()._policy_arguments(hp), cast(A2CHparams, hp)
        if settings.use_rms_prop and "optimizer_class" not in kwargs:
            kwargs["optimizer_class"] = _RMS_PROP[settings.use_rms_prop]
            # SB3's A2C replaces whatever else the user gave here; we keep it.
            given = kwargs.get("optimizer_kwargs") or {}
            kwargs["optimizer_kwargs"] = {"alpha": 0.99, "eps": settings.rms_prop_eps, "weight_decay": 0, **given}
        return kwargs

    def _calls_per_rollout(self, hp: A2CHparams) -> dict[str, int]:
        return {**super()._calls_per_rollout(hp), "update": 1}

    def update(self, hp: A2CHparams, metrics: Metrics) -> None:
        """One gradient step on all samples of the rollout."""
        parameters, n_samples = self._trained_parameters(), hp.n_steps * self.n_envs
        gradient_of = self._gradient_of("update", self.loss, hp, parameters, n_samples)
        for batch in self._batches(hp):
            gradient = gradient_of(batch)
            self._apply(gradient, batch)
            metrics.add({**gradient.diagnostics, "train/grad_norm": gradient.norm})
        self._n_updates += 1
        self.logger.record("train/ent_coef", hp.ent_coef)

    def _batches(self, hp: A2CHparams) -> Iterator[Any]:
        """The rollout, which is one batch. The order of its samples changes nothing but the rounding of their sums."""
        buffer = self.rollout_buffer
        if has_stock_sampling(buffer) and not hp.sb3_exact:
            yield buffer.whole()
        else:
            yield from buffer.get(batch_size=None)

    def loss(self, batch: RolloutSamples, hp: A2CHparams) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        ``L_policy + c_ent L_entropy + c_vf L_value`` (Mnih et al. 2016, section 4).

        Override :meth:`policy_loss` to change the policy's part alone, or this to add terms.

        :param batch: the whole rollout, B samples
        :param hp: hyperparameters of this update
        :return: the loss, and scalars to log under their keys
        """
        outputs = self._evaluate_batch(batch, hp)
        policy_loss = self.policy_loss(outputs.log_probs, outputs.advantages, hp)
        entropy_loss = losses.entropy_loss(outputs.entropy)
        value_loss = losses.value_loss(outputs.values, self._normalized(batch.returns))
        loss = policy_loss + hp.ent_coef * entropy_loss + hp.vf_coef * value_loss
        return loss, {
            "train/policy_loss": policy_loss,
            "train/entropy_loss": entropy_loss,
            "train/value_loss": value_loss,
            "train/loss": loss,
        }

    def policy_loss(self, log_probs: th.Tensor, advantages: th.Tensor, hp: A2CHparams) -> th.Tensor:
        """
        The policy's part of the loss. Override it to try another objective.

        :param log_probs: log π_θ(a|s), ``[B]``
        :param advantages: Ψ, normalised if so set, ``[B]``
        :param hp: hyperparameters of this update
        :return: scalar to minimise
        """
        return losses.policy_gradient(log_probs, advantages)

    def learn(
        self,
        total_timesteps: float,
        callback: MaybeCallback = None,
        log_interval: int | None = 100,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """
        :meth:`PolicyGradientPlus.learn`, logging every 100 iterations by default as SB3's A2C does: they are short.
        """
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
