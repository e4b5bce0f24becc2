"""One method's line: its rate, its scores on the way, and its numbers on unseen rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.glue.bench import Bench
from ird_search.candidate import Attempt, Candidate, Probe, ProxyScore, Trial, rate_at
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
        tuned: its score after as many steps as count, on the rows that choose.
        trials: the fine-tunes that count, one for each seed, on the rows of the verdict.
    """

    candidate: Candidate
    proxy: ProxyScore
    tuned: ProxyScore
    trials: tuple[Trial, ...]
    cost: Cost
    figures: dict[str, Any]

    @property
    def failure(self) -> str:
        """Why there are no numbers; empty when there are."""
        return next((t.failure for t in (self.tuned.best, *self.trials) if not t.ok), "")

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
    """Tune the rate by the proxies, again at full length, and run the seeds.

    Args:
        steps: of the fine-tunes that count; the bench's by default.
    """
    proxies, steps = bench.proxies, steps or bench.final_steps
    first = entrant.draw(0)
    (proxy,) = proxies.scores([first], promote=1.0)
    cost = entrant.cost + Cost.of_scores([proxy], proxies)
    tuned = proxy
    if proxy.best.ok and steps != proxies.steps:
        around = [rate_at(proxy.best.rate, i) for i in (-1, 0, 1)]
        tuned = tried(proxies, Probe(first, around, more=1), steps)
        cost += Cost.of(tuned.trials, steps)
    trials: list[Trial] = []
    if tuned.best.ok:
        attempts = [
            Attempt(entrant.draw(s), tuned.best.rate, steps, s, True)
            for s in range(1, bench.config.seeds + 1)
        ]
        trials = proxies.trials(attempts)
        cost += Cost.of(trials, steps)
    return Line(first, proxy, tuned, tuple(trials), cost, entrant.figures)


def tried(proxies: Proxies, probe: Probe, steps: int) -> ProxyScore:
    """A candidate's best rate after so many steps."""
    while wanted := probe.wanted():
        found = proxies.trials([Attempt(probe.candidate, rate, steps) for rate in wanted])
        probe.trials.update(zip(wanted, found, strict=True))
    return probe.found
