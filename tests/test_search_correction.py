"""What measured plans say of a table, and the choice of plans where the table is wrong."""

import itertools
import math

import numpy as np
import pytest

from autoprec.records import (
    BF16_O2,
    Constraint,
    Estimate,
    JointMeasurement,
    Option,
    ParameterSpec,
    Search,
    Sensitivity,
)
from autoprec.search import default_trials, search_plan
from autoprec.search.correction import (
    Cells,
    Correction,
    Seen,
    fit_correction,
    seen_beside,
    telling,
)
from autoprec.search.costs import Costs, make_costs
from autoprec.search.problem import exact, make_problem
from tests.search_tables import ROWWISE, TENSORWISE, Row, tables_of

Options = tuple[Option, ...]
ROWS: dict[str, Row] = {
    f"layer{i}": {
        BF16_O2: (2.0 + i, 1e-6),
        TENSORWISE: (1.3 + 0.6 * i, 1e-3),
        ROWWISE: (1.5 + 0.7 * i, 6e-4),
    }
    for i in range(6)
}
WRONG = (8.0, 0.2, 5.0, 0.4, 1.0, 10.0)  # true over table, as where derivatives jump
EVERY = list(itertools.product((BF16_O2, TENSORWISE, ROWWISE), repeat=6))


def truth(costs: Costs, options: Options) -> float:
    """The joint error: wrong by layer, and not quite additive."""
    parts = [row[o].grad_error for row, o in zip(costs.prices, options, strict=True)]
    bent = 1.0 + 0.05 * math.sin(sum(i * len(o.key) for i, o in enumerate(options)))
    return bent * math.fsum(f * part for f, part in zip(WRONG, parts, strict=True))


def seen(costs: Costs, count: int, *, is_right: bool = False) -> list[Seen]:
    plans = np.random.default_rng(0).choice(len(EVERY), count, replace=False)
    error = costs.grad_error if is_right else lambda options: truth(costs, options)
    return [Seen(EVERY[i], error(EVERY[i]), 0.05 * error(EVERY[i])) for i in plans]


def test_a_wrong_table_is_corrected_within_the_error_that_is_said() -> None:
    costs = make_costs(*tables_of(ROWS))
    before = [math.log(costs.grad_error(plan) / truth(costs, plan)) for plan in EVERY[1:]]
    correction = fit_correction(Cells(costs), seen(costs, 16))
    guesses = [correction.guess(plan) for plan in EVERY[1:]]
    off = [
        math.log(g.grad_error / truth(costs, plan))
        for g, plan in zip(guesses, EVERY[1:], strict=True)
    ]
    assert np.std(before) > 0.5
    assert np.std(off) < 0.25
    within = [abs(o) <= 2.0 * g.log_sd for o, g in zip(off, guesses, strict=True)]
    assert np.mean(within) > 0.9
    drawn = correction.drawn(np.random.default_rng(1))
    cells = correction.cells
    off = [math.log(drawn[cells.of(p)].sum() / truth(costs, p)) for p in EVERY[1:]]
    assert 0.05 < np.std(off) < 0.8


def test_a_table_that_holds_is_believed_after_a_few_plans() -> None:
    costs = make_costs(*tables_of(ROWS))
    wide = fit_correction(Cells(costs), []).guess(EVERY[-1])
    known = fit_correction(Cells(costs), seen(costs, 5, is_right=True))
    assert wide.grad_error == pytest.approx(costs.grad_error(EVERY[-1]))
    assert known.guess(EVERY[-1]).log_sd < 0.2 < wide.log_sd
    assert known.guess(EVERY[-1]).grad_error == pytest.approx(wide.grad_error, rel=0.05)


def test_the_joint_optimum_is_found_on_a_wrong_table() -> None:
    tables = tables_of(ROWS)
    costs = make_costs(*tables)

    def time_to_loss(plan: Options) -> float:
        return costs.counted_ms(plan) * (1.0 + truth(costs, plan))

    ratios = []
    for share in (0.15, 0.4, 0.6):
        budget = share * max(truth(costs, plan) for plan in EVERY)
        search = search_plan(
            *tables,
            constraint=Constraint(loss_tolerance=1e-3, grad_error_budget=budget),
            evaluate=lambda options, batches: Estimate(mean=truth(costs, options)),
        )
        assert len(search.trials) <= 12 + 3  # the default trials beside the seeds
        best = min(time_to_loss(plan) for plan in EVERY if truth(costs, plan) <= budget)
        ratios.append(time_to_loss(search.chosen.options) / best)
    assert np.mean(ratios) <= 1.01
    assert max(ratios) <= 1.03


