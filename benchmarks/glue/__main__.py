"""Judge methods on small tasks, keep every cell, and make the tables of docs/results.md."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from math import inf
from pathlib import Path

import torch

from benchmarks.glue import compared, efficiency, scales, shifted, tables
from benchmarks.glue.bench import at_work
from benchmarks.glue.cells import FOLDER, Cell, Results
from benchmarks.glue.methods import GROUPS, METHODS, chosen
from benchmarks.glue.tasks import SETTINGS, TASKS, elsewhere, make
from ird_search.config import SearchConfig
from ird_search.errors import IRDError
from ird_search.ledger import Ledger

EXPERIMENTS = ("methods", "scales", "shifted", "efficiency")
DENSITIES = (0.0002, 0.001, 0.005, 0.02)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.fill is not None:
        tables.fill(options.fill, tables.made(options.output))
    elif options.tables:
        print("\n".join(f"## {name}\n\n{t}\n" for name, t in tables.made(options.output).items()))
    elif options.experiment is None or options.task is None:
        parser.error("name an experiment and a task, or pass --tables or --fill")
    else:
        try:
            run(options)
        except IRDError as error:
            parser.error(str(error))


def run(options: argparse.Namespace) -> None:
    """One experiment on one task."""
    torch.set_num_threads(options.threads)
    names = chosen(options.methods)
    settings = {**SETTINGS[options.task], "seeds": options.seeds, "device": options.device}
    if options.proxy_steps is not None:
        settings |= {"proxy_steps": options.proxy_steps, "warmup_steps": options.proxy_steps}
    config = SearchConfig(**settings, pool=options.pool, seed=options.seed)
    at = {"data": options.data, "model": options.model}
    problem = make(options.task, config, **at)
    ledger, final = Ledger(options.ledger), options.final * config.proxy_steps
    with at_work(options.task, problem, config, ledger, final_steps=final) as bench:
        results = Results(options.output, bench, options.ledger)

        def keep(cell: Cell) -> None:
            results.put(cell)
            mean = sum(cell.losses) / len(cell.losses) if cell.losses else float("nan")
            said = "; ".join(f"{n} {g:+.4f} ± {w or inf:.4f}" for n, (g, w) in cell.over.items())
            print(f"{cell.name:60} {cell.rate:.1e}  {mean:.4f}  {said}{cell.failure}", flush=True)

        if options.experiment == "methods":
            compared.compare(bench, keep, names, options.density)
        elif options.experiment == "scales":
            scales.compare(bench, keep, options.density, options.rows, options.readings)
        elif options.experiment == "shifted":
            other = None
            if options.task in ("digits", "sst2"):
                other = elsewhere(options.task, config, **at)
            shifted.compare(bench, keep, options.density, other)
        else:
            searching = {"rounds": options.rounds, "trials": options.trials, "vary": options.vary}
            efficiency.compare(bench, keep, options.density, options.strategies, searching)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.glue", description=__doc__)
    add = parser.add_argument
    add("experiment", nargs="?", choices=EXPERIMENTS)
    add("task", nargs="?", choices=TASKS)
    add("--methods", nargs="+", default=["core"], metavar="NAME", help=_told())
    add("--density", nargs="+", type=float, default=list(DENSITIES))
    add("--rows", nargs="*", type=int, default=[], help="of scales; by default 1, 2, 4, … and all")
    readings = list(scales.READINGS)
    add("--readings", nargs="+", choices=readings, default=readings, help="of the rows of scales")
    add("--strategies", nargs="+", choices=efficiency.STRATEGIES, default=["walk", "tpe"])
    add("--rounds", type=int, default=4, help="of the searches whose cost is measured")
    add("--trials", type=int, default=40, help="of tpe and random there")
    add("--vary", nargs="*", default=["criterion", "ceiling", "skip"], help="of readings there")
    add("--seeds", type=int, default=4, help="fine-tunes whose numbers count")
    add("--seed", type=int, default=0, help="of split, pool and pretraining: another problem")
    add("--pool", type=int, help="rows that gradients are taken of; by default the search's")
    add("--proxy-steps", type=int, help="also of the head's warm-up; by default the task's")
    add("--final", type=int, default=4, help="length of the fine-tunes that count, in proxies")
    add("--data", type=Path, default=Path("data"), help="folder of glue/<task>/*.parquet")
    add("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="directory or hub id")
    add("--ledger", type=Path, default=Path("runs/glue"), help="where finished fine-tunes are")
    add("--output", type=Path, default=FOLDER, help="folder of the results")
    add("--threads", type=int, default=1, help="threads of torch")
    add("--device", default="cpu")
    add("--tables", action="store_true", help="only print the tables")
    add("--fill", type=Path, metavar="PAGE", help="only write the tables into a page")
    return parser


def _told() -> str:
    return f"groups {', '.join(GROUPS)}; or of {len(METHODS)} methods: {'; '.join(METHODS)}"


if __name__ == "__main__":
    main()
