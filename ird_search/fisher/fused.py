"""`fused_for`: where the squares of a linear layer's gradients are summed by a kernel of our own.

That is on CUDA with Triton (`kernel`), and on a CPU with a C compiler (`native`), once the kernel
agrees there with the plain product; everywhere else, and where IRD_SEARCH_FUSED=0, the product is
formed in memory. With TRITON_INTERPRET=1 the GPU's kernel runs on the CPU, in Triton's interpreter:
slow, and how it is tested.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from ird_search.errors import first_line, out_of_memory
from ird_search.fisher.native import NoCompilerError

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}
"""Largest relative error against the plain product, by what the factors are in."""

LEAST = 128 * 128
"""On a CPU, gradients of smaller matrices stay in its cache and are formed there."""

Squares = Callable[..., Tensor]
"""`kernel.add_squares` or `native.add_squares`."""


def fused_for(left: Tensor, right: Tensor) -> Squares | None:
    """The kernel for these factors, or None where the plain product is to be taken.

    Args:
        left: [B, T, m].
        right: [B, T, n].
    """
    known = {left.dtype, right.dtype} <= TOLERANCE.keys()
    if not known or os.environ.get("IRD_SEARCH_FUSED") == "0":
        return None
    if left.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        return _tried("kernel", left.device, left.dtype, right.dtype)
    if left.device.type == "cpu" and left.shape[2] * right.shape[2] >= LEAST:
        return _tried("native", left.device, left.dtype, right.dtype)
    return None


@cache
def _tried(
    module: str, device: torch.device, left: torch.dtype, right: torch.dtype
) -> Squares | None:
    """The kernel of a module where it works on such factors."""
    try:
        add_squares: Squares = import_module(f"ird_search.fisher.{module}").add_squares
        error = _error(add_squares, device, left, right)
    except (ImportError, NoCompilerError) as missing:
        log.info("Gradients of linear layers are formed in memory on %s: %s", device, missing)
        return None
    except Exception as problem:  # whatever a compiler or a driver raises
        if out_of_memory(problem):
            raise MemoryError(str(problem)) from problem
        told = first_line(problem)[:200]
        log.warning("The fused kernel fails on %s: %s: %s", device, type(problem).__name__, told)
        return None
    allowed = max(TOLERANCE[left], TOLERANCE[right])
    if torch.get_float32_matmul_precision() != "highest":
        allowed = TOLERANCE[torch.bfloat16]
    if not error <= allowed:
        log.warning(
            "The fused kernel is off the product by %.1e on %s, more than %.0e; it is not used.",
            error,
            device,
            allowed,
        )
        return None
    log.info("The fused kernel is used on %s, error against the product %.1e.", device, error)
    return add_squares


def _error(add_squares: Squares, device: torch.device, *dtypes: torch.dtype) -> float:
    """Largest relative error of the sums, their means and the row scores on a small case."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((3, 21, 70), (3, 21, 40))  # no multiple of a tile's sides
    left, right = (
        torch.randn(size, generator=generator).to(device, dtype)
        for size, dtype in zip(sizes, dtypes, strict=True)
    )
    g = torch.bmm(left.double().mT, right.double()).flatten(1)
    marks = (torch.rand(g.shape[1], generator=generator) < 0.3).to(device, torch.uint8)
    squares, means = torch.zeros(2, g.shape[1], dtype=torch.float32, device=device)
    scores = add_squares(left, right, sums=squares, means=means, marks=marks)
    pairs = (
        (squares, g.square().sum(0)),
        (means, g.sum(0)),
        (scores, (g.square() * marks).sum(1)),
    )
    return max(float((found - wanted).norm() / wanted.norm()) for found, wanted in pairs)
