"""The fused kernel for linear layers on a CPU: `native.c`, compiled where it runs.

As `kernel` does on a GPU, it keeps a tile of a sample's gradient in registers and writes only sums.
Formed in memory, B gradients of a weight [m, n] are 4 B m n bytes, written once and read twice, by
products over the T tokens of one sample: with few tokens that takes longer than multiplying.

    operations   2 B T m n, as one plain gradient of the weight
    bytes        8 m n for the sums, m n for a mask's marks, 8 B T (m + n) to pack the factors

It needs a C compiler (`$CC`, cc, gcc or clang), once for each kind of processor: what is compiled
lies in the user's cache folder (`$XDG_CACHE_HOME`, ~/.cache).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")

NEAR_BYTES = 384 * 1024
"""Of the left factor's panels, so many are gone through with each panel of the right one: they stay
in the processor's second cache."""

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_ssize_t


def add_squares(
    left: Tensor,
    right: Tensor,
    *,
    sums: Tensor | None = None,
    means: Tensor | None = None,
    marks: Tensor | None = None,
    scored: bool = True,
) -> Tensor:
    """Add Σ_b G[b]² to `sums` and Σ_b G[b] to `means`, and return Σ_j marks[j] G[b, j]²: [B].

    Args:
        left: the factor along the rows of the weight, [B, T, m], of any strides.
        right: the factor along its columns, [B, T, n].
        sums: float32 [m · n], contiguous as the next two.
        means: float32 [m · n].
        marks: uint8 [m · n]; 1 everywhere where left out.
        scored: whether row scores are wanted; else they are zero.

    Raises:
        OSError: there is no compiler, or what it made cannot be loaded.
        subprocess.CalledProcessError: the compiler refuses the source.
    """
    library = _library()
    (batch, tokens, m), n = left.shape, right.shape[2]
    height, width = (_SIZE.in_dll(library, f"{side}_of_tile").value for side in ("rows", "columns"))
    lefts, rights = (
        _packed(left, height, library.pack_left),
        _packed(right, width, library.pack_right),
    )

    def some(panels: range) -> Tensor:
        scores = torch.zeros(batch, dtype=torch.float64)
        outs = (sums, means, marks, scores if scored else None)
        library.add_squares(
            *(lefts.data_ptr(), rights.data_ptr(), batch, tokens, m, n, panels.start, panels.stop),
            *(None if x is None else x.data_ptr() for x in outs),
        )
        return scores

    panels, threads = range(-(-m // height)), torch.get_num_threads()
    near = max(1, NEAR_BYTES // (4 * batch * tokens * height))
    step = min(near, -(-len(panels) // threads))
    parts = [panels[start : start + step] for start in panels[::step]]
    if threads == 1 or len(parts) == 1:
        found = list(map(some, parts))
    else:
        with ThreadPoolExecutor(min(threads, len(parts))) as pool:
            found = list(pool.map(some, parts))
    return torch.stack(found).sum(0).float()


def _packed(x: Tensor, size: int, pack: Callable[..., None]) -> Tensor:
    """A factor in panels of so many columns."""
    whole = x.float().contiguous()
    tokens, width = whole.shape[0] * whole.shape[1], whole.shape[2]
    out = torch.empty(-(-width // size) * tokens * size)
    pack(whole.data_ptr(), tokens, width, out.data_ptr())
    return out


@cache
def _library() -> ctypes.CDLL:
    """What was compiled for this processor, now or earlier."""
    compiler = _compiler()
    told = subprocess.run(
        [*compiler, *FLAGS, "-dM", "-E", "-x", "c", os.devnull], capture_output=True, check=True
    )  # all that the compiler knows of itself and the processor
    parts = (SOURCE.read_bytes(), " ".join(compiler).encode(), told.stdout)
    name = hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]
    with _folder() as folder:
        path = folder / f"native-{name}.so"
        if not path.exists():
            with TemporaryDirectory(dir=folder) as beside:
                made = Path(beside) / path.name
                command = [*compiler, *FLAGS, "-o", str(made), str(SOURCE)]
                subprocess.run(command, capture_output=True, check=True)
                made.replace(path)
        library = ctypes.CDLL(str(path))
    for function in (library.pack_left, library.pack_right):
        function.argtypes, function.restype = (_POINTER, _SIZE, _SIZE, _POINTER), None
    library.add_squares.argtypes = (*[_POINTER] * 2, *[_SIZE] * 6, *[_POINTER] * 4)
    library.add_squares.restype = None
    return library


def _compiler() -> list[str]:
    """The command of a C compiler."""
    chosen = shlex.split(os.environ.get("CC", ""))
    for command in (chosen, ["cc"], ["gcc"], ["clang"]):
        if command and shutil.which(command[0]):
            return command
    raise FileNotFoundError("no C compiler was found (set CC to one)")


@contextmanager
def _folder() -> Iterator[Path]:
    """The user's cache, or a folder for the moment where that cannot be written to."""
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ird_search"
    try:
        cached.mkdir(parents=True, exist_ok=True)
        writable = os.access(cached, os.W_OK)
    except (OSError, RuntimeError):  # no home at all
        writable = False
    if writable:
        yield cached
    else:
        with TemporaryDirectory() as folder:
            yield Path(folder)
