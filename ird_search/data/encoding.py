"""`encode`: from a `Source` to a `SampleSet`.

Rows are tokenised and labels mapped, and everything that is wrong with the rows is found before any
model runs and told at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ird_search.data.labels import class_labels, number_labels, token_labels
from ird_search.data.row_problems import RowProblems, too_long
from ird_search.data.sources import Source
from ird_search.data.targets import DECODER_INPUT, Decoder, target_labels, with_decoder_input
from ird_search.data.values import as_tensor, attended, is_tokens, range_problem, told
from ird_search.errors import UsageError, nearest
from ird_search.samples import SampleSet
from ird_search.task import POSITIONAL

LONG = 100_000
"""Characters of a text that are tokenised first, to tell one that is far too long at once."""


def encode(
    source: Source,
    *,
    task: str = "auto",
    processor: Any = None,
    training: bool = True,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    max_length: int | None = None,
    max_positions: int | None = None,
    vocab_size: int | None = None,
    segments: int | None = None,
    pad_id: int | None = None,
    decoder: Decoder | None = None,
) -> SampleSet:
    """Tokenise a source, map its labels, and check every row.

    Args:
        task: classification, regression, causal-lm, seq2seq or image-classification; `auto` takes
            what the source suggests.
        processor: the tokenizer or image processor; not needed for rows that are inputs already.
        training: rows to learn from, which need two classes. Rows to evaluate on have their label
            text mapped by `label_names`, which they need then.
        num_labels: number of classes of the model, where known.
        label_names: class names in the order of their ids; those of the source by default.
        max_length: cut samples to so many tokens.
        max_positions: the longest sample the model takes.
        vocab_size: number of token ids of the model.
        segments: number of its `token_type_ids`.
        pad_id: token id that fills a batch; the tokenizer's own by default, then its end of text.
        decoder: what the decoder of an encoder-decoder model takes, where that is known.

    A language model learns all tokens of its text; of two columns, the first is a prompt that
    carries no likelihood. An encoder-decoder model reads the first and learns the second.

    Raises:
        DataError: rows that cannot be used; up to ten are listed with their numbers.
        UsageError: a processor is missing, or a setting is out of range.

    Example:
        >>> from ird_search.data.sources import read_source
        >>> encode(read_source([(torch.zeros(3), 1), (torch.ones(3), 0)]))
        SampleSet(2 samples, 2 classes, inputs: input, 1 token)
    """
    kind = source.kind if task == "auto" else task
    _check_settings(kind, max_length, max_positions)
    problems = RowProblems(source.origin, source.ids)
    most = None if max_length is not None else max_positions
    rows, starts = _model_inputs(source, kind, processor, max_length, most, problems)
    inputs = [_tensors(row, i, max_length, problems) for i, row in enumerate(rows)]
    labels: tuple[Tensor, ...] | Tensor
    names = None
    if kind == "seq2seq":
        decoder = decoder or Decoder()
        tokens = _target_tokens(source, processor, max_length, decoder, problems)
        labels = target_labels(source, tokens, decoder, max_length, problems)
        inputs = with_decoder_input(inputs, labels, decoder, problems)
    elif kind == "causal-lm":
        labels = token_labels(source, inputs, starts, vocab_size, problems)
    elif kind == "regression":
        labels = number_labels(source, problems)
    else:
        names = tuple(label_names) if label_names else None
        labels = class_labels(source, names, num_labels, training, problems)
        names = names or source.label_names
    _check_shapes(inputs, problems)
    _check_tokens(inputs, max_positions, vocab_size, problems)
    _check_beside(inputs, {"token_type_ids": segments, "position_ids": max_positions}, problems)
    problems.raise_any()
    if "input_ids" in inputs[0] and (processor is not None or pad_id is not None):
        inputs = [{**row, "attention_mask": attended(row)} for row in inputs]
    return SampleSet(
        inputs=tuple(inputs),
        labels=labels,
        ids=torch.tensor(source.ids, dtype=torch.int64),
        pad=_padding(inputs[0], processor, pad_id),
        label_names=names,
    )


def _check_settings(kind: str, max_length: int | None, max_positions: int | None) -> None:
    known = ("classification", "regression", "causal-lm", "seq2seq", "image-classification")
    problems = []
    if kind not in known:
        problems.append(
            f"Unknown task {kind!r}; known are {', '.join(known)}.{nearest(kind, known)}"
        )
    if max_length is not None and max_length < 1:
        problems.append(f"max_length is {max_length}; it must be at least 1.")
    if max_length is not None and max_positions is not None and max_length > max_positions:
        problems.append(
            f"max_length is {max_length}, but the model takes {max_positions} tokens at most."
        )
    if problems:
        raise UsageError(problems)


def _model_inputs(
    source: Source,
    kind: str,
    processor: Any,
    max_length: int | None,
    most: int | None,
    problems: RowProblems,
) -> tuple[list[dict[str, Any]], list[int]]:
    """Each row's inputs, and the first position that a language model is to predict.

    Args:
        most: tokens that a text may have, where it is not cut.
    """
    if source.tokenised:
        columns = {name: source.column(name) for name in source.input_columns}
        return _rows(columns), [0] * len(source)
    if processor is None:
        what = "images, so an image processor" if source.image_column else "text, so a tokenizer"
        raise UsageError(f"{source.origin} holds {what} is needed: pass `processor`.")
    if source.image_column:
        return _read_images(source.column(source.image_column), processor, problems), [0] * len(
            source
        )
    read = source.text_columns[:1] if kind == "seq2seq" else source.text_columns
    texts = [_texts(source, name, problems) for name in read]
    if most is not None:
        for column in texts:
            _drop_far_too_long(column, processor, most, problems)
    if not problems.rows and not any(text.strip() for column in texts for text in column):
        problems.whole.append(f"All texts of {source.origin} are empty.")
    if kind == "causal-lm" and len(texts) == 2:
        return _read_prompts(texts[0], texts[1], processor, max_length)
    return _rows(_tokenise(processor, texts, max_length)), [0] * len(source)


def _target_tokens(
    source: Source,
    processor: Any,
    max_length: int | None,
    decoder: Decoder,
    problems: RowProblems,
) -> list[list[int]] | None:
    """The tokens of each row's target text; `None` where rows bring labels."""
    if source.tokenised:
        return None
    if len(source.text_columns) != 2:
        problems.whole.append(
            f"{source.origin} holds no source and target. Name the two columns of text with "
            "text_columns (--text-column, twice)."
        )
        return [[]] * len(source)
    name = source.text_columns[1]
    texts = _texts(source, name, problems)
    for i, text in enumerate(texts):
        if not text.strip():
            problems.add(i, f"the target in {name!r} is empty")
    if max_length is None and decoder.max_positions is not None:
        _drop_far_too_long(texts, processor, decoder.max_positions, problems, "decoder")
    found: list[list[int]] = _tokenise(processor, [], max_length, text_target=texts)["input_ids"]
    return found


