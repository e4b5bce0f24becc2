"""Matrices F of the test cases, and everything that is read of them."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from ird_search.fisher import (
    Engine,
    FallbackWarning,
    FisherMatrix,
    make_engine,
)
from tests.cases import CASES, Case, Problem, made
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


def bytes_of_all_factors(p: Problem) -> int:
    m = matrix_of(p, cache_bytes=HUGE, tokens=16)
    m.marginals()
    return sum(m._passes._bytes.values())


def fallbacks(p: Problem, method: str = "auto") -> tuple[Engine, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine = engine_of(p, method)
    assert all(w.category is FallbackWarning for w in caught)
    return engine, [str(w.message) for w in caught]


def truth_of(p: Problem) -> Tensor:
    return fisher(p.model, p.task, p.samples, p.space)
