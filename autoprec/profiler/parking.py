"""A training state in a device's memory -> away from it between its turns, and back again.

Parameters, buffers, gradients, masters and the optimizer's state stay the objects that they are:
only the bytes of their storages leave. A GPU's wait in the host's memory where that has room, or
else, as a CPU's do, in a file; so of several states only one takes the device's memory. While they
are away nothing may look at these tensors, which have no memory behind them.
"""

import ctypes
import logging
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from tempfile import TemporaryFile, gettempdir
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from autoprec.device.memory import free_bytes
from autoprec.runtime.masters import ON_MODEL, Masters
from autoprec.workload.optimizers import state_tensors, storages

HOST_SHARE = 0.5  # of the host's free memory that a waiting state may take
log = logging.getLogger(__name__)


class ByteFile:
    """Bytes in a file without a name in the temporary folder, opened when it is first needed."""

    def __init__(self) -> None:
        self._file: Any = None  # IO has no `readinto`

    def write(self, held: Tensor) -> int:
        """Write bytes behind what was written; return where they begin."""
        if self._file is None:
            self._file = TemporaryFile(prefix="autoprec-")  # noqa: SIM115  # closed with its owner
            # not the buffer above it, which would try once more what a full disk did not take
            weakref.finalize(self, self._file.raw.close)
        place: int = self._file.seek(0, 2)
        self._file.write(memory_of(held))
        self._file.flush()  # a full disk is told now, and not once the bytes are given up
        return place

    def read(self, place: int, held: Tensor) -> Tensor:
        """Fill a tensor of bytes on the CPU with those from there on, and return it."""
        self._file.seek(place)
        self._file.readinto(memory_of(held))
        return held


@dataclass
class Parking:
    """Where one model and its optimizer wait while others run: on the host, or in a file."""

    model: nn.Module
    optimizer: Optimizer
    # with their sizes, and their bytes on the host or the place of these in the file
    _away: list[tuple[UntypedStorage, int, Tensor | int]] = field(default_factory=list)
    _file: ByteFile = field(default_factory=ByteFile)

    def leave(self) -> None:
        """Take the state off its device; where there is no room for it elsewhere, it stays."""
        storages = list(self._storages())
        total = sum(storage.nbytes() for storage in storages)
        on_host = self._device.type != "cpu" and fits_the_host(total)
        try:
            lefts: list[Tensor | int] = [
                bytes_of(each).cpu() if on_host else self._file.write(bytes_of(each).cpu())
                for each in storages
            ]
        except OSError as error:
            self._file = ByteFile()  # what is half there takes room from others
            log.warning("a model waits in memory: %s (%s)", gettempdir(), error)
            return
        # all is safe elsewhere: only now is anything given up
        self._away = [(s, s.nbytes(), left) for s, left in zip(storages, lefts, strict=True)]
        for storage in storages:
            storage.resize_(0)

    def come_back(self) -> None:
        """Bring the state back to its device."""
        for storage, size, left in self._away:
            storage.resize_(size)
            target = bytes_of(storage)
            if not isinstance(left, Tensor):
                is_cpu = storage.device.type == "cpu"
                buffer = target if is_cpu else torch.empty_like(target, device="cpu")
                left = self._file.read(left, buffer)
            target.copy_(left)
        self._away, self._file = [], ByteFile()

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _storages(self) -> Iterator[UntypedStorage]:
        """Yield every storage of the state that can leave, each once."""
        seen: set[int] = set()
        for tensor in self._tensors():
            gradient = tensor.grad if tensor.is_leaf else None
            whole = (tensor,) if gradient is None else (tensor, gradient)
            for storage in chain.from_iterable(map(storages, whole)):
                # What lies elsewhere takes no memory of the device; a mapped file or another
                # library's memory cannot be given back.
                is_here = storage.device.type == self._device.type and storage.resizable()
                if storage._cdata not in seen and storage.nbytes() and is_here:
                    seen.add(storage._cdata)
                    yield storage

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.model.parameters()
        yield from self.model.buffers()
        for module in self.model.modules():
            masters: Masters | None = vars(module).get(ON_MODEL)
            if masters is not None:
                yield from (value for value in masters.values.values() if value is not None)
        yield from state_tensors(self.optimizer)
        groups = tree_leaves(self.optimizer.param_groups)
        yield from (leaf for leaf in groups if isinstance(leaf, Tensor))


def fits_the_host(total: int) -> bool:
    """Whether so many bytes may wait in the host's memory."""
    free = free_bytes(torch.device("cpu"))
    return free is not None and total < HOST_SHARE * free


def bytes_of(storage: UntypedStorage) -> Tensor:
    """Return a storage as a tensor of bytes."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def memory_of(held: Tensor) -> "ctypes.Array[ctypes.c_ubyte]":
    """Return the memory of a tensor of bytes on the CPU; numpy's would never be given back."""
    return (ctypes.c_ubyte * held.numel()).from_address(held.data_ptr())
