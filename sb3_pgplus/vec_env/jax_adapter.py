"""Environments written in JAX, compiled as one program over N copies, whose arrays become tensors without a copy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th
from torch.utils.dlpack import from_dlpack

from sb3_pgplus.vec_env.common import check_integer
from sb3_pgplus.vec_env.tensors import TensorStep, TensorVecEnv

if TYPE_CHECKING:
    from gymnasium.experimental.functional import FuncEnv

try:
    import jax
    import jax.numpy as jnp
except ImportError as error:
    raise ImportError('JAX environments need JAX: pip install "sb3_pgplus[jax]"') from error


class JaxVecEnv(TensorVecEnv):
    """
    N copies of a Gymnasium ``FuncEnv`` (``gymnasium.envs.phys2d``, or your own), stepped and reset by one compiled
    function.

    :param func_env: states are JAX arrays or trees of them; its functions are written for one environment
    :param num_envs: N
    :param max_episode_steps: time limit; None: none
    :param device: where the tensors are; JAX's own default device has to be the same
    :param seed: of all copies together; None: another one each time
    :raises TypeError: on numbers of copies or steps that are no integers
    :raises ValueError: on such below 1
    """

    backend = "jax"

    def __init__(
        self,
        func_env: FuncEnv[Any, Any, Any, Any, Any, Any, Any],
        num_envs: int,
        max_episode_steps: int | None = None,
        device: th.device | str = "cpu",
        seed: int | None = None,
    ) -> None:
        if max_episode_steps is not None:
            max_episode_steps = check_integer("max_episode_steps", max_episode_steps, 1)
        super().__init__(num_envs, func_env.observation_space, func_env.action_space, device)
        self.func_env = func_env
        self._key = jax.random.key(int(np.random.default_rng().integers(2**32)) if seed is None else seed)
        self._reset: Callable[..., Any] = jax.jit(partial(_reset, func_env, self.num_envs))
        self._step: Callable[..., Any] = jax.jit(partial(_step, func_env, self.num_envs, max_episode_steps))

    def reset_tensors(self, seed: int | None) -> Any:
        """
        :param seed: None: go on with the random numbers there are
        :return: observations ``[N, ...]``
        """
        if seed is not None:
            self._key = jax.random.key(seed)
        self._key, self._state, observations = self._reset(self._key)
        self._ages = jnp.zeros(self.num_envs, dtype=jnp.int32)
        return _to_torch(observations)

    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        """:param actions: ``[N, ...]``"""
        inputs = jnp.from_dlpack(actions.detach().contiguous())
        self._key, self._state, self._ages, results = self._step(self._key, self._state, self._ages, inputs)
        return TensorStep(*map(_to_torch, results))

    def get_state(self) -> dict[str, Any]:
        """
        :return: the states of the copies, their ages and the random key, as NumPy arrays; no states before a reset
        :raises NotImplementedError: if the states have random keys in them
        """
        leaves = jax.tree.leaves(getattr(self, "_state", None))
        if any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves):
            raise NotImplementedError("its states have random keys in them")
        ages = np.array(self._ages) if leaves else None
        return {"key": np.array(jax.random.key_data(self._key)), "leaves": [*map(np.array, leaves)], "ages": ages}

    def set_state(self, state: dict[str, Any]) -> None:
        """
        Undo :meth:`get_state`.

        :param state: what it returned
        :raises ValueError: if it is the state of another environment
        """
        self._key = jax.random.wrap_key_data(jnp.asarray(state["key"]), impl=jax.random.key_impl(self._key))
        if state["ages"] is None:
            return
        expected, structure = jax.tree.flatten(jax.eval_shape(self._reset, self._key)[1])
        shapes, given = [leaf.shape for leaf in expected], [leaf.shape for leaf in state["leaves"]]
        if shapes != given:
            raise ValueError(f"the state has arrays of shapes {given}, and {type(self.func_env).__name__} has {shapes}")
        self._state = jax.tree.unflatten(structure, [*map(jnp.asarray, state["leaves"])])
        self._ages = jnp.asarray(state["ages"])


def _reset(func_env: Any, num_envs: int, key: Any) -> tuple[Any, Any, Any]:
    key, *keys = jax.random.split(key, 3)
    state = jax.vmap(func_env.initial)(jax.random.split(keys[0], num_envs))
    return key, state, jax.vmap(func_env.observation)(state, jax.random.split(keys[1], num_envs))


def _step(
    func_env: Any, num_envs: int, max_episode_steps: int | None, key: Any, state: Any, ages: Any, actions: Any
) -> tuple[Any, Any, Any, tuple[Any, ...]]:
    """One step of all copies; copies that ended begin anew."""
    key, step_key, reset_key = jax.random.split(key, 3)
    keys = jax.random.split(step_key, num_envs)
    after = jax.vmap(func_env.transition)(state, actions, keys)
    rewards = jax.vmap(func_env.reward)(state, actions, after, keys)
    terminated = jax.vmap(func_env.terminal)(after, keys) | jnp.zeros(num_envs, dtype=bool)
    final = jax.vmap(func_env.observation)(after, keys)
    ages = ages + 1
    truncated = ages >= max_episode_steps if max_episode_steps else jnp.zeros(num_envs, dtype=bool)
    dones = terminated | truncated
    _, fresh, first = _reset(func_env, num_envs, reset_key)
    state, observations = _where(dones, fresh, after), _where(dones, first, final)
    return key, state, jnp.where(dones, 0, ages), (observations, rewards, terminated, truncated, final)


def _where(dones: Any, new: Any, old: Any) -> Any:
    """Leaf by leaf, copy by copy: the new state where an episode ended."""

    def choose(x: Any, y: Any) -> Any:
        return jnp.where(dones.reshape(-1, *(1,) * (x.ndim - 1)), x, y)

    return jax.tree.map(choose, new, old)


def _to_torch(array: Any) -> Any:
    """JAX's arrays never change, so sharing their memory is safe as long as nobody writes to the tensor."""
    return {key: _to_torch(x) for key, x in array.items()} if isinstance(array, dict) else from_dlpack(array)
