"""
Environments that live on the training device: observations, rewards and ends of episodes stay tensors on the way to the
rollout buffer, and the host reads the device once per rollout.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

from sb3_pgplus.buffers import map_observations, select
from sb3_pgplus.vec_env.common import check_integer


class TensorStep(NamedTuple):
    """One step of N environments, on their device. Environments that ended have been reset already."""

    #: What the next action is taken on: the first observation of a new episode where one ended, ``[N, ...]``.
    observations: Any
    #: ``[N]``
    rewards: th.Tensor
    #: Whether the episode ended by the task's own rules, bool ``[N]``.
    terminated: th.Tensor
    #: Whether a time limit cut it, bool ``[N]``.
    truncated: th.Tensor
    #: The observation after the step, before any reset, ``[N, ...]``.
    final_observations: Any


class TensorVecEnv(VecEnv):
    """
    Base class of environments on a device. To connect a simulator, implement :meth:`reset_tensors` and
    :meth:`step_tensors`.

    Who steps it with a tensor gets tensors and :class:`TensorInfos`: so do the algorithms of this package, which then
    train without a copy to the host. Who steps it with a NumPy array gets SB3's NumPy arrays and dicts, so that SB3's
    own algorithms, wrappers, callbacks and ``evaluate_policy`` work.

    :param num_envs: N
    :param observation_space: of one environment
    :param action_space: of one environment
    :param device: where its tensors are
    :raises TypeError: if `num_envs` is no integer
    :raises ValueError: if it is below 1
    """

    backend = "tensors"
    #: Set it where a simulator writes every step into the same tensors: they are copied then, because a rollout keeps
    #: what it was given.
    reuses_memory = False

    def __init__(
        self,
        num_envs: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: th.device | str = "cpu",
    ) -> None:
        self.device = th.device(device)
        self.render_mode = None
        num_envs = check_integer("num_envs", num_envs, 1)
        super().__init__(num_envs, observation_space, action_space)
        self._was_reset = False
        self._returns = th.zeros(num_envs, dtype=th.float64, device=self.device)
        self._lengths = th.zeros(num_envs, dtype=th.int64, device=self.device)
        self._started = time.time()

    @abstractmethod
    def reset_tensors(self, seed: int | None) -> Any:
        """
        Begin new episodes in all environments.

        :param seed: of the random numbers from now on; None: go on with those there are
        :return: observations ``[N, ...]``, or a dict of such
        """

    @abstractmethod
    def step_tensors(self, actions: th.Tensor) -> TensorStep:
        """
        Take one step, and reset environments whose episode ended.

        :param actions: ``[N, ...]`` on the device; integers for Discrete spaces
        """

    # --- SB3's interface ----------------------------------------------------------------------------------------------

    def reset(self) -> Any:
        """
        Begin new episodes; NumPy observations, as SB3 expects them.

        :raises ValueError: if it was given reset options, which it has none of
        """
        options = self._options
        self._reset_options()
        if any(options):
            raise ValueError(f"{type(self).__name__} takes no reset options, got {options}")
        observations = self.reset_tensors(self._seeds[0])
        self._reset_seeds()
        self._was_reset = True
        self._returns.zero_()
        self._lengths.zero_()
        self.reset_infos = [{} for _ in range(self.num_envs)]
        return map_observations(observations, _to_numpy)

    def step_async(self, actions: Any) -> None:
        """:param actions: a tensor on the device, or anything that NumPy makes an array of"""
        self._actions = actions

    def step_wait(self) -> Any:
        """
        :return: observations, rewards, dones, infos: tensors and :class:`TensorInfos` after a tensor, else as SB3's
        :raises RuntimeError: before the first reset
        """
        if not self._was_reset:
            raise RuntimeError(f"this {type(self).__name__} has no episodes yet: call reset() first")
        actions, is_host = self._actions, not isinstance(self._actions, th.Tensor)
        step = self.step_tensors(th.as_tensor(np.asarray(actions) if is_host else actions, device=self.device))
        if self.reuses_memory:
            step = TensorStep(*(map_observations(part, th.clone) for part in step))
        # Some simulators have bytes or integers here, of which ~ makes something else.
        step = step._replace(terminated=step.terminated.bool(), truncated=step.truncated.bool())
        dones = step.terminated | step.truncated
        self._returns += step.rewards
        self._lengths += 1
        infos = TensorInfos(step, dones, self._returns.clone(), self._lengths.clone(), self._started)
        going_on = ~dones
        self._returns *= going_on
        self._lengths *= going_on
        if not is_host:
            return step.observations, step.rewards, dones, infos
        observations = map_observations(step.observations, _to_numpy)
        return observations, _to_numpy(step.rewards).astype(np.float32), _to_numpy(dones), infos.to_list()

    def close(self) -> None:
        """Nothing to release."""

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """The same attribute of this object for each index: the copies have none of their own."""
        return [getattr(self, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """:raises AttributeError: always, the copies have no attributes of their own"""
        raise AttributeError(f"{type(self).__name__} runs its copies as one: set {attr_name!r} on it instead")

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """:raises AttributeError: always, the copies have no methods of their own"""
        raise AttributeError(f"{type(self).__name__} runs its copies as one: call {method_name!r} on it instead")

    def env_is_wrapped(self, wrapper_class: type[Any], indices: VecEnvIndices = None) -> list[bool]:
        """Whether it does a wrapper's work: it keeps the statistics of episodes, as a Monitor does."""
        return [issubclass(wrapper_class, Monitor) for _ in self._get_indices(indices)]


