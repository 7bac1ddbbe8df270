"""What measured plans say of the table: a factor on every gradient error in it, with its error.

A cell is a layer in an option, or the activations' dtype. A plan's joint error is taken to be

    e(plan) = sum over its cells of table * exp(theta)
    theta   = everywhere's + its recipe's + its role's + its layer's + its own part

with independent normal parts of mean 0 (the table is right), and its logarithm is seen with the
error of the measurement and of adding up at all:

    log e_measured = log e(plan) + noise,    noise^2 = NOT_ADDITIVE^2 + (its relative error)^2

To first order d log e = the share of each cell in e times d theta, so that the fit is a Bayesian
linear regression (ridge), repeated as the shares move. How wide the parts are is not known before:
a table of smooth networks is right to 5 %, one whose derivatives jump off by 5 times in the median
and 14 at most (docs/convergence.md). Of the WIDTHS the one of the largest marginal likelihood is
taken, so that a table that holds is believed after a few plans, and one that does not no more.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autoprec.records import Option
from autoprec.search.costs import Costs, is_all_fp32
from autoprec.search.space import alike_key

NOT_ADDITIVE = (
    0.07  # of log e: random subsets of layers were within 5 % in the median, 25 % at most
)
OWN = 0.5  # of a standard error; plans are measured on the same batches, and share the rest of it
WIDTHS = (0.05, 0.15, 0.5, 1.5)  # standard deviations of a part that all, or whole roles, share
ASSUMED = 0.5  # the width before anything is measured, and the one that is a little preferred
PREFERENCE = 1.0  # log width about ASSUMED: the standard deviation of what is taken before
SHARED = {"all": 1.0, "recipe": 0.3, "role": 0.7, "layer": 0.7, "cell": 0.3}  # in widths
FITS = 12  # Newton steps; 3 to 6 are needed
LARGEST_STEP = 1.0  # of log e in one of them
LEAST = 1e-12  # a gradient error below is none

Floats = NDArray[np.float64]
Options = tuple[Option, ...]


class Seen(NamedTuple):
    """A plan and its measured joint gradient error, with the standard error."""

    options: Options
    grad_error: float
    stderr: float


class Guess(NamedTuple):
    """A plan's joint gradient error, and the standard deviation of its logarithm."""

    grad_error: float
    log_sd: float

    def low(self, deviations: float) -> float:
        """Return the gradient error so many standard deviations below."""
        return self.grad_error * math.exp(-deviations * self.log_sd)


@dataclass(frozen=True)
class _Cells:
    """The table as vectors: each cell's error, and the columns of the parts that it has."""

    costs: Costs

    @cached_property
    def index(self) -> dict[tuple[int, Option], int]:
        """The position of each cell; the activations' is the last."""
        cells = ((i, option) for i, row in enumerate(self.costs.prices) for option in row)
        return {cell: position for position, cell in enumerate(cells)}

    @cached_property
    def table(self) -> Floats:
        """The error of each cell by the table."""
        prices = [self.costs.prices[i][option].grad_error for i, option in self.index]
        return np.array([*prices, self.costs.outside_bf16.grad_error])

    @cached_property
    def _parts(self) -> tuple[NDArray[np.intp], list[tuple[str, float]]]:
        """The columns of each cell (one per kind), and the kind and stated error of each column."""
        columns: dict[tuple[str, object], int] = {}
        stated: list[tuple[str, float]] = []

        def column(kind: str, key: object, error: float = 0.0) -> int:
            if (kind, key) not in columns:
                columns[kind, key] = len(stated)
                stated.append((kind, error))
            return columns[kind, key]

        rows = []
        for (i, option), mean in zip(self.index, self.table, strict=False):
            error = self.costs.prices[i][option].grad_error_stderr / max(mean, LEAST)
            rows.append(
                [
                    column("all", ""),
                    column("recipe", option.recipe or option.precision),
                    column("role", alike_key(self.costs.layers[i])),
                    column("layer", i),
                    column("cell", (i, option), min(error, 1.0)),
                ]
            )
        outside = column("cell", "activations")
        rows.append(
            [column("all", ""), *(column(kind, "none") for kind in SHARED if kind != "all")]
        )
        rows[-1][-1] = outside
        return np.array(rows, dtype=np.intp), stated

    def variances(self, width: float) -> Floats:
        """Return the variance of each part before anything is measured."""
        kinds = self._parts[1]
        return np.array([(SHARED[kind] * width) ** 2 + error**2 for kind, error in kinds])

    def theta(self, parts: Floats) -> Floats:
        """Return the logarithm of each cell's factor."""
        found: Floats = parts[self._parts[0]].sum(axis=1)
        return found

    def of(self, options: Options) -> list[int]:
        """Return the cells of a plan."""
        cells = [self.index[i, option] for i, option in enumerate(options)]
        return cells if is_all_fp32(options) else [*cells, len(self.table) - 1]

    def log_error(self, options: Options, parts: Floats) -> tuple[float, Floats]:
        """Return log e of a plan, and its gradient by the parts: the sums of the shares.

        What islands cost was measured as a whole and stays.
        """
        cells, islands = self.of(options), self.costs.island_error(dict(enumerate(options)))
        errors = self.table[cells] * np.exp(parts[self._parts[0][cells]].sum(axis=1))
        total = float(errors.sum()) + islands
        slope = np.zeros(len(parts))
        if total > LEAST:
            shares = np.repeat(errors / total, len(SHARED))
            np.add.at(slope, self._parts[0][cells].ravel(), shares)
        return math.log(max(total, LEAST)), slope


