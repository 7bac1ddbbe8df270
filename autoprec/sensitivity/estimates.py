"""From what each batch showed to an estimate with its standard error.

With |x|^2 = x'Px (see preconditioner), e is a ratio of means over batches, mean(n_b) / mean(d_b)
with n_b = |g_p - g_ref|^2 and d_b = |g_ref|^2. Its standard error comes from the residuals
n_b - e d_b (the ratio estimator's usual linearisation).

The bias part |E(g_p - g_ref)|^2 must not count the noise that is left in a mean over few batches.
With x_b = P^(1/2)(g_p - g_ref) of batch b, inner products of different batches are free of it:
E<x_a, x_b> = |E x|^2 for a != b, so their mean is unbiased (and may come out below zero).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from autoprec.records import Estimate

DIVERGED_E = 1e6  # stands for a perturbation that is not finite; records hold finite numbers only


def ratio_estimate(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Return mean(numerators) / mean(denominators) with its standard error over batches."""
    count = len(numerators)
    scale = math.fsum(denominators) / count
    if not all(math.isfinite(value) for value in numerators):
        return Estimate(mean=DIVERGED_E)
    mean = math.fsum(numerators) / count / scale
    if count < 2:
        return Estimate(mean=mean)
    residuals = (n - mean * d for n, d in zip(numerators, denominators, strict=True))
    variance = math.fsum(r * r for r in residuals) / (count - 1) / count
    return Estimate(mean=mean, stderr=math.sqrt(variance) / scale)


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of per-batch values with its standard error."""
    return ratio_estimate(values, [1.0] * len(values))


def bias_estimate(sketches: Sequence[Tensor], denominators: Sequence[float]) -> Estimate:
    """Return |E x|^2 / E d from the sketches of x per batch; NaN-free, may be slightly negative."""
    if len(sketches) < 2:
        return Estimate(mean=0.0)
    stacked = torch.stack(list(sketches)).double()
    if not bool(torch.isfinite(stacked).all()):
        return Estimate(mean=DIVERGED_E)
    gram = stacked @ stacked.t()  # [batches, batches]
    rows: list[list[float]] = gram.tolist()

    def over(batches: Sequence[int]) -> float:
        pairs = [rows[a][b] for a in batches for b in batches if a != b]
        scale = math.fsum(denominators[b] for b in batches) / len(batches)
        return math.fsum(pairs) / len(pairs) / scale

    everything = range(len(sketches))
    return Estimate(mean=over(everything), stderr=_jackknife(over, everything, fewest=2))


def gradient_noise(sketches: Sequence[Tensor], squared: Sequence[float]) -> Estimate | None:
    """Return the relative variance of the minibatch gradient, 1 - |E g|^2 / E|g|^2."""
    if len(sketches) < 2:
        return None
    signal = bias_estimate(sketches, squared)
    return Estimate(mean=1.0 - signal.mean, stderr=signal.stderr)


def _jackknife(
    statistic: Callable[[Sequence[int]], float], batches: Sequence[int], *, fewest: int
) -> float | None:
    """Return the delete-one jackknife standard error; None when too few batches are left."""
    count = len(batches)
    if count - 1 < fewest:
        return None
    partial = [statistic([b for b in batches if b != left_out]) for left_out in batches]
    centre = math.fsum(partial) / count
    return math.sqrt((count - 1) / count * math.fsum((p - centre) ** 2 for p in partial))
