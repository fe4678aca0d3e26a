"""
The sweep behind A2CPlus's defaults: λ × n_steps × number of environments, three tasks, three seeds.

    python benchmarks/a2c_sweep.py --jobs 2                   # the grid; a stopped sweep continues
    python benchmarks/a2c_sweep.py --jobs 2 --confirm         # the winner and SB3's values on fresh seeds
    python benchmarks/a2c_sweep.py --table                    # tables from the stored runs, nothing is trained

Every finished run is one file in ``benchmarks/results/a2c_sweep/``. A run's score is the mean over three deterministic
evaluations of 10 episodes each, at 90, 95 and 100 % of its steps, on fixed evaluation seeds. Scores of a task are
scaled to [0, 1] between those of its worst and its best setting, and the winner has the largest mean over tasks.
"""

import argparse
import itertools
import json
import multiprocessing
import pathlib
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass

import numpy as np
import torch as th
from rich.progress import track
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_pgplus import A2CPlus
from sb3_pgplus.files import write_atomically
from sb3_pgplus.statistics import iqm, iqm_interval, probability_of_improvement

STORE = pathlib.Path(__file__).parent / "results" / "a2c_sweep"
TASKS = {"HalfCheetah-v5": 300_000, "Reacher-v5": 300_000, "CartPole-v1": 100_000}
GRID = {"gae_lambda": (0.9, 1.0), "n_steps": (8, 32), "n_envs": (8, 32)}
GRID_SETTINGS = set(itertools.product(*GRID.values()))
SB3_SETTING = (1.0, 5, 8)
SEARCH_SEEDS = (100, 101, 102)
FRESH_SEEDS = tuple(range(200, 209))
EVALUATE_AT = (0.9, 0.95, 1.0)
EVALUATION_SEED = 10_000

Setting = tuple[float, int, int]
Scores = dict[tuple[str, Setting], list[float]]


@dataclass(frozen=True)
class Run:
    """One training."""

    env: str
    gae_lambda: float
    n_steps: int
    n_envs: int
    seed: int

    @property
    def path(self) -> pathlib.Path:
        """Where its result lies."""
        return STORE / f"{self.env}_{self.gae_lambda}_{self.n_steps}_{self.n_envs}_{self.seed}.json"


class Evaluations(BaseCallback):
    """Deterministic evaluations at given shares of the training."""

    def __init__(self, env_id: str, total: int) -> None:
        super().__init__()
        self.env = make_vec_env(env_id, 10, seed=EVALUATION_SEED)
        self.wanted = [int(share * total) for share in EVALUATE_AT]
        self.means: list[float] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.wanted and self.num_timesteps >= self.wanted[0]:
            self.evaluate()

    def evaluate(self) -> None:
        """Evaluate now."""
        del self.wanted[0]
        self.env.seed(EVALUATION_SEED)
        self.means.append(float(evaluate_policy(self.model, self.env, 10, deterministic=True)[0]))


def train(run: Run) -> None:
    """Make one run and store it."""
    th.set_num_threads(1)
    started, total = time.perf_counter(), TASKS[run.env]
    env = make_vec_env(run.env, run.n_envs, seed=run.seed)
    model = A2CPlus("MlpPolicy", env, gae_lambda=run.gae_lambda, n_steps=run.n_steps, seed=run.seed, device="cpu")
    evaluations = Evaluations(run.env, total)
    model.learn(total, evaluations)
    while evaluations.wanted:
        evaluations.evaluate()
    training = [episode["r"] for episode in model.ep_info_buffer or ()]
    result = {
        **asdict(run),
        "steps": total,
        "evaluations": evaluations.means,
        "training_return": float(np.mean(training)) if training else None,
        "seconds": round(time.perf_counter() - started, 1),
        "hyperparameters": model.hyperparameters(),
    }
    write_atomically(run.path, json.dumps(result, indent=1).encode())


def scores(seeds: tuple[int, ...], settings: Collection[Setting]) -> Scores:
    """(task, setting) → score of each stored run with one of these seeds and settings."""
    found: Scores = {}
    for path in sorted(STORE.glob("*.json")):
        stored = json.loads(path.read_text())
        setting = (stored["gae_lambda"], stored["n_steps"], stored["n_envs"])
        if stored["seed"] in seeds and setting in settings and stored["env"] in TASKS:
            found.setdefault((stored["env"], setting), []).append(float(np.mean(stored["evaluations"])))
    return found


