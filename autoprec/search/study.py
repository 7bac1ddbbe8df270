"""The Optuna study of whole plans: each is evaluated once, as a trial, and remembered.

    minimise    step time, joint gradient error, bytes
    subject to  grad_error + DEVIATIONS standard errors <= budget,  bytes <= limit
    chosen      the feasible plan of least time to loss, counted_ms * (1 + grad_error)

(a gradient error costs extra steps per step, see sensitivity.gap). A measurement costs training
steps, so a plan that loses even with the least error that it may have, by what was measured so far
(see correction), is passed over. Optuna keeps the trials, ranks them and shares them between
processes; its sampler proposed none of the plans that were chosen. A plan that would be the best,
and is near the budget or has batches that differ, is measured again on more batches before it is
believed: the best of many noisy numbers is too good.

Every finished trial keeps its plan, gradient error and basis with it, so that a study that goes on
(after a kill, or beside other workers) measures no plan twice.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from scipy.special import ndtr

from autoprec.records import Basis, Estimate, FrontPoint, SearchTrial
from autoprec.search.correction import Cells, Correction, Seen, fit_correction, telling
from autoprec.search.costs import is_all_fp32
from autoprec.search.moves import Moves
from autoprec.search.problem import Options, Problem, wide_groups
from autoprec.search.solver import ROUNDING, Floats
from autoprec.search.space import make_roles
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
UNLIKE = 0.3  # of the error: batches, one of which has twice the other's, say little of the next
SURELY = 3.0  # deviations of an estimate below which a plan is not looked for,
MORE_SURELY = 6.0  # and with more than so many trials: estimates are too sure where layers interact
FEW_TRIALS = 12
NOTE = "autoprec"  # the trial's user attribute that holds a `_Note`
DRAWN, FRONT = "drawn", "front"
SEEDS = ("exact", "uniform", "checked")  # that every search evaluates; others count as trials
DRAWS = 3  # of a table, from each of which a plan is looked for
FIRST_CODE = 48  # "0"; each option is one character in a note

Measure = Callable[[Options, int], Estimate]  # of a plan, on so many batches


class _Note(TypedDict):
    """What a trial keeps."""

    plan: str
    grad_error: float
    stderr: float | None
    basis: str
    source: str


def rank(trial: SearchTrial) -> tuple[float, float, float, int]:
    """Return the sort key of a plan: time to loss, gradient error, step time, the first of them."""
    return trial.time_to_loss_ms, trial.grad_error, trial.step_ms, trial.number


@dataclass(eq=False)
class PlanStudy:
    """One study in progress: evaluates whole plans against the budget, and writes them down."""

    study: "optuna.Study"
    problem: Problem
    bases: tuple[Options, ...]  # of the exact front, and the uniform plans, by increasing error
    budget: float
    measure: Measure | None
    seed: int
    most: int  # trials beside the seeds
    is_over: Callable[[], bool]
    claims: Claims
    before: tuple[Seen, ...] = ()  # plans that were measured with the table
    scale: Correction | None = None  # the problem's costs are its own, where plans are not measured
    known: dict[Options, SearchTrial] = field(default_factory=dict)  # the first of each plan
    measured: int = 0  # how many plans were measured here
    spent_s: float = 0.0
    alive: int = 0  # trials finished or under way, here or elsewhere
    best: SearchTrial | None = None  # the feasible plan of the least rank
    seen: list[Seen] = field(default_factory=list)  # the plans that were measured
    usual_share: float = 0.0  # of their errors, that the standard errors are
    held_budget: float = 0.0  # the gradient error that may be, less the standard errors it holds
    _notes: dict[int, _Note] = field(default_factory=dict)  # of all finished trials, here or not
    _taken: set[str] = field(default_factory=set)  # plans that other workers are measuring

    def __post_init__(self) -> None:
        from optuna.distributions import CategoricalDistribution

        options = {option for prices in self.problem.costs.prices for option in prices}
        self._alphabet = sorted(options, key=lambda option: option.key)
        self._codes = {option: chr(FIRST_CODE + i) for i, option in enumerate(self._alphabet)}
        self._roles = make_roles(self.problem.costs.layers, self.problem.allowed)
        self._distributions: dict[str, BaseDistribution] = {
            name: CategoricalDistribution(role.keys) for name, role in self._roles.items()
        }
        self.take_up()

    @property
    def duplicates(self) -> int:
        """How many trials evaluated a plan that an earlier one had."""
        return len(self._notes) - len({note["plan"] for note in self._notes.values()})

    @property
    def sampled(self) -> int:
        """How many plans were evaluated beside the seeds; those under way elsewhere count."""
        own = {note["plan"] for note in self._notes.values() if note["source"] not in SEEDS}
        return len(self._taken) + len(own)

    @property
    def left(self) -> int:
        """How many more plans may be evaluated."""
        return self.most - self.sampled

    def correction(self) -> Correction:
        """Return the table as the plans measured so far correct it.

        What others are measuring is taken to come out as guessed, so that each looks elsewhere.
        """
        found = fit_correction(self.moves.cells, self.seen)
        guesses = {plan: found.guess(plan) for plan in map(self._plan, self._taken)}
        others = [Seen(plan, guess.grad_error, 0.0) for plan, guess in guesses.items()]
        return fit_correction(self.moves.cells, [*self.seen, *others]) if others else found

    @cached_property
    def moves(self) -> Moves:
        """The plans that may be sampled."""
        wide = replace(self.problem, groups=wide_groups(self.problem))
        return Moves(wide, Cells(self.problem.costs))

    @property
    def has_others(self) -> bool:
        """Whether other workers are measuring plans."""
        return bool(self._taken)

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
        return self._record(options, self._summed(options))

    def evaluate(self, options: Options, *, source: str) -> SearchTrial | None:
        """Evaluate a plan as a trial, unless it is known; None where another worker is at it."""
        if not self.is_taken(options):
            self._run(options, source)
        return self.known.get(options)

    def may_win(self, options: Options, seen: Seen) -> bool:
        """Whether a plan would be the best with what was measured of a like one.

        Where nothing is measured, of the very same.
        """
        error = Estimate(mean=seen.grad_error, stderr=seen.stderr)
        found = self._record(options, error)
        is_it = self.measure is not None or options == seen.options
        return is_it and found.feasible and (self.best is None or rank(found) < rank(self.best))

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

    def improve(self, correction: Correction) -> bool:
        """Evaluate the plan that promises most; False where none can win."""
        random = np.random.default_rng(self.seed + self.alive)
        price = self.best.time_to_loss_ms if self.best else 0.0
        tables = [correction.errors, *(correction.drawn(random) for _ in range(DRAWS))]
        starts = [self.moves.solve(errors, self.held_budget, price) for errors in tables]
        starts += [self.moves.picks(self.best.options)] if self.best else []
        plans = [*self.known, *map(self._plan, self._taken)]
        taken = {p.tobytes() for p in map(self.moves.picks, plans) if p is not None}
        found = [
            self.moves.climb(start, correction, self.gains, taken)
            for start in starts
            if start is not None
        ]
        gain, picks = max(found, key=lambda one: one[0], default=(0.0, None))
        if picks is None or gain <= 0.0:
            return False
        self.evaluate(self.moves.options(picks), source=DRAWN)
        return True

    def gains(self, ms: Floats, errors: Floats, log_sd: float) -> Floats:
        """Return the expected gain of plans: 0 where one loses beyond its error.

        That is with an error SURELY or MORE_SURELY deviations below what it is taken to be. Where
        no plan is feasible yet, what counts is the chance to be.
        """
        deviations = SURELY if self.most <= FEW_TRIALS else MORE_SURELY
        low = errors * math.exp(-deviations * log_sd)
        chance = ndtr(np.log(max(self.held_budget, 1e-300) / errors) / log_sd)
        best_ms = self.best.time_to_loss_ms if self.best else math.inf
        gain = np.maximum(best_ms - ms * (1.0 + errors), 1e-9 * best_ms) if self.best else 1.0 / ms
        can_win = (low <= self.budget) & (ms * (1.0 + low) < best_ms)
        found: Floats = np.where(can_win, chance * gain, 0.0)
        return found

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
            options = self._plan(note["plan"])
            error = Estimate(mean=note["grad_error"], stderr=note["stderr"])
            basis, source = Basis(note["basis"]), note["source"]
            if options not in self.known:
                self.known[options] = self._record(options, error, basis, trial.number, source)
        self.best = min((p for p in self.known.values() if p.feasible), key=rank, default=None)
        before = telling(self.problem.costs, self.before)
        self.seen = [one for one in before if one.options not in self.known]
        self.seen += [
            Seen(plan.options, plan.grad_error, plan.grad_error_stderr or 0.0)
            for plan in self.known.values()
            if plan.grad_error_basis is Basis.MEASURED and not is_all_fp32(plan.options)
        ]
        relative = [one.stderr / one.grad_error for one in self.seen if one.grad_error > 0.0]
        self.usual_share = statistics.median(relative) if relative else 0.0
        self.held_budget = self.budget / (1.0 + DEVIATIONS * self.usual_share)

    def _run(self, options: Options, source: str) -> None:
        """Evaluate a plan as a trial that names what its layers have; failed if broken off.

        One that another process has failed meanwhile stays so.
        """
        from optuna.samplers import PartialFixedSampler, RandomSampler
        from optuna.trial import TrialState

        params = {name: role.value(options) for name, role in self._roles.items()}
        self.study.sampler = PartialFixedSampler(params, RandomSampler(seed=self.seed))
        trial = self.study.ask(self._distributions)
        try:
            with self.claims.claimed(trial, self._code(options)) as is_ours:
                if is_ours:
                    self._evaluate(trial, options, source)
        finally:  # one that was not evaluated
            self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        self.take_up()

    def _evaluate(self, trial: "optuna.Trial", options: Options, source: str) -> None:
        costs = self.problem.costs
        error, basis = self._joint_error(options)
        held, most = self._held(error), self.problem.most_error(options, self.budget)
        constraints = {"grad_error": held / most - 1.0 if most else held}
        memory_bytes = costs.memory_bytes(options)
        if limit := self.problem.memory_bytes:
            constraints["memory"] = memory_bytes / limit - 1.0
        self.claims.constrain(trial, constraints)
        note = _Note(
            plan=self._code(options),
            grad_error=error.mean,
            stderr=error.stderr,
            basis=basis.value,
            source=source,
        )
        trial.set_user_attr(NOTE, note)
        values = [costs.counted_ms(options), error.mean, float(memory_bytes)]
        self.study.tell(trial, values, skip_if_finished=True)

    def _joint_error(self, options: Options) -> tuple[Estimate, Basis]:
        """Return a plan's joint gradient error: measured, or the table's sum."""
        if is_all_fp32(options):
            return Estimate(mean=0.0), Basis.MEASURED  # it is the reference
        if self.measure is None:
            known = next((one for one in self.before if one.options == options), None)
            if known is None:
                return self._summed(options), Basis.PREDICTED
            return Estimate(mean=known.grad_error, stderr=known.stderr), Basis.MEASURED
        self.claims.check_reference()
        started = time.perf_counter()
        share = self.problem.costs.counted_share(options)
        estimate = self.measure(options, BATCHES).scaled(share)
        if self._is_undecided(options, estimate):
            estimate = self.measure(options, MORE_BATCHES).scaled(share)
        self.spent_s += time.perf_counter() - started
        self.measured += 1
        return estimate.model_copy(update={"mean": max(estimate.mean, 0.0)}), Basis.MEASURED

    def _summed(self, options: Options) -> Estimate:
        """Return a plan's error by the table, and how far beyond its correction may have it."""
        summed = self.problem.costs.grad_error(options)
        if self.scale is None or is_all_fp32(options):
            return Estimate(mean=summed)
        beyond = self.scale.guess(options).high(DEVIATIONS) - summed
        return Estimate(mean=summed, stderr=max(beyond, 0.0) / DEVIATIONS)

    def _is_undecided(self, options: Options, error: Estimate) -> bool:
        """Whether a plan would be the best if it were feasible, and chance decides that."""
        if error.stderr is None:
            return False
        reach = UNDECIDED * max(error.stderr, LEAST_RELATIVE * error.mean)
        least_ms = self.problem.costs.counted_ms(options) * (1.0 + max(error.mean - reach, 0.0))
        is_ahead = self.best is None or least_ms < self.best.time_to_loss_ms
        # its own batches, or those of other plans, which are the same
        differ = max(error.stderr, self.usual_share * error.mean)
        is_unlike = error.mean <= self.budget and differ > UNLIKE * error.mean
        return is_ahead and (is_unlike or abs(error.mean - self.budget) <= reach)

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
        most = self.problem.most_error(options, self.budget)
        is_within = self._held(error) <= most * (1.0 + ROUNDING)
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
        return "".join(self._codes[option] for option in options)

    def _plan(self, code: str) -> Options:
        """Return the plan of a text."""
        return tuple(self._alphabet[ord(one) - FIRST_CODE] for one in code)
