"""The sparse backward gives the selected entries of the dense one, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ird_search.freeze import apply_mask
from ird_search.mask import SparseMask
from ird_search.optimizer import MaskedAdamW
from ird_search.parameters import ParameterSpace, candidate_space
from ird_search.selection import random_subset
from ird_search.sparse_backward import DENSEST, Pattern, sparse_backward, transposed
from ird_search.task import logits_of
from tests.tiny import tiny_bert, tiny_gpt2

IDS = torch.randint(3, 20, (5, 7), generator=torch.Generator().manual_seed(0))


def few(model: nn.Module, density: float = 0.02) -> SparseMask:
    space = candidate_space(model, embeddings=True)
    count = round(density * space.numel)
    return SparseMask(space, random_subset(space.numel, count, seed=1))


def mlp(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 40, bias=bias), nn.Tanh(), nn.Linear(40, 30, bias=bias))


def bert_loss(model: nn.Module) -> Tensor:
    return logits_of(model, {"input_ids": IDS}).square().sum()


def mlp_loss(model: nn.Module) -> Tensor:
    return model(torch.linspace(-1, 1, 6 * 30).view(6, 30)).square().sum()


def token_loss(model: nn.Module) -> Tensor:
    return logits_of(model, {"input_ids": IDS}).tanh().sum()


def wide_mlp() -> nn.Module:
    """Layers that are filled so densely that the sampled product is the cheaper way."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 300), nn.Tanh(), nn.Linear(300, 200))


def _long() -> Tensor:
    return torch.linspace(-1, 1, 600 * 30).sin().view(600, 30)


def long_loss(model: nn.Module) -> Tensor:
    """More positions than are transposed at once, and no whole number of such blocks."""
    return model(_long()).square().sum()


def table() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(20, 30, padding_idx=5), nn.Linear(30, 4))


def table_loss(model: nn.Module) -> Tensor:
    return model(IDS).tanh().sum()


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "bert": (lambda: tiny_bert().eval(), bert_loss),
    "mlp": (mlp, mlp_loss),
    "no bias": (lambda: mlp(bias=False), mlp_loss),
    "wide": (wide_mlp, long_loss),
    "embedding": (table, table_loss),
    "gpt2": (lambda: tiny_gpt2().eval(), token_loss),
    "float64": (lambda: wide_mlp().double(), lambda m: m(_long().double()).square().sum()),
}


@pytest.mark.parametrize("case", CASES)
def test_the_selected_entries_are_those_of_the_dense_backward(case: str) -> None:
    make, loss_of = CASES[case]
    model = make()
    mask = few(model)
    loss_of(model).backward()
    dense = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with sparse_backward(model, mask):
        loss_of(model).backward()
    found = 0
    for name, index in mask.indices.items():
        grad = model.get_parameter(name).grad
        assert grad is not None
        torch.testing.assert_close(
            grad.to_dense().flatten()[index], dense[name].flatten()[index], rtol=1e-4, atol=1e-6
        )
        found += grad.is_sparse
        if grad.is_sparse:
            assert grad.coalesce()._nnz() == index.numel()
    assert found >= 2
    for name, grad in dense.items():  # what is not masked is as ever
        if name not in mask.indices:
            other = model.get_parameter(name).grad
            assert other is not None
            torch.testing.assert_close(other.to_dense(), grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_training_is_the_same(case: str) -> None:
    make, loss_of = CASES[case]

    def trained(sparse: bool) -> tuple[nn.Module, SparseMask]:
        model = make()
        mask = few(model)
        optimizer = MaskedAdamW(model, mask, lr=1e-2, weight_decay=0.1)
        for _ in range(4):
            if sparse:
                with sparse_backward(model, mask):
                    loss_of(model).backward()
            else:
                loss_of(model).backward()
            optimizer.step()
            model.zero_grad()
        return model, mask

    (ours, mask), (theirs, _) = trained(sparse=True), trained(sparse=False)
    start = make()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, theirs.get_parameter(name), rtol=1e-3, atol=1e-4)
        frozen = torch.ones(p.numel(), dtype=torch.bool)
        frozen[mask.indices.get(name, torch.empty(0, dtype=torch.int64))] = False
        same = p.detach().flatten() == start.get_parameter(name).detach().flatten()
        assert bool(same[frozen].all())


def test_accumulated_and_shared_gradients_add_up() -> None:
    model = mlp()
    first, second = model[0], nn.Linear(30, 40)  # type: ignore[index]
    second.weight = first.weight
    both = nn.ModuleList([first, second])
    mask = few(both)
    x = torch.linspace(-1, 1, 60).view(2, 30)

    def backward() -> None:
        (first(x).square().sum() + second(x).square().sum()).backward()

    backward(), backward()
    assert first.weight.grad is not None
    index = mask.indices["0.weight"]
    dense = first.weight.grad.flatten()[index]
    both.zero_grad()
    optimizer = MaskedAdamW(both, mask, lr=1.0, eps=1e30)  # a step is m / eps: the gradient is read
    with sparse_backward(both, mask):
        backward(), backward()
    optimizer.step()
    ours = next(iter(optimizer.state.values()))["exp_avg"][: index.numel()] / 0.1
    torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-6)


