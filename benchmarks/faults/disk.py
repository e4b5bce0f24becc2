"""A disk that is full at any size, directories that cannot be written, and awkward names."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.faults import Row
from benchmarks.faults.runner import Runner
from benchmarks.faults.tiny import command, same_files, tiny_problem

FULL = 75
NAMES = (
    "with a space",
    "ünïcödé 模型",
    "quote'and\"quote",
    "-dash",
    "a\nline",
    "x" * 200,
    "%s {} $HOME",
)

OVERWRITE = """
import resource, sys
from pathlib import Path
import torch
from ird_search import SparseMask, save_mask
from ird_search.errors import ResourceError
from ird_search.parameters import ParameterSpace
space = ParameterSpace(("w",), ((1000, 100),))
path = Path(sys.argv[1])
save_mask(path, SparseMask(space, torch.arange(0, 100_000, 100)))
old = path.read_bytes()
new = SparseMask(space, torch.arange(0, 100_000, 90))
wrong = 0
for size in range(0, len(old) + 600, max(1, len(old) // int(sys.argv[2]))):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        save_mask(path, new)
        break
    except ResourceError:
        wrong += path.read_bytes() != old or len(list(path.parent.iterdir())) != 1
    print(size, wrong, flush=True)
"""


def campaign(*, sizes: int = 60, cuts: int = 200) -> list[Row]:
    """The rows.

    Args:
        sizes: of the largest file that a run may write.
        cuts: of the largest file that a mask may be written over.
    """
    with tiny_problem() as place, Runner() as runner:
        whole = place / "whole"
        ended = runner.run(command(place, whole))
        assert ended.code == 0, ended.err
        return [
            _full(runner, place, whole, sizes),
            _overwritten(place, cuts),
            _named(runner, place, whole),
            _unwritable(runner, place),
            _two_at_once(runner, place, whole),
        ]


def _full(runner: Runner, place: Path, whole: Path, sizes: int) -> Row:
    """No file may grow beyond a limit, which rises until the run gets through."""
    largest = max(p.stat().st_size for p in whole.rglob("*") if p.is_file())
    wrong, tried = list[str](), 0
    for i in range(sizes):
        limit = int(largest * i / sizes)
        with TemporaryDirectory(dir=place) as folder:
            output = Path(folder) / "run"
            ended = runner.run(command(place, output), limits={"FSIZE": limit})
            if ended.code == 0:
                continue
            tried += 1
            text = _stopped_well(ended.code, ended.err, output)
            begun = (output / "config.yaml").exists()
            again = runner.run(["resume", output] if begun else command(place, output))
            if again.code:
                text += f"the resume ended with {again.code}: {again.err[-300:]}"
            text += ", ".join(same_files(output, whole))
            wrong += [f"at {limit:,} bytes: {text}"] if text else []
    promise = "code 75 and what to do; no mask; once there is room, a resume gives the same bytes"
    return Row("disk full, at any size", promise, tried, tried - len(wrong), {}, tuple(wrong[:5]))


def _stopped_well(code: int, err: str, output: Path) -> str:
    if code != FULL or "Traceback" in err or "Make room" not in err:
        return f"code {code}: {err[-300:]} "
    return "there is a mask " if (output / "mask.safetensors").exists() else ""


def _overwritten(place: Path, cuts: int) -> Row:
    with TemporaryDirectory(dir=place) as folder:
        path = Path(folder) / "mask.safetensors"
        done = subprocess.run(
            [sys.executable, "-c", OVERWRITE, str(path), str(cuts)],
            capture_output=True,
            text=True,
            check=True,
        )
    tried, wrong = len(done.stdout.splitlines()), int(done.stdout.split()[-1])
    promise = "the old file stays, byte for byte, with nothing beside it"
    return Row("disk full while a mask is replaced", promise, tried, tried - wrong)


def _named(runner: Runner, place: Path, whole: Path) -> Row:
    wrong = []
    for name in NAMES:
        with TemporaryDirectory(dir=place) as folder:
            root = Path(folder) / name
            root.mkdir()
            (root / "model").symlink_to(place / "model")
            (root / "rows.csv").symlink_to(place / "rows.csv")
            ended = runner.run(command(root, root / "run"))
            if ended.code or same_files(root / "run", whole)[:1] == ["mask.safetensors"]:
                wrong.append(f"{name!r}: code {ended.code}: {ended.err[-300:]}")
    promise = "it works, and gives the same mask"
    return Row(
        "spaces, Unicode, quotes and line ends in paths",
        promise,
        len(NAMES),
        len(NAMES) - len(wrong),
        {},
        tuple(wrong),
    )


def _unwritable(runner: Runner, place: Path) -> Row:
    """Where nothing can be written, said before the model is loaded or right after."""
    (place / "file").write_text("mine")
    places: dict[str, Callable[[], Path]] = {
        "a file": lambda: place / "file",
        "below a file": lambda: place / "file" / "run",
        "a directory of others": lambda: place / "model",
        "/proc": lambda: Path("/proc/run"),
        "a name that is too long": lambda: place / ("x" * 300),
    }
    wrong, slowest = [], 0.0
    for name, where in places.items():
        began = time.monotonic()
        ended = runner.run(command(place, where()))
        slowest = max(slowest, time.monotonic() - began)
        if ended.code != 2 or "Traceback" in ended.err or "ird-search: " not in ended.err:
            wrong.append(f"{name}: code {ended.code}: {ended.err[-300:]}")
    promise = "code 2, said in a sentence; nothing is touched"
    figures = {"seconds, worst": slowest}
    return Row(
        "an output directory that cannot be used",
        promise,
        len(places),
        len(places) - len(wrong),
        figures,
        tuple(wrong),
    )


def _two_at_once(runner: Runner, place: Path, whole: Path) -> Row:
    """A second run while the first has its directory."""
    output, wrong, tried = place / "both", list[str](), 3
    first = subprocess.Popen(
        [sys.executable, "-m", "ird_search.cli", *command(place, output, proxy_steps="1")],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for _ in _until(lambda: (output / "run.json").exists() or first.poll() is not None):
        pass
    for words in (command(place, output), ["resume", output], [*command(place, output), "--fresh"]):
        first.send_signal(19)
        ended = runner.run(words)
        first.send_signal(18)
        if ended.code != 2 or str(first.pid) not in ended.err:
            wrong.append(f"{words[0]}: code {ended.code}: {ended.err[-300:]}")
    if first.wait() or same_files(output, whole):
        wrong.append("the first run did not come to the same bytes")
    promise = "the second is refused and told which process writes; the first is not disturbed"
    return Row("two runs in one directory", promise, tried, tried - len(wrong), {}, tuple(wrong))


def _until(condition: Callable[[], bool], seconds: float = 60) -> Iterator[None]:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.005)
        yield
