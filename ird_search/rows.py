"""Row rules: scores of samples in, positions out. Pure functions.

The rows of F that a search keeps are those with the largest scores, unless a rule says otherwise:
a cap leaves out samples that score far above the others, which may be no more than mislabelled, and
balance keeps as many of each class, which scores alone would not.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ird_search.errors import UsageError
from ird_search.selection import top_k


def choose_rows(
    scores: Tensor, n: int, *, labels: Tensor | None = None, cap: float | None = None
) -> Tensor:
    """The positions of the n rows with the largest scores, increasing: int64 [n].

    Exactly n, whatever the ties. Rows without a finite gradient (−∞) come last in any case.

    Args:
        scores: r_i(M) of each row, [rows]; NaN is not allowed.
        labels: class ids, int64 [rows]. Where they are given, as many rows of each class: no class
            gets a row more than another that still has one. Where the last rows do not suffice for
            all classes, those whose next row scores higher get one, then those of the lower id.
        cap: rows that score above so many times the median of the positive scores are passed over.
            Where fewer than n are left, the least of them are taken back.

    Raises:
        UsageError: n is not in 0 … rows, a score is NaN, or labels and scores differ in number.

    Example:
        >>> scores = torch.tensor([9.0, 3.0, 2.0, 8.0, 1.0, 99.0])
        >>> choose_rows(scores, 3)
        tensor([0, 3, 5])
        >>> choose_rows(scores, 3, cap=4)
        tensor([0, 1, 3])
        >>> choose_rows(scores, 4, labels=torch.tensor([0, 0, 1, 0, 1, 0]))
        tensor([0, 2, 4, 5])
    """
    _require_rows(scores, n, labels)
    scores = scores.double()  # exact, so equal scores stay equal
    rows = _open(scores, n, cap)
    if labels is None:
        return rows[top_k(scores[rows], n)]
    return rows[_dealt(scores[rows], labels[rows], n)]


def _require_rows(scores: Tensor, n: int, labels: Tensor | None) -> None:
    problems = []
    if not 0 <= n <= scores.numel():
        problems.append(f"Cannot take {n} of {scores.numel()} rows.")
    if bool(scores.isnan().any()):
        problems.append("Scores must not be NaN.")
    if labels is not None and labels.shape != scores.shape:
        problems.append(
            f"{labels.numel()} labels came with {scores.numel()} scores; pass one class id for "
            "each row, or none."
        )
    if problems:
        raise UsageError(problems)


def _open(scores: Tensor, n: int, cap: float | None) -> Tensor:
    """The rows to choose from, increasing, at least n: the regular ones, and what must be added."""
    excluded = scores == -torch.inf
    outlier = scores > _limit(scores, cap)
    regular = (~excluded & ~outlier).nonzero().flatten()
    above = outlier.nonzero().flatten()
    least_first = above[scores[above].argsort(stable=True)]
    queue = torch.cat([regular, least_first, excluded.nonzero().flatten()])
    return queue[: max(n, regular.numel())].sort().values


def _limit(scores: Tensor, cap: float | None) -> float:
    """The score above which a row is an outlier."""
    finite = scores[scores.isfinite()]
    positive = finite[finite > 0]  # a sample that the model is sure of has no gradient
    if cap is None or not positive.numel():
        return torch.inf
    return cap * float(np.median(positive.numpy()))


def _dealt(scores: Tensor, labels: Tensor, n: int) -> Tensor:
    """n rows dealt out to the classes in turn: the best row of each, the second of each, …"""
    below, classes = -scores.numpy(), labels.numpy()
    order = np.lexsort((below, classes))  # by class, the best first, ties by index
    _, first, counts = np.unique(classes[order], return_index=True, return_counts=True)
    turn = np.empty_like(order)
    turn[order] = np.arange(order.size) - np.repeat(first, counts)
    dealt = np.lexsort((classes, below, turn))[:n]
    return torch.from_numpy(np.sort(dealt))
