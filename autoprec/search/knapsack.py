"""The multiple-choice knapsack: one item from every unit, the smallest time within a budget of e.

    minimise  sum ms    subject to  sum e <= budget,  sum memory <= limit,  one item per unit

Solved exactly in three steps, each of which only ever throws away what is proven useless:

    bound    for any prices a, b >= 0 of e and memory the Lagrangian
             sum over units of min(ms + a e + b memory) - a budget - b limit
             is at most the optimum; a and b are found by binary search, and plans met on the way
             that fit are upper bounds
    fix      an item whose own Lagrangian cost lifts the bound above the upper bound cannot be in
             an optimal plan
    extend   units are added one by one to a set of partial plans; partial plans that are dominated
             or whose bound is above the upper bound are dropped

Few units survive the second step, so hundreds of layers take milliseconds. Were the partial plans
to outgrow MOST_STATES (never seen), the best ones are kept and the answer comes with the Lagrangian
bound instead of a proof: `bound_ms` says which.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autoprec.search.partial_plans import extend
from autoprec.search.relaxation import (
    ROUNDING,
    Indices,
    Item,
    Limits,
    Table,
    hull_plans,
    make_table,
    relax,
    rounding,
)

COMPLETE_PLANS = 20_000  # up to here the whole front is listed (3^9 = 19,683)
SWEEP_POINTS = 24


@dataclass(frozen=True)
class Solution:
    """One item index per unit, their sums, and the proven lower bound of the time."""

    picks: tuple[int, ...]
    ms: float
    grad_error: float
    memory: float
    bound_ms: float


def solve(units: Sequence[Sequence[Item]], limits: Limits) -> Solution | None:
    """Return the fastest plan within the limits (the one of least e among equals), or None."""
    table = make_table(units)
    if math.isinf(limits.budget):
        most = float(np.where(np.isfinite(table.ms), table.grad_error, 0.0).max(axis=1).sum())
        limits = Limits(most, limits.memory, limits.needs_mark)
    if math.isfinite(limits.memory):
        free = _solve(table, Limits(limits.budget, math.inf, limits.needs_mark))
        if free is None or free.memory <= limits.memory:
            return free
    return _solve(table, limits)


def pareto_front(units: Sequence[Sequence[Item]], limits: Limits) -> tuple[Solution, ...]:
    """Return plans of which no other is faster with as little e, by increasing e.

    All of them when there are at most COMPLETE_PLANS plans. Else those that some price of e makes
    the cheapest (the convex hull of the front), thinned out; with a memory limit, the exact answers
    to a sweep of budgets.
    """
    fastest = solve(units, limits)
    if fastest is None:
        return ()
    if math.prod(len(unit) for unit in units) <= COMPLETE_PLANS:
        return tuple(reversed(_every_point(units, limits, fastest)))
    found: list[Solution | None]
    if math.isfinite(limits.memory):
        found = [_within(units, limits, budget) for budget in _sweep(units, fastest)]
    else:
        table = make_table(units)
        plans = hull_plans(table, _sweep(units, fastest), limits)
        found = [_solution(table, picks) for picks in plans]
    return undominated([*(point for point in found if point is not None), fastest])


def undominated(points: Sequence[Solution]) -> tuple[Solution, ...]:
    """Return the points that none of the others beats in both time and e, by increasing e."""
    kept: list[Solution] = []
    for point in sorted(points, key=lambda point: (point.grad_error, point.ms)):
        if not kept or point.ms < kept[-1].ms:
            kept.append(point)
    return tuple(kept)


def _every_point(
    units: Sequence[Sequence[Item]], limits: Limits, fastest: Solution
) -> list[Solution]:
    points = [fastest]
    while points[-1].grad_error > 0.0:
        point = _within(units, limits, points[-1].grad_error * (1.0 - 4.0 * ROUNDING))
        if point is None:
            break
        points.append(point)
    return points


def _sweep(units: Sequence[Sequence[Item]], fastest: Solution) -> list[float]:
    """Return budgets from the least e possible to that of the fastest plan."""
    gentlest = sum(min(item.grad_error for item in unit) for unit in units)
    low = max(gentlest, fastest.grad_error * 1e-3)
    if low <= 0.0:
        return [0.0]
    return [
        gentlest,
        *(float(step) for step in np.geomspace(low, fastest.grad_error, SWEEP_POINTS)),
    ]


def _within(units: Sequence[Sequence[Item]], limits: Limits, budget: float) -> Solution | None:
    return solve(units, Limits(budget, limits.memory, limits.needs_mark))


def _solve(table: Table, limits: Limits) -> Solution | None:
    limits = Limits(
        limits.budget * (1.0 + ROUNDING), limits.memory * (1.0 + ROUNDING), limits.needs_mark
    )
    present = np.isfinite(table.ms)
    least = np.where(present, table.grad_error, np.inf).min(axis=1).sum()
    if least > limits.budget or (limits.needs_mark and not table.marked.any()):
        return None
    relaxed = relax(table, limits)
    slack = relaxed.cost - relaxed.cost.min(axis=1, keepdims=True)
    threshold = relaxed.upper + rounding(relaxed.upper, relaxed.paid)
    picks, is_proven = extend(
        table, limits, relaxed, present & (relaxed.bound + slack <= threshold)
    )
    if picks is None:
        picks = relaxed.picks
    if picks is None:
        return None
    return _solution(table, picks, bound_ms=None if is_proven else relaxed.bound)


def _solution(table: Table, picks: Indices, *, bound_ms: float | None = None) -> Solution:
    """Return the sums of a plan; without a bound it is proven to be its own."""
    rows = np.arange(len(picks))
    ms = math.fsum(table.ms[rows, picks])
    return Solution(
        picks=tuple(int(pick) for pick in picks),
        ms=ms,
        grad_error=math.fsum(table.grad_error[rows, picks]),
        memory=math.fsum(table.memory[rows, picks]),
        bound_ms=ms if bound_ms is None else min(bound_ms, ms),
    )
