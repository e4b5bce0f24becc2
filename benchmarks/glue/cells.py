"""Cells: what one method did on one task at one density, kept as JSON."""

from __future__ import annotations

import fcntl
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.glue.bench import Bench
from benchmarks.glue.judging import Line
from benchmarks.record import RESULTS
from ird_search.environment import environment
from ird_search.files import write_atomically

FOLDER = RESULTS / "glue"


@dataclass(frozen=True)
class Cell:
    """One line of one experiment.

    Args:
        density: that was asked for; None where a method has its own.
        setting: what else tells it from others of its experiment.
        choose, tuned: loss on the rows that choose after a proxy's steps, and after those of the
            final fine-tunes; None where that failed.
        losses, metric: on the rows of the verdict, one for each seed.
        over: gain over others in mean loss, [mean, half width of its 95% interval].
        figures: what else was found.
    """

    experiment: str
    method: str
    density: float | None
    parameters: int
    samples: int | None
    steps: int
    rate: float
    choose: float | None
    tuned: float | None
    losses: tuple[float, ...]
    metric: tuple[float, ...]
    fine_tunes: int
    seconds: float
    setting: dict[str, Any] = field(default_factory=dict)
    over: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    failure: str = ""

    @classmethod
    def of(
        cls,
        bench: Bench,
        line: Line,
        *,
        experiment: str,
        method: str,
        density: float | None,
        steps: int | None = None,
        setting: Mapping[str, Any] | None = None,
        rivals: Mapping[str, Line] | None = None,
    ) -> Cell:
        """What is worth keeping of a line."""
        metric = bench.problem.task.metric
        gains = {name: line.over(rival) for name, rival in (rivals or {}).items()}
        return cls(
            experiment=experiment,
            method=method,
            density=density,
            parameters=line.candidate.count,
            samples=line.candidate.samples,
            steps=steps or bench.final_steps,
            rate=line.tuned.best.rate,
            choose=_told(line.proxy.score),
            tuned=_told(line.tuned.score),
            losses=tuple(round(t.loss, 5) for t in line.trials if t.ok),
            metric=tuple(round(t.metrics[metric], 5) for t in line.trials if t.ok),
            fine_tunes=line.cost.fine_tunes,
            seconds=round(line.cost.seconds, 1),
            setting=dict(setting or {}),
            over={
                name: (round(g.mean, 5), _told(g.half_width))
                for name, g in gains.items()
                if math.isfinite(g.mean)
            },
            figures=line.figures,
            failure=line.failure,
        )

    @property
    def name(self) -> str:
        """Its key."""
        density = "" if self.density is None else f" @ {self.density:g}"
        setting = "".join(f", {key} {value}" for key, value in sorted(self.setting.items()))
        return f"{self.experiment}: {self.method}{setting}{density}, {self.steps} steps"


Keep = Callable[[Cell], None]
"""What is done with each cell as it is there."""


def _told(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None


class Results:
    """The cells of a task in one file, which several processes may write to.

    Args:
        ledger: the folder where they take turns.
    """

    def __init__(self, folder: Path, bench: Bench, ledger: Path) -> None:
        self.path, self.lock = folder / f"{bench.task}.json", ledger / "results.lock"
        p, c = bench.problem, bench.config
        self.setup = {
            "candidates": p.space.numel,
            "train": len(p.train),
            "choose": len(p.choose),
            "verdict": len(p.verdict),
            "metric": p.task.metric,
            "pool": c.rows(len(p.train)),
            "batch": c.batch_size,
            "proxy_steps": c.proxy_steps,
            "rounds": c.rounds,
            "seed": c.seed,
        }

    def put(self, cell: Cell) -> None:
        """Add a cell, or replace the one of its name."""
        with self._locked():
            cells = cells_of(self.path)
            cells[cell.name] = asdict(cell)
            whole = {
                "setup": self.setup,
                "environment": environment(),
                "cells": dict(sorted(cells.items())),
            }
            text = json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False)
            write_atomically(self.path, f"{text}\n".encode())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.lock, "ab") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            yield


def cells_of(path: Path) -> dict[str, dict[str, Any]]:
    """All cells of a file, by name."""
    return json.loads(path.read_text(encoding="utf-8"))["cells"] if path.exists() else {}
