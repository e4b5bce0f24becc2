"""`export_mask`: a mask in another library's form. `import_mask`: the mask of another format."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from ird_search.artifact import MaskFile, inspect_delta, inspect_mask, load_mask, save_mask
from ird_search.consumers.formats import (
    read_bool_mask,
    read_fish_mask,
    write_bool_mask,
    write_fish_mask,
)
from ird_search.delta import export_delta
from ird_search.errors import UsageError
from ird_search.exchange.base import base_model, facts_of
from ird_search.files import refuse_existing, written_directory
from ird_search.mask import SparseMask
from ird_search.models import quiet

Target = Literal["supertuning", "shira", "lora", "fish", "bool", "delta"]
Origin = Literal["fish", "bool", "delta"]


@dataclass(frozen=True)
class Options:
    """What single targets need to know.

    Args:
        tuned: delta: the directory of the tuned model.
        adapters: supertuning: at most so many; by default as many as leave no entry repeated.
        rank: shira: r; by default the one that comes nearest to the mask's count.
        budget: lora: its parameters; by default as many as the mask selects.
    """

    tuned: Path | None = None
    adapters: int | None = None
    rank: int | None = None
    budget: int | None = None


_OPTION_OF = {"tuned": "delta", "adapters": "supertuning", "rank": "shira", "budget": "lora"}


@dataclass(frozen=True, eq=False)
class _Source:
    """A mask, its base model, and what is trained whole beside it."""

    file: MaskFile
    model: nn.Module
    mask: SparseMask

    @property
    def dense(self) -> tuple[str, ...]:
        return self.file.head


def export_mask(
    path: Path,
    output: Path,
    *,
    to: Target,
    model: str | None = None,
    revision: str | None = None,
    options: Options = Options(),
) -> str:
    """Write a mask in another library's form, and tell what became of it.

    Args:
        to: `supertuning`, `shira`: a directory with PEFT adapters of zeros that train the mask's
            entries; `lora`: a directory with a LoRA configuration whose ranks follow the mask;
            `fish`: FISH's mask.bin; `bool`: a safetensors file of bool tensors; `delta`: what
            training made of the mask's entries, from the base and `options.tuned`.
        model: the base model: a directory or a hub id. Only `bool` does without.

    Raises:
        ArtifactError: the file is damaged, or no mask, or the model has other weights.
        ModelError: the mask is of another model.
        UsageError: an option is missing or another target's, or the output is there already.
    """
    _check_options(to, model, options)
    refuse_existing(output)
    found = inspect_mask(path)
    if to == "bool" and model is None:
        write_bool_mask(found.mask, output, head=found.head)
        return _told(found.mask, found.head)
    base = base_model(found.provenance, str(model), revision=revision)
    mask = load_mask(path, base, strict="weights_sha256" in found.provenance)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by old names
        return _EXPORTS[to](_Source(found, base, mask), output, options)


def _check_options(to: Target, model: str | None, options: Options) -> None:
    if to not in get_args(Target):
        raise UsageError(f"{to!r} is no target; known are {', '.join(get_args(Target))}.")
    problems = [
        f"--{name} is an option of --to {target}, and not of {to}."
        for name, target in _OPTION_OF.items()
        if getattr(options, name) is not None and target != to
    ]
    if to == "delta" and options.tuned is None:
        problems.append("A delta needs the tuned model, too: pass its directory (--tuned).")
    if model is None and to != "bool":
        problems.append(f"--model is missing: {to} needs the base model.")
    if problems:
        raise UsageError(problems)


def import_mask(
    path: Path, output: Path, *, kind: Origin, dense: Sequence[str] = ()
) -> tuple[SparseMask, tuple[str, ...]]:
    """Write the mask that another format holds as an `ird-mask` file.

    Args:
        kind: `fish`: FISH's mask.bin; `bool`: a safetensors file of bool tensors; `delta`: the mask
            of a delta.
        dense: fish, bool: names of tensors that are trained whole, or regular expressions.

    Raises:
        ArtifactError: the file is damaged, or is of another kind.
        UsageError: an expression matches nothing, or the output is there already.
    """
    if kind == "delta" and dense:
        raise UsageError("A delta says itself what is trained whole: leave out --dense.")
    refuse_existing(output)
    provenance: dict[str, Any] = {"imported": {"from": kind, "name": path.name}}
    if kind == "delta":
        found = inspect_delta(path)
        mask, whole = found.delta.mask, tuple(found.delta.dense)
        provenance |= facts_of(found.provenance)
    else:
        mask, whole = {"fish": read_fish_mask, "bool": read_bool_mask}[kind](path, dense=dense)
    save_mask(output, mask, provenance={**provenance, "head": list(whole)})
    return mask, whole


def _peft() -> Any:
    try:
        return import_module("ird_search.consumers.peft")
    except ModuleNotFoundError as error:
        raise UsageError(
            f"This needs peft, which is not installed ({error}): pip install 'ird_search[peft]'."
        ) from error


def _supertuning(source: _Source, output: Path, options: Options) -> str:
    convert = _peft().to_supertuning
    wrapped, coverage = convert(
        source.model, source.mask, dense=source.dense, adapters=options.adapters
    )
    repeated = (
        "Some entries are stored several times, and stock PEFT would take a step with each copy.\n"
        if coverage.stored > coverage.held
        else ""
    )
    told = (
        f"{coverage.describe()}\n{repeated}Train it with "
        f"load_supertuning(model, {str(output)!r}, is_trainable=True) of ird_search.consumers.peft."
    )
    note = _SEVERAL if coverage.adapters > 1 else ""
    return _saved(wrapped, output, "Supertuning adapter", told, note)


def _shira(source: _Source, output: Path, options: Options) -> str:
    convert = _peft().to_shira
    wrapped, coverage = convert(source.model, source.mask, dense=source.dense, r=options.rank)
    told = (
        f"{coverage.describe()}\nTrain it with "
        f"PeftModel.from_pretrained(model, {str(output)!r}, is_trainable=True)."
    )
    return _saved(wrapped, output, "SHiRA adapter", told)


_SEVERAL = """\
The adapters in the folders below this one hold a part of the mask each, and work together.
`PeftModel.from_pretrained` opens one adapter and finds none here; `load_supertuning` opens all.
For a folder that plain PEFT opens, export with `--adapters 1`: some entries are stored several
times then.
"""


def _saved(wrapped: Any, output: Path, what: str, told: str, note: str = "") -> str:
    """Write what PEFT saves, and beside it how to load it; the text for the console."""
    with written_directory(output) as place, quiet():
        wrapped.save_pretrained(place)
        _explain(place / "README.md", what, told, note)
    return told


def _explain(readme: Path, what: str, told: str, note: str = "") -> None:
    """Put what an export is in the place of PEFT's template of a model card, under its header."""
    card = readme.read_text(encoding="utf-8") if readme.exists() else ""
    header = card.split("---\n")[1] if card.startswith("---\n") else "library_name: peft\n"
    text = (
        f"---\n{header}---\n\n# {what} of an ird_search mask\n\nWritten by `ird-search export`, "
        f"and not trained yet. The base model is needed beside it.\n\n```text\n{told}\n```\n"
    )
    readme.write_text(f"{text}\n{note}" if note else text, encoding="utf-8")


