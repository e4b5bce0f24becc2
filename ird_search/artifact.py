"""The mask on disk: `ird-mask` version 1, a safetensors file that any trainer can read.

The winner of a search, a choice of columns (parameters) and of rows (samples) of the
samples × parameters matrix, leaves in this form. `docs/artifact.md` gives the format. Equal masks
give equal bytes, and a file is accepted only when it is, byte for byte, what `save_mask` would
write for what it holds: one changed bit anywhere is refused.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ird_search.errors import ArtifactError, ModelError, ResourceError, UsageError
from ird_search.files import write_atomically
from ird_search.mask import SparseMask
from ird_search.parameters import ParameterSpace

FORMAT_VERSION = "1.0"
FILE_NAME = "mask.safetensors"

_MAX_HEADER = 16 * 2**20  # bytes
_MAX_TENSORS = 100_000
_MAX_RANK = 8
_MAX_NUMEL = 2**48  # keeps every coordinate far from the end of int64
_MAX_MARKS = 500_000  # of each of [ { , in a header: bounds what parsing it can cost
_SAMPLES = "__samples__"
_DTYPES = {"I64": "<i8", "I32": "<i4", "F32": "<f4", "U8": "|u1"}  # the file is little-endian
_WRITER = ("tool", "tool_version", "torch_version")
_WRAPPERS = {"base_model.model.": "PEFT", "module.": "DataParallel", "_orig_mod.": "torch.compile"}
_AGAIN = "The file is damaged or was altered: fetch it again, or write it anew with save_mask."


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
            ("written by", " ".join(_clip(meta.get(k)) for k in _WRITER)),
            *((_clip(key, 40).strip('"'), _clip(v)) for key, v in self.provenance.items()),
        ]
        return "\n".join(f"{label:<16} {text}" for label, text in lines)

    def __repr__(self) -> str:
        rows = f", {self.samples!r}" if self.samples else ""
        return f"MaskFile({str(self.path)!r}, {self.mask!r}{rows}, sha256 {self.sha256[:12]}…)"


def save_mask(
    path: str | os.PathLike[str],
    mask: SparseMask,
    *,
    samples: ChosenRows | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> str:
    """Write a mask as `ird-mask` version 1, atomically; return the SHA-256 of the file.

    Args:
        path: the file, or a directory (there, or with a slash at its end) that is to get
            `mask.safetensors`.
        samples: the rows that the mask was computed from.
        provenance: plain JSON data about the mask's origin. The keys `weights_sha256` (see the
            function of that name) and `fresh_parameters` (names left out of that hash) are what
            `load_mask(..., strict=True)` checks.

    Raises:
        UsageError: the provenance is no JSON, the mask exceeds the format's limits, or the place
            cannot be written.
        ResourceError: the disk is full; a former file is untouched.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> space = ParameterSpace(("w", "b"), ((2, 100), (2,)))
        >>> sha = save_mask(folder, SparseMask(space, torch.tensor([1, 150])))
        >>> load_mask(folder).indices
        {'w': tensor([  1, 150])}
    """
    origin = _json_data(provenance or {})
    try:
        data = _encode(mask, samples, origin, _written_by())
        _read_stream(io.BytesIO(data), len(data))
    except ValueError as error:
        raise UsageError(f"This mask cannot be stored as ird-mask 1: {error}") from error
    write_atomically(_file(path), data)
    return _sha256(data)


def load_mask(
    path: str | os.PathLike[str], model: nn.Module | None = None, *, strict: bool = False
) -> SparseMask:
    """Read and verify a mask; with a model, refuse a mask that was made for another one.

    Args:
        path: the file, or the directory that holds `mask.safetensors`.
        model: every tensor of the mask's space must be in it under the same name and shape.
        strict: the model must also have the very weights that the file records.

    Raises:
        ArtifactError: the file is missing, damaged, hostile, of an unknown version, or does not
            match the model. Never is a part of a mask returned.
        UsageError: `strict` without a model.
        ResourceError: the mask does not fit into memory.

    Example:
        >>> load_mask("no/such/file")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ird_search.errors.ArtifactError: no/such/file: there is no such file. Pass the path ...
    """
    if strict and model is None:
        raise UsageError("strict=True compares the weights of a model: pass the model, too.")
    return _read(path, model, strict).mask


def inspect_mask(path: str | os.PathLike[str]) -> MaskFile:
    """Read and verify a mask file with its samples and metadata.

    Raises:
        ArtifactError: as for `load_mask`.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "digits.safetensors"
        >>> space = ParameterSpace(("w",), ((2, 100),))
        >>> sha = save_mask(path, SparseMask(space, torch.tensor([7])), provenance={"seed": 0})
        >>> found = inspect_mask(path)
        >>> found.sha256 == sha, dict(found.provenance)
        (True, {'seed': 0})
    """
    return _read(path, None, False)


def weights_sha256(model: nn.Module, exclude: Sequence[str] = ()) -> str:
    """SHA-256 over the weights: the sorted lines `name|dtype|shape|sha256 of the bytes`.

    Args:
        exclude: parameters to leave out: freshly initialised heads, which no checkpoint fixes.

    Raises:
        UsageError: an excluded name is not a parameter of the model.
        ModelError: a parameter has no data (it lies on the meta device).

    Example:
        >>> weights_sha256(nn.Linear(2, 1), exclude=["weight", "bias"])[:8]
        'e3b0c442'
    """
    parameters = dict(model.named_parameters())
    if unknown := sorted(set(exclude) - parameters.keys()):
        raise UsageError(f"{name!r} is not a parameter of this model." for name in unknown)
    lines = []
    for name in sorted(parameters.keys() - set(exclude)):
        p = parameters[name].detach()
        if p.is_meta:
            raise ModelError(f"{name} is on the meta device: load its weights before hashing them.")
        held = hashlib.sha256(p.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        dtype = str(p.dtype).removeprefix("torch.")
        lines.append(f"{name}|{dtype}|{','.join(map(str, p.shape))}|{held.hexdigest()}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# What the metadata and the header say is a function of the parts and the number of rows. Saving
# writes it; loading computes it again and compares, so that no field can lie.


@dataclass(frozen=True)
class _Part:
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
            raise ValueError(f"{self.key!r} lacks {self.count} increasing indices. {_AGAIN}")
        if index[0] < 0 or index[-1] >= self.numel:  # also a padding bit that is set
            raise ValueError(f"{self.key!r} reaches beyond {self.numel} entries. {_AGAIN}")
        return index


def _described(parts: Sequence[_Part], rows: int) -> dict[str, Any]:
    """What the metadata says about the contents."""
    space = _space(parts)
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


def _table(parts: Sequence[_Part], rows: int) -> dict[str, dict[str, Any]]:
    """The header's entry for each stored tensor, in the order of the payload."""
    layouts = {part.key: part.layout for part in parts if part.kind in ("idx", "bits")}
    if rows:
        layouts |= {f"{_SAMPLES}::idx": ("I64", rows), f"{_SAMPLES}::score": ("F32", rows)}
    table, end = {}, 0
    # Widest first, as the library does, so that every tensor begins at a multiple of its width.
    for key in sorted(layouts, key=lambda k: (-_width(layouts[k][0]), k)):
        dtype, length = layouts[key]
        start, end = end, end + _width(dtype) * length
        table[key] = {"dtype": dtype, "shape": [length], "data_offsets": [start, end]}
    return table


