"""`SparseMask`: a choice of columns of the samples × parameters matrix."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ird_search.errors import UsageError
from ird_search.parameters import ParameterSpace


@dataclass(frozen=True, eq=False, repr=False)
class SparseMask:
    """A set of coordinates in a `ParameterSpace`: the parameters that may be trained.

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

    def __and__(self, other: SparseMask) -> SparseMask:
        """The parameters in both masks."""
        both = self._joined(other)
        return SparseMask(self.space, both[0][both[1] == 2])

    def __or__(self, other: SparseMask) -> SparseMask:
        """The parameters in either mask."""
        return SparseMask(self.space, self._joined(other)[0])

    def __sub__(self, other: SparseMask) -> SparseMask:
        """The parameters of this mask that the other lacks."""
        common = (self & other).coords
        return SparseMask(self.space, self.coords[~torch.isin(self.coords, common)])

    def jaccard(self, other: SparseMask) -> float:
        """|A ∩ B| / |A ∪ B|; 1 for two empty masks."""
        union = (self | other).count
        return (self & other).count / union if union else 1.0

    def _joined(self, other: SparseMask) -> tuple[Tensor, Tensor]:
        if self.space != other.space:
            raise UsageError(
                f"Masks of different models cannot be combined: {self.space} and {other.space}."
            )
        values, counts = torch.cat([self.coords, other.coords]).unique(return_counts=True)
        return values, counts

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
