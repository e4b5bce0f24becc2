"""What every strategy must do, and what each does of its own."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from ird_search.budgets import Budgets
from ird_search.config import SearchConfig, Strategy
from ird_search.errors import ModelError, NoProxySucceeded
from ird_search.pair import Pair, Ranges, Scored
from ird_search.reading import Reading
from ird_search.search import SearchState, advance, search
from ird_search.selection import top_k
from ird_search.selector import Selector
from ird_search.strategies import Points, make_strategy
from ird_search.strategies.points import Point
from tests.toy import DenseFisher, Direct, Script, scored

NAMES = get_args(Strategy)
SIZES = Ranges.geometric(16, 64, min_samples=2, budget=6, rounds=3)
VARY = ("criterion", "ceiling", "skip")


def fisher(seed: int = 0, rows: int = 16, columns: int = 64) -> DenseFisher:
    g = torch.Generator().manual_seed(seed)
    values = torch.rand(rows, columns, generator=g) ** 3 + 1e-3
    return DenseFisher(values, torch.randn(rows, columns, generator=g).sign())


def arbitrary(coords: list[int]) -> float:
    """A number in 0 … 1 that has nothing to do with F."""
    return int(hashlib.sha256(repr(coords).encode()).hexdigest()[:8], 16) / 2**32


def made(name: str, at: Any = None, sizes: Ranges = SIZES, **settings: Any) -> Any:
    narrowings: Any = Direct(at or fisher(), settings.pop("selector", None))
    if name == "grid":
        settings = {"vary": ("criterion",), **settings}
    config = SearchConfig(**{"strategy": name, "trials": 10, **settings})
    base = Reading.of(config)
    return make_strategy(config, narrowings, sizes, base)


def run(name: str, answer: Any = arbitrary, sizes: Ranges = SIZES, **settings: Any) -> SearchState:
    judge = answer if isinstance(answer, Script) else Script(answer)
    return search(made(name, sizes=sizes, **settings), judge, sizes)


def masks(state: SearchState) -> list[str]:
    return [s.mask.digest for s in state.scored]


# --- every strategy -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_best_pair_within_the_budget_is_returned(name: str) -> None:
    state = run(name)
    fitting = [s for s in state.scored if s.mask.count <= SIZES.budget]
    assert state.best in fitting and state.best is not None
    assert state.best.proxy.score == min(s.proxy.score for s in fitting)
    assert state.best.mask.count == SIZES.budget


@pytest.mark.parametrize("name", NAMES)
def test_the_same_state_gives_the_same_pairs(name: str) -> None:
    """What resumed runs and several processes of one run rest on."""
    first, again = run(name), run(name)
    assert masks(first) == masks(again)
    state = SearchState(SIZES)
    for done in first.rounds:
        other = made(name)  # without any memory of the rounds before
        found = other.nominate(state)
        assert [m.digest for _, _, m in found] == [s.mask.digest for s in done.nominated]
        state = advance(state, done.nominated)
    assert not made(name).nominate(state)


@pytest.mark.parametrize("name", NAMES)
def test_pairs_say_what_their_masks_were_made_from(name: str) -> None:
    for s in run(name).scored:
        assert s.pair.columns is not None and torch.equal(s.pair.columns, s.mask.coords)
        assert s.pair.rows.numel() == SIZES.rows[s.pair.shrunk]
        assert torch.equal(s.pair.rows, s.pair.rows.unique())
        assert s.mask.count == SIZES.columns[s.pair.step]
        assert s.pair.open is None or set(s.mask.coords.tolist()) <= set(s.pair.open.tolist())


@pytest.mark.parametrize("name", NAMES)
def test_a_failed_proxy_does_not_end_the_search(name: str) -> None:
    def answer(coords: list[int]) -> float | str:
        return "it diverged" if arbitrary(coords) < 0.1 else arbitrary(coords)

    state = run(name, answer, seed=1, min_samples=2)
    assert state.best is not None and state.best.proxy.score >= 0.1
    with pytest.raises(NoProxySucceeded):
        run(name, lambda coords: "it diverged")


@pytest.mark.parametrize("name", NAMES)
def test_a_planted_mask_is_found_or_beaten(name: str) -> None:
    """The judge counts planted columns; F is large there, and so is the mean gradient."""
    planted = set(range(5, 11))
    at = fisher()
    at.values[:, 5:11] += 4
    at.signs[:, 5:11] = 1

    state = run(name, lambda coords: 1 - len(planted & set(coords)) / 6, at=at)
    assert state.best is not None and state.best.proxy.score == 0


@pytest.mark.parametrize("name", ["walk", "grid", "tpe", "random"])
def test_readings_are_varied_only_as_far_as_allowed(name: str) -> None:
    base = Reading("mean", ceiling=4.0)
    kept = run(name, criterion="mean", ceiling=4.0, vary=())
    assert {s.pair.reading for s in kept.scored} == {base}
    some = run(name, criterion="mean", ceiling=4.0, vary=("skip",))
    readings = {s.pair.reading for s in some.scored}
    assert len(readings) > 1 and {replace(r, skip=0.0) for r in readings} == {base}


# --- each of its own ----------------------------------------------------------------------------


def test_the_grid_is_every_size_with_every_reading() -> None:
    state = run("grid", vary=())
    scales = [(s.pair.rows.numel(), s.mask.count) for s in state.scored]
    every = {(n, k) for n in SIZES.rows for k in SIZES.columns[1:]}
    assert set(scales) == every and len(scales) == len(every)
    assert len(state.rounds) == len(SIZES.columns) - 1


def test_a_point_is_the_ladder_to_its_rows_and_a_reading_of_them() -> None:
    at = fisher(3)
    points = Points(Direct(at), SIZES, Reading(), ())  # type: ignore[arg-type]
    ((_, pair, mask),) = points.nominations([Point(3, 3, Reading())], SearchState(SIZES))
    rows, columns = torch.arange(16), torch.arange(64)
    for n, k in zip(SIZES.rows[1:], SIZES.columns[1:], strict=True):
        rows = rows[top_k(at.values[rows][:, columns].double().sum(1), n)]
        columns = columns[top_k(at.values[rows][:, columns].mean(0), k)]
    assert torch.equal(pair.rows, rows)
    assert torch.equal(mask.coords, top_k(at.values[rows].mean(0), 6))


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_samplers_try_as_many_pairs_as_they_may_and_none_twice(name: str) -> None:
    state = run(name, trials=11)
    assert len(state.scored) == 11 == len(set(masks(state)))
    few = run(name, trials=11, vary=(), sizes=Ranges((16, 4), (64, 6)))
    assert len(few.scored) == 2  # there are no more


def test_samplers_of_another_seed_try_other_pairs() -> None:
    assert masks(run("random", seed=1)) != masks(run("random", seed=2))


def test_tpe_learns_from_what_was_judged() -> None:
    """A judge that likes 12 masks, those by signal-to-noise: the estimator finds them."""
    at = fisher(5)
    at.values *= 1e-6  # so small that `decrease` is `mean`, and not `snr`
    points = Points(Direct(at), SIZES, Reading(), VARY)  # type: ignore[arg-type]
    snr = [r for r in points.readings if r.criterion == "snr"]
    wanted = [Point(n, 3, r) for n in range(len(SIZES.rows)) for r in snr]
    liked = {mask.digest for _, _, mask in points.nominations(wanted, SearchState(SIZES))}
    assert len(liked) == 12

    def found_by(name: str) -> int:
        state = SearchState(SIZES)
        for _ in range(6):
            found = made(name, at, trials=99).nominate(state)
            scores = [0.1 if mask.digest in liked else 0.9 for _, _, mask in found]
            nominated = (Scored(*f, scored(s)) for f, s in zip(found, scores, strict=True))
            state = advance(state, tuple(nominated))
        return sum(s.mask.digest in liked for s in state.scored[8:])

    assert found_by("tpe") >= 7 > found_by("random")


def test_fish_draws_its_rows_at_random() -> None:
    at = fisher(1)
    state = run("fish", at=at)
    assert len(state.rounds) == 1
    for s in state.scored:
        assert s.mask.coords.tolist() == top_k(at.values[s.pair.rows].mean(0), 6).tolist()
    assert [s.pair.rows.numel() for s in state.scored] == list(SIZES.rows)


def test_the_walk_looks_around_at_the_target() -> None:
    at = fisher(2)
    far, near = Reading("snr", skip=1.0), Reading("snr")
    selector = Selector(Budgets.of(at.space, ()))
    liked, nearer = (selector.mask(at, torch.arange(16), 6, r) for r in (far, near))  # type: ignore[arg-type]

    def answer(coords: list[int]) -> float:
        if coords == liked.coords.tolist():
            return 0.1
        return 0.3 if coords == nearer.coords.tolist() else 0.5

    small = Ranges((16,), (64, 8, 6))  # too narrow for a window
    state = run("walk", answer, at=at, sizes=small, patience=3, criterion="fisher")
    assert state.best is not None and state.best.mask == liked
    assert state.best.pair.reading == far


@pytest.mark.parametrize("liked", ["fisher", "mean", "snr"])
def test_the_walk_narrows_by_the_criterion_that_does_best(liked: str) -> None:
    at = fisher(2)
    at.values *= 1e-6
    (_, _, mask) = made("walk", at, criterion=liked, vary=()).narrowings.read(
        Pair(torch.arange(16), step=3, reading=Reading(liked)),  # type: ignore[arg-type]
        6,
        liked,
    )[0]
    state = run("walk", lambda c: 0.1 if c == mask.coords.tolist() else 0.5, at=at)
    first, *narrowing = state.rounds[:4]
    assert {s.mask.count for s in first.nominated} == {6}
    assert {s.pair.reading.criterion for r in narrowing for s in r.nominated} == {liked}
    assert [r.moved_to.mask.count for r in narrowing] == list(SIZES.columns[1:])
    assert first.moved_to.mask == mask and state.best is first.moved_to


def test_the_walk_narrows_once_where_no_criterion_can_be_chosen() -> None:
    """So many ranks are passed over that no reading of all columns has as many left."""
    state = run("walk", lambda coords: 0.5, criterion="fisher", skip=50.0)
    first, *others = ([s.mask.digest for s in r.nominated] for r in state.rounds)
    assert first and not any(set(first) & set(other) for other in others)
    assert state.rounds[0].moved_to.move in ("both", "columns", "rows", "window")


def test_rounds_above_the_budget_do_not_wear_out_patience() -> None:
    """The criteria come first; what follows is too large to win until the target is reached."""
    sizes = Ranges((16,), (64, 50, 40, 30, 6))
    strategy, state, stale = made("walk", sizes=sizes), SearchState(sizes), []
    for _ in range(5):
        found = strategy.nominate(state)
        state = advance(state, tuple(Scored(*f, scored(0.5)) for f in found))
        stale.append(state.stale)
    assert stale == [0, 0, 0, 0, 1]


def test_the_walk_ends_when_all_around_is_known() -> None:
    state = run("walk", lambda coords: 0.5, patience=50, vary=("skip",))
    around = [s for s in state.scored if s.mask.count == SIZES.budget]
    assert len({s.mask.digest for s in around}) == len(around)
    assert len(state.rounds) < 12


def test_smaller_masks_come_last_with_the_reading_of_the_best() -> None:
    sizes = Ranges.geometric(16, 64, min_samples=2, budget=8, rounds=2, least=1)
    assert sizes.budget == 8 and sizes.columns[-1] == 1 and sizes.until_target.columns[-1] == 8
    for name in ("walk", "grid", "tpe"):
        state = run(name, sizes=sizes, trials=16)
        counts = {s.mask.count for s in state.scored}
        assert min(counts) < 8 and state.best is not None and state.best.mask.count <= 8
    state = run("walk", sizes=sizes, vary=("skip",))
    counts_in_order = [r.moved_to.mask.count for r in state.rounds]
    assert counts_in_order == sorted(counts_in_order, reverse=True)
    assert set(sizes.columns[1:]) == set(counts_in_order)


def test_rows_are_narrowed_alike_in_each_class() -> None:
    at = fisher(4)
    labels = torch.tensor([0] * 12 + [1] * 4)
    selector = Selector(Budgets.of(at.space, ()), labels=labels)
    for s in run("ladder", at=at, selector=selector).scored:
        counts = labels[s.pair.rows].bincount(minlength=2)
        assert counts[0] - counts[1] in (0, 1) or counts[1] == 4


def test_rows_beyond_the_cap_are_passed_over() -> None:
    at = fisher(6)
    at.values[3] *= 1000
    plain = run("ladder", at=at).rounds[-1].moved_to.pair.rows
    capped = Selector(Budgets.of(at.space, ()), cap=10.0)
    assert 3 in plain.tolist()
    assert 3 not in run("ladder", at=at, selector=capped).rounds[-1].moved_to.pair.rows.tolist()


def test_a_floor_reaches_every_tensor() -> None:
    at = fisher(7)
    at.values[:, 32:] *= 1e-3
    at.space = type(at.space)(("a", "b"), ((32,), (32,)))
    selector = Selector(Budgets.of(at.space, ()), floor=1.0)
    mask = selector.mask(at, torch.arange(16), 6, Reading())  # type: ignore[arg-type]
    assert {n: i.numel() for n, i in mask.indices.items()} == {"a": 3, "b": 3}


def test_reversed_takes_the_smallest_positive_scores() -> None:
    at = fisher(8)
    at.values[:, :5] = 0
    found = Selector(Budgets.of(at.space, ())).reversed(at, torch.arange(16), 7)  # type: ignore[arg-type]
    c: Tensor = at.values.mean(0)
    expected = sorted(sorted((j for j in range(64) if c[j] > 0), key=lambda j: float(c[j]))[:7])
    assert found.coords.tolist() == expected


@pytest.mark.parametrize("name", ["walk", "ladder", "grid", "tpe", "random"])
def test_ranks_that_are_passed_over_are_so_at_the_target_and_once(name: str) -> None:
    at = fisher(9)
    state = run(name, at=at, criterion="fisher", skip=3.0, vary=())
    rows = {s.pair.rows.numel(): s for s in state.scored if s.pair.reading.skip and state.fits(s)}
    assert rows
    for s in rows.values():
        scores = at.values[s.pair.rows].mean(0)
        expected = set(top_k(scores, 24).tolist()) - set(top_k(scores, 18).tolist())
        assert set(s.mask.coords.tolist()) == expected


@pytest.mark.parametrize("name", NAMES)
def test_everything_may_be_selected(name: str) -> None:
    """Density 1: the sizes of the columns are one number."""
    state = run(name, sizes=Ranges.geometric(16, 64, min_samples=2, budget=64, rounds=3))
    assert state.best is not None and state.best.mask.count == 64


@pytest.mark.parametrize("name", NAMES)
def test_fewer_scores_than_the_budget_still_win(name: str) -> None:
    at = fisher(10)
    at.values[:, 5:] = 0
    state = run(name, at=at, criterion="fisher")
    assert state.best is not None and state.best.mask.coords.tolist() == list(range(5))


def test_what_cannot_be_made_is_told() -> None:
    with pytest.raises(ModelError, match="No mask of 6 parameters can be made"):
        run("grid", skip=30.0, vary=())


def test_one_failed_pair_beside_a_good_one_of_the_same_name_does_not_end_it() -> None:
    """Readings name the moves of a grid, and several of one round have the same."""
    answers = iter([0.5, *["it diverged"] * 99])
    sizes = Ranges((16, 8, 4), (64, 6))
    state = run("grid", lambda coords: next(answers), sizes=sizes, vary=())
    assert state.best is not None and len(state.scored) == 3


def test_the_ladder_goes_down_to_the_smallest_size_whatever_it_brings() -> None:
    sizes = Ranges.geometric(16, 64, min_samples=2, budget=32, rounds=4, least=2)
    state = run("ladder", lambda coords: 0.5, sizes=sizes, patience=1)
    assert state.scored[-1].mask.count == 2
