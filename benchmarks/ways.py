"""The ways to the Fisher information that `bench_fisher` compares, and what they are tried on.

Models of three shapes with random weights, samples of equal length, each way as one call, and what
every way should answer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from ird_search.fisher import FLOOR, Engine, FisherMatrix, Marginals, make_engine
from ird_search.fisher.vmap import VMap
from ird_search.parameters import ParameterSpace, candidate_space, head_parameters
from ird_search.samples import SampleSet
from ird_search.task import Classification

DENSITY = 0.005
TASK = Classification(2)

PLAIN = "plain forward+backward"
TAPS = "taps, score in mask"
SELECTED = "taps, mask's entries only"
LOOP = "loop, batch of one, no row scores"
BY_TAPS = (TAPS, "taps", "taps, row scores only", SELECTED)
BY_VMAP = ("vmap, chunk 4",)
BY_OPACUS = ("opacus, batch 8", "opacus, batch 32")
WHOLE_TABLES = (*BY_VMAP, *BY_OPACUS)
"""They form a whole embedding table for every sample, minutes and gigabytes: left out there."""


class Shape(NamedTuple):
    """A model of random weights, and what is measured on it.

    Args:
        samples: how many; plain passes take so many at a time.
        ways: what is timed.
    """

    title: str
    model: Callable[[], nn.Module]
    samples: int
    ways: tuple[str, ...]


class Setting(NamedTuple):
    """A model, the samples, and the candidate parameters."""

    model: nn.Module
    samples: SampleSet
    space: ParameterSpace
    mask: Tensor


class Answers(NamedTuple):
    """What a way says, None where it does not: Σᵢ F[i, j], Σⱼ F[i, j], Σ_{j ∈ mask} F[i, j]."""

    columns: Tensor | None = None
    rows: Tensor | None = None
    inside: Tensor | None = None


def minilm() -> BertForSequenceClassification:
    """MiniLM-L6's shape, random weights."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    )
    return BertForSequenceClassification(config).eval()


def bert_base() -> BertForSequenceClassification:
    """BERT-base's shape, random weights."""
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig()).eval()


def llama() -> LlamaForSequenceClassification:
    """A Llama-like decoder with a classification head, random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=8192,
        num_labels=2,
        pad_token_id=0,
    )
    return LlamaForSequenceClassification(config).eval()


MODELS = {
    "minilm": Shape(
        "BERT, MiniLM-L6's shape",
        minilm,
        samples=32,
        ways=(PLAIN, *BY_TAPS, *BY_VMAP, LOOP, *BY_OPACUS),
    ),
    "bert-base": Shape(
        "BERT-base's shape",
        bert_base,
        samples=16,
        ways=(PLAIN, TAPS, SELECTED, LOOP, BY_OPACUS[0]),
    ),
    "llama-1b": Shape(
        "Llama-like: 16 layers, hidden 2048, intermediate 8192, 32 heads on 8 of keys and values",
        llama,
        samples=2,
        ways=(PLAIN, TAPS, SELECTED, LOOP),
    ),
}


def setting(model: nn.Module, tokens: int, *, embeddings: bool, count: int) -> Setting:
    """Samples of equal length; everything that is no candidate is frozen."""
    model.requires_grad_(True)
    space = candidate_space(model, head=head_parameters(model), embeddings=embeddings)
    for name, p in model.named_parameters():
        p.requires_grad_(name in space)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(1, model.config.vocab_size, (count, tokens), generator=generator)
    inputs = tuple({"input_ids": r, "attention_mask": torch.ones_like(r)} for r in rows)
    samples = SampleSet(inputs, torch.arange(count) % 2, torch.arange(count))
    chosen = torch.randint(space.numel, (int(DENSITY * space.numel),), generator=generator)
    return Setting(model, samples, space, chosen.unique())


# --- the ways ------------------------------------------------------------------------------------


def plain(s: Setting, size: int) -> None:
    """One forward and backward for so many samples at a time."""
    s.model.zero_grad(set_to_none=True)
    for batch in s.samples.batches(size=size):
        logits = s.model(**batch.inputs).logits
        nn.functional.cross_entropy(logits, batch.labels).backward()
    s.model.zero_grad(set_to_none=True)


def loop(s: Setting) -> list[Tensor]:
    """As the published code: per sample a backward, and its squares into a sum."""
    weights = [p for p in s.model.parameters() if p.requires_grad]
    sums = [torch.zeros_like(p) for p in weights]
    for batch in s.samples.batches(size=1):
        s.model.zero_grad()
        nn.functional.cross_entropy(s.model(**batch.inputs).logits, batch.labels).backward()
        for total, p in zip(sums, weights, strict=True):
            total.add_(p.grad.square())
    s.model.zero_grad()
    return sums


def opacus(s: Setting, size: int) -> tuple[list[Tensor], Tensor]:
    """Each sample's gradient by Opacus, so many at a time: column sums, row scores in the mask."""
    from opacus import GradSampleModule

    weights = {n: p for n, p in s.model.named_parameters() if p.requires_grad}
    sums = {n: torch.zeros_like(p) for n, p in weights.items()}
    chosen, scores = s.space.localize(s.mask), torch.zeros(len(s.samples))
    wrapped = GradSampleModule(s.model, loss_reduction="sum")
    for module in s.model.modules():  # it looks at modules in training only; dropout stays off
        module.training = any(True for _ in module.parameters(recurse=False))
    for batch in s.samples.batches(size=size):
        logits = wrapped(**batch.inputs).logits
        nn.functional.cross_entropy(logits, batch.labels, reduction="sum").backward()
        for name, p in weights.items():
            squares = p.grad_sample.square_()
            sums[name] += squares.sum(0)
            if name in chosen:
                scores[batch.rows] += squares.flatten(1)[:, chosen[name]].sum(1)
            p.grad = p.grad_sample = None
    wrapped.to_standard_module().eval()
    return list(sums.values()), scores


