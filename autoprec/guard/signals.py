"""One step -> loss and gradient norms as numbers, read from the device once, alike on all ranks.

Ranks that decided differently would train different models or wait for each other for ever, so
where torch.distributed runs, what is measured is averaged over ranks before anyone decides. Norms
are then root mean squares of the ranks' own parts: the same everywhere, and proportional to the
global norm however parameters are sharded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

from autoprec.guard.ranges import local


@dataclass(frozen=True)
class Signals:
    """What one step showed; `norms` is in the order of the parameters, 0.0 without a gradient."""

    loss: float
    norms: tuple[float, ...]
    shares: tuple[float, ...]

    @property
    def grad_norm(self) -> float:
        """The norm of all gradients."""
        return math.hypot(*self.norms)


def read_signals(
    loss: Tensor | float, parameters: Sequence[nn.Parameter], *, shares: Tensor | None
) -> Signals:
    """Return a step's signals; one transfer from the device, and one all-reduce if distributed."""
    device = loss.device if isinstance(loss, Tensor) else parameters[0].device
    value = torch.as_tensor(loss, device=device).detach().float().reshape(1)
    squares = _norms(parameters, device).square()
    parts = [value, squares, *([] if shares is None else [shares.flatten()])]
    vector = torch.cat(parts)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(vector)
        vector = vector / dist.get_world_size()
    numbers: list[float] = vector.tolist()
    end = 1 + len(parameters)
    norms = tuple(math.sqrt(square) for square in numbers[1:end])
    return Signals(loss=numbers[0], norms=norms, shares=tuple(numbers[end:]))


def _norms(parameters: Sequence[nn.Parameter], device: torch.device) -> Tensor:
    """Return every parameter's gradient norm in FP32 on one device."""
    found: list[Tensor] = [torch.zeros((), device=device)] * len(parameters)
    gradients = {i: local(p.grad) for i, p in enumerate(parameters) if p.grad is not None}
    if not gradients:
        return torch.stack(found)
    order = list(gradients)
    groups = _group_tensors_by_device_and_dtype([list(gradients.values())], with_indices=True)
    for (tensors,), indices in groups.values():
        norms = torch._foreach_norm([tensor for tensor in tensors if tensor is not None])
        for index, norm in zip(indices, norms, strict=True):
            found[order[index]] = norm.to(device, torch.float32)
    return torch.stack(found)
