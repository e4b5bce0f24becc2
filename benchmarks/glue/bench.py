"""`Bench`: one task, warmed up, with everything that methods are made of and judged by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ird_search.borrow import borrowed
from ird_search.budgets import Budgets
from ird_search.config import SearchConfig
from ird_search.errors import UsageError
from ird_search.fisher import FisherMatrix, LabelRule
from ird_search.ledger import Ledger
from ird_search.mask import SparseMask
from ird_search.narrowing import Narrowings
from ird_search.opening import open_fisher
from ird_search.pair import Pair
from ird_search.problem import Problem
from ird_search.proxy import Proxies
from ird_search.reading import Reading
from ird_search.samples import SampleSet
from ird_search.scoring import ScoringPoint
from ird_search.seeds import derive
from ird_search.selection import decreasing_range, random_subset
from ird_search.selector import Selector
from ird_search.training import Snapshot, snapshot


@dataclass(frozen=True, eq=False)
class Bench:
    """A task at work.

    Args:
        proxies: with the head warmed up.
        cold: the head as it was before.
        final_steps: of the fine-tunes whose numbers count.
    """

    task: str
    problem: Problem
    config: SearchConfig
    ledger: Ledger
    proxies: Proxies
    cold: Snapshot
    final_steps: int

    @cached_property
    def pool(self) -> SampleSet:
        """The rows that gradients are taken of, as a search draws them."""
        c, train = self.config, self.problem.train
        return train.select(
            random_subset(len(train), c.rows(len(train)), seed=derive(c.seed, "pool"))
        )

    @cached_property
    def standard(self) -> Narrowings:
        """F over the pool, read by the search's plain rules."""
        return self.narrowings(self.pool)

    def count(self, density: float) -> int:
        """Parameters of a mask."""
        return self.config.replace(density=density).budget(self.problem.space.numel)

    def narrowings(self, samples: SampleSet, *, warm: bool = True, **rules: Any) -> Narrowings:
        """F over some samples.

        Args:
            warm: with the head that the proxies start from, else the one that the model came with.
            rules: settings of a search that say how rows and columns are chosen.
        """
        p, c = self.problem, self.config.replace(**rules)
        point = None if warm else ScoringPoint(self.cold.now(), self.cold)
        about = {
            "problem": p.fingerprint,
            "start": self.proxies.start if warm else "as it came",
            "pool": samples.fingerprint,
            "fisher": [c.method, c.fisher_tokens, c.cache_mb, *LabelRule.of(c, p.task).about],
        }

        def opened() -> FisherMatrix:
            return open_fisher(p.model, p.task, p.space, samples, c, p.device, point=point)

        selector = Selector.of(c, Budgets.of(p.space, c.groups), samples)
        return Narrowings(opened, selector, self.ledger, about)

    def random_rows(self, n: int, s: int) -> SampleSet:
        """Training rows, others for each seed."""
        drawn = random_subset(
            len(self.problem.train), n, seed=derive(self.config.seed, "fish", n, s)
        )
        return self.problem.train.select(drawn)


def read(narrowings: Narrowings, rows: Tensor, k: int, reading: Reading) -> SparseMask:
    """The mask of k that a reading of some rows gives.

    Raises:
        UsageError: the reading passes over all that has a score.
    """
    found = narrowings.read(Pair(rows, reading=reading), k, str(reading))
    if not found:
        raise UsageError(f"{reading} leaves nothing for a mask of {k:,}.")
    return found[0][2]


def descended(narrowings: Narrowings, total: int, n: int, k: int) -> Tensor:
    """The n rows at which IRD arrives where rows halve, and columns fall to k meanwhile."""
    rounds = max(1, round(torch.tensor(total / n).log2().item()))
    rows = decreasing_range(total, n, rounds)
    columns = decreasing_range(narrowings.space.numel, k, rounds)
    if n == total:
        return torch.arange(total)
    return narrowings.descended(tuple(rows), tuple(columns))


@contextmanager
def at_work(
    task: str, problem: Problem, config: SearchConfig, ledger: Ledger, *, final_steps: int
) -> Iterator[Bench]:
    """Within the block the head is warmed up; afterwards the model is what it was."""
    proxies = Proxies(problem, config.replace(verdict_steps=final_steps), ledger)
    with borrowed(problem.model):
        problem.model.eval()
        proxies.check()
        cold = snapshot(problem.model, proxies.head_only().mask, problem.head)
        try:
            proxies.warm_up()
            yield Bench(task, problem, config, ledger, proxies, cold, final_steps)
        finally:
            cold.restore()
