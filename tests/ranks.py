"""How the processes of a distributed test start and end."""

import contextlib
import gc
import importlib
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from autoprec.device.fp8 import TENSOR_SCALES, fp8_support
from autoprec.device.torchao import import_torchao
from autoprec.sensitivity.gemm import fast_gemms

FORKS = multiprocessing.get_context("fork")
NEEDED = (  # what a first compilation, a search and a report import: here once, not in each fork
    *("torch._inductor.compile_fx", "torch._dynamo.backends.debugging", "functorch.compile"),
    *("networkx", "fsspec", "torch.profiler", "autoprec.report", "autoprec.search"),
    *("optuna.storages._rdb.models", "alembic.command", "pandas", "autoprec.tuning.run"),
)


@contextlib.contextmanager
def every_recipe() -> Iterator[None]:
    """Where the CPU's own FP8 kernel has no row scales (torch 2.11), use the exact FP32 one.

    A process that a test starts enters it too, or its numbers are other ones than the test's.
    """
    if TENSOR_SCALES not in fp8_support(torch.device("cpu")).reason:
        yield
        return
    with fast_gemms():
        yield


def run_ranks(body: Callable[[Path], None], folder: Path, *, ranks: int) -> None:
    """Run `body` of a folder on gloo ranks, each a process of one thread."""
    start_ranks(_run_rank, body, str(folder), ranks, ranks=ranks)


def start_ranks(main: Callable[..., None], *args: object, ranks: int) -> None:
    """Run `main` of a rank and arguments in that many processes; raise if one of them fails.

    They are forks of this one, which has imported all that they need: a process of its own would
    take 5 s of a core to import it again.
    """
    _import_what_forks_need()
    start_processes(_started, (main, *args), ranks, start_method="fork")  # type: ignore[no-untyped-call]  # torch's


def exit_code_of(main: Callable[..., None], *args: object) -> int | None:
    """Run `main` in a fork of this process, which may end itself, and return how it ended."""
    _import_what_forks_need()
    process = FORKS.Process(target=_in_process, args=(main, *args))
    process.start()
    process.join()
    return process.exitcode


def _import_what_forks_need() -> None:
    import_torchao()
    for name in NEEDED:
        importlib.import_module(name)


def _started(rank: int, main: Callable[..., None], *args: object) -> None:
    _own_state()
    main(rank, *args)


def _in_process(main: Callable[..., None], *args: object) -> None:
    _own_state()
    torch.set_num_threads(1)
    with every_recipe():
        main(*args)


def _own_state() -> None:
    """Begin as a user's process does: a warning is no error, and nothing was compiled."""
    gc.freeze()  # what was imported, which each collection would look at
    warnings.resetwarnings()
    torch._dynamo.reset()


def _run_rank(rank: int, body: Callable[[Path], None], folder: str, ranks: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", rank=rank, world_size=ranks, init_method=store)
    with every_recipe():
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
