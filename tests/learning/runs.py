"""
Trainings whose results are kept: a finished one is stored at once, and a later call continues with what is missing.

Ours are stored under a digest of the package's sources, so a result never outlives the code that gave it; SB3's under
its version and settings. Run as a script to compute some of them ahead:
``python tests/learning/runs.py sb3 HalfCheetah-v5 0 1 2``.
"""

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
STEPS = {"CartPole-v1": 100_000, "Pendulum-v1": 150_000, "HalfCheetah-v5": 300_000}


def mean_return(algorithm: str, env_id: str, seed: int) -> float:
    """
    Deterministic mean return after training, from the store or from a run made now.

    :param algorithm: ``"sb3"``: SB3's PPO with VecNormalize and ``SAME_SETTINGS``; ``"defaults"``: the
        bare constructor; ``"zoo"``: the settings of ``zoo_configs/ppoplus.yml``
    :param env_id: a key of ``STEPS``
    :param seed: of everything
    :return: mean over the evaluation's episodes
    """
    settings = hashlib.sha256(repr(SAME_SETTINGS).encode()).hexdigest()[:8]
    digest = f"sb3-{stable_baselines3.__version__}-{settings}" if algorithm == "sb3" else source_digest()
    path = STORE / f"{algorithm}_{env_id}_{seed}_{STEPS[env_id]}_{digest}.json"
    if not path.exists():
        started = time.perf_counter()
        result = {"returns": TRAINERS[algorithm](env_id, seed), "seconds": time.perf_counter() - started}
        write_atomically(path, json.dumps(result).encode())
    result = json.loads(path.read_text())
    value = float(np.mean(result["returns"]))
    print(f"{algorithm:>9} {env_id} seed {seed}: {value:8.1f}  ({result['seconds']:.0f} s)", flush=True)
    return value


def source_digest() -> str:
    """Digest of everything that can change a result of ours."""
    digest = hashlib.sha256()
    for path in sorted([*(REPOSITORY / "sb3_pgplus").rglob("*.py"), *(REPOSITORY / "zoo_configs").glob("*.yml")]):
        if path.name not in _NOT_TRAINING:
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


#: Modules that no training goes through.
_NOT_TRAINING = {"cli.py", "playing.py", "run_folder.py", "learning_curve.py", "training.py", "environments.py"}


#: Our defaults as far as SB3 has the argument; the rest of them are SB3's own defaults too.
SAME_SETTINGS: dict[str, Any] = {
    "learning_rate": LinearSchedule(3e-4, 0, 1.0),
    "clip_range": LinearSchedule(0.2, 0, 1.0),
    "clip_range_vf": 0.2,
    "policy_kwargs": {"log_std_init": -0.5},
}


def train_sb3(env_id: str, seed: int) -> list[float]:
    env = VecNormalize(make_vec_env(env_id, 1, seed=seed))
    model = PPO("MlpPolicy", env, seed=seed, device="cpu", **SAME_SETTINGS).learn(STEPS[env_id])
    evaluation = VecNormalize(make_vec_env(env_id, 1, seed=EVALUATION_SEED), training=False, norm_reward=False)
    evaluation.obs_rms = env.obs_rms
    return evaluate(model, evaluation)


def train_defaults(env_id: str, seed: int) -> list[float]:
    model = sb3_pgplus.PPOPlus("MlpPolicy", make_vec_env(env_id, 1, seed=seed), seed=seed, device="cpu")
    return evaluate(model.learn(STEPS[env_id]), make_vec_env(env_id, 1, seed=EVALUATION_SEED))


def train_zoo(env_id: str, seed: int) -> list[float]:
    block = yaml.safe_load((REPOSITORY / "zoo_configs" / "ppoplus.yml").read_text())[env_id]
    settings = {name: value for name, value in block.items() if name not in ("n_envs", "n_timesteps", "policy")}
    env = make_vec_env(env_id, block.get("n_envs", 1), seed=seed)
    model = sb3_pgplus.PPOPlus(block["policy"], env, seed=seed, device="cpu", **settings)
    return evaluate(model.learn(STEPS[env_id]), make_vec_env(env_id, 1, seed=EVALUATION_SEED))


def evaluate(model: Any, env: Any) -> list[float]:
    returns, _ = evaluate_policy(model, env, N_EVAL_EPISODES, deterministic=True, return_episode_rewards=True)
    return [float(value) for value in returns]  # type: ignore[union-attr]


TRAINERS = {"sb3": train_sb3, "defaults": train_defaults, "zoo": train_zoo}

if __name__ == "__main__":
    th.set_num_threads(1)
    for argument in sys.argv[3:]:
        mean_return(sys.argv[1], sys.argv[2], int(argument))
