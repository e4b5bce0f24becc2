"""Masks and deltas on disk: round trip, exact bytes, and what is written when something fails."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ird_search.artifact import (
    ChosenRows,
    Delta,
    inspect_delta,
    inspect_file,
    inspect_mask,
    load_delta,
    load_mask,
    save_delta,
    save_mask,
    weights_sha256,
)
from ird_search.artifact.container import DTYPES, encode
from ird_search.artifact.plans import (
    DELTA,
    MASK,
    DeltaPlan,
    MaskPlan,
    stored_in_delta,
    stored_in_mask,
)
from ird_search.errors import ArtifactError, ModelError, ResourceError, UsageError
from ird_search.files import write_atomically
from ird_search.mask import SparseMask
from ird_search.parameters import ParameterSpace
from tests.artifacts import (
    KINDS,
    PROVENANCE,
    ROWS,
    SOME_DELTA,
    SOME_MASK,
    SPACE,
    Kind,
    same_delta,
)

DATA = Path(__file__).parent / "data"
GOLDEN = {
    "mask-v1": "8b1e285a4479f6f6d0275a30cbc67d4c503910d156d88b19303fdfe883a42706",
    "delta-v1": "4d6c75cfbcc531c304602dffab2158316a4825e35b79a8aa1db17bf73eadeb4a",
}
DOC = Path(__file__).parent.parent / "docs" / "artifact.md"
WRITTEN_BY = {"tool": "ird_search", "tool_version": "1.0.0", "torch_version": "2.13.0"}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A mask file with a part of every kind, samples and provenance."""
    path = tmp_path / "mask.safetensors"
    save_mask(path, SOME_MASK, samples=ROWS, provenance=PROVENANCE)
    return path