@pytest.mark.slow
def test_plans_that_no_table_foretells_are_looked_for_where_many_may_be_measured() -> None:
    """Each plan's joint error is off by 25 %, in a way that no sum of layers explains."""
    tables = tables_of(ROWS)
    costs = make_costs(*tables)
    random = np.random.default_rng(0)
    errors = {p: costs.grad_error(p) * math.exp(0.25 * random.standard_normal()) for p in EVERY}
    budget = 0.6 * costs.grad_error((TENSORWISE,) * 6)

    def time_to_loss(plan: Options) -> float:
        return costs.counted_ms(plan) * (1.0 + errors[plan])

    few, many = (
        search_plan(
            *tables,
            constraint=Constraint(loss_tolerance=1e-3, grad_error_budget=budget),
            evaluate=lambda options, _: Estimate(mean=errors[options]),
            trials=trials,
        )
        for trials in (12, 36)
    )
    best = min(time_to_loss(plan) for plan in EVERY if errors[plan] <= budget)
    assert len(few.trials) < len(many.trials) <= 36 + 3
    assert time_to_loss(many.chosen.options) == pytest.approx(best)
    assert time_to_loss(few.chosen.options) > 1.003 * best


def test_more_plans_are_measured_by_default_where_a_pass_takes_next_to_no_time() -> None:
    layers = tables_of(ROWS)[0].model.layers
    assert default_trials(layers) == 12  # how much they compute is not known
    weight = ParameterSpec(name="w", shape=(64, 64), dtype="float32", is_trainable=True)
    for outputs, expected in ((64 * 256, 36), (64 * 16384, 12)):
        known = {"output_elements": outputs, "parameters": (weight,)}
        sized = [layer.model_copy(update=known) for layer in layers]
        assert default_trials(sized) == expected
    assert default_trials([sized[0].model_copy(update={"output_elements": 1})] * 6) == 36
    assert default_trials([sized[0].model_copy(update={"output_elements": 1})] * 60) == 12


def test_the_optimum_of_a_wrong_table_of_many_layers_is_neared() -> None:
    """Each layer's error is wrong by a factor, so that the true optimum is a knapsack as well.

    Twelve measurements cannot tell forty factors apart.
    """
    layers = 40
    random = np.random.default_rng(layers)
    rows: dict[str, Row] = {}
    for i in range(layers):
        ms, error = float(random.lognormal()), float(random.lognormal(-8.0, 1.5)) / layers**0.5
        saves = random.uniform(0.5, 0.95, 2)
        rows[f"blocks.{i // 4}.fc{i % 4}"] = {
            BF16_O2: (ms, 0.0),
            TENSORWISE: (ms * saves[0], error),
            ROWWISE: (ms * saves[1], 0.6 * error),
        }
    tables = tables_of(rows)
    costs = make_costs(*tables)
    wrong = random.lognormal(0.0, 0.7, layers)
    true_rows = {
        name: {o: (ms, error * factor) for o, (ms, error) in row.items()}
        for (name, row), factor in zip(rows.items(), wrong, strict=True)
    }
    true = make_costs(*tables_of(true_rows))
    budget = 0.3 * true.grad_error((TENSORWISE,) * layers)
    constraint = Constraint(loss_tolerance=1e-3, grad_error_budget=budget)
    search = search_plan(
        *tables, constraint=constraint, evaluate=lambda p, _: Estimate(mean=true.grad_error(p))
    )
    best = exact(make_problem(true, constraint), budget)
    assert best is not None
    found_ms, best_ms = (
        true.counted_ms(p) * (1.0 + true.grad_error(p)) for p in (search.chosen.options, best[0])
    )
    assert true.grad_error(search.chosen.options) <= budget
    assert 1.0 - 1e-9 <= found_ms / best_ms <= 1.1
    assert costs.grad_error(search.exact.options) <= budget


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_a_plan_whose_batches_differ_is_measured_again_however_small_its_error(
    share: float,
) -> None:
    """Of errors that most batches hide, two say nothing but that they differ.

    In tensorwise alone by a `share` of the error, in the other plans by half of it.
    """
    tables = tables_of(ROWS)
    costs = make_costs(*tables)
    budget = costs.grad_error((TENSORWISE,) * 6)

    def rare(options: Options, batches: int) -> Estimate:
        hidden = batches == 2 and TENSORWISE in options
        error = costs.grad_error(options) * (1e-2 if hidden else 2.0)
        own = share if set(options) == {TENSORWISE} else 0.5
        return Estimate(mean=error, stderr=error * (own if hidden else 0.4))

    search = search_plan(
        *tables,
        constraint=Constraint(loss_tolerance=1e-3, grad_error_budget=budget),
        evaluate=rare,
    )
    assert costs.grad_error(search.chosen.options) * 2.0 <= budget


