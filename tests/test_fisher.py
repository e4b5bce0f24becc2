"""The Fisher engine: all paths are one matrix, F[i, j] = (∂ log p(yᵢ | xᵢ; θ) / ∂θⱼ)²."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ird_search.fisher import (
    FisherMatrix,
    register_rule,
    rules,
)
from ird_search.fisher.columns import Columns
from ird_search.fisher.gradients import Outer
from ird_search.fisher.loop import Loop
from ird_search.fisher.taps import Taps
from ird_search.fisher.vmap import VMap
from ird_search.parameters import ParameterSpace
from ird_search.samples import Batch
from ird_search.task import Classification
from tests.cases import Case, Problem, made, named, problem, vectors
from tests.matrices import (
    CLOSE,
    by_case,
    check_matrix,
    engine_of,
    fallbacks,
    matrix_of,
    some_columns,
    true_gradients,
    truth,
    truth_of,
)
from tests.reference import fisher, per_sample_gradients, relative_error

# --- every path equals plain autograd, row by row, unpadded -----------------------------------


@by_case
@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
def test_paths_equal_the_reference(case: Case, method: str) -> None:
    m = matrix_of(made(case), method)
    assert m.engine.path == (case.path if method == "auto" else method)
    check_matrix(m, truth(case))


@by_case
def test_entries_and_dense_forms_agree(case: Case) -> None:
    p = made(case)
    wanted = per_sample_gradients(p.model, p.task, p.samples, p.space)
    rows = [4, 0, 2]
    for c in engine_of(p).gradients(p.samples.batch(rows)):
        assert bool(c.finite.all())
        assert set(c.tensors) == set(p.space.names)
        for name, gradients in c.tensors.items():
            truth_here = wanted[rows][c.part][:, p.space.span(name)].float()
            # An attention key's bias has no gradient but rounding noise.
            noise = {"atol": 1e-6 * float(wanted.abs().max()), "rtol": 1e-4}
            torch.testing.assert_close(gradients.dense(), truth_here, **noise)
            for density in (0.05, 0.6, 1.0):
                index = some_columns(truth_here.shape[1], density)
                found = gradients.entries(Columns(index, truth_here.shape[1]))
                torch.testing.assert_close(found, truth_here[:, index], **noise)
            turned = gradients.select(torch.arange(gradients.batch).flip(0))
            torch.testing.assert_close(turned.dense(), truth_here.flip(0), **noise)


def test_softmax_regression_has_a_closed_form() -> None:
    # ∇_W log p(y | x) = (e_y − p) xᵀ, so F_W = (e_y − p)² ⊗ x² and F_b = (e_y − p)².
    p = problem(nn.Linear(5, 3), Classification(3), vectors(5))
    x = torch.stack([row["input"] for row in p.samples.inputs])
    error = (nn.functional.one_hot(p.samples.labels) - p.model(x).softmax(-1)).detach().square()
    weight = (error[:, :, None] * x.square()[:, None, :]).flatten(1)
    closed = torch.cat([weight, error], 1)
    found = matrix_of(p).marginals()
    assert relative_error(found.columns, closed.mean(0)) <= CLOSE
    assert relative_error(found.rows, closed.sum(1)) <= CLOSE


@by_case
def test_mean_of_sample_gradients_is_the_batch_gradient(case: Case) -> None:
    p = made(case)
    batch = p.samples.batch(range(6))
    sums = dict.fromkeys(p.space.names, 0.0)
    for c in engine_of(p).gradients(batch):
        for name, gradients in c.tensors.items():
            sums[name] = sums[name] + gradients.dense().sum(0)
    for q in p.model.parameters():
        q.requires_grad_(True)
    inputs = batch.inputs["input"] if set(batch.inputs) == {"input"} else None
    out = p.model(inputs) if inputs is not None else p.model(**batch.inputs).logits
    p.task.log_likelihood(out, batch.labels).sum().backward()
    weights = dict(p.model.named_parameters())
    whole = torch.cat([weights[n].grad.reshape(-1) for n in p.space.names])
    ours = torch.cat([sums[n] for n in p.space.names])
    assert relative_error(ours, whole) <= CLOSE


def test_squares_are_taken_per_sample_not_of_the_batch_sum() -> None:
    p = named("bert-sdpa")
    gradients = per_sample_gradients(p.model, p.task, p.samples, p.space)
    ours = matrix_of(p).marginals().columns
    assert relative_error(ours, gradients.sum(0).square() / len(gradients)) > 0.1


# --- what must not matter ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("name", ["bert-sdpa", "gpt2", "vit"])
def test_batch_size_and_order_do_not_matter(name: str, method: str) -> None:
    p, rows = named(name), torch.arange(6)
    wanted = matrix_of(p, method).marginals()
    mean = matrix_of(p, method).column_moments(rows).mean
    assert mean is not None
    for tokens in (1, 12, 10_000):
        m = matrix_of(p, method, tokens=tokens)
        found, moments = m.marginals(), m.column_moments(rows)
        assert relative_error(found.columns, wanted.columns) <= CLOSE
        assert relative_error(found.rows, wanted.rows) <= CLOSE
        assert moments.mean is not None and relative_error(moments.mean, mean) <= CLOSE
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    turned = Problem(p.model, p.task, p.samples.select(order), p.space)
    m = matrix_of(turned, method)
    found, moments = m.marginals(), m.column_moments(rows)
    assert relative_error(found.columns, wanted.columns) <= CLOSE
    assert relative_error(found.rows, wanted.rows[order]) <= CLOSE
    assert moments.mean is not None and relative_error(moments.mean, mean) <= CLOSE


@pytest.mark.parametrize("method", ["auto", "vmap"])
def test_padding_does_not_matter(method: str) -> None:
    p = named("bert-sdpa")
    engine = engine_of(p, method)
    alone, padded = p.samples.batch([1]), p.samples.batch([1, 2])
    assert padded.inputs["input_ids"].shape[1] > alone.inputs["input_ids"].shape[1]
    first = next(iter(engine.gradients(alone))).tensors
    second = next(iter(engine.gradients(padded))).tensors
    for name in p.space.names:
        torch.testing.assert_close(
            second[name].dense()[0], first[name].dense()[0], rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize("chunk", [1, 2, 4, 6])
def test_vmap_chunk_does_not_matter(chunk: int) -> None:
    p = named("bert-sdpa")
    f = fisher(p.model, p.task, p.samples, p.space)
    engine = VMap(p.model, p.task, p.space.names, chunk=chunk)
    found = FisherMatrix(engine, p.samples, p.space, cache_bytes=0).marginals()
    assert relative_error(found.columns, f.mean(0)) <= CLOSE
    assert relative_error(found.rows, f.sum(1)) <= CLOSE


@by_case
def test_rows_and_columns_have_one_total(case: Case) -> None:
    found = matrix_of(made(case)).marginals()
    total = float(found.rows.sum())
    assert float(found.columns.double().sum()) * 6 == pytest.approx(total, rel=1e-6)


# --- fallbacks -----------------------------------------------------------------------------------


class Mixing(nn.Module):
    """Samples of a batch see one another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, input: Tensor) -> Tensor:
        x = self.first(input)
        return self.out(torch.tanh(x - x.mean(0)) if len(x) > 1 else torch.tanh(x))


