"""The methods: each a function from a bench and a number of parameters to what is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, get_args

import torch

from benchmarks.glue.bench import Bench, read
from benchmarks.glue.judging import Cost, Entrant
from ird_search.candidate import Candidate
from ird_search.config import Part, Strategy
from ird_search.consumers.peft.control import lora_of_size
from ird_search.controls import magnitude_mask, random_mask, shuffled
from ird_search.errors import UsageError
from ird_search.mask import SparseMask
from ird_search.pair import Ranges
from ird_search.reading import Reading, all_readings
from ird_search.search import SearchState, search
from ird_search.strategies import make_strategy

Method = Callable[[Bench, int], Entrant]


def fixed(candidate: Candidate) -> Entrant:
    """The same candidate for each seed."""
    return Entrant(lambda s: candidate)


def random(bench: Bench, k: int) -> Entrant:
    """As many entries, each as likely as any other."""
    space, seed = bench.problem.space, bench.config.seed
    return Entrant(lambda s: Candidate("random", random_mask(space, k, seed, s)))


def fish(bench: Bench, k: int, *, rows: int | None = None) -> Entrant:
    """FISH Mask: the largest mean squares over random training rows."""
    n = rows or len(bench.pool)
    return Entrant(lambda s: Candidate("fish", bench.standard.fish(bench.random_rows(n, s), k), n))


def magnitude(bench: Bench, k: int) -> Entrant:
    """The largest weights."""
    budgets = bench.standard.selector.budgets
    return fixed(Candidate("magnitude", magnitude_mask(bench.problem.model, budgets, k)))


def reversed_fisher(bench: Bench, k: int) -> Entrant:
    """The smallest mean squares above zero over the pool."""
    rows = torch.arange(len(bench.pool))
    return fixed(Candidate("reversed", bench.standard.reversed(rows, k), len(rows)))


def lora(bench: Bench, k: int) -> Entrant:
    """Low-rank adapters with as many parameters."""
    adapter = lora_of_size(bench.problem.model, bench.problem.space, k)
    return fixed(Candidate("lora", bench.proxies.head_only().mask, adapter=adapter))


def whole_pool(reading: Reading, bench: Bench, k: int) -> Entrant:
    """A reading of the whole pool."""
    rows = torch.arange(len(bench.pool))
    return fixed(Candidate("ird", read(bench.standard, rows, k, reading), len(rows)))


def of_shape(method: Method, bench: Bench, k: int) -> Entrant:
    """Random entries, as many in each tensor as another method's mask has."""
    mask, seed = method(bench, k).draw(0).mask, bench.config.seed
    return Entrant(lambda s: Candidate("shuffle", shuffled(mask, seed, s)))


def unwarmed(bench: Bench, k: int) -> Entrant:
    """The largest mean squares over the pool with the head as it came."""
    rows = torch.arange(len(bench.pool))
    mask = read(bench.narrowings(bench.pool, warm=False), rows, k, Reading())
    return fixed(Candidate("ird", mask, len(rows)))


def ruled(rules: Mapping[str, Any], reading: Reading, bench: Bench, k: int) -> Entrant:
    """A reading of the pool under other rules."""
    rows = torch.arange(len(bench.pool))
    mask = read(bench.narrowings(bench.pool, **rules), rows, k, reading)
    return fixed(Candidate("ird", mask, len(rows)))


