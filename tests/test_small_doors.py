"""Small doors: what comes in the wrong form, at the edge of a size, or by a second way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from ird_search.api import fisher_scores, search_mask
from ird_search.artifact import inspect_mask, load_mask, save_mask, weights_sha256
from ird_search.cli import app
from ird_search.consumers.formats import from_prune, read_bool_mask, write_bool_mask
from ird_search.errors import UsageError
from ird_search.fisher import FisherMatrix, make_engine
from ird_search.mask import SparseMask
from ird_search.parameters import ParameterSpace, candidate_space
from ird_search.rundir import RunDirectory
from ird_search.task import Classification
from ird_search.training import snapshot
from tests.cases import problem, vectors


def rows(count: int = 6) -> list[tuple[Tensor, int]]:
    return [(torch.randn(4), i % 2) for i in range(count)]


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


# --- a path where a value is wanted --------------------------------------------------------------

TAKERS: dict[str, Callable[[Any, SparseMask, Path], object]] = {
    "load_mask": lambda model, mask, path: load_mask(path, model),
    "space": lambda model, mask, path: ParameterSpace.of(model),
    "verify": lambda model, mask, path: weights_sha256(model),
    "snapshot": lambda model, mask, path: snapshot(model, mask),
    "read_bool_mask": lambda model, mask, path: read_bool_mask(path, model),
    "from_prune": lambda model, mask, path: from_prune(model, trains=1),
}


@pytest.mark.parametrize("model", ["path/to/model", Path("path/to/model")], ids=type)
@pytest.mark.parametrize("taker", TAKERS)
def test_a_path_is_no_model(taker: str, model: Any, tmp_path: Path) -> None:
    mask = SparseMask(ParameterSpace.of(net()), torch.arange(3))
    path = tmp_path / "mask.safetensors"
    write_bool_mask(mask, path) if "bool" in taker else save_mask(path, mask)
    told = rf"The model is a {type(model).__name__}; an nn\.Module is accepted\. Load it first"
    with pytest.raises(UsageError, match=told):
        TAKERS[taker](model, mask, path)


def test_peft_exports_take_no_path() -> None:
    peft = pytest.importorskip("ird_search.consumers.peft")
    mask = SparseMask(ParameterSpace.of(net()), torch.arange(3))
    for export in (peft.to_supertuning, peft.to_shira, lambda *a: peft.rank_pattern(*a, budget=9)):
        with pytest.raises(UsageError, match="The model is a str"):
            export("path/to/model", mask)
    with pytest.raises(UsageError, match="The model is a str"):
        peft.load_supertuning("path/to/model", "adapter")


def test_fisher_scores_take_a_mask_and_no_path() -> None:
    wrong: Any = "mask.safetensors"
    with pytest.raises(UsageError, match=r"The mask is a str; .* with load_mask\(path, model\)"):
        fisher_scores(net(), rows(), mask=wrong)


def test_an_empty_mask_is_a_mask() -> None:
    model = net()
    space = ParameterSpace.of(model, ["0.weight"])
    found = fisher_scores(model, rows(), mask=SparseMask(space, torch.arange(0)))
    assert found.space == space and list(found.by_parameter) == ["0.weight"]
    assert found.by_sample.tolist() == [0.0] * 6


def test_a_result_tells_what_its_file_tells(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"density": 0.25, "proxy_steps": 2, "seeds": 1, "strategy": "ladder"}
    result = search_mask(net(), rows(80), output=tmp_path / "out", pool=16, rounds=1, **settings)
    file = inspect_mask(tmp_path / "out")
    assert result.head == file.head == ("2.weight", "2.bias")
    assert result.learning_rate == file.learning_rate == result.provenance["learning_rate"]
    assert isinstance(result.learning_rate, float)


# --- tensors of an odd form ----------------------------------------------------------------------


class Hollow(nn.Module):
    """A net with tensors that hold nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(4, 5), nn.Linear(5, 2)
        self.gate = nn.Parameter(torch.zeros(0))
        self.none = nn.Linear(4, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.first(x).tanh()) + self.none(x).sum(-1, keepdim=True) + self.gate.sum()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
