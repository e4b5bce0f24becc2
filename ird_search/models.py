"""Loading a model, or taking the user's.

A user's `nn.Module` is used as it is. An id or a directory is loaded without running code from the
checkpoint and without pickles, under a seed of its own: a fresh head is drawn from the global
random state, so an unseeded one would differ from run to run.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from torch.nn.parameter import UninitializedParameter
from transformers.utils import logging as transformers_logging

from ird_search.borrow import random_state_kept, unwrapped
from ird_search.data.values import told
from ird_search.errors import ModelError, UsageError, first_line, nearest, out_of_memory
from ird_search.traits import is_seq2seq

LOADERS = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "image-classification": "AutoModelForImageClassification",
}
"""Named, since transformers imports all that a model needs with the first of its classes: who
passes an `nn.Module` does without."""
DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
SHOWN = 10
"""Tensors that a message lists."""

LOAD_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    ImportError,
    SafetensorError,
    UnpicklingError,
)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model with what belongs to it.

    Args:
        model: the module.
        processor: its tokenizer or image processor; `None` where none was needed.
        name: hub id, directory name, or class name.
        revision: the revision asked for, or the commit that the hub gave.
        fresh: parameters that the checkpoint lacked, drawn at random under `seed`; names as
            `named_parameters()` gives them, so neither buffers nor second names of tied weights.
        pad_id: the token id to fill batches with, where the model has tokens.
    """

    model: nn.Module
    processor: Any
    name: str
    revision: str | None = None
    fresh: tuple[str, ...] = ()
    pad_id: int | None = None

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.model.parameters())
        fresh = f", fresh: {', '.join(self.fresh)}" if self.fresh else ""
        return f"LoadedModel({self.name}: {type(self.model).__name__}, {count:,} parameters{fresh})"


def load_model(
    model: nn.Module | str | Path,
    *,
    task: str,
    num_labels: int | None = None,
    seed: int = 0,
    dtype: str = "auto",
    processor: Any = None,
    need_processor: bool = True,
    revision: str | None = None,
) -> LoadedModel:
    """Load a model and its processor, or take the user's.

    Args:
        model: a module, used as it is; a directory; or a hub id.
        task: classification, regression, causal-lm, seq2seq or image-classification.
        num_labels: classes of the data. A checkpoint whose own trained head has as many or more
            keeps it; otherwise a head of this size is drawn.
        seed: what a fresh head is drawn from. The caller's random state is left untouched.
        dtype: dtype of loaded weights; `auto` is float32.
        processor: a tokenizer or image processor to use instead of the checkpoint's.
        need_processor: false where the rows are model inputs already.
        revision: branch, tag or commit on the hub.

    Raises:
        ModelError: it cannot be found, loaded or used, in plain words.
        UsageError: an unknown task or dtype.
    """
    for word, known in ((task, tuple(LOADERS)), (dtype, tuple(DTYPES))):
        if word not in known:
            raise UsageError(f"{word!r} is not one of {', '.join(known)}.{nearest(word, known)}")
    if isinstance(model, nn.Module):
        return _as_it_is(model, task, processor, need_processor)
    name = _place(model)
    with quiet(), random_state_kept():
        torch.manual_seed(seed)
        loaded, fresh = _load(name, task, num_labels, DTYPES[dtype], revision)
        if processor is None and need_processor:
            processor = _load_processor(name, task, revision)
    _set_pad_token(loaded, processor, task)
    return LoadedModel(
        model=loaded,
        processor=processor,
        name=Path(name).name if Path(name).is_dir() else name,
        revision=revision or getattr(loaded.config, "_commit_hash", None),
        fresh=fresh,
        pad_id=_pad_id(loaded, processor),
    )


def check_kinds(model: Any, processor: Any) -> None:
    """Refuse what is neither a module nor the name of one, and a processor's name.

    Raises:
        UsageError: what came instead.
    """
    problems = []
    if not isinstance(model, (nn.Module, str, Path)):
        what = f"The class {model.__name__}" if isinstance(model, type) else repr(model)
        problems.append(f"{what} came as the model; a module, a directory or a hub id is accepted.")
    if isinstance(processor, (str, Path)):
        problems.append(
            f"The processor is {processor!r}; a tokenizer or image processor itself is accepted, "
            "as AutoTokenizer.from_pretrained(...) gives it."
        )
    if problems:
        raise UsageError(problems)


