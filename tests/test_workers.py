"""More processes for one run, and where a run stands."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

from ird_search import finetunes, search_mask
from ird_search.cli import app
from ird_search.devices import computing
from ird_search.errors import NoProxySucceeded, UsageError
from ird_search.status import Status
from tests.tiny import TEXT_ROWS, save_tiny_bert
from tests.toy import OPTIONS, QUICK, bits, same_bits, toy_net, toy_rows


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows, and in `run` a finished search of them."""
    directory = tmp_path_factory.mktemp("status")
    save_tiny_bert(directory / "tiny", head=False)
    with (directory / "rows.csv").open("w") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(TEXT_ROWS * 6)
    assert call(*command(directory, directory / "run")).exit_code == 0
    return directory


def command(place: Path, output: Path, **changes: str) -> list[str]:
    options = {"model": str(place / "tiny"), "data": str(place / "rows.csv"), "output": str(output)}
    options |= OPTIONS | changes
    return ["run", *(word for k, v in options.items() for word in (f"--{k}", v))]


# --- more processes -------------------------------------------------------------------------------


def test_two_processes_give_the_bytes_of_one(tmp_path: Path) -> None:
    settings = {**QUICK, "strict": True, "seeds": 1}
    model = toy_net()
    before, threads = bits(model), torch.get_num_threads()
    for workers in (1, 2):
        output = tmp_path / str(workers)
        search_mask(model, toy_rows(), output=output, workers=workers, **settings)
        assert same_bits(before, model) and torch.get_num_threads() == threads
    one, two = ((tmp_path / n / "mask.safetensors").read_bytes() for n in "12")
    assert one == two


def test_what_cannot_be_pickled_is_refused_before_any_work(tmp_path: Path) -> None:
    class Local(nn.Sequential):
        """Nobody else can import this."""

    with pytest.raises(UsageError, match=r"cannot be sent to other processes.*workers=1"):
        search_mask(Local(*toy_net()), toy_rows(), output=tmp_path / "run", workers=2, **QUICK)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("strict", [False, True])
def test_cores_are_shared_and_given_back(strict: bool) -> None:
    threads = torch.get_num_threads()
    with pytest.raises(KeyError), computing(processes=256, strict=strict):
        assert torch.get_num_threads() == 1
        assert torch.are_deterministic_algorithms_enabled() == strict
        raise KeyError
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    with computing():
        assert torch.get_num_threads() == threads


# --- where a run stands ---------------------------------------------------------------------------


def test_the_status_of_a_finished_run(place: Path) -> None:
    found = Status.of(place / "run")
    assert found.state == "finished" and found.process is None and found.command == ""
    assert found.units["proxy"] > 5 and found.units["narrowing"] > 2 and found.units["fisher"] == 0
    assert found.units["head"] == 1 and not found.damaged
    assert found.units["check"] == found.units["answers"] == 1
    said = call("status", place / "run").stdout
    assert (
        "finished" in said and f"{found.units['proxy']} fine-tunes" in said and "round 1:" in said
    )
    told = json.loads(call("status", place / "run", "--json").stdout)
    assert told == json.loads(json.dumps(found.to_dict()))


def test_the_status_of_an_unfinished_run(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "a run"
    result = call(*command(place, output, **{"learning-rate": "1e37", "warmup-steps": "0"}))
    assert result.exit_code == 6
    next(output.glob("ledger/proxy-*.json")).write_text("torn")
    said = call("status", output).stdout
    assert "unfinished" in said and "1 damaged" in said
    assert "times: the held-out loss is not finite" in said
    assert said.endswith(f"Go on with: ird-search resume '{output}'\n")


def test_a_directory_that_holds_no_run(tmp_path: Path) -> None:
    for words in ("status", "resume"):
        result = call(words, tmp_path)
        assert (
            result.exit_code == 2 and "is no run directory: it lacks config.yaml" in result.stderr
        )


def test_a_resume_of_a_finished_run_checks_it(place: Path) -> None:
    study = place / "run" / "study.db"
    whole = study.read_bytes()
    assert "is whole" in call("resume", place / "run").stdout
    assert study.read_bytes() == whole
    study.write_bytes(whole[:5000])
    assert (
        "study.db was missing or damaged, and is made again" in call("resume", place / "run").stdout
    )
    assert "made again" not in call("resume", place / "run").stdout


def test_a_damaged_mask_of_a_finished_run_is_told(place: Path) -> None:
    mask = place / "run" / "mask.safetensors"
    whole = mask.read_bytes()
    mask.write_bytes(whole[:-1])
    assert call("resume", place / "run").exit_code == 5
    mask.write_bytes(whole)


def test_objects_of_a_program_cannot_be_named(tmp_path: Path, monkeypatch: Any) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ird_search.run.report.round_line", stop)
        with pytest.raises(KeyboardInterrupt):
            search_mask(toy_net(), toy_rows(), output=tmp_path / "run", **QUICK)
    assert Status.of(tmp_path / "run").command == ""
    result = call("resume", tmp_path / "run")
    assert result.exit_code == 2 and "works on <Sequential> and <list>" in result.stderr
    search_mask(toy_net(), toy_rows(), output=tmp_path / "run", **QUICK)
    assert Status.of(tmp_path / "run").state == "finished"


def test_relative_paths_are_resumed_from_anywhere(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    words = command(Path(), tmp_path / "run", **{"learning-rate": "1e37", "warmup-steps": "0"})
    assert call(*words).exit_code == 6
    monkeypatch.chdir(tmp_path)
    assert call("resume", "run").exit_code == 6  # the same reasons, from the ledger


# --- whether a file is whole ----------------------------------------------------------------------


def test_verify(place: Path, tmp_path: Path) -> None:
    mask = place / "run" / "mask.safetensors"
    assert "a whole mask, " in call("verify", mask).stdout
    assert "the weights that it records" in call("verify", mask, "--model", place / "tiny").stdout
    save_tiny_bert(tmp_path / "other", head=False, seed=1)
    other = call("verify", mask, "--model", tmp_path / "other")
    assert other.exit_code == 5 and "are not those that the mask was made for" in other.stderr
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(mask.read_bytes()[:-3])
    assert call("verify", torn).exit_code == 5


# --- what an exception ended ----------------------------------------------------------------------


def test_what_an_exception_ended_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**QUICK, "seeds": 1}
    search_mask(toy_net(), toy_rows(), output=tmp_path / "whole", **settings)
    real, broken = finetunes.evaluate, [True]

    def evaluate(*args: Any, **more: Any) -> Any:
        if broken and broken.pop():
            raise ValueError("a device fell off")
        return real(*args, **more)

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetunes, "evaluate", evaluate)
        told = search_mask(toy_net(), toy_rows(), **{**settings, "warmup_steps": 0})
        assert "1 of" in told.table() and "by an exception" in told.table()
        assert "a device fell off" in told.table()
        broken.append(True)
        patch.setattr("ird_search.run.report.markdown", stop)
        with pytest.raises((KeyboardInterrupt, NoProxySucceeded)):
            search_mask(toy_net(), toy_rows(), output=tmp_path / "run", **settings)
    assert Status.of(tmp_path / "run").failures == {"a device fell off": 1}
    search_mask(toy_net(), toy_rows(), output=tmp_path / "run", **settings)
    assert Status.of(tmp_path / "run").failures == {}
    one, two = ((tmp_path / n / "mask.safetensors").read_bytes() for n in ("whole", "run"))
    assert one == two
