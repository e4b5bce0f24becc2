"""Masks through other formats and back: nothing lost, nothing guessed, nothing run."""

from __future__ import annotations

import copy
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

from ird_search.artifact import save_mask
from ird_search.consumers.formats import (
    from_prune,
    from_tensors,
    read_bool_mask,
    read_fish_mask,
    read_tensors,
    to_prune,
    to_tensors,
    write_bool_mask,
    write_fish_mask,
)
from ird_search.errors import ArtifactError, ModelError, UsageError
from ird_search.freeze import apply_mask
from ird_search.mask import SparseMask
from ird_search.parameters import ParameterSpace
from tests.tiny import tiny_bert, tiny_gpt2

HEAD = ("classifier.weight", "classifier.bias")
BERT, GPT2 = tiny_bert(), tiny_gpt2()


def net() -> nn.Sequential:
    """4 → 3 → 2: no weight is square."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


NET = net()


def chosen(model: nn.Module, names: list[str] | None = None, *, step: int = 7) -> SparseMask:
    """A mask with entries in many tensors, over all parameters or some."""
    space = ParameterSpace.of(model, names)
    return SparseMask(space, torch.arange(0, space.numel, step))


def body(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if name not in HEAD]


# Dicts of tensors


@given(
    st.sets(st.integers(0, ParameterSpace.of(NET).numel - 1)),
    st.sampled_from([0, 1]),
    st.sampled_from(["model", "out_in", "in_out"]),
    st.sampled_from([torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32]),
)
def test_tensors_round_trip(coords: set[int], trains: Any, layout: Any, dtype: torch.dtype) -> None:
    mask = SparseMask(ParameterSpace.of(NET), torch.tensor(sorted(coords), dtype=torch.int64))
    tensors = to_tensors(mask, NET, trains=trains, layout=layout)
    given_tensors = {name: t.to(dtype) for name, t in reversed(tensors.items())}
    again, dense = from_tensors(given_tensors, NET, trains=trains, layout=layout)
    assert again == mask
    assert dense == ()


def test_polarity_is_which_value_trains() -> None:
    tensors = {"0.bias": torch.tensor([1, 0, 0])}
    ones, _ = from_tensors(tensors, NET, trains=1)
    zeros, _ = from_tensors(tensors, NET, trains=0)
    assert ones.indices["0.bias"].tolist() == [0]
    assert zeros.indices["0.bias"].tolist() == [1, 2]
    assert ones.space == zeros.space == ParameterSpace(("0.bias",), ((3,),))
    with pytest.raises(TypeError, match="trains"):
        from_tensors(tensors, NET)


@pytest.mark.parametrize(
    ("model", "layout", "turned"),
    [
        (GPT2, "out_in", {"transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_fc.weight"}),
        (GPT2, "in_out", set()),
        (BERT, "in_out", {"classifier.weight", "bert.encoder.layer.1.output.dense.weight"}),
        (BERT, "out_in", set()),
    ],
    ids=["conv1d out_in", "conv1d in_out", "linear in_out", "linear out_in"],
)
def test_layout_turns_the_layers_that_lie_otherwise(
    model: nn.Module, layout: Any, turned: set[str]
) -> None:
    mask = chosen(model)
    plain = to_tensors(mask, model, trains=1)
    laid = to_tensors(mask, model, trains=1, layout=layout)
    changed = {name for name in plain if not torch.equal(plain[name], laid[name])}
    assert turned <= changed
    assert bool(changed) == bool(turned)
    assert all(torch.equal(laid[name], plain[name].T) for name in changed)
    assert not any("wte" in name or "embeddings" in name for name in changed)
    assert from_tensors(laid, model, trains=1, layout=layout)[0] == mask


def test_without_a_model_the_tensors_are_the_space() -> None:
    mask, _ = from_tensors({"b": torch.tensor([0, 1]), "a": torch.tensor([[1]])}, trains=1)
    assert mask.space == ParameterSpace(("b", "a"), ((2,), (1, 1)))
    assert mask.coords.tolist() == [1, 2]
    with pytest.raises(UsageError, match="layout='in_out' needs the model"):
        from_tensors({"a": torch.tensor([[1]])}, trains=1, layout="in_out")


def test_dense_tensors_are_named_and_leave_the_mask() -> None:
    mask = chosen(BERT, body(BERT))
    tensors = to_tensors(mask, BERT, trains=1, dense=HEAD)
    again, dense = from_tensors(tensors, BERT, trains=1, dense="^classifier")
    assert (again, dense) == (mask, HEAD)
    everything, none = from_tensors(tensors, BERT, trains=1)
    assert none == ()
    assert everything.count == mask.count + sum(t.numel() for t in BERT.classifier.parameters())
    assert everything.space == ParameterSpace.of(BERT)


class Distil(nn.Module):
    """One layer's name is the end of another's, as in DistilBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.pre_classifier = nn.Linear(3, 3), nn.Linear(3, 3)
        self.classifier = nn.Linear(3, 2)


