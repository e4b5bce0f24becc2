"""Reading a file as if an enemy had written it: every check on the way in.

A file is accepted only when it is, byte for byte, what would be written for what it holds.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import safetensors.torch
from safetensors import SafetensorError

from ird_search.artifact.container import (
    AGAIN,
    Format,
    Plan,
    canonical,
    distinct,
    header_of,
    sha256,
    table_of,
)
from ird_search.artifact.contents import clip
from ird_search.errors import ArtifactError, ModelError, ResourceError, out_of_memory

F = TypeVar("F")
Check = Callable[[Format[Any], Plan[Any], Mapping[str, Any]], None]
"""What a caller checks of plan and metadata before the payload is read; it raises ValueError."""

_MAX_HEADER = 16 * 2**20  # bytes
_MAX_MARKS = 500_000  # of each of [ { , in a header: bounds what parsing it can cost
_MAX_DEPTH = 100  # of what a writer adds: no walk through it comes to the end of the stack


def read(path: str | os.PathLike[str], *forms: Format[F], check: Check | None = None) -> F:
    """A file of one of these formats from the disk, verified."""
    place = Path(path)
    try:
        place = _place(path, forms)
        with open(place, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            return read_stream(stream, size, *forms, path=place, check=check)
    except OSError as error:
        reason = error.strerror or error
        raise ArtifactError(
            f"{place} cannot be read: {reason}. Check the file and its permissions."
        ) from error
    except (ModelError, ArtifactError):
        raise
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{place}: {error}") from error


def _place(path: str | os.PathLike[str], forms: tuple[Format[Any], ...]) -> Path:
    places = [form.file_at(path) for form in forms]
    for place in places:
        if place.is_file():  # a pipe or device is never opened
            return place
    noun = forms[0].noun
    raise ArtifactError(
        f"{places[0]}: there is no such file. Pass the path of a {noun} that save_{noun} "
        f"wrote, or the directory that holds its {forms[0].file_name}."
    )


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """A header makes a million objects, and no cycle: looking for one would double its cost."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_uncollected()
def read_stream(
    stream: BinaryIO,
    size: int,
    *forms: Format[F],
    path: Path = Path(),
    check: Check | None = None,
) -> F:
    """The contents of a file. Raises ValueError for whatever is wrong with it."""
    raw, metadata, form, plan = _read_header(stream, size, forms)
    if check is not None:  # before the payload is expanded: a small file can name a huge space
        check(form, plan, metadata)
    # A fully selected tensor takes no room in the file, so a few bytes can stand for terabytes, as
    # a file with holes can; and where memory is overcommitted, asking for them ends in a kill.
    if 2 * size + plan.memory > _memory():
        raise _too_large(form, plan, size)
    try:
        data = raw + stream.read()
        if sha256(memoryview(data)[len(raw) :]) != metadata.get("payload_sha256"):
            raise ValueError(f"The stored tensors do not have the recorded hash. {AGAIN}")
        return plan.opened(path, sha256(data), metadata, safetensors.torch.load(data))
    except SafetensorError as error:
        raise ValueError(f"The safetensors library refuses the file: {error}. {AGAIN}") from error
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise ValueError(f"torch refuses the file: {clip(str(error))}. {AGAIN}") from error
        raise _too_large(form, plan, size) from error


def _memory() -> float:
    """Bytes that this machine has."""
    if not hasattr(os, "sysconf"):  # no POSIX
        return float("inf")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _too_large(form: Format[Any], plan: Plan[Any], size: int) -> ResourceError:
    return ResourceError(
        f"The {form.noun} selects {plan.count:,} parameters in a file of {size:,} bytes, which do "
        f"not fit into memory: reading it takes {(2 * size + plan.memory) / 1e9:,.1f} GB. Load it "
        f"on a machine with more memory; with load_{form.noun}(path, model), a {form.noun} of "
        "another model is refused before that."
    )


