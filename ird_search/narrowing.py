"""`Narrowings`: what a run asks of F, each answer a unit of the ledger.

F is opened only when an answer is not there yet, so a run that is taken up again, or a process that
only helps with proxies, computes no gradient for what is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ird_search.coordinates import digest, packed, unpacked
from ird_search.fisher import FisherMatrix, Memory
from ird_search.fisher.engine import joined_paths
from ird_search.ledger import Job, Ledger, Unit, unit_key
from ird_search.mask import SparseMask
from ird_search.moves import Move, Nomination, descended, narrowed, read
from ird_search.pair import Pair, Ranges
from ird_search.parameters import ParameterSpace
from ird_search.reading import Reading
from ird_search.samples import SampleSet
from ird_search.selector import Selector
from ird_search.stability import Stability, bootstrapped, settled


class Narrowings:
    """What strategies and controls ask of F, in one run.

    Args:
        open_fisher: opens F over the pool.
        selector: how rows and columns are chosen.
        about: what the answers depend on besides the question.
        wait: leave the work to another process.
    """

    def __init__(
        self,
        open_fisher: Callable[[], FisherMatrix],
        selector: Selector,
        ledger: Ledger,
        about: Mapping[str, Any],
        *,
        wait: bool = False,
    ) -> None:
        self.selector, self.space = selector, selector.budgets.space
        self.ledger, self.about, self.wait = ledger, dict(about), wait
        self.memory = Memory()
        """Of F, after the last answer."""
        self.path = ""
        """How the gradients were computed, of all answers so far."""
        self._open = open_fisher
        self._fisher: FisherMatrix | None = None

    def narrowed(self, pair: Pair, ranges: Ranges, moves: tuple[Move, ...]) -> list[Nomination]:
        """The pairs one move away; see `moves.narrowed`."""
        sizes = [list(ranges.rows), list(ranges.columns)]
        inputs = {"narrow": [*sizes, list(moves)], "from": _address(pair)}
        return self._nominations(
            inputs, lambda fisher: narrowed(fisher, self.selector, pair, ranges, moves)
        )

    def read(self, pair: Pair, k: int, move: str) -> list[Nomination]:
        """The pair of these rows and this reading; see `moves.read`."""
        found = self._nominations(
            {"read": k, "from": _address(pair)},
            lambda fisher: read(fisher, self.selector, pair, k, move),
        )
        return [(move, at, mask) for _, at, mask in found]  # another may have asked first

    def descended(self, rows: tuple[int, ...], columns: tuple[int, ...]) -> Tensor:
        """S where both ranges have fallen together; see `moves.descended`."""
        unit = self._unit(
            {"descend": [list(rows), list(columns)]},
            lambda fisher: Unit({}, {"rows": descended(fisher, self.selector, rows, columns)}),
        )
        return unit.tensors["rows"]

    def fish(self, samples: SampleSet, count: int) -> SparseMask:
        """FISH's mask over other samples than the pool's."""
        inputs = {"fish": digest(samples.ids), "count": count}
        rows = torch.arange(len(samples))
        return self._mask(inputs, lambda f: self.selector.fish(f.on(samples), rows, count))

    def reversed(self, rows: Tensor, count: int) -> SparseMask:
        """The columns with the smallest positive scores over some rows of the pool."""
        inputs = {"reversed": digest(rows), "count": count}
        return self._mask(inputs, lambda fisher: self.selector.reversed(fisher, rows, count))

    def stability(self, pair: Pair, mask: SparseMask, *, bootstraps: int, seed: int) -> Stability:
        """Whether other rows would have given the same mask; see `stability.bootstrapped`."""
        inputs = {"bootstraps": bootstraps, "seed": seed, "from": _address(pair)}

        def found(fisher: FisherMatrix) -> Unit:
            settings: dict[str, int] = {"bootstraps": bootstraps, "seed": seed}
            return bootstrapped(fisher, self.selector, pair, mask, **settings).to_unit()

        return Stability.of_unit(self._unit(inputs, found))

    def settled(
        self, order: Tensor, k: int, reading: Reading, *, at: float
    ) -> tuple[Tensor, list[tuple[int, float]]]:
        """As many rows as it takes; see `stability.settled`."""
        inputs = {"settle": at, "order": digest(order), "k": k, "reading": reading.to_dict()}

        def found(fisher: FisherMatrix) -> Unit:
            rows, seen = settled(fisher, self.selector, order, k, reading, at=at)
            return Unit({"seen": seen}, {"rows": rows})

        unit = self._unit(inputs, found)
        return unit.tensors["rows"], [(n, overlap) for n, overlap in unit.result["seen"]]

    def row_scores(self, rows: Tensor, mask: SparseMask) -> Tensor:
        """r_i(M): float64 [|S|]."""
        inputs = {"row scores": digest(rows), "mask": mask.digest}
        unit = self._unit(
            inputs, lambda fisher: Unit({}, {"scores": fisher.row_scores(rows, mask.coords)})
        )
        return unit.tensors["scores"]

    def _mask(self, inputs: dict[str, Any], do: Callable[[FisherMatrix], SparseMask]) -> SparseMask:
        def columns(fisher: FisherMatrix) -> Unit:
            return Unit({}, {"columns": packed(do(fisher).coords, self.space.numel)})

        return SparseMask(self.space, unpacked(self._unit(inputs, columns).tensors["columns"]))

    def _nominations(
        self, inputs: dict[str, Any], do: Callable[[FisherMatrix], Iterable[Nomination]]
    ) -> list[Nomination]:
        unit = self._unit(inputs, lambda fisher: _stored(do(fisher), self.space))
        return [self._nomination(i, said, unit) for i, said in enumerate(unit.result["found"])]

    def _unit(self, inputs: dict[str, Any], do: Callable[[FisherMatrix], Unit]) -> Unit:
        """The answer, and F's memory as it was behind it."""

        key = unit_key({**self.about, "selector": self.selector.about, **inputs})

        def done() -> Unit:
            if self._fisher is None:
                self._fisher = self._open()
                self._fisher.remember(self.memory)
            self._fisher.record.begin(key)
            answer, memory = do(self._fisher), self._fisher.memory.to_unit(self.space.numel)
            return Unit(
                {**answer.result, "path": self._fisher.path, "memory": memory.result},
                {**answer.tensors, **memory.tensors},
            )

        (unit,) = self.ledger.finish([Job("narrowing", key, done)], wait=self.wait)
        self.path = joined_paths(self.path, unit.result["path"])
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
        at = said["shrunk"], said["step"], Reading(**said["reading"])
        return said["move"], Pair(rows, is_open, mask.coords, *at), mask


def _address(pair: Pair) -> dict[str, Any]:
    """What a pair's successors depend on."""
    return {
        "rows": digest(pair.rows),
        "open": digest(pair.open),
        "columns": digest(pair.columns),
        "at": [pair.shrunk, pair.step],
        "reading": pair.reading.to_dict(),
    }


def _stored(found: Iterable[Nomination], space: ParameterSpace) -> Unit:
    said, tensors = [], dict[str, Tensor]()
    for i, (move, pair, mask) in enumerate(found):
        some = pair.open is not None
        at = {"shrunk": pair.shrunk, "step": pair.step, "reading": pair.reading.to_dict()}
        said.append({"move": move, "open": some, **at})
        tensors |= {f"{i}.rows": pair.rows, f"{i}.columns": packed(mask.coords, space.numel)}
        if pair.open is not None:
            tensors[f"{i}.open"] = packed(pair.open, space.numel)
    return Unit({"found": said}, tensors)
