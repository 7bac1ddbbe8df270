"""One step -> loss and gradient norms, alike on all ranks; and whether these are unusually high.

Ranks that decided differently would train different models or wait for each other for ever, so
where torch.distributed runs, what is measured is averaged over ranks before anyone decides. Norms
are then root mean squares of the ranks' own parts: the same everywhere, and proportional to the
global norm however parameters are sharded.

A loss or norm falls and jitters. Its band ends at median + width * s, over the last `window`
values, with s = 1.4826 * MAD (which is the standard deviation of a normal distribution) and at
least `floor`, absolute or relative to the median, so that a very quiet stretch does not turn
ordinary noise into an alarm. Median and MAD bear a window that is half outliers, so values above
the band count too: after a lasting change of level it follows. Where that ends at zero, since most
values are zero, as a loss of margins often is, the sizes of the others make the band.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

from autoprec.device.late import LateValues
from autoprec.device.ranks import local_part, mean_over_ranks

MOST_LOG = 88.0  # of an FP32 number; an infinite bound stays above all of them
FEWEST_VALUES = 20  # before which nothing is unusual
MAD_TO_SIGMA = 1.4826  # of a normal distribution


@dataclass(frozen=True)
class Bounds:
    """What is unusual in the step that comes, as the steps before it say.

    The ends of both bands; the share of an operand that may underflow; and whether a loss or norm
    above its band makes the step a bad one.
    """

    loss: float = math.inf
    log_norm: float = math.inf
    underflow: float = math.inf
    is_loss_bad: bool = False
    is_norm_bad: bool = False


@dataclass(frozen=True)
class Signals:
    """What one step showed; `norms` is in the order of the parameters, 0.0 without a gradient."""

    loss: float
    grad_norm: float  # of all gradients
    is_loss_high: bool  # above its band
    is_norm_high: bool
    norms: tuple[float, ...]
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Reading:
    """A step's signals, on their way to the host, and what the device makes of them meanwhile."""

    is_bad: Tensor  # FP32 on the device: 1.0 for a step that must not change anything
    values: LateValues
    parameters: int

    def signals(self) -> Signals:
        """Return the signals; waits for the device to come to them."""
        loss, squared, is_loss_high, is_norm_high, *rest = self.values.read()
        norms, shares = rest[: self.parameters], rest[self.parameters :]
        return Signals(
            loss=loss,
            grad_norm=math.sqrt(squared),
            is_loss_high=bool(is_loss_high),
            is_norm_high=bool(is_norm_high),
            norms=tuple(map(math.sqrt, norms)),
            shares=tuple(shares),
        )


def read_signals(
    loss: Tensor,
    parameters: Sequence[nn.Parameter],
    *,
    shares: Tensor | None,
    bounds: Bounds,
) -> Reading:
    """Read a step's signals without waiting; one all-reduce if distributed.

    `shares` is [layers, operands, 2], what the FP8 operands lose to underflow and saturation.
    """
    seen = [loss.detach().float().reshape(1), _norms(parameters, loss.device).square()]
    vector = mean_over_ranks(torch.cat(seen if shares is None else [*seen, shares.flatten()]))
    value, squared = vector[0], vector[1 : 1 + len(parameters)].sum()
    # The host's rules of what is bad, on the device. It decides all comparisons, for both.
    is_loss_high = value > bounds.loss
    is_norm_high = squared > math.exp(min(2 * bounds.log_norm, MOST_LOG))
    is_bad = ~(value.isfinite() & squared.isfinite())
    if bounds.is_norm_bad:
        is_bad = is_bad | is_norm_high
    if bounds.is_loss_bad:
        lost = vector[1 + len(parameters) :].view(-1, 2)
        out_of_range = ((lost[:, 0] > bounds.underflow) | (lost[:, 1] > 0)).any()
        is_bad = is_bad | (is_loss_high & ~out_of_range)
    heads = torch.stack([value, squared, is_loss_high.float(), is_norm_high.float()])
    values = LateValues(torch.cat([heads, vector[1:]]))
    return Reading(is_bad.float(), values, len(parameters))


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

    def add(self, value: float, *, is_above: bool) -> int:
        """Take a finite value in; return how many in a row, it included, lay above the band."""
        self.run = self.run + 1 if is_above else 0
        self.values.append(value)
        return self.run

    @property
    def upper(self) -> float:
        """The end of the band; infinity while there are too few values."""
        return self._end(self.values) or self._end([abs(value) for value in self.values if value])

    def _end(self, values: Sequence[float]) -> float:
        if len(values) < min(FEWEST_VALUES, self.values.maxlen or FEWEST_VALUES):
            return math.inf
        middle = statistics.median(values)
        spread = statistics.median([abs(value - middle) for value in values])
        floor = max(self.floor, self.relative_floor * abs(middle))
        return middle + self.width * max(MAD_TO_SIGMA * spread, floor)

    def restore(self, values: Sequence[float], run: int) -> None:
        """Go on from saved values."""
        self.values, self.run = deque(values, maxlen=self.values.maxlen), run
