"""The command line, executed: what it writes, prints, and leaves when it is stopped."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from typer.testing import CliRunner, Result

from ird_search import load_mask
from ird_search.candidate import Attempt, Trial
from ird_search.cli import app
from ird_search.command import SECTIONS
from ird_search.config import DataConfig, SearchConfig
from ird_search.ledger import Ledger, Unit
from ird_search.proxy import Proxies
from tests.tiny import TEXT_ROWS, save_tiny_bert
from tests.toy import OPTIONS

FILES = {
    "config.yaml",
    "ledger",
    "mask.safetensors",
    "report.md",
    "rounds.jsonl",
    "samples.jsonl",
    "inclusion.safetensors",
    "run.json",
    "study.db",
}


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def command(place: Path, output: Path, **changes: str | None) -> list[str]:
    """`run` on the tiny model; `None` leaves an option out."""
    options: dict[str, str | None] = {
        "model": str(place / "tiny"),
        "data": str(place / "rows.csv"),
        "output": str(output),
        **OPTIONS,
        "seeds": "2",
        **{name.replace("_", "-"): value for name, value in changes.items()},
    }
    return ["run", *(w for k, v in options.items() if v is not None for w in (f"--{k}", v))]


def made(output: Path) -> set[str]:
    return {p.name for p in output.iterdir() if p.name != ".lock"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and a csv file."""
    directory = tmp_path_factory.mktemp("cli")
    save_tiny_bert(directory / "tiny", head=False)
    with (directory / "rows.csv").open("w") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(TEXT_ROWS * 6)
    return directory


@pytest.fixture(scope="module")
def finished(place: Path) -> tuple[Path, Result]:
    """A finished run, and what it printed with --json."""
    return place / "run", call(*command(place, place / "run"), "--json")


# --- what a run writes --------------------------------------------------------------------------


def test_a_run_writes_its_files(finished: tuple[Path, Result]) -> None:
    output, result = finished
    assert result.exit_code == 0, result.stderr
    assert made(output) == FILES
    rounds = [json.loads(line) for line in (output / "rounds.jsonl").read_text().splitlines()]
    assert [r["round"] for r in rounds] == list(range(1, len(rounds) + 1)) and len(rounds) >= 2
    report = (output / "report.md").read_text()
    assert report.startswith("# Mask for tiny\n") and "samples of rows.csv" in report


def test_json_is_one_document_and_nothing_else(finished: tuple[Path, Result]) -> None:
    output, result = finished
    document = json.loads(result.stdout)
    assert result.stdout.startswith("{") and result.stdout.endswith("}\n")
    mask = load_mask(output / "mask.safetensors")
    assert document["mask"] == str(output / "mask.safetensors")
    assert (document["parameters"], document["density"]) == (mask.count, mask.density)
    assert [e["kind"] for e in document["verdict"]] == ["ird", "random"]
    assert document["learning_rate"] == 0.01 and document["score"] > 0
    assert "round 1:" in result.stderr  # progress does not go to standard output


