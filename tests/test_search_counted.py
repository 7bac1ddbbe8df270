"""What of a gradient error counts: that of grad_weight by half, from a table's row to a plan."""

from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprec.predict.transfer import transfer_sensitivity
from autoprec.records import (
    BF16_O2,
    FP32,
    Constraint,
    Estimate,
    JointMeasurement,
    LayerSensitivity,
    Option,
    Plan,
    Profile,
    Search,
    Sensitivity,
)
from autoprec.records.sensitivity import GRAD_WEIGHT_COUNTS
from autoprec.report.tables import recipe_costs
from autoprec.search import build_plan, search_plan
from autoprec.search.correction import seen_beside
from autoprec.search.costs import make_costs
from autoprec.sensitivity.gap import CEILING
from tests.search_tables import ROWWISE, TENSORWISE, TYPICAL, Row, tables_of

Options = tuple[Option, ...]
Tables = tuple[Profile, Sensitivity]
BUDGET = 1.5e-3  # where errors count whole, two layers in FP8 rowwise but none in tensorwise
TWO: Mapping[str, Row] = {"a": TYPICAL, "b": TYPICAL}


def with_staying(tables: Tables, share: Callable[[LayerSensitivity], float]) -> Tables:
    """Return tables in which this share of each row stays in the layer's own parameters."""
    profile, sensitivity = tables
    rows = tuple(
        row.model_copy(update={"staying": share(row) * row.grad_error.mean})
        for row in sensitivity.rows
    )
    return profile, sensitivity.model_copy(update={"rows": rows})


def searched(
    tables: Tables,
    *,
    budget: float = BUDGET,
    evaluate: Callable[[Options, int], Estimate] | None = None,
) -> tuple[Search, Plan]:
    asked = Constraint(loss_tolerance=1e-3, grad_error_budget=budget, run_steps=300)
    search = search_plan(*tables, constraint=asked, evaluate=evaluate, trials=4)
    return search, build_plan(*tables, search, search.chosen, constraint=asked)


def whole_error(tables: Tables, options: Options) -> float:
    """Return the sum of a plan's rows as they were measured."""
    names = tables[0].model.names
    rows = (tables[1].row(name, option) for name, option in zip(names, options, strict=True))
    return sum(row.grad_error.mean for row in rows if row)


errors = st.floats(0.0, 10.0)


@given(errors, errors, errors)
def test_what_counts_grows_with_the_error_and_is_no_more_than_it(
    error: float, more: float, staying: float
) -> None:
    def counted(mean: float, stays: float) -> float:
        row = LayerSensitivity(
            name="a", option=ROWWISE, grad_error=Estimate(mean=mean), staying=stays
        )
        return row.counted_error

    assert GRAD_WEIGHT_COUNTS * error <= counted(error, staying) <= error
    assert counted(error, 0.0) == error
    assert counted(error, staying) <= counted(error + more, staying)
    assert counted(error, staying + more) <= counted(error, staying)
    assert counted(-error, staying) == 0.0


def test_an_error_in_grad_weight_lets_more_into_fp8_and_is_expected_to_cost_less() -> None:
    plain = tables_of(TWO)
    light = with_staying(plain, lambda row: float(row.option.is_fp8))
    outputs, weights = searched(plain)[1], searched(light)[1]
    assert outputs.options == (ROWWISE, ROWWISE)
    assert weights.options == (TENSORWISE, TENSORWISE)
    # the same plan, the same error, in another GEMM
    one, other = (searched(tables, budget=3e-3)[1] for tables in (plain, light))
    assert one.options == other.options == (TENSORWISE, TENSORWISE)
    assert one.expected_gap is not None
    assert other.expected_gap is not None
    for end in ("mean", "low", "high"):
        ratio = getattr(other.expected_gap, end) / getattr(one.expected_gap, end)
        assert ratio == pytest.approx(GRAD_WEIGHT_COUNTS)


