"""How a gap grows with the length of a run: the plan that stands, over a ladder of horizons.

    --horizons 75,150,300     these lengths
    --verify-budget 30m       each twice the one before, as far as the time reaches

A rung is a proof of its own in small: warm-up and branches in the proportion of the proof's, the
least number of its seeds. Where every rung's gap is beyond its noise, the growth g of

    gap(steps) = gap(last) * (steps / last)^g

is fitted to the logarithms, each with the weight of its error, and shown. It does not say what to
expect of longer runs: from 75 and 300 steps to 2000 it was within a factor of 2 for a quarter of
the plans and 2.5 times too high. The longest rung corrects the prediction by the gradient error
instead, if it has 300 steps (`sensitivity.gap.with_measured`).
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from autoprec.device.ranks import from_first_rank
from autoprec.records import Estimate, HorizonGap, Verification
from autoprec.sensitivity.gap import with_measured
from autoprec.verification.evidence import Evidence
from autoprec.verification.sequential import Terms, gap_interval, mean_stderr

RESOLVED = 2.0  # standard errors that a gap must be away from zero for its logarithm to count


def rung_terms(terms: Terms, steps: int) -> Terms:
    """Return the terms of a rung of so many steps, shared out as those of the proof are."""
    whole = terms.warmup_steps + terms.branch_steps
    branch = max(round(steps * terms.branch_steps / whole), 2)
    return Terms(
        seeds_min=terms.seeds_min,
        seeds_max=terms.seeds_min,
        warmup_steps=max(steps - branch, 0) if terms.warmup_steps else 0,
        branch_steps=branch,
    )


def climb(
    terms: Terms, gaps_of: Callable[[Terms], Sequence[float] | None], *, spent_s: float
) -> Iterator[HorizonGap]:
    """Yield the gap of every horizon, until the plan diverges at one.

    `gaps_of` trains under terms and returns the gaps of the seeds, None where one diverged;
    `spent_s` is what the proof took before.
    """
    for steps in terms.horizons or _doubled(terms, spent_s):
        if steps == terms.warmup_steps + terms.branch_steps:
            continue  # the proof has it
        own = rung_terms(terms, steps)
        gaps = gaps_of(own)
        yield HorizonGap(
            warmup_steps=own.warmup_steps,
            branch_steps=own.branch_steps,
            gap=None if gaps is None else gap_interval(gaps, own),
            stderr=None if gaps is None else mean_stderr(gaps),
        )
        if gaps is None:
            return


def _doubled(terms: Terms, spent_s: float) -> Iterator[int]:
    """Yield lengths, each twice the one before, while one more will end within the budget."""
    steps, began, last_s = terms.warmup_steps + terms.branch_steps, time.monotonic(), spent_s
    if terms.budget_s is None:
        return
    # what the next takes is known by the last; of several ranks the first decides
    while from_first_rank(spent_s + time.monotonic() - began + 2.0 * last_s <= terms.budget_s):
        steps, rung = 2 * steps, time.monotonic()
        yield steps
        last_s = time.monotonic() - rung


def gap_growth(rungs: Sequence[HorizonGap]) -> Estimate | None:
    """Return the exponent g and its standard error; None where a gap is not beyond its noise."""
    known = [(r.steps, r.gap.mean, r.stderr) for r in rungs if r.gap and r.stderr is not None]
    if len(known) < 2 or any(mean <= RESOLVED * stderr for _, mean, stderr in known):
        return None
    x, y = (np.log([row[i] for row in known]) for i in (0, 1))
    # the error of a logarithm is the relative error; equal gaps of all seeds have none
    weights = np.array([mean / max(stderr, 1e-3 * mean) for _, mean, stderr in known])
    (slope, level), covariance = np.polyfit(x, y, 1, w=weights, cov="unscaled")
    # where the points scatter about the line by more than their errors, the scatter counts
    residual = float(((weights * (y - level - slope * x)) ** 2).sum())
    scatter = max(residual / (len(known) - 2), 1.0) if len(known) > 2 else 1.0
    return Estimate(mean=float(slope), stderr=math.sqrt(scatter * covariance[0, 0]))


def with_horizons(
    found: Verification, evidence: Evidence, rungs: Sequence[HorizonGap]
) -> Verification:
    """Return a verification with the plan's gaps over other lengths, and what follows from them."""
    gaps = evidence.gaps("plan")
    own = HorizonGap(
        warmup_steps=found.warmup_steps,
        branch_steps=found.branch_steps,
        gap=found.gap,
        stderr=mean_stderr(gaps) if len(gaps) > 1 else None,
    )
    every = [own, *(rung for rung in rungs if rung.steps != own.steps)]
    every.sort(key=lambda rung: rung.steps)
    update: dict[str, object] = {}
    if rungs:
        update = {"horizons": tuple(every), "growth": gap_growth(every)}
    if found.expected_gap:
        update["expected_gap"] = with_measured(found.expected_gap, every[-1])
    return found.model_copy(update=update)
