"""`Part`: one tensor of the space, and how its selected entries are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ird_search.artifact.container import AGAIN, Layout
from ird_search.mask import SparseMask
from ird_search.parameters import ParameterSpace

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """One tensor of the space: how many of its entries are selected, and stored in which way."""

    name: str
    shape: tuple[int, ...]
    count: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def kind(self) -> str:
        count, numel = self.count, self.numel
        if count == 0:
            return "none"
        if count == numel:
            return "full"
        return "bits" if 32 * count > numel else "idx"  # the smaller of the two

    @property
    def key(self) -> str:
        return f"{self.name}::{self.kind}"

    @property
    def layout(self) -> Layout:
        """Of the stored vector."""
        if self.kind == "bits":
            return Layout("U8", (-(-self.numel // 8),))
        return Layout("I64" if self.numel > 2**31 - 1 else "I32", (self.count,))

    def encode(self, index: Tensor) -> Tensor:
        """The vector that stands for the selected indices."""
        if self.kind == "idx":
            return index.to(torch.int64 if self.layout.dtype == "I64" else torch.int32)
        bits = np.zeros(self.numel, dtype=bool)
        bits[index.numpy()] = True
        return torch.from_numpy(np.packbits(bits, bitorder="little"))

    def decode(self, stored: Mapping[str, Tensor]) -> IntArray:
        """The selected indices, int64 [count], verified."""
        kind, numel = self.kind, self.numel
        if kind in ("none", "full"):
            return np.arange(self.count, dtype=np.int64)
        key = f"{self.name}::{kind}"
        vector = stored[key].numpy()
        if kind == "bits":
            index = np.unpackbits(vector, bitorder="little").nonzero()[0]
        else:
            index = vector.astype(np.int64)
        if index.size != self.count or (index[1:] <= index[:-1]).any():
            raise ValueError(f"{key!r} lacks {self.count} increasing indices. {AGAIN}")
        if index[0] < 0 or index[-1] >= numel:  # also a padding bit that is set
            raise ValueError(f"{key!r} reaches beyond {numel} entries. {AGAIN}")
        return index


def parts_of(mask: SparseMask) -> tuple[Part, ...]:
    """The tensors of a mask's space, in order."""
    local = mask.indices
    return tuple(
        Part(name, shape, local[name].numel() if name in local else 0)
        for name, shape in zip(mask.space.names, mask.space.shapes, strict=True)
    )


def space_of(parts: Sequence[Part]) -> ParameterSpace:
    """The space whose tensors the parts are."""
    return ParameterSpace(tuple(p.name for p in parts), tuple(p.shape for p in parts))


def index_layouts(parts: Sequence[Part]) -> dict[str, Layout]:
    """The vectors that stand for the selected entries, by key."""
    return {part.key: part.layout for part in parts if 0 < part.count < part.numel}


def encoded(mask: SparseMask) -> dict[str, Tensor]:
    """These vectors themselves."""
    parts = [part for part in parts_of(mask) if part.kind in ("idx", "bits")]
    return {part.key: part.encode(mask.indices[part.name]) for part in parts}


def decoded(parts: Sequence[Part], stored: Mapping[str, Tensor]) -> SparseMask:
    """The mask, from the vectors by key; verified, else a ValueError."""
    space = space_of(parts)
    coords = np.empty(sum(part.count for part in parts), dtype=np.int64)
    end = 0
    for part, offset in zip(parts, space.offsets[:-1], strict=True):
        start, end = end, end + part.count
        if part.count:
            np.add(part.decode(stored), offset, out=coords[start:end])
    return SparseMask(space, torch.from_numpy(coords))
