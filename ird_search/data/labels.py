"""Labels of a source as tensors: classes, numbers, or the tokens of a language model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ird_search.data.columns import MANY_CLASSES, is_number, listed, plain_label
from ird_search.data.row_problems import SHOWN, RowProblems
from ird_search.data.sources import Source
from ird_search.data.values import as_tensor, attended, is_tokens, told
from ird_search.errors import nearest
from ird_search.task import IGNORED

LARGEST = torch.finfo(torch.float32).max
NUMBERS = "for numbers use task 'regression' (--task regression)"
SEQUENCES = (list, tuple, np.ndarray, Tensor)
FIGURE = re.compile(r"\s*[-+]?\d+(\.\d*)?\s*")


def _label_values(source: Source, problems: RowProblems) -> list[Any]:
    """One plain value a row; `None` where it is missing, which is told."""
    if source.label_column is None:
        problems.whole.append(
            f"{source.origin} has no label column that can be told; its columns are "
            f"{listed(source.columns)}. Name it with label_column (--label-column)."
        )
        return [None] * len(source)
    values = [plain_label(value) for value in source.column(source.label_column)]
    for i, value in enumerate(values):
        if value is None or value == "" or value != value:
            problems.add(i, f"the label in {source.label_column!r} is missing")
            values[i] = None
        elif isinstance(value, list):
            problems.add(i, f"the label is a list of {len(value)}; one label a row is accepted")
            values[i] = None
    return _of_one_kind(values, problems)


def _of_one_kind(values: list[Any], problems: RowProblems) -> list[Any]:
    """Where words and numbers are mixed, the fewer are told.

    In a csv file one word makes a whole column text: "3" beside it is a number.
    """
    words = [i for i, v in enumerate(values) if isinstance(v, str) and not FIGURE.fullmatch(v)]
    figures = [i for i, v in enumerate(values) if isinstance(v, str) and FIGURE.fullmatch(v)]
    numbers = [i for i, v in enumerate(values) if is_number(v)]
    fewer, what = [*words, *figures], "is text, where most labels are numbers"
    if words and len(words) < len(figures) + len(numbers):
        fewer = words
        for i in figures:
            values[i] = float(values[i])
    elif len(fewer) > len(numbers):
        fewer, what = numbers, "is a number, where most labels are text"
    for i in fewer:
        problems.add(i, f"the label {told(values[i])} {what}")
        values[i] = None
    return values


def number_labels(source: Source, problems: RowProblems) -> Tensor:
    values = _label_values(source, problems)
    for i, value in enumerate(values):
        if value is not None and not (is_number(value) and abs(value) <= LARGEST):
            problems.add(i, f"the label {told(value)} is not a finite number (in float32)")
            values[i] = None
    return torch.tensor([0.0 if v is None else float(v) for v in values], dtype=torch.float32)


def class_labels(
    source: Source,
    names: tuple[str, ...] | None,
    num_labels: int | None,
    training: bool,
    problems: RowProblems,
) -> Tensor:
    values = _label_values(source, problems)
    own = source.label_names
    if names is None and own is not None and training:
        names = own
    count = num_labels or (len(names) if names else None)
    alike, found = _alike((*values, *(own or ())), names or ()), []
    for i, value in enumerate(values):
        if own and names and names != own and isinstance(value, int) and 0 <= value < len(own):
            value = own[value]  # class ids of another order mean what their names say
        value = alike.get(value, value) if isinstance(value, str) else value
        label, problem = (0, "") if value is None else _class_id(value, names, count)
        if problem:
            problems.add(i, problem)
        elif value is not None:
            found.append(label)
        values[i] = label
    if training and len(found) == len(values) and len(set(found)) == 1:
        only = f"{found[0]}" + (f" ({names[found[0]]!r})" if names else "")
        problems.whole.append(
            f"All {len(found):,} labels of {source.origin} are {only}; a classification learns "
            "from two classes or more. If rows are sorted by label, shuffle them or raise limit."
        )
    return torch.tensor(values, dtype=torch.int64)


def _alike(values: Iterable[Any], names: Sequence[str]) -> dict[str, str]:
    """The class names that labels mean which differ in case and spaces only: `good` is `GOOD`.

    None, where two labels or two names would then be one.
    """
    spelled = {v for v in values if isinstance(v, str)}
    known = {_folded(name): name for name in names}
    if len(known) < len(names) or len(set(map(_folded, spelled))) < len(spelled):
        return {}
    return {v: known[_folded(v)] for v in spelled if v not in names and _folded(v) in known}


def _folded(label: str) -> str:
    return " ".join(label.split()).casefold()


def _class_id(value: Any, names: tuple[str, ...] | None, count: int | None) -> tuple[int, str]:
    """(class id, what is wrong with it)."""
    if isinstance(value, str):
        if names is None:
            return 0, f"the label {told(value)} is text, but the training labels are numbers"
        if value not in names:
            known = ", ".join(map(told, names[:SHOWN]))
            return 0, f"the label {told(value)} is not among {known}.{nearest(value, names)}"
        value = names.index(value)
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int):
        return 0, f"the label {told(value)} is not a whole number; {NUMBERS}"
    if value < 0 or (count is not None and value >= count):
        accepted = f"0 to {count - 1}" if count is not None else "0 and above"
        cure = f"; {NUMBERS}" if value >= MANY_CLASSES else ""
        return 0, f"the label {told(value)} is out of range; {accepted} are accepted{cure}"
    return int(value), ""


def token_labels(
    source: Source,
    inputs: Sequence[Mapping[str, Tensor]],
    starts: Sequence[int],
    vocab_size: int | None,
    problems: RowProblems,
) -> tuple[Tensor, ...]:
    """Labels aligned with the tokens; −100 on prompts and on padding that the rows brought."""
    if "input_ids" not in inputs[0]:
        problems.whole.append(
            f"{source.origin} holds no tokens; a language model needs 'input_ids'."
        )
        return tuple(torch.zeros(0, dtype=torch.int64) for _ in inputs)
    own: Sequence[Any] = [None] * len(source)
    if source.tokenised and source.label_column is not None:
        own = source.column(source.label_column)
    given = any(isinstance(value, SEQUENCES) for value in own)  # else a class, or nothing
    found = []
    for i, row in enumerate(inputs):
        tokens = row["input_ids"]
        if given:
            labels = own_labels(own[i], i, len(tokens) if tokens.ndim else 0, problems)
        elif is_tokens(tokens) and attended(row).shape == tokens.shape:
            labels = torch.where(attended(row).bool(), tokens, IGNORED)
            labels[: starts[i]] = IGNORED
        else:
            labels = tokens
        found.append(labels)
        if problem := _token_problem(tokens, labels, vocab_size):
            problems.add(i, problem)
    return tuple(found)


def own_labels(value: Any, i: int, length: int | None, problems: RowProblems) -> Tensor:
    """The token labels that a row brought, cut to a length."""
    try:
        labels = as_tensor(value)
    except ValueError as error:
        problems.add(i, f"the labels cannot be used, {error}")
        labels = torch.zeros(0, dtype=torch.int64)
    return labels[:length] if labels.ndim else labels


def _token_problem(tokens: Tensor, labels: Tensor, vocab_size: int | None) -> str:
    if not is_tokens(tokens):
        return ""  # told by the check of tokens
    if is_tokens(labels) and labels.shape != tokens.shape:
        return f"{len(labels)} labels came for {len(tokens)} tokens"
    if problem := label_problem(labels, vocab_size):
        return problem
    if len(tokens) < 2:
        return "1 token came; a language model needs 2 to predict one"
    if bool((labels[1:] == IGNORED).all()):
        return "no token is left to predict (every label is -100)"
    return ""


def label_problem(labels: Tensor, vocab_size: int | None) -> str:
    """Why these are no tokens to predict; empty where they are."""
    if not is_tokens(labels):
        return f"the labels are {labels.dtype} {list(labels.shape)}, not token ids"
    scored = labels[labels != IGNORED]
    odd = scored[(scored < 0) | (scored >= vocab_size)] if vocab_size else scored[scored < 0]
    if odd.numel():
        known = f"0 to {vocab_size - 1}" if vocab_size else "0 and above"
        return f"the label {int(odd[0])} is out of range; {known} are accepted, and {IGNORED}"
    return ""
