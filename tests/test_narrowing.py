"""Narrowings: an interrupted Fisher pass goes on bit for bit, whatever was in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ird_search.budgets import Budgets
from ird_search.errors import ResourceError, out_of_memory
from ird_search.fisher import Engine, FisherMatrix, Memory, PassRecord, make_engine, record
from ird_search.fisher.engine import Contribution
from ird_search.ledger import Ledger
from ird_search.mask import SparseMask
from ird_search.narrowing import Narrowings
from ird_search.pair import Pair, Ranges
from ird_search.reading import Reading
from ird_search.samples import Batch, SampleSet
from ird_search.selector import Selector
from ird_search.strategies.walk import MOVES
from tests.cases import Problem, named, problem, vectors
from tests.matrices import HUGE, bytes_of_all_factors
from tests.toy import toy_net

SIZES = Ranges((6, 4, 3, 2), (1000, 300, 80, 20))


class Stopping:
    """An engine that is interrupted at its n-th batch."""

    def __init__(self, engine: Engine, at: int) -> None:
        self.engine, self.left, self.batches = engine, at, 0
        self.path, self.names = engine.path, engine.names
        self.rows: list[int] = []

    def gradients(self, batch: Batch) -> Iterator[Contribution]:
        self.left -= 1
        self.batches += 1
        if self.left == 0:
            raise KeyboardInterrupt
        self.rows += batch.rows.tolist()
        return self.engine.gradients(batch)


def narrow(p: Problem, engine: Engine, directory: Path | None, cache: int) -> list[list[Any]]:
    """What three rounds nominate, with FISH masks and row scores, as numbers."""
    ledger = Ledger(directory)

    def opened() -> FisherMatrix:
        settings: dict[str, Any] = {"tokens": 16, "cache_bytes": cache}
        settings["record"] = PassRecord(ledger, {"of": "a test"}, every=0)
        return FisherMatrix(engine, p.samples, p.space, **settings)

    selector = Selector(Budgets.of(p.space, ()))
    narrowings = Narrowings(opened, selector, ledger, {"of": "a test"})
    sizes = Ranges(SIZES.rows, (p.space.numel, *SIZES.columns[1:]))
    pair, told = Pair(torch.arange(6)), []
    for _ in range(4):
        found = narrowings.narrowed(pair, sizes, MOVES)
        told += [[m, q.rows.tolist(), mask.digest, q.shrunk, q.step] for m, q, mask in found]
        told += [[None if q.open is None else q.open.tolist() for _, q, _ in found]]
        pair = found[-1][1]
    mask = found[-1][2]
    told.append([narrowings.fish(p.samples.select([4, 1]), 30).digest])
    told.append([narrowings.reversed(pair.rows, 30).digest])
    for reading in (Reading("mean", ceiling=4.0), Reading("snr", skip=1.0)):
        told.append([narrowings.read(replace(pair, reading=reading), 25, "")[0][2].digest])
    told.append(narrowings.descended((6, 3), (p.space.numel, 10)).tolist())
    told.append(narrowings.row_scores(pair.rows, mask).tolist())
    return [*told, [narrowings.memory.silent, narrowings.memory.excluded, narrowings.path]]


@pytest.mark.parametrize("share", [0, 0.4, 100])
@pytest.mark.parametrize("name", ["bert-sdpa", "mlp"])
def test_an_interrupted_narrowing_goes_on_bit_for_bit(
    name: str, share: float, tmp_path: Path
) -> None:
    p = named(name)
    cache = int(share * bytes_of_all_factors(p))
    engine = make_engine(p.model, p.task, p.space, example=p.samples.batch(range(6)))
    whole = Stopping(engine, -1)
    expected = narrow(p, whole, None, cache)
    assert narrow(p, engine, tmp_path / "recorded", cache) == expected
    for at in range(1, len(whole.rows) + 1, max(1, whole.batches // 2)):
        directory = tmp_path / str(at)
        stopped = Stopping(engine, at)
        try:
            assert narrow(p, stopped, directory, cache) == expected
            break  # it was never interrupted
        except KeyboardInterrupt:
            pass
        assert narrow(p, engine, directory, cache) == expected
        assert narrow(p, Stopping(engine, 1), directory, cache) == expected  # nothing is left to do
    assert at > 1


def test_a_pass_goes_on_behind_its_last_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "SHARE", 0)  # however long the last record took
    p = named("bert-sdpa")
    engine = make_engine(p.model, p.task, p.space, example=p.samples.batch(range(6)))
    whole = Stopping(engine, -1)
    narrow(p, whole, None, 0)
    stopped, rest = Stopping(engine, 3), Stopping(engine, -1)
    with pytest.raises(KeyboardInterrupt):
        narrow(p, stopped, tmp_path, 0)
    assert any(path.name.startswith("fisher-") for path in tmp_path.iterdir())
    narrow(p, rest, tmp_path, 0)
    assert stopped.rows + rest.rows == whole.rows  # in order, none twice
    assert not any(path.name.startswith("fisher-") for path in tmp_path.iterdir())


def test_excluded_rows_and_silent_tensors_are_remembered(tmp_path: Path) -> None:
    net = toy_net()
    samples = vectors(4, classes=2)
    bad = SampleSet(
        ({"input": torch.full((4,), float("nan"))}, *samples.inputs[1:]),
        samples.labels,
        samples.ids,
    )
    p = problem(net, named("mlp").task, bad)
    engine = make_engine(p.model, p.task, p.space, example=bad.batch(range(6)))

    def open_(ledger: Ledger) -> Narrowings:
        settings: dict[str, Any] = {"cache_bytes": HUGE, "excluded_share": 1.0}
        settings["record"] = PassRecord(ledger, {}, every=0)
        return Narrowings(
            lambda: FisherMatrix(engine, bad, p.space, **settings),
            Selector(Budgets.of(p.space, ())),
            ledger,
            {},
        )

    sizes = Ranges((6, 3), (p.space.numel, 5))
    first, again = open_(Ledger(tmp_path)), open_(Ledger(tmp_path))
    for narrowings in (first, again):
        narrowings.narrowed(Pair(torch.arange(6)), sizes, ("both",))
        assert narrowings.memory.excluded == (0,) and narrowings.memory.silent == ()
    assert again._fisher is None  # no gradient was computed


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a convolution"), False),
        (ImportError("x.so: failed to map segment from shared object"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (ResourceError("Out of memory in the Fisher pass."), False),
        (ValueError("shapes do not fit"), False),
    ],
)
def test_what_says_that_memory_ran_out(error: Exception, is_memory: bool) -> None:
    assert out_of_memory(error) == is_memory


# --- memory ---------------------------------------------------------------------------------------


class Full:
    """An engine that has memory for so many rows; told each batch that came through."""

    def __init__(self, engine: Engine, rows: int) -> None:
        self.engine, self.rows, self.path, self.names = engine, rows, engine.path, engine.names
        self.done: list[list[int]] = []

    def gradients(self, batch: Batch) -> Iterator[Contribution]:
        if len(batch) > self.rows:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to …")
        self.done.append(batch.rows.tolist())
        yield from self.engine.gradients(batch)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_batches_halve_where_memory_runs_out(rows: int) -> None:
    p = named("bert-sdpa")
    engine = make_engine(p.model, p.task, p.space, example=p.samples.batch(range(6)))
    full = Full(engine, rows)
    found = FisherMatrix(full, p.samples, p.space, tokens=HUGE, cache_bytes=0).marginals()
    true = FisherMatrix(engine, p.samples, p.space, cache_bytes=0).marginals()
    assert torch.allclose(found.columns, true.columns, rtol=1e-4, atol=1e-10)
    assert sorted(row for batch in full.done for row in batch) == list(range(6))
    assert {len(batch) for batch in full.done} == {{1: 1, 2: 1, 3: 3}[rows]}


def test_below_one_row_it_is_the_loop_and_then_an_error() -> None:
    p = named("bert-sdpa")
    engine = make_engine(p.model, p.task, p.space, example=p.samples.batch(range(6)))
    loop = make_engine(p.model, p.task, p.space, example=p.samples.batch(range(6)), method="loop")
    true = FisherMatrix(engine, p.samples, p.space, cache_bytes=0).marginals()
    short: dict[str, Any] = {"samples": p.samples, "space": p.space, "cache_bytes": 0}
    m = FisherMatrix(Full(engine, 0), fallback=loop, **short)
    found = m.marginals()
    assert torch.allclose(found.columns, true.columns, rtol=1e-4, atol=1e-10)
    assert m.path == m.on(p.samples.select([1])).path == "loop"  # what ran, and nothing else
    for fallback in (None, Full(loop, 0)):
        with pytest.raises(ResourceError, match=r"with one sample at a time.*cache-mb"):
            FisherMatrix(Full(engine, 0), fallback=fallback, **short).marginals()


class Tiring(Full):
    """An engine that has memory for one batch."""

    def gradients(self, batch: Batch) -> Iterator[Contribution]:
        self.rows = 0 if self.done else 6
        return super().gradients(batch)


def test_the_path_tells_what_ran_also_after_a_fallback(tmp_path: Path) -> None:
    p = named("bert-sdpa")
    engine = make_engine(p.model, p.task, p.space, example=p.samples.batch(range(6)))
    loop = make_engine(p.model, p.task, p.space, example=p.samples.batch(range(6)), method="loop")

    def asked(first: Engine, rows: list[int]) -> str:
        m = FisherMatrix(first, p.samples, p.space, tokens=16, cache_bytes=0, fallback=loop)
        ledger, selector = Ledger(tmp_path), Selector(Budgets.of(p.space, ()))
        narrowings = Narrowings(lambda: m, selector, ledger, {})
        narrowings.row_scores(torch.arange(6), SparseMask(p.space, torch.arange(9)))
        narrowings.row_scores(torch.tensor(rows), SparseMask(p.space, torch.arange(9)))
        return narrowings.path

    assert asked(Tiring(engine, 6), [0]) == "taps+loop"
    assert asked(engine, [0]) == asked(engine, [1, 2]) == "taps+loop"  # from the ledger, too


@pytest.mark.parametrize("at", [1, 4, 7])
def test_memory_that_runs_out_while_sums_grow_counts_nothing_twice(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch is in some tensors' sums already, so the pass begins again."""
    p = named("bert-sdpa")
    engine = make_engine(p.model, p.task, p.space, example=p.samples.batch(range(6)))
    m = FisherMatrix(engine, p.samples, p.space, tokens=16, cache_bytes=0)
    true = FisherMatrix(engine, p.samples, p.space, tokens=16, cache_bytes=0).marginals()
    calls = 0
    real = torch.stack

    def stack(*args: Any, **more: Any) -> Any:
        nonlocal calls
        if len(args[0]) == len(p.space.names):
            calls += 1
            if calls == at:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*args, **more)

    monkeypatch.setattr(torch, "stack", stack)
    found = m.marginals()
    assert torch.allclose(found.columns, true.columns, rtol=1e-4, atol=1e-10)
    assert torch.allclose(found.rows, true.rows, rtol=1e-4)


