"""`Reading`: how a mask is read off the gradients of a sample set.

    c_j = 1/|S| Σ_i g[i, j]²      m_j = 1/|S| Σ_i g[i, j]

    fisher    c_j                 mean square: how much the samples' likelihoods depend on θⱼ
    mean      |m_j|               how much the likelihood of all gains from one step along θⱼ
    snr       |m_j| / √c_j        how far the samples agree on the direction, in 0 … 1
    decrease  max |m_j|δ − ½c_jδ², 0 ≤ δ ≤ reach
                                  how far a move of θⱼ alone lowers the loss, with c as curvature

With σ² = c − m² the signal-to-noise ratio |m|/σ ranks entries as `snr` does, which is bounded. The
best move of `decrease` is δ = |m|/c, and then it is ½snr²; where that is out of reach it goes to
the border. So it ranks as `mean` does for a small reach, and as `snr` for a large one: what it
leaves out are entries on which samples agree, but which would have to move far to matter.

The largest Fisher scores pile up in a few tensors, and other entries can be the better ones to
train; so a reading also has a ceiling for each tensor, and ranks that it passes over. Which reading
is best is for proxies to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from torch import Tensor

from ird_search.config import Criterion, Part, SearchConfig
from ird_search.fisher import Moments

CEILINGS = (None, 4.0, 1.0)
"""Ceilings that a search tries, in order of its steps."""
SKIPS = (0.0, 1.0, 3.0, 10.0)
"""Ranks passed over that a search tries, as multiples of the budget, in order of its steps."""

NOISE = 1e-12
"""A mean square below this share of the largest is rounding noise, whose sign may well agree: the
true gradient of an attention key's bias is zero."""


@dataclass(frozen=True)
class Reading:
    """A rule from the moments of a sample set's gradients to a mask.

    Args:
        criterion: what ranks the parameters.
        ceiling: the most that a tensor may be selected, as a multiple of the mask's density.
        skip: ranks passed over at the top, as a multiple of the budget.
        reach: how far a weight may move, in its own unit: of `decrease`.

    Example:
        >>> str(Reading()), str(Reading("snr", ceiling=1.0, skip=3.0))
        ('fisher', 'snr, ceiling 1, skip 3')
    """

    criterion: Criterion = "fisher"
    ceiling: float | None = None
    skip: float = 0.0
    reach: float = 1.0

    @classmethod
    def of(cls, config: SearchConfig) -> Reading:
        """The one that a search begins with: the settings', by default `snr`, which needs no scale.

        The ladder's is `fisher`: it is the closest reading of the paper. So is that of `fish`, and
        so it is where there is no mean gradient.
        """
        squares = config.strategy in ("ladder", "fish") or not config.signed
        usual: Criterion = "fisher" if squares else "snr"
        return cls(config.criterion or usual, config.ceiling, config.skip, config.reach)

    @property
    def needs_mean(self) -> bool:
        """Whether m_j is asked for."""
        return self.criterion != "fisher"

    def scores(self, moments: Moments) -> Tensor:
        """What ranks the parameters, larger is better: float32 [k]."""
        if self.criterion == "fisher":
            return moments.square
        assert moments.mean is not None
        size = moments.mean.abs()
        if self.criterion == "mean":
            return size
        if self.criterion == "decrease":
            move = (size / moments.square).nan_to_num_(nan=0.0).clamp_(max=self.reach)
            return move * (size - move * moments.square / 2)
        ratio = (size / moments.square.sqrt()).nan_to_num_(nan=0.0, posinf=0.0).clamp_(max=1.0)
        noise = moments.square <= NOISE * moments.square.max()
        return ratio.masked_fill_(noise, 0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def __str__(self) -> str:
        ceiling = "" if self.ceiling is None else f", ceiling {self.ceiling:g}"
        skip = f", skip {self.skip:g}" if self.skip else ""
        near = self.criterion == "decrease" and self.reach != 1
        reach = f", reach {self.reach:g}" if near else ""
        return f"{self.criterion}{reach}{ceiling}{skip}"


def levels(part: Part, base: Reading) -> tuple[Any, ...]:
    """What a search tries for one part of a reading; the base's own value is among them."""
    known: dict[Part, tuple[Any, ...]] = {
        "criterion": get_args(Criterion),
        "ceiling": CEILINGS,
        "skip": SKIPS,
    }
    own = getattr(base, part)
    if own in known[part]:
        return known[part]
    if part == "ceiling":
        return (None, *sorted({own, *known[part][1:]}, reverse=True))
    return tuple(sorted({own, *known[part]}))


def neighbours(reading: Reading, vary: Sequence[Part], base: Reading) -> Iterator[Reading]:
    """The readings one step away: any other criterion, the next ceilings, the next skips."""
    for part in vary:
        known = levels(part, base)
        at = known.index(getattr(reading, part))
        for i, value in enumerate(known):
            if i != at and (part == "criterion" or abs(i - at) == 1):
                yield replace(reading, **{part: value})


def all_readings(base: Reading, vary: Sequence[Part]) -> Iterator[Reading]:
    """Every combination of what a search may vary, the base first."""
    found = [base]
    for part in vary:
        found = [replace(r, **{part: value}) for r in found for value in levels(part, base)]
    yield from dict.fromkeys([base, *found])
