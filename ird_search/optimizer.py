"""`MaskedAdamW`: AdamW whose state is as large as the mask, not as the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ird_search.entries import Entries, trained_entries
from ird_search.errors import UsageError
from ird_search.mask import SparseMask


@dataclass(frozen=True, eq=False)
class _Flat:
    """The trained entries of tensors that share dtype and device, behind one another: [k].

    Args:
        key: under which the optimizer keeps the state.
        group: which parameter group they follow.
        entries: the tensors' entries.
    """

    key: str
    group: int
    entries: tuple[Entries, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the state: float32 or wider."""
        return torch.promote_types(self.entries[0].parameter.dtype, torch.float32)

    @property
    def is_half(self) -> bool:
        """Whether the weights are too coarse to hold a small update."""
        return self.entries[0].parameter.dtype != self.dtype

    @cached_property
    def offsets(self) -> list[int]:
        """Where each tensor's entries begin, and k at the end: [tensors + 1]."""
        return list(accumulate((e.count for e in self.entries), initial=0))

    def runs(self, steps: list[int]) -> Iterator[slice]:
        """Longest stretches of neighbours that have a gradient and the same number of steps.

        One stretch in ordinary training. Tensors without a gradient are left out, as in torch:
        neither their weights, nor their state, nor their step count move.
        """
        start = 0
        for i, e in enumerate(self.entries):
            if e.parameter.grad is None:
                if start < i:
                    yield slice(start, i)
                start = i + 1
            elif start < i and steps[i] != steps[start]:
                yield slice(start, i)
                start = i
        if start < len(self.entries):
            yield slice(start, len(self.entries))

    def part(self, run: slice) -> slice:
        """Where a run lies in the flat vectors."""
        return slice(self.offsets[run.start], self.offsets[run.stop])

    def values(self, run: slice) -> Tensor:
        """The current weights of a run's entries: [k′]."""
        parts = [e.take(e.parameter.detach()) for e in self.entries[run]]
        return torch.cat(parts).to(self.dtype)

    def gradients(self, run: slice) -> Tensor:
        """The gradients of a run's entries: [k′]."""
        parts = []
        for e in self.entries[run]:
            grad = e.parameter.grad
            if grad is None:
                continue
            parts.append(e.take_gradient(grad))
        return torch.cat(parts).to(self.dtype)


@dataclass(frozen=True, eq=False)
class _Update:
    """One run of entries about to move."""

    flat: _Flat
    run: slice
    gradient: Tensor


