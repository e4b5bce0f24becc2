"""Which path each family of models takes, how far it is off the loop, and what it costs.

    python -m benchmarks.bench_models --rounds 7
    python -m benchmarks.bench_models --rounds 7 --only adapters

The small models of `tests/models.py`. The error is the larger one of both marginals, ‖found − true‖
/ ‖true‖, against plain autograd over one unpadded sample at a time. The unit of time is one plain
forward and backward over the same samples in one padded batch, with gradients of all candidates;
CPU time, medians of the ratios within a round, as in `bench_fisher.py`. The second table has
adapters on a BERT of MiniLM's shape, where only what they add is a candidate. Both go into
`docs/models.md`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.glue.tables import fill, filled
from benchmarks.record import RESULTS, write_result
from ird_search.fisher import Engine, FallbackWarning, FisherMatrix, Loop, make_engine
from ird_search.samples import SampleSet
from ird_search.task import Classification, logits_of
from tests.cases import Case, Problem, made, problem
from tests.models import MODELS, OF_BERT, SHAPE, added, build, ia3, lora
from tests.reference import fisher, relative_error

__all__ = ["RESULTS", "fill", "filled", "measured", "tables"]

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
COPIES = 4
"""Each sample stands so many times in what is timed."""
NAMED = 4
"""Kinds of tensors that are named in the table where vmap computes some of them."""


MINILM = SHAPE | {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
}
ROWS, TOKENS = 16, 64


def minilm() -> Problem:
    """Random weights in MiniLM's shape, and texts without a padding."""
    ids = torch.randint(5, MINILM["vocab_size"], (ROWS, TOKENS))
    inputs = tuple({"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids)
    samples = SampleSet(inputs, torch.arange(ROWS) % 3, torch.arange(ROWS))
    model = build("BertForSequenceClassification", MINILM, "sdpa")
    return problem(model, Classification(3), samples)


ADAPTERS = (
    Case("LoRA", "rank 2", lambda: added(minilm, lambda: lora(**OF_BERT))),
    Case("DoRA", "rank 2", lambda: added(minilm, lambda: lora(use_dora=True, **OF_BERT))),
    Case(
        "IA³",
        "a factor for every feature",
        lambda: added(minilm, lambda: ia3(["query", "value"], [])),
    ),
)
"""All on the queries and values of every layer."""


def of_adapter(case: Case, *, rounds: int) -> dict[str, Any]:
    """One row of the second table: the path that is taken, beside vmap and the loop."""
    p = made(case)
    engines = {m: opened(p, m) for m in ("auto", "vmap", "loop")}
    passes = {
        m: FisherMatrix(engine, p.samples, p.space, cache_bytes=0).marginals
        for m, engine in engines.items()
    }
    ratios = compared({"plain": lambda: plain(p, p.samples), **passes}, rounds=rounds)
    return {
        "adapter": case.name,
        "parameters": p.space.numel,
        "path": engines["auto"].path,
        "cpu_ratio": round(ratios["auto"], 2),
        "vmap_cpu_ratio": round(ratios["vmap"], 2),
        "loop_cpu_ratio": round(ratios["loop"], 2),
    }


def opened(p: Problem, method: str = "auto") -> Engine:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)  # the table says it
        example = p.samples.batch(range(6))
        return make_engine(p.model, p.task, p.space, example=example, method=method)


def measured(case: Case, *, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    p = made(case)
    engine = opened(p)
    matrix = FisherMatrix(engine, p.samples, p.space, cache_bytes=0)
    found, truth = matrix.marginals(), fisher(p.model, p.task, p.samples, p.space)
    errors = (
        relative_error(found.columns, truth.mean(0)),
        relative_error(found.rows, truth.sum(1)),
    )
    many = p.samples.select(list(range(len(p.samples))) * COPIES)
    loop = Loop(p.model, p.task, p.space.names)
    ratios = compared(
        {
            "plain": lambda: plain(p, many),
            "ours": FisherMatrix(engine, many, p.space, cache_bytes=0).marginals,
            "loop": FisherMatrix(loop, many, p.space, cache_bytes=0).marginals,
        },
        rounds=rounds,
    )
    rest = getattr(engine, "rest", None)
    return {
        "model": case.name,
        "reason": case.reason,
        "parameters": p.space.numel,
        "path": engine.path,
        "by_vmap": kinds(rest.names) if rest else [],
        "error": float(f"{max(errors):.1e}"),
        "cpu_ratio": round(ratios["ours"], 2),
        "loop_cpu_ratio": round(ratios["loop"], 2),
    }


def plain(p: Problem, samples: SampleSet) -> None:
    """One batched forward and backward to the candidates."""
    batch = samples.batch(range(len(samples)))
    wanted = dict(p.model.named_parameters())
    value = p.task.log_likelihood(logits_of(p.model, batch.inputs), batch.labels).sum()
    torch.autograd.grad(value, [wanted[n] for n in p.space.names], allow_unused=True)


def compared(calls: Mapping[str, Callable[[], Any]], *, rounds: int) -> dict[str, float]:
    """Medians of the CPU times within a round, in units of the first call's."""
    for call in calls.values():
        call()
    base = next(iter(calls))
    times = [{name: cpu_time(call) for name, call in calls.items()} for _ in range(rounds)]
    return {name: statistics.median(t[name] / t[base] for t in times) for name in calls}


def cpu_time(call: Callable[[], Any]) -> float:
    gc.collect()
    start = time.process_time()
    call()
    return time.process_time() - start


def kinds(names: tuple[str, ...]) -> list[str]:
    """The ends of tensors' names, each once."""
    return sorted({".".join(name.split(".")[-2:]) for name in names})


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """The tables of the page, by their markers' names."""
    titles = ["model", "here for", "path", "of these vmap", "error", "time", "the loop's time"]
    lines = [titles, ["---"] * 4 + ["---:"] * 3, *map(_line, result["models"])]
    titles = ["adapter", "parameters", "path", "time", "by vmap", "the loop's time"]
    more = [titles, ["---", "---:", "---"] + ["---:"] * 3, *map(_adapter, result["adapters"])]
    return {
        name: "\n".join(f"| {' | '.join(line)} |" for line in table)
        for name, table in (("models", lines), ("adapters", more))
    }


def _adapter(row: Mapping[str, Any]) -> list[str]:
    times = [f"{row[key]:.2f}" for key in ("cpu_ratio", "vmap_cpu_ratio", "loop_cpu_ratio")]
    return [row["adapter"], f"{row['parameters']:,}", row["path"], *times]


def _line(row: Mapping[str, Any]) -> list[str]:
    named = ", ".join(f"`{kind}`" for kind in row["by_vmap"][:NAMED])
    more = len(row["by_vmap"]) - NAMED
    times = [f"{row['cpu_ratio']:.1f}", f"{row['loop_cpu_ratio']:.1f}"]
    vmapped = f"{named} and {more} more" if more > 0 else named
    return [row["model"], row["reason"], row["path"], vmapped, f"{row['error']:.0e}", *times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds of each model")
    parser.add_argument("--only", choices=("models", "adapters"), help="keep the other table")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--page", type=Path, default=PAGE, help="page that holds the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = json.loads((options.output / "models.json").read_text()) if options.only else {}
    gc.freeze()  # what the imports made is not looked through before every call
    for name, cases, one in (("models", MODELS, measured), ("adapters", ADAPTERS, of_adapter)):
        if options.only in (None, name):
            found[name] = []
            for case in cases:
                found[name].append(one(case, rounds=options.rounds))
                print("  ".join(f"{x}" for x in found[name][-1].values()), flush=True)
    samples = COPIES * len(made(MODELS[0]).samples)
    result = {
        "samples": samples,
        "rounds": options.rounds,
        **{name: found[name] for name in ("models", "adapters")},
    }
    print(f"written to {write_result('models', result, options.output)}")
    fill(options.page, tables(result))


if __name__ == "__main__":
    main()
