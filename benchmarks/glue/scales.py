"""IRD's rows beside as many random ones, at every number of rows and every density.

The fine-tunes that count are as short as proxies: there are many scales.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.glue.bench import Bench, descended, read
from benchmarks.glue.cells import Cell, Keep
from benchmarks.glue.judging import Entrant, judge
from benchmarks.glue.methods import PLAIN, SNR, fixed
from ird_search.candidate import Candidate
from ird_search.errors import UsageError
from ird_search.reading import Reading

SNR_ROWS = 8
"""The fewest rows whose signs say something."""

READINGS = {str(reading): reading for reading in (PLAIN, SNR)}


def compare(
    bench: Bench,
    keep: Keep,
    densities: Sequence[float],
    rows: Sequence[int],
    readings: Sequence[str],
) -> None:
    """Some scales, or all where no rows are named, by some readings of the rows.

    Raises:
        UsageError: there are no such scales.
    """
    total = len(bench.pool)
    if wrong := [n for n in rows if not 0 < n <= total]:
        raise UsageError(f"The pool has {total:,} rows: scales have 1 to so many, not {wrong}.")
    if rows and max(rows) < SNR_ROWS and str(PLAIN) not in readings:
        raise UsageError(f"Fewer than {SNR_ROWS} rows are read by {PLAIN} only.")
    for density in densities:
        for n in rows or sizes(len(bench.pool)):
            for name in readings:
                if n >= SNR_ROWS or name == str(PLAIN):
                    _compare(bench, keep, density, n, READINGS[name])


def sizes(total: int) -> list[int]:
    """1, 2, 4, … rows, and at last all."""
    return sorted({*(2**i for i in range(total.bit_length()) if 2**i <= total), total})


def _compare(bench: Bench, keep: Keep, density: float, n: int, reading: Reading) -> None:
    k, steps = bench.count(density), bench.proxies.steps
    theirs = judge(bench, random_rows(bench, k, n, reading), steps=steps)
    ours = judge(bench, ird_rows(bench, k, n, reading), steps=steps)
    for name, line, rivals in (("fish", theirs, {}), ("ird", ours, {"fish": theirs})):
        keep(
            Cell.of(
                bench,
                line,
                experiment="scales",
                method=name,
                density=density,
                steps=steps,
                setting={"reading": str(reading), "rows": n},
                rivals=rivals,
            )
        )


def ird_rows(bench: Bench, k: int, n: int, reading: Reading) -> Entrant:
    """A reading of the n rows that iterative range decreasing comes to."""
    rows = descended(bench.standard, len(bench.pool), n, k)
    return fixed(Candidate("ird", read(bench.standard, rows, k, reading), n))


def random_rows(bench: Bench, k: int, n: int, reading: Reading) -> Entrant:
    """A reading of n random training rows, others for each seed."""

    def draw(s: int) -> Candidate:
        samples = bench.random_rows(n, s)
        mask = read(bench.narrowings(samples), torch.arange(n), k, reading)
        return Candidate("fish", mask, n)

    return Entrant(draw)
