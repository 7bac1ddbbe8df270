"""Plans for a device that is not here: whole steps, their intervals, and what fits in memory."""

import itertools
import math
import random
import re
from collections.abc import Mapping, Sequence

import pytest

from autoprec.predict import load_device_profile, parse_parallel, predict_profile
from autoprec.predict.layers import Setting
from autoprec.predict.memory import memory_note
from autoprec.predict.step import step_times
from autoprec.predict.transfer import unknown_sensitivity
from autoprec.records import (
    BF16_O2,
    FP32,
    Basis,
    Constraint,
    LayerKind,
    ModelSpec,
    Option,
    ParameterSpec,
    Plan,
    Profile,
    Recipe,
    fp8_option,
)
from autoprec.records.cost import Timing
from autoprec.records.model import with_gemms_hp
from autoprec.records.sensitivity import Estimate, Island, Sensitivity
from autoprec.report.remarks import profile_notes
from autoprec.search import between_notes, build_plan, search_plan, sensitivity_for
from autoprec.search.costs import Costs, make_costs
from tests.decoder_specs import decoder, linear_layer, model_of, plain_layer
from tests.search_tables import TYPICAL, tables_of

H100 = load_device_profile("h100-sxm")
TENSORWISE, ROWWISE = fp8_option(Recipe.TENSORWISE), fp8_option(Recipe.ROWWISE)
WIDE = decoder(width=8192, hidden=28672)
HIDDEN, SHOWN = "fsdp=8", "fsdp=256"  # behind BF16 compute FSDP hides, and does not


def predicted(parallel: str = "", spec: ModelSpec = WIDE, *options: Option) -> Profile:
    return predict_profile(
        spec,
        H100,
        parallel=parse_parallel(parallel),
        compiled=True,
        options=options or (TENSORWISE, ROWWISE),
    )


def costs_of(profile: Profile) -> Costs:
    return make_costs(profile, unknown_sensitivity(profile.model))


def planned(profile: Profile, sensitivity: Sensitivity | None = None) -> Plan:
    sensitivity = sensitivity or unknown_sensitivity(profile.model)
    constraint = Constraint(loss_tolerance=1e-3, grad_error_budget=0.0)
    search = search_plan(profile, sensitivity, constraint=constraint, evaluate=None, trials=0)
    return build_plan(profile, sensitivity, search, search.chosen, constraint=constraint)


def uniform(costs: Costs, option: Option) -> tuple[Option, ...]:
    return tuple(option if option in row else BF16_O2 for row in costs.prices)


def interval(profile: Profile, label: str) -> tuple[float, float]:
    step = profile.step(label)
    assert step is not None
    return step.timing.p20_ms, step.timing.p80_ms


def whole_step_ms(profile: Profile, options: Sequence[Option]) -> float:
    """Return the cost model's step of a plan, in one go."""
    parallel = parse_parallel(profile.parallel)
    setting = Setting(H100.machine, parallel, True, profile.model.optimizer_state_numel_ratio)
    chosen = dict(zip(profile.model.names, options, strict=True))
    return step_times(profile.model, lambda layer: chosen[layer.name], setting).total / 1e3


# --- intervals ----------------------------------------------------------------------------------


def test_a_plan_that_is_a_uniform_step_has_its_interval() -> None:
    profile = predict_profile(decoder(), load_device_profile("a100"), compiled=True)
    plan = planned(profile)
    assert set(plan.options) == {BF16_O2}
    assert plan.predicted is not None
    assert (plan.predicted.low_ms, plan.predicted.high_ms) == pytest.approx(
        interval(profile, "bf16_o2")
    )


@pytest.mark.parametrize("parallel", ["", HIDDEN, SHOWN, "fsdp=32,tp=8"])
def test_uniform_plans_have_the_interval_of_the_whole_step(parallel: str) -> None:
    profile = predicted(parallel)
    costs = costs_of(profile)
    for option, label in ((FP32, "fp32"), (BF16_O2, "bf16_o2")):
        assert costs.step_interval(uniform(costs, option)) == pytest.approx(
            interval(profile, label)
        )


def test_what_lies_outside_the_layers_is_no_surer_than_they_are() -> None:
    costs = costs_of(predicted(SHOWN))
    plan = (FP32, *uniform(costs, TENSORWISE)[1:])  # with casts at a boundary
    low, high = costs.step_interval(plan)
    sure = costs.step_interval(uniform(costs, BF16_O2))
    scale = costs.step_ms(plan) / costs.step_ms(uniform(costs, BF16_O2))
    assert (low, high) == pytest.approx((scale * sure[0], scale * sure[1]))


