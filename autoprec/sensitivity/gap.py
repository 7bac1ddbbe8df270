"""From a gradient error e to the loss gap expected after N steps, and back. No torch in here.

    gap(N) = LEVEL * e * (N / 300)^GROWTH

e is the gradient error as plans count it (`LayerSensitivity.counted_error`): that of grad_weight
GEMMs, which stays in the layer's own weights and costs runs less than what goes on through the
model, by half. A plan's joint error is one number, which counts as the plan's rows do: measured
times their sum as counted over their sum (`search.costs`).

Precision error is noise on top of minibatch noise: noise of relative variance e costs a fraction
e of extra steps (McCandlish et al., "An Empirical Model of Large-Batch Training"), and loss falls
about as a power of the steps, with an exponent near 0.1 over most of a training (0.095 in tokens:
Kaplan et al., "Scaling Laws for Neural Language Models"); LEVEL is about that exponent. What the
argument does not have is that the gap of one plan grows with the length of the run: an error in the
forward pass grows as the model learns, and short runs pay for little of it. Both constants are
fitted to whole runs of 75, 300 and 2000 steps (docs/convergence.md, decision 053); how the loss
falls in a warm-up did not make families that were left out any better predicted, so it is not used.

A run that has the plan in its last n of N steps pays (n / N)^BRANCH_SHARE of a whole run's gap:
for the last third of the steps a tenth was measured.

What a verification measured corrects the prediction (`with_measured`). With theta the logarithm of
true over predicted gap, normal with the spread that gives the interval, a gap measured over n steps
says theta up to DRIFT * log(N / n), which is how much theta itself changes on the way to N.
"""

import itertools
import math
from collections.abc import Sequence

from autoprec.records import Basis, ExpectedGap, HorizonGap, Sensitivity

FEWEST_POINTS = 4  # of the loss curve; a line needs two, its standard error a few more
SMALLEST_LOSS = 1e-12
HORIZON_STEPS = 75  # 50 of warm-up and 25 of branch: what verification trains by default
USUAL_EXPONENT = 0.1  # of the steps, by which losses fall where nothing was seen
LEVEL, GROWTH, WHOLE_STEPS = 0.12, 0.5, 300
BRANCH_SHARE = 2.0
# mean / BELOW to mean * ABOVE held 0.80 of the plans above the noise, in the mean over six families
# that were left out of the fit in turn; by family 0.17 to 1
BELOW, ABOVE = 4.0, 4.0
DRIFT = 0.4  # per e-fold of steps
SHORTEST_STEPS = 300  # of a run that corrects: over 75 steps gaps told nothing of 300
SHORT_MODEL = 0.25  # what a measured gap may be beside its noise, in predicted ones
CONFIDENCE = 0.8
QUANTILE = 1.2816  # of a normal distribution, at 0.5 + CONFIDENCE / 2
LONGEST_STEPS = 2000  # of the runs that the constants were fitted to
FARTHEST = 10  # times that; nothing is known beyond
GROWTH_DOUBT = 0.5  # how far GROWTH may be off beyond: NVFP4's GEMMs have 0.3 to 0.85 (Quartet II)
# The first 50 of 300 steps cost a tenth to two thirds of a whole run's gap, by family, and those of
# 2000 up to a fifth (docs/convergence.md): at most EARLY * (50 / N)^0.5
EARLY = 1.5
# above it, grad_weight's counted whole, quantised training stops being effective: Chmiel et al.,
# "FP4 All the Way", 2505.19115
CEILING = 1 / 3


def expected_gap(sensitivity: Sensitivity, grad_error: float | None, steps: int) -> ExpectedGap:
    """Return the relative loss gap expected after `steps` steps with the plan, and its interval.

    `grad_error` is the whole plan's, as plans count it, where the table was measured; None: it is
    not known. Without an error the gap is exactly 0. Beyond LONGEST_STEPS the interval widens, and
    beyond FARTHEST times that nothing is known.
    """
    if grad_error == 0.0:  # it is the reference
        return ExpectedGap(
            steps=steps, mean=0.0, low=0.0, high=0.0, confidence=CONFIDENCE, basis=Basis.MEASURED
        )
    reason = ""
    if grad_error is None:
        reason = "the plan's gradient error is not known"
    elif steps > FARTHEST * LONGEST_STEPS:
        reason = (
            f"how a gap grows was measured over runs of up to {LONGEST_STEPS:,} steps, which says "
            f"nothing about more than {FARTHEST * LONGEST_STEPS:,}; the budget of errors takes it "
            "to grow on as it did"
        )
    if grad_error is None or reason:
        return ExpectedGap(
            steps=steps, mean=None, low=None, high=None, confidence=CONFIDENCE,
            basis=Basis.UNKNOWN, reason=reason,
        )  # fmt: skip
    mean = predicted_loss_gap(sensitivity, grad_error, steps)
    doubt = _doubt(steps)
    return ExpectedGap(
        steps=steps,
        mean=mean,
        low=mean / BELOW / doubt,
        high=mean * ABOVE * doubt,
        confidence=CONFIDENCE,
        reason="for the end of the scheduler" if steps == sensitivity.schedule_steps else "",
    )


def predicted_loss_gap(
    sensitivity: Sensitivity, grad_error: float, steps: int, *, start: int = 0
) -> float:
    """Return the relative loss gap that a gradient error predicts after `steps` steps.

    `grad_error` is that of the whole assignment, or of the part of it that is asked about, and
    `start` the number of steps before, in the reference's precision. The gap is a fraction of the
    predicted loss.
    """
    whole = gap_per_error(start + steps) * grad_error * _batch_ratio(sensitivity)
    return whole * math.pow(steps / max(start + steps, 1), BRANCH_SHARE)


