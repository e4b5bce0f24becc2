"""`LightningMask` in Lightning's `Trainer`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ird_search.artifact import load_mask, save_mask
from ird_search.errors import ModelError, UsageError
from ird_search.freeze import apply_mask
from ird_search.mask import SparseMask
from ird_search.optimizer import MaskedAdamW, masked
from ird_search.parameters import ParameterSpace
from tests.ranks import RANKS, bits, in_two_processes

pytest.importorskip("lightning")
from lightning import pytorch as lightning
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy

from ird_search.consumers.lightning import LightningMask

pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]

HEAD = ("2.weight", "2.bias")
STEPS = 4
BATCHES = [torch.randn(4, 6, generator=torch.Generator().manual_seed(i)) for i in range(STEPS)]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 2))


def some(model: nn.Module) -> SparseMask:
    space = ParameterSpace.of(model, ["0.weight", "0.bias"])
    return SparseMask(space, torch.arange(2, space.numel, 9))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x).to(x.dtype) - 1).square().mean()


Make = Callable[[nn.Module, SparseMask], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "masked-adamw": lambda model, mask: MaskedAdamW(model, mask, lr=0.01, dense=HEAD),
    "masked-sgd": lambda model, mask: masked(torch.optim.SGD)(
        model, mask, lr=0.1, momentum=0.9, weight_decay=0.1, dense=HEAD
    ),
    "adamw": lambda model, mask: torch.optim.AdamW(model.parameters(), lr=0.01),
    "sgd": lambda model, mask: torch.optim.SGD(model.parameters(), lr=0.1),
}


class Lit(lightning.LightningModule):
    """A network in `model`, where masks and optimizers find it."""

    def __init__(self, optimizer: str = "masked-adamw", seed: int = 0) -> None:
        super().__init__()
        self.model = network(seed)
        self.optimizer = optimizer

    def training_step(self, x: Tensor, index: int) -> Tensor:
        return loss_of(self.model, x)

    def configure_optimizers(self) -> Optimizer:
        return OPTIMIZERS[self.optimizer](self.model, some(self.model))


def batches() -> DataLoader:
    return DataLoader(BATCHES, batch_size=None)


def fit(lit: Lit, mask: SparseMask, *, ckpt_path: str | None = None, **settings: Any) -> Any:
    defaults: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    callbacks = [LightningMask(mask, module="model", dense=HEAD), *settings.pop("callbacks", [])]
    trainer = lightning.Trainer(**{**defaults, **settings}, callbacks=callbacks)
    trainer.fit(lit, batches(), ckpt_path=ckpt_path)
    return trainer


def in_a_plain_loop(
    optimizer: str, clip: float | None = None, accumulate: int = 1, dtype: torch.dtype | None = None
) -> nn.Module:
    model = network()
    mask = some(model)
    with apply_mask(model, mask, dense=HEAD):
        made = OPTIMIZERS[optimizer](model, mask)
        for i, x in enumerate(BATCHES):
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                loss = loss_of(model, x) / accumulate
            loss.backward()
            if (i + 1) % accumulate:
                continue
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            made.step()
            made.zero_grad()
    return model


def assert_trained(before: dict[str, Tensor], model: nn.Module) -> None:
    mask, after = some(network()), bits(model)
    assert mask.verify(before, after, dense=HEAD) == []
    for name, index in mask.indices.items():
        assert bool((after[name] != before[name]).flatten()[index].all())
    assert all(not torch.equal(after[name], before[name]) for name in HEAD)


def assert_no_mask(module: nn.Module) -> None:
    assert all(p.requires_grad and not p._backward_hooks for p in module.parameters())


WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "clipped": ({"gradient_clip_val": 0.1}, {"clip": 0.1}),
    "accumulated": ({"accumulate_grad_batches": 2}, {"accumulate": 2}),
    "autocast": ({"precision": "bf16-mixed"}, {"dtype": torch.bfloat16}),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("way", WAYS)
def test_it_trains_as_a_plain_loop_does(way: str, optimizer: str) -> None:
    here, there = WAYS[way]
    lit = Lit(optimizer)
    before = bits(lit.model)
    fit(lit, some(lit.model), **here)
    assert_trained(before, lit.model)
    assert_no_mask(lit)
    reference = in_a_plain_loop(optimizer, **there)
    for p, expected in zip(lit.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=0, atol=1e-6)


def test_the_norm_that_is_clipped_is_that_of_the_trained_entries() -> None:
    """So a step of SGD is as long as told."""
    lit = Lit("sgd")
    before, mask = bits(lit.model), some(lit.model)
    fit(lit, mask, max_steps=1, gradient_clip_val=0.01)
    moved = [(p - before[name]).flatten() for name, p in lit.model.named_parameters()]
    assert torch.cat(moved).norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_half_precision_weights() -> None:
    lit = Lit()
    before = bits(lit.model.bfloat16())
    fit(lit, some(lit.model), precision="bf16-true", max_epochs=8)
    assert some(lit.model).verify(before, bits(lit.model), dense=HEAD) == []
    assert lit.model[0].weight.dtype == torch.bfloat16
    assert not torch.equal(lit.model[0].weight, before["0.weight"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_ends_as_an_uninterrupted_one(optimizer: str, tmp_path: Path) -> None:
    lit, resumed = Lit(optimizer), Lit(optimizer, seed=1)
    before = bits(lit.model)
    save_all = {"every_n_epochs": 1, "save_top_k": -1}
    settings = {"max_epochs": 3, "enable_checkpointing": True}
    for model, ckpt_path in ((lit, None), (resumed, str(tmp_path / f"epoch=0-step={STEPS}.ckpt"))):
        saver = lightning.callbacks.ModelCheckpoint(tmp_path, **save_all)
        trainer = fit(model, some(lit.model), ckpt_path=ckpt_path, callbacks=[saver], **settings)
    assert trainer.global_step == 3 * STEPS
    for p, expected in zip(resumed.model.parameters(), lit.model.parameters(), strict=True):
        assert torch.equal(p, expected)
    assert_trained(before, resumed.model)


def test_checkpoints_hold_a_state_of_the_size_of_the_mask(tmp_path: Path) -> None:
    lit = Lit()
    mask = some(lit.model)
    fit(lit, mask).save_checkpoint(tmp_path / "last.ckpt")
    (state,) = torch.load(tmp_path / "last.ckpt")["optimizer_states"]
    moments = [v for s in state["state"].values() for k, v in s.items() if k != "step"]
    trained = mask.count + sum(lit.model.get_parameter(name).numel() for name in HEAD)
    assert sum(t.numel() for t in moments) == 2 * trained


def test_from_a_saved_mask_to_saved_weights(tmp_path: Path) -> None:
    save_mask(tmp_path / "mask.safetensors", some(network()))
    lit = Lit()
    before = bits(lit.model)
    fit(lit, load_mask(tmp_path / "mask.safetensors", lit.model))
    assert_trained(before, lit.model)
    torch.save(lit.model.state_dict(), tmp_path / "model.pt")
    again = network(seed=1)
    again.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(again(BATCHES[0]), lit.model(BATCHES[0]))


class Fails(lightning.Callback):
    """Ends training within its first epoch."""

    def on_train_batch_end(self, *arguments: Any) -> None:
        raise RuntimeError("out of luck")


def test_training_that_fails_takes_the_mask_off() -> None:
    lit = Lit()
    before = bits(lit.model)
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(lit, some(lit.model), callbacks=[Fails()])
    assert_no_mask(lit)
    fit(lit, some(lit.model))
    assert_trained(before, lit.model)


class Validated(Lit):
    """Asserts that no mask is on it."""

    def validation_step(self, x: Tensor, index: int) -> None:
        assert_no_mask(self)


def test_validation_knows_no_mask() -> None:
    lit = Validated()
    callback = LightningMask(some(lit.model), module="model")
    trainer = lightning.Trainer(barebones=True, accelerator="cpu", callbacks=[callback])
    trainer.validate(lit, batches())


class MadeLater(Lit):
    """Its network comes with `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        self.model = None

    def configure_model(self) -> None:
        self.model = self.model or network()


class Replaced(Lit):
    """Its network is another one before training starts."""

    def configure_model(self) -> None:
        self.model = network()


@pytest.mark.parametrize("make", [MadeLater, Replaced])
def test_a_model_that_is_made_later(make: type[Lit]) -> None:
    lit, before = make(), bits(network())
    fit(lit, some(network()))
    assert_trained(before, lit.model)
    assert_no_mask(lit)


def test_a_mask_over_the_whole_module() -> None:
    lit = Lit("adamw")
    mask, before = some(lit.model), bits(lit)
    space = ParameterSpace.of(lit, [f"model.{name}" for name in mask.space.names])
    whole = SparseMask(space, mask.coords)
    trainer = lightning.Trainer(
        barebones=True, accelerator="cpu", max_epochs=1, callbacks=[LightningMask(whole)]
    )
    trainer.fit(lit, batches())
    assert whole.verify(before, bits(lit)) == []
    assert not torch.equal(before["model.0.weight"], lit.model[0].weight)


def test_what_cannot_be_is_told() -> None:
    lit = Lit()
    mask = some(lit.model)

    def told(callback: LightningMask, **settings: Any) -> None:
        settings = {"barebones": True, "accelerator": "cpu", "max_epochs": 1, **settings}
        lightning.Trainer(**settings, callbacks=[callback]).fit(lit, batches())

    with pytest.raises(UsageError, match=r"Lit has no module 'modle'[.] Did you mean 'model'"):
        told(LightningMask(mask, module="modle"))
    with pytest.raises(ModelError, match="belongs to another model: 2 of 2 tensors differ"):
        told(LightningMask(mask))
    assert_no_mask(lit)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (FSDPStrategy, "are sharded by FSDPStrategy"),
        (DDPStrategy, "Make 'model' in __init_"),
    ],
)
def test_strategies_that_it_cannot_work_under(strategy: type, message: str) -> None:
    lit, trainer = MadeLater(), SimpleNamespace(strategy=strategy())
    callback = LightningMask(some(network()), module="model")
    with pytest.raises(UsageError, match=message):
        callback.setup(trainer, lit, "fit")
        lit.configure_model()
        callback.on_fit_start(trainer, lit)


def test_a_head_named_in_one_place_only_is_an_error() -> None:
    lit = Lit("masked-adamw")
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        barebones=True,
        callbacks=[LightningMask(some(network()), module="model")],
    )
    with pytest.raises(UsageError, match=r"'2.bias', '2.weight' stand in the optimizer's `dense`"):
        trainer.fit(lit, batches())
    assert_no_mask(lit)
    with pytest.raises(UsageError, match="module is a Sequential; the dotted name"):
        LightningMask(some(network()), module=network())  # type: ignore[arg-type]


def train_in_parallel(rank: int) -> dict[str, dict[str, Tensor]]:
    """Each rank trains on half of each batch."""
    found = {}
    for optimizer in OPTIMIZERS:
        lit = Lit(optimizer)
        halves = DataLoader([x.chunk(RANKS)[rank] for x in BATCHES], batch_size=None)
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=RANKS,
            strategy=DDPStrategy(),
            plugins=[TorchElasticEnvironment()],
            use_distributed_sampler=False,
            barebones=True,
            callbacks=[LightningMask(some(lit.model), module="model", dense=HEAD)],
        )
        trainer.fit(lit, halves)
        assert_no_mask(lit)
        found[optimizer] = bits(lit.model)
    return found


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    ranks = in_two_processes(train_in_parallel, tmp_path)
    for optimizer in OPTIMIZERS:
        reference, model = in_a_plain_loop(optimizer), network()
        for rank in range(RANKS):
            model.load_state_dict(ranks[rank][optimizer])
            assert_trained(bits(network()), model)
            for p, expected in zip(model.parameters(), reference.parameters(), strict=True):
                torch.testing.assert_close(p, expected, rtol=0, atol=1e-6)
