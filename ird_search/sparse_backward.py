"""A cheaper backward: of a masked layer, only the selected entries of its weight gradient.

A dense backward forms all of ∂L/∂W = gᵀ a and then most of it is thrown away. Here the selected
entries alone are computed, a sampled dense-dense product,

    ∂L/∂W[o, i] = Σ_t g[t, o] a[t, i]              for the k selected (o, i)

and of an embedding table, of which a batch reads a few rows,

    ∂L/∂W[v, d] = Σ_t [v is read at t] g[t, d]     for the k selected (v, d)

They are handed to the optimizer as a sparse gradient; no buffer of the weight's size is made.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ird_search.entries import Entries, trained_entries
from ird_search.mask import SparseMask

DENSEST = 0.08
"""Above this density of a layer the dense product is the faster one."""

BLOCK = 256
"""Positions transposed together: they stay in the processor's cache."""

FEW = 0.6
"""Below this share of touched rows (columns) it pays to gather them before they are transposed."""

SCATTERED = 0.8
"""Entries for each touched row or column below which gathering the pairs is the cheaper way."""

PAIRS = 1 << 16
"""Gathered pairs in flight: they stay in the processor's cache."""


@dataclass(frozen=True, eq=False)
class Pattern:
    """The selected entries of one matrix.

    Args:
        index: flat row-major indices, increasing, int64 [k].
        shape: rows and columns of the matrix.
    """

    index: Tensor
    shape: tuple[int, int]

    @cached_property
    def coordinates(self) -> Tensor:
        """(row, column) of each entry: [2, k]."""
        return torch.stack([self.index // self.shape[1], self.index % self.shape[1]])

    @cached_property
    def _touched(self) -> tuple[Tensor, Tensor]:
        """The rows and the columns that hold an entry; all of them, where those are many."""
        kept = []
        for places, n in zip(self.coordinates, self.shape, strict=True):
            some = places.unique()
            every = torch.arange(n, device=some.device)
            kept.append(some if some.numel() < FEW * n else every)
        return kept[0], kept[1]

    @cached_property
    def _is_scattered(self) -> bool:
        """Whether it is cheaper to gather the k pairs than to transpose what they touch."""
        return self.index.numel() < SCATTERED * sum(t.numel() for t in self._touched)

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """(row, column) of each entry, counted among the touched ones."""
        (row, column), (rows, columns) = self.coordinates, self._touched
        return torch.searchsorted(rows, row), torch.searchsorted(columns, column)

    @cached_property
    def _compressed(self) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Row bounds, columns and size of the matrix of touched rows and columns."""
        rows, columns = self._touched
        wanted = torch.arange(rows.numel() + 1, device=rows.device)
        bounds = torch.searchsorted(self._places[0], wanted)
        return bounds, self._places[1], (rows.numel(), columns.numel())

    def prepared(self) -> Pattern:
        """Itself, with all that later calls need computed."""
        _ = self._bounds, self._places, None if self._is_scattered else self._compressed
        return self

    def of_rows(self, x: Tensor) -> Tensor:
        """What `products` needs of [T, rows]: the touched ones, where they are few."""
        return _some(x, self._touched[0])

    def of_columns(self, x: Tensor) -> Tensor:
        """What `products` needs of [T, columns]."""
        return _some(x, self._touched[1])

    def products(self, left: Tensor, right: Tensor) -> Tensor:
        """Σ_t left[t, row] right[t, column] at the entries: [k].

        Args:
            left: what `of_rows` made of [T, rows].
            right: what `of_columns` made of [T, columns].
        """
        wide = torch.promote_types(left.dtype, torch.float32)
        found = (self._gathered if self._is_scattered else self._sampled)(left, right, wide)
        return found.to(left.dtype)

    def _gathered(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        """The products of the k pairs at each position, a few positions at a time."""
        row, column = self._places
        size = max(1, min(left.shape[0], PAIRS // max(1, row.numel())))
        total = left.new_zeros(size, row.numel(), dtype=dtype)
        for x, y in zip(left.split(size), right.split(size), strict=True):
            x, y = x.index_select(1, row).to(dtype), y.index_select(1, column).to(dtype)
            total[: len(x)].addcmul_(x, y)
        return total.sum(0)

    def _sampled(self, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        """Dot products over the positions, which must lie behind one another: transposed first."""
        found, beta = self._zeros(dtype), 0.0
        for part, other in zip(
            transposed(left.to(dtype)), transposed(right.to(dtype)), strict=True
        ):
            found, beta = torch.sparse.sampled_addmm(found, part, other.mT, beta=beta), 1.0
        return found.values()

    @cached_property
    def _bounds(self) -> Tensor:
        """Where each row's entries begin, and k at the end: [rows + 1]."""
        wanted = torch.arange(self.shape[0] + 1, device=self.index.device)
        return torch.searchsorted(self.coordinates[0], wanted)

    def of_row(self, row: int) -> slice:
        """The entries of one row."""
        return slice(int(self._bounds[row]), int(self._bounds[row + 1]))

    def sums(self, ids: Tensor, g: Tensor) -> Tensor:
        """Σ_t [ids[t] = row] g[t, column] at the entries: [T], [T, columns] give [k]."""
        read, place = ids.unique(return_inverse=True)
        wide = torch.promote_types(g.dtype, torch.float32)
        summed = g.new_zeros(read.numel(), g.shape[1], dtype=wide).index_add_(0, place, g.to(wide))
        start, stop = self._bounds[read], self._bounds[read + 1]
        at = torch.arange(read.numel(), device=read.device).repeat_interleave(stop - start)
        before = torch.cumsum(stop - start, 0) - (stop - start)
        hit = torch.arange(at.numel(), device=at.device) + (start - before)[at]
        found = g.new_zeros(self.index.numel())
        found[hit] = summed[at, self.coordinates[1][hit]].to(g.dtype)
        return found

    def gradient(self, values: Tensor) -> Tensor:
        """The sparse matrix with these values at the entries."""
        return torch.sparse_coo_tensor(
            self.coordinates, values, size=self.shape, is_coalesced=True, check_invariants=False
        )

    def _zeros(self, dtype: torch.dtype) -> Tensor:
        bounds, columns, size = self._compressed
        zeros = torch.zeros(columns.numel(), dtype=dtype, device=columns.device)
        with warnings.catch_warnings():
            # torch calls all of its compressed formats a beta; what is used here is tested.
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(bounds, columns, zeros, size, check_invariants=False)


def transposed(x: Tensor) -> Iterator[Tensor]:
    """The transposes of a matrix, a block of rows at a time: [T, n] gives [n, t], Σ t = T.

    A pixel of t·n channels, shuffled in t groups, is the transpose of [t, n]. In torch that takes
    a half to a quarter of the time of a transposed copy.

    Example:
        >>> [block.shape for block in transposed(torch.zeros(600, 3))]
        [torch.Size([3, 256]), torch.Size([3, 256]), torch.Size([3, 88])]
    """
    length, n = x.shape
    whole = length - length % BLOCK
    for part, size in ((x[:whole], BLOCK), (x[whole:], length - whole)):
        if part.numel():
            pixels = part.reshape(1, -1, 1, size * n).permute(0, 3, 1, 2)
            yield from F.channel_shuffle(pixels, size).permute(0, 2, 3, 1).reshape(-1, n, size)


def _some(t: Tensor, columns: Tensor) -> Tensor:
    return t.index_select(1, columns) if columns.numel() < t.shape[1] else t


class _MaskedLinear(torch.autograd.Function):
    """y = a Wᵀ + b (flipped: a W + b) whose backward gives W a sparse gradient.

    Of a, only the columns are kept that some selected entry touches.
    """

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, weight: Tensor, bias: Tensor | None, pattern: Pattern, flipped: bool
    ) -> Tensor:
        flat = a.reshape(-1, a.shape[-1])
        kept = pattern.of_rows(flat) if flipped else pattern.of_columns(flat)
        ctx.save_for_backward(kept, weight)
        ctx.pattern, ctx.flipped = pattern, flipped
        return F.linear(a, weight.mT if flipped else weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outs: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = outs
        kept, weight = ctx.saved_tensors
        to_input = None
        if ctx.needs_input_grad[0]:
            to_input = g @ (weight.mT if ctx.flipped else weight)
        flat, pattern = g.reshape(-1, g.shape[-1]), ctx.pattern
        if ctx.flipped:
            values = pattern.products(kept, pattern.of_columns(flat))
        else:
            values = pattern.products(pattern.of_rows(flat), kept)
        to_bias = flat.sum(0) if ctx.needs_input_grad[2] else None
        return to_input, pattern.gradient(values), to_bias, None, None


class _MaskedEmbedding(torch.autograd.Function):
    """y = W[ids] whose backward gives W a sparse gradient."""

    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, pattern: Pattern, padding: int | None
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.pattern, ctx.padding = pattern, padding
        return F.embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outs: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = outs
        (ids,) = ctx.saved_tensors
        values = ctx.pattern.sums(ids.flatten(), g.reshape(-1, g.shape[-1]))
        if ctx.padding is not None:
            values[ctx.pattern.of_row(ctx.padding)] = 0.0
        return None, ctx.pattern.gradient(values), None, None


def _linear(module: nn.Linear, pattern: Pattern, a: Tensor) -> Tensor:
    if _must_stay_plain(a):
        return nn.Linear.forward(module, a)
    return _MaskedLinear.apply(a, module.weight, module.bias, pattern, False)


def _conv1d(module: Conv1D, pattern: Pattern, a: Tensor) -> Tensor:
    if _must_stay_plain(a):
        return Conv1D.forward(module, a)
    return _MaskedLinear.apply(a, module.weight, module.bias, pattern, True)


def _embedding(module: nn.Embedding, pattern: Pattern, ids: Tensor) -> Tensor:
    special = module.max_norm is not None or module.scale_grad_by_freq or module.sparse
    if special or _must_stay_plain(ids):
        return nn.Embedding.forward(module, ids)
    return _MaskedEmbedding.apply(ids, module.weight, pattern, module.padding_idx)


def _must_stay_plain(a: Tensor) -> bool:
    """Autocast and compilers see through torch's own layers only."""
    return torch.compiler.is_compiling() or torch.is_autocast_enabled(a.device.type)


FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    Conv1D: _conv1d,
}


@contextmanager
def sparse_backward(
    model: nn.Module, mask: SparseMask, dense: Iterable[str] = ()
) -> Iterator[nn.Module]:
    """Within the block, layers with few selected entries compute no other weight gradient.

    Linear layers, embedding tables and the Conv1D of transformers, on the CPU. The outputs are the
    same, and the selected entries of the gradients are, up to rounding; `masked` optimizers read
    these sparse gradients. Layers of another kind, tensors selected above a density of 8% and dense
    ones are left alone, and so is everything under autocast or a compiler. The layers' own
    `forward` is back afterwards, also after an exception. A checkpointed block must be
    differentiated within the block, and gradients of these gradients are not to be had.

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
            forward = FORWARDS.get(type(module))
            if forward and pattern and "forward" not in vars(module):
                module.forward = partial(forward, module, pattern)
                stack.callback(vars(module).pop, "forward", None)
        yield model


def _pattern(e: Entries) -> Pattern | None:
    """The pattern of a weight matrix on the CPU with few selected entries."""
    weight = e.parameter
    if e.index is None or weight.ndim != 2 or weight.device.type != "cpu":
        return None
    if e.count > DENSEST * weight.numel():
        return None
    return Pattern(e.index, (weight.shape[0], weight.shape[1])).prepared()
