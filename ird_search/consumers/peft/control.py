"""LoRA as a control: as many parameters as a mask has, put into a model and taken out again.

W + B A      A [r, n] random, B [m, r] zero; r (m + n) parameters in an m × n layer
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ird_search.borrow import random_state_kept
from ird_search.consumers.peft.layers import Layer, check_bare, exactly, make_plan
from ird_search.errors import ModelError, UsageError
from ird_search.mask import SparseMask
from ird_search.parameters import ParameterSpace

_QUERIES_AND_VALUES = re.compile(
    r"(.*\.)?(q|v|query|value|w?qkv|query_key_value|c_attn)(_proj|_lin)?", re.IGNORECASE
)
"""Names of the attention's layers that LoRA adapts in its paper, or of one that holds them."""

_NAME = "ird_control"


@dataclass(frozen=True)
class Lora:
    """LoRA of one rank on some layers; α = r, so B A is added as it is.

    Args:
        rank: r.
        modules: names of the layers.
        count: Σ r (m + n).
    """

    rank: int
    modules: tuple[str, ...]
    count: int

    @property
    def about(self) -> dict[str, Any]:
        """Plain data."""
        return {"lora": asdict(self)}

    @contextmanager
    def within(self, model: nn.Module, *, seed: int) -> Iterator[SparseMask]:
        """Within the block the layers are adapted; gives the mask of all of A and B.

        Afterwards the model is what it was: the same modules, parameters and flags.

        Args:
            seed: A is drawn from it.
        """
        before = [(name, model.get_submodule(name)) for name in self.modules]
        flags = [(p, p.requires_grad) for p in model.parameters()]
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.rank,
            target_modules=exactly(self.modules),
            fan_in_fan_out=isinstance(before[0][1], Conv1D),
        )
        try:
            with random_state_kept(), warnings.catch_warnings():
                # Of names that PEFT still asks transformers for, and where both kinds are adapted.
                warnings.simplefilter("ignore", FutureWarning)
                warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
                torch.manual_seed(seed)
                inject_adapter_in_model(config, model, adapter_name=_NAME)
            added = [n for n, _ in model.named_parameters() if f".{_NAME}." in n]
            space = ParameterSpace.of(model, added)
            yield SparseMask(space, torch.arange(space.numel))
        finally:
            for name, module in before:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, module)
            for p, flag in flags:
                p.requires_grad_(flag)
            if hasattr(model, "peft_config"):
                del model.peft_config


def lora_of_size(model: nn.Module, space: ParameterSpace, count: int) -> Lora:
    """The LoRA with as many parameters as can be, and at most `count`.

    One rank for all query and value layers, or one for all linear layers, whichever comes nearer.
    Where rank 1 is too much for either, it is given to single layers, the last ones first.

    Args:
        space: the candidate parameters; only linear layers with a weight among them are adapted.

    Raises:
        UsageError: why there is none, in half a sentence.
    """
    layers = _layers(model, space)
    usual = [layer for layer in layers if _QUERIES_AND_VALUES.fullmatch(layer.name)]
    sets = [s for s in (usual, layers) if s]
    uniform = [_of_one_rank(s, count) for s in sets]
    if not any(lora.rank for lora in uniform):
        uniform = [_of_the_last(s, count) for s in sets]
    best = max(uniform, key=lambda lora: lora.count)
    if not best.modules:
        smallest = min(layer.sides for layer in layers)
        raise UsageError(f"rank 1 of one layer is {smallest:,} parameters, the mask {count:,}")
    return best


def _layers(model: nn.Module, space: ParameterSpace) -> tuple[Layer, ...]:
    """The layers with a candidate weight that PEFT can adapt, in the model's order."""
    try:
        check_bare(model)
    except ModelError:
        raise UsageError("the model holds adapters already") from None
    if not isinstance(model, PreTrainedModel):
        raise UsageError("the model is none of transformers")
    begins = [a for a, b in pairwise(space.offsets) if a < b]  # one entry of each tensor will do
    touched = SparseMask(space, torch.tensor(begins, dtype=torch.int64))
    try:
        return make_plan(model, touched, (), method="LoRA", kinds=(nn.Linear, Conv1D)).layers
    except UsageError:
        raise UsageError("no candidate is the weight of a linear layer") from None


def _of_one_rank(layers: Sequence[Layer], count: int) -> Lora:
    """The largest rank for all of the layers; a rank of 0 where none fits."""
    sides = sum(layer.sides for layer in layers)
    rank = min(count // sides, *(min(layer.weight.shape) for layer in layers))
    return Lora(rank, tuple(layer.name for layer in layers), rank * sides)


def _of_the_last(layers: Sequence[Layer], count: int) -> Lora:
    """Rank 1 of single layers, from the last one back, each that still fits."""
    names, left = list[str](), count
    for layer in reversed(layers):
        if layer.sides <= left:
            names.append(layer.name)
            left -= layer.sides
    return Lora(1, tuple(reversed(names)), count - left)
