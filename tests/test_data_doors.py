"""What people bring besides: held-out rows, tsv files of both kinds, data for own models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from ird_search import fisher_scores
from ird_search.config import DataConfig, SearchConfig
from ird_search.data.encoding import encode
from ird_search.data.sources import read_evaluation, read_source
from ird_search.errors import DataError
from ird_search.problem import Problem, make_problem
from ird_search.samples import SampleSet
from tests.toy import QUICK, toy_net


def refused(words: list[str], call: Callable[[], object]) -> None:
    with pytest.raises(DataError) as error:
        call()
    for word in words:
        assert word in str(error.value), f"{word!r} is not in: {error.value}"


def rows(count: int, seed: int = 0) -> list[tuple[Tensor, int]]:
    """Pairs that toy_net takes."""
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return [(x[i], i % 2) for i in range(count)]


def problem(data: Any, eval_data: Any = None, model: nn.Module | None = None) -> Problem:
    config = SearchConfig(**{**QUICK, "pool": None})
    net = toy_net() if model is None else model
    return make_problem(net, data, eval_data=eval_data, options=DataConfig(), config=config)


# --- held-out rows ------------------------------------------------------------------------------


def texts(mark: str) -> list[dict[str, Any]]:
    return [{"text": f"{mark} {i}", "label": i % 2} for i in range(4)]


@pytest.mark.parametrize(
    ("splits", "taken"),
    [
        (("train", "validation", "test"), "validation"),
        (("train", "dev"), "dev"),
        (("train", "test"), "test"),
        (("held",), "held"),
        (("train",), "train"),
    ],
)
def test_which_split_of_evaluation_data_is_taken(
    splits: tuple[str, ...], taken: str, tmp_path: Path
) -> None:
    data = {name: texts(name) for name in splits}
    for name, split in data.items():
        pd.DataFrame(split).to_csv(tmp_path / f"{name}.csv", index=False)
    whole = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in data.items()})
    for source in (data, whole, tmp_path):
        assert read_evaluation(source).column("text")[0] == f"{taken} 0"


def test_evaluation_data_whose_split_cannot_be_told(tmp_path: Path) -> None:
    for name in ("train", "heldout"):
        pd.DataFrame(texts(name)).to_csv(tmp_path / f"{name}.csv", index=False)
    for data in (tmp_path, {"heldout": texts("a"), "train": texts("b")}):
        words = ["splits heldout, train", "Pass the one"]
        refused(words, lambda data=data: read_evaluation(data))


def test_a_table_of_evaluation_data_needs_no_split() -> None:
    assert len(read_evaluation(texts("a"))) == 4


def test_evaluation_takes_the_test_split_and_never_the_training_split() -> None:
    train, test = rows(40), rows(12, seed=1)
    p = problem(train, {"train": train, "test": test})
    held = {tuple(s["input"].tolist()) for part in (p.choose, p.verdict) for s in part.inputs}
    assert held == {tuple(x.tolist()) for x, _ in test}


def test_held_out_rows_that_are_training_rows_are_told() -> None:
    data = rows(40)
    told = "8 of 8 held-out samples are training samples, too"
    assert problem(data, data[4:12]).notes[0].startswith(told)
    assert problem({"train": data, "validation": data[:8]}).notes[0].startswith(told)
    assert "10 of 10 held-out" in problem(data[:2] * 20).notes[0]  # held out of the data itself


def test_a_few_held_out_rows_in_training_are_told() -> None:
    data = rows(40)
    p = problem(data, [*rows(10, seed=1), *data[:3], (data[4][0], 1 - data[4][1])])
    assert p.source["dataset"]["held_out_in_training"] == 3, "another label is another row"
    p = problem(data, rows(10, seed=1))
    assert "held_out_in_training" not in p.source["dataset"]


# --- tsv ----------------------------------------------------------------------------------------


def tsv(path: Path, text: str) -> Path:
    file = path / "a.tsv"
    file.write_bytes(text.encode())
    return file


def test_quotes_of_a_glue_file_are_text(tmp_path: Path) -> None:
    lines = ['"one', "two", 'a "third" one', 'four"', '"five', '"six"', 'se"ven', "eight"]
    text = "sentence\tlabel\n" + "".join(f"{s}\t{i % 2}\n" for i, s in enumerate(lines))
    source = read_source(tsv(tmp_path, text))
    assert source.column("sentence") == lines
    assert source.column("label") == [0, 1] * 4


TRICKY = ["plain", 'say "hi"', '"quoted"', "a\ttab", "a\nbreak", 'a "\n\t" b', '"', "x\r\ny"]


def test_a_tsv_file_of_pandas_comes_back(tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": TRICKY, "label": [i % 2 for i in range(len(TRICKY))]})
    file = tmp_path / "a.tsv"
    frame.to_csv(file, sep="\t", index=False)
    assert read_source(file).column("text") == TRICKY


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ('text\tlabel\na\t1\n"good film\t1\nbad film"\t0\n', 1),
        ('text\tlabel\nb\t0\na\t1\n"good film\t1\nbad film"\t0\n', 2),
    ],
)
def test_a_tsv_file_that_reads_well_both_ways_is_refused(
    text: str, row: int, tmp_path: Path
) -> None:
    words = [f"a.tsv, row {row} (counting from 0)", "may be text", "Save the file as csv"]
    refused(words, lambda: read_source(tsv(tmp_path, text)))


def test_texts_of_several_lines_in_one_column(tmp_path: Path) -> None:
    source = read_source(tsv(tmp_path, 'text\n"a\nb"\nc\n'), writes=False)
    assert source.column("text") == ["a\nb", "c"]


@pytest.mark.parametrize(
    ("text", "row"),
    [
        ('text\tlabel\n"good"\t"pos"\n"bad"\t"neg"\na 5" disk\t"neg"\n', 2),
        ('"text"\t"label"\nhe said \\"no\\"\t1\nfine\t0\n', 0),
        ('text\tlabel\n"a\tb"\t1\n"c"\t0\n"d\t1\n', 2),
    ],
    ids=["a stray quote", "escaped otherwise", "never closed"],
)
def test_a_quoted_tsv_file_with_a_flaw_is_refused_with_its_row(
    text: str, row: int, tmp_path: Path
) -> None:
    words = [f"a.tsv, row {row} (counting from 0)", "other fields are quoted whole"]
    refused(words, lambda: read_source(tsv(tmp_path, text)))


# --- rows of unequal length ---------------------------------------------------------------------


class Bag(nn.Module):
    """A bag of embeddings, which takes all it is given for tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 6)
        self.mix, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.table(x).mean(1)))


