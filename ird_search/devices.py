"""Where a model runs, on how many threads, and in what memory."""

from __future__ import annotations

import gc
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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


def untouched_zeros(size: int, device: torch.device) -> torch.Tensor:
    """float32 zeros [size]; on the CPU they take memory page by page, as they are written to."""
    if device.type == "cpu" and hasattr(mmap, "MAP_PRIVATE") and size:
        with suppress(OSError):  # torch says better than it that there is no memory
            pages = mmap.mmap(-1, 4 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            return torch.frombuffer(pages, dtype=torch.float32)
    return torch.zeros(size, dtype=torch.float32, device=device)


@contextmanager
def computing(*, processes: int = 1, strict: bool = False) -> Iterator[None]:
    """Within the block, the CPU's cores are shared among so many processes of torch.

    Args:
        strict: one thread in each process, and deterministic algorithms only: then the last bits
            of a sum do not depend on how many processes or cores there are.
    """
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        if strict:
            # cuBLAS reads it when it is used first; without it torch refuses its products.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        if strict or processes > 1:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else threads
            torch.set_num_threads(1 if strict else max(1, cores // processes))
        yield
    finally:
        torch.set_num_threads(threads)
        if strict:
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def release_memory() -> None:
    """Give back what nobody uses any more, after memory has run out."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