def _rows(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _texts(source: Source, name: str, problems: RowProblems) -> list[str]:
    values = source.column(name)
    for i, value in enumerate(values):
        if value is None:
            problems.add(i, f"the text in {name!r} is missing")
        elif not isinstance(value, str):
            problems.add(i, f"{name!r} is {told(value)} ({type(value).__name__}), not text")
        elif not _is_unicode(value):
            problems.add(i, f"{name!r} is {told(value)}, which has half of a surrogate pair")
    # a bad row goes on as an empty text, so that the other rows are checked to the end
    return [v if isinstance(v, str) and _is_unicode(v) else "" for v in values]


def _drop_far_too_long(
    texts: list[str], processor: Any, most: int, problems: RowProblems, reader: str = "model"
) -> None:
    """Tell texts whose beginning alone has twice the tokens; the rest of them takes seconds."""
    for i, text in enumerate(texts):
        if len(text) > LONG:
            (tokens,) = _tokenise(processor, [[text[:LONG]]], None)["input_ids"]
            if len(tokens) > 2 * most:
                problems.add(i, f"more than {too_long(len(tokens), most, reader)}")
                texts[i] = ""


def _is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON's escapes can make one that cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _tokenise(
    processor: Any, texts: Sequence[list[str]], max_length: int | None, **more: Any
) -> Any:
    # verbose: "sequence length is longer than …" is told by our own check, with row numbers
    return processor(
        *texts,
        truncation=max_length is not None,
        max_length=max_length,
        padding=False,
        return_attention_mask=True,
        verbose=False,
        **more,
    )


def _read_prompts(
    prompts: list[str], completions: list[str], processor: Any, max_length: int | None
) -> tuple[list[dict[str, Any]], list[int]]:
    """Prompt and completion tokenised as one text, cut where the characters say."""
    if not getattr(processor, "is_fast", False):
        raise UsageError("A prompt and a completion need a fast tokenizer (one with offsets).")
    whole = [p + c for p, c in zip(prompts, completions, strict=True)]
    columns = dict(_tokenise(processor, [whole], max_length, return_offsets_mapping=True))
    offsets = columns.pop("offset_mapping")
    starts = [
        next((t for t, (_, end) in enumerate(spans) if end > len(prompt)), len(spans))
        for spans, prompt in zip(offsets, prompts, strict=True)
    ]
    return _rows(columns), starts


