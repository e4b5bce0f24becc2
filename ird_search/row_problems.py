"""`RowProblems`: everything that is wrong with a source's rows, told at once."""

from __future__ import annotations

from ird_search.errors import DataError
from ird_search.sources import Source

SHOWN = 10
"""Bad rows that a message lists."""


class RowProblems:
    """What is wrong with the rows, gathered so that all of it is told at once."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.whole: list[str] = []
        self.rows: dict[int, str] = {}

    def add(self, row: int, text: str) -> None:
        """One problem of one row; the first that is found stands for it."""
        self.rows.setdefault(row, text)

    def raise_any(self) -> None:
        if not self.rows and not self.whole:
            return
        lines = [f"row {self.source.ids[row]}: {self.rows[row]}" for row in sorted(self.rows)]
        if len(lines) == 1:
            told = [f"{self.source.origin}, {lines[0].replace(':', ' (counting from 0):', 1)}"]
        elif lines:
            shown = lines[:SHOWN] + (
                [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
            )
            head = f"{len(lines)} rows of {self.source.origin} cannot be used (counting from 0):"
            told = ["\n    ".join([head, *shown])]
        else:
            told = []
        raise DataError([*self.whole, *told])
