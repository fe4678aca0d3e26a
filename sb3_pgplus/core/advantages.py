"""
Advantage estimators Ψ on time-major arrays ``[T, N]`` (T steps, N environments).

Two arguments carry everything about the end of an episode:

* ``next_values[t]`` is what step t bootstraps from: ``V(s_{t+1})`` inside an episode, 0 where step t terminated,
  ``V(s_T)`` of the true final observation where it was truncated (time limit);
* ``dones[t]`` says that step t ended its episode, for whichever reason. It cuts the trace.

Tensors, or NumPy arrays in their place, which are several times as quick where a rollout is short.

References: GAE is "High-Dimensional Continuous Control Using Generalized Advantage Estimation"
(Schulman et al. 2016, https://arxiv.org/abs/1506.02438).
"""

from typing import Any

import torch as th

from sb3_pgplus.core.checks import check_floating, check_same_shape, check_unit_interval

#: So many steps take less time one after the other than by halves: of tensors, and of NumPy arrays.
_SHORT, _SHORT_ARRAYS = 8, 64


def td_errors(rewards: th.Tensor, values: th.Tensor, next_values: th.Tensor, *, gamma: float) -> th.Tensor:
    """
    One-step temporal-difference errors ``δ_t = r_t + γ V(s_{t+1}) − V(s_t)`` (GAE paper, section 3).

    :param rewards: ``[T, N]``
    :param values: ``V(s_t)``, ``[T, N]``
    :param next_values: what step t bootstraps from, ``[T, N]`` (see the module)
    :param gamma: discount factor in [0, 1]
    :return: δ, ``[T, N]``
    :raises ValueError: on different shapes, or gamma outside [0, 1]
    :raises TypeError: on integer tensors
    """
    check_same_shape(rewards=rewards, values=values, next_values=next_values)
    check_floating(rewards=rewards, values=values, next_values=next_values)
    check_unit_interval(gamma=gamma)
    return rewards + gamma * next_values - values


def gae(
    rewards: th.Tensor,
    values: th.Tensor,
    next_values: th.Tensor,
    dones: th.Tensor,
    *,
    gamma: float,
    gae_lambda: float,
) -> th.Tensor:
    """
    Generalized advantage estimation (GAE paper, equation 16), cut at episode ends::

        Ψ_t = Σ_{k≥0} (γλ)^k δ_{t+k} = δ_t + γλ (1 − done_t) Ψ_{t+1}

    λ=0 gives the TD error, λ=1 the Monte Carlo advantage. The recursion is solved by a scan of logarithmic
    depth; :func:`gae_sequential` gives the same up to rounding, in the order of SB3's loop.

    :param rewards: ``[T, N]``
    :param values: ``V(s_t)``, ``[T, N]``
    :param next_values: what step t bootstraps from, ``[T, N]`` (see the module)
    :param dones: whether step t ended its episode, ``[T, N]``, boolean or 0/1
    :param gamma: discount factor in [0, 1]
    :param gae_lambda: λ in [0, 1]: bias (0) against variance (1)
    :return: Ψ, ``[T, N]``; the critic's target is ``Ψ + V``
    :raises ValueError: on different shapes, or gamma or gae_lambda outside [0, 1]
    :raises TypeError: on integer rewards or values
    """
    check_same_shape(rewards=rewards, dones=dones)
    check_unit_interval(gae_lambda=gae_lambda)
    deltas = td_errors(rewards, values, next_values, gamma=gamma)
    return reverse_scan(_decay(dones, deltas, gamma * gae_lambda), deltas)


def gae_sequential(
    rewards: th.Tensor,
    values: th.Tensor,
    next_values: th.Tensor,
    dones: th.Tensor,
    *,
    gamma: float,
    gae_lambda: float,
) -> th.Tensor:
    """
    :func:`gae` by the plain backward loop, in the order of operations of SB3's ``RolloutBuffer``: in float32 on a
    CPU the result is SB3's bit for bit. One Python iteration a step, so only parity with SB3 asks for it.

    Arguments, result and errors are those of :func:`gae`.
    """
    check_same_shape(rewards=rewards, dones=dones)
    check_unit_interval(gae_lambda=gae_lambda)
    deltas = td_errors(rewards, values, next_values, gamma=gamma)
    return _backward_loop(_decay(dones, deltas, gamma * gae_lambda), deltas)


