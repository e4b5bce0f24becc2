"""The ledger: finished units of work, each under the hash of what went into it.

A unit that is in the ledger is not done again, so a run that was interrupted goes on where it
stopped, and two candidates with the same mask cost one fine-tune.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ird_search.files import write_atomically


def unit_key(inputs: Mapping[str, Any]) -> str:
    """The content address of a unit: SHA-256 of its inputs as canonical JSON."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class Ledger:
    """Finished units in memory and, where a directory is given, on disk.

    A unit's file is written whole or not at all, and never changed. One that cannot be read back
    (a torn or edited file) counts as not done.

    Example:
        >>> ledger = Ledger()
        >>> key = unit_key({"mask": "ab12", "seed": 0})
        >>> ledger.get(key) is None
        True
        >>> ledger.put(key, {"loss": 0.5})
        >>> ledger.get(key)
        {'loss': 0.5}
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory
        self._units: dict[str, dict[str, Any]] = {}
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> dict[str, Any] | None:
        """The result of a finished unit, or None."""
        if key not in self._units and self.directory is not None:
            unit = self._read(key, self.directory / f"{key}.json")
            if unit is not None:
                self._units[key] = unit
        return self._units.get(key)

    def put(self, key: str, result: Mapping[str, Any]) -> None:
        """Record a finished unit."""
        self._units[key] = dict(result)
        if self.directory is not None:
            text = json.dumps({"key": key, "sha256": _sum(result), "result": dict(result)})
            write_atomically(self.directory / f"{key}.json", text.encode())

    def _read(self, key: str, path: Path) -> dict[str, Any] | None:
        try:
            stored = json.loads(path.read_bytes())
            result = stored["result"]
            return result if (stored["key"], stored["sha256"]) == (key, _sum(result)) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def __len__(self) -> int:
        return len(self._units)


def _sum(result: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()
