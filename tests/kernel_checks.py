"""The fused kernel in Triton's interpreter; `test_kernel.py` runs this where TRITON_INTERPRET=1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_kernel
from ird_search.fisher import FisherMatrix, fused, kernel, make_engine
from ird_search.fisher.columns import Columns
from ird_search.fisher.combined import Terms
from ird_search.fisher.gradients import Outer, SampleGradients
from ird_search.fisher.kernel import Tiling, add_squares
from tests import squares
from tests.cases import CASES, Case, made
from tests.reference import fisher, relative_error
from tests.squares import CLOSE, factors, gradients

SMALL = Tiling(rows=16, columns=32, tokens=16)
MODELS = [case for case in CASES if case.name in ("conv", "bert-sdpa", "gpt2", "twice")]


def check(left: Tensor, right: Tensor, **more: Any) -> None:
    squares.check(add_squares, left, right, **more)


@pytest.mark.parametrize(
    "dtypes", [(d,) for d in CLOSE] + [(torch.bfloat16, torch.float32)], ids=str
)
@pytest.mark.parametrize("sizes", [(1, 2, 1, 1), (3, 5, 16, 32), (2, 18, 33, 37)], ids=str)
def test_sums_and_scores_are_those_of_single_products(
    sizes: tuple[int, int, int, int], dtypes: tuple[torch.dtype, ...]
) -> None:
    left, right = factors(sizes, *dtypes)
    check(left, right)
    check(left, right, tiling=SMALL)


def test_factors_may_lie_in_any_order() -> None:
    left, right = factors((3, 9, 20, 40), torch.float32)
    check(left.mT.contiguous().mT, right.transpose(0, 1).contiguous().transpose(0, 1))
    check(left[:, :1].expand(3, 9, 20), right[..., ::2])


@pytest.mark.parametrize("programs", [1, 3, 4, 1000])
def test_samples_are_shared_out_in_any_number_of_parts(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "PROGRAMS", programs)
    check(*factors((7, 5, 12, 20), torch.float32))


def test_nothing_is_written_that_is_not_asked_for() -> None:
    left, right = factors((3, 5, 20, 40), torch.float32)
    g = gradients(left, right)
    assert not add_squares(left, right, scored=False).any()
    assert relative_error(add_squares(left, right), g.square().sum(1)) <= 1e-5
    sums = torch.zeros(g.shape[1])
    assert not add_squares(left, right, sums=sums, scored=False).any()
    assert relative_error(sums, g.square().sum(0)) <= 1e-5


def test_the_same_bits_again() -> None:
    left, right = factors((5, 7, 40, 40), torch.bfloat16)
    found = []
    for _ in range(2):
        sums = torch.zeros(1600)
        found.append((add_squares(left, right, sums=sums), sums))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kept", [0, 3, 300, 800], ids=lambda k: f"mask of {k}")
@pytest.mark.parametrize("mean", [False, True], ids=["squares", "and means"])
def test_a_linear_layer_takes_it(kept: int, mean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        kernel, "add_squares", lambda *a, **k: calls.append(k) or add_squares(*a, **k)
    )
    fused._tried.cache_clear()
    outer = Outer(*factors((4, 30, 20, 40), torch.float32))
    within = Columns(torch.randperm(800)[:kept].sort().values, 800)
    pairs = []
    for plain in (False, True):
        sums, means = torch.zeros(2, 800)
        add = SampleGradients.add_squares if plain else Outer.add_squares
        scores = add(outer, sums, within, means=means if mean else None)
        norms = (SampleGradients if plain else Outer).square_norms(outer, within)
        assert bool(means.any()) == mean
        pairs.append(
            (sums, means, scores, norms, (SampleGradients if plain else Outer).square_norms(outer))
        )
    fused._tried.cache_clear()
    assert len(calls) > 2  # the check of the kernel is the first
    assert "weights" not in vars(within) or 16 * kept > 800  # nothing dense is kept for it
    for found, wanted in zip(*pairs, strict=True):
        assert relative_error(found, wanted) <= 1e-5 or not (found.any() or wanted.any())


def test_terms_take_it() -> None:
    """Squares of several gradients a sample."""
    parts = [factors((3, 6, 10, 20), torch.float32, seed=s) for s in range(2)]
    sums = torch.zeros(200)
    scores = Terms(tuple(Outer(*p) for p in parts)).add_squares(sums)
    squares = sum(gradients(*p).square() for p in parts)
    assert relative_error(sums, squares.sum(0)) <= 1e-5
    assert relative_error(scores, squares.sum(1)) <= 1e-5


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_a_model_has_the_scores_of_plain_autograd(case: Case) -> None:
    p = made(case)
    engine = make_engine(p.model, p.task, p.space, example=p.samples.batch(range(len(p.samples))))
    assert engine.path == "taps"
    truth = fisher(p.model, p.task, p.samples, p.space)
    matrix = FisherMatrix(engine, p.samples, p.space, cache_bytes=0)
    mask = torch.arange(0, p.space.numel, 3)
    found = matrix.marginals(within=mask)
    assert relative_error(found.columns, truth.mean(0)) <= 1e-5
    assert relative_error(found.rows, truth[:, mask].sum(1)) <= 1e-5


def test_its_benchmark_runs(capsys: pytest.CaptureFixture[str]) -> None:
    bench_kernel.main(["--smoke", "--rounds", "1", "--dtypes", "bfloat16"])
    assert "smoke: one plain gradient 1.00" in capsys.readouterr().out
