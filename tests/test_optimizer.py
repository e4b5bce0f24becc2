"""`MaskedAdamW`: equal to AdamW where it should be, still where it should be."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from ird_search.errors import ModelError, UsageError
from ird_search.mask import SparseMask
from ird_search.optimizer import MaskedAdamW, masked
from ird_search.parameters import ParameterSpace

DECAY = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


ELEMENTWISE = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, 1),
    "sgd without momentum": (torch.optim.SGD, {}, 0),
    "adam": (torch.optim.Adam, {"amsgrad": True, "weight_decay": 0.1}, 3),
    "adamw": (torch.optim.AdamW, {"maximize": True}, 2),
    "adamw, fused": (torch.optim.AdamW, {"fused": True}, 2),
    "adamw, foreach": (torch.optim.AdamW, {"foreach": True}, 2),
    "nadam": (torch.optim.NAdam, {"weight_decay": 0.1}, 2),
    "radam": (torch.optim.RAdam, {}, 2),
    "adamax": (torch.optim.Adamax, {}, 2),
    "adagrad": (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}, 1),
    "adadelta": (torch.optim.Adadelta, {}, 2),
    "rmsprop": (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}, 3),
    "asgd": (torch.optim.ASGD, {}, 1),
    "rprop": (torch.optim.Rprop, {}, 2),
}
"""Torch's optimizers that treat each entry by itself, and how many floats an entry they keep."""


class Tied(nn.Module):
    """An embedding tied to the output layer: one parameter, two names."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.body(self.table(x))))


class Convolution(nn.Module):
    """A channels-last convolution (not contiguous), BatchNorm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 2)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    return BertForSequenceClassification(config).eval()


CASES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), (6, 4)),
    "tied": (Tied, 7),
    "convolution": (Convolution, (4, 3, 6, 6)),
    "bert": (bert, 50),
}


def make(case: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = CASES[case]
    model = build()
    x = torch.randint(shape, (3, 5)) if isinstance(shape, int) else torch.randn(*shape)
    return model, x


def backward(model: nn.Module, x: Tensor) -> None:
    output = model(x)
    logits = getattr(output, "logits", output)
    logits.float().square().mean().backward()


def some(model: nn.Module, share: float = 0.2, seed: int = 1) -> SparseMask:
    space = ParameterSpace.of(model)
    chosen = torch.rand(space.numel, generator=torch.Generator().manual_seed(seed)) < share
    return SparseMask(space, chosen.nonzero().flatten())


def full(model: nn.Module) -> SparseMask:
    space = ParameterSpace.of(model)
    return SparseMask(space, torch.arange(space.numel))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int = 4) -> None:
    for _ in range(steps):
        backward(model, x)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("case", CASES)
