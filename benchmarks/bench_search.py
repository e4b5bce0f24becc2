"""What a whole search costs beside the passes that it needs.

    python -m benchmarks.bench_search --threads 1 --tokens 32

A BERT of MiniLM's shape with random weights learns two classes of random tokens: a search of about
twenty proxies as `search_mask` does it, with its run directory, its verdict and its report. Its
time is parted into what the model computes (forward, backward and optimizer steps of fine-tunes,
forward passes of evaluations, everything F is asked for) and the rest: batches, snapshots,
selection, statistics, the ledger's files.

Then the batches that went through the model are passed through it once more, with nothing around:
forward and backward for those that were trained on, forward for the others, and forward and
backward once for the pool. CPU time is the fairer one on a shared machine.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from benchmarks.record import RESULTS, write_result
from benchmarks.ways import minilm
from ird_search import opening, search_mask
from ird_search.fisher import FisherMatrix

SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "rounds": 2,
    "patience": 1,
    "controls": ("random", "fish"),
    "seeds": 1,
    "eval_samples": 256,
    "pool": 64,
}
FISHER = ("column_moments", "column_scores", "resampled", "row_scores", "marginals")


class Time(NamedTuple):
    """Seconds on the wall and of the CPU."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Time:
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: Time) -> Time:
        return Time(self.wall - start.wall, self.cpu - start.cpu)


@dataclass
class Meter:
    """Time within the model's computation by its part, and the batches that went through.

    What is nested in something that is timed belongs to the outer one.
    """

    parts: dict[str, list[Time]] = field(default_factory=lambda: defaultdict(list))
    batches: list[tuple[dict[str, Tensor], bool]] = field(default_factory=list)
    _inside: list[tuple[str, Time]] = field(default_factory=list)

    def begin(self, part: str) -> None:
        self._inside.append((part, Time.now()))

    def end(self) -> None:
        part, start = self._inside.pop()
        if not self._inside:
            self.parts[part].append(Time.now().since(start))

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        self.begin(part)
        try:
            yield
        finally:
            self.end()

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time taken."""

        @functools.wraps(call)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if part == "forward" and not self._inside:
                self.batches.append((kwargs, torch.is_grad_enabled()))
            with self.timing(part):
                return call(*args, **kwargs)

        return wrapped

    def total(self, part: str) -> Time:
        times = self.parts[part]
        return Time(sum(t.wall for t in times), sum(t.cpu for t in times))

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Within the block all that the model computes is timed."""
        kind = type(model)
        named: list[tuple[Any, str, str]] = [(FisherMatrix, name, "fisher") for name in FISHER]
        named += [(opening, "make_engine", "fisher"), (kind, "forward", "forward")]
        named += [(Tensor, "backward", "backward")]
        with ExitStack() as stack:
            for owner, name, part in named:
                call = self.timed(part, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, call))
            before = register_optimizer_step_pre_hook(lambda *_: self.begin("optimizer"))
            stack.callback(before.remove)
            after = register_optimizer_step_post_hook(lambda *_: self.end())
            stack.callback(after.remove)
            yield


def rows(count: int, tokens: int, seed: int) -> list[dict[str, Any]]:
    """Random tokens with random classes."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(30522, (count, tokens), generator=generator).tolist()
    return [{"input_ids": row, "label": i % 2} for i, row in enumerate(ids)]


def bare(model: nn.Module, batches: list[tuple[dict[str, Tensor], bool]]) -> None:
    """Each batch once more, forward and, where it was trained on, backward."""
    for inputs, trained in batches:
        with torch.set_grad_enabled(trained):
            logits = model(**inputs).logits
        if trained:
            labels = torch.zeros(len(logits), dtype=torch.int64)
            nn.functional.cross_entropy(logits, labels).backward()
            model.zero_grad(set_to_none=True)


def measured(*, tokens: int, steps: int) -> dict[str, Any]:
    model, meter = minilm(), Meter()
    train, held = rows(2000, tokens, 1), rows(SETTINGS["eval_samples"], tokens, 2)
    with tempfile.TemporaryDirectory() as folder, meter.watching(model):
        start = Time.now()
        result = search_mask(
            model,
            train,
            eval_data=held,
            output=Path(folder) / "run",
            proxy_steps=steps,
            device="cpu",
            **SETTINGS,
        )
        whole = Time.now().since(start)
    parts = {part: meter.total(part) for part in meter.parts}
    inside = Time(sum(t.wall for t in parts.values()), sum(t.cpu for t in parts.values()))
    ids = torch.tensor([row["input_ids"] for row in train[: SETTINGS["pool"]]])
    pool = [({"input_ids": x, "attention_mask": torch.ones_like(x)}, True) for x in ids.split(16)]
    start = Time.now()
    bare(model, meter.batches + pool)
    passes = Time.now().since(start)
    proxies = [s for r in result.rounds for s in r.nominated]
    return {
        "tokens": tokens,
        "proxy_steps": steps,
        "settings": {**SETTINGS, "controls": list(SETTINGS["controls"])},
        "proxies": len(proxies),
        "training_steps": len(meter.parts["optimizer"]),
        "seconds": {name: _told(t) for name, t in {"whole": whole, **parts}.items()},
        "bare_passes": _told(passes),
        "outside_share": _told(
            Time(1 - inside.wall / whole.wall, 1 - inside.cpu / whole.cpu), digits=4
        ),
        "search_to_bare": _told(Time(whole.wall / passes.wall, whole.cpu / passes.cpu), digits=3),
    }


def _told(t: Time, digits: int = 2) -> dict[str, float]:
    return {"wall": round(t.wall, digits), "cpu": round(t.cpu, digits)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--tokens", type=int, default=32, help="of each sample")
    parser.add_argument("--steps", type=int, default=40, help="of a proxy")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measured(tokens=options.tokens, steps=options.steps)
    for name, value in found.items():
        print(f"{name:16} {value}")
    result = {"model": "BERT, MiniLM-L6 shape", "threads": options.threads, **found}
    print(f"written to {write_result('search', result, options.output)}")


if __name__ == "__main__":
    main()
