"""One method's line: its rate, its scores on the way, and its numbers on unseen rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.glue.bench import Bench
from ird_search.candidate import Candidate, ProxyScore, Trial
from ird_search.contest import Outcome, contest
from ird_search.controls import Draw
from ird_search.paired import UNKNOWN, Gain, crossed
from ird_search.proxy import Proxies


@dataclass(frozen=True)
class Cost:
    """What fine-tunes took."""

    fine_tunes: int = 0
    steps: int = 0
    seconds: float = 0.0

    @classmethod
    def of(cls, trials: Sequence[Trial], steps: int) -> Cost:
        """Of some fine-tunes of one length."""
        return cls(len(trials), len(trials) * steps, sum(t.seconds for t in trials))

    @classmethod
    def of_scores(cls, scores: Iterable[ProxyScore], proxies: Proxies) -> Cost:
        """Of the proxies of some candidates."""
        cost = cls()
        for s in scores:
            cost += cls.of(s.probes, proxies.probe_steps)
            cost += cls.of(s.trials, proxies.probe_steps if s.short else proxies.steps)
        return cost

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.fine_tunes + other.fine_tunes,
            self.steps + other.steps,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True, eq=False)
class Entrant:
    """What is judged.

    Args:
        draw: a candidate for each seed; seed 0 is the one whose rate is tuned.
        cost: of a search that found it.
        figures: what else is known of it.
    """

    draw: Draw
    cost: Cost = field(default_factory=Cost)
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Line:
    """What became of an entrant.

    Args:
        proxy: its score among the search's proxies.
        found: of the fine-tunes whose numbers count.
    """

    candidate: Candidate
    proxy: ProxyScore
    found: Outcome
    cost: Cost
    figures: dict[str, Any]

    @property
    def tuned(self) -> ProxyScore:
        """Its score after as many steps as count, on the rows that choose."""
        return self.found.probe

    @property
    def trials(self) -> tuple[Trial, ...]:
        """The fine-tunes that count, one for each seed, on the rows of the verdict."""
        return self.found.trials

    @property
    def failure(self) -> str:
        """Why there are no numbers; empty when there are."""
        return self.found.failure

    @property
    def losses(self) -> Tensor:
        """Of each seed and sample: [S, n]."""
        return torch.stack([t.losses for t in self.trials if t.losses is not None])

    def over(self, other: Line) -> Gain:
        """How much lower its loss is, over seeds and samples."""
        if self.failure or other.failure:
            return UNKNOWN
        return crossed(self.losses, other.losses)


def judge(bench: Bench, entrant: Entrant, *, steps: int | None = None) -> Line:
    """Score it as a proxy, then put it through the contest of a verdict.

    Args:
        steps: of the fine-tunes that count; the bench's by default.
    """
    proxies, steps = bench.proxies, steps or bench.final_steps
    (proxy,) = proxies.scores([entrant.draw(0)], promote=1.0)
    start = proxy.best.rate

    def drawn(s: int) -> Candidate:
        return replace(entrant.draw(s), start=start)

    found = contest({"it": drawn}, proxies, steps=steps, seeds=bench.config.seeds)["it"]
    known = {t.rate for t in proxy.trials} if steps == proxies.steps else set()
    tuned = {(t.seed, t.rate): t for t in (*found.probe.trials, *found.again)}
    new = [t for t in tuned.values() if t.seed or t.rate not in known]
    cost = entrant.cost + Cost.of_scores([proxy], proxies)
    cost += Cost.of((*new, *found.trials), steps)
    return Line(found.first, proxy, found, cost, entrant.figures)
