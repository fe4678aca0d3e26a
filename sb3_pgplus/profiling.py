"""
Where a training's time goes: what `sb3-pgplus profile` does, as a function.

The timers are put around a model's methods from outside, so training itself holds no timing code.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from stable_baselines3.common.callbacks import BaseCallback

from sb3_pgplus.configs import RunSettings
from sb3_pgplus.environments import make_environments, torch_threads
from sb3_pgplus.on_policy import PolicyGradientPlus
from sb3_pgplus.training import TrainingError, build_model

OTHER = "other"
PHASES = ("environment", "policy step", "buffer", "advantages", "update", "logging and callbacks", OTHER)
#: What is measured by default: so many rollouts, and at least so many environment steps.
_ROLLOUTS, _STEPS = 5, 8192
_CALLBACK_METHODS = ("update_locals", "on_step", "on_rollout_start", "on_rollout_end")


class PhaseClock:
    """
    Adds up the seconds spent in each phase; a phase that begins inside another one interrupts it.

    So the phases add up to the time since the clock was made or last restarted, with ``"other"`` for what is in none.
    """

    def __init__(self) -> None:
        self._stack = [OTHER]
        self.restart()

    def restart(self) -> None:
        """Forget what was measured, inside whatever phase it is now."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._since = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Phase → seconds until now."""
        self._charge()
        return dict(self.seconds)

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """
        A function that does the same and counts as a phase.

        :param phase: one of ``PHASES``
        :param function: any
        """

        return _Timed(self, phase, function)

    def enter(self, phase: str) -> None:
        """
        A phase begins, inside the one it is now.

        :param phase: one of ``PHASES``
        """
        self._charge()
        self._stack.append(phase)

    def leave(self) -> None:
        """The phase that began last is over."""
        self._charge()
        self._stack.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now


class _Timed:
    """A function or object that counts as a phase when it is called, and is what it was in everything else."""

    def __init__(self, clock: PhaseClock, phase: str, function: Callable[..., Any]) -> None:
        self._clock, self._phase, self._function = clock, phase, function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._clock.enter(self._phase)
        try:
            return self._function(*args, **kwargs)
        finally:
            self._clock.leave()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)


@dataclass(frozen=True)
class Profile:
    """Seconds by phase, all rollouts together."""

    title: str
    seconds: dict[str, float]
    n_rollouts: int
    steps_per_rollout: int
    """Environment steps, all copies together."""
    warm_up_rollouts: int
    warm_up_seconds: float
    engine: str
    """The engine's report: what is compiled."""

    @property
    def total(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())

    def rows(self) -> list[tuple[str, float, float, float]]:
        """Phase, milliseconds per rollout, share, microseconds per environment step; the last row is the total."""
        times = [*self.seconds.items(), ("total", self.total)]
        n_steps = self.n_rollouts * self.steps_per_rollout
        return [(name, 1e3 * s / self.n_rollouts, s / self.total, 1e6 * s / n_steps) for name, s in times]

    def table(self) -> Table:
        """What the command prints."""
        table = Table(title=self.title, title_justify="left")
        table.add_column("phase")
        for name in ("ms per rollout", "share", "µs per env step"):
            table.add_column(name, justify="right")
        *phases, total = self.rows()
        for is_total, (name, milliseconds, share, micro) in [*((False, row) for row in phases), (True, total)]:
            if is_total:
                table.add_section()
            table.add_row(name, f"{milliseconds:,.2f}", f"{share:.1%}", f"{micro:,.2f}")
        return table

    def summary(self) -> str:
        """The lines below the table."""
        speed = self.n_rollouts * self.steps_per_rollout / self.total
        warm_up = f"warm-up of {_rollouts(self.warm_up_rollouts)}: {self.warm_up_seconds:.1f} s, compiling included"
        return "\n".join([f"{speed:,.0f} env steps/s over {_rollouts(self.n_rollouts)}", warm_up, self.engine])


class _RolloutCounter(BaseCallback):
    """Restarts the clock after the warm-up, reads it after the last rollout wanted, and ends training then."""

    def __init__(self, clock: PhaseClock, warm_up: int, n_rollouts: int) -> None:
        super().__init__()
        self._clock, self._warm_up, self._last = clock, warm_up, warm_up + n_rollouts
        self._begun = 0
        self.warm_up_seconds = 0.0
        self.seconds: dict[str, float] | None = None

    def _on_rollout_start(self) -> None:
        # A rollout's update is over when the next rollout begins.
        if self._begun == self._warm_up:
            self.warm_up_seconds = sum(self._clock.read().values())
            self._clock.restart()
        elif self._begun == self._last:
            self.seconds = self._clock.read()
        self._begun += 1

    def _on_step(self) -> bool:
        return self.seconds is None