class MaskedAdamW(Optimizer):
    """AdamW on the selected entries of a model, and on a few dense tensors; nothing else moves.

    With g the gradient of the k trained entries alone,

        θ ← θ − η λ θ
        m ← β₁ m + (1 − β₁) g        v ← β₂ v + (1 − β₂) g²
        θ ← θ − η · m/(1 − β₁ᵗ) / (√(v/(1 − β₂ᵗ)) + ε)

    exactly as `torch.optim.AdamW` computes it. The state is one pair m, v: [k] for the mask and one
    for the dense tensors, in float32 (float64 for float64 weights). Weights in half precision get
    float32 master values of the same length, so that small updates add up instead of being rounded
    away; a weight that was changed from outside is taken over as it is.

    The first parameter group holds the mask's tensors, the second, if any, the dense ones, so
    learning rate schedulers and `zero_grad` work as ever. The model is not changed; see
    `trainable_only` for what saves the gradients that nobody reads.

    Args:
        model: whose parameters are trained.
        mask: the entries to train.
        lr: learning rate η.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: λ, applied to the trained entries only.
        dense: names of the parameters trained fully, outside the mask (the head).
        dense_lr: learning rate of the dense tensors; `lr` by default.
        dense_weight_decay: weight decay of the dense tensors; `weight_decay` by default.
        clip_norm: largest norm of the gradient of everything trained. Frozen entries do not
            count: in the norm of the whole gradient a sparse update would all but vanish.

    Raises:
        ModelError: the mask is of another model.
        UsageError: a setting out of range, an unknown dense name, or a tensor that is dense and
            masked.

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

    def __init__(
        self,
        model: nn.Module,
        mask: SparseMask,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        dense: Iterable[str] = (),
        dense_lr: float | None = None,
        dense_weight_decay: float | None = None,
        clip_norm: float | None = None,
    ) -> None:
        masked, whole = trained_entries(model, mask, dense)
        dense_lr = lr if dense_lr is None else dense_lr
        dense_weight_decay = weight_decay if dense_weight_decay is None else dense_weight_decay
        _check(
            {"lr": lr, "dense_lr": dense_lr, "eps": eps},
            {"weight_decay": weight_decay, "dense_weight_decay": dense_weight_decay},
            betas,
            clip_norm,
        )
        groups: list[dict[str, Any]] = [
            {"params": [e.parameter for e in masked], "mask": mask.digest}
        ]
        if whole:
            groups.append(
                {
                    "params": [e.parameter for e in whole],
                    "lr": dense_lr,
                    "weight_decay": dense_weight_decay,
                }
            )
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.clip_norm = clip_norm
        self._flats = (*_flats("masked", 0, masked), *_flats("dense", 1, whole))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the trained entries once, from the gradients that backward left.

        Args:
            closure: recomputes the loss and its gradients first; its value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates = [
            _Update(flat, run, flat.gradients(run))
            for flat in self._flats
            for run in flat.runs(self._state_of(flat)["step"])
        ]
        if self.clip_norm is not None:
            _clip([u.gradient for u in updates], self.clip_norm)
        for update in updates:
            self._apply(update)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of an optimizer with the same mask.

        Raises:
            UsageError: the state belongs to another mask.
        """
        ours, theirs = self.param_groups[0]["mask"], state_dict["param_groups"][0].get("mask")
        if ours != theirs:
            raise UsageError(
                f"This optimizer state belongs to another mask ({_short(theirs)}); the optimizer "
                f"trains {_short(ours)}. Load the state of the same mask."
            )
        super().load_state_dict(state_dict)
        for flat in self._flats:
            if saved := self._states.get(flat.key):
                # torch keeps it as it came: shared with the saver, and on the saver's device
                device = flat.entries[0].parameter.device
                self._states[flat.key] = {
                    name: list(value) if isinstance(value, list) else value.to(device, copy=True)
                    for name, value in saved.items()
                }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only the constructor adds groups: a mask fixes what is trained.

        Raises:
            UsageError: the optimizer is already built.
        """
        if hasattr(self, "_flats"):
            raise UsageError(
                "A MaskedAdamW takes no further parameters; name them in `dense` when it is made."
            )
        super().add_param_group(param_group)

    @property
    def _states(self) -> dict[str, dict[str, Any]]:
        """torch's `state`, which is kept by flat vector here, not by tensor."""
        return cast("dict[str, dict[str, Any]]", self.state)

    def _state_of(self, flat: _Flat) -> dict[str, Any]:
        """m, v, the step count of each tensor, and master values where weights are half."""
        if flat.key not in self._states:
            k, device = flat.offsets[-1], flat.entries[0].parameter.device
            state: dict[str, Any] = {
                "step": [0] * len(flat.entries),
                "exp_avg": torch.zeros(k, dtype=flat.dtype, device=device),
                "exp_avg_sq": torch.zeros(k, dtype=flat.dtype, device=device),
            }
            if flat.is_half:
                state["master"] = flat.values(slice(0, len(flat.entries)))
            self._states[flat.key] = state
        return self._states[flat.key]

    def _apply(self, update: _Update) -> None:
        flat, run, part = update.flat, update.run, update.flat.part(update.run)
        state, group = self._state_of(flat), self.param_groups[flat.group]
        m, v = state["exp_avg"][part], state["exp_avg_sq"][part]
        step = state["step"][run.start] + 1
        values = _current(flat, run, state)
        _adamw(values, update.gradient, m, v, step, group)
        state["step"][run] = [step] * (run.stop - run.start)
        if flat.is_half:
            state["master"][part] = values
        entries = flat.entries[run]
        for e, new in zip(entries, torch.split(values, [e.count for e in entries]), strict=True):
            e.put(e.parameter.detach(), new)


def _flats(role: str, group: int, entries: tuple[Entries, ...]) -> list[_Flat]:
    """One `_Flat` for each dtype and device, which is nearly always one."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Entries]] = {}
    for e in entries:
        kinds.setdefault((e.parameter.dtype, e.parameter.device), []).append(e)
    return [
        _Flat(f"{role}.{i}" if i else role, group, tuple(kind))
        for i, kind in enumerate(kinds.values())
    ]


def _current(flat: _Flat, run: slice, state: dict[str, Any]) -> Tensor:
    """The weights to update, in the dtype of the state: [k′].

    A master value stands for its weight as long as it rounds to it; otherwise someone has written
    the weight (a restored snapshot, a loaded checkpoint), and the weight counts.
    """
    values = flat.values(run)
    if not flat.is_half:
        return values
    master = state["master"][flat.part(run)]
    rounded = master.to(flat.entries[0].parameter.dtype).to(flat.dtype)
    return torch.where(rounded == values, master, values)


def _adamw(
    values: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, group: dict[str, Any]
) -> None:
    """One AdamW step in place, the operations in torch's order so that the bits agree: all [k]."""
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    values.mul_(1 - lr * group["weight_decay"])
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (v.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
    values.addcdiv_(m, denominator, value=-lr / (1 - beta1**step))


def _clip(gradients: list[Tensor], clip_norm: float) -> None:
    """Scale the gradients in place so that their joint norm is at most `clip_norm`."""
    if not gradients:
        return
    device = gradients[0].device
    norms = [torch.linalg.vector_norm(g).to(device) for g in gradients]
    factor = (clip_norm / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient))


def _check(
    at_least_zero: dict[str, float],
    decays: dict[str, float],
    betas: tuple[float, float],
    clip_norm: float | None,
) -> None:
    problems = [
        f"{name} is {value}; it must be at least 0."
        for name, value in {**at_least_zero, **decays}.items()
        if not value >= 0
    ]
    problems += [
        f"betas are {betas}; each must be at least 0 and below 1."
        for _ in range(not all(0 <= beta < 1 for beta in betas))
    ]
    if clip_norm is not None and not clip_norm > 0:
        problems.append(f"clip_norm is {clip_norm}; it must be above 0, or None for no clipping.")
    if problems:
        raise UsageError(problems)


def _short(digest: str | None) -> str:
    return f"mask {digest[:12]}" if digest else "no mask"
