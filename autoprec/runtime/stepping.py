"""What an optimizer's step over masters needs, made once and kept for as long as nothing changes.

A model of 300 tensors must not pay for each of them in Python. Between steps nothing is looked up
by parameter: the lists of parameters, masters and gradients are kept, writes into parameters are
found by comparing two lists of stamps, and every copy is one foreach call:

    m.grad = float(p.grad)   into views of one FP32 buffer
    p = bf16(m)              after the step

The buffer would be a fifth copy of the parameters in FP32 (BF16 weights and gradients 4 bytes,
masters 4, AdamW's moments 8, and 4 for it: 20 bytes a parameter, where plain FP32 training has 16).
torch's own optimizers treat every parameter by itself, so they step through the masters in chunks
that share one buffer of CHUNK_BYTES. Others, and steps with a closure, take all at once.
"""

import inspect
import math
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autoprec.device.ranks import local_part, placed_as, placed_like, sharded_tensor
from autoprec.runtime.masters import Masters, Stamp

CHUNK_BYTES = 2**28  # of FP32 gradients; an H100 steps through them in half a millisecond
ALIGNMENT = 64  # elements; what vectorised kernels want
BY_PARAMETER = "ASGD Adadelta Adafactor Adagrad Adam Adamax Muon NAdam RAdam RMSprop Rprop SGD"
SEPARABLE = frozenset(  # by the functions themselves: a subclass's own step is another
    inspect.unwrap(getattr(torch.optim, name).step) for name in BY_PARAMETER.split()
)
SEPARABLE_ELSEWHERE = "transformers.optimization.Adafactor.step"
RawStep = Callable[[Optimizer], object]


def raw_step(optimizer: Optimizer) -> RawStep | None:
    """Return the optimizer's step without hooks if it treats every parameter by itself."""
    hooked = type(optimizer).step
    own = inspect.unwrap(hooked)
    is_known = own in SEPARABLE or f"{own.__module__}.{own.__qualname__}" == SEPARABLE_ELSEWHERE
    found: RawStep | None = getattr(hooked, "__wrapped__", None) if is_known else None
    return found


@dataclass(eq=False)
class Chunk:
    """Masters that step together; `groups` is what each of the optimizer's groups steps then."""

    groups: list[list[Tensor]]
    parameters: list[nn.Parameter] = field(default_factory=list)
    masters: list[Tensor] = field(default_factory=list)
    sizes: dict[torch.device, int] = field(default_factory=dict)  # elements of the buffers
    places: list[int] = field(default_factory=list)  # of each master's gradient in its buffer
    views: list[Tensor] = field(default_factory=list)  # the gradients, once there are buffers
    targets: list[Tensor] = field(default_factory=list)  # their local parts

    def add(self, group: int, parameter: nn.Parameter, master: Tensor) -> None:
        """Add a master to one of the groups."""
        self.groups[group].append(master)
        self.parameters.append(parameter)
        self.masters.append(master)
        place = self.sizes.get(master.device, 0)
        self.places.append(place)
        self.sizes[master.device] = place + _room(master)

    @property
    def elements(self) -> int:
        """How many there are in the buffers."""
        return sum(self.sizes.values())

    def give_gradients(self) -> None:
        """Set every master's gradient to its parameter's, in FP32."""
        gradients = [parameter.grad for parameter in self.parameters]
        sources, targets = [], []
        for place, (master, gradient) in enumerate(zip(self.masters, gradients, strict=True)):
            if gradient is None or gradient.layout is not torch.strided:
                master.grad = None if gradient is None else gradient.float()
                continue
            if master.grad is not self.views[place]:
                master.grad = self.views[place]
            sources.append(placed_as(self.views[place], gradient))
            targets.append(self.targets[place])
        if sources:
            torch._foreach_copy_(targets, _locals(sources))

    def place_gradients(self, buffers: dict[torch.device, Tensor]) -> None:
        """Make the gradients views of the buffers, laid out as the masters are."""
        if not self.views:
            pairs = zip(self.masters, self.places, strict=True)
            self.views = [_view(buffers[master.device], place, master) for master, place in pairs]
            self.targets = _locals(self.views)