class Elsewhere(nn.Module):
    """A weight used by its module and by a function: a tap sees one use of two."""

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(4, 4), nn.Linear(4, 2)
        self.share = share

    def forward(self, input: Tensor) -> Tensor:
        x = torch.tanh(self.first(input))
        return self.out(x + self.share * nn.functional.linear(input, self.first.weight))


class ByValue(nn.Module):
    """A branch on a value, which vmap cannot take."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(4)), nn.Linear(4, 2)

    def forward(self, input: Tensor) -> Tensor:
        return self.out(input * self.weight) if input.sum().item() < 1e9 else self.out(input)


@pytest.mark.parametrize("share", [1.0, 0.01])
def test_a_weight_used_elsewhere_falls_back_to_vmap(share: float) -> None:
    p = problem(Elsewhere(share), Classification(2), vectors(4, classes=2))
    engine, told = fallbacks(p)
    assert engine.path == "vmap"
    assert len(told) == 1
    assert "On Elsewhere the Fisher path 'vmap' is used: 'taps' is off the loop by" in told[0]
    check_matrix(FisherMatrix(engine, p.samples, p.space, cache_bytes=0), truth_of(p))


def test_a_model_that_mixes_samples_falls_back() -> None:
    p = problem(Mixing(), Classification(2), vectors(4, classes=2))
    engine, told = fallbacks(p)
    assert (engine.path, len(told)) == ("vmap", 1)
    check_matrix(FisherMatrix(engine, p.samples, p.space, cache_bytes=0), truth_of(p))


def test_a_model_that_branches_on_values_ends_on_the_loop() -> None:
    p = problem(ByValue(), Classification(2), vectors(4, classes=2))
    engine, told = fallbacks(p)
    assert engine.path == "loop"
    (one,) = told  # one warning, which names both
    assert one.startswith("On ByValue the Fisher path 'loop' is used: 'taps' ")
    assert "; 'vmap' fails in the model (ByValue): RuntimeError: vmap" in one
    check_matrix(FisherMatrix(engine, p.samples, p.space, cache_bytes=0), truth_of(p))


def test_the_method_is_respected() -> None:
    p = named("mlp")
    assert [engine_of(p, m).path for m in ("auto", "taps", "vmap", "loop")] == [
        "taps",
        "taps",
        "vmap",
        "loop",
    ]
    assert (
        fallbacks(problem(ByValue(), Classification(2), vectors(4, classes=2)), "vmap")[0].path
        == "loop"
    )


def test_a_small_tensor_that_is_wrong_is_noticed() -> None:
    # 0.1% of the gradient: an error of the whole that a tolerance on the whole would pass.
    class Quiet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loud, self.quiet = nn.Linear(4, 2), nn.Linear(4, 2, bias=False)

        def forward(self, input: Tensor) -> Tensor:
            hidden = self.quiet(1e-4 * input)
            return self.loud(input) + hidden + nn.functional.linear(input, self.quiet.weight) * 1e-4

    engine, told = fallbacks(problem(Quiet(), Classification(2), vectors(4, classes=2)))
    assert (engine.path, len(told)) == ("vmap", 1)


# --- the model is left as it was -----------------------------------------------------------------


def state_of(model: nn.Module) -> tuple[Any, ...]:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    config = getattr(model, "config", None)
    return hooks, flags, model.training, getattr(config, "_attn_implementation", None)


@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("name", ["bert-eager", "bert-sdpa", "vit", "frozen", "candidate-frozen"])
def test_the_model_is_left_as_it_was(name: str, method: str) -> None:
    p = named(name)
    before, weights = state_of(p.model), copy.deepcopy(p.model.state_dict())
    matrix_of(p, method).marginals()
    assert state_of(p.model) == before
    assert all(torch.equal(w, p.model.state_dict()[n]) for n, w in weights.items())


class Trips(Classification):
    """Fails in the middle of a pass."""

    def log_likelihood(self, logits: Tensor, labels: Tensor) -> Tensor:
        raise RuntimeError("tripped")


@pytest.mark.parametrize("method", ["taps", "vmap", "loop"])
def test_the_model_is_left_as_it_was_after_an_exception(method: str) -> None:
    p = named("frozen")
    frozen = ParameterSpace.of(p.model)
    before = state_of(p.model)
    batch = p.samples.batch([0, 1])
    engines = {
        "taps": lambda: Taps(p.model, Trips(2), frozen.names, example=batch),
        "vmap": lambda: VMap(p.model, Trips(2), frozen.names),
        "loop": lambda: Loop(p.model, Trips(2), frozen.names),
    }
    with pytest.raises(RuntimeError, match="tripped"):
        list(engines[method]().gradients(batch))
    assert state_of(p.model) == before


def test_the_check_runs_in_full_precision_and_gives_the_users_back() -> None:
    seen = []

    class Watches(Classification):
        def log_likelihood(self, logits: Tensor, labels: Tensor) -> Tensor:
            seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
            return super().log_likelihood(logits, labels)

    p = named("mlp")
    torch.set_float32_matmul_precision("high")
    try:
        engine_of(Problem(p.model, Watches(3), p.samples, p.space))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen and set(seen) == {("highest", False)}
    assert torch.backends.cudnn.allow_tf32


def test_a_model_that_fails_in_the_forward_pass_keeps_no_hook() -> None:
    p = named("bert-sdpa")
    before = state_of(p.model)
    bad = Batch({"input_ids": torch.full((2, 3), 10**6)}, torch.zeros(2).long(), torch.arange(2))
    with pytest.raises(IndexError):
        Taps(p.model, p.task, p.space.names, example=bad)
    assert state_of(p.model) == before


# --- half precision, rules of one's own ----------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "loop"])
def test_half_precision_weights_are_summed_in_float32(method: str) -> None:
    p = named("bert-sdpa")
    p.model.bfloat16()
    half = truth_of(p)
    m = matrix_of(p, method)
    found = m.marginals()
    assert (m.engine.path, found.columns.dtype) == (
        "taps" if method == "auto" else method,
        torch.float32,
    )
    assert relative_error(found.columns, half.mean(0)) <= 5e-2
    # 540 rows: a sum in bfloat16 stops growing after 256 equal terms.
    often = p.samples.select(torch.arange(540) % 6)
    many_sums = FisherMatrix(m.engine, often, p.space, cache_bytes=0).marginals()
    assert relative_error(many_sums.columns, found.columns) <= 1e-2


class Mixed(nn.Module):
    """A module of one's own, with a child, and a weight larger than what it answers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) @ self.weight