@pytest.mark.parametrize("form", ["tensors", "fish"])
def test_a_dense_name_means_that_tensor_alone(tmp_path: Path, form: str) -> None:
    model = Distil()
    space = ParameterSpace.of(model, [n for n, _ in model.named_parameters() if n not in HEAD])
    for name in ("pre_classifier.weight", "pre_classifier.bias"):  # which may be selected in full
        span = space.span(name)
        mask = SparseMask(space, torch.arange(span.start, span.stop))
        if form == "fish":
            write_fish_mask(mask, tmp_path / "mask.bin", model, dense=HEAD)
            again = read_fish_mask(tmp_path / "mask.bin", model, dense=HEAD)
        else:
            tensors = to_tensors(mask, model, trains=1, dense=HEAD)
            again = from_tensors(tensors, model, trains=1, dense=HEAD)
        assert again == (mask, HEAD)


def test_a_dense_expression_that_is_no_name_is_searched() -> None:
    ones = {name: torch.ones(p.shape) for name, p in Distil().named_parameters()}
    assert len(from_tensors(ones, trains=1, dense="classifier.weigh")[1]) == 2
    assert from_tensors(ones, trains=1, dense=["^classifier", "body.bias"])[1] == (
        "body.bias",
        *HEAD,
    )
    odd = {"w[": torch.ones(2), "b": torch.zeros(2)}  # a name need be no regular expression
    assert from_tensors(odd, trains=1, dense=["w["])[1] == ("w[",)


def test_dense_patterns_that_are_no_regular_expressions_are_refused() -> None:
    with pytest.raises(UsageError) as e:
        from_tensors({"0.bias": torch.ones(3)}, NET, trains=1, dense=["(", "bias", "[a"])
    assert len(e.value.problems) == 2
    assert "dense pattern '(' is no regular expression: missing )" in str(e.value)


def test_every_problem_is_told_at_once() -> None:
    tensors = {
        "0.weight": torch.full((3, 4), 0.5),
        "0.bias": torch.tensor([0.0, float("nan"), 1.0]),
        "2.weight": torch.zeros(5, 5),
        "2.bais": torch.ones(2),
    }
    with pytest.raises(UsageError) as e:
        from_tensors(tensors, NET, trains=1, dense=["head", "2.weight"])
    text = str(e.value)
    assert "2.weight is [2, 3], not [5, 5]" in text
    assert "2.bais [2] is missing. Did you mean '2.bias'" in text
    assert "0.weight holds 12 others, as 0.5." in text
    assert "0.bias holds 1 others, as nan." in text
    assert "dense pattern 'head' matches no tensor. Names look like ['0.weight'," in text
    assert "'2.weight', which is not trained whole: 0 of 25 entries are." in text
    assert "layout" not in text


