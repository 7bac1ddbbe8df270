import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from autoprec.search import solver
from autoprec.search.solver import COMPLETE_PLANS, FRONT_GAP, TIE, Item, Knapsack, Outside
from tests.examples import examples

CLOSE = 1e-8  # relative; two sums of the same numbers in another order

Groups = list[list[Item]]
Plan = tuple[float, float, float]  # ms, gradient error, bytes

coarse = st.integers(0, 6).map(float)  # ties are frequent
fine = st.floats(1e-6, 10.0, allow_nan=False)
values = st.one_of(coarse, fine)
items = st.builds(
    Item, ms=values, grad_error=values, memory=coarse, is_16_bit=st.booleans(), hiding_ms=coarse
)
groups_of = st.lists(st.lists(items, min_size=1, max_size=3), min_size=1, max_size=6)
outsides = st.builds(Outside, ms=values, grad_error=coarse, memory=coarse, hidable_ms=values)


def every_plan(groups: Groups, outside: Outside, memory: float = math.inf) -> list[Plan]:
    """Return every plan with a 16-bit item that fits, one by one."""
    plans = []
    for chosen in itertools.product(*groups):
        wait = max(outside.hidable_ms - sum(item.hiding_ms for item in chosen), 0.0)
        size = outside.memory + sum(item.memory for item in chosen)
        if any(item.is_16_bit for item in chosen) and size <= memory * (1.0 + CLOSE):
            ms = outside.ms + wait + sum(item.ms for item in chosen)
            plans.append((ms, outside.grad_error + sum(item.grad_error for item in chosen), size))
    return plans


def within(plans: list[Plan], budget: float) -> list[Plan]:
    return [plan for plan in plans if plan[1] <= budget * (1.0 + CLOSE)]


ONE_ROUNDING_APART: Groups = [  # 18.35948853161409 and 18.359488531614094 ms in some order
    [Item(6.1198295105380305, 1.0), Item(6.11982951053803, 1.5)],
    [Item(6.1198295105380305, 1.0), Item(6.11982951053803, 1.5)],
    [Item(6.1198295105380305, 1.0), Item(6.1198295105380305, 0.5)],
]


WHOLE_ERRORS: Groups = [  # HiGHS rounds such a row: 3 within a budget just below it
    [Item(0.0, 0.0)],
    [Item(0.0, 2.0), Item(1.0, 1.0), Item(2.0, 0.0)],
    [Item(0.0, 2.0), Item(0.0, 1.0), Item(1.0, 0.0)],
]


FALSELY_INFEASIBLE: Groups = [  # by HiGHS's presolve, for a budget just below an error of 8
    [Item(0.0, 3.0, is_16_bit=False)],
    [Item(0.0, 0.0, is_16_bit=False), Item(0.0, 1.0), Item(0.0, 1.5)],
    [Item(0.0, 4.0, is_16_bit=False), Item(1.0, 3.0, is_16_bit=False)],
    [Item(0.0, 1.0, is_16_bit=False), Item(1.0, 0.0, is_16_bit=False)],
]


@given(
    groups=groups_of,
    outside=outsides,
    share=st.floats(0.0, 1.0),
    memory_share=st.one_of(st.just(math.inf), st.floats(0.2, 1.0)),
)
@example(groups=WHOLE_ERRORS, outside=Outside(), share=5e-324, memory_share=math.inf)
@examples(60)
def test_the_soonest_plan_equals_brute_force(
    groups: Groups, outside: Outside, share: float, memory_share: float
) -> None:
    memory = memory_share * (sum(max(i.memory for i in g) for g in groups) + outside.memory)
    plans = every_plan(groups, outside, memory)
    budget = share * max((plan[1] for plan in plans), default=0.0)
    fitting = within(plans, budget)
    found = Knapsack(groups, outside, memory=memory).soonest(budget)
    assert (found is None) == (not fitting)
    if found is None:
        return
    plan, bound_ms = found
    expected = min(ms * (1.0 + grad_error) for ms, grad_error, _ in fitting)
    assert plan.time_to_loss_ms == pytest.approx(expected, rel=CLOSE, abs=1e-9)
    fastest = min(ms for ms, _, _ in fitting)
    assert fastest * (1.0 - 2.0 * TIE) - 1e-9 <= bound_ms <= fastest * (1.0 + CLOSE) + 1e-9
    chosen = [group[pick] for group, pick in zip(groups, plan.picks, strict=True)]
    (sums,) = every_plan([[item] for item in chosen], outside)
    assert (plan.ms, plan.grad_error, plan.memory) == pytest.approx(sums)
    assert plan.grad_error <= budget * (1.0 + CLOSE)
    assert plan.memory <= memory * (1.0 + CLOSE)


@given(groups=groups_of, outside=outsides)
@example(groups=ONE_ROUNDING_APART, outside=Outside())
@example(groups=WHOLE_ERRORS, outside=Outside())
@example(groups=FALSELY_INFEASIBLE, outside=Outside())
@examples(30)
def test_the_front_equals_brute_force(groups: Groups, outside: Outside) -> None:
    plans = every_plan(groups, outside)
    front = Knapsack(groups, outside).front()
    assert bool(front) == bool(plans)
    for point in front:  # exact: no plan with as little error is faster, but for TIE
        fastest = min(ms for ms, _, _ in within(plans, point.grad_error))
        assert fastest - 1e-9 <= point.ms * (1.0 + CLOSE)
        assert point.ms <= fastest * (1.0 + 2.0 * TIE) + 1e-9
    for ms, grad_error, _ in plans:  # complete: every plan is beaten or met, up to rounding and TIE
        assert any(
            point.ms <= ms * (1.0 + 2.0 * TIE) + 1e-9
            and point.grad_error <= grad_error * (1.0 + CLOSE) + 1e-12
            for point in front
        )
    for one, other in itertools.pairwise(front):
        assert one.grad_error < other.grad_error
        assert one.ms > other.ms


