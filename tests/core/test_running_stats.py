"""Running moments: Chan et al.'s merge against the moments of the whole, and against SB3's RunningMeanStd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stable_baselines3.common.running_mean_std import RunningMeanStd
from torch import Tensor

from sb3_pgplus.core.running_stats import Moments, merge_moments, moments_of

F64 = torch.float64
SEEDS = (0, 1, 2)


def data(seed: int, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (3.0 + 2.0 * torch.randn(*shape, generator=rng, dtype=F64)).to(dtype)


def assert_same_moments(actual: Moments, expected: Moments, tolerance: float = 1e-12) -> None:
    for name in Moments._fields:
        got, want = getattr(actual, name), getattr(expected, name)
        torch.testing.assert_close(
            got.to(F64), want.to(F64), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_moments_equal_the_hand_derived_numbers() -> None:
    # (1, 2, 6): mean 3, population variance ((-2)^2 + (-1)^2 + 3^2) / 3 = 14/3;  (0, 0, 3): mean 1, (1 + 1 + 4)/3 = 2
    moments = moments_of(torch.tensor([[1.0, 0.0], [2.0, 0.0], [6.0, 3.0]], dtype=F64))
    torch.testing.assert_close(moments.mean.to(F64), torch.tensor([3.0, 1.0], dtype=F64))
    torch.testing.assert_close(moments.var.to(F64), torch.tensor([14.0 / 3.0, 2.0], dtype=F64))
    assert float(moments.count) == 3.0


def test_merge_equals_the_hand_derived_numbers() -> None:
    # {0, 2}: mean 1, var 1, n 2.  {5}: mean 5, var 0, n 1.  Together {0, 2, 5}: mean 7/3,
    # var = (2 * 1 + 1 * 0 + (5 - 1)^2 * 2 * 1 / 3) / 3 = (2 + 32/3) / 3 = 38/9
    a, b = moments_of(torch.tensor([0.0, 2.0], dtype=F64)), moments_of(torch.tensor([5.0], dtype=F64))
    merged = merge_moments(a, b)
    assert float(merged.mean) == pytest.approx(7.0 / 3.0)
    assert float(merged.var) == pytest.approx(38.0 / 9.0)
    assert float(merged.count) == 3.0


@pytest.mark.parametrize("shape", [(), (3,), (2, 4)])
def test_moments_are_tensors_over_the_first_dimension(shape: tuple[int, ...]) -> None:
    batch = data(0, 7, *shape)
    moments = moments_of(batch)
    assert isinstance(moments, Moments)
    assert all(isinstance(field, Tensor) for field in moments)
    assert moments.mean.shape == moments.var.shape == shape
    torch.testing.assert_close(moments.mean.to(F64), batch.mean(0))
    torch.testing.assert_close(moments.var.to(F64), batch.var(0, correction=0))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (F64, 1e-12)])
@pytest.mark.parametrize("seed", SEEDS)
def test_merging_pieces_gives_the_moments_of_the_whole(seed: int, dtype: torch.dtype, tolerance: float) -> None:
    batch = data(seed, 60, 5, dtype=dtype)
    pieces = [moments_of(piece) for piece in batch.split([1, 2, 30, 7, 20])]
    merged = pieces[0]
    for piece in pieces[1:]:
        merged = merge_moments(merged, piece)
    assert_same_moments(merged, moments_of(batch.to(F64)), tolerance)


@pytest.mark.parametrize("seed", SEEDS)
def test_merge_is_commutative_and_associative(seed: int) -> None:
    a, b, c = (moments_of(piece) for piece in data(seed, 30, 4).split([4, 9, 17]))
    assert_same_moments(merge_moments(a, b), merge_moments(b, a))
    assert_same_moments(merge_moments(merge_moments(a, b), c), merge_moments(a, merge_moments(b, c)))


def test_nothing_seen_is_the_neutral_element() -> None:
    seen = moments_of(data(0, 12, 3))
    nothing = Moments(torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64), torch.zeros((), dtype=F64))
    assert_same_moments(merge_moments(nothing, seen), seen)
    assert_same_moments(merge_moments(seen, nothing), seen)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_merging_batches_equals_running_mean_std_of_sb3(shape: tuple[int, ...], seed: int) -> None:
    """SB3 starts from mean 0, variance 1 and a count of 1e-4; started there too, every update agrees."""
    theirs = RunningMeanStd(epsilon=1e-4, shape=shape)
    ours = Moments(torch.zeros(shape, dtype=F64), torch.ones(shape, dtype=F64), torch.tensor(1e-4, dtype=F64))
    for step in range(20):
        batch = data(100 * seed + step, 1 + step % 5, *shape)
        theirs.update(batch.numpy())
        ours = merge_moments(ours, moments_of(batch))
        expected = Moments(
            *(torch.as_tensor(np.asarray(x), dtype=F64) for x in (theirs.mean, theirs.var, theirs.count))
        )
        assert_same_moments(ours, expected)


def test_one_row_has_variance_zero() -> None:
    moments = moments_of(data(0, 1, 3))
    assert torch.equal(moments.var, torch.zeros_like(moments.var))
    assert float(moments.count) == 1.0


def test_variance_of_a_constant_is_zero_however_it_is_split() -> None:
    constant = torch.full((32, 2), 0.1, dtype=F64)
    merged = merge_moments(moments_of(constant[:5]), moments_of(constant[5:]))
    assert (merged.var >= 0).all()
    torch.testing.assert_close(merged.var.to(F64), torch.zeros(2, dtype=F64), rtol=0, atol=1e-30)


def test_a_large_offset_does_not_destroy_the_variance() -> None:
    """E[x^2] - E[x]^2 would lose every digit here: (1e8)^2 has a spacing of 2 in float64, the variance is 4."""
    small = data(0, 400)
    shifted = small + 1e8  # spacing of float64 at 1e8: 1.5e-8
    merged = merge_moments(moments_of(shifted[:100]), moments_of(shifted[100:]))
    assert float(merged.var) == pytest.approx(float(small.var(correction=0)), rel=1e-6)


def test_float32_batches_are_summed_without_the_rounding_of_float32() -> None:
    """2^20 and 2^20 + 1/8 (neighbours in float32), 3 to 1: mean 2^20 + 1/32 and variance 3/16 / 64, neither rounded."""
    batch = torch.tensor([2.0**20, 2.0**20, 2.0**20, 2.0**20 + 0.125]).repeat(64)
    merged = merge_moments(moments_of(batch[:96]), moments_of(batch[96:]))
    assert float(merged.mean) == pytest.approx(2.0**20 + 1 / 32, abs=1e-8)
    assert float(merged.var) == pytest.approx(3 / 1024, rel=1e-6)


def test_the_mean_moves_by_the_share_of_the_new_samples() -> None:
    """A million samples at 0, then one at 1: the mean becomes 1 / (10^6 + 1)."""
    old = Moments(torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64), torch.tensor(1e6, dtype=F64))
    merged = merge_moments(old, moments_of(torch.ones(1, 1, dtype=F64)))
    assert float(merged.mean) == pytest.approx(1.0 / (1e6 + 1.0), rel=1e-9)


def test_counts_beyond_float32_integers_still_grow() -> None:
    """2^24 + 1 is no float32 number: a long run must not stop counting its samples when fed float32 batches."""
    start = Moments(torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64), torch.tensor(2.0**24, dtype=F64))
    merged = start
    for _ in range(3):
        merged = merge_moments(merged, moments_of(torch.zeros(1, 1)))
    assert float(merged.count) == 2.0**24 + 3.0


def test_inputs_are_not_modified() -> None:
    batch = data(0, 10, 3)
    copy = batch.clone()
    a, b = moments_of(batch[:4]), moments_of(batch[4:])
    before = [field.clone() for field in (*a, *b)]
    merge_moments(a, b)
    assert torch.equal(batch, copy)
    assert all(torch.equal(field, old) for field, old in zip((*a, *b), before, strict=True))


def test_non_contiguous_batches_give_the_same_moments() -> None:
    batch = data(0, 10, 4)
    assert_same_moments(moments_of(batch.T.contiguous().T), moments_of(batch))
    assert_same_moments(moments_of(batch.repeat_interleave(2, dim=0)[::2]), moments_of(batch))
