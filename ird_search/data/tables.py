"""Files of rows: csv, tsv, json, jsonl and parquet, each refused with its reason where it is bad.

Nothing is guessed away: a text that reads "NA" stays text, and a row with a field too many, a
quote that is never closed or a byte that is no UTF-8 is told by its number.

A tsv file comes in two kinds. One from a csv writer (`pandas.to_csv(sep="\t")`) has its quotes
around whole fields, and doubled within; these are taken off. Where quotes of a file stand
otherwise, as in GLUE's files, which know no quoting, all its quotes are text, and a line is a row.
A file that reads well both ways, though with other rows, is refused, and so is one of the first
kind with a flaw.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from pyarrow.csv import InvalidRow, ParseOptions, ReadOptions

from ird_search.data.columns import Rows
from ird_search.data.row_problems import RowProblems
from ird_search.data.values import told
from ird_search.errors import DataError, first_line, out_of_memory

FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
FOREIGN = {
    b"\x1f\x8b": "compressed with gzip; unpack it",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or save it as csv",
    b"PAR1": "a parquet file; name it .parquet",
    b"\xff\xfe\0\0": "UTF-32 text; save it as UTF-8",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
    b"\0": "binary, or text in UTF-16 or UTF-32; UTF-8 is read",
}
"""How files begin that are no UTF-8 text, and what to do."""

HEADER = 2**24
"""Characters of a header that are looked at."""

MOST_COLUMNS = 10_000
"""A table with more is no list of samples: it takes a minute to open, and says nothing."""

QUOTED = re.compile(r'(?:^|(?<=[\t\r\n]))"[^"]*(?:""[^"]*)*"(?=[\t\r\n]|\Z)')
"""A field of a tsv file as a csv writer quotes it."""

LINE_BREAK = re.compile(r"\r\n|\r|\n")

PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")


def read_table(path: Path) -> Rows:
    """The rows of one file.

    Raises:
        DataError: what is wrong with it, with the numbers of the rows.
    """
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        more = " Unpack it first." if suffix in PACKED else ""
        raise DataError(
            f"{path} is of no accepted format; accepted are {', '.join(FORMATS)}.{more}"
        )
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty.")
        if suffix == ".parquet":
            table = pyarrow.parquet.read_table(path)
        else:
            _refuse_foreign(path)
            if suffix in (".json", ".jsonl"):
                return _read_json(path)
            table = _read_csv(path)
        check_columns(table.column_names, str(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text{_line_of(error)}. Save it as UTF-8.") from error
    except (pa.ArrowException, OSError) as error:
        if out_of_memory(error):
            raise
        raise DataError(f"{path} could not be read as {suffix[1:]}: {first_line(error)}") from error
    # a fingerprint of one's own: theirs takes a minute where there are many columns
    return datasets.Dataset(table, fingerprint=uuid4().hex)


def _refuse_foreign(path: Path) -> None:
    """Refuse what is plainly no UTF-8 text, by its first bytes."""
    with path.open("rb") as file:
        start = file.read(4)
    for mark, what in FOREIGN.items():
        if start.startswith(mark) or (mark == b"\0" and mark in start):
            raise DataError(f"{path} is {what}.")


def check_columns(names: Sequence[str], origin: str) -> None:
    """Refuse two columns of one name, and columns beyond all measure."""
    if len(names) > MOST_COLUMNS:
        raise DataError(
            f"{origin} has {len(names):,} columns, as {names[0]!r}; at most {MOST_COLUMNS:,} are "
            "accepted. Keep those with the text and the label."
        )
    if again := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(
            f"{origin} has more than one column {told(again[0])}. Rename or remove them."
        )


def _line_of(error: UnicodeDecodeError) -> str:
    """Where a text stops being UTF-8, by its line, if the whole text is there."""
    before = bytes(error.object[: error.start])
    line = f", line {before.count(10) + 1}" if len(error.object) > 1000 or before else ""
    return f" (byte 0x{error.object[error.start]:02x}{line})"


# --- csv ----------------------------------------------------------------------------------------


def _read_csv(path: Path) -> pa.Table:
    mark = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8", errors="replace") as file:
        header = file.readline(HEADER).split(mark)
    if len(header) > MOST_COLUMNS:  # quotes or not; before all of them are read
        check_columns(header, str(path))
    # a text may hold line breaks; a text that reads "NA" or "null" stays text (pandas drops it)
    quote: Literal['"', False] = '"' if mark == "," or _is_quoted(path) else False
    parse = ParseOptions(delimiter=mark, quote_char=quote, newlines_in_values=True)
    try:
        table = pyarrow.csv.read_csv(path, parse_options=parse)
    except pa.ArrowInvalid:
        path.read_bytes().decode()  # a row that is no UTF-8 cannot be told by its number
        table = _read_whole(path, parse)
    names, problems = table.column_names, RowProblems(path.name)
    if len(names) == 1 and (odd := re.search(r"[,;|\t]", names[0])):
        raise DataError(
            f"{path} has the one column {told(names[0])}: its columns seem to be separated by "
            f"{odd[0]!r}, and {mark!r} is read in a {path.suffix} file."
        )
    for field in table.schema:
        if pa.types.is_binary(field.type):
            for row, value in enumerate(table[field.name].to_pylist()):
                if value is not None and value.decode(errors="ignore").encode() != value:
                    problems.add(row, f"{field.name!r} is not UTF-8 text. Save the file as UTF-8")
    if quote:
        _check_last_quote(path, table, problems)
    problems.raise_any()
    return table


def _is_quoted(path: Path) -> bool:
    """Whether the quotes of a tsv file are those of a csv writer, and no text.

    Raises:
        DataError: it could be either, and a quoted field would swallow whole rows.
    """
    text = path.read_bytes().removeprefix(codecs.BOM_UTF8).decode(errors="replace")
    if '"' not in text:
        return True
    rest, quoted = QUOTED.subn("", text)
    if '"' in rest:
        _refuse_flawed(path, text, quoted)
        return False
    joined = next((f for f in QUOTED.finditer(text) if re.search(r"[\t\r\n]", f[0])), None)
    tabs = {line.count("\t") for line in LINE_BREAK.split(text) if line}
    if joined and len(tabs) == 1 and tabs != {0}:
        row = len(LINE_BREAK.findall(text[: joined.start()])) - 1  # the header is a line, too
        raise DataError(
            f"{path}, row {max(0, row)} (counting from 0): a quote that begins a field may be "
            "text, or join this line with what comes below it, and both read well: "
            f"{told(joined[0])}. Save the file as csv, jsonl or parquet."
        )
    return True


def _refuse_flawed(path: Path, text: str, quoted: int) -> None:
    """Refuse a quote within a field where a csv writer plainly wrote the others.

    It did, where the header is quoted, or there are at least half as many quoted fields as lines.
    """
    lines = text.splitlines()
    if '"' not in lines[0] and 2 * quoted < len(lines):
        return
    odd = (i for i, line in enumerate(lines) if '"' in QUOTED.sub("", line))
    row = next(odd, 1) - 1
    raise DataError(
        f"{path}, row {max(0, row)} (counting from 0): a quote stands within a field, or is never "
        f"closed, where other fields are quoted whole: {told(lines[row + 1])}. A quote within a "
        "quoted field is written twice. Save the file as csv, jsonl or parquet."
    )


def _read_whole(path: Path, parse: ParseOptions) -> pa.Table:
    """A csv file in one block: a row may be larger than a block, and a bad row has a number."""
    problems = RowProblems(path.name)

    def on_bad(row: InvalidRow) -> str:
        what = f"the header has {row.expected_columns} fields, and this row {row.actual_columns}"
        try:
            text = row.text
        except UnicodeDecodeError:
            text = "no UTF-8 text"
        if text.count('"') % 2 and "\n" in text:
            what = "a quote is opened and never closed"
        problems.add(row.number - 2, f"{what}: {told(text)}")  # the header is row 1
        return "skip"

    size = min(max(path.stat().st_size + 1, 2**20), 2**31 - 1)
    parse.invalid_row_handler = on_bad
    whole = ReadOptions(use_threads=False, block_size=size)
    table = pyarrow.csv.read_csv(path, read_options=whole, parse_options=parse)
    problems.raise_any()
    return table


def _check_last_quote(path: Path, table: pa.Table, problems: RowProblems) -> None:
    """A quote that is opened in the last column and never closed swallows all rows below it."""
    if not len(table) or not pa.types.is_string(table.schema[-1].type):
        return
    last = table.column(table.num_columns - 1)[-1].as_py()
    with path.open("rb") as file:
        file.seek(-min(4, path.stat().st_size), 2)
        closed = file.read().rstrip(b"\r\n").endswith(b'"')
    if last and "\n" in last and not closed:
        problems.add(len(table) - 1, f"a quote is opened and never closed: {told(last)}")


# --- json ---------------------------------------------------------------------------------------


class _Repeated(dict[str, Any]):
    """A JSON object in which a key came twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _Repeated(found)


def _read_json(path: Path) -> list[Mapping[str, Any]]:
    """A list of objects, or one object a line; the extension does not decide which."""
    text = path.read_bytes().removeprefix(codecs.BOM_UTF8).decode()
    if not text.strip():
        raise DataError(f"{path} is empty.")
    if text.lstrip().startswith("["):
        rows = _parsed(path, text)
    else:
        rows = [
            _parsed(path, line, n) for n, line in enumerate(text.split("\n"), 1) if line.strip()
        ]
    problems = RowProblems(path.name)
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            what = f"a value of type {type(row).__name__} came; an object is accepted"
            problems.add(i, f'{what}, as {{"text": …, "label": …}}')
        elif not row or isinstance(row, _Repeated):
            problems.add(i, "a key comes twice" if row else "the object is empty")
    problems.raise_any()
    return list(rows)


def _parsed(path: Path, text: str, line: int | None = None) -> Any:
    """One JSON value: the whole file, or one line of it."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        where = f"line {line}, " if line else ""
        what = error.msg if line and isinstance(error, json.JSONDecodeError) else error
        raise DataError(
            f"{path} could not be read as JSON: {where}{what} (one object a line, or one list of "
            "objects, is accepted)."
        ) from error
