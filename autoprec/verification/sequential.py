"""Turn paired loss gaps, one per seed, into an interval and a verdict; no training happens here.

The gaps d_1, d_2, ... of the seeds are draws whose mean mu is the plan's true gap. After n of them

    low  = mean - t * sd * sqrt(1/n + w)
    high = mean + t * sd * sqrt(1/n + w) + unseen(n) * max(JUMP_SPREADS * sd, tolerance)

**Looks.** t is Student's quantile. Looking after every seed and stopping when the answer pleases is
not one test but several, so each look gets a smaller share: with looks planned at n = seeds_min ...
seeds_max, every look uses one p-value a' for which, for normal gaps,

    P(some look has p <= a' | mu) = 1 - CONFIDENCE.

The left side depends on nothing but the planned looks and is simulated once, with a fixed seed.

**One warm-up.** All branches start from one warm-up, another one would shift all gaps alike. Such
shifts are taken for WARM_UP_SHARE of a gap's variance, so w = share / (1 - share): what more seeds
cannot take away. A warm-up for each seed would, and costs more than the seeds that do as well.

**Rare jumps.** Gaps have a heavy right tail: some runs end far above the others. Three seeds miss a
jump that one of ten runs makes in 73 % of cases, and their mean is then too low by a tenth of it.
What was not seen is allowed for: n seeds miss runs that are a share of unseen(n) of all in 5 % of
cases,

    (1 - unseen)^n = 0.05        unseen = 0.63 of 3 seeds, 0.45 of 5, 0.26 of 10, 0.1 of 29,

and such runs may lie JUMP_SPREADS spreads, or a whole tolerance, above the others. Beyond that size
only more seeds help; docs/convergence.md has the error rates (bench/gate.py).

    verified      the whole interval is at or below the tolerance
    refuted       the whole interval is above it
    inconclusive  neither, yet
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy.special import chdtri, stdtr, stdtrit  # scipy.stats takes a second to import

from autoprec.records import LossGap, Verdict

CONFIDENCE = 0.95  # of an interval, over all looks together
SIMULATED_PATHS = 200_000  # the standard error of a simulated 5 % is then 0.05 %
MOST_ADVISED_SEEDS = 1000
# of a gap's variance, between warm-ups: 0.09 to 0.21 in three families, 0.37 in a tiny one, where 6
# warm-ups of 6 seeds tell no more than 0.08 to 0.8; bench/gate.py has what larger shares do
WARM_UP_SHARE = 0.21
JUMP_SPREADS = 8.0  # the size of jumps, in standard deviations, that no seed need have shown
MISSED = 0.05  # the chance that no seed showed them

T = TypeVar("T", float, npt.NDArray[np.float64])


@dataclass(frozen=True)
class Terms:
    """How far the test goes (`--seeds`, `--warmup-steps`, `--branch-steps`).

    Attributes:
        seeds_min: the seeds before the first look at the gaps; two at least.
        seeds_max: the seeds after which the test gives up.
        warmup_steps: FP32 steps before the branches; none where a checkpoint has optimizer state.
        branch_steps: of each branch; the learning rates fall to nearly zero over them.
        horizons: whole lengths over which the gap of the plan that stands is measured too.
        budget_s: without horizons, the time of the proof within which lengths are doubled.
    """

    seeds_min: int = 3
    seeds_max: int = 10
    warmup_steps: int = 50
    branch_steps: int = 25
    horizons: tuple[int, ...] = ()
    budget_s: float | None = None

    @property
    def p_value(self) -> float:
        """The two-sided p-value that each look may use."""
        return _common_p_value(self.seeds_min, self.seeds_max)


def gap_interval(gaps: Sequence[float], terms: Terms, *, tolerance: float = 0.0) -> LossGap:
    """Return the mean gap and its interval after these seeds (at least two).

    `tolerance` is what the gap is tested against, in its unit, where it is.
    """
    values = np.asarray(gaps, dtype=np.float64)
    mean, sd = float(values.mean()), float(values.std(ddof=1))
    below, above = half_widths(sd, len(gaps), terms.p_value, tolerance)
    return LossGap(
        mean=mean, low=mean - below, high=mean + above, confidence=CONFIDENCE, seeds=len(gaps)
    )


def half_widths(sd: T, count: int, p_value: float, tolerance: float = 0.0) -> tuple[T, T]:
    """Return how far the interval reaches below and above the mean, of one spread or of many."""
    shared = WARM_UP_SHARE / (1.0 - WARM_UP_SHARE)  # of a seed's own variance
    below = _quantile(p_value, count) * sd * math.sqrt(1.0 / count + shared)
    unseen = 1.0 - MISSED ** (1.0 / count)
    return below, below + unseen * np.maximum(JUMP_SPREADS * sd, tolerance)


def mean_stderr(gaps: Sequence[float]) -> float:
    """Return the standard error of a mean gap, a warm-up's share included."""
    shared = WARM_UP_SHARE / (1.0 - WARM_UP_SHARE)
    return float(np.std(gaps, ddof=1)) * math.sqrt(1.0 / len(gaps) + shared)


