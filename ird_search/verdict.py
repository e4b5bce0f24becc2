"""The verdict: the winner beside its controls, on samples that no choice has seen.

The best of many noisy proxies looks better than it is. So the numbers that count come from other
held-out samples and other seeds, and every control has a learning rate of its own, found by the
same probe. When a random mask is as good, the verdict says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ird_search.candidate import LOWEST_RATE, Candidate, Kind
from ird_search.contest import Outcome, contest
from ird_search.controls import Controls, Draw
from ird_search.pair import Scored
from ird_search.paired import UNKNOWN, Gain, crossed, difference_told, samples_needed
from ird_search.problem import Problem
from ird_search.proxy import Proxies

NAMES: dict[Kind, str] = {
    "ird": "IRD (this mask)",
    "random": "random mask",
    "shuffle": "shuffled in each tensor",
    "fish": "FISH, random samples",
    "reversed": "reversed Fisher",
    "magnitude": "largest weights",
    "lora": "LoRA",
    "full": "full fine-tuning",
    "head": "head only",
}

OTHERS: dict[Kind, str] = {
    "ird": "itself",
    "random": "a random mask of the same size",
    "shuffle": "a random mask with as many entries in each tensor",
    "fish": "a FISH mask of the same size (random samples)",
    "reversed": "a mask of the smallest Fisher scores",
    "magnitude": "a mask of the largest weights",
    "lora": "LoRA of the same size",
    "full": "full fine-tuning",
    "head": "the head alone",
}

WANTED = 0.05
"""A difference in loss that a verdict should be able to tell."""


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
        by_sample: the loss of each verdict sample under each seed, float32 [S, n]; None where there
            are no numbers.
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
    by_sample: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def loss(self) -> float:
        return float(np.mean(self.losses)) if self.losses else float("nan")

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; the winner's is the noise floor."""
        return float(np.std(self.losses, ddof=1)) if len(self.losses) > 1 else float("nan")


@dataclass(frozen=True)
class Verdict:
    """The table and its plain sentences.

    Args:
        entries: the winner's and one for each control.
        samples: how many held-out samples it rests on.
        left_out: controls that were asked for and are not there, with the reason.
    """

    entries: tuple[Entry, ...]
    metric_name: str
    samples: int
    left_out: Mapping[Kind, str] = field(default_factory=dict)

    def __getitem__(self, kind: Kind) -> Entry:
        return next(e for e in self.entries if e.kind == kind)

    def __contains__(self, kind: object) -> bool:
        return kind in self.controls

    @property
    def controls(self) -> tuple[Kind, ...]:
        """What the winner is compared with."""
        return tuple(e.kind for e in self.entries if e.kind != "ird")

    @property
    def better(self) -> bool:
        """Whether the mask is better than a random one of its size, by more than chance."""
        return self.against("random").better

    @property
    def idle(self) -> str:
        """That training the mask did not pay, where its best rate is the lowest; else empty."""
        ours = self["ird"]
        if ours.failure or ours.rate > LOWEST_RATE:
            return ""
        return (
            "Fine-tunes of this length are best without the mask: at its best rate, "
            f"{ours.rate:g}, the lowest that is tried, hardly a weight moves. So this says nothing "
            "of which parameters to train. Give proxies more steps (--proxy-steps) or more data."
        )

    @property
    def noise(self) -> float:
        """The noise floor: the same mask under other seeds, standard deviation of its loss."""
        return self["ird"].spread

    def against(self, kind: Kind) -> Gain:
        """The winner's gain in loss over a control, paired by seed and sample; see `crossed`.

        The half width is infinite with fewer than two seeds, and the gain is NaN where either
        failed or the control is not there.
        """
        return self.gain("ird", kind)

    def gain(self, one: Kind, other: Kind) -> Gain:
        """How much lower the loss of one line is than another's, likewise."""
        there = {e.kind: e.by_sample for e in self.entries}
        ours, theirs = there.get(one), there.get(other)
        return UNKNOWN if ours is None or theirs is None else crossed(ours, theirs)

    def sentence(self, kind: Kind = "random") -> str:
        """Better, worse, or no better than a control: in words."""
        other = OTHERS[kind]
        if kind not in self:
            return f"Nothing was compared with {other}."
        gain, seeds = self.against(kind), len(self["ird"].losses)
        if not np.isfinite(gain.mean):
            reason = self["ird"].failure or self[kind].failure
            return f"Nothing can be said against {other}: {reason.rstrip('.')}."
        if not np.isfinite(gain.half_width):
            return (
                f"One seed cannot tell the mask from {other} (difference {gain.mean:+.4f} in loss)."
            )
        figures = f"{gain.half_width:.4f} in held-out loss ({seeds} seeds)"
        if gain.better:
            return f"Better than {other} by {gain.mean:.4f} ± {figures}."
        if gain.worse:
            return f"Worse than {other} by {-gain.mean:.4f} ± {figures}."
        return f"No better than {other} here: difference {gain.mean:+.4f} ± {figures}."

    @property
    def allocation(self) -> str:
        """Whether it matters only how many entries each tensor has; empty where that is open."""
        if not self.better or not np.isfinite(self.against("shuffle").half_width):
            return ""
        if self.against("shuffle").better:
            return "Which entries are selected matters, and not only how many in each tensor."
        if self.gain("shuffle", "random").better:
            return (
                "The allocation among tensors explains the gain: entries drawn by chance, as many "
                "in each tensor, beat a random mask, too, and cannot be told from this one."
            )
        return "Whether the allocation among tensors explains the gain cannot be told."


