"""Damaged, hostile and foreign files: what is not a sound mask of this model is refused."""

from __future__ import annotations

import os
import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from typer.testing import CliRunner

from benchmarks.faults import Row
from benchmarks.faults.count import Count, ends, unlike
from benchmarks.faults.fuzz import BYTES, Mutation, flip, fuzz
from benchmarks.faults.hostile import DEAREST, HOSTILE, hostile_files
from benchmarks.faults.traps import canaries
from ird_search.artifact import Delta, load_delta, load_mask, save_delta, save_mask, weights_sha256
from ird_search.cli import app
from ird_search.consumers.formats import read_bool_mask, read_fish_mask, write_bool_mask
from ird_search.errors import IRDError
from ird_search.mask import SparseMask
from ird_search.merge import merge_delta
from ird_search.parameters import ParameterSpace
from tests.artifacts import KINDS, PROVENANCE
from tests.tiny import tiny_bert, tiny_gpt2


def campaign() -> list[Row]:
    """All of it: three minutes."""
    with TemporaryDirectory() as folder:
        place = Path(folder)
        return [
            cuts(place),
            damages("a byte changed at random", 10_000, (flip,), place),
            damages("bits flipped, blocks moved, lost, put in or overwritten", 3_000, BYTES, place),
            other_formats(place),
            hostile_files(place),
            hostile_files(place, DEAREST, "files at the limits, wrong in the last bit", 3.0),
            fuzzed(seconds=60),
            other_models(place),
            canaries(place),
            on_the_command_line(place),
        ]


# --- damage -------------------------------------------------------------------------------------


def cuts(place: Path, every: int = 1) -> Row:
    """A mask and a delta, cut at every byte."""
    count = Count()
    for noun, kind in KINDS.items():
        file = place / f"cut-{noun}"
        kind.save(file, PROVENANCE)
        for length in reversed(range(0, file.stat().st_size, every)):
            os.truncate(file, length)
            count.add(f"{noun} of {length} bytes", unlike(lambda k=kind, f=file: k.load(f)))
    return count.row("a mask or delta cut at any byte", "refused")


def damages(fault: str, each: int, mutations: Sequence[Mutation], place: Path) -> Row:
    """A mask and a delta, each changed so many times."""
    count, rng = Count(), random.Random(0)
    for noun, kind in KINDS.items():
        file = place / f"damaged-{noun}"
        kind.save(file, PROVENANCE)
        sound = file.read_bytes()
        for _ in range(each):
            mutation = rng.choice(mutations)
            data = mutation(sound, rng)
            if data == sound:
                continue
            file.write_bytes(data)
            count.add(f"{noun}, {mutation.__name__}", unlike(lambda k=kind, f=file: k.load(f)))
    return count.row(f"a mask or delta with {fault}", "refused")


def other_formats(place: Path, each: int = 1_000) -> Row:
    """Masks of other tools, which hold no hash: what is damaged may pass, if it is a mask."""
    count, rng, file = Count(), random.Random(0), place / "other-format"
    mask = SparseMask(ParameterSpace(("a", "b"), ((4, 50), (7,))), torch.arange(0, 207, 9))
    tensors = {name: t.float() for name, t in mask.to_dict().items()}
    writers: dict[str, tuple[Callable[[], object], Callable[[Path], object]]] = {
        "bool": (lambda: write_bool_mask(mask, file), read_bool_mask),
        "fish": (lambda: torch.save(tensors, file), read_fish_mask),
        "former fish": (
            lambda: torch.save(tensors, file, _use_new_zipfile_serialization=False),
            read_fish_mask,
        ),
    }
    for name, (write, read) in writers.items():
        write()
        sound = file.read_bytes()
        for _ in range(each):
            mutation = rng.choice(BYTES)
            file.write_bytes(mutation(sound, rng))
            count.add(f"{name}, {mutation.__name__}", ends(lambda r=read: r(file)))
    return count.row(
        "a mask of another format with bits flipped, blocks moved, lost, put in or overwritten",
        "refused, or a mask of zeros and ones",
    )


def fuzzed(*, seconds: float = 1e9, executions: int = 10**12) -> Row:
    """The fuzzer, for so long or so often."""
    start = time.monotonic()
    found = fuzz(seconds=seconds, executions=executions)
    return Row(
        "forged files, by a fuzzer that follows the reader's coverage",
        "refused as promised, or canonical",
        found.executions,
        found.executions - found.wrong.total(),
        {
            "accepted": found.accepted,
            "arcs": len(found.arcs),
            "seconds": time.monotonic() - start,
        },
        tuple(f"{count} × {text}" for text, count in found.wrong.most_common(10)),
    )


# --- masks of other models ----------------------------------------------------------------------


@dataclass(frozen=True)
class Pairing:
    """A model that a mask was made on, another, and how the error tells them apart."""

    made_on: Callable[[], nn.Module]
    here: Callable[[], nn.Module]
    words: tuple[str, ...]
    is_strict: bool = False


class Around(nn.Module):
    """A model under another name."""

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        self.add_module(name, model)


def _adapted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"]))


def _retrained() -> nn.Module:
    model = tiny_bert()
    with torch.no_grad():
        model.bert.pooler.dense.bias[3] += 1e-7
    return model


