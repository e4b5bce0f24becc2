"""Tiny models × data, each with the reason why it is here."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ird_search.parameters import ParameterSpace
from ird_search.samples import SampleSet
from ird_search.task import IGNORED, CausalLM, Classification, Regression, Task
from tests.tiny import VOCABULARY, tiny_bert, tiny_gpt2, tiny_vit

LENGTHS = (5, 3, 9, 4, 7, 5)
"""Tokens of the six text rows: every batch of them is padded."""


@dataclass(frozen=True, eq=False)
class Problem:
    """A model in eval mode, what it is to predict, and six samples."""

    model: nn.Module
    task: Task
    samples: SampleSet
    space: ParameterSpace


@dataclass(frozen=True)
class Case:
    """One problem.

    Args:
        reason: what would go wrong here and nowhere else.
        path: the path that `method="auto"` is to end on.
        needs: a package without which it cannot be made.
    """

    name: str
    reason: str
    make: Callable[[], Problem]
    path: str = "taps"
    needs: str = ""


def problem(
    model: nn.Module, task: Task, samples: SampleSet, names: list[str] | None = None
) -> Problem:
    """All trainable parameters are candidates unless named."""
    wanted = names or [n for n, p in model.named_parameters() if p.requires_grad]
    return Problem(model.eval(), task, samples, ParameterSpace.of(model, wanted))


def vectors(*shape: int, classes: int = 3) -> SampleSet:
    """Six random tensors with classes; numbers as labels where `classes` is 0."""
    labels = torch.arange(6) % classes if classes else torch.randn(6)
    inputs = tuple({"input": torch.randn(shape)} for _ in range(6))
    return SampleSet(inputs, labels, torch.arange(6))


def texts(labels: Tensor | tuple[Tensor, ...] | None = None) -> SampleSet:
    """Six rows of tokens with an attention mask, of different lengths."""
    ids = [torch.randint(5, len(VOCABULARY), (n,)) for n in LENGTHS]
    inputs = tuple({"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids)
    return SampleSet(inputs, torch.arange(6) % 2 if labels is None else labels, torch.arange(6))


def prompts() -> SampleSet:
    """Rows whose first two tokens carry no likelihood."""
    rows = texts()
    labels = tuple(row["input_ids"].clone() for row in rows.inputs)
    for label in labels:
        label[:2] = IGNORED
    return SampleSet(rows.inputs, labels, rows.ids)


class Twice(nn.Module):
    """One layer used twice: G = G₁ + G₂, before any square."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, input: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(torch.tanh(self.inner(input)))))


class TiedLinear(nn.Module):
    """Two layers with one weight, and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, input: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.first(input)))))


class Residual(nn.Module):
    """ResNet's block in small: BatchNorm, a ReLU in place, a sum in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False)
        self.norm, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding="same")
        self.head = nn.Linear(4, 3)
        for norm in (self.norm, self.norm2):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)

    def forward(self, input: Tensor) -> Tensor:
        x = torch.relu_(self.norm(self.stem(input)))
        y = self.norm2(self.conv(x))
        y += x
        return self.head(torch.relu_(y).mean((2, 3)))


class Sequence(nn.Module):
    """torch's own encoder layer: tokens first inside, weights used without their module."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=False)
        self.head = nn.Linear(8, 3)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.layer(input.transpose(0, 1)).mean(0))


def _mlp() -> Problem:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))
    return problem(model, Classification(3), vectors(5))


def _tokens() -> Problem:
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3))
    return problem(model, Classification(3), vectors(3, 5))


def _conv() -> Problem:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, dilation=2),
        nn.Tanh(),
        nn.Conv2d(6, 6, (1, 2), groups=3, bias=False),
        nn.GroupNorm(2, 6),
        nn.Flatten(),
        nn.Linear(18, 3),
    )
    return problem(model, Classification(3), vectors(3, 8, 6))


def _bert(attention: str) -> Problem:
    model = tiny_bert()
    model.set_attn_implementation(attention)
    return problem(model, Classification(2), texts())


def _gpt2() -> Problem:
    return problem(tiny_gpt2(), CausalLM(), prompts())


def _llama() -> Problem:
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    return problem(LlamaForCausalLM(config), CausalLM(), prompts())


def _vit() -> Problem:
    rows = vectors(3, 8, 8, classes=2)
    inputs = tuple({"pixel_values": row["input"]} for row in rows.inputs)
    samples = SampleSet(inputs, rows.labels, rows.ids)
    return problem(tiny_vit(), Classification(2), samples)


def _lora() -> Problem:
    config = LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    with warnings.catch_warnings():
        # peft still asks transformers for a name that is on its way out.
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(tiny_bert(), config)
    return problem(model, Classification(2), texts())


def _regression() -> Problem:
    model = tiny_bert(num_labels=1)
    return problem(model, Regression(), texts(torch.randn(6)))


def _frozen() -> Problem:
    model = tiny_bert()
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].requires_grad_(False)
    return problem(model, Classification(2), texts())


def _candidate_frozen() -> Problem:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    model[0].requires_grad_(False)
    return problem(model, Classification(3), vectors(5), ["0.weight", "2.bias"])


CASES = (
    Case("mlp", "one token a sample: G² = g² ⊗ a², one product for all samples", _mlp),
    Case("tokens", "several tokens without a padding: the ghost norm", _tokens),
    Case("conv", "patches: stride, padding, dilation; groups by the general rule", _conv),
    Case("bert-eager", "padded rows, written-out attention", lambda: _bert("eager")),
    Case("bert-sdpa", "padded rows, fused attention, broadcast positions", lambda: _bert("sdpa")),
    Case("gpt2", "transposed weights; a table tied to the output; prompts", _gpt2),
    Case("llama", "RMSNorm by the general rule, grouped queries, rotary positions", _llama),
    Case("vit", "a class token that a module with children holds", _vit),
    Case("lora", "adapters inside wrapped modules, everything else frozen", _lora),
    Case("regression", "one number a sample", _regression),
    Case("frozen", "a part that takes no gradient", _frozen),
    Case("candidate-frozen", "a candidate that does not require a gradient", _candidate_frozen),
    Case("twice", "a module that runs twice", lambda: problem(Twice(), _three(), vectors(4))),
    Case("tied", "one weight in two modules", lambda: problem(TiedLinear(), _three(), vectors(4))),
    Case("batchnorm", "in eval", lambda: problem(Residual(), _three(), vectors(3, 8, 8))),
    Case(
        "tokens-first",
        "the leading axis is not the batch; weights used by a function",
        lambda: problem(Sequence(), _three(), vectors(5, 8)),
        "taps+vmap",
    ),
)


def _three() -> Task:
    return Classification(3)


def made(case: Case) -> Problem:
    """The problem of a case, equal at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return case.make()


def named(name: str) -> Problem:
    """The problem of the case of that name."""
    return made(next(case for case in CASES if case.name == name))
