"""The verdict: sentences and intervals by hand, controls that are drawn as they should be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from scipy import stats

from ird_search import verdict as module
from ird_search.budgets import Budgets
from ird_search.candidate import Attempt, Candidate, Kind, Trial
from ird_search.fisher import FisherMatrix, make_engine
from ird_search.ledger import Ledger
from ird_search.mask import SparseMask
from ird_search.narrowing import fish_mask
from ird_search.proxy import Proxies
from ird_search.report import explained, text_table
from ird_search.samples import SampleSet
from ird_search.search import Pair, Scored
from ird_search.verdict import Entry, Verdict, fish_samples, give_verdict
from tests.toy import scored, toy_mask, toy_problem

KINDS: tuple[Kind, ...] = ("ird", "fish", "random", "full", "head")


def entry(kind: Kind, *losses: float, failure: str = "") -> Entry:
    return Entry(kind, 8, 0.1, 5, 1e-3, 0.5, losses, 0.9, failure)


def judged(ours: tuple[float, ...], theirs: tuple[float, ...], failure: str = "") -> Verdict:
    return Verdict((entry("ird", *ours), entry("random", *theirs, failure=failure)), "accuracy", 20)


class Spied(Proxies):
    """Proxies that answer from a table and remember what was asked."""

    def __init__(self, answer: Callable[[Candidate, bool], float | str]) -> None:
        problem, config = toy_problem()
        super().__init__(problem, config, Ledger())
        self.answer = answer
        self.asked: list[tuple[Candidate, float, int, bool]] = []

    def trials(self, attempts: Sequence[Attempt]) -> list[Trial]:
        return [self._answered(a) for a in attempts]

    def _answered(self, a: Attempt) -> Trial:
        self.asked.append((a.candidate, a.rate, a.seed, a.verdict))
        found = self.answer(a.candidate, a.verdict)
        if isinstance(found, str):
            return Trial(a.rate, a.seed, 0.0, 0.0, {}, 0.0, found)
        return Trial(a.rate, a.seed, found + a.seed / 100, found, {"accuracy": found}, 0.0)

    def asked_of(self, kind: Kind, *, verdict: bool) -> list[tuple[Candidate, float, int]]:
        return [(c, r, s) for c, r, s, v in self.asked if c.kind == kind and v == verdict]


def give(proxies: Proxies, *, seeds: int = 3, seed: int = 0) -> tuple[Verdict, FisherMatrix]:
    """The verdict on a mask of four parameters from rows 1, 3 and 5 of a pool of twelve."""
    p = proxies.problem
    pool = p.train.select(range(12))
    engine = make_engine(p.model, p.task, p.space, example=pool.batch([0, 1]))
    fisher = FisherMatrix(engine, pool, p.space)
    mask = toy_mask(p, 0, 3, 9, 35)
    pair = Pair(torch.tensor([1, 3, 5]), None, mask.coords)
    winner = Scored("both", pair, mask, scored(0.4, rate=0.02))

    def fish(s: int) -> SparseMask:
        samples = fish_samples(winner, p.train, seed=seed, s=s)
        return fish_mask(fisher, samples, mask.count, Budgets.of(p.space, ()))

    return give_verdict(winner, fish, proxies, seeds=seeds, seed=seed), fisher


# --- in words -----------------------------------------------------------------------------------


def test_better() -> None:
    said = judged((0.50, 0.51, 0.49), (0.70, 0.72, 0.68)).sentence()
    gain, width = 0.2, stats.t.ppf(0.975, 2) * 0.01 / math.sqrt(3)
    assert said == (
        f"Better than a random mask of the same size by {gain:.4f} ± {width:.4f} in held-out loss "
        "(3 seeds)."
    )


def test_worse() -> None:
    said = judged((0.70, 0.72, 0.68), (0.50, 0.51, 0.49)).sentence()
    assert said.startswith("Worse than a random mask of the same size by 0.2000 ± ")


def test_no_better() -> None:
    said = judged((0.5, 0.6, 0.7), (0.6, 0.55, 0.75)).sentence()
    assert said.startswith("No better than a random mask of the same size here: difference +0.0333")
    same = judged((0.5, 0.6), (0.5, 0.6)).sentence()
    assert "difference +0.0000 ± 0.0000 in held-out loss (2 seeds)." in same


def test_one_seed_says_nothing() -> None:
    said = judged((0.5,), (0.6,)).sentence()
    assert said == (
        "One seed cannot tell the mask from a random mask of the same size (difference +0.1000 in "
        "loss)."
    )
    assert judged((0.5,), (0.6,)).against("random")[1] == float("inf")


def test_a_failed_side_says_nothing_but_why() -> None:
    said = judged((0.5, 0.6), (), "Training diverged at step 3: the loss is nan.").sentence()
    assert said == (
        "Nothing can be said against a random mask of the same size: Training diverged at step 3: "
        "the loss is nan."
    )
    ours = Verdict((entry("ird", failure="it diverged"), entry("fish", 0.5, 0.6)), "accuracy", 20)
    assert ours.sentence("fish").endswith("(random samples): it diverged.")
    gain, width = ours.against("fish")
    assert math.isnan(gain) and math.isinf(width) and math.isnan(ours.noise)


@pytest.mark.parametrize("kind", KINDS)
def test_every_control_has_its_sentence(kind: Kind) -> None:
    verdict = Verdict(tuple(entry(k, 0.5, 0.6, 0.5) for k in KINDS), "accuracy", 20)
    assert f" {module.OTHERS[kind]} " in verdict.sentence(kind)


def test_the_interval_is_students_over_paired_seeds() -> None:
    ours, theirs = (0.41, 0.52, 0.47, 0.45), (0.55, 0.56, 0.50, 0.61)
    gain, width = judged(ours, theirs).against("random")
    assert gain == pytest.approx(np.mean(np.array(theirs) - np.array(ours)))
    interval = stats.ttest_rel(theirs, ours).confidence_interval(0.95)
    assert (gain - width, gain + width) == pytest.approx((interval.low, interval.high))


def test_noise_is_the_winners_spread() -> None:
    verdict = judged((0.4, 0.5, 0.9), (0.6, 0.6, 0.6))
    assert verdict.noise == pytest.approx(np.std([0.4, 0.5, 0.9], ddof=1))
    assert verdict["random"].loss == pytest.approx(0.6)
    assert math.isnan(entry("ird", 0.5).spread) and math.isnan(entry("ird").loss)


# --- how the controls are drawn -----------------------------------------------------------------


def test_winner_and_controls_are_tried_alike() -> None:
    proxies = Spied(lambda candidate, verdict: 0.5)
    verdict, _ = give(proxies)
    assert [e.kind for e in verdict.entries] == list(KINDS)
    for kind in KINDS:
        on_other_samples = proxies.asked_of(kind, verdict=True)
        assert [seed for _, _, seed in on_other_samples] == [1, 2, 3]
        assert {seed for _, _, seed in proxies.asked_of(kind, verdict=False)} <= {0}
        rates = {rate for _, rate, _ in on_other_samples}
        assert rates == {verdict[kind].rate} == {0.02 if kind == "ird" else 0.01}
        assert verdict[kind].losses == pytest.approx((0.51, 0.52, 0.53))
    assert proxies.asked_of("ird", verdict=False) == []  # the search's own proxy stands


def test_a_random_mask_differs_from_seed_to_seed() -> None:
    proxies = Spied(lambda candidate, verdict: 0.5)
    give(proxies)
    drawn = [c.mask for c, _, _ in proxies.asked_of("random", verdict=True)]
    drawn += [c.mask for c, _, _ in proxies.asked_of("random", verdict=False)]
    assert len({m.digest for m in drawn}) == 4 and {m.count for m in drawn} == {4}
    again, other = (Spied(lambda c, v: 0.5) for _ in range(2))
    give(again)
    give(other, seed=1)
    first = [c.mask.digest for c, _, _ in proxies.asked_of("random", verdict=True)]
    assert [c.mask.digest for c, _, _ in again.asked_of("random", verdict=True)] == first
    assert [c.mask.digest for c, _, _ in other.asked_of("random", verdict=True)] != first


def test_fish_draws_its_rows_from_the_training_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[SampleSet] = []
    on = FisherMatrix.on

    def spy(self: FisherMatrix, samples: SampleSet) -> FisherMatrix:
        seen.append(samples)
        return on(self, samples)

    monkeypatch.setattr(FisherMatrix, "on", spy)
    proxies = Spied(lambda candidate, verdict: 0.5)
    _, fisher = give(proxies)
    train = set(proxies.problem.train.ids.tolist())
    assert [len(s) for s in seen] == [3, 3, 3, 3]  # as many rows as the winner's
    assert all(set(s.ids.tolist()) <= train for s in seen)
    assert len({tuple(s.ids.tolist()) for s in seen}) == 4
    for samples, (candidate, _, _) in zip(
        seen[1:], proxies.asked_of("fish", verdict=True), strict=True
    ):
        mean = on(fisher, samples).marginals().columns
        assert set(candidate.mask.coords.tolist()) == set(mean.topk(4).indices.tolist())


def test_counts_and_densities_of_the_table() -> None:
    verdict, _ = give(Spied(lambda candidate, verdict: 0.5))
    assert [e.parameters for e in verdict.entries] == [4, 4, 4, 40, 0]
    assert [e.density for e in verdict.entries] == [0.1, 0.1, 0.1, 1.0, 0.0]
    assert [e.samples for e in verdict.entries] == [3, 3, None, None, None]
    assert verdict.samples == 10 and verdict.metric_name == "accuracy"


@pytest.mark.parametrize("late", [False, True])
def test_a_failed_control_is_shown_with_its_reason(late: bool) -> None:
    """It fails at every rate, or only under another seed."""

    def answer(candidate: Candidate, verdict: bool) -> float | str:
        return "Training diverged" if candidate.kind == "random" and verdict >= late else 0.5

    proxies = Spied(answer)
    verdict, _ = give(proxies)
    failed = verdict["random"]
    assert failed.failure == "Training diverged" and failed.losses == ()
    assert len(proxies.asked_of("random", verdict=True)) == (3 if late else 0)
    table = text_table(verdict).splitlines()
    (line,) = [line for line in table if line.startswith("random mask")]
    assert "failed" in line and "Training diverged" in line
    assert "Nothing can be said against a random mask" in explained(verdict)
    assert math.isfinite(verdict["full"].loss)
