"""The door for data: what comes in, what it becomes, and what every bad row is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from ird_search.data.encoding import encode
from ird_search.data.sources import Source, read_source, read_validation, splits_of
from ird_search.errors import DataError, UsageError
from ird_search.samples import Batch, SampleSet
from tests.tiny import TEXT_ROWS, VOCABULARY, tiny_lm_tokenizer, tiny_tokenizer

GLUE = Path(__file__).resolve().parents[2] / "shared" / "data" / "glue"
needs_glue = pytest.mark.skipif(not GLUE.is_dir(), reason=f"the GLUE files are not at {GLUE}")

IMAGES = [torch.full((3, 8, 8), float(i)) for i in range(4)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows in the format of the file's extension."""
    names = list(rows[0])
    if path.suffix in (".csv", ".tsv"):
        mark = "," if path.suffix == ".csv" else "\t"
        lines = [mark.join(names)] + [mark.join(str(row[n]) for n in names) for row in rows]
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


def text_set(rows: list[dict[str, Any]] | None = None, **settings: Any) -> SampleSet:
    return encode(read_source(rows or TEXT_ROWS), processor=tiny_tokenizer(), **settings)


def image_processor(images: Any, return_tensors: str) -> dict[str, torch.Tensor]:
    """What an image processor does, for images [H, W, 3]."""
    pixels = torch.as_tensor(np.asarray(images), dtype=torch.float32)
    return {"pixel_values": pixels.permute(2, 0, 1)[None] / 255}


