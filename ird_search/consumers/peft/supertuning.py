"""A mask in SuperTuning adapters: exactly its entries of linear layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import cast

import torch
from peft import PeftConfig, PeftModel, SupertuningConfig, get_peft_model
from peft.tuners.supertuning import SupertuningLayer
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from torch import Tensor, nn

from ird_search.consumers.peft.coverage import Coverage
from ird_search.consumers.peft.layers import Layer, check_bare, exactly, make_plan
from ird_search.errors import ArtifactError, UsageError, first_line
from ird_search.mask import SparseMask

_NAME = "ird_mask"
"""Several adapters are called so, and numbered; a directory may hold others, as of checkpoints."""

_MARGIN = 2**-10
"""Added to a count, so that PEFT's formula for it rounds down to it in floating point, too."""


def to_supertuning(
    model: nn.Module, mask: SparseMask, *, dense: Iterable[str] = (), adapters: int | None = 1
) -> tuple[PeftModel, Coverage]:
    """Wrap a model in SuperTuning adapters that train the mask's entries of linear layers.

    A SuperTuning adapter stores for each layer a vector of flat indices and one of values:

        W′ = W;   W′[index_i] += value_i,   i < ⌊numel · (1 − sparsity)⌋

    with one sparsity for all its layers. A mask has another density in each layer, so the adapter
    takes the largest, and the other layers repeat indices of their own. The value of a repeat
    stays 0, because its gradient is set to 0. `PeftModel.from_pretrained` reloads such an adapter.
    To train it further, load it with `load_supertuning`: without it a repeated entry takes a step
    with each of its values (nothing outside the mask can move in any case).

    Several adapters, each for layers of similar density, leave fewer repeats: for a mask of 0.5%
    on a MiniLM one adapter stores 24 numbers an entry, two store 2.5, and four 1.4. They are saved
    in directories of their own, and only `load_supertuning` brings them back together.

    Args:
        model: the bare model; its layers are replaced in place and its parameters frozen.
        mask: made on this model.
        dense: names of parameters that are trained whole (the head); PEFT's `modules_to_save`.
        adapters: at most so many; None for as many as it takes to have no repeat.

    Raises:
        ModelError: the mask is of another model, or the model holds adapters already.
        UsageError: `adapters` below 1, no selected entry can be held, an unknown dense name, or
            dense tensors that PEFT cannot save on their own.

    Example:
        >>> from ird_search.parameters import ParameterSpace
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
        >>> mask = SparseMask(ParameterSpace.of(model), torch.tensor([0, 4, 7, 9]))
        >>> wrapped, coverage = to_supertuning(model, mask)
        >>> print(coverage.describe())
        SuperTuning: 3 of 4 selected entries held, 1 lost, 0 others added; 4 numbers in 1 adapter
          lost 1: bias of Linear (0.bias)
    """
    if adapters is not None and adapters < 1:
        raise UsageError(f"adapters is {adapters}; it must be at least 1, or None for no repeat.")
    plan = make_plan(model, mask, dense, method="SuperTuning")
    layers = sorted(plan.layers, key=lambda layer: layer.density)
    parts = _parts(_repeats(layers), len(layers) if adapters is None else adapters)
    wrapped = _wrapped(model, [layers[part] for part in parts], plan.modules)
    stored = 0
    for layer in layers:
        adapted = cast(SupertuningLayer, model.get_submodule(layer.name))
        (indices,) = adapted.supertuning_indices.values()
        indices.copy_(layer.index[torch.arange(indices.numel()) % layer.count])
        stored += indices.numel()
    _hold_repeats(wrapped)
    held = [layer.covered() for layer in plan.layers]
    return wrapped, plan.coverage(held, stored, len(parts))


def load_supertuning(
    model: nn.Module, directory: str | PathLike[str], *, is_trainable: bool = False
) -> PeftModel:
    """Load what `save_pretrained` wrote of a model from `to_supertuning`, one adapter or several.

    Args:
        model: the bare model, as it was before it was wrapped.
        directory: where the adapters are; nothing is fetched from a hub.
        is_trainable: whether training is to go on, in which case repeats are held.

    Raises:
        ArtifactError: the directory holds no adapter, one of another method, or a damaged one. The
            model is as it was.
        ModelError: the model holds adapters already.

    Example:
        >>> load_supertuning(nn.Linear(2, 2), "no/such/place")
        Traceback (most recent call last):
        ...
        ird_search.errors.ArtifactError: no/such/place holds no adapter: there is no ...
    """
    check_bare(model)
    directory = Path(directory)
    files = [directory / CONFIG_NAME]
    if not files[0].is_file():
        files = sorted(directory.glob(f"{_NAME}*/{CONFIG_NAME}"))
    if not files:
        raise ArtifactError(
            f"{directory} holds no adapter: there is no {CONFIG_NAME} in it, nor in a directory "
            "below it. Pass the directory that save_pretrained wrote to."
        )
    places = {file.parent.name if len(files) > 1 else "default": file.parent for file in files}
    if problems := [text for place in places.values() if (text := _damage(place))]:
        raise ArtifactError(problems)
    (first, place), *others = places.items()
    wrapped = PeftModel.from_pretrained(model, place, first, is_trainable=is_trainable)
    for name, place in others:
        wrapped.load_adapter(place, name, is_trainable=is_trainable)
    _activate(wrapped, list(places), is_trainable)
    _hold_repeats(wrapped)
    return wrapped