def _lora(source: _Source, output: Path, options: Options) -> str:
    ranks_of = _peft().rank_pattern
    budget = options.budget or source.mask.count
    arguments, coverage = ranks_of(source.model, source.mask, budget=budget, dense=source.dense)
    told = (
        f"{coverage.describe()}\nStart it with get_peft_model(model, "
        f"LoraConfig.from_pretrained({str(output)!r}))."
    )
    return _saved(import_module("peft").LoraConfig(**arguments), output, "LoRA configuration", told)


def _fish(source: _Source, output: Path, options: Options) -> str:
    write_fish_mask(source.mask, output, source.model, dense=source.dense)
    return f"{source.mask.count:,} entries are 1 (train), and {len(source.dense)} tensors whole."


def _bool(source: _Source, output: Path, options: Options) -> str:
    write_bool_mask(source.mask, output, head=source.dense)
    return _told(source.mask, source.dense)


def _told(mask: SparseMask, head: Sequence[str]) -> str:
    left = f" The head has no tensor in it, and is noted beside: {', '.join(head)}." if head else ""
    return f"{mask.count:,} entries are True (train).{left}"


def _delta(source: _Source, output: Path, options: Options) -> str:
    provenance = source.file.provenance
    tuned = base_model(provenance, str(options.tuned))
    delta = export_delta(
        source.model,
        tuned,
        source.mask,
        output,
        dense=source.dense,
        provenance={**facts_of(provenance), "mask_sha256": source.file.sha256},
    )
    held = dict(source.model.named_parameters())
    moved = sum(
        int((held[name].detach().flatten()[index] != delta.values[name]).sum())
        for name, index in source.mask.indices.items()
    )
    return f"{delta!r}\n{moved:,} of {delta.mask.count:,} selected entries differ from the base."


_EXPORTS: dict[Target, Callable[[_Source, Path, Options], str]] = {
    "supertuning": _supertuning,
    "shira": _shira,
    "lora": _lora,
    "fish": _fish,
    "bool": _bool,
    "delta": _delta,
}