def test_a_plan_near_the_budget_is_measured_again_and_held_with_its_standard_error() -> None:
    tables = tables_of(ROWS)
    costs = make_costs(*tables)
    asked: list[tuple[Options, int]] = []

    def lucky(options: Options, batches: int) -> Estimate:
        """Two batches say 10 % too little, and do not know it."""
        asked.append((options, batches))
        error = costs.grad_error(options) * (0.9 if batches == 2 else 1.0)
        return Estimate(mean=error, stderr=error * (0.01 if batches == 2 else 0.04))

    budget = costs.grad_error((TENSORWISE,) * 6) * 0.7
    search = search_plan(
        *tables,
        constraint=Constraint(loss_tolerance=1e-3, grad_error_budget=budget),
        evaluate=lucky,
    )
    assert {batches for _, batches in asked} == {2, 6}
    assert costs.grad_error(search.chosen.options) * 1.04 <= budget
    assert search.chosen.grad_error_stderr is not None
    fronts = [(p.grad_error_measured or 0.0, p.step_ms) for p in search.measured_front]
    assert fronts == sorted(fronts)
    assert [ms for _, ms in fronts] == sorted((ms for _, ms in fronts), reverse=True)


@pytest.mark.parametrize(("factor", "trials"), [(10.0, 12), (3.0, 12), (10.0, 0), (1.0, 12)])
def test_a_joint_measurement_scales_the_table_where_no_plan_is_measured(
    factor: float, trials: int
) -> None:
    """All errors are wrong by one factor, which the table's own check saw, and no plan is run."""
    profile, sensitivity = tables_of(ROWS)
    costs = make_costs(profile, sensitivity)
    most = (TENSORWISE,) * 6
    budget = 0.5 * max(factor, 1.0) * costs.grad_error(most)
    constraint = Constraint(loss_tolerance=1e-3, grad_error_budget=budget)

    def found(sensitivity: Sensitivity) -> Search:
        # `trials 0` measures the seeds alone
        measure = (lambda p, _: Estimate(mean=factor * costs.grad_error(p))) if not trials else None
        return search_plan(
            profile, sensitivity, constraint=constraint, evaluate=measure, trials=trials
        )

    search = found(checked(sensitivity, most, factor * costs.grad_error(most)))
    assert factor * costs.grad_error(search.chosen.options) <= budget
    assert search.chosen == search.exact or search.chosen.grad_error_measured is not None
    assert search.chosen.options not in (most, (BF16_O2,) * 6)
    assert any(option.is_fp8 for option in search.chosen.options)
    if factor > 2.0 and trials:  # the table alone breaks the budget
        assert factor * costs.grad_error(found(sensitivity).chosen.options) > budget


def test_errors_that_cancel_are_not_taken_for_a_table_that_is_too_high() -> None:
    """Together 22 times less than the sum: so has that plan, of a part the sum may be right."""
    profile, sensitivity = tables_of(ROWS)
    costs = make_costs(profile, sensitivity)
    most = (TENSORWISE,) * 6
    summed = costs.grad_error(most)
    constraint = Constraint(loss_tolerance=1e-3, grad_error_budget=0.5 * summed)
    before = checked(sensitivity, most, summed / 22.0)
    for evaluate in (None, lambda *_: Estimate(mean=summed / 22.0, stderr=1e-6)):
        search = search_plan(profile, before, constraint=constraint, evaluate=evaluate, trials=0)
        assert search.exact.options != most
        assert search.chosen.options == most
        assert search.chosen.grad_error_measured == pytest.approx(summed / 22.0)
    kept = constraint.model_copy(update={"keep": ("layer0=bf16_o2",)})
    search = search_plan(profile, before, constraint=kept, evaluate=None)
    assert costs.grad_error(search.chosen.options) <= 0.5 * summed
    # nor where plans are measured: a layer alone may have all that the table says
    correction = fit_correction(Cells(costs), telling(costs, seen_beside(costs, before)))
    alone = (TENSORWISE, *(BF16_O2,) * 5)
    assert correction.guess(alone).high(1.0) > costs.grad_error(alone)


def test_a_search_that_measures_begins_with_what_the_table_was_checked_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    profile, sensitivity = tables_of(ROWS)
    costs = make_costs(profile, sensitivity)
    most = (TENSORWISE,) * 6
    given: list[list[Seen]] = []

    def fit(cells: Cells, seen: list[Seen]) -> Correction:
        given.append(list(seen))
        return fit_correction(cells, seen)

    monkeypatch.setattr("autoprec.search.study.fit_correction", fit)
    search_plan(
        profile,
        checked(sensitivity, most, 10.0 * costs.grad_error(most)),
        constraint=Constraint(loss_tolerance=1e-3, grad_error_budget=4.0 * costs.grad_error(most)),
        evaluate=lambda p, _: Estimate(mean=10.0 * costs.grad_error(p)),
        trials=3,
    )
    # all, exact and BF16, the first of which one search measures itself
    assert len(given[0]) == len({one.options for one in given[0]})
    assert sum(one.options == most for one in given[0]) == 1


def checked(sensitivity: Sensitivity, plan: Options, error: float) -> Sensitivity:
    joint = JointMeasurement(
        label="fp8_everywhere",
        options=plan,
        grad_error=Estimate(mean=error, stderr=0.05 * error),
        predicted_grad_error=0.0,
    )
    return sensitivity.model_copy(update={"joint": (joint,)})
