"""Rules: from a module's inputs and output gradients to the gradients of its parameters.

A *tap* is a zero added to a module's output. Its gradient is the output gradient g[b, …] of every
sample at once; with the module's input a[b, …] it determines the per-sample gradient of each of the
module's own parameters. A rule writes down how, for one kind of module.

`register_rule` adds a rule for a module of your own. A module with parameters but no children, one
tensor in and one tensor out, needs none: the general rule takes its vector-Jacobian product with
`torch.func.vmap`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from transformers.pytorch_utils import Conv1D

from ird_search.fisher.gradients import Dense, Lookup, Outer, SampleGradients

Rule = Callable[[Any, Tensor, Tensor], dict[str, SampleGradients]]
"""(module, inputs [B, …], output gradients [B, …]) → gradients by the parameter's own name."""

_RULES: dict[type[nn.Module], Rule] = {}


def register_rule(kind: type[nn.Module], rule: Rule) -> None:
    """Use `rule` for modules whose type is exactly `kind`.

    Example:
        >>> class Scale(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.ones(3))
        ...     def forward(self, x):
        ...         return x * self.weight
        >>> register_rule(Scale, lambda m, a, g: {"weight": Dense((a * g).flatten(1, -2).sum(1))})
        >>> rule_for(Scale()) is None
        False
    """
    _RULES[kind] = rule


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of a module, or None where only its children have one."""
    if rule := _RULES.get(type(module)):
        return rule
    has_children = next(module.children(), None) is not None
    return None if has_children else general


def linear(module: Any, a: Tensor, g: Tensor) -> dict[str, SampleGradients]:
    """y = a Wᵀ + b: G_W[b] = Σ_t g_t ⊗ a_t, G_b[b] = Σ_t g_t."""
    a, g = _tokens(a), _tokens(g)
    return {"weight": Outer(g, a), "bias": Dense(g.sum(1, dtype=torch.float32))}


def conv1d(module: Any, a: Tensor, g: Tensor) -> dict[str, SampleGradients]:
    """GPT-2's linear layer, whose weight lies transposed: y = a W + b."""
    a, g = _tokens(a), _tokens(g)
    return {"weight": Outer(a, g), "bias": Dense(g.sum(1, dtype=torch.float32))}


def embedding(module: Any, a: Tensor, g: Tensor) -> dict[str, SampleGradients]:
    """y_t = W[ids_t]: row ids_t of G receives g_t; the padding row receives nothing."""
    if module.scale_grad_by_freq:
        return general(module, a, g)
    padding = module.padding_idx
    ids = a.flatten(1) if padding is None else a.flatten(1).masked_fill(a.flatten(1) == padding, -1)
    return {"weight": Lookup(ids, g.flatten(1, -2), module.num_embeddings)}


def layer_norm(module: Any, a: Tensor, g: Tensor) -> dict[str, SampleGradients]:
    """y = x̂ ⊙ w + b with x̂ the standardised input: G_w[b] = Σ_t g_t ⊙ x̂_t, G_b[b] = Σ_t g_t."""
    standard = F.layer_norm(a.float(), module.normalized_shape, None, None, module.eps)
    dims = len(module.normalized_shape)
    return {
        "weight": Dense(_sum_tokens(g.float() * standard, dims)),
        "bias": Dense(_sum_tokens(g.float(), dims)),
    }


def conv2d(module: Any, a: Tensor, g: Tensor) -> dict[str, SampleGradients]:
    """A convolution is a linear layer over patches: a unfolded to [B, places, c·kh·kw]."""
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return general(module, a, g)
    patches = F.unfold(
        a.float(), module.kernel_size, module.dilation, module.padding, module.stride
    )
    g = g.flatten(2)
    return {"weight": Outer(g.mT, patches.mT), "bias": Dense(g.sum(2, dtype=torch.float32))}


def general(module: Any, a: Tensor, g: Tensor) -> dict[str, SampleGradients]:
    """Any module without children: vmap of its own vector-Jacobian product over the samples."""
    weights = {name: p.detach() for name, p in module.named_parameters()}

    def pull(one: Tensor, out: Tensor) -> dict[str, Tensor]:
        _, back, *_ = vjp(lambda w: functional_call(module, w, (one[None],)), weights)
        return back(out[None])[0]

    gradients = vmap(pull, randomness="different")(a, g)
    return {name: Dense(grad.flatten(1).float()) for name, grad in gradients.items()}


def _tokens(x: Tensor) -> Tensor:
    """[B, …, d] → [B, T, d]; a vector per sample counts as one token."""
    return x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2)


def _sum_tokens(x: Tensor, dims: int) -> Tensor:
    """Sum [B, …, *normalized] over the axes between: [B, prod(normalized)]."""
    flat = x.flatten(-dims)
    return flat if flat.ndim == 2 else flat.flatten(1, -2).sum(1)


for _kind, _rule in {
    nn.Linear: linear,
    nn.modules.linear.NonDynamicallyQuantizableLinear: linear,
    Conv1D: conv1d,
    nn.Embedding: embedding,
    nn.LayerNorm: layer_norm,
    nn.Conv2d: conv2d,
}.items():
    register_rule(_kind, _rule)
