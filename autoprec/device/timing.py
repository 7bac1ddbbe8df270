"""Functions -> samples in ms -> `Timing`: warm-up, cold caches, turns, dirty samples rejected.

A sample is one call (or several of a very short function) between two readings of a clock, with the
last-level cache emptied before. Candidates take turns, in an order drawn anew each round, so that a
slow drift of clocks and heat falls on all of them alike and samples of one round are pairs:

    round 0   A B C       round 1   B C A       round 2   A C B   ...

A `Monitor` looks at the machine during every sample; one during which the machine was throttled is
dirty: it is left out, counted, and taken again. So is one that a GPU's allocator disturbed, and one
with the host's time in it (see cuda_clock.py). A machine that stays that way is measured as it is,
after as many rejections as `Stopping` allows.
"""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from autoprec.device.cuda_clock import CACHE_FACTOR, DEFAULT_CACHE_BYTES, CudaClock, Lead, Sample
from autoprec.device.ranks import largest_over_ranks, world_size
from autoprec.records import Conditions, Timing

Function = Callable[[], object]
Name = TypeVar("Name")  # of what is timed: any key

SHORTEST_SAMPLE_MS = 0.1  # 100 times what an event or the interpreter adds (1 us, H100 and EPYC)
MOST_CALLS = 1000
MOST_SAMPLES = 1000  # where a least time is asked of something short
FEWEST_SAMPLES = 3  # below it the median is one of two extremes
MOST_CPU_CACHE_BYTES = 16 * 2**20  # a step's data stays in a larger one, so that is left warm
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

    def sample(self, fn: Function, *, lead_ms: float, meanwhile: Function) -> Sample:
        """Run `fn` once, and `meanwhile` after it.

        On a device that works apart from the host, which only queues: the host `lead_ms` ahead,
        and `meanwhile` while the device works.
        """
        sample = Sample(self.measure(fn))
        meanwhile()
        return sample


@dataclass(frozen=True)
class Observation:
    """What a monitor saw during one sample; a spoiled one is left out whatever the limit."""

    is_dirty: bool = False
    conditions: Conditions | None = None
    is_spoiled: bool = False


def seen_by_all(own: Observation) -> Observation:
    """Return an observation that is dirty or spoiled where it was so on any rank."""
    if world_size() == 1:
        return own
    dirty, spoiled = largest_over_ranks([own.is_dirty, own.is_spoiled])
    return replace(own, is_dirty=dirty > 0, is_spoiled=spoiled > 0)


class Monitor(Protocol):
    """Looks at the machine during every sample; by default it waits for and sees nothing."""

    def settle(self) -> int:
        """Wait until the machine is fit to be timed; return how many pauses that took."""
        return 0

    def observe(self, sample: Callable[[], float]) -> tuple[float, Observation]:
        """Take a sample, in which `look` is called; return its ms and what was seen."""
        return sample(), Observation()

    def look(self) -> None:
        """Look at the machine: while a device works on a sample; after it, on a CPU."""
        return


class Unwatched(Monitor):
    """Accepts every sample, for a machine of which nothing can be read."""


UNWATCHED = Unwatched()


