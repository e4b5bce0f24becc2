"""Sites: the modules whose outputs tell the gradients of which parameters.

A parameter's site is the module that owns it. Where this is not called with samples first (a table
of relative positions, a factor in a `ParameterDict`, a weight that a function uses) it is the
nearest module around it that is: the vector-Jacobian product of that one with respect to the
parameter holds all its uses within. Two forward passes of a few rows tell.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ird_search.errors import out_of_memory
from ird_search.fisher.calls import PROBE, SECOND_PROBE, Calls, Form, per_sample, probe
from ird_search.fisher.gradients import SampleGradients
from ird_search.fisher.rules import Call, Place, Rule, again, rule_for
from ird_search.samples import Batch

FIXED = (bool, int, float, str, torch.dtype, torch.device, nn.Module)
"""What a module may be given beside tensors to be called again, also in a tuple."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Site:
    """A module with candidate parameters: where a tap goes.

    Args:
        rule: None where the module is to be called again.
        parameters: the module's own names of the candidate parameters → names in the model.
        moving: where it is given tensors with samples first.
        batchless: its output [T, d] has no axis of samples; the model adds it to every one.
        sure: it is what it looks like.
        partly: some of its calls lead nowhere.
    """

    name: str
    module: nn.Module
    rule: Rule | None
    parameters: Mapping[str, str]
    moving: frozenset[Place] = frozenset()
    batchless: bool = False
    sure: bool = True
    partly: bool = False

    def zeros(self, calls: Calls, call: str, size: int) -> dict[str, Tensor]:
        """The taps of a call for `size` samples, one number in memory each.

        Args:
            calls: of `PROBE` samples.
        """
        zeros = {}
        for key, (shape, dtype, device) in calls.outputs[call].items():
            first = (size, shape[0]) if self.batchless else (max(1, shape[0] // PROBE) * size,)
            zeros[key] = torch.zeros((), dtype=dtype, device=device).expand(*first, *shape[1:])
        return zeros

    def fits(self, few: Form, form: Form, size: int) -> bool:
        """Whether a call for `size` samples is one for `PROBE` samples, with more of them."""
        alike = (self._alike(p, few[p], form[p], size) for p in few if p in form)
        return few.keys() == form.keys() and all(alike)

    def _alike(self, place: Place, few: torch.Size | None, x: torch.Size | None, size: int) -> bool:
        if few is None or x is None:
            return few is x and place not in self.moving
        lines, more = few[:1].numel(), x[:1].numel()
        grown = few[1:] == x[1:] and lines % PROBE == 0 and lines * size == more * PROBE
        if self.rule is None:
            # with as many samples as were looked at, what moves and what does not look alike
            still = few == x and not (size == PROBE and lines == PROBE)
            return grown if place in self.moving else still
        if self.batchless:
            return few == x and not (size == PROBE and lines == PROBE)
        return grown or (few == x and lines == 1)

    def given(self, call: Call, size: int) -> tuple[Tensor, ...]:
        """The tensors of a call with samples first."""
        if self.batchless:
            return tuple(x.expand(size, *x.shape) for x in call.tensors.values())
        return tuple(per_sample(x, size) for x in call.tensors.values())

    def gradients(self, call: Call, g: tuple[Tensor, ...]) -> dict[str, SampleGradients]:
        """By the module's own names, from the gradients [B, …] of what it answered."""
        if self.rule is None:
            return again(self.module, replace(call, moving=self.moving), g, tuple(self.parameters))
        a = self.given(call, g[0].shape[0])
        return self.rule(self.module, a[0] if len(a) == 1 else a, g[0] if len(g) == 1 else g)


def find_sites(
    model: nn.Module, names: Sequence[str], example: Batch, *, cautious: bool
) -> tuple[list[Site], bool]:
    """The sites of all parameters that taps reach, and whether caution makes a difference.

    A tensor that is shared with a module that no tap reaches would get only a part of its gradient,
    and has none.
    """
    owners = owners_of(model, names)
    survey = Survey.of(model, owners, example, cautious=cautious)
    homes = {o: survey.site(o, own) for o, own in owners.items() if survey.called(o)}
    shared = {n for site in homes.values() if site for n in site.parameters.values()}
    idle = {o for o, own in owners.items() if o not in homes and shared.issuperset(own.values())}
    left = owners.keys() - homes.keys() - (set() if cautious else idle)
    homes |= {o: survey.site(o, own) for o, own in owners.items() if o in left}

    missed = {n for o, site in homes.items() if site is None for n in owners[o].values()}
    sites: dict[str, Site] = {}
    for site in filter(None, homes.values()):
        whole = {own: n for own, n in site.parameters.items() if n not in missed}
        before = sites.get(site.name)
        if whole:
            both = {**before.parameters, **whole} if before else whole
            sure = site.sure and (before is None or before.sure)
            sites[site.name] = replace(site, parameters=both, sure=sure)
    return list(sites.values()), bool(idle) or not all(s.sure for s in sites.values())


def owners_of(model: nn.Module, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Of every module with some of the named parameters: its own names of them → the model's.

    Tied ones have several owners.
    """
    wanted = set(names)
    known = {id(p): name for name, p in model.named_parameters() if name in wanted}
    owners = {
        name: {
            local: known[id(p)]
            for local, p in module.named_parameters(recurse=False, remove_duplicate=False)
            if id(p) in known
        }
        for name, module in model.named_modules()
    }
    return {name: own for name, own in owners.items() if own}


@dataclass(frozen=True, eq=False)
class Survey:
    """What two passes of different size tell of the modules.

    Args:
        modules: the owners of parameters, and those around them.
        cautious: take nothing for what it may not be.
    """

    modules: Mapping[str, nn.Module]
    few: Calls
    more: Calls
    cautious: bool

    @classmethod
    def of(
        cls, model: nn.Module, owners: Mapping[str, object], example: Batch, *, cautious: bool
    ) -> Survey:
        around = {o[:i] for o in owners for i, letter in enumerate(o) if letter == "."}
        modules = {n: m for n, m in model.named_modules() if n in owners or n in around}
        few = probe(model, modules, example, backward=True)
        return cls(modules, few, probe(model, modules, example, rows=SECOND_PROBE), cautious)

    def called(self, name: str) -> bool:
        return name in self.few.of_module or name in self.few.opaque

    def site(self, owner: str, parameters: Mapping[str, str]) -> Site | None:
        """The nearest module, from the owner outwards, that tells their gradients."""
        at = owner
        while True:
            within = owner.removeprefix(at).lstrip(".")
            own = {f"{within}.{p}".lstrip("."): name for p, name in parameters.items()}
            site = self._at(at, own) if at in self.modules else None
            if site is not None and (site.sure or not self.cautious):
                return site
            at = at.rpartition(".")[0]
            if self.cautious or not at:
                return None

    def _at(self, name: str, parameters: Mapping[str, str]) -> Site | None:
        """The module as a site, where it answers with samples first and its rule suffices."""
        module, calls = self.modules[name], self.few.seen(name)
        shapes = [pair for call in calls for pair in self._shapes(call)]
        if not shapes or name in self.few.opaque | self.more.opaque:
            return None
        batchless = isinstance(module, nn.Embedding) and all(
            len(few) == 2 and few == more for few, more in shapes
        )
        # A module that keeps its tokens first, or routes them, answers by other rules.
        if not batchless and not all(_samples_first(few, more) for few, more in shapes):
            return None
        site = Site(
            name,
            module,
            rule_for(module),
            parameters,
            batchless=batchless,
            sure=not batchless and all(few[0] > 1 for few, _ in shapes),
            partly=len(calls) < len(self.few.of_module[name]),
        )
        return self._ruled(site, calls) if site.rule else self._recalled(site, calls)

    def _shapes(self, call: str) -> list[tuple[torch.Size, torch.Size | None]]:
        """Of a call's outputs, in both passes."""
        more = {key: shape for key, (shape, *_) in self.more.outputs.get(call, {}).items()}
        return [(shape, more.get(key)) for key, (shape, *_) in self.few.outputs[call].items()]

    def _ruled(self, site: Site, calls: Sequence[str]) -> Site | None:
        """With a rule, which speaks of the module's own parameters and needs a tensor."""
        lent = any("." in local for local in site.parameters)
        return None if lent or not all(self.few.given[c].tensors for c in calls) else site

    def _recalled(self, site: Site, calls: Sequence[str]) -> Site | None:
        """Without one, by making the same call for every sample alone.

        A parameter that may come this way is no larger than the answers, of whose gradients there
        are as many: what is formed for large ones is left to vmap, which takes few samples at once.
        """
        moving = {self._moving(call) for call in calls}
        given = [v for c in calls for v in self.few.given[c].given.values() if v is not None]
        others = [v for v in given if not isinstance(v, Tensor)]
        if len(moving) > 1 or None in moving or not all(map(_fixed, others)):
            return None
        module, leaf = site.module, next(site.module.children(), None) is None
        alone = leaf and len(given) == len(calls) and not others
        if not alone and not isinstance(module, nn.Embedding):
            answers = sum(few.numel() for c in calls for few, _ in self._shapes(c)) // PROBE
            if any(module.get_parameter(p).numel() > answers for p in site.parameters):
                return None
        site = replace(site, moving=moving.pop() or frozenset(), sure=site.sure and alone)
        return site if self._works(site, calls[0]) else None

    def _moving(self, call: str) -> frozenset[Place] | None:
        """Where a module is given tensors with samples first; None if some have them elsewhere."""
        few, more = self.few.given[call].tensors, self.more.given[call].tensors
        if few.keys() != more.keys():
            return None
        same = {p for p in few if few[p].shape == more[p].shape}
        moving = few.keys() - same
        first = all(_samples_first(few[p].shape, more[p].shape) for p in moving)
        return frozenset(moving) if first else None

    def _works(self, site: Site, call: str) -> bool:
        """Whether the module can be called again: one that branches on values cannot."""
        g = tuple(site.zeros(self.few, call, PROBE).values())
        try:
            with torch.no_grad():
                site.gradients(self.few.given[call], tuple(per_sample(x, PROBE) for x in g))
        except Exception as problem:
            if out_of_memory(problem):
                raise
            log.info("%s is not called again: %s: %s", site.name, type(problem).__name__, problem)
            return False
        return True


def _samples_first(few: torch.Size, more: torch.Size | None) -> bool:
    """Whether outputs for `PROBE` and `SECOND_PROBE` rows differ in a leading batch axis alone.

    One broadcast row, and the tokens of all samples in one axis, are taken for a batch axis too.
    """
    if not few or not more or few[1:] != more[1:]:
        return False
    return few[0] == more[0] == 1 or few[0] * SECOND_PROBE == more[0] * PROBE


def _fixed(x: Any) -> bool:
    return all(map(_fixed, x)) if isinstance(x, tuple) else isinstance(x, FIXED)
