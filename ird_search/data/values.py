"""One value of a row as a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

TOLD = 60
"""Characters of a value that a message shows."""


def as_tensor(value: Any) -> Tensor:
    """On the CPU; whole numbers as int64 (bytes and bools stay), a list's decimals as float32.

    Raises:
        ValueError: missing, ragged, or something that is no number in it.
    """
    if isinstance(value, Tensor):
        t = value.detach().cpu()
    else:
        t = torch.as_tensor(_as_array(value))
        t = t.to(torch.get_default_dtype()) if t.is_floating_point() else t
    return t.long() if t.dtype in (torch.int16, torch.int32) else t


def _as_array(value: Any) -> np.ndarray:
    if value is None:
        raise ValueError("it is missing")
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError("its parts differ in length") from None
    if array.dtype.kind not in "biuf":
        raise ValueError(f"numbers are accepted, and {told(value)} holds something else")
    return array


def told(value: Any) -> str:
    """A value as a message shows it: its beginning."""
    text = repr(value[: TOLD + 1] if isinstance(value, str) else value)
    return text if len(text) <= TOLD else f"{text[:TOLD]}…"


def is_tokens(t: Tensor) -> bool:
    """Whether this is one row of whole numbers: token ids, a mask, segment ids."""
    return t.ndim == 1 and not t.is_floating_point()


def attended(row: Mapping[str, Tensor]) -> Tensor:
    """The row's own attention mask, or ones: padding must not be attended to."""
    return row["attention_mask"] if "attention_mask" in row else torch.ones_like(row["input_ids"])


def range_problem(t: Tensor, count: int | None) -> str:
    """How whole numbers lie outside 0 … count − 1; empty where none does."""
    low, high = (int(v) for v in torch.aminmax(t))
    if low >= 0 and (count is None or high < count):
        return ""
    known = f"0 to {count - 1}" if count is not None else "0 and above"
    return f"holds {low if low < 0 else high}, out of range: the model knows {known}"
