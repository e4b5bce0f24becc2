"""A model's answers on held-out samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ird_search.samples import Batch, SampleSet
from ird_search.task import Classification, Task, logits_of

EVAL_TOKENS = 8192
"""Padded tokens in one batch of an evaluation."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A model's answers on a sample set.

    Args:
        losses: negative log-likelihood of each sample, float64 [N].
    """

    losses: Tensor
    metrics: dict[str, float]


@torch.no_grad()
def evaluate(
    model: nn.Module, task: Task, samples: SampleSet, *, device: torch.device
) -> Evaluation:
    """Log-likelihoods and metrics in evaluation mode, samples in their own order."""
    losses = torch.empty(len(samples), dtype=torch.float64)
    summaries: dict[int, Tensor] = {}
    for batch, logits in _answers(model, samples, device):
        losses[batch.rows] = -task.log_likelihood(logits, batch.labels).cpu().double()
        summary = task.summary(logits, batch.labels).float().cpu()
        summaries |= dict(zip(batch.rows.tolist(), summary, strict=True))
    summary = torch.stack([summaries[i] for i in range(len(samples))])
    gold = samples.labels if isinstance(samples.labels, Tensor) else torch.empty(0)
    return Evaluation(losses, task.metrics(summary, gold))


@torch.no_grad()
def log_likelihoods(
    model: nn.Module, task: Task, samples: SampleSet, *, device: torch.device
) -> Tensor:
    """log p(yᵢ | xᵢ; θ) in evaluation mode, float64 [N]."""
    found = torch.empty(len(samples), dtype=torch.float64)
    for batch, logits in _answers(model, samples, device):
        found[batch.rows] = task.log_likelihood(logits, batch.labels).cpu().double()
    return found


@torch.no_grad()
def class_probabilities(
    model: nn.Module, task: Task, samples: SampleSet, *, device: torch.device
) -> dict[str, Tensor]:
    """`losses` [N] in evaluation mode, and `probabilities` [N, C] of a classification: float32."""
    losses = torch.empty(len(samples))
    rows: list[Tensor] = [torch.empty(0)] * len(samples)
    for batch, logits in _answers(model, samples, device):
        losses[batch.rows] = -task.log_likelihood(logits, batch.labels).float().cpu()
        if isinstance(task, Classification):
            for i, p in zip(batch.rows.tolist(), logits.float().softmax(-1).cpu(), strict=True):
                rows[i] = p
    if not isinstance(task, Classification):
        return {"losses": losses}
    return {"losses": losses, "probabilities": torch.stack(rows)}


def _answers(
    model: nn.Module, samples: SampleSet, device: torch.device
) -> Iterator[tuple[Batch, Tensor]]:
    """(batch on the device, its logits), samples of like length together."""
    with evaluation_mode(model):
        # A language model gives a vocabulary of logits for each token.
        tokens = EVAL_TOKENS if isinstance(samples.labels, Tensor) else EVAL_TOKENS // 16
        for batch in samples.length_batches(tokens=tokens, device=device):
            yield batch, logits_of(model, batch.inputs)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`eval()` within the block; each module's own mode afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
