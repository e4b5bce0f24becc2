"""The loop: one sample, one backward. Always right, never fast: the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ird_search.fisher.engine import Contribution, all_finite, parameters_of
from ird_search.fisher.gradients import Dense
from ird_search.samples import Batch
from ird_search.task import Task, logits_of


class Loop:
    """∇_θ log p(yᵢ | xᵢ; θ) by plain autograd, a batch of one at a time.

    Works wherever `loss.backward()` does: quantised bases, checkpointing, odd modules.
    """

    path = "loop"

    def __init__(self, model: nn.Module, task: Task, names: Sequence[str]) -> None:
        self.model, self.task, self.names = model, task, tuple(names)

    def gradients(self, batch: Batch) -> Iterator[Contribution]:
        parameters = parameters_of(self.model, self.names)
        frozen = [p for p in parameters.values() if not p.requires_grad]
        try:
            for p in frozen:
                p.requires_grad_(True)
            for b in range(len(batch)):
                yield self._one(batch, slice(b, b + 1), parameters)
        finally:
            for p in frozen:
                p.requires_grad_(False)

    def _one(self, batch: Batch, part: slice, parameters: dict[str, nn.Parameter]) -> Contribution:
        with torch.enable_grad():
            inputs = {key: value[part] for key, value in batch.inputs.items()}
            value = self.task.log_likelihood(logits_of(self.model, inputs), batch.labels[part])
            grads = torch.autograd.grad(
                value.sum(), list(parameters.values()), materialize_grads=True, allow_unused=True
            )
        rows = [g.reshape(1, g.numel()) for g in grads]
        tensors = {name: Dense(g) for name, g in zip(parameters, rows, strict=True)}
        return Contribution(part, dict(tensors), all_finite([value.detach(), *rows], 1))