def grad_error_budget_for(sensitivity: Sensitivity, tolerance: float, steps: int) -> float:
    """Return the largest gradient error whose gap is expected to stay within the tolerance.

    That is where the upper end of the expected gap's interval is the tolerance, were the largest
    error that was measured on the way (`growth`) the one that predicts, up to CEILING: beyond, as
    at a step whose recurrence is unstable, a gap is in proportion to no error.
    """
    grown = growth(sensitivity, most=CEILING, steps=steps)
    return tolerance / (ABOVE * _doubt(steps) * gap_per_error(steps) * grown)


def gap_per_error(steps: int) -> float:
    """Return the gap after a whole run of so many steps, per gradient error."""
    return LEVEL * math.pow(steps / WHOLE_STEPS, GROWTH)


def growth(sensitivity: Sensitivity, *, most: float = math.inf, steps: int | None = None) -> float:
    """Return the largest gradient error that is known over the one where the table was.

    The largest of those measured on the way, `most` at most and by no more than is beyond their own
    standard error (single choices of experts make one batch's 50 times another's), at the planned
    run's tokens per optimizer step where they were given and what they do is known. Of a run of so
    many steps an earlier error that was larger has a part only.
    """
    points = sensitivity.by_step
    last = points[-1].grad_error.mean if points else 0.0
    grown = 1.0
    for point, after in itertools.pairwise(points) if last > 0.0 else ():
        error = point.grad_error.mean - (point.grad_error.stderr or 0.0)
        part = min(EARLY * math.sqrt(after.step / steps), 1.0) if steps else 1.0
        grown = max(grown, 1.0 + part * (min(error, most) / last - 1.0))
    return grown * _batch_ratio(sensitivity)


def _doubt(steps: int) -> float:
    """Return by what an interval is wider than those of the runs that were measured."""
    return math.pow(max(steps, LONGEST_STEPS) / LONGEST_STEPS, GROWTH_DOUBT)


def _batch_ratio(sensitivity: Sensitivity) -> float:
    effect = sensitivity.batch_effect
    return 1.0 if effect is None or effect.ratio is None else effect.ratio


def with_measured(expected: ExpectedGap, measured: HorizonGap) -> ExpectedGap:
    """Return what is expected after the gap of a shorter run, or a branch, was measured too.

    The prediction as it is where the gap is not known, was measured over less than SHORTEST_STEPS,
    or over FARTHEST times fewer steps than expected for.
    """
    import numpy as np  # reports have no need of it

    mean, low, high, gap = expected.mean, expected.low, expected.high, measured.gap
    if not mean or not low or not high or gap is None or measured.stderr is None:
        return expected
    steps = expected.steps
    if measured.steps < SHORTEST_STEPS or steps > FARTHEST * measured.steps:
        return expected
    # what the prediction says of the short run
    short = mean * math.pow(measured.steps / steps, GROWTH)
    short *= math.pow(measured.branch_steps / measured.steps, BRANCH_SHARE)
    spread = math.log(high / low) / 2.0 / QUANTILE
    drift = DRIFT * math.log(max(steps / measured.branch_steps, 2.0))
    noise = math.hypot(measured.stderr, SHORT_MODEL * short)
    # p(theta | gap) on a grid of up to four spreads, its drift likewise summed over
    own, other = np.linspace(-4.0, 4.0, 81), np.linspace(-4.0, 4.0, 41)
    away = (gap.mean - short * np.exp(spread * own[:, None] + drift * other)) / noise
    likely = (np.exp(-0.5 * other**2) * np.exp(-0.5 * away**2)).sum(axis=1)
    thetas, weights = spread * own, np.exp(-0.5 * own**2) * likely
    if not weights.any():  # a gap that no theta explains
        return expected
    middle = float(np.average(thetas, weights=weights))
    half = QUANTILE * math.sqrt(float(np.average((thetas - middle) ** 2, weights=weights)))
    return expected.model_copy(
        update={
            "mean": mean * math.exp(middle),
            "low": mean * math.exp(middle - half),
            "high": mean * math.exp(middle + half),
            "reason": f"by the gradient error and the gap measured over {measured.steps} steps",
        }
    )


def loss_exponent(losses: Sequence[float], step: int) -> float | None:
    """Return r, the relative fall of a loss per e-fold of steps, at a step; None of a short curve.

    A line in log(step) is fitted to the later three quarters of the losses of steps 1, 2, ... Its
    slope is never taken to be below its own standard error, so that a flat or noisy curve does not
    promise that gradient errors cost nothing; beyond the curve r tends to USUAL_EXPONENT.
    """
    import numpy as np

    last = len(losses)
    first = max(math.ceil(last / 4), 1)
    x, y = np.log(np.arange(first, last + 1)), np.asarray(losses[first - 1 :])
    if len(y) < FEWEST_POINTS:
        return None
    slope, level = map(float, np.polyfit(x, y, 1))
    spread = float(((x - x.mean()) ** 2).sum())
    residual = float(((y - level - slope * x) ** 2).sum())
    fall = max(-slope, math.sqrt(residual / (len(y) - 2) / spread))
    last_loss = float(y.mean()) + fall * (float(x.mean()) - math.log(last))
    seen = min(last / max(step, 1), 1.0)
    return seen * fall / max(abs(last_loss), SMALLEST_LOSS) + (1.0 - seen) * USUAL_EXPONENT
