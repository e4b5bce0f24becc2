"""`packed`, `unpacked`, `digest`: sets of coordinates on the way to a file."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor


def packed(coords: Tensor, numel: int) -> Tensor:
    """Increasing coordinates below `numel` as int32 or int64, or as bits where these are fewer.

    Example:
        >>> packed(torch.tensor([1, 99]), 100), packed(torch.arange(8), 8)
        (tensor([ 1, 99], dtype=torch.int32), tensor([255], dtype=torch.uint8))
    """
    if 32 * coords.numel() > numel:
        bits = np.zeros(numel, dtype=bool)
        bits[coords.numpy()] = True
        return torch.from_numpy(np.packbits(bits, bitorder="little"))
    return coords.to(torch.int32 if numel <= 2**31 else torch.int64)


def unpacked(stored: Tensor) -> Tensor:
    """The coordinates again, int64; the dtype tells how they are stored."""
    if stored.dtype == torch.uint8:
        return torch.from_numpy(np.unpackbits(stored.numpy(), bitorder="little").nonzero()[0])
    return stored.long()


def digest(coords: Tensor | None) -> str:
    """SHA-256 of some coordinates in their order; `all` where there is no choice."""
    if coords is None:
        return "all"
    return hashlib.sha256(coords.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()
