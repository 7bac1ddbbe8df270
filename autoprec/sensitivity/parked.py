"""What went through some layers in one pass -> away from the device during the next, and back.

A probe runs the model while the reference's inputs and gradients of the layers in hand wait for
their counterparts: 4 bytes per layer-I/O element beside what training keeps. Where even one layer
at a time is too much of that, they wait elsewhere: on the host for a GPU that has room there, else
in a file. Nothing is taken from anybody: tensors are copied and let go of, so what the model, the
batch or the user's code also holds stays where it is.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_leaves, tree_map_only

from autoprec.device.ranks import local_part
from autoprec.model.recording import Call
from autoprec.profiler.parking import fits_the_host

log = logging.getLogger(__name__)
Place = tuple[object, ...]  # of a tensor: its storage, and where in it


class ParkedCalls:
    """Recorded calls whose tensors can leave the device's memory, and come back as they were."""

    def __init__(self, calls: Iterable[Sequence[Call]], *, held: Iterable[Tensor]) -> None:
        """Take the calls; what shares memory with a tensor of `held` stays where it is."""
        self._calls = [call for each in calls for call in each]
        self._stays = {_storage(tensor) for tensor in held if torch._C._has_storage(tensor)}
        self._folder = TemporaryDirectory(prefix="autoprec-")
        self._file = Path(self._folder.name) / "calls.pt"
        self._left: list[Tensor] | None = None  # on the host; None: in the file

    def close(self) -> None:
        """Delete the file."""
        self._folder.cleanup()

    def leave(self) -> None:
        """Let go of the tensors; where they cannot be written they stay, which the log says."""
        trees = [(call.args, call.kwargs, call.gradients) for call in self._calls]
        places: dict[Place, int] = {}  # layers that are called with one tensor share it again
        leaving: list[Tensor] = []
        for tensor in tree_leaves(trees, is_leaf=_stays_whole):
            if self._may_leave(tensor) and _place(tensor) not in places:
                places[_place(tensor)] = len(leaving)
                leaving.append(tensor)
        if not leaving:
            return
        on_gpu = leaving[0].device.type != "cpu"
        if on_gpu and fits_the_host(sum(tensor.nbytes for tensor in leaving)):
            self._left = [tensor.cpu() for tensor in leaving]
        else:
            try:
                torch.save(leaving, self._file)
            except OSError as error:
                log.warning("recorded layers wait in memory: %s (%s)", self._file, error)
                return
        self._device = leaving[0].device
        self._replace(lambda t: _Away(places[_place(t)]) if self._may_leave(t) else t, Tensor)

    def come_back(self) -> None:
        """Bring the tensors back to their device."""
        left = self._left
        if left is None and self._file.exists():
            left = torch.load(self._file)
        if left is not None:
            back = [tensor.to(self._device) for tensor in left]
            self._replace(lambda away: back[away.number], _Away)
        self._left = None
        self._file.unlink(missing_ok=True)

    def _may_leave(self, tensor: object) -> bool:
        """Whether this is a tensor of bytes that nothing else is known to hold."""
        if type(tensor) is not Tensor or tensor.layout is not torch.strided:
            return False
        return _storage(tensor) not in self._stays

    def _replace(self, change: Callable[..., object], kind: type) -> None:
        for call in self._calls:
            tree = call.args, call.kwargs, call.gradients
            call.args, call.kwargs, call.gradients = tree_map_only(
                kind, change, tree, is_leaf=_stays_whole
            )


class _Away:
    """Stands for a tensor that is away."""

    def __init__(self, number: int) -> None:
        self.number = number


def _stays_whole(value: object) -> bool:
    """Whether a value stays: a packed sequence can be made of tensors alone."""
    return isinstance(value, PackedSequence)


def _storage(tensor: Tensor) -> int:
    key: int = local_part(tensor).untyped_storage()._cdata
    return key


def _place(tensor: Tensor) -> Place:
    where = tensor.storage_offset(), tensor.shape, tensor.stride()
    return _storage(tensor), *where, tensor.dtype
