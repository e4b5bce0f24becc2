"""What keeps everything outside a mask as it is, whatever trains the model.

A `masked` optimizer never touches a frozen entry and needs only `trainable_only`, which saves time
and memory. Any other optimizer goes through `apply_mask`. `SparseMask.verify` looks at the outcome.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ird_search.entries import Entries, trained_entries
from ird_search.errors import UsageError
from ird_search.mask import SparseMask
from ird_search.optimizer import MaskedOptimizer

_applied: weakref.WeakKeyDictionary[nn.Module, MaskHandle] = weakref.WeakKeyDictionary()
"""Every module under a mask. It also keeps a handle that the caller drops alive with its model."""


@contextmanager
def trainable_only(
    model: nn.Module, mask: SparseMask, dense: Iterable[str] = ()
) -> Iterator[nn.Module]:
    """Within the block, only tensors with a trained entry require a gradient.

    Autograd then skips the weight gradients of all others. `requires_grad` is as before
    afterwards, also after an exception.

    Args:
        mask: the entries that are trained.
        dense: names of the parameters trained fully, outside the mask.

    Raises:
        ModelError: the mask is of another model.
        UsageError: an unknown dense name, or a tensor that is dense and masked.

    Example:
        >>> from ird_search.parameters import ParameterSpace
        >>> model = nn.Linear(2, 1)
        >>> mask = SparseMask(ParameterSpace.of(model), torch.tensor([1]))
        >>> with trainable_only(model, mask):
        ...     [name for name, p in model.named_parameters() if p.requires_grad]
        ['weight']
    """
    masked, whole = trained_entries(model, mask, dense)
    before = _require_only(model, [e.parameter for e in (*masked, *whole)])
    try:
        yield model
    finally:
        _require_again(before)


def apply_mask(model: nn.Module, mask: SparseMask, *, dense: Iterable[str] = ()) -> MaskHandle:
    """Make any torch optimizer train the selected entries only, until the handle is removed.

    * Tensors without a trained entry stop requiring a gradient, and lose the one they hold.
    * Gradients of the others are zeroed outside the mask during backward: before clipping.
    * Around each step of an optimizer that owns one of these tensors, frozen entries are put back
      bit for bit: weight decay and momentum move entries whose gradient is zero. What writes
      weights outside `step()` (schedule-free `eval()`, Lookahead, weight averaging) is not seen.

    For the time of a step this takes a copy of the touched tensors. A `masked` optimizer needs
    none: there, `apply_mask` is what zeroes gradients before somebody else's clipping.

    Args:
        mask: the entries that are trained.
        dense: names of the parameters trained fully, outside the mask.

    Raises:
        ModelError: the mask is of another model; up to ten differences are named.
        UsageError: the model, or a part of it, is under a mask already; an unknown dense name; a
            tensor that is dense and masked.

    Example:
        >>> from ird_search.parameters import ParameterSpace
        >>> model = nn.Linear(2, 1)
        >>> mask = SparseMask(ParameterSpace.of(model), torch.tensor([1]))
        >>> before = model.weight.detach().clone()
        >>> with apply_mask(model, mask) as handle:
        ...     optimizer = torch.optim.SGD(handle.parameters(), lr=0.1, weight_decay=0.1)
        ...     model(torch.ones(3, 2)).sum().backward()
        ...     optimizer.step()
        >>> model.weight.detach() != before
        tensor([[False,  True]])
    """
    masked, whole = trained_entries(model, mask, dense)
    if any(module in _applied for module in model.modules()):
        raise UsageError(
            "This model is under a mask already. Remove the first one (`handle.remove()`, or leave "
            "its `with` block), or apply the union of both masks."
        )
    handle = MaskHandle(model, mask, masked, whole)
    for module in model.modules():
        _applied[module] = handle
    return handle


def refuse_masked(model: nn.Module) -> None:
    """Refuse a model that is under `apply_mask`: its gradients are those of the mask alone.

    Raises:
        UsageError: it is, or a part of it.
    """
    if any(module in _applied for module in model.modules()):
        raise UsageError(
            "This model is under a mask, which hides the gradients of everything else. Remove it "
            "first (`handle.remove()`, or leave its `with` block)."
        )


class MaskHandle:
    """A mask in force on a model: what `apply_mask` returns.

    Use it in a `with` statement, or call `remove()` when training is over.
    """

    def __init__(
        self,
        model: nn.Module,
        mask: SparseMask,
        masked: tuple[Entries, ...],
        dense: tuple[Entries, ...],
    ) -> None:
        self.mask = mask
        self._masked, self._dense, self._trained = masked, dense, (*masked, *dense)
        self._partial = tuple(e for e in masked if e.index is not None)
        self._saved: list[tuple[Entries, Tensor]] = []
        self._required = _require_only(model, list(self.parameters()))
        for p, _ in self._required:
            if not p.requires_grad:
                p.grad = None  # a stale gradient, even of zeros, lets an optimizer decay the tensor
        for e in self._partial:
            if e.parameter.grad is not None:
                e.parameter.grad = e.only(e.parameter.grad)
        hooks = [e.parameter.register_hook(e.only) for e in self._partial]
        hooks += _watch_steps(self)
        self._unhook = weakref.finalize(self, _remove_all, hooks)
        self._unhook.atexit = False

    @property
    def count(self) -> int:
        """How many parameters are trained: the selected entries and the dense tensors."""
        return sum(e.count for e in self._trained)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters to give to the optimizer: the mask's, then the dense ones."""
        return (e.parameter for e in self._trained)

    def groups(self, **dense_options: Any) -> list[dict[str, Any]]:
        """The same as parameter groups; the options are those of the dense tensors."""
        dense = [e.parameter for e in self._dense]
        masked = [e.parameter for e in self._masked]
        return [{"params": masked}, *([{"params": dense, **dense_options}] if dense else [])]

    def remove(self) -> None:
        """Take the mask off: hooks gone, `requires_grad` as before. Again does nothing."""
        if not self._unhook.alive:
            return
        self._put_back()
        self._unhook()
        _require_again(self._required)
        for module in [m for m, handle in _applied.items() if handle is self]:
            del _applied[module]

    def __enter__(self) -> MaskHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "in force" if self._unhook.alive else "removed"
        return f"MaskHandle({self.count:,} parameters in {len(self._trained)} tensors, {state})"

    def _touched_by(self, optimizer: Optimizer) -> list[Entries]:
        """What an optimizer owns; nothing of a stranger, or of one inside a masked optimizer."""
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [e for e in self._partial if id(e.parameter) in owned]

    @torch.no_grad()
    def _save(self, optimizer: Optimizer) -> None:
        """Before a step: copy the tensors that the optimizer is about to write."""
        if not (touched := self._touched_by(optimizer)):
            return
        self._put_back()  # if the last step raised, its half-finished work is still there
        if isinstance(optimizer, MaskedOptimizer) and optimizer.mask == self.mask.digest:
            self.check_dense(optimizer)
        else:
            self._saved = [(e, e.parameter.detach().clone()) for e in touched]

    def check_dense(self, optimizer: Optimizer, *, alone: bool = False) -> None:
        """Refuse a masked optimizer whose dense tensors are not those that are trained here.

        Args:
            alone: whether no other optimizer could train what this one does not.

        Raises:
            UsageError: they are others.
        """
        if not isinstance(optimizer, MaskedOptimizer):
            return
        ours, its = {e.name for e in self._dense}, set(optimizer.dense)
        if wrong := sorted(its - ours) + (sorted(ours - its) if alone else []):
            where = (
                "the optimizer's `dense` and not in the mask's"
                if its - ours
                else ("the mask's `dense` and not in the optimizer's")
            )
            raise UsageError(
                f"{', '.join(map(repr, wrong[:3]))}{' …' if len(wrong) > 3 else ''} stand in "
                f"{where}, so training would leave them as they are. Give both the same `dense`."
            )

    @torch.no_grad()
    def _put_back(self) -> None:
        """After a step: the old tensors, with the new values of the trained entries."""
        for e, before in self._saved:
            tensor = e.parameter.detach()
            new = e.take(tensor)
            tensor.copy_(before)
            e.put(tensor, new)
        self._saved = []


def _watch_steps(handle: MaskHandle) -> list[Any]:
    """Global hooks around every optimizer's step; they must not keep the handle alive."""
    reference = weakref.ref(handle)

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if (alive := reference()) is not None:
            alive._save(optimizer)

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if (alive := reference()) is not None and alive._touched_by(optimizer):
            alive._put_back()

    return [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]


def _remove_all(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()


def _require_only(model: nn.Module, trained: list[nn.Parameter]) -> list[tuple[nn.Parameter, bool]]:
    """Let only `trained` require a gradient; returns what `_require_again` needs."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    wanted = {id(p) for p in trained}
    for p, _ in before:
        p.requires_grad_(id(p) in wanted)
    return before


def _require_again(before: list[tuple[nn.Parameter, bool]]) -> None:
    for p, required in before:
        p.requires_grad_(required)
