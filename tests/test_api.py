"""The front doors, through the models and the data that people have."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import BertForSequenceClassification

from ird_search import (
    SearchResult,
    apply_mask,
    fisher_scores,
    inspect_mask,
    load_mask,
    opening,
    search_mask,
)
from ird_search import run as module
from ird_search.config import SearchConfig
from ird_search.errors import DataError, ModelError, UsageError
from ird_search.mask import SparseMask
from ird_search.parameters import ParameterSpace
from ird_search.proxy import Proxies
from ird_search.sample_report import SampleReport
from ird_search.task import Classification, logits_of
from tests.tiny import (
    TEXT_ROWS,
    save_tiny_bert,
    tiny_bert,
    tiny_gpt2,
    tiny_lm_tokenizer,
    tiny_tokenizer,
    tiny_vit,
)
from tests.toy import QUICK, bits, same_bits, toy_net, toy_problem, toy_rows

SMALL: dict[str, Any] = {**QUICK, "density": 0.02, "warmup_steps": 1, "proxy_steps": 1, "seeds": 1}
"""For transformers: the fewest fine-tunes that go through every part."""

TEXTS = TEXT_ROWS * 6
LONG_TEXTS = [{"text": f"{a['text']} {b['text']}"} for a in TEXT_ROWS for b in TEXT_ROWS]


def quick(model: Any, data: Any, **settings: Any) -> SearchResult:
    return search_mask(model, data, **{**SMALL, **settings})


def well_formed(result: SearchResult, *, pool: int = 16) -> None:
    """The budget exactly, chosen rows of the data, and numbers on every line of the table."""
    mask = result.mask
    assert mask.count == result.config.budget(mask.space.numel) > 0
    assert 4 <= len(result.samples.ids) <= pool
    assert np.isfinite(result.score) and result.score == result.verdict["ird"].loss
    kinds = {e.kind for e in result.verdict.entries}
    assert kinds == {"ird", *result.config.controls}
    assert not any(e.failure for e in result.verdict.entries)


def random_states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("bert") / "tiny", head=False)


@pytest.fixture(scope="module")
def found() -> SearchResult:
    """A search on the toy problem."""
    return search_mask(toy_net(), toy_rows(), **QUICK)


# --- models and data ----------------------------------------------------------------------------


def test_pairs_of_tensor_and_label(found: SearchResult) -> None:
    well_formed(found)
    assert found.mask.count == 10 and found.mask.space.names == ("0.weight", "0.bias")
    assert repr(found).startswith("SearchResult(loss ") and "(10 of 40 parameters" in repr(found)
    assert found.verdict.sentence("random") in found.table()


def test_a_torch_data_set_is_the_same_as_its_pairs(found: SearchResult) -> None:
    rows = toy_rows()
    data = TensorDataset(torch.stack([x for x, _ in rows]), torch.tensor([y for _, y in rows]))
    assert search_mask(toy_net(), data, **QUICK).mask == found.mask


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_directory_and_a_file(suffix: str, bert: Path, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"
    table = datasets.Dataset.from_list(TEXTS)
    with path.open("w") as file:
        if suffix == "csv":
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(TEXTS)
        elif suffix == "jsonl":
            file.writelines(json.dumps(row) + "\n" for row in TEXTS)
    if suffix == "parquet":
        table.to_parquet(path)
    result = quick(str(bert), path)
    well_formed(result)
    dataset = result.provenance["dataset"]
    assert dataset["origin"] == f"rows.{suffix}" and result.provenance["base_model"]["id"] == "tiny"
    # the format does not matter: the same rows give the same mask
    assert result.mask == quick(bert, TEXTS).mask
    assert result.provenance["fresh_parameters"] == ["classifier.weight", "classifier.bias"]


def test_a_data_set_with_a_validation_split(bert: Path) -> None:
    data = datasets.DatasetDict(
        train=datasets.Dataset.from_list(TEXTS[:20]),
        validation=datasets.Dataset.from_list([*TEXTS[:7], {"text": "a slow play", "label": 0}]),
        test=datasets.Dataset.from_list(TEXTS[:4]),
    )
    result = quick(bert, data)
    well_formed(result)
    dataset = result.provenance["dataset"]
    assert (dataset["samples"], dataset["held_out"], result.verdict.samples) == (20, 8, 4)
    said = "7 of 8 held-out samples are training samples, too"
    assert sum(said in note for note in result.provenance["notes"]) == 1
    given = quick(bert, data["train"], eval_data=data["validation"])
    assert given.mask == result.mask and given.verdict["ird"] == result.verdict["ird"]


def test_a_causal_language_model() -> None:
    result = quick(tiny_gpt2(), LONG_TEXTS, processor=tiny_lm_tokenizer())
    well_formed(result)
    assert result.verdict.metric_name == "perplexity" and result.provenance["head"] == []
    assert not any("wte" in n or "wpe" in n for n in result.mask.space.names)
    head = result.verdict["head"]  # nothing to train
    assert head.parameters == 0 and head.spread != head.spread


def test_regression_on_pairs_of_texts(bert: Path) -> None:
    rows = [
        {"sentence1": a["text"], "sentence2": b["text"], "score": 0.5 + a["label"] + 2 * b["label"]}
        for a in TEXT_ROWS
        for b in TEXT_ROWS
    ]
    result = quick(bert, rows)
    well_formed(result)
    assert result.provenance["task"]["name"] == "regression"
    assert result.verdict.metric_name == "pearson"


def test_pixel_values() -> None:
    torch.manual_seed(0)
    rows = [{"pixel_values": torch.randn(3, 8, 8), "label": i % 2} for i in range(32)]
    result = quick(tiny_vit(), rows)
    well_formed(result)
    assert result.provenance["head"] == ["classifier.weight", "classifier.bias"]
    assert not any(
        n.endswith(("cls_token", "position_embeddings")) for n in result.mask.space.names
    )


# --- the model is handed back -------------------------------------------------------------------


def used_model() -> BertForSequenceClassification:
    """A model in the middle of someone's training."""
    model = tiny_bert()
    model.train()
    model.bert.encoder.layer[0].eval()
    model.get_parameter("bert.encoder.layer.1.output.dense.weight").requires_grad_(False)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    return model


