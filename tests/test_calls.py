"""Per-sample gradients of modules that have no rule: each is called again."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from ird_search.fisher import (
    FallbackWarning,
    FisherMatrix,
    make_engine,
)
from ird_search.fisher.engine import Elsewhere as Visiting
from ird_search.fisher.engine import Joined
from ird_search.fisher.gradients import Dense, Lookup, SampleGradients
from ird_search.fisher.loop import Loop
from ird_search.fisher.taps import Taps
from ird_search.samples import Batch, SampleSet
from ird_search.task import Classification
from tests.cases import problem, texts, vectors
from tests.matrices import (
    CLOSE,
    check_matrix,
    engine_of,
    fallbacks,
    matrix_of,
    truth_of,
)
from tests.reference import relative_error


class Positions(nn.Embedding):
    """BART's: an offset, and an axis of samples that comes from the shape alone."""

    def forward(self, ids: Tensor, past: int = 0) -> Tensor:
        at = torch.arange(past, past + ids.shape[1]).expand(len(ids), -1)
        return super().forward(at + 2)


class Sliced(nn.Embedding):
    """No axis of samples, and a padding row that learns: no embedding function knows of it."""

    def forward(self, ids: Tensor, past: int = 0) -> Tensor:
        return self.weight[past : past + ids.shape[1]]


class Counted(nn.Embedding):
    """OPT's: positions counted from what is not padding, scaled."""

    def forward(self, ids: Tensor, past: int = 0) -> Tensor:
        return 3.5 * super().forward((ids > 0).cumsum(1) * (ids > 0) + past)


class Lengths(nn.Embedding):
    """Row v twice as long as the one before: a scale of the row, not of the table."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids % 5) * 2.0 ** (ids % 5)[..., None]


class Normed(nn.Embedding):
    """Rows of length one: s depends on the table."""

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(ids), dim=-1)


class Shifted(nn.Embedding):
    """W[i] + 1 is no multiple of a row."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + 1


class Centred(nn.Embedding):
    """Columns that see one another, in a linear way."""

    def forward(self, ids: Tensor) -> Tensor:
        rows = super().forward(ids)
        return rows - rows.mean(-1, keepdim=True)


class Bags(nn.Embedding):
    """Two rows for a token."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + super().forward(ids + 1)


class Read(nn.Module):
    """Words, and another table beside them."""

    def __init__(self, table: nn.Embedding, *more: object) -> None:
        super().__init__()
        self.words, self.table, self.out = nn.Embedding(40, 6), table, nn.Linear(6, 2)
        self.more = more

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        ids, mask = input_ids * attention_mask, attention_mask[..., None]
        x = torch.tanh(self.words(ids) + self.table(ids, *self.more))
        return self.out((x * mask).sum(1) / mask.sum(1))


@pytest.mark.parametrize(
    ("table", "more", "form"),
    [
        (Positions(20, 6), (), Lookup),
        (Positions(20, 6), (3,), Lookup),
        (Sliced(20, 6), (), Lookup),
        (Sliced(20, 6, padding_idx=1), (1,), Lookup),
        (Counted(20, 6, padding_idx=2), (1,), Lookup),
        (Lengths(5, 6), (), Lookup),
        (Lengths(5, 6, padding_idx=1), (), Lookup),
        (Counted(20, 6, scale_grad_by_freq=True), (0,), Dense),
        (Normed(40, 6), (), Dense),
        (Shifted(40, 6), (), Dense),
        (Centred(40, 6), (), Dense),
        (Bags(41, 6), (), Dense),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_tables_that_are_read_in_ways_of_their_own(
    table: nn.Embedding, more: tuple[object, ...], form: type[SampleGradients]
) -> None:
    p = problem(Read(table, *more), Classification(2), texts())
    m = matrix_of(p)
    assert m.engine.path == "taps"
    (c,) = m.engine.gradients(p.samples.batch(range(6)))
    assert type(c.tensors["table.weight"]) is form
    check_matrix(m, truth_of(p))


def test_positions_without_samples_when_every_row_is_one_token_long() -> None:
    """[T, d] = [1, d] looks like a broadcast row of samples."""
    p = problem(Read(Sliced(20, 6)), Classification(2), texts())
    engine = engine_of(p)
    short = p.samples.batch([1])
    one = Batch(
        {k: v[:, :1].repeat(3, 1) for k, v in short.inputs.items()},
        torch.arange(3) % 2,
        short.rows.repeat(3),
    )
    (ours,) = engine.gradients(one)
    for row, theirs in enumerate(Loop(p.model, p.task, p.space.names).gradients(one)):
        for name, g in theirs.tensors.items():
            torch.testing.assert_close(ours.tensors[name].dense()[row], g.dense()[0])


class Held(nn.Module):
    """Parameters of its own, in a dictionary and tied to a child's, beside children that learn."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.act = nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh()
        self.factors = nn.ParameterDict({"one": nn.Parameter(torch.randn(4))})
        self.scale = self.norm.weight

    def forward(self, x: Tensor, mask: Tensor, *, power: int = 1) -> Tensor:
        return self.act(self.norm(self.inner(x))) * self.factors["one"] ** power * self.scale + mask


