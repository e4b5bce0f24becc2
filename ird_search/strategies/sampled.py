"""Points that an Optuna sampler asks for, a batch at a time.

The study is built anew from the state for each round: the same state gives the same points, in a
resumed run and in every process of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from ird_search.candidate import best_of
from ird_search.moves import Nomination
from ird_search.pair import Scored
from ird_search.search import SearchState
from ird_search.seeds import derive
from ird_search.strategies.points import Point, Points
from ird_search.study import quiet

BATCH = 4
"""Points of one round."""


def sampled(
    points: Points,
    state: SearchState,
    sampler: Callable[[int], BaseSampler],
    *,
    trials: int,
    seed: int,
) -> Sequence[Nomination]:
    """The next points, those that were judged before left out; none after `trials` of them."""
    wanted = min(BATCH, trials - len(state.scored))
    if wanted <= 0:
        return []
    space = _distributions(points)
    with quiet():
        study = optuna.create_study(
            storage=optuna.storages.InMemoryStorage(),
            sampler=sampler(derive(seed, "sampler", len(state.rounds)) % 2**32),
            direction="minimize",
        )
    study.add_trials([_told(s, points, space) for s in state.scored])
    found: list[Nomination] = []
    for _ in range(10 * wanted):  # a small space may hold fewer points than are wanted
        asked = study.ask(space)
        found = _unique(found, points.nominations([_point(asked.params, points)], state))
        if len(found) == wanted:
            break
    return found


def _unique(found: list[Nomination], more: Sequence[Nomination]) -> list[Nomination]:
    known = {mask.digest for _, _, mask in found}
    return found + [n for n in more if n[2].digest not in known]


def _distributions(points: Points) -> dict[str, BaseDistribution]:
    """Sizes and levels by their position, so that steps count alike; criteria have no order."""
    sizes: dict[str, BaseDistribution] = {
        "rows": IntDistribution(0, len(points.ranges.rows) - 1),
        "columns": IntDistribution(points.steps[0], points.steps[-1]),
    }
    for part, known in points.levels.items():
        order = IntDistribution(0, len(known) - 1)
        sizes[part] = CategoricalDistribution(known) if part == "criterion" else order
    return sizes


def _point(params: Mapping[str, Any], points: Points) -> Point:
    parts: dict[str, Any] = {
        part: params[part] if part == "criterion" else known[params[part]]
        for part, known in points.levels.items()
    }
    return Point(params["rows"], params["columns"], replace(points.base, **parts))


def _told(s: Scored, points: Points, space: dict[str, BaseDistribution]) -> FrozenTrial:
    """What became of a point, by the score that every one of them has: the shorter budget's."""
    tried = best_of(s.proxy.probes or s.proxy.trials).best
    parts: dict[str, Any] = {}
    for part, known in points.levels.items():
        value = getattr(s.pair.reading, part)
        parts[part] = value if part == "criterion" else known.index(value)
    return create_trial(
        state=TrialState.COMPLETE if tried.ok else TrialState.FAIL,
        value=tried.score if tried.ok else None,
        params={"rows": s.pair.shrunk, "columns": s.pair.step, **parts},
        distributions=space,
    )
