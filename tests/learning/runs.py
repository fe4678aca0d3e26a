"""
Trainings whose results are kept: a finished one is stored at once, and a later call continues with what is missing.

Ours are stored under a digest of the code they go through and of their settings, so a result never outlives what gave
it; SB3's under its version and settings. Run as a script to compute some of them ahead:
``python tests/learning/runs.py sb3 HalfCheetah-v5 0 1 2``.
"""

import ast
import hashlib
import json
import os
import pathlib
import sys
import time
from typing import Any

import numpy as np
import stable_baselines3
import torch as th
import yaml
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecNormalize

import sb3_pgplus
from sb3_pgplus.files import write_atomically

REPOSITORY = pathlib.Path(__file__).parents[2]
STORE = pathlib.Path(os.environ.get("SB3_PGPLUS_LEARNING_STORE", REPOSITORY / ".learning"))
N_EVAL_EPISODES = 20
EVALUATION_SEED = 10_000
#: (what is trained, environment) → steps. "sb3" is SB3's PPO with VecNormalize and ``SAME_SETTINGS``, "defaults"
#: PPOPlus's bare constructor, the rest our algorithms with their settings in ``zoo_configs``.
STEPS = {
    ("sb3", "HalfCheetah-v5"): 300_000,
    ("defaults", "HalfCheetah-v5"): 300_000,
    ("ppoplus", "CartPole-v1"): 100_000,
    ("ppoplus", "Pendulum-v1"): 150_000,
    ("a2cplus", "CartPole-v1"): 200_000,
    ("trpoplus", "Pendulum-v1"): 150_000,
    ("trpoplus", "Hopper-v5"): 300_000,
    ("trpoplus", "Swimmer-v5"): 300_000,
}


def result_of(what: str, env_id: str, seed: int) -> dict[str, Any]:
    """
    The result of a training, from the store or from a run made now.

    :param what: with ``env_id`` a key of ``STEPS``
    :param env_id: the environment
    :param seed: of everything
    :return: deterministic returns after training, seconds; of TRPO also the mean KL of every update
    """
    settings = hashlib.sha256(repr(SAME_SETTINGS).encode()).hexdigest()[:8]
    digest = f"sb3-{stable_baselines3.__version__}-{settings}" if what == "sb3" else source_digest(what, env_id)
    steps = STEPS[what, env_id]
    path = STORE / f"{what}_{env_id}_{seed}_{steps}_{digest}.json"
    if not path.exists():
        started = time.perf_counter()
        result = TRAINERS.get(what, train_zoo)(what, env_id, seed, steps)
        write_atomically(path, json.dumps({**result, "seconds": time.perf_counter() - started}).encode())
    result = json.loads(path.read_text())
    value = float(np.mean(result["returns"]))
    print(f"{what:>9} {env_id} seed {seed}: {value:8.1f}  ({result['seconds']:.0f} s)", flush=True)
    return dict(result)


def source_digest(what: str, env_id: str) -> str:
    """Digest of what can change a result of ours: the code that a training goes through, defaults and settings."""
    others = {f"{name.removesuffix('plus')}.py" for name in CLASSES} - {f"{what.removesuffix('plus')}.py"}
    if what == "defaults":
        others.discard("ppo.py")
    defaults = CLASSES.get(what, sb3_pgplus.PPOPlus).hparams_class.defaults()
    digest = hashlib.sha256(repr((defaults, zoo_block(what, env_id) if what in CLASSES else None)).encode())
    for path in sorted((REPOSITORY / "sb3_pgplus").rglob("*.py")):
        if path.name not in _NOT_TRAINING | others:
            digest.update(path.name.encode() + code_of(path).encode())
    return digest.hexdigest()[:12]


