"""What of a mask PEFT can adapt, and how PEFT is told so.

PEFT swaps a layer for a wrapper that is called in its place. So it reaches weights of layers that
the model calls; a weight that the model reads elsewhere, too, must be left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ird_search.consumers.peft.coverage import Coverage, TensorCoverage, losses
from ird_search.entries import trained_entries
from ird_search.errors import ModelError, UsageError
from ird_search.mask import SparseMask
from ird_search.parameters import require_module

_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that may read the weights of their layers without calling them."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer whose weight W: [m, n] has selected entries.

    Args:
        name: the module's name.
        weight: W.
        index: flat indices of the selected entries, increasing, int64 [k].
    """

    name: str
    weight: nn.Parameter
    index: Tensor

    @property
    def parameter(self) -> str:
        """The weight's name."""
        return f"{self.name}.weight"

    @property
    def count(self) -> int:
        """k, the number of selected entries."""
        return self.index.numel()

    @property
    def numel(self) -> int:
        """m·n."""
        return self.weight.numel()

    @property
    def sides(self) -> int:
        """m + n: what one rank of LoRA has in parameters."""
        return sum(self.weight.shape)

    @property
    def density(self) -> float:
        """k/(m·n)."""
        return self.count / self.numel

    def covered(self, held: int | None = None, added: int = 0, reason: str = "") -> TensorCoverage:
        """The account of this layer; everything is held by default."""
        held = self.count if held is None else held
        return TensorCoverage(self.parameter, self.count, held, added, reason)


@dataclass(frozen=True, eq=False)
class Plan:
    """What a method is to adapt.

    Args:
        method: the method's name.
        layers: the layers that it adapts.
        lost: the tensors with selected entries that it cannot hold.
        modules: the modules to be saved whole.

    Raises:
        UsageError: there is no layer to adapt.
    """

    method: str
    layers: tuple[Layer, ...]
    lost: tuple[TensorCoverage, ...]
    modules: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            none = f"{self.method} can hold none of the selected entries, so there is no adapter:"
            raise UsageError("\n".join([none, *(losses(self.lost) or ["  the mask is empty"])]))

    def without(self, layers: Sequence[Layer], reason: str) -> Plan:
        """The same without some of its layers."""
        lost = (layer.covered(0, reason=reason) for layer in layers)
        kept = tuple(layer for layer in self.layers if layer not in layers)
        return Plan(self.method, kept, (*self.lost, *lost), self.modules)

    def coverage(self, held: Iterable[TensorCoverage], stored: int, adapters: int = 1) -> Coverage:
        """The account, once it is known what the layers hold."""
        return Coverage(self.method, (*held, *self.lost), stored, adapters, self.modules)


def make_plan(
    model: nn.Module,
    mask: SparseMask,
    dense: Iterable[str],
    *,
    method: str,
    kinds: tuple[type[nn.Module], ...] = (nn.Linear,),
) -> Plan:
    """Which layers of `kinds` hold selected entries, and which entries no layer can hold.

    Raises:
        ModelError: the mask is of another model, or the model holds adapters already.
        UsageError: nothing can be held, or PEFT cannot save the dense tensors alone.
    """
    check_bare(model)
    _, whole = trained_entries(model, mask, dense, allow_none=True)
    uses = _uses(model)
    layers, lost = [], []
    for name, index in mask.indices.items():
        if reason := _obstacle(model, name, uses[name], kinds):
            lost.append(TensorCoverage(name, index.numel(), reason=reason))
        else:
            layers.append(Layer(name.removesuffix(".weight"), model.get_parameter(name), index))
    modules = _modules(model, [e.name for e in whole], uses, [layer.name for layer in layers])
    return Plan(method, tuple(layers), tuple(lost), modules)


