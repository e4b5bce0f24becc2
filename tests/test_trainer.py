"""`TrainerMask` in the stock `Trainer` of transformers, and in TRL's `SFTTrainer`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer
from transformers import (
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ird_search.artifact import load_mask, save_mask
from ird_search.errors import ModelError, UsageError
from ird_search.mask import SparseMask
from ird_search.optimizer import MaskedAdamW, masked
from ird_search.parameters import ParameterSpace, candidate_space, head_parameters
from tests.ranks import RANKS, bits, in_two_processes
from tests.tiny import TEXT_ROWS, VOCABULARY, tiny_bert, tiny_lm_tokenizer, tiny_tokenizer

pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

from ird_search.consumers.trainer import TrainerMask


@pytest.fixture(autouse=True)
def forget_accelerator() -> Iterator[None]:
    """Every Trainer shares the state of its accelerator with all later ones."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def bert() -> BertForSequenceClassification:
    """Without dropout, and with weights large enough for gradients that are not noise."""
    return bert_of(seed=0)


def bert_of(*, seed: int) -> BertForSequenceClassification:
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return tiny_bert(seed=seed, initializer_range=0.5, **settings)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


HEAD = head_parameters(bert())


def some(model: nn.Module, every: int = 150) -> SparseMask:
    space = candidate_space(model, head=head_parameters(model))
    return SparseMask(space, torch.arange(3, space.numel, every))


def rows(times: int = 2) -> list[dict[str, Any]]:
    tokenizer = tiny_tokenizer()
    return [{**tokenizer(row["text"]), "labels": row["label"]} for row in TEXT_ROWS * times]


def arguments(directory: Path, **settings: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(directory),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**defaults, **settings})


Make = Callable[[nn.Module, SparseMask], Optimizer | None]
OPTIMIZERS: dict[str, Make] = {
    "the Trainer's own": lambda model, mask: None,
    "masked-adamw": lambda model, mask: MaskedAdamW(
        model, mask, lr=0.01, weight_decay=0.1, dense=HEAD
    ),
    "masked-sgd": lambda model, mask: masked(torch.optim.SGD)(
        model, mask, lr=0.1, momentum=0.9, dense=HEAD
    ),
    "sgd": lambda model, mask: torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1),
}


def trainer(
    model: nn.Module, mask: SparseMask, args: TrainingArguments, optimizer: str, **settings: Any
) -> Trainer:
    return Trainer(
        model,
        args,
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
        callbacks=[TrainerMask(mask, dense=HEAD), *settings.pop("callbacks", [])],
        optimizers=(OPTIMIZERS[optimizer](model, mask), None),
        **settings,
    )


def assert_trained(mask: SparseMask, before: dict[str, Tensor], model: nn.Module) -> None:
    """Every selected entry and the head moved, and no other bit."""
    after = bits(model)
    assert mask.verify(before, after, dense=HEAD) == []
    for name, index in mask.indices.items():
        assert bool((after[name] != before[name]).flatten()[index].all()), name
    assert all(not torch.equal(after[name], before[name]) for name in HEAD)


def assert_no_mask(model: nn.Module) -> None:
    assert all(p.requires_grad and not p._backward_hooks for p in model.parameters())


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "autocast": {"bf16": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "checkpointed": {"activation_checkpointing": True},
    "reentrant": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_from_a_saved_mask_to_saved_weights(optimizer: str, tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "base")
    save_mask(tmp_path / "mask.safetensors", some(bert()))

    model = BertForSequenceClassification.from_pretrained(
        tmp_path / "base", hidden_dropout_prob=0.0
    )
    mask, before = load_mask(tmp_path / "mask.safetensors", model), bits(model)
    trainer(model, mask, arguments(tmp_path), optimizer).train()
    assert_trained(mask, before, model)
    assert_no_mask(model)

    model.save_pretrained(tmp_path / "tuned")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "tuned")
    batch = tiny_tokenizer()("a good film", return_tensors="pt")
    assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.slow] * (way == "compiled")) for way in WAYS]
)
def test_every_way_to_train_moves_the_same_entries(way: str, tmp_path: Path) -> None:
    """To the same values as the plain way where only the route differs."""
    reference, mask = bert(), some(bert())
    before = bits(reference)
    trainer(reference, mask, arguments(tmp_path), "masked-sgd").train()
    model = bert()
    trainer(model, mask, arguments(tmp_path, **WAYS[way]), "masked-sgd").train()
    torch.compiler.reset()
    assert_trained(mask, before, model)
    atol = 0.05 if way == "autocast" else 1e-5
    for p, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("optimizer", ["sgd", "masked-sgd"])
