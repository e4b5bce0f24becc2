"""`Tile`: some rows and columns of the gradients, in memory: the first tier of a `FisherMatrix`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tile:
    """Gradients of `rows` (positions) × `columns` (sorted coordinates), on the CPU.

    Without values it is one that an interrupted run had in memory. They are squared when they are
    read, so that one tile answers for F and for the mean gradient.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor | None = None

    def equals(self, rows: Tensor, columns: Tensor) -> bool:
        return torch.equal(self.rows, rows) and torch.equal(self.columns, columns)

    def covers(self, rows: Tensor, columns: Tensor) -> bool:
        if columns.numel() > self.columns.numel() or not torch.isin(rows, self.rows).all():
            return False
        at = torch.searchsorted(self.columns, columns).clamp_(max=self.columns.numel() - 1)
        return bool((self.columns[at] == columns).all())

    def row_sums(self, rows: Tensor, columns: Tensor) -> list[Tensor]:
        """Σ_{j ∈ columns} F[i, j] for each row: squared in float32, summed in float64."""
        wide = torch.empty(columns.numel(), dtype=torch.float64)
        return [torch.square(one, out=wide).sum() for one in self._read(rows, columns)]

    def column_sums(
        self, rows: Tensor, columns: Tensor, *, mean: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Σ_{i ∈ rows} of F[i, j], and of g[i, j] where it is wanted."""
        squares = torch.zeros(columns.numel())
        means = torch.zeros(columns.numel()) if mean else None
        for one in self._read(rows, columns):
            squares += one.square()
            if means is not None:
                means += one
        return squares, means

    def resampled(
        self, rows: Tensor, columns: Tensor, counts: Tensor, *, mean: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Σ_i counts[b, i] F[i, j], and of g[i, j] where it is wanted: [B, k]."""
        weights = counts.float()
        squares = torch.zeros(weights.shape[0], columns.numel())
        means = torch.zeros_like(squares) if mean else None
        for i, one in enumerate(self._read(rows, columns)):
            squares.addr_(weights[:, i], one.square())
            if means is not None:
                means.addr_(weights[:, i], one)
        return squares, means

    def _read(self, rows: Tensor, columns: Tensor) -> Iterator[Tensor]:
        """g[i, columns] for one row after another: a second tile is never formed."""
        position = {row: i for i, row in enumerate(self.rows.tolist())}
        at = None
        if columns.numel() < self.columns.numel():
            at = torch.searchsorted(self.columns, columns)
        for row in rows.tolist():
            assert self.values is not None
            one = self.values[position[row]]
            yield one if at is None else one.index_select(0, at)
