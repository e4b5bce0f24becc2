"""What the columns of the user's rows are for: text, label, image, or model inputs already.

Told by their names first, then by what the first rows hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import datasets
import numpy as np
from torch import Tensor

from ird_search.errors import DataError, nearest
from ird_search.task import POSITIONAL

Kind = Literal["classification", "regression", "causal-lm", "seq2seq", "image-classification"]
Rows: TypeAlias = datasets.Dataset | Sequence[Mapping[str, Any]]

TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("text1", "text2"),
    ("text_a", "text_b"),
)
TEXT_SINGLES = ("sentence", "text", "review", "content", "comment", "tweet", "document")
COMPLETION = ("prompt", "completion")
SOURCES = (
    "source",
    "src",
    "input",
    "prompt",
    "article",
    "document",
    "dialogue",
    "question",
    "text",
    "sentence",
)
TARGETS = (
    "target",
    "tgt",
    "output",
    "completion",
    "summary",
    "highlights",
    "answer",
    "translation",
    "response",
    "transcription",
)
"""What is read and what is to be written; earlier names first."""

LABELS = ("label", "labels", "target", "class", "score", "y", "category", "sentiment")
IDS = ("idx", "id", "index", "guid", "uid", "__index_level_0__")
NOT_INPUTS = (*IDS, "special_tokens_mask", "offset_mapping", "length")
"""Columns that tokenising leaves behind and no model takes."""

CHATS = ("messages", "conversation", "conversations", "chat")
"""Columns with a list of turns, which a tokenizer's template makes a text of."""

IMAGES = ("image", "img", "picture", "photo")
ENCODED = ("input_ids", "pixel_values", "input_values", "input_features", POSITIONAL)
"""Columns whose presence says that the rows are model inputs already."""

SHOWN = 20
"""Columns that a message lists."""

HEAD_ROWS = 64
"""Rows looked at to tell what a column holds."""

MANY_CLASSES = 1000
"""So many classes may be read off the largest class id; more of them need as many rows."""

FEW = 0.1
"""Fewer labels than this with a fraction are slips among class ids, and no regression."""


def names_of(rows: Rows) -> tuple[str, ...]:
    """Names of all columns."""
    if isinstance(rows, datasets.Dataset):
        return tuple(rows.column_names)
    return tuple(rows[0]) if rows else ()


def values_of(rows: Rows, name: str) -> list[Any]:
    """One column, in the order of the rows."""
    if isinstance(rows, datasets.Dataset):
        return list(rows[name][:])
    return [row[name] for row in rows]


@dataclass(frozen=True)
class Columns:
    """What was made of the columns: one or two of text, or an image, or model inputs."""

    text: tuple[str, ...] = ()
    label: str | None = None
    image: str | None = None
    inputs: tuple[str, ...] = ()


def name_columns(
    rows: Rows,
    text: tuple[str, ...],
    label: str | None,
    origin: str,
    *,
    writes: bool | None = False,
) -> Columns:
    """Tell what the columns are for, beginning with those that were asked for.

    Args:
        writes: whether one text is to be written from the other; `None`: where no class and no
            number is there to predict.

    Raises:
        DataError: a column that is not there, or which one holds the text cannot be told.
    """
    columns = names_of(rows)
    asked = [*text, *([label] if label is not None else [])]
    if unknown := [name for name in asked if name not in columns]:
        raise DataError(
            f"{origin} has no column {name!r}; its columns are {listed(columns)}."
            f"{nearest(name, columns)}"
            for name in unknown
        )
    if len(text) > 2:
        raise DataError(f"One text column, or the two of a pair, are accepted, not {len(text)}.")
    first = _first_values(rows)
    # a column "input" may also hold the text itself
    encoded = not text and any(
        c in ENCODED and not (c == POSITIONAL and isinstance(first[c], str)) for c in columns
    )
    if not encoded and (writes or (writes is None and not _has_label(first, label, text))):
        return Columns(text=_source_and_target(first, text, label, origin))
    if label is None:
        # a tokenised language-model row may hold both a class `label` and token `labels`
        order = ("labels", *LABELS) if encoded else LABELS
        label = _by_name(columns, order, barred=text)
    if encoded:
        left = [c for c in columns if c not in (label, "label", "labels") and c not in NOT_INPUTS]
        return Columns(
            label=label, inputs=tuple(c for c in left if c in ENCODED or _is_numbers(first[c]))
        )
    rest = [c for c in columns if c != label and c.lower() not in IDS]
    if not text and (image := _image_column(rest, first)):
        return Columns(label=label, image=image)
    if not text and (inputs := _named_inputs(rest, first)):
        if label is None:
            raise DataError(
                f"{origin} has no label column that can be told; its columns are "
                f"{listed(columns)}. Name it with label_column (--label-column)."
            )
        return Columns(label=label, inputs=inputs)
    return Columns(text=text or _text_columns(rest, first, label, columns, origin), label=label)


