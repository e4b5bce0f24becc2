"""What is refused: every file that is not, byte for byte, what would be written for it."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from ird_search.artifact import Delta, load_delta, load_mask, save_delta, save_mask
from ird_search.artifact.container import Layout, encode
from ird_search.artifact.parts import Part
from ird_search.artifact.plans import DELTA, MASK, DeltaPlan, MaskPlan
from ird_search.errors import ArtifactError, ResourceError, UsageError
from ird_search.mask import SparseMask
from ird_search.parameters import ParameterSpace
from tests.artifacts import KINDS, PROVENANCE, SOME_MASK, Kind, forged, packed, taken_apart


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Masks and deltas are read by the same rules."""
    found: Kind = request.param
    return found


@pytest.fixture
def small(tmp_path: Path, kind: Kind) -> Path:
    """A file with a part of every kind, and provenance."""
    kind.save(tmp_path / "small", PROVENANCE)
    return tmp_path / "small"


@pytest.fixture
def mask_file(tmp_path: Path) -> Path:
    KINDS["mask"].save(tmp_path / "m", PROVENANCE)
    return tmp_path / "m"


@pytest.fixture
def delta_file(tmp_path: Path) -> Path:
    KINDS["delta"].save(tmp_path / "d", PROVENANCE)
    return tmp_path / "d"


def refused(kind: Kind, path: Path, data: bytes, *says: str) -> None:
    path.write_bytes(data)
    refusal(kind, path, *says)


