"""Faults on real processes: what `python -m benchmarks.faults` does many times, a few times."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.faults import Row, disk, kills, ledger, memory, signals, workers
from benchmarks.faults.tiny import Bench, bench
from ird_search.crash import POINTS


@pytest.fixture(scope="module")
def b() -> Iterator[Bench]:
    with bench() as found:
        yield found


@pytest.fixture(scope="module")
def half(b: Bench) -> Path:
    return ledger.almost_done(b)


def kept(row: Row, *, at_least: int) -> None:
    """What was promised was true each time, and it was tried so often."""
    assert not row.failures and row.held == row.tried >= at_least, row


def test_killed_at_random_moments(b: Bench) -> None:
    kept(kills.at_random(b, times=4), at_least=4)


def test_killed_at_every_named_point(b: Bench) -> None:
    kept(kills.at_points(b), at_least=len(POINTS))


@pytest.mark.slow
def test_killed_at_many_more_moments(b: Bench) -> None:
    kept(kills.at_random(b, times=200, seed=1), at_least=200)
    kept(kills.at_points(b, again=True), at_least=4 * len(POINTS))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal(
    b: Bench, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "SECONDS", float("inf"))  # the machine may be busy
    kept(signals.stopped_by(b, number, times=1), at_least=1)


def test_a_full_disk(b: Bench) -> None:
    kept(disk.full(b, sizes=3), at_least=3)


def test_a_full_disk_under_a_mask_that_is_replaced() -> None:
    kept(disk.overwritten(cuts=10), at_least=10)


def test_awkward_names(b: Bench) -> None:
    kept(disk.named(b, ["%s {} ?#$HOME 模型", "quote'and\"quote\nline"]), at_least=2)


def test_places_that_cannot_be_written(b: Bench) -> None:
    kept(disk.unwritable(b), at_least=5)


def test_damaged_files_of_a_run(b: Bench, half: Path) -> None:
    kept(ledger.damaged(b, half, every=32, hows=["cut"]), at_least=2)


def test_what_changed_before_a_resume_is_refused(b: Bench, half: Path) -> None:
    kept(ledger.changed(b, half), at_least=6)


def test_a_fresh_start(b: Bench, half: Path) -> None:
    kept(ledger.fresh(b, half), at_least=3)


def test_memory_that_runs_out_at_any_call() -> None:
    kept(memory.injected(sizes=[0, 3]), at_least=11)


@pytest.mark.slow
def test_memory_that_ends(b: Bench) -> None:
    kept(memory.limited(limits=20), at_least=20)
    kept(memory.whole_runs(b, runs=20), at_least=20)


@pytest.mark.slow
def test_processes_share_units_while_some_are_killed_or_stopped() -> None:
    kept(workers.tiny_units(rounds=2), at_least=2)


@pytest.mark.slow
def test_workers_give_the_same_bytes(b: Bench) -> None:
    for row in workers.whole_runs(b.place, runs=4):
        kept(row, at_least=3)


@pytest.mark.slow
def test_two_runs_in_one_directory(b: Bench) -> None:
    kept(disk.two_at_once(b), at_least=3)
