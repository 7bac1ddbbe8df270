"""Functions -> samples in ms -> `Timing`: warm-up, cold caches, turns, dirty samples rejected.

A sample is one call (or several of a very short function) between two readings of a clock, with the
last-level cache emptied before. Candidates take turns, in an order drawn anew each round, so that a
slow drift of clocks and heat falls on all of them alike and samples of one round are pairs:

    round 0   A B C       round 1   B C A       round 2   A C B   ...

A `Monitor` looks at the machine around every sample; a sample during which the machine was
throttled is dirty: it is left out, counted, and taken again. A machine that stays that way is
measured as it is, after as many rejections as `Stopping` allows.
"""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from autoprec.common.text import error_line
from autoprec.errors import DeviceError
from autoprec.records import Conditions, Timing

Function = Callable[[], object]
Name = TypeVar("Name")  # of what is timed: any key

SHORTEST_SAMPLE_MS = 0.1  # 100 times what an event or the interpreter adds (1 us, H100 and EPYC)
MOST_CALLS = 1000
FEWEST_SAMPLES = 3  # below it the median is one of two extremes
DEFAULT_CACHE_BYTES = 32 * 2**20  # where the machine does not say; 32 MiB is a common L3
CACHE_FACTOR = 2  # flush twice the cache: replacement is not strictly least-recently-used
MOST_CPU_CACHE_BYTES = 16 * 2**20  # a step's data stays in a larger one, so that is left warm
GRAPH_WARMUPS = 3  # as torch's own CUDA graph recipe
MERGED_BY: Mapping[str, Callable[[Sequence[float]], Any]] = {  # Any: integers stay some
    "sm_clock_mhz": lambda clocks: round(statistics.median(clocks)),
    "memory_clock_mhz": lambda clocks: round(statistics.median(clocks)),
    "power_w": statistics.fmean,
    "power_limit_w": statistics.fmean,
    "temperature_c": max,
}


class Clock(Protocol):
    """Measures one call in ms, from a cold last-level cache."""

    def measure(self, fn: Function) -> float:
        """Run `fn` once and return the ms it took."""


@dataclass(frozen=True)
class Observation:
    """What a monitor saw during one sample; a spoiled one is left out whatever the limit."""

    is_dirty: bool = False
    conditions: Conditions | None = None
    is_spoiled: bool = False


class Monitor(Protocol):
    """Looks at the machine around every sample; by default it waits for and sees nothing."""

    def settle(self) -> int:
        """Wait until the machine is fit to be timed; return how many pauses that took."""
        return 0

    def observe(self, sample: Callable[[], float]) -> tuple[float, Observation]:
        """Take a sample; return its ms and what was seen around it."""
        return sample(), Observation()


class Unwatched(Monitor):
    """Accepts every sample, for a machine of which nothing can be read."""


UNWATCHED = Unwatched()


