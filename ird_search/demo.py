"""The embedded example: a real search that needs no network.

A vision transformer of 135 thousand parameters is pretrained on the digits 0-4 of scikit-learn's
8 × 8 images; then a mask is searched for telling the digits 5-9 apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from ird_search.api import SearchResult, search_mask
from ird_search.batches import training_batches
from ird_search.borrow import borrowed
from ird_search.errors import UsageError
from ird_search.evaluation import evaluate
from ird_search.progress import Progress
from ird_search.samples import SampleSet
from ird_search.seeds import derive
from ird_search.selection import random_subset
from ird_search.task import Classification
from ird_search.training import finetune

try:
    from sklearn.datasets import load_digits
except ImportError:  # an extra: nothing else needs scikit-learn
    load_digits = None

PRETRAIN_STEPS = 400
HELD_OUT = 400
"""Of the 896 images of 5-9: 200 choose, 200 give the verdict."""
SETTINGS: dict[str, Any] = {
    "density": 0.001,
    "rounds": 2,
    "eval_samples": HELD_OUT,
    "seeds": 4,
    "controls": ("random", "fish", "full", "head"),
}


def run(output: Path, *, seed: int = 0, workers: int = 1, fresh: bool = False) -> SearchResult:
    """Pretrain on some digits, search on the others, write everything to `output`.

    Raises:
        UsageError: scikit-learn is not installed, or `output` is in use.
    """
    show = Progress(True)
    known, new = digits()
    model = pretrained(known, seed=seed, show=show)
    rows = [{**x, "label": int(y)} for x, y in zip(new.inputs, new.labels, strict=True)]
    held = random_subset(len(rows), HELD_OUT, seed=derive(seed, "demo, held out")).tolist()
    train = [row for i, row in enumerate(rows) if i not in set(held)]
    return search_mask(
        model,
        train,
        eval_data=[rows[i] for i in held],
        output=output,
        seed=seed,
        workers=workers,
        fresh=fresh,
        progress=True,
        **SETTINGS,
    )


def digits() -> tuple[SampleSet, SampleSet]:
    """The digits 0-4 and the digits 5-9, as pixel values [1, 8, 8] around 0, labels from 0."""
    if load_digits is None:
        raise UsageError("The demo needs scikit-learn: pip install 'ird_search[demo]'.")
    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images.astype(np.float32)).view(-1, 1, 8, 8) / 8 - 1
    classes = torch.from_numpy(labels.astype(np.int64))
    return _samples(pixels, classes, low=0), _samples(pixels, classes, low=5)


def pretrained(known: SampleSet, *, seed: int, show: Progress) -> ViTForImageClassification:
    """A small vision transformer that has learnt the known digits, with a fresh head."""
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = 5
    cpu, task = torch.device("cpu"), Classification(5)
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, "demo"))
        model = ViTForImageClassification(config)
        fresh = ViTForImageClassification(config).classifier
    show.say(f"Pretraining a vision transformer ({model.num_parameters():,} parameters) on 0-4 …")
    rows = training_batches(known, PRETRAIN_STEPS, size=64, seed=derive(seed, "pretraining"))
    with borrowed(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
        finetune(model, task, [known.batch(r) for r in rows], optimizer=optimizer)
        found = evaluate(model, task, known, device=cpu)
    show.say(f"… accuracy on these {found.metrics['accuracy']:.3f}. Now a mask for 5-9.")
    model.classifier = fresh
    return model


def _samples(pixels: Tensor, classes: Tensor, *, low: int) -> SampleSet:
    """The images of five classes."""
    at = ((classes >= low) & (classes < low + 5)).nonzero().flatten()
    inputs = tuple({"pixel_values": x} for x in pixels[at])
    return SampleSet(inputs, classes[at] - low, torch.arange(len(at)))
