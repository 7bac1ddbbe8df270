"""How much memory a device has free, and whether an error says that it is full."""

from pathlib import Path

import torch

from autoprec.common.text import error_line
from autoprec.errors import DeviceError

MEMORY_INFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")  # version 2; a container's limit is often below the machine's
CPU_ALLOCATOR = "DefaultCPUAllocator"  # torch's message where the system gives a CPU no more memory


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


def can_take(device: torch.device, size: int) -> bool:
    """Whether a device gives so many bytes more.

    A GPU is asked for them, in one piece. Torch keeps what it gave, so that no other process has it
    by the time that it is needed.
    """
    if device.type != "cuda":
        free = free_bytes(device)
        return free is None or size <= free
    torch.cuda.empty_cache()  # blocks of old sizes
    try:
        torch.empty(size, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return False
    return True


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


def shortage(error: BaseException) -> DeviceError | None:
    """Return the one line for an error that says that memory is full; None for another error."""
    if not is_out_of_memory(error):
        return None
    return DeviceError(
        "the training step must fit into the memory of the device, but it ran out "
        f"({error_line(error)}); make the batch smaller, shard the model over ranks "
        "(`parallelize` in model.py), or tune it on a proxy (--proxy)"
    )


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