class TensorInfos(Sequence[dict[str, Any]]):
    """
    What SB3 calls ``infos``, on the device: a list of dicts is only made of it when somebody looks inside.

    :param step: of the environments
    :param dones: whether an episode ended, bool ``[N]``
    :param returns: sums of rewards of the running episodes, this step included, ``[N]``
    :param lengths: their steps, ``[N]``
    :param started: time that ``"t"`` counts from, seconds since the epoch
    """

    def __init__(
        self, step: TensorStep, dones: th.Tensor, returns: th.Tensor, lengths: th.Tensor, started: float
    ) -> None:
        self.dones, self.returns, self.lengths, self.started = dones, returns, lengths, started
        #: Cut by a time limit and not ended otherwise: what bootstraps.
        self.truncated = step.truncated & ~step.terminated
        self.final_observations = step.final_observations
        self._dicts: list[dict[str, Any]] | None = None

    def to_list(self) -> list[dict[str, Any]]:
        """SB3's infos, read from the device once."""
        if self._dicts is None:
            self._dicts = [{"TimeLimit.truncated": bool(cut)} for cut in self.truncated.tolist()]
            for index, episode in zip(*episodes_of([self]), strict=True):
                final = map_observations(select(self.final_observations, index), _to_numpy)
                self._dicts[index] |= {"terminal_observation": final, "episode": episode}
        return self._dicts

    def __len__(self) -> int:
        return len(self.dones)

    def __getitem__(self, index: Any) -> Any:
        return self.to_list()[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.to_list())


def episodes_of(infos: Sequence[TensorInfos]) -> tuple[list[int], list[dict[str, Any]]]:
    """
    The episodes that ended in some steps, in the order in which they did; the device is looked at once.

    :param infos: of one step or more
    :return: indices of environments, and ``{"r": return, "l": length, "t": seconds}`` of each, as Monitor has them
    """
    ended = th.stack([step.dones for step in infos])
    returns = th.stack([step.returns for step in infos])[ended]
    lengths = th.stack([step.lengths for step in infos])[ended]
    seconds = round(time.time() - infos[0].started, 6)
    rows = zip(returns.tolist(), lengths.tolist(), strict=True)
    return ended.nonzero()[:, 1].tolist(), [{"r": round(r, 6), "l": n, "t": seconds} for r, n in rows]


def _to_numpy(tensor: th.Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().cpu().numpy().copy()  # a copy: SB3 keeps what it gets
