"""
Bias and variance of the advantage estimators Ψ, measured: Monte Carlo, n-step, TD and GAE over λ.

What you learn here: how much of an estimator's error the critic makes (bias) and how much chance makes (variance), on a
real task with a half-trained critic, and why λ is between 0 and 1. From each of some states s that the policy visits,
one action a is taken again and again, and the episode is played to its end by the policy. The mean discounted return
of these episodes is Q(s, a), whatever the critic says; so for one pair

    bias = E[Ψ | s, a] + V(s) − Q(s, a),    variance = Var[Ψ | s, a].

V(s) is added because a baseline that knows only the state does not bias the policy gradient. Needs the extras `mujoco`
and `report`.

    python examples/bias_variance.py
    python examples/bias_variance.py --states 64 --rollouts 256 --figure bias_variance.svg
    python examples/bias_variance.py --env Pendulum-v1 --timesteps 4e4 --gamma 0.95
"""

import argparse
import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from rich.progress import track
from scipy.stats import bootstrap

from sb3_pgplus import PPOPlus, make_vec_env
from sb3_pgplus.core.advantages import gae, monte_carlo_advantages, n_step_advantages

LAMBDAS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)
HORIZONS = (1, 2, 5, 10, 20, 50, 100)
NEGLIGIBLE = 0.005
"""An episode is cut, and what the critic says is added, where γ^t is below this."""


@dataclass(frozen=True)
class Rollouts:
    """Episodes from one state, ``[T, M]``; zeros after an episode's end."""

    rewards: th.Tensor
    values: th.Tensor
    next_values: th.Tensor
    dones: th.Tensor


def estimators(gamma: float) -> dict[str, Callable[[Rollouts], th.Tensor]]:
    """Name → Ψ of the first step of each episode, ``[M]``: the functions that PPOPlus uses."""

    def first(estimator: Callable[..., th.Tensor], rollouts: Rollouts, **options: Any) -> th.Tensor:
        r = rollouts
        return estimator(r.rewards, r.values, r.next_values, r.dones, gamma=gamma, **options)[0]

    named = {f"GAE, λ = {x:g}": functools.partial(first, gae, gae_lambda=x) for x in LAMBDAS}
    named |= {f"{n}-step": functools.partial(first, n_step_advantages, horizon=n) for n in HORIZONS}
    return named | {"Monte Carlo": functools.partial(first, monte_carlo_advantages)}


def bias_and_variance(targets: th.Tensor, returns: th.Tensor) -> tuple[float, float]:
    """
    Squared bias and variance for one pair (s, a), both without bias themselves.

    :param targets: Ψ + V(s) of each episode, ``[M]``
    :param returns: discounted return of the same episodes, ``[M]``
    """
    errors = targets - returns  # of the same episodes: what they have in common cancels, and the mean is more exact
    bias_squared = errors.mean() ** 2 - errors.var() / len(errors)
    return bias_squared.item(), targets.var().item()


# --- the task ---------------------------------------------------------------------------------------------------------


def snapshot(env: gym.Env[Any, Any]) -> Any:
    simulator: Any = env.unwrapped
    if hasattr(simulator, "set_state"):  # MuJoCo
        return simulator.data.qpos.copy(), simulator.data.qvel.copy()
    return copy.deepcopy(simulator.state)  # classic control


def restore(env: gym.Env[Any, Any], state: Any) -> None:
    simulator: Any = env.unwrapped
    if hasattr(simulator, "set_state"):
        simulator.set_state(*state)
    else:
        simulator.state = copy.deepcopy(state)


