"""The stage: prices of every layer and option -> the plan to propose, and what was looked at."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from autoprec.common.progress import Progress, report_nothing
from autoprec.common.text import percent, short_digest, significant
from autoprec.errors import InfeasibleError
from autoprec.predict.transfer import sensitivity_basis, unknown_sensitivity
from autoprec.records.cost import Profile
from autoprec.records.model import Basis, LayerSpec
from autoprec.records.plan import Constraint, FrontPoint, Search, SearchTrial
from autoprec.records.sensitivity import Sensitivity
from autoprec.search.correction import Cells, Correction, Seen, fit_correction, seen_beside, telling
from autoprec.search.costs import make_costs
from autoprec.search.explore import EXCESS, explore
from autoprec.search.notes import BUDGET_IS
from autoprec.search.problem import Options, Problem, exact, front, make_problem
from autoprec.search.solver import ROUNDING, unbeaten
from autoprec.search.storage import open_study
from autoprec.search.study import DEVIATIONS, FEW_TRIALS, Measure, PlanStudy, rank
from autoprec.search.workers import Team
from autoprec.sensitivity.gap import CEILING, HORIZON_STEPS, grad_error_budget_for, growth

HOLD_TRIES = 5
NEXT_ERROR = 0.7  # a refuted plan is followed by one with at most this share of its error
MOST_RANKED = 3  # beside the uniform plans
PASSES_PER_PLAN = 2  # of a joint measurement, where the step time here is not known
# Plans that are measured at most by default, beside FEW_TRIALS of other models: 24 more take some
# seconds of one core there, and searches stop before where none can win.
TRIALS_OF_SMALL = 36
SMALL = 2e8  # multiply-adds of the layers' forward passes
CALL = 5e6  # what a call itself takes, in multiply-adds
CUT = 3.0  # a budget that is divided by less needs no word


def search_plan(
    profile: Profile,
    sensitivity: Sensitivity,
    *,
    constraint: Constraint,
    evaluate: Measure | None,
    trials: int | None = None,
    time_budget_s: float | None = None,
    seed: int = 0,
    storage: str | None = None,
    study_name: str = "autoprec",
    team: Team | None = None,
    progress: Progress = report_nothing,
    clock: Callable[[], float] = time.monotonic,
) -> Search:
    """Find the plan of least time to loss within the constraint.

    The exact knapsack over the tables comes first; an Optuna study then evaluates whole plans by
    their joint gradient error. The same tables, seed and fresh storage give the same plan.

    `evaluate` measures a whole plan's gradient error on so many batches; None: the sum of the parts
    stands for it. Up to `trials` plans (else `default_trials`) are measured beside the seeds, an
    earlier run's included, and none is begun after `time_budget_s` seconds of `clock`, but to end a
    repair. `storage` is the study's database URL, None for memory; a study of other tables is left
    alone. With a `team` other processes are on the study too: what they evaluate counts.

    Raises:
        InfeasibleError: no plan satisfies the constraint.
        RecordError: a layer has no price, a keep matches nothing, the storage cannot be used.
    """
    trials = default_trials(profile.model.layers) if trials is None else trials
    known = _solve_tables(profile, sensitivity, constraint, is_measured=bool(evaluate and trials))
    digest = known.digest(seed, evaluate is None)
    end_s = math.inf if time_budget_s is None else clock() + time_budget_s
    with open_study(storage, study_name, tables=digest, team=team) as (opened, claims):
        own = (evaluate, seed, trials, lambda: clock() >= end_s, claims)
        study = PlanStudy(
            opened, known.problem, known.bases, known.budget, *own, known.before, known.scale
        )
        interacting, notes = _explored(study, known.exact, progress)
        best = study.best or (study.estimate(known.exact) if claims.is_worker else None)
    if best is None:
        raise InfeasibleError(_all_over_budget(study))
    notes = (*notes, *_ceiling_notes(sensitivity, known.budget))
    notes = (*notes, *_early_notes(sensitivity, constraint))
    return _search_record(study, best, profile, known, interacting, notes)


def sensitivity_for(
    profile: Profile, sensitivity: Sensitivity, constraint: Constraint
) -> Sensitivity:
    """Return the sensitivity to search with: FP32 between all layers only where that pays.

    It costs a step what attention and the like take in FP32, which the profile knows, and any plan
    pays it or none: by the tables the plan of least time to loss, with it or without, says which.
    """
    without = sensitivity.without_fp32_between()
    if without is sensitivity:
        return sensitivity

    def least(found: Sensitivity) -> tuple[float, float]:
        problem = make_problem(make_costs(profile, found), constraint)
        problem = replace(problem, ceiling=CEILING / growth(found))
        try:
            (plan, _), _ = _exact_within(problem, grad_error_budget(found, constraint), None)
        except InfeasibleError:
            return math.inf, math.inf
        return problem.rank(plan)

    return min(sensitivity, without, key=least)


def check_memory(profile: Profile, constraint: Constraint) -> None:
    """Check that a plan can fit, before anything is measured of its error (InfeasibleError)."""
    costs = make_costs(profile, unknown_sensitivity(profile.model))
    front(make_problem(costs, constraint.model_copy(update={"keep": ()})))


def default_trials(layers: Sequence[LayerSpec]) -> int:
    """Return how many plans to measure beside the seeds: more where a pass takes no time."""
    work = 0.0
    for layer in layers:
        if layer.output_elements is None and layer.calls:
            return FEW_TRIALS  # how much it computes is not known
        inputs = (p.numel / max(p.shape[0], 1) for p in layer.parameters if p.shape)
        work += layer.calls_per_step * CALL
        work += (layer.output_elements or 0) * max(inputs, default=0.0)
    return TRIALS_OF_SMALL if work <= SMALL else FEW_TRIALS


@dataclass(frozen=True)
class _Solved:
    """What the tables say before any plan is evaluated."""

    problem: Problem
    budget: float
    before: tuple[Seen, ...]  # plans that were measured with the table
    scale: Correction | None  # by them, where no others are measured
    exact: Options
    expected: Options  # were every gain sure
    bound_ms: float  # of any plan's step time
    free: Options | None  # the exact plan without what is kept, where something is
    front: tuple[Options, ...]  # and the exact plan

    @property
    def bases(self) -> tuple[Options, ...]:
        """The front and the uniform plans, by increasing gradient error."""
        uniform = filter(self.problem.fits_memory, self.problem.uniform_plans)
        costs, found = self.problem.costs, dict.fromkeys((*self.front, *uniform))
        return tuple(sorted(found, key=lambda plan: (costs.grad_error(plan), costs.step_ms(plan))))

    def digest(self, seed: int, is_table: bool) -> str:
        """Return a digest of all that decides what a study's trials mean."""
        problem, before = self.problem, [repr(self.before)] if self.before else []
        tables = repr((problem.costs, problem.allowed, problem.memory_bytes, problem.ceiling))
        return short_digest(tables, self.budget, seed, is_table, *before)