def test_sums_of_an_answer_that_is_there_are_not_taken_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run ends between an answer and the removal of its sums."""
    p = named("bert-sdpa")
    engine = make_engine(p.model, p.task, p.space, example=p.samples.batch(range(6)))
    wide, ranges = p.space.numel, Ranges((6, 3, 2), (p.space.numel, 700, 50))

    def asked(place: str, *, all_of_it: bool = True) -> tuple[list[Any], Memory]:
        ledger = Ledger(tmp_path / place)
        record = PassRecord(ledger, {}, every=0)
        room: dict[str, Any] = {"cache_bytes": 16 * wide, "tokens": 16}
        opened = FisherMatrix(engine, p.samples, p.space, record=record, **room)
        narrowings = Narrowings(lambda: opened, Selector(Budgets.of(p.space, ())), ledger, {})
        found: list[Any] = [rows := narrowings.descended((6, 4, 3), (wide, wide // 2, 40))]
        if all_of_it:
            (_, pair, mask), *_ = narrowings.narrowed(Pair(torch.arange(6)), ranges, MOVES)
            found += [mask.coords, narrowings.row_scores(rows, mask)]
            found += [m.coords for _, _, m in narrowings.narrowed(pair, ranges, MOVES)]
        return found, narrowings.memory

    wanted, memory = asked("whole")
    with monkeypatch.context() as patch:
        patch.setattr(PassRecord, "clear", lambda self: None)
        asked("stopped", all_of_it=False)
    assert any((tmp_path / "stopped").glob("fisher-*"))
    found, then = asked("stopped")
    assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))
    one, other = memory.to_unit(wide), then.to_unit(wide)
    assert one.result == other.result and one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
