"""All files of the campaign of bad input: what is wrong with each, and a few that are sound."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import torch

from benchmarks.faults.cases import (
    FORMATS,
    INF,
    NAN,
    ROWS,
    TYPED,
    Case,
    Rows,
    changed,
    every,
    of_bytes,
    of_rows,
)
from tests.tiny import (
    VOCABULARY,
)


def labels() -> Iterator[Case]:
    fault, row = "a bad label", "row 7 (counting from 0): the label "
    loose = ("json", "jsonl")
    for name, value, said in (
        ("negative", -1, "-1 is out of range; 0 to 1 are accepted"),
        ("-100", -100, "-100 is out of range"),
        ("a billion", 10**9, "1000000000 is out of range; 0 to 1 are accepted"),
        ("2⁶²", 2**62, f"{2**62} is out of range"),
        ("1e300", 1e300, "1000000000"),
        ("a fraction", 0.5, "0.5 is not a whole number; for numbers use task 'regression'"),
        ("NaN", NAN, "in 'label' is missing"),
        ("infinite", INF, "inf is not a whole number"),
        ("null", None, "in 'label' is missing"),
    ):
        yield from of_rows(fault, name, changed(7, label=value), row + said)
    said = row + "'one' is text, where most labels are numbers"
    yield from of_rows(fault, "a word", changed(7, label="one"), said)
    said = row + "'1' is text, where most labels are numbers"
    yield from of_rows(fault, "a number as text", changed(7, label="1"), said, formats=loose)
    yield from of_rows(
        fault, "a list", changed(7, label=[1, 0]), row + "is a list of 2", formats=loose
    )
    yield from of_rows(
        fault, "an object", changed(7, label={"a": 1}), row + "{'a': 1}", formats=loose
    )
    yield from of_rows(
        fault, "-100 everywhere", every(label=-100), "36 rows", "(rows 0, 1, ", "and 26 more"
    )
    yield from of_rows(fault, "null everywhere", every(label=None), "36 rows", "(rows 0, 1, ")
    yield from of_rows(fault, "one class", every(label=1), "All 36 labels of", "are 1;", "limit")
    yield from of_rows(fault, "one word", every(label="good"), "All 36 labels of", "are 0 ('good')")
    yield from of_rows(fault, "one row", ROWS[:1], "All 1 labels of")
    yield from of_rows(
        fault, "three rows", ROWS[:3], "0 samples are held out", "at least 16 samples"
    )
    words: Rows = [{**row, "label": ("bad", "good")[row["label"]]} for row in ROWS]
    said = "the label 'godo' is not among 'bad', 'good'. Did you mean 'good'?"
    yield from of_rows(
        fault,
        "a word in eval",
        changed(3, words, label="godo"),
        f"row 3 (counting from 0): {said}",
        evaluated=True,
        options={"data": words},
    )
    said = "row 3 (counting from 0): the label 5 is out of range; 0 to 1 are accepted"
    yield from of_rows(
        fault, "5 in eval", changed(3, label=5), said, evaluated=True, options={"data": ROWS}
    )
    for name, value in (("1e300", 1e300), ("infinite", INF)):
        rows = [{**row, "label": i / 8} for i, row in enumerate(ROWS)]
        said = f"row 9 (counting from 0): the label {value} is not a finite number"
        yield from of_rows(fault, f"{name} in a regression", changed(9, rows, label=value), said)


def texts() -> Iterator[Case]:
    fault, row, loose = "bad text", "row 9 (counting from 0): ", ("json", "jsonl")
    missing = row + "the text in 'text' is missing"
    yield from of_rows(fault, "null", changed(9, text=None), missing, formats=TYPED)
    yield from of_rows(fault, "null everywhere", every(text=None), "36 rows", formats=TYPED)
    yield from of_rows(fault, "empty everywhere", every(text=""), "text")
    yield from of_rows(fault, "blank everywhere", every(text="  "), "All texts of", "are empty.")
    for name, value, said in (
        ("a number", 5, "'text' is 5 (int), not text"),
        ("an object", {"a": "b"}, "'text' is {'a': 'b'} (dict), not text"),
        ("a list", ["a", "b"], "'text' is ['a', 'b'] (list), not text"),
        ("half a surrogate pair", "a \ud800", "'text' is 'a \\ud800', which has half"),
    ):
        yield from of_rows(fault, name, changed(9, text=value), row + said, formats=loose)
    said = "used: 'text' is {'a': 'b'} (dict), not text"
    yield from of_rows(fault, "objects", every(text={"a": "b"}), said, formats=TYPED)
    yield from of_rows(fault, "numbers", every(text=3), "used: 'text' is 3 (int), not text")
    deep = json.dumps(ROWS)[:-1] + ', {"text": ' + "[" * 900 + "]" * 900 + ', "label": 1}]'
    yield of_bytes(fault, "900 lists deep", "a.json", deep, "row 36 (counting from 0): 'text' is [")
    rows = [{"prompt": None if i == 4 else "a", "completion": " good"} for i in range(36)]
    said = "row 4 (counting from 0): the text in 'prompt' is missing"
    yield from of_rows(fault, "null prompt", rows, said, formats=TYPED, model="gpt2")
    rows = [{"text": "" if i == 4 else "a good film"} for i in range(36)]
    said = "row 4 (counting from 0): no token came"
    yield from of_rows(fault, "no token", rows, said, model="gpt2", formats=("csv", *TYPED))


def columns() -> Iterator[Case]:
    fault, many = "a bad column", "a film,{0},{0}\n"
    body = "".join(many.format(i % 2) for i in range(40))
    for suffix, mark in (("csv", ","), ("tsv", "\t")):
        again = ("text,label,label\n" + body).replace(",", mark)
        said = "more than one column 'label'"
        yield of_bytes(fault, "a name twice", f"a.{suffix}", again, said)
    yield of_bytes(
        fault,
        "a key twice",
        "a.jsonl",
        '{"text": "a", "label": 1, "label": 0}\n' * 40,
        "40 rows of a.jsonl cannot be used: a key comes twice",
    )
    unknown = "holds the text cannot be told"
    for name, rows, said in (
        (
            "misspelt label",
            [{"text": r["text"], "lable": r["label"]} for r in ROWS],
            "No label column was found",
        ),
        (
            "no text",
            [{"label": r["label"], "size": 3} for r in ROWS],
            unknown,
        ),
        ("label only", [{"label": r["label"]} for r in ROWS], unknown),
    ):
        yield from of_rows(fault, name, rows, said)
    for option, word, said in (
        ("text-column", "txet", "Did you mean 'text'?"),
        ("label-column", "lable", "Did you mean 'label'?"),
    ):
        options = {option: word}
        yield from of_rows(
            fault, f"{option} {word}", ROWS, f"no column {word!r}", said, options=options
        )
    loose = ("json", "jsonl")
    rows = changed(5)
    rows[5] = {"text": "a film"}
    said = "row 5 (counting from 0): the label in 'label' is missing"
    yield from of_rows(fault, "a key is missing", rows, said, formats=loose)
    rows = changed(5)
    rows[5] = {"txt": "a film", "label": 1}
    said = "row 5 (counting from 0): the text in 'text' is missing"
    yield from of_rows(fault, "another key", rows, said, formats=loose)
    plain = lines()
    for name, suffix, content, said in (
        ("semicolons", "csv", plain.replace(",", ";"), "separated by ';'"),
        ("tabs", "csv", plain.replace(",", "\t"), "separated by '\\t'"),
        ("commas", "tsv", plain, "separated by ','"),
        ("no header", "csv", plain.partition("\n")[2], "No label column was found"),
    ):
        yield of_bytes(fault, name, f"a.{suffix}", content, said)
    wide = [",".join(["text", "label", *(f"c{i}" for i in range(10**5))])]
    wide += [f"a film,{i % 2}" + ",1" * 10**5 for i in range(36)]
    said = "has 100,002 columns, as 'text'; at most 10,000"
    yield of_bytes(fault, "100,000 columns", "a.csv", "\n".join(wide), said, huge=True)


def lines(rows: Rows | None = None, mark: str = ",") -> str:
    """The rows as csv without a quote."""
    body = [f"{r['text'].replace(',', '')}{mark}{r['label']}" for r in rows or ROWS]
    return "\n".join([f"text{mark}label", *body]) + "\n"


def files() -> Iterator[Case]:
    fault = "a file that cannot be read"
    plain = {
        "csv": lines().encode(),
        "tsv": lines(mark="\t").encode(),
        "json": json.dumps(ROWS).encode(),
        "jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
    }
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), sink)
    whole = {**plain, "parquet": sink.getvalue().to_pybytes()}
    noise = random.Random(0).randbytes(20_000)
    for suffix, content in whole.items():
        name = f"a.{suffix}"
        yield of_bytes(fault, "empty", name, b"", "is empty.")
        yield of_bytes(fault, "noise", name, noise, "")
        yield of_bytes(fault, "zeros", name, bytes(20_000), "")
        packed = gzip.compress(content)
        yield of_bytes(
            fault, "gzip", f"{name}.gz", packed, "no accepted format", "Unpack it first."
        )
        yield of_bytes(fault, "gzip, cut", f"{name}.gz", packed[:-30], "no accepted format")
    for suffix, content in plain.items():
        name, text = f"a.{suffix}", content.decode()
        yield of_bytes(
            fault, "gzip without its name", name, gzip.compress(content), "with gzip; unpack"
        )
        for code, said in (
            ("utf-16", "UTF-16 text"),
            ("utf-16-le", "UTF-16"),
            ("utf-32", "UTF-32"),
        ):
            yield of_bytes(fault, code, name, text.encode(code), said)
        latin = text.replace("play", "pläy", 1).encode("latin-1")
        yield of_bytes(
            fault, "latin-1", name, latin, "UTF-8", "row 2" if "sv" in suffix else "line"
        )
        yield of_bytes(
            fault, "latin-1 name", name, text.replace("text", "téxt").encode("latin-1"), "UTF-8"
        )
    for suffix, mark in (("csv", ","), ("tsv", "\t")):
        name, body = f"a.{suffix}", lines(mark=mark)
        yield of_bytes(fault, "header only", name, f"text{mark}label\n", "has no rows.")
        more = "row 36 (counting from 0): the header has 2 fields, and this row 3"
        yield of_bytes(fault, "a field more", name, f"{body}a{mark}b{mark}1\n{body}", more)
        fewer = "row 36 (counting from 0): the header has 2 fields, and this row 1"
        yield of_bytes(fault, "a field fewer", name, f"{body}a film\n{body}", fewer)
        if suffix == "tsv":  # where a quote that is never closed is text
            either = "row 36 (counting from 0): a quote that begins a field may be text"
            joined = f'{body}"a film{mark}1\n{body}a play"{mark}0\n'
            yield of_bytes(fault, "quotes of either kind", name, joined, either)
            continue
        quote = "row 36 (counting from 0): a quote is opened and never closed"
        yield of_bytes(fault, "an open quote", name, f'{body}"a film{mark}1\n{body}', quote)
        turned = "\n".join(mark.join(reversed(line.split(mark))) for line in body.splitlines())
        swallowed = f'{turned}\n1{mark}"a film\n{turned}\n'
        yield of_bytes(fault, "an open quote in the last column", name, swallowed, quote)
    for cut in (4, len(whole["parquet"]) // 2, len(whole["parquet"]) - 1):
        yield of_bytes(fault, f"cut at {cut}", "a.parquet", whole["parquet"][:cut], "as parquet")
    flipped = bytearray(whole["parquet"])
    flipped[40] ^= 255
    yield of_bytes(fault, "a flipped byte", "a.parquet", bytes(flipped), "as parquet")
    yield of_bytes(fault, "cut", "a.json", plain["json"][:700], "as JSON", "line 1 column")
    yield of_bytes(fault, "cut", "a.jsonl", plain["jsonl"][:-9], "as JSON: line 36")
    yield of_bytes(fault, "200,000 lists deep", "a.json", "[" * 200_000, "as JSON", "recursion")
    yield of_bytes(
        fault, "5,000 digits", "a.json", f'[{{"label": {"9" * 5000}}}]', "as JSON", "digits"
    )
    yield of_bytes(fault, "no objects", "a.json", "[1, 2]", "used: a value of type int came")
    yield of_bytes(fault, "empty objects", "a.json", "[{}]", "row 0", "the object is empty")
    yield of_bytes(fault, "a number", "a.json", "3", "type int came")
    yield of_bytes(fault, "no rows", "a.json", "[]", "has no rows.")
    yield of_bytes(
        fault, "columns", "a.json", '{"text": ["a", "b"], "label": [0, 1]}', "(list), not text"
    )
    yield of_bytes(
        fault, "one object over lines", "a.json", json.dumps({"data": ROWS}, indent=1), "as JSON"
    )


def places() -> Iterator[Case]:
    """What a path may be besides a file."""
    fault = "a path without data"

    def nothing(place: Path) -> Path:
        (place / "good.csv").write_text(lines())
        return place / "god.csv"

    def empty(place: Path) -> Path:
        (place / "dir").mkdir()
        (place / "dir" / "notes.txt").write_text("mine")
        return place / "dir"

    def loop(place: Path) -> Path:
        (place / "a.csv").symlink_to(place / "a.csv")
        return place / "a.csv"

    def fifo(place: Path) -> Path:
        os.mkfifo(place / "a.csv")
        return place / "a.csv"

    def surrogate(place: Path) -> Path:
        path = place / "\udcff.csv"
        path.write_text(lines())
        return path

    def other_column(place: Path) -> Path:
        (place / "validation.csv").write_text(lines().replace("label", "lab"))
        (place / "train.csv").write_text(lines())
        return place

    for name, write, said in (
        ("nothing there", nothing, "does not exist. Did you mean 'good.csv'?"),
        ("a directory without data", empty, "holds no split; files named like train.parquet"),
        ("a link to itself", loop, "a link that leads nowhere"),
        ("a pipe", fifo, "no regular file"),
        ("a name that is not UTF-8", surrogate, "is not UTF-8. Rename it."),
        (
            "a name of 300 letters",
            lambda place: place / ("a" * 300),
            "File name too long",
        ),
        ("a home that is unknown", lambda place: Path("~nobody-here/a.csv"), "cannot be used"),
        ("a validation split with another column", other_column, "has no column 'label'"),
    ):
        yield Case(fault, name, write, (said,))


def tokens() -> Iterator[Case]:
    fault, draw = "bad tokens", random.Random(0)
    last, third = "row 39 (counting from 0): ", "row 3 (counting from 0): "

    def ids(count: int) -> list[int]:
        return [draw.randrange(5, len(VOCABULARY)) for _ in range(count)]

    def tokenised(tokens: Any, **more: Any) -> dict[str, Any]:
        return {"input_ids": tokens, "attention_mask": [1] * len(tokens), **more}

    good: Rows = [tokenised(ids(5 + i % 4), label=i % 2) for i in range(40)]

    def at(i: int, tokens: Any, **more: Any) -> Rows:
        return changed(i, good, **(tokenised(tokens) | more))

    yield from of_rows("sound input", "tokens", good, formats=("parquet",))
    unused, mask = "'input_ids' cannot be used: ", third + "'attention_mask' "
    for name, rows, said in (
        ("beyond the vocabulary", at(-1, [5, 6, 9999]), last + "token id 9999 is out of range"),
        ("negative", at(-1, [5, -3]), last + "token id -3 is out of range"),
        ("empty", at(-1, []), last + "no token came"),
        ("null", at(-1, [], input_ids=None), last + unused + "it is missing"),
        ("null inside", at(-1, [5, None]), last + unused + "numbers are accepted"),
        ("too many", at(3, ids(50)), third + "50 tokens, but the model takes 32; max_length=32"),
        ("a shorter mask", at(3, ids(4), attention_mask=[1] * 3), mask + "holds 3 numbers for 4"),
        ("a longer mask", at(3, ids(4), attention_mask=[1] * 6), mask + "holds 6 numbers for 4"),
        ("a mask of 0", at(3, ids(4), attention_mask=[0] * 4), mask + "must hold 0 and 1"),
        ("a mask of 7", at(3, ids(4), attention_mask=[7] * 4), mask + "must hold 0 and 1"),
        ("null mask", at(3, ids(4), attention_mask=None), mask + "cannot be used"),
    ):
        yield from of_rows(fault, name, rows, said, formats=TYPED)
    loose = ("json", "jsonl")
    for name, rows, said in (
        ("a fraction", at(-1, [5, 1.5]), last + "'input_ids' is torch.float32 [2], not token ids"),
        (
            "a word inside",
            at(-1, [5, "a"]),
            last + unused + "numbers",
        ),
        ("text", changed(-1, good, input_ids="5 6"), last + unused),
        ("one number", changed(-1, good, input_ids=5), last + "'input_ids' has shape []"),
        ("nested", changed(-1, good, input_ids=[[5, 6]]), last + "'input_ids' has shape [1, 2]"),
        ("2⁷⁰", at(-1, [5, 2**70]), last + unused),
    ):
        yield from of_rows(fault, name, rows, said, formats=loose)
    for name, value in (("token_type_ids", 9), ("token_type_ids", -1), ("position_ids", 99)):
        rows = [{**r, name: [value * (i == 4)] * len(r["input_ids"])} for i, r in enumerate(good)]
        said = f"row 4 (counting from 0): {name!r} holds {value}, out of range"
        yield from of_rows(fault, f"{name} of {value}", rows, said, formats=TYPED)
    rows = [tokenised([], label=i % 2) for i in range(40)]
    yield from of_rows(fault, "empty everywhere", rows, "40 rows", "used: no token", formats=TYPED)
    million = at(3, ids(10) * 10**5)
    said = third + "1000000 tokens, but the model takes 32"
    yield from of_rows(fault, "a million", million, said, formats=TYPED, huge=True)
    cut = {"max-length": 32}
    yield from of_rows(
        "sound input", "a million, cut", million, formats=("parquet",), options=cut, huge=True
    )


def token_labels() -> Iterator[Case]:
    fault, fourth = "bad labels of tokens", "row 4 (counting from 0): "
    good: Rows = [{"input_ids": [5 + (i + k) % 20 for k in range(6)]} for i in range(40)]
    good = [{**row, "labels": list(row["input_ids"])} for row in good]
    yield from of_rows("sound input", "token labels", good, formats=TYPED, model="gpt2")
    rows = every(good, labels=[-100] * 6)
    said = "used: no token is left to predict (every label is -100) (rows 0, 1, "
    yield from of_rows(fault, "-100 everywhere", rows, "40 rows", said, formats=TYPED, model="gpt2")
    for name, value, said, formats in (
        ("-100 in one row", [-100] * 6, "no token is left to predict", TYPED),
        ("beyond the vocabulary", [5] * 5 + [777], "the label 777 is out of range", TYPED),
        ("negative", [5] * 5 + [-1], "the label -1 is out of range", TYPED),
        ("too few", [5] * 5, "5 labels came for 6 tokens", TYPED),
        ("null", None, "the labels cannot be used, it is missing", TYPED),
        ("a fraction", [5] * 5 + [1.5], "the labels are torch.float32 [6]", ("json", "jsonl")),
        ("NaN", [5] * 5 + [NAN], "the labels are torch.float32 [6]", ("json", "jsonl")),
        ("text", "a", "the labels cannot be used", ("json", "jsonl")),
        ("nested", [[5] * 6], "the labels are torch.int64 [1, 6]", ("json", "jsonl")),
    ):
        rows = changed(4, good, labels=value)
        yield from of_rows(fault, name, rows, fourth + said, formats=formats, model="gpt2")


def pixels() -> Iterator[Case]:
    fault, fifth = "bad pixels", "row 5 (counting from 0): 'pixel_values' "
    formats = ("json", "parquet")

    def image(value: float = 0.0, *shape: int) -> list[Any]:
        pixels = torch.zeros(shape or (3, 8, 8))
        pixels[0, 1, 1] = value
        return pixels.tolist()

    good: Rows = [{"pixel_values": image(i / 40), "label": i % 2} for i in range(40)]
    yield from of_rows("sound input", "pixels", good, formats=formats, model="vit")
    for name, value, said in (
        ("NaN", image(NAN), "holds 1 of 192 numbers that are not finite"),
        ("infinite", image(-INF), "holds 1 of 192 numbers that are not finite"),
        ("another shape", image(0.0, 3, 8, 9), "has shape [3, 8, 9], but most rows have [3, 8, 8]"),
        ("ragged", [[[1, 2], [3]]], "cannot be used: its parts differ in length"),
        ("null", None, "cannot be used: it is missing"),
    ):
        rows = changed(5, good, pixel_values=value)
        yield from of_rows(fault, name, rows, fifth + said, formats=formats, model="vit")
    for name, shape in (("another size", (3, 9, 9)), ("one channel", (1, 8, 8))):
        rows = every(good, pixel_values=image(0.0, *shape))
        said = "the model cannot take this sample"
        yield from of_rows(fault, name, rows, said, formats=formats, model="vit", runs=True)


def sound() -> Iterator[Case]:
    """Unusual, and nothing is wrong with it."""
    fault, many = "sound input", 10**7
    plain = lines()
    yield from of_rows(fault, "an empty text", changed(9, text=""))
    yield from of_rows(fault, "a zero byte in a text", changed(9, text="a \0 film"))
    for suffix, content in (("csv", plain), ("json", json.dumps(ROWS))):
        yield of_bytes(fault, "BOM", f"a.{suffix}", content.encode("utf-8-sig"))
        yield of_bytes(fault, "CRLF", f"a.{suffix}", content.replace("\n", "\r\n"))
    yield of_bytes(fault, "spaces in the header", "a.csv", plain.replace(",label", ", Label"))
    yield of_bytes(fault, "quotes inside", "a.csv", plain + 'a "good" film,1\n')
    yield of_bytes(
        fault,
        "a quoted last column",
        "a.csv",
        'label,text\n1,a film\n0,"b\nc"\n' * 1 + "".join(f'{i % 2},"a\nfilm"\n' for i in range(36)),
    )
    for name in (
        "ümläut 数据.csv",
        "a\nb.csv",
        "with space.csv",
        "-dash.csv",
        "'\"$(x) %s {y}.csv",
    ):
        yield of_bytes(fault, "name", name, plain)

    def read_only(place: Path) -> Path:
        path = place / "a.csv"
        path.write_text(plain)
        path.chmod(0o444)
        return path

    yield Case(fault, "read-only", read_only)
    cut = {"max-length": 16}
    for suffix in FORMATS:
        text = "good " * (many // 5) if suffix == "csv" else "g" * many
        rows = changed(5, text=text)
        yield from of_rows(
            fault, "10 MB in a row, cut", rows, formats=(suffix,), options=cut, huge=True
        )
    said = "row 5 (counting from 0): more than 20002 tokens, but the model takes 32; max_length=32"
    rows = changed(5, text="good " * (many // 5))
    yield from of_rows("bad text", "10 MB in a row", rows, said, formats=("csv", *TYPED), huge=True)


def cases(*, huge: bool = True) -> list[Case]:
    """All files, the huge ones among them or not."""
    groups = (labels, texts, columns, files, places, tokens, token_labels, pixels, sound)
    return [case for group in groups for case in group() if huge or not case.huge]
