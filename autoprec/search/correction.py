"""What measured plans say of the table: a factor on every gradient error in it, with its error.

A cell is a layer in an option, or the activations' dtype. A plan's joint error is taken to be

    e(plan) = sum over its cells of table * exp(theta)
    theta   = everywhere's + its recipe's + its role's + its layer's + its own part

with independent normal parts of mean 0 (the table is right), and its logarithm is seen with the
error of the measurement and of adding up at all:

    log e_measured = log e(plan) + noise,    noise^2 = APART^2 + (its relative error)^2

To first order d log e = the share of each cell in e times d theta, so that the fit is a Bayesian
linear regression (ridge), repeated as the shares move. How wide the parts are is not known before:
a table of smooth networks is right to 5 %, one whose derivatives jump off by 5 times in the median
and 14 at most (docs/convergence.md). Of the WIDTHS the one of the largest marginal likelihood is
taken, so that a table that holds is believed after a few plans, and one that does not no more.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from autoprec.records import Option, Sensitivity
from autoprec.search.costs import Costs, is_all_fp32
from autoprec.search.problem import Options
from autoprec.search.solver import Floats, Indices
from autoprec.search.space import alike_key

# Of log e, what adding up leaves: the sum of the best single cells misses all plans of seven small
# networks with kinks by 8 to 14 %, of smooth ones by 5 %.
APART = (0.13, 0.07)
OWN = 0.5  # of a standard error; plans are measured on the same batches, and share the rest of it
WIDTHS = (0.05, 0.15, 0.5, 1.5)  # standard deviations of a part that all, or whole roles, share
ASSUMED = 0.5  # the width before anything is measured, and the one that is a little preferred
PREFERENCE = 1.0  # log width about ASSUMED: the standard deviation of what is taken before
SHARED = {"all": 1.0, "recipe": 0.3, "role": 0.7, "layer": 0.7, "cell": 0.3}  # in widths
CANCELS = 2.0  # the sum over the joint error, from which errors may cancel
FITS = 12  # Newton steps; 3 to 6 are needed
LARGEST_STEP = 1.0  # of log e in one of them
LEAST = 1e-12  # a gradient error below is none


class Seen(NamedTuple):
    """A plan and its measured joint gradient error, with the standard error.

    `overlap` is what several layers' kinks and choices, counted once, are less than the sum.
    """

    options: Options
    grad_error: float
    stderr: float
    overlap: float = 0.0


class Guess(NamedTuple):
    """A plan's joint gradient error, and the standard deviation of its logarithm."""

    grad_error: float
    log_sd: float

    def high(self, deviations: float) -> float:
        """Return the gradient error so many standard deviations above."""
        return self.grad_error * math.exp(deviations * self.log_sd)


@dataclass(frozen=True)
class Cells:
    """The table as vectors: each cell's error, and the columns of the parts that it has.

    The last cell is the activations'.
    """

    costs: Costs

    @cached_property
    def index(self) -> tuple[Mapping[Option, int], ...]:
        """The position of each layer's cells."""
        counter = itertools.count()
        return tuple({option: next(counter) for option in row} for row in self.costs.prices)

    @cached_property
    def table(self) -> Floats:
        """The error of each cell by the table."""
        prices = [price.grad_error for row in self.costs.prices for price in row.values()]
        return np.array([*prices, self.costs.outside_bf16.grad_error])

    @cached_property
    def _columns(self) -> tuple[Indices, list[tuple[str, float]]]:
        """The columns of each cell's parts, one per kind; each column's kind and stated error."""
        columns: dict[tuple[str, object], int] = {}
        stated: list[tuple[str, float]] = []

        def column(kind: str, key: object, error: float = 0.0) -> int:
            if (kind, key) not in columns:
                columns[kind, key] = len(stated)
                stated.append((kind, error))
            return columns[kind, key]

        rows: list[list[int]] = []
        for i, row in enumerate(self.costs.prices):
            role = alike_key(self.costs.layers[i])
            for option, price in row.items():
                error = price.grad_error_stderr / max(price.grad_error, LEAST)
                keys = ("", option.recipe or option.precision, role, i, len(rows))
                errors = (0.0, 0.0, 0.0, 0.0, min(error, 1.0))
                rows.append(list(map(column, SHARED, keys, errors)))
        rows.append([column(kind, "" if kind == "all" else "activations") for kind in SHARED])
        return np.array(rows, dtype=np.intp), stated

    def variances(self, width: float) -> Floats:
        """Return the variance of each part before anything is measured."""
        kinds = self._columns[1]
        return np.array([(SHARED[kind] * width) ** 2 + error**2 for kind, error in kinds])

    def of(self, options: Options) -> Indices:
        """Return the cells of a plan."""
        cells = [row[option] for row, option in zip(self.index, options, strict=True)]
        outside = () if is_all_fp32(options) else (len(self.table) - 1,)
        return np.array([*cells, *outside], dtype=np.intp)

    def errors(self, parts: Floats) -> Floats:
        """Return each cell's error with these parts."""
        found: Floats = self.table * np.exp(parts[self._columns[0]].sum(axis=1))
        return found

    def log_error(self, cells: Indices, errors: Floats, islands: float) -> tuple[float, Floats]:
        """Return log e of a plan, and its gradient by the parts: the sums of the shares.

        What islands cost was measured as a whole and stays.
        """
        own = errors[cells]
        total = max(float(own.sum()) + islands, LEAST)
        weights = np.repeat(own / total, len(SHARED))
        columns, kinds = self._columns
        slope = np.zeros(len(kinds))
        slope += np.bincount(columns[cells].ravel(), weights, len(slope))
        return math.log(total), slope


