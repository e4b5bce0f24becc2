"""Strategies: which (samples, parameters) pairs the proxies judge, and in what order.

One file each, all functions of the state of a search (see `search.Strategy`), all asking F through
the same `Narrowings` and judged by the same proxies.
"""

from __future__ import annotations

from ird_search.config import SearchConfig
from ird_search.narrowing import Narrowings
from ird_search.pair import Ranges
from ird_search.reading import Reading
from ird_search.search import Strategy
from ird_search.strategies.fish import Fish
from ird_search.strategies.grid import Grid
from ird_search.strategies.ladder import Ladder
from ird_search.strategies.points import Points
from ird_search.strategies.random import Random
from ird_search.strategies.tpe import TPE
from ird_search.strategies.walk import Walk

__all__ = ["TPE", "Fish", "Grid", "Ladder", "Points", "Random", "Walk", "make_strategy"]


def make_strategy(
    config: SearchConfig, narrowings: Narrowings, ranges: Ranges, base: Reading
) -> Strategy:
    """The strategy that the settings name.

    Args:
        base: how masks are read off the gradients at first.
    """
    points = Points(narrowings, ranges, base, config.varied)
    match config.strategy:
        case "walk":
            return Walk(narrowings, base, vary=config.varied, patience=config.patience)
        case "ladder":
            return Ladder(narrowings, base, patience=config.patience)
        case "grid":
            return Grid(points)
        case "tpe":
            return TPE(points, trials=config.trials, seed=config.seed)
        case "random":
            return Random(points, trials=config.trials, seed=config.seed)
        case "fish":
            return Fish(narrowings, seed=config.seed)
