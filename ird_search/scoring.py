"""`ScoringPoint`: the weights at which F is computed, if training does not start there.

LoRA adds B A to a weight and starts at B = 0, where the gradient of A is exactly zero; so does
every adapter whose last matrix starts at zero. A few steps of training everything move away from
that point; there F is computed, and then the weights are put back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from ird_search.parameters import ParameterSpace
from ird_search.training import Snapshot

STEPS = 20
"""Steps that are trained where a candidate matrix is all zero."""


@dataclass(frozen=True, eq=False)
class ScoringPoint:
    """Two states of one model.

    Args:
        start: where it is, and where proxies start from.
        there: where its gradients are taken.
    """

    start: Snapshot
    there: Snapshot

    @contextmanager
    def visited(self) -> Iterator[None]:
        """Within the block the model has the weights of the scoring point."""
        self.there.restore()
        try:
            yield
        finally:
            self.start.restore()


def scoring_steps(asked: int | None, model: nn.Module, space: ParameterSpace) -> int:
    """How many steps to train before scoring: as asked for, else `STEPS` where that is needed."""
    if asked is not None:
        return asked
    return STEPS if any(map(_is_zero_matrix, map(model.get_parameter, space.names))) else 0


def _is_zero_matrix(p: nn.Parameter) -> bool:
    return p.ndim > 1 and p.numel() > 0 and not bool(p.detach().any())
