"""Selection rules: scores in, indices out. Pure functions.

Counts are exact. Ties go to the lowest index, so a rule's answer depends on nothing but the scores.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ird_search.errors import UsageError

CHUNK = 1 << 18
"""Scores looked at together: their copies stay in the processor's cache."""

HALF = 1 << 15


def top_k(scores: Tensor, k: int) -> Tensor:
    """The indices of the k largest scores, increasing: int64 [k].

    Exactly k, whatever the ties: all scores above the k-th largest, then those equal to it by
    index. A threshold alone keeps every tie.

    Args:
        scores: [n]; NaN is not allowed, −∞ is.

    Raises:
        UsageError: k is not in 0 … n, or a score is NaN.

    Example:
        >>> top_k(torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0]), 2)
        tensor([1, 2])
    """
    if not 0 <= k <= scores.numel():
        raise UsageError(f"Cannot take {k} of {scores.numel()} scores.")
    if k == 0:
        return torch.empty(0, dtype=torch.int64)
    threshold, wanted = _threshold(scores, k)
    chosen = []
    for start in range(0, scores.numel(), CHUNK):
        part = scores[start : start + CHUNK]
        places = _places(part >= threshold)
        values = part[places.to(part.device)].cpu()
        equal = values == threshold
        chosen.append(start + places[~equal | (equal.cumsum(0) <= wanted)])
        wanted -= min(wanted, int(equal.sum()))
    return torch.cat(chosen)


def _places(mask: Tensor) -> Tensor:
    """Where a mask is true, on the CPU: int64."""
    if mask.device.type == "cpu":  # six times as fast as torch's own
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().flatten().cpu()


def top_positive(scores: Tensor, k: int) -> Tensor:
    """`top_k` among the entries with a positive score: at most k, fewer where fewer are positive.

    An entry whose Fisher score is exactly zero was never touched by a gradient (LoRA's A while B is
    zero, an embedding row never read): it is no candidate, and must not fill up a mask.
    """
    return top_k(scores, min(k, int((scores > 0).sum())))


def ranks(scores: Tensor, skip: int, k: int) -> Tensor:
    """The k entries that rank behind the `skip` largest, increasing; only positive scores count.

    Fewer than k come back where fewer are positive. `skip` 0 is FISH's rule.

    Example:
        >>> ranks(torch.tensor([5.0, 0.0, 4.0, 3.0, 2.0]), 1, 2)
        tensor([2, 3])
    """
    upper = top_positive(scores, skip + k)
    if skip == 0:
        return upper
    return upper[~torch.isin(upper, top_positive(scores, skip))]


def _threshold(scores: Tensor, k: int) -> tuple[float, int]:
    """(the k-th largest score, how many of those equal to it are among the k largest).

    By radix search on the bits of float32: two streaming passes over 16-bit histograms, no sorted
    copy and no index array.

    Raises:
        UsageError: a score is NaN.
    """
    if scores.dtype != torch.float32 or scores.device.type != "cpu":
        if bool(scores.isnan().any()):
            raise UsageError("Scores must not be NaN.")
        kth = torch.topk(scores, k, sorted=False).values.min()
        return float(kth), k - int((scores > kth).sum())
    high, rest = _bin_from_top(scores, k, prefix=None)
    low, wanted = _bin_from_top(scores, rest, prefix=high)
    key = torch.tensor([((high - HALF) << 16) | low], dtype=torch.int32)
    return float((key ^ ((key >> 31) & 0x7FFFFFFF)).view(torch.float32)), wanted


def _ordered(scores: Tensor) -> Tensor:
    """Signed integers in the order of some scores, 0 and −0 as one: float32 → int32."""
    if bool(scores.sum().isnan()) and bool(scores.isnan().any()):  # ∞ − ∞ is NaN too
        raise UsageError("Scores must not be NaN.")
    bits = (scores + 0.0).view(torch.int32)
    return bits if int(bits.min()) >= 0 else bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _bin_from_top(scores: Tensor, k: int, *, prefix: int | None) -> tuple[int, int]:
    """The 16-bit bin that holds the k-th largest key, and how many of it are needed there.

    Args:
        prefix: None for bins of the high bits, shifted to begin at 0; else bins of the low bits of
            the keys with these high bits.
    """
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for start in range(0, scores.numel(), CHUNK):
        keys = _ordered(scores[start : start + CHUNK])
        bins = (keys >> 16).add_(HALF)
        if prefix is not None:
            bins = keys[_places(bins == prefix)] & 0xFFFF
        counts += torch.bincount(bins, minlength=1 << 16)
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, k))
    before = int(from_top[place - 1]) if place else 0
    return (1 << 16) - 1 - place, k - before


def decreasing_range(start: int, stop: int, rounds: int) -> list[int]:
    """Sizes that fall geometrically from `start` to `stop` in at most `rounds` steps.

    n_t = start · (stop/start)^(t/rounds), rounded, strictly decreasing, both ends exact.

    Example:
        >>> decreasing_range(128, 8, 4)
        [128, 64, 32, 16, 8]
        >>> decreasing_range(3, 3, 4)
        [3]
    """
    sizes = [round(start * (stop / start) ** (t / rounds)) for t in range(rounds + 1)]
    sizes = [start, *(min(start, max(stop, n)) for n in sizes[1:-1]), stop]
    return sorted(set(sizes), reverse=True)


def random_subset(total: int, k: int, *, seed: int) -> Tensor:
    """k of `total` indices, increasing, drawn without replacement.

    Raises:
        UsageError: k is not in 0 … total.
    """
    if not 0 <= k <= total:
        raise UsageError(f"Cannot draw {k} of {total}.")
    drawn = np.random.default_rng(seed).choice(total, size=k, replace=False, shuffle=False)
    return torch.from_numpy(np.sort(drawn).astype(np.int64))
