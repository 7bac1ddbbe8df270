"""From a gradient error e to the loss gap expected after N steps, and back. No torch in here.

    gap(N) = r(N) * e * (N / 300)^GROWTH

Precision error is noise on top of minibatch noise: noise of relative variance e costs a fraction
e of extra steps (McCandlish et al., "An Empirical Model of Large-Batch Training"). Loss falls about
as a power of the steps, so with r = -d log(loss) / d log(t) they are worth r * e of the loss. What
that argument does not have is that the gap of one plan grows with the length of the run: an error
in the forward pass grows as the model learns, and short runs pay for little of it. GROWTH and the
300 steps are fitted to whole runs of 75, 300 and 2000 steps (docs/convergence.md, decision 043).

e is the largest of those measured along the reference's training (`growth`). A run that has the
plan in its last n of N steps pays n / N of a whole run's gap.

Within the loss curve r is its slope per e-fold of steps over its last loss. Beyond it nothing is
known but how training usually goes on: a fresh GPT falls steeply to the statistics of single
characters, then ten times slower; a fresh classifier hardly at first, then faster. So for a run of
n steps what the curve's m steps showed counts for the share of the run that they are, and the rest
is taken to fall as language models do over most of their training, with the exponent 0.1 (0.095 in
tokens: Kaplan et al., "Scaling Laws for Neural Language Models"):

    r(n) = m/n * r(m) + (1 - m/n) * 0.1       for n > m
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autoprec.errors import InfeasibleError
from autoprec.records import Basis, ExpectedGap, Sensitivity

FEWEST_POINTS = 4  # of the loss curve; a line needs two, its standard error a few more
SMALLEST_LOSS = 1e-12
HORIZON_STEPS = 75  # 50 of warm-up and 25 of branch: what verification trains by default
USUAL_EXPONENT = 0.1  # at step 75 of three families: 0.06, 0.19, 0.49
GROWTH, WHOLE_STEPS = 0.75, 300  # fitted: a run of 300 steps pays r * e
# mean / BELOW to mean * ABOVE held 8 of 10 plans above the noise, of eight families
BELOW, ABOVE = 4.0, 3.0
CONFIDENCE = 0.8
LONGEST_STEPS = 2000  # of the runs that the constants were fitted to
FARTHEST = 10  # times that; nothing is known beyond
GROWTH_DOUBT = 0.5  # how far GROWTH may be off beyond: NVFP4's GEMMs have 0.3 to 0.85 (Quartet II)
# above it, quantised training stops being effective: Chmiel et al., "FP4 All the Way", 2505.19115
CEILING = 1 / 3


@dataclass(frozen=True)
class LossLine:
    """loss(t) = last_loss - slope * log(t / last_step), fitted to the later part of a loss curve.

    `slope` is in the loss's unit per e-fold of steps; it is never below its own standard error, so
    that a flat or noisy curve does not promise that gradient errors cost nothing.
    """

    slope: float
    last_step: int
    last_loss: float

    def exponent_at(self, step: int) -> float:
        """Return r, the relative slope of the loss per e-fold of steps, at a step."""
        own = self.slope / max(abs(self.last_loss), SMALLEST_LOSS)
        seen = min(self.last_step / max(step, 1), 1.0)
        return seen * own + (1.0 - seen) * USUAL_EXPONENT


def expected_gap(sensitivity: Sensitivity, grad_error: float | None, steps: int) -> ExpectedGap:
    """Return the relative loss gap expected after `steps` steps with the plan, and its interval.

    `grad_error` is the whole plan's, where the table was measured; None: it is not known. Beyond
    LONGEST_STEPS the interval widens, and beyond FARTHEST times that nothing is known.
    """
    mean = None if grad_error is None else predicted_loss_gap(sensitivity, grad_error, steps)
    reason = ""
    if grad_error is None:
        reason = "the plan's gradient error is not known"
    elif mean is None:
        reason = f"the reference's loss curve has fewer than {FEWEST_POINTS} points"
    elif steps > FARTHEST * LONGEST_STEPS:
        reason = (
            f"how a gap grows was measured over runs of up to {LONGEST_STEPS} steps, which says "
            f"nothing about more than {FARTHEST * LONGEST_STEPS}"
        )
    if mean is None or reason:
        return ExpectedGap(
            steps=steps, mean=None, low=None, high=None, confidence=CONFIDENCE,
            basis=Basis.UNKNOWN, reason=reason,
        )  # fmt: skip
    doubt = (max(steps, LONGEST_STEPS) / LONGEST_STEPS) ** GROWTH_DOUBT
    return ExpectedGap(
        steps=steps,
        mean=mean,
        low=mean / BELOW / doubt,
        high=mean * ABOVE * doubt,
        confidence=CONFIDENCE,
    )


def predicted_loss_gap(
    sensitivity: Sensitivity, grad_error: float, steps: int, *, start: int = 0
) -> float | None:
    """Return the relative loss gap that a gradient error predicts after `steps` steps.

    `grad_error` is that of the whole assignment, or of the part of it that is asked about, and
    `start` the number of steps before, in the reference's precision. The gap is a fraction of the
    predicted loss; None when the loss curve is too short to fit.
    """
    line = fit_loss_line(sensitivity.loss_curve)
    if line is None:
        return None
    whole = gap_per_error(line, start + steps) * grad_error * growth(sensitivity)
    return whole * steps / max(start + steps, 1)


def grad_error_budget_for(sensitivity: Sensitivity, tolerance: float, steps: int) -> float:
    """Return the largest gradient error whose gap is expected to stay within the tolerance.

    That is where the upper end of the expected gap's interval is the tolerance, for errors that
    grow as those that were measured (`growth`).

    Raises:
        InfeasibleError: the loss curve is too short or flat to say what a step is worth.
    """
    line = fit_loss_line(sensitivity.loss_curve)
    if line is None or line.slope <= 0.0:
        raise InfeasibleError(
            f"a loss tolerance needs a falling reference loss of at least {FEWEST_POINTS} warm-up "
            f"steps, but the sensitivity has {len(sensitivity.loss_curve)} and no fall; measure it "
            "with more warm-up steps"
        )
    return tolerance / (ABOVE * gap_per_error(line, steps) * growth(sensitivity))


def gap_per_error(line: LossLine, steps: int) -> float:
    """Return the gap after a whole run of so many steps, per gradient error."""
    return line.exponent_at(steps) * math.pow(steps / WHOLE_STEPS, GROWTH)


def growth(sensitivity: Sensitivity) -> float:
    """Return the largest gradient error that is known over the one where the table was.

    The largest of those measured on the way, at the planned run's tokens per optimizer step where
    they were given and what they do is known.
    """
    errors = [point.grad_error.mean for point in sensitivity.by_step]
    largest = max(errors) / errors[-1] if errors and errors[-1] > 0.0 else 1.0
    effect = sensitivity.batch_effect
    return largest if effect is None or effect.ratio is None else largest * effect.ratio


def fit_loss_line(curve: Sequence[tuple[int, float]]) -> LossLine | None:
    """Fit the later three quarters of a loss curve; None when fewer than FEWEST_POINTS points."""
    last = max((step for step, _ in curve), default=0)
    points = [(math.log(step), loss) for step, loss in curve if step >= max(last / 4, 1)]
    if len(points) < FEWEST_POINTS:
        return None
    x_mean = math.fsum(x for x, _ in points) / len(points)
    y_mean = math.fsum(y for _, y in points) / len(points)
    spread = math.fsum((x - x_mean) ** 2 for x, _ in points)
    slope = -math.fsum((x - x_mean) * (y - y_mean) for x, y in points) / spread
    level = y_mean + slope * x_mean
    residual = math.fsum((y - (level - slope * x)) ** 2 for x, y in points)
    believed = max(slope, math.sqrt(residual / (len(points) - 2) / spread))  # or its standard error
    return LossLine(believed, last, y_mean + believed * x_mean - believed * math.log(last))
