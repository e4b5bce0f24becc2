"""The mask on disk: `ird-mask` version 1, a safetensors file that any trainer can read.

The winner of a search, a choice of columns (parameters) and of rows (samples) of the
samples × parameters matrix, leaves in this form. `docs/artifact.md` gives the format. Equal masks
give equal bytes, and a file is accepted only when it is, byte for byte, what `save_mask` would
write for what it holds: one changed bit anywhere is refused.

`layout` makes the bytes, `reading` checks them on the way in, `matching` tells whether a mask fits
a model.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ird_search.artifact.contents import WRITER, ChosenRows, MaskFile
from ird_search.artifact.layout import (
    FILE_NAME,
    FORMAT_VERSION,
    canonical,
    distinct,
    encode,
    file_at,
    sha256,
)
from ird_search.artifact.matching import weights_sha256
from ird_search.artifact.reading import read, read_stream
from ird_search.errors import UsageError
from ird_search.files import write_atomically
from ird_search.mask import SparseMask

__all__ = [
    "FILE_NAME",
    "FORMAT_VERSION",
    "ChosenRows",
    "MaskFile",
    "inspect_mask",
    "load_mask",
    "save_mask",
    "weights_sha256",
]


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
        >>> from ird_search.parameters import ParameterSpace
        >>> folder = tempfile.mkdtemp()
        >>> space = ParameterSpace(("w", "b"), ((2, 100), (2,)))
        >>> sha = save_mask(folder, SparseMask(space, torch.tensor([1, 150])))
        >>> load_mask(folder).indices
        {'w': tensor([  1, 150])}
    """
    origin = _json_data(provenance or {})
    try:
        data = encode(mask, samples, origin, _written_by())
        read_stream(io.BytesIO(data), len(data))
    except ValueError as error:
        raise UsageError(f"This mask cannot be stored as ird-mask 1: {error}") from error
    write_atomically(file_at(path), data)
    return sha256(data)


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
    return read(path, model, strict).mask


def inspect_mask(path: str | os.PathLike[str]) -> MaskFile:
    """Read and verify a mask file with its samples and metadata.

    Raises:
        ArtifactError: as for `load_mask`.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ird_search.parameters import ParameterSpace
        >>> path = Path(tempfile.mkdtemp()) / "digits.safetensors"
        >>> space = ParameterSpace(("w",), ((2, 100),))
        >>> sha = save_mask(path, SparseMask(space, torch.tensor([7])), provenance={"seed": 0})
        >>> found = inspect_mask(path)
        >>> found.sha256 == sha, dict(found.provenance)
        (True, {'seed': 0})
    """
    return read(path, None, False)


def _written_by() -> dict[str, str]:
    try:
        version = importlib.metadata.version("ird_search")
    except importlib.metadata.PackageNotFoundError:
        version = "0"
    return dict(zip(WRITER, ("ird_search", version, str(torch.__version__)), strict=True))


def _json_data(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance as JSON gives it back. Raises UsageError for what JSON cannot hold."""
    problems, data = [], dict[str, Any]()
    for key, value in provenance.items():
        try:
            if not isinstance(key, str):
                raise TypeError("its key is not a string")
            data |= json.loads(canonical({key: value}), object_pairs_hook=distinct)
        except (TypeError, ValueError, RecursionError) as error:
            problems.append(
                f"provenance[{key!r}] cannot be stored: {error}. Strings, finite numbers, "
                "booleans, None, and lists and string-keyed mappings of these are accepted."
            )
    if problems:
        raise UsageError(problems)
    return data
