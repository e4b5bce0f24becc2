"""Proxies: one short masked fine-tune says how good a mask is.

Each candidate's learning rate is its own: one shared rate decides the winner by itself, since a
random mask wants a rate about 1/√density times that of a Fisher mask.

Budgets are successive: all candidates of a round are tried for a few steps, the better half of
them for as many as count. All short fine-tunes come before the first long one, so who goes on
depends on no order of finishing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from ird_search.candidate import (
    Attempt,
    Candidate,
    Probe,
    ProxyScore,
    best_of,
    promoted,
    rate_at,
    require_success,
)
from ird_search.errors import ModelError, NoProxySucceeded
from ird_search.finetunes import FineTunes
from ird_search.ledger import Job, Unit, unit_key
from ird_search.mask import SparseMask
from ird_search.parameters import ParameterSpace
from ird_search.seeds import derive
from ird_search.training import Diverged, Snapshot, snapshot


class Proxies(FineTunes):
    """Scores candidates by short fine-tunes, all from the same start."""

    @property
    def probe_steps(self) -> int:
        """Optimizer steps of those that find rates and drop the worse half."""
        return self.config.probe_steps or self.steps

    def warm_up(self) -> ProxyScore:
        """Train the head alone for a few steps, for good, at the rate that is best for it.

        The head of a fresh classifier is random; gradients through it say little. What the head
        learns here is the start of the Fisher pass and of every proxy.

        Raises:
            NoProxySucceeded: the head could be trained at no rate.
        """
        cold, c = self.score(self.head_only()), self.config
        self.start = "as it came"
        if not c.warmup_steps or not self.problem.head:
            return cold
        require_success({f"head only, rate {t.rate:g}": best_of([t]) for t in cold.trials})
        settings = [c.warmup_steps, c.batch_size, c.weight_decay, c.seed, cold.best.rate]
        key = unit_key({"head after": settings, "problem": self.problem.fingerprint})
        before = snapshot(self.problem.model, self.head_only().mask, self.problem.head)

        def trained() -> Unit:
            seed = derive(c.seed, "warm-up")
            try:
                self._train(self.head_only(), cold.best.rate, seed, c.warmup_steps)
                return Unit({}, before.now().tensors())
            except Diverged as problem:
                raise NoProxySucceeded(f"The warm-up of the head: {problem}") from problem
            finally:
                before.restore()

        (unit,) = self.ledger.finish([Job("head", key, trained)])
        before.holding(unit.tensors).restore()
        self.start = key
        return cold

    def head_only(self) -> Candidate:
        """The candidate without a mask."""
        return Candidate("head", _empty(self.problem.space))

    def full(self) -> Candidate:
        """The candidate that trains everything."""
        return Candidate("full", _empty(self.problem.space))

    def advanced(self, steps: int) -> Snapshot:
        """All that is trained, after so many steps of training it; the model stays as it was.

        Where that leaves the finite numbers, it is tried again at a third of the rate, twice.

        Raises:
            ModelError: it does so at every rate.
        """
        start, rate = snapshot(self.problem.model), self.full().start_rate()
        seed = derive(self.config.seed, "scoring point")
        for i in range(3):
            try:
                one = rate_at(rate, -i)
                self._train(self.full(), one, seed, steps, head_rate=one)
                return snapshot(self.problem.model)
            except Diverged as problem:
                reason = problem.reason
            finally:
                start.restore()
        raise ModelError(
            f"The {steps} steps of training before scoring diverged at rates from {rate:g} down "
            f"to {rate_at(rate, -2):g}: {reason}. Pass other scoring_steps (--scoring-steps; 0 "
            "scores the model as it is), or look for samples without a finite loss."
        )

    def score(self, candidate: Candidate) -> ProxyScore:
        """One candidate's best trial; see `scores`."""
        return self.scores([candidate])[0]

    def scores(
        self, candidates: Sequence[Candidate], *, promote: float = 0.5, steps: int | None = None
    ) -> list[ProxyScore]:
        """Each candidate's best trial over learning rates a factor of 3 apart.

        All are tried for `probe_steps`, at three rates around their own start and beyond an end
        while the best is there. The best of them go on to `proxy_steps`, at their best rate, the
        next higher one, and on from there while that is better. A candidate that fails at every
        rate goes on only where all do. Where all go on anyway, there is no short fine-tune.

        Args:
            promote: the share that goes on, rounded up; others come back with `short` set.
            steps: of the longer fine-tunes; by default `proxy_steps`.
        """
        count, steps = math.ceil(promote * len(candidates)), steps or self.steps
        if count >= len(candidates) or self.probe_steps >= steps:
            return self._probed([self._probe(c) for c in candidates], steps)
        short = self._probed([self._probe(c) for c in candidates], self.probe_steps)
        going = promoted(short, candidates, count)
        longer = self._probed(
            [self._probe(candidates[i], short[i].best.rate) for i in going], steps
        )
        found = [replace(s, short=True) for s in short]
        for i, score in zip(going, longer, strict=True):
            found[i] = replace(score, probes=short[i].trials)
        return found

    def _probe(self, candidate: Candidate, best: float | None = None) -> Probe:
        """The rates to try; `best` is what a shorter probe found."""
        if (rate := self._fixed_rate(candidate)) is not None:
            return Probe.at(candidate, rate)
        return Probe.around(candidate) if best is None else Probe.longer(candidate, best)

    def _probed(self, probes: Sequence[Probe], steps: int) -> list[ProxyScore]:
        """All probes at one budget, as many fine-tunes at a time as can be known to be wanted."""
        while wanted := [(probe, rate) for probe in probes for rate in probe.wanted()]:
            found = self.trials([Attempt(p.candidate, rate, steps) for p, rate in wanted])
            for (probe, rate), trial in zip(wanted, found, strict=True):
                probe.trials[rate] = trial
        return [probe.found for probe in probes]

    def _fixed_rate(self, candidate: Candidate) -> float | None:
        if candidate.kind == "head" and not self.problem.head:
            return candidate.start_rate()  # nothing is trained, so no rate matters
        return self.config.learning_rate


def _empty(space: ParameterSpace) -> SparseMask:
    return SparseMask(space, torch.empty(0, dtype=torch.int64))
