"""Whole plans as arrays, and the exchange of one or two groups that promises most.

A plan is an item of every group, by its position among all items. What it takes and how wrong it is
are sums over items, so that all changes of one group, and of pairs where one saves time and the
other error, are looked up at once.
"""

from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from autoprec.records import FP32
from autoprec.search.correction import Cells, Correction, Guess
from autoprec.search.problem import Options, Problem, item_of
from autoprec.search.solver import Floats, Indices, Solution

PAIRED = 64  # changes that save time, and as many that save error, of which pairs are looked up
MOST_STEPS = 20

Gains = Callable[[Floats, Floats, float], Floats]  # of times, errors, and the errors' deviation


class _Table(NamedTuple):
    """Times, bytes, what islands add to the errors, and the cells of all items."""

    ms: Floats
    memory: Floats
    islands: Floats
    where: csr_array


@dataclass(frozen=True)
class Moves:
    """The items of a problem's groups; its errors are looked up in the cells."""

    problem: Problem
    cells: Cells

    @cached_property
    def _items(self) -> list[tuple[int, Options]]:
        groups = enumerate(self.problem.groups)
        return [(number, choice) for number, group in groups for choice in group.choices]

    @cached_property
    def _groups(self) -> Indices:
        return np.array([number for number, _ in self._items], dtype=np.intp)

    @cached_property
    def _table(self) -> _Table:
        costs, ms, memory, islands = self.problem.costs, [], [], []
        rows: list[int] = []
        columns: list[int] = []
        for position, (number, choice) in enumerate(self._items):
            layers = self.problem.groups[number].layers
            item = item_of(costs, layers, choice)
            ms.append(item.ms)
            memory.append(item.memory)
            islands.append(costs.island_error(dict(zip(layers, choice, strict=True))))
            own = [self.cells.index[i][option] for i, option in zip(layers, choice, strict=True)]
            columns += own
            rows += [position] * len(own)
        shape = len(self._items), len(self.cells.table)
        where = csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)
        return _Table(np.array(ms), np.array(memory), np.array(islands), where)

    @cached_property
    def _positions(self) -> dict[tuple[int, Options], int]:
        return {item: position for position, item in enumerate(self._items)}

    def options(self, picks: Indices) -> Options:
        """Return the plan of these items."""
        items = (self._items[pick] for pick in picks.tolist())
        chosen = ((self.problem.groups[number], choice) for number, choice in items)
        return self.problem.with_choices((FP32,) * len(self.problem.allowed), chosen)

    def picks(self, options: Options) -> Indices | None:
        """Return the items of a plan; None where a group has no such choice."""
        groups = enumerate(self.problem.groups)
        keys = ((number, tuple(options[i] for i in group.layers)) for number, group in groups)
        found = [self._positions.get(key) for key in keys]
        return np.array(found, dtype=np.intp) if None not in found else None

    def nearest(self, options: Options) -> Options:
        """Return a plan, with the fastest choice of each group that has no such one."""
        groups = self.problem.groups
        others = [g for g in groups if tuple(options[i] for i in g.layers) not in g.choices]
        return self.problem.with_fastest(options, others)

    def solve(self, errors: Floats, budget: float, price: float) -> Indices | None:
        """Return a plan near the best one if these were the errors of the cells."""
        _, _, islands, where = self._table
        outside = float(errors[-1]) + self.problem.loose_error
        return self.problem.knapsack.nearly(price, budget, where @ errors + islands, outside)

    def climb(
        self, start: Indices, correction: Correction, gains: Gains, taken: AbstractSet[bytes]
    ) -> tuple[float, Indices]:
        """Return the plan that promises most from `start` on, by changes of one or two groups.

        `taken` are the plans, as bytes, that promise nothing, since they are known.
        """
        best, picks = 0.0, start
        for _ in range(MOST_STEPS):
            at, guess = self._priced(picks, correction)
            limit = self.problem.memory_bytes
            if picks.tobytes() not in taken and (limit is None or at.memory <= limit):
                own = gains(np.array([at.ms]), np.array([guess.grad_error]), guess.log_sd)
                best = float(own[0])
            near = self._near(picks, at, guess, correction, gains)
            free = (one for one in near if one[1].tobytes() not in taken)
            promised, other = next(free, (0.0, picks))
            if promised <= best:
                break
            best, picks = promised, other
        return best, picks

    def _priced(self, picks: Indices, correction: Correction) -> tuple[Solution, Guess]:
        where = self._table.where
        cells = np.append(where[picks].indices, len(self.cells.table) - 1)
        islands = float(self._table.islands[picks].sum()) + self.problem.loose_error
        return self.problem.knapsack.solution(picks), correction.guess_cells(cells, islands)

    def _near(
        self, picks: Indices, at: Solution, guess: Guess, correction: Correction, gains: Gains
    ) -> Iterator[tuple[float, Indices]]:
        """Yield the changes of a plan that seem to gain most, and how much."""
        ms, memory, islands, where = self._table
        errors = where @ correction.errors + islands
        own = picks[self._groups]
        # what each item takes less than its group's own
        less_ms, less_error = ms[own] - ms, errors[own] - errors
        alone = np.flatnonzero(own != np.arange(len(own)))
        first, second = self._pairs(alone, less_ms, less_error)
        first = np.concatenate([alone, first])
        second = np.concatenate([own[alone], second])  # the present item: no other change

        def after(base: float, less: Floats) -> Floats:
            return base - less[first] - less[second]

        left = np.maximum(after(guess.grad_error, less_error), 1e-12)
        promised = gains(after(at.ms, less_ms), left, guess.log_sd)
        if limit := self.problem.memory_bytes:
            fits = after(at.memory, memory[own] - memory) <= limit
            promised = np.where(fits, promised, 0.0)
        for position in np.argsort(-promised, kind="stable"):
            near = picks.copy()
            near[self._groups[first[position]]] = first[position]
            # last: where it is a change, it is of another group; else that group's own stays
            if own[second[position]] != second[position]:
                near[self._groups[second[position]]] = second[position]
            yield float(promised[position]), near

    def _pairs(
        self, changed: Indices, less_ms: Floats, less_error: Floats
    ) -> tuple[Indices, Indices]:
        """Return pairs of changes: one saves time, the other error, each at the least of it."""
        faster, finer = changed[less_ms[changed] > 0.0], changed[less_error[changed] > 0.0]
        by_ms = less_ms[faster] / np.maximum(-less_error[faster], 1e-12)
        by_error = less_error[finer] / np.maximum(-less_ms[finer], 1e-12)
        faster = faster[np.argsort(-by_ms, kind="stable")[:PAIRED]]
        finer = finer[np.argsort(-by_error, kind="stable")[:PAIRED]]
        first, second = np.repeat(faster, len(finer)), np.tile(finer, len(faster))
        is_other = self._groups[first] != self._groups[second]
        return first[is_other], second[is_other]
