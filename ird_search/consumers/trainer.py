"""`TrainerMask`: a mask in transformers' `Trainer`, and in trainers built on it (TRL, for one).

The stock `Trainer` is used as it is. What has to happen when:

    create the optimizer → wrap the model (DDP) → on_train_begin → backward → clip → step → …

DDP decides when it wraps a model which gradients it waits for, so with several processes the mask
comes before that, with `on_init_end`. Gradients are masked in backward, hence before the clip.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import ParallelMode

from ird_search.entries import check_mask
from ird_search.errors import UsageError
from ird_search.freeze import MaskHandle, apply_mask
from ird_search.mask import SparseMask

_in_force: weakref.WeakKeyDictionary[nn.Module, MaskHandle] = weakref.WeakKeyDictionary()
"""The masks of these callbacks by model, so that a later callback finds what a broken run left."""

_SHARDING = {DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM}


class TrainerMask(TrainerCallback):
    """Let a transformers `Trainer` train the selected entries only.

    Pass it in `callbacks` when the trainer is made. Any optimizer will do: frozen entries keep
    their bits, and `max_grad_norm` and the logged `grad_norm` count the trained entries alone. With
    `MaskedAdamW` the optimizer's state is as small as the mask, in memory and in checkpoints; its
    learning rate is given to it and not read from the arguments:

        Trainer(..., optimizers=(MaskedAdamW(model, mask, lr=1e-3), None))

    The mask is taken off when training ends. The `Trainer` has no event for training that fails:
    then the mask stays until the same model is trained again with a `TrainerMask`, which replaces
    it, or until `remove`.

    Args:
        mask: the entries that are trained.
        dense: names of the parameters trained fully, outside the mask (the head).

    Raises:
        ModelError: from the `Trainer`, the mask is of another model.
        UsageError: from the `Trainer`, its model is sharded (FSDP, DeepSpeed), the callback came
            too late to several processes, or a masked optimizer has other dense tensors.

    Example:
        >>> import tempfile, torch
        >>> from transformers import BertConfig, BertForSequenceClassification, Trainer
        >>> from ird_search.parameters import ParameterSpace
        >>> model = BertForSequenceClassification(BertConfig(
        ...     vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1,
        ...     intermediate_size=4, max_position_embeddings=8))
        >>> before = {name: p.detach().clone() for name, p in model.named_parameters()}
        >>> space = ParameterSpace.of(model, ["bert.encoder.layer.0.intermediate.dense.weight"])
        >>> mask = SparseMask(space, torch.tensor([3, 7]))
        >>> arguments = TrainingArguments(
        ...     tempfile.mkdtemp(), max_steps=2, learning_rate=0.1, use_cpu=True,
        ...     disable_tqdm=True, report_to=[], save_strategy="no", logging_strategy="no")
        >>> rows = [{"input_ids": torch.tensor([1, 2, 3]), "labels": 1}] * 4
        >>> trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[TrainerMask(mask)])
        >>> _ = trainer.train()
        {'train_runtime': ...}
        >>> after = dict(model.named_parameters())
        >>> sum(int((after[name] != before[name]).sum()) for name in before)
        2
    """

    def __init__(self, mask: SparseMask, *, dense: Iterable[str] = ()) -> None:
        check_mask(mask)
        self.mask = mask
        self.dense = (dense,) if isinstance(dense, str) else tuple(dense)
        self._before_wrapping: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Several processes: the mask must be in force before DDP wraps the model."""
        if args.parallel_mode is ParallelMode.DISTRIBUTED:
            self._apply(kwargs["model"])
            self._before_wrapping.add(kwargs["model"])

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Put the mask on the model without its wrappers."""
        model = kwargs["model"]
        if args.parallel_mode is ParallelMode.DISTRIBUTED and model not in self._before_wrapping:
            raise UsageError(
                "With several processes the mask must be in force before the model is wrapped, and "
                "this model is wrapped already. Pass `model`, not `model_init`, and this callback "
                "in `callbacks` when the Trainer is made."
            )
        self._apply(model)
        optimizer = kwargs.get("optimizer")
        optimizer = getattr(optimizer, "optimizer", optimizer)  # as accelerate wraps it
        if optimizer is not None:
            _in_force[model].check_dense(optimizer, alone=True)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Take the mask off again."""
        self.remove(kwargs["model"])

    @staticmethod
    def remove(model: nn.Module) -> None:
        """Take off the mask that interrupted training left on `model`; without one do nothing."""
        if (handle := _in_force.pop(model, None)) is not None:
            handle.remove()

    def _apply(self, model: nn.Module) -> None:
        sharding = AcceleratorState().distributed_type
        by = f" by {sharding.value}" if sharding in _SHARDING else ""
        if by or any(isinstance(p, DTensor) for p in model.parameters()):
            raise UsageError(
                f"The parameters of this model are sharded{by}, and a mask needs them whole. "
                "Train in one process, or in several that each hold the whole model (DDP)."
            )
        self.remove(model)
        _in_force[model] = apply_mask(model, self.mask, dense=self.dense)
