"""The search: strategies nominate (samples, parameters) pairs, proxies judge them.

    F[i, j] = (∂ log p(yᵢ | xᵢ; θ) / ∂θⱼ)²          samples × parameters

    round t:   nominate pairs (S, M) from where the search stands
               judge each by short masked fine-tunes, at a learning rate of its own
               move to the best

A strategy is a function from the state of the search to the next pairs and nothing else: it can be
tested step by step, and an interrupted search goes on where it stopped. It ends when a strategy has
no more to nominate. The best pair within the budget is returned, not the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ird_search.candidate import Candidate, ProxyScore
from ird_search.config import Pick
from ird_search.errors import ModelError, NoProxySucceeded
from ird_search.front import best_of
from ird_search.mask import SparseMask
from ird_search.moves import Nomination
from ird_search.pair import Pair, Ranges, Scored


@dataclass(frozen=True, eq=False)
class Round:
    """What one round nominated, and which pair was the best of them."""

    number: int
    nominated: tuple[Scored, ...]
    moved_to: Scored


@dataclass(frozen=True, eq=False)
class SearchState:
    """Where a search stands: a value, so it can be tested step by step.

    Args:
        ranges: the sizes that rows and columns fall through.
        best: the best pair within the budget so far.
        stale: rounds within the budget since the best became better by more than chance.
    """

    ranges: Ranges
    best: Scored | None = None
    stale: int = 0
    rounds: tuple[Round, ...] = ()

    @property
    def pair(self) -> Pair | None:
        """Where the last round moved to."""
        return self.rounds[-1].moved_to.pair if self.rounds else None

    @property
    def scored(self) -> tuple[Scored, ...]:
        """Every pair that was judged, in order."""
        return tuple(s for r in self.rounds for s in r.nominated)

    def fits(self, s: Scored) -> bool:
        """Whether a pair may win."""
        return s.pair.step >= self.ranges.target


Judge = Callable[[Sequence[Candidate]], Sequence[ProxyScore]]
"""Scores candidate masks; lower is better."""


class Strategy(Protocol):
    """What to try next."""

    name: str

    def nominate(self, state: SearchState) -> Sequence[Nomination]:
        """The pairs of the next round; none where the search is at its end.

        The same state gives the same pairs, in every process.
        """
        ...


def search(
    strategy: Strategy,
    judge: Judge,
    ranges: Ranges,
    *,
    pick: Pick = "target",
    tolerance: float | None = None,
    on_round: Callable[[Round], None] | None = None,
) -> SearchState:
    """Nominate and judge until the strategy has no more to try.

    Args:
        pick, tolerance: see `front.best_of`.
        on_round: told of each round as it ends.

    Raises:
        NoProxySucceeded: every proxy within the budget failed.
        ModelError: no candidate parameter has a gradient, or no mask of the budget can be made.
    """
    state = SearchState(ranges)
    while found := strategy.nominate(state):
        scores = judge([_candidate(state, pair, mask) for _, pair, mask in found])
        nominated = tuple(Scored(*f, score) for f, score in zip(found, scores, strict=True))
        state = advance(state, nominated, pick=pick, tolerance=tolerance)
        if on_round is not None:
            on_round(state.rounds[-1])
    if state.best is None:
        raise _nothing_won(state)
    return state


def _nothing_won(state: SearchState) -> NoProxySucceeded | ModelError:
    """Every pair within the budget failed, or there was none."""
    failed = [
        f"round {r.number}, {s.move}: {s.proxy.best.failure or 'dropped after the short budget'}"
        for r in state.rounds
        for s in r.nominated
        if state.fits(s)
    ]
    if failed:
        return NoProxySucceeded(failed)
    return ModelError(
        f"No mask of {state.ranges.budget:,} parameters can be made: too few candidates have a "
        "score above zero, what is selected whole is larger, or the ranks passed over (skip) leave "
        "too few. Raise density, or change skip, granularity, include or exclude."
    )


def _candidate(state: SearchState, pair: Pair, mask: SparseMask) -> Candidate:
    """What the proxy trains. Its rates begin at the parent's best, grown as 1/√density."""
    start = None
    if state.rounds and (parent := state.rounds[-1].moved_to).proxy.best.ok:
        start = parent.proxy.best.rate * (parent.mask.count / max(1, mask.count)) ** 0.5
    return Candidate("ird", mask, pair.rows.numel(), start)


def advance(
    state: SearchState,
    nominated: tuple[Scored, ...],
    *,
    pick: Pick = "target",
    tolerance: float | None = None,
) -> SearchState:
    """Move to the best nominated pair, and remember the best within the budget."""
    done = Round(len(state.rounds) + 1, nominated, min(nominated, key=lambda s: s.order))
    state, before = replace(state, rounds=(*state.rounds, done)), state.best
    fitting = [s for s in state.scored if state.fits(s) and s.proxy.best.ok and not s.proxy.short]
    stale = state.stale + any(state.fits(s) for s in nominated)
    if not fitting:
        return replace(state, stale=stale)
    best = best_of(fitting, pick=pick, tolerance=tolerance)
    improved = before is None or (best.proxy.score < before.proxy.score and not best.tied(before))
    return replace(state, best=best, stale=0 if improved else stale)
