"""`TPE`: pairs proposed by Optuna's tree-structured Parzen estimator from those judged so far."""

from __future__ import annotations

from collections.abc import Sequence

from optuna.samplers import TPESampler

from ird_search.moves import Nomination
from ird_search.search import SearchState
from ird_search.strategies.points import Points
from ird_search.strategies.sampled import sampled

STARTUP = 8
"""Points drawn at random before the estimator takes over."""


class TPE:
    """Proposes `trials` points of (rows, columns, reading), a few each round."""

    name = "tpe"

    def __init__(self, points: Points, *, trials: int, seed: int) -> None:
        self.points, self.trials, self.seed = points, trials, seed

    def nominate(self, state: SearchState) -> Sequence[Nomination]:
        return sampled(
            self.points,
            state,
            lambda seed: TPESampler(n_startup_trials=STARTUP, constant_liar=True, seed=seed),
            trials=self.trials,
            seed=self.seed,
        )