class Player:
    """Plays the policy from given states, without time limits, in several copies of the task."""

    def __init__(self, model: PPOPlus, env_id: str, copies: int, gamma: float) -> None:
        self.model, self.gamma = model, gamma
        # The critic learns in units of scaled rewards; everything here is in the task's own.
        self.scale = model.reward_normalizer.std().item() if model.normalize_rewards else 1.0
        self.envs = [gym.make(env_id).unwrapped for _ in range(copies)]
        self.horizon = math.ceil(math.log(NEGLIGIBLE) / math.log(gamma))

    def act(self, observations: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], th.Tensor]:
        """Sampled actions and V of a batch of observations."""
        with th.no_grad():
            actions, values, _ = self.model.policy(self.model.policy.obs_to_tensor(observations)[0])
        space = self.envs[0].action_space
        taken = actions.numpy()
        if isinstance(space, gym.spaces.Box):
            taken = np.clip(taken, space.low, space.high)
        return taken, values.flatten().double() * self.scale

    def visited(self, number: int, every: int, seed: int) -> list[tuple[Any, np.ndarray[Any, Any], Any]]:
        """States along the policy's own episodes: simulator's state, observation, the action it took there."""
        env, found = self.envs[0], []
        observation, _ = env.reset(seed=seed)
        while len(found) < number:
            for _ in range(every):
                state, seen = snapshot(env), observation
                action = self.act(observation[None])[0][0]
                observation, _, terminated, _, _ = env.step(action)
                if terminated:
                    observation, _ = env.reset()
            found.append((state, seen, action))
        return found

    def play(self, state: Any, observation: np.ndarray[Any, Any], action: Any | None) -> Rollouts:
        """One episode in each copy; the first action is given, or drawn like all others."""
        m = len(self.envs)
        for env in self.envs:
            env.reset()
            restore(env, state)
        fields = {name: th.zeros(self.horizon, m, dtype=th.float64) for name in ("rewards", "values", "next_values")}
        dones = th.zeros(self.horizon, m, dtype=th.bool)
        observations = np.repeat(observation[None], m, axis=0)
        alive = np.arange(m)
        for t in range(self.horizon):
            actions, values = self.act(observations[alive])
            fields["values"][t, alive] = values
            if t:
                fields["next_values"][t - 1, alive] = values
            for i, drawn in zip(alive, actions, strict=True):
                first = action if t == 0 and action is not None else drawn
                observations[i], reward, dones[t, i], _, _ = self.envs[i].step(first)
                fields["rewards"][t, i] = float(reward)
            alive = alive[~dones[t, alive].numpy()]
            if not len(alive):
                break
        else:
            fields["next_values"][-1, alive] = self.act(observations[alive])[1]
        return Rollouts(dones=dones, **fields)

    def returns(self, rollouts: Rollouts) -> th.Tensor:
        """Discounted returns, ``[M]``: γ^T V(s_T) stands for the rest of an episode that has not ended."""
        discounts = self.gamma ** th.arange(self.horizon, dtype=th.float64)[:, None]
        rest = rollouts.next_values[-1] * self.gamma**self.horizon
        return (discounts * rollouts.rewards).sum(dim=0) + rest


# --- the measurement --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Of one estimator, means over pairs (s, a), in units of the reward."""

    bias: float
    bias_interval: tuple[float, float]
    std: float

    @property
    def rmse(self) -> float:
        return math.hypot(self.bias, self.std)


def measure(player: Player, pairs: list[tuple[Any, np.ndarray[Any, Any], Any]]) -> tuple[dict[str, Measured], str]:
    named = estimators(player.gamma)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in named}
    advantages, critic_errors = [], []
    for state, observation, action in track(pairs, "states"):
        rollouts = player.play(state, observation, action)
        returns, value = player.returns(rollouts), rollouts.values[0, 0]
        for name, estimator in named.items():
            found[name].append(bias_and_variance(estimator(rollouts) + value, returns))
        true_value = player.returns(player.play(state, observation, None)).mean()
        advantages.append((returns.mean() - true_value).item())
        critic_errors.append((value - true_value).item())
    scale = f"RMS of the advantages {rms(advantages):.2f}, RMS error of the critic {rms(critic_errors):.2f}"
    return {name: summarize(np.array(values)) for name, values in found.items()}, scale


def summarize(values: np.ndarray[Any, Any]) -> Measured:
    bias_squared, variance = values.T
    interval = bootstrap((bias_squared,), np.mean, method="percentile", rng=np.random.default_rng(0))
    low, high = (root(end) for end in interval.confidence_interval)
    return Measured(root(bias_squared.mean()), (low, high), root(variance.mean()))


