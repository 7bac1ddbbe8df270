"""A gradient error over batches, and how sure it is."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from autoprec.records.sensitivity import Estimate

DIVERGED = 1e6  # stands for an error that is not finite; records hold finite numbers only


class Squares(NamedTuple):
    """d'Pd of each batch, d an error of the gradient g, and g'Pg."""

    errors: Sequence[float]
    gradients: Sequence[float]

    @property
    def estimate(self) -> Estimate:
        """The gradient error over all batches."""
        return ratio_estimate(*self)

    @property
    def largest(self) -> int:
        """The batch that has most of the error."""
        errors = [value if math.isfinite(value) else math.inf for value in self.errors]
        return errors.index(max(errors))

    def of(self, batch: int) -> Estimate:
        """Return the gradient error of one batch."""
        return ratio_estimate([self.errors[batch]], [self.gradients[batch]])


def ratio_estimate(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Return mean(numerators) / mean(denominators) with its standard error over batches.

    The standard error is that of the residuals n - mean * d, the ratio's usual linearisation.
    """
    count = len(numerators)
    scale = math.fsum(denominators) / count
    if not all(math.isfinite(value) for value in numerators):
        return Estimate(mean=DIVERGED)
    mean = math.fsum(numerators) / count / scale
    if count < 2:
        return Estimate(mean=mean)
    residuals = (n - mean * d for n, d in zip(numerators, denominators, strict=True))
    variance = math.fsum(r * r for r in residuals) / (count - 1) / count
    return Estimate(mean=mean, stderr=math.sqrt(variance) / scale)
