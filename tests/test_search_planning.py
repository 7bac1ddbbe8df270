import textwrap
from unittest.mock import Mock

import pytest

from autoprec.records import (
    BF16_O2,
    FP32,
    Basis,
    Constraint,
    Estimate,
    FrontPoint,
    Gemm,
    GemmShape,
    Island,
    LayerKind,
    LayerTiming,
    Operand,
    OperandStatistics,
    Option,
    Plan,
    Profile,
    Recipe,
    Search,
    Sensitivity,
    StepError,
    StepTiming,
    Timing,
    fp8_option,
)
from autoprec.search import build_plan, planning, search_plan
from autoprec.search.costs import make_costs
from autoprec.sensitivity.gap import expected_gap
from tests.report_runs import (
    CPU,
    H100,
    linear,
    make_profile,
    make_sensitivity,
    make_spec,
    step,
    timing,
)
from tests.search_tables import ROWWISE, TENSORWISE, TYPICAL, Row, replaced_layer, tables_of

SLOW_FP8: Row = {FP32: (4.0, 0.0), BF16_O2: (2.0, 1e-5), TENSORWISE: (3.2, 1e-3)}
SLOW_BF16: Row = {FP32: (2.0, 0.0), BF16_O2: (3.0, 1e-5)}


def planned(
    tables: tuple[Profile, Sensitivity], *, budget: float | None = 4e-3, keep: tuple[str, ...] = ()
) -> tuple[Search, Plan]:
    constraint = Constraint(loss_tolerance=1e-3, grad_error_budget=budget, keep=keep)
    search = search_plan(*tables, constraint=constraint, evaluate=None, trials=2)
    return search, build_plan(*tables, search, search.chosen, constraint=constraint)


def reason(plan: Plan, name: str) -> str:
    return next(layer.reason for layer in plan.layers if layer.name == name)


def test_a_model_is_priced_once_where_bf16_o2_is_as_the_plan_between_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pricing = Mock(side_effect=make_costs)
    monkeypatch.setattr(planning, "make_costs", pricing)
    planned(tables_of({"a": TYPICAL}))
    assert pricing.call_count == 1


def test_fp32_after_refuted_plans_is_said_to_be_that() -> None:
    tables = tables_of({"a": TYPICAL}, activation_error=1e-6)
    search, plan = planned(tables)
    assert FP32 not in plan.options
    left = next(point for point in search.front if set(point.options) == {FP32})
    fallback = build_plan(*tables, search, left, constraint=plan.constraint)
    assert any("FP32 is the plan: training refuted plans with BF16" in x for x in fallback.notes)


def test_the_plan_says_what_the_search_chose() -> None:
    tables = tables_of({"a": TYPICAL, "b": TYPICAL}, activation_error=1e-6)
    search, plan = planned(tables)
    assert plan.options == search.chosen.options
    assert plan.grad_error == search.chosen.grad_error
    assert plan.grad_error_basis is Basis.PREDICTED
    assert plan.constraint.grad_error_budget == search.grad_error_budget
    assert plan.predicted is not None
    assert plan.predicted.plan_ms == search.chosen.step_ms
    assert plan.predicted.fp32_ms == 3.0 + 4.0 + 4.0
    assert plan.predicted.bf16_o2_ms == 2.0 + 2.0 + 2.0
    assert (plan.predicted.low_ms or 0.0) < plan.predicted.plan_ms < (plan.predicted.high_ms or 0.0)
    assert (plan.layers[0].layer_ms, plan.layers[0].baseline_ms) == (1.0, 2.0)
    assert plan.fingerprint.structure == tables[0].model.structure
    assert plan.fingerprint.device == CPU.name
    assert Plan.from_json(plan.to_json()) == plan


def test_a_measured_joint_e_is_the_plans() -> None:
    tables = tables_of({"a": TYPICAL})
    search, _ = planned(tables)
    constraint = Constraint(loss_tolerance=1e-3, grad_error_budget=None)
    point = search.chosen.model_copy(update={"grad_error_measured": 5e-4})
    plan = build_plan(*tables, search, point, constraint=constraint)
    assert (plan.grad_error, plan.grad_error_basis) == (5e-4, Basis.MEASURED)


