"""The verdict: the winner beside its controls, on samples that no choice has seen.

The best of many noisy proxies looks better than it is. So the numbers that count come from other
held-out samples and other seeds, and every control has a learning rate of its own, found by the
same probe. When a random mask is as good, the verdict says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ird_search.candidate import Attempt, Candidate, Kind, ProxyScore, Trial
from ird_search.mask import SparseMask
from ird_search.parameters import ParameterSpace
from ird_search.problem import Problem
from ird_search.proxy import Proxies
from ird_search.samples import SampleSet
from ird_search.search import Scored
from ird_search.seeds import derive
from ird_search.selection import random_subset

NAMES: dict[Kind, str] = {
    "ird": "IRD (this mask)",
    "fish": "FISH, random samples",
    "random": "random mask",
    "full": "full fine-tuning",
    "head": "head only",
}

OTHERS: dict[Kind, str] = {
    "ird": "itself",
    "fish": "a FISH mask of the same size (random samples)",
    "random": "a random mask of the same size",
    "full": "full fine-tuning",
    "head": "the head alone",
}


@dataclass(frozen=True)
class Entry:
    """One line of the table.

    Args:
        samples: rows that the mask was computed from; None where there were none.
        parameters: how many are trained beside the head.
        rate: its best learning rate.
        choose: score on the samples that choose, lower is better.
        losses: mean held-out loss on the verdict samples, one for each seed.
        metric: the task's metric there, the mean over seeds.
        failure: why there are no numbers; empty when there are.
    """

    kind: Kind
    samples: int | None
    density: float
    parameters: int
    rate: float
    choose: float
    losses: tuple[float, ...]
    metric: float
    failure: str = ""

    @property
    def loss(self) -> float:
        return float(np.mean(self.losses)) if self.losses else float("nan")

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; the winner's is the noise floor."""
        return float(np.std(self.losses, ddof=1)) if len(self.losses) > 1 else float("nan")


@dataclass(frozen=True)
class Verdict:
    """The table and its one plain sentence."""

    entries: tuple[Entry, ...]
    metric_name: str
    samples: int

    def __getitem__(self, kind: Kind) -> Entry:
        return next(e for e in self.entries if e.kind == kind)

    @property
    def noise(self) -> float:
        """The noise floor: the same mask under other seeds, standard deviation of its loss."""
        return self["ird"].spread

    def against(self, kind: Kind) -> tuple[float, float]:
        """(mean, half width of the 95% interval) of the winner's gain in loss, by seed.

        Student's t over the seeds; the half width is infinite with fewer than two, and the gain
        is NaN where either failed.
        """
        theirs, ours = self[kind].losses, self["ird"].losses
        if not theirs or not ours:
            return float("nan"), float("inf")
        gains = np.array(theirs) - np.array(ours)
        if gains.size < 2:
            return float(gains.mean()), float("inf")
        width = stats.t.ppf(0.975, gains.size - 1) * gains.std(ddof=1) / gains.size**0.5
        return float(gains.mean()), float(width)

    def sentence(self, kind: Kind = "random") -> str:
        """Better, worse, or no better than a control: in words."""
        other = OTHERS[kind]
        gain, width = self.against(kind)
        seeds = len(self["ird"].losses)
        if not np.isfinite(gain):
            reason = self["ird"].failure or self[kind].failure
            return f"Nothing can be said against {other}: {reason.rstrip('.')}."
        if not np.isfinite(width):
            return f"One seed cannot tell the mask from {other} (difference {gain:+.4f} in loss)."
        figures = f"{abs(gain):.4f} ± {width:.4f} in held-out loss ({seeds} seeds)"
        if gain > width:
            return f"Better than {other} by {figures}."
        if gain < -width:
            return f"Worse than {other} by {figures}."
        return (
            f"No better than {other} here: "
            f"difference {gain:+.4f} ± {width:.4f} in held-out loss ({seeds} seeds)."
        )


def give_verdict(
    winner: Scored, fish: Callable[[int], SparseMask], proxies: Proxies, *, seeds: int, seed: int
) -> Verdict:
    """Score the winner and its controls alike: the same probe of rates, then fresh seeds.

    Random controls draw another mask, or other rows, for each seed.

    Args:
        fish: a FISH mask of the winner's size from as many random rows, for each seed.
    """
    draw = _controls(winner, fish, proxies, seed=seed)
    firsts = {kind: candidate(0) for kind, candidate in draw.items()}
    others = [kind for kind in draw if kind != "ird"]
    probes: dict[Kind, ProxyScore] = {"ird": winner.proxy}
    probes |= zip(others, proxies.scores([firsts[k] for k in others]), strict=True)
    attempts = [
        (kind, Attempt(draw[kind](s), probes[kind].best.rate, seed=s, verdict=True))
        for kind in draw
        if probes[kind].best.ok
        for s in range(1, seeds + 1)
    ]
    found = proxies.trials([attempt for _, attempt in attempts])
    trials: dict[Kind, list[Trial]] = {kind: [] for kind in draw}
    for (kind, _), trial in zip(attempts, found, strict=True):
        trials[kind].append(trial)
    entries = [_entry(k, firsts[k], probes[k], trials[k], proxies.problem) for k in draw]
    judged = len(proxies.sets["verdict"])
    return Verdict(tuple(entries), proxies.problem.task.metric, judged)


def fish_samples(winner: Scored, train: SampleSet, *, seed: int, s: int) -> SampleSet:
    """As many random training rows as the winner's mask was computed from."""
    rows = winner.pair.rows.numel()
    return train.select(random_subset(len(train), rows, seed=derive(seed, "fish", s)))


def _controls(
    winner: Scored, fish: Callable[[int], SparseMask], proxies: Proxies, *, seed: int
) -> dict[Kind, Callable[[int], Candidate]]:
    """What is compared, drawn anew for each seed where chance has a part in it."""
    rows, mask = winner.pair.rows.numel(), winner.mask
    return {
        "ird": lambda s: Candidate("ird", mask, rows),
        "fish": lambda s: Candidate("fish", fish(s), rows),
        "random": lambda s: Candidate("random", random_mask(mask.space, mask.count, seed, s)),
        "full": lambda s: proxies.full(),
        "head": lambda s: proxies.head_only(),
    }


def random_mask(space: ParameterSpace, count: int, seed: int, s: int) -> SparseMask:
    """So many entries, each as likely as any other."""
    return SparseMask(space, random_subset(space.numel, count, seed=derive(seed, "random mask", s)))


def _entry(
    kind: Kind, candidate: Candidate, probe: ProxyScore, trials: list[Trial], problem: Problem
) -> Entry:
    bad = next((t for t in (probe.best, *trials) if not t.ok), None)
    metric = problem.task.metric
    trained = (
        sum(p.numel() for p in problem.model.parameters() if p.requires_grad)
        - sum(problem.model.get_parameter(n).numel() for n in problem.head)
        if kind == "full"
        else candidate.mask.count
    )
    return Entry(
        kind=kind,
        samples=candidate.samples,
        density=candidate.density,
        parameters=trained,
        rate=probe.best.rate,
        choose=probe.score,
        losses=() if bad else tuple(t.loss for t in trials),
        metric=float("nan") if bad else float(np.mean([t.metrics[metric] for t in trials])),
        failure=bad.failure if bad else "",
    )
