"""Paired comparisons: which of two is better, judged on the same held-out samples.

Two fine-tunes are far more alike on one sample than one fine-tune is on two samples: most of the
spread of losses lies in the samples, and a difference sample by sample takes it out.

    dᵢ = theirsᵢ − oursᵢ          d̄ ± t · s(d)/√n          positive where ours is better

Where d̄ is larger than its half width, zero lies outside a 95% interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.special import stdtrit
from torch import Tensor

from ird_search.errors import UsageError

CONFIDENCE = 0.95
"""Of every interval here."""

SPREAD = 0.35
"""Standard deviation over samples of the difference in loss between two masks of one size, to plan
with: MiniLM on SST-2 gave 0.16 to 0.32, a vision transformer on five digits 0.6 to 1.0."""


@dataclass(frozen=True)
class Gain:
    """How much lower our loss is than theirs, with the half width of its 95% interval.

    Args:
        mean: positive where ours is better; NaN where there is nothing to compare.
        half_width: infinite where the interval cannot be told.

    Example:
        >>> Gain(0.03, 0.02).better, Gain(-0.03, 0.02).worse, Gain(0.01, 0.02).tied
        (True, True, True)
    """

    mean: float
    half_width: float

    @property
    def better(self) -> bool:
        """Ours is, by more than chance."""
        return self.mean > self.half_width

    @property
    def worse(self) -> bool:
        """Ours is, by more than chance."""
        return self.mean < -self.half_width

    @property
    def tied(self) -> bool:
        """The two cannot be told apart."""
        return not self.better and not self.worse


UNKNOWN = Gain(math.nan, math.inf)
"""Where one of the two has no losses."""


def gain(ours: Tensor, theirs: Tensor) -> Gain:
    """The mean over samples of theirs − ours, with Student's interval over the samples.

    It covers new samples, and not another run of the same two.

    Args:
        ours, theirs: losses on the same samples in the same order: [n].

    Raises:
        UsageError: they are not of the same samples.

    Example:
        >>> import torch
        >>> found = gain(torch.tensor([0.1, 0.2, 0.6]), torch.tensor([0.3, 0.5, 0.7]))
        >>> print(f"{found.mean:.2f} ± {found.half_width:.2f}", found.tied)
        0.20 ± 0.25 True
    """
    d = _differences(ours, theirs, 1)
    return Gain(float(d.mean()), _half_width(d))


def crossed(ours: Tensor, theirs: Tensor) -> Gain:
    """The mean of theirs − ours over seeds and samples, with an interval that covers new ones.

    Seeds and samples are two crossed sources of chance, whose variances add:

        w = √(w_seeds² + w_samples²)

    with Student's half widths of the S means over samples and of the n means over seeds. What the
    two share is counted twice, so the interval is a little wide. With one seed it is infinite.
    What was decided once for all seeds (the mask, the learning rate) is taken as given.

    Args:
        ours, theirs: losses of the same seeds on the same samples: [S, n].

    Raises:
        UsageError: they are not of the same seeds and samples.
    """
    d = _differences(ours, theirs, 2)
    return Gain(float(d.mean()), math.hypot(_half_width(d.mean(1)), _half_width(d.mean(0))))


def samples_needed(difference: float, *, spread: float = SPREAD) -> int:
    """How many samples it takes to tell a difference in loss: ⌈(1.96 · spread / difference)²⌉.

    Example:
        >>> samples_needed(0.05)
        189
    """
    return math.ceil((1.96 * spread / difference) ** 2)


def difference_told(samples: int, *, spread: float = SPREAD) -> float:
    """The smallest difference in loss that so many samples tell: 1.96 · spread / √n.

    Example:
        >>> round(difference_told(189), 3)
        0.05
    """
    return 1.96 * spread / samples**0.5


def _differences(ours: Tensor, theirs: Tensor, ndim: int) -> Tensor:
    if ours.shape != theirs.shape or ours.ndim != ndim or not ours.numel():
        axes = "[samples]" if ndim == 1 else "[seeds, samples]"
        raise UsageError(
            f"Losses of shape {list(ours.shape)} and {list(theirs.shape)} came to be paired; both "
            f"must be {axes}, of the same ones in the same order."
        )
    return theirs.double() - ours.double()


def _half_width(values: Tensor) -> float:
    """t · s/√n of Student's interval of the mean; infinite for a single value."""
    n = values.numel()
    if n < 2:
        return math.inf
    t = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2))
    return t * float(values.std()) / n**0.5
