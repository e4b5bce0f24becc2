"""Two processes on this machine that talk through gloo, as `torchrun --nproc-per-node 2` makes."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn

RANKS = 2


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Copies of everything a model holds; `tests.toy`, which has it too, is slow to import."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def in_two_processes(work: Callable[..., Any], directory: Path, *arguments: Any) -> list[Any]:
    """What `work(rank, *arguments)` returns in each process; it must live in a module."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    torch.multiprocessing.spawn(_fork, (work, port, directory, arguments))
    return [torch.load(directory / f"{rank}.pt") for rank in range(RANKS)]


def _fork(_: int, *arguments: Any) -> None:
    """From a fresh process, which has imported everything (once) and started no thread yet."""
    gc.freeze()
    torch.multiprocessing.start_processes(_rank, arguments, nprocs=RANKS, start_method="fork")


def _rank(
    rank: int, work: Callable[..., Any], port: int, directory: Path, arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    try:
        torch.save(work(rank, *arguments), directory / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()