def writes_targets(
    model: nn.Module | str | Path, task: str, *, revision: str | None = None
) -> bool | None:
    """Whether a model reads one text and writes another; `None`: where the data say no other.

    A module's class says it, and so does a task that is not `auto`. A checkpoint of an
    encoder-decoder may also become a classifier, unless it is one.
    """
    if task != "auto":
        return task == "seq2seq"
    if isinstance(model, nn.Module):
        return is_seq2seq(unwrapped(model))
    where = {} if revision is None else {"revision": revision}
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(
                _place(model), trust_remote_code=False, **where
            )
    except (ModelError, *LOAD_ERRORS):
        return False  # told when it is loaded
    pretrained = not any("Classification" in str(a) for a in config.architectures or ())
    return None if pretrained and _seq2seq_loader(config) is not None else False


def _seq2seq_loader(config: Any) -> str | None:
    """Who loads the encoder-decoder of this config; `None` where it is none."""
    if not getattr(config, "is_encoder_decoder", False):
        return None
    if type(config) in transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return "AutoModelForSeq2SeqLM"
    speech = type(config) in transformers.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING
    return "AutoModelForSpeechSeq2Seq" if speech else None


def check_weights(model: nn.Module) -> None:
    """Refuse weights that are not there, not finite, or spread over several devices.

    Raises:
        ModelError: layers that were never run, parameters on the meta device, or NaN or infinite
            entries; up to ten tensors are named. More than one device.
    """
    lazy = [n for n, p in model.named_parameters() if isinstance(p, UninitializedParameter)]
    if lazy:
        raise ModelError(
            f"{lazy[0]} has no shape yet: its layer is lazy. Run the model once on a batch first."
        )
    problems = []
    for name, p in model.named_parameters():
        if p.is_meta:
            problems.append(f"{name} {list(p.shape)} is on the meta device: it was never loaded")
        elif p.is_floating_point() and not bool(torch.isfinite(p).all()):
            bad = int((~torch.isfinite(p)).sum())
            problems.append(f"{name}: {bad:,} of {p.numel():,} weights are not finite")
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise ModelError(
            "\n    ".join([f"{len(problems)} tensors cannot be used:", *problems[:SHOWN], *more])
        )
    if len(devices := {str(p.device) for p in model.parameters()}) > 1:
        raise ModelError(
            f"The model is spread over {', '.join(sorted(devices))}; one device is accepted. Load "
            "it without device_map, or move it whole with model.to(...)."
        )


# --- loading ------------------------------------------------------------------------------------


def _place(model: str | Path) -> str:
    """A directory or a hub id, after what can be told without loading."""
    try:
        path = Path(model).expanduser()
        is_directory, there = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # too long, not allowed, a home that is unknown
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise ModelError(f"{told(str(model))} cannot be used: {reason}.") from error
    if is_directory:
        if (path / "adapter_config.json").exists():
            raise ModelError(
                f"{model} holds a PEFT adapter, not a whole model. Load it in Python with "
                "PeftModel.from_pretrained and pass the wrapped model."
            )
        if not (path / "config.json").exists():
            raise ModelError(
                f"The directory {model} holds no config.json, so it is no saved model."
            )
        return str(path)
    looks_local = isinstance(model, Path) or path.is_absolute() or str(model).startswith((".", "~"))
    if looks_local or str(model).count("/") > 1 or there:
        kind = "is a file; a directory or a hub id is accepted" if there else "does not exist"
        raise ModelError(f"{model} {kind}.")
    return str(model)


def _load(
    name: str, task: str, num_labels: int | None, dtype: torch.dtype, revision: str | None
) -> tuple[Any, tuple[str, ...]]:
    where: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    if revision is None:
        del where["revision"]
    try:
        config = transformers.AutoConfig.from_pretrained(name, **where)
        loader = (task == "seq2seq" and _seq2seq_loader(config)) or LOADERS[task]
        model, report = getattr(transformers, loader).from_pretrained(
            name,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a head of another size is drawn anew, and reported
            **_head_settings(config, task, num_labels),
            **where,
        )
    except LOAD_ERRORS as error:
        if out_of_memory(error):
            raise
        raise ModelError(_why(name, error, task)) from error
    replaced = {key[0] for key in report["mismatched_keys"]}
    parameters = dict(model.named_parameters())
    fresh = {*report["missing_keys"], *replaced} & parameters.keys()
    prefix = f"{model.base_model_prefix}."
    if odd := sorted(key for key in replaced if key.startswith(prefix)):
        raise ModelError(
            f"{name}: {key} has another shape than config.json says." for key in odd[:SHOWN]
        )
    if len(fresh) == len(parameters):
        raise ModelError(f"{name} holds no weight of a {type(model).__name__}.")
    return model, tuple(key for key in parameters if key in fresh)


