"""`Case`: one file that is handed to `ird-search run`, and what must become of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from tests.tiny import (
    TEXT_ROWS,
)

Rows = list[dict[str, Any]]

FORMATS = ("csv", "tsv", "json", "jsonl", "parquet")
TYPED = ("json", "jsonl", "parquet")
"""Formats whose values have types: null, lists, numbers beside text."""

ROWS: Rows = TEXT_ROWS * 6
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    """One file, and what must become of it.

    Args:
        fault: the line of the table that it counts in.
        write: makes the file in a directory and returns it; None where it cannot be made.
        said: what the message must say besides the file; empty where it must work.
        runs: modules of the model may run, once: only it can tell what is wrong.
        rows: the rows as Python has them, where they come from a list.
    """

    fault: str
    name: str
    write: Callable[[Path], Path | None]
    said: tuple[str, ...] = ()
    code: int = 3
    model: str = "bert"
    options: Mapping[str, Any] = field(default_factory=dict)
    runs: bool = False
    huge: bool = False
    rows: Rows | None = None

    @property
    def works(self) -> bool:
        return not self.said


def changed(at: int, rows: Rows | None = None, **values: Any) -> Rows:
    """The rows with one of them changed."""
    rows = ROWS if rows is None else rows
    return [{**row, **values} if i == at % len(rows) else dict(row) for i, row in enumerate(rows)]


def every(rows: Rows | None = None, **values: Any) -> Rows:
    """The rows with all of them changed."""
    return [{**row, **values} for row in (ROWS if rows is None else rows)]


def write_rows(rows: Rows, path: Path) -> Path | None:
    """A file in the format of its extension; None where the format cannot hold the rows."""
    suffix = path.suffix[1:]
    if suffix in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            names = dict.fromkeys(name for row in rows for name in row)
            mark = "," if suffix == "csv" else "\t"
            writer = csv.DictWriter(file, list(names), delimiter=mark)
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == "parquet":
        try:
            pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
        except (pa.ArrowException, OverflowError):
            return None
    else:
        text = json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows))
        path.write_text(text)
    return path


def of_rows(
    fault: str,
    name: str,
    rows: Rows,
    *said: str,
    formats: Sequence[str] = FORMATS,
    evaluated: bool = False,
    **more: Any,
) -> Iterator[Case]:
    """The same rows in several formats; `evaluated`: beside good training rows."""
    for suffix in formats:

        def write(place: Path, suffix: str = suffix) -> Path | None:
            return write_rows(rows, place / f"data.{suffix}")

        plain = None if evaluated else rows
        yield Case(fault, f"{name}, {suffix}", write, said, rows=plain, **more)


def of_bytes(
    fault: str, name: str, file: str, content: str | bytes, *said: str, **more: Any
) -> Case:
    """A file by its bytes."""

    def write(place: Path) -> Path:
        path = place / file
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return Case(fault, f"{name}, {file}", write, said, **more)
