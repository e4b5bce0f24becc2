"""Controls: masks that are drawn as they should be, and LoRA that leaves no trace."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ird_search import controls as module
from ird_search import finetunes
from ird_search.budgets import Budgets
from ird_search.candidate import Attempt, Candidate
from ird_search.config import DataConfig, Granularity, SearchConfig
from ird_search.consumers.peft import control
from ird_search.consumers.peft.control import Lora, lora_of_size
from ird_search.controls import Controls, Rivals, fish_samples, random_mask, shuffled
from ird_search.errors import UsageError
from ird_search.evaluation import evaluate
from ird_search.fisher import FisherMatrix, make_engine
from ird_search.granularity import Units
from ird_search.ledger import Ledger
from ird_search.mask import SparseMask
from ird_search.narrowing import Narrowings
from ird_search.pair import Pair, Scored
from ird_search.parameters import ParameterSpace, candidate_space, head_parameters
from ird_search.problem import make_problem
from ird_search.proxy import Proxies
from ird_search.selector import Selector
from tests.cases import texts
from tests.tiny import TEXT_ROWS, tiny_bert, tiny_gpt2, tiny_tokenizer, tiny_vit
from tests.toy import QUICK, bits, same_bits, scored, toy_mask, toy_net, toy_proxies

ROWS = torch.tensor([1, 3, 5])


def rivals_of(proxies: Proxies, mask: SparseMask) -> tuple[Rivals, FisherMatrix]:
    """The rivals of a mask from three rows of a pool of twelve, and F over the pool."""
    p = proxies.problem
    pool = p.train.select(range(12))
    engine = make_engine(p.model, p.task, p.space, example=pool.batch([0, 1]))
    fisher = FisherMatrix(engine, pool, p.space)
    selector = Selector(Budgets.of(p.space, ()))
    narrowings = Narrowings(lambda: fisher, selector, proxies.ledger, {})
    winner = Scored("both", Pair(ROWS, None, mask.coords), mask, scored(0.4, rate=0.02))
    return Rivals(winner, proxies, narrowings), fisher


def toy_rivals(**settings: Any) -> tuple[Rivals, FisherMatrix]:
    proxies = toy_proxies(**{"controls": SearchConfig().controls, **settings})
    return rivals_of(proxies, toy_mask(proxies.problem, 0, 3, 9, 35))


def largest(scores: Tensor, k: int) -> list[int]:
    """Slow and obvious: by score, then by index."""
    return sorted(sorted(range(len(scores)), key=lambda j: (-float(scores[j]), j))[:k])


# --- masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "shuffle"])
def test_masks_by_chance_differ_from_seed_to_seed_and_are_drawn_again_alike(kind: Any) -> None:
    (rivals, _), (again, _), (other, _) = toy_rivals(), toy_rivals(), toy_rivals(seed=1)
    drawn = [rivals[kind](s).mask for s in range(4)]
    assert len({m.digest for m in drawn}) == 4 and {m.count for m in drawn} == {4}
    assert [again[kind](s).mask for s in range(4)] == drawn
    assert [other[kind](s).mask for s in range(4)] != drawn
    assert {rivals[kind](s).kind for s in range(4)} == {kind}


@pytest.mark.parametrize("granularity", ["row", "column", "block"])
def test_where_units_are_whole_so_are_those_drawn_by_chance(granularity: Granularity) -> None:
    space = ParameterSpace(("a", "b"), ((6, 4), (5,)))
    units = Units(space, granularity, 2)
    taken, size = torch.zeros(space.numel), {"row": 4, "column": 6, "block": 4}[granularity]
    for s in range(60):
        mask = random_mask(space, 15, 0, s, units)
        assert 15 - size < mask.count <= 15
        assert units.whole(mask.coords, None).tolist() == mask.coords.tolist()
        taken[mask.coords] += 1
        again = shuffled(mask, 0, s, units)
        assert units.whole(again.coords, None).tolist() == again.coords.tolist()
        counts = [{n: i.numel() for n, i in m.indices.items()} for m in (mask, again)]
        assert counts[0] == counts[1]
    assert taken.min() > 5  # none is out of reach
    assert random_mask(space, 15, 0, 0, units) != random_mask(space, 15, 0, 1, units)


def test_a_shuffled_mask_has_the_winners_counts_and_any_entries() -> None:
    space = ParameterSpace(("a", "b", "c"), ((2, 3), (4,), (5,)))
    mask = SparseMask(space, torch.tensor([0, 1, 10, 11, 12, 13, 14]))
    seen = torch.zeros(space.numel)
    for s in range(200):
        drawn = shuffled(mask, 0, s)
        assert {n: i.numel() for n, i in drawn.indices.items()} == {"a": 2, "c": 5}
        seen[drawn.coords] += 1
    assert bool((seen[:6] > 40).all()) and not seen[6:10].any()  # 200 · 2/6 is 67
    assert bool((seen[10:] == 200).all())
    empty = SparseMask(space, torch.empty(0, dtype=torch.int64))
    assert shuffled(empty, 0, 0).count == 0


def test_fish_draws_its_rows_from_the_training_samples() -> None:
    rivals, fisher = toy_rivals()
    train, rows = rivals.proxies.problem.train, set[tuple[int, ...]]()
    for s in range(4):
        samples = fish_samples(rivals.winner, train, seed=0, s=s)
        ids = tuple(samples.ids.tolist())
        assert len(ids) == 3 and set(ids) <= set(train.ids.tolist())
        rows.add(ids)
        found, mean = rivals.fish(s), fisher.on(samples).marginals().columns
        assert found.mask.coords.tolist() == largest(mean, 4) and found.samples == 3
    assert len(rows) == 4


def test_reversed_is_the_smallest_positive_scores_of_the_winners_rows() -> None:
    rivals, fisher = toy_rivals()
    scores = fisher.column_scores(ROWS)
    scores[scores == 0] = float("inf")
    assert rivals.reversed(0).mask.coords.tolist() == largest(-scores, 4)
    assert rivals.reversed(0).samples == 3 and rivals.reversed(1).mask == rivals.reversed(0).mask


def test_magnitude_is_the_largest_weights() -> None:
    rivals, _ = toy_rivals()
    weights = rivals.proxies.problem.space.flatten(dict(toy_net().named_parameters()))
    assert rivals.magnitude(0).mask.coords.tolist() == largest(weights.detach().abs(), 4)
    assert rivals.magnitude(0).samples is None


def test_controls_come_in_the_order_of_the_settings() -> None:
    asked = ("head", "magnitude", "lora", "random", "full")
    rivals, _ = toy_rivals(controls=asked)
    controls = Controls.of(rivals.winner, rivals.proxies, rivals.narrowings)
    assert tuple(controls.draws) == ("head", "magnitude", "random", "full")
    assert controls.left_out == {"lora": "the model is none of transformers"}
    assert [draw(0).kind for draw in controls.draws.values()] == list(controls.draws)


def test_without_peft_lora_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(module, "import_module", missing)
    rivals, _ = toy_rivals()
    controls = Controls.of(rivals.winner, rivals.proxies, rivals.narrowings)
    assert "lora" not in controls.draws and len(controls.draws) == 7
    assert controls.left_out["lora"].startswith("peft is not installed (pip install")


# --- LoRA of a size -------------------------------------------------------------------------------


def space_of(model: nn.Module, **patterns: Any) -> ParameterSpace:
    return candidate_space(model, head=head_parameters(model), **patterns)


BERT = tiny_bert()
"""Four query and value layers of 16 × 16, eight with key and output; four of 16 × 32."""


@pytest.mark.parametrize(
    ("count", "rank", "layers", "stored"),
    [
        (3 * 128 + 5, 3, 4, 384),  # one rank for query and value
        (448, 1, 12, 448),  # one rank for all comes nearer than three for these
        (10**6, 16, 12, 16 * 448),  # no rank is above min(m, n)
        (127, 1, 3, 96),  # too few for either: the last query and value layers
        (33, 1, 1, 32),
    ],
)
def test_the_rank_and_the_layers(count: int, rank: int, layers: int, stored: int) -> None:
    found = lora_of_size(BERT, space_of(BERT), count)
    assert (found.rank, len(found.modules), found.count) == (rank, layers, stored)
    sides = [sum(BERT.get_submodule(name).weight.shape) for name in found.modules]
    assert found.count == rank * sum(sides) <= count
    if layers == 3:
        assert [name.rpartition(".")[2] for name in found.modules] == ["value", "query", "value"]


def test_only_candidates_are_adapted() -> None:
    some = space_of(BERT, include=["layer.1.*dense"])
    found = lora_of_size(BERT, some, 1000)
    assert all("layer.1" in name and name.endswith("dense") for name in found.modules)


@pytest.mark.parametrize(
    ("model", "patterns", "count", "why"),
    [
        (toy_net, {}, 100, "the model is none of transformers"),
        (tiny_bert, {}, 31, "rank 1 of one layer is 32 parameters, the mask 31"),
        (tiny_bert, {"include": ["bias"]}, 100, "no candidate is the weight of a linear layer"),
    ],
)
def test_why_there_is_none(
    model: Callable[[], nn.Module], patterns: Any, count: int, why: str
) -> None:
    built = model()
    with pytest.raises(UsageError) as error:
        lora_of_size(built, space_of(built, **patterns), count)
    assert str(error.value) == why


def test_a_model_with_adapters_has_none() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"]))
    with pytest.raises(UsageError, match="the model holds adapters already"):
        lora_of_size(wrapped, ParameterSpace.of(wrapped, []), 100)


# --- LoRA for a time ------------------------------------------------------------------------------


def traces(model: nn.Module) -> list[Any]:
    """Everything by which one could tell that a model was touched, but for its values."""
    modules = [(name, id(m), m.training, sorted(vars(m))) for name, m in model.named_modules()]
    parameters = [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()]
    return [modules, parameters, list(model.state_dict()), torch.get_rng_state().tolist()]


def used(model: Any) -> Any:
    """In the middle of someone's training."""
    model.train()
    next(model.parameters()).requires_grad_(False)
    return model


