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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ird_search.devices import untouched_zeros
from ird_search.errors import UsageError
from ird_search.fisher.columns import Columns
from ird_search.fisher.engine import Engine
from ird_search.fisher.labels import LabelRule
from ird_search.fisher.moments import Kept, Moments, Whole
from ird_search.fisher.passes import Gradients, Passes
from ird_search.fisher.record import Memory, PassRecord
from ird_search.fisher.tile import Tile
from ird_search.ledger import Ledger
from ird_search.parameters import ParameterSpace
from ird_search.samples import EXCLUDED_SHARE, SampleSet

LEAST_TILE = 256 * 2**20
"""Bytes of a tile that is held for a moment, however small the cache is."""


@dataclass(frozen=True, eq=False)
class Marginals:
    """Both sums over F of one pass.

    Args:
        rows: r_i(M), float64 [|S|]; −∞ for a sample without a finite gradient.
        columns: c_j(S), float32 [P].
    """

    rows: Tensor
    columns: Tensor


class FisherMatrix:
    """The samples × parameters matrix of one model on one sample set.

    Args:
        engine: the path that computes per-sample gradients.
        samples: the N rows.
        space: the P columns.
        tokens: padded tokens in one batch; on a CPU few are as fast as many, and need less memory.
        cache_bytes: memory for kept factors, as much again for a tile, and for moments of all
            columns.
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
        self.cache_bytes, self.device = cache_bytes, torch.device(device)
        self.labels, self.record = labels, record or PassRecord(Ledger(), {})
        self._passes = Passes(
            engine,
            samples,
            self.device,
            tokens=tokens,
            cache_bytes=cache_bytes,
            moments=Kept(cache_bytes // (4 * max(1, space.numel))),
            excluded_share=excluded_share,
            fallback=fallback,
            record=self.record,
            labels=labels,
        )

    @property
    def path(self) -> str:
        """How the gradients were computed: also by the loop, where memory or a batch needed it."""
        return self._passes.path

    @property
    def passes(self) -> float:
        """Forward and backward passes over the whole sample set that were needed so far."""
        return self._passes.count

    @property
    def excluded(self) -> set[int]:
        """Positions of samples whose log-likelihood or gradient is not finite."""
        return self._passes.excluded

    @property
    def memory(self) -> Memory:
        """What the next answers depend on besides the question."""
        return self._passes.memory

    def remember(self, memory: Memory) -> None:
        """Go on as a matrix with this memory would."""
        self._passes.remember(memory)

    def on(self, samples: SampleSet) -> FisherMatrix:
        """The matrix of the same model on a few other samples.

        Nothing is kept for later passes, and any number of samples may be excluded.
        """
        here = self._passes
        there = FisherMatrix(
            self.engine,
            samples,
            self.space,
            tokens=here.tokens,
            cache_bytes=0,
            excluded_share=1.0,
            device=self.device,
            fallback=here.fallback,
            record=self.record,
            labels=self.labels,
        )
        # where memory ran out before
        there._passes.engine, there._passes.most = here.engine, here.most
        there._passes.before = here.before
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

        def add(chosen: Tensor, tensors: Gradients) -> None:
            parts = [
                tensors[n].square_norms(None if masks is None else masks[n])
                for n in (tensors if masks is None else masks)
            ]
            scores[chosen] += torch.stack(parts).cpu().sum(0, dtype=torch.float64)

        self._passes.run("row scores", rows, columns, {"rows": scores}, add)
        return self._marked(scores)[rows]

    def column_scores(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """c_j(S) for the given columns: float32 [k], on the CPU; not to be written to.

        Args:
            rows: S as positions, int64 [|S|].
            columns: sorted coordinates; all parameters by default.
        """
        return self.column_moments(rows, columns, mean=False).square

    def column_moments(
        self, rows: Tensor, columns: Tensor | None = None, *, mean: bool = True
    ) -> Moments:
        """c_j(S) and m_j(S) for the given columns, from one pass, on the CPU.

        Those of all columns are kept for the next question: they are not to be written to.

        Args:
            rows: S as positions, int64 [|S|].
            columns: sorted coordinates; all parameters by default.
            mean: whether m_j(S) is wanted; c_j(S) has the same bits with it and without.

        Raises:
            UsageError: m_j(S) is wanted where squares are of other labels, or of tokens.
        """
        self._require_signed(mean)
        if columns is None:
            return self._whole(rows, mean=mean)
        if (tile := self._restricted(rows, columns)) is not None:
            squares, means = tile.column_sums(rows, columns, mean=mean)
        else:
            squares, means = self._some(rows, columns, mean=mean)
        return self._moments(rows, squares, means)

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

    def _moments(self, rows: Tensor, squares: Tensor, means: Tensor | None) -> Moments:
        """Sums over some rows as means; they are written to."""
        count = self._finite(rows)
        average = None if means is None else means.div_(count).cpu()
        return Moments(squares.div_(count).cpu(), average)

    def _whole(self, rows: Tensor, *, mean: bool) -> Moments:
        """The moments of all columns, which the next reading of these rows asks for again."""
        over = self._passes
        known = over.moments.of(rows)
        if known is None:
            known = Whole(rows.clone(), tuple(over.plan(rows)), mean)
        if known.values is None or (mean and not known.mean):
            nothing, mean_too = torch.empty(0, dtype=torch.int64), mean or known.mean
            _, squares, means = self._both(rows, nothing, mean=mean_too, plan=known.plan)
            values = self._moments(rows, squares, means)
            known = replace(known, mean=mean_too, values=values)
        over.moments.put(known)
        assert known.values is not None
        return known.values if mean else replace(known.values, mean=None)

    def _both(
        self,
        rows: Tensor,
        within: Tensor | None,
        *,
        mean: bool,
        plan: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Sums over a mask's columns for each sample, and over the rows for all columns."""
        squares = untouched_zeros(self.space.numel, self.device)
        means = untouched_zeros(self.space.numel, self.device) if mean else None
        flat, signed = self._by_name(squares), {} if means is None else self._by_name(means)
        masks = self._columns(within)
        scores = torch.zeros(len(self.samples), dtype=torch.float64)

        def add(chosen: Tensor, tensors: Gradients) -> None:
            parts = []
            for name in list(tensors):
                gradients = tensors.pop(name)  # its factors go as its part of the sums comes
                mask = None if masks is None else masks.get(name, self._nothing(name))
                parts.append(gradients.add_squares(flat[name], mask, means=signed.get(name)))
            scores[chosen] += torch.stack(parts).cpu().sum(0, dtype=torch.float64)

        sums, name = {"columns": squares, "rows": scores}, "marginals"
        if means is not None:
            sums, name = {**sums, "means": means}, "marginals and means"
        self._passes.run(name, rows, within, sums, add, plan=plan)
        if self._passes.silent is None:
            silent = (name for name in self.space.names if not bool(flat[name].any()))
            self._passes.silent = tuple(silent)
        return scores, squares, means

    def _some(self, rows: Tensor, columns: Tensor, *, mean: bool) -> tuple[Tensor, Tensor | None]:
        """Sums over the rows for some columns."""
        masks = self._columns(columns) or {}
        squares = {n: torch.zeros(m.count, device=self.device) for n, m in masks.items()}
        means = {n: torch.zeros_like(t) for n, t in squares.items()} if mean else {}

        def add(chosen: Tensor, tensors: Gradients) -> None:
            for name, mask in masks.items():
                tensors[name].add_some(mask, squares[name], means.get(name))

        name = "column moments" if mean else "column scores"
        sums = squares | {f"mean of {n}": t for n, t in means.items()}
        self._passes.run(name, rows, columns, sums, add)
        return torch.cat([*squares.values()]), torch.cat([*means.values()]) if mean else None

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
        return Columns.none(self._numel(name), self.device)

    def _restricted(self, rows: Tensor, columns: Tensor) -> Tile | None:
        """A tile that holds these rows and columns where it fits into memory, else None."""
        over = self._passes
        if over.tile is not None and over.tile.covers(rows, columns):
            if over.tile.values is None:
                over.tile = self._filled(over.tile.rows, over.tile.columns)
            return over.tile
        if rows.numel() * columns.numel() * 4 > self.cache_bytes:
            return None
        over.tile = None  # two tiles would take twice the memory
        over.tile = self._filled(rows, columns)
        return over.tile

    def _filled(self, rows: Tensor, columns: Tensor) -> Tile:
        values = torch.zeros(rows.numel(), columns.numel())
        place = torch.full((len(self.samples),), -1)
        place[rows] = torch.arange(rows.numel())
        bounds = torch.searchsorted(columns, torch.tensor(self.space.offsets)).tolist()
        spans = {n: slice(bounds[i], bounds[i + 1]) for i, n in enumerate(self.space.names)}
        masks = self._columns(columns) or {}

        def add(chosen: Tensor, tensors: Gradients) -> None:
            for name, mask in masks.items():
                for part, gradients in tensors[name].parts(mask.count):
                    found = gradients.entries(mask)
                    values[place[chosen[part]], spans[name]] = found.cpu()

        self._passes.run("gradients", rows, columns, {"values": values}, add)
        return Tile(rows, columns, values)

    def _require_signed(self, mean: bool) -> None:
        if mean and self.labels is not None and not self.labels.signed:
            raise UsageError(
                f"The mean gradient is not there with {self.labels.labels} labels by the "
                f"{self.labels.unit}; ask for the mean square alone (mean=False)."
            )

    def _marked(self, scores: Tensor) -> Tensor:
        """The scores of all samples, −∞ at the excluded ones."""
        scores[list(self.excluded)] = -torch.inf
        return scores

    def _finite(self, rows: Tensor) -> int:
        """How many of the rows count in a mean."""
        return max(1, rows.numel() - len(self.excluded & set(rows.tolist())))
