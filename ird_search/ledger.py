"""The ledger: finished units of work, each under the hash of what went into it.

A unit is one proxy, one narrowing, one chunk of a long Fisher pass, the warmed-up head, the check
of the samples, or what the trained mask says of the pool. What is in the ledger is not done again:
a run that was interrupted goes on where it stopped, two candidates with one mask cost one
fine-tune, and several processes share the work of one run.

    <kind>-<key>.json                   the result, with its own hash and that of the tensors
    <kind>-<key>-<hash>.safetensors     the tensors of a unit that has some, written before
    claims                              locked at a byte for each unit that a process works on
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ird_search.crash import crash_point
from ird_search.files import explaining, make_directory, write_atomically
from ird_search.sealed import seal
from ird_search.unitfiles import UnitKind, read_unit, tensors_of

POLL = 0.02
"""Seconds between two looks at what other processes have finished."""
LEASE = 60.0
"""Seconds after which a unit that another process claims, but does not finish, is done here too."""


ALGORITHM = 3
"""Raised with every change after which the same inputs give another outcome, so that a run which
an earlier version began takes nothing from it that this one would not find itself."""


def unit_key(inputs: Mapping[str, Any]) -> str:
    """The content address of a unit: SHA-256 of its inputs and `ALGORITHM` as canonical JSON."""
    whole = {"algorithm": ALGORITHM, **inputs}
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Unit:
    """What a unit of work gave.

    Args:
        result: plain data.
        tensors: by name.
    """

    result: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Job:
    """A unit that is wanted, and how to do it.

    Args:
        do: computes the unit; the same from the same inputs, in whatever process.
    """

    kind: UnitKind
    key: str
    do: Callable[[], Unit]


class Ledger:
    """Finished units, in memory or in a directory.

    A unit is written whole or not at all, and never changed. One that cannot be read back (a torn
    or edited file) counts as not done.

    Args:
        directory: shared by all processes of a run; in memory where left out.
        lease: see `LEASE`.

    Example:
        >>> ledger = Ledger()
        >>> key = unit_key({"mask": "ab12", "seed": 0})
        >>> ledger.get("proxy", key) is None
        True
        >>> ledger.put("proxy", key, Unit({"loss": 0.5}))
        >>> ledger.get("proxy", key).result
        {'loss': 0.5}
    """

    def __init__(self, directory: Path | None = None, *, lease: float = LEASE) -> None:
        self.directory, self.lease = directory, lease
        self._units: dict[str, Unit] = {}
        self._longest = 0.0
        if directory is not None:
            make_directory(directory)

    def get(self, kind: UnitKind, key: str) -> Unit | None:
        """A finished unit, or None."""
        name = f"{kind}-{key}"
        if name in self._units or self.directory is None:
            return self._units.get(name)
        unit = _read(self.directory / f"{name}.json")
        if unit is not None and not unit.tensors:
            self._units[name] = unit
        return unit

    def put(self, kind: UnitKind, key: str, unit: Unit) -> None:
        """Record a finished unit. Where another process was first, its record stays.

        Raises:
            ResourceError, UsageError: it cannot be written.
        """
        name = f"{kind}-{key}"
        if self.directory is None:
            self._units[name] = Unit(dict(unit.result), unit.tensors)
            return
        path = self.directory / f"{name}.json"
        if _read(path) is not None:
            return
        said: dict[str, Any] = {"key": key, "result": dict(unit.result)}
        if unit.tensors:
            data = save({n: t.detach().cpu().clone() for n, t in unit.tensors.items()})
            said["tensors"] = hashlib.sha256(data).hexdigest()
            write_atomically(tensors_of(path, said["tensors"]), data)
            crash_point("tensors recorded")
        write_atomically(path, seal(said), first=not path.exists())  # a damaged one is replaced
        crash_point("unit recorded")

    def drop(self, kind: UnitKind, key: str) -> None:
        """Take away a unit that a later one holds as well."""
        name = f"{kind}-{key}"
        self._units.pop(name, None)
        if self.directory is not None:
            (self.directory / f"{name}.json").unlink(missing_ok=True)
            for path in self.directory.glob(f"{name}-*"):  # its tensors
                path.unlink(missing_ok=True)

    def clear(self, kind: UnitKind) -> None:
        """Take away all units of a kind."""
        self._units = {n: u for n, u in self._units.items() if not n.startswith(f"{kind}-")}
        for path in self.directory.glob(f"{kind}-*") if self.directory is not None else ():
            path.unlink(missing_ok=True)

    def forget(self, kind: UnitKind, unwanted: Callable[[Unit], bool]) -> None:
        """Take away the units of a kind that are to be done again."""
        for path in self.directory.glob(f"{kind}-*.json") if self.directory is not None else ():
            if (unit := _read(path)) is not None and unwanted(unit):
                self.drop(kind, path.stem.partition("-")[2])

    def finished(self, kind: UnitKind) -> Iterator[Unit]:
        """All units of a kind that can be read."""
        found = [unit for name, unit in self._units.items() if name.startswith(f"{kind}-")]
        if self.directory is not None:
            paths = sorted(self.directory.glob(f"{kind}-*.json"))
            read = map(_read, paths)
            found = [unit for unit in read if unit is not None]
        yield from found

    @contextlib.contextmanager
    def claimed(self, key: str, *, again: bool = False) -> Iterator[bool]:
        """Whether this process may do a unit: no other may, until the block or the process ends.

        One at a time in each process.

        Args:
            again: the claim of one that does a unit which is claimed already.
        """
        if self.directory is None:
            yield True
            return
        place = int(key[:15], 16) + again  # the lock of one byte; the file stays empty
        with contextlib.ExitStack() as stack:
            with explaining(self.directory):
                file = stack.enter_context(open(self.directory / "claims", "ab"))
            try:  # closing the file gives the lock back
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
            except OSError:
                yield False
                return
            yield True

    def finish(
        self,
        jobs: Sequence[Job],
        *,
        wait: bool = False,
        on_done: Callable[[str, Unit], None] = lambda *_: None,
    ) -> list[Unit]:
        """The units of all jobs, each done by whichever process claims it first.

        What another process works on is waited for. One that was stopped, not killed, keeps its
        claim; once it has had `lease` seconds, and four times as long as the longest job here, one
        other process does its job again. Both give the same unit.

        Args:
            wait: leave all the work to others.
            on_done: told the key of each unit, once, as it is there.
        """
        done: dict[str, Unit] = {}
        left = {job.key: job for job in jobs}
        waiting_since = time.monotonic()
        while left:
            before = len(left)
            waited = time.monotonic() - waiting_since
            overdue = not wait and waited > max(self.lease, 4 * self._longest)
            for job in list(left.values()):
                began = time.monotonic()
                unit = self.get(job.kind, job.key)
                if unit is None and not wait:
                    unit = self._do(job) or (self._do(job, again=True) if overdue else None)
                if unit is not None:
                    self._longest = max(self._longest, time.monotonic() - began)
                    waiting_since = time.monotonic()
                    done[job.key] = unit
                    del left[job.key]
                    on_done(job.key, unit)
            if len(left) == before:
                time.sleep(POLL)
        return [done[job.key] for job in jobs]

    def _do(self, job: Job, *, again: bool = False) -> Unit | None:
        """The unit, if it is there by now or this process may do it."""
        with self.claimed(job.key, again=again) as mine:
            unit = self.get(job.kind, job.key)  # another may have finished it just before
            if unit is None and mine:
                crash_point("unit claimed")
                self.put(job.kind, job.key, job.do())
                unit = self.get(job.kind, job.key)
            return unit

    def __len__(self) -> int:
        """Finished units of all kinds."""
        if self.directory is None:
            return len(self._units)
        return sum(1 for _ in self.directory.glob("*.json"))


def _read(path: Path) -> Unit | None:
    """A unit from its files; None where it counts as not done."""
    if (found := read_unit(path)) is None:
        return None
    stored, data = found
    try:
        return Unit(stored["result"], load(data) if data else {})
    except SafetensorError:
        return None
