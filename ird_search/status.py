"""`Status`: where the run in a directory stands, read from its files alone."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ird_search.errors import UsageError
from ird_search.rundir import RunDirectory, read_config
from ird_search.unitfiles import UnitKind, read_unit

State = Literal["finished", "running", "unfinished"]


@dataclass(frozen=True)
class Status:
    """Where a run stands.

    Args:
        process: the process that is writing, if one is.
        units: finished units in the ledger by kind.
        damaged: files of units that cannot be read and will be done again.
        failures: reasons of failed fine-tunes, with how often each came.
        rounds: the records of the rounds that have ended.
        command: what takes the run up again; empty where it cannot be (a model without a path).
    """

    directory: str
    state: State
    process: int | None
    settings: Mapping[str, Any]
    units: Mapping[str, int]
    damaged: int
    failures: Mapping[str, int]
    rounds: tuple[Mapping[str, Any], ...]
    command: str

    @classmethod
    def of(cls, path: str | Path) -> Status:
        """Read a run directory. Nothing is written.

        Raises:
            UsageError: it is none.
        """
        place = RunDirectory(Path(path))
        if not place.config.is_file():
            raise UsageError(f"{path} is no run directory: it lacks {place.config.name}.")
        settings, process = read_config(place.config), place.process()
        done = place.mask.is_file()
        units, damaged, failures = _units(place.ledger)
        return cls(
            directory=str(path),
            state="running" if process is not None else "finished" if done else "unfinished",
            process=process,
            settings=settings,
            units=units,
            damaged=damaged,
            failures=failures,
            rounds=_rounds(place),
            command="" if done or process is not None else resume_command(path, settings),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def describe(self) -> str:
        """A few lines for a person."""
        state = f"running (process {self.process})" if self.process is not None else self.state
        units = ", ".join(f"{n} {kind}" for kind, n in self.units.items() if n) or "none"
        lines = [
            f"{self.directory}: {state}",
            f"  {self.settings.get('model')} on {self.settings.get('data')}, "
            f"{self.settings.get('strategy')}, density {self.settings.get('density')}",
            f"  finished units: {units}" + f"; {self.damaged} damaged" * bool(self.damaged),
        ]
        for reason, times in self.failures.items():
            lines.append(f"  failed {times} times: {reason}")
        for done in self.rounds:
            lines.append(f"  round {done['round']}: moved to {_moved(done)}")
        if self.command:
            lines.append(f"Go on with: {self.command}")
        return "\n".join(lines)


def resume_command(path: str | Path, settings: Mapping[str, Any]) -> str:
    """The command that takes an unfinished run up again.

    Empty where model or data were objects of a Python program, which has to be run again.
    """
    named = [settings.get(key) for key in ("model", "data", "eval_data", "processor")]
    if any(str(name).startswith("<") for name in named):
        return ""
    return f"ird-search resume {shlex.quote(str(path))}"


def _moved(done: Mapping[str, Any]) -> str:
    """The pair that a round moved to, in words."""
    there = next(n for n in done["nominated"] if n["move"] == done["moved_to"])
    score = "failed" if there["score"] is None else f"{there['score']:.4f}"
    size = f"{there['samples']} × {there['parameters']:,}"
    return f"{there['move']} {size}, {score} at rate {there['learning_rate']:g}"


def _units(directory: Path) -> tuple[dict[str, int], int, dict[str, int]]:
    """(finished units by kind, damaged ones, reasons of failed fine-tunes)."""
    units, damaged, failures = dict.fromkeys(get_args(UnitKind), 0), 0, dict[str, int]()
    for path in sorted(directory.glob("*.json")):
        kind, found = path.name.partition("-")[0], read_unit(path)
        if found is None:
            damaged += path.exists()  # a run may have taken it away meanwhile
            continue
        units[kind] = units.get(kind, 0) + 1
        if kind == "proxy" and (reason := found[0]["result"]["trial"]["failure"]):
            failures[reason] = failures.get(reason, 0) + 1
    return units, damaged, failures


def _rounds(place: RunDirectory) -> tuple[dict[str, Any], ...]:
    if not place.rounds.is_file():
        return ()
    try:
        return tuple(json.loads(line) for line in place.rounds.read_text().splitlines())
    except ValueError:  # written whole or not at all: someone edited it
        return ()
