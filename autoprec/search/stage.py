"""The stage: prices of every layer and option -> the plan to propose, and what was looked at."""

import hashlib
import time
from collections.abc import Callable, Sequence
from functools import partial

from autoprec.common.progress import Progress, report_nothing
from autoprec.common.text import percent
from autoprec.errors import InfeasibleError
from autoprec.predict.transfer import sensitivity_basis
from autoprec.records import (
    BF16_O2,
    FP32,
    Basis,
    Constraint,
    FrontPoint,
    Profile,
    Search,
    Sensitivity,
)
from autoprec.search.costs import make_costs
from autoprec.search.evaluator import Clock, EvaluatedPlan, Measure, PlanEvaluator
from autoprec.search.explore import EXCESS, evaluate_seeds, needs_repair, repair, walk_front
from autoprec.search.problem import Options, Problem, exact, front, make_problem
from autoprec.search.space import make_space
from autoprec.search.storage import open_study
from autoprec.search.study import StudyLog
from autoprec.sensitivity.gap import HORIZON_STEPS, grad_error_budget_for

NEXT_ERROR = 0.7  # a refuted plan is followed by one with at most this share of its error
MOST_RANKED = 3  # beside the uniform plans
PASSES_PER_PLAN = 2  # of a joint measurement, where the step time here is not known


def search_plan(
    profile: Profile,
    sensitivity: Sensitivity,
    *,
    constraint: Constraint,
    evaluate: Measure | None,
    trials: int = 12,
    time_budget_s: float | None = None,
    seed: int = 0,
    storage: str | None = None,
    study_name: str = "autoprec",
    progress: Progress = report_nothing,
    clock: Clock = time.monotonic,
) -> Search:
    """Find the plan of least time to loss within the constraint.

    The exact knapsack over the tables comes first; an Optuna study then evaluates whole plans by
    their joint gradient error. The same tables, seed and fresh storage give the same plan.

    Args:
        profile: the times and bytes of every layer and option, and the model.
        sensitivity: the gradient error of every layer and option, and the loss curve.
        constraint: the loss tolerance (or an error budget), a memory limit, and what is kept.
        evaluate: measures a whole plan's gradient error; None: the sum of the parts stands for it.
        trials: how many sampled plans are measured, those of an earlier run of the study included.
        time_budget_s: no trial is begun after it; a repair under way is finished.
        seed: of the sampler.
        storage: database URL of the study; None keeps it in memory.
        study_name: of the study; one of other tables is left alone.
        progress: called with every whole plan.
        clock: seconds, for the time budget.

    Raises:
        InfeasibleError: no plan satisfies the constraint, or the loss curve gives no budget.
        RecordError: a layer has no price, a keep matches nothing, the storage cannot be used.
    """
    problem = make_problem(make_costs(profile, sensitivity), constraint)
    budget = grad_error_budget(sensitivity, constraint)
    exact_plan, bound_ms = _exact_plan(problem, budget)
    plans = front(problem, budget)
    evaluator = PlanEvaluator(problem, budget=budget, measure=evaluate)
    tables = _digest(problem, evaluator, seed)
    is_over = partial(_is_over, clock, clock(), time_budget_s)
    with open_study(storage, study_name, tables=tables) as study:
        space = make_space(problem, (*plans, exact_plan))
        log = StudyLog(study, space, evaluator, seed=seed)
        interacting, notes = _explore(
            log, exact_plan, trials=trials, is_over=is_over, progress=progress
        )
    best = evaluator.best
    if best is None:
        raise InfeasibleError(_all_over_budget(evaluator))
    point = partial(_point, evaluator)
    return Search(
        structure=profile.model.structure,
        grad_error_budget=budget,
        front=tuple(
            map(point, sorted(dict.fromkeys((*plans, exact_plan)), key=problem.costs.grad_error))
        ),
        exact=point(exact_plan),
        bound_ms=bound_ms,
        chosen=point(best.options),
        ranked=tuple(point(plan) for plan in _ranked(evaluator, best, space.bases)),
        trials=tuple(log.trials),
        seed=seed,
        step_equivalents=_step_equivalents(evaluator, profile),
        duplicates_skipped=log.duplicates,
        trials_asked=trials or None,
        interacting=interacting,
        notes=(*notes, *(_table_notes(evaluator, best) if budget else ())),
    )


def grad_error_budget(sensitivity: Sensitivity, constraint: Constraint) -> float:
    """Return the largest gradient error allowed: as given, or what the loss tolerance leaves.

    The tolerance is read as the loss gap at the end of a run of HORIZON_STEPS with the plan from
    its first step. Verification measures at that step, but with the plan in the last third only, so
    the budget is on the safe side of it.
    """
    if constraint.grad_error_budget is not None:
        return constraint.grad_error_budget
    if sensitivity_basis(sensitivity) is Basis.UNKNOWN:
        return 0.0  # nothing is known that could be spent: every error counts as 0, the locks hold
    return grad_error_budget_for(sensitivity, constraint.loss_tolerance, HORIZON_STEPS)


def _exact_plan(problem: Problem, budget: float) -> tuple[Options, float]:
    """Return the soonest additive plan within the budget, and the bound of the step time."""
    found = exact(problem, budget)
    if found is None:
        raise InfeasibleError(_infeasible(problem, budget))
    return found


def _is_over(clock: Clock, started: float, time_budget_s: float | None) -> bool:
    return time_budget_s is not None and clock() - started >= time_budget_s


