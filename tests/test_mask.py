"""`SparseMask`: a set of coordinates behaves as a set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ird_search.errors import UsageError
from ird_search.mask import SparseMask
from ird_search.parameters import ParameterSpace

SPACE = ParameterSpace(("w", "b", "v"), ((4, 5), (3,), (2, 2, 2)))
SETS = st.sets(st.integers(0, SPACE.numel - 1))


def mask_of(chosen: set[int]) -> SparseMask:
    return SparseMask(SPACE, torch.tensor(sorted(chosen), dtype=torch.int64))


@given(SETS, SETS)
def test_algebra_is_that_of_sets(a: set[int], b: set[int]) -> None:
    left, right = mask_of(a), mask_of(b)
    assert (left & right) == mask_of(a & b)
    assert (left | right) == mask_of(a | b)
    assert (left - right) == mask_of(a - b)
    assert left.jaccard(right) == (len(a & b) / len(a | b) if a | b else 1.0)
    assert (left == right) == (a == b)
    assert (left.digest == right.digest) == (a == b)
    assert len(left) == left.count == len(a)
    assert left.density == len(a) / SPACE.numel


@given(SETS)
def test_dictionaries_round_trip(chosen: set[int]) -> None:
    mask = mask_of(chosen)
    tensors = mask.to_dict()
    assert SparseMask.from_dict(SPACE, tensors) == mask
    assert all(t.dtype == torch.bool and bool(t.any()) for t in tensors.values())
    assert all(tuple(t.shape) == SPACE.shape(n) for n, t in tensors.items())
    assert sum(index.numel() for index in mask.indices.values()) == len(chosen)


def test_a_dictionary_of_another_model_is_refused_with_all_reasons() -> None:
    with pytest.raises(UsageError) as e:
        SparseMask.from_dict(
            SPACE, {"w": torch.ones(5, 4).bool(), "x": torch.ones(1), "b": torch.ones(3)}
        )
    assert len(e.value.problems) == 2
    assert "'w' has shape [5, 4], the model's is [4, 5]." in str(e.value)
    assert "'x' is not in the ParameterSpace" in str(e.value)


@pytest.mark.parametrize(
    "coords", [[2, 1], [1, 1], [-1, 3], [0, SPACE.numel]], ids=["order", "twice", "below", "above"]
)
def test_coordinates_are_checked(coords: list[int]) -> None:
    with pytest.raises(UsageError, match=r"strictly increasing and lie in 0 … 30\."):
        SparseMask(SPACE, torch.tensor(coords))


def test_coordinates_are_integers_on_one_axis() -> None:
    for wrong in (torch.tensor([1.0]), torch.tensor([[1]]), torch.tensor([1], dtype=torch.int32)):
        with pytest.raises(UsageError, match="int64, 1-D, on the CPU"):
            SparseMask(SPACE, wrong)


def test_masks_of_different_models_do_not_combine() -> None:
    other = SparseMask(ParameterSpace(("w",), ((4, 5),)), torch.tensor([1]))
    mine = mask_of({1})
    for combine in (lambda: mine & other, lambda: mine | other, lambda: mine.jaccard(other)):
        with pytest.raises(UsageError, match="Masks of different models cannot be combined"):
            combine()
    assert mine != other
    assert mine.digest != other.digest
    assert mine != "a mask"


def test_printing_a_mask_tells_where_it_lies() -> None:
    text = repr(mask_of({0, 1, 2, 21, 22, 25}))
    assert text == ("SparseMask(6 of 31 parameters, density 19.3548%; w 50%, b 33%, v 17%)")
    assert repr(mask_of(set())) == "SparseMask(0 of 31 parameters, density 0.0000%)"


def test_masks_are_hashable_values() -> None:
    assert len({mask_of({1, 2}), mask_of({1, 2}), mask_of({1, 3})}) == 2
