"""The moments of all columns: computed once, and with the same bits whenever it is done again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ird_search.fisher import FisherMatrix, Memory, PassRecord
from ird_search.fisher.moments import MOST, Kept, Moments, Whole
from ird_search.ledger import Ledger, Unit
from tests.cases import Problem, named
from tests.matrices import CLOSE, HUGE, bytes_of_all_factors, engine_of, matrix_of
from tests.reference import per_sample_gradients, relative_error
from tests.test_matrix import Interrupted

ALL = torch.arange(6)
SOME = torch.tensor([4, 0, 3])


def equal(one: Moments, other: Moments) -> bool:
    assert one.mean is not None and other.mean is not None
    return torch.equal(one.square, other.square) and torch.equal(one.mean, other.mean)


def counted(
    p: Problem, *, factors: bool = True, **settings: Any
) -> tuple[FisherMatrix, Interrupted]:
    """A matrix that keeps factors, or none, and an engine that counts its batches."""
    engine = Interrupted(engine_of(p))
    m = FisherMatrix(engine, p.samples, p.space, **{"tokens": 16} | settings)
    m._passes._settled = not factors
    return m, engine


def test_the_same_rows_are_asked_for_once() -> None:
    p = named("bert-sdpa")
    g = per_sample_gradients(p.model, p.task, p.samples, p.space)
    m, engine = counted(p, factors=False, cache_bytes=12 * p.space.numel)
    first = m.column_moments(ALL)
    batches = engine.batches
    assert relative_error(first.square, g.square().mean(0)) <= CLOSE
    assert equal(m.column_moments(ALL), first)
    assert torch.equal(m.column_scores(ALL), first.square)
    assert m.column_moments(ALL, mean=False).mean is None
    assert engine.batches == batches
    other = m.column_moments(SOME, mean=False)
    assert engine.batches > batches
    assert relative_error(other.square, g[SOME].square().mean(0)) <= CLOSE
    batches = engine.batches
    assert equal(m.column_moments(ALL), first) and engine.batches == batches


def test_the_mean_that_was_not_asked_for_at_first_comes_with_the_same_squares() -> None:
    m, engine = counted(named("bert-sdpa"), cache_bytes=HUGE)
    alone, batches = m.column_scores(ALL), engine.batches
    both = m.column_moments(ALL)
    assert both.mean is not None and torch.equal(both.square, alone)
    assert engine.batches == batches  # of kept factors


def test_what_does_not_fit_is_computed_again() -> None:
    p = named("bert-sdpa")
    m, engine = counted(p, factors=False, cache_bytes=4 * p.space.numel)  # one vector
    m.column_moments(ALL)
    batches = engine.batches
    m.column_moments(ALL)
    assert engine.batches == 2 * batches
    assert not list(m.memory.moments)


@pytest.mark.parametrize("share", [0, 0.3, 0.6, 1])
def test_the_bits_do_not_depend_on_what_was_kept_meanwhile(share: float, tmp_path: Path) -> None:
    """The factors that the first pass kept would give the second one other batches."""
    p = named("bert-sdpa")
    room = int(share * bytes_of_all_factors(p)) + 16 * p.space.numel
    m, _ = counted(p, cache_bytes=room)
    first, part = m.column_moments(ALL), m.column_moments(SOME)
    memory = Memory.of_unit(m.memory.to_unit(p.space.numel))
    assert all(w.values is None for w in memory.moments)
    ledger = Ledger(tmp_path)
    ledger.put("test", "0" * 64, m.memory.to_unit(p.space.numel))
    read = ledger.get("test", "0" * 64)
    assert isinstance(read, Unit)
    for known in (memory, Memory.of_unit(read)):
        resumed, engine = counted(p, cache_bytes=room)
        resumed.remember(known)
        assert equal(resumed.column_moments(ALL), first) and engine.batches
        assert equal(resumed.column_moments(SOME), part)
        assert _told(resumed.memory) == _told(m.memory)


def _told(memory: Memory) -> list[Any]:
    return [(w.rows.tolist(), [b.tolist() for b in w.plan], w.mean) for w in memory.moments]


def test_an_interrupted_pass_goes_on_with_them(tmp_path: Path) -> None:
    p = named("bert-sdpa")
    settings: dict[str, Any] = {"cache_bytes": 16 * p.space.numel, "tokens": 8}
    m, _ = counted(p, **settings)
    wanted = [m.column_moments(ALL), m.column_moments(SOME), m.column_moments(ALL)]
    memory = Memory()
    found: list[Moments] = []
    for stop in (2, 0):
        m, engine = counted(p, **settings, record=PassRecord(Ledger(tmp_path), {"of": 1}, every=0))
        engine.at = stop
        m.remember(memory)
        try:
            for rows in (ALL, SOME, ALL)[len(found) :]:
                found.append(m.column_moments(rows))
                memory = Memory.of_unit(m.memory.to_unit(p.space.numel))
        except KeyboardInterrupt:
            assert not found
    assert all(map(equal, found, wanted))


def test_memory_that_runs_out_takes_them_first(monkeypatch: pytest.MonkeyPatch) -> None:
    p = named("bert-sdpa")
    m, engine = counted(p, factors=False, cache_bytes=16 * p.space.numel)
    first = m.column_moments(ALL)
    gradients, failed = engine.gradients, []

    def full(batch: Any) -> Any:
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return gradients(batch)

    monkeypatch.setattr(engine, "gradients", full)
    m.row_scores(SOME)
    assert failed and all(w.values is None for w in m._passes.moments)
    assert m._passes.most is None  # batches are as large as before
    assert equal(m.column_moments(ALL), first)


def test_a_row_that_is_left_out_later_does_not_count_in_what_was_kept() -> None:
    """It was finite in one batch, and is not in another."""
    kept = Kept(9, [Whole(rows, (rows,), True) for rows in (ALL, SOME)])
    kept.drop({1})
    assert [w.rows.tolist() for w in kept] == [SOME.tolist()]
    p = named("bert-sdpa")
    m, _ = counted(p, factors=False, cache_bytes=16 * p.space.numel, excluded_share=1.0)
    g = per_sample_gradients(p.model, p.task, p.samples, p.space)
    assert relative_error(m.column_scores(ALL), g.square().mean(0)) <= CLOSE
    m._passes._exclude(torch.tensor([5]))
    assert relative_error(m.column_scores(ALL), g[:5].square().mean(0)) <= CLOSE


def test_a_matrix_on_other_samples_keeps_its_own() -> None:
    p = named("bert-sdpa")
    m = matrix_of(p, cache_bytes=HUGE)
    m.column_scores(ALL)
    there = m.on(p.samples.select(torch.arange(3)))
    found = there.column_scores(torch.arange(3))
    wanted = per_sample_gradients(p.model, p.task, p.samples, p.space)[:3].square().mean(0)
    assert relative_error(found, wanted) <= CLOSE


def whole(n: int, *, mean: bool = True) -> Whole:
    rows = torch.arange(n)
    return Whole(rows, (rows,), mean, Moments(torch.ones(1) * n))


def test_those_that_were_not_asked_for_the_longest_go() -> None:
    kept = Kept(5)
    for n in (1, 2):
        kept.put(whole(n))
    kept.put(whole(1))  # asked for again
    kept.put(whole(3))
    assert [w.rows.numel() for w in kept] == [1, 3]
    kept.put(whole(4, mean=False))
    assert [w.rows.numel() for w in kept] == [1, 3, 4]
    Kept(1).put(whole(1))
    assert kept.of(torch.arange(2)) is None and kept.of(torch.arange(3)) is not None
    many = Kept(100)
    for n in range(2 * MOST):
        many.put(whole(n))
    assert [w.rows.numel() for w in many] == list(range(MOST, 2 * MOST))


def test_what_another_process_kept_has_the_values_that_are_here() -> None:
    kept = Kept(10)
    kept.put(whole(2))
    kept.put(whole(3))
    bare = [Whole(torch.arange(n), (torch.arange(n),), True) for n in (4, 3)]
    other = Whole(torch.arange(2), (torch.tensor([1]), torch.tensor([0])), True)
    kept.remember([*bare, other])
    assert [w.values is not None for w in kept] == [False, True, False]
    assert kept.forget() and not kept.forget()
