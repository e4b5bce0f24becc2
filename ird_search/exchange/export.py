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
from ird_search.exchange.base import base_model, facts_of, model_of_config, refuse_existing
from ird_search.files import written_directory
from ird_search.mask import SparseMask
from ird_search.models import LoadedModel, quiet

Target = Literal["supertuning", "shira", "lora", "fish", "bool", "delta"]
Origin = Literal["fish", "bool", "delta"]


@dataclass(frozen=True)
class Options:
    """What single targets need to know.

    Args:
        tuned: delta: the directory of the tuned model.
        adapters: supertuning: at most so many adapters, 0 for as many as leave no repeat.
        rank: shira: r; by default the one that comes nearest to the mask's count.
        budget: lora: its parameters; by default as many as the mask selects.
    """

    tuned: Path | None = None
    adapters: int = 1
    rank: int | None = None
    budget: int | None = None


@dataclass(frozen=True, eq=False)
class _Source:
    """A mask, its base model, and what is trained whole beside it."""

    file: MaskFile
    loaded: LoadedModel
    mask: SparseMask
    dense: tuple[str, ...]

    @property
    def model(self) -> nn.Module:
        return self.loaded.model


def export_mask(
    path: Path,
    output: Path,
    *,
    to: Target,
    model: str,
    revision: str | None = None,
    options: Options = Options(),
) -> str:
    """Write a mask in another library's form, and tell what became of it.

    Args:
        to: `supertuning`, `shira`: a directory with PEFT adapters of zeros that train the mask's
            entries; `lora`: a directory with a LoRA configuration whose ranks follow the mask;
            `fish`: FISH's mask.bin; `bool`: a safetensors file of bool tensors; `delta`: what
            training made of the mask's entries, from the base and `options.tuned`.
        model: the base model: a directory or a hub id.

    Raises:
        ArtifactError: the file is damaged, or no mask.
        ModelError: the mask is of another model, or of other weights.
        UsageError: an option is missing, or the output is there already.
    """
    if to not in get_args(Target):
        raise UsageError(f"{to!r} is no target; known are {', '.join(get_args(Target))}.")
    if to == "delta" and options.tuned is None:
        raise UsageError("A delta needs the tuned model, too: pass its directory (--tuned).")
    refuse_existing(output)
    found = inspect_mask(path)
    loaded = base_model(found.provenance, model, revision=revision)
    recorded = "weights_sha256" in found.provenance
    mask = load_mask(path, loaded.model, strict=recorded)
    dense = tuple(found.provenance.get("head") or ())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by old names
        return _EXPORTS[to](_Source(found, loaded, mask, dense), output, options)


def import_mask(
    path: Path,
    output: Path,
    *,
    kind: Origin,
    model: str | None = None,
    revision: str | None = None,
    dense: Sequence[str] = (),
) -> tuple[SparseMask, tuple[str, ...]]:
    """Write the mask that another format holds as an `ird-mask` file.

    Args:
        kind: `fish`: FISH's mask.bin; `bool`: a safetensors file of bool tensors; `delta`: the mask
            of a delta.
        model: FISH: the base model, whose order of tensors and names the mask takes.
        dense: fish, bool: regular expressions for the tensors that were trained whole.

    Raises:
        ArtifactError: the file is damaged, or is of another kind.
        UsageError: the tensors do not fit the model, or the output is there already.
    """
    refuse_existing(output)
    provenance: dict[str, Any] = {"imported": {"from": kind, "name": path.name}}
    if kind == "delta":
        found = inspect_delta(path)
        mask, whole = found.delta.mask, tuple(found.delta.dense)
        provenance |= facts_of(found.provenance)
    else:
        read = {"fish": read_fish_mask, "bool": read_bool_mask}[kind]
        module = None if model is None else model_of_config(model, revision)
        mask, whole = read(path, module, dense=dense)
    save_mask(output, mask, provenance={**provenance, "head": list(whole)})
    return mask, whole


def _supertuning(source: _Source, output: Path, options: Options) -> str:
    convert = import_module("ird_search.consumers.peft").to_supertuning
    adapters = options.adapters or None
    wrapped, coverage = convert(source.model, source.mask, dense=source.dense, adapters=adapters)
    return _saved(wrapped, coverage, output)


def _shira(source: _Source, output: Path, options: Options) -> str:
    convert = import_module("ird_search.consumers.peft").to_shira
    wrapped, coverage = convert(source.model, source.mask, dense=source.dense, r=options.rank)
    return _saved(wrapped, coverage, output)


def _saved(wrapped: Any, coverage: Any, output: Path) -> str:
    with written_directory(output) as place, quiet():
        wrapped.save_pretrained(place)
    return str(coverage.describe())


def _lora(source: _Source, output: Path, options: Options) -> str:
    ranks_of = import_module("ird_search.consumers.peft").rank_pattern
    budget = options.budget or source.mask.count
    arguments, coverage = ranks_of(source.model, source.mask, budget=budget, dense=source.dense)
    with written_directory(output) as place:
        import_module("peft").LoraConfig(**arguments).save_pretrained(place)
    return str(coverage.describe())


def _fish(source: _Source, output: Path, options: Options) -> str:
    write_fish_mask(source.mask, output, source.model, dense=source.dense)
    return f"{source.mask.count:,} entries are 1 (train), and {len(source.dense)} tensors whole."


def _bool(source: _Source, output: Path, options: Options) -> str:
    write_bool_mask(source.mask, output)
    return f"{source.mask.count:,} entries are True (train)."


def _delta(source: _Source, output: Path, options: Options) -> str:
    provenance = source.file.provenance
    tuned = base_model(provenance, str(options.tuned))
    seed = {"search": {"seed": (provenance.get("search") or {}).get("seed", 0)}}
    delta = export_delta(
        source.model,
        tuned.model,
        source.mask,
        output,
        dense=source.dense,
        provenance={**facts_of(provenance), **seed, "mask_sha256": source.file.sha256},
    )
    return repr(delta)


_EXPORTS: dict[Target, Callable[[_Source, Path, Options], str]] = {
    "supertuning": _supertuning,
    "shira": _shira,
    "lora": _lora,
    "fish": _fish,
    "bool": _bool,
    "delta": _delta,
}
