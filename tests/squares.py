"""Sums of squares of a linear layer's gradients, the obvious way, beside what a kernel says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.reference import relative_error

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}


def factors(
    sizes: tuple[int, int, int, int], *dtypes: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """[B, T, m] and [B, T, n], from (B, T, m, n)."""
    batch, tokens, m, n = sizes
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(batch, tokens, m, generator=generator).to(dtypes[0])
    return left, torch.randn(batch, tokens, n, generator=generator).to(dtypes[-1])


def gradients(left: Tensor, right: Tensor) -> Tensor:
    """One sample at a time, in float64: [B, m · n]."""
    rows = [(a.double().mT @ c.double()).flatten() for a, c in zip(left, right, strict=True)]
    return torch.stack(rows)


def check(add_squares: Callable[..., Tensor], left: Tensor, right: Tensor, **more: Any) -> None:
    """Sums onto what is there, and the row scores within a mask and everywhere."""
    g = gradients(left, right)
    close = max(CLOSE[left.dtype], CLOSE[right.dtype])
    before = torch.rand(2, g.shape[1])
    marks = torch.zeros(g.shape[1], dtype=torch.uint8)
    marks[::3] = 1
    for within in (marks, None):
        sums, means = before.clone()
        scores = add_squares(left, right, sums=sums, means=means, marks=within, **more)
        assert relative_error(sums, before[0] + g.square().sum(0)) <= close
        assert relative_error(means, before[1] + g.sum(0)) <= close
        inside = g.square() if within is None else g.square() * within
        assert relative_error(scores, inside.sum(1)) <= close
