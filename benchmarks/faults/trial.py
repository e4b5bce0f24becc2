"""Cases at work: each through the command line, and what of the promise was kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.nn.modules.module import register_module_forward_pre_hook
from typer.testing import CliRunner

from benchmarks.faults import Row
from benchmarks.faults.cases import (
    Case,
    write_rows,
)
from ird_search.cli import app
from ird_search.models import quiet
from tests.tiny import (
    save_tiny_bert,
    tiny_gpt2,
    tiny_lm_tokenizer,
    tiny_vit,
)
from tests.toy import OPTIONS

SECONDS = 5.0
"""Bad input is told within so many."""


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    said: str
    printed: str
    seconds: float
    ran: int
    left: bool
    crash: str = ""


class Place:
    """A directory with the tiny models, where every case gets a directory of its own."""

    def __init__(self, root: Path) -> None:
        self.root, self.count = root, 0
        with quiet():
            save_tiny_bert(root / "bert", head=False)
            tiny_gpt2().save_pretrained(root / "gpt2")
            tiny_lm_tokenizer().save_pretrained(root / "gpt2")
            tiny_vit().save_pretrained(root / "vit")

    def fresh(self) -> Path:
        self.count += 1
        (path := self.root / f"case {self.count}").mkdir()
        return path

    def words(self, case: Case) -> tuple[list[str], Path] | None:
        """The command line of a case, and its output; None where the format cannot hold it."""
        here = self.fresh()
        if (path := case.write(here)) is None:
            return None
        options = {"model": self.root / case.model, "data": path, "output": here / "run"}
        extra = dict(case.options)
        if "data" in extra:
            train = write_rows(extra.pop("data"), here / "train.csv")
            options |= {"data": train, "eval-data": path}
        options |= {**OPTIONS, **extra}
        return ["run", *(w for k, v in options.items() for w in (f"--{k}", str(v)))], here / "run"


@contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """How many modules ran within the block."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    hook = register_module_forward_pre_hook(count)
    try:
        yield lambda: calls[0]
    finally:
        hook.remove()


def outcome(place: Place, case: Case) -> Outcome | None:
    """The case through the command line, in this process."""
    if (found := place.words(case)) is None:
        return None
    words, output = found
    with counted() as ran:
        began = time.perf_counter()
        result = CliRunner().invoke(app, words)
        seconds = time.perf_counter() - began
        error = result.exception
        crash = "" if error is None or isinstance(error, SystemExit) else repr(error)
        left = output.exists()
        return Outcome(result.exit_code, result.stderr, result.stdout, seconds, ran(), left, crash)


def kept(case: Case, found: Outcome) -> str:
    """What of the promise was not kept; empty where all was."""
    if found.crash:
        return f"a traceback: {found.crash[:200]}"
    if case.works:
        return "" if found.code == 0 and found.left else f"code {found.code}: {found.said[-300:]}"
    checks = {
        f"code {found.code}": found.code == case.code,
        "something on standard output": not found.printed,
        "the output directory was made": not found.left,
        f"{found.ran} modules ran": case.runs or not found.ran,
        f"a message of {len(found.said)} characters": len(found.said) < 4000,
        f"{found.seconds:.1f} seconds": found.seconds < SECONDS,
    }
    checks |= {f"{word!r} was not said": word in found.said for word in case.said}
    bad = [text for text, good in checks.items() if not good]
    return f"{', '.join(bad)}: {found.said[:300]}" if bad else ""


def tried(place: Place, wanted: Iterable[Case]) -> list[Row]:
    """One row for each fault."""
    found: dict[str, list[tuple[Case, Outcome, str]]] = {}
    for case in wanted:
        if (became := outcome(place, case)) is not None:
            found.setdefault(case.fault, []).append((case, became, kept(case, became)))
    promise = f"code 2, 3 or 4; file, row and cure in one message; no work done; < {SECONDS:g} s"
    return [
        Row(
            fault,
            "a mask" if fault == "sound input" else promise,
            tried=len(those),
            held=sum(not bad for _, _, bad in those),
            figures={"seconds, worst": max(became.seconds for _, became, _ in those)},
            failures=tuple(f"{case.name}: {bad}" for case, _, bad in those if bad)[:8],
        )
        for fault, those in found.items()
    ]
