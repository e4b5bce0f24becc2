"""Real processes that run the command line, fast enough for hundreds: a warm one that forks.

The warm process has imported everything and has used no thread yet, so that each child starts in
milliseconds, does what `ird-search` does, and can be killed like any other process. What it holds
is never garbage: children look for none there, and share its pages.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

WARM = ("ird_search.api", "ird_search.cli", "ird_search.finished", "ird_search.status")
"""What the warm process has imported, and who only starts it has not."""
STARTS = "IRD_FAULTS_STARTS"
"""Names a file that gets a byte for each unit that a child begins."""


@dataclass(frozen=True)
class Ended:
    """A child that has ended.

    Args:
        code: its exit status as a shell gives it: 128 + n where signal n ended it.
        seconds: from its start; `after` from the signal on, if it was sent one.
    """

    code: int
    seconds: float
    after: float
    out: str
    err: str


class Runner:
    """A warm process; use it as a context.

    Args:
        model: the directory of a classifier, which it has loaded once.
    """

    def __init__(self, model: Path) -> None:
        self._model = model

    def __enter__(self) -> Runner:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.faults.runner", str(self._model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=Path(__file__).parents[2],
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(
        self,
        words: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        send: int = signal.SIGKILL,
        after: float | None = None,
        limits: Mapping[str, int] | None = None,
    ) -> Ended:
        """Run `ird-search` with these words.

        Args:
            env: variables on top.
            send: a signal that it gets …
            after: … so many seconds after its start.
            limits: in bytes, by name: "FSIZE" of the largest file; "AS" of the address space, on
                top of what the warm process has.
        """
        asked = {
            "words": [str(w) for w in words],
            "env": dict(env or {}),
            "send": int(send),
            "after": after,
            "limits": dict(limits or {}),
        }
        to, back = self._process.stdin, self._process.stdout
        assert to is not None and back is not None
        to.write(json.dumps(asked) + "\n")
        to.flush()
        return Ended(**json.loads(back.readline()))


def _serve(model: str, asked_of: IO[str], answers: IO[str]) -> None:
    """Fork a child for each line."""
    gc.disable()
    for name in WARM:
        import_module(name)
    import_module("torch").set_num_threads(1)
    with TemporaryDirectory() as folder:  # imports what a database needs
        import_module("ird_search.study").Study(Path(folder) / "study.db")
    _load(model)
    gc.freeze()
    gc.enable()
    for line in asked_of:
        answers.write(json.dumps(_child(json.loads(line))) + "\n")
        answers.flush()


def _load(model: str) -> None:
    """Import what a model and its tokenizer need, without a thread, and without a word to CUDA."""
    transformers = import_module("transformers")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    transformers.AutoModelForSequenceClassification.from_pretrained(model)
    transformers.AutoTokenizer.from_pretrained(model)
    del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]


def _child(asked: dict[str, Any]) -> dict[str, Any]:
    (read_out, out), (read_err, err) = os.pipe(), os.pipe()  # of 64 kB: nobody reads meanwhile
    began, sent = time.monotonic(), 0.0
    pid = os.fork()
    if pid == 0:
        _become(asked, out, err)
    os.close(out)
    os.close(err)
    if asked["after"] is not None:
        ended = _ended_within(pid, asked["after"])
        if ended is None:
            sent = time.monotonic()
            os.kill(pid, asked["send"])
            ended = os.waitpid(pid, 0)[1]
    else:
        ended = os.waitpid(pid, 0)[1]
    now = time.monotonic()
    code = os.waitstatus_to_exitcode(ended)
    return {
        "code": code if code >= 0 else 128 - code,
        "seconds": now - began,
        "after": now - sent if sent else 0.0,
        "out": _read(read_out),
        "err": _read(read_err),
    }


def _ended_within(pid: int, seconds: float) -> int | None:
    """The status of a child that ends in so many seconds, else None."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(min(0.002, max(0.0, until - time.monotonic())))
    return None


def _become(asked: dict[str, Any], out: int, err: int) -> None:
    """In the child: the command line, and nothing of the warm process behind it."""
    from ird_search.cli import main

    code = 70
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        os.environ.update(asked["env"])
        for name, most in asked["limits"].items():
            kind, held = getattr(resource, f"RLIMIT_{name}"), 0
            if name == "AS":
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                held = pages * resource.getpagesize()
            resource.setrlimit(kind, (held + most, resource.getrlimit(kind)[1]))
        if STARTS in os.environ:
            _count_starts(os.environ[STARTS])
        # A shell starts what runs in its background with Ctrl-C ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["ird-search", *asked["words"]]
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _count_starts(path: str) -> None:
    """Append a byte to a file whenever a unit is begun."""
    from ird_search.ledger import Ledger

    real = Ledger._do

    def counted(self: Any, job: Any, **more: Any) -> Any:
        def do() -> Any:
            with open(path, "ab") as file:
                file.write(b".")
            return job.do()

        return real(self, type(job)(job.kind, job.key, do), **more)

    Ledger._do = counted  # type: ignore[method-assign]


def _read(descriptor: int) -> str:
    with open(descriptor, encoding="utf-8", errors="replace") as file:
        return file.read()


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    _serve(sys.argv[1], sys.stdin, answers)
