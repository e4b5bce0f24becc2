"""`workers`: more processes of this machine that share the fine-tunes of a run.

Each goes through the same search, takes every finished unit from the ledger, and claims the
fine-tunes that nobody does yet. Nothing is sent between them: one that is killed leaves its claim,
one that is stopped loses it after a while, and the run needs none of them to come to its end.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ird_search.errors import UsageError, first_line
from ird_search.files import write_atomically

Target = Callable[[bytes, Path], None]


@contextmanager
def workers(count: int, target: Target, payload: Any, directory: Path) -> Iterator[None]:
    """Within the block, so many processes call `target(pickled payload, directory)`.

    Raises:
        UsageError: the payload cannot be pickled.
    """
    main = getattr(sys.modules["__main__"], "__file__", None)
    if count and main is not None and not os.path.exists(main):
        warnings.warn(
            f"The program {main} is no file, so no other process can start from it. The run goes "
            "on with one process.",
            stacklevel=3,
        )
        count = 0
    if not count:
        yield
        return
    context = multiprocessing.get_context("spawn")
    # A file, since a pipe would wait for a worker that is stopped before it has read it. Its name
    # says that nobody needs it once its process is gone.
    path = directory / ".payload.tmp"
    write_atomically(path, _pickled(payload))
    started = [
        context.Process(target=_work, args=(target, path, directory), daemon=True)
        for _ in range(count)
    ]
    try:
        with _interrupts_held():
            for process in started:
                process.start()
        yield
    finally:
        for process in started:
            if process.pid is not None:
                process.kill()  # what it was doing is in nobody's way
                process.join()
        path.unlink(missing_ok=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C is ignored meanwhile, also by what is started: this process ends the others."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def refuse_while_starting() -> None:
    """End a worker whose program searches as it is imported, and so would start workers itself."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SystemExit(
            "ird-search: a worker came by a search while it imported this program. Put the call "
            "under `if __name__ == '__main__':`. The run goes on without it."
        )


def _pickled(payload: Any) -> bytes:
    """By value: the pickler of `multiprocessing` would share the weights, which each one trains."""
    try:
        return pickle.dumps(payload, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as problem:  # whatever a class of the user's raises
        raise UsageError(
            f"The model or data cannot be sent to other processes: {problem}. Define its classes "
            "at the top level of a module, or pass workers=1 (--workers 1)."
        ) from problem


def _work(target: Target, payload: Path, directory: Path) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        target(payload.read_bytes(), directory)
    except Exception as problem:
        print(
            "ird-search: a worker stopped, the run goes on without it: "
            f"{first_line(problem)}. (Classes of your own have to be in a module that can be "
            "imported.)",
            file=sys.stderr,
        )
        raise SystemExit(1) from None


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
