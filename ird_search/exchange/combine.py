"""`combine_masks`: set operations on mask files. `merged_model`: a delta put into its base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ird_search.algebra import disjoint, intersection, union
from ird_search.artifact import (
    FILE_NAME,
    DeltaFile,
    inspect_file,
    save_mask,
)
from ird_search.errors import UsageError
from ird_search.exchange.base import (
    Base,
    MaskOf,
    base_model,
    facts_of,
    mask_of,
)
from ird_search.files import refuse_existing, written_directory
from ird_search.mask import SparseMask
from ird_search.merge import merge_delta
from ird_search.models import find_processor, quiet

How = Literal["union", "intersection", "difference", "disjoint"]

OTHER_BASES = (
    "Note: these masks were not all made for the same weights, or do not say; the new file "
    "records none, so it cannot be loaded with strict=True."
)

_TOGETHER: dict[How, Callable[[Sequence[SparseMask]], SparseMask]] = {
    "union": union,
    "intersection": intersection,
    "difference": lambda masks: masks[0] - union(masks[1:]),
}


def combine_masks(
    paths: Sequence[Path], output: Path, *, how: How
) -> tuple[dict[Path, SparseMask], str]:
    """Write the union, intersection or difference of mask files, or masks that share nothing.

    Args:
        output: a mask file; for `disjoint` a directory, with a mask for each file.

    Returns:
        The masks by the files they were written to, and a note to show: empty, or that the bases
        differ.

    Raises:
        ArtifactError: a file is damaged, or is no mask.
        UsageError: fewer than two masks, masks of different models, or an output that is there.
    """
    if len(paths) == 1:
        is_delta = isinstance(inspect_file(paths[0]), DeltaFile)
        raise UsageError(
            f"{paths[0]} is a delta. Say into which base to merge it (--model)."
            if is_delta
            else f"One mask came, {paths[0]}; at least two can be combined."
        )
    files = [mask_of(path) for path in paths]
    masks = [f.mask for f in files]
    provenance = {
        **_common([f.provenance for f in files]),
        "combined": {
            "how": how,
            "masks": [
                {"name": n, "sha256": f.sha256, "count": f.mask.count}
                for n, f in zip(_names(files), files, strict=True)
            ],
        },
    }
    note = "" if "weights_sha256" in provenance else OTHER_BASES
    refuse_existing(output)
    if how == "disjoint":
        files_of = [f"{name}.safetensors" for name in _names(files)]
        apart = dict(zip(files_of, disjoint(masks), strict=True))
        with written_directory(output) as place:
            for name, mask in apart.items():
                save_mask(place / name, mask, provenance=provenance)
        return {output / name: mask for name, mask in apart.items()}, note
    combined = _TOGETHER[how](masks)
    save_mask(output, combined, provenance=provenance)
    return {output: combined}, note


def merged_model(path: Path, output: Path, *, model: str, revision: str | None = None) -> DeltaFile:
    """Write the model that a delta makes of its base: `save_pretrained`, with the tokenizer.

    Raises:
        ArtifactError: the file is damaged, or no delta.
        ModelError: the model is not the delta's base.
        UsageError: the output is there already.
    """
    found = inspect_file(path)
    if not isinstance(found, DeltaFile):
        raise UsageError(f"{path} is a mask, and has no values to put into a model. Pass a delta.")
    refuse_existing(output)
    tuned: Any = base_model(found.provenance, model, revision=revision)
    merge_delta(tuned, found.delta)
    task = Base.of(found.provenance).task or "classification"
    processor = find_processor(model, task=task, revision=revision)
    with written_directory(output) as place, quiet():
        tuned.save_pretrained(place)
        if processor is not None:
            processor.save_pretrained(place)
    return found


def _common(provenances: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all masks say alike about their base."""
    first, *others = map(facts_of, provenances)
    return {
        key: value
        for key, value in first.items()
        if all(key in other and other[key] == value for other in others)
    }


def _names(files: Sequence[MaskOf]) -> list[str]:
    """A name for each file: its own, or that of its directory where that tells more."""
    names = [f.path.parent.name if f.path.name == FILE_NAME else f.path.stem for f in files]
    if len(set(names)) == len(names) and all(names):
        return names
    return [f"{i}-{name}".rstrip("-") for i, name in enumerate(names, start=1)]
