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

from autoprec.records import BF16_O2, FP32, Option
from autoprec.search.evaluator import EvaluatedPlan
from autoprec.search.problem import Group, Options, Problem, exact, precision_rank
from autoprec.search.study import StudyLog

WALK_STEPS = 4
EXCESS = 1.25  # joint error over the sum of its parts from which layers are looked for
SHARE = 0.5  # of the excess, that the layers found must take away at each halving
REPAIR_TRIES = 3

IsOver = Callable[[], bool]
Suspect = TypeVar("Suspect")


def evaluate_seeds(log: StudyLog, exact_plan: Options, *, is_over: IsOver) -> EvaluatedPlan:
    """Evaluate the plans that every search looks at; return the exact one."""
    space = log.space
    fp32, bf16 = space.problem.uniform(FP32), space.problem.uniform(BF16_O2)
    if fp32 in space.bases:
        log.try_base(space.bases.index(fp32), source="uniform")
    evaluated = log.try_base(space.bases.index(exact_plan), source="exact")
    if bf16 in space.bases and not is_over():
        log.try_base(space.bases.index(bf16), source="uniform")
    return evaluated


def walk_front(log: StudyLog, start: EvaluatedPlan, *, is_over: IsOver) -> None:
    """Evaluate the most promising base again and again, as measurements correct the table."""
    plan, costs = start, log.space.problem.costs
    for _ in range(WALK_STEPS):
        ratio = plan.grad_error / plan.table_grad_error if plan.table_grad_error > 0.0 else 1.0
        promised: dict[int, float] = {}  # base -> time to loss
        for base, options in enumerate(log.space.bases):
            grad_error = ratio * costs.grad_error(options)
            if grad_error <= log.evaluator.budget:
                promised[base] = costs.step_ms(options) * (1.0 + grad_error)
        best = min(promised, key=lambda base: promised[base], default=None)
        if best is None or log.space.bases[best] in log.evaluator.known or is_over():
            return
        plan = log.try_base(best, source="exact")


def needs_repair(plan: EvaluatedPlan) -> bool:
    """Whether a plan breaks the budget because its parts do more together than apart."""
    return not plan.is_feasible and plan.grad_error > EXCESS * plan.table_grad_error


def repair(log: StudyLog, broken: EvaluatedPlan) -> tuple[tuple[str, ...], EvaluatedPlan | None]:
    """Find the layers that make a plan's joint error exceed the sum, and a plan without them.

    Returns:
        The names of the interacting layers, and the nearest plan that is feasible; nothing when the
        excess is spread over many layers.
    """
    problem = log.space.problem
    suspects = [g for g in problem.groups if more_precise_choices(g, broken.options)]

    def excess_without(groups: Sequence[Group]) -> float:
        plan = log.try_plan(_made_precise(problem, broken.options, groups), source="repair")
        return plan.grad_error - plan.table_grad_error

    excess = broken.grad_error - broken.table_grad_error
    interacting = find_interacting(suspects, excess, excess_without)
    if not interacting:
        return (), None
    names = tuple(problem.costs.layers[i].name for group in interacting for i in group.layers)
    return names, _solved_without(log, broken, interacting)


def find_interacting(
    suspects: Sequence[Suspect], excess: float, excess_without: Callable[[Sequence[Suspect]], float]
) -> tuple[Suspect, ...]:
    """Return the few suspects that account for an excess, by bisection; () when it is spread.

    Half of the suspects are made more precise and the whole plan is evaluated again; the half that
    takes more of the excess away is searched on. Costs two evaluations per halving.

    Args:
        suspects: what may be made more precise, in an order that keeps neighbours together.
        excess: joint error minus the sum of the parts, of the plan as it is.
        excess_without: the same with these suspects made more precise.
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


def more_precise_choices(group: Group, options: Options) -> list[Options]:
    """Return what a group may be instead: without FP8 if the plan has FP8 at all, else FP32."""
    worst = max(map(precision_rank, options))
    if max(precision_rank(options[index]) for index in group.layers) < worst:
        return []
    return [c for c in group.choices if all(precision_rank(option) < worst for option in c)]


def _made_precise(problem: Problem, options: Options, groups: Sequence[Group]) -> Options:
    """Return the plan with these groups in the fastest of their more precise choices."""
    chosen: list[Option] = list(options)
    for group in groups:
        prices = [problem.costs.prices[index] for index in group.layers]
        choice = min(
            more_precise_choices(group, options),
            key=lambda c: sum(p[o].with_casts_ms for p, o in zip(prices, c, strict=True)),
        )
        for index, option in zip(group.layers, choice, strict=True):
            chosen[index] = option
    return problem.follow_uncalled(tuple(chosen))


def _solved_without(
    log: StudyLog, broken: EvaluatedPlan, interacting: Sequence[Group]
) -> EvaluatedPlan | None:
    """Solve again with the interacting groups more precise, at smaller budgets while over."""
    problem = log.space.problem
    limited = {
        group.layers: replace(group, choices=tuple(more_precise_choices(group, broken.options)))
        for group in interacting
    }
    groups = tuple(limited.get(group.layers, group) for group in problem.groups)
    budget = log.evaluator.budget
    for _ in range(REPAIR_TRIES):
        found = exact(replace(problem, groups=groups), budget)
        if found is None:
            return None
        plan = log.try_plan(found[0], source="repair")
        if plan.is_feasible:
            return plan
        budget = log.evaluator.budget * plan.table_grad_error / plan.grad_error
    return None
