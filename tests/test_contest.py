"""The contest: rates that another seed bears, and the same for everyone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from ird_search.candidate import AGAIN, Attempt, Candidate, ProxyScore, Trial, best_of
from ird_search.contest import contest, steadier
from ird_search.controls import random_mask
from ird_search.ledger import Ledger
from ird_search.proxy import Proxies
from tests.toy import toy_problem, toy_proxies


def trial(rate: float, score: float, seed: int = 0, failure: str = "") -> Trial:
    return Trial(rate, seed, score, score, {"accuracy": 0.5}, 0.0, failure)


def probe(*scores: float) -> ProxyScore:
    return best_of([trial(10.0**-i, s) for i, s in enumerate(scores)])


class Table(Proxies):
    """Proxies that answer by a formula and remember what was asked."""

    def __init__(self, answer: Callable[[Attempt], float | str], **settings: Any) -> None:
        problem, config = toy_problem(**{"learning_rate": None, **settings})
        super().__init__(problem, config, Ledger())
        self.answer, self.asked = answer, list[Attempt]()

    def trials(self, attempts: Sequence[Attempt]) -> list[Trial]:
        self.asked += attempts
        found = [self.answer(a) for a in attempts]
        return [
            trial(a.rate, 0.0, a.seed, x) if isinstance(x, str) else trial(a.rate, x, a.seed)
            for a, x in zip(attempts, found, strict=True)
        ]

    def drawn(self, s: int) -> Candidate:
        return Candidate("random", random_mask(self.problem.space, 4, 0, s), start=0.01)


def test_the_mean_over_seeds_decides() -> None:
    first = probe(0.30, 0.35, 0.9)  # at rates 1, 0.1, 0.01
    at = [trial(1.0, 0.30), trial(0.1, 0.35)]
    assert steadier(first, ()) is first
    unstable = [*at, trial(1.0, 0.8, -1), trial(0.1, 0.37, -1)]
    assert steadier(first, unstable).best == trial(0.1, 0.35)
    assert steadier(first, unstable).trials == first.trials
    steady = [*at, trial(1.0, 0.33, -1), trial(0.1, 0.37, -1)]
    assert steadier(first, steady).best == trial(1.0, 0.30)
    tied = [*at, trial(1.0, 0.40, -1), trial(0.1, 0.35, -1)]
    assert steadier(first, tied).best.rate == 0.1  # the lower one
    failed = [*at, trial(1.0, 0.0, -1, "it diverged"), trial(0.1, 0.7, -1)]
    assert steadier(first, failed).best.rate == 0.1
    both = [*at, *(trial(r, 0.0, -1, "it diverged") for r in (1.0, 0.1))]
    assert steadier(first, both) is first


def test_a_rate_that_only_one_seed_bears_is_not_taken() -> None:
    def answer(a: Attempt) -> float:
        if a.rate > 0.02:
            return 0.1 if a.seed == 0 else 0.9
        return 0.2 + abs(a.rate - 0.01)

    proxies = Table(answer)
    found = contest({"it": proxies.drawn}, proxies, steps=7, seeds=2)["it"]
    assert found.probe.best.rate == 0.01 and len(found.trials) == 2
    for seed in AGAIN:
        again = [a for a in proxies.asked if a.seed == seed]
        assert len({a.rate for a in again}) == len(again) >= 3
        assert not any(a.verdict for a in again)
        assert {a.candidate.mask for a in again} == {proxies.drawn(seed).mask}
    counted = [a for a in proxies.asked if a.verdict]
    assert [(a.seed, a.rate) for a in counted] == [(1, 0.01), (2, 0.01)]
    assert {a.steps for a in proxies.asked} == {7}


@pytest.mark.parametrize("best", [1e-3, 3.2e-3, 1e-1, 1.0])
def test_a_rate_that_one_seed_dislikes_is_found_by_the_others(best: float) -> None:
    """Seed 0 alone ends too low, whatever it is that the others want."""

    def answer(a: Attempt) -> float:
        wanted = best / 10 if a.seed == 0 else best
        return 0.2 + abs(math.log10(a.rate / wanted)) ** 2

    proxies = Table(answer)
    found = contest({"it": proxies.drawn}, proxies, steps=7, seeds=1)["it"]
    tried = sorted({a.rate for a in proxies.asked if a.seed in AGAIN})

    def mean(rate: float) -> float:
        ones = [answer(Attempt(proxies.drawn(s), rate, 7, s)) for s in (0, *AGAIN)]
        return sum(ones) / 3

    assert found.probe.best.rate == min(tried, key=mean)
    assert tried[0] < found.probe.best.rate < tried[-1]  # not an end


def test_what_fails_at_every_rate_runs_no_seed() -> None:
    proxies = Table(lambda a: "it diverged" if a.candidate.kind == "full" else 0.5)
    draws = {"full": lambda s: proxies.full(), "it": proxies.drawn}
    found = contest(draws, proxies, steps=7, seeds=2)
    assert found["full"].failure == "it diverged" and not found["full"].trials
    assert not found["it"].failure and len(found["it"].trials) == 2
    assert not any(a.verdict for a in proxies.asked if a.candidate.kind == "full")


def test_a_seed_that_fails_is_the_failure() -> None:
    proxies = Table(lambda a: "it diverged" if a.seed == 2 else 0.5)
    assert contest({"it": proxies.drawn}, proxies, steps=7, seeds=2)["it"].failure == "it diverged"


@pytest.mark.parametrize("rate", [None, 0.01])
def test_company_changes_nothing(rate: float | None) -> None:
    """One alone comes to the same as among others; a rate that is given is not tried again."""

    def losses(*kinds: str) -> torch.Tensor:
        proxies = toy_proxies(learning_rate=rate)
        draws = {k: (lambda s, k=k: getattr(proxies, k)()) for k in kinds}
        found = contest(draws, proxies, steps=4, seeds=2)["head_only"]
        assert bool(found.again) <= (rate is None)
        return torch.stack([t.losses for t in found.trials if t.losses is not None])

    assert torch.equal(losses("head_only"), losses("full", "head_only"))
