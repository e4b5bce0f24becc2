"""`Run`: one search from a `Problem` to a `SearchResult`, with everything that is written down."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ird_search import report
from ird_search.artifact import ChosenRows
from ird_search.borrow import borrowed
from ird_search.budgets import Budgets
from ird_search.candidate import Candidate
from ird_search.config import BESIDE_THE_RESULT, SearchConfig
from ird_search.controls import Controls
from ird_search.coordinates import digest
from ird_search.crash import crash_point
from ird_search.devices import computing
from ird_search.fisher import FisherMatrix, LabelRule, Memory, PassRecord
from ird_search.ledger import Ledger, Unit
from ird_search.mask import SparseMask
from ird_search.narrowing import Narrowings
from ird_search.opening import open_fisher
from ird_search.pair import Ranges, Scored
from ird_search.problem import Problem
from ird_search.progress import Progress
from ird_search.proxy import Proxies
from ird_search.reading import Reading
from ird_search.result import SearchResult
from ird_search.rundir import RunDirectory
from ird_search.sample_report import SampleReport, sample_report
from ird_search.scoring import ScoringPoint, scoring_steps
from ird_search.search import Round, SearchState, search
from ird_search.seeds import derive
from ird_search.selection import random_subset
from ird_search.selector import Selector
from ird_search.strategies import make_strategy
from ird_search.study import Study
from ird_search.training import snapshot
from ird_search.verdict import Verdict, give_verdict, too_few

SMALLER = 16
"""Where a smaller mask may be picked, it is looked for down to one of so many parameters."""


class Run:
    """One search, from a problem to a result.

    Args:
        ledger: of the run, shared by all its processes.
        place: where the rest is written down.
        helping: this process does fine-tunes for another one, which does all else.
    """

    def __init__(
        self,
        problem: Problem,
        config: SearchConfig,
        ledger: Ledger,
        *,
        place: RunDirectory | None = None,
        show: Progress | None = None,
        helping: bool = False,
    ) -> None:
        self.problem, self.config, self.ledger = problem, config, ledger
        self.place, self.show, self.helping = place, show or Progress(), helping
        self.budgets = Budgets.of(problem.space, config.groups)
        self._fine_tunes, self._raised = 0, list[str]()
        self.study = None if helping else Study(place.study if place else None)
        self.proxies = Proxies(problem, config, ledger, on_trial=self._told)
        pool = random_subset(
            len(problem.train), config.rows(len(problem.train)), seed=derive(config.seed, "pool")
        )
        self.pool = problem.train.select(pool)

    def result(self) -> SearchResult:
        """Search, give the verdict, and say where everything came from."""
        config = self.config
        try:
            with self._at_work():
                self._introduce()
                narrowings, state, verdict = self._searched()
                winner = _winner(state)
                scores = narrowings.row_scores(winner.pair.rows, winner.mask)
                finite = scores.float().isfinite()  # samples that were left out told nothing
                ids = self.pool.ids[winner.pair.rows][finite]
                chosen = ChosenRows(ids, scores[finite].float())
                stability = narrowings.stability(
                    winner.pair,
                    winner.mask,
                    bootstraps=config.bootstraps,
                    seed=derive(config.seed, "bootstraps"),
                )
                rows = self._sample_report(winner, verdict["ird"].rate, narrowings)
        finally:
            self.show.stop()
        self.ledger.clear("fisher")
        return SearchResult(
            mask=winner.mask,
            samples=chosen,
            score=verdict["ird"].loss,
            verdict=verdict,
            rounds=state.rounds,
            winner=winner,
            stability=stability,
            sample_report=rows,
            config=config,
            provenance=self._provenance(winner, state.ranges, verdict, narrowings),
        )

    def help(self) -> None:
        """Take part in the fine-tunes of a run, until there are no more."""
        with self._at_work():
            self._searched()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """The model is used, on this process' share of the machine, and put back."""
        c, model = self.config, self.problem.model
        threads = computing(processes=c.workers, strict=c.strict)
        with threads, borrowed(model), _restored(self.problem):
            model.eval()
            yield

    def _searched(self) -> tuple[Narrowings, SearchState, Verdict]:
        """All units of a run, in the one order that every process of it goes through."""
        self.proxies.check()
        self.proxies.warm_up()
        narrowings = self._settled(self._narrowings())
        state = self._search(narrowings)
        return narrowings, state, self._verdict(_winner(state), narrowings)

    def _introduce(self) -> None:
        p, c = self.problem, self.config
        self.show.say(
            f"{p.source['base_model']['id']}: {p.space.numel:,} candidate parameters in "
            f"{len(p.space.names)} tensors, {c.budget(p.space.numel):,} to select "
            f"({c.density:.3%}); head of {sum(p.model.get_parameter(n).numel() for n in p.head):,}"
        )
        if done := len(self.ledger):
            self.show.say(f"Going on: {done} units are finished already.")
        self.show.say(
            f"{p.source['dataset']['origin']}: {len(p.train):,} samples to learn from "
            f"(pool {len(self.pool)}), {len(p.choose)} to choose, {len(p.verdict)} for the verdict"
        )
        if note := too_few(len(p.verdict)):
            self.show.say(note)

    def _narrowings(self) -> Narrowings:
        """What is asked of F, with all that its answers depend on."""
        p, c = self.problem, self.config
        steps = scoring_steps(c.scoring_steps, p.model, p.space)
        about = {
            "problem": p.fingerprint,
            "start": self.proxies.start,
            "scoring": [steps, c.batch_size, c.weight_decay, c.seed] if steps else [],
            "pool": digest(self.pool.ids),
            "fisher": [c.method, c.fisher_tokens, c.cache_mb, *LabelRule.of(c, p.task).about],
        }

        def opened() -> FisherMatrix:
            record = PassRecord(self.ledger, about, every=c.record_seconds)
            point = self._scoring_point(steps) if steps else None
            fisher = open_fisher(
                p.model, p.task, p.space, self.pool, c, p.device, point=point, record=record
            )
            self.show.say(f"Fisher by {fisher.path}")
            return fisher

        selector = Selector.of(c, self.budgets, self.pool)
        return Narrowings(opened, selector, self.ledger, about, wait=self.helping)

    def _settled(self, narrowings: Narrowings) -> Narrowings:
        """The same over fewer rows of the pool, where these give the same mask."""
        c = self.config
        if c.settle is None:
            return narrowings
        generator = torch.Generator().manual_seed(derive(c.seed, "settle"))
        order = torch.randperm(len(self.pool), generator=generator)
        budget = c.budget(self.problem.space.numel)
        rows, seen = narrowings.settled(order, budget, Reading.of(c), at=c.settle)
        told = ", ".join(f"{n} {overlap:.0%}" for n, overlap in seen)
        self.show.say(
            f"Rows, and what their mask shares with that of half of them: {told}. "
            f"{rows.numel()} of {len(self.pool)} rows are searched."
        )
        if rows.numel() == len(self.pool):
            return narrowings
        self.pool = self.pool.select(rows)
        return self._narrowings()

    def _sample_report(self, winner: Scored, rate: float, narrowings: Narrowings) -> SampleReport:
        """The pool's rows by their scores in the mask, and by the model that it trained."""
        everything = torch.arange(len(self.pool))
        candidate = Candidate("ird", winner.mask, winner.pair.rows.numel())
        losses, probabilities = self.proxies.answers(candidate, rate, self.pool)
        scores = narrowings.row_scores(everything, winner.mask)
        chosen = winner.pair.rows[scores[winner.pair.rows].float().isfinite()]
        return sample_report(self.pool, scores, chosen, losses, probabilities)

    def _scoring_point(self, steps: int) -> ScoringPoint:
        """Where F is computed, which is not where the proxies start."""
        self.show.say(f"Fisher scores are taken after {steps} steps of training everything.")
        return ScoringPoint(snapshot(self.problem.model), self.proxies.advanced(steps))

    def _search(self, narrowings: Narrowings) -> SearchState:
        c, space = self.config, self.problem.space
        budget = c.budget(space.numel)
        ranges = Ranges.geometric(
            len(self.pool),
            space.numel,
            min_samples=c.min_samples,
            budget=budget,
            rounds=c.rounds,
            least=None if c.pick == "target" else max(1, budget // SMALLER),
        )
        self.show.say(
            f"{c.strategy}: samples {' → '.join(map(str, ranges.rows))}, parameters "
            f"{' → '.join(f'{n:,}' for n in ranges.columns)}"
        )
        self.show.start("search")
        rounds: list[dict[str, Any]] = []

        def on_round(done: Round) -> None:
            rounds.append(report.round_record(done))
            if self.place is not None:
                self.place.write_rounds(rounds)
                crash_point("round told")
            self.show.say(report.round_line(done))

        return search(
            make_strategy(c, narrowings, ranges, Reading.of(c)),
            self.proxies.scores,
            ranges,
            pick=c.pick,
            tolerance=c.tolerance,
            on_round=on_round,
        )

    def _verdict(self, winner: Scored, narrowings: Narrowings) -> Verdict:
        self.show.start("verdict")
        controls = Controls.of(winner, self.proxies, narrowings)
        return give_verdict(winner, controls, self.proxies, seeds=self.config.seeds)

    def _notes(self, winner: Scored, ranges: Ranges, memory: Memory) -> list[str]:
        """What a reader of the table must know besides."""
        budget = ranges.columns[winner.pair.step]
        notes = []
        if winner.mask.count < budget:
            whole = "no other has a score above zero"
            if self.config.granularity != "entry":
                whole = f"the next whole {self.config.granularity} does not fit"
            notes.append(
                f"Only {winner.mask.count:,} of the {budget:,} parameters asked for are selected: "
                f"{whole}."
            )
        if silent := memory.silent:
            rest = "" if len(silent) < 2 else f" and {len(silent) - 1} more"
            notes.append(
                f"No gradient reaches {silent[0]}{rest}: all scores of these tensors are exactly "
                "zero, so nothing in them is selected. Where an adapter starts at zero, raise "
                "scoring_steps."
            )
        if memory.excluded:
            notes.append(
                f"{len(memory.excluded)} of {len(self.pool)} pool samples were left out: "
                "their log-likelihood or gradient is not finite."
            )
        if self._raised:
            notes.append(
                f"{len(self._raised)} of {self._fine_tunes} fine-tunes were ended by an exception, "
                f"and count as the worst: {self._raised[0]}."
            )
        for name, ids in self.proxies.left_out.items():
            listed = ", ".join(map(str, ids[:10])) + " …" * (len(ids) > 10)
            notes.append(
                f"{len(ids)} {name} samples were left out: their log-likelihood is not finite. "
                f"Rows (counting from 0): {listed}."
            )
        notes += self.problem.notes
        if note := too_few(len(self.problem.verdict)):
            notes.append(note)
        return notes

    def _told(self, done: Unit) -> None:
        """Each fine-tune, as it ends or is found in the ledger."""
        if self.study is None:
            return
        self.show.step()
        self.study.record(done)
        self._fine_tunes += 1
        if done.result["trial"]["raised"]:
            self._raised.append(done.result["trial"]["failure"])
        crash_point("trial told")

    def _provenance(
        self, winner: Scored, ranges: Ranges, verdict: Verdict, narrowings: Narrowings
    ) -> dict[str, Any]:
        gain = verdict.against("random")
        finite = gain.half_width < float("inf")
        memory = narrowings.memory
        return {
            **self.problem.source,
            "learning_rate": verdict["ird"].rate,
            "head": list(self.problem.head),
            "verdict": report.verdict_record(verdict),
            "against_random": (
                {"gain": gain.mean, "half_width": gain.half_width} if finite else None
            ),
            "sentence": verdict.sentence("random"),
            "fisher": {
                "path": narrowings.path,
                "groups": self.budgets.counts(winner.mask.coords),
                "silent_tensors": list(memory.silent or ()),
                "excluded_samples": self.pool.ids[list(memory.excluded)].tolist(),
            },
            "reading": winner.pair.reading.to_dict(),
            "notes": self._notes(winner, ranges, memory),
            **({"left_out": self.proxies.left_out} if self.proxies.left_out else {}),
            "search": {
                k: v for k, v in self.config.to_dict().items() if k not in BESIDE_THE_RESULT
            },
        }


def help_out(data: bytes, directory: Path) -> None:
    """What a worker process does.

    Args:
        data: problem and settings, pickled by the process that started it.
    """
    problem, config = pickle.loads(data)
    Run(problem, config, Ledger(directory), helping=True).help()


def _winner(state: SearchState) -> Scored:
    assert state.best is not None  # the target is always reached: each round shrinks a range
    return state.best


@contextmanager
def _restored(problem: Problem) -> Iterator[None]:
    """Put the head back, which the warm-up trains for the length of the search."""
    nothing = SparseMask(problem.space, torch.empty(0, dtype=torch.int64))
    saved = snapshot(problem.model, nothing, problem.head)
    try:
        yield
    finally:
        saved.restore()
