"""The short training loop, and the snapshot that lets many of them share one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ird_search.entries import Entries, trained_entries
from ird_search.errors import IRDError, UsageError, nearest
from ird_search.mask import SparseMask
from ird_search.optimizer import MaskedOptimizer
from ird_search.parameters import ParameterSpace
from ird_search.task import Inputs, Task, logits_of

Schedule = Literal["linear", "constant"]


class TrainingBatch(Protocol):
    """What one step trains on."""

    @property
    def inputs(self) -> Inputs:
        """The model's inputs by name."""

    @property
    def labels(self) -> Tensor:
        """What the task's log-likelihood is of."""


class Diverged(IRDError, RuntimeError):
    """A fine-tune left the finite numbers.

    Args:
        step: the step at which it did, counted from 0.
        reason: what was seen.
    """

    def __init__(self, step: int, reason: str) -> None:
        self.step, self.reason = step, reason
        super().__init__(
            f"Training diverged at step {step}: {reason}. Lower the learning rate, clip the "
            "gradient, or look for samples without a label."
        )

    def __reduce__(self) -> tuple[type[Diverged], tuple[int, str]]:
        return type(self), (self.step, self.reason)  # workers send their errors home by pickle


def finetune(
    model: nn.Module,
    task: Task,
    batches: Iterable[TrainingBatch],
    *,
    optimizer: Optimizer,
    steps: int | None = None,
    schedule: Schedule = "linear",
    warmup: float = 0.1,
    clip_norm: float | None = None,
) -> list[float]:
    """Train on each batch once, in training mode, and return the losses: [steps].

    Wrap it in `trainable_only` so that a sparse mask also saves gradients.

    Args:
        task: whose `loss` is minimised.
        batches: on the model's device already.
        optimizer: holds what is trained, and the peak learning rate of each group.
        steps: how many batches to take; by default `len(batches)`.
        schedule: after the warm-up, decay to 0 behind the last step, or stay.
        warmup: fraction of the steps over which the learning rate rises to its peak.
        clip_norm: largest norm of the gradient of what the optimizer trains. A masked optimizer
            takes it over as its own `clip_norm`, which leaves frozen entries out of the norm.

    Raises:
        Diverged: a loss, or a weight at the end, is not finite.
        UsageError: unknown schedule, warm-up outside 0 … 1, or a number of steps that is not known.

    Example:
        >>> from types import SimpleNamespace
        >>> from ird_search.task import Regression
        >>> batch = SimpleNamespace(inputs={"input": torch.ones(4, 2)}, labels=torch.ones(4))
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> losses = finetune(model, Regression(), [batch] * 8, optimizer=optimizer)
        >>> len(losses), losses[-1] < losses[0]
        (8, True)
    """
    total = _steps(batches, steps)
    scheduler = LambdaLR(optimizer, _rate(schedule, total, warmup))
    losses: list[float] = []
    with _training(model):
        model.zero_grad(set_to_none=True)
        for step, batch in zip(range(total), batches, strict=False):
            loss = task.loss(logits_of(model, batch.inputs), batch.labels)
            losses.append(loss.item())
            if not torch.isfinite(loss):
                raise Diverged(step, f"the loss is {losses[-1]}")
            loss.backward()
            _clip(optimizer, clip_norm)
            optimizer.step()
            scheduler.step()
            # The model's and not the optimizer's: it may own only a few of these gradients.
            model.zero_grad(set_to_none=True)
    if losses and not _finite(optimizer):  # the last step's loss cannot show what that step did
        raise Diverged(len(losses) - 1, "a weight is not finite")
    return losses