def _read_images(
    images: Sequence[Any], processor: Any, problems: RowProblems
) -> list[dict[str, Any]]:
    rows = []
    for i, image in enumerate(images):
        pixels = None
        if image is None:
            problems.add(i, "the image is missing")
        else:
            try:
                colour = image.convert("RGB") if hasattr(image, "convert") else image
                pixels = processor(images=colour, return_tensors="pt")["pixel_values"][0]
            except (ValueError, TypeError, OSError, RuntimeError) as error:
                problems.add(i, f"the image could not be read: {error}")
        rows.append({"pixel_values": torch.zeros(0) if pixels is None else pixels})
    return rows


def _tensors(
    row: Mapping[str, Any], i: int, max_length: int | None, problems: RowProblems
) -> dict[str, Tensor]:
    found = {}
    for name, value in row.items():
        try:
            found[name] = as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            problems.add(i, f"{name!r} cannot be used: {error}")
            found[name] = torch.zeros(0)
    tokens = found.get("input_ids", found.get(POSITIONAL))
    if max_length is not None:
        length = len(tokens) if tokens is not None and is_tokens(tokens) else None
        for name, t in found.items():
            if t.ndim == 1 and (len(t) == length or name.startswith("decoder_")):
                found[name] = t[:max_length]
    return found


def _padding(
    row: Mapping[str, Tensor], processor: Any, pad_id: int | None
) -> dict[str, int | float]:
    own = (getattr(processor, "pad_token_id", None), getattr(processor, "eos_token_id", None))
    token = next((value for value in (pad_id, *own) if value is not None), 0)
    found = {"input_ids": token, "token_type_ids": getattr(processor, "pad_token_type_id", 0)}
    return found | ({DECODER_INPUT: token} if DECODER_INPUT in row else {})


# --- checks of tensors --------------------------------------------------------------------------


def _check_shapes(inputs: Sequence[Mapping[str, Tensor]], problems: RowProblems) -> None:
    """Finite numbers, and one shape for everything that is not padded."""
    for name in inputs[0]:
        column = [row[name] for row in inputs]
        usual, _ = Counter(tuple(t.shape) for t in column).most_common(1)[0]
        features = name == POSITIONAL and column[0].is_floating_point()  # never padded
        for i, t in enumerate(column):
            if tuple(t.shape) != usual and not (t.ndim == len(usual) == 1 and not features):
                problems.add(
                    i, f"{name!r} has shape {list(t.shape)}, but most rows have {list(usual)}"
                )
            if t.is_floating_point() and not bool(torch.isfinite(t).all()):
                bad = int((~torch.isfinite(t)).sum())
                problems.add(i, f"{name!r} holds {bad} of {t.numel()} numbers that are not finite")


def _check_tokens(
    inputs: Sequence[Mapping[str, Tensor]],
    max_positions: int | None,
    vocab_size: int | None,
    problems: RowProblems,
) -> None:
    for i, row in enumerate(inputs):
        tokens = row.get("input_ids")
        if tokens is None:
            continue
        if not tokens.numel():
            problems.add(i, "no token came (an empty text, and a tokenizer that adds none?)")
            continue
        if not is_tokens(tokens):
            problems.add(i, f"'input_ids' is {tokens.dtype} {list(tokens.shape)}, not token ids")
            continue
        if max_positions is not None and len(tokens) > max_positions:
            problems.add(i, too_long(len(tokens), max_positions))
        low, high = (int(v) for v in torch.aminmax(tokens))
        if low < 0 or (vocab_size is not None and high >= vocab_size):
            known = f"0 to {vocab_size - 1}" if vocab_size is not None else "0 and above"
            problems.add(
                i,
                f"token id {low if low < 0 else high} is out of range, the model knows {known}; "
                "does the tokenizer belong to this model?",
            )


def _check_beside(
    inputs: Sequence[Mapping[str, Tensor]], limits: Mapping[str, int | None], problems: RowProblems
) -> None:
    """What comes beside the tokens: one number for each of them, and one that the model knows."""
    for i, row in enumerate(inputs):
        tokens = row.get("input_ids")
        if tokens is None or not is_tokens(tokens):
            continue
        for name in ("attention_mask", *limits):
            t = row.get(name)
            if t is None or t.ndim != 1 or not t.numel():
                continue  # a mask may be a square; one that is not there is told already
            if len(t) != len(tokens):
                problems.add(i, f"{name!r} holds {len(t)} numbers for {len(tokens)} tokens")
            elif name == "attention_mask":
                if not bool(((t == 0) | (t == 1)).all() and t.any()):
                    problems.add(i, "'attention_mask' must hold 0 and 1, and at least one 1")
            elif problem := range_problem(t, limits[name]):
                problems.add(i, f"{name!r} {problem}")
