"""What the Fisher information of every parameter and every sample costs.

    python benchmarks/bench_fisher.py --threads 1 --rounds 5 --lengths 32 64 128

A BERT of MiniLM's shape with random weights, 32 samples of T tokens. The unit is one plain forward
and backward over the same samples in one batch. All ways run once a round, one behind the other, so
that a busy machine slows all of them alike; ratios are medians of the ratios within a round. CPU
time is the fairer one on a shared machine. Peak memory is what a process of its own needs on top of
the loaded model. The loop is what the published code of FISH Mask does: a batch of one, a backward,
its squares added to a sum; it gives no row scores.

Then the Fisher work of a whole search (four halving rounds on 64 rows), and the exact top k of
110 million scores beside `torch.topk`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from record import RESULTS, peak_of, write_result
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from ird_search.budgets import Budgets
from ird_search.fisher import FisherMatrix, make_engine
from ird_search.fisher.vmap import VMap
from ird_search.moves import narrowed
from ird_search.pair import Pair, Ranges
from ird_search.parameters import ParameterSpace, candidate_space, head_parameters
from ird_search.samples import SampleSet
from ird_search.selection import top_k
from ird_search.selector import Selector
from ird_search.task import Classification

SAMPLES = 32
DENSITY = 0.005
TASK = Classification(2)

PLAIN = "plain forward+backward"
LOOP = "loop, batch of one, no row scores"
CHUNKS = (1, 4, 8, 16)
WAYS = {
    PLAIN: "one batch, gradients of all candidates",
    "taps, score in mask": "column sums and row scores within 0.5%, at once",
    "taps": "column sums and row scores over all entries, at once",
    "taps, row scores only": "over all entries",
    "taps, mask's entries only": "row scores within 0.5%",
    **{f"vmap, chunk {c}": "column sums and row scores within 0.5%" for c in CHUNKS},
    LOOP: "column sums",
}
WITH_EMBEDDINGS = [way for way in WAYS if not way.startswith("vmap")]
"""vmap forms a whole embedding table for every sample: minutes and gigabytes."""

SEARCH_ROWS, SEARCH_TOKENS, SEARCH_ROUNDS = 64, 64, 4
SCORES = 110_000_000


class Time(NamedTuple):
    """Seconds on the wall and of the CPU."""

    wall: float
    cpu: float


class Setting(NamedTuple):
    """A model, the samples, and the candidate parameters."""

    model: nn.Module
    samples: SampleSet
    space: ParameterSpace
    mask: Tensor


def minilm() -> BertForSequenceClassification:
    """MiniLM-L6's shape, random weights."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    )
    return BertForSequenceClassification(config).eval()


def setting(tokens: int, *, embeddings: bool, count: int = SAMPLES) -> Setting:
    """The model, and samples of equal length; everything that is no candidate is frozen."""
    model = minilm()
    space = candidate_space(model, head=head_parameters(model), embeddings=embeddings)
    for name, p in model.named_parameters():
        p.requires_grad_(name in space)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(30522, (count, tokens), generator=generator)
    inputs = tuple({"input_ids": r, "attention_mask": torch.ones_like(r)} for r in rows)
    samples = SampleSet(inputs, torch.arange(count) % 2, torch.arange(count))
    chosen = torch.randperm(space.numel, generator=generator)[: int(DENSITY * space.numel)]
    return Setting(model, samples, space, chosen.sort().values)


def plain(s: Setting) -> None:
    """One forward and backward for 32 samples at a time."""
    s.model.zero_grad(set_to_none=True)
    for batch in s.samples.batches(size=SAMPLES):
        logits = s.model(**batch.inputs).logits
        nn.functional.cross_entropy(logits, batch.labels).backward()
    s.model.zero_grad(set_to_none=True)


def loop(s: Setting) -> None:
    """As the published code: per sample a backward, and its squares into a sum."""
    weights = [p for p in s.model.parameters() if p.requires_grad]
    sums = [torch.zeros_like(p) for p in weights]
    for batch in s.samples.batches(size=1):
        s.model.zero_grad()
        nn.functional.cross_entropy(s.model(**batch.inputs).logits, batch.labels).backward()
        for total, p in zip(sums, weights, strict=True):
            total.add_(p.grad.square())
    s.model.zero_grad()


