"""A disk that is full at any size, directories that cannot be written, and awkward names."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.faults import Row
from benchmarks.faults.tiny import Bench, bench, command, same_files

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


def campaign() -> list[Row]:
    """The rows."""
    with bench() as b:
        return [
            full(b, sizes=60),
            overwritten(cuts=200),
            named(b, NAMES),
            unwritable(b),
            two_at_once(b),
        ]


def full(b: Bench, *, sizes: int) -> Row:
    """No file may grow beyond a limit, which rises until the run gets through."""
    largest = max(p.stat().st_size for p in b.whole.rglob("*") if p.is_file())
    wrong, tried = list[str](), 0
    for i in range(sizes):
        limit = int(largest * i / sizes)
        with TemporaryDirectory(dir=b.place) as folder:
            output = Path(folder) / "run"
            ended = b.runner.run(command(b.place, output), limits={"FSIZE": limit})
            if ended.code == 0:
                continue
            tried += 1
            text = _stopped_well(ended.code, ended.err, output)
            begun = (output / "config.yaml").exists()
            again = b.runner.run(["resume", output] if begun else command(b.place, output))
            if again.code:
                text += f"the resume ended with {again.code}: {again.err[-300:]}"
            text += ", ".join(same_files(output, b.whole))
            wrong += [f"at {limit:,} bytes: {text}"] if text else []
    promise = "code 75 and what to do; no mask; once there is room, a resume gives the same bytes"
    return Row("disk full, at any size", promise, tried, tried - len(wrong), {}, tuple(wrong[:5]))


def _stopped_well(code: int, err: str, output: Path) -> str:
    if code != FULL or "Traceback" in err or "Make room" not in err:
        return f"code {code}: {err[-300:]} "
    return "there is a mask " if (output / "mask.safetensors").exists() else ""


def overwritten(*, cuts: int) -> Row:
    """A mask is saved over another, while the largest file may be of so many sizes."""
    with TemporaryDirectory() as folder:
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


def named(b: Bench, names: Sequence[str]) -> Row:
    """Model, data and output below a directory of such a name."""
    wrong = []
    for name in names:
        with TemporaryDirectory(dir=b.place) as folder:
            root = Path(folder) / name
            root.mkdir()
            (root / "model").symlink_to(b.place / "model")
            (root / "rows.csv").symlink_to(b.place / "rows.csv")
            ended = b.runner.run(command(root, root / "run"))
            if ended.code or same_files(root / "run", b.whole)[:1] == ["mask.safetensors"]:
                wrong.append(f"{name!r}: code {ended.code}: {ended.err[-300:]}")
    promise = "it works, and gives the same mask"
    return Row(
        "spaces, Unicode, quotes and line ends in paths",
        promise,
        len(names),
        len(names) - len(wrong),
        {},
        tuple(wrong),
    )


def unwritable(b: Bench) -> Row:
    """Where nothing can be written, said before the model is loaded or right after."""
    (b.place / "file").write_text("mine")
    places: dict[str, Callable[[], Path]] = {
        "a file": lambda: b.place / "file",
        "below a file": lambda: b.place / "file" / "run",
        "a directory of others": lambda: b.place / "model",
        "/proc": lambda: Path("/proc/run"),
        "a name that is too long": lambda: b.place / ("x" * 300),
    }
    wrong, slowest = [], 0.0
    for name, where in places.items():
        began = time.monotonic()
        ended = b.runner.run(command(b.place, where()))
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


def two_at_once(b: Bench) -> Row:
    """A second run while the first has its directory."""
    output, wrong, tried = b.place / "both", list[str](), 3
    first = subprocess.Popen(
        [sys.executable, "-m", "ird_search.cli", *command(b.place, output, proxy_steps="1")],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for _ in _until(lambda: (output / "run.json").exists() or first.poll() is not None):
        pass
    for words in (
        command(b.place, output),
        ["resume", output],
        [*command(b.place, output), "--fresh"],
    ):
        first.send_signal(19)
        ended = b.runner.run(words)
        first.send_signal(18)
        if ended.code != 2 or str(first.pid) not in ended.err:
            wrong.append(f"{words[0]}: code {ended.code}: {ended.err[-300:]}")
    if first.wait() or same_files(output, b.whole):
        wrong.append("the first run did not come to the same bytes")
    promise = "the second is refused and told which process writes; the first is not disturbed"
    return Row("two runs in one directory", promise, tried, tried - len(wrong), {}, tuple(wrong))


def _until(condition: Callable[[], bool], seconds: float = 60) -> Iterator[None]:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.005)
        yield
