"""Whose labels: F of the model's own distribution, of draws from it, and by the token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ird_search.api import fisher_scores, search_mask
from ird_search.config import SearchConfig
from ird_search.errors import UsageError
from ird_search.fisher import Contribution, Engine, FisherMatrix, LabelRule, PassRecord, make_engine
from ird_search.fisher.columns import Columns
from ird_search.fisher.combined import Terms, squared_together
from ird_search.fisher.gradients import Dense, Outer
from ird_search.fisher.labels import Drawn, Weighted
from ird_search.ledger import Ledger
from ird_search.opening import open_fisher
from ird_search.reading import Reading
from ird_search.run import Run
from ird_search.samples import Batch, SampleSet
from ird_search.task import IGNORED, CausalLM, Classification, Regression, logits_of
from tests.cases import Problem, named, problem, prompts, vectors
from tests.models import t5
from tests.reference import fisher, relative_error
from tests.toy import toy_problem

CLOSE = 1e-5
CPU = torch.device("cpu")


def opened(p: Problem, **settings: Any) -> FisherMatrix:
    config = SearchConfig(**{"cache_mb": 0, "min_samples": 1} | settings)
    return open_fisher(p.model, p.task, p.space, p.samples, config, CPU)


def rule_of(m: FisherMatrix) -> LabelRule:
    assert m.labels is not None
    return m.labels


def by_row(p: Problem, terms: Callable[[Tensor, Tensor, int], Iterator[Tensor]]) -> Tensor:
    """Σ over the terms of an unpadded row of their gradients' squares: float64 [N, P]."""
    rows = []
    for i in range(len(p.samples)):
        alone = p.samples.batch([i])
        total = torch.zeros(p.space.numel, dtype=torch.float64)
        for term in terms(logits_of(p.model, alone.inputs)[0], alone.labels[0], i):
            # Each from a graph that is kept: a row's terms share one forward pass.
            weights = [p.model.get_parameter(name) for name in p.space.names]
            grads = torch.autograd.grad(
                term, weights, allow_unused=True, materialize_grads=True, retain_graph=True
            )
            total += torch.cat([g.reshape(-1).double() for g in grads]).square()
        rows.append(total)
    return torch.stack(rows)


def over_classes(logits: Tensor, label: Tensor, row: int) -> Iterator[Tensor]:
    """√p(y) log p(y) for each class, written out."""
    logs = logits.log_softmax(-1)
    for y in range(len(logs)):
        yield float(logs[y].detach().exp()) ** 0.5 * logs[y]


def over_tokens(logits: Tensor, labels: Tensor, row: int) -> Iterator[Tensor]:
    """log p(y_t | y_<t) of each target, written out."""
    for t in range(1, len(labels)):
        if labels[t] != IGNORED:
            yield logits[t - 1].log_softmax(-1)[labels[t]]


def drawn_labels(p: Problem, rule: LabelRule, row: int) -> list[Tensor]:
    """The labels that are drawn for one row, alone in its batch."""
    alone = p.samples.batch([row])
    with torch.no_grad():
        logits = logits_of(p.model, alone.inputs)
    noise = LabelRule(p.task, "sampled", "sequence", rule.draws, rule.seed).terms(p.samples, alone)
    return [p.task.drawn(logits, one)[0] for one in noise]


