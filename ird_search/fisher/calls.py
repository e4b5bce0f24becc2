"""Calls: what modules are given and answer in a forward pass of a few rows.

Hooks record the calls and may change the answers; afterwards they are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ird_search.fisher.rules import Call, Place
from ird_search.samples import Batch
from ird_search.task import Inputs, logits_of

PROBE = 2
"""Rows of the forward pass that learns the shapes: enough to tell a batch axis from a broadcast."""

SECOND_PROBE = 3
"""Rows of another one: an axis that does not follow is no batch axis."""

Output = tuple[torch.Size, torch.dtype, torch.device]

Form = Mapping[Place, torch.Size | None]
"""The shapes of what a module is given; None for what is no tensor."""


@dataclass
class Calls:
    """What modules were called with and what they returned, by call ("module#0"), in order.

    Outputs are by call and place ("module#0/0").
    """

    of_module: dict[str, list[str]] = field(default_factory=dict)
    given: dict[str, Call] = field(default_factory=dict)
    outputs: dict[str, dict[str, Output]] = field(default_factory=dict)
    opaque: set[str] = field(default_factory=set)
    unseen: set[str] = field(default_factory=set)
    """Calls whose outputs the logits do not depend on."""

    def seen(self, module: str) -> list[str]:
        """The calls that the logits depend on; all of them where they depend on none."""
        every = self.of_module.get(module, [])
        return [call for call in every if call not in self.unseen] or every


def form_of(call: Call) -> Form:
    """The shapes of what a module is given."""
    return {p: v.shape if isinstance(v, Tensor) else None for p, v in call.given.items()}


@contextmanager
def tapped(
    modules: Mapping[str, nn.Module], tap: Callable[[str, Tensor], Tensor]
) -> Iterator[Calls]:
    """Hooks that change the modules' outputs by `tap` and record the calls; gone on leaving."""
    calls = Calls()

    def record(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        outs = list(output) if type(output) is tuple else [output]
        if not all(x is None or isinstance(x, Tensor) for x in outs):
            calls.opaque.add(name)
            return output
        before = calls.of_module.setdefault(name, [])
        before.append(call := f"{name}#{len(before)}")
        calls.given[call] = Call(dict([*enumerate(args), *kwargs.items()]))
        calls.outputs[call] = {}
        for i, out in enumerate(outs):
            if out is not None and out.is_floating_point():
                key = f"{call}/{i}"
                calls.outputs[call][key] = (out.shape, out.dtype, out.device)
                outs[i] = tap(key, out)
        return tuple(outs) if type(output) is tuple else outs[0]

    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_hook(
                lambda _m, args, kwargs, output, name=name: record(name, args, kwargs, output),
                with_kwargs=True,
            )
            stack.callback(handle.remove)
        yield calls


@contextmanager
def constant(model: nn.Module) -> Iterator[None]:
    """Gradients are on, and no weight takes one."""
    learning = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in learning:
            p.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for p in learning:
            p.requires_grad_(True)


def probe(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batch: Batch,
    *,
    rows: int = PROBE,
    backward: bool = False,
) -> Calls:
    """A forward pass of a few rows that learns the shapes of the modules' outputs.

    Args:
        backward: learn also which calls the logits do not depend on.
    """
    chosen = _telling(batch, rows)
    inputs: Inputs = {key: value[chosen] for key, value in batch.inputs.items()}
    zeros: dict[str, Tensor] = {}

    def tap(key: str, out: Tensor) -> Tensor:
        if backward:
            zeros[key] = torch.zeros((), dtype=out.dtype, device=out.device, requires_grad=True)
        return out + zeros[key] if backward else out

    with constant(model), tapped(modules, tap) as calls:
        logits = logits_of(model, inputs)
        if zeros and logits.requires_grad:
            found = torch.autograd.grad(logits.sum(), list(zeros.values()), allow_unused=True)
            seen = {key for key, g in zip(zeros, found, strict=True) if g is not None}
            calls.unseen = {call for call, keys in calls.outputs.items() if not seen & keys.keys()}
    return calls


def per_sample(x: Tensor, size: int) -> Tensor:
    """Batch first: a broadcast [1, …] is expanded, a flattened [B·T, …] taken apart."""
    if x.shape[0] == size:
        return x
    if x.shape[0] == 1:
        return x.expand(size, *x.shape[1:])
    return x.unflatten(0, (size, -1))


def _telling(batch: Batch, rows: int) -> Tensor:
    """Positions of rows that are padded if the batch is: the shortest and the longest in turn."""
    mask = batch.inputs.get("attention_mask")
    device = batch.labels.device
    if mask is None or mask.ndim != 2:
        return torch.arange(rows, device=device) % len(batch)
    lengths = mask.sum(1)
    ends = torch.stack([lengths.argmin(), lengths.argmax()])
    return ends[torch.arange(rows, device=device) % 2]
