"""`SampleReport`: the rows behind a mask: chosen ones, odd ones, labels that look wrong.

Rows with a large Fisher score are often outliers or mislabelled: a model that is sure of another
class has a large gradient. So the rows are shown, and every list can be taken back to the data set
by the rows' positions in it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ird_search.errors import UsageError
from ird_search.rundir import SAMPLES
from ird_search.samples import SampleSet

OUTLIER = 3.5
"""A row is an outlier where the logarithm of its score is so many robust standard deviations above
the median (Iglewicz and Hoaglin 1993)."""
ROBUST = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""


@dataclass(frozen=True)
class SampleRow:
    """One row of the pool.

    Args:
        id: its position in the data, counting from 0.
        label: class, number, or None for a sequence.
        score: r_i(M), its Fisher score within the mask; None where its gradient is not finite.
        loss: its negative log-likelihood after training the mask; None where it is not finite.
        chosen: whether the mask was computed from it.
        outlier: whether its score is far above the others'.
        suspect: the class that the trained model is sure of instead of the label; None if it is
            not.
    """

    id: int
    label: int | float | None
    score: float | None
    loss: float | None
    chosen: bool
    outlier: bool
    suspect: int | None


@dataclass(frozen=True)
class SampleReport:
    """All rows of a pool, in its order.

    Args:
        label_names: names of the classes, where there are any.
    """

    rows: tuple[SampleRow, ...]
    label_names: tuple[str, ...] | None = None

    @property
    def chosen(self) -> list[int]:
        """Positions in the data of the rows that the mask was computed from."""
        return [r.id for r in self.rows if r.chosen]

    @property
    def outliers(self) -> list[int]:
        """Positions of the rows with far larger scores than the others."""
        return [r.id for r in self.rows if r.outlier]

    @property
    def suspects(self) -> list[int]:
        """Positions of the rows whose labels the trained model contradicts, the surest first."""
        found = [r for r in self.rows if r.suspect is not None]
        return [r.id for r in sorted(found, key=lambda r: -(r.loss or 0.0))]

    @property
    def balance(self) -> dict[str, tuple[int, int]]:
        """(rows of the pool, rows chosen) of each class."""
        found: dict[str, tuple[int, int]] = {}
        for row in self.rows:
            if isinstance(row.label, int):
                total, chosen = found.get(self.name(row.label), (0, 0))
                found[self.name(row.label)] = total + 1, chosen + row.chosen
        return dict(sorted(found.items()))

    def name(self, label: int) -> str:
        """A class by its name, or its number."""
        names = self.label_names
        return names[label] if names and label < len(names) else str(label)

    def lines(self) -> str:
        """One JSON object a row."""
        return "".join(json.dumps(asdict(row)) + "\n" for row in self.rows)

    @classmethod
    def of_lines(cls, text: str) -> SampleReport:
        """The same again, without the names of classes."""
        return cls(tuple(SampleRow(**json.loads(line)) for line in text.splitlines()))

    def summary(self) -> list[str]:
        """In a few sentences."""
        said = [f"{len(self.chosen)} of {len(self.rows)} pool samples were chosen."]
        if self.balance:
            parts = (f"{name} {c} of {n}" for name, (n, c) in self.balance.items())
            said.append(f"By class: {', '.join(parts)}.")
        taken = {r.id for r in self.rows if r.chosen}
        for what, ids in (
            ("far larger scores than the others (outliers)", self.outliers),
            ("labels that the trained model contradicts", self.suspects),
        ):
            listed = ", ".join(map(str, ids[:10])) + " …" * (len(ids) > 10)
            of = f", {len(taken.intersection(ids))} of them chosen: rows {listed}" if ids else ""
            said.append(f"{len(ids)} have {what}{of}.")
        return said


def sample_report(
    pool: SampleSet,
    scores: Tensor,
    chosen: Tensor,
    losses: Tensor,
    probabilities: Tensor | None,
) -> SampleReport:
    """What there is to say of each row.

    A label is suspect where the model prefers another class j, and is at least as sure of it as it
    is on average of the rows that are labelled j (confident learning: Northcutt et al. 2021).

    Args:
        scores: r_i(M): [N].
        chosen: positions of the rows that the mask was computed from.
        losses: negative log-likelihoods after training: [N].
        probabilities: of the classes after training, [N, C]; None for other tasks.
    """
    taken = torch.zeros(len(pool), dtype=torch.bool)
    taken[chosen] = True
    odd = _outliers(scores)
    labels = pool.labels if isinstance(pool.labels, Tensor) else None
    suspects: Sequence[int | None] = [None] * len(pool)
    if probabilities is not None and labels is not None:
        suspects = _suspects(probabilities.double(), labels)
    rows = [
        SampleRow(
            id=int(pool.ids[i]),
            label=None if labels is None else labels[i].item(),
            score=_finite(scores[i]),
            loss=_finite(losses[i]),
            chosen=bool(taken[i]),
            outlier=bool(odd[i]),
            suspect=suspects[i],
        )
        for i in range(len(pool))
    ]
    return SampleReport(tuple(rows), pool.label_names)


def _outliers(scores: Tensor) -> Tensor:
    usable = scores.isfinite() & (scores > 0)
    logs = scores.double().clamp_min(torch.finfo(torch.float64).tiny).log()
    middle = logs[usable].median() if bool(usable.any()) else torch.tensor(0.0)
    spread = ROBUST * (logs[usable] - middle).abs().median() if bool(usable.any()) else middle
    return usable & (logs > middle + OUTLIER * spread) & (spread > 0)


def _suspects(probabilities: Tensor, labels: Tensor) -> list[int | None]:
    """The class that each row looks like instead of its label, or None."""
    classes = probabilities.shape[1]
    usable = probabilities.isfinite().all(1)
    own = [probabilities[usable & (labels == j), j] for j in range(classes)]
    sure = torch.tensor([float(p.mean()) if p.numel() else 2.0 for p in own])
    found: list[int | None] = []
    for p, label, fine in zip(probabilities, labels.tolist(), usable.tolist(), strict=True):
        j = int(p.argmax())
        found.append(j if fine and j != label and float(p[j]) >= float(sure[j]) else None)
    return found


def _finite(value: Tensor) -> float | None:
    return float(value) if bool(value.isfinite()) else None


def read_report(directory: Path) -> SampleReport:
    """What a finished run wrote of its samples.

    Raises:
        UsageError: there is no such file, or another one.
    """
    path = directory / SAMPLES
    try:
        return SampleReport.of_lines(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror}. Name the directory of a finished run."
        ) from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path} is not what a run wrote: {str(error)[:200]}") from error
