"""Bootstraps of the rows, and how many rows it takes, against F as an explicit matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ird_search import search_mask
from ird_search.budgets import Budgets
from ird_search.fisher import FisherMatrix, make_engine
from ird_search.fisher import matrix as matrix_module
from ird_search.mask import SparseMask
from ird_search.pair import Pair
from ird_search.reading import Reading
from ird_search.selection import top_k
from ird_search.selector import Selector
from ird_search.stability import Stability, bootstrapped, settled
from tests.cases import Problem, named
from tests.reference import per_sample_gradients
from tests.toy import QUICK, DenseFisher, toy_net, toy_rows


def opened(p: Problem, cache: int = 2**30) -> FisherMatrix:
    engine = make_engine(p.model, p.task, p.space, example=p.samples.batch(range(6)))
    return FisherMatrix(engine, p.samples, p.space, cache_bytes=cache)


@pytest.mark.parametrize("cache", [2**30, 0])
@pytest.mark.parametrize("criterion", ["fisher", "mean", "snr"])
def test_bootstraps_by_the_definition(criterion: Any, cache: int) -> None:
    p, reading, k = named("mlp"), Reading(criterion), 9
    fisher, g = opened(p, cache), per_sample_gradients(p.model, p.task, p.samples, p.space)
    rows = torch.arange(6)
    selector = Selector(Budgets.of(p.space, ()))
    mask = selector.mask(fisher, rows, k, reading)
    pair = Pair(rows, None, mask.coords, reading=reading)
    found = bootstrapped(fisher, selector, pair, mask, bootstraps=7, seed=3)
    counts = np.random.default_rng(3).multinomial(6, np.full(6, 1 / 6), size=7)
    inclusion, overlaps = torch.zeros(k), []
    for drawn in counts:
        again = g[torch.arange(6).repeat_interleave(torch.from_numpy(drawn))]
        square, mean = again.square().mean(0), again.mean(0).abs()
        scores = {"fisher": square, "mean": mean, "snr": mean / square.sqrt()}[criterion]
        taken = set(top_k(scores.nan_to_num(), k).tolist())
        ours = mask.coords.tolist()
        inclusion += torch.tensor([j in taken for j in ours])
        overlaps.append(len(taken & set(ours)) / len(taken | set(ours)))
    assert found.overlaps == pytest.approx(overlaps)
    assert torch.allclose(found.inclusion, inclusion / 7)


def test_rows_that_agree_give_a_stable_mask_and_rows_that_differ_do_not() -> None:
    p = named("mlp")
    fisher, selector = opened(p), Selector(Budgets.of(p.space, ()))

    def overlap(rows: Tensor) -> float:
        mask = selector.mask(fisher, rows, 10, Reading())
        pair = Pair(rows, None, mask.coords)
        return bootstrapped(fisher, selector, pair, mask, bootstraps=20, seed=0).overlap

    assert overlap(torch.tensor([2])) == 1.0  # one row can only be drawn again
    assert overlap(torch.arange(6)) < 1.0


def test_a_narrow_range_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bootstraps choose from a cut range: on a mask of this size that changes nothing."""
    p = named("bert-sdpa")
    selector = Selector(Budgets.of(p.space, ()))
    found = []
    for least in (2**28, 4 * 6 * 400):
        monkeypatch.setattr(matrix_module, "LEAST_TILE", least)
        fisher = opened(p, 0)
        mask = selector.mask(fisher, torch.arange(6), 40, Reading())
        pair = Pair(torch.arange(6), None, mask.coords)
        found.append(bootstrapped(fisher, selector, pair, mask, bootstraps=10, seed=0))
    assert found[0].overlaps == found[1].overlaps


def test_what_is_told_and_stored() -> None:
    mask = SparseMask(named("mlp").space, torch.tensor([0, 1, 7]))
    stability = Stability((0.5, 1.0), torch.tensor([1.0, 0.5, 1.0]), 0.25)
    again = Stability.of_unit(stability.to_unit())
    assert again.overlaps == stability.overlaps and torch.equal(
        again.inclusion, stability.inclusion
    )
    by_name = stability.by_parameter(mask)
    assert torch.cat(list(by_name.values())).tolist() == [1.0, 0.5, 1.0]
    assert "2 bootstraps of the rows share 75%" in str(stability)
    assert "67% of its entries" in str(stability)
    assert "No bootstraps" in str(Stability((), torch.zeros(3), 0.1))


def test_rows_are_drawn_until_the_mask_has_settled() -> None:
    g = torch.Generator().manual_seed(0)
    steady = torch.rand(1, 400, generator=g) + 0.2 * torch.rand(256, 400, generator=g)
    fisher: Any = DenseFisher(steady)
    selector = Selector(Budgets.of(fisher.space, ()))
    order = torch.randperm(256, generator=g)
    rows, seen = settled(fisher, selector, order, 40, Reading(), at=0.8)
    assert rows.numel() < 256 and seen[-1][1] >= 0.8
    assert all(overlap < 0.8 for _, overlap in seen[:-1])
    assert torch.equal(rows, order[: rows.numel()].sort().values)
    for n, overlap in seen:
        now = set(top_k(steady[order[:n]].mean(0), 40).tolist())
        half = set(top_k(steady[order[: n // 2]].mean(0), 40).tolist())
        assert overlap == pytest.approx(len(now & half) / len(now | half))
    everything, _ = settled(fisher, selector, order, 40, Reading(), at=1.0)
    assert everything.numel() > rows.numel()
    few, none = settled(fisher, selector, order[:5], 40, Reading(), at=0.5)
    assert few.numel() == 5 and none == []


def test_a_search_over_as_many_rows_as_it_takes() -> None:
    whole = search_mask(toy_net(), toy_rows(), **{**QUICK, "strategy": "ladder"})
    settings = {**QUICK, "strategy": "ladder", "settle": 0.0}
    result = search_mask(toy_net(), toy_rows(), **settings)
    assert len(result.sample_report.rows) == 16 and len(whole.sample_report.rows) == 16
    smaller = search_mask(toy_net(), toy_rows(), **{**settings, "pool": 40})
    assert len(smaller.sample_report.rows) == 16  # masks of 8 and of 16 rows share enough
    assert set(smaller.sample_report.chosen) <= {r.id for r in smaller.sample_report.rows}
