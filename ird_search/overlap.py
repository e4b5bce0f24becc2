"""`Overlap`: what two masks share, and what two random masks of their sizes would share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

COLUMNS = ("", "entries", "shared", "only A", "only B", "Jaccard", "by chance")


@dataclass(frozen=True)
class Counts:
    """How two masks A and B relate in one tensor, or in all of them.

    Args:
        entries: n, how many entries there are to choose from.
        shared: |A ∩ B|.
        only_a: |A − B|.
        only_b: |B − A|.

    Example:
        >>> counts = Counts(100, shared=5, only_a=5, only_b=10)
        >>> counts.a, counts.b, counts.jaccard, round(counts.by_chance, 3)
        (10, 15, 0.25, 0.064)
    """

    entries: int
    shared: int
    only_a: int
    only_b: int

    @property
    def a(self) -> int:
        """|A|."""
        return self.shared + self.only_a

    @property
    def b(self) -> int:
        """|B|."""
        return self.shared + self.only_b

    @property
    def chance(self) -> float:
        """|A| |B| / n: the mean of |A ∩ B| over all masks of these sizes."""
        return self.a * self.b / self.entries if self.entries else 0.0

    @property
    def jaccard(self) -> float:
        """|A ∩ B| / |A ∪ B|; 1 for two empty masks."""
        return self.jaccard_of(self.shared)

    @property
    def by_chance(self) -> float:
        """The Jaccard index of two masks that share as much as random ones do on average."""
        return self.jaccard_of(self.chance)

    def jaccard_of(self, shared: float) -> float:
        """s / (|A| + |B| − s) for masks of these sizes that share s entries."""
        union = self.a + self.b - shared
        return shared / union if union else 1.0


@dataclass(frozen=True)
class Overlap:
    """What two masks A and B share, by tensor.

    Args:
        tensors: the counts in each tensor that the masks could choose from.

    Example:
        >>> overlap = Overlap({"up": Counts(50, 4, 1, 1), "down": Counts(150, 0, 1, 1)})
        >>> print(overlap.describe())
               entries  shared  only A  only B  Jaccard  by chance
        all        200       4       2       2    0.500      0.015
        up          50       4       1       1    0.667      0.053
        down       150       0       1       1    0.000      0.003
        Random masks with these counts in each tensor: Jaccard 0.044.
    """

    tensors: Mapping[str, Counts]

    @property
    def total(self) -> Counts:
        """The counts in all tensors together."""
        every = self.tensors.values()
        return Counts(
            sum(t.entries for t in every),
            sum(t.shared for t in every),
            sum(t.only_a for t in every),
            sum(t.only_b for t in every),
        )

    @property
    def by_chance_within(self) -> float:
        """As `by_chance`, for random masks with these very counts in each tensor.

        Where it is far above `total.by_chance`, the masks agree on tensors; where `total.jaccard`
        is far above it, they agree on entries.
        """
        return self.total.jaccard_of(sum(t.chance for t in self.tensors.values()))

    def describe(self, *, shown: int = 10) -> str:
        """A table for people: the whole, then the tensors in which most is selected.

        Args:
            shown: how many tensors to list.
        """
        touched = {name: t for name, t in self.tensors.items() if t.a or t.b}
        largest = sorted(touched, key=lambda name: -(touched[name].a + touched[name].b))
        rows = [COLUMNS, _row("all", self.total)]
        rows += [_row(name, touched[name]) for name in largest[:shown]]
        widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        if len(largest) > shown:
            lines.append(f"… and {len(largest) - shown} more")
        chance = f"Jaccard {self.by_chance_within:.3f}"
        return "\n".join([*lines, f"Random masks with these counts in each tensor: {chance}."])


def _row(name: str, counts: Counts) -> tuple[str, ...]:
    numbers = (counts.entries, counts.shared, counts.only_a, counts.only_b)
    return (
        name,
        *(f"{n:,}" for n in numbers),
        f"{counts.jaccard:.3f}",
        f"{counts.by_chance:.3f}",
    )