def test_a_rule_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    p = problem(nn.Sequential(Mixed(), nn.Linear(5, 2)), Classification(2), vectors(5, classes=2))
    assert engine_of(p).path == "taps+vmap"
    register_rule(Mixed, lambda m, a, g: {"weight": Outer(m.act(a)[:, None], g[:, None])})
    m = matrix_of(p)
    assert m.engine.path == "taps"
    check_matrix(m, truth_of(p))


def test_a_rule_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    register_rule(Mixed, lambda m, a, g: {"weight": Outer(a[:, None], g[:, None])})
    p = problem(nn.Sequential(Mixed(), nn.Linear(5, 2)), Classification(2), vectors(5, classes=2))
    engine, told = fallbacks(p)
    assert (engine.path, len(told)) == ("vmap", 1)


# --- on an accelerator ---------------------------------------------------------------------------


@pytest.mark.gpu
@by_case
def test_paths_equal_the_reference_on_cuda(case: Case, cuda: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    f = truth(case)
    p = made(case)
    p.model.to(cuda)
    for method in ("auto", "vmap", "loop"):
        m = FisherMatrix(engine_of(p, method, cuda), p.samples, p.space, cache_bytes=0, device=cuda)
        check_matrix(m, f)
        mean = m.column_moments(torch.arange(6)).mean
        assert mean is not None and relative_error(mean, true_gradients(case).mean(0)) <= CLOSE
