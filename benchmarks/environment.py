"""Where a benchmark ran, and the one way its figures reach the disk."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"
"""Where results are written unless told otherwise."""


def environment() -> dict[str, Any]:
    """Versions and hardware that the figures depend on: no names of hosts or folders."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "system": platform.system(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def write_result(name: str, result: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write `<name>.json`, and `environment.json` beside it; returns the first.

    The environment also stands within the result: several results share a folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    here = environment()
    _write(folder / "environment.json", here)
    return _write(folder / f"{name}.json", {**result, "environment": here})


def _write(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _cpu() -> str:
    """The processor's model name."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()