def ranking(found: Scores) -> list[tuple[float, Setting]]:
    """Settings by their mean scaled score, best first."""
    scaled: dict[Setting, list[float]] = {setting: [] for _, setting in found}
    for task in TASKS:
        means = {setting: np.mean(found[task, setting]) for setting in scaled if (task, setting) in found}
        low, high = min(means.values(), default=0.0), max(means.values(), default=0.0)
        for setting, mean in means.items():
            scaled[setting].append((mean - low) / max(high - low, 1e-12))
    return sorted(((float(np.mean(values)), setting) for setting, values in scaled.items()), reverse=True)


def cell_text(cell: list[float]) -> str:
    """Mean ± standard deviation over seeds, with their number where some are missing."""
    if not cell:
        return "–"
    digits = 0 if abs(np.mean(cell)) >= 100 else 1
    spread = f" ± {np.std(cell, ddof=1):.{digits}f}" if len(cell) > 1 else ""
    return f"{np.mean(cell):.{digits}f}{spread}" + (f" ({len(cell)})" if len(cell) < len(SEARCH_SEEDS) else "")


def print_comparison(winner: Setting) -> None:
    """Interquartile means on the fresh seeds, and how likely a run of the winner beats one of SB3's values."""
    found = scores(FRESH_SEEDS, {winner, SB3_SETTING})
    for task in TASKS:
        ours, theirs = (found.get((task, setting), []) for setting in (winner, SB3_SETTING))
        if not ours or not theirs:
            continue
        for name, cell in (("winner", ours), ("SB3's values", theirs)):
            low, high = iqm_interval(cell)
            print(f"{task}, {name}: IQM {iqm(cell):.1f} ({low:.1f} to {high:.1f})")
        probability, interval = probability_of_improvement([ours], [theirs])
        low, high = interval or (float("nan"), float("nan"))
        print(f"{task}, P(winner better): {probability:.2f} ({low:.2f} to {high:.2f})")
    print()


def print_table(title: str, seeds: tuple[int, ...], settings: Collection[Setting]) -> None:
    """A Markdown table of what is stored: mean ± standard deviation over seeds."""
    found = scores(seeds, settings)
    if not found:
        return
    print(f"{title}: seeds {', '.join(map(str, seeds))}\n")
    print("| λ | n_steps | environments | " + " | ".join(TASKS) + " | scaled mean |")
    print("|---" * (len(TASKS) + 4) + "|")
    for total, setting in ranking(found):
        cells = [found.get((task, setting), []) for task in TASKS]
        texts = [cell_text(cell) for cell in cells]
        print("| " + " | ".join([*map(str, setting), *texts, f"{total:.2f}"]) + " |")
    print()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side")
    parser.add_argument("--confirm", action="store_true", help="train the winner and SB3's values on fresh seeds")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    options = parser.parse_args()
    STORE.mkdir(parents=True, exist_ok=True)
    settings, seeds = list(GRID_SETTINGS), SEARCH_SEEDS
    if options.confirm:
        settings, seeds = [ranking(scores(SEARCH_SEEDS, GRID_SETTINGS))[0][1], SB3_SETTING], FRESH_SEEDS
    runs = [Run(env, *setting, seed) for seed in seeds for setting in settings for env in TASKS]
    missing = [run for run in runs if not run.path.exists()]
    if missing and not options.table:
        with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=1) as pool:
            for _ in track(pool.imap_unordered(train, missing), "trainings", total=len(missing)):
                pass
    stored = {(float(path.stem.split("_")[1]), *map(int, path.stem.split("_")[2:4])) for path in STORE.glob("*.json")}
    print_table("The grid", SEARCH_SEEDS, GRID_SETTINGS)
    print_table("Tried once, outside the grid", SEARCH_SEEDS, stored - GRID_SETTINGS)
    print_table("Winner and SB3's values on fresh seeds", FRESH_SEEDS, stored)
    print_comparison(ranking(scores(SEARCH_SEEDS, GRID_SETTINGS))[0][1])


if __name__ == "__main__":
    main()
