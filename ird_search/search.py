"""The search: narrow the rows and the columns of F in turn, and let proxies judge.

    F[i, j] = (∂ log p(yᵢ | xᵢ; θ) / ∂θⱼ)²          samples × parameters

    S₀ = the N pool samples,  R₀ = M₀ = all candidate parameters
    round t:   S′ = the n′ rows of S with the largest       r_i(M) = Σ_{j∈M} F[i, j]
               M′ = the k′ columns of a range R′ with the largest  c_j(S′) = 1/|S′| Σ_{i∈S′} F[i, j]

    both      fewer rows; the range is what the mask was        S′,  R′ = M
    columns   the rows stay; the range is what the mask was     S,   R′ = M
    rows      fewer rows; the range stays as wide as it was     S′,  R′ = R
    window    the rows stay; the top of the range goes, too     S,   R′ = M without its best k′

A *range* is what is still open, a mask the best k of it; both only ever shrink. Sizes fall
geometrically: n from N to `min_samples`, k from all candidates to the target. `ladder` makes the
move `both` each round. `walk` nominates all four, which have the same k′ and so can be compared,
scores each with a proxy, and moves to the best. Once k is at the target, rows go on shrinking until
nothing has improved for `patience` rounds. The best pair at the target is returned, not the last.

Why `window`: the largest scores pile up in a few tensors, and parameters of a lower rank can be
the better ones to train. So a range of ranks may lose its top as well as its bottom.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ird_search.budgets import Budgets
from ird_search.candidate import Candidate, ProxyScore, require_success
from ird_search.config import Strategy
from ird_search.errors import ModelError
from ird_search.fisher import FisherMatrix
from ird_search.mask import SparseMask
from ird_search.selection import decreasing_range, top_k

Move = Literal["both", "columns", "rows", "window"]
MOVES: dict[Strategy, tuple[Move, ...]] = {
    "ladder": ("both",),
    "walk": ("both", "columns", "rows", "window"),
}


@dataclass(frozen=True)
class Ranges:
    """The sizes that rows and columns fall through, largest first."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def geometric(
        cls, samples: int, parameters: int, *, min_samples: int, budget: int, rounds: int
    ) -> Ranges:
        """From all samples to `min_samples`, from all parameters to `budget`."""
        rows = decreasing_range(samples, min(min_samples, samples), rounds)
        columns = decreasing_range(parameters, budget, rounds)
        return cls(tuple(rows), tuple(columns))


@dataclass(frozen=True, eq=False)
class Pair:
    """A sample set and a mask, and the range that the mask was chosen from.

    Args:
        rows: S, positions in the pool, increasing.
        open: R, the columns that were open; None for all.
        columns: M ⊆ R, the mask; None for all.
        shrunk: how often the rows have shrunk.
        step: how often k has fallen.
    """

    rows: Tensor
    open: Tensor | None = None
    columns: Tensor | None = None
    shrunk: int = 0
    step: int = 0


@dataclass(frozen=True, eq=False)
class Scored:
    """A pair that a proxy has judged."""

    move: Move
    pair: Pair
    mask: SparseMask
    proxy: ProxyScore

    @property
    def order(self) -> tuple[float, int]:
        """Better first: the lower score, then the fewer parameters."""
        return self.proxy.score, self.mask.count


@dataclass(frozen=True, eq=False)
class Round:
    """What one round nominated, and where it went."""

    number: int
    nominated: tuple[Scored, ...]
    moved_to: Scored


@dataclass(frozen=True, eq=False)
class SearchState:
    """Where a search stands: a value, so it can be tested step by step.

    Args:
        best: the best pair at the target density so far.
        stale: rounds since the best improved, once there is one.
    """

    pair: Pair
    best: Scored | None = None
    stale: int = 0
    rounds: tuple[Round, ...] = ()


Nomination = tuple[Move, Pair, SparseMask]
Narrow = Callable[[Pair], Sequence[Nomination]]
"""What a round nominates from where the search stands: `nominate`, with all but the pair given."""
Judge = Callable[[Sequence[Candidate]], Sequence[ProxyScore]]
"""Scores candidate masks; lower is better."""


