import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprec.device.timing import timing_from
from autoprec.errors import InfeasibleError, RecordError
from autoprec.records import (
    BF16_O2,
    FP32,
    Constraint,
    ModelSpec,
    Option,
    StepTiming,
)
from autoprec.search.costs import Costs, make_costs
from autoprec.search.keep import parse_keep, resolve_keep
from autoprec.search.problem import Options, Problem, exact, front, make_problem, wide_groups
from autoprec.search.space import make_roles
from tests.examples import examples
from tests.report_runs import linear, make_spec
from tests.search_tables import (
    ROWWISE,
    TENSORWISE,
    TYPICAL,
    Row,
    called,
    replaced_layer,
    sensitivity_of,
    spec_of,
    tables_of,
    tensor,
)

SLOW_FP8: Row = {FP32: (4.0, 0.0), BF16_O2: (2.0, 1e-5), TENSORWISE: (2.5, 1e-6)}


def constraint(*kept: str, memory_bytes: int | None = None) -> Constraint:
    return Constraint(
        loss_tolerance=1e-3, grad_error_budget=None, keep=kept, memory_bytes=memory_bytes
    )


def problem_of(
    rows: dict[str, Row],
    *kept: str,
    memory_bytes: int | None = None,
    tied: dict[str, str] | None = None,
    uncalled: tuple[str, ...] = (),
    activation_error: float = 0.0,
    cast_ms: float = 0.0,
) -> Problem:
    profile, sensitivity = tables_of(
        rows, tied=tied, uncalled=uncalled, activation_error=activation_error, cast_ms=cast_ms
    )
    costs = make_costs(profile, sensitivity)
    return make_problem(costs, constraint(*kept, memory_bytes=memory_bytes))


# --- costs --------------------------------------------------------------------------------------


def test_a_plan_costs_its_flow_its_layers_and_the_casts_of_fp32_layers() -> None:
    costs = problem_of({"a": TYPICAL, "b": TYPICAL}, activation_error=2e-5, cast_ms=500.0).costs
    casts = 500.0 * 2 * 32 * 32 / 1e6  # [32, 32] in, [32, 32] out
    assert costs.step_ms((FP32, FP32)) == pytest.approx(3.0 + 4.0 + 4.0)
    assert costs.step_ms((BF16_O2, TENSORWISE)) == pytest.approx(2.0 + 2.0 + 1.0)
    assert costs.step_ms((BF16_O2, FP32)) == pytest.approx(2.0 + 2.0 + 4.0 + casts)
    assert costs.grad_error((FP32, FP32)) == 0.0
    assert costs.grad_error((BF16_O2, FP32)) == pytest.approx(2e-5 + 1e-5)
    assert costs.grad_error((BF16_O2, TENSORWISE)) == pytest.approx(2e-5 + 1e-5 + 1e-3)
    low, high = costs.step_interval((BF16_O2, TENSORWISE))
    assert (low, high) == pytest.approx((5.0 - 0.3, 5.0 + 0.3))


def test_an_e_that_noise_made_negative_counts_as_zero() -> None:
    costs = problem_of({"a": {FP32: (2.0, 0.0), BF16_O2: (1.0, -1e-6)}}).costs
    assert costs.grad_error((BF16_O2,)) == 0.0


def test_options_without_time_or_e_have_no_price_but_a_reason() -> None:
    profile, sensitivity = tables_of({"a": TYPICAL})
    rows = [row for row in profile.layers if row.option != ROWWISE]
    rows[-1] = rows[-1].model_copy(update={"infeasible": "out of memory"})
    costs = make_costs(profile.model_copy(update={"layers": tuple(rows)}), sensitivity)
    assert list(costs.prices[0]) == [FP32, BF16_O2]
    assert costs.missing[0][TENSORWISE] == "out of memory"
    assert costs.missing[0][ROWWISE] == "it was not timed"
    unmeasured = sensitivity.model_copy(update={"rows": sensitivity.rows[:1]})
    assert "was not measured" in make_costs(profile, unmeasured).missing[0][ROWWISE]


