"""A training that was interrupted goes on as if nothing had happened; a damaged checkpoint is never taken for a good one."""

import multiprocessing
import random
import re
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import resume_cases as cases
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback, StopTrainingOnMaxEpisodes

from sb3_pgplus import A2CPlus, PPOPlus, checkpoints, make_vec_env
from sb3_pgplus.callbacks import CheckpointCallback
from sb3_pgplus.errors import CheckpointError

SMALL: dict[str, Any] = {"n_steps": 8, "batch_size": 8, "n_epochs": 2, "device": "cpu", "seed": 0}
SMALL["policy_kwargs"] = {"net_arch": [4]}


def scramble() -> None:
    """Random generators of a new process are somewhere else."""
    random.seed(123)
    np.random.seed(123)
    th.manual_seed(123)


# --- resumed equals uninterrupted -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*cases.KINDS, "wrappers"])
@pytest.mark.parametrize("algorithm", cases.ALGORITHMS)
def test_a_resumed_training_ends_with_every_bit_of_the_uninterrupted_one(
    algorithm: str, kind: str, tmp_path: Path
) -> None:
    n_iterations = 6
    model = cases.model_of(algorithm, kind)
    per_iteration = model.n_steps * model.n_envs
    total = n_iterations * per_iteration
    model.learn(total, CheckpointCallback(tmp_path / "a", per_iteration, keep=99))
    found = checkpoints.in_folder(tmp_path / "a")
    assert [checkpoints.steps_of(path) for path in found] == [i * per_iteration for i in range(n_iterations, -1, -1)]

    scramble()
    resumed = cases.ALGORITHMS[algorithm].resume(found[n_iterations // 2], cases.environments(kind), "cpu")
    assert resumed.num_timesteps == total // 2
    resumed.learn(total, CheckpointCallback(tmp_path / "b", per_iteration))
    for step in (total - per_iteration, total):
        cases.assert_same(checkpoints.path_of(tmp_path / "a", step), checkpoints.path_of(tmp_path / "b", step))
