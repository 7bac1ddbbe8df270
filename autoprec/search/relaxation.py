"""Bounds of a multiple-choice knapsack by its Lagrangian: what no plan can beat.

For any prices a, b >= 0 of e and memory,

    sum over units of min(ms + a e + b memory)  -  a budget  -  b limit

is at most the optimum. It is concave and piecewise linear in each price, and turns only where some
unit changes from one item to another, so binary search over these prices maximises it. The plans
met on the way that fit are upper bounds; without a memory limit each of them is, besides, the
fastest plan of all with as little e.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Indices = NDArray[np.intp]

ROUNDING = 1e-9  # relative; sums in another order must not decide what fits or what wins
ROUNDS = 4  # of searching both prices in turn, when memory is limited as well


class Item(NamedTuple):
    """One thing a unit can be: its time, its e, its bytes, and whether it counts as marked."""

    ms: float
    grad_error: float
    memory: float = 0.0
    is_marked: bool = True


@dataclass(frozen=True)
class Limits:
    """What a plan must satisfy; `needs_mark`: at least one item is marked."""

    budget: float
    memory: float = math.inf
    needs_mark: bool = False


@dataclass(frozen=True)
class Table:
    """The items as padded arrays [units, items]; missing ones cost infinitely much time."""

    ms: Floats
    grad_error: Floats
    memory: Floats
    marked: Bools


@dataclass(frozen=True)
class Relaxed:
    """The best Lagrangian bound, its prices, and the best plan met that fits (if any)."""

    bound: float
    cost: Floats  # ms + a e + b memory of every item
    paid: float  # a budget + b limit
    e_price: float
    memory_price: float
    picks: Indices | None
    upper: float


def rounding(ms: float, paid: float) -> float:
    """Return by how much a bound of that size may be off."""
    return ROUNDING * abs(ms) + 1e-12 * paid if math.isfinite(ms) else 0.0


def make_table(units: Sequence[Sequence[Item]]) -> Table:
    """Return the items of the units as arrays."""
    shape = (len(units), max((len(unit) for unit in units), default=1))
    ms, grad_error, memory = np.full(shape, np.inf), np.zeros(shape), np.zeros(shape)
    marked = np.zeros(shape, dtype=np.bool_)
    for row, unit in enumerate(units):
        columns = list(zip(*unit, strict=True))
        size = len(unit)
        ms[row, :size], grad_error[row, :size], memory[row, :size] = columns[:3]
        marked[row, :size] = columns[3]
    return Table(ms, grad_error, memory, marked)


def relax(table: Table, limits: Limits) -> Relaxed:
    """Return the best bound that searching the prices of e and memory, in turn, finds."""
    best = _priced(table, limits, 0.0, 0.0)
    has_memory = math.isfinite(limits.memory)
    for _ in range(ROUNDS if has_memory else 1):
        at = best.memory_price
        prices = _turning_prices(table.ms + at * table.memory, table.grad_error)
        best = _search_price(best, prices, partial(_price_e, table, limits, at))
        if has_memory:
            at = best.e_price
            prices = _turning_prices(table.ms + at * table.grad_error, table.memory)
            best = _search_price(best, prices, partial(_price_memory, table, limits, at))
    if best.picks is None:
        return best
    picks, upper = _filled(table, limits, best.picks)
    return replace(best, picks=picks, upper=upper)


def _filled(table: Table, limits: Limits, picks: Indices) -> tuple[Indices, float]:
    """Spend what a plan leaves of the limits: the largest gain in time that fits, and again."""
    rows, picks = np.arange(len(picks)), picks.copy()
    while True:
        ms, grad_error, memory = (
            a[rows, picks] for a in (table.ms, table.grad_error, table.memory)
        )
        gains = ms[:, None] - table.ms
        fits = (table.grad_error - grad_error[:, None] <= limits.budget - grad_error.sum()) & (
            table.memory - memory[:, None] <= limits.memory - memory.sum()
        )
        if limits.needs_mark:
            fits &= table.marked | ~table.marked[rows, picks][:, None]
        gains = np.where(fits, gains, 0.0)
        at = int(gains.argmax())
        if gains.flat[at] <= 0.0:
            return picks, float(ms.sum())
        picks[at // gains.shape[1]] = at % gains.shape[1]


def hull_plans(table: Table, budgets: Sequence[float], limits: Limits) -> list[Indices]:
    """Return, for each budget, the last plan within it that some price of e makes the cheapest.

    Each is the fastest of all plans with as little e (no memory limit). Plans that lack a mark are
    left out.
    """
    prices = _turning_prices(table.ms, table.grad_error)
    found = []
    for budget in budgets:
        at = partial(_price_e, table, Limits(budget * (1.0 + ROUNDING)), 0.0)
        picks = _search_price(_priced(table, Limits(0.0), 0.0, 0.0), prices, at).picks
        if picks is not None:
            marks = table.marked[np.arange(len(picks)), picks]
            if not limits.needs_mark or marks.any():
                found.append(picks)
    return found


def _price_e(table: Table, limits: Limits, at: float, price: float) -> tuple[Relaxed, bool]:
    relaxed = _priced(table, limits, price, at)
    return relaxed, _uses(table.grad_error, relaxed.cost) <= limits.budget


def _price_memory(table: Table, limits: Limits, at: float, price: float) -> tuple[Relaxed, bool]:
    relaxed = _priced(table, limits, at, price)
    return relaxed, _uses(table.memory, relaxed.cost) <= limits.memory


def _turning_prices(ms: Floats, amounts: Floats) -> Floats:
    """Return, ascending, every price at which some unit changes from one item to another.

    The Lagrangian is concave and piecewise linear in the price, so one of these maximises it.
    """
    real = np.isfinite(ms)
    both = real[:, :, None] & real[:, None, :]
    more = amounts[:, :, None] - amounts[:, None, :]
    faster = np.where(real, ms, 0.0)[:, None, :] - np.where(real, ms, 0.0)[:, :, None]
    rising = both & (more > 0.0) & (faster > 0.0)
    return np.unique(faster[rising] / more[rising])


def _search_price(
    best: Relaxed, prices: Floats, at: Callable[[float], tuple[Relaxed, bool]]
) -> Relaxed:
    """Find the turning price at which the relaxed plan begins to fit."""
    free, fits = at(0.0)
    best = _better(best, free)
    low, high = 0, len(prices)  # the plan fits between prices[high - 1] and the next one
    while not fits and low < high:
        middle = (low + high) // 2
        after = prices[middle + 1] if middle + 1 < len(prices) else 2.0 * prices[middle]
        relaxed, does_fit = at(0.5 * float(prices[middle] + after))
        best = _better(best, relaxed)
        low, high = (low, middle) if does_fit else (middle + 1, high)
    if not fits and low < len(prices):
        best = _better(best, at(float(prices[low]))[0])
    return best


def _priced(table: Table, limits: Limits, e_price: float, memory_price: float) -> Relaxed:
    """Return the Lagrangian at these prices, with its plan if that one fits."""
    cost = table.ms + e_price * table.grad_error + memory_price * table.memory
    paid = e_price * limits.budget + (memory_price * limits.memory if memory_price else 0.0)
    picks = cost.argmin(axis=1)
    rows = np.arange(len(picks))
    fits = (
        table.grad_error[rows, picks].sum() <= limits.budget
        and table.memory[rows, picks].sum() <= limits.memory
        and (not limits.needs_mark or bool(table.marked[rows, picks].any()))
    )
    return Relaxed(
        bound=float(cost.min(axis=1).sum() - paid),
        cost=cost,
        paid=paid,
        e_price=e_price,
        memory_price=memory_price,
        picks=picks if fits else None,
        upper=float(table.ms[rows, picks].sum()) if fits else math.inf,
    )


def _better(one: Relaxed, other: Relaxed) -> Relaxed:
    """Return the higher bound of the two together with the better plan of the two."""
    high = other if other.bound > one.bound else one
    plan = other if other.upper < one.upper else one
    return Relaxed(
        high.bound, high.cost, high.paid, high.e_price, high.memory_price, plan.picks, plan.upper
    )


def _uses(amounts: Floats, cost: Floats) -> float:
    return float(amounts[np.arange(len(cost)), cost.argmin(axis=1)].sum())
