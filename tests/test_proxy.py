"""Proxies: each at rates of its own, the better half at length, all from one start."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from ird_search.candidate import (
    LOWEST_RATE,
    Attempt,
    Candidate,
    Probe,
    ProxyScore,
    Trial,
    rate_at,
    rates_around,
)
from ird_search.errors import NoProxySucceeded
from ird_search.ledger import Ledger
from ird_search.proxy import Proxies
from tests.toy import (
    bits,
    same_bits,
    toy_candidates,
    toy_mask,
    toy_proxies,
    with_everything,
)


def untimed(trial: Trial) -> Trial:
    return replace(trial, seconds=0.0)


class Scripted(Proxies):
    """Proxies whose trials answer from a function of what is attempted."""

    def __init__(self, answer: Callable[[Attempt], float | None], **settings: Any) -> None:
        real = toy_proxies(**settings)
        super().__init__(real.problem, real.config, Ledger())
        self.answer, self.asked = answer, list[Attempt]()

    def trials(self, attempts: Sequence[Attempt]) -> list[Trial]:
        return [self._answered(a) for a in attempts]

    def _answered(self, a: Attempt) -> Trial:
        self.asked.append(a)
        found = self.answer(a)
        failure = "" if found else "diverged"
        return Trial(a.rate, a.seed, found or 0.0, found or 0.0, {}, 1.0, failure)

    def tried(self, candidate: Candidate, steps: int) -> list[float]:
        """The rates of a candidate at one budget, in their order."""
        return [a.rate for a in self.asked if a.candidate is candidate and a.steps == steps]


def test_the_order_of_scoring_does_not_matter() -> None:
    forward, backward, again = (toy_proxies(with_everything()) for _ in range(3))
    first = [untimed(forward.score(c).best) for c in toy_candidates(forward)]
    last = [untimed(backward.score(c).best) for c in reversed(toy_candidates(backward))]
    torch.manual_seed(1234)  # the caller's random state is no part of it
    assert first == last[::-1] == [untimed(again.score(c).best) for c in toy_candidates(again)]
    assert len({t.loss for t in first}) == 3  # and the masks do differ


# --- learning rates -----------------------------------------------------------------------------


def probe(answer: Callable[[float], float | None], start: float = 0.01) -> tuple[list[float], Any]:
    proxies = Scripted(lambda a: answer(a.rate), learning_rate=None)
    candidate = Candidate("ird", toy_mask(proxies.problem, 0), start=start)
    found = proxies.score(candidate)
    tried = proxies.tried(candidate, proxies.config.proxy_steps)
    assert [t.rate for t in found.trials] == sorted(tried) and len(proxies.asked) == len(tried)
    return tried, found


def test_three_rates_a_factor_of_three_apart() -> None:
    tried, found = probe(lambda rate: 0.1 + abs(rate - 0.01))
    assert sorted(tried) == pytest.approx([0.0032, 0.01, 0.032])
    assert found.best.rate == 0.01 and found.seconds == 3.0


def test_the_probe_goes_on_past_an_end_while_that_is_better() -> None:
    tried, found = probe(lambda rate: abs(rate - 0.1) + 0.1)
    assert tried == pytest.approx([0.0032, 0.01, 0.032, 0.1, 0.32]) and found.best.rate == 0.1
    tried, found = probe(lambda rate: rate)  # ever smaller is ever better: at most three more
    assert sorted(tried) == pytest.approx([1e-4, 3.2e-4, 1e-3, 3.2e-3, 0.01, 0.032])
    tried, found = probe(lambda rate: 1 / rate)
    assert max(tried) == pytest.approx(1.0) and found.best.rate == max(tried) and len(tried) == 6


def test_rates_that_diverge_send_the_probe_down() -> None:
    tried, found = probe(lambda rate: 0.5 - rate if rate < 0.001 else None)
    assert found.best.ok and found.best.rate == pytest.approx(3.2e-4)
    assert sum(not t.ok for t in found.trials) == len(tried) - 2


def test_when_all_diverge_the_score_is_infinite() -> None:
    tried, found = probe(lambda rate: None)
    assert found.score == float("inf") and len(tried) == 6 and not found.best.ok


def test_no_rate_is_tried_at_which_nothing_is_trained() -> None:
    rates, found = probe(lambda rate: rate, start=1e-5)
    assert rates[-1] == LOWEST_RATE == min(rates) and found.best.rate == LOWEST_RATE
    assert rates_around(LOWEST_RATE) == [LOWEST_RATE, rate_at(LOWEST_RATE, 1)]
    assert Probe.around(Candidate("ird", toy_proxies().head_only().mask, start=1e-9)).wanted() == [
        LOWEST_RATE
    ]
    rates, found = probe(lambda rate: None, start=3e-6)
    assert min(rates) == LOWEST_RATE and not found.best.ok


def test_a_fixed_rate_is_the_only_one() -> None:
    proxies = Scripted(lambda a: 1.0, learning_rate=0.007)
    proxies.score(Candidate("random", toy_mask(proxies.problem, 0)))
    assert [(a.rate, a.steps) for a in proxies.asked] == [(0.007, 3)]


def test_without_a_head_the_head_alone_is_scored_once() -> None:
    proxies = toy_proxies(learning_rate=None, head=[])
    before = bits(proxies.problem.model)
    found = proxies.warm_up()
    assert len(found.trials) == 1 and same_bits(before, proxies.problem.model)


def test_random_masks_begin_at_a_larger_rate() -> None:
    problem = toy_proxies().problem
    sparse, dense = toy_mask(problem, 0), toy_mask(problem, *range(16))
    for kind in ("ird", "random"):
        assert Candidate(kind, sparse).start_rate() >= Candidate(kind, dense).start_rate()
    assert Candidate("random", sparse).start_rate() > Candidate("ird", sparse).start_rate()
    ratio = Candidate("random", sparse).start_rate() / Candidate("random", dense).start_rate()
    assert ratio == pytest.approx(4)  # 1/√density


SHORT, LONG = 10, 40
BUDGETS: dict[str, Any] = {"probe_steps": SHORT, "proxy_steps": LONG, "learning_rate": None}


# --- budgets ------------------------------------------------------------------------------------


def masks(proxies: Proxies, *sizes: int) -> list[Candidate]:
    """A mask of each size."""
    return [Candidate("ird", toy_mask(proxies.problem, *range(n)), start=0.01) for n in sizes]


def by_size(scores: dict[int, float | None], rate: float = 0.01) -> Callable[[Attempt], Any]:
    """A score for each size of mask, at its best at a rate."""

    def answer(a: Attempt) -> float | None:
        score = scores[a.candidate.count]
        return None if score is None else score + abs(math.log(a.rate / rate))

    return answer


def test_all_are_tried_shortly_and_the_better_half_at_length() -> None:
    proxies = Scripted(by_size({1: 0.5, 2: 0.3, 3: 0.4, 4: 0.6}), **BUDGETS)
    some = masks(proxies, 1, 2, 3, 4)
    found = proxies.scores(some)
    assert [f.short for f in found] == [True, False, False, True]
    for candidate in some:
        assert sorted(proxies.tried(candidate, SHORT)) == [0.0032, 0.01, 0.032]
    for candidate in some[1:3]:
        assert proxies.tried(candidate, LONG) == [0.01, 0.032]
    assert proxies.tried(some[0], LONG) == proxies.tried(some[3], LONG) == []
    steps = [a.steps for a in proxies.asked]
    assert steps == sorted(steps)  # no long one before the last short one
    assert [len(f.trials) for f in found] == [3, 2, 2, 3]
    assert [len(f.probes) for f in found] == [0, 3, 3, 0]
    assert min(found, key=lambda f: f.order) is found[1] and found[1].seconds == 5.0


def test_a_long_run_ranks_before_a_short_one_and_a_failed_one_last() -> None:
    ok, bad = Trial(0.1, 0, 0.5, 0.5), Trial(0.1, 0, 0.0, 0.0, failure="diverged")
    better = replace(ok, score=0.1)
    ranked = [
        ProxyScore(ok, (ok,)),
        ProxyScore(better, (better,), short=True),
        ProxyScore(ok, (ok,), short=True),
        ProxyScore(bad, (bad,)),
        ProxyScore(bad, (bad,), short=True),
    ]
    assert sorted(reversed(ranked), key=lambda f: f.order) == ranked


def test_a_longer_run_that_diverges_falls_back() -> None:
    """What a short one got through may end a long one; then lower rates are tried."""

    def answer(a: Attempt) -> float | None:
        return None if a.steps == LONG and a.rate > 2e-3 else 1 + abs(math.log(a.rate / 0.01))

    proxies = Scripted(answer, **BUDGETS)
    one, two = masks(proxies, 1, 2)
    found, _ = proxies.scores([one, two])
    assert proxies.tried(one, LONG) == [0.01, 0.032, 0.0032, 0.001]
    assert not found.short and found.best.ok and found.best.rate == 0.001


def test_longer_runs_find_a_rate_of_their_own() -> None:
    at_length = by_size({1: 0.5, 2: 0.3}, rate=0.1)
    shortly = by_size({1: 0.5, 2: 0.3})
    proxies = Scripted(lambda a: (at_length if a.steps == LONG else shortly)(a), **BUDGETS)
    one, two = masks(proxies, 1, 2)
    _, found = proxies.scores([one, two])
    assert proxies.tried(two, LONG) == [0.01, 0.032, 0.1, 0.32]
    assert found.best.rate == 0.1 and [t.rate for t in found.probes] == [0.0032, 0.01, 0.032]


@pytest.mark.parametrize(("count", "promote", "kept"), [(3, 0.5, 2), (4, 0.25, 1), (5, 0.5, 3)])
def test_ties_at_the_cut_go_to_fewer_parameters(count: int, promote: float, kept: int) -> None:
    proxies = Scripted(lambda a: 1.0, **BUDGETS)
    some = masks(proxies, *range(count, 0, -1))
    found = proxies.scores(some, promote=promote)
    assert [f.short for f in found] == [True] * (count - kept) + [False] * kept
    alike = [masks(proxies, 2)[0] for _ in range(count)]  # then to the earlier
    found = proxies.scores(alike, promote=promote)
    assert [f.short for f in found] == [False] * kept + [True] * (count - kept)


@pytest.mark.parametrize(
    ("settings", "promote"),
    [({}, 1.0), ({"probe_steps": LONG}, 0.5)],
)
def test_there_is_one_budget_where_a_second_would_decide_nothing(
    settings: dict[str, Any], promote: float
) -> None:
    proxies = Scripted(by_size({1: 0.5, 2: 0.3, 3: 0.4}), **{**BUDGETS, **settings})
    found = proxies.scores(masks(proxies, 1, 2, 3), promote=promote)
    assert [a.steps for a in proxies.asked] == [LONG] * 9
    assert not any(f.short or f.probes for f in found)


def test_a_fixed_rate_is_one_fine_tune_a_budget() -> None:
    proxies = Scripted(by_size({1: 0.5, 2: 0.3}), **{**BUDGETS, "learning_rate": 0.02})
    found = proxies.scores(masks(proxies, 1, 2))
    asked = [(a.candidate.count, a.rate, a.steps) for a in proxies.asked]
    assert asked == [(1, 0.02, SHORT), (2, 0.02, SHORT), (2, 0.02, LONG)]
    assert [f.short for f in found] == [True, False]


def test_one_that_fails_at_every_rate_goes_no_further() -> None:
    proxies = Scripted(by_size({1: None, 2: 0.3, 3: None, 4: None}), **BUDGETS)
    some = masks(proxies, 1, 2, 3, 4)
    found = proxies.scores(some)
    assert [f.short for f in found] == [True, False, True, True]
    assert [f.best.ok for f in found] == [False, True, False, False]
    assert len(proxies.tried(some[0], SHORT)) == 6 and proxies.tried(some[0], LONG) == []


def test_where_all_fail_as_many_as_ever_go_on_and_tell_why() -> None:
    proxies = Scripted(lambda a: None, **BUDGETS)
    found = proxies.scores(masks(proxies, 4, 3, 2, 1))
    assert [f.short for f in found] == [True, True, False, False]
    assert all(f.best.failure == "diverged" and f.score == float("inf") for f in found)


def test_a_diverging_rate_is_recorded_and_the_next_one_tried() -> None:
    proxies = toy_proxies(with_everything(), learning_rate=None)
    mask = toy_mask(proxies.problem, *range(40, 120))
    found = proxies.score(Candidate("ird", mask, start=1e36))
    assert [t.ok for t in found.trials] == [False] * 6 and found.score == float("inf")
    assert all("diverged" in t.failure for t in found.trials)
    assert proxies.score(Candidate("ird", mask, start=0.01)).best.ok


# --- where all start from -----------------------------------------------------------------------


def test_the_warm_up_trains_the_head_and_nothing_else() -> None:
    proxies = toy_proxies()
    model = proxies.problem.model
    before, cold = bits(model), toy_proxies().score(toy_candidates(proxies)[0])
    proxies.warm_up()
    changed = [n for n, old in before.items() if not torch.equal(old, model.state_dict()[n])]
    assert changed == list(proxies.problem.head) == ["2.weight", "2.bias"]
    assert proxies.score(toy_candidates(proxies)[0]).best.loss != cold.best.loss


def test_a_head_that_cannot_be_trained_ends_the_search() -> None:
    proxies = toy_proxies(learning_rate=3e37)
    before = bits(proxies.problem.model)
    with pytest.raises(NoProxySucceeded, match=r"head only, rate 3e\+37: Training diverged"):
        proxies.warm_up()
    assert same_bits(before, proxies.problem.model)


def test_the_scoring_point_depends_on_no_rate_of_the_head() -> None:
    """What is kept of a Fisher pass is not addressed by it."""
    one, other = (toy_proxies(head_learning_rate=r).advanced(3).tensors() for r in (0.003, 0.3))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