@pytest.mark.parametrize("max_norm", [0.0, 0.01])
def test_the_norm_is_that_of_the_trained_entries(
    max_norm: float, optimizer: str, tmp_path: Path
) -> None:
    """As it is logged, and as the gradient is clipped to it: a step of SGD is as long as told."""
    model, mask = bert(), some(bert())
    before, reference = bits(model), bert()
    batch = tiny_tokenizer().pad(rows()[:4], return_tensors="pt")
    reference(**batch).loss.backward()
    trained = [reference.get_parameter(n).grad.flatten()[i] for n, i in mask.indices.items()]
    trained += [reference.get_parameter(name).grad.flatten() for name in HEAD]
    norm = torch.cat(trained).norm().item()
    whole = torch.cat([p.grad.flatten() for p in reference.parameters()]).norm().item()
    assert whole > 1.2 * norm > 0

    args = arguments(
        tmp_path, max_steps=1, max_grad_norm=max_norm, train_sampling_strategy="sequential"
    )
    made = trainer(model, mask, args, optimizer)
    made.optimizer = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.1),
        "masked-sgd": lambda: masked(torch.optim.SGD)(model, mask, lr=0.1, dense=HEAD),
    }[optimizer]()
    made.train()
    logged = [log["grad_norm"] for log in made.state.log_history if "grad_norm" in log]
    assert logged == [pytest.approx(norm, rel=1e-5)]
    step = torch.cat([(p - before[n]).flatten() for n, p in model.named_parameters()]).norm()
    assert step.item() == pytest.approx(0.1 * (max_norm or norm), rel=1e-3)


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [*((name, torch.float32) for name in OPTIMIZERS), ("masked-adamw", torch.bfloat16)],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    optimizer: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    args = arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=2)
    model, mask = bert().to(dtype), some(bert())
    before = bits(model)
    trainer(model, mask, args, optimizer).train()

    resumed = bert_of(seed=1).to(dtype)
    made = trainer(resumed, mask, args, optimizer)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert made.state.global_step == 6
    assert same(model, resumed)
    assert mask.verify(before, bits(resumed), dense=HEAD) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints_hold_a_state_of_the_size_of_the_mask(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model, mask = bert().to(dtype), some(bert())
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer(model, mask, args, "masked-adamw").train()
    state = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt")
    trained = mask.count + sum(model.get_parameter(name).numel() for name in HEAD)
    moments = [v for s in state["state"].values() for k, v in s.items() if k != "step"]
    assert sum(t.nbytes for t in moments) == 2 * 4 * trained
    assert all(t.dtype == torch.float32 for t in moments)


def test_a_checkpoint_of_another_mask_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer(bert(), some(bert()), args, "masked-adamw").train()
    model = bert()
    other = trainer(model, some(model, every=77), args, "masked-adamw")
    with pytest.raises(UsageError, match="belongs to another mask"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("optimizer", ["the Trainer's own", "masked-adamw"])
def test_the_best_model_is_loaded_at_the_end(optimizer: str, tmp_path: Path) -> None:
    scores = iter([0.1, 0.9, 0.3])
    args = arguments(
        tmp_path,
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    model, mask = bert(), some(bert())
    before = bits(model)
    made = trainer(
        model,
        mask,
        args,
        optimizer,
        eval_dataset=rows(1),
        compute_metrics=lambda _: {"score": next(scores)},
    )
    made.train()
    best = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2")
    last = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-3")
    assert same(model, best)
    assert not same(model, last)
    assert_trained(mask, before, model)


class Fails(TrainerCallback):
    """Ends training at a step, once."""

    def __init__(self, step: int) -> None:
        self.step: int | None = step

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == self.step:
            self.step = None
            raise KeyboardInterrupt


@pytest.mark.parametrize("same", [True, False])
def test_training_again_after_training_that_failed(same: bool, tmp_path: Path) -> None:
    """With the same trainer and with another one, which may have another mask."""
    model, mask = bert(), some(bert())
    first = trainer(model, mask, arguments(tmp_path), "the Trainer's own", callbacks=[Fails(2)])
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert not model.bert.embeddings.word_embeddings.weight.requires_grad  # no event told us
    before = bits(model)
    if not same:
        mask = some(model, every=77)
        first = trainer(model, mask, arguments(tmp_path), "the Trainer's own")
    first.train()
    assert_trained(mask, before, model)
    assert_no_mask(model)


def test_what_failed_training_left_can_be_taken_off(tmp_path: Path) -> None:
    model, mask = bert(), some(bert())
    made = trainer(model, mask, arguments(tmp_path), "masked-adamw", callbacks=[Fails(1)])
    with pytest.raises(KeyboardInterrupt):
        made.train()
    TrainerMask.remove(model)
    TrainerMask.remove(model)
    assert_no_mask(model)


def test_training_twice_goes_on(tmp_path: Path) -> None:
    model, mask = bert(), some(bert())
    before, made = bits(model), trainer(model, mask, arguments(tmp_path), "masked-adamw")
    made.train()
    assert_no_mask(model)
    made.train()
    assert_trained(mask, before, model)


def test_a_callback_that_is_added_later(tmp_path: Path) -> None:
    model, mask = bert(), some(bert())
    before = bits(model)
    made = Trainer(
        model, arguments(tmp_path), train_dataset=rows(), processing_class=tiny_tokenizer()
    )
    made.add_callback(TrainerMask(mask, dense=HEAD))
    made.train()
    assert_trained(mask, before, model)


def test_the_trainer_may_make_the_optimizer_of_a_model_that_it_makes(tmp_path: Path) -> None:
    before, mask = bits(bert()), some(bert())
    settings = {"mask": mask, "lr": 0.01, "dense": HEAD}
    made = Trainer(
        model_init=bert,
        args=arguments(tmp_path),
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
        callbacks=[TrainerMask(mask, dense=HEAD)],
        optimizer_cls_and_kwargs=(lambda: MaskedAdamW, settings),
    )
    for _ in range(2):  # each time from a new model
        made.train()
        assert isinstance(made.optimizer.optimizer, MaskedAdamW)
        assert_trained(mask, before, made.model)
        assert_no_mask(made.model)


def test_a_mask_of_another_model_is_refused(tmp_path: Path) -> None:
    model = tiny_bert(hidden_size=32)
    made = trainer(model, some(bert()), arguments(tmp_path), "the Trainer's own")
    with pytest.raises(ModelError, match="belongs to another model: 32 of 34 tensors differ"):
        made.train()
    assert_no_mask(model)


@pytest.mark.parametrize(("ours", "its"), [(HEAD, ()), ((), HEAD)])
def test_a_head_named_in_one_place_only_is_an_error(
    ours: Sequence[str], its: Sequence[str], tmp_path: Path
) -> None:
    model = bert()
    mask = some(model)
    made = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
        callbacks=[TrainerMask(mask, dense=ours)],
        optimizers=(MaskedAdamW(model, mask, lr=0.01, dense=its), None),
    )
    with pytest.raises(UsageError, match="Give both the same `dense`"):
        made.train()
    TrainerMask.remove(model)
    with pytest.raises(UsageError, match="The mask is a str"):
        TrainerMask("mask.safetensors")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharded_training_is_refused(kind: DistributedType, tmp_path: Path) -> None:
    model = bert()
    made = trainer(model, some(model), arguments(tmp_path), "the Trainer's own")
    PartialState().distributed_type = kind  # as `accelerate launch` would have it set
    callback = made.callback_handler.callbacks[-2]
    assert isinstance(callback, TrainerMask)
    with pytest.raises(
        UsageError, match=f"are sharded by {kind.value}, and a mask needs them whole"
    ):
        callback.on_init_end(made.args, made.state, made.control, model=model)
    assert_no_mask(model)


PARALLEL = ("the Trainer's own", "masked-adamw")


def train_in_parallel(rank: int, directory: Path) -> dict[str, dict[str, Tensor]]:
    found = {}
    for optimizer in PARALLEL:
        model, mask = bert(), some(bert())
        args = arguments(
            directory / optimizer,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            ddp_find_unused_parameters=False,
            save_strategy="steps",
            save_steps=2,
        )
        made = trainer(model, mask, args, optimizer)
        made.train()
        assert_no_mask(model)
        assert isinstance(made.model_wrapped, nn.parallel.DistributedDataParallel)
        found[optimizer] = bits(model)
    resumed = bert_of(seed=1)
    made = trainer(resumed, mask, args, optimizer)
    made.train(resume_from_checkpoint=str(directory / optimizer / "checkpoint-2"))
    assert same(model, resumed)
    made.train()  # the wrapped model once more
    assert not same(model, resumed)
    assert mask.verify(bits(bert()), bits(resumed), dense=HEAD) == []
    assert_that_late_callbacks_are_refused(directory)
    with pytest.raises(UsageError, match="are sharded, and a mask needs them whole"):
        trainer(fully_shard(bert()), mask, args, "the Trainer's own")
    return found


def assert_that_late_callbacks_are_refused(directory: Path) -> None:
    callback = TrainerMask(some(bert()), dense=HEAD)
    late = Trainer(bert(), arguments(directory), train_dataset=rows())
    late.add_callback(callback)
    with pytest.raises(UsageError, match="With several processes the mask must be in force before"):
        late.train()
    made_late = Trainer(
        model_init=bert, args=arguments(directory), train_dataset=rows(), callbacks=[callback]
    )
    with pytest.raises(UsageError, match="Pass `model`, not `model_init`"):
        made_late.train()


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    ranks = in_two_processes(train_in_parallel, tmp_path, tmp_path)
    for optimizer in PARALLEL:
        model, mask = bert(), some(bert())
        before = bits(model)
        trainer(model, mask, arguments(tmp_path / "one"), optimizer).train()
        for rank in range(RANKS):
            for name, expected in bits(model).items():
                torch.testing.assert_close(
                    ranks[rank][optimizer][name], expected, rtol=0, atol=1e-5
                )
            assert mask.verify(before, ranks[rank][optimizer], dense=HEAD) == []


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=VOCABULARY["<eos>"],
        eos_token_id=VOCABULARY["<eos>"],
    )
    return LlamaForCausalLM(config)


def sft(model: nn.Module, directory: Path, **settings: Any) -> Trainer:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizer = tiny_lm_tokenizer()
    tokenizer.pad_token = "[PAD]"
    config = trl.SFTConfig(
        str(directory),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        max_length=16,
        bf16=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    data = datasets.Dataset.from_list([{"text": row["text"]} for row in TEXT_ROWS])
    return trl.SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer, **settings)


def assert_only_selected_moved(
    mask: SparseMask, before: dict[str, Tensor], model: nn.Module
) -> None:
    after = bits(model)
    assert mask.verify(before, after) == []
    moved = sum(int((after[name] != before[name]).sum()) for name in mask.indices)
    assert moved == mask.count


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning",  # TRL's own use of it
)


