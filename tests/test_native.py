"""The fused kernel on a CPU: its sums, on what they may not depend, and where it is not used."""

from __future__ import annotations

import logging
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ird_search.fisher import FisherMatrix, fused, make_engine, native
from ird_search.fisher.columns import Columns
from ird_search.fisher.gradients import Outer, SampleGradients
from ird_search.fisher.native import add_squares
from tests.cases import CASES, Case, made
from tests.reference import fisher, relative_error
from tests.squares import CLOSE, check, factors, gradients

MODELS = [case for case in CASES if case.name in ("conv", "bert-sdpa", "gpt2", "twice")]
OTHER_PROCESSORS = (("-mno-avx512f",), ("-mno-avx",))


@pytest.fixture
def compiled() -> None:
    """Skipped where nothing can be compiled."""
    try:
        native._compiler()
    except native.NoCompilerError as missing:
        pytest.skip(str(missing))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was found out about the kernel is not known within the test, nor kept after it."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    fused._tried.cache_clear()
    yield
    fused._tried.cache_clear()


@pytest.fixture
def anew(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing is compiled yet; the folder where it will be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._library.cache_clear()
    yield tmp_path / "ird_search"
    native._library.cache_clear()


# --- its sums ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtypes", [(d,) for d in CLOSE] + [(torch.bfloat16, torch.float32)], ids=str
)
@pytest.mark.parametrize("sizes", [(1, 2, 1, 1), (3, 5, 24, 64), (2, 18, 33, 37)], ids=str)
def test_sums_and_scores_are_those_of_single_products(
    sizes: tuple[int, int, int, int], dtypes: tuple[torch.dtype, ...], compiled: None
) -> None:
    check(add_squares, *factors(sizes, *dtypes))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are options of x86 processors")
@pytest.mark.parametrize("flags", OTHER_PROCESSORS, ids=str)
def test_so_they_are_with_the_vectors_of_other_processors(
    flags: tuple[str, ...], compiled: None, anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, *flags))
    check(add_squares, *factors((2, 18, 33, 37), torch.float32))
    check(add_squares, *factors((3, 5, 48, 64), torch.float32))


def test_factors_may_lie_in_any_order(compiled: None) -> None:
    left, right = factors((3, 9, 20, 40), torch.float32)
    check(add_squares, left.mT.contiguous().mT, right.transpose(0, 1).contiguous().transpose(0, 1))
    check(add_squares, left[:, :1].expand(3, 9, 20), right[..., ::2])


