"""What a mask file holds besides the mask: `ChosenRows`, and `MaskFile` with all of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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

    def describe(self) -> str:
        """A few lines for people: size, where it lies in the model, who wrote it, and from what."""
        mask, meta = self.mask, self.metadata
        held = sorted(((-idx.numel(), name) for name, idx in mask.indices.items()))
        lines = [
            ("file", f"{self.path} (ird-mask {meta['format_version']})"),
            ("sha256", self.sha256),
            ("selected", f"{mask.count:,} of {mask.space.numel:,} parameters"),
            ("density", f"{meta['density']:.4%}"),
            ("tensors", f"{len(held)} of {len(mask.space.names)} hold selected parameters"),
            *(("", f"{-n / mask.count:6.1%}  {name}  ({-n:,})") for n, name in held[:5]),
            ("samples", repr(self.samples) if self.samples else "not recorded"),
            ("written by", " ".join(clip(meta.get(k)) for k in WRITER)),
            *((clip(key, 40).strip('"'), clip(v)) for key, v in self.provenance.items()),
        ]
        return "\n".join(f"{label:<16} {text}" for label, text in lines)

    def __repr__(self) -> str:
        rows = f", {self.samples!r}" if self.samples else ""
        return f"MaskFile({str(self.path)!r}, {self.mask!r}{rows}, sha256 {self.sha256[:12]}…)"


def clip(value: Any, width: int = 100) -> str:
    """A value on one printable line: what a file says may hold escape codes."""
    text = json.dumps(value, ensure_ascii=False)
    text = text if text.isprintable() else json.dumps(value)
    return text if len(text) <= width else text[: width - 1] + "…"
