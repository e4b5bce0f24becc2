"""`ParameterSpace`: one flat coordinate system over the tensors a mask may choose from.

The columns of the samples × parameters matrix F[i, j]. A coordinate is an integer
0 ≤ j < P; the tensors lie behind one another in the order of `named_parameters()`, each
flattened row by row.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor, nn

from ird_search.errors import ModelError, UsageError, nearest

LANGUAGE_MODELS = "LMHead|CausalLM|MaskedLM|Generation|MTModel|EncoderDecoder|ToText"
"""What the classes of models with a pretrained head over a vocabulary are called."""


@dataclass(frozen=True)
class ParameterSpace:
    """The eligible tensors of a model as one axis of length P.

    Args:
        names: tensor names as `named_parameters()` gives them.
        shapes: their shapes, in the same order.

    Example:
        >>> space = ParameterSpace(("w", "b"), ((2, 3), (2,)))
        >>> space.numel, space.offsets
        (8, (0, 6, 8))
        >>> space.split(torch.arange(8.0))["b"]
        tensor([6., 7.])
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, model: nn.Module, names: Iterable[str] | None = None) -> ParameterSpace:
        """The space of the named parameters of `model` (all of them by default).

        Raises:
            UsageError: a name is not a parameter of the model.
        """
        require_module(model)
        parameters = dict(model.named_parameters())
        wanted = set(parameters if names is None else names)
        if unknown := sorted(wanted - parameters.keys()):
            raise UsageError(
                f"{name!r} is not a parameter of this model.{nearest(name, parameters)}"
                for name in unknown
            )
        kept = [name for name in parameters if name in wanted]
        return cls(tuple(kept), tuple(tuple(parameters[name].shape) for name in kept))

    def __post_init__(self) -> None:
        if len(self.names) != len(self.shapes) or len(set(self.names)) != len(self.names):
            raise UsageError("A parameter space needs distinct names and one shape for each.")

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor begins, and P at the end: [len(names) + 1]."""
        bounds = [0]
        for shape in self.shapes:
            bounds.append(bounds[-1] + prod(shape))
        return tuple(bounds)

    @property
    def numel(self) -> int:
        """P, the number of coordinates."""
        return self.offsets[-1]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the sorted lines `name|shape`: equal for equal sets of tensors."""
        lines = sorted(
            f"{name}|{','.join(map(str, shape))}"
            for name, shape in zip(self.names, self.shapes, strict=True)
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @cached_property
    def _position(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def __contains__(self, name: object) -> bool:
        return name in self._position

    def span(self, name: str) -> slice:
        """The coordinates of one tensor."""
        i = self._position[name]
        return slice(self.offsets[i], self.offsets[i + 1])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor."""
        return self.shapes[self._position[name]]

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of a flat vector [P], one a tensor, in the tensors' shapes."""
        return {name: flat[self.span(name)].view(self.shape(name)) for name in self.names}

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `split`: one flat vector [P]."""
        return torch.cat([tensors[name].reshape(-1) for name in self.names])

    def localize(self, coords: Tensor) -> dict[str, Tensor]:
        """Sorted flat coordinates [k] as indices into each tensor; untouched tensors left out."""
        bounds = torch.searchsorted(coords, torch.tensor(self.offsets, device=coords.device))
        cuts = bounds.tolist()
        return {
            name: coords[cuts[i] : cuts[i + 1]] - self.offsets[i]
            for i, name in enumerate(self.names)
            if cuts[i + 1] > cuts[i]
        }

    def differences(self, model: nn.Module) -> list[str]:
        """How `model` fails to hold this space, a sentence a tensor; empty when it does.

        Near names are told for the first ten only: looking them up is slow in a large model.
        """
        require_module(model)
        parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
        found: list[str] = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in parameters:
                near = nearest(name, parameters) if len(found) < 10 else ""
                found.append(f"{name} {list(shape)} is missing.{near}")
            elif parameters[name] != shape:
                found.append(f"{name} is {list(parameters[name])}, not {list(shape)}")
        return found

    def __repr__(self) -> str:
        return f"ParameterSpace({len(self.names)} tensors, {self.numel:,} parameters)"


def require_module(model: object) -> None:
    """Refuse what is no model, such as its path, before that fails for a stranger reason.

    Raises:
        UsageError: it is something else.

    Example:
        >>> require_module("path/to/model")
        Traceback (most recent call last):
        ...
        ird_search.errors.UsageError: The model is a str; an nn.Module is accepted. Load it ...
    """
    if not isinstance(model, nn.Module):
        named = isinstance(model, (str, os.PathLike))
        raise UsageError(
            f"The model is a {type(model).__name__}; an nn.Module is accepted."
            + " Load it first: model = AutoModel….from_pretrained(…)." * named
        )


def head_parameters(
    model: nn.Module, patterns: Sequence[str] | None = None, *, last: str | None = None
) -> tuple[str, ...]:
    """Names of the trainable parameters that count as the head.

    The head of a fresh classifier is random: it is trained fully and outside a mask's budget.
    By default it is

    * for a PEFT model, what `modules_to_save` holds;
    * for a transformers model with a task head, everything outside the base model, and the pooler
      (a language model's head is pretrained and is no head here);
    * for another module, the last layer that holds parameters.

    Args:
        patterns: regular expressions searched in the names instead; an empty list means no head.
        last: the layer that comes last as the model runs; by default the one that was made last.

    Raises:
        UsageError: a pattern is no regular expression, or matches nothing.
    """
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    if patterns is not None:
        return tuple(_matching(trainable, patterns, "head"))
    if hasattr(model, "peft_config"):
        return tuple(name for name in trainable if ".modules_to_save." in name)
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and re.search(LANGUAGE_MODELS, type(model).__name__):
        return ()
    outside = [
        name
        for name in trainable
        if not name.startswith(prefix + ".") or "pooler" in name.split(".")
    ]
    if prefix and hasattr(model, prefix) and outside:  # some wrap a whole classifier
        return tuple(outside)
    owners = [name for name, m in model.named_modules() if any(True for _ in m.parameters(False))]
    if len(owners) < 2:
        return ()
    layer = last if last in owners else owners[-1]
    return tuple(name for name in trainable if name.rpartition(".")[0] == layer)


def embedding_parameters(model: nn.Module) -> tuple[str, ...]:
    """Names of embedding tables, position embeddings and special tokens.

    Everything in an `nn.Embedding`, and what a module whose class is named `…Embeddings` holds
    itself (as the class token of a vision transformer).
    """
    found = []
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Embedding) or type(module).__name__.endswith("Embeddings"):
            found += [
                f"{prefix}.{n}".lstrip(".") for n, _ in module.named_parameters(recurse=False)
            ]
    return tuple(found)


def candidate_space(
    model: nn.Module,
    *,
    head: Sequence[str] = (),
    embeddings: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> ParameterSpace:
    """The tensors a mask may choose from: trainable, not head, not embedding by default.

    Args:
        head: names that are trained fully, outside the budget.
        embeddings: whether embedding tables are candidates too.
        include: regular expressions; where given, only matching names are kept.
        exclude: regular expressions; matching names are dropped.

    Raises:
        UsageError: a pattern is no regular expression, or matches nothing.
        ModelError: nothing is left to choose from.
    """
    barred = set(head) | (set() if embeddings else set(embedding_parameters(model)))
    trainable = [n for n, p in model.named_parameters() if p.requires_grad and p.numel()]
    names = [name for name in trainable if name not in barred]
    if include:
        names = _matching(names, include, "include")
    if exclude:
        dropped = set(_matching(names, exclude, "exclude"))
        names = [name for name in names if name not in dropped]
    if not names:
        raise ModelError(
            "No parameter is left for a mask to choose from: every trainable tensor is head, "
            "embedding or excluded. Unfreeze a part of the model, or change head, include or "
            "exclude."
        )
    return ParameterSpace.of(model, names)


def compiled(patterns: Iterable[str], what: str) -> list[re.Pattern[str]]:
    """Regular expressions, compiled: one, or several.

    Args:
        what: the setting that they are given for.

    Raises:
        UsageError: some are no regular expressions; each is named with the reason.

    Example:
        >>> [pattern.pattern for pattern in compiled(["^a", "b$"], "include")]
        ['^a', 'b$']
        >>> compiled(["a("], "include")
        Traceback (most recent call last):
        ...
        ird_search.errors.UsageError: include pattern 'a(' is no regular expression: missing ), ...
    """
    found, problems = list[re.Pattern[str]](), list[str]()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            found.append(re.compile(pattern))
        except (re.error, OverflowError, TypeError) as error:
            problems.append(
                f"{what} pattern {pattern!r} is no regular expression: {error}. A backslash before "
                "a special character makes it stand for itself."
            )
    if problems:
        raise UsageError(problems)
    return found


def _matching(names: Sequence[str], patterns: Iterable[str], what: str) -> list[str]:
    searched = compiled(patterns, what)
    problems = [
        f"{what} pattern {pattern.pattern!r} matches no trainable parameter. Names look like "
        f"{names[:3]}."
        for pattern in searched
        if not any(map(pattern.search, names))
    ]
    if problems:
        raise UsageError(problems)
    return [name for name in names if any(pattern.search(name) for pattern in searched)]
