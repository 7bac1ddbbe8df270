"""What autograd keeps from forward for backward, in the order in which it keeps it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from autoprec.workload.functions import Batch, tensors_in
from autoprec.workload.optimizers import storages


@dataclass
class Saved:
    """The bytes of each storage that autograd keeps, in order, and whether it has a gradient.

    Between them are those of the tensor alone: a storage of many tensors is larger than it, and one
    of an expanded tensor smaller; then they are the storage's.
    """

    sizes: dict[int, tuple[int, int, bool]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(size for size, _, _ in self.sizes.values())

    @property
    def own(self) -> int:
        """The bytes of the tensors alone."""
        return sum(size for _, size, _ in self.sizes.values())

    @property
    def peak(self) -> int:
        """Bytes in backward: what was kept up to a tensor, and two gradients of its size."""
        kept = peak = 0
        for size, _, has_gradient in self.sizes.values():
            kept += size
            peak = max(peak, kept + 2 * size * has_gradient)
        return peak


@contextmanager
def saved_for_backward(model: nn.Module, batch: Batch = ()) -> Iterator[Saved]:
    """Collect what autograd keeps inside, parameters left out.

    A part of the model that is recomputed in backward keeps nothing: its own hooks are the inner
    ones.
    """
    own = {storage._cdata for p in model.parameters() for storage in storages(p)}
    data = {storage._cdata for tensor in tensors_in(batch) for storage in storages(tensor)}
    saved = Saved()

    def pack(tensor: Tensor) -> Tensor:
        # a parameter that FSDP has gathered is no shard, and is freed after forward
        if isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            return tensor
        for storage in storages(tensor):
            key = storage._cdata
            if key not in own:
                has_gradient = key not in data and tensor.is_floating_point()
                size = storage.nbytes()
                alone = min(size, tensor.numel() * tensor.itemsize)
                saved.sizes[key] = size, alone, has_gradient
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
