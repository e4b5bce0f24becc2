"""What a `FisherMatrix` answers: from sums, kept factors, tiles; with what left out."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ird_search.errors import DataError
from ird_search.fisher import (
    Contribution,
    Engine,
    FisherMatrix,
    PassRecord,
    make_engine,
)
from ird_search.fisher.gradients import Outer
from ird_search.ledger import Ledger
from ird_search.samples import Batch, SampleSet
from ird_search.selection import top_k
from ird_search.task import Classification
from tests.cases import Case, Problem, made, named, problem
from tests.matrices import (
    CLOSE,
    HUGE,
    by_case,
    bytes_of_all_factors,
    engine_of,
    matrix_of,
    some_columns,
    true_gradients,
)
from tests.reference import fisher, per_sample_gradients, relative_error

# --- the mean gradient, beside the mean square ---------------------------------------------------


def check_moments(m: FisherMatrix, g: Tensor, density: float | None) -> None:
    """Both moments, and that the mean square has the same bits without the mean."""
    rows = torch.tensor([4, 0, 3])
    columns = None if density is None else some_columns(g.shape[1], density)
    chosen = g[rows] if columns is None else g[rows][:, columns]
    found = m.column_moments(rows, columns)
    assert relative_error(found.square, chosen.square().mean(0)) <= CLOSE
    assert found.mean is not None and found.mean.dtype == torch.float32
    assert relative_error(found.mean, chosen.mean(0)) <= CLOSE
    alone = m.column_moments(rows, columns, mean=False)
    assert alone.mean is None
    assert torch.equal(alone.square, found.square)
    assert torch.equal(m.column_scores(rows, columns), found.square)


@by_case
def test_moments_equal_the_reference_on_every_tier(case: Case) -> None:
    p, g = made(case), true_gradients(case)
    engine = engine_of(p)
    computed = FisherMatrix(engine, p.samples, p.space, cache_bytes=0)
    kept = FisherMatrix(engine, p.samples, p.space, cache_bytes=HUGE)
    kept.marginals()
    kept.cache_bytes = 0  # what is kept stays, and there is no room for a tile
    tiled = FisherMatrix(engine, p.samples, p.space, cache_bytes=HUGE)
    for density in (None, 0.02, 0.5):
        for m in (computed, kept, tiled):
            check_moments(m, g, density)
        assert computed._passes.tile is None and kept._passes.tile is None
        assert (tiled._passes.tile is None) == (density is None)
    assert kept.passes == pytest.approx(1)


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_moments_of_every_path(method: str) -> None:
    p = named("bert-sdpa")
    g = per_sample_gradients(p.model, p.task, p.samples, p.space)
    for density in (None, 0.02, 0.5):
        check_moments(matrix_of(p, method), g, density)


def test_a_tile_is_squared_before_it_is_summed() -> None:
    p = named("bert-sdpa")
    m = matrix_of(p, cache_bytes=HUGE)
    wide = some_columns(p.space.numel, 0.9)
    m.row_scores(torch.arange(6), wide)
    assert m._passes.tile is not None and m._passes.tile.values is not None
    rows = torch.tensor([5, 1, 2])
    for columns in (wide, wide[::3].contiguous(), wide[7:1000], wide[:1]):
        tile = m._passes.tile.values[rows][:, torch.isin(wide, columns)]
        squares = [one.square() for one in tile]
        sums = torch.stack([one.sum(dtype=torch.float64) for one in squares])
        assert torch.equal(m.row_scores(rows, columns), sums)
        found = m.column_moments(rows, columns)
        assert found.mean is not None
        assert torch.equal(found.square, (squares[0] + squares[1] + squares[2]).div_(3))
        assert torch.equal(found.mean, (tile[0] + tile[1] + tile[2]).div_(3))


class Interrupted:
    """An engine that stops at its n-th batch, and counts them."""

    def __init__(self, engine: Engine, at: int = 0) -> None:
        self.engine, self.at, self.batches = engine, at, 0
        self.path, self.names = engine.path, engine.names

    def gradients(self, batch: Batch) -> Iterator[Contribution]:
        self.batches += 1
        if self.batches == self.at:
            raise KeyboardInterrupt
        return self.engine.gradients(batch)


@pytest.mark.parametrize("density", [None, 0.02, 0.5])
@pytest.mark.parametrize("share", [0, 100])
def test_moments_go_on_bit_for_bit(density: float | None, share: int, tmp_path: Path) -> None:
    p = named("bert-sdpa")
    rows = torch.tensor([4, 0, 3, 1])
    columns = None if density is None else some_columns(p.space.numel, density)
    engine, memory = engine_of(p), share * 4 * p.space.numel
    settings: dict[str, Any] = {"tokens": 8, "cache_bytes": memory}
    whole = Interrupted(engine)
    wanted = FisherMatrix(whole, p.samples, p.space, **settings).column_moments(rows, columns)
    assert whole.batches >= 3
    for at in (2, whole.batches):
        ledger = Ledger(tmp_path / str(at))

        def matrix(stop: int, ledger: Ledger = ledger) -> FisherMatrix:
            record = PassRecord(ledger, {"of": "a test"}, every=0)
            return FisherMatrix(
                Interrupted(engine, stop), p.samples, p.space, record=record, **settings
            )

        # The sums of one are no sums of the other; a tile is filled alike for both.
        for mean in (True,) if share and columns is not None else (False, True):
            with pytest.raises(KeyboardInterrupt):
                matrix(at).column_moments(rows, columns, mean=mean)
        rest = matrix(0)
        found = rest.column_moments(rows, columns)
        assert found.mean is not None and wanted.mean is not None
        assert torch.equal(found.square, wanted.square)
        assert torch.equal(found.mean, wanted.mean)
        assert isinstance(rest.engine, Interrupted)
        assert rest.engine.batches == whole.batches - at + 1


@pytest.mark.parametrize("density", [None, 0.02, 0.5])
def test_memory_that_runs_out_counts_no_gradient_twice(
    density: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = named("bert-sdpa")
    g = per_sample_gradients(p.model, p.task, p.samples, p.space)
    m, calls = matrix_of(p, tokens=16), 0

    def full(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 9:  # some tensors' sums have the batch, others do not
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(*args, **more)

        return call

    for method in ("add_squares", "entries"):
        monkeypatch.setattr(Outer, method, full(getattr(Outer, method)))
    check_moments(m, g, density)
    assert calls > 9


# --- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 0.1, 0.3, 0.6, 100])
@pytest.mark.parametrize("name", ["bert-sdpa", "gpt2", "vit", "mlp"])
def test_what_is_kept_does_not_matter(name: str, share: float) -> None:
    p = named(name)
    f = fisher(p.model, p.task, p.samples, p.space)
    m = matrix_of(p, cache_bytes=int(share * bytes_of_all_factors(p)), tokens=16)
    rows, columns = torch.arange(6), None
    for n, k in ((5, 0.5), (3, 0.1), (2, 0.01)):
        scores = m.row_scores(rows, columns)
        reference = f[rows].sum(1) if columns is None else f[rows][:, columns].sum(1)
        assert relative_error(scores, reference) <= CLOSE
        rows = rows[top_k(scores, n)]
        count = int(k * p.space.numel)
        found = m.column_scores(rows, columns)
        reference = f[rows].mean(0) if columns is None else f[rows][:, columns].mean(0)
        assert relative_error(found, reference) <= CLOSE
        assert top_k(found, count).tolist() == top_k(reference.float(), count).tolist()
        chosen = top_k(found, count)
        columns = chosen if columns is None else columns[chosen]


def test_kept_rows_need_no_second_pass_and_the_others_do() -> None:
    p = named("bert-sdpa")
    whole = bytes_of_all_factors(p)
    passes = {}
    for share in (0, 0.6, 1):
        m = matrix_of(p, cache_bytes=int(share * whole), tokens=16)
        m.marginals()
        assert m.passes == pytest.approx(1)
        m.row_scores(torch.arange(6))
        passes[share] = m.passes
    assert passes[0] == pytest.approx(2)
    assert 1.1 < passes[0.6] < 1.9
    assert passes[1] == pytest.approx(1)


def test_factors_that_are_not_kept_are_freed_before_the_next_batch() -> None:
    p = named("bert-sdpa")
    over, rows = matrix_of(p, tokens=16)._passes, torch.arange(6)
    stream = (part for batch in over.plan(rows) for part in over.gradients(batch, rows))
    _, tensors = next(stream)  # a consumer's loop variable, held while the next batch runs
    factors = [weakref.ref(t) for g in tensors.values() for t in g.storages]
    next(stream)
    assert factors and all(ref() is None for ref in factors)


def test_factors_that_are_not_kept_are_freed_as_a_consumer_takes_them() -> None:
    p = named("bert-sdpa")
    over, rows = matrix_of(p, tokens=16)._passes, torch.arange(6)
    _, tensors = next(over.gradients(over.plan(rows)[0], rows))
    factors = []
    while tensors:
        factors += [weakref.ref(t) for t in tensors.popitem()[1].storages]
    assert factors and all(ref() is None for ref in factors)


def test_a_consumer_takes_nothing_from_what_is_kept() -> None:
    p = named("bert-sdpa")
    m = matrix_of(p, cache_bytes=bytes_of_all_factors(p), tokens=16)
    first, again = m.marginals(), m.marginals()
    assert m.passes == pytest.approx(1)
    assert torch.equal(first.columns, again.columns) and torch.equal(first.rows, again.rows)


def test_a_tile_answers_for_its_parts() -> None:
    p = named("bert-sdpa")
    f = fisher(p.model, p.task, p.samples, p.space)
    m = matrix_of(p, cache_bytes=4 * 6 * p.space.numel)
    wide = some_columns(p.space.numel, 0.5)
    m.row_scores(torch.arange(6), wide)
    passes = m.passes
    m._passes._kept.clear()  # what follows must come from the tile
    rows, narrow = torch.tensor([5, 1]), wide[::7].contiguous()
    assert relative_error(m.column_scores(rows, narrow), f[rows][:, narrow].mean(0)) <= CLOSE
    assert relative_error(m.row_scores(rows, narrow), f[rows][:, narrow].sum(1)) <= CLOSE
    assert m.passes == passes
    other = some_columns(p.space.numel, 0.3)  # not within the tile
    assert relative_error(m.row_scores(rows, other), f[rows][:, other].sum(1)) <= CLOSE
    assert m.passes > passes


# --- samples without a finite gradient -----------------------------------------------------------


def many(count: int, *bad: int) -> Problem:
    """A classifier, and rows of which some hold an infinity."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    inputs = [torch.randn(4) for _ in range(count)]
    for row in bad:
        inputs[row][1] = torch.inf
    samples = SampleSet(
        tuple({"input": x} for x in inputs), torch.arange(count) % 2, 1000 + torch.arange(count)
    )
    return problem(model, Classification(2), samples)


