"""Slow and obvious: what every path of the Fisher engine must equal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ird_search.parameters import ParameterSpace
from ird_search.samples import SampleSet
from ird_search.task import Task, logits_of


def per_sample_gradients(
    model: nn.Module, task: Task, samples: SampleSet, space: ParameterSpace
) -> Tensor:
    """∂ log p(yᵢ | xᵢ; θ) / ∂θⱼ by plain autograd, one unpadded row at a time: float64 [N, P]."""
    parameters = dict(model.named_parameters())
    wanted = [parameters[name] for name in space.names]
    was = [p.requires_grad for p in wanted]
    rows = []
    for p in wanted:
        p.requires_grad_(True)
    for i in range(len(samples)):
        alone = samples.batch([i], wanted[0].device)
        value = task.log_likelihood(logits_of(model, alone.inputs), alone.labels).sum()
        grads = torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1).double().cpu() for g in grads]))
    for p, before in zip(wanted, was, strict=True):
        p.requires_grad_(before)
    return torch.stack(rows)


def fisher(model: nn.Module, task: Task, samples: SampleSet, space: ParameterSpace) -> Tensor:
    """F[i, j], whole: float64 [N, P]."""
    return per_sample_gradients(model, task, samples, space).square()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())
