"""Damaged ledgers and studies, and what changed between a run and its resume."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.faults import Row
from benchmarks.faults.tiny import Bench, bench, command, same_files
from ird_search.crash import VARIABLE
from ird_search.ledger import Ledger
from ird_search.study import is_whole, restore


def campaign() -> list[Row]:
    """The rows."""
    with bench() as b:
        half = almost_done(b)
        return [damaged(b, half), studies(half), changed(b, half), fresh(b, half)]


def almost_done(b: Bench) -> Path:
    """A run of which all is done but for the mask, so that each file of its ledger is needed."""
    half = b.place / "half"
    ended = b.runner.run(command(b.place, half), env={VARIABLE: "report written"})
    assert ended.code == 128 + 9, ended.err
    return half


def damaged(b: Bench, half: Path, *, every: int = 1, hows: Sequence[str] = ()) -> Row:
    """One in `every` of the ledger's files, and those of the run, each damaged in these ways."""
    names = sorted(p.name for p in (half / "ledger").iterdir() if p.name != "claims")[::every]
    names += ["../study.db", "../rounds.jsonl", "../run.json"]
    wrong, tried = list[str](), 0
    for name in names:
        for how in hows or DAMAGES:
            tried += 1
            output = b.place / "damaged"
            shutil.rmtree(output, ignore_errors=True)
            shutil.copytree(half, output)
            DAMAGES[how](output / "ledger" / name)
            ended = b.runner.run(["resume", output])
            told = is_whole(output / "study.db", Ledger(output / "ledger"))
            if ended.code or same_files(output, b.whole) or not told:
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


def studies(half: Path) -> Row:
    """A study of a finished run, made again from the ledger alone."""
    whole = (half / "study.db").read_bytes()
    wrong, tried = list[str](), 20
    for i in range(tried):
        output = half.parent / "study" / "study.db"
        output.parent.mkdir(exist_ok=True)
        output.write_bytes(whole[: len(whole) * i // tried])
        ledger = Ledger(half / "ledger")
        torn = not is_whole(output, ledger)
        restore(output, ledger)
        if not torn or not is_whole(output, ledger):
            wrong.append(f"cut at {i}/{tried}")
    promise = "it is made again from the ledger, with every fine-tune"
    return Row("a torn Optuna study", promise, tried, tried - len(wrong), {}, tuple(wrong))


def changed(b: Bench, half: Path) -> Row:
    """One byte of the model, the data or the settings is another one at the resume."""
    model, rows = b.place / "model" / "model.safetensors", b.place / "rows.csv"
    config, settings = half / "config.yaml", model.with_name("config.json")
    edits: dict[str, tuple[Path, bytes, bytes, str]] = {
        "a weight": (model, model.read_bytes()[-1:], b"", "weights was"),
        "a word of the data": (rows, b"film", b"good", "samples was"),
        "a row less": (rows, rows.read_bytes().splitlines(keepends=True)[-1], b"", "samples was"),
        "an activation": (settings, b'"gelu"', b'"relu"', "model, buffers and task was"),
        "a setting": (config, b"density: 0.02", b"density: 0.03", "density was 0.02, is 0.03"),
        "an option": (config, b"density: 0.02", b"density: 0.03", "density was 0.03, is 0.02"),
    }
    wrong = []
    for name, (path, old, new, said) in edits.items():
        before = path.read_bytes()
        at = before.rindex(old)
        new = bytes([before[-1] ^ 1]) if name == "a weight" else new
        path.write_bytes(before[:at] + new + before[at + len(old) :])
        try:
            words = command(b.place, half) if name == "an option" else ["resume", str(half)]
            ended = b.runner.run(words)
        finally:
            path.write_bytes(before)
        if ended.code != 2 or said not in ended.err or "--fresh" not in ended.err:
            wrong.append(f"{name}: code {ended.code}: {ended.err[-400:]}")
    promise = "refused with the difference; `--fresh` is offered"
    fault = "model, data or settings changed before the resume"
    return Row(fault, promise, len(edits), len(edits) - len(wrong), {}, tuple(wrong))


def fresh(b: Bench, half: Path) -> Row:
    """Begun anew with other settings, and then with the first ones again."""
    output = b.place / "fresh"
    shutil.copytree(half, output)
    wrong = []
    other = b.runner.run(
        [*command(b.place, output, seed="1"), "--fresh"], env={VARIABLE: "report written"}
    )
    if other.code != 128 + 9:
        wrong.append(f"other settings: code {other.code}: {other.err[-300:]}")
    again = b.runner.run([*command(b.place, output), "--fresh"])
    if again.code or same_files(output, b.whole):
        wrong.append(f"the first settings: code {again.code}: {again.err[-300:]}")
    finished = b.runner.run([*command(b.place, output), "--fresh"])
    if finished.code != 2:
        wrong.append(f"a finished run was taken away: {finished.code}")
    promise = "an unfinished run makes room for another, a finished one does not"
    return Row("`--fresh`", promise, 3, 3 - len(wrong), {}, tuple(wrong))
