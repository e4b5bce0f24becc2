"""vmap: `torch.func.vmap(grad(functional_call))`, the general vectorised path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import transformers
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from ird_search.fisher.engine import Contribution, all_finite, parameters_of
from ird_search.fisher.gradients import Dense
from ird_search.fisher.rules import batchable
from ird_search.samples import Batch
from ird_search.task import Task, logits_of

ATTENTION = "ird_search_sdpa"
CHUNK_BYTES = 512 * 2**20


class VMap:
    """∇_θ log p(yᵢ | xᵢ; θ) for a chunk of samples at a time.

    Forms chunk × parameters numbers, so the chunk is sized to memory. Pages of fresh memory cost
    more than arithmetic on a CPU, where small chunks are also the fast ones.

    Args:
        chunk: samples at a time; sized to memory where left out, at most 8.
    """

    path = "vmap"

    def __init__(
        self, model: nn.Module, task: Task, names: Sequence[str], *, chunk: int | None = None
    ) -> None:
        self.model, self.task, self.names = model, task, tuple(names)
        entries = sum(p.numel() for p in parameters_of(model, self.names).values())
        self.chunk = chunk or max(1, min(8, CHUNK_BYTES // (4 * max(1, entries))))

    def gradients(self, batch: Batch) -> Iterator[Contribution]:
        with traceable_attention(self.model), batchable():
            for start in range(0, len(batch), self.chunk):
                yield self._chunk(batch, slice(start, min(start + self.chunk, len(batch))))

    def _chunk(self, batch: Batch, part: slice) -> Contribution:
        chosen = {n: p.detach() for n, p in parameters_of(self.model, self.names).items()}
        fixed = {n: p.detach() for n, p in self.model.named_parameters() if n not in chosen}

        def log_likelihood(
            weights: dict[str, Tensor], inputs: dict[str, Tensor], label: Tensor
        ) -> Tensor:
            one = {key: value[None] for key, value in inputs.items()}
            called = _Called(self.model)
            logits = functional_call(
                called, {f"model.{n}": w for n, w in {**fixed, **weights}.items()}, (one,)
            )
            return self.task.log_likelihood(logits, label[None]).sum()

        inputs = {key: value[part] for key, value in batch.inputs.items()}
        gradients, values = vmap(
            grad_and_value(log_likelihood), in_dims=(None, 0, 0), randomness="different"
        )(chosen, inputs, batch.labels[part])
        rows = [g.flatten(1) for g in gradients.values()]
        tensors = {name: Dense(g) for name, g in zip(gradients, rows, strict=True)}
        return Contribution(part, dict(tensors), all_finite([values, *rows], values.numel()))


class _Called(nn.Module):
    """A module whose forward is `logits_of`, so that `functional_call` can drive any model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return logits_of(self.model, inputs)


def _mask(*args: Any, **kwargs: Any) -> Any:
    """The stock sdpa mask, never left out: whether to leave it out is read from its values."""
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return transformers.AttentionMaskInterface()["sdpa"](*args, **kwargs)


@contextmanager
def traceable_attention(model: nn.Module) -> Iterator[None]:
    """Give a transformers model an attention that branches on no values, and its own back after.

    Models without sdpa keep theirs.
    """
    wrapped: Any = model
    base = wrapped.get_base_model() if hasattr(model, "get_base_model") else model
    can = getattr(base, "_supports_sdpa", False)
    if not can or not isinstance(base, transformers.PreTrainedModel):
        yield
        return
    transformers.AttentionInterface.register(ATTENTION, transformers.AttentionInterface()["sdpa"])
    transformers.AttentionMaskInterface.register(ATTENTION, _mask)
    before = base.config._attn_implementation
    base.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        base.set_attn_implementation(before)
