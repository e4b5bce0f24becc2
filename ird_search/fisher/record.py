"""What outlives an interruption of a Fisher pass: its sums so far, and what was in memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ird_search.coordinates import packed, unpacked
from ird_search.fisher.moments import Whole
from ird_search.ledger import Ledger, Unit, unit_key

EVERY = 30.0
"""Seconds of a pass after which its sums are written down."""
SHARE = 20
"""Writing them takes at most one part in so many of the time."""


@dataclass(frozen=True, eq=False)
class Memory:
    """What a `FisherMatrix` remembers of earlier passes.

    The last bits of its answers depend on it: a gradient is rounded otherwise in another batch,
    and a sum over a tile otherwise than one over factors. With the same memory another process
    goes on bit for bit; what was kept it computes again, in the same batches, where it needs it.

    Args:
        excluded: positions of samples without a finite gradient.
        kept: the rows of each batch whose factors are kept, and their bytes.
        settled: whether nothing more will be kept.
        silent: tensors that no gradient reached; None before the first pass over all parameters.
        tile: rows and columns of the tile, if there is one.
        moments: those of all columns that are kept, without values.
    """

    excluded: tuple[int, ...] = ()
    kept: tuple[tuple[tuple[int, ...], int], ...] = ()
    settled: bool = False
    silent: tuple[str, ...] | None = None
    tile: tuple[Tensor, Tensor] | None = None
    moments: tuple[Whole, ...] = ()

    def to_unit(self, numel: int) -> Unit:
        """As what a ledger stores.

        Args:
            numel: P, the number of candidate parameters.
        """
        result = {
            "excluded": list(self.excluded),
            "kept": [[list(rows), size] for rows, size in self.kept],
            "settled": self.settled,
            "silent": None if self.silent is None else list(self.silent),
            "moments": [[w.mean, [b.numel() for b in w.plan]] for w in self.moments],
        }
        tensors = {}
        if self.tile is not None:
            tensors = {"tile.rows": self.tile[0], "tile.columns": packed(self.tile[1], numel)}
        for i, whole in enumerate(self.moments):
            tensors[f"moments.{i}.rows"] = whole.rows.int()
            tensors[f"moments.{i}.plan"] = torch.cat([*whole.plan, whole.rows[:0]]).int()
        return Unit(result, tensors)

    @classmethod
    def of_unit(cls, unit: Unit) -> Memory:
        """The same again."""
        found, tile = unit.result, None
        if "tile.rows" in unit.tensors:
            tile = unit.tensors["tile.rows"], unpacked(unit.tensors["tile.columns"])
        moments = []
        for i, (mean, sizes) in enumerate(found["moments"]):
            rows, plan = (unit.tensors[f"moments.{i}.{part}"].long() for part in ("rows", "plan"))
            moments.append(Whole(rows, plan.split(sizes), mean))
        return cls(
            tuple(found["excluded"]),
            tuple((tuple(rows), size) for rows, size in found["kept"]),
            found["settled"],
            None if found["silent"] is None else tuple(found["silent"]),
            tile,
            tuple(moments),
        )


class PassRecord:
    """Sums of unfinished passes in a ledger, so that an interruption costs at most one chunk.

    A chunk is what a pass does in `every` seconds. Its unit holds the sums over all batches so far
    and takes the place of the one before, so there is one at a time, of the size of the sums.

    Args:
        about: what else the sums depend on: model, samples, settings.
        every: seconds between two chunks' ends; 0 for one chunk a batch.
    """

    def __init__(self, ledger: Ledger, about: Mapping[str, Any], *, every: float = EVERY) -> None:
        self.ledger, self.about, self.every = ledger, dict(about), every
        self._last, self._took = time.monotonic(), 0.0
        self._chunks: dict[str, str] = {}
        self._asked = ""

    def begin(self, asked: str) -> None:
        """From here on passes are for another question.

        Where a run ends between an answer and `clear`, that answer's sums are still there, beside
        what was in memory then; no later question may go on from them.

        Args:
            asked: names the question.
        """
        self._asked = asked

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        if self.ledger.directory is None:  # nothing outlives the process
            return False
        pause = max(self.every, SHARE * self._took) if self.every else 0
        return time.monotonic() - self._last >= pause

    def put(
        self, inputs: Mapping[str, Any], done: int, sums: Mapping[str, Tensor], memory: Memory
    ) -> None:
        """The sums over the first `done` batches of a pass."""
        began = time.monotonic()
        unit = memory.to_unit(0 if memory.tile is None else int(memory.tile[1].max()) + 1)
        tensors = {f"sums.{name}": tensor.cpu() for name, tensor in sums.items()}
        chunks = self._name(inputs)
        key = _key(chunks, done)
        self.ledger.put("fisher", key, Unit(unit.result, {**unit.tensors, **tensors}))
        if (before := self._chunks.get(chunks)) not in (None, key):
            self.ledger.drop("fisher", str(before))
        self._chunks[chunks] = key
        self._last = time.monotonic()
        self._took = self._last - began

    def latest(
        self, inputs: Mapping[str, Any], batches: int, sums: Mapping[str, Tensor]
    ) -> tuple[int, Memory] | None:
        """How many batches of a pass are written down, and what was in memory; fills `sums`."""
        if self.ledger.directory is None:
            return None
        chunks = self._name(inputs)
        for done in range(batches, 0, -1):
            unit = self.ledger.get("fisher", _key(chunks, done))
            if unit is not None:
                self._chunks[chunks] = _key(chunks, done)
                for name, tensor in sums.items():
                    tensor.copy_(unit.tensors[f"sums.{name}"])
                return done, Memory.of_unit(unit)
        return None

    def clear(self) -> None:
        """Forget all sums: what they were for is finished."""
        self.ledger.clear("fisher")
        self._chunks.clear()
        self._last = time.monotonic()

    def _name(self, inputs: Mapping[str, Any]) -> str:
        """What all chunks of a pass have in common."""
        return unit_key({**self.about, **inputs, "asked": self._asked})


def _key(chunks: str, done: int) -> str:
    return unit_key({"chunks": chunks, "batches": done})