def test_the_bits_of_squares_do_not_depend_on_what_else_is_asked_for(compiled: None) -> None:
    left, right = factors((5, 7, 50, 70), torch.float32)
    marks = (torch.arange(3500) % 3 == 0).to(torch.uint8)
    found = []
    for more in ({}, {"scored": False}, {"marks": marks}, {"means": torch.zeros(3500)}):
        sums = torch.zeros(3500)
        add_squares(left, right, sums=sums, **more)
        found.append(sums)
    assert found[0].any()
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("near", [1, 2000, 10**9])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_nor_on_how_the_work_is_cut(
    threads: int, near: int, compiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, right = factors((3, 4, 130, 50), torch.float32)
    wanted, sums = torch.zeros(2, 6500)
    scores = add_squares(left, right, sums=wanted)
    monkeypatch.setattr(native, "NEAR_BYTES", near)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = add_squares(left, right, sums=sums)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(sums, wanted)
    assert relative_error(found, scores) <= 1e-7


def test_a_sample_has_the_score_that_it_has_alone(compiled: None) -> None:
    left, right = factors((4, 6, 30, 40), torch.float32)
    alone = [add_squares(left[b : b + 1], right[b : b + 1]) for b in range(4)]
    assert relative_error(add_squares(left, right), torch.cat(alone)) <= 1e-7


def test_nothing_is_written_that_is_not_asked_for(compiled: None) -> None:
    left, right = factors((3, 5, 20, 40), torch.float32)
    g = gradients(left, right)
    assert not add_squares(left, right, scored=False).any()
    assert relative_error(add_squares(left, right), g.square().sum(1)) <= 1e-5


def test_without_samples_or_tokens_there_is_nothing_to_add(compiled: None) -> None:
    for sizes in ((0, 3, 20, 40), (3, 0, 20, 40)):
        assert torch.equal(add_squares(*factors(sizes, torch.float32)), torch.zeros(sizes[0]))


@pytest.mark.parametrize(
    ("where", "what", "told"),
    [
        ("sums", torch.zeros(800).double(), "torch.float32 [800] on the CPU is wanted"),
        ("means", torch.zeros(799), "not torch.float32 [799] on cpu"),
        ("sums", torch.zeros(1600)[::2], "without gaps"),
        ("marks", torch.zeros(800), "torch.uint8 [800]"),
    ],
    ids=str,
)
def test_nothing_is_read_or_written_beside_what_is_given(
    where: str, what: torch.Tensor, told: str
) -> None:
    left, right = factors((3, 5, 20, 40), torch.float32)
    with pytest.raises(ValueError, match=re.escape(told)):
        add_squares(left, right, **{where: what})
    with pytest.raises(ValueError, match=re.escape("[3, 5, 40]")):
        add_squares(left, right[:, :4])


def test_whatever_the_default_type_is(compiled: None) -> None:
    """In a process of its own, which a write beside its memory may end."""
    code = (
        "import torch; torch.set_default_dtype(torch.bfloat16)\n"
        "from ird_search.fisher.fused import fused_for\n"
        "from ird_search.devices import untouched_zeros\n"
        "x = torch.ones(4, 32, 768, dtype=torch.float32)\n"
        "sums = untouched_zeros(768 * 768, x.device)\n"
        "scores = fused_for(x, x)(x, x, sums=sums)\n"
        "assert sums.eq(4 * 32.0**2).all() and scores.eq(768 * 768 * 32.0**2).all()\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


# --- where it is used ----------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 3, 3000, 8000], ids=lambda k: f"mask of {k}")
@pytest.mark.parametrize("mean", [False, True], ids=["squares", "and means"])
def test_a_linear_layer_takes_it(
    kept: int, mean: bool, compiled: None, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(
        native, "add_squares", lambda *a, **k: calls.append(k) or add_squares(*a, **k)
    )
    outer = Outer(*factors((4, 30, 128, 128), torch.float32))
    within = Columns(torch.randperm(128 * 128)[:kept].sort().values, 128 * 128)
    pairs = []
    for plain in (False, True):
        sums, means = torch.zeros(2, 128 * 128)
        kind: Any = SampleGradients if plain else Outer
        scores = kind.add_squares(outer, sums, within, means=means if mean else None)
        pairs.append((sums, means, scores, kind.square_norms(outer, within)))
        assert bool(means.any()) == mean
    assert len(calls) > 1  # the check of the kernel is the first
    for found, wanted in zip(*pairs, strict=True):
        assert relative_error(found, wanted) <= 1e-5 or not (found.any() or wanted.any())


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_a_model_has_the_scores_of_plain_autograd(
    case: Case, compiled: None, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "LEAST", 1)
    p = made(case)
    engine = make_engine(p.model, p.task, p.space, example=p.samples.batch(range(len(p.samples))))
    truth = fisher(p.model, p.task, p.samples, p.space)
    matrix = FisherMatrix(engine, p.samples, p.space, cache_bytes=0)
    mask = torch.arange(0, p.space.numel, 3)
    found = matrix.marginals(within=mask)
    assert fused._tried.cache_info().hits
    assert relative_error(found.columns, truth.mean(0)) <= 1e-5
    assert relative_error(found.rows, truth[:, mask].sum(1)) <= 1e-5


def test_small_matrices_and_float64_are_left_to_the_product(anew: Path) -> None:
    small, large = torch.zeros(1, 2, 127), torch.zeros(1, 2, 128)
    assert fused.fused_for(small, large) is None
    assert fused.fused_for(large.double(), large) is None
    assert not anew.exists()


# --- compiling -----------------------------------------------------------------------------------


def test_it_is_compiled_once(compiled: None, anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(add_squares, *factors((2, 3, 5, 7), torch.float32))
    (made_once,) = anew.iterdir()
    before = made_once.stat().st_mtime_ns
    native._library.cache_clear()
    check(add_squares, *factors((2, 3, 5, 7), torch.float32))
    assert list(anew.iterdir()) == [made_once] and made_once.stat().st_mtime_ns == before


def test_where_no_cache_can_be_written_it_is_compiled_for_the_moment(
    compiled: None, anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anew.write_text("a file where the folder should be")
    check(add_squares, *factors((2, 3, 5, 7), torch.float32))
    assert anew.is_file()


def offered() -> Any:
    return fused.fused_for(torch.zeros(1, 2, 128), torch.zeros(1, 2, 128))


def test_without_a_compiler_the_product_is_taken(
    anew: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ird_search.fisher")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert offered() is None
    assert "no C compiler was found" in caplog.text and caplog.records[-1].levelname == "INFO"


@pytest.mark.parametrize(
    ("compiler", "told"),
    [("false", "exit status 1"), ("cc -no-such-option", "error: unrecog")],
)
def test_a_compiler_that_fails_is_told(
    compiler: str,
    told: str,
    compiled: None,
    anew: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CC", compiler)
    assert offered() is None
    assert "fails on cpu" in caplog.text and told in caplog.text
    assert not list(anew.glob("*"))


def test_a_damaged_file_is_not_loaded_but_made_again(
    compiled: None, anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert offered() is not None
    (whole,) = anew.iterdir()
    damaged = anew.parent / "other" / "ird_search" / whole.name
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])  # it would end the process
    monkeypatch.setenv("XDG_CACHE_HOME", str(anew.parent / "other"))
    native._library.cache_clear()
    check(add_squares, *factors((2, 3, 5, 7), torch.float32))
    assert damaged.read_bytes() == whole.read_bytes()