def search(
    narrow: Narrow,
    judge: Judge,
    ranges: Ranges,
    *,
    patience: int = 2,
    on_round: Callable[[Round], None] | None = None,
) -> SearchState:
    """Narrow until the target is reached and nothing has improved for `patience` rounds.

    Args:
        on_round: told of each round as it ends.

    Raises:
        NoProxySucceeded: every proxy at the target failed.
        ModelError: no candidate parameter has a gradient.
    """
    state, target = SearchState(Pair(torch.arange(ranges.rows[0]))), len(ranges.columns) - 1
    while state.stale < patience:
        found = narrow(state.pair)
        if not found:
            break
        scores = judge([_candidate(state, pair, mask) for _, pair, mask in found])
        nominated = tuple(Scored(*f, score) for f, score in zip(found, scores, strict=True))
        state = advance(state, nominated, target=target)
        if on_round is not None:
            on_round(state.rounds[-1])
    require_success(
        {
            f"round {r.number}, {s.move}": s.proxy
            for r in state.rounds
            for s in r.nominated
            if s.pair.step == target
        }
    )
    return state


def nominate(
    fisher: FisherMatrix,
    pair: Pair,
    ranges: Ranges,
    *,
    moves: tuple[Move, ...],
    budgets: Budgets,
) -> Iterator[Nomination]:
    """The pairs that one round compares; what is no new pair is left out."""
    shrunk = min(pair.shrunk + 1, len(ranges.rows) - 1)
    step = min(pair.step + 1, len(ranges.columns) - 1)
    fewer = pair.rows
    if shrunk > pair.shrunk:
        fewer = pair.rows[top_k(fisher.row_scores(pair.rows, pair.columns), ranges.rows[shrunk])]
    scored: dict[tuple[int, int], Tensor] = {}
    # The step counts: where fewer columns than k′ have a score, k′ may fall and the mask stay.
    seen = {(pair.rows.numel(), pair.step, _digest(fisher, pair.columns))}
    for move in moves:
        rows = fewer if move in ("both", "rows") else pair.rows
        is_open = pair.open if move == "rows" else pair.columns
        known = (rows.numel(), id(is_open))
        if known not in scored:
            scored[known] = fisher.column_scores(rows, is_open)
        k = ranges.columns[step]
        chosen = budgets.ranks(scored[known], is_open, k if move == "window" else 0, k)
        mask = SparseMask(fisher.space, chosen if is_open is None else is_open[chosen])
        if not mask.count and move != "window":
            raise ModelError(_nothing_to_select(scored[known], k, budgets))
        key = (rows.numel(), step, mask.digest)
        if key not in seen and (mask.count == k or move != "window"):
            seen.add(key)
            if move == "window":
                top = budgets.ranks(scored[known], is_open, 0, k)
                is_open = _without(is_open, top, scored[known].numel())
            went = shrunk if move in ("both", "rows") else pair.shrunk
            yield move, Pair(rows, is_open, mask.coords, went, step), mask


def _nothing_to_select(scores: Tensor, k: int, budgets: Budgets) -> str:
    if not bool((scores > 0).any()):
        return (
            "Every candidate parameter has a Fisher score of exactly zero: no gradient reaches "
            "them. Look for detached or unused layers, or change include or exclude."
        )
    shares = zip(budgets.groups, budgets.shares(k), strict=True)
    told = ", ".join(f"{share:,} of {label!r}" for (label, _), share in shares)
    return (
        f"A budget of {k:,} is {told}, and where it gives something, all scores are exactly zero. "
        "Raise density or scoring_steps, or pass other groups."
    )


def _without(is_open: Tensor | None, top: Tensor, width: int) -> Tensor:
    """A range of so many columns without those at some positions."""
    kept = torch.ones(width, dtype=torch.bool)
    kept[top] = False
    return kept.nonzero().flatten() if is_open is None else is_open[kept]


def _digest(fisher: FisherMatrix, columns: Tensor | None) -> str:
    return "all" if columns is None else SparseMask(fisher.space, columns).digest


def _candidate(state: SearchState, pair: Pair, mask: SparseMask) -> Candidate:
    """What the proxy trains. Its rates begin at the parent's best, grown as 1/√density."""
    start = None
    if state.rounds and (parent := state.rounds[-1].moved_to).proxy.best.ok:
        start = parent.proxy.best.rate * (parent.mask.count / max(1, mask.count)) ** 0.5
    return Candidate("ird", mask, pair.rows.numel(), start)


def advance(state: SearchState, nominated: tuple[Scored, ...], *, target: int) -> SearchState:
    """Move to the best nominated pair, and remember the best at the target density."""
    moved_to = min(nominated, key=lambda s: s.order)
    done = Round(len(state.rounds) + 1, nominated, moved_to)
    there = [s for s in nominated if s.pair.step == target and s.proxy.best.ok]
    best = min([*([state.best] if state.best else []), *there], key=lambda s: s.order, default=None)
    stale = state.stale + 1 if state.best is not None and best is state.best else 0
    return replace(state, pair=moved_to.pair, best=best, stale=stale, rounds=(*state.rounds, done))