def n_step_advantages(
    rewards: th.Tensor,
    values: th.Tensor,
    next_values: th.Tensor,
    dones: th.Tensor,
    *,
    gamma: float,
    horizon: int,
) -> th.Tensor:
    """
    n-step advantages by telescoping TD errors (GAE paper, equations 11-14), n = ``horizon``::

        Ψ_(n)(s_t) = r_t + γ r_{t+1} + … + γ^n V(s_{t+n}) − V(s_t) = Σ_{k=0}^{n−1} γ^k δ_{t+k}

    A sum is shortened where the episode or the rollout ends.

    :param rewards: ``[T, N]``
    :param values: ``V(s_t)``, ``[T, N]``
    :param next_values: what step t bootstraps from, ``[T, N]`` (see the module)
    :param dones: whether step t ended its episode, ``[T, N]``, boolean or 0/1
    :param gamma: discount factor in [0, 1]
    :param horizon: n ≥ 1, in steps
    :return: Ψ_(n), ``[T, N]``
    :raises ValueError: on different shapes, gamma outside [0, 1] or horizon < 1
    :raises TypeError: on integer rewards or values, or a horizon that is no integer
    """
    check_same_shape(rewards=rewards, dones=dones)
    if not isinstance(horizon, int) or isinstance(horizon, bool):
        raise TypeError(f"`horizon` must be an integer, got {horizon!r}")
    if horizon < 1:
        raise ValueError(f"`horizon` must be at least 1, got {horizon}")
    deltas = td_errors(rewards, values, next_values, gamma=gamma)
    decay = _decay(dones, deltas, gamma)
    sums = _windowed_sums(th.as_tensor(decay), th.as_tensor(deltas), min(horizon, len(deltas)))
    return sums if isinstance(rewards, th.Tensor) else sums.numpy()


def monte_carlo_advantages(
    rewards: th.Tensor, values: th.Tensor, next_values: th.Tensor, dones: th.Tensor, *, gamma: float
) -> th.Tensor:
    """
    Monte Carlo (longest trace) advantages ``Σ_k γ^k r_{t+k} + γ^K (bootstrap) − V(s_t)``: GAE with λ = 1
    (GAE paper, equation 18). Unbiased on episodes that end inside the rollout, of high variance.

    Arguments, result and errors are those of :func:`gae`.
    """
    return gae(rewards, values, next_values, dones, gamma=gamma, gae_lambda=1.0)


def normalize(advantages: th.Tensor, *, epsilon: float = 1e-8) -> th.Tensor:
    """
    Zero mean and unit standard deviation, ``(Ψ − mean) / (std + ε)`` with the unbiased std, as SB3 does.

    :param advantages: any shape
    :param epsilon: added to the standard deviation
    :return: same shape; fewer than two elements, which have no standard deviation, are returned as they are
    :raises TypeError: on integers
    """
    check_floating(advantages=advantages)
    if advantages.numel() < 2:
        return advantages
    return (advantages - advantages.mean()) / (advantages.std() + epsilon)


def discounted_returns(rewards: th.Tensor, dones: th.Tensor, initial: th.Tensor, *, gamma: float) -> th.Tensor:
    """
    Forward discounted sums ``R_t = r_t + γ (1 − done_{t−1}) R_{t−1}``: the stream whose standard deviation scales
    rewards (VecNormalize's ``returns``; *Implementation Matters*, Engstrom et al. 2020, section 3).

    :param rewards: ``[T, N]``
    :param dones: whether step t ended its episode, ``[T, N]``
    :param initial: ``R_{−1}`` carried over from the steps before (0 at the start of an episode), ``[N]``
    :param gamma: discount factor in [0, 1]
    :return: R, ``[T, N]``
    :raises ValueError: on different shapes, or gamma outside [0, 1]
    :raises TypeError: on integer rewards
    """
    check_same_shape(rewards=rewards, dones=dones)
    check_same_shape(rewards=rewards[0], initial=initial)
    check_floating(rewards=rewards)
    check_unit_interval(gamma=gamma)
    decay = _decay(dones, rewards, gamma)
    inputs = rewards.clone() if isinstance(rewards, th.Tensor) else rewards.copy()
    inputs[0] += gamma * initial
    if _is_short(inputs):
        for t in range(1, len(inputs)):
            inputs[t] += decay[t - 1] * inputs[t - 1]
        return inputs
    inputs, decay = th.as_tensor(inputs), th.as_tensor(decay)
    # Time reversed, R_t is the same recursion; step t−1's decay is the one that carries R_{t−1} into R_t.
    reversed_decay = th.cat([decay[:-1].flip(0), th.zeros_like(decay[:1])])
    result = reverse_scan(reversed_decay, inputs.flip(0)).flip(0)
    return result if isinstance(rewards, th.Tensor) else result.numpy()


