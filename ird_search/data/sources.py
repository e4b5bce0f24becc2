"""`Source`: the user's rows as they came, with what each column is for.

Files, directories, hub data sets, `datasets` objects, torch data sets and plain lists all become
one `Source`. It knows what the columns mean (`columns`) and how many classes there are,
which is what must be known before a model is loaded; the model's tokenizer then turns it into a
`SampleSet` (`encoding.encode`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from ird_search.data.columns import (
    Kind,
    Rows,
    is_picture,
    label_kind,
    name_columns,
    names_of,
    values_of,
)
from ird_search.data.tables import FORMATS, check_columns, read_table
from ird_search.data.values import told
from ird_search.errors import (
    DataError,
    IRDError,
    UsageError,
    first_line,
    nearest,
    out_of_memory,
)
from ird_search.task import POSITIONAL

VALIDATION_SPLITS = ("validation", "validation_matched", "valid", "val", "dev", "eval")
"""Names under which a validation split is looked for. `test` is none: it is for the end."""


@dataclass(frozen=True, eq=False)
class Source:
    """Rows before tokenising, and what their columns are for.

    Args:
        rows: the rows kept, N of them.
        ids: the position of each row in what the user passed: [N].
        kind: the task that the columns suggest.
        text_columns: one or two columns of text; (prompt, completion) for a language model,
            (source, target) for an encoder-decoder.
        label_column: the column with the label, if there is one.
        image_column: the column with images that a processor must still read.
        input_columns: columns that are model inputs already.
        label_names: class names in the order of their ids, where the labels have names.
        num_labels: number of classes; `None` unless `kind` is a classification.
        origin: where the rows came from, for messages.

    Example:
        >>> rows = [{"text": "good", "label": "yes"}, {"text": "bad", "label": "no"}]
        >>> source = read_source(rows)
        >>> source.kind, source.text_columns, source.label_names
        ('classification', ('text',), ('no', 'yes'))
    """

    rows: Rows
    ids: tuple[int, ...]
    kind: Kind
    text_columns: tuple[str, ...]
    label_column: str | None
    image_column: str | None
    input_columns: tuple[str, ...]
    label_names: tuple[str, ...] | None
    num_labels: int | None
    origin: str

    @property
    def tokenised(self) -> bool:
        """Whether the rows are model inputs already."""
        return bool(self.input_columns)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns, used or not."""
        return names_of(self.rows)

    def __len__(self) -> int:
        return len(self.ids)

    def column(self, name: str) -> list[Any]:
        """The values of one column, in order; `None` where a row lacks it."""
        return values_of(self.rows, name)

    def select(self, rows: Iterable[int]) -> Source:
        """Some rows, by position, in the order given. What was inferred from all rows stays."""
        wanted = [int(i) for i in rows]
        return replace(self, rows=_take(self.rows, wanted), ids=tuple(self.ids[i] for i in wanted))

    def __repr__(self) -> str:
        used = self.input_columns or self.text_columns or (self.image_column,)
        label = f", label {self.label_column}" if self.label_column else ""
        classes = f", {self.num_labels} classes" if self.num_labels else ""
        return (
            f"Source({len(self):,} rows of {self.origin}, {self.kind}: "
            f"{' + '.join(map(str, used))}{label}{classes})"
        )