def _named_inputs(rest: Sequence[str], first: Mapping[str, Any]) -> tuple[str, ...]:
    """What a model of one's own takes by name: tensors, with plain numbers beside them or not."""
    if any(isinstance(first[name], str) for name in rest):
        return ()  # there is a text to look for
    if not any(_is_numbers(first[name]) for name in rest):
        return ()
    return tuple(c for c in rest if _is_numbers(first[c]) or isinstance(first[c], (int, float)))


def _text_columns(
    rest: list[str],
    first: Mapping[str, Any],
    label: str | None,
    columns: Sequence[str],
    origin: str,
) -> tuple[str, ...]:
    """By name first, then the string columns if there are exactly one or two."""
    known = {_plain(name): name for name in rest}
    groups = (
        ((COMPLETION,) if label is None else ()) + TEXT_PAIRS + tuple((s,) for s in TEXT_SINGLES)
    )
    for group in groups:
        if all(name in known for name in group):
            return tuple(known[name] for name in group)
    strings = tuple(name for name in rest if isinstance(first[name], str))
    if 1 <= len(strings) <= 2:
        return strings
    if chats := [c for c in rest if _plain(c) in CHATS and isinstance(first[c], list)]:
        chat = chats[0]
        raise DataError(
            f"{origin} holds chats, in {chat!r}, and texts are accepted: apply the chat template, "
            f'as {{"text": tokenizer.apply_chat_template(row[{chat!r}], tokenize=False)}}.'
        )
    raise DataError(
        f"Which column of {origin} holds the text cannot be told; its columns are "
        f"{listed(columns)}. Name one, or the two of a pair, with text_columns "
        "(--text-column). A model of one's own takes (x, y) pairs, or columns of tensors that are "
        "named as the arguments of its forward."
    )


def _has_label(first: Mapping[str, Any], label: str | None, text: tuple[str, ...]) -> bool:
    """Whether texts have a class or a number beside them, and not a text named as an answer."""
    if label is not None:
        return True
    label = _by_name(tuple(first), LABELS, barred=text)
    return label is not None and not (
        _plain(label) in TARGETS and isinstance(first[label], (str, type(None)))
    )


def _source_and_target(
    first: Mapping[str, Any], text: tuple[str, ...], label: str | None, origin: str
) -> tuple[str, str]:
    """By name first, then the string columns, where as many are left as are missing."""
    if len(text) == 2:
        return text[0], text[1]
    rest = [name for name in first if name not in (*text, label) and _plain(name) not in IDS]
    source = text[0] if text else _by_name(rest, SOURCES)
    target = label or _by_name(rest, (*TARGETS, *LABELS))
    pair = [source, target]
    left = [name for name in rest if name not in pair and isinstance(first[name], str)]
    if pair.count(None) == len(left):
        pair = [left.pop(0) if name is None else name for name in pair]
    source, target = pair
    if source is None or target is None:
        raise DataError(
            f"Which columns of {origin} hold the source and the target cannot be told; its columns "
            f"are {listed(tuple(first))}. Name the two with text_columns (--text-column, twice)."
        )
    return source, target


def _image_column(rest: list[str], first: Mapping[str, Any]) -> str | None:
    for name in rest:
        array = name.lower() in IMAGES and isinstance(first[name], (np.ndarray, Tensor, list))
        if array or is_picture(first[name]):
            return name
    return None


