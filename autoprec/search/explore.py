"""Which whole plans to measure, in which order.

1. FP32 (free: it is the reference), the exact plan of the budget, uniform BF16 O2
2. along the front: the sum of the parts is corrected by the ratio that the last measurement
showed, and the base that then promises the least time to loss is measured, until it is one
that was measured before
3. repair, where the exact plan's joint e breaks the budget that the sum of its parts kept
4. the sampler
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from autoprec.records import BF16_O2, FP32, Option
from autoprec.search.judge import Judge, Judgement
from autoprec.search.problem import GENTLENESS, Options, Problem, Unit, exact
from autoprec.search.repair import find_interacting
from autoprec.search.space import Space
from autoprec.search.study import StudyLog

WALK_STEPS = 4
EXCESS = 1.25  # joint e over the sum of its parts from which layers are looked for
REPAIR_TRIES = 3

IsOver = Callable[[], bool]


def measure_seeds(log: StudyLog, exact_plan: Options, *, is_over: IsOver) -> Judgement:
    """Measure the plans that every search looks at; return the exact plan's judgement."""
    space = log.space
    fp32, bf16 = space.problem.uniform(FP32), space.problem.uniform(BF16_O2)
    if fp32 in space.bases:
        log.try_base(space.bases.index(fp32), source="uniform")
    judged = log.try_base(space.bases.index(exact_plan), source="exact")
    if bf16 in space.bases and not is_over():
        log.try_base(space.bases.index(bf16), source="uniform")
    return judged


def walk_front(log: StudyLog, start: Judgement, *, is_over: IsOver) -> None:
    """Measure the most promising base again and again, as the measurements correct the table."""
    judged = start
    for _ in range(WALK_STEPS):
        ratio = (
            judged.grad_error / judged.table_grad_error if judged.table_grad_error > 0.0 else 1.0
        )
        base = promising_base(log.space, log.judge, ratio)
        if base is None or log.space.bases[base] in log.judge.known or is_over():
            return
        judged = log.try_base(base, source="exact")


def promising_base(space: Space, judge: Judge, ratio: float) -> int | None:
    """Return the base of least time to loss if joint e is `ratio` times the sum of parts."""
    costs = space.problem.costs
    best: tuple[float, int] | None = None
    for base, options in enumerate(space.bases):
        grad_error = ratio * costs.grad_error(options)
        if grad_error > judge.budget:
            continue
        ms = costs.step_ms(options) * (1.0 + grad_error)
        if best is None or ms < best[0]:
            best = (ms, base)
    return None if best is None else best[1]


def repair(log: StudyLog, broken: Judgement) -> tuple[tuple[str, ...], Judgement | None]:
    """Find the layers that make a plan's joint e exceed the sum, and a feasible plan without them.

    Returns:
        The names of the interacting layers, and the judgement of the nearest plan that is feasible;
        nothing when the excess is spread over many layers.
    """
    problem = log.space.problem
    suspects = [unit for unit in problem.units if gentler(problem, unit, broken.options)]

    def excess_without(units: Sequence[Unit]) -> float:
        judged = log.try_plan(relax(problem, broken.options, units), source="repair")
        return judged.grad_error - judged.table_grad_error

    interacting = find_interacting(
        suspects, broken.grad_error - broken.table_grad_error, excess_without
    )
    if not interacting:
        return (), None
    names = tuple(problem.costs.layers[i].name for unit in interacting for i in unit.layers)
    return names, _without(log, broken, interacting)


def needs_repair(judged: Judgement) -> bool:
    """Whether a plan breaks the budget because its parts do more together than apart."""
    return not judged.is_feasible and judged.grad_error > EXCESS * judged.table_grad_error


def gentler(problem: Problem, unit: Unit, options: Options) -> list[Options]:
    """Return what a unit may be instead: without FP8 if the plan has FP8 at all, else FP32."""
    current = tuple(options[index] for index in unit.layers)
    worst = max(GENTLENESS[option.precision] for option in options)
    if max(GENTLENESS[option.precision] for option in current) < worst:
        return []
    return [c for c in unit.choices if all(GENTLENESS[o.precision] < worst for o in c)]


def relax(problem: Problem, options: Options, units: Sequence[Unit]) -> Options:
    """Return the plan with these units in the fastest of their gentler choices."""
    chosen: list[Option] = list(options)
    for unit in units:
        prices = [problem.costs.prices[index] for index in unit.layers]
        choice = min(
            gentler(problem, unit, options),
            key=lambda c: sum(p[o].flow_ms for p, o in zip(prices, c, strict=True)),
        )
        for index, option in zip(unit.layers, choice, strict=True):
            chosen[index] = option
    return problem.settle(tuple(chosen))


def _without(log: StudyLog, broken: Judgement, interacting: Sequence[Unit]) -> Judgement | None:
    """Solve again with the interacting units gentler, at smaller budgets while over."""
    problem = log.space.problem
    limited = {
        unit.layers: Unit(unit.layers, tuple(gentler(problem, unit, broken.options)))
        for unit in interacting
    }
    units = tuple(limited.get(unit.layers, unit) for unit in problem.units)
    budget = log.judge.budget
    for _ in range(REPAIR_TRIES):
        found = exact(replace(problem, units=units), budget)
        if found is None:
            return None
        judged = log.try_plan(found[0], source="repair")
        if judged.is_feasible:
            return judged
        budget = log.judge.budget * judged.table_grad_error / judged.grad_error
    return None