# --- the whole step -----------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [HIDDEN, SHOWN, "fsdp=64,tp=8", "fsdp=32,ac=full"])
def test_a_plan_s_step_is_the_cost_model_s_whole_step_of_it(parallel: str) -> None:
    profile = predicted(parallel)
    costs, rng = costs_of(profile), random.Random(0)
    for _ in range(20):
        options = tuple(rng.choice([o for o in row if o != FP32]) for row in costs.prices)
        assert costs.step_ms(options) == pytest.approx(whole_step_ms(profile, options), rel=1e-9)


def test_faster_layers_hide_less_communication() -> None:
    costs = costs_of(predicted(SHOWN))
    bf16, fp8 = uniform(costs, BF16_O2), uniform(costs, TENSORWISE)
    assert costs.unhidden_ms(bf16) == pytest.approx(0.0, abs=1e-9)
    assert costs.unhidden_ms(fp8) > 0.0
    assert costs_of(predicted("tp=8")).unhidden_ms(fp8) == 0.0


@pytest.mark.parametrize("parallel", ["fsdp=256,gather=fp8", "fsdp=64,tp=8,gather=fp8"])
def test_with_fp8_gathers_both_uniform_steps_are_whole_steps(parallel: str) -> None:
    profile = predicted(parallel, WIDE, TENSORWISE)
    costs = costs_of(profile)
    for option, label in ((BF16_O2, "bf16_o2"), (TENSORWISE, "fp8_o1")):
        step = profile.step(label)
        assert step is not None
        assert costs.step_ms(uniform(costs, option)) == pytest.approx(step.timing.median_ms)


@pytest.mark.parametrize("parallel", [HIDDEN, SHOWN])
def test_the_plan_is_the_fastest_of_all_by_whole_steps(parallel: str) -> None:
    spec = model_of(
        *(linear_layer(f"layers.0.{name}", 4096, N) for name, N in (("q", 4096), ("k", 512))),
        linear_layer("layers.0.down", 14336, 4096),
        linear_layer("lm_head", 4096, 8192),
    )
    profile = predicted(parallel, spec)
    every = itertools.product(*(layer.options for layer in profile.model.layers[:-1]), [BF16_O2])
    profile = profile.model_copy(update={"speedup_error": 0.0})  # every gain is sure
    fastest = min(whole_step_ms(profile, o) for o in every if FP32 not in o)
    plan = planned(profile)
    assert plan.predicted is not None
    assert plan.predicted.plan_ms == pytest.approx(fastest)


def test_a_predicted_gain_within_its_uncertainty_is_not_taken() -> None:
    spec = model_of(
        linear_layer("layers.0.up", 4096, 14336),
        linear_layer("layers.0.narrow", 4096, 4096),
        linear_layer("lm_head", 4096, 8192),
    )
    profile = predicted("", spec)
    costs = costs_of(profile)
    gains = [
        row[BF16_O2].ms / min(price.ms for option, price in row.items() if option.is_fp8)
        for row in costs.prices
    ]
    assert 1.0 < gains[1] < 1.2 < gains[0]  # what the case is about
    between = math.log((1.0 + gains[1]) / 2.0), math.log(gains[1] * 1.01)
    for error, is_taken in zip(between, (True, False), strict=True):
        plan = planned(profile.model_copy(update={"speedup_error": error}))
        up, narrow, _ = plan.layers
        assert up.option.is_fp8
        assert narrow.option.is_fp8 is is_taken
        told = [note for note in plan.notes if "a layer leaves it only for a gain" in note]
        assert len(told) == (not is_taken)
        assert ("within its uncertainty" in narrow.reason) is (not is_taken)


def test_a_gemm_that_stays_in_bf16_has_no_uncertainty_of_its_own() -> None:
    masked = next(o for o in with_gemms_hp([TENSORWISE]) if len(o.fp8_gemms) == 1)
    profile = predict_profile(WIDE, H100, compiled=True, options=[TENSORWISE], gemms_hp=True)
    timing = next(row for row in profile.layers if row.option == masked and row.cast)
    price = costs_of(profile).prices[profile.model.names.index(timing.names[0])][masked]
    (gemm,) = (getattr(timing, name) for name in masked.fp8_gemms)
    assert timing.cast
    changed = gemm.median_ms + timing.cast.median_ms
    assert price.margin_ms == pytest.approx(changed * math.expm1(profile.speedup_error))


