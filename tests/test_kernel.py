"""The fused kernel: in the interpreter, compiled, on a GPU, and where it is not used."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ird_search.fisher import fused
from ird_search.fisher.columns import Columns
from ird_search.fisher.gradients import Outer, SampleGradients
from tests.reference import relative_error

ROOT = Path(__file__).parents[1]


@pytest.fixture
def fresh() -> Iterator[None]:
    """What was found out about the kernel is not known within the test, nor kept after it."""
    fused._tried.cache_clear()
    yield
    fused._tried.cache_clear()


def test_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed (it is for Linux)")
    command = [sys.executable, "-m", "pytest", "-q", "tests/kernel_checks.py", "--no-header"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_for_gpus_that_are_not_here(
    dtype: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With everything that is asked for: sums, means and scores within a mask."""
    triton = pytest.importorskip("triton", reason="Triton is not installed (it is for Linux)")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ird_search.fisher.kernel import Tiling, _kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    torch_type = torch.bfloat16 if dtype == "bf16" else torch.float32
    factors = (torch.zeros(1, 128, 768, dtype=torch_type),) * 2
    cut = Tiling.of(*factors)
    constants = {
        **dict.fromkeys(("HAS_SUMS", "HAS_MEANS", "SCORED", "MASKED"), True),
        **{"WIDEN": False, "PRECISION": "ieee", "left_m": 1, "right_n": 1},
        **{"BM": cut.rows, "BN": cut.columns, "BT": cut.tokens},
    }
    pointers = {**dict.fromkeys(("sums", "means", "scores"), "*fp32"), "marks": "*u8"}
    pointers |= dict.fromkeys(("left", "right"), f"*{dtype}")
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32")
        for name in _kernel.arg_names
    }
    source = ASTSource(_kernel, signature, constants)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": cut.warps})
    assert compiled.asm["cubin"]
    units = {80: "mma.sync", 90: "wgmma"}[capability]
    assert (units in compiled.asm["ptx"]) == (dtype == "bf16")  # float32 keeps its precision


def offered(monkeypatch: pytest.MonkeyPatch, add_squares: Any) -> Any:
    """What is taken for products on this machine, where the kernel is `add_squares`."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    module = SimpleNamespace(add_squares=add_squares)
    monkeypatch.setitem(sys.modules, "ird_search.fisher.kernel", module)
    return fused.fused_for(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))


def plain(
    left: Tensor, right: Tensor, *, sums: Tensor, means: Tensor, marks: Tensor, factor: float = 1
) -> Tensor:
    g = torch.bmm(left.mT, right).flatten(1)
    sums += g.square().sum(0) * factor
    means += g.sum(0)
    return (g.square() * marks).sum(1)


def test_a_kernel_that_agrees_is_taken(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert offered(monkeypatch, plain) is plain


def test_a_kernel_that_is_off_is_left_with_how_much(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert offered(monkeypatch, lambda *a, **k: plain(*a, **k, factor=1.001)) is None
    assert "off the product by 1.0e-03 on cpu, more than 1e-05" in caplog.text


def test_a_kernel_that_fails_is_left_with_its_reason(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*args: Any, **more: Any) -> Tensor:
        raise RuntimeError("no such instruction\nand more")

    assert offered(monkeypatch, failing) is None
    assert "fails on cpu: RuntimeError: no such instruction" in caplog.text


def test_without_triton_the_product_is_taken(
    fresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="ird_search.fisher")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, "ird_search.fisher.kernel", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert fused.fused_for(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)) is None
    assert "import of triton halted" in caplog.text


def test_for_float64_and_where_it_is_said_the_product_is_taken(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert fused.fused_for(torch.zeros(1, 2, 3).double(), torch.zeros(1, 2, 3)) is None
    monkeypatch.setenv("IRD_SEARCH_FUSED", "0")
    assert offered(monkeypatch, plain) is None


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(2, 2, 1, 1), (5, 33, 50, 37), (16, 128, 768, 768)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(dtype: torch.dtype, sizes: tuple[int, int, int, int], cuda: str) -> None:
    batch, tokens, m, n = sizes
    left = torch.randn(batch, tokens, m, device=cuda).to(dtype)
    right = torch.randn(batch, tokens, n, device=cuda).to(dtype)
    assert fused.fused_for(left, right) is not None
    within = Columns(torch.arange(0, m * n, 2, device=cuda), m * n)
    found, wanted = [], []
    for kind, results in ((Outer, found), (SampleGradients, wanted)):
        sums, means = torch.zeros(2, m * n, device=cuda)
        scores = kind.add_squares(Outer(left, right), sums, within, means=means)
        results += [sums, means, scores]
    for a, b in zip(found, wanted, strict=True):
        assert relative_error(a, b) <= fused.TOLERANCE[dtype]
