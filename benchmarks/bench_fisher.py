"""What the Fisher information of every parameter and every sample costs.

    python -m benchmarks.bench_fisher --threads 1 --rounds 3 --lengths 32 64 128
    python -m benchmarks.bench_fisher --model llama-1b --rounds 1 --also

Models of three shapes with random weights: MiniLM's, BERT-base's, and a Llama's of a thousand
million parameters; samples of T tokens, fewer of them for larger models. The unit is one plain
forward and backward over the same samples in one batch. All ways run once a round, one behind the
other, so that a busy machine slows all of them alike; ratios are medians of the ratios within a
round. CPU time is the fairer one on a shared machine. The loop is what the published code of FISH
Mask does: a batch of one, a backward, its squares added to a sum; it gives no row scores. Opacus
forms every sample's gradient of a batch.

Before a way is timed it runs for its peak memory, on top of the loaded model: with what the
allocator holds for later here, and what is needed at once in a process of its own (`peaks`). Its
answers are compared with those of plain autograd, sample by sample.

Then the Fisher work of a whole search (four halving rounds on 64 rows), which must choose the same
samples and parameters whatever computes it, and the exact top k of 110 million scores beside
`torch.topk`. A run replaces the results of the models that it measured, and keeps the others'.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.record import RESULTS, peak_of, write_result
from benchmarks.ways import (
    DENSITY,
    MODELS,
    PLAIN,
    TASK,
    Answers,
    Setting,
    Shape,
    all_ways,
    answers,
    error,
    minilm,
    plain,
    reference,
    setting,
)
from ird_search.budgets import Budgets
from ird_search.environment import environment
from ird_search.fisher import TOLERANCE, Engine, FisherMatrix, Loop, make_engine
from ird_search.moves import narrowed
from ird_search.pair import Pair, Ranges
from ird_search.selection import top_k
from ird_search.selector import Selector

GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""With this in the environment, memory of a megabyte and more is given back once it is freed."""

SEARCH_ROWS, SEARCH_TOKENS, SEARCH_ROUNDS = 64, 64, 4
SCORES = 110_000_000


class Time(NamedTuple):
    """Seconds on the wall and of the CPU."""

    wall: float
    cpu: float


# --- time and memory -----------------------------------------------------------------------------


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


def tried(name: str, call: Callable[[], Any], s: Setting, true: Answers) -> dict[str, float]:
    """The resident peak of a way in MB, and how far its answers are off.

    Raises:
        SystemExit: they are wrong.
    """
    found: list[Any] = []
    figures = {"held_mb": round(peak_of(lambda: found.append(call())), 1)}
    if name == PLAIN:
        return figures
    figures["error"] = float(f"{error(answers(name, found.pop(), s), true, s.space):.1e}")
    if not figures["error"] <= TOLERANCE:
        raise SystemExit(f"{name!r} is off plain autograd by {figures['error']:.1e}.")
    return figures


def peaks(key: str, lengths: list[int], *, embeddings: bool) -> dict[str, dict[str, float]]:
    """What ways need at once, in MB by length and way, measured in a process that gives back."""
    command = [sys.executable, "-m", "benchmarks.peaks", key, "--lengths", *map(str, lengths)]
    done = subprocess.run(
        [*command, "--embeddings"] if embeddings else command,
        env={**os.environ, **GIVES_BACK},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout))


def compare(
    shape: Shape,
    model: nn.Module,
    tokens: int,
    needed: Mapping[str, float],
    *,
    embeddings: bool,
    rounds: int,
) -> dict[str, Any]:
    """All ways on samples of one length, beside what they need at once in MB."""
    s = setting(model, tokens, embeddings=embeddings, count=shape.samples)
    ways, true = all_ways(s, shape, embeddings=embeddings), reference(s)
    once = {name: tried(name, call, s, true) for name, call in ways.items()}
    del true
    found = summary([{n: timed(c) for n, c in ways.items()} for _ in range(rounds)])
    for name, figures in once.items():
        found[name] |= {
            **figures,
            "held_ratio": round(figures["held_mb"] / once[PLAIN]["held_mb"], 3),
            "peak_mb": needed[name],
            "peak_ratio": round(needed[name] / needed[PLAIN], 3),
        }
    return {"tokens": tokens, "embeddings": embeddings, "candidates": s.space.numel, "ways": found}


