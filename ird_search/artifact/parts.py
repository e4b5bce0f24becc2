"""`Part`: one tensor of the space, and how its selected entries are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from ird_search.artifact.container import AGAIN, Layout
from ird_search.mask import SparseMask
from ird_search.parameters import ParameterSpace


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
        if self.count == 0:
            return "none"
        if self.count == self.numel:
            return "full"
        return "bits" if 32 * self.count > self.numel else "idx"  # the smaller of the two

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

    def decode(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The selected indices, int64 [count], verified."""
        if self.kind == "none":
            return torch.empty(0, dtype=torch.int64)
        if self.kind == "full":
            return torch.arange(self.numel)
        if self.kind == "bits":
            bits = np.unpackbits(stored[self.key].numpy(), bitorder="little")
            index = torch.from_numpy(bits.nonzero()[0])
        else:
            index = stored[self.key].long()
        steps = index[1:] > index[:-1]
        if index.numel() != self.count or not bool(steps.all()):
            raise ValueError(f"{self.key!r} lacks {self.count} increasing indices. {AGAIN}")
        if index[0] < 0 or index[-1] >= self.numel:  # also a padding bit that is set
            raise ValueError(f"{self.key!r} reaches beyond {self.numel} entries. {AGAIN}")
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
    return {part.key: part.layout for part in parts if part.kind in ("idx", "bits")}


def encoded(mask: SparseMask) -> dict[str, Tensor]:
    """These vectors themselves."""
    parts = [part for part in parts_of(mask) if part.kind in ("idx", "bits")]
    return {part.key: part.encode(mask.indices[part.name]) for part in parts}


def decoded(parts: Sequence[Part], stored: Mapping[str, Tensor]) -> SparseMask:
    """The mask, from the vectors by key; verified, else a ValueError."""
    space = space_of(parts)
    pieces = [
        part.decode(stored) + start
        for part, start in zip(parts, space.offsets[:-1], strict=True)
        if part.count
    ]
    return SparseMask(space, torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64))
