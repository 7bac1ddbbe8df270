"""Which whole plans to evaluate, in which order.

1. FP32 (free: it is the reference), the exact plan of the budget, uniform BF16 O2, and what the
table was checked with, FP8 wherever it goes, if that keeps the budget: the table may be too high
2. repair, where the exact plan's joint error breaks the budget that the sum of its parts kept
3. the plan that promises most: from those that are best on the table as the measured plans correct
it and on tables drawn from what they may be, and from the best one measured, on by changes of one
and two groups; where none can win any more, plans of the front where it is least known

Steps 2 and 3 share the trials asked for. Where nothing can be measured the exact plan is the answer
to the table, and the seeds are all.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from autoprec.common.progress import Progress
from autoprec.common.text import percent
from autoprec.records import SearchTrial
from autoprec.search.correction import Correction
from autoprec.search.problem import Group, Options, Problem, exact, precision_rank
from autoprec.search.study import FRONT, PlanStudy

FRONT_FROM, FRONT_TO = 0.05, 2.0  # of the budget: the gradient errors between which the front is
FRONT_GAP = 0.2  # of log e: a front that is denser tells nothing new
EXCESS = 1.25  # joint error over the sum of its parts from which layers are looked for
ALL = 0.9  # of the excess, that a half takes away with which the other need not be tried
SHARE = 0.5  # of the excess, that the layers found must take away at each halving
REPAIR_TRIES = 3

Suspect = TypeVar("Suspect")


def explore(
    study: PlanStudy, exact_plan: Options, *, progress: Progress
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Evaluate the seeds, repair and sample; return the interacting layers, and notes on them."""
    plan = _evaluate_seeds(study, exact_plan)
    interacting: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    # only where the parts do more together than apart is there something to find
    is_broken = plan is not None and not plan.feasible
    if plan and is_broken and not (study.claims.is_worker or study.is_over()):
        suspects = _more_precise(study.problem, plan.options)
        is_more = plan.grad_error > EXCESS * study.problem.costs.grad_error(plan.options)
        if is_more and study.left > 2:
            interacting, repaired = _repair(study, plan, suspects)
            notes = (_repair_note(study, plan, interacting, repaired),)
    if study.measure is not None:
        _sample(study, progress=progress)
    return interacting, notes


def _evaluate_seeds(study: PlanStudy, exact_plan: Options) -> SearchTrial | None:
    """Evaluate the plans that every search looks at; return the exact one."""
    fp32, bf16 = study.problem.uniform_plans
    if fp32 in study.bases:
        study.evaluate(fp32, source="uniform")
    evaluated = study.evaluate(exact_plan, source="exact")
    if bf16 in study.bases and not study.is_over():
        study.evaluate(bf16, source="uniform")
    for seen in study.before:
        plan = study.moves.nearest(seen.options)
        if study.may_win(plan, seen) and not study.is_over():
            study.evaluate(plan, source="checked")
    return evaluated


def _sample(study: PlanStudy, *, progress: Progress) -> None:
    """Evaluate more plans until as many as were asked for are measured, or none can win."""
    while not study.is_over():
        study.take_up()
        progress("search: whole plans", study.sampled, study.most)
        if study.left <= 0:
            break
        correction = study.correction()
        if study.improve(correction):
            continue
        # what others find may show a plan that can win: that is waited for first
        if study.has_others or not _fill_front(study, correction):
            break


def _fill_front(study: PlanStudy, correction: Correction) -> bool:
    """Evaluate the plan of the front that is farthest from what was evaluated, if there is any.

    It is one that could follow a refuted plan: with an error of the budget's size.
    """
    if study.budget <= 0.0:
        return False
    known = [plan.grad_error for plan in study.known.values()]
    errors = {base: correction.guess(base).grad_error for base in study.bases}
    gaps = {
        base: min((abs(math.log(error / other)) for other in known if other > 0.0), default=0.0)
        for base, error in errors.items()
        if FRONT_FROM <= error / study.budget <= FRONT_TO and not study.is_taken(base)
    }
    if max(gaps.values(), default=0.0) < FRONT_GAP:
        return False
    study.evaluate(max(gaps, key=lambda base: gaps[base]), source=FRONT)
    return True


