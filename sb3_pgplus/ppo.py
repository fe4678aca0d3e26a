"""
Proximal policy optimisation (Schulman et al. 2017, https://arxiv.org/abs/1707.06347) with all implementation tricks.
"""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import ClassVar, cast

import torch as th

from sb3_pgplus import presets
from sb3_pgplus.buffers import RolloutSamples, TorchRolloutBuffer, has_own_advantages
from sb3_pgplus.compiled_update import Gradient, Minibatches
from sb3_pgplus.core import losses
from sb3_pgplus.errors import HyperparameterError
from sb3_pgplus.hparams import PPOHparams
from sb3_pgplus.metrics import Metrics
from sb3_pgplus.on_policy import PolicyGradientPlus
from sb3_pgplus.policies import critic_only_parameters, distribution_parameters, kl_old_new, set_training_mode
from sb3_pgplus.schedules import as_schedule
from sb3_pgplus.updates import check_minibatches, full_minibatches


class PPOPlus(PolicyGradientPlus[PPOHparams]):
    """PPO. Every hyperparameter is declared in :class:`sb3_pgplus.hparams.PPOHparams`."""

    hparams_class = PPOHparams
    sb3_name = "PPO"
    sb3_preset = presets.SB3_PPO
    # SB3's order of positional arguments.
    positional: ClassVar[tuple[str, ...]] = (
        "learning_rate",
        "n_steps",
        "batch_size",
        "n_epochs",
        "gamma",
        "gae_lambda",
        "clip_range",
        "clip_range_vf",
        "normalize_advantage",
        "ent_coef",
        "vf_coef",
        "max_grad_norm",
        "use_sde",
        "sde_sample_freq",
        "rollout_buffer_class",
        "rollout_buffer_kwargs",
        "target_kl",
        "stats_window_size",
        "tensorboard_log",
        "policy_kwargs",
        "verbose",
        "seed",
        "device",
        "_init_setup_model",
    )
    needs_torch_buffer = ("normalize_value_targets", "recompute_advantages", "kl_coef", "desired_kl")

    def _setup_model(self) -> None:
        super()._setup_model()
        # SB3's PPO keeps these as schedule objects, and scripts call them.
        for name in ("clip_range", "clip_range_vf"):
            if getattr(self, name) is not None:
                setattr(self, name, as_schedule(name, getattr(self, name)))

    def _check_batch(self, hp: PPOHparams, n_envs: int) -> None:
        check_minibatches(hp, n_envs)

    def _calls_per_rollout(self, hp: PPOHparams) -> dict[str, int]:
        n_minibatches = full_minibatches(hp, self.n_envs)
        further = 0 if hp.n_critic_epochs is None else max(0, hp.n_critic_epochs - hp.n_epochs)
        calls = {"update": hp.n_epochs * n_minibatches, "critic update": further * n_minibatches}
        return {**super()._calls_per_rollout(hp), **{unit: n for unit, n in calls.items() if n}}

    def update(self, hp: PPOHparams, metrics: Metrics) -> None:
        """Epochs of minibatch steps, ended early by ``target_kl``; then the critic's further epochs."""
        if hp.kl_coef is not None:
            self._store_old_distribution()
        settings, hp = hp, self._with_adapted_kl_coef(hp)
        with closing(self._passes(hp)) as passes:
            for epoch in range(hp.n_epochs):
                if epoch > 0 and isinstance(self.rollout_buffer, TorchRolloutBuffer) and self._recomputes(hp):
                    self._recompute_advantages(self.rollout_buffer, hp)
                metrics.restart("train/approx_kl")
                with self._threads_for(hp.batch_size):
                    finished = self._epoch(hp, metrics, next(passes))
                self._n_updates += 1
                if not finished:
                    if self.verbose >= 1:
                        print(f"Early stopping at epoch {epoch}: the KL exceeds 1.5 times target_kl = {hp.target_kl}")
                    break
                if hp.desired_kl is not None:
                    self._adapt_learning_rate(hp.desired_kl)
        if hp.n_critic_epochs is not None:
            self._fit_critic_further(hp, metrics, n_done=epoch + finished)
        if hp.adaptive_kl_target is not None:
            self._adapt_kl_coef(hp.adaptive_kl_target)
        self._log_settings(settings, epoch + 1)

    def _passes(self, hp: PPOHparams) -> Generator[Minibatches, None, None]:
        """The epochs: those that the critic takes part in, then those that it does not."""
        shared = hp.n_epochs if hp.n_critic_epochs is None else min(hp.n_epochs, hp.n_critic_epochs)
        ahead = hp.desired_kl is None and not self._recomputes(hp)
        for with_critic, n in ((True, shared), (False, hp.n_epochs - shared)):
            if n:
                yield from self._epochs(self._loss_gradient(hp, with_critic), hp.batch_size, n, ahead)

    def _recomputes(self, hp: PPOHparams) -> bool:
        """``"auto"`` is on wherever it can be, and leaves alone what a callback, or the buffer itself, put there."""
        if hp.recompute_advantages != "auto":
            return bool(hp.recompute_advantages)
        return not self._advantages_replaced and not has_own_advantages(self.rollout_buffer)

    def _fit_critic_further(self, hp: PPOHparams, metrics: Metrics, n_done: int) -> None:
        """The critic's epochs beyond those it shared with the policy."""

        def weighted(
            values: th.Tensor, batch: RolloutSamples, hp: PPOHparams
        ) -> tuple[th.Tensor, dict[str, th.Tensor]]:
            loss, diagnostics = self._critic_loss(values, batch, hp)
            return hp.vf_coef * loss, diagnostics

        assert hp.n_critic_epochs is not None
        own = critic_only_parameters(self.policy)
        with self._threads_for(hp.batch_size):
            self._fit_critic(own, hp.n_critic_epochs - n_done, hp, weighted, metrics)

    def _loss_gradient(self, hp: PPOHparams, with_critic: bool) -> Callable[[RolloutSamples], Gradient]:
        loss, parameters = partial(self.loss, with_critic=with_critic), self._trained_parameters()
        limits = {} if hp.target_kl is None else {"train/approx_kl": 1.5 * hp.target_kl}
        return self._gradient_of("update", loss, hp, parameters, hp.batch_size, variant=with_critic, limits=limits)

    def _epoch(self, hp: PPOHparams, metrics: Metrics, minibatches: Minibatches) -> bool:
        """
        One pass over the rollout.

        :param minibatches: with their gradients
        :return: False if the KL exceeded 1.5 times ``target_kl``, before that minibatch's step (SB3's meaning)
        """
        for batch, gradient in minibatches:
            metrics.add(gradient.diagnostics)
            if hp.target_kl is not None and float(gradient.diagnostics["train/approx_kl"]) > 1.5 * hp.target_kl:
                return False
            self._apply(gradient, batch)
            metrics.add({"train/grad_norm": gradient.norm, "train/grad_norm_max": gradient.norm})
        return True

    def loss(
        self, batch: RolloutSamples, hp: PPOHparams, with_critic: bool = True
    ) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        The minibatch's loss ``L_policy + c_ent L_entropy + c_vf L_value (+ β KL)`` (PPO paper, equation 9).

        Override :meth:`policy_loss` to change the policy's part alone, or this to add terms.

        :param batch: B samples
        :param hp: hyperparameters of this update
        :param with_critic: include the critic's part
        :return: the loss, and scalars to log under their keys
        """
        outputs = self._evaluate_batch(batch, hp)
        log_ratio = outputs.log_probs - batch.old_log_prob
        ratio = th.exp(log_ratio)
        policy_loss = self.policy_loss(ratio, outputs.advantages, hp)
        entropy_loss = losses.entropy_loss(outputs.entropy)
        loss = policy_loss + hp.ent_coef * entropy_loss
        diagnostics = {"train/policy_gradient_loss": policy_loss, "train/entropy_loss": entropy_loss}
        if with_critic:
            critic_loss, critic_diagnostics = self._critic_loss(outputs.values, batch, hp)
            loss = loss + hp.vf_coef * critic_loss
            diagnostics |= critic_diagnostics
        if hp.kl_coef is not None:
            if not hasattr(batch, "old_distribution"):
                raise HyperparameterError(
                    f"`kl_coef` needs minibatches with `old_distribution`, which {type(batch).__name__} lacks: let "
                    "_get_samples return what super()._get_samples() does, changed by _replace()"
                )
            kl = kl_old_new(batch.old_distribution, self.policy.get_distribution(batch.observations))
            loss = loss + losses.kl_penalty(kl, kl_coef=hp.kl_coef)
            diagnostics["train/kl"] = kl.mean()
        kl_estimate = losses.kl_old_new(log_ratio)
        diagnostics |= {"train/loss": loss, "train/approx_kl": kl_estimate, "train/approx_kl_max": kl_estimate}
        if hp.clip_range is not None:
            diagnostics["train/clip_fraction"] = losses.clip_fraction(ratio, clip_range=hp.clip_range)
        return loss, diagnostics

    def policy_loss(self, ratio: th.Tensor, advantages: th.Tensor, hp: PPOHparams) -> th.Tensor:
        """
        The policy's part of the loss. Override it to try another objective.

        :param ratio: ρ = π_θ(a|s)/π_old(a|s), ``[B]``
        :param advantages: Ψ, normalised if so set, ``[B]``
        :param hp: hyperparameters of this update
        :return: scalar to minimise
        """
        if hp.clip_range is None:
            return losses.surrogate(ratio, advantages)
        return losses.clipped_surrogate(ratio, advantages, clip_range=hp.clip_range)

    # --- control of the KL --------------------------------------------------------------------------------------------

    def _store_old_distribution(self) -> None:
        """Keep π_old's distribution parameters beside the rollout, for the closed-form KL."""
        buffer = cast(TorchRolloutBuffer, self.rollout_buffer)
        set_training_mode(self.policy, False)
        with th.no_grad():
            buffer.extras = distribution_parameters(self.policy.get_distribution(buffer.flat("observations")))
        set_training_mode(self.policy, True)

    def _with_adapted_kl_coef(self, hp: PPOHparams) -> PPOHparams:
        return hp if hp.kl_coef is None else replace(hp, kl_coef=hp.kl_coef * self._kl_coef_scale)

    def _adapt_kl_coef(self, target: float) -> None:
        """
        β is halved below target/1.5 and doubled above 1.5·target (PPO paper, section 4), within 2^-20 to 2^20 of the
        given one: from nothing, or from infinity, it would not come back.
        """
        buffer = cast(TorchRolloutBuffer, self.rollout_buffer)
        set_training_mode(self.policy, False)
        with th.no_grad():
            distribution = self.policy.get_distribution(buffer.flat("observations"))
            kl = float(kl_old_new(buffer.extras, distribution).mean())
        set_training_mode(self.policy, True)
        if kl < target / 1.5:
            self._kl_coef_scale = max(self._kl_coef_scale / 2, 2.0**-20)
        elif kl > target * 1.5:
            self._kl_coef_scale = min(self._kl_coef_scale * 2, 2.0**20)

    def _adapt_learning_rate(self, desired: float) -> None:
        """Divide the rate by 1.5 above 2·desired, multiply it below desired/2; 1/100 to 10 times the schedule."""
        buffer, before = cast(TorchRolloutBuffer, self.rollout_buffer), self._kl_lr_scale
        # Measured after the epoch: the minibatches' own estimates are taken before their steps, the first at π_old.
        set_training_mode(self.policy, False)
        _, log_probs = self._evaluate(buffer)
        set_training_mode(self.policy, True)
        kl = float(losses.kl_old_new(log_probs - buffer.tensor("log_probs").flatten()))
        if kl > 2 * desired:
            self._kl_lr_scale = max(before / 1.5, 0.01)
        elif kl < desired / 2:
            self._kl_lr_scale = min(before * 1.5, 10.0)
        if self._kl_lr_scale != before:
            self._update_learning_rate(self.policy.optimizer)

    def _log_settings(self, hp: PPOHparams, n_epochs: int) -> None:
        settings = {"clip_range": hp.clip_range, "clip_range_vf": hp.clip_range_vf, "ent_coef": hp.ent_coef}
        settings["kl_coef"] = self._with_adapted_kl_coef(hp).kl_coef
        for name, value in settings.items():
            if value is not None:
                self.logger.record(f"train/{name}", value)
        self.logger.record("train/n_epochs", n_epochs)