def refusal(kind: Kind, path: Path, *says: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        kind.load(path)
    text = str(caught.value)
    assert str(path) in text
    for words in says:
        assert words in text


# --- damage -------------------------------------------------------------------------------------


def test_every_truncation_and_every_extension_is_refused(kind: Kind, small: Path) -> None:
    data = small.read_bytes()
    for length in reversed(range(len(data))):
        os.truncate(small, length)  # in place: making the file anew each time is what takes long
        refusal(kind, small)
    refused(kind, small, data + b"\0")
    refused(kind, small, data + data)


def test_every_flipped_byte_is_refused(kind: Kind, small: Path) -> None:
    data = small.read_bytes()
    with open(small, "r+b", buffering=0) as file:
        for position, byte in enumerate(data):
            for pattern in (0x01, 0x80, 0xFF):
                os.pwrite(file.fileno(), bytes([byte ^ pattern]), position)
                refusal(kind, small)
            os.pwrite(file.fileno(), bytes([byte]), position)
    kind.load(small)


def test_a_missing_file_says_so(kind: Kind, tmp_path: Path) -> None:
    noun = kind.form.noun
    with pytest.raises(ArtifactError, match=rf"{noun}\.safetensors: there is no such file\. Pass"):
        kind.load(tmp_path)


def test_what_is_no_regular_file_is_not_opened(kind: Kind, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait forever
    with pytest.raises(ArtifactError, match="no such file"):
        kind.inspect(tmp_path / "pipe")


# --- hostile and foreign files ------------------------------------------------------------------


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def numbered(count: int, form: bytes, between: bytes) -> bytes:
    return between.join(form % i for i in range(count))


def empty_tensors(count: int) -> bytes:
    each = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return packed(b"{" + b",".join(b'"t%d":%s' % (i, each) for i in range(count)) + b"}")


def keys_inside_keys(count: int) -> bytes:
    inner = numbered(count, rb"\"%d\":1", rb"\u002c")
    outer = numbered(count, b'"%d":1', b",")
    return packed(b'{"__metadata__":{"ird_mask":"{%s}"},%s}' % (inner, outer))


HOSTILE: dict[str, Callable[[], bytes]] = {
    "empty file": lambda: b"",
    "length 2^63": lambda: (2**63).to_bytes(8, "little") + b"{}",
    "length 2^64-1": lambda: b"\xff" * 8 + b"{}",
    "17 MiB of spaces": lambda: packed(b"{}" + b" " * (17 * 2**20)),
    "300k empty tensors": lambda: empty_tensors(300_000),
    "90k empty tensors": lambda: empty_tensors(90_000),
    "100k-deep list": lambda: packed(b"[" * 100_000 + b"]" * 100_000),
    "100k-deep object": lambda: packed(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "5 million empty objects": lambda: packed(b'{"a":[' + b"{}," * 5_000_000 + b"{}]}"),
    "8 million numbers": lambda: packed(b'{"a":[' + b"1," * 8_000_000 + b"1]}"),
    "490k keys": lambda: packed(b"{" + numbered(490_000, b'"%d":1', b",") + b"}"),
    "490k keys inside 490k keys": lambda: keys_inside_keys(490_000),
    "a number of 16 million digits": lambda: packed(b'{"a":' + b"9" * 16_000_000 + b"}"),
    "huge rank": lambda: packed({"a": entry("U8", [1] * 65_000, 0, 1)}, b"\0"),
    "not UTF-8": lambda: packed(b'{"\xff":1}'),
    "a list": lambda: packed(b"[]"),
    "NaN": lambda: packed(b'{"a":NaN}'),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers_are_refused(tmp_path: Path, make: Callable[[], bytes]) -> None:
    path = tmp_path / "hostile"
    path.write_bytes(make())
    with pytest.raises(ArtifactError):
        load_mask(path)


@pytest.mark.parametrize(
    "text",
    [{"a": 1}, "{", "[" * 100_000, "1", "\ud800", "{}"],
    ids=["no text", "no JSON", "100k deep", "a number", "a lone surrogate", "empty"],
)
def test_metadata_that_is_none(kind: Kind, tmp_path: Path, text: Any) -> None:
    refused(kind, tmp_path / "x", packed({"__metadata__": {kind.form.key: text}}))
    refused(kind, tmp_path / "x", packed({"__metadata__": [kind.form.key, text]}))


@pytest.mark.parametrize(
    ("make", "limit"),
    [
        (lambda: keys_inside_keys(49_000), 30e6),
        pytest.param(lambda: keys_inside_keys(490_000), 200e6, marks=pytest.mark.slow),
        (HOSTILE["5 million empty objects"], 200e6),
    ],
    ids=["49k keys inside 49k keys", "490k keys inside 490k keys", "5 million empty objects"],
)
def test_hostile_headers_take_little_memory(
    tmp_path: Path, make: Callable[[], bytes], limit: float
) -> None:
    path = tmp_path / "hostile"
    path.write_bytes(make())
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError):
            load_mask(path)
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def test_a_plain_safetensors_file_is_named_as_such(kind: Kind, tmp_path: Path) -> None:
    for metadata in (None, {"format": "pt"}):
        data = safetensors.torch.save({"encoder.weight": torch.zeros(2)}, metadata)
        refused(
            kind,
            tmp_path / "model",
            data,
            f"This is no {kind.form.name}",
            '1 tensors ("encoder.weight")',
            f"Pass a file that save_{kind.form.noun} wrote.",
        )


def test_one_kind_is_not_taken_for_the_other(mask_file: Path, delta_file: Path) -> None:
    refusal(
        KINDS["mask"],
        delta_file,
        "This is an ird-delta, no ird-mask. Read it with load_delta or inspect_delta; its mask is "
        "load_delta(path).mask.",
    )
    refusal(
        KINDS["delta"],
        mask_file,
        "This is an ird-mask, no ird-delta. Read it with load_mask or inspect_mask.",
    )


def test_a_duplicate_key_is_refused_where_the_library_accepts_it(kind: Kind, small: Path) -> None:
    header, meta, payload = taken_apart(small)
    data = forged(kind.form, header, meta, payload)
    assert data == small.read_bytes()
    raw = data[8 : len(data) - len(payload)].rstrip()
    twice = raw[:-1] + b',"a.idx::idx":' + json.dumps(header["a.idx::idx"]).encode() + b"}"
    twice += b" " * (-len(twice) % 8)
    safetensors.torch.load(packed(twice, payload))
    refused(kind, small, packed(twice, payload), "a key comes twice")


@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": "U32"},
        {"dtype": "I64"},
        {"shape": [3, 1]},
        {"shape": [True]},
        {"shift": -4},  # overlaps the tensor before it
        {"shift": 4},  # leaves a hole
        {"shift": -(10**3)},
        {"shift": 2**63},
        {"more": 1},
    ],
    ids=str,
)
def test_headers_that_do_not_fit_the_metadata(
    kind: Kind, small: Path, changed: dict[str, Any]
) -> None:
    header, meta, payload = taken_apart(small)
    listed = {**header["a.idx::idx"], **changed}
    shift = listed.pop("shift", 0)
    listed["data_offsets"] = [place + shift for place in listed["data_offsets"]]
    data = forged(kind.form, {**header, "a.idx::idx": listed}, meta, payload)
    refused(kind, small, data, "The header does not list what its metadata declares")


@pytest.mark.parametrize("extra", [{"extra": entry("U8", [0], 0, 0)}, {"a.idx::idx": "I32"}])
def test_headers_that_list_something_else(kind: Kind, small: Path, extra: dict[str, Any]) -> None:
    header, meta, payload = taken_apart(small)
    data = forged(kind.form, {**header, **extra}, meta, payload)
    refused(kind, small, data, "The header does not list what its metadata declares")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"format_version": "2.0"}, "ird-KIND 2.0; this ird_search reads ird-KIND 1"),
        ({"format_version": "1"}, 'format_version is "1", not like 1.0'),
        ({"format_version": 1.0}, "format_version is 1.0, not like 1.0"),
        ({"count": 11}, "contradicts itself"),
        ({"count": 10.0}, "contradicts itself"),
        ({"density": 0.5}, "contradicts itself"),
        ({"space_fingerprint": "0" * 64}, "contradicts itself"),
        ({"order": ["a.idx", "b.bits", "c.full"]}, "contradicts itself"),
        ({"order": ["a.idx", "a.idx", "b.bits", "c.full"]}, "declared twice"),
        ({"order": [1]}, "Tensor 1 is declared as"),
        ({"order": ["x"] * 100_001}, "100,001 tensors are declared; at most 100,000"),
        ({"order": None}, "lacks a sound"),
        ({"provenance": []}, "no provenance object"),
        ({"params": {}}, 'Tensor "a.idx" is declared as {}'),
    ],
    ids=str,
)
def test_metadata_that_lies(kind: Kind, small: Path, changed: dict[str, Any], says: str) -> None:
    header, meta, payload = taken_apart(small)
    data = forged(kind.form, header, {**meta, **changed}, payload)
    refused(kind, small, data, says.replace("KIND", kind.form.noun))