def test_a_joint_error_counts_as_its_rows_do() -> None:
    tables = with_staying(tables_of(TWO, activation_error=2e-4), lambda row: 0.6)
    asked: list[Options] = []

    def evaluate(options: Options, batches: int) -> Estimate:
        asked.append(options)
        joint = 1.2 * (whole_error(tables, options) + 2e-4)
        return Estimate(mean=joint, stderr=0.1 * joint)

    search, plan = searched(tables, evaluate=evaluate)
    chosen, costs = search.chosen, make_costs(*tables)
    assert chosen.options in asked
    assert chosen.grad_error_measured == pytest.approx(1.2 * costs.grad_error(chosen.options))
    assert chosen.grad_error_stderr == pytest.approx(0.1 * (plan.grad_error or 0.0))
    assert plan.grad_error == chosen.grad_error_measured
    assert chosen.grad_error == pytest.approx(
        2e-4 + (0.4 + 0.6 * GRAD_WEIGHT_COUNTS) * whole_error(tables, chosen.options)
    )
    assert sum(layer.grad_error or 0.0 for layer in plan.layers) + 2e-4 == pytest.approx(
        chosen.grad_error
    )


def test_a_plan_of_the_tables_check_counts_as_its_rows_do() -> None:
    profile, sensitivity = with_staying(tables_of(TWO), lambda row: 0.5)
    joint = JointMeasurement(
        label="fp8_everywhere",
        options=(TENSORWISE, TENSORWISE),
        grad_error=Estimate(mean=4e-3, stderr=1e-4),
        predicted_grad_error=2e-3,
        overlap=4e-4,
    )
    (seen,) = seen_beside(
        make_costs(profile, sensitivity), sensitivity.model_copy(update={"joint": (joint,)})
    )
    assert seen[1:] == pytest.approx((3e-3, 0.75e-4, 3e-4))


def test_the_ceiling_is_for_the_whole_error() -> None:
    rows: Row = {FP32: (4.0, 0.0), BF16_O2: (2.0, 1e-5), TENSORWISE: (1.0, 0.2)}
    plain = tables_of({"a": rows, "b": rows})
    tables = with_staying(plain, lambda row: float(row.option.is_fp8))

    def evaluate(options: Options, batches: int) -> Estimate:
        return Estimate(mean=whole_error(tables, options))

    for measure in (None, evaluate):  # two of 0.2 count 0.2 together, and are 0.4
        search, plan = searched(tables, budget=5.0, evaluate=measure)
        assert search.grad_error_budget == CEILING
        assert plan.options.count(TENSORWISE) == 1
        assert not any(t.feasible for t in search.trials if t.options.count(TENSORWISE) == 2)


def test_what_recipes_cost_is_what_their_rows_count() -> None:
    tables = with_staying(tables_of(TWO), lambda row: 0.5)
    _, linears, error, gap = recipe_costs(tables[1])[0]
    plan = searched(tables, budget=3e-3)[1]
    assert linears == 2
    assert error == pytest.approx(plan.grad_error or 0.0)
    assert plan.expected_gap is not None
    assert plan.expected_gap.mean == pytest.approx(gap * (300 / 75) ** 0.5)


def test_a_larger_model_takes_what_stays_from_its_family_too() -> None:
    small = with_staying(tables_of({f"blocks.{i}.fc": TYPICAL for i in range(2)}), lambda row: 0.5)
    large = tables_of({f"blocks.{i}.fc": TYPICAL for i in range(6)})[0].model
    found = transfer_sensitivity(small[1], large)
    for option in (TENSORWISE, ROWWISE):
        own, theirs = ([row for row in s.rows if row.option == option] for s in (found, small[1]))
        total = sum(row.counted_error for row in theirs)
        assert sum(row.counted_error for row in own) == pytest.approx(total)
        assert total < sum(row.grad_error.mean for row in theirs)