@pytest.mark.parametrize("optimizer", ["adamw", "masked-adamw"])
def test_sft_trainer(optimizer: str, tmp_path: Path) -> None:
    model = llama()
    mask, before = some(model, every=40), bits(model)
    made = MaskedAdamW(model, mask, lr=0.01) if optimizer == "masked-adamw" else None
    sft(model, tmp_path, callbacks=[TrainerMask(mask)], optimizers=(made, None)).train()
    assert_only_selected_moved(mask, before, model)
    model.save_pretrained(tmp_path / "tuned")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "tuned").eval()
    batch = torch.tensor([[5, 6, 7]])
    assert torch.equal(again(batch).logits, model.eval()(batch).logits)


@pytest.mark.parametrize("wrapped_by", ["the user", "the trainer"])
def test_sft_trainer_with_a_mask_over_adapters(wrapped_by: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(llama(), config)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    space = ParameterSpace.of(model, names)
    mask = SparseMask(space, torch.arange(3, space.numel, 20))
    settings: dict[str, Any] = {
        "callbacks": [TrainerMask(mask)],
        "optimizer_cls_and_kwargs": (lambda: MaskedAdamW, {"mask": mask, "lr": 0.01}),
    }
    if wrapped_by == "the trainer":
        made = sft(llama(), tmp_path, peft_config=config, **settings)
    else:
        made = sft(model, tmp_path, **settings)
    before = bits(made.model)
    made.train()
    assert_only_selected_moved(mask, before, made.model)
    made.save_model(str(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter").eval()
    batch = torch.tensor([[5, 6, 7]])
    assert torch.equal(again(batch).logits, made.model.eval()(batch).logits)
    assert math.isfinite(made.state.log_history[-1]["train_loss"])
