"""The Optuna study of whole plans: each is evaluated once, as a trial, and remembered.

    time_to_loss = counted_ms * (1 + grad_error)     extra steps per step, see sensitivity.gap

A measurement costs training steps, so a sampled plan that cannot win is estimated by the table:
even with PRUNE_FACTOR times its table's error (the sum of the parts was never found more than 25 %
off on small models) it would be over the budget, or slower to the loss than the best plan so far.
Such plans are many, cost nothing, and are in the study only: `trials` has those that were measured.

Every finished trial keeps its plan, gradient error and basis with it, so that a study that goes on
(after a kill, or beside other workers) measures no plan twice.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
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


class _Note(TypedDict):
    """What a trial keeps; `is_final` where the plan was evaluated, not only estimated."""

    plan: str
    grad_error: float
    basis: str
    source: str
    is_final: bool
    is_duplicate: bool


def rank(trial: SearchTrial) -> tuple[float, float, float, str]:
    """Return the sort key of a plan: time to loss, gradient error, step time, then the options."""
    keys = "".join(option.key for option in trial.options)
    return trial.time_to_loss_ms, trial.grad_error, trial.step_ms, keys


@dataclass(eq=False)
class PlanStudy:
    """One study in progress: evaluates whole plans against the budget, and writes them down."""

    study: "optuna.Study"
    space: Space
    budget: float
    measure: Measure | None
    seed: int
    is_over: Callable[[], bool]
    known: dict[Options, SearchTrial] = field(default_factory=dict)
    trials: list[SearchTrial] = field(default_factory=list)  # the first to evaluate their plan
    measured: int = 0  # how many plans were measured here
    spent_s: float = 0.0
    _notes: dict[int, _Note] = field(default_factory=dict)  # of all finished trials, here or not
    _alive: int = 0  # trials finished or under way, here or elsewhere

    def __post_init__(self) -> None:
        from optuna.distributions import CategoricalDistribution, IntDistribution

        self.problem = self.space.problem
        options = {option for prices in self.problem.costs.prices for option in prices}
        self._alphabet = sorted(options, key=lambda option: option.key)
        base = IntDistribution(0, len(self.space.bases) - 1)
        self._distributions: dict[str, BaseDistribution] = {"base": base}
        for role in self.space.roles:
            values = [AS_BASE, *(option.key for option in role.options)]
            self._distributions[role.name] = CategoricalDistribution(values)
        self._take_up()

    @property
    def best(self) -> SearchTrial | None:
        """The feasible plan of the least rank."""
        return min((plan for plan in self.known.values() if plan.feasible), key=rank, default=None)

    @property
    def duplicates(self) -> int:
        """How many trials proposed a plan that an earlier one had."""
        return sum(note["is_duplicate"] for note in self._notes.values())

    def point(self, options: Options) -> FrontPoint:
        """Return a plan with what the tables and a measurement say of it."""
        known, costs = self.known.get(options), self.problem.costs
        is_measured = known is not None and known.grad_error_basis is Basis.MEASURED
        return FrontPoint(
            options=options,
            step_ms=costs.step_ms(options),
            grad_error=costs.grad_error(options),
            grad_error_measured=known.grad_error if known and is_measured else None,
            memory_bytes=costs.memory_bytes(options),
        )

    def estimate(self, options: Options) -> SearchTrial:
        """Return a plan by the table alone, as a trial that was not made."""
        return self._record(options, self.problem.costs.grad_error(options), Basis.PREDICTED)

    def evaluate(self, options: Options, *, source: str) -> SearchTrial:
        """Evaluate a plan as a trial, unless it is known already."""
        if options not in self.known and options in self.space.bases:
            params = self.space.params(self.space.bases.index(options))
            self.study.enqueue_trial(params, user_attrs={SOURCE: source})
            self._run(self.study.ask(self._distributions))
        if options not in self.known:
            # The decisions cannot express it, so that its trial has no parameters; or a killed run
            # left another trial in the queue.
            self._run(self.study.ask(), options, source)
        return self.known[options]

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
            seed = self.seed + self._alive
            self.study.sampler = optuna.samplers.TPESampler(
                seed=seed, multivariate=True, group=True, n_startup_trials=STARTUP_TRIALS
            )
            self._run(self.study.ask(self._distributions))

    def _run(self, trial: "optuna.Trial", options: Options | None = None, source: str = "") -> None:
        """Evaluate a plan, by default the proposed one, and write it down; failed if broken off."""
        from optuna.trial import TrialState

        try:
            if options is None:
                options = self.space.decode(trial.params)
                source = str(trial.user_attrs.get(SOURCE, SAMPLER))
            known = self.known.get(options)
            is_final = known is not None or source != SAMPLER or self._can_win(options)
            if known is not None:
                grad_error, basis = known.grad_error, known.grad_error_basis
            elif is_final:
                grad_error, basis = self._joint_error(options)
            else:
                grad_error, basis = self.problem.costs.grad_error(options), Basis.PREDICTED
            # feasible when <= 0
            excess = grad_error / self.budget - 1.0 if self.budget > 0.0 else grad_error
            trial.set_constraint("grad_error", excess)
            codes = {option: chr(FIRST_CODE + code) for code, option in enumerate(self._alphabet)}
            plan = "".join(codes[option] for option in options)
            is_seen = any(note["plan"] == plan for note in self._notes.values())
            note = _Note(
                plan=plan,
                grad_error=grad_error,
                basis=basis.value,
                source=source,
                is_final=is_final,
                # a plan that was only estimated before and is measured now is no duplicate
                is_duplicate=is_seen and (known is not None or not is_final),
            )
            trial.set_user_attr(NOTE, note)
        except BaseException:
            self.study.tell(trial, state=TrialState.FAIL)
            raise
        self.study.tell(trial, self.problem.costs.counted_ms(options) * (1.0 + grad_error))
        self._take_up()

    def _joint_error(self, options: Options) -> tuple[float, Basis]:
        """Return a plan's joint gradient error: measured, or the table's sum."""
        if is_all_fp32(options):
            return 0.0, Basis.MEASURED  # it is the reference
        if self.measure is None:
            return self.problem.costs.grad_error(options), Basis.PREDICTED
        started = time.perf_counter()
        estimate = self.measure(options)
        self.spent_s += time.perf_counter() - started
        self.measured += 1
        return max(estimate.mean, 0.0), Basis.MEASURED

    def _can_win(self, options: Options) -> bool:
        grad_error = PRUNE_FACTOR * self.problem.costs.grad_error(options)
        if grad_error > self.budget or not self.problem.fits_memory(options):
            return False
        least_ms = self.problem.costs.counted_ms(options) * (1.0 + grad_error)
        return self.best is None or least_ms < self.best.time_to_loss_ms

    def _record(
        self,
        options: Options,
        grad_error: float,
        basis: Basis,
        number: int = 0,
        source: str = "table",
    ) -> SearchTrial:
        costs = self.problem.costs
        is_within = grad_error <= self.budget * (1.0 + ROUNDING)
        return SearchTrial(
            number=number,
            source=source,
            options=options,
            step_ms=costs.step_ms(options),
            grad_error=grad_error,
            grad_error_basis=basis,
            time_to_loss_ms=costs.counted_ms(options) * (1.0 + grad_error),
            feasible=is_within and self.problem.fits_memory(options),
        )

    def _take_up(self) -> None:
        """Take up what was finished since the last time: here, before, or by other workers."""
        trials = self.study.get_trials(deepcopy=False)
        self._alive = sum(t.state.name in ("COMPLETE", "RUNNING") for t in trials)
        for trial in trials:
            note: _Note | None = trial.user_attrs.get(NOTE)
            if not note or not trial.state.is_finished() or trial.number in self._notes:
                continue
            self._notes[trial.number] = note
            if note["is_final"]:
                options = tuple(self._alphabet[ord(code) - FIRST_CODE] for code in note["plan"])
                basis, source = Basis(note["basis"]), note["source"]
                record = self._record(options, note["grad_error"], basis, trial.number, source)
                self.known[options] = record
                if not note["is_duplicate"]:
                    self.trials.append(record)
