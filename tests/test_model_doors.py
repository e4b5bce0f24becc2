"""What is looked at before any work: what a model is for, and whether it gives what is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from ird_search import SearchConfig, apply_mask, fisher_scores, search_mask
from ird_search.errors import DataError, IRDError, ModelError, UsageError
from ird_search.fit import look
from ird_search.mask import SparseMask
from ird_search.parameters import ParameterSpace, head_parameters
from tests.tiny import tiny_gpt2
from tests.toy import QUICK, bits, same_bits, toy_net, toy_rows

SMALL: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 16,
}


def token_rows(count: int = 40) -> list[dict[str, list[int]]]:
    draw = np.random.default_rng(0)
    ids = [draw.integers(1, 20, draw.integers(4, 9)).tolist() for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in ids]


# --- what a model is for ------------------------------------------------------------------------


@pytest.mark.parametrize("model", [BertForTokenClassification, BertForMaskedLM])
def test_a_model_for_another_purpose_is_refused(model: type[PreTrainedModel]) -> None:
    for door in (fisher_scores, search_mask):
        with pytest.raises(
            ModelError, match=rf"{model.__name__} came, a model for .* are accepted"
        ):
            door(model(BertConfig(**SMALL)), token_rows())


@pytest.mark.parametrize("task", ["auto", "causal-lm"])
def test_a_model_that_sees_later_tokens_is_no_language_model(task: str) -> None:
    """It would see what it is to predict."""
    model = BertLMHeadModel(BertConfig(**SMALL)).eval()
    before = bits(model)
    with pytest.raises(ModelError, match=r"BertLMHeadModel is no causal language model.*label"):
        fisher_scores(model, token_rows(), task=task)
    assert same_bits(before, model)


@pytest.mark.parametrize(
    "model",
    [
        lambda: BertLMHeadModel(BertConfig(**SMALL, is_decoder=True)),
        lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
        lambda: LlamaForCausalLM(LlamaConfig(**SMALL)).bfloat16(),
        tiny_gpt2,
    ],
    ids=["bert as a decoder", "llama", "llama in half precision", "gpt2"],
)
def test_a_causal_model_is_taken(model: Callable[[], nn.Module]) -> None:
    rows = [{name: [min(i, 7) for i in ids] for name, ids in r.items()} for r in token_rows(4)]
    assert fisher_scores(model(), rows).by_sample.gt(0).all()


def test_padding_that_rows_brought_hides_no_later_token() -> None:
    rows = [
        {"input_ids": r["input_ids"] + [0], "attention_mask": [1] * len(r["input_ids"]) + [0]}
        for r in token_rows(4)
    ]
    with pytest.raises(ModelError, match="no causal language model"):
        fisher_scores(BertLMHeadModel(BertConfig(**SMALL)), rows, task="causal-lm")


# --- what it gives ------------------------------------------------------------------------------


def test_probabilities_are_no_logits() -> None:
    with pytest.raises(ModelError, match=r"gives probabilities .* Leave out its softmax"):
        fisher_scores(nn.Sequential(*toy_net(), nn.Softmax(-1)), toy_rows())
    half = nn.Sequential(*toy_net(), nn.Softmax(-1)).bfloat16()
    with pytest.raises(ModelError, match="gives probabilities"):
        fisher_scores(half, [(x.bfloat16(), y) for x, y in toy_rows()])
    log_probabilities = nn.Sequential(*toy_net(), nn.LogSoftmax(-1))
    found = fisher_scores(log_probabilities, toy_rows()).by_sample
    torch.testing.assert_close(found, fisher_scores(toy_net(), toy_rows()).by_sample)


def test_logits_that_sum_to_one_by_chance_are_no_probabilities() -> None:
    class Chance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = toy_net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = self.net(x).abs()
            first = torch.isclose(x, toy_rows()[0][0]).all(-1, keepdim=True)
            return torch.where(first, logits / logits.sum(-1, keepdim=True), logits)

    assert fisher_scores(Chance(), toy_rows()).by_sample.isfinite().all()


@pytest.mark.parametrize("door", [fisher_scores, search_mask])
def test_a_sample_that_the_model_cannot_take_is_told_with_its_row(door: Any) -> None:
    narrow = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    with pytest.raises(DataError, match=r"a list, row 0 \(counting from 0\): .* cannot take"):
        door(narrow, toy_rows())


def test_one_output_is_no_classification() -> None:
    with pytest.raises(UsageError, match=r"not 1\. .*task='regression'"):
        fisher_scores(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1)), toy_rows())


# --- its classes and its head, as it runs -------------------------------------------------------


class HeadFirst(nn.Module):
    """What is made first is called last, and behind both stands a layer of one number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.classifier, self.body, self.gate = nn.Linear(8, 3), nn.Linear(4, 8), nn.Linear(4, 1)

    def forward(self, input: Tensor) -> Tensor:
        found: Tensor = self.classifier(self.body(input).tanh() * self.gate(input))
        return found


def test_classes_and_head_are_what_comes_last_as_the_model_runs() -> None:
    model = HeadFirst()
    seen = look(model, {"input": torch.randn(1, 4)})
    assert seen.last == "classifier" and seen.logits.shape == (1, 3)
    assert not any(m._forward_hooks for m in model.modules()) and model.training
    found = fisher_scores(model, toy_rows(), fisher="expected")
    assert set(found.by_parameter) == {"body.weight", "body.bias", "gate.weight", "gate.bias"}
    result = search_mask(HeadFirst(), toy_rows(), **QUICK)
    assert result.provenance["head"] == ["classifier.weight", "classifier.bias"]
    assert result.provenance["task"]["num_labels"] == 3


