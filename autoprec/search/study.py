"""The Optuna study of whole plans: each is evaluated once, as a trial, and remembered.

    minimise    step time, joint gradient error, bytes
    subject to  grad_error + DEVIATIONS standard errors <= budget,  bytes <= limit
    chosen      the feasible plan of least time to loss, counted_ms * (1 + grad_error)

(a gradient error costs extra steps per step, see sensitivity.gap). A measurement costs training
steps, so a sampled plan that loses even with the least error that it may have, by what was measured
so far (see correction), is only estimated: it is in the study, with a constraint that it breaks,
and `trials` has those that were measured. A plan that would be the best, and is near the budget, is
measured again on more batches before it is believed: the best of many noisy numbers is too good.

Every finished trial keeps its plan, gradient error and basis with it, so that a study that goes on
(after a kill, or beside other workers) measures no plan twice.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

from scipy.special import ndtr

from autoprec.records import Basis, Estimate, FrontPoint, SearchTrial
from autoprec.search.correction import Correction, Guess, Seen, fit_correction
from autoprec.search.costs import is_all_fp32
from autoprec.search.problem import Options
from autoprec.search.solver import ROUNDING
from autoprec.search.space import AS_BASE, Space
from autoprec.search.workers import Claims

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

# A plan's error may be above the budget by what the budget itself is worth (a factor of 2, see
# sensitivity.gap), but not by luck: held with one standard error, it is above in 1 of 6 at most.
DEVIATIONS = 1.0
BATCHES = 2  # of a joint measurement,
MORE_BATCHES = 6  # and of one that decides
LEAST_RELATIVE = 0.1  # of two batches that agree by chance; seen: 4 to 20 % of the error
UNDECIDED = 2.0  # standard errors about the budget in which a plan is measured on more batches
SURELY = 2.0  # deviations of an estimate below which a plan is not looked for
NOTE = "autoprec"  # the trial's user attribute that holds a `_Note`
SAMPLER, DRAWN, FRONT = "sampler", "drawn", "front"
SEEDS = ("exact", "uniform")  # plans that every search evaluates; all others count as trials
STARTUP_TRIALS = 4  # before TPE stops drawing at random; the seeds come first and count
FIRST_CODE = 48  # "0"; each option is one character in a note

Measure = Callable[[Options, int], Estimate]  # of a plan, on so many batches


class _Note(TypedDict):
    """What a trial keeps; `is_final` where the plan was evaluated, not only estimated."""

    plan: str
    grad_error: float
    stderr: float | None
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
    most: int  # trials beside the seeds
    is_over: Callable[[], bool]
    claims: Claims
    known: dict[Options, SearchTrial] = field(default_factory=dict)
    trials: list[SearchTrial] = field(default_factory=list)  # the first to evaluate their plan
    measured: int = 0  # how many plans were measured here
    spent_s: float = 0.0
    alive: int = 0  # trials finished or under way, here or elsewhere
    best: SearchTrial | None = None  # the feasible plan of the least rank
    seen: list[Seen] = field(default_factory=list)  # the plans that were measured
    held_budget: float = 0.0  # the gradient error that may be, less the standard errors it holds
    _notes: dict[int, _Note] = field(default_factory=dict)  # of all finished trials, here or not
    _taken: set[str] = field(default_factory=set)  # plans that other workers are measuring

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
        self.take_up()

    @property
    def duplicates(self) -> int:
        """How many trials proposed a plan that an earlier one had."""
        return sum(note["is_duplicate"] for note in self._notes.values())

    @property
    def sampled(self) -> int:
        """How many plans were evaluated beside the seeds; those under way elsewhere count."""
        return len(self._taken) + sum(
            note["source"] not in SEEDS and note["is_final"] and not note["is_duplicate"]
            for note in self._notes.values()
        )

    @property
    def left(self) -> int:
        """How many more plans may be evaluated."""
        return self.most - self.sampled

    def correction(self) -> Correction:
        """Return the table as the plans measured so far correct it."""
        return fit_correction(self.problem.costs, self.seen)

    def is_taken(self, options: Options) -> bool:
        """Whether a plan is known, or being measured elsewhere."""
        return options in self.known or self._code(options) in self._taken

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
            grad_error_stderr=known.grad_error_stderr if known and is_measured else None,
        )

    def estimate(self, options: Options) -> SearchTrial:
        """Return a plan by the table alone, as a trial that was not made."""
        return self._record(options, Estimate(mean=self.problem.costs.grad_error(options)))

    def evaluate(self, options: Options, *, source: str) -> SearchTrial | None:
        """Evaluate a plan as a trial, unless it is known; None where another worker is at it."""
        if not self.is_taken(options):
            self._run(self._trial_of(options), options, source)
        return self.known.get(options)

    def wait_for_others(self) -> bool:
        """Wait until another worker has finished a plan, or is gone; False where none is at one."""
        self.take_up()
        before = self._taken
        while self._taken and self._taken == before and not self.is_over():
            self.claims.wait()
            self.take_up()
        return bool(before) and not self.is_over()

    def wait_for(self, options: Options, *, source: str) -> SearchTrial:
        """Evaluate a plan, or wait until another worker has done so."""
        while (plan := self.evaluate(options, source=source)) is None:
            self.claims.wait()
            self.take_up()
        return plan

    def improve(self, drawn: Sequence[Options], correction: Correction) -> bool:
        """Evaluate the plan that promises most, of some and of Optuna's; False where none can win.

        Optuna's follow from the seed and the trials so far: a study that goes on after a kill
        proposes what it would have proposed, and a worker beside another, which sees that one's
        trial at hand, something else.
        """
        import optuna

        self.study.sampler = optuna.samplers.TPESampler(
            seed=self.seed + self.alive,
            multivariate=True,
            group=True,
            n_startup_trials=STARTUP_TRIALS,
        )
        asked = self.study.ask(self._distributions)
        proposed = self.space.decode(asked.params)
        gains = {plan: self.expected_gain(plan, correction) for plan in (*drawn, proposed)}
        best = max(gains, key=lambda plan: gains[plan])
        is_better = gains[best] > 0.0
        self._run(asked, proposed, SAMPLER, is_final=is_better and best == proposed)
        if is_better and best != proposed:
            self.evaluate(best, source=DRAWN)
        return is_better

    def expected_gain(self, options: Options, correction: Correction) -> float:
        """Return the expected gain in time to loss, in ms; 0 of a plan that is known or taken."""
        if self.is_taken(options) or not self.problem.fits_memory(options):
            return 0.0
        return self.gain(self.problem.costs.counted_ms(options), correction.guess(options))

    def gain(self, ms: float, guess: Guess) -> float:
        """Return the expected gain of a plan of this step time; 0 where it loses beyond its error.

        That is with an error SURELY deviations below what it is taken to be.
        """
        low, best_ms = guess.low(SURELY), self.best.time_to_loss_ms if self.best else math.inf
        if low > self.budget or ms * (1.0 + low) >= best_ms:
            return 0.0
        if self.best is None:
            return 1.0 / ms
        reach = math.log(self.held_budget / guess.grad_error) / guess.log_sd
        return float(ndtr(reach)) * max(best_ms - ms * (1.0 + guess.grad_error), 1e-9 * best_ms)

    def take_up(self) -> None:
        """Take up what was finished since the last time: here, before, or by other workers."""
        trials = self.study.get_trials(deepcopy=False)
        self.alive = sum(t.state.name in ("COMPLETE", "RUNNING") for t in trials)
        self._taken = self.claims.taken(trials)
        for trial in trials:
            note: _Note | None = trial.user_attrs.get(NOTE)
            if not note or not trial.state.is_finished() or trial.number in self._notes:
                continue
            self._notes[trial.number] = note
            if note["is_final"]:
                options = tuple(self._alphabet[ord(code) - FIRST_CODE] for code in note["plan"])
                error = Estimate(mean=note["grad_error"], stderr=note["stderr"])
                basis, source = Basis(note["basis"]), note["source"]
                record = self._record(options, error, basis, trial.number, source)
                self.known[options] = record
                if not note["is_duplicate"]:
                    self.trials.append(record)
        self.best = min((p for p in self.known.values() if p.feasible), key=rank, default=None)
        self.seen = [
            Seen(plan.options, plan.grad_error, plan.grad_error_stderr or 0.0)
            for plan in self.known.values()
            if plan.grad_error_basis is Basis.MEASURED and not is_all_fp32(plan.options)
        ]
        relative = [one.stderr / one.grad_error for one in self.seen if one.grad_error > 0.0]
        share = statistics.median(relative) if relative else 0.0
        self.held_budget = self.budget / (1.0 + DEVIATIONS * share)

    def _trial_of(self, options: Options) -> "optuna.Trial":
        """Return a new trial of this plan; one without parameters where they cannot express it."""
        import optuna

        if options not in self.space.bases:
            return self.study.ask()
        params = self.space.params(self.space.bases.index(options))
        any_other = optuna.samplers.RandomSampler(seed=self.seed)
        self.study.sampler = optuna.samplers.PartialFixedSampler(params, any_other)
        return self.study.ask(self._distributions)

    def _run(
        self, trial: "optuna.Trial", options: Options, source: str, *, is_final: bool = True
    ) -> None:
        """Evaluate a plan, or estimate it, and write it down; failed if broken off."""
        from optuna.trial import TrialState

        try:
            is_work = is_final and options not in self.known
            plan = self._code(options) if is_work else None
            with self.claims.claimed(trial, plan) as is_ours:
                if is_ours:
                    self._evaluate(trial, options, source, is_final=is_final)
        except BaseException:
            self.claims.tell(trial, state=TrialState.FAIL)
            raise
        if not is_ours:
            self.claims.tell(trial, state=TrialState.FAIL)
        self.take_up()

    def _evaluate(
        self, trial: "optuna.Trial", options: Options, source: str, *, is_final: bool
    ) -> None:
        costs, known = self.problem.costs, self.known.get(options)
        error, basis = Estimate(mean=costs.grad_error(options)), Basis.PREDICTED
        if known is not None:
            error = Estimate(mean=known.grad_error, stderr=known.grad_error_stderr)
            basis = known.grad_error_basis
        elif is_final:
            error, basis = self._joint_error(options)
        # feasible where all are <= 0
        held = self._held(error)
        trial.set_constraint("grad_error", held / self.budget - 1.0 if self.budget else held)
        trial.set_constraint("evaluated", 0.0 if is_final else 1.0)
        memory_bytes = costs.memory_bytes(options)
        if limit := self.problem.memory_bytes:
            trial.set_constraint("memory", memory_bytes / limit - 1.0)
        plan = self._code(options)
        is_seen = any(note["plan"] == plan for note in self._notes.values())
        note = _Note(
            plan=plan,
            grad_error=error.mean,
            stderr=error.stderr,
            basis=basis.value,
            source=source,
            is_final=is_final,
            # a plan that was only estimated before and is measured now is no duplicate
            is_duplicate=is_seen and (known is not None or not is_final),
        )
        trial.set_user_attr(NOTE, note)
        self.claims.tell(trial, [costs.counted_ms(options), error.mean, float(memory_bytes)])

    def _joint_error(self, options: Options) -> tuple[Estimate, Basis]:
        """Return a plan's joint gradient error: measured, or the table's sum."""
        if is_all_fp32(options):
            return Estimate(mean=0.0), Basis.MEASURED  # it is the reference
        if self.measure is None:
            return Estimate(mean=self.problem.costs.grad_error(options)), Basis.PREDICTED
        self.claims.check_reference()
        started = time.perf_counter()
        estimate = self.measure(options, BATCHES)
        if self._is_undecided(options, estimate):
            estimate = self.measure(options, MORE_BATCHES)
        self.spent_s += time.perf_counter() - started
        self.measured += 1
        return estimate.model_copy(update={"mean": max(estimate.mean, 0.0)}), Basis.MEASURED

    def _is_undecided(self, options: Options, error: Estimate) -> bool:
        """Whether a plan would be the best if it were feasible, and chance decides that."""
        if error.stderr is None:
            return False
        reach = UNDECIDED * max(error.stderr, LEAST_RELATIVE * error.mean)
        least_ms = self.problem.costs.counted_ms(options) * (1.0 + max(error.mean - reach, 0.0))
        is_ahead = self.best is None or least_ms < self.best.time_to_loss_ms
        return is_ahead and abs(error.mean - self.budget) <= reach

    def _held(self, error: Estimate) -> float:
        """Return the gradient error that must keep the budget."""
        return error.mean + DEVIATIONS * (error.stderr or 0.0)

    def _record(
        self,
        options: Options,
        error: Estimate,
        basis: Basis = Basis.PREDICTED,
        number: int = 0,
        source: str = "table",
    ) -> SearchTrial:
        costs = self.problem.costs
        is_within = self._held(error) <= self.budget * (1.0 + ROUNDING)
        return SearchTrial(
            number=number,
            source=source,
            options=options,
            step_ms=costs.step_ms(options),
            grad_error=error.mean,
            grad_error_basis=basis,
            time_to_loss_ms=costs.counted_ms(options) * (1.0 + error.mean),
            feasible=is_within and self.problem.fits_memory(options),
            grad_error_stderr=error.stderr,
        )

    def _code(self, options: Options) -> str:
        """Return a plan as text, one character a layer."""
        codes = {option: chr(FIRST_CODE + code) for code, option in enumerate(self._alphabet)}
        return "".join(codes[option] for option in options)