def test_a_gap_is_expected_at_the_end_that_was_given_or_else_the_schedules() -> None:
    profile, sensitivity = tables_of({"a": TYPICAL})
    curve = tuple((t, 5.0 / t**0.1) for t in range(1, 21))
    scheduled = sensitivity.model_copy(update={"loss_curve": curve, "schedule_steps": 400})
    constraint = Constraint(loss_tolerance=1e-3, grad_error_budget=4e-3)
    search, plan = planned((profile, sensitivity))
    assert plan.expected_gap is None
    for run_steps, steps in ((None, 400), (2000, 2000)):
        asked = constraint.model_copy(update={"run_steps": run_steps})
        plan = build_plan(profile, scheduled, search, search.chosen, constraint=asked)
        assert plan.expected_gap == expected_gap(scheduled, plan.grad_error, steps)
        assert plan.expected_gap.mean is not None
        assert plan.expected_gap.reason == ("" if run_steps else "for the end of the scheduler")


def test_the_fingerprint_tells_predicted_times_and_transferred_effects() -> None:
    profile, sensitivity = tables_of({"a": TYPICAL})
    rows = tuple(r.model_copy(update={"basis": Basis.TRANSFERRED}) for r in sensitivity.rows)
    tables = (
        profile.model_copy(update={"basis": Basis.PREDICTED}),
        sensitivity.model_copy(update={"rows": rows}),
    )
    _, plan = planned(tables)
    assert plan.fingerprint.time_basis is Basis.PREDICTED
    assert plan.fingerprint.sensitivity_basis is Basis.TRANSFERRED


# --- reasons ------------------------------------------------------------------------------------


def test_fp8_tells_its_speed_and_its_error() -> None:
    _, plan = planned(tables_of({"a": TYPICAL}))
    assert (
        reason(plan, "a")
        == "FP8 tensorwise 2x faster than BF16 at M=32 K=32 N=32, gradient error 0.10 %"
    )


def test_a_gentler_recipe_names_the_faster_one() -> None:
    _, plan = planned(tables_of({"a": TYPICAL}), budget=8e-4)
    assert plan.options == (ROWWISE,)
    assert reason(plan, "a").endswith("tensorwise is faster still, but has gradient error 0.10 %")


def test_masked_recipes_read_well() -> None:
    masked = fp8_option(Recipe.ROWWISE, Gemm.GRAD_INPUT)
    _, plan = planned(tables_of({"a": {**SLOW_FP8, masked: (1.0, 1e-4)}}))
    assert plan.options == (masked,)
    assert reason(plan, "a").startswith("FP8 rowwise (grad_input in BF16) 2x faster than BF16")


def test_slower_fp8_is_named_with_its_shape() -> None:
    _, plan = planned(tables_of({"a": SLOW_FP8}))
    assert reason(plan, "a") == (
        "FP8 tensorwise 1.6x slower than BF16 at M=32 K=32 N=32; BF16 2x faster than FP32"
    )


def test_bf16_is_compared_to_fp32_as_in_the_table_and_with_the_casts_of_a_bf16_flow() -> None:
    rows: dict[str, Row] = {
        "norm": {FP32: (1.0, 0.0), BF16_O2: (1.0, 1e-6)},
        "fp32": {FP32: (1.0, 0.0), BF16_O2: (4.0, 1e-6)},
        "a": {FP32: (9.0, 0.0), BF16_O2: (2.0, 1e-6)},
    }
    casts = 1.0 / (2 * 32 * 32 / 1e6)  # ms per million elements: 1 ms around a layer
    _, plan = planned(tables_of(rows, cast_ms=casts))
    assert plan.options == (BF16_O2, FP32, BF16_O2)
    norm, fp32, _ = plan.layers
    assert (norm.layer_ms, norm.baseline_ms, fp32.layer_ms) == (1.0, 1.0, 1.0)
    alone = "BF16 as fast as FP32 (2x faster with the casts around FP32)"
    assert reason(plan, "norm").startswith(alone)
    assert reason(plan, "fp32") == (
        "BF16 4x slower than FP32 at M=32 K=32 N=32 (2x slower with the casts around FP32)"
    )
    _, all_fp32 = planned(tables_of({"a": SLOW_BF16}, cast_ms=casts))
    assert "casts" not in reason(all_fp32, "a")