def verdict_of(gap: LossGap, tolerance: float) -> Verdict:
    """Return the verdict of the whole interval on the tolerance."""
    if gap.high <= tolerance:
        return Verdict.VERIFIED
    if gap.low > tolerance:
        return Verdict.REFUTED
    return Verdict.INCONCLUSIVE


def seeds_needed(gaps: Sequence[float], tolerance: float, terms: Terms) -> int | None:
    """Return the number of seeds that would decide, were mean and spread to stay as they are.

    None when more than MOST_ADVISED_SEEDS would be needed: the gap then sits on the tolerance, or
    the spread is too large for it.
    """
    values = np.asarray(gaps, dtype=np.float64)
    distance, sd = tolerance - float(values.mean()), float(values.std(ddof=1))
    for count in range(len(gaps) + 1, MOST_ADVISED_SEEDS + 1):
        p_value = terms.p_value * min(1.0, terms.seeds_max / count)  # more looks, smaller shares
        below, above = half_widths(sd, count, p_value, tolerance)
        if distance >= above or -distance > below:
            return count
    return None


@lru_cache(maxsize=4096)
def _quantile(p_value: float, count: int) -> float:
    return float(stdtrit(count - 1, 1.0 - p_value / 2.0))


def can_decide(gaps: Sequence[float], tolerance: float, terms: Terms) -> bool:
    """Whether the seeds that are left may decide, by the smallest spread that fits these gaps.

    That is the lower end of its one-sided interval.
    """
    values, left = np.asarray(gaps, dtype=np.float64), len(gaps) - 1
    least = math.sqrt(left / float(chdtri(left, 1.0 - CONFIDENCE)))
    sd, mean = least * float(values.std(ddof=1)), float(values.mean())
    below, above = half_widths(sd, terms.seeds_max, terms.p_value, tolerance)
    return min(mean, 0.0) + above <= tolerance or mean - below > tolerance


def smallest_tolerance(gaps: Sequence[float], terms: Terms) -> float:
    """Return the tolerance that all seeds could verify of a plan without a gap, at this spread."""
    sd = float(np.std(gaps, ddof=1))
    below, above = half_widths(sd, terms.seeds_max, terms.p_value)
    unseen = 1.0 - MISSED ** (1.0 / terms.seeds_max)
    return float(max(above, below / (1.0 - unseen)))  # jumps of eight spreads, or of the tolerance


@lru_cache(maxsize=32)
def _common_p_value(first: int, last: int) -> float:
    """Simulate the smallest p-value over the looks under mu = 0 and return its quantile."""
    generator = np.random.default_rng(0)
    # many sequences of gaps at once: their sums and sums of squares, and each one's smallest p
    smallest = np.ones(SIMULATED_PATHS)
    total, squares = np.zeros(SIMULATED_PATHS), np.zeros(SIMULATED_PATHS)
    for count in range(1, last + 1):
        draw = generator.standard_normal(SIMULATED_PATHS)
        total += draw
        squares += draw * draw
        if count < first:
            continue
        # Student's t of mu = 0 after `count` gaps, and the p-value of this look
        variance = (squares - total * total / count) / (count - 1)
        t_value = np.abs(total) / np.sqrt(count * variance)
        np.minimum(smallest, 2.0 * stdtr(count - 1, -t_value), out=smallest)
    return float(np.quantile(smallest, 1.0 - CONFIDENCE))