@pytest.fixture
def delta_file(tmp_path: Path) -> Path:
    """A delta file with a part of every kind, and tensors of several dtypes."""
    path = tmp_path / "delta.safetensors"
    save_delta(path, SOME_DELTA)
    return path


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Masks and deltas are written by the same rules."""
    found: Kind = request.param
    return found


# --- round trip ---------------------------------------------------------------------------------


def test_round_trip_of_every_kind(small: Path) -> None:
    assert load_mask(small) == SOME_MASK
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


def test_round_trip_of_a_delta(delta_file: Path) -> None:
    delta = load_delta(delta_file)
    assert same_delta(delta, SOME_DELTA)
    assert list(delta.values) == list(delta.mask.indices)
    found = inspect_delta(delta_file)
    assert found.sha256 == hashlib.sha256(delta_file.read_bytes()).hexdigest()
    assert (found.path, found.provenance) == (delta_file, PROVENANCE)


def test_a_stored_delta_is_as_specified(delta_file: Path) -> None:
    stored = safetensors.torch.load_file(delta_file)
    values, dense = SOME_DELTA.values, SOME_DELTA.dense
    assert stored.keys() == {
        *("a.idx::idx", "b.bits::bits"),
        *(f"{name}::value" for name in values),
        *(f"{name}::dense" for name in dense),
    }
    assert torch.equal(stored["b.bits::value"], values["b.bits"])
    assert torch.equal(stored["head.weight::dense"], dense["head.weight"])
    assert stored["steps::dense"].shape == ()
    with safetensors.safe_open(delta_file, framework="pt") as file:
        meta = json.loads(file.metadata()["ird_delta"])
    assert meta["values"] == {"a.idx": "F32", "b.bits": "BF16", "c.full": "F64"}
    assert meta["dense"]["head.weight"] == {"dtype": "F16", "shape": [2, 3]}
    assert meta["base_sha256"] == SOME_DELTA.base_sha256
    assert (meta["count"], meta["density"]) == (10, 10 / 228)
    assert sum(t.nbytes for t in stored.values()) == SOME_DELTA.nbytes


@settings(max_examples=60, deadline=None)
@given(masks(), st.data())
def test_any_delta_comes_back(
    tmp_path_factory: pytest.TempPathFactory, mask: SparseMask, data: st.DataObject
) -> None:
    floats = [dtype for dtype in DTYPES.values() if dtype.is_floating_point]
    values = {
        name: torch.randn(index.numel()).to(data.draw(st.sampled_from(floats)))
        for name, index in mask.indices.items()
    }
    names = data.draw(st.lists(st.text("aé.:_1", min_size=1, max_size=8), max_size=3, unique=True))
    dense = {
        name: torch.randint(0, 2, data.draw(st.lists(st.integers(0, 3), max_size=3))).to(
            data.draw(st.sampled_from(list(DTYPES.values())))
        )
        for name in names
        if name not in values
    }
    delta = Delta(mask, values, dense, "0" * 64)
    path = tmp_path_factory.mktemp("any")
    sha = save_delta(path, delta)
    found = inspect_delta(path)
    assert same_delta(found.delta, delta)
    assert found.sha256 == sha
    assert safetensors.torch.load_file(found.path).keys() >= {f"{n}::dense" for n in dense}


def test_a_strided_tensor_is_stored_as_it_reads(tmp_path: Path) -> None:
    strided = torch.arange(6.0).view(2, 3).t()
    save_delta(tmp_path, replace(SOME_DELTA, dense={"w": strided}))
    assert torch.equal(load_delta(tmp_path).dense["w"], strided)


def test_either_kind_can_be_inspected_without_knowing_which(small: Path, delta_file: Path) -> None:
    assert small.parent == delta_file.parent
    assert inspect_file(small).describe() == inspect_mask(small).describe()
    assert inspect_file(delta_file).describe() == inspect_delta(delta_file).describe()
    assert inspect_file(small.parent).path == small
    small.unlink()
    assert inspect_file(delta_file.parent).path == delta_file
    delta_file.unlink()
    with pytest.raises(ArtifactError, match=r"mask\.safetensors: there is no such file"):
        inspect_file(delta_file.parent)


# --- exact bytes --------------------------------------------------------------------------------


def golden(kind: str) -> tuple[Path, bytes]:
    path = DATA / f"{kind}-v1.safetensors"
    data = path.read_bytes()
    assert hashlib.sha256(data).hexdigest() == GOLDEN[f"{kind}-v1"]
    return path, data


def test_golden_mask_loads_and_is_rewritten_to_the_same_bytes() -> None:
    path, data = golden("mask")
    found = inspect_mask(path)
    assert found.mask == SOME_MASK
    assert found.provenance == PROVENANCE
    written_by = {key: found.metadata[key] for key in WRITTEN_BY}
    assert written_by == WRITTEN_BY
    for mask, samples in ((found.mask, found.samples), (SOME_MASK, ROWS)):
        said = {**WRITTEN_BY, "provenance": PROVENANCE}
        stored = stored_in_mask(mask, samples)
        assert encode(MASK, MaskPlan.of(mask, samples), stored, said) == data


def test_golden_delta_loads_and_is_rewritten_to_the_same_bytes() -> None:
    path, data = golden("delta")
    found = inspect_delta(path)
    assert same_delta(found.delta, SOME_DELTA)
    assert {key: found.metadata[key] for key in WRITTEN_BY} == WRITTEN_BY
    for delta in (found.delta, SOME_DELTA):
        said = {**WRITTEN_BY, "provenance": PROVENANCE}
        assert encode(DELTA, DeltaPlan.of(delta), stored_in_delta(delta), said) == data


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
    first = save_mask(tmp_path, SOME_MASK, samples=ROWS, provenance=PROVENANCE)
    second = save_mask(
        tmp_path, SOME_MASK, samples=turned, provenance=dict(reversed(PROVENANCE.items()))
    )
    assert first == second


def test_the_order_of_the_tensors_of_a_delta_does_not_matter(tmp_path: Path) -> None:
    turned = replace(
        SOME_DELTA,
        values=dict(reversed(SOME_DELTA.values.items())),
        dense=dict(reversed(SOME_DELTA.dense.items())),
    )
    assert save_delta(tmp_path, SOME_DELTA) == save_delta(tmp_path, turned)


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


def test_a_mask_of_the_same_model_loads(tmp_path: Path) -> None:
    assert load_mask(saved_for(network(), tmp_path), network()).count == 2


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
    renamed = nn.ModuleDict({"a": network()})
    found |= {weights_sha256(renamed), weights_sha256(model.bfloat16())}
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
def test_provenance_that_json_cannot_hold(kind: Kind, tmp_path: Path, value: Any) -> None:
    with pytest.raises(UsageError, match=r"provenance\['bad'\] cannot be stored"):
        kind.save(tmp_path, {"good": 1, "bad": value})
    assert not list(tmp_path.iterdir())


def test_provenance_too_large_to_be_read_back_is_refused_before_writing(
    kind: Kind, tmp_path: Path
) -> None:
    path = tmp_path / "small"
    kind.save(path, PROVENANCE)
    before = path.read_bytes()
    with pytest.raises(UsageError, match="Shorten the provenance"):
        kind.save(path, {"log": "x" * 2**24})
    with pytest.raises(UsageError, match="shorten the provenance"):
        kind.save(path, {"log": list(range(10)) * 101_000})
    assert path.read_bytes() == before


def test_provenance_keys_are_strings(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="its key is not a string"):
        save_mask(tmp_path, SOME_MASK, provenance={1: "a"})  # type: ignore[dict-item]


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


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"values": {}}, r"3 problems:\n  - The values of 'a.idx' are missing."),
        ({"values": {**SOME_DELTA.values, "x": torch.ones(1)}}, "for 'x', but the mask selects"),
        (
            {"values": {**SOME_DELTA.values, "a.idx": torch.ones(2)}},
            r"'a.idx' are torch.float32 \[2\]; floats \[3\] are needed",
        ),
        (
            {"values": {**SOME_DELTA.values, "a.idx": torch.ones(3).int()}},
            r"'a.idx' are torch.int32 \[3\]; floats \[3\] are needed",
        ),
        ({"dense": {"b.bits": torch.ones(2)}}, "'b.bits' is dense and masked"),
        ({"dense": {"c": torch.ones(2, dtype=torch.complex64)}}, "torch.complex64 on cpu; bf16, "),
        ({"dense": {"c": torch.ones(2, device="meta")}}, "float32 on meta; .* on the CPU can be"),
    ],
)
def test_deltas_that_cannot_be(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        replace(SOME_DELTA, **changed)


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


def test_a_delta_prints_what_it_holds(delta_file: Path) -> None:
    found = inspect_delta(delta_file)
    with pytest.raises(FrozenInstanceError):
        found.delta.base_sha256 = ""  # type: ignore[misc]
    assert repr(found.delta) == (
        "Delta(10 of 228 parameters, density 4.3860%, and 3 dense tensors; 76 bytes, base "
        "01234567…)"
    )
    assert repr(found.delta) in repr(found)
    text = found.describe()
    for words in (
        found.sha256,
        "10 of 228 parameters",
        "4.3860%",
        "50.0%  b.bits  (5)",
        "3 tensors, 10 entries",
        "head.weight  [2, 3]",
        "76 bytes, bfloat16, bool, float16, float32, float64, int64",
        "not finite       2 values",
        f"base sha256      {SOME_DELTA.base_sha256}",
        '{"id": "tiny/model", "revision": "abc"}',
    ):
        assert words in text


def test_a_description_cannot_drive_a_terminal(kind: Kind, tmp_path: Path) -> None:
    kind.save(tmp_path, {"a\x1b[2J": "\x1b]0;title\x07\n"})
    text = kind.inspect(tmp_path).describe()
    assert all(c.isprintable() for c in text.replace("\n", ""))


# --- the disk -----------------------------------------------------------------------------------


def test_directories_are_made_and_a_directory_gets_the_usual_name(tmp_path: Path) -> None:
    save_mask(tmp_path / "new" / "deep" / "m.safetensors", SOME_MASK)
    save_mask(tmp_path / "new", SOME_MASK)
    save_mask(f"{tmp_path}/other/", SOME_MASK)
    assert load_mask(tmp_path / "other" / "mask.safetensors") == SOME_MASK
    assert (
        load_mask(tmp_path / "new") == load_mask(tmp_path / "new" / "mask.safetensors") == SOME_MASK
    )
    assert [p.name for p in (tmp_path / "new" / "deep").iterdir()] == ["m.safetensors"]


def test_a_file_for_a_parent_is_a_usage_error(small: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be written: .*Choose a file in a directory"):
        save_mask(small / "mask.safetensors", SOME_MASK)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "ro").mkdir(mode=0o500)
    with pytest.raises(UsageError, match="Permission denied"):
        save_mask(tmp_path / "ro", SOME_MASK)


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


def reader(key: str) -> str:
    """The code in the document that reads the metadata under this key."""
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.S)
    (found,) = [block for block in blocks if f'["{key}"]' in block]
    return str(found)


def test_the_reader_in_the_document_needs_six_lines_and_not_us(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = reader("ird_mask")
    assert sum(line != "" for line in code.splitlines()) == 6
    assert "ird_search" not in code
    monkeypatch.chdir(small.parent)
    names: dict[str, Any] = {}
    exec(code, names)
    read = {name: torch.from_numpy(array) for name, array in names["mask"].items()}
    assert set(read) == set(SPACE.names)
    assert SparseMask.from_dict(SPACE, read) == SOME_MASK


def test_the_merger_in_the_document_needs_not_us(
    delta_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = reader("ird_delta")
    assert "ird_search" not in code
    monkeypatch.chdir(delta_file.parent)
    dtypes = {name: values.dtype for name, values in SOME_DELTA.values.items()}
    tensors = {
        name: torch.zeros(shape, dtype=dtypes.get(name))
        for name, shape in zip(SPACE.names, SPACE.shapes, strict=True)
    }
    tensors |= {name: torch.zeros_like(tensor) for name, tensor in SOME_DELTA.dense.items()}
    exec(code, {"tensors": tensors})
    for name, index in SOME_MASK.indices.items():
        wanted = torch.zeros(SPACE.shape(name), dtype=dtypes[name])
        wanted.view(-1)[index] = SOME_DELTA.values[name]
        assert torch.equal(tensors[name].nan_to_num(7), wanted.nan_to_num(7))
    assert not tensors["d.none"].any()
    assert all(torch.equal(tensors[name], t) for name, t in SOME_DELTA.dense.items())
