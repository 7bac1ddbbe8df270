"""This process among the ranks of a distributed run: sums over them, and one answer for all.

Every function is a collective: all ranks call it, in the same order. In a process without ranks (or
with torch's fake ones, which do not compute) each does nothing and costs nothing. Tensors may be
plain, the same on every rank (DDP), or DTensors of which each rank holds a part (FSDP2, TP):

    sum over elements = sum over ranks of share(x) * sum(local_part(x))

since `share` is one over the number of ranks that hold the same elements.
"""

import contextlib
import math
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeAlias, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from autoprec.common.lost_ranks import is_of_lost_rank
from autoprec.common.text import error_line, first_and_more, one_line
from autoprec.errors import AutoprecError, DeviceError

T = TypeVar("T")
Q = TypeVar("Q")
R = TypeVar("R")
Group: TypeAlias = "dist.ProcessGroup | None"  # None: all ranks; a text, as builds may lack it

PATIENCE = timedelta(hours=2)  # rank 0 may search for long while the others wait
LOST = (
    "every rank must run to its end, but another one stopped or cannot be reached ({how}); look "
    "for the first error above (a killed rank leaves none), fix it, and start all ranks again "
    "(--resume keeps finished stages)"
)
FAILURE_PATIENCE_S = 300.0  # compiling takes one rank minutes longer than another
FAILURE_POLL_S = 0.05
MOST_LISTED = 8  # ranks named in a message
_failures = 0  # of this process, as `check_all_failed` counts them


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the ranks that a launcher such as torchrun started, while the context is open.

    Values go over gloo, tensors of a GPU over NCCL. A process group that is there already is used.

    Raises:
        DeviceError: the ranks do not find each other, or one of them ends before the others.
    """
    if not dist.is_available():
        raise DeviceError("several ranks need a torch that is built with torch.distributed")
    with _losses_told():
        if dist.is_initialized():
            yield
            return
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
        try:
            yield
        finally:
            dist.destroy_process_group()


@contextlib.contextmanager
def _losses_told() -> Iterator[None]:
    """Turn the end of another rank, as this one meets it, into one line.

    Gloo and NCCL raise where this rank talks to it; torchrun, which sees it too, sends SIGTERM.
    """

    def stop(number: int, _frame: object) -> None:
        raise DeviceError(LOST.format(how=signal.Signals(number).name))

    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if is_main else None
    try:
        yield
    except RuntimeError as error:
        if not is_of_lost_rank(error):
            raise
        raise DeviceError(LOST.format(how=error_line(error))) from error
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def rank() -> int:
    """Return this process's rank; 0 where it is alone."""
    return dist.get_rank() if world_size() > 1 else 0


def world_size(group: Group = None) -> int:
    """Return the number of ranks that compute together; 1 where there are none, or fake ones."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_backend(group) == "fake":
        return 1
    return dist.get_world_size(group)


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Return each value summed over the ranks, in float64: one all-reduce for all of them."""
    return _reduced(values, dist.ReduceOp.SUM)


def largest_over_ranks(values: Sequence[float]) -> list[float]:
    """Return each value's largest over the ranks; see `sum_over_ranks`."""
    return _reduced(values, dist.ReduceOp.MAX)


def mean_over_ranks(value: Tensor) -> Tensor:
    """Return a tensor's mean over the ranks, summed in float64, the same bits on each of them."""
    if world_size() == 1:
        return value
    total = value.detach().double()
    dist.all_reduce(total)
    return (total / world_size()).to(value.dtype)


