"""Taps: one batched backward to the modules' outputs, then the rules. The fast path.

Add a zero, a *tap*, to the output of every module that owns candidate parameters, and
differentiate the batch's log-likelihoods with respect to the taps with `torch.func.vjp`. One
backward gives the output gradients g[b, …] of every sample; samples do not mix in a forward pass,
so the sum over the batch keeps them apart. With the captured inputs a[b, …] the rules form the
per-sample gradients. No vmap over the model: padded batches, 2-D attention masks and sdpa just
work, and weights are never differentiated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp

from ird_search.fisher.engine import Contribution, all_finite
from ird_search.fisher.gradients import SampleGradients, added
from ird_search.fisher.rules import Rule, rule_for
from ird_search.samples import Batch
from ird_search.task import Inputs, Task, logits_of

PROBE = 2
"""Rows of the forward pass that learns the shapes: enough to tell a batch axis from a broadcast."""


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
        calls = self._probe(example, sites)
        called = {key.rpartition("#")[0] for key in calls.outputs}
        reached = [s for s in sites if s.name in called and s.name not in calls.opaque]
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
            finite = all_finite([values, *outs.values()], size)
            tensors = self._contract(inputs, outs, size)
        yield Contribution(slice(0, size), tensors, finite)

    def _contract(
        self, inputs: dict[str, Tensor], outs: dict[str, Tensor], size: int
    ) -> dict[str, SampleGradients]:
        """The rules, site by site; several uses of one tensor are added before any square."""
        uses: dict[str, list[SampleGradients]] = {}
        sites = {s.name: s for s in self.sites}
        for key, g in outs.items():
            site = sites[key.rpartition("#")[0]]
            found = site.rule(site.module, _per_sample(inputs[key], size), g)
            for local, name in site.parameters.items():
                uses.setdefault(name, []).append(found[local])
        return {name: added(uses[name]) for name in self.names}

    def _zeros(self, batch: Batch) -> dict[str, Tensor]:
        """The taps of a batch: zeros in the shapes of the sites' outputs."""
        key = tuple((k, tuple(v.shape[1:])) for k, v in sorted(batch.inputs.items()))
        if key not in self._shapes:
            self._shapes[key] = self._probe(batch, self.sites)
        calls = self._shapes[key]
        return {
            k: torch.zeros(
                (shape[0] if shape[0] > PROBE else PROBE) // PROBE * len(batch),
                *shape[1:],
                dtype=calls.dtypes[k],
                device=batch.labels.device,
            )
            for k, shape in calls.outputs.items()
        }

    def _probe(self, batch: Batch, sites: Sequence[Site]) -> Calls:
        """A forward pass of two rows that learns the shapes of the sites' outputs."""
        rows = torch.arange(PROBE, device=batch.labels.device) % len(batch)
        inputs: Inputs = {key: value[rows] for key, value in batch.inputs.items()}
        with torch.no_grad(), tapped(sites, None) as calls:
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

    def record(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        if len(given) != 1 or not isinstance(output, Tensor) or site.rule is _no_rule:
            calls.opaque.add(site.name)
            return output
        if taps is None and output.shape[0] != 1 and output.shape[0] % PROBE:
            calls.opaque.add(site.name)  # the leading axis is no batch axis
            return output
        count = sum(key.rpartition("#")[0] == site.name for key in calls.outputs)
        key = f"{site.name}#{count}"
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


def _per_sample(x: Tensor, size: int) -> Tensor:
    """Batch first: a broadcast [1, …] is expanded, a flattened [B·T, …] taken apart."""
    if x.shape[0] == size:
        return x
    if x.shape[0] == 1:
        return x.expand(size, *x.shape[1:])
    return x.unflatten(0, (size, -1))
