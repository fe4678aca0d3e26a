"""
Every hyperparameter, declared once: name, default, allowed values, meaning.

The algorithms take them as flat keyword arguments and keep them as plain attributes (what RL Zoo, Optuna, ``load`` and
W&B need). ``resolve`` checks the attributes and turns them into one of these frozen dataclasses, schedules already
numbers; the constructor, ``load`` and every ``train()`` go through it.
"""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Self

from sb3_pgplus.errors import HyperparameterError
from sb3_pgplus.schedules import as_schedule, is_constant

ADVANTAGE_ESTIMATORS = ("gae", "monte_carlo", "n_step", "td")
ACTIVATIONS = ("tanh", "relu", "elu", "gelu", "leaky_relu", "silu")


@dataclass(frozen=True)
class Spec:
    """What a hyperparameter may be, and what it means."""

    doc: str
    kind: type = float
    minimum: float = -math.inf
    maximum: float = math.inf
    exclusive_minimum: bool = False
    choices: tuple[Any, ...] = ()
    optional: bool = False
    schedulable: bool = False

    def check(self, name: str, value: Any, progress_remaining: float) -> Any:
        """
        Validate one value and give it its final type.

        :raises TypeError: on a value of the wrong type
        :raises ValueError: on one outside the allowed set or range
        """
        if value is None and self.optional:
            return None
        if self.choices:
            return self._check_choice(name, value)
        if self.kind is bool:
            return self._check_bool(name, value)
        if not self.schedulable:
            return self._check_number(name, value, self.exclusive_minimum)
        schedule = as_schedule(name, value)
        # A schedule may reach the excluded bound ("lin_0.2" anneals a clip range to 0), a number may not lie on it.
        exclusive = self.exclusive_minimum and not callable(value) and is_constant(schedule)
        return self._check_number(name, self._call(name, schedule, progress_remaining), exclusive)

    def _call(self, name: str, schedule: Callable[[float], float], progress_remaining: float) -> float:
        try:
            return schedule(progress_remaining)
        except Exception as error:
            raise TypeError(
                f"`{name}` must be {self.allowed()}, but the schedule fails when called with the remaining progress "
                f"{progress_remaining}: {error}"
            ) from error

    def _check_choice(self, name: str, value: Any) -> Any:
        for choice in self.choices:
            if value == choice and isinstance(value, bool) == isinstance(choice, bool):
                return choice
        raise HyperparameterError(f"`{name}` must be {self.allowed()}, got {value!r}")

    def _check_bool(self, name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise TypeError(f"`{name}` must be {self.allowed()}, got {value!r}")
        return value

    def _check_number(self, name: str, value: Any, exclusive: bool) -> float | int:
        wanted = Integral if self.kind is int else Real
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise TypeError(f"`{name}` must be {self.allowed()}, got {value!r}")
        number = self.kind(value)
        too_low = number <= self.minimum if exclusive else number < self.minimum
        if not math.isfinite(number) or too_low or number > self.maximum:
            raise HyperparameterError(f"`{name}` must be {self.allowed()}, got {value!r}")
        return number  # type: ignore[no-any-return]  # `kind` is int or float here

    def allowed(self) -> str:
        """The allowed values in words, for errors and tables."""
        none = " or None" if self.optional else ""
        if self.choices:
            return f"one of {', '.join(repr(choice) for choice in self.choices)}{none}"
        if self.kind is bool:
            return f"True or False{none}"
        noun = "an integer" if self.kind is int else "a number"
        schedule = " (or a schedule of such numbers)" if self.schedulable else ""
        return f"{noun}{self._range()}{schedule}{none}"

    def _range(self) -> str:
        if self.maximum < math.inf:
            return f" in {'(' if self.exclusive_minimum else '['}{self.minimum:g}, {self.maximum:g}]"
        if self.minimum > -math.inf:
            return f" {'>' if self.exclusive_minimum else '>='} {self.minimum:g}"
        return ""


def _number(default: Any, doc: str, **allowed: Any) -> Any:
    return field(default=default, metadata={"spec": Spec(doc, **allowed)})


def _scheduled(default: Any, doc: str, **allowed: Any) -> Any:
    return _number(default, doc, schedulable=True, **allowed)


def _integer(default: Any, doc: str, **allowed: Any) -> Any:
    return _number(default, doc, kind=int, **allowed)


def _switch(default: bool, doc: str) -> Any:
    return _number(default, doc, kind=bool)


def _choice(default: Any, choices: tuple[Any, ...], doc: str, **allowed: Any) -> Any:
    return _number(default, doc, choices=choices, **allowed)


@dataclass(frozen=True, kw_only=True)
class PolicyGradientHparams:
    """Hyperparameters that all algorithms of the package share."""

    learning_rate: float = _scheduled("lin_3e-4", "Step size of the optimiser.", minimum=0)
    n_steps: int = _integer(2048, "Steps per environment and rollout (T).", minimum=1)
    gamma: float = _number(0.99, "Discount factor γ.", minimum=0, maximum=1)
    gae_lambda: float = _number(0.95, "λ of GAE: bias (0) against variance (1).", minimum=0, maximum=1)
    normalize_advantage: bool = _switch(True, "Normalise advantages: PPO per minibatch, A2C and TRPO per rollout.")
    n_envs: int = _integer(1, "Environments to make where `env` is an id; otherwise `env` decides.", minimum=1)

    ent_coef: float = _scheduled(0.0, "Weight of the entropy bonus.", minimum=0)
    max_grad_norm: float | None = _scheduled(
        0.5, "Largest global gradient norm; None: no clipping.", minimum=0, exclusive_minimum=True, optional=True
    )

    advantage_estimator: str = _choice("gae", ADVANTAGE_ESTIMATORS, "Estimator Ψ of the advantage.")
    n_step_horizon: int = _integer(5, "n of `advantage_estimator='n_step'`, in steps.", minimum=1)
    bootstrap_truncated: bool = _switch(True, "Bootstrap with V(s_T) where a time limit cut the episode.")
    normalize_observations: bool | str = _choice(
        "auto",
        ("auto", True, False),
        "Normalise observations inside the policy by running mean and std. 'auto': float observations that are no "
        "images, unless a VecNormalize does it.",
    )
    clip_observations: float | None = _number(
        10.0, "Largest absolute normalised observation.", minimum=0, exclusive_minimum=True, optional=True
    )
    normalize_rewards: bool | str = _choice(
        "auto",
        ("auto", True, False),
        "Divide rewards by the running std of the discounted return. 'auto': unless a VecNormalize does it.",
    )
    clip_rewards: float | None = _number(
        10.0, "Largest absolute normalised reward.", minimum=0, exclusive_minimum=True, optional=True
    )
    normalize_value_targets: bool = _switch(
        False, "The critic predicts returns normalised by their running mean and std."
    )
    ortho_init: bool | None = _number(
        None, "Orthogonal initialisation; None: the policy's default (on in SB3's).", kind=bool, optional=True
    )
    activation_fn: str | None = _choice(
        None, ACTIVATIONS, "Activation; None: the policy's default (tanh in SB3's).", optional=True
    )
    log_std_init: float | None = _number(
        -0.5, "Initial log standard deviation; None: the policy's default (0 in SB3's).", optional=True
    )
    adam_eps: float | None = _number(
        None,
        "ε of Adam; None: the policy's default (1e-5 in SB3's).",
        minimum=0,
        exclusive_minimum=True,
        optional=True,
    )
    schedule_timesteps: int | None = _integer(
        None, "Environment steps over which schedules run; None: this `learn`'s total.", minimum=1, optional=True
    )
    max_nonfinite_updates: int = _integer(
        3, "Non-finite updates in a row (each one skipped) after which training stops with an error.", minimum=1
    )
    compile: bool | str = _choice(
        "auto",
        ("auto", True, False),
        "Compile update and policy step. 'auto': where the training is long enough to pay it back. It changes rounding "
        "only; `engine_report()` says what is compiled, and why the rest is not.",
    )
    sb3_exact: bool = _switch(
        False,
        "SB3's order of floating-point operations (GAE loop, bootstraps one by one) and its timing of schedules "
        "(position at the end of a rollout instead of its start): same bits as SB3, slower.",
    )

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of all hyperparameters."""
        return tuple(_specs(cls))

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Name → default, as the constructor takes it (schedules as strings)."""
        return {f.name: f.default for f in fields(cls)}

    @classmethod
    def spec(cls, name: str) -> Spec:
        """The declaration of one hyperparameter."""
        return _specs(cls)[name]

    @classmethod
    def describe(cls) -> str:
        """A paragraph for each hyperparameter: meaning, allowed values, default."""
        return "\n".join(
            f":param {name}: {spec.doc} Allowed: {spec.allowed()}. Default: {cls.defaults()[name]!r}."
            for name, spec in _specs(cls).items()
        )

    @classmethod
    def scheduled_names(cls) -> tuple[str, ...]:
        """Names of the hyperparameters that accept schedules."""
        return tuple(name for name, spec in _specs(cls).items() if spec.schedulable)

    @classmethod
    def resolve(cls, values: Mapping[str, Any], progress_remaining: float = 1.0) -> Self:
        """
        Validate values and evaluate schedules.

        :param values: name → value for every hyperparameter (others are ignored)
        :param progress_remaining: 1 at the start of training, 0 at its end
        :return: the hyperparameters as plain numbers
        :raises TypeError: on a value of the wrong type
        :raises ValueError: on a value, or a combination, that is not allowed
        """
        return cls(**{name: spec.check(name, values[name], progress_remaining) for name, spec in _specs(cls).items()})

    def later(self, values: Mapping[str, Any], progress_remaining: float) -> Self:
        """
        The same settings at another time: what :meth:`resolve` returns for unchanged values, schedules evaluated anew.

        :param values: those that ``self`` was resolved from
        :param progress_remaining: 1 at the start of training, 0 at its end
        """
        specs = _specs(type(self))
        schedules = [n for n in self.scheduled_names() if not isinstance(values[n], _CONSTANTS)]
        moved = {n: specs[n].check(n, values[n], progress_remaining) for n in schedules}
        later = object.__new__(type(self))  # past the constructor, which a frozen dataclass makes slow
        later.__dict__.update({name: self.__dict__[name] for name in specs}, **moved)
        if hasattr(later, "__post_init__"):
            later.__post_init__()
        return later


@dataclass(frozen=True, kw_only=True)
class ActorCriticHparams(PolicyGradientHparams):
    """What A2C and PPO add: one loss of actor and critic, one optimiser."""

    vf_coef: float = _scheduled(0.5, "Weight of the critic's loss.", minimum=0)
    critic_learning_rate: float | None = _scheduled(
        None, "Step size of parameters only the critic uses; None: `learning_rate`.", minimum=0, optional=True
    )


@dataclass(frozen=True, kw_only=True)
class MinibatchHparams(PolicyGradientHparams):
    """What PPO and TRPO add: minibatches, and a critic that takes many steps on one rollout."""

    batch_size: int = _integer(64, "Samples per minibatch (B).", minimum=1)
    clip_range_vf: float | None = _scheduled(
        0.2,
        "ε̂ of the critic's clip, in units of the normalised return; None: no clip.",
        minimum=0,
        exclusive_minimum=True,
        optional=True,
    )
    value_clip: str = _choice(
        "max",
        ("max", "clipped_only"),
        "'max': the larger of plain and clipped squared error; 'clipped_only': SB3's, the clipped one alone.",
    )


@dataclass(frozen=True, kw_only=True)
class A2CHparams(ActorCriticHparams):
    """Hyperparameters of A2CPlus."""

    learning_rate: float = _scheduled("lin_7e-4", "Step size of the optimiser.", minimum=0)
    n_steps: int = _integer(8, "Steps per environment and rollout (T).", minimum=1)
    n_envs: int = _integer(8, "Environments to make where `env` is an id; otherwise `env` decides.", minimum=1)
    gae_lambda: float = _number(0.9, "λ of GAE: bias (0) against variance (1).", minimum=0, maximum=1)
    normalize_advantage: bool = _switch(False, "Normalise advantages over the rollout.")
    use_rms_prop: bool | str = _choice(
        True,
        (True, False, "tf_like"),
        "Optimiser: RMSprop as torch has it (True) or as TensorFlow has it ('tf_like': ε inside the root, first "
        "accumulator 1), Adam (False). An `optimizer_class` in policy_kwargs goes first.",
    )
    rms_prop_eps: float = _number(1e-5, "ε of RMSprop.", minimum=0, exclusive_minimum=True)

    def __post_init__(self) -> None:
        if self.adam_eps is not None and self.use_rms_prop:
            raise HyperparameterError(
                f"`adam_eps`={self.adam_eps} is for Adam, but `use_rms_prop`={self.use_rms_prop!r}: set it to False, "
                "or use `rms_prop_eps`"
            )


@dataclass(frozen=True, kw_only=True)
class PPOHparams(MinibatchHparams, ActorCriticHparams):
    """Hyperparameters of PPOPlus. The defaults switch on all tricks of the lecture and two beyond it."""

    gae_lambda: float = _number(0.9, "λ of GAE: bias (0) against variance (1).", minimum=0, maximum=1)
    n_epochs: int = _integer(10, "Passes over each rollout.", minimum=1)
    clip_range: float | None = _scheduled(
        "lin_0.2", "ε of the ratio clip; None: no clip.", minimum=0, exclusive_minimum=True, optional=True
    )
    target_kl: float | None = _scheduled(
        None, "Stop the epochs once the KL exceeds 1.5 times this.", minimum=0, exclusive_minimum=True, optional=True
    )
    kl_coef: float | None = _scheduled(
        None, "β of the KL penalty, closed form; None: no penalty.", minimum=0, optional=True
    )
    adaptive_kl_target: float | None = _number(
        None,
        "KL that β adapts to (PPO paper, section 4): halved below target/1.5, doubled above 1.5·target.",
        minimum=0,
        exclusive_minimum=True,
        optional=True,
    )
    desired_kl: float | None = _number(
        None,
        "KL that the learning rate adapts to after each epoch: divided by 1.5 above twice this, multiplied below half.",
        minimum=0,
        exclusive_minimum=True,
        optional=True,
    )
    recompute_advantages: bool | str = _choice(
        "auto",
        ("auto", True, False),
        "Recompute values and advantages before every epoch but the first. 'auto': unless the rollout buffer is SB3's "
        "or a callback changed it.",
    )
    n_critic_epochs: int | None = _integer(
        None,
        "Passes for the critic; None: `n_epochs`. Further ones train only its own parameters.",
        minimum=0,
        optional=True,
    )

    def __post_init__(self) -> None:
        if self.normalize_advantage and self.batch_size < 2:
            raise HyperparameterError(
                "`batch_size` must be greater than 1 when advantages are normalised per minibatch, "
                f"got {self.batch_size}"
            )
        if self.adaptive_kl_target is not None and self.kl_coef is None:
            raise HyperparameterError(
                f"`adaptive_kl_target`={self.adaptive_kl_target} adapts `kl_coef`, which is None: give it a start value"
            )


@dataclass(frozen=True, kw_only=True)
class TRPOHparams(MinibatchHparams):
    """Hyperparameters of TRPOPlus. ``learning_rate``, ``batch_size`` and ``max_grad_norm`` are the critic's."""

    learning_rate: float = _scheduled("lin_1e-3", "Step size of the critic's optimiser.", minimum=0)
    batch_size: int = _integer(128, "Samples per minibatch of the critic (B).", minimum=1)
    max_grad_norm: float | None = _scheduled(
        0.5, "Largest gradient norm of the critic; None: no clipping.", minimum=0, exclusive_minimum=True, optional=True
    )
    log_std_init: float | None = _number(
        None, "Initial log standard deviation; None: the policy's default (0 in SB3's).", optional=True
    )
    n_critic_updates: int = _integer(20, "Passes of the critic over each rollout.", minimum=0)
    target_kl: float = _scheduled(
        0.01, "δ, the trust region: largest mean KL(π_old‖π_θ) of an update.", minimum=0, exclusive_minimum=True
    )
    kl_reduction: str = _choice(
        "sum",
        ("sum", "mean"),
        "KL of an action with several entries (Box, MultiBinary): that of the whole action ('sum'), or the mean over "
        "its entries ('mean'), so that the trust region grows with their number, as in sb3-contrib.",
    )
    max_step_size: float | None = _number(
        None,
        "Largest α of the step αF⁻¹g, g of advantages in units of the scaled rewards; None: up to the trust region's "
        "border, however little there is to gain.",
        minimum=0,
        exclusive_minimum=True,
        optional=True,
    )
    cg_max_steps: int = _integer(15, "Most conjugate-gradient steps.", minimum=1)
    cg_tol: float = _number(1e-5, "Relative residual at which conjugate gradient ends.", minimum=0)
    cg_damping: float = _number(0.1, "η of the damped Fisher matrix F + ηI.", minimum=0)
    line_search: bool = _switch(
        True, "Shrink the step until the surrogate improves within the trust region; False: natural policy gradient."
    )
    line_search_shrinking_factor: float = _number(
        0.8, "Factor between two candidates of the line search.", minimum=0.01, maximum=0.99
    )
    line_search_max_iter: int = _integer(10, "Most candidates of the line search.", minimum=1)
    sub_sampling_factor: int = _integer(1, "The policy's step uses every k-th sample of the rollout.", minimum=1)
    fisher_sub_sampling_factor: int = _integer(
        1, "Fisher products use every k-th of those samples; surrogate and KL use them all.", minimum=1
    )


#: Class → its declarations: they are asked for at every update.
_SPECS: dict[type[PolicyGradientHparams], dict[str, Spec]] = {}


def _specs(cls: type[PolicyGradientHparams]) -> dict[str, Spec]:
    if cls not in _SPECS:
        _SPECS[cls] = {f.name: _spec_of(f) for f in fields(cls)}
    return _SPECS[cls]


def _spec_of(declared: "Field[Any]") -> Spec:
    spec: Spec = declared.metadata["spec"]
    return spec


#: Of a hyperparameter's value that no progress changes.
_CONSTANTS = (float, int, type(None))


def nearest(name: str, known: Iterable[str]) -> str:
    """``", did you mean `x`?"`` for the closest known name, or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean `{matches[0]}`?" if matches else ""