def test_transposed_weights_are_told_with_the_layout_that_fits() -> None:
    tensors = to_tensors(chosen(NET), NET, trains=1, layout="in_out")
    for layout in ("model", "out_in"):
        with pytest.raises(UsageError) as e:
            from_tensors(tensors, NET, trains=1, layout=layout)
        assert "pass layout='in_out', with which all fit." in str(e.value)
        assert "0.weight is [3, 4], not [4, 3]" in str(e.value)
    tensors["head"] = torch.zeros(1)
    with pytest.raises(UsageError, match="with layout='in_out', 1 differ"):
        from_tensors(tensors, NET, trains=1)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "a dict of tensors by parameter name; this is '{}'"),
        ([torch.ones(1)], "this is '\\[tensor"),
        ({"0.bias": [1, 0, 1]}, "'0.bias' is of type list"),
        ({0: torch.ones(1)}, "0 is a tensor of layout torch.strided"),
        ({"a\x1b[2J": torch.ones(1)}, r"'a\\x1b\[2J' is a tensor"),
        ({"0.bias": torch.ones(3).to_sparse()}, "'0.bias' is a tensor of layout torch.sparse_coo"),
        ({"0.bias": torch.ones(3, device="meta")}, "torch.strided on meta"),
    ],
    ids=["empty", "list", "lists", "number", "escape", "sparse", "meta"],
)
def test_what_is_no_dict_of_tensors_is_refused(found: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        from_tensors(found, NET, trains=1)


def test_choices_are_checked() -> None:
    with pytest.raises(UsageError) as e:
        to_tensors(chosen(NET), NET, trains=2, layout="ni_tuo")  # type: ignore[arg-type]
    assert e.value.problems == (
        "trains=2 is not accepted; choose 0 or 1.",
        "layout='ni_tuo' is not accepted; choose 'model' or 'out_in' or 'in_out'.",
    )


def test_a_mask_of_another_model_has_no_tensors_here() -> None:
    with pytest.raises(ModelError, match="belongs to another model"):
        to_tensors(chosen(NET), BERT, trains=1)
    with pytest.raises(UsageError, match=r"'0\.bias' is dense and also holds 1 selected"):
        to_tensors(chosen(NET), NET, trains=1, dense="0.bias")


# FISH


def fish_mask(model: nn.Module, keep: int) -> dict[str, Tensor]:
    """A mask as FISH makes one: the top of all scores outside the head, ones in the head."""
    scores = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    ranked = {name: s for name, s in scores.items() if "classifier" not in name}
    flat = torch.zeros(sum(s.numel() for s in ranked.values()))
    flat[torch.cat([s.flatten() for s in ranked.values()]).topk(keep)[1]] = 1
    parts = flat.split([s.numel() for s in ranked.values()])
    masks = {name: part.view_as(scores[name]) for name, part in zip(ranked, parts, strict=True)}
    return masks | {name: torch.ones_like(s) for name, s in scores.items() if name not in ranked}


def masked_step(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """A step as FISH takes it, which looks up a mask for every named parameter."""
    model(torch.arange(4, 10)[None]).logits.square().sum().backward()
    for name, p in model.named_parameters():
        p.grad.mul_(masks[name])
    torch.optim.SGD(model.parameters(), lr=0.1).step()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_mask_of_fish_trains_here_what_it_trains_there(tmp_path: Path, zipped: bool) -> None:
    theirs, ours = tiny_bert().eval(), tiny_bert().eval()
    masks = fish_mask(theirs, keep=50)
    torch.save(masks, tmp_path / "mask.bin", _use_new_zipfile_serialization=zipped)
    mask, dense = read_fish_mask(tmp_path / "mask.bin", ours, dense=["classifier"])
    assert mask.count == 50
    assert dense == HEAD
    assert mask.space == ParameterSpace.of(ours, body(ours))
    masked_step(theirs, masks)
    with apply_mask(ours, mask, dense=dense) as handle:
        ours(torch.arange(4, 10)[None]).logits.square().sum().backward()
        torch.optim.SGD(handle.parameters(), lr=0.1).step()
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_written_mask_is_one_that_fish_can_load(tmp_path: Path) -> None:
    model, mask = tiny_bert(), chosen(BERT, body(BERT))
    write_fish_mask(mask, tmp_path / "run" / "mask.bin", model, dense=HEAD)
    masks = torch.load(tmp_path / "run" / "mask.bin", map_location="cpu")
    assert [*masks] == [name for name, _ in model.named_parameters()]
    assert {t.dtype for t in masks.values()} == {torch.float32}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masked_step(model, masks)
    assert mask.verify(before, dict(model.named_parameters()), dense=HEAD) == []
    assert read_fish_mask(tmp_path / "run" / "mask.bin", model, dense=HEAD) == (mask, HEAD)
    assert os.listdir(tmp_path / "run") == ["mask.bin"]


def test_fish_masks_combine_with_others_from_the_files_alone(tmp_path: Path) -> None:
    mask = chosen(BERT, body(BERT))
    write_fish_mask(mask, tmp_path / "mask.bin", BERT, dense=HEAD)
    alone, _ = read_fish_mask(tmp_path / "mask.bin", dense=["classifier"])
    assert alone.lifted(mask.space) == mask
    encoder = [name for name in body(BERT) if ".encoder." in name]
    assert (alone & chosen(BERT, encoder)).count == (mask & chosen(BERT, encoder)).count > 0


def test_the_prefix_of_data_parallel_is_taken_off(tmp_path: Path) -> None:
    wrapped = nn.DataParallel(NET)
    write_fish_mask(chosen(wrapped), tmp_path / "mask.bin", wrapped)
    assert read_fish_mask(tmp_path / "mask.bin", NET)[0] == chosen(NET)
    assert read_fish_mask(tmp_path / "mask.bin", wrapped)[0] == chosen(wrapped)
    assert read_fish_mask(tmp_path / "mask.bin")[0] == chosen(wrapped)


def test_a_mask_bin_of_another_model_names_the_file_and_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "mask.bin"
    write_fish_mask(chosen(NET), path, NET)
    with pytest.raises(UsageError) as e:
        read_fish_mask(path, nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 5)))
    assert str(e.value).startswith(f"{path}: ")
    assert "2.weight is [5, 3], not [2, 3]" in str(e.value)