def _plain(name: str) -> str:
    """A column's name as it is looked for: `text, Label` has spaces and capitals."""
    return name.strip().lower()


def listed(columns: Sequence[str]) -> str:
    """Names for a message; the first of them where there are many."""
    more = f" and {len(columns) - SHOWN:,} more" if len(columns) > SHOWN else ""
    return f"{', '.join(columns[:SHOWN])}{more}"


def _by_name(
    columns: Sequence[str], wanted: Sequence[str], barred: Sequence[str] = ()
) -> str | None:
    known = {_plain(name): name for name in columns if name not in barred}
    return next((known[name] for name in wanted if name in known), None)


def _first_values(rows: Rows) -> dict[str, Any]:
    """The first value of each column that is not null, among the first rows."""
    found: dict[str, Any] = dict.fromkeys(names_of(rows))
    for i in range(min(HEAD_ROWS, len(rows))):
        missing = [name for name, value in found.items() if value is None]
        if not missing:
            break
        row = rows[i]
        found.update({name: row[name] for name in missing})
    return found


def _is_numbers(value: Any) -> bool:
    """A tensor, an array, or a list of numbers (nested or not)."""
    while isinstance(value, (list, tuple)) and len(value):
        value = value[0]
        if isinstance(value, (int, float)):
            return True
    return isinstance(value, (Tensor, np.ndarray))


def is_picture(value: Any) -> bool:
    """A PIL image, known by its attributes since Pillow is optional."""
    return hasattr(value, "convert") and hasattr(value, "getbands")


def label_kind(
    rows: Rows, columns: Columns, origin: str, *, writes: bool | None = False
) -> tuple[tuple[str, ...] | None, Kind, int | None]:
    """(class names, kind, number of classes). Bad labels are passed over: `encode` lists them.

    Args:
        writes: as `name_columns` takes it.

    Raises:
        DataError: labels of several numbers, where no language model could learn them.
    """
    language: Kind = "causal-lm" if writes is False else "seq2seq"
    if columns.label is None or writes:
        return None, language, None
    whole: Kind = "image-classification" if columns.image else "classification"
    if "pixel_values" in columns.inputs:
        whole = "image-classification"
    features = rows.features if isinstance(rows, datasets.Dataset) else {}
    if isinstance(feature := features.get(columns.label), datasets.ClassLabel) and feature.names:
        return tuple(feature.names), whole, len(feature.names)
    values = [plain_label(value) for value in values_of(rows, columns.label)]
    several = next((i for i, value in enumerate(values) if isinstance(value, list)), None)
    if columns.inputs and several is not None:
        if any(c in ENCODED and c != POSITIONAL for c in columns.inputs):
            return None, language, None
        raise DataError(_many_told(origin, several, values[several]))
    strings = [value for value in values if isinstance(value, str) and value]
    numbers = [v for v in values if is_number(v)]
    if len(strings) > len(numbers):
        names = tuple(sorted(set(strings)))
        return names, whole, max(2, len(names))
    if sum(value != int(value) for value in numbers) > FEW * len(numbers):
        return None, "regression", None
    most = max(MANY_CLASSES, len(values))  # a stray 10⁹ must not make a head of as many classes
    return None, whole, max([2, *(int(v) + 1 for v in numbers if v < most)])


def _many_told(origin: str, row: int, label: list[Any]) -> str:
    try:
        shape = list(np.shape(label))
    except ValueError:  # ragged
        shape = [len(label)]
    count = math.prod(shape)
    return (
        f"{origin}, row {row} (counting from 0): the label is a list of {count} "
        f"number{'s' * (count != 1)} (shape {shape}); one class or one number a sample is "
        "accepted. A language model's rows have their tokens in 'input_ids' and 'labels'."
    )


def is_number(value: Any) -> bool:
    """Whether this is a number, and neither NaN nor infinite; any whole number is one."""
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def plain_label(value: Any) -> Any:
    """A label as a Python value: a tensor or array of one element as its number, else a list."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.item() if math.prod(value.shape) == 1 else value.tolist()
    return list(value) if isinstance(value, tuple) else value
