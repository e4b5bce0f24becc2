"""`export_delta`: what masked fine-tuning made of a model, as a `Delta`.

The delta holds the tuned values at the mask's entries, and the tensors that were trained whole:
with the base, it is the tuned model bit for bit. Anything else that moved is refused.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ird_search.artifact import Delta, save_delta
from ird_search.artifact.container import bytes_of
from ird_search.artifact.matching import lines_sha256, weight_lines
from ird_search.borrow import unwrapped
from ird_search.entries import trained_entries
from ird_search.errors import ModelError, UsageError
from ird_search.mask import SparseMask
from ird_search.mismatch import listed, mismatch

Weights = nn.Module | Mapping[str, Tensor]


def export_delta(
    base: Weights,
    tuned: Weights,
    mask: SparseMask,
    path: str | os.PathLike[str] | None = None,
    *,
    dense: Iterable[str] = (),
    provenance: Mapping[str, Any] | None = None,
) -> Delta:
    """The delta between a base model and what masked fine-tuning made of it.

    Buffers that moved (running statistics) are stored whole, like the dense tensors.

    Args:
        base: the model before training: a module, or a copy of its state dict.
        tuned: the model after training; one of the two is a module.
        mask: the entries that were trained.
        path: where to write the delta, too: as for `save_delta`.
        dense: names of the tensors that were trained whole, outside the mask (the head).
        provenance: plain JSON data about the origin. `base_model` is added where `base` is a model
            that knows its name.

    Raises:
        ModelError: the mask is of another model, or anything else moved; up to ten tensors are
            named.
        UsageError: both are state dicts, or share their tensors; a dense name is unknown or
            masked; a dtype cannot be stored (complex numbers); with a path, also what `save_delta`
            raises.

    Example:
        >>> import torch
        >>> from ird_search.parameters import ParameterSpace
        >>> model = nn.Linear(2, 1)
        >>> before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        >>> mask = SparseMask(ParameterSpace.of(model, ["weight"]), torch.tensor([1]))
        >>> with torch.no_grad():
        ...     _ = model.weight[0, 1].fill_(5.0)
        >>> export_delta(before, model, mask).values
        {'weight': tensor([5.])}
    """
    model = _architecture(base, tuned, mask)
    before, after = _tensors(base, model), _tensors(tuned, model)
    named = _dense_names(model, mask, dense)
    _refuse_shared([*mask.indices, *named], before, after)
    whole = {*named, *_moved_buffers(model, before, after)}
    _refuse_other_changes(model, mask, before, after, whole)
    kept = {name: before[name] for name, _ in model.named_parameters() if name not in whole}
    delta = Delta(
        mask,
        {
            name: after[name].reshape(-1)[index.to(after[name].device)].cpu()
            for name, index in mask.indices.items()
        },
        {name: after[name].to("cpu", copy=True).contiguous() for name in sorted(whole)},
        lines_sha256(weight_lines(kept).values()),
        {**_origin(base), **(provenance or {})},
    )
    if path is not None:
        save_delta(path, delta)
    return delta


def _architecture(base: Weights, tuned: Weights, mask: SparseMask) -> nn.Module:
    """The module that tells parameters from buffers, and which names are tied."""
    modules = [weights for weights in (tuned, base) if isinstance(weights, nn.Module)]
    if not modules:
        raise UsageError(
            "base and tuned are both state dicts, which do not tell parameters from buffers. Pass "
            "the model itself for one of them."
        )
    for module in modules:
        if text := mismatch(mask.space, module):
            raise ModelError(text)
    return modules[0]


def _first_names(model: nn.Module) -> dict[str, str]:
    """The first name of each tensor by each of its names: tied tensors have several."""
    first: dict[int, str] = {}
    tensors = chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors}


def _tensors(weights: Weights, model: nn.Module) -> dict[str, Tensor]:
    """Parameters and stored buffers under all their names.

    A checkpoint may hold a tied tensor under one name only; the model knows the others.
    """
    held = weights.state_dict() if isinstance(weights, nn.Module) else weights
    tensors = {name: t.detach() for name, t in held.items() if isinstance(t, Tensor)}
    if empty := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise ModelError(f"{empty[0]} is on the meta device: load the model's weights first.")
    first = _first_names(model)
    known = {first.get(name, name): tensor for name, tensor in reversed(tensors.items())}
    return {**{name: known[f] for name, f in first.items() if f in known}, **tensors}


def _dense_names(model: nn.Module, mask: SparseMask, dense: Iterable[str]) -> list[str]:
    """The dense tensors by their first names, checked."""
    first, buffers = _first_names(model), dict(model.named_buffers())
    names = [dense] if isinstance(dense, str) else list(dense)
    whole = list(dict.fromkeys(first.get(name, name) for name in names))
    trained_entries(model, mask, [n for n in whole if n not in buffers], allow_none=True)
    return whole


def _refuse_shared(
    names: Iterable[str], before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> None:
    """Refuse a base that is the tuned model: `state_dict()` gives no copies."""
    for name in names:
        old, new = before.get(name), after.get(name)
        if old is not None and new is not None and old.data_ptr() == new.data_ptr() != 0:
            raise UsageError(
                f"base and tuned share the tensor {name!r}, so what training changed is lost. Pass "
                "a copy from before the training: {name: t.clone() for name, t in "
                "model.state_dict().items()}."
            )


def _moved_buffers(
    model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> list[str]:
    return [
        name
        for name, _ in model.named_buffers()
        if name in before
        and name in after
        and (before[name].shape, before[name].dtype) == (after[name].shape, after[name].dtype)
        and bytes_of(before[name]) != bytes_of(after[name])
    ]


def _refuse_other_changes(
    model: nn.Module,
    mask: SparseMask,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    whole: Collection[str],
) -> None:
    free = {name for name, first in _first_names(model).items() if first in whole}
    moved = [f"{name}: missing after training." for name in sorted(whole) if name not in after]
    if moved := moved + mask.verify(before, after, dense=free):
        head = f"The tuned model differs from the base outside the mask in {len(moved)} tensors."
        raise ModelError(
            f"{listed(head, moved)}\n"
            "Pass the model and the mask that were trained, and name tensors that were trained "
            "whole (the head) in dense=[…]."
        )


def _origin(base: Weights) -> dict[str, Any]:
    """Id and revision of the base, where it knows them; a directory by its own name only."""
    inner: Any = unwrapped(base) if isinstance(base, nn.Module) else None
    origin = str(getattr(inner, "name_or_path", "") or "")
    if not origin:
        return {}
    local = Path(origin).is_absolute() or Path(origin).is_dir()
    revision = getattr(getattr(inner, "config", None), "_commit_hash", None)
    return {"base_model": {"id": Path(origin).name if local else origin, "revision": revision}}