def _header(table: Mapping[str, Any], text: str) -> bytes:
    # The library orders the metadata at random in each process; sorted, equal masks are equal
    # bytes. The text is hashed, too: it holds scores and names that the payload does not fix.
    metadata = {"format": "pt", "ird_mask": text, "ird_mask_sha256": _sha256(text.encode())}
    raw = _canonical({"__metadata__": metadata, **table}).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _encode(
    mask: SparseMask,
    samples: ChosenRows | None,
    provenance: Mapping[str, Any],
    written_by: Mapping[str, str],
) -> bytes:
    local = mask.indices
    parts = [
        _Part(name, shape, local[name].numel() if name in local else 0)
        for name, shape in zip(mask.space.names, mask.space.shapes, strict=True)
    ]
    stored = {p.key: p.encode(local[p.name]) for p in parts if p.kind in ("idx", "bits")}
    if samples is not None:
        by_id = samples.ids.argsort()
        stored[f"{_SAMPLES}::idx"] = _bytes(samples.ids[by_id].cpu(), "I64")
        stored[f"{_SAMPLES}::score"] = _bytes(samples.scores[by_id].cpu(), "F32")
    rows = 0 if samples is None else samples.ids.numel()
    table = _table(parts, rows)
    payload = b"".join(stored[key] for key in table)
    metadata = {
        "format_version": FORMAT_VERSION,
        **written_by,
        **_described(parts, rows),
        "payload_sha256": _sha256(payload),
        "provenance": dict(provenance),
    }
    return _header(table, _canonical(metadata)) + payload