class Rows(torch.utils.data.Dataset):
    """A torch map-style data set of pairs that only indexing can read."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.full((3,), float(i)), i % 2


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        yield torch.zeros(3), 0


# --- sources ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.parquet", "A.CSV"])
def test_every_format_gives_the_same_samples(tmp_path: Path, name: str) -> None:
    rows = [{**row, "text": row["text"].replace(",", "and")} for row in TEXT_ROWS]
    path = write(tmp_path / name.lower(), rows).rename(tmp_path / name)
    samples = encode(read_source(path), processor=tiny_tokenizer())
    assert samples.fingerprint == text_set(rows).fingerprint
    assert read_source(str(path)).origin == name


def test_json_lines_may_have_either_extension(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", TEXT_ROWS).rename(tmp_path / "a.json")
    assert len(read_source(path)) == len(TEXT_ROWS)


def test_csv_keeps_line_breaks_quotes_and_words_that_mean_missing_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"one\n""two"", three",1\nNA,0\nnull,1\n,0\n')
    source = read_source(path)
    assert source.column("text") == ['one\n"two", three', "NA", "null", ""]
    assert len(encode(source, processor=tiny_tokenizer())) == 4


@pytest.mark.parametrize(
    "columns, text",
    [
        (("idx", "sentence", "label"), ("sentence",)),
        (("sentence1", "sentence2", "label", "idx"), ("sentence1", "sentence2")),
        (("premise", "hypothesis", "label"), ("premise", "hypothesis")),
        (("question", "sentence", "label"), ("question", "sentence")),
        (("question1", "question2", "label"), ("question1", "question2")),
        (("review", "title", "label"), ("review",)),
        (("Text", "Label"), ("Text",)),
        (("note", "label"), ("note",)),
        (("left", "right", "target"), ("left", "right")),
        (("id", "body", "y"), ("body",)),
        (("text", "domain", "class"), ("text",)),
    ],
)
def test_columns_are_told_by_name_then_by_type(columns: tuple[str, ...], text: Any) -> None:
    numbers = ("label", "target", "y", "class", "idx", "id")
    rows = [{c: i if c.lower() in numbers else f"a {c}" for c in columns} for i in range(2)]
    source = read_source(rows)
    assert source.text_columns == text
    assert source.label_column == next(c for c in columns if c.lower() in numbers[:4])
    assert source.kind == "classification" and source.num_labels == 2


@pytest.mark.parametrize(
    "labels, kind, names, ids",
    [
        ([0, 2, 1], "classification", None, [0, 2, 1]),
        ([True, False, True], "classification", None, [1, 0, 1]),
        ([0.0, 1.0, 2.0], "classification", None, [0, 1, 2]),
        (["no", "yes", "maybe"], "classification", ("maybe", "no", "yes"), [1, 2, 0]),
        ([0.5, 1.0, -2.0], "regression", None, [0.5, 1.0, -2.0]),
        ([np.int64(1), torch.tensor(0), torch.tensor([1])], "classification", None, [1, 0, 1]),
    ],
)
def test_label_kinds(labels: list[Any], kind: str, names: Any, ids: list[float]) -> None:
    source = read_source([{"text": "a film", "label": label} for label in labels])
    samples = encode(source, processor=tiny_tokenizer())
    assert (source.kind, source.label_names) == (kind, names)
    assert isinstance(samples.labels, torch.Tensor)
    assert samples.labels.tolist() == ids
    assert samples.labels.dtype == (torch.float32 if kind == "regression" else torch.int64)
    assert samples.label_names == names


def test_class_labels_of_datasets_survive_parquet(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(TEXT_ROWS)
    data = data.cast_column("label", datasets.ClassLabel(names=["neg", "pos"]))
    data.to_parquet(tmp_path / "train.parquet")
    for source in (read_source(data), read_source(tmp_path / "train.parquet")):
        assert source.label_names == ("neg", "pos") and source.num_labels == 2
        assert encode(source, processor=tiny_tokenizer()).fingerprint == text_set().fingerprint


def test_splits_of_a_dataset_dict_and_of_a_directory(tmp_path: Path) -> None:
    train, held = TEXT_ROWS, TEXT_ROWS[:3]
    both = datasets.DatasetDict(
        train=datasets.Dataset.from_list(train), validation=datasets.Dataset.from_list(held)
    )
    write(tmp_path / "train.csv", [{**r, "text": r["text"].replace(",", "")} for r in train])
    write(tmp_path / "validation.csv", held)
    for data in (both, tmp_path, str(tmp_path)):
        assert splits_of(data) == ("train", "validation")
        assert len(read_source(data)) == 6
        assert len(read_source(data, split="validation")) == 3
        validation = read_validation(data)
        assert validation is not None and len(validation) == 3
    assert read_validation(TEXT_ROWS) is None
    assert read_validation({"train": train, "test": held}) is None


def test_shards_of_a_split_are_joined(tmp_path: Path) -> None:
    for i, rows in enumerate((TEXT_ROWS[:4], TEXT_ROWS[4:])):
        write(tmp_path / f"train-{i:05d}-of-00002.parquet", rows)
    assert read_source(tmp_path).column("text") == [row["text"] for row in TEXT_ROWS]


@pytest.mark.parametrize(
    "data",
    [
        Rows(),
        [Rows()[i] for i in range(4)],
        TensorDataset(torch.arange(4.0)[:, None].expand(4, 3), torch.tensor([0, 1, 0, 1])),
        [(np.full(3, i, dtype=np.float32), i % 2) for i in range(4)],
        [([float(i)] * 3, i % 2) for i in range(4)],
        [{"input": torch.full((3,), float(i)), "label": i % 2} for i in range(4)],
    ],
)
def test_pairs_are_passed_by_position(data: Any) -> None:
    samples = encode(read_source(data))
    assert list(samples.inputs[0]) == ["input"]
    batch = samples.batch([1, 2])
    assert batch.inputs["input"].tolist() == [[1.0] * 3, [2.0] * 3]
    assert batch.labels.tolist() == [1, 0]
    assert samples.lengths.tolist() == [1] * 4


def test_pairs_of_text_and_of_mappings() -> None:
    pairs = [(row["text"], row["label"]) for row in TEXT_ROWS]
    assert (
        encode(read_source(pairs), processor=tiny_tokenizer()).fingerprint == text_set().fingerprint
    )
    mapped = encode(
        read_source([({"x": torch.ones(2), "input": torch.ones(1)}, i) for i in (0, 1)])
    )
    assert set(mapped.inputs[0]) == {"x", "input"}


def test_tokenised_rows_are_taken_as_they_are() -> None:
    tokenizer = tiny_tokenizer()
    rows = [{**tokenizer(r["text"]), "labels": r["label"], "idx": 7} for r in TEXT_ROWS]
    plain = datasets.Dataset.from_list(rows)
    shown = datasets.Dataset.from_list([{**r, "text": "a", "n": 1} for r in rows])
    shaped = shown.with_format("torch", columns=list(rows[0]))
    for data in (rows, plain, shaped, pd.DataFrame(rows)):
        source = read_source(data)
        assert source.tokenised and source.kind == "classification"
        samples = encode(source, processor=tokenizer)
        assert set(samples.inputs[0]) == {"input_ids", "token_type_ids", "attention_mask"}
        assert samples.fingerprint == text_set().fingerprint


def test_a_transform_of_datasets_is_applied() -> None:
    tokenizer = tiny_tokenizer()
    data = datasets.Dataset.from_list(TEXT_ROWS).with_transform(
        lambda rows: {**tokenizer(rows["text"]), "label": rows["label"]}
    )
    assert encode(read_source(data), processor=tokenizer).fingerprint == text_set().fingerprint


def test_tokenised_rows_without_a_mask_get_one_where_padding_is_known() -> None:
    rows = [{"input_ids": [5, 6, 7], "label": 0}, {"input_ids": [8, 9], "label": 1}]
    batch = encode(read_source(rows), pad_id=1).batch([0, 1])
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7], [8, 9, 1]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert "attention_mask" not in encode(read_source(rows)).inputs[0]


def test_images_through_a_processor() -> None:
    arrays = [np.full((8, 8, 3), 50 * i, dtype=np.uint8) for i in range(4)]
    source = read_source([{"image": a, "label": i % 2} for i, a in enumerate(arrays)])
    assert source.kind == "image-classification" and source.image_column == "image"
    samples = encode(source, processor=image_processor)
    batch = samples.batch([2, 1])
    assert batch.inputs["pixel_values"].shape == (2, 3, 8, 8)
    assert samples.lengths.tolist() == [1] * 4
    ready = read_source([{"pixel_values": x, "labels": i % 2} for i, x in enumerate(IMAGES)])
    assert ready.kind == "image-classification" and len(encode(ready)) == 4


def test_the_first_rows_are_kept_and_numbered() -> None:
    source = read_source(TEXT_ROWS, limit=3)
    assert len(source) == 3 and source.ids == (0, 1, 2)
    some = read_source(TEXT_ROWS).select([4, 1])
    assert some.ids == (4, 1) and some.column("label") == [1, 0]
    assert encode(some, processor=tiny_tokenizer()).ids.tolist() == [4, 1]
    assert repr(source) == "Source(3 rows of a list, classification: text, label label, 2 classes)"


# --- language models ----------------------------------------------------------------------------


def test_language_model_text() -> None:
    source = read_source([{"text": "a good film"}, {"text": "the plot"}])
    assert source.kind == "causal-lm" and source.num_labels is None
    samples = encode(source, processor=tiny_lm_tokenizer())
    batch = samples.batch([0, 1])
    a, good, film, the, plot = (VOCABULARY[w] for w in ("a", "good", "film", "the", "plot"))
    end = VOCABULARY["<eos>"]
    assert batch.inputs["input_ids"].tolist() == [[a, good, film], [the, plot, end]]
    assert batch.labels.tolist() == [[a, good, film], [the, plot, -100]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert repr(samples) == (
        "SampleSet(2 samples, token labels, inputs: input_ids, attention_mask, 2-3 tokens)"
    )


def test_a_prompt_carries_no_likelihood() -> None:
    rows = [{"prompt": "is this good ", "completion": "very good"}] * 2
    samples = encode(read_source(rows), processor=tiny_lm_tokenizer())
    very, good = VOCABULARY["very"], VOCABULARY["good"]
    assert samples.labels[0].tolist() == [-100, -100, -100, very, good]
    assert samples.inputs[0]["input_ids"].tolist()[-2:] == [very, good]


def test_tokenised_language_rows_keep_their_labels_and_lose_their_padding() -> None:
    own = read_source([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "label": 1}] * 2)
    assert own.kind == "causal-lm"
    assert encode(own).labels[0].tolist() == [-100, 6, 7]
    padded = read_source([{"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]}] * 2)
    assert encode(padded).labels[0].tolist() == [5, 6, -100]
    assert encode(padded).inputs[0]["input_ids"].tolist() == [5, 6, 0]


def test_class_labels_are_ignored_where_a_language_model_reads() -> None:
    samples = encode(read_source(TEXT_ROWS[:5]), task="causal-lm", processor=tiny_lm_tokenizer())
    assert [len(x) for x in samples.labels] == samples.lengths.tolist()


# --- sample sets --------------------------------------------------------------------------------


def test_a_batch_is_what_the_tokenizer_pads() -> None:
    tokenizer = tiny_tokenizer()
    rows = [3, 0, 4]
    expected = tokenizer([TEXT_ROWS[i]["text"] for i in rows], padding=True, return_tensors="pt")
    batch = text_set().batch(rows)
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(batch.inputs[name], expected[name])
    assert batch.rows.tolist() == rows and batch.labels.tolist() == [0, 1, 1]
    assert len(batch) == 3 and isinstance(batch.to("cpu"), Batch)


def test_pairs_of_text_keep_token_types() -> None:
    rows = [{"premise": "a film", "hypothesis": "a book", "label": i} for i in (0, 1)]
    first = text_set(rows).inputs[0]
    assert first["token_type_ids"].tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_padding_on_the_left() -> None:
    samples = SampleSet(
        inputs=({"input_ids": torch.tensor([5, 6, 7])}, {"input_ids": torch.tensor([8])}),
        labels=(torch.tensor([5, 6, 7]), torch.tensor([8])),
        ids=torch.arange(2),
        pad={"input_ids": 3},
        pad_side="left",
    )
    batch = samples.batch([0, 1])
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7], [3, 3, 8]]
    assert batch.labels.tolist() == [[5, 6, 7], [-100, -100, 8]]


def test_batches_in_order_and_by_length() -> None:
    samples = text_set()
    assert [b.rows.tolist() for b in samples.batches(size=4)] == [[0, 1, 2, 3], [4, 5]]
    assert [b.rows.tolist() for b in samples.batches([5, 1], size=1)] == [[5], [1]]
    seen = []
    for batch in samples.length_batches(torch.tensor([1, 0, 2, 3, 4, 5]), tokens=14):
        rows, longest = batch.inputs["input_ids"].shape
        assert rows * longest <= 14
        seen.append(batch.rows.tolist())
    assert seen == [[5, 0], [3, 2], [4], [1]]
    assert [len(b) for b in samples.length_batches(tokens=1)] == [1] * 6
    assert [len(b) for b in samples.length_batches(tokens=10**6)] == [6]
    assert list(samples.length_batches([], tokens=8)) == []


def test_large_inputs_without_tokens_count_by_patches() -> None:
    pixels = [({"pixel_values": torch.zeros(3, 32, 32)}, i % 2) for i in range(3)]
    samples = encode(read_source(pixels))
    assert samples.lengths.tolist() == [4, 4, 4]


def test_select_keeps_ids_and_composes() -> None:
    samples = text_set()
    some = samples.select([4, 2, 0]).select(torch.tensor([2, 0]))
    assert some.ids.tolist() == [0, 4] and some.labels.tolist() == [1, 1]  # type: ignore[union-attr]
    assert some.fingerprint == samples.select([0, 4]).fingerprint


def test_the_fingerprint_sees_order_values_and_labels() -> None:
    samples = text_set()
    other = [text_set([{**r, "label": 1 - r["label"]} for r in TEXT_ROWS]), text_set(max_length=4)]
    others = [samples.select([1, 0, 2, 3, 4, 5]), samples.select(range(5)), *other]
    assert len({s.fingerprint for s in (samples, *others)}) == 5
    assert samples.select(range(6)).fingerprint == samples.fingerprint


def test_a_sample_set_needs_one_of_each() -> None:
    with pytest.raises(DataError, match="1 inputs, 2 labels and 1 ids came"):
        SampleSet(inputs=({},), labels=torch.zeros(2), ids=torch.arange(1))


def test_repr_of_samples() -> None:
    assert repr(text_set()) == (
        "SampleSet(6 samples, 2 classes, inputs: input_ids, token_type_ids, attention_mask, "
        "3-9 tokens)"
    )
    assert repr(text_set().select([])) == "SampleSet(0 samples)"


def test_dtypes_of_the_user_are_kept() -> None:
    rows = [(torch.zeros(2, dtype=torch.float64), 0), (torch.ones(2, dtype=torch.float64), 1)]
    assert encode(read_source(rows)).inputs[0]["input"].dtype == torch.float64


def test_max_length_cuts_text_and_ready_tokens() -> None:
    assert int(text_set(max_length=4, max_positions=8).lengths.max()) == 4
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1] * 3, "labels": [5, 6, 7]}] * 2
    cut = encode(read_source(rows), max_length=2)
    assert {len(x) for x in cut.inputs[0].values()} == {2} and len(cut.labels[0]) == 2


# --- evaluation rows ----------------------------------------------------------------------------


def test_evaluation_labels_follow_the_training_names() -> None:
    names = ("no", "unsure", "yes")
    rows = [{"text": "a film", "label": "yes"}, {"text": "a book", "label": "yes"}]
    samples = text_set(rows, training=False, label_names=names)
    assert samples.labels.tolist() == [2, 2]  # type: ignore[union-attr]
    other = datasets.Dataset.from_list([{"text": "a film", "label": i} for i in (0, 1)])
    other = other.cast_column("label", datasets.ClassLabel(names=["yes", "no"]))
    turned = encode(
        read_source(other), processor=tiny_tokenizer(), training=False, label_names=names
    )
    assert turned.labels.tolist() == [2, 0]  # type: ignore[union-attr]


# --- every bad input ----------------------------------------------------------------------------


def told(error: pytest.ExceptionInfo[Exception], *words: str) -> None:
    for word in words:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.csv", "", ["a.csv is empty"]),
        ("a.jsonl", " \n", ["a.jsonl is empty"]),
        ("a.csv", "text,label\n", ["a.csv has no rows"]),
        ("a.json", "[]", ["a.json has no rows"]),
        (
            "a.txt",
            "a film",
            ["a.txt is of no accepted format", ".csv, .tsv, .json, .jsonl, .parquet"],
        ),
        (
            "a.csv",
            "text,label\na,b,c\n",
            ["a.csv, row 0 (counting from 0)", "header has 2 fields", "row 3"],
        ),
        ("a.csv", b"text,label\n\xff\xfe,1\n", ["row 0", "'text' is not UTF-8 text"]),
        ("a.parquet", "no parquet at all", ["could not be read as parquet"]),
        ("a.json", '[{"text": "a",]', ["could not be read as JSON", "line 1"]),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"te', ["line 2", "one object a line"]),
        (
            "a.json",
            '[{"text": "a"}, 3]',
            ["row 1 (counting from 0): a value of type int came", "an object"],
        ),
    ],
)
def test_files_that_cannot_be_read(
    tmp_path: Path, name: str, content: Any, words: list[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error:
        read_source(path)
    told(error, *words)


def test_places_that_hold_nothing(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", TEXT_ROWS[:2])
    cases: list[tuple[Any, dict[str, Any], list[str]]] = [
        (tmp_path / "tran.csv", {}, ["does not exist", "Did you mean 'train.csv'?"]),
        (str(tmp_path / "tran.csv"), {}, ["does not exist", "Did you mean 'train.csv'?"]),
        (tmp_path, {"split": "tran"}, ["has no split 'tran'; it has train", "Did you mean"]),
        (tmp_path / "train.csv", {"split": "x"}, ["split='x' was asked for", "is one file"]),
        (TEXT_ROWS, {"split": "x"}, ["this list has no splits"]),
        ({"test": TEXT_ROWS, "dev": TEXT_ROWS}, {}, ["has no split 'train'; it has test, dev"]),
        ([], {}, ["a list has no rows"]),
        (
            Endless(),
            {},
            ["Data of type Endless came", "a hub id", "list(itertools.islice(data, n))"],
        ),
        (DataLoader(Rows()), {}, ["pass the data set itself (`loader.dataset`)"]),
        (3, {}, ["Data of type int came"]),
        ([3, 4], {}, ["Row 0 (counting from 0) of a list has type int", "(x, y) pair"]),
    ]
    for data, settings, words in cases:
        with pytest.raises(DataError) as error:
            read_source(data, **settings)
        told(error, *words)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no split; files named like train"):
        read_source(tmp_path / "empty")


def test_a_hub_id_without_a_network() -> None:
    with pytest.raises(DataError) as error:
        read_source("nobody/nothing-of-the-kind")
    told(error, "'nobody/nothing-of-the-kind' is neither a file or directory here", "from the hub")


def test_columns_that_are_not_there() -> None:
    with pytest.raises(DataError) as error:
        read_source(TEXT_ROWS, text_columns=["txt"], label_column="lable")
    told(error, "2 problems", "no column 'txt'; its columns are text, label. Did you mean 'text'?")
    told(error, "no column 'lable'; its columns are text, label. Did you mean 'label'?")
    with pytest.raises(DataError) as error:
        read_source([{"a": "x", "b": "y", "c": "z", "label": 1}])
    told(error, "its columns are a, b, c, label", "text_columns (--text-column)")
    with pytest.raises(DataError, match="not 3"):
        read_source([{"a": "x", "b": "y", "c": "z"}], text_columns=["a", "b", "c"])
    with pytest.raises(UsageError, match="limit is 0; it must be at least 1"):
        read_source(TEXT_ROWS, limit=0)


def bad_row(row: int, **changes: Any) -> list[dict[str, Any]]:
    return [{**r, **(changes if i == row else {})} for i, r in enumerate(TEXT_ROWS)]


@pytest.mark.parametrize(
    "rows, settings, words",
    [
        (bad_row(2, label=None), {}, ["row 2 (counting from 0): the label in 'label' is missing"]),
        (bad_row(2, label=float("nan")), {}, ["row 2 (counting from 0): the label in 'label'"]),
        (bad_row(4, label=-1), {}, ["row 4", "label -1 is out of range; 0 and above"]),
        (bad_row(4, label=-100), {}, ["row 4", "label -100 is out of range"]),
        (bad_row(4, label=3), {"num_labels": 3}, ["label 3 is out of range; 0 to 2 are accepted"]),
        (
            bad_row(1, label="one"),
            {},
            ["row 1 (counting from 0): the label 'one' is text, where most labels are numbers"],
        ),
        (
            bad_row(1, label=0.5),
            {"task": "classification"},
            ["0.5 is not a whole number", "regression"],
        ),
        (bad_row(1, label=float("inf")), {}, ["the label inf is not a whole number"]),
        (bad_row(1, label=[0, 1]), {"task": "classification"}, ["the label is a list of 2"]),
        (bad_row(1, label="x"), {"task": "regression"}, ["row 1", "the label 'x' is text"]),
        (bad_row(1, label=float("inf")), {"task": "regression"}, ["inf is not a finite number"]),
        (bad_row(3, text=None), {}, ["row 3 (counting from 0): the text in 'text' is missing"]),
        (bad_row(3, text=5), {}, ["row 3 (counting from 0): 'text' is 5 (int), not text"]),
        (TEXT_ROWS[:1], {}, ["All 1 labels", "are 1;", "raise limit"]),
        (
            [{"text": "a film"}] * 2,
            {"task": "classification"},
            ["no label column", "--label-column"],
        ),
        (
            TEXT_ROWS,
            {"max_positions": 8},
            ["row 1", "9 tokens, but the model takes 8", "--max-length 8"],
        ),
        (TEXT_ROWS, {"vocab_size": 30}, ["token id", "the model knows 0 to 29", "tokenizer"]),
    ],
)
def test_rows_that_cannot_be_used(
    rows: list[Any], settings: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(DataError) as error:
        text_set(rows, **settings)
    told(error, *words)


@pytest.mark.parametrize(
    "rows, settings, words",
    [
        (
            [(torch.tensor([1.0, float("nan")]), 0), (torch.ones(2), 1)],
            {},
            ["row 0", "1 of 2 numbers"],
        ),
        (
            [(torch.ones(2), 0), (torch.ones(2), 1), (torch.ones(3), 1)],
            {},
            ["row 2", "[3], but most"],
        ),
        (
            [{"pixel_values": torch.zeros(3, 8, 8 + (i == 1)), "label": i % 2} for i in range(3)],
            {},
            ["row 1", "'pixel_values' has shape [3, 8, 9], but most rows have [3, 8, 8]"],
        ),
        (
            [{"pixel_values": x, "label": 0} for x in (IMAGES[0], None)],
            {},
            ["row 1", "it is missing"],
        ),
        ([{"input_ids": [5, -1], "label": i} for i in (0, 1)], {}, ["token id -1 is out of range"]),
        ([{"input_ids": [5]}] * 2, {}, ["1 token came; a language model needs 2"]),
        (
            [{"input_ids": []}] * 2,
            {},
            ["no token came (an empty text", "(rows 0, 1, counting from 0)"],
        ),
        ([{"input_ids": [5, 6], "labels": [5, -100]}] * 2, {}, ["no token is left to predict"]),
        ([{"input_ids": [5, 6], "labels": [5]}] * 2, {}, ["1 labels came for 2 tokens"]),
        ([{"pixel_values": IMAGES[0], "label": 0}], {"task": "causal-lm"}, ["needs 'input_ids'"]),
    ],
)
def test_ready_rows_that_cannot_be_used(rows: Any, settings: dict[str, Any], words: Any) -> None:
    with pytest.raises(DataError) as error:
        encode(read_source(rows), **settings)
    told(error, *words)


def test_unseen_evaluation_labels() -> None:
    rows = [{"text": "a film", "label": "postive"}, {"text": "a book", "label": "negative"}]
    with pytest.raises(DataError) as error:
        text_set(rows, training=False, label_names=("negative", "positive"))
    told(error, "row 0", "'postive' is not among 'negative', 'positive'. Did you mean")
    with pytest.raises(DataError, match="is text, but the training labels are numbers"):
        text_set(rows, training=False)
    one = text_set(TEXT_ROWS[:1], training=False)
    assert len(one) == 1, "rows to evaluate on may be of one class"


def test_all_problems_are_told_at_once() -> None:
    rows = [{"text": None if i % 2 else "a film", "label": 0} for i in range(24)]
    with pytest.raises(DataError) as error:
        text_set(rows)
    told(error, "2 problems", "All 24 labels of a list are 0;", "12 rows of a list cannot be used")
    told(error, "the text in 'text' is missing (rows 1, 3,", ", 19 and 2 more, counting from 0)")
    assert "21" not in str(error.value)


def test_row_numbers_are_those_of_the_user() -> None:
    source = read_source(bad_row(4, text=None)).select([0, 1, 4])
    with pytest.raises(DataError, match=r"row 4 \(counting from 0\)"):
        encode(source, processor=tiny_tokenizer())


def test_images_that_cannot_be_used() -> None:
    good, flat = np.zeros((8, 8, 3), dtype=np.uint8), np.zeros((8, 8), dtype=np.uint8)
    rows = [{"image": x, "label": i % 2} for i, x in enumerate((good, flat, None, good))]
    with pytest.raises(DataError) as error:
        encode(read_source(rows), processor=image_processor)
    told(error, "row 1: the image could not be read", "row 2: the image is missing")
    with pytest.raises(UsageError, match="holds images, so an image processor is needed"):
        encode(read_source(rows))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"processor": None}, "holds text, so a tokenizer is needed: pass `processor`"),
        ({"task": "regresion"}, "Unknown task 'regresion'"),
        ({"max_length": 0}, "max_length is 0; it must be at least 1"),
        ({"max_length": 9, "max_positions": 8}, "but the model takes 8 tokens at most"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        encode(read_source(TEXT_ROWS), **{"processor": tiny_tokenizer(), **settings})


def test_a_prompt_needs_offsets() -> None:
    source = read_source([{"prompt": "a", "completion": "b"}])
    with pytest.raises(UsageError, match="a fast tokenizer"):
        encode(source, processor=lambda *_, **__: {})


# --- real data ----------------------------------------------------------------------------------


@needs_glue
def test_sst2_as_a_directory() -> None:
    source = read_source(GLUE / "sst2", limit=200)
    assert (source.text_columns, source.label_column) == (("sentence",), "label")
    samples = encode(source, processor=tiny_tokenizer(), max_positions=512)
    assert len(samples) == 200 and samples.ids.tolist() == list(range(200))
    validation = read_validation(GLUE / "sst2")
    assert validation is not None and len(validation) == 872


@needs_glue
@pytest.mark.parametrize("name", ["mrpc", "rte", "qnli"])
def test_glue_pairs(name: str) -> None:
    source: Source = read_source(GLUE / name, split="validation", limit=50)
    assert source.text_columns == ("sentence1", "sentence2")
    assert "token_type_ids" in encode(source, processor=tiny_tokenizer()).inputs[0]
