"""`Ladder`: both ranges shrink in each round. The closest reading of the paper.

Where ranks are to be passed over, the last rung's rows are read once more in the end.
"""

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
        last = len(state.ranges.columns) - 1
        pair = state.pair or Pair(torch.arange(state.ranges.rows[0]), reading=self.reading)
        if pair.reading.skip and state.rounds:
            return []
        going = state.stale < self.patience or pair.step < last
        found = self.narrowings.narrowed(pair, state.ranges, ("both",)) if going else []
        if found or not self.reading.skip or pair.step < last:
            return found
        read = Pair(pair.rows, shrunk=pair.shrunk, step=last, reading=self.reading)
        return self.narrowings.read(read, state.ranges.columns[last], str(self.reading))
