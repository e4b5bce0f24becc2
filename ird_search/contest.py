"""The contest: everyone's learning rate is found alike, then come the fine-tunes that count.

1. A probe of rates under one seed, on the samples that choose.
2. The best rate and the next lower one again under another seed: the largest rate that one seed
   bears may be one that another does not.
3. Fresh seeds at the better of the two, on samples that no choice has seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from ird_search.candidate import AGAIN, Attempt, Candidate, ProxyScore, Trial
from ird_search.controls import Draw
from ird_search.proxy import Proxies

Name = TypeVar("Name", bound=str)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of one contestant.

    Args:
        first: what was drawn for seed 0, whose rate was found.
        probe: on the samples that choose, under seed 0; the best is the one at the rate chosen.
        again: under another seed, at the best rate and the next lower one.
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
    """A probe whose best is that of the rates tried again with the lowest mean score.

    A rate at which a fine-tune fails is out, unless all do.
    """
    first = {t.rate: t for t in probe.trials if t.ok}
    both = {t.rate: (first[t.rate].score + t.score) / 2 for t in again if t.ok}
    if not both:
        return probe
    return replace(probe, best=first[min(both, key=lambda rate: (both[rate], rate))])


def _again(
    draws: Sequence[Draw], probes: Sequence[ProxyScore], proxies: Proxies, steps: int
) -> list[tuple[Trial, ...]]:
    """The best rate of each and the next lower one that worked, under another seed."""
    wanted = []
    for draw, probe in zip(draws, probes, strict=True):
        rates = sorted(t.rate for t in probe.trials if t.ok and t.rate <= probe.best.rate)[-2:]
        one = draw(AGAIN)
        wanted.append([Attempt(one, r, steps, AGAIN) for r in rates] if len(rates) > 1 else [])
    return _each(proxies, wanted)


def _each(proxies: Proxies, wanted: Sequence[Sequence[Attempt]]) -> list[tuple[Trial, ...]]:
    """What became of several lists of attempts."""
    found = iter(proxies.trials([attempt for attempts in wanted for attempt in attempts]))
    return [tuple(next(found) for _ in attempts) for attempts in wanted]
