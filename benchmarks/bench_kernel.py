"""What the fused kernel takes on a GPU, beside the same sums formed in memory.

    python -m benchmarks.bench_kernel

For the weights of BERT-base and of an 8-billion-parameter Llama: 128 samples of 128 tokens, column
sums and row scores within half a percent. The unit is one plain gradient of the weight, the same
products added up over samples. Beside the times stand operations and bytes a second, as shares of
what a large product and a copy reach on the same device. Then a whole pass of BERT-base against one
forward and backward of the batch, and against the loop over single samples.

Without a GPU, TRITON_INTERPRET=1 and `--smoke` try the script itself on sizes that mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.record import RESULTS, write_result
from ird_search.fisher import FisherMatrix, gradients
from ird_search.fisher.columns import Columns
from ird_search.fisher.fused import fused_for
from ird_search.fisher.gradients import Outer, SampleGradients
from ird_search.fisher.kernel import Tiling, add_squares
from ird_search.fisher.loop import Loop
from ird_search.fisher.taps import Taps
from ird_search.parameters import ParameterSpace
from ird_search.samples import SampleSet
from ird_search.task import Classification

WEIGHTS = {
    "BERT-base attention": (768, 768),
    "BERT-base up": (3072, 768),
    "BERT-base down": (768, 3072),
    "Llama-8B attention": (4096, 4096),
    "Llama-8B up": (14336, 4096),
}
DENSITY = 0.005
TILINGS = [
    Tiling(rows, columns, tokens, warps)
    for rows, columns in ((64, 64), (64, 128), (128, 128))
    for tokens in (32, 64)
    for warps in (4, 8)
]


def seconds(call: Callable[[], Any], device: torch.device, *, rounds: int) -> float:
    """The median of some runs, after one that compiles."""
    taken = []
    for _ in range(rounds + 1):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceilings(device: torch.device, dtype: torch.dtype, size: int) -> dict[str, float]:
    """What a large product and a copy reach."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    product = seconds(lambda: a @ b, device, rounds=9)
    block = torch.zeros(size * size * 16, dtype=torch.uint8, device=device)
    copy = seconds(lambda: block.clone(), device, rounds=9)
    return {"tflops": 2 * size**3 / product / 1e12, "gb_per_s": 2 * block.numel() / copy / 1e9}


