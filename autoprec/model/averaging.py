"""Gradients averaged over ranks, as DDP does, for a model whose layers switch precision in place.

DDP makes its buckets once, for the dtypes that it finds. Here they are made in every backward pass,
for the gradients' dtypes in it, and sent as soon as they are full, always in one order: last
parameter first, as gradients usually arrive. A rank in which some parameter had no gradient sends
zeros for it, so that ranks whose steps differ (routed experts) still agree about every all-reduce.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autoprec.device.ranks import local_part, placed_as

BUCKET_BYTES = 25 * 2**20  # torch's own bucket_cap_mb


@dataclass
class _Bucket:
    """Parameters of one dtype whose gradients are sent together."""

    parameters: list[nn.Parameter]
    missing: int
    flat: Tensor | None = None
    work: Any = None  # Any: a handle of torch.distributed


@dataclass
class GradientAverage:
    """Averages every trainable parameter's gradient over a group at the end of backward.

    One backward pass per step: a second one would average what the first left once more.
    """

    parameters: list[nn.Parameter]
    group: dist.ProcessGroup | None
    size: int  # of the group
    buckets: list[_Bucket] = field(default_factory=list)  # of the backward pass that runs
    bucket_of: dict[nn.Parameter, _Bucket] = field(default_factory=dict)
    sent: int = 0

    def watch(self) -> None:
        """Average from here on."""
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]  # torch's own

    def _arrived(self, parameter: Tensor) -> None:
        if not self.buckets:
            self._fill_buckets()
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        self.bucket_of[parameter].missing -= 1  # type: ignore[index]  # the hook's own parameter
        while self.sent < len(self.buckets) and self.buckets[self.sent].missing == 0:
            self._send(self.buckets[self.sent])

    def _fill_buckets(self) -> None:
        """Divide the parameters, last first, into buckets of one dtype and about one size."""
        filling: dict[torch.dtype, _Bucket] = {}
        size: dict[torch.dtype, int] = {}
        for parameter in reversed(self.parameters):
            dtype = parameter.dtype
            if dtype not in filling or size[dtype] > BUCKET_BYTES:
                filling[dtype] = _Bucket([], 0)
                size[dtype] = 0
                self.buckets.append(filling[dtype])
            bucket = filling[dtype]
            bucket.parameters.append(parameter)
            bucket.missing += 1
            size[dtype] += local_part(parameter).nbytes
            self.bucket_of[parameter] = bucket

    def _send(self, bucket: _Bucket) -> None:
        """Start the all-reduce of a bucket: its gradients, then one count of each."""
        parts = [_gradient(parameter) for parameter in bucket.parameters]
        counts = [float(parameter.grad is not None) for parameter in bucket.parameters]
        flags = torch.tensor(counts, dtype=parts[0].dtype).to(parts[0].device, non_blocking=True)
        bucket.flat = torch.cat([*(part.flatten() for part in parts), flags])
        bucket.work = dist.all_reduce(bucket.flat, group=self.group, async_op=True)
        self.sent += 1

    def _finish(self) -> None:
        """Send what is left, wait for everything, and put the averages in place."""
        for bucket in self.buckets[self.sent :]:
            self._send(bucket)
        for bucket in self.buckets:
            bucket.work.wait()
            self._spread(bucket)
        self.buckets, self.bucket_of, self.sent = [], {}, 0

    def _spread(self, bucket: _Bucket) -> None:
        if bucket.flat is None:
            return
        sizes = [local_part(parameter).numel() for parameter in bucket.parameters]
        *averages, flags = torch.split(bucket.flat, [*sizes, len(sizes)])
        has_all = all(parameter.grad is not None for parameter in bucket.parameters)
        # Where no rank had a gradient there is none. Only a rank that lacks one has to ask: reading
        # the counts waits for the device.
        some = [True] * len(sizes) if has_all else (flags > 0).tolist()
        for parameter, average, exists in zip(bucket.parameters, averages, some, strict=True):
            if exists:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                own = local_part(parameter.grad)
                own.copy_(average.view_as(own).div_(self.size))


def _gradient(parameter: nn.Parameter) -> Tensor:
    """Return this rank's gradient, zeros where none arrived."""
    if parameter.grad is None:
        return torch.zeros_like(local_part(parameter.detach()))
    parameter.grad = placed_as(parameter, parameter.grad)  # tensor parallelism leaves sums unmade
    return local_part(parameter.grad)