def test_bf16_that_is_too_harmful_is_compared_to_fp32_as_in_the_table() -> None:
    harmful: Row = {FP32: (1.5, 0.0), BF16_O2: (1.0, 0.5)}
    casts = 0.5 / (2 * 32 * 32 / 1e6)
    _, plan = planned(tables_of({"a": harmful, "b": TYPICAL}, cast_ms=casts))
    assert plan.options[0] == FP32
    assert reason(plan, "a").startswith(
        "BF16 1.5x faster than FP32 (2x faster with the casts around FP32), but alone is over"
    )


def test_bf16_that_is_too_harmful_is_named_with_a_mean_far_from_zero() -> None:
    harmful: Row = {FP32: (1.5, 0.0), BF16_O2: (1.0, 0.5)}
    profile, sensitivity = tables_of({"a": harmful, "b": TYPICAL})
    far = OperandStatistics(
        name="a",
        operand=Operand.INPUT,
        amax=9.0,
        mean_over_std=8.0,
        underflow={},
        outlier_channels=(),
        channels=32,
    )
    _, plan = planned((profile, sensitivity.model_copy(update={"statistics": (far,)})))
    told = "; input: mean 8.0x its spread, which rounding is relative to"
    assert reason(plan, "a").endswith(told)


def test_a_layer_that_dominates_the_error_is_named_with_the_cause() -> None:
    harmful: Row = {FP32: (4.0, 0.0), BF16_O2: (2.0, 1e-5), TENSORWISE: (1.6, 2.8e-3)}
    profile, sensitivity = tables_of({"a": harmful, "b": TYPICAL, "c": TYPICAL})
    cause = OperandStatistics(
        name="a",
        operand=Operand.GRAD_OUTPUT,
        amax=1.0,
        underflow={"tensorwise": 0.31, "rowwise": 0.004},
        outlier_channels=(),
        channels=32,
    )
    tables = (profile, sensitivity.model_copy(update={"statistics": (cause,)}))
    _, plan = planned(tables)
    assert reason(plan, "a").startswith(
        "FP8 tensorwise 1.25x faster, but dominates the gradient error (error 0.28 %, budget "
        "0.40 %); grad_output: 31 % underflow under tensorwise; rowwise 0.40 %"
    )
    _, plan = planned(tables, budget=2.5e-3)
    assert "but alone is over the budget (error 0.28 %, budget 0.25 %)" in reason(plan, "a")


def test_an_ineligible_layer_gives_its_refusal() -> None:
    profile, sensitivity = tables_of({"router": {FP32: (4.0, 0.0), BF16_O2: (2.0, 1e-5)}})
    profile = replaced_layer(profile, linear("router", 32, 32, 10))
    _, plan = planned((profile, sensitivity))
    assert reason(plan, "router") == (
        "BF16 2x faster than FP32; N=10 is not a multiple of 16, which FP8 GEMMs need"
    )


def test_an_option_that_could_not_be_timed_gives_the_profiles_words() -> None:
    profile, sensitivity = tables_of({"a": {FP32: (4.0, 0.0), BF16_O2: (2.0, 1e-5)}})
    layers = tuple(
        row.model_copy(update={"option": TENSORWISE, "infeasible": "no kernel for this shape"})
        for row in profile.layers[:1]
    )
    profile = profile.model_copy(update={"layers": (*profile.layers, *layers)})
    _, plan = planned((profile, sensitivity))
    assert reason(plan, "a").endswith("no FP8: no kernel for this shape")


def test_kept_tied_and_uncalled_layers_say_so() -> None:
    rows: dict[str, Row] = {"token": TYPICAL, "unused": TYPICAL, "head": TYPICAL, "fc": TYPICAL}
    tables = tables_of(rows, tied={"head": "token"}, uncalled=("unused",))
    _, plan = planned(tables, keep=("fc=bf16_o2",))
    assert reason(plan, "fc") == "kept by --keep 'fc=bf16_o2'"
    assert reason(plan, "unused") == "no call with gradients in the step; follows the BF16 layers"
    assert reason(plan, "head").endswith("; tied to token")
    assert reason(plan, "token").endswith("; shares its parameter with head")


def test_a_head_inside_a_fused_loss_says_why_it_is_not_in_fp8() -> None:
    profile, sensitivity = tables_of({"fc": TYPICAL, "head": TYPICAL}, uncalled=("head",))
    head = profile.model.layer("head").model_copy(update={"is_used_uncalled": True})
    layers = (profile.model.layer("fc"), head)
    model = profile.model.model_copy(update={"layers": layers})
    _, plan = planned((profile.model_copy(update={"model": model}), sensitivity))
    assert "as a fused linear cross-entropy does" in reason(plan, "head")
    assert not next(layer for layer in plan.layers if layer.name == "head").option.is_fp8


