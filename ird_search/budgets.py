"""`Budgets`: one budget, or one for each group of parameters, with bounds for each tensor.

Scores of different kinds of parameters do not compare. In LoRA, W + B A with B = 0 at the start,
the gradient of A is exactly zero and afterwards grows with B: one ranking over both would give
nearly all of the budget to B, whatever A is worth. So each group has a share of its own.

Within a group one ranking piles up: most of a small mask can fall into a single matrix. A *floor*
and a *ceiling* bound the density of every tensor, as multiples of the density of its group; with
both at 1 each tensor has the same density.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ird_search.errors import UsageError
from ird_search.parameters import ParameterSpace, compiled
from ird_search.selection import ranks, top_positive

LORA = (r"\.lora_(embedding_)?A\b", r"\.lora_(embedding_)?B\b")
"""The two factors of LoRA and DoRA."""

REST = "the rest"


@dataclass(frozen=True)
class Budgets:
    """Disjoint groups of tensors; each gets a share of a budget in proportion to its size.

    Args:
        space: the candidate parameters.
        groups: tensor names by the group's name. Together they are the space.

    Example:
        >>> space = ParameterSpace(("a", "b"), ((4,), (8,)))
        >>> budgets = Budgets.of(space, ["a"])
        >>> budgets.shares(6)
        (2, 4)
        >>> scores = torch.tensor([0.0, 0.0, 0.0, 1.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0])
        >>> budgets.ranks(scores, None, 0, 6)  # of "a", no other score is above zero
        tensor([3, 4, 5, 6, 7])
    """

    space: ParameterSpace
    groups: tuple[tuple[str, tuple[str, ...]], ...]

    @classmethod
    def of(cls, space: ParameterSpace, patterns: Sequence[str] | None = None) -> Budgets:
        """A group for each pattern, in order, and one for the rest.

        Args:
            patterns: regular expressions searched in the names. By default LoRA's two factors,
                where both are there; an empty list means one budget for all.

        Raises:
            UsageError: a pattern is no regular expression, or matches nothing that an earlier
                one has left.
        """
        if patterns is None:
            found = [any(re.search(p, name) for name in space.names) for p in LORA]
            patterns = LORA if all(found) else ()
        left, groups = list(space.names), []
        for pattern in compiled(patterns, "groups"):
            names = tuple(filter(pattern.search, left))
            groups.append((pattern.pattern, names))
            left = [name for name in left if name not in names]
        if empty := [pattern for pattern, names in groups if not names]:
            raise UsageError(
                f"groups pattern {p!r} matches no candidate parameter that no earlier pattern "
                f"matched. Names look like {list(space.names[:3])}."
                for p in empty
            )
        if left:
            groups.append((REST, tuple(left)))
        return cls(space, tuple(groups))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Parameters in each group."""
        return tuple(sum(map(self._numel, names)) for _, names in self.groups)

    def shares(self, k: int) -> tuple[int, ...]:
        """k entries shared among the groups in proportion to their sizes; they sum to k.

        Webster's method, size/(2 s + 1): a larger k never gives a group less.
        """
        total = max(1, self.space.numel)
        shares = [max(0, k * size // total - 1) for size in self.sizes]
        while sum(shares) < k:
            worth = [size / (2 * s + 1) for size, s in zip(self.sizes, shares, strict=True)]
            shares[worth.index(max(worth))] += 1
        return tuple(shares)

    def ranks(
        self,
        scores: Tensor,
        is_open: Tensor | None,
        skip: int,
        k: int,
        *,
        floor: float = 0.0,
        ceiling: float | None = None,
    ) -> Tensor:
        """The best k of each group's share, behind the best `skip`: positions in `scores`.

        Only positive scores count, so fewer than k come back where a group has fewer. The exact
        count comes before the bounds: a ceiling yields where nothing else is left to choose.

        Args:
            scores: [n], of the open columns.
            is_open: their sorted coordinates; None for all of the space.
            floor: the least density of a tensor, as a multiple of its group's; 0 … 1.
            ceiling: the most, likewise, at least 1; None for no bound.
        """
        bounded = floor > 0 or ceiling is not None
        if len(self.groups) == 1 and not bounded:
            return ranks(scores, skip, k)
        chosen = []
        parts = zip(self.groups, self.sizes, self.shares(skip), self.shares(k), strict=True)
        for (_, names), size, skipped, share in parts:
            spans = self._spans(names, is_open)
            own = torch.cat([scores[span] for span in spans])
            if bounded:
                shares = [self._numel(name) / max(1, size) for name in names]
                tensors = own.split([span.stop - span.start for span in spans])
                if skipped:
                    _take(own, tensors, shares, skipped, floor, ceiling)
                found = _take(own, tensors, shares, share, floor, ceiling)
            else:
                found = ranks(own, skipped, share)
            chosen.append(_back(found, spans))
        return torch.cat(chosen).sort().values

    def _numel(self, name: str) -> int:
        span = self.space.span(name)
        return span.stop - span.start

    def counts(self, coords: Tensor) -> dict[str, int]:
        """How many of some sorted coordinates lie in each group."""
        return {
            label: sum(span.stop - span.start for span in self._spans(names, coords))
            for label, names in self.groups
        }

    def _spans(self, names: Sequence[str], is_open: Tensor | None) -> list[slice]:
        """Where each tensor's columns lie among the open ones."""
        spans = [self.space.span(name) for name in names]
        if is_open is None:
            return spans
        ends = torch.tensor([[span.start, span.stop] for span in spans])
        return [slice(*both) for both in torch.searchsorted(is_open, ends).tolist()]


def _take(
    scores: Tensor,
    tensors: Sequence[Tensor],
    shares: Sequence[float],
    k: int,
    floor: float,
    ceiling: float | None,
) -> Tensor:
    """The k best positions with ⌊floor · k · share⌋ … ⌈ceiling · k · share⌉ in each tensor.

    First each tensor's floor, then by one ranking what the ceilings leave, then by one ranking
    whatever is left. What is taken has a score of 0 afterwards.

    Args:
        scores: of a group, written to.
        tensors: each tensor's part of them, views in their order.
    """
    within = torch.zeros(scores.numel(), dtype=torch.bool)
    taken: list[Tensor] = []

    def take(found: Tensor) -> None:
        scores[found] = 0
        taken.append(found)

    start = 0
    for own, share in zip(tensors, shares, strict=True):
        least = min(own.numel(), math.floor(floor * k * share))
        most = own.numel() if ceiling is None else min(own.numel(), _ceil(ceiling * k * share))
        within[start + top_positive(own, most)] = True
        take(start + top_positive(own, least))
        start += own.numel()
    for free in (scores.where(within, 0.0), scores):
        take(top_positive(free, k - sum(t.numel() for t in taken)))
    return torch.cat(taken)


def _back(positions: Tensor, spans: Sequence[slice]) -> Tensor:
    """Positions within spans that are laid end to end, as positions in what they are spans of."""
    starts = torch.tensor([span.start for span in spans])
    ends = torch.tensor([span.stop - span.start for span in spans]).cumsum(0)
    which = torch.searchsorted(ends, positions, right=True)
    return positions - torch.cat([ends.new_zeros(1), ends])[which] + starts[which]


def _ceil(x: float) -> int:
    """⌈x⌉, whatever the last bits of a product that should be whole."""
    return math.ceil(x - 1e-9)