def _read(path: str | os.PathLike[str], model: nn.Module | None, strict: bool) -> MaskFile:
    path = _file(path)
    if not path.is_file():  # also keeps a pipe or a device from being opened
        raise ArtifactError(
            f"{path}: there is no such file. Pass the path of a mask that save_mask wrote, or the "
            f"directory that holds its {FILE_NAME}."
        )
    try:
        with open(path, "rb") as stream:
            found = _read_stream(stream, os.fstat(stream.fileno()).st_size, model, strict)
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error.strerror or error}. Check the file and its permissions."
        ) from error
    except ModelError:
        raise
    except ValueError as error:
        raise ArtifactError(f"{path}: {error}") from error
    return MaskFile(path, *found)


def _read_stream(
    stream: BinaryIO, size: int, model: nn.Module | None = None, strict: bool = False
) -> tuple[str, SparseMask, ChosenRows | None, Mapping[str, Any]]:
    """All of a `MaskFile` but its path. Raises ValueError for whatever is wrong with the file."""
    raw, metadata, parts, rows = _read_header(stream, size)
    if model is not None:  # before the payload is expanded: a small file can name a huge space
        _check_match(_space(parts), metadata["provenance"], model, strict)
    _check_memory(metadata["count"])
    payload = stream.read()
    if _sha256(payload) != metadata.get("payload_sha256"):
        raise ValueError(f"The stored tensors do not have the recorded hash. {_AGAIN}")
    data = raw + payload
    try:
        stored = safetensors.torch.load(data)
        mask = _mask(parts, stored)
    except SafetensorError as error:
        raise ValueError(f"The safetensors library refuses the file: {error}. {_AGAIN}") from error
    except (MemoryError, RuntimeError) as error:
        raise _too_large(metadata["count"]) from error
    samples = None
    if rows:
        samples = ChosenRows(stored[f"{_SAMPLES}::idx"], stored[f"{_SAMPLES}::score"])
        if bool((samples.ids[1:] < samples.ids[:-1]).any()):
            raise ValueError(f"The ids of the samples are not in increasing order. {_AGAIN}")
    return _sha256(data), mask, samples, metadata


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


def _mask(parts: Sequence[_Part], stored: Mapping[str, Tensor]) -> SparseMask:
    space = _space(parts)
    pieces = [
        part.decode(stored) + start
        for part, start in zip(parts, space.offsets[:-1], strict=True)
        if part.count
    ]
    return SparseMask(space, torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64))


def _read_header(
    stream: BinaryIO, size: int
) -> tuple[bytes, dict[str, Any], tuple[_Part, ...], int]:
    """The header's bytes and what they declare, verified, at a cost that no file can raise."""
    prefix = stream.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8:
        raise ValueError(
            f"A file of {size} bytes cannot hold the header that it announces. {_AGAIN}"
        )
    if length > _MAX_HEADER:
        raise ValueError(
            f"The header has {length:,} bytes; at most {_MAX_HEADER:,} are accepted. Shorten the "
            "provenance, or see where the file comes from."
        )
    raw = stream.read(length)
    text, metadata = _own_metadata(_parsed(raw))
    parts, rows = _declared(metadata)
    if _canonical({**metadata, **_described(parts, rows)}) != text:
        raise ValueError(f"The metadata contradicts itself or is not canonical JSON. {_AGAIN}")
    table = _table(parts, rows)
    if prefix + raw != _header(table, text):
        raise ValueError(f"The header does not list what its metadata declares. {_AGAIN}")
    expected = 8 + length + max((e["data_offsets"][1] for e in table.values()), default=0)
    if size != expected:
        raise ValueError(f"The file has {size} bytes; its header speaks of {expected}. {_AGAIN}")
    return prefix + raw, metadata, parts, rows