def test_the_plan_says_what_communication_takes_of_the_gain() -> None:
    told = [
        [note for note in planned(predicted(parallel)).notes if "hides less" in note]
        for parallel in ("", SHOWN)
    ]
    assert told[0] == []
    assert len(told[1]) == 1


def test_linears_that_cannot_take_fp8_are_told_beside_those_that_can() -> None:
    spec = model_of(linear_layer("odd", 8200, 4096), linear_layer("even", 4096, 4096))
    why = "K=8200 is not a multiple of 16, which FP8 GEMMs need"
    assert (
        f"no FP8 option yet for 67 % of the weights ({why})" in planned(predicted("", spec)).notes
    )


def test_linears_whose_counterparts_in_a_proxy_take_no_fp8_are_told() -> None:
    spec = model_of(*(linear_layer(name, 8192, 8192) for name in ("up", "down", "head")))
    profile = predicted("", spec)
    known = unknown_sensitivity(profile.model)
    rows = tuple(row for row in known.rows if row.name != "up" or not row.option.is_fp8)
    plan = planned(profile, known.model_copy(update={"rows": rows}))
    assert [layer.option.is_fp8 for layer in plan.layers] == [False, True, False]
    why = "its effect on the gradient was not measured"
    assert f"no FP8 option yet for 33 % of the weights ({why})" in plan.notes


def test_tokens_that_keep_grad_weight_out_of_fp8_are_told() -> None:
    names, pooled = ("up", "down", "head"), linear_layer("pooled", 8192, 8192, shape=(1, 6))
    told = "grad_weight stays in BF16 in the 3 layers that FP8 could take with M=4100, no multiple"
    for tokens, is_told in ((4096, False), (4100, True)):
        layers = [linear_layer(name, 8192, 8192, shape=(1, tokens)) for name in names]
        spec = model_of(*layers, pooled).model_copy(update={"tokens_per_step": tokens})
        plan = planned(predicted("", spec))
        found = [note for note in plan.notes if note.startswith("grad_weight stays in BF16")]
        assert found == [f"{told} of 16: 4112 tokens there would change that"] * is_told


def test_attention_that_holds_its_projections_is_told_beside_those_that_can() -> None:
    attention = plain_layer("attn", LayerKind.ATTENTION, (1536, 512), (8, 128, 512))
    plan = planned(predicted("", model_of(attention, linear_layer("up", 512, 3072))))
    assert "no FP8 option yet for 33 % of the weights (attention)" in plan.notes


def test_a_plan_without_fp8_says_what_communication_would_take() -> None:
    hidden, shown = (
        planned(predicted(at).model_copy(update={"speedup_error": 0.4})) for at in (HIDDEN, SHOWN)
    )
    assert {option.is_fp8 for plan in (hidden, shown) for option in plan.options} == {False}
    said = "but FSDP's communication, which hides behind it, takes 12.3 ms of that, and the rest"
    assert said in shown.notes[0]
    assert "communication" not in hidden.notes[0]


# --- memory -------------------------------------------------------------------------------------


def test_one_sample_makes_no_sure_gain() -> None:
    profile = predicted()
    layers = tuple(
        row.model_copy(
            update={"total": row.total.model_copy(update={"samples": 1, "basis": Basis.MEASURED})}
        )
        for row in profile.layers
        if row.total is not None
    )
    measured = profile.model_copy(update={"layers": layers, "basis": Basis.MEASURED})
    for prices in costs_of(measured).prices:
        for option, price in prices.items():
            assert option == BF16_O2 or price.counted_ms >= prices[BF16_O2].ms


def own_memory(profile: Profile, label: str = "bf16_o2") -> int:
    step = profile.step(label)
    assert step is not None
    assert step.peak_bytes is not None
    return step.peak_bytes


def test_adamw_in_a_outside_bf16_keeps_sixteen_bytes_a_parameter() -> None:
    numel = sum(p.numel for layer in WIDE.layers for p in layer.parameters)
    for label in ("fp32", "bf16_o2", "fp8_o1"):
        assert own_memory(predicted("ac=full"), label) == 16 * numel
    assert own_memory(predicted("fsdp=8,ac=full")) == pytest.approx(2 * numel)


