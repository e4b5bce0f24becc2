"""What each strategy finds in one space of pairs, and at which cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.glue.bench import Bench
from benchmarks.glue.cells import Cell, Keep
from benchmarks.glue.judging import Cost, Entrant, Line, judge
from benchmarks.glue.methods import run_search
from ird_search.candidate import Candidate, Trial
from ird_search.config import Strategy
from ird_search.paired import gain
from ird_search.proxy import Proxies
from ird_search.search import SearchState

STRATEGIES: tuple[Strategy, ...] = ("grid", "tpe", "random", "fish", "ladder", "walk")
"""In the order in which they run: each is compared with those before it."""


@dataclass(frozen=True, eq=False)
class Stage:
    """Where a search stands after a round.

    Args:
        candidates: judged so far.
        cost: of all their proxies.
        best: the best trial so far of a pair that may win.
    """

    candidates: int
    cost: Cost
    best: Trial | None


def compare(
    bench: Bench,
    keep: Keep,
    densities: Sequence[float],
    strategies: Sequence[Strategy],
    settings: Mapping[str, Any],
) -> None:
    """Run strategies and judge their winners.

    Args:
        settings: of the searches: rounds, trials, vary.
    """
    for density in densities:
        k = bench.count(density)
        states: dict[str, SearchState] = {}
        lines: dict[str, Line] = {}
        for name in sorted(strategies, key=STRATEGIES.index):
            states[name] = run_search(bench, name, k, **settings)
            lines[name] = judge(bench, _winner(bench.proxies, name, states))
            keep(
                Cell.of(
                    bench,
                    lines[name],
                    experiment="efficiency",
                    method=name,
                    density=density,
                    rivals={n: line for n, line in lines.items() if n != name},
                )
            )


def _winner(proxies: Proxies, name: str, states: Mapping[str, SearchState]) -> Entrant:
    state = states[name]
    best = state.best
    assert best is not None
    candidate = Candidate("ird", best.mask, best.pair.rows.numel())
    path = list(stages(state, proxies))
    before = {n: other for n, other in states.items() if n != name}
    figures = {
        "reading": str(best.pair.reading),
        "best": round(best.proxy.score, 5),
        "search": _spent(path[-1]),
        "path": [{**_spent(stage), "best": _score(stage.best)} for stage in path],
        "reached": {n: reached(path, other) for n, other in before.items()},
    }
    return Entrant(lambda s: candidate, path[-1].cost, figures)


def stages(state: SearchState, proxies: Proxies) -> Iterator[Stage]:
    """A search round by round."""
    candidates, cost, usable = 0, Cost(), list[Trial]()
    for r in state.rounds:
        candidates += len(r.nominated)
        cost += Cost.of_scores((s.proxy for s in r.nominated), proxies)
        fitting = [s.proxy for s in r.nominated if state.fits(s) and not s.proxy.short]
        usable += [p.best for p in fitting if p.best.ok]
        yield Stage(candidates, cost, min(usable, key=lambda t: t.score, default=None))


def reached(path: Sequence[Stage], other: SearchState) -> dict[str, Any] | None:
    """When a search was first no worse than another one's best, by a paired test over samples."""
    assert other.best is not None
    aim = other.best.proxy.best.losses
    for stage in path:
        ours = None if stage.best is None else stage.best.losses
        if ours is not None and aim is not None and not gain(ours, aim).worse:
            return _spent(stage)
    return None


def _spent(stage: Stage) -> dict[str, Any]:
    return {
        "candidates": stage.candidates,
        "fine_tunes": stage.cost.fine_tunes,
        "steps": stage.cost.steps,
    }


def _score(trial: Trial | None) -> float | None:
    return None if trial is None else round(trial.score, 5)
