"""One step -> loss and gradient norms, alike on all ranks; and whether these are unusually high.

Ranks that decided differently would train different models or wait for each other for ever, so
where torch.distributed runs, what is measured is averaged over ranks before anyone decides. Norms
are then root mean squares of the ranks' own parts: the same everywhere, and proportional to the
global norm however parameters are sharded.

A loss or norm falls and jitters. Its band ends at median + width * s, over the last `window`
values, with s = 1.4826 * MAD (which is the standard deviation of a normal distribution) and at
least `floor`, absolute or relative to the median, so that a very quiet stretch does not turn
ordinary noise into an alarm. Median and MAD bear a window that is half outliers, so values above
the band count too: after a lasting change of level it follows.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

from autoprec.device.ranks import local_part

FEWEST_VALUES = 20  # before which nothing is unusual
MAD_TO_SIGMA = 1.4826  # of a normal distribution


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
    loss: Tensor, parameters: Sequence[nn.Parameter], *, shares: Tensor | None
) -> Signals:
    """Return a step's signals; one transfer from the device, and one all-reduce if distributed."""
    value = loss.detach().float().reshape(1)
    parts = [value, _norms(parameters, loss.device).square()]
    vector = torch.cat(parts if shares is None else [*parts, shares.flatten()])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(vector)
        vector = vector / dist.get_world_size()
    numbers: list[float] = vector.tolist()
    end = 1 + len(parameters)
    return Signals(numbers[0], tuple(map(math.sqrt, numbers[1:end])), tuple(numbers[end:]))


def _norms(parameters: Sequence[nn.Parameter], device: torch.device) -> Tensor:
    """Return every parameter's gradient norm in FP32 on one device."""
    found: list[Tensor] = [torch.zeros((), device=device)] * len(parameters)
    gradients = {i: local_part(p.grad) for i, p in enumerate(parameters) if p.grad is not None}
    if not gradients:
        return torch.stack(found)
    order = list(gradients)
    groups = _group_tensors_by_device_and_dtype([list(gradients.values())], with_indices=True)
    for (tensors,), indices in groups.values():
        norms = torch._foreach_norm([tensor for tensor in tensors if tensor is not None])
        for index, norm in zip(indices, norms, strict=True):
            found[order[index]] = norm.to(device, torch.float32)
    return torch.stack(found)


class RunningBand:
    """The upper end of what is usual, and how often in a row values lay above it."""

    def __init__(
        self, window: int, width: float, *, floor: float = 0.0, relative_floor: float = 0.0
    ) -> None:
        self.width, self.floor, self.relative_floor = width, floor, relative_floor
        self.values: deque[float] = deque(maxlen=window)
        self.run = 0  # values in a row above the band

    def add(self, value: float) -> int:
        """Take a finite value in; return how many in a row, it included, lay above the band."""
        self.run = self.run + 1 if value > self.upper else 0
        self.values.append(value)
        return self.run

    @property
    def upper(self) -> float:
        """The end of the band; infinity while there are too few values."""
        if len(self.values) < min(FEWEST_VALUES, self.values.maxlen or FEWEST_VALUES):
            return math.inf
        middle = statistics.median(self.values)
        spread = statistics.median([abs(value - middle) for value in self.values])
        floor = max(self.floor, self.relative_floor * abs(middle))
        return middle + self.width * max(MAD_TO_SIGMA * spread, floor)

    def restore(self, values: Sequence[float], run: int) -> None:
        """Go on from saved values."""
        self.values, self.run = deque(values, maxlen=self.values.maxlen), run