@pytest.mark.parametrize(("N", "is_said"), [(64, True), (16, False)])
def test_a_vocabularys_head_in_fp8_rules_out_a_fused_loss(N: int, is_said: bool) -> None:
    profile, sensitivity = tables_of({"fc": TYPICAL, "lm_head": TYPICAL})
    head = profile.model.layer("lm_head").model_copy(update={"gemm": GemmShape(M=64, K=32, N=N)})
    model = profile.model.model_copy(update={"layers": (profile.model.layer("fc"), head)})
    _, plan = planned((profile.model_copy(update={"model": model}), sensitivity))
    assert all(layer.option.is_fp8 for layer in plan.layers)
    assert any("lm_head in FP8 rules out" in note for note in plan.notes) == is_said


def test_a_guilty_layer_says_so() -> None:
    tables = tables_of({"a": TYPICAL, "b": TYPICAL})
    search, _ = planned(tables)
    found = search.model_copy(update={"interacting": ("b",)})
    point = FrontPoint(options=(TENSORWISE, BF16_O2), step_ms=5.0, grad_error=1e-3)
    constraint = Constraint(loss_tolerance=1e-3, grad_error_budget=None)
    plan = build_plan(*tables, found, point, constraint=constraint)
    assert "adds more error than alone (found by bisection)" in reason(plan, "b")


# --- what pays and what does not ----------------------------------------------------------------


def test_fp8_that_pays_says_on_how_many_layers() -> None:
    _, plan = planned(tables_of({"a": TYPICAL, "b": SLOW_FP8}))
    assert plan.notes[0] == (
        "FP8 pays on 1 of 2 linear layers: 1.00 ms a step less in them than in BF16 (measured)"
    )


@pytest.mark.parametrize("has_faster", [True, False])
def test_forced_fp8_that_is_slower_never_pays(has_faster: bool) -> None:
    rows = {"a": SLOW_FP8, "b": SLOW_FP8, **({"c": TYPICAL} if has_faster else {})}
    _, plan = planned(tables_of(rows), keep=("*=fp8_o1:tensorwise",))
    forced = "the 2 layers in FP8 because of --keep are 2.40 ms a step slower than in BF16 (a, b)"
    pays = "FP8 pays on 1 of 3 linear layers: 1.00 ms a step less in them than in BF16 (measured)"
    assert plan.notes[0] == (
        f"{pays}; {forced}" if has_faster else f"FP8 is not worth it here: {forced}"
    )
    assert not any("FSDP" in note for note in plan.notes)


def test_what_is_kept_says_its_cost_against_the_free_choice() -> None:
    tables = tables_of({"a": TYPICAL, "b": TYPICAL})  # free: both tensorwise, 1 ms each
    search, plan = planned(tables, keep=("a=bf16_o2",))
    assert search.free is not None
    assert search.free.options == (TENSORWISE, TENSORWISE)
    said = (
        "--keep costs 25 % of a step, by its layers' times; its gradient error is 0.10 %, "
        "the free choice's 0.20 %"
    )
    assert said in plan.notes
    search, plan = planned(tables, keep=("a=fp8_o1",))
    assert search.free == search.exact
    assert "--keep costs nothing: the free choice is the same" in plan.notes
    search, plan = planned(tables)
    assert search.free is None
    assert not any("--keep" in note for note in plan.notes)


def test_a_measured_steps_spread_is_in_the_interval_outside_layers() -> None:
    profile, sensitivity = tables_of({"a": TYPICAL})
    spread = [step(label, ms, CPU) for label, ms in (("fp32", 7.0), ("bf16_o2", 4.0))]
    _, steady = planned((profile, sensitivity))
    measured = profile.model_copy(update={"steps": tuple(spread)})
    _, plan = planned((measured, sensitivity))
    assert steady.predicted is not None
    assert plan.predicted is not None
    rest_ms = plan.predicted.plan_ms - 1.0
    timing = spread[1].timing
    assert timing.p20_ms < timing.median_ms < timing.p80_ms
    assert (plan.predicted.low_ms or 0.0) == pytest.approx(
        (steady.predicted.low_ms or 0.0) - rest_ms * (1.0 - timing.p20_ms / timing.median_ms)
    )


