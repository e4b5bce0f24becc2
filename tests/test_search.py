"""The loop: hand-written scores drive it, explicit matrices check what it nominates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ird_search.budgets import Budgets
from ird_search.errors import ModelError, NoProxySucceeded
from ird_search.mask import SparseMask
from ird_search.moves import narrowed
from ird_search.pair import Pair, Ranges, Scored
from ird_search.reading import Reading
from ird_search.search import Round, SearchState, advance, search
from ird_search.selector import Selector
from ird_search.strategies import Ladder, Walk, walk
from ird_search.strategies.walk import MOVES
from tests.toy import DenseFisher, Direct, Script, scored


def matrix(rows: int = 16, columns: int = 64, seed: int = 0) -> Tensor:
    """Positive entries without ties."""
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) + 0.01


def nominate(fisher: Any, pair: Pair, sizes: Ranges, groups: tuple[str, ...] = ()) -> Any:
    """All that a walk's narrowing nominates."""
    return list(narrowed(fisher, Selector(Budgets.of(fisher.space, groups)), pair, sizes, MOVES))


def strategy_of(name: str, fisher: Any, *, patience: int = 2, vary: Any = ()) -> Any:
    narrowings: Any = Direct(fisher)
    if name == "ladder":
        return Ladder(narrowings, Reading(), patience=patience)
    return Walk(narrowings, Reading(), vary=vary, patience=patience)


def run(values: Tensor, answer: Any, *, budget: int = 4, rounds: int = 3, **more: Any) -> Any:
    """A search on an explicit F; `answer` maps a mask's coordinates to a score."""
    least = more.pop("min_samples", 2)
    sizes = Ranges.geometric(*values.shape, min_samples=least, budget=budget, rounds=rounds)
    judge = answer if isinstance(answer, Script) else Script(answer)
    settings = {k: more.pop(k) for k in ("patience", "vary") if k in more}
    strategy = strategy_of(more.pop("strategy", "walk"), DenseFisher(values), **settings)
    return search(strategy, judge, sizes, **more)


def shrink_rows(judge: Script, *, patience: int) -> SearchState:
    """A ladder whose columns are at the target at once, with six sizes of rows to come."""
    sizes = Ranges((512, 256, 128, 64, 32, 16, 8), (64, 4))
    return search(strategy_of("ladder", DenseFisher(matrix(512)), patience=patience), judge, sizes)


def test_the_search_ends_when_nothing_new_is_left() -> None:
    state = run(matrix(), lambda coords: 0.5, strategy="ladder", rounds=3, patience=9)
    assert len(state.rounds) == 3 and state.stale == 0


def arbitrary(coords: list[int]) -> float:
    """A number in 0 … 1 that has nothing to do with F."""
    return int(hashlib.sha256(repr(coords).encode()).hexdigest()[:8], 16) / 2**32


def moves(state: SearchState) -> list[str]:
    return [r.moved_to.move for r in state.rounds]


def chosen(pair: Pair) -> set[int]:
    assert pair.columns is not None
    return set(pair.columns.tolist())


def opened(pair: Pair, width: int) -> set[int]:
    return set(range(width)) if pair.open is None else set(pair.open.tolist())


# --- where the scores lead ----------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["both", "columns", "window"])
def test_the_walk_goes_where_the_scores_are_best(wanted: str) -> None:
    numbers: Iterator[float] = iter([])

    def answer(coords: list[int]) -> float:
        return next(numbers)

    fisher: Any = DenseFisher(matrix())
    sizes = Ranges.geometric(16, 64, min_samples=2, budget=4, rounds=3)
    state = SearchState(sizes)
    for _ in range(3):
        found = list(nominate(fisher, state.pair or Pair(torch.arange(16)), sizes))
        numbers = iter([0.1 if move == wanted else 0.2 for move, _, _ in found])
        nominated = tuple(
            Scored(move, pair, mask, scored(next(numbers))) for move, pair, mask in found
        )
        state = advance(state, nominated)
    assert moves(state) == [wanted] * 3
    assert state.best is not None and state.best.proxy.score == 0.1
    assert state.pair.rows.numel() == (2 if wanted == "both" else 16)
    assert state.pair.columns is not None and state.pair.columns.numel() == 4


