"""A whole plan -> its step time, gradient error and time to loss; measured once and remembered.

    time_to_loss = step_ms * (1 + grad_error)     extra steps per step, see sensitivity.gap

A measurement costs training steps, so a plan that cannot win is estimated by the table: even with
PRUNE_FACTOR times its table's error (the sum of the parts was never found more than 25 % off on
small models) it would be over the budget, or slower to the loss than the best plan so far.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from autoprec.records import Basis, Estimate
from autoprec.search.costs import is_all_fp32
from autoprec.search.problem import Options, Problem
from autoprec.search.solver import ROUNDING

PRUNE_FACTOR = 0.5

Measure = Callable[[Options], Estimate]
Clock = Callable[[], float]


@dataclass(frozen=True)
class EvaluatedPlan:
    """What is known of a whole plan; `is_final` where measuring it again would say nothing new."""

    options: Options
    step_ms: float
    table_grad_error: float
    grad_error: float
    basis: Basis
    is_feasible: bool
    is_final: bool

    @property
    def time_to_loss_ms(self) -> float:
        """The objective."""
        return self.step_ms * (1.0 + self.grad_error)

    @property
    def rank(self) -> tuple[float, float, float, str]:
        """The sort key: time to loss, gradient error, step time, then the options."""
        keys = "".join(option.key for option in self.options)
        return self.time_to_loss_ms, self.grad_error, self.step_ms, keys


class PlanEvaluator:
    """Evaluates whole plans against the budget, and keeps what it measured."""

    def __init__(
        self,
        problem: Problem,
        *,
        budget: float,
        measure: Measure | None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.problem = problem
        self.budget = budget
        self.measure = measure
        self.clock = clock
        self.measured = 0  # how many plans were measured here
        self.spent_s = 0.0
        self.known: dict[Options, EvaluatedPlan] = {}

    def evaluate(self, options: Options) -> EvaluatedPlan:
        """Return a plan with its joint gradient error measured, if that can be done."""
        if options not in self.known:
            self.add(options, *self._joint_error(options))
        return self.known[options]

    def estimate(self, options: Options) -> EvaluatedPlan:
        """Return a plan by the table alone."""
        table = self.problem.costs.grad_error(options)
        return self._evaluated(options, table, Basis.PREDICTED, is_final=False)

    def evaluate_promising(self, options: Options) -> EvaluatedPlan:
        """Evaluate a plan, or estimate it where the table shows that it cannot win."""
        is_known = options in self.known
        return (
            self.evaluate(options) if is_known or self._can_win(options) else self.estimate(options)
        )

    def add(self, options: Options, grad_error: float, basis: Basis) -> EvaluatedPlan:
        """Take a plan's gradient error as measured, here or in an earlier run of the study."""
        self.known[options] = self._evaluated(options, grad_error, basis, is_final=True)
        return self.known[options]

    @property
    def best(self) -> EvaluatedPlan | None:
        """The feasible plan of the least rank."""
        feasible = (plan for plan in self.known.values() if plan.is_feasible)
        return min(feasible, key=lambda plan: plan.rank, default=None)

    def _joint_error(self, options: Options) -> tuple[float, Basis]:
        if is_all_fp32(options):
            return 0.0, Basis.MEASURED  # it is the reference
        if self.measure is None:
            return self.problem.costs.grad_error(options), Basis.PREDICTED
        started = self.clock()
        estimate = self.measure(options)
        self.spent_s += self.clock() - started
        self.measured += 1
        return max(estimate.mean, 0.0), Basis.MEASURED

    def _can_win(self, options: Options) -> bool:
        grad_error = PRUNE_FACTOR * self.problem.costs.grad_error(options)
        if grad_error > self.budget or not self.problem.fits_memory(options):
            return False
        least_ms = self.problem.costs.step_ms(options) * (1.0 + grad_error)
        return self.best is None or least_ms < self.best.time_to_loss_ms

    def _evaluated(
        self, options: Options, grad_error: float, basis: Basis, *, is_final: bool
    ) -> EvaluatedPlan:
        is_within = grad_error <= self.budget * (1.0 + ROUNDING)
        return EvaluatedPlan(
            options=options,
            step_ms=self.problem.costs.step_ms(options),
            table_grad_error=self.problem.costs.grad_error(options),
            grad_error=grad_error,
            basis=basis,
            is_feasible=is_within and self.problem.fits_memory(options),
            is_final=is_final,
        )
