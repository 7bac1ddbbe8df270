"""A training state in a device's memory -> away from it between its turns, and back again.

Parameters, buffers, gradients, masters and the optimizer's state stay the objects that they are:
only the bytes of their storages leave. A GPU's wait in the host's memory where that has room, or
else, as a CPU's do, in a file; so of several states only one takes the device's memory. While they
are away nothing may look at these tensors, which have no memory behind them.
"""

import ctypes
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, UntypedStorage, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from autoprec.device.memory import free_bytes
from autoprec.runtime.masters import ON_MODEL, Masters
from autoprec.workload.optimizers import state_tensors, storages

HOST_SHARE = 0.5  # of the host's free memory that a waiting state may take
log = logging.getLogger(__name__)


@dataclass
class Parking:
    """Where one model and its optimizer wait while others run: on the host, or in the file."""

    model: nn.Module
    optimizer: Optimizer
    file: Path
    _away: list[tuple[UntypedStorage, int]] = field(default_factory=list)  # with their bytes
    _held: list[Tensor] | None = None  # on the host, in that order; None: in the file

    def leave(self) -> None:
        """Take the state off its device; where there is no room for it elsewhere, it stays."""
        storages = list(self._storages())
        total = sum(storage.nbytes() for storage in storages)
        if self._device.type != "cpu" and fits_the_host(total):
            self._held = [bytes_of(storage).cpu() for storage in storages]
        else:
            try:
                with self.file.open("wb") as file:
                    for storage in storages:
                        file.write(memory_of(bytes_of(storage).cpu()))
            except OSError as error:
                self.file.unlink(missing_ok=True)  # what is half there takes room from others
                log.warning("a model waits in memory: %s cannot be written (%s)", self.file, error)
                return
        # all is safe elsewhere: only now is anything given up
        self._away = [(storage, storage.nbytes()) for storage in storages]
        for storage in storages:
            storage.resize_(0)

    def come_back(self) -> None:
        """Bring the state back to its device."""
        for storage, size in self._away:
            storage.resize_(size)
        targets = [bytes_of(storage) for storage, _ in self._away]
        if self._held is not None:
            for target, held in zip(targets, self._held, strict=True):
                target.copy_(held)
        elif targets:
            with self.file.open("rb") as file:
                for target in targets:
                    held = (
                        target
                        if target.device.type == "cpu"
                        else torch.empty_like(target, device="cpu")
                    )
                    file.readinto(memory_of(held))
                    target.copy_(held)
        self._away, self._held = [], None

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
