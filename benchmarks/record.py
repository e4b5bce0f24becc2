"""What benchmarks share: how peaks are taken, and how figures reach the disk, beside what they
were made with."""

from __future__ import annotations

import ctypes
import gc
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ird_search.environment import environment

RESULTS = Path(__file__).parent / "results"
"""Where results are written unless told otherwise."""


def write_result(name: str, result: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write `<name>.json`, and `environment.json` beside it; returns the first.

    The environment also stands within the result: several results share a folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    here = environment()
    _write(folder / "environment.json", here)
    return _write(folder / f"{name}.json", {**result, "environment": here})


def peak_of(call: Callable[[], object]) -> float:
    """MB that a call needs on top of what is resident before it (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator still holds would be used unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _memory("VmRSS")
    call()
    return _memory("VmHWM") - before


def _memory(field: str) -> float:
    """A figure of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def _write(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
