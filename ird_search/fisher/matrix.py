"""`FisherMatrix`: F[i, j], samples × parameters, read through its marginals and never formed whole.

    F[i, j] = (∂ log p(yᵢ | xᵢ; θ) / ∂θⱼ)²
    row score      r_i(M) = Σ_{j∈M} F[i, j]
    column score   c_j(S) = 1/|S| Σ_{i∈S} F[i, j]

and, where a column's sign counts, through the mean gradient beside it, from the same pass:

    g[i, j] = ∂ log p(yᵢ | xᵢ; θ) / ∂θⱼ,    m_j(S) = 1/|S| Σ_{i∈S} g[i, j]

θ does not move, so what a row contributes is fixed. Three tiers, by memory:

1. a *tile*: the gradients g themselves (with several terms a sample, see `labels`, the roots of F),
   of some rows and columns, once that many numbers fit;
2. the rows' *factors* as the engine gave them, kept from the first pass: no model is needed again;
3. recomputation, for the rows whose factors did not fit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ird_search.coordinates import digest
from ird_search.devices import release_memory
from ird_search.errors import ResourceError, UsageError, out_of_memory
from ird_search.fisher.engine import Contribution, Engine
from ird_search.fisher.gradients import SAMPLED, Columns, SampleGradients
from ird_search.fisher.labels import LabelRule
from ird_search.fisher.record import Memory, PassRecord
from ird_search.fisher.tile import Tile
from ird_search.ledger import Ledger
from ird_search.parameters import ParameterSpace
from ird_search.samples import EXCLUDED_SHARE, SampleSet, require_few

log = logging.getLogger(__name__)

LEAST_TILE = 256 * 2**20
"""Bytes of a tile that is held for a moment, however small the cache is."""

_Factors = list[tuple[Tensor, dict[str, SampleGradients]]]
"""Of one batch: (finite rows, gradients by name)."""


@dataclass(frozen=True, eq=False)
class Marginals:
    """Both sums over F of one pass.

    Args:
        rows: r_i(M), float64 [|S|]; −∞ for a sample without a finite gradient.
        columns: c_j(S), float32 [P].
    """

    rows: Tensor
    columns: Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """The mean square of some columns' gradients, and their mean.

    Args:
        square: c_j(S), float32 [k].
        mean: m_j(S), float32 [k]; None where it was not asked for.
    """

    square: Tensor
    mean: Tensor | None = None


class FisherMatrix:
    """The samples × parameters matrix of one model on one sample set.

    Args:
        engine: the path that computes per-sample gradients.
        samples: the N rows.
        space: the P columns.
        tokens: padded tokens in one batch; on a CPU few are as fast as many, and need less memory.
        cache_bytes: memory for kept factors, and as much again for a tile.
        excluded_share: more samples than this without a finite gradient raise a `DataError`.
        device: where batches go.
        fallback: the path for one sample at a time, where memory suffices for no more.
        record: where long passes write down their sums.
        labels: whose labels they are, and what is squared by itself; the samples' own, and the
            whole of a sample, by default.
    """

    def __init__(
        self,
        engine: Engine,
        samples: SampleSet,
        space: ParameterSpace,
        *,
        tokens: int = 512,
        cache_bytes: int = 2 * 2**30,
        excluded_share: float = EXCLUDED_SHARE,
        device: str | torch.device = "cpu",
        fallback: Engine | None = None,
        record: PassRecord | None = None,
        labels: LabelRule | None = None,
    ) -> None:
        self.engine, self.samples, self.space = engine, samples, space
        self.tokens, self.cache_bytes, self.device = tokens, cache_bytes, torch.device(device)
        self.excluded_share, self.fallback, self.labels = excluded_share, fallback, labels
        self.record = record or PassRecord(Ledger(), {})
        self.excluded: set[int] = set()
        """Positions of samples whose log-likelihood or gradient is not finite."""
        self.passes = 0.0
        """Forward and backward passes over the whole sample set that were needed so far."""
        self._silent: tuple[str, ...] | None = None
        self._settled = False
        self._kept: dict[tuple[int, ...], _Factors | None] = {}
        self._bytes: dict[tuple[int, ...], int] = {}
        self._has_room = True
        self._tile: Tile | None = None
        self._engine: Engine = engine
        self._most: int | None = None

    @property
    def silent(self) -> tuple[str, ...]:
        """Tensors that no gradient reached in the first pass over all parameters: all zero."""
        return self._silent or ()

    @property
    def memory(self) -> Memory:
        """What the next answers depend on besides the question."""
        tile = None if self._tile is None else (self._tile.rows, self._tile.columns)
        excluded = tuple(sorted(self.excluded))
        kept = tuple((rows, self._bytes[rows]) for rows in self._kept)
        return Memory(excluded, kept, self._settled, self._silent, tile)

    def remember(self, memory: Memory) -> None:
        """Go on as a matrix with this memory would."""
        self.excluded = set(memory.excluded)
        self._settled, self._silent = memory.settled, memory.silent
        self._kept = {rows: self._kept.get(rows) for rows, _ in memory.kept}
        self._bytes = dict(memory.kept)
        if memory.tile is None or self._tile is None or not self._tile.equals(*memory.tile):
            self._tile = None if memory.tile is None else Tile(*memory.tile)

    def on(self, samples: SampleSet) -> FisherMatrix:
        """The matrix of the same model on a few other samples.

        Nothing is kept for later passes, and any number of samples may be excluded.
        """
        there = FisherMatrix(
            self.engine,
            samples,
            self.space,
            tokens=self.tokens,
            cache_bytes=0,
            excluded_share=1.0,
            device=self.device,
            fallback=self.fallback,
            record=self.record,
            labels=self.labels,
        )
        there._engine, there._most = self._engine, self._most  # where memory ran out before
        return there

    def marginals(self, rows: Tensor | None = None, *, within: Tensor | None = None) -> Marginals:
        """Row scores within a mask and column scores over all parameters, in one streamed pass.

        Args:
            rows: positions in the sample set, int64 [|S|]; all by default.
            within: the mask's sorted coordinates; all parameters by default.
        """
        rows = torch.arange(len(self.samples)) if rows is None else rows
        scores, squares, _ = self._both(rows, within, mean=False)
        return Marginals(self._marked(scores)[rows], squares.div_(self._finite(rows)).cpu())

    def row_scores(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """r_i(M) for the given rows: float64 [|S|]; −∞ where the gradient is not finite.

        Args:
            rows: positions, int64 [|S|].
            columns: M as sorted coordinates; all parameters by default.
        """
        scores = torch.zeros(len(self.samples), dtype=torch.float64)
        if columns is not None and (tile := self._restricted(rows, columns)) is not None:
            for row, total in zip(rows, tile.row_sums(rows, columns), strict=True):
                scores[row] = total
            return self._marked(scores)[rows]
        masks = self._columns(columns)

        def add(chosen: Tensor, tensors: dict[str, SampleGradients]) -> None:
            parts = [
                tensors[n].square_norms(None if masks is None else masks[n])
                for n in (tensors if masks is None else masks)
            ]
            scores[chosen] += torch.stack(parts).cpu().sum(0, dtype=torch.float64)

        self._pass("row scores", rows, columns, {"rows": scores}, add)
        return self._marked(scores)[rows]

    def column_scores(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """c_j(S) for the given columns: float32 [k], on the CPU.

        Args:
            rows: S as positions, int64 [|S|].
            columns: sorted coordinates; all parameters by default.
        """
        return self.column_moments(rows, columns, mean=False).square

    def column_moments(
        self, rows: Tensor, columns: Tensor | None = None, *, mean: bool = True
    ) -> Moments:
        """c_j(S) and m_j(S) for the given columns, from one pass, on the CPU.

        Args:
            rows: S as positions, int64 [|S|].
            columns: sorted coordinates; all parameters by default.
            mean: whether m_j(S) is wanted; c_j(S) has the same bits with it and without.

        Raises:
            UsageError: m_j(S) is wanted where squares are of other labels, or of tokens.
        """
        self._require_signed(mean)
        if columns is None:
            nothing = torch.empty(0, dtype=torch.int64)
            _, squares, means = self._both(rows, nothing, mean=mean)
        elif (tile := self._restricted(rows, columns)) is not None:
            squares, means = tile.column_sums(rows, columns, mean=mean)
        else:
            squares, means = self._some(rows, columns, mean=mean)
        count = self._finite(rows)
        average = None if means is None else means.div_(count).cpu()
        return Moments(squares.div_(count).cpu(), average)

    def fitting(self, rows: int) -> int:
        """How many columns of so many rows can be held as a tile, and a few where none can."""
        return max(self.cache_bytes, LEAST_TILE) // (4 * max(1, rows))

    def resampled(
        self, rows: Tensor, columns: Tensor, counts: Tensor, *, mean: bool = True
    ) -> Iterator[Moments]:
        """The moments of samples drawn again, each row as often as it was drawn.

        Args:
            rows: S as positions, int64 [|S|].
            columns: sorted coordinates.
            counts: how often each row counts in each draw: [B, |S|].
            mean: whether m_j is wanted.

        Raises:
            UsageError: as `column_moments`.
        """
        self._require_signed(mean)
        few = max(1, LEAST_TILE // (8 * max(1, columns.numel())))
        for some in counts.split(few):
            yield from self._resampled(rows, columns, some, mean=mean)

    def _resampled(
        self, rows: Tensor, columns: Tensor, counts: Tensor, *, mean: bool
    ) -> Iterator[Moments]:
        """A few draws at a time, and as many columns as fit."""
        found = []
        for part in columns.split(max(1, self.fitting(rows.numel()))):
            tile = self._restricted(rows, part) or self._filled(rows, part)
            found.append(tile.resampled(rows, part, counts, mean=mean))
        squares = torch.cat([s for s, _ in found], 1)
        means = torch.cat([m for _, m in found if m is not None], 1) if mean else None
        finite = torch.tensor([row not in self.excluded for row in rows.tolist()])
        for b, drawn in enumerate(counts[:, finite].sum(1).clamp(min=1).tolist()):
            yield Moments(squares[b] / drawn, None if means is None else means[b] / drawn)

    def _both(
        self, rows: Tensor, within: Tensor | None, *, mean: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Sums over a mask's columns for each sample, and over the rows for all columns."""
        squares = torch.zeros(self.space.numel, device=self.device)
        means = torch.zeros_like(squares) if mean else None
        flat, signed = self._by_name(squares), {} if means is None else self._by_name(means)
        masks = self._columns(within)
        scores = torch.zeros(len(self.samples), dtype=torch.float64)

        def add(chosen: Tensor, tensors: dict[str, SampleGradients]) -> None:
            parts = []
            for name, gradients in tensors.items():
                mask = None if masks is None else masks.get(name, self._nothing(name))
                parts.append(gradients.add_squares(flat[name], mask, means=signed.get(name)))
            scores[chosen] += torch.stack(parts).cpu().sum(0, dtype=torch.float64)

        sums = {"columns": squares, "rows": scores}
        if means is None:
            self._pass("marginals", rows, within, sums, add)
        else:
            self._pass("marginals and means", rows, within, {**sums, "means": means}, add)
        if self._silent is None:
            self._silent = tuple(name for name in self.space.names if not bool(flat[name].any()))
        return scores, squares, means

    def _some(self, rows: Tensor, columns: Tensor, *, mean: bool) -> tuple[Tensor, Tensor | None]:
        """Sums over the rows for some columns: whole tensors where these hold many of them."""
        masks = self._columns(columns) or {}
        whole = {n for n, m in masks.items() if m.count >= SAMPLED * m.numel}
        squares = {
            n: torch.zeros(m.numel if n in whole else m.count, device=self.device)
            for n, m in masks.items()
        }
        means = {n: torch.zeros_like(t) for n, t in squares.items()} if mean else {}

        def add(chosen: Tensor, tensors: dict[str, SampleGradients]) -> None:
            for name, mask in masks.items():
                gradients, signed = tensors[name], means.get(name)
                if name in whole:
                    gradients.add_squares(squares[name], self._nothing(name), means=signed)
                    continue
                for _, part in gradients.parts(mask.count):
                    found = part.entries(mask)
                    squares[name] += found.square().sum(0)
                    if signed is not None:
                        signed += found.sum(0)

        def joined(sums: dict[str, Tensor]) -> Tensor:
            return torch.cat([m.take(sums[n]) if n in whole else sums[n] for n, m in masks.items()])

        name = "column moments" if mean else "column scores"
        sums = squares | {f"mean of {n}": t for n, t in means.items()}
        self._pass(name, rows, columns, sums, add)
        return joined(squares), joined(means) if mean else None

    def _columns(self, coords: Tensor | None) -> dict[str, Columns] | None:
        """A set of coordinates as a choice of entries for each tensor that it touches."""
        if coords is None:
            return None
        return {
            name: Columns(index.to(self.device), self._numel(name))
            for name, index in self.space.localize(coords).items()
        }

    def _by_name(self, flat: Tensor) -> dict[str, Tensor]:
        """Each tensor's part of a vector over all parameters, a view."""
        return {name: flat[self.space.span(name)] for name in self.space.names}

    def _numel(self, name: str) -> int:
        span = self.space.span(name)
        return span.stop - span.start

    def _nothing(self, name: str) -> Columns:
        """No entry of a tensor."""
        empty = torch.empty(0, dtype=torch.int64, device=self.device)
        return Columns(empty, self._numel(name))

    def _restricted(self, rows: Tensor, columns: Tensor) -> Tile | None:
        """A tile that holds these rows and columns where it fits into memory, else None."""
        if self._tile is not None and self._tile.covers(rows, columns):
            if self._tile.values is None:
                self._tile = self._filled(self._tile.rows, self._tile.columns)
            return self._tile
        if rows.numel() * columns.numel() * 4 > self.cache_bytes:
            return None
        self._tile = None  # two tiles would take twice the memory
        self._tile = self._filled(rows, columns)
        return self._tile

    def _filled(self, rows: Tensor, columns: Tensor) -> Tile:
        values = torch.zeros(rows.numel(), columns.numel())
        place = torch.full((len(self.samples),), -1)
        place[rows] = torch.arange(rows.numel())
        bounds = torch.searchsorted(columns, torch.tensor(self.space.offsets)).tolist()
        spans = {n: slice(bounds[i], bounds[i + 1]) for i, n in enumerate(self.space.names)}
        masks = self._columns(columns) or {}

        def add(chosen: Tensor, tensors: dict[str, SampleGradients]) -> None:
            for name, mask in masks.items():
                for part, gradients in tensors[name].parts(mask.count):
                    found = gradients.entries(mask)
                    values[place[chosen[part]], spans[name]] = found.cpu()

        self._pass("gradients", rows, columns, {"values": values}, add)
        return Tile(rows, columns, values)

    def _pass(
        self,
        name: str,
        rows: Tensor,
        columns: Tensor | None,
        sums: dict[str, Tensor],
        add: Callable[[Tensor, dict[str, SampleGradients]], None],
    ) -> None:
        """Call `add` so that it sees each finite row of `rows` once, in a fixed order.

        A long pass writes its sums down from time to time; an interrupted one goes on from them.
        Where memory runs out within `add`, the sums are of no use, and the pass begins again at
        what was written, with smaller batches.
        """
        plan = self._plan(rows)
        inputs = {"pass": name, "columns": digest(columns)} | {
            "samples": digest(self.samples.ids),
            "rows": digest(rows),
            "plan": [digest(batch) for batch in plan],
        }
        while True:
            done = self._resume(inputs, len(plan), sums)
            try:
                for n in range(done, len(plan)):
                    for chosen, tensors in self._gradients(plan[n], rows):
                        add(chosen, tensors)
                    if self.record.due:
                        self.record.put(inputs, n + 1, sums, self.memory)
                self._settled = True
                return
            except (MemoryError, RuntimeError) as problem:
                if not out_of_memory(problem):
                    raise
                self._smaller(self._most or max(part.numel() for part in plan), str(problem))

    def _resume(self, inputs: dict[str, Any], portions: int, sums: dict[str, Tensor]) -> int:
        """How many portions are in the sums, which are put to what they were then, or to zero."""
        found = self.record.latest(inputs, portions, sums)
        if found is None:
            for tensor in sums.values():
                tensor.zero_()
            return 0
        done, memory = found
        self.remember(memory)
        return done

    def _plan(self, rows: Tensor) -> list[Tensor]:
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

    def _gradients(
        self, batch: Tensor, rows: Tensor
    ) -> Iterator[tuple[Tensor, dict[str, SampleGradients]]]:
        """(positions, gradients by name) of the finite rows of a batch that are in `rows`.

        A batch is computed whole, even if few of its rows are wanted and its factors are lost: the
        last bits of a gradient depend on the batch that it is computed in.
        """
        wanted = torch.zeros(len(self.samples), dtype=torch.bool)
        wanted[rows] = True
        for have, tensors in self._kept.get(tuple(batch.tolist())) or self._computed(batch):
            chosen = wanted[have]
            if chosen.all():
                yield have, tensors
            elif chosen.any():
                at = chosen.nonzero().flatten().to(self.device)
                yield have[chosen], {n: g.select(at) for n, g in tensors.items()}

    def _computed(self, batch: Tensor) -> Iterator[tuple[Tensor, dict[str, SampleGradients]]]:
        """The finite rows of a batch, through the model. Its factors are kept if all fit."""
        name, parts, held = tuple(batch.tolist()), [], dict[int, int]()
        known, others = name in self._kept, sum(self._bytes.values())
        keep = self._has_room and (known or not self._settled)
        for have, tensors in self._through_model(batch):
            storages = [t.untyped_storage() for g in tensors.values() for t in g.storages]
            held |= {s.data_ptr(): s.nbytes() for s in storages}  # what is shared counts once
            keep = keep and (known or others + sum(held.values()) <= self.cache_bytes)
            keep = keep and self._has_room  # memory may have run out meanwhile
            if keep:
                parts.append((have, tensors))
            if have.numel():
                yield have, tensors
            if not keep:  # whoever still holds the dictionary must not hold the factors
                parts.clear()
                tensors.clear()
        if keep and parts:
            self._kept[name] = parts
            self._bytes.setdefault(name, sum(held.values()))

    def _through_model(self, rows: Tensor) -> Iterator[tuple[Tensor, dict[str, SampleGradients]]]:
        """(finite rows, gradients by name) of some rows; in halves where memory runs out."""
        while rows.numel():
            batch, done, reason = rows[: self._most], 0, ""
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
            if reason or done < batch.numel():
                self._smaller(batch.numel() - done, reason)
            self.passes += done / len(self.samples)
            rows = rows[done:]

    def _require_signed(self, mean: bool) -> None:
        if mean and self.labels is not None and not self.labels.signed:
            raise UsageError(
                f"The mean gradient is not there with {self.labels.labels} labels by the "
                f"{self.labels.unit}; ask for the mean square alone (mean=False)."
            )

    def _contributions(self, rows: Tensor) -> Iterator[Contribution]:
        if self.labels is None:
            return self._engine.gradients(self.samples.batch(rows, self.device))
        return self.labels.gradients(self._engine, self.samples, rows, self.device)

    def _smaller(self, rows: int, reason: str) -> None:
        """Keep nothing; then take half as many rows at a time; then one, by the loop; give up."""
        held, tile = any(self._kept.values()), self._tile
        if tile is not None and tile.values is not None:
            held, self._tile = True, Tile(tile.rows, tile.columns)
        self._kept, self._has_room = dict.fromkeys(self._kept), False
        release_memory()
        if held:
            log.warning("Out of memory: the Fisher pass keeps no factors any more.")
        elif rows > 1:
            self._most = rows // 2
            log.warning("Out of memory: batches of the Fisher pass are of %d rows.", self._most)
        elif self.fallback is not None and self._engine is not self.fallback:
            self._engine = self.fallback
            log.warning("Out of memory: the Fisher pass goes on one sample at a time.")
        else:
            raise ResourceError(
                f"Out of memory in the Fisher pass, with one sample at a time: {reason[:200]!r}. "
                "Lower cache_mb (--cache-mb) or max_length (--max-length), or leave tensors out "
                "with include and exclude."
            )

    def _exclude(self, rows: Tensor) -> None:
        self.excluded |= set(rows.tolist())
        ids = self.samples.ids[sorted(self.excluded)].tolist()
        require_few(ids, len(self.samples), share=self.excluded_share)

    def _marked(self, scores: Tensor) -> Tensor:
        """The scores of all samples, −∞ at the excluded ones."""
        scores[list(self.excluded)] = -torch.inf
        return scores

    def _finite(self, rows: Tensor) -> int:
        """How many of the rows count in a mean."""
        return max(1, rows.numel() - len(self.excluded & set(rows.tolist())))