def check(m: FisherMatrix, f: Tensor) -> None:
    """Both marginals, whole and in part, without a tile."""
    rows, columns = torch.tensor([4, 0, 3]), torch.arange(0, f.shape[1], 3)
    few = columns[:: max(1, len(columns) // 20)].contiguous()
    found = m.marginals()
    assert relative_error(found.columns, f.mean(0)) <= CLOSE
    assert relative_error(found.rows, f.sum(1)) <= CLOSE
    for some in (columns, few):
        part = f[rows][:, some]
        assert relative_error(m.row_scores(rows, some), part.sum(1)) <= CLOSE
        assert relative_error(m.column_scores(rows, some), part.mean(0)) <= CLOSE


# --- the data's labels -----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("name", ["mlp", "bert-sdpa", "gpt2"])
def test_by_default_the_bits_are_those_of_the_engine_alone(name: str, method: str) -> None:
    p = named(name)
    example = p.samples.batch(range(6))
    engine = make_engine(p.model, p.task, p.space, example=example, method=method)
    plain = FisherMatrix(engine, p.samples, p.space, cache_bytes=0)
    m = opened(p, method=method)
    rows, columns = torch.arange(6), torch.arange(0, p.space.numel, 5)
    assert (m.engine.path, rule_of(m).about) == (plain.engine.path, [])
    wanted, found = plain.column_moments(rows), m.column_moments(rows)
    assert wanted.mean is not None and found.mean is not None
    assert torch.equal(found.square, wanted.square) and torch.equal(found.mean, wanted.mean)
    assert torch.equal(m.row_scores(rows, columns), plain.row_scores(rows, columns))
    assert relative_error(found.square, fisher(p.model, p.task, p.samples, p.space).mean(0)) < 1e-4


# --- all labels that the model gives a probability ----------------------------------------------


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("tokens-first", "auto"),
        *((n, m) for n in ("mlp", "bert-sdpa") for m in ("auto", "vmap", "loop")),
    ],
)
def test_expected_equals_a_loop_over_labels(name: str, method: str) -> None:
    p = named(name)
    m = opened(p, fisher="expected", method=method)
    assert m.engine.path == (
        method if method != "auto" else "taps+vmap" * (name == "tokens-first") or "taps"
    )
    check(m, by_row(p, over_classes))


@pytest.mark.parametrize(("tokens", "cache_mb"), [(1, 0), (16, 1), (10_000, 2048)])
def test_neither_batches_nor_what_is_kept_matter(tokens: int, cache_mb: int) -> None:
    p = named("bert-sdpa")
    f = by_row(p, over_classes)
    m = opened(p, fisher="expected", fisher_tokens=tokens, cache_mb=cache_mb)
    check(m, f)
    counts = torch.tensor([[2, 0, 1, 1, 2, 0], [1, 1, 1, 1, 1, 1]])
    columns = torch.arange(0, p.space.numel, 7)
    for moments, drawn in zip(
        m.resampled(torch.arange(6), columns, counts, mean=False), counts, strict=True
    ):
        wanted = (drawn[:, None] * f[:, columns]).sum(0) / drawn.sum()
        assert relative_error(moments.square, wanted) <= CLOSE


def test_two_classes_by_hand() -> None:
    # z = Wx + b: ∂ log p(y) / ∂b = e_y − p, so E_y over classes is p₀ p₁ in every entry of b
    # (p₀ (1 − p₀)² + p₁ p₀² = p₀ p₁), and p₀ p₁ x² in W.
    model = nn.Linear(2, 2)
    model.load_state_dict({"weight": torch.tensor([[1.0, 0], [0, 1]]), "bias": torch.zeros(2)})
    x = torch.tensor([2.0, 1.0])  # z = (2, 1): p₀ = 1 / (1 + e⁻¹)
    samples = SampleSet(({"input": x},), torch.tensor([0]), torch.arange(1))
    p = problem(model, Classification(2), samples)
    p0 = 1 / (1 + 2.718281828459045**-1)
    both = p0 * (1 - p0)
    found = opened(p, fisher="expected").marginals()
    wanted = both * torch.tensor([4.0, 1, 4, 1, 1, 1])
    torch.testing.assert_close(found.columns, wanted)
    assert float(found.rows[0]) == pytest.approx(both * 12)
    gold = opened(p).marginals().columns  # the label is the likelier one: (1 − p₀)²
    torch.testing.assert_close(gold, (1 - p0) ** 2 * torch.tensor([4.0, 1, 4, 1, 1, 1]))


class Barred(nn.Linear):
    """Gives one class no probability."""

    def __init__(self, barred: int) -> None:
        super().__init__(4, 3)
        self.register_buffer("bar", torch.zeros(3).index_fill(0, torch.tensor(barred), -torch.inf))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.get_buffer("bar")


