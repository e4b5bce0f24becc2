"""`SparseMask`: a set of coordinates behaves as a set."""

from __future__ import annotations

from collections.abc import Callable
from operator import and_, or_, sub, xor
from typing import Any

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
    assert (left ^ right) == mask_of(a ^ b)
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
    shapes = tuple(shape[::-1] for shape in SPACE.shapes)
    mine, other = mask_of({1}), SparseMask(ParameterSpace(SPACE.names, shapes), torch.tensor([1]))
    for combine in (
        lambda: mine & other,
        lambda: mine | other,
        lambda: mine - other,
        lambda: mine ^ other,
        lambda: mine.jaccard(other),
    ):
        with pytest.raises(UsageError) as e:
            combine()
        assert "Masks of different models cannot be combined." in str(e.value)
        assert "w is [4, 5] and [5, 4]." in str(e.value)
        assert "b is" not in str(e.value)  # its shape is the same both ways round
    assert mine != other
    assert mine.digest != other.digest
    assert mine != "a mask"


@pytest.mark.parametrize("combine", [and_, or_, sub, xor], ids=lambda f: f.__name__)
def test_masks_combine_with_masks_alone(combine: Callable[[Any, Any], Any]) -> None:
    class Other:
        """Knows how to combine with anything on its left."""

        __rand__ = __ror__ = __rsub__ = __rxor__ = lambda self, mask: ("mine", mask)

    mask = mask_of({1})
    for stranger in (3, {1}, None):
        with pytest.raises(TypeError, match="unsupported operand type"):
            combine(mask, stranger)
        with pytest.raises(TypeError, match="unsupported operand type"):
            combine(stranger, mask)
    assert combine(mask, Other()) == ("mine", mask)


def test_many_differences_are_counted_and_ten_are_named() -> None:
    names = tuple(f"w{i}" for i in range(14))
    one, other = (
        SparseMask(ParameterSpace(names, ((n,),) * 14), torch.tensor([0])) for n in (2, 3)
    )
    with pytest.raises(UsageError) as e:
        one & other
    assert str(e.value).count(" is [2] and [3].") == 10
    assert str(e.value).endswith("4 more tensors differ.")


def test_lifting_moves_coordinates_and_keeps_entries() -> None:
    larger = ParameterSpace(("v", "x", "b", "w"), ((2, 2, 2), (7,), (3,), (4, 5)))
    mask = mask_of({0, 19, 20, 22, 23, 30})
    lifted = mask.lifted(larger)
    assert lifted.space == larger
    assert {name: index.tolist() for name, index in lifted.indices.items()} == {
        name: index.tolist() for name, index in mask.indices.items()
    }
    assert lifted.lifted(SPACE) == mask
    assert mask.lifted(SPACE) is mask
    assert mask_of(set()).lifted(larger) == SparseMask(larger, mask_of(set()).coords)


def test_lifting_needs_the_tensors_with_selected_entries() -> None:
    smaller = ParameterSpace(("w", "v"), ((4, 5), (2, 2, 2)))
    assert mask_of({1, 23}).lifted(smaller).coords.tolist() == [1, 20]
    other = ParameterSpace(("w", "v"), ((5, 4), (2, 2, 2)))
    with pytest.raises(UsageError) as e:
        mask_of({20, 23}).lifted(other)
    assert "w is [4, 5] and [5, 4]." in str(e.value)
    assert "b is missing." in str(e.value)
    assert "v" not in str(e.value).partition("space.")[2]


def test_verify_is_a_method_too() -> None:
    mask = mask_of({0, 21})
    before = {name: torch.zeros(SPACE.shape(name)) for name in SPACE.names}
    after = {name: t.clone() for name, t in before.items()}
    after["w"][0, 0], after["b"][1] = 1.0, 1.0
    assert mask.verify(before, after) == []
    after["b"][0], after["v"][1, 1, 1] = 1.0, -0.0
    found = ["b: 1 of 2 frozen entries moved.", "v: 1 of 8 frozen entries moved."]
    assert mask.verify(before, after) == mask.verify(before, after) == found
    assert mask.verify(before, after, dense="b") == found[1:]


def test_printing_a_mask_tells_where_it_lies() -> None:
    text = repr(mask_of({0, 1, 2, 21, 22, 25}))
    assert text == ("SparseMask(6 of 31 parameters, density 19.3548%; w 50%, b 33%, v 17%)")
    assert repr(mask_of(set())) == "SparseMask(0 of 31 parameters, density 0.0000%)"


def test_masks_are_hashable_values() -> None:
    assert len({mask_of({1, 2}), mask_of({1, 2}), mask_of({1, 3})}) == 2
