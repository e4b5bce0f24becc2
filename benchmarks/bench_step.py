"""What a masked training step costs beside a plain one.

    python benchmarks/bench_step.py --threads 1 --rounds 9

A BERT of MiniLM's shape with random weights, batches of 16 × 64 tokens. Every variant runs once a
round, one behind the other, so that a busy machine slows all of them alike. Figures are medians;
ratios are medians of the ratios within a round. CPU time is the fairer one on a shared machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from record import RESULTS, write_result
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from ird_search.freeze import apply_mask, trainable_only
from ird_search.mask import SparseMask
from ird_search.optimizer import MaskedAdamW
from ird_search.parameters import candidate_space, head_parameters

DENSITIES = (0.001, 0.005, 0.05)
BATCH, TOKENS = 16, 64
LR, DECAY = 1e-3, 0.01

BASE = "forward+backward"


class Time(NamedTuple):
    """Seconds: on the wall, of the CPU, and the optimizer's part of the latter."""

    wall: float
    cpu: float
    optimizer: float


Times = dict[str, Time]


class Variant(NamedTuple):
    """A way to train a mask: its optimizer, and what stands around a step."""

    name: str
    optimizer: torch.optim.Optimizer
    around: Callable[[], AbstractContextManager[Any]]


def minilm() -> BertForSequenceClassification:
    """MiniLM-L6's shape, random weights."""
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=30522,
            hidden_size=384,
            num_hidden_layers=6,
            num_attention_heads=12,
            intermediate_size=1536,
        )
    ).train()


def random_mask(model: nn.Module, density: float) -> SparseMask:
    """Entries drawn from all candidate tensors: the most scattered, so the dearest, mask."""
    space = candidate_space(model, head=head_parameters(model), embeddings=True)
    count = round(density * space.numel)
    chosen = torch.randperm(space.numel, generator=torch.Generator().manual_seed(0))[:count]
    return SparseMask(space, chosen.sort().values)


def timed(call: Callable[[], Any]) -> Time:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Time(time.perf_counter() - wall, time.process_time() - cpu, 0.0)


def forward_backward(model: nn.Module, batch: dict[str, Tensor]) -> None:
    model.zero_grad(set_to_none=True)
    loss = nn.functional.cross_entropy(
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits,
        batch["labels"],
    )
    loss.backward()


def variants(model: nn.Module, mask: SparseMask) -> list[Variant]:
    """The ways to train a mask that are compared."""
    parameters = list(model.parameters())
    masked = MaskedAdamW(model, mask, lr=LR, weight_decay=DECAY)
    applied = torch.optim.AdamW(parameters, lr=LR, weight_decay=DECAY, fused=True)
    plain, fused = (
        torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=fused)
        for fused in (None, True)
    )
    return [
        Variant("masked", masked, nullcontext),
        Variant("masked, trainable_only", masked, lambda: trainable_only(model, mask)),
        Variant("apply_mask, AdamW fused", applied, lambda: apply_mask(model, mask)),
        Variant("gradient masks, AdamW", plain, lambda: gradient_masks(model, mask)),
        Variant("gradient masks, AdamW fused", fused, lambda: gradient_masks(model, mask)),
    ]


@contextmanager
def gradient_masks(model: nn.Module, mask: SparseMask) -> Iterator[None]:
    """What is done without this package: a float mask of the model's size on every gradient."""
    chosen = mask.to_dict()
    hooks = []
    for name, p in model.named_parameters():
        factor = chosen[name].float() if name in chosen else torch.zeros_like(p)
        hooks.append(p.register_hook(lambda grad, factor=factor: grad * factor))
    yield
    for hook in hooks:
        hook.remove()


def one_round(model: nn.Module, batch: dict[str, Tensor], compared: list[Variant]) -> Times:
    """Every variant once: forward and backward, the optimizer's step, and both together."""
    times = {BASE: timed(lambda: forward_backward(model, batch))}
    for variant in compared:
        with variant.around():
            before = timed(lambda: forward_backward(model, batch))
            step = timed(variant.optimizer.step)
        times[variant.name] = Time(before.wall + step.wall, before.cpu + step.cpu, step.cpu)
    return times


def summary(rounds: list[Times]) -> dict[str, dict[str, float]]:
    """Medians over the rounds.

    `ratio` compares with the bare forward and backward of the same round; `own_ratio` with the
    forward and backward of the same step, which leaves out the noise between two passes.
    """
    found = {}
    for name in rounds[0]:
        pairs = [(r[name], r[BASE]) for r in rounds]
        figures = {
            "wall_ms": [1e3 * t.wall for t, _ in pairs],
            "cpu_ms": [1e3 * t.cpu for t, _ in pairs],
            "optimizer_cpu_ms": [1e3 * t.optimizer for t, _ in pairs],
            "wall_ratio": [t.wall / base.wall for t, base in pairs],
            "cpu_ratio": [t.cpu / base.cpu for t, base in pairs],
            "own_ratio": [t.cpu / (t.cpu - t.optimizer) for t, _ in pairs],
        }
        found[name] = {key: round(statistics.median(v), 4) for key, v in figures.items()}
    return found


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in an optimizer's state."""
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def measure(density: float, *, rounds: int) -> dict[str, Any]:
    """All variants at one density."""
    model = minilm()
    mask = random_mask(model, density)
    generator = torch.Generator().manual_seed(1)
    batch = {
        "input_ids": torch.randint(30522, (BATCH, TOKENS), generator=generator),
        "attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.int64),
        "labels": torch.randint(2, (BATCH,), generator=generator),
    }
    compared = variants(model, mask)
    one_round(model, batch, compared)  # state is made in the first step
    times = summary([one_round(model, batch, compared) for _ in range(rounds)])
    sizes = {variant.name: state_bytes(variant.optimizer) for variant in compared}
    return {
        "density": density,
        "selected": mask.count,
        "state_bytes": sizes,
        "state_over_two_floats": round(sizes["masked"] / (8 * mask.count), 4),
        "times": times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds at each density")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = []
    for density in DENSITIES:
        found.append(measure(density, rounds=options.rounds))
        show(found[-1])
    setting = {"model": "BERT, MiniLM-L6 shape", "batch": BATCH, "tokens": TOKENS}
    result = {**setting, "rounds": options.rounds, "densities": found}
    print(f"written to {write_result('step', result, options.output)}")


def show(found: dict[str, Any]) -> None:
    """One density as a table."""
    print(f"density {found['density']:.1%}, {found['selected']:,} entries")
    for name, t in found["times"].items():
        state = found["state_bytes"].get(name, 0) / 1e6
        print(
            f"  {name:28} {t['cpu_ms']:8.1f} ms CPU, optimizer {t['optimizer_cpu_ms']:6.1f}; "
            f"× {t['cpu_ratio']:.3f} CPU, {t['wall_ratio']:.3f} wall, {t['own_ratio']:.3f} own; "
            f"state {state:.2f} MB"
        )


if __name__ == "__main__":
    main()
