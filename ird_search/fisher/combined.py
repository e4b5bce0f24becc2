"""Several gradients a sample: of the uses of one tensor (`added`), of several labels (`Terms`).

Uses add up before any square, terms after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ird_search.fisher.columns import Columns
from ird_search.fisher.gradients import Dense, Lookup, Outer, SampleGradients


@dataclass(frozen=True, eq=False)
class Added(SampleGradients):
    """G = Σ_u G_u, one tensor used in unlike ways: an embedding tied to the output layer.

    The uses are added sample by sample, before any square.
    """

    uses: tuple[SampleGradients, ...]

    @property
    def batch(self) -> int:
        return self.uses[0].batch

    @property
    def numel(self) -> int:
        return self.uses[0].numel

    def dense(self) -> Tensor:
        first, *rest = self.uses
        total = first.dense()
        for use in rest:
            total = total + use.dense()
        return total

    def entries(self, columns: Columns) -> Tensor:
        return torch.stack([use.entries(columns) for use in self.uses]).sum(0)

    def select(self, rows: Tensor | slice) -> Added:
        return Added(tuple(use.select(rows) for use in self.uses))

    @property
    def storages(self) -> tuple[Tensor, ...]:
        return tuple(t for use in self.uses for t in use.storages)


def added(uses: list[SampleGradients]) -> SampleGradients:
    """The gradients of a tensor that is used more than once: Σ of the uses, before any square.

    Uses of one weight matrix join along the token axis, Σ_u g_uᵀ a_u = [g₁; g₂]ᵀ [a₁; a₂].
    """
    if len(uses) == 1:
        return uses[0]
    outers = [u for u in uses if isinstance(u, Outer)]
    if len(outers) == len(uses):
        return Outer(
            torch.cat([u.left for u in outers], 1), torch.cat([u.right for u in outers], 1)
        )
    lookups = [u for u in uses if isinstance(u, Lookup)]
    if len(lookups) == len(uses):
        return Lookup(
            torch.cat([u.ids for u in lookups], 1),
            torch.cat([u.left for u in lookups], 1),
            lookups[0].rows,
        )
    return Added(tuple(uses))


@dataclass(frozen=True, eq=False)
class Terms(SampleGradients):
    """Several gradients a sample, whose *squares* add up: F[b] = Σ_v G_v[b]².

    One for each label that a sample may have, or for each of its tokens. It stands for the root
    √F[b], which has no sign: its square is what is asked for everywhere, and its sum is nothing.
    """

    terms: tuple[SampleGradients, ...]

    @property
    def batch(self) -> int:
        return self.terms[0].batch

    @property
    def numel(self) -> int:
        return self.terms[0].numel

    def dense(self) -> Tensor:
        return self._root(term.dense() for term in self.terms)

    def entries(self, columns: Columns) -> Tensor:
        return self._root(term.entries(columns) for term in self.terms)

    def sampled(self, columns: Columns) -> bool:
        return all(term.sampled(columns) for term in self.terms)

    @staticmethod
    def _root(found: Iterator[Tensor]) -> Tensor:
        total = next(found).square()
        for one in found:
            total.addcmul_(one, one)
        return total.sqrt_()

    def add_squares(
        self, sums: Tensor, within: Columns | None = None, *, means: Tensor | None = None
    ) -> Tensor:
        """As everywhere, term by term.

        Raises:
            ValueError: the mean is wanted as well.
        """
        if means is not None:
            raise ValueError("Squares of several gradients have no mean gradient.")
        return torch.stack([term.add_squares(sums, within) for term in self.terms]).sum(0)

    def square_norms(self, within: Columns | None = None) -> Tensor:
        return torch.stack([term.square_norms(within) for term in self.terms]).sum(0)

    def select(self, rows: Tensor | slice) -> Terms:
        return Terms(tuple(term.select(rows) for term in self.terms))

    @property
    def storages(self) -> tuple[Tensor, ...]:
        return tuple(t for term in self.terms for t in term.storages)


def squared_together(held: SampleGradients, more: SampleGradients) -> SampleGradients:
    """`held` with one more term: as terms while their factors are smaller than the root."""
    terms = (*held.terms, more) if isinstance(held, Terms) else (held, more)
    both = Terms(terms)
    size = sum(t.numel() * t.element_size() for t in both.storages)
    return both if size <= 4 * both.batch * both.numel else Dense(both.dense())
