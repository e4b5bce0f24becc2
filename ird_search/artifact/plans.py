"""The two kinds of file, `ird-mask` and `ird-delta`: what their metadata says, and what they store.

A delta file is a mask file without samples, and with values: those at the mask's entries, and
tensors stored whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ird_search.artifact.container import AGAIN, DTYPES, Format, Layout
from ird_search.artifact.contents import ChosenRows, Delta, DeltaFile, MaskFile, clip
from ird_search.artifact.parts import (
    Part,
    decoded,
    encoded,
    index_layouts,
    parts_of,
    space_of,
)
from ird_search.mask import SparseMask
from ird_search.parameters import ParameterSpace

SAMPLES = "__samples__"

_MAX_TENSORS = 100_000
_MAX_NAME = 1_000  # characters; the space for them in a message is small, too
_MAX_RANK = 8
_MAX_NUMEL = 2**48  # keeps every coordinate far from the end of int64


@dataclass(frozen=True)
class _Parts:
    """The mask that a file of either kind holds."""

    parts: tuple[Part, ...]

    @cached_property
    def space(self) -> ParameterSpace:
        return space_of(self.parts)

    @cached_property
    def count(self) -> int:
        return sum(part.count for part in self.parts)

    @property
    def memory(self) -> int:
        bits = (part.numel for part in self.parts if part.kind == "bits")  # unpacked one by one
        return 16 * self.count + max(bits, default=0)

    def described(self) -> dict[str, Any]:
        return {
            "order": list(self.space.names),
            "params": {
                p.name: {"shape": list(p.shape), "kind": p.kind, "count": p.count}
                for p in self.parts
            },
            "space_fingerprint": self.space.fingerprint,
            "count": self.count,
            "density": self.count / self.space.numel if self.space.numel else 0.0,
        }


@dataclass(frozen=True)
class MaskPlan(_Parts):
    """A mask, and as many samples as `rows` tells."""

    rows: int = 0

    @classmethod
    def of(cls, mask: SparseMask, samples: ChosenRows | None) -> MaskPlan:
        return cls(parts_of(mask), 0 if samples is None else samples.ids.numel())

    @classmethod
    def declared(cls, metadata: Mapping[str, Any]) -> MaskPlan:
        rows = metadata.get("samples")
        if not _is_size(rows):
            raise ValueError(f"The metadata lacks a sound `samples`. {AGAIN}")
        return cls(_declared_parts(metadata), rows)

    def described(self) -> dict[str, Any]:
        return {**super().described(), "samples": self.rows}

    def layouts(self) -> dict[str, Layout]:
        layouts = index_layouts(self.parts)
        if self.rows:
            layouts[f"{SAMPLES}::idx"] = Layout("I64", (self.rows,))
            layouts[f"{SAMPLES}::score"] = Layout("F32", (self.rows,))
        return layouts

    def opened(
        self, path: Path, sha256: str, metadata: Mapping[str, Any], stored: Mapping[str, Tensor]
    ) -> MaskFile:
        samples = None
        if self.rows:
            samples = ChosenRows(stored[f"{SAMPLES}::idx"], stored[f"{SAMPLES}::score"])
            if bool((samples.ids[1:] < samples.ids[:-1]).any()):
                raise ValueError(f"The ids of the samples are not in increasing order. {AGAIN}")
        return MaskFile(path, sha256, decoded(self.parts, stored), samples, metadata)


@dataclass(frozen=True)
class DeltaPlan(_Parts):
    """A mask, and what `Delta` holds besides it.

    Args:
        dtypes: of the values at the selected entries, by name of tensor.
        dense: the tensors stored whole.
        base_sha256: as in `Delta`.
    """

    dtypes: Mapping[str, str]
    dense: Mapping[str, Layout]
    base_sha256: str

    @classmethod
    def of(cls, delta: Delta) -> DeltaPlan:
        dtypes = {name: Layout.of(values).dtype for name, values in delta.values.items()}
        dense = {name: Layout.of(tensor) for name, tensor in delta.dense.items()}
        return cls(parts_of(delta.mask), dtypes, dense, delta.base_sha256)

    @classmethod
    def declared(cls, metadata: Mapping[str, Any]) -> DeltaPlan:
        parts = _declared_parts(metadata)
        dtypes, base = metadata.get("values"), metadata.get("base_sha256")
        if not isinstance(base, str) or not re.fullmatch("[0-9a-f]{64}", base):
            raise ValueError(f"base_sha256 is {clip(base)}, no SHA-256. {AGAIN}")
        if not isinstance(dtypes, dict) or not all(map(_is_dtype, dtypes.values())):
            raise ValueError(f"The metadata lacks a sound `values`. {AGAIN}")
        if dtypes.keys() != {part.name for part in parts if part.count}:
            raise ValueError(f"`values` names other tensors than the mask selects from. {AGAIN}")
        return cls(parts, dtypes, _declared_dense(metadata), base)

    def described(self) -> dict[str, Any]:
        return {
            **super().described(),
            "values": dict(self.dtypes),
            "dense": {
                name: {"dtype": layout.dtype, "shape": list(layout.shape)}
                for name, layout in self.dense.items()
            },
            "base_sha256": self.base_sha256,
        }

    def layouts(self) -> dict[str, Layout]:
        return {
            **index_layouts(self.parts),
            **{
                f"{part.name}::value": Layout(self.dtypes[part.name], (part.count,))
                for part in self.parts
                if part.count
            },
            **{f"{name}::dense": layout for name, layout in self.dense.items()},
        }

    def opened(
        self, path: Path, sha256: str, metadata: Mapping[str, Any], stored: Mapping[str, Tensor]
    ) -> DeltaFile:
        mask = decoded(self.parts, stored)
        values = {name: stored[f"{name}::value"] for name in mask.indices}
        dense = {name: stored[f"{name}::dense"] for name in sorted(self.dense)}
        for name, tensor in dense.items():
            if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
                raise ValueError(f"{name!r} holds what is neither true nor false. {AGAIN}")
        delta = Delta(mask, values, dense, self.base_sha256, metadata["provenance"])
        return DeltaFile(path, sha256, delta, metadata)


MASK = Format("mask", MaskPlan.declared)
DELTA = Format("delta", DeltaPlan.declared)


def stored_in_mask(mask: SparseMask, samples: ChosenRows | None) -> dict[str, Tensor]:
    """The tensors of a mask file by key."""
    stored = encoded(mask)
    if samples is not None:
        by_id = samples.ids.argsort()
        stored[f"{SAMPLES}::idx"] = samples.ids[by_id]
        stored[f"{SAMPLES}::score"] = samples.scores[by_id]
    return stored


def stored_in_delta(delta: Delta) -> dict[str, Tensor]:
    """The tensors of a delta file by key."""
    return {
        **encoded(delta.mask),
        **{f"{name}::value": values for name, values in delta.values.items()},
        **{f"{name}::dense": tensor for name, tensor in delta.dense.items()},
    }


def _declared_parts(metadata: Mapping[str, Any]) -> tuple[Part, ...]:
    order, params = metadata.get("order"), metadata.get("params")
    if not (isinstance(order, list) and isinstance(params, dict)):
        raise ValueError(f"The metadata lacks a sound `order` or `params`. {AGAIN}")
    _check_number(order)
    parts = []
    for name in order:
        entry = params.get(name) if isinstance(name, str) else None
        entry = entry if isinstance(entry, dict) else {}
        shape, count = _declared_shape(name, entry), entry.get("count")
        if not _is_size(count) or count > prod(shape):
            raise ValueError(f"Tensor {clip(name)} is declared as {clip(entry)}. {AGAIN}")
        parts.append(Part(name, shape, count))
    if len(set(order)) < len(order) or not _is_size(sum(part.numel for part in parts)):
        raise ValueError(
            f"A tensor is declared twice, or all have more than {_MAX_NUMEL:,} entries. {AGAIN}"
        )
    return tuple(parts)


def _declared_dense(metadata: Mapping[str, Any]) -> dict[str, Layout]:
    dense = metadata.get("dense")
    if not isinstance(dense, dict):
        raise ValueError(f"The metadata lacks a sound `dense`. {AGAIN}")
    _check_number(dense)
    layouts = {}
    for name, entry in dense.items():
        entry = entry if isinstance(entry, dict) else {}
        shape, dtype = _declared_shape(name, entry), entry.get("dtype")
        if not _is_dtype(dtype):
            raise ValueError(f"Tensor {clip(name)} is declared as {clip(entry)}. {AGAIN}")
        layouts[name] = Layout(dtype, shape)
    return layouts


def _check_number(names: list[str] | dict[str, Any]) -> None:
    if len(names) > _MAX_TENSORS:
        raise ValueError(f"{len(names):,} tensors are declared; at most {_MAX_TENSORS:,} may be.")


def _declared_shape(name: Any, entry: Mapping[str, Any]) -> tuple[int, ...]:
    shape = entry.get("shape")
    if not (
        isinstance(shape, list)
        and len(shape) <= _MAX_RANK
        and all(map(_is_size, shape))
        and _is_size(prod(shape) or prod(filter(None, shape)))  # torch multiplies beside a 0, too
        and len(name) <= _MAX_NAME
        and name.isprintable()
        and name != SAMPLES
    ):
        raise ValueError(
            f"Tensor {clip(name)} is declared as {clip(entry)}; a printable name other than "
            f"{SAMPLES}, of at most {_MAX_NAME:,} characters, and a shape of at most {_MAX_RANK} "
            f"sizes and {_MAX_NUMEL:,} entries, are accepted."
        )
    return tuple(shape)


def _is_size(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= _MAX_NUMEL  # a bool is no size


def _is_dtype(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and value in DTYPES
