"""Whether model and data go together: one sample through the model, before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ird_search.borrow import borrowed, buffers_kept, unwrapped
from ird_search.data.sources import Source
from ird_search.errors import DataError, IRDError, ModelError, first_line, out_of_memory
from ird_search.samples import SampleSet
from ird_search.task import CausalLM, Classification, Inputs, Task, logits_of

REFUSALS = (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError)
"""What a model raises of a sample that it cannot take."""


def check_fit(
    model: nn.Module, task: Task, samples: SampleSet, source: Source, device: torch.device
) -> Look:
    """One sample through the model, so that what does not fit is told before any work.

    Raises:
        DataError: the model raises, or knows fewer classes than the labels.
        ModelError: it gives probabilities for logits, or is no causal model and to be one.
    """
    batch = samples.batch([0], device)
    row = f"{source.origin}, row {int(samples.ids[0])} (counting from 0)"
    try:
        seen = look(model, batch.inputs)
        task.log_likelihood(seen.logits, batch.labels)
        normed = isinstance(task, Classification) and gives_probabilities(
            model, samples, seen.logits
        )
        ahead = isinstance(task, CausalLM) and looks_ahead(model, batch.inputs)
    except REFUSALS as error:
        if isinstance(error, IRDError) or out_of_memory(error):
            raise
        raise DataError(f"{row}: the model cannot take this sample: {first_line(error)}") from error
    if isinstance(task, Classification) and seen.logits.shape[-1] < task.num_labels:
        raise DataError(
            f"The labels of {source.origin} are {task.num_labels} classes, and the model has "
            f"{seen.logits.shape[-1]} logits."
        )
    if normed:
        raise ModelError(
            "The model gives probabilities (none is negative, they sum to 1); logits are accepted, "
            "of which log softmax is taken. Leave out its softmax."
        )
    if ahead:
        raise ModelError(
            f"{type(unwrapped(model)).__name__} is no causal language model: its answer at a "
            "position depends on later tokens, so it would see what it is to predict. Pass a "
            "causal model; or, to learn classes, name the column with label_column "
            "(--label-column)."
        )
    return seen


def gives_probabilities(model: nn.Module, samples: SampleSet, logits: Tensor) -> bool:
    """Whether none is negative and they sum to 1: their softmax is another distribution.

    Args:
        logits: of the first sample; where they look like it, some more samples must, too.
    """

    def like(found: Tensor) -> bool:
        total, near = found.double().sum(-1), max(1e-6, torch.finfo(found.dtype).eps)
        return bool((found >= 0).all()) and torch.allclose(total, torch.ones_like(total), atol=near)

    others = (samples.batch([i], logits.device).inputs for i in range(1, min(4, len(samples))))
    return like(logits) and all(like(look(model, inputs).logits) for inputs in others)


@dataclass(frozen=True, eq=False)
class Look:
    """What a model does with a few samples.

    Args:
        logits: its answer.
        last: the layer that gave it, as far as can be seen; `None` where that cannot.
    """

    logits: Tensor
    last: str | None


def look(model: nn.Module, inputs: Inputs) -> Look:
    """Run a model once, in evaluation mode and without gradients; it is handed back as it was."""
    widths: dict[str, int] = {}

    def noted(name: str, output: Any) -> None:
        widths.pop(name, None)  # the last call counts
        widths[name] = output.shape[-1] if isinstance(output, Tensor) and output.ndim else 0

    own = {n: m for n, m in model.named_modules() if any(True for _ in m.parameters(False))}
    hooks = [
        m.register_forward_hook(lambda m, x, y, n=n: noted(n, y))
        for n, m in own.items()
        if not isinstance(m, torch.jit.ScriptModule)  # which take no hooks
    ]
    try:
        with borrowed(model), buffers_kept(model), torch.no_grad():
            logits = logits_of(model.eval(), inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return Look(logits, _last_layer(list(own), widths, logits))


def _last_layer(owners: list[str], widths: Mapping[str, int], logits: Tensor) -> str | None:
    """Of the layers that were called, the last one whose answer is as wide as the logits.

    One that holds others ends after them, and is none itself. Where the layer that was made last is
    called by no one, its weight is read by a function, and nothing is known.
    """
    if not widths or owners[-1] not in widths:
        return None
    leaves = [n for n in widths if not any(c != n and _within(c, n) for c in widths)]
    wide = [n for n in leaves if logits.ndim and widths[n] == logits.shape[-1]]
    return (wide or leaves)[-1]


def _within(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")


def looks_ahead(model: nn.Module, inputs: Inputs) -> bool:
    """Whether the answer at a position depends on a later token, as no causal model's does.

    The last token of the first sample is changed; by more than rounding, nothing before it may.
    """
    tokens = inputs["input_ids"][:1]
    here = {name: t[:1] for name, t in inputs.items()}
    mask = here.get("attention_mask", torch.ones_like(tokens))
    ends = mask.nonzero()[:, 1] if mask.shape == tokens.shape else torch.arange(tokens.shape[1])
    last = int(ends.max())
    other = tokens.clone()
    other[0, last] = tokens[0, last] - 1 if int(tokens[0, last]) else 1
    before, after = (
        look(model, {**here, "input_ids": t}).logits[:, :last] for t in (tokens, other)
    )
    if not before.numel():
        return False
    coarse = max(torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point())
    allowed = max(coarse, torch.finfo(before.dtype).eps) ** 0.5 * float(before.abs().max())
    return float((before - after).abs().max()) > allowed
