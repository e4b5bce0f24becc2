"""`Entries`: the trained entries of one tensor, and how a mask and a model give them.

A mask names columns; a model holds tensors. Everything that trains, clips, freezes or restores
works on `Entries`: read them into a short vector, write a short vector back, touch nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ird_search.errors import ModelError, UsageError, nearest
from ird_search.mask import SparseMask
from ird_search.mismatch import mismatch
from ird_search.parameters import require_module


@dataclass(frozen=True, eq=False, repr=False)
class Entries:
    """The k trained entries of one parameter.

    Args:
        name: the parameter's name in its model.
        parameter: the parameter itself.
        index: flat row-major indices, int64 [k], increasing; None for every entry.

    Example:
        >>> weight = nn.Parameter(torch.arange(6.0).view(2, 3))
        >>> some = Entries("w", weight, torch.tensor([1, 4]))
        >>> some.take(weight.detach())
        tensor([1., 4.])
        >>> some.put(weight.detach(), torch.tensor([7.0, 8.0]))
        >>> weight.detach()
        tensor([[0., 7., 2.],
                [3., 8., 5.]])
    """

    name: str
    parameter: nn.Parameter
    index: Tensor | None
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, init=False)

    @property
    def count(self) -> int:
        """k, how many entries are trained."""
        return self.parameter.numel() if self.index is None else self.index.numel()

    def take(self, tensor: Tensor) -> Tensor:
        """The entries of `tensor`, which has the parameter's shape: [k]; maybe a view of it."""
        if self.index is None:
            return tensor.reshape(-1)
        index = self._on(self.index, tensor.device)
        if tensor.is_contiguous():
            return tensor.view(-1).index_select(0, index)
        return tensor[torch.unravel_index(index, tensor.shape)]

    def take_gradient(self, grad: Tensor) -> Tensor:
        """The entries of a gradient, which may be sparse: [k]."""
        if not grad.is_sparse:
            return self.take(grad)
        grad = grad.coalesce()  # of several backward passes, or of a weight that is used twice
        return grad._values() if self._is_of_these(grad) else self.take(grad.to_dense())

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Write [k] values into the entries of `tensor`; all others keep their bits."""
        values = values.to(tensor.dtype)
        if self.index is None:
            tensor.copy_(values.view(tensor.shape))
            return
        index = self._on(self.index, tensor.device)
        if tensor.is_contiguous():
            # index_copy_ and not put_: it also runs under use_deterministic_algorithms.
            tensor.view(-1).index_copy_(0, index, values)
        else:
            tensor[torch.unravel_index(index, tensor.shape)] = values

    def only(self, tensor: Tensor) -> Tensor:
        """`tensor`, but zero elsewhere, also where it is not finite; a copy, unless it was so."""
        if tensor.is_sparse:
            if self._is_of_these(tensor):
                return tensor
            tensor = tensor.to_dense()
        kept = torch.zeros_like(tensor)
        self.put(kept, self.take(tensor))
        return kept

    def _is_of_these(self, sparse: Tensor) -> bool:
        """Whether a sparse matrix holds just these entries, in their order."""
        if self.index is None or not sparse.is_coalesced() or sparse._nnz() != self.count:
            return False
        places = sparse._indices()
        if len(places) != 2 or sparse.ndim != 2:  # rows of a table, and not single entries
            return False
        flat = places[0] * sparse.shape[1] + places[1]
        return torch.equal(flat, self._on(self.index, sparse.device))

    def _on(self, index: Tensor, device: torch.device) -> Tensor:
        """The index on a device, sent there once: a model may be moved after the mask is set."""
        if device not in self._copies:
            self._copies[device] = index.to(device)
        return self._copies[device]

    def __repr__(self) -> str:
        return f"Entries({self.name}, {self.count:,} of {self.parameter.numel():,})"


def trained_entries(
    model: nn.Module, mask: SparseMask, dense: Iterable[str] = (), *, allow_none: bool = False
) -> tuple[tuple[Entries, ...], tuple[Entries, ...]]:
    """The selected entries of `mask`, and the tensors that are trained whole.

    Args:
        dense: names of parameters that are trained fully, outside the mask (the head).
        allow_none: whether nothing at all may be trained (a model without a head has no baseline).

    Raises:
        ModelError: the mask is of another model, or selects entries that are not real numbers or
            lie in sharded tensors.
        UsageError: a dense name is unknown or also holds selected entries, or nothing is trained.
    """
    require_module(model)
    check_mask(mask)
    if text := mismatch(mask.space, model):
        raise ModelError(text)
    parameters = dict(model.named_parameters())
    whole = _checked_dense(parameters, mask, dense)
    if not whole and not mask.count and not allow_none:
        raise UsageError("The mask is empty and no tensor is dense: nothing would be trained.")
    if unreal := [n for n in (*mask.indices, *whole) if not parameters[n].is_floating_point()]:
        raise ModelError(
            f"{name!r} holds {parameters[name].dtype}; only real floats can be trained."
            for name in unreal
        )
    if sharded := [n for n in (*mask.indices, *whole) if hasattr(parameters[n], "device_mesh")]:
        raise ModelError(
            f"{len(sharded)} tensors with trained entries are sharded over processes (DTensor), as "
            f"{sharded[0]!r}; a mask needs them whole. Train in one process, or in several that "
            "each hold the whole model (DDP)."
        )
    masked = tuple(
        # A tensor selected in full needs no index: it is read and written as a whole.
        Entries(name, parameters[name], None if i.numel() == parameters[name].numel() else i)
        for name, i in mask.indices.items()
    )
    return masked, tuple(Entries(name, parameters[name], None) for name in whole)


def check_mask(mask: object) -> None:
    """Refuse what is no mask, such as its file's path, before that fails for a stranger reason.

    Raises:
        UsageError: it is something else.
    """
    if not isinstance(mask, SparseMask):
        raise UsageError(
            f"The mask is a {type(mask).__name__}; a SparseMask is accepted. Read one from a file "
            "with load_mask(path, model)."
        )


def _checked_dense(
    parameters: dict[str, nn.Parameter], mask: SparseMask, dense: Iterable[str]
) -> list[str]:
    names = [dense] if isinstance(dense, str) else list(dict.fromkeys(dense))
    problems = [
        f"{name!r} is not a parameter of this model.{nearest(name, parameters)}"
        for name in names
        if name not in parameters
    ]
    problems += [
        f"{name!r} is dense and also holds {mask.indices[name].numel():,} selected entries; "
        "take it out of one of them."
        for name in names
        if name in mask.indices
    ]
    if problems:
        raise UsageError(problems)
    return names