PAIRINGS = {
    "a wider model": Pairing(
        tiny_bert,
        lambda: tiny_bert(hidden_size=32),
        ("another size", "word_embeddings.weight is [34, 32], not [34, 16]"),
    ),
    "fewer layers": Pairing(
        lambda: tiny_bert(num_hidden_layers=3),
        tiny_bert,
        ("fewer layers", "bert.encoder.layer.2.attention.self.query.weight [16, 16] is missing"),
    ),
    "another number of classes": Pairing(
        tiny_bert, lambda: tiny_bert(5), ("or head", "classifier.weight is [5, 16], not [2, 16]")
    ),
    "wrapped by PEFT": Pairing(tiny_bert, _adapted, ("wrapped by PEFT", "'base_model.model.'")),
    "wrapped by DataParallel": Pairing(
        tiny_bert, lambda: nn.DataParallel(tiny_bert()), ("DataParallel", "'module.'")
    ),
    "wrapped by torch.compile": Pairing(
        tiny_bert, lambda: torch.compile(tiny_bert()), ("torch.compile", "'_orig_mod.'")
    ),
    "the base model without its task head": Pairing(
        tiny_bert, lambda: tiny_bert().bert, ("one of the two holds the other", "'bert.'")
    ),
    "renamed, as by a major version of transformers": Pairing(
        lambda: Around("encoder", tiny_bert()),
        lambda: Around("layers", tiny_bert()),
        ("renamed tensors: 'encoder.' is 'layers.' here",),
    ),
    "tied weights": Pairing(
        lambda: tiny_gpt2(tie_word_embeddings=False), tiny_gpt2, ("tied weights", "lm_head.weight")
    ),
    "another architecture": Pairing(
        tiny_bert, tiny_gpt2, ("another architecture", "query.weight [16, 16] is missing")
    ),
    "another revision: the same names, one weight of another value": Pairing(
        tiny_bert,
        _retrained,
        ("The model's weights", "same base model and revision"),
        is_strict=True,
    ),
    "another dtype": Pairing(
        tiny_bert, lambda: tiny_bert().bfloat16(), ("bfloat16", "same"), is_strict=True
    ),
}


def other_models(place: Path) -> Row:
    """Masks and deltas with a model that is not theirs."""
    count = Count()
    for name, pairing in PAIRINGS.items():
        made_on, here = pairing.made_on(), pairing.here()
        space = ParameterSpace.of(made_on)
        mask = SparseMask(space, torch.arange(0, space.numel, 97))
        base = weights_sha256(made_on)
        values = {n: torch.zeros(index.numel()) for n, index in mask.indices.items()}
        save_mask(place / "other-mask", mask, provenance={"weights_sha256": base})
        save_delta(place / "other-delta", Delta(mask, values, {}, base))
        before = deepcopy(here.state_dict()) if pairing.is_strict else {}
        doors: list[Callable[[], object]] = [
            lambda m=here, p=pairing: load_mask(place / "other-mask", m, strict=p.is_strict),
            lambda m=here, p=pairing: _merged(place / "other-delta", m, p.is_strict),
        ]
        for noun, door in zip(("mask", "delta"), doors, strict=True):
            count.add(f"{noun}, {name}", unlike(door, *pairing.words, error=IRDError))
        if any(not torch.equal(t, here.state_dict()[n]) for n, t in before.items()):
            count.failures.append(f"{name}: the refused model has changed")
    return count.row(
        f"a mask and a delta of another model, {len(PAIRINGS)} pairings",
        "refused, the difference named",
    )


def _merged(path: Path, model: nn.Module, is_strict: bool) -> object:
    return merge_delta(model, load_delta(path)) if is_strict else load_delta(path, model)


# --- the command line ---------------------------------------------------------------------------


def commands(file: Path, sound: Path, output: Path) -> Mapping[str, list[Any]]:
    """The commands that read a mask or a delta, each given this file."""
    into = ["-o", output]
    return {
        "inspect": ["inspect", file],
        "inspect --json": ["inspect", file, "--json"],
        "compare": ["compare", sound, file],
        "merge": ["merge", sound, file, *into],
        "merge --model": ["merge", file, "--model", "no-model", *into],
        "export": ["export", file, "--to", "bool", *into],
        "import --from delta": ["import", file, "--from", "delta", *into],
        "import --from bool": ["import", file, "--from", "bool", *into],
        "import --from fish": ["import", file, "--from", "fish", *into],
    }


BRIEFLY = (
    "header: length 2^63",
    "header: 100k-deep list",
    "header: not UTF-8",
    "a key twice",
    "a lone surrogate for a name",
    "a name of 5 MB",
    "provenance 900 deep",
    "a pipe",
    "a link to itself",
    "torch.save as before 1.6",
    "a web page",
)
"""Hostile files for the command line, a moment each."""


def on_the_command_line(place: Path, names: Sequence[str] = BRIEFLY) -> Row:
    """Every command that reads a file, each with hostile ones."""
    count, output = Count(), place / "output"
    sound = place / "sound.safetensors"
    KINDS["mask"].save(sound, {})
    for noun, kind in KINDS.items():
        for number, name in enumerate(names):
            file = place / f"said-{noun}-{number}"
            HOSTILE[name](file, kind)
            for command, words in commands(file, sound, output).items():
                if command == "import --from fish" and name.startswith("torch.save"):
                    continue  # which is what it reads
                count.add(f"{command}, {noun}, {name}", _badly_told(words, output))
    return count.row(
        "hostile files on the command line",
        "exit code 5, one message, nothing written",
    )


def _badly_told(words: Sequence[Any], output: Path) -> str:
    """What is wrong with how a command refuses a file; empty for nothing."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    told = result.stderr
    wrong = {
        f"exit code {result.exit_code}, {result.exception!r}": result.exit_code != 5,
        f"standard output {result.stdout!r}": result.stdout,
        f"told {told[:200]!r}": not told.startswith("ird-search: ") or "Traceback" in told,
        f"told {len(told)} characters": len(told) > 1_000,
        "control characters in what it told": not told.replace("\n", "").isprintable(),
        "something was written": output.exists(),
    }
    output.unlink(missing_ok=True)
    return "; ".join(text for text, is_so in wrong.items() if is_so)