def narrowed_rows(rules: Mapping[str, Any], reading: Reading, bench: Bench, k: int) -> Entrant:
    """A reading of a quarter of the pool: the rows with the largest r_i, by some rule."""
    narrowings = bench.narrowings(bench.pool, **rules)
    total = len(bench.pool)
    sizes = (narrowings.space.numel, k)
    rows = narrowings.descended((total, max(1, total // 4)), sizes)
    return fixed(Candidate("ird", read(narrowings, rows, k, reading), len(rows)))


def searched(strategy: Strategy, bench: Bench, k: int, **settings: Any) -> Entrant:
    """The winner of a search."""
    state = run_search(bench, strategy, k, **settings)
    assert state.best is not None
    candidate = Candidate("ird", state.best.mask, state.best.pair.rows.numel())
    cost = Cost.of_scores((s.proxy for s in state.scored), bench.proxies)
    told = {"reading": str(state.best.pair.reading), "candidates": len(state.scored)}
    return Entrant(lambda s: candidate, cost, told)


def run_search(bench: Bench, strategy: Strategy, k: int, **settings: Any) -> SearchState:
    """A search as `ird-search` does it, up to the verdict."""
    c = bench.config.replace(strategy=strategy, **settings)
    ranges = Ranges.geometric(
        len(bench.pool),
        bench.problem.space.numel,
        min_samples=min(c.min_samples, len(bench.pool)),
        budget=k,
        rounds=c.rounds,
    )
    base = Reading.of(c)
    strategy_of = make_strategy(c, bench.standard, ranges, base)
    return search(strategy_of, bench.proxies.scores, ranges)


def full(bench: Bench, k: int) -> Entrant:
    """Everything."""
    return fixed(bench.proxies.full())


def head(bench: Bench, k: int) -> Entrant:
    """The head alone."""
    return fixed(bench.proxies.head_only())


def bitfit(bench: Bench, k: int) -> Entrant:
    """All biases of the candidates (BitFit)."""
    space = bench.problem.space
    spans = [space.span(name) for name in space.names if name.endswith("bias")]
    coords = [torch.arange(s.start, s.stop) for s in spans] or [torch.empty(0, dtype=torch.int64)]
    return fixed(Candidate("ird", SparseMask(space, torch.cat(coords))))


PARTS: tuple[Part, ...] = get_args(Part)
SNR, PLAIN = Reading("snr"), Reading()

READINGS: Mapping[str, Method] = {
    str(reading): partial(whole_pool, reading) for reading in all_readings(PLAIN, PARTS)
}
RIVALS = ("random", "fish")
"""What every method of a density is compared with."""
SEARCHES: Mapping[str, Method] = {
    **{name: partial(searched, name) for name in ("ladder", "walk", "tpe")},
}
RULES: Mapping[str, Method] = {
    "fisher, cold head": unwarmed,
    "fisher, quarter": partial(narrowed_rows, {}, PLAIN),
    "snr, quarter": partial(narrowed_rows, {}, SNR),
    "snr, quarter, balanced": partial(narrowed_rows, {"balanced": True}, SNR),
    "snr, quarter, cap 3": partial(narrowed_rows, {"row_cap": 3.0}, SNR),
    "snr, whole rows": partial(ruled, {"granularity": "row"}, SNR),
    "snr, whole columns": partial(ruled, {"granularity": "column"}, SNR),
    "snr, blocks of 4": partial(ruled, {"granularity": "block", "block": 4}, SNR),
}
ONCE: Mapping[str, Method] = {"full": full, "head": head, "bitfit": bitfit}
"""Those whose size is their own."""

METHODS: Mapping[str, Method] = {
    "random": random,
    "fish": fish,
    "magnitude": magnitude,
    "reversed": reversed_fisher,
    "lora": lora,
    "shuffled fisher": partial(of_shape, READINGS["fisher"]),
    "shuffled snr": partial(of_shape, READINGS["snr"]),
    **READINGS,
    **SEARCHES,
    **RULES,
    **ONCE,
}
GROUPS: Mapping[str, tuple[str, ...]] = {
    "core": (
        *RIVALS,
        "magnitude",
        "reversed",
        "lora",
        "shuffled snr",
        "fisher",
        "mean",
        "snr",
        "decrease",
        "snr, skip 3",
        "fisher, skip 10",
        "walk",
        *ONCE,
    ),
    "searches": tuple(SEARCHES),
    "criteria": tuple(READINGS),
    "rules": tuple(RULES),
    "once": tuple(ONCE),
    "all": tuple(METHODS),
}


def chosen(words: list[str]) -> list[str]:
    """The methods that some names of methods and of groups stand for, each once.

    Raises:
        UsageError: a word is neither.
    """
    if unknown := [w for w in words if w not in METHODS and w not in GROUPS]:
        raise UsageError(
            f"Unknown method {w!r}. Groups: {', '.join(GROUPS)}. Methods: {'; '.join(METHODS)}."
            for w in unknown
        )
    return list(dict.fromkeys(name for w in words for name in GROUPS.get(w, (w,))))
