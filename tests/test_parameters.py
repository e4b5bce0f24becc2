"""`ParameterSpace`: one axis over many tensors; and which tensors are on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ird_search.errors import ModelError, UsageError
from ird_search.parameters import (
    ParameterSpace,
    candidate_space,
    embedding_parameters,
    head_parameters,
)
from tests.cases import named
from tests.tiny import tiny_bert, tiny_gpt2, tiny_vit

SHAPES = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=5)


def space_of(shapes: list[tuple[int, ...]]) -> ParameterSpace:
    return ParameterSpace(tuple(f"w{i}" for i in range(len(shapes))), tuple(shapes))


@given(SHAPES)
def test_flatten_and_split_are_inverse(shapes: list[tuple[int, ...]]) -> None:
    space = space_of(shapes)
    flat = torch.arange(space.numel, dtype=torch.float64)
    tensors = space.split(flat)
    assert [tuple(tensors[name].shape) for name in space.names] == shapes
    assert torch.equal(space.flatten(tensors), flat)
    assert all(torch.equal(flat[space.span(n)], t.reshape(-1)) for n, t in tensors.items())


@given(SHAPES, st.data())
def test_local_indices_address_the_same_entries(
    shapes: list[tuple[int, ...]], data: st.DataObject
) -> None:
    space = space_of(shapes)
    chosen = data.draw(st.sets(st.integers(0, max(0, space.numel - 1)))) if space.numel else set()
    coords = torch.tensor(sorted(chosen), dtype=torch.int64)
    flat = torch.zeros(space.numel)
    flat[coords] = 1
    local = space.localize(coords)
    tensors = space.split(flat)
    assert all(index.numel() for index in local.values())
    for name in space.names:
        wanted = tensors[name].reshape(-1).nonzero().flatten()
        assert torch.equal(local.get(name, torch.empty(0, dtype=torch.int64)), wanted)


def test_of_follows_the_model_not_the_request() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    assert ParameterSpace.of(model).names == ("0.weight", "0.bias", "1.weight", "1.bias")
    space = ParameterSpace.of(model, ["1.weight", "0.bias"])
    assert (space.names, space.shapes, space.numel) == (("0.bias", "1.weight"), ((3,), (1, 3)), 6)
    assert "0.bias" in space and "0.weight" not in space
    assert repr(space) == "ParameterSpace(2 tensors, 6 parameters)"


def test_an_unknown_name_is_refused_with_a_guess() -> None:
    with pytest.raises(UsageError, match=r"'weigth' is not a parameter .* Did you mean 'weight'"):
        ParameterSpace.of(nn.Linear(2, 2), ["weigth"])


def test_names_must_be_distinct_and_shaped() -> None:
    for names, shapes in ((("a", "a"), ((1,), (1,))), (("a", "b"), ((1,),))):
        with pytest.raises(UsageError, match="distinct names and one shape for each"):
            ParameterSpace(names, shapes)


def test_the_fingerprint_knows_names_and_shapes_and_no_order() -> None:
    a = ParameterSpace(("u", "v"), ((2, 3), (4,)))
    assert a.fingerprint == ParameterSpace(("v", "u"), ((4,), (2, 3))).fingerprint
    others = [
        ParameterSpace(("u", "v"), ((3, 2), (4,))),
        ParameterSpace(("u", "w"), ((2, 3), (4,))),
        ParameterSpace(("u",), ((2, 3),)),
    ]
    assert len({a.fingerprint, *(o.fingerprint for o in others)}) == 4


def test_differences_name_every_tensor() -> None:
    space = ParameterSpace(("weight", "bias", "wieght"), ((2, 3), (5,), (1,)))
    found = space.differences(nn.Linear(3, 2))
    assert found == [
        "bias is [2], not [5]",
        "wieght [1] is missing. Did you mean 'weight'?",
    ]
    assert ParameterSpace.of(nn.Linear(3, 2)).differences(nn.Linear(3, 2)) == []


@pytest.mark.parametrize(
    ("model", "head"),
    [
        (tiny_bert, ("bert.pooler.dense.", "classifier.")),
        (tiny_vit, ("classifier.",)),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), ("2.",)),
        (tiny_gpt2, ()),
        (lambda: nn.Linear(2, 2), ()),
    ],
    ids=["bert", "vit", "plain", "language model", "one layer"],
)
def test_heads(model: Any, head: tuple[str, ...]) -> None:
    built = model()
    wanted = {n for n, _ in built.named_parameters() if n.startswith(head)} if head else set()
    assert set(head_parameters(built)) == wanted


def test_a_head_by_pattern() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert head_parameters(model, ["^0"]) == ("0.weight", "0.bias")
    assert head_parameters(model, []) == ()
    with pytest.raises(UsageError, match="head pattern 'nope' matches no trainable parameter"):
        head_parameters(model, ["nope"])


def test_what_is_no_regular_expression_is_told_with_the_reason() -> None:
    model = tiny_bert()
    for what, call in {
        "head": lambda bad: head_parameters(model, bad),
        "include": lambda bad: candidate_space(model, include=bad),
        "exclude": lambda bad: candidate_space(model, exclude=bad),
    }.items():
        with pytest.raises(UsageError) as e:
            call(["query", "(", "*", 3])
        assert len(e.value.problems) == 3
        first, second, third = e.value.problems
        assert f"{what} pattern '(' is no regular expression: missing ), unterminated" in first
        assert f"{what} pattern '*' is no regular expression: nothing to repeat" in second
        assert f"{what} pattern 3 is no regular expression: first argument must be" in third


def test_a_single_pattern_is_one_pattern() -> None:
    model = tiny_bert()
    assert candidate_space(model, include="query") == candidate_space(model, include=["query"])


def test_a_frozen_parameter_is_no_head() -> None:
    model = tiny_bert()
    model.classifier.bias.requires_grad_(False)
    assert "classifier.bias" not in head_parameters(model)


def test_embeddings_are_found_by_their_module() -> None:
    vit, bert, gpt2 = (set(embedding_parameters(m)) for m in (tiny_vit(), tiny_bert(), tiny_gpt2()))
    assert {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"} <= vit
    assert "bert.embeddings.word_embeddings.weight" in bert
    assert gpt2 == {"transformer.wte.weight", "transformer.wpe.weight"}


def test_candidates_leave_out_head_embeddings_and_what_is_frozen() -> None:
    model = tiny_bert()
    model.bert.encoder.layer[0].requires_grad_(False)
    space = candidate_space(model, head=head_parameters(model))
    assert all(".layer.1." in n or "embeddings.LayerNorm" in n for n in space.names)
    wide = candidate_space(model, head=head_parameters(model), embeddings=True)
    assert set(wide.names) - set(space.names) == set(embedding_parameters(model))


def test_candidates_by_pattern() -> None:
    model = tiny_bert()
    space = candidate_space(model, include=["query", "value"], exclude=["bias"])
    assert len(space.names) == 4
    with pytest.raises(UsageError) as e:
        candidate_space(model, include=["query", "nope", "nada"])
    assert len(e.value.problems) == 2
    with pytest.raises(ModelError, match="No parameter is left for a mask to choose from"):
        candidate_space(model, exclude=["."])


def test_candidates_of_adapters_are_the_adapters() -> None:
    space = candidate_space(named("lora").model)
    assert space.names and all("lora_" in name for name in space.names)
