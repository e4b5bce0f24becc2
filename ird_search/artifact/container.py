"""The container: a safetensors file in which nothing is left to choose.

A file says what it holds in one JSON text. From that text follow, byte for byte, its header and
where every tensor lies, so saving writes them, and loading computes them again and compares: no
field can lie. `plans` tells what each kind of file says and stores; here is what they share.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ird_search.changes import INTEGERS
from ird_search.parameters import ParameterSpace

AGAIN = "The file is damaged or was altered: fetch it again, or write it anew."

DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "BOOL": torch.bool,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""What can be stored, by safetensors' names."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

F_co = TypeVar("F_co", covariant=True)


@dataclass(frozen=True)
class Layout:
    """What the header says of one stored tensor, but for its place.

    Args:
        dtype: a key of `DTYPES`.
        shape: its shape.
    """

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        return cls(_NAMES[tensor.dtype], tuple(tensor.shape))

    @property
    def width(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        return self.width * prod(self.shape)


class Plan(Protocol[F_co]):
    """What one file declares to hold."""

    @property
    def space(self) -> ParameterSpace:
        """The tensors that the mask could choose from."""

    @property
    def count(self) -> int:
        """How many parameters are selected."""

    @property
    def memory(self) -> int:
        """Bytes that opening the mask takes, beside the file itself."""

    def described(self) -> dict[str, Any]:
        """What the metadata says about the contents."""

    def layouts(self) -> dict[str, Layout]:
        """What is stored, by key."""

    def opened(
        self, path: Path, sha256: str, metadata: Mapping[str, Any], stored: Mapping[str, Tensor]
    ) -> F_co:
        """The contents, verified. Raises ValueError for whatever is wrong with them."""


@dataclass(frozen=True)
class Format(Generic[F_co]):
    """A kind of file: `ird-mask`, `ird-delta`.

    Args:
        noun: what it holds.
        declared: from a file's metadata to its plan, with types and sizes checked (ValueError).
        version: what is written; files of the same major version are read.
    """

    noun: str
    declared: Callable[[Mapping[str, Any]], Plan[F_co]]
    version: str = "1.0"

    @property
    def name(self) -> str:
        return f"ird-{self.noun}"

    @property
    def key(self) -> str:
        """Under which the header holds the JSON text."""
        return f"ird_{self.noun}"

    @property
    def major(self) -> str:
        return self.version.partition(".")[0]

    @property
    def file_name(self) -> str:
        """The name of the file in a directory."""
        return f"{self.noun}.safetensors"

    def file_at(self, path: str | os.PathLike[str]) -> Path:
        """The file itself, or the one of the usual name in a directory."""
        directory = Path(path).is_dir() or str(path).endswith(("/", os.sep))
        return Path(path) / self.file_name if directory else Path(path)


def encode(
    form: Format[Any], plan: Plan[Any], stored: Mapping[str, Tensor], said: Mapping[str, Any]
) -> bytes:
    """The whole file: header and payload.

    Args:
        stored: the tensors by key, as the plan lays them out.
        said: what the metadata says besides the contents: writer and provenance.
    """
    table = table_of(plan.layouts())
    payload = b"".join(bytes_of(stored[key]) for key in table)
    metadata = {
        "format_version": form.version,
        **said,
        **plan.described(),
        "payload_sha256": sha256(payload),
    }
    return header_of(form, table, canonical(metadata)) + payload


def table_of(layouts: Mapping[str, Layout]) -> dict[str, dict[str, Any]]:
    """The header's entry for each stored tensor, in the order of the payload."""
    table, end = {}, 0
    # Widest first, as the library does, so that every tensor begins at a multiple of its width.
    for key, layout in sorted(layouts.items(), key=lambda item: (-item[1].width, item[0])):
        start, end = end, end + layout.nbytes
        shape = list(layout.shape)
        table[key] = {"dtype": layout.dtype, "shape": shape, "data_offsets": [start, end]}
    return table


def header_of(form: Format[Any], table: Mapping[str, Any], text: str) -> bytes:
    """The file up to its payload: the JSON text and the table, with their length."""
    # The library orders the metadata at random in each process; sorted, equal contents are equal
    # bytes. The text is hashed, too: it holds scores and names that the payload does not fix.
    said = {"format": "pt", form.key: text, f"{form.key}_sha256": sha256(text.encode())}
    raw = canonical({"__metadata__": said, **table}).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def bytes_of(tensor: Tensor) -> bytes:
    """The entries row by row, little-endian."""
    width = min(tensor.element_size(), 8)  # complex128 is two numbers of 8 bytes
    bits = tensor.detach().cpu().reshape(-1).view(INTEGERS[width])
    return bits.numpy().astype(f"<i{width}", copy=False).tobytes()


def canonical(value: Any) -> str:
    """JSON with one spelling for each value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: an object whose keys come once each, else a ValueError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice in one object")
    return found


def sha256(data: bytes | memoryview) -> str:
    """The hash as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()