def check_bare(model: nn.Module) -> None:
    """Refuse a model that holds adapters, and what is no model.

    Raises:
        ModelError: it holds adapters.
        UsageError: it is no module.
    """
    require_module(model)
    if isinstance(model, PeftModel) or any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise ModelError(
            "This model holds PEFT adapters already. Give it as it was before it was wrapped "
            "(`unload()` takes adapters off, `merge_and_unload()` keeps their effect), with a "
            "mask that was made on it."
        )


def exactly(names: Iterable[str]) -> str:
    r"""`target_modules` that means these modules: a list would also match the ends of names.

    Example:
        >>> exactly(["up", "layers.0.down"])
        'up|layers\\.0\\.down'
    """
    return "|".join(re.escape(name) for name in names)


def scores_by_tensor(mask: SparseMask, scores: Tensor | None) -> Mapping[str, Tensor]:
    """Flat scores by parameter name; empty when there are none.

    Raises:
        UsageError: there is not one score a parameter of the space, or one is NaN.
    """
    if scores is None:
        return {}
    if tuple(scores.shape) != (mask.space.numel,) or bool(scores.isnan().any()):
        raise UsageError(
            f"scores are {list(scores.shape)}; the mask's {mask.space} needs one number for each "
            f"parameter, [{mask.space.numel}], and none may be NaN. From scores by name, take "
            "`mask.space.flatten(by_name)`."
        )
    return {name: scores[mask.space.span(name)].detach().cpu() for name in mask.indices}


def _uses(model: nn.Module) -> dict[str, list[str]]:
    """By its first name, all names of each parameter."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return {same[0]: same for same in names.values()}


def _obstacle(
    model: nn.Module, name: str, uses: list[str], kinds: tuple[type[nn.Module], ...]
) -> str:
    """Why an adapter cannot hold entries of a parameter; empty when it can."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf != "weight" or not isinstance(module, kinds):
        return f"{leaf} of {type(module).__name__}"
    if len(uses) > 1:
        return "a tied weight, which an adapter would untie"
    if type(module).forward not in [kind.forward for kind in kinds]:
        return f"weight of {type(module).__name__}, whose forward is its own"
    if not owner:
        return "the model is this one layer, and PEFT adapts layers within a model"
    if isinstance(parent := model.get_submodule(owner.rpartition(".")[0]), _READERS):
        return f"read by {type(parent).__name__} without a call of the layer"
    if not model.get_parameter(name).is_contiguous():
        return "a weight that is not contiguous, into which PEFT cannot merge"
    return ""


def _modules(
    model: nn.Module, dense: Sequence[str], uses: Mapping[str, list[str]], layers: Sequence[str]
) -> tuple[str, ...]:
    """The modules that hold the dense tensors, and nothing else.

    PEFT saves whole modules, and matches their names at the end of other names.
    """
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in dense))
    owners = [o for o in owners if not any(o.startswith(f"{other}.") for other in owners)]
    problems = [
        f"{name!r} is dense and tied to {uses[name][1]!r}; PEFT would save an untied copy."
        for name in dense
        if len(uses[name]) > 1
    ]
    for owner in owners:
        held = [n for n in uses if n.startswith(f"{owner}." if owner else "")]
        if more := [name for name in held if name not in dense]:
            problems.append(
                f"PEFT saves whole modules, and {owner or 'the model'!r} also holds {more[:3]}; "
                "name these in `dense`, too, or leave the module out."
            )
    if problems:
        raise UsageError(problems)
    reached = {
        name: owner
        for owner in owners
        for name, _ in model.named_modules(remove_duplicate=False)
        if name not in owners
        and (
            name.endswith(owner) or (name in layers and re.match(rf"(^|.*\.){owner}($|\..*)", name))
        )
    }
    if reached:
        raise UsageError(
            f"PEFT finds the modules to save by the end of their names: {owner!r} would reach "
            f"{name!r}, too. Rename one of them, or leave {owner!r} out of `dense`."
            for name, owner in reached.items()
        )
    return tuple(owners)
