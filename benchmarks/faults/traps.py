"""Pickles and code in every place where a user could hand over a file; none may be run."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch

from benchmarks.faults import Row
from benchmarks.faults.count import Count, ends, unlike
from ird_search.artifact import inspect_file, load_delta, load_mask
from ird_search.consumers.peft import load_supertuning
from ird_search.data.sources import read_source
from ird_search.errors import IRDError
from ird_search.exchange import import_mask
from ird_search.exchange.base import base_model
from ird_search.models import load_model
from ird_search.rundir import read_config
from tests.tiny import save_tiny_bert, tiny_bert, tiny_vit


class Trap:
    """Who unpickles it makes the file `canary`."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.canary,)


def code(canary: Path) -> str:
    """Who runs it makes the file `canary`."""
    return f"from pathlib import Path\nPath({str(canary)!r}).touch()\n"


def pickles(canary: Path) -> dict[str, bytes]:
    """A trap in each way that a pickle is stored."""
    tensors = {"w": torch.ones(3), "trap": Trap(canary)}
    streams = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(tensors, streams[0])
    torch.save(tensors, streams[1], _use_new_zipfile_serialization=False)
    np.save(streams[2], np.array([Trap(canary)], dtype=object), allow_pickle=True)
    names = "torch.save", "former torch.save", "an npy of objects"
    return {
        **{name: stream.getvalue() for name, stream in zip(names, streams, strict=True)},
        "pickle": pickle.dumps(tensors),
        "pickle as text": pickle.dumps(tensors, protocol=0),
    }


Attempt = tuple[Callable[[], object], tuple[str, ...] | None]
"""A call that is given a trap, and the words of its error; None where it may succeed without."""


def attempts(folder: Path, canary: Path) -> Iterator[tuple[str, Attempt]]:
    """Every place where a user could hand over a file."""
    stored = pickles(canary)
    for name, data in stored.items():
        file = folder / f"{name.replace(' ', '-')}.bin"
        file.write_bytes(data)
        yield from _as_masks(name, file, folder)
        yield from _as_rows(name, data, folder)
    yield from _as_models(folder, stored["torch.save"], code(canary))
    yield from _as_data(folder, canary)
    yield from _as_settings(folder, canary)


def _as_masks(name: str, file: Path, folder: Path) -> Iterator[tuple[str, Attempt]]:
    for kind in ("fish", "bool"):
        call = lambda k=kind: import_mask(file, folder / "imported", kind=k)  # noqa: E731
        yield f"import --from {kind}: {name}", (call, ("dict of tensors", "was not run"))
    readers: Sequence[Callable[[Path], object]] = (load_mask, load_delta, inspect_file)
    for read in readers:
        yield f"{read.__name__}: {name}", (lambda r=read: r(file), ("no safetensors file",))


def _as_rows(name: str, data: bytes, folder: Path) -> Iterator[tuple[str, Attempt]]:
    for suffix in ("pkl", "npy", "npz", "bin", "csv", "tsv", "json", "jsonl", "parquet"):
        file = folder / f"{name.replace(' ', '-')}-rows.{suffix}"
        file.write_bytes(data)
        is_text = name == "pickle as text" and suffix in ("csv", "tsv")  # lines, as any others
        words = None if is_text else (file.name,)
        yield f"--data x.{suffix}: {name}", (lambda f=file: read_source(f), words)


