"""Clocks that give every rank the same: of each sample the time of the slowest.

Ranks stop sampling, reject and repeat by what they measured, and whole steps hold collectives: with
times of their own they would take different numbers of samples and wait for each other for ever.
"""

from collections.abc import Callable
from dataclasses import dataclass

from autoprec.device.cuda_clock import Sample
from autoprec.device.ranks import largest_over_ranks
from autoprec.device.timing import Clock


@dataclass(frozen=True)
class SlowestClock:
    """The most ms that a rank took; ranks learn one lead together."""

    own: Clock

    def measure(self, fn: Callable[[], object]) -> float:
        """Run `fn` once on every rank and return the ms of the slowest."""
        return largest_over_ranks([self.own.measure(fn)])[0]

    def sample(
        self, fn: Callable[[], object], *, lead_ms: float, meanwhile: Callable[[], object]
    ) -> Sample:
        """Run `fn` once on every rank; disturbed, or late, where any rank was."""
        own = self.own.sample(fn, lead_ms=lead_ms, meanwhile=meanwhile)
        seen = [own.ms, own.host_ms or 0.0, not own.is_ahead, own.is_disturbed]
        ms, host_ms, late, disturbed = largest_over_ranks(seen)
        known = None if own.host_ms is None else host_ms
        return Sample(ms, known, is_ahead=not late, is_disturbed=disturbed > 0)
