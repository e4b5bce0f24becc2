"""A cheaper backward: of a masked linear layer, only the selected entries of its weight gradient.

A dense backward forms all of ∂L/∂W = gᵀ a and then most of it is thrown away. Here the selected
entries alone are computed, a sampled dense-dense product,

    ∂L/∂W[o, i] = Σ_t g[t, o] a[t, i]        for the k selected (o, i)

and handed to the optimizer as a sparse gradient; no buffer of the weight's size is made.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ird_search.entries import Entries, trained_entries
from ird_search.mask import SparseMask

DENSEST = 0.03
"""Above this density of a layer the dense product is the faster one."""


@dataclass(frozen=True, eq=False)
class Pattern:
    """The selected entries of one weight [out, in].

    Args:
        index: flat row-major indices, increasing, int64 [k].
        shape: (out, in).
    """

    index: Tensor
    shape: tuple[int, int]

    @cached_property
    def coordinates(self) -> Tensor:
        """(row, column) of each entry: [2, k]."""
        return torch.stack([self.index // self.shape[1], self.index % self.shape[1]])

    @cached_property
    def _zeros(self) -> Tensor:
        """Zeros at the entries, in compressed rows."""
        row, column = self.coordinates
        bounds = torch.searchsorted(row, torch.arange(self.shape[0] + 1, device=row.device))
        with warnings.catch_warnings():
            # torch calls all of its compressed formats a beta; what is used here is tested.
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(
                bounds,
                column,
                torch.zeros(self.index.numel(), device=row.device),
                size=self.shape,
                check_invariants=False,
            )

    def products(self, g: Tensor, a: Tensor) -> Tensor:
        """Σ_t g[t, o] a[t, i] at the entries: [T, out] and [T, in] give [k]."""
        found = torch.sparse.sampled_addmm(self._zeros, g.float().mT, a.float(), beta=0.0)
        return found.values().to(g.dtype)


class _MaskedLinear(torch.autograd.Function):
    """y = a Wᵀ + b whose backward gives W a sparse gradient."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, weight: Tensor, bias: Tensor | None, pattern: Pattern
    ) -> Tensor:
        ctx.save_for_backward(a, weight)
        ctx.pattern, ctx.has_bias = pattern, bias is not None
        return F.linear(a, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outs: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = outs
        a, weight = ctx.saved_tensors
        to_input = g @ weight if ctx.needs_input_grad[0] else None
        flat = g.reshape(-1, g.shape[-1])
        pattern = ctx.pattern
        to_weight = torch.sparse_coo_tensor(
            pattern.coordinates,
            pattern.products(flat, a.reshape(-1, a.shape[-1])),
            size=pattern.shape,
            is_coalesced=True,
            check_invariants=False,
        )
        to_bias = flat.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return to_input, to_weight, to_bias, None


@contextmanager
def sparse_backward(
    model: nn.Module, mask: SparseMask, dense: Iterable[str] = ()
) -> Iterator[nn.Module]:
    """Within the block, linear layers with few selected entries compute no other weight gradient.

    For `MaskedAdamW`, which reads sparse gradients; the outputs are the same, and the selected
    entries of the gradients are, up to rounding. Layers of another kind, tensors selected above a
    density of 3% and dense ones are left alone. The layers' own `forward` is back afterwards, also
    after an exception.

    Args:
        mask: the entries that are trained.
        dense: names of the parameters trained fully, outside the mask.

    Raises:
        ModelError: the mask is of another model.

    Example:
        >>> from ird_search.parameters import ParameterSpace
        >>> model = nn.Linear(50, 2)
        >>> mask = SparseMask(ParameterSpace.of(model, ["weight"]), torch.tensor([1, 70]))
        >>> with sparse_backward(model, mask):
        ...     model(torch.ones(3, 50)).sum().backward()
        >>> model.weight.grad._values()
        tensor([3., 3.])
    """
    masked, _ = trained_entries(model, mask, dense, allow_none=True)
    patterns = {id(e.parameter): p for e in masked if (p := _pattern(e)) is not None}
    with ExitStack() as stack:
        for module in model.modules():
            pattern = patterns.get(id(getattr(module, "weight", None)))
            if type(module) is nn.Linear and pattern and "forward" not in vars(module):
                module.forward = partial(_forward, module, pattern)  # type: ignore[method-assign]
                stack.callback(vars(module).pop, "forward", None)
        yield model


def _forward(module: nn.Linear, pattern: Pattern, a: Tensor) -> Tensor:
    return _MaskedLinear.apply(a, module.weight, module.bias, pattern)


def _pattern(e: Entries) -> Pattern | None:
    """The pattern of a weight matrix on the CPU with few selected entries."""
    weight = e.parameter
    if e.index is None or weight.ndim != 2 or weight.device.type != "cpu":
        return None
    if e.count > DENSEST * weight.numel():
        return None
    return Pattern(e.index, (weight.shape[0], weight.shape[1]))
