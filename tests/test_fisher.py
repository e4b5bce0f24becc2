"""The Fisher engine: all paths are one matrix, F[i, j] = (∂ log p(yᵢ | xᵢ; θ) / ∂θⱼ)²."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from ird_search.errors import DataError
from ird_search.fisher import (
    Contribution,
    Engine,
    FallbackWarning,
    FisherMatrix,
    PassRecord,
    make_engine,
    register_rule,
    rules,
)
from ird_search.fisher.columns import Columns
from ird_search.fisher.combined import Added, added
from ird_search.fisher.engine import Elsewhere as Visiting
from ird_search.fisher.engine import Joined
from ird_search.fisher.gradients import Dense, Lookup, Outer, SampleGradients
from ird_search.fisher.loop import Loop
from ird_search.fisher.taps import Taps
from ird_search.fisher.vmap import VMap
from ird_search.ledger import Ledger
from ird_search.parameters import ParameterSpace
from ird_search.samples import Batch, SampleSet
from ird_search.selection import top_k
from ird_search.task import Classification
from tests.cases import CASES, Case, Problem, made, named, problem, texts, vectors
from tests.reference import fisher, per_sample_gradients, relative_error

CLOSE = 1e-5
HUGE = 2**40
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@cache
def true_gradients(case: Case) -> Tensor:
    p = made(case)
    return per_sample_gradients(p.model, p.task, p.samples, p.space)


def truth(case: Case) -> Tensor:
    return true_gradients(case).square()


def engine_of(p: Problem, method: str = "auto", device: str = "cpu") -> Engine:
    example = p.samples.batch(range(len(p.samples)), device)
    return make_engine(p.model, p.task, p.space, example=example, method=method)


def matrix_of(p: Problem, method: str = "auto", **settings: Any) -> FisherMatrix:
    return FisherMatrix(engine_of(p, method), p.samples, p.space, **{"cache_bytes": 0} | settings)


def some_columns(p: int, density: float) -> Tensor:
    generator = torch.Generator().manual_seed(int(1000 * density))
    return torch.randperm(p, generator=generator)[: max(1, int(density * p))].sort().values


def check_matrix(m: FisherMatrix, f: Tensor) -> None:
    """Everything that the search reads of F."""
    rows = torch.tensor([4, 0, 3])
    everything = m.marginals()
    assert relative_error(everything.columns, f.mean(0)) <= CLOSE
    assert relative_error(everything.rows, f.sum(1)) <= CLOSE
    assert relative_error(m.row_scores(rows), f[rows].sum(1)) <= CLOSE
    for density in (0.02, 0.5):  # few entries are sampled, many are read from the whole
        columns = some_columns(f.shape[1], density)
        both = m.marginals(rows, within=columns)
        assert relative_error(both.rows, f[rows][:, columns].sum(1)) <= CLOSE
        assert relative_error(both.columns, f[rows].mean(0)) <= CLOSE
        assert relative_error(m.row_scores(rows, columns), f[rows][:, columns].sum(1)) <= CLOSE
        assert relative_error(m.column_scores(rows, columns), f[rows][:, columns].mean(0)) <= CLOSE
    assert relative_error(m.column_scores(rows), f[rows].mean(0)) <= CLOSE


# --- every path equals plain autograd, row by row, unpadded -----------------------------------


@by_case
@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
def test_paths_equal_the_reference(case: Case, method: str) -> None:
    m = matrix_of(made(case), method)
    assert m.engine.path == (case.path if method == "auto" else method)
    check_matrix(m, truth(case))


@by_case
def test_entries_and_dense_forms_agree(case: Case) -> None:
    p = made(case)
    wanted = per_sample_gradients(p.model, p.task, p.samples, p.space)
    rows = [4, 0, 2]
    for c in engine_of(p).gradients(p.samples.batch(rows)):
        assert bool(c.finite.all())
        assert set(c.tensors) == set(p.space.names)
        for name, gradients in c.tensors.items():
            truth_here = wanted[rows][c.part][:, p.space.span(name)].float()
            # An attention key's bias has no gradient but rounding noise.
            noise = {"atol": 1e-6 * float(wanted.abs().max()), "rtol": 1e-4}
            torch.testing.assert_close(gradients.dense(), truth_here, **noise)
            for density in (0.05, 0.6, 1.0):
                index = some_columns(truth_here.shape[1], density)
                found = gradients.entries(Columns(index, truth_here.shape[1]))
                torch.testing.assert_close(found, truth_here[:, index], **noise)
            turned = gradients.select(torch.arange(gradients.batch).flip(0))
            torch.testing.assert_close(turned.dense(), truth_here.flip(0), **noise)


def test_softmax_regression_has_a_closed_form() -> None:
    # ∇_W log p(y | x) = (e_y − p) xᵀ, so F_W = (e_y − p)² ⊗ x² and F_b = (e_y − p)².
    p = problem(nn.Linear(5, 3), Classification(3), vectors(5))
    x = torch.stack([row["input"] for row in p.samples.inputs])
    error = (nn.functional.one_hot(p.samples.labels) - p.model(x).softmax(-1)).detach().square()
    weight = (error[:, :, None] * x.square()[:, None, :]).flatten(1)
    closed = torch.cat([weight, error], 1)
    found = matrix_of(p).marginals()
    assert relative_error(found.columns, closed.mean(0)) <= CLOSE
    assert relative_error(found.rows, closed.sum(1)) <= CLOSE


@by_case
def test_mean_of_sample_gradients_is_the_batch_gradient(case: Case) -> None:
    p = made(case)
    batch = p.samples.batch(range(6))
    sums = dict.fromkeys(p.space.names, 0.0)
    for c in engine_of(p).gradients(batch):
        for name, gradients in c.tensors.items():
            sums[name] = sums[name] + gradients.dense().sum(0)
    for q in p.model.parameters():
        q.requires_grad_(True)
    inputs = batch.inputs["input"] if set(batch.inputs) == {"input"} else None
    out = p.model(inputs) if inputs is not None else p.model(**batch.inputs).logits
    p.task.log_likelihood(out, batch.labels).sum().backward()
    weights = dict(p.model.named_parameters())
    whole = torch.cat([weights[n].grad.reshape(-1) for n in p.space.names])
    ours = torch.cat([sums[n] for n in p.space.names])
    assert relative_error(ours, whole) <= CLOSE


def test_squares_are_taken_per_sample_not_of_the_batch_sum() -> None:
    p = named("bert-sdpa")
    gradients = per_sample_gradients(p.model, p.task, p.samples, p.space)
    ours = matrix_of(p).marginals().columns
    assert relative_error(ours, gradients.sum(0).square() / len(gradients)) > 0.1


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


# --- what must not matter ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("name", ["bert-sdpa", "gpt2", "vit"])
def test_batch_size_and_order_do_not_matter(name: str, method: str) -> None:
    p, rows = named(name), torch.arange(6)
    wanted = matrix_of(p, method).marginals()
    mean = matrix_of(p, method).column_moments(rows).mean
    assert mean is not None
    for tokens in (1, 12, 10_000):
        m = matrix_of(p, method, tokens=tokens)
        found, moments = m.marginals(), m.column_moments(rows)
        assert relative_error(found.columns, wanted.columns) <= CLOSE
        assert relative_error(found.rows, wanted.rows) <= CLOSE
        assert moments.mean is not None and relative_error(moments.mean, mean) <= CLOSE
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    turned = Problem(p.model, p.task, p.samples.select(order), p.space)
    m = matrix_of(turned, method)
    found, moments = m.marginals(), m.column_moments(rows)
    assert relative_error(found.columns, wanted.columns) <= CLOSE
    assert relative_error(found.rows, wanted.rows[order]) <= CLOSE
    assert moments.mean is not None and relative_error(moments.mean, mean) <= CLOSE


@pytest.mark.parametrize("method", ["auto", "vmap"])
def test_padding_does_not_matter(method: str) -> None:
    p = named("bert-sdpa")
    engine = engine_of(p, method)
    alone, padded = p.samples.batch([1]), p.samples.batch([1, 2])
    assert padded.inputs["input_ids"].shape[1] > alone.inputs["input_ids"].shape[1]
    first = next(iter(engine.gradients(alone))).tensors
    second = next(iter(engine.gradients(padded))).tensors
    for name in p.space.names:
        torch.testing.assert_close(
            second[name].dense()[0], first[name].dense()[0], rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize("chunk", [1, 2, 4, 6])
def test_vmap_chunk_does_not_matter(chunk: int) -> None:
    p = named("bert-sdpa")
    f = fisher(p.model, p.task, p.samples, p.space)
    engine = VMap(p.model, p.task, p.space.names, chunk=chunk)
    found = FisherMatrix(engine, p.samples, p.space, cache_bytes=0).marginals()
    assert relative_error(found.columns, f.mean(0)) <= CLOSE
    assert relative_error(found.rows, f.sum(1)) <= CLOSE


@by_case
def test_rows_and_columns_have_one_total(case: Case) -> None:
    found = matrix_of(made(case)).marginals()
    total = float(found.rows.sum())
    assert float(found.columns.double().sum()) * 6 == pytest.approx(total, rel=1e-6)


def bytes_of_all_factors(p: Problem) -> int:
    m = matrix_of(p, cache_bytes=HUGE, tokens=16)
    m.marginals()
    return sum(m._passes._bytes.values())


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


# --- fallbacks -----------------------------------------------------------------------------------


class Mixing(nn.Module):
    """Samples of a batch see one another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, input: Tensor) -> Tensor:
        x = self.first(input)
        return self.out(torch.tanh(x - x.mean(0)) if len(x) > 1 else torch.tanh(x))


