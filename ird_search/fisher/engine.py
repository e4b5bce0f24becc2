"""What a path through the Fisher engine is: batches in, per-sample gradients out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ird_search.fisher.gradients import SampleGradients
from ird_search.samples import Batch


@dataclass(frozen=True, eq=False)
class Contribution:
    """Per-sample gradients of log p(yᵢ | xᵢ; θ) for some rows of a batch.

    Args:
        part: which rows of the batch.
        tensors: gradients by parameter name, of all the engine's tensors.
        finite: whether log-likelihood and gradients are finite, bool [rows].
    """

    part: slice
    tensors: dict[str, SampleGradients]
    finite: Tensor


class Engine(Protocol):
    """One way to compute per-sample gradients."""

    @property
    def path(self) -> str:
        """The name that a run's record shows; it may grow while gradients are computed."""

    names: tuple[str, ...]
    """The tensors it answers for."""

    def gradients(self, batch: Batch) -> Iterator[Contribution]:
        """Every row of the batch, in one or more contributions."""
        ...


_PATHS = ("taps", "vmap", "loop")


def joined_paths(*paths: str) -> str:
    """The name of several paths that worked together, whatever their order; each once.

    Example:
        >>> joined_paths("loop", "taps+vmap", "taps")
        'taps+vmap+loop'
    """
    parts = dict.fromkeys(part for path in paths for part in path.split("+") if part)
    known = [part for part in _PATHS if part in parts]
    return "+".join([*known, *(part for part in parts if part not in _PATHS)])


class Joined:
    """Two paths, each for tensors of its own.

    Args:
        whole: answers for a batch in one contribution of factors, or for a row at a time.
        rest: may take the batch a few rows at a time, which bounds the memory of both.
    """

    def __init__(self, whole: Engine, rest: Engine) -> None:
        self.whole, self.rest = whole, rest
        self.names = (*whole.names, *rest.names)

    @property
    def path(self) -> str:
        return joined_paths(self.whole.path, self.rest.path)

    def gradients(self, batch: Batch) -> Iterator[Contribution]:
        for first in self.whole.gradients(batch):
            for c in self.rest.gradients(batch.part(first.part)):
                tensors = {name: g.select(c.part) for name, g in first.tensors.items()}
                start = first.part.start
                part = slice(start + c.part.start, start + c.part.stop)
                finite = c.finite & first.finite[c.part]
                yield Contribution(part, {**tensors, **c.tensors}, finite)


class Elsewhere:
    """A path whose gradients are taken at other weights than the model has.

    Args:
        engine: the path.
        there: within this context the model has those weights.
    """

    def __init__(self, engine: Engine, there: Callable[[], AbstractContextManager[object]]) -> None:
        self.engine, self.there = engine, there
        self.names = engine.names

    @property
    def path(self) -> str:
        return self.engine.path

    def gradients(self, batch: Batch) -> Iterator[Contribution]:
        with self.there():
            yield from self.engine.gradients(batch)


def parameters_of(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """The named parameters, in the order of `names`."""
    found = dict(model.named_parameters())
    return {name: found[name] for name in names}


def all_finite(tensors: Sequence[Tensor], batch: int) -> Tensor:
    """Whether every entry of a sample is finite in each tensor [B, …]: bool [B]."""
    sums = [t.reshape(batch, t.numel() // batch).sum(1, dtype=torch.float32) for t in tensors]
    return torch.stack(sums).isfinite().all(0)
