"""`seal`, `unseal`: small JSON files that know when they are damaged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def seal(content: Mapping[str, Any]) -> bytes:
    """A JSON object with its own hash under `sha256`.

    Example:
        >>> unseal(seal({"loss": 0.5}))
        {'loss': 0.5}
        >>> unseal(seal({"loss": 0.5}).replace(b"5", b"4", 1)) is None
        True
    """
    whole = {**content, "sha256": _sum(content)}
    return json.dumps(whole, indent=1, allow_nan=False).encode()


def unseal(data: bytes) -> dict[str, Any] | None:
    """The object again; None where the bytes are cut, edited, or something else."""
    try:
        found = json.loads(data)
        return found if found.pop("sha256") == _sum(found) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _sum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
