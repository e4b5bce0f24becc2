"""The files of a ledger's units, without the libraries that their tensors need."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

from ird_search.sealed import unseal

UnitKind = Literal["proxy", "narrowing", "fisher", "head", "check", "answers"]


def tensors_of(path: Path, sha256: str) -> Path:
    """Where the tensors of the unit at `path` lie.

    Named by what is in it: two processes that record one unit never mix their files.
    """
    return path.with_name(f"{path.stem}-{sha256[:16]}.safetensors")


def read_unit(path: Path) -> tuple[dict[str, Any], bytes] | None:
    """(what is recorded, the bytes of its tensors); None where a file is torn, edited or gone."""
    try:
        stored = unseal(path.read_bytes())
        if stored is None or path.stem.partition("-")[2] != stored["key"]:
            return None
        if "tensors" not in stored:
            return stored, b""
        data = tensors_of(path, stored["tensors"]).read_bytes()
    except (OSError, KeyError, TypeError):
        return None
    return (stored, data) if hashlib.sha256(data).hexdigest() == stored["tensors"] else None
