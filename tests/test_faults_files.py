"""Damaged, hostile and foreign files: the campaigns of `benchmarks/faults`, in small."""

from __future__ import annotations

import gc
import io
import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.faults import Row, hostile, traps
from benchmarks.faults.count import unlike
from benchmarks.faults.files import cuts, damages, on_the_command_line, other_formats, other_models
from benchmarks.faults.fuzz import BYTES, fuzz
from ird_search.artifact import MaskFile, inspect_mask, load_mask, save_mask
from ird_search.consumers.formats import read_bool_mask, read_tensors
from ird_search.errors import ArtifactError, ResourceError, UsageError
from ird_search.mask import SparseMask
from ird_search.parameters import ParameterSpace
from tests.artifacts import KINDS, SOME_MASK

COSTLY = ("header: ", "15 MB", "100,000 tensors", "a name of", "a key of")
CHEAP = [name for name in hostile.HOSTILE if not name.startswith(COSTLY)]


def kept(row: Row) -> None:
    assert not row.failures
    assert row.held == row.tried > 0


# --- damage and forgery -------------------------------------------------------------------------


def test_what_is_cut_is_refused(tmp_path: Path) -> None:
    kept(cuts(tmp_path, every=13))


def test_what_is_damaged_is_refused(tmp_path: Path) -> None:
    kept(damages("anything", 150, BYTES, tmp_path))


def test_damage_to_other_formats_ends_in_a_mask_or_a_refusal(tmp_path: Path) -> None:
    kept(other_formats(tmp_path, each=60))


def test_what_is_forged_is_refused_or_canonical() -> None:
    found = fuzz(executions=200)
    assert not found.wrong
    assert found.refused + found.accepted == found.executions == 200
    assert found.accepted > 0 and len(found.arcs) > 200


def test_the_fuzzer_finds_what_is_planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> MaskFile:
        raise KeyError(path)

    save_mask(tmp_path / "m", SOME_MASK)
    always = inspect_mask(tmp_path / "m")
    for reader, finding in (
        (broken, "KeyError in test_faults_files.py"),
        (lambda path: always, "accepted, and other bytes come of saving it again"),
    ):
        monkeypatch.setattr("benchmarks.faults.fuzz.inspect_file", reader)
        found = fuzz(executions=10)
        assert [text.partition(":")[0] for text in found.wrong] == [finding]
        assert found.wrong.total() == 10


# --- hostile files ------------------------------------------------------------------------------


@pytest.mark.parametrize("noun", KINDS)
@pytest.mark.parametrize("name", CHEAP)
def test_hostile_files_are_refused(tmp_path: Path, name: str, noun: str) -> None:
    path = tmp_path / "hostile"
    hostile.HOSTILE[name](path, KINDS[noun])
    refusals: Any = (ArtifactError, ResourceError)
    assert unlike(lambda: KINDS[noun].load(path), error=refusals) == ""


@pytest.mark.slow
def test_hostile_files_cost_little(tmp_path: Path) -> None:
    row = hostile.hostile_files(tmp_path, seconds_each=60)
    assert row.tried == 2 * len(hostile.HOSTILE)
    kept(row)


@pytest.mark.parametrize("noun", KINDS)
def test_a_file_with_holes_is_not_read_into_memory(tmp_path: Path, noun: str) -> None:
    path = tmp_path / "sparse"
    hostile.HOSTILE["a sparse file of 100 GB with a sound header"](path, KINDS[noun])
    with pytest.raises(ResourceError, match="do not fit into memory: reading it takes"):
        KINDS[noun].load(path)


def test_what_a_writer_adds_may_nest_a_hundred_deep(tmp_path: Path) -> None:
    nested: Any = []
    for _ in range(97):
        nested = [nested]
    save_mask(tmp_path / "m", SOME_MASK, provenance={"a": nested})
    assert inspect_mask(tmp_path / "m").provenance["a"] == nested
    with pytest.raises(UsageError, match="nests deeper than 100 levels"):
        save_mask(tmp_path / "m", SOME_MASK, provenance={"a": [nested]})


