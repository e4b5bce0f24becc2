"""Masks as dicts of zeros and ones by parameter name, of either polarity and layout."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ird_search.entries import trained_entries
from ird_search.errors import UsageError
from ird_search.mask import SparseMask
from ird_search.mismatch import listed, mismatch
from ird_search.parameters import ParameterSpace, compiled, require_module

Trains = Literal[0, 1]
"""The value that means "train"."""

Layout = Literal["model", "out_in", "in_out"]
"""How the weights of `nn.Linear` and `Conv1D` lie: as in the model, or all in one way."""

_TURNED = {"out_in": Conv1D, "in_out": nn.Linear}
"""The layers whose weight lies the other way in the model."""


def from_tensors(
    tensors: Mapping[str, Tensor],
    model: nn.Module | None = None,
    *,
    trains: Trains,
    layout: Layout = "model",
    dense: Iterable[str] = (),
) -> tuple[SparseMask, tuple[str, ...]]:
    """A mask from tensors of zeros and ones (or bools) by parameter name.

    The mask's space is the tensors that are given, in the model's order. The model must hold all of
    them; its other parameters are outside the mask's say.

    Args:
        model: whose parameters these are. Without one the tensors themselves are the space, in
            their order, and nothing is compared; for combining masks that is enough.
        trains: which value means "train". It has no default: formats disagree.
        layout: how the weights of `nn.Linear` and `Conv1D` lie: as in the model, all of them as
            (out, in), or all as (in, out). Other tensors always lie as in the model.
        dense: what is trained whole, outside the mask: the head. An expression that is a tensor's
            name means that tensor alone; any other is a regular expression, searched in the names.
            All else belongs to the mask, selected in full or not.

    Returns:
        The mask, and the names of the dense parameters.

    Raises:
        UsageError: a dense pattern that is no regular expression; values other than 0 and 1; names
            or shapes that the model lacks; a dense pattern that matches nothing, or a tensor that
            is not trained whole. All problems at once.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> frozen = {"0.weight": torch.tensor([[1, 0], [1, 1]]), "1.bias": torch.tensor([0])}
        >>> mask, dense = from_tensors(frozen, model, trains=0, dense=["^1"])
        >>> mask.indices, dense
        ({'0.weight': tensor([1])}, ('1.bias',))
    """
    _check_choices(trains, layout)
    if model is not None:
        require_module(model)
    if model is None and layout != "model":
        raise UsageError(f"layout={layout!r} needs the model: it knows which tensors are meant.")
    if problems := problems_with(tensors):
        raise UsageError(problems)
    heads = _meant(tensors, [dense] if isinstance(dense, str) else dense)
    values = {name: _values(t) for name, t in _arranged(tensors, model, layout).items()}
    chosen = {name: t == trains for name, t in values.items()}
    if problems := [
        *_misfits(tensors, model, layout),
        *_strange_values(values),
        *_dense_problems(chosen, heads),
    ]:
        raise UsageError(problems)
    order = tensors if model is None else [n for n, _ in model.named_parameters() if n in tensors]
    whole = tuple(name for name in order if any(name in names for names in heads.values()))
    kept = {name: chosen[name] for name in order if name not in whole}
    return SparseMask.from_dict(_space_of(kept), kept), whole


def to_tensors(
    mask: SparseMask,
    model: nn.Module,
    *,
    trains: Trains,
    layout: Layout = "model",
    dense: Iterable[str] = (),
) -> dict[str, Tensor]:
    """A bool tensor for every named parameter of the model: the inverse of `from_tensors`.

    Args:
        trains: which value is to mean "train"; 1 is True.
        layout: how the weights of `nn.Linear` and `Conv1D` are to lie.
        dense: names of the parameters trained whole, outside the mask.

    Raises:
        ModelError: the mask is of another model.
        UsageError: an unknown dense name, or a tensor that is dense and masked.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> mask = SparseMask(ParameterSpace.of(model), torch.tensor([1]))
        >>> to_tensors(mask, model, trains=1)
        {'weight': tensor([[False,  True]]), 'bias': tensor([False])}
    """
    _check_choices(trains, layout)
    masked, whole = trained_entries(model, mask, dense, allow_none=True)
    tensors = {name: torch.zeros(p.shape).bool() for name, p in model.named_parameters()}
    for entries in (*masked, *whole):
        entries.put(tensors[entries.name], torch.ones(entries.count))
    arranged = _arranged(tensors, model, layout)
    return {name: (t if trains else ~t).contiguous() for name, t in arranged.items()}


def problems_with(found: Any) -> list[str]:
    """What keeps a value from being a dict of ordinary tensors by name; empty when nothing does."""
    if not isinstance(found, Mapping) or not found:
        return [f"A mask is a dict of tensors by parameter name; this is {str(found)[:40]!r}."]
    lines = [
        f"{name!r} is {_kind(t)}."
        for name, t in found.items()
        if not (isinstance(name, str) and name.isprintable() and _is_ordinary(t))
    ]
    return (
        [listed("A mask is a dict of ordinary tensors by printable name.", lines)] if lines else []
    )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of layout {value.layout} on {value.device}"
    return f"of type {type(value).__name__}"


def _is_ordinary(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta


def _check_choices(trains: Trains, layout: Layout) -> None:
    problems = [
        f"{name}={value!r} is not accepted; choose {' or '.join(map(repr, get_args(choices)))}."
        for name, value, choices in (("trains", trains, Trains), ("layout", layout, Layout))
        if value not in get_args(choices)
    ]
    if problems:
        raise UsageError(problems)


def _values(tensor: Tensor) -> Tensor:
    """The values as they are stored: a bool of a file may hold a byte that is neither 0 nor 1."""
    tensor = tensor.detach().cpu()
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def _arranged(
    tensors: Mapping[str, Tensor], model: nn.Module | None, layout: Layout
) -> dict[str, Tensor]:
    """The tensors with the weights transposed that lie otherwise in the model; its own inverse."""
    if model is None or layout == "model":
        return dict(tensors)
    modules = model.named_modules()
    turned = {
        f"{prefix}.weight".lstrip(".") for prefix, m in modules if isinstance(m, _TURNED[layout])
    }
    return {name: t.T if name in turned and t.ndim == 2 else t for name, t in tensors.items()}


def _misfits(
    tensors: Mapping[str, Tensor], model: nn.Module | None, layout: Layout
) -> Iterator[str]:
    """How the names and shapes differ from the model's, and whether another layout fits better."""
    if model is None or not (text := mismatch(_space_of(_arranged(tensors, model, layout)), model)):
        return
    differences = {
        each: _space_of(_arranged(tensors, model, each)).differences(model)
        for each in get_args(Layout)
    }
    best = min(differences, key=lambda each: len(differences[each]))
    left = len(differences[best])
    if not left:
        head = f"Weights lie otherwise than in the model; pass layout={best!r}, with which all fit."
        yield listed(head, differences[layout])
    elif left < len(differences[layout]):
        yield f"{text}\nSome lie otherwise than in the model; with layout={best!r}, {left} differ."
    else:
        yield text


