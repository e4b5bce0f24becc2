"""The Fisher engine: per-sample squared gradients of the log-likelihood, exact and streamed.

Three paths give the same numbers: `taps` (fast), `vmap` (general), `loop` (always works).
`make_engine` picks one, compares it with the loop on two samples, and falls back with a warning
when they disagree.
"""

from __future__ import annotations

import logging
import warnings

import torch
from torch import nn

from ird_search.fisher.engine import Contribution, Engine, Joined
from ird_search.fisher.gradients import SampleGradients
from ird_search.fisher.loop import Loop
from ird_search.fisher.matrix import FisherMatrix, Marginals
from ird_search.fisher.rules import register_rule
from ird_search.fisher.taps import Taps
from ird_search.fisher.vmap import VMap
from ird_search.parameters import ParameterSpace
from ird_search.samples import Batch
from ird_search.task import Task

__all__ = [
    "Contribution",
    "Engine",
    "FisherMatrix",
    "Marginals",
    "SampleGradients",
    "make_engine",
    "register_rule",
    "self_check",
]

log = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
"""Largest relative error against the loop; half precision is allowed what it rounds."""
TOLERANCE_HALF = 5e-2


class FallbackWarning(UserWarning):
    """A path of the Fisher engine does not work on this model; a slower one is used."""


def make_engine(
    model: nn.Module, task: Task, space: ParameterSpace, *, example: Batch, method: str = "auto"
) -> Engine:
    """The fastest path that agrees with the loop on this model.

    Args:
        example: samples for the self-check; the first two are used.
        method: "auto" (taps first), or the path to try first: "taps", "vmap", "loop".
    """
    order = ["taps", "vmap", "loop"]
    for path in order[0 if method == "auto" else order.index(method) :]:
        if path == "loop":
            break
        try:
            engine = _build(path, model, task, space, example)
            error, allowed = self_check(engine, Loop(model, task, space.names), example)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as problem:
            reason = f"it fails: {type(problem).__name__}: {str(problem).splitlines()[0][:200]}"
        else:
            if error <= allowed:
                log.info("Fisher path %s, error against the loop %.1e", engine.path, error)
                return engine
            reason = f"its error against the loop is {error:.1e}, more than {allowed:.0e}"
        warnings.warn(
            f"The Fisher path {path!r} is not used on {type(model).__name__}: {reason}.",
            FallbackWarning,
            stacklevel=2,
        )
    return Loop(model, task, space.names)


def _build(
    path: str, model: nn.Module, task: Task, space: ParameterSpace, example: Batch
) -> Engine:
    """Taps where they reach, vmap for the rest; or vmap for all."""
    if path == "vmap":
        return VMap(model, task, space.names)
    taps = Taps(model, task, space.names, example=example)
    if not taps.uncovered:
        return taps
    log.info("No tap reaches %s; vmap computes these.", ", ".join(taps.uncovered))
    rest = VMap(model, task, taps.uncovered)
    return Joined([taps, rest]) if taps.names else rest


def self_check(engine: Engine, reference: Engine, example: Batch) -> tuple[float, float]:
    """(relative error of the per-sample gradients on two samples, the error that is allowed)."""
    batch = Batch(
        {k: v[:2] for k, v in example.inputs.items()}, example.labels[:2], example.rows[:2]
    )
    ours, theirs = _gradients(engine, batch), _gradients(reference, batch)
    wrong = sum(float((ours[n] - g).square().sum(dtype=torch.float64)) for n, g in theirs.items())
    total = sum(float(g.square().sum(dtype=torch.float64)) for g in theirs.values())
    dtype = next(iter(theirs.values())).dtype if theirs else torch.float32
    weights = {p.dtype for p in getattr(reference, "model", nn.Module()).parameters()}
    half = any(d in (torch.bfloat16, torch.float16) for d in weights)
    allowed = TOLERANCE_HALF if half else TOLERANCE[dtype]
    return (wrong / total) ** 0.5 if total else wrong**0.5, allowed


def _gradients(engine: Engine, batch: Batch) -> dict[str, torch.Tensor]:
    """All gradients of a small batch, dense: [B, P_l] by name."""
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in engine.names}
    for contribution in engine.gradients(batch):
        for name, gradients in contribution.tensors.items():
            parts[name].append(gradients.dense())
    return {name: torch.cat(rows) for name, rows in parts.items()}