def hooks(model: nn.Module) -> list[int]:
    return [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    ]


def state_of(model: Any) -> tuple[Any, ...]:
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.grad is None for p in model.parameters()],
        model.classifier.weight.grad.tolist(),
        hooks(model),
        model.config.use_cache if hasattr(model.config, "use_cache") else None,
        random_states(),
        [id(p) for p in model.parameters()],
    )


class Boom(Exception):
    """Something that a search knows nothing of."""


@pytest.mark.parametrize("place", [None, "warm_up", "make_engine", "search", "give_verdict"])
def test_a_model_is_handed_back_as_it_came(
    place: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = used_model()
    weights, before = bits(model), state_of(model)
    if place is not None:
        owner: Any = {"warm_up": Proxies, "make_engine": opening}.get(place, module)
        real = getattr(owner, place)

        def broken(*args: Any, **kwargs: Any) -> None:
            real(*args, **kwargs)
            raise Boom

        monkeypatch.setattr(owner, place, broken)
        with pytest.raises(Boom):
            quick(model, TEXTS, processor=tiny_tokenizer())
    else:
        quick(model, TEXTS, processor=tiny_tokenizer())
    assert same_bits(weights, model)
    assert state_of(model) == before


def test_scores_hand_the_model_back_too() -> None:
    model = used_model()
    weights, before = bits(model), state_of(model)
    scores = fisher_scores(model, TEXTS, processor=tiny_tokenizer(), device="cpu")
    assert "bert.encoder.layer.1.output.dense.weight" not in scores.space.names  # it is frozen
    assert same_bits(weights, model) and state_of(model) == before


# --- the result ---------------------------------------------------------------------------------


def test_two_runs_give_the_same_bytes(found: SearchResult, tmp_path: Path) -> None:
    torch.manual_seed(99)
    again = search_mask(toy_net(), toy_rows(), **QUICK)
    first, second = found.save(tmp_path / "a"), again.save(tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    other = search_mask(toy_net(), toy_rows(), **{**QUICK, "seed": 1})
    assert other.save(tmp_path / "c").read_bytes() != first.read_bytes()


def test_what_is_saved(found: SearchResult, tmp_path: Path) -> None:
    path = found.save(tmp_path / "run")
    assert {p.name for p in path.parent.iterdir()} == {
        "mask.safetensors",
        "rounds.jsonl",
        "samples.jsonl",
        "inclusion.safetensors",
        "report.md",
    }
    inclusion = load_file(path.parent / "inclusion.safetensors")
    assert {n: t.numel() for n, t in inclusion.items()} == {
        n: i.numel() for n, i in found.mask.indices.items()
    }
    rows = SampleReport.of_lines((path.parent / "samples.jsonl").read_text())
    assert rows.rows == found.sample_report.rows
    assert rows.chosen == found.samples.ids.tolist()
    model = toy_net()
    assert load_mask(path, model=model) == found.mask
    lines = (path.parent / "rounds.jsonl").read_text().splitlines()
    rounds = [json.loads(line) for line in lines]
    assert [r["round"] for r in rounds] == [r.number for r in found.rounds]
    held = inspect_mask(path)
    assert held.samples is not None
    assert held.samples.ids.tolist() == found.samples.ids.tolist()
    assert held.provenance["sentence"] == found.verdict.sentence("random")
    assert held.provenance["learning_rate"] == 0.01
    assert found.verdict.sentence("random") in (path.parent / "report.md").read_text()
    with apply_mask(model, found.mask, dense=held.provenance["head"]) as handle:
        assert handle.count == 10 + 18


def test_the_winner_is_the_best_of_the_rounds(found: SearchResult) -> None:
    at_target = [s for r in found.rounds for s in r.nominated if s.mask.count == found.mask.count]
    assert found.winner.proxy.score == min(s.proxy.score for s in at_target)
    assert found.winner.mask == found.mask


def test_the_chosen_rows_carry_their_scores(found: SearchResult) -> None:
    """At the weights with the warmed-up head; ids are positions in what was passed."""
    problem, _ = toy_problem()
    assert set(found.samples.ids.tolist()) <= set(problem.train.ids.tolist())
    assert bool((found.samples.scores > 0).all())
    assert len(found.samples.scores) == len(found.samples.ids)


def test_samples_that_learn_choose_and_judge_are_different() -> None:
    problem, _ = toy_problem()
    ids = [set(s.ids.tolist()) for s in (problem.train, problem.choose, problem.verdict)]
    assert [len(s) for s in ids] == [60, 10, 10]
    assert set.union(*ids) == set(range(80))
    other, _ = toy_problem(seed=1)
    assert set(other.verdict.ids.tolist()) != ids[2]


# --- scores -------------------------------------------------------------------------------------


def plain_loop(model: nn.Module, inputs: Sequence[Any], labels: Sequence[int]) -> list[Any]:
    """∂ log p(yᵢ | xᵢ; θ) / ∂θ squared, one sample after the other, by name."""
    task, found = Classification(2), []
    for x, y in zip(inputs, labels, strict=True):
        model.zero_grad()
        task.log_likelihood(logits_of(model, x), torch.tensor([y])).sum().backward()
        found.append(
            {n: p.grad.square().clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    return found


def agrees(scores: Any, rows: list[dict[str, Tensor]], within: SparseMask | None = None) -> None:
    names = scores.space.names
    for name in names:
        mean = sum(row[name] for row in rows) / len(rows)
        torch.testing.assert_close(scores.by_parameter[name], mean, rtol=1e-4, atol=1e-9)
    flat = [scores.space.flatten(row) for row in rows]
    kept = slice(None) if within is None else within.coords
    sums = torch.stack([f[kept].double().sum() for f in flat])
    torch.testing.assert_close(scores.by_sample, sums, rtol=1e-4, atol=1e-9)


def test_scores_equal_a_plain_loop() -> None:
    rows, net = toy_rows(12), toy_net()
    expected = plain_loop(net, [{"input": x[None]} for x, _ in rows], [y for _, y in rows])
    everything = fisher_scores(net, rows, head=[], device="cpu")
    agrees(everything, expected)
    assert everything.ids.tolist() == list(range(12)) and everything.path == "taps"
    space = ParameterSpace.of(net)
    mask = SparseMask(space, torch.tensor([0, 7, 33, 50]))
    agrees(fisher_scores(net, rows, mask=mask, device="cpu"), expected, mask)


@pytest.mark.parametrize("method", ["taps", "vmap", "loop"])
def test_scores_of_padded_texts_equal_a_plain_loop(method: str) -> None:
    model = tiny_bert().eval()
    tokenizer: Any = tiny_tokenizer()
    inputs = [dict(tokenizer(row["text"], return_tensors="pt")) for row in TEXT_ROWS]
    expected = plain_loop(model, inputs, [row["label"] for row in TEXT_ROWS])
    scores = fisher_scores(
        model, TEXT_ROWS, processor=tokenizer, method=method, embeddings=True, device="cpu"
    )
    agrees(scores, expected)
    assert method in scores.path


@pytest.mark.parametrize("method", ["taps", "vmap", "loop"])
def test_a_table_with_sparse_gradients_scores_like_any_other(method: str) -> None:
    model = tiny_bert()
    settings = {"processor": tiny_tokenizer(), "embeddings": True, "method": method}
    plain = fisher_scores(model, TEXTS, device="cpu", **settings)
    model.get_input_embeddings().sparse = True
    scores = fisher_scores(model, TEXTS, device="cpu", **settings)
    assert scores.path == method
    assert torch.equal(scores.by_sample, plain.by_sample)
    name = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(scores.by_parameter[name], plain.by_parameter[name])


def test_a_mask_of_another_model_is_refused() -> None:
    space = ParameterSpace(("0.weight", "1.weight"), ((3, 4), (2,)))
    mask = SparseMask(space, torch.tensor([0]))
    with pytest.raises(ModelError) as error:
        fisher_scores(toy_net(), toy_rows(12), mask=mask)
    assert "0.weight is [8, 4], not [3, 4]" in str(error.value)
    assert "1.weight [2] is missing" in str(error.value)


# --- settings -----------------------------------------------------------------------------------


def test_settings_as_one_value_or_as_keywords(found: SearchResult) -> None:
    config = SearchConfig(**{**QUICK, "density": 0.5})
    result = search_mask(toy_net(), toy_rows(), config=config, density=0.25)
    assert result.config == found.config and result.mask == found.mask


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(UsageError, match=r"Unknown setting 'densty'\. Did you mean 'density'"):
        search_mask(toy_net(), toy_rows(), densty=0.1)
    with pytest.raises(UsageError, match="Unknown setting 'densty'"):
        fisher_scores(toy_net(), toy_rows(), densty=0.1)


def test_auc_ranks_two_classes_only(found: SearchResult) -> None:
    result = search_mask(toy_net(), toy_rows(), **{**QUICK, "score": "auc"})
    trial = result.winner.proxy.best
    assert trial.score == 1 - trial.metrics["auc"]
    with pytest.raises(UsageError, match="'auc', which needs two classes; this causal-lm has no"):
        quick(tiny_gpt2(), LONG_TEXTS, processor=tiny_lm_tokenizer(), score="auc")


# --- going on -----------------------------------------------------------------------------------


def count_runs(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[int]:
    """Counts fine-tunes; the one that would be number `stop_at` is interrupted instead."""
    done: list[int] = []
    real: Callable[..., Any] = Proxies._run

    def run(self: Proxies, *args: Any) -> Any:
        if stop_at is not None and len(done) == stop_at:
            raise KeyboardInterrupt
        done.append(1)
        return real(self, *args)

    monkeypatch.setattr(Proxies, "_run", run)
    return done


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def go(name: str) -> SearchResult:
        short = {"seeds": 1, "warmup_steps": 1, "vary": ("criterion",), "controls": ("random",)}
        settings = {**QUICK, "learning_rate": None, **short}
        return search_mask(toy_net(), toy_rows(), output=tmp_path / name, **settings)

    with monkeypatch.context() as patch:
        everything = count_runs(patch)
        whole = go("whole")
    proxies = [s.proxy for s in whole.rounds[0].nominated]
    of_round_1 = sum(len(p.trials) + len(p.probes) for p in proxies)
    warm_up = 6  # at most: the head alone
    stop = warm_up + of_round_1 + 2
    with monkeypatch.context() as patch:
        first = count_runs(patch, stop_at=stop)
        with pytest.raises(KeyboardInterrupt):
            go("parts")
    left = {p.name for p in (tmp_path / "parts").iterdir()}
    assert "mask.safetensors" not in left and {"config.yaml", "ledger", "rounds.jsonl"} <= left
    assert len((tmp_path / "parts" / "rounds.jsonl").read_text().splitlines()) == 1
    with monkeypatch.context() as patch:
        rest = count_runs(patch)
        go("parts")
    assert len(first) == stop and len(first) + len(rest) == len(everything)
    for name in ("mask.safetensors", "config.yaml", "rounds.jsonl", "report.md"):
        parts, one = ((tmp_path / d / name).read_bytes() for d in ("parts", "whole"))
        assert parts == one, name


def test_a_finished_directory_is_not_used_again(tmp_path: Path) -> None:
    search_mask(toy_net(), toy_rows(), output=tmp_path, **QUICK)
    before = (tmp_path / "mask.safetensors").read_bytes()
    with pytest.raises(UsageError, match="holds a finished run"):
        search_mask(toy_net(), toy_rows(), output=tmp_path, **QUICK)
    assert (tmp_path / "mask.safetensors").read_bytes() == before


def test_rows_without_a_finite_gradient_leave_the_directory_free(tmp_path: Path) -> None:
    """Found only when the work has begun; the same directory can be used at once."""

    class Spiky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            return self.head((h - h).sqrt() + h.tanh())  # √0 has an infinite slope

    with pytest.raises(DataError, match="not finite"):
        search_mask(Spiky(), toy_rows(), output=tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()
    search_mask(toy_net(), toy_rows(), output=tmp_path / "run", **QUICK)