def test_parameters_outside_the_timed_layers_are_kept_too() -> None:
    more = ParameterSpec(name="experts", shape=(1000, 8), dtype="float32", is_trainable=True)
    frozen = more.model_copy(update={"name": "table", "is_trainable": False})
    unused = WIDE.layers[1].model_copy(update={"name": "unused", "calls": ()})
    size = sum(p.numel for p in unused.parameters)
    spec = WIDE.model_copy(
        update={"uncovered": (more, frozen), "layers": (*WIDE.layers, unused)},
    )
    before, after = predicted(), predicted("", spec)
    assert own_memory(after) - own_memory(before) == 16 * 8000 + 2 * 8000 + 16 * size
    costs = costs_of(after)
    assert costs.memory_bytes(uniform(costs, BF16_O2)) == own_memory(after)


def test_tensor_parallelism_splits_what_layers_save() -> None:
    whole, split = predicted("fsdp=8"), predicted("fsdp=8,tp=8")
    saved = [
        sum(row.activation_bytes * len(row.names) for row in p.layers if row.option == BF16_O2)
        for p in (whole, split)
    ]
    assert saved[1] == pytest.approx(saved[0] / 8, rel=1e-3)  # the embedding's indices are whole


def note_of(plan: Plan) -> str:
    return next((note for note in plan.notes if note.startswith("does not fit in memory")), "")


@pytest.mark.parametrize(
    ("parallel", "memory_gb", "words"),
    [
        ("", 19.0, r"shard further \(--parallel (fsdp=\d+) or more\) or recompute"),
        ("", 19.0, r" or more\) or recompute \(--parallel (ac=full)\)"),
        ("", 10.0, r"shard further \(--parallel (fsdp=\d+) or more\)$"),
        ("fsdp=64", 1.0, r"GB: recompute \(--parallel (fsdp=64,ac=full)\)"),
        ("", 1.0, r"shard further and recompute \(--parallel (fsdp=\d+,ac=full) or more\)"),
        ("tp=2,ac=full", 1.5, r"shard further \(--parallel (fsdp=\d+,tp=2,ac=full) or more\)"),
    ],
)
def test_a_plan_that_does_not_fit_says_so_and_its_advice_fits(
    parallel: str, memory_gb: float, words: str
) -> None:
    profile = with_memory(predicted(parallel, decoder(blocks=4)), memory_gb)
    plan = planned(profile)
    found = re.search(words, note_of(plan))
    assert found
    assert plan.predicted is not None
    assert plan.predicted.memory_bytes is not None
    assert plan.predicted.memory_bytes > memory_gb * 1e9
    advised = with_memory(predicted(found[1], decoder(blocks=4)), memory_gb)
    assert note_of(planned(advised)) == ""


def with_memory(profile: Profile, memory_gb: float) -> Profile:
    facts = profile.device.model_copy(update={"memory_bytes": int(memory_gb * 1e9)})
    return profile.model_copy(update={"device": facts})


def test_a_plan_that_fits_has_no_note_on_memory() -> None:
    assert note_of(planned(predicted("", decoder()))) == ""


def test_a_measured_plan_is_not_told_to_shard() -> None:
    profile, _ = tables_of({"a": TYPICAL})
    chosen: Mapping[str, Option] = {"a": BF16_O2}
    size = profile.device.memory_bytes
    assert memory_note(profile, chosen, size) == ""
    note = memory_note(profile, chosen, 2 * size)
    assert profile.basis is Basis.MEASURED
    assert "--parallel" not in note
    assert "about" in note
    assert "make the batch smaller" in note


# --- notes --------------------------------------------------------------------------------------


def test_a_device_without_fp8_is_not_told_what_stays_out_of_it() -> None:
    for device, is_told in (("a100", False), ("h100-sxm", True)):
        profile = predict_profile(
            decoder(), load_device_profile(device), compiled=True, options=(TENSORWISE,)
        )
        notes = unknown_sensitivity(profile.model).notes
        assert any("out of FP8" in note for note in notes) is is_told
        assert any("gradient error is unknown" in note for note in notes)


def test_two_profiles_of_one_name_are_told_apart() -> None:
    casts = H100.constants["rowwise_cast_bytes"]
    own = H100.model_copy(
        update={
            "constants": {
                **H100.constants,
                "rowwise_cast_bytes": casts.model_copy(update={"value": 1.5 * casts.value}),
            }
        }
    )
    digests = {
        planned(predict_profile(decoder(), device, compiled=True)).fingerprint.device_digest
        for device in (H100, own)
    }
    assert len(digests) == 2
    assert "" not in digests


