"""The table, as plain text and as Markdown."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from ird_search import report
from ird_search.candidate import ProxyScore, Trial
from ird_search.mask import SparseMask
from ird_search.pair import Pair, Scored
from ird_search.parameters import ParameterSpace
from ird_search.search import Round
from ird_search.verdict import Entry, Verdict

SPACE = ParameterSpace(tuple(f"layer.{i}" for i in range(20)), ((10,),) * 20)
FAILED = Trial(1e-2, 0, 0.0, 0.0, {}, 0.1, "Training diverged")
GOOD = Trial(1e-3, 0, 0.25, 0.25, {"accuracy": 0.875}, 0.1)
PROVENANCE: dict[str, Any] = {
    "dataset": {"origin": "train.csv"},
    "base_model": {"id": "tiny"},
    "fisher": {"path": "taps"},
    "notes": ["One thing more."],
    "head": ["out.weight", "out.bias"],
    "learning_rate": 1e-3,
    "search": {"learning_rate": None, "head_learning_rate": 3e-3},
}


def one(move: Any, *trials: Trial) -> Scored:
    coords = torch.arange(0, 200, 10)
    best = min(trials, key=lambda t: t.score if t.ok else 9)
    pair = Pair(torch.arange(8), None, coords, 1, 1)
    return Scored(move, pair, SparseMask(SPACE, coords), ProxyScore(best, trials))


OURS = torch.tensor([[0.4, 0.6], [0.6, 0.8]])
BEST, BAD = one("both", GOOD, FAILED), one("rows", FAILED)
ROUND = Round(1, (BAD, BEST), BEST)
VERDICT = Verdict(
    (
        Entry("ird", 8, 0.1, 20, 1e-3, 0.25, (0.5, 0.7), 0.9, by_sample=OURS),
        Entry("fish", 8, 0.1, 20, 1e-3, 0.3, (0.6, 0.8), 0.8, by_sample=OURS + 0.1),
        Entry("random", None, 0.1, 20, 1e-2, float("inf"), (), float("nan"), "Training diverged"),
        Entry("lora", None, 0.09, 18, 1e-3, 0.4, (0.5, 0.6), 0.9, by_sample=OURS),
        Entry("full", None, 1.0, 1200, 3e-4, 0.2, (0.4, 0.4), 0.95, by_sample=OURS - 0.2),
        Entry("head", None, 0.0, 0, 3e-3, 0.4, (0.9, 0.9), 0.5, by_sample=OURS + 0.3),
    ),
    "accuracy",
    40,
    {"shuffle": "it is not asked for"},
)


def test_the_table_as_text() -> None:
    header, ruler, *lines = report.text_table(VERDICT).splitlines()
    assert " ".join(header.split()) == (
        "samples density trained rate loss, 1st half loss, 2nd half accuracy"
    )
    assert len({len(line) for line in (header, ruler, *lines)}) == 1
    assert " ".join(lines[0].split()) == (
        "IRD (this mask) 8 10.000% 20 1.0e-03 0.2500 0.6000 ± 0.1414 0.9000"
    )
    assert " ".join(lines[2].split()).endswith("– 10.000% 20 1.0e-02 failed Training diverged")
    assert lines[3].split()[:4] == ["LoRA", "–", "–", "18"]
    assert lines[4].split()[2:6] == ["–", "–", "1,200", "3.0e-04"]


def test_the_table_as_markdown() -> None:
    lines = report.markdown_table(VERDICT).splitlines()
    assert len(lines) == 8 and len({line.count("|") for line in lines}) == 1
    assert lines[1].startswith("|---|---:|")


def test_what_the_numbers_are() -> None:
    text = report.explained(VERDICT)
    assert "2nd half (40 samples) was seen by no choice" in text
    assert "over 2 seeds" in text and "Noise floor: 0.1414." in text
    assert VERDICT.sentence("random") in text and VERDICT.sentence("fish") in text
    assert "Not compared with a random mask with as many entries in each tensor: it is not" in text
    assert VERDICT.sentence("lora") not in text  # it is in the record


def test_one_rate_for_all_is_not_called_everyones_best() -> None:
    text = report.explained(VERDICT, 0.01)
    assert "own best" not in text and "every line at the rate 1.0e-02 that was given" in text
    assert "own best" in report.explained(VERDICT)


def test_a_round_in_one_line() -> None:
    assert report.round_line(ROUND) == "round 1:   rows 8 × 20 failed   →both 8 × 20 0.2500"
    short = replace(BEST, proxy=replace(BEST.proxy, short=True))
    line = report.round_line(Round(2, (short, BEST), BEST))
    assert line == "round 2:   both 8 × 20 (0.2500)   →both 8 × 20 0.2500"


def test_records_are_json_without_nan() -> None:
    found = json.loads(json.dumps(report.round_record(ROUND), allow_nan=False))
    assert found["moved_to"] == "both" and found["round"] == 1
    bad, best = found["nominated"]
    assert best["score"] == 0.25 and best["metrics"] == {"accuracy": 0.875}
    assert best["rates"] == [
        {"learning_rate": 1e-3, "score": 0.25, "failure": ""},
        {"learning_rate": 1e-2, "score": None, "failure": "Training diverged"},
    ]
    assert best["short"] is False and best["probes"] == []
    assert bad["score"] is None and (bad["samples"], bad["parameters"]) == (8, 20)
    table = json.loads(json.dumps(report.verdict_record(VERDICT), allow_nan=False))
    assert [e["kind"] for e in table] == ["ird", "fish", "random", "lora", "full", "head"]
    assert table[2]["choose_score"] is None and table[2]["accuracy"] is None
    assert table[2]["failure"] == "Training diverged" and table[0]["losses"] == [0.5, 0.7]
    assert "gain" not in table[0] and table[2]["gain"] is None and table[2]["half_width"] is None
    assert table[1]["gain"] == pytest.approx(0.1) and table[1]["half_width"] < 1e-6
    assert table[1]["sentence"].startswith("Better than a FISH mask of the same size")


def test_the_report() -> None:
    text = report.markdown(VERDICT, [ROUND], BEST, PROVENANCE)
    said = VERDICT.sentence()
    assert text.startswith(f"# Mask for tiny\n\n{said}\n\n20 of 200 candidate parameters (10.000%)")
    alone = replace(VERDICT, entries=VERDICT.entries[:2])
    text_alone = report.markdown(alone, [ROUND], BEST, PROVENANCE)
    assert text_alone.startswith("# Mask for tiny\n\n20 of 200")
    assert report.markdown_table(VERDICT) in text
    assert "learning rate of the mask: 1.0e-03" in text
    assert "(`dense`): `out.weight`, `out.bias`" in text
    assert "| 1 | both | 8 | 20 | 1.0e-03 | 0.2500 | moved here |" in text
    assert "| 1 | rows | 8 | 20 | 1.0e-02 | failed |  |" in text
    assert "| `layer.0` | 1 | 10 | 5.0% |" in text and "| 5 more tensors | | | |" in text
