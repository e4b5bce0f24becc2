"""What is compared, at which learning rate, and what became of it.

Each candidate is tried at three rates a factor of about 3 apart, and beyond an end while that is
better: one shared rate decides the winner by itself, since a random mask wants a rate about
1/√density times that of a Fisher mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from ird_search.errors import NoProxySucceeded
from ird_search.ledger import Unit
from ird_search.mask import SparseMask

Kind = Literal["ird", "fish", "random", "full", "head", "reversed", "magnitude", "shuffle", "lora"]

RATE_STEP = 10**0.5
"""Rates are tried a factor of about 3 apart."""

AGAIN = (-1, -2)
"""The seeds under which rates are tried once more."""

LOWEST_RATE = 1e-6
"""No rate below is tried: AdamW moves an entry by about its rate a step, so that a short fine-tune
at less trains nothing."""

MORE_RATES = 3
"""At most so many are tried beyond the ends of those that a probe begins with."""


class Adapter(Protocol):
    """Parameters that are added to a model and trained, in place of a mask's entries."""

    @property
    def count(self) -> int:
        """How many there are."""

    @property
    def about(self) -> dict[str, Any]:
        """What tells it from others, as plain data: part of a unit's address."""

    def within(self, model: nn.Module, *, seed: int) -> AbstractContextManager[SparseMask]:
        """Within the block the model has them; gives the mask of all that is added.

        Afterwards the model is what it was: every module, parameter and flag.
        """


@dataclass(frozen=True, eq=False)
class Candidate:
    """What is trained beside the head: a mask, everything (`full`), nothing (`head`), an adapter.

    Args:
        samples: how many rows the mask was computed from; none for a random one.
        start: where the probe of learning rates begins, if something better is known than the rule.
        adapter: trained instead of a mask, which then is empty.
    """

    kind: Kind
    mask: SparseMask
    samples: int | None = None
    start: float | None = None
    adapter: Adapter | None = None

    @property
    def count(self) -> int:
        """How many parameters are selected or added; 0 for `full`, which selects none."""
        return self.mask.count if self.adapter is None else self.adapter.count

    @property
    def density(self) -> float:
        """How many are trained for each candidate parameter."""
        return 1.0 if self.kind == "full" else self.count / max(1, self.mask.space.numel)

    def start_rate(self) -> float:
        """Where the probe of learning rates begins: the middle one of three.

        For masks that know nothing of gradients it grows as 1/√density. A Fisher mask holds the
        entries with large gradients and wants less. The probe goes on past the ends while that
        helps.
        """
        if self.start is not None:
            return self.start
        rarity = max(self.density, 1e-12) ** -0.5
        if self.kind == "ird":
            return min(3e-3, 3e-4 * rarity)
        if self.kind == "fish":
            return min(1e-3, 1e-4 * rarity)
        return _STARTS.get(self.kind, 2e-3 * rarity)


_STARTS: Mapping[Kind, float] = {"full": 3e-4, "head": 3e-3, "lora": 1e-2}


@dataclass(frozen=True, eq=False)
class Attempt:
    """One fine-tune that is wanted.

    Args:
        steps: how many optimizer steps.
        seed: which order of batches; 0 is the one that candidates are compared on, those of
            `AGAIN` confirm rates, 1, 2, … count.
        verdict: evaluate on the samples that no choice has seen.
    """

    candidate: Candidate
    rate: float
    steps: int
    seed: int = 0
    verdict: bool = False