def _as_models(folder: Path, trap: bytes, text: str) -> Iterator[tuple[str, Attempt]]:
    def directory(name: str) -> Path:
        place = save_tiny_bert(folder / name)
        (place / "evil.py").write_text(text)
        return place

    def changed(file: Path, **settings: Any) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))

    def both(place: Path, *words: str) -> Iterator[tuple[str, Attempt]]:
        load = lambda: load_model(place, task="classification")  # noqa: E731
        yield f"--model: {place.name}", (load, words or None)
        base = lambda: base_model({}, str(place))  # noqa: E731
        yield f"--tuned: {place.name}", (base, words[:1] or None)

    place = directory("pytorch_model.bin alone")
    (place / "model.safetensors").rename(place / "away")
    (place / "pytorch_model.bin").write_bytes(trap)
    yield from both(place, "model.safetensors", "save the model again")
    place = directory("an index that names a pickle")
    (place / "model.safetensors").rename(place / "away")
    (place / "evil.bin").write_bytes(trap)
    names = {"metadata": {"total_size": 1}, "weight_map": {"classifier.bias": "evil.bin"}}
    (place / "model.safetensors.index.json").write_text(json.dumps(names))
    yield from both(place, place.name)
    place = directory("a pickle called model.safetensors")
    (place / "model.safetensors").write_bytes(trap)
    yield from both(place, place.name)
    own = dict.fromkeys(("AutoConfig", "AutoModelForSequenceClassification"), "evil.Evil")
    place = directory("code for a known model type")
    changed(place / "config.json", auto_map=own)
    yield from both(place)
    place = directory("code for an unknown model type")
    changed(place / "config.json", auto_map=own, model_type="evil")
    yield from both(place, "code")
    place = directory("code for the tokenizer")
    tokenizer = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    changed(place / "tokenizer_config.json", auto_map=tokenizer, tokenizer_class="Evil")
    yield from both(place)
    tiny_vit().save_pretrained(images := folder / "code for the image processor")
    processor = {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Evil"}}
    (images / "preprocessor_config.json").write_text(json.dumps(processor))
    (images / "evil.py").write_text(text)
    load_images = lambda: load_model(images, task="image-classification")  # noqa: E731
    yield f"--model: {images.name}", (load_images, ("Pass one as `processor`",))
    (adapter := folder / "adapter_model.bin").mkdir()
    (adapter / "adapter_model.bin").write_bytes(trap)
    library = {"base_model_class": "Evil", "parent_library": "evil"}
    settings = {"peft_type": "SUPERTUNING", "target_modules": ["query"], "auto_mapping": library}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    words = ("damaged adapter", "save it anew")
    yield (
        "load_supertuning: adapter_model.bin",
        (
            lambda: load_supertuning(tiny_bert(), adapter),
            words,
        ),
    )
    load = lambda: load_model(adapter, task="classification")  # noqa: E731
    yield "--model: an adapter", (load, ("PEFT adapter, not a whole model",))


def _as_data(folder: Path, canary: Path) -> Iterator[tuple[str, Attempt]]:
    for name in ("a loading script", "a loading script beside rows"):
        (place := folder / name).mkdir()
        (place / f"{name}.py").write_text(code(canary))
        if name.endswith("rows"):
            (place / "train.csv").write_text("text,label\na film,1\na book,0\n")
        words = None if name.endswith("rows") else ("holds no split",)
        yield f"--data: {name}", (lambda p=place: read_source(p), words)
        file = place / f"{name}.py"
        yield f"--data: {file.name}", (lambda f=file: read_source(f), ("no accepted format",))
    extension = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Trap(canary)),
    }
    schema = pa.schema([pa.field("text", pa.string(), metadata=extension), ("label", pa.int64())])
    table = pa.table([pa.array(["a", "b"]), pa.array([0, 1])], schema=schema)
    pyarrow.parquet.write_table(table, folder / "extension.parquet")
    read = lambda: read_source(folder / "extension.parquet")  # noqa: E731
    yield "--data: a pickled type in parquet", (read, None)


def _as_settings(folder: Path, canary: Path) -> Iterator[tuple[str, Attempt]]:
    file, tag = folder / "config.yaml", "!!python/object/apply:pathlib.Path"
    file.write_text(f"model: {tag}.touch [{tag} [{str(canary)!r}]]\n")
    yield "--config: a YAML tag", (lambda: read_config(file), ("is no YAML",))


def canaries(place: Path) -> Row:
    """Traps in every place; none may go off, and every refusal must say what to do."""
    count, went_off = Count(), 0
    (folder := place / "canaries").mkdir()
    canary = folder / "canary"
    with _quiet():
        for name, (call, words) in attempts(folder, canary):
            problem = ends(call) if words is None else unlike(call, *words, error=IRDError)
            if canary.exists():
                went_off += 1
                problem = "the code was run"
                canary.unlink()
            count.add(name, problem)
    return count.row(
        "pickles and code in files and directories that are handed over",
        "never run; refused with a way out, or left aside",
        {"executions": went_off},
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