@dataclass(frozen=True, eq=False, repr=False)
class Snapshot:
    """Everything that a fine-tune may change: trained entries and buffers.

    Args:
        model: the model.
        entries: where the saved values belong.
        values: the saved values, one vector for each of `entries`.
        buffers: the saved buffers by name (the running statistics of BatchNorm).
    """

    model: nn.Module
    entries: tuple[Entries, ...]
    values: tuple[Tensor, ...]
    buffers: Mapping[str, Tensor]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back, bit for bit; as often as you like."""
        for e, values in zip(self.entries, self.values, strict=True):
            e.put(e.parameter.detach(), values.to(e.parameter.device))
        for name, saved in self.buffers.items():
            buffer = self.model.get_buffer(name)
            once = _distinct(buffer)
            if once:  # a sparse tensor, and a single number, is not indexed
                buffer, saved = buffer[once], saved[once]
            buffer.copy_(saved)

    def now(self) -> Snapshot:
        """The same entries and buffers as they are by now."""
        values = tuple(e.take(e.parameter.detach()).clone() for e in self.entries)
        return replace(self, values=values, buffers=_buffers(self.model))

    def tensors(self) -> dict[str, Tensor]:
        """All that is saved, on the CPU, to be stored."""
        values = {f"values.{i}": v for i, v in enumerate(self.values)}
        buffers = {f"buffers.{name}": b for name, b in self.buffers.items()}
        return {name: t.cpu() for name, t in (values | buffers).items()}

    def holding(self, tensors: Mapping[str, Tensor]) -> Snapshot:
        """A snapshot of the same entries with values that were stored."""
        values = tuple(tensors[f"values.{i}"] for i in range(len(self.values)))
        buffers = {name: tensors[f"buffers.{name}"] for name in self.buffers}
        return replace(self, values=values, buffers=buffers)

    @property
    def count(self) -> int:
        """How many parameters are kept."""
        return sum(e.count for e in self.entries)

    def __repr__(self) -> str:
        size = sum(t.nbytes for t in (*self.values, *self.buffers.values()))
        return (
            f"Snapshot({self.count:,} parameters in {len(self.entries)} tensors, "
            f"{len(self.buffers)} buffers, {size / 1e6:.1f} MB)"
        )


def snapshot(
    model: nn.Module, mask: SparseMask | None = None, dense: Iterable[str] = ()
) -> Snapshot:
    """Keep what a masked fine-tune may change, so that the next one starts from the same model.

    Args:
        mask: the entries that are trained; without one, every trainable parameter is kept.
        dense: names of the parameters trained fully, outside the mask.

    Raises:
        ModelError: the mask is of another model.
        UsageError: an unknown dense name, or a tensor that is dense and masked.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> before = model.weight.detach().clone()
        >>> saved = snapshot(model)
        >>> _ = nn.init.zeros_(model.weight)
        >>> saved.restore()
        >>> torch.equal(model.weight, before)
        True
    """
    if mask is None:
        mask = SparseMask(ParameterSpace.of(model, ()), torch.empty(0, dtype=torch.int64))
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        dense = dict.fromkeys([*trainable, *dense])
    masked, whole = trained_entries(model, mask, dense, allow_none=True)
    entries = (*masked, *whole)
    return Snapshot(
        model,
        entries,
        tuple(e.take(e.parameter.detach()).clone() for e in entries),
        _buffers(model),
    )


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def _distinct(tensor: Tensor) -> tuple[slice, ...]:
    """Where each place in memory is once: what `expand` made cannot be written in place."""
    strides = tensor.stride() if tensor.layout == torch.strided else ()
    return tuple(slice(None) if stride else slice(1) for stride in strides)


def _steps(batches: Iterable[TrainingBatch], steps: int | None) -> int:
    if steps is None and not isinstance(batches, Sized):
        raise UsageError(
            f"The number of steps is not known: {type(batches).__name__} has no length. "
            "Give `steps`, or a list of batches."
        )
    total = len(batches) if steps is None and isinstance(batches, Sized) else steps
    if total is None or total < 1:
        raise UsageError(f"A fine-tune of {total} steps trains nothing; at least 1 is needed.")
    return total


def _rate(schedule: str, total: int, warmup: float) -> Callable[[int], float]:
    """The factor on the peak learning rate at each step (w steps of warm-up, T in all).

        (s + 1)/(w + 1) for s < w, then (T − s)/(T − w) for linear and 1 for constant

    No step is wasted on a rate of 0, and the first step behind the warm-up has the peak.
    """
    if schedule not in get_args(Schedule):
        raise UsageError(
            f"Unknown schedule {schedule!r}; known are {', '.join(get_args(Schedule))}."
            f"{nearest(schedule, get_args(Schedule))}"
        )
    if not 0 <= warmup <= 1:
        raise UsageError(f"warmup is {warmup}; it is a fraction of the steps, 0 … 1.")
    rising = min(round(warmup * total), total - 1)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return (total - step) / (total - rising) if schedule == "linear" else 1.0

    return factor


def _clip(optimizer: Optimizer, clip_norm: float | None) -> None:
    if clip_norm is None:
        return
    if isinstance(optimizer, MaskedOptimizer):
        optimizer.clip_norm = clip_norm
        return
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(owned, clip_norm)


def _finite(optimizer: Optimizer) -> bool:
    owned = (p for group in optimizer.param_groups for p in group["params"])
    return all(bool(torch.isfinite(p).all()) for p in owned)


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode within the block; each module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