def _repair(
    study: PlanStudy, broken: SearchTrial, suspects: Sequence[Group]
) -> tuple[tuple[str, ...], SearchTrial | None]:
    """Find the layers that make a joint error exceed the sum, and the nearest feasible plan.

    Finds nothing when the excess is spread over many layers.
    """
    problem = study.problem

    def excess_of(plan: SearchTrial) -> float:
        return plan.grad_error - problem.costs.grad_error(plan.options)

    def excess_without(groups: Sequence[Group]) -> float:
        precise = problem.follow_uncalled(problem.with_fastest(broken.options, groups))
        return excess_of(study.wait_for(precise, source="repair"))

    most = study.left - 1  # one is left for the plan without them
    interacting = find_interacting(suspects, excess_of(broken), excess_without, most)
    names = tuple(problem.costs.layers[i].name for group in interacting for i in group.layers)
    return names, _solved_with(study, interacting) if interacting else None


def find_interacting(
    suspects: Sequence[Suspect],
    excess: float,
    excess_without: Callable[[Sequence[Suspect]], float],
    most: int,
) -> tuple[Suspect, ...]:
    """Return the few suspects that account for an excess, by bisection; () when it is spread.

    Half of the suspects are made more precise and the whole plan is evaluated again; the half that
    takes more of the excess away is searched on. Costs one evaluation per halving where the first
    half takes nearly all of it, else two, and `most` in all: then what is left is what is known.

    `excess` is joint error minus the sum of the parts; `excess_without` is the same with these
    suspects made more precise. The order of `suspects` keeps neighbours together.
    """
    interacting = tuple(suspects)
    while len(interacting) > 1 and most >= 2:
        middle = len(interacting) // 2
        half, removed = interacting[:middle], excess - excess_without(interacting[:middle])
        most -= 1
        if removed < ALL * excess:
            other = excess - excess_without(interacting[middle:])
            most -= 1
            if other > removed:
                half, removed = interacting[middle:], other
        if removed < SHARE * excess:
            break
        interacting = half
    is_few = len(interacting) == 1 or len(interacting) <= len(suspects) // 4
    return interacting if is_few else ()


def _more_precise(problem: Problem, options: Options) -> list[Group]:
    """Return the groups that can do without FP8 (without BF16 where there is none), and how."""
    worst = max(map(precision_rank, options))
    found = []
    for group in problem.groups:
        choices = [c for c in group.choices if max(map(precision_rank, c)) < worst]
        if choices and max(precision_rank(options[index]) for index in group.layers) == worst:
            found.append(Group(group.layers, tuple(choices)))
    return found


def _solved_with(study: PlanStudy, limited: Sequence[Group]) -> SearchTrial | None:
    """Solve again with some groups limited to their choices here, at smaller budgets while over."""
    instead = {group.layers: group for group in limited}
    groups = tuple(instead.get(group.layers, group) for group in study.problem.groups)
    problem = replace(study.problem, groups=groups)
    budget = study.budget
    for _ in range(min(REPAIR_TRIES, study.left)):
        if (found := exact(problem, budget)) is None:
            return None
        plan = study.wait_for(found[0], source="repair")
        if plan.feasible:
            return plan
        budget = study.budget * problem.costs.grad_error(plan.options) / plan.grad_error
    return None


def _repair_note(
    study: PlanStudy, broken: SearchTrial, interacting: Sequence[str], repaired: SearchTrial | None
) -> str:
    summed = max(study.problem.costs.grad_error(broken.options), 1e-300)
    found = (
        f"the joint gradient error of the exact plan is {percent(broken.grad_error)}, "
        f"{broken.grad_error / summed:.1f}x the sum of its parts"
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
