"""`Moments` of gradients, and those of all columns that are kept for the next question.

A search reads the gradients of the same rows by one rule after another, and each reading asks for
the same sums over all columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MOST = 8
"""Row sets whose moments are kept: as many as a search has of nested sizes."""


@dataclass(frozen=True, eq=False)
class Moments:
    """The mean square of some columns' gradients, and their mean; not to be written to.

    Args:
        square: c_j(S), float32 [k].
        mean: m_j(S), float32 [k]; None where it was not asked for.
    """

    square: Tensor
    mean: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Whole:
    """The moments of all columns over some rows.

    Without values they are some that an interrupted run had in memory: the same batches give the
    same bits again.

    Args:
        rows: S as positions, int64 [|S|].
        plan: the batches of the pass that they came from.
        mean: whether the mean is among them.
    """

    rows: Tensor
    plan: tuple[Tensor, ...]
    mean: bool
    values: Moments | None = None

    @property
    def vectors(self) -> int:
        """How many vectors over all columns these are."""
        return 1 + self.mean

    def like(self, other: Whole) -> bool:
        """Whether both have the same values."""
        mine, theirs = (self.rows, *self.plan), (other.rows, *other.plan)
        same = self.mean == other.mean and len(mine) == len(theirs)
        return same and all(map(torch.equal, mine, theirs))


class Kept:
    """The moments of all columns over the rows that were asked for last, as many as fit.

    Args:
        room: for how many vectors over all columns.
        found: the latest last.
    """

    def __init__(self, room: int, found: Iterable[Whole] = ()) -> None:
        self.room, self._found = room, tuple(found)

    def __iter__(self) -> Iterator[Whole]:
        return iter(self._found)

    def of(self, rows: Tensor) -> Whole | None:
        """Those over some rows."""
        return next((w for w in self._found if torch.equal(w.rows, rows)), None)

    def put(self, whole: Whole) -> None:
        """Keep some, and let go of those that were not asked for the longest."""
        if whole.vectors > self.room:
            return
        found = [*(w for w in self._found if not torch.equal(w.rows, whole.rows)), whole]
        while len(found) > MOST or sum(w.vectors for w in found) > self.room:
            del found[0]
        self._found = tuple(found)

    def drop(self, excluded: AbstractSet[int]) -> None:
        """Let go of those over rows that count no more."""
        if excluded:
            kept = (w for w in self._found if excluded.isdisjoint(w.rows.tolist()))
            self._found = tuple(kept)

    def forget(self) -> bool:
        """Free the memory; whether any was taken."""
        had = any(w.values is not None for w in self._found)
        self._found = tuple(replace(w, values=None) for w in self._found)
        return had

    def remember(self, found: Iterable[Whole]) -> None:
        """Keep what another process kept, with the values that are here."""
        here = self._found
        self._found = tuple(next((h for h in here if h.like(w)), w) for w in found)
