"""`Columns`: a choice of entries of one tensor, in the forms that sums over it need."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Columns:
    """A choice of entries of one tensor, in the forms that sums over it need.

    Args:
        index: strictly increasing entries, int64 [k].
        numel: P_l, the number of entries of the tensor.
    """

    index: Tensor
    numel: int

    @classmethod
    def none(cls, numel: int, device: torch.device | str = "cpu") -> Columns:
        """No entry of a tensor."""
        return cls(torch.empty(0, dtype=torch.int64, device=device), numel)

    @property
    def count(self) -> int:
        """k."""
        return self.index.numel()

    @cached_property
    def weights(self) -> Tensor:
        """As `marks`, float32, kept."""
        return self.marks().float()

    def marks(self) -> Tensor:
        """1 at the chosen entries, else 0, uint8: [P_l]."""
        marks = torch.zeros(self.numel, dtype=torch.uint8, device=self.index.device)
        return marks.index_fill_(0, self.index, 1)

    @cached_property
    def _patterns(self) -> dict[int, Tensor]:
        return {}

    def pattern(self, width: int) -> Tensor:
        """The entries as a sparse matrix of zeros, CSR: [P_l / width, width]."""
        if width not in self._patterns:
            height = self.numel // width
            edges = torch.arange(height + 1, device=self.index.device) * width
            with warnings.catch_warnings():
                # "Sparse CSR tensor support is in beta state": only its pattern is used here.
                warnings.simplefilter("ignore", UserWarning)
                self._patterns[width] = torch.sparse_csr_tensor(
                    torch.searchsorted(self.index, edges),
                    self.index % width,
                    torch.zeros(self.count, device=self.index.device),
                    (height, width),
                )
        return self._patterns[width]

    def take(self, gradients: Tensor) -> Tensor:
        """The chosen entries, a view where all are: [..., P_l] → [..., k]."""
        return gradients if self.count == self.numel else gradients.index_select(-1, self.index)

    def sum_squares(self, gradients: Tensor) -> Tensor:
        """Σ over the chosen entries of gradients²: [b, P_l] → [b]."""
        # Gathering costs about sixteen times as much an entry as reading along.
        if self.count < self.numel < 16 * self.count:
            return row_dots(gradients * self.weights, gradients)
        chosen = self.take(gradients)
        return row_dots(chosen, chosen)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Σ_j a[b, j] · b[b, j]: [b, n] × [b, n] → [b]."""
    return torch.linalg.vecdot(a, b) if a.shape[0] > 1 else torch.dot(a[0], b[0])[None]