@dataclass(frozen=True)
class Correction:
    """The table as the measured plans correct it.

    `parts` are the parts of theta; `before` their variances without measurements; `slopes` and
    `inverse` (of the covariance of what was measured) give their covariance with them; `apart` is
    the standard deviation of what adding up leaves.
    """

    cells: Cells
    parts: Floats
    before: Floats
    slopes: Floats
    inverse: Floats
    apart: float

    @cached_property
    def errors(self) -> Floats:
        """The most likely error of each cell."""
        return self.cells.errors(self.parts)

    @cached_property
    def costs(self) -> Costs:
        """The costs where no plan is measured: errors as corrected, but none below the table."""
        errors = np.maximum(self.cells.table, self.errors).tolist()
        costs, index = self.cells.costs, self.cells.index
        prices = (
            {o: replace(price, grad_error=errors[own[o]]) for o, price in row.items()}
            for own, row in zip(index, costs.prices, strict=True)
        )
        outside = replace(costs.outside_bf16, grad_error=errors[-1])
        return replace(costs, prices=tuple(prices), outside_bf16=outside)

    @cached_property
    def _weighted(self) -> Floats:
        return self.slopes * self.before

    def guess(self, options: Options) -> Guess:
        """Return a plan's joint gradient error as far as it is known."""
        islands = self.cells.costs.island_error(dict(enumerate(options)))
        return self.guess_cells(self.cells.of(options), islands)

    def guess_cells(self, cells: Indices, islands: float) -> Guess:
        """Return the joint gradient error of a plan by its cells."""
        level, slope = self.cells.log_error(cells, self.errors, islands)
        across = self._weighted @ slope
        variance = slope @ (self.before * slope) - across @ self.inverse @ across
        return Guess(math.exp(level), math.sqrt(max(float(variance), 0.0) + self.apart**2))

    def drawn(self, random: np.random.Generator) -> Floats:
        """Return errors of the cells, drawn from what they may be."""
        sd = np.sqrt(self.before)
        drawn = sd * random.standard_normal(len(sd))
        # a draw from before, moved as far as what was measured moves it (Matheron's rule)
        noise = self.apart * random.standard_normal(len(self.slopes))
        moved = self.slopes @ drawn + noise
        drawn -= self.before * (self.slopes.T @ (self.inverse @ moved))
        return self.cells.errors(self.parts + drawn)


def seen_beside(costs: Costs, sensitivity: Sensitivity) -> tuple[Seen, ...]:
    """Return the plans that the table was checked with, where all their cells have a price."""
    return tuple(
        Seen(one.options, e.mean, e.stderr or 0.0, one.overlap * share)
        for one in sensitivity.joint
        if all(o in row for o, row in zip(one.options, costs.prices, strict=True))
        for share in [costs.counted_share(one.options)]
        for e in [one.grad_error.scaled(share)]
    )


def telling(costs: Costs, seen: Sequence[Seen]) -> tuple[Seen, ...]:
    """Return the plans among those of the table's check that say something of others.

    None whose error is far below its sum: the table is too high, or errors cancel, which those of
    fewer layers need not do. One measurement does not tell which, so the table stands.
    """
    return tuple(
        one
        for one in seen
        if costs.grad_error(one.options) - one.overlap <= CANCELS * one.grad_error
    )


def fit_correction(cells: Cells, seen: Sequence[Seen]) -> Correction:
    """Return the correction of a table by the plans that were measured."""
    costs = cells.costs
    usable = [
        (cells.of(one.options), costs.island_error(dict(enumerate(one.options))), one)
        for one in seen
        if one.grad_error > LEAST and costs.grad_error(one.options) > LEAST
    ]
    if not usable:
        return _fit(cells, usable, ASSUMED, APART[0])[0]
    fits = [_fit(cells, usable, width, apart) for width in WIDTHS for apart in APART]
    return max(fits, key=lambda fit: fit[1])[0]


def _fit(
    cells: Cells, seen: Sequence[tuple[Indices, float, Seen]], width: float, apart: float
) -> tuple[Correction, float]:
    """Return the most likely correction of parts this wide, and how likely the widths are."""
    before = cells.variances(width)
    parts = np.zeros(len(before))
    noise = np.array([apart**2 + (OWN * s.stderr / s.grad_error) ** 2 for _, _, s in seen])
    measured = np.array([math.log(one.grad_error) for _, _, one in seen])
    slopes: Floats = np.zeros((0, len(before)))
    inverse: Floats = np.zeros((0, 0))
    target: Floats = np.zeros(0)
    for _ in range(FITS if seen else 0):
        errors = cells.errors(parts)
        rows = [cells.log_error(own, errors, islands) for own, islands, _ in seen]
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
    _, log_det = np.linalg.slogdet(inverse) if seen else (1.0, 0.0)
    fitting = 0.5 * (log_det - float(target @ inverse @ target))
    preference = -0.5 * (math.log(width / ASSUMED) / PREFERENCE) ** 2
    return Correction(cells, parts, before, slopes, inverse, apart), fitting + preference
