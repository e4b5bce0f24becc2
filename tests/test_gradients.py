"""The forms of a gradient: all answer alike."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ird_search.fisher.columns import Columns
from ird_search.fisher.combined import Added, added
from ird_search.fisher.gradients import Dense, Lookup, Outer, SampleGradients


def forms() -> Iterator[tuple[str, SampleGradients]]:
    ids = torch.tensor([[1, 3, 1, -1], [0, 0, 4, 2], [4, 4, 4, 4]])
    outer = Outer(torch.randn(3, 4, 5), torch.randn(3, 4, 6))
    lookup = Lookup(ids, torch.randn(3, 4, 6), 5)
    yield "dense", Dense(torch.randn(3, 30))
    yield "outer", outer
    yield "one token", Outer(torch.randn(3, 1, 5), torch.randn(3, 1, 6))
    yield "few tokens", Outer(torch.randn(3, 2, 5), torch.randn(3, 2, 6))
    yield "lookup", lookup
    yield "added", added([outer, lookup])
    yield "two outers", added([outer, Outer(torch.randn(3, 1, 5), torch.randn(3, 1, 6))])
    yield "two lookups", added([lookup, Lookup(ids.flip(0), torch.randn(3, 4, 6), 5)])


@pytest.mark.parametrize(("name", "gradients"), forms(), ids=lambda x: x if type(x) is str else "")
def test_forms_of_a_gradient_answer_alike(name: str, gradients: SampleGradients) -> None:
    g = gradients.dense()
    for k in (0, 1, 3, 15, 30):
        columns = Columns(torch.randperm(30)[:k].sort().values, 30)
        f = g[:, columns.index].square()
        sums, with_means, means = torch.ones(30), torch.ones(30), torch.ones(30)
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(gradients.entries(columns), g[:, columns.index])
        torch.testing.assert_close(gradients.add_squares(sums, columns), f.sum(1), **close)
        torch.testing.assert_close(sums, 1 + g.square().sum(0), **close)
        again = gradients.add_squares(with_means, columns, means=means)
        torch.testing.assert_close(means, 1 + g.sum(0), **close)
        assert torch.equal(with_means, sums)
        assert torch.equal(again, gradients.add_squares(torch.ones(30), columns))
        torch.testing.assert_close(gradients.square_norms(columns), f.sum(1), **close)
        squares, signed = torch.ones(k), torch.ones(k)
        gradients.add_some(columns, squares, signed)
        torch.testing.assert_close(squares, 1 + f.sum(0), **close)
        torch.testing.assert_close(signed, 1 + g[:, columns.index].sum(0), **close)
        gradients.add_some(columns, again := torch.ones(k))
        assert torch.equal(again, squares)
    torch.testing.assert_close(gradients.square_norms(), g.square().sum(1), **close)
    torch.testing.assert_close(gradients.select(slice(1, 3)).dense(), g[1:])
    torch.testing.assert_close(gradients.select(torch.tensor([2, 0])).dense(), g[[2, 0]])


@pytest.mark.parametrize("tokens", range(2, 18))
def test_entries_by_themselves_for_any_number_of_tokens(tokens: int) -> None:
    """The product is taken in eights; what is added to fill them up adds nothing."""
    outer = Outer(torch.randn(3, tokens, 24), torch.randn(3, tokens, 40))
    columns = Columns(torch.arange(0, 960, 17), 960)
    assert outer.sampled(columns)
    wanted = outer.dense()[:, columns.index]
    torch.testing.assert_close(outer.entries(columns), wanted)
    squares, means = torch.zeros(57), torch.zeros(57)
    outer.add_some(columns, squares, means)
    torch.testing.assert_close(squares, wanted.square().sum(0))
    torch.testing.assert_close(means, wanted.sum(0))
    torch.testing.assert_close(outer.square_norms(columns), wanted.square().sum(1))


def test_uses_of_unlike_forms_are_added_before_they_are_squared() -> None:
    outer, lookup = dict(forms())["outer"], dict(forms())["lookup"]
    both = added([outer, lookup])
    assert isinstance(both, Added)
    torch.testing.assert_close(both.dense(), outer.dense() + lookup.dense())
