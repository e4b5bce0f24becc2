"""Base and delta are the tuned model, bit for bit; without the delta they are the base again."""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2LMHeadModel

import ird_search.merge
from ird_search.artifact import (
    Delta,
    inspect_delta,
    load_delta,
    save_delta,
    weights_sha256,
)
from ird_search.delta import export_delta
from ird_search.entries import Entries
from ird_search.errors import ModelError, UsageError
from ird_search.mask import SparseMask
from ird_search.merge import Merged, merge_delta
from ird_search.optimizer import MaskedAdamW
from ird_search.parameters import ParameterSpace
from tests.artifacts import same_delta
from tests.tiny import tiny_bert, tiny_gpt2, tiny_vit
from tests.toy import bits

HEAD = ["head.weight", "head.bias"]
STATISTICS = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


class Network(nn.Module):
    """A convolution, BatchNorm, two layers with one weight, and a head."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.head(self.second(self.first(x).tanh()))


def network(dtype: torch.dtype = torch.float32, classes: int = 2, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network(classes).to(dtype)


def mask_of(model: nn.Module, names: list[str] | None = None, *, seed: int = 0) -> SparseMask:
    """A third of the entries, and the whole of the last tensor."""
    space = ParameterSpace.of(model, names)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(space.numel, generator=generator) < 0.3
    chosen[space.span(space.names[-1])] = True
    return SparseMask(space, chosen.nonzero().flatten())


BODY = ["conv.weight", "conv.bias", "norm.weight", "first.weight", "second.bias"]


def tuned(
    model: nn.Module, mask: SparseMask, dense: list[str], x: Tensor, *, seed: int = 0
) -> nn.Module:
    """A copy of the model after some masked steps."""
    there = copy.deepcopy(model)
    optimizer = MaskedAdamW(there, mask, dense=dense, lr=0.01 * (1 + seed), weight_decay=0.1)
    for _ in range(3):
        out = there(x)
        out = out if isinstance(out, Tensor) else out.logits
        out.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return there


def of_network(dtype: torch.dtype = torch.float32, *, seed: int = 0) -> tuple[Any, ...]:
    """A base, a mask, its dense tensors, and the tuned model."""
    base = network(dtype)
    mask = mask_of(base, BODY, seed=seed)
    x = torch.randn(6, 2, 5, 5, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return base, mask, HEAD, tuned(base, mask, HEAD, x, seed=seed)


def of_bert() -> tuple[Any, ...]:
    base = tiny_bert().eval()
    body = [name for name, _ in base.named_parameters() if ".encoder." in name]
    mask, head = mask_of(base, body), ["classifier.weight", "classifier.bias"]
    return base, mask, head, tuned(base, mask, head, torch.randint(34, (3, 6)))


def of_gpt2() -> tuple[Any, ...]:
    """The mask selects from the embedding, which is the output layer, too."""
    base = tiny_gpt2().eval()
    mask = mask_of(base)
    return base, mask, [], tuned(base, mask, [], torch.randint(34, (3, 6)))


def of_vit() -> tuple[Any, ...]:
    base = tiny_vit().eval()
    mask = mask_of(base, [n for n, _ in base.named_parameters() if "classifier" not in n])
    return base, mask, [], tuned(base, mask, [], torch.randn(2, 3, 8, 8))


CASES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "network": of_network,
    "network-bfloat16": lambda: of_network(torch.bfloat16),
    "network-float64": lambda: of_network(torch.float64),
    "bert": of_bert,
    "gpt2": of_gpt2,
    "vit": of_vit,
}


def same(a: dict[str, Tensor] | nn.Module, b: dict[str, Tensor] | nn.Module) -> bool:
    """Whether two models hold the same bits, NaN and −0 told apart."""
    a, b = (m.state_dict() if isinstance(m, nn.Module) else m for m in (a, b))
    return a.keys() == b.keys() and all(
        (a[n].dtype, a[n].shape) == (b[n].dtype, b[n].shape)
        and torch.equal(a[n].reshape(-1).view(torch.uint8), b[n].reshape(-1).view(torch.uint8))
        for n in a
    )


# --- round trip ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_base_and_delta_are_the_tuned_model_and_come_apart(
    tmp_path: Path, case: Callable[[], tuple[Any, ...]]
) -> None:
    base, mask, dense, target = case()
    before, after = bits(base), bits(target)
    assert not same(before, after)
    made = export_delta(base, target, mask, tmp_path, dense=dense, provenance={"rate": 0.01})
    assert same(base, before) and same(target, after)  # exporting reads only
    delta = load_delta(tmp_path, base)
    assert same_delta(delta, made)
    merged = merge_delta(base, delta)
    assert same(base, after)
    assert merged.delta is delta
    merged.unmerge()
    assert same(base, before)


def reference(base: dict[str, Tensor], delta: Delta) -> dict[str, Tensor]:
    """What a delta means, entry by entry."""
    made = {name: tensor.clone() for name, tensor in base.items()}
    for name, index in delta.mask.indices.items():
        flat = made[name].flatten()
        for place, value in zip(index.tolist(), delta.values[name], strict=True):
            flat[place] = value
        made[name] = flat.view(made[name].shape)
    return {**made, **delta.dense}


def test_a_delta_holds_what_its_definition_says() -> None:
    base, mask, _, target = of_vit()
    assert same(reference(bits(base), export_delta(base, target, mask)), target)


def test_parameters_stay_the_same_objects_with_their_flags_and_gradients() -> None:
    base, mask, dense, target = of_network()
    base.conv.weight.requires_grad_(False)
    base.head.weight.grad = torch.ones_like(base.head.weight)
    objects = [(id(p), p.requires_grad, p.data_ptr()) for p in base.parameters()]
    with merge_delta(base, export_delta(base, target, mask, dense=dense)):
        assert [(id(p), p.requires_grad, p.data_ptr()) for p in base.parameters()] == objects
        assert bool((base.head.weight.grad == 1).all())


def test_buffers_that_moved_are_stored_whole_and_others_are_not() -> None:
    base, mask, dense, target = of_network()
    assert export_delta(base, target, mask, dense=dense).dense.keys() == {*dense, *STATISTICS}
    target.norm.running_var.copy_(base.norm.running_var)
    assert "norm.running_var" not in export_delta(base, target, mask, dense=dense).dense
    wanted = export_delta(base, target, mask, dense=[*dense, "norm.running_var"]).dense
    assert "norm.running_var" in wanted  # asked for


class Rotary(nn.Module):
    """A linear layer beside complex angles."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("angles", torch.polar(torch.ones(3), torch.arange(3.0)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_buffers_may_be_there_and_may_not_move(tmp_path: Path, dtype: torch.dtype) -> None:
    base = Rotary(dtype)
    mask, target = mask_of(base), copy.deepcopy(base)
    with torch.no_grad():
        target.linear.bias.add_(1)
    delta = export_delta(base, target, mask)
    before = bits(base)
    with merge_delta(base, delta):
        assert same(base, target)
    assert same(base, before) and delta.dense == {}
    target.angles[1] += 1e-6j
    with pytest.raises(UsageError, match=rf"'angles' is {dtype} on cpu; .*f64.* can be stored"):
        export_delta(base, target, mask, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_any_bits_survive() -> None:
    base = nn.Linear(4, 1)
    target = copy.deepcopy(base)
    with torch.no_grad():
        base.weight.zero_()
        target.weight.copy_(torch.tensor([[-0.0, torch.nan, torch.inf, 0.0]]))
        target.weight.view(torch.int32)[0, 1] += 5  # a NaN with a payload
    mask = SparseMask(ParameterSpace.of(base, ["weight"]), torch.arange(3))
    base.bias = target.bias
    delta = export_delta(base, target, mask)
    before = bits(base)
    with merge_delta(base, delta):
        assert same(base, target)
    assert same(base, before)


def test_strided_parameters() -> None:
    base, mask, dense, _ = of_network()
    base = base.to(memory_format=torch.channels_last)
    base.head.weight = nn.Parameter(torch.randn(4, 2).t())
    assert not base.conv.weight.is_contiguous() and not base.head.weight.is_contiguous()
    target = tuned(base, mask, dense, torch.randn(6, 2, 5, 5))
    before, delta = bits(base), export_delta(base, target, mask, dense=dense)
    made = reference(before, delta)
    assert all(torch.equal(made[n], target.state_dict()[n]) for n in ("conv.weight", *dense))
    with merge_delta(base, delta):
        assert same(base, target)
        assert not base.conv.weight.is_contiguous()
    assert same(base, before)


def test_a_checkpoint_or_a_copy_of_the_state_dict_will_do(tmp_path: Path) -> None:
    base, mask, _, target = of_gpt2()
    wanted = export_delta(base, target, mask)
    target.save_pretrained(tmp_path)
    checkpoint = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in checkpoint  # tied: stored once
    for pair in (
        (base, checkpoint),
        (base, target.state_dict()),
        (bits(base), target),
        (dict(base.named_parameters()), target),
    ):
        assert same_delta(export_delta(*pair, mask), wanted)
    again = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert same_delta(export_delta(base, again, mask), wanted)


def test_a_tied_tensor_may_be_dense_under_any_of_its_names() -> None:
    base, mask = tiny_gpt2(), None
    target = copy.deepcopy(base)
    with torch.no_grad():
        target.lm_head.weight.add_(1)
    space = ParameterSpace.of(base, ["transformer.h.0.mlp.c_fc.weight"])
    mask = SparseMask(space, torch.tensor([3]))
    for name in ("lm_head.weight", "transformer.wte.weight"):
        delta = export_delta(base, target, mask, dense=name)
        assert delta.dense.keys() == {"transformer.wte.weight"}
    with merge_delta(base, delta):
        assert same(base, target)


def test_a_fresh_head_is_no_part_of_the_base() -> None:
    base, mask, head, target = of_bert()
    delta = export_delta(base, target, mask, dense=head)
    elsewhere = copy.deepcopy(base)
    with torch.no_grad():
        elsewhere.classifier.weight.normal_()
    before = bits(elsewhere)
    with merge_delta(elsewhere, delta):
        assert same(elsewhere, target)
    assert same(elsewhere, before)
    assert delta.base_sha256 == weights_sha256(base, head)


def test_a_head_that_the_base_lacks_is_no_hindrance() -> None:
    base, mask, head, target = of_bert()
    without = {name: tensor for name, tensor in bits(base).items() if name not in head}
    wanted = export_delta(base, target, mask, dense=head)
    assert same_delta(export_delta(without, target, mask, dense=head), wanted)


def test_the_base_is_named_where_it_knows_its_name(tmp_path: Path) -> None:
    base, mask, _, target = of_gpt2()
    assert export_delta(base, target, mask).provenance == {}
    base.name_or_path, base.config._commit_hash = "org/model", "abc"
    named = {"base_model": {"id": "org/model", "revision": "abc"}}
    assert export_delta(base, target, mask).provenance == named
    base.name_or_path = str(tmp_path / "private" / "mine")
    made = export_delta(base, target, mask, provenance={"seed": 1}).provenance
    assert made == {"base_model": {"id": "mine", "revision": "abc"}, "seed": 1}
    mine = {"base_model": "own words"}
    assert export_delta(base, target, mask, provenance=mine).provenance == mine


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_models_exchange_deltas_of_their_factors() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["c_attn"], r=4, fan_in_fan_out=True)
    base = peft.get_peft_model(tiny_gpt2(), config).eval()
    names = [name for name, p in base.named_parameters() if p.requires_grad]
    mask = mask_of(base, names)
    target = tuned(base, mask, [], torch.randint(34, (3, 6)))
    before = bits(base)
    with merge_delta(base, export_delta(base, target, mask)):
        assert same(base, target)
    assert same(base, before)


