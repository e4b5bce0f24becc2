"""Reading a mask file as if an enemy had written it: every check on the way in.

A file is accepted only when it is, byte for byte, what `save_mask` would write for what it holds.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, BinaryIO, TypeGuard

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ird_search.artifact.contents import ChosenRows, MaskFile, clip
from ird_search.artifact.layout import (
    AGAIN,
    FILE_NAME,
    FORMAT_VERSION,
    SAMPLES,
    Part,
    canonical,
    described,
    distinct,
    file_at,
    header_of,
    sha256,
    space_of,
    table_of,
)
from ird_search.artifact.matching import check_match
from ird_search.errors import ArtifactError, ModelError, ResourceError
from ird_search.mask import SparseMask

_MAX_HEADER = 16 * 2**20  # bytes
_MAX_TENSORS = 100_000
_MAX_RANK = 8
_MAX_NUMEL = 2**48  # keeps every coordinate far from the end of int64
_MAX_MARKS = 500_000  # of each of [ { , in a header: bounds what parsing it can cost


def read(path: str | os.PathLike[str], model: nn.Module | None, strict: bool) -> MaskFile:
    """A mask file from the disk, verified; where a model is given, it must fit."""
    path = file_at(path)
    if not path.is_file():  # also keeps a pipe or a device from being opened
        raise ArtifactError(
            f"{path}: there is no such file. Pass the path of a mask that save_mask wrote, or the "
            f"directory that holds its {FILE_NAME}."
        )
    try:
        with open(path, "rb") as stream:
            found = read_stream(stream, os.fstat(stream.fileno()).st_size, model, strict)
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error.strerror or error}. Check the file and its permissions."
        ) from error
    except ModelError:
        raise
    except ValueError as error:
        raise ArtifactError(f"{path}: {error}") from error
    return MaskFile(path, *found)


def read_stream(
    stream: BinaryIO, size: int, model: nn.Module | None = None, strict: bool = False
) -> tuple[str, SparseMask, ChosenRows | None, Mapping[str, Any]]:
    """All of a `MaskFile` but its path. Raises ValueError for whatever is wrong with the file."""
    raw, metadata, parts, rows = _read_header(stream, size)
    if model is not None:  # before the payload is expanded: a small file can name a huge space
        check_match(space_of(parts), metadata["provenance"], model, strict)
    _check_memory(metadata["count"])
    payload = stream.read()
    if sha256(payload) != metadata.get("payload_sha256"):
        raise ValueError(f"The stored tensors do not have the recorded hash. {AGAIN}")
    data = raw + payload
    try:
        stored = safetensors.torch.load(data)
        mask = _mask(parts, stored)
    except SafetensorError as error:
        raise ValueError(f"The safetensors library refuses the file: {error}. {AGAIN}") from error
    except (MemoryError, RuntimeError) as error:
        raise _too_large(metadata["count"]) from error
    samples = None
    if rows:
        samples = ChosenRows(stored[f"{SAMPLES}::idx"], stored[f"{SAMPLES}::score"])
        if bool((samples.ids[1:] < samples.ids[:-1]).any()):
            raise ValueError(f"The ids of the samples are not in increasing order. {AGAIN}")
    return sha256(data), mask, samples, metadata


def _check_memory(count: int) -> None:
    # A fully selected tensor takes no room in the file, so a few bytes can stand for terabytes; and
    # where memory is overcommitted, asking for them succeeds and ends in a kill.
    if hasattr(os, "sysconf"):  # POSIX
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if 8 * count > memory:
            raise _too_large(count)


def _too_large(count: int) -> ResourceError:
    return ResourceError(
        f"The mask selects {count:,} parameters, which do not fit into memory at 8 bytes each. "
        "Load it on a machine with more memory; with load_mask(path, model), a mask of another "
        "model is refused before that."
    )


def _mask(parts: Sequence[Part], stored: Mapping[str, Tensor]) -> SparseMask:
    space = space_of(parts)
    pieces = [
        part.decode(stored) + start
        for part, start in zip(parts, space.offsets[:-1], strict=True)
        if part.count
    ]
    return SparseMask(space, torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64))


def _read_header(
    stream: BinaryIO, size: int
) -> tuple[bytes, dict[str, Any], tuple[Part, ...], int]:
    """The header's bytes and what they declare, verified, at a cost that no file can raise."""
    prefix = stream.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8:
        raise ValueError(
            f"A file of {size} bytes cannot hold the header that it announces. {AGAIN}"
        )
    if length > _MAX_HEADER:
        raise ValueError(
            f"The header has {length:,} bytes; at most {_MAX_HEADER:,} are accepted. Shorten the "
            "provenance, or see where the file comes from."
        )
    raw = stream.read(length)
    text, metadata = _own_metadata(_parsed(raw))
    parts, rows = _declared(metadata)
    if canonical({**metadata, **described(parts, rows)}) != text:
        raise ValueError(f"The metadata contradicts itself or is not canonical JSON. {AGAIN}")
    table = table_of(parts, rows)
    if prefix + raw != header_of(table, text):
        raise ValueError(f"The header does not list what its metadata declares. {AGAIN}")
    expected = 8 + length + max((e["data_offsets"][1] for e in table.values()), default=0)
    if size != expected:
        raise ValueError(f"The file has {size} bytes; its header speaks of {expected}. {AGAIN}")
    return prefix + raw, metadata, parts, rows


