"""The front doors: `search_mask` and `fisher_scores`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from ird_search.borrow import borrowed
from ird_search.config import DataConfig, SearchConfig, split_settings
from ird_search.devices import resolve_device
from ird_search.entries import check_mask
from ird_search.environment import environment
from ird_search.errors import ModelError, UsageError
from ird_search.fit import check_fit
from ird_search.freeze import refuse_masked
from ird_search.ledger import Ledger
from ird_search.mask import SparseMask
from ird_search.mismatch import mismatch
from ird_search.opening import open_fisher
from ird_search.parameters import ParameterSpace
from ird_search.problem import Problem, head_and_candidates, make_problem, open_samples
from ird_search.progress import Progress
from ird_search.result import SearchResult
from ird_search.run import Run, help_out
from ird_search.rundir import RunDirectory
from ird_search.workers import refuse_while_starting, workers

FISHER_TOKENS = {"cpu": 512, "cuda": 16384}
"""Padded tokens in one batch of the Fisher pass: more of them only take memory on a CPU."""


@dataclass(frozen=True, eq=False)
class FisherScores:
    """Both marginals of the samples × parameters matrix.

    Args:
        by_parameter: c_j = 1/N Σᵢ F[i, j], in the tensors' shapes, by name.
        by_sample: r_i = Σ_{j∈M} F[i, j], float64 [N]; −∞ for a sample without a finite gradient (of
            which at most 1% are left out; more raise a `DataError`).
        ids: the samples' positions in the data, int64 [N].
        path: how the gradients were computed.
        space: the parameters that were scored.
    """

    by_parameter: Mapping[str, Tensor]
    by_sample: Tensor
    ids: Tensor
    path: str
    space: ParameterSpace


def search_mask(
    model: nn.Module | str | Path,
    data: Any,
    *,
    eval_data: Any = None,
    output: str | Path | None = None,
    config: SearchConfig | None = None,
    processor: Any = None,
    revision: str | None = None,
    progress: bool = False,
    fresh: bool = False,
    **settings: Any,
) -> SearchResult:
    """Find which few parameters to train, and which samples tell: iterative range decreasing.

    The model is handed back as it came: weights, mode, `requires_grad`, gradients, hooks and the
    random state, also after an exception.

    Args:
        model: an `nn.Module` (transformers, PEFT-wrapped, or your own), a directory, or a hub id.
        data: a `datasets` data set, a torch data set, a list of dicts or of (x, y) pairs, a path
            to csv/json/jsonl/parquet, or a hub id; tokenised or raw.
        eval_data: the same for held-out samples (of several splits the validation split, else
            `test`); by default a validation split of `data`, else (and where `split` is named) a
            part of it.
        output: a run directory: everything is written there, and an interrupted run goes on.
        config: settings as one value, instead of keywords.
        processor: tokenizer or image processor, where the model brings none.
        revision: revision of a hub model.
        progress: show a bar and a line a round on standard error.
        fresh: begin anew in `output`, whatever an unfinished run has left there.
        settings: any field of `SearchConfig` or `DataConfig`.

    Raises:
        UsageError, DataError, ModelError: bad settings, data or model; all problems at once.
        NoProxySucceeded: every proxy failed.

    Example:
        >>> import torch
        >>> rows = [(torch.randn(4), i % 2) for i in range(80)]
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> result = search_mask(net, rows, density=0.25, pool=16, proxy_steps=4, rounds=2, seeds=1)
        >>> result.mask.count
        10
    """
    refuse_while_starting()
    config, options = _resolved(config, settings)
    place = RunDirectory(Path(output)) if output is not None else None
    replay = _replay(model, data, eval_data, options, config, processor, revision)
    if place is not None:
        place.check(replay, fresh=fresh)  # before the work of loading
    show = Progress(progress)
    with _as_it_came(model):
        problem = make_problem(
            model,
            data,
            eval_data=eval_data,
            options=options,
            config=config,
            processor=processor,
            revision=revision,
        )
        # Claimed only now: bad data or a bad setting must not leave a directory in use.
        with place.claimed(replay, fresh=fresh) if place else nullcontext():
            if place is not None:
                for note in place.settle(replay, problem.about, environment()):
                    show.say(note)
            with _as_it_came(problem.model), _shared_ledger(problem, config, place) as ledger:
                result = Run(problem, config, ledger, place=place, show=show).result()
            if place is not None:
                result.write(place)
    return result


@contextmanager
def _shared_ledger(
    problem: Problem, config: SearchConfig, place: RunDirectory | None
) -> Iterator[Ledger]:
    """The ledger of a run, with the other processes that work on it."""
    if place is None and config.workers == 1:
        yield Ledger()
        return
    with nullcontext(place.ledger) if place else TemporaryDirectory() as directory:
        ledger = Ledger(Path(directory))
        ledger.forget("proxy", lambda unit: unit.result["trial"]["raised"])
        with workers(config.workers - 1, help_out, (problem, config), Path(directory)):
            yield ledger


def fisher_scores(
    model: nn.Module | str | Path,
    data: Any,
    *,
    mask: SparseMask | None = None,
    config: SearchConfig | None = None,
    processor: Any = None,
    revision: str | None = None,
    **settings: Any,
) -> FisherScores:
    """Per-sample squared gradients of the log-likelihood, summed both ways in one pass.

        F[i, j] = (∂ log p(yᵢ | xᵢ; θ) / ∂θⱼ)²     the empirical Fisher, one term a sample

    Exact, in float32, and never samples × parameters in memory. With `fisher="expected"` labels are
    all that the model gives a probability, F[i, j] = Σ_y p(y | xᵢ) (∂ log p(y | xᵢ) / ∂θⱼ)²; with
    "sampled" they are drawn from it; with `fisher_unit="token"` each target token of a language
    model is squared by itself.

    Args:
        mask: sum the row scores within it; over all candidate parameters by default.
        settings: fields of `SearchConfig` (`fisher`, `method`, `include`, …) or `DataConfig`.

    Raises:
        UsageError, DataError, ModelError: bad settings, data or model.

    Example:
        >>> import torch
        >>> rows = [(torch.randn(4), i % 2) for i in range(6)]
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> scores = fisher_scores(net, rows, head=[])
        >>> scores.by_parameter["0.weight"].shape, scores.by_sample.shape, scores.path
        (torch.Size([8, 4]), torch.Size([6]), 'taps')
        >>> fisher_scores(net, rows, head=[], fisher="expected").by_parameter["2.bias"].shape
        torch.Size([2])
    """
    if settings.get("scoring_steps"):
        raise UsageError(
            "scoring_steps is a setting of a search: fisher_scores computes at the weights that "
            "the model has. Train it for a few steps first."
        )
    if mask is not None:
        check_mask(mask)
    config, options = _resolved(config, settings)
    with _as_it_came(model):
        loaded, task, samples, source = open_samples(
            model, data, options=options, config=config, processor=processor, revision=revision
        )
        if mask is not None and (text := mismatch(mask.space, loaded.model)):
            raise ModelError(text)
        device = resolve_device(config.device)
        with _as_it_came(loaded.model), borrowed(loaded.model.to(device)) as there:
            seen = check_fit(there, task, samples, source, device)
            space = mask.space if mask is not None else head_and_candidates(there, config, seen)[1]
            once = config.replace(cache_mb=0)  # one pass: nothing is read again
            fisher = open_fisher(there.eval(), task, space, samples, once, device)
            found = fisher.marginals(within=None if mask is None else mask.coords)
    by_parameter = space.split(found.columns)
    return FisherScores(by_parameter, found.rows, samples.ids, fisher.path, space)


def _resolved(
    config: SearchConfig | None, settings: Mapping[str, Any]
) -> tuple[SearchConfig, DataConfig]:
    """The settings of a call, with what depends on the machine written out."""
    if config is not None and not isinstance(config, SearchConfig):
        raise UsageError(
            f"config is a {type(config).__name__}; a SearchConfig is accepted, as "
            "SearchConfig(density=0.005), or the settings as keywords."
        )
    from_keywords, options = split_settings(settings)
    config = config.replace(**from_keywords) if config else SearchConfig(**from_keywords)
    device = resolve_device(config.device)
    tokens = config.fisher_tokens or FISHER_TOKENS.get(device.type, FISHER_TOKENS["cpu"])
    return config.replace(device=str(device), fisher_tokens=tokens), options


@contextmanager
def _as_it_came(model: Any) -> Iterator[None]:
    """Hand a module back on the device it came on; one under a mask is not taken.

    One that is spread over several devices, or has tensors on none, is refused later, unmoved.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    refuse_masked(model)
    devices = {p.device for p in model.parameters()}  # `to` moves a parameter in place
    try:
        yield
    finally:
        if len(devices) == 1 and devices != {p.device for p in model.parameters()}:
            model.to(devices.pop())


def _replay(
    model: Any,
    data: Any,
    eval_data: Any,
    options: DataConfig,
    config: SearchConfig,
    processor: Any,
    revision: str | None,
) -> dict[str, Any]:
    """The settings that make a run again: its `config.yaml`."""
    return {
        "model": _name(model),
        "revision": revision,
        "data": _name(data),
        "eval_data": _name(eval_data),
        "processor": _name(processor),
        **options.to_dict(),
        **config.to_dict(),
    }


def _name(thing: Any) -> str | None:
    """A path, in full, or an id as it was given; what has no such name is called by its type."""
    if thing is None:
        return None
    if isinstance(thing, (str, Path)):
        return os.path.abspath(thing) if os.path.exists(thing) else str(thing)
    return f"<{type(thing).__name__}>"


__all__ = ["FisherScores", "SearchResult", "fisher_scores", "search_mask"]
