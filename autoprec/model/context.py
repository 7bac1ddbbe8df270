"""What every stage that runs the user's model is given: the model's source, and where to run it."""

from dataclasses import dataclass
from functools import cached_property

import torch

from autoprec.common.progress import Progress, report_nothing
from autoprec.device.ranks import world_size
from autoprec.device.timing import Clock, SlowestClock, make_clock
from autoprec.workload.functions import Workload


@dataclass(frozen=True)
class Context:
    """One run's workload, device and seed, and how the run tells its progress and measures time."""

    workload: Workload  # the user's functions
    device: torch.device  # where the model runs
    seed: int = 0  # of weights, batches and everything else that is random
    progress: Progress = report_nothing  # told how far a stage is
    clock: Clock | None = None  # measures work on `device`; None: the device's own (`timer`)
    memory_limit: int | None = None  # bytes that stages may take on the device; None: what is free

    @cached_property
    def timer(self) -> Clock:
        """The clock that was given, or the one that fits the device; of all ranks the slowest."""
        own = self.clock or make_clock(self.device)
        return own if world_size() == 1 else SlowestClock(own)