def test_names_are_of_a_thousand_characters_at_most(tmp_path: Path) -> None:
    for length in (1_000, 1_001):
        mask = SparseMask(ParameterSpace(("n" * length,), ((2,),)), torch.tensor([0]))
        if length == 1_000:
            save_mask(tmp_path / "m", mask)
            assert load_mask(tmp_path / "m") == mask
        else:
            with pytest.raises(UsageError, match="of at most 1,000 characters"):
                save_mask(tmp_path / "m", mask)


def test_a_path_that_cannot_be_is_refused() -> None:
    for read in (load_mask, read_tensors):
        with pytest.raises(ArtifactError, match="cannot be read: File name too long"):
            read("a" * 5_000)


def test_reading_leaves_the_collector_as_it_was(tmp_path: Path) -> None:
    save_mask(tmp_path / "m", SOME_MASK)
    (tmp_path / "x").write_bytes(b"no mask")
    for is_on in (True, False):
        (gc.enable if is_on else gc.disable)()
        try:
            load_mask(tmp_path / "m")
            with pytest.raises(ArtifactError):
                load_mask(tmp_path / "x")
            assert gc.isenabled() == is_on
        finally:
            gc.enable()


def test_a_head_with_unprintable_names_is_left_out(tmp_path: Path) -> None:
    save_mask(tmp_path / "m", SOME_MASK, provenance={"head": ["a", "\x1b[2J", 3, "b"]})
    assert inspect_mask(tmp_path / "m").head == ("a", "b")


# --- other formats ------------------------------------------------------------------------------


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save({"w": torch.ones(3)}, stream)
    with (
        zipfile.ZipFile(stream) as sound,
        zipfile.ZipFile(tmp_path / "m", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in sound.namelist():
            bomb.writestr(name, sound.read(name))
    with pytest.raises(ArtifactError, match="is a compressed archive"):
        read_tensors(tmp_path / "m")


def test_a_few_bytes_cannot_stand_for_many_entries(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1).expand(2**40)}, tmp_path / "m")
    with pytest.raises(ArtifactError, match=r"declares 1,099,511,627,776 entries in [\d,]+ bytes"):
        read_tensors(tmp_path / "m")


def test_a_list_without_end_is_not_read(tmp_path: Path) -> None:
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    raw = json.dumps({f"t{i}": entry for i in range(100_001)}).encode()
    (tmp_path / "m").write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(ArtifactError, match="lists 100,001 tensors; at most 100,000"):
        read_bool_mask(tmp_path / "m")


# --- masks of other models ----------------------------------------------------------------------


def test_what_is_of_another_model_is_refused_with_the_difference_named(tmp_path: Path) -> None:
    kept(other_models(tmp_path))


def test_a_long_list_of_fresh_parameters_is_looked_up_once(tmp_path: Path) -> None:
    names = [*(f"n{i}" for i in range(1_000)), "bias", ["no name"], None]
    model = nn.Linear(2, 1)
    mask = SparseMask(ParameterSpace.of(model), torch.tensor([0]))
    provenance = {"weights_sha256": "0" * 64, "fresh_parameters": names}
    save_mask(tmp_path / "m", mask, provenance=provenance)
    with pytest.raises(ArtifactError, match=r"The model's weights \(float32, sha256"):
        load_mask(tmp_path / "m", model, strict=True)


# --- code in files ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trapped(tmp_path_factory: pytest.TempPathFactory) -> Row:
    return traps.canaries(tmp_path_factory.mktemp("traps"))


def test_no_trap_goes_off(trapped: Row) -> None:
    assert trapped.figures["executions"] == 0
    assert trapped.tried > 80


def test_every_trap_is_refused_in_words(trapped: Row) -> None:
    kept(trapped)


def test_the_traps_are_real(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for data in traps.pickles(canary).values():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
            if data.startswith(b"\x93NUMPY"):
                np.load(io.BytesIO(data), allow_pickle=True)
            elif b"torch" in data and not data.startswith((b"\x80\x04", b"\x80\x05", b"(")):
                torch.load(io.BytesIO(data), weights_only=False)
            else:
                pickle.loads(data)
        assert canary.exists()
        canary.unlink()
    exec(traps.code(canary))
    assert canary.exists()


# --- the command line ---------------------------------------------------------------------------


def test_the_command_line_refuses_in_one_message(tmp_path: Path) -> None:
    names = ("a key twice", "provenance 900 deep", "a pipe")
    kept(on_the_command_line(tmp_path, names))
    assert "output" not in os.listdir(tmp_path)
