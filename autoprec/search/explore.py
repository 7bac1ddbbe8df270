"""Which whole plans to evaluate, in which order.

1. FP32 (free: it is the reference), the exact plan of the budget, uniform BF16 O2
2. the exact plan again, on the table as the measured plans correct it, until it is known
3. repair, where the exact plan's joint error breaks the budget that the sum of its parts kept
4. of exact plans on tables drawn from what they may be, and plans of Optuna's sampler, the one that
promises the most; where none can win any more, plans of the front where it is least known
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from autoprec.common.progress import Progress
from autoprec.common.text import percent
from autoprec.records import Option, SearchTrial
from autoprec.search.correction import Correction
from autoprec.search.costs import Costs
from autoprec.search.problem import Group, Options, Problem, exact, item_of, likely, precision_rank
from autoprec.search.study import FRONT, PlanStudy

WALK_STEPS = 4
DRAWS = 6  # of a table, for one plan to evaluate
MOST_CHANGED = 300  # plans near them, of which each is looked up in the corrected table
TRIES = 3  # without a plan that can win, before there is none
FRONT_FROM, FRONT_TO = 0.05, 2.0  # of the budget: the gradient errors between which the front is
FRONT_GAP = 0.2  # of log e: a front that is denser tells nothing new
CORRECTED = "corrected"
EXCESS = 1.25  # joint error over the sum of its parts from which layers are looked for
SHARE = 0.5  # of the excess, that the layers found must take away at each halving
REPAIR_TRIES = 3

Suspect = TypeVar("Suspect")
ProblemOf = Callable[[Costs], Problem]  # with other costs, and the same constraint


def explore(
    study: PlanStudy, exact_plan: Options, problem_of: ProblemOf
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Evaluate the seeds, walk and repair; return the interacting layers, and notes on them."""
    plan = _evaluate_seeds(study, exact_plan)
    if study.measure is not None:
        _walk(study, problem_of)
    # only where the parts do more together than apart is there something to find
    if plan is None or plan.feasible or study.claims.is_worker or study.is_over():
        return (), ()
    if plan.grad_error <= EXCESS * study.problem.costs.grad_error(plan.options):
        return (), ()
    interacting, repaired = _repair(study, plan)
    return interacting, (_repair_note(study, plan, interacting, repaired),)


def sample(study: PlanStudy, trials: int, problem_of: ProblemOf, *, progress: Progress) -> None:
    """Evaluate more plans until there are `trials` beside the seeds, the walk and the repair.

    Exact plans of tables drawn from what they may be (Thompson sampling) compete with plans of
    Optuna's sampler, by the expected improvement; where none can improve, the front is filled.
    """
    failed = 0
    while not study.is_over() and failed < TRIES:
        study.take_up()
        progress("search: whole plans", study.sampled, trials)
        if study.sampled >= trials:
            break
        correction, random = study.correction(), np.random.default_rng(study.seed + study.alive)
        drawn = _draw(study, correction, problem_of, random) if study.measure else []
        failed = 0 if study.improve(drawn, correction) else failed + 1
        if failed == TRIES and _fill_front(study, correction):
            failed = TRIES - 1


def _evaluate_seeds(study: PlanStudy, exact_plan: Options) -> SearchTrial | None:
    """Evaluate the plans that every search looks at; return the exact one."""
    fp32, bf16 = study.problem.uniform_plans
    if fp32 in study.space.bases:
        study.evaluate(fp32, source="uniform")
    evaluated = study.evaluate(exact_plan, source="exact")
    if bf16 in study.space.bases and not study.is_over():
        study.evaluate(bf16, source="uniform")
    return evaluated


def _walk(study: PlanStudy, problem_of: ProblemOf) -> None:
    """Evaluate the exact plan again and again, as measurements correct the table."""
    for _ in range(WALK_STEPS):
        found = exact(problem_of(study.correction().costs), study.held_budget)
        if found is None or study.is_taken(found[0]) or study.is_over():
            return
        study.evaluate(found[0], source=CORRECTED)


def _draw(
    study: PlanStudy, correction: Correction, problem_of: ProblemOf, random: np.random.Generator
) -> list[Options]:
    """Return exact plans of tables that may be the true one, and changes of them in one group."""
    tables = (correction.costs, *(correction.drawn(random) for _ in range(DRAWS)))
    price = study.best.time_to_loss_ms if study.best else 0.0
    found = (likely(problem_of(table), study.held_budget, price) for table in tables)
    plans = list(dict.fromkeys(plan for plan in found if plan))
    near = [plan for base in plans for plan in _changed(study.problem, base)]
    some = random.permutation(len(near))[:MOST_CHANGED]
    return [*plans, *(near[index] for index in some)]


def _changed(problem: Problem, options: Options) -> Iterator[Options]:
    """Yield the plans that differ in one group."""
    for group in problem.groups:
        own = tuple(options[index] for index in group.layers)
        for choice in group.choices:
            if choice != own:
                instead = dict(zip(group.layers, choice, strict=True))
                chosen = (instead.get(index, option) for index, option in enumerate(options))
                yield problem.follow_uncalled(tuple(chosen))


def _fill_front(study: PlanStudy, correction: Correction) -> bool:
    """Evaluate the plan of the front that is farthest from what was evaluated, if there is any.

    It is one that could follow a refuted plan: with an error of the budget's size.
    """
    if study.measure is None or study.budget <= 0.0:
        return False
    known = [plan.grad_error for plan in study.known.values()]
    errors = {base: correction.guess(base).grad_error for base in study.space.bases}
    gaps = {
        base: min((abs(math.log(error / other)) for other in known if other > 0.0), default=0.0)
        for base, error in errors.items()
        if FRONT_FROM <= error / study.budget <= FRONT_TO and not study.is_taken(base)
    }
    if max(gaps.values(), default=0.0) < FRONT_GAP:
        return False
    study.evaluate(max(gaps, key=lambda base: gaps[base]), source=FRONT)
    return True


def _repair(study: PlanStudy, broken: SearchTrial) -> tuple[tuple[str, ...], SearchTrial | None]:
    """Find the layers that make a joint error exceed the sum, and the nearest feasible plan.

    Finds nothing when the excess is spread over many layers.
    """
    problem = study.problem

    def excess_of(plan: SearchTrial) -> float:
        return plan.grad_error - problem.costs.grad_error(plan.options)

    def excess_without(groups: Sequence[Group]) -> float:
        precise = _made_precise(problem, broken.options, groups)
        return excess_of(study.wait_for(precise, source="repair"))

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