def test_a_full_mask_is_adamw(case: str) -> None:
    model, x = make(case)
    reference = copy.deepcopy(model)
    train(reference, torch.optim.AdamW(reference.parameters(), **DECAY), x)
    train(model, MaskedAdamW(model, full(model), **DECAY), x)
    for name, p in reference.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=0, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_selected_entries_move_as_in_adamw_and_all_others_not_at_all(case: str) -> None:
    model, x = make(case)
    mask, before, reference = some(model), weights(model), copy.deepcopy(model)
    train(model, MaskedAdamW(model, mask, **DECAY), x, steps=1)
    train(reference, torch.optim.AdamW(reference.parameters(), **DECAY), x, steps=1)
    assert mask.verify(before, weights(model)) == []
    for name, chosen in mask.to_dict().items():
        expected = torch.where(chosen, reference.get_parameter(name), before[name])
        torch.testing.assert_close(model.get_parameter(name), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_any_elementwise_optimizer_does_on_the_entries_what_it_does_on_all(name: str) -> None:
    optimizer_class, options, floats = ELEMENTWISE[name]
    model, x = make("tied")
    mask, before = some(model), weights(model)
    ours = masked(optimizer_class)(model, mask, lr=0.01, **options)
    # The reference: each tensor's chosen entries as a parameter of their own.
    chosen = mask.to_dict()
    apart = {n: nn.Parameter(before[n][where].clone()) for n, where in chosen.items()}
    theirs = optimizer_class(apart.values(), lr=0.01, **options)
    for _ in range(4):
        backward(model, x)
        for n, where in chosen.items():
            apart[n].grad = model.get_parameter(n).grad[where].clone()
        ours.step()
        theirs.step()
        ours.zero_grad()
    assert mask.verify(before, weights(model)) == []
    for n, where in chosen.items():
        torch.testing.assert_close(model.get_parameter(n)[where], apart[n], rtol=0, atol=1e-7)
        assert not torch.equal(apart[n], before[n][where])
    kept = [v for state in ours.state.values() for v in state.values() if getattr(v, "ndim", 0)]
    assert sum(v.numel() for v in kept) == floats * mask.count


@pytest.mark.parametrize(
    ("optimizer_class", "options", "message"),
    [
        (torch.optim.LBFGS, {}, "LBFGS cannot step on a vector of single entries"),
        (torch.optim.Muon, {}, "Muon: Muon only supports 2D parameters"),
        (torch.optim.Adafactor, {}, "Adafactor mixes the entries of a tensor"),
        (torch.optim.SparseAdam, {}, "SparseAdam cannot step on a vector of single entries"),
        (torch.optim.SGD, {"nesterov": True}, "SGD: Nesterov momentum requires a momentum"),
        (torch.optim.SGD, {"momentun": 0.9}, "unexpected keyword argument 'momentun'"),
    ],
)
def test_optimizers_that_cannot_be_masked(
    optimizer_class: type, options: dict, message: str
) -> None:
    model, _ = make("mlp")
    with pytest.raises(UsageError, match=message):
        masked(optimizer_class)(model, some(model), lr=0.1, **options)


def test_one_class_for_one_optimizer() -> None:
    assert masked(torch.optim.AdamW) is MaskedAdamW is masked(MaskedAdamW)
    assert masked(torch.optim.SGD) is masked(torch.optim.SGD)
    assert masked(torch.optim.SGD).__name__ == "MaskedSGD"
    with pytest.raises(UsageError, match="is not an optimizer class"):
        masked("sgd")


def test_it_follows_a_dense_adamw_on_masked_gradients() -> None:
    model, x = make("bert")
    mask, reference = some(model), copy.deepcopy(model)
    chosen = mask.to_dict()
    dense = torch.optim.AdamW(reference.parameters(), lr=0.01, weight_decay=0.0)
    for _ in range(5):
        backward(reference, x)
        for name, p in reference.named_parameters():
            p.grad = p.grad * chosen.get(name, False)
        dense.step()
        dense.zero_grad()
    train(model, MaskedAdamW(model, mask, lr=0.01, weight_decay=0.0), x, steps=5)
    for name, p in reference.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=0, atol=1e-6)


def test_float64_keeps_its_precision() -> None:
    model, x = make("mlp")
    model, x = model.double(), x.double()
    reference = copy.deepcopy(model)
    train(reference, torch.optim.AdamW(reference.parameters(), **DECAY), x)
    train(model, MaskedAdamW(model, full(model), **DECAY), x)
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-15)


def test_the_convolution_of_these_tests_is_not_contiguous() -> None:
    model, _ = make("convolution")
    assert not model.conv.weight.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_gather_updates_smaller_than_their_resolution(dtype: torch.dtype) -> None:
    model = nn.Linear(4, 1, bias=False).to(dtype)
    nn.init.ones_(model.weight)
    mask = SparseMask(ParameterSpace.of(model), torch.tensor([0, 2]))
    optimizer = MaskedAdamW(model, mask, lr=1e-4)
    for _ in range(200):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    moved = model.weight.detach().flatten().float()
    assert moved[[1, 3]].tolist() == [1.0, 1.0]
    torch.testing.assert_close(moved[[0, 2]], torch.full((2,), 0.98), rtol=0, atol=0.004)


def test_half_weights_written_from_outside_count() -> None:
    model = nn.Linear(4, 1, bias=False).bfloat16()
    mask = SparseMask(ParameterSpace.of(model), torch.tensor([0, 2]))
    optimizer = MaskedAdamW(model, mask, lr=1e-2)
    for value in (1.0, 5.0):
        nn.init.constant_(model.weight, value)
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    torch.testing.assert_close(
        model.weight.detach().flatten().float(), torch.full((4,), 5.0), rtol=0, atol=0.05
    )


