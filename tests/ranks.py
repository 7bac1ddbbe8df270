"""How the processes of a distributed test start and end."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn


def run_ranks(body: Callable[[Path], None], folder: Path, *, ranks: int) -> None:
    """Run `body` of a folder on gloo ranks, each a process of one thread."""
    spawn(_run_rank, args=(body, str(folder), ranks), nprocs=ranks)  # type: ignore[no-untyped-call]  # torch's


def _run_rank(rank: int, body: Callable[[Path], None], folder: str, ranks: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", rank=rank, world_size=ranks, init_method=store)
    body(Path(folder))
    leave_group()


def leave_group() -> None:
    """Wait for the others, then end the process without the interpreter's own clean-up.

    Gloo's threads may still run then and abort it once in a few hundred times ("terminate called
    without an active exception", torch 2.13), after everything was tested.
    """
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)
