"""What is compared, at which learning rate, and what became of it.

Each candidate is tried at three rates a factor of about 3 apart, and beyond an end while that is
better: one shared rate decides the winner by itself, since a random mask wants a rate about
1/√density times that of a Fisher mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ird_search.errors import NoProxySucceeded
from ird_search.mask import SparseMask

Kind = Literal["ird", "fish", "random", "full", "head"]

RATE_STEP = 10**0.5
"""Rates are tried a factor of about 3 apart."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """What is trained: a mask and the head; everything (`full`); or the head alone (`head`).

    Args:
        samples: how many rows the mask was computed from; none for a random one.
        start: where the probe of learning rates begins, if something better is known than the rule.
    """

    kind: Kind
    mask: SparseMask
    samples: int | None = None
    start: float | None = None

    @property
    def density(self) -> float:
        """Fraction of the candidate parameters that is trained."""
        return 1.0 if self.kind == "full" else self.mask.density

    def start_rate(self) -> float:
        """Where the probe of learning rates begins: the middle one of three.

        For random masks it grows as 1/√density. A Fisher mask holds the entries with large
        gradients and wants less. The probe goes on past the ends while that helps.
        """
        if self.start is not None:
            return self.start
        if self.kind == "random":
            return 1e-3 / max(self.density, 1e-12) ** 0.5
        if self.kind == "full":
            return 3e-4
        if self.kind == "head":
            return 3e-3
        return min(3e-3, 3e-4 / max(self.density, 1e-12) ** 0.5)


@dataclass(frozen=True, eq=False)
class Attempt:
    """One fine-tune that is wanted.

    Args:
        seed: which order of batches; 0 is the one that candidates are compared on.
        verdict: evaluate on the samples that no choice has seen.
    """

    candidate: Candidate
    rate: float
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
    """

    rate: float
    seed: int
    loss: float
    score: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    failure: str = ""
    raised: bool = False

    @property
    def ok(self) -> bool:
        return not self.failure


@dataclass(frozen=True)
class ProxyScore:
    """A candidate's score: its best trial over the learning rates it tried.

    Args:
        best: the trial with the lowest score (a failed one only where all failed).
        trials: all of them, in order of the rates.
    """

    best: Trial
    trials: tuple[Trial, ...]

    @property
    def score(self) -> float:
        """Lower is better; ∞ where every trial failed."""
        return self.best.score if self.best.ok else float("inf")

    @property
    def seconds(self) -> float:
        return sum(t.seconds for t in self.trials)


class Probe:
    """The search for one candidate's learning rate, a few trials at a time."""

    def __init__(self, candidate: Candidate, fixed: float | None) -> None:
        self.candidate, self.fixed = candidate, fixed
        self.trials: dict[float, Trial] = {}

    def wanted(self) -> list[float]:
        """The rates to try next; none where the best is found."""
        if self.fixed is not None:
            return [] if self.trials else [self.fixed]
        start = self.candidate.start_rate()
        if not self.trials:
            return [rate_at(start, i) for i in (-1, 0, 1)]
        tried = sorted(self.trials)
        best = min(tried, key=lambda rate: (_score(self.trials[rate]), rate))
        if len(tried) == 6 or tried[0] < best < tried[-1]:
            return []
        return [rate_at(best, -1 if best == tried[0] else 1)]


def require_success(scores: Mapping[str, ProxyScore]) -> None:
    """At least one proxy must have a score.

    Raises:
        NoProxySucceeded: with the reason of each.
    """
    if scores and not any(s.best.ok for s in scores.values()):
        raise NoProxySucceeded(f"{name}: {s.best.failure}" for name, s in scores.items())


def best_of(trials: list[Trial]) -> ProxyScore:
    return ProxyScore(min(trials, key=_score), tuple(trials))


def _score(trial: Trial) -> float:
    return trial.score if trial.ok else float("inf")


def rate_at(start: float, i: int) -> float:
    """The i-th rate beyond `start` on the lattice …, 1e-3, 3.2e-3, 1e-2, …

    One lattice for all: candidates differ in rate by a step or not at all, never by a little.
    """
    return float(f"{RATE_STEP ** (round(math.log(start, RATE_STEP)) + i):.1e}")