def test_bert_in_bfloat16_keeps_frozen_bits() -> None:
    model, x = make("bert")
    model = model.bfloat16()
    mask, before = some(model), weights(model)
    train(model, MaskedAdamW(model, mask, **DECAY), x)
    assert mask.verify(before, weights(model)) == []
    assert any(not torch.equal(before[n], p) for n, p in model.named_parameters())


def test_the_dense_head_is_trained_fully_at_its_own_rate() -> None:
    model, x = make("bert")
    head = ["classifier.weight", "classifier.bias"]
    space = ParameterSpace.of(model, [n for n in weights(model) if n not in head])
    mask = SparseMask(space, torch.arange(0, space.numel, 50))
    reference, before = copy.deepcopy(model), weights(model)
    optimizer = MaskedAdamW(
        model, mask, lr=1e-3, weight_decay=0.1, dense=head, dense_lr=0.1, dense_weight_decay=0.0
    )
    train(model, optimizer, x, steps=1)
    heads = [reference.get_parameter(n) for n in head]
    train(reference, torch.optim.AdamW(heads, lr=0.1, weight_decay=0.0), x, steps=1)
    assert mask.verify(before, weights(model), dense=head) == []
    for name in head:
        torch.testing.assert_close(
            model.get_parameter(name), reference.get_parameter(name), rtol=0, atol=1e-7
        )


def test_the_state_is_two_floats_an_entry() -> None:
    model, x = make("bert")
    mask = some(model, 0.05)
    optimizer = MaskedAdamW(model, mask, lr=0.01)
    train(model, optimizer, x, steps=2)
    kept = [v for s in optimizer.state.values() for v in s.values() if v.ndim]
    assert sum(v.nbytes for v in kept) == 2 * 4 * mask.count
    # The vector that the optimizer steps on is gone between two steps, and so is its gradient.
    assert all(p.numel() == 0 and p.grad is None for p in optimizer.state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_continues_identically(dtype: torch.dtype, tmp_path) -> None:
    model, x = make("tied")
    model = model.to(dtype)
    space = ParameterSpace.of(model, ["body.weight", "table.weight"])
    mask, dense = SparseMask(space, torch.arange(0, space.numel, 3)), ["body.bias"]
    settings = {**DECAY, "dense": dense, "dense_lr": 0.02}
    optimizer = MaskedAdamW(model, mask, **settings)
    train(model, optimizer, x, steps=2)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other = copy.deepcopy(model)
    resumed = MaskedAdamW(other, mask, **{**settings, "lr": 1.0})
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(model, optimizer, x)
    train(other, resumed, x)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loaded_state_is_a_copy() -> None:
    model, x = make("mlp")
    first = MaskedAdamW(model, some(model), lr=0.01)
    train(model, first, x, steps=1)
    second = MaskedAdamW(model, some(model), lr=0.01)
    second.load_state_dict(first.state_dict())
    (state,) = first.state.values()
    kept = state["exp_avg"].clone()
    train(model, second, x, steps=1)
    assert torch.equal(state["exp_avg"], kept) and state["step"] == 1


def test_the_state_of_another_mask_is_refused() -> None:
    model, _ = make("mlp")
    state = MaskedAdamW(model, some(model, seed=1), lr=0.01).state_dict()
    with pytest.raises(UsageError, match="belongs to another mask"):
        MaskedAdamW(model, some(model, seed=2), lr=0.01).load_state_dict(state)


def test_tensors_without_a_gradient_wait_as_in_torch() -> None:
    model, x = make("mlp")
    reference = copy.deepcopy(model)
    ours = MaskedAdamW(model, full(model), **DECAY)
    theirs = torch.optim.AdamW(reference.parameters(), **DECAY)
    for absent in ([], ["2.weight"], [], ["0.weight", "2.bias"], [], list(weights(model)), []):
        for m, optimizer in ((model, ours), (reference, theirs)):
            backward(m, x)
            for name in absent:
                m.get_parameter(name).grad = None
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_that_fell_apart_is_saved_and_loaded(dtype: torch.dtype) -> None:
    model, x = make("mlp")
    model, x = model.to(dtype), x.to(dtype)
    optimizer = masked(torch.optim.AdamW)(model, some(model, 0.5), **DECAY)
    for absent in ([], ["2.weight", "0.bias"], ["2.weight"], []):
        backward(model, x)
        for name in absent:
            model.get_parameter(name).grad = None
        optimizer.step()
        optimizer.zero_grad()
    steps = sorted(int(state["step"]) for state in optimizer.state.values())
    assert steps == [2, 3, 4]
    other = copy.deepcopy(model)
    resumed = MaskedAdamW(other, some(model, 0.5), lr=1.0)
    resumed.load_state_dict(optimizer.state_dict())
    train(model, optimizer, x)
    train(other, resumed, x)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_of_another_kind_is_refused() -> None:
    model, _ = make("mlp")
    mask = some(model)
    space = ParameterSpace.of(model, ["0.weight"])
    small = SparseMask(space, torch.tensor([0]))
    ours = masked(torch.optim.SGD)(model, mask, lr=0.1)
    with pytest.raises(UsageError, match="not the state of a masked optimizer"):
        ours.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())
    with pytest.raises(UsageError, match="the state of a AdamW, not of a SGD"):
        ours.load_state_dict(MaskedAdamW(model, mask, lr=0.1).state_dict())
    head = masked(torch.optim.SGD)(model, small, lr=0.1, dense=["2.weight"])
    with pytest.raises(UsageError, match="other dense tensors"):
        head.load_state_dict(masked(torch.optim.SGD)(model, small, lr=0.1).state_dict())


