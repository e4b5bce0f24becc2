"""The Optuna record of every proxy. Optuna keeps the record; it is not the queue."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import get_args

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from ird_search.candidate import Kind, Trial
from ird_search.errors import ResourceError
from ird_search.ledger import Ledger, Unit

NAME = "ird-search"


class Study:
    """One Optuna trial for each fine-tune: parameters, score, and what else was seen.

    The `stage` says what a trial was for: `warm-up`, `choose` or `verdict`; only trials of one
    stage and as many `steps` can be compared, since each stage has held-out samples of its own.

    Args:
        path: an SQLite file; in memory where left out. An older record there is replaced: the
            ledger holds the finished units, and a run that goes on tells them again.
    """

    def __init__(self, path: Path | None = None) -> None:
        if path is not None:
            for torn in (path, *path.parent.glob(f"{path.name}-*")):  # SQLite's journals, too
                torn.unlink(missing_ok=True)
        with quiet(), _room():
            storage = None if path is None else _storage(path)
            # The sampler is named because its default changes between versions.
            self.study = optuna.create_study(
                storage=storage,
                study_name=NAME,
                direction="minimize",
                sampler=optuna.samplers.RandomSampler(seed=0),
            )

    def record(self, done: Unit) -> None:
        """Tell Optuna of one finished fine-tune. A failed one is a failed trial with its reason."""
        trial, told = Trial(**done.result["trial"]), done.result["told"]
        attributes = {k: told[k] for k in ("stage", "steps")}
        attributes |= {"seconds": trial.seconds, "seed": trial.seed}
        attributes |= {f"metric_{k}": v for k, v in trial.metrics.items()}
        if trial.failure:
            attributes["failure"] = trial.failure
        with quiet(), _room():
            self.study.add_trial(
                create_trial(
                    state=TrialState.COMPLETE if trial.ok else TrialState.FAIL,
                    value=trial.score if trial.ok else None,
                    params={
                        "kind": told["kind"],
                        "samples": told["samples"] or 0,
                        "parameters": told["parameters"],
                        "learning_rate": trial.rate,
                    },
                    distributions={
                        "kind": CategoricalDistribution(get_args(Kind)),
                        "samples": IntDistribution(0, 2**31),
                        "parameters": IntDistribution(0, 2**53),
                        "learning_rate": FloatDistribution(0, 1e300),
                    },
                    user_attrs=attributes,
                )
            )


def _storage(path: Path) -> RDBStorage:
    """By a connection of our own: in a URL, a { or ? of the path would mean something else."""
    connect = partial(sqlite3.connect, path, timeout=60, check_same_thread=False)
    return RDBStorage("sqlite://", engine_kwargs={"creator": connect, "poolclass": NullPool})


def is_whole(path: Path, ledger: Ledger) -> bool:
    """Whether a study can be read and has every fine-tune of the ledger."""
    done = sum(1 for _ in ledger.finished("proxy"))
    if not path.exists():
        return False
    try:
        with quiet():
            found = optuna.load_study(study_name=NAME, storage=_storage(path))
            return len(found.trials) >= done  # a unit may have been lost since, and no trial
    except (KeyError, StorageInternalError, SQLAlchemyError, ValueError):
        return False  # no study in it, no SQLite, or a torn one


def restore(path: Path, ledger: Ledger) -> None:
    """Make a study from the ledger alone."""
    study = Study(path)
    for unit in ledger.finished("proxy"):
        study.record(unit)


@contextmanager
def _room() -> Iterator[None]:
    """A record that cannot be written: the disk is full, or gone."""
    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        raise ResourceError(
            f"The study could not be written: {str(error)[:200]!r}. Make room "
            "or choose another disk."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna's own progress lines would mix with ours."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
