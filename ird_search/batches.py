"""The order of training rows: which of them each step sees."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ird_search.samples import SampleSet

GROUP = 8
"""Batches whose rows are sorted by length together."""


def training_batches(samples: SampleSet, steps: int, *, size: int, seed: int) -> list[Tensor]:
    """The rows of each step: shuffled epochs, with samples of like length in one batch.

    Every eight batches' rows are sorted by length before they are parted, and the batches shuffled
    again: short texts cost half as much when they are not padded to a long one beside them.
    """
    rows = shuffled_rows(len(samples), steps * size, seed=seed)
    lengths = samples.lengths[rows]
    batches: list[Tensor] = []
    for start in range(0, rows.numel(), GROUP * size):
        order = lengths[start : start + GROUP * size].argsort(stable=True)
        batches += rows[start : start + GROUP * size][order].split(size)
    mixed = np.random.default_rng(seed).permutation(len(batches))
    return [batches[i] for i in mixed]


def shuffled_rows(total: int, count: int, *, seed: int) -> Tensor:
    """`count` positions: whole epochs, each in a new order: int64 [count]."""
    generator = np.random.default_rng(seed)
    epochs = [generator.permutation(total) for _ in range(-(-count // total))]
    return torch.from_numpy(np.concatenate(epochs)[:count].astype(np.int64))