def _parsed(raw: bytes) -> dict[str, Any]:
    """A JSON object without repeated keys; whatever else it is, a ValueError."""
    if max(raw.count(mark) for mark in b"[{,") > _MAX_MARKS:
        raise ValueError(
            f"The header has over {_MAX_MARKS:,} parts: shorten the provenance, or see where the "
            "file comes from."
        )
    try:
        value = json.loads(raw.decode(), object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The header is no sound JSON: {clip(str(error))}. {AGAIN}") from error
    if not isinstance(value, dict):
        raise ValueError(f"The header is no JSON object. {AGAIN}")
    return value


def _own_metadata(header: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The `ird_mask` text and what it says, of a version that is known here."""
    outer = header.get("__metadata__")
    text = outer.get("ird_mask") if isinstance(outer, dict) else None
    if not isinstance(text, str):
        names = [key for key in header if key != "__metadata__"]
        few = ", ".join(clip(name, 40) for name in names[:3])
        raise ValueError(
            f"This is no ird-mask: the header has no `ird_mask` text. It lists {len(names):,} "
            f"tensors ({few}). Pass a file that save_mask wrote."
        )
    metadata = _parsed(text.encode(errors="replace"))
    version = metadata.get("format_version")
    if not isinstance(version, str) or not re.fullmatch(r"[0-9]{1,4}\.[0-9]{1,4}", version):
        raise ValueError(f"format_version is {clip(version)}, not like {FORMAT_VERSION}. {AGAIN}")
    if version.partition(".")[0] != FORMAT_VERSION.partition(".")[0]:
        raise ValueError(
            f"The file is ird-mask {version}; this ird_search reads ird-mask 1. Update ird_search, "
            "or write the mask again with this version."
        )
    if not isinstance(metadata.get("provenance"), dict):
        raise ValueError(f"The metadata holds no provenance object. {AGAIN}")
    return text, metadata


def _declared(metadata: Mapping[str, Any]) -> tuple[tuple[Part, ...], int]:
    """The parts and the number of rows that the metadata declares, their types checked."""
    order, params, rows = metadata.get("order"), metadata.get("params"), metadata.get("samples")
    if not (isinstance(order, list) and isinstance(params, dict) and _is_size(rows)):
        raise ValueError(f"The metadata lacks a sound `order`, `params` or `samples`. {AGAIN}")
    if len(order) > _MAX_TENSORS:
        raise ValueError(f"{len(order):,} tensors are declared; at most {_MAX_TENSORS:,} may be.")
    parts = []
    for name in order:
        entry = params.get(name) if isinstance(name, str) else None
        entry = entry if isinstance(entry, dict) else {}
        shape, count = entry.get("shape"), entry.get("count")
        if not (
            isinstance(shape, list)
            and len(shape) <= _MAX_RANK
            and all(map(_is_size, shape))
            and name.isprintable()
            and name != SAMPLES
        ):
            raise ValueError(
                f"Tensor {clip(name)} is declared as {clip(entry)}; a printable name other than "
                f"{SAMPLES}, and a shape of at most {_MAX_RANK} sizes, are accepted."
            )
        if not _is_size(count) or count > prod(shape):
            raise ValueError(f"Tensor {clip(name)} is declared as {clip(entry)}. {AGAIN}")
        parts.append(Part(name, tuple(shape), count))
    if len(set(order)) < len(order) or not _is_size(sum(part.numel for part in parts)):
        raise ValueError(
            f"A tensor is declared twice, or all have more than {_MAX_NUMEL:,} entries. {AGAIN}"
        )
    return tuple(parts), rows


def _is_size(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= _MAX_NUMEL  # a bool is no size
