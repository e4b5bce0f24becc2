"""What a model says of itself: its task, its classes, and what it can be fed with."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ird_search.borrow import unwrapped
from ird_search.data.sources import Source
from ird_search.data.targets import Decoder, shifted_right
from ird_search.errors import ModelError
from ird_search.task import IGNORED

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
