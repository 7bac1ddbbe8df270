"""The exact choice over the tables: a multiple-choice knapsack, solved by HiGHS through scipy.

    minimise    T (1 + g)      time to loss: g extra steps are needed per step
    T, g        step time and gradient error: those outside the groups + sums over one item of each
    subject to  g <= budget,  memory <= limit,  at least one 16-bit item

The product is not linear but quasi-concave in (T, g): its least value over all plans is at a corner
of their convex hull, which a linear solve with the right price of g finds: minimise T + price * g.
Such a solve with the least value z also bounds T from below, by the line T >= z - price * g.
`Knapsack.soonest` takes its next price from the slope of the product at the lowest corner of these
lines, until the product there is no lower than that of the best plan found: no plan is better.

Each linear solve is a linear program first. Its reduced costs say which items can be in a plan that
is within `gap` of its value; the integer program has these only, a quarter of them.
"""

import ctypes
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

ROUNDING = 1e-9  # relative; sums in another order must not decide what fits or what wins
SCALE = 1e3  # costs and limits are in parts of it, which HiGHS keeps to 1e-6
MARGIN = 2e-6  # relative; where it scales a row so that a plan above the limit passes
TIE = 1e-6  # of the time, for the largest gradient error: of plans as fast the least one is taken
FIRST_GAP = 0.1  # of SCALE; most plans are this close to the linear program's value
MOST_SOLVES = 20  # of `soonest`, which needs 2 to 5
COMPLETE_PLANS = 1_000  # up to here the whole front is listed
FRONT_POINTS = 8  # else, so many budgets from the fastest plan's gradient error downwards,
FRONT_RANGE = 1e-3  # the least at this share of it,
NEAR_BUDGET = (0.5, 0.65, 0.8, 1.25)  # and these shares of the budget

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
Bools = NDArray[np.bool_]


class Item(NamedTuple):
    """What a group can be: its time, gradient error and bytes.

    `hiding_ms` is how much communication hides behind its compute.
    """

    ms: float
    grad_error: float
    memory: float = 0.0
    is_16_bit: bool = True
    hiding_ms: float = 0.0


class Outside(NamedTuple):
    """What every plan has outside its groups; `hidable_ms` of communication wait for compute."""

    ms: float = 0.0
    grad_error: float = 0.0
    memory: float = 0.0
    hidable_ms: float = 0.0


@dataclass(frozen=True)
class Solution:
    """One item index per group, and the sums with what is outside."""

    picks: tuple[int, ...]
    ms: float
    grad_error: float
    memory: float

    @property
    def time_to_loss_ms(self) -> float:
        """The objective."""
        return self.ms * (1.0 + self.grad_error)


