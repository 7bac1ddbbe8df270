"""The peak of the bytes of tensors on the CPU while something runs.

A CPU has no allocator's peak that is worth reading (the process's peak holds the interpreter, file
caches and whatever the C library has not given back), so every storage is counted when an operation
first shows it, and given back when it dies. A dispatch mode sees the operations: forward, the
autograd engine's on the same thread, and the optimizer's. What a kernel takes and gives back within
one operation is not seen, nor what compiled code allocates.
"""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from autoprec.model.context import Context
from autoprec.records import ModelSpec, Recipe, fp8_option
from autoprec.sensitivity.measure import measure_sensitivity
from autoprec.sensitivity.reference import Reference, prepare_reference
from autoprec.sensitivity.tables import Method
from autoprec.workload.functions import Workload


@dataclass
class Peak:
    """The bytes of live tensors on the CPU: before, and at the highest point so far.

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
def tracked_peak() -> Iterator[Peak]:
    """Track the peak of the bytes of all live tensors on the CPU; whole on leaving.

    Costs about 10 us per operation. Tensors that are older than the first test (conftest.py freezes
    them) are counted when an operation first shows them.
    """
    with _StorageCounter() as counter, _resizes_counted(counter):
        yield counter.peak


def training_peak(workload: Workload) -> Peak:
    """Return the peak of a model's first two training steps, the model's own tensors included."""
    with tracked_peak() as peak:
        model = workload.build_model()
        optimizer, batches = workload.build_optimizer(model), workload.train_batches(0)
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(workload.loss_fn(model, next(batches)))
            optimizer.step()
    return peak


def sensitivity_peak(context: Context, spec: ModelSpec, *, steps: int) -> tuple[Reference, Peak]:
    """Return the reference and the peak of the whole stage, after so many steps of warm-up."""
    with tracked_peak() as peak:
        reference = prepare_reference(context, spec, warmup_steps=steps)
        options = [fp8_option(Recipe.TENSORWISE)]
        measure_sensitivity(reference, options=options, method=Method.SIGN_CODED)
    return reference, peak


class _StorageCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Counts the storages that operations take and give, each once, for as long as it lives."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.peak = Peak()
        self._live = 0
        self._sizes: dict[int, int] = {}  # of storages that live, by their ids
        self._alive: dict[int, weakref.ref[UntypedStorage]] = {}
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
        self.see_all((args, kwargs, result))
        return result

    def see_all(self, values: object) -> None:
        """Count what the tensors among values hold, within lists and dictionaries too."""
        if isinstance(values, Tensor):
            self.see(values)
        elif isinstance(values, list | tuple):
            for value in values:
                self.see_all(value)
        elif isinstance(values, dict):
            self.see_all(list(values.values()))

    def see(self, tensor: Tensor) -> None:
        """Count the storage of a tensor; of a tensor that wraps others, theirs."""
        if is_traceable_wrapper_subclass(tensor):
            for name in tensor.__tensor_flatten__()[0]:
                part = getattr(tensor, name)
                if isinstance(part, Tensor):  # a DTensor names its mesh too
                    self.see(part)
        elif tensor.layout is torch.sparse_coo:
            self.see(tensor._indices())
            self.see(tensor._values())
        elif torch._C._has_storage(tensor):
            storage = tensor.untyped_storage()
            if storage.device.type == "cpu":
                self.count(storage)

    def count(self, storage: UntypedStorage) -> None:
        """Count a storage at its present size, once."""
        # torch keeps one Python object per storage, the same one for as long as the storage lives
        size, known = storage.nbytes(), self._sizes.get(id(storage), 0)
        if size == known:
            return
        if not known:
            self._alive[id(storage)] = weakref.ref(storage, partial(self._forget, id(storage)))
        self._live += size - known
        self._sizes[id(storage)] = size
        self.peak.peak_bytes = max(self.peak.peak_bytes, self._live)

    def _forget(self, key: int, _: object) -> None:
        self._live -= self._sizes.pop(key)
        del self._alive[key]


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