def code_of(path: pathlib.Path) -> str:
    """A module without comments and docstrings."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def zoo_block(what: str, env_id: str) -> dict[str, Any]:
    """The settings of one environment in ``zoo_configs``."""
    return dict(yaml.safe_load((REPOSITORY / "zoo_configs" / f"{what}.yml").read_text())[env_id])


#: Modules that no training goes through, and the declarations of hyperparameters, whose values are in the digest.
_NOT_TRAINING = {
    "hparams.py",
    "cli.py",
    "playing.py",
    "evaluation.py",
    "statistics.py",
    "videos.py",
    "run_folder.py",
    "command.py",
    "comparison.py",
    "curve_verdicts.py",
    "diagnostics.py",
    "figures.py",
    "html_page.py",
    "learning_curve.py",
    "live_table.py",
    "report.py",
    "runs.py",
    "progress_bar.py",
    "training.py",
    "environments.py",
    "configs.py",
    "presets.py",
    "zoo.py",
    "__init__.py",
}


#: Our defaults as far as SB3 has the argument; the rest of them are SB3's own defaults too.
SAME_SETTINGS: dict[str, Any] = {
    "learning_rate": LinearSchedule(3e-4, 0, 1.0),
    "clip_range": LinearSchedule(0.2, 0, 1.0),
    "clip_range_vf": 0.2,
    "gae_lambda": 0.9,
    "policy_kwargs": {"log_std_init": -0.5},
}


def train_sb3(what: str, env_id: str, seed: int, steps: int) -> dict[str, Any]:
    env = VecNormalize(make_vec_env(env_id, 1, seed=seed))
    model = PPO("MlpPolicy", env, seed=seed, device="cpu", **SAME_SETTINGS).learn(steps)
    evaluation = VecNormalize(make_vec_env(env_id, 1, seed=EVALUATION_SEED), training=False, norm_reward=False)
    evaluation.obs_rms = env.obs_rms
    return {"returns": evaluate(model, evaluation)}


def train_defaults(what: str, env_id: str, seed: int, steps: int) -> dict[str, Any]:
    model = sb3_pgplus.PPOPlus("MlpPolicy", make_vec_env(env_id, 1, seed=seed), seed=seed, device="cpu")
    return {"returns": evaluate(model.learn(steps), make_vec_env(env_id, 1, seed=EVALUATION_SEED))}


def train_zoo(what: str, env_id: str, seed: int, steps: int) -> dict[str, Any]:
    block = zoo_block(what, env_id)
    settings = {name: value for name, value in block.items() if name not in ("n_envs", "n_timesteps", "policy")}
    env = make_vec_env(env_id, block.get("n_envs", 1), seed=seed)
    model = CLASSES[what](block["policy"], env, seed=seed, device="cpu", **settings)
    measured = {"returns": evaluate(model.learn(steps), make_vec_env(env_id, 1, seed=EVALUATION_SEED))}
    if isinstance(model, MeasuredTRPO):
        measured |= {"kl": model.kl, "kl_with_statistics": model.kl_with_statistics, "target_kl": model.target_kl}
    return measured


class MeasuredTRPO(sb3_pgplus.TRPOPlus):
    """TRPOPlus that measures every update's KL on the rollout's states by torch's own formula."""

    def _reset_training_state(self) -> None:
        super()._reset_training_state()
        #: Mean KL(π_old‖π_θ) right after each update, and once the statistics of observations have moved too.
        self.kl: list[float] = []
        self.kl_with_statistics: list[float] = []

    def train(self) -> None:
        self.states = self.rollout_buffer.flat("observations").clone()
        self.before = self.distribution()
        super().train()
        self.kl.append(self.measure())

    def collect_rollouts(self, env: Any, *args: Any, **kwargs: Any) -> bool:
        self._merge_observations(self.rollout_buffer)
        if self.kl:
            self.kl_with_statistics.append(self.measure())
        return super().collect_rollouts(env, *args, **kwargs)

    def distribution(self) -> th.distributions.Distribution:
        """The policy on the stored states, as torch's own distribution, which keeps its parameters."""
        self.policy.set_training_mode(False)
        with th.no_grad():
            found: th.distributions.Distribution = self.policy.get_distribution(self.states).distribution
        return found

    def measure(self) -> float:
        kl = th.distributions.kl_divergence(self.before, self.distribution())
        return float((kl if kl.ndim == 1 else kl.sum(dim=-1)).double().mean())


def evaluate(model: Any, env: Any) -> list[float]:
    returns, _ = evaluate_policy(model, env, N_EVAL_EPISODES, deterministic=True, return_episode_rewards=True)
    return [float(value) for value in returns]  # type: ignore[union-attr]


TRAINERS = {"sb3": train_sb3, "defaults": train_defaults}
CLASSES = {"ppoplus": sb3_pgplus.PPOPlus, "a2cplus": sb3_pgplus.A2CPlus, "trpoplus": MeasuredTRPO}

if __name__ == "__main__":
    th.set_num_threads(1)
    for argument in sys.argv[3:]:
        result_of(sys.argv[1], sys.argv[2], int(argument))