def way(name: str, s: Setting) -> Callable[[], Any]:
    """The call that is timed."""
    if name in (PLAIN, LOOP):
        return lambda: (plain if name == PLAIN else loop)(s)
    rows = torch.arange(len(s.samples))
    if name.startswith("vmap"):
        engine: Any = VMap(s.model, TASK, s.space.names, chunk=int(name.split()[-1]))
    else:
        example = s.samples.batch([0, 1])
        engine = make_engine(s.model, TASK, s.space, example=example)
    matrix = FisherMatrix(engine, s.samples, s.space, cache_bytes=0)
    if name.startswith("vmap"):
        matrix.tokens = int(s.samples.lengths.sum())  # or the batch would cut the chunk
    return {
        "taps": matrix.marginals,
        "taps, row scores only": lambda: matrix.row_scores(rows),
        "taps, mask's entries only": lambda: matrix.row_scores(rows, s.mask),
    }.get(name, lambda: matrix.marginals(within=s.mask))


def timed(call: Callable[[], Any]) -> Time:
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Time(time.perf_counter() - wall, time.process_time() - cpu)


def summary(rounds: list[dict[str, Time]], base: str = PLAIN) -> dict[str, dict[str, float]]:
    """Medians over the rounds; ratios compare within a round."""
    found = {}
    for name in rounds[0]:
        pairs = [(r[name], r[base]) for r in rounds]
        figures = {
            "wall_ms": [1e3 * t.wall for t, _ in pairs],
            "cpu_ms": [1e3 * t.cpu for t, _ in pairs],
            "wall_ratio": [t.wall / b.wall for t, b in pairs],
            "cpu_ratio": [t.cpu / b.cpu for t, b in pairs],
        }
        found[name] = {key: round(statistics.median(v), 4) for key, v in figures.items()}
    return found


def compare(tokens: int, *, embeddings: bool, rounds: int) -> dict[str, Any]:
    """All ways on samples of one length."""
    s = setting(tokens, embeddings=embeddings)
    names = WITH_EMBEDDINGS if embeddings else list(WAYS)
    calls = {name: way(name, s) for name in names}
    for call in calls.values():
        call()
    found = summary([{n: timed(c) for n, c in calls.items()} for _ in range(rounds)])
    return {"tokens": tokens, "embeddings": embeddings, "candidates": s.space.numel, "ways": found}


# --- peak memory, one process for each way -------------------------------------------------------


def peaks(tokens: int, *, embeddings: bool, threads: int) -> dict[str, dict[str, float]]:
    """Memory on top of the loaded model, and its ratio to the plain pass's."""
    found = {}
    for name in WITH_EMBEDDINGS if embeddings else WAYS:
        arguments = ["--peak", name, "--lengths", str(tokens), "--threads", str(threads)]
        command = [sys.executable, __file__, *arguments, *["--embeddings"] * embeddings]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return {n: {"mb": round(p, 1), "ratio": round(p / found[PLAIN], 3)} for n, p in found.items()}


def peak(name: str, tokens: int, *, embeddings: bool) -> float:
    """MB that one way needs on top of what is resident before it, its engine's check included."""
    s = setting(tokens, embeddings=embeddings)
    small = setting(8, embeddings=False, count=2)
    way(PLAIN, small)()  # what libraries allocate once belongs to no way
    del small
    return peak_of(way(name, s))


# --- a whole search, and the selection -----------------------------------------------------------


def search(moves: tuple[Any, ...], s: Setting, *, cache_bytes: int) -> float:
    """The Fisher work and the selections of a search that always takes `both`; passes needed."""
    engine = make_engine(s.model, TASK, s.space, example=s.samples.batch([0, 1]))
    matrix = FisherMatrix(engine, s.samples, s.space, cache_bytes=cache_bytes)
    budget = int(DENSITY * s.space.numel)
    ranges = Ranges.geometric(
        len(s.samples), s.space.numel, min_samples=4, budget=budget, rounds=SEARCH_ROUNDS
    )
    selector, pair = Selector(Budgets.of(s.space)), Pair(torch.arange(len(s.samples)))
    for _ in range(SEARCH_ROUNDS):
        found = narrowed(matrix, selector, pair, ranges, moves)
        nominated = {move: narrower for move, narrower, _ in found}
        pair = nominated["both"]
    return matrix.passes


