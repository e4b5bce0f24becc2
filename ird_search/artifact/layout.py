"""The bytes of a mask file: what the header and the metadata say, and how each tensor is stored.

What they say is a function of the parts and the number of rows. Saving writes it; loading computes
it again and compares, so that no field can lie.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ird_search.artifact.contents import ChosenRows
from ird_search.mask import SparseMask
from ird_search.parameters import ParameterSpace

FORMAT_VERSION = "1.0"
FILE_NAME = "mask.safetensors"
SAMPLES = "__samples__"
AGAIN = "The file is damaged or was altered: fetch it again, or write it anew with save_mask."

_DTYPES = {"I64": "<i8", "I32": "<i4", "F32": "<f4", "U8": "|u1"}  # the file is little-endian


@dataclass(frozen=True)
class Part:
    """One tensor of the space, and how its selected entries are stored."""

    name: str
    shape: tuple[int, ...]
    count: int

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def kind(self) -> str:
        if self.count == 0:
            return "none"
        if self.count == self.numel:
            return "full"
        return "bits" if 32 * self.count > self.numel else "idx"  # the smaller of the two

    @property
    def key(self) -> str:
        return f"{self.name}::{self.kind}"

    @property
    def layout(self) -> tuple[str, int]:
        """Dtype and length of the stored vector."""
        if self.kind == "bits":
            return "U8", -(-self.numel // 8)
        return ("I64" if self.numel > 2**31 - 1 else "I32"), self.count

    def encode(self, index: Tensor) -> bytes:
        if self.kind == "idx":
            return _bytes(index, self.layout[0])
        bits = np.zeros(self.numel, dtype=bool)
        bits[index.numpy()] = True
        return np.packbits(bits, bitorder="little").tobytes()

    def decode(self, stored: Mapping[str, Tensor]) -> Tensor:
        """The selected indices, int64 [count], verified."""
        if self.kind == "none":
            return torch.empty(0, dtype=torch.int64)
        if self.kind == "full":
            return torch.arange(self.numel)
        if self.kind == "bits":
            bits = np.unpackbits(stored[self.key].numpy(), bitorder="little")
            index = torch.from_numpy(bits.nonzero()[0])
        else:
            index = stored[self.key].long()
        steps = index[1:] > index[:-1]
        if index.numel() != self.count or not bool(steps.all()):
            raise ValueError(f"{self.key!r} lacks {self.count} increasing indices. {AGAIN}")
        if index[0] < 0 or index[-1] >= self.numel:  # also a padding bit that is set
            raise ValueError(f"{self.key!r} reaches beyond {self.numel} entries. {AGAIN}")
        return index


def space_of(parts: Sequence[Part]) -> ParameterSpace:
    """The space whose tensors the parts are."""
    return ParameterSpace(tuple(p.name for p in parts), tuple(p.shape for p in parts))


def described(parts: Sequence[Part], rows: int) -> dict[str, Any]:
    """What the metadata says about the contents."""
    space = space_of(parts)
    count = sum(part.count for part in parts)
    return {
        "order": list(space.names),
        "params": {
            p.name: {"shape": list(p.shape), "kind": p.kind, "count": p.count} for p in parts
        },
        "space_fingerprint": space.fingerprint,
        "count": count,
        "density": count / space.numel if space.numel else 0.0,
        "samples": rows,
    }


def table_of(parts: Sequence[Part], rows: int) -> dict[str, dict[str, Any]]:
    """The header's entry for each stored tensor, in the order of the payload."""
    layouts = {part.key: part.layout for part in parts if part.kind in ("idx", "bits")}
    if rows:
        layouts |= {f"{SAMPLES}::idx": ("I64", rows), f"{SAMPLES}::score": ("F32", rows)}
    table, end = {}, 0
    # Widest first, as the library does, so that every tensor begins at a multiple of its width.
    for key in sorted(layouts, key=lambda k: (-_width(layouts[k][0]), k)):
        dtype, length = layouts[key]
        start, end = end, end + _width(dtype) * length
        table[key] = {"dtype": dtype, "shape": [length], "data_offsets": [start, end]}
    return table


def header_of(table: Mapping[str, Any], text: str) -> bytes:
    """The file up to its payload: the `ird_mask` text and the table, with their length."""
    # The library orders the metadata at random in each process; sorted, equal masks are equal
    # bytes. The text is hashed, too: it holds scores and names that the payload does not fix.
    metadata = {"format": "pt", "ird_mask": text, "ird_mask_sha256": sha256(text.encode())}
    raw = canonical({"__metadata__": metadata, **table}).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def encode(
    mask: SparseMask,
    samples: ChosenRows | None,
    provenance: Mapping[str, Any],
    written_by: Mapping[str, str],
) -> bytes:
    """The whole file: header and payload."""
    local = mask.indices
    parts = [
        Part(name, shape, local[name].numel() if name in local else 0)
        for name, shape in zip(mask.space.names, mask.space.shapes, strict=True)
    ]
    stored = {p.key: p.encode(local[p.name]) for p in parts if p.kind in ("idx", "bits")}
    if samples is not None:
        by_id = samples.ids.argsort()
        stored[f"{SAMPLES}::idx"] = _bytes(samples.ids[by_id].cpu(), "I64")
        stored[f"{SAMPLES}::score"] = _bytes(samples.scores[by_id].cpu(), "F32")
    rows = 0 if samples is None else samples.ids.numel()
    table = table_of(parts, rows)
    payload = b"".join(stored[key] for key in table)
    metadata = {
        "format_version": FORMAT_VERSION,
        **written_by,
        **described(parts, rows),
        "payload_sha256": sha256(payload),
        "provenance": dict(provenance),
    }
    return header_of(table, canonical(metadata)) + payload


def file_at(path: str | os.PathLike[str]) -> Path:
    """The file itself, or the one of the usual name in a directory."""
    directory = Path(path).is_dir() or str(path).endswith(("/", os.sep))
    return Path(path) / FILE_NAME if directory else Path(path)


def canonical(value: Any) -> str:
    """JSON with one spelling for each value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: an object whose keys come once each, else a ValueError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice in one object")
    return found


def sha256(data: bytes) -> str:
    """The hash as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _width(dtype: str) -> int:
    return np.dtype(_DTYPES[dtype]).itemsize


def _bytes(tensor: Tensor, dtype: str) -> bytes:
    return tensor.numpy().astype(_DTYPES[dtype]).tobytes()