@pytest.mark.parametrize(("ms", "is_tie"), [(0.997, True), (0.98, False)])
def test_of_options_as_fast_the_more_precise_is_taken_and_said(ms: float, is_tie: bool) -> None:
    row: Row = {FP32: (4.0, 0.0), BF16_O2: (2.0, 0.0), TENSORWISE: (ms, 2e-3), ROWWISE: (1.0, 1e-3)}
    _, plan = planned(tables_of({"a": row}), budget=4e-3)
    assert plan.options == ((ROWWISE if is_tie else TENSORWISE),)
    said = "the 1 layer where options take the same time within 0.50 % has the one of less"
    assert any(note.startswith(said) for note in plan.notes) is is_tie


def test_a_kept_gain_that_is_not_sure_costs_no_time() -> None:
    rows = {"a": {FP32: (4.0, 0.0), BF16_O2: (2.0, 0.0), TENSORWISE: (1.99, 1e-3)}}
    search, plan = planned(tables_of(rows), keep=("a=fp8_o1",))
    assert search.free is not None
    assert search.free.options == (BF16_O2,)
    assert any("no time, and gains 0.25 % that are not sure" in note for note in plan.notes)


def test_fp8_that_is_slower_everywhere_is_not_worth_it() -> None:
    profile, sensitivity = tables_of({"a": SLOW_FP8, "b": SLOW_FP8})
    _, plan = planned((profile, sensitivity))
    answer = (
        "FP8 is not worth it here: on the 2 layers that can take it the fastest recipe needs "
        "6.40 ms (measured), the plan 4.00 ms (measured)"
    )
    assert plan.notes[0] == answer
    steps = tuple(step(label, ms, CPU) for label, ms in (("fp8_o1", 9.0), ("bf16_o2", 6.0)))
    _, plan = planned((profile.model_copy(update={"steps": steps}), sensitivity))
    assert plan.notes[0] == (
        f"{answer}; the whole step with FP8 takes 1.50x as long as in BF16 O2 (measured)"
    )
    steps = tuple(step(label, ms, CPU) for label, ms in (("fp8_o1", 5.0), ("bf16_o2", 6.0)))
    _, plan = planned((profile.model_copy(update={"steps": steps}), sensitivity))
    assert plan.notes[0] == (
        f"{answer}; whole steps do not show that: with FP8 they take 0.833x as long as in "
        "BF16 O2 (measured)"
    )


def test_where_fp32_is_the_plan_fp8_is_beside_fp32_and_measured_steps_beat_predicted_layers() -> (
    None
):
    row: Row = {FP32: (1.0, 0.0), BF16_O2: (22.0, 1e-5), TENSORWISE: (3.0, 1e-3)}
    profile, sensitivity = tables_of({"a": row})
    *others, fp8 = profile.layers
    total = timing(3.0).model_copy(update={"basis": Basis.PREDICTED})
    rows = (*others, fp8.model_copy(update={"total": total}))
    ms = {"fp32": 4.0, "bf16_o2": 40.0, "fp8_o1": 5.0}
    steps = tuple(step(label, each, CPU) for label, each in ms.items())
    profile = profile.model_copy(update={"steps": steps, "layers": rows})
    _, plan = planned((profile, sensitivity))
    assert plan.options == (FP32,)
    assert plan.notes[0] == (
        "FP8 is not worth it here: no FP8 recipe seems faster on the 1 layer that can take it; the "
        "whole step with FP8 takes 1.25x as long as in FP32 (measured)"
    )


def test_fp8_that_costs_too_much_error_is_not_worth_it() -> None:
    _, plan = planned(tables_of({"a": TYPICAL}), budget=5e-4)
    assert plan.notes[0] == (
        "FP8 is not worth it here: it is faster on the 1 layer (1.00 ms a step in all, measured), "
        "but not by enough for the gradient error it adds (budget 0.050 %)"
    )


def test_fp8_that_the_user_closed_is_not_blamed_on_its_error() -> None:
    _, plan = planned(tables_of({"a": TYPICAL}), keep=("a=bf16_o2",))
    assert "a may not take it (--keep, or unknown gradient error)" in plan.notes[0]


