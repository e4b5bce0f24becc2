"""`Run`: one search from a `Problem` to a `SearchResult`, with everything that is written down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ird_search import report
from ird_search.artifact import ChosenRows, save_mask
from ird_search.borrow import borrowed
from ird_search.budgets import Budgets
from ird_search.config import SearchConfig
from ird_search.errors import UsageError
from ird_search.fisher import Elsewhere, Engine, FisherMatrix, make_engine
from ird_search.ledger import Ledger
from ird_search.mask import SparseMask
from ird_search.parameters import ParameterSpace
from ird_search.problem import Problem
from ird_search.progress import Progress
from ird_search.proxy import Candidate, Proxies, Trial
from ird_search.rundir import MASK, REPORT, ROUNDS, RunDirectory
from ird_search.samples import SampleSet
from ird_search.scoring import ScoringPoint, scoring_steps
from ird_search.search import MOVES, Ranges, Round, Scored, SearchState, search
from ird_search.seeds import derive
from ird_search.selection import random_subset
from ird_search.study import Study
from ird_search.task import Task
from ird_search.training import snapshot
from ird_search.verdict import Verdict, give_verdict

CHECKED = 8
"""Samples handed to the self-check, which compares the first two with finite gradients."""


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search found.

    Args:
        mask: the winning mask.
        samples: the rows it was computed from, with their row scores.
        score: the winner's mean loss on held-out samples that no choice has seen.
        verdict: the winner beside its controls.
        rounds: every round, with every candidate.
        config: the settings.
        provenance: where model, data and numbers came from; stored in the mask's file.
    """

    mask: SparseMask
    samples: ChosenRows
    score: float
    verdict: Verdict
    rounds: tuple[Round, ...]
    winner: Scored
    config: SearchConfig
    provenance: Mapping[str, Any]

    def save(self, directory: str | Path) -> Path:
        """Write `rounds.jsonl`, `report.md` and `mask.safetensors`; return the mask's path.

        Raises:
            UsageError: one of these files is there already.
        """
        place = RunDirectory(Path(directory))
        if found := [n for n in (ROUNDS, REPORT, MASK) if (place.path / n).exists()]:
            raise UsageError(f"{place.path} holds {', '.join(found)}. Choose another directory.")
        return self.write(place)

    def write(self, place: RunDirectory) -> Path:
        """Write the files of a run into its own directory, the mask last."""
        place.write_rounds([report.round_record(r) for r in self.rounds])
        text = report.markdown(self.verdict, self.rounds, self.winner, self.provenance)
        place.write(REPORT, text)
        save_mask(place.mask, self.mask, samples=self.samples, provenance=self.provenance)
        return place.mask

    def table(self) -> str:
        """The verdict as a table with its explanation."""
        told = report.explained(self.verdict, self.config.learning_rate)
        text = f"{report.text_table(self.verdict)}\n\n{told}"
        return "\n".join([text, *self.provenance["notes"]])

    def __repr__(self) -> str:
        return (
            f"SearchResult(loss {self.score:.4f}, {len(self.samples.ids)} samples, {self.mask!r})"
        )