class Elsewhere(nn.Module):
    """A weight used by its module and by a function: a tap sees one use of two."""

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(4, 4), nn.Linear(4, 2)
        self.share = share

    def forward(self, input: Tensor) -> Tensor:
        x = torch.tanh(self.first(input))
        return self.out(x + self.share * nn.functional.linear(input, self.first.weight))


class ByValue(nn.Module):
    """A branch on a value, which vmap cannot take."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(4)), nn.Linear(4, 2)

    def forward(self, input: Tensor) -> Tensor:
        return self.out(input * self.weight) if input.sum().item() < 1e9 else self.out(input)


def fallbacks(p: Problem, method: str = "auto") -> tuple[Engine, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = engine_of(p, method)
    assert all(w.category is FallbackWarning for w in caught)
    return engine, [str(w.message) for w in caught]


@pytest.mark.parametrize("share", [1.0, 0.01])
def test_a_weight_used_elsewhere_falls_back_to_vmap(share: float) -> None:
    p = problem(Elsewhere(share), Classification(2), vectors(4, classes=2))
    engine, told = fallbacks(p)
    assert engine.path == "vmap"
    assert len(told) == 1
    assert "On Elsewhere the Fisher path 'vmap' is used: 'taps' is off the loop by" in told[0]
    check_matrix(FisherMatrix(engine, p.samples, p.space, cache_bytes=0), _truth(p))


def test_a_model_that_mixes_samples_falls_back() -> None:
    p = problem(Mixing(), Classification(2), vectors(4, classes=2))
    engine, told = fallbacks(p)
    assert (engine.path, len(told)) == ("vmap", 1)
    check_matrix(FisherMatrix(engine, p.samples, p.space, cache_bytes=0), _truth(p))


def test_a_model_that_branches_on_values_ends_on_the_loop() -> None:
    p = problem(ByValue(), Classification(2), vectors(4, classes=2))
    engine, told = fallbacks(p)
    assert engine.path == "loop"
    (one,) = told  # one warning, which names both
    assert one.startswith("On ByValue the Fisher path 'loop' is used: 'taps' ")
    assert "; 'vmap' fails in the model (ByValue): RuntimeError: vmap" in one
    check_matrix(FisherMatrix(engine, p.samples, p.space, cache_bytes=0), _truth(p))


def test_the_method_is_respected() -> None:
    p = named("mlp")
    assert [engine_of(p, m).path for m in ("auto", "taps", "vmap", "loop")] == [
        "taps",
        "taps",
        "vmap",
        "loop",
    ]
    assert (
        fallbacks(problem(ByValue(), Classification(2), vectors(4, classes=2)), "vmap")[0].path
        == "loop"
    )


def test_a_small_tensor_that_is_wrong_is_noticed() -> None:
    # 0.1% of the gradient: an error of the whole that a tolerance on the whole would pass.
    class Quiet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud, self.quiet = nn.Linear(4, 2), nn.Linear(4, 2, bias=False)

        def forward(self, input: Tensor) -> Tensor:
            hidden = self.quiet(1e-4 * input)
            return self.loud(input) + hidden + nn.functional.linear(input, self.quiet.weight) * 1e-4

    engine, told = fallbacks(problem(Quiet(), Classification(2), vectors(4, classes=2)))
    assert (engine.path, len(told)) == ("vmap", 1)


def _truth(p: Problem) -> Tensor:
    return fisher(p.model, p.task, p.samples, p.space)


# --- the model is left as it was -----------------------------------------------------------------


def state_of(model: nn.Module) -> tuple[Any, ...]:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    config = getattr(model, "config", None)
    return hooks, flags, model.training, getattr(config, "_attn_implementation", None)


@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("name", ["bert-eager", "bert-sdpa", "vit", "frozen", "candidate-frozen"])
def test_the_model_is_left_as_it_was(name: str, method: str) -> None:
    p = named(name)
    before, weights = state_of(p.model), copy.deepcopy(p.model.state_dict())
    matrix_of(p, method).marginals()
    assert state_of(p.model) == before
    assert all(torch.equal(w, p.model.state_dict()[n]) for n, w in weights.items())


class Trips(Classification):
    """Fails in the middle of a pass."""

    def log_likelihood(self, logits: Tensor, labels: Tensor) -> Tensor:
        raise RuntimeError("tripped")


@pytest.mark.parametrize("method", ["taps", "vmap", "loop"])
def test_the_model_is_left_as_it_was_after_an_exception(method: str) -> None:
    p = named("frozen")
    frozen = ParameterSpace.of(p.model)
    before = state_of(p.model)
    batch = p.samples.batch([0, 1])
    engines = {
        "taps": lambda: Taps(p.model, Trips(2), frozen.names, example=batch),
        "vmap": lambda: VMap(p.model, Trips(2), frozen.names),
        "loop": lambda: Loop(p.model, Trips(2), frozen.names),
    }
    with pytest.raises(RuntimeError, match="tripped"):
        list(engines[method]().gradients(batch))
    assert state_of(p.model) == before


def test_the_check_runs_in_full_precision_and_gives_the_users_back() -> None:
    seen = []

    class Watches(Classification):
        def log_likelihood(self, logits: Tensor, labels: Tensor) -> Tensor:
            seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
            return super().log_likelihood(logits, labels)

    p = named("mlp")
    torch.set_float32_matmul_precision("high")
    try:
        engine_of(Problem(p.model, Watches(3), p.samples, p.space))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen and set(seen) == {("highest", False)}
    assert torch.backends.cudnn.allow_tf32


def test_a_model_that_fails_in_the_forward_pass_keeps_no_hook() -> None:
    p = named("bert-sdpa")
    before = state_of(p.model)
    bad = Batch({"input_ids": torch.full((2, 3), 10**6)}, torch.zeros(2).long(), torch.arange(2))
    with pytest.raises(IndexError):
        Taps(p.model, p.task, p.space.names, example=bad)
    assert state_of(p.model) == before


# --- half precision, rules of one's own ----------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "loop"])
def test_half_precision_weights_are_summed_in_float32(method: str) -> None:
    p = named("bert-sdpa")
    p.model.bfloat16()
    half = _truth(p)
    m = matrix_of(p, method)
    found = m.marginals()
    assert (m.engine.path, found.columns.dtype) == (
        "taps" if method == "auto" else method,
        torch.float32,
    )
    assert relative_error(found.columns, half.mean(0)) <= 5e-2
    # 540 rows: a sum in bfloat16 stops growing after 256 equal terms.
    often = p.samples.select(torch.arange(540) % 6)
    many_sums = FisherMatrix(m.engine, often, p.space, cache_bytes=0).marginals()
    assert relative_error(many_sums.columns, found.columns) <= 1e-2


class Mixed(nn.Module):
    """A module of one's own, with a child, and a weight larger than what it answers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) @ self.weight


