"""Masks in plain loops: whatever a loop does, it does it to the selected entries alone.

The reference throughout is `by_hand`: an ordinary optimizer without weight decay, on gradients that
are multiplied with the mask as soon as they are there.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from ird_search.artifact import load_mask, save_mask
from ird_search.freeze import apply_mask
from ird_search.mask import SparseMask
from ird_search.optimizer import MaskedAdamW, masked
from ird_search.parameters import ParameterSpace
from ird_search.sparse_backward import sparse_backward
from tests.ranks import RANKS, bits, in_two_processes

STEPS = 3
HEAD = ("head.weight", "head.bias")


class Network(nn.Module):
    """40 → 48 → 32 → 3; `reentrant` says how the middle layer is checkpointed, if it is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(40, 48), nn.Linear(48, 32), nn.Linear(32, 3)
        self.reentrant: bool | None = None

    def middle(self, h: Tensor) -> Tensor:
        return torch.tanh(self.second(h))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.reentrant is None:
            return self.head(self.middle(h))
        return self.head(checkpoint(self.middle, h, use_reentrant=self.reentrant))


def make(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Network, SparseMask, Tensor]:
    """A network, 30 entries of its body, and eight inputs."""
    torch.manual_seed(seed)
    model, x = Network().to(dtype), torch.randn(8, 40, dtype=dtype)
    space = ParameterSpace.of(model, ["first.weight", "first.bias", "second.weight"])
    return model, SparseMask(space, torch.arange(5, space.numel, space.numel // 30)), x


def loss_of(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return (model(x).to(x.dtype) - 1).square().mean()


Make = Callable[[nn.Module, SparseMask], Optimizer]
MASKED: dict[str, Make] = {
    "masked-adamw": lambda model, mask: MaskedAdamW(
        model, mask, lr=0.01, weight_decay=0.0, dense=HEAD
    ),
    "masked-sgd": lambda model, mask: masked(torch.optim.SGD)(
        model, mask, lr=0.1, momentum=0.9, dense=HEAD
    ),
    "sgd": lambda model, mask: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
}
PLAIN: dict[str, Make] = {
    "masked-adamw": lambda model, mask: torch.optim.AdamW(
        model.parameters(), lr=0.01, weight_decay=0.0
    ),
    "masked-sgd": MASKED["sgd"],
    "sgd": MASKED["sgd"],
}
"""The same optimizers as they come."""


def step(model: nn.Module, optimizer: Optimizer, x: Tensor) -> None:
    loss_of(model, x).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()


def accumulated(model: nn.Module, optimizer: Optimizer, x: Tensor) -> None:
    for part in x.chunk(4):
        (loss_of(model, part) / 4).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()


def autocast(model: nn.Module, optimizer: Optimizer, x: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, x)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()


def scaled(model: nn.Module, optimizer: Optimizer, x: Tensor) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(model, x)).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def by_hand(
    optimizer: str,
    one_step: Callable[..., None] = step,
    dtype: torch.dtype = torch.float32,
) -> Network:
    """The network after training on gradients multiplied with the mask."""
    model, mask, x = make(dtype)
    chosen = mask.to_dict()
    for name, p in model.named_parameters():
        if name not in HEAD:
            keep = chosen.get(name, torch.zeros(p.shape, dtype=torch.bool))
            p.register_post_accumulate_grad_hook(partial(multiply, keep))
    plain = PLAIN[optimizer](model, mask)
    for _ in range(STEPS):
        one_step(model, plain, x)
    return model


def multiply(keep: Tensor, p: Tensor) -> None:
    p.grad *= keep


def assert_trained_like(
    reference: nn.Module, model: nn.Module, before: dict[str, Tensor], *, atol: float = 1e-6
) -> None:
    """The frozen entries have their bits, the others are where the reference has them."""
    mask = make()[1]
    assert mask.verify(before, dict(model.named_parameters()), dense=HEAD) == []
    for name, p in reference.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=0, atol=atol)
    for name, index in mask.indices.items():
        moved = model.get_parameter(name).detach().flatten() != before[name].flatten()
        assert bool(moved[index].all())


@pytest.mark.parametrize("optimizer", MASKED)
@pytest.mark.parametrize("one_step", [step, accumulated, autocast, scaled])
def test_a_step_of_any_kind(one_step: Callable[..., None], optimizer: str) -> None:
    model, mask, x = make()
    before = bits(model)
    with apply_mask(model, mask, dense=HEAD):
        made = MASKED[optimizer](model, mask)
        for _ in range(STEPS):
            one_step(model, made, x)
    assert_trained_like(by_hand(optimizer, one_step), model, before)


@pytest.mark.parametrize("optimizer", MASKED)
def test_accumulated_gradients_are_those_of_one_large_batch(optimizer: str) -> None:
    model, mask, x = make(torch.float64)
    before = bits(model)
    with apply_mask(model, mask, dense=HEAD):
        made = MASKED[optimizer](model, mask)
        for _ in range(STEPS):
            accumulated(model, made, x)
    assert_trained_like(by_hand(optimizer, step, torch.float64), model, before, atol=1e-12)


@pytest.mark.parametrize("optimizer", MASKED)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, optimizer: str) -> None:
    model, mask, x = make()
    model.reentrant, before = reentrant, bits(model)
    with apply_mask(model, mask, dense=HEAD):
        made = MASKED[optimizer](model, mask)
        for _ in range(STEPS):
            step(model, made, x)
    assert_trained_like(by_hand(optimizer), model, before)