def _solve_tables(
    profile: Profile, sensitivity: Sensitivity, constraint: Constraint, *, is_measured: bool
) -> _Solved:
    costs = make_costs(profile, sensitivity)
    before = seen_beside(costs, sensitivity)
    # where no plan is measured, what was measured with the table is all there is
    others = telling(costs, before)
    scale = fit_correction(Cells(costs), others) if others and not is_measured else None
    costs = scale.costs if scale else costs
    problem = make_problem(costs, constraint)
    budget = grad_error_budget(sensitivity, constraint)
    problem = replace(problem, ceiling=CEILING / growth(sensitivity))
    found, limit = _exact_within(problem, budget, scale)
    hopeful = exact(make_problem(costs.without_margins(), constraint), limit) or found
    unkept = constraint.model_copy(update={"keep": ()})
    free = exact(make_problem(costs, unkept), limit) if constraint.keep else None
    return _Solved(
        problem=problem,
        budget=budget,
        before=before,
        scale=scale,
        exact=found[0],
        expected=hopeful[0],
        bound_ms=hopeful[1],
        free=free[0] if free else None,
        front=tuple(dict.fromkeys((*front(problem, budget), found[0]))),
    )


def _exact_within(
    problem: Problem, budget: float, scale: Correction | None
) -> tuple[tuple[Options, float], float]:
    """Return the exact plan, its bound, and the budget of its sum, which is less with a `scale`.

    It is then that of a plan which keeps the budget with the error of the correction; less too
    where the whole error of the plan would be above the ceiling.
    """
    if (found := exact(problem, budget)) is None:
        raise InfeasibleError(_infeasible(problem, budget))
    limit = budget
    for _ in range(HOLD_TRIES):
        plan, most = found[0], problem.most_error(found[0], budget)
        held = scale.guess(plan).high(DEVIATIONS) if scale else problem.costs.grad_error(plan)
        if held <= most * (1 + ROUNDING) or (nearer := exact(problem, limit * most / held)) is None:
            break
        found, limit = nearer, limit * most / held
    return found, limit


