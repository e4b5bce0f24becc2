"""`Flat`: the trained entries of many tensors as one short vector, on which an optimizer steps."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ird_search.entries import Entries


class Flat:
    """The trained entries of tensors that share dtype and device, behind one another: [k].

    Args:
        group: which parameter group they follow.
        entries: the tensors' entries.
        master: float32 values that stand for half-precision weights; by default, the weights.

    Attributes:
        parameter: what the optimizer steps on, in float32 (float64 for float64 weights). Unless it
            holds master values it is empty between two steps, when it has been `release`d.
    """

    def __init__(
        self, group: int, entries: Iterable[Entries], master: Tensor | None = None
    ) -> None:
        self.group, self.entries = group, tuple(entries)
        values = self._weights() if master is None else master.to(self._like.device)
        self.parameter = nn.Parameter(values)

    @property
    def is_half(self) -> bool:
        """Whether the weights are too coarse to hold a small update; they may be cast any time."""
        return self._like.dtype != self._wide

    @property
    def _like(self) -> nn.Parameter:
        return self.entries[0].parameter

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self._like.dtype, torch.float32)

    @property
    def counts(self) -> list[int]:
        """How many entries of each tensor: [tensors]."""
        return [e.count for e in self.entries]

    @property
    def gradient(self) -> Tensor:
        """The gradient, between `load` and `store`: [k]."""
        assert self.parameter.grad is not None
        return self.parameter.grad

    def load(self) -> None:
        """Read the weights and their gradients: [k] each."""
        self.parameter.data = self._current()
        gradients = [e.take_gradient(e.parameter.grad) for e in self.entries]  # type: ignore[arg-type]
        self.parameter.grad = torch.cat(gradients).to(self._wide)

    def store(self) -> None:
        """Write the weights back."""
        parts = self.parameter.data.split(self.counts)
        for e, values in zip(self.entries, parts, strict=True):
            e.put(e.parameter.detach(), values)

    def release(self) -> None:
        """Drop what is not kept between two steps."""
        self.parameter.grad = None
        if not self.is_half:
            self.parameter.data = self.parameter.data.new_empty(0)

    def _weights(self) -> Tensor:
        parts = [e.take(e.parameter.detach()) for e in self.entries]
        return torch.cat(parts).to(self._wide)

    def _current(self) -> Tensor:
        """The weights to update.

        A master value stands for its weight as long as it rounds to it; otherwise someone has
        written the weight (a restored snapshot, a loaded checkpoint), and the weight counts.
        """
        weights, master = self._weights(), self.parameter.data
        if not self.is_half or master.shape != weights.shape:  # cast to half only now
            return weights
        master = master.to(weights)
        rounded = master.to(self._like.dtype).to(master.dtype)
        return torch.where(rounded == weights, master, weights)
