"""
It learns: means over seeds 0-4, all counted, deterministic evaluation over 20 episodes (``make learning``, slow).

Finished trainings are kept (see ``runs.py``), so an interrupted call continues.
"""

import importlib.util
import pathlib
import sys
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.learning

SEEDS = range(5)


def load_runs() -> Any:
    path = pathlib.Path(__file__).with_name("runs.py")
    spec = importlib.util.spec_from_file_location("learning_runs", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


runs = load_runs()


def mean_over_seeds(algorithm: str, env_id: str) -> float:
    return float(np.mean([runs.mean_return(algorithm, env_id, seed) for seed in SEEDS]))


def test_ppo_solves_cartpole_in_100k_steps_with_its_zoo_settings() -> None:
    assert mean_over_seeds("zoo", "CartPole-v1") >= 475


def test_ppo_swings_the_pendulum_up_in_150k_steps_with_its_zoo_settings() -> None:
    assert mean_over_seeds("zoo", "Pendulum-v1") >= -250


def test_bare_defaults_reach_at_least_the_return_of_sb3_on_half_cheetah_at_300k_steps() -> None:
    assert mean_over_seeds("defaults", "HalfCheetah-v5") >= mean_over_seeds("sb3", "HalfCheetah-v5")
