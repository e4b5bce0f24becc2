"""Masks in PEFT's adapters: what is trained, saved, reloaded and merged is what was selected."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from ird_search.errors import ArtifactError, ModelError, UsageError
from ird_search.mask import SparseMask
from ird_search.optimizer import MaskedAdamW
from ird_search.parameters import ParameterSpace, candidate_space
from tests.tiny import VOCABULARY, tiny_bert, tiny_gpt2

peft = pytest.importorskip("peft", minversion="0.21")

from ird_search.consumers.peft import (  # noqa: E402
    Coverage,
    load_supertuning,
    rank_pattern,
    to_shira,
    to_supertuning,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]

HEAD = [
    "classifier.weight",
    "classifier.bias",
    "bert.pooler.dense.weight",
    "bert.pooler.dense.bias",
]


def uneven(model: nn.Module, **space: Any) -> SparseMask:
    """Every 2nd entry of one tensor, every 3rd of the next, …: each layer has its own density."""
    coordinates = candidate_space(model, embeddings=True, **space)
    steps = itertools.cycle(range(2, 9))
    parts = [
        torch.arange(span.start, span.stop, step)
        for span, step in zip(map(coordinates.span, coordinates.names), steps, strict=False)
    ]
    return SparseMask(coordinates, torch.cat(parts))


def bert() -> tuple[nn.Module, SparseMask]:
    """A tiny BERT without dropout, and a mask over everything but its head."""
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return model, uneven(model, head=HEAD)


def linears(model: nn.Module, mask: SparseMask) -> SparseMask:
    """The part of a mask that lies in the weights of linear layers."""
    names = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    inside = {name: t for name, t in mask.to_dict().items() if name in names}
    return SparseMask.from_dict(mask.space, inside)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def tokens(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, len(VOCABULARY), (4, 7), generator=generator)


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        target = torch.randn(1, generator=torch.Generator().manual_seed(step))
        (model(input_ids=tokens(step)).logits.float() - target).square().mean().backward()
        optimizer.step()


def adamw(model: nn.Module, **settings: Any) -> AdamW:
    return AdamW(trainable(model), **{"lr": 0.05, "weight_decay": 0.1, **settings})


def moved(before: dict[str, Tensor], model: nn.Module, mask: SparseMask) -> int:
    """How many of the selected entries changed."""
    after = weights(model)
    return sum(
        int((before[name] != after[name]).flatten()[index].sum())
        for name, index in mask.indices.items()
    )


# SuperTuning


@pytest.mark.parametrize("adapters", [1, 3, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_supertuning_from_mask_to_merge(
    dtype: torch.dtype, adapters: int | None, tmp_path: Path
) -> None:
    model, mask = bert()
    model = model.to(dtype)
    bare, held, before = copy.deepcopy(model), linears(model, mask), weights(model)
    wrapped, coverage = to_supertuning(model, mask, dense=HEAD, adapters=adapters)
    assert torch.equal(logits(wrapped), logits(copy.deepcopy(bare)))
    train(wrapped, adamw(wrapped))
    wrapped.save_pretrained(tmp_path)
    expected = logits(wrapped)
    if adapters == 1:
        reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path)
        assert torch.equal(logits(reloaded), expected)
    else:  # never a part of the mask
        with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json'"):
            peft.PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path)
    reloaded = load_supertuning(copy.deepcopy(bare), tmp_path)
    assert torch.equal(logits(reloaded), expected)
    assert not trainable(reloaded)
    for tuned in (wrapped, reloaded):
        merged = tuned.merge_and_unload()
        assert torch.equal(logits(merged), expected)
        assert held.verify(before, weights(merged), dense=HEAD) == []
        some = 0.5 if dtype == torch.bfloat16 else 1.0  # a coarse weight may round its change away
        assert moved(before, merged, held) >= some * held.count
    assert (coverage.held, coverage.lost) == (held.count, mask.count - held.count)


@pytest.mark.parametrize("adapters", [1, 2, None])
def test_supertuning_trains_as_the_mask_does(adapters: int | None) -> None:
    model, mask = bert()
    reference, held = copy.deepcopy(model), linears(model, mask)
    train(reference, MaskedAdamW(reference, held, lr=0.01, eps=1e-3, weight_decay=0.0, dense=HEAD))
    wrapped, _ = to_supertuning(model, mask, dense=HEAD, adapters=adapters)
    train(wrapped, adamw(wrapped, lr=0.01, eps=1e-3, weight_decay=0.0))
    merged = wrapped.merge_and_unload()
    for name, expected in reference.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), expected, rtol=0, atol=1e-6)


def test_repeats_change_no_bit_of_what_is_learnt() -> None:
    tuned = []
    for adapters in (1, 2, None):
        wrapped, _ = to_supertuning(*bert(), dense=HEAD, adapters=adapters)
        train(wrapped, adamw(wrapped))
        tuned.append(weights(wrapped.merge_and_unload()))
    for name, expected in tuned[0].items():
        assert all(torch.equal(expected, other[name]) for other in tuned[1:])


@pytest.mark.parametrize("optimizer", [adamw, lambda m: SGD(trainable(m), lr=0.1, momentum=0.9)])
def test_repeats_never_move_nor_count_in_the_norm(optimizer: Callable) -> None:
    model, mask = bert()
    held = linears(model, mask)
    wrapped, coverage = to_supertuning(model, mask)
    assert coverage.stored > held.count
    train(wrapped, optimizer(wrapped))
    indices = {n: b for n, b in wrapped.named_buffers() if "supertuning_indices" in n}
    for name, index in indices.items():
        values = wrapped.get_parameter(name.replace("indices", "values"))
        count = index.unique().numel()
        assert bool((values[:count] != 0).all()) and not bool(values[count:].any())
        assert bool((index[:count].diff() > 0).all())
        assert not bool(values.grad[count:].any())


@pytest.mark.parametrize("adapters", [1, 3])
def test_training_goes_on_after_a_reload(adapters: int, tmp_path: Path) -> None:
    model, mask = bert()
    bare = copy.deepcopy(model)
    whole, _ = to_supertuning(copy.deepcopy(bare), mask, dense=HEAD, adapters=adapters)
    train(whole, SGD(trainable(whole), lr=0.1), steps=2)
    whole.save_pretrained(tmp_path)
    train(whole, SGD(trainable(whole), lr=0.1), steps=2)
    resumed = load_supertuning(copy.deepcopy(bare), tmp_path, is_trainable=True)
    train(resumed, SGD(trainable(resumed), lr=0.1), steps=2)
    assert torch.equal(logits(resumed), logits(whole))


@pytest.fixture
def accelerator() -> Iterator[None]:
    """Leaves no state behind: every Trainer shares that of its accelerator with all later ones."""
    state = pytest.importorskip("accelerate.state")
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


@pytest.mark.usefixtures("accelerator")
def test_the_trainer_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    bare, mask = bert()

    def run(*, steps: int, resume: str | None = None) -> nn.Module:
        wrapped, coverage = to_supertuning(copy.deepcopy(bare), mask, dense=HEAD)
        assert coverage.stored > coverage.held
        arguments = TrainingArguments(
            tmp_path,
            max_steps=steps,
            save_steps=2,
            learning_rate=0.01,
            lr_scheduler_type="constant",
            weight_decay=0.1,
            per_device_train_batch_size=2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        rows = [{"input_ids": row, "labels": i % 2} for i, row in enumerate(tokens())]
        Trainer(wrapped, arguments, train_dataset=rows).train(resume_from_checkpoint=resume)
        return wrapped

    whole = run(steps=4)
    resumed = run(steps=4, resume=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(resumed), logits(whole))
    from_checkpoint = peft.PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path / "checkpoint-4")
    assert torch.equal(logits(from_checkpoint), logits(whole))
    before, merged = weights(bare), whole.merge_and_unload()
    assert linears(bare, mask).verify(before, weights(merged), dense=HEAD) == []


def test_training_after_a_plain_reload_moves_nothing_outside_the_mask(tmp_path: Path) -> None:
    model, mask = bert()
    bare, held, before = copy.deepcopy(model), linears(model, mask), weights(model)
    to_supertuning(model, mask)[0].save_pretrained(tmp_path)
    plain = peft.PeftModel.from_pretrained(bare, tmp_path, is_trainable=True)
    train(plain, adamw(plain))
    merged = plain.merge_and_unload()
    assert held.verify(before, weights(merged)) == []
    assert moved(before, merged, held) == held.count


def layers(*sizes: tuple[int, int, int]) -> tuple[nn.Module, SparseMask]:
    """Linear layers [m, n] with k selected entries, and no biases."""
    model = nn.Sequential(*(nn.Linear(n, m, bias=False) for m, n, _ in sizes))
    space = ParameterSpace.of(model)
    spans = [space.span(name) for name in space.names]
    picked = [s.start + torch.arange(k) for s, (_, _, k) in zip(spans, sizes, strict=True)]
    return model, SparseMask(space, torch.cat(picked))


SIZES = ((4, 4, 3), (8, 4, 30), (6, 6, 36), (5, 8, 1), (4, 8, 4), (8, 8, 9))


def test_adapters_are_cut_so_that_the_fewest_values_are_stored() -> None:
    """Against all ways to put six layers into a number of adapters."""

    def stored(group: tuple[tuple[int, int, int], ...]) -> int:
        density = max(Fraction(k, m * n) for m, n, k in group)
        return sum(int(m * n * density) for m, n, _ in group)

    best: dict[int, int] = {}
    for places in itertools.product(range(len(SIZES)), repeat=len(SIZES)):
        groups = [
            tuple(s for s, p in zip(SIZES, places, strict=True) if p == q) for q in set(places)
        ]
        total = sum(stored(group) for group in groups)
        best[len(groups)] = min(total, best.get(len(groups), total))
    for adapters in range(1, len(SIZES) + 1):
        model, mask = layers(*SIZES)
        wrapped, coverage = to_supertuning(model, mask, adapters=adapters)
        assert coverage.stored == min(best[n] for n in range(1, adapters + 1))
        assert coverage.stored == wrapped.get_nb_trainable_parameters()[0]
        assert len(wrapped.peft_config) == coverage.adapters <= adapters
    assert coverage.stored == mask.count


@pytest.mark.parametrize("count", range(1, 16))
def test_no_entry_is_lost_where_floats_fall_short_of_a_count(count: int) -> None:
    """In floating point, 15·(1 − (1 − k/15)) is below k for k = 1 … 5."""
    model, mask = layers((3, 5, count), (4, 4, 4))
    wrapped, coverage = to_supertuning(model, mask, adapters=None)
    picked = {
        f"{name}.weight": next(iter(module.supertuning_indices.values())).unique().tolist()
        for name, module in wrapped.get_base_model().named_modules()
        if hasattr(module, "supertuning_indices")
    }
    assert picked == {name: index.tolist() for name, index in mask.indices.items()}
    assert coverage.exact and coverage.stored == mask.count


def test_layers_of_one_density_share_an_adapter_without_repeats() -> None:
    model, mask = layers((4, 4, 4), (8, 4, 8), (4, 8, 2), (4, 4, 1))
    _, coverage = to_supertuning(model, mask, adapters=None)
    assert (coverage.stored, coverage.adapters) == (mask.count, 2)


# SHiRA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shira_from_mask_to_merge(dtype: torch.dtype, tmp_path: Path) -> None:
    model, mask = bert()
    model = model.to(dtype)
    bare, before = copy.deepcopy(model), weights(model)
    wrapped, coverage = to_shira(model, mask, r=2, dense=HEAD)
    held = SparseMask.from_dict(mask.space, shira_masks(wrapped))
    assert torch.equal(logits(wrapped), logits(copy.deepcopy(bare)))
    train(wrapped, adamw(wrapped))
    wrapped.save_pretrained(tmp_path)
    expected = logits(wrapped)
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path)
    assert torch.equal(logits(reloaded), expected)
    merged = reloaded.merge_and_unload()
    assert torch.equal(logits(merged), expected)
    assert held.verify(before, weights(merged), dense=HEAD) == []
    some = 0.5 if dtype == torch.bfloat16 else 1.0
    assert moved(before, merged, held) >= some * held.count
    assert json.loads((tmp_path / "adapter_config.json").read_text())["mask_type"] == "ird_mask"
    assert coverage.stored == held.count == coverage.held + coverage.added
    assert coverage.held == (held & mask).count and coverage.added == (held - mask).count
    assert coverage.lost == (mask - held).count > 0 and coverage.added > 0


def shira_masks(wrapped: nn.Module) -> dict[str, Tensor]:
    """What SHiRA layers train, as bool tensors by the bare names of their weights."""
    found = {}
    for name, module in wrapped.get_base_model().named_modules():
        if hasattr(module, "shira_indices"):
            found[f"{name}.weight"] = torch.zeros(module.weight.shape, dtype=torch.bool)
            found[f"{name}.weight"][tuple(module.shira_indices["default"].long())] = True
    return found


@pytest.mark.parametrize("by_score", [True, False])
def test_shira_keeps_and_adds_by_score(by_score: bool) -> None:
    """Selected entries come before others; within each, larger scores, then lower indices."""
    model, mask = layers(*SIZES)
    scores = torch.randint(4, (mask.space.numel,)).float()
    flat = scores if by_score else mask.space.flatten(weights(model)).abs()
    values = mask.space.split(flat)
    wrapped, coverage = to_shira(model, mask, r=1, scores=scores if by_score else None)
    picked = shira_masks(wrapped)
    for (m, n, k), name in zip(SIZES, mask.space.names, strict=True):
        chosen = set(mask.indices[name].tolist())
        value = values[name].flatten().tolist()
        order = sorted(range(m * n), key=lambda i: (i not in chosen, -value[i], i))
        assert sorted(order[: m + n]) == picked[name].flatten().nonzero().flatten().tolist()
        (account,) = (t for t in coverage.tensors if t.name == name)
        assert (account.held, account.added) == (min(k, m + n), max(0, m + n - k))


def test_shira_comes_nearest_to_the_count_by_default() -> None:
    model, mask = layers((16, 16, 100), (16, 8, 60))
    _, coverage = to_shira(model, mask)
    assert coverage.stored == 3 * (32 + 24)  # of 160: 2 would give 112 and 3 give 168


def test_shira_leaves_out_layers_that_are_too_small() -> None:
    model, mask = layers((16, 16, 100), (4, 4, 10))
    wrapped, coverage = to_shira(model, mask, r=3)
    assert coverage.describe() == (
        "SHiRA: 96 of 110 selected entries held, 14 lost, 0 others added; 96 numbers in 1 adapter\n"
        "  lost 10: fewer entries in the layer than r·(m + n), at r = 3 (1.weight)\n"
        "  lost 4: more entries than r·(m + n), at r = 3 (0.weight)"
    )
    assert isinstance(wrapped.get_base_model()[1], nn.Linear)


# LoRA


@pytest.mark.parametrize("budget", [200, 1000, 3000])
def test_ranks_follow_the_mask_within_the_budget(budget: int) -> None:
    model, mask = bert()
    held = linears(model, mask)
    arguments, coverage = rank_pattern(model, mask, budget=budget, dense=HEAD)
    shapes = {name: mask.space.shape(name) for name in held.indices}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**arguments))
    ranks = dict.fromkeys(shapes, 0)
    for name, module in wrapped.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            ranks[f"{name}.weight"] = module.r["default"]
            assert module.scaling["default"] == 1.0
    for name, rank in ranks.items():
        quota = budget * held.indices[name].numel() / held.count / sum(shapes[name])
        assert quota - 1 < rank < quota + 1
    parameters = sum(p.numel() for n, p in wrapped.named_parameters() if "lora_" in n)
    assert parameters == coverage.stored <= budget
    down = [
        sum(s)
        for n, s in shapes.items()
        if ranks[n] < budget * held.indices[n].numel() / held.count / sum(s)
    ]
    assert budget - parameters < min(down)
    adapted = [n for n, rank in ranks.items() if rank]
    assert coverage.held == sum(held.indices[n].numel() for n in adapted)
    assert coverage.held + coverage.added == sum(prod(shapes[n]) for n in adapted)
    assert {p for p, q in wrapped.named_parameters() if q.requires_grad and "lora_" not in p} == {
        f"base_model.model.{name.rpartition('.')[0]}.modules_to_save.default.{name.rpartition('.')[2]}"
        for name in HEAD
    }


def test_rank_patterns_train_save_and_reload(tmp_path: Path) -> None:
    model, mask = bert()
    bare, before = copy.deepcopy(model), weights(model)
    arguments, coverage = rank_pattern(model, mask, budget=600, dense=HEAD)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**arguments))
    train(wrapped, adamw(wrapped))
    wrapped.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(bare, tmp_path)
    assert torch.equal(logits(reloaded), logits(wrapped))
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
        == (arguments["rank_pattern"])
    )
    adapted = {t.name for t in coverage.tensors if t.held}
    after = weights(reloaded.merge_and_unload())
    assert {n for n in before if not torch.equal(before[n], after[n])} == adapted | set(HEAD)


def test_scores_share_the_budget_in_place_of_counts() -> None:
    model, mask = layers((4, 4, 6), (4, 4, 2))
    scores = torch.zeros(32)
    scores[mask.coords] = torch.tensor([0.5] * 6 + [4.5] * 2)  # 3 and 9
    assert rank_pattern(model, mask, budget=32)[0]["rank_pattern"] == {"^0": 3, "^1": 1}
    assert rank_pattern(model, mask, budget=32, scores=scores)[0]["rank_pattern"] == {
        "^0": 1,
        "^1": 3,
    }


def test_the_largest_fraction_is_rounded_up() -> None:
    model, mask = layers((4, 4, 5), (4, 4, 7))  # quotas 1.25 and 1.75
    assert rank_pattern(model, mask, budget=24)[0]["rank_pattern"] == {"^0": 1, "^1": 2}


def test_no_rank_exceeds_its_layer_and_the_rest_goes_to_others() -> None:
    model, mask = layers((4, 4, 14), (8, 8, 1), (8, 8, 1))
    arguments, coverage = rank_pattern(model, mask, budget=96)
    assert arguments["rank_pattern"] == {"^0": 4, "^1": 2, "^2": 2} and coverage.stored == 96
    arguments, coverage = rank_pattern(model, mask, budget=10_000)
    assert arguments["rank_pattern"] == {"^0": 4, "^1": 8, "^2": 8} and coverage.stored == 288


def test_ranks_of_gpt2_which_has_no_linear_layers() -> None:
    model = tiny_gpt2()
    mask = uneven(model)
    arguments, coverage = rank_pattern(model, mask, budget=1000)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**arguments))
    assert wrapped.get_nb_trainable_parameters()[0] == coverage.stored
    assert {t.reason for t in coverage.tensors if t.lost} == {
        "weight of Embedding",
        "weight of LayerNorm",
        "bias of LayerNorm",
        "bias of Conv1D",
    }


class Nested(nn.Module):
    """Names that are ends of other names, and one with a point in the wrong place."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.block, self.b_up = nn.Linear(4, 4), nn.ModuleDict(), nn.Linear(4, 4)
        self.block["up"] = nn.Linear(4, 4)
        self.block["b"] = nn.ModuleDict({"up": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        return self.b_up(self.block["b"]["up"](self.block["up"](self.up(x))))


@pytest.mark.parametrize("name", ["up", "block.up", "block.b.up", "b_up"])
def test_only_the_named_layer_is_adapted(name: str) -> None:
    def wrapped_layers(wrapped: nn.Module, kind: str) -> set[str]:
        return {n for n, m in wrapped.get_base_model().named_modules() if hasattr(m, kind)}

    def make() -> tuple[nn.Module, SparseMask]:
        model = Nested()
        return model, SparseMask(ParameterSpace.of(model, [f"{name}.weight"]), torch.arange(9))

    assert wrapped_layers(to_supertuning(*make())[0], "supertuning_values") == {name}
    assert wrapped_layers(to_shira(*make())[0], "shira_weight") == {name}
    model, mask = make()
    config = peft.LoraConfig(**rank_pattern(model, mask, budget=16)[0])
    lora = peft.get_peft_model(model, config)
    assert wrapped_layers(lora, "lora_A") == {name}
    assert lora.get_nb_trainable_parameters()[0] == 16


# What cannot be held


class Odd(nn.Module):
    """Weights that look like a linear layer's, but that no adapter may take."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(4, 4)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.scaled, self.turned = Scaled(4, 4), nn.Linear(4, 4)
        self.turned.weight = nn.Parameter(torch.randn(4, 4).t())
        self.attention = nn.MultiheadAttention(4, 2)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8)
        self.norm, self.convolution = nn.LayerNorm(4), nn.Conv1d(4, 4, 1)
        self.table, self.token = nn.Embedding(3, 4), nn.Parameter(torch.zeros(4))


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_every_entry_that_cannot_be_held_is_reported_with_its_reason() -> None:
    model = Odd()
    _, coverage = to_supertuning(model, uneven(model))
    reasons = {t.name: t.reason for t in coverage.tensors}
    assert {name for name, reason in reasons.items() if not reason} == {"plain.weight"}
    tied = "a tied weight, which an adapter would untie"
    outside = "read by {} without a call of the layer"
    expected = {
        "token": "token of Odd",
        "plain.bias": "bias of Linear",
        "first.weight": tied,
        "scaled.weight": "weight of Scaled, whose forward is its own",
        "turned.weight": "a weight that is not contiguous, into which PEFT cannot merge",
        "attention.in_proj_weight": "in_proj_weight of MultiheadAttention",
        "attention.out_proj.weight": outside.format("MultiheadAttention"),
        "encoder.linear1.weight": outside.format("TransformerEncoderLayer"),
        "norm.weight": "weight of LayerNorm",
        "convolution.weight": "weight of Conv1d",
        "table.weight": "weight of Embedding",
    }
    assert {name: reasons[name] for name in expected} == expected


@pytest.mark.parametrize(
    "export",
    [to_supertuning, to_shira, lambda m, mask: rank_pattern(m, mask, budget=900)],
    ids=["SuperTuning", "SHiRA", "LoRA"],
)
def test_the_coverage_accounts_for_every_selected_entry(export: Callable) -> None:
    model, mask = bert()
    coverage: Coverage = export(model, mask)[1]
    counts = {name: index.numel() for name, index in mask.indices.items()}
    assert {t.name: t.selected for t in coverage.tensors} == counts
    assert coverage.held + coverage.lost == coverage.selected == mask.count
    assert all(bool(t.reason) == bool(t.lost) for t in coverage.tensors)
    told = coverage.describe()
    assert f"{coverage.held:,} of {mask.count:,} selected entries held" in told
    for reason in ("weight of Embedding", "weight of LayerNorm", "bias of Linear"):
        assert reason in told
    assert not coverage.exact


def test_a_mask_of_linear_weights_is_held_exactly() -> None:
    model, mask = layers(*SIZES)
    assert to_supertuning(model, mask)[1].exact


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_an_untied_language_model_head_is_a_layer_as_others(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    mask, bare, before = uneven(model), copy.deepcopy(model), weights(model)
    wrapped, _ = to_supertuning(model, mask)
    train(wrapped, adamw(wrapped))
    wrapped.save_pretrained(tmp_path)
    reloaded = peft.PeftModel.from_pretrained(bare, tmp_path)
    assert torch.equal(logits(reloaded), logits(wrapped))
    merged = reloaded.merge_and_unload()
    held = linears(merged, mask)
    assert held.verify(before, weights(merged)) == []
    assert "lm_head.weight" in held.indices and moved(before, merged, held) == held.count


# Refusals


def untouched(model: nn.Module, names: set[str]) -> bool:
    return {n for n, p in model.named_parameters() if p.requires_grad} == names


@pytest.mark.parametrize(
    ("export", "message"),
    [
        (lambda m, mask: to_supertuning(m, mask, adapters=0), "adapters is 0; it must be at least"),
        (lambda m, mask: to_shira(m, mask, r=0), "r is 0; it must be at least 1"),
        (lambda m, mask: to_shira(m, mask, r=99), "fewer entries in the layer than r·.m . n."),
        (lambda m, mask: to_shira(m, mask, scores=torch.ones(3)), r"scores are \[3\]; the mask's"),
        (
            lambda m, mask: to_shira(m, mask, scores=torch.full((mask.space.numel,), torch.nan)),
            "none may be NaN",
        ),
        (
            lambda m, mask: rank_pattern(m, mask, budget=99, scores=torch.zeros(mask.space.numel)),
            "scores must be finite, at least 0, and not 0 in all",
        ),
        (lambda m, mask: rank_pattern(m, mask, budget=9), "too small a share of 9 parameters"),
        (
            lambda m, mask: to_supertuning(m, mask, dense=["classifier.weight"]),
            r"'classifier' also holds \['classifier.bias'\]",
        ),
        (lambda m, mask: to_supertuning(m, mask, dense=["clasifier.bias"]), "Did you mean"),
        (
            lambda m, mask: to_shira(m, SparseMask(mask.space, torch.empty(0, dtype=torch.int64))),
            "(?s)SHiRA can hold none of the selected entries.*the mask is empty",
        ),
    ],
)
def test_bad_arguments_leave_the_model_as_it_was(export: Callable, message: str) -> None:
    model, mask = bert()
    names = {n for n, _ in model.named_parameters()}
    with pytest.raises(UsageError, match=message):
        export(model, mask)
    assert untouched(model, names)


@pytest.mark.parametrize("export", [to_supertuning, to_shira])
def test_gpt2_has_nothing_for_adapters_of_linear_layers(export: Callable) -> None:
    model = tiny_gpt2()
    with pytest.raises(UsageError) as caught:
        export(model, uneven(model))
    assert "lost" in str(caught.value) and "weight of Conv1D" in str(caught.value)


def test_a_mask_for_another_model_and_a_wrapped_model_are_refused() -> None:
    model, mask = bert()
    with pytest.raises(ModelError, match=r"bert.embeddings.word_embeddings.weight"):
        to_supertuning(nn.Sequential(nn.Linear(2, 2)), mask)
    wrapped, _ = to_supertuning(model, mask)
    for again in (wrapped, model):  # PEFT works in place: the bare model holds adapters, too
        with pytest.raises(ModelError, match="holds PEFT adapters already"):
            to_shira(again, mask)
        with pytest.raises(ModelError, match="holds PEFT adapters already"):
            load_supertuning(again, "anywhere")


def test_dense_tensors_that_peft_cannot_save_alone() -> None:
    model = Nested()
    mask = SparseMask(ParameterSpace.of(model, ["block.b.up.weight"]), torch.arange(3))
    with pytest.raises(UsageError, match=r"end of their names: 'up' would reach 'block.up'"):
        to_supertuning(model, mask, dense=["up.weight", "up.bias"])
    odd = Odd()
    mask = SparseMask(ParameterSpace.of(odd, ["plain.weight"]), torch.arange(3))
    with pytest.raises(UsageError) as caught:
        to_supertuning(odd, mask, dense=["token", "first.weight", "first.bias"])
    assert "'first.weight' is dense and tied to 'second.weight'" in str(caught.value)
    assert "'the model' also holds" in str(caught.value)


def test_adapters_of_another_method_are_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["query"])
    peft.get_peft_model(tiny_bert(), config).save_pretrained(tmp_path)
    model = tiny_bert()
    with pytest.raises(ArtifactError, match="with a LoraConfig; a SupertuningConfig is accepted"):
        load_supertuning(model, tmp_path)
    to_supertuning(model, bert()[1])  # it is still bare


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_cut_adapters_are_refused_all_at_once(tmp_path: Path, kept: int) -> None:
    model, mask = bert()
    bare = copy.deepcopy(model)
    to_supertuning(model, mask, adapters=3)[0].save_pretrained(tmp_path)
    one, two, three = sorted(tmp_path.glob("ird_mask*"))
    load_supertuning(copy.deepcopy(bare), tmp_path)
    for file in (one / "adapter_model.safetensors", two / "adapter_config.json"):
        file.write_bytes(file.read_bytes()[:kept])
    (three / "adapter_model.safetensors").unlink()
    with pytest.raises(ArtifactError) as caught:
        load_supertuning(bare, tmp_path)
    problems = caught.value.problems
    assert problems[0].startswith(f"{one} holds a damaged adapter (SafetensorError: ")
    assert problems[1].startswith(f"{two} holds a damaged adapter (JSONDecodeError: ")
    assert problems[2].startswith(f"{three} holds no weights: ")
    to_supertuning(bare, mask)  # it is still bare


def test_a_directory_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no adapter"):
        load_supertuning(nn.Sequential(nn.Linear(2, 2)), tmp_path)