def measured(
    key: str, lengths: list[int], *, embeddings: bool, rounds: int
) -> Iterator[dict[str, Any]]:
    """The results of one model, after each of its settings."""
    shape, choices = MODELS[key], (False, True) if embeddings else (False,)
    needed = {tables: peaks(key, lengths, embeddings=tables) for tables in choices}
    model, settings = shape.model(), list[dict[str, Any]]()
    for tables, tokens in product(choices, lengths):
        mb = needed[tables][str(tokens)]
        one = compare(shape, model, tokens, mb, embeddings=tables, rounds=rounds)
        show(f"{shape.title}, T={tokens}, {one['candidates']:,} candidates", one["ways"])
        settings.append(one)
        yield {
            "model": shape.title,
            "parameters": sum(p.numel() for p in model.parameters()),
            "samples": shape.samples,
            "rounds": rounds,
            "settings": settings,
            "environment": environment(),
        }


# --- a whole search, and the selection -----------------------------------------------------------


def search(
    moves: tuple[Any, ...], s: Setting, *, cache_bytes: int, engine: Engine | None = None
) -> Pair:
    """The Fisher work and the selections of a search that always takes `both`: where it ends."""
    engine = engine or make_engine(s.model, TASK, s.space, example=s.samples.batch([0, 1]))
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
    return pair


def whole_search(*, rounds: int) -> dict[str, Any]:
    """Searches in units of a plain pass over the pool, by what computes and what is kept.

    Raises:
        SystemExit: they do not choose the same.
    """
    s = setting(minilm(), SEARCH_TOKENS, embeddings=False, count=SEARCH_ROWS)
    walk, by_loop = ("both", "columns", "rows"), Loop(s.model, TASK, s.space.names)
    searches = {
        "ladder": lambda: search(("both",), s, cache_bytes=2 * 2**30),
        "ladder, nothing kept": lambda: search(("both",), s, cache_bytes=0),
        "ladder, batch of one": lambda: search(("both",), s, cache_bytes=0, engine=by_loop),
        "walk": lambda: search(walk, s, cache_bytes=2 * 2**30),
    }
    pairs = {name: call() for name, call in searches.items()}
    for name, pair in pairs.items():
        if not same(pair, pairs["ladder, batch of one"]):
            raise SystemExit(f"{name!r} chooses others than the loop.")
    calls = {PLAIN: lambda: plain(s, MODELS["minilm"].samples), **searches}
    calls[PLAIN]()
    found = summary([{n: timed(c) for n, c in calls.items()} for _ in range(rounds)])
    return {
        "rows": SEARCH_ROWS,
        "tokens": SEARCH_TOKENS,
        "rounds": SEARCH_ROUNDS,
        "self_check_included": True,
        "all_choose_the_same": True,
        "ways": found,
    }


def same(ours: Pair, theirs: Pair) -> bool:
    """Whether two searches end at the same samples and the same parameters."""
    return torch.equal(ours.rows, theirs.rows) and torch.equal(ours.columns, theirs.columns)


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


EXTRA = {"search": whole_search, "selection": selection}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--also", nargs="*", choices=list(EXTRA), default=list(EXTRA))
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds of each setting")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128], help="tokens")
    parser.add_argument("--embeddings", action="store_true", help="their tables as candidates, too")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = {"mask_density": DENSITY, "models": {}} | kept(options.output / "fisher.json")
    for name in options.model:
        wanted = {"embeddings": options.embeddings, "rounds": options.rounds}
        for one in measured(name, options.lengths, **wanted):
            result["models"][name] = one
            write_result("fisher", result, options.output)
    for name in options.also:
        result[name] = EXTRA[name](rounds=options.rounds)
        show(name, result[name]["ways"])
    print(f"written to {write_result('fisher', result, options.output)}")


def kept(path: Path) -> dict[str, Any]:
    """The results of earlier runs."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


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
