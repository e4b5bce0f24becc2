"""The mask file: round trip, exact bytes, and refusal of everything that is not one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ird_search.artifact import (
    ChosenRows,
    inspect_mask,
    load_mask,
    save_mask,
    weights_sha256,
)
from ird_search.artifact.layout import Part, canonical, described, encode, header_of
from ird_search.errors import ArtifactError, ModelError, ResourceError, UsageError
from ird_search.files import write_atomically
from ird_search.mask import SparseMask
from ird_search.parameters import ParameterSpace

GOLDEN = Path(__file__).parent / "data" / "mask-v1.safetensors"
GOLDEN_SHA256 = "8b1e285a4479f6f6d0275a30cbc67d4c503910d156d88b19303fdfe883a42706"
DOC = Path(__file__).parent.parent / "docs" / "artifact.md"
WRITTEN_BY = {"tool": "ird_search", "tool_version": "1.0.0", "torch_version": "2.13.0"}

SPACE = ParameterSpace(("a.idx", "b.bits", "c.full", "d.none"), ((4, 50), (3, 7), (2,), (5,)))
COORDS = torch.tensor([0, 3, 199, 200, 205, 207, 219, 220, 221, 222])
MASK = SparseMask(SPACE, COORDS)
ROWS = ChosenRows(torch.tensor([9, 2, 5]), torch.tensor([0.5, 1.25, -0.0]))
PROVENANCE: dict[str, Any] = {
    "base_model": {"id": "tiny/model", "revision": "abc"},
    "learning_rate": 0.001,
    "score": {"metric": "accuracy", "value": 0.1 + 0.2, "interval": [0.25, 0.35]},
    "note": "Bücher ∂θ",
    "controls": [],
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A file with a part of every kind, samples and provenance."""
    path = tmp_path / "mask.safetensors"
    save_mask(path, MASK, samples=ROWS, provenance=PROVENANCE)
    return path


