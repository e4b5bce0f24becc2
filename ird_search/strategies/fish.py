"""`Fish`: FISH Mask (Sung, Nair, Raffel 2021): random rows, the largest mean squares."""

from __future__ import annotations

from collections.abc import Sequence

from ird_search.moves import Nomination
from ird_search.narrowing import Narrowings
from ird_search.pair import Pair
from ird_search.search import SearchState
from ird_search.seeds import derive
from ird_search.selection import random_subset


class Fish:
    """One round: random rows of the pool, as many as each size of the row range."""

    name = "fish"

    def __init__(self, narrowings: Narrowings, *, seed: int) -> None:
        self.narrowings, self.seed = narrowings, seed

    def nominate(self, state: SearchState) -> Sequence[Nomination]:
        ranges, found, seen = state.ranges, list[Nomination](), set[str]()
        if state.rounds:
            return []
        for shrunk, n in enumerate(ranges.rows):
            rows = random_subset(ranges.rows[0], n, seed=derive(self.seed, "fish rows", n))
            pair = Pair(rows, None, None, shrunk, ranges.target)
            for move, at, mask in self.narrowings.read(pair, ranges.budget, f"{n} random rows"):
                if mask.digest not in seen:
                    seen.add(mask.digest)
                    found.append((move, at, mask))
        return found