@pytest.mark.parametrize("barred", [0, 2])
@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
def test_a_class_without_probability_adds_nothing(method: str, barred: int) -> None:
    p = problem(Barred(barred), Classification(3), vectors(4))

    def over_others(logits: Tensor, label: Tensor, row: int) -> Iterator[Tensor]:
        return over_classes(logits[logits > -torch.inf], label, row)

    m = opened(p, fisher="expected", method=method)
    check(m, by_row(p, over_others))
    assert not m.excluded


def test_the_label_of_the_data_does_not_matter() -> None:
    p = named("mlp")
    others = SampleSet(p.samples.inputs, (p.samples.labels + 1) % 3, p.samples.ids)
    turned = Problem(p.model, p.task, others, p.space)
    for kind in ("expected", "sampled"):
        one, two = opened(p, fisher=kind).marginals(), opened(turned, fisher=kind).marginals()
        assert torch.equal(one.columns, two.columns)
    assert not torch.equal(opened(p).marginals().columns, opened(turned).marginals().columns)


@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
def test_expected_regression_is_the_square_of_the_jacobian(method: str) -> None:
    p = named("regression")
    wanted = by_row(p, lambda logits, label, row: iter([logits.sum()]))
    check(opened(p, fisher="expected", method=method), wanted)


def test_gaussian_regression_by_hand() -> None:
    # f = w x + b at x = 3: (∂f/∂w)² = 9, (∂f/∂b)² = 1, whatever y is; gold: times (y − f)².
    model = nn.Linear(1, 1)
    model.load_state_dict({"weight": torch.tensor([[2.0]]), "bias": torch.tensor([1.0])})
    samples = SampleSet(({"input": torch.tensor([3.0])},), torch.tensor([5.0]), torch.arange(1))
    p = problem(model, Regression(), samples)
    for kind, times in (("expected", 1.0), ("empirical", (5.0 - 7.0) ** 2)):
        found = opened(p, fisher=kind).marginals().columns
        torch.testing.assert_close(found, times * torch.tensor([9.0, 1.0]))
    m = opened(p, fisher="sampled")
    (noise,) = rule_of(m).terms(p.samples, p.samples.batch([0]))
    torch.testing.assert_close(m.marginals().columns, noise**2 * torch.tensor([9.0, 1.0]))


# --- labels drawn from the model -----------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("name", ["mlp", "regression", "gpt2"])
def test_sampled_equals_a_loop_over_draws(name: str, method: str) -> None:
    p = named(name)
    m = opened(p, fisher="sampled", fisher_draws=3, method=method)
    labels = [drawn_labels(p, rule_of(m), row) for row in range(6)]
    if isinstance(p.samples.labels, tuple):
        for row, gold in enumerate(p.samples.labels):
            assert all(torch.equal(y == IGNORED, gold == IGNORED) for y in labels[row])

    def terms(logits: Tensor, label: Tensor, row: int) -> Iterator[Tensor]:
        for y in labels[row]:
            yield p.task.log_likelihood(logits[None], y[None]).sum() / 3**0.5

    check(m, by_row(p, terms))