def reverse_scan(decay: th.Tensor, inputs: th.Tensor) -> th.Tensor:
    """
    Solve ``A_t = b_t + c_t A_{t+1}`` for all t, ``A_T = 0``, in O(log T) tensor operations and O(T) work.

    Odd-even reduction: two steps compose into one, ``A_t = (b_t + c_t b_{t+1}) + c_t c_{t+1} A_{t+2}``; solve the
    even half of the steps by recursion, then fill in the odd ones. A few steps are solved one after the other.

    :param decay: c, ``[T, ...]``
    :param inputs: b, ``[T, ...]``
    :return: A, ``[T, ...]``
    """
    n_steps = len(inputs)
    if _is_short(inputs):
        return _backward_loop(decay, inputs)
    if not isinstance(inputs, th.Tensor):
        return reverse_scan(th.from_numpy(decay), th.from_numpy(inputs)).numpy()
    if n_steps % 2:
        # A pair is missing its second half; with b = c = 0 there it changes nothing.
        decay, inputs = (th.cat([x, th.zeros_like(x[:1])]) for x in (decay, inputs))
    even_decay, odd_decay = decay[0::2], decay[1::2]
    even_inputs, odd_inputs = inputs[0::2], inputs[1::2]
    even = reverse_scan(even_decay * odd_decay, th.addcmul(even_inputs, even_decay, odd_inputs))
    result = inputs.clone()
    result[0::2] = even
    result[1:-1:2].addcmul_(odd_decay[:-1], even[1:])
    return result[:n_steps]


def _backward_loop(decay: th.Tensor, inputs: th.Tensor) -> th.Tensor:
    """:func:`reverse_scan` as it is written."""
    result: Any = [*inputs.unbind()] if isinstance(inputs, th.Tensor) else inputs.copy()
    for t in range(len(result) - 2, -1, -1):
        # Two roundings, a product and a sum, as NumPy does it: addcmul may fuse them into one.
        result[t] = result[t] + decay[t] * result[t + 1]
    if not isinstance(inputs, th.Tensor):
        return result
    return th.stack(result) if result else inputs.clone()


def _is_short(steps: th.Tensor) -> bool:
    return len(steps) <= (_SHORT if isinstance(steps, th.Tensor) else _SHORT_ARRAYS)


def _decay(dones: th.Tensor, like: th.Tensor, factor: float) -> th.Tensor:
    """``factor · (1 − done)`` in the type of ``like``."""
    as_like = dones.to(like.dtype) if isinstance(dones, th.Tensor) else dones.astype(like.dtype, copy=False)
    return factor * (1.0 - as_like)


def _windowed_sums(decay: th.Tensor, inputs: th.Tensor, horizon: int) -> th.Tensor:
    """
    ``S_n(t) = Σ_{k<n} (Π_{j<k} c_{t+j}) b_{t+k}`` by doubling: ``S_{m+n}(t) = S_m(t) + C_m(t) S_n(t+m)`` where
    ``C_m(t) = Π_{j<m} c_{t+j}``. O(log n) tensor operations; the bits of n say which doublings are kept.
    """
    total, product, width = th.zeros_like(inputs), th.ones_like(inputs), 0
    power_sum, power_product, power = inputs, decay, 1
    while power <= horizon:
        if horizon & power:
            total = total + product * _shift(power_sum, width)
            product = product * _shift(power_product, width)
            width += power
        power_sum = power_sum + power_product * _shift(power_sum, power)
        power_product = power_product * _shift(power_product, power)
        power *= 2
    return total


def _shift(tensor: th.Tensor, steps: int) -> th.Tensor:
    """``tensor[t + steps]``, zero beyond the end."""
    if steps == 0:
        return tensor
    shifted = th.zeros_like(tensor)
    if steps < len(tensor):
        shifted[:-steps] = tensor[steps:]
    return shifted
