"""Row rules: equal to a slow reference, exact counts whatever the ties."""

from __future__ import annotations

import math
from collections import Counter
from statistics import median

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ird_search.errors import UsageError
from ird_search.rows import choose_rows
from ird_search.selection import top_k

SCORE = st.one_of(
    st.sampled_from([-math.inf, 0.0, -0.0, 1.0, 2.0, 5.0, 100.0, math.inf]),
    st.floats(0, 2.0**100, width=32),
)
"""Ties are likely, and outliers, and samples without a finite gradient."""
ROWS = st.lists(st.tuples(SCORE, st.sampled_from([-1, 0, 1, 2, 7])), min_size=1, max_size=40)
CAP = st.one_of(st.none(), st.sampled_from([1.0, 1.5, 3.0, 50.0]))


def allowed(scores: list[float], n: int, cap: float | None) -> set[int]:
    """The rows to choose from, told one by one."""
    finite = [s for s in scores if math.isfinite(s)]
    positive = [s for s in finite if s > 0]
    limit = cap * median(positive) if cap is not None and positive else math.inf
    rows = {i for i, s in enumerate(scores) if -math.inf < s <= limit}
    while len(rows) < n:
        others = [i for i in range(len(scores)) if i not in rows]
        rows.add(min(others, key=lambda i: (scores[i] == -math.inf, scores[i], i)))
    return rows


def reference(
    scores: list[float], n: int, labels: list[int] | None, cap: float | None
) -> list[int]:
    """One row after another: to the class that has the fewest, its best."""
    open_, chosen = allowed(scores, n, cap), list[int]()
    classes = labels or [0] * len(scores)
    for _ in range(n):
        left = [i for i in open_ if i not in chosen]
        have = Counter(classes[i] for i in chosen)
        best = [  # of each class that still has rows
            min((i for i in left if classes[i] == c), key=lambda i: (-scores[i], i))
            for c in {classes[i] for i in left}
        ]
        chosen.append(min(best, key=lambda i: (have[classes[i]], -scores[i], classes[i])))
    return sorted(chosen)


@settings(max_examples=120, deadline=None)
@given(ROWS, CAP, st.booleans(), st.data())
def test_rows_equal_the_reference(
    rows: list[tuple[float, int]], cap: float | None, balanced: bool, data: st.DataObject
) -> None:
    n = data.draw(st.integers(0, len(rows)))
    scores, labels = [s for s, _ in rows], [c for _, c in rows]
    ids = torch.tensor(labels) if balanced else None
    found = choose_rows(torch.tensor(scores), n, labels=ids, cap=cap)
    assert found.dtype == torch.int64
    assert found.tolist() == reference(scores, n, labels if balanced else None, cap)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.data())
def test_without_rules_it_is_top_k(
    rows: list[tuple[float, int]], dtype: torch.dtype, data: st.DataObject
) -> None:
    n = data.draw(st.integers(0, len(rows)))
    scores = torch.tensor([s for s, _ in rows], dtype=torch.float64).to(dtype)
    wanted = top_k(scores, n)
    assert torch.equal(choose_rows(scores, n), wanted)
    assert torch.equal(choose_rows(scores, n, cap=math.inf), wanted)
    one_class = torch.full((len(rows),), 3)
    assert torch.equal(choose_rows(scores, n, labels=one_class), wanted)


@settings(max_examples=60, deadline=None)
@given(ROWS, CAP, st.data())
def test_no_class_has_two_rows_more_than_one_that_could_have_more(
    rows: list[tuple[float, int]], cap: float | None, data: st.DataObject
) -> None:
    n = data.draw(st.integers(0, len(rows)))
    scores, labels = torch.tensor([s for s, _ in rows]), torch.tensor([c for _, c in rows])
    chosen = choose_rows(scores, n, labels=labels, cap=cap).tolist()
    assert len(set(chosen)) == n
    has = Counter(labels[chosen].tolist())
    left = allowed(scores.tolist(), n, cap) - set(chosen)
    for label in {int(labels[i]) for i in left}:
        assert max(has.values(), default=0) <= has[label] + 1


def test_the_odd_row_goes_to_the_higher_next_score_then_to_the_lower_class() -> None:
    labels = torch.tensor([4, 2, 4, 2, 4, 2])
    higher = torch.tensor([9.0, 9.0, 3.0, 2.0, 1.0, 8.0])
    assert choose_rows(higher, 3, labels=labels).tolist() == [0, 1, 5]
    assert choose_rows(higher - 6 * (labels == 2), 3, labels=labels).tolist() == [0, 1, 2]
    assert choose_rows(torch.ones(6), 3, labels=labels).tolist() == [0, 1, 3]


def test_what_a_small_class_lacks_is_shared_by_the_others() -> None:
    labels = torch.tensor([0, 1, 1, 1, 1, 2, 2, 2, 2])
    scores = torch.tensor([0.1, 9, 8, 7, 6, 5, 4, 3, 2])
    counts = [
        labels[choose_rows(scores, n, labels=labels)].bincount(minlength=3).tolist()
        for n in (1, 3, 5, 6, 9)
    ]
    assert counts == [[0, 1, 0], [1, 1, 1], [1, 2, 2], [1, 3, 2], [1, 4, 4]]


def test_outliers_are_taken_back_the_least_first_and_excluded_rows_last() -> None:
    # The median of the finite scores is 3: 31 and 70 are above ten times it, 30 is not.
    scores = torch.tensor([70.0, 2.0, -math.inf, 3.0, 30.0, 1.0, 2.5, 31.0, 0.5, 4.0])
    assert choose_rows(scores, 3).tolist() == [0, 4, 7]
    assert choose_rows(scores, 3, cap=10).tolist() == [3, 4, 9]
    assert choose_rows(scores, 7, cap=10).tolist() == [1, 3, 4, 5, 6, 8, 9]
    assert choose_rows(scores, 8, cap=10).tolist() == [1, 3, 4, 5, 6, 7, 8, 9]
    assert choose_rows(scores, 9, cap=10).tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert choose_rows(scores, 10, cap=10).tolist() == list(range(10))


def test_order_and_names_of_classes_do_not_matter() -> None:
    scores = torch.randperm(200).double()  # without ties
    labels = torch.randint(0, 5, (200,))
    wanted = choose_rows(scores, 71, labels=labels, cap=1.5)
    order = torch.randperm(200)
    turned = choose_rows(scores[order], 71, labels=labels[order], cap=1.5)
    assert torch.equal(order[turned].sort().values, wanted)
    renamed = torch.randperm(5)[labels] - 2
    assert torch.equal(choose_rows(scores, 71, labels=renamed, cap=1.5), wanted)
    assert torch.equal(choose_rows(scores * 2.0**-30, 71, labels=labels, cap=1.5), wanted)


def test_the_chosen_rows_grow_with_their_number() -> None:
    scores, labels = torch.randint(0, 20, (120,)).double(), torch.randint(0, 3, (120,))
    for cap in (None, 1.2):
        few = choose_rows(scores, 0, labels=labels, cap=cap)
        for n in range(1, 121):
            more = choose_rows(scores, n, labels=labels, cap=cap)
            assert set(few.tolist()) < set(more.tolist())
            few = more


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(UsageError) as e:
        choose_rows(torch.tensor([1.0, math.nan]), 3, labels=torch.tensor([0]))
    assert e.value.problems == (
        "Cannot take 3 of 2 rows.",
        "Scores must not be NaN.",
        "1 labels came with 2 scores; pass one class id for each row, or none.",
    )
    with pytest.raises(UsageError, match="Cannot take -1 of 2 rows"):
        choose_rows(torch.zeros(2), -1)