@dataclass(frozen=True)
class Correction:
    """The table as the measured plans correct it.

    `parts` are the parts of theta; `before` their variances without measurements; `slopes` and
    `inverse` (of the covariance of what was measured) give their covariance with them.
    """

    cells: _Cells
    parts: Floats
    before: Floats
    slopes: Floats
    inverse: Floats

    @property
    def costs(self) -> Costs:
        """The costs with the most likely errors."""
        return self._costs(self.parts)

    def guess(self, options: Options) -> Guess:
        """Return a plan's joint gradient error as far as it is known."""
        level, slope = self.cells.log_error(options, self.parts)
        across = self.slopes @ (self.before * slope)
        variance = slope @ (self.before * slope) - across @ self.inverse @ across
        return Guess(math.exp(level), math.sqrt(max(float(variance), 0.0) + NOT_ADDITIVE**2))

    def drawn(self, random: np.random.Generator) -> Costs:
        """Return the costs with errors drawn from what they may be."""
        sd = np.sqrt(self.before)
        drawn = sd * random.standard_normal(len(sd))
        # a draw from before, moved as far as what was measured moves it (Matheron's rule)
        noise = NOT_ADDITIVE * random.standard_normal(len(self.slopes))
        moved = self.slopes @ drawn + noise
        drawn -= self.before * (self.slopes.T @ (self.inverse @ moved))
        return self._costs(self.parts + drawn)

    def _costs(self, parts: Floats) -> Costs:
        every = self.cells.table * np.exp(self.cells.theta(parts))
        corrected: list[dict[Option, float]] = [{} for _ in self.cells.costs.prices]
        for (i, option), error in zip(self.cells.index, every, strict=False):
            corrected[i][option] = float(error)
        prices = tuple(
            {option: replace(price, grad_error=errors[option]) for option, price in row.items()}
            for row, errors in zip(self.cells.costs.prices, corrected, strict=True)
        )
        outside = replace(self.cells.costs.outside_bf16, grad_error=float(every[-1]))
        return replace(self.cells.costs, prices=prices, outside_bf16=outside)


def fit_correction(costs: Costs, seen: Sequence[Seen]) -> Correction:
    """Return the correction of a table by the plans that were measured."""
    cells = _Cells(costs)
    usable = [one for one in seen if costs.grad_error(one.options) > LEAST]
    usable = [one for one in usable if one.grad_error > LEAST]
    if not usable:
        return _fit(cells, usable, ASSUMED)[0]
    fits = [_fit(cells, usable, width) for width in WIDTHS]
    return max(fits, key=lambda fit: fit[1])[0]


def _fit(cells: _Cells, seen: Sequence[Seen], width: float) -> tuple[Correction, float]:
    """Return the most likely correction of parts this wide, and how likely the width is."""
    before = cells.variances(width)
    parts = np.zeros(len(before))
    noise = np.array([NOT_ADDITIVE**2 + (OWN * s.stderr / s.grad_error) ** 2 for s in seen])
    measured = np.array([math.log(one.grad_error) for one in seen])
    plans = [one.options for one in seen]
    slopes: Floats = np.zeros((0, len(before)))
    inverse: Floats = np.zeros((0, 0))
    target: Floats = np.zeros(0)
    level: Floats = np.zeros(0)
    for _ in range(FITS if plans else 0):
        rows = [cells.log_error(plan, parts) for plan in plans]
        level, slopes = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
        # linear about the present parts: target = slopes @ parts + noise
        target = measured - level + slopes @ parts
        covariance = (slopes * before) @ slopes.T + np.diag(noise)
        inverse = np.asarray(np.linalg.inv(covariance), dtype=np.float64)
        step = before * (slopes.T @ (inverse @ target)) - parts
        largest = float(np.abs(slopes @ step).max())
        parts = parts + step * min(1.0, LARGEST_STEP / max(largest, LEAST))
        if largest < 1e-3:
            break
    _, log_det = np.linalg.slogdet(inverse) if plans else (1.0, 0.0)
    fitting = 0.5 * (log_det - float(target @ inverse @ target))
    preference = -0.5 * (math.log(width / ASSUMED) / PREFERENCE) ** 2
    return Correction(cells, parts, before, slopes, inverse), fitting + preference