def test_a_rule_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    p = problem(nn.Sequential(Mixed(), nn.Linear(5, 2)), Classification(2), vectors(5, classes=2))
    assert engine_of(p).path == "taps+vmap"
    register_rule(Mixed, lambda m, a, g: {"weight": Outer(m.act(a)[:, None], g[:, None])})
    m = matrix_of(p)
    assert m.engine.path == "taps"
    check_matrix(m, _truth(p))


def test_a_rule_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    register_rule(Mixed, lambda m, a, g: {"weight": Outer(a[:, None], g[:, None])})
    p = problem(nn.Sequential(Mixed(), nn.Linear(5, 2)), Classification(2), vectors(5, classes=2))
    engine, told = fallbacks(p)
    assert (engine.path, len(told)) == ("vmap", 1)


# --- modules that are called again ---------------------------------------------------------------


class Positions(nn.Embedding):
    """BART's: an offset, and an axis of samples that comes from the shape alone."""

    def forward(self, ids: Tensor, past: int = 0) -> Tensor:
        at = torch.arange(past, past + ids.shape[1]).expand(len(ids), -1)
        return super().forward(at + 2)


class Sliced(nn.Embedding):
    """No axis of samples, and a padding row that learns: no embedding function knows of it."""

    def forward(self, ids: Tensor, past: int = 0) -> Tensor:
        return self.weight[past : past + ids.shape[1]]