def _read_header(
    stream: BinaryIO, size: int, forms: tuple[Format[F], ...]
) -> tuple[bytes, dict[str, Any], Format[F], Plan[F]]:
    """The header's bytes and what they declare, verified, at a cost that no file can raise."""
    prefix = stream.read(8) if size >= 8 else b""  # else a part of /proc, which may wait for ever
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8:
        if prefix.startswith((b"PK", b"\x80")):
            raise ValueError(
                "This is a file of torch.save, no safetensors file. If it is FISH's mask, read it "
                "with read_fish_mask, or `ird-search import --from fish`."
            )
        raise ValueError(
            "This is no safetensors file, or it is cut short: a file of "
            f"{size} bytes cannot hold the header that it announces. {AGAIN}"
        )
    if length > _MAX_HEADER:
        raise ValueError(
            f"The header has {length:,} bytes; at most {_MAX_HEADER:,} are accepted. Shorten the "
            "provenance, or see where the file comes from."
        )
    raw = stream.read(length)
    form, text = _own_text(_parsed(raw), forms)
    metadata = _own_metadata(form, text)
    plan = form.declared(metadata)
    described = plan.described()
    if canonical({**metadata, **described}) != text:
        raise ValueError(f"The metadata contradicts itself or is not canonical JSON. {AGAIN}")
    _check_depth({key: metadata[key] for key in metadata.keys() - described.keys()})
    table = table_of(plan.layouts())
    if prefix + raw != header_of(form, table, text):
        raise ValueError(f"The header does not list what its metadata declares. {AGAIN}")
    expected = 8 + length + max((e["data_offsets"][1] for e in table.values()), default=0)
    if size != expected:
        raise ValueError(f"The file has {size} bytes; its header speaks of {expected}. {AGAIN}")
    return prefix + raw, metadata, form, plan


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


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [x for part in parts for x in part if isinstance(x, (dict, list))]
    if level:
        raise ValueError(
            f"The metadata nests deeper than {_MAX_DEPTH} levels. Flatten the provenance, or see "
            "where the file comes from."
        )


def _own_text(header: Mapping[str, Any], forms: tuple[Format[F], ...]) -> tuple[Format[F], str]:
    """Which of the formats the file has, and its JSON text."""
    said = header.get("__metadata__")
    said = said if isinstance(said, dict) else {}
    for form in forms:
        if isinstance(text := said.get(form.key), str):
            return form, text
    wanted = " or ".join(form.name for form in forms)
    for noun in {"mask", "delta"} - {form.noun for form in forms}:
        if f"ird_{noun}" in said:
            raise ValueError(
                f"This is an ird-{noun}, no {wanted}. Read it with load_{noun} or inspect_{noun}"
                + ("; its mask is load_delta(path).mask." if noun == "delta" else ".")
            )
    names = [key for key in header if key != "__metadata__"]
    few = ", ".join(clip(name, 40) for name in names[:3])
    raise ValueError(
        f"This is no {wanted}: the header has no `{forms[0].key}` text. It lists {len(names):,} "
        f"tensors ({few}). Pass a file that save_{forms[0].noun} wrote."
    )


def _own_metadata(form: Format[Any], text: str) -> dict[str, Any]:
    """What the JSON text says, of a version that is known here."""
    if not text.isascii():  # one other character can make Python keep all in four bytes each
        raise ValueError(f"The metadata is not canonical JSON: it holds more than ASCII. {AGAIN}")
    metadata = _parsed(text.encode())
    version = metadata.get("format_version")
    if not isinstance(version, str) or not re.fullmatch(r"[0-9]{1,4}\.[0-9]{1,4}", version):
        raise ValueError(f"format_version is {clip(version)}, not like {form.version}. {AGAIN}")
    if version.partition(".")[0] != form.major:
        raise ValueError(
            f"The file is {form.name} {version}; this ird_search reads {form.name} {form.major}. "
            f"Update ird_search, or write the {form.noun} again with this version."
        )
    if not isinstance(metadata.get("provenance"), dict):
        raise ValueError(f"The metadata holds no provenance object. {AGAIN}")
    return metadata
