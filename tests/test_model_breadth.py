"""Many families of models: the path they take, the loop's numbers, and the front door."""

from __future__ import annotations

import importlib.util
import json
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import bench_models
from ird_search import fisher_scores
from ird_search.fisher import Engine, FallbackWarning, FisherMatrix, make_engine
from ird_search.fisher.columns import Columns
from ird_search.fisher.gradients import Routed
from ird_search.fisher.taps import Taps
from tests.cases import Case, Problem, made
from tests.models import MODELS
from tests.reference import fisher, relative_error

CLOSE = 1e-5


def needed(package: str) -> pytest.MarkDecorator:
    """Skip where the package is not there: it is large, and one case's alone."""
    there = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not there, reason=f"{package} is not installed")


by_model = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=needed(case.needs) if case.needs else ())
        for case in MODELS
    ],
)
PAGE = Path(__file__).parent.parent / "docs" / "models.md"


@cache
def opened(case: Case) -> tuple[Problem, Engine, list[str]]:
    """A case, the path that it takes, and what was warned of."""
    p = made(case)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", FallbackWarning)
        engine = make_engine(p.model, p.task, p.space, example=p.samples.batch(range(6)))
    return p, engine, [str(w.message) for w in told if w.category is FallbackWarning]


@cache
def truth(case: Case) -> Tensor:
    """F by plain autograd, one unpadded row at a time."""
    p = opened(case)[0]
    return fisher(p.model, p.task, p.samples, p.space)


@by_model
def test_both_marginals_equal_the_loop(case: Case) -> None:
    p, engine, told = opened(case)
    assert engine.path == case.path
    assert not told
    found = FisherMatrix(engine, p.samples, p.space, cache_bytes=0).marginals()
    assert relative_error(found.columns, truth(case).mean(0)) <= CLOSE
    assert relative_error(found.rows, truth(case).sum(1)) <= CLOSE


@by_model
def test_the_other_rows_of_a_batch_do_not_matter(case: Case) -> None:
    """Row 1 is the shortest text, row 2 the longest: beside it, row 1 is mostly padding."""
    p, engine, _ = opened(case)
    (alone,) = engine.gradients(p.samples.batch([1]))
    beside = next(iter(engine.gradients(p.samples.batch([1, 2]))))
    wanted = torch.cat([alone.tensors[n].dense()[0] for n in p.space.names])
    found = torch.cat([beside.tensors[n].dense()[0] for n in p.space.names])
    assert relative_error(found, wanted) <= CLOSE


@by_model
def test_fisher_scores_takes_the_same_path(case: Case) -> None:
    p, engine, _ = opened(case)
    label = "label" if isinstance(p.samples.labels, Tensor) else "labels"
    rows: list[dict[str, Any]] = [
        {**row, label: y} for row, y in zip(p.samples.inputs, p.samples.labels, strict=True)
    ]
    for row in rows:
        row.pop("decoder_input_ids", None)  # made of the labels again
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        found = fisher_scores(p.model, rows, head=[], embeddings=True, device="cpu")
    # T5's batches with padding and without go separate ways, one of them by the loop
    assert found.path.removesuffix("+loop") == engine.path.removesuffix("+loop")
    assert found.space.names == p.space.names
    assert relative_error(found.by_sample, truth(case).sum(1)) <= CLOSE


def test_entries_and_parts_of_fused_experts() -> None:
    case = next(case for case in MODELS if case.name == "mixtral-sdpa")
    p, engine, _ = opened(case)
    routed = 0
    for c in engine.gradients(p.samples.batch(range(6))):
        for name, g in c.tensors.items():
            if isinstance(g, Routed):
                routed += 1
                whole = g.dense()
                assert g.numel == whole.shape[1]
                assert relative_error(whole.square(), truth(case)[:, p.space.span(name)]) <= CLOSE
                columns = Columns(torch.arange(3, whole.shape[1], 7), whole.shape[1])
                assert torch.equal(g.entries(columns), whole[:, 3::7])
                turned = g.select(torch.tensor([4, 0]))
                assert torch.equal(turned.dense(), whole[[4, 0]])
    assert routed == 4


def test_caution_is_told_from_a_path_that_fails() -> None:
    p = opened(next(case for case in MODELS if case.name == "deberta-v2"))[0]
    batch = p.samples.batch(range(6))
    bold, careful = (
        Taps(p.model, p.task, p.space.names, example=batch, cautious=c) for c in (False, True)
    )
    assert bold.doubtful and not careful.doubtful and set(careful.names) < set(bold.names)
    with pytest.raises(RuntimeError):
        list(bold.gradients(batch))


def test_the_page_says_what_was_measured() -> None:
    text = PAGE.read_text(encoding="utf-8")
    result = json.loads((bench_models.RESULTS / "models.json").read_text(encoding="utf-8"))
    assert bench_models.filled(text, bench_models.tables(result)) == text
    assert [row["model"] for row in result["models"]] == [case.name for case in MODELS]
    assert [row["path"] for row in result["models"]] == [case.path for case in MODELS]
    assert all(re.search(rf"\| {case.name} \|", text) for case in MODELS)
