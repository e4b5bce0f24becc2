"""Frozen entries stay frozen under any optimizer, and the model comes back as it was."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer
from transformers import BertConfig, BertForSequenceClassification

from ird_search.errors import ModelError, UsageError
from ird_search.freeze import apply_mask, trainable_only
from ird_search.mask import SparseMask
from ird_search.optimizer import MaskedAdamW
from ird_search.parameters import ParameterSpace


class Network(nn.Module):
    """A convolution, BatchNorm, two layers with one weight, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.head(self.second(self.first(x).tanh()))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, weight_decay=0.1, momentum=0.5),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.1),
}


def make(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor, SparseMask]:
    """A model, an input, and a mask that touches a part of the tensors partly."""
    torch.manual_seed(0)
    model, x = Network().to(dtype), torch.randn(6, 1, 5, 5, dtype=dtype)
    space = ParameterSpace.of(model, ["conv.weight", "norm.weight", "first.weight", "head.weight"])
    return model, x, SparseMask(space, torch.arange(0, space.numel, 3))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    model(x).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_entries_keep_their_bits(name: str, dtype: torch.dtype) -> None:
    model, x, mask = make(dtype)
    before = weights(model)
    with apply_mask(model, mask, dense=["head.bias"]) as handle:
        optimizer = OPTIMIZERS[name](handle.parameters())
        for _ in range(4):
            step(model, optimizer, x)
    assert mask.verify(before, weights(model), dense=["head.bias"]) == []
    assert moved(before, model) == {*mask.indices, "head.bias"}


def test_an_optimizer_that_was_given_the_whole_model_and_has_momentum() -> None:
    model, x, mask = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    step(model, optimizer, x)
    model(x).sum().backward()
    optimizer.zero_grad(set_to_none=False)  # gradients of zeros would still decay
    before = weights(model)
    with apply_mask(model, mask):
        step(model, optimizer, x)
    assert mask.verify(before, weights(model)) == []


def test_a_gradient_left_over_from_before_is_masked_too() -> None:
    model, x, mask = make()
    model(x).sum().backward()
    with apply_mask(model, mask):
        for name, p in model.named_parameters():
            if name not in mask.indices:
                assert p.grad is None
            else:
                assert not p.grad[~mask.to_dict()[name]].any()


def test_selected_entries_move_as_under_masked_adamw() -> None:
    model, x, mask = make()
    other = copy.deepcopy(model)
    with apply_mask(model, mask) as handle:
        dense = torch.optim.AdamW(handle.parameters(), lr=0.01, weight_decay=0.1)
        for _ in range(3):
            step(model, dense, x)
    compact = MaskedAdamW(other, mask, lr=0.01, weight_decay=0.1)
    for _ in range(3):
        step(other, compact, x)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_the_gradient_is_masked_before_it_is_clipped() -> None:
    model, x, mask = make()
    with apply_mask(model, mask) as handle:
        model(x).square().mean().backward()
        model(x).square().mean().backward()  # accumulated
        selected = torch.cat(
            [model.get_parameter(n).grad.flatten()[i] for n, i in mask.indices.items()]
        )
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        torch.testing.assert_close(norm, selected.norm())
        assert handle.count == mask.count


def test_a_gradient_that_is_not_finite_outside_the_mask_is_zero() -> None:
    model = nn.Linear(3, 1, bias=False)
    mask = SparseMask(ParameterSpace.of(model), torch.tensor([1]))
    with apply_mask(model, mask):
        (model.weight * torch.tensor([[float("inf"), 2.0, float("nan")]])).sum().backward()
    assert model.weight.grad.tolist() == [[0.0, 2.0, 0.0]]


def test_weights_loaded_during_training_stay() -> None:
    model, x, mask = make()
    with apply_mask(model, mask) as handle:
        optimizer = OPTIMIZERS["adamw"](handle.parameters())
        step(model, optimizer, x)
        model.load_state_dict({k: torch.ones_like(v) for k, v in model.state_dict().items()})
        before = weights(model)
        step(model, optimizer, x)
    assert mask.verify(before, weights(model)) == []


def test_after_an_exception_in_the_loop() -> None:
    model, x, mask = make()
    model.conv.bias.requires_grad_(False)
    required, before = [p.requires_grad for p in model.parameters()], weights(model)
    with pytest.raises(KeyError), apply_mask(model, mask) as handle:
        step(model, OPTIMIZERS["adamw"](handle.parameters()), x)
        raise KeyError
    assert mask.verify(before, weights(model)) == []
    assert [p.requires_grad for p in model.parameters()] == required
    with apply_mask(model, mask):  # and it can be applied again
        pass


