"""Pools whose rows are not like those that are trained on and judged by.

Only gradients are taken of the pool; training and held-out rows stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from benchmarks.glue.bench import Bench, descended, read
from benchmarks.glue.cells import Cell, Keep
from benchmarks.glue.judging import Entrant, judge
from benchmarks.glue.methods import PLAIN, SNR, fixed
from benchmarks.glue.tasks import classes, joined
from ird_search.candidate import Candidate
from ird_search.narrowing import Narrowings
from ird_search.reading import Reading
from ird_search.samples import SampleSet
from ird_search.seeds import derive
from ird_search.selection import random_subset

ROW_RULES: Mapping[str, Mapping[str, Any]] = {
    "ird": {},
    "ird, cap 3": {"row_cap": 3.0},
    "ird, balanced": {"balanced": True},
}


@dataclass(frozen=True, eq=False)
class Pool:
    """Samples, and which of them are odd: bool [N]."""

    samples: SampleSet
    odd: Tensor

    @property
    def rows(self) -> int:
        """How many rows a mask is read from: an eighth."""
        return max(1, len(self.samples) // 8)


def compare(
    bench: Bench, keep: Keep, densities: Sequence[float], elsewhere: SampleSet | None
) -> None:
    """FISH and IRD over each pool.

    Args:
        elsewhere: samples of another domain, where there are some.
    """
    for name, pool in _pools(bench, elsewhere).items():
        for density in densities:
            for reading in (PLAIN, SNR):
                _compare(bench, keep, name, pool, density, reading)


def _compare(
    bench: Bench, keep: Keep, name: str, pool: Pool, density: float, reading: Reading
) -> None:
    k = bench.count(density)
    theirs = judge(bench, _fish_of(bench, pool, k, reading))
    lines = {"fish": theirs}
    for method, rules in ROW_RULES.items():
        lines[method] = judge(bench, _ird_of(bench, pool, k, reading, rules))
    for method, line in lines.items():
        keep(
            Cell.of(
                bench,
                line,
                experiment="shifted",
                method=method,
                density=density,
                setting={"pool": name, "reading": str(reading)},
                rivals={} if line is theirs else {"fish": theirs},
            )
        )


def _pools(bench: Bench, elsewhere: SampleSet | None) -> dict[str, Pool]:
    clean, seed = bench.pool, derive(bench.config.seed, "shifted")
    n = len(clean)
    found = {
        "clean": Pool(clean, torch.zeros(n, dtype=torch.bool)),
        "20% flipped": flipped(clean, round(0.2 * n), seed=seed),
        "90% one class": lopsided(bench.problem.train, n, seed=seed),
    }
    if elsewhere is not None:
        theirs = elsewhere.select(random_subset(len(elsewhere), n - n // 2, seed=seed))
        ours = clean.select(random_subset(n, n // 2, seed=seed))
        found["two domains"] = Pool(joined(ours, theirs), torch.arange(n) >= n // 2)
    return found


def flipped(samples: SampleSet, count: int, *, seed: int) -> Pool:
    """The samples, so many of them with another class than their own."""
    labels = classes(samples).clone()
    number = int(labels.max()) + 1
    at = random_subset(len(samples), count, seed=seed)
    draws = torch.Generator().manual_seed(seed)
    labels[at] = (labels[at] + torch.randint(1, number, (count,), generator=draws)) % number
    odd = torch.zeros(len(samples), dtype=torch.bool)
    odd[at] = True
    return Pool(replace(samples, labels=labels), odd)


def lopsided(samples: SampleSet, count: int, *, seed: int, share: float = 0.9) -> Pool:
    """So many samples or fewer, most of them of class 0; the others are the odd ones."""
    labels = classes(samples)
    common, rare = ((labels == 0).nonzero().flatten(), (labels != 0).nonzero().flatten())
    count = min(count, int(len(common) / share))  # small data hold no more of the class
    most = round(share * count)
    parts = [
        group[random_subset(len(group), size, seed=seed)]
        for group, size in ((common, most), (rare, count - most))
    ]
    return Pool(samples.select(torch.cat(parts)), torch.arange(count) >= most)


def _fish_of(bench: Bench, pool: Pool, k: int, reading: Reading) -> Entrant:
    """A reading of random rows of a pool, others for each seed."""
    narrowings = bench.narrowings(pool.samples)

    def rows(s: int) -> Tensor:
        seed = derive(bench.config.seed, "shifted, fish", s)
        return random_subset(len(pool.samples), pool.rows, seed=seed)

    def draw(s: int) -> Candidate:
        return Candidate("fish", read(narrowings, rows(s), k, reading), pool.rows)

    drawn = torch.cat([rows(s) for s in range(1, bench.config.seeds + 1)])
    return Entrant(draw, figures=_told(pool, drawn))


def _ird_of(
    bench: Bench, pool: Pool, k: int, reading: Reading, rules: Mapping[str, Any]
) -> Entrant:
    """A reading of the rows that IRD comes to in a pool."""
    narrowings = bench.narrowings(pool.samples, **rules)
    rows = descended(narrowings, len(pool.samples), pool.rows, k)
    figures = _told(pool, rows)
    if figures:
        figures["auc"] = round(_found_by_scores(narrowings, pool, k), 4)
    entrant = fixed(Candidate("ird", read(narrowings, rows, k, reading), pool.rows))
    return replace(entrant, figures=figures)


def _found_by_scores(narrowings: Narrowings, pool: Pool, k: int) -> float:
    """How well r_i(M) tells odd rows from others, M being the plain mask of the pool."""
    rows = torch.arange(len(pool.samples))
    scores = narrowings.row_scores(rows, read(narrowings, rows, k, PLAIN))
    return area(scores, pool.odd)


def _told(pool: Pool, rows: Tensor) -> dict[str, float]:
    """Of some rows, which share is odd; nothing where none of the pool is."""
    if not bool(pool.odd.any()):
        return {}
    return {"odd": round(float(pool.odd[rows].float().mean()), 4)}


def area(scores: Tensor, odd: Tensor) -> float:
    """The area under the ROC curve: the chance that an odd one scores above another.

    Example:
        >>> area(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, False, True]))
        1.0
    """
    ranks = stats.rankdata(scores.numpy())
    ones = int(odd.sum())
    return float((ranks[odd.numpy()].sum() - ones * (ones + 1) / 2) / (ones * (len(odd) - ones)))
