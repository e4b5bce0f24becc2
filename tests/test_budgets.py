"""A budget that is shared among groups of parameters."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ird_search.budgets import REST, Budgets
from ird_search.errors import UsageError
from ird_search.narrowing import fish_mask
from ird_search.parameters import ParameterSpace
from ird_search.search import Pair, Ranges
from ird_search.selection import ranks
from tests.test_search import nominate
from tests.toy import DenseFisher

NAMES = ("x.lora_A.w", "x.lora_B.w", "y.lora_A.w", "y.lora_B.w", "y.magnitude")
SPACE = ParameterSpace(NAMES, ((2, 3), (4,), (5,), (3, 3), (6,)))
"""Thirty parameters: 11 of A, 13 of B, 6 others."""


def grouped() -> Budgets:
    return Budgets.of(SPACE)


def test_the_two_factors_of_lora_are_found_and_the_rest_is_a_group_of_its_own() -> None:
    (a, of_a), (b, of_b), (rest, others) = grouped().groups
    assert "A" in a and "B" in b and rest == REST
    assert of_a == ("x.lora_A.w", "y.lora_A.w") and of_b == ("x.lora_B.w", "y.lora_B.w")
    assert others == ("y.magnitude",) and grouped().sizes == (11, 13, 6)


def test_without_both_factors_there_is_one_budget() -> None:
    only_b = ParameterSpace(NAMES[1:2], SPACE.shapes[1:2])
    for budgets in (Budgets.of(only_b), Budgets.of(SPACE, ())):
        assert [name for name, _ in budgets.groups] == [REST]
        scores = torch.rand(budgets.space.numel)
        assert torch.equal(budgets.ranks(scores, None, 1, 2), ranks(scores, 1, 2))


def test_the_first_pattern_that_matches_wins_and_one_that_never_does_is_an_error() -> None:
    budgets = Budgets.of(SPACE, ["^x", "lora_A", "lora"])
    assert [names for _, names in budgets.groups] == [NAMES[:2], NAMES[2:3], NAMES[3:4], NAMES[4:]]
    with pytest.raises(UsageError, match=r"\^x.*matches no candidate"):
        Budgets.of(SPACE, ["lora", "^x."])


def test_what_is_no_regular_expression_is_told_with_the_reason() -> None:
    with pytest.raises(UsageError) as e:
        Budgets.of(SPACE, ["(", "lora_A", "["])
    assert len(e.value.problems) == 2
    assert "groups pattern '(' is no regular expression: missing )" in str(e.value)
    assert "groups pattern '[' is no regular expression: unterminated" in str(e.value)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=5), st.integers(0, 400))
def test_shares_sum_to_the_budget_stay_near_their_quota_and_never_fall(
    sizes: list[int], k: int
) -> None:
    space = ParameterSpace(tuple(f"t{i}." for i in range(len(sizes))), tuple((n,) for n in sizes))
    budgets = Budgets.of(space, [rf"t{i}\." for i in range(len(sizes))])
    k = min(k, space.numel)
    shares, more = budgets.shares(k), budgets.shares(min(k + 1, space.numel))
    assert sum(shares) == k
    assert all(s <= t for s, t in zip(shares, more, strict=True))
    for share, size in zip(shares, sizes, strict=True):
        assert abs(share - k * size / space.numel) < len(sizes)


@given(st.integers(0, 2**31), st.integers(0, 12), st.integers(0, 12), st.booleans())
def test_each_group_is_ranked_by_itself(seed: int, skip: int, k: int, whole: bool) -> None:
    budgets, generator = grouped(), torch.Generator().manual_seed(seed)
    is_open = None if whole else (torch.rand(30, generator=generator) < 0.7).nonzero().flatten()
    columns = torch.arange(30) if is_open is None else is_open
    scores = torch.rand(columns.numel(), generator=generator)
    chosen = set(columns[budgets.ranks(scores, is_open, skip, k)].tolist())
    for (_, names), skipped, share in zip(
        budgets.groups, budgets.shares(skip), budgets.shares(k), strict=True
    ):
        spans = [SPACE.span(name) for name in names]
        own = [j for j in columns.tolist() if any(s.start <= j < s.stop for s in spans)]
        by_score = sorted(own, key=lambda j: -float(scores[columns.tolist().index(j)]))
        assert chosen & set(own) == set(by_score[skipped : skipped + share])


def test_a_group_without_scores_does_not_give_its_share_away() -> None:
    scores = torch.ones(30)
    for name in ("x.lora_A.w", "y.lora_A.w"):
        scores[SPACE.span(name)] = 0.0
    budgets = grouped()
    coords = budgets.ranks(scores, None, 0, 15)
    shares = budgets.shares(15)
    assert list(budgets.counts(coords).values()) == [0, shares[1], shares[2]]


def test_a_round_of_the_search_keeps_the_shares() -> None:
    fisher = DenseFisher(torch.rand(16, 30, generator=torch.Generator().manual_seed(0)) + 0.01)
    fisher.space = SPACE
    fisher.values[:, SPACE.span("y.lora_B.w")] *= 1e6
    sizes = Ranges((16, 8), (30, 12, 6))
    pair = Pair(torch.arange(16))
    masks = {move: mask for move, _, mask in nominate(fisher, pair, sizes, (r"_A\b", r"_B\b"))}
    budgets = Budgets.of(SPACE, (r"_A\b", r"_B\b"))
    assert set(masks) == {"both", "columns", "window"}
    for mask in masks.values():
        assert tuple(budgets.counts(mask.coords).values()) == budgets.shares(12)
    assert not (masks["columns"] & masks["window"]).count


def test_the_fish_control_has_the_same_shares() -> None:
    fisher = DenseFisher(torch.rand(16, 30, generator=torch.Generator().manual_seed(0)) + 0.01)
    fisher.space = SPACE
    fisher.values[:, SPACE.span("y.lora_B.w")] *= 1e6
    fisher.on = lambda samples: fisher

    mask = fish_mask(fisher, range(16), 12, grouped())
    assert tuple(grouped().counts(mask.coords).values()) == grouped().shares(12)
