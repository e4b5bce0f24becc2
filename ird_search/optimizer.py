"""Optimizers whose state is as large as the mask, not as the model.

Any optimizer that treats each entry by itself (SGD, Adam, RMSprop, …) can work on the selected
entries alone: they are read into one short vector [k], the optimizer takes its step there, and the
outcome is written back. Its state is then [k], too, and nothing else can move: neither by weight
decay nor by momentum.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ird_search.entries import Entries, trained_entries
from ird_search.errors import UsageError, nearest
from ird_search.flat import Flat
from ird_search.mask import SparseMask


class MaskedOptimizer(Optimizer):
    """What `masked` makes of an optimizer class, the `optimizer_class`; see there."""

    optimizer_class: ClassVar[type[Optimizer]]

    def __init__(
        self,
        model: nn.Module,
        mask: SparseMask,
        *,
        lr: float,
        dense: Iterable[str] = (),
        clip_norm: float | None = None,
        **options: Any,
    ) -> None:
        self._is_built = False
        masked, whole = trained_entries(model, mask, dense)
        own, dense_own = _by_group({"lr": lr, **options})
        _check(own, dense_own, clip_norm)
        if dense_own and not whole:
            raise UsageError(
                f"dense_{next(iter(dense_own))} is given, but no tensor is dense: name some in "
                "`dense`, or leave it out."
            )
        self._flats = [*_flats(0, masked), *_flats(1, whole)]
        groups: list[dict[str, Any]] = [{"params": self._of(0), "mask": mask.digest}]
        if whole:
            groups.append({"params": self._of(1), **dense_own})
        try:
            self._inner = self.optimizer_class(groups, **own)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"{self.optimizer_class.__name__}: {error}.") from error
        if unknown := [key for key in dense_own if key not in self._inner.defaults]:
            raise UsageError(
                f"{self.optimizer_class.__name__} has no option {key!r}, so dense_{key} means "
                f"nothing.{nearest(key, self._inner.defaults)}"
                for key in unknown
            )
        _require_elementwise(self.optimizer_class, own)
        real = [masked, whole][: len(groups)]
        super().__init__(
            [
                {**group, "params": [e.parameter for e in entries]}
                for group, entries in zip(self._inner.param_groups, real, strict=True)
            ],
            self._inner.defaults,
        )
        self.clip_norm = clip_norm
        self.state = self._inner.state
        self._is_built = True
        self._release()

    @property
    def mask(self) -> str:
        """The digest of the mask it trains."""
        return str(self.param_groups[0]["mask"])

    @property
    def dense(self) -> dict[str, nn.Parameter]:
        """The tensors that it trains whole, outside the mask, by name."""
        return {e.name: e.parameter for f in self._flats if f.group == 1 for e in f.entries}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the trained entries from the gradients of their tensors.

        Args:
            closure: recomputes the loss and its gradients first; its value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = self._moving()
        for flat in moving:
            flat.load()
        if self.clip_norm is not None:
            _clip(
                [f.parameter.grad for f in moving if f.parameter.grad is not None], self.clip_norm
            )
        self._pass_on_settings()
        try:
            self._inner.step()
            for flat in moving:
                flat.store()
        finally:
            self._release()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, of the mask's size, and which entries it belongs to."""
        self._pass_on_settings()
        return {
            **self._inner.state_dict(),
            "optimizer": self.optimizer_class.__name__,
            "entries": [[e.name for e in flat.entries] for flat in self._flats],
            "master": [flat.parameter.detach() if flat.is_half else None for flat in self._flats],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of an optimizer of the same class and mask.

        Raises:
            UsageError: the state belongs to another optimizer or mask.
        """
        self._check_state(state_dict)
        saved = copy.deepcopy(state_dict)
        known = {e.name: (flat.group, e) for flat in self._flats for e in flat.entries}
        self._flats = [
            Flat(known[names[0]][0], [known[name][1] for name in names], master)
            for names, master in zip(saved["entries"], saved["master"], strict=True)
        ]
        self._regroup()
        self._inner.load_state_dict({key: saved[key] for key in ("state", "param_groups")})
        self._release()
        self.state = self._inner.state
        for group, loaded in zip(self.param_groups, self._inner.param_groups, strict=True):
            group.update({k: v for k, v in loaded.items() if k != "params"})

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles: a class that `masked` made is made again."""
        return _blank, (self.optimizer_class,), self.__dict__.copy()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only the constructor adds groups: a mask fixes what is trained.

        Raises:
            UsageError: the optimizer is already built.
        """
        if self._is_built:
            raise UsageError(
                f"A {type(self).__name__} takes no further parameters; name them in `dense` when "
                "it is made."
            )
        super().add_param_group(param_group)

    def _of(self, group: int) -> list[nn.Parameter]:
        return [flat.parameter for flat in self._flats if flat.group == group]

    def _regroup(self) -> None:
        for i, group in enumerate(self._inner.param_groups):
            group["params"] = self._of(i)

    def _release(self) -> None:
        for flat in self._flats:
            flat.release()

    def _pass_on_settings(self) -> None:
        """What schedulers and users set on our groups holds for the optimizer inside."""
        for ours, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner.update({k: v for k, v in ours.items() if k != "params"})

    def _moving(self) -> list[Flat]:
        """The vectors whose tensors all have a gradient; the others are left out, as in torch.

        Where only some tensors of a vector have one, it falls into two for good: their state and
        their count of steps go separate ways. In ordinary training that happens once or never.
        """
        flats: list[Flat] = []
        for flat in self._flats:
            has = [e.parameter.grad is not None for e in flat.entries]
            flats += [flat] if all(has) or not any(has) else self._parted(flat, has)
        self._flats = flats
        self._regroup()
        return [flat for flat in flats if flat.entries[0].parameter.grad is not None]

    def _parted(self, flat: Flat, has: list[bool]) -> list[Flat]:
        """Two vectors, with and without a gradient, each with its share of the state."""
        state = self._inner.state.pop(flat.parameter, None)
        parts = []
        for wanted in (True, False):
            entries = [e for e, h in zip(flat.entries, has, strict=True) if h == wanted]
            cut = functools.partial(_cut, counts=flat.counts, kept=[h == wanted for h in has])
            part = Flat(flat.group, entries, cut(flat.parameter.data) if flat.is_half else None)
            if state is not None:
                self._inner.state[part.parameter] = {name: cut(v) for name, v in state.items()}
            parts.append(part)
        return parts

    def _check_state(self, state_dict: Mapping[str, Any]) -> None:
        cls, ours = self.optimizer_class.__name__, self.mask
        if "entries" not in state_dict:
            raise UsageError(
                "This is not the state of a masked optimizer: it does not name its entries. Load "
                f"what {type(self).__name__}.state_dict() gave."
            )
        theirs = state_dict["param_groups"][0].get("mask")
        problems = []
        if ours != theirs:
            problems.append(
                f"This optimizer state belongs to another mask ({_short(theirs)}); the optimizer "
                f"trains {_short(ours)}. Load the state of the same mask."
            )
        if state_dict["optimizer"] != cls:
            problems.append(f"This is the state of a {state_dict['optimizer']}, not of a {cls}.")
        saved = {name for names in state_dict["entries"] for name in names}
        if saved != {e.name for flat in self._flats for e in flat.entries} and not problems:
            problems.append(
                "This optimizer state belongs to other dense tensors; name the same in `dense`."
            )
        if problems:
            raise UsageError(problems)


class MaskedAdamW(MaskedOptimizer):
    """AdamW on the selected entries of a model, and on a few dense tensors; nothing else moves.

    With g the gradient of the k trained entries alone,

        θ ← θ − η λ θ
        m ← β₁ m + (1 − β₁) g        v ← β₂ v + (1 − β₂) g²
        θ ← θ − η · m/(1 − β₁ᵗ) / (√(v/(1 − β₂ᵗ)) + ε)

    It is `masked(torch.optim.AdamW)`: `torch.optim.AdamW` does the arithmetic and takes its own
    options (`betas`, `eps`, `weight_decay`, `amsgrad`, `fused`, …). The state is m, v: [k] in
    float32.

    Example:
        >>> from ird_search.parameters import ParameterSpace
        >>> model = nn.Linear(2, 1)
        >>> mask = SparseMask(ParameterSpace.of(model), torch.tensor([1]))
        >>> before = model.weight.detach().clone()
        >>> optimizer = MaskedAdamW(model, mask, lr=0.1, weight_decay=0.1)
        >>> model(torch.ones(3, 2)).sum().backward()
        >>> optimizer.step()
        >>> model.weight.detach() != before
        tensor([[False,  True]])
    """

    optimizer_class = torch.optim.AdamW


@functools.cache
def masked(optimizer_class: type[Optimizer]) -> type[MaskedOptimizer]:
    """An optimizer class that trains the selected entries of a model, with state of their size.

    The class that comes back is made as `cls(model, mask, lr=…, dense=(), clip_norm=None, …)`:

    * `model`, `mask`: whose parameters are trained, and which entries of them;
    * `dense`: names of the parameters trained fully, outside the mask (the head);
    * `clip_norm`: largest norm of the gradient of everything trained. Frozen entries do not count:
      in the norm of the whole gradient a sparse update would all but vanish;
    * all else goes to the optimizer; an option `dense_lr`, `dense_weight_decay`, … is the dense
      tensors' own.

    Weights in half precision get float32 master values of the mask's length, so that small updates
    add up instead of being rounded away; a weight that was changed from outside is taken over as
    it is. The first parameter group holds the mask's tensors, the second, if any, the dense ones,
    so learning rate schedulers, `zero_grad` and gradient scalers work as ever. The model is not
    changed; see `trainable_only` for what saves the gradients that nobody reads.

    Args:
        optimizer_class: a torch optimizer that treats each entry by itself. That is checked when
            one is made: L-BFGS, Muon, Adafactor and LARS, which mix the entries of a tensor, are
            refused.

    Raises:
        UsageError: not an optimizer class; on making one: a setting out of range, an unknown dense
            name, a tensor that is dense and masked, or an optimizer that mixes entries.
        ModelError: on making one: the mask is of another model.

    Example:
        >>> from ird_search.parameters import ParameterSpace
        >>> model = nn.Linear(2, 1)
        >>> mask = SparseMask(ParameterSpace.of(model), torch.tensor([1]))
        >>> optimizer = masked(torch.optim.SGD)(model, mask, lr=0.1, momentum=0.9)
        >>> model(torch.ones(3, 2)).sum().backward()
        >>> optimizer.step()
        >>> [state["momentum_buffer"] for state in optimizer.state.values()]
        [tensor([3.])]
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise UsageError(
            f"{optimizer_class!r} is not an optimizer class; pass one, as torch.optim.SGD."
        )
    if issubclass(optimizer_class, MaskedOptimizer):
        return optimizer_class
    if optimizer_class is torch.optim.AdamW:
        return MaskedAdamW
    name = f"Masked{optimizer_class.__name__}"
    made = type(name, (MaskedOptimizer,), {"optimizer_class": optimizer_class})
    made.__doc__ = f"{optimizer_class.__name__} on the selected entries of a model; see `masked`."
    return made


def _blank(optimizer_class: Any) -> MaskedOptimizer:
    made = masked(optimizer_class)
    return made.__new__(made)


def _flats(group: int, entries: tuple[Entries, ...]) -> list[Flat]:
    """One vector for each dtype and device, which is nearly always one."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Entries]] = {}
    for e in entries:
        kinds.setdefault((e.parameter.dtype, e.parameter.device), []).append(e)
    return [Flat(group, kind) for kind in kinds.values()]


def _cut(value: Any, *, counts: list[int], kept: list[bool]) -> Any:
    """The share of some tensors in a vector [k]; anything else (a step count) as a copy."""
    if not isinstance(value, Tensor) or value.ndim != 1 or value.numel() != sum(counts):
        return copy.deepcopy(value)
    parts = zip(value.split(counts), kept, strict=True)
    return torch.cat([part for part, keep in parts if keep])


def _clip(gradients: list[Tensor], clip_norm: float) -> None:
    """Scale the gradients in place so that their joint norm is at most `clip_norm`."""
    if not gradients:
        return
    device = gradients[0].device
    norms = [torch.linalg.vector_norm(g).to(device) for g in gradients]
    factor = (clip_norm / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient))


def _by_group(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the mask's group, and what differs from them in the dense one."""
    dense = {k: v for k, v in options.items() if k.startswith("dense_")}
    own = {k: v for k, v in options.items() if k not in dense}
    return own, {k.removeprefix("dense_"): v for k, v in dense.items() if v is not None}


def _check(own: Mapping[str, Any], dense: Mapping[str, Any], clip_norm: float | None) -> None:
    """All that torch would find, and what it lets pass (a NaN), at once."""
    named = [*own.items(), *((f"dense_{key}", value) for key, value in dense.items())]
    problems = [
        f"{key} is {value!r}; it must be at least 0."
        for key, value in named
        if key.removeprefix("dense_") in ("lr", "eps", "weight_decay", "momentum")
        and not (_is_number(value) and float(value) >= 0)
    ]
    problems += [
        f"{key} are {value!r}; each must be at least 0 and below 1."
        for key, value in named
        if key.removeprefix("dense_") == "betas"
        and not (isinstance(value, Sequence) and all(_is_number(b) and 0 <= b < 1 for b in value))
    ]
    if clip_norm is not None and not clip_norm > 0:
        problems.append(f"clip_norm is {clip_norm}; it must be above 0, or None for no clipping.")
    if problems:
        raise UsageError(problems)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, Tensor)) and not isinstance(value, bool)