def test_two_plans_that_one_rounding_parts_are_one_point_of_the_front() -> None:
    (point,) = Knapsack(ONE_ROUNDING_APART).front()
    assert point.grad_error == pytest.approx(2.5)


def test_among_equally_fast_plans_the_one_of_least_error_is_taken() -> None:
    knapsack = Knapsack([[Item(1.0, 3.0), Item(1.0, 1.0), Item(1.0, 2.0)] for _ in range(4)])
    (point,) = knapsack.front()
    assert (point.ms, point.grad_error) == (4.0, 4.0)


def test_the_fastest_plan_yields_to_one_that_is_sooner_at_the_loss() -> None:
    found = Knapsack([[Item(1.0, 0.0), Item(0.999, 0.002)]], Outside(ms=1.0)).soonest(1.0)
    assert found is not None
    assert found[0].picks == (0,)
    assert found[1] == pytest.approx(1.999)


def test_a_budget_met_exactly_fits() -> None:
    knapsack = Knapsack([[Item(2.0, 0.0), Item(1.0, 0.1)] for _ in range(3)])
    point = knapsack.minimise(0.0, 0.1 + 0.1 + 0.1 - 1e-17)
    assert point is not None
    assert point.ms == 3.0


def test_nothing_fits_below_the_least_error_or_the_smallest_plan() -> None:
    assert Knapsack([[Item(1.0, 0.5)], [Item(1.0, 0.5)]]).soonest(0.9) is None
    assert Knapsack([[Item(1.0, 0.5, 2.0)]], memory=1.0).front() == ()
    assert Knapsack([[Item(1.0, 0.0, is_16_bit=False)]]).soonest() is None


def deep_model(layers: int, options: int) -> Groups:
    """FP32, BF16 and FP8 options whose errors span orders of magnitude, as measured ones do."""
    rng = np.random.default_rng(layers)
    groups = []
    for _ in range(layers):
        ms, grad_error = float(rng.lognormal()), float(rng.lognormal(-9.0, 2.0))
        group = [
            Item(ms, 0.0, 4.0, is_16_bit=False),
            Item(ms * float(rng.uniform(0.4, 0.6)), 0.02 * grad_error, 3.0),
        ]
        for _ in range(options - 2):
            speed, share = rng.uniform(0.25, 0.5), rng.uniform(0.3, 1.0)
            group.append(Item(ms * float(speed), grad_error * float(share), 2.5))
        groups.append(group)
    return groups


def whole_program(groups: Groups, budget: float) -> float:
    """Return the least time within a budget by one integer program with every item."""
    flat = [item for group in groups for item in group]
    rows = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    one_each = csr_array((np.ones(len(flat)), (rows, np.arange(len(flat)))))
    grad_error = np.array([[item.grad_error / budget for item in flat]])
    answer = milp(
        np.array([item.ms for item in flat]),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(grad_error, -np.inf, 1)],
        integrality=np.ones(len(flat), dtype=np.int64),
        bounds=Bounds(0.0, 1.0),
        options={"mip_rel_gap": 0.0},
    )
    assert answer.fun is not None
    return float(answer.fun)


def test_points_of_a_large_front_are_the_fastest_with_as_little_error(
    capfd: pytest.CaptureFixture[str],
) -> None:
    groups = deep_model(60, 6)
    assert math.prod(map(len, groups)) > COMPLETE_PLANS
    front = Knapsack(groups).front(near=1e-3)
    assert capfd.readouterr() == ("", "")  # HiGHS prints, if let
    assert len(front) > 10
    assert [point.grad_error for point in front] == sorted(point.grad_error for point in front)
    assert [point.ms for point in front] == sorted((p.ms for p in front), reverse=True)
    for point in front[4::5]:
        assert point.ms == pytest.approx(whole_program(groups, point.grad_error), rel=1e-5)


ROLES = [  # error of the first block and its slope over the depth, in 1e-6, and ms
    *((2.16, -0.015, 8.0), (2.08, -0.019, 2.0), (14.1, -0.19, 2.0), (10.6, -0.044, 8.0)),
    *((28.5, 0.039, 28.0), (31.0, 0.19, 28.0), (24.6, 0.16, 28.0)),
]


def test_plans_that_are_nearly_alike_end_with_what_was_not_proven(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A proxy's errors lie on lines over the depth: to prove the least took over ten minutes."""
    monkeypatch.setattr(solver, "MOST_NODES", 20)
    errors = [((at + depth * by) * 1e-6, ms) for at, by, ms in ROLES for depth in range(14)]
    groups = [[Item(ms, 2e-3 * error), Item(0.7 * ms, error)] for error, ms in errors]
    knapsack, budget = Knapsack(groups, Outside(ms=200.0)), 2e-4
    found = knapsack.soonest(budget)
    assert found is not None
    plan, bound_ms = found
    assert plan.grad_error <= budget
    assert 0.0 < plan.slack < 1e-3 * plan.ms
    assert plan.ms - 2e-3 * plan.ms < bound_ms <= plan.ms - 0.5 * plan.slack
    points = knapsack.front(near=budget)
    assert all(point.slack <= FRONT_GAP * point.ms for point in points)
