"""kill -9: at random moments, and at every place where something is about to be lost."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.faults import Row
from benchmarks.faults.runner import STARTS
from benchmarks.faults.tiny import Bench, bench, command, left_over, same_files
from ird_search.crash import POINTS, VARIABLE

KILLED = 128 + 9
MOST = 20
"""Kills of one run. Where each comes before a slow start is over, it would never be done."""
PROMISE = "resumes finish with the same bytes; at most one unit is lost per killed process"


def campaign() -> list[Row]:
    """The rows."""
    with bench() as b:
        return [at_random(b, times=200), at_points(b, again=True)]


def at_random(b: Bench, *, times: int, seed: int = 0) -> Row:
    """So many kills at random moments; a run is taken up again until it is done."""
    draw, most, runs = random.Random(seed), 0.8 * b.seconds, list[Survived]()
    moments = (Fault({}, after=draw.uniform(0, most)) for _ in itertools.count())
    while sum(run.killed for run in runs) < times:
        runs.append(_survived(b, itertools.islice(moments, MOST)))
    return _row("kill -9 at a random moment", runs)


def at_points(b: Bench, *, again: bool = False) -> Row:
    """One run that is killed at every named point in turn.

    Args:
        again: then one run for each point, killed when it is passed first, second, third, …
    """
    chains: list[Iterable[Fault]] = [[Fault({VARIABLE: point}) for point in POINTS]]
    chains += [map(partial(_at, point), itertools.count(1)) for point in POINTS if again]
    runs = [_survived(b, chain) for chain in chains]
    return _row(f"kill -9 at each of {len(POINTS)} named points", runs)


@dataclass(frozen=True)
class Fault:
    """What ends a process before it is done."""

    env: Mapping[str, str]
    after: float | None = None


@dataclass(frozen=True)
class Survived:
    """What became of one run.

    Args:
        killed: processes that were.
        lost: units that were begun more than once.
        wrong: what was promised and is not so; empty where all is.
    """

    killed: int
    lost: int
    wrong: str


def _at(point: str, n: int) -> Fault:
    return Fault({VARIABLE: f"{point}:{n}"})


def _row(fault: str, runs: Sequence[Survived]) -> Row:
    killed, lost = sum(run.killed for run in runs), sum(run.lost for run in runs)
    wrong = [run.wrong for run in runs if run.wrong]
    figures = {"runs": len(runs), "units lost per killed process": lost / max(1, killed)}
    return Row(fault, PROMISE, killed, killed - len(wrong), figures, tuple(wrong[:5]))


def _survived(b: Bench, faults: Iterable[Fault]) -> Survived:
    """Kill one run by each fault in turn, taking it up again, and look at what it comes to."""
    killed, fault = 0, Fault({})
    with TemporaryDirectory(dir=b.place) as folder:
        output, starts = Path(folder) / "run", Path(folder) / "starts"
        for fault in itertools.chain(faults, [Fault({})]):
            if (output / "mask.safetensors").exists():
                break
            begun = (output / "config.yaml").exists()
            words = ["resume", str(output)] if begun else command(b.place, output)
            ended = b.runner.run(words, env={STARTS: str(starts), **fault.env}, after=fault.after)
            killed += ended.code == KILLED
            if ended.code not in (0, KILLED):
                return Survived(killed, 0, f"{fault}: code {ended.code}: {ended.err[-300:]}")
        wrong = [f"{name} differs" for name in same_files(output, b.whole)]
        wrong += [f"{name} is left over" for name in left_over(output)] * (ended.code == 0)
        units = sum(1 for p in output.glob("ledger/*.json") if not p.name.startswith("fisher-"))
        lost = (starts.stat().st_size if starts.exists() else 0) - units
        if lost > killed:
            wrong.append(f"{lost} units were begun twice, but {killed} processes killed")
        return Survived(killed, lost, f"last {fault}: {'; '.join(wrong)}" if wrong else "")
