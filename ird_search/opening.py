"""`open_fisher`: F of a model on a sample set, by the fastest path that passes the self-check."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import nn

from ird_search.config import SearchConfig
from ird_search.devices import release_memory
from ird_search.errors import out_of_memory
from ird_search.fisher import (
    Elsewhere,
    Engine,
    FisherMatrix,
    LabelRule,
    Loop,
    PassRecord,
    make_engine,
)
from ird_search.parameters import ParameterSpace
from ird_search.samples import SampleSet
from ird_search.scoring import ScoringPoint
from ird_search.task import Task

CHECKED = 8
"""Samples handed to the self-check, which compares the first two with finite gradients."""


def open_fisher(
    model: nn.Module,
    task: Task,
    space: ParameterSpace,
    samples: SampleSet,
    config: SearchConfig,
    device: torch.device,
    *,
    point: ScoringPoint | None = None,
    record: PassRecord | None = None,
) -> FisherMatrix:
    """The matrix of a model on a sample set, by the fastest path that passes the self-check.

    Args:
        point: the weights to take gradients at, if not the model's own.
        record: where long passes write down their sums.

    Raises:
        UsageError: the task has no such Fisher as the settings ask for.
    """
    engine: Engine
    labels = LabelRule.of(config, task)
    loop: Engine = Loop(model, labels.likelihood, space.names)
    with point.visited() if point else nullcontext():
        engine = _engine(model, labels, space, samples, config, device) or loop
    if point:
        engine, loop = Elsewhere(engine, point.visited), Elsewhere(loop, point.visited)
    return FisherMatrix(
        engine,
        samples,
        space,
        tokens=config.fisher_tokens or 512,
        cache_bytes=config.cache_mb * 2**20,
        device=device,
        fallback=loop,
        record=record,
        labels=labels,
    )


def _engine(
    model: nn.Module,
    labels: LabelRule,
    space: ParameterSpace,
    samples: SampleSet,
    config: SearchConfig,
    device: torch.device,
) -> Engine | None:
    """The path that passes the self-check; None where memory does not suffice for one sample."""
    for count in (CHECKED, 2, 1):
        example = labels.example(samples, torch.arange(min(count, len(samples))), device)
        try:
            likelihood = labels.likelihood
            return make_engine(model, likelihood, space, example=example, method=config.method)
        except (MemoryError, RuntimeError) as problem:
            if not out_of_memory(problem):
                raise
        release_memory()
    return None