def test_half_a_percent_of_a_minilm_takes_less_than_a_megabyte(tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    with torch.device("meta"):
        space = ParameterSpace.of(BertModel(config))
    mask = SparseMask(space, torch.randperm(space.numel)[: space.numel // 200].sort().values)
    values = {name: torch.randn(index.numel()) for name, index in mask.indices.items()}
    save_delta(tmp_path, Delta(mask, values, {}, "0" * 64))
    assert 22.6e6 < space.numel < 22.8e6
    assert 0.90e6 < (tmp_path / "delta.safetensors").stat().st_size < 0.95e6


# --- several deltas -----------------------------------------------------------------------------


Family = tuple[nn.Module, list[Delta], list[dict[str, Tensor]]]


@pytest.fixture(scope="module")
def family() -> Family:
    """A base, deltas of different masks and dense tensors, and what each alone gives."""
    base, deltas, alone = network(), [], []
    for seed, dense in enumerate((HEAD, HEAD[:1], [], ["first.bias"])):
        mask = mask_of(base, BODY[: 2 + seed], seed=seed)
        x = torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(seed))
        target = tuned(base, mask, dense, x, seed=seed)
        deltas.append(export_delta(base, target, mask, dense=dense))
        alone.append(bits(target))
    assert not any(same(a, b) for a, b in itertools.combinations(alone, 2))
    return base, deltas, alone


def tensors_of(delta: Delta) -> set[str]:
    return {*delta.values, *delta.dense}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 2, 3, None]), min_size=1, max_size=8))
