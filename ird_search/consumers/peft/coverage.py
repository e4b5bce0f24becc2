"""`Coverage`: what became of every selected entry."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SHOWN = 3
"""How many tensors a line of a report names."""


@dataclass(frozen=True)
class TensorCoverage:
    """What became of the selected entries of one tensor.

    Args:
        name: the parameter, as the mask names it.
        selected: how many of its entries are in the mask.
        held: how many of these the adapter trains.
        added: how many others the adapter trains.
        reason: why entries are lost; empty where none is.
    """

    name: str
    selected: int
    held: int = 0
    added: int = 0
    reason: str = ""

    @property
    def lost(self) -> int:
        """Selected entries that the adapter does not train."""
        return self.selected - self.held


@dataclass(frozen=True)
class Coverage:
    """How much of a mask the adapters hold.

    Args:
        method: the PEFT method.
        tensors: every tensor with a selected entry.
        stored: how many numbers the adapters train and store, modules saved whole apart.
        adapters: how many adapters there are.
        modules: the modules that are trained and saved whole.

    Example:
        >>> norm = TensorCoverage("norm.weight", 2, reason="weight of LayerNorm")
        >>> coverage = Coverage("SuperTuning", (TensorCoverage("up.weight", 5, held=5), norm), 5)
        >>> print(coverage.describe())
        SuperTuning: 5 of 7 selected entries held, 2 lost, 0 others added; 5 numbers in 1 adapter
          lost 2: weight of LayerNorm (norm.weight)
    """

    method: str
    tensors: tuple[TensorCoverage, ...]
    stored: int
    adapters: int = 1
    modules: tuple[str, ...] = ()

    @property
    def selected(self) -> int:
        """Entries in the mask."""
        return sum(t.selected for t in self.tensors)

    @property
    def held(self) -> int:
        """Entries in the mask that the adapters train."""
        return sum(t.held for t in self.tensors)

    @property
    def lost(self) -> int:
        """Entries in the mask that the adapters do not train."""
        return sum(t.lost for t in self.tensors)

    @property
    def added(self) -> int:
        """Entries outside the mask that the adapters train."""
        return sum(t.added for t in self.tensors)

    @property
    def exact(self) -> bool:
        """Whether the adapters train the mask's entries and no others."""
        return not self.lost and not self.added

    def describe(self) -> str:
        """A few lines for people: the totals, then what is lost, by reason."""
        lines = [
            f"{self.method}: {self.held:,} of {self.selected:,} selected entries held, "
            f"{self.lost:,} lost, {self.added:,} others added; {self.stored:,} numbers in "
            f"{self.adapters} adapter{'s' * (self.adapters > 1)}",
            *losses(self.tensors),
        ]
        if self.modules:
            lines.append(f"  trained and saved whole: {', '.join(self.modules)}")
        return "\n".join(lines)


def losses(tensors: Iterable[TensorCoverage]) -> list[str]:
    """One line for each reason why entries are lost, the largest loss first."""
    reasons: dict[str, list[TensorCoverage]] = {}
    for tensor in tensors:
        if tensor.lost:
            reasons.setdefault(tensor.reason, []).append(tensor)
    lines = []
    for reason, lost in sorted(reasons.items(), key=lambda item: -sum(t.lost for t in item[1])):
        names = [t.name for t in lost]
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        total = sum(t.lost for t in lost)
        lines.append(f"  lost {total:,}: {reason} ({', '.join(names[:SHOWN])}{more})")
    return lines
