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
from ird_search.errors import ModelError, UsageError
from ird_search.mask import SparseMask
from ird_search.models import load_model, quiet
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


FACTS = ("base_model", "architecture", "weights_sha256", "fresh_parameters", "task", "head")
"""What masks of one base agree on, and what a delta takes over from its mask."""


def facts_of(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says about its base."""
    return {key: provenance[key] for key in FACTS if key in provenance}


def base_model(
    provenance: Mapping[str, Any], model: str, *, revision: str | None = None
) -> nn.Module:
    """Load the base as the search did: the same class, number of classes and fresh head.

    Where no task is recorded, the class is the one that the model's own config.json names.

    Raises:
        UsageError: the mask is over the adapters of a PEFT model.
        ModelError: the model cannot be loaded.
    """
    if str(provenance.get("architecture", "")).startswith("Peft"):
        raise UsageError(
            "This mask is over the adapters of a PEFT model, which no directory of a base model "
            "tells. In Python, make that model again and call the exporter."
        )
    task = task_of(provenance)
    if task is None:
        return _model_of_config(model, revision)
    return load_model(
        model,
        task=task,
        num_labels=provenance["task"].get("num_labels"),
        seed=derive((provenance.get("search") or {}).get("seed", 0), "fresh head"),
        need_processor=False,
        revision=revision,
    ).model


def task_of(provenance: Mapping[str, Any]) -> str | None:
    """The task as `load_model` names it; None where it is not recorded."""
    task = (provenance.get("task") or {}).get("name")
    pictures = str(provenance.get("architecture", "")).endswith("ForImageClassification")
    return "image-classification" if task and pictures else task


def _model_of_config(model: str, revision: str | None) -> nn.Module:
    try:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
        architecture = getattr(transformers, (config.architectures or ["?"])[0])
        with quiet():
            loaded: nn.Module = architecture.from_pretrained(
                model, revision=revision, use_safetensors=True, trust_remote_code=False
            )
    except (OSError, ValueError, AttributeError) as error:
        told = (str(error).splitlines() or [""])[0]
        raise ModelError(f"{model} cannot be loaded: {told}") from error
    return loaded


def refuse_existing(output: Path) -> None:
    """Nothing is overwritten.

    Raises:
        UsageError: there is something at `output`.
    """
    if output.exists():
        raise UsageError(f"{output} is there already. Choose another place, or remove it first.")