@pytest.mark.parametrize(
    ("rows", "says"),
    [(True, "lacks a sound"), (-1, "lacks a sound"), (2, "does not list what")],
)
def test_a_number_of_samples_that_lies(mask_file: Path, rows: Any, says: str) -> None:
    header, meta, payload = taken_apart(mask_file)
    data = forged(MASK, header, {**meta, "samples": rows}, payload)
    refused(KINDS["mask"], mask_file, data, says)


VALUES = {"a.idx": "F32", "b.bits": "BF16", "c.full": "F64"}
FLAG = {"dtype": "BOOL", "shape": [3]}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"values": None}, "lacks a sound `values`"),
        ({"values": {**VALUES, "a.idx": "F31"}}, "lacks a sound `values`"),
        ({"values": {**VALUES, "a.idx": ["F32"]}}, "lacks a sound `values`"),
        ({"values": {**VALUES, "d.none": "F32"}}, "other tensors than the mask selects from"),
        ({"values": {"a.idx": "F32"}}, "other tensors than the mask selects from"),
        ({"values": {**VALUES, "a.idx": "I32"}}, "does not list what"),
        ({"dense": None}, "lacks a sound `dense`"),
        ({"dense": {"flag": "BOOL"}}, 'Tensor "flag" is declared as {}'),
        ({"dense": {"flag": {**FLAG, "dtype": "C64"}}}, 'Tensor "flag" is declared as'),
        ({"dense": {"flag": {**FLAG, "dtype": 3}}}, 'Tensor "flag" is declared as'),
        ({"dense": {"flag": {**FLAG, "shape": [-1]}}}, 'Tensor "flag" is declared as'),
        ({"dense": {"flag": {**FLAG, "shape": [1] * 9}}}, "a shape of at most 8 sizes"),
        ({"dense": {"fl\nag": FLAG}}, "a printable name"),
        ({"dense": {"flag": {**FLAG, "more": 1}}}, "contradicts itself"),
        ({"dense": {"flag": FLAG}}, "does not list what"),
        ({"dense": dict.fromkeys(map(str, range(100_001)), FLAG)}, "100,001 tensors are declared"),
        ({"base_sha256": None}, "base_sha256 is null, no SHA-256"),
        ({"base_sha256": "A" * 64}, "no SHA-256"),
        ({"samples": 0}, None),  # a key that is unknown here
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_delta_that_lies(delta_file: Path, changed: dict[str, Any], says: str | None) -> None:
    header, meta, payload = taken_apart(delta_file)
    assert meta["values"] == VALUES and meta["dense"]["flag"] == FLAG
    data = forged(DELTA, header, {**meta, **changed}, payload)
    if says is None:
        delta_file.write_bytes(data)
        load_delta(delta_file)
    else:
        refused(KINDS["delta"], delta_file, data, says)


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": [1] * 9, "count": 1},
        {"shape": [-1], "count": 0},
        {"shape": [2.0], "count": 0},
        {"shape": [2**49], "count": 0},
        {"shape": [2**40, 2**40], "count": 0},
        {"shape": [2], "count": 3},
        {"shape": [2], "count": -1},
        {"shape": [2], "count": True},
        {"shape": 2, "count": 1},
        {"shape": [2]},
        [],
    ],
    ids=str,
)
def test_tensors_that_cannot_be(kind: Kind, small: Path, wrong: Any) -> None:
    header, meta, payload = taken_apart(small)
    params = {**meta["params"], "c.full": wrong}
    refused(kind, small, forged(kind.form, header, {**meta, "params": params}, payload))


