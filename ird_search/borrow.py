"""`borrowed`: a model is used and handed back as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def borrowed(model: nn.Module) -> Iterator[nn.Module]:
    """Use a model and hand it back as it was, also after an exception.

    Kept: `training` of every submodule, `requires_grad` and `.grad` of every parameter (gradients
    are set aside meanwhile, so that nothing adds to them), `config.use_cache` and `sparse` of
    embeddings (off meanwhile: the same gradients, in a layout that all operations know), and the
    global random states of torch, numpy and Python. Not kept: weights and hooks; who changes those
    restores them.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> with borrowed(model):
        ...     model.eval().weight.requires_grad_(False).shape
        torch.Size([1, 2])
        >>> model.training, model.weight.requires_grad
        (True, True)
    """
    training = [(module, module.training) for module in model.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    tables = (m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)))
    sparse = [table for table in tables if table.sparse]
    config: Any = getattr(unwrapped(model), "config", None)
    use_cache = getattr(config, "use_cache", None)
    with random_state_kept():
        try:
            for p, _, _ in parameters:
                p.grad = None
            for table in sparse:
                table.sparse = False
            if use_cache is not None:
                config.use_cache = False
            yield model
        finally:
            for module, flag in training:
                module.training = flag
            for p, flag, grad in parameters:
                p.requires_grad_(flag)
                p.grad = grad
            for table in sparse:
                table.sparse = True
            if use_cache is not None:
                config.use_cache = use_cache


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put back what a forward pass writes into buffers, or in their place."""
    kept = [
        (m, name, buffer, buffer.detach().clone())
        for m in model.modules()
        for name, buffer in m._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, saved in kept:
            if not torch.equal(buffer, saved):
                buffer.copy_(saved)
            module._buffers[name] = buffer


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put back the global random states of torch, numpy and Python."""
    cuda = torch.cuda.is_available()
    states = torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else None
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state_all(states[1])
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def unwrapped(model: nn.Module) -> Any:
    """The model inside a PEFT wrapper (known by its attribute: peft is optional), or itself."""
    wrapped: Any = model
    if hasattr(wrapped, "peft_config") and hasattr(wrapped, "get_base_model"):
        return wrapped.get_base_model()
    return model
