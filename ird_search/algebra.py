"""Several masks at once: their union, their intersection, and masks that share nothing.

Everything here works on masks alone: no model is needed. Masks may have chosen from different
tensors of one model; see `spaces.common_space`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ird_search.errors import UsageError
from ird_search.mask import SparseMask, in_at_least, in_common_space

Scores = Mapping[str, Tensor]
"""The score of every entry, in the tensors' shapes, by name: what `fisher_scores` gives."""


def union(masks: Iterable[SparseMask]) -> SparseMask:
    """The parameters that any of the masks selects.

    Raises:
        UsageError: no mask is given, or the masks are of different models.
    """
    return in_at_least(1, masks)


def intersection(masks: Iterable[SparseMask]) -> SparseMask:
    """The parameters that all of the masks select.

    Raises:
        UsageError: no mask is given, or the masks are of different models.
    """
    masks = list(masks)
    return in_at_least(len(masks), masks)


def disjoint(
    masks: Sequence[SparseMask], scores: Sequence[Scores] | None = None
) -> tuple[SparseMask, ...]:
    """Masks for several tasks, no two of which share a parameter; their union stays the same.

    An entry that several masks select goes to the one that scores it highest. Entries that are
    scored alike, or all of them where no scores are given, are dealt out in turn: of the entries
    that the same masks claim, each gets equally many, to within one. So two masks without scores
    lose equally many, to within one.

    Args:
        scores: for each mask, its task's scores by tensor. They are compared between tasks, so
            bring them to one scale first.

    Raises:
        UsageError: no mask is given; the masks are of different models; scores are not one for each
            mask, do not fit the tensors, or are NaN where masks meet.

    Example:
        >>> from ird_search.parameters import ParameterSpace
        >>> space = ParameterSpace(("w",), ((6,),))
        >>> a, b = (SparseMask(space, torch.tensor(c)) for c in ([0, 1, 2, 3], [2, 3, 4]))
        >>> [mask.coords.tolist() for mask in disjoint([a, b])]
        [[0, 1, 2], [3, 4]]
        >>> likes_late, even = {"w": torch.arange(6.0)}, {"w": torch.full((6,), 2.5)}
        >>> [mask.coords.tolist() for mask in disjoint([a, b], [likes_late, even])]
        [[0, 1, 3], [2, 4]]
    """
    masks = in_common_space(masks)
    contested = in_at_least(2, masks) if len(masks) > 1 else masks[0] - masks[0]
    claims = torch.stack([torch.isin(contested.coords, m.coords) for m in masks], dim=1)
    if scores is not None:
        found = _claimed_scores(masks, contested, scores)
        claims &= found == found.amax(dim=1, keepdim=True)
    owner = _dealt(claims)
    return tuple(
        (mask - contested) | SparseMask(mask.space, contested.coords[owner == task])
        for task, mask in enumerate(masks)
    )


def _dealt(claims: Tensor) -> Tensor:
    """Which mask gets each entry, in turn among those that claim it: int64 [entries].

    Args:
        claims: which masks claim which entry: bool [entries, masks].
    """
    owner = torch.empty(len(claims), dtype=torch.int64)
    lost = [0] * claims.shape[1]
    for rows in _by_claimants(claims):
        claimants = claims[rows[0]].nonzero().flatten().tolist()
        turn = sorted(claimants, key=lambda task: -lost[task])
        for place, task in enumerate(turn):
            won = rows[place :: len(turn)]
            owner[won] = task
            lost[task] += len(rows) - len(won)
    return owner


def _by_claimants(claims: Tensor) -> Iterator[Tensor]:
    """The entries that the same masks claim, as increasing rows, one group after another."""
    kind, kinds = torch.zeros(len(claims), dtype=torch.int64), 0
    for claim in claims.T:  # one column at a time: unique(dim=0) sorts whole rows
        values, kind = (2 * kind + claim).unique(return_inverse=True)
        kinds = len(values)
    return ((kind == i).nonzero().flatten() for i in range(kinds))


def _claimed_scores(
    masks: Sequence[SparseMask], contested: SparseMask, scores: Sequence[Scores]
) -> Tensor:
    """What each task scores the contested entries that it claims, −∞ elsewhere.

    Returns:
        float64 [entries, masks].
    """
    if len(scores) != len(masks):
        raise UsageError(f"{len(masks)} masks need a score each; {len(scores)} are given.")
    claimed = [mask & contested for mask in masks]
    if problems := [
        f"The scores of mask {task} have no {name!r} of shape {list(mask.space.shape(name))}."
        for task, (mask, given) in enumerate(zip(claimed, scores, strict=True))
        for name in mask.indices
        if name not in given or tuple(given[name].shape) != mask.space.shape(name)
    ]:
        raise UsageError(problems)
    found = torch.full((contested.count, len(masks)), -torch.inf, dtype=torch.float64)
    for task, (mask, given) in enumerate(zip(claimed, scores, strict=True)):
        row = torch.searchsorted(contested.coords, mask.coords)
        held = [given[name].reshape(-1).cpu()[i] for name, i in mask.indices.items()]
        found[row, task] = torch.cat([found.new_empty(0), *held]).double()
    if bool(found.isnan().any()):
        raise UsageError("A score is NaN where masks meet: it cannot tell who gets the entry.")
    return found
