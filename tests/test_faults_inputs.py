"""Bad input by the file: the campaign of `benchmarks.faults.inputs`, some of its cases."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.faults import trial
from benchmarks.faults.bad_files import cases
from benchmarks.faults.cases import changed, of_rows
from benchmarks.faults.inputs import from_python, processes
from benchmarks.faults.not_finite import samples, weights
from benchmarks.faults.trial import Place, kept, outcome, tried

CASES = cases(huge=False)
BAD = [case for case in CASES if not case.works]
SOUND = [case for case in CASES if case.works]


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast it is belongs to the campaign: a test must not depend on a busy machine."""
    monkeypatch.setattr(trial, "SECONDS", float("inf"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("inputs"))


def test_bad_input_is_told_before_any_work(place: Place) -> None:
    rows = tried(place, BAD[::7])  # the formats take turns
    assert len(rows) == 8 and sum(row.tried for row in rows) > 45
    for row in rows:
        assert row.held == row.tried, row.failures


def test_the_campaign_sees_what_is_not_kept(place: Place) -> None:
    (bad,) = of_rows("", "", changed(7, label=-1), "row 7", formats=("csv",))
    for other in (replace(bad, said=("row 8",)), replace(bad, code=4), replace(bad, said=())):
        assert kept(other, found := outcome(place, other)), found


def test_unusual_input_works(place: Place) -> None:
    (row,) = tried(place, SOUND[::16])
    assert row.tried >= 2 and row.held == row.tried, row.failures


def test_python_says_the_same(place: Place) -> None:
    row = from_python(place, BAD[::9])
    assert row.tried > 10 and row.held == row.tried, row.failures


def test_weights_that_are_not_finite_are_named(place: Place) -> None:
    row = weights(place, tensors=2)
    assert row.tried == 6 and row.held == row.tried, row.failures


def test_samples_without_a_finite_likelihood_are_left_out_or_listed() -> None:
    for row in samples(2)[:2]:
        assert row.tried == row.held == 2, row.failures


@pytest.mark.slow
def test_every_format_of_every_case(place: Place) -> None:
    for row in tried(place, cases()):
        assert row.held == row.tried, row.failures


@pytest.mark.slow
def test_bad_input_in_a_process_of_its_own(place: Place) -> None:
    row = processes(place, BAD[::40])
    assert row.held == row.tried, row.failures
