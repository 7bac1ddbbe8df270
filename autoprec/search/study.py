"""The Optuna study of whole plans: each is evaluated once, as a trial, and remembered.

    time_to_loss = step_ms * (1 + grad_error)     extra steps per step, see sensitivity.gap

A measurement costs training steps, so a sampled plan that cannot win is estimated by the table:
even with PRUNE_FACTOR times its table's error (the sum of the parts was never found more than 25 %
off on small models) it would be over the budget, or slower to the loss than the best plan so far.
Such plans are many, cost nothing, and are in the study only: `trials` has those that were measured.

Every finished trial keeps its plan, gradient error and basis with it, so that a study that goes on
(after a kill, or beside other workers) measures no plan twice.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from autoprec.records import Basis, Estimate, FrontPoint, SearchTrial
from autoprec.search.costs import is_all_fp32
from autoprec.search.problem import Options
from autoprec.search.solver import ROUNDING
from autoprec.search.space import AS_BASE, Space

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

PRUNE_FACTOR = 0.5
NOTE = "autoprec"  # the trial's user attribute that holds a `_Note`
SOURCE = "source"
SAMPLER = "sampler"
STARTUP_TRIALS = 4  # before TPE stops drawing at random; the seeds come first and count
ASKS_PER_TRIAL = 3  # asked at most for one that is worth a measurement
FIRST_CODE = 48  # "0"; each option is one character in a note

Measure = Callable[[Options], Estimate]
IsOver = Callable[[], bool]


class _Note(TypedDict):
    """What a trial keeps; `is_final` where the plan was evaluated, not only estimated."""

    plan: str
    grad_error: float
    basis: str
    source: str
    is_final: bool
    is_duplicate: bool


@dataclass(frozen=True)
class EvaluatedPlan:
    """What is known of a whole plan."""

    options: Options
    step_ms: float
    table_grad_error: float
    grad_error: float
    basis: Basis
    is_feasible: bool

    @property
    def time_to_loss_ms(self) -> float:
        """The objective."""
        return self.step_ms * (1.0 + self.grad_error)

    @property
    def rank(self) -> tuple[float, float, float, str]:
        """The sort key: time to loss, gradient error, step time, then the options."""
        keys = "".join(option.key for option in self.options)
        return self.time_to_loss_ms, self.grad_error, self.step_ms, keys


class PlanStudy:
    """One study in progress: evaluates whole plans against the budget, and writes them down."""

    def __init__(
        self,
        study: "optuna.Study",
        space: Space,
        *,
        budget: float,
        measure: Measure | None,
        seed: int,
        is_over: IsOver,
    ) -> None:
        self.study = study
        self.space = space
        self.problem = space.problem
        self.budget = budget
        self.measure = measure
        self.seed = seed
        self.is_over = is_over
        self.known: dict[Options, EvaluatedPlan] = {}
        self.measured = 0  # how many plans were measured here
        self.spent_s = 0.0
        self._notes: dict[int, _Note] = {}  # of all finished trials by number, here or elsewhere
        self._alive = 0  # trials finished or under way, here or elsewhere
        options = {option for prices in self.problem.costs.prices for option in prices}
        self._alphabet = sorted(options, key=lambda option: option.key)
        self._take_up()

    @property
    def best(self) -> EvaluatedPlan | None:
        """The feasible plan of the least rank."""
        feasible = (plan for plan in self.known.values() if plan.is_feasible)
        return min(feasible, key=lambda plan: plan.rank, default=None)

    @property
    def trials(self) -> list[SearchTrial]:
        """The trials in which a plan was evaluated for the first time."""
        return [
            SearchTrial(
                number=number,
                source=note["source"],
                options=plan.options,
                step_ms=plan.step_ms,
                grad_error=plan.grad_error,
                grad_error_basis=plan.basis,
                time_to_loss_ms=plan.time_to_loss_ms,
                feasible=plan.is_feasible,
            )
            for number, note in self._notes.items()
            if note["is_final"] and not note["is_duplicate"]
            for plan in [self._noted(note)]
        ]

    @property
    def duplicates(self) -> int:
        """How many trials proposed a plan that an earlier one had."""
        return sum(note["is_duplicate"] for note in self._notes.values())

    def point(self, options: Options) -> FrontPoint:
        """Return a plan with what the tables and a measurement say of it."""
        known, costs = self.known.get(options), self.problem.costs
        is_measured = known is not None and known.basis is Basis.MEASURED
        return FrontPoint(
            options=options,
            step_ms=costs.step_ms(options),
            grad_error=costs.grad_error(options),
            grad_error_measured=known.grad_error if known and is_measured else None,
            memory_bytes=costs.memory_bytes(options),
        )

    def estimate(self, options: Options) -> EvaluatedPlan:
        """Return a plan by the table alone."""
        return self._evaluated(options, self.problem.costs.grad_error(options), Basis.PREDICTED)

    def evaluate(self, options: Options, *, source: str) -> EvaluatedPlan:
        """Evaluate a plan as a trial, unless it is known already."""
        import optuna

        if options in self.known:
            return self.known[options]
        if options in self.space.bases:
            params = self.space.params(self.space.bases.index(options))
            self.study.enqueue_trial(params, user_attrs={SOURCE: source})
            self._ask()
            # known by now, unless a killed run left another in the queue
            return self.known.get(options) or self._joint(options)
        # the decisions cannot express it, so that its trial has no parameters
        plan = self._joint(options)
        self.study.add_trial(
            optuna.trial.create_trial(
                value=plan.time_to_loss_ms,
                user_attrs={NOTE: self._note(plan, source, is_final=True, is_duplicate=False)},
                constraints={"grad_error": self._excess(plan)},
            )
        )
        self._take_up()
        return plan

    def sample(self, trials: int, *, report: Callable[[int], None]) -> None:
        """Let the sampler propose plans until `trials` of them were measured."""
        import optuna

        asks = trials if self.measure is None else ASKS_PER_TRIAL * trials
        while not self.is_over():
            asked = [note for note in self._notes.values() if note["source"] == SAMPLER]
            done = sum(note["is_final"] and not note["is_duplicate"] for note in asked)
            report(done)
            if done >= trials or len(asked) >= asks:
                break
            # The draws follow from the seed and the trials so far: a study that goes on after a
            # kill draws what it would have drawn, and a worker beside another, which sees that
            # one's trial at hand, draws something else.
            self.study.sampler = optuna.samplers.TPESampler(
                seed=self.seed + self._alive,
                multivariate=True,
                group=True,
                n_startup_trials=STARTUP_TRIALS,
            )
            self._ask()

    def _ask(self) -> None:
        """Evaluate one proposal and write it down; one that is broken off is marked as failed."""
        from optuna.trial import TrialState

        trial = self.study.ask(_distributions(self.space))
        try:
            options = self.space.decode(trial.params)
            source = str(trial.user_attrs.get(SOURCE, SAMPLER))
            is_known = options in self.known
            is_final = is_known or source != SAMPLER or self._can_win(options)
            is_seen = self._code(options) in {note["plan"] for note in self._notes.values()}
            plan = self._joint(options) if is_final else self.estimate(options)
            trial.set_constraint("grad_error", self._excess(plan))
            # a plan that was only estimated before and is measured now is no duplicate
            is_duplicate = is_seen and (is_known or not is_final)
            note = self._note(plan, source, is_final=is_final, is_duplicate=is_duplicate)
            trial.set_user_attr(NOTE, note)
        except BaseException:
            self.study.tell(trial, state=TrialState.FAIL)
            raise
        self.study.tell(trial, plan.time_to_loss_ms)
        self._take_up()

    def _joint(self, options: Options) -> EvaluatedPlan:
        """Return a plan with its joint gradient error: known, measured, or the table's sum."""
        if options not in self.known:
            grad_error, basis = self.problem.costs.grad_error(options), Basis.PREDICTED
            if is_all_fp32(options):
                grad_error, basis = 0.0, Basis.MEASURED  # it is the reference
            elif self.measure is not None:
                started = time.perf_counter()
                grad_error, basis = max(self.measure(options).mean, 0.0), Basis.MEASURED
                self.spent_s += time.perf_counter() - started
                self.measured += 1
            self.known[options] = self._evaluated(options, grad_error, basis)
        return self.known[options]

    def _can_win(self, options: Options) -> bool:
        grad_error = PRUNE_FACTOR * self.problem.costs.grad_error(options)
        if grad_error > self.budget or not self.problem.fits_memory(options):
            return False
        least_ms = self.problem.costs.step_ms(options) * (1.0 + grad_error)
        return self.best is None or least_ms < self.best.time_to_loss_ms

    def _evaluated(self, options: Options, grad_error: float, basis: Basis) -> EvaluatedPlan:
        is_within = grad_error <= self.budget * (1.0 + ROUNDING)
        return EvaluatedPlan(
            options=options,
            step_ms=self.problem.costs.step_ms(options),
            table_grad_error=self.problem.costs.grad_error(options),
            grad_error=grad_error,
            basis=basis,
            is_feasible=is_within and self.problem.fits_memory(options),
        )

    def _excess(self, plan: EvaluatedPlan) -> float:
        """Return the constraint's value, feasible when <= 0: gradient error / budget - 1."""
        return plan.grad_error / self.budget - 1.0 if self.budget > 0.0 else plan.grad_error

    def _code(self, options: Options) -> str:
        codes = {option: chr(FIRST_CODE + code) for code, option in enumerate(self._alphabet)}
        return "".join(codes[option] for option in options)

    def _note(
        self, plan: EvaluatedPlan, source: str, *, is_final: bool, is_duplicate: bool
    ) -> _Note:
        return _Note(
            plan=self._code(plan.options),
            grad_error=plan.grad_error,
            basis=plan.basis.value,
            source=source,
            is_final=is_final,
            is_duplicate=is_duplicate,
        )

    def _noted(self, note: _Note) -> EvaluatedPlan:
        options = tuple(self._alphabet[ord(code) - FIRST_CODE] for code in note["plan"])
        return self._evaluated(options, note["grad_error"], Basis(note["basis"]))

    def _take_up(self) -> None:
        """Take up what was finished since the last time: here, before, or by other workers."""
        from optuna.trial import TrialState

        trials = self.study.get_trials(deepcopy=False)
        self._alive = sum(t.state in (TrialState.COMPLETE, TrialState.RUNNING) for t in trials)
        for trial in trials:
            note: _Note | None = trial.user_attrs.get(NOTE)
            if note and trial.state.is_finished() and trial.number not in self._notes:
                self._notes[trial.number] = note
                if note["is_final"]:
                    plan = self._noted(note)
                    self.known[plan.options] = plan


def _distributions(space: Space) -> "dict[str, BaseDistribution]":
    from optuna.distributions import CategoricalDistribution, IntDistribution

    found: dict[str, BaseDistribution] = {"base": IntDistribution(0, len(space.bases) - 1)}
    for role in space.roles:
        found[role.name] = CategoricalDistribution([AS_BASE, *(o.key for o in role.options)])
    return found
