"""`Stability`: would other samples have given the same mask?

Rows are drawn again with replacement, as many as there were, and the mask is read again from each
such *bootstrap*. Where the masks share little, the choice of entries rests on the few rows that
happened to be there, and so does any claim about single entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ird_search.fisher import FisherMatrix
from ird_search.ledger import Unit
from ird_search.mask import SparseMask
from ird_search.overlap import Counts
from ird_search.pair import Pair
from ird_search.reading import Reading
from ird_search.selector import Selector

WIDER = 8
"""Bootstraps choose from a range of so many times the mask: what ranks lower hardly ever enters."""


@dataclass(frozen=True, eq=False)
class Stability:
    """What bootstraps of the rows say of a mask.

    Args:
        overlaps: Jaccard overlap of each bootstrap's mask with the mask.
        inclusion: of each entry of the mask, the share of the bootstraps that chose it, too:
            float32 [k].
        chance: the overlap that two random masks of this size would have on average.
    """

    overlaps: tuple[float, ...]
    inclusion: Tensor
    chance: float

    @property
    def overlap(self) -> float:
        """The mean; NaN without bootstraps."""
        return float(np.mean(self.overlaps)) if self.overlaps else float("nan")

    def to_unit(self) -> Unit:
        """As what a ledger stores."""
        return Unit(
            {"overlaps": list(self.overlaps), "chance": self.chance}, {"inclusion": self.inclusion}
        )

    @classmethod
    def of_unit(cls, unit: Unit) -> Stability:
        """The same again."""
        found = unit.result
        return cls(tuple(found["overlaps"]), unit.tensors["inclusion"], found["chance"])

    def by_parameter(self, mask: SparseMask) -> dict[str, Tensor]:
        """The inclusion of each tensor's entries, in the order of `mask.indices`."""
        counts = [index.numel() for index in mask.indices.values()]
        return dict(zip(mask.indices, self.inclusion.split(counts), strict=True))

    def __str__(self) -> str:
        if not self.overlaps:
            return "No bootstraps were made: nothing is known of the mask's stability."
        sure = float((self.inclusion >= 0.9).float().mean())
        return (
            f"Masks of {len(self.overlaps)} bootstraps of the rows share {self.overlap:.0%} with "
            f"this one (Jaccard; by chance {self.chance:.1%}); {sure:.0%} of its entries are in at "
            "least nine of ten of them."
        )


def bootstrapped(
    fisher: FisherMatrix,
    selector: Selector,
    pair: Pair,
    mask: SparseMask,
    *,
    bootstraps: int,
    seed: int,
) -> Stability:
    """Read the mask again from bootstraps of its rows.

    From the pair's range, cut to the best `WIDER` times as many as the mask has, or to as many as
    fit into the matrix's cache.
    """
    rows, k, reading = pair.rows, mask.count, pair.reading
    by_chance = _counts(mask, 0, k).by_chance
    if not bootstraps:
        return Stability((), torch.zeros(k), by_chance)
    scores = selector.scores(fisher, rows, pair.open, reading)
    width = min(scores.numel(), fisher.fitting(rows.numel()), round((WIDER + reading.skip) * k))
    top = selector.budgets.ranks(
        scores,
        pair.open,
        0,
        max(k, width),
        floor=selector.floor,
        ceiling=reading.ceiling,
    )
    is_open = top if pair.open is None else pair.open[top]
    # A window's mask lies behind ranks that its range no longer holds; what it holds must stay in.
    is_open = torch.cat([is_open, mask.coords]).unique()
    generator = np.random.default_rng(seed)
    n = rows.numel()
    counts = generator.multinomial(n, np.full(n, 1 / n), size=bootstraps)
    found = fisher.resampled(rows, is_open, torch.from_numpy(counts), mean=reading.needs_mean)
    chosen = torch.searchsorted(is_open, mask.coords)
    inclusion, overlaps = torch.zeros(k), []
    for moments in found:
        again = reading.scores(moments)
        if selector.units is not None:
            again = selector.units.smoothed(again, is_open)
        taken = torch.zeros(is_open.numel(), dtype=torch.bool)
        taken[selector.best(again, is_open, k, reading)] = True
        inclusion += taken[chosen]
        overlaps.append(_counts(mask, int(taken[chosen].sum()), int(taken.sum())).jaccard)
    return Stability(tuple(overlaps), inclusion / max(1, bootstraps), by_chance)


def _counts(mask: SparseMask, shared: int, other: int) -> Counts:
    """A mask and another one of `other` entries."""
    return Counts(mask.space.numel, shared, mask.count - shared, other - shared)


def settled(
    fisher: FisherMatrix, selector: Selector, order: Tensor, k: int, reading: Reading, *, at: float
) -> tuple[Tensor, list[tuple[int, float]]]:
    """As many rows as it takes until doubling them changes the mask little.

    Args:
        order: all rows, in the order in which they are drawn.
        at: the Jaccard overlap of the masks of half and of all rows that is enough.

    Returns:
        The rows, increasing, and (rows, overlap with the mask of half of them) of each step.
    """
    n, seen = max(1, min(8, order.numel())), list[tuple[int, float]]()
    before = selector.mask(fisher, order[:n].sort().values, k, reading)
    while n < order.numel():
        n = min(2 * n, order.numel())
        now = selector.mask(fisher, order[:n].sort().values, k, reading)
        seen.append((n, _counts(before, (now & before).count, now.count).jaccard))
        if seen[-1][1] >= at:
            break
        before = now
    return order[:n].sort().values, seen