def _explored(
    study: PlanStudy, exact_plan: Options, progress: Progress
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Evaluate plans until there is nothing left to do here; return what `explore` found last."""
    if study.claims.is_worker:
        study.claims.check_reference()
    while True:
        found = explore(study, exact_plan, progress=progress)
        # what others are at counts, and is done here where they are killed
        if not study.wait_for_others():
            return found


def _search_record(
    study: PlanStudy,
    best: SearchTrial,
    profile: Profile,
    known: _Solved,
    interacting: tuple[str, ...],
    notes: Sequence[str],
) -> Search:
    by_error = sorted(known.front, key=study.problem.costs.grad_error)
    return Search(
        structure=profile.model.structure,
        grad_error_budget=study.budget,
        front=tuple(map(study.point, by_error)),
        exact=study.point(known.exact),
        bound_ms=known.bound_ms,
        chosen=study.point(best.options),
        ranked=tuple(study.point(plan) for plan in _ranked(study, best)),
        trials=tuple(study.known.values()),
        seed=study.seed,
        step_equivalents=_step_equivalents(study, profile),
        duplicates_skipped=study.duplicates,
        interacting=interacting,
        expected=None if known.expected == known.exact else study.point(known.expected),
        free=study.point(known.free) if known.free else None,
        measured_front=measured_front(study),
        notes=(*notes, *(_table_notes(study, best) if study.budget else ())),
    )


def grad_error_budget(sensitivity: Sensitivity, constraint: Constraint) -> float:
    """Return the largest gradient error allowed: as given, or what the loss tolerance leaves.

    The tolerance is read as the loss gap at the end of the planned run with the plan from its first
    step; where nobody said how long that is, of HORIZON_STEPS. Verification measures at that step,
    but with the plan in the last third only, so the budget is on the safe side of it. Whatever is
    asked for, at its largest no plan's error is above the CEILING.
    """
    most = CEILING / growth(sensitivity)
    if constraint.grad_error_budget is not None:
        return min(constraint.grad_error_budget, most)
    if sensitivity_basis(sensitivity) is Basis.UNKNOWN:
        return 0.0  # nothing is known that could be spent: every error counts as 0, the locks hold
    steps = constraint.run_steps or HORIZON_STEPS
    return min(grad_error_budget_for(sensitivity, constraint.loss_tolerance, steps), most)


def between_notes(sensitivity: Sensitivity, searched: Sensitivity) -> tuple[str, ...]:
    """Return that plans have no FP32 between layers, where that was found to help, else nothing."""
    if searched is sensitivity:
        return ()
    error = percent(sum(island.grad_error for island in sensitivity.islands))
    return (
        f"BF16 between layers has a gradient error of {error} alone "
        f"({sensitivity_basis(sensitivity)}); FP32 there costs more in time than that is worth",
    )


def _ceiling_notes(sensitivity: Sensitivity, budget: float) -> list[str]:
    if budget < CEILING / growth(sensitivity):
        return []
    return [
        f"whatever the loss tolerance, no plan has a gradient error above {percent(CEILING)} at "
        "its largest: beyond, quantised training stops being effective (arXiv 2505.19115)"
    ]


def _early_notes(sensitivity: Sensitivity, constraint: Constraint) -> list[str]:
    """Return by how much what FP8 did early in the run cuts the budget, where that is a lot."""
    *early, last = sensitivity.by_step or (None,)
    if not early or last is None or constraint.grad_error_budget is not None:
        return []
    steps = constraint.run_steps or HORIZON_STEPS
    now = sensitivity.model_copy(update={"by_step": (last,)})
    times = growth(sensitivity, most=CEILING, steps=steps) / growth(now)
    if times < CUT:
        return []
    worst = max(early, key=lambda point: point.grad_error.mean)
    return [
        f"{BUDGET_IS}divided by {significant(times, 2)} for errors early in the run: FP8's was "
        f"{percent(worst.grad_error.mean)} after {worst.step} steps, and "
        f"{percent(last.grad_error.mean)} after {last.step}"
    ]


def measured_front(study: PlanStudy) -> tuple[FrontPoint, ...]:
    """Return the measured plans that no other beats in sure time, gradient error and bytes."""
    points = [study.point(options) for options in study.known]
    measured = [point for point in points if point.grad_error_measured is not None]

    def cost(point: FrontPoint) -> tuple[float, float, int]:
        counted_ms = study.problem.costs.counted_ms(point.options)
        return point.grad_error_measured or 0.0, counted_ms, point.memory_bytes or 0

    return tuple(unbeaten(measured, cost))


def _ranked(study: PlanStudy, best: SearchTrial) -> list[Options]:
    """Return the plans to try after the chosen one: each with clearly less error, down to FP32.

    Uniform BF16 O2 is among them wherever it has less error than the plan before it.
    Bases that were not measured are ranked by the table.
    """
    unknown = (base for base in study.bases if base not in study.known)
    plans = [*study.known.values(), *map(study.estimate, unknown)]
    last, others = best, 0
    found: list[Options] = []
    for plan in sorted((p for p in plans if p.feasible), key=rank):
        is_uniform = plan.options in study.problem.uniform_plans
        is_safe = is_uniform and plan.grad_error < last.grad_error
        is_less = last.grad_error > 0.0 and plan.grad_error <= NEXT_ERROR * last.grad_error
        if is_safe or (is_less and others < MOST_RANKED):
            found.append(plan.options)
            others += not is_safe
            last = plan
    return found


def _step_equivalents(study: PlanStudy, profile: Profile) -> float:
    """Return the cost of the measurements, in FP32 training steps."""
    step = profile.step("fp32")
    if step is None or profile.basis is not Basis.MEASURED or step.timing.median_ms <= 0.0:
        return float(PASSES_PER_PLAN * study.measured)
    return study.spent_s * 1e3 / step.timing.median_ms


def _table_notes(study: PlanStudy, best: SearchTrial) -> list[str]:
    summed = study.problem.costs.grad_error(best.options)
    if best.grad_error_basis is not Basis.MEASURED:
        beyond = "; it keeps the budget with the error that one joint measurement leaves"
        return [
            "the gradient error of whole plans is the sum of the table's: none was measured, as "
            f"the model was not run for the search{beyond if best.grad_error_stderr else ''}"
        ]
    if summed > 0.0 and best.grad_error > EXCESS * summed:
        return [
            f"the chosen plan's joint gradient error is {percent(best.grad_error)}, above the sum "
            f"of its parts ({percent(summed)}) and within the budget of {percent(study.budget)}"
        ]
    return []


def _infeasible(problem: Problem, budget: float) -> str:
    least = min(problem.costs.grad_error(plan) for plan in front(problem))
    most, own = _apart(budget, least)
    return (
        f"a plan's gradient error must be at most {most} for this loss tolerance, but the most "
        f"precise plan that is left to choose has {own}; {_way_out(problem)}"
    )


def _all_over_budget(study: PlanStudy) -> str:
    most, own = _apart(study.budget, min(plan.grad_error for plan in study.known.values()))
    return (
        f"a plan's joint gradient error must be at most {most} for this loss tolerance, but the "
        f"least of the {len(study.known)} plans measured is {own}; {_way_out(study.problem)}"
    )


def _apart(*shares: float) -> list[str]:
    """Return shares as percent, with as many digits as tell the one from the other."""
    texts = ([f"{significant(100.0 * x, digits)} %" for x in shares] for digits in range(2, 17))
    return next((each for each in texts if len(set(each)) > 1), [*map(percent, shares)])


def _way_out(problem: Problem) -> str:
    """Name the settings that leave out more precise plans."""
    ways = ["raise --loss-tolerance"]
    ways += ["raise --memory"] if problem.memory_bytes else []
    ways += ["drop a --keep"] if problem.keeps.of_layer else []
    return " or ".join(ways)
