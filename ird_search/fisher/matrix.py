"""`FisherMatrix`: F[i, j], samples × parameters, read through its marginals and never formed whole.

    F[i, j] = (∂ log p(yᵢ | xᵢ; θ) / ∂θⱼ)²
    row score      r_i(M) = Σ_{j∈M} F[i, j]
    column score   c_j(S) = 1/|S| Σ_{i∈S} F[i, j]

θ does not move, so what a row contributes is fixed. Three tiers, by memory:

1. a *tile*: F itself, restricted to some rows and columns, once that many numbers fit;
2. the rows' *factors* as the engine gave them, kept from the first pass: no model is needed again;
3. recomputation, for the rows whose factors did not fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ird_search.errors import DataError
from ird_search.fisher.engine import Engine
from ird_search.fisher.gradients import SAMPLED, Columns, SampleGradients
from ird_search.parameters import ParameterSpace
from ird_search.samples import SampleSet

EXCLUDED_SHARE = 0.01
"""More samples than this without a finite gradient end the run."""


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
class _Tile:
    """F restricted to `rows` (positions) × `columns` (sorted coordinates), on the CPU."""

    rows: Tensor
    columns: Tensor
    values: Tensor

    def covers(self, rows: Tensor, columns: Tensor) -> bool:
        if columns.numel() > self.columns.numel() or not torch.isin(rows, self.rows).all():
            return False
        at = torch.searchsorted(self.columns, columns).clamp_(max=self.columns.numel() - 1)
        return bool((self.columns[at] == columns).all())

    def read(self, rows: Tensor, columns: Tensor) -> Iterator[Tensor]:
        """F[i, columns] for one row after another: a second tile is never formed."""
        position = {row: i for i, row in enumerate(self.rows.tolist())}
        at = None
        if columns.numel() < self.columns.numel():
            at = torch.searchsorted(self.columns, columns)
        for row in rows.tolist():
            one = self.values[position[row]]
            yield one if at is None else one.index_select(0, at)


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
    ) -> None:
        self.engine, self.samples, self.space = engine, samples, space
        self.tokens, self.cache_bytes, self.device = tokens, cache_bytes, torch.device(device)
        self.excluded_share = excluded_share
        self.excluded: set[int] = set()
        """Positions of samples whose log-likelihood or gradient is not finite."""
        self.silent: tuple[str, ...] = ()
        """Tensors that no gradient reached in the first pass over all parameters: all zero."""
        self.passes = 0.0
        """Forward and backward passes over the whole sample set that were needed so far."""
        self._kept: list[tuple[Tensor, dict[str, SampleGradients]]] = []
        self._kept_bytes: dict[int, int] = {}
        self._tile: _Tile | None = None
        self._heard = False

    def on(self, samples: SampleSet) -> FisherMatrix:
        """The matrix of the same model on a few other samples.

        Nothing is kept for later passes, and any number of samples may be excluded.
        """
        return FisherMatrix(
            self.engine,
            samples,
            self.space,
            tokens=self.tokens,
            cache_bytes=0,
            excluded_share=1.0,
            device=self.device,
        )

    def marginals(self, rows: Tensor | None = None, *, within: Tensor | None = None) -> Marginals:
        """Row scores within a mask and column scores over all parameters, in one streamed pass.

        Args:
            rows: positions in the sample set, int64 [|S|]; all by default.
            within: the mask's sorted coordinates; all parameters by default.
        """
        rows = torch.arange(len(self.samples)) if rows is None else rows
        sums = torch.zeros(self.space.numel, device=self.device)
        flat = {name: sums[self.space.span(name)] for name in self.space.names}
        masks = self._columns(within)
        scores = torch.zeros(len(self.samples), dtype=torch.float64)
        for chosen, tensors in self._stream(rows):
            parts = [
                g.add_squares(flat[n], None if masks is None else masks.get(n, self._nothing(n)))
                for n, g in tensors.items()
            ]
            scores[chosen] += torch.stack(parts).cpu().sum(0, dtype=torch.float64)
        if not self._heard:
            self._heard = True
            self.silent = tuple(name for name in self.space.names if not bool(flat[name].any()))
        return Marginals(self._marked(scores)[rows], sums.div_(self._finite(rows)).cpu())

    def row_scores(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """r_i(M) for the given rows: float64 [|S|]; −∞ where the gradient is not finite.

        Args:
            rows: positions, int64 [|S|].
            columns: M as sorted coordinates; all parameters by default.
        """
        scores = torch.zeros(len(self.samples), dtype=torch.float64)
        if columns is not None and (tile := self._restricted(rows, columns)) is not None:
            for row, one in zip(rows, tile.read(rows, columns), strict=True):
                scores[row] = one.sum(dtype=torch.float64)
            return self._marked(scores)[rows]
        masks = self._columns(columns)
        for chosen, tensors in self._stream(rows):
            parts = [
                tensors[n].square_norms(None if masks is None else masks[n])
                for n in (tensors if masks is None else masks)
            ]
            scores[chosen] += torch.stack(parts).cpu().sum(0, dtype=torch.float64)
        return self._marked(scores)[rows]

    def column_scores(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """c_j(S) for the given columns: float32 [k], on the CPU.

        Args:
            rows: S as positions, int64 [|S|].
            columns: sorted coordinates; all parameters by default.
        """
        if columns is None:
            return self.marginals(rows, within=torch.empty(0, dtype=torch.int64)).columns
        if (tile := self._restricted(rows, columns)) is not None:
            total = torch.zeros(columns.numel())
            for one in tile.read(rows, columns):
                total += one
            return total.div_(self._finite(rows))
        masks = self._columns(columns) or {}
        whole = {n for n, m in masks.items() if m.count >= SAMPLED * m.numel}
        sums = {
            n: torch.zeros(m.numel if n in whole else m.count, device=self.device)
            for n, m in masks.items()
        }
        for _, tensors in self._stream(rows):
            for name in masks:
                if name in whole:
                    tensors[name].add_squares(sums[name], self._nothing(name))
                    continue
                for _, part in tensors[name].parts(masks[name].count):
                    sums[name] += part.entries(masks[name]).square().sum(0)
        found = [m.take(sums[n]) if n in whole else sums[n] for n, m in masks.items()]
        return torch.cat(found).div_(self._finite(rows)).cpu()

    def _columns(self, coords: Tensor | None) -> dict[str, Columns] | None:
        """A set of coordinates as a choice of entries for each tensor that it touches."""
        if coords is None:
            return None
        return {
            name: Columns(index.to(self.device), self._numel(name))
            for name, index in self.space.localize(coords).items()
        }

    def _numel(self, name: str) -> int:
        span = self.space.span(name)
        return span.stop - span.start

    def _nothing(self, name: str) -> Columns:
        """No entry of a tensor."""
        empty = torch.empty(0, dtype=torch.int64, device=self.device)
        return Columns(empty, self._numel(name))

    def _restricted(self, rows: Tensor, columns: Tensor) -> _Tile | None:
        """A tile that holds F[rows, columns] where it fits into memory, else None."""
        if self._tile is not None and self._tile.covers(rows, columns):
            return self._tile
        if rows.numel() * columns.numel() * 4 > self.cache_bytes:
            return None
        self._tile = None  # two tiles would take twice the memory
        values = torch.zeros(rows.numel(), columns.numel())
        place = torch.full((len(self.samples),), -1)
        place[rows] = torch.arange(rows.numel())
        bounds = torch.searchsorted(columns, torch.tensor(self.space.offsets)).tolist()
        spans = {n: slice(bounds[i], bounds[i + 1]) for i, n in enumerate(self.space.names)}
        masks = self._columns(columns) or {}
        for chosen, tensors in self._stream(rows):
            for name, mask in masks.items():
                for part, gradients in tensors[name].parts(mask.count):
                    found = gradients.entries(mask).square()
                    values[place[chosen[part]], spans[name]] = found.cpu()
        self._tile = _Tile(rows, columns, values)
        return self._tile

    def _stream(self, rows: Tensor) -> Iterator[tuple[Tensor, dict[str, SampleGradients]]]:
        """(positions, gradients by name) that together hold each finite row of `rows` once.

        Rows whose factors are kept come first, then batches of similar length through the model.
        """
        wanted = torch.zeros(len(self.samples), dtype=torch.bool)
        wanted[rows] = True
        missing = wanted.clone()
        for have, tensors in list(self._kept):
            chosen = wanted[have]
            missing[have] = False
            if chosen.all():
                yield have, tensors
            elif chosen.any():
                at = chosen.nonzero().flatten().to(self.device)
                yield have[chosen], {n: g.select(at) for n, g in tensors.items()}
        missing[list(self.excluded)] = False
        yield from self._compute(missing.nonzero().flatten())

    def _compute(self, rows: Tensor) -> Iterator[tuple[Tensor, dict[str, SampleGradients]]]:
        for batch in self.samples.length_batches(rows, tokens=self.tokens):
            self.passes += len(batch) / len(self.samples)
            for c in self.engine.gradients(batch.to(self.device)):
                have, good, tensors = batch.rows[c.part], c.finite.cpu(), c.tensors
                self._exclude(have[~good])
                if not good.all():
                    at = good.nonzero().flatten().to(self.device)
                    have, tensors = have[good], {n: g.select(at) for n, g in tensors.items()}
                kept = self._keep(have, tensors)
                if have.numel():
                    yield have, tensors
                if not kept:  # whoever still holds the dictionary must not hold the factors
                    tensors.clear()

    def _keep(self, rows: Tensor, tensors: dict[str, SampleGradients]) -> bool:
        """Keep the factors of these rows where they fit; storage that is shared counts once."""
        storages = [t.untyped_storage() for g in tensors.values() for t in g.storages]
        more = {s.data_ptr(): s.nbytes() for s in storages}
        if not rows.numel() or sum((self._kept_bytes | more).values()) > self.cache_bytes:
            return False
        self._kept.append((rows, tensors))
        self._kept_bytes |= more
        return True

    def _exclude(self, rows: Tensor) -> None:
        self.excluded |= set(rows.tolist())
        if len(self.excluded) > self.excluded_share * len(self.samples):
            ids = self.samples.ids[sorted(self.excluded)].tolist()
            raise DataError(
                f"{len(ids)} of {len(self.samples)} samples have a log-likelihood or a gradient "
                f"that is not finite, more than {self.excluded_share:.0%}. Rows (counting from 0): "
                f"{', '.join(map(str, ids[:10]))}{' …' if len(ids) > 10 else ''}."
            )

    def _marked(self, scores: Tensor) -> Tensor:
        """The scores of all samples, −∞ at the excluded ones."""
        scores[list(self.excluded)] = -torch.inf
        return scores

    def _finite(self, rows: Tensor) -> int:
        """How many of the rows count in a mean."""
        return max(1, rows.numel() - len(self.excluded & set(rows.tolist())))
