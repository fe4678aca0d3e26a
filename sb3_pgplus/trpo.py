"""
Trust region policy optimisation (Schulman et al. 2015, https://arxiv.org/abs/1502.05477) with the implementation tricks
of PPO that apply to it (TRPO+ of Engstrom et al. 2020), and the natural policy gradient.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar, cast

import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.preprocessing import get_action_dim
from torch import nn

from sb3_pgplus import presets
from sb3_pgplus.buffers import RolloutSamples, map_observations, stored_field
from sb3_pgplus.core import losses
from sb3_pgplus.core.advantages import normalize
from sb3_pgplus.core.natural_gradient import (
    LineSearchResult,
    MatVec,
    backtracking_line_search,
    conjugate_gradient,
    fisher_vector_product,
    flatten,
    trust_region_scale,
    unflatten,
)
from sb3_pgplus.errors import HyperparameterError
from sb3_pgplus.guards import without_distribution_checks
from sb3_pgplus.hparams import TRPOHparams
from sb3_pgplus.metrics import Metrics
from sb3_pgplus.on_policy import PolicyGradientPlus
from sb3_pgplus.policies import (
    Parameters,
    distribution_parameters,
    fisher_outputs,
    kl_new_old,
    kl_old_new,
    set_training_mode,
)
from sb3_pgplus.updates import check_minibatches, full_minibatches

#: sb3-contrib starts conjugate gradient at noise of this size, and ends it at this residual.
_SB3_NOISE, _SB3_RESIDUAL = 1e-4, 1e-5

NO_STEP = LineSearchResult(False, 0.0, 0, 0.0, 0.0)


class TRPOPlus(PolicyGradientPlus[TRPOHparams]):
    """TRPO. Every hyperparameter is declared in :class:`sb3_pgplus.hparams.TRPOHparams`."""

    hparams_class = TRPOHparams
    sb3_name = "TRPO"
    sb3_preset = presets.SB3_TRPO
    # sb3-contrib's order of positional arguments.
    positional: ClassVar[tuple[str, ...]] = (
        "learning_rate",
        "n_steps",
        "batch_size",
        "gamma",
        "cg_max_steps",
        "cg_damping",
        "line_search_shrinking_factor",
        "line_search_max_iter",
        "n_critic_updates",
        "gae_lambda",
        "use_sde",
        "sde_sample_freq",
        "rollout_buffer_class",
        "rollout_buffer_kwargs",
        "normalize_advantage",
        "target_kl",
        "sub_sampling_factor",
        "stats_window_size",
        "tensorboard_log",
        "policy_kwargs",
        "verbose",
        "seed",
        "device",
        "_init_setup_model",
    )

    def _check_batch(self, hp: TRPOHparams, n_envs: int) -> None:
        check_minibatches(hp, n_envs)
        if hp.normalize_advantage and hp.sub_sampling_factor >= hp.n_steps * n_envs:
            raise HyperparameterError(
                f"`sub_sampling_factor`={hp.sub_sampling_factor} leaves one sample of the {hp.n_steps * n_envs} of a "
                "rollout, and advantages of one sample cannot be normalised"
            )

    def _reset_training_state(self) -> None:
        super()._reset_training_state()
        self._failed_policy_steps = 0
        self._layer_statistics_due = False

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_layer_statistics_due"]

    def _calls_per_rollout(self, hp: TRPOHparams) -> dict[str, int]:
        n_minibatches = full_minibatches(hp, self.n_envs)
        return {
            **super()._calls_per_rollout(hp),
            "critic update": hp.n_critic_updates * n_minibatches,
            "Fisher product": hp.cg_max_steps + 1,
        }

    def update(self, hp: TRPOHparams, metrics: Metrics) -> None:
        """One step of the policy within the trust region, then the critic's own epochs."""
        # Dropout and batch statistics would make the KL of a step a matter of chance, and shift it after the search.
        set_training_mode(self.policy, False)
        batch = cast(RolloutSamples, next(iter(self.rollout_buffer.get(batch_size=None))))
        # The policy's failures in a row and the critic's are counted apart: good steps of one do not excuse the other.
        critic_failures, self._nonfinite_in_a_row = self._nonfinite_in_a_row, self._failed_policy_steps
        batch = every(batch, hp.sub_sampling_factor)
        with self._threads_for(len(batch.advantages)):
            actor = self._step_policy(batch, hp)
        self._failed_policy_steps, self._nonfinite_in_a_row = self._nonfinite_in_a_row, critic_failures
        set_training_mode(self.policy, True)
        with restored(layer_statistics(self.policy)), self._threads_for(hp.batch_size):
            actor_ids = {id(parameter) for parameter in actor}
            own = [p for p in self.policy.parameters() if p.requires_grad and id(p) not in actor_ids]
            self._fit_critic(own, hp.n_critic_updates, hp, self._critic_loss, metrics)
        self._n_updates += 1
        self._layer_statistics_due = True

    # --- the policy's step --------------------------------------------------------------------------------------------

    def _step_policy(self, batch: RolloutSamples, hp: TRPOHparams) -> list[nn.Parameter]:
        """
        Move the policy along its natural gradient, or leave every bit of it as it is.

        :param batch: samples of π_old, ``[B]``
        :param hp: hyperparameters of this update
        :return: the actor's parameters: those the surrogate depends on
        """
        max_scale = math.inf if hp.max_step_size is None else hp.max_step_size
        if hp.normalize_advantage:
            if hp.max_step_size is not None and len(batch.advantages) > 1:
                max_scale *= float(batch.advantages.std())  # which F⁻¹g of normalised advantages is divided by
            batch = batch._replace(advantages=normalize(batch.advantages))
        distribution = self.policy.get_distribution(batch.observations)
        loss = self._objective(distribution, batch, hp)
        old = (loss.detach(), distribution_parameters(distribution))
        with th.no_grad():
            entropy = distribution.entropy()
            entropy_loss = losses.entropy_loss(-batch.old_log_prob if entropy is None else entropy)
        self.logger.record("train/entropy_loss", float(entropy_loss))
        fisher = fisher_outputs(distribution) if hp.fisher_sub_sampling_factor == 1 else None
        if not loss.requires_grad:
            raise ValueError("no parameter of the actor requires a gradient, so there is no step to take: unfreeze one")
        parameters = [p for p in self.policy.parameters() if p.requires_grad]
        gradients = th.autograd.grad(loss, parameters, retain_graph=fisher is not None, allow_unused=True)
        actor = [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
        gradient = -flatten([g for g in gradients if g is not None])  # of the surrogate, which is maximised
        divisor, product = self._kl_divisor(hp), self._fisher_product(batch, fisher, actor, hp)
        with self._threads_for(len(batch.advantages) // hp.fisher_sub_sampling_factor):
            step = self._full_step(lambda v: product(v) / divisor + hp.cg_damping * v, gradient, max_scale, hp)
        found = NO_STEP
        if bool(step.any()) and bool(th.isfinite(loss.detach() + gradient.sum() + step.sum())):
            found = self._search(self._evaluator(batch, actor, step, old, hp), hp)
        self._log_step(found, step, float(gradient @ step), float(old[0]))
        if found.accepted:
            commit(actor, found.fraction * step)
        if math.isfinite(float(old[0]) + float(step.sum()) + found.improvement + found.kl):
            self._nonfinite_in_a_row = 0
        else:
            self._count_nonfinite(loss, batch)
        return actor

    def _fisher_product(
        self,
        batch: RolloutSamples,
        outputs: tuple[Parameters, MatVec] | None,
        actor: list[nn.Parameter],
        hp: TRPOHparams,
    ) -> MatVec:
        """Products with F, compiled or not; on fewer states than the gradient's if so set: then without ``outputs``."""
        observations = every(batch, hp.fisher_sub_sampling_factor).observations

        @th.enable_grad()
        def eager() -> MatVec:
            found = outputs or fisher_outputs(self.policy.get_distribution(observations))
            return fisher_vector_product(*found, actor)

        return self._engine.fisher_product(self.policy, observations, actor, eager)

    def _kl_divisor(self, hp: TRPOHparams) -> int:
        """1, or the number of entries of a Box or MultiBinary action where the KL is their mean."""
        is_mean = hp.kl_reduction == "mean" and isinstance(self.action_space, (spaces.Box, spaces.MultiBinary))
        return get_action_dim(self.action_space) if is_mean else 1

    def _objective(self, distribution: Distribution, batch: RolloutSamples, hp: TRPOHparams) -> th.Tensor:
        """The surrogate's loss with the entropy bonus, of a policy given by its distribution on the batch."""
        log_probs = distribution.log_prob(self._policy_actions(batch.actions))
        loss = self.policy_loss(th.exp(log_probs - batch.old_log_prob), batch.advantages, hp)
        if hp.ent_coef == 0:
            return loss
        entropy = distribution.entropy()
        return loss + hp.ent_coef * losses.entropy_loss(-log_probs if entropy is None else entropy)

    def policy_loss(self, ratio: th.Tensor, advantages: th.Tensor, hp: TRPOHparams) -> th.Tensor:
        """
        The surrogate to minimise, ``−E[ρΨ]`` (TRPO paper, equation 14). Override it to try another objective.

        :param ratio: ρ = π_θ(a|s)/π_old(a|s), ``[B]``
        :param advantages: Ψ, normalised if so set, ``[B]``
        :param hp: hyperparameters of this update
        :return: scalar
        """
        return losses.surrogate(ratio, advantages)

    def _full_step(self, matvec: MatVec, gradient: th.Tensor, max_scale: float, hp: TRPOHparams) -> th.Tensor:
        """
        ``√(2δ/xᵀFx) x`` with ``x ≈ F⁻¹g``, F damped (TRPO paper, appendix C); NaN where there is no such step.

        With ``sb3_exact``, conjugate gradient starts at noise and ends at an absolute residual, as in sb3-contrib.

        :param matvec: v ↦ Fv, ``[P] → [P]``
        :param gradient: g, ``[P]``
        :param max_scale: upper limit of the square root
        """
        start, b, tol = th.zeros_like(gradient), gradient, hp.cg_tol
        if hp.sb3_exact:
            start = _SB3_NOISE * th.randn_like(gradient)
            b = gradient - matvec(start)  # solving for the rest from zero is the same as starting at `start`
            tol = _SB3_RESIDUAL / max(float(th.linalg.vector_norm(b)), 1e-30)
        found = conjugate_gradient(matvec, b, max_steps=hp.cg_max_steps, tol=tol)
        x = start + found.x
        curvature = float(x @ (gradient - found.residual))  # Fx = g − r
        self.logger.record("train/cg_steps", found.n_steps)
        self.logger.record("train/cg_residual", found.residual_norm)
        self.logger.record("train/curvature", curvature)
        return x * (math.nan if found.problem else min(trust_region_scale(curvature, hp.target_kl), max_scale))

    def _evaluator(
        self,
        batch: RolloutSamples,
        actor: list[nn.Parameter],
        step: th.Tensor,
        old: tuple[th.Tensor, Parameters],
        hp: TRPOHparams,
    ) -> Callable[[float], tuple[float, float]]:
        """The line search's function: share of the full step ↦ improvement of the surrogate, mean KL."""
        old_loss, old_distribution = old
        divergence, divisor = kl_new_old if hp.sb3_exact else kl_old_new, self._kl_divisor(hp)

        @th.no_grad()
        def evaluate(fraction: float) -> tuple[float, float]:
            with moved(actor, fraction * step):
                candidate = self.policy.get_distribution(batch.observations)
                improvement = old_loss - self._objective(candidate, batch, hp)
                return float(improvement), float(divergence(old_distribution, candidate).mean()) / divisor

        return evaluate

    @staticmethod
    def _search(evaluate: Callable[[float], tuple[float, float]], hp: TRPOHparams) -> LineSearchResult:
        if hp.line_search:
            return backtracking_line_search(
                evaluate,
                max_kl=hp.target_kl,
                shrinking_factor=hp.line_search_shrinking_factor,
                max_steps=hp.line_search_max_iter,
            )
        improvement, kl = evaluate(1.0)
        is_finite = math.isfinite(improvement + kl)
        return LineSearchResult(is_finite, float(is_finite), 0, improvement, kl)

    def _log_step(self, found: LineSearchResult, step: th.Tensor, slope: float, old_loss: float) -> None:
        values = {
            # sb3-contrib's keys
            "policy_objective": found.improvement - old_loss,
            "kl_divergence_loss": found.kl,
            "is_line_search_success": float(found.accepted),
            # ours
            "surrogate_improvement": found.improvement,
            "surrogate_improvement_expected": found.fraction * slope,
            "line_search_steps": found.n_steps,
            "step_length": found.fraction * float(th.linalg.vector_norm(step)),
        }
        for name, value in values.items():
            self.logger.record(f"train/{name}", value)

    # --- statistics inside layers -------------------------------------------------------------------------------------

    def _merge_observations(self, buffer: RolloutBuffer) -> None:
        """With the observations come the statistics that layers keep (batch norm), from one pass over the rollout."""
        if self._layer_statistics_due and layer_statistics(self.policy):
            actions = th.as_tensor(stored_field(buffer, "actions"), device=self.device).reshape(-1, buffer.action_dim)
            set_training_mode(self.policy, True)
            with th.no_grad(), without_distribution_checks():
                self.policy.evaluate_actions(self._flat_observations(buffer), self._policy_actions(actions))
            set_training_mode(self.policy, False)
        self._layer_statistics_due = False
        super()._merge_observations(buffer)


def every(batch: RolloutSamples, factor: int) -> RolloutSamples:
    """Every k-th sample of a batch, what the policy's step needs of it."""
    if factor == 1:
        return batch
    fields = ("observations", "actions", "old_log_prob", "advantages")
    return batch._replace(**{name: map_observations(getattr(batch, name), lambda x: x[::factor]) for name in fields})


@th.no_grad()
def commit(parameters: list[nn.Parameter], step: th.Tensor) -> None:
    """Add a step ``[P]`` to the parameters."""
    for parameter, change in zip(parameters, unflatten(step, parameters), strict=True):
        parameter.add_(change)


@contextmanager
def moved(parameters: list[nn.Parameter], step: th.Tensor) -> Iterator[None]:
    """Parameters with a step added for a while; afterwards every bit is what it was, whatever happened."""
    with restored(parameters):
        commit(parameters, step)
        yield


@contextmanager
def restored(tensors: Iterable[th.Tensor]) -> Iterator[None]:
    """Put tensors back to what they were, bit for bit."""
    originals = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        with th.no_grad():
            for tensor, original in originals:
                if not tensor.equal(original):  # what nobody moves may be a view that cannot be written to
                    tensor.copy_(original)


def layer_statistics(policy: nn.Module) -> list[th.Tensor]:
    """Buffers that layers may move in training mode (batch norm); observation statistics are no such ones."""
    return [buffer for name, buffer in policy.named_buffers() if not name.startswith("observation_normalizer.")]
