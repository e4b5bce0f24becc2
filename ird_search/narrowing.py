"""`Narrowings`: what a run asks of F, each answer a unit of the ledger.

F is opened only when an answer is not there yet, so a run that is taken up again, or a process that
only helps with proxies, computes no gradient for what is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ird_search.budgets import Budgets
from ird_search.coordinates import digest, packed, unpacked
from ird_search.fisher import FisherMatrix, Memory
from ird_search.ledger import Job, Ledger, Unit, unit_key
from ird_search.mask import SparseMask
from ird_search.parameters import ParameterSpace
from ird_search.samples import SampleSet
from ird_search.search import Move, Nomination, Pair, Ranges, nominate


class Narrowings:
    """Nominations, FISH masks and row scores of one run.

    Args:
        open_fisher: opens F over the pool.
        about: what the answers depend on besides the question.
        wait: leave the work to another process.
    """

    def __init__(
        self,
        open_fisher: Callable[[], FisherMatrix],
        space: ParameterSpace,
        ledger: Ledger,
        about: Mapping[str, Any],
        *,
        wait: bool = False,
    ) -> None:
        self.space, self.ledger, self.about, self.wait = space, ledger, dict(about), wait
        self.memory = Memory()
        """Of F, after the last answer."""
        self.path = ""
        """How the gradients were computed."""
        self._open = open_fisher
        self._fisher: FisherMatrix | None = None

    def nominate(
        self, pair: Pair, *, ranges: Ranges, moves: tuple[Move, ...], budgets: Budgets
    ) -> list[Nomination]:
        """See `search.nominate`."""
        inputs = {
            "nominate": [list(ranges.rows), list(ranges.columns), list(moves), *budgets.groups],
            "rows": digest(pair.rows),
            "open": digest(pair.open),
            "columns": digest(pair.columns),
            "at": [pair.shrunk, pair.step],
        }
        unit = self._unit(
            inputs,
            lambda fisher: _stored(
                nominate(fisher, pair, ranges, moves=moves, budgets=budgets), self.space
            ),
        )
        return [self._nomination(i, said, unit) for i, said in enumerate(unit.result["found"])]

    def fish(self, samples: SampleSet, count: int, budgets: Budgets) -> SparseMask:
        """See `fish_mask`."""
        inputs = {"fish": digest(samples.ids), "count": count, "groups": budgets.groups}

        def columns(fisher: FisherMatrix) -> Unit:
            mask = fish_mask(fisher, samples, count, budgets)
            return Unit({}, {"columns": packed(mask.coords, self.space.numel)})

        return SparseMask(self.space, unpacked(self._unit(inputs, columns).tensors["columns"]))

    def row_scores(self, rows: Tensor, mask: SparseMask) -> Tensor:
        """r_i(M): float64 [|S|]."""
        inputs = {"row scores": digest(rows), "mask": mask.digest}
        unit = self._unit(
            inputs, lambda fisher: Unit({}, {"scores": fisher.row_scores(rows, mask.coords)})
        )
        return unit.tensors["scores"]

    def _unit(self, inputs: dict[str, Any], do: Callable[[FisherMatrix], Unit]) -> Unit:
        """The answer, and F's memory as it was behind it."""

        def done() -> Unit:
            if self._fisher is None:
                self._fisher = self._open()
                self._fisher.remember(self.memory)
            answer, memory = do(self._fisher), self._fisher.memory.to_unit(self.space.numel)
            return Unit(
                {**answer.result, "path": self._fisher.engine.path, "memory": memory.result},
                {**answer.tensors, **memory.tensors},
            )

        key = unit_key({**self.about, **inputs})
        (unit,) = self.ledger.finish([Job("narrowing", key, done)], wait=self.wait)
        self.path = unit.result["path"]
        self.memory = Memory.of_unit(Unit(unit.result["memory"], unit.tensors))
        if self._fisher is not None:
            self._fisher.remember(self.memory)
            self._fisher.record.clear()
        return unit

    def _nomination(self, i: int, said: Mapping[str, Any], unit: Unit) -> Nomination:
        tensors = unit.tensors
        is_open = unpacked(tensors[f"{i}.open"]) if said["open"] else None
        mask = SparseMask(self.space, unpacked(tensors[f"{i}.columns"]))
        rows = tensors[f"{i}.rows"]
        return said["move"], Pair(rows, is_open, mask.coords, said["shrunk"], said["step"]), mask


def fish_mask(fisher: FisherMatrix, samples: SampleSet, count: int, budgets: Budgets) -> SparseMask:
    """FISH Mask (Sung et al. 2021): the columns with the largest mean over these samples."""
    scores = fisher.on(samples).column_scores(torch.arange(len(samples)))
    return SparseMask(fisher.space, budgets.ranks(scores, None, 0, count))


def _stored(found: Iterable[Nomination], space: ParameterSpace) -> Unit:
    said, tensors = [], dict[str, Tensor]()
    for i, (move, pair, mask) in enumerate(found):
        some = pair.open is not None
        said.append({"move": move, "open": some, "shrunk": pair.shrunk, "step": pair.step})
        tensors |= {f"{i}.rows": pair.rows, f"{i}.columns": packed(mask.coords, space.numel)}
        if pair.open is not None:
            tensors[f"{i}.open"] = packed(pair.open, space.numel)
    return Unit({"found": said}, tensors)