class Run:
    """One search, from a problem to a result."""

    def __init__(
        self, problem: Problem, config: SearchConfig, place: RunDirectory | None, show: Progress
    ) -> None:
        self.problem, self.config, self.place, self.show = problem, config, place, show
        self.budgets = Budgets.of(problem.space, config.groups)
        self.study = Study(place.study if place else None)
        self.proxies = Proxies(
            problem, config, Ledger(place.ledger if place else None), on_trial=self._told
        )

    def result(self) -> SearchResult:
        problem, config = self.problem, self.config
        with borrowed(problem.model), _restored(problem):
            problem.model.eval()
            self._introduce()
            self.proxies.warm_up()
            pool = random_subset(len(problem.train), config.pool, seed=derive(config.seed, "pool"))
            samples = problem.train.select(pool)
            fisher = open_fisher(
                problem.model,
                problem.task,
                problem.space,
                samples,
                config,
                problem.device,
                point=self._scoring_point(),
            )
            state = self._search(fisher, len(samples))
            winner = state.best
            assert winner is not None  # the target is always reached: each round shrinks a range
            verdict = self._verdict(winner, fisher)
            scores = fisher.row_scores(winner.pair.rows, winner.mask.coords)
            finite = scores.float().isfinite()  # samples that were left out told nothing
            chosen = ChosenRows(samples.ids[winner.pair.rows][finite], scores[finite].float())
        self.show.stop()
        provenance = self._provenance(winner, verdict, fisher)
        return SearchResult(
            mask=winner.mask,
            samples=chosen,
            score=verdict["ird"].loss,
            verdict=verdict,
            rounds=state.rounds,
            winner=winner,
            config=config,
            provenance=provenance,
        )

    def _introduce(self) -> None:
        p, c = self.problem, self.config
        self.show.say(
            f"{p.source['base_model']['id']}: {p.space.numel:,} candidate parameters in "
            f"{len(p.space.names)} tensors, {c.budget(p.space.numel):,} to select "
            f"({c.density:.3%}); head of {sum(p.model.get_parameter(n).numel() for n in p.head):,}"
        )
        self.show.say(
            f"{p.source['dataset']['origin']}: {len(p.train):,} samples to learn from "
            f"(pool {c.pool}), {len(p.choose)} to choose, {len(p.verdict)} for the verdict"
        )

    def _scoring_point(self) -> ScoringPoint | None:
        """Where F is computed, if that is not where the proxies start."""
        model = self.problem.model
        steps = scoring_steps(self.config.scoring_steps, model, self.problem.space)
        if not steps:
            return None
        self.show.say(f"Fisher scores are taken after {steps} steps of training everything.")
        return ScoringPoint(snapshot(model), self.proxies.advanced(steps))

    def _search(self, fisher: FisherMatrix, pool: int) -> SearchState:
        c, space = self.config, self.problem.space
        ranges = Ranges.geometric(
            pool,
            space.numel,
            min_samples=c.min_samples,
            budget=c.budget(space.numel),
            rounds=c.rounds,
        )
        most = (len(ranges.rows) + len(ranges.columns) - 2) * len(MOVES[c.strategy]) * 3
        self.show.say(
            f"{c.strategy}: samples {' → '.join(map(str, ranges.rows))}, parameters "
            f"{' → '.join(f'{n:,}' for n in ranges.columns)}; Fisher by {fisher.engine.path}"
        )
        self.show.start("search", most)
        rounds: list[dict[str, Any]] = []

        def on_round(done: Round) -> None:
            self.show.say(report.round_line(done))
            rounds.append(report.round_record(done))
            if self.place is not None:
                self.place.write_rounds(rounds)

        return search(
            fisher,
            self.proxies.score,
            ranges,
            strategy=c.strategy,
            patience=c.patience,
            budgets=self.budgets,
            on_round=on_round,
        )

    def _verdict(self, winner: Scored, fisher: FisherMatrix) -> Verdict:
        self.show.start("verdict", 4 * 3 + 5 * self.config.seeds)
        return give_verdict(
            winner,
            fisher,
            self.proxies,
            seeds=self.config.seeds,
            seed=self.config.seed,
            budgets=self.budgets,
        )

    def _notes(self, winner: Scored, fisher: FisherMatrix) -> list[str]:
        """What a reader of the table must know besides."""
        budget = self.config.budget(self.problem.space.numel)
        notes = []
        if winner.mask.count < budget:
            notes.append(
                f"Only {winner.mask.count:,} of the {budget:,} parameters asked for are selected: "
                "no other has a score above zero."
            )
        if fisher.silent:
            rest = "" if len(fisher.silent) < 2 else f" and {len(fisher.silent) - 1} more"
            notes.append(
                f"No gradient reaches {fisher.silent[0]}{rest}: all scores of these tensors are "
                "exactly zero, so nothing in them is selected. Where an adapter starts at zero, "
                "raise scoring_steps."
            )
        if fisher.excluded:
            notes.append(
                f"{len(fisher.excluded)} of {len(fisher.samples)} pool samples were left out: "
                "their log-likelihood or gradient is not finite."
            )
        return notes

    def _told(self, candidate: Candidate, trial: Trial, stage: str) -> None:
        """Each fine-tune, as it ends or is found in the ledger."""
        self.show.step()
        self.study.record(
            trial,
            kind=candidate.kind,
            samples=candidate.samples,
            parameters=candidate.mask.count,
            stage=stage,
        )

    def _provenance(self, winner: Scored, verdict: Verdict, fisher: FisherMatrix) -> dict[str, Any]:
        gain, width = verdict.against("random")
        finite = width < float("inf") and gain == gain
        ids = fisher.samples.ids
        return {
            **self.problem.source,
            "learning_rate": winner.proxy.best.rate,
            "head": list(self.problem.head),
            "verdict": report.verdict_record(verdict),
            "against_random": {"gain": gain, "half_width": width} if finite else None,
            "sentence": verdict.sentence("random"),
            "fisher": {
                "path": fisher.engine.path,
                "groups": self.budgets.counts(winner.mask.coords),
                "silent_tensors": list(fisher.silent),
                "excluded_samples": ids[sorted(fisher.excluded)].tolist(),
            },
            "notes": self._notes(winner, fisher),
            "search": self.config.to_dict(),
        }


def open_fisher(
    model: nn.Module,
    task: Task,
    space: ParameterSpace,
    samples: SampleSet,
    config: SearchConfig,
    device: torch.device,
    *,
    point: ScoringPoint | None = None,
) -> FisherMatrix:
    """The matrix of a model on a sample set, by the fastest path that passes the self-check.

    Args:
        point: the weights to take gradients at, if not the model's own.
    """
    example = samples.batch(torch.arange(min(CHECKED, len(samples))), device)
    with point.visited() if point else nullcontext():
        engine: Engine = make_engine(model, task, space, example=example, method=config.method)
    if point:
        engine = Elsewhere(engine, point.visited)
    return FisherMatrix(
        engine,
        samples,
        space,
        tokens=config.fisher_tokens or 512,
        cache_bytes=config.cache_mb * 2**20,
        device=device,
    )


@contextmanager
def _restored(problem: Problem) -> Iterator[None]:
    """Put the head back, which the warm-up trains for the length of the search."""
    nothing = SparseMask(problem.space, torch.empty(0, dtype=torch.int64))
    saved = snapshot(problem.model, nothing, problem.head)
    try:
        yield
    finally:
        saved.restore()
