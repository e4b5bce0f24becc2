"""Bad input: whatever is wrong with data, labels or weights is told before any work.

Every file is handed to `ird-search run` on a tiny model. A bad one must end with the right exit
code and one message with the file and the row, before the model has run and with nothing written;
what is unusual and sound must work. The same rows come through Python as lists and data sets, and
numbers that are not finite come out of the model, out of a fine-tune, and in the weights.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
from torch.utils.data import Dataset

from benchmarks.faults import Row
from benchmarks.faults.bad_files import cases
from benchmarks.faults.cases import (
    Case,
    Rows,
)
from benchmarks.faults.not_finite import fine_tunes, samples, weights
from benchmarks.faults.trial import Outcome, Place, kept, outcome, tried
from ird_search import search_mask
from ird_search.errors import IRDError
from tests.toy import QUICK


def processes(place: Place, wanted: Sequence[Case]) -> Row:
    """Some cases as commands of their own: imports included."""
    failures, seconds = [], []
    for case in wanted:
        words, output = place.words(case) or ([], Path())
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "ird_search.cli", *words], capture_output=True, text=True
        )
        seconds.append(time.perf_counter() - began)
        became = Outcome(done.returncode, done.stderr, done.stdout, 0.0, 0, output.exists())
        crash = "Traceback" in done.stderr or "Exception ignored" in done.stderr
        if bad := "a traceback" if crash else kept(case, became):
            failures.append(f"{case.name}: {bad}: {done.stderr[-300:]}")
    return Row(
        "bad files, each in a process of its own",
        "as above",
        len(wanted),
        len(wanted) - len(failures),
        {"seconds with imports, worst": max(seconds)},
        tuple(failures[:8]),
    )


class Listed(Dataset):  # type: ignore[type-arg]
    """A torch data set over rows."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.rows[i]


def from_python(place: Place, wanted: Iterable[Case]) -> Row:
    """The rows as a list, a torch data set and a `datasets.Dataset`: the same messages."""
    count, failures = 0, []
    settings = {k.replace("-", "_"): v for k, v in QUICK.items()} | {"density": 0.02}
    for case in wanted:
        if case.rows is None or case.works or case.options or case.huge:
            continue
        suffix = case.name.rpartition(", ")[2]
        if suffix not in ("jsonl", "parquet") or (became := outcome(place, case)) is None:
            continue
        ways: list[Any] = [case.rows, Listed(case.rows)]
        if suffix == "parquet":
            ways = [datasets.Dataset.from_list(case.rows)]
        for data in ways:
            count += 1
            said = ""
            try:
                search_mask(place.root / case.model, data, **settings)
            except IRDError as error:
                said = f"ird-search: {error}"
            if said != became.said.strip().replace(f"data.{suffix}", f"a {type(data).__name__}"):
                failures.append(f"{case.name} as {type(data).__name__}: {said[:150]!r}")
    return Row(
        "bad rows from Python: lists, torch and datasets data sets",
        "the message of the same rows in a file",
        count,
        count - len(failures),
        failures=tuple(failures[:8]),
    )


def campaign() -> list[Row]:
    """Everything."""
    with tempfile.TemporaryDirectory() as folder:
        place, all_cases = Place(Path(folder)), cases()
        bad = [case for case in all_cases if not case.works and not case.huge]
        return [
            *tried(place, all_cases),
            processes(place, bad[::24]),
            from_python(place, bad),
            *samples(),
            *fine_tunes(place),
            weights(place),
        ]
