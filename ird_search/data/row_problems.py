"""`RowProblems`: everything that is wrong with the rows of one source, told at once."""

from __future__ import annotations

from collections.abc import Sequence

from ird_search.errors import DataError

SHOWN = 10
"""Bad rows that a message lists."""


class RowProblems:
    """What is wrong with the rows, gathered so that all of it is told at once.

    Args:
        origin: where the rows came from.
        ids: the number of each row there; its position by default.
    """

    def __init__(self, origin: str, ids: Sequence[int] | None = None) -> None:
        self.origin, self.ids = origin, ids
        self.whole: list[str] = []
        self.rows: dict[int, str] = {}

    def add(self, row: int, text: str) -> None:
        """One problem of one row; the first that is found stands for it."""
        self.rows.setdefault(row, text)

    def raise_any(self) -> None:
        if not self.rows and not self.whole:
            return
        raise DataError([*self.whole, *self._told()])

    def _told(self) -> list[str]:
        """The rows in one text, and what is wrong with all of them only once."""
        numbers = {row: row if self.ids is None else self.ids[row] for row in sorted(self.rows)}
        reasons = set(self.rows.values())
        if len(reasons) == 1 < len(numbers):
            listed = ", ".join(map(str, list(numbers.values())[:SHOWN]))
            more = f" and {len(numbers) - SHOWN} more" if len(numbers) > SHOWN else ""
            return [
                f"{len(numbers)} rows of {self.origin} cannot be used: {reasons.pop()} "
                f"(rows {listed}{more}, counting from 0)"
            ]
        lines = [f"row {number}: {self.rows[row]}" for row, number in numbers.items()]
        if len(lines) == 1:
            return [f"{self.origin}, {lines[0].replace(':', ' (counting from 0):', 1)}"]
        if not lines:
            return []
        shown = lines[:SHOWN] + ([f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else [])
        head = f"{len(lines)} rows of {self.origin} cannot be used (counting from 0):"
        return ["\n    ".join([head, *shown])]


def too_long(count: int, most: int, reader: str = "model") -> str:
    """What is wrong with a text of so many tokens, and what to do."""
    cure = f"max_length={most} (--max-length {most}) cuts"
    return f"{count} tokens, but the {reader} takes {most}; {cure}"
