"""`SparseMask`: a choice of columns of the samples × parameters matrix."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from ird_search.changes import frozen_changes
from ird_search.errors import UsageError
from ird_search.mismatch import listed
from ird_search.overlap import Counts, Overlap
from ird_search.parameters import ParameterSpace
from ird_search.spaces import common_space, shape_conflicts


@dataclass(frozen=True, eq=False, repr=False)
class SparseMask:
    """A set of coordinates in a `ParameterSpace`: the parameters that may be trained.

    Masks combine as sets do: `a & b`, `a | b`, `a - b`, `a ^ b`. Where they chose from different
    tensors of one model, the outcome lies in the space of all these tensors, sorted by name (see
    `common_space`). `union`, `intersection` and `disjoint` in `algebra` take many masks.

    Args:
        space: the coordinate system.
        coords: strictly increasing flat coordinates, int64 [k], on the CPU.

    Raises:
        UsageError: coordinates out of order, repeated, or outside the space.

    Example:
        >>> space = ParameterSpace(("w", "b"), ((2, 3), (2,)))
        >>> mask = SparseMask(space, torch.tensor([1, 4, 7]))
        >>> mask.count, mask.density
        (3, 0.375)
        >>> mask.indices["w"]
        tensor([1, 4])
    """

    space: ParameterSpace
    coords: Tensor

    def __post_init__(self) -> None:
        c = self.coords
        if c.dtype != torch.int64 or c.ndim != 1 or c.device.type != "cpu":
            raise UsageError(
                f"Mask coordinates must be int64, 1-D, on the CPU; these are {c.dtype}, "
                f"{c.ndim}-D, on {c.device}."
            )
        if c.numel() and (
            int(c[0]) < 0 or int(c[-1]) >= self.space.numel or bool((c[1:] <= c[:-1]).any())
        ):
            raise UsageError(
                "Mask coordinates must be strictly increasing and lie in "
                f"0 … {self.space.numel - 1}."
            )

    @classmethod
    def from_dict(cls, space: ParameterSpace, tensors: Mapping[str, Tensor]) -> SparseMask:
        """From bool tensors by name (True = train); tensors left out select nothing."""
        problems = [f"{name!r} is not in the {space}." for name in tensors if name not in space]
        problems += [
            f"{name!r} has shape {list(t.shape)}, the model's is {list(space.shape(name))}."
            for name, t in tensors.items()
            if name in space and tuple(t.shape) != space.shape(name)
        ]
        if problems:
            raise UsageError(problems)
        parts = [
            tensors[name].reshape(-1).bool().cpu().nonzero().flatten() + space.span(name).start
            for name in space.names
            if name in tensors
        ]
        return cls(space, torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64))

    def to_dict(self) -> dict[str, Tensor]:
        """Bool tensors (True = train) for every tensor with a selected entry."""
        tensors = {}
        for name, local in self.indices.items():
            flat = torch.zeros(self.space.span(name).stop - self.space.span(name).start).bool()
            flat[local] = True
            tensors[name] = flat.view(self.space.shape(name))
        return tensors

    @property
    def count(self) -> int:
        """How many parameters are selected."""
        return self.coords.numel()

    @property
    def density(self) -> float:
        """Fraction of the space that is selected; 0 in an empty one."""
        return self.count / self.space.numel if self.space.numel else 0.0

    @cached_property
    def indices(self) -> dict[str, Tensor]:
        """Flat row-major indices by tensor name, for the tensors with a selected entry."""
        return self.space.localize(self.coords)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the space and the coordinates: equal masks, equal digests."""
        h = hashlib.sha256(repr((self.space.names, self.space.shapes)).encode())
        h.update(self.coords.numpy().tobytes())
        return h.hexdigest()

    def lifted(self, space: ParameterSpace) -> SparseMask:
        """The same entries in the coordinates of another space.

        Args:
            space: it must hold every tensor with a selected entry, and may hold others.

        Raises:
            UsageError: such a tensor is missing, or a tensor of both spaces has two shapes.

        Example:
            >>> mask = SparseMask(ParameterSpace(("b",), ((2,),)), torch.tensor([1]))
            >>> mask.lifted(ParameterSpace(("w", "b"), ((2, 3), (2,)))).coords
            tensor([7])
        """
        if space == self.space:
            return self
        lines = [f"{name} is missing." for name in self.indices if name not in space]
        if lines := [*shape_conflicts([self.space, space]), *lines]:
            raise UsageError(listed("The mask does not fit the other space.", lines))
        coords = [index + space.span(name).start for name, index in self.indices.items()]
        return SparseMask(space, torch.cat(coords).sort().values if coords else self.coords)

    def __and__(self, other: SparseMask) -> SparseMask:
        """The parameters in both masks."""
        if not isinstance(other, SparseMask):
            return NotImplemented
        return in_at_least(2, [self, other])

    def __or__(self, other: SparseMask) -> SparseMask:
        """The parameters in either mask."""
        if not isinstance(other, SparseMask):
            return NotImplemented
        return in_at_least(1, [self, other])

    def __sub__(self, other: SparseMask) -> SparseMask:
        """The parameters of this mask that the other lacks."""
        if not isinstance(other, SparseMask):
            return NotImplemented
        mine, its = in_common_space([self, other])
        return SparseMask(mine.space, mine.coords[~torch.isin(mine.coords, its.coords)])

    def __xor__(self, other: SparseMask) -> SparseMask:
        """The parameters in one mask and not in both."""
        if not isinstance(other, SparseMask):
            return NotImplemented
        return (self | other) - (self & other)

    def jaccard(self, other: SparseMask) -> float:
        """|A ∩ B| / |A ∪ B|; 1 for two empty masks."""
        return self.overlap(other).total.jaccard

    def overlap(self, other: SparseMask) -> Overlap:
        """What this mask (A) and another (B) share, by tensor, beside what chance would give.

        Example:
            >>> space = ParameterSpace(("w", "b"), ((2, 3), (2,)))
            >>> a, b = (SparseMask(space, torch.tensor(c)) for c in ([0, 1, 6], [1, 2, 6]))
            >>> a.overlap(b).tensors["w"]
            Counts(entries=6, shared=1, only_a=1, only_b=1)
        """
        a, b = in_common_space([self, other])
        in_a, in_b, in_both = (_counts(m) for m in (a, b, a & b))
        return Overlap(
            {
                name: Counts(
                    entries=prod(shape),
                    shared=in_both[name],
                    only_a=in_a[name] - in_both[name],
                    only_b=in_b[name] - in_both[name],
                )
                for name, shape in zip(a.space.names, a.space.shapes, strict=True)
            }
        )

    def verify(
        self,
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
        *,
        dense: Iterable[str] = (),
    ) -> list[str]:
        """The tensors in which anything but a trained entry changed a bit; empty if the mask held.

        Give it `dict(model.named_parameters())` or, to watch buffers too, `model.state_dict()`; the
        tensors of `before` must be copies. Names that hold the same values as a masked tensor both
        before and after are tied to it and may move with it.

        Args:
            before: tensors by name before training.
            after: tensors by name after training.
            dense: names of tensors that may have moved altogether.

        Returns:
            One sentence a tensor: how many frozen entries moved, or that the tensor is missing.

        Example:
            >>> mask = SparseMask(ParameterSpace(("w",), ((4,),)), torch.tensor([1]))
            >>> mask.verify({"w": torch.zeros(4)}, {"w": torch.tensor([0.0, 5.0, 0.1, 0.0])})
            ['w: 1 of 3 frozen entries moved.']
        """
        free = {dense} if isinstance(dense, str) else set(dense)
        return frozen_changes(self.space, self.indices, before, after, free)

    def __len__(self) -> int:
        return self.count

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparseMask):
            return NotImplemented
        return self.space == other.space and torch.equal(self.coords, other.coords)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        counts = sorted(((idx.numel(), name) for name, idx in self.indices.items()), reverse=True)
        shares = ", ".join(f"{name} {n / self.count:.0%}" for n, name in counts[:3])
        more = f", {len(counts) - 3} more" if len(counts) > 3 else ""
        held = f"; {shares}{more}" if counts else ""
        return (
            f"SparseMask({self.count:,} of {self.space.numel:,} parameters, "
            f"density {self.density:.4%}{held})"
        )


