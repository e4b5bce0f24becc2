"""Numbers that are not finite: out of the model, out of a fine-tune, and in the weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.faults import Row
from benchmarks.faults.cases import (
    INF,
    NAN,
    ROWS,
    Case,
    of_rows,
    write_rows,
)
from benchmarks.faults.trial import Place, kept, outcome
from ird_search import fisher_scores, search_mask, training
from ird_search.errors import DataError, IRDError, NoProxySucceeded
from ird_search.models import quiet
from tests.tiny import (
    save_tiny_bert,
)
from tests.toy import QUICK, toy_net, toy_rows


class Poisoned(nn.Module):
    """The toy network, whose likelihood is NaN where the first number is large."""

    def __init__(self) -> None:
        super().__init__()
        self.net = toy_net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) + (100.0 - x[:, :1]).sqrt().mul(0.0)


def poisoned_rows(count: int, bad: Iterable[int]) -> list[tuple[torch.Tensor, int]]:
    """Toy rows of which some have a likelihood that is NaN."""
    rows = toy_rows(count)
    for i in bad:
        rows[i][0][0] = 1e4
    return rows


def samples(count: int = 10) -> list[Row]:
    """Samples whose likelihood is not finite, though their inputs are."""
    failures = []
    for i in range(count):
        found = fisher_scores(Poisoned(), poisoned_rows(200, [i]), head=[])
        if found.by_sample.isneginf().nonzero().flatten().tolist() != [i]:
            failures.append(f"row {i} is not the one that was left out")
    few = Row(
        "one sample in 200 with a NaN likelihood, scored",
        "left out and marked",
        count,
        count - len(failures),
        failures=tuple(failures[:8]),
    )
    failures = []
    for i in range(count):
        said = ""
        try:
            fisher_scores(Poisoned(), poisoned_rows(200, [i, i + 1, i + 50]), head=[])
        except DataError as error:
            said = str(error)
        if f"(counting from 0): {i}, {i + 1}, {i + 50}." not in said:
            failures.append(said)
    many = Row(
        "three in 200",
        "code 3, the rows listed",
        count,
        count - len(failures),
        failures=tuple(failures[:8]),
    )
    return [few, many, searched(count)]


def searched(count: int = 10) -> Row:
    """A search in whose data one sample has no finite likelihood, wherever it falls."""
    settings = {**QUICK, "pool": 128, "head": [r"net\.2\..*"]}
    failures = []
    for seed in range(count):
        row = seed * 37 % 200
        try:
            result = search_mask(Poisoned(), poisoned_rows(200, [row]), seed=seed, **settings)
            if row in result.samples.ids.tolist():
                failures.append(f"row {row} is among the mask's samples")
        except IRDError as error:
            if not re.search(rf"\b{row}\b", str(error)):
                failures.append(f"row {row}, code {error.exit_code}: {error}")
    return Row(
        "a search with one such sample in 200",
        "a mask from other samples, or an end that names it",
        count,
        count - len(failures),
        failures=tuple(failures[:8]),
    )


ERRORS: tuple[Exception, ...] = (
    RuntimeError("mat1 and mat2 cannot be multiplied"),
    ValueError("a bad value"),
    IndexError("index out of range in self"),
    KeyError("a key"),
    FloatingPointError("overflow"),
    AssertionError("a model's own"),
)


def fine_tunes(place: Place) -> list[Row]:
    """Fine-tunes that diverge or raise."""
    failures = []
    for error in ERRORS:
        try:
            told = failures_of(error, third=True)
            if not told or any(str(error.args[0]) not in text for text in told):
                failures.append(f"{error!r}: {told[:2]}")
        except Exception as ended:  # the search is to survive what a model raises
            failures.append(f"{error!r} in one fine-tune of three ended the search: {ended!r}")
    some = Row(
        "one fine-tune in three raises",
        "trial failed with the reason, the search goes on",
        len(ERRORS),
        len(ERRORS) - len(failures),
        failures=tuple(failures),
    )
    failures = []
    for error in ERRORS:
        try:
            told = failures_of(error, third=False)
            failures.append(f"{error!r}: a mask")
        except NoProxySucceeded as ended:
            if str(error.args[0]) not in str(ended):
                failures.append(f"{error!r}: {ended}")
        except Exception as ended:  # likewise
            failures.append(f"{error!r} in each fine-tune ended the search: {ended!r}")
    for model in ("bert", "gpt2"):
        rows = ROWS if model == "bert" else [{"text": r["text"] + " good"} for r in ROWS]
        options = {"learning-rate": "1e37", "warmup-steps": 0}
        (case,) = of_rows("", model, rows, "not finite", formats=("csv",), model=model)
        became = outcome(place, replace(case, options=options))
        assert became is not None
        if became.crash or became.code != 6 or "not finite" not in became.said:
            failures.append(f"{model}, rate 1e37: {became.code} {became.crash}{became.said[-300:]}")
    every_one = Row(
        "every fine-tune raises or diverges",
        "code 6, the reason of each",
        len(ERRORS) + 2,
        len(ERRORS) + 2 - len(failures),
        failures=tuple(failures),
    )
    return [some, every_one]


def failures_of(error: Exception, *, third: bool) -> list[str]:
    """The reasons of failed trials, where each fine-tune, or every third, raises an error."""
    calls = [0]

    def finetune(*args: Any, **more: Any) -> Any:
        calls[0] += 1
        if not third or calls[0] % 3 == 0:
            raise error
        return training.finetune(*args, **more)

    settings = {**QUICK, "learning_rate": None, "warmup_steps": 0}
    with patch("ird_search.finetunes.finetune", finetune):
        result = search_mask(toy_net(), toy_rows(), **settings)
    trials = [t for r in result.rounds for s in r.nominated for t in s.proxy.trials]
    return [t.failure for t in trials if not t.ok]


def weights(place: Place, *, tensors: int | None = None) -> Row:
    """One number that is not finite, in one tensor after the other."""
    here = place.fresh()
    with quiet():
        save_tiny_bert(here / "model")
    path = here / "model" / "model.safetensors"
    sound, failures, seconds, count = load_file(path), [], [], 0
    for name in list(sound)[:tensors]:
        for value in (NAN, INF, -INF):
            bad = {n: t.clone() for n, t in sound.items()}
            bad[name].view(-1)[-1] = value
            save_file(bad, path, metadata={"format": "pt"})
            model = Case("", name, lambda folder: write_rows(ROWS, folder / "a.csv"), (name,), 4)
            became = outcome(place, replace(model, model=str(here / "model")))
            assert became is not None
            said = f"{name}: 1 of {sound[name].numel():,} weights are not finite"
            count += 1
            seconds.append(became.seconds)
            if problem := kept(replace(model, said=(said,)), became):
                failures.append(f"{name} {value}: {problem}")
    return Row(
        "one weight that is NaN or infinite",
        "code 4, the tensor named, no work done",
        count,
        count - len(failures),
        {"seconds, worst": max(seconds)},
        tuple(failures[:8]),
    )
