"""What the files hold: `MaskFile` a mask and `ChosenRows`, `DeltaFile` a `Delta`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ird_search.artifact.container import DTYPES
from ird_search.artifact.parts import index_layouts, parts_of
from ird_search.errors import UsageError
from ird_search.mask import SparseMask

WRITER = ("tool", "tool_version", "torch_version")
"""What the metadata says about the writer."""


@dataclass(frozen=True, eq=False, repr=False)
class ChosenRows:
    """The samples that the mask was computed from: a choice of rows, with their scores.

    Args:
        ids: which samples, each once; int64 [n].
        scores: their row scores r_i(M), finite; float32 [n].

    Raises:
        UsageError: no rows, a repeated id, another dtype or shape, a score that is not finite.

    Example:
        >>> ChosenRows(torch.tensor([7, 3]), torch.tensor([0.5, 2.0]))
        ChosenRows(2 samples, scores 0.5 … 2)
    """

    ids: Tensor
    scores: Tensor

    def __post_init__(self) -> None:
        ids, scores = self.ids, self.scores
        if ids.dtype != torch.int64 or scores.dtype != torch.float32 or ids.ndim != 1:
            raise UsageError(
                "Chosen rows need int64 ids [n] and float32 scores [n]; these are "
                f"{ids.dtype} {list(ids.shape)} and {scores.dtype} {list(scores.shape)}."
            )
        distinct = len(set(ids.tolist()))
        if ids.shape != scores.shape or not 0 < ids.numel() == distinct:
            raise UsageError(
                "Chosen rows need one score for each id, and each id once; there are "
                f"{ids.numel()} ids, {distinct} distinct, and {scores.numel()} scores."
            )
        if not bool(scores.isfinite().all()):
            raise UsageError("The score of a chosen row is not finite.")

    def __repr__(self) -> str:
        low, high = self.scores.min().item(), self.scores.max().item()
        return f"ChosenRows({self.ids.numel()} samples, scores {low:.4g} … {high:.4g})"


@dataclass(frozen=True, eq=False, repr=False)
class MaskFile:
    """A verified mask file with all that it says about itself.

    Args:
        path: where it lies.
        sha256: hash of the whole file, to pin it by.
        mask: the parameters that may be trained.
        samples: the rows that it was computed from, by increasing id, where recorded.
        metadata: the parsed `ird_mask` text.
    """

    path: Path
    sha256: str
    mask: SparseMask
    samples: ChosenRows | None
    metadata: Mapping[str, Any]

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What the writer recorded: base model, data, settings, scores."""
        provenance: Mapping[str, Any] = self.metadata["provenance"]
        return provenance

    @property
    def head(self) -> tuple[str, ...]:
        """The tensors that are to be trained whole beside the mask; empty where not recorded."""
        head = self.provenance.get("head")
        names = head if isinstance(head, list | tuple) else ()
        return tuple(name for name in names if isinstance(name, str) and name.isprintable())

    @property
    def learning_rate(self) -> float | None:
        """The learning rate that was best for the mask, where recorded."""
        rate = self.provenance.get("learning_rate")
        return rate if isinstance(rate, float) else None

    def describe(self) -> str:
        """A few lines for people: size, where it lies in the model, who wrote it, and from what."""
        samples = repr(self.samples) if self.samples else "not recorded"
        return _lines(
            ("file", f"{self.path} (ird-mask {self.metadata['format_version']})"),
            ("sha256", self.sha256),
            *_of_mask(self.mask),
            ("samples", samples),
            *_of_writer(self.metadata),
        )

    def __repr__(self) -> str:
        rows = f", {self.samples!r}" if self.samples else ""
        return f"MaskFile({str(self.path)!r}, {self.mask!r}{rows}, sha256 {self.sha256[:12]}…)"


