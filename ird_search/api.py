"""The front doors: `search_mask` and `fisher_scores`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ird_search import report
from ird_search.artifact import ChosenRows, save_mask
from ird_search.borrow import borrowed
from ird_search.config import DataConfig, SearchConfig, split_settings
from ird_search.devices import resolve_device
from ird_search.errors import ModelError
from ird_search.fisher import Engine, FisherMatrix, make_engine
from ird_search.ledger import Ledger
from ird_search.mask import SparseMask
from ird_search.parameters import ParameterSpace, candidate_space, head_parameters
from ird_search.problem import Problem, make_problem, open_samples
from ird_search.progress import Progress
from ird_search.proxy import Candidate, Proxies, ProxyScore
from ird_search.rundir import MASK, REPORT, RunDirectory
from ird_search.samples import SampleSet
from ird_search.search import MOVES, Ranges, Round, Scored, SearchState, search
from ird_search.seeds import derive
from ird_search.selection import random_subset
from ird_search.study import Study
from ird_search.task import Task
from ird_search.training import snapshot
from ird_search.verdict import Verdict, give_verdict


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search found.

    Args:
        mask: the winning mask.
        samples: the rows it was computed from, with their row scores.
        score: the winner's mean loss on held-out samples that no choice has seen.
        verdict: the winner beside its controls.
        rounds: every round, with every candidate.
        config: the settings.
        provenance: where model, data and numbers came from; stored in the mask's file.
    """

    mask: SparseMask
    samples: ChosenRows
    score: float
    verdict: Verdict
    rounds: tuple[Round, ...]
    winner: Scored
    config: SearchConfig
    provenance: Mapping[str, Any]

    def save(self, directory: str | Path) -> Path:
        """Write `rounds.jsonl`, `report.md` and `mask.safetensors`; return the mask's path."""
        place = RunDirectory(Path(directory))
        place.write_rounds([report.round_record(r) for r in self.rounds])
        text = report.markdown(self.verdict, self.rounds, self.winner, self.provenance)
        place.write(REPORT, text)
        save_mask(place.mask, self.mask, samples=self.samples, provenance=self.provenance)
        return place.mask

    def table(self) -> str:
        """The verdict as a table with its explanation."""
        return f"{report.text_table(self.verdict)}\n\n{report.explained(self.verdict)}"

    def __repr__(self) -> str:
        return (
            f"SearchResult(loss {self.score:.4f}, {len(self.samples.ids)} samples, {self.mask!r})"
        )


@dataclass(frozen=True, eq=False)
class FisherScores:
    """Both marginals of the samples × parameters matrix.

    Args:
        by_parameter: c_j = 1/N Σᵢ F[i, j], in the tensors' shapes, by name.
        by_sample: r_i = Σ_{j∈M} F[i, j], float64 [N]; −∞ for a sample without a finite gradient.
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
    **settings: Any,
) -> SearchResult:
    """Find which few parameters to train, and which samples tell: iterative range decreasing.

    The model is handed back as it came: weights, mode, `requires_grad`, gradients, hooks and the
    random state, also after an exception.

    Args:
        model: an `nn.Module` (transformers, PEFT-wrapped, or your own), a directory, or a hub id.
        data: a `datasets` data set, a torch data set, a list of dicts or of (x, y) pairs, a path
            to csv/json/jsonl/parquet, or a hub id; tokenised or raw.
        eval_data: the same for held-out samples; by default a validation split, else a part of
            `data`.
        output: a run directory: everything is written there, and an interrupted run goes on.
        config: settings as one value, instead of keywords.
        processor: tokenizer or image processor, where the model brings none.
        revision: revision of a hub model.
        progress: show a bar and a line a round on standard error.
        settings: any field of `SearchConfig` or `DataConfig`.

    Raises:
        UsageError, DataError, ModelError: bad settings, data or model; all problems at once.
        NoProxySucceeded: every proxy failed.

    Example:
        >>> rows = [(torch.randn(4), i % 2) for i in range(80)]
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> result = search_mask(net, rows, density=0.25, pool=16, proxy_steps=4, rounds=2, seeds=1)
        >>> result.mask.count
        10
    """
    from_keywords, options = split_settings(settings)
    config = config.replace(**from_keywords) if config else SearchConfig(**from_keywords)
    place = RunDirectory(Path(output)) if output is not None else None
    replay = _replay(model, data, eval_data, options, config, revision)
    if place is not None:
        place.check(replay)  # before the work of loading
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
        with place.claimed(replay) if place else nullcontext(), _as_it_came(problem.model):
            result = _Run(problem, config, place, Progress(progress)).result()
            if place is not None:
                result.save(place.path)
    return result


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

    Exact, in float32, and never samples × parameters in memory.

    Args:
        mask: sum the row scores within it; over all candidate parameters by default.
        settings: fields of `SearchConfig` (`method`, `embeddings`, `include`, …) or `DataConfig`.

    Raises:
        UsageError, DataError, ModelError: bad settings, data or model.

    Example:
        >>> rows = [(torch.randn(4), i % 2) for i in range(6)]
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> scores = fisher_scores(net, rows, head=[])
        >>> scores.by_parameter["0.weight"].shape, scores.by_sample.shape, scores.path
        (torch.Size([8, 4]), torch.Size([6]), 'taps')
    """
    from_keywords, options = split_settings(settings)
    config = config.replace(**from_keywords) if config else SearchConfig(**from_keywords)
    with _as_it_came(model):
        loaded, task, samples, _ = open_samples(
            model, data, options=options, config=config, processor=processor, revision=revision
        )
        if mask is not None and (wrong := mask.space.differences(loaded.model)):
            raise ModelError(f"The mask is of another model: {d}" for d in wrong[:10])
        space = mask.space if mask else _space(loaded.model, config)
        device = resolve_device(config.device)
        with _as_it_came(loaded.model), borrowed(loaded.model.to(device)) as there:
            fisher = _fisher(there.eval(), task, space, samples, config, device)
            found = fisher.marginals(within=None if mask is None else mask.coords)
    by_parameter = space.split(found.columns)
    return FisherScores(by_parameter, found.rows, samples.ids, fisher.engine.path, space)