@dataclass(frozen=True)
class Trial:
    """One fine-tune at one learning rate and one seed, evaluated on held-out samples.

    Args:
        loss: mean negative log-likelihood; 0, and without meaning, where the run failed.
        score: what ranks trials, lower is better: the loss, or 1 − AUC; likewise.
        failure: why there is no score; empty when there is one.
        raised: it was ended by an exception that says nothing of the mask: a broken device, a bug.
            The search goes on, and a resume tries it again.
        losses: of each held-out sample, float32 [n]; None where the run failed.
    """

    rate: float
    seed: int
    loss: float
    score: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    failure: str = ""
    raised: bool = False
    losses: Tensor | None = field(default=None, compare=False, repr=False)

    @classmethod
    def failed(
        cls, attempt: Attempt, failure: str, seconds: float = 0.0, *, raised: bool = False
    ) -> Trial:
        """One without a score."""
        return cls(attempt.rate, attempt.seed, 0.0, 0.0, {}, seconds, failure, raised)

    @classmethod
    def of_unit(cls, unit: Unit) -> Trial:
        """What `to_unit` made of it."""
        return cls(**unit.result["trial"], losses=unit.tensors.get("losses"))

    def to_unit(self, told: Mapping[str, Any]) -> Unit:
        """Itself as a unit of the ledger, with what the study is told besides."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "losses"}
        tensors = {} if self.losses is None else {"losses": self.losses}
        return Unit({"trial": plain | {"metrics": dict(self.metrics)}, "told": dict(told)}, tensors)

    @property
    def ok(self) -> bool:
        return not self.failure

    @property
    def order(self) -> tuple[bool, float]:
        """Better first: the lower score, failed ones last."""
        return not self.ok, self.score


@dataclass(frozen=True)
class ProxyScore:
    """A candidate's score: its best trial over the learning rates it tried.

    Args:
        best: the trial with the lowest score (a failed one only where all failed); in a contest
            the one at the rate with the lowest mean over several seeds.
        trials: all of the longest budget that it was given, in order of the rates.
        short: others of the same call were better after few steps, so it was given no more.
        probes: the shorter fine-tunes that found its rates, where it went on to longer ones.
    """

    best: Trial
    trials: tuple[Trial, ...]
    short: bool = False
    probes: tuple[Trial, ...] = ()

    @property
    def score(self) -> float:
        """Lower is better; ∞ where every trial failed."""
        return self.best.score if self.best.ok else float("inf")

    @property
    def order(self) -> tuple[bool, bool, float]:
        """Better first: long before short, then the lower score; failed ones last."""
        return not self.best.ok, self.short, self.score

    @property
    def seconds(self) -> float:
        return sum(t.seconds for t in (*self.probes, *self.trials))


class Probe:
    """The search for one candidate's learning rate, a few trials at a time.

    Args:
        first: the rates to begin with.
        more: how many may follow, a step beyond an end at a time, while the best is there.
        falls: whether they may follow below the lower end where there is a score.
    """

    def __init__(
        self,
        candidate: Candidate,
        first: Sequence[float],
        *,
        more: int = MORE_RATES,
        falls: bool = True,
    ) -> None:
        self.candidate, self.first, self.falls = candidate, list(first), falls
        self.most = len(first) + more
        self.trials: dict[float, Trial] = {}

    @classmethod
    def at(cls, candidate: Candidate, rate: float) -> Probe:
        """One rate that is given."""
        return cls(candidate, [rate], more=0)

    @classmethod
    def around(cls, candidate: Candidate) -> Probe:
        """Three rates around the candidate's start."""
        return cls(candidate, rates_around(candidate.start_rate()))

    @classmethod
    def longer(cls, candidate: Candidate, rate: float) -> Probe:
        """The best rate of fewer steps and larger ones: more steps bear as much or more."""
        return cls(candidate, [rate_at(rate, i) for i in (0, 1)], falls=False)

    def wanted(self) -> list[float]:
        """The rates to try next; none where the best is found."""
        if not self.trials:
            return self.first
        tried = sorted(self.trials)
        best = min(tried, key=lambda rate: (self.trials[rate].order, rate))
        if len(tried) == self.most:
            return []
        if best == tried[0] and (self.falls or not self.trials[best].ok):
            return [rate_at(best, -1)] if best > LOWEST_RATE else []
        return [rate_at(best, 1)] if best == tried[-1] else []

    @property
    def found(self) -> ProxyScore:
        """The best of what was tried."""
        return best_of([self.trials[rate] for rate in sorted(self.trials)])


def promoted(found: Sequence[ProxyScore], candidates: Sequence[Candidate], count: int) -> list[int]:
    """Which candidates go on to more steps, in their order.

    The best `count`, ties to fewer parameters, then to the earlier one; of those without a score
    only where nobody has one, so that the reasons are told.
    """
    usable = [i for i, f in enumerate(found) if f.best.ok] or range(len(found))
    ranked = sorted(usable, key=lambda i: (found[i].order, candidates[i].count, i))
    return sorted(ranked[:count])


def require_success(scores: Mapping[str, ProxyScore]) -> None:
    """At least one proxy must have a score.

    Raises:
        NoProxySucceeded: with the reason of each.
    """
    if scores and not any(s.best.ok for s in scores.values()):
        raise NoProxySucceeded(f"{name}: {s.best.failure}" for name, s in scores.items())


def best_of(trials: Sequence[Trial]) -> ProxyScore:
    """The lowest score of some trials, the earliest of equals."""
    return ProxyScore(min(trials, key=lambda t: t.order), tuple(trials))


def rates_around(rate: float) -> list[float]:
    """A rate of the lattice and its two neighbours, but for those below `LOWEST_RATE`."""
    return [r for i in (-1, 0, 1) if (r := rate_at(rate, i)) >= LOWEST_RATE] or [LOWEST_RATE]


def rate_at(start: float, i: int) -> float:
    """The i-th rate beyond `start` on the lattice …, 1e-3, 3.2e-3, 1e-2, …

    One lattice for all: candidates differ in rate by a step or not at all, never by a little.
    """
    return float(f"{RATE_STEP ** (round(math.log(start, RATE_STEP)) + i):.1e}")
