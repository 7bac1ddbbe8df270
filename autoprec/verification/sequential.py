"""Turn paired loss gaps, one per seed, into an interval and a verdict; no training happens here.

The gaps d_1, d_2, ... of the seeds are taken as independent draws of one normal distribution whose
mean mu is the plan's true gap; its spread is unknown, so the interval after n seeds is Student's

    mean +- t(n - 1) * sd / sqrt(n).

Looking after every seed and stopping when the answer pleases is not one test but several, and at
the usual 95 % for each look the chance of a wrong verdict would add up. So each look gets a smaller
share: with looks planned at n = seeds_min ... seeds_max, every look uses one p-value a' for which

    P(some look has p <= a' | mu) = 1 - confidence.

The left side depends on nothing but the planned looks, because (mean - mu) / sd is distributed
alike for every normal distribution: it is simulated once, with a fixed seed. So the interval at
whatever look the test stops covers mu with at least the stated confidence. (a' lies between
Bonferroni's (1 - confidence) / looks, which ignores that looks share seeds, and 1 - confidence.)

    verified      the whole interval is at or below the tolerance
    refuted       the whole interval is above it
    inconclusive  neither, yet
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats

from autoprec.errors import InfeasibleError
from autoprec.records import LossGap, Verdict

SIMULATED_PATHS = 200_000  # the standard error of a simulated 5 % is then 0.05 %
MAX_SEEDS = 64  # simulated looks; beyond it a longer branch is the better use of time
MOST_ADVISED_SEEDS = 1000


@dataclass(frozen=True)
class Terms:
    """How far the test may go; no command sets these, a test may.

    Attributes:
        seeds_min: the seeds before the first look at the gaps; two at least.
        seeds_max: the seeds after which the test gives up.
        confidence: of the interval, over all looks together.
        warmup_steps: FP32 steps before the branches; none where a checkpoint has optimizer state.
        branch_steps: of each branch; the learning rates fall to nearly zero over them.
    """

    seeds_min: int = 3
    seeds_max: int = 5
    confidence: float = 0.95
    warmup_steps: int = 50
    branch_steps: int = 25

    def __post_init__(self) -> None:
        """Refuse terms under which nothing could be decided."""
        if not 2 <= self.seeds_min <= self.seeds_max <= MAX_SEEDS:
            raise InfeasibleError(
                f"2 <= seeds_min <= seeds_max <= {MAX_SEEDS} must hold, but got "
                f"{self.seeds_min} and {self.seeds_max}; one seed alone has no spread"
            )
        if not 0.5 <= self.confidence < 1.0:
            raise InfeasibleError(
                f"the confidence must lie in [0.5, 1), but it is {self.confidence}; 0.95 is usual"
            )
        if self.warmup_steps < 0 or self.branch_steps < 2:
            raise InfeasibleError(
                "warmup_steps >= 0 and branch_steps >= 2 must hold, but got "
                f"{self.warmup_steps} and {self.branch_steps}"
            )

    @property
    def p_value(self) -> float:
        """The two-sided p-value that each look may use."""
        return _common_p_value(self.seeds_min, self.seeds_max, self.confidence)


def gap_interval(gaps: Sequence[float], terms: Terms) -> LossGap:
    """Return the mean gap and its interval after these seeds (at least two)."""
    if len(gaps) < 2:
        raise InfeasibleError(
            f"an interval needs the gaps of two seeds, but there are {len(gaps)}; add seeds"
        )
    values = np.asarray(gaps, dtype=np.float64)
    mean = float(values.mean())
    half = _half_width(float(values.std(ddof=1)), len(gaps), terms.p_value)
    return LossGap(
        mean=mean, low=mean - half, high=mean + half, confidence=terms.confidence, seeds=len(gaps)
    )


def verdict_of(gap: LossGap, tolerance: float) -> Verdict:
    """Return the verdict of the whole interval on the tolerance."""
    if gap.high <= tolerance:
        return Verdict.VERIFIED
    if gap.low > tolerance:
        return Verdict.REFUTED
    return Verdict.INCONCLUSIVE


def seeds_needed(gaps: Sequence[float], tolerance: float, terms: Terms) -> int | None:
    """Return the number of seeds that would decide, were mean and spread to stay as they are.

    None when more than MOST_ADVISED_SEEDS would be needed: the gap then sits on the tolerance.
    """
    values = np.asarray(gaps, dtype=np.float64)
    distance, sd = abs(float(values.mean()) - tolerance), float(values.std(ddof=1))
    for count in range(len(gaps) + 1, MOST_ADVISED_SEEDS + 1):
        p_value = terms.p_value * min(1.0, terms.seeds_max / count)  # more looks, smaller shares
        if _half_width(sd, count, p_value) <= distance:
            return count
    return None


def _half_width(sd: float, count: int, p_value: float) -> float:
    quantile = float(stats.t.ppf(1.0 - p_value / 2.0, count - 1))
    return quantile * sd / math.sqrt(count)


@lru_cache(maxsize=32)
def _common_p_value(first: int, last: int, confidence: float) -> float:
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
        np.minimum(smallest, 2.0 * stats.t.sf(t_value, count - 1), out=smallest)
    return float(np.quantile(smallest, 1.0 - confidence))
