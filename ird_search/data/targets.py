"""The targets of an encoder-decoder model: texts of their own, and what the decoder reads of them.

    source x₁ … x_S      what the encoder reads
    target y₁ … y_T      the labels
    start y₁ … y_{T−1}   `decoder_input_ids`

The shift is made here, once for each sample: no model is ever given labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ird_search.data.labels import label_problem, own_labels
from ird_search.data.row_problems import RowProblems, too_long
from ird_search.data.sources import Source
from ird_search.data.values import is_tokens, range_problem
from ird_search.task import IGNORED

DECODER_INPUT = "decoder_input_ids"


@dataclass(frozen=True)
class Decoder:
    """What is to be known of a decoder before it is run.

    Args:
        shifted: what it reads of one sample's labels, [T] → [T]; `None` where the model does not
            say, so that the rows have to.
        max_positions: the longest target that it takes.
        vocab_size: number of token ids that it tells apart.
    """

    shifted: Callable[[Tensor], Tensor] | None = None
    max_positions: int | None = None
    vocab_size: int | None = None


def shifted_right(labels: Tensor, start: int, pad: int) -> Tensor:
    """`start`, then all labels but the last; one without likelihood is read as padding: [T] → [T].

    Example:
        >>> shifted_right(torch.tensor([7, 8, -100, 9]), start=2, pad=0)
        tensor([2, 7, 8, 0])
    """
    read = labels.masked_fill(labels == IGNORED, pad).roll(1)
    read[0] = start
    return read


def target_labels(
    source: Source,
    tokens: Sequence[Sequence[int]] | None,
    decoder: Decoder,
    max_length: int | None,
    problems: RowProblems,
) -> tuple[Tensor, ...]:
    """The labels of each row, [T]; empty where they cannot be used, which is told.

    Args:
        tokens: of the target texts; `None` where rows bring labels.
        max_length: cut labels that rows bring to so many.
    """
    empty = torch.zeros(0, dtype=torch.int64)
    if tokens is not None:
        found = [torch.tensor(list(row), dtype=torch.int64) for row in tokens]
    elif source.label_column is not None:
        values = source.column(source.label_column)
        found = [own_labels(value, i, max_length, problems) for i, value in enumerate(values)]
    else:
        problems.whole.append(
            f"{source.origin} holds no targets; beside what an encoder-decoder model reads, the "
            "tokens that it is to write are needed as 'labels'."
        )
        return (empty,) * len(source)
    for i, labels in enumerate(found):
        if problem := _target_problem(labels, decoder):
            problems.add(i, problem)
            found[i] = empty
    return tuple(found)


def _target_problem(labels: Tensor, decoder: Decoder) -> str:
    if not labels.numel():
        return "the target has no token"
    if problem := label_problem(labels, decoder.vocab_size):
        return problem
    if bool((labels == IGNORED).all()):
        return f"no token is left to predict (every label is {IGNORED})"
    most = decoder.max_positions
    if most is not None and len(labels) > most:
        return f"the target has {too_long(len(labels), most, 'decoder')}"
    return ""


def with_decoder_input(
    inputs: Sequence[dict[str, Tensor]],
    labels: Sequence[Tensor],
    decoder: Decoder,
    problems: RowProblems,
) -> list[dict[str, Tensor]]:
    """The inputs, with what the decoder reads of the labels where rows do not bring it."""
    if DECODER_INPUT in inputs[0]:
        for i, (row, y) in enumerate(zip(inputs, labels, strict=True)):
            if problem := _read_problem(row, y, decoder):
                problems.add(i, problem)
        return list(inputs)
    if decoder.shifted is None:
        problems.whole.append(
            f"{problems.origin} holds no {DECODER_INPUT!r}, and the model does not say how they "
            "are made of labels: set its config.decoder_start_token_id and config.pad_token_id, or "
            f"give the rows {DECODER_INPUT!r}."
        )
        return list(inputs)
    return [
        {**row, DECODER_INPUT: decoder.shifted(y) if len(y) else y}
        for row, y in zip(inputs, labels, strict=True)
    ]


def _read_problem(row: Mapping[str, Tensor], labels: Tensor, decoder: Decoder) -> str:
    read = row[DECODER_INPUT]
    if not is_tokens(read):
        return f"{DECODER_INPUT!r} is {read.dtype} {list(read.shape)}, not token ids"
    for name, t in row.items():
        if name.startswith("decoder_") and t.ndim == 1 and len(t) != len(labels):
            return f"{name!r} holds {len(t)} numbers for {len(labels)} labels"
    problem = range_problem(read, decoder.vocab_size) if len(read) else ""
    return f"{DECODER_INPUT!r} {problem}" if problem else ""
