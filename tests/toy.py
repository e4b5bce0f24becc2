"""A problem small enough for many searches: 80 rows of 4 numbers, a network of 40 candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ird_search.budgets import Budgets
from ird_search.candidate import Candidate, ProxyScore, Trial
from ird_search.config import DataConfig, SearchConfig
from ird_search.fisher import Moments
from ird_search.ledger import Ledger
from ird_search.mask import SparseMask
from ird_search.moves import Move, Nomination, descended, narrowed, read
from ird_search.pair import Pair, Ranges
from ird_search.parameters import ParameterSpace
from ird_search.problem import Problem, make_problem
from ird_search.proxy import Proxies
from ird_search.selector import Selector

QUICK: dict[str, Any] = {
    "density": 0.25,
    "pool": 16,
    "min_samples": 4,
    "rounds": 2,
    "warmup_steps": 3,
    "proxy_steps": 3,
    "batch_size": 8,
    "learning_rate": 0.01,
    "seeds": 2,
    "controls": ("random", "fish", "full", "head"),
    "bootstraps": 4,
    "device": "cpu",
}
"""Settings of a search that takes a moment."""

OPTIONS = {
    "density": "0.02",
    "pool": "16",
    "min-samples": "4",
    "rounds": "2",
    "warmup-steps": "1",
    "proxy-steps": "1",
    "batch-size": "8",
    "learning-rate": "0.01",
    "seeds": "1",
    "controls": "random",
    "vary": "criterion",
    "bootstraps": "2",
    "device": "cpu",
}
"""The command line's options of a search of a tiny transformer."""


def toy_net(seed: int = 0) -> nn.Sequential:
    """4 → 8 → 2, the last layer being the head."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def toy_rows(count: int = 80, seed: int = 0) -> list[tuple[Tensor, int]]:
    """(x, whether the first two numbers have one sign)."""
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return [(row, int(row[0] * row[1] > 0)) for row in x]


def toy_problem(
    model: nn.Module | None = None, config: SearchConfig | None = None, **settings: Any
) -> tuple[Problem, SearchConfig]:
    """A problem and the settings it was made with."""
    config = config or SearchConfig(**{**QUICK, **settings})
    model = toy_net() if model is None else model
    return make_problem(model, toy_rows(), options=DataConfig(), config=config), config


def toy_proxies(
    model: nn.Module | None = None, directory: Path | None = None, **settings: Any
) -> Proxies:
    """Proxies on the toy problem, with an empty ledger."""
    problem, config = toy_problem(model, **settings)
    return Proxies(problem, config, Ledger(directory))


def toy_mask(problem: Problem, *coords: int) -> SparseMask:
    """A mask by its coordinates."""
    return SparseMask(problem.space, torch.tensor(coords, dtype=torch.int64))


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Copies of everything a model holds."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same_bits(before: dict[str, Tensor], model: nn.Module) -> bool:
    """Whether a model still holds what it held."""
    now = model.state_dict()
    return before.keys() == now.keys() and all(torch.equal(before[n], now[n]) for n in before)


def scored(score: float, *, rate: float = 0.01, failure: str = "") -> ProxyScore:
    """What a proxy would answer, written by hand."""
    trial = Trial(rate, 0, score, score, {"accuracy": 0.5}, 0.0, failure)
    return ProxyScore(trial, (trial,))


class DenseFisher:
    """F as an explicit matrix, answering what a search asks of a `FisherMatrix`.

    Args:
        values: F.
        signs: of the gradients; all positive where left out.
    """

    def __init__(self, values: Tensor, signs: Tensor | None = None) -> None:
        self.values = values
        self.signs = torch.ones_like(values) if signs is None else signs
        self.space = ParameterSpace(("w",), ((values.shape[1],),))

    def row_scores(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        part = self.values[rows] if columns is None else self.values[rows][:, columns]
        return part.double().sum(1)

    def column_scores(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        return self.column_moments(rows, columns).square

    def column_moments(
        self, rows: Tensor, columns: Tensor | None = None, *, mean: bool = True
    ) -> Moments:
        at = slice(None) if columns is None else columns
        gradients = self.values[rows].sqrt() * self.signs[rows]
        return Moments(self.values[rows][:, at].mean(0), gradients[:, at].mean(0) if mean else None)


class Direct:
    """`Narrowings` without a ledger."""

    def __init__(self, fisher: Any, selector: Selector | None = None) -> None:
        self.fisher = fisher
        self.selector = selector or Selector(Budgets.of(fisher.space, ()))

    def narrowed(self, pair: Pair, ranges: Ranges, moves: tuple[Move, ...]) -> list[Nomination]:
        return list(narrowed(self.fisher, self.selector, pair, ranges, moves))

    def read(self, pair: Pair, k: int, move: str) -> list[Nomination]:
        return list(read(self.fisher, self.selector, pair, k, move))

    def descended(self, rows: tuple[int, ...], columns: tuple[int, ...]) -> Tensor:
        return descended(self.fisher, self.selector, rows, columns)


class Script:
    """A judge that answers with hand-written numbers, and remembers what it was asked.

    Args:
        answer: a candidate's score from its mask's coordinates, or a reason why there is none.
    """

    def __init__(self, answer: Callable[[list[int]], float | str], rate: float = 0.01) -> None:
        self.answer, self.rate = answer, rate
        self.asked: list[Candidate] = []

    def __call__(self, candidates: Sequence[Candidate]) -> list[ProxyScore]:
        return [self._score(candidate) for candidate in candidates]

    def _score(self, candidate: Candidate) -> ProxyScore:
        self.asked.append(candidate)
        found = self.answer(candidate.mask.coords.tolist())
        if isinstance(found, str):
            return scored(0.0, rate=self.rate, failure=found)
        return scored(found, rate=self.rate)


def with_everything() -> nn.Sequential:
    """Dropout draws numbers, BatchNorm has buffers, and one module is in a mode of its own.

    Candidates: 0-31, 32-39 the first layer, 40-55 BatchNorm, 56-127 the second layer.
    """
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 8),
        nn.BatchNorm1d(8),
        nn.Dropout(0.3),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 2),
    )
    net[3].eval()
    return net


def toy_candidates(proxies: Proxies) -> list[Candidate]:
    masks = [toy_mask(proxies.problem, *coords) for coords in ((0, 5, 9), (1, 2), (30, 33))]
    return [Candidate("ird", mask) for mask in masks]
