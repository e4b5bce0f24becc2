"""`resolve_device`: where a model runs."""

from __future__ import annotations

import torch

from ird_search.errors import UsageError


def resolve_device(device: str) -> torch.device:
    """A device by name; `auto` is CUDA where there is one, else the CPU (`mps` by name only).

    Raises:
        UsageError: no such device here.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UsageError(
            f"Unknown device {device!r}; accepted are auto, cpu, cuda, cuda:1, mps."
        ) from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found.type == "cuda" and (found.index or 0) >= count:
        raise UsageError(f"{device} is not available: {count} CUDA devices are visible.")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("mps is not available on this machine.")
    if found.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"{device} is not supported; accepted are auto, cpu, cuda, cuda:1, mps.")
    return found
