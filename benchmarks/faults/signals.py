"""SIGTERM and Ctrl-C at random moments."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.faults import Row
from benchmarks.faults.tiny import Bench, bench, command, left_over, same_files

PROMISE = (
    "exit code 143 or 130 within 10 s, nothing half-written, and the printed command goes on to "
    "the same bytes"
)


SECONDS = 10.0
"""A process ends within so many after its signal."""


def campaign() -> list[Row]:
    """The rows."""
    with bench() as b:
        return [stopped_by(b, number, times=50) for number in (signal.SIGTERM, signal.SIGINT)]


def stopped_by(b: Bench, number: signal.Signals, *, times: int, seed: int = 0) -> Row:
    """So many runs that get a signal before they are done."""
    draw, most = random.Random(seed), 0.8 * b.seconds
    slowest, wrong, tried = 0.0, list[str](), 0
    while tried < times:
        after = draw.uniform(0, most)
        stopped, seconds, text = _stopped(b, number, after)
        tried += stopped
        slowest = max(slowest, seconds)
        wrong += [f"after {after:.3f} s: {text}"] if text else []
    name = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C (SIGINT)"
    figures = {"seconds until it ended, worst": slowest}
    return Row(name, PROMISE, tried, tried - len(wrong), figures, tuple(wrong[:5]))


def _stopped(b: Bench, number: signal.Signals, after: float) -> tuple[bool, float, str]:
    """(whether the signal came in time, seconds until the end, what went wrong)."""
    with TemporaryDirectory(dir=b.place) as folder:
        output = Path(folder) / "with a space"
        words = command(b.place, output)
        ended = b.runner.run(words, send=number, after=after)
        if ended.code == 0:
            return False, ended.after, ""
        begun = (output / "config.yaml").exists()
        if ended.code != 128 + number or ended.after > SECONDS:
            return True, ended.after, f"code {ended.code}: {ended.err[-300:]}"
        goes_on = f"Go on with: ird-search resume '{output}'"
        if begun and goes_on not in ended.err:
            return True, ended.after, f"no command is printed: {ended.err[-300:]}"
        if output.exists() and (found := [f for f in left_over(output) if f.endswith(".tmp")]):
            return True, ended.after, f"{', '.join(found)} are left over"
        if not (output / "mask.safetensors").exists():
            again = b.runner.run(["resume", output] if begun else words)
            if again.code:
                return True, ended.after, f"the resume ended with {again.code}: {again.err[-300:]}"
        return True, ended.after, ", ".join(same_files(output, b.whole))