class Layout:
    """The parameters that one optimizer steps, with masters of several models, perhaps."""

    def __init__(
        self, groups: Sequence[list[nn.Parameter]], stores: Sequence[Masters], *, is_split: bool
    ) -> None:
        """Bring the masters of the groups' parameters up to date, and split them if asked to."""
        self.is_split = is_split
        self._groups = [list(group) for group in groups]
        self._stores = list(stores)
        every = [parameter for group in groups for parameter in group]
        self.pairs: dict[nn.Parameter, Tensor] = {}
        self._owned: list[tuple[list[nn.Parameter], list[Stamp]]] = []  # by store
        for store in stores:
            owned = [p for p in every if p in store.values]
            self.pairs |= {p: store.current(p, looks_closer=False) for p in owned}
            self._owned.append((owned, [store.agreed[p] for p in owned]))
        self._state = self._store_state()
        self.chunks = self._split()
        self._parameters, self._masters = list(self.pairs), list(self.pairs.values())
        self._buffers: dict[torch.device, Tensor] = {}

    def fits(
        self,
        groups: Sequence[list[nn.Parameter]],
        stores: Sequence[Masters],
        *,
        is_split: bool,
    ) -> bool:
        """Whether this is what a layout made now would be, but for what was written since."""
        return (
            self.is_split is is_split
            and len(groups) == len(self._groups)
            and all(map(are_same, groups, self._groups))
            and are_same(stores, self._stores)
            and self._state == self._store_state()
        )

    def begin_step(self) -> bool:
        """Take over what was written into parameters; False: make another layout, masters changed.

        Costs the host a look at the stamps, and the device nothing but in steps of a close look.
        """
        for store, (owned, stamps) in zip(self._stores, self._owned, strict=True):
            store.begin_step(owned, stamps)
        return self._state == self._store_state()

    def was_written(self) -> bool:
        """Whether somebody has written into the parameters since the step began."""
        for own in self._owned:  # a generator would be a call by the parameter
            for parameter, stamp in zip(*own, strict=True):
                if parameter._version != stamp.version:
                    return True
        return False

    def copy_down(self) -> None:
        """Round masters into the parameters' own BF16 storage: p = bf16(m)."""
        with torch.no_grad():
            torch._foreach_copy_(_locals(self._parameters), _locals(self._masters))
        for own in self._owned:
            for parameter, stamp in zip(*own, strict=True):
                stamp.version = parameter._version

    @torch.no_grad()
    def give_gradients(self, chunk: Chunk) -> None:
        """Set the gradients of a chunk's masters to their parameters'."""
        for device in chunk.sizes.keys() - self._buffers.keys():
            largest = max(chunk.sizes.get(device, 0) for chunk in self.chunks)
            self._buffers[device] = torch.empty(largest, dtype=torch.float32, device=device)
        chunk.place_gradients(self._buffers)
        chunk.give_gradients()

    def end_step(self) -> None:
        """Give memory back; a CPU's stays, because malloc would page it in anew."""
        for device, buffer in list(self._buffers.items()):
            if device.type != "cpu" and buffer.nbytes > CHUNK_BYTES:
                self.release()

    def release(self) -> None:
        """Let all buffers go."""
        for chunk in self.chunks:
            chunk.views, chunk.targets = [], []
            for master in chunk.masters:
                master.grad = None
        self._buffers.clear()

    def _store_state(self) -> list[tuple[int, int]]:
        return [(store.changes, len(store.values)) for store in self._stores]

    def _split(self) -> list[Chunk]:
        most = CHUNK_BYTES // 4 if self.is_split else math.inf
        chunks = [Chunk([[] for _ in self._groups])]
        for number, group in enumerate(self._groups):
            for parameter in group:
                master = self.pairs.get(parameter)
                if master is None:  # FP32 already; it steps in whichever chunk this is
                    chunks[-1].groups[number].append(parameter)
                    continue
                elements = chunks[-1].elements
                if elements and elements + _room(master) > most:
                    chunks.append(Chunk([[] for _ in self._groups]))
                chunks[-1].add(number, parameter, master)
        return chunks


def are_same(some: Collection[Any], others: Collection[Any]) -> bool:  # Any: whatever they hold
    """Whether two collections hold the same objects in the same order."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _locals(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors, of shards the local parts."""
    sharded = sharded_tensor()
    return [local_part(t) if isinstance(t, sharded) else t for t in tensors]


def _room(master: Tensor) -> int:
    """Return the elements that a master's gradient takes in a buffer."""
    return -(-local_part(master).numel() // ALIGNMENT) * ALIGNMENT


def _view(buffer: Tensor, place: int, master: Tensor) -> Tensor:
    local = local_part(master)
    strides = torch.empty_like(local, device="meta").stride()  # dense, in the master's own order
    return placed_like(master, buffer.as_strided(local.shape, strides, place))
