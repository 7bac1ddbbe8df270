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

Errors that are transferred from a proxy lie on lines over the depth, so that very many plans are
nearly alike and the last 0.05 % cannot be proven in an hour. So no program looks at more than
MOST_NODES, and what is then not proven is in the solution's `slack` and in the bounds; the front's
points are proven to FRONT_GAP alone.
"""

import copy
import ctypes
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_array

ROUNDING = 1e-9  # relative; sums in another order must not decide what fits or what wins
SCALE = 1e3  # costs and limits are in parts of it, which HiGHS keeps to 1e-6
TINY = 1e-250  # a limit below it is none at all: nothing is in parts of it
MARGIN = 2e-6  # relative; where it scales a row so that a plan above the limit passes
TIE = 1e-6  # of the time, for the largest gradient error: of plans as fast the least one is taken
FIRST_GAP = 0.1  # of SCALE; most plans are this close to the linear program's value
MOST_SOLVES = 20  # of `soonest`, which needs 2 to 5
COMPLETE_PLANS = 1_000  # up to here the whole front is listed
FRONT_POINTS = 8  # else, so many budgets from the fastest plan's gradient error downwards,
FRONT_RANGE = 1e-3  # the least at this share of it,
FRONT_GAP = 1e-3  # each of them at most this much slower than the fastest of its budget
MOST_NODES = 500  # of branch and bound, 2 s (most need one); the same on every machine
NEAR_BUDGET = (0.5, 0.65, 0.8, 1.25)  # and these shares of the budget

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]
Plan = TypeVar("Plan")
_Relaxed = tuple[Any, Floats, csr_array, Floats, Floats]  # Any: scipy's result has no type


class Item(NamedTuple):
    """What a group can be: its time, gradient error and bytes."""

    ms: float
    grad_error: float
    memory: float = 0.0
    is_16_bit: bool = True
    hiding_ms: float = 0.0  # of communication, behind its compute


class Outside(NamedTuple):
    """What every plan has outside its groups; `hidable_ms` of communication wait for compute."""

    ms: float = 0.0
    grad_error: float = 0.0
    memory: float = 0.0
    hidable_ms: float = 0.0


@dataclass(frozen=True)
class Solution:
    """One item index per group, and the sums with what is outside.

    `slack`: what it was chosen for may be lower by at most so many ms in another plan.
    """

    picks: tuple[int, ...]
    ms: float
    grad_error: float
    memory: float
    slack: float = 0.0

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
        self.outside = outside or Outside()
        self.memory = memory
        sizes = [len(group) for group in groups]
        self._plans = math.prod(sizes)
        items = np.array([item for group in groups for item in group], dtype=np.float64)
        self._ms, self._error, self._bytes, self._is_16_bit, self._hiding = items.T
        self._ends = [0, *np.cumsum(sizes).tolist()]
        self._starts = np.array(self._ends[:-1], dtype=np.intp)
        # one variable per item, and the last: the wait for communication that no compute hides
        group_of = np.repeat(np.arange(len(sizes)), sizes)
        self._one_each = csr_array(
            (np.ones(len(items)), (group_of, np.arange(len(items)))),
            shape=(len(sizes), len(items) + 1),
        )
        self._least_error = self.outside.grad_error + self._sum_of_least(self._error)
        self._most_error = self.outside.grad_error - self._sum_of_least(-self._error)
        least_ms = max(self.outside.ms, 0.0) + self._sum_of_least(self._ms)
        self._tie_price = TIE * least_ms / max(self._most_error, 1e-300)

    def soonest(self, budget: float = math.inf) -> tuple[Solution, float] | None:
        """Return the plan of least time to loss, and a proven bound of the step time of any."""
        price = self._tie_price
        found = best = self.minimise(price, budget)
        if found is None or best is None:
            return None
        most_error = max(min(budget, self._most_error), found.grad_error)
        bound_ms = found.ms - found.slack - price * (most_error - found.grad_error)
        lines: list[tuple[float, float]] = []  # (price, z): T >= z - price * g for every plan
        for _ in range(MOST_SOLVES):
            lines.append((price, found.ms + price * found.grad_error - found.slack))
            ms, error = self._lowest_corner(lines)
            left = ROUNDING * best.time_to_loss_ms + found.slack * (1.0 + most_error)
            if ms * (1.0 + error) >= best.time_to_loss_ms - left:
                break
            price = ms / (1.0 + error)  # the product's slope at the corner
            if (found := self.minimise(price, budget)) is None:
                break
            best = min(best, found, key=lambda plan: (plan.time_to_loss_ms, plan.grad_error))
        return best, bound_ms

    def front(self, *, near: float = math.inf) -> tuple[Solution, ...]:
        """Return plans of which no other is faster with as little error, by increasing error.

        All of them when there are at most COMPLETE_PLANS plans; else the answers to FRONT_POINTS
        budgets and NEAR_BUDGET, within FRONT_GAP.
        """
        fastest = self.minimise(self._tie_price, math.inf)
        found: list[Solution] = []
        if self._plans <= COMPLETE_PLANS:  # one by one: HiGHS errs at limits just below a plan
            items = [range(start, stop) for start, stop in itertools.pairwise(self._ends)]
            plans = (np.array(chosen, dtype=np.intp) for chosen in itertools.product(*items))
            every = (self.solution(plan) for plan in plans if self._is_16_bit[plan].any())
            found = [one for one in every if one.memory <= self.memory * (1.0 + ROUNDING)]
        elif fastest:
            most = fastest.grad_error
            budgets = [math.inf, *(share * near for share in NEAR_BUDGET if share * near < most)]
            if most > 0.0:
                least = max(self._least_error, FRONT_RANGE * most)
                steps = np.geomspace(least, most, FRONT_POINTS, endpoint=False)
                budgets += [self._least_error, *steps.tolist()]
            points = (self.minimise(self._tie_price, budget, FRONT_GAP) for budget in budgets)
            found = [point for point in points if point]
        return tuple(unbeaten(found, lambda plan: (plan.grad_error, plan.ms)))

    def minimise(self, price: float, budget: float, within: float = 0.0) -> Solution | None:
        """Return the plan of least ms + price * grad_error within a budget, if there is any.

        `within` is how far above the least it may be, relative to it.
        """
        above = 1.0 + ROUNDING
        for margin in (0.0, MARGIN):
            limits = (budget * (1.0 - margin), self.memory * (1.0 - margin))
            found = self._minimise(price, *limits, within)
            if found is None:
                break
            if found.grad_error <= budget * above and found.memory <= self.memory * above:
                return found
        return None

    def nearly(
        self, price: float, budget: float, errors: Floats, outside_error: float
    ) -> Indices | None:
        """Return the items of a plan near that of least ms + price * error, with other errors.

        The linear program's, which has one or two groups in parts of items: their most precise.
        """
        other = copy.copy(self)
        other._error = errors
        other.outside = self.outside._replace(grad_error=outside_error)
        if (found := other._relaxed(price, budget, self.memory)) is None:
            return None
        ranked = np.where(found[0].x[:-1] > 1e-6, errors, math.inf)
        return np.array([a + ranked[a:b].argmin() for a, b in itertools.pairwise(self._ends)])

    def solution(self, chosen: Indices) -> Solution:
        """Return the plan of these items, by their positions among all."""
        chosen, outside = chosen[chosen < len(self._ms)], self.outside
        wait_ms = max(outside.hidable_ms - math.fsum(self._hiding[chosen]), 0.0)
        return Solution(
            picks=tuple(int(item) for item in chosen - self._starts),
            ms=max(math.fsum([outside.ms, wait_ms, *self._ms[chosen]]), 0.0),
            grad_error=math.fsum([outside.grad_error, *self._error[chosen]]),
            memory=math.fsum([outside.memory, *self._bytes[chosen]]),
        )

    def _relaxed(self, price: float, budget: float, memory: float) -> _Relaxed | None:
        """Return the linear program's answer, its costs, rows, their limits and upper bounds."""
        if (limits := self._limits(budget, memory)) is None:
            return None
        rows, most, upper = limits
        cost = np.append(self._ms + price * self._error, 1.0)
        least = self._sum_of_least(cost[:-1]) + max(self.outside.hidable_ms, 0.0)
        cost *= SCALE / max(least, float(cost.max()) / SCALE)
        ones, bounds = np.ones(len(self._starts)), np.column_stack([np.zeros(len(cost)), upper])
        relaxed = linprog(  # type: ignore[call-overload]  # takes sparse rows; its stubs do not
            cost, A_ub=rows, b_ub=most, A_eq=self._one_each, b_eq=ones, bounds=bounds
        )
        return None if relaxed.x is None else (relaxed, cost, rows, most, upper)

    def _minimise(
        self, price: float, budget: float, memory: float, within: float
    ) -> Solution | None:
        if (program := self._relaxed(price, budget, memory)) is None:
            return None
        relaxed, cost, rows, most, upper = program
        # reduced cost: by how much at least a plan with that item is above the relaxed value
        duals = self._one_each.T @ relaxed.eqlin.marginals + rows.T @ relaxed.ineqlin.marginals
        reduced = np.where(upper > 0.0, cost - duals, math.inf)
        gap = FIRST_GAP
        while True:
            core = np.flatnonzero(reduced <= gap)
            constraints = [
                LinearConstraint(self._one_each[:, core], 1.0, 1.0),
                LinearConstraint(rows[:, core], -np.inf, most),
            ]
            is_all = len(core) == np.count_nonzero(upper)
            # HiGHS's presolve may call a program infeasible when a limit is just below a plan.
            tries: list[Any] = [{"node_limit": MOST_NODES}, {"presolve": False}]  # Any: by scipy
            for options in tries[: 1 + is_all]:
                with _silenced():
                    answer = milp(
                        cost[core],
                        integrality=(core < len(self._ms)).astype(np.int64),
                        bounds=Bounds(0.0, upper[core]),
                        constraints=constraints,
                        options={"mip_rel_gap": within, **options},  # type: ignore[arg-type]
                    )
                if answer.x is not None:
                    break
            above = math.inf if answer.x is None else answer.fun - relaxed.fun
            if above <= gap or is_all:  # what was left out could not lead to less
                if answer.x is None:
                    return None
                is_proven = answer.status == 0 and within == 0.0
                left = 0.0 if is_proven else (answer.fun - answer.mip_dual_bound) / cost[-1]
                return replace(self.solution(core[answer.x > 0.5]), slack=max(left, 0.0))
            gap = min(above * (1.0 + ROUNDING), 10.0 * gap)

    def _limits(self, budget: float, memory: float) -> tuple[csr_array, Floats, Floats] | None:
        """Return rows, their limits in parts of SCALE, and the most of each variable.

        That is 0 for the items that do not fit on their own. None where what is outside does not.
        """
        outside = self.outside
        rows: list[Floats] = []
        most: list[float] = []
        upper = np.full(len(self._ms) + 1, math.inf)
        for values, beside, limit in (
            (self._error, outside.grad_error, budget),
            (self._bytes, outside.memory, memory),
        ):
            left = limit * (1.0 + ROUNDING) - beside
            if left < 0.0:
                return None
            if math.isfinite(limit):
                unit = SCALE / limit if limit > TINY else 0.0
                upper[:-1][values > left] = 0.0
                rows.append(np.append(np.where(values <= left, values * unit, 0.0), 0.0))
                most.append((limit - beside) * unit)
        if outside.hidable_ms > 0.0:  # wait >= hidable - sum of hiding
            unit = SCALE / outside.hidable_ms
            rows.append(np.append(-unit * self._hiding, -unit))
            most.append(-SCALE)
        rows.append(np.append(-self._is_16_bit, 0.0))
        most.append(-1.0)
        return csr_array(np.array(rows)), np.array(most), upper

    def _lowest_corner(self, lines: Sequence[tuple[float, float]]) -> tuple[float, float]:
        """Return (T, g) of the least product among the corners of what the lines leave open."""
        errors = [self._least_error]
        for (price, least), (other, beside) in itertools.pairwise(sorted(lines)):
            if price < other:
                errors.append(max((beside - least) / (other - price), self._least_error))
        corners = [(max(least - price * g for price, least in lines), g) for g in errors]
        return min(corners, key=lambda corner: corner[0] * (1.0 + corner[1]))

    def _sum_of_least(self, values: Floats) -> float:
        return float(np.minimum.reduceat(values, self._starts).sum())


def unbeaten(plans: Iterable[Plan], cost: Callable[[Plan], tuple[float, ...]]) -> list[Plan]:
    """Return the plans of which no other costs as little in every way, by cost."""
    kept: list[tuple[tuple[float, ...], Plan]] = []
    for own, plan in sorted(((cost(plan), plan) for plan in plans), key=lambda pair: pair[0]):
        most = [value * (1.0 + ROUNDING) for value in own]
        if not any(all(a <= b for a, b in zip(each, most, strict=True)) for each, _ in kept):
            kept.append((own, plan))
    return [plan for _, plan in kept]


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