@pytest.mark.parametrize("name", ["__samples__", "a\x1b[31mb", "a\nb", "a\ud800"], ids=ascii)
def test_names_that_cannot_be_stored(tmp_path: Path, name: str) -> None:
    mask = SparseMask(ParameterSpace((name,), ((2,),)), torch.tensor([0]))
    with pytest.raises(UsageError, match="cannot be stored as ird-mask 1: "):
        save_mask(tmp_path / "m", mask)
    masked = Delta(mask, {name: torch.zeros(1)}, {}, "0" * 64)
    whole = Delta(SOME_MASK - SOME_MASK, {}, {name: torch.zeros(1)}, "0" * 64)
    for delta in (masked, whole):
        with pytest.raises(UsageError, match="cannot be stored as ird-delta 1: "):
            save_delta(tmp_path / "d", delta)
    assert not list(tmp_path.iterdir())


def rewritten(kind: Kind, path: Path, key: str, values: np.ndarray[Any, Any]) -> bytes:
    """The file with other bytes in one tensor and all hashes right."""
    header, meta, payload = taken_apart(path)
    start, end = header[key]["data_offsets"]
    assert values.nbytes == end - start
    return forged(kind.form, header, meta, payload[:start] + values.tobytes() + payload[end:])


@pytest.mark.parametrize(
    ("key", "values", "says"),
    [
        ("a.idx::idx", np.array([0, 3, 3], "<i4"), "lacks 3 increasing indices"),
        ("a.idx::idx", np.array([3, 0, 9], "<i4"), "lacks 3 increasing indices"),
        ("a.idx::idx", np.array([0, 3, 200], "<i4"), "reaches beyond 200 entries"),
        ("a.idx::idx", np.array([-1, 3, 199], "<i4"), "reaches beyond 200 entries"),
        ("b.bits::bits", np.array([1, 0, 0], "u1"), "lacks 5 increasing indices"),
        ("b.bits::bits", np.array([15, 0, 128], "u1"), "reaches beyond 21 entries"),
    ],
)
def test_contents_are_checked_even_when_the_hashes_are_right(
    kind: Kind, small: Path, key: str, values: np.ndarray[Any, Any], says: str
) -> None:
    refused(kind, small, rewritten(kind, small, key, values), says)


@pytest.mark.parametrize(
    ("key", "values", "says"),
    [
        ("__samples__::idx", np.array([5, 2, 9], "<i8"), "not in increasing order"),
        ("__samples__::idx", np.array([2, 2, 9], "<i8"), "each id once"),
        ("__samples__::score", np.array([1, np.nan, 2], "<f4"), "not finite"),
    ],
)
def test_samples_are_checked_even_when_the_hashes_are_right(
    mask_file: Path, key: str, values: np.ndarray[Any, Any], says: str
) -> None:
    mask = KINDS["mask"]
    refused(mask, mask_file, rewritten(mask, mask_file, key, values), says)


def test_a_delta_is_checked_even_when_the_hashes_are_right(delta_file: Path) -> None:
    delta = KINDS["delta"]
    neither = rewritten(delta, delta_file, "flag::dense", np.array([1, 0, 2], "u1"))
    refused(delta, delta_file, neither, "'flag' holds what is neither true nor false")


@pytest.mark.parametrize(
    ("value", "whole", "says"),
    [
        (torch.ones(1).int(), "b", "torch.int32 [1]; floats [1] are needed"),
        (torch.ones(1), "w", "'w' is dense and masked"),
    ],
    ids=["whole numbers", "a tensor twice"],
)
def test_deltas_that_cannot_be(tmp_path: Path, value: torch.Tensor, whole: str, says: str) -> None:
    plan = DeltaPlan((Part("w", (1,), 1),), {"w": Layout.of(value).dtype}, {}, "0" * 64)
    plan = replace(plan, dense={whole: Layout("F32", (1,))})
    stored = {"w::value": value, f"{whole}::dense": torch.ones(1)}
    data = encode(DELTA, plan, stored, {"provenance": {}})
    refused(KINDS["delta"], tmp_path / "d", data, says)


def test_a_few_bytes_cannot_ask_for_terabytes(tmp_path: Path) -> None:
    plan = MaskPlan((Part("w", (2**40,), 2**40),))
    meta = {"format_version": "1.0", "provenance": {}, **plan.described()}
    (tmp_path / "m").write_bytes(forged(MASK, {}, meta, b""))
    with pytest.raises(ResourceError, match="do not fit into memory"):
        load_mask(tmp_path / "m")
    with pytest.raises(ArtifactError, match="another model"):
        load_mask(tmp_path / "m", nn.Linear(1, 1))


def test_later_minor_versions_and_unknown_keys_are_read(kind: Kind, small: Path) -> None:
    header, meta, payload = taken_apart(small)
    later = {**meta, "format_version": "1.7", "licence": "MIT"}
    small.write_bytes(forged(kind.form, header, later, payload))
    kind.load(small)
    assert kind.inspect(small).metadata["licence"] == "MIT"
