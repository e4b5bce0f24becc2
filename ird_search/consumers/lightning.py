"""`LightningMask`: a mask in Lightning's `Trainer`.

What has to happen when:

    callback.setup → module.setup, configure_model → DDP → configure_optimizers → on_fit_start → …

DDP decides when it wraps a model which gradients it waits for, so the mask comes with `setup`.
Gradients are masked in backward, hence before Lightning clips them.
"""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
)
from torch import nn

from ird_search.entries import check_mask
from ird_search.errors import UsageError, nearest
from ird_search.freeze import MaskHandle, apply_mask
from ird_search.mask import SparseMask
from ird_search.mismatch import SHOWN

_SHARDING = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


class LightningMask(Callback):
    """Let a Lightning `Trainer` train the selected entries only.

    Any optimizer that `configure_optimizers` returns will do: frozen entries keep their bits, and
    `gradient_clip_val` counts the trained entries alone. With `MaskedAdamW` the optimizer's state
    is as small as the mask, in memory and in checkpoints. The mask is in force while `fit` runs,
    and taken off when it ends, or fails.

    Args:
        mask: the entries that are trained.
        module: where in the LightningModule the mask's model is, such as "model" or "net.encoder";
            by default the mask names the tensors of the LightningModule itself.
        dense: names of the parameters trained fully, outside the mask (the head).

    Raises:
        ModelError: from `fit`, the mask is of another model.
        UsageError: `module` is no name; from `fit`, there is no such module, the strategy shards
            the model, the module is made too late for several processes, or a masked optimizer has
            other dense tensors.

    Example:
        >>> import torch, warnings
        >>> from ird_search.parameters import ParameterSpace
        >>> class Line(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.model = nn.Linear(4, 1)
        ...     def training_step(self, x, index):
        ...         return self.model(x).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.AdamW(self.parameters(), lr=0.1)
        >>> line = Line()
        >>> before = line.model.weight.detach().clone()
        >>> mask = SparseMask(ParameterSpace.of(line.model, ["weight"]), torch.tensor([2]))
        >>> trainer = Trainer(max_steps=2, accelerator="cpu", barebones=True,
        ...                   callbacks=[LightningMask(mask, module="model")])
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     trainer.fit(line, torch.utils.data.DataLoader(torch.ones(6, 4), batch_size=2))
        >>> line.model.weight.detach() != before
        tensor([[False, False,  True, False]])
    """

    def __init__(self, mask: SparseMask, *, module: str = "", dense: Iterable[str] = ()) -> None:
        check_mask(mask)
        if not isinstance(module, str):
            raise UsageError(
                f"module is a {type(module).__name__}; the dotted name of a module within the "
                "LightningModule is accepted, such as 'model'."
            )
        self.mask, self.module = mask, module
        self.dense = (dense,) if isinstance(dense, str) else tuple(dense)
        self._masked: nn.Module | None = None
        self._handle: MaskHandle | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the model is wrapped, if it is there already."""
        if stage != "fit":
            return
        if isinstance(trainer.strategy, _SHARDING):
            raise UsageError(
                f"The parameters of this model are sharded by {type(trainer.strategy).__name__}, "
                "and a mask needs them whole. Train in one process, or in several that each hold "
                "the whole model (DDP)."
            )
        self._remove()
        if (model := self._model(pl_module)) is not None:
            self._apply(model)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Once more: `setup` and `configure_model` of the LightningModule may make the model."""
        owner = type(pl_module).__name__
        if (model := self._model(pl_module)) is None:
            found = [name for name, _ in pl_module.named_modules() if name]
            raise UsageError(
                f"{owner} has no module {self.module!r}.{nearest(self.module, found)} Name the one "
                f"whose tensors the mask names; there are {', '.join(map(repr, found[:SHOWN]))}."
            )
        if model is not self._masked and isinstance(trainer.strategy, ParallelStrategy):
            raise UsageError(
                "With several processes the mask must be in force before the model is wrapped, and "
                f"this one is wrapped already. Make {self.module!r} in __init__ of {owner}."
            )
        handle = self._apply(model)
        for optimizer in trainer.optimizers:
            handle.check_dense(optimizer, alone=len(trainer.optimizers) == 1)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Take the mask off."""
        self._remove()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the mask off."""
        self._remove()

    def _model(self, pl_module: LightningModule) -> nn.Module | None:
        """The mask's model; None as long as it is not made."""
        try:
            return pl_module.get_submodule(self.module)
        except AttributeError:
            return None

    def _apply(self, model: nn.Module) -> MaskHandle:
        self._remove()
        self._handle = apply_mask(model, self.mask, dense=self.dense)
        self._masked = model
        return self._handle

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._masked = None