# Files


class Canary:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_code_in_a_file_is_not_run(tmp_path: Path, how: str) -> None:
    path, canary = tmp_path / "mask.bin", tmp_path / "canary"
    content = {"0.bias": torch.ones(3), "2.bias": Canary(canary)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(ArtifactError, match=r"holds more than tensors .* was not run"):
        read_fish_mask(path, NET)
    assert not canary.exists()
    torch.load(path, weights_only=False) if how != "pickle" else pickle.loads(path.read_bytes())
    assert canary.exists()  # the trap was a real one


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_cut_files_are_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "mask"
    if kind == "safetensors":
        write_bool_mask(chosen(NET), path)
    else:
        torch.save(
            to_tensors(chosen(NET), NET, trains=1),
            path,
            _use_new_zipfile_serialization=kind == "zip",
        )
    data = path.read_bytes()
    read_tensors(path)
    for length in {0, 1, 8, 9, *range(10, len(data), max(1, len(data) // 40)), len(data) - 1}:
        path.write_bytes(data[:length])
        with pytest.raises(ArtifactError, match=str(path)):
            read_tensors(path)


def test_other_contents_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mask.bin"
    one = torch.ones(1)
    for content in ([one], one, {}, {"a": 1}, {"a": one.to_sparse()}):
        torch.save(content, path)
        with pytest.raises(ArtifactError, match=r"mask\.bin: A mask is a dict of"):
            read_tensors(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes", "no tensors here")
    with pytest.raises(ArtifactError, match="is damaged, or holds more"):
        read_tensors(path)
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ArtifactError, match="there is no such file"):
            read_tensors(place)


def test_a_file_that_may_not_be_read_says_so(tmp_path: Path, monkeypatch: Any) -> None:
    write_bool_mask(chosen(NET), tmp_path / "mask")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ArtifactError, match="mask cannot be read: Permission denied"):
        read_tensors(tmp_path / "mask")


def test_bools_round_trip_and_tell_their_polarity(tmp_path: Path) -> None:
    path, mask = tmp_path / "bools.safetensors", chosen(BERT, body(BERT))
    write_bool_mask(mask, path)
    assert read_bool_mask(path, BERT) == (mask, ())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"trains": "1"}
    stored = safetensors.torch.load_file(path)
    expected = to_tensors(mask, BERT, trains=1)
    assert all(torch.equal(stored[name], expected[name]) for name in body(BERT))
    assert stored.keys() == set(body(BERT))
    data = path.read_bytes()
    write_bool_mask(mask, path)
    assert path.read_bytes() == data
    write_bool_mask(mask, path, head=["classifier.weight"])
    assert read_bool_mask(path, BERT) == (mask, ("classifier.weight",))
    for note in ("[", "7", '["\\u0000", 3]'):
        safetensors.torch.save_file(stored, path, metadata={"trains": "1", "head": note})
        assert read_bool_mask(path, BERT) == (mask, ())


def test_bools_of_the_other_polarity(tmp_path: Path) -> None:
    path, mask = tmp_path / "frozen.safetensors", chosen(NET)
    frozen = to_tensors(mask, NET, trains=0)
    safetensors.torch.save_file(frozen, path, metadata={"trains": "0"})
    assert read_bool_mask(path, NET) == (mask, ())
    safetensors.torch.save_file(frozen, path)
    with pytest.raises(ArtifactError, match="does not say which value means train"):
        read_bool_mask(path, NET)
    assert from_tensors(read_tensors(path), NET, trains=0) == (mask, ())


def test_a_bool_that_is_neither_zero_nor_one_is_refused(tmp_path: Path) -> None:
    header = (
        b'{"__metadata__":{"trains":"1"},"b":{"dtype":"BOOL","shape":[2],"data_offsets":[0,2]}}'
    )
    path = tmp_path / "mask.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes([1, 2]))
    with pytest.raises(UsageError, match="b holds 1 others, as 2"):
        read_bool_mask(path)


def test_our_own_masks_are_sent_to_their_reader(tmp_path: Path) -> None:
    save_mask(tmp_path / "mask.safetensors", chosen(NET))
    with pytest.raises(ArtifactError, match="read it with load_mask"):
        read_tensors(tmp_path / "mask.safetensors")


# torch.nn.utils.prune


def test_pruned_weights_become_a_mask() -> None:
    model, bare = net(), net()
    prune.l1_unstructured(model[0], "weight", amount=5)
    prune.random_structured(model[2], "weight", amount=1, dim=0)
    prune.random_unstructured(model[2], "bias", amount=1)
    kept, lost = from_prune(model, trains=1), from_prune(model, trains=0)
    assert kept.space.names == ("0.weight", "2.weight", "2.bias")
    assert kept.count == 7 + 3 + 1
    assert (kept & lost).count == 0
    assert (kept | lost).density == 1.0
    smallest = bare[0].weight.abs().flatten().topk(5, largest=False).indices.sort().values
    assert torch.equal(lost.indices["0.weight"], smallest)
    with apply_mask(bare, kept):  # the names are those of the model without pruning
        pass
    for name in ("0.weight", "2.weight", "2.bias"):
        prune.remove(model.get_submodule(name[0]), name[2:])
    with pytest.raises(UsageError, match=r"before prune\.remove takes them away"):
        from_prune(model, trains=1)


def test_pruning_by_a_mask_computes_with_its_entries_alone() -> None:
    model, bare = net(), net()
    mask = chosen(bare, ["0.weight", "0.bias", "2.bias"], step=3)
    mask = mask - SparseMask(mask.space, torch.arange(15, 17))  # "2.bias" has no entry left
    to_prune(model, mask)
    assert from_prune(model, trains=1) == mask
    with torch.no_grad():
        for name, keep in to_tensors(mask, bare, trains=1).items():
            if name in mask.space:
                bare.get_parameter(name).mul_(keep)
    x = torch.randn(5, 4)
    assert torch.equal(model(x), bare(x))


def test_tied_weights_cannot_be_pruned_for_one_module_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    mask = chosen(model, ["0.weight"])
    with pytest.raises(UsageError, match=r"0\.weight and 1\.weight are one tied parameter"):
        to_prune(model, mask)
    assert not prune.is_pruned(model)
    prune.random_unstructured(model[1], "weight", amount=2)
    with pytest.raises(UsageError, match=r"0\.weight and 1\.weight_orig are one tied"):
        from_prune(model, trains=1)


def test_a_module_under_two_names_is_pruned_once() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    mask = chosen(copy.deepcopy(model))
    to_prune(model, mask)
    assert from_prune(model, trains=1) == mask


def test_pruning_wants_a_mask_of_the_model() -> None:
    with pytest.raises(ModelError, match="belongs to another model"):
        to_prune(net(), chosen(BERT))
