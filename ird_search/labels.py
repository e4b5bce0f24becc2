"""Labels of a source as tensors: classes, numbers, or the tokens of a language model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ird_search.columns import plain_label
from ird_search.errors import nearest
from ird_search.row_problems import SHOWN, RowProblems
from ird_search.sources import Source
from ird_search.task import IGNORED
from ird_search.values import as_tensor, attended, is_tokens


def _label_values(source: Source, problems: RowProblems) -> list[Any]:
    """One plain value a row; `None` where it is missing, which is told."""
    if source.label_column is None:
        problems.whole.append(
            f"{source.origin} has no label column that can be told; its columns are "
            f"{', '.join(source.columns)}. Name it with label_column (--label-column)."
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
    return values


def number_labels(source: Source, problems: RowProblems) -> Tensor:
    values = _label_values(source, problems)
    for i, value in enumerate(values):
        if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
            problems.add(i, f"the label {value!r} is not a finite number")
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
    spelled = any(isinstance(value, str) for value in values)
    found = []
    for i, value in enumerate(values):
        if own and names and names != own and isinstance(value, int) and 0 <= value < len(own):
            value = own[value]  # class ids of another order mean what their names say
        label, problem = (0, "") if value is None else _class_id(value, names, count)
        if spelled and isinstance(value, (int, float)):
            problem = f"the label {value!r} is a number, where other labels are text"
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


def _class_id(value: Any, names: tuple[str, ...] | None, count: int | None) -> tuple[int, str]:
    """(class id, what is wrong with it)."""
    if isinstance(value, str):
        if names is None:
            return 0, f"the label {value!r} is text, but the training labels are numbers"
        if value not in names:
            known = ", ".join(map(repr, names[:SHOWN]))
            return 0, f"the label {value!r} is not among {known}.{nearest(value, names)}"
        value = names.index(value)
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int):
        return 0, f"the label {value!r} is not a whole number; for numbers use task 'regression'"
    if value < 0 or (count is not None and value >= count):
        accepted = f"0 to {count - 1}" if count is not None else "0 and above"
        return 0, f"the label {value} is out of range; {accepted} are accepted"
    return int(value), ""


def token_labels(
    source: Source,
    inputs: Sequence[Mapping[str, Tensor]],
    starts: Sequence[int],
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
    found = []
    for i, row in enumerate(inputs):
        tokens = row["input_ids"]
        if isinstance(own[i], (list, tuple, np.ndarray, Tensor)):
            labels = as_tensor(own[i])[: len(tokens)].long()
        else:
            labels = (
                torch.where(attended(row).bool(), tokens, IGNORED) if is_tokens(tokens) else tokens
            )
            labels[: starts[i]] = IGNORED
        found.append(labels)
        if problem := _token_problem(tokens, labels):
            problems.add(i, problem)
    return tuple(found)


def _token_problem(tokens: Tensor, labels: Tensor) -> str:
    if not is_tokens(tokens):
        return ""  # told by the check of tokens
    if labels.shape != tokens.shape:
        return f"{len(labels)} labels came for {len(tokens)} tokens"
    if len(tokens) < 2:
        return "1 token came; a language model needs 2 to predict one"
    if bool((labels[1:] == IGNORED).all()):
        return "no token is left to predict (every label is -100)"
    return ""


# --- checks of tensors --------------------------------------------------------------------------
