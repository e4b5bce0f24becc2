"""From files to files: comparing, combining, exporting and importing masks, merging deltas."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertForSequenceClassification
from typer.testing import CliRunner

from ird_search import (
    MaskedAdamW,
    SparseMask,
    inspect_delta,
    inspect_mask,
    load_mask,
    save_mask,
    search_mask,
)
from ird_search.cli import app
from ird_search.consumers.formats import read_fish_mask
from ird_search.consumers.peft import load_supertuning
from ird_search.errors import UsageError
from ird_search.exchange import compare, export_mask
from ird_search.exchange.base import base_model
from tests.tiny import TEXT_ROWS, save_tiny_bert
from tests.toy import QUICK

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]

SMALL: dict[str, Any] = {
    **QUICK,
    "density": 0.2,
    "warmup_steps": 1,
    "proxy_steps": 1,
    "seeds": 1,
    "strategy": "ladder",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("base") / "tiny", head=False)


@pytest.fixture(scope="module")
def found(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two searches on one base."""
    place = tmp_path_factory.mktemp("found")
    for seed in (0, 1):
        search_mask(base, TEXT_ROWS * 6, seed=seed, output=place / f"run{seed}", **SMALL)
    return place / "run0", place / "run1"


@pytest.fixture(scope="module")
def tuned(base: Path, found: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base after three steps under the first mask."""
    provenance = inspect_mask(found[0]).provenance
    model: Any = base_model(provenance, str(base))
    mask = load_mask(found[0], model, strict=True)
    optimizer = MaskedAdamW(model, mask, lr=0.1, dense=provenance["head"])
    for _ in range(3):
        model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    place = tmp_path_factory.mktemp("tuned") / "model"
    model.save_pretrained(place)
    return place


def call(*words: object) -> str:
    """What a command prints; it must succeed."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refused(code: int, *words: object) -> str:
    """What a command says when it ends with `code`."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.stderr


def state(directory: Path) -> dict[str, Tensor]:
    return BertForSequenceClassification.from_pretrained(directory).state_dict()


def masks(found: tuple[Path, Path]) -> tuple[SparseMask, SparseMask]:
    return inspect_mask(found[0]).mask, inspect_mask(found[1]).mask


# --- compare -------------------------------------------------------------------------------------


def test_comparing_two_masks(found: tuple[Path, Path]) -> None:
    a, b = masks(found)
    text = call("compare", *found, "--tensors", 2)
    assert f"A  {a.count:,} of {a.space.numel:,} parameters" in text
    assert "base weights: the same" in text and "seed: 0 in A, 1 in B" in text
    assert "pool" not in text  # the same in both
    document = json.loads(call("compare", *found, "--json"))
    assert document["shared"] == (a & b).count and document["jaccard"] == a.jaccard(b)
    assert document["only_a"] == (a - b).count and document["only_b"] == (b - a).count
    assert document["same_base"] is True and document["differences"]["seed"] == [0, 1]
    assert set(document["differences"]) == {"data", "seed"}  # other rows are held out
    assert sum(t["shared"] for t in document["tensors"].values()) == (a & b).count


def test_a_mask_that_records_nothing_is_compared_all_the_same(
    found: tuple[Path, Path], tmp_path: Path
) -> None:
    save_mask(tmp_path / "bare.safetensors", masks(found)[0])
    comparison = compare(found[0], tmp_path / "bare.safetensors")
    assert comparison.same_base is None and comparison.differences == ()
    assert "not recorded in both" in comparison.describe()
    assert comparison.overlap.total.jaccard == 1


# --- merge ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["union", "intersection", "difference"])
def test_masks_combine_as_sets(how: str, found: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "m.safetensors"
    told = call("merge", *found, "--how", how, "-o", output)
    a, b = masks(found)
    wanted = {"union": a | b, "intersection": a & b, "difference": a - b}[how]
    assert told.splitlines() == [f"{output}  {wanted.count:,} parameters"]
    file = inspect_mask(output)
    assert file.mask == wanted
    assert file.provenance["combined"]["how"] == how
    assert [m["name"] for m in file.provenance["combined"]["masks"]] == ["run0", "run1"]


def test_disjoint_masks_for_two_tasks(found: tuple[Path, Path], base: Path, tmp_path: Path) -> None:
    call("merge", *found, "--how", "disjoint", "-o", tmp_path / "apart")
    one, other = (inspect_mask(tmp_path / "apart" / f"run{i}.safetensors").mask for i in (0, 1))
    a, b = masks(found)
    assert (one & other).count == 0 and one | other == a | b
    assert abs((a.count - one.count) - (b.count - other.count)) <= 1
    model = base_model(inspect_mask(found[0]).provenance, str(base))
    assert load_mask(tmp_path / "apart" / "run0.safetensors", model, strict=True) == one


def test_masks_of_other_weights_combine_but_do_not_claim_them(
    found: tuple[Path, Path], tmp_path: Path
) -> None:
    bare = tmp_path / "bare.safetensors"
    save_mask(bare, masks(found)[1])
    text = call("merge", found[0], bare, "-o", tmp_path / "m.safetensors")
    assert "not all made for the same weights" in text
    assert "weights_sha256" not in inspect_mask(tmp_path / "m.safetensors").provenance


def test_a_delta_and_its_base_make_the_tuned_model(
    found: tuple[Path, Path], base: Path, tuned: Path, tmp_path: Path
) -> None:
    delta = tmp_path / "delta.safetensors"
    told = call("export", found[0], "--to", "delta", "--model", base, "--tuned", tuned, "-o", delta)
    assert told.startswith("Delta(") and str(delta) in told
    count = masks(found)[0].count
    assert int(told.splitlines()[1].split()[0].replace(",", "")) > 0.5 * count
    assert inspect_delta(delta).delta.mask == masks(found)[0]
    assert "ird-delta" in call("inspect", delta)
    call("merge", delta, "--model", base, "-o", tmp_path / "merged")
    merged, wanted = state(tmp_path / "merged"), state(tuned)
    assert merged.keys() == wanted.keys()
    assert all(torch.equal(merged[name], wanted[name]) for name in wanted)
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (
        base / "tokenizer.json"
    ).read_bytes()
    # and the mask comes back out of it
    call("import", delta, "--from", "delta", "-o", tmp_path / "mask.safetensors")
    assert inspect_mask(tmp_path / "mask.safetensors").mask == masks(found)[0]
    # a tuned model is no base
    said = refused(4, "merge", delta, "--model", tuned, "-o", tmp_path / "again")
    assert "are not the base of this delta" in said and not (tmp_path / "again").exists()


def test_a_model_in_which_more_moved_gives_no_delta(
    found: tuple[Path, Path], base: Path, tmp_path: Path
) -> None:
    model = BertForSequenceClassification.from_pretrained(base)
    with torch.no_grad():
        model.get_parameter("bert.encoder.layer.0.output.dense.weight").add_(1.0)
    model.save_pretrained(tmp_path / "wrong")
    words = ["export", found[0], "--to", "delta", "--model", base, "--tuned", tmp_path / "wrong"]
    said = refused(4, *words, "-o", tmp_path / "delta.safetensors")
    assert "bert.encoder.layer.0.output.dense.weight" in said
    assert not (tmp_path / "delta.safetensors").exists()


# --- export and import ---------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["supertuning", "shira", "lora"])
def test_export_to_peft(to: str, found: tuple[Path, Path], base: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    options = {"supertuning": ["--adapters", 1], "shira": ["--rank", 1], "lora": ["--budget", 400]}
    told = call("export", found[0], "--to", to, "--model", base, "-o", tmp_path / to, *options[to])
    assert "selected entries held" in told and "bias of" in told  # nothing is dropped in silence
    assert ("stored several times" in told) == (to == "supertuning")
    config = peft.PeftConfig.from_pretrained(tmp_path / to)
    assert config.peft_type == {"supertuning": "SUPERTUNING", "shira": "SHIRA", "lora": "LORA"}[to]
    readme = (tmp_path / to / "README.md").read_text()
    assert told.removesuffix(f"\n{tmp_path / to}\n") in readme  # the numbers, and how to load it
    assert "ird_search mask" in readme and "library_name: peft" in readme.split("---\n")[1]
    assert "Model Card" not in readme and "More Information Needed" not in readme
    if to != "lora":
        model = BertForSequenceClassification.from_pretrained(base)
        before = {n: t.clone() for n, t in model.state_dict().items() if "classifier" not in n}
        wrapped = peft.PeftModel.from_pretrained(model, tmp_path / to)
        merged = wrapped.merge_and_unload().state_dict()  # nothing was trained yet
        assert all(torch.equal(merged[name], tensor) for name, tensor in before.items())


def test_by_default_no_entry_is_stored_twice(
    found: tuple[Path, Path], base: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    told = call("export", found[0], "--to", "supertuning", "--model", base, "-o", tmp_path / "st")
    assert "stored several times" not in told and "load_supertuning" in told
    model = BertForSequenceClassification.from_pretrained(base)
    wrapped = load_supertuning(model, tmp_path / "st", is_trainable=True)
    values = [p for n, p in wrapped.named_parameters() if "supertuning_values" in n]
    held = int(told.split("SuperTuning: ")[1].split()[0].replace(",", ""))
    assert sum(p.numel() for p in values) == held
    assert isinstance(wrapped, peft.PeftModel)
    several = not (tmp_path / "st" / "adapter_config.json").exists()
    assert ("--adapters 1" in (tmp_path / "st" / "README.md").read_text()) == several
    assert several


@pytest.mark.parametrize("to", ["fish", "bool"])
def test_out_and_in_again(to: str, found: tuple[Path, Path], base: Path, tmp_path: Path) -> None:
    mask, out, back = masks(found)[0], tmp_path / "out.bin", tmp_path / "back.safetensors"
    call("export", found[0], "--to", to, "--model", base, "-o", out)
    given = ["--dense", "classifier", "--dense", "pooler"] * (to == "fish")
    text = call("import", out, "--from", to, "-o", back, *given)
    assert str(back) in text
    again = inspect_mask(back)
    assert compare(found[0], back).overlap.total.jaccard == 1
    assert again.mask.indices.keys() == mask.indices.keys()
    head = inspect_mask(found[0]).provenance["head"]
    assert set(again.provenance["head"]) == set(head)  # fish: as named; bool: as the file notes
    assert "does not say what is trained whole" not in text


def test_the_exported_fish_mask_is_what_fish_writes(
    found: tuple[Path, Path], base: Path, tmp_path: Path
) -> None:
    call("export", found[0], "--to", "fish", "--model", base, "-o", tmp_path / "mask.bin")
    tensors = torch.load(tmp_path / "mask.bin", weights_only=True)
    model = BertForSequenceClassification.from_pretrained(base)
    assert {n: t.shape for n, t in tensors.items()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    mask, dense = read_fish_mask(tmp_path / "mask.bin", model, dense=["classifier", "pooler"])
    assert mask.count == masks(found)[0].count and len(dense) == 4


# --- bad input -----------------------------------------------------------------------------------


def test_bad_calls(found: tuple[Path, Path], base: Path, tmp_path: Path) -> None:
    export = ["export", found[0], "--model", base, "-o", tmp_path / "x"]
    merge_one = ["merge", found[0], "-o", tmp_path / "x"]
    there = tmp_path / "there"
    there.mkdir()
    for code, part, words in (
        (2, "at least two", ["merge", found[0], "-o", tmp_path / "x"]),
        (2, "--budget is an option of --to lora", [*export, "--to", "shira", "--budget", 3]),
        (2, "--model is missing", ["export", found[0], "--to", "fish", "-o", tmp_path / "x"]),
        (5, "no such file", ["compare", found[0], base]),
        (5, "no safetensors file", ["inspect", found[0] / "report.md"]),
        (2, "is there already", ["merge", *found, "-o", there]),
        (2, "takes one delta", ["merge", *found, "--model", base, "-o", tmp_path / "x"]),
        (2, "and no --how", [*merge_one, "--model", base, "--how", "union"]),
        (
            2,
            "leave out --dense",
            ["import", found[0], "--from", "delta", "--dense", "a", "-o", "x"],
        ),
        (2, "has no values", ["merge", found[0], "--model", base, "-o", tmp_path / "x"]),
        (2, "--tuned", ["export", found[0], "--to", "delta", "--model", base, "-o", "x"]),
        (2, "'onnx'", ["export", found[0], "--to", "onnx", "--model", base, "-o", "x"]),
        (4, "no/such", ["export", found[0], "--to", "bool", "--model", "no/such", "-o", "x"]),
        (5, "no such file", ["compare", found[0], tmp_path / "none"]),
        (5, "no such file", ["import", tmp_path / "none", "--from", "delta", "-o", "x"]),
    ):
        assert part in refused(code, *words), words
    assert list(tmp_path.iterdir()) == [there]


def test_a_mask_over_adapters_names_the_way_out(
    found: tuple[Path, Path], base: Path, tmp_path: Path
) -> None:
    provenance = {"architecture": "PeftModelForSequenceClassification"}
    save_mask(tmp_path / "peft.safetensors", masks(found)[0], provenance=provenance)
    with pytest.raises(UsageError, match="over the adapters of a PEFT model"):
        export_mask(tmp_path / "peft.safetensors", tmp_path / "x", to="fish", model=str(base))
    export_mask(tmp_path / "peft.safetensors", tmp_path / "bools", to="bool")  # needs no model


def test_a_mask_without_provenance_takes_the_class_of_the_models_own_config(
    found: tuple[Path, Path], tuned: Path, tmp_path: Path
) -> None:
    save_mask(tmp_path / "bare.safetensors", masks(found)[0])
    export_mask(tmp_path / "bare.safetensors", tmp_path / "x", to="fish", model=str(tuned))
    assert len(torch.load(tmp_path / "x", weights_only=True)) == len(state(tuned))


def test_deltas_are_compared_by_their_masks_and_one_alone_is_told_what_it_needs(
    found: tuple[Path, Path], base: Path, tuned: Path, tmp_path: Path
) -> None:
    delta = tmp_path / "delta.safetensors"
    call("export", found[0], "--to", "delta", "--model", base, "--tuned", tuned, "-o", delta)
    document = json.loads(call("compare", found[1], delta, "--json"))
    assert document["b"]["count"] == masks(found)[0].count
    assert "is a delta" in refused(2, "merge", delta, "-o", tmp_path / "x")


def test_a_torch_file_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "mask.bin")
    assert "import --from fish" in refused(5, "inspect", tmp_path / "mask.bin")


def test_a_mask_of_other_weights_is_not_exported(
    found: tuple[Path, Path], tuned: Path, tmp_path: Path
) -> None:
    said = refused(5, "export", found[0], "--to", "bool", "--model", tuned, "-o", tmp_path / "x")
    assert "not those that the mask was made for" in said and not (tmp_path / "x").exists()


def test_masks_of_one_seed_keep_the_head_that_their_searches_had(
    found: tuple[Path, Path], base: Path, tmp_path: Path
) -> None:
    call("merge", found[1], found[1], "-o", tmp_path / "m.safetensors")
    heads = [
        base_model(inspect_mask(path).provenance, str(base)).get_parameter("classifier.weight")
        for path in (found[0], found[1], tmp_path / "m.safetensors")
    ]
    assert torch.equal(heads[1], heads[2]) and not torch.equal(heads[0], heads[1])


def test_a_search_in_bfloat16_is_exported_in_bfloat16(base: Path, tmp_path: Path) -> None:
    search_mask(base, TEXT_ROWS * 6, output=tmp_path / "run", dtype="bfloat16", **SMALL)
    words = ["export", tmp_path / "run", "--to", "fish", "--model", base]
    call(*words, "-o", tmp_path / "mask.bin")
    call("merge", tmp_path / "run", tmp_path / "run", "-o", tmp_path / "m.safetensors")
    call("export", tmp_path / "m.safetensors", *words[2:], "-o", tmp_path / "again.bin")


def test_three_masks_of_like_names_are_three_files(
    found: tuple[Path, Path], tmp_path: Path
) -> None:
    paths = [tmp_path / "p" / "x", tmp_path / "q" / "x", tmp_path / "r" / "2-x"]
    for path in paths:
        save_mask(path / "mask.safetensors", masks(found)[0])
    call("merge", *paths, "--how", "disjoint", "-o", tmp_path / "apart")
    apart = [inspect_mask(file).mask for file in sorted((tmp_path / "apart").iterdir())]
    assert len(apart) == 3 and sum(mask.count for mask in apart) == masks(found)[0].count


def test_free_provenance_is_no_stumbling_block(
    found: tuple[Path, Path], tuned: Path, tmp_path: Path
) -> None:
    free = {"task": "sst2", "search": "walk", "dataset": 3, "head": "classifier"}
    save_mask(tmp_path / "free.safetensors", masks(found)[0], provenance=free)
    assert "Jaccard" in call("compare", tmp_path / "free.safetensors", found[0])
    call(
        "export",
        tmp_path / "free.safetensors",
        "--to",
        "fish",
        "--model",
        tuned,
        "-o",
        tmp_path / "x",
    )


def test_without_peft_the_way_to_get_it_is_told(
    found: tuple[Path, Path], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.startswith("ird_search.consumers.peft")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)
    words = ["export", found[0], "--to", "shira", "--model", base, "-o", tmp_path / "x"]
    assert "pip install 'ird_search[peft]'" in refused(2, *words)


def test_a_base_that_cannot_be_loaded_is_named(
    found: tuple[Path, Path], tuned: Path, tmp_path: Path
) -> None:
    save_mask(tmp_path / "bare.safetensors", masks(found)[0])
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((tuned / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes(b"no weights")
    words = ["export", tmp_path / "bare.safetensors", "--to", "fish", "--model", broken]
    assert "cannot be loaded" in refused(4, *words, "-o", tmp_path / "x")
