"""The report on the samples: by hand, on flipped labels, and from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ird_search import search_mask
from ird_search.errors import UsageError
from ird_search.sample_report import OUTLIER, ROBUST, SampleReport, read_report, sample_report
from ird_search.samples import SampleSet
from tests.test_workers import call
from tests.toy import QUICK, toy_net, toy_rows


def pool(labels: Tensor, names: tuple[str, ...] | None = None) -> SampleSet:
    n = len(labels)
    inputs = tuple({"input": torch.zeros(2)} for _ in range(n))
    return SampleSet(inputs, labels, 10 * torch.arange(n), label_names=names)


def test_each_row_with_what_is_known_of_it() -> None:
    labels = torch.tensor([0, 1, 1, 0])
    scores = torch.tensor([1.0, 2.0, float("-inf"), 3.0])
    losses = torch.tensor([0.1, 0.2, float("nan"), 2.0])
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8], [float("nan")] * 2, [0.1, 0.9]])
    found = sample_report(pool(labels, ("no", "yes")), scores, torch.tensor([1, 3]), losses, p)
    assert [r.id for r in found.rows] == [0, 10, 20, 30]
    assert found.chosen == [10, 30] and found.balance == {"no": (2, 1), "yes": (2, 1)}
    assert [r.score for r in found.rows] == [1.0, 2.0, None, 3.0]
    assert found.rows[2].loss is None and found.rows[1].loss == pytest.approx(0.2)
    assert found.suspects == [30]  # sure of 1 by 0.9; of the row that is 1 it is by 0.8
    assert found.rows[3].suspect == 1


def test_who_is_sure_enough_of_another_class() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    p = torch.tensor([[0.4, 0.6], [0.2, 0.8], [0.1, 0.9], [0.4, 0.6]])
    found = sample_report(
        pool(labels), torch.ones(4), torch.arange(4), -p[range(4), labels].log(), p
    )
    assert found.suspects == [10]  # the mean of 1's own rows is 0.75: 0.6 is not enough, 0.8 is


def test_outliers_are_far_above_the_others() -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(200, generator=g).exp()
    logs = scores.log()
    middle = logs.median()
    limit = middle + OUTLIER * ROBUST * (logs - middle).abs().median()
    scores.clamp_(max=float((limit - 0.2).exp()))
    scores[5], scores[9] = (limit + 0.1).exp(), (limit - 0.1).exp()
    found = sample_report(
        pool(torch.zeros(200, dtype=torch.int64)), scores, torch.arange(3), torch.ones(200), None
    )
    assert found.outliers == [50] and not found.suspects
    same = sample_report(
        pool(torch.zeros(3, dtype=torch.int64)), torch.ones(3), torch.arange(3), torch.ones(3), None
    )
    assert not same.outliers


def test_flipped_labels_are_found() -> None:
    """The rule of the toy problem is learnt; rows whose label was turned contradict it."""
    rows = toy_rows(240)
    turned = set(range(0, 240, 12))
    noisy = [(x, 1 - y if i in turned else y) for i, (x, y) in enumerate(rows)]
    settings = {**QUICK, "pool": 120, "proxy_steps": 150, "density": 1.0, "rounds": 1}
    settings |= {"controls": ("random",), "seeds": 1, "learning_rate": 0.05}
    found = search_mask(toy_net(), noisy, **{**settings, "strategy": "ladder"}).sample_report
    there = turned & {r.id for r in found.rows}
    hits = there & set(found.suspects)
    assert len(hits) >= 0.5 * len(there)
    by_chance = len(found.suspects) / len(found.rows) * len(there)
    assert len(hits) > 4 * by_chance


def test_numbers_have_no_classes() -> None:
    found = sample_report(
        pool(torch.rand(3)), torch.ones(3), torch.tensor([0]), torch.ones(3), None
    )
    assert found.balance == {} and found.summary()[0] == "1 of 3 pool samples were chosen."


def test_the_command_line_prints_positions(tmp_path: Path) -> None:
    result = search_mask(toy_net(), toy_rows(), output=tmp_path / "run", **QUICK)
    said = call("rows", tmp_path / "run").stdout
    assert [int(line) for line in said.splitlines()] == result.sample_report.chosen
    for which, ids in (("outliers", "outliers"), ("suspects", "suspects")):
        said = call("rows", tmp_path / "run", "--which", which).stdout
        assert [int(x) for x in said.split()] == getattr(result.sample_report, ids)
    told = json.loads(call("rows", tmp_path / "run", "--json").stdout)
    assert [r["id"] for r in told if r["chosen"]] == result.sample_report.chosen
    assert read_report(tmp_path / "run").rows == result.sample_report.rows


def test_what_is_no_finished_run_is_told(tmp_path: Path) -> None:
    missing = call("rows", tmp_path)
    assert missing.exit_code == 2 and "Name the directory of a finished run" in missing.stderr
    (tmp_path / "samples.jsonl").write_text('{"id": 3}\n')
    with pytest.raises(UsageError, match="is not what a run wrote"):
        read_report(tmp_path)


def test_lines_come_back_as_they_were() -> None:
    result = search_mask(toy_net(), toy_rows(), **QUICK).sample_report
    assert SampleReport.of_lines(result.lines()).rows == result.rows
