"""Selection rules: scores in, indices out. Pure functions.

Counts are exact. Ties go to the lowest index, so a rule's answer depends on nothing but the scores.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ird_search.errors import UsageError

CHUNK = 1 << 20


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
    threshold = kth_largest(scores, k)
    above = (scores > threshold).nonzero().flatten().cpu()
    equal = (scores == threshold).nonzero().flatten().cpu()[: k - above.numel()]
    return torch.cat([above, equal]).sort().values


def top_positive(scores: Tensor, k: int) -> Tensor:
    """`top_k` among the entries with a positive score: at most k, fewer where fewer are positive.

    An entry whose Fisher score is exactly zero was never touched by a gradient (LoRA's A while B is
    zero, an embedding row never read): it is no candidate, and must not fill up a mask.
    """
    return top_k(scores, min(k, int((scores > 0).sum())))


def kth_largest(scores: Tensor, k: int) -> float:
    """The k-th largest score, by radix search on the bits of float32.

    Two streaming passes over 16-bit histograms; no sorted copy and no index array.

    Raises:
        UsageError: a score is NaN.
    """
    if bool(scores.isnan().any()):
        raise UsageError("Scores must not be NaN.")
    if scores.dtype != torch.float32 or scores.device.type != "cpu":
        return float(torch.topk(scores, k, sorted=False).values.min())
    keys = scores.contiguous().numpy().view(np.uint32)
    high, rest = _bin_from_top(keys, k, shift=16, prefix=None)
    low, _ = _bin_from_top(keys, rest, shift=0, prefix=high)
    key = np.uint32(high << 16 | low)
    bits = key ^ np.uint32(0x80000000) if key & np.uint32(0x80000000) else ~key
    return float(np.array([bits], dtype=np.uint32).view(np.float32)[0])


def _ordered(keys: np.ndarray) -> np.ndarray:
    """float32 bits as unsigned integers in the order of the floats."""
    negative = (keys >> np.uint32(31)).astype(bool)
    return np.where(negative, ~keys, keys | np.uint32(0x80000000))


def _bin_from_top(keys: np.ndarray, k: int, *, shift: int, prefix: int | None) -> tuple[int, int]:
    """The 16-bit bin that holds the k-th largest key, and how many of it are needed there.

    Args:
        shift: which 16 bits.
        prefix: where given, only keys with these high bits count.
    """
    counts = np.zeros(1 << 16, dtype=np.int64)
    for start in range(0, keys.size, CHUNK):
        part = _ordered(keys[start : start + CHUNK])
        if prefix is not None:
            part = part[part >> np.uint32(16) == prefix]
        counts += np.bincount((part >> np.uint32(shift)) & np.uint32(0xFFFF), minlength=1 << 16)
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, k))
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