class CpuClock:
    """Wall-clock ms; a buffer is read before each call to evict what a whole step would evict.

    That is everything from a core's own caches, and from a shared cache up to
    MOST_CPU_CACHE_BYTES; a server's hundreds of MiB hold a step's data from layer to layer.
    """

    def __init__(self, *, cache_bytes: int | None = None) -> None:
        if cache_bytes is None:
            cache_bytes = min(last_level_cache_bytes(), MOST_CPU_CACHE_BYTES)
        self._buffer = torch.zeros(CACHE_FACTOR * cache_bytes // 4, dtype=torch.float32)

    def measure(self, fn: Function) -> float:
        """Run `fn` once and return its wall-clock ms."""
        self._buffer.sum()  # reads all of it: what the caches held before is evicted
        started = time.perf_counter()
        fn()
        return (time.perf_counter() - started) * 1e3


class CudaClock:
    """Device ms between two events; the L2 cache is overwritten before each call.

    The device is still busy with the overwriting while the host queues the call, so host time is
    not in the figure as long as the call queues faster than that.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        size = int(torch.cuda.get_device_properties(device).L2_cache_size) or DEFAULT_CACHE_BYTES
        self._buffer = torch.empty(CACHE_FACTOR * size // 4, dtype=torch.int32, device=device)

    def measure(self, fn: Function) -> float:
        """Run `fn` once and return the device ms between the events around it."""
        with torch.cuda.device(self._device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's own
            # The device evicts its L2 by overwriting the buffer; meanwhile the host runs ahead and
            # queues the call, so that the events see the device's time alone.
            self._buffer.zero_()
            start.record()
            fn()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end))


def make_clock(device: torch.device) -> Clock:
    """Return the clock that times work on `device`."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def graph_replay(fn: Function) -> Function:
    """Capture the CUDA work of `fn` in a graph; return its replay, which costs the host one launch.

    It is for constants of the device, where Python's 5 to 10 us per launch would hide a kernel's
    own 2 us. Layers and steps are timed as training launches them: an eager FP8 layer that the host
    cannot feed fast enough is as slow in training. `fn` must do the same on the same tensors.

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
    try:
        with torch.cuda.graph(graph):
            fn()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        torch.cuda.set_stream(current)  # a capture that fails does not leave its own stream
        raise DeviceError(
            "what is timed in a CUDA graph must not wait for the device or the host, but "
            f"{error_line(error)}; time it with plain launches"
        ) from error
    return graph.replay


@dataclass(frozen=True)
class Stopping:
    """When a candidate has been sampled enough.

    At `samples`; or from `least` on, when the standard error of the median is below `precision` of
    it, or when its samples have taken `budget_ms` of measured time. At most `rejections` dirty
    samples are taken again (default: as many as `samples`).
    """

    samples: int = 20
    least: int = FEWEST_SAMPLES
    precision: float = 0.0
    budget_ms: float = math.inf
    rejections: int | None = None

    def is_enough(self, samples: Sequence[float]) -> bool:
        """Whether these samples will do."""
        if len(samples) >= self.samples:
            return True
        if len(samples) < self.least:
            return False
        return sum(samples) >= self.budget_ms or relative_error(samples) < self.precision


@dataclass
class Samples:
    """The samples of one candidate, by round: None where it was dirty or sat the round out."""

    rounds: list[float | None] = field(default_factory=list)
    rejected: int = 0
    pauses: int = 0
    conditions: list[Conditions] = field(default_factory=list)

    @property
    def clean(self) -> list[float]:
        """The samples that count, in ms."""
        return [sample for sample in self.rounds if sample is not None]

    def add(self, number: int, elapsed: float, seen: Observation, *, limit: int) -> None:
        """Keep a sample of round `number`, or reject it: a dirty one, up to the limit."""
        if seen.conditions is not None:
            self.conditions.append(seen.conditions)
        # Beyond the limit a dirty sample counts: a machine that is always busy is what there is.
        reject = seen.is_spoiled or (seen.is_dirty and self.rejected < limit)
        self.rejected += reject
        # Rounds that it sat out are None, so that samples of one round stay pairs.
        self.rounds.extend([None] * (number - len(self.rounds)))
        self.rounds.append(None if reject else elapsed)

    def timing(self) -> Timing:
        """Return median, p20 and p80 of the clean samples."""
        return timing_from(self.clean, rejected=self.rejected)

    def merged_conditions(self) -> Conditions | None:
        """Return the conditions seen around them as one: medians, hottest, all throttle reasons."""
        if not self.conditions:
            return None
        merged = {
            name: merge(known)
            for name, merge in MERGED_BY.items()
            if (known := [v for one in self.conditions if (v := getattr(one, name)) is not None])
        }
        reasons = {reason for one in self.conditions for reason in one.throttle_reasons}
        return Conditions(**merged, throttle_reasons=tuple(sorted(reasons)), pauses=self.pauses)


def time_interleaved(
    candidates: Mapping[str, Function],
    *,
    clock: Clock,
    samples: int = 20,
    monitor: Monitor = UNWATCHED,
) -> dict[str, Timing]:
    """Time every candidate `samples` times, in turns; see `sample_interleaved`."""
    stopping = Stopping(samples=samples)
    found = sample_interleaved(candidates, clock=clock, stopping=stopping, monitor=monitor)
    return {name: taken.timing() for name, taken in found.items()}


def sample_interleaved(
    candidates: Mapping[Name, Function],
    *,
    clock: Clock,
    stopping: Stopping,
    warmup: int = 3,
    prepare: Callable[[int], None] | None = None,
    monitor: Monitor = UNWATCHED,
    seed: int = 0,
) -> dict[Name, Samples]:
    """Sample candidates in turns, in an order drawn from `seed`, until each has enough.

    Their tensors should be real ones: constants draw less power and run up to 15 % faster on a GPU.
    `warmup` is the unmeasured calls of each before the first round; 0 for what is warm already and
    takes longer than SHORTEST_SAMPLE_MS. `prepare` is called before every round with its number,
    outside of the timing.
    """
    # The last warm-up call says how many calls fill a sample: a shorter one is the clock's own.
    repeated = {n: _warm_up(fn, clock, warmup, prepare) for n, fn in candidates.items()}
    taken = {name: Samples() for name in candidates}
    turns = random.Random(seed)
    limit = stopping.samples if stopping.rejections is None else stopping.rejections
    with _collector_off():
        # A round takes a sample of everybody who has not enough yet, in an order of its own: in a
        # fixed one a candidate would always run behind, and in the heat of, the same other.
        for number in range(stopping.samples + limit):
            active = [n for n in candidates if not stopping.is_enough(taken[n].clean)]
            if not active:
                break
            turns.shuffle(active)
            if prepare is not None:
                prepare(number)
            # The machine cools before a round, never within: its samples are of one state.
            pauses = monitor.settle()
            for name in active:
                fn, calls = repeated[name]
                elapsed, seen = monitor.observe(partial(clock.measure, fn))
                taken[name].pauses += pauses
                taken[name].add(number, elapsed / calls, seen, limit=limit)
    return taken


def timing_from(samples: Sequence[float], *, rejected: int = 0) -> Timing:
    """Return the timing of a list of samples in ms."""
    p20, median, p80 = map(float, np.percentile(samples, [20, 50, 80]))
    return Timing(median_ms=median, p20_ms=p20, p80_ms=p80, samples=len(samples), rejected=rejected)


def relative_error(samples: Sequence[float]) -> float:
    """Return the standard error of the median over the median, from the p20 to p80 spread."""
    return timing_from(samples).relative_error


def last_level_cache_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Return the size of the largest cache of CPU 0 as Linux says, or a common one."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [path.read_text().strip() for path in folder.glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=DEFAULT_CACHE_BYTES)


def _warm_up(
    fn: Function, clock: Clock, calls: int, prepare: Callable[[int], None] | None
) -> tuple[Function, int]:
    """Call `fn`; return it often enough for a sample of SHORTEST_SAMPLE_MS, and how often."""
    elapsed = SHORTEST_SAMPLE_MS
    for _ in range(calls):
        if prepare is not None:
            prepare(0)
        elapsed = clock.measure(fn)
    if elapsed >= SHORTEST_SAMPLE_MS:
        return fn, 1
    times = min(math.ceil(SHORTEST_SAMPLE_MS / max(elapsed, 1e-6)), MOST_CALLS)

    def run() -> None:
        for _ in range(times):
            fn()

    return run, times


@contextmanager
def _collector_off() -> Iterator[None]:
    """Keep Python's garbage collector from running inside a sample."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
