"""Readings: the criteria by their formulas, and what is one step from what."""

from __future__ import annotations

import pytest
import torch

from ird_search.config import Criterion, SearchConfig
from ird_search.fisher import Moments
from ird_search.reading import CEILINGS, SKIPS, Reading, all_readings, levels, neighbours
from ird_search.settings import choices


def test_the_criteria_by_their_formulas() -> None:
    gradients = torch.tensor([[1.0, -2.0, 0.0, 3.0], [1.0, 2.0, 0.0, 1.0]])
    moments = Moments(gradients.square().mean(0), gradients.mean(0))
    assert Reading("fisher").scores(moments).tolist() == [1.0, 4.0, 0.0, 5.0]
    assert Reading("mean").scores(moments).tolist() == [1.0, 0.0, 0.0, 2.0]
    assert Reading("snr").scores(moments).tolist() == pytest.approx([1.0, 0.0, 0.0, 2 / 5**0.5])
    near = Reading("decrease", reach=0.1).scores(moments)  # all would move further
    assert near.tolist() == pytest.approx([0.1 - 0.005, 0.0, 0.0, 0.2 - 0.025])
    far = Reading("decrease", reach=0.5).scores(moments)  # the last one stops at 2/5
    assert far.tolist() == pytest.approx([0.5 - 0.125, 0.0, 0.0, 4 / 10])


def test_snr_ranks_as_the_mean_over_the_standard_deviation() -> None:
    gradients = torch.randn(9, 200, generator=torch.Generator().manual_seed(0))
    moments = Moments(gradients.square().mean(0), gradients.mean(0))
    ratio = gradients.mean(0).abs() / gradients.std(0)
    assert torch.equal(Reading("snr").scores(moments).argsort(), ratio.argsort())


def test_a_decrease_is_the_best_of_all_moves_within_reach() -> None:
    gradients = torch.randn(9, 50, generator=torch.Generator().manual_seed(0)) * torch.logspace(
        -2, 2, 50
    )
    mean, square = gradients.mean(0), gradients.square().mean(0)
    for reach in (0.01, 0.3, 10.0):
        moves = reach * torch.logspace(-7, 0, 20001, dtype=torch.float64)[:, None]
        best = (mean.double().abs() * moves - square.double() * moves**2 / 2).amax(0)
        found = Reading("decrease", reach=reach).scores(Moments(square, mean))
        assert torch.allclose(found.double(), best, rtol=1e-3)


def test_a_decrease_ranks_as_the_mean_nearby_and_as_snr_far_away() -> None:
    gradients = torch.randn(9, 200, generator=torch.Generator().manual_seed(0))
    moments = Moments(gradients.square().mean(0), gradients.mean(0))
    for reach, other in ((1e-4, "mean"), (1e6, "snr")):
        near = Reading("decrease", reach=reach).scores(moments)
        assert torch.equal(near.argsort(), Reading(other).scores(moments).argsort())  # type: ignore[arg-type]


def test_a_decrease_of_nothing_is_nothing() -> None:
    moments = Moments(torch.tensor([0.0, 1e-42, 1e30]), torch.tensor([0.0, 1e-21, 1e15]))
    found = Reading("decrease", reach=1e30).scores(moments)
    assert found.isfinite().all() and found[0] == 0 and (found >= 0).all()


def test_rounding_noise_is_no_signal() -> None:
    """Entries whose gradients are tiny beside the largest, and agree in sign."""
    moments = Moments(torch.tensor([1.0, 1e-14, 1e-30, 0.0]), torch.tensor([0.1, 1e-7, 1e-15, 0.0]))
    assert Reading("snr").scores(moments).tolist() == pytest.approx([0.1, 0.0, 0.0, 0.0])
    one = torch.tensor([[3.0, -0.5]])
    assert Reading("snr").scores(Moments(one.square().mean(0), one.mean(0))).max() <= 1


def test_only_fisher_does_without_the_mean() -> None:
    assert [Reading(c).needs_mean for c in choices(Criterion)] == [False, True, True, True]


def test_readings_one_step_away() -> None:
    base = Reading()
    found = {str(r) for r in neighbours(base, ("criterion", "ceiling", "skip"), base)}
    assert found == {"mean", "snr", "decrease", "fisher, ceiling 4", "fisher, skip 1"}
    inner = {str(r) for r in neighbours(Reading("snr", 4.0, 3.0), ("ceiling", "skip"), base)}
    assert inner == {
        "snr, skip 3",
        "snr, ceiling 1, skip 3",
        "snr, ceiling 4, skip 1",
        "snr, ceiling 4, skip 10",
    }
    assert not list(neighbours(base, (), base))


def test_a_level_of_ones_own_is_one_of_the_steps() -> None:
    base = Reading(ceiling=2.5)
    assert {r.ceiling for r in neighbours(base, ("ceiling",), base)} == {4.0, 1.0}
    assert {r.ceiling for r in neighbours(Reading(), ("ceiling",), base)} == {4.0}
    assert levels("skip", Reading(skip=2.0)) == (0.0, 1.0, 2.0, 3.0, 10.0)


def test_every_combination_comes_once_and_the_base_first() -> None:
    base = Reading("snr")
    found = list(all_readings(base, ("criterion", "ceiling", "skip")))
    assert found[0] == base and len(found) == len(set(found)) == 4 * len(CEILINGS) * len(SKIPS)
    assert list(all_readings(base, ())) == [base]


def test_what_a_search_begins_with() -> None:
    assert Reading.of(SearchConfig()) == Reading("snr")
    assert Reading.of(SearchConfig(strategy="ladder")) == Reading("fisher")
    settings = {"criterion": "mean", "ceiling": 2.0, "skip": 1.0, "reach": 3.0}
    assert Reading.of(SearchConfig(**settings)) == Reading("mean", 2.0, 1.0, 3.0)  # type: ignore[arg-type]


def test_neighbours_lead_everywhere() -> None:
    vary, base = ("criterion", "ceiling", "skip"), Reading()
    reached, new = {base}, [base]
    while new:
        new = [r for at in new for r in neighbours(at, vary, base) if r not in reached]
        reached |= set(new)
    assert reached == set(all_readings(base, vary))
