"""What changed between two sets of tensors, bit for bit, outside the entries that may change."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from ird_search.parameters import ParameterSpace

_NONE = torch.empty(0, dtype=torch.int64)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""An integer of as many bytes, to look at the bits of a number."""

Tensors = Mapping[str, Tensor]


def frozen_changes(
    space: ParameterSpace, selected: Tensors, before: Tensors, after: Tensors, free: Collection[str]
) -> list[str]:
    """A sentence for each tensor in which a frozen entry changed a bit, or which is missing.

    Args:
        space: the tensors that must be there.
        selected: flat indices of the entries that may have moved, by name.
        free: names of tensors that may have moved altogether.

    Example:
        >>> space = ParameterSpace(("w",), ((4,),))
        >>> old, new = torch.zeros(4), torch.tensor([0.0, 5.0, 0.1, 0.0])
        >>> frozen_changes(space, {"w": torch.tensor([1])}, {"w": old}, {"w": new}, ())
        ['w: 1 of 3 frozen entries moved.']
    """
    names = [name for name in dict.fromkeys((*space.names, *before, *after)) if name not in free]
    found = (_change(name, space, selected, before, after) for name in names)
    return [sentence for sentence in found if sentence]


def _change(
    name: str, space: ParameterSpace, selected: Tensors, before: Tensors, after: Tensors
) -> str:
    """What is wrong with one tensor, in a sentence; empty when its frozen entries are as before."""
    old, new = before.get(name), after.get(name)
    if old is None or new is None:
        return f"{name}: missing {'before' if old is None else 'after'} training."
    if old.shape != new.shape or old.dtype != new.dtype:
        return f"{name}: was {_kind(old)}, is {_kind(new)}."
    if name in space and old.shape != space.shape(name):
        return f"{name}: is {_kind(old)}, but {list(space.shape(name))} in the mask."
    moved, index = _moved(old, new), selected.get(name, _NONE)
    moved[index] = False
    count, frozen = int(moved.sum()), moved.numel() - index.numel()
    if not count or (name not in selected and _is_tied(name, selected, before, after)):
        return ""
    return f"{name}: {count:,} of {frozen:,} frozen entries moved."


def _moved(old: Tensor, new: Tensor) -> Tensor:
    """Which entries changed a bit (so 0 and −0 differ, and NaN equals itself): bool [numel]."""
    integer = INTEGERS.get(old.element_size())
    a, b = (t.detach().cpu().reshape(-1) for t in (old, new))
    return a != b if integer is None else a.view(integer) != b.view(integer)


def _is_tied(name: str, selected: Tensors, before: Tensors, after: Tensors) -> bool:
    """Whether a state dict's `name` is another name of a masked tensor."""
    return any(
        before[other].shape == before[name].shape
        and torch.equal(before[other], before[name])
        and torch.equal(after[other], after[name])
        for other in selected
        if other in before and other in after
    )


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