def one_weight(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[str, Any]:
    """All ways on one weight."""
    batch, tokens, m, n = sizes
    left = torch.randn(batch, tokens, m, device=device).to(dtype)
    right = torch.randn(batch, tokens, n, device=device).to(dtype)
    outer, sums = Outer(left, right), torch.zeros(m * n, device=device)
    chosen = torch.randperm(m * n, device=device)[: max(1, int(DENSITY * m * n))].sort().values
    within = Columns(chosen, m * n)
    marks = within.marks()
    ways: dict[str, Callable[[], Any]] = {
        "one plain gradient": lambda: left.flatten(0, 1).mT @ right.flatten(0, 1),
        "formed in memory": lambda: SampleGradients.add_squares(outer, sums, within),
        "kernel": lambda: add_squares(left, right, sums=sums, marks=marks),
        "kernel, and means": lambda: add_squares(
            left, right, sums=sums, means=sums.clone(), marks=marks
        ),
    }
    taken = {name: seconds(call, device, rounds=rounds) for name, call in ways.items()}
    tried = {}
    for cut in TILINGS if device.type == "cuda" else TILINGS[:1]:
        try:
            tried[str(cut)] = seconds(
                lambda cut=cut: add_squares(left, right, sums=sums, marks=marks, tiling=cut),
                device,
                rounds=rounds,
            )
        except Exception as problem:  # a tile that does not fit
            tried[str(cut)] = f"{type(problem).__name__}: {problem}"[:100]
    cut = Tiling.of(left, right)
    size = left.element_size()
    read = size * batch * tokens * (m * -(-n // cut.columns) + n * -(-m // cut.rows))
    return {
        "weight": [m, n],
        "ms": {name: 1e3 * t for name, t in taken.items()},
        "ratio": {name: t / taken["one plain gradient"] for name, t in taken.items()},
        "tflops": 2 * batch * tokens * m * n / taken["kernel"] / 1e12,
        "gb_per_s": (read + 8 * m * n) / taken["kernel"] / 1e9,
        "tilings": tried,
    }


@contextmanager
def _no_kernel() -> Any:
    with patch.object(gradients, "fused_for", lambda left, right: None):
        yield


def whole_pass(
    batch: int, tokens: int, dtype: torch.dtype, device: torch.device, rounds: int, **shape: int
) -> dict[str, Any]:
    """Both marginals over the weights of a BERT, embeddings left out."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**shape)).eval().to(device, dtype)
    names = [n for n, p in model.named_parameters() if "embeddings" not in n and p.ndim == 2]
    space = ParameterSpace.of(model, names)
    for name, p in model.named_parameters():
        p.requires_grad_(name in space)
    rows = torch.randint(model.config.vocab_size, (batch, tokens))
    inputs = tuple({"input_ids": r, "attention_mask": torch.ones_like(r)} for r in rows)
    samples = SampleSet(inputs, torch.arange(batch) % 2, torch.arange(batch))
    task = Classification(2)
    everything = samples.batch(range(batch), device)
    taps = Taps(model, task, space.names, example=everything)
    settings: dict[str, Any] = {"tokens": batch * tokens, "device": device}
    mask = torch.randperm(space.numel)[: int(DENSITY * space.numel)].sort().values
    matrix = FisherMatrix(taps, samples, space, cache_bytes=0, **settings)
    loop = FisherMatrix(Loop(model, task, space.names), samples, space, cache_bytes=0, **settings)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(**everything.inputs).logits, everything.labels)

    def plain() -> None:
        model.zero_grad()
        loss().backward()

    def formed() -> None:
        with _no_kernel():
            matrix.marginals(within=mask)

    def forward() -> None:
        with torch.no_grad():
            loss()

    ways: dict[str, Callable[[], Any]] = {
        "forward": forward,
        "forward and backward": plain,
        "kernel": lambda: matrix.marginals(within=mask),
        "formed in memory": formed,
        "loop": lambda: loop.marginals(within=mask),
    }
    taken = {name: seconds(call, device, rounds=rounds) for name, call in ways.items()}
    with _no_kernel():
        wanted = matrix.marginals(within=mask)
    found = matrix.marginals(within=mask)
    error = float((found.columns - wanted.columns).norm() / wanted.columns.norm())
    backward = taken["forward and backward"] - taken["forward"]
    return {
        "samples": batch,
        "tokens": tokens,
        "parameters": space.numel,
        "error": error,
        "ms": {name: 1e3 * t for name, t in taken.items()},
        "kernel / backward": taken["kernel"] / backward,
        "kernel / forward and backward": taken["kernel"] / taken["forward and backward"],
        "loop / kernel": taken["loop"] / taken["kernel"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing is written")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.smoke:
        parser.error("no CUDA device here; the kernel is for GPUs (--smoke tries the script)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = {**small, "intermediate_size": 32, "vocab_size": 50} if options.smoke else {}
    weights = {"smoke": (20, 40)} if options.smoke else WEIGHTS
    batch, tokens = (4, 8) if options.smoke else (options.samples, options.tokens)
    result: dict[str, Any] = {"samples": batch, "tokens": tokens, "density": DENSITY, "dtypes": {}}
    for name in options.dtypes:
        dtype = getattr(torch, name)
        probe = torch.zeros(1, 2, 16, device=device, dtype=dtype)
        if fused_for(probe, probe) is None:
            parser.error(f"the kernel does not work in {name} here; the log says why")
        found: dict[str, Any] = {"ceilings": ceilings(device, dtype, 64 if options.smoke else 8192)}
        print(name, {k: round(v, 1) for k, v in found["ceilings"].items()}, flush=True)
        found["weights"] = {}
        for what, (m, n) in weights.items():
            one = one_weight((batch, tokens, m, n), dtype, device, options.rounds)
            one |= {
                f"share of {key}": one[key] / found["ceilings"][key]
                for key in ("tflops", "gb_per_s")
            }
            found["weights"][what] = one
            told = ", ".join(f"{k} {v:.2f}" for k, v in one["ratio"].items())
            print(f"  {what}: {told}; {one['tflops']:.1f} TFLOP/s", flush=True)
        found["pass"] = whole_pass(batch, tokens, dtype, device, options.rounds, **shape)
        print("  pass", {k: v for k, v in found["pass"].items() if k != "ms"}, flush=True)
        result["dtypes"][name] = found
    if not options.smoke:
        print(f"written to {write_result('kernel', result, options.output)}")


if __name__ == "__main__":
    main()