class MaskedBag(Bag):
    """The same, told by a mask which of them are."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        weight = attention_mask[..., None].float()
        return self.head(self.mix((self.table(input_ids) * weight).sum(1) / weight.sum(1)))


def ragged(count: int) -> list[tuple[Tensor, int]]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 8, (count,), generator=draw).tolist()
    return [(torch.randint(0, 20, (n,), generator=draw), i % 2) for i, n in enumerate(lengths)]


def masked_rows(count: int) -> list[tuple[dict[str, Tensor], int]]:
    return [({"input_ids": x, "attention_mask": torch.ones_like(x)}, y) for x, y in ragged(count)]


def test_scores_do_not_depend_on_the_batch_where_no_mask_tells_padding() -> None:
    few, many = (fisher_scores(Bag(), ragged(24), fisher_tokens=n).by_sample for n in (1, 1000))
    assert torch.allclose(few, many, rtol=1e-5)
    masked = fisher_scores(MaskedBag(), masked_rows(24), fisher_tokens=1000).by_sample
    assert torch.allclose(few, masked, rtol=1e-5)


def test_only_equal_rows_share_a_batch_where_no_mask_tells_padding() -> None:
    samples = encode(read_source(ragged(24)))
    parts = samples.length_split(tokens=1000)
    assert sorted(torch.cat(parts).tolist()) == list(range(24))
    assert [len({len(samples.inputs[i]["input"]) for i in part.tolist()}) for part in parts] == [
        1
    ] * len(parts)
    assert len(encode(read_source(masked_rows(24))).length_split(tokens=1000)) == 1
    tokens = SampleSet(samples.inputs, tuple(s["input"] for s in samples.inputs), samples.ids)
    assert len(tokens.length_split(tokens=1000)) == 1, "a causal model reads padding last"


def test_that_training_fills_up_batches_is_told_where_no_mask_tells_padding() -> None:
    (note,) = problem(ragged(60), model=Bag()).notes
    assert "differ in length and bring no attention mask" in note
    padded = [(nn.functional.pad(x, (0, 8 - len(x))), y) for x, y in ragged(60)]
    assert not problem(masked_rows(60), model=MaskedBag()).notes
    assert not problem(padded, model=Bag()).notes


# --- names of columns ---------------------------------------------------------------------------


def test_columns_whose_names_are_numbers() -> None:
    table = [["a film", 1], ["a book", 0]]
    for data in (pd.DataFrame(table), [dict(enumerate(row)) for row in table]):
        source = read_source(data, label_column="1")
        assert (source.text_columns, source.label_column) == (("0",), "1")
        assert source.column("0") == ["a film", "a book"]


def test_names_that_read_alike_as_text_are_refused() -> None:
    twice = [{1: "a", "1": "b", "label": 0}]
    refused(["Row 0", "read alike as text: 1, '1', 'label'"], lambda: read_source(twice))
    frame = pd.DataFrame([["a", "b"]], columns=[1, "1"])
    refused(["more than one column '1'"], lambda: read_source(frame))


# --- models of one's own ------------------------------------------------------------------------


class Two(nn.Module):
    """Takes two things by name, and one number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, a: Tensor, b: Tensor, age: Tensor) -> Tensor:
        return self.head(self.body(torch.cat([a, b, age[:, None]], -1)).tanh())


def named(count: int) -> list[dict[str, Any]]:
    return [
        {"id": i, "a": x, "b": [0.5], "age": float(i), "label": y}
        for i, (x, y) in enumerate(rows(count))
    ]