def test_switching_in_any_order_gives_what_each_gives_alone(
    family: Family, order: list[int | None]
) -> None:
    base, deltas, alone = family
    before = bits(base)
    with merge_delta(base, deltas[3]) as merged:
        for i in order:
            merged.switch(None if i is None else deltas[i])
            assert same(base, before if i is None else alone[i])
            assert merged.delta is (None if i is None else deltas[i])
    assert same(base, before)


def test_the_base_is_hashed_once_and_a_switch_touches_its_tensors_only(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, deltas, _ = family
    hashed: list[int] = []
    lines = ird_search.merge.weight_lines
    monkeypatch.setattr(
        ird_search.merge, "weight_lines", lambda tensors: hashed.append(1) or lines(tensors)
    )
    with merge_delta(base, deltas[0]) as merged:
        for delta in deltas:
            versions = {name: p._version for name, p in base.named_parameters()}
            touched = tensors_of(merged.delta) | tensors_of(delta)
            merged.switch(delta)
            moved = {name for name, p in base.named_parameters() if p._version != versions[name]}
            assert moved == touched & versions.keys()
    assert hashed == [1]


def test_a_delta_that_is_refused_leaves_the_one_before_merged(family: Family) -> None:
    base, deltas, alone = family
    other = Delta(deltas[1].mask, deltas[1].values, deltas[1].dense, "0" * 64)
    with merge_delta(base, deltas[0]) as merged:
        with pytest.raises(ModelError, match="are not the base of this delta"):
            merged.switch(other)
        assert same(base, alone[0]) and merged.delta is deltas[0]


@pytest.mark.parametrize("writes", [1, 6, 7, 12])
def test_an_interrupt_leaves_no_half_of_a_delta(
    family: Family, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    base, deltas, alone = family
    bare, (put, count) = bits(base), (Entries.put, itertools.count(1))

    def interrupted(self: Entries, tensor: Tensor, values: Tensor) -> None:
        put(self, tensor, values)
        if next(count) == writes:
            raise KeyboardInterrupt

    with merge_delta(base, deltas[1]) as merged:
        monkeypatch.setattr(Entries, "put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merged.switch(deltas[0])
        assert len(tensors_of(deltas[1])) == 6  # to be taken out first
        assert merged.delta is (deltas[1] if writes <= 6 else None)
        assert same(base, alone[1] if writes <= 6 else bare)
        merged.switch(deltas[0])
        assert same(base, alone[0])
    assert same(base, bare)


def test_a_merge_lasts_until_it_is_unmerged_and_is_final_when_dropped(family: Family) -> None:
    base, deltas, alone = copy.deepcopy(family[0]), *family[1:]
    merged = merge_delta(base, deltas[0])
    for model in (base, base.conv, nn.Sequential(base)):
        with pytest.raises(ModelError, match="has a delta merged already"):
            merge_delta(model, deltas[1])
    assert same(base, alone[0])
    merged.unmerge()
    merged.unmerge()
    with pytest.raises(UsageError, match="was unmerged"):
        merged.switch(deltas[1])
    merge_delta(base, deltas[1])
    gc.collect()
    assert same(base, alone[1])
    with pytest.raises(ModelError, match="before any training and without another delta"):
        merge_delta(base, deltas[0])
    mask = deltas[0].mask
    second = export_delta(base, tuned(base, mask, [], torch.randn(6, 2, 5, 5)), mask)
    with merge_delta(base, second) as on_top:
        assert repr(on_top).startswith("Merged(Network, Delta(")
    assert repr(on_top) == "Merged(Network, the bare base)"
    assert same(base, alone[1])


def test_an_exception_in_the_block_unmerges(family: Family) -> None:
    base, deltas, _ = family
    before = bits(base)
    with pytest.raises(KeyError), merge_delta(base, deltas[0]):
        raise KeyError
    assert same(base, before)


def test_a_model_that_is_cast_meanwhile_comes_back_cast() -> None:
    base, mask, dense, target = of_network()
    merged = merge_delta(base, export_delta(base, target, mask, dense=dense))
    wanted = bits(network().double())
    base.double()
    merged.unmerge()
    assert same(base, wanted)


@pytest.mark.gpu
def test_a_model_that_moves_meanwhile(cuda: str) -> None:
    base, mask, dense, target = of_network()
    before = bits(base)
    delta = export_delta(base, copy.deepcopy(target).to(cuda), mask, dense=dense)
    merged = merge_delta(base.to(cuda), delta)
    assert same(bits(base.cpu()), target)
    base.to(cuda)
    merged.unmerge()
    assert same(bits(base.cpu()), before)


# --- what is refused ----------------------------------------------------------------------------


def test_a_tuned_model_in_which_other_entries_moved_is_refused(tmp_path: Path) -> None:
    base, mask, dense, target = of_network()
    with torch.no_grad():
        target.first.bias[1] += 1e-3
        target.conv.weight.view(-1)[~mask.to_dict()["conv.weight"].view(-1)] += 1e-3
    with pytest.raises(ModelError) as caught:
        export_delta(base, target, mask, tmp_path / "d", dense=dense)
    frozen = 72 - mask.indices["conv.weight"].numel()
    assert str(caught.value) == (
        "The tuned model differs from the base outside the mask in 2 tensors.\n"
        f"  - conv.weight: {frozen} of {frozen} frozen entries moved.\n"
        "  - first.bias: 1 of 4 frozen entries moved.\n"
        "Pass the model and the mask that were trained, and name tensors that were trained whole "
        "(the head) in dense=[…]."
    )
    assert not list(tmp_path.iterdir())


def test_ten_tensors_that_moved_are_listed() -> None:
    base, mask, _, _ = of_bert()
    with pytest.raises(ModelError) as caught:
        export_delta(base, tiny_bert(seed=1), mask)
    text = str(caught.value)
    assert text.count("frozen entries moved") == 10
    assert "in 17 tensors.\n" in text and "  - 7 more tensors differ.\n" in text


def test_a_head_that_was_not_named_is_refused() -> None:
    base, mask, _, target = of_bert()
    with pytest.raises(ModelError, match=r"classifier\.bias: 2 of 2 frozen entries moved"):
        export_delta(base, target, mask)


def test_weights_that_do_not_belong_together() -> None:
    base, mask, dense, target = of_network()
    with pytest.raises(UsageError, match="both state dicts"):
        export_delta(bits(base), bits(target), mask)
    with pytest.raises(ModelError, match=r"was torch.float32 \[4\], is torch.float64 \[4\]"):
        export_delta(base, target.double(), mask, dense=dense)
    with pytest.raises(ModelError, match="weight is on the meta device"):
        export_delta(base, network().to("meta"), mask, dense=dense)
    with pytest.raises(UsageError, match=r"share the tensor 'conv\.weight'.* Pass a copy from"):
        export_delta(target.state_dict(), target, mask, dense=dense)
    with pytest.raises(UsageError, match=r"share the tensor 'head\.weight'"):
        export_delta(target, target, mask - mask, dense=dense)
    with pytest.raises(UsageError, match=r"'heads' is not a parameter of this model\. Did"):
        export_delta(base, base, mask, dense=["heads"])
    with pytest.raises(UsageError, match=r"'second\.bias' is dense and also holds 4"):
        export_delta(base, base, mask, dense=["second.bias"])
    headless = {name: tensor for name, tensor in bits(target).items() if name not in dense}
    with pytest.raises(ModelError, match=r"head\.bias: missing after training"):
        export_delta(network(torch.float64), headless, mask, dense=dense)
    partial = dict(base.named_parameters())
    with pytest.raises(ModelError, match=r"norm.running_mean: missing before training"):
        export_delta(partial, of_network()[3], mask, dense=dense)


def test_another_base_is_refused_and_keeps_its_bits(tmp_path: Path) -> None:
    base, mask, dense, target = of_network()
    delta = export_delta(
        base, target, mask, dense=dense, provenance={"base_model": {"id": "org/model"}}
    )
    with torch.no_grad():
        base.second.bias[0] += 1e-6  # selected, frozen or dense: the base is another one
    before = bits(base)
    with pytest.raises(ModelError) as caught:
        merge_delta(base, delta)
    assert f"are not the base of this delta ({delta.base_sha256[:12]}, {{'id': 'org/model'}})" in (
        str(caught.value)
    )
    assert same(base, before)
    with merge_delta(base, delta, strict=False):
        assert same(base, target)  # the entry that differed is one that the delta holds
    assert same(base, before)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.bfloat16(), "is torch.bfloat16, not torch.float32"),
        (lambda m: setattr(m, "head", nn.Linear(4, 3)), r"head.weight is \[3, 4\], not \[2, 4\]"),
        (lambda m: delattr(m, "head"), r"head.weight \[2, 4\] is missing"),
        (lambda m: setattr(m, "norm", nn.GroupNorm(2, 4)), r"norm.running_mean \[4\] is missing"),
    ],
    ids=["dtype", "another head", "no head", "no buffer"],
)
def test_a_model_that_does_not_fit_is_refused(
    change: Callable[[nn.Module], Any], says: str
) -> None:
    base, mask, dense, target = of_network()
    delta = export_delta(base, target, mask, dense=dense)
    change(base)
    before = bits(base)
    with pytest.raises(ModelError, match=says) as caught:
        merge_delta(base, delta)
    assert "Load the model with the same head and in the same dtype" in str(caught.value)
    assert same(base, before)