def test_a_masked_optimizer_under_apply_mask_is_clipped_by_what_is_trained() -> None:
    model, x, mask = make()
    alone = copy.deepcopy(model)
    own = MaskedAdamW(alone, mask, lr=0.1, clip_norm=1e-3)
    with apply_mask(model, mask) as handle:
        optimizer = MaskedAdamW(model, mask, lr=0.1)
        for _ in range(3):
            model(x).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
            assert handle._saved == []  # no copy of the tensors is taken for it
            optimizer.zero_grad()
            step(alone, own, x)
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_what_is_no_model_or_no_mask_is_named() -> None:
    model, _, mask = make()
    for call, text in (
        (lambda: apply_mask(model, "out"), "The mask is a str; a SparseMask is accepted. Read one"),
        (lambda: apply_mask(mask, model), "The model is a SparseMask; an nn.Module is accepted"),
        (lambda: MaskedAdamW(model.parameters(), mask, lr=0.1), "The model is a generator"),
        (lambda: trainable_only(model, None).__enter__(), "The mask is a NoneType"),
    ):
        with pytest.raises(UsageError, match=text):
            call()


def test_an_optimizers_dense_tensor_that_the_mask_freezes_is_an_error() -> None:
    model, x, mask = make()
    before = weights(model)
    with apply_mask(model, mask) as handle:
        optimizer = MaskedAdamW(model, mask, lr=0.1, dense=["head.bias"])
        with pytest.raises(UsageError, match=r"'head.bias' stand in the optimizer's `dense`"):
            step(model, optimizer, x)
        assert not moved(before, model)
    with apply_mask(model, mask, dense=["head.bias"]) as handle:
        optimizer = MaskedAdamW(model, mask, lr=0.1)  # another one may train the head
        handle.check_dense(optimizer)
        with pytest.raises(UsageError, match=r"'head.bias' stand in the mask's `dense`"):
            handle.check_dense(optimizer, alone=True)


def test_groups_give_the_dense_tensors_options_of_their_own() -> None:
    model, x, mask = make()
    with apply_mask(model, mask, dense=["head.bias"]) as handle:
        optimizer = torch.optim.SGD(handle.groups(lr=0.0), lr=0.1)
        before = weights(model)
        step(model, optimizer, x)
        assert "head.bias" not in moved(before, model) and moved(before, model)
        assert [len(g["params"]) for g in optimizer.param_groups] == [4, 1]
    with apply_mask(model, mask) as handle:
        assert len(handle.groups(lr=1.0)) == 1


def test_sharded_tensors_are_refused() -> None:
    model, _, mask = make()
    model.conv.weight.device_mesh = object()  # as of a DTensor, which needs a process group
    with pytest.raises(ModelError, match="1 tensors with trained entries are sharded over"):
        apply_mask(model, mask)


def test_a_masked_optimizer_of_another_mask_is_held_back_by_the_one_in_force() -> None:
    model, x, mask = make()
    before = weights(model)
    other = SparseMask(mask.space, torch.arange(1, mask.space.numel, 2))
    with apply_mask(model, mask):
        optimizer = MaskedAdamW(model, other, lr=0.1, weight_decay=0.5)
        step(model, optimizer, x)
    assert mask.verify(before, weights(model)) == [] == other.verify(before, weights(model))
    assert moved(before, model)


def test_after_an_exception_within_the_optimizers_step() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            raise MemoryError

    model, x, mask = make()
    before = weights(model)
    with pytest.raises(MemoryError), apply_mask(model, mask) as handle:
        step(model, Broken(handle.parameters(), lr=0.1, weight_decay=0.5), x)
    assert mask.verify(before, weights(model)) == []


def test_other_optimizers_are_left_alone() -> None:
    model, _, mask = make()
    stranger = nn.Linear(2, 2)
    before = weights(stranger)
    with apply_mask(model, mask):
        stranger(torch.ones(1, 2)).sum().backward()
        torch.optim.SGD(stranger.parameters(), lr=0.1).step()
    assert moved(before, stranger) == {"weight", "bias"}


def test_removing_leaves_no_trace() -> None:
    model, x, mask = make()
    hooks = (
        len(torch_optimizer._global_optimizer_pre_hooks),
        len(torch_optimizer._global_optimizer_post_hooks),
    )
    handle = apply_mask(model, mask)
    assert "in force" in repr(handle) and f"{mask.count} parameters" in repr(handle)
    handle.remove()
    handle.remove()
    assert "removed" in repr(handle)
    assert all(p.requires_grad and not p._backward_hooks for p in model.parameters())
    assert hooks == (
        len(torch_optimizer._global_optimizer_pre_hooks),
        len(torch_optimizer._global_optimizer_post_hooks),
    )
    before = weights(model)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1), x)
    assert moved(before, model) == set(before)