def _damage(place: Path) -> str:
    """Why a directory holds no SuperTuning adapter; empty when it does."""
    try:
        config = PeftConfig.from_pretrained(str(place))
        if not isinstance(config, SupertuningConfig):
            return (
                f"{place} holds an adapter with a {type(config).__name__}; a SupertuningConfig is "
                "accepted. Load others with PeftModel.from_pretrained."
            )
        if not any((place / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
            return f"{place} holds no weights: there is no {SAFETENSORS_WEIGHTS_NAME} in it."
        load_peft_weights(str(place), device="cpu")
    except Exception as error:  # damaged JSON, safetensors and pickles can end in any exception
        told = type(error).__name__
        if not isinstance(error, UnpicklingError):  # torch would tell how to run the pickle
            told += f": {first_line(error)}"
        return f"{place} holds a damaged adapter ({told}). Copy or save it anew."
    return ""


def _sparsity(densest: Layer) -> float:
    """The sparsity at which PEFT gives a layer room for its selected entries, and no more."""
    return max(0.0, 1 - (densest.count + _MARGIN) / densest.numel)


def _repeats(layers: Sequence[Layer]) -> Tensor:
    """What one adapter for layers[i:j] repeats, at [i, j]; layers by increasing density."""
    n = len(layers)
    counts = torch.tensor([layer.count for layer in layers])
    numels = torch.tensor([layer.numel for layer in layers], dtype=torch.float64)
    repeats = torch.full((n + 1, n + 1), torch.iinfo(torch.int64).max // 2)
    for j in range(1, n + 1):
        room = (numels[:j] * (1 - _sparsity(layers[j - 1]))).long()  # PEFT's own formula
        repeats[:j, j] = (room - counts[:j]).flip(0).cumsum(0).flip(0)
    return repeats


def _parts(costs: Tensor, limit: int) -> list[slice]:
    """The cut of 0 … n into at most `limit` parts of least cost; the fewest parts of that cost.

    Args:
        costs: of a part i … j, at [i, j].

    Example:
        >>> costs = torch.tensor([[9, 0, 1, 7], [9, 9, 0, 2], [9, 9, 9, 0], [9, 9, 9, 9]])
        >>> _parts(costs, 2), _parts(costs, 9)
        ([slice(0, 2, None), slice(2, 3, None)], [slice(0, 1, None), slice(1, 2, None), ...])
    """
    best, cuts = costs[0], list[Tensor]()
    while best[-1] > 0 and len(cuts) + 1 < limit:
        best, cut = (best[:, None] + costs).min(0)
        cuts.append(cut)
    parts, stop = list[slice](), len(costs) - 1
    for cut in reversed(cuts):
        parts.append(slice(int(cut[stop]), stop))
        stop = parts[-1].start
    return [slice(0, stop), *reversed(parts)]


def _wrapped(
    model: nn.Module, groups: Sequence[Sequence[Layer]], modules: Sequence[str]
) -> PeftModel:
    """The model with one adapter a group, all of them active; the first has the modules."""
    # PEFT tells adapters apart by these names within those of tensors: no module is called so.
    names = [f"{_NAME}{i + 1}" for i in range(len(groups))] if len(groups) > 1 else ["default"]
    first, *others = (
        SupertuningConfig(
            target_modules=exactly(layer.name for layer in group),
            sparsity=_sparsity(group[-1]),
            modules_to_save=list(modules) if modules and group is groups[0] else None,
        )
        for group in groups
    )
    wrapped = get_peft_model(model, first, adapter_name=names[0])
    for name, config in zip(names[1:], others, strict=True):
        wrapped.add_adapter(name, config)
    _activate(wrapped, names, True)
    return wrapped


def _activate(wrapped: PeftModel, names: list[str], is_trainable: bool) -> None:
    """Let several adapters work together: `PeftModel.set_adapter` itself takes only one."""
    tuner = cast(BaseTuner, wrapped.base_model)
    tuner.set_adapter(names, inference_mode=not is_trainable)


def _hold_repeats(wrapped: PeftModel) -> None:
    """Let no repeat move: its gradient is 0, and so are its value and an optimizer's state."""
    for layer in wrapped.modules():
        if isinstance(layer, SupertuningLayer):
            for name, values in layer.supertuning_values.items():
                distinct = layer.supertuning_indices[name].unique().numel()
                if values.requires_grad and distinct < values.numel():
                    values.register_hook(partial(_only_first, count=distinct))


def _only_first(gradient: Tensor, count: int) -> Tensor:
    return torch.cat([gradient[:count], torch.zeros_like(gradient[count:])])
