"""The Optuna record."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from ird_search.candidate import Trial
from ird_search.ledger import Ledger, Unit, unit_key
from ird_search.study import NAME, Study, is_whole, restore

GOOD = Trial(1e-3, 0, 0.4, 0.4, {"accuracy": 0.9}, 1.5)
BETTER = Trial(1e-2, 0, 0.3, 0.3, {"accuracy": 0.8}, 2.5)
FAILED = Trial(1.0, 0, 0.0, 0.0, {}, 0.5, "Training diverged at step 3: the loss is nan.")


def told(trial: Trial, kind: str, samples: int | None, parameters: int, stage: str) -> Unit:
    """As the ledger holds it."""
    about = {"kind": kind, "samples": samples, "parameters": parameters, "stage": stage}
    return trial.to_unit(about | {"steps": 40})


def fill(study: Study) -> None:
    study.record(told(GOOD, "ird", 8, 50, "round 1, both"))
    study.record(told(FAILED, "random", None, 50, "control"))
    study.record(told(BETTER, "ird", 4, 25, "round 2, rows"))


def test_optuna_reads_the_record(tmp_path: Path) -> None:
    fill(Study(tmp_path / "study.db"))
    found = optuna.load_study(study_name=NAME, storage=f"sqlite:///{tmp_path / 'study.db'}")
    good, failed, better = found.trials
    assert (good.state, failed.state) == (TrialState.COMPLETE, TrialState.FAIL)
    assert good.params == {"kind": "ird", "samples": 8, "parameters": 50, "learning_rate": 1e-3}
    assert good.user_attrs == {
        "stage": "round 1, both",
        "steps": 40,
        "seconds": 1.5,
        "seed": 0,
        "metric_accuracy": 0.9,
    }
    assert failed.value is None and failed.user_attrs["failure"] == FAILED.failure
    assert failed.params["samples"] == 0
    assert found.best_trial.number == better.number and found.best_value == 0.3


def test_a_run_that_goes_on_tells_again(tmp_path: Path) -> None:
    fill(Study(tmp_path / "study.db"))
    again = Study(tmp_path / "study.db")
    fill(again)
    assert len(again.study.trials) == 3


def test_in_memory_and_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    verbosity = optuna.logging.get_verbosity()
    study = Study()
    fill(study)
    assert len(study.study.trials) == 3
    assert capfd.readouterr() == ("", "") and optuna.logging.get_verbosity() == verbosity


def test_a_damaged_study_is_made_again_from_the_ledger(tmp_path: Path) -> None:
    path, ledger = tmp_path / "study.db", Ledger(tmp_path / "ledger")
    for i, trial in enumerate((GOOD, BETTER, FAILED)):
        unit = told(trial, "ird", 8, 50, "choose")
        ledger.put("proxy", unit_key({"i": i}), unit)
    assert not is_whole(path, ledger)
    restore(path, ledger)
    assert is_whole(path, ledger)
    whole = path.read_bytes()
    for torn in (b"", whole[:1000], whole[: len(whole) // 2], b"no database" * 100, None):
        path.unlink() if torn is None else path.write_bytes(torn)
        assert not is_whole(path, ledger)
        restore(path, ledger)
        found = optuna.load_study(study_name=NAME, storage=f"sqlite:///{path}")
        assert sorted(t.state.name for t in found.trials) == ["COMPLETE", "COMPLETE", "FAIL"]
        assert found.best_value == 0.3
    ledger.put("proxy", unit_key({"i": 3}), told(GOOD, "ird", 8, 50, "verdict"))
    assert not is_whole(path, ledger)  # one was not told
