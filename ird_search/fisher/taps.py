"""Taps: one batched backward to the modules' outputs, then the rules. The fast path.

Add a zero, a *tap*, to the output of every module that owns candidate parameters, and
differentiate the batch's log-likelihoods with respect to the taps with `torch.func.vjp`. One
backward gives the output gradients g[b, …] of every sample; samples do not mix in a forward pass,
so the sum over the batch keeps them apart. With the captured inputs a[b, …] the rules form the
per-sample gradients. No vmap over the model: padded batches, 2-D attention masks and sdpa just
work, and weights are never differentiated.

Two things may look like what they are not: an output of one row (positions that are broadcast over
the batch, or a table that the model repeats itself), and a module that is never called though its
weight is tied to one that is (left over, or its weight used by a function). `Taps` takes both for
the first; with `cautious` it leaves them out. Which is right, the self-check tells.
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

from ird_search.fisher.combined import added
from ird_search.fisher.engine import Contribution, all_finite
from ird_search.fisher.gradients import SampleGradients
from ird_search.fisher.rules import Rule, general, rule_for
from ird_search.samples import Batch
from ird_search.task import Inputs, Task, logits_of

PROBE = 2
"""Rows of the forward pass that learns the shapes: enough to tell a batch axis from a broadcast."""

SECOND_PROBE = 3
"""Rows of another one: an axis that does not follow is no batch axis."""


Given = Tensor | tuple[Tensor, ...]
"""What a module is called with."""


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
    """What the sites' modules were called with, and what they returned, in order of the calls.

    Inputs are by call ("site#0"), outputs by call and place ("site#0/0").
    """

    inputs: dict[str, Given] = field(default_factory=dict)
    outputs: dict[str, torch.Size] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    opaque: set[str] = field(default_factory=set)


class Taps:
    """∇_θ log p(yᵢ | xᵢ; θ) as factors, for every sample of a batch from one backward.

    Args:
        names: the tensors wanted.
        example: two rows or more, to learn which modules a tap reaches.
        cautious: leave out what may not be what it looks like.

    After construction `names` holds the tensors that taps cover and `uncovered` the others:
    those that a module with children holds itself, or whose module is called with several tensors
    and has no rule of its own, or answers with anything but tensors. `doubtful` says whether
    caution makes a difference.
    """

    path = "taps"

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        names: Sequence[str],
        *,
        example: Batch,
        cautious: bool = False,
    ) -> None:
        self.model, self.task = model, task
        self._shapes: dict[Any, Calls] = {}
        sites = find_sites(model, names)
        self.doubtful = False
        reached, idle = self._reached(example, sites, cautious=cautious)
        # A tensor shared with a module that no tap reaches would get only a part of its gradient.
        missed = {
            n for s in sites if s not in reached and s not in idle for n in s.parameters.values()
        }
        self.sites = [s for s in reached if not missed & set(s.parameters.values())]
        covered = {n for s in self.sites for n in s.parameters.values()}
        self.names = tuple(n for n in names if n in covered)
        self.uncovered = tuple(n for n in names if n not in covered)

    def gradients(self, batch: Batch) -> Iterator[Contribution]:
        size = len(batch)
        taps = self._zeros(batch)

        def log_likelihood(taps: dict[str, Tensor]) -> tuple[Tensor, dict[str, Given]]:
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
            given = [x for one in inputs.values() for x in _several(one)]
            seen = {id(x): x for x in given if x.is_floating_point()}
            finite = all_finite([values, *outs.values(), *seen.values()], size)
        yield Contribution(slice(0, size), tensors, finite)

    def _contract(
        self, inputs: dict[str, Given], outs: dict[str, Tensor], size: int
    ) -> dict[str, SampleGradients]:
        """The rules, site by site; several uses of one tensor are added before any square."""
        uses: dict[str, list[SampleGradients]] = {}
        sites = {s.name: s for s in self.sites}
        returned: dict[str, list[Tensor]] = {}
        for key, g in outs.items():
            returned.setdefault(_call(key), []).append(g)
        for call, gs in returned.items():
            site = sites[_site(call)]
            given = tuple(_per_sample(x, size) for x in _several(inputs[call]))
            inputs[call] = _one(given)
            found = site.rule(site.module, inputs[call], _one(tuple(gs)))
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

    def _reached(
        self, example: Batch, sites: Sequence[Site], *, cautious: bool
    ) -> tuple[list[Site], list[Site]]:
        """The sites whose rule gets what it needs, with samples first; and those never called."""
        few, more = (self._probe(example, sites, rows=n) for n in (PROBE, SECOND_PROBE))
        odd = few.opaque | more.opaque
        for key in few.outputs.keys() | more.outputs.keys():
            # A module that keeps its tokens first, or routes them, answers by other rules.
            shape = few.outputs.get(key)
            broadcast = shape is not None and shape[:1] == (1,)
            self.doubtful |= broadcast
            if not _samples_first(shape, more.outputs.get(key)) or (cautious and broadcast):
                odd.add(_site(key))
        called = {_site(key) for key in few.outputs}
        reached = [s for s in sites if s.name in called and s.name not in odd]
        shared = {n for s in reached for n in s.parameters.values()}
        idle = [
            s
            for s in sites
            if s.name not in called | odd and shared.issuperset(s.parameters.values())
        ]
        self.doubtful |= bool(idle)
        return reached, [] if cautious else idle

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
        given = tuple(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        outs = _several(output)
        if not _answers(site, args, kwargs) or not all(isinstance(x, Tensor) for x in outs):
            calls.opaque.add(site.name)
            return output
        call = f"{site.name}#{counts[site.name]}"
        counts[site.name] += 1
        calls.inputs[call] = _one(given)
        tapped_outs = []
        for i, out in enumerate(outs):
            key = f"{call}/{i}"
            if out.is_floating_point():
                calls.outputs[key], calls.dtypes[key] = out.shape, out.dtype
                tapped_outs.append(out if taps is None else out + taps[key])
            else:
                tapped_outs.append(out)
        return tuple(tapped_outs) if isinstance(output, tuple) else tapped_outs[0]

    with ExitStack() as stack:
        for site in sites:
            handle = site.module.register_forward_hook(
                lambda _m, args, kwargs, output, site=site: record(site, args, kwargs, output),
                with_kwargs=True,
            )
            stack.callback(handle.remove)
        yield calls


def _answers(site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the site's rule can work with what the module is called with."""
    given = [*args, *kwargs.values()]
    tensors = sum(isinstance(v, Tensor) for v in given)
    if site.rule is _no_rule or not tensors:
        return False
    if site.rule is general:  # it calls the module again, with the tensor alone
        return tensors == sum(v is not None for v in given) == 1
    return True


def _several(x: Any) -> tuple[Any, ...]:
    """What is one or a tuple, as a tuple."""
    return x if type(x) is tuple else (x,)


def _one(x: tuple[Tensor, ...]) -> Any:
    """A tuple of one as that one."""
    return x[0] if len(x) == 1 else x


def _no_rule(module: nn.Module, a: Tensor, g: Tensor) -> dict[str, SampleGradients]:
    raise AssertionError(f"{type(module).__name__} has no rule; it is left to vmap")


def _call(key: str) -> str:
    """The call of an output."""
    return key.rpartition("/")[0]


def _site(key: str) -> str:
    """The site of a call, or of an output."""
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