class _Run:
    """One search, from a problem to a result."""

    def __init__(
        self, problem: Problem, config: SearchConfig, place: RunDirectory | None, show: Progress
    ) -> None:
        self.problem, self.config, self.place, self.show = problem, config, place, show
        self.study = Study(place.study if place else None)
        self.proxies = Proxies(
            problem, config, Ledger(place.ledger if place else None), on_trial=show.step
        )

    def result(self) -> SearchResult:
        problem, config = self.problem, self.config
        with borrowed(problem.model), _restored(problem):
            problem.model.eval()
            self._introduce()
            warm = self.proxies.warm_up()
            self._record(warm, Candidate("head", self.proxies.head_only().mask), None, "warm-up")
            pool = random_subset(len(problem.train), config.pool, seed=derive(config.seed, "pool"))
            samples = problem.train.select(pool)
            fisher = _fisher(
                problem.model, problem.task, problem.space, samples, config, problem.device
            )
            state = self._search(fisher, len(samples))
            winner = state.best
            assert winner is not None  # the target is always reached: each round shrinks a range
            verdict = self._verdict(winner, fisher)
            scores = fisher.row_scores(winner.pair.rows, winner.mask.coords)
            chosen = ChosenRows(samples.ids[winner.pair.rows], scores.float())
        self.show.stop()
        provenance = self._provenance(winner, verdict, fisher)
        return SearchResult(
            mask=winner.mask,
            samples=chosen,
            score=verdict["ird"].loss,
            verdict=verdict,
            rounds=state.rounds,
            winner=winner,
            config=config,
            provenance=provenance,
        )

    def _introduce(self) -> None:
        p, c = self.problem, self.config
        self.show.say(
            f"{p.source['base_model']['id']}: {p.space.numel:,} candidate parameters in "
            f"{len(p.space.names)} tensors, {c.budget(p.space.numel):,} to select "
            f"({c.density:.3%}); head of {sum(p.model.get_parameter(n).numel() for n in p.head):,}"
        )
        self.show.say(
            f"{p.source['dataset']['origin']}: {len(p.train):,} samples to learn from "
            f"(pool {c.pool}), {len(p.choose)} to choose, {len(p.verdict)} for the verdict"
        )

    def _search(self, fisher: FisherMatrix, pool: int) -> SearchState:
        c, space = self.config, self.problem.space
        ranges = Ranges.geometric(
            pool,
            space.numel,
            min_samples=c.min_samples,
            budget=c.budget(space.numel),
            rounds=c.rounds,
        )
        most = (len(ranges.rows) + len(ranges.columns) - 2) * len(MOVES[c.strategy]) * 3
        self.show.say(
            f"{c.strategy}: samples {' → '.join(map(str, ranges.rows))}, parameters "
            f"{' → '.join(f'{n:,}' for n in ranges.columns)}; Fisher by {fisher.engine.path}"
        )
        self.show.start("search", most)
        rounds: list[dict[str, Any]] = []

        def on_round(done: Round) -> None:
            self.show.say(report.round_line(done))
            rounds.append(report.round_record(done))
            for s in done.nominated:
                candidate = Candidate("ird", s.mask)
                stage = f"round {done.number}, {s.move}"
                self._record(s.proxy, candidate, s.pair.rows.numel(), stage)
            if self.place is not None:
                self.place.write_rounds(rounds)

        return search(
            fisher,
            self.proxies.score,
            ranges,
            strategy=c.strategy,
            patience=c.patience,
            on_round=on_round,
        )

    def _verdict(self, winner: Scored, fisher: FisherMatrix) -> Verdict:
        self.show.start("verdict", 4 * 3 + 5 * self.config.seeds)
        candidates = {
            "fish": winner.mask,
            "random": winner.mask,
            "full": self.proxies.head_only().mask,
            "head": self.proxies.head_only().mask,
        }

        def on_entry(kind: Any, probe: ProxyScore) -> None:
            if kind in candidates:
                rows = winner.pair.rows.numel() if kind == "fish" else None
                self._record(probe, Candidate(kind, candidates[kind]), rows, "control")

        return give_verdict(
            winner,
            fisher,
            self.proxies,
            seeds=self.config.seeds,
            seed=self.config.seed,
            on_entry=on_entry,
        )

    def _record(
        self, score: ProxyScore, candidate: Candidate, rows: int | None, stage: str
    ) -> None:
        for trial in score.trials:
            self.study.record(
                trial,
                kind=candidate.kind,
                samples=rows,
                parameters=candidate.mask.count,
                stage=stage,
            )

    def _provenance(self, winner: Scored, verdict: Verdict, fisher: FisherMatrix) -> dict[str, Any]:
        gain, width = verdict.against("random")
        finite = width < float("inf") and gain == gain
        ids = fisher.samples.ids
        return {
            **self.problem.source,
            "learning_rate": winner.proxy.best.rate,
            "head": list(self.problem.head),
            "verdict": report.verdict_record(verdict),
            "against_random": {"gain": gain, "half_width": width} if finite else None,
            "sentence": verdict.sentence("random"),
            "fisher": {
                "path": fisher.engine.path,
                "excluded_samples": ids[sorted(fisher.excluded)].tolist(),
            },
            "search": self.config.to_dict(),
        }


