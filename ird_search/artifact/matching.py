"""Whether a mask fits a model, and what is likely the matter where it does not."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ird_search.errors import ModelError, UsageError
from ird_search.parameters import ParameterSpace

_WRAPPERS = {"base_model.model.": "PEFT", "module.": "DataParallel", "_orig_mod.": "torch.compile"}


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


def check_match(
    space: ParameterSpace, provenance: Mapping[str, Any], model: nn.Module, strict: bool
) -> None:
    """Refuse a model that lacks a tensor of the space; with `strict`, also one of other weights.

    Raises:
        ValueError: what differs, and why that is likely so.
    """
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    wrong = [name for name in space.names if shapes.get(name) != space.shape(name)]
    if wrong:
        more = [f"and {len(wrong) - 10} more"] if len(wrong) > 10 else []
        text = f"The mask is for another model: {len(wrong)} of {len(space.names)} tensors differ."
        lines = "".join(f"\n  - {line}" for line in [*space.differences(model)[:10], *more])
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
