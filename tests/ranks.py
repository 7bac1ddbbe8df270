"""How the processes of a distributed test start and end."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from autoprec.device.fp8 import TENSOR_SCALES, fp8_support
from autoprec.sensitivity.gemm import fast_fp8_gemms


@contextlib.contextmanager
def every_recipe() -> Iterator[None]:
    """Where the CPU's own FP8 kernel has no row scales (torch 2.11), use the exact FP32 one.

    A process that a test starts enters it too, or its numbers are other ones than the test's.
    """
    cpu = torch.device("cpu")
    if TENSOR_SCALES not in fp8_support(cpu).reason:
        yield
        return
    with fast_fp8_gemms(cpu):
        yield


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
