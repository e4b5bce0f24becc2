"""Taps: one batched backward to the modules' outputs, then the rules. The fast path.

Add a zero, a *tap*, to the output of every module that owns candidate parameters, and
differentiate the batch's log-likelihoods with respect to the taps. One backward gives the output
gradients g[b, …] of every sample; samples do not mix in a forward pass, so the sum over the batch
keeps them apart. With the captured inputs a[b, …] the rules form the per-sample gradients. Plain
autograd, and no vmap over the model: padded batches, 2-D attention masks, sdpa, 4-bit layers and
fused kernels just work, and weights are never differentiated.

Some things may look like what they are not: an output of one row, or without an axis of samples
(positions that are broadcast over the batch, or a table that the model repeats itself); a module
that is never called though its weight is tied to one that is (left over, or its weight used by a
function); one that is to be called again, with all that it was given, for what it or its children
hold. `Taps` takes them for the first; with `cautious` it leaves them out. Which is right, the
self-check tells.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ird_search.fisher.calls import (
    Calls,
    Form,
    constant,
    form_of,
    per_sample,
    probe,
    tapped,
)
from ird_search.fisher.combined import added
from ird_search.fisher.engine import Contribution, all_finite
from ird_search.fisher.gradients import Dense, SampleGradients
from ird_search.fisher.loop import Loop
from ird_search.fisher.rules import Call
from ird_search.fisher.sites import find_sites
from ird_search.samples import Batch
from ird_search.task import Task, logits_of

log = logging.getLogger(__name__)


class Unlike(Exception):
    """A batch calls modules otherwise than the rows of it that were looked at."""


class Taps:
    """∇_θ log p(yᵢ | xᵢ; θ) as factors, for every sample of a batch from one backward.

    Args:
        names: the tensors wanted.
        example: two rows or more, to learn which modules a tap reaches.
        cautious: leave out what may not be what it looks like.

    A batch in which modules are called otherwise than in the rows that were looked at (a branch
    that its first rows do not take, a mask that they do not need) goes by the loop.

    After construction `names` holds the tensors that taps cover and `uncovered` the others.
    `doubtful` says whether caution would leave out more.
    """

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
        self._shapes: dict[Any, tuple[Calls, dict[str, Form]]] = {}
        self._told: set[str] = set()
        sites, self.doubtful = find_sites(model, names, example, cautious=cautious)
        self.sites = {site.name: site for site in sites}
        self._modules = {site.name: site.module for site in sites}
        covered = {name for site in sites for name in site.parameters.values()}
        self.names = tuple(n for n in names if n in covered)
        self.uncovered = tuple(n for n in names if n not in covered)

    @property
    def path(self) -> str:
        """With the loop, once a batch has gone by it."""
        return "taps+loop" if self._told else "taps"

    def gradients(self, batch: Batch) -> Iterator[Contribution]:
        try:
            whole = self._whole(batch)
        except Unlike as where:
            self._tell(str(where))
            yield from Loop(self.model, self.task, self.names).gradients(batch)
        else:
            yield whole

    def _tell(self, name: str) -> None:
        """Once for each module."""
        if name not in self._told:
            log.warning(
                "%s (%s) is called otherwise in some batches; these go by the loop.",
                name or "The model",
                type(self._modules[name]).__name__,
            )
        self._told.add(name)

    def _whole(self, batch: Batch) -> Contribution:
        """All rows at once."""
        size = len(batch)
        values, found, calls = self._backward(batch)
        with torch.no_grad():
            answers: dict[str, tuple[Tensor, ...]] = {}
            for key, g in found.items():
                answers[_call(key)] = (*answers.get(_call(key), ()), per_sample(g, size))
            tensors, checked = self._contract({key: calls[key] for key in answers}, answers)
            finite = all_finite([values, *found.values(), *checked], size)
        return Contribution(slice(0, size), tensors, finite)

    def _backward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], dict[str, Call]]:
        """log p [B], its gradients at the taps, and what the sites were called with.

        Raises:
            Unlike: the modules are called otherwise than was seen.
        """
        known, forms = self._known(batch)
        taps = self._zeros(known, len(batch))

        def tap(key: str, out: Tensor) -> Tensor:
            if (zero := taps.get(key)) is None:
                return out
            if out.shape not in (zero.shape, (1, *zero.shape[1:]), zero.shape[1:]):
                raise Unlike(_site(_call(key)))
            return out + zero

        with constant(self.model):
            for zero in taps.values():
                zero.requires_grad_(True)
            with tapped(self._modules, tap) as calls:
                logits = logits_of(self.model, batch.inputs)
            self._require_alike(calls, known, forms, len(batch))
            values = self.task.log_likelihood(logits, batch.labels)
            found = torch.autograd.grad(
                values.sum(), list(taps.values()), allow_unused=True, materialize_grads=True
            )
        # Inputs that several sites share (query, key, value) stay one tensor.
        given = {id(x): x.detach() for call in calls.given.values() for x in call.tensors.values()}
        alone = {
            key: call.having({place: given[id(x)] for place, x in call.tensors.items()})
            for key, call in calls.given.items()
        }
        return values.detach(), dict(zip(taps, found, strict=True)), alone

    def _contract(
        self, calls: dict[str, Call], answers: dict[str, tuple[Tensor, ...]]
    ) -> tuple[dict[str, SampleGradients], list[Tensor]]:
        """The rules, call by call; several uses of one tensor are added before any square.

        Also what else is to be finite: what the rules multiply, and what is formed without one.
        """
        uses: dict[str, list[SampleGradients]] = {}
        checked: dict[int, Tensor] = {}
        for key, call in calls.items():
            site = self.sites[_site(key)]
            found = site.gradients(call, answers[key])
            for local, name in site.parameters.items():
                uses.setdefault(name, []).append(found[local])
            if site.rule is None:
                multiplied = [g.gradients for g in found.values() if isinstance(g, Dense)]
            else:
                multiplied = list(site.given(call, len(answers[key][0])))
            checked |= {id(x): x for x in multiplied if x.is_floating_point()}
        return {name: added(uses[name]) for name in self.names}, list(checked.values())

    def _known(self, batch: Batch) -> tuple[Calls, dict[str, Form]]:
        """What a few rows of such a batch call, and in what form: learnt once for each shape."""
        mask = batch.inputs.get("attention_mask")
        padded = mask is not None and not bool(mask.all())
        shapes = tuple((k, tuple(v.shape[1:])) for k, v in sorted(batch.inputs.items()))
        if (key := (padded, shapes)) not in self._shapes:
            partly = any(site.partly for site in self.sites.values())
            calls = probe(self.model, self._modules, batch, backward=partly)
            forms = {call: form_of(given) for call, given in calls.given.items()}
            calls.given.clear()
            self._shapes[key] = calls, forms
        return self._shapes[key]

    def _require_alike(
        self, calls: Calls, known: Calls, forms: Mapping[str, Form], size: int
    ) -> None:
        for name, site in self.sites.items():
            made = calls.of_module.get(name)
            alike = made and made == known.of_module.get(name)
            alike = alike and all(
                site.fits(forms[call], form_of(calls.given[call]), size)
                for call in known.seen(name)
            )
            if not alike or name in calls.opaque:
                raise Unlike(name)

    def _zeros(self, known: Calls, size: int) -> dict[str, Tensor]:
        """The taps of a batch: zeros in the shapes of the sites' outputs."""
        return {
            key: zero
            for site in self.sites.values()
            for call in known.seen(site.name)
            for key, zero in site.zeros(known, call, size).items()
        }


def _call(key: str) -> str:
    """The call of an output."""
    return key.rpartition("/")[0]


def _site(call: str) -> str:
    """The site of a call."""
    return call.rpartition("#")[0]
