"""Bad input, each with its message and exit code, and with nothing half-written."""

from __future__ import annotations

import csv
import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from ird_search import load_mask, search_mask
from ird_search.artifact import save_mask
from ird_search.cli import app
from ird_search.errors import ArtifactError, DataError, IRDError, ModelError, UsageError
from ird_search.mask import SparseMask
from ird_search.parameters import ParameterSpace
from ird_search.rundir import RunDirectory
from tests.tiny import TEXT_ROWS, save_tiny_bert
from tests.toy import OPTIONS, QUICK, toy_net, toy_rows

ROWS = TEXT_ROWS * 6


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def changed(at: int, **values: Any) -> list[dict[str, Any]]:
    """The rows with one of them changed."""
    return [{**row, **values} if i == at else row for i, row in enumerate(ROWS)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and a csv file that are good."""
    directory = tmp_path_factory.mktemp("bad")
    save_tiny_bert(directory / "tiny", head=False)
    write(directory / "rows.csv", ROWS)
    return directory


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Callable[..., Result]:
    """`ird-search run` on the good model and data, into tmp_path/run, with some options changed."""

    def call(*more: str, **changes: Any) -> Result:
        options: dict[str, Any] = {
            "model": place / "tiny",
            "data": place / "rows.csv",
            "output": tmp_path / "run",
            **OPTIONS,
            **{name.replace("_", "-"): value for name, value in changes.items()},
        }
        words = [w for k, v in options.items() if v is not None for w in (f"--{k}", str(v))]
        return CliRunner().invoke(app, ["run", *words, *more])

    return call


def refused(result: Result, error: type[IRDError], *words: str) -> str:
    """The exit code, each word of the message, and a standard output without a word."""
    assert result.exit_code == error.exit_code, (result.exit_code, result.stderr)
    assert result.stdout == ""
    for word in words:
        assert word in result.stderr, f"{word!r} is not in: {result.stderr}"
    return result.stderr


def nothing_written(output: Path) -> None:
    assert not output.exists()


# --- data ---------------------------------------------------------------------------------------


def test_a_missing_file(run: Any, place: Path, tmp_path: Path) -> None:
    result = run(data=place / "row.csv")
    refused(result, DataError, "row.csv does not exist. Did you mean 'rows.csv'?")
    nothing_written(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("none.csv", "", "none.csv is empty."),
        ("header.csv", "text,label\n", "header.csv has no rows."),
        ("none.jsonl", "\n\n", "none.jsonl is empty."),
        ("torn.jsonl", '{"text": "a", "label": 1}\n{"text": ', "torn.jsonl could not be read as"),
        ("list.json", "[1]", "row 0 (counting from 0): a value of type int came"),
        ("odd.txt", "a\n", "is of no accepted format; accepted are .csv, .tsv, .json"),
    ],
)
def test_a_file_without_rows(name: str, text: str, said: str, run: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    refused(run(data=tmp_path / name), DataError, said)
    nothing_written(tmp_path / "run")


def test_an_unknown_column(run: Any, tmp_path: Path) -> None:
    said = "rows.csv has no column 'lable'; its columns are text, label. Did you mean 'label'?"
    refused(run("--label-column", "lable"), DataError, said)
    refused(run("--text-column", "txet"), DataError, "no column 'txet'", "Did you mean 'text'?")
    nothing_written(tmp_path / "run")


def test_one_class_only(run: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "one.csv", [{**row, "label": 1} for row in ROWS])
    refused(run(data=data), DataError, "All 36 labels of one.csv are 1; a classification learns")
    nothing_written(tmp_path / "run")


def test_a_label_out_of_range_is_told_with_its_row(run: Any, tmp_path: Path) -> None:
    said = "row 7 (counting from 0): the label -1 is out of range; 0 to 1 are accepted"
    refused(run(data=write(tmp_path / "a.csv", changed(7, label=-1))), DataError, said)
    eval_data = write(tmp_path / "eval.csv", changed(3, label=5))
    said = "eval.csv, row 3 (counting from 0): the label 5 is out of range; 0 to 1 are accepted"
    refused(run(eval_data=eval_data), DataError, said)
    nothing_written(tmp_path / "run")


def test_a_label_that_is_missing_or_no_number(run: Any, tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in changed(4, label=None)))
    refused(run(data=data), DataError, "row 4 (counting from 0): the label in 'label' is missing")
    nothing_written(tmp_path / "run")


@pytest.mark.parametrize("value", [None, 3, ["a", "b"]])
def test_text_that_is_none(value: Any, run: Any, tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in changed(9, text=value)))
    refused(run(data=data), DataError, "a.jsonl, row 9 (counting from 0): ", "'text'")
    nothing_written(tmp_path / "run")


def test_a_null_in_a_parquet_file(run: Any, tmp_path: Path) -> None:
    Dataset.from_list(changed(2, text=None)).to_parquet(tmp_path / "a.parquet")
    refused(run(data=tmp_path / "a.parquet"), DataError, "a.parquet, row 2 (counting from 0): ")
    nothing_written(tmp_path / "run")


def test_a_sample_that_is_too_long_and_its_cure(run: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "long.csv", changed(5, text="good " * 40))
    refused(
        run(data=data),
        DataError,
        "long.csv, row 5 (counting from 0): 42 tokens, but the model takes 32",
        "(--max-length 32) cuts",
    )
    nothing_written(tmp_path / "run")
    cured = run(data=data, max_length=32)  # the same directory, other settings
    assert cured.exit_code == 0, cured.stderr
    assert load_mask(tmp_path / "run" / "mask.safetensors").count == 90


def test_too_little_to_evaluate_on(run: Any, tmp_path: Path) -> None:
    said = "samples are held out for evaluation; at least 4 are needed"
    few = write(tmp_path / "few.csv", ROWS[:12])
    refused(run(data=few, pool=8), DataError, f"3 {said}", "Pass eval_data (--eval-data)")
    refused(run(eval_data=write(tmp_path / "eval.csv", ROWS[:3])), DataError, f"3 {said}")
    nothing_written(tmp_path / "run")


def test_several_rows_are_told_at_once(run: Any, tmp_path: Path) -> None:
    rows = [{**row, "label": 9 if i % 2 else row["label"]} for i, row in enumerate(ROWS)]
    eval_data = write(tmp_path / "eval.csv", rows)
    text = refused(
        run(eval_data=eval_data),
        DataError,
        "18 rows of eval.csv cannot be used: the label 9 is out of range; 0 to 1 are accepted",
        "(rows 1, 3, 5,",
    )
    assert text.count("the label") == 1 and "and 8 more" in text
    rows = [{**row, "label": 5 + i if i % 2 else row["label"]} for i, row in enumerate(ROWS)]
    text = refused(run(eval_data=write(eval_data, rows)), DataError, "row 1: the label 6")
    assert text.count("row ") == 10 and "and 8 more" in text
    nothing_written(tmp_path / "run")


# --- the model ----------------------------------------------------------------------------------


def test_nan_in_the_weights_names_the_tensor(run: Any, tmp_path: Path) -> None:
    save_tiny_bert(tmp_path / "nan")
    path = tmp_path / "nan" / "model.safetensors"
    weights = load_file(path)
    weights["bert.encoder.layer.1.output.dense.weight"][3, 4] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    refused(
        run(model=tmp_path / "nan"),
        ModelError,
        "bert.encoder.layer.1.output.dense.weight: 1 of 512 weights are not finite",
    )
    nothing_written(tmp_path / "run")


def test_no_model(run: Any, tmp_path: Path) -> None:
    refused(run(model=tmp_path / "nowhere"), ModelError, "nowhere does not exist")
    (tmp_path / "empty").mkdir()
    refused(run(model=tmp_path / "empty"), ModelError, "holds no config.json")
    nothing_written(tmp_path / "run")


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("density", "said"),
    [
        ("0", "density is 0; it must be above 0 and at most 1."),
        ("1.5", "density is 1.5; it must be above 0 and at most 1."),
        ("nan", "density is nan; it must be above 0 and at most 1."),
        ("0.0001", "density 0.0001 of 4,480 candidate parameters rounds to none; the smallest"),
    ],
)
def test_an_impossible_density(density: str, said: str, run: Any, tmp_path: Path) -> None:
    refused(run(density=density), UsageError, said)
    nothing_written(tmp_path / "run")


def test_a_pool_larger_than_the_data(run: Any, tmp_path: Path) -> None:
    said = "pool is 128, but 27 samples are there to draw it from. Pass pool=27 (--pool 27)"
    refused(run(pool=128), UsageError, said)
    nothing_written(tmp_path / "run")


def test_several_problems_are_told_at_once(run: Any, tmp_path: Path) -> None:
    text = refused(run(density=0, pool=0, seed=-1), UsageError, "density is 0", "pool is 0")
    assert "3 problems:" in text and "seed is -1; it must be at least 0." in text
    text = refused(run(density="1e-5", pool=99), UsageError, "pool is 99", "rounds to none")
    assert "2 problems:" in text
    nothing_written(tmp_path / "run")


def test_without_a_model_or_data(run: Any, tmp_path: Path) -> None:
    text = refused(run(model=None, data=None), UsageError, "--model is missing: what to search.")
    assert "--data is missing: on what." in text
    nothing_written(tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("densty: 0.1\n", "Unknown setting 'densty'. Did you mean 'density'"),
        ("processor: tiny\n", "Unknown setting 'processor'."),
        ("output: here\n", "Unknown setting 'output'."),
        ("strategy: wlak\n", "strategy is 'wlak'; it must be one of walk, ladder, grid, tpe,"),
        ("min_samples: lots\n", "min_samples is 'lots'; it must be a whole number."),
        ("- density\n", "must hold `name: value` lines."),
    ],
)
def test_a_bad_config_file(text: str, said: str, run: Any, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    given = {"min_samples": None} if "min_samples" in text else {}
    refused(run(config=tmp_path / "c.yaml", **given), UsageError, said)
    nothing_written(tmp_path / "run")


def test_a_pattern_that_matches_nothing(run: Any, tmp_path: Path) -> None:
    refused(run("--include", "qeury"), UsageError, "include pattern 'qeury' matches no trainable")
    refused(run("--head", "clasifier"), UsageError, "head pattern 'clasifier' matches no")
    refused(run(device="tpu"), UsageError, "Unknown device 'tpu'")
    nothing_written(tmp_path / "run")


# --- the output directory -----------------------------------------------------------------------


def contents(output: Path) -> dict[str, bytes]:
    return {str(p.relative_to(output)): p.read_bytes() for p in output.rglob("*") if p.is_file()}


def test_a_corrected_run_may_use_the_directory(run: Any, tmp_path: Path) -> None:
    """Whether it was not there or empty: bad input does not claim it."""
    (tmp_path / "run").mkdir()
    refused(run(data=write(tmp_path / "bad.csv", changed(7, label=-1))), DataError, "row 7")
    assert contents(tmp_path / "run") == {}
    good = run(density="0.05")
    assert good.exit_code == 0, good.stderr


def test_a_directory_in_use(run: Any, tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "thesis.tex").write_text("mine")
    before = contents(output)
    refused(run(), UsageError, "is not empty: it holds thesis.tex. Choose an empty or a new one.")
    assert contents(output) == before
    (output / "thesis.tex").unlink()
    (output / "mask.safetensors").write_text("mine")
    refused(run(), UsageError, "holds a finished run (mask.safetensors)")
    assert contents(output) == {"mask.safetensors": b"mine"}


def test_an_unfinished_run_with_other_settings(run: Any, tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run").claimed({"density": 0.5}):
        pass
    before = contents(tmp_path / "run")
    refused(run(), UsageError, "an unfinished run with other settings: density was 0.5, is 0.02")
    assert contents(tmp_path / "run") == before


def test_a_directory_that_another_process_writes(run: Any, tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    with (output / ".lock").open("w+") as lock:  # a second description of the file conflicts too
        lock.write("4711")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(run(), UsageError, "is in use by process 4711. Wait for it")
        assert contents(output) == {".lock": b"4711"}
    assert run().exit_code == 0


def test_an_output_that_cannot_be_made(run: Any, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    refused(run(), UsageError, "run is a file; a directory is needed.")
    refused(run(output=tmp_path / "run" / "x"), UsageError, "cannot be used: Not a directory.")
    assert (tmp_path / "run").read_text() == "mine"


def test_the_same_from_python(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**QUICK, "output": tmp_path / "run"}
    with pytest.raises(UsageError, match="pool is 61, but 60 samples"):
        search_mask(toy_net(), toy_rows(), **{**settings, "pool": 61})
    nan = toy_net()
    with torch.no_grad():
        nan.get_parameter("0.bias")[2] = float("inf")
    with pytest.raises(ModelError, match=r"0\.bias: 1 of 8 weights are not finite"):
        search_mask(nan, toy_rows(), **settings)
    nothing_written(tmp_path / "run")
    search_mask(toy_net(), toy_rows(), **settings)


# --- mask files ---------------------------------------------------------------------------------


@pytest.fixture
def mask_file(tmp_path: Path) -> Path:
    space = ParameterSpace(("0.weight", "0.bias"), ((8, 4), (8,)))
    save_mask(tmp_path / "mask.safetensors", SparseMask(space, torch.tensor([1, 5, 33])))
    return tmp_path / "mask.safetensors"


def test_a_mask_for_another_model(mask_file: Path) -> None:
    assert load_mask(mask_file, model=toy_net()).count == 3
    with pytest.raises(IRDError) as error:
        load_mask(mask_file, model=torch.nn.Sequential(torch.nn.Linear(5, 8)))
    assert error.value.exit_code in (ArtifactError.exit_code, ModelError.exit_code)
    assert "0.weight" in str(error.value) and "[8, 5]" in str(error.value)


@pytest.mark.parametrize("what", ["cut", "edited", "empty", "missing", "text"])
def test_a_damaged_mask_file(what: str, mask_file: Path) -> None:
    whole = mask_file.read_bytes()
    middle = len(whole) // 2
    damaged = {
        "cut": whole[:-1],
        "edited": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "empty": b"",
        "text": b"a mask\n",
    }
    if what == "missing":
        mask_file.unlink()
    else:
        mask_file.write_bytes(damaged[what])
    for form in ([], ["--json"]):
        result = CliRunner().invoke(app, ["inspect", str(mask_file), *form])
        refused(result, ArtifactError, "mask.safetensors")
    with pytest.raises(ArtifactError):
        load_mask(mask_file)
