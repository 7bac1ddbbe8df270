"""From a gradient perturbation e to a predicted loss gap, and back. No torch in here.

Precision error is noise on top of minibatch noise: noise of relative variance e costs a fraction e
of extra steps (McCandlish et al., "An Empirical Model of Large-Batch Training"). The bias part of e
does not average out over steps, so it counts against the mean gradient instead of the minibatch
gradient, whose square is smaller by 1 - v with v the relative variance of the minibatch gradient:

    extra = (e - bias) + bias / (1 - v)              extra steps per step

The reference's own loss curve says what a step is worth. Loss falls about as a power of the steps,
so with r = -d log(loss) / d log(t) a run of n steps that makes the progress of n / (1 + extra) ends
higher, in relative terms, by

    gap = r * log(1 + extra)

(for a branch of n steps after n0 common ones, extra counts n / (n0 + n) only).

Within the curve r is its slope per e-fold of steps over its last loss. Beyond it nothing is known
but how training usually goes on: a fresh GPT falls steeply to the statistics of single characters,
then ten times slower; a fresh classifier hardly at first, then faster. So for a run of n steps what
the curve's m steps showed counts for the share of the run that they are, and the rest is taken to
fall as language models do over most of their training, with the exponent 0.1 (0.095 in tokens:
Kaplan et al., "Scaling Laws for Neural Language Models"):

    r(n) = m/n * r(m) + (1 - m/n) * 0.1       for n > m

From ten steps this is a guess of the right size and no bound: at step 75 it was 2 times too high
for a GPT, 2 and 5 times too low for a classifier from scratch and a fine-tuned one (a line in log t
through the same steps: 13 times too high, 3 and 10 too low). The budget of e keeps a factor in hand
(see `search.stage.e_budget`); what it lets through that does harm, verification refutes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoprec.errors import InfeasibleError
from autoprec.records import Option, Sensitivity

FEWEST_POINTS = 4  # of the loss curve; a line needs two, its standard error a few more
SMALLEST_LOSS = 1e-12
LARGEST_NOISE = 0.95  # of the minibatch gradient; estimates nearer to 1 are not to be divided by
USUAL_EXPONENT = 0.1  # at step 75 of the three families of bench/convergence: 0.06, 0.19, 0.49


@dataclass(frozen=True)
class LossLine:
    """loss(t) = level - slope * log t, fitted to the later part of a loss curve.

    `slope` is in the loss's unit per e-fold of steps; it is never below its own standard error, so
    that a flat or noisy curve does not promise that perturbations cost nothing.
    """

    level: float
    slope: float
    last_step: int
    last_loss: float

    def exponent_at(self, step: int) -> float:
        """Return r, the relative slope of the loss per e-fold of steps, at a step."""
        own = self.slope / max(abs(self.last_loss), SMALLEST_LOSS)
        seen = min(self.last_step / max(step, 1), 1.0)
        return seen * own + (1.0 - seen) * USUAL_EXPONENT


def predicted_loss_gap(
    sensitivity: Sensitivity,
    e: float,
    steps: int,
    *,
    start: int = 0,
    bias: float | None = None,
) -> float | None:
    """Return the relative loss gap that a perturbation `e` predicts after `steps` steps.

    Args:
        sensitivity: gives the loss curve, the bias share and the gradient's own noise.
        e: the perturbation of the whole assignment.
        steps: how many steps run with it.
        start: how many steps ran before, in the reference's precision.
        bias: the part of `e` that does not average out; by default the share that the
            sensitivity's joint measurements (or its rows) showed.

    Returns:
        The gap as a fraction of the predicted loss; None when the loss curve is too short to fit.
    """
    line = fit_loss_line(sensitivity.loss_curve)
    if line is None:
        return None
    extra = extra_steps(sensitivity, e, bias=bias) * steps / max(start + steps, 1)
    return line.exponent_at(start + steps) * math.log1p(extra)


def e_budget_for(sensitivity: Sensitivity, tolerance: float, steps: int) -> float:
    """Return the largest e whose predicted relative loss gap after `steps` is `tolerance`.

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
    log_extra = min(tolerance / line.exponent_at(steps), 30.0)  # exp(30): no limit
    return math.expm1(log_extra) / _extra_per_e(sensitivity, share=None)


def extra_steps(sensitivity: Sensitivity, e: float, *, bias: float | None = None) -> float:
    """Return the fraction of extra training steps that a perturbation `e` costs."""
    return e * _extra_per_e(sensitivity, share=None if bias is None else bias / max(e, 1e-300))


def fit_loss_line(curve: Sequence[tuple[int, float]]) -> LossLine | None:
    """Fit the later three quarters of a loss curve; None when fewer than FEWEST_POINTS points."""
    if not curve:
        return None
    last = max(step for step, _ in curve)
    points = [(math.log(step), loss) for step, loss in curve if step >= max(last / 4, 1)]
    if len(points) < FEWEST_POINTS:
        return None
    x_mean = math.fsum(x for x, _ in points) / len(points)
    y_mean = math.fsum(y for _, y in points) / len(points)
    spread = math.fsum((x - x_mean) ** 2 for x, _ in points)
    slope = -math.fsum((x - x_mean) * (y - y_mean) for x, y in points) / spread
    level = y_mean + slope * x_mean
    residual = math.fsum((y - (level - slope * x)) ** 2 for x, y in points)
    stderr = math.sqrt(residual / (len(points) - 2) / spread)
    believed = max(slope, stderr)
    level = y_mean + believed * x_mean
    return LossLine(level, believed, last, level - believed * math.log(last))


def bias_share(sensitivity: Sensitivity) -> float:
    """Return which part of e does not average out, pooled over what was measured, in 0..1."""
    pairs = [(j.e.mean, j.bias.mean) for j in sensitivity.joint if j.bias is not None]
    if not pairs:
        pairs = [(row.e.mean, row.bias.mean) for row in sensitivity.rows]
    return _pooled_share(pairs)


def plan_bias(sensitivity: Sensitivity, options: Mapping[str, Option], e: float) -> float:
    """Return the part of a plan's `e` that does not average out, by the rows of its own options.

    One bad layer can make up nearly all of e, and its share is not that of the others.
    """
    rows = [row for name, option in options.items() if (row := sensitivity.row(name, option))]
    return e * _pooled_share([(row.e.mean, row.bias.mean) for row in rows])


def _pooled_share(pairs: Sequence[tuple[float, float]]) -> float:
    total = math.fsum(e for e, _ in pairs)
    if total <= 0.0:
        return 0.0
    return min(max(math.fsum(bias for _, bias in pairs) / total, 0.0), 1.0)


def _extra_per_e(sensitivity: Sensitivity, *, share: float | None) -> float:
    share = bias_share(sensitivity) if share is None else min(max(share, 0.0), 1.0)
    noise = sensitivity.gradient_noise
    variance = 0.0 if noise is None else min(max(noise.mean, 0.0), LARGEST_NOISE)
    return (1.0 - share) + share / (1.0 - variance)
