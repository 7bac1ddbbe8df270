"""Exact search among the few items that a bound leaves open: partial plans, unit by unit.

A partial plan is dropped when another is at least as good in time, e and memory, when it cannot fit
any more, or when its Lagrangian bound is above the best plan known.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from autoprec.search.relaxation import Bools, Floats, Indices, Limits, Relaxed, Table, rounding

MOST_STATES = 200_000


@dataclass(frozen=True)
class States:
    """Partial plans: their sums, and which state and item each came from."""

    ms: Floats
    grad_error: Floats
    memory: Floats
    marked: Bools
    parent: Indices
    item: Indices

    def take(self, which: Indices | Bools) -> "States":
        """Return some of them, in the given order."""
        return States(
            self.ms[which],
            self.grad_error[which],
            self.memory[which],
            self.marked[which],
            self.parent[which],
            self.item[which],
        )


@dataclass(frozen=True)
class Rest:
    """What the units not yet added bring at least, and in the relaxed plan."""

    cost: float
    least_e: float
    least_memory: float
    ms: float
    grad_error: float
    memory: float
    marked: bool


def extend(
    table: Table, limits: Limits, relaxed: Relaxed, open_items: Bools
) -> tuple[Indices | None, bool]:
    """Return the optimal picks among the open items, and whether nothing else was thrown away."""
    order = _order(relaxed.cost, open_items)
    rests = _rests(table, relaxed.cost, open_items, order)
    bound = Bound(limits, relaxed.e_price, relaxed.memory_price, relaxed.paid, relaxed.upper)
    states, stages, is_proven = _nothing(), [], True
    for row, rest in zip(order, rests, strict=True):
        items = np.flatnonzero(open_items[row])
        states, bound = bound.prune(_combine(states, table, row, items), rest)
        states = _undominated(states, has_memory=math.isfinite(limits.memory))
        if len(states.ms) > MOST_STATES:
            best = np.argsort(bound.cost(states), kind="stable")[:MOST_STATES]
            states, is_proven = states.take(np.sort(best)), False
        stages.append(states)
    return _traced(order, stages, limits), is_proven


@dataclass(frozen=True)
class Bound:
    """What a partial plan may cost at most."""

    limits: Limits
    e_price: float
    memory_price: float
    paid: float
    upper: float

    def cost(self, states: States) -> Floats:
        """Return the Lagrangian of each state, without what was paid."""
        return states.ms + self.e_price * states.grad_error + self.memory_price * states.memory

    def prune(self, states: States, rest: Rest) -> tuple[States, "Bound"]:
        """Drop what cannot fit or cannot win; the relaxed rest may give a better upper bound."""
        fits = (states.grad_error + rest.least_e <= self.limits.budget) & (
            states.memory + rest.least_memory <= self.limits.memory
        )
        states = states.take(fits)
        complete = (
            (states.grad_error + rest.grad_error <= self.limits.budget)
            & (states.memory + rest.memory <= self.limits.memory)
            & (states.marked | (rest.marked or not self.limits.needs_mark))
        )
        upper = min(self.upper, float((states.ms[complete] + rest.ms).min(initial=math.inf)))
        threshold = upper + rounding(upper, self.paid)
        wins = self.cost(states) + rest.cost - self.paid <= threshold
        return states.take(wins), replace(self, upper=upper)


def _order(cost: Floats, open_items: Bools) -> list[int]:
    """Return the rows, those first whose second best item costs most beside the best.

    That keeps the partial plans few: 4x to 10x faster at 500 units than by the spread of the costs.
    """
    slack = np.sort(np.where(open_items, cost - cost.min(axis=1, keepdims=True), np.inf), axis=1)
    second = slack[:, 1] if slack.shape[1] > 1 else slack[:, 0]
    return [int(row) for row in np.argsort(-second, kind="stable")]


def _rests(table: Table, cost: Floats, open_items: Bools, order: Sequence[int]) -> list[Rest]:
    """Return, for every position in the order, what the units after it bring."""
    picks = cost.argmin(axis=1)
    rest = Rest(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, False)
    found = []
    for row in reversed(order):
        found.append(rest)
        pick = picks[row]
        rest = Rest(
            cost=rest.cost + float(cost[row, pick]),
            least_e=rest.least_e + float(table.grad_error[row][open_items[row]].min()),
            least_memory=rest.least_memory + float(table.memory[row][open_items[row]].min()),
            ms=rest.ms + float(table.ms[row, pick]),
            grad_error=rest.grad_error + float(table.grad_error[row, pick]),
            memory=rest.memory + float(table.memory[row, pick]),
            marked=rest.marked or bool(table.marked[row, pick]),
        )
    return found[::-1]


def _nothing() -> States:
    zero, index = np.zeros(1), np.zeros(1, dtype=np.intp)
    return States(zero, zero, zero, np.zeros(1, dtype=np.bool_), index, index)


def _combine(states: States, table: Table, row: int, items: Indices) -> States:
    """Return every state with every item of a unit added."""
    count = len(states.ms)
    return States(
        ms=np.add.outer(states.ms, table.ms[row, items]).ravel(),
        grad_error=np.add.outer(states.grad_error, table.grad_error[row, items]).ravel(),
        memory=np.add.outer(states.memory, table.memory[row, items]).ravel(),
        marked=np.logical_or.outer(states.marked, table.marked[row, items]).ravel(),
        parent=np.repeat(np.arange(count), len(items)),
        item=np.tile(items, count),
    )


def _undominated(states: States, *, has_memory: bool) -> States:
    """Drop states that another beats or equals in all sums; unmarked ones compete apart."""
    order = np.lexsort((states.memory, states.grad_error, states.ms))
    states = states.take(order)
    keep = np.zeros(len(order), dtype=np.bool_)
    for mark in (True, False):
        which = np.flatnonzero(states.marked == mark)
        if has_memory:
            keep[which] = _staircase(states.grad_error[which], states.memory[which])
        elif len(which):
            grad_error = states.grad_error[which]
            keep[which] = np.r_[True, grad_error[1:] < np.minimum.accumulate(grad_error)[:-1]]
    return states.take(keep)


def _staircase(grad_error: Floats, memory: Floats) -> list[bool]:
    """Say of each pair whether none before it is as small in both (a staircase is kept sorted)."""
    steps: list[tuple[float, float]] = []  # e rising, memory falling
    keep = []
    for pair in zip(grad_error.tolist(), memory.tolist(), strict=True):
        at = bisect.bisect_right(steps, (pair[0], math.inf))
        is_new = at == 0 or steps[at - 1][1] > pair[1]
        keep.append(is_new)
        if is_new:
            end = at
            while end < len(steps) and steps[end][1] >= pair[1]:
                end += 1
            start = at - 1 if at and steps[at - 1][0] == pair[0] else at
            steps[start:end] = [pair]
    return keep


def _traced(order: Sequence[int], stages: Sequence[States], limits: Limits) -> Indices | None:
    """Follow the best complete state back through its parents; None when there is none."""
    last = stages[-1]
    valid = np.flatnonzero(last.marked | (not limits.needs_mark))
    if not len(valid):
        return None
    at = int(valid[np.lexsort((last.grad_error[valid], last.ms[valid]))[0]])
    picks = np.zeros(len(order), dtype=np.intp)
    for row, states in zip(reversed(order), reversed(stages), strict=True):
        picks[row] = states.item[at]
        at = int(states.parent[at])
    return picks
