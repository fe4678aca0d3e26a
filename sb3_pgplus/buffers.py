"""
The rollout buffer: SB3's interface on tensors of the training device.

A rollout is stored time-major, ``[T, N, ...]``, and flattened environment-major (sample ``n·T + t``), the order in
which SB3 shuffles, so that the same permutation picks the same samples.
"""

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_pgplus.core.advantages import gae

# torch cannot index or reduce these; a wider type takes their values.
_STORAGE_DTYPES: dict[Any, Any] = {
    np.dtype(np.uint16): np.int32,
    np.dtype(np.uint32): np.int64,
    np.dtype(np.uint64): np.float64,
}

_SCALAR_FIELDS = ("rewards", "episode_starts", "values", "log_probs", "next_values", "dones", "advantages", "returns")


class RolloutSamples(NamedTuple):
    """A minibatch of B samples; the first six fields are those of SB3's ``RolloutBufferSamples``."""

    observations: PyTorchObs
    actions: th.Tensor
    old_values: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    #: Parameters of π_old's action distribution, if somebody stored them (``extras``).
    old_distribution: tuple[th.Tensor, ...] = ()


@dataclass
class RolloutEnd:
    """The states that a rollout bootstraps from besides its own."""

    #: Time steps, environments and true final observations of the steps that a time limit cut.
    steps: list[int] = field(default_factory=list)
    envs: list[int] = field(default_factory=list)
    final_observations: list[PyTorchObs] = field(default_factory=list)
    #: What the environments returned last, ``[N, ...]``, and whether their last step ended an episode, ``[N]``.
    last_observations: PyTorchObs | None = None
    last_dones: np.ndarray[Any, Any] | None = None
    #: V of these observations, ``[N]``.
    last_values: th.Tensor | None = None

    #: Of environments on the device, for each step: which episodes a time limit cut ``[N]``, and the observations after
    #: the step ``[N, ...]``.
    device_truncations: list[th.Tensor] = field(default_factory=list)
    device_observations: list[PyTorchObs] = field(default_factory=list)

    def add_truncation(self, step: int, env: int, final_observation: PyTorchObs) -> None:
        """
        :param step: time step t that a time limit cut
        :param env: environment index
        :param final_observation: the observation after it, ``[1, ...]``
        """
        self.steps.append(step)
        self.envs.append(env)
        self.final_observations.append(final_observation)

    def read_device(self) -> None:
        """Turn what was kept on the device into the lists above, with one look at it per rollout."""
        if not self.device_truncations:
            return
        steps, envs = th.stack(self.device_truncations).nonzero().T.tolist()
        for step, env in zip(steps, envs, strict=True):
            self.add_truncation(step, env, select(self.device_observations[step], slice(env, env + 1)))
        self.device_truncations, self.device_observations = [], []


#: Of a rollout that no time limit cut.
_NO_END = RolloutEnd(), th.zeros(0)


