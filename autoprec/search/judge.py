"""A whole plan -> its step time, its e and its time to loss; measured once and remembered.

    time_to_loss = step_ms * (1 + e)        e extra steps per step, see autoprec.sensitivity.gap

A measurement costs training steps, so a plan that cannot win is told by the table: even with
HOPE times its table e (the sum of the parts was never found more than 25 % off on small models) it
would be over the budget, or slower to the loss than the best plan so far.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from autoprec.records import Basis, Estimate
from autoprec.search.costs import is_all_fp32
from autoprec.search.problem import Options, Problem

HOPE = 0.5
ROUNDING = 1e-9  # relative, as in the knapsack

Evaluate = Callable[[Options], Estimate]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Judgement:
    """What is known of a whole plan; `is_final` where measuring it again would say nothing new."""

    options: Options
    step_ms: float
    table_grad_error: float
    grad_error: float
    basis: Basis
    time_to_loss_ms: float
    is_feasible: bool
    is_final: bool


class Judge:
    """Judges whole plans against the budget, and keeps what it measured."""

    def __init__(
        self,
        problem: Problem,
        *,
        budget: float,
        evaluate: Evaluate | None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.problem = problem
        self.budget = budget
        self.evaluate = evaluate
        self.clock = clock
        self.measured = 0  # how many plans were measured here
        self.spent_s = 0.0
        self.known: dict[Options, Judgement] = {}

    def remember(self, options: Options, grad_error: float, basis: Basis) -> Judgement:
        """Take the e of a plan from elsewhere: an earlier run of the same study."""
        self.known[options] = self._judgement(options, grad_error, basis, is_final=True)
        return self.known[options]

    def judge(self, options: Options) -> Judgement:
        """Return the judgement of a plan, measured unless the table shows that it cannot win."""
        if options not in self.known and not self._has_hope(options):
            return self.told(options)
        return self.measure(options)

    def told(self, options: Options) -> Judgement:
        """Return the judgement of a plan by the table alone."""
        grad_error = self.problem.costs.grad_error(options)
        return self._judgement(options, grad_error, Basis.PREDICTED, is_final=False)

    def measure(self, options: Options) -> Judgement:
        """Return the judgement of a plan with its joint e measured, if that can be done."""
        if options not in self.known:
            grad_error, basis = self._joint_e(options)
            self.known[options] = self._judgement(options, grad_error, basis, is_final=True)
        return self.known[options]

    @property
    def best(self) -> Judgement | None:
        """The feasible plan of least time to loss (gentlest, then fastest among equals)."""
        feasible = [j for j in self.known.values() if j.is_feasible]
        return min(feasible, key=rank, default=None)

    def _joint_e(self, options: Options) -> tuple[float, Basis]:
        if is_all_fp32(options):
            return 0.0, Basis.MEASURED  # it is the reference
        if self.evaluate is None:
            return self.problem.costs.grad_error(options), Basis.PREDICTED
        started = self.clock()
        estimate = self.evaluate(options)
        self.spent_s += self.clock() - started
        self.measured += 1
        return max(estimate.mean, 0.0), Basis.MEASURED

    def _has_hope(self, options: Options) -> bool:
        grad_error = HOPE * self.problem.costs.grad_error(options)
        if grad_error > self.budget or not self.problem.fits_memory(options):
            return False
        best = self.best
        hoped_ms = self.problem.costs.step_ms(options) * (1.0 + grad_error)
        return best is None or hoped_ms < best.time_to_loss_ms

    def _judgement(
        self, options: Options, grad_error: float, basis: Basis, *, is_final: bool
    ) -> Judgement:
        step_ms = self.problem.costs.step_ms(options)
        return Judgement(
            options=options,
            step_ms=step_ms,
            table_grad_error=self.problem.costs.grad_error(options),
            grad_error=grad_error,
            basis=basis,
            time_to_loss_ms=step_ms * (1.0 + grad_error),
            is_feasible=grad_error <= self.budget * (1.0 + ROUNDING)
            and self.problem.fits_memory(options),
            is_final=is_final,
        )


def rank(judgement: Judgement) -> tuple[float, float, float, str]:
    """Return the sort key of the best plan: time to loss, e, step time, then its options."""
    keys = "".join(option.key for option in judgement.options)
    return judgement.time_to_loss_ms, judgement.grad_error, judgement.step_ms, keys
