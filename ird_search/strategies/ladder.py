"""`Ladder`: both ranges shrink in each round. The closest reading of the paper."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ird_search.moves import Nomination
from ird_search.narrowing import Narrowings
from ird_search.pair import Pair
from ird_search.reading import Reading
from ird_search.search import SearchState


class Ladder:
    """The plain diagonal, until nothing has improved for `patience` rounds at the target.

    Args:
        reading: how each mask is read off the gradients.
    """

    name = "ladder"

    def __init__(self, narrowings: Narrowings, reading: Reading, *, patience: int) -> None:
        self.narrowings, self.reading, self.patience = narrowings, reading, patience

    def nominate(self, state: SearchState) -> Sequence[Nomination]:
        if state.stale >= self.patience:
            return []
        pair = state.pair or Pair(torch.arange(state.ranges.rows[0]), reading=self.reading)
        return self.narrowings.narrowed(pair, state.ranges, ("both",))