class _NumpyView:
    """
    A stored tensor read as a NumPy array: a view where it lies on the CPU, a copy elsewhere.

    Assigning copies into the storage, so that SB3 code such as ``buffer.rewards += x`` keeps working.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, buffer: Any, owner: type | None = None) -> Any:
        if buffer is None:
            return self
        buffer._is_seen |= th.device(buffer.device).type == "cpu"
        return map_observations(buffer.tensor(self.name), lambda tensor: tensor.cpu().numpy())

    def __set__(self, buffer: Any, value: Any) -> None:
        target = buffer.tensor(self.name)
        if isinstance(target, dict):
            for key, tensor in target.items():
                tensor.copy_(as_tensor(value[key]))
        else:
            target.copy_(as_tensor(value))


class TorchRolloutBuffer(RolloutBuffer):
    """
    A rollout of T steps in N environments as tensors on the training device.

    Nothing is allocated before the first :meth:`add`, and then once; observations keep the type in which they came.
    ``observations``, ``actions``, ``rewards``, ``values``, ``log_probs``, ``episode_starts``, ``advantages`` and
    ``returns`` read as NumPy arrays ``[T, N, ...]``, :meth:`tensor` gives the tensors themselves. Rewards stay as the
    environment gave them: the value that a truncated step bootstraps from is in ``next_values``, not added to them.

    :param buffer_size: T
    :param observation_space: observation space of one environment
    :param action_space: action space of one environment
    :param device: where the tensors live
    :param gae_lambda: λ for :meth:`compute_returns_and_advantage`
    :param gamma: γ for the same
    :param n_envs: N
    """

    observations = _NumpyView("observations")
    actions = _NumpyView("actions")
    rewards = _NumpyView("rewards")
    episode_starts = _NumpyView("episode_starts")
    values = _NumpyView("values")
    log_probs = _NumpyView("log_probs")
    next_values = _NumpyView("next_values")
    dones = _NumpyView("dones")
    advantages = _NumpyView("advantages")
    returns = _NumpyView("returns")

    #: How observations lie in memory on a CPU: as they come, or always contiguous, as SB3's, or pictures always with
    #: the channels last, from which convolutions learn more than twice as fast. Most pictures come so.
    memory_format = th.preserve_format
    _storage: dict[str, Any] | None = None
    #: NumPy views of the storage, where it lies on the CPU.
    _rows: dict[str, np.ndarray[Any, Any]] | None = None
    #: Whether somebody may have kept an array of the storage.
    _is_seen = False
    #: The steps that a time limit cut, and V of their final observations.
    _end = _NO_END
    #: While a subclass computes advantages by SB3's rules: rewards are scaled and hold the bootstraps of cut steps.
    _is_in_sb3_terms = False
    #: How advantages are computed from rewards, values, values after each step, and ends.
    estimate: Callable[..., Any] = staticmethod(gae)
    #: By what rewards are divided for the advantages, and where they are cut then.
    reward_scale: tuple[Any, float] = (1.0, math.inf)

    def reset(self) -> None:
        """Start a new rollout in the storage of the last one, or in a new one if arrays of that were handed out."""
        if self._is_seen:
            self._storage = self._rows = None
            self._is_seen = False
        self._end = _NO_END
        self.pos = 0
        self.full = False
        self.generator_ready = False
        #: Per-sample tensors ``[T·N, ...]`` in flattened order, handed out with the minibatches as `old_distribution`.
        self.extras: tuple[th.Tensor, ...] = ()

    def tensor(self, name: str) -> Any:
        """
        A stored field.

        :param name: ``"observations"``, ``"rewards"``, …
        :return: ``[T, N, ...]``, a dict of such for Dict observations; zeros before the first rollout
        """
        if self._storage is None:
            self._allocate()
        assert self._storage is not None
        if name == "observations" and name not in self._storage:
            # Their type is known with the first ones; until then there is nothing to keep.
            return self._allocate_observations(self._zero_observations())
        return self._storage[name]

    @property
    def arrays(self) -> dict[str, Any]:
        """
        Name → stored field for arithmetic on it: NumPy's view where it lies on the CPU, which is several times as quick
        for a short rollout, and the tensor where it does not. Observations may be missing.
        """
        if self._storage is None:
            self._allocate()
        assert self._storage is not None
        return self._storage if self._rows is None else self._rows

    def add(
        self,
        obs: Any,
        action: np.ndarray[Any, Any],
        reward: np.ndarray[Any, Any],
        episode_start: np.ndarray[Any, Any],
        value: th.Tensor,
        log_prob: th.Tensor,
    ) -> None:
        """
        Store one step of all environments.

        :param obs: observations the actions were taken on, ``[N, ...]``
        :param action: ``[N, ...]``
        :param reward: ``[N]``
        :param episode_start: whether ``obs`` begins an episode, ``[N]``
        :param value: V(obs), ``[N]`` or ``[N, 1]``
        :param log_prob: log π(action|obs), ``[N]``
        :raises TypeError: if the observations' type changed and the stored one cannot hold it
        """
        if self._storage is None:
            self._allocate()
        assert self._storage is not None
        if "observations" not in self._storage:
            self._storage["observations"] = self._allocate_observations(obs)
            self._view_storage()
        self._write_observations(obs)
        self._write_row("actions", action)
        self._write_row("rewards", reward)
        self._write_row("episode_starts", episode_start)
        self._write_row("values", value)
        self._write_row("log_probs", log_prob)
        self.pos += 1
        self.full = self.pos == self.buffer_size

    def _write_row(self, name: str, row: Any) -> None:
        """Store what one step of all environments brought, by NumPy where it lies: that is quickest."""
        if self._rows is None:
            stored = self._storage[name][self.pos]  # type: ignore[index]  # allocated by now
            stored.copy_(as_tensor(row).detach().reshape(stored.shape))
            return
        stored = self._rows[name][self.pos]
        stored[:] = (row.detach().numpy() if isinstance(row, th.Tensor) else row).reshape(stored.shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None}  # a copy's views would still be the original's

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._view_storage()

    def _view_storage(self) -> None:
        if self._storage is not None and th.device(self.device).type == "cpu":
            self._rows = {name: x.numpy() for name, x in self._storage.items() if isinstance(x, th.Tensor)}

    def set_bootstraps(self, last_values: Any, dones: Any, end: RolloutEnd, final_values: Any) -> None:
        """
        Fill in what each step bootstraps from and where episodes ended.

        :param last_values: V of the observations after the last step, ``[N]``
        :param dones: whether the last step ended an episode, ``[N]``
        :param end: the steps that a time limit cut
        :param final_values: V of their final observations, ``[K]``
        """
        self._end = end, final_values
        stored = self.arrays
        next_values, ends = stored["next_values"], stored["dones"]
        if self._rows is not None:
            last_values, final_values = (values.detach().float().numpy() for values in (last_values, final_values))
        ends[:-1] = stored["episode_starts"][1:]
        ends[-1] = dones if self._rows is not None else as_tensor(dones)
        next_values[:-1] = stored["values"][1:]
        next_values[-1] = last_values.reshape(-1)
        next_values *= 1.0 - ends
        if end.steps:
            next_values[end.steps, end.envs] = final_values.reshape(-1)

    @np.errstate(all="ignore")  # as silent as torch
    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray[Any, Any]) -> None:
        """
        SB3's post-processing step: GAE of the rewards, scaled as the rollout's were. Steps that a time limit cut go on
        from the values of their final observations where a rollout has found those; any other end is a termination.

        :param last_values: V of the observations after the last step, ``[N]`` or ``[N, 1]``
        :param dones: whether the last step ended an episode, ``[N]``
        """
        self.set_bootstraps(last_values, dones, *(_NO_END if self._is_in_sb3_terms else self._end))
        rewards, *rest = (self.arrays[name] for name in ("rewards", "values", "next_values", "dones"))
        if not self._is_in_sb3_terms:
            rewards = scaled_rewards(rewards, *self.reward_scale)
        self.set_advantages(self.estimate(rewards, *rest, gamma=self.gamma, gae_lambda=self.gae_lambda))

    @contextmanager
    def in_sb3_terms(self) -> Iterator[None]:
        """
        For a while, let rewards be what SB3's code expects of them: scaled, and with γ V(s_T) of the steps that a time
        limit cut, whose ends then count as terminations.
        """
        raw, end = self.tensor("rewards").clone(), self._end
        rewards = scaled_rewards(self.tensor("rewards"), *self.reward_scale).clone()
        if end[0].steps:
            gamma = th.tensor(self.gamma, dtype=rewards.dtype, device=rewards.device)  # in float32, as SB3 rounds it
            rewards[end[0].steps, end[0].envs] += gamma * end[1].reshape(-1).to(rewards)
        self.tensor("rewards").copy_(rewards)
        self._is_in_sb3_terms = True
        try:
            yield
        finally:
            self._is_in_sb3_terms, self._end = False, end
            self.tensor("rewards").copy_(raw)

    def set_advantages(self, advantages: Any) -> None:
        """
        Store advantages Ψ, ``[T, N]``, and with them the critic's targets ``Ψ + V``.

        :param advantages: ``[T, N]``, of the kind that :attr:`arrays` has
        """
        if self._is_seen:  # those of before may have been kept
            assert self._storage is not None
            self._storage |= {name: th.empty_like(self._storage[name]) for name in ("advantages", "returns")}
            self._view_storage()
        stored = self.arrays
        stored["advantages"][:] = advantages
        stored["returns"][:] = stored["advantages"] + stored["values"]

    def flat(self, name: str) -> Any:
        """
        A stored field with time and environments merged, environment-major.

        :param name: as for :meth:`tensor`
        :return: ``[T·N, ...]``
        """
        return map_observations(
            self.tensor(name), lambda tensor: _in_memory_order(tensor, lambda x: x.transpose(0, 1).flatten(0, 1))
        )

    def whole(self) -> RolloutSamples:
        """The rollout as one batch of T·N samples as they are stored, time-major: views, where ``get()`` copies."""
        assert self.full, "the rollout is not complete"
        names = ("observations", "actions", "values", "log_probs", "advantages", "returns")
        fields = [map_observations(self.tensor(name), lambda x: x.flatten(0, 1)) for name in names]
        by_env = (self.n_envs, self.buffer_size)
        extras = tuple(extra.unflatten(0, by_env).transpose(0, 1).flatten(0, 1) for extra in self.extras)
        return RolloutSamples._make((*fields, extras))

    def get(  # type: ignore[override]  # yields our samples, takes more
        self, batch_size: int | None = None, *, observations: th.Tensor | None = None
    ) -> Generator[RolloutSamples, None, None]:
        """
        One epoch of minibatches without replacement: a single shuffled gather, then views of it.

        :param batch_size: B; None gives one batch of everything
        :param observations: what takes the place of the stored observations, ``[T·N, ...]`` environment-major
        :return: minibatches of B samples, the last one smaller if B does not divide T·N
        """
        assert self.full, "the rollout is not complete"
        n_samples = self.buffer_size * self.n_envs
        indices = np.random.permutation(n_samples)
        if not _is_stock(self, ("_get_samples",)):
            size = batch_size or n_samples
            yield from (self._get_samples(indices[first : first + size]) for first in range(0, n_samples, size))
            return
        samples = self._gather(indices, observations)
        if batch_size is None or batch_size >= n_samples:
            yield samples
        else:
            yield from _split(samples, batch_size)

    def rows(self, indices: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """
        Where samples are in :meth:`whole`: sample n·T + t in row t·N + n.

        :param indices: numbers of samples in flattened order
        """
        envs, steps = np.divmod(indices, self.buffer_size)
        return steps * self.n_envs + envs

    def _get_samples(  # type: ignore[override]  # as `get`
        self, batch_inds: np.ndarray[Any, Any], env: Any = None
    ) -> RolloutSamples:
        """
        SB3's place for minibatches of one's own, called for each of them where a subclass overrides it.

        :param batch_inds: numbers of samples in flattened order, ``[B]``
        :param env: not used
        """
        return self._gather(batch_inds, None)

    def _gather(self, indices: np.ndarray[Any, Any], observations: th.Tensor | None) -> RolloutSamples:
        rows = th.as_tensor(self.rows(indices), device=self.device)
        order = th.as_tensor(indices, device=self.device)

        def pick(name: str) -> Any:
            return map_observations(
                self.tensor(name),
                lambda tensor: _in_memory_order(tensor, lambda x: x.flatten(0, 1).index_select(0, rows)),
            )

        return RolloutSamples(
            observations=pick("observations") if observations is None else observations.index_select(0, order),
            actions=pick("actions"),
            old_values=pick("values"),
            old_log_prob=pick("log_probs"),
            advantages=pick("advantages"),
            returns=pick("returns"),
            old_distribution=tuple(extra.index_select(0, order) for extra in self.extras),
        )

    # --- storage ----------------------------------------------------------------------------------------------------

    def _zero_observations(self) -> Any:
        return np.zeros((self.n_envs, *self.obs_shape), dtype=self.observation_space.dtype)

    def _allocate(self) -> None:
        size = (self.buffer_size, self.n_envs)
        # Floats in single precision, as policies produce them; integers as they are, to stay usable as indices.
        integer_actions = isinstance(self.action_space, (spaces.Discrete, spaces.MultiDiscrete))
        action_dtype = th.int64 if integer_actions else th.float32
        self._storage = {name: th.zeros(size, device=self.device) for name in _SCALAR_FIELDS}
        self._storage["actions"] = th.zeros((*size, self.action_dim), dtype=action_dtype, device=self.device)
        self._view_storage()

    def _allocate_observations(self, obs: Any) -> Any:
        return self._zeros_like(obs, self.obs_shape)

    def _zeros_like(self, obs: Any, shape: tuple[int, ...]) -> th.Tensor:
        array = np.asarray(obs)
        template = th.from_numpy(np.zeros(0, dtype=_STORAGE_DTYPES.get(array.dtype, array.dtype)))
        order = [*range(len(shape))]
        if th.device(self.device).type == "cpu":
            if self.memory_format is th.channels_last and len(shape) == 3:
                order = [1, 2, 0]
            elif self.memory_format is not th.contiguous_format and array.shape[1:] == shape:
                order = _memory_order(array)
        stored = template.new_zeros((self.buffer_size, self.n_envs, *(shape[i] for i in order)), device=self.device)
        return stored.permute(0, 1, *(2 + order.index(i) for i in range(len(shape))))

    def _write_observations(self, obs: Any) -> None:
        rows = None if self._rows is None else self._rows["observations"]
        if rows is not None and isinstance(obs, np.ndarray) and obs.dtype == rows.dtype:
            rows[self.pos] = obs.reshape(rows.shape[1:])
        else:
            self._write(self.tensor("observations"), obs)

    def _write(self, storage: th.Tensor, obs: Any) -> None:
        tensor, row = as_tensor(obs), storage[self.pos]
        if not _fits(tensor.dtype, storage.dtype):
            raise TypeError(
                f"observations came as {storage.dtype} at first and now as {tensor.dtype}, which would be cut"
            )
        row.copy_(tensor.reshape(row.shape))


class TorchDictRolloutBuffer(TorchRolloutBuffer, DictRolloutBuffer):  # type: ignore[misc]  # `get` yields our samples
    """:class:`TorchRolloutBuffer` for Dict observations: ``observations`` is a dict of arrays ``[T, N, ...]``."""

    obs_shape: dict[str, tuple[int, ...]]

    def _zero_observations(self) -> Any:
        return {
            k: np.zeros((self.n_envs, *s), dtype=self.observation_space[k].dtype) for k, s in self.obs_shape.items()
        }

    def _allocate_observations(self, obs: Mapping[str, Any]) -> Any:
        return {key: self._zeros_like(obs[key], shape) for key, shape in self.obs_shape.items()}

    def _write_observations(self, obs: Mapping[str, Any]) -> None:
        for key, storage in self.tensor("observations").items():
            self._write(storage, obs[key])


def as_tensor(array: Any) -> th.Tensor:
    """
    A NumPy array as a CPU tensor, without copying where torch can share the memory.

    :param array: any array, read-only ones (JAX's, broadcast ones) and unsigned integers included
    """
    if isinstance(array, th.Tensor):
        return array
    array = np.asarray(array)
    array = array.astype(_STORAGE_DTYPES.get(array.dtype, array.dtype), copy=not array.flags.writeable)
    if not array.flags.c_contiguous and any([stride < 0 or stride % array.itemsize for stride in array.strides]):
        array = np.ascontiguousarray(array)
    return th.from_numpy(array)


def _memory_order(batch: np.ndarray[Any, Any]) -> list[int]:
    """
    The dimensions of one observation in the order in which they lie in memory, the outermost first.

    :param batch: ``[N, ...]``; where its memory has gaps or repeats itself, the order is the usual one
    """
    usual = [*range(batch.ndim - 1)]
    order = sorted(usual, key=lambda i: -batch.strides[1 + i])
    return order if batch.transpose(0, *(1 + i for i in order)).flags.c_contiguous else usual


def _in_memory_order(tensor: th.Tensor, function: Callable[[th.Tensor], th.Tensor]) -> th.Tensor:
    """
    Apply a function that makes one dimension of the first two, and copies, to a rollout ``[T, N, ...]`` so that the
    result lies in memory as the rollout does.

    :param tensor: the rollout
    :param function: of it
    """
    if tensor.is_contiguous() or (order := tensor.dim_order())[:2] != (0, 1):
        return function(tensor)
    return function(tensor.permute(order)).permute(0, *(order.index(i) - 1 for i in range(2, tensor.dim())))


def _fits(source: th.dtype, target: th.dtype) -> bool:
    """Whether values of one type can be stored in another without being cut (rounding floats is fine)."""
    if source.is_floating_point or target.is_floating_point:
        return target.is_floating_point
    return th.promote_types(source, target) == target


def stored_field(buffer: RolloutBuffer, name: str) -> Any:
    """
    What a buffer stores: the tensor on its device in ours, the NumPy array in SB3's.

    :param buffer: either
    :param name: of the field
    """
    return buffer.tensor(name) if isinstance(buffer, TorchRolloutBuffer) else getattr(buffer, name)


def stored_array(buffer: RolloutBuffer, name: str) -> Any:
    """
    :func:`stored_field` for arithmetic on it: see :attr:`TorchRolloutBuffer.arrays`.

    :param buffer: either
    :param name: of the field
    """
    return buffer.arrays[name] if isinstance(buffer, TorchRolloutBuffer) else getattr(buffer, name)


def double(x: Any) -> Any:
    """A copy of a tensor or an array in double precision."""
    return x.to(th.float64, copy=True) if isinstance(x, th.Tensor) else x.astype(np.float64)


def like(values: Any, x: Any) -> Any:
    """Numbers, a tensor or an array as what ``x`` is, in double precision: a tensor on its device, or an array."""
    if isinstance(x, th.Tensor):
        return th.as_tensor(values, dtype=th.float64, device=x.device)
    return np.asarray(values.cpu() if isinstance(values, th.Tensor) else values, dtype=np.float64)


def map_observations(observations: Any, function: Callable[[th.Tensor], Any]) -> Any:
    """Apply a function to a tensor, or to each tensor of a dict."""
    if isinstance(observations, dict):
        return {key: function(tensor) for key, tensor in observations.items()}
    return function(observations)


def select(observations: Any, index: int | slice) -> Any:
    """Index a tensor, or each tensor of a dict."""
    return map_observations(observations, lambda tensor: tensor[index])


def cat_observations(observations: list[Any]) -> Any:
    """Concatenate batches of observations ``[b, ...]`` along their first dimension."""
    if isinstance(observations[0], dict):
        return {key: th.cat([obs[key] for obs in observations]) for key in observations[0]}
    return th.cat(observations)


def split_observations(observations: Any, size: int) -> list[Any]:
    """Cut a batch of observations ``[B, ...]`` into views of at most ``size`` samples."""
    if not isinstance(observations, dict):
        return list(observations.split(size))
    pieces = {key: tensor.split(size) for key, tensor in observations.items()}
    n_pieces = len(next(iter(pieces.values())))
    return [{key: piece[i] for key, piece in pieces.items()} for i in range(n_pieces)]


def pick(samples: RolloutSamples, rows: th.Tensor) -> RolloutSamples:
    """
    Some of many samples.

    :param samples: all of them
    :param rows: indices ``[b]``
    """
    observations = map_observations(samples.observations, lambda tensor: tensor.index_select(0, rows))
    fields = [tensor.index_select(0, rows) for tensor in samples[1:6]]
    return RolloutSamples._make((observations, *fields, tuple(x.index_select(0, rows) for x in samples[6])))


def _split(samples: RolloutSamples, size: int) -> Iterator[RolloutSamples]:
    """Cut samples into views of at most ``size`` of them."""
    observations = split_observations(samples.observations, size)
    fields = [tensor.split(size) for tensor in samples[1:6]]
    old_distribution = [tensor.split(size) for tensor in samples.old_distribution]
    for i, piece in enumerate(observations):
        extras = tuple(extra[i] for extra in old_distribution)
        yield RolloutSamples._make((piece, *(field[i] for field in fields), extras))


def has_stock_sampling(buffer: RolloutBuffer) -> TypeGuard[TorchRolloutBuffer]:
    """
    Whether a buffer hands out its minibatches as :class:`TorchRolloutBuffer` does, whatever it is called.

    :param buffer: any
    """
    return isinstance(buffer, TorchRolloutBuffer) and _is_stock(buffer, ("get", "_gather", "_get_samples", "whole"))


def has_own_advantages(buffer: RolloutBuffer) -> bool:
    """
    Whether a buffer of our kind computes advantages in a way of its own, in SB3's place for that.

    :param buffer: any
    """
    return isinstance(buffer, TorchRolloutBuffer) and not _is_stock(buffer, ("compute_returns_and_advantage",))


def _is_stock(buffer: RolloutBuffer, names: Iterable[str]) -> bool:
    own, kind, stock = vars(buffer), type(buffer), vars(TorchRolloutBuffer)
    return all(name not in own and getattr(kind, name, None) is stock[name] for name in names)


def scaled_rewards(rewards: Any, std: Any, limit: float) -> Any:
    """
    Rewards as the advantages see them, VecNormalize's formula: ``clip(r/σ, −c, c)``.

    :param rewards: a tensor or an array
    :param std: σ
    :param limit: c
    :return: of the same type; the rewards themselves where σ is the number 1 and nothing is cut
    """
    if isinstance(std, float) and std == 1.0 and limit == math.inf:
        return rewards
    if isinstance(rewards, th.Tensor):
        return (rewards.double() / std).clamp(-limit, limit).to(rewards.dtype)
    return np.minimum(np.maximum(double(rewards) / float(std), -limit), limit).astype(rewards.dtype)


_DISCOUNTS = ("gamma", "gae_lambda")


def note_discounts(buffer: RolloutBuffer) -> None:
    """
    Remember γ and λ as they are in a buffer.

    :param buffer: ours or SB3's
    """
    buffer.__dict__["_noted_discounts"] = [getattr(buffer, name) for name in _DISCOUNTS]


def agree_on_discounts(model: Any, buffer: RolloutBuffer) -> None:
    """
    One γ and one λ: what was assigned to the buffer since, where SB3 reads them, goes to the model, otherwise what the
    model has to the buffer, a new one included.

    :param model: with attributes of these names
    :param buffer: ours or SB3's
    """
    if "_noted_discounts" not in buffer.__dict__:  # somebody put it in the place of ours
        note_discounts(buffer)
    for name, before in zip(_DISCOUNTS, buffer.__dict__["_noted_discounts"], strict=True):
        source, target = (model, buffer) if getattr(buffer, name) == before else (buffer, model)
        setattr(target, name, getattr(source, name))
    note_discounts(buffer)
