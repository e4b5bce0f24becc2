"""The density-score front, ties, and which pair is taken."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ird_search.candidate import ProxyScore, Trial
from ird_search.front import best_of, front
from ird_search.mask import SparseMask
from ird_search.pair import Pair, Scored
from ird_search.parameters import ParameterSpace

SPACE = ParameterSpace(("w",), ((1000,),))


def pair(
    count: int,
    score: float,
    losses: list[float] | None = None,
    *,
    short: bool = False,
    ok: bool = True,
) -> Scored:
    mask = SparseMask(SPACE, torch.arange(count))
    told = None if losses is None else torch.tensor(losses)
    trial = Trial(0.01, 0, score, score, {}, 0.0, "" if ok else "it diverged", losses=told)
    return Scored(
        "m", Pair(torch.arange(4), None, mask.coords), mask, ProxyScore(trial, (trial,), short)
    )


def noisy(mean: float, seed: int, spread: float = 1.0) -> list[float]:
    drawn = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    return (mean + spread * (drawn - drawn.mean())).tolist()


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_the_front_by_brute_force(drawn: list[tuple[int, int]]) -> None:
    scored = [pair(count, score / 10) for count, score in drawn]
    found = {(s.mask.count, s.proxy.score) for s in front(scored)}
    expected = {
        (c, s / 10)
        for c, s in drawn
        if not any((d <= c and t < s) or (d < c and t <= s) for d, t in drawn)
    }
    assert found == expected


def test_failed_and_short_proxies_are_on_no_front() -> None:
    scored = [pair(2, 0.1, ok=False), pair(3, 0.2, short=True), pair(4, 0.5)]
    assert front(scored) == scored[2:]
    assert best_of(scored) is scored[2]


def test_the_best_score_wins_where_nothing_is_tied() -> None:
    scored = [pair(5, 0.5), pair(9, 0.4), pair(7, 0.45)]
    assert best_of(scored) is scored[1]


def test_what_a_paired_test_cannot_tell_apart_goes_to_fewer_parameters() -> None:
    lead = pair(9, 0.40, noisy(0.40, 1))
    tied, worse = pair(5, 0.41, noisy(0.41, 2)), pair(2, 0.9, noisy(0.9, 3))
    for order in ([lead, tied, worse], [worse, tied, lead]):
        assert best_of(order) is tied
    clear = pair(5, 0.41, [x + 0.01 for x in noisy(0.40, 1)])  # worse on every sample alike
    assert best_of([lead, clear]) is lead


def test_equal_sizes_that_are_tied_go_to_the_lower_score() -> None:
    scored = [pair(5, 0.41, noisy(0.41, 2)), pair(5, 0.40, noisy(0.40, 1))]
    assert best_of(scored) is scored[1]


def test_the_smallest_within_a_tolerance() -> None:
    scored = [pair(9, 0.40), pair(5, 0.42), pair(2, 0.47)]
    for tolerance, count in ((0.0, 9), (0.02 + 1e-9, 5), (0.1, 2)):
        assert best_of(scored, pick="smallest", tolerance=tolerance).mask.count == count
    by_test = [
        pair(9, 0.40, noisy(0.40, 1)),
        pair(2, 0.45, noisy(0.45, 2)),
        pair(1, 2.0, noisy(2, 3)),
    ]
    assert best_of(by_test, pick="smallest").mask.count == 2


@pytest.mark.parametrize("bend", [1, 3, 5])
def test_the_knee_is_where_the_front_bends(bend: int) -> None:
    """Two straight lines in log density: steep before the bend, flat behind it."""
    sizes = [2**i for i in range(8)]
    scores = [1.0 - 0.1 * min(i, bend) - 0.001 * max(0, i - bend) for i in range(8)]
    scored = [pair(n, s) for n, s in zip(sizes, scores, strict=True)]
    assert best_of(scored, pick="knee").mask.count == 2**bend
    assert math.isclose(best_of(scored[:2], pick="knee").proxy.score, scores[1])


def test_a_failed_pair_is_taken_only_where_all_failed() -> None:
    scored = [pair(3, 0.0, ok=False), pair(5, 9.0)]
    assert best_of(scored) is scored[1] and best_of(scored[:1]) is scored[0]


def test_pairs_of_unlike_budgets_are_never_tied() -> None:
    long, short = pair(5, 0.4), pair(5, 0.4, short=True)
    assert (
        long.tied(pair(6, 0.4)) and not long.tied(short) and not long.tied(pair(5, 0.4, ok=False))
    )


def test_a_front_that_bends_nowhere_has_its_best_score_for_a_knee() -> None:
    """In log density the line from 1 to 0.1 is straight, or bulges."""
    for middle in (0.55, 0.9):
        scored = [pair(10, 1.0), pair(40, middle), pair(160, 0.1)]
        assert best_of(scored, pick="knee").mask.count == 160
