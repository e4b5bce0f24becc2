"""`SampleGradients`: the per-sample gradients of one tensor, kept in the form they come in.

For a linear layer the gradient of sample b is a product of two factors, the inputs a[b, t, i] and
the output gradients g[b, t, o]:

    G[b] = Σ_t g[b, t, :] ⊗ a[b, t, :]          [o, i]

so B gradients fit in B·T·(i + o) numbers instead of B·i·o. Every class here answers the same four
questions about the B × P_l matrix G without forming it whole: the squares summed over samples,
the squares summed over entries, single entries, and (for checks) all of it.

G is squared per sample, then summed; the square of a batch's summed gradient is another quantity.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20
"""On an accelerator, dense gradients are formed for as many samples at once as fit in this."""


class SampleGradients(ABC):
    """Gradients of one tensor for B samples: a matrix [B, P_l] that need not be formed."""

    @property
    @abstractmethod
    def batch(self) -> int:
        """B."""

    @abstractmethod
    def dense(self) -> Tensor:
        """All of it, float32: [B, P_l]. For checks and small tensors."""

    @abstractmethod
    def entries(self, columns: Tensor) -> Tensor:
        """G[:, columns], float32: [B, k]."""

    @abstractmethod
    def add_squares(self, sums: Tensor, within: Columns | None) -> Tensor:
        """Add Σ_b G[b]² to `sums` [P_l] and return Σ_{j ∈ within} G[b, j]²: [B]."""

    @abstractmethod
    def square_norms(self) -> Tensor:
        """Σ_j G[b, j]² over all entries: [B]."""

    @abstractmethod
    def select(self, rows: Tensor) -> SampleGradients:
        """The gradients of some of the samples, in the order of `rows`."""

    @property
    @abstractmethod
    def storages(self) -> tuple[Tensor, ...]:
        """The tensors that keeping this object keeps alive (shared ones appear in several)."""


@dataclass(frozen=True, eq=False)
class Columns:
    """A choice of entries of one tensor, in the two forms that sums over it need.

    Args:
        index: strictly increasing entries, int64 [k].
        numel: P_l, the number of entries of the tensor.
    """

    index: Tensor
    numel: int

    @cached_property
    def weights(self) -> Tensor:
        """1 at the chosen entries, else 0, float32: [P_l]."""
        return torch.zeros(self.numel, device=self.index.device).index_fill_(0, self.index, 1.0)

    def sum_squares(self, gradients: Tensor) -> Tensor:
        """Σ over the chosen entries of gradients²: [..., P_l] → [...]."""
        # Gathering costs about sixteen times as much an entry as reading along.
        if 16 * self.index.numel() > self.numel:
            return torch.linalg.vector_norm(gradients * self.weights, dim=-1).square()
        chosen = gradients.index_select(-1, self.index)
        return torch.linalg.vector_norm(chosen, dim=-1).square()


@dataclass(frozen=True, eq=False)
class Dense(SampleGradients):
    """Gradients that exist as they are: [B, P_l].

    For biases, norms, and everything that `vmap` or the loop computes.
    """

    gradients: Tensor

    @property
    def batch(self) -> int:
        return self.gradients.shape[0]

    def dense(self) -> Tensor:
        return self.gradients.float()

    def entries(self, columns: Tensor) -> Tensor:
        return self.gradients.index_select(1, columns).float()

    def add_squares(self, sums: Tensor, within: Columns | None) -> Tensor:
        for one in self.gradients:  # row by row: no second [B, P_l] buffer
            one = one.float()
            sums.addcmul_(one, one)
        if within is None:
            return self.square_norms()
        return within.sum_squares(self.dense())

    def square_norms(self) -> Tensor:
        return torch.linalg.vector_norm(self.gradients, dim=1, dtype=torch.float32).square()

    def select(self, rows: Tensor) -> Dense:
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

    def dense(self) -> Tensor:
        return torch.bmm(self.left.float().mT, self.right.float()).flatten(1)

    def entries(self, columns: Tensor) -> Tensor:
        _, n = self._size
        rows, row_at = torch.unique(columns // n, return_inverse=True)
        cols, col_at = torch.unique(columns % n, return_inverse=True)
        # Only the rows and columns that are touched: real masks touch few of them.
        left = self.left.index_select(2, rows).float().mT
        right = self.right.index_select(2, cols).float()
        place = row_at * cols.numel() + col_at
        out = torch.empty(self.batch, columns.numel(), device=columns.device)
        for b in range(self.batch):
            torch.index_select((left[b] @ right[b]).view(-1), 0, place, out=out[b])
        return out

    def add_squares(self, sums: Tensor, within: Columns | None) -> Tensor:
        if self.left.shape[1] == 1:
            return self._add_single_token(sums, within)
        m, n = self._size
        left, right = self.left.float().mT, self.right.float()
        step = 1 if left.device.type == "cpu" else max(1, CHUNK_BYTES // (4 * m * n))
        scores = torch.empty(self.batch, device=sums.device)
        buffer = torch.empty(min(step, self.batch), m, n, device=sums.device)
        for start in range(0, self.batch, step):
            part = slice(start, min(start + step, self.batch))
            formed = buffer[: part.stop - start]
            torch.bmm(left[part], right[part], out=formed)
            flat = formed.view(part.stop - start, m * n)
            if within is not None:
                scores[part] = within.sum_squares(flat)
            for one in flat if step == 1 else [flat]:
                sums.addcmul_(one, one) if one.ndim == 1 else sums.add_(one.square_().sum(0))
        return self.square_norms() if within is None else scores

    def _add_single_token(self, sums: Tensor, within: Columns | None) -> Tensor:
        """With one token G² = g² ⊗ a², so the sum over samples is one matrix product."""
        left, right = self.left[:, 0].float().square(), self.right[:, 0].float().square()
        sums.view(self._size).addmm_(left.mT, right)
        if within is None:
            return left.sum(1) * right.sum(1)
        chosen = within.weights.view(self._size)
        return ((left @ chosen) * right).sum(1)

    def square_norms(self) -> Tensor:
        """Σ_j G² = Σ_{t,u} ⟨g_t, g_u⟩⟨a_t, a_u⟩ where tokens are few, else by forming G."""
        m, n = self._size
        tokens = self.left.shape[1]
        left, right = self.left.float(), self.right.float()
        if tokens * (m + n) < m * n:
            inner = torch.bmm(left, left.mT).mul_(torch.bmm(right, right.mT))
            return inner.sum((1, 2)).clamp_(min=0)
        norms = [
            torch.linalg.vector_norm(g.mT @ a).square() for g, a in zip(left, right, strict=True)
        ]
        return torch.stack(norms)

    def select(self, rows: Tensor) -> Outer:
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

    @cached_property
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
        sample, row, summed = self._touched
        out = summed.new_zeros(self.batch, self.rows, summed.shape[1])
        out[sample, row] = summed
        return out.flatten(1)

    def entries(self, columns: Tensor) -> Tensor:
        sample, row, summed = self._touched
        d = summed.shape[1]
        wanted, which = torch.unique(columns // d, return_inverse=True)
        place = torch.full((self.rows,), -1, device=columns.device)
        place[wanted] = torch.arange(wanted.numel(), device=columns.device)
        hit = place[row] >= 0
        table = summed.new_zeros(self.batch, wanted.numel(), d)
        table[sample[hit], place[row[hit]]] = summed[hit]
        return table.flatten(1).index_select(1, which * d + columns % d)

    def add_squares(self, sums: Tensor, within: Columns | None) -> Tensor:
        sample, row, summed = self._touched
        squares = summed.square()
        sums.view(self.rows, -1).index_add_(0, row, squares)
        if within is not None:
            squares = squares * within.weights.view(self.rows, -1)[row]
        return squares.new_zeros(self.batch).index_add_(0, sample, squares.sum(1))

    def square_norms(self) -> Tensor:
        sample, _, summed = self._touched
        return summed.new_zeros(self.batch).index_add_(0, sample, summed.square().sum(1))

    def select(self, rows: Tensor) -> Lookup:
        return Lookup(self.ids[rows], self.left[rows], self.rows)

    @property
    def storages(self) -> tuple[Tensor, ...]:
        return (self.ids, self.left)


def added(parts: list[SampleGradients]) -> SampleGradients:
    """The gradients of a tensor that is used more than once: Σ of the uses, before any square.

    Uses of one weight matrix join along the token axis, Σ_u g_uᵀ a_u = [g₁; g₂]ᵀ [a₁; a₂].
    """
    if len(parts) == 1:
        return parts[0]
    if all(isinstance(p, Outer) for p in parts):
        outers = [p for p in parts if isinstance(p, Outer)]
        return Outer(
            torch.cat([p.left for p in outers], 1), torch.cat([p.right for p in outers], 1)
        )
    if all(isinstance(p, Lookup) for p in parts):
        lookups = [p for p in parts if isinstance(p, Lookup)]
        return Lookup(
            torch.cat([p.ids for p in lookups], 1),
            torch.cat([p.left for p in lookups], 1),
            lookups[0].rows,
        )
    return Dense(torch.stack([p.dense() for p in parts]).sum(0))


def kept_bytes(gradients: list[SampleGradients]) -> int:
    """Memory that keeping these takes; storage shared between them counts once."""
    seen = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for g in gradients
        for t in g.storages
    }
    return sum(seen.values())
