"""How often a promise was kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from benchmarks.faults import Row
from ird_search.errors import ArtifactError, IRDError


@dataclass
class Count:
    """How often a promise was kept, and what happened where it was not."""

    tried: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, what: str, problem: str) -> None:
        """One more trial; `problem` is empty where the promise was kept."""
        self.tried += 1
        if problem:
            self.failures.append(f"{what}: {' '.join(problem.split())[:300]}")

    def row(self, fault: str, promise: str, figures: Mapping[str, float] | None = None) -> Row:
        """The line of the table."""
        held = self.tried - len(self.failures)
        return Row(fault, promise, self.tried, held, figures or {}, tuple(self.failures[:10]))


def unlike(call: Callable[[], object], *words: str, error: type[Exception] = ArtifactError) -> str:
    """What keeps a call from ending in this error, with these words in it; empty for nothing."""
    try:
        found = call()
    except error as raised:
        lacking = [word for word in words if word not in str(raised)]
        return f"its error does not say {lacking}: {raised}" if lacking else ""
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return f"was accepted as {found!r}"


def ends(call: Callable[[], object]) -> str:
    """What is wrong with how a call ends that may succeed or be refused; empty for nothing."""
    try:
        call()
    except IRDError:
        return ""
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return ""
