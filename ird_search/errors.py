"""Errors a caller may want to catch. Each carries the exit code of the command line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_OUT_OF_MEMORY = re.compile(
    "out of memory|can('|no)t allocate memory|failed to map segment|_ALLOC_FAILED|bad_alloc|"
    "can't start new thread|failed to launch worker thread|could not create a primitive$",
    re.IGNORECASE,
)


class IRDError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        problems: one sentence, or all sentences at once when several things are wrong. Each says
            what came, what is accepted, and what to do.
    """

    exit_code = 1

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: tuple[str, ...] = (
            (problems,) if isinstance(problems, str) else tuple(problems)
        )
        super().__init__(self._text())

    def _text(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        lines = (p.replace("\n", "\n    ") for p in self.problems)
        return "\n".join([f"{len(self.problems)} problems:", *(f"  - {line}" for line in lines)])


class UsageError(IRDError, ValueError):
    """A setting, option or argument is wrong."""

    exit_code = 2


class DataError(IRDError, ValueError):
    """The samples cannot be used as they are."""

    exit_code = 3


class ModelError(IRDError, ValueError):
    """The model cannot be used as it is."""

    exit_code = 4


class ArtifactError(IRDError, ValueError):
    """A mask or delta file is damaged, hostile, or belongs to another model."""

    exit_code = 5


class NoProxySucceeded(IRDError, RuntimeError):
    """Every proxy of the search failed; the reasons are listed."""

    exit_code = 6


class ResourceError(IRDError, RuntimeError):
    """The machine ran out of memory or disk; the run can be continued."""

    exit_code = 75


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's own error, or what torch, the system or its loader say.

    Without memory there is no room for a thread's stack either.
    """
    if isinstance(error, IRDError):  # which tells of it, and what to do
        return False
    return isinstance(error, MemoryError) or (
        isinstance(error, Exception) and _OUT_OF_MEMORY.search(str(error)) is not None
    )


def first_line(error: BaseException) -> str:
    """What an error says, in one line: its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(word: str, choices: Iterable[str]) -> str:
    """`' Did you mean 'label'?'` for a mistyped word, or an empty string."""
    close = difflib.get_close_matches(word, list(choices), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