def _fisher(
    model: nn.Module,
    task: Task,
    space: ParameterSpace,
    samples: SampleSet,
    config: SearchConfig,
    device: torch.device,
) -> FisherMatrix:
    rows = torch.arange(min(2, len(samples)))
    engine: Engine = make_engine(
        model, task, space, example=samples.batch(rows, device), method=config.method
    )
    return FisherMatrix(
        engine,
        samples,
        space,
        tokens=config.fisher_tokens,
        cache_bytes=config.cache_mb * 2**20,
        device=device,
    )


def _space(model: nn.Module, config: SearchConfig) -> ParameterSpace:
    return candidate_space(
        model,
        head=head_parameters(model, config.head),
        embeddings=config.embeddings,
        include=config.include,
        exclude=config.exclude,
    )


@contextmanager
def _restored(problem: Problem) -> Iterator[None]:
    """Put the head back, which the warm-up trains for the length of the search."""
    nothing = SparseMask(problem.space, torch.empty(0, dtype=torch.int64))
    saved = snapshot(problem.model, nothing, problem.head)
    try:
        yield
    finally:
        saved.restore()


@contextmanager
def _as_it_came(model: Any) -> Iterator[None]:
    """Hand a module back on the device it came on."""
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    try:
        yield
    finally:
        if first is not None and isinstance(model, nn.Module):
            model.to(first.device)


def _replay(
    model: Any,
    data: Any,
    eval_data: Any,
    options: DataConfig,
    config: SearchConfig,
    revision: str | None,
) -> dict[str, Any]:
    """The settings that make a run again: its `config.yaml`."""
    return {
        "model": _name(model),
        "revision": revision,
        "data": _name(data),
        "eval_data": _name(eval_data),
        **options.to_dict(),
        **config.to_dict(),
    }


def _name(thing: Any) -> str | None:
    """A path or id as it was given; what has no such name is called by its type."""
    if thing is None or isinstance(thing, (str, Path)):
        return None if thing is None else str(thing)
    return f"<{type(thing).__name__}>"


__all__ = ["MASK", "FisherScores", "SearchResult", "fisher_scores", "search_mask"]
