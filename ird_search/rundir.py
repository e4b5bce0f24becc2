"""`RunDirectory`: the files of one run, and who may write them.

config.yaml       the resolved settings; running them again gives the same mask
run.json          what the run works on: it goes on with the same model and data only
ledger/           finished units: a run that was interrupted goes on from them
study.db          the Optuna record of every proxy
rounds.jsonl      one line a round
samples.jsonl     one line a row of the pool: chosen, outlier, label in doubt
inclusion.safetensors   how often bootstraps of the rows chose each entry of the mask
report.md         the table
mask.safetensors  the mask, written last: a directory that holds it is finished
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ird_search.config import BESIDE_THE_RESULT
from ird_search.crash import crash_point
from ird_search.errors import DataError, ModelError, UsageError, first_line
from ird_search.files import explaining, write_atomically
from ird_search.sealed import seal, unseal

CONFIG, ABOUT, STUDY = "config.yaml", "run.json", "study.db"
ROUNDS, REPORT, MASK = "rounds.jsonl", "report.md", "mask.safetensors"
SAMPLES, INCLUSION = "samples.jsonl", "inclusion.safetensors"
LOCK = ".lock"


@dataclass(frozen=True)
class RunDirectory:
    """A directory that one run writes into."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / CONFIG

    @property
    def rounds(self) -> Path:
        return self.path / ROUNDS

    @property
    def ledger(self) -> Path:
        return self.path / "ledger"

    @property
    def study(self) -> Path:
        return self.path / STUDY

    @property
    def report(self) -> Path:
        return self.path / REPORT

    @property
    def mask(self) -> Path:
        return self.path / MASK

    @contextlib.contextmanager
    def claimed(self, settings: Mapping[str, Any], *, fresh: bool = False) -> Iterator[None]:
        """Hold the directory for a run with these settings.

        A directory that the same settings left unfinished is taken up again. One that bad input
        ended is left as it was found, so that a corrected run is not refused.

        Args:
            fresh: begin anew; what an unfinished run left is taken away.

        Raises:
            UsageError: it holds a finished run, a run with other settings, other files, or another
                process is writing it.
        """
        self.check(settings, fresh=fresh)
        lock = self._locked()
        try:
            self.check(settings, fresh=fresh)  # again: whoever held the lock may have written
            if fresh:
                self._clear()
            new = not self.config.exists()
            self._sweep()
            self.write(CONFIG, yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))
            crash_point("directory claimed")
            try:
                yield
            except (DataError, ModelError, UsageError) as error:
                done = any(self.ledger.glob("*.json"))
                if new and not (done and isinstance(error, UsageError)):
                    self._clear()
                    self._leave()
                raise
        finally:
            os.close(lock)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep others from writing, where nothing is to be claimed.

        Raises:
            UsageError: another process writes the directory.
        """
        lock = self._locked()
        try:
            yield
        finally:
            os.close(lock)

    def write(self, name: str, content: str | bytes) -> None:
        """Write one file, whole or not at all."""
        data = content.encode() if isinstance(content, str) else content
        write_atomically(self.path / name, data)

    def write_rounds(self, rounds: Sequence[Mapping[str, Any]]) -> None:
        """One JSON document a line, one line a round."""
        self.write(ROUNDS, "".join(json.dumps(r, allow_nan=False) + "\n" for r in rounds))

    def settle(
        self, settings: Mapping[str, Any], about: Mapping[str, str], versions: Mapping[str, str]
    ) -> list[str]:
        """Note what the run works on; where that is noted already, it must be the same.

        Args:
            settings: compared again, since anyone may edit `config.yaml`.
            about: what a difference would be told of: the weights, the samples.
            versions: of the libraries; they may differ.

        Returns:
            What a person should know: other versions than the run began with.

        Raises:
            UsageError: settings, model or data changed since the run was interrupted.
        """
        try:
            before = unseal((self.path / ABOUT).read_bytes())
        except OSError:
            before = None
        kept = {k: v for k, v in settings.items() if k not in BESIDE_THE_RESULT}
        now = json.loads(json.dumps({"settings": kept, "about": about, "versions": versions}))
        if before is None:  # a damaged one too: what it guards is checked unit by unit as well
            write_atomically(self.path / ABOUT, seal(now))
            return []
        changed = _differences(
            {**before["settings"], **before["about"]}, {**now["settings"], **now["about"]}
        )
        if changed:
            raise UsageError(
                f"What the unfinished run in {self.path} works on has changed: {changed}. Put it "
                "back and go on; or begin anew with fresh=True (--fresh), which drops what is "
                "finished; or choose another directory."
            )
        others = _differences(before["versions"], versions)
        return [f"The run began with other versions: {others}. Last digits may differ."] * bool(
            others
        )

    def check(self, settings: Mapping[str, Any], *, fresh: bool = False) -> None:
        """Whether a run with these settings may use the directory. Writes nothing.

        Args:
            fresh: what an unfinished run left does not matter.

        Raises:
            UsageError: it may not; see `claimed`.
        """
        try:
            # A write that was killed leaves a hidden temporary file, which is no one's work.
            names = {p.name for p in self.path.iterdir() if not p.name.endswith(".tmp")}
        except FileNotFoundError:
            return
        except OSError as error:
            is_file = self.path.is_file() if error.errno == errno.ENOTDIR else False
            raise UsageError(
                f"The output {self.path} is a file; a directory is needed."
                if is_file
                else f"The output directory {self.path} cannot be used: {error.strerror}."
            ) from error
        if MASK in names:
            raise UsageError(
                f"The output directory {self.path} holds a finished run ({MASK}). "
                "Read it with load_mask (ird-search inspect); or choose another directory, or "
                "remove this one."
            )
        if not {CONFIG, ABOUT} & names and (others := names - {LOCK}):
            raise UsageError(
                f"The output directory {self.path} is not empty: it holds {_listed(others)}. "
                "Choose an empty or a new one."
            )
        if CONFIG in names and not fresh:
            self._check_same(settings)

    def _check_same(self, settings: Mapping[str, Any]) -> None:
        before, now = read_config(self.path / CONFIG), json.loads(json.dumps(dict(settings)))
        for name in BESIDE_THE_RESULT:
            before.pop(name, None), now.pop(name, None)
        command = resume_command(self.path, before)
        own = f"; or go on with its own settings ({command})" if command else ""
        if changed := _differences(before, now):
            raise UsageError(
                f"The output directory {self.path} holds an unfinished run with other settings: "
                f"{changed}. Choose another directory{own}; or begin anew with fresh=True "
                "(--fresh), which drops what is finished."
            )

    def _clear(self) -> None:
        """Take away what a run has written, the settings last: they say whose the rest is."""
        shutil.rmtree(self.ledger, ignore_errors=True)
        for name in (ABOUT, ROUNDS, SAMPLES, INCLUSION, REPORT, STUDY, CONFIG):
            (self.path / name).unlink(missing_ok=True)

    def _leave(self) -> None:
        """Take away the lock, and the directory if nothing else is in it."""
        (self.path / LOCK).unlink()
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def _sweep(self) -> None:
        """Take away what writes that were killed have left."""
        for place in (self.path, self.ledger):
            for path in place.glob(".*.tmp"):
                path.unlink(missing_ok=True)

    def process(self) -> int | None:
        """The process that writes the directory now, if one does."""
        try:
            lock = os.open(self.path / LOCK, os.O_RDONLY)
        except OSError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            found = os.read(lock, 32).decode(errors="replace").strip()
            return int(found) if found.isdigit() else 0
        finally:
            os.close(lock)
        return None

    def _locked(self) -> int:
        """The open lock file, held until it is closed; the system closes it with the process."""
        until = time.monotonic() + 1  # whoever asks for the status holds it for a moment
        while True:
            with explaining(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Another may have taken the file away before this one was locked.
                if os.path.exists(self.path / LOCK) and os.path.samestat(
                    os.fstat(lock), os.stat(self.path / LOCK)
                ):
                    break
            except BlockingIOError:
                if time.monotonic() > until:
                    other = os.read(lock, 32).decode(errors="replace").strip()
                    os.close(lock)
                    raise UsageError(
                        f"The output directory {self.path} is in use by process "
                        f"{other or 'unknown'}. Wait for it, or choose another directory."
                    ) from None
                time.sleep(0.02)
            except OSError as error:
                os.close(lock)
                raise UsageError(
                    f"The output directory {self.path} cannot be locked: {error.strerror}. Choose "
                    "one on a file system with locks."
                ) from error
            os.close(lock)
        with contextlib.suppress(OSError):  # on a full disk the next file tells
            os.ftruncate(lock, 0)
            os.write(lock, str(os.getpid()).encode())
        return lock


def resume_command(path: str | Path, settings: Mapping[str, Any]) -> str:
    """The command that takes an unfinished run up again.

    Empty where model or data were objects of a Python program, which has to be run again.
    """
    named = [settings.get(key) for key in ("model", "data", "eval_data", "processor")]
    if any(str(name).startswith("<") for name in named):
        return ""
    return f"ird-search resume {shlex.quote(str(path))}"


def read_config(path: Path) -> dict[str, Any]:
    """The settings of a YAML file.

    Raises:
        UsageError: it is missing, no YAML, or no mapping.
    """
    try:
        settings = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise UsageError(f"The config {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"The config {path} is no YAML: {first_line(error)}.") from error
    if not isinstance(settings, dict):
        raise UsageError(f"The config {path} must hold `name: value` lines.")
    return settings


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    changed = [k for k in {**before, **now} if before.get(k) != now.get(k)]
    return ", ".join(f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in changed)


def _listed(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
