"""Episodes that are the same every time: episode ``i`` is the first one of an environment seeded with ``seed + i``."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.atari_wrappers import EpisodicLifeEnv
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, is_vecenv_wrapped

EVALUATION_SEED = 1_000_000
"""Far from every training seed, and the same for all runs: their evaluations start from the same states."""


@dataclass
class PlayedEpisodes:
    """Whole episodes, in the order of their seeds."""

    returns: list[float] = field(default_factory=list)
    """Undiscounted sums of the raw environment's rewards."""
    lengths: list[int] = field(default_factory=list)
    successes: list[bool] = field(default_factory=list)
    """``info["is_success"]`` of their last steps; empty where the environment does not say."""


def play_episodes(
    model: BaseAlgorithm,
    env: VecEnv,
    *,
    n_episodes: int,
    seed: int = EVALUATION_SEED,
    deterministic: bool = True,
    after_step: Callable[[], object] | None = None,
    warn: bool = True,
) -> PlayedEpisodes:
    """
    Play the first episodes of the seeds ``seed, …, seed + n_episodes − 1``, as many at once as there are environments.

    Short episodes are not preferred, as they would be by taking what ends first: an environment that has finished its
    episode waits for the others. No random generator is left in another state than before.

    :param model: the model; its own observation normalisation is part of ``predict``
    :param env: N evaluation environments, raw
    :param n_episodes: number of episodes
    :param seed: of the first episode, and of the actions where they are sampled
    :param deterministic: the policy's mode, or samples from it
    :param after_step: called after every step of the environments
    :param warn: tell where no ``Monitor`` keeps the rewards from other wrappers
    :return: the episodes
    """
    if warn and not (is_vecenv_wrapped(env, VecMonitor) or env.env_is_wrapped(Monitor)[0]):
        warnings.warn(
            "the evaluation environment has no Monitor: returns and lengths are those that its wrappers show",
            stacklevel=2,
        )
    played = PlayedEpisodes()
    with random_state_kept():
        if not deterministic:
            _seed_everything(seed)
        for first in range(0, n_episodes, env.num_envs):
            _start(env, seed + first)
            n_wanted = min(env.num_envs, n_episodes - first)
            infos = _play_round(model, env, n_wanted, deterministic, after_step)
            for info in infos:
                played.returns.append(float(info["episode"]["r"]))
                played.lengths.append(int(info["episode"]["l"]))
                if "is_success" in info:
                    played.successes.append(bool(info["is_success"]))
    return played


def _start(env: VecEnv, seed: int) -> None:
    """The next ``env.reset()`` begins new episodes: environment ``i`` with ``seed + i``."""
    env.seed(seed)
    if env.env_is_wrapped(EpisodicLifeEnv)[0]:
        env.env_method("set_wrapper_attr", "was_real_done", True)  # else it would go on with the next life


def _play_round(
    model: BaseAlgorithm,
    env: VecEnv,
    n_wanted: int,
    deterministic: bool,
    after_step: Callable[[], object] | None,
) -> list[dict[str, Any]]:
    """One episode of each of the first environments: its last info, with the entry ``episode``."""
    # A life lost in Atari is no end of the game: its monitor knows that. Any other wrapper's end is one, even where the
    # monitor inside has seen none, because the environment is reset then.
    has_lives = env.env_is_wrapped(EpisodicLifeEnv)[0]
    finished: dict[int, dict[str, Any]] = {}
    returns, lengths = np.zeros(env.num_envs), np.zeros(env.num_envs, dtype=int)
    observations: Any = env.reset()
    states, starts = None, np.ones(env.num_envs, dtype=bool)
    while len(finished) < n_wanted:
        actions, states = model.predict(observations, states, starts, deterministic)
        observations, rewards, starts, infos = env.step(actions)
        returns += rewards
        lengths += 1
        for i in np.flatnonzero(starts[:n_wanted]).tolist():
            if i not in finished and ("episode" in infos[i] or not has_lives):
                finished[i] = {"episode": {"r": returns[i], "l": lengths[i]}, **infos[i]}
        if after_step is not None and len(finished) < n_wanted:
            after_step()
    return [finished[i] for i in range(n_wanted)]


def _seed_everything(seed: int) -> None:
    """Like SB3's ``set_random_seed``, which would also change how CUDA chooses its algorithms."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    th.manual_seed(seed)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the generators of Python, NumPy and torch back to where they were, whatever drew from them."""
    python, numpy = random.getstate(), np.random.get_state()
    # Forking CUDA's generators would initialise CUDA, which a training on the CPU has no use for.
    devices = range(th.cuda.device_count()) if th.cuda.is_available() and th.cuda.is_initialized() else ()
    with th.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