def test_a_known_mask_is_found() -> None:
    """Of the masks that can be reached, the judge likes the one without the top column best."""
    values = matrix()
    values[:, 7] += 100  # every `both`, `columns` and `rows` mask holds column 7

    state = run(values, lambda coords: 1.0 if 7 in coords else 0.5)
    assert state.best is not None and 7 not in state.best.mask.coords.tolist()
    assert "window" in moves(state)
    ladder = run(values, lambda coords: 1.0 if 7 in coords else 0.5, strategy="ladder")
    assert ladder.best is not None and 7 in ladder.best.mask.coords.tolist()


def test_the_best_is_returned_and_not_the_last() -> None:
    scores = iter([0.9, 0.8, 0.3, 0.6, 0.7, 0.1])
    state = shrink_rows(Script(lambda coords: next(scores)), patience=2)
    assert state.best is not None
    assert state.best.proxy.score == 0.3 and state.best is state.rounds[2].moved_to
    assert state.rounds[-1].moved_to is not state.best and len(state.rounds) == 5


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_patience_counts_the_rounds_without_improvement(patience: int) -> None:
    state = shrink_rows(Script(lambda coords: 0.5), patience=patience)
    assert len(state.rounds) == 1 + patience and state.stale == patience


def test_an_improvement_renews_the_patience() -> None:
    scores = iter([0.9, 0.95, 0.5, 0.6, 0.7, 0.1])
    state = shrink_rows(Script(lambda coords: next(scores)), patience=2)
    assert [r.moved_to.proxy.score for r in state.rounds] == [0.9, 0.95, 0.5, 0.6, 0.7]
    assert state.best is not None and state.best.proxy.score == 0.5


def test_the_order_of_candidates_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    winners = set()
    for order in (MOVES, MOVES[::-1]):
        monkeypatch.setattr(walk, "MOVES", order)
        state = run(matrix(seed=3), arbitrary)
        assert state.best is not None
        winners.add((state.best.mask.digest, state.best.proxy.score))
    assert len(winners) == 1


def test_ties_go_to_fewer_parameters() -> None:
    space = DenseFisher(matrix()).space
    many, few, worse = (
        Scored("both", Pair(torch.arange(4), None, c, 1, 1), SparseMask(space, c), scored(s))
        for c, s in ((torch.arange(5), 0.5), (torch.arange(3), 0.5), (torch.arange(1), 0.6))
    )
    for order in ((many, few, worse), (few, worse, many), (worse, many, few)):
        state = advance(SearchState(Ranges((8, 4), (64, 5))), order)
        assert state.best is few and state.rounds[0].moved_to is few


def test_what_is_no_better_does_not_replace_the_best() -> None:
    space, c = DenseFisher(matrix()).space, torch.arange(3)
    pair = Pair(torch.arange(4), None, c, 1, 1)
    first, again = (Scored("both", pair, SparseMask(space, c), scored(0.5)) for _ in range(2))
    state = advance(SearchState(Ranges((8, 4), (64, 3))), (first,))
    state = advance(state, (again,))
    assert state.best is first and state.stale == 1


# --- what is nominated --------------------------------------------------------------------------


