"""`Problem`: what a search works on, made from what the user passed.

Here a model and data become a task, a parameter space and three disjoint sample sets; behind this
door everything sees the same types.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ird_search.artifact import weights_sha256
from ird_search.artifact.matching import weight_lines
from ird_search.borrow import unwrapped
from ird_search.config import DataConfig, SearchConfig
from ird_search.data.columns import IDS
from ird_search.data.encoding import encode
from ird_search.data.sources import (
    Source,
    read_evaluation,
    read_source,
    read_validation,
    splits_of,
)
from ird_search.devices import resolve_device
from ird_search.errors import (
    DataError,
    UsageError,
    out_of_memory,
)
from ird_search.fisher import label_problems
from ird_search.fit import REFUSALS, Look, check_fit, look
from ird_search.models import (
    LoadedModel,
    check_kinds,
    check_weights,
    load_model,
    writes_targets,
)
from ird_search.parameters import ParameterSpace, candidate_space, head_parameters
from ird_search.samples import SampleSet
from ird_search.seeds import derive
from ird_search.selection import random_subset
from ird_search.task import Classification, Task, make_task
from ird_search.traits import (
    decoder_of,
    infer_task,
    label_names_of,
    limits_of,
    num_labels_of,
    segments_of,
)

HELD_OUT_SHARE = 0.25
"""At most this share of the data is held out where no evaluation data was given."""


BESIDE_THE_MODEL = (
    "_name_or_path",
    "_commit_hash",
    "transformers_version",
    "use_cache",
    "base_model_name_or_path",
    "peft_version",
)
"""What a config says of where it came from, or of how its model is used."""


@dataclass(frozen=True, eq=False)
class Problem:
    """A model, its task, the candidate parameters, and three disjoint sample sets.

    Args:
        model: on `device`.
        space: the parameters a mask may choose from.
        head: the parameters trained fully, outside the budget.
        train: what proxies train on and the Fisher pool is drawn from.
        choose: held-out samples that rank candidates.
        verdict: held-out samples that no choice has seen.
        source: where model and data came from, for the record.
    """

    model: nn.Module
    task: Task
    space: ParameterSpace
    head: tuple[str, ...]
    train: SampleSet
    choose: SampleSet
    verdict: SampleSet
    device: torch.device
    source: Mapping[str, Any]

    @cached_property
    def fingerprint(self) -> str:
        """Identifies model, task, data and candidates: part of every finished unit's address."""
        sets = (self.train, self.choose, self.verdict)
        parts = [self.source["weights_sha256"], self.space.fingerprint, *self.head]
        parts += [s.fingerprint for s in sets] + [self._architecture]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @cached_property
    def _architecture(self) -> str:
        """SHA-256 of what besides its weights makes the model what it is, and of the task."""
        configs = [getattr(unwrapped(self.model), "config", None)]
        configs += getattr(self.model, "peft_config", {}).values()
        buffers = weight_lines(dict(self.model.named_buffers())).values()
        padding = [(s.pad, s.pad_side) for s in (self.train, self.choose)]
        parts = [repr(self.model), *map(_told, configs), *buffers, repr(self.task), repr(padding)]
        text = re.sub("0x[0-9a-f]+", "", "\n".join(parts))  # addresses of functions
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def about(self) -> dict[str, str]:
        """The parts of the fingerprint in words, to tell which of them differs."""
        sets = {"training": self.train, "choosing": self.choose, "verdict": self.verdict}
        return {
            "weights": f"sha256 {self.source['weights_sha256'][:16]}",
            "candidates": f"{self.space.numel:,} parameters, sha256 {self.space.fingerprint[:16]}",
            "head": ", ".join(self.head),
            "model, buffers and task": f"sha256 {self._architecture[:16]}",
        } | {
            f"{name} samples": f"{len(s):,}, sha256 {s.fingerprint[:16]}"
            for name, s in sets.items()
        }

    @property
    def notes(self) -> list[str]:
        """What of the samples a reader of the verdict should know."""
        notes, about = [], self.source["dataset"]
        if shared := about.get("held_out_in_training"):
            notes.append(
                f"{shared:,} of {about['held_out']:,} held-out samples are training samples, too "
                "(same inputs, same label): their losses say what was learnt by heart."
            )
        if bool((self.train.kin != 0).any()):
            notes.append(
                "Samples differ in length and bring no attention mask, so in training the model "
                "sees what fills up a batch. Scores and losses are of the samples as they are."
            )
        return notes


