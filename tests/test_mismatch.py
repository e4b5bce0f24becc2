"""Why a mask does not fit a model: one text, whichever door the mask comes through."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from ird_search.artifact import Delta, load_delta, load_mask, save_delta, save_mask
from ird_search.delta import export_delta
from ird_search.entries import trained_entries
from ird_search.errors import ArtifactError, ModelError
from ird_search.freeze import apply_mask
from ird_search.mask import SparseMask
from ird_search.merge import merge_delta
from ird_search.mismatch import mismatch
from ird_search.optimizer import MaskedAdamW
from ird_search.parameters import ParameterSpace
from tests.tiny import tiny_bert, tiny_gpt2


def network(width: int = 3, depth: int = 2) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))


class Around(nn.Module):
    """Puts a model under one or more attribute names."""

    def __init__(self, path: str, model: nn.Module) -> None:
        super().__init__()
        first, _, rest = path.partition(".")
        self.add_module(first, Around(rest, model) if rest else model)


def why(made_on: nn.Module, here: nn.Module) -> str:
    return mismatch(ParameterSpace.of(made_on), here)


def test_the_same_architecture_fits() -> None:
    assert why(network(), network()) == ""


def test_another_size_is_told_with_the_shapes() -> None:
    text = why(network(), network(width=4))
    assert "4 of 4 tensors differ" in text
    assert "0.weight is [4, 4], not [3, 3]" in text
    assert "another size of the model" in text


def test_at_most_ten_differences_are_listed() -> None:
    text = why(network(depth=9), network(width=4, depth=9))
    assert "18 of 18 tensors differ" in text
    assert len(re.findall(r"^  - \d\.", text, re.M)) == 10
    assert "  - 8 more tensors differ." in text


def test_near_names_are_looked_up_for_ten_differences_only() -> None:
    found = ParameterSpace.of(network(depth=9)).differences(Around("module", network(depth=9)))
    assert all(line.split(" is missing.")[0].endswith("]") for line in found)
    assert ["Did you mean" in line for line in found] == [True] * 10 + [False] * 8


@pytest.mark.parametrize(
    ("path", "wrapper"),
    [("base_model.model", "PEFT"), ("module", "DataParallel"), ("_orig_mod", "torch.compile")],
)
def test_a_wrapper_is_recognised_both_ways(path: str, wrapper: str) -> None:
    text = why(network(), Around(path, network()))
    assert "0.weight [3, 3] is missing" in text
    assert f"this model is wrapped by {wrapper} (prefix '{path}.')" in text
    text = why(Around(path, network()), network())
    assert f"the mask was made on a model wrapped by {wrapper} (prefix '{path}.')" in text


@pytest.mark.parametrize(
    ("wrap", "wrapper"), [(torch.compile, "torch.compile"), (nn.DataParallel, "DataParallel")]
)
def test_real_wrappers_have_these_prefixes(
    wrap: Callable[[nn.Module], nn.Module], wrapper: str
) -> None:
    assert f"wrapped by {wrapper}" in why(network(), wrap(network()))


def changed(change: Callable[[nn.Sequential], object]) -> nn.Sequential:
    model = network()
    change(model)
    return model


def compile_last(model: nn.Sequential) -> None:
    model[1] = torch.compile(model[1])


def parallelise_last(model: nn.Sequential) -> None:
    model[1] = nn.DataParallel(model[1])


def prune_last(model: nn.Sequential) -> None:
    prune.random_unstructured(model[1], "weight", amount=2)


@pytest.mark.parametrize(
    ("change", "undo", "done", "cure"),
    [
        (
            prune_last,
            lambda model: prune.remove(model[1], "weight"),
            "pruned by torch.nn.utils.prune, or under spectral_norm",
            "with prune.remove",
        ),
        (
            lambda model: nn.utils.spectral_norm(model[1]),
            lambda model: nn.utils.remove_spectral_norm(model[1]),
            "pruned by torch.nn.utils.prune, or under spectral_norm",
            "with remove_spectral_norm",
        ),
        (
            lambda model: parametrizations.weight_norm(model[1]),
            lambda model: parametrize.remove_parametrizations(model[1], "weight"),
            "under a parametrization",
            "with torch.nn.utils.parametrize.remove_parametrizations",
        ),
        (
            lambda model: parametrizations.orthogonal(model[1]),
            lambda model: parametrize.remove_parametrizations(model[1], "weight"),
            "under a parametrization",
            "with torch.nn.utils.parametrize.remove_parametrizations",
        ),
        (
            lambda model: nn.utils.weight_norm(model[1]),
            lambda model: nn.utils.remove_weight_norm(model[1]),
            "under weight_norm",
            "with remove_weight_norm",
        ),
        (compile_last, None, "compiled by torch.compile", "as it is before torch.compile"),
        (parallelise_last, None, "wrapped by DataParallel", "as it is before wrapping"),
    ],
    ids=["prune", "spectral", "weight_norm", "orthogonal", "old_norm", "compile", "parallel"],
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.spectral_norm` is deprecated:FutureWarning")
def test_what_is_done_to_a_part_is_recognised_both_ways(
    change: Callable[[nn.Sequential], object],
    undo: Callable[[nn.Sequential], object] | None,
    done: str,
    cure: str,
) -> None:
    model = changed(change)
    text = why(network(), model)
    assert f"Likely: this model, or a part of it, is {done}: '1.weight' is '1." in text
    assert cure in text
    text = why(model, network())
    assert f"Likely: the mask was made on a model that was, in whole or in part, {done}:" in text
    assert "is '1.weight' here. Bring this model into the same form first." in text
    if undo is not None:  # what the text says helps
        undo(model)
        assert why(network(), model) == ""


def test_what_is_done_alike_to_both_is_no_cause() -> None:
    both = changed(prune_last), changed(prune_last)
    both[0].append(nn.Linear(3, 3))
    assert "this model has fewer layers" in why(*both)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("targets", [["query"], "all-linear"])
def test_a_model_that_peft_adapted_is_recognised_without_its_wrapper(targets: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=targets, modules_to_save=["classifier"])
    wrapped = peft.get_peft_model(tiny_bert(), config)
    inner = wrapped.get_base_model()
    text = why(tiny_bert(), inner)
    assert "Likely: this model, or a part of it, is adapted by PEFT" in text
    assert "query.weight' is 'bert.encoder.layer.0.attention.self.query.base_layer.weight'" in text
    assert "use the mask on the bare model that it returns (to_supertuning and to_shira" in text
    made_on_adapted = "made on a model that was, in whole or in part, adapted by PEFT"
    assert made_on_adapted in why(inner, tiny_bert())
    factors = [name for name, p in inner.named_parameters() if p.requires_grad]
    assert made_on_adapted in mismatch(ParameterSpace.of(inner, factors), tiny_bert())
    assert why(tiny_bert(), wrapped.unload()) == ""


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_is_recognised_although_it_renames_inside() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"])
    wrapped = peft.get_peft_model(tiny_bert(), config)
    assert "this model is wrapped by PEFT" in why(tiny_bert(), wrapped)
    factors = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert "made on a model wrapped by PEFT" in mismatch(
        ParameterSpace.of(wrapped, factors), tiny_bert()
    )


def test_tied_weights_are_recognised() -> None:
    untied, tied = tiny_gpt2(tie_word_embeddings=False), tiny_gpt2()
    text = why(untied, tied)
    assert "1 of 29 tensors differ" in text
    assert "lm_head.weight [34, 16] is missing" in text
    assert "Likely: tied weights" in text


def test_a_base_model_and_its_task_model_are_recognised_both_ways() -> None:
    model = tiny_bert()
    for made_on, here in ((model, model.bert), (model.bert, model)):
        text = why(made_on, here)
        assert "one of the two holds the other" in text
        assert "(prefix 'bert.')" in text


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("vit.encoder.layer", "vit.layers"),
        ("language_model.model", "model.language_model"),
        ("a.b.c", "z"),
    ],
)
def test_a_renaming_is_spelt_out_with_the_versions(old: str, new: str) -> None:
    made_on, here = Around(old, network(depth=4)), Around(new, network(depth=4))
    here.with_a_longer_name = nn.Linear(3, 3)  # of the same shape, and nothing to do with it
    text = why(made_on, here)
    assert f"renamed tensors: '{old}.' is '{new}.' here." in text
    assert "Another major version of transformers" in text


@pytest.mark.parametrize(
    "wanted",
    [
        {"this.one.bias": (3,)},  # `bias` alone says nothing
        {"this.one.weight": (3, 3), "this.one.bias": (3,)},
        {"block.two.bias": (3,), "block.three.bias": (4,), "block.four.bias": (5,)},  # one of three
    ],
    ids=lambda wanted: ", ".join(wanted),
)
def test_names_that_end_alike_need_be_no_renaming(wanted: dict[str, tuple[int, ...]]) -> None:
    space = ParameterSpace(tuple(wanted), tuple(wanted.values()))
    text = mismatch(space, Around("that.two", nn.LayerNorm(3)))
    assert "renamed tensors" not in text
    assert "another architecture, or another major version of transformers" in text


def test_fewer_layers_are_recognised() -> None:
    text = why(tiny_bert(num_hidden_layers=3), tiny_bert())
    assert "16 of 57 tensors differ" in text
    assert "this model has fewer layers" in text


def test_a_part_that_is_not_there_is_named() -> None:
    text = why(tiny_gpt2(tie_word_embeddings=False), Around("transformer", tiny_gpt2().transformer))
    assert "this model is without its part 'lm_head'" in text


def test_every_door_tells_the_same(tmp_path: Path) -> None:
    made_on, here = network(depth=9), Around("bert", network(depth=9))
    mask = SparseMask(ParameterSpace.of(made_on), torch.tensor([0, 5]))
    delta = Delta(mask, {"0.weight": torch.zeros(2)}, {}, "0" * 64)
    save_mask(tmp_path, mask)
    save_delta(tmp_path, delta)
    text = mismatch(mask.space, here)
    head, cause, first, *_ = text.splitlines()
    assert head == "This mask belongs to another model: 18 of 18 tensors differ."
    assert cause.startswith("Likely: one of the two holds the other (prefix 'bert.')")
    assert first == "  - 0.weight [3, 3] is missing."  # the prefix says it: no guesses
    doors: list[Callable[[], object]] = [
        lambda: trained_entries(here, mask),
        lambda: apply_mask(here, mask),
        lambda: MaskedAdamW(here, mask, lr=0.1),
        lambda: export_delta(here, made_on, mask),
    ]
    for door in doors:
        with pytest.raises(ModelError) as caught:
            door()
        assert str(caught.value) == text
    with pytest.raises(ArtifactError) as caught_file:
        load_mask(tmp_path, here)
    assert str(caught_file.value) == f"{tmp_path / 'mask.safetensors'}: {text}"
    text = text.replace("This mask", "This delta").replace(
        "when the mask was", "when the delta was"
    )
    with pytest.raises(ModelError) as caught:
        merge_delta(here, delta)
    assert str(caught.value) == text
    with pytest.raises(ArtifactError) as caught_file:
        load_delta(tmp_path, here)
    assert str(caught_file.value) == f"{tmp_path / 'delta.safetensors'}: {text}"
