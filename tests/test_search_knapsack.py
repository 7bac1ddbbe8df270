import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from autoprec.search import partial_plans
from autoprec.search.knapsack import pareto_front, solve
from autoprec.search.relaxation import Item, Limits

CLOSE = 1e-8  # relative; two sums of the same numbers in another order

Units = list[list[Item]]

coarse = st.integers(0, 6).map(float)  # ties are frequent
fine = st.floats(1e-6, 10.0, allow_nan=False)
values = st.one_of(coarse, fine)
items = st.builds(Item, ms=values, grad_error=values, memory=coarse, is_marked=st.booleans())


@st.composite
def units_of(draw: st.DrawFn) -> Units:
    """Draw at most nine units of at most three items: at most 3^9 plans."""
    return draw(st.lists(st.lists(items, min_size=1, max_size=3), min_size=1, max_size=9))


Plan = tuple[float, float, float, bool]


def every_plan(units: Units) -> list[Plan]:
    ms, grad_error, memory = (
        np.array([sum(c) for c in itertools.product(*([i[k] for i in u] for u in units))])
        for k in range(3)
    )
    marked = [any(c) for c in itertools.product(*([i.is_marked for i in u] for u in units))]
    return list(zip(ms.tolist(), grad_error.tolist(), memory.tolist(), marked, strict=True))


def brute_force(plans: list[Plan], limits: Limits) -> Plan | None:
    slack = 1.0 + CLOSE
    fitting = [
        plan
        for plan in plans
        if plan[1] <= limits.budget * slack
        and plan[2] <= limits.memory * slack
        and (plan[3] or not limits.needs_mark)
    ]
    return min(fitting, key=lambda plan: plan[0], default=None)


@given(
    units=units_of(),
    share=st.floats(0.0, 1.0),
    memory_share=st.one_of(st.just(math.inf), st.floats(0.2, 1.0)),
    needs_mark=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_the_exact_answer_equals_brute_force(
    units: Units, share: float, memory_share: float, needs_mark: bool
) -> None:
    plans = every_plan(units)
    budget = share * max(plan[1] for plan in plans)
    memory = memory_share * max(plan[2] for plan in plans) if memory_share <= 1.0 else math.inf
    limits = Limits(budget, memory, needs_mark)
    best, found = brute_force(plans, limits), solve(units, limits)
    assert (best is None) == (found is None)
    if best is None or found is None:
        return
    assert found.ms == pytest.approx(best[0], rel=CLOSE, abs=1e-12)
    assert found.bound_ms == found.ms
    assert found.grad_error <= budget * (1 + CLOSE)
    assert found.memory <= memory * (1 + CLOSE)
    chosen = [unit[pick] for unit, pick in zip(units, found.picks, strict=True)]
    assert found.ms == pytest.approx(sum(item.ms for item in chosen))
    assert found.grad_error == pytest.approx(sum(item.grad_error for item in chosen))


@given(units=units_of(), needs_mark=st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_front_equals_brute_force(units: Units, needs_mark: bool) -> None:
    plans = [plan for plan in every_plan(units) if plan[3] or not needs_mark]
    front = pareto_front(units, Limits(math.inf, needs_mark=needs_mark))
    expected: list[Plan] = []
    for plan in sorted(plans):
        if not expected or plan[1] < expected[-1][1] * (1 - 100 * CLOSE):
            expected.append(plan)
    found = sorted((point.ms, point.grad_error) for point in front)
    assert len(front) >= len(expected)
    for plan in expected:
        assert any(
            ms <= plan[0] * (1 + CLOSE) + 1e-12 and grad_error <= plan[1] * (1 + CLOSE) + 1e-12
            for ms, grad_error in found
        )
    for point in front:
        best = brute_force(plans, Limits(point.grad_error))
        assert best is not None
        assert point.ms == pytest.approx(best[0], rel=CLOSE, abs=1e-12)


def test_among_equally_fast_plans_the_one_of_least_e_is_taken() -> None:
    units = [[Item(1.0, 3.0), Item(1.0, 1.0), Item(1.0, 2.0)] for _ in range(4)]
    found = solve(units, Limits(100.0))
    assert found is not None
    assert (found.ms, found.grad_error) == (4.0, 4.0)


def test_a_budget_met_exactly_fits() -> None:
    units = [[Item(2.0, 0.0), Item(1.0, 0.1)] for _ in range(3)]
    found = solve(units, Limits(0.1 + 0.1 + 0.1 - 1e-17))
    assert found is not None
    assert found.ms == 3.0


def test_nothing_fits_a_budget_below_the_gentlest_plan() -> None:
    assert solve([[Item(1.0, 0.5)], [Item(1.0, 0.5)]], Limits(0.9)) is None
    assert pareto_front([[Item(1.0, 0.5, 2.0)]], Limits(math.inf, memory=1.0)) == ()


def deep_model(layers: int, options: int) -> Units:
    """FP32, BF16 and FP8 options whose e spans orders of magnitude, as measured ones do."""
    rng = np.random.default_rng(layers)
    units = []
    for _ in range(layers):
        ms, grad_error = float(rng.lognormal()), float(rng.lognormal(-9.0, 2.0))
        unit = [
            Item(ms, 0.0, 4.0, False),
            Item(ms * float(rng.uniform(0.4, 0.6)), 0.02 * grad_error, 3.0),
        ]
        for _ in range(options - 2):
            speed, gentle = rng.uniform(0.25, 0.5), rng.uniform(0.3, 1.0)
            unit.append(Item(ms * float(speed), grad_error * float(gentle), 2.5))
        units.append(unit)
    return units


def highs(units: Units, budget: float) -> float:
    """The same problem for HiGHS, e in units of the budget."""
    flat = [item for unit in units for item in unit]
    rows = np.repeat(np.arange(len(units)), [len(unit) for unit in units])
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


@pytest.mark.parametrize("layers", [40, 150])
def test_many_layers_agree_with_an_independent_solver(layers: int) -> None:
    units = deep_model(layers, 6)
    fastest = solve(units, Limits(math.inf))
    assert fastest is not None
    for share in (0.05, 0.3, 0.8):
        found = solve(units, Limits(share * fastest.grad_error))
        assert found is not None
        assert found.ms == pytest.approx(highs(units, share * fastest.grad_error), rel=1e-5)
        assert found.bound_ms == found.ms


def test_points_of_a_large_front_are_the_fastest_with_as_little_e() -> None:
    units = deep_model(60, 6)
    front = pareto_front(units, Limits(math.inf, needs_mark=True))
    assert len(front) > 10
    assert [point.grad_error for point in front] == sorted(point.grad_error for point in front)
    assert [point.ms for point in front] == sorted((p.ms for p in front), reverse=True)
    for point in front[::5]:
        again = solve(units, Limits(point.grad_error, needs_mark=True))
        assert again is not None
        assert again.ms == pytest.approx(point.ms, rel=1e-9)


def test_an_answer_cut_short_keeps_a_valid_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    units = deep_model(120, 6)
    fastest = solve(units, Limits(math.inf))
    assert fastest is not None
    exact = solve(units, Limits(0.1 * fastest.grad_error))
    monkeypatch.setattr(partial_plans, "MOST_STATES", 2)
    cut = solve(units, Limits(0.1 * fastest.grad_error))
    assert exact is not None
    assert cut is not None
    assert cut.bound_ms <= exact.ms <= cut.ms
    assert cut.bound_ms < cut.ms
