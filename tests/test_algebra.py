"""Many masks, masks of different spaces, and how much two masks share: all as with sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ird_search.algebra import disjoint, intersection, union
from ird_search.errors import UsageError
from ird_search.mask import SparseMask, in_at_least
from ird_search.overlap import Counts
from ird_search.parameters import ParameterSpace
from ird_search.spaces import common_space

SHAPES = {"w": (2, 3), "b": (2,), "v": (3,), "up": (4,)}
Entry = tuple[str, int]
"""A parameter by its tensor and flat index: the same in every space."""

MODEL = ParameterSpace(tuple(SHAPES), tuple(SHAPES.values()))
ENTRIES = [
    (name, i) for name in SHAPES for i in range(MODEL.span(name).stop - MODEL.span(name).start)
]


def mask_of(entries: Iterable[Entry], names: Sequence[str] = MODEL.names) -> SparseMask:
    space = ParameterSpace(tuple(names), tuple(SHAPES[name] for name in names))
    coords = sorted(space.span(name).start + i for name, i in entries)
    return SparseMask(space, torch.tensor(coords, dtype=torch.int64))


def entries_of(mask: SparseMask) -> set[Entry]:
    return {(name, i) for name, index in mask.indices.items() for i in index.tolist()}


@st.composite
def masks(draw: st.DrawFn) -> SparseMask:
    """Any choice within any tensors of the model, in any order; "w" is always a candidate."""
    names = draw(st.permutations(["w", *draw(st.sets(st.sampled_from(["b", "v", "up"])))]))
    return mask_of(draw(st.sets(st.sampled_from([e for e in ENTRIES if e[0] in names]))), names)


@given(masks(), masks(), masks())
def test_masks_of_different_candidates_combine_as_sets(
    a: SparseMask, b: SparseMask, c: SparseMask
) -> None:
    x, y = entries_of(a), entries_of(b)
    assert entries_of(a | b) == x | y
    assert entries_of(a & b) == x & y
    assert entries_of(a - b) == x - y
    assert entries_of(a ^ b) == x ^ y
    assert set((a & b).space.names) == {*a.space.names, *b.space.names}
    # The laws hold of the masks as values: their spaces and digests, too.
    assert a | b == b | a and a & b == b & a and a ^ b == b ^ a
    assert (a | b) | c == a | (b | c) == union([c, a, b])
    assert (a & b) & c == a & (b & c) == intersection([c, a, b])
    assert a & (b | c) == (a & b) | (a & c)
    assert a - (b | c) == (a - b) & (a - c)
    assert (a | b).digest == (b | a).digest


@given(st.lists(masks(), min_size=1, max_size=4))
def test_votes_are_counted(given_masks: list[SparseMask]) -> None:
    sets = [entries_of(mask) for mask in given_masks]
    for least in range(1, len(given_masks) + 1):
        wanted = {e for e in ENTRIES if sum(e in s for s in sets) >= least}
        assert entries_of(in_at_least(least, given_masks)) == wanted


@pytest.mark.parametrize("least", [-1, 0, 3])
def test_votes_that_none_or_all_entries_have_are_refused(least: int) -> None:
    two = [mask_of([("w", 0)]), mask_of([("w", 1)])]
    with pytest.raises(UsageError, match=rf"least is {least} for 2 masks; it must be from 1 "):
        in_at_least(least, two)


def test_the_common_space_keeps_an_order_that_all_share_and_else_sorts_by_name() -> None:
    some, all_of_them = mask_of([("b", 0)], ["w", "b"]), mask_of([("b", 1)])
    assert union([some, some]).space.names == ("w", "b")
    assert union([some, all_of_them]).space.names == ("b", "up", "v", "w")
    assert union([mask_of([], ["w", "b"]), mask_of([], ["b", "w"])]).space.names == ("b", "w")


def test_masks_that_share_no_tensor_combine_when_they_are_lifted_first() -> None:
    a, b = mask_of([("w", 1)], ["w"]), mask_of([("b", 1)], ["b"])
    with pytest.raises(UsageError, match=r"it chooses among w, they among b\. If all are of one"):
        a | b
    with pytest.raises(UsageError, match="shares no tensor"):
        common_space([a.space, ParameterSpace((), ())])
    both = a.lifted(MODEL) | b.lifted(MODEL)
    assert both.space == MODEL
    assert entries_of(both) == {("w", 1), ("b", 1)}


def test_no_mask_at_all_is_refused() -> None:
    for combine in (union, intersection, disjoint):
        with pytest.raises(UsageError, match="give at least one mask"):
            combine([])


@given(masks(), masks())
def test_an_overlap_counts_what_sets_hold(a: SparseMask, b: SparseMask) -> None:
    x, y = entries_of(a), entries_of(b)
    overlap = a.overlap(b)
    for name, counts in overlap.tensors.items():
        xs, ys = ({e for e in s if e[0] == name} for s in (x, y))
        whole = len([e for e in ENTRIES if e[0] == name])
        assert counts == Counts(whole, len(xs & ys), len(xs - ys), len(ys - xs))
        assert counts.jaccard == (len(xs & ys) / len(xs | ys) if xs | ys else 1.0)
    assert overlap.total == Counts((a | b).space.numel, len(x & y), len(x - y), len(y - x))
    assert overlap.total.jaccard == a.jaccard(b) == b.jaccard(a)
    assert set(overlap.tensors) == {*a.space.names, *b.space.names}


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 3), (4, 2), (0, 2), (5, 5), (0, 0)])
def test_chance_is_the_mean_over_all_masks_of_these_sizes(sizes: tuple[int, int]) -> None:
    every = [[set(c) for c in combinations(range(5), size)] for size in sizes]
    shared = mean(len(x & y) for x in every[0] for y in every[1])
    counts = Counts(5, 0, *sizes)
    assert counts.chance == pytest.approx(shared)
    union_size = sizes[0] + sizes[1] - shared
    assert counts.by_chance == pytest.approx(shared / union_size if union_size else 1.0)


def test_chance_within_tensors_is_told_from_chance_over_all() -> None:
    # Both choose a half of "b" and nothing else: alike in tensors, not in entries.
    overlap = mask_of([("b", 0)]).overlap(mask_of([("b", 1)]))
    assert overlap.total.by_chance == pytest.approx((1 / 15) / (2 - 1 / 15))
    assert overlap.by_chance_within == pytest.approx(0.5 / 1.5)
    assert overlap.total.jaccard == 0.0
    same = mask_of(ENTRIES[:3]).overlap(mask_of(ENTRIES[:3]))
    assert same.total.jaccard == 1.0 > same.by_chance_within > same.total.by_chance


def test_an_overlap_prints_the_largest_tensors() -> None:
    overlap = mask_of(ENTRIES[:8]).overlap(mask_of(ENTRIES[4:9]))
    lines = overlap.describe(shown=2).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["all", "w", "b"]
    assert lines[2].split()[1:5] == ["6", "2", "4", "0"]
    assert lines[4] == "… and 1 more"
    assert len({len(line) for line in lines[:4]}) == 1
    assert lines[5] == "Random masks with these counts in each tensor: Jaccard 0.444."


def dealt(
    given_masks: Sequence[SparseMask], score: Callable[[int, Entry], float]
) -> dict[Entry, set[int]]:
    """Who may get each entry: those of its claimants that score it highest."""
    sets = [entries_of(mask) for mask in given_masks]
    allowed = {}
    for entry in ENTRIES:
        claims = {task: score(task, entry) for task, s in enumerate(sets) if entry in s}
        allowed[entry] = {t for t, value in claims.items() if value == max(claims.values())}
    return allowed


@given(st.lists(masks(), min_size=1, max_size=4), st.booleans(), st.integers(0, 99))
def test_disjoint_masks_share_nothing_and_keep_the_union(
    given_masks: list[SparseMask], scored: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [  # of four values only, so that many are equal
        {n: torch.randint(4, s, generator=generator).float() for n, s in SHAPES.items()}
        for _ in given_masks
    ]

    def score(task: int, entry: Entry) -> float:
        return scores[task][entry[0]].flatten()[entry[1]].item() if scored else 0.0

    parts = disjoint(given_masks, scores if scored else None)
    owners = [entries_of(part) for part in parts]
    assert all(not a & b for a, b in combinations(owners, 2))
    assert union(parts) == union(given_masks)
    allowed = dealt(given_masks, score)
    assert all(task in allowed[entry] for task, own in enumerate(owners) for entry in own)
    # Of the entries with the same claimants, each of them gets as many, to within one.
    for kind in {frozenset(tasks) for tasks in allowed.values() if len(tasks) > 1}:
        got = [sum(allowed[entry] == kind for entry in owners[task]) for task in kind]
        assert max(got) - min(got) <= 1
    assert parts == disjoint(given_masks, scores if scored else None)


@given(masks(), masks())
def test_two_disjoint_masks_lose_equally_many_to_within_one(a: SparseMask, b: SparseMask) -> None:
    mine, its = disjoint([a, b])
    assert abs((a.count - mine.count) - (b.count - its.count)) <= 1


def test_odd_leftovers_go_to_those_that_have_lost_more() -> None:
    pairs = [("w", 0), ("w", 1), ("w", 2)]  # claimed by two of three each
    a, b, c = mask_of(pairs[:2]), mask_of(pairs[::2]), mask_of(pairs[1:])
    assert [part.count for part in disjoint([a, b, c])] == [1, 1, 1]


def test_scores_are_checked_all_at_once() -> None:
    a, b = mask_of([("w", 1), ("b", 1), ("v", 0)]), mask_of([("w", 1), ("b", 1), ("up", 0)])
    whole = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    partly = {"w": torch.zeros(3, 2)}
    with pytest.raises(UsageError) as e:
        disjoint([a, b], [whole, partly])
    assert len(e.value.problems) == 2  # nobody asks for the scores of uncontested tensors
    assert "The scores of mask 1 have no 'w' of shape [2, 3]." in e.value.problems
    with pytest.raises(UsageError, match="2 masks need a score each; 1 are given"):
        disjoint([a, b], [whole])
    broken = {**whole, "w": torch.full((2, 3), float("nan"))}
    with pytest.raises(UsageError, match="A score is NaN where masks meet"):
        disjoint([a, b], [whole, broken])
    calm = {**whole, "v": broken["w"], "w": torch.tensor([[float("nan"), 1, 0], [0, 0, 0]])}
    assert entries_of(disjoint([a, b], [whole, calm])[1]) >= {("w", 1), ("up", 0)}
