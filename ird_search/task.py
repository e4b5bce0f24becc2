"""`Task`: which log-likelihood to differentiate and which metric to report.

The only place that knows about model families' outputs. Everything else sees a batch of inputs,
a tensor of labels, and one log-likelihood per sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ird_search.errors import ModelError, UsageError

Inputs = Mapping[str, Tensor]
POSITIONAL = "input"
"""The key of an input that is passed by position: `model(x)`."""

IGNORED = -100
"""A label that carries no likelihood (padding, prompt)."""


def logits_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """Run the model and return its logits, whatever it wraps them in.

    Labels are never passed, so a model's own loss is never used.

    Raises:
        ModelError: the output holds no tensor of logits.
    """
    output = model(inputs[POSITIONAL]) if set(inputs) == {POSITIONAL} else model(**inputs)
    logits = getattr(output, "logits", output)
    logits = logits[0] if isinstance(logits, tuple) else logits
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"The model returned {type(output).__name__}; a tensor of logits, or an output with "
            "`.logits`, is needed."
        )
    return logits


@dataclass(frozen=True)
class Task:
    """The seam between a model family and the search.

    A task turns logits and labels into log p(yᵢ | xᵢ; θ), one number per sample. Subclasses define
    `log_likelihood`, `summary` and `metrics`.
    """

    name: ClassVar[str]
    metric: ClassVar[str]

    def log_likelihood(self, logits: Tensor, labels: Tensor) -> Tensor:
        """log p(yᵢ | xᵢ; θ), float32 or wider: [B]."""
        raise NotImplementedError

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The training loss of a batch, a scalar: the mean negative log-likelihood."""
        return -self.log_likelihood(logits, labels).mean()

    def noise(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """What `drawn` makes labels of, one number a label, float32, in the labels' shape.

        Uniform in 0 … 1 here: the place in the cumulative distribution.
        """
        return torch.rand(labels.shape, generator=generator)

    def drawn(self, logits: Tensor, noise: Tensor) -> Tensor:
        """Labels from the model's own distribution p(y | xᵢ; θ), in the shape of `noise`."""
        raise NotImplementedError

    def summary(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What `metrics` needs of each sample: [B, …]."""
        return logits

    def metrics(self, summary: Tensor, labels: Tensor) -> dict[str, float]:
        """Scores over a whole data set; the task's own `metric` comes first."""
        raise NotImplementedError


@dataclass(frozen=True)
class Classification(Task):
    """One label a sample: log softmax(logits)[y]. Texts, pairs of texts, or images.

    Args:
        num_labels: number of classes C; logits are [B, C].
    """

    num_labels: int
    name: ClassVar[str] = "classification"
    metric: ClassVar[str] = "accuracy"

    def log_likelihood(self, logits: Tensor, labels: Tensor) -> Tensor:
        return -F.cross_entropy(_wide(logits), labels, reduction="none")

    def drawn(self, logits: Tensor, noise: Tensor) -> Tensor:
        return _placed(logits, noise)

    def metrics(self, summary: Tensor, labels: Tensor) -> dict[str, float]:
        predicted, gold = summary.argmax(-1).cpu().numpy(), labels.cpu().numpy()
        found = {
            "accuracy": float((predicted == gold).mean()),
            "f1": _f1(predicted, gold, self.num_labels),
        }
        if self.num_labels == 2:
            found["matthews"] = _correlation(predicted, gold)
            found["auc"] = _auc((summary[:, 1] - summary[:, 0]).float().cpu().numpy(), gold)
        return found


@dataclass(frozen=True)
class Regression(Task):
    """One number a sample, Gaussian with unit variance: −½ (y − f(x))² − ½ log 2π."""

    name: ClassVar[str] = "regression"
    metric: ClassVar[str] = "pearson"

    def log_likelihood(self, logits: Tensor, labels: Tensor) -> Tensor:
        error = _wide(logits).reshape(labels.shape) - labels
        return -0.5 * error.square() - 0.5 * math.log(2 * math.pi)

    def noise(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Standard deviations from the mean, normal."""
        return torch.randn(labels.shape, generator=generator)

    def drawn(self, logits: Tensor, noise: Tensor) -> Tensor:
        return _wide(logits).reshape(noise.shape) + noise

    def metrics(self, summary: Tensor, labels: Tensor) -> dict[str, float]:
        predicted, gold = summary.reshape(-1).cpu().numpy(), labels.cpu().numpy()
        return {
            "pearson": _correlation(predicted, gold),
            "spearman": _correlation(_ranks(predicted), _ranks(gold)),
            "mse": float(np.square(predicted.astype(np.float64) - gold).mean()),
        }


@dataclass(frozen=True)
class LanguageModel(Task):
    """Texts, token by token: Σ_t log p(y_t | …), one number per sequence.

    Labels are [B, T]; −100 (padding, prompt) is left out. Logits at t are of the label `shift`
    places on.
    """

    metric: ClassVar[str] = "perplexity"
    shift: ClassVar[int]

    def targets(self, labels: Tensor) -> Tensor:
        """The labels that have logits, in line with `answers`: [B, T] → [B, T − shift]."""
        return labels[:, self.shift :]

    def answers(self, logits: Tensor) -> Tensor:
        """The logits that have a label: [B, T, V] → [B, T − shift, V]."""
        return logits[:, : logits.shape[1] - self.shift]

    def log_likelihood(self, logits: Tensor, labels: Tensor) -> Tensor:
        picked = F.cross_entropy(
            _wide(self.answers(logits)).flatten(0, 1),
            self.targets(labels).flatten(),
            reduction="none",
            ignore_index=IGNORED,
        )
        return -picked.view(labels.shape[0], -1).sum(-1)

    def noise(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Uniform in 0 … 1; −100 stays where no likelihood is."""
        return super().noise(labels, generator).masked_fill(labels == IGNORED, IGNORED)

    def drawn(self, logits: Tensor, noise: Tensor) -> Tensor:
        """Each target from p(y_t | y_<t), behind the tokens that are there."""
        picked = _placed(self.answers(logits), self.targets(noise))
        return F.pad(picked, (self.shift, 0), value=IGNORED).masked_fill(noise == IGNORED, IGNORED)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean over the batch's predicted tokens, as trainers of language models use it."""
        tokens = (self.targets(labels) != IGNORED).sum()
        return -self.log_likelihood(logits, labels).sum() / tokens

    def summary(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(negative log-likelihood, predicted tokens) of each sequence: [B, 2]."""
        tokens = (self.targets(labels) != IGNORED).sum(-1)
        return torch.stack([-self.log_likelihood(logits, labels), tokens.float()], -1)

    def metrics(self, summary: Tensor, labels: Tensor) -> dict[str, float]:
        nll, tokens = summary.double().sum(0).tolist()
        return {"perplexity": math.exp(min(nll / tokens, 700.0))}


@dataclass(frozen=True)
class CausalLM(LanguageModel):
    """Next-token prediction: Σ_t log p(y_t | y_<t). Labels are aligned with the inputs."""

    name: ClassVar[str] = "causal-lm"
    shift: ClassVar[int] = 1


@dataclass(frozen=True)
class Seq2SeqLM(LanguageModel):
    """A text from another: Σ_t log p(y_t | y_<t, x). Labels are aligned with the logits.

    The decoder reads y_<t as `decoder_input_ids`: the labels, shifted before they come here.
    """

    name: ClassVar[str] = "seq2seq"
    shift: ClassVar[int] = 0


def make_task(name: str, num_labels: int | None = None) -> Task:
    """A task by its name; `image-classification` is a classification.

    Raises:
        UsageError: an unknown name, or a classification with fewer than two classes.
    """
    if name in ("classification", "image-classification"):
        if num_labels is None or num_labels < 2:
            raise UsageError(
                f"A classification needs two classes or more, not {num_labels}. A model with one "
                "output learns numbers: pass task='regression' (--task regression), or give it a "
                "logit for each class."
            )
        return Classification(num_labels)
    plain = {task.name: task for task in (Regression, CausalLM, Seq2SeqLM)}
    if name not in plain:
        raise UsageError(f"Unknown task {name!r}; known are classification, {', '.join(plain)}.")
    return plain[name]()


def _wide(logits: Tensor) -> Tensor:
    """At least float32: half precision loses the tail of a log-likelihood."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _placed(logits: Tensor, places: Tensor) -> Tensor:
    """The class at a place in the cumulative distribution: [..., C] and [...] → int64 [...].

    In float64, where there is one: another batch rounds logits otherwise, and float32 sums over a
    vocabulary would let that decide a draw more often.
    """
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    shares = logits.softmax(-1, dtype=dtype)
    if torch.are_deterministic_algorithms_enabled():
        shares = shares.cpu()  # CUDA knows no deterministic cumulative sum
    below = shares.cumsum(-1)[..., :-1]
    return (below <= places.to(below)[..., None]).sum(-1).to(logits.device)


def _f1(predicted: np.ndarray, gold: np.ndarray, num_labels: int) -> float:
    """F1 of class 1 for two classes; of more, the macro average of those that occur."""
    wanted = [1] if num_labels == 2 else np.union1d(gold, predicted)
    scores = []
    for c in wanted:
        hits = float(((predicted == c) & (gold == c)).sum())
        total = float((predicted == c).sum() + (gold == c).sum())
        scores.append(2 * hits / total if total else 0.0)
    return float(np.mean(scores))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation, 0 where one side is constant (as Matthews' is defined)."""
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a.astype(float), b.astype(float))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing the mean of theirs."""
    from scipy.stats import rankdata  # half a second, for who needs it

    return rankdata(values)


def _auc(margin: np.ndarray, gold: np.ndarray) -> float:
    """Area under the ROC curve by ranks (ties count half); ½ where one class is missing."""
    positives = int((gold == 1).sum())
    negatives = gold.size - positives
    if not positives or not negatives:
        return 0.5
    ranks = _ranks(margin)[gold == 1].sum()
    return float((ranks - positives * (positives + 1) / 2) / (positives * negatives))
