"""LoRA's ranks from a mask: more rank where more entries were selected."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ird_search.consumers.peft.coverage import Coverage
from ird_search.consumers.peft.layers import Layer, Plan, exactly, make_plan, scores_by_tensor
from ird_search.errors import UsageError
from ird_search.mask import SparseMask


def rank_pattern(
    model: nn.Module,
    mask: SparseMask,
    *,
    budget: int,
    scores: Tensor | None = None,
    dense: Iterable[str] = (),
) -> tuple[dict[str, Any], Coverage]:
    """Arguments for a `LoraConfig` that gives each layer the rank that a mask suggests.

    LoRA of rank r has r·(m + n) parameters in an m × n layer. They are shared out in proportion to
    s_l, the number of selected entries in layer l, or the sum of their scores:

        r_l ≈ budget · s_l/Σs / (m_l + n_l),   r_l ≤ min(m_l, n_l),   Σ r_l·(m_l + n_l) ≤ budget

    Fractions are rounded down, and then the largest ones up for as long as the budget lasts. A
    layer of rank 0 is not adapted. α_l = r_l, so that LoRA's scale α/r is 1 in every layer.

    In the coverage, the selected entries of an adapted layer are held, and all its other entries
    are added: LoRA moves the whole of W.

    Args:
        model: the bare model; it is not changed.
        mask: made on this model.
        budget: how many parameters LoRA may have.
        scores: of the parameters of the mask's space, [P], not negative.
        dense: names of parameters that are trained whole (the head); PEFT's `modules_to_save`.

    Raises:
        ModelError: the mask is of another model, or the model holds adapters already.
        UsageError: a budget too small for any rank, unfit scores, no selected entry can be held,
            an unknown dense name, or dense tensors that PEFT cannot save on their own.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from ird_search.parameters import ParameterSpace
        >>> model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
        >>> mask = SparseMask(ParameterSpace.of(model), torch.arange(4, 20))
        >>> arguments, coverage = rank_pattern(model, mask, budget=32)
        >>> arguments["rank_pattern"], coverage.stored
        ({'^0': 3, '^1': 1}, 32)
        >>> get_peft_model(model, LoraConfig(**arguments)).get_nb_trainable_parameters()
        (32, 64)
    """
    plan = make_plan(model, mask, dense, method="LoRA", kinds=(nn.Linear, Conv1D))
    ranks = _ranks(_shares(plan, mask, scores), plan.layers, budget)
    small = [layer for layer, rank in zip(plan.layers, ranks, strict=True) if not rank]
    plan = plan.without(small, f"too small a share of {budget:,} parameters for a rank")
    adapted = dict(zip(plan.layers, filter(None, ranks), strict=True))
    # PEFT takes the keys for regular expressions, and for the ends of names unless they begin so.
    pattern = {f"^{re.escape(layer.name)}": rank for layer, rank in adapted.items()}
    arguments = {
        "target_modules": exactly(layer.name for layer in adapted),
        "r": max(pattern.values()),
        "lora_alpha": max(pattern.values()),
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "fan_in_fan_out": isinstance(model.get_submodule(plan.layers[0].name), Conv1D),
        "modules_to_save": list(plan.modules) or None,
    }
    stored = sum(rank * layer.sides for layer, rank in adapted.items())
    held = [layer.covered(added=layer.numel - layer.count) for layer in adapted]
    return arguments, plan.coverage(held, stored)


def _shares(plan: Plan, mask: SparseMask, scores: Tensor | None) -> list[Fraction]:
    """s_l, exactly."""
    if scores is None:
        return [Fraction(layer.count) for layer in plan.layers]
    by_tensor = scores_by_tensor(mask, scores)
    sums = [by_tensor[x.parameter][x.index].double() for x in plan.layers]
    if any(bool((s < 0).any() or s.isinf().any()) for s in sums) or not any(s.any() for s in sums):
        raise UsageError("scores must be finite, at least 0, and not 0 in all adapted layers.")
    return [Fraction(s.sum().item()) for s in sums]


def _ranks(shares: Sequence[Fraction], layers: Sequence[Layer], budget: int) -> list[int]:
    """Whole ranks within the budget, each its quota rounded down or up."""
    quotas = _quotas(shares, layers, budget)
    ranks = [int(quota) for quota in quotas]
    left = budget - sum(rank * layer.sides for rank, layer in zip(ranks, layers, strict=True))
    for i in sorted(range(len(layers)), key=lambda i: ranks[i] - quotas[i]):
        if ranks[i] < quotas[i] and layers[i].sides <= left:
            ranks[i] += 1
            left -= layers[i].sides
    return ranks


def _quotas(shares: Sequence[Fraction], layers: Sequence[Layer], budget: int) -> list[Fraction]:
    """budget · s_l/Σs / (m_l + n_l); what exceeds min(m_l, n_l) goes to the other layers."""
    largest = [min(layer.weight.shape) for layer in layers]
    full = set[int]()
    while True:
        left = budget - sum(largest[i] * layers[i].sides for i in full)
        total = sum(share for i, share in enumerate(shares) if i not in full)
        quotas = [
            Fraction(largest[i]) if i in full else left * share / layers[i].sides / (total or 1)
            for i, share in enumerate(shares)
        ]
        if all(quota <= most for quota, most in zip(quotas, largest, strict=True)):
            return quotas
        full |= {i for i, quota in enumerate(quotas) if quota > largest[i]}