def _strange_values(values: Mapping[str, Tensor]) -> Iterator[str]:
    strange = {name: t[(t != 0) & (t != 1)] for name, t in values.items()}
    lines = [
        f"{name} holds {t.numel():,} others, as {t[0].item()}."
        for name, t in strange.items()
        if t.numel()
    ]
    if lines:
        yield listed("A mask holds 0 and 1 (or False and True) only, and no scores.", lines)


def _meant(names: Iterable[str], expressions: Iterable[str]) -> dict[str, set[str]]:
    """By expression the names that it means: the one that it is, or those in which it is found."""
    held, expressions = set(names), list(expressions)
    found = {expression: {expression} & held for expression in expressions}
    for pattern in compiled([e for e in expressions if e not in held], "dense"):
        found[pattern.pattern] = set(filter(pattern.search, held))
    return found


def _dense_problems(
    chosen: Mapping[str, Tensor], heads: Mapping[str, Collection[str]]
) -> Iterator[str]:
    for pattern, names in heads.items():
        if not names:
            yield f"dense pattern {pattern!r} matches no tensor. Names look like {[*chosen][:3]}."
        for name in (name for name in chosen if name in names and not chosen[name].all()):
            yield (
                f"dense pattern {pattern!r} matches {name!r}, which is not trained whole: "
                f"{int(chosen[name].sum()):,} of {chosen[name].numel():,} entries are."
            )


def _space_of(tensors: Mapping[str, Tensor]) -> ParameterSpace:
    return ParameterSpace(tuple(tensors), tuple(tuple(t.shape) for t in tensors.values()))