class Counted(nn.Embedding):
    """OPT's: positions counted from what is not padding, scaled."""

    def forward(self, ids: Tensor, past: int = 0) -> Tensor:
        return 3.5 * super().forward((ids > 0).cumsum(1) * (ids > 0) + past)


class Lengths(nn.Embedding):
    """Row v twice as long as the one before: a scale of the row, not of the table."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids % 5) * 2.0 ** (ids % 5)[..., None]


class Normed(nn.Embedding):
    """Rows of length one: s depends on the table."""

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(ids), dim=-1)


class Shifted(nn.Embedding):
    """W[i] + 1 is no multiple of a row."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + 1


class Centred(nn.Embedding):
    """Columns that see one another, in a linear way."""

    def forward(self, ids: Tensor) -> Tensor:
        rows = super().forward(ids)
        return rows - rows.mean(-1, keepdim=True)


class Bags(nn.Embedding):
    """Two rows for a token."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + super().forward(ids + 1)


class Read(nn.Module):
    """Words, and another table beside them."""

    def __init__(self, table: nn.Embedding, *more: object) -> None:
        super().__init__()
        self.words, self.table, self.out = nn.Embedding(40, 6), table, nn.Linear(6, 2)
        self.more = more

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        ids, mask = input_ids * attention_mask, attention_mask[..., None]
        x = torch.tanh(self.words(ids) + self.table(ids, *self.more))
        return self.out((x * mask).sum(1) / mask.sum(1))


@pytest.mark.parametrize(
    ("table", "more", "form"),
    [
        (Positions(20, 6), (), Lookup),
        (Positions(20, 6), (3,), Lookup),
        (Sliced(20, 6), (), Lookup),
        (Sliced(20, 6, padding_idx=1), (1,), Lookup),
        (Counted(20, 6, padding_idx=2), (1,), Lookup),
        (Lengths(5, 6), (), Lookup),
        (Lengths(5, 6, padding_idx=1), (), Lookup),
        (Counted(20, 6, scale_grad_by_freq=True), (0,), Dense),
        (Normed(40, 6), (), Dense),
        (Shifted(40, 6), (), Dense),
        (Centred(40, 6), (), Dense),
        (Bags(41, 6), (), Dense),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_tables_that_are_read_in_ways_of_their_own(
    table: nn.Embedding, more: tuple[object, ...], form: type[SampleGradients]
) -> None:
    p = problem(Read(table, *more), Classification(2), texts())
    m = matrix_of(p)
    assert m.engine.path == "taps"
    (c,) = m.engine.gradients(p.samples.batch(range(6)))
    assert type(c.tensors["table.weight"]) is form
    check_matrix(m, _truth(p))


def test_positions_without_samples_when_every_row_is_one_token_long() -> None:
    """[T, d] = [1, d] looks like a broadcast row of samples."""
    p = problem(Read(Sliced(20, 6)), Classification(2), texts())
    engine = engine_of(p)
    short = p.samples.batch([1])
    one = Batch(
        {k: v[:, :1].repeat(3, 1) for k, v in short.inputs.items()},
        torch.arange(3) % 2,
        short.rows.repeat(3),
    )
    (ours,) = engine.gradients(one)
    for row, theirs in enumerate(Loop(p.model, p.task, p.space.names).gradients(one)):
        for name, g in theirs.tensors.items():
            torch.testing.assert_close(ours.tensors[name].dense()[row], g.dense()[0])


class Held(nn.Module):
    """Parameters of its own, in a dictionary and tied to a child's, beside children that learn."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.act = nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh()
        self.factors = nn.ParameterDict({"one": nn.Parameter(torch.randn(4))})
        self.scale = self.norm.weight

    def forward(self, x: Tensor, mask: Tensor, *, power: int = 1) -> Tensor:
        return self.act(self.norm(self.inner(x))) * self.factors["one"] ** power * self.scale + mask