@dataclass(frozen=True, eq=False, repr=False)
class Delta:
    """What masked fine-tuning made of a base model: new values at a mask's entries.

        tuned = base, but tuned[name].flat[mask.indices[name]] = values[name]
                      and tuned[name] = dense[name]

    Values are those of the tuned model, and no differences: in floating point, base + (tuned −
    base) need not be tuned. They may be anything, NaN too.

    Args:
        mask: the entries that may differ.
        values: their values by tensor, as in `mask.indices`: floats [k] on the CPU.
        dense: tensors that differ altogether (the head), on the CPU.
        base_sha256: `weights_sha256` of the base, without the dense tensors.
        provenance: plain JSON data about the origin, such as `base_model` with id and revision.

    Raises:
        UsageError: the values do not fit the mask, or something cannot be stored.

    Example:
        >>> from ird_search.parameters import ParameterSpace
        >>> mask = SparseMask(ParameterSpace(("w",), ((2, 50),)), torch.tensor([7]))
        >>> Delta(mask, {"w": torch.tensor([0.5])}, {"b": torch.zeros(2)}, "1a2b" * 16)
        Delta(1 of 100 parameters, density 1.0000%, and 1 dense tensor; 16 bytes, base 1a2b1a2b…)
    """

    mask: SparseMask
    values: Mapping[str, Tensor]
    dense: Mapping[str, Tensor]
    base_sha256: str
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wanted = {name: [index.numel()] for name, index in self.mask.indices.items()}
        problems = [
            f"Values are there for {name!r}, but the mask selects none of its entries."
            for name in self.values
            if name not in wanted
        ]
        problems += [
            f"The values of {name!r} are missing." for name in wanted if name not in self.values
        ]
        problems += [
            f"The values of {name!r} are {value.dtype} {list(value.shape)}; floats "
            f"{wanted[name]} are needed."
            for name, value in self.values.items()
            if name in wanted
            and (list(value.shape) != wanted[name] or not value.is_floating_point())
        ]
        problems += [f"{name!r} is dense and masked." for name in self.dense if name in wanted]
        problems += [
            f"{name!r} is {tensor.dtype} on {tensor.device}; "
            f"{', '.join(sorted(DTYPES)).lower()} on the CPU can be stored."
            for name, tensor in (*self.values.items(), *self.dense.items())
            if tensor.dtype not in DTYPES.values() or tensor.device.type != "cpu"
        ]
        if problems:
            raise UsageError(problems)

    @property
    def density(self) -> float:
        """Fraction of the mask's space that may differ."""
        return self.mask.density

    @property
    def nbytes(self) -> int:
        """Bytes of indices, values and dense tensors; the file adds its header."""
        indices = sum(layout.nbytes for layout in index_layouts(parts_of(self.mask)).values())
        return indices + sum(t.nbytes for t in (*self.values.values(), *self.dense.values()))

    def __repr__(self) -> str:
        mask, count = self.mask, len(self.dense)
        whole = f", and {count} dense tensor{'s' if count > 1 else ''}" if count else ""
        return (
            f"Delta({mask.count:,} of {mask.space.numel:,} parameters, density "
            f"{mask.density:.4%}{whole}; {self.nbytes:,} bytes, base {self.base_sha256[:8]}…)"
        )


@dataclass(frozen=True, eq=False, repr=False)
class DeltaFile:
    """A verified delta file with all that it says about itself.

    Args:
        path: where it lies.
        sha256: hash of the whole file, to pin it by.
        delta: what it holds.
        metadata: the parsed `ird_delta` text.
    """

    path: Path
    sha256: str
    delta: Delta
    metadata: Mapping[str, Any]

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What the writer recorded: base model, data, settings, scores."""
        return self.delta.provenance

    def describe(self) -> str:
        """A few lines for people: size, where it lies in the model, what base, and from what."""
        delta, dense = self.delta, self.delta.dense
        tensors = (*delta.values.values(), *dense.values())
        odd = sum(int((~t.isfinite()).sum()) for t in tensors)
        dtypes = sorted({str(values.dtype).removeprefix("torch.") for values in tensors})
        return _lines(
            ("file", f"{self.path} (ird-delta {self.metadata['format_version']})"),
            ("sha256", self.sha256),
            ("base sha256", delta.base_sha256),
            *_of_mask(delta.mask),
            ("dense", f"{len(dense)} tensors, {sum(t.numel() for t in dense.values()):,} entries"),
            *(("", f"{name}  {list(t.shape)}") for name, t in list(dense.items())[:5]),
            ("values", f"{delta.nbytes:,} bytes, {', '.join(dtypes)}"),
            *([("not finite", f"{odd:,} values")] if odd else []),
            *_of_writer(self.metadata),
        )

    def __repr__(self) -> str:
        return f"DeltaFile({str(self.path)!r}, {self.delta!r}, sha256 {self.sha256[:12]}…)"


Line = tuple[str, str]


def _lines(*lines: Line) -> str:
    return "\n".join(f"{label:<16} {text}" for label, text in lines)


def _of_mask(mask: SparseMask) -> list[Line]:
    held = sorted((-index.numel(), name) for name, index in mask.indices.items())
    return [
        ("selected", f"{mask.count:,} of {mask.space.numel:,} parameters"),
        ("density", f"{mask.density:.4%}"),
        ("tensors", f"{len(held)} of {len(mask.space.names)} hold selected parameters"),
        *(("", f"{-n / mask.count:6.1%}  {name}  ({-n:,})") for n, name in held[:5]),
    ]


def _of_writer(metadata: Mapping[str, Any]) -> list[Line]:
    return [
        ("written by", " ".join(clip(metadata.get(key)) for key in WRITER)),
        *((clip(key, 40).strip('"'), clip(v)) for key, v in metadata["provenance"].items()),
    ]


def clip(value: Any, width: int = 100) -> str:
    """A value on one printable line: what a file says may hold escape codes."""
    text = json.dumps(value, ensure_ascii=False)
    text = text if text.isprintable() else json.dumps(value)
    return text if len(text) <= width else text[: width - 1] + "…"
