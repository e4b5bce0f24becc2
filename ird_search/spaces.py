"""How the spaces of several masks fit together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

from ird_search.errors import UsageError
from ird_search.mismatch import listed
from ird_search.parameters import ParameterSpace


def common_space(spaces: Sequence[ParameterSpace]) -> ParameterSpace:
    """The space of all tensors of several spaces.

    Equal spaces give that space, in its order. Spaces that differ in which tensors of one model
    they hold, or in their order, give all tensors sorted by name, whichever space comes first.

    Raises:
        UsageError: no space is given, a tensor has different shapes in two of them, or one shares
            no tensor with any other: then they are of different models, or nothing tells that they
            are of one.

    Example:
        >>> small, large = ParameterSpace(("v",), ((2,),)), ParameterSpace(("v", "b"), ((2,), (3,)))
        >>> common_space([small, large]).names
        ('b', 'v')
    """
    if not spaces:
        raise UsageError("There is nothing to combine: give at least one mask.")
    different = list(dict.fromkeys(spaces))
    if len(different) == 1:
        return different[0]
    if conflicts := shape_conflicts(different):
        raise UsageError(listed("Masks of different models cannot be combined.", conflicts))
    held = Counter(name for space in different for name in space.names)
    for space in different:
        if all(held[name] == 1 for name in space.names):
            others = [name for name in held if name not in space]
            raise UsageError(
                "Masks cannot be combined where one shares no tensor with the others: it chooses "
                f"among {_few(space.names)}, they among {_few(others)}. If all are of one model, "
                "lift each into its space first: mask.lifted(ParameterSpace.of(model))."
            )
    shapes = dict(sorted(chain.from_iterable(map(_shapes, different))))
    return ParameterSpace(tuple(shapes), tuple(shapes.values()))


def shape_conflicts(spaces: Iterable[ParameterSpace]) -> list[str]:
    """The tensors that have different shapes in different spaces, a sentence each."""
    found: dict[str, dict[tuple[int, ...], None]] = {}
    for name, shape in chain.from_iterable(map(_shapes, spaces)):
        found.setdefault(name, {})[shape] = None
    return [
        f"{name} is {' and '.join(str(list(shape)) for shape in shapes)}."
        for name, shapes in found.items()
        if len(shapes) > 1
    ]


def _shapes(space: ParameterSpace) -> Iterable[tuple[str, tuple[int, ...]]]:
    return zip(space.names, space.shapes, strict=True)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "") if names else "no tensor"
