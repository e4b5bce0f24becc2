"""A directory that is written is there whole, or not at all; and the errors blame who is to blame.

Single files are tested with the artifacts, in `test_artifact.py`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ird_search.errors import ResourceError, UsageError
from ird_search.files import written_directory


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, hidden ones too."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def fill(place: Path) -> None:
    (place / "a.json").write_bytes(b"{}")
    (place / "below").mkdir()
    (place / "below" / ".b").write_bytes(b"1")


def test_success_leaves_exactly_the_files(tmp_path: Path) -> None:
    path = tmp_path / "new" / "adapter"
    with written_directory(path) as place:
        fill(place)
        assert not path.exists() and place.parent == path.parent
    assert contents(tmp_path) == {"new/adapter/a.json": b"{}", "new/adapter/below/.b": b"1"}
    assert [p.name for p in path.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no"),
        KeyboardInterrupt(),
        FileNotFoundError(errno.ENOENT, "No such file", "vocab.txt"),
        PermissionError(errno.EACCES, "Permission denied", "cache"),
        UsageError("the caller's own"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_block_raises_is_passed_on_and_leaves_nothing(
    tmp_path: Path, error: BaseException
) -> None:
    with pytest.raises(type(error)) as caught, written_directory(tmp_path / "adapter") as place:
        fill(place)
        raise error
    assert caught.value is error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("where", ["block", "mkdir", "fsync", "rename"])
def test_a_disk_that_gives_out_is_a_resource_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(ResourceError) as caught, monkeypatch.context() as patch:
        if where != "block":
            patch.setattr(os, where, fail)
        with written_directory(tmp_path / "adapter") as place:
            (place / "a").write_bytes(b"1")
            if where == "block":
                fail()
    says = f"{tmp_path / 'adapter'} could not be written: {os.strerror(number)}."
    assert str(caught.value).startswith(says)  # how many bytes it would have been is not known
    assert not list(tmp_path.iterdir())


def no_directory(path: Path) -> None:
    path.parent.write_bytes(b"a file")


def no_permission(path: Path) -> None:
    path.parent.mkdir()
    path.parent.chmod(0o500)


@pytest.mark.parametrize("spoil", [no_directory, no_permission], ids=lambda f: f.__name__)
def test_a_place_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    path = tmp_path / "parent" / "adapter"
    spoil(path)
    if os.access(path.parent, os.W_OK) and path.parent.is_dir():
        pytest.skip("a user who may write everywhere")
    before = contents(tmp_path)
    with (
        pytest.raises(UsageError, match=r"adapter cannot be written: .* Choose a place in a dir"),
        written_directory(path),
    ):
        pytest.fail("the block ran")
    assert contents(tmp_path) == before


def test_what_is_there_already_is_refused_before_the_work(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "mine").write_bytes(b"1")
    with pytest.raises(UsageError, match="is there already"), written_directory(path):
        pytest.fail("the block ran")
    assert contents(tmp_path) == {"adapter/mine": b"1"}


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch], ids=["directory", "file"])
def test_what_comes_there_meanwhile_is_refused(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "adapter"
    with pytest.raises(UsageError, match="is there already"), written_directory(path) as place:
        fill(place)
        make(path)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    assert not contents(path)
