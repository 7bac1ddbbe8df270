"""From what each batch showed to an estimate with its standard error.

With |x|^2 = x'Px (see preconditioner), the gradient error is a ratio of means over batches,
mean(n_b) / mean(d_b) with n_b = |g_p - g_ref|^2 and d_b = |g_ref|^2. Its standard error comes from
the residuals n_b - mean * d_b (the ratio estimator's usual linearisation).
"""

import math
from collections.abc import Sequence

from autoprec.records import Estimate

DIVERGED = 1e6  # stands for an error that is not finite; records hold finite numbers only


def ratio_estimate(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Return mean(numerators) / mean(denominators) with its standard error over batches."""
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
