"""What is written is there whole, or not at all: `write_atomically`, `written_directory`."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from ird_search.crash import crash_point
from ird_search.errors import ResourceError, UsageError

_MISPLACED = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.ELOOP,
}
"""Errors that mean a wrong place. All others (full, over a quota, faulty, gone) may pass."""


def write_atomically(path: str | os.PathLike[str], data: bytes, *, first: bool = False) -> None:
    """Put `data` at `path`, so that a crash at any moment leaves the old file or the new one.

    The bytes go to a temporary file beside it, are forced to the disk and read back, and only then
    take the name. Missing parent directories are made.

    Args:
        first: a file that another process has put there meanwhile stays.

    Raises:
        UsageError: the place cannot be written (a read-only directory, a file for a parent).
        ResourceError: the disk is full, a quota or limit is reached, or the disk is faulty. The
            former file is as it was.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "run.json"
        >>> write_atomically(path, b"{}")
        >>> path.read_bytes()
        b'{}'
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_and_check(temporary, data)
        crash_point("file written")
        _take_name(temporary, path, first=first)
        crash_point("file in place")
        _sync_directory(path.parent)
    except BaseException as error:  # an interrupt, too, must leave no temporary file behind
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _explained(error, path, len(data)) from error
        raise


@contextlib.contextmanager
def written_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new directory that takes its name only once the block has ended without an error.

    Else nothing of it is left behind. What the block itself raises is passed on, but for a disk
    that gave out.

    Raises:
        UsageError: there is something at `path` already, or the place cannot be written.
        ResourceError: the disk is full, a quota or limit is reached, or the disk is faulty.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "adapter"
        >>> with written_directory(path) as place:
        ...     _ = (place / "config.json").write_text("{}")
        ...     path.exists()
        False
        >>> [file.name for file in path.iterdir()]
        ['config.json']
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with explaining(path):
            refuse_existing(path)
            temporary.mkdir(parents=True)
        with explaining(path, misplaced=False):
            yield temporary
        with explaining(path):
            _sync_files(temporary)
            refuse_existing(path)  # a rename would replace an empty directory
            os.rename(temporary, path)
            _sync_directory(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_directory(path: Path) -> None:
    """A directory that may be there already.

    Raises:
        UsageError, ResourceError: see `write_atomically`.
    """
    with explaining(path):
        path.mkdir(parents=True, exist_ok=True)


def refuse_existing(path: Path) -> None:
    """Nothing is overwritten.

    Raises:
        UsageError: there is something at `path`.
    """
    if path.exists():
        raise UsageError(f"{path} is there already. Choose another place, or remove it first.")


def _write_and_check(path: Path, data: bytes) -> None:
    with open(path, "xb+") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        if file.read() != data:
            raise OSError(errno.EIO, "the disk gives back other bytes than were written")


def _take_name(temporary: Path, path: Path, *, first: bool) -> None:
    if first:
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(temporary, path)
            return
        temporary.unlink()
        return
    os.replace(temporary, path)


def _sync_files(directory: Path) -> None:
    for file in directory.rglob("*"):
        if file.is_file():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())


def _sync_directory(directory: Path) -> None:
    # Without this a power cut can undo the rename. Windows and some network file systems cannot
    # open or sync a directory; the file itself is whole there, too.
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def explaining(path: Path, *, misplaced: bool = True) -> Iterator[None]:
    """Say of the block's errors that the directory `path` cannot be written.

    Args:
        misplaced: also of those that mean a wrong place.
    """
    try:
        yield
    except OSError as error:
        if misplaced or error.errno not in _MISPLACED:
            raise _explained(error, path) from error
        raise


def _explained(error: OSError, path: Path, size: int | None = None) -> UsageError | ResourceError:
    """What an error of the disk means for the file `path` of this size, or for a directory."""
    reason = error.strerror or str(error)
    kind, of_size = ("place", "") if size is None else ("file", f" ({size:,} bytes)")
    if error.errno not in _MISPLACED:
        return ResourceError(
            f"{path} could not be written{of_size}: {reason}. What was there before is untouched. "
            "Make room or choose another disk, then continue."
        )
    return UsageError(
        f"{path} cannot be written: {reason}. What was there before is untouched. "
        f"Choose a {kind} in a directory that you may write to."
    )
