"""Masks and deltas on disk: safetensors files that any trainer can read.

The winner of a search, a choice of columns (parameters) and of rows (samples) of the
samples × parameters matrix, leaves as `ird-mask`; what training at these parameters gave leaves as
`ird-delta`. `docs/artifact.md` gives both formats. Equal contents give equal bytes, and a file is
accepted only when it is, byte for byte, what would be written for what it holds: one changed bit
anywhere is refused.

`container` makes the bytes, `plans` tells what each kind of file holds, `reading` checks them on
the way in, `matching` compares weights.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ird_search.artifact.container import Format, Plan, canonical, distinct, encode, sha256
from ird_search.artifact.contents import WRITER, ChosenRows, Delta, DeltaFile, MaskFile
from ird_search.artifact.matching import check_weights, weights_sha256
from ird_search.artifact.plans import (
    DELTA,
    MASK,
    DeltaPlan,
    MaskPlan,
    stored_in_delta,
    stored_in_mask,
)
from ird_search.artifact.reading import Check, read, read_stream
from ird_search.errors import UsageError
from ird_search.files import write_atomically
from ird_search.mask import SparseMask
from ird_search.mismatch import mismatch
from ird_search.parameters import require_module

__all__ = [
    "FILE_NAME",
    "FORMAT_VERSION",
    "ChosenRows",
    "Delta",
    "DeltaFile",
    "MaskFile",
    "inspect_delta",
    "inspect_file",
    "inspect_mask",
    "load_delta",
    "load_mask",
    "save_delta",
    "save_mask",
    "weights_sha256",
]

FILE_NAME, FORMAT_VERSION = MASK.file_name, MASK.version

_FORMATS: tuple[Format[MaskFile | DeltaFile], ...] = (MASK, DELTA)


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
    stored = stored_in_mask(mask, samples)
    return _save(path, MASK, MaskPlan.of(mask, samples), stored, provenance or {})


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
    return read(path, MASK, check=_fits(model, strict)).mask


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
    return read(path, MASK)


def save_delta(path: str | os.PathLike[str], delta: Delta) -> str:
    """Write a delta as `ird-delta` version 1, atomically; return the SHA-256 of the file.

    Args:
        path: the file, or a directory (there, or with a slash at its end) that is to get
            `delta.safetensors`.

    Raises:
        UsageError: the provenance is no JSON, the delta exceeds the format's limits, or the place
            cannot be written.
        ResourceError: the disk is full; a former file is untouched.

    Example:
        >>> import tempfile
        >>> from ird_search.parameters import ParameterSpace
        >>> mask = SparseMask(ParameterSpace(("w",), ((2, 50),)), torch.tensor([7]))
        >>> folder = tempfile.mkdtemp()
        >>> sha = save_delta(folder, Delta(mask, {"w": torch.tensor([0.5])}, {}, "1a2b" * 16))
        >>> load_delta(folder).values
        {'w': tensor([0.5000])}
    """
    return _save(path, DELTA, DeltaPlan.of(delta), stored_in_delta(delta), delta.provenance)


def load_delta(path: str | os.PathLike[str], model: nn.Module | None = None) -> Delta:
    """Read and verify a delta; with a model, refuse a delta of another one.

    Args:
        path: the file, or the directory that holds `delta.safetensors`.
        model: every tensor of the mask's space must be in it under the same name and shape.
            Whether its weights are the delta's base is for `merge_delta` to tell.

    Raises:
        ArtifactError: as for `load_mask`.
        ResourceError: the mask does not fit into memory.
    """
    return read(path, DELTA, check=_fits(model)).delta


def inspect_delta(path: str | os.PathLike[str]) -> DeltaFile:
    """Read and verify a delta file with its metadata.

    Raises:
        ArtifactError: as for `load_mask`.
    """
    return read(path, DELTA)


def inspect_file(path: str | os.PathLike[str]) -> MaskFile | DeltaFile:
    """Read and verify a file that holds a mask or a delta; of a directory with both, the mask's.

    Raises:
        ArtifactError: as for `load_mask`.
    """
    return read(path, *_FORMATS)


def _save(
    path: str | os.PathLike[str],
    form: Format[Any],
    plan: Plan[Any],
    stored: Mapping[str, Tensor],
    provenance: Mapping[str, Any],
) -> str:
    said = {**_written_by(), "provenance": _json_data(provenance)}
    try:
        data = encode(form, plan, stored, said)
        read_stream(io.BytesIO(data), len(data), form)
    except ValueError as error:
        raise UsageError(
            f"This {form.noun} cannot be stored as {form.name} {form.major}: {error}"
        ) from error
    write_atomically(form.file_at(path), data)
    return sha256(data)


def _fits(model: nn.Module | None, strict: bool = False) -> Check | None:
    """The check that a file is of this model; with `strict`, also of its weights."""
    if model is None:
        return None
    require_module(model)

    def check(form: Format[Any], plan: Plan[Any], metadata: Mapping[str, Any]) -> None:
        if text := mismatch(plan.space, model, form.noun):
            raise ValueError(text)
        if strict:
            check_weights(metadata["provenance"], model)

    return check


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
