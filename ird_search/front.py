"""The density-score front: what each size costs, and which one to take.

A pair is on the front where no pair of at most as many parameters has a better score. Scores are
noisy, so a larger mask does not win by a third decimal: what a paired test over the held-out
samples calls tied goes to fewer parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ird_search.config import Pick
from ird_search.pair import Scored


def front(scored: Iterable[Scored]) -> list[Scored]:
    """The pairs that no smaller or equal one is better than, fewest parameters first.

    Only full-length proxies that succeeded count.
    """
    usable = [s for s in scored if s.proxy.best.ok and not s.proxy.short]
    found: list[Scored] = []
    for s in sorted(usable, key=lambda s: (s.mask.count, s.proxy.score)):
        if not found or s.proxy.score < found[-1].proxy.score:
            found.append(s)
    return found


def best_of(
    scored: Sequence[Scored], *, pick: Pick = "target", tolerance: float | None = None
) -> Scored:
    """The pair to take.

    target: the best score; among those that are tied with it, the fewest parameters.
    smallest: the fewest parameters at a score within `tolerance` of the best, or tied with it.
    knee: where the front bends most, between its ends in log density and score.
    """
    lead = min(scored, key=lambda s: s.order)
    if not lead.proxy.best.ok or lead.proxy.short:
        return lead
    if pick == "knee":
        return _knee(front(scored))
    alike = [lead, *(s for s in scored if s is not lead and _as_good(s, lead, pick, tolerance))]
    return min(alike, key=lambda s: (s.mask.count, s.order))


def _as_good(s: Scored, lead: Scored, pick: Pick, tolerance: float | None) -> bool:
    if not s.proxy.best.ok or s.proxy.short:
        return False
    if pick == "smallest" and tolerance is not None:
        return s.proxy.score <= lead.proxy.score + tolerance
    return s.tied(lead)


def _knee(found: Sequence[Scored]) -> Scored:
    """The point of the front farthest below the line between its ends, both axes scaled to 0 … 1.

    The way of Kneedle (Satopää et al. 2011). Where it bends nowhere, the best score.
    """
    if len(found) < 3:
        return found[-1]
    sizes = [math.log(s.mask.count) for s in found]
    scores = [s.proxy.score for s in found]
    x = [(v - sizes[0]) / (sizes[-1] - sizes[0]) for v in sizes]
    y = [(v - scores[-1]) / (scores[0] - scores[-1]) for v in scores]
    below = [1 - a - b for a, b in zip(x, y, strict=True)]
    if max(below) <= 1e-9:  # it bends nowhere
        return found[-1]
    return found[max(range(len(found)), key=lambda i: (below[i], -i))]