def whole_search(*, rounds: int) -> dict[str, Any]:
    """Searches in units of a plain pass over the pool, by what is kept."""
    s = setting(SEARCH_TOKENS, embeddings=False, count=SEARCH_ROWS)
    walk = ("both", "columns", "rows")
    calls = {
        PLAIN: lambda: plain(s),
        "ladder": lambda: search(("both",), s, cache_bytes=2 * 2**30),
        "ladder, nothing kept": lambda: search(("both",), s, cache_bytes=0),
        "walk": lambda: search(walk, s, cache_bytes=2 * 2**30),
    }
    calls[PLAIN]()
    found = summary([{n: timed(c) for n, c in calls.items()} for _ in range(rounds)])
    return {
        "rows": SEARCH_ROWS,
        "tokens": SEARCH_TOKENS,
        "rounds": SEARCH_ROUNDS,
        "self_check_included": True,
        "ways": found,
    }


def selection(*, rounds: int) -> dict[str, Any]:
    """The exact top 0.5% of 110 million scores, and memory on top of them."""
    scores = torch.rand(SCORES, generator=torch.Generator().manual_seed(0)).pow_(8)
    k = int(DENSITY * SCORES)
    calls = {"torch.topk": lambda: torch.topk(scores, k), "top_k": lambda: top_k(scores, k)}
    extra = {}
    for name in ("top_k", "torch.topk"):  # the modest one first: it must not find freed memory
        extra[name] = {"extra_mb": round(peak_of(calls[name]), 1)}
    times = [{n: timed(c) for n, c in calls.items()} for _ in range(rounds)]
    found = {n: {**t, **extra[n]} for n, t in summary(times, base="torch.topk").items()}
    return {"scores": SCORES, "k": k, "ways": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of each setting")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128], help="tokens")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--peak", choices=list(WAYS), help="only print one way's peak memory, MB")
    parser.add_argument("--embeddings", action="store_true", help="embeddings too, with --peak")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak(options.peak, options.lengths[0], embeddings=options.embeddings))
        return
    settings = []
    for embeddings in (False, True):
        for tokens in options.lengths:
            one = compare(tokens, embeddings=embeddings, rounds=options.rounds)
            memory = peaks(tokens, embeddings=embeddings, threads=options.threads)
            for name, figures in memory.items():
                one["ways"][name] |= {f"peak_{key}": value for key, value in figures.items()}
            settings.append(one)
            show(f"T={tokens}, {one['candidates']:,} candidates", one["ways"])
    selected, searched = selection(rounds=options.rounds), whole_search(rounds=options.rounds)
    show("four halving rounds, 64 rows", searched["ways"])
    show("top 0.5% of 110M scores", selected["ways"])
    result = {
        "model": "BERT, MiniLM-L6 shape",
        "samples": SAMPLES,
        "mask_density": DENSITY,
        "rounds": options.rounds,
        "settings": settings,
        "search": searched,
        "selection": selected,
    }
    print(f"written to {write_result('fisher', result, options.output)}")


def show(title: str, ways: dict[str, dict[str, float]]) -> None:
    """One setting as a table."""
    print(title, flush=True)
    for name, t in ways.items():
        peak_mb = f"; peak {t['peak_mb']:7.1f} MB × {t['peak_ratio']}" if "peak_mb" in t else ""
        extra = f"; extra {t['extra_mb']} MB" if "extra_mb" in t else ""
        print(
            f"  {name:34} {t['cpu_ms']:9.1f} ms CPU; × {t['cpu_ratio']:.3f} CPU, "
            f"{t['wall_ratio']:.3f} wall{peak_mb}{extra}",
            flush=True,
        )


if __name__ == "__main__":
    main()