def test_an_optimizer_that_raises_leaves_the_weights_alone() -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            if self.param_groups[0]["lr"] > 1:
                raise RuntimeError("too fast")
            return super().step(closure)

    model, x = make("mlp")
    before = weights(model)
    optimizer = masked(Failing)(model, some(model), lr=0.1)
    backward(model, x)
    optimizer.param_groups[0]["lr"] = 2.0
    with pytest.raises(RuntimeError, match="too fast"):
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_sparse_gradients_of_an_embedding() -> None:
    torch.manual_seed(0)
    model = nn.Embedding(6, 2, sparse=True)
    mask, before = SparseMask(ParameterSpace.of(model), torch.tensor([1, 4, 11])), weights(model)
    optimizer = MaskedAdamW(model, mask, lr=0.1)
    model(torch.tensor([0, 2])).sum().backward()
    optimizer.step()
    assert mask.verify(before, weights(model)) == []
    assert (model.weight.detach() - before["weight"]).flatten()[[1, 4]].abs().min() > 0.09


def test_weights_of_two_dtypes_share_one_optimizer() -> None:
    model, x = make("mlp")
    model[2].double()
    model.insert(2, _Widen())
    mask, before = some(model, 0.5), weights(model)
    optimizer = MaskedAdamW(model, mask, lr=0.01)
    train(model, optimizer, x)
    assert mask.verify(before, weights(model)) == []
    assert {s["exp_avg"].dtype for s in optimizer.state.values()} == {torch.float32, torch.float64}


class _Widen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


def test_the_clip_norm_counts_only_what_is_trained() -> None:
    model = nn.Linear(4, 1)
    mask = SparseMask(ParameterSpace.of(model, ["weight"]), torch.tensor([0, 3]))
    before = weights(model)
    settings = {"betas": (0.0, 0.0), "eps": 1.0, "weight_decay": 0.0}
    optimizer = MaskedAdamW(model, mask, lr=1.0, dense=["bias"], clip_norm=1.0, **settings)
    model.weight.grad = torch.tensor([[2.0, 1e6, math.inf, 4.0]])
    model.bias.grad = torch.tensor([4.0])
    optimizer.step()
    # The norm of (2, 4, 4) is 6; with β = 0 and ε = 1 an entry moves by |g|/(|g| + 1).
    moved = before["weight"] - model.weight.detach()
    expected = torch.tensor([[(2 / 6) / (1 + 2 / 6), 0, 0, (4 / 6) / (1 + 4 / 6)]])
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(before["bias"] - model.bias.detach(), torch.tensor([0.4]))


