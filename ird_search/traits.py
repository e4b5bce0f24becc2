"""What a model says of itself: its task, its classes, and what it can be fed with."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ird_search.borrow import borrowed, buffers_kept, unwrapped
from ird_search.data.sources import Source
from ird_search.data.targets import Decoder, shifted_right
from ird_search.errors import ModelError
from ird_search.task import IGNORED, Inputs, logits_of

OTHER_PURPOSES_TOLD = {
    "TokenClassification": "labels of single tokens",
    "MaskedLM": "masked tokens",
    "QuestionAnswering": "spans of answers",
    "MultipleChoice": "multiple choice",
    "PreTraining": "pretraining",
    "ObjectDetection": "boxes in images",
    "Segmentation": "labels of single pixels",
    "CTC": "speech without alignment",
}
OTHER_PURPOSES = re.compile(rf"For(?:\w*?)({'|'.join(OTHER_PURPOSES_TOLD)})$")
ACCEPTED = (
    "models for classification of sequences or images, regression, causal language models and "
    "encoder-decoders"
)


def infer_task(model: nn.Module | str | Path, source: Source) -> str:
    """The task that a model's class says, else the one that the data suggest.

    Raises:
        ModelError: a multi-label classifier, which has no single label to take the likelihood of,
            or a model for another purpose (tagging, masked tokens, answers, boxes).
    """
    if not isinstance(model, nn.Module):
        return source.kind
    base = unwrapped(model)
    config, name = getattr(base, "config", None), type(base).__name__
    problem = getattr(config, "problem_type", None)
    if problem == "multi_label_classification":
        raise ModelError("A multi-label classifier came; one label a sample is accepted.")
    if config is not None and (other := OTHER_PURPOSES.search(name)):
        raise ModelError(
            f"{name} came, a model for {OTHER_PURPOSES_TOLD[other[1]]}; {ACCEPTED} are accepted."
        )
    if name.endswith("ForImageClassification"):
        return "image-classification"
    if name.endswith("ForSequenceClassification"):
        one = getattr(config, "num_labels", 2) == 1
        return "regression" if one or problem == "regression" else "classification"
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal-lm"
    return "seq2seq" if is_seq2seq(base) else source.kind


def is_seq2seq(base: Any) -> bool:
    """Whether a module is an encoder-decoder with a head over the vocabulary."""
    reads = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    return bool(reads) and hasattr(base, "can_generate") and bool(base.can_generate())


def num_labels_of(model: nn.Module) -> int | None:
    """Classes that a transformers model tells apart, by its config; `None` for another module."""
    found = getattr(getattr(unwrapped(model), "config", None), "num_labels", None)
    return None if found is None else int(found)


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


def label_names_of(model: nn.Module) -> tuple[str, ...] | None:
    """Class names of the model's config in the order of their ids; `None` for LABEL_0, LABEL_1, …

    Text labels must follow them: a trained head has its own order of classes.
    """
    names = getattr(getattr(unwrapped(model), "config", None), "id2label", None) or {}
    ordered = tuple(str(names[i]) for i in sorted(names))
    return None if all(name.startswith("LABEL_") for name in ordered) else ordered


def _input_table(base: Any) -> Any:
    """The table of token embeddings; None for models of images or sound, some of which raise."""
    try:
        return base.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def limits_of(model: nn.Module) -> tuple[int | None, int | None]:
    """(longest sample in tokens, number of token ids); `None` where unknown or unlimited."""
    base = unwrapped(model)
    config = getattr(base, "config", None)
    if config is None:
        return None, None
    table = _input_table(base)
    vocabulary = getattr(table, "num_embeddings", None) or getattr(config, "vocab_size", None)
    positions = getattr(config, "max_encoder_position_embeddings", None)
    positions = positions or getattr(config, "max_position_embeddings", None)
    for name, module in base.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa counts positions from padding_idx + 1, so its table is that much longer
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            positions = module.num_embeddings - skipped
    relative = getattr(config, "relative_attention", False)
    if relative and not getattr(config, "position_biased_input", True):
        positions = None
    return (positions if positions and positions > 0 else None), vocabulary


def decoder_of(model: nn.Module) -> Decoder:
    """What an encoder-decoder's decoder takes; as much of it as the model says.

    What it reads of labels is made by the model's own method, as for its own loss (MBart moves
    the last token to the front), or by `config.decoder_start_token_id` where it has none.
    """
    base: Any = unwrapped(model)
    config = getattr(base, "config", None)
    limits = (
        getattr(config, "max_target_positions", None),
        getattr(config, "max_decoder_position_embeddings", None),
        getattr(getattr(config, "decoder", None), "max_position_embeddings", None),
        limits_of(model)[0],
    )
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    weight = getattr(head, "weight", None)
    return Decoder(
        shifted=_shifted_of(base),
        max_positions=next((n for n in limits if n is not None), None),
        vocab_size=None if weight is None else len(weight),
    )


def _shifted_of(base: Any) -> Callable[[Tensor], Tensor] | None:
    if hasattr(base, "prepare_decoder_input_ids_from_labels"):

        def shifted(labels: Tensor) -> Tensor:
            found: Tensor = base.prepare_decoder_input_ids_from_labels(labels=labels[None])[0]
            return found

    else:
        config = getattr(base, "config", None)
        start, pad = (getattr(config, f"{n}_token_id", None) for n in ("decoder_start", "pad"))
        if start is None or pad is None:
            return None
        shifted = partial(shifted_right, start=start, pad=pad)
    try:
        shifted(torch.tensor([0, 1, IGNORED]))
    except (ValueError, TypeError, RuntimeError):  # a token that its config lacks
        return None
    return shifted


def segments_of(model: nn.Module) -> int | None:
    """Number of `token_type_ids` that the model knows; `None` where that cannot be told."""
    tables = (m for name, m in model.named_modules() if name.endswith("token_type_embeddings"))
    return getattr(next(tables, None), "num_embeddings", None)
