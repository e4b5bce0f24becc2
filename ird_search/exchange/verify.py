"""`verify`: whether a file is whole, and whether it is of a model."""

from __future__ import annotations

from pathlib import Path

from ird_search.artifact import DeltaFile, inspect_file, load_mask
from ird_search.exchange.base import base_model
from ird_search.merge import merge_delta


def verify(path: Path, *, model: str | None = None, revision: str | None = None) -> str:
    """Read a mask or delta file, check all of it, and with a model that it is of these weights.

    Returns:
        What was found to be right, in words.

    Raises:
        ArtifactError: the file is missing, damaged, hostile, or of another model; it is said which.
        ModelError, UsageError: the model cannot be loaded.
    """
    found = inspect_file(path)
    delta = found.delta if isinstance(found, DeltaFile) else None
    mask = found.delta.mask if isinstance(found, DeltaFile) else found.mask
    noun = "delta" if delta else "mask"
    whole = f"{found.path}: a whole {noun}, {mask.count:,} parameters, sha256 {found.sha256}"
    if model is None:
        return whole
    if delta:
        merge_delta(base_model(found.provenance, model, revision=revision), delta)
        return f"{whole}\nIts base is {model}, with the weights that it records."
    loaded = base_model(found.provenance, model, revision=revision)
    strict = "weights_sha256" in found.provenance
    load_mask(path, loaded, strict=strict)
    weights = "the weights that it records" if strict else "its tensors (it records no weights)"
    return f"{whole}\nThe model {model} has {weights}."
