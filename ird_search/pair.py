"""`Pair`: a sample set and a mask; `Scored`: one that a proxy has judged."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ird_search.candidate import ProxyScore
from ird_search.mask import SparseMask
from ird_search.paired import gain
from ird_search.reading import Reading
from ird_search.selection import decreasing_range


@dataclass(frozen=True)
class Ranges:
    """The sizes that rows and columns fall through, largest first.

    Args:
        target: position in `columns` of the budget: the size that was asked for. Behind it come
            the smaller ones that a search may pick instead.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    target: int = -1

    def __post_init__(self) -> None:
        if self.target < 0:
            object.__setattr__(self, "target", len(self.columns) + self.target)

    @classmethod
    def geometric(
        cls,
        samples: int,
        parameters: int,
        *,
        min_samples: int,
        budget: int,
        rounds: int,
        least: int | None = None,
    ) -> Ranges:
        """From all samples to `min_samples`, from all parameters to `budget`, and on to `least`.

        Example:
            >>> Ranges.geometric(64, 1000, min_samples=8, budget=10, rounds=2)
            Ranges(rows=(64, 23, 8), columns=(1000, 100, 10), target=2)
        """
        rows = decreasing_range(samples, min(min_samples, samples), rounds)
        columns = decreasing_range(parameters, budget, rounds)
        below = decreasing_range(budget, least, rounds)[1:] if least is not None else []
        return cls(tuple(rows), (*columns, *below), len(columns) - 1)

    @property
    def budget(self) -> int:
        """The most parameters that the winner may have."""
        return self.columns[self.target]

    @property
    def until_target(self) -> Ranges:
        """The same without the sizes behind the target."""
        return Ranges(self.rows, self.columns[: self.target + 1])


@dataclass(frozen=True, eq=False)
class Pair:
    """A sample set and a mask, and the range that the mask was chosen from.

    Args:
        rows: S, positions in the pool, increasing.
        open: R, the columns that were open; None for all.
        columns: M ⊆ R, the mask; None for all.
        shrunk: how often the rows have shrunk.
        step: position of |M| in the sizes that k falls through.
        reading: how the mask was read off the gradients of S.
    """

    rows: Tensor
    open: Tensor | None = None
    columns: Tensor | None = None
    shrunk: int = 0
    step: int = 0
    reading: Reading = field(default_factory=Reading)


@dataclass(frozen=True, eq=False)
class Scored:
    """A pair that a proxy has judged.

    Args:
        move: how a strategy came to it.
    """

    move: str
    pair: Pair
    mask: SparseMask
    proxy: ProxyScore

    @property
    def order(self) -> tuple[bool, bool, float, int]:
        """Better first: those of the longer budget, the lower score, then the fewer parameters."""
        return (*self.proxy.order, self.mask.count)

    def tied(self, other: Scored) -> bool:
        """Whether held-out samples cannot tell the two apart: a paired test at 95%.

        Ranked by AUC, which has no value for one sample, only equal scores are tied.
        """
        ours, theirs = self.proxy.best, other.proxy.best
        if not (ours.ok and theirs.ok) or self.proxy.short != other.proxy.short:
            return False
        by_loss = ours.score == ours.loss and theirs.score == theirs.loss  # and not by AUC
        if ours.losses is None or theirs.losses is None or not by_loss:
            return ours.score == theirs.score
        return gain(ours.losses, theirs.losses).tied