def root(squared: float) -> float:
    return math.sqrt(max(squared, 0.0))  # an estimate of a square without bias may be just below 0


def rms(values: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def table(measured: dict[str, Measured]) -> str:
    lines = ["| Ψ | bias, RMS | 95 % interval | standard deviation | both together |", "|---|--:|--:|--:|--:|"]
    for name, found in measured.items():
        low, high = found.bias_interval
        lines.append(f"| {name} | {found.bias:.2f} | {low:.2f} to {high:.2f} | {found.std:.2f} | {found.rmse:.2f} |")
    return "\n".join(lines)


def draw(measured: dict[str, Measured], title: str, path: Path) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for label, color, marker in (("GAE", "#1f6fb2", "o"), ("step", "#d9822b", "s")):
        names = [name for name in measured if label in name]
        x, y = ([getattr(measured[name], field) for name in names] for field in ("bias", "std"))
        axes.plot(x, y, marker=marker, color=color, label="GAE over λ" if label == "GAE" else "n-step over n")
        for name, *place in zip(names, x, y, strict=True):
            text = name.removeprefix("GAE, ").removesuffix("-step")
            side, offset = ("right", (-6, -8)) if label == "GAE" else ("left", (6, 3))
            axes.annotate(text, place, offset, textcoords="offset points", ha=side, fontsize=7, color=color)
    right, top = (1.1 * max(getattr(found, field) for found in measured.values()) for field in ("bias", "std"))
    grid = np.meshgrid(np.linspace(0, right, 200), np.linspace(0, top, 200))
    levels = axes.contour(*grid, np.hypot(*grid), levels=8, colors="#d5d9de", linewidths=0.7)
    axes.clabel(levels, fontsize=6)
    axes.set(
        xlabel="bias (RMS over states)",
        ylabel="standard deviation",
        xlim=(-0.1 * right, right),
        ylim=(-0.06 * top, top),
    )
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    mpl.rcParams["svg.hashsalt"] = "bias_variance"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


# --- the program ------------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Bias and variance of the advantage estimators on a real task.")
    parser.add_argument("--env", default="Hopper-v5", help="a task of MuJoCo or classic control")
    parser.add_argument("--timesteps", type=float, default=1e5, help="of training before: policy and critic half ready")
    parser.add_argument("--gamma", type=float, default=0.99, help="discount factor")
    parser.add_argument("--states", type=int, default=32, help="pairs (s, a)")
    parser.add_argument("--rollouts", type=int, default=64, help="episodes from each")
    parser.add_argument("--every", type=int, default=37, help="steps from one state to the next")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, help="picture to draw")
    args = parser.parse_args()
    if not 0 < args.gamma < 1:
        parser.error(f"--gamma {args.gamma:g}: it must lie between 0 and 1")
    for name in ("states", "rollouts"):
        if getattr(args, name) < 2:
            parser.error(f"--{name} {getattr(args, name)}: a variance needs at least 2")
    return args


def main() -> None:
    args = parse_arguments()
    th.set_num_threads(1)
    env = make_vec_env(args.env, n_envs=8, seed=args.seed)
    model = PPOPlus("MlpPolicy", env, n_steps=256, gamma=args.gamma, gae_lambda=0.95, seed=args.seed, device="cpu")
    model.learn(args.timesteps, progress_bar=True)
    env.close()
    model.policy.set_training_mode(False)
    player = Player(model, args.env, args.rollouts, args.gamma)
    pairs = player.visited(args.states, args.every, args.seed + 1_000_000)
    measured, scale = measure(player, pairs)
    title = f"{args.env}, {args.timesteps:,.0f} steps of training, γ = {args.gamma:g}"
    print(f"{title}, {args.states} states × {args.rollouts} episodes\n\n{table(measured)}\n\n{scale}")
    if args.figure:
        draw(measured, title, args.figure)


if __name__ == "__main__":
    main()
