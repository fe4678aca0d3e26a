"""
Do compiled, eager and SB3's training learn alike? PPO with SB3's settings on two tasks, five seeds or more.

    python benchmarks/learning_curves.py --jobs 2       # trains what is missing; a stopped comparison continues
    python benchmarks/learning_curves.py --jobs 2 --seeds 15 --tasks HalfCheetah-v5    # more seeds of one task
    python benchmarks/learning_curves.py --table        # table and figure from the stored runs, nothing is trained

Every finished run is one file in ``benchmarks/results/learning_curves``: steps, and the mean return of the last 100
training episodes at the end of every rollout. All three have the same hyperparameters and ``DummyVecEnv``'s
environments; ours has ``presets.SB3_PPO`` with ``sb3_exact=False``, and normalises where SB3 has ``VecNormalize``.
"""

import argparse
import json
import math
import multiprocessing
import pathlib
import time
from dataclasses import asdict, dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import torch as th
from rich.progress import track
from scipy import stats
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_pgplus import PPOPlus, presets
from sb3_pgplus.files import write_atomically

mpl.use("Agg")
from matplotlib import pyplot as plt

ROOT = pathlib.Path(__file__).parents[1]
STORE, FIGURE = ROOT / "benchmarks" / "results" / "learning_curves", ROOT / "docs" / "images" / "learning_curves.svg"
N_ENVS, TOTAL = 8, 100_000
TASKS: dict[str, dict[str, Any]] = {
    "Pendulum-v1": {"n_steps": 128, "gamma": 0.9, "learning_rate": 1e-3},
    "HalfCheetah-v5": {"n_steps": 256},
}
MODES = {"compiled": "#1f6fb2", "eager": "#3a9d5d", "SB3": "#8a8f98"}
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """One training."""

    env: str
    mode: str
    seed: int

    @property
    def path(self) -> pathlib.Path:
        """Where its curve lies."""
        return STORE / f"{self.env}_{self.mode}_{self.seed}.json"


class Curve(BaseCallback):
    """Mean return of the last 100 training episodes at the end of every rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []
        self.returns: list[float | None] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        episodes = [episode["r"] for episode in self.model.ep_info_buffer or ()]
        self.steps.append(self.num_timesteps)
        self.returns.append(float(np.mean(episodes)) if episodes else None)


def train(run: Run) -> None:
    """Make one run and store it."""
    th.set_num_threads(1)
    started, settings = time.perf_counter(), TASKS[run.env]
    env: Any = make_vec_env(run.env, N_ENVS, seed=run.seed)
    if run.mode == "SB3":
        env = VecNormalize(env, gamma=settings.get("gamma", 0.99))
        model: Any = PPO("MlpPolicy", env, seed=run.seed, device="cpu", **settings)
    else:
        ours = {"sb3_exact": False, "normalize_observations": True, "normalize_rewards": True, "n_envs": N_ENVS}
        ours["compile"] = run.mode == "compiled"
        model = PPOPlus("MlpPolicy", env, seed=run.seed, device="cpu", **{**presets.SB3_PPO, **ours, **settings})
    curve = Curve()
    model.learn(TOTAL, curve)
    if run.mode == "compiled":
        assert "update: compiled" in model.engine_report(), model.engine_report()
    seconds = round(time.perf_counter() - started, 1)
    result = {**asdict(run), "steps": curve.steps, "returns": curve.returns, "seconds": seconds}
    write_atomically(run.path, json.dumps(result).encode())


def curves(env: str, mode: str) -> tuple[FloatArray, FloatArray]:
    """Steps ``[K]`` and returns ``[seeds, K]`` of the stored runs, NaN before the first episode's end."""
    stored = [json.loads(path.read_text()) for path in sorted(STORE.glob(f"{env}_{mode}_*.json"))]
    if not stored:
        return np.zeros(0), np.zeros((0, 0))
    return np.array(stored[0]["steps"], float), np.array([run["returns"] for run in stored], float)


def interval(values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean over seeds and half the width of its 95 % interval (Student's t), for each column."""
    n = len(values)
    half = stats.t.ppf(0.975, max(n - 1, 1)) * values.std(axis=0, ddof=1) / math.sqrt(n) if n > 1 else values[0] * 0
    return values.mean(axis=0), half


def difference(ours: FloatArray, theirs: FloatArray) -> str:
    """Difference of means with Welch's 95 % interval."""
    found = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    return f"{ours.mean() - theirs.mean():.0f} ({found.low:.0f} to {found.high:.0f})"


def print_table() -> None:
    """Area under the curve and its end, beside SB3's."""
    print("| Task | Training | seeds | mean of the curve | its last point | mean of the curve, difference to SB3 |")
    print("|---|---|--:|--:|--:|--:|")
    for env in TASKS:
        reference = np.nanmean(curves(env, "SB3")[1], axis=1)
        for mode in MODES:
            returns = curves(env, mode)[1]
            areas = np.nanmean(returns, axis=1)
            texts = [f"{values.mean():.0f} ± {values.std(ddof=1):.0f}" for values in (areas, returns[:, -1])]
            against = "–" if mode == "SB3" else difference(areas, reference)
            print(f"| {env} | {mode} | {len(returns)} | {texts[0]} | {texts[1]} | {against} |")
    for env in TASKS:
        compiled, eager = (np.nanmean(curves(env, mode)[1], axis=1) for mode in ("compiled", "eager"))
        print(f"\nMean of the curve on {env}, compiled minus eager: {difference(compiled, eager)}")


def draw() -> None:
    """The curves of each task with their intervals."""
    figure, axes = plt.subplots(1, len(TASKS), figsize=(10, 3.6), constrained_layout=True)
    for axis, env in zip(axes, TASKS, strict=True):
        for mode, color in MODES.items():
            steps, returns = curves(env, mode)
            mean, half = interval(returns)
            axis.plot(steps, mean, color=color, label=mode)
            axis.fill_between(steps, mean - half, mean + half, color=color, alpha=0.2, linewidth=0)
        axis.set(title=env, xlabel="environment steps", ylabel="training return")
    axes[0].legend(frameon=False)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    mpl.rcParams["svg.hashsalt"] = "learning_curves"
    figure.savefig(FIGURE, metadata={"Date": None})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--seeds", type=int, default=5, help="so many, from 0 on")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--table", action="store_true", help="train nothing")
    options = parser.parse_args()
    STORE.mkdir(parents=True, exist_ok=True)
    runs = [Run(env, mode, seed) for seed in range(options.seeds) for env in options.tasks for mode in MODES]
    missing = [run for run in runs if not run.path.exists()]
    if missing and not options.table:
        with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
            for _ in track(pool.imap_unordered(train, missing), "trainings", total=len(missing)):
                pass
    print_table()
    draw()


if __name__ == "__main__":
    main()