def test_bf16_that_the_user_closed_is_not_blamed_on_its_error() -> None:
    _, plan = planned(tables_of({"a": TYPICAL}), keep=("a=fp32",))
    reason = "BF16 O2 is 1.75x faster, but FP32 is the plan: a may not take it (--keep, or unknown"
    assert any(note.startswith(reason) for note in plan.notes)


def test_a_device_without_fp8_says_its_own_reason() -> None:
    profile, sensitivity = tables_of({"a": {FP32: (4.0, 0.0), BF16_O2: (2.0, 1e-5)}})
    facts = {"fp8_recipes": (), "fp8_reason": "FP8 GEMMs need capability 8.9, this has 8.0"}
    device = profile.device.model_copy(update=facts)
    _, plan = planned((profile.model_copy(update={"device": device}), sensitivity))
    assert plan.notes[0] == (
        "FP8 is not worth it here: FP8 GEMMs need capability 8.9, this has 8.0"
    )


def test_a_model_whose_linears_are_ineligible_says_why() -> None:
    profile, sensitivity = tables_of({"router": {FP32: (4.0, 0.0), BF16_O2: (2.0, 1e-5)}})
    _, plan = planned((profile, sensitivity))
    assert plan.notes[0].endswith("no FP8 option was profiled")
    _, plan = planned((replaced_layer(profile, linear("router", 32, 32, 10)), sensitivity))
    assert "none of the linear layers can take it (1 of them: N=10 is not" in plan.notes[0]
    other = linear("router", 32, 32, 32).model_copy(update={"kind": LayerKind.OTHER})
    _, plan = planned((replaced_layer(profile, other), sensitivity))
    assert plan.notes[0].endswith("no layer is a linear with one weight matrix")


def test_a_plan_that_is_slower_than_bf16_for_its_error_says_so() -> None:
    rows = {
        "a": {FP32: (4.0, 0.0), BF16_O2: (2.0, 1e-2)},
        "b": {FP32: (4.0, 0.0), BF16_O2: (2.0, 1e-5)},
    }
    profile, sensitivity = tables_of(rows)
    between = Island(outputs=("a", "b"), grad_error=0.1)  # measured with it, and not BF16 O2 itself
    for islands, which in (
        ((), "1.33x faster"),
        ((between,), "1.29x faster with FP32 between layers"),
    ):
        known = sensitivity.model_copy(update={"islands": islands})
        _, plan = planned((profile, known), budget=4e-3)
        assert plan.options == (FP32, BF16_O2)
        said = f"BF16 O2 is {which}, but its gradient error is 1.0 %, the budget 0.40 %; "
        note = f"{said}2.6x the --loss-tolerance lets it in"
        assert note in plan.notes
        # lines of the answer, which has few
        assert len(textwrap.wrap(note.removeprefix("BF16 O2 "), 70)) == 2


def test_a_budget_that_is_small_for_errors_early_in_the_run_is_said_to_be() -> None:
    profile, sensitivity = tables_of({"a": {FP32: (4.0, 0.0), BF16_O2: (2.0, 1e-2)}})
    points = (StepError(step=s, grad_error=Estimate(mean=e)) for s, e in ((10, 0.1), (50, 0.01)))
    early = sensitivity.model_copy(update={"by_step": tuple(points)})
    for found, said in (
        (early, "the budget 0.042 % (divided by 10 for errors early in the run)"),
        (sensitivity, "the budget 0.42 %;"),
    ):
        _, plan = planned((profile, found), budget=None)
        assert any(note.startswith("BF16 O2 is") and said in note for note in plan.notes)


@pytest.mark.parametrize(
    ("row", "budget", "words"),
    [
        (SLOW_BF16, 4e-3, "by its layers the step takes 1.00x as long in BF16 O2 as in FP32"),
        (
            TYPICAL,
            5e-6,
            "BF16 O2 is 1.75x faster, but FP32 is the plan: BF16's gradient error is",
        ),
        ({FP32: (2.0, 0.0)}, 4e-3, "no layer can take it"),
        (
            {FP32: (2.0, 0.0), BF16_O2: (2.999, 3e-3)},
            4e-3,
            "BF16 O2 is as fast, but FP32 is the plan: its gain is not worth its gradient error",
        ),
    ],
)
def test_bf16_that_is_not_worth_it_leaves_fp32(row: Row, budget: float, words: str) -> None:
    _, plan = planned(tables_of({"a": row}), budget=budget)
    assert plan.options == (FP32,)
    assert plan.notes[0].startswith("FP8 is not worth it here: ")
    assert words in plan.notes[1]
    assert (plan.grad_error, plan.grad_error_basis) == (0.0, Basis.MEASURED)


