"""The base model of a mask or delta file, loaded as the search loaded it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig

from ird_search.artifact import MaskFile, inspect_file
from ird_search.errors import ModelError, UsageError, first_line
from ird_search.mask import SparseMask
from ird_search.models import LOAD_ERRORS, load_model, quiet
from ird_search.seeds import derive


@dataclass(frozen=True, eq=False)
class MaskOf:
    """The mask of a mask file, or of a delta.

    Args:
        path: where it lies.
        sha256: hash of the whole file.
        mask: the entries.
        provenance: what the file says about its origin.
    """

    path: Path
    sha256: str
    mask: SparseMask
    provenance: Mapping[str, Any]


def mask_of(path: Path) -> MaskOf:
    """Read and verify a mask or delta file.

    Raises:
        ArtifactError: the file is damaged, or is neither.
    """
    file = inspect_file(path)
    mask = file.mask if isinstance(file, MaskFile) else file.delta.mask
    return MaskOf(file.path, file.sha256, mask, file.provenance)


MOST_CLASSES = 100_000
"""A file may say anything; a model with more classes than this is not made on its word."""

COMMON = ("base_model", "architecture", "weights_sha256", "fresh_parameters", "task", "head")


@dataclass(frozen=True)
class Base:
    """What a file says of the model that its mask was made on, as far as it does.

    Provenance is free: any of it may be missing, or be something else.

    Args:
        task: as `load_model` names it.
        classes: how many the head has.
        dtype: of the loaded weights.
        seed: what a fresh head was drawn from.
        is_adapted: whether the mask is over the adapters of a PEFT model.
    """

    task: str | None = None
    classes: int | None = None
    dtype: str = "auto"
    seed: int = 0
    is_adapted: bool = False

    @classmethod
    def of(cls, provenance: Mapping[str, Any]) -> Base:
        """Read what a file records."""
        task, search = part(provenance, "task"), part(provenance, "search")
        architecture = str(provenance.get("architecture", ""))
        name, classes = task.get("name"), task.get("num_labels")
        if name == "classification" and architecture.endswith("ForImageClassification"):
            name = "image-classification"
        seed = provenance.get("seed", search.get("seed"))
        dtype = provenance.get("dtype", search.get("dtype"))
        return cls(
            name if isinstance(name, str) else None,
            classes if type(classes) is int and 0 < classes <= MOST_CLASSES else None,
            dtype if isinstance(dtype, str) else "auto",
            seed if isinstance(seed, int) else 0,
            architecture.startswith("Peft"),
        )


def part(provenance: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A mapping within a provenance; empty where there is none."""
    found = provenance.get(key)
    return found if isinstance(found, Mapping) else {}


def facts_of(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What other files made from this one say about the base."""
    base = Base.of(provenance)
    kept = {key: provenance[key] for key in COMMON if key in provenance}
    return {**kept, **({"seed": base.seed, "dtype": base.dtype} if base.task else {})}


def base_model(
    provenance: Mapping[str, Any], model: str, *, revision: str | None = None
) -> nn.Module:
    """Load the base as the search did: the same class, number of classes, dtype and fresh head.

    Where no task is recorded, the class is the one that the model's own config.json names.

    Raises:
        UsageError: the mask is over the adapters of a PEFT model.
        ModelError: the model cannot be loaded.
    """
    base = Base.of(provenance)
    if base.is_adapted:
        raise UsageError(
            "This mask is over the adapters of a PEFT model, which no directory of a base model "
            "tells. In Python, make that model again and call the exporter."
        )
    if base.task is None:
        return _model_of_config(model, revision)
    return load_model(
        model,
        task=base.task,
        num_labels=base.classes,
        seed=derive(base.seed, "fresh head"),
        dtype=base.dtype,
        need_processor=False,
        revision=revision,
    ).model


def _model_of_config(model: str, revision: str | None) -> nn.Module:
    try:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
        architecture = getattr(transformers, (config.architectures or ["?"])[0])
        with quiet():
            loaded: nn.Module = architecture.from_pretrained(
                model, revision=revision, use_safetensors=True, trust_remote_code=False
            )
    except (*LOAD_ERRORS, AttributeError) as error:
        raise ModelError(f"{model} cannot be loaded: {first_line(error)}") from error
    return loaded
