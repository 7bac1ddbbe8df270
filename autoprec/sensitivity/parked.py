"""Tensors -> away from the memory of a device while something else runs, and back.

A probe runs the model while the reference's inputs and gradients of the layers in hand wait for
their counterparts: 4 bytes per layer-I/O element beside what training keeps, and 4 more where the
counterparts outlive what autograd lets go of. Where even one layer at a time is too much of that,
both wait elsewhere from the moment at which a layer's gradient arrives: on the host for a GPU that
has room there, else in a file; so do the weights as they were before a probe. On a CPU batches and
reference gradients always do, but while they are used. Nothing is taken from anybody: storages are
let go of, and one that somebody else holds all the same is taken again, not read.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from tempfile import gettempdir
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, UntypedStorage
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map_only

from autoprec.profiler.parking import ByteFile, bytes_of, fits_the_host

log = logging.getLogger(__name__)
T = TypeVar("T")


class Parked:
    """Where tensors wait away from their device's memory: on the host, or in a file."""

    def __init__(self) -> None:
        """Begin with none."""
        self._file = ByteFile()
        self._left: dict[Hashable, _Left] = {}  # by the storage, or part of one, that left
        self._on_host = 0  # bytes
        self._is_full = False

    def leave(self, objects: Iterable[Any], *, passing: str = "") -> None:  # Any: dataclasses
        """Let go of the tensors in dataclasses, whose fields are trees; `back` brings them back.

        Trees are replaced, not changed. What cannot be written stays, which the log says once. In
        the field `passing` are tensors that may become others in place once nobody here has them,
        as a gradient that autograd adds to.
        """
        every = [(vars(each), name) for each in objects for name in vars(each)]
        self._leave([place for place in every if place[1] != passing], is_lasting=True)
        self._leave([place for place in every if place[1] == passing], is_lasting=False)

    def _leave(self, fields: Sequence[tuple[dict[str, Any], str]], *, is_lasting: bool) -> None:
        leaving = {} if self._is_full else self._leaving([own[name] for own, name in fields])
        try:
            left = {
                key: self._known(key) or self._away(key, each, is_lasting=is_lasting)
                for key, each in leaving.items()
            }
        except OSError as error:
            self._is_full = True
            log.warning("recorded tensors wait in memory: %s (%s)", gettempdir(), error)
            return
        if is_lasting:
            self._left |= left  # all is safe elsewhere: only now is anything given up

        def away(tensor: Tensor) -> "Tensor | _Away":
            if not _may_leave(tensor):
                return tensor
            if (whole := left.get(_key(tensor))) is not None:
                return _Away.of(tensor, whole)
            alone = left.get(_place(tensor))
            return tensor if alone is None else _Away.of(tensor, alone, is_alone=True)

        for own, name in fields if left else ():
            own[name] = _replaced(Tensor, away, own[name])

    def _leaving(self, trees: Sequence[Any]) -> dict[Hashable, Tensor]:  # Any: trees
        """Return what leaves: by storage, or by place the parts of one of which little is used."""
        used: Counter[Hashable] = Counter()
        leaves = tree_leaves(trees, is_leaf=_stays_whole)
        tensors = {_place(t): t for t in leaves if isinstance(t, Tensor) and _may_leave(t)}
        for tensor in tensors.values():
            used[_key(tensor)] += tensor.nbytes
        found: dict[Hashable, Tensor] = {}
        for place, tensor in tensors.items():
            key, size = _key(tensor), tensor.untyped_storage().nbytes()
            if self._known(key) is not None or 2 * used[key] >= size > 0:
                found[key] = tensor
            elif size:
                found[place] = tensor
        return found

    def _known(self, key: Hashable) -> "_Left | None":
        """Return what was written of a storage, if it is that one still."""
        left = self._left.get(key)
        storage = None if left is None else left.storage
        return left if storage is not None and storage._cdata == key else None

    def _away(self, key: Hashable, tensor: Tensor, *, is_lasting: bool) -> "_Left":
        """Return where the bytes of a tensor's storage are now, too, or its own."""
        own = tensor if key == _key(tensor) else tensor.clone(memory_format=torch.contiguous_format)
        storage = own.untyped_storage()
        size, device = storage.nbytes(), storage.device
        held, left = bytes_of(storage).cpu(), _Left(size, device, self._file)
        left.seen = weakref.ref(storage) if is_lasting else None
        # so that all that wait there take no more of it than they may
        if device.type != "cpu" and fits_the_host(size + self._on_host // 2):
            left.on_host = held
            self._on_host += size
        else:
            left.place = self._file.write(held)
        return left


def back(one: T) -> T:
    """Return a dataclass with its tensors on their device; itself it stays away."""
    return replace(one, **_replaced(_Away, _Away.here, vars(one)))  # type: ignore[type-var]  # a dataclass


def floating_shapes(values: Any) -> list[torch.Size]:  # Any: a tree
    """Return the shapes of a tree's floating tensors, those that are away too."""
    return [
        each.shape
        for each in tree_leaves(values)
        if isinstance(each, Tensor | _Away) and each.dtype.is_floating_point
    ]


@dataclass(eq=False)
class _Left:
    """A storage that was let go of, and where its bytes are."""

    size: int
    device: torch.device
    file: ByteFile
    # torch keeps one Python object per storage that lives; None: it may have other bytes by now
    seen: "weakref.ref[UntypedStorage] | None" = None
    on_host: Tensor | None = None
    place: int = 0  # in the file

    @property
    def storage(self) -> UntypedStorage | None:
        """The storage, while it lives and has these bytes."""
        return None if self.seen is None else self.seen()

    def again(self) -> UntypedStorage:
        """Return the storage, or one with its bytes where it is gone."""
        if (storage := self.storage) is not None:
            return storage
        held = self.on_host
        if held is None:
            held = self.file.read(self.place, torch.empty(self.size, dtype=torch.uint8))
        again: UntypedStorage = held.to(self.device).untyped_storage()
        self.seen = None if self.seen is None else weakref.ref(again)
        return again


@dataclass(frozen=True)
class _Away:
    """Stands for a tensor that is away: its storage, and where in that it lies."""

    left: _Left
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor, left: _Left, *, is_alone: bool = False) -> "_Away":
        if is_alone:
            tensor = torch.empty_like(tensor, device="meta", memory_format=torch.contiguous_format)
        return cls(left, int(tensor.storage_offset()), tensor.shape, tensor.stride(), tensor.dtype)

    def here(self) -> Tensor:
        storage = self.left.again()
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.shape, self.stride)

    def __add__(self, other: Tensor) -> Tensor:
        """Return the sum where another gradient comes to a tensor that has left."""
        return self.here() + other


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
            self._parked.leave([held])

    def __getitem__(self, number: int) -> T:
        return back(self._held[number]).value


def _may_leave(tensor: Tensor) -> bool:
    """Whether a tensor is bytes and nothing else."""
    is_plain = type(tensor) is Tensor and tensor.layout is torch.strided
    return is_plain and not tensor.requires_grad and torch._C._has_storage(tensor)


def _stays_whole(value: object) -> bool:
    """Whether a value stays: a packed sequence can be made of tensors alone."""
    return isinstance(value, PackedSequence)


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Return what tells a tensor from others."""
    where = int(tensor.storage_offset()), tensor.shape, tensor.stride(), tensor.dtype
    return _key(tensor), *where


def _key(tensor: Tensor) -> int:
    """Return what tells a tensor's storage from others that live."""
    key: int = tensor.untyped_storage()._cdata
    return key


def _replaced(kind: type[T], change: Callable[[T], object], tree: Any) -> Any:  # Any: a tree
    """Return a tree with every leaf of a kind changed."""
    return tree_map_only(kind, change, tree, is_leaf=_stays_whole)
