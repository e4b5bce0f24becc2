"""`Controls`: what the winner is compared with.

random      as many entries, each as likely as any other
shuffle     as many in each tensor as the winner has: does the allocation explain the gain?
fish        the largest Fisher scores over as many random rows (FISH Mask)
reversed    the smallest ones above zero over the winner's rows
magnitude   the largest weights
lora        low-rank adapters with as many parameters, where PEFT is installed
full        everything
head        the head alone
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module

import torch
from torch import nn

from ird_search.budgets import Budgets
from ird_search.candidate import Adapter, Candidate, Kind
from ird_search.config import Control
from ird_search.errors import UsageError
from ird_search.granularity import Units
from ird_search.mask import SparseMask
from ird_search.narrowing import Narrowings
from ird_search.pair import Scored
from ird_search.parameters import ParameterSpace
from ird_search.proxy import Proxies
from ird_search.samples import SampleSet
from ird_search.seeds import derive
from ird_search.selection import random_subset

Draw = Callable[[int], Candidate]
"""A candidate for each seed: another one where chance has a part in it, else the same."""


@dataclass(frozen=True, eq=False)
class Controls:
    """The rivals of a winner, in the order of the table.

    Args:
        draws: what each is.
        left_out: of those that were asked for and cannot be had, why.
    """

    draws: Mapping[Kind, Draw]
    left_out: Mapping[Kind, str] = field(default_factory=dict)

    @classmethod
    def of(cls, winner: Scored, proxies: Proxies, narrowings: Narrowings) -> Controls:
        """Those that the settings name."""
        rivals, left_out = Rivals(winner, proxies, narrowings), dict[Kind, str]()
        draws: dict[Kind, Draw] = {kind: rivals[kind] for kind in proxies.config.controls}
        try:
            _ = "lora" in draws and rivals.adapter
        except UsageError as error:
            left_out["lora"] = str(error)
            del draws["lora"]
        return cls(draws, left_out)


class Rivals:
    """Each control of a winner's size, for any seed."""

    def __init__(self, winner: Scored, proxies: Proxies, narrowings: Narrowings) -> None:
        self.winner, self.proxies, self.narrowings = winner, proxies, narrowings
        self.mask, self.seed = winner.mask, proxies.config.seed
        self.units = narrowings.selector.units

    def __getitem__(self, kind: Control) -> Draw:
        """What draws a control."""
        rules: Mapping[Control, Draw] = {
            "random": self.random,
            "shuffle": self.shuffle,
            "fish": self.fish,
            "reversed": self.reversed,
            "magnitude": self.magnitude,
            "lora": self.lora,
            "full": lambda s: self.proxies.full(),
            "head": lambda s: self.proxies.head_only(),
        }
        return rules[kind]

    def random(self, s: int) -> Candidate:
        """Another mask for each seed."""
        mask = random_mask(self.mask.space, self.mask.count, self.seed, s, self.units)
        return Candidate("random", mask)

    def shuffle(self, s: int) -> Candidate:
        """Another mask for each seed, with the winner's counts."""
        return Candidate("shuffle", shuffled(self.mask, self.seed, s, self.units))

    def fish(self, s: int) -> Candidate:
        """Other rows for each seed."""
        samples = fish_samples(self.winner, self.proxies.problem.train, seed=self.seed, s=s)
        return Candidate("fish", self.narrowings.fish(samples, self.mask.count), len(samples))

    def reversed(self, s: int) -> Candidate:
        """The same mask for all seeds."""
        return Candidate("reversed", self._reversed, self.winner.pair.rows.numel())

    def magnitude(self, s: int) -> Candidate:
        """The same mask for all seeds."""
        return Candidate("magnitude", self._magnitude)

    def lora(self, s: int) -> Candidate:
        """The same layers and rank for all seeds; another A for each is drawn as it is put in."""
        return Candidate("lora", self.proxies.head_only().mask, adapter=self.adapter)

    @cached_property
    def adapter(self) -> Adapter:
        """LoRA of the winner's size.

        Raises:
            UsageError: why there is none.
        """
        try:  # PEFT is optional: what knows it is imported where it is asked for
            peft = import_module("ird_search.consumers.peft.control")
        except ModuleNotFoundError as error:
            raise UsageError("peft is not installed (pip install 'ird_search[peft]')") from error
        problem = self.proxies.problem
        found: Adapter = peft.lora_of_size(problem.model, problem.space, self.mask.count)
        return found

    @cached_property
    def _reversed(self) -> SparseMask:
        return self.narrowings.reversed(self.winner.pair.rows, self.mask.count)

    @cached_property
    def _magnitude(self) -> SparseMask:
        model, budgets = self.proxies.problem.model, self.narrowings.selector.budgets
        return magnitude_mask(model, budgets, self.mask.count)


def fish_samples(winner: Scored, train: SampleSet, *, seed: int, s: int) -> SampleSet:
    """As many random training rows as the winner's mask was computed from."""
    rows = winner.pair.rows.numel()
    return train.select(random_subset(len(train), rows, seed=derive(seed, "fish", s)))


def magnitude_mask(model: nn.Module, budgets: Budgets, count: int) -> SparseMask:
    """The largest weights."""
    space = budgets.space
    sizes = space.flatten({n: model.get_parameter(n).detach().float().cpu() for n in space.names})
    return SparseMask(space, budgets.ranks(sizes.abs(), None, 0, count))


def random_mask(
    space: ParameterSpace, count: int, seed: int, s: int, units: Units | None = None
) -> SparseMask:
    """So many entries, each as likely as any other; or at most so many, in whole units likewise."""
    own = derive(seed, "random mask", s)
    if units is None:
        return SparseMask(space, random_subset(space.numel, count, seed=own))
    parts, first = [], 0
    for name in space.names:
        parts.append(units.of(name) + first)
        first = int(parts[-1].max()) + 1
    unit_of = torch.cat(parts)
    order = torch.randperm(first, generator=torch.Generator().manual_seed(own))
    fits = unit_of.bincount()[order].cumsum(0) <= count
    return SparseMask(space, torch.isin(unit_of, order[fits]).nonzero().flatten())


def shuffled(mask: SparseMask, seed: int, s: int, units: Units | None = None) -> SparseMask:
    """As many entries (or whole units) in each tensor, each of a tensor's as likely as any other.

    Example:
        >>> space = ParameterSpace(("a", "b"), ((4,), (1000,)))
        >>> mask = SparseMask(space, torch.tensor([0, 1, 500]))
        >>> {name: index.numel() for name, index in shuffled(mask, 0, 0).indices.items()}
        {'a': 2, 'b': 1}
    """
    drawn = [torch.empty(0, dtype=torch.int64)]
    for name, index in mask.indices.items():
        span, own = mask.space.span(name), derive(seed, "shuffled mask", s, name)
        if units is None:
            at = random_subset(span.stop - span.start, index.numel(), seed=own)
        else:
            ids = units.of(name)
            number, chosen = int(ids.max()) + 1, ids[index].unique().numel()
            at = torch.isin(ids, random_subset(number, chosen, seed=own)).nonzero().flatten()
        drawn.append(span.start + at)
    return SparseMask(mask.space, torch.cat(drawn))