@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("cache_bytes", [0, HUGE])
def test_a_sample_without_a_finite_gradient_is_left_out(method: str, cache_bytes: int) -> None:
    # tanh(∞) = 1: the log-likelihood is finite here, and so is every output gradient.
    p = many(150, 7)
    good = torch.tensor([i for i in range(150) if i != 7])
    g = per_sample_gradients(p.model, p.task, p.samples.select(good), p.space)
    f = g.square()
    m = matrix_of(p, method, cache_bytes=cache_bytes)
    found = m.marginals()
    assert m.excluded == {7}
    assert found.rows[7] == -torch.inf
    assert relative_error(found.rows[good], f.sum(1)) <= CLOSE
    assert relative_error(found.columns, f.mean(0)) <= CLOSE
    columns, rows = torch.arange(0, p.space.numel, 3), torch.tensor([6, 7, 8])
    scores = m.row_scores(rows, columns)
    assert scores[1] == -torch.inf
    assert relative_error(scores[::2], f[6:8, columns].sum(1)) <= CLOSE
    assert relative_error(m.column_scores(rows, columns), f[6:8, columns].mean(0)) <= CLOSE
    for some in (None, columns, columns[:2]):
        mean = m.column_moments(rows, some).mean
        wanted = g[6:8].mean(0) if some is None else g[6:8, some].mean(0)
        assert mean is not None and relative_error(mean, wanted) <= CLOSE
    assert 1 not in top_k(scores, 2).tolist()


def test_a_likelihood_that_is_not_finite_counts_even_with_finite_gradients() -> None:
    class NoLikelihood(Classification):
        def log_likelihood(self, logits: Tensor, labels: Tensor) -> Tensor:
            values = super().log_likelihood(logits, labels.clamp(min=0))
            return values + torch.where(labels < 0, torch.nan, 0.0)

    p = many(120)
    p.samples.labels[5] = -100
    m = matrix_of(Problem(p.model, NoLikelihood(2), p.samples, p.space))
    m.marginals()
    assert m.excluded == {5}


@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
def test_too_many_of_them_end_the_run_and_are_named(method: str) -> None:
    p = many(150, 3, 60)
    with pytest.raises(DataError, match=r"2 of 150 samples .* more than 1%.* 1003, 1060\.") as e:
        matrix_of(p, method).marginals()
    assert e.value.exit_code == 3


@pytest.mark.parametrize("bad", [(0,), (0, 1), tuple(range(150))])
def test_a_bad_example_row_does_not_cost_the_fast_path(bad: tuple[int, ...]) -> None:
    p = many(150, *bad)
    for rows in (range(2), range(6)):
        engine = make_engine(p.model, p.task, p.space, example=p.samples.batch(rows))
        assert engine.path == "taps"