class Holds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.held, self.out = nn.Linear(4, 4), Held(), nn.Linear(4, 2)

    def forward(self, input: Tensor) -> Tensor:
        x = self.first(input)
        return self.out(self.held(self.held(x, x.relu(), power=2), x))


class Probes(nn.Module):
    """A layer that is also asked for its weight, as DoRA does: no gradient flows back there."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, input: Tensor) -> Tensor:
        size = self.layer(torch.eye(4)).detach().norm()
        return self.out(torch.tanh(self.layer(input)) / size)


@pytest.mark.parametrize("model", [Holds, Probes])
def test_modules_with_parameters_of_their_own(model: type[nn.Module]) -> None:
    p = problem(model(), Classification(2), vectors(4, classes=2))
    m = matrix_of(p)
    assert m.engine.path == "taps"
    check_matrix(m, _truth(p))


class Squared(torch.autograd.Function):
    """An operation that `torch.func` refuses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Squared.apply(x)


def test_an_operation_that_knows_plain_autograd_alone() -> None:
    """As 4-bit linear layers, and many fused kernels, are written."""
    model = nn.Sequential(nn.Linear(4, 4), Square(), nn.Linear(4, 2))
    p = problem(model, Classification(2), vectors(4, classes=2))
    m = matrix_of(p)
    assert m.engine.path == "taps"
    check_matrix(m, _truth(p))
    assert all(w.requires_grad and w.grad is None for w in p.model.parameters())
    with pytest.warns(FallbackWarning, match="setup_context"):
        assert engine_of(p, "vmap").path == "loop"