def test_a_small_gradient_is_not_clipped() -> None:
    model, x = make("mlp")
    other = copy.deepcopy(model)
    train(model, MaskedAdamW(model, some(model), lr=0.01, clip_norm=1e3), x)
    train(other, MaskedAdamW(other, some(other), lr=0.01), x)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_gradient_accumulation() -> None:
    model, x = make("mlp")
    reference, partly, before = copy.deepcopy(model), copy.deepcopy(model), weights(model)
    optimizers = [
        (model, MaskedAdamW(model, full(model), **DECAY)),
        (reference, torch.optim.AdamW(reference.parameters(), **DECAY)),
        (partly, MaskedAdamW(partly, some(partly), **DECAY)),
    ]
    for m, optimizer in optimizers:
        for _ in range(2):
            backward(m, x)
            backward(m, 2 * x)
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    assert some(partly).verify(before, weights(partly)) == []


def test_schedulers_closures_and_deterministic_algorithms() -> None:
    model, x = make("convolution")
    optimizer = MaskedAdamW(model, some(model), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure() -> float:
        optimizer.zero_grad()
        backward(model, x)
        return 7.0

    torch.use_deterministic_algorithms(True)
    try:
        assert optimizer.step(closure) == 7.0
    finally:
        torch.use_deterministic_algorithms(False)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_a_mask_of_another_model_is_refused_with_the_differences() -> None:
    mask = some(make("bert")[0])
    with pytest.raises(ModelError) as caught:
        MaskedAdamW(make("mlp")[0], mask, lr=0.01)
    text = str(caught.value)
    assert "This mask belongs to another model: 41 of 41 tensors differ." in text
    assert "bert.embeddings.word_embeddings.weight [50, 16] is missing." in text
    assert text.count("is missing") == 10 and "31 more tensors differ." in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0; it must be at least 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"betas": (0.9, 1.0)}, "each must be at least 0 and below 1"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0; it must be above 0"),
        ({"dense": ["2.weigth"]}, "'2.weigth' is not a parameter of this model. Did you mean"),
        ({"dense": ["0.bias"]}, "'0.bias' is dense and also holds 8 selected entries"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    model, _ = make("mlp")
    with pytest.raises(UsageError, match=message):
        MaskedAdamW(model, full(model), **{"lr": 0.1, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": "a"}, "lr is 'a'; it must be at least 0"),
        ({"betas": 0.9}, "betas are 0.9; each must be"),
        ({"weight_decay": None, "eps": -1.0}, "2 problems"),
        ({"dense_lr": 1.0}, "dense_lr is given, but no tensor is dense"),
        ({"dense": ["2.bias"], "dense_weight_decy": 0.0}, "no option 'weight_decy'.*Did you mean"),
    ],
)
def test_settings_of_a_wrong_kind(settings: dict, message: str) -> None:
    model, _ = make("mlp")
    mask = SparseMask(ParameterSpace.of(model, ["0.weight"]), torch.tensor([0]))
    with pytest.raises(UsageError, match=message):
        MaskedAdamW(model, mask, **{"lr": 0.1, **settings})


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_and_pickles_go_on_identically(optimizer_class: type, how: str) -> None:
    model, x = make("mlp")
    options = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
    optimizer = masked(optimizer_class)(model, some(model), lr=0.1, **options)
    train(model, optimizer, x, steps=2)
    pair = (model, optimizer)
    other, again = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert type(again) is type(optimizer) and again.state is not optimizer.state
    train(model, optimizer, x)
    train(other, again, x)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("steps", [0, 3])
def test_a_model_that_is_cast_to_half_later_gets_master_values(steps: int) -> None:
    model = nn.Linear(4, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = masked(torch.optim.SGD)(
        model, SparseMask(ParameterSpace.of(model), torch.tensor([0, 2])), lr=1e-4
    )
    for i in range(200 + steps):
        if i == steps:
            model.bfloat16()
            nn.init.ones_(model.weight)
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    moved = model.weight.detach().flatten().float()
    assert moved[[1, 3]].tolist() == [1.0, 1.0]
    torch.testing.assert_close(moved[[0, 2]], torch.full((2,), 0.98), rtol=0, atol=0.004)


def test_nothing_to_train_and_late_parameters() -> None:
    model, _ = make("mlp")
    empty = SparseMask(ParameterSpace.of(model), torch.empty(0, dtype=torch.int64))
    with pytest.raises(UsageError, match="nothing would be trained"):
        MaskedAdamW(model, empty, lr=0.1)
    optimizer = MaskedAdamW(model, empty, lr=0.1, dense=["0.bias"])
    with pytest.raises(UsageError, match="takes no further parameters"):
        optimizer.add_param_group({"params": [model[0].weight]})