class Holds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.held, self.out = nn.Linear(4, 4), Held(), nn.Linear(4, 2)

    def forward(self, input: Tensor) -> Tensor:
        x = self.first(input)
        return self.out(self.held(self.held(x, x.relu(), power=2), x))


class Probes(nn.Module):
    """A layer that is also asked for its weight, as DoRA does: no gradient flows back there."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, input: Tensor) -> Tensor:
        size = self.layer(torch.eye(4)).detach().norm()
        return self.out(torch.tanh(self.layer(input)) / size)


@pytest.mark.parametrize("model", [Holds, Probes])
def test_modules_with_parameters_of_their_own(model: type[nn.Module]) -> None:
    p = problem(model(), Classification(2), vectors(4, classes=2))
    m = matrix_of(p)
    assert m.engine.path == "taps"
    check_matrix(m, truth_of(p))


class Squared(torch.autograd.Function):
    """An operation that `torch.func` refuses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Squared.apply(x)


def test_an_operation_that_knows_plain_autograd_alone() -> None:
    """As 4-bit linear layers, and many fused kernels, are written."""
    model = nn.Sequential(nn.Linear(4, 4), Square(), nn.Linear(4, 2))
    p = problem(model, Classification(2), vectors(4, classes=2))
    m = matrix_of(p)
    assert m.engine.path == "taps"
    check_matrix(m, truth_of(p))
    assert all(w.requires_grad and w.grad is None for w in p.model.parameters())
    with pytest.warns(FallbackWarning, match="setup_context"):
        assert engine_of(p, "vmap").path == "loop"


class Branching(nn.Module):
    """A factor that vmap cannot reach, in a module that branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.factor, self.act = nn.Parameter(torch.randn(4)), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) * self.factor if x.sum().item() < 1e9 else x


def test_a_module_that_cannot_be_called_again_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Branching(), nn.Linear(4, 2))
    p = problem(model, Classification(2), vectors(4, classes=2))
    taps = Taps(p.model, p.task, p.space.names, example=p.samples.batch(range(6)))
    assert taps.uncovered == ("1.factor",)
    engine, told = fallbacks(p)
    assert engine.path == "loop" and len(told) == 1
    for path in ("taps", "vmap"):
        assert f"{path!r} fails in 1 (Branching): RuntimeError: vmap" in told[0]
    hooks = [h for m in p.model.modules() for h in (m._forward_pre_hooks, m._forward_hooks)]
    assert not any(hooks)


def check_marginals(m: FisherMatrix, f: Tensor) -> None:
    found = m.marginals()
    assert relative_error(found.columns, f.mean(0)) <= CLOSE
    assert relative_error(found.rows, f.sum(1)) <= CLOSE


class Deep(nn.Module):
    """As many steps as a sample's first token says; a branch for those with a token above 30."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.step, self.rare = nn.Embedding(40, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = attention_mask[..., None]
        h = (self.table(input_ids) * mask).sum(1) / mask.sum(1)
        depth, rare = input_ids[:, :1] % 4, input_ids.amax(1, keepdim=True) > 30
        h = h + self.rare(h)
        for t in range(int(depth.max())):
            h = torch.where(t < depth, self.step(h).tanh(), h)
        if rare.any():
            h = torch.where(rare, self.rare(h), h)
        return self.out(h)


