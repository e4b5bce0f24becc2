"""Encoder-decoder models: a text in, a text of another length out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import T5ForSequenceClassification
from typer.testing import CliRunner

from ird_search import fisher_scores, load_mask, search_mask
from ird_search.cli import app
from ird_search.config import DataConfig, SearchConfig
from ird_search.data.encoding import encode
from ird_search.data.sources import read_source
from ird_search.data.targets import Decoder, shifted_right
from ird_search.errors import DataError, IRDError, ModelError
from ird_search.models import load_model, writes_targets
from ird_search.parameters import head_parameters
from ird_search.problem import make_problem, open_samples
from ird_search.samples import SampleSet
from ird_search.task import IGNORED, CausalLM, Seq2SeqLM, logits_of, make_task
from ird_search.traits import decoder_of, limits_of
from tests.cases import problem
from tests.models import FRAMES, SEQ2SEQ, WHISPER, build
from tests.reference import fisher, relative_error
from tests.tiny import (
    TEXT_ROWS,
    VOCABULARY,
    tiny_bart,
    tiny_gpt2,
    tiny_lm_tokenizer,
    tiny_seq2seq_tokenizer,
    tiny_t5,
)
from tests.toy import OPTIONS, QUICK

ROWS: list[dict[str, Any]] = [
    {"article": "a good film", "summary": "good"},
    {"article": "this book is very bad and the plot was dull .", "summary": "bad book , dull plot"},
    {"article": "great", "summary": "a great play and not poor"},
    {"article": "that play seems slow", "summary": "slow play"},
]
"""Lengths that differ on both sides."""

END = VOCABULARY["<eos>"]
ENCODERS = ("input_ids", "attention_mask", "input_features")


def ids(text: str) -> list[int]:
    return [VOCABULARY[word] for word in text.split()]


def opened(model: Any, rows: Any = ROWS, **options: Any) -> SampleSet:
    """The samples of the front door."""
    processor = tiny_seq2seq_tokenizer()
    config = SearchConfig(device="cpu")
    _, task, samples, source = open_samples(
        model, rows, options=DataConfig(**options), config=config, processor=processor
    )
    assert task == Seq2SeqLM() and source.kind == "seq2seq"
    return samples


def refused(rows: Any, *words: str, model: Any = None, **options: Any) -> None:
    with pytest.raises(IRDError) as error:
        opened(model or tiny_t5(), rows, **options)
    for word in words:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


# --- the task -----------------------------------------------------------------------------------


def test_the_likelihood_is_that_of_a_causal_model_one_place_on() -> None:
    logits, labels = torch.randn(3, 6, 5), torch.randint(5, (3, 6))
    labels[0, 3:] = IGNORED
    noise = Seq2SeqLM().noise(labels, torch.Generator())
    # A causal model predicts each token from the place before it.
    later, shifted = F.pad(logits, (0, 0, 0, 1)), F.pad(labels, (1, 0), value=1)
    ours, theirs = Seq2SeqLM(), CausalLM()
    for name in ("log_likelihood", "loss", "summary"):
        found = getattr(ours, name)(logits, labels)
        torch.testing.assert_close(found, getattr(theirs, name)(later, shifted), rtol=0, atol=0)
    drawn = theirs.drawn(later, F.pad(noise, (1, 0), value=IGNORED))[:, 1:]
    assert torch.equal(ours.drawn(logits, noise), drawn)
    assert bool((ours.drawn(logits, noise)[0, 3:] == IGNORED).all())
    assert ours.metrics(ours.summary(logits, labels), labels) == theirs.metrics(
        theirs.summary(later, shifted), shifted
    )


def test_the_task_by_its_name() -> None:
    assert make_task("seq2seq") == Seq2SeqLM() and Seq2SeqLM.metric == "perplexity"


# --- the model's own loss -----------------------------------------------------------------------


SIZES = SEQ2SEQ | {"max_position_embeddings": 16, "decoder_start_token_id": 2}
WINDOWS = {"max_encoder_position_embeddings": 16, "max_decoder_position_embeddings": 8}
LED = SEQ2SEQ | WINDOWS | {"attention_window": 4}
PROPHETNET = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "disable_ngram_loss": True,
    **{f"num_{side}_layers": 1 for side in ("encoder", "decoder")},
    **{f"num_{side}_attention_heads": 2 for side in ("encoder", "decoder")},
}
FAMILIES = {
    "T5ForConditionalGeneration": tiny_t5,
    "BartForConditionalGeneration": tiny_bart,
    # moves the last token to the front
    "MBartForConditionalGeneration": SIZES,
    # without a method of their own
    "M2M100ForConditionalGeneration": SIZES,
    "BlenderbotForConditionalGeneration": SIZES,
    "MarianMTModel": SIZES,
    "PegasusForConditionalGeneration": SIZES,
    "LEDForConditionalGeneration": LED,
    "ProphetNetForConditionalGeneration": PROPHETNET,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_have_the_models_own_loss(name: str) -> None:
    """`model(input_ids, attention_mask, labels).loss`, which shifts the labels by itself."""
    make = FAMILIES[name]
    model = (make() if callable(make) else build(name, make)).eval()
    samples = opened(model)
    batch = samples.batch(range(len(ROWS)))
    encoder = {name: batch.inputs[name] for name in ENCODERS if name in batch.inputs}
    with torch.no_grad():
        own = model(**encoder, labels=batch.labels).loss
        ours = Seq2SeqLM().loss(logits_of(model, batch.inputs), batch.labels)
    torch.testing.assert_close(ours, own)


def test_what_the_texts_become() -> None:
    samples = opened(tiny_bart())  # </s> is its first token
    inputs, labels = samples.inputs[1], samples.labels[1]
    assert inputs["input_ids"].tolist() == [*ids(ROWS[1]["article"]), END]
    assert labels.tolist() == [*ids("bad book , dull plot"), END]
    assert inputs["decoder_input_ids"].tolist() == [END, *ids("bad book , dull plot")]
    batch = samples.batch([0, 3])
    assert batch.labels.tolist() == [[*ids("good"), END, IGNORED], [*ids("slow play"), END]]
    assert batch.inputs["decoder_input_ids"].tolist()[0] == [END, *ids("good"), 0]
    assert batch.inputs["attention_mask"].tolist()[0] == [1, 1, 1, 1, 0]
    assert samples.lengths.tolist() == [4, 12, 7, 5]  # of both sides the longer


@pytest.mark.parametrize("make", [tiny_t5, tiny_bart])
def test_padding_does_not_change_a_likelihood(make: Any) -> None:
    model, task = make().eval(), Seq2SeqLM()
    samples = opened(model)

    def likelihoods(rows: list[int]) -> Tensor:
        batch = samples.batch(rows)
        with torch.no_grad():
            return task.log_likelihood(logits_of(model, batch.inputs), batch.labels)

    alone = torch.cat([likelihoods([i]) for i in range(len(ROWS))])
    torch.testing.assert_close(likelihoods([0, 1, 2, 3]), alone)


# --- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, pair",
    [
        ({"source": "a", "target": "b"}, ("source", "target")),
        ({"Article": "a", "id": "7", "Highlights": "b"}, ("Article", "Highlights")),
        ({"document": "a", "summary": "b", "title": "c"}, ("document", "summary")),
        ({"answer": "b", "question": "a"}, ("question", "answer")),
        ({"input": "a", "output": "b"}, ("input", "output")),
        ({"prompt": "a", "completion": "b"}, ("prompt", "completion")),
        ({"text": "a", "headline": "b"}, ("text", "headline")),
        ({"body": "a", "tl;dr": "b"}, ("body", "tl;dr")),
        ({"body": "a", "summary": "b", "n": 3}, ("body", "summary")),
        ({"text": "a", "label": "good"}, ("text", "label")),
        ({"text": "a", "target": "b", "label": 1}, ("text", "target")),
        (("a", "good"), ("text", "label")),
    ],
)
def test_columns_by_name_or_as_the_texts_that_are_left(row: Any, pair: tuple[str, str]) -> None:
    source = read_source([row] * 2, writes=True)
    assert (source.kind, source.text_columns, source.label_column) == ("seq2seq", pair, None)


@pytest.mark.parametrize(
    "options",
    [
        {"text_columns": ("de", "en")},
        {"text_columns": ("de",), "label_column": "en"},
        {"label_column": "en"},
    ],
)
def test_columns_that_are_named(options: dict[str, Any]) -> None:
    rows = [{"en": "good", "de": "great", "n": 1}] * 2
    assert read_source(rows, writes=True, **options).text_columns == ("de", "en")


@pytest.mark.parametrize(
    "row, kind",
    [
        ({"article": "a", "summary": "b"}, "seq2seq"),
        ({"source": "a", "target": "b"}, "seq2seq"),
        ({"text": "a", "label": "good"}, "classification"),
        ({"text": "a", "label": 1}, "classification"),
        ({"text": "a", "target": 1}, "classification"),
        ({"input_ids": [5, 6], "labels": [7, 8, 9]}, "seq2seq"),
        ({"input_ids": [5, 6], "label": 1}, "classification"),
    ],
)
def test_a_class_or_a_number_is_left_to_classifiers(row: Any, kind: str) -> None:
    """A checkpoint of T5 or BART may become either."""
    assert read_source([row] * 2, writes=None).kind == kind


@pytest.mark.parametrize("name", ["target", "answer", "output"])
def test_a_label_column_that_is_named_holds_classes(name: str) -> None:
    """Unless the task is named, too."""
    rows = [{"text": "a", name: "good"}, {"text": "b", name: "bad"}]
    found = read_source(rows, label_column=name, writes=None)
    assert (found.kind, found.label_names) == ("classification", ("bad", "good"))
    assert read_source(rows, label_column=name, writes=True).kind == "seq2seq"


def test_other_models_read_such_rows_as_before() -> None:
    rows = [{"source": "a", "target": "b"}] * 2
    assert read_source(rows).kind == "classification"
    rows = [{"question": row["article"] + " ", "answer": row["summary"]} for row in ROWS]
    pair = encode(read_source(rows), processor=tiny_lm_tokenizer())
    assert pair.labels[0].tolist()[:2] == [IGNORED, IGNORED]  # a prompt and a completion
    assert "decoder_input_ids" not in pair.inputs[0]


def test_rows_of_tokens() -> None:
    model = tiny_t5().eval()
    texts = opened(model)
    ready: list[dict[str, Any]] = [
        {"input_ids": row["input_ids"].tolist(), "labels": y.tolist()}
        for row, y in zip(texts.inputs, texts.labels, strict=True)
    ]
    found = opened(model, ready)
    assert found.fingerprint == texts.fingerprint
    whole = [{**row, "decoder_input_ids": [0, *row["labels"][:-1]]} for row in ready]
    assert opened(model, whole).fingerprint == texts.fingerprint
    # labels that were padded, and what the model reads there
    padded = opened(model, [{**ready[0], "labels": [*ready[0]["labels"], IGNORED, IGNORED]}])
    assert padded.labels[0].tolist()[-3:] == [END, IGNORED, IGNORED]
    assert padded.inputs[0]["decoder_input_ids"].tolist() == [0, *ids("good"), END, 0]


def test_max_length_cuts_both_sides() -> None:
    samples = opened(tiny_t5(), max_length=4)
    assert samples.inputs[1]["input_ids"].tolist() == [*ids("this book is"), END]
    assert samples.labels[1].tolist() == [*ids("bad book ,"), END]
    row = {"input_ids": [5] * 9, "labels": [6] * 7, "decoder_input_ids": [0] * 7}
    cut = opened(tiny_t5(), [row] * 2, max_length=4)
    assert {len(t) for t in cut.inputs[0].values()} == {4} and len(cut.labels[0]) == 4


def test_labels_of_a_model_that_is_not_known() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [8, 9]}] * 2
    source = read_source(rows, writes=True)
    with pytest.raises(DataError, match=r"config\.decoder_start_token_id and config\.pad"):
        encode(source)
    start = Decoder(shifted=lambda labels: shifted_right(labels, start=3, pad=0))
    assert encode(source, decoder=start).inputs[0]["decoder_input_ids"].tolist() == [3, 8]


# --- what a model is ----------------------------------------------------------------------------


def test_an_encoder_decoder_is_known_by_its_class() -> None:
    assert writes_targets(tiny_t5(), "auto") and writes_targets(tiny_bart(), "auto")
    classifier = T5ForSequenceClassification(tiny_t5().config)
    for model in (classifier, tiny_gpt2(), nn.Linear(2, 2)):
        assert writes_targets(model, "auto") is False
    assert writes_targets("some/where", "seq2seq") is True
    assert writes_targets(tiny_t5(), "classification") is False


def test_a_directory_is_known_by_its_config(tmp_path: Path) -> None:
    tiny_t5().save_pretrained(tmp_path / "t5")
    T5ForSequenceClassification(tiny_t5().config).save_pretrained(tmp_path / "classifier")
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    build("WhisperForConditionalGeneration", WHISPER).save_pretrained(tmp_path / "whisper")
    assert writes_targets(tmp_path / "t5", "auto") is None
    assert writes_targets(tmp_path / "whisper", "auto") is None
    for name in ("classifier", "gpt2", "nowhere"):
        assert writes_targets(tmp_path / name, "auto") is False
    for name in ("t5", "whisper"):
        model = load_model(tmp_path / name, task="seq2seq", need_processor=False).model
        assert type(model).__name__.endswith("ForConditionalGeneration")
    with pytest.raises(ModelError, match="is no model for the task 'seq2seq'"):
        load_model(tmp_path / "gpt2", task="seq2seq", need_processor=False)


def test_the_limits_of_both_sides() -> None:
    assert (decoder_of(tiny_t5()).max_positions, limits_of(tiny_t5())[0]) == (None, None)
    assert (decoder_of(tiny_bart()).max_positions, limits_of(tiny_bart())[0]) == (12, 12)
    whisper = build("WhisperForConditionalGeneration", WHISPER)
    assert decoder_of(whisper).max_positions == 16 and decoder_of(whisper).vocab_size == 34
    model = build("LEDForConditionalGeneration", LED)
    assert (decoder_of(model).max_positions, limits_of(model)[0]) == (8, 16)
    assert decoder_of(nn.Linear(2, 2)) == Decoder()
    assert decoder_of(tiny_t5(decoder_start_token_id=None)).shifted is None


def test_the_layer_over_the_vocabulary_is_no_head() -> None:
    for tied in (True, False):
        assert head_parameters(tiny_t5(tie_word_embeddings=tied)) == ()
    assert head_parameters(tiny_bart()) == ()


# --- F ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, path", [(tiny_t5, "taps+vmap"), (tiny_bart, "taps")])
def test_scores_equal_a_loop_over_unpadded_rows(make: Any, path: str) -> None:
    model = make()
    p = problem(model, Seq2SeqLM(), opened(model))
    f = fisher(p.model, p.task, p.samples, p.space)
    tokenizer = tiny_seq2seq_tokenizer()
    scores = fisher_scores(p.model, ROWS, processor=tokenizer, embeddings=True, device="cpu")
    assert scores.space.names == p.space.names and scores.path == path
    assert relative_error(scores.by_sample, f.sum(1)) <= 1e-5
    assert relative_error(scores.space.flatten(scores.by_parameter), f.mean(0)) <= 1e-5


def test_spectrograms_and_their_transcriptions() -> None:
    model = build("WhisperForConditionalGeneration", WHISPER).eval()
    rows = [
        {"input_features": torch.randn(8, FRAMES), "labels": torch.tensor([*y, END])}
        for y in ([7, 8, 9], [5], [6, 6, 6, 6, 6, 6], [9, 8])
    ]
    samples = opened(model, rows)
    batch = samples.batch(range(4))
    assert batch.inputs["decoder_input_ids"][1].tolist() == [1, 5, 0, 0, 0, 0, 0]
    with torch.no_grad():
        own = model(input_features=batch.inputs["input_features"], labels=batch.labels).loss
    torch.testing.assert_close(Seq2SeqLM().loss(logits_of(model, batch.inputs), batch.labels), own)
    p = problem(model, Seq2SeqLM(), samples)
    scores = fisher_scores(model, rows, embeddings=True, device="cpu")
    assert scores.space.names == p.space.names
    f = fisher(model, p.task, samples, p.space)
    assert relative_error(scores.by_sample, f.sum(1)) <= 1e-5
    refused(
        [*rows[:1], {**rows[1], "labels": torch.arange(17)}],
        "row 1 (counting from 0): the target has 17 tokens, but the decoder takes 16",
        model=model,
    )


# --- a search -----------------------------------------------------------------------------------


def copies(count: int) -> list[dict[str, Any]]:
    """Texts whose target is their first word, said twice."""
    words = list(VOCABULARY)[5:13]
    picked = torch.randint(len(words), (count, 3)).tolist()
    return [
        {"source": " ".join(words[i] for i in row), "target": f"{words[row[0]]} {words[row[0]]}"}
        for row in picked
    ]


def test_a_search_learns_to_copy() -> None:
    model = tiny_t5()
    settings = QUICK | {"density": 0.3, "proxy_steps": 15, "learning_rate": 0.03, "seeds": 1}
    settings |= {"controls": ("head",), "vary": (), "rounds": 1, "bootstraps": 2}
    result = search_mask(model, copies(80), processor=tiny_seq2seq_tokenizer(), **settings)
    assert result.provenance["task"] == {"name": "seq2seq"} and result.provenance["head"] == []
    verdict = result.verdict
    assert verdict.metric_name == "perplexity" and verdict["head"].parameters == 0
    assert result.mask.count == result.config.budget(result.mask.space.numel)
    assert verdict["ird"].loss < 0.8 * verdict["head"].loss  # without a head: as it came
    assert not any("shared" in n or "relative_attention" in n for n in result.mask.space.names)


def test_evaluation_rows_are_read_alike() -> None:
    rows = copies(24)
    other = [{"b": r["target"], "a": r["source"]} for r in rows]
    for given, options in ((rows, {}), (other, {"text_columns": ("a", "b")})):
        found = make_problem(
            tiny_t5(),
            given[:16],
            eval_data=given[16:],
            options=DataConfig(**options),
            config=SearchConfig(device="cpu", min_samples=4),
            processor=tiny_seq2seq_tokenizer(),
        )
        assert (len(found.train), len(found.choose), len(found.verdict)) == (16, 4, 4)
        assert "decoder_input_ids" in found.verdict.inputs[0]


def test_the_command_line_runs_a_saved_model(tmp_path: Path) -> None:
    tiny_t5().save_pretrained(tmp_path / "tiny")
    tiny_seq2seq_tokenizer().save_pretrained(tmp_path / "tiny")
    data, output = tmp_path / "rows.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in copies(32)))
    options = {"model": tmp_path / "tiny", "data": data, "output": output, **OPTIONS}
    words = [str(w) for k, v in options.items() for w in (f"--{k}", v)]
    done = CliRunner().invoke(app, ["run", *words])
    assert done.exit_code == 0, done.output
    mask = load_mask(output, tiny_t5())
    assert mask.count > 0 and "perplexity" in (output / "report.md").read_text()


# --- what is refused ----------------------------------------------------------------------------


def changed(at: int, **values: Any) -> list[dict[str, Any]]:
    return [{**row, **(values if i == at else {})} for i, row in enumerate(ROWS)]


@pytest.mark.parametrize(
    "at, value, said",
    [
        (1, None, "row 1 (counting from 0): the text in 'summary' is missing"),
        (2, " ", "row 2 (counting from 0): the target in 'summary' is empty"),
        (3, 5, "row 3 (counting from 0): 'summary' is 5 (int), not text"),
        (0, "a " * 12, "row 0 (counting from 0): the target has 13 tokens, but the decoder takes"),
        (0, "a " * 100_000, "row 0 (counting from 0): more than"),
    ],
)
def test_targets_that_cannot_be_used(at: int, value: Any, said: str) -> None:
    refused(changed(at, summary=value), said, model=tiny_bart())


def test_all_bad_rows_are_told_at_once() -> None:
    rows = changed(0, summary="")
    rows[2] = {"article": "a " * 12, "summary": "good"}
    rows[3] = {"article": None, "summary": None}
    refused(
        rows,
        "3 rows of a list cannot be used",
        "row 0: the target in 'summary' is empty",
        "row 2: 13 tokens, but the model takes 12; max_length=12 (--max-length 12) cuts",
        "row 3: the text in 'article' is missing",
        model=tiny_bart(),
    )
    assert len(opened(tiny_bart(), rows[:0] + ROWS, max_length=12)) == 4


@pytest.mark.parametrize(
    "row, said",
    [
        ({"labels": [7, 34]}, "the label 34 is out of range; 0 to 33 are accepted, and -100"),
        ({"labels": [7, -1]}, "the label -1 is out of range"),
        ({"labels": [-100, -100]}, "no token is left to predict (every label is -100)"),
        ({"labels": []}, "the target has no token"),
        ({"labels": None}, "the labels cannot be used, it is missing"),
        ({"labels": 3}, "the labels are torch.int64 [], not token ids"),
        ({"labels": [0.5]}, "the labels are torch.float32 [1], not token ids"),
    ],
)
def test_labels_that_cannot_be_used(row: dict[str, Any], said: str) -> None:
    good = {"input_ids": [5, 6], "labels": [7, 8]}
    refused([good, {**good, **row}], f"row 1 (counting from 0): {said}")


@pytest.mark.parametrize(
    "read, said",
    [
        ([0, 7, 8], "'decoder_input_ids' holds 3 numbers for 2 labels"),
        ([0, 99], "'decoder_input_ids' holds 99, out of range: the model knows 0 to 33"),
        ([0.5, 1.5], "'decoder_input_ids' is torch.float32 [2], not token ids"),
        (None, "'decoder_input_ids' cannot be used: it is missing"),
    ],
)
def test_decoder_inputs_that_cannot_be_used(read: Any, said: str) -> None:
    good = {"input_ids": [5, 6], "labels": [7, 8], "decoder_input_ids": [0, 7]}
    refused([good, {**good, "decoder_input_ids": read}], f"row 1 (counting from 0): {said}")


def test_rows_without_a_source_or_a_target() -> None:
    refused(TEXT_ROWS, "'label' is 1 (int), not text")
    refused([{"text": "a film"}] * 2, "hold the source and the target cannot be told", "twice")
    refused([{"a": "x", "b": "y", "c": "z"}] * 2, "its columns are a, b, c")
    refused([{"input_ids": [5, 6]}] * 2, "a list holds no targets", "needed as 'labels'")
    with pytest.raises(DataError, match="holds no source and target"):
        encode(read_source([{"text": "a"}] * 2), task="seq2seq", processor=tiny_lm_tokenizer())
    refused(ROWS, "config.decoder_start_token_id", model=tiny_t5(decoder_start_token_id=None))


def test_a_model_without_a_decoder_is_refused() -> None:
    with pytest.raises(DataError, match="the model does not say how they are made of labels"):
        fisher_scores(tiny_gpt2(), ROWS, task="seq2seq", processor=tiny_lm_tokenizer())