def test_tensors_of_no_entries_are_passed_over(method: str) -> None:
    p = problem(Hollow(), Classification(2), vectors(4, classes=2))
    full = [name for name in p.space.names if p.model.get_parameter(name).numel()]
    assert len(full) < len(p.space.names)
    found, example = [], p.samples.batch(range(6))
    for space in (p.space, ParameterSpace.of(p.model, full)):
        engine = make_engine(p.model, p.task, space, example=example, method=method)
        m = FisherMatrix(engine, p.samples, space, cache_bytes=0)
        few = m.column_moments(torch.arange(6), torch.arange(0, space.numel, 3))
        found.append([m.marginals().columns, m.row_scores(torch.arange(6)), few.square, few.mean])
    for mine, plain in zip(*found, strict=True):
        assert torch.allclose(mine, plain)
    assert candidate_space(p.model).names == tuple(full)


class Expanded(nn.Module):
    """A net whose buffers lie in one place several times."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 1)
        self.register_buffer("ids", torch.arange(3.0).expand(4, 3))
        self.register_buffer("one", torch.tensor(1.0).expand(2, 2))
        self.register_buffer("none", torch.zeros(0, 3))
        self.register_buffer("sparse", torch.eye(2).to_sparse())


def test_a_snapshot_puts_back_buffers_made_by_expand() -> None:
    model = Expanded()
    saved = snapshot(model)
    with torch.no_grad():
        model.inner.weight.fill_(7.0)
        model.get_buffer("sparse").mul_(9.0)
        for buffer in map(model.get_buffer, ("ids", "one")):
            buffer.as_strided((buffer.untyped_storage().nbytes() // 4,), (1,)).fill_(9.0)
    saved.restore()
    assert torch.equal(model.get_buffer("ids"), torch.arange(3.0).expand(4, 3))
    assert torch.equal(model.get_buffer("one"), torch.ones(2, 2))
    assert torch.equal(model.get_buffer("sparse").to_dense(), torch.eye(2))
    assert float(model.inner.weight.detach().max()) < 7.0


# --- commands -------------------------------------------------------------------------------------


def said(code: int, *words: object) -> str:
    """What a command prints; it must end with this code."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.output


def test_commands_tell_where_an_unfinished_run_stands(tmp_path: Path) -> None:
    run = tmp_path / "c 6"
    run.mkdir()
    (run / "config.yaml").write_text("model: tiny\ndata: rows.csv\n")
    (run / "run.json").write_text("{}")
    told = f"The run in {run} is unfinished: 0 finished units, 0 rounds, and no mask. "
    whole = f"{told}Go on with: ird-search resume '{run}'"
    export = ["export", run, "--to", "bool", "-o", tmp_path / "x"]
    for words in (["rows", run], ["inspect", run], ["verify", run], ["compare", run, run], export):
        assert whole in said(2, *words)
    (run / "config.yaml").write_text("model: <Net>\ndata: rows.csv\n")
    assert f"{told}Run the program that began it again" in said(2, "merge", run, run, "-o", "x")
    with RunDirectory(run).held():
        assert "is being written by process" in (text := said(2, "rows", run))
        assert text.endswith("no mask. Wait for it.\n")
    (run / "samples.jsonl").write_text("")  # a run whose mask was moved away has them still
    assert "is unfinished" not in said(0, "rows", run)
    (run / "run.json").unlink()  # somebody else's config.yaml
    assert "no such file" in said(5, "inspect", run)
    assert "no such file" in said(5, "inspect", tmp_path)


def test_an_import_says_that_the_head_is_not_known(tmp_path: Path) -> None:
    path, mask = tmp_path / "bools", SparseMask(ParameterSpace.of(net()), torch.arange(3))
    for head, known in (((), False), (("2.extra",), True)):
        write_bool_mask(mask, path, head=head)
        text = said(0, "import", path, "--from", "bool", "-o", tmp_path / f"{known}.safetensors")
        assert ("does not say what is trained whole" in text and "--dense" in text) != known
        assert inspect_mask(tmp_path / f"{known}.safetensors").head == head


def test_a_comparison_begins_with_the_first_mask(tmp_path: Path) -> None:
    mask = SparseMask(ParameterSpace.of(net()), torch.arange(3))
    save_mask(tmp_path / "a", mask)
    assert said(0, "compare", tmp_path / "a", tmp_path / "a").startswith("A  3 of 58")
