"""The Fisher engine: per-sample squared gradients of the log-likelihood, exact and streamed.

Three paths give the same numbers: `taps` (fast), `vmap` (general), `loop` (always works).
`make_engine` picks one, compares it with the loop on two samples, and falls back with a warning
where they disagree. `LabelRule` says whose labels they see: a path knows nothing of it.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ird_search.errors import first_line, out_of_memory
from ird_search.fisher.engine import Contribution, Elsewhere, Engine, Joined
from ird_search.fisher.gradients import SampleGradients
from ird_search.fisher.labels import LabelRule, label_problems
from ird_search.fisher.loop import Loop
from ird_search.fisher.matrix import FisherMatrix, Marginals
from ird_search.fisher.moments import Moments
from ird_search.fisher.record import Memory, PassRecord
from ird_search.fisher.rules import register_rule
from ird_search.fisher.taps import Taps
from ird_search.fisher.vmap import VMap
from ird_search.parameters import ParameterSpace
from ird_search.samples import Batch
from ird_search.task import Task

__all__ = [
    "Contribution",
    "Elsewhere",
    "Engine",
    "FallbackWarning",
    "FisherMatrix",
    "LabelRule",
    "Loop",
    "Marginals",
    "Memory",
    "Moments",
    "PassRecord",
    "SampleGradients",
    "label_problems",
    "make_engine",
    "register_rule",
    "self_check",
]

log = logging.getLogger(__name__)

CHECKED = 2
"""Samples that are compared with the loop: more than one, or a path that mixes them would pass."""
EXAMPLES = 8
"""Samples tried for that; those without a finite gradient cannot be compared."""

TOLERANCE = 1e-4
"""Largest relative error of a tensor's gradient against the loop."""
TOLERANCE_HALF = 5e-2
"""The same where weights are half precision, of all tensors together: what these round."""
FLOOR = 1e-2
"""A tensor's error counts relative to this share of the whole gradient at least: the true gradient
of an attention key's bias is zero, and what is computed for it is rounding noise."""


class FallbackWarning(UserWarning):
    """A path of the Fisher engine does not work on this model; a slower one is used."""


def make_engine(
    model: nn.Module, task: Task, space: ParameterSpace, *, example: Batch, method: str = "auto"
) -> Engine:
    """The fastest path that agrees with the loop on this model.

    Args:
        example: samples for the self-check; the first two with a finite gradient are used.
        method: "auto" (taps first), or the path to try first: "taps", "vmap", "loop".
    """
    loop = Loop(model, task, space.names)
    chosen: Engine = loop
    order = ["taps", "cautious taps", "vmap"]
    first = {"auto": 0, "taps": 0, "vmap": 2, "loop": 3}[method]
    reasons = []
    for path in order[first:]:
        running: list[str] = []
        try:
            with _listed(model, running):
                if (engine := _build(path, model, task, space, example)) is None:
                    continue
                with _full_precision():
                    error, allowed = self_check(engine, loop, example)
        except Exception as problem:
            if out_of_memory(problem):
                raise
            told = first_line(problem)[:200]
            where = f" in {running[-1]}" if running else ""
            reasons.append(f"{path!r} fails{where}: {type(problem).__name__}: {told}")
        else:
            if error <= allowed:
                log.info("Fisher path %s, error against the loop %.1e", engine.path, error)
                chosen = engine
                break
            reasons.append(f"{path!r} is off the loop by {error:.1e}, more than {allowed:.0e}")
    if reasons and not chosen.path.startswith("taps"):
        warnings.warn(
            f"On {type(model).__name__} the Fisher path {chosen.path!r} is used: "
            f"{'; '.join(reasons)}.",
            FallbackWarning,
            stacklevel=2,
        )
    return chosen


def _build(
    path: str, model: nn.Module, task: Task, space: ParameterSpace, example: Batch
) -> Engine | None:
    """Taps where they reach, vmap for the rest; or vmap for all.

    None for cautious taps that would be no other than the plain ones.
    """
    if path == "vmap":
        return VMap(model, task, space.names)
    taps = Taps(model, task, space.names, example=example)
    if path == "cautious taps":
        if not taps.doubtful:
            return None
        taps = Taps(model, task, space.names, example=example, cautious=True)
    if not taps.uncovered:
        return taps
    log.info("No tap reaches %s; vmap computes these.", ", ".join(taps.uncovered))
    rest = VMap(model, task, taps.uncovered)
    return Joined(taps, rest) if taps.names else rest


@contextmanager
def _listed(model: nn.Module, running: list[str]) -> Iterator[None]:
    """Keep a list of the modules that are running, the innermost last; an error leaves it as is."""

    def enters(told: str) -> None:
        running.append(told)

    def leaves() -> None:
        running.pop()

    with ExitStack() as stack:
        for name, module in model.named_modules():
            told = f"{name or 'the model'} ({type(module).__name__})"
            before = module.register_forward_pre_hook(lambda *_, told=told: enters(told))
            stack.callback(before.remove)
            stack.callback(module.register_forward_hook(lambda *_: leaves()).remove)
        yield


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32 meanwhile: the check compares formulas, and TF32 alone errs by more than it allows.

    cuDNN's convolutions use it by default.
    """
    before, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
    torch.set_float32_matmul_precision("highest")
    try:
        with cudnn.flags(
            enabled=cudnn.enabled,
            benchmark=cudnn.benchmark,
            deterministic=cudnn.deterministic,
            allow_tf32=False,
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def self_check(engine: Engine, reference: Loop, example: Batch) -> tuple[float, float]:
    """Compare the per-sample gradients of the first samples that have finite ones.

    Returns:
        The largest relative error, ∞ where the two disagree on what is finite, and the error that
        is allowed. Samples without a finite gradient are not compared; where no sample has one,
        the error is 0.
    """
    batch = Batch(
        {k: v[:EXAMPLES] for k, v in example.inputs.items()},
        example.labels[:EXAMPLES],
        example.rows[:EXAMPLES],
    )
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in reference.model.parameters())
    ours = list(engine.gradients(batch))
    worst, compared = 0.0, 0
    for theirs in reference.gradients(batch):
        row = theirs.part.start
        mine = next(c for c in ours if c.part.start <= row < c.part.stop)
        at = row - mine.part.start
        if bool(mine.finite[at]) != bool(theirs.finite[0]):
            return math.inf, TOLERANCE
        if theirs.finite[0]:
            worst = max(worst, _error(mine, at, theirs, floor=1.0 if half else FLOOR))
            compared += 1
        theirs.tensors.clear()  # or two whole gradients would be held while the next is computed
        if compared == CHECKED:
            break
    if not compared:
        log.warning("Path %s is not checked: no sample has a finite gradient.", engine.path)
    return worst, TOLERANCE_HALF if half else TOLERANCE


def _error(ours: Contribution, at: int, theirs: Contribution, *, floor: float) -> float:
    """max over tensors of ‖g − g′‖ / max(‖g′‖, floor · ‖all g′‖), for one sample."""
    norms = {n: float(g.dense().norm()) for n, g in theirs.tensors.items()}
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    worst = 0.0
    for name, g in theirs.tensors.items():
        found = ours.tensors[name].select(slice(at, at + 1)).dense()
        scale = max(norms[name], floor * total)
        wrong = float((found - g.dense()).norm())
        error = wrong / scale if scale else wrong
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst
