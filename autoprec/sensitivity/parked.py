"""Tensors -> away from the memory of a device while something else runs, and back.

A probe runs the model while the reference's inputs and gradients of the layers in hand wait for
their counterparts: 4 bytes per layer-I/O element beside what training keeps. Where even one layer
at a time is too much of that, they wait elsewhere: on the host for a GPU that has room there, else
in a file; so do the weights as they were before a probe. On a CPU batches and reference gradients
always do, but while they are used. Nothing is taken from anybody: storages are let go of, and one
that somebody else holds all the same is taken again, not read.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from tempfile import TemporaryFile, gettempdir
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, UntypedStorage
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map_only

from autoprec.profiler.parking import bytes_of, fits_the_host, memory_of

log = logging.getLogger(__name__)
T = TypeVar("T")


class Parked:
    """Objects whose tensors leave the device's memory, and come back as they were while in use."""

    def __init__(self, objects: Iterable[Any] = ()) -> None:  # Any: dataclasses
        """Take dataclasses whose fields are trees of tensors; trees are replaced, not changed."""
        self.objects = list(objects)
        self._left: list[_Left] = []
        self._file: Any = None  # opened when it is first needed

    def leave(self) -> None:
        """Let go of what is here; where it cannot be written it stays, which the log says."""
        leaving = self._leaving()
        if not leaving:
            return
        total = sum(storage.nbytes() for storage in leaving.values())
        on_host = next(iter(leaving.values())).device.type != "cpu" and fits_the_host(total)
        left: list[_Left] = []
        try:
            for storage in leaving.values():
                left.append(_Left(weakref.ref(storage), storage.nbytes(), storage.device))
                held = bytes_of(storage).cpu()
                if on_host:
                    left[-1].on_host = held
                else:
                    left[-1].place = self._write(held)
        except OSError as error:
            log.warning("recorded tensors wait in memory: %s (%s)", gettempdir(), error)
            return
        # all is safe elsewhere: only now is anything given up
        places = {key: len(self._left) + number for number, key in enumerate(leaving)}
        self._left += left

        def away(tensor: Tensor) -> "Tensor | _Away":
            place = places.get(_storage(tensor)) if _may_leave(tensor) else None
            return tensor if place is None else _Away.of(tensor, place)

        for each in self.objects:
            vars(each).update(_replaced(Tensor, away, vars(each)))

    def back(self, one: T) -> T:
        """Return one of the objects with its tensors on their device; the object stays away."""

        def here(away: _Away) -> Tensor:
            return away.on(self._left[away.place].again(self._file))

        return replace(one, **_replaced(_Away, here, vars(one)))  # type: ignore[type-var]  # a dataclass

    def _leaving(self) -> dict[int, UntypedStorage]:
        """Return the storages that leave; one of which little is used is somebody else's data."""
        used: Counter[int] = Counter()
        found: dict[int, UntypedStorage] = {}
        trees = [vars(each) for each in self.objects]
        tensors = [t for t in tree_leaves(trees, is_leaf=_stays_whole) if isinstance(t, Tensor)]
        for tensor in {_Away.of(t, _storage(t)): t for t in tensors if _may_leave(t)}.values():
            used[_storage(tensor)] += tensor.nbytes
            found[_storage(tensor)] = tensor.untyped_storage()
        return {key: each for key, each in found.items() if 2 * used[key] >= each.nbytes() > 0}

    def _write(self, held: Tensor) -> int:
        """Write bytes behind what was written; return where they begin."""
        if self._file is None:
            self._file = TemporaryFile(prefix="autoprec-")  # noqa: SIM115  # closed with its owner
            weakref.finalize(self, self._file.close)
        place: int = self._file.seek(0, 2)
        self._file.write(memory_of(held))
        return place


@dataclass
class _Left:
    """A storage that was let go of, and where its bytes are."""

    seen: "weakref.ref[UntypedStorage]"  # torch keeps one Python object per storage that lives
    size: int
    device: torch.device
    on_host: Tensor | None = None
    place: int = 0  # in the file

    def again(self, file: Any) -> UntypedStorage:  # Any: an open file; IO has no `readinto`
        """Return the storage, or one with its bytes where it is gone."""
        if (storage := self.seen()) is not None:
            return storage
        if (held := self.on_host) is None:
            held = torch.empty(self.size, dtype=torch.uint8)
            file.seek(self.place)
            file.readinto(memory_of(held))
        storage = held.to(self.device).untyped_storage()
        self.seen = weakref.ref(storage)
        return storage


@dataclass(frozen=True)
class _Away:
    """Stands for a tensor that is away: where its storage is among those, and it in that."""

    place: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor, place: int) -> "_Away":
        where = int(tensor.storage_offset()), tensor.shape, tensor.stride(), tensor.dtype
        return cls(place, *where)

    def on(self, storage: UntypedStorage) -> Tensor:
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.shape, self.stride)


@dataclass
class _Held(Generic[T]):
    value: T


class InTurn(Generic[T]):
    """Values by number; on a CPU they wait in a file, and are in memory while somebody has them.

    A GPU's wait on the host as they are.

    >>> values = InTurn([torch.zeros(2), torch.ones(2)], torch.device("cpu"))
    >>> values[1]
    tensor([1., 1.])
    """

    def __init__(self, values: Iterable[T], device: torch.device) -> None:
        """Take the values one after the other."""
        self._waits = device.type == "cpu"
        self._held: dict[int, _Held[T]] = {}
        self._parked = Parked()
        stream = iter(values)
        while one := [*islice(stream, 1)]:  # gone before the next is made
            self[len(self)] = one.pop()

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[T]:
        return (self[number] for number in range(len(self)))

    def __contains__(self, number: int) -> bool:
        return number in self._held

    def __setitem__(self, number: int, value: T) -> None:
        self._held[number] = held = _Held(value)
        if self._waits:
            self._parked.objects.append(held)
            self._parked.leave()

    def __getitem__(self, number: int) -> T:
        return self._parked.back(self._held[number]).value


def _may_leave(tensor: Tensor) -> bool:
    """Whether a tensor is bytes and nothing else."""
    is_plain = type(tensor) is Tensor and tensor.layout is torch.strided
    return is_plain and not tensor.requires_grad and torch._C._has_storage(tensor)


def _stays_whole(value: object) -> bool:
    """Whether a value stays: a packed sequence can be made of tensors alone."""
    return isinstance(value, PackedSequence)


def _storage(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def _replaced(
    kind: type[T], change: Callable[[T], object], fields: dict[str, Any]
) -> dict[str, Any]:
    """Return a dataclass's fields with every leaf of a kind changed."""
    changed: dict[str, Any] = tree_map_only(kind, change, fields, is_leaf=_stays_whole)
    return changed