def give_verdict(winner: Scored, controls: Controls, proxies: Proxies, *, seeds: int) -> Verdict:
    """Put the winner and its controls through the same contest."""
    ours = Candidate("ird", winner.mask, winner.pair.rows.numel(), winner.proxy.best.rate)
    draws: dict[Kind, Draw] = {"ird": lambda s: ours, **controls.draws}
    found = contest(draws, proxies, steps=proxies.verdict_steps, seeds=seeds)
    entries = [_entry(kind, outcome, proxies.problem) for kind, outcome in found.items()]
    task, judged = proxies.problem.task, len(proxies.sets["verdict"])
    return Verdict(tuple(entries), task.metric, judged, controls.left_out)


def too_few(samples: int) -> str:
    """What a verdict on so many samples cannot tell, and how many it takes; empty if enough."""
    needed = samples_needed(WANTED)
    if samples >= needed:
        return ""
    return (
        f"The verdict rests on {samples:,} held-out samples, too few to tell differences below "
        f"about {difference_told(samples):.2f} in loss. To tell {WANTED:g} it takes about "
        f"{needed:,}: pass more evaluation data (--eval-data), with eval_samples "
        f"(--eval-samples) of {2 * needed:,} or more, of which one half gives the verdict."
    )


def _entry(kind: Kind, outcome: Outcome, problem: Problem) -> Entry:
    candidate, trials, failure = outcome.first, outcome.trials, outcome.failure
    metric = problem.task.metric
    losses = [t.losses for t in trials if t.losses is not None]
    return Entry(
        kind=kind,
        samples=candidate.samples,
        density=candidate.density,
        parameters=_everything(problem) if kind == "full" else candidate.count,
        rate=outcome.probe.best.rate,
        choose=outcome.probe.score,
        losses=() if failure else tuple(t.loss for t in trials),
        metric=float("nan") if failure else float(np.mean([t.metrics[metric] for t in trials])),
        failure=failure,
        by_sample=None if failure else torch.stack(losses),
    )


def _everything(problem: Problem) -> int:
    """How many parameters full fine-tuning trains beside the head."""
    trained = sum(p.numel() for p in problem.model.parameters() if p.requires_grad)
    return trained - sum(problem.model.get_parameter(n).numel() for n in problem.head)
