"""The memory that ways of `bench_fisher` need at once, as JSON: MB for each length and way.

    MALLOC_MMAP_THRESHOLD_=1048576 python -m benchmarks.peaks minilm --lengths 32 64 128

By default glibc holds what was freed for later, so that a resident peak says what was needed and
what lay idle. With this in its environment a process gives tensors of a megabyte and more back.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from benchmarks.record import peak_of
from benchmarks.ways import MODELS, all_ways, setting


def peaks(name: str, lengths: list[int], *, embeddings: bool) -> dict[int, dict[str, float]]:
    """Each way runs once before, so that nothing is set up meanwhile."""
    shape = MODELS[name]
    model, found = shape.model(), dict[int, dict[str, float]]()
    for tokens in lengths:
        found[tokens] = {}
        s = setting(model, tokens, embeddings=embeddings, count=shape.samples)
        for way, call in all_ways(s, shape, embeddings=embeddings).items():
            call()
            found[tokens][way] = round(peak_of(call), 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128], help="tokens")
    parser.add_argument("--embeddings", action="store_true", help="their tables as candidates, too")
    options: Any = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(peaks(options.model, options.lengths, embeddings=options.embeddings)))


if __name__ == "__main__":
    main()
