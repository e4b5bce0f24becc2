"""`Status`: where the run in a directory stands, read from its files alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ird_search.errors import UsageError
from ird_search.rundir import RunDirectory, read_config, resume_command
from ird_search.unitfiles import UnitKind, read_unit

NAMES: dict[str, str] = {
    "proxy": "fine-tunes",
    "narrowing": "narrowings",
    "fisher": "chunks of a Fisher pass",
    "head": "warmed-up head",
    "check": "check of the samples",
    "answers": "pool that the trained mask was asked about",
}
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
            what = f"lacks {place.config.name}" if place.path.exists() else "does not exist"
            raise UsageError(f"{path} is no run directory: it {what}.")
        settings, process = read_config(place.config), place.process()
        if lacking := [key for key in ("model", "data") if not settings.get(key)]:
            raise UsageError(
                f"{place.config} lacks {' and '.join(lacking)}. Put it back, or run the command "
                "that began the run again."
            )
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
        units = ", ".join(f"{n} {NAMES[k]}" for k, n in self.units.items() if n) or "none"
        lines = [
            f"{self.directory}: {state}",
            f"  {self.settings.get('model')} on {self.settings.get('data')}, "
            f"{self.settings.get('strategy')}, density {self.settings.get('density')}",
            f"  finished units: {units}" + f"; {self.damaged} damaged" * bool(self.damaged),
        ]
        for reason, times in self.failures.items():
            lines.append(f"  failed {'once' if times == 1 else f'{times} times'}: {reason}")
        for done in self.rounds:
            lines.append(f"  round {done['round']}: moved to {_moved(done)}")
        if self.state == "finished":
            lines.append(f"  mask: {RunDirectory(Path(self.directory)).mask}")
        elif self.command:
            lines.append(f"Go on with: {self.command}")
        elif self.state == "unfinished":
            lines.append("Go on: run the program again, with the same arguments and output.")
        return "\n".join(lines)


def _moved(done: Mapping[str, Any]) -> str:
    """The pair that a round moved to, in words."""
    there = next(n for n in done["nominated"] if n["moved_to"])
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