def attach(clock: PhaseClock, model: PolicyGradientPlus[Any]) -> None:
    """
    Put a clock's timers around what a model calls in training; they stay for the model's life.

    :param clock: adds up
    :param model: before its ``learn``
    """
    env, engine, make_callback = model.env, model._engine, model._init_callback
    assert env is not None
    policy_step_of = engine.policy_step

    def policy_step(*args: Any) -> Callable[..., Any]:
        return clock.timed("policy step", policy_step_of(*args))

    def callback(*args: Any) -> BaseCallback:
        made = make_callback(*args)
        _wrap(clock, "logging and callbacks", made, _CALLBACK_METHODS)
        return made

    engine.policy_step = clock.timed("policy step", policy_step)  # type: ignore[method-assign]
    model._init_callback = callback  # type: ignore[method-assign, assignment]
    _wrap(clock, "environment", env, ("step",))
    _wrap(clock, "buffer", model.rollout_buffer, ("add", "reset"))
    _wrap(clock, "advantages", model, ("_finish_rollout", "_merge_observations"))
    _wrap(clock, "update", model, ("train",))
    _wrap(clock, "logging and callbacks", model, ("dump_logs", "_update_info_buffer"))


def _wrap(clock: PhaseClock, phase: str, owner: Any, names: Sequence[str]) -> None:
    for name in names:
        setattr(owner, name, clock.timed(phase, getattr(owner, name)))


def profile_model(
    model: PolicyGradientPlus[Any], *, n_timesteps: int, n_rollouts: int | None, warm_up: int, title: str = ""
) -> Profile:
    """
    Train a few rollouts of a longer training and measure its phases.

    :param model: a new one; it is not fit for anything else afterwards
    :param n_timesteps: length of the training it is the beginning of, which decides what is compiled
    :param n_rollouts: how many are measured, at least 1; None: five, or more where they are short
    :param warm_up: how many before that are not, at least 1: what is compiled is compiled there
    :param title: of the table
    """
    steps_per_rollout = model.n_steps * model.n_envs
    n_rollouts = n_rollouts or max(_ROLLOUTS, math.ceil(_STEPS / steps_per_rollout))
    clock = PhaseClock()
    counter = _RolloutCounter(clock, warm_up, n_rollouts)
    attach(clock, model)
    model.learn(max(n_timesteps, (warm_up + n_rollouts + 1) * steps_per_rollout), callback=counter)
    assert counter.seconds is not None
    return Profile(
        title=title,
        seconds=counter.seconds,
        n_rollouts=n_rollouts,
        steps_per_rollout=steps_per_rollout,
        warm_up_rollouts=warm_up,
        warm_up_seconds=counter.warm_up_seconds,
        engine=model.engine_report(),
    )


def profile(
    settings: RunSettings,
    *,
    n_rollouts: int | None = None,
    warm_up: int = 2,
    device: str = "auto",
    num_threads: int | None = None,
) -> Profile:
    """
    Profile the beginning of the training that these settings describe; nothing is written.

    :param settings: from :func:`sb3_pgplus.configs.resolve_settings`
    :param n_rollouts: rollouts that are measured; None: five, or more where they are short
    :param warm_up: rollouts before that
    :param device: as SB3's
    :param num_threads: torch's CPU threads, see :func:`sb3_pgplus.environments.torch_threads`
    :raises ConfigError: if the settings are impossible
    :raises TrainingError: if training itself raises
    """
    env = make_environments(settings.environment, n_envs=settings.n_envs, seed=settings.seed, backend=settings.backend)
    try:
        model = build_model(settings, env, device=device)
        size = f"{model.n_envs} × {model.n_steps} steps"
        title = f"{type(model).__name__} on {settings.environment.env}, {size}, {model.device}"
        with torch_threads(env.observation_space, num_threads), _failure_named():
            return profile_model(
                model, n_timesteps=settings.n_timesteps, n_rollouts=n_rollouts, warm_up=warm_up, title=title
            )
    finally:
        env.close()


@contextmanager
def _failure_named() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise TrainingError(f"{type(error).__name__}: {error}") from error


def _rollouts(number: int) -> str:
    return "1 rollout" if number == 1 else f"{number} rollouts"
