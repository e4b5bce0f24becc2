"""The tasks: each a `Problem` with rows that choose and rows for the verdict alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ird_search import demo
from ird_search.config import DataConfig, SearchConfig
from ird_search.problem import Problem, make_problem, open_samples
from ird_search.progress import Progress
from ird_search.samples import SampleSet
from ird_search.seeds import derive
from ird_search.selection import random_subset

TEXT = DataConfig(max_length=128)


@dataclass(frozen=True)
class Corpus:
    """How the rows of a text task are used.

    Args:
        limit: training rows.
        choose: rows that choose.
        from_train: take these from the training rows and leave all of the validation rows to the
            verdict; else they come from the validation rows.
    """

    limit: int | None = None
    choose: int = 272
    from_train: bool = False


CORPORA: Mapping[str, Corpus] = {
    "sst2": Corpus(limit=5000),
    "mrpc": Corpus(from_train=True),
    "rte": Corpus(from_train=True),
    "qnli": Corpus(),  # one file, of which some rows are held out
}
TASKS = ("digits", *CORPORA)

SETTINGS: Mapping[str, dict[str, Any]] = {
    "digits": {"proxy_steps": 60, "warmup_steps": 60, "eval_samples": demo.HELD_OUT},
    "sst2": {"eval_samples": 872},
    "mrpc": {"eval_samples": 408},
    "rte": {"eval_samples": 277},
    "qnli": {"eval_samples": 872},
}
"""What a task needs besides the defaults."""


def make(task: str, config: SearchConfig, *, data: Path, model: str) -> Problem:
    """A task's problem.

    Args:
        data: the folder of glue/<task>/{train,validation}.parquet.
        model: a directory or a hub id; the digits bring their own.
    """
    if task == "digits":
        return _digits(config)
    corpus, folder = CORPORA[task], data / "glue" / task
    train, validation = folder / "train.parquet", folder / "validation.parquet"
    problem = make_problem(
        model,
        train if train.exists() else validation,
        eval_data=validation if train.exists() else None,
        options=replace(TEXT, limit=corpus.limit),
        config=config,
    )
    return parted(problem, corpus, seed=config.seed)


def parted(problem: Problem, corpus: Corpus, *, seed: int) -> Problem:
    """The same problem with as many rows to choose as the corpus says."""
    held = joined(problem.choose, problem.verdict)
    source = problem.train if corpus.from_train else held
    drawn = random_subset(len(source), corpus.choose, seed=derive(seed, "benchmark, choose"))
    left = torch.ones(len(source), dtype=torch.bool)
    left[drawn] = False
    choose, rest = source.select(drawn), source.select(left.nonzero().flatten())
    if corpus.from_train:
        return replace(problem, train=rest, choose=choose, verdict=held)
    return replace(problem, choose=choose, verdict=rest)


def elsewhere(task: str, config: SearchConfig, *, data: Path, model: str) -> SampleSet:
    """Samples of a task's classes from another domain."""
    if task == "digits":
        return rotated(_digits(config).train)
    if task != "sst2":
        raise SystemExit(f"{task} has no second domain; digits and sst2 have one.")
    path = data / "shift" / "sentiment_uci" / "test.parquet"
    return open_samples(model, path, options=TEXT, config=config)[2]


def rotated(samples: SampleSet) -> SampleSet:
    """Images turned by a quarter."""
    turned = [{n: x.rot90(1, (-2, -1)) for n, x in one.items()} for one in samples.inputs]
    return replace(samples, inputs=tuple(turned))


def joined(one: SampleSet, other: SampleSet) -> SampleSet:
    """The samples of both."""
    return replace(
        one,
        inputs=(*one.inputs, *other.inputs),
        labels=torch.cat([classes(one), classes(other)]),
        ids=torch.cat([one.ids, other.ids]),
    )


def classes(samples: SampleSet) -> Tensor:
    """The class of each sample."""
    assert isinstance(samples.labels, Tensor)
    return samples.labels


def _digits(config: SearchConfig) -> Problem:
    """The demo's problem: 0-4 are known, 5-9 are to be told apart."""
    known, new = demo.digits()
    model = demo.pretrained(known, seed=config.seed, show=Progress(False))
    rows = [{**x, "label": int(y)} for x, y in zip(new.inputs, new.labels, strict=True)]
    drawn = random_subset(len(rows), demo.HELD_OUT, seed=derive(config.seed, "demo, held out"))
    held = set(drawn.tolist())
    return make_problem(
        model,
        [row for i, row in enumerate(rows) if i not in held],
        eval_data=[rows[i] for i in sorted(held)],
        options=DataConfig(),
        config=config,
    )