class Branching(nn.Module):
    """A factor that vmap cannot reach, in a module that branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.act = nn.Parameter(torch.randn(4)), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) * self.factor if x.sum().item() < 1e9 else x


def test_a_module_that_cannot_be_called_again_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Branching(), nn.Linear(4, 2))
    p = problem(model, Classification(2), vectors(4, classes=2))
    taps = Taps(p.model, p.task, p.space.names, example=p.samples.batch(range(6)))
    assert taps.uncovered == ("1.factor",)
    engine, told = fallbacks(p)
    assert engine.path == "loop" and len(told) == 1
    for path in ("taps", "vmap"):
        assert f"{path!r} fails in 1 (Branching): RuntimeError: vmap" in told[0]
    hooks = [h for m in p.model.modules() for h in (m._forward_pre_hooks, m._forward_hooks)]
    assert not any(hooks)


def check_marginals(m: FisherMatrix, f: Tensor) -> None:
    found = m.marginals()
    assert relative_error(found.columns, f.mean(0)) <= CLOSE
    assert relative_error(found.rows, f.sum(1)) <= CLOSE


class Deep(nn.Module):
    """As many steps as a sample's first token says; a branch for those with a token above 30."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.step, self.rare = nn.Embedding(40, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask[..., None]
        h = (self.table(input_ids) * mask).sum(1) / mask.sum(1)
        depth, rare = input_ids[:, :1] % 4, input_ids.amax(1, keepdim=True) > 30
        h = h + self.rare(h)
        for t in range(int(depth.max())):
            h = torch.where(t < depth, self.step(h).tanh(), h)
        if rare.any():
            h = torch.where(rare, self.rare(h), h)
        return self.out(h)