def test_a_called_layer_without_any_price_is_an_error() -> None:
    profile, sensitivity = tables_of({"a": TYPICAL})
    with pytest.raises(RecordError, match=r"'a' has none .*it was not timed.*again"):
        make_costs(profile.model_copy(update={"layers": ()}), sensitivity)


def test_casts_beside_fp32_are_of_all_that_goes_in_and_out() -> None:
    profile, sensitivity = tables_of({"a": TYPICAL}, cast_ms=1.0)
    spec = profile.model.layers[0]
    update = {"calls": called(tensor(2, 3, 8, 8), tensor(4, dtype="int64"), count=2)}
    spec = spec.model_copy(update={**update, "output_elements": 2 * 12 * 4 * 4})
    costs = make_costs(replaced_layer(profile, spec), sensitivity)
    elements = 2 * 2 * 3 * 8 * 8 + 2 * 12 * 4 * 4  # indices are not cast
    assert costs.prices[0][FP32].boundary_ms == pytest.approx(elements / 1e6)
    assert costs.prices[0][BF16_O2].boundary_ms == 0.0


# --- keeps --------------------------------------------------------------------------------------


def test_keeps_fix_every_layer_that_the_glob_matches_whole() -> None:
    rows = {"block.1.fc": TYPICAL, "block.10.fc": TYPICAL, "embed": TYPICAL, "embedding": TYPICAL}
    problem = problem_of(rows, "block.*=bf16_o2", "embed=fp32", "embedding=fp8_o1")
    assert problem.allowed == ((BF16_O2,), (BF16_O2,), (FP32,), (TENSORWISE, ROWWISE))


@pytest.mark.parametrize(
    ("keep", "match"),
    [
        (("hed=bf16_o2",), r"'hed=bf16_o2' must match a layer by its whole name.*nearest are head"),
        (("head",), r"must be GLOB=PRECISION\[:RECIPE\], but it is 'head'"),
        (("head=int8",), r"one of fp8_o1, bf16_o2, fp32 .*'head=int8' names 'int8'"),
        (("head=fp8_o1:slow",), r"names 'fp8_o1:slow'"),
    ],
)
def test_a_keep_that_cannot_be_read_or_matches_nothing_is_an_error(
    keep: tuple[str, ...], match: str
) -> None:
    with pytest.raises(RecordError, match=match):
        problem_of({"head": TYPICAL, "body": TYPICAL}, *keep)


def test_keeps_that_contradict_each_other_are_an_error() -> None:
    with pytest.raises(InfeasibleError, match=r"'head' is in both '\*=bf16_o2' and 'head=fp32'"):
        problem_of({"head": TYPICAL}, "*=bf16_o2", "head=fp32")
    problem_of({"head": TYPICAL}, "*=bf16_o2", "head=bf16_o2")  # twice the same is no contradiction


def test_a_layer_that_cannot_take_what_is_kept_is_an_error_with_the_refusal() -> None:
    profile, sensitivity = tables_of({"router": {FP32: (1.0, 0.0), BF16_O2: (0.5, 1e-5)}})
    refusing = linear("router", 32, 32, 10)
    profile = replaced_layer(profile, refusing)
    with pytest.raises(InfeasibleError, match=r"router cannot \(N=10 is not a multiple of 16"):
        make_problem(make_costs(profile, sensitivity), constraint("router=fp8_o1:rowwise"))


def test_a_glob_means_the_layers_that_can_take_the_precision_and_a_note_names_the_others() -> None:
    profile, sensitivity = tables_of({"blocks.0": TYPICAL, "blocks.1": TYPICAL, "router": TYPICAL})
    profile = replaced_layer(profile, linear("router", 32, 32, 10))
    rows = tuple(r for r in profile.layers if "router" not in r.names or not r.option.is_fp8)
    costs = make_costs(profile.model_copy(update={"layers": rows}), sensitivity)
    problem = make_problem(costs, constraint("*=fp8_o1:rowwise"))
    assert problem.allowed[:2] == ((ROWWISE,), (ROWWISE,))
    assert ROWWISE not in problem.allowed[2]
    (note,) = problem.keeps.notes
    assert note.startswith("--keep '*=fp8_o1:rowwise' fixes 2 of the 3 layers that it matches; ")
    assert "router cannot (" in note


