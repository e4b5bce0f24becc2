"""The contest: everyone's learning rate is found alike, then come the fine-tunes that count.

1. A probe of rates under one seed, on the samples that choose.
2. The best rate and its two neighbours again under two other seeds, and beyond an end while that is
   better: the mean over all three seeds decides. What one seed bears another may not, and of near
   ones the best under one seed is best by chance.
3. Fresh seeds at that rate, on samples that no choice has seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from ird_search.candidate import (
    AGAIN,
    Attempt,
    Candidate,
    Probe,
    ProxyScore,
    Trial,
    rates_around,
)
from ird_search.controls import Draw
from ird_search.proxy import Proxies

Name = TypeVar("Name", bound=str)

SEEDS = (0, *AGAIN)
"""Those whose mean decides between rates."""

MORE = 2
"""At most so many rates are tried again beyond the neighbours of the best."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of one contestant.

    Args:
        first: what was drawn for seed 0, whose rates were probed.
        probe: on the samples that choose, under seed 0; the best is the one at the rate chosen.
        again: the fine-tunes that confirmed it, under every seed of `SEEDS`.
        trials: those that count, one for each seed; none where the probe found no rate.
    """

    first: Candidate
    probe: ProxyScore
    again: tuple[Trial, ...]
    trials: tuple[Trial, ...]

    @property
    def failure(self) -> str:
        """Why there are no numbers; empty when there are."""
        return next((t.failure for t in (self.probe.best, *self.trials) if not t.ok), "")


def contest(
    draws: Mapping[Name, Draw], proxies: Proxies, *, steps: int, seeds: int
) -> dict[Name, Outcome]:
    """Fine-tunes of so many steps for everyone, each at a rate of its own.

    Rates are found at the length that counts: longer fine-tunes bear larger ones.
    """
    firsts = [draw(0) for draw in draws.values()]
    probes = proxies.scores(firsts, promote=1.0, steps=steps)
    again = _again(list(draws.values()), probes, proxies, steps)
    probes = [steadier(probe, trials) for probe, trials in zip(probes, again, strict=True)]
    wanted = [
        [Attempt(draw(s), probe.best.rate, steps, s, True) for s in range(1, seeds + 1)]
        if probe.best.ok
        else []
        for draw, probe in zip(draws.values(), probes, strict=True)
    ]
    outcomes = map(Outcome, firsts, probes, again, _each(proxies, wanted))
    return dict(zip(draws, outcomes, strict=True))


def steadier(probe: ProxyScore, again: Sequence[Trial]) -> ProxyScore:
    """A probe whose best is at the rate with the lowest mean score of those tried again.

    A rate at which a fine-tune fails is out, unless all do.
    """
    means = {rate: mean for rate, mean in _means(again).items() if mean.ok}
    if not means:
        return probe
    rate = min(means, key=lambda r: (means[r].score, r))
    return replace(probe, best=next(t for t in again if (t.rate, t.seed) == (rate, 0)))


def _again(
    draws: Sequence[Draw], probes: Sequence[ProxyScore], proxies: Proxies, steps: int
) -> list[tuple[Trial, ...]]:
    """Rates around the best of each, under every seed; none where a rate was given or all fail."""
    drawn = {
        i: [draw(s) for s in SEEDS]
        for i, (draw, probe) in enumerate(zip(draws, probes, strict=True))
        if len(probe.trials) > 1 and probe.best.ok
    }
    around = {
        i: Probe(ones[0], rates_around(probes[i].best.rate), more=MORE) for i, ones in drawn.items()
    }
    done: list[list[Trial]] = [[] for _ in draws]
    while wanted := [(i, rate) for i, probe in around.items() for rate in probe.wanted()]:
        attempts = [
            [Attempt(one, rate, steps, s) for one, s in zip(drawn[i], SEEDS, strict=True)]
            for i, rate in wanted
        ]
        for (i, rate), trials in zip(wanted, _each(proxies, attempts), strict=True):
            done[i] += trials
            around[i].trials[rate] = _means(trials)[rate]
    return [tuple(trials) for trials in done]


def _means(trials: Sequence[Trial]) -> dict[float, Trial]:
    """The mean score at each rate; a failure where one seed failed."""
    means = {}
    for rate in dict.fromkeys(t.rate for t in trials):
        same = [t for t in trials if t.rate == rate]
        failure = next((t.failure for t in same if not t.ok), "")
        score = 0.0 if failure else float(np.mean([t.score for t in same]))
        means[rate] = Trial(rate, 0, score, score, failure=failure)
    return means


def _each(proxies: Proxies, wanted: Sequence[Sequence[Attempt]]) -> list[tuple[Trial, ...]]:
    """What became of several lists of attempts."""
    found = iter(proxies.trials([attempt for attempts in wanted for attempt in attempts]))
    return [tuple(next(found) for _ in attempts) for attempts in wanted]