def set_as_on_first_rank(tensors: Iterable[Tensor]) -> None:
    """Give tensors the values that rank 0 has; those that ranks hold parts of stay."""
    for tensor in tensors:
        if world_size() > 1 and not isinstance(tensor, sharded_tensor()):
            dist.broadcast(tensor, src=0)


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor that may be a DTensor, of a sparse one the values."""
    if tensor.is_sparse:
        return tensor.coalesce().values()
    if not isinstance(tensor, sharded_tensor()):
        return tensor
    placed: Any = tensor  # Any: a DTensor, whose class may not be imported
    part = placed.to_local()
    arrived: Tensor = part.wait() if hasattr(part, "wait") else part  # from other ranks
    return arrived


def share(tensor: Tensor) -> float:
    """Return one over the number of ranks that hold the same elements as this one.

    A plain tensor is taken to be the same on all ranks. A DTensor's shards are counted by its mesh,
    whatever the kind (rows, or the strided ones of FSDP2 over TP).
    """
    shards = 1
    if isinstance(tensor, sharded_tensor()):
        placed: Any = tensor  # Any: a DTensor, whose class may not be imported
        if any(placement.is_partial() for placement in placed.placements):
            raise DeviceError(
                "a tensor's parts can be summed over ranks only where each holds whole elements, "
                "but one is a sum that is still to be made (Partial); redistribute it first"
            )
        sizes = zip(placed.device_mesh.shape, placed.placements, strict=True)
        shards = math.prod(size for size, placement in sizes if not placement.is_replicate())
    return shards / world_size()


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor of which ranks may hold parts; a collective if they do."""
    if not isinstance(tensor, sharded_tensor()):
        return tensor
    gathered_whole: Tensor = tensor.full_tensor()
    return gathered_whole


def whole_like(like: Tensor, part: Tensor) -> Tensor:
    """Return the whole tensor of which each rank has the part that it has of `like`."""
    return whole(placed_like(like, part))


def placed_like(like: Tensor, part: Tensor) -> Tensor:
    """Return the tensor of which this rank has `part`, spread over ranks as `like` is."""
    if not isinstance(like, sharded_tensor()):
        return part
    placed: Any = like  # Any: a DTensor, whose class may not be imported
    made: Tensor = type(placed).from_local(
        part,
        placed.device_mesh,
        placed.placements,
        run_check=False,
        shape=placed.shape,
        stride=placed.stride(),
    )
    return made