# --- keeps, before anything is timed ------------------------------------------------------------


def spec_with_norm() -> ModelSpec:
    spec = make_spec(blocks=1, M=64, width=32)
    assert {"blocks.0.norm1", "blocks.0.fc1"} < set(spec.names)
    return spec


@pytest.mark.parametrize(
    ("keep", "error", "match"),
    [
        (
            "blocks.0.fc=fp32",
            RecordError,
            r"no layer of the model does; the nearest are blocks.0.fc",
        ),
        ("*norm*=fp8_o1", InfeasibleError, r"norm1, blocks.0.norm2 cannot \(PyTorch has no FP8"),
        ("router=fp8_o1", InfeasibleError, r"router cannot \(N=10 is not a multiple of 16"),
        ("blocks.0.fc1=fp8_o1:rowwise", InfeasibleError, r"only fp8_o1:tensorwise \(see --recipes"),
    ],
)
def test_a_wrong_keep_is_refused_by_the_models_spec_alone(
    keep: str, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match) as caught:
        resolve_keep([keep], spec_with_norm(), options=(TENSORWISE,))
    assert "\n" not in str(caught.value)


def test_a_right_keep_is_resolved_by_the_models_spec_alone() -> None:
    spec = spec_with_norm()
    found = resolve_keep(["blocks.*=fp8_o1:rowwise", "*norm*=fp32"], spec)
    assert {found.of_layer[f"blocks.0.{name}"].option for name in ("qkv", "fc1")} == {ROWWISE}
    assert found.of_layer["blocks.0.norm1"].option == FP32  # no contradiction: it is not in FP8
    (note,) = found.notes
    assert "blocks.0.norm1, blocks.0.norm2 cannot (PyTorch has no FP8 norm" in note


@pytest.mark.parametrize("gemms_hp", [True, False])
def test_a_keep_with_gemms_in_bf16_needs_that_they_are_considered(gemms_hp: bool) -> None:
    keep = ["blocks.0.fc1=fp8_o1:tensorwise-grad_weight"]
    if gemms_hp:
        assert resolve_keep(keep, spec_with_norm(), options=(TENSORWISE,)).of_layer
    else:
        with pytest.raises(InfeasibleError, match="is not considered, only fp8_o1:tensorwise"):
            resolve_keep(keep, spec_with_norm(), options=(TENSORWISE,), gemms_hp=False)


def test_keep_reads_masked_recipes() -> None:
    keep = parse_keep("a=b=fp8_o1:tensorwise-grad_weight")
    assert keep.glob == "a=b"
    assert keep.option == Option.parse("fp8_o1:tensorwise-grad_weight")


# --- choices ------------------------------------------------------------------------------------


def test_an_option_that_is_no_faster_than_a_gentler_one_is_locked() -> None:
    problem = problem_of({"a": SLOW_FP8, "b": TYPICAL})
    assert problem.groups[0].choices == ((FP32,), (BF16_O2,))  # even though its e is smaller


def test_slow_bf16_is_taken_where_the_flow_is_worth_it() -> None:
    slow_bf16: Row = {FP32: (2.0, 0.0), BF16_O2: (2.5, 1e-5)}  # the BF16 flow saves 1 ms
    found = exact(problem_of({"a": slow_bf16, "b": slow_bf16}), 1.0)
    assert found is not None
    assert sorted(option.key for option in found[0]) == ["bf16_o2", "fp32"]


def test_layers_that_the_step_did_not_call_follow_the_flow() -> None:
    problem = problem_of({"a": TYPICAL, "unused": TYPICAL}, uncalled=("unused",))
    found = exact(problem, 1.0)
    assert found is not None
    assert found[0] == (TENSORWISE, BF16_O2)
    found = exact(problem, 0.0)
    assert found is not None
    assert found[0] == (FP32, FP32)