def test_columns_of_tensors_are_inputs_by_name() -> None:
    source = read_source(named(8))
    assert (source.input_columns, source.label_column) == (("a", "b", "age"), "label")
    assert read_source([{"x": torch.ones(2), "y": i} for i in (0, 1)]).input_columns == ("x",)
    scores = fisher_scores(Two(), named(8))
    assert scores.by_sample.shape == (8,)


def test_columns_of_a_model_of_ones_own_need_a_label() -> None:
    refused(
        ["no label column", "its columns are a, b"],
        lambda: read_source([{"a": torch.ones(2), "b": torch.ones(2)}] * 2),
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ((torch.ones(2), torch.ones(3)), "a list of 3 numbers (shape [3])"),
        ((torch.ones(2, 4, 4), torch.ones(4, 4)), "a list of 16 numbers (shape [4, 4])"),
        ((torch.tensor([1, 2]), [1, 2]), "a list of 2 numbers (shape [2])"),
        ({"x": torch.ones(2), "y": [0.5]}, "a list of 1 number (shape [1])"),
    ],
)
def test_labels_of_several_numbers_are_refused(row: Any, said: str) -> None:
    words = ["a list, row 0 (counting from 0): the label is", said, "one class or one number"]
    refused(words, lambda: read_source([row] * 4))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ((torch.ones(8, 4), torch.ones(8)), ["A tuple of two arrays", "TensorDataset(X, y)"]),
        ([np.ones((8, 4)), np.ones(8)], ["A list of two arrays", "list(zip(X, y))"]),
        (["a film", "a book"], ["of a list has type str", 'passed as {"text": …}']),
        (
            [{"messages": [{"role": "user", "content": "hello"}]}] * 2,
            ["holds chats, in 'messages'", "tokenizer.apply_chat_template(row['messages']"],
        ),
        (
            datasets.Dataset.from_list(texts("a")).to_iterable_dataset(),
            ["Data of type IterableDataset came", "Dataset.from_list(list(ds.take(n)))"],
        ),
        (
            [{"f1": 1.0, "f2": 2.0, "label": 0}] * 2,
            ["text cannot be told", "named as the arguments of its forward"],
        ),
    ],
)
def test_what_is_not_accepted_is_told_with_its_cure(data: Any, words: list[str]) -> None:
    refused(words, lambda: read_source(data))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield torch.zeros(3), 0


def test_a_stream_of_torch_is_told_how_to_be_a_list() -> None:
    refused(["type Stream came", "list(itertools.islice(data, n))"], lambda: read_source(Stream()))


class Faulty(Dataset[Any]):
    """Says that it has 8 rows; the one at `at` raises."""

    def __init__(self, at: int, error: Exception) -> None:
        self.at, self.error = at, error

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if i == self.at:
            raise self.error
        return torch.zeros(3), i % 2


def test_a_row_that_cannot_be_read_is_told_by_its_number() -> None:
    for error in (IndexError("list index out of range"), RuntimeError("corrupt"), KeyError("x")):
        words = ["Row 5 (counting from 0) of a Faulty, which says that it has 8 rows", str(error)]
        refused([*words, type(error).__name__], lambda error=error: read_source(Faulty(5, error)))
    assert len(read_source(Faulty(5, KeyError("x")), limit=5)) == 5
    for error in (MemoryError(), RuntimeError("CUDA out of memory")):
        with pytest.raises(type(error)):
            read_source(Faulty(5, error))
    with pytest.raises(DataError, match=r"^mine$"):
        read_source(Faulty(5, DataError("mine")))


# --- labels -------------------------------------------------------------------------------------


def labelled(*labels: Any) -> Any:
    return read_source([{"x": torch.ones(2), "label": label} for label in labels])


def test_labels_that_differ_from_the_models_in_case_and_spaces() -> None:
    names = ("NEGATIVE", "VERY  POSITIVE")
    samples = encode(labelled("negative", "Very Positive", "negative"), label_names=names)
    assert samples.labels.tolist() == [0, 1, 0] and samples.label_names == names
    rows = datasets.Dataset.from_dict({"x": [[1.0], [2.0]], "label": [0, 1]})
    ids = rows.cast_column("label", datasets.ClassLabel(names=["very positive", "negative"]))
    assert encode(read_source(ids), label_names=names).labels.tolist() == [1, 0]
    held = encode(labelled("negative"), label_names=names, training=False)
    assert held.labels.tolist() == [0]


def test_labels_that_would_be_one_without_their_case_are_told_apart() -> None:
    refused(
        ["'a' is not among 'A', 'B'"],
        lambda: encode(labelled("a", "A", "B"), label_names=["A", "B"]),
    )
    refused(["'B' is not among"], lambda: encode(labelled("a", "B"), label_names=["a", "b", "A"]))


def test_one_reason_for_many_rows_is_told_once() -> None:
    with pytest.raises(DataError) as error:
        encode(labelled(0, 1, *[2] * 60), num_labels=2)
    assert str(error.value) == (
        "60 rows of a list cannot be used: the label 2 is out of range; 0 to 1 are accepted "
        "(rows 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 50 more, counting from 0)"
    )
