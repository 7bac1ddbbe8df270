"""Least squares over constants: logarithms of constants against logarithms of published numbers.

A constant starts at a value that is no fit to the rows (a data sheet, a sweep's best, a count of
kernels) and is held there by a prior, so that rows which say nothing about it leave it alone.
Residuals are log errors over the believable error of their row; a soft L1 loss keeps single bad
rows from deciding.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from published import Observation
from scipy.optimize import least_squares

from autoprec.records.devices import CONSTANTS, Machine

SOFT = 2.0  # sigmas up to which a residual counts as a square
MAX_EVALUATIONS = 60
COMMON_SIGMA = 0.5  # how devices differ in all kernels alike


@dataclass(frozen=True)
class Prior:
    """Where a fitted constant starts, how far it may go (log units), and why it starts there."""

    value: float
    sigma: float
    why: str


def machine_from(constants: Mapping[str, float]) -> Machine:
    """Return the machine of these constants."""
    return Machine(**{name: constants[name] for name in CONSTANTS})


def fit_constants(
    fixed: Mapping[str, float],
    priors: Mapping[str, Prior],
    rows: Sequence[Observation],
    *,
    cap: float = math.inf,
) -> dict[str, float]:
    """Return the values of the constants in `priors` that explain `rows` best.

    No fraction is above `cap`.
    """
    names = tuple(priors)
    start = np.array([math.log(priors[name].value) for name in names])
    widths = np.array([priors[name].sigma for name in names])

    def residuals(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        values = dict(zip(names, np.exp(logs).tolist(), strict=True))
        machine = machine_from({**fixed, **values})
        errors = [soften(row.residual(machine)) for row in rows]
        return np.array([*errors, *((logs - start) / widths)])

    low = np.log([max(CONSTANTS[name].low, 1e-3) for name in names])
    caps = [cap if name.endswith("_fraction") else math.inf for name in names]
    high = np.log([min(CONSTANTS[n].high, c) for n, c in zip(names, caps, strict=True)])
    inside = np.clip(start, low + 1e-6, high - 1e-6)
    result = least_squares(residuals, inside, bounds=(low, high), max_nfev=MAX_EVALUATIONS)
    return dict(zip(names, np.exp(result.x).tolist(), strict=True))


def fit_scales(
    fixed: Mapping[str, float],
    fractions: Mapping[str, float],
    rows: Sequence[Observation],
    *,
    cap: float,
    apart: float,
) -> dict[str, float]:
    """Return `fractions` scaled, BF16 against FP8 by about `apart`; alike where rows are silent."""

    def scaled(logs: NDArray[np.float64]) -> dict[str, float]:
        bf16, fp8 = np.exp(logs[0] + logs[1]), np.exp(logs[0] - logs[1])
        factors = {n: float(bf16 if "bf16" in n else fp8) for n in fractions}
        return {n: min(cap, f * factors[n]) for n, f in fractions.items()}

    def residuals(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        machine = machine_from({**fixed, **scaled(logs)})
        errors = [soften(row.residual(machine)) for row in rows]
        return np.array([*errors, logs[0] / COMMON_SIGMA, logs[1] / apart])

    return scaled(least_squares(residuals, np.zeros(2), max_nfev=MAX_EVALUATIONS).x)


def soften(residual: float) -> float:
    """Return the residual whose square is the soft L1 loss of `residual`."""
    scaled = (residual / SOFT) ** 2
    return math.copysign(SOFT * math.sqrt(2 * (math.sqrt(1 + scaled) - 1)), residual)