class Knapsack:
    """One item of every group, within a memory limit."""

    def __init__(
        self,
        groups: Sequence[Sequence[Item]],
        outside: Outside | None = None,
        *,
        memory: float = math.inf,
    ) -> None:
        self.groups = groups
        self.outside = outside or Outside()
        self.memory = memory
        sizes = [len(group) for group in groups]
        items = np.array([item for group in groups for item in group], dtype=np.float64)
        self._ms, self._error, self._bytes, self._is_16_bit, self._hiding = items.T
        self._starts = np.cumsum([0, *sizes[:-1]])
        group_of = np.repeat(np.arange(len(groups)), sizes)
        # one variable per item, and the last: the wait for communication that no compute hides
        self._one_each = csr_array(
            (np.ones(len(group_of)), (group_of, np.arange(len(group_of)))),
            shape=(len(groups), len(group_of) + 1),
        )
        self._least_error = self.outside.grad_error + self._sum_of_least(self._error)
        self._most_error = self.outside.grad_error - self._sum_of_least(-self._error)
        least_ms = max(self.outside.ms, 0.0) + self._sum_of_least(self._ms)
        self._tie_price = TIE * least_ms / max(self._most_error, 1e-300)

    def soonest(self, budget: float = math.inf) -> tuple[Solution, float] | None:
        """Return the plan of least time to loss, and a proven bound of the step time of any."""
        best = fastest = self.minimise(self._tie_price, budget)
        if best is None or fastest is None:
            return None
        most_error = min(budget, self._most_error)
        bound_ms = _line(fastest, self._tie_price, at=max(most_error, fastest.grad_error))
        lines = [(self._tie_price, fastest)]
        for _ in range(MOST_SOLVES if fastest.ms > 0.0 else 0):
            ms, error = self._lowest_corner(lines)
            if ms * (1.0 + error) >= best.time_to_loss_ms * (1.0 - ROUNDING):
                break
            price = ms / (1.0 + error)  # the product's slope at the corner
            found = self.minimise(price, budget)
            if found is None:
                break
            lines.append((price, found))
            best = min(best, found, key=lambda plan: (plan.time_to_loss_ms, plan.grad_error))
        return best, bound_ms

    def front(self, *, near: float = math.inf) -> tuple[Solution, ...]:
        """Return plans of which no other is faster with as little error, by increasing error.

        All of them when there are at most COMPLETE_PLANS plans (but those that are faster than the
        next by less than TIE); else the exact answers to FRONT_POINTS budgets and NEAR_BUDGET.
        """
        found = [fastest] if (fastest := self.minimise(self._tie_price, math.inf)) else []
        if not found or math.prod(len(group) for group in self.groups) <= COMPLETE_PLANS:
            while found and found[-1].grad_error > self._least_error:
                below = found[-1].grad_error * (1.0 - 4.0 * ROUNDING)
                point = self.minimise(self._tie_price, below)
                if point is None or point.grad_error >= found[-1].grad_error:
                    break
                found.append(point)
            return undominated(found)
        most = found[0].grad_error
        budgets = [share * near for share in NEAR_BUDGET if share * near < most]
        if most > 0.0:
            least = max(self._least_error, FRONT_RANGE * most)
            steps = np.geomspace(least, most, FRONT_POINTS, endpoint=False)
            budgets += [self._least_error, *steps.tolist()]
        for budget in budgets:
            if (point := self.minimise(self._tie_price, budget)) is not None:
                found.append(point)
        return undominated(found)

    def minimise(self, price: float, budget: float) -> Solution | None:
        """Return the plan of least ms + price * grad_error within a budget, if there is any."""
        for margin in (0.0, MARGIN):
            found = self._minimise(price, budget * (1.0 - margin), self.memory * (1.0 - margin))
            if found is None or self._fits(found, budget):
                return found
        return None

    def _fits(self, plan: Solution, budget: float) -> bool:
        above = 1.0 + ROUNDING
        return plan.grad_error <= budget * above and plan.memory <= self.memory * above

    def _minimise(self, price: float, budget: float, memory: float) -> Solution | None:
        limits = self._limits(budget, memory)
        if limits is None:
            return None
        rows, most, is_open = limits
        cost = np.append(self._ms + price * self._error, 1.0)
        least = self._sum_of_least(cost[:-1]) + max(self.outside.hidable_ms, 0.0)
        cost *= SCALE / max(least, float(cost.max()) / SCALE)
        upper = np.append(np.where(is_open, np.inf, 0.0), np.inf)
        relaxed = linprog(  # type: ignore[call-overload]  # takes sparse rows; its stubs do not
            cost,
            A_ub=rows,
            b_ub=most,
            A_eq=self._one_each,
            b_eq=np.ones(len(self.groups)),
            bounds=np.column_stack([np.zeros(len(cost)), upper]),
        )
        if relaxed.x is None:
            return None
        # reduced cost: by how much at least a plan with that item is above the relaxed value
        duals = self._one_each.T @ relaxed.eqlin.marginals + rows.T @ relaxed.ineqlin.marginals
        reduced = np.where(upper > 0.0, cost - duals, np.inf)
        gap = FIRST_GAP
        while True:
            core = np.flatnonzero(reduced <= gap)
            answer = self._solve_core(cost, rows, most, core)
            above = math.inf if answer is None else answer[1] - relaxed.fun
            is_all = len(core) == np.isfinite(reduced).sum()
            if above <= gap or is_all:  # what was left out could not lead to less
                return None if answer is None else self._solution(answer[0])
            gap = min(above * (1.0 + ROUNDING), 10.0 * gap)

    def _solve_core(
        self, cost: Floats, rows: csr_array, most: Floats, core: Indices
    ) -> tuple[Indices, float] | None:
        """Return the items of the best plan that has items of the core only, and its cost."""
        is_item = core < len(cost) - 1
        with _silenced():
            answer = milp(
                cost[core],
                integrality=is_item.astype(np.int64),
                bounds=Bounds(0.0, np.where(is_item, 1.0, np.inf)),
                constraints=[
                    LinearConstraint(self._one_each[:, core], 1.0, 1.0),
                    LinearConstraint(rows[:, core], -np.inf, most),
                ],
                options={"mip_rel_gap": 0.0},
            )
        if answer.x is None:
            return None
        return core[is_item & (answer.x > 0.5)], float(answer.fun)

    def _limits(self, budget: float, memory: float) -> tuple[csr_array, Floats, Bools] | None:
        """Return rows, their upper limits in parts of SCALE, and the items that fit on their own.

        None where what is outside does not fit.
        """
        outside = self.outside
        rows, most, is_open = [], [], np.ones(len(self._ms), dtype=np.bool_)
        for values, beside, limit in (
            (self._error, outside.grad_error, budget),
            (self._bytes, outside.memory, memory),
        ):
            left = limit * (1.0 + ROUNDING) - beside
            if left < 0.0:
                return None
            if math.isfinite(limit):
                unit = SCALE / limit if limit > 0.0 else 0.0
                is_open &= values <= left
                rows.append([*np.where(is_open, values * unit, 0.0), 0.0])
                most.append((limit - beside) * unit)
        if outside.hidable_ms > 0.0:  # wait >= hidable - sum of hiding
            unit = SCALE / outside.hidable_ms
            rows.append([*(-unit * self._hiding), -unit])
            most.append(-SCALE)
        rows.append([*-self._is_16_bit, 0.0])
        most.append(-1.0)
        return csr_array(np.array(rows)), np.array(most), is_open

    def _solution(self, chosen: Indices) -> Solution:
        outside = self.outside
        hidden_ms = math.fsum(self._hiding[chosen])
        wait_ms = max(outside.hidable_ms - hidden_ms, 0.0)
        return Solution(
            picks=tuple(int(item) for item in chosen - self._starts),
            ms=max(math.fsum([outside.ms, wait_ms, *self._ms[chosen]]), 0.0),
            grad_error=math.fsum([outside.grad_error, *self._error[chosen]]),
            memory=math.fsum([outside.memory, *self._bytes[chosen]]),
        )

    def _lowest_corner(self, lines: Sequence[tuple[float, Solution]]) -> tuple[float, float]:
        """Return (T, g) of the least product among the corners of what the lines leave open."""
        steepest_first = sorted(lines, key=lambda line: -line[0])
        errors = [self._least_error]
        for (price, plan), (other, beside) in itertools.pairwise(steepest_first):
            if price > other:
                meet = (_line(plan, price, at=0.0) - _line(beside, other, at=0.0)) / (price - other)
                errors.append(max(meet, self._least_error))
        corners = [(max(_line(p, price, at=g) for price, p in lines), g) for g in errors]
        return min(corners, key=lambda corner: corner[0] * (1.0 + corner[1]))

    def _sum_of_least(self, values: Floats) -> float:
        return float(np.minimum.reduceat(values, self._starts).sum())


def undominated(points: Sequence[Solution]) -> tuple[Solution, ...]:
    """Return the points that none of the others beats in both time and error, by its increase."""
    kept: list[Solution] = []
    for point in sorted(points, key=lambda point: (point.grad_error, point.ms)):
        if not kept or point.ms < kept[-1].ms * (1.0 - ROUNDING):
            kept.append(point)
    return tuple(kept)


def _line(plan: Solution, price: float, *, at: float) -> float:
    """Return the bound of T at some error that a plan of least T + price * error gives."""
    return plan.ms + price * (plan.grad_error - at)


@contextmanager
def _silenced() -> Iterator[None]:
    """Keep HiGHS 1.12 (scipy 1.17) from printing a line of its own to the process's stdout.

    It ignores every option: https://github.com/ERGO-Code/HiGHS/issues/2783.
    """
    libc = ctypes.CDLL(None)
    libc.fflush(None)
    stdout = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        libc.fflush(None)
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)
