"""The one way a benchmark's figures reach the disk: beside what they were made with."""

from __future__ import annotations

import json
from collections.abc import Mapping
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


def _write(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