@pytest.mark.parametrize("joined", [False, True], ids=["taps", "joined"])
@pytest.mark.parametrize("depths", [(2, 2, 2, 3, 3, 1), (3, 3, 3, 1, 0, 2)], ids=str)
def test_batches_that_call_modules_otherwise_than_the_first_rows(
    depths: tuple[int, ...], joined: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """More calls, fewer, none, and a branch that only later rows take."""
    samples = texts()
    for row, depth, token in zip(samples.inputs, depths, (9, 9, 9, 33, 9, 33), strict=True):
        row["input_ids"][:] = 9
        row["input_ids"][-1], row["input_ids"][0] = token, 4 + depth
    p = problem(Deep(), Classification(2), samples)
    example, names = p.samples.batch([0, 1, 2]), p.space.names
    engine = make_engine(p.model, p.task, p.space, example=example)
    assert engine.path == "taps"
    if joined:
        taps = Taps(p.model, p.task, names[:-2], example=example)
        engine = Joined(taps, Loop(p.model, p.task, names[-2:]))
    for tokens in (1, 1000):  # one row a batch, and all of them
        m = FisherMatrix(engine, p.samples, p.space, tokens=tokens, cache_bytes=0)
        check_marginals(m, truth_of(p))
    assert m.path == Visiting(engine, nullcontext).path == "taps+loop"
    assert "(Linear) is called otherwise in some batches" in caplog.text
    assert all(w.requires_grad for w in p.model.parameters())


class Masked(nn.Module):
    """Scores of tokens; a mask only where one is needed, as attention in transformers has it."""

    def __init__(self, broadcast: bool) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(40, 6), Inner()
        self.out, self.broadcast = nn.Linear(6, 2), broadcast

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        whole = bool(attention_mask.all())
        x = self.table(input_ids)
        if self.broadcast:
            given = attention_mask[:1] if whole else attention_mask
        else:
            given = None if whole else attention_mask
        return self.out(self.inner(x, given))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor, self.act = nn.Parameter(torch.randn(6)), nn.Tanh()

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        weight = torch.ones(x.shape[:2]) if mask is None else mask.float()
        return self.act((x * weight[..., None]).sum(1)) * self.factor


@pytest.mark.parametrize("first", [[0, 1, 2], [3, 4, 5]], ids=["equal", "uneven"])
@pytest.mark.parametrize("broadcast", [False, True], ids=["no mask", "one for all"])
def test_a_mask_that_only_padded_batches_have(broadcast: bool, first: list[int]) -> None:
    rows = [torch.randint(5, 40, (n,)) for n in (4, 4, 4, 2, 5, 7)]
    inputs = tuple({"input_ids": r, "attention_mask": torch.ones_like(r)} for r in rows)
    samples = SampleSet(inputs, torch.arange(6) % 2, torch.arange(6))
    p = problem(Masked(broadcast), Classification(2), samples)
    engine = make_engine(p.model, p.task, p.space, example=p.samples.batch(first))
    assert engine.path == "taps"
    for tokens in (1, 9, 1000):  # batches of one, of two, and of all
        m = FisherMatrix(engine, p.samples, p.space, tokens=tokens, cache_bytes=0)
        check_marginals(m, truth_of(p))


def test_a_reparametrised_weight() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2))
    p = problem(model, Classification(2), vectors(4, classes=2))
    m = matrix_of(p)
    assert m.engine.path == "taps+vmap"
    check_matrix(m, truth_of(p))


def test_embedding_tables_with_settings() -> None:
    class Table(nn.Module):
        def __init__(self, **settings: Any) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(40, 6, **settings), nn.Linear(6, 2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            mask = attention_mask[..., None]
            return self.out((self.table(input_ids) * mask).sum(1) / mask.sum(1))

    samples = texts()
    samples.inputs[0]["input_ids"][:] = 7  # one token, five times
    # The last divides by a token's count in the sample, which the embedding's own rule cannot see.
    for settings in ({}, {"padding_idx": 7}, {"scale_grad_by_freq": True}):
        p = problem(Table(**settings), Classification(2), samples)
        m = matrix_of(p)
        assert m.engine.path == "taps"
        check_matrix(m, truth_of(p))