def test_what_is_left_alone() -> None:
    model = mlp()
    dense_mask = few(model, density=10 * DENSEST)
    with sparse_backward(model, dense_mask):
        mlp_loss(model).backward()
    assert not any(p.grad.is_sparse for p in model.parameters() if p.grad is not None)
    empty = SparseMask(ParameterSpace.of(model), torch.empty(0, dtype=torch.int64))
    with sparse_backward(model, empty):
        assert not any("forward" in vars(m) for m in model.modules())


def test_forward_is_back_after_an_exception() -> None:
    model = mlp()
    with pytest.raises(ZeroDivisionError), sparse_backward(model, few(model)):
        assert any("forward" in vars(m) for m in model.modules())
        raise ZeroDivisionError
    assert not any("forward" in vars(m) for m in model.modules())


def test_half_precision_weights_get_half_precision_gradients() -> None:
    model = mlp().bfloat16()
    mask = few(model)
    with sparse_backward(model, mask):
        model(torch.ones(6, 30, dtype=torch.bfloat16)).float().square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None and p.grad.is_sparse]
    assert grads and all(g.dtype == torch.bfloat16 for g in grads)


def test_under_apply_mask_the_sparse_gradients_stay_and_any_clipping_sees_them_alone() -> None:
    model = mlp()
    mask = few(model)
    with apply_mask(model, mask) as handle:
        mlp_loss(model).backward()
        dense = nn.utils.clip_grad_norm_(handle.parameters(), 1.0)
        model.zero_grad()
        with sparse_backward(model, mask):
            mlp_loss(model).backward()
        sparse = [p.grad for p in handle.parameters() if p.grad.is_sparse]
        assert len(sparse) == 2 and sum(g._nnz() for g in sparse) == sum(
            mask.indices[n].numel() for n in ("0.weight", "2.weight")
        )
        norm = torch.linalg.vector_norm(
            torch.cat(
                [
                    g.coalesce().values().flatten() if g.is_sparse else g.flatten()
                    for g in (p.grad for p in handle.parameters())
                ]
            )
        )
        torch.testing.assert_close(norm, dense)


def test_both_ways_to_multiply_are_met_and_agree() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(600, 40), torch.randn(600, 300)
    dense = (left.T @ right).flatten()
    scattered, filled = (Pattern(random_subset(12000, k, seed=0), (40, 300)) for k in (60, 900))
    assert scattered._is_scattered and not filled._is_scattered
    for pattern in (scattered, filled):
        x, y = pattern.of_rows(left), pattern.of_columns(right)
        for way in (pattern._gathered, pattern._sampled):
            torch.testing.assert_close(
                way(x, y, torch.float32), dense[pattern.index], rtol=1e-4, atol=1e-4
            )
        torch.testing.assert_close(pattern.products(x, y), way(x, y, torch.float32))


def test_of_the_input_only_the_touched_columns_are_kept() -> None:
    model = nn.Linear(100, 50)
    entries = torch.tensor([7, 107, 1007, 1050])  # of columns 7 and 50
    mask = SparseMask(ParameterSpace.of(model, ["weight"]), entries)
    x = torch.randn(300, 100)
    with sparse_backward(model, mask):
        y = model(x)
        sizes = [t.shape for t in y.grad_fn.saved_tensors]
        y.square().sum().backward()
    assert sizes == [(300, 2), (50, 100)]
    expected = 2 * (y.detach().T @ x).flatten()[entries]
    torch.testing.assert_close(model.weight.grad._values(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("length", [1, 255, 256, 257, 512, 700])
def test_transposed_blocks_are_the_transpose(length: int) -> None:
    x = torch.randn(length, 7)
    for given in (x, torch.randn(7, length).T, x.double()):
        blocks = list(transposed(given))
        assert torch.equal(torch.cat(blocks, 1), given.T)
        assert all(block.is_contiguous() for block in blocks)


def test_an_embedding_that_does_more_than_look_up_is_left_alone() -> None:
    for option in ({"sparse": True}, {"scale_grad_by_freq": True}, {"max_norm": 0.5}):
        model = nn.Embedding(20, 30, **option)
        mask = few(model)
        other = copy.deepcopy(model)
        with sparse_backward(model, mask):
            model(IDS).square().sum().backward()
        other(IDS).square().sum().backward()
        assert model.weight.grad is not None and other.weight.grad is not None
        assert torch.equal(model.weight.grad.to_dense(), other.weight.grad.to_dense())


def test_autocast_keeps_the_plain_layers() -> None:
    model = mlp()
    with sparse_backward(model, few(model)), torch.autocast("cpu", torch.bfloat16):
        mlp_loss(model).backward()
    assert not any(p.grad.is_sparse for p in model.parameters() if p.grad is not None)


def test_a_compiled_model_keeps_the_plain_layers() -> None:
    model = mlp()
    with sparse_backward(model, few(model)):
        compiled = torch.compile(model, backend="aot_eager")
        mlp_loss(compiled).backward()
    assert not any(p.grad.is_sparse for p in model.parameters() if p.grad is not None)
    other = mlp()
    mlp_loss(other).backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
