"""A search that takes a second: a BERT of five thousand parameters on thirty rows of text."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from benchmarks.faults.runner import Runner

WORDS = "the film is good bad a fine story dull long short and not very it was".split()  # noqa: SIM905
OPTIONS = {
    "density": "0.02",
    "pool": "16",
    "min-samples": "4",
    "rounds": "2",
    "warmup-steps": "1",
    "proxy-steps": "1",
    "batch-size": "8",
    "learning-rate": "0.01",
    "seeds": "1",
    "controls": "random",
    "vary": "skip",
    "bootstraps": "2",
    "device": "cpu",
    "record-seconds": "0",
    "fisher-tokens": "32",
}


@dataclass(frozen=True)
class Bench:
    """What most campaigns work with.

    Args:
        place: holds `model` and `rows.csv`.
        whole: the directory of a run that nothing disturbed.
        seconds: what such a run takes.
    """

    place: Path
    runner: Runner
    whole: Path
    seconds: float


@contextmanager
def bench() -> Iterator[Bench]:
    """A tiny problem, a warm process, and what it gives when nothing goes wrong."""
    with tiny_problem() as place, Runner(place / "model") as runner:
        ended = [runner.run(command(place, place / name)) for name in ("whole", "again")]
        if any(end.code for end in ended) or same_files(place / "again", place / "whole"):
            raise RuntimeError(f"An undisturbed run fails: {ended[0].err}")
        yield Bench(place, runner, place / "whole", ended[1].seconds)  # the first is slower


@contextmanager
def tiny_problem() -> Iterator[Path]:
    """A directory with `model` and `rows.csv`."""
    with TemporaryDirectory() as folder:
        place = Path(folder)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = BertForSequenceClassification(
                BertConfig(
                    vocab_size=len(WORDS) + 2,
                    hidden_size=16,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    intermediate_size=32,
                    max_position_embeddings=32,
                )
            )
        model.save_pretrained(place / "model")
        vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
        tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = Whitespace()
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
        )
        wrapped.save_pretrained(place / "model")
        with (place / "rows.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for i in range(40):
                text = " ".join(WORDS[(i * j) % len(WORDS)] for j in range(2, 4 + i % 9))
                writer.writerow([text, (i * i) % 3 % 2])
        yield place


def command(place: Path, output: Path, **changes: str) -> list[str]:
    """`ird-search run` on it."""
    options = {
        "model": str(place / "model"),
        "data": str(place / "rows.csv"),
        "output": str(output),
        **OPTIONS,
        **{name.replace("_", "-"): value for name, value in changes.items()},
    }
    return ["run", *(word for name, value in options.items() for word in (f"--{name}", value))]


def left_over(output: Path) -> list[str]:
    """Names of files that a finished run must not hold."""
    found = [str(p.relative_to(output)) for p in output.rglob("*")]
    return [name for name in found if name.endswith(".tmp") or "/fisher-" in name]


def same_files(one: Path, other: Path) -> list[str]:
    """Which of the results differ; a missing one does."""
    names = ("mask.safetensors", "rounds.jsonl", "report.md")
    return [n for n in names if _bytes(one / n) is None or _bytes(one / n) != _bytes(other / n)]


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if os.path.exists(path) else None
