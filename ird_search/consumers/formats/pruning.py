"""Masks of `torch.nn.utils.prune`, where 1 means "keep the weight" and 0 "compute with zero"."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.utils import prune

from ird_search.consumers.formats.tensors import Trains, from_tensors, to_tensors
from ird_search.errors import UsageError
from ird_search.mask import SparseMask
from ird_search.parameters import require_module


def from_prune(model: nn.Module, *, trains: Trains) -> SparseMask:
    """The masks that `torch.nn.utils.prune` has put on a model, as one mask.

    Names are those of the model without pruning: `weight`, for the parameter that is `weight_orig`
    now. The space is the pruned tensors. After `prune.remove` there is nothing left to read.

    Args:
        trains: 1 to train the weights that pruning kept, 0 to train those that it zeroed.

    Raises:
        UsageError: nothing is pruned, or a pruned weight is tied to another.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 2)
        >>> kept = torch.tensor([[1, 0], [1, 1]])
        >>> _ = prune.custom_from_mask(model, "weight", kept)
        >>> from_prune(model, trains=0).indices
        {'weight': tensor([1])}
    """
    require_module(model)
    masks = {}
    for prefix, module in model.named_modules():
        held = dict(module.named_buffers(recurse=False))
        for name, _ in module.named_parameters(recurse=False):
            pruned = name.removesuffix("_orig")
            if pruned != name and f"{pruned}_mask" in held:
                masks[_joined(prefix, pruned)] = held[f"{pruned}_mask"]
    if not masks:
        raise UsageError(
            "No parameter of this model is pruned: none is called …_orig with a buffer …_mask "
            "beside it. Read the masks before prune.remove takes them away."
        )
    _refuse_tied(model, {f"{name}_orig" for name in masks})
    return from_tensors(masks, trains=trains)[0]


def to_prune(model: nn.Module, mask: SparseMask) -> None:
    """Prune, in the tensors of the mask's space, every weight that is not selected.

    That is another thing than to freeze it: `torch.nn.utils.prune` computes with 0 in its place.
    It shows what the selected weights do alone; to train them, use `apply_mask`.

    Raises:
        ModelError: the mask is of another model.
        UsageError: a weight of the space is tied to another.

    Example:
        >>> import torch
        >>> from ird_search.parameters import ParameterSpace
        >>> model = nn.Linear(2, 1)
        >>> to_prune(model, SparseMask(ParameterSpace.of(model, ["weight"]), torch.tensor([1])))
        >>> model.weight_mask
        tensor([[0., 1.]])
    """
    tensors = to_tensors(mask, model, trains=1)
    _refuse_tied(model, mask.space.names)
    for name in mask.space.names:
        prefix, _, own = name.rpartition(".")
        kept = tensors[name].to(model.get_parameter(name).device)
        prune.custom_from_mask(model.get_submodule(prefix), own, kept)


def _refuse_tied(model: nn.Module, names: Iterable[str]) -> None:
    """Raise where a parameter belongs to several modules: pruning concerns only one of them."""
    holders: dict[nn.Parameter, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            holders.setdefault(parameter, []).append(_joined(prefix, name))
    concerned = set(names)
    tied = [held for held in holders.values() if len(held) > 1 and concerned.intersection(held)]
    if tied:
        raise UsageError(
            f"{' and '.join(held)} are one tied parameter, and torch.nn.utils.prune masks a module "
            "alone: untie them, or leave them out."
            for held in tied
        )


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
