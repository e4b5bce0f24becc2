"""One mask file and one delta file with a part of every kind, and how to forge others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ird_search.artifact import (
    ChosenRows,
    Delta,
    inspect_delta,
    inspect_mask,
    load_delta,
    load_mask,
    save_delta,
    save_mask,
)
from ird_search.artifact.container import Format, bytes_of, canonical, header_of
from ird_search.artifact.plans import DELTA, MASK
from ird_search.mask import SparseMask
from ird_search.parameters import ParameterSpace

SPACE = ParameterSpace(("a.idx", "b.bits", "c.full", "d.none"), ((4, 50), (3, 7), (2,), (5,)))
COORDS = torch.tensor([0, 3, 199, 200, 205, 207, 219, 220, 221, 222])
SOME_MASK = SparseMask(SPACE, COORDS)
ROWS = ChosenRows(torch.tensor([9, 2, 5]), torch.tensor([0.5, 1.25, -0.0]))
PROVENANCE: dict[str, Any] = {
    "base_model": {"id": "tiny/model", "revision": "abc"},
    "learning_rate": 0.001,
    "score": {"metric": "accuracy", "value": 0.1 + 0.2, "interval": [0.25, 0.35]},
    "note": "Bücher ∂θ",
    "controls": [],
}
SOME_DELTA = Delta(
    mask=SOME_MASK,
    values={
        "a.idx": torch.tensor([0.1, float("nan"), -0.0]),
        "b.bits": torch.tensor([1.0, 2.0, float("inf"), 0.1, -3.0], dtype=torch.bfloat16),
        "c.full": torch.tensor([0.1, 1e-300], dtype=torch.float64),
    },
    dense={
        "flag": torch.tensor([True, False, True]),
        "head.weight": torch.arange(6.0).view(2, 3).half() / 7,
        "steps": torch.tensor(2**40),
    },
    base_sha256="0123456789abcdef" * 4,
    provenance=PROVENANCE,
)


@dataclass(frozen=True)
class Kind:
    """A kind of file, with an example of what it holds."""

    form: Format[Any]
    save: Callable[[Path, Mapping[str, Any]], str]
    load: Callable[[Path], Any]
    inspect: Callable[[Path], Any]


def _save_mask(path: Path, provenance: Mapping[str, Any]) -> str:
    return save_mask(path, SOME_MASK, samples=ROWS, provenance=provenance)


def _save_delta(path: Path, provenance: Mapping[str, Any]) -> str:
    d = SOME_DELTA
    return save_delta(path, Delta(d.mask, d.values, d.dense, d.base_sha256, provenance))


KINDS = {
    "mask": Kind(MASK, _save_mask, load_mask, inspect_mask),
    "delta": Kind(DELTA, _save_delta, load_delta, inspect_delta),
}


def same_delta(a: Delta, b: Delta) -> bool:
    """Whether two deltas hold the same bits."""
    return (
        a.mask == b.mask
        and (a.base_sha256, a.provenance) == (b.base_sha256, b.provenance)
        and _bits(a.values) == _bits(b.values)
        and _bits(a.dense) == _bits(b.dense)
    )


def _bits(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {name: (t.dtype, t.shape, bytes_of(t)) for name, t in tensors.items()}


def packed(header: Any, payload: bytes = b"") -> bytes:
    """A safetensors file with any header at all."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + payload


def taken_apart(path: Path) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Header entries, metadata object, payload."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    said = header["__metadata__"]
    return header, json.loads(said.get("ird_mask") or said["ird_delta"]), data[end:]


def forged(
    form: Format[Any], entries: Mapping[str, Any], metadata: Mapping[str, Any], payload: bytes
) -> bytes:
    """A file whose hashes are all right, as an attacker would write it."""
    text = canonical({**metadata, "payload_sha256": hashlib.sha256(payload).hexdigest()})
    table = {key: entry for key, entry in entries.items() if key != "__metadata__"}
    return header_of(form, table, text) + payload
