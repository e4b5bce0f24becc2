"""Every setting in one place: default, unit, legal range.

The command line's options, the YAML file and the docs are made from these fields, so a default
is written once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from ird_search.errors import UsageError, nearest
from ird_search.settings import make_plain, range_problems, setting

Strategy = Literal["walk", "ladder", "grid", "tpe", "random", "fish"]
Criterion = Literal["fisher", "mean", "snr", "decrease"]
FisherLabels = Literal["empirical", "expected", "sampled"]
FisherUnit = Literal["sequence", "token"]
Granularity = Literal["entry", "row", "column", "block"]
Part = Literal["criterion", "ceiling", "skip"]
Pick = Literal["target", "smallest", "knee"]
Control = Literal["random", "fish", "reversed", "magnitude", "shuffle", "lora", "full", "head"]
Method = Literal["auto", "taps", "vmap", "loop"]
Score = Literal["loss", "auc"]
Dtype = Literal["auto", "float32", "bfloat16"]
TaskName = Literal[
    "auto", "classification", "regression", "causal-lm", "seq2seq", "image-classification"
]


POOL = 512
"""Samples that Fisher contributions are computed of, where nothing else is asked for; of fewer, the
signs of the gradients say less."""

BESIDE_THE_RESULT = ("workers", "record_seconds")
"""Settings that change how a search is done, but not what it finds."""


@dataclass(frozen=True)
class SearchConfig:
    """The settings of one search. A config is read, never assigned to; `replace` makes another.

    Raises:
        UsageError: one or more settings are outside their range; all are listed.

    Example:
        >>> SearchConfig(density=0.01).density
        0.01
        >>> SearchConfig(density=0, pool=0)
        Traceback (most recent call last):
        ...
        ird_search.errors.UsageError: 2 problems:
          - density is 0; it must be above 0 and at most 1.
          - pool is 0; it must be at least 1.
    """

    density: float = setting(
        0.005, "fraction of the candidate parameters to select", low=0, high=1, open=True
    )
    strategy: Strategy = setting("walk", "how (samples, parameters) pairs are nominated")
    trials: int = setting(20, "pairs that tpe and random try", low=1)
    pick: Pick = setting(
        "target",
        "the best mask of the density asked for, or the smallest within tolerance, or the knee of "
        "the densities below it",
    )
    tolerance: float | None = setting(
        None,
        "loss that a smaller mask may cost, where one is picked; by default what a paired test "
        "cannot tell from none",
        low=0,
    )
    criterion: Criterion | None = setting(
        None,
        "what ranks parameters: the mean square, absolute mean or signal-to-noise of gradients, or "
        "the decrease of the loss within reach; to begin with by default "
        "snr, and fisher for ladder and fish",
    )
    reach: float = setting(
        1.0, "how far a weight may move, where criterion is decrease", low=0, open=True
    )
    ceiling: float | None = setting(
        None, "most that one tensor may be selected, as a multiple of the mask's density", low=1
    )
    floor: float = setting(
        0.0, "least that one tensor is selected, as a multiple of the density", low=0, high=1
    )
    skip: float = setting(0.0, "ranks passed over at the top, as a multiple of the budget", low=0)
    vary: tuple[Part, ...] = setting(
        ("criterion", "ceiling", "skip"),
        "which of these walk, grid, tpe and random may change by their proxies",
    )
    granularity: Granularity = setting("entry", "what is selected whole")
    block: int = setting(16, "side of a block, where blocks are selected", low=1)
    balanced: bool = setting(False, "narrow the rows to as many of each class")
    row_cap: float | None = setting(
        None, "rows that score above so many times the median are not kept", low=1
    )
    settle: float | None = setting(
        None,
        "draw rows until masks of half and of all share so much (Jaccard); the pool is the most",
        low=0,
        high=1,
    )
    bootstraps: int = setting(
        20, "bootstraps of the rows that say how stable the mask is", low=0, high=1000
    )
    pool: int | None = setting(
        None,
        f"samples whose Fisher contributions are computed; by default {POOL}, or all of fewer",
        low=1,
    )
    min_samples: int = setting(8, "rows at which the sample range stops shrinking", low=1)
    rounds: int = setting(3, "geometric steps from everything to the target", low=1, high=64)
    patience: int = setting(
        2, "rounds without improvement at the target before walk and ladder stop", low=1
    )
    warmup_steps: int = setting(40, "steps the head alone is trained before scoring", low=0)
    scoring_steps: int | None = setting(
        None,
        "steps that all is trained before it is scored, and then put back; by default 20 where a "
        "candidate matrix is all zero (LoRA's B), else 0",
        low=0,
    )
    proxy_steps: int = setting(40, "optimizer steps of one proxy fine-tune", low=1)
    probe_steps: int | None = setting(
        None,
        "optimizer steps, fewer than proxy_steps, of proxies that find rates and drop the worse "
        "half of a round; by default there are none",
        low=1,
    )
    verdict_steps: int | None = setting(
        None, "optimizer steps of the verdict's fine-tunes; by default proxy_steps", low=1
    )
    batch_size: int = setting(16, "samples in one optimizer step", low=1)
    learning_rate: float | None = setting(
        None,
        "one rate for all but the head; by default each candidate tries three",
        low=0,
        open=True,
    )
    head_learning_rate: float = setting(
        3e-3, "rate of the head beside a mask or all else", low=0, open=True
    )
    weight_decay: float = setting(0.0, "AdamW weight decay, on selected entries only", low=0)
    score: Score = setting("loss", "what ranks proxies on held-out data (auc: two classes)")
    eval_samples: int = setting(
        512, "held-out samples: one half chooses, one gives the verdict", low=4
    )
    seeds: int = setting(3, "repeats of the winner and the controls for the verdict", low=1)
    controls: tuple[Control, ...] = setting(
        ("random", "fish", "reversed", "magnitude", "shuffle", "lora", "full", "head"),
        "what the winner is compared with",
    )
    head: tuple[str, ...] | None = setting(
        None, "regular expressions of head parameters, instead of the automatic choice"
    )
    groups: tuple[str, ...] | None = setting(
        None,
        "regular expressions of parameters with a share of the budget of their own; by default "
        "LoRA's A and B",
    )
    embeddings: bool = setting(False, "let embedding tables be candidates too")
    include: tuple[str, ...] = setting((), "regular expressions: only these are candidates")
    exclude: tuple[str, ...] = setting((), "regular expressions: these are not candidates")
    fisher: FisherLabels = setting(
        "empirical",
        "labels whose gradients are squared: the data's, all that the model gives a probability "
        "(weighted by it), or ones drawn from it; other labels than the data's have no mean "
        "gradient, and criterion is fisher",
    )
    fisher_draws: int = setting(1, "labels drawn for a sample, where fisher is sampled", low=1)
    fisher_unit: FisherUnit = setting(
        "sequence",
        "what of a language model's sample is squared: the gradient of the whole, or of each "
        "target token by itself; by token there is no mean gradient either",
    )
    method: Method = setting("auto", "how per-sample gradients are computed")
    fisher_tokens: int | None = setting(
        None,
        "padded tokens in one batch of the Fisher pass; by default 512 (16384 on a GPU)",
        low=1,
    )
    cache_mb: int = setting(
        2048, "memory for kept factors, gradients and moments of all columns, MB each", low=0
    )
    workers: int = setting(1, "processes that share the fine-tunes of a search", low=1, high=256)
    strict: bool = setting(
        False,
        "one thread in each process and deterministic algorithms: the same bits with any number of "
        "workers",
    )
    record_seconds: float = setting(
        30.0, "seconds of a Fisher pass after which its sums are written down", low=0
    )
    seed: int = setting(0, "every random choice derives from it", low=0)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: Dtype = setting("auto", "dtype of weights that are loaded (auto: float32)")

    def __post_init__(self) -> None:
        check_settings(self)

    def budget(self, parameters: int) -> int:
        """How many of so many candidate parameters are selected: the nearest whole number."""
        return round(self.density * parameters)

    @property
    def signed(self) -> bool:
        """Whether the mean gradient is there beside the mean square, and with it all criteria.

        Under the model's own distribution the mean gradient is zero; and the squares of tokens
        belong to no gradient of their sample.
        """
        return self.fisher == "empirical" and self.fisher_unit == "sequence"

    @property
    def varied(self) -> tuple[Part, ...]:
        """What of a reading may vary: `vary`, less the criterion where there is only one.

        Example:
            >>> SearchConfig(fisher="expected").varied
            ('ceiling', 'skip')
        """
        return tuple(part for part in self.vary if self.signed or part != "criterion")

    def rows(self, samples: int) -> int:
        """How many of so many training samples form the pool.

        Example:
            >>> SearchConfig().rows(100), SearchConfig().rows(9000)
            (100, 512)
        """
        return min(POOL, samples) if self.pool is None else self.pool

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def replace(self, **changes: Any) -> SearchConfig:
        """A copy with some settings changed."""
        return replace(self, **changes)


@dataclass(frozen=True)
class DataConfig:
    """How rows are read. What is left out is inferred from the columns and the model."""

    task: TaskName = setting("auto", "what is learnt; by default told from model and data")
    text_columns: tuple[str, ...] = setting(
        (), "text column; twice for a pair of texts, or for a source and its target"
    )
    label_column: str | None = setting(None, "label column")
    split: str | None = setting(None, "split to learn from, where the data has several")
    limit: int | None = setting(None, "use the first so many rows", low=1)
    max_length: int | None = setting(None, "cut texts to so many tokens", low=1)

    def __post_init__(self) -> None:
        check_settings(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def split_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], DataConfig]:
    """Keywords parted into those of a `SearchConfig` and a `DataConfig`.

    Raises:
        UsageError: a keyword of neither; the nearest names are offered.
    """
    search = {f.name for f in fields(SearchConfig)}
    data = {f.name for f in fields(DataConfig)}
    if unknown := [key for key in settings if key not in search | data]:
        known = search | data
        raise UsageError(
            f"Unknown setting {k!r}."
            + (f" Pass {called}." if (called := _called(k)) else nearest(str(k), known))
            for k in unknown
        )
    options = DataConfig(**{k: v for k, v in settings.items() if k in data})
    return {k: v for k, v in settings.items() if k in search}, options


_ALIASES = {
    "`learning_rate`": "lr max_lr peak_lr rate",
    "`weight_decay`": "wd decay",
    "`batch_size`": "bs train_batch_size per_device_train_batch_size",
    "`proxy_steps`, a number of optimizer steps": "epochs num_epochs num_train_epochs max_steps "
    "num_steps train_steps steps iterations",
    "`density`, the fraction that is selected": "sparsity keep keep_ratio ratio fraction budget "
    "topk top_k k num_parameters",
    "`pool`": "samples num_samples n_samples train_samples",
    "`limit`": "max_samples max_train_samples",
    "`seed`": "random_seed random_state",
    "`workers`": "num_workers n_jobs jobs num_proc processes",
    "`max_length`": "max_len max_seq_length max_seq_len seq_len block_size",
    "`controls`": "baselines baseline",
    "`score`": "metric scoring eval_metric",
    "`label_column`": "label target target_column",
    "`text_columns`": "text text_column text_field dataset_text_field",
    "`output`": "output_dir out_dir save_dir directory",
    "`eval_data`": "eval_dataset val_data validation_data test_data",
    "it as `processor`": "tokenizer image_processor feature_extractor processing_class",
}
"""What other libraries call a setting, by what to pass here."""


def _called(name: object) -> str:
    """What to pass for a name that another library uses; empty for none."""
    return next((own for own, others in _ALIASES.items() if name in others.split()), "")


def check_settings(config: SearchConfig | DataConfig) -> None:
    """Every setting within its range, or one error that lists all that are not."""
    problems = range_problems(config)
    if not problems and isinstance(config, SearchConfig):
        problems = [*_size_problems(config), *_fisher_problems(config), *_fish_problems(config)]
    if problems:
        raise UsageError(problems)
    make_plain(config)


def _size_problems(config: SearchConfig) -> Iterator[str]:
    """Sizes that make no sense together."""
    pool = POOL if config.pool is None else config.pool
    if config.min_samples > pool:
        yield f"min_samples ({config.min_samples}) is larger than pool ({pool})."
    if config.probe_steps is not None and config.probe_steps > config.proxy_steps:
        yield (
            f"probe_steps ({config.probe_steps}) is larger than proxy_steps "
            f"({config.proxy_steps}): the shorter fine-tunes would be the longer ones."
        )


def _fisher_problems(config: SearchConfig) -> Iterator[str]:
    """Settings of F that make no sense together."""
    if config.fisher_draws > 1 and config.fisher != "sampled":
        yield (
            f"fisher_draws is {config.fisher_draws}, but fisher is {config.fisher!r}, which draws "
            "no labels. Pass fisher='sampled' (--fisher sampled)."
        )
    if not config.signed and config.criterion not in (None, "fisher"):
        yield (
            f"criterion is {config.criterion!r}, which needs the mean gradient; with fisher "
            f"{config.fisher!r} by the {config.fisher_unit} there is only the mean square. Pass "
            "criterion='fisher' (--criterion fisher)."
        )


def _fish_problems(config: SearchConfig) -> Iterator[str]:
    """Other readings than FISH's, where FISH is asked for."""
    if config.strategy != "fish":
        return
    usual = {"criterion": (None, "fisher"), "ceiling": (None,), "skip": (0,)}
    for name, values in usual.items():
        if (value := getattr(config, name)) not in values:
            yield (
                f"{name} is {value!r}, but strategy is 'fish', which takes the largest mean "
                f"squares. Leave {name} out, or pass strategy='walk' (--strategy walk)."
            )
