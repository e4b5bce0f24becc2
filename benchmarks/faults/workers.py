"""Several processes on one run, some of them killed or stopped: tiny units, and whole runs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.faults import Row
from benchmarks.faults.tiny import command, same_files, tiny_problem
from ird_search.ledger import Ledger

WORKER = """
import json, os, sys, time
from pathlib import Path
from ird_search.ledger import Job, Ledger, Unit, unit_key
folder, units = Path(sys.argv[1]), int(sys.argv[2])

def job(i):
    def do():
        with open(folder / "begun", "ab") as file:
            file.write(f"{os.getpid()} {i}\\n".encode())
        time.sleep(0.001)
        return Unit({"i": i, "by": os.getpid()})
    return Job("proxy", unit_key({"i": i}), do)

print("ready", flush=True)
sys.stdin.readline()
told = []
found = Ledger(folder / "ledger", lease=1.0).finish(
    [job(i) for i in range(units)], on_done=lambda key, unit: told.append(unit.result["i"])
)
print(json.dumps({"found": [u.result["i"] for u in found], "told": sorted(told)}), flush=True)
"""


def campaign() -> list[Row]:
    """The rows."""
    with tiny_problem() as place:
        return [tiny_units(rounds=20), *whole_runs(place, runs=10)]


def tiny_units(*, rounds: int, units: int = 100, processes: int = 4) -> Row:
    """So many rounds, in each of which two processes are killed or stopped."""
    draw = random.Random(0)
    found = [_tiny_units(processes, units, draw) for _ in range(rounds)]
    wrong = [text for text, _, _ in found if text]
    killed, twice = sum(k for _, k, _ in found), sum(t for _, _, t in found)
    figures = {"killed or stopped": killed, "units begun twice": twice}
    promise = "no unit is lost or told twice, none of the others fails, each holds all results"
    fault = f"{processes} processes on {units} tiny units, two of them killed or stopped"
    return Row(fault, promise, rounds, rounds - len(wrong), figures, tuple(wrong[:5]))


def _tiny_units(count: int, units: int, draw: random.Random) -> tuple[str, int, int]:
    """(what went wrong, processes killed or stopped, units begun more than once)."""
    with TemporaryDirectory() as folder:
        processes = [_started(folder, units) for _ in range(count)]
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        victims = draw.sample(processes, 2)
        for process, number in zip(victims, (signal.SIGKILL, signal.SIGSTOP), strict=True):
            time.sleep(draw.uniform(0, 0.05))
            process.send_signal(number)
        wrong = []
        for process in processes:
            if process not in victims:
                wrong += _told(process.communicate(timeout=120)[0], process.returncode, units)
        victims[1].send_signal(signal.SIGCONT)
        wrong += _told(victims[1].communicate(timeout=120)[0], victims[1].returncode, units)
        victims[0].communicate()
        there = sorted(u.result["i"] for u in Ledger(Path(folder) / "ledger").finished("proxy"))
        wrong += ["units are missing"] if there != list(range(units)) else []
        begun = Counter(
            line.split()[1] for line in (Path(folder) / "begun").read_text().splitlines()
        )
        twice = sum(times - 1 for times in begun.values())
        wrong += [f"{twice} units were done twice"] if twice > 2 else []
    return "; ".join(wrong), 2, twice


def _started(folder: str, units: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, folder, str(units)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def _told(out: str, code: int, units: int) -> list[str]:
    """What is wrong with what a process says at its end."""
    everything = list(range(units))
    if code:
        return [f"a process ended with {code}"]
    said = json.loads(out)
    return [f"{name} is not all" for name, found in said.items() if found != everything]


# --- whole runs -----------------------------------------------------------------------------------


def whole_runs(place: Path, *, runs: int) -> list[Row]:
    """1, 2 and 4 workers in strict mode; then 3, of which one is killed or stopped."""
    draw, whole = random.Random(0), place / "whole"
    assert _run(place, whole, 1, None, draw)[0] == 0
    wrong = []
    for workers in (2, 4):
        code, _ = _run(place, place / f"of {workers}", workers, None, draw)
        if code or same_files(place / f"of {workers}", whole):
            wrong.append(f"{workers} workers: code {code}")
    promise = "the same bytes in strict mode"
    rows = [Row("1, 2 and 4 workers", promise, 3, 3 - len(wrong), {}, tuple(wrong))]
    wrong, hit = [], 0
    for i in range(2 * runs):
        number = (signal.SIGKILL, signal.SIGSTOP)[hit % 2]
        output = place / f"victim {i}"
        code, was_hit = _run(place, output, 3, number, draw)
        hit += was_hit
        if code or same_files(output, whole):
            wrong.append(f"{number.name}: code {code}: {same_files(output, whole)}")
        if hit == runs:
            break
    promise = "the run comes to the same bytes"
    fault = "a worker of three is killed or stopped"
    return [*rows, Row(fault, promise, hit, hit - len(wrong), {}, tuple(wrong))]


def _run(
    place: Path, output: Path, workers: int, number: signal.Signals | None, draw: random.Random
) -> tuple[int, bool]:
    """(exit code of a run, whether one of its workers got the signal before it was done)."""
    words = [*command(place, output, workers=str(workers), proxy_steps="20"), "--strict"]
    with subprocess.Popen(
        [sys.executable, "-m", "ird_search.cli", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        victim = None if number is None else _child_of(process, draw)
        try:
            if victim is not None and number is not None:
                os.kill(victim, number)
        except ProcessLookupError:  # the run was faster
            victim = None
        return process.wait(timeout=300), victim is not None


def _child_of(process: subprocess.Popen[bytes], draw: random.Random) -> int | None:
    """A worker of a run, some time after it was started; None if the run was faster."""
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        children = [int(pid) for pid in path.read_text().split()] if path.exists() else []
        work = [pid for pid in children if b"spawn_main" in _words(pid)]
        if work:
            time.sleep(draw.uniform(0.1, 5))
            return draw.choice(work)
        time.sleep(0.02)
    return None


def _words(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
