"""The base model of a mask or delta file, loaded as the search loaded it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig

from ird_search.errors import ModelError, UsageError
from ird_search.models import LoadedModel, load_model, quiet
from ird_search.seeds import derive

FACTS = ("base_model", "architecture", "weights_sha256", "fresh_parameters", "task", "head")
"""What masks of one base agree on, and what a delta takes over from its mask."""


def facts_of(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says about its base."""
    return {key: provenance[key] for key in FACTS if key in provenance}


def base_model(
    provenance: Mapping[str, Any], model: str, *, revision: str | None = None
) -> LoadedModel:
    """Load the base as the search did: the same class, number of classes and fresh head.

    Raises:
        UsageError: the file does not say for what task the mask was made.
        ModelError: the model cannot be loaded.
    """
    if str(provenance.get("architecture", "")).startswith("Peft"):
        raise UsageError(
            "This mask is over the adapters of a PEFT model, which no directory of a base model "
            "tells. In Python, make that model again and call the exporter."
        )
    task = task_of(provenance)
    return load_model(
        model,
        task=task,
        num_labels=provenance["task"].get("num_labels"),
        seed=derive((provenance.get("search") or {}).get("seed", 0), "fresh head"),
        need_processor=False,
        revision=revision,
    )


def task_of(provenance: Mapping[str, Any]) -> str:
    """The task as `load_model` names it."""
    task = (provenance.get("task") or {}).get("name")
    if not isinstance(task, str):
        raise UsageError(
            "This file does not record for what task it was made, as those of a search do, so the "
            "model cannot be loaded for it. In Python, load it yourself and call the exporter."
        )
    pictures = str(provenance.get("architecture", "")).endswith("ForImageClassification")
    return "image-classification" if pictures else task


def model_of_config(model: str, revision: str | None) -> nn.Module:
    """The model of the class that its own config.json names.

    Raises:
        ModelError: it cannot be loaded.
    """
    try:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
        architecture = getattr(transformers, (config.architectures or ["?"])[0])
        with quiet():
            loaded: nn.Module = architecture.from_pretrained(model, revision=revision)
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
