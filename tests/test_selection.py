"""Selection rules: equal to brute force, and exact counts whatever the ties."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ird_search.errors import UsageError
from ird_search.selection import (
    CHUNK,
    decreasing_range,
    random_subset,
    top_k,
    top_positive,
)

TINY, HUGE = 2.0**-149, float(np.finfo(np.float32).max)

FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, TINY, -TINY, HUGE]),
    st.floats(width=32, allow_nan=False),
)
"""Ties are likely: a few values come again and again."""

SCORES = st.lists(FLOATS, min_size=1, max_size=60)


def brute_force(scores: list[float], k: int) -> list[int]:
    """The k largest, the lower index first among equals."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


@settings(max_examples=200, deadline=None)
@given(SCORES, st.data())
def test_top_k_equals_brute_force(scores: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(scores)))
    assert top_k(torch.tensor(scores), k).tolist() == brute_force(scores, k)


@settings(max_examples=50, deadline=None)
@given(SCORES, st.data())
def test_wider_scores_are_not_rounded(scores: list[float], data: st.DataObject) -> None:
    # 1 and 1 + 1e-12 are one float32 and two float64.
    k = data.draw(st.integers(0, len(scores)))
    wide = [s + (1e-12 * i if abs(s) <= 1 else 0) for i, s in enumerate(scores)]
    assert top_k(torch.tensor(wide, dtype=torch.float64), k).tolist() == brute_force(wide, k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.5, math.inf, -math.inf])
def test_all_equal_scores_give_the_first_indices(value: float, dtype: torch.dtype) -> None:
    scores = torch.full((10,), value, dtype=dtype)
    for k in (0, 1, 7, 10):
        assert top_k(scores, k).tolist() == list(range(k))


def test_zero_and_minus_zero_tie() -> None:
    assert top_k(torch.tensor([-0.0, 0.0, -0.0, 0.0]), 2).tolist() == [0, 1]
    assert top_k(torch.tensor([-1.0, -0.0, 0.0, 1.0]), 2).tolist() == [1, 3]


def test_counts_are_exact_beyond_one_chunk() -> None:
    # Few distinct values over three chunks of the histogram.
    scores = (torch.arange(2 * CHUNK + 17) * 7919 % 5).float()
    for k in (1, CHUNK, CHUNK + 1, 2 * CHUNK + 17):
        chosen = top_k(scores, k)
        assert chosen.numel() == k
        assert bool((chosen[1:] > chosen[:-1]).all())
        best = scores.sort(descending=True, stable=True)
        assert torch.equal(chosen, best.indices[:k].sort().values)


def test_scale_and_strides_do_not_matter() -> None:
    scores = torch.rand(1000)
    wanted = top_k(scores, 37)
    assert torch.equal(top_k(scores * 1e-30, 37), wanted)
    assert torch.equal(top_k(torch.stack([scores, -scores], 1)[:, 0], 37), wanted)
    order = torch.randperm(1000)
    assert torch.equal(order[top_k(scores[order], 37)].sort().values, wanted)


def test_tops_are_nested() -> None:
    scores = torch.randint(0, 20, (500,)).float()
    for k in range(0, 500, 50):
        assert set(top_k(scores, k).tolist()) <= set(top_k(scores, k + 50).tolist())


@pytest.mark.parametrize("k", [-1, 4])
def test_more_than_there_are_cannot_be_taken(k: int) -> None:
    with pytest.raises(UsageError, match=f"Cannot take {k} of 3 scores."):
        top_k(torch.zeros(3), k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UsageError, match="must not be NaN"):
        top_k(torch.tensor([1.0, math.nan, 0.0], dtype=dtype), 1)


def test_top_positive_never_fills_up_with_zeros() -> None:
    scores = torch.tensor([0.0, 2.0, -1.0, 0.0, 1e-45, 3.0])
    assert top_positive(scores, 2).tolist() == [1, 5]
    assert top_positive(scores, 6).tolist() == [1, 4, 5]
    assert top_positive(torch.zeros(4), 3).tolist() == []


@given(st.integers(1, 10**9), st.integers(1, 10**9), st.integers(1, 12))
def test_decreasing_range(a: int, b: int, rounds: int) -> None:
    start, stop = max(a, b), min(a, b)
    sizes = decreasing_range(start, stop, rounds)
    assert (sizes[0], sizes[-1]) == (start, stop)
    assert all(x > y for x, y in pairwise(sizes))
    assert len(sizes) <= rounds + 1
    if len(sizes) == rounds + 1:  # nothing fell together: each size is its formula, rounded
        for t, n in enumerate(sizes):
            assert n == pytest.approx(start * (stop / start) ** (t / rounds), abs=0.51, rel=1e-9)


@given(st.integers(0, 200), st.data(), st.integers(0, 2**32))
def test_random_subset(total: int, data: st.DataObject, seed: int) -> None:
    k = data.draw(st.integers(0, total))
    drawn = random_subset(total, k, seed=seed).tolist()
    assert len(drawn) == k
    assert drawn == sorted(set(drawn))
    assert not drawn or (drawn[0] >= 0 and drawn[-1] < total)
    assert drawn == random_subset(total, k, seed=seed).tolist()


def test_random_subset_is_uniform() -> None:
    counts = np.zeros(20)
    for seed in range(2000):
        counts[random_subset(20, 5, seed=seed)] += 1
    # A binomial count of 2000 draws at 1/4 has a standard deviation of 19.4.
    assert np.abs(counts - 500).max() < 5 * 19.4


@pytest.mark.parametrize("k", [-1, 4])
def test_a_subset_larger_than_the_whole_is_refused(k: int) -> None:
    with pytest.raises(UsageError, match=f"Cannot draw {k} of 3."):
        random_subset(3, k, seed=0)


@pytest.mark.gpu
def test_top_k_on_cuda_equals_the_cpu(cuda: str) -> None:
    scores = torch.randint(0, 50, (3 * CHUNK,)).float()
    for k in (0, 1, 1000, 2 * CHUNK):
        assert torch.equal(top_k(scores.to(cuda), k), top_k(scores, k))