def test_a_compiled_profile_has_the_eager_steps_beside_it() -> None:
    compiled, eager = (
        predict_profile(WIDE, H100, compiled=mode, options=[TENSORWISE]) for mode in (True, False)
    )
    for label in ("bf16_o2", "fp8_o1"):
        beside, own = compiled.step(f"eager_{label}"), eager.step(label)
        assert beside is not None
        assert own is not None
        assert beside.timing == own.timing
    assert eager.step("eager_bf16_o2") is None


def total(profile: Profile, name: str, option: Option) -> Timing:
    row = profile.timing(name, option)
    assert row is not None
    assert row.total is not None
    return row.total


def test_fp8_behind_a_kernel_of_its_own_pays_for_the_cast_that_nothing_fuses() -> None:
    taken = {"k_proj", "up_proj"}
    layers = (
        layer.model_copy(update={"made_by": "FastNorm"})
        if layer.name.rpartition(".")[2] in taken
        else layer
        for layer in WIDE.layers
    )
    own = WIDE.model_copy(update={"layers": tuple(layers)})
    torchs, owns = (predicted(HIDDEN, spec) for spec in (WIDE, own))
    for layer in (layer for layer in WIDE.layers if layer.gemm):
        gemm = layer.gemm
        assert gemm is not None
        read_ms = 2 * gemm.M * gemm.K / H100.machine.bytes_per_us / 1e3
        for option in (BF16_O2, TENSORWISE, ROWWISE):
            before, after = (total(each, layer.name, option) for each in (torchs, owns))
            is_dearer = option.is_fp8 and layer.name.rpartition(".")[2] in taken
            paid = read_ms if is_dearer else 0.0
            assert after.median_ms - before.median_ms == pytest.approx(paid, abs=1e-9)
            assert after.p20_ms == pytest.approx(before.p20_ms)  # it may cost nothing
    plan = planned(owns)
    in_fp8 = [a.name for a in plan.layers if a.option.is_fp8 and own.layer(a.name).made_by]
    (note,) = (note for note in plan.notes if "FastNorm" in note)
    pays = sum(2 * g.M * g.K for n in in_fp8 if (g := own.layer(n).gemm)) / 1e3
    assert f"the {len(in_fp8)} layers in FP8 whose input comes from FastNorm" in note
    assert f"up to {pays / H100.machine.bytes_per_us:.3g} ms a step" in note
    assert "predicted" in note
    assert not any("torch.compile fuses" in note for note in planned(torchs).notes)
    # a plan's step stays the whole step's
    options = tuple(assignment.option for assignment in plan.layers)
    assert costs_of(owns).step_ms(options) == pytest.approx(whole_step_ms(owns, options))
    eager = [
        predict_profile(spec, H100, options=[TENSORWISE]).step("fp8_o1") for spec in (WIDE, own)
    ]
    assert eager[0] == eager[1]


def test_what_is_not_called_has_a_time_that_is_predicted_as_the_others() -> None:
    table = plain_layer("table", LayerKind.EMBEDDING, (64, 64), (1, 64))
    spec = model_of(linear_layer("up", 8192, 8192), table.model_copy(update={"calls": ()}))
    assignment = planned(predicted("", spec)).layers[1]
    assert (assignment.layer_ms, assignment.basis) == (0.0, Basis.PREDICTED)


def test_what_has_no_known_time_is_told_in_layer_step_and_answer() -> None:
    experts = plain_layer("mlp.experts", LayerKind.OTHER, (8, 4096, 1024), (1, 4096, 1024))
    spec = model_of(linear_layer("q_proj", 8192, 8192), experts)
    profile = predicted("", spec)
    plan = planned(profile)
    assignment = next(a for a in plan.layers if a.name == "mlp.experts")
    assert assignment.layer_ms is assignment.baseline_ms is None
    assert assignment.basis is Basis.UNKNOWN
    assert assignment.option == BF16_O2
    assert "its time is not known (the cost model knows no products of stacked" in assignment.reason
    assert not re.search(r"\dx (faster|slower)", assignment.reason)
    assert plan.predicted is not None
    assert plan.predicted.left_out == pytest.approx(8 * 4096 * 1024 / spec.numel)
    assert any(note.startswith("no time is known for 33 % of the weights") for note in plan.notes)
    assert "no FP8 option yet for 33 % of the weights (other)" in plan.notes


