"""`SearchResult`: what a search found, as an object, as text and as files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save

from ird_search import report
from ird_search.artifact import ChosenRows, save_mask
from ird_search.config import SearchConfig
from ird_search.crash import crash_point
from ird_search.errors import UsageError
from ird_search.front import front
from ird_search.mask import SparseMask
from ird_search.pair import Scored
from ird_search.rundir import INCLUSION, MASK, REPORT, ROUNDS, SAMPLES, RunDirectory
from ird_search.sample_report import SampleReport
from ird_search.search import Round
from ird_search.stability import Stability
from ird_search.verdict import Verdict


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search found.

    Args:
        mask: the winning mask.
        samples: the rows it was computed from, with their row scores.
        score: the winner's mean loss on held-out samples that no choice has seen.
        verdict: the winner beside its controls.
        rounds: every round, with every candidate.
        winner: the pair that was taken.
        stability: whether other rows would have given the same mask.
        sample_report: every row of the pool: chosen, outlier, label in doubt.
        config: the settings.
        provenance: where model, data and numbers came from; stored in the mask's file.
    """

    mask: SparseMask
    samples: ChosenRows
    score: float
    verdict: Verdict
    rounds: tuple[Round, ...]
    winner: Scored
    stability: Stability
    sample_report: SampleReport
    config: SearchConfig
    provenance: Mapping[str, Any]

    @property
    def head(self) -> tuple[str, ...]:
        """The tensors that are to be trained whole beside the mask, as in the mask's file."""
        return tuple(self.provenance.get("head", ()))

    @property
    def learning_rate(self) -> float | None:
        """The learning rate that was best for the mask; None where none was found."""
        rate = self.provenance.get("learning_rate")
        return rate if isinstance(rate, float) else None

    @property
    def front(self) -> list[Scored]:
        """The density-score front: pairs that no smaller one is better than, smallest first."""
        return front(s for r in self.rounds for s in r.nominated)

    def save(self, directory: str | Path) -> Path:
        """Write the report, the rounds, the samples and the mask; return the mask's path.

        Raises:
            UsageError: one of these files is there already.
        """
        place = RunDirectory(Path(directory))
        written = (ROUNDS, SAMPLES, INCLUSION, REPORT, MASK)
        if found := [n for n in written if (place.path / n).exists()]:
            raise UsageError(f"{place.path} holds {', '.join(found)}. Choose another directory.")
        return self.write(place)

    def write(self, place: RunDirectory) -> Path:
        """Write the files of a run into its own directory, the mask last."""
        place.write_rounds([report.round_record(r) for r in self.rounds])
        place.write(SAMPLES, self.sample_report.lines())
        if self.stability.overlaps:
            place.write(INCLUSION, save(self.stability.by_parameter(self.mask)))
        place.write(REPORT, self.markdown())
        crash_point("report written")
        save_mask(place.mask, self.mask, samples=self.samples, provenance=self.provenance)
        crash_point("mask in place")
        return place.mask

    def markdown(self) -> str:
        """`report.md`."""
        text = report.markdown(self.verdict, self.rounds, self.winner, self.provenance)
        parts = [
            *report.front_lines(self.front, self.winner),
            "## The samples",
            "",
            *(f"* {line}" for line in (*self.sample_report.summary(), str(self.stability))),
        ]
        return "\n".join([text, *parts, ""])

    def table(self) -> str:
        """The verdict as a table with its explanation."""
        told = report.explained(self.verdict, self.config.learning_rate)
        text = f"{report.text_table(self.verdict)}\n\n{told}"
        return "\n".join([text, *self.provenance["notes"]])

    def __repr__(self) -> str:
        return (
            f"SearchResult(loss {self.score:.4f}, {len(self.samples.ids)} samples, {self.mask!r})"
        )