class Bigrams(nn.Module):
    """The smallest language model: the next token from this one."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(40, 3), nn.Linear(3, 40)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.out(self.table(input_ids))


def few(name: str) -> Problem:
    """Two samples and a model of a few weights."""
    if name == "tokens":
        rows = prompts()
        p = problem(Bigrams(), CausalLM(), rows, ["out.weight"])
    elif name == "numbers":
        p = problem(nn.Linear(4, 1), Regression(), vectors(4, classes=0))
    else:
        p = problem(nn.Linear(4, 3), Classification(3), vectors(4))
    return Problem(p.model, p.task, p.samples.select([0, 1]), p.space)


def over_all_tokens(logits: Tensor, labels: Tensor, row: int) -> Iterator[Tensor]:
    """√p log p for each target and each token of the vocabulary, written out."""
    for t in range(1, len(labels)):
        if labels[t] != IGNORED:
            yield from over_classes(logits[t - 1], labels[t], row)


@pytest.mark.parametrize("name", ["classes", "numbers", "tokens"])
def test_many_draws_come_near_what_is_expected(name: str) -> None:
    p = few(name)
    # Targets of a language model are drawn each by itself: in expectation their products vanish,
    # and the square of the sum is the sum of what is expected of each token.
    f = by_row(p, over_all_tokens).mean(0) if name == "tokens" else None
    f = opened(p, fisher="expected").marginals().columns if f is None else f
    errors = [
        relative_error(opened(p, fisher="sampled", fisher_draws=n).marginals().columns, f)
        for n in (4, 300)
    ]
    assert errors[1] < 0.3 and errors[1] < errors[0]


def opened_rows(p: Problem, **settings: Any) -> Tensor:
    """F, row by row."""
    m = opened(p, **settings)
    return torch.stack([m.column_scores(torch.tensor([i])) for i in range(len(p.samples))])


@pytest.mark.parametrize("name", ["bert-sdpa", "gpt2"])
def test_draws_are_keyed_by_the_sample(name: str) -> None:
    p = named(name)
    wanted = opened_rows(p, fisher="sampled", fisher_draws=2, fisher_tokens=10_000)
    again = opened_rows(p, fisher="sampled", fisher_draws=2, fisher_tokens=1)
    assert relative_error(opened_rows(p), wanted) > 100 * CLOSE  # the data has other labels
    assert relative_error(again, wanted) <= CLOSE
    order = torch.tensor([3, 5, 0])
    turned = Problem(p.model, p.task, p.samples.select(order), p.space)
    found = opened_rows(turned, fisher="sampled", fisher_draws=2)
    assert relative_error(found, wanted[order]) <= CLOSE
    there = opened(p, fisher="sampled", fisher_draws=2).on(p.samples.select(order)).marginals()
    assert relative_error(there.columns, wanted[order].mean(0)) <= CLOSE
    seeds = [opened(p, fisher="sampled", seed=seed).marginals().rows for seed in (0, 0, 1)]
    assert torch.equal(seeds[0], seeds[1]) and not torch.equal(seeds[0], seeds[2])


def test_a_draw_more_keeps_the_earlier_ones() -> None:
    p = named("gpt2")
    batch = p.samples.batch([2, 1])
    few, more = (LabelRule(p.task, "sampled", draws=n).terms(p.samples, batch) for n in (2, 5))
    assert len(more) == 5 and all(torch.equal(a, b) for a, b in zip(few, more, strict=False))


def test_draws_follow_the_distribution() -> None:
    logits = torch.randn(1, 5).expand(20_000, 5)
    noise = torch.rand(20_000)
    shares = Classification(5).drawn(logits, noise).bincount(minlength=5) / 20_000
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=0.015, rtol=0)
    edges = Classification(5).drawn(logits[:2], torch.tensor([0.0, 1.0]))
    assert edges.tolist() == [0, 4]
    values = Regression().drawn(torch.full((3, 1), 2.0), torch.tensor([0.0, 1, -1]))
    assert values.tolist() == [2, 3, 1]


# --- by the token ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_tokens_equal_a_loop_over_them(method: str, side: Any) -> None:
    p = named("gpt2")
    s = p.samples
    if side == "left":  # with positions, or absolute ones would differ
        inputs = tuple({**i, "position_ids": torch.arange(len(i["input_ids"]))} for i in s.inputs)
        s = SampleSet(inputs, s.labels, s.ids, pad_side="left")
    assert isinstance(s.labels, tuple)
    s.labels[2][5] = IGNORED  # in the middle
    s.labels[4][:] = IGNORED  # nothing to predict
    p = Problem(p.model, p.task, s, p.space)
    f = by_row(p, over_tokens)
    assert not f[4].any()
    for tokens in (1, 30) if method == "auto" else (30,):
        m = opened(p, fisher_unit="token", method=method, fisher_tokens=tokens)
        assert relative_error(m.marginals().columns, f.mean(0)) <= CLOSE
        assert relative_error(m.row_scores(torch.tensor([4, 2]))[1:], f[2:3].sum(1)) <= CLOSE
    assert relative_error(opened(p).marginals().columns, f.mean(0)) > 0.05


def test_a_sampled_token_is_drawn_behind_the_datas_prefix() -> None:
    p = named("gpt2")
    p = Problem(p.model, p.task, p.samples.select([1, 3, 0]), p.space)
    m = opened(p, fisher="sampled", fisher_draws=2, fisher_unit="token")
    labels = [drawn_labels(p, rule_of(m), row) for row in range(3)]

    def terms(logits: Tensor, label: Tensor, row: int) -> Iterator[Tensor]:
        for y in labels[row]:
            yield from (term / 2**0.5 for term in over_tokens(logits, y, row))

    assert relative_error(m.marginals().columns, by_row(p, terms).mean(0)) <= CLOSE


@pytest.mark.parametrize("settings", [{}, {"fisher": "sampled", "fisher_draws": 2}])
def test_targets_that_are_not_shifted(settings: dict[str, Any]) -> None:
    """Of an encoder-decoder the first label is a target, too."""
    p = t5("sdpa")
    p = problem(p.model, p.task, p.samples.select([4, 2]), [n for n in p.space.names if ".k." in n])
    m = opened(p, fisher_unit="token", **settings)
    golds = [[y] for y in p.samples.labels]
    labels = [drawn_labels(p, rule_of(m), row) for row in (0, 1)] if settings else golds

    def terms(logits: Tensor, label: Tensor, row: int) -> Iterator[Tensor]:
        for y in labels[row]:
            for t in range(len(y)):
                yield logits[t].log_softmax(-1)[y[t]] / len(labels[row]) ** 0.5

    assert relative_error(m.marginals().rows, by_row(p, terms).sum(1)) <= CLOSE


# --- what is refused -----------------------------------------------------------------------------


def test_what_a_task_cannot_do_is_told_at_once() -> None:
    with pytest.raises(UsageError, match=r"at every token\. Pass fisher='sampled'"):
        LabelRule(CausalLM(), "expected")
    with pytest.raises(UsageError, match="fisher_unit is 'token', which needs a language model"):
        LabelRule(Classification(2), unit="token")
    rows = [(torch.randn(3), i % 2) for i in range(40)]
    model = nn.Linear(3, 2)
    with pytest.raises(UsageError, match="is classification, with one label a sample"):
        fisher_scores(model, rows, head=[], fisher_unit="token")
    with pytest.raises(UsageError) as e:
        search_mask(model, rows, head=[], fisher_unit="token", pool=1000, density=0.5)
    assert str(e.value).startswith("2 problems:") and e.value.exit_code == 2


def test_settings_that_make_no_sense_together_are_told_at_once() -> None:
    with pytest.raises(UsageError) as e:
        SearchConfig(fisher="expected", fisher_draws=3, criterion="snr")
    text = str(e.value)
    assert text.startswith("2 problems:") and "fisher_draws is 3, but fisher is 'exp" in text
    assert "criterion is 'snr', which needs the mean gradient" in text
    with pytest.raises(UsageError, match="by the token there is only the mean square"):
        SearchConfig(fisher_unit="token", criterion="decrease")
    config = SearchConfig(fisher="sampled", fisher_draws=3, criterion="fisher")
    assert config.varied == ("ceiling", "skip") and SearchConfig().varied == SearchConfig().vary
    assert Reading.of(SearchConfig(fisher="expected")).criterion == "fisher"


def test_a_mean_that_is_not_there_is_refused() -> None:
    p = named("mlp")
    m, rows = opened(p, fisher="expected"), torch.arange(6)
    with pytest.raises(UsageError, match="not there with expected labels by the sequence"):
        m.column_moments(rows)
    with pytest.raises(UsageError, match="not there"):
        next(m.resampled(rows, rows, torch.ones(1, 6)))
    with pytest.raises(ValueError, match="no mean gradient"):
        Terms((Dense(torch.ones(1, 2)),)).add_squares(torch.zeros(2), means=torch.zeros(2))


def test_every_choice_has_its_own_address() -> None:
    task = CausalLM()
    rules = [
        LabelRule(task, "empirical"),
        LabelRule(task, "empirical", "token"),
        LabelRule(task, "sampled"),
        LabelRule(task, "sampled", "token"),
        LabelRule(task, "sampled", draws=2),
        LabelRule(task, "sampled", seed=1),
        LabelRule(Classification(2), "expected"),
    ]
    found = [str(rule.about) for rule in rules]
    assert len(set(found)) == len(found) and found[0] == "[]"


# --- a search ------------------------------------------------------------------------------------


def test_a_search_and_the_scores_take_the_setting() -> None:
    rows = [(torch.randn(4), i % 2) for i in range(64)]
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    short: dict[str, Any] = {"pool": 16, "proxy_steps": 2, "warmup_steps": 2, "rounds": 1}
    short |= {"seeds": 1, "density": 0.2, "controls": ["fish"], "min_samples": 4}
    found = search_mask(net, rows, **short, fisher="expected")
    assert found.winner.pair.reading.criterion == "fisher" and found.mask.count == 6
    assert found.provenance["search"]["fisher"] == "expected"
    kinds = [fisher_scores(net, rows, head=[], fisher=k) for k in ("empirical", "expected")]
    assert not torch.equal(kinds[0].by_sample, kinds[1].by_sample)


# --- the parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("many", [2, 9])
def test_terms_answer_as_the_sum_of_their_squares(many: int) -> None:
    parts = [Outer(torch.randn(3, 2, 8), torch.randn(3, 2, 10)) for _ in range(many)]
    held: Any = parts[0]
    for part in parts[1:]:
        held = squared_together(held, part)
    assert isinstance(held, Terms) == (many == 2)  # nine pairs of factors are larger than the root
    f = torch.stack([part.dense().square() for part in parts]).sum(0)
    assert (held.batch, held.numel) == (3, 80)
    torch.testing.assert_close(held.dense().square(), f)
    for k in (0, 5, 80):
        columns = Columns(torch.randperm(80)[:k].sort().values, 80)
        wanted, sums = f[:, columns.index], torch.ones(80)
        torch.testing.assert_close(held.entries(columns).square(), wanted)
        torch.testing.assert_close(held.square_norms(columns), wanted.sum(1))
        torch.testing.assert_close(held.add_squares(sums, columns), wanted.sum(1))
        torch.testing.assert_close(sums, 1 + f.sum(0))
    torch.testing.assert_close(held.select(torch.tensor([2, 0])).dense().square(), f[[2, 0]])


def test_a_sample_that_is_not_finite_under_one_label_is_left_out_whole() -> None:
    class Steep(Classification):
        def log_likelihood(self, logits: Tensor, labels: Tensor) -> Tensor:
            values = super().log_likelihood(logits, labels)
            odd = (labels == 1) & (logits[:, 0].detach() > 1e3)
            return values + torch.where(odd, torch.nan, 0.0)

    rows = vectors(4, classes=2)
    more = rows.select(torch.arange(120) % 6)
    inputs = [dict(row) for row in more.inputs]
    inputs[7] = {"input": torch.full((4,), 1e6)}
    model = nn.Linear(4, 2)
    nn.init.ones_(model.weight[0])
    samples = SampleSet(tuple(inputs), more.labels, torch.arange(120))
    p = problem(model, Steep(2), samples)
    m = opened(p, fisher="expected")
    found = m.marginals()
    assert m.excluded == {7} and found.rows[7] == -torch.inf
    good = torch.tensor([i for i in range(120) if i != 7])
    alone = Problem(model, p.task, samples.select(good), p.space)
    assert (
        relative_error(found.columns, opened(alone, fisher="expected").marginals().columns) < CLOSE
    )


@pytest.mark.parametrize("kind", [Weighted, Drawn])
def test_what_weighs_a_term_is_held_fixed(kind: Any) -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    labels = torch.tensor([1, 2]) if kind is Weighted else torch.tensor([0.2, 0.9])
    task = Classification(3)
    (found,) = torch.autograd.grad(kind(task).log_likelihood(logits, labels).sum(), logits)
    y = labels if kind is Weighted else task.drawn(logits.detach(), labels)
    p = logits.detach().softmax(-1)
    weight = p.gather(1, y[:, None]).sqrt() if kind is Weighted else 1
    torch.testing.assert_close(found, weight * (nn.functional.one_hot(y, 3) - p))


# --- interruptions, memory, and other runs -------------------------------------------------------


class Faulty:
    """An engine that stops at its n-th batch, or cannot hold more than a few rows."""

    def __init__(self, engine: Engine, *, stop: int = 0, most: int = 100) -> None:
        self.engine, self.stop, self.most, self.batches = engine, stop, most, 0
        self.path, self.names = engine.path, engine.names

    def gradients(self, batch: Batch) -> Iterator[Contribution]:
        self.batches += 1
        if self.batches == self.stop:
            raise KeyboardInterrupt
        if len(batch) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.engine.gradients(batch)


def faulty(
    p: Problem, rule: LabelRule, record: PassRecord | None, *, tokens: int = 16, **faults: int
) -> FisherMatrix:
    example = rule.example(p.samples, torch.arange(3), CPU)
    engine = Faulty(make_engine(p.model, rule.likelihood, p.space, example=example), **faults)
    settings: dict[str, Any] = {"tokens": tokens, "cache_bytes": 0, "record": record}
    return FisherMatrix(engine, p.samples, p.space, labels=rule, **settings)


@pytest.mark.parametrize("stop", [2, 5])
def test_a_pass_over_terms_goes_on_bit_for_bit(stop: int, tmp_path: Path) -> None:
    p = named("bert-sdpa")
    rule = LabelRule(p.task, "sampled", draws=3)
    whole = faulty(p, rule, None)
    wanted = whole.marginals()
    assert isinstance(whole.engine, Faulty) and whole.engine.batches >= 9

    def matrix(**faults: int) -> FisherMatrix:
        return faulty(p, rule, PassRecord(Ledger(tmp_path), {"of": "a test"}, every=0), **faults)

    with pytest.raises(KeyboardInterrupt):
        matrix(stop=stop).marginals()
    rest = matrix()
    found = rest.marginals()
    assert torch.equal(found.rows, wanted.rows) and torch.equal(found.columns, wanted.columns)
    assert isinstance(rest.engine, Faulty) and rest.engine.batches < whole.engine.batches + stop


@pytest.mark.parametrize("most", [1, 2])
def test_memory_that_runs_out_counts_no_term_twice(most: int) -> None:
    p = named("mlp")
    rule = LabelRule(p.task, "expected")
    m = faulty(p, rule, None, tokens=10_000, most=most)
    found = m.marginals()
    assert relative_error(found.columns, by_row(p, over_classes).mean(0)) <= CLOSE


def test_runs_with_another_fisher_share_no_narrowing(tmp_path: Path) -> None:
    ledger, seen = Ledger(tmp_path), []
    settings: dict[str, Any] = {"criterion": "fisher", "strategy": "ladder", "controls": ()}
    for kind in ("empirical", "expected", "sampled", "empirical", "expected"):
        toy, config = toy_problem(**settings, fisher=kind)
        found = Run(toy, config, ledger).result()
        seen.append((sum(1 for _ in ledger.finished("narrowing")), found.samples.scores))
    counts = [count for count, _ in seen]
    assert 0 < counts[0] < counts[1] < counts[2] == counts[3] == counts[4]
    assert torch.equal(seen[1][1], seen[4][1]) and torch.equal(seen[0][1], seen[3][1])
