"""`Walk`: choose a criterion, narrow, then look around.

0. *Choose a criterion*, where it may vary: the mask of the target's size by each, read from all
   rows. Which one is best differs from model to model, and by more than what narrowing brings.
1. *Narrow* by it. Each round nominates the four moves (see `moves`), which have the same k′ and so
   can be compared, and goes to the best, until k is at the target.
2. *Look around.* From the best pair at the target: fewer rows, and the readings one step away
   (another criterion, the next ceiling, more or fewer ranks passed over), each read from all
   candidates. It goes on from the best as long as that becomes better by more than chance, and ends
   when all around it is known or nothing has improved for `patience` rounds.
3. *Below the target*, where a smaller mask may be picked: one round for each smaller size, with the
   rows and the reading of the best.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from ird_search.config import Part
from ird_search.moves import Move, Nomination
from ird_search.narrowing import Narrowings
from ird_search.pair import Pair, Ranges
from ird_search.reading import Reading, neighbours
from ird_search.search import SearchState

MOVES: tuple[Move, ...] = ("both", "columns", "rows", "window")


class Walk:
    """The default strategy.

    Args:
        base: how masks are read off the gradients at first.
        vary: the parts of a reading that may change.
        patience: rounds without improvement at the target before it ends.
    """

    name = "walk"

    def __init__(
        self, narrowings: Narrowings, base: Reading, *, vary: Sequence[Part], patience: int
    ) -> None:
        self.narrowings, self.base, self.vary, self.patience = narrowings, base, vary, patience

    def nominate(self, state: SearchState) -> Sequence[Nomination]:
        sizes, pair = state.ranges, state.pair
        if not state.rounds and "criterion" in self.vary and (found := self._criteria(sizes)):
            return found
        if pair is None or (len(state.rounds) == 1 and state.rounds[0].moved_to.move not in MOVES):
            reading = self.base if pair is None else pair.reading
            pair = Pair(torch.arange(sizes.rows[0]), reading=reading)
        if pair.step < sizes.target:
            return self.narrowings.narrowed(pair, sizes, MOVES)
        around = pair.step == sizes.target and state.stale < self.patience
        found = list(self._around(state, state.best.pair if state.best else pair)) if around else []
        return found or self._below(state)

    def _criteria(self, sizes: Ranges) -> Sequence[Nomination]:
        """The mask of the target's size by each criterion."""
        readings = [self.base, *neighbours(self.base, ("criterion",), self.base)]
        found: dict[str, Nomination] = {}
        for reading in readings:
            pair = Pair(torch.arange(sizes.rows[0]), step=sizes.target, reading=reading)
            for nomination in self.narrowings.read(pair, sizes.budget, str(reading)):
                found.setdefault(nomination[2].digest, nomination)
        return list(found.values())

    def _around(self, state: SearchState, best: Pair) -> Iterator[Nomination]:
        """What is one step from the best pair, and was not tried."""
        seen = {s.mask.digest for s in state.scored}
        found = self.narrowings.narrowed(best, state.ranges.until_target, ("rows",))
        around = neighbours(best.reading, self.vary, self.base)
        own = [self.base] if self.base.skip else []  # narrowing passes over no ranks
        for reading in dict.fromkeys([*own, *around]):
            pair = Pair(best.rows, shrunk=best.shrunk, step=best.step, reading=reading)
            found += self.narrowings.read(pair, state.ranges.budget, str(reading))
        for move, pair, mask in found:
            if mask.digest not in seen and mask.count:
                seen.add(mask.digest)
                yield move, pair, mask

    def _below(self, state: SearchState) -> Sequence[Nomination]:
        """The next smaller size, with the rows and the reading of the best."""
        assert state.pair is not None
        step = state.pair.step + 1
        if state.best is None or step == len(state.ranges.columns):
            return []
        pair = replace(state.best.pair, open=None, columns=None, step=step)
        return self.narrowings.read(pair, state.ranges.columns[step], "smaller")
