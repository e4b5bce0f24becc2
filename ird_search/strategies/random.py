"""`Random`: pairs drawn by Optuna's random sampler, the honest alternative to any search."""

from __future__ import annotations

from collections.abc import Sequence

from optuna.samplers import RandomSampler

from ird_search.moves import Nomination
from ird_search.search import SearchState
from ird_search.strategies.points import Points
from ird_search.strategies.sampled import sampled


class Random:
    """Draws `trials` points of (rows, columns, reading), a few each round."""

    name = "random"

    def __init__(self, points: Points, *, trials: int, seed: int) -> None:
        self.points, self.trials, self.seed = points, trials, seed

    def nominate(self, state: SearchState) -> Sequence[Nomination]:
        return sampled(
            self.points, state, lambda seed: RandomSampler(seed), trials=self.trials, seed=self.seed
        )