def test_values_are_cast_only_when_asked_and_then_give_the_tuned_model_cast() -> None:
    base, mask, dense, target = of_network()
    delta = export_delta(base, target, mask, dense=dense)
    base.bfloat16()
    before = bits(base)
    with pytest.raises(ModelError, match="strict=False casts from one float to another"):
        merge_delta(base, delta)
    with merge_delta(base, delta, strict=False):
        assert same(base, target.bfloat16())
    assert same(base, before)


def test_whole_numbers_are_never_cast() -> None:
    base, mask, dense, target = of_network()
    delta = export_delta(base, target, mask, dense=dense)
    base.norm.num_batches_tracked = torch.tensor(0.0)
    with pytest.raises(ModelError, match=r"tracked is torch\.float32, not torch\.int64"):
        merge_delta(base, delta, strict=False)


def test_a_delta_of_an_empty_mask_holds_the_head() -> None:
    base, target = network(), network()
    mask = SparseMask(ParameterSpace.of(base), torch.empty(0, dtype=torch.int64))
    with torch.no_grad():
        target.head.weight.add_(1)
    delta = export_delta(base, target, mask, dense="head.weight")
    assert (delta.density, delta.values, delta.nbytes) == (0, {}, 32)
    with merge_delta(base, delta) as merged:
        assert isinstance(merged, Merged)
        assert same(base, target)


def test_a_file_says_what_it_is_for(tmp_path: Path) -> None:
    base, mask, head, target = of_bert()
    export_delta(base, target, mask, tmp_path, dense=head)
    text = inspect_delta(tmp_path).describe()
    assert "classifier.weight  [2, 16]" in text
    assert f"base sha256      {weights_sha256(base, head)}" in text