def in_at_least(least: int, masks: Iterable[SparseMask]) -> SparseMask:
    """The parameters that at least so many of the masks select.

    With 1 it is their union, with the number of masks their intersection, between these a vote.

    Raises:
        UsageError: no mask is given, the masks are of different models, or `least` lies outside
            1 … the number of masks.

    Example:
        >>> space = ParameterSpace(("w",), ((6,),))
        >>> masks = [SparseMask(space, torch.tensor(c)) for c in ([0, 1], [1, 2], [1, 2, 5])]
        >>> in_at_least(2, masks).coords
        tensor([1, 2])
    """
    masks = in_common_space(masks)
    if not 1 <= least <= len(masks):
        raise UsageError(
            f"least is {least} for {len(masks)} masks; it must be from 1 (their union) to "
            f"{len(masks)} (their intersection)."
        )
    coords, votes = torch.cat([mask.coords for mask in masks]).unique(return_counts=True)
    return SparseMask(masks[0].space, coords[votes >= least])


def in_common_space(masks: Iterable[SparseMask]) -> list[SparseMask]:
    """The same masks, all of them in their `common_space`."""
    masks = list(masks)
    space = common_space([mask.space for mask in masks])
    return [mask.lifted(space) for mask in masks]


def _counts(mask: SparseMask) -> Counter[str]:
    """How many entries of each tensor are selected."""
    return Counter({name: index.numel() for name, index in mask.indices.items()})
