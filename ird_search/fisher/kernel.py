"""A fused kernel for linear layers on a GPU: the gradients that are squared never reach memory.

Of the two factors of B samples' gradients (`gradients.Outer`) a program takes one tile of the
weight, [BM, BN], and goes through the samples. A sample's gradient in the tile is a product on the
matrix units, accumulated in float32:

    G[b] = Σ_t left[b, t, :] ⊗ right[b, t, :]

Its square is added to the tile's column sums, and the masked part of it is the tile's share of the
sample's row score. Only sums are written, in an order that is always the same.

    operations   2 B T m n, as one plain gradient of the weight
    bytes read   e B T (m ⌈n / BN⌉ + n ⌈m / BM⌉), e bytes a number, most of them from the cache
    written      4 m n, and 4 B for each tile

Formed in memory, the gradients are 4 B m n bytes, written once and read once or twice.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 512
"""As many at least keep a GPU busy; where a weight has fewer tiles, the samples are shared out."""

SHARED_BYTES = 64 * 2**20
"""What column sums of shared-out samples may take until they are added."""


@dataclass(frozen=True)
class Tiling:
    """How the work is cut.

    Args:
        rows, columns: of a tile, BM and BN.
        tokens: multiplied at a time.
        warps: of a program.
    """

    rows: int
    columns: int
    tokens: int
    warps: int = 8

    @classmethod
    def of(cls, left: Tensor, right: Tensor) -> Tiling:
        """Half precision goes through the matrix units, float32 does not: it has smaller tiles."""
        half = left.dtype == right.dtype != torch.float32
        tokens = min(64 if half else 16, triton.next_power_of_2(left.shape[1]))
        side = min(64, triton.next_power_of_2(left.shape[2]))
        most = min(128 if half else 64, triton.next_power_of_2(right.shape[2]))
        return cls(max(16, side), max(16, most), max(16, tokens))


@triton.jit
def _kernel(
    left,
    right,
    marks,
    sums,
    means,
    scores,
    batch,
    tokens,
    m,
    n,
    share,
    left_b,
    left_t,
    left_m,
    right_b,
    right_t,
    right_n,
    HAS_SUMS: tl.constexpr,
    HAS_MEANS: tl.constexpr,
    SCORED: tl.constexpr,
    MASKED: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
):
    column, row, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i = row * BM + tl.arange(0, BM)
    j = column * BN + tl.arange(0, BN)
    t = tl.arange(0, BT)
    inside = (i < m)[:, None] & (j < n)[None, :]
    at = i.to(tl.int64)[:, None] * n + j[None, :]
    tile = row * tl.num_programs(0) + column
    chosen = tl.load(marks + at, inside, 0).to(tl.float32) if MASKED else 1.0
    squared = tl.zeros((BM, BN), tl.float32)
    signed = tl.zeros((BM, BN), tl.float32)
    first = part * share
    # 64 bits: 16,384 tokens of 131,072 outputs are 2³¹ numbers
    a = left + first.to(tl.int64) * left_b + i.to(tl.int64)[:, None] * left_m
    c = right + first.to(tl.int64) * right_b + j.to(tl.int64)[None, :] * right_n
    score = scores + tile.to(tl.int64) * batch + first
    for _ in range(first, min(batch, first + share)):
        g = tl.zeros((BM, BN), tl.float32)
        for start in range(0, tokens, BT):
            s = (start + t).to(tl.int64)
            x = tl.load(a + s[None, :] * left_t, (i < m)[:, None] & (s < tokens)[None, :], 0.0)
            y = tl.load(c + s[:, None] * right_t, (s < tokens)[:, None] & (j < n)[None, :], 0.0)
            if WIDEN:
                x, y = x.to(tl.float32), y.to(tl.float32)
            g = tl.dot(x, y, g, input_precision=PRECISION)
        if HAS_MEANS:
            signed += g
        g *= g
        if HAS_SUMS:
            squared += g
        if SCORED:
            tl.store(score, tl.sum(g * chosen))
        a += left_b
        c += right_b
        score += 1
    at += part.to(tl.int64) * m * n
    if HAS_SUMS:
        tl.store(sums + at, tl.load(sums + at, inside, 0.0) + squared, inside)
    if HAS_MEANS:
        tl.store(means + at, tl.load(means + at, inside, 0.0) + signed, inside)


COMPILED = isinstance(_kernel, triton.JITFunction)
"""Not within the interpreter, whose products of bfloat16 are those of its bit patterns."""


def add_squares(
    left: Tensor,
    right: Tensor,
    *,
    sums: Tensor | None = None,
    means: Tensor | None = None,
    marks: Tensor | None = None,
    scored: bool = True,
    tiling: Tiling | None = None,
) -> Tensor:
    """Add Σ_b G[b]² to `sums` and Σ_b G[b] to `means`, and return Σ_j marks[j] G[b, j]²: [B].

    Args:
        left: the factor along the rows of the weight, [B, T, m], of any strides.
        right: the factor along its columns, [B, T, n].
        sums: float32 [m · n].
        means: float32 [m · n].
        marks: uint8 [m · n]; 1 everywhere where left out.
        scored: whether row scores are wanted; else they are zero.
        tiling: how the work is cut; by the sizes where left out.
    """
    (batch, tokens, m), n = left.shape, right.shape[2]
    cut = tiling or Tiling.of(left, right)
    tiles = (triton.cdiv(n, cut.columns), triton.cdiv(m, cut.rows))
    parts = _parts(batch, tiles[0] * tiles[1], m * n)
    share = triton.cdiv(batch, parts)
    parts = triton.cdiv(batch, share)
    outs = [x if x is None or parts == 1 else x.new_zeros(parts, m * n) for x in (sums, means)]
    each = (tiles[0] * tiles[1], batch if scored else 1)
    scores = torch.zeros(each, dtype=torch.float32, device=left.device)
    arguments: dict[str, Any] = {
        "HAS_SUMS": sums is not None,
        "HAS_MEANS": means is not None,
        "SCORED": scored,
        "MASKED": marks is not None,
        "WIDEN": left.dtype != right.dtype or not COMPILED,
        "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        "BM": cut.rows,
        "BN": cut.columns,
        "BT": cut.tokens,
        "num_warps": cut.warps,
    }
    places = [scores if x is None else x for x in (marks, *outs)]  # one that is not looked at
    grid = (*tiles, parts)
    sizes = (batch, tokens, m, n, share, *left.stride(), *right.stride())
    with torch.cuda.device_of(left):
        _kernel[grid](left, right, *places, scores, *sizes, **arguments)
    for total, found in zip((sums, means), outs, strict=True):
        if total is not None and found is not None and found is not total:
            total += found.sum(0)
    return scores.sum(0) if scored else scores.new_zeros(batch)


def _parts(batch: int, tiles: int, entries: int) -> int:
    """Into how many the samples are shared out."""
    wanted = triton.cdiv(PROGRAMS, tiles)
    return max(1, min(batch, wanted, SHARED_BYTES // (4 * entries)))
