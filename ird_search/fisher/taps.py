"""Taps: one batched backward to the modules' outputs, then the rules. The fast path.

Add a zero, a *tap*, to the output of every module that owns candidate parameters, and
differentiate the batch's log-likelihoods with respect to the taps with `torch.func.vjp`. One
backward gives the output gradients g[b, …] of every sample; samples do not mix in a forward pass,
so the sum over the batch keeps them apart. With the captured inputs a[b, …] the rules form the
per-sample gradients. No vmap over the model: padded batches, 2-D attention masks and sdpa just
work, and weights are never differentiated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp

from ird_search.fisher.engine import Contribution, all_finite
from ird_search.fisher.gradients import SampleGradients, added
from ird_search.fisher.rules import Rule, general, rule_for
from ird_search.samples import Batch
from ird_search.task import Inputs, Task, logits_of

PROBE = 2
"""Rows of the forward pass that learns the shapes: enough to tell a batch axis from a broadcast."""

SECOND_PROBE = 3
"""Rows of another one: an axis that does not follow is no batch axis."""


@dataclass(frozen=True, eq=False)
class Site:
    """A module with candidate parameters: where a tap goes.

    Args:
        parameters: the module's own names of its candidate parameters → names in the model.
    """

    name: str
    module: nn.Module
    rule: Rule
    parameters: dict[str, str]


@dataclass
class Calls:
    """What the sites' modules were called with, and what they returned, in order of the calls."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Size] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    opaque: set[str] = field(default_factory=set)


