"""FISH-Tuning: masks over the parameters that adapters add."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ird_search import SearchResult, fisher_scores, search_mask
from ird_search.candidate import Candidate
from ird_search.errors import ModelError, UsageError
from ird_search.optimizer import MaskedAdamW
from ird_search.parameters import ParameterSpace
from ird_search.problem import _told
from ird_search.proxy import Proxies
from ird_search.scoring import STEPS, ScoringPoint, scoring_steps
from ird_search.task import logits_of
from ird_search.training import Diverged, snapshot
from tests.tiny import TEXT_ROWS, tiny_bert, tiny_tokenizer
from tests.toy import QUICK, bits, same_bits

peft = pytest.importorskip("peft")

TEXTS = TEXT_ROWS * 6
SETTINGS: dict[str, Any] = {
    **QUICK,
    "density": 0.25,
    "warmup_steps": 1,
    "proxy_steps": 1,
    "seeds": 1,
    "processor": tiny_tokenizer(),
}


def wrapped(config: Any) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        return peft.get_peft_model(tiny_bert(), config)


def lora(**options: Any) -> nn.Module:
    options = {"r": 2, "target_modules": ["query", "value"], **options}
    return wrapped(peft.LoraConfig(task_type="SEQ_CLS", **options))


class Bottleneck(nn.Module):
    """A layer with an adapter behind it: y + U tanh(D y), U zero at the start."""

    def __init__(self, layer: nn.Linear, size: int = 3) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.out_features, size)
        self.up = nn.Linear(size, layer.out_features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y + self.up(torch.tanh(self.down(y)))


def bottleneck() -> nn.Module:
    model = tiny_bert()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("classifier"))
    for layer in model.bert.encoder.layer:
        layer.output.dense = Bottleneck(layer.output.dense)
    return model


def found(model: nn.Module, **settings: Any) -> SearchResult:
    return search_mask(model, TEXTS, **{**SETTINGS, **settings})


def count_of(result: SearchResult, part: str) -> int:
    return sum(index.numel() for name, index in result.mask.indices.items() if part in name)


@pytest.mark.parametrize("dora", [False, True])
def test_both_factors_of_lora_get_the_share_of_their_size(dora: bool) -> None:
    model = lora(use_dora=dora)
    before = bits(model)
    result = found(model)
    assert same_bits(before, model)
    space = result.mask.space
    assert all(".lora_" in name for name in space.names)
    assert all(".modules_to_save." in name for name in result.provenance["head"])
    assert result.mask.count == result.config.budget(space.numel)
    groups = result.provenance["fisher"]["groups"]
    assert sum(groups.values()) == result.mask.count and len(groups) == 2 + dora
    for part in ("lora_A", "lora_B"):
        size = sum(model.get_parameter(name).numel() for name in space.names if part in name)
        assert abs(count_of(result, part) - 0.25 * size) <= 1
    assert result.provenance["fisher"]["silent_tensors"] == []


def test_at_the_start_of_lora_one_factor_has_no_score_and_that_is_told() -> None:
    model = lora()
    scores = fisher_scores(model, TEXTS, processor=tiny_tokenizer(), device="cpu")
    for name, score in scores.by_parameter.items():
        assert bool((score == 0).all()) == (".lora_A." in name), name
    result = found(model, scoring_steps=0)
    assert count_of(result, "lora_A") == 0 < count_of(result, "lora_B")
    assert result.mask.count < result.config.budget(result.mask.space.numel)
    short, silent, *_ = result.provenance["notes"]
    assert short.startswith("Only ") and "lora_A" in silent and "scoring_steps" in silent
    assert silent in result.table()
    assert len(result.provenance["fisher"]["silent_tensors"]) == 4


def test_one_budget_for_both_factors_goes_to_the_larger_scores() -> None:
    result = found(lora(), groups=[], criterion="fisher", vary=())
    assert list(result.provenance["fisher"]["groups"]) == ["the rest"]
    assert count_of(result, "lora_B") > 2 * count_of(result, "lora_A")


def test_ia3() -> None:
    result = found(
        wrapped(
            peft.IA3Config(
                task_type="SEQ_CLS", target_modules=["key", "value"], feedforward_modules=[]
            )
        )
    )
    assert all(".ia3_l" in name for name in result.mask.space.names)
    assert result.mask.count == result.config.budget(result.mask.space.numel)


def test_bottleneck_adapters() -> None:
    model = bottleneck()
    before = bits(model)
    space = ParameterSpace.of(model, [n for n, p in model.named_parameters() if p.requires_grad])
    assert scoring_steps(None, model, space) == STEPS
    result = found(model, density=0.5)
    assert same_bits(before, model)
    assert result.provenance["head"] == ["classifier.weight", "classifier.bias"]
    assert {n.split(".")[-2] for n in result.mask.indices} == {"down", "up"}


def test_a_masked_adapter_trains_merges_and_leaves_the_rest() -> None:
    model = lora()
    result = found(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    head = result.provenance["head"]
    optimizer = MaskedAdamW(model, result.mask, lr=1e-2, dense=head)
    batch = tiny_tokenizer()([r["text"] for r in TEXT_ROWS], padding=True, return_tensors="pt")
    model.eval()
    for _ in range(3):
        logits_of(model, dict(batch)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert result.mask.verify(before, model.state_dict(), dense=head) == []
    logits = logits_of(model, dict(batch))
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, dict(batch)), logits, rtol=1e-4, atol=1e-5)


def test_the_scoring_point_is_left_again_also_after_an_error() -> None:
    model = nn.Linear(3, 2)
    start = snapshot(model)
    before = bits(model)
    nn.init.ones_(model.weight)
    point = ScoringPoint(start, snapshot(model))
    start.restore()
    with point.visited():
        assert bool((model.weight == 1).all())
    assert same_bits(before, model)
    with pytest.raises(ZeroDivisionError), point.visited():
        raise ZeroDivisionError
    assert same_bits(before, model)


def test_ordinary_models_are_scored_where_they_are() -> None:
    model = tiny_bert()
    assert scoring_steps(None, model, ParameterSpace.of(model, ["classifier.weight"])) == 0
    assert scoring_steps(3, model, ParameterSpace.of(model, ["classifier.weight"])) == 3


def test_a_budget_too_small_for_every_group_is_told_apart_from_dead_layers() -> None:
    with pytest.raises(ModelError, match=r"A budget of 1 is 1 of .*lora_.*all scores are exactly"):
        found(lora(), density=1 / 256, scoring_steps=0)


def test_scoring_steps_that_diverge_are_tried_at_lower_rates_and_then_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, rates = lora(), []
    before = bits(model)
    train = Proxies._train

    def diverging(
        self: Proxies, candidate: Candidate, rate: float, seed: int, steps: int, **more: Any
    ) -> None:
        if candidate.kind == "full" and steps == 7:
            rates.append(rate)
            train(self, candidate, 1e-3, seed, 1)  # the weights have moved by then
            raise Diverged(3, "the loss is nan")
        train(self, candidate, rate, seed, steps, **more)

    monkeypatch.setattr(Proxies, "_train", diverging)
    with pytest.raises(ModelError, match=r"The 7 steps .* the loss is nan.*--scoring-steps"):
        found(model, scoring_steps=7)
    assert len(rates) == 3 and rates == sorted(rates, reverse=True)
    assert same_bits(before, model)


def test_scores_of_a_model_as_it_is_take_no_scoring_steps() -> None:
    with pytest.raises(UsageError, match="scoring_steps is a setting of a search"):
        fisher_scores(lora(), TEXTS, processor=tiny_tokenizer(), scoring_steps=3)


def test_a_fingerprint_does_not_depend_on_the_order_of_a_set() -> None:
    """PEFT keeps its target modules in a set, whose order is another one in each process."""

    class Config:
        def to_dict(self) -> dict[str, object]:
            return {"target_modules": {"value", "query", "key"}, "base_model_name_or_path": "here"}

    assert _told(Config()) == '{"target_modules": ["key", "query", "value"]}'
    assert _told(None) == "{}"
