"""Clocks that give every rank the same: of each sample the time of the slowest.

Ranks stop sampling, reject and repeat by what they measured, and whole steps hold collectives: with
times of their own they would take different numbers of samples and wait for each other for ever.
"""

from collections.abc import Callable
from dataclasses import dataclass

from autoprec.device.cuda_clock import FIRST_LEAD_MS, Sample
from autoprec.device.ranks import largest_over_ranks, world_size
from autoprec.device.timing import Clock, QueueingClock


def clock_of_all(own: Clock) -> Clock:
    """Return the clock of all ranks; the own one where there are no others."""
    if world_size() == 1:
        return own
    return SlowestQueueingClock(own) if isinstance(own, QueueingClock) else SlowestClock(own)


@dataclass(frozen=True)
class SlowestClock:
    """The most ms that a rank took."""

    own: Clock

    def measure(self, fn: Callable[[], object]) -> float:
        """Run `fn` once on every rank and return the ms of the slowest."""
        return largest_over_ranks([self.own.measure(fn)])[0]


@dataclass(frozen=True)
class SlowestQueueingClock:
    """The same of a device that works apart from the host; ranks learn one lead together."""

    own: QueueingClock

    def measure(self, fn: Callable[[], object]) -> float:
        """Run `fn` once on every rank and return the ms of the slowest."""
        return self.sample(fn).ms

    def sample(
        self,
        fn: Callable[[], object],
        *,
        lead_ms: float = FIRST_LEAD_MS,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> Sample:
        """Run `fn` once on every rank; disturbed, or late, where any rank was."""
        own = self.own.sample(fn, lead_ms=lead_ms, meanwhile=meanwhile)
        seen = [own.ms, own.host_ms or 0.0, not own.is_ahead, own.is_disturbed]
        ms, host_ms, late, disturbed = largest_over_ranks(seen)
        known = None if own.host_ms is None else host_ms
        return Sample(ms, known, is_ahead=not late, is_disturbed=disturbed > 0)


def own_clock(clock: Clock) -> Clock:
    """Return this rank's own clock, for what ranks do not all do alike."""
    if isinstance(clock, (SlowestClock, SlowestQueueingClock)):
        return clock.own
    return clock
