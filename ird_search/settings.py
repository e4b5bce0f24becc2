"""What a setting is: its default, help and legal range, and what is said of a value outside it."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import Field, field, fields
from numbers import Integral, Real
from typing import Any, Literal

from ird_search.errors import nearest


def setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    open: bool = False,
) -> Any:
    """A field with its help text and legal range (`open`: the low end itself is not legal)."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "open": open})


def choices(hint: Any) -> tuple[str, ...]:
    """The legal words of a `Literal` setting, or of a list of them; empty for another type."""
    hint, _ = plain_type(hint)
    if typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def plain_type(hint: Any) -> tuple[Any, bool]:
    """(a setting's type without None, whether it may be None)."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return typing.get_args(hint)[0], True
    return hint, False


def range_problems(config: Any) -> list[str]:
    """What is wrong with single settings, in a sentence each."""
    hints = typing.get_type_hints(type(config))
    return [p for f in fields(config) if (p := _problem(f, getattr(config, f.name), hints))]


def make_plain(config: Any) -> None:
    """Plain values in a config, whatever lists and numbers came."""
    for f in fields(config):
        object.__setattr__(config, f.name, _plain(getattr(config, f.name)))


def _plain(value: Any) -> Any:
    """Lists of YAML or JSON as tuples, numbers of numpy as Python's."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, (bool, int, float)) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _list_problem(name: str, value: Any, words: tuple[str, ...]) -> str:
    if not isinstance(value, (list, tuple)):
        return f"{name} is {value!r}; it must be a list of {', '.join(words)}."
    if unknown := [v for v in value if v not in words]:
        close = nearest(str(unknown[0]), words)
        return f"{name} holds {unknown[0]!r}; known are {', '.join(words)}.{close}"
    return ""


def _problem(f: Field[Any], value: Any, hints: Mapping[str, Any]) -> str:
    """What is wrong with one setting, in a sentence; empty when it is legal."""
    hint, low, high = hints[f.name], f.metadata["low"], f.metadata["high"]
    words = choices(hint)
    base, optional = plain_type(hint)
    if optional and value is None:
        return ""
    if words and typing.get_origin(hint) is tuple:
        return _list_problem(f.name, value, words)
    if words:
        if value not in words:
            close = nearest(str(value), words)
            return f"{f.name} is {value!r}; it must be one of {', '.join(words)}.{close}"
        return ""
    if base is bool or base is str:
        return (
            "" if isinstance(value, base) else f"{f.name} is {value!r}; it must be {base.__name__}."
        )
    if base not in (int, float):
        good = isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)
        return "" if good else f"{f.name} is {value!r}; it must be a list of strings."
    if isinstance(value, bool) or not isinstance(value, Real if base is float else Integral):
        return f"{f.name} is {value!r}; it must be a {'' if base is float else 'whole '}number."
    if value in (float("inf"), float("-inf")):
        return f"{f.name} is {value}; it must be a finite number."
    above = low is None or (value > low if f.metadata["open"] else value >= low)
    if above and (high is None or value <= high) and value == value:
        return ""
    bounds = [f"{'above' if f.metadata['open'] else 'at least'} {low:g}"] if low is not None else []
    bounds += [f"at most {high:g}"] if high is not None else []
    return f"{f.name} is {value:g}; it must be {' and '.join(bounds)}."
