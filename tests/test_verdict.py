"""The verdict: sentences and intervals by hand, and everybody treated alike."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from ird_search import verdict as module
from ird_search.candidate import AGAIN, LOWEST_RATE, Attempt, Candidate, Kind, Trial
from ird_search.config import Control
from ird_search.controls import Controls, random_mask
from ird_search.ledger import Ledger
from ird_search.pair import Pair, Scored
from ird_search.paired import Gain, crossed, samples_needed
from ird_search.proxy import Proxies
from ird_search.report import INTERVALS, explained, text_table, verdict_record
from ird_search.settings import choices
from ird_search.verdict import Entry, Verdict, give_verdict, too_few
from tests.toy import scored, toy_mask, toy_problem

KINDS: tuple[Kind, ...] = ("ird", "fish", "random", "full", "head")
EVERY: tuple[Kind, ...] = ("ird", *choices(Control))
HARD = torch.linspace(-0.4, 0.4, 9, dtype=torch.float64)
"""How much harder each of nine held-out samples is than their mean, for everyone."""


def entry(kind: Kind, *losses: float, failure: str = "") -> Entry:
    by_sample = torch.tensor(losses, dtype=torch.float64)[:, None] + HARD
    numbers = None if failure else by_sample
    return Entry(kind, 8, 0.1, 5, 1e-3, 0.5, losses, 0.9, failure, numbers)


def judged(ours: tuple[float, ...], theirs: tuple[float, ...], failure: str = "") -> Verdict:
    return Verdict((entry("ird", *ours), entry("random", *theirs, failure=failure)), "accuracy", 20)


class Spied(Proxies):
    """Proxies that answer from a table and remember what was asked."""

    def __init__(self, answer: Callable[[Candidate, bool], float | str], **settings: Any) -> None:
        problem, config = toy_problem(**settings)
        super().__init__(problem, config, Ledger())
        self.answer = answer
        self.asked: list[Attempt] = []

    def trials(self, attempts: Sequence[Attempt]) -> list[Trial]:
        return [self._answered(a) for a in attempts]

    def _answered(self, a: Attempt) -> Trial:
        self.asked.append(a)
        found = self.answer(a.candidate, a.verdict)
        if isinstance(found, str):
            return Trial(a.rate, a.seed, 0.0, 0.0, {}, 0.0, found)
        loss = found + a.seed / 100
        return Trial(a.rate, a.seed, loss, found, {"accuracy": found}, losses=loss + HARD.float())

    def asked_of(self, kind: Kind, *, verdict: bool) -> list[Attempt]:
        return [a for a in self.asked if a.candidate.kind == kind and a.verdict == verdict]


def give(proxies: Proxies, *, seeds: int = 3) -> Verdict:
    """The verdict on a mask of four parameters from rows 1, 3 and 5 of a pool."""
    space, mask = proxies.problem.space, toy_mask(proxies.problem, 0, 3, 9, 35)
    pair = Pair(torch.tensor([1, 3, 5]), None, mask.coords)
    winner = Scored("both", pair, mask, scored(0.4, rate=0.02))
    controls = Controls(
        {
            "fish": lambda s: Candidate("fish", toy_mask(proxies.problem, 1, 2, s + 5, 30), 3),
            "random": lambda s: Candidate("random", random_mask(space, 4, 0, s)),
            "full": lambda s: proxies.full(),
            "head": lambda s: proxies.head_only(),
        },
        {"lora": "there is no PEFT"},
    )
    return give_verdict(winner, controls, proxies, seeds=seeds)


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
    assert judged((0.5,), (0.6,)).against("random").half_width == float("inf")
    told = [explained(judged((0.5,) * n, (0.6,) * n)) for n in (1, 2)]
    assert [INTERVALS in text for text in told] == [False, True]


def test_a_failed_side_says_nothing_but_why() -> None:
    said = judged((0.5, 0.6), (), "Training diverged at step 3: the loss is nan.").sentence()
    assert said == (
        "Nothing can be said against a random mask of the same size: Training diverged at step 3: "
        "the loss is nan."
    )
    ours = Verdict((entry("ird", failure="it diverged"), entry("fish", 0.5, 0.6)), "accuracy", 20)
    assert ours.sentence("fish").endswith("(random samples): it diverged.")
    gain = ours.against("fish")
    assert math.isnan(gain.mean) and math.isinf(gain.half_width) and math.isnan(ours.noise)


def test_a_control_that_is_not_there() -> None:
    alone = Verdict((entry("ird", 0.5, 0.6),), "accuracy", 20)
    assert alone.sentence() == "Nothing was compared with a random mask of the same size."
    assert "random" not in alone and not alone.better and alone.against("random").tied
    assert "random mask" not in explained(alone)


@pytest.mark.parametrize("kind", EVERY[1:])
def test_every_control_has_its_sentence(kind: Kind) -> None:
    verdict = Verdict(tuple(entry(k, 0.5, 0.6, 0.5) for k in EVERY), "accuracy", 20)
    assert f" {module.OTHERS[kind]} " in verdict.sentence(kind)
    records = {r["kind"]: r for r in verdict_record(verdict)}
    assert records[kind]["sentence"] == verdict.sentence(kind) and "sentence" not in records["ird"]
    assert (records[kind]["gain"], records[kind]["half_width"]) == (0, 0)
    assert module.NAMES[kind] in text_table(verdict)


def test_the_interval_is_students_over_paired_seeds_where_all_samples_agree() -> None:
    ours, theirs = (0.41, 0.52, 0.47, 0.45), (0.55, 0.56, 0.50, 0.61)
    gain = judged(ours, theirs).against("random")
    assert gain.mean == pytest.approx(np.mean(np.array(theirs) - np.array(ours)))
    interval = stats.ttest_rel(theirs, ours).confidence_interval(0.95)
    assert (gain.mean - gain.half_width, gain.mean + gain.half_width) == pytest.approx(
        (interval.low, interval.high)
    )


def test_the_interval_covers_the_samples_too() -> None:
    ours, theirs = torch.rand(3, 20), torch.rand(3, 20) + 0.1
    lines = (
        Entry("ird", 8, 0.1, 5, 1e-3, 0.5, (0.5,) * 3, 0.9, by_sample=ours),
        Entry("random", 8, 0.1, 5, 1e-3, 0.5, (0.6,) * 3, 0.9, by_sample=theirs),
    )
    assert Verdict(lines, "accuracy", 20).against("random") == crossed(ours, theirs)


def test_noise_is_the_winners_spread() -> None:
    verdict = judged((0.4, 0.5, 0.9), (0.6, 0.6, 0.6))
    assert verdict.noise == pytest.approx(np.std([0.4, 0.5, 0.9], ddof=1))
    assert verdict["random"].loss == pytest.approx(0.6)
    assert math.isnan(entry("ird", 0.5).spread) and math.isnan(entry("ird").loss)


@pytest.mark.parametrize(
    ("random", "shuffle", "said"),
    [
        (0.7, 0.5, "The allocation among tensors explains the gain"),
        (0.7, 0.4, "The allocation among tensors explains the gain"),
        (0.7, 0.6, "Which entries are selected matters"),
        (0.5, 0.5, ""),  # no gain to explain
        (0.4, 0.6, ""),
    ],
)
def test_whether_the_allocation_explains_the_gain(random: float, shuffle: float, said: str) -> None:
    found = {"ird": 0.5, "random": random, "shuffle": shuffle}
    entries = tuple(entry(k, v, v + 0.01, v) for k, v in found.items())  # type: ignore[arg-type]
    verdict = Verdict(entries, "accuracy", 20)
    assert verdict.allocation.startswith(said) and bool(verdict.allocation) == bool(said)
    assert verdict.sentence("shuffle") in explained(verdict)
    assert verdict.allocation in explained(verdict)
    without = Verdict(entries[:2], "accuracy", 20)
    assert without.allocation == ""


def test_no_better_than_random_is_said_first() -> None:
    worse, better = judged((0.5, 0.6), (0.5, 0.6)), judged((0.5, 0.51), (0.9, 0.91))
    assert explained(worse).startswith("No better than a random mask")
    assert explained(worse).count(worse.sentence()) == 1
    assert not explained(better).startswith("Better") and better.sentence() in explained(better)


def test_a_rate_at_which_nothing_is_trained_is_no_word_on_parameters() -> None:
    verdict = judged((0.5, 0.6), (0.5, 0.6))
    ours = replace(verdict["ird"], rate=LOWEST_RATE)
    idle = replace(verdict, entries=(ours, *verdict.entries[1:]))
    assert verdict.idle == "" and "best without the mask: at its best rate, 1e-06" in idle.idle
    assert idle.idle in explained(idle)
    assert idle.idle not in explained(idle, fixed_rate=1e-6)  # nobody chose it


# --- everybody alike ----------------------------------------------------------------------------


def test_winner_and_controls_are_tried_alike() -> None:
    class Rising(Spied):
        """The larger the rate, the better, by a little."""

        def _answered(self, a: Attempt) -> Trial:
            found = super()._answered(a)
            return found if a.verdict else replace(found, score=-a.rate)

    proxies = Rising(lambda candidate, verdict: 0.5, learning_rate=None, verdict_steps=7)
    verdict = give(proxies)
    assert [e.kind for e in verdict.entries] == list(KINDS)
    for kind in KINDS:
        probed, unseen = (proxies.asked_of(kind, verdict=v) for v in (False, True))
        assert [a.seed for a in unseen] == [1, 2, 3] and {a.steps for a in unseen} == {7}
        # it goes up as far as it may, twice
        assert Counter(a.seed for a in probed) == {0: 6 + 5, **dict.fromkeys(AGAIN, 5)}
        assert {a.steps for a in probed} == {7}  # rates are found at that length
        assert {a.rate for a in unseen} == {verdict[kind].rate}
        assert verdict[kind].losses == pytest.approx((0.51, 0.52, 0.53))
        assert verdict[kind].by_sample is not None and verdict[kind].by_sample.shape == (3, 9)
    assert {a.rate for a in proxies.asked_of("ird", verdict=False)} >= {0.01, 0.032}  # around 0.02


def test_each_line_has_the_rate_that_suits_it() -> None:
    def best_at(a: Attempt, rate: float) -> Trial:
        loss = 1 + abs(math.log(a.rate / rate))
        return Trial(a.rate, a.seed, loss, loss, {"accuracy": 0.5}, losses=torch.ones(2))

    class Tuned(Spied):
        def _answered(self, a: Attempt) -> Trial:
            return best_at(a, {"random": 0.1, "fish": 0.001}.get(a.candidate.kind, 0.01))

    verdict = give(Tuned(lambda candidate, verdict: 0.5, learning_rate=None))
    rates = {e.kind: e.rate for e in verdict.entries}
    assert rates == {"ird": 0.01, "fish": 0.001, "random": 0.1, "full": 0.01, "head": 0.01}


def test_controls_are_drawn_anew_for_each_seed() -> None:
    proxies = Spied(lambda candidate, verdict: 0.5)
    give(proxies)
    for kind, masks in (("random", 4), ("fish", 4), ("ird", 1), ("full", 1)):
        drawn = [a for v in (False, True) for a in proxies.asked_of(kind, verdict=v)]  # type: ignore[arg-type]
        assert len({a.candidate.mask.digest for a in drawn}) == masks


def test_counts_and_densities_of_the_table() -> None:
    verdict = give(Spied(lambda candidate, verdict: 0.5))
    assert [e.parameters for e in verdict.entries] == [4, 4, 4, 40, 0]
    assert [e.density for e in verdict.entries] == [0.1, 0.1, 0.1, 1.0, 0.0]
    assert [e.samples for e in verdict.entries] == [3, 3, None, None, None]
    assert verdict.samples == 10 and verdict.metric_name == "accuracy"
    assert "Not compared with LoRA of the same size: there is no PEFT." in explained(verdict)


@pytest.mark.parametrize("late", [False, True])
def test_a_failed_control_is_shown_with_its_reason(late: bool) -> None:
    """It fails at every rate, or only under another seed."""

    def answer(candidate: Candidate, verdict: bool) -> float | str:
        return "Training diverged" if candidate.kind == "random" and verdict >= late else 0.5

    proxies = Spied(answer)
    verdict = give(proxies)
    failed = verdict["random"]
    assert failed.failure == "Training diverged"
    assert failed.losses == () and failed.by_sample is None
    assert len(proxies.asked_of("random", verdict=True)) == (3 if late else 0)
    table = text_table(verdict).splitlines()
    (line,) = [line for line in table if line.startswith("random mask")]
    assert "failed" in line and "Training diverged" in line
    assert "Nothing can be said against a random mask" in explained(verdict)
    assert math.isfinite(verdict["full"].loss)


# --- whether there is enough data -----------------------------------------------------------------


def test_too_few_held_out_samples_are_told_with_the_number_needed() -> None:
    needed = samples_needed(module.WANTED)
    assert too_few(needed) == ""
    said = too_few(needed - 1)
    assert f"rests on {needed - 1} held-out samples" in said and f"about {needed}:" in said
    assert f"eval_samples (--eval-samples) of {2 * needed} or more" in said
    assert "differences below about 0.22 in loss" in too_few(10)


def test_equal_losses_are_a_gain_of_nothing() -> None:
    assert judged((0.5, 0.5), (0.5, 0.5)).against("random") == Gain(0.0, 0.0)


def test_where_neither_is_told_the_allocation_stays_open() -> None:
    """The shuffle is told apart neither from the mask nor from a random one."""
    entries = (
        entry("ird", 0.50, 0.51, 0.505),
        entry("random", 0.60, 0.61, 0.605),
        entry("shuffle", 0.30, 0.95, 0.50),
    )
    assert Verdict(entries, "accuracy", 20).allocation.endswith("cannot be told.")