def _told(config: Any) -> str:
    """What a transformers or PEFT config says, in the same words in every process."""
    said = config.to_dict() if hasattr(config, "to_dict") else {}
    kept = {k: v for k, v in said.items() if k not in BESIDE_THE_MODEL}
    return json.dumps(kept, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    """Sets come in another order in each process."""
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def open_samples(
    model: nn.Module | str | Path,
    data: Any,
    *,
    options: DataConfig,
    config: SearchConfig,
    processor: Any = None,
    revision: str | None = None,
) -> tuple[LoadedModel, Task, SampleSet, Source]:
    """Load a model and one data set for it.

    The data are read first: a model that is loaded from a checkpoint gets a head of their classes.

    Raises:
        DataError, ModelError, UsageError: whatever is wrong with either.
    """
    check_kinds(model, processor)
    source = read_source(
        data,
        text_columns=options.text_columns,
        label_column=options.label_column,
        split=options.split,
        limit=options.limit,
        writes=writes_targets(model, options.task, revision=revision),
    )
    name = infer_task(model, source) if options.task == "auto" else options.task
    if options.task == "auto" and name == "causal-lm" and not isinstance(model, nn.Module):
        _refuse_unread_columns(source)
    loaded = load_model(
        model,
        task=name,
        num_labels=source.num_labels,
        seed=derive(config.seed, "fresh head"),
        dtype=config.dtype,
        processor=processor,
        need_processor=not source.tokenised,
        revision=revision,
    )
    check_weights(loaded.model)
    classes = name in ("classification", "image-classification")
    labels = _classes_of(loaded, name, source, options) if classes else None
    task = make_task(name, labels)
    return loaded, task, encode_for(loaded, name, source, labels, options), source


def _classes_of(loaded: LoadedModel, task: str, source: Source, options: DataConfig) -> int | None:
    """Classes that a model tells apart: its config's, else as many logits as it gives of a sample.

    Those of the data, where it cannot be asked; what is wrong with the sample is told later.
    """
    if (known := num_labels_of(loaded.model)) is not None:
        return known
    names = source.label_names or ()
    try:
        first = encode_for(loaded, task, source.select([0]), None, options, label_names=names)
        weight = next(loaded.model.parameters(), None)
        device = None if weight is None else weight.device
        logits = look(loaded.model, first.batch([0], device).inputs).logits
    except REFUSALS as error:
        if out_of_memory(error):
            raise
        return source.num_labels
    return logits.shape[-1] if logits.ndim == 2 else source.num_labels


def encode_for(
    loaded: LoadedModel,
    task: str,
    source: Source,
    num_labels: int | None,
    options: DataConfig,
    *,
    label_names: tuple[str, ...] | None = None,
) -> SampleSet:
    """Encode a source for a model. Evaluation rows (`label_names` given) may be of one class."""
    positions, vocabulary = limits_of(loaded.model)
    return encode(
        source,
        task=task,
        processor=loaded.processor,
        training=label_names is None,
        num_labels=num_labels,
        label_names=label_names or label_names_of(loaded.model),
        max_length=options.max_length,
        max_positions=positions,
        vocab_size=vocabulary,
        segments=segments_of(loaded.model),
        pad_id=loaded.pad_id,
        decoder=decoder_of(loaded.model) if task == "seq2seq" else None,
    )


def make_problem(
    model: nn.Module | str | Path,
    data: Any,
    *,
    eval_data: Any = None,
    options: DataConfig,
    config: SearchConfig,
    processor: Any = None,
    revision: str | None = None,
) -> Problem:
    """Everything a search needs, checked on the CPU before any work starts.

    Evaluation samples come from `eval_data` (its validation split, else its only one, else `test`),
    else from the validation split of `data`, else, and where `split` is named, a part of `data` is
    held out. One half of them chooses, the other gives the verdict.
    """
    loaded, task, samples, source = open_samples(
        model, data, options=options, config=config, processor=processor, revision=revision
    )
    held_out = _eval_source(data, eval_data, source, options)
    if held_out is None:
        samples, held = _hold_out(samples, config)
    else:
        labels = getattr(task, "num_labels", None)
        names = samples.label_names or ()
        held = encode_for(
            loaded, _task_name(task, samples), held_out, labels, options, label_names=names
        )
        count = min(len(held), config.eval_samples)
        held = held.select(random_subset(len(held), count, seed=derive(config.seed, "held out")))
    choose, verdict = _halves(held, config)
    shared = _shared_rows(samples, held)
    device = resolve_device(config.device)
    model = loaded.model.to(device)
    seen = check_fit(model, task, samples, source, device)
    head, space = head_and_candidates(model, config, seen)
    _check_settings(task, space, samples, config)
    return Problem(
        model=model,
        task=task,
        space=space,
        head=head,
        train=samples,
        choose=choose,
        verdict=verdict,
        device=device,
        source=_provenance(loaded, task, source, samples, held, shared),
    )


def _refuse_unread_columns(source: Source) -> None:
    """Text without a label is for a language model, unless a column is left that may be one."""
    read = (*source.text_columns, *source.input_columns, source.label_column)
    unread = [c for c in source.columns if c not in read]
    if unread := [c for c in unread if c.lower() not in IDS]:
        raise DataError(
            f"No label column was found in {source.origin}: the columns are "
            f"{', '.join(source.columns)}. Name it with label_column (--label-column "
            f"{unread[0]}), or say task='causal-lm' (--task causal-lm) to learn the text itself."
        )


def _eval_source(data: Any, eval_data: Any, source: Source, options: DataConfig) -> Source | None:
    """Evaluation rows with the same columns as the training rows."""
    columns: dict[str, Any] = {
        "text_columns": source.text_columns,
        "label_column": source.label_column,
        "writes": source.kind == "seq2seq",
    }
    if eval_data is not None:
        return read_evaluation(eval_data, **columns)
    if options.split is not None or len(splits_of(data)) < 2:
        return None  # a lone split is what is learnt from, whatever its name
    return read_validation(data, **columns)


def _shared_rows(train: SampleSet, held: SampleSet) -> int:
    """How many held-out samples are training samples, too: same inputs, same label."""
    known = set(train.contents())
    return sum(content in known for content in held.contents())


def _task_name(task: Task, samples: SampleSet) -> str:
    pictures = "pixel_values" in samples.inputs[0]
    return "image-classification" if task.name == "classification" and pictures else task.name


def _hold_out(samples: SampleSet, config: SearchConfig) -> tuple[SampleSet, SampleSet]:
    """(training samples, held-out samples)."""
    count = min(config.eval_samples, int(HELD_OUT_SHARE * len(samples)))
    held = random_subset(len(samples), count, seed=derive(config.seed, "held out"))
    kept = torch.ones(len(samples), dtype=torch.bool)
    kept[held] = False
    return samples.select(kept.nonzero().flatten()), samples.select(held)


def _halves(held: SampleSet, config: SearchConfig) -> tuple[SampleSet, SampleSet]:
    if len(held) < 4:
        raise DataError(
            f"{len(held)} sample{'s are' if len(held) != 1 else ' is'} held out for evaluation; "
            "at least 4 are needed: one half "
            "chooses, the other gives the verdict. Pass eval_data (--eval-data), or at least 16 "
            "samples of data."
        )
    order = torch.randperm(
        len(held), generator=torch.Generator().manual_seed(derive(config.seed, "halves"))
    )
    middle = len(held) // 2
    return held.select(order[:middle].sort().values), held.select(order[middle:].sort().values)


def _check_settings(
    task: Task, space: ParameterSpace, train: SampleSet, config: SearchConfig
) -> None:
    """Settings that only model and data can tell to be wrong."""
    problems = []
    if config.score == "auc" and getattr(task, "num_labels", None) != 2:
        classes = getattr(task, "num_labels", "no")
        problems.append(
            f"score is 'auc', which needs two classes; this {task.name} has {classes} classes. "
            "Pass score='loss' (--score loss)."
        )
    if config.balanced and not isinstance(task, Classification):
        problems.append(f"balanced needs classes; this is {task.name}. Pass --no-balanced.")
    problems += label_problems(task, config.fisher, config.fisher_unit)
    if config.pool is not None and config.pool > len(train):
        problems.append(
            f"pool is {config.pool}, but {len(train)} samples are there to draw it from. "
            f"Pass pool={len(train)} (--pool {len(train)}) or less."
        )
    if config.budget(space.numel) < 1:
        problems.append(
            f"density {config.density:g} of {space.numel:,} candidate parameters rounds to none; "
            f"the smallest that selects one is {0.5 / space.numel:.1e}."
        )
    if problems:
        raise UsageError(problems)


def head_and_candidates(
    model: nn.Module, config: SearchConfig, seen: Look
) -> tuple[tuple[str, ...], ParameterSpace]:
    """The head, and the candidates beside it."""
    head = head_parameters(model, config.head, last=seen.last)
    space = candidate_space(
        model,
        head=head,
        embeddings=config.embeddings,
        include=config.include,
        exclude=config.exclude,
    )
    return head, space


def _provenance(
    loaded: LoadedModel,
    task: Task,
    source: Source,
    train: SampleSet,
    held: SampleSet,
    shared: int,
) -> dict[str, Any]:
    return {
        "base_model": {"id": loaded.name, "revision": loaded.revision},
        "architecture": type(loaded.model).__name__,
        "weights_sha256": weights_sha256(loaded.model, exclude=loaded.fresh),
        "fresh_parameters": list(loaded.fresh),
        "task": {"name": task.name, **asdict(task)},
        "dataset": {
            "origin": source.origin,
            "samples": len(train),
            "fingerprint": train.fingerprint,
            "held_out": len(held),
            "held_out_fingerprint": held.fingerprint,
            **({"held_out_in_training": shared} if shared else {}),
        },
    }