def _head_settings(config: Any, task: str, num_labels: int | None) -> dict[str, Any]:
    if task in ("causal-lm", "seq2seq"):
        return {}
    if task == "regression":
        return {"num_labels": 1, "problem_type": "regression"}
    trained = "ForSequenceClassification", "ForImageClassification"
    has_head = any(str(a).endswith(trained) for a in config.architectures or ())
    if num_labels is None or (has_head and config.num_labels >= num_labels):
        return {}
    return {"num_labels": num_labels}


def _why(name: str, error: BaseException, task: str) -> str:
    """A loading error in plain words."""
    text = str(error).strip() or type(error).__name__
    if "connect" in text or "offline mode" in text:
        return (
            f"{name!r} is no directory here, and the hub cannot be reached (or HF_HUB_OFFLINE is "
            "set) and no copy is cached. Pass a local directory, or go online."
        )
    if "trust_remote_code" in text:
        return f"{name!r} needs code from its repository, which is never run here."
    if "Unrecognized configuration class" in text:
        kind = re.search(r"\w+Config", text)
        return (
            f"{name!r} ({kind[0] if kind else 'its config'}) is no model for the task {task!r}, "
            "which the data suggest. Pass another model, or name the task (--task)."
        )
    if isinstance(error, UnpicklingError) or ("safetensors" in text and "file named" in text):
        return (
            f"{name!r} holds no model.safetensors. Pickled weights can run code and are not read: "
            "save the model again with save_pretrained."
        )
    return f"{name!r} could not be loaded: {' '.join(text.splitlines()[:2])}"


def _load_processor(name: str, task: str, revision: str | None) -> Any:
    pictures = task == "image-classification"
    loader: Any = transformers.AutoImageProcessor if pictures else transformers.AutoTokenizer
    what = "image processor" if pictures else "tokenizer"
    where = {} if revision is None else {"revision": revision}
    try:
        processor = loader.from_pretrained(name, trust_remote_code=False, **where)
    except LOAD_ERRORS as error:
        if out_of_memory(error):
            raise
        raise ModelError(
            f"No {what} could be loaded from {name!r} ({first_line(error)}). Pass one as "
            "`processor`."
        ) from error
    special = getattr(processor, "all_special_tokens", ())
    if not pictures and len(processor) <= len(special):
        # without vocabulary files an empty tokenizer comes back, which maps all words to unknown
        raise ModelError(f"{name!r} holds no tokenizer. Pass one as `processor`.")
    return processor


def find_processor(name: str, *, task: str, revision: str | None = None) -> Any:
    """The tokenizer or image processor of a checkpoint; None where it has none."""
    try:
        return _load_processor(name, task, revision)
    except ModelError:
        return None


def _as_it_is(model: nn.Module, task: str, processor: Any, need_processor: bool) -> LoadedModel:
    base: Any = unwrapped(model)
    origin = str(getattr(base, "name_or_path", "") or "")
    if processor is None and need_processor:
        if not origin:
            raise ModelError(
                f"The rows need a tokenizer or image processor, and this {type(model).__name__} "
                "does not say where its own is. Pass one as `processor`."
            )
        with quiet():
            processor = _load_processor(origin, task, None)
    text_classifier = type(base).__name__.endswith("ForSequenceClassification")
    if text_classifier and getattr(base.config, "pad_token_id", None) is None:
        raise ModelError(
            f"{type(base).__name__} has no padding token, so it cannot tell where a text in a "
            "batch ends. Set model.config.pad_token_id (often tokenizer.eos_token_id)."
        )
    return LoadedModel(
        model=model,
        processor=processor,
        name=(Path(origin).name if Path(origin).is_dir() else origin) or type(model).__name__,
        revision=getattr(getattr(base, "config", None), "_commit_hash", None),
        pad_id=_pad_id(base, processor),
    )


def _set_pad_token(model: Any, processor: Any, task: str) -> None:
    """Give a loaded classifier without a padding token its tokenizer's, else the end of text.

    GPT-like classifiers read the last token that is not padding; without one they refuse batches.
    """
    if task in ("classification", "regression") and model.config.pad_token_id is None:
        own = (getattr(processor, "pad_token_id", None), getattr(processor, "eos_token_id", None))
        eos = getattr(model.config, "eos_token_id", None)
        model.config.pad_token_id = next((i for i in (*own, eos) if i is not None), None)


def _pad_id(model: nn.Module, processor: Any) -> int | None:
    """The model's own padding token first: its code may look for it."""
    config = getattr(model, "config", None)
    own = (getattr(config, "pad_token_id", None), getattr(processor, "pad_token_id", None))
    last = getattr(processor, "eos_token_id", None)
    return next((int(i) for i in (*own, last) if isinstance(i, int)), None)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' load report and progress bars."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
