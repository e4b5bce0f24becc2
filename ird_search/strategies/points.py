"""`Points`: any (samples, parameters, reading) by its coordinates, for strategies that do not walk.

The rows of a point are where both ranges have fallen together, from all samples and all candidates
to n and k; its mask is then read from all candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ird_search.config import Part
from ird_search.moves import Nomination
from ird_search.narrowing import Narrowings
from ird_search.pair import Pair, Ranges
from ird_search.reading import Reading, all_readings, levels
from ird_search.search import SearchState
from ird_search.selection import decreasing_range


@dataclass(frozen=True)
class Point:
    """Coordinates of a pair: positions in the sizes of rows and columns, and a reading."""

    shrunk: int
    step: int
    reading: Reading


class Points:
    """The points of a search and their pairs.

    Args:
        base: the reading that the settings name.
        vary: the parts of it that may change.
    """

    def __init__(
        self, narrowings: Narrowings, ranges: Ranges, base: Reading, vary: Sequence[Part]
    ) -> None:
        self.narrowings, self.ranges, self.base = narrowings, ranges, base
        self.levels = {part: levels(part, base) for part in vary}
        self.readings = tuple(all_readings(base, vary))

    @property
    def steps(self) -> tuple[int, ...]:
        """The sizes of a mask that may win."""
        return tuple(range(self.ranges.target, len(self.ranges.columns)))

    def nominations(self, points: Sequence[Point], state: SearchState) -> list[Nomination]:
        """Their pairs, without masks that were judged before or come twice."""
        seen = {s.mask.digest for s in state.scored if state.fits(s)}
        found = []
        for point in points:
            for move, pair, mask in self._read(point):
                if mask.count and mask.digest not in seen:
                    seen.add(mask.digest)
                    found.append((move, pair, mask))
        return found

    def _read(self, point: Point) -> list[Nomination]:
        n, k = self.ranges.rows[point.shrunk], self.ranges.columns[point.step]
        rounds = max(1, point.shrunk, point.step)
        columns = decreasing_range(self.ranges.columns[0], k, rounds)
        rows = decreasing_range(self.ranges.rows[0], n, max(1, len(columns) - 1))
        rows = [*rows, *[n] * (len(columns) - len(rows))]
        if n == self.ranges.rows[0]:
            chosen = torch.arange(n)
        else:
            chosen = self.narrowings.descended(tuple(rows), tuple(columns))
        pair = Pair(chosen, None, None, point.shrunk, point.step, point.reading)
        return self.narrowings.read(pair, k, str(point.reading))