@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2, tiny_vit])
def test_a_model_is_what_it_was_before(make: Callable[[], Any]) -> None:
    model = used(make())
    lora = lora_of_size(model, space_of(model), 500)
    before, touched = bits(model), traces(model)
    with lora.within(model, seed=3) as mask:
        assert mask.count == lora.count == mask.space.numel
        parts = mask.space.split(mask.space.flatten(dict(model.named_parameters())).detach())
        assert all(bool(t.any()) != ("lora_B" in name) for name, t in parts.items())
        assert {n for n, p in model.named_parameters() if p.requires_grad} == set(parts)
        with torch.no_grad():
            for name in parts:
                model.get_parameter(name).add_(1.0)
    assert same_bits(before, model) and traces(model) == touched


def test_also_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    model = used(tiny_bert())
    lora = lora_of_size(model, space_of(model), 500)
    before, touched, real = bits(model), traces(model), control.inject_adapter_in_model
    with pytest.raises(KeyboardInterrupt), lora.within(model, seed=3):
        raise KeyboardInterrupt
    assert same_bits(before, model) and traces(model) == touched

    def broken(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        raise RuntimeError

    monkeypatch.setattr(control, "inject_adapter_in_model", broken)
    with pytest.raises(RuntimeError), lora.within(model, seed=3):
        pass
    assert same_bits(before, model) and traces(model) == touched


def test_it_begins_where_the_model_is_and_a_is_drawn_from_the_seed() -> None:
    model = tiny_bert().eval()
    lora = lora_of_size(model, space_of(model), 500)
    batch = texts().batch([0, 1, 2]).inputs
    with torch.no_grad():
        plain = model(**batch).logits
        drawn = []
        for seed in (1, 1, 2):
            torch.rand(seed)  # the caller's random state is no part of it
            with lora.within(model, seed=seed) as mask:
                assert torch.equal(model(**batch).logits, plain)
                drawn.append(mask.space.flatten(dict(model.named_parameters())))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


# --- LoRA as a proxy ------------------------------------------------------------------------------


def text_proxies(directory: Path | None = None) -> Proxies:
    config = SearchConfig(**QUICK)
    problem = make_problem(
        tiny_bert(),
        TEXT_ROWS * 6,
        options=DataConfig(),
        config=config,
        processor=tiny_tokenizer(),
    )
    return Proxies(problem, config, Ledger(directory))


def adapted(proxies: Proxies, count: int = 300) -> Candidate:
    lora = lora_of_size(proxies.problem.model, proxies.problem.space, count)
    return Candidate("lora", proxies.head_only().mask, adapter=lora)


def test_a_lora_proxy_trains_the_adapters_and_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    proxies = text_proxies()
    model, head = proxies.problem.model, proxies.problem.head
    before, touched, moved = bits(model), traces(model)[:-1], list[str]()

    def spy(*args: Any, **kwargs: Any) -> Any:
        for name, now in model.state_dict().items():
            plain = name.replace(".base_layer", "")
            if "lora" in name or not torch.equal(before[plain], now):
                moved.append(name)
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(finetunes, "evaluate", spy)
    candidate = adapted(proxies)
    trial = proxies.trial(candidate, 0.01)
    assert trial.ok and trial.losses is not None
    assert {name for name in moved if "lora" not in name} == set(head)
    assert sum("lora" in name for name in moved) == 2 * len(candidate.adapter.modules)  # type: ignore[union-attr]
    assert same_bits(before, model) and traces(model)[:-1] == touched
    monkeypatch.undo()
    alone = proxies.trial(proxies.head_only(), proxies.config.head_learning_rate)
    assert alone.loss != trial.loss  # the head alone is something else


def test_a_lora_proxy_is_a_unit_of_the_ledger(tmp_path: Path) -> None:
    proxies = text_proxies(tmp_path)
    attempts = [
        Attempt(adapted(proxies, count), 0.01, 3, seed) for count in (128, 256) for seed in (0, 1)
    ]
    first = proxies.trials(attempts)
    assert len({t.loss for t in first}) == len(proxies.ledger) == 4
    told = [unit.result["told"] for unit in proxies.ledger.finished("proxy")]
    assert sorted(t["parameters"] for t in told) == [128, 128, 256, 256]
    again = text_proxies(tmp_path)
    assert again.trials(attempts) == first and len(again.ledger) == 4
    anew = text_proxies()
    assert [t.loss for t in anew.trials(attempts)] == [t.loss for t in first]


def test_a_diverged_lora_is_a_failed_proxy_and_leaves_no_trace() -> None:
    proxies = text_proxies()
    before, touched = bits(proxies.problem.model), traces(proxies.problem.model)[:-1]
    trial = proxies.trial(adapted(proxies), 3e37)
    assert not trial.ok and not trial.raised and "diverged" in trial.failure
    assert same_bits(before, proxies.problem.model)
    assert traces(proxies.problem.model)[:-1] == touched


def test_what_it_is_as_plain_data() -> None:
    lora = Lora(2, ("a", "b"), 64)
    assert lora.about == {"lora": {"rank": 2, "modules": ("a", "b"), "count": 64}}
