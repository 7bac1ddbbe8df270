"""From a gradient error e to a predicted loss gap, and back. No torch in here.

Precision error is noise on top of minibatch noise: noise of relative variance e costs a fraction
e of extra steps (McCandlish et al., "An Empirical Model of Large-Batch Training"). Loss falls about
as a power of the steps, so with r = -d log(loss) / d log(t) a run of n steps that makes the
progress of n / (1 + e) ends higher, in relative terms, by

    gap = r * log(1 + e)

(for a branch of n steps after n0 common ones, e counts n / (n0 + n) only). The part of e that does
not average out over batches costs what the rest does (docs/decisions/015-bias-counts-as-noise.md).

Within the curve r is its slope per e-fold of steps over its last loss. Beyond it nothing is known
but how training usually goes on: a fresh GPT falls steeply to the statistics of single characters,
then ten times slower; a fresh classifier hardly at first, then faster. So for a run of n steps what
the curve's m steps showed counts for the share of the run that they are, and the rest is taken to
fall as language models do over most of their training, with the exponent 0.1 (0.095 in tokens:
Kaplan et al., "Scaling Laws for Neural Language Models"):

    r(n) = m/n * r(m) + (1 - m/n) * 0.1       for n > m

From ten steps this is a guess of the right size and no bound: at step 75 it was 2 times too high
for a GPT, 2 and 5 times too low for a classifier from scratch and a fine-tuned one (a line in log t
through the same steps: 13 times too high, 3 and 10 too low). The budget keeps a factor in hand (see
`search.stage.grad_error_budget`); what it lets through that does harm, verification refutes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from autoprec.errors import InfeasibleError
from autoprec.records import Sensitivity

FEWEST_POINTS = 4  # of the loss curve; a line needs two, its standard error a few more
SMALLEST_LOSS = 1e-12
HORIZON_STEPS = 75  # 50 of warm-up and 25 of branch: what verification trains by default
USUAL_EXPONENT = 0.1  # at step 75 of the three families of bench/convergence: 0.06, 0.19, 0.49


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


def predicted_loss_gap(
    sensitivity: Sensitivity, grad_error: float, steps: int, *, start: int = 0
) -> float | None:
    """Return the relative loss gap that a gradient error predicts after `steps` steps.

    `grad_error` is that of the whole assignment, or of the part of it that is asked about, and
    `start` the number of steps before, in the reference's precision. The gap is a fraction of the
    predicted loss; None when the loss curve is too short to fit.
    """
    line = fit_loss_line(sensitivity.loss_curve)
    extra = grad_error * steps / max(start + steps, 1)
    return None if line is None else line.exponent_at(start + steps) * math.log1p(extra)


def grad_error_budget_for(sensitivity: Sensitivity, tolerance: float, steps: int) -> float:
    """Return the largest gradient error whose predicted relative loss gap is the tolerance.

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
    return math.expm1(min(tolerance / line.exponent_at(steps), 30.0))  # exp(30): no limit


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
