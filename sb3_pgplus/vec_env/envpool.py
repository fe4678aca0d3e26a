"""
EnvPool's compiled environments as an SB3 ``VecEnv``.

EnvPool spends the step after an episode's end on the reset, and the next episode's first observation comes with an
action and a reward that belong to nothing. In its synchronous mode a ``reset`` of just the ended environments avoids
that step: every transition is real, and every final observation is the episode's own.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sb3_pgplus.errors import BackendError, warn_user
from sb3_pgplus.vec_env.common import Array, usable_cpus
from sb3_pgplus.vec_env.gymnasium_adapter import GymnasiumVecEnv, array_pairs


class EnvpoolVecEnv(GymnasiumVecEnv):
    """
    A pool of ``envpool.make(..., env_type="gymnasium")`` with SB3's semantics and ``Monitor``'s episode statistics.

    EnvPool reports an episode that terminates exactly on its time limit as truncated only, so that such a step
    bootstraps where Gymnasium's would not.

    :param pool: a synchronous pool of single-player environments
    :param rebuild: makes the same pool with another seed. EnvPool's seeds are fixed when a pool is made, so without
        this function :meth:`seed` has no effect, and warns
    :param full_infos: give the environment's own info entries in every step, not only where an episode ends
    :raises ValueError: if the pool is asynchronous or has several players
    """

    backend = "envpool"

    def __init__(self, pool: Any, rebuild: Callable[[int], Any] | None = None, full_infos: bool = False) -> None:
        super().__init__(pool, full_infos)
        if pool.is_async:
            raise ValueError("the pool is asynchronous: leave out `batch_size`, or make it equal to `num_envs`")
        if pool.config["max_num_players"] > 1:
            raise ValueError("SB3 cannot train several players in one environment")
        self._rebuild = rebuild
        self._unused_seed: int | None = pool.config["seed"]

    def _reset_all(self, seed: int | None, options: dict[str, Any]) -> tuple[Any, Mapping[str, Any]]:
        """Reset; a new seed needs a new pool."""
        if options:
            raise ValueError(f"EnvPool's environments take no reset options, got {options}")
        if seed is not None:
            self._reseed(_within_32_bits(seed, self.num_envs))
        self._unused_seed = None
        observations, infos = self.env.reset()
        return observations, infos

    def _reseed(self, seed: int) -> None:
        if seed == self._unused_seed:
            return
        if self._rebuild is None:
            warn_user("EnvPool's seeds are fixed when a pool is made, seeding it now has no effect")
            return
        self.env.close()
        self.env = self._rebuild(seed)

    def _reset_ended(self, dones: Array, observations: Any) -> Mapping[str, Any]:
        """EnvPool returns the rows of those environments only, and says in ``env_id`` whose they are."""
        ended = np.flatnonzero(dones).astype(np.int32)
        pool: Any = self.env  # its `reset` takes indices, which Gymnasium's does not
        new, infos = pool.reset(ended)
        rows = np.asarray(infos["env_id"])
        for target, source in array_pairs(observations, new):
            target[rows] = source
        return _spread(infos, rows, self.num_envs)

    def get_images(self) -> Sequence[Array | None]:
        """Render every environment to an RGB image; None without ``render_mode="rgb_array"``."""
        if self.render_mode != "rgb_array":
            return [None] * self.num_envs
        pool: Any = self.env
        return list(pool.render(np.arange(self.num_envs)))


def make_envpool(
    env_id: str,
    n_envs: int = 1,
    seed: int | None = None,
    *,
    n_threads: int | None = None,
    full_infos: bool = False,
    **kwargs: Any,
) -> EnvpoolVecEnv:
    """
    Build EnvPool's version of an environment.

    :param env_id: EnvPool's name for it; MuJoCo's, Box2D's and the classic ones are Gymnasium's
    :param n_envs: how many copies
    :param seed: copy ``i`` gets ``seed + i``; by default a random one
    :param n_threads: by default one per copy or usable CPU, whichever are fewer
    :param full_infos: see :class:`EnvpoolVecEnv`
    :param kwargs: for ``envpool.make``, ``max_episode_steps=`` for instance
    :raises BackendError: if EnvPool is not installed, has no such environment
    """
    envpool = _import_envpool()
    known = envpool.list_all_envs()
    if env_id not in known:
        similar = difflib.get_close_matches(str(env_id), known, n=3)
        hint = f"; similar: {', '.join(similar)}" if similar else ""
        raise BackendError(f"EnvPool has no environment {env_id!r} (envpool.list_all_envs() lists those it has){hint}")
    settings = {"num_envs": n_envs, "num_threads": n_threads or min(n_envs, usable_cpus()), **kwargs}

    def build(pool_seed: int) -> Any:
        return envpool.make(env_id, env_type="gymnasium", seed=pool_seed, **settings)

    first_seed = int(np.random.randint(2**30)) if seed is None else _within_32_bits(seed, n_envs)
    return EnvpoolVecEnv(build(first_seed), build, full_infos)


def _within_32_bits(seed: int, n_envs: int) -> int:
    """EnvPool counts from the seed in 32 bits, one of them for the sign."""
    return seed % (2**31 - 1 - n_envs)


def _import_envpool() -> Any:
    try:
        import envpool
    except ImportError as error:
        raise BackendError('EnvPool is not installed, run: pip install "sb3_pgplus[envpool]"') from error
    return envpool


def _spread(infos: Mapping[str, Any], rows: Array, n_envs: int) -> dict[str, Any]:
    """Infos of some environments, placed at these environments' indices."""
    spread: dict[str, Any] = {}
    for key, value in infos.items():
        if isinstance(value, Mapping):
            spread[key] = _spread(value, rows, n_envs)
        else:
            spread[key] = np.zeros((n_envs, *np.shape(value)[1:]), dtype=np.asarray(value).dtype)
            spread[key][rows] = value
    return spread