def reference(s: Setting) -> Answers:
    """Everything that any way answers, the obvious way."""
    weights = [p for p in s.model.parameters() if p.requires_grad]
    columns, mask = torch.zeros(s.space.numel), s.space.localize(s.mask)
    sums, nothing = s.space.split(columns), torch.empty(0, dtype=torch.int64)
    rows, inside = torch.zeros(2, len(s.samples), dtype=torch.float64)
    for b, batch in enumerate(s.samples.batches(size=1)):
        loss = nn.functional.cross_entropy(s.model(**batch.inputs).logits, batch.labels)
        for name, g in zip(sums, torch.autograd.grad(loss, weights), strict=True):
            squares = g.square_()
            sums[name] += squares
            rows[b] += squares.sum()
            inside[b] += squares.flatten()[mask.get(name, nothing)].sum()
    return Answers(columns, rows, inside)


def way(name: str, s: Setting, engine: Engine) -> Callable[[], Any]:
    """The call that is timed."""
    if name == PLAIN:
        return lambda: plain(s, len(s.samples))
    if name == LOOP:
        return lambda: loop(s)
    if name in BY_OPACUS:
        return lambda: opacus(s, int(name.split()[-1]))
    rows, tokens = torch.arange(len(s.samples)), 512
    if name in BY_VMAP:
        engine = VMap(s.model, TASK, s.space.names, chunk=int(name.split()[-1]))
        tokens = int(s.samples.lengths.sum())  # or the batch would cut the chunk
    matrix = FisherMatrix(engine, s.samples, s.space, tokens=tokens, cache_bytes=0)
    return {
        "taps": matrix.marginals,
        "taps, row scores only": lambda: matrix.row_scores(rows),
        SELECTED: lambda: matrix.row_scores(rows, s.mask),
    }.get(name, lambda: matrix.marginals(within=s.mask))


def answers(name: str, found: Any, s: Setting) -> Answers:
    """What a call has returned."""
    if isinstance(found, Marginals):
        columns = found.columns.mul_(len(s.samples))
        return Answers(columns, **{"rows" if name == "taps" else "inside": found.rows})
    if isinstance(found, Tensor):
        return Answers(**{"inside" if name == SELECTED else "rows": found})
    sums, inside = found if isinstance(found, tuple) else (found, None)
    return Answers(s.space.flatten(dict(zip(s.space.names, sums, strict=True))), inside=inside)


def error(found: Answers, true: Answers, space: ParameterSpace) -> float:
    """The largest relative error: of a tensor's column sums, of a sample's scores."""
    errors = [0.0]
    if found.columns is not None:
        least = FLOOR * float(true.columns.norm())
        ours, theirs = space.split(found.columns), space.split(true.columns)
        for name in space.names:
            wrong, scale = (ours[name] - theirs[name]).norm(), theirs[name].norm()
            errors.append(float(wrong) / max(float(scale), least))
    for mine, its in ((found.rows, true.rows), (found.inside, true.inside)):
        if mine is not None:
            errors.append(float(((mine - its) / its).abs().max()))
    return max(errors)


def all_ways(s: Setting, shape: Shape, *, embeddings: bool) -> dict[str, Callable[[], Any]]:
    """All ways that are there."""
    names = [n for n in shape.ways if available(n) and not (embeddings and n in WHOLE_TABLES)]
    engine = make_engine(s.model, TASK, s.space, example=s.samples.batch([0, 1]))
    return {name: way(name, s, engine) for name in names}


def available(name: str) -> bool:
    """Whether the library that a way needs is here."""
    if name in BY_OPACUS and find_spec("opacus") is None:
        print(
            f"{name!r} is left out: Opacus is missing; pip install 'ird_search[bench]'.",
            file=sys.stderr,
        )
        return False
    return True