@pytest.mark.parametrize("joined", [False, True], ids=["taps", "joined"])
@pytest.mark.parametrize("depths", [(2, 2, 2, 3, 3, 1), (3, 3, 3, 1, 0, 2)], ids=str)
def test_batches_that_call_modules_otherwise_than_the_first_rows(
    depths: tuple[int, ...], joined: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """More calls, fewer, none, and a branch that only later rows take."""
    samples = texts()
    for row, depth, token in zip(samples.inputs, depths, (9, 9, 9, 33, 9, 33), strict=True):
        row["input_ids"][:] = 9
        row["input_ids"][-1], row["input_ids"][0] = token, 4 + depth
    p = problem(Deep(), Classification(2), samples)
    example, names = p.samples.batch([0, 1, 2]), p.space.names
    engine = make_engine(p.model, p.task, p.space, example=example)
    assert engine.path == "taps"
    if joined:
        taps = Taps(p.model, p.task, names[:-2], example=example)
        engine = Joined(taps, Loop(p.model, p.task, names[-2:]))
    for tokens in (1, 1000):  # one row a batch, and all of them
        m = FisherMatrix(engine, p.samples, p.space, tokens=tokens, cache_bytes=0)
        check_marginals(m, _truth(p))
    assert m.path == Visiting(engine, nullcontext).path == "taps+loop"
    assert "(Linear) is called otherwise in some batches" in caplog.text
    assert all(w.requires_grad for w in p.model.parameters())


class Masked(nn.Module):
    """Scores of tokens; a mask only where one is needed, as attention in transformers has it."""

    def __init__(self, broadcast: bool) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(40, 6), Inner()
        self.out, self.broadcast = nn.Linear(6, 2), broadcast

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        whole = bool(attention_mask.all())
        x = self.table(input_ids)
        if self.broadcast:
            given = attention_mask[:1] if whole else attention_mask
        else:
            given = None if whole else attention_mask
        return self.out(self.inner(x, given))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor, self.act = nn.Parameter(torch.randn(6)), nn.Tanh()

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        weight = torch.ones(x.shape[:2]) if mask is None else mask.float()
        return self.act((x * weight[..., None]).sum(1)) * self.factor


@pytest.mark.parametrize("first", [[0, 1, 2], [3, 4, 5]], ids=["equal", "uneven"])
@pytest.mark.parametrize("broadcast", [False, True], ids=["no mask", "one for all"])
def test_a_mask_that_only_padded_batches_have(broadcast: bool, first: list[int]) -> None:
    rows = [torch.randint(5, 40, (n,)) for n in (4, 4, 4, 2, 5, 7)]
    inputs = tuple({"input_ids": r, "attention_mask": torch.ones_like(r)} for r in rows)
    samples = SampleSet(inputs, torch.arange(6) % 2, torch.arange(6))
    p = problem(Masked(broadcast), Classification(2), samples)
    engine = make_engine(p.model, p.task, p.space, example=p.samples.batch(first))
    assert engine.path == "taps"
    for tokens in (1, 9, 1000):  # batches of one, of two, and of all
        m = FisherMatrix(engine, p.samples, p.space, tokens=tokens, cache_bytes=0)
        check_marginals(m, _truth(p))


def test_a_reparametrised_weight() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2))
    p = problem(model, Classification(2), vectors(4, classes=2))
    m = matrix_of(p)
    assert m.engine.path == "taps+vmap"
    check_matrix(m, _truth(p))


