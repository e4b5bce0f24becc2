"""Damaged ledgers and studies, and what changed between a run and its resume."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults import Row
from benchmarks.faults.runner import Runner
from benchmarks.faults.tiny import command, same_files, tiny_problem
from ird_search.crash import VARIABLE
from ird_search.ledger import Ledger
from ird_search.study import restored


def campaign(*, every: int = 1) -> list[Row]:
    """The rows; of the ledger's files one in `every` is damaged."""
    with tiny_problem() as place, Runner() as runner:
        whole, half = place / "whole", place / "half"
        ended = runner.run(command(place, whole))
        assert ended.code == 0, ended.err
        # Everything is done but for the mask, so each file of the ledger is needed.
        ended = runner.run(command(place, half), env={VARIABLE: "report written"})
        assert ended.code == 128 + 9, ended.err
        return [
            _damaged(runner, place, whole, half, every),
            _studies(place, half),
            _changed(runner, place, half),
            _fresh(runner, place, whole, half),
        ]


def _damaged(runner: Runner, place: Path, whole: Path, half: Path, every: int) -> Row:
    names = sorted(p.name for p in (half / "ledger").iterdir() if p.name != "claims")[::every]
    names += ["../study.db", "../rounds.jsonl", "../run.json"]
    wrong, tried = list[str](), 0
    for name in names:
        for how, damage in DAMAGES.items():
            tried += 1
            output = place / "damaged"
            shutil.rmtree(output, ignore_errors=True)
            shutil.copytree(half, output)
            damage(output / "ledger" / name)
            ended = runner.run(["resume", output])
            told = restored(output / "study.db", Ledger(output / "ledger"))
            if ended.code or same_files(output, whole) or told:
                wrong.append(f"{name} {how}: {ended.code}, {told}: {ended.err[-300:]}")
    promise = "the unit is done again, the study made again; the same bytes"
    fault = "a file of the ledger, or the study, is cut, altered, emptied or gone"
    return Row(fault, promise, tried, tried - len(wrong), {}, tuple(wrong[:5]))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "altered": _flip,
    "emptied": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}


def _studies(place: Path, half: Path) -> Row:
    """A study of a finished run, made again from the ledger alone."""
    whole = (half / "study.db").read_bytes()
    wrong, tried = list[str](), 20
    for i in range(tried):
        output = place / "study" / "study.db"
        output.parent.mkdir(exist_ok=True)
        output.write_bytes(whole[: len(whole) * i // tried])
        ledger = Ledger(half / "ledger")
        if not restored(output, ledger) or restored(output, ledger):
            wrong.append(f"cut at {i}/{tried}")
    promise = "it is made again from the ledger, with every fine-tune"
    return Row("a torn Optuna study", promise, tried, tried - len(wrong), {}, tuple(wrong))


def _changed(runner: Runner, place: Path, half: Path) -> Row:
    """One byte of the model, the data or the settings is another one at the resume."""
    model, rows = place / "model" / "model.safetensors", place / "rows.csv"
    config = half / "config.yaml"
    edits: dict[str, tuple[Path, bytes, bytes, str]] = {
        "a weight": (model, model.read_bytes()[-1:], b"", "weights was"),
        "a word of the data": (rows, b"film", b"good", "samples was"),
        "a row less": (rows, rows.read_bytes().splitlines(keepends=True)[-1], b"", "samples was"),
        "a setting": (config, b"density: 0.02", b"density: 0.03", ""),
    }
    wrong = []
    for name, (path, old, new, said) in edits.items():
        before = path.read_bytes()
        at = before.rindex(old)
        new = bytes([before[-1] ^ 1]) if name == "a weight" else new
        path.write_bytes(before[:at] + new + before[at + len(old) :])
        try:
            words = command(place, half) if path == config else ["resume", str(half)]
            ended = runner.run(words)
        finally:
            path.write_bytes(before)
        expected = "density was 0.03, is 0.02" if path == config else said
        if ended.code != 2 or expected not in ended.err or "--fresh" not in ended.err:
            wrong.append(f"{name}: code {ended.code}: {ended.err[-400:]}")
    promise = "refused with the difference; `--fresh` is offered"
    fault = "model, data or settings changed before the resume"
    return Row(fault, promise, len(edits), len(edits) - len(wrong), {}, tuple(wrong))


def _fresh(runner: Runner, place: Path, whole: Path, half: Path) -> Row:
    """Begun anew with other settings, and then with the first ones again."""
    output = place / "fresh"
    shutil.copytree(half, output)
    wrong = []
    other = runner.run(
        [*command(place, output, seed="1"), "--fresh"], env={VARIABLE: "report written"}
    )
    if other.code != 128 + 9:
        wrong.append(f"other settings: code {other.code}: {other.err[-300:]}")
    again = runner.run([*command(place, output), "--fresh"])
    if again.code or same_files(output, whole):
        wrong.append(f"the first settings: code {again.code}: {again.err[-300:]}")
    finished = runner.run([*command(place, output), "--fresh"])
    if finished.code != 2:
        wrong.append(f"a finished run was taken away: {finished.code}")
    promise = "an unfinished run makes room for another, a finished one does not"
    return Row("`--fresh`", promise, 3, 3 - len(wrong), {}, tuple(wrong))
