"""`SampleGradients`: the per-sample gradients of one tensor, kept in the form they come in.

For a linear layer the gradient of sample b is a product of two factors, the inputs a[b, t, i] and
the output gradients g[b, t, o]:

    G[b] = Σ_t g[b, t, :] ⊗ a[b, t, :]          [o, i]

so B gradients fit in B·T·(i + o) numbers instead of B·i·o. Every class here answers the same four
questions about the B × P_l matrix G without forming it whole: the squares summed over samples (and
with them G itself), the squares summed over entries, single entries, and (for checks) all of it.

G is squared per sample, then summed; the square of a batch's summed gradient is another quantity.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ird_search.fisher.columns import Columns, row_dots
from ird_search.fisher.fused import fused_for

CHUNK_BYTES = 64 * 2**20
"""On an accelerator, dense gradients are formed for as many samples at once as fit in this."""

SAMPLED = 1 / 8
"""Below this density, single entries are cheaper than the whole product; on a CPU, see
`benchmarks/bench_columns.py`."""


class SampleGradients(ABC):
    """Gradients of one tensor for B samples: a matrix [B, P_l] that need not be formed."""

    @property
    @abstractmethod
    def batch(self) -> int:
        """B."""

    @property
    @abstractmethod
    def numel(self) -> int:
        """P_l."""

    @abstractmethod
    def dense(self) -> Tensor:
        """All of it, float32: [B, P_l]. For checks and small tensors."""

    @abstractmethod
    def entries(self, columns: Columns) -> Tensor:
        """The chosen entries of each sample's gradient, float32; may be a view: [B, k]."""

    @abstractmethod
    def select(self, rows: Tensor | slice) -> SampleGradients:
        """The gradients of some of the samples, in the order of `rows`; a view for a slice."""

    @property
    @abstractmethod
    def storages(self) -> tuple[Tensor, ...]:
        """The tensors that keeping this object keeps alive (shared ones appear in several)."""

    def formed(self) -> Iterator[tuple[slice, Tensor]]:
        """(samples, their whole gradients [b, P_l]); what came before may be overwritten."""
        for b in range(self.batch):
            yield slice(b, b + 1), self.select(slice(b, b + 1)).dense()

    def sampled(self, columns: Columns) -> bool:
        """Whether the chosen entries by themselves are cheaper than all."""
        return columns.count < SAMPLED * columns.numel

    def parts(self, columns: int) -> Iterator[tuple[slice, SampleGradients]]:
        """The samples in parts whose entries at so many columns fit in `CHUNK_BYTES`."""
        step = max(1, CHUNK_BYTES // (4 * max(1, columns)))
        for start in range(0, self.batch, step):
            part = slice(start, min(start + step, self.batch))
            yield part, self.select(part)

    def add_squares(
        self, sums: Tensor, within: Columns | None = None, *, means: Tensor | None = None
    ) -> Tensor:
        """Add Σ_b G[b]² to `sums` [P_l] and return Σ_{j ∈ within} G[b, j]²: [B].

        Over all entries where `within` is None; an empty choice costs nothing. Where `means` [P_l]
        is given, Σ_b G[b] is added to it, while each gradient is there anyway.
        """
        scores = torch.zeros(self.batch, device=sums.device)
        for part, flat in self.formed():
            if flat.shape[0] == 1:
                sums.addcmul_(flat[0], flat[0])
            else:
                sums += flat.square().sum(0)
            if means is not None:
                means += flat[0] if flat.shape[0] == 1 else flat.sum(0)
            if within is None:
                scores[part] = row_dots(flat, flat)
            elif within.count:
                scores[part] = within.sum_squares(flat)
        return scores

    def add_some(self, columns: Columns, squares: Tensor, means: Tensor | None = None) -> None:
        """Add Σ_b G[b]² at the chosen entries to `squares` [k], and Σ_b G[b] to `means`."""
        if self.sampled(columns):
            for _, part in self.parts(columns.count):
                found = part.entries(columns)
                squares += found.square().sum(0)
                if means is not None:
                    means += found.sum(0)
            return
        sums = torch.zeros(self.numel, device=squares.device)
        signed = None if means is None else torch.zeros_like(sums)
        self.add_squares(sums, Columns.none(self.numel, sums.device), means=signed)
        squares += columns.take(sums)
        if means is not None and signed is not None:
            means += columns.take(signed)

    def square_norms(self, within: Columns | None = None) -> Tensor:
        """Σ_{j ∈ within} G[b, j]², over all entries where `within` is None: [B]."""
        if within is not None and self.sampled(within):
            found = [g.entries(within).square().sum(1) for _, g in self.parts(within.count)]
        elif within is not None:
            found = [within.sum_squares(flat) for _, flat in self.formed()]
        else:
            found = [row_dots(flat, flat) for _, flat in self.formed()]
        return torch.cat(found)


@dataclass(frozen=True, eq=False)
class Dense(SampleGradients):
    """Gradients that exist as they are: [B, P_l].

    For biases, norms, and everything that `vmap` or the loop computes.
    """

    gradients: Tensor

    @property
    def batch(self) -> int:
        return self.gradients.shape[0]

    @property
    def numel(self) -> int:
        return self.gradients.shape[1]

    def dense(self) -> Tensor:
        return self.gradients.float()

    def entries(self, columns: Columns) -> Tensor:
        return columns.take(self.gradients).float()

    def formed(self) -> Iterator[tuple[slice, Tensor]]:
        # Small tensors at once; large ones in rows that stay in the processor's cache.
        step = max(1, 2**18 // max(1, self.gradients.shape[1]))
        for start in range(0, self.batch, step):
            part = slice(start, min(start + step, self.batch))
            yield part, self.gradients[part].float()

    def select(self, rows: Tensor | slice) -> Dense:
        return Dense(self.gradients[rows])

    @property
    def storages(self) -> tuple[Tensor, ...]:
        return (self.gradients,)


@dataclass(frozen=True, eq=False)
class Outer(SampleGradients):
    """Gradients of a weight matrix as factors: G[b] = Σ_t left[b, t, :] ⊗ right[b, t, :].

    Args:
        left: [B, T, m], the factor along the rows of the weight.
        right: [B, T, n], the factor along its columns.
    """

    left: Tensor
    right: Tensor

    @property
    def batch(self) -> int:
        return self.left.shape[0]

    @property
    def _size(self) -> tuple[int, int]:
        return self.left.shape[2], self.right.shape[2]

    @property
    def numel(self) -> int:
        return self.left.shape[2] * self.right.shape[2]

    def dense(self) -> Tensor:
        return torch.bmm(self.left.float().mT, self.right.float()).flatten(1)

    def formed(self) -> Iterator[tuple[slice, Tensor]]:
        m, n = self._size
        left, right = self.left.float().mT, self.right.float()
        step = 1 if left.device.type == "cpu" else max(1, CHUNK_BYTES // (4 * max(1, m * n)))
        buffer = torch.empty(min(step, self.batch), m, n, device=left.device)
        for start in range(0, self.batch, step):
            part = slice(start, min(start + step, self.batch))
            product = torch.bmm(left[part], right[part], out=buffer[: part.stop - start])
            yield part, product.view(part.stop - start, m * n)

    def entries(self, columns: Columns) -> Tensor:
        if self.left.shape[1] == 1:
            n = self._size[1]
            rows, cols = columns.index // n, columns.index % n
            left, right = self.left[:, 0].float(), self.right[:, 0].float()
            return left.index_select(1, rows) * right.index_select(1, cols)
        out = torch.empty(self.batch, columns.count, device=self.left.device)
        if self.sampled(columns):
            self._sample(columns, out)
        else:
            for part, flat in self.formed():
                out[part] = columns.take(flat)
        return out

    def _sample(self, columns: Columns, out: Tensor) -> None:
        """Only the entries' own scalar products: a sampled dense-dense product."""
        pattern = columns.pattern(self._size[1])
        # torch takes what is left over of eights one by one, at several times the cost.
        more = -self.left.shape[1] % 8
        left, right = (pad(x.float(), (0, 0, 0, more)) for x in (self.left, self.right))
        for one, a, b in zip(out, left.mT, right, strict=True):
            one.copy_(torch.sparse.sampled_addmm(pattern, a, b, beta=0.0).values())

    def add_squares(
        self, sums: Tensor, within: Columns | None = None, *, means: Tensor | None = None
    ) -> Tensor:
        if self.left.shape[1] > 1:
            found = self._fused(within, sums=sums, means=means)
            return super().add_squares(sums, within, means=means) if found is None else found
        # With one token G² = g² ⊗ a², so the sum over samples is one matrix product.
        left, right = self.left[:, 0].float(), self.right[:, 0].float()
        sums.view(self._size).addmm_(left.square().mT, right.square())
        if means is not None:
            means.view(self._size).addmm_(left.mT, right)
        return self.square_norms(within)

    def square_norms(self, within: Columns | None = None) -> Tensor:
        """Over all entries also Σ_{t,u} ⟨g_t, g_u⟩⟨a_t, a_u⟩, the cheaper form for few tokens."""
        m, n = self._size
        tokens = self.left.shape[1]
        if within is None and tokens * (m + n) < m * n:
            left, right = self.left.float(), self.right.float()
            inner = torch.bmm(left, left.mT).mul_(torch.bmm(right, right.mT))
            return inner.sum((1, 2)).clamp_(min=0)
        sampled = within is not None and self.sampled(within)
        found = None if sampled else self._fused(within)
        return super().square_norms(within) if found is None else found

    def _fused(
        self, within: Columns | None, *, sums: Tensor | None = None, means: Tensor | None = None
    ) -> Tensor | None:
        """The sums by a kernel that forms no gradient in memory; None where there is none."""
        if (fused := fused_for(self.left, self.right)) is None:
            return None
        scored = within is None or within.count > 0
        # Not kept: the marks of all tensors would need as much memory as the sums.
        marks = within.marks() if within is not None and scored else None
        return fused(self.left, self.right, sums=sums, means=means, marks=marks, scored=scored)

    def select(self, rows: Tensor | slice) -> Outer:
        return Outer(self.left[rows], self.right[rows])

    @property
    def storages(self) -> tuple[Tensor, ...]:
        return (self.left, self.right)


@dataclass(frozen=True, eq=False)
class Lookup(SampleGradients):
    """Gradients of an embedding table: row ids[b, t] of the table receives g[b, t, :].

    Never [B, vocabulary, d]: a sample touches at most T rows of the table.

    Args:
        ids: which row each token reads, int64 [B, T]; the padding row is −1.
        left: output gradients [B, T, d].
        rows: number of rows of the table.
    """

    ids: Tensor
    left: Tensor
    rows: int

    @property
    def batch(self) -> int:
        return self.ids.shape[0]

    @property
    def numel(self) -> int:
        return self.rows * self.left.shape[2]

    def _touched(self) -> tuple[Tensor, Tensor, Tensor]:
        """(sample, table row, summed gradient [·, d]) for each touched (sample, row) pair."""
        batch, tokens = self.ids.shape
        sample = torch.arange(batch, device=self.ids.device).repeat_interleave(tokens)
        ids, left = self.ids.flatten(), self.left.flatten(0, 1).float()
        real = ids >= 0
        pairs, place = torch.unique(sample[real] * self.rows + ids[real], return_inverse=True)
        summed = left.new_zeros(pairs.numel(), left.shape[1]).index_add_(0, place, left[real])
        return pairs // self.rows, pairs % self.rows, summed

    def dense(self) -> Tensor:
        sample, row, summed = self._touched()
        out = summed.new_zeros(self.batch, self.rows, summed.shape[1])
        out[sample, row] = summed
        return out.flatten(1)

    def entries(self, columns: Columns) -> Tensor:
        sample, row, summed = self._touched()
        pair, place = _hits(row, summed.shape[1], columns)
        out = summed.new_zeros(self.batch, columns.count)
        out[sample[pair], place] = summed[pair, columns.index[place] % summed.shape[1]]
        return out

    def add_squares(
        self, sums: Tensor, within: Columns | None = None, *, means: Tensor | None = None
    ) -> Tensor:
        sample, row, summed = self._touched()
        squares = summed.square()
        size = self.rows, self.left.shape[2]
        sums.view(size).index_add_(0, row, squares)
        if means is not None:
            means.view(size).index_add_(0, row, summed)
        return self._norms(sample, row, squares, within)

    def add_some(self, columns: Columns, squares: Tensor, means: Tensor | None = None) -> None:
        _, row, summed = self._touched()
        pair, place = _hits(row, summed.shape[1], columns)
        found = summed[pair, columns.index[place] % summed.shape[1]]
        squares.index_add_(0, place, found.square())
        if means is not None:
            means.index_add_(0, place, found)

    def square_norms(self, within: Columns | None = None) -> Tensor:
        sample, row, summed = self._touched()
        return self._norms(sample, row, summed.square(), within)

    def _norms(
        self, sample: Tensor, row: Tensor, squares: Tensor, within: Columns | None
    ) -> Tensor:
        scores = squares.new_zeros(self.batch)
        if within is None:
            return scores.index_add_(0, sample, squares.sum(1))
        pair, place = _hits(row, squares.shape[1], within)
        chosen = squares[pair, within.index[place] % squares.shape[1]]
        return scores.index_add_(0, sample[pair], chosen)

    def select(self, rows: Tensor | slice) -> Lookup:
        return Lookup(self.ids[rows], self.left[rows], self.rows)

    @property
    def storages(self) -> tuple[Tensor, ...]:
        return (self.ids, self.left)


@dataclass(frozen=True, eq=False)
class Routed(SampleGradients):
    """Gradients of E weight matrices in one tensor, of which each token uses some: an expert's.

        G[b, e] = Σ_{t: ids[b, t] = e} left[b, t, :] ⊗ right[b, t, :]

    Args:
        ids: which matrix each token uses, int64 [B, T]; −1 for none. A token that uses several
            stands there as often.
        left: [B, T, m], the factor along the rows of a matrix.
        right: [B, T, n], the factor along its columns.
        matrices: E.
    """

    ids: Tensor
    left: Tensor
    right: Tensor
    matrices: int

    @property
    def batch(self) -> int:
        return self.ids.shape[0]

    @property
    def numel(self) -> int:
        return self.matrices * self.left.shape[2] * self.right.shape[2]

    def dense(self) -> Tensor:
        m, n = self.left.shape[2], self.right.shape[2]
        out = torch.zeros(self.batch, self.matrices, m, n, device=self.left.device)
        for b, used in enumerate(self.ids):
            for e in used[used >= 0].unique().tolist():
                at = used == e
                out[b, e] = self.left[b, at].float().mT @ self.right[b, at].float()
        return out.flatten(1)

    def entries(self, columns: Columns) -> Tensor:
        out = torch.empty(self.batch, columns.count, device=self.left.device)
        for part, flat in self.formed():
            out[part] = columns.take(flat)
        return out

    def select(self, rows: Tensor | slice) -> Routed:
        return Routed(self.ids[rows], self.left[rows], self.right[rows], self.matrices)

    @property
    def storages(self) -> tuple[Tensor, ...]:
        return (self.ids, self.left, self.right)


def _hits(row: Tensor, width: int, columns: Columns) -> tuple[Tensor, Tensor]:
    """Which chosen entries lie in which of some table rows, int64: (position in `row`, in k)."""
    first = torch.searchsorted(columns.index, row * width)
    counts = torch.searchsorted(columns.index, (row + 1) * width) - first
    pair = torch.arange(row.numel(), device=row.device).repeat_interleave(counts)
    before = counts.cumsum(0) - counts
    place = torch.arange(pair.numel(), device=row.device) + (first - before)[pair]
    return pair, place