def test_embedding_tables_with_settings() -> None:
    class Table(nn.Module):
        def __init__(self, **settings: Any) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(40, 6, **settings), nn.Linear(6, 2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            mask = attention_mask[..., None]
            return self.out((self.table(input_ids) * mask).sum(1) / mask.sum(1))

    samples = texts()
    samples.inputs[0]["input_ids"][:] = 7  # one token, five times
    # The last divides by a token's count in the sample, which the embedding's own rule cannot see.
    for settings in ({}, {"padding_idx": 7}, {"scale_grad_by_freq": True}):
        p = problem(Table(**settings), Classification(2), samples)
        m = matrix_of(p)
        assert m.engine.path == "taps"
        check_matrix(m, _truth(p))


# --- the forms of a gradient ---------------------------------------------------------------------


def forms() -> Iterator[tuple[str, SampleGradients]]:
    ids = torch.tensor([[1, 3, 1, -1], [0, 0, 4, 2], [4, 4, 4, 4]])
    outer = Outer(torch.randn(3, 4, 5), torch.randn(3, 4, 6))
    lookup = Lookup(ids, torch.randn(3, 4, 6), 5)
    yield "dense", Dense(torch.randn(3, 30))
    yield "outer", outer
    yield "one token", Outer(torch.randn(3, 1, 5), torch.randn(3, 1, 6))
    yield "few tokens", Outer(torch.randn(3, 2, 5), torch.randn(3, 2, 6))
    yield "lookup", lookup
    yield "added", added([outer, lookup])
    yield "two outers", added([outer, Outer(torch.randn(3, 1, 5), torch.randn(3, 1, 6))])
    yield "two lookups", added([lookup, Lookup(ids.flip(0), torch.randn(3, 4, 6), 5)])


@pytest.mark.parametrize(("name", "gradients"), forms(), ids=lambda x: x if type(x) is str else "")
def test_forms_of_a_gradient_answer_alike(name: str, gradients: SampleGradients) -> None:
    g = gradients.dense()
    for k in (0, 1, 3, 15, 30):
        columns = Columns(torch.randperm(30)[:k].sort().values, 30)
        f = g[:, columns.index].square()
        sums, with_means, means = torch.ones(30), torch.ones(30), torch.ones(30)
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(gradients.entries(columns), g[:, columns.index])
        torch.testing.assert_close(gradients.add_squares(sums, columns), f.sum(1), **close)
        torch.testing.assert_close(sums, 1 + g.square().sum(0), **close)
        again = gradients.add_squares(with_means, columns, means=means)
        torch.testing.assert_close(means, 1 + g.sum(0), **close)
        assert torch.equal(with_means, sums)
        assert torch.equal(again, gradients.add_squares(torch.ones(30), columns))
        torch.testing.assert_close(gradients.square_norms(columns), f.sum(1), **close)
    torch.testing.assert_close(gradients.square_norms(), g.square().sum(1), **close)
    torch.testing.assert_close(gradients.select(slice(1, 3)).dense(), g[1:])
    torch.testing.assert_close(gradients.select(torch.tensor([2, 0])).dense(), g[[2, 0]])


def test_uses_of_unlike_forms_are_added_before_they_are_squared() -> None:
    outer, lookup = dict(forms())["outer"], dict(forms())["lookup"]
    both = added([outer, lookup])
    assert isinstance(both, Added)
    torch.testing.assert_close(both.dense(), outer.dense() + lookup.dense())


# --- on an accelerator ---------------------------------------------------------------------------


@pytest.mark.gpu
@by_case
def test_paths_equal_the_reference_on_cuda(case: Case, cuda: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    f = truth(case)
    p = made(case)
    p.model.to(cuda)
    for method in ("auto", "vmap", "loop"):
        m = FisherMatrix(engine_of(p, method, cuda), p.samples, p.space, cache_bytes=0, device=cuda)
        check_matrix(m, f)
        mean = m.column_moments(torch.arange(6)).mean
        assert mean is not None and relative_error(mean, true_gradients(case).mean(0)) <= CLOSE