def test_all_classes_of_a_model_count_where_the_data_have_fewer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5), nn.LayerNorm(5))
    found = fisher_scores(model, toy_rows(6), fisher="expected", head=[], method="taps")
    want = torch.zeros(8, 4, dtype=torch.float64)
    for x, _ in toy_rows(6):
        for label in range(5):
            model.zero_grad()
            log_p = model(x[None]).log_softmax(-1)[0, label]
            log_p.backward()
            assert model[0].weight.grad is not None
            want += log_p.exp().item() * model[0].weight.grad.double().square() / 6
    torch.testing.assert_close(found.by_parameter["0.weight"].double(), want, rtol=1e-4, atol=1e-10)


class Rooted(nn.Module):
    """The outermost module has a parameter of its own, and ends after its head."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.body, self.head = nn.Parameter(torch.ones(8)), *toy_net()[::2]

    def forward(self, input: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(input).tanh() + self.token)
        return found


class Aside(Rooted):
    """Something else is computed behind the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.Linear(8, 1)

    def forward(self, input: Tensor) -> Any:
        hidden = self.body(input).tanh()
        return self.head(hidden), self.aside(hidden)


class Cosine(Rooted):
    """The head's weight is read by a function."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(self.body(input), self.head.weight)


@pytest.mark.parametrize("model", [Rooted, Aside, Cosine])
def test_the_head_is_the_layer_that_gives_the_logits(model: type[Rooted]) -> None:
    candidates = set(fisher_scores(model(), toy_rows()).by_parameter)
    assert {"token", "body.weight", "body.bias"} <= candidates
    assert not {"head.weight", "head.bias"} & candidates


def test_a_scripted_model_has_a_head_as_before() -> None:
    scripted = torch.jit.script(toy_net())
    found = fisher_scores(scripted, toy_rows(), method="loop")
    want = fisher_scores(toy_net(), toy_rows())
    assert found.by_parameter.keys() == want.by_parameter.keys()
    torch.testing.assert_close(found.by_sample, want.by_sample, rtol=1e-5, atol=0.0)


class Counting(nn.Module):
    """It writes down how often it was called: in place, and by a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.net = toy_net()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("again", torch.zeros(1).expand(3))

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        self.again = self.again + 1
        found: Tensor = self.net(input)
        return found


def test_a_look_leaves_no_trace() -> None:
    model = Counting()
    before = {name: buffer for name, buffer in model.named_buffers()}
    look(model, {"input": torch.randn(1, 4)})
    assert all(model.get_buffer(name) is buffer for name, buffer in before.items())
    assert model.calls == 0 and not model.again.any()


def test_a_model_without_parameters_is_refused_in_words() -> None:
    with pytest.raises(ModelError, match="No parameter is left"):
        fisher_scores(nn.Flatten(), [(torch.randn(2), i % 2) for i in range(8)])


class Wrapper(PreTrainedModel):
    """A whole classifier inside the base."""

    config_class = PreTrainedConfig
    base_model_prefix = "inner"

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.inner = toy_net()


def test_a_head_inside_the_base_model_is_one() -> None:
    assert head_parameters(Wrapper(PreTrainedConfig())) == ("inner.2.weight", "inner.2.bias")


# --- where it is --------------------------------------------------------------------------------


def test_a_model_that_is_nowhere_in_part_keeps_its_weights() -> None:
    model = toy_net()
    model[0] = nn.Linear(4, 8, device="meta")
    before = bits(model[2])
    with pytest.raises(ModelError, match=r"0\.weight \[8, 4\] is on the meta device"):
        fisher_scores(model, toy_rows())
    assert same_bits(before, model[2]) and model[0].weight.is_meta


def test_a_layer_without_a_shape_is_told() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 2))
    with pytest.raises(ModelError, match=r"0\.weight has no shape yet: its layer is lazy"):
        fisher_scores(model, toy_rows())


@pytest.mark.parametrize("door", [fisher_scores, search_mask])
def test_a_model_under_a_mask_is_refused(door: Any) -> None:
    model = toy_net()
    mask = SparseMask(ParameterSpace.of(model, ["0.weight"]), torch.tensor([1]))
    with apply_mask(model, mask), pytest.raises(UsageError, match=r"under a mask.*remove"):
        door(model, toy_rows())
    assert fisher_scores(model, toy_rows()).by_parameter["0.weight"].gt(0).all()


# --- other things than were meant ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: fisher_scores(nn.Linear, toy_rows()), "The class Linear came as the model"),
        (lambda: search_mask(None, toy_rows()), "None came as the model"),
        (
            lambda: fisher_scores(toy_net(), toy_rows(), processor="bert"),
            "The processor is 'bert'; a tokenizer",
        ),
        (
            lambda: search_mask(toy_net(), toy_rows(), config={"density": 0.1}),
            "config is a dict; a SearchConfig",
        ),
    ],
)
def test_arguments_of_another_kind(call: Callable[[], object], told: str) -> None:
    with pytest.raises(UsageError, match=told) as e:
        call()
    assert isinstance(e.value, IRDError) and e.value.exit_code == 2


def test_numbers_of_numpy_are_numbers() -> None:
    config = SearchConfig(pool=np.int64(64), density=np.float32(0.25), floor=np.float64(0))
    assert config == SearchConfig(pool=64, density=0.25, floor=0.0)
    assert type(config.pool) is int and type(config.density) is float
    with pytest.raises(UsageError, match=r"pool is 64\.0; it must be a whole number"):
        SearchConfig(pool=64.0)  # type: ignore[arg-type]


def test_budgets_that_contradict_each_other() -> None:
    with pytest.raises(UsageError, match=r"probe_steps \(100\) is larger than proxy_steps \(40\)"):
        SearchConfig(probe_steps=100, proxy_steps=40)
