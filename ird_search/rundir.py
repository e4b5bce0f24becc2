"""`RunDirectory`: the files of one run, and who may write them.

config.yaml       the resolved settings; running them again gives the same mask
ledger/           finished units: a run that was interrupted goes on from them
study.db          the Optuna record of every proxy
rounds.jsonl      one line a round
report.md         the table
mask.safetensors  the mask, written last: a directory that holds it is finished
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ird_search.errors import DataError, ModelError, UsageError
from ird_search.files import write_atomically

CONFIG, ROUNDS, REPORT, MASK = "config.yaml", "rounds.jsonl", "report.md", "mask.safetensors"
LOCK = ".lock"


@dataclass(frozen=True)
class RunDirectory:
    """A directory that one run writes into."""

    path: Path

    @property
    def ledger(self) -> Path:
        return self.path / "ledger"

    @property
    def study(self) -> Path:
        return self.path / "study.db"

    @property
    def mask(self) -> Path:
        return self.path / MASK

    @contextlib.contextmanager
    def claimed(self, settings: Mapping[str, Any]) -> Iterator[None]:
        """Hold the directory for a run with these settings.

        A directory that the same settings left unfinished is taken up again. One that bad input
        ended is left as it was found, so that a corrected run is not refused.

        Raises:
            UsageError: it holds a finished run, a run with other settings, other files, or another
                process is writing it.
        """
        self.check(settings)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UsageError(
                f"The output directory {self.path} cannot be used: {error.strerror}."
            ) from error
        try:
            self._lock(lock)
            self.check(settings)  # again: whoever held the lock may have written since
            fresh = not (self.path / CONFIG).exists()
            self.write(CONFIG, yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))
            try:
                yield
            except (DataError, ModelError, UsageError):
                if fresh:
                    self._clear()
                raise
        finally:
            os.close(lock)

    def write(self, name: str, text: str) -> None:
        """Write one file, whole or not at all."""
        write_atomically(self.path / name, text.encode())

    def write_rounds(self, rounds: Sequence[Mapping[str, Any]]) -> None:
        """One JSON document a line, one line a round."""
        self.write(ROUNDS, "".join(json.dumps(r, allow_nan=False) + "\n" for r in rounds))

    def check(self, settings: Mapping[str, Any]) -> None:
        """Whether a run with these settings may use the directory. Writes nothing.

        Raises:
            UsageError: it may not; see `claimed`.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UsageError(f"The output {self.path} is a file; a directory is needed.")
        # A write that was killed leaves a hidden temporary file, which is no one's work.
        names = {p.name for p in self.path.iterdir() if not p.name.endswith(".tmp")}
        if MASK in names:
            raise UsageError(
                f"The output directory {self.path} holds a finished run ({MASK}). "
                "Choose another directory, or remove this one."
            )
        if CONFIG not in names and names - {LOCK}:
            raise UsageError(
                f"The output directory {self.path} is in use: it holds {_listed(names)}. "
                "Choose an empty or a new one."
            )
        if CONFIG in names:
            self._check_same(settings)

    def _check_same(self, settings: Mapping[str, Any]) -> None:
        before = read_config(self.path / CONFIG)
        now = json.loads(json.dumps(dict(settings)))
        changed = [k for k in {**before, **now} if before.get(k) != now.get(k)]
        if changed:
            raise UsageError(
                f"The output directory {self.path} holds an unfinished run with other settings: "
                + ", ".join(f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in changed)
                + ". Choose another directory, or run it again with its own config.yaml."
            )

    def _clear(self) -> None:
        """Take away what a run has written, and the directory if nothing else is in it."""
        shutil.rmtree(self.ledger, ignore_errors=True)
        for path in (self.path / CONFIG, self.path / ROUNDS, self.path / REPORT, self.study):
            path.unlink(missing_ok=True)
        (self.path / LOCK).unlink()
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def _lock(self, lock: int) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            other = os.read(lock, 32).decode(errors="replace").strip()
            raise UsageError(
                f"The output directory {self.path} is in use by process {other or 'unknown'}. "
                "Wait for it, or choose another directory."
            ) from None
        os.ftruncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())


def read_config(path: Path) -> dict[str, Any]:
    """The settings of a YAML file.

    Raises:
        UsageError: it is missing, no YAML, or no mapping.
    """
    try:
        settings = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"The config {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"The config {path} is no YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(settings, dict):
        raise UsageError(f"The config {path} must hold `name: value` lines.")
    return settings


def _listed(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
