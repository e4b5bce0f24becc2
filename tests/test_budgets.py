"""A budget that is shared among groups of parameters."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ird_search.budgets import REST, Budgets
from ird_search.errors import UsageError
from ird_search.pair import Pair, Ranges
from ird_search.parameters import ParameterSpace
from ird_search.selection import ranks
from ird_search.selector import Selector
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
    mask = Selector(grouped()).fish(fisher, torch.arange(16), 12)
    assert tuple(grouped().counts(mask.coords).values()) == grouped().shares(12)


# --- bounds for each tensor -----------------------------------------------------------------------


def greedy(scores: torch.Tensor, k: int, floor: float, ceiling: float | None) -> set[int]:
    """By the definition, one entry at a time, in one group."""
    share = {n: (SPACE.span(n).stop - SPACE.span(n).start) / 30 for n in SPACE.names}
    owner = {j: n for n in SPACE.names for j in range(30)[SPACE.span(n)]}
    ranked = sorted((j for j in range(30) if scores[j] > 0), key=lambda j: (-float(scores[j]), j))
    taken: list[int] = []
    for name in SPACE.names:
        least = math.floor(floor * k * share[name])
        taken += [j for j in ranked if owner[j] == name][:least]
    for bounded in (True, False):
        for j in ranked:
            most = 99.0 if ceiling is None or not bounded else ceiling * k * share[owner[j]]
            own = sum(owner[i] == owner[j] for i in taken)
            if j not in taken and len(taken) < k and own < math.ceil(most - 1e-9):
                taken.append(j)
    return set(taken)


@given(
    st.integers(0, 99),
    st.integers(0, 30),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([None, 1.0, 1.5, 4.0]),
)
def test_floors_and_ceilings_by_the_definition(
    seed: int, k: int, floor: float, ceiling: float | None
) -> None:
    scores = torch.rand(30, generator=torch.Generator().manual_seed(seed)) ** 4
    scores[scores < 0.001] = 0
    budgets = Budgets.of(SPACE, ())
    found = budgets.ranks(scores, None, 0, k, floor=floor, ceiling=ceiling).tolist()
    assert found == sorted(found)
    assert set(found) == greedy(scores, k, floor, ceiling)
    assert len(found) == min(k, int((scores > 0).sum()))


def test_with_both_bounds_at_one_every_tensor_has_the_same_density() -> None:
    space = ParameterSpace(("a", "b", "c"), ((10, 10), (20, 10), (700,)))
    scores = torch.rand(1000) + torch.arange(1000)
    for k in (10, 50, 500):
        found = Budgets.of(space, ()).ranks(scores, None, 0, k, floor=1.0, ceiling=1.0)
        counts = [i.numel() for i in space.localize(found).values()]
        assert counts == [k // 10, k // 5, k * 7 // 10]


def test_what_is_passed_over_is_passed_over_within_the_bounds() -> None:
    scores, budgets = torch.arange(30.0) + 1, Budgets.of(SPACE, ())
    first = budgets.ranks(scores, None, 0, 6, ceiling=1.0)
    second = budgets.ranks(scores, None, 6, 6, ceiling=1.0)
    rest = scores.clone()
    rest[first] = 0
    assert torch.equal(second, budgets.ranks(rest, None, 0, 6, ceiling=1.0))
    assert not set(first.tolist()) & set(second.tolist())


def test_bounds_hold_within_each_group_and_in_an_open_range() -> None:
    scores = torch.rand(20, generator=torch.Generator().manual_seed(3)) + 0.1
    is_open = torch.arange(0, 30)[torch.arange(30) % 3 != 0]
    budgets = grouped()
    found = is_open[budgets.ranks(scores, is_open, 0, 9, ceiling=1.0)]
    assert tuple(budgets.counts(found).values()) == budgets.shares(9)