def test_tied_layers_take_one_storage() -> None:
    poor: Row = {FP32: (4.0, 0.0), BF16_O2: (3.9, 5e-3)}
    problem = problem_of({"token": poor, "head": TYPICAL, "fc": TYPICAL}, tied={"head": "token"})
    for budget in (1e-4, 1e-3, 2e-3, 1.0):
        found = exact(problem, budget)
        assert found is not None
        token, head, _ = found[0]
        assert (token == FP32) == (head == FP32)


@pytest.mark.parametrize("kept", ["head", "token"])
@pytest.mark.parametrize("option", [FP32, BF16_O2])
def test_a_tie_follows_the_layer_that_is_kept(kept: str, option: Option) -> None:
    poor: Row = {FP32: (4.0, 0.0), BF16_O2: (3.9, 5e-3)}
    rows = {"token": poor, "head": TYPICAL, "fc": TYPICAL}
    problem = problem_of(rows, f"{kept}={option.key}", tied={"head": "token"})
    for plan in (*problem.uniform_plans, *front(problem)):
        is_16_bit = {plan[index] != FP32 for index in (0, 1)}
        assert is_16_bit == {option != FP32}


def test_keeps_that_part_tied_layers_are_an_error() -> None:
    with pytest.raises(InfeasibleError, match=r"all FP32 or all 16-bit, but 'token', 'head' have"):
        problem_of(
            {"token": TYPICAL, "head": TYPICAL},
            "token=fp32",
            "head=bf16_o2",
            tied={"head": "token"},
        )


def test_uniform_plans_yield_to_keeps_and_ties() -> None:
    only_fp32: Row = {FP32: (1.0, 0.0)}
    rows = {"a": TYPICAL, "token": only_fp32, "head": TYPICAL, "b": TYPICAL}
    problem = problem_of(rows, "b=fp8_o1:rowwise", tied={"head": "token"})
    assert problem.uniform(BF16_O2) == (BF16_O2, FP32, FP32, ROWWISE)
    assert problem.uniform(FP32) == (FP32, FP32, FP32, ROWWISE)
    assert problem.fp32_plan is None


def test_a_memory_limit_buys_bytes_with_time() -> None:
    # in BF16 the layer takes half the bytes and more time
    rows: dict[str, Row] = {
        name: {FP32: (1.0, 0.0), BF16_O2: (1.5 + i, 1e-5)} for i, name in enumerate("abc")
    }
    found = exact(problem_of(rows, memory_bytes=10_000), 1.0)
    assert found is not None
    assert found[0] == (BF16_O2, FP32, FP32)
    with pytest.raises(InfeasibleError, match=r"in 4\.88 KiB, but the smallest needs 5\.86 KiB"):
        front(problem_of(rows, memory_bytes=5_000))


def every_plan(problem: Problem, tied: dict[str, str]) -> list[Options]:
    names = [layer.name for layer in problem.costs.layers]
    pairs = [(names.index(a), names.index(b)) for a, b in tied.items()]
    return [
        plan
        for plan in itertools.product(*problem.allowed)
        if all((plan[a] == FP32) == (plan[b] == FP32) for a, b in pairs)
    ]


def within(costs: Costs, plans: list[Options], budget: float) -> list[Options]:
    return [plan for plan in plans if costs.grad_error(plan) <= budget * (1 + 1e-9)]


def fastest(costs: Costs, plans: list[Options], budget: float) -> float:
    return min(costs.counted_ms(plan) for plan in within(costs, plans, budget))


prices = st.tuples(st.floats(0.1, 5.0), st.one_of(st.just(0.0), st.floats(1e-6, 1e-2)))


@st.composite
def model_rows(draw: st.DrawFn) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    for name in "abcd"[: draw(st.integers(1, 4))]:
        options = [BF16_O2, *draw(st.sets(st.sampled_from([TENSORWISE, ROWWISE])))]
        row = {option: draw(prices) for option in options}
        gentle = row[BF16_O2][1]
        # rounding to FP8 never adds less error than rounding to BF16: what locking relies on
        harsher = {o: (ms, max(grad_error, gentle)) for o, (ms, grad_error) in row.items()}
        rows[name] = {FP32: (draw(prices)[0], 0.0), **harsher}
    return rows


