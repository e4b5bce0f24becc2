"""What some entries of a weight's per-sample gradients cost, by themselves and by way of all.

    python -m benchmarks.bench_columns

For weights of MiniLM and BERT-base on the CPU: row scores within a share of the entries, where only
these are computed (`sampled`) and where the whole product is, with the rest left out of the sums
(`whole`). Beside them stands what the rule takes (`gradients.SAMPLED`), and how much longer that is
than the shorter of the two.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.record import RESULTS, write_result
from ird_search.fisher.columns import Columns
from ird_search.fisher.gradients import Outer

WEIGHTS = ((384, 384), (1536, 384), (768, 768), (3072, 768))
TOKENS = (3, 8, 20, 32, 64, 128)
SHARES = (4, 8, 16, 32, 64, 256)
"""One entry in so many is chosen."""
SAMPLES = 8


def milliseconds(call: Callable[[], Any], rounds: int) -> float:
    """The shortest of some runs: what else runs here only ever adds to it."""
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return 1e3 * min(taken)


def one(m: int, n: int, tokens: int, share: int, rounds: int) -> dict[str, Any]:
    """Both ways on one weight."""
    outer = Outer(torch.randn(SAMPLES, tokens, m), torch.randn(SAMPLES, tokens, n))
    columns = Columns(torch.randperm(m * n)[: m * n // share].sort().values, m * n)
    taken = {}
    for way in (True, False):
        with patch.object(Outer, "sampled", lambda *_, way=way: way):
            outer.square_norms(columns)  # its pattern is made once a pass
            taken[way] = milliseconds(lambda: outer.square_norms(columns), rounds)
    chosen = outer.sampled(columns)
    return {
        "weight": [m, n],
        "tokens": tokens,
        "one in": share,
        "sampled ms": round(taken[True], 3),
        "whole ms": round(taken[False], 3),
        "rule": "sampled" if chosen else "whole",
        "rule / shorter": round(taken[chosen] / min(taken.values()), 3),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing is written")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    weights, tokens = (((16, 8),), (2,)) if options.smoke else (WEIGHTS, TOKENS)
    found = []
    for m, n in weights:
        for t in tokens:
            lines = [one(m, n, t, share, options.rounds) for share in SHARES]
            told = "  ".join(
                f"1/{x['one in']} {x['sampled ms'] / x['whole ms']:.2f}" for x in lines
            )
            print(f"{m} × {n}, {t} tokens, sampled / whole: {told}", flush=True)
            found += lines
    over = [x["rule / shorter"] for x in found]
    summary = {"median": statistics.median(over), "mean": statistics.mean(over), "most": max(over)}
    print("what the rule takes / the shorter:", {k: round(v, 2) for k, v in summary.items()})
    if not options.smoke:
        result = {"samples": SAMPLES, "rule / shorter": summary, "cells": found}
        print(f"written to {write_result('columns', result, options.output)}")


if __name__ == "__main__":
    main()
