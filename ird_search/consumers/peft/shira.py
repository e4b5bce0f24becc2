"""A mask in a SHiRA adapter: projected to r·(m + n) entries of each layer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from peft import PeftModel, ShiraConfig, get_peft_model
from torch import Tensor, nn

from ird_search.consumers.peft.coverage import Coverage, TensorCoverage
from ird_search.consumers.peft.layers import Layer, exactly, make_plan, scores_by_tensor
from ird_search.errors import UsageError
from ird_search.mask import SparseMask
from ird_search.selection import top_k


def to_shira(
    model: nn.Module,
    mask: SparseMask,
    *,
    r: int | None = None,
    scores: Tensor | None = None,
    dense: Iterable[str] = (),
) -> tuple[PeftModel, Coverage]:
    """Wrap a model in a SHiRA adapter, which trains r·(m + n) entries of each m × n layer.

    A projection: a layer with more selected entries keeps those of the largest scores, and one
    with fewer adds the others of the largest scores. Ties go to the lower index. Layers without a
    selected entry are left alone. `PeftModel.from_pretrained` reloads the adapter. Where the
    coverage tells that too much is lost or added, `to_supertuning` holds the mask exactly.

    Args:
        model: the bare model; its layers are replaced in place and its parameters frozen.
        mask: made on this model.
        r: SHiRA's size; by default the one that comes nearest to the mask's count.
        scores: of the parameters of the mask's space, [P]; |W| by default.
        dense: names of parameters that are trained whole (the head); PEFT's `modules_to_save`.

    Raises:
        ModelError: the mask is of another model, or the model holds adapters already.
        UsageError: r below 1, unfit scores, no selected entry can be held, an unknown dense name,
            or dense tensors that PEFT cannot save on their own.

    Example:
        >>> from ird_search.parameters import ParameterSpace
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> mask = SparseMask(ParameterSpace.of(model), torch.arange(10))
        >>> wrapped, coverage = to_shira(model, mask, r=1)
        >>> print(coverage.describe())
        SHiRA: 8 of 10 selected entries held, 2 lost, 0 others added; 8 numbers in 1 adapter
          lost 2: more entries than r·(m + n), at r = 1 (0.weight)
    """
    if r is not None and r < 1:
        raise UsageError(f"r is {r}; it must be at least 1.")
    plan = make_plan(model, mask, dense, method="SHiRA")
    by_tensor = scores_by_tensor(mask, scores)
    if r is None:
        count, sides = (
            sum(n) for n in zip(*((x.count, x.sides) for x in plan.layers), strict=True)
        )
        r = max(1, round(count / sides))
    too_small = [layer for layer in plan.layers if r * layer.sides > layer.numel]
    plan = plan.without(too_small, f"fewer entries in the layer than r·(m + n), at r = {r}")
    chosen = {layer: _chosen(layer, r * layer.sides, by_tensor) for layer in plan.layers}
    wrapped = _wrapped(model, chosen, r, plan.modules)
    stored = sum(index.numel() for index in chosen.values())
    return wrapped, plan.coverage([_covered(x, i, r) for x, i in chosen.items()], stored)


def _chosen(layer: Layer, count: int, scores: Mapping[str, Tensor]) -> Tensor:
    """`count` flat indices: the best selected ones, then the best of the others; increasing."""
    score = scores.get(layer.parameter)
    if score is None:
        score = layer.weight.detach().abs().flatten().float().cpu()
    kept = layer.index[top_k(score[layer.index], min(count, layer.count))]
    others = torch.ones(layer.numel, dtype=torch.bool)
    others[layer.index] = False
    others = others.nonzero().flatten()
    added = others[top_k(score[others], count - kept.numel())]
    return torch.cat([kept, added]).sort().values


def _covered(layer: Layer, index: Tensor, r: int) -> TensorCoverage:
    """The account of a layer of which `index` was chosen."""
    held = int(torch.isin(index, layer.index).sum())
    reason = f"more entries than r·(m + n), at r = {r}" if held < layer.count else ""
    return layer.covered(held, index.numel() - held, reason)


def _wrapped(
    model: nn.Module, chosen: Mapping[Layer, Tensor], r: int, modules: Iterable[str]
) -> PeftModel:
    """The model with an adapter for the chosen entries."""
    with warnings.catch_warnings():
        # A mask type of our own: the saved config is not to call the mask random.
        warnings.filterwarnings("ignore", "Argument self.mask_type='ird_mask' is not recognized")
        config = ShiraConfig(
            r=r,
            mask_type=cast(Any, "ird_mask"),
            target_modules=exactly(layer.name for layer in chosen),
            modules_to_save=list(modules) or None,
        )
    places = {id(model.get_submodule(x.name)): (x, index) for x, index in chosen.items()}

    def mask_fn(base_layer: nn.Module, r: int, **_: Any) -> Tensor:
        layer, index = places[id(base_layer)]  # SHiRA does not tell the layer's name
        flat = torch.zeros(layer.numel, dtype=torch.bool, device=layer.weight.device)
        flat[index] = True
        return flat.view(layer.weight.shape)

    config.mask_fn = cast(Any, mask_fn)
    return get_peft_model(model, config)
