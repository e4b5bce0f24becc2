"""`merge_delta`: a delta put into its base model, taken out again, or changed for another.

The base with the delta is the tuned model, bit for bit; without it, it is the base again, bit for
bit; and changing from one delta to another costs what their entries cost.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from types import TracebackType

import torch
from torch import Tensor, nn

from ird_search.artifact import Delta
from ird_search.artifact.matching import lines_sha256, weight_lines
from ird_search.entries import Entries, trained_entries
from ird_search.errors import ModelError, UsageError, nearest
from ird_search.mismatch import listed, mismatch

_in_force: weakref.WeakSet[Merged] = weakref.WeakSet()


def merge_delta(model: nn.Module, delta: Delta, *, strict: bool = True) -> Merged:
    """Put a delta into its base model, in place.

    Args:
        strict: require the very weights of the delta's base, in its dtype. Without this, only names
            and shapes are compared, and values are cast to the model's dtype. As a delta holds
            values and no differences, a base that was cast becomes the tuned model cast alike.

    Returns:
        What takes the delta out again, or changes it for another: see `Merged`. The merge is final
        when it is dropped.

    Raises:
        ModelError: the model is another one, has other weights, or has a delta merged already.
            Nothing is written.
        UsageError: something else was passed for the delta.

    Example:
        >>> from ird_search.artifact import weights_sha256
        >>> from ird_search.mask import SparseMask
        >>> from ird_search.parameters import ParameterSpace
        >>> model = nn.Linear(2, 1)
        >>> before = model.weight.detach().clone()
        >>> mask = SparseMask(ParameterSpace.of(model), torch.tensor([1]))
        >>> delta = Delta(mask, {"weight": torch.tensor([5.0])}, {}, weights_sha256(model))
        >>> with merge_delta(model, delta):
        ...     model.weight.detach() == 5
        tensor([[False,  True]])
        >>> torch.equal(model.weight, before)
        True
    """
    if not isinstance(delta, Delta):
        raise UsageError(
            f"The delta is a {type(delta).__name__}; a Delta is accepted. Read one from a file "
            "with load_delta(path)."
        )
    if any(merged._shares(model) for merged in _in_force):
        raise ModelError(
            "This model, or a part of it, has a delta merged already. Call unmerge() on what "
            "merge_delta returned then, or change the delta there with switch()."
        )
    return Merged(model, delta, strict=strict)


class Merged:
    """A delta in force on a model: what `merge_delta` returns.

    Use it in a `with` statement, or call `unmerge()`. Taking a delta out puts back the values that
    lay at its entries before; what else changed meanwhile stays as it is.

    `model` is where, `delta` what is merged now: None for the bare base.
    """

    def __init__(self, model: nn.Module, delta: Delta, *, strict: bool) -> None:
        self.model = model
        self.delta: Delta | None = None
        self._undo: Delta | None = None
        self._strict = strict
        self._lines: dict[str, str] = {}  # of the base, hashed once for all deltas
        self._put(delta)
        _in_force.add(self)

    def switch(self, delta: Delta | None) -> None:
        """Change to another delta of the same base, or to the bare base (None), in place.

        The cost goes with the entries of both; the base is not hashed again.

        Raises:
            ModelError: as for `merge_delta`; the delta before stays merged.
            UsageError: after `unmerge()`.
        """
        if self not in _in_force:
            raise UsageError("This delta was unmerged. Call merge_delta again.")
        self._put(delta)

    def unmerge(self) -> None:
        """Put the base's values back, bit for bit. Again does nothing."""
        if self in _in_force:
            self._put(None)
            _in_force.discard(self)

    def _put(self, delta: Delta | None) -> None:
        if delta is not None:
            self._refuse_other_base(delta)
        if self._undo is not None:
            _exchange(self.model, self._undo)
            self.delta = self._undo = None
        if delta is not None:
            self.delta, self._undo = delta, _exchange(self.model, delta)

    def _refuse_other_base(self, delta: Delta) -> None:
        _refuse_misfit(self.model, delta, cast=not self._strict)
        if not self._strict:
            return
        self._lines = self._lines or weight_lines(dict(self.model.named_parameters()))
        kept = (line for name, line in self._lines.items() if name not in delta.dense)
        if (held := lines_sha256(kept)) != delta.base_sha256:
            base = delta.provenance.get("base_model")
            raise ModelError(
                f"The model's weights (sha256 {held[:12]}) are not the base of this delta "
                f"({delta.base_sha256[:12]}{f', {base}' if base else ''}). Load the same base "
                "model and revision, before any training and without another delta. strict=False "
                "merges nevertheless; the result is then not the model that was tuned."
            )

    def _shares(self, model: nn.Module) -> bool:
        return not set(self.model.modules()).isdisjoint(model.modules())

    def __enter__(self) -> Merged:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unmerge()

    def __repr__(self) -> str:
        return f"Merged({type(self.model).__name__}, {self.delta or 'the bare base'})"


@torch.no_grad()
def _exchange(model: nn.Module, delta: Delta) -> Delta:
    """Write a delta into a model; what comes back takes it out again."""
    places, tensors = _places(model, delta), {**delta.values, **delta.dense}
    # What needs memory comes before the first write.
    old = {name: e.take(e.parameter).to("cpu", copy=True) for name, e in places.items()}
    new = {name: t.reshape(-1).to(places[name].parameter.device) for name, t in tensors.items()}
    try:
        for name, e in places.items():
            e.put(e.parameter, new[name])
    except BaseException:  # an interrupt, too, must leave no half of a delta behind
        for name, e in places.items():
            e.put(e.parameter, old[name].to(e.parameter.device))
        raise
    values = {name: old[name] for name in delta.values}
    dense = {name: old[name].view(tensor.shape) for name, tensor in delta.dense.items()}
    return replace(delta, values=values, dense=dense)


def _places(model: nn.Module, delta: Delta) -> dict[str, Entries]:
    """Where the values of a delta and its dense tensors belong, by name."""
    buffers = {n: nn.Parameter(b, False) for n, b in model.named_buffers() if n in delta.dense}
    whole = [name for name in delta.dense if name not in buffers]
    masked, dense = trained_entries(model, delta.mask, whole, allow_none=True)
    stored = [Entries(name, buffer, None) for name, buffer in buffers.items()]
    return {entries.name: entries for entries in (*masked, *dense, *stored)}


def _refuse_misfit(model: nn.Module, delta: Delta, *, cast: bool) -> None:
    """Refuse a model in which a tensor of the delta is missing, or of another shape or dtype."""
    if text := mismatch(delta.mask.space, model, "delta"):
        raise ModelError(text)
    held: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    problems = []
    for name, tensor in {**delta.values, **delta.dense}.items():
        if name not in held:
            problems.append(f"{name} {list(tensor.shape)} is missing.{nearest(name, held)}")
        elif name in delta.dense and held[name].shape != tensor.shape:
            problems.append(f"{name} is {list(held[name].shape)}, not {list(tensor.shape)}")
        elif not _same_dtype(held[name], tensor, cast):
            problems.append(f"{name} is {held[name].dtype}, not {tensor.dtype}")
    if problems:
        head = f"The model does not fit this delta: {len(problems)} tensors differ."
        raise ModelError(
            f"{listed(head, problems)}\n"
            "Load the model with the same head and in the same dtype as the one that was tuned."
            + ("" if cast else " strict=False casts from one float to another.")
        )


def _same_dtype(a: Tensor, b: Tensor, cast: bool) -> bool:
    return a.dtype == b.dtype or (cast and a.is_floating_point() and b.is_floating_point())
