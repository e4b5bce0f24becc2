"""The run directory: who may write it, and what a stopped run leaves."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from ird_search.errors import DataError, NoProxySucceeded, ResourceError, UsageError
from ird_search.ledger import Ledger, Unit, unit_key
from ird_search.rundir import CONFIG, LOCK, MASK, ROUNDS, RunDirectory, read_config

SETTINGS: dict[str, Any] = {"model": "tiny", "density": 0.005, "include": [], "limit": None}

HOLDER = """
import sys
import threading
from pathlib import Path
from ird_search.rundir import RunDirectory
with RunDirectory(Path(sys.argv[1])).claimed({"model": "tiny"}):
    print("held", flush=True)
    sys.stdin.read()
"""


def files(path: Path) -> set[str]:
    return {p.name for p in path.iterdir()}


def refused(path: Path, settings: dict[str, Any] = SETTINGS) -> str:
    """The message; and nothing may have changed."""
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} if path.is_dir() else {}
    with pytest.raises(UsageError) as error, RunDirectory(path).claimed(settings):
        pytest.fail("the directory was given away")
    after = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} if path.is_dir() else {}
    assert before == after
    return str(error.value)


def test_a_new_directory_is_made_with_its_config(tmp_path: Path) -> None:
    place = RunDirectory(tmp_path / "runs" / "one")
    with place.claimed(SETTINGS):
        assert files(place.path) == {CONFIG, LOCK}
        assert read_config(place.path / CONFIG) == SETTINGS
    assert list(yaml.safe_load((place.path / CONFIG).read_text())) == list(SETTINGS)


def test_the_same_settings_go_on(tmp_path: Path) -> None:
    place = RunDirectory(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt), place.claimed(SETTINGS):
        place.write_rounds([{"round": 1}])
        raise KeyboardInterrupt
    with place.claimed(dict(SETTINGS)):
        assert (place.path / ROUNDS).read_text() == '{"round": 1}\n'


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    with RunDirectory(tmp_path).claimed(SETTINGS):
        pass
    text = refused(tmp_path, {**SETTINGS, "density": 0.01, "include": ["query"]})
    assert "holds an unfinished run with other settings: density was 0.005, is 0.01, " in text
    assert "include was [], is ['query']. Choose another directory" in text


def test_a_finished_run_is_refused(tmp_path: Path) -> None:
    with RunDirectory(tmp_path).claimed(SETTINGS):
        (tmp_path / MASK).write_bytes(b"mask")
    assert "holds a finished run (mask.safetensors). Read it with load_mask" in refused(tmp_path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (tmp_path / name).write_text("mine")
    text = refused(tmp_path)
    assert "is not empty: it holds a.txt, b.txt, c.txt and 1 more. Choose an empty" in text
    (tmp_path / CONFIG).write_text("[1, 2]")
    assert "must hold `name: value` lines" in refused(tmp_path)


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    assert "run is a file; a directory is needed." in refused(tmp_path / "run")
    assert "cannot be used: Not a directory." in refused(tmp_path / "run" / "deeper")


def test_another_process_holds_it(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        text = refused(tmp_path / "run", {"model": "tiny"})
        assert f"is in use by process {holder.pid}. Wait for it" in text
        holder.communicate("")
    with RunDirectory(tmp_path / "run").claimed({"model": "tiny"}):
        pass  # it is free again


def test_bad_input_leaves_a_directory_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "new", tmp_path / "empty"):
        place = RunDirectory(path)
        with pytest.raises(DataError), place.claimed(SETTINGS):
            place.write_rounds([])
            place.ledger.mkdir()
            (place.ledger / "unit.json").write_text("{}")
            raise DataError("Rows without a finite gradient.")
        assert not path.exists()
        with place.claimed({**SETTINGS, "density": 0.5}):
            pass  # a corrected run is not refused


def test_finished_units_outlive_an_error(tmp_path: Path) -> None:
    place = RunDirectory(tmp_path / "run")
    with pytest.raises(NoProxySucceeded), place.claimed(SETTINGS):
        raise NoProxySucceeded("round 1: diverged")
    assert CONFIG in files(place.path)
    with pytest.raises(DataError), place.claimed(SETTINGS):  # a run that went on
        raise DataError("Rows without a finite gradient.")
    assert CONFIG in files(place.path)


def test_rounds_are_json_lines_without_nan(tmp_path: Path) -> None:
    place = RunDirectory(tmp_path)
    place.write_rounds([{"round": 1}, {"round": 2, "score": None}])
    assert (tmp_path / ROUNDS).read_text() == '{"round": 1}\n{"round": 2, "score": null}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        place.write_rounds([{"score": float("nan")}])
    assert (tmp_path / ROUNDS).read_text().count("\n") == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read: No such file or directory."),
        ("a: [1", "is no YAML: while parsing a flow sequence"),
        ("- 1\n- 2\n", "must hold `name: value` lines."),
        ("", "must hold `name: value` lines."),
        (b"\xff\xfe\x00", "is no YAML"),
    ],
)
def test_a_config_that_is_none(tmp_path: Path, text: str | bytes | None, words: str) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as error:
        read_config(path)
    assert words in str(error.value) and str(path) in str(error.value)


def test_a_fault_of_the_file_system_takes_no_finished_unit_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stale handle may pass; and whatever the error is called, what is done stays."""
    place = RunDirectory(tmp_path / "run")

    def fault(number: int) -> None:
        def replace(*args: object) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            place.write_rounds([])

    for number, kind in ((errno.ESTALE, ResourceError), (errno.EACCES, UsageError)):
        with pytest.raises(kind), place.claimed(SETTINGS):
            Ledger(place.ledger).put("proxy", unit_key({}), Unit({}))
            fault(number)
        assert len(Ledger(place.ledger)) == 1 and CONFIG in files(place.path)


def test_whoever_looks_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    place = RunDirectory(tmp_path)
    with place.held():
        with pytest.raises(UsageError, match=f"in use by process {os.getpid()}"), place.held():
            pass
        lock = os.open(tmp_path / LOCK, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    threading.Timer(0.1, os.close, [lock]).start()
    with place.claimed(SETTINGS):
        pass
    assert place.process() is None


def test_what_a_run_works_on_is_noted_and_compared(tmp_path: Path) -> None:
    place = RunDirectory(tmp_path)
    about, versions = {"weights": "sha256 ab"}, {"torch": "2.13"}
    assert place.settle(SETTINGS, about, versions) == []
    assert place.settle({**SETTINGS, "workers": 4}, about, versions) == []
    (note,) = place.settle(SETTINGS, about, {"torch": "2.14"})
    assert "torch was '2.13', is '2.14'" in note
    with pytest.raises(UsageError, match=r"weights was 'sha256 ab', is 'sha256 cd'.*--fresh"):
        place.settle(SETTINGS, {"weights": "sha256 cd"}, versions)
    with pytest.raises(UsageError, match=r"density was 0.005, is 0.5"):
        place.settle({**SETTINGS, "density": 0.5}, about, versions)
    (tmp_path / "run.json").write_text("{}")  # damaged: noted anew
    assert place.settle(SETTINGS, {"weights": "sha256 cd"}, versions) == []