def _parsed(raw: bytes) -> dict[str, Any]:
    """A JSON object without repeated keys; whatever else it is, a ValueError."""
    if max(raw.count(mark) for mark in b"[{,") > _MAX_MARKS:
        raise ValueError(
            f"The header has over {_MAX_MARKS:,} parts: shorten the provenance, or see where the "
            "file comes from."
        )
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The header is no sound JSON: {_clip(str(error))}. {_AGAIN}") from error
    if not isinstance(value, dict):
        raise ValueError(f"The header is no JSON object. {_AGAIN}")
    return value


def _own_metadata(header: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The `ird_mask` text and what it says, of a version that is known here."""
    outer = header.get("__metadata__")
    text = outer.get("ird_mask") if isinstance(outer, dict) else None
    if not isinstance(text, str):
        names = [key for key in header if key != "__metadata__"]
        few = ", ".join(_clip(name, 40) for name in names[:3])
        raise ValueError(
            f"This is no ird-mask: the header has no `ird_mask` text. It lists {len(names):,} "
            f"tensors ({few}). Pass a file that save_mask wrote."
        )
    metadata = _parsed(text.encode(errors="replace"))
    version = metadata.get("format_version")
    if not isinstance(version, str) or not re.fullmatch(r"[0-9]{1,4}\.[0-9]{1,4}", version):
        raise ValueError(f"format_version is {_clip(version)}, not like {FORMAT_VERSION}. {_AGAIN}")
    if version.partition(".")[0] != FORMAT_VERSION.partition(".")[0]:
        raise ValueError(
            f"The file is ird-mask {version}; this ird_search reads ird-mask 1. Update ird_search, "
            "or write the mask again with this version."
        )
    if not isinstance(metadata.get("provenance"), dict):
        raise ValueError(f"The metadata holds no provenance object. {_AGAIN}")
    return text, metadata


def _declared(metadata: Mapping[str, Any]) -> tuple[tuple[_Part, ...], int]:
    """The parts and the number of rows that the metadata declares, their types checked."""
    order, params, rows = metadata.get("order"), metadata.get("params"), metadata.get("samples")
    if not (isinstance(order, list) and isinstance(params, dict) and _is_size(rows)):
        raise ValueError(f"The metadata lacks a sound `order`, `params` or `samples`. {_AGAIN}")
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
            and name != _SAMPLES
        ):
            raise ValueError(
                f"Tensor {_clip(name)} is declared as {_clip(entry)}; a printable name other than "
                f"{_SAMPLES}, and a shape of at most {_MAX_RANK} sizes, are accepted."
            )
        if not _is_size(count) or count > prod(shape):
            raise ValueError(f"Tensor {_clip(name)} is declared as {_clip(entry)}. {_AGAIN}")
        parts.append(_Part(name, tuple(shape), count))
    if len(set(order)) < len(order) or not _is_size(sum(part.numel for part in parts)):
        raise ValueError(
            f"A tensor is declared twice, or all have more than {_MAX_NUMEL:,} entries. {_AGAIN}"
        )
    return tuple(parts), rows


def _check_match(
    space: ParameterSpace, provenance: Mapping[str, Any], model: nn.Module, strict: bool
) -> None:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    wrong = [name for name in space.names if shapes.get(name) != space.shape(name)]
    if wrong:
        # Ten show the pattern; looking up near names for all would be slow in a large model.
        shown = ParameterSpace(tuple(wrong[:10]), tuple(map(space.shape, wrong[:10])))
        more = [f"and {len(wrong) - 10} more"] if len(wrong) > 10 else []
        text = f"The mask is for another model: {len(wrong)} of {len(space.names)} tensors differ."
        lines = "".join(f"\n  - {line}" for line in [*shown.differences(model), *more])
        raise ValueError(f"{text}{lines}\n{_likely_cause(wrong, model)}")
    if not strict:
        return
    recorded, fresh = provenance.get("weights_sha256"), provenance.get("fresh_parameters", [])
    if not isinstance(recorded, str) or not isinstance(fresh, list):
        raise ValueError(
            "The file does not record the weights that it was made for, so strict=True has nothing "
            "to check. Load without strict, or save with weights_sha256 in the provenance."
        )
    if (held := weights_sha256(model, [name for name in shapes if name in fresh])) != recorded:
        raise ValueError(
            f"The model's weights (sha256 {held[:12]}) are not those that the mask was made for "
            f"({recorded[:12]!r}). Load the same base model and revision in the same dtype, before "
            "any training, or load without strict."
        )


def _likely_cause(wrong: Sequence[str], model: nn.Module) -> str:
    """Why the names or shapes differ, and what to do, as far as the names tell."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    missing = [name for name in wrong if name not in shapes]
    if not missing:
        return "Likely: another size of the model, or its weights are quantised. Load the same one."
    bare = {name.replace(".base_layer.", ".") for name in shapes}  # PEFT moves what it adapts
    for prefix, wrapper in _WRAPPERS.items():
        if any(prefix + name in bare or name in bare for name in missing):
            return (
                f"Likely: this model is wrapped by {wrapper} (prefix {prefix!r}). Load the mask "
                "with the model as it is before wrapping."
            )
        if any(name.startswith(prefix) for name in missing):
            return (
                f"Likely: the mask was made on a model wrapped by {wrapper} (prefix {prefix!r}). "
                "Wrap this model in the same way first."
            )
    aliases = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if aliases.intersection(missing):
        return (
            "Likely: tied weights. Here the tensor is a second name of another one; load the model "
            "with the same tying as when the mask was made."
        )
    if any(a.endswith("." + b) for n in missing[:10] for m in shapes for a, b in ((m, n), (n, m))):
        return (
            "Likely: one of the two is the base model and the other has a task head on it. Load "
            "the model through the same class as when the mask was made."
        )
    return (
        "Likely: another architecture, or another major version of transformers, which renames "
        "tensors. Compare the base model and versions in inspect_mask(path).describe()."
    )


def _file(path: str | os.PathLike[str]) -> Path:
    directory = Path(path).is_dir() or str(path).endswith(("/", os.sep))
    return Path(path) / FILE_NAME if directory else Path(path)


def _written_by() -> dict[str, str]:
    try:
        version = importlib.metadata.version("ird_search")
    except importlib.metadata.PackageNotFoundError:
        version = "0"
    return dict(zip(_WRITER, ("ird_search", version, str(torch.__version__)), strict=True))


def _json_data(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance as JSON gives it back. Raises UsageError for what JSON cannot hold."""
    problems, data = [], dict[str, Any]()
    for key, value in provenance.items():
        try:
            if not isinstance(key, str):
                raise TypeError("its key is not a string")
            data |= json.loads(_canonical({key: value}), object_pairs_hook=_distinct)
        except (TypeError, ValueError, RecursionError) as error:
            problems.append(
                f"provenance[{key!r}] cannot be stored: {error}. Strings, finite numbers, "
                "booleans, None, and lists and string-keyed mappings of these are accepted."
            )
    if problems:
        raise UsageError(problems)
    return data


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice in one object")
    return found


def _space(parts: Sequence[_Part]) -> ParameterSpace:
    return ParameterSpace(tuple(p.name for p in parts), tuple(p.shape for p in parts))


def _is_size(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= _MAX_NUMEL  # a bool is no size


def _width(dtype: str) -> int:
    return np.dtype(_DTYPES[dtype]).itemsize


def _bytes(tensor: Tensor, dtype: str) -> bytes:
    return tensor.numpy().astype(_DTYPES[dtype]).tobytes()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _clip(value: Any, width: int = 100) -> str:
    """A value on one printable line: what a file says may hold escape codes."""
    text = json.dumps(value, ensure_ascii=False)
    text = text if text.isprintable() else json.dumps(value)
    return text if len(text) <= width else text[: width - 1] + "…"
