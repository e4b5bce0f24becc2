"""Rules: from a module's inputs and output gradients to the gradients of its parameters.

A *tap* is a zero added to a module's output. Its gradient is the output gradient g[b, …] of every
sample at once; with the module's input a[b, …] it determines the per-sample gradient of each of the
module's own parameters. A rule writes down how, for one kind of module.

`register_rule` adds a rule for a module of your own. A module with parameters but no children, one
tensor in and tensors out, needs none: the general rule takes its vector-Jacobian product with
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

from ird_search.fisher.gradients import Dense, Lookup, Outer, Routed, SampleGradients

Rule = Callable[[Any, Any, Any], dict[str, SampleGradients]]
"""(module, inputs [B, …], output gradients [B, …]) → gradients by the parameter's own name.

A tuple of tensors where the module is called with several, or answers with several.
"""

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
    if _is_fused_experts(module):
        return experts
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


def experts(module: Any, a: tuple[Tensor, Tensor, Tensor], g: Tensor) -> dict[str, SampleGradients]:
    """transformers' fused experts: y = Σ_k p_k D_e z(U_e x), e = ids_k, both matrices [E, …, …].

    Of a token's k-th expert: D_e gets p_k g ⊗ z, and U_e gets the gradient of z's input ⊗ x.

    Args:
        a: tokens [B, T, d], their experts' ids [B, T, K] and these experts' shares [B, T, K].
    """
    size = g.shape[0]
    x, ids, shares = (v.reshape(-1, v.shape[-1]) for v in a)
    x, slots = x.repeat_interleave(ids.shape[1], 0), ids.flatten()  # one line a token and expert
    down = g.reshape(-1, g.shape[-1]).repeat_interleave(ids.shape[1], 0) * shares.reshape(-1, 1)
    inner = x.new_zeros(len(x), module.down_proj.shape[2])
    up = x.new_zeros(len(x), module.gate_up_proj.shape[1])
    for e in slots.unique().tolist():
        if e < len(module.down_proj):  # one more stands for "no expert"
            at = slots == e
            hidden = x[at] @ module.gate_up_proj[e].mT
            inner[at], back, *_ = vjp(module._apply_gate, hidden)
            up[at] = back((down[at] @ module.down_proj[e]).to(hidden.dtype))[0]
    count = len(module.down_proj)
    slots = slots.masked_fill(slots >= count, -1).unflatten(0, (size, -1))
    factors = [v.unflatten(0, (size, -1)) for v in (up, x, down, inner)]
    return {
        "gate_up_proj": Routed(slots, factors[0], factors[1], count),
        "down_proj": Routed(slots, factors[2], factors[3], count),
    }


def _is_fused_experts(module: Any) -> bool:
    """The layout that `experts` is written for; transformers has others."""
    others = ("has_bias", "is_transposed", "has_post_expert_norm")
    return (
        {name for name, _ in module.named_parameters()} == {"gate_up_proj", "down_proj"}
        and getattr(module, "has_gate", False)
        and hasattr(module, "_apply_gate")
        and not any(getattr(module, name, False) for name in others)
    )


def general(module: Any, a: Tensor, g: Any) -> dict[str, SampleGradients]:
    """Any module without children: vmap of its own vector-Jacobian product over the samples."""
    weights = {name: p.detach() for name, p in module.named_parameters()}

    def pull(one: Tensor, outs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        def called(w: dict[str, Tensor]) -> tuple[Tensor, ...]:
            answer = functional_call(module, w, (one[None],))
            answers = answer if isinstance(answer, tuple) else (answer,)
            return tuple(y for y in answers if y.is_floating_point())

        values, back, *_ = vjp(called, weights)
        return back(tuple(out.reshape(y.shape) for out, y in zip(outs, values, strict=True)))[0]

    outs = g if isinstance(g, tuple) else (g,)
    gradients = vmap(pull, randomness="different")(a, outs)
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