def placed_as(like: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor spread over ranks as `like` is: a gradient may be a sum still to be made."""
    placed, wanted = cast("Any", tensor), cast("Any", like)  # Any: DTensors, as above
    is_split = isinstance(tensor, sharded_tensor()) and isinstance(like, sharded_tensor())
    if not is_split or placed.placements == wanted.placements:
        return tensor
    spread: Tensor = placed.redistribute(placements=wanted.placements)
    return spread


def part_like(like: Tensor, whole_tensor: Tensor) -> Tensor:
    """Return of a whole tensor the part that this rank holds of `like`; nothing is sent."""
    if not isinstance(like, sharded_tensor()):
        return whole_tensor
    from torch.distributed.tensor import distribute_tensor

    placed: Any = like  # Any: as above
    mesh, placements = placed.device_mesh, placed.placements
    spread = distribute_tensor(whole_tensor, mesh, placements, src_data_rank=None)
    return local_part(spread)


def sharded_tensor() -> tuple[Any, ...]:  # Any: a class, or none
    """Return DTensor for `isinstance`; nothing while nobody imported it, so that none exists."""
    module = sys.modules.get("torch.distributed.tensor")
    return () if module is None else (module.DTensor,)


def gathered(value: T, *, group: Group = None, device: torch.device | None = None) -> list[T]:
    """Return the value of every rank of a group, in the order of ranks; values are pickled."""
    answers = [value] * world_size(group)
    if len(answers) > 1:
        with _sending_from(device):
            dist.all_gather_object(answers, value, group=group)
    return answers


def from_first_rank(value: T) -> T:
    """Return rank 0's value on every rank; values are pickled."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def made_on_first_rank(make: Callable[[], T]) -> T:
    """Return rank 0's result on every rank; the others wait.

    Raises:
        AutoprecError: what `make` raised, the same on every rank.
    """
    return led_by_first_rank(lambda _: make(), lambda _: None)


def check_same(what: str, digest: str) -> None:
    """Check that all ranks have the same of something.

    >>> check_same("model.py", "c0ffee")

    Raises:
        DeviceError: some have another; the same line, with their numbers, on every rank.
    """
    every = gathered(digest)
    usual, _ = Counter(every).most_common(1)[0]  # of equally many the lowest rank's
    others = [number for number, each in enumerate(every) if each != usual]
    if others:
        theirs = one_line(every[others[0]])
        raise DeviceError(
            f"every rank must have the same {what}, but {listed(others)} of {len(every)} got "
            f"another than the others ({theirs}, not {one_line(usual)}); start all ranks with one "
            "command, on machines with the same files and packages"
        )


def check_all_failed(what: str, error: BaseException) -> None:
    """Return where every rank has met a failure, so that all of them can go another way.

    The ranks that did not fail may wait for this one in the middle of the work, so nothing is sent:
    failures are counted in the store by which the ranks found each other.

    Raises:
        DeviceError: some rank did not fail (or not within minutes); on those that did.
    """
    if world_size() == 1:
        return
    global _failures  # one count of this process: ranks that fail alike count alike
    _failures += 1
    store, key = dist.distributed_c10d._get_default_store(), f"autoprec/failure/{_failures}"
    failed, until = store.add(key, 1), time.monotonic() + FAILURE_PATIENCE_S
    while failed < world_size():
        if time.monotonic() > until:
            raise DeviceError(
                f"every rank must do {what}, or none, but {failed} of {world_size()} could not "
                f"(rank {rank()}: {error_line(error)}); start all ranks again with what it lacks"
            ) from error
        time.sleep(FAILURE_POLL_S)
        failed = store.add(key, 0)


def listed(ranks: Iterable[int]) -> str:
    """Return ranks in words: `rank 3`, `ranks 1, 2`."""
    every = list(ranks)
    return f"rank{'s' if len(every) > 1 else ''} {first_and_more(every, most=MOST_LISTED)}"


def led_by_first_rank(lead: Callable[[Callable[[Q], T]], R], answer: Callable[[Q], T]) -> R:
    """Return the result of `lead` on rank 0; all ranks answer together what it asks.

    `lead` is given the function that asks. An `answer` is a collective of its own.

    >>> led_by_first_rank(lambda ask: ask(3) + ask(4), lambda number: number * number)
    25

    Raises:
        AutoprecError: what `lead` raised, the same on every rank.
    """
    # the others answer what rank 0 asks until it has made its result, or failed
    if rank() > 0:
        while True:
            kind, sent = from_first_rank(("", None))  # overwritten by what rank 0 sends
            if kind == "ask":
                answer(cast("Q", sent))
            elif kind == "failed":
                raise cast("AutoprecError", sent)
            else:
                return cast("R", sent)

    def ask(question: Q) -> T:
        from_first_rank(("ask", question))
        return answer(question)

    try:
        made = lead(ask)
    except AutoprecError as error:
        from_first_rank(("failed", type(error)(str(error))))
        raise
    from_first_rank(("made", made))
    return made


def _reduced(
    values: Sequence[float], operation: Any
) -> list[float]:  # Any: torch's ReduceOp has no type
    if world_size() == 1 or not values:
        return list(values)
    numbers = torch.tensor(values, dtype=torch.float64, device=_own_device())
    dist.all_reduce(numbers, op=operation)
    found: list[float] = numbers.tolist()
    return found


def _own_device() -> torch.device:
    """Return the device that this process's backend sends from."""
    if "cpu:" in dist.get_backend_config():  # e.g. "cpu:gloo,cuda:nccl"
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _sending_from(device: torch.device | None) -> contextlib.AbstractContextManager[object]:
    """Make `device` the current one, from which NCCL sends pickled values."""
    is_cuda = device is not None and device.type == "cuda"
    return torch.cuda.device(device) if is_cuda else contextlib.nullcontext()