def read_source(
    data: Any,
    *,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    writes: bool | None = False,
) -> Source:
    """Read what the user passed and tell what its columns are for.

    Args:
        data: a `datasets.Dataset` or `DatasetDict`, a DataFrame, a torch map-style data set or a
            list of (x, y) pairs or of dicts, a .csv, .tsv, .json, .jsonl or .parquet file, a
            directory with one such file a split, or the id of a hub data set (`id` or `id:config`).
        text_columns: the text column, or the two of a pair; inferred by default.
        label_column: the label column; inferred by default.
        split: which split, where `data` has several; `train` by default.
        limit: keep the first `limit` rows.
        writes: whether the model writes one text, or tokens, from what it reads; `None`: where
            the rows have no class and no number to predict. Of two texts the second is then the
            target.

    Raises:
        DataError: nothing there, unreadable, empty, or columns that cannot be told.
        UsageError: `limit` is not positive.

    Example:
        >>> read_source([("a film", 1), ("a book", 0)])
        Source(2 rows of a list, classification: text, label label, 2 classes)
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}; it must be at least 1.")
    opened, origin = _open(data, split)
    rows = _normalise(opened, limit, origin)
    if not len(rows):
        raise DataError(f"{origin} has no rows.")
    columns = name_columns(rows, tuple(text_columns), label_column, origin, writes=writes)
    names, kind, num_labels = label_kind(rows, columns, origin, writes=writes)
    return Source(
        rows=rows,
        ids=tuple(range(len(rows))),
        kind=kind,
        text_columns=columns.text,
        label_column=columns.label,
        image_column=columns.image,
        input_columns=columns.inputs,
        label_names=names,
        num_labels=num_labels,
        origin=origin,
    )


def read_validation(
    data: Any,
    *,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    limit: int | None = None,
    writes: bool | None = False,
) -> Source | None:
    """The validation split of `data`, or `None` where it has none. Arguments as `read_source`.

    A test split is never taken for it: what a test split chose would no longer be a test.
    """
    splits = splits_of(data)
    split = next((name for name in VALIDATION_SPLITS if name in splits), None)
    if split is None:
        return None
    return read_source(
        data,
        text_columns=text_columns,
        label_column=label_column,
        split=split,
        limit=limit,
        writes=writes,
    )


def read_evaluation(
    data: Any,
    *,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    writes: bool | None = False,
) -> Source:
    """What the user named as held-out rows; arguments as `read_source`.

    Its validation split; else its only split; else `test`, which is taken here because it was named
    for evaluation. Never `train` beside others.

    Raises:
        DataError: several splits, and none of these among them.
    """
    splits = splits_of(data)
    split = next((name for name in (*VALIDATION_SPLITS, "test") if name in splits), None)
    if split is None and len(splits) > 1:
        raise DataError(
            f"The evaluation data have the splits {', '.join(splits)}; of several, one named "
            f"{', '.join(VALIDATION_SPLITS)} or test is taken. Pass the one that is meant: its "
            "rows, or its file."
        )
    return read_source(
        data, text_columns=text_columns, label_column=label_column, split=split, writes=writes
    )


def splits_of(data: Any) -> tuple[str, ...]:
    """Names of the splits that `data` holds; empty where it is one table."""
    if isinstance(data, (str, Path)):
        path, what = _place(data)
        if what == "directory":
            return tuple(_split_files(path))
        return () if what or not _hub_id(data) else tuple(_from_hub(str(data)))
    return tuple(map(str, data)) if isinstance(data, Mapping) else ()


# --- opening ------------------------------------------------------------------------------------


def _open(data: Any, split: str | None) -> tuple[Any, str]:
    """The rows in whatever type they come, and a name for messages."""
    if isinstance(data, (str, Path)):
        return _open_path(data, split)
    if isinstance(data, Mapping):
        return _pick(data, split, f"The {type(data).__name__}")
    if split is not None:
        raise DataError(
            f"split={split!r} was asked for, but this {type(data).__name__} has no splits."
        )
    if isinstance(data, DataLoader):
        raise DataError("A DataLoader came; pass the data set itself (`loader.dataset`).")
    if isinstance(data, pd.DataFrame):
        names = list(map(str, data.columns))
        check_columns(names, "The DataFrame")
        return data.set_axis(names, axis=1).to_dict("records"), "a DataFrame"
    _refuse_no_rows(data)
    return data, f"a {type(data).__name__}"


def _refuse_no_rows(data: Any) -> None:
    """Refuse what cannot be asked for its rows, or would answer with something else."""
    stream = isinstance(data, (IterableDataset, datasets.IterableDataset))
    if stream or not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        cure = ""
        if isinstance(data, datasets.IterableDataset):
            cure = " Take as many of its rows as are needed: Dataset.from_list(list(ds.take(n)))."
        elif isinstance(data, Iterable):
            cure = " Take as many of its rows as are needed: list(itertools.islice(data, n))."
        raise DataError(
            f"Data of type {type(data).__name__} came; accepted are a datasets.Dataset or "
            "DatasetDict, a torch data set with a length, a list of (x, y) pairs or of dicts, a "
            f"path, or a hub id.{cure}"
        )
    arrays = isinstance(data, (tuple, list)) and len(data) == 2
    if arrays and all(isinstance(part, (np.ndarray, Tensor)) for part in data):
        raise DataError(
            f"A {type(data).__name__} of two arrays came, and rows are accepted: pass "
            "TensorDataset(X, y), of tensors, or list(zip(X, y))."
        )


def _open_path(data: str | Path, split: str | None) -> tuple[Any, str]:
    path, what = _place(data)
    if what == "directory":
        return _open_directory(path, split)
    if what == "file":
        if split is not None:
            raise DataError(f"split={split!r} was asked for, but {path} is one file.")
        return read_table(path), path.name
    if _hub_id(data):
        return _pick(_from_hub(str(data)), split, str(data))
    if what:
        raise DataError(f"{data} is {what}; a file or a directory is accepted.")
    raise DataError(f"{data} does not exist.{_siblings(path)}")


def _place(data: str | Path) -> tuple[Path, str]:
    """A path, and what is there: directory, file, something else in words, or nothing."""
    try:
        path = Path(data).expanduser()
        if path.is_dir() or path.is_file():
            str(path).encode()  # what is written later names it
            return path, "directory" if path.is_dir() else "file"
        if path.is_symlink():
            return path, "a link that leads nowhere"
        return path, "no regular file" if path.exists() else ""
    except UnicodeEncodeError:
        raise DataError(f"The name {str(path)!r} is not UTF-8. Rename it.") from None
    except (OSError, RuntimeError) as error:  # too long, not allowed, a home that is unknown
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise DataError(f"{told(str(data))} cannot be used: {reason}.") from error


def _pick(splits: Mapping[Any, Any], split: str | None, origin: str) -> tuple[Any, str]:
    """One split; a data set with a single split needs no name."""
    named = {str(name): rows for name, rows in splits.items()}
    if split is None:
        split = "train" if "train" in named or len(named) != 1 else next(iter(named))
    if split not in named:
        raise DataError(
            f"{origin} has no split {split!r}; it has {', '.join(named) or 'none'}."
            f"{nearest(split, named)}"
        )
    return named[split], f"{origin} ({split})"


def _open_directory(path: Path, split: str | None) -> tuple[Any, str]:
    splits = _split_files(path)
    if not splits:
        raise DataError(
            f"The directory {path} holds no split; files named like train.parquet are looked for "
            f"({', '.join(FORMATS)})."
        )
    files, origin = _pick(splits, split, path.name)
    parts = [read_table(file) for file in files]
    if all(isinstance(part, datasets.Dataset) for part in parts):
        return datasets.concatenate_datasets(parts), origin
    return [row for part in parts for row in part], origin


def _split_files(path: Path) -> dict[str, list[Path]]:
    """Files by split: `train.csv`, or the shards `train-00000-of-00002.parquet`."""
    found: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        match = re.fullmatch(r"(\w+?)(-\d+-of-\d+)?", file.stem)
        if file.suffix.lower() in FORMATS and file.is_file() and match:
            found.setdefault(match[1], []).append(file)
    return found


def _hub_id(data: str | Path) -> bool:
    """Whether a name may be a hub id: `name`, `owner/name`, each with `:config`; never a Path."""
    if not isinstance(data, str) or Path(data).suffix.lower() in FORMATS:
        return False
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?", data) is not None


def _from_hub(name: str) -> Mapping[Any, Any]:
    repository, _, config = name.partition(":")
    try:
        found: Mapping[Any, Any] = datasets.load_dataset(repository, config or None)
        return found
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{name!r} is neither a file or directory here nor a data set that could be loaded "
            f"from the hub ({first_line(error)}). A configuration is named as 'id:config'."
        ) from error


def _siblings(path: Path) -> str:
    """Files nearby whose names look alike."""
    if not path.parent.is_dir():
        return ""
    return nearest(path.name, [p.name for p in path.parent.iterdir()])


# --- one shape for rows -------------------------------------------------------------------------


def _normalise(data: Any, limit: int | None, origin: str) -> Rows:
    """A `datasets.Dataset` without format, or a list of dicts; at most `limit` rows."""
    count = min(len(data), len(data) if limit is None else limit)
    if isinstance(data, datasets.Dataset) and data.format["type"] != "custom":
        # `with_format(columns=…)` hides columns on purpose: they stay hidden
        data = data.with_format(None).select_columns(data.format["columns"])
        return data if count == len(data) else data.select(range(count))
    rows = [_named(_as_mapping(_row(data, i, origin), i, origin), i, origin) for i in range(count)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


def _row(data: Any, number: int, origin: str) -> Any:
    """One row of a data set, whose code is the user's."""
    try:
        return data[number]
    except Exception as error:
        if isinstance(error, IRDError) or out_of_memory(error):
            raise
        raise DataError(
            f"Row {number} (counting from 0) of {origin}, which says that it has {len(data):,} "
            f"rows, could not be read: {type(error).__name__}: {first_line(error)}"
        ) from error