# --- a whole model ------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", [H100, CPU])
def test_every_layer_of_a_transformer_has_a_reason(machine: object) -> None:
    on_gpu = machine is H100
    spec = make_spec(blocks=2, M=16384 if on_gpu else 2048, width=2048 if on_gpu else 256)
    tables = (make_profile(spec, H100 if on_gpu else CPU), make_sensitivity(spec))
    search, plan = planned(tables)
    assert all(layer.reason and "\n" not in layer.reason for layer in plan.layers)
    has_fp8 = any(option.is_fp8 for option in plan.options)
    assert has_fp8 == on_gpu
    expected = sum(_ms(tables[0], n, o) for n, o in zip(spec.names, plan.options, strict=True))
    assert search.chosen.step_ms == pytest.approx(expected + tables[0].fixed_bf16_ms)


def _ms(profile: Profile, name: str, option: Option) -> float:
    row = profile.timing(name, option)
    assert row is not None
    assert row.total is not None
    return row.total.median_ms


def test_a_measured_gain_within_its_uncertainty_is_not_taken() -> None:
    close: Row = {FP32: (1.9, 0.0), BF16_O2: (2.0, 1e-5), TENSORWISE: (1.9, 1e-3)}
    profile, sensitivity = tables_of({"a": close, "b": TYPICAL})  # p20 and p80 5 % off the median
    _, plan = planned((profile, sensitivity))
    a, b = plan.layers
    assert a.option == BF16_O2
    assert b.option.is_fp8
    assert a.reason.count("a gain within its uncertainty") == 2  # of FP8, and of FP32
    assert any(
        note.startswith("the 1 layer that might be faster out of BF16") for note in plan.notes
    )
    exact = profile.model_copy(update={"layers": tuple(map(without_spread, profile.layers))})
    _, plan = planned((exact, sensitivity))
    assert plan.layers[0].option != BF16_O2


def test_a_tie_of_whole_steps_goes_to_bf16() -> None:
    tie: Row = {FP32: (2.0, 0.0), BF16_O2: (2.0, 1e-5)}
    profile, sensitivity = tables_of({"a": tie, "b": tie})
    steps = tuple(
        StepTiming(label=label, timing=timing(ms, samples=6, spread=0.02), peak_bytes=None)
        for label, ms in (("fp32", 7.0), ("bf16_o2", 7.05))
    )
    profile = profile.model_copy(update={"steps": steps, "fixed_ms": 3.0, "fixed_bf16_ms": 3.05})
    _, plan = planned((profile, sensitivity))
    assert set(plan.options) == {BF16_O2}
    slow = profile.model_copy(update={"fixed_bf16_ms": 3.5})
    _, plan = planned((slow, sensitivity))
    assert set(plan.options) == {FP32}


def without_spread(row: LayerTiming) -> LayerTiming:
    assert row.total is not None
    total = timing(row.total.median_ms, spread=0.0)
    return row.model_copy(update={"total": total})


def test_a_noisy_bf16_step_far_above_fp32_keeps_no_layer_in_bf16() -> None:
    """What is outside of layers is FP32's there: no spread of BF16's step makes it doubtful."""
    rows: Row = {FP32: (50.0, 0.0), BF16_O2: (950.0, 0.0)}
    norm: Row = {FP32: (1.0, 0.0), BF16_O2: (1.1, 0.0)}
    profile, sensitivity = tables_of({"a": rows, "b": norm})
    spread = {"fp32": (99.0, 100.0, 101.0, 4), "bf16_o2": (800.0, 1000.0, 1200.0, 2)}
    steps = tuple(
        StepTiming(
            label=label,
            timing=Timing(p20_ms=low, median_ms=ms, p80_ms=high, samples=samples),
            peak_bytes=None,
        )
        for label, (low, ms, high, samples) in spread.items()
    )
    fixed = {"steps": steps, "fixed_ms": 49.0, "fixed_bf16_ms": 49.0}
    _, plan = planned((profile.model_copy(update=fixed), sensitivity))
    assert set(plan.options) == {FP32}