@given(
    rows=model_rows(),
    is_tied=st.booleans(),
    activation_error=st.sampled_from([0.0, 1e-4]),
    cast_ms=st.sampled_from([0.0, 300.0]),
    share=st.floats(0.0, 1.2),
)
@examples(20)
def test_exact_plan_and_front_equal_brute_force_over_whole_plans(
    rows: dict[str, Row], is_tied: bool, activation_error: float, cast_ms: float, share: float
) -> None:
    tied = {"b": "a"} if is_tied and len(rows) > 1 else {}
    problem = problem_of(rows, tied=tied, activation_error=activation_error, cast_ms=cast_ms)
    costs, plans = problem.costs, every_plan(problem, tied)
    budget = share * max(costs.grad_error(plan) for plan in plans)
    found = exact(problem, budget)
    assert found is not None  # all FP32 always fits
    soonest = min(problem.rank(plan)[0] for plan in within(costs, plans, budget))
    assert problem.rank(found[0])[0] == pytest.approx(soonest)
    assert found[1] == pytest.approx(fastest(costs, plans, budget), rel=1e-5)
    points = front(problem)
    for plan in points:
        assert costs.counted_ms(plan) == pytest.approx(
            fastest(costs, plans, costs.grad_error(plan)), rel=1e-5
        )
    gentlest_of_fastest = costs.counted_ms(points[-1])
    assert gentlest_of_fastest == pytest.approx(fastest(costs, plans, math.inf), rel=1e-5)


# --- the study's decisions ----------------------------------------------------------------------


def test_roles_gather_the_same_layer_of_every_block() -> None:
    rows = {f"blocks.{i}.{part}": TYPICAL for i in range(4) for part in ("qkv", "fc")}
    problem = problem_of(rows)
    roles = make_roles(problem.costs.layers, problem.allowed)
    assert list(roles) == ["blocks.*.qkv", "blocks.*.fc"]
    assert roles["blocks.*.qkv"].value((ROWWISE, FP32) * 4) == ROWWISE.key
    assert roles["blocks.*.qkv"].value((ROWWISE, FP32, BF16_O2, FP32) * 2) == "mixed"


def test_a_changed_table_may_take_what_the_table_rules_out() -> None:
    slower = {FP32: (4.0, 0.0), BF16_O2: (2.0, 1e-6), ROWWISE: (1.5, 2e-3), TENSORWISE: (1.2, 1e-3)}
    problem = problem_of({"a": slower, "b": SLOW_FP8})
    assert (ROWWISE,) not in problem.groups[0].choices  # slower, and with more error
    wide = wide_groups(problem)
    assert (ROWWISE,) in wide[0].choices
    assert set(wide[1].choices) == set(problem.groups[1].choices)  # FP8 that gains nothing


def test_the_spec_of_the_tables_is_the_models() -> None:
    spec = spec_of({"a": TYPICAL})
    assert sensitivity_of(spec, {"a": TYPICAL}).structure == spec.structure


def test_a_layer_that_was_timed_too_long_alone_leaves_no_plan_without_time() -> None:
    rows: dict[str, Row] = {
        "odd": {FP32: (0.5, 0.0), BF16_O2: (24.0, 1e-6)},  # more than the whole step
        "even": {FP32: (4.0, 0.0), BF16_O2: (2.0, 1e-6)},
    }
    profile, sensitivity = tables_of(rows)
    step = {"fp32": 7.5, "bf16_o2": 13.0}
    profile = profile.model_copy(
        update={
            "steps": tuple(
                StepTiming(label=label, timing=timing_from([ms, ms]), peak_bytes=None)
                for label, ms in step.items()
            ),
            "fixed_ms": step["fp32"] - 4.5,
            "fixed_bf16_ms": step["bf16_o2"] - 26.0,
        }
    )
    costs = make_costs(profile, sensitivity)
    assert costs.step_ms((FP32, FP32)) == pytest.approx(7.5)
    assert costs.step_ms((BF16_O2, BF16_O2)) == pytest.approx(13.0)
    assert costs.step_ms((FP32, BF16_O2)) == pytest.approx(1.25)  # half of the layers' own