def packed(header: Any, payload: bytes = b"") -> bytes:
    """A safetensors file with any header at all."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + payload


def taken_apart(path: Path) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Header entries, `ird_mask` object, payload."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    return header, json.loads(header["__metadata__"]["ird_mask"]), data[end:]


def forged(entries: Mapping[str, Any], metadata: Mapping[str, Any], payload: bytes) -> bytes:
    """A file whose hashes are all right, as an attacker would write it."""
    text = canonical({**metadata, "payload_sha256": hashlib.sha256(payload).hexdigest()})
    table = {key: entry for key, entry in entries.items() if key != "__metadata__"}
    return header_of(table, text) + payload


def refused(path: Path, data: bytes, *says: str) -> str:
    path.write_bytes(data)
    return refusal(path, *says)


def refusal(path: Path, *says: str) -> str:
    with pytest.raises(ArtifactError) as caught:
        load_mask(path)
    text = str(caught.value)
    assert str(path) in text
    for words in says:
        assert words in text
    return text


# --- round trip ---------------------------------------------------------------------------------


def test_round_trip_of_every_kind(small: Path) -> None:
    assert load_mask(small) == MASK
    found = inspect_mask(small)
    kinds = {name: entry["kind"] for name, entry in found.metadata["params"].items()}
    assert kinds == {"a.idx": "idx", "b.bits": "bits", "c.full": "full", "d.none": "none"}
    assert found.mask.space == SPACE
    assert found.provenance == PROVENANCE
    assert found.sha256 == hashlib.sha256(small.read_bytes()).hexdigest()
    assert found.samples is not None
    assert found.samples.ids.tolist() == [2, 5, 9]
    assert found.samples.scores.tolist() == [1.25, 0.0, 0.5]
    assert found.samples.scores.signbit().tolist() == [False, True, False]


def test_stored_tensors_are_as_specified(small: Path) -> None:
    stored = safetensors.torch.load_file(small)
    assert set(stored) == {"a.idx::idx", "b.bits::bits", "__samples__::idx", "__samples__::score"}
    assert stored["a.idx::idx"].dtype == torch.int32
    assert stored["a.idx::idx"].tolist() == [0, 3, 199]
    assert stored["b.bits::bits"].tolist() == [0b10100001, 0, 0b00011000]
    with safetensors.safe_open(small, framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        meta = json.loads(file.metadata()["ird_mask"])
    assert meta["order"] == list(SPACE.names)
    assert meta["space_fingerprint"] == SPACE.fingerprint
    assert (meta["count"], meta["density"]) == (10, 10 / 228)
    assert meta["samples"] == 3


@pytest.mark.parametrize("count", [0, 1, 227, 228])
def test_empty_and_full_masks(tmp_path: Path, count: int) -> None:
    mask = SparseMask(SPACE, torch.arange(count))
    save_mask(tmp_path, mask)
    assert load_mask(tmp_path) == mask
    assert inspect_mask(tmp_path).samples is None


def test_density_of_one_in_32_is_the_turning_point(tmp_path: Path) -> None:
    for count, kind in ((2, "idx"), (3, "bits")):
        save_mask(tmp_path, SparseMask(ParameterSpace(("w",), ((64,),)), torch.arange(count)))
        assert inspect_mask(tmp_path).metadata["params"]["w"]["kind"] == kind


def test_int64_only_beyond_int32(tmp_path: Path) -> None:
    space = ParameterSpace(("edge", "huge"), ((2**31 - 1,), (2**31,)))
    mask = SparseMask(space, torch.tensor([2**31 - 2, 2**31 - 1, 2**32 - 2]))
    save_mask(tmp_path, mask)
    stored = safetensors.torch.load_file(tmp_path / "mask.safetensors")
    assert stored["edge::idx"].dtype == torch.int32
    assert stored["huge::idx"].dtype == torch.int64
    assert load_mask(tmp_path) == mask


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    space = ParameterSpace(("scalar", "nothing", "w"), ((), (0, 3), (2,)))
    mask = SparseMask(space, torch.tensor([0, 2]))
    save_mask(tmp_path, mask)
    assert load_mask(tmp_path) == mask


@pytest.mark.parametrize("space", [ParameterSpace((), ()), ParameterSpace(("w",), ((0, 3),))])
def test_a_space_without_entries(tmp_path: Path, space: ParameterSpace) -> None:
    mask = SparseMask(space, torch.empty(0, dtype=torch.int64))
    assert mask.density == 0
    assert repr(mask) == "SparseMask(0 of 0 parameters, density 0.0000%)"
    save_mask(tmp_path, mask)
    assert load_mask(tmp_path) == mask
    assert "0 of 0 parameters" in inspect_mask(tmp_path).describe()


@st.composite
def masks(draw: st.DrawFn) -> SparseMask:
    names = draw(st.lists(st.text("aé.:_0", min_size=1, max_size=8), max_size=4, unique=True))
    shapes = [tuple(draw(st.lists(st.integers(0, 9), max_size=3))) for _ in names]
    space = ParameterSpace(tuple(names), tuple(shapes))
    if not space.numel:
        return SparseMask(space, torch.empty(0, dtype=torch.int64))
    chosen = draw(st.sets(st.integers(0, space.numel - 1)))
    return SparseMask(space, torch.tensor(sorted(chosen), dtype=torch.int64))


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5), FLOATS)
KEYS = st.text(max_size=3)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3)
)


@settings(max_examples=60, deadline=None)
@given(masks(), st.dictionaries(KEYS, JSON, max_size=3))
def test_any_mask_comes_back(
    tmp_path_factory: pytest.TempPathFactory, mask: SparseMask, provenance: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("any") / "m.safetensors"
    sha = save_mask(path, mask, provenance=provenance)
    found = inspect_mask(path)
    assert (found.mask, found.provenance, found.sha256) == (mask, provenance, sha)
    safetensors.torch.load_file(path)


# --- exact bytes --------------------------------------------------------------------------------


def test_golden_file_loads_and_is_rewritten_to_the_same_bytes() -> None:
    data = GOLDEN.read_bytes()
    assert hashlib.sha256(data).hexdigest() == GOLDEN_SHA256
    found = inspect_mask(GOLDEN)
    assert found.mask == MASK
    assert found.provenance == PROVENANCE
    written_by = {key: found.metadata[key] for key in WRITTEN_BY}
    assert written_by == WRITTEN_BY
    assert encode(found.mask, found.samples, found.provenance, written_by) == data
    assert encode(MASK, ROWS, PROVENANCE, WRITTEN_BY) == data


WRITE = """
import sys, torch
from ird_search.artifact import ChosenRows, save_mask
from ird_search.mask import SparseMask
from ird_search.parameters import ParameterSpace
space = ParameterSpace(("w", "v"), ((40, 10), (6,)))
rows = ChosenRows(torch.tensor([3, 1]), torch.tensor([0.1, 0.2]))
provenance = {k: {k: 1.5} for k in ("one", "two", "three")}
mask = SparseMask(space, torch.tensor([1, 4, 401]))
print(save_mask(sys.argv[1], mask, samples=rows, provenance=provenance))
"""


def test_equal_masks_are_equal_bytes_in_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("here", "again"):
        monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path / name)])
        exec(WRITE, {})
    there = subprocess.run(
        [sys.executable, "-c", WRITE, str(tmp_path / "there")],
        env={**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"},
        cwd=DOC.parent.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    printed = (capsys.readouterr().out + there.stdout).split()
    written = [hashlib.sha256(p.read_bytes()).hexdigest() for p in tmp_path.iterdir()]
    assert len(printed) == len(written) == 3, there.stderr
    assert len({*printed, *written}) == 1


def test_the_order_of_rows_and_of_keys_does_not_matter(tmp_path: Path) -> None:
    turned = ChosenRows(ROWS.ids.flip(0), ROWS.scores.flip(0))
    first = save_mask(tmp_path, MASK, samples=ROWS, provenance=PROVENANCE)
    second = save_mask(
        tmp_path, MASK, samples=turned, provenance=dict(reversed(PROVENANCE.items()))
    )
    assert first == second


# --- damage -------------------------------------------------------------------------------------


def test_every_truncation_and_every_extension_is_refused(small: Path) -> None:
    data = small.read_bytes()
    for length in reversed(range(len(data))):
        os.truncate(small, length)  # in place: making the file anew each time is what takes long
        refusal(small)
    refused(small, data + b"\0")
    refused(small, data + data)


def test_every_flipped_byte_is_refused(small: Path) -> None:
    data = small.read_bytes()
    with open(small, "r+b", buffering=0) as file:
        for position, byte in enumerate(data):
            for pattern in (0x01, 0x80, 0xFF):
                os.pwrite(file.fileno(), bytes([byte ^ pattern]), position)
                refusal(small)
            os.pwrite(file.fileno(), bytes([byte]), position)
    assert load_mask(small) == MASK


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"mask\.safetensors: there is no such file\. Pass"):
        load_mask(tmp_path)


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # opening it would wait forever
    with pytest.raises(ArtifactError, match="no such file"):
        inspect_mask(tmp_path / "pipe")


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
    "metadata is a list": lambda: packed({"__metadata__": ["ird_mask"]}),
    "metadata is no string": lambda: packed({"__metadata__": {"ird_mask": {"a": 1}}}),
    "ird_mask is no JSON": lambda: packed({"__metadata__": {"ird_mask": "{"}}),
    "ird_mask is 100k deep": lambda: packed({"__metadata__": {"ird_mask": "[" * 100_000}}),
    "ird_mask is a number": lambda: packed({"__metadata__": {"ird_mask": "1"}}),
    "ird_mask has a lone surrogate": lambda: packed(b'{"__metadata__":{"ird_mask":"\\ud800"}}'),
    "ird_mask is empty": lambda: packed({"__metadata__": {"ird_mask": "{}"}}),
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers_are_refused_quickly(tmp_path: Path, make: Callable[[], bytes]) -> None:
    path = tmp_path / "hostile"
    path.write_bytes(make())
    before = time.process_time()
    with pytest.raises(ArtifactError):
        load_mask(path)
    assert time.process_time() - before < 1


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


def test_a_plain_safetensors_file_is_named_as_such(tmp_path: Path) -> None:
    for metadata in (None, {"format": "pt"}):
        data = safetensors.torch.save({"encoder.weight": torch.zeros(2)}, metadata)
        refused(
            tmp_path / "model",
            data,
            "This is no ird-mask",
            '1 tensors ("encoder.weight")',
            "Pass a file that save_mask wrote.",
        )


def test_a_duplicate_key_is_refused_where_the_library_accepts_it(small: Path) -> None:
    header, meta, payload = taken_apart(small)
    data = forged(header, meta, payload)
    assert data == small.read_bytes()
    raw = data[8 : len(data) - len(payload)].rstrip()
    twice = raw[:-1] + b',"a.idx::idx":' + json.dumps(header["a.idx::idx"]).encode() + b"}"
    twice += b" " * (-len(twice) % 8)
    safetensors.torch.load(packed(twice, payload))
    refused(small, packed(twice, payload), "a key comes twice")


@pytest.mark.parametrize(
    "changed",
    [
        {"b.bits::bits": entry("BOOL", [3], 48, 51)},
        {"a.idx::idx": entry("U32", [3], 24, 36)},
        {"a.idx::idx": entry("I64", [3], 24, 48)},
        {"a.idx::idx": entry("I32", [3, 1], 24, 36)},
        {"a.idx::idx": entry("I32", [3], 20, 32)},  # overlaps the tensor before it
        {"a.idx::idx": entry("I32", [3], 28, 40)},  # leaves a hole
        {"a.idx::idx": entry("I32", [3], -12, 0)},
        {"a.idx::idx": entry("I32", [3], 2**63, 2**63 + 12)},
        {"a.idx::idx": {**entry("I32", [3], 24, 36), "more": 1}},
        {"a.idx::idx": entry("I32", [True], 24, 28)},
        {"extra": entry("U8", [0], 0, 0)},
        {"a.idx::idx": "I32"},
    ],
    ids=str,
)
def test_headers_that_do_not_fit_the_metadata(small: Path, changed: dict[str, Any]) -> None:
    header, meta, payload = taken_apart(small)
    data = forged({**header, **changed}, meta, payload)
    refused(small, data, "The header does not list what its metadata declares")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"format_version": "2.0"}, "ird-mask 2.0; this ird_search reads ird-mask 1"),
        ({"format_version": "1"}, 'format_version is "1", not like 1.0'),
        ({"format_version": 1.0}, "format_version is 1.0, not like 1.0"),
        ({"count": 11}, "contradicts itself"),
        ({"count": 10.0}, "contradicts itself"),
        ({"density": 0.5}, "contradicts itself"),
        ({"space_fingerprint": "0" * 64}, "contradicts itself"),
        ({"samples": True}, "lacks a sound"),
        ({"samples": -1}, "lacks a sound"),
        ({"samples": 2}, "does not list what"),
        ({"order": ["a.idx"]}, "contradicts itself"),
        ({"order": ["a.idx", "a.idx"]}, "declared twice"),
        ({"order": [1]}, "Tensor 1 is declared as"),
        ({"order": ["x"] * 100_001}, "100,001 tensors are declared; at most 100,000"),
        ({"order": None}, "lacks a sound"),
        ({"provenance": []}, "no provenance object"),
        ({"params": {}}, 'Tensor "a.idx" is declared as {}'),
    ],
    ids=str,
)
def test_metadata_that_lies(small: Path, changed: dict[str, Any], says: str) -> None:
    header, meta, payload = taken_apart(small)
    refused(small, forged(header, {**meta, **changed}, payload), says)


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
def test_tensors_that_cannot_be(tmp_path: Path, wrong: Any) -> None:
    save_mask(tmp_path / "m", SparseMask(ParameterSpace(("w",), ((2,),)), torch.tensor([0, 1])))
    header, meta, payload = taken_apart(tmp_path / "m")
    refused(tmp_path / "m", forged(header, {**meta, "params": {"w": wrong}}, payload))


@pytest.mark.parametrize("name", ["__samples__", "a\x1b[31mb", "a\nb", "a\ud800"], ids=ascii)
def test_names_that_cannot_be_stored(tmp_path: Path, name: str) -> None:
    mask = SparseMask(ParameterSpace((name,), ((2,),)), torch.tensor([0]))
    with pytest.raises(UsageError, match="cannot be stored as ird-mask 1: "):
        save_mask(tmp_path / "m", mask)
    assert not list(tmp_path.iterdir())


def rewritten(path: Path, key: str, values: np.ndarray[Any, Any]) -> bytes:
    """The file with other bytes in one tensor and all hashes right."""
    header, meta, payload = taken_apart(path)
    start, end = header[key]["data_offsets"]
    assert values.nbytes == end - start
    return forged(header, meta, payload[:start] + values.tobytes() + payload[end:])


@pytest.mark.parametrize(
    ("key", "values", "says"),
    [
        ("a.idx::idx", np.array([0, 3, 3], "<i4"), "lacks 3 increasing indices"),
        ("a.idx::idx", np.array([3, 0, 9], "<i4"), "lacks 3 increasing indices"),
        ("a.idx::idx", np.array([0, 3, 200], "<i4"), "reaches beyond 200 entries"),
        ("a.idx::idx", np.array([-1, 3, 199], "<i4"), "reaches beyond 200 entries"),
        ("b.bits::bits", np.array([1, 0, 0], "u1"), "lacks 5 increasing indices"),
        ("b.bits::bits", np.array([15, 0, 128], "u1"), "reaches beyond 21 entries"),
        ("__samples__::idx", np.array([5, 2, 9], "<i8"), "not in increasing order"),
        ("__samples__::idx", np.array([2, 2, 9], "<i8"), "each id once"),
        ("__samples__::score", np.array([1, np.nan, 2], "<f4"), "not finite"),
    ],
)
def test_contents_are_checked_even_when_the_hashes_are_right(
    small: Path, key: str, values: np.ndarray[Any, Any], says: str
) -> None:
    refused(small, rewritten(small, key, values), says)


def test_a_few_bytes_cannot_ask_for_terabytes(tmp_path: Path) -> None:
    parts = (Part("w", (2**40,), 2**40),)
    meta = {"format_version": "1.0", "provenance": {}, **described(parts, 0)}
    (tmp_path / "m").write_bytes(forged({}, meta, b""))
    with pytest.raises(ResourceError, match="do not fit into memory"):
        load_mask(tmp_path / "m")
    with pytest.raises(ArtifactError, match="another model"):
        load_mask(tmp_path / "m", nn.Linear(1, 1))


def test_later_minor_versions_and_unknown_keys_are_read(small: Path) -> None:
    header, meta, payload = taken_apart(small)
    small.write_bytes(forged(header, {**meta, "format_version": "1.7", "licence": "MIT"}, payload))
    assert load_mask(small) == MASK
    assert inspect_mask(small).metadata["licence"] == "MIT"


# --- the model ----------------------------------------------------------------------------------


def network(width: int = 3, depth: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


def weight(model: nn.Module, name: str) -> torch.Tensor:
    return dict(model.named_parameters())[name].detach()


def layer(model: nn.Sequential, index: int) -> nn.Linear:
    found = model[index]
    assert isinstance(found, nn.Linear)
    return found


def saved_for(model: nn.Module, folder: Path, **provenance: Any) -> Path:
    space = ParameterSpace.of(model)
    save_mask(folder, SparseMask(space, torch.tensor([0, 5])), provenance=provenance)
    return folder


class Around(nn.Module):
    """Puts a model under one or more attribute names."""

    def __init__(self, path: str, model: nn.Module) -> None:
        super().__init__()
        first, _, rest = path.partition(".")
        self.add_module(first, Around(rest, model) if rest else model)


def mismatch(path: Path, model: nn.Module) -> str:
    with pytest.raises(ArtifactError) as caught:
        load_mask(path, model)
    return str(caught.value)


def test_a_mask_of_the_same_model_loads(tmp_path: Path) -> None:
    assert load_mask(saved_for(network(), tmp_path), network()).count == 2


def test_another_size_is_refused_with_the_shapes(tmp_path: Path) -> None:
    text = mismatch(saved_for(network(), tmp_path), network(width=4))
    assert "4 of 4 tensors differ" in text
    assert "0.weight is [4, 4], not [3, 3]" in text
    assert "another size of the model" in text


def test_at_most_ten_differences_are_listed(tmp_path: Path) -> None:
    text = mismatch(saved_for(network(depth=9), tmp_path), network(width=4, depth=9))
    assert "18 of 18 tensors differ" in text
    assert len(re.findall(r"^  - \d\.", text, re.M)) == 10
    assert "  - and 8 more" in text


def test_near_names_are_looked_up_for_ten_differences_only() -> None:
    found = ParameterSpace.of(network(depth=9)).differences(Around("module", network(depth=9)))
    assert all(line.split(" is missing.")[0].endswith("]") for line in found)
    assert ["Did you mean" in line for line in found] == [True] * 10 + [False] * 8


@pytest.mark.parametrize(
    ("path", "wrapper"),
    [("base_model.model", "PEFT"), ("module", "DataParallel"), ("_orig_mod", "torch.compile")],
)
def test_a_wrapper_is_recognised_both_ways(tmp_path: Path, path: str, wrapper: str) -> None:
    text = mismatch(saved_for(network(), tmp_path), Around(path, network()))
    assert "0.weight [3, 3] is missing" in text
    assert f"this model is wrapped by {wrapper} (prefix '{path}.')" in text
    text = mismatch(saved_for(Around(path, network()), tmp_path), network())
    assert f"the mask was made on a model wrapped by {wrapper} (prefix '{path}.')" in text


def test_layers_that_peft_has_replaced_are_recognised(tmp_path: Path) -> None:
    adapted = Around("base_model.model", nn.Sequential(Around("base_layer", nn.Linear(3, 3))))
    text = mismatch(saved_for(network(depth=1), tmp_path), adapted)
    assert "wrapped by PEFT" in text


def test_tied_weights_are_recognised(tmp_path: Path) -> None:
    tied = network()
    path = saved_for(tied, tmp_path)
    layer(tied, 1).weight = layer(tied, 0).weight
    assert "Likely: tied weights" in mismatch(path, tied)


def test_a_task_head_is_recognised(tmp_path: Path) -> None:
    path = saved_for(network(), tmp_path)
    assert "the base model and the other has a task head" in mismatch(
        path, Around("bert", network())
    )


def test_renamed_tensors_point_at_the_versions(tmp_path: Path) -> None:
    path = saved_for(Around("vit.layers", network()), tmp_path)
    assert "major version of transformers" in mismatch(path, Around("vit.encoder", network()))


def test_strict_compares_weights_but_not_fresh_heads(tmp_path: Path) -> None:
    model, fresh = network(), ["1.weight", "1.bias"]
    path = saved_for(
        model, tmp_path, weights_sha256=weights_sha256(model, fresh), fresh_parameters=fresh
    )
    weight(model, "1.weight").add_(1)
    assert load_mask(path, model, strict=True).count == 2
    weight(model, "0.weight")[0, 0] += 1e-6
    assert load_mask(path, model).count == 2
    with pytest.raises(ArtifactError, match=r"weights .* are not those that the mask was made for"):
        load_mask(path, model, strict=True)


def test_strict_needs_a_model_and_a_recorded_hash(tmp_path: Path) -> None:
    path = saved_for(network(), tmp_path)
    with pytest.raises(UsageError, match="pass the model, too"):
        load_mask(path, strict=True)
    with pytest.raises(ArtifactError, match="does not record the weights"):
        load_mask(path, network(), strict=True)
    path = saved_for(network(), tmp_path, weights_sha256="x", fresh_parameters=3)
    with pytest.raises(ArtifactError, match="does not record the weights"):
        load_mask(path, network(), strict=True)


def test_weights_hash_tells_names_dtypes_shapes_and_values_apart() -> None:
    model = network()
    found = {weights_sha256(network()), weights_sha256(model, ["0.bias"])}
    assert weights_sha256(model) in found
    found |= {weights_sha256(Around("a", network())), weights_sha256(model.bfloat16())}
    model = network()
    layer(model, 0).weight = nn.Parameter(weight(model, "0.weight").reshape(1, 9))
    found.add(weights_sha256(model))
    assert len(found) == 5


def test_weights_hash_holds_for_strided_scalar_and_empty_parameters() -> None:
    model = network()
    before = weights_sha256(model)
    layer(model, 0).weight = nn.Parameter(weight(model, "0.weight").t().contiguous().t())
    assert weights_sha256(model) == before
    model.scalar, model.nothing = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.zeros(0))
    assert weights_sha256(model, ["scalar", "nothing"]) == before != weights_sha256(model)


def test_weights_hash_refuses_unknown_names_and_missing_data() -> None:
    with pytest.raises(UsageError, match="'head' is not a parameter"):
        weights_sha256(network(), ["head"])
    with pytest.raises(ModelError, match="meta device"):
        weights_sha256(nn.Linear(2, 2, device="meta"))


# --- what can be saved --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        {1, 2},
        torch.ones(1),
        {1: "a", "1": "b"},
        {1: 2, "b": 3},
    ],
    ids=str,
)
def test_provenance_that_json_cannot_hold(tmp_path: Path, value: Any) -> None:
    with pytest.raises(UsageError, match=r"provenance\['bad'\] cannot be stored"):
        save_mask(tmp_path, MASK, provenance={"good": 1, "bad": value})
    assert not list(tmp_path.iterdir())


def test_provenance_too_large_to_be_read_back_is_refused_before_writing(small: Path) -> None:
    before = small.read_bytes()
    with pytest.raises(UsageError, match="Shorten the provenance"):
        save_mask(small, MASK, provenance={"log": "x" * 2**24})
    with pytest.raises(UsageError, match="shorten the provenance"):
        save_mask(small, MASK, provenance={"log": list(range(10)) * 101_000})
    assert small.read_bytes() == before


def test_provenance_keys_are_strings(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="its key is not a string"):
        save_mask(tmp_path, MASK, provenance={1: "a"})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("ids", "scores", "says"),
    [
        (torch.tensor([1]), torch.tensor([float("nan")]), "not finite"),
        (torch.tensor([1, 1]), torch.zeros(2), "2 ids, 1 distinct"),
        (torch.tensor([1, 2]), torch.zeros(1), "1 scores"),
        (torch.arange(0), torch.zeros(0), "0 ids"),
        (torch.tensor([[1]]), torch.zeros(1, 1), r"these are torch.int64 \[1, 1\]"),
        (torch.tensor([1.0]), torch.zeros(1), r"these are torch.float32 \[1\]"),
        (torch.tensor([1]), torch.zeros(1).double(), "and torch.float64"),
    ],
    ids=str,
)
def test_rows_that_cannot_be(ids: torch.Tensor, scores: torch.Tensor, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ChosenRows(ids, scores)


def test_values_are_frozen_and_print_what_they_hold(small: Path) -> None:
    found = inspect_mask(small)
    with pytest.raises(FrozenInstanceError):
        found.path = Path()  # type: ignore[misc]
    assert "SparseMask(10 of 228 parameters" in repr(found)
    assert "ChosenRows(3 samples, scores 0 … 1.25)" in repr(found).replace("-0", "0")
    text = found.describe()
    for words in (
        found.sha256,
        "10 of 228 parameters",
        "4.3860%",
        "3 of 4 hold",
        "50.0%  b.bits  (5)",
        '{"id": "tiny/model", "revision": "abc"}',
        "3 samples",
    ):
        assert words in text


def test_a_description_cannot_drive_a_terminal(tmp_path: Path) -> None:
    save_mask(tmp_path, MASK, provenance={"a\x1b[2J": "\x1b]0;title\x07\n"})
    text = inspect_mask(tmp_path).describe()
    assert all(c.isprintable() for c in text.replace("\n", ""))


# --- the disk -----------------------------------------------------------------------------------


def test_directories_are_made_and_a_directory_gets_the_usual_name(tmp_path: Path) -> None:
    save_mask(tmp_path / "new" / "deep" / "m.safetensors", MASK)
    save_mask(tmp_path / "new", MASK)
    save_mask(f"{tmp_path}/other/", MASK)
    assert load_mask(tmp_path / "other" / "mask.safetensors") == MASK
    assert load_mask(tmp_path / "new") == load_mask(tmp_path / "new" / "mask.safetensors") == MASK
    assert [p.name for p in (tmp_path / "new" / "deep").iterdir()] == ["m.safetensors"]


def test_a_file_for_a_parent_is_a_usage_error(small: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be written: .*Choose a file in a directory"):
        save_mask(small / "mask.safetensors", MASK)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "ro").mkdir(mode=0o500)
    with pytest.raises(UsageError, match="Permission denied"):
        save_mask(tmp_path / "ro", MASK)


def test_a_full_disk_leaves_the_old_file(small: Path) -> None:
    before = small.read_bytes()
    mask = SparseMask(ParameterSpace(("w",), ((10**6,),)), torch.arange(0, 10**6, 40))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # a fifth of what the mask takes
    try:
        with pytest.raises(ResourceError) as caught:
            save_mask(small, mask)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large. What was there before is untouched." in str(caught.value)
    assert small.read_bytes() == before
    assert [p.name for p in small.parent.iterdir()] == [small.name]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_gives_out_is_a_resource_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "f").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ResourceError, match=os.strerror(number)):
        write_atomically(tmp_path / "f", b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_an_interrupt_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "f").write_bytes(b"old")
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "f", b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_a_disk_that_alters_bytes_never_costs_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alter(descriptor: int) -> None:
        os.pwrite(descriptor, b"?", 0)

    (tmp_path / "f").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", alter)
    with pytest.raises(ResourceError, match="other bytes than were written"):
        write_atomically(tmp_path / "f", b"new")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_atomically(tmp_path / "ours", b"")
    modes = {(tmp_path / name).stat().st_mode for name in ("plain", "ours")}
    assert len(modes) == 1


# --- the document -------------------------------------------------------------------------------


def test_the_reader_in_the_document_needs_six_lines_and_not_us(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = re.search(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.S)
    assert found is not None
    code = found[1]
    assert sum(line != "" for line in code.splitlines()) == 6
    assert "ird_search" not in code
    monkeypatch.chdir(small.parent)
    names: dict[str, Any] = {}
    exec(code, names)
    read = {name: torch.from_numpy(array) for name, array in names["mask"].items()}
    assert set(read) == set(SPACE.names)
    assert SparseMask.from_dict(SPACE, read) == MASK
