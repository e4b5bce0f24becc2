"""Methods at some densities, each beside a random mask of the same size."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.glue.bench import Bench
from benchmarks.glue.cells import Cell, Keep
from benchmarks.glue.judging import judge
from benchmarks.glue.methods import METHODS, ONCE, RIVALS
from ird_search.errors import ModelError, UsageError


def compare(bench: Bench, keep: Keep, names: Sequence[str], densities: Sequence[float]) -> None:
    """Judge methods by name. Those with a size of their own are judged once."""
    for name in names:
        if name in ONCE:
            line = judge(bench, METHODS[name](bench, 0))
            keep(Cell.of(bench, line, experiment="methods", method=name, density=None))
    for density in densities:
        k = bench.count(density)
        asked = [name for name in RIVALS if name == "random" or name in names]
        rivals = {name: judge(bench, METHODS[name](bench, k)) for name in asked}
        for name in names:
            if name in ONCE:
                continue
            try:
                line = rivals.get(name) or judge(bench, METHODS[name](bench, k))
            except (UsageError, ModelError) as error:  # no LoRA, or no whole row, is so small
                print(f"{name} @ {density:g}: {error}", flush=True)
                continue
            others = {n: rival for n, rival in rivals.items() if n != name}
            keep(
                Cell.of(
                    bench, line, experiment="methods", method=name, density=density, rivals=others
                )
            )
