"""The Optuna record."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from ird_search.proxy import Trial
from ird_search.study import NAME, Study

GOOD = Trial(1e-3, 0, 0.4, 0.4, {"accuracy": 0.9}, 1.5)
BETTER = Trial(1e-2, 0, 0.3, 0.3, {"accuracy": 0.8}, 2.5)
FAILED = Trial(1.0, 0, 0.0, 0.0, {}, 0.5, "Training diverged at step 3: the loss is nan.")


def fill(study: Study) -> None:
    study.record(GOOD, kind="ird", samples=8, parameters=50, stage="round 1, both")
    study.record(FAILED, kind="random", samples=None, parameters=50, stage="control")
    study.record(BETTER, kind="ird", samples=4, parameters=25, stage="round 2, rows")


def test_optuna_reads_the_record(tmp_path: Path) -> None:
    fill(Study(tmp_path / "study.db"))
    found = optuna.load_study(study_name=NAME, storage=f"sqlite:///{tmp_path / 'study.db'}")
    good, failed, better = found.trials
    assert (good.state, failed.state) == (TrialState.COMPLETE, TrialState.FAIL)
    assert good.params == {"kind": "ird", "samples": 8, "parameters": 50, "learning_rate": 1e-3}
    assert good.user_attrs == {
        "stage": "round 1, both",
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
