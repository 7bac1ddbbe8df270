"""Device ms of what the host queues: the host runs ahead, and its own time is recorded apart.

A kernel that Python launches every 10 us keeps no GPU busy, and events around it would measure
Python. So the device is kept from starting until the host has queued all of a call:

    device   spin for `lead_ms` | overwrite L2 | start | the call's kernels ......... | end
    host     queue: spin, overwriting, start, call, end   |  read NVML  |  wait for the end

Where `start` had not happened when the host was through, the time between the events is the
device's alone. Eager FP8 layers queue for 0.3 to 0.6 ms; a whole step queues more than the 1,000
launches that CUDA holds, so the host is ahead by MOST_LEAD_MS at first, and either stays ahead, or
is the slower of the two: then its own time is the longer one.

What was idle is loaded first, because clocks and heat of a GPU at rest are not those of a training.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from autoprec.common.text import error_line
from autoprec.errors import DeviceError

Function = Callable[[], object]

DEFAULT_CACHE_BYTES = 32 * 2**20  # where the machine does not say; 32 MiB is a common L3
CACHE_FACTOR = 2  # flush twice the cache: replacement is not strictly least-recently-used
GRAPH_WARMUPS = 3  # as torch's own CUDA graph recipe
FIRST_LEAD_MS = 0.5  # before the host's time is known
LEAD_FACTOR = 2.0  # of the host's time: what it may vary, and what the SM clock may
SHORTEST_LEAD_MS = 0.05
MOST_LEAD_MS = 10.0  # longer ones would only fill the launch queue and make the host wait
LOAD_S = 1.0  # of GEMMs before the first sample
IDLE_S = 5.0  # after which a GPU counts as cold again
LOAD_SIZE = 2048  # of these GEMMs; 16 MiB, and the whole of an H100's SMs
LOAD_CALLS = 50
CALIBRATION_CYCLES = 2_000_000  # a millisecond or two
ALLOCATIONS = ("num_alloc_retries", "num_device_alloc", "num_device_free")  # each stops the queue


@dataclass(frozen=True)
class Sample:
    """One call: its ms, and of a device that works apart from the host, what the host did."""

    ms: float
    host_ms: float | None = None  # what queueing the call took
    is_ahead: bool = True  # all was queued before the device began, so no host time is in `ms`
    is_disturbed: bool = False  # the allocator asked the driver for memory, which stops the queue


@dataclass
class Lead:
    """How far ahead of the device the host must be for one function; learnt from its samples."""

    ms: float = FIRST_LEAD_MS
    host_ms: float = math.inf  # the least that queueing took
    waits: bool = False  # the function itself waits for the device: no lead can hide that

    def learn(self, sample: Sample) -> bool:
        """Take in a sample; return whether a longer lead, or none, would give a truer one."""
        if sample.host_ms is None or self.waits:
            return False
        # Who waits for the device waits for the end of the spin too: its time grows by the lead.
        waited = sample.host_ms > self.host_ms + self.ms / 2
        self.host_ms = min(self.host_ms, sample.host_ms)
        if sample.is_ahead:
            self.ms = self._fitting(LEAD_FACTOR * self.host_ms)
            return False
        if waited:
            self.ms, self.waits = 0.0, True
            return True
        before = self.ms
        self.ms = self._fitting(max(2 * self.ms, LEAD_FACTOR * self.host_ms))
        return self.ms > before

    def times(self, calls: int) -> "Lead":
        """Return the lead to begin with where a sample has this many calls."""
        return Lead(self._fitting(LEAD_FACTOR * self.host_ms * calls))

    @staticmethod
    def _fitting(ms: float) -> float:
        return min(max(ms, SHORTEST_LEAD_MS), MOST_LEAD_MS)


@dataclass
class CudaClock:
    """Device ms between two events, from an L2 cache that was overwritten, on a loaded GPU."""

    device: torch.device
    sleep_cycles_per_ms: float = 0.0  # of the spin; calibrated before the first sample
    busy_until: float = -math.inf  # when the last sample ended
    buffer: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        properties = torch.cuda.get_device_properties(self.device)
        size = int(properties.L2_cache_size) or DEFAULT_CACHE_BYTES
        self.buffer = torch.empty(CACHE_FACTOR * size // 4, dtype=torch.int32, device=self.device)

    def measure(self, fn: Function) -> float:
        """Run `fn` once and return the device ms between the events around it."""
        return self.sample(fn).ms

    def sample(
        self, fn: Function, *, lead_ms: float = FIRST_LEAD_MS, meanwhile: Function | None = None
    ) -> Sample:
        """Run `fn` once, `lead_ms` after it began to be queued; call `meanwhile` as it runs."""
        with torch.cuda.device(self.device):
            self.load()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's own
            allocations = self._allocations()
            if lead_ms > 0:  # the device spins
                torch.cuda._sleep(round(lead_ms * self.sleep_cycles_per_ms))  # type: ignore[no-untyped-call]  # torch's own
            self.buffer.zero_()  # evicts what L2 held
            start.record()
            started = time.perf_counter()
            fn()
            host_ms = (time.perf_counter() - started) * 1e3
            is_ahead = not start.query()  # type: ignore[no-untyped-call]  # torch's own
            end.record()
            if meanwhile is not None:
                meanwhile()
            is_disturbed = self._allocations() != allocations
            end.synchronize()
            self.busy_until = time.perf_counter()
            return Sample(float(start.elapsed_time(end)), host_ms, is_ahead, is_disturbed)

    def load(self) -> None:
        """Keep a GPU that was idle busy for a second, and calibrate the spin."""
        if time.perf_counter() - self.busy_until < IDLE_S:
            return
        drawn = torch.randn(LOAD_SIZE, LOAD_SIZE, generator=torch.Generator().manual_seed(0))
        a = drawn.to(self.device, torch.bfloat16)  # constants would draw less power
        out, started = torch.empty_like(a), time.perf_counter()
        while time.perf_counter() - started < LOAD_S:
            for _ in range(LOAD_CALLS):
                torch.mm(a, a, out=out)
            torch.cuda.synchronize(self.device)
        self.sleep_cycles_per_ms = CALIBRATION_CYCLES / self._sleep_ms(CALIBRATION_CYCLES)
        self.busy_until = time.perf_counter()

    def _sleep_ms(self, cycles: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's own
        start.record()
        torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]  # torch's own
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def _allocations(self) -> tuple[int, ...]:
        stats = torch.cuda.memory_stats(self.device)
        return tuple(int(stats.get(name, 0)) for name in ALLOCATIONS)


def graph_replay(fn: Function) -> Function:
    """Capture the CUDA work of `fn` in a graph; return its replay, which costs the host one launch.

    It is for constants of the device. `fn` must do the same on the same tensors.

    Raises:
        DeviceError: `fn` does something that a graph cannot hold.
    """
    # Warm up on another stream, as capture will use one: lazy initialisation must not be captured.
    current = torch.cuda.current_stream()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(GRAPH_WARMUPS):
            fn()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    random_state = generator.clone_state()
    try:
        with torch.cuda.graph(graph):
            fn()
    except BaseException as error:
        # A capture that fails leaves its own stream current, and marks the state of the random
        # generator as being captured, so that it could draw no more: it gets a copy without mark.
        torch.cuda.set_stream(current)
        generator.graphsafe_set_state(random_state)
        if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
            raise
        raise DeviceError(
            "what is timed in a CUDA graph must not wait for the device or the host, but "
            f"{error_line(error)}; time it with plain launches"
        ) from error
    return graph.replay