def test_a_winner_that_fails_its_verdict_is_still_json(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Proxies._run

    def run(self: Proxies, attempt: Attempt) -> Trial:
        if attempt.verdict:
            return Trial(0.01, 1, 0.0, 0.0, {}, 0.0, "it diverged")
        return real(self, attempt)

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    monkeypatch.setattr(Proxies, "_run", run)
    result = call(*command(place, tmp_path / "run"), "--json")
    document = json.loads(result.stdout, parse_constant=no_constant)
    assert document["score"] is None and document["verdict"][0]["failure"] == "it diverged"
    assert document["sentence"].endswith("of the same size: it diverged.")
    assert made(tmp_path / "run") == FILES


def test_optuna_loads_the_record(finished: tuple[Path, Result]) -> None:
    output, _ = finished
    rounds = [json.loads(line) for line in (output / "rounds.jsonl").read_text().splitlines()]
    study = optuna.load_study(study_name="ird-search", storage=f"sqlite:///{output / 'study.db'}")
    assert len(study.trials) == len(list(output.glob("ledger/proxy-*.json")))  # one a fine-tune
    stages = [t.user_attrs["stage"] for t in study.trials]
    assert stages[0] == "warm-up" and set(stages) == {"warm-up", "choose", "verdict"}
    scores = {t.value for t in study.trials if t.user_attrs["stage"] == "choose"}
    assert {s["score"] for r in rounds for s in r["nominated"]} <= scores
    kinds = {t.params["kind"] for t in study.trials if t.user_attrs["stage"] == "verdict"}
    assert kinds == {"ird", "random"}


def test_a_run_that_fails_says_why_and_keeps_its_record(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    result = call(*command(place, output, learning_rate="1e37", warmup_steps="0"))
    assert result.exit_code == 6
    assert "round 1, snr: the held-out loss is not finite" in result.stderr
    assert "mask.safetensors" not in made(output)
    study = optuna.load_study(study_name="ird-search", storage=f"sqlite:///{output / 'study.db'}")
    failed = [t for t in study.trials if t.state == optuna.trial.TrialState.FAIL]
    assert failed and all(t.user_attrs["failure"] for t in failed)


def test_without_json_a_table(place: Path, tmp_path: Path) -> None:
    result = call(*command(place, tmp_path / "run", seeds="1"))
    assert result.exit_code == 0, result.stderr
    assert "Best pair: " in result.stdout and "random mask" in result.stdout
    assert f"Mask: {tmp_path / 'run' / 'mask.safetensors'}" in result.stdout


def test_the_config_replays_to_the_same_bytes(
    finished: tuple[Path, Result], tmp_path: Path
) -> None:
    output, _ = finished
    result = call("run", "--config", output / "config.yaml", "-o", tmp_path / "again")
    assert result.exit_code == 0, result.stderr
    for name in ("mask.safetensors", "rounds.jsonl", "report.md", "config.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (output / name).read_bytes(), name


def test_an_option_overrides_the_config(place: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("density: 7\nhead: []\nmodel: nowhere\n")
    result = call(*command(place, tmp_path / "run", config=str(tmp_path / "c.yaml"), seeds="1"))
    assert result.exit_code == 0, result.stderr
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert resolved["density"] == 0.02 and resolved["model"] == str(place / "tiny")
    assert resolved["head"] == []  # an empty list is a setting: no head


def test_a_list_that_is_not_empty_by_itself_can_be_emptied(place: Path, tmp_path: Path) -> None:
    """Of a head none: all of the classifier is a candidate, and nothing is trained beside it."""
    none = {"head": "none", "groups": "none", "vary": "none", "controls": "none"}
    result = call(*command(place, tmp_path / "run", **none))
    assert result.exit_code == 0, result.stderr
    found = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert {name: found[name] for name in none} == {name: [] for name in none}
    mask = load_mask(tmp_path / "run" / "mask.safetensors")
    assert "classifier.weight" in mask.space.names


def test_every_setting_is_resolved(finished: tuple[Path, Result]) -> None:
    resolved = yaml.safe_load((finished[0] / "config.yaml").read_text())
    names = {f.name for c in (SearchConfig, DataConfig) for f in fields(c)}
    assert resolved.keys() == names | {"model", "data", "eval_data", "processor", "revision"}


# --- help, env, inspect -------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["inspect", "--help"]])
def test_help_does_not_wait_for_torch(words: list[str]) -> None:
    code = f"""
import sys
from ird_search.cli import main
sys.argv = ["ird-search", *{words}]
try:
    main()
except SystemExit as end:
    heavy = {{"torch", "transformers", "datasets", "optuna", "numpy"}} & sys.modules.keys()
    sys.exit(f"imported {{heavy}}" if heavy else end.code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: ird-search" in done.stdout


@pytest.mark.slow
def test_who_brings_a_module_does_not_wait_for_the_models_of_transformers() -> None:
    code = """
import sys
import torch
from ird_search import finetune, search_mask
from ird_search.fisher.vmap import traceable_attention
with traceable_attention(torch.nn.Linear(2, 1)):
    heavy = {"transformers.modeling_utils", "scipy.stats"} & sys.modules.keys()
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_setting_is_an_option_with_its_help() -> None:
    text = " ".join(call("run", "--help").stdout.split())
    for config in (SearchConfig, DataConfig):
        for f in fields(config):
            flag = {"text_columns": "text-column"}.get(f.name, f.name.replace("_", "-"))
            assert f"--{flag} " in text, f.name
    assert "[default: 0.005]" in text and "Exit codes: 0 ok, 2 usage" in text


def test_the_options_of_a_run_are_in_sections() -> None:
    lines = call("run", "--help").stdout.splitlines()
    heads = {line.rstrip(":"): i for i, line in enumerate(lines) if line[:1].isalpha()}
    assert [name for name in heads if name in SECTIONS.values()] == list(SECTIONS.values())
    for config in (SearchConfig, DataConfig):
        assert {f.name for f in fields(config)} & SECTIONS.keys()
    places = {"--data ": "Options", "--tolerance": "The mask", "--dtype": "The machine"}
    for flag, section in places.items():
        at = next(i for i, line in enumerate(lines) if line.strip().startswith(flag))
        assert max((i, name) for name, i in heads.items() if i < at)[1] == section


def test_env_tells_versions_and_nothing_of_the_machine() -> None:
    found = json.loads(call("env", "--json").stdout)
    text = call("env").stdout
    assert {"python", "torch", "ird_search", "cuda"} <= found.keys()
    assert all(name in text and value in text for name, value in found.items())
    assert os.uname().nodename not in text.split() and str(Path.home()) not in text


def test_inspect(finished: tuple[Path, Result]) -> None:
    output, _ = finished
    as_text = call("inspect", output)
    assert as_text.exit_code == 0 and "ird-mask" in as_text.stdout
    assert call("inspect", output / "mask.safetensors").stdout == as_text.stdout
    document = json.loads(call("inspect", output, "--json").stdout)
    mask = load_mask(output / "mask.safetensors")
    assert document["count"] == mask.count and document["samples"] >= 4


def test_without_a_command_there_is_help() -> None:
    result = call()
    assert "Usage:" in result.stdout + result.stderr and "demo" in result.stdout + result.stderr


# --- usage --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "--output", "x", "--densty", "1"], "--densty"),
        (["run", "--output", "x", "--strategy", "wlak"], "wlak"),
        (["run", "--output", "x", "--pool", "many"], "--pool"),
        (["run", "--model", "m", "--data", "d"], "--output"),
        (["runn"], "runn"),
        (["inspect"], "file"),
    ],
)
def test_wrong_usage_is_2(words: list[str], said: str) -> None:
    result = call(*words)
    assert result.exit_code == 2 and said in result.stderr.lower()
    assert not Path("x").exists()


def test_the_signal_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    call("env")
    assert signal.getsignal(signal.SIGTERM) is before


# --- memory, and signals ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate …")]
)
def test_out_of_memory_is_75(
    error: Exception, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("ird_search.finetunes.finetune", full)
    result = call(*command(place, tmp_path / "run"))
    assert result.exit_code == 75
    assert "out of memory. Lower --batch-size" in result.stderr
    assert f"Go on with: ird-search resume {tmp_path / 'run'}\n" in result.stderr


def test_another_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("ird_search.environment.environment", broken)
    result = call("env")
    assert isinstance(result.exception, RuntimeError) and result.exit_code == 1


def left_in_order(output: Path) -> None:
    """Finished units, and nothing half-written."""
    assert "mask.safetensors" not in made(output) and made(output) <= FILES
    assert not list(output.rglob("*.tmp"))
    for unit in (output / "ledger").glob("*.json"):
        kind, _, key = unit.stem.partition("-")
        assert Ledger(output / "ledger").get(kind, key) is not None


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell lets its background jobs ignore what Ctrl-C sends."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_two_units(
    number: signal.Signals,
    place: Path,
    finished: tuple[Path, Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    put = Ledger.put

    def put_and_stop(self: Ledger, kind: Any, key: str, unit: Unit) -> None:
        put(self, kind, key, unit)
        done.append(key)
        if len(done) == 6:
            os.kill(os.getpid(), number)

    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "put", put_and_stop)
        result = call(*command(place, output))
    assert result.exit_code == 128 + number
    assert f"Go on with: ird-search resume {output}\n" in result.stderr
    left_in_order(output)
    assert len(Ledger(output / "ledger")) == 6
    assert call("resume", output).exit_code == 0
    whole = (finished[0] / "mask.safetensors").read_bytes()
    assert (output / "mask.safetensors").read_bytes() == whole
