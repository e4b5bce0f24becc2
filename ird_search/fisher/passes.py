"""`Passes`: the per-sample gradients of any rows, batch by batch, and what memory holds of them.

A pass goes over batches that are planned in advance, so that its bits do not depend on what is
still in memory: first the batches whose factors are kept from an earlier pass, then the other rows
by length. Where memory runs out it keeps nothing more, then halves its batches down to one sample,
then goes on by the loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ird_search.coordinates import digest
from ird_search.devices import release_memory
from ird_search.errors import ResourceError, out_of_memory
from ird_search.fisher.engine import Contribution, Engine, joined_paths
from ird_search.fisher.gradients import SampleGradients
from ird_search.fisher.labels import LabelRule
from ird_search.fisher.moments import Kept
from ird_search.fisher.record import Memory, PassRecord
from ird_search.fisher.tile import Tile
from ird_search.samples import SampleSet, require_few

log = logging.getLogger(__name__)

Gradients = dict[str, SampleGradients]
"""By name, of some rows."""

_Factors = list[tuple[Tensor, Gradients]]
"""Of one batch: (finite rows, their gradients)."""


class Passes:
    """Passes of one engine over one sample set.

    Args:
        engine: the path that computes per-sample gradients.
        samples: the N rows.
        device: where batches go.
        tokens: padded tokens in one batch.
        cache_bytes: memory for kept factors.
        moments: those of all columns, for the next question.
        excluded_share: more samples than this without a finite gradient raise a `DataError`.
        fallback: the path for one sample at a time, where memory suffices for no more.
        record: where long passes write down their sums.
        labels: whose labels they are; the samples' own by default.
    """

    def __init__(
        self,
        engine: Engine,
        samples: SampleSet,
        device: torch.device,
        *,
        tokens: int,
        cache_bytes: int,
        moments: Kept,
        excluded_share: float,
        fallback: Engine | None,
        record: PassRecord,
        labels: LabelRule | None,
    ) -> None:
        self.samples, self.device, self.record, self.labels = samples, device, record, labels
        self.tokens, self.cache_bytes, self.excluded_share = tokens, cache_bytes, excluded_share
        self.engine, self.fallback, self.moments = engine, fallback, moments
        self.before: Engine | None = None
        """The path that some gradients were computed by, before the fallback took its place."""
        self.count = 0.0
        """Forward and backward passes over the whole sample set that were needed so far."""
        self.excluded: set[int] = set()
        """Positions of samples whose log-likelihood or gradient is not finite."""
        self.silent: tuple[str, ...] | None = None
        """Tensors that no gradient reached in the first pass over all parameters."""
        self.tile: Tile | None = None
        """Gradients of some rows and columns."""
        self.most: int | None = None
        """Rows in a batch, since memory ran out."""
        self._settled = False
        self._kept: dict[tuple[int, ...], _Factors | None] = {}
        self._bytes: dict[tuple[int, ...], int] = {}
        self._has_room = True

    @property
    def path(self) -> str:
        """What computed the gradients so far; before the first, what will."""
        return joined_paths(self.engine.path, *([self.before.path] if self.before else []))

    @property
    def memory(self) -> Memory:
        """What the next answers depend on besides the question."""
        tile = None if self.tile is None else (self.tile.rows, self.tile.columns)
        excluded = tuple(sorted(self.excluded))
        kept = tuple((rows, self._bytes[rows]) for rows in self._kept)
        moments = tuple(replace(whole, values=None) for whole in self.moments)
        return Memory(excluded, kept, self._settled, self.silent, tile, moments)

    def remember(self, memory: Memory) -> None:
        """Go on as one with this memory would."""
        self.excluded = set(memory.excluded)
        self._settled, self.silent = memory.settled, memory.silent
        self._kept = {rows: self._kept.get(rows) for rows, _ in memory.kept}
        self._bytes = dict(memory.kept)
        if memory.tile is None or self.tile is None or not self.tile.equals(*memory.tile):
            self.tile = None if memory.tile is None else Tile(*memory.tile)
        self.moments.remember(memory.moments)

    def run(
        self,
        name: str,
        rows: Tensor,
        columns: Tensor | None,
        sums: dict[str, Tensor],
        add: Callable[[Tensor, Gradients], None],
        *,
        plan: Sequence[Tensor] | None = None,
    ) -> None:
        """Call `add` so that it sees each finite row of `rows` once, in a fixed order.

        `add` may take gradients out of the dictionary that it is given, so that their memory is
        free for what it adds to. The sums are zero at first, and are put to zero with each new
        beginning.
        A long pass writes its sums down from time to time; an interrupted one goes on from them.
        Where memory runs out within `add`, the sums are of no use, and the pass begins again at
        what was written, with smaller batches.

        Args:
            plan: the batches, where they are known already.
        """
        plan = self.plan(rows) if plan is None else plan
        inputs = {"pass": name, "columns": digest(columns)} | {
            "samples": digest(self.samples.ids),
            "rows": digest(rows),
            "plan": [digest(batch) for batch in plan],
        }
        while True:
            done = self._resume(inputs, len(plan), sums)
            try:
                for n in range(done, len(plan)):
                    for chosen, tensors in self.gradients(plan[n], rows):
                        add(chosen, tensors)
                    if self.record.due:
                        self.record.put(inputs, n + 1, sums, self.memory)
                self._settled = True
                return
            except (MemoryError, RuntimeError) as problem:
                if not out_of_memory(problem):
                    raise
                self._smaller(self.most or max(part.numel() for part in plan), str(problem))
                for tensor in sums.values():
                    tensor.zero_()

    def _resume(self, inputs: dict[str, Any], portions: int, sums: dict[str, Tensor]) -> int:
        """How many portions are in the sums, which are put to what they were then."""
        found = self.record.latest(inputs, portions, sums)
        if found is None:
            return 0
        done, memory = found
        self.remember(memory)
        return done

    def plan(self, rows: Tensor) -> list[Tensor]:
        """The batches of a pass: those whose factors are kept, then the missing rows by length."""
        missing = torch.zeros(len(self.samples), dtype=torch.bool)
        missing[rows] = True
        missing[list(self.excluded)] = False
        plan = []
        for kept in map(torch.tensor, self._kept):
            if bool(missing[kept].any()):
                plan.append(kept)
                missing[kept] = False
        return plan + self.samples.length_split(missing.nonzero().flatten(), tokens=self.tokens)

    def gradients(self, batch: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Gradients]]:
        """(positions, gradients by name) of the finite rows of a batch that are in `rows`.

        A batch is computed whole, even if few of its rows are wanted and its factors are lost: the
        last bits of a gradient depend on the batch that it is computed in.
        """
        wanted = torch.zeros(len(self.samples), dtype=torch.bool)
        wanted[rows] = True
        kept = self._kept.get(tuple(batch.tolist()))
        copies = ((have, dict(tensors)) for have, tensors in kept or ())
        for have, tensors in copies if kept else self._computed(batch):
            chosen = wanted[have]
            if chosen.all():
                yield have, tensors
            elif chosen.any():
                at = chosen.nonzero().flatten().to(self.device)
                yield have[chosen], {n: g.select(at) for n, g in tensors.items()}

    def _computed(self, batch: Tensor) -> Iterator[tuple[Tensor, Gradients]]:
        """The finite rows of a batch, through the model. Its factors are kept if all fit."""
        name, parts, held = tuple(batch.tolist()), [], dict[int, int]()
        known, others = name in self._kept, sum(self._bytes.values())
        keep = self._has_room and (known or not self._settled)
        for have, tensors in self._through_model(batch):
            held |= _sizes(tensors)
            keep = keep and (known or others + sum(held.values()) <= self.cache_bytes)
            keep = keep and self._has_room  # memory may have run out meanwhile
            if keep:
                parts.append((have, tensors))
            if have.numel():
                yield have, dict(tensors) if keep else tensors
            if not keep:  # whoever still holds the dictionary must not hold the factors
                parts.clear()
                tensors.clear()
        if keep and parts:
            self._kept[name] = parts
            self._bytes.setdefault(name, sum(held.values()))

    def _through_model(self, rows: Tensor) -> Iterator[tuple[Tensor, Gradients]]:
        """(finite rows, gradients by name) of some rows; in halves where memory runs out."""
        while rows.numel():
            batch, done, reason = rows[: self.most], 0, ""
            try:
                for c in self._contributions(batch):
                    have, good, tensors = batch[c.part], c.finite.cpu(), c.tensors
                    self._exclude(have[~good])
                    if not good.all():
                        at = good.nonzero().flatten().to(self.device)
                        have, tensors = have[good], {n: g.select(at) for n, g in tensors.items()}
                    yield have, tensors
                    done = c.part.stop
                    del c
            except (MemoryError, RuntimeError) as problem:
                if not out_of_memory(problem):
                    raise
                reason = str(problem)
            self.count += done / len(self.samples)
            if reason or done < batch.numel():
                self._smaller(batch.numel() - done, reason)
            rows = rows[done:]

    def _contributions(self, rows: Tensor) -> Iterator[Contribution]:
        if self.labels is None:
            return self.engine.gradients(self.samples.batch(rows, self.device))
        return self.labels.gradients(self.engine, self.samples, rows, self.device)

    def _smaller(self, rows: int, reason: str) -> None:
        """Keep nothing; then take half as many rows at a time; then one, by the loop; give up."""
        held = self.moments.forget() or any(self._kept.values())
        tile = self.tile
        if tile is not None and tile.values is not None:
            held, self.tile = True, Tile(tile.rows, tile.columns)
        self._kept, self._has_room = dict.fromkeys(self._kept), False
        release_memory()
        if held:
            log.warning("Out of memory: the Fisher pass keeps no factors any more.")
        elif rows > 1:
            self.most = rows // 2
            log.warning("Out of memory: batches of the Fisher pass are of %d rows.", self.most)
        elif self.fallback is not None and self.engine is not self.fallback:
            self.before = self.engine if self.count else None
            self.engine = self.fallback
            log.warning("Out of memory: the Fisher pass goes on one sample at a time.")
        else:
            raise ResourceError(
                f"Out of memory in the Fisher pass, with one sample at a time: {reason[:200]!r}. "
                "Lower cache_mb (--cache-mb) or max_length (--max-length), or leave tensors out "
                "with include and exclude."
            )

    def _exclude(self, rows: Tensor) -> None:
        new = set(rows.tolist()) - self.excluded
        self.excluded |= new
        self.moments.drop(new)
        ids = self.samples.ids[sorted(self.excluded)].tolist()
        require_few(ids, len(self.samples), share=self.excluded_share)


def _sizes(tensors: Gradients) -> dict[int, int]:
    """Bytes of each storage that the factors lie in: what is shared counts once."""
    storages = (t.untyped_storage() for g in tensors.values() for t in g.storages)
    return {s.data_ptr(): s.nbytes() for s in storages}
