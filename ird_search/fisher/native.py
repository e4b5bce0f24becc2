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
import logging
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from ird_search.errors import ResourceError, UsageError
from ird_search.files import write_atomically

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")

NEAR_BYTES = 384 * 1024
"""Of the left factor's panels, so many are gone through with each panel of the right one: they stay
in the processor's second cache."""

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_ssize_t


class NoCompilerError(OSError):
    """There is no C compiler here."""


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
        NoCompilerError: there is none.
        OSError: it fails, or what it made cannot be loaded.
        ValueError: a tensor does not hold what is to be read or written there.
    """
    (batch, tokens, m), n = left.shape, right.shape[2]
    _require(left, (batch, tokens, m), left.dtype)
    _require(right, (batch, tokens, n), right.dtype)
    for x, dtype in ((sums, torch.float32), (means, torch.float32), (marks, torch.uint8)):
        if x is not None:
            _require(x, (m * n,), dtype)
            if not x.is_contiguous():
                raise ValueError("Entries are read and written without gaps; these have some.")
    if not batch * tokens:
        return torch.zeros(batch, dtype=torch.float32)
    library = _library()
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


def _require(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """C reads and writes what it is told; nothing else would notice."""
    if x.shape != shape or x.dtype != dtype or x.device.type != "cpu":
        found = f"{x.dtype} {list(x.shape)} on {x.device}"
        raise ValueError(f"{dtype} {list(shape)} on the CPU is wanted, not {found}.")


def _packed(x: Tensor, size: int, pack: Callable[..., None]) -> Tensor:
    """A factor in panels of so many columns."""
    whole = x.float().contiguous()
    tokens, width = whole.shape[0] * whole.shape[1], whole.shape[2]
    out = torch.empty(-(-width // size) * tokens * size, dtype=torch.float32)
    pack(whole.data_ptr(), tokens, width, out.data_ptr())
    return out


@cache
def _library() -> ctypes.CDLL:
    """What was compiled for this processor, now or earlier."""
    compiler = _compiler()
    told = _run([*compiler, *FLAGS, "-dM", "-E", "-x", "c", os.devnull])
    # all that the compiler knows of itself and of the processor
    parts = (SOURCE.read_bytes(), shlex.join([*compiler, *FLAGS]).encode(), told)
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    path = _kept(key)
    library = _compiled(compiler, key) if path is None else ctypes.CDLL(str(path))
    for function in (library.pack_left, library.pack_right):
        function.argtypes, function.restype = (_POINTER, _SIZE, _SIZE, _POINTER), None
    library.add_squares.argtypes = (*[_POINTER] * 2, *[_SIZE] * 6, *[_POINTER] * 4)
    library.add_squares.restype = None
    return library


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ird_search"


def _name(key: str, content: bytes) -> str:
    """A name that tells a whole file from a damaged one, which would end the process."""
    return f"native-{key}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def _kept(key: str) -> Path | None:
    """What was compiled earlier, if it is as it was written."""
    with suppress(OSError, RuntimeError):  # it cannot be read, or there is no home
        for path in _folder().glob(f"native-{key}-*.so"):
            if path.name == _name(key, path.read_bytes()):
                return path
    return None


def _compiled(compiler: Sequence[str], key: str) -> ctypes.CDLL:
    """Compile and load; kept for later where the cache can be written to."""
    with TemporaryDirectory() as folder:
        made = Path(folder) / "native.so"
        _run([*compiler, *FLAGS, "-o", str(made), str(SOURCE)])
        try:
            content = made.read_bytes()
            path = _folder() / _name(key, content)
            write_atomically(path, content)
        except (UsageError, ResourceError, RuntimeError) as problem:
            log.info("The compiled kernel is not kept: %s", problem)
            path = made
        return ctypes.CDLL(str(path))


def _run(command: Sequence[str]) -> bytes:
    """What the compiler says.

    Raises:
        OSError: it fails, and how.
    """
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        wrong = [line for line in lines if "error" in line] or lines[-1:]
        said = wrong[0] if wrong else f"exit status {done.returncode}"
        raise OSError(f"{command[0]} does not compile it: {said}")
    return done.stdout


def _compiler() -> list[str]:
    """The command of a C compiler."""
    chosen = shlex.split(os.environ.get("CC", ""))
    for command in (chosen, ["cc"], ["gcc"], ["clang"]):
        if command and shutil.which(command[0]):
            return command
    raise NoCompilerError("no C compiler was found (set CC to one)")