@given(seed=st.integers(0, 999), budget=st.integers(1, 40), rounds=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_rows_and_ranges_only_shrink(seed: int, budget: int, rounds: int) -> None:
    values = matrix(columns=40, seed=seed)
    values[:, seed % 40] = 0  # one column without a gradient
    state = run(values, lambda c: arbitrary([seed, *c]), budget=budget, rounds=rounds)
    before = Pair(torch.arange(16))
    for done in state.rounds:
        for s in done.nominated:
            assert set(s.pair.rows.tolist()) <= set(before.rows.tolist())
            assert chosen(s.pair) <= opened(s.pair, 40) <= opened(before, 40)
            assert s.mask.coords.tolist() == sorted(chosen(s.pair))
        before = done.moved_to.pair
    assert state.best is not None and state.best.mask.count == min(budget, 39)


def test_a_round_compares_masks_of_one_size() -> None:
    state = run(matrix(), arbitrary, rounds=4)
    sizes = Ranges.geometric(16, 64, min_samples=2, budget=4, rounds=4).columns
    for step, done in enumerate(state.rounds, 1):
        counts = {s.mask.count for s in done.nominated}
        assert counts == {sizes[min(step, len(sizes) - 1)]}
    assert len({s.mask.digest for s in state.rounds[1].nominated}) == 4  # four moves, four masks


def test_no_pair_is_nominated_twice() -> None:
    state = run(matrix(seed=5), arbitrary, rounds=4)
    for done in state.rounds:
        keys = [(s.pair.rows.numel(), s.mask.digest) for s in done.nominated]
        assert len(keys) == len(set(keys))


def test_the_ladder_is_the_plain_diagonal() -> None:
    values = matrix(24, 50, seed=2)
    state = run(values, arbitrary, strategy="ladder", budget=5, rounds=4, min_samples=3)
    sizes = Ranges.geometric(24, 50, min_samples=3, budget=5, rounds=4)
    rows, columns = list(range(24)), list(range(50))
    for done, n, k in zip(state.rounds, sizes.rows[1:], sizes.columns[1:], strict=False):
        r = {i: sum(float(values[i, j]) for j in columns) for i in rows}
        rows = sorted(sorted(rows, key=lambda i: -r[i])[:n])
        c = {j: sum(float(values[i, j]) for i in rows) / len(rows) for j in columns}
        columns = sorted(sorted(columns, key=lambda j: -c[j])[:k])
        (only,) = done.nominated
        assert only.pair.rows.tolist() == rows and only.mask.coords.tolist() == columns
    assert len(rows) == 3 and len(columns) == 5


def test_each_move_by_brute_force() -> None:
    values = matrix(seed=4)
    fisher: Any = DenseFisher(values)
    sizes = Ranges((16, 8, 4, 2), (64, 32, 12, 4))
    at = Pair(torch.arange(16), torch.arange(50), torch.arange(5, 37), 1, 1)
    found = {m: (p, k) for m, p, k in nominate(fisher, at, sizes)}

    def best(rows: list[int], columns: list[int], skip: int = 0) -> list[int]:
        c = {j: float(values[rows, j].mean()) for j in columns}
        return sorted(sorted(columns, key=lambda j: -c[j])[skip : skip + 12])

    within, everywhere, all_rows = list(range(5, 37)), list(range(50)), list(range(16))
    r = values[:, 5:37].sum(1)
    fewer = sorted(sorted(all_rows, key=lambda i: -float(r[i]))[:4])
    expected = {
        "both": (fewer, within, best(fewer, within)),
        "columns": (all_rows, within, best(all_rows, within)),
        "rows": (fewer, everywhere, best(fewer, everywhere)),
    }
    top = best(all_rows, within)
    rest = [j for j in within if j not in top]
    expected["window"] = (all_rows, rest, best(all_rows, within, skip=12))
    assert found.keys() == expected.keys()
    for move, (rows, is_open, columns) in expected.items():
        pair, mask = found[move]  # type: ignore[index]
        assert pair.rows.tolist() == rows, move
        assert pair.open is not None and pair.open.tolist() == is_open, move
        assert mask.coords.tolist() == columns, move
        assert (pair.shrunk, pair.step) == (2 if len(rows) == 4 else 1, 2)


def test_a_parent_tells_where_its_children_begin_the_probe() -> None:
    judge = Script(lambda coords: 0.5, rate=0.02)
    run(matrix(), judge, strategy="ladder", rounds=2, budget=4)
    first, second, *_ = judge.asked
    assert first.start is None
    growth = (first.mask.count / second.mask.count) ** 0.5
    assert second.start == pytest.approx(0.02 * growth) and growth > 1


# --- counts -------------------------------------------------------------------------------------


def test_counts_are_exact_whatever_the_ties() -> None:
    state = run(torch.ones(16, 64), lambda coords: 0.5, budget=7, strategy="ladder")
    assert state.best is not None and state.best.mask.coords.tolist() == list(range(7))
    assert [r.moved_to.mask.count for r in state.rounds[:3]] == [31, 15, 7]


def test_columns_without_a_gradient_are_never_taken() -> None:
    values = matrix()
    values[:, ::2] = 0
    for budget, count in ((8, 8), (60, 32), (64, 32)):
        for strategy in ("walk", "ladder"):
            state = run(values, arbitrary, budget=budget, strategy=strategy)
            assert state.best is not None and state.best.mask.count == count
            taken = [j for r in state.rounds for s in r.nominated for j in s.mask.coords.tolist()]
            assert all(j % 2 for j in taken)


def test_fewer_scored_columns_than_the_budget_still_reach_the_target() -> None:
    """Rows that cannot shrink, and a mask that stays as it is while k falls."""
    values = matrix(4)
    values[:, 8:] = 0
    state = run(values, arbitrary, budget=16, rounds=4, min_samples=4)
    assert state.best is not None and state.best.mask.coords.tolist() == list(range(8))
    assert state.best.pair.step == 4


@pytest.mark.parametrize("least", [2, 16])
def test_everything_may_be_selected(least: int) -> None:
    state = run(matrix(), arbitrary, budget=64, min_samples=least)
    assert state.best is not None and state.best.mask.count == 64


def test_no_gradient_at_all_is_an_error() -> None:
    with pytest.raises(ModelError, match="score of exactly zero: no gradient reaches"):
        run(torch.zeros(16, 64), arbitrary)


def test_ranges_fall_geometrically_and_end_exactly() -> None:
    sizes = Ranges.geometric(128, 10_000, min_samples=8, budget=50, rounds=4)
    assert sizes.rows == (128, 64, 32, 16, 8)
    assert sizes.columns[0] == 10_000 and sizes.columns[-1] == 50 and len(sizes.columns) == 5
    falls = [a / b for a, b in zip(sizes.columns, sizes.columns[1:], strict=False)]
    assert max(falls) / min(falls) < 1.01
    few = Ranges.geometric(4, 100, min_samples=8, budget=10, rounds=2)
    assert few.rows == (4,)  # a pool that is smaller than min_samples does not shrink


# --- failures -----------------------------------------------------------------------------------


def test_when_every_proxy_fails_the_reasons_are_listed() -> None:
    with pytest.raises(NoProxySucceeded) as error:
        run(matrix(), lambda coords: "the loss is nan", strategy="ladder", rounds=2)
    assert error.value.problems == ("round 2, both: the loss is nan",)
    assert error.value.exit_code == 6


def test_success_on_the_way_is_not_enough() -> None:
    with pytest.raises(NoProxySucceeded, match="round 3, both: too few"):
        run(matrix(), lambda coords: 0.5 if len(coords) > 4 else "too few", strategy="ladder")


def test_one_success_is_enough() -> None:
    values = matrix()
    *_, lucky = sorted(s.mask.coords.tolist() for s in run(values, arbitrary).rounds[2].nominated)
    state = run(values, lambda c: arbitrary(c) if c == lucky or len(c) > 4 else "bad")
    assert state.best is not None and state.best.mask.coords.tolist() == lucky


def test_rounds_are_told_as_they_end() -> None:
    told: list[Round] = []
    state = run(matrix(), arbitrary, on_round=told.append)
    assert tuple(told) == state.rounds and [r.number for r in told] == [*range(1, len(told) + 1)]


def test_a_failed_proxy_is_never_moved_to_beside_a_good_one() -> None:
    failing = {"window"}
    fisher: Any = DenseFisher(matrix())
    sizes = Ranges.geometric(16, 64, min_samples=2, budget=4, rounds=3)
    found = nominate(fisher, Pair(torch.arange(16)), sizes)
    nominated = tuple(
        Scored(m, p, k, scored(0.0 if m in failing else 9.0, failure="x" * (m in failing)))
        for m, p, k in found
    )
    state = advance(SearchState(Ranges(sizes.rows, sizes.columns[:2])), nominated)
    assert state.rounds[0].moved_to.move == "both" and state.best is not None
    assert state.best.move == "both"
