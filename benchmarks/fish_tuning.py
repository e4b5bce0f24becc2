"""FISH-Tuning (arXiv 2504.04050) on real text: which entries of LoRA should be trained?

    python -m benchmarks.fish_tuning --model MODEL --train train.parquet --eval validation.parquet

LoRA of rank 8 is trained through masks that keep as many entries as LoRA of rank 2 has: the
largest Fisher scores with a budget for each factor, with one budget for both, at B = 0; random
ones; and the smallest ("reversed"). Beside them plain LoRA of rank 2 and of rank 8, and the head
alone. Every line tunes its learning rate alike, on one half of the evaluation rows; its loss and
accuracy come from the other half, over seeds. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from scipy import stats
from torch import Tensor, nn

from benchmarks.record import RESULTS, write_result
from ird_search.borrow import borrowed
from ird_search.budgets import Budgets
from ird_search.candidate import Candidate
from ird_search.config import DataConfig, SearchConfig
from ird_search.fisher import FisherMatrix
from ird_search.ledger import Ledger
from ird_search.mask import SparseMask
from ird_search.models import load_model
from ird_search.opening import open_fisher
from ird_search.problem import Problem, make_problem
from ird_search.proxy import Proxies
from ird_search.scoring import STEPS, ScoringPoint
from ird_search.seeds import derive
from ird_search.selection import random_subset, top_k
from ird_search.training import snapshot

TARGETS = ["query", "key", "value"]
RANK, PLAIN_RANK = 8, 2


def wrapped(path: str, rank: int, seed: int) -> tuple[nn.Module, Any]:
    """The pretrained model with LoRA of a rank, and its tokenizer."""
    loaded = load_model(
        path,
        task="classification",
        num_labels=2,
        seed=derive(seed, "fresh head"),
        dtype="float32",
        processor=None,
        need_processor=True,
        revision=None,
    )
    torch.manual_seed(derive(seed, "adapters"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        config = LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=16, target_modules=TARGETS)
        return get_peft_model(loaded.model, config), loaded.processor


def problem_of(options: argparse.Namespace, rank: int, config: SearchConfig) -> Problem:
    model, tokenizer = wrapped(options.model, rank, config.seed)
    return make_problem(
        model,
        options.train,
        eval_data=options.eval,
        options=DataConfig(limit=options.limit),
        config=config,
        processor=tokenizer,
    )


def scores(problem: Problem, config: SearchConfig, point: ScoringPoint | None) -> Tensor:
    """Mean Fisher scores over the pool: [P]."""
    pool = random_subset(
        len(problem.train), config.rows(len(problem.train)), seed=derive(config.seed, "pool")
    )
    samples = problem.train.select(pool)
    fisher: FisherMatrix = open_fisher(
        problem.model, problem.task, problem.space, samples, config, problem.device, point=point
    )
    return fisher.column_scores(torch.arange(len(samples)))


def masks(
    problem: Problem, proxies: Proxies, config: SearchConfig, count: int
) -> dict[str, Callable[[int], SparseMask]]:
    """The masks that are compared; random ones differ by seed."""
    space = problem.space
    apart, joint = Budgets.of(space), Budgets.of(space, ())
    point = ScoringPoint(snapshot(problem.model), proxies.advanced(STEPS))
    there, here = scores(problem, config, point), scores(problem, config, None)

    def fixed(coords: Tensor) -> Callable[[int], SparseMask]:
        return lambda seed: SparseMask(space, coords)

    def drawn(seed: int) -> SparseMask:
        seed = derive(config.seed, "random mask", seed)
        return SparseMask(space, random_subset(space.numel, count, seed=seed))

    return {
        "Fisher, a budget for each factor": fixed(apart.ranks(there, None, 0, count)),
        "Fisher, one budget": fixed(joint.ranks(there, None, 0, count)),
        "Fisher at B = 0": fixed(joint.ranks(here, None, 0, count)),
        "random": drawn,
        "reversed": fixed(top_k(-there, count)),
    }


def line(
    proxies: Proxies, candidate: Callable[[int], Candidate], trained: int, seeds: int
) -> dict[str, Any]:
    """One method: its best rate, then loss and accuracy on the unseen half."""
    probe = proxies.score(candidate(0))
    trials = [
        proxies.trial(candidate(s), probe.best.rate, seed=s, verdict=True)
        for s in range(1, seeds + 1)
    ]
    if failures := [t.failure for t in (probe.best, *trials) if not t.ok]:
        raise SystemExit(f"A fine-tune of {trained:,} parameters failed: {failures[0]}")
    return {
        "trained": trained,
        "rate": probe.best.rate,
        "rates": {f"{t.rate:g}": round(t.score, 4) for t in probe.trials},
        "losses": [round(t.loss, 4) for t in trials],
        "accuracies": [round(t.metrics["accuracy"], 4) for t in trials],
    }


def masked(name: str, mask: Callable[[int], SparseMask], seed: int) -> Candidate:
    return Candidate("random" if name == "random" else "ird", mask(seed))


def factors(mask: SparseMask) -> dict[str, int]:
    return {
        part: sum(i.numel() for n, i in mask.indices.items() if part in n)
        for part in ("lora_A", "lora_B")
    }


def compare(options: argparse.Namespace, config: SearchConfig) -> dict[str, Any]:
    ledger = Ledger(options.work)
    found: dict[str, Any] = {}

    def show(name: str, entry: dict[str, Any]) -> None:
        found[name] = entry
        mean = statistics.mean(entry["losses"])
        accuracy = statistics.mean(entry["accuracies"])
        print(
            f"{name:34} {entry['trained']:7,} at {entry['rate']:.1e}: {mean:.4f} {accuracy:.4f}",
            flush=True,
        )

    plain = problem_of(options, PLAIN_RANK, config)
    with borrowed(plain.model):
        proxies = Proxies(plain, config, ledger)
        proxies.warm_up()
        count = plain.space.numel
        show(
            f"LoRA, rank {PLAIN_RANK}",
            line(proxies, lambda s: proxies.full(), count, options.seeds),
        )
    problem = problem_of(options, RANK, config)
    with borrowed(problem.model):
        proxies = Proxies(problem, config, ledger)
        proxies.warm_up()
        for name, mask in masks(problem, proxies, config, count).items():
            entry = line(proxies, partial(masked, name, mask), mask(0).count, options.seeds)
            show(name, {**entry, **factors(mask(0))})
        show(
            f"LoRA, rank {RANK}",
            line(proxies, lambda s: proxies.full(), problem.space.numel, options.seeds),
        )
        show("head only", line(proxies, lambda s: proxies.head_only(), 0, options.seeds))
    return found


def against(found: dict[str, Any], name: str, other: str) -> dict[str, float]:
    """How much lower the loss is, paired by seed, with the half width of a 95% interval."""
    pairs = zip(found[name]["losses"], found[other]["losses"], strict=True)
    gains = [b - a for a, b in pairs]
    width = stats.t.ppf(0.975, len(gains) - 1) * statistics.stdev(gains) / len(gains) ** 0.5
    return {"gain": round(statistics.mean(gains), 4), "half_width": round(float(width), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="a model directory or hub id")
    parser.add_argument("--train", required=True, help="training rows of two classes")
    parser.add_argument("--eval", required=True, help="evaluation rows")
    parser.add_argument("--limit", type=int, default=5000, help="training rows that are used")
    parser.add_argument("--steps", type=int, default=120, help="steps of a fine-tune")
    parser.add_argument("--seeds", type=int, default=4, help="seeds of the verdict, at least 2")
    parser.add_argument("--work", type=Path, default=Path("runs/fish_tuning"), help="ledger")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds must be at least 2: the intervals are over seeds")
    torch.set_num_threads(options.threads)
    config = SearchConfig(proxy_steps=options.steps, eval_samples=872, head=None)
    found = compare(options, config)
    first = "Fisher, a budget for each factor"
    others = [name for name in found if name != first]
    result = {
        "targets": TARGETS,
        "rank": RANK,
        "steps": options.steps,
        "batch": config.batch_size,
        "train": options.limit,
        "seeds": options.seeds,
        "methods": found,
        "first_against": {name: against(found, first, name) for name in others},
    }
    print(f"written to {write_result('fish_tuning', result, options.output)}")


if __name__ == "__main__":
    main()
