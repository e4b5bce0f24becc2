"""Fine-tunes: from one start, over common batches, each put back afterwards.

Whatever is tried starts from the same weights, sees the same batches in the same order, and is
evaluated on the same held-out samples; what one fine-tune changed is put back, entry by entry,
before the next.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ird_search.batches import training_batches
from ird_search.candidate import AGAIN, Attempt, Candidate, Trial
from ird_search.config import SearchConfig
from ird_search.errors import first_line, out_of_memory
from ird_search.evaluation import (
    Evaluation,
    class_probabilities,
    evaluate,
    log_likelihoods,
)
from ird_search.freeze import trainable_only
from ird_search.ledger import Job, Ledger, Unit, unit_key
from ird_search.mask import SparseMask
from ird_search.optimizer import MaskedAdamW
from ird_search.parameters import ParameterSpace
from ird_search.problem import Problem
from ird_search.samples import SampleSet, require_few
from ird_search.scoring import scoring_steps
from ird_search.seeds import derive
from ird_search.sparse_backward import sparse_backward
from ird_search.training import Diverged, finetune, snapshot


class FineTunes:
    """Carries out attempts on one problem, and keeps what became of them in the ledger.

    The model is changed in place and put back, entry by entry, after every fine-tune.
    """

    def __init__(
        self,
        problem: Problem,
        config: SearchConfig,
        ledger: Ledger,
        *,
        on_trial: Callable[[Unit], None] = lambda _: None,
    ) -> None:
        self.problem, self.config, self.ledger = problem, config, ledger
        self.on_trial = on_trial
        self.steps = config.proxy_steps
        """Optimizer steps of the fine-tunes that count."""
        self.verdict_steps = config.verdict_steps or self.steps
        self.start = "cold"
        """Names the weights that every fine-tune starts from."""
        self.left_out: dict[str, list[int]] = {}
        """Ids of samples without a finite log-likelihood, by what they were for; see `check`."""
        self.sets = {"choose": problem.choose, "verdict": problem.verdict}
        self._bad = torch.empty(0, dtype=torch.int64)
        self._told: set[str] = set()

    def check(self) -> None:
        """Look at each sample that a fine-tune will see, and leave out what is not finite.

        Weights are finite, so a log-likelihood that is not is the sample's fault; one such sample
        would make every fine-tune fail.

        Raises:
            DataError: more than 1% of the samples of one kind; their rows are listed.
        """
        p, c = self.problem, self.config
        drawn = torch.cat([torch.cat(self._batches(*order)) for order in self._orders()]).unique()
        looked_at = {"training": p.train.select(drawn), "choose": p.choose, "verdict": p.verdict}

        def looked() -> Unit:
            found = {
                name: (~log_likelihoods(p.model, p.task, samples, device=p.device).isfinite())
                for name, samples in looked_at.items()
            }
            return Unit({name: bad.nonzero().flatten().tolist() for name, bad in found.items()})

        looks = {"check": self._orders(), "batch": c.batch_size, "problem": p.fingerprint}
        key = unit_key(looks)
        (unit,) = self.ledger.finish([Job("check", key, looked)])
        bad = {name: torch.tensor(at, dtype=torch.int64) for name, at in unit.result.items()}
        for name, samples in looked_at.items():
            if bad[name].numel():
                self.left_out[name] = samples.ids[bad[name]].tolist()
                require_few(self.left_out[name], len(samples), f"{name} samples")
        self._bad = drawn[bad["training"]]
        for name in ("choose", "verdict"):
            kept = torch.ones(len(looked_at[name]), dtype=torch.bool)
            kept[bad[name]] = False
            self.sets[name] = looked_at[name].select(kept.nonzero().flatten())

    def trial(
        self, candidate: Candidate, rate: float, *, seed: int = 0, verdict: bool = False
    ) -> Trial:
        """One fine-tune of full length at one rate; see `Attempt`."""
        steps = self.verdict_steps if verdict else self.steps
        return self.trials([Attempt(candidate, rate, steps, seed, verdict)])[0]

    def trials(self, attempts: Sequence[Attempt]) -> list[Trial]:
        """What became of each; those that the ledger holds, or another process does, are not done.

        Attempts of like content (two candidates with one mask) are one unit.
        """
        keys = [unit_key(self._unit(a)) for a in attempts]
        jobs: dict[str, Attempt] = {}
        for key, attempt in zip(keys, attempts, strict=True):
            jobs.setdefault(key, attempt)

        def tell(key: str, unit: Unit) -> None:
            if key not in self._told:
                self._told.add(key)
                self.on_trial(unit)

        found = self.ledger.finish(
            [Job("proxy", key, partial(self._done, attempt)) for key, attempt in jobs.items()],
            on_done=tell,
        )
        units = dict(zip(jobs, found, strict=True))
        return [Trial.of_unit(units[key]) for key in keys]

    def answers(
        self, candidate: Candidate, rate: float, samples: SampleSet
    ) -> tuple[Tensor, Tensor | None]:
        """What the model says of some samples once a candidate is trained.

        Returns:
            Negative log-likelihoods, float32 [N], NaN where the fine-tune failed; and the
            probabilities of the classes, [N, C], of a classification.
        """
        attempt = Attempt(candidate, rate, self.verdict_steps)

        def answered() -> Unit:
            p = self.problem
            saved = snapshot(p.model, candidate.mask, self._dense(candidate))
            try:
                seed = derive(self.config.seed, "batches", attempt.seed)
                self._train(candidate, rate, seed, attempt.steps)
                return Unit({}, class_probabilities(p.model, p.task, samples, device=p.device))
            except Exception as problem:  # whatever a model raises
                if out_of_memory(problem):
                    raise
                return Unit({}, {"losses": torch.full((len(samples),), torch.nan)})
            finally:
                saved.restore()

        key = unit_key({"answers": samples.fingerprint, **self._unit(attempt)})
        (unit,) = self.ledger.finish([Job("answers", key, answered)])
        return unit.tensors["losses"], unit.tensors.get("probabilities")

    def _orders(self) -> list[tuple[int, int]]:
        """(seed, steps) of all fine-tunes; a shorter one sees no row that a longer one does not."""
        c, p = self.config, self.problem
        longest = max(self.steps, self.verdict_steps)
        orders = [(derive(c.seed, "batches", 0), longest)]
        orders += [
            (derive(c.seed, "batches", s), self.verdict_steps)
            for s in (*AGAIN, *range(1, c.seeds + 1))
        ]
        orders.append((derive(c.seed, "warm-up"), c.warmup_steps))
        orders.append(
            (derive(c.seed, "scoring point"), scoring_steps(c.scoring_steps, p.model, p.space))
        )
        return [order for order in orders if order[1]]

    def _batches(self, seed: int, steps: int) -> list[Tensor]:
        """The rows of each step, without those that are left out."""
        size = self.config.batch_size
        batches = training_batches(self.problem.train, steps, size=size, seed=derive(seed, "order"))
        if not self._bad.numel():
            return batches
        return [b for batch in batches if (b := batch[~torch.isin(batch, self._bad)]).numel()]

    def _done(self, attempt: Attempt) -> Unit:
        """What became of it, and what was wanted, to be told to the study."""
        candidate, stage = attempt.candidate, "warm-up" if self.start == "cold" else "choose"
        told = {
            "kind": candidate.kind,
            "samples": candidate.samples,
            "parameters": candidate.count,
            "steps": attempt.steps,
            "stage": "verdict" if attempt.verdict else stage,
        }
        return self._run(attempt).to_unit(told)

    def _unit(self, attempt: Attempt) -> dict[str, Any]:
        """Everything that the outcome of an attempt depends on."""
        c, candidate = self.config, attempt.candidate
        adapter = candidate.adapter
        return {
            "problem": self.problem.fingerprint,
            "start": self.start,
            "head_rate": c.head_learning_rate,
            "settings": (attempt.steps, c.batch_size, c.weight_decay, c.score, c.seed),
            "kind": candidate.kind if candidate.kind in ("full", "head") else "mask",
            "mask": candidate.mask.digest,
            "adapter": None if adapter is None else adapter.about,
            "rate": attempt.rate,
            "seed": attempt.seed,
            "verdict": attempt.verdict,
        }

    def _run(self, attempt: Attempt) -> Trial:
        began = time.perf_counter()
        candidate, p = attempt.candidate, self.problem
        saved = snapshot(p.model, candidate.mask, self._dense(candidate))
        try:
            with self._with_adapter(attempt) as trained:
                order = derive(self.config.seed, "batches", attempt.seed)
                self._train(trained, attempt.rate, order, attempt.steps)
                samples = self.sets["verdict" if attempt.verdict else "choose"]
                found = evaluate(p.model, p.task, samples, device=p.device)
            return self._trial(attempt, found, time.perf_counter() - began)
        except Exception as problem:  # whatever a model raises
            if out_of_memory(problem):
                raise
            seconds = time.perf_counter() - began
            raised = not isinstance(problem, Diverged)
            return Trial.failed(attempt, first_line(problem), seconds, raised=raised)
        finally:
            saved.restore()

    def _trial(self, attempt: Attempt, found: Evaluation, seconds: float) -> Trial:
        loss, metrics = float(found.losses.mean()), found.metrics
        numbers = {"the held-out loss": loss, **metrics}
        if odd := [name for name, value in numbers.items() if not math.isfinite(value)]:
            return Trial.failed(attempt, f"{odd[0]} is not finite", seconds)
        score = 1 - metrics["auc"] if self.config.score == "auc" else loss
        losses = found.losses.float()
        return Trial(attempt.rate, attempt.seed, loss, score, metrics, seconds, losses=losses)

    @contextmanager
    def _with_adapter(self, attempt: Attempt) -> Iterator[Candidate]:
        """What is to be trained: the candidate, or the mask of its adapter, put in for a time."""
        candidate, seed = attempt.candidate, derive(self.config.seed, "adapter", attempt.seed)
        if candidate.adapter is None:
            yield candidate
            return
        with candidate.adapter.within(self.problem.model, seed=seed) as mask:
            yield replace(candidate, mask=mask, adapter=None)

    def _dense(self, candidate: Candidate) -> tuple[str, ...]:
        """Names of the parameters that are trained fully."""
        if candidate.kind != "full":
            return self.problem.head
        return tuple(n for n, p in self.problem.model.named_parameters() if p.requires_grad)

    def _train(
        self,
        candidate: Candidate,
        rate: float,
        seed: int,
        steps: int,
        *,
        head_rate: float | None = None,
    ) -> None:
        """One short fine-tune in place: `steps` batches in an order drawn from `seed`.

        Args:
            head_rate: of the head beside what else is trained; by default `head_learning_rate`.
        """
        p, dense = self.problem, self._dense(candidate)
        if not dense and not candidate.mask.count:
            return
        batches = self._batches(seed, steps)
        torch.manual_seed(derive(seed, "dropout"))
        with trainable_only(p.model, candidate.mask, dense=dense):
            optimizer = self._optimizer(candidate, rate, dense, head_rate)
            there = (p.train.batch(rows, p.device) for rows in batches)
            with sparse_backward(p.model, candidate.mask, dense):
                finetune(p.model, p.task, there, optimizer=optimizer, steps=steps)

    def _optimizer(
        self, candidate: Candidate, rate: float, dense: Sequence[str], head_rate: float | None
    ) -> torch.optim.Optimizer:
        """The candidate at its rate, and beside it the head at the head's."""
        p, c = self.problem, self.config
        head_rate = rate if candidate.kind == "head" else head_rate or c.head_learning_rate
        if candidate.kind == "full":
            return _adamw(p.model, dense, p.head, rate, head_rate, weight_decay=c.weight_decay)
        return MaskedAdamW(
            p.model,
            candidate.mask,
            lr=rate,
            weight_decay=c.weight_decay,
            dense=dense,
            dense_lr=head_rate if dense else None,
        )


def _adamw(
    model: nn.Module,
    names: Sequence[str],
    head: Sequence[str],
    rate: float,
    head_rate: float,
    *,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """AdamW on whole tensors, the head's at a rate of its own.

    Weights in half precision get float32 master values, as they have them under a mask: the head
    is then the mask, selected in full, and all else is dense.
    """
    body = [name for name in names if name not in head]
    parts = [[model.get_parameter(n) for n in some] for some in (body, head)]
    if all(p.dtype in (torch.float32, torch.float64) for part in parts for p in part):
        groups = [{"params": p, "lr": r} for p, r in zip(parts, (rate, head_rate), strict=True)]
        return torch.optim.AdamW(groups, lr=rate, weight_decay=weight_decay)
    space = ParameterSpace.of(model, head)
    whole = SparseMask(space, torch.arange(space.numel))
    return MaskedAdamW(
        model,
        whole,
        lr=head_rate,
        weight_decay=weight_decay,
        dense=body,
        dense_lr=rate if body else None,
    )
