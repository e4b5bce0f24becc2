"""Rules: from a module's inputs and output gradients to the gradients of its parameters.

A *tap* is a zero added to a module's output. Its gradient is the output gradient g[b, …] of every
sample at once; with the module's input a[b, …] it determines the per-sample gradient of each of the
module's own parameters. A rule writes down how, for one kind of module.

`register_rule` adds a rule for a module of your own. Most modules need none: `again` calls them
once more, as the model did, and learns so which rows of a table were read, or takes their
vector-Jacobian product with `torch.func.vmap`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.pytorch_utils import Conv1D

from ird_search.fisher.gradients import Dense, Lookup, Outer, Routed, SampleGradients

Rule = Callable[[Any, Any, Any], dict[str, SampleGradients]]
"""(module, inputs [B, …], output gradients [B, …]) → gradients by the parameter's own name.

A tuple of tensors where the module is called with several, or answers with several.
"""

_RULES: dict[type[nn.Module], Rule] = {}

Place = int | str
"""Where a module is given something: a position, or a name."""


@dataclass(frozen=True, eq=False)
class Call:
    """What a module was called with.

    Args:
        given: by place.
        moving: places of the tensors that have samples first, with one line each or several.
    """

    given: Mapping[Place, Any]
    moving: frozenset[Place] = frozenset()

    @property
    def tensors(self) -> dict[Place, Tensor]:
        """The tensors among it."""
        return {place: v for place, v in self.given.items() if isinstance(v, Tensor)}

    def having(self, tensors: Mapping[Place, Any]) -> Call:
        """The same call with others at some places."""
        return replace(self, given={**self.given, **tensors})

    def answer(self, module: nn.Module, weights: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """What the module answers with these weights: its floating-point tensors.

        A weight that is tied to one of them keeps its own value.
        """
        args = tuple(self.given[p] for p in sorted(p for p in self.given if isinstance(p, int)))
        kwargs = {p: v for p, v in self.given.items() if isinstance(p, str)}
        out = functional_call(module, dict(weights), args, kwargs, tie_weights=False)
        outs = out if isinstance(out, tuple) else (out,)
        return tuple(y for y in outs if isinstance(y, Tensor) and y.is_floating_point())


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
    """The rule written for a module, or None where it is to be called again."""
    if rule := _RULES.get(type(module)):
        return rule
    return experts if _is_fused_experts(module) else None


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
        return _alone(module, a, g)
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
        return _alone(module, a, g)
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


def again(
    module: nn.Module, call: Call, g: tuple[Tensor, ...], names: Sequence[str]
) -> dict[str, SampleGradients]:
    """The gradients of a module's parameters, and of its children's, by calling it once more.

    Args:
        g: the gradients of its answers, each [B, …].
        names: the parameters wanted, by the module's own names.
    """
    read = None
    if isinstance(module, nn.Embedding) and [*names] == ["weight"]:
        read = table(module, call, g[0])
    return read or general(module, call, g, names)


def table(module: nn.Embedding, call: Call, g: Tensor) -> dict[str, SampleGradients] | None:
    """An embedding table read in a way of its own, y_t = s_t W[i_t]; None for any other use.

    Positions with an offset or counted from a mask, scaled words: with the columns 1, i and sin i
    in its place the answer is (s, s·i, s·sin i), and twice that with twice these. The rows to which
    something flows back are those that learn: a padding row does not.
    """
    rows = module.weight.shape[0]
    number = torch.arange(rows, dtype=torch.float64, device=module.weight.device)
    known = torch.stack([torch.ones_like(number), number, number.sin()], 1)
    (y,), back, *_ = vjp(lambda w: call.answer(module, {"weight": w}), known)
    scale = y[..., 0]
    ids = (y[..., 1] / scale).nan_to_num().round().long().clamp(0, rows - 1)
    read = scale[..., None] * known[ids]
    (twice,) = call.answer(module, {"weight": 2 * known})
    if not (torch.allclose(y, read, rtol=1e-6) and torch.allclose(twice, 2 * read, rtol=1e-6)):
        return None
    flown = back((torch.stack([scale, 0 * scale, 0 * scale], -1),))[0][:, 0]  # Σ s² of a row's
    sent = torch.zeros_like(number).index_add_(0, ids.flatten(), scale.flatten().square())
    learns = flown != 0
    if not torch.allclose(flown, sent * learns, rtol=1e-6):
        return None
    left = g.flatten(1, -2)
    lines = (-1, left.shape[1])  # one where all samples read alike
    ids = ids.masked_fill(~learns[ids], -1).reshape(lines).expand(left.shape[:2])
    (scale,) = call.answer(module, {"weight": known[:, :1].to(module.weight.dtype)})  # as rounded
    return {"weight": Lookup(ids, left * scale.reshape(lines)[..., None], rows)}


def general(
    module: nn.Module, call: Call, g: tuple[Tensor, ...], names: Sequence[str]
) -> dict[str, SampleGradients]:
    """Any module: vmap of its own vector-Jacobian product over the samples."""
    weights = {name: module.get_parameter(name).detach() for name in names}
    size = g[0].shape[0]
    moving = {p: x.unflatten(0, (size, -1)) for p, x in call.tensors.items() if p in call.moving}

    def pull(instead: dict[Place, Tensor], outs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        values, back, *_ = vjp(lambda w: call.having(instead).answer(module, w), weights)
        return back(tuple(out.reshape(y.shape) for out, y in zip(outs, values, strict=True)))[0]

    with batchable():
        gradients = vmap(pull, randomness="different")(moving, g)
    return {name: Dense(grad.flatten(1).float()) for name, grad in gradients.items()}


def _alone(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, SampleGradients]:
    """The general rule for a module that is called with one tensor."""
    own = [name for name, _ in module.named_parameters()]
    return general(module, Call({0: a}, frozenset({0})), (g,), own)


@contextmanager
def batchable() -> Iterator[None]:
    """Operations that vmap can take: the fused kernels of attention have no batching rule."""
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        # Another one without such a rule is run row by row: slower, and right.
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        yield


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