class CpuClock(Clock):
    """Wall-clock ms; a buffer is read before each call to evict what a whole step would evict.

    That is everything from a core's own caches, and from a shared cache up to
    MOST_CPU_CACHE_BYTES; a server's hundreds of MiB hold a step's data from layer to layer.
    """

    def __init__(self) -> None:
        cache_bytes = min(last_level_cache_bytes(), MOST_CPU_CACHE_BYTES)
        self._buffer = torch.zeros(CACHE_FACTOR * cache_bytes // 4, dtype=torch.float32)

    def measure(self, fn: Function) -> float:
        """Run `fn` once and return its wall-clock ms."""
        self._buffer.sum()  # reads all of it: what the caches held before is evicted
        started = time.perf_counter()
        fn()
        return (time.perf_counter() - started) * 1e3


@dataclass(frozen=True)
class SlowestClock:
    """A clock that gives every rank the same: the most ms that one took; all learn one lead.

    Ranks stop sampling, reject and repeat by what they measured, and whole steps hold collectives:
    with times of their own they would wait for each other for ever.
    """

    own: Clock

    def measure(self, fn: Function) -> float:
        """Run `fn` once on every rank and return the ms of the slowest."""
        return largest_over_ranks([self.own.measure(fn)])[0]

    def sample(self, fn: Function, *, lead_ms: float, meanwhile: Function) -> Sample:
        """Run `fn` once on every rank; disturbed, or late, where any rank was."""
        own = self.own.sample(fn, lead_ms=lead_ms, meanwhile=meanwhile)
        seen = [own.ms, own.host_ms or 0.0, not own.is_ahead, own.is_disturbed]
        ms, host_ms, late, disturbed = largest_over_ranks(seen)
        known = None if own.host_ms is None else host_ms
        return Sample(ms, known, is_ahead=not late, is_disturbed=disturbed > 0)


def make_clock(device: torch.device) -> Clock:
    """Return the clock that times work on `device`."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


@dataclass(frozen=True)
class Stopping:
    """When a candidate has been sampled enough.

    At `samples`; or from `least` on, when the standard error of the median is below `precision` of
    it, or when its samples have taken `budget_ms` of measured time. But never before they have
    taken `least_ms`: a GPU slows down under a load that lasts. At most `rejections` dirty samples
    are taken again (default: as many as `samples`).
    """

    samples: int = 20
    least: int = FEWEST_SAMPLES
    precision: float = 0.0
    budget_ms: float = math.inf
    rejections: int | None = None
    least_ms: float = 0.0

    def is_enough(self, samples: Sequence[float]) -> bool:
        """Whether these samples will do."""
        if sum(samples) < self.least_ms and len(samples) < MOST_SAMPLES:
            return False
        if len(samples) >= self.samples:
            return True
        if len(samples) < self.least:
            return False
        return (
            sum(samples) >= self.budget_ms or timing_from(samples).relative_error < self.precision
        )


@dataclass
class Samples:
    """The samples of one candidate, by round: None where it was dirty or sat the round out."""

    rounds: list[float | None] = field(default_factory=list)
    rejected: int = 0
    pauses: int = 0
    conditions: list[Conditions] = field(default_factory=list)
    hosts: list[float] = field(default_factory=list)  # the host's ms of each clean sample, if told

    @property
    def clean(self) -> list[float]:
        """The samples that count, in ms."""
        return [sample for sample in self.rounds if sample is not None]

    def add(
        self,
        number: int,
        elapsed: float,
        seen: Observation,
        *,
        limit: int,
        host_ms: float | None = None,
    ) -> None:
        """Keep a sample of round `number`, or reject it: a dirty one, up to the limit."""
        if seen.conditions is not None:
            self.conditions.append(seen.conditions)
        # Beyond the limit a dirty sample counts: a machine that is always busy is what there is.
        reject = seen.is_spoiled or (seen.is_dirty and self.rejected < limit)
        self.rejected += reject
        # Rounds that it sat out are None, so that samples of one round stay pairs.
        self.rounds.extend([None] * (number - len(self.rounds)))
        self.rounds.append(None if reject else elapsed)
        if host_ms is not None and not reject:
            self.hosts.append(host_ms)

    def divided_by(self, count: int) -> "Samples":
        """Return the samples of calls that did something `count` times, for one time."""
        rounds = [sample and sample / count for sample in self.rounds]
        return replace(self, rounds=rounds, hosts=[host / count for host in self.hosts])

    def timing(self, *, as_trained: bool = False) -> Timing:
        """Return median, p20 and p80 of the clean samples.

        With `as_trained` a sample is the time of a step among many: the device's or the host's,
        whichever is longer, because the host queues the next step while the device runs this one.
        """
        samples = self.clean
        if as_trained and len(self.hosts) == len(samples):
            samples = list(map(max, samples, self.hosts))
        host_ms = statistics.median(self.hosts) if self.hosts else None
        timing = timing_from(samples, rejected=self.rejected)
        return timing.model_copy(update={"host_ms": host_ms})

    def beyond(self, other: "Samples", *, plus_ms: float) -> "Samples":
        """Return by how much each sample exceeds the other's of its round, and `plus_ms` more.

        So the other's noise is in them too. Where the other sat a round out its median is taken.
        """
        usual = statistics.median(other.clean)
        pairs = zip_longest(self.rounds, other.rounds[: len(self.rounds)])
        rounds = [
            None if own is None else max(own - (usual if base is None else base) + plus_ms, 0.0)
            for own, base in pairs
        ]
        return replace(self, rounds=rounds, hosts=[])  # the host's part of a difference: not known

    @property
    def is_host_bound(self) -> bool:
        """Whether the host takes as long to queue it as the device to run it, or longer."""
        return bool(self.hosts) and statistics.median(self.hosts) >= statistics.median(self.clean)

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
    begin: Callable[[Name], object] = lambda name: None,
    monitor: Monitor = UNWATCHED,
    seed: int = 0,
) -> dict[Name, Samples]:
    """Sample candidates in turns, in an order drawn from `seed`, until each has enough.

    Their tensors should be real ones: constants draw less power and run up to 15 % faster on a GPU.
    `warmup` is the unmeasured calls of each before the first round; 0 for what is warm already and
    takes longer than SHORTEST_SAMPLE_MS. `prepare` is called before every round with its number,
    `begin` before every sample with the candidate's name, both outside of the timing.
    """
    # The last warm-up call says how many calls fill a sample: a shorter one is the clock's own.
    warm = {}
    for name, fn in candidates.items():
        begin(name)
        warm[name] = _warm_up(fn, clock, warmup, prepare)
    taken = {name: Samples() for name in candidates}
    turns = random.Random(seed)
    rounds = MOST_SAMPLES if stopping.least_ms else stopping.samples
    limit = stopping.samples if stopping.rejections is None else stopping.rejections
    with _collector_off():
        # A round takes a sample of everybody who has not enough yet, in an order of its own: in a
        # fixed one a candidate would always run behind, and in the heat of, the same other.
        for number in range(rounds + limit):
            active = [n for n in candidates if not stopping.is_enough(taken[n].clean)]
            if not active:
                break
            turns.shuffle(active)
            if prepare is not None:
                prepare(number)
            # The machine cools before a round, never within: its samples are of one state.
            pauses = monitor.settle()
            for name in active:
                begin(name)
                elapsed, host_ms, seen = warm[name].sample(clock, monitor)
                taken[name].pauses += pauses
                taken[name].add(number, elapsed, seen, limit=limit, host_ms=host_ms)
    return taken


def timing_from(samples: Sequence[float], *, rejected: int = 0) -> Timing:
    """Return the timing of a list of samples in ms."""
    p20, median, p80 = map(float, np.percentile(samples, [20, 50, 80]))
    return Timing(median_ms=median, p20_ms=p20, p80_ms=p80, samples=len(samples), rejected=rejected)


def last_level_cache_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Return the size of the largest cache of CPU 0 as Linux says, or a common one."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [path.read_text().strip() for path in folder.glob("index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=DEFAULT_CACHE_BYTES)


@dataclass
class _Candidate:
    """What is called in a sample, how often, and how far ahead of the device the host must be."""

    fn: Function
    calls: int = 1
    lead: Lead = field(default_factory=Lead)

    def sample(
        self, clock: Clock, monitor: Monitor = UNWATCHED
    ) -> tuple[float, float | None, Observation]:
        """Return the ms of one call, the host's (None: not known), and what the monitor saw."""
        found: list[Sample] = []

        def take() -> float:
            found.append(clock.sample(self._run, lead_ms=self.lead.ms, meanwhile=monitor.look))
            return found[-1].ms

        elapsed, seen = monitor.observe(take)
        seen = seen_by_all(seen)
        sample = found[-1]
        is_early = self.lead.learn(sample)  # the host was in it, and need not have been
        seen = replace(seen, is_dirty=seen.is_dirty or is_early or sample.is_disturbed)
        is_known = sample.host_ms is not None and not self.lead.waits
        host_ms = (sample.host_ms or 0.0) / self.calls if is_known else None
        return elapsed / self.calls, host_ms, seen

    def _run(self) -> None:
        for _ in range(self.calls):
            self.fn()


def _warm_up(
    fn: Function, clock: Clock, calls: int, prepare: Callable[[int], None] | None
) -> _Candidate:
    """Call `fn`; return it with as many calls as fill a sample of SHORTEST_SAMPLE_MS."""
    warm = _Candidate(fn)
    elapsed = SHORTEST_SAMPLE_MS
    for _ in range(calls):
        if prepare is not None:
            prepare(0)
        elapsed, _, _ = warm.sample(clock)
    if elapsed >= SHORTEST_SAMPLE_MS:
        return warm
    times = min(math.ceil(SHORTEST_SAMPLE_MS / max(elapsed, 1e-6)), MOST_CALLS)
    return _Candidate(fn, times, warm.lead.times(times))


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
