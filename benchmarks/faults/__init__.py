"""Faults, one campaign a file: what machines and people do to a search and to its files.

    python -m benchmarks.faults                  all campaigns; half an hour
    python -m benchmarks.faults files inputs     these only

Each campaign tries a fault many times and counts how often what is promised was kept. Its rows go
to `benchmarks/results/faults.json`; the table of docs/reliability.md is made from that file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        fault: what was done.
        promise: what must be true then.
        tried: how often.
        held: how often it was true.
        figures: what was measured besides: "seconds, worst", "MB, worst".
        failures: what happened where it was not true, the first few.
    """

    fault: str
    promise: str
    tried: int
    held: int
    figures: Mapping[str, float] = field(default_factory=dict)
    failures: tuple[str, ...] = ()