def _as_mapping(row: Any, number: int, origin: str) -> Mapping[Any, Any]:
    if isinstance(row, Mapping):
        return row
    if not (isinstance(row, (tuple, list)) and len(row) == 2):
        cure = ' A text is passed as {"text": …}.' if isinstance(row, str) else ""
        raise DataError(
            f"Row {number} (counting from 0) of {origin} has type {type(row).__name__}; each row "
            f"must be a dict or an (x, y) pair.{cure}"
        )
    x, label = row
    if isinstance(x, Mapping):
        return {**x, "label": label}
    key = "text" if isinstance(x, str) else "image" if is_picture(x) else POSITIONAL
    return {key: x, "label": label}


def _named(row: Mapping[Any, Any], number: int, origin: str) -> Mapping[str, Any]:
    """The row with its columns' names as text: tables without a header count theirs."""
    if all(isinstance(name, str) for name in row):
        return row
    named = {str(name): value for name, value in row.items()}
    if len(named) < len(row):
        raise DataError(
            f"Row {number} (counting from 0) of {origin} has two columns that read alike as text: "
            f"{', '.join(map(repr, row))}. Rename one."
        )
    return named


def _take(rows: Rows, wanted: Sequence[int]) -> Rows:
    if isinstance(rows, datasets.Dataset):
        return rows.select(wanted)
    return [rows[i] for i in wanted]
