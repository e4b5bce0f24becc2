"""Paired tests: Student's intervals against scipy's, and what they cover."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from ird_search.errors import UsageError
from ird_search.paired import UNKNOWN, Gain, crossed, difference_told, gain, samples_needed


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_the_interval_is_students_over_samples() -> None:
    ours, theirs = drawn(40), drawn(40, seed=1) + 0.3
    found = gain(ours, theirs)
    interval = stats.ttest_rel(theirs.double(), ours.double()).confidence_interval(0.95)
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx(
        (interval.low, interval.high)
    )
    turned = gain(theirs, ours)
    assert (turned.mean, turned.half_width) == (-found.mean, found.half_width)


def test_what_samples_have_in_common_does_not_count() -> None:
    ours, theirs, hard = drawn(200), drawn(200, seed=1) + 0.2, 50 * drawn(200, seed=2)
    apart, hidden = gain(ours, theirs), gain(ours + hard, theirs + hard)
    assert hidden.mean == pytest.approx(apart.mean, abs=1e-5)
    assert hidden.half_width == pytest.approx(apart.half_width, abs=1e-5)
    assert apart.better and gain(theirs, ours).worse


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ([0.5, 0.25, 0.7], [0.5, 0.25, 0.7], "tied"),  # 0 ± 0
        ([0.25, 0.5, 0.75], [0.75, 1.0, 1.25], "better"),  # 0.5 ± 0
        ([0.75, 1.0, 1.25], [0.25, 0.5, 0.75], "worse"),
        ([0.1], [0.9], "tied"),  # one sample tells nothing
        ([0.1, 0.2], [0.9, 0.1], "tied"),
    ],
)
def test_better_worse_and_tied(ours: list[float], theirs: list[float], said: str) -> None:
    found = gain(torch.tensor(ours), torch.tensor(theirs))
    assert [w for w in ("better", "worse", "tied") if getattr(found, w)] == [said]
    assert math.isinf(found.half_width) == (len(ours) == 1)


def test_nothing_to_compare_is_tied() -> None:
    assert UNKNOWN.tied and not UNKNOWN.better and not UNKNOWN.worse
    assert Gain(0.02, 0.02).tied


def test_seeds_and_samples_add_their_variances() -> None:
    d = drawn(4, 30).double().numpy() - 0.3
    found = crossed(torch.zeros(4, 30), torch.from_numpy(d))

    def half_width(values: np.ndarray) -> float:
        interval = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
        return float(interval.high - interval.low) / 2

    assert found.mean == pytest.approx(d.mean())
    both = half_width(d.mean(1)) ** 2 + half_width(d.mean(0)) ** 2
    assert found.half_width == pytest.approx(math.sqrt(both))


def test_one_seed_or_one_sample_tells_nothing() -> None:
    for shape in ((1, 20), (3, 1)):
        found = crossed(torch.zeros(shape), torch.ones(shape))
        assert found.mean == 1 and math.isinf(found.half_width) and found.tied
    same = crossed(torch.ones(3, 4), torch.ones(3, 4))
    assert (same.mean, same.half_width) == (0, 0) and same.tied


@pytest.mark.parametrize(
    ("test", "ours", "theirs"),
    [
        (gain, (3,), (4,)),
        (gain, (2, 3), (2, 3)),
        (gain, (0,), (0,)),
        (crossed, (2, 3), (3, 2)),
        (crossed, (3,), (3,)),
    ],
)
def test_losses_of_other_samples_are_refused(
    test: object, ours: tuple[int, ...], theirs: tuple[int, ...]
) -> None:
    with pytest.raises(UsageError, match="came to be paired"):
        test(torch.zeros(ours), torch.zeros(theirs))  # type: ignore[operator]


def test_the_crossed_interval_covers_new_seeds_and_new_samples() -> None:
    """d[s, i] = μ + aₛ + bᵢ + eₛᵢ, of which the samples' part is the largest, as in fine-tunes."""
    g, seeds, n, mean = np.random.default_rng(0), 3, 60, 0.1
    covered, by_seeds_alone, times = 0, 0, 600
    for _ in range(times):
        a, b = 0.02 * g.standard_normal((seeds, 1)), 0.35 * g.standard_normal((1, n))
        d = torch.from_numpy(mean + a + b + 0.1 * g.standard_normal((seeds, n)))
        found, by_seed = crossed(torch.zeros(seeds, n), d), d.mean(1).numpy()
        covered += abs(found.mean - mean) <= found.half_width
        width = stats.t.ppf(0.975, seeds - 1) * by_seed.std(ddof=1) / seeds**0.5
        by_seeds_alone += abs(by_seed.mean() - mean) <= width
    assert covered / times >= 0.93
    assert by_seeds_alone / times < 0.8


def test_the_number_of_samples_that_a_difference_takes() -> None:
    for difference in (0.02, 0.05, 0.3):
        n = samples_needed(difference)
        assert difference_told(n) <= difference < difference_told(n - 1)
    assert samples_needed(0.1, spread=0.5) == math.ceil((1.96 * 0.5 / 0.1) ** 2)
