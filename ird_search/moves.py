"""The moves of iterative range decreasing: one step from a pair to narrower ones.

    round t:   S′ = the n′ rows of S with the largest       r_i(M) = Σ_{j∈M} F[i, j]
               M′ = the k′ columns of a range R′ with the largest  c_j(S′) = 1/|S′| Σ_{i∈S′} F[i, j]

    both      fewer rows; the range is what the mask was        S′,  R′ = M
    columns   the rows stay; the range is what the mask was     S,   R′ = M
    rows      fewer rows; the range stays as wide as it was     S′,  R′ = R
    window    the rows stay; the top of the range goes, too     S,   R′ = M without its best k′

A *range* is what is still open, a mask the best k of it; both only ever shrink. Why `window`: the
largest scores pile up in a few tensors, and parameters of a lower rank can be the better ones to
train. So a range of ranks may lose its top as well as its bottom.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ird_search.fisher import FisherMatrix
from ird_search.mask import SparseMask
from ird_search.pair import Pair, Ranges
from ird_search.selector import Selector

Move = Literal["both", "columns", "rows", "window"]
Nomination = tuple[str, Pair, SparseMask]
"""(how a strategy came to it, the pair, its mask)."""


def narrowed(
    fisher: FisherMatrix, selector: Selector, pair: Pair, ranges: Ranges, moves: tuple[Move, ...]
) -> Iterator[Nomination]:
    """The pairs one move away; what is no new pair is left out.

    A narrowing passes over no ranks but by the move `window`: what is passed over in each round
    would not come back.
    """
    reading = replace(pair.reading, skip=0.0)
    shrunk = min(pair.shrunk + 1, len(ranges.rows) - 1)
    step = min(pair.step + 1, len(ranges.columns) - 1)
    fewer = pair.rows
    if shrunk > pair.shrunk:
        fewer = selector.rows(fisher, pair.rows, ranges.rows[shrunk], pair.columns)
    scored: dict[tuple[int, int], Tensor] = {}
    # The step counts: where fewer columns than k′ have a score, k′ may fall and the mask stay.
    seen = {(pair.rows.numel(), pair.step, _digest(fisher, pair.columns))}
    for move in moves:
        rows = fewer if move in ("both", "rows") else pair.rows
        is_open = pair.open if move == "rows" else pair.columns
        known = (rows.numel(), id(is_open))
        if known not in scored:
            scored[known] = selector.scores(fisher, rows, is_open, reading)
        k = ranges.columns[step]
        skip = k if move == "window" else 0
        chosen = selector.best(scored[known], is_open, k, reading, skip=skip)
        mask = SparseMask(fisher.space, chosen if is_open is None else is_open[chosen])
        if not mask.count and move != "window":
            raise selector.nothing(scored[known], k)
        key = (rows.numel(), step, mask.digest)
        if key not in seen and (selector.fills(mask.count, k) or move != "window"):
            seen.add(key)
            if move == "window":
                top = selector.best(scored[known], is_open, k, reading)
                is_open = _without(is_open, top, scored[known].numel())
            went = shrunk if move in ("both", "rows") else pair.shrunk
            yield move, Pair(rows, is_open, mask.coords, went, step, reading), mask


def read(
    fisher: FisherMatrix, selector: Selector, pair: Pair, k: int, move: str
) -> Iterator[Nomination]:
    """The pair of these rows and this reading whose mask is the best k of all candidates.

    None where nothing can be selected, or the ranks that the reading passes over leave too few.
    """
    scores = selector.scores(fisher, pair.rows, None, pair.reading)
    mask = SparseMask(fisher.space, selector.best(scores, None, k, pair.reading))
    if mask.count and (selector.fills(mask.count, k) or not pair.reading.skip):
        yield move, replace(pair, open=None, columns=mask.coords), mask


def descended(
    fisher: FisherMatrix, selector: Selector, rows: tuple[int, ...], columns: tuple[int, ...]
) -> Tensor:
    """S where both ranges fall together, n by n and k by k: the ladder to its last rung.

    Args:
        rows: the sizes of S, the pool's first.
        columns: those of M, all candidates first, as many.
    """
    ranges, pair = Ranges(rows, columns), Pair(torch.arange(rows[0]))
    while found := list(narrowed(fisher, selector, pair, ranges, ("both",))):
        ((_, pair, _),) = found
    return pair.rows


def _without(is_open: Tensor | None, top: Tensor, width: int) -> Tensor:
    """A range of so many columns without those at some positions."""
    kept = torch.ones(width, dtype=torch.bool)
    kept[top] = False
    return kept.nonzero().flatten() if is_open is None else is_open[kept]


def _digest(fisher: FisherMatrix, columns: Tensor | None) -> str:
    return "all" if columns is None else SparseMask(fisher.space, columns).digest
