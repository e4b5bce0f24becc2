"""Units: whole rows, columns and blocks, against loops over the entries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ird_search.budgets import Budgets
from ird_search.config import Granularity
from ird_search.errors import ModelError
from ird_search.granularity import Units
from ird_search.parameters import ParameterSpace
from ird_search.reading import Reading
from ird_search.selector import Selector
from tests.toy import DenseFisher

SPACE = ParameterSpace(("conv", "bias", "w"), ((3, 2, 2, 2), (5,), (4, 6)))
GRANULARITIES: tuple[Granularity, ...] = ("row", "column", "block")


def unit_of(j: int, granularity: Granularity, block: int) -> tuple[object, ...]:
    """By the definition: which tensor, and where in it."""
    if j < 24:
        o, c = j // 8, j // 4 % 2
        return ("conv", *spot(o, c, granularity, block))
    if j < 29:
        return ("bias", j)
    o, c = (j - 29) // 6, (j - 29) % 6
    return ("w", *spot(o, c, granularity, block))


def spot(row: int, column: int, granularity: Granularity, block: int) -> tuple[int, ...]:
    if granularity == "block":
        return row // block, column // block
    return (row,) if granularity == "row" else (column,)


def partition(granularity: Granularity, block: int, is_open: list[int]) -> dict[object, list[int]]:
    """The open coordinates of each unit."""
    found: dict[object, list[int]] = {}
    for j in is_open:
        found.setdefault(unit_of(j, granularity, block), []).append(j)
    return found


def scores_of(n: int, seed: int) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


@given(st.sampled_from(GRANULARITIES), st.integers(1, 4), st.integers(0, 99), st.booleans())
@settings(max_examples=40, deadline=None)
def test_scores_are_means_over_units(
    granularity: Granularity, block: int, seed: int, everything: bool
) -> None:
    units = Units(SPACE, granularity, block)
    is_open = None if everything else (scores_of(53, seed + 1) > 0.4).nonzero().flatten()
    coords = list(range(53)) if is_open is None else is_open.tolist()
    scores = scores_of(len(coords), seed)
    found = units.smoothed(scores, is_open)
    for members in partition(granularity, block, coords).values():
        at = [coords.index(j) for j in members]
        assert torch.allclose(found[at], scores[at].mean().expand(len(at)))


@given(st.sampled_from(GRANULARITIES), st.integers(1, 4), st.integers(0, 99), st.integers(0, 53))
@settings(max_examples=40, deadline=None)
def test_a_mask_holds_whole_units_of_the_best_and_never_more_than_the_budget(
    granularity: Granularity, block: int, seed: int, k: int
) -> None:
    units = Units(SPACE, granularity, block)
    scores = units.smoothed(scores_of(53, seed), None)
    chosen = set(units.whole(Budgets.of(SPACE, ()).ranks(scores, None, 0, k), None).tolist())
    parts = partition(granularity, block, list(range(53)))
    ranked = sorted(parts.values(), key=lambda members: -float(scores[members[0]]))
    expected, left = set[int](), k
    for members in ranked:  # the ranking is cut where the budget ends
        if len(members) > left:
            break
        expected |= set(members)
        left -= len(members)
    assert chosen == expected and len(chosen) <= k


def test_single_entries_are_left_as_they_are() -> None:
    units, scores, chosen = Units(SPACE), scores_of(53, 0), torch.tensor([3, 50])
    assert units.smoothed(scores, None) is scores and units.whole(chosen, None) is chosen


def test_a_budget_below_one_unit_is_told() -> None:
    fisher = DenseFisher(torch.ones(2, 24))
    fisher.space = ParameterSpace(("w",), ((4, 6),))
    selector = Selector(Budgets.of(fisher.space, ()), Units(fisher.space, "row"))
    whole = selector.mask(fisher, torch.arange(2), 13, Reading())  # type: ignore[arg-type]
    assert whole.coords.tolist() == list(range(12))
    empty = selector.mask(fisher, torch.arange(2), 5, Reading())  # type: ignore[arg-type]
    assert empty.count == 0
    error = selector.nothing(torch.ones(24), 5)
    assert isinstance(error, ModelError)
    assert "The best row has more entries than the budget of 5" in str(error)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_narrowing_keeps_units_whole(granularity: Granularity) -> None:
    """What is open after a round is a union of units, so the next round's are whole, too."""
    units = Units(SPACE, granularity, 2)
    budgets = Budgets.of(SPACE, ())
    is_open = None
    for k in (40, 25, 14):
        n = 53 if is_open is None else is_open.numel()
        scores = units.smoothed(scores_of(n, k), is_open)
        at = units.whole(budgets.ranks(scores, is_open, 0, k), is_open)
        is_open = at if is_open is None else is_open[at]
        everything = partition(granularity, 2, list(range(53)))
        for members in partition(granularity, 2, is_open.tolist()).values():
            assert members == everything[unit_of(members[0], granularity, 2)]
