"""Whether a file fits a model: its tensors, and its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ird_search.errors import ModelError, UsageError
from ird_search.parameters import require_module


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
    require_module(model)
    parameters = dict(model.named_parameters())
    if unknown := sorted(set(exclude) - parameters.keys()):
        raise UsageError(f"{name!r} is not a parameter of this model." for name in unknown)
    kept = {name: p for name, p in parameters.items() if name not in exclude}
    return lines_sha256(weight_lines(kept).values())


def weight_lines(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The line of each tensor that `weights_sha256` goes over, by name."""
    lines = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        if tensor.is_meta:
            raise ModelError(f"{name} is on the meta device: load its weights before hashing them.")
        held = hashlib.sha256(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        dtype = str(tensor.dtype).removeprefix("torch.")
        shape = ",".join(map(str, tensor.shape))
        lines[name] = f"{name}|{dtype}|{shape}|{held.hexdigest()}"
    return lines


def lines_sha256(lines: Iterable[str]) -> str:
    """The hash over lines that come in the order of their names."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def check_weights(provenance: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse a model whose weights are not those that a mask's provenance records.

    Raises:
        ValueError: what differs, and what to do.
    """
    recorded, fresh = provenance.get("weights_sha256"), provenance.get("fresh_parameters", [])
    if not isinstance(recorded, str) or not isinstance(fresh, list):
        raise ValueError(
            "The file does not record the weights that it was made for, so strict=True has nothing "
            "to check. Load without strict, or save with weights_sha256 in the provenance."
        )
    named = {name for name in fresh if isinstance(name, str)}
    held = weights_sha256(model, [name for name, _ in model.named_parameters() if name in named])
    if held != recorded:
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
        raise ValueError(
            f"The model's weights ({', '.join(dtypes)}, sha256 {held[:12]}) are not those that the "
            f"mask was made for ({recorded[:12]!r}). Load the same base model and revision in the "
            "same dtype, before any training, or load without strict."
        )
