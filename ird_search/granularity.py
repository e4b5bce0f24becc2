"""`Units`: what is selected whole: single entries, or rows, columns or blocks of a weight matrix.

A unit's score is the mean of its entries' scores. Hardware gains from whole rows or blocks, and an
adapter can hold them; single entries hold more Fisher information for as many parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ird_search.config import Granularity
from ird_search.parameters import ParameterSpace


@dataclass(frozen=True)
class Units:
    """A partition of the candidate parameters.

    A tensor [m, n, …] is a matrix of m rows and n columns, whose entries are vectors if it has more
    axes (a convolution's kernels). Vectors and scalars are parted into single entries.

    Args:
        space: the candidate parameters.
        granularity: "row": one output of an `nn.Linear`; "column": one input; "block": a square.
        block: the side of a block; what is left at the edges is smaller.

    Example:
        >>> units = Units(ParameterSpace(("w",), ((2, 2),)), "row")
        >>> units.smoothed(torch.tensor([1.0, 3.0, 2.0, 1.0]), None)
        tensor([2.0000, 2.0000, 1.5000, 1.5000])
        >>> units.whole(torch.tensor([0, 1, 2]), None)  # of the second row, one entry is missing
        tensor([0, 1])
    """

    space: ParameterSpace
    granularity: Granularity = "entry"
    block: int = 16

    def smoothed(self, scores: Tensor, is_open: Tensor | None) -> Tensor:
        """Each entry's score, replaced by the mean over its unit's open entries: [n].

        Args:
            scores: [n], of the open columns.
            is_open: their sorted coordinates; None for all of the space.
        """
        if self.granularity == "entry":
            return scores
        found = scores.clone()
        for part, ids in self._parts(is_open):
            one = scores[part].double()
            sums = torch.zeros(int(ids.max()) + 1, dtype=torch.float64).index_add_(0, ids, one)
            found[part] = (sums / ids.bincount().clamp(min=1))[ids].to(scores.dtype)
        return found

    def whole(self, chosen: Tensor, is_open: Tensor | None) -> Tensor:
        """The chosen positions [k] without those of units of which only a part is chosen."""
        if self.granularity == "entry":
            return chosen
        kept = []
        for part, ids in self._parts(is_open):
            low, high = torch.searchsorted(chosen, torch.tensor([part.start, part.stop])).tolist()
            at = chosen[low:high]
            taken = ids[at - part.start]
            sizes = ids.bincount()
            complete = taken.bincount(minlength=sizes.numel()) == sizes
            kept.append(at[complete[taken]])
        return torch.cat(kept)

    def of(self, name: str) -> Tensor:
        """The unit that each entry of a tensor is in, counting from 0: int64 [m · n · …]."""
        shape = self.space.shapes[self.space.names.index(name)]
        return self._ids(torch.arange(prod(shape)), shape)

    def _parts(self, is_open: Tensor | None) -> list[tuple[slice, Tensor]]:
        """For each tensor: its positions among the open columns, and the unit of each."""
        found = []
        for i, (name, shape) in enumerate(zip(self.space.names, self.space.shapes, strict=True)):
            start, stop = self.space.offsets[i], self.space.offsets[i + 1]
            index = torch.arange(stop - start)
            if is_open is not None:
                start, stop = torch.searchsorted(is_open, torch.tensor([start, stop])).tolist()
                index = is_open[start:stop] - self.space.span(name).start
            if start < stop:
                found.append((slice(start, stop), self._ids(index, shape)))
        return found

    def _ids(self, index: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The unit that each entry of a tensor is in."""
        if len(shape) < 2 or self.granularity == "entry":
            return index
        inner = prod(shape[2:])
        row, column = index // (shape[1] * inner), index // inner % shape[1]
        if self.granularity == "row":
            return row
        if self.granularity == "column":
            return column
        across = -(-shape[1] // self.block)
        return row // self.block * across + column // self.block
