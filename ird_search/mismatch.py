"""Why a model cannot hold a mask: the differences, and what likely lies behind them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile

from torch import nn

from ird_search.parameters import ParameterSpace

SHOWN = 10
"""How many tensors that differ an error lists."""

_WRAPPERS = {"base_model.model.": "PEFT", "module.": "DataParallel", "_orig_mod.": "torch.compile"}

_OR_ADAPT = " (to_supertuning and to_shira make adapters of a mask)"

_FORMS = (
    (
        r"(?<=\.)_orig_mod\.",
        "compiled by torch.compile",
        "Use the {what} on the model as it is before torch.compile.",
    ),
    (
        r"(?<=\.)module\.",
        "wrapped by DataParallel",
        "Use the {what} on the model as it is before wrapping.",
    ),
    (
        r"\.(base_layer|original_module|(modules_to_save|lora_\w+)\.\w+)(?=\.)",
        "adapted by PEFT",
        "Take the adapters off with unload() or merge_and_unload() of the PEFT model, and use the "
        f"{{what}} on the bare model that it returns{_OR_ADAPT}.",
    ),
    (
        r"_orig$",
        "pruned by torch.nn.utils.prune, or under spectral_norm",
        "Make it ordinary weights again with prune.remove, or with remove_spectral_norm.",
    ),
    (
        r"\bparametrizations\.|\.original\d*$",
        "under a parametrization",
        "Make it ordinary weights again with torch.nn.utils.parametrize.remove_parametrizations.",
    ),
    (
        r"_[gv]$",
        "under weight_norm",
        "Make it ordinary weights again with remove_weight_norm.",
    ),
)
"""What other libraries do to a part of a model: what that puts into names, what it is, the cure."""

Shapes = Mapping[str, tuple[int, ...]]


def mismatch(space: ParameterSpace, model: nn.Module, what: str = "mask") -> str:
    """The text of the error when `model` does not hold `space`; empty when it does.

    It names up to ten tensors that are missing or have another shape, and the likely cause.

    Args:
        what: what belongs to the space: a mask or a delta.

    Example:
        >>> space = ParameterSpace(("weight",), ((1, 3),))
        >>> print(mismatch(space, nn.Linear(2, 1)))
        This mask belongs to another model: 1 of 1 tensors differ.
        Likely: another size of the model, vocabulary or head, or quantised weights. Load the same
        model.
          - weight is [1, 2], not [1, 3]
        >>> mismatch(space, nn.Linear(3, 1))
        ''
    """
    differences = space.differences(model)
    if not differences:
        return ""
    count = f"{len(differences)} of {len(space.names)} tensors differ"
    cause = _likely_cause(space, model, what)
    if "prefix" in cause:  # which explains every line: what one name is like tells nothing more
        differences = [line.partition(" Did you mean")[0] for line in differences]
    head = f"This {what} belongs to another model: {count}.\nLikely: {cause}"
    return listed(head, differences)


def listed(head: str, lines: Sequence[str]) -> str:
    """A sentence, and under it a line for each tensor that differs: up to ten."""
    more = len(lines) - SHOWN
    rest = [f"{more} more tensors differ."] if more > 0 else []
    return "\n  - ".join([head, *lines[:SHOWN], *rest])


def _likely_cause(space: ParameterSpace, model: nn.Module, what: str) -> str:
    """Why the names or shapes differ, and what to do, as far as the names tell."""
    held = {name: tuple(p.shape) for name, p in model.named_parameters()}
    wanted = dict(zip(space.names, space.shapes, strict=True))
    missing = [name for name in wanted if name not in held]
    if not missing and any(".lora_" in name for name in wanted):
        return f"adapters of another rank or size. Wrap the model as when the {what} was made."
    if not missing:
        return (
            "another size of the model, vocabulary or head, or quantised weights. Load the same "
            "model."
        )
    if cause := _wrapped(held, wanted, what) or _formed(missing, held, wanted, what):
        return cause
    if not {n for n, _ in model.named_parameters(remove_duplicate=False)}.isdisjoint(missing):
        return (
            "tied weights. Here the tensor is a second name of another one; load the model with "
            f"the same tying as when the {what} was made."
        )
    if change := _renaming({name: wanted[name] for name in missing}, held, wanted):
        return _renamed(*change, what)
    if _without_numbers(missing) <= _without_numbers(held):
        shared = [name for name in wanted if name in held]
        also = " and another width" if any(wanted[n] != held[n] for n in shared) else ""
        return (
            f"another size: this model has fewer layers{also}. Load the one that the {what} is of."
        )
    parts = {name.partition(".")[0] for name in missing}
    if len(missing) < len(wanted) and parts.isdisjoint(name.partition(".")[0] for name in held):
        lacking = " and ".join(map(repr, sorted(parts)))
        return (
            f"this model is without its part {lacking}. Load it through the same class as when the "
            f"{what} was made."
        )
    return (
        "another architecture, or another major version of transformers, which renames tensors. "
        f"Compare the base model and the versions with those that the {what} was made with."
    )


def _wrapped(held: Shapes, wanted: Shapes, what: str) -> str:
    """What one of the two models is wrapped by; empty for nothing."""
    for prefix, wrapper in _WRAPPERS.items():
        here, there = _all_under(prefix, held), _all_under(prefix, wanted)
        if here and not there:
            return (
                f"this model is wrapped by {wrapper} (prefix {prefix!r}). Use the {what} on the "
                f"model as it is before wrapping{_OR_ADAPT if wrapper == 'PEFT' else ''}."
            )
        if there and not here:
            return (
                f"the {what} was made on a model wrapped by {wrapper} (prefix {prefix!r}). Wrap "
                "this model in the same way first."
            )
    return ""


def _formed(missing: Sequence[str], held: Shapes, wanted: Shapes, what: str) -> str:
    """Which of `_FORMS` a part of one of the two models has; empty for none."""
    for sign, done, cure in _FORMS:
        here, there = _plain(sign, held), _plain(sign, wanted)
        if not there and (name := next((n for n in missing if n in here), "")):
            return (
                f"this model, or a part of it, is {done}: {name!r} is {here[name]!r} here. "
                + cure.format(what=what)
            )
        if not here and (name := next((n for n in there if n in held), "")):
            return (
                f"the {what} was made on a model that was, in whole or in part, {done}: "
                f"{there[name]!r} is {name!r} here. Bring this model into the same form first."
            )
    return ""


def _plain(sign: str, names: Iterable[str]) -> dict[str, str]:
    """The first name with a sign, by each name that comes of taking it away."""
    found: dict[str, str] = {}
    for name in names:
        if (plain := re.sub(sign, "", name)) != name:
            found.setdefault(plain, name)
    return found


def _renamed(old: str, new: str, what: str) -> str:
    if old and new:
        return (
            f"renamed tensors: {old!r} is {new!r} here. Another major version of transformers "
            f"names them otherwise: load the model with the one that the {what} was made with."
        )
    return (
        f"one of the two holds the other (prefix {old or new!r}): a base model and one with a task "
        f"head, or a module around the model. Use the same one as when the {what} was made."
    )


def _renaming(missing: Shapes, held: Shapes, wanted: Shapes) -> tuple[str, str] | None:
    """The change of prefix, from wanted to held, that explains more than half of the missing."""
    spare = {name: shape for name, shape in held.items() if name not in wanted}
    changes = Counter[tuple[str, str]]()
    for name, shape in list(missing.items())[:SHOWN]:
        alike = [other for other, its in spare.items() if its == shape]
        other = max(alike, key=lambda other: len(_shared_end(name, other)), default="")
        end = _shared_end(name, other)
        if "." in end or end in (name, other or None):  # else one word, which says nothing
            changes[name.removesuffix(end), other.removesuffix(end)] += 1
    for (old, new), _ in changes.most_common(1):
        explained = sum(
            name.startswith(old) and spare.get(new + name.removeprefix(old)) == shape
            for name, shape in missing.items()
        )
        if 2 * explained > len(missing):
            return old, new
    return None


def _shared_end(name: str, other: str) -> str:
    """The dotted words that two names end in alike: `b.c` of `a.b.c` and `x.b.c`."""
    pairs = zip(reversed(name.split(".")), reversed(other.split(".")), strict=False)
    words = [a for a, b in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    return ".".join(reversed(words))


def _all_under(prefix: str, names: Iterable[str]) -> bool:
    names = list(names)
    return bool(names) and all(name.startswith(prefix) for name in names)


def _without_numbers(names: Iterable[str]) -> set[str]:
    return {re.sub(r"\d+", "#", name) for name in names}