def _explore(
    log: StudyLog,
    exact_plan: Options,
    *,
    trials: int,
    is_over: Callable[[], bool],
    progress: Progress,
) -> tuple[tuple[str, ...], list[str]]:
    """Evaluate whole plans; return the layers found interacting and what was done about them."""

    def report(done: int) -> None:
        progress("search: whole plans", done, trials)

    plan = evaluate_seeds(log, exact_plan, is_over=is_over)
    walk_front(log, plan, is_over=is_over)
    interacting: tuple[str, ...] = ()
    notes: list[str] = []
    if needs_repair(plan) and not is_over():
        interacting, repaired = repair(log, plan)
        notes.append(_repair_note(plan, interacting, repaired))
    log.sample(trials, is_over=is_over, report=report)
    return interacting, notes


def _ranked(
    evaluator: PlanEvaluator, best: EvaluatedPlan, bases: Sequence[Options]
) -> list[Options]:
    """Return what to try after the chosen plan: each with clearly less error, down to FP32.

    Uniform BF16 O2 is among them wherever it has less error than the plan before it.
    Bases that were not measured are ranked by the table.
    """
    uniform = [evaluator.problem.uniform(option) for option in (BF16_O2, FP32)]
    unknown = (base for base in bases if base not in evaluator.known)
    plans = [*evaluator.known.values(), *map(evaluator.estimate, unknown)]
    last, others = best, 0
    found: list[Options] = []
    for plan in sorted((p for p in plans if p.is_feasible), key=lambda plan: plan.rank):
        is_safe = plan.options in uniform and plan.grad_error < last.grad_error
        is_next = (
            plan.grad_error <= NEXT_ERROR * last.grad_error
            and others < MOST_RANKED
            and last.grad_error > 0.0
        )
        if is_safe or is_next:
            found.append(plan.options)
            others += not is_safe
            last = plan
    return found


def _point(evaluator: PlanEvaluator, options: Options) -> FrontPoint:
    known = evaluator.known.get(options)
    is_measured = known is not None and known.basis is Basis.MEASURED
    return evaluator.problem.point(
        options, grad_error_measured=known.grad_error if known and is_measured else None
    )


def _digest(problem: Problem, evaluator: PlanEvaluator, seed: int) -> str:
    """Return a hash of all that decides what a study's trials mean."""
    costs = problem.costs
    parts: list[object] = [
        costs.outside_fp32,
        costs.outside_bf16,
        evaluator.budget,
        problem.memory_bytes,
    ]
    parts += [evaluator.measure is None, seed]
    for layer, prices, allowed in zip(costs.layers, costs.prices, problem.allowed, strict=True):
        parts.append((layer.name, layer.shape_key, layer.tied_to))
        parts += [(option.key, price) for option, price in prices.items() if option in allowed]
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()


def _step_equivalents(evaluator: PlanEvaluator, profile: Profile) -> float:
    """Return what the measurements took, in FP32 training steps."""
    step = profile.step("fp32")
    if step is None or profile.basis is not Basis.MEASURED or step.timing.median_ms <= 0.0:
        return float(PASSES_PER_PLAN * evaluator.measured)
    return evaluator.spent_s * 1e3 / step.timing.median_ms


def _repair_note(
    broken: EvaluatedPlan, interacting: Sequence[str], repaired: EvaluatedPlan | None
) -> str:
    found = (
        f"the joint gradient error of the exact plan is {percent(broken.grad_error)}, "
        f"{broken.grad_error / max(broken.table_grad_error, 1e-300):.1f}x the sum of its parts"
    )
    if not interacting:
        return f"{found}; bisection finds no few layers behind it, so a plan with less was tried"
    blamed = f"{found}; bisection found {', '.join(interacting)} interacting"
    if repaired is None:
        return f"{blamed}, but no plan without it was feasible"
    return (
        f"{blamed}; the nearest feasible plan has it more precise: gradient error "
        f"{percent(repaired.grad_error)}, {repaired.step_ms:.4g} ms instead of "
        f"{broken.step_ms:.4g} ms"
    )


def _table_notes(evaluator: PlanEvaluator, best: EvaluatedPlan) -> list[str]:
    if best.basis is not Basis.MEASURED:
        return [
            "the gradient error of whole plans is the sum of the table's: no workload was there to "
            "measure them"
        ]
    if best.table_grad_error > 0.0 and best.grad_error > EXCESS * best.table_grad_error:
        return [
            f"the chosen plan's joint gradient error is {percent(best.grad_error)}, above the sum "
            f"of its parts ({percent(best.table_grad_error)}) and within the budget of "
            f"{percent(evaluator.budget)}"
        ]
    return []


def _infeasible(problem: Problem, budget: float) -> str:
    least = min(problem.costs.grad_error(plan) for plan in front(problem))
    return (
        f"a plan's gradient error must be at most {percent(budget)} for this loss tolerance, but "
        f"with what is kept the most precise plan has {percent(least)}; raise --loss-tolerance "
        "or drop a --keep"
    )


def _all_over_budget(evaluator: PlanEvaluator) -> str:
    least = min(plan.grad_error for plan in evaluator.known.values())
    return (
        f"a plan's joint gradient error must be at most {percent(evaluator.budget)} for this loss "
        f"tolerance, but the least of the {len(evaluator.known)} plans measured is "
        f"{percent(least)}; raise --loss-tolerance or drop a --keep"
    )
