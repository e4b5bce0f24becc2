"""`Selector`: from F to rows and masks, by the rules of one search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ird_search.budgets import Budgets
from ird_search.config import SearchConfig
from ird_search.coordinates import digest
from ird_search.errors import ModelError
from ird_search.fisher import FisherMatrix
from ird_search.granularity import Units
from ird_search.mask import SparseMask
from ird_search.reading import Reading
from ird_search.rows import choose_rows
from ird_search.samples import SampleSet
from ird_search.selection import ranks


@dataclass(frozen=True, eq=False)
class Selector:
    """The rules that stay the same in all of a search.

    Args:
        budgets: how a budget is shared among groups of parameters.
        units: what is selected whole; single entries by default.
        floor: the least density of a tensor, as a multiple of the mask's.
        labels: classes of the pool's rows, where rows are narrowed alike in each, int64 [N].
        cap: rows that score above so many times the median are passed over.
    """

    budgets: Budgets
    units: Units | None = None
    floor: float = 0.0
    labels: Tensor | None = None
    cap: float | None = None

    @classmethod
    def of(cls, config: SearchConfig, budgets: Budgets, pool: SampleSet) -> Selector:
        """The rules that the settings name, for the rows of a pool."""
        units = None
        if config.granularity != "entry":
            units = Units(budgets.space, config.granularity, config.block)
        labels = pool.labels if config.balanced else None
        assert labels is None or isinstance(labels, Tensor)  # checked with the other settings
        return cls(budgets, units, config.floor, labels, config.row_cap)

    @property
    def about(self) -> dict[str, Any]:
        """All of it as plain data: part of the address of what is chosen."""
        units = self.units
        return {
            "groups": self.budgets.groups,
            "units": None if units is None else [units.granularity, units.block],
            "floor": self.floor,
            "labels": digest(self.labels) if self.labels is not None else None,
            "cap": self.cap,
        }

    def rows(self, fisher: FisherMatrix, rows: Tensor, n: int, columns: Tensor | None) -> Tensor:
        """The n rows of S with the largest r_i(M), increasing."""
        labels = None if self.labels is None else self.labels[rows]
        scores = fisher.row_scores(rows, columns)
        return rows[choose_rows(scores, n, labels=labels, cap=self.cap)]

    def scores(
        self, fisher: FisherMatrix, rows: Tensor, columns: Tensor | None, reading: Reading
    ) -> Tensor:
        """What ranks the open columns, by a reading of S: float32 [n]."""
        found = reading.scores(fisher.column_moments(rows, columns, mean=reading.needs_mean))
        return found if self.units is None else self.units.smoothed(found, columns)

    def best(
        self, scores: Tensor, is_open: Tensor | None, k: int, reading: Reading, *, skip: int = 0
    ) -> Tensor:
        """Positions of the best k open columns, behind `skip` and what the reading passes over.

        Raises:
            ModelError: there is none.
        """
        found = self.budgets.ranks(
            scores,
            is_open,
            skip + round(reading.skip * k),
            k,
            floor=self.floor,
            ceiling=reading.ceiling,
        )
        return found if self.units is None else self.units.whole(found, is_open)

    def fills(self, count: int, k: int) -> bool:
        """Whether so many entries are as good as a budget of k: all, or most where units are whole.

        What passes over ranks must not win or lose by having fewer parameters.
        """
        return count == k if self.units is None else 2 * count > k

    def mask(self, fisher: FisherMatrix, rows: Tensor, k: int, reading: Reading) -> SparseMask:
        """The mask of k among all candidates that a reading of S gives."""
        scores = self.scores(fisher, rows, None, reading)
        return SparseMask(fisher.space, self.best(scores, None, k, reading))

    def fish(self, fisher: FisherMatrix, rows: Tensor, k: int) -> SparseMask:
        """FISH Mask (Sung et al. 2021): the k columns with the largest mean square over S."""
        scores = fisher.column_scores(rows)
        return SparseMask(fisher.space, self.budgets.ranks(scores, None, 0, k))

    def reversed(self, fisher: FisherMatrix, rows: Tensor, k: int) -> SparseMask:
        """The k columns with the smallest positive mean square: what FISH would take last."""
        scores = fisher.column_scores(rows)
        turned = torch.where(scores > 0, scores.reciprocal(), torch.zeros_like(scores))
        turned = turned.nan_to_num_(posinf=torch.finfo(torch.float32).max)
        return SparseMask(fisher.space, self.budgets.ranks(turned, None, 0, k))

    def nothing(self, scores: Tensor, k: int) -> ModelError:
        """Why a mask is empty."""
        if not bool((scores > 0).any()):
            return ModelError(
                "Every candidate parameter has a score of exactly zero: no gradient reaches them. "
                "Look for detached or unused layers, or change include or exclude."
            )
        if self.units is not None and ranks(scores, 0, k).numel():
            return ModelError(
                f"The best {self.units.granularity} has more entries than the budget of {k:,}. "
                "Raise density, or choose a finer granularity."
            )
        shares = zip(self.budgets.groups, self.budgets.shares(k), strict=True)
        told = ", ".join(f"{share:,} of {label!r}" for (label, _), share in shares)
        return ModelError(
            f"A budget of {k:,} is {told}, and where it gives something, all scores are exactly "
            "zero. Raise density or scoring_steps, or pass other groups."
        )
