"""`Grid`: every size of rows with every size of the mask and every reading.

For research tables (IRD at every scale), and to measure what a cheaper strategy misses.
"""

from __future__ import annotations

from collections.abc import Sequence

from ird_search.moves import Nomination
from ird_search.search import SearchState
from ird_search.strategies.points import Point, Points


class Grid:
    """One round for each size of the mask, the largest first."""

    name = "grid"

    def __init__(self, points: Points) -> None:
        self.points = points

    def nominate(self, state: SearchState) -> Sequence[Nomination]:
        ranges = self.points.ranges
        tried = {s.pair.step for s in state.scored}
        for step in range(min(1, ranges.target), len(ranges.columns)):
            if step in tried:
                continue
            points = [
                Point(shrunk, step, reading)
                for shrunk in range(len(ranges.rows))
                for reading in self.points.readings
            ]
            if found := self.points.nominations(points, state):
                return found
        return []
