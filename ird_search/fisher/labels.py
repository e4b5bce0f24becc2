"""`LabelRule`: whose labels F is computed with, and what of a sample is squared by itself.

    F[i, j] = Σ_v (∂ ℓ_v(xᵢ; θ) / ∂θ_j)²

Each *term* ℓ_v is a log-likelihood of the sample under labels of its own, and their squares add up:

    empirical   ℓ = log p(yᵢ | xᵢ), the label of the data: one term
    expected    ℓ_y = √p(y | xᵢ) log p(y | xᵢ), one for each class y, the root held fixed: the sum
                is E_y (∂ log p(y | xᵢ) / ∂θ_j)², the diagonal of the Fisher information itself;
                for a Gaussian of unit variance one term, with y one deviation from the mean:
                E_y ((y − f) ∂f)² = (∂f(xᵢ) / ∂θ_j)²
    sampled     ℓ_d = log p(y_d | xᵢ) / √D with D labels y_d drawn from p(y | xᵢ): unbiased

By the token each of them falls into one term a target, Σ_v Σ_t (∂ ℓ_{v,t} / ∂θ_j)².

A term is a batch with other labels, so every path of the engine computes it as it is. What a label
means is for `Weighted` and `Drawn` to say: they make the term from the logits of the same forward
pass, so the model's distribution costs none of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ird_search.config import FisherLabels, FisherUnit, SearchConfig
from ird_search.errors import UsageError
from ird_search.fisher.combined import squared_together
from ird_search.fisher.engine import Contribution, Engine
from ird_search.samples import Batch, SampleSet
from ird_search.seeds import derive
from ird_search.task import IGNORED, Classification, LanguageModel, Task


@dataclass(frozen=True)
class Weighted(Task):
    """√p(y | x) log p(y | x), the root held fixed: squares are weighted by p(y | x).

    A class that the model gives no probability (a logit of −∞) adds nothing: √p log p → 0.
    """

    task: Task

    def log_likelihood(self, logits: Tensor, labels: Tensor) -> Tensor:
        found = self.task.log_likelihood(logits, labels)
        found = found.masked_fill(found.detach() == -torch.inf, 0.0)  # before 0 · ∞ is formed
        return (found.detach() / 2).exp() * found


@dataclass(frozen=True)
class Drawn(Task):
    """log p(y | x) / √D of a label that noise draws from the model: `labels` are the noise.

    Args:
        draws: D, over how many draws the squares are averaged.
    """

    task: Task
    draws: int = 1

    def log_likelihood(self, logits: Tensor, labels: Tensor) -> Tensor:
        drawn = self.task.drawn(logits.detach(), labels)
        return self.task.log_likelihood(logits, drawn) * self.draws**-0.5


@dataclass(frozen=True)
class LabelRule:
    """Whose labels, and what of a sample is squared by itself.

    Args:
        task: what the model is for.
        labels: the data's, all of the model's distribution, or ones drawn from it.
        unit: "token" for a square of each target token of a language model's sample.
        draws: labels drawn for each sample.
        seed: of the draws. They are keyed by a sample's id, so that neither its batch, nor the
            order, nor which other samples there are can change them.

    Raises:
        UsageError: what the task cannot do; all problems at once.

    Example:
        >>> rule = LabelRule(Classification(3), "expected")
        >>> samples = SampleSet(({"input": torch.ones(2)},), torch.tensor([1]), torch.arange(1))
        >>> rule.terms(samples, samples.batch([0]))
        [tensor([0]), tensor([1]), tensor([2])]
        >>> from ird_search.task import CausalLM
        >>> LabelRule(CausalLM(), "expected")
        Traceback (most recent call last):
        ...
        ird_search.errors.UsageError: fisher is 'expected', which for causal-lm would be a ...
    """

    task: Task
    labels: FisherLabels = "empirical"
    unit: FisherUnit = "sequence"
    draws: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if problems := label_problems(self.task, self.labels, self.unit):
            raise UsageError(problems)

    @classmethod
    def of(cls, config: SearchConfig, task: Task) -> LabelRule:
        """The rule that the settings name."""
        seed = derive(config.seed, "labels")
        return cls(task, config.fisher, config.fisher_unit, config.fisher_draws, seed)

    @property
    def likelihood(self) -> Task:
        """What engines differentiate: it reads the labels that `terms` puts into a batch."""
        if self.labels == "empirical":
            return self.task
        if self.labels == "expected" and isinstance(self.task, Classification):
            return Weighted(self.task)
        return Drawn(self.task, self.draws)

    @property
    def signed(self) -> bool:
        """Whether a sample has one gradient, of the data's label, so that means say something."""
        return self.labels == "empirical" and self.unit == "sequence"

    @property
    def about(self) -> list[Any]:
        """What F depends on, as plain data: part of its answers' address; empty by default."""
        if self.signed:
            return []
        drawn = [self.draws, self.seed] if self.labels == "sampled" else []
        return [self.labels, self.unit, *drawn]

    def example(self, samples: SampleSet, rows: Tensor, device: torch.device) -> Batch:
        """Some samples with the labels of one term, for the engine's self-check."""
        batch = samples.batch(rows, device)
        return Batch(batch.inputs, self._labels(samples, batch)[0], batch.rows)

    def gradients(
        self, engine: Engine, samples: SampleSet, rows: Tensor, device: torch.device
    ) -> Iterator[Contribution]:
        """Gradients whose squares are F, for every one of `rows`.

        With V terms the rows are taken |rows| / V at a time, so that as many factors are in memory
        as with one.

        Args:
            engine: a path that differentiates `likelihood`.
            rows: positions in the sample set, int64: [B].
        """
        batch = samples.batch(rows, device)
        terms = self.terms(samples, batch)
        step = max(1, len(batch) // len(terms))
        for start in range(0, len(batch), step):
            part = slice(start, min(start + step, len(batch)))
            some = [replace(batch, labels=labels).part(part) for labels in terms]
            yield from _summed(engine, some, start)

    def terms(self, samples: SampleSet, batch: Batch) -> list[Tensor]:
        """The labels of each term, in the shape of the batch's."""
        found = self._labels(samples, batch)
        if self.unit == "sequence" or not isinstance(self.task, LanguageModel):
            return found
        return [t for one in found for t in _tokens(one, first=self.task.shift)]

    def _labels(self, samples: SampleSet, batch: Batch) -> list[Tensor]:
        if self.labels == "empirical":
            return [batch.labels]
        if self.labels == "sampled":
            return self._noise(samples, batch)
        if isinstance(self.task, Classification):
            return [torch.full_like(batch.labels, y) for y in range(self.task.num_labels)]
        return [torch.ones_like(batch.labels)]  # one deviation from the mean

    def _noise(self, samples: SampleSet, batch: Batch) -> list[Tensor]:
        """What each draw's labels are made of, padded as the batch's labels are."""
        rows = batch.rows.tolist()
        noise = [self._noise_of(int(samples.ids[i]), samples.labels[i]) for i in rows]
        found = []
        for drawn in zip(*noise, strict=True):
            labels = torch.stack(drawn) if drawn[0].ndim == 0 else drawn
            alone = SampleSet(({},) * len(rows), labels, batch.rows, pad_side=samples.pad_side)
            found.append(alone.batch(range(len(rows)), batch.labels.device).labels)
        return found

    def _noise_of(self, sample: int, label: Tensor) -> Tensor:
        """[D, …], of one sample."""
        generator = torch.Generator().manual_seed(derive(self.seed, sample))
        return self.task.noise(label.expand(self.draws, *label.shape), generator)


def label_problems(task: Task, labels: FisherLabels, unit: FisherUnit) -> list[str]:
    """What the task cannot do, in sentences."""
    problems = []
    if labels == "expected" and isinstance(task, LanguageModel):
        problems.append(
            f"fisher is 'expected', which for {task.name} would be a sum over the vocabulary at "
            "every token. Pass fisher='sampled' (--fisher sampled), which draws each target from "
            "the model's distribution."
        )
    if unit == "token" and not isinstance(task, LanguageModel):
        problems.append(
            f"fisher_unit is 'token', which needs a language model; this is {task.name}, with one "
            "label a sample. Pass fisher_unit='sequence' (--fisher-unit sequence)."
        )
    return problems


def _tokens(labels: Tensor, first: int) -> list[Tensor]:
    """The labels of a language model, one target at a time: those before `first` are none."""
    places = torch.arange(labels.shape[1], device=labels.device)
    targets = ((labels != IGNORED).any(0) & (places >= first)).nonzero().flatten().tolist()
    # Where there is no target at all, one term says so: its gradient is zero.
    return [labels.masked_fill(places != t, IGNORED) for t in targets or [0]]


def _summed(engine: Engine, terms: Sequence[Batch], start: int) -> Iterator[Contribution]:
    """The rows of batches that differ in their labels, squared together.

    Args:
        start: where these rows begin in the batch that they are a part of.
    """
    first, *rest = terms
    if not rest:  # the whole batch, as it comes: nothing has to be held
        yield from engine.gradients(first)
        return
    held = {c.part.start: c for c in engine.gradients(first)}
    for batch in rest:
        for c in engine.gradients(batch):
            held[c.part.start] = _together(held[c.part.start], c)
            c.tensors.clear()
    for row in list(held):
        c = held.pop(row)
        yield Contribution(slice(start + row, start + c.part.stop), c.tensors, c.finite)


def _together(a: Contribution, b: Contribution) -> Contribution:
    tensors = {name: squared_together(g, b.tensors[name]) for name, g in a.tensors.items()}
    return Contribution(a.part, tensors, a.finite & b.finite)