@pytest.mark.parametrize(("outputs", "what"), [(8, "stacked matrices"), (16, "parameters")])
def test_experts_of_no_layer_are_told_by_their_router(outputs: int, what: str) -> None:
    stack = ParameterSpec(name="mlp.up", shape=(8, 4096, 1024), dtype="float32", is_trainable=True)
    router = linear_layer("mlp.router", 4096, outputs)
    spec = model_of(linear_layer("q_proj", 8192, 8192), router)
    profile = predicted("", spec.model_copy(update={"uncovered": (stack,)}))
    plan = planned(profile)
    # other loose parameters' products are counted among those outside of layers
    stacks = {"mlp.up": "stacked matrices of no layer, as experts have"}
    assert profile.unknown_times == (stacks if what == "stacked matrices" else {})
    assert f"no FP8 option yet for 33 % of the weights ({what} of no layer)" in [
        note for note in plan.notes if note.startswith("no FP8 option")
    ]
    (held,) = (note for note in profile_notes(profile) if note.startswith("outside any layer"))
    assert ("(stacked, as experts are)" in held) == (what == "stacked matrices")


def test_the_largest_share_of_what_has_no_fp8_option_comes_first() -> None:
    """The terminal cuts what it has no room for."""
    stack = ParameterSpec(name="base", shape=(8192, 8192), dtype="float32", is_trainable=False)
    layers = linear_layer("q_proj", 8192, 8192), linear_layer("lora", 8192, 1025)
    spec = model_of(*layers).model_copy(update={"uncovered": (stack,)})
    (note,) = (x for x in planned(predicted("", spec)).notes if x.startswith("no FP8 option"))
    assert re.findall(r"\d+ % of the weights \(([^ ]+)", note) == ["parameters", "N=1025"]


@pytest.mark.parametrize(("error", "expected"), [(1e-6, BF16_O2), (0.5, FP32)])
def test_a_layer_without_a_time_goes_to_fp32_only_for_its_error(
    error: float, expected: Option
) -> None:
    experts = plain_layer("mlp.experts", LayerKind.OTHER, (8, 4096, 1024), (1, 4096, 1024))
    profile = predicted("", model_of(linear_layer("q_proj", 8192, 8192), experts))
    errors = {"mlp.experts": error, "q_proj": 1e-6}
    unknown = unknown_sensitivity(profile.model)
    rows = (
        row.model_copy(
            update={"grad_error": Estimate(mean=errors[row.name]), "basis": Basis.MEASURED}
        )
        for row in unknown.rows
    )
    sensitivity = unknown.model_copy(update={"rows": tuple(rows)})
    constraint = Constraint(loss_tolerance=1e-3, grad_error_budget=1e-3)
    search = search_plan(profile, sensitivity, constraint=constraint, evaluate=None, trials=0)
    chosen = dict(zip(profile.model.names, search.chosen.options, strict=True))
    assert chosen["mlp.experts"] == expected
    assert chosen["q_proj"] != FP32


@pytest.mark.parametrize(
    ("tolerance", "error", "attention_flops", "is_between"),
    [(0.01, 0.02, 1e15, False), (0.1, 0.3, 0.0, True), (0.001, 0.02, 1e15, True)],
    ids=["not worth its time", "worth its time", "needed"],
)
def test_fp32_between_layers_is_for_plans_that_gain_by_it(
    tolerance: float, error: float, attention_flops: float, is_between: bool
) -> None:
    spec = WIDE.model_copy(update={"product_flops": attention_flops})
    profile = predicted("", spec)
    unknown = unknown_sensitivity(spec)
    rows = [row.model_copy(update={"basis": Basis.TRANSFERRED}) for row in unknown.rows]
    island = Island(outputs=spec.names, grad_error=error)
    found = unknown.model_copy(update={"rows": tuple(rows), "islands": (island,)})
    constraint = Constraint(loss_tolerance=tolerance, grad_error_budget=None)
    searched = sensitivity_for(profile, found, constraint)
    assert searched.is_fp32_between is is_between
    search = search_plan(profile, searched, constraint=constraint, evaluate=None, trials=0)
    plan = build_plan(profile, searched, search, search.chosen, constraint=constraint)
    assert plan.fp32_outputs == (spec.names if is_between else ())
    assert plan.grad_error == pytest.approx(0.0 if is_between else error)
    assert [*between_notes(found, searched)] == (
        []
        if is_between
        else [
            "BF16 between layers has a gradient error of 2.0 % alone (transferred); FP32 there "
            "costs more in time than that is worth"
        ]
    )