class Taps:
    """∇_θ log p(yᵢ | xᵢ; θ) as factors, for every sample of a batch from one backward.

    Args:
        names: the tensors wanted.
        example: two rows or more, to learn which modules a tap reaches.

    After construction `names` holds the tensors that taps cover and `uncovered` the others:
    those that a module with children holds itself, or whose module is not called with one tensor
    and answers with one.
    """

    path = "taps"

    def __init__(
        self, model: nn.Module, task: Task, names: Sequence[str], *, example: Batch
    ) -> None:
        self.model, self.task = model, task
        self._shapes: dict[Any, Calls] = {}
        sites = find_sites(model, names)
        reached = self._reached(example, sites)
        # A tensor shared with a module that no tap reaches would get only a part of its gradient.
        missed = {n for s in sites if s not in reached for n in s.parameters.values()}
        self.sites = [s for s in reached if not missed & set(s.parameters.values())]
        covered = {n for s in self.sites for n in s.parameters.values()}
        self.names = tuple(n for n in names if n in covered)
        self.uncovered = tuple(n for n in names if n not in covered)

    def gradients(self, batch: Batch) -> Iterator[Contribution]:
        size = len(batch)
        taps = self._zeros(batch)

        def log_likelihood(taps: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            with tapped(self.sites, taps) as calls:
                logits = logits_of(self.model, batch.inputs)
            return self.task.log_likelihood(logits, batch.labels), calls.inputs

        # Under no_grad the weights are constants; vjp differentiates its own argument all the same.
        with torch.no_grad():
            found: Any = vjp(log_likelihood, taps, has_aux=True)
            values, pull, inputs = found
            # Not kept for a second backward: activations are freed while this one runs.
            (outs,) = pull(torch.ones_like(values), retain_graph=False, create_graph=False)
            del pull, found
            outs = {key: _per_sample(g, size) for key, g in outs.items()}
            tensors = self._contract(inputs, outs, size)
            # Inputs that several sites share (query, key, value) are looked at once.
            seen = {id(x): x for x in inputs.values() if x.is_floating_point()}
            finite = all_finite([values, *outs.values(), *seen.values()], size)
        yield Contribution(slice(0, size), tensors, finite)

    def _contract(
        self, inputs: dict[str, Tensor], outs: dict[str, Tensor], size: int
    ) -> dict[str, SampleGradients]:
        """The rules, site by site; several uses of one tensor are added before any square."""
        uses: dict[str, list[SampleGradients]] = {}
        sites = {s.name: s for s in self.sites}
        for key, g in outs.items():
            site = sites[_site(key)]
            inputs[key] = _per_sample(inputs[key], size)
            found = site.rule(site.module, inputs[key], g)
            for local, name in site.parameters.items():
                uses.setdefault(name, []).append(found[local])
        return {name: added(uses[name]) for name in self.names}

    def _zeros(self, batch: Batch) -> dict[str, Tensor]:
        """The taps of a batch: zeros in the shapes of the sites' outputs, one number in memory."""
        key = tuple((k, tuple(v.shape[1:])) for k, v in sorted(batch.inputs.items()))
        if key not in self._shapes:
            self._shapes[key] = self._probe(batch, self.sites)
        calls = self._shapes[key]
        return {
            k: torch.zeros((), dtype=calls.dtypes[k], device=batch.labels.device).expand(
                max(1, shape[0] // PROBE) * len(batch), *shape[1:]
            )
            for k, shape in calls.outputs.items()
        }

    def _reached(self, example: Batch, sites: Sequence[Site]) -> list[Site]:
        """The sites that are called with one tensor, answer with one, and put samples first."""
        few, more = (self._probe(example, sites, rows=n) for n in (PROBE, SECOND_PROBE))
        odd = few.opaque | more.opaque
        for key in few.outputs.keys() | more.outputs.keys():
            # A module that keeps its tokens first, or routes them, answers by other rules.
            if not _samples_first(few.outputs.get(key), more.outputs.get(key)):
                odd.add(_site(key))
        called = {_site(key) for key in few.outputs}
        return [s for s in sites if s.name in called and s.name not in odd]

    def _probe(self, batch: Batch, sites: Sequence[Site], *, rows: int = PROBE) -> Calls:
        """A forward pass of a few rows that learns the shapes of the sites' outputs."""
        chosen = torch.arange(rows, device=batch.labels.device) % len(batch)
        inputs: Inputs = {key: value[chosen] for key, value in batch.inputs.items()}
        # With gradients on: layers with a fused path for inference must take the other here too.
        with torch.enable_grad(), tapped(sites, None) as calls:
            logits_of(self.model, inputs)
        calls.inputs.clear()
        return calls


def find_sites(model: nn.Module, names: Sequence[str]) -> list[Site]:
    """Every module that owns one of the named parameters (tied ones have several owners)."""
    wanted = set(names)
    known = {id(p): name for name, p in model.named_parameters() if name in wanted}
    sites = []
    for name, module in model.named_modules():
        own = {
            local: known[id(p)]
            for local, p in module.named_parameters(recurse=False, remove_duplicate=False)
            if id(p) in known
        }
        if own and (rule := rule_for(module)) is not None:
            sites.append(Site(name, module, rule, own))
        elif own:
            sites.append(Site(name, module, _no_rule, own))
    return sites


@contextmanager
def tapped(sites: Sequence[Site], taps: dict[str, Tensor] | None) -> Iterator[Calls]:
    """Hooks that add `taps` to the sites' outputs and record the calls; gone on leaving."""
    calls = Calls()
    counts: Counter[str] = Counter()

    def record(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        # The general rule calls the module again, with the tensor alone.
        settings = site.rule is general and any(
            v is not None and not isinstance(v, Tensor) for v in (*args, *kwargs.values())
        )
        if len(given) != 1 or not isinstance(output, Tensor) or settings or site.rule is _no_rule:
            calls.opaque.add(site.name)
            return output
        key = f"{site.name}#{counts[site.name]}"
        counts[site.name] += 1
        calls.inputs[key], calls.outputs[key] = given[0], output.shape
        calls.dtypes[key] = output.dtype
        return output if taps is None else output + taps[key]

    with ExitStack() as stack:
        for site in sites:
            handle = site.module.register_forward_hook(
                lambda _m, args, kwargs, output, site=site: record(site, args, kwargs, output),
                with_kwargs=True,
            )
            stack.callback(handle.remove)
        yield calls


def _no_rule(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, SampleGradients]:
    raise AssertionError(f"{type(module).__name__} has no rule; it is left to vmap")


def _site(key: str) -> str:
    """The site of a call."""
    return key.rpartition("#")[0]


def _samples_first(few: torch.Size | None, more: torch.Size | None) -> bool:
    """Whether outputs for `PROBE` and `SECOND_PROBE` rows differ in a leading batch axis alone.

    One broadcast row, and the tokens of all samples in one axis, are taken for a batch axis too.
    """
    if not few or not more or few[1:] != more[1:]:
        return False
    return few[0] == more[0] == 1 or few[0] * SECOND_PROBE == more[0] * PROBE


def _per_sample(x: Tensor, size: int) -> Tensor:
    """Batch first: a broadcast [1, …] is expanded, a flattened [B·T, …] taken apart."""
    if x.shape[0] == size:
        return x
    if x.shape[0] == 1:
        return x.expand(size, *x.shape[1:])
    return x.unflatten(0, (size, -1))
