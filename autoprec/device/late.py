"""Values of a device, read by the host without waiting for it.

`tensor.tolist()` waits until the device has done all that is queued, which then has nothing to do
until the host has queued more. A copy into pinned memory is queued like any other work:

    late = LateValues(tensor)     the copy is queued; host and device go on
    late.read()                   a step later: waits for the copy alone, with a whole step queued
"""

import torch
from torch import Tensor


class LateValues:
    """The numbers of a tensor as it is now, to be read later."""

    def __init__(self, values: Tensor) -> None:
        values = values.detach()
        self._event: torch.cuda.Event | None = None
        if values.device.type != "cuda":
            self._values = values.clone()
            return
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._values.copy_(values, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's own
        self._event.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[float]:
        """Return the numbers; waits for the work that was queued before them, no later one."""
        if self._event is not None:
            self._event.synchronize()
        return list(map(float, self._values.flatten().tolist()))