def test_reentrant_checkpointing_needs_an_input_that_requires_a_gradient() -> None:
    model, _, x = make()
    mask = SparseMask(ParameterSpace.of(model, ["second.weight"]), torch.tensor([0, 3]))
    model.reentrant = True
    with apply_mask(model, mask):  # now nothing before the checkpoint requires one
        with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
            output = model(x)
        assert not output.requires_grad
        loss_of(model, x.requires_grad_()).backward()
    assert model.second.weight.grad.flatten()[[0, 3]].all()


def compiled_with(backend: str) -> Any:
    slow = backend == "inductor"
    marks = [
        pytest.mark.slow,
        pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    ]
    return pytest.param(backend, marks=marks if slow else [])


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("optimizer", MASKED)
@pytest.mark.parametrize("backend", [compiled_with("aot_eager"), compiled_with("inductor")])
def test_compiled_models(backend: str, optimizer: str) -> None:
    model, mask, x = make()
    before = bits(model)
    with apply_mask(model, mask, dense=HEAD):
        compiled, made = torch.compile(model, backend=backend), MASKED[optimizer](model, mask)
        for _ in range(STEPS):
            unclipped(compiled, made, x)
    assert_trained_like(by_hand(optimizer, unclipped), model, before)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("masked_too", [False, True])
def test_the_cheaper_backward_and_a_compiler(masked_too: bool) -> None:
    model, mask, x = make()
    before = bits(model)
    outer = apply_mask(model, mask, dense=HEAD) if masked_too else nullcontext()
    with outer, sparse_backward(model, mask, HEAD):
        compiled = torch.compile(model, backend="aot_eager")
        made = MASKED["masked-adamw"](model, mask)
        for _ in range(STEPS):
            unclipped(compiled, made, x)
    assert_trained_like(by_hand("masked-adamw", unclipped), model, before)


def unclipped(model: nn.Module, optimizer: Optimizer, x: Tensor) -> None:
    loss_of(model, x).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_mask_may_come_after_the_compiler_and_go_again() -> None:
    model, mask, x = make()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    unclipped(compiled, optimizer, x)
    before = bits(model)
    with apply_mask(model, mask):
        unclipped(compiled, optimizer, x)
    assert mask.verify(before, bits(model)) == []
    unclipped(compiled, optimizer, x)
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_an_overflow_outside_the_mask_does_not_stop_a_scaled_step() -> None:
    model = nn.Linear(3, 1, bias=False)
    mask = SparseMask(ParameterSpace.of(model), torch.tensor([1]))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = bits(model)
    with apply_mask(model, mask):
        optimizer = MaskedAdamW(model, mask, lr=0.1)
        for inputs in ([float("inf"), 1.0, float("nan")], [0.0, float("inf"), 0.0]):
            moved = model.weight.detach().clone()
            scaler.scale((model.weight * torch.tensor([inputs])).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert torch.equal(moved, model.weight)  # a selected entry that overflows does stop it
    assert scaler.get_scale() == 2.0
    assert mask.verify(before, bits(model)) == []
    assert moved.flatten()[1] != before["weight"].flatten()[1]


@pytest.mark.parametrize("every", [1, 40])
def test_bfloat16_weights_gather_small_updates_across_checkpoints(
    every: int, tmp_path: Path
) -> None:
    """A step is a hundredth of what a bfloat16 weight can resolve; each `every` steps reload."""
    model, mask, x = make(torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            p.sign_()
    before = bits(model)
    optimizer = MaskedAdamW(model, mask, lr=1e-4)
    for i in range(120):
        with apply_mask(model, mask):
            unclipped(model, optimizer, x)
        if i % every == 0:
            torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "checkpoint.pt")
            weights, state = torch.load(tmp_path / "checkpoint.pt")
            model = make(torch.bfloat16, seed=1)[0]
            model.load_state_dict(weights)
            optimizer = MaskedAdamW(model, mask, lr=1.0)
            optimizer.load_state_dict(state)
    assert mask.verify(before, bits(model)) == []
    drift = {n: (model.get_parameter(n).detach() - before[n]).abs().flatten() for n in mask.indices}
    largest = torch.cat([drift[n][i] for n, i in mask.indices.items()]).max()
    assert 0.004 < largest < 0.016


def test_a_mask_travels_and_so_do_the_weights(tmp_path: Path) -> None:
    model, mask, x = make()
    save_mask(tmp_path / "mask.safetensors", mask)
    torch.save(model.state_dict(), tmp_path / "model.pt")

    elsewhere = make(seed=1)[0]
    elsewhere.load_state_dict(torch.load(tmp_path / "model.pt"))
    before, loaded = bits(elsewhere), load_mask(tmp_path / "mask.safetensors", elsewhere)
    with apply_mask(elsewhere, loaded, dense=HEAD):
        optimizer = MASKED["masked-adamw"](elsewhere, loaded)
        for _ in range(STEPS):
            step(elsewhere, optimizer, x)
    assert_trained_like(by_hand("masked-adamw"), elsewhere, before)

    torch.save(elsewhere.state_dict(), tmp_path / "model.pt")
    model.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(model(x), elsewhere(x))


WRAPPINGS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "static": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True},
}


