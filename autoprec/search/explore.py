"""Which whole plans to evaluate, in which order.

1. FP32 (free: it is the reference), the exact plan of the budget, uniform BF16 O2
2. along the front: the sum of the parts is corrected by the ratio that the last measurement
showed, and the base that then promises the least time to loss is evaluated, until it is one
that was before
3. repair, where the exact plan's joint error breaks the budget that the sum of its parts kept
4. the sampler
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from autoprec.common.text import percent
from autoprec.records import Option, SearchTrial
from autoprec.search.problem import Group, Options, Problem, exact, item_of, precision_rank
from autoprec.search.study import PlanStudy

WALK_STEPS = 4
EXCESS = 1.25  # joint error over the sum of its parts from which layers are looked for
SHARE = 0.5  # of the excess, that the layers found must take away at each halving
REPAIR_TRIES = 3

Suspect = TypeVar("Suspect")


def explore(study: PlanStudy, exact_plan: Options) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Evaluate the seeds, walk and repair; return the interacting layers, and notes on them."""
    plan = _evaluate_seeds(study, exact_plan)
    _walk_front(study, plan)
    # only where the parts do more together than apart is there something to find
    is_as_summed = plan.grad_error <= EXCESS * study.problem.costs.grad_error(plan.options)
    if plan.feasible or is_as_summed or study.is_over():
        return (), ()
    interacting, repaired = _repair(study, plan)
    return interacting, (_repair_note(study, plan, interacting, repaired),)


def _evaluate_seeds(study: PlanStudy, exact_plan: Options) -> SearchTrial:
    """Evaluate the plans that every search looks at; return the exact one."""
    fp32, bf16 = study.problem.uniform_plans
    if fp32 in study.space.bases:
        study.evaluate(fp32, source="uniform")
    evaluated = study.evaluate(exact_plan, source="exact")
    if bf16 in study.space.bases and not study.is_over():
        study.evaluate(bf16, source="uniform")
    return evaluated


def _walk_front(study: PlanStudy, plan: SearchTrial) -> None:
    """Evaluate the most promising base again and again, as measurements correct the table."""
    costs = study.problem.costs
    for _ in range(WALK_STEPS):
        summed = costs.grad_error(plan.options)
        ratio = plan.grad_error / summed if summed > 0.0 else 1.0
        errors = {options: ratio * costs.grad_error(options) for options in study.space.bases}
        times = {
            options: costs.counted_ms(options) * (1.0 + error)
            for options, error in errors.items()
            if error <= study.budget
        }
        best = min(times, key=lambda options: times[options], default=None)
        if best is None or best in study.known or study.is_over():
            return
        plan = study.evaluate(best, source="exact")


def _repair(study: PlanStudy, broken: SearchTrial) -> tuple[tuple[str, ...], SearchTrial | None]:
    """Find the layers that make a joint error exceed the sum, and the nearest feasible plan.

    Finds nothing when the excess is spread over many layers.
    """
    problem = study.problem

    def excess_of(plan: SearchTrial) -> float:
        return plan.grad_error - problem.costs.grad_error(plan.options)

    def excess_without(groups: Sequence[Group]) -> float:
        precise = _made_precise(problem, broken.options, groups)
        return excess_of(study.evaluate(precise, source="repair"))

    suspects = _more_precise(problem, broken.options)
    interacting = find_interacting(suspects, excess_of(broken), excess_without)
    names = tuple(problem.costs.layers[i].name for group in interacting for i in group.layers)
    return names, _solved_with(study, interacting) if interacting else None


def find_interacting(
    suspects: Sequence[Suspect], excess: float, excess_without: Callable[[Sequence[Suspect]], float]
) -> tuple[Suspect, ...]:
    """Return the few suspects that account for an excess, by bisection; () when it is spread.

    Half of the suspects are made more precise and the whole plan is evaluated again; the half that
    takes more of the excess away is searched on. Costs two evaluations per halving.

    `excess` is joint error minus the sum of the parts; `excess_without` is the same with these
    suspects made more precise. The order of `suspects` keeps neighbours together.
    """
    interacting = tuple(suspects)
    while len(interacting) > 1:
        middle = len(interacting) // 2
        halves = (interacting[:middle], interacting[middle:])
        removed = [excess - excess_without(half) for half in halves]
        worst = max(range(2), key=lambda side: removed[side])
        if removed[worst] < SHARE * excess:
            break
        interacting = halves[worst]
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


def _made_precise(problem: Problem, options: Options, groups: Sequence[Group]) -> Options:
    """Return the plan with these groups in the fastest of their choices."""
    chosen: list[Option] = list(options)
    for group in groups:
        choice = min(group.choices, key=lambda c: item_of(problem.costs, group.layers, c).ms)
        for index, option in zip(group.layers, choice, strict=True):
            chosen[index] = option
    return problem.follow_uncalled(tuple(chosen))


def _solved_with(study: PlanStudy, limited: Sequence[Group]) -> SearchTrial | None:
    """Solve again with some groups limited to their choices here, at smaller budgets while over."""
    instead = {group.layers: group for group in limited}
    groups = tuple(instead.get(group.layers, group) for group in study.problem.groups)
    problem = replace(study.problem, groups=groups)
    budget = study.budget
    for _ in range(REPAIR_TRIES):
        if (found := exact(problem, budget)) is None:
            return None
        plan = study.evaluate(found[0], source="repair")
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