def test_a_dropped_handle_lives_and_dies_with_its_model() -> None:
    model, x, mask = make()
    hooks = len(torch_optimizer._global_optimizer_post_hooks)
    apply_mask(model, mask)
    gc.collect()
    before = weights(model)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1), x)
    assert mask.verify(before, weights(model)) == []
    dead = weakref.ref(model)
    del model
    gc.collect()
    assert dead() is None
    assert len(torch_optimizer._global_optimizer_post_hooks) == hooks


def test_a_second_mask_on_the_model_or_a_part_of_it_is_refused() -> None:
    model, _, mask = make()
    part = SparseMask(ParameterSpace.of(model.head), torch.tensor([0]))
    with apply_mask(model, mask):
        with pytest.raises(UsageError, match="under a mask already"):
            apply_mask(model, mask)
        with pytest.raises(UsageError, match="under a mask already"):
            apply_mask(model.head, part)
    with apply_mask(model.head, part), pytest.raises(UsageError, match="under a mask already"):
        apply_mask(model, mask)


def test_a_mask_of_another_model_is_refused_and_nothing_changes() -> None:
    model, _, mask = make()
    model.head = nn.Linear(4, 3)
    model.head.bias.requires_grad_(False)
    with pytest.raises(ModelError, match=r"head.weight is \[3, 4\], not \[2, 4\]"):
        apply_mask(model, mask)
    with (
        pytest.raises(ModelError, match="belongs to another model: 1 of 4 tensors differ"),
        trainable_only(model, mask),
    ):
        pass
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["head.bias"]


def test_integer_tensors_cannot_be_trained() -> None:
    model = nn.Module()
    model.codes = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match=r"'codes' holds torch.int8"):
        apply_mask(model, SparseMask(ParameterSpace.of(model), torch.tensor([0])))


def test_trainable_only_skips_gradients_and_restores() -> None:
    model, x, mask = make()
    model.norm.bias.requires_grad_(False)
    required = [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyError), trainable_only(model, mask, dense=["head.bias"]):
        model(x).sum().backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == {
            *mask.indices,
            "head.bias",
        }
        raise KeyError
    assert [p.requires_grad for p in model.parameters()] == required


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_bert(name: str) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    model = BertForSequenceClassification(config)
    body = [n for n, _ in model.named_parameters() if n.startswith("bert.encoder")]
    space = ParameterSpace.of(model, body)
    mask, head = SparseMask(space, torch.arange(0, space.numel, 97)), ["classifier.weight"]
    before = weights(model)
    with apply_mask(model, mask, dense=head) as handle:
        optimizer = OPTIMIZERS[name](handle.parameters())
        for _ in range(2):
            model(torch.randint(50, (3, 6))).logits.square().mean().backward()
            nn.utils.clip_grad_norm_(handle.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert mask.verify(before, weights(model), dense=head) == []
    assert len(moved(before, model)) == len(mask.indices) + 1


def test_verify_names_the_culprit_of_masked_gradients_with_weight_decay() -> None:
    model, x, mask = make()
    before = weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(x).square().mean().backward()
    for name, p in model.named_parameters():
        p.grad = p.grad * mask.to_dict()[name] if name in mask.indices else None
    optimizer.step()
    found = mask.verify(before, weights(model))
    assert "head.weight: 5 of 5 frozen entries moved." in found
    assert {sentence.split(":")[0] for sentence in found} == set(mask.indices)


def test_verify_looks_at_bits_and_at_every_tensor() -> None:
    mask = SparseMask(ParameterSpace(("w",), ((3,),)), torch.tensor([0]))
    nan = float("nan")
    before = {"w": torch.tensor([1.0, 0.0, nan]), "extra": torch.zeros(2), "gone": torch.zeros(1)}
    after = {
        "w": torch.tensor([2.0, -0.0, nan]),
        "extra": torch.zeros(2).half(),
        "new": torch.ones(1),
    }
    assert mask.verify(before, after) == [
        "w: 1 of 2 frozen entries moved.",
        "extra: was torch.float32 [2], is torch.float16 [2].",
        "gone: missing after training.",
        "new: missing before training.",
    ]
    assert mask.verify(before, after, dense=["w", "extra", "gone", "new"]) == []
    wrong = {"w": torch.zeros(4)}
    assert mask.verify(wrong, wrong) == ["w: is torch.float32 [4], but [3] in the mask."]


def test_verify_knows_tied_names_and_reports_buffers() -> None:
    model, x, mask = make()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = MaskedAdamW(model, mask, lr=0.1)
    step(model, optimizer, x)
    after = {name: t.clone() for name, t in model.state_dict().items()}
    assert "second.weight" in after
    assert mask.verify(before, after) == [
        "norm.running_mean: 4 of 4 frozen entries moved.",
        "norm.running_var: 4 of 4 frozen entries moved.",
        "norm.num_batches_tracked: 1 of 1 frozen entries moved.",
    ]