def _require_elementwise(optimizer_class: type[Optimizer], options: Mapping[str, Any]) -> None:
    """Two steps on one vector must be two steps on its halves.

    Raises:
        UsageError: they are not, or the optimizer cannot step on a vector without a closure.
    """
    settings = {k: v for k, v in options.items() if k != "capturable"} | {"lr": 0.1}
    start, gradients = torch.tensor([1.0, -2.0, 3.0, 0.5]), torch.tensor([0.3, 5.0, -0.1, 40.0])

    def after(size: int) -> Tensor:
        parts = [nn.Parameter(part.clone()) for part in start.split(size)]
        optimizer = optimizer_class(parts, **settings)
        for scale in (1.0, -0.3):
            for part, gradient in zip(parts, gradients.split(size), strict=True):
                part.grad = scale * gradient
            optimizer.step()
        return torch.cat([part.detach() for part in parts])

    name = optimizer_class.__name__
    try:
        alone = torch.allclose(after(4), after(2), rtol=1e-5)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"{name} cannot step on a vector of single entries: {error}. Take an optimizer that "
            "treats each entry by itself, as SGD, Adam or AdamW; or apply_mask, with any optimizer."
        ) from error
    if not alone:
        raise UsageError(
            f"{name} mixes the entries of a tensor, so on a few of them it would be another "
            "optimizer. Take one that treats each entry by itself, as SGD, Adam or AdamW; or "
            "apply_mask, with any optimizer."
        )


def _short(digest: str | None) -> str:
    return f"mask {digest[:12]}" if digest else "no mask"