def train_in_parallel(rank: int) -> dict[str, dict[str, Tensor]]:
    """Each rank sees every second input."""
    return {
        f"{optimizer}/{wrapping}": train_wrapped(rank, optimizer, **WRAPPINGS[wrapping])
        for optimizer in MASKED
        for wrapping in WRAPPINGS
    }


def train_wrapped(rank: int, optimizer: str, **settings: Any) -> dict[str, Tensor]:
    """In two parts, of which the second synchronises."""
    model, mask, x = make()
    parts = x[rank::RANKS].chunk(1 if settings.get("static_graph") else 2)
    with apply_mask(model, mask, dense=HEAD):
        wrapped = DistributedDataParallel(model, **settings)
        made = MASKED[optimizer](model, mask)
        for _ in range(STEPS):
            for part in parts:
                with nullcontext() if part is parts[-1] else wrapped.no_sync():
                    (loss_of(wrapped, part) / len(parts)).backward()
            nn.utils.clip_grad_norm_(wrapped.parameters(), 0.1)
            made.step()
            made.zero_grad()
    return bits(model)


def test_two_processes_do_what_one_does_on_the_joined_batch(tmp_path: Path) -> None:
    ranks = in_two_processes(train_in_parallel, tmp_path)
    for name in ranks[0]:
        optimizer, before = name.split("/")[0], bits(make()[0])
        model = make()[0]
        model.load_state_dict(ranks[0][name])
        assert_trained_like(by_hand(optimizer), model, before)
        assert all(torch.equal(ranks[0][name][n], ranks[1][name][n]) for n in before)


@pytest.fixture
def accelerate() -> Iterator[Any]:
    """The library, with the state that it shares between all of its objects forgotten."""
    library = pytest.importorskip("accelerate")
    state = pytest.importorskip("accelerate.state")
    yield library
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


@pytest.mark.parametrize("optimizer", MASKED)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision: str, optimizer: str, accelerate: Any, tmp_path: Path) -> None:
    """Prepared, accumulated, clipped; half-way saved and loaded into other objects."""
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
    )
    model, mask, x = make()
    before, weights = bits(model), bits(model)
    for steps in (1, STEPS - 1):
        model = make(seed=steps)[0]
        model.load_state_dict(weights)
        handle = apply_mask(model, mask, dense=HEAD)  # before prepare, which may wrap for DDP
        batches = torch.utils.data.DataLoader(x, batch_size=4)
        wrapped, made, loader = accelerator.prepare(model, MASKED[optimizer](model, mask), batches)
        if steps > 1:
            accelerator.load_state(str(tmp_path))
        for _ in range(steps):
            for batch in loader:
                with accelerator.accumulate(wrapped):
                    with accelerator.autocast():
                        loss = loss_of(wrapped, batch)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(wrapped.parameters(), 0.1)
                    made.step()
                    made.zero_grad()
        accelerator.save_state(str(tmp_path))
        handle.remove()
        accelerator.free_memory()
        weights = bits(model)
    reference = by_hand(optimizer, {"no": accumulated, "bf16": autocast_in_two}[precision])
    assert_trained_like(reference, model, before)


def autocast_in_two(model: nn.Module, optimizer: Optimizer, x: Tensor) -> None:
    for part in x.chunk(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, part) / 2
        loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()
