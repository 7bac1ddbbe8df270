"""How much memory tensors take: the peak of what runs inside, and what a device has free.

A CUDA allocator keeps its own peak. A CPU has none that is worth reading (the process's peak holds
the interpreter, file caches and whatever the C library has not given back), so there every storage
is counted when an operation first shows it, and given back when it dies. A dispatch mode sees the
operations: forward, the autograd engine's on the same thread, and the optimizer's. What a kernel
takes and gives back within one operation is not seen, nor what compiled code allocates.
"""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

MEMORY_INFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # version 2; a container's limit is often below the machine's
CPU_ALLOCATOR = "DefaultCPUAllocator"  # torch's message where the system gives a CPU no more memory


@dataclass
class Peak:
    """The bytes of live tensors on a device: before, and at the highest point so far.

    >>> with tracked_peak() as peak:
    ...     x = torch.zeros(1000)
    ...     y = x + 1  # both are alive
    ...     del x, y
    >>> peak.rise_bytes
    8000
    """

    before_bytes: int = 0  # alive on entry
    peak_bytes: int = 0  # in all, those included

    @property
    def rise_bytes(self) -> int:
        """How far the peak is above what was alive on entry."""
        return self.peak_bytes - self.before_bytes


@contextmanager
def tracked_peak(device: torch.device | str = "cpu") -> Iterator[Peak]:
    """Track the peak of the bytes of all live tensors on a device; whole on leaving.

    Costs about 10 us per operation on a CPU. On CUDA the allocator's peak is reset, so that such
    contexts do not nest there.
    """
    device = torch.device(device)
    if device.type != "cuda":
        with _StorageCounter(device.type) as counter, _resizes_counted(counter):
            yield counter.peak
        return
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    peak = Peak(torch.cuda.memory_allocated(device))
    try:
        yield peak
    finally:
        torch.cuda.synchronize(device)
        peak.peak_bytes = torch.cuda.max_memory_allocated(device)


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that tensors can still take on a device; None where the system is silent.

    What torch's CUDA allocator keeps in reserve is free. On a CPU the limit of a container counts
    as well as the machine's memory.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = _machine_bytes(), _container_bytes()
    return min((size for size in found if size is not None), default=None)


def limit_memory(device: torch.device, limit: int) -> None:
    """Make torch's CUDA allocator give no more than `limit` bytes from now on; a CPU has none."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0), device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or the one that it was raised from, says that a device's memory is full."""
    if error.__cause__ is not None and is_out_of_memory(error.__cause__):
        return True  # a function of the user's file ran out of it
    is_cpu = isinstance(error, RuntimeError) and CPU_ALLOCATOR in str(error)
    return is_cpu or isinstance(error, torch.OutOfMemoryError)


def _machine_bytes() -> int | None:
    try:
        lines = MEMORY_INFO.read_text().splitlines()
    except OSError:
        return None
    found = {key: value for key, _, value in (line.partition(":") for line in lines)}
    return int(found["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in found else None


def _container_bytes() -> int | None:
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        statistics = (CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return None
    if limit == "max":
        return None
    # cached files are given back when memory is asked for
    cached = next((int(x.split()[1]) for x in statistics if x.startswith("inactive_file ")), 0)
    return max(int(limit) - used + cached, 0)


class _StorageCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Counts the storages that operations take and give, each once, for as long as it lives."""

    supports_higher_order_operators = True

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.peak = Peak()
        self._device_type = device_type
        self._live = 0
        self._sizes: dict[weakref.ref[UntypedStorage], int] = {}
        gc.collect()  # what is dead but not yet freed would be taken to be alive
        for held in gc.get_objects():
            if issubclass(type(held), Tensor):
                self.see(held)
        self.peak.before_bytes = self._live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:  # Any: torch's own protocol
        """Run the operation, or let the subclass among its operands take it apart."""
        # fake tensors, by which DTensors find out shapes, are taken by a mode below this one
        wraps = (kind for kind in types if not issubclass(kind, FakeTensor))
        if any(kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ for kind in wraps):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        # operands too: a storage that came from elsewhere (numpy, a file) was not yet seen
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return result

    def see(self, tensor: Tensor) -> None:
        """Count the storage of a tensor; of a tensor that wraps others, theirs."""
        if is_traceable_wrapper_subclass(tensor):
            for name in tensor.__tensor_flatten__()[0]:
                self.see(getattr(tensor, name))
        elif tensor.layout is torch.sparse_coo:
            self.see(tensor._indices())
            self.see(tensor._values())
        elif torch._C._has_storage(tensor):
            storage = tensor.untyped_storage()
            if storage.device.type == self._device_type:
                self.count(storage)

    def count(self, storage: UntypedStorage) -> None:
        """Count a storage at its present size, once."""
        # torch keeps one Python object per storage, the same one for as long as the storage lives
        key = weakref.ref(storage, self._forget)
        size = storage.nbytes()
        self._live += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak.peak_bytes = max(self.peak.peak_bytes, self._live)

    def _forget(self, key: "weakref.ref[UntypedStorage]") -> None:
        self._live -= self._sizes.pop(key, 0)


@contextmanager
def _resizes_counted(counter: _StorageCounter) -> Iterator[None]:
    """Count what `resize_` of a storage takes and frees: FSDP does so, and it is no operation."""
    own = UntypedStorage.resize_

    def resize(storage: UntypedStorage, size: int) -> Any:  # Any: torch's own
        result = own(storage, size)
        counter.count(storage)
        return result

    UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]  # put back below
    try:
        yield
    finally:
        UntypedStorage.resize_ = own  # type: ignore[method-assign]  # as it was
