"""The training loop, and snapshots of what it may change."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from ird_search.errors import IRDError, UsageError
from ird_search.freeze import trainable_only
from ird_search.mask import SparseMask
from ird_search.optimizer import MaskedAdamW
from ird_search.parameters import ParameterSpace
from ird_search.task import Classification
from ird_search.training import Diverged, finetune, snapshot

TASK = Classification(2)


@dataclass
class Rows:
    inputs: dict[str, Tensor]
    labels: Tensor


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def rows(steps: int) -> list[Rows]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(16, 4, generator=generator) for _ in range(steps)]
    return [Rows({"input": x}, (x[:, 0] > 0).long()) for x in inputs]


def body(model: nn.Module) -> SparseMask:
    space = ParameterSpace.of(model, ["0.weight", "1.weight"])
    return SparseMask(space, torch.arange(0, space.numel, 2))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_with_a_mask_and_a_head() -> None:
    model = make()
    mask, head, before = body(model), ["3.weight", "3.bias"], state(model)
    buffers = [name for name, _ in model.named_buffers()]
    optimizer = MaskedAdamW(model, mask, lr=0.05, dense=head, weight_decay=0.01)
    with trainable_only(model, mask, head):
        losses = finetune(model, TASK, rows(40), optimizer=optimizer)
    assert len(losses) == 40 and sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert mask.verify(before, state(model), dense=[*head, *buffers]) == []
    assert all(p.grad is None for p in model.parameters())


def test_the_loop_is_the_plain_loop() -> None:
    model = make()
    reference, batches = copy.deepcopy(model), rows(10)
    losses = finetune(
        model,
        TASK,
        batches,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.01),
        schedule="constant",
        warmup=0.0,
        clip_norm=0.5,
    )
    optimizer = torch.optim.AdamW(reference.parameters(), lr=0.01)
    for batch, seen in zip(batches, losses, strict=True):
        loss = TASK.loss(reference(batch.inputs["input"]), batch.labels)
        assert loss.item() == seen
        loss.backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert same(state(model), state(reference))


class Recorder(torch.optim.SGD):
    """Keeps the learning rates it was stepped with."""

    def step(self, closure=None):
        self.rates = [*getattr(self, "rates", []), [g["lr"] for g in self.param_groups]]
        return super().step(closure)


@pytest.mark.parametrize(
    ("schedule", "warmup", "factors"),
    [
        ("linear", 0.2, [1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("linear", 0.0, [1 - s / 10 for s in range(10)]),
        ("constant", 0.1, [1 / 2] + [1] * 9),
        ("constant", 0.0, [1] * 10),
    ],
)
def test_learning_rates_of_all_groups(schedule: str, warmup: float, factors: list[float]) -> None:
    model = make()
    optimizer = Recorder(
        [{"params": model[0].parameters()}, {"params": model[3].parameters(), "lr": 0.5}], lr=0.1
    )
    finetune(model, TASK, rows(10), optimizer=optimizer, schedule=schedule, warmup=warmup)
    expected = torch.tensor([[0.1 * f, 0.5 * f] for f in factors])
    torch.testing.assert_close(torch.tensor(optimizer.rates), expected)


def test_a_masked_optimizer_takes_over_the_clip_norm() -> None:
    model, other = make(), make()
    first = MaskedAdamW(model, body(model), lr=0.01, clip_norm=0.01)
    second = MaskedAdamW(other, body(other), lr=0.01)
    finetune(model, TASK, rows(5), optimizer=first)
    finetune(other, TASK, rows(5), optimizer=second, clip_norm=0.01)
    assert second.clip_norm == 0.01
    assert same(state(model), state(other))


def test_a_stream_needs_a_number_of_steps_and_gives_no_more() -> None:
    model, stream = make(), iter(rows(5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(UsageError, match=r"has no length. Give `steps`"):
        finetune(model, TASK, stream, optimizer=optimizer)
    assert len(finetune(model, TASK, stream, optimizer=optimizer, steps=3)) == 3
    assert len(list(stream)) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "lineal"}, "Unknown schedule 'lineal'; known are linear, constant"),
        ({"warmup": 1.5}, "warmup is 1.5; it is a fraction"),
        ({"steps": 0}, "A fine-tune of 0 steps trains nothing"),
    ],
)
def test_bad_settings(settings: dict, message: str) -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(UsageError, match=message):
        finetune(model, TASK, rows(2), optimizer=optimizer, **settings)


def test_a_loss_that_is_not_finite_stops_before_it_is_applied() -> None:
    model, batches = make().eval(), rows(5)
    batches[3].inputs["input"][0, 0] = math.nan
    with pytest.raises(Diverged, match=r"diverged at step 3: the loss is nan") as caught:
        finetune(model, TASK, batches, optimizer=torch.optim.SGD(model.parameters(), lr=0.01))
    assert caught.value.step == 3
    assert all(p.isfinite().all() for p in model.parameters())
    assert not model.training and not model[1].training
    assert isinstance(caught.value, IRDError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.step, str(again)) == (3, str(caught.value))


def test_a_last_step_that_breaks_the_weights_is_noticed() -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=math.inf)
    with pytest.raises(Diverged, match="a weight is not finite"):
        finetune(model, TASK, rows(1), optimizer=optimizer)


def test_training_mode_and_the_modes_before() -> None:
    model = make().eval()
    model[0].train()
    running = model[1].running_mean.clone()
    finetune(model, TASK, rows(1), optimizer=torch.optim.SGD(model.parameters(), lr=0.01))
    assert not torch.equal(model[1].running_mean, running)
    assert [m.training for m in model] == [True, False, False, False]


def test_gradients_from_before_do_not_leak_in() -> None:
    model, other = make(), make()
    for p in other.parameters():
        p.grad = torch.full_like(p, 100.0)
    for m in (model, other):
        finetune(m, TASK, rows(3), optimizer=torch.optim.SGD(m.parameters(), lr=0.01))
    assert same(state(model), state(other))


def test_fine_tunes_share_one_model_through_a_snapshot() -> None:
    model = make()
    mask, head, before = body(model), ["3.weight", "3.bias"], state(model)
    saved = snapshot(model, mask, head)
    assert saved.count == mask.count + 18
    assert "3 buffers" in repr(saved) and f"{saved.count} parameters in 4 tensors" in repr(saved)
    losses = []
    for _ in range(2):
        optimizer = MaskedAdamW(model, mask, lr=0.05, dense=head)
        losses.append(finetune(model, TASK, rows(10), optimizer=optimizer))
        assert not same(before, state(model))
        saved.restore()
        assert same(before, state(model))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_snapshot_of_a_full_fine_tune(dtype: torch.dtype) -> None:
    model = make().to(dtype)
    model[3].bias.requires_grad_(False)
    before, saved = state(model), snapshot(model)
    assert saved.count == sum(p.numel() for p in model.parameters()) - 2
    for p in model.parameters():
        if p.requires_grad:
            nn.init.constant_(p, math.nan)
    model[1].running_var.zero_()
    saved.restore()
    assert same(before, state(model))


def test_a_snapshot_of_a_tensor_that_is_not_contiguous() -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    mask = SparseMask(ParameterSpace.of(model), torch.arange(1, 112, 5))
    before, saved = state(model), snapshot(model, mask)
    chosen = mask.to_dict()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.where(chosen[name], 0.0, p))
    assert not same(before, state(model))
    saved.restore()
    assert same(before, state(model))
