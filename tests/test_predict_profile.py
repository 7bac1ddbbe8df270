"""A captured model on a device that is not here: options, times, memory, whole steps."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autoprec.common.recipes import Gemm, Precision, Recipe
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.model.options import IN_FP32_ALONE, ON_ANY_DEVICE
from autoprec.model.roles import Role, role_of
from autoprec.predict import Parallel, load_device_profile, predict_linear, predict_profile
from autoprec.records.cost import LayerTiming, Profile
from autoprec.records.model import (
    BF16_O2,
    FP32,
    AsWritten,
    Basis,
    LayerKind,
    LayerSpec,
    ModelSpec,
    Option,
    ParameterSpec,
    Refusal,
    fp8_option,
)
from autoprec.workload.functions import workload_from
from tests.decoder_specs import decoder, linear_layer, model_of, plain_layer

H100 = load_device_profile("h100-sxm")
TENSORWISE, ROWWISE = fp8_option(Recipe.TENSORWISE), fp8_option(Recipe.ROWWISE)
GW_HP = fp8_option(Recipe.ROWWISE_WITH_GW_HP)
ALL = (TENSORWISE, ROWWISE, GW_HP)


def predicted(
    spec: ModelSpec, *, compiled: bool = True, parallel: Parallel | None = None
) -> Profile:
    return predict_profile(spec, H100, options=ALL, compiled=compiled, parallel=parallel)


def row(profile: Profile, name: str, option: Option) -> LayerTiming:
    found = [r for r in profile.layers if name in r.names and r.option == option]
    assert len(found) == 1
    return found[0]


def total(row: LayerTiming) -> float:
    assert row.total is not None
    return row.total.median_ms


def step(profile: Profile, label: str) -> float:
    return next(s.timing.median_ms for s in profile.steps if s.label == label)


def test_everything_is_predicted_and_nothing_was_sampled() -> None:
    profile = predicted(decoder())
    assert profile.basis is Basis.PREDICTED
    assert profile.device.kind == "profile"
    assert profile.device.name == "h100-sxm"
    parts = [t for r in profile.layers for t in (r.output, r.grad_input, r.cast, r.total)]
    timings = [t for t in parts if t] + [s.timing for s in profile.steps]
    assert all(t.basis is Basis.PREDICTED and t.samples == 0 for t in timings)
    assert all(t.p20_ms <= t.median_ms <= t.p80_ms for t in timings)
    assert Profile.from_json(profile.to_json()) == profile


def test_options_are_the_targets_and_not_the_captured_machines() -> None:
    refusal = Refusal(precision=Precision.FP8_O1, reason="FP8 needs compute capability 8.9")
    spec = model_of(linear_layer("up_proj", 4096, 4096, refusals=(refusal,)))
    layer = predicted(spec).model.layers[0]
    assert layer.options == (FP32, BF16_O2, *ALL)
    assert layer.refusals == ()


def test_a_layer_that_is_no_plain_linear_stays_refused() -> None:
    refusal = Refusal(precision=Precision.FP8_O1, reason="Odd has its own forward")
    odd = linear_layer("up", 4096, 4096, type_name="mine.Odd", refusals=(refusal,))
    layer = predicted(model_of(odd)).model.layers[0]
    assert layer.options == (FP32, BF16_O2)
    assert layer.refusals == (refusal,)


@pytest.mark.parametrize("reason", sorted(ON_ANY_DEVICE))
def test_what_the_step_does_with_a_layer_rules_fp8_out_on_any_device(reason: str) -> None:
    refusal = Refusal(precision=Precision.FP8_O1, reason=reason)
    layer = predicted(model_of(linear_layer("up", 4096, 4096, refusals=(refusal,)))).model.layers[0]
    assert layer.options == ((FP32,) if reason in IN_FP32_ALONE else (FP32, BF16_O2))
    assert refusal in layer.refusals


def test_a_shape_that_fp8_cannot_take_has_the_reason() -> None:
    layer = predicted(model_of(linear_layer("head", 4096, 10))).model.layers[0]
    assert layer.options == (FP32, BF16_O2)
    assert "N=10 is not a multiple of 16" in layer.refusals[0].reason


def test_odd_tokens_leave_the_options_with_grad_weight_in_bf16() -> None:
    spec = model_of(linear_layer("up", 4096, 4096, shape=(1, 100)))
    options = predicted(spec).model.layers[0].options
    partly = fp8_option(Recipe.TENSORWISE, Gemm.GRAD_WEIGHT)
    assert set(options) >= {GW_HP, partly}
    assert not {TENSORWISE, ROWWISE} & set(options)


def test_odd_tokens_of_another_batch_count_though_the_step_was_even() -> None:
    partly = fp8_option(Recipe.TENSORWISE, Gemm.GRAD_WEIGHT)
    spec = model_of(linear_layer("up", 4096, 4096, tokens=(100, 4096)))
    options = predicted(spec).model.layers[0].options
    assert partly in options
    assert TENSORWISE not in options


def test_a_target_without_fp8_is_a_profile_with_a_reason() -> None:
    profile = predict_profile(decoder(), load_device_profile("a100"), options=ALL)
    assert {r.option for r in profile.layers} == {FP32, BF16_O2}
    assert {s.label for s in profile.steps} == {"fp32", "bf16_o2", "autocast_bf16"}
    assert "no FP8" in profile.device.fp8_reason
    linear = next(layer for layer in profile.model.layers if layer.kind is LayerKind.LINEAR)
    assert "no FP8" in linear.refusals[0].reason


def test_a_linear_costs_what_predict_linear_says() -> None:
    profile = predicted(decoder())
    found = row(profile, "layers.0.mlp.up_proj", ROWWISE)
    alone = predict_linear(H100, 4096, 4096, 14336, recipe="rowwise")
    assert alone.fp8 is not None
    assert found.names == tuple(f"layers.{b}.mlp.{n}_proj" for b in (0, 1) for n in ("gate", "up"))
    assert total(found) == pytest.approx(alone.fp8.total_ms - alone.fp8.neighbours_ms)
    parts = (found.output, found.grad_input, found.grad_weight, found.cast)
    assert total(found) == pytest.approx(sum(t.median_ms for t in parts if t))


def test_frozen_layers_and_first_layers_have_fewer_gemms() -> None:
    spec = model_of(
        linear_layer("frozen", 4096, 4096, is_frozen=True),
        linear_layer("first", 4096, 8192, requires_grad=False),
    )
    profile = predicted(spec)
    frozen, first = row(profile, "frozen", TENSORWISE), row(profile, "first", TENSORWISE)
    assert frozen.grad_weight is None
    assert frozen.gradient_bytes == frozen.optimizer_bytes == 0
    assert first.grad_input is None
    assert first.grad_weight is not None


def test_steps_are_the_layers_and_what_lies_between() -> None:
    profile = predicted(decoder())
    for label, option, fixed in (
        ("fp32", FP32, profile.fixed_ms),
        ("bf16_o2", BF16_O2, profile.fixed_bf16_ms),
    ):
        layers = sum(total(r) * len(r.names) for r in profile.layers if r.option == option)
        assert step(profile, label) == pytest.approx(layers + fixed)
        assert fixed > 0
    assert step(profile, "fp8_o1") < step(profile, "bf16_o2") < step(profile, "autocast_bf16")
    assert step(profile, "bf16_o2") < step(profile, "fp32")


@pytest.mark.parametrize(
    ("written", "same"),
    [
        (AsWritten(), None),  # that of plain FP32, and eager though the others are compiled
        (AsWritten(is_compiled=True), None),
        (AsWritten(autocast="bfloat16"), "autocast_bf16"),
        (AsWritten(autocast="float16", is_compiled=True), "autocast_bf16"),
        (AsWritten(autocast="bfloat16", gathered="bfloat16"), "bf16_o2"),
    ],
)
def test_the_step_as_written_is_predicted_where_it_is_another_one(
    written: AsWritten, same: str | None
) -> None:
    profile = predicted(decoder().model_copy(update={"as_written": written}))
    steps = {each.label: each.ms for each in profile.steps}
    assert steps.get("as_written") == (steps[same] if same else None)


def test_16_bit_parameters_as_written_have_no_masters_to_update() -> None:
    written = AsWritten(parameters=("bfloat16",))
    profile = predicted(decoder().model_copy(update={"as_written": written}))
    assert 0.8 < step(profile, "as_written") / step(profile, "bf16_o2") < 1.0
    peaks = {each.label: each.peak_bytes for each in profile.steps}
    assert [label for label, peak in peaks.items() if peak is None] == ["as_written"]


def test_what_the_user_compiles_is_predicted_compiled_beside_eager_steps() -> None:
    spec = decoder().model_copy(update={"as_written": AsWritten(is_compiled=True)})
    eager = predicted(spec, compiled=False)
    assert step(eager, "as_written") == pytest.approx(step(predicted(spec), "fp32"))
    assert step(eager, "as_written") < step(eager, "fp32")


@pytest.mark.parametrize("allowed", [False, True])
def test_fp32_is_priced_in_tf32_where_the_process_allows_it(allowed: bool) -> None:
    shape = (64, 256, 56, 56)
    spec = model_of(
        linear_layer("up", 4096, 4096, shape=(1, 16384)),
        plain_layer("conv", LayerKind.CONV, (256, 256, 3, 3), shape, "stride=(1, 1)"),
    )
    for name, other in (("up", "allow_tf32_conv"), ("conv", "allow_tf32")):
        switch = {"up": "allow_tf32", "conv": "allow_tf32_conv"}[name]
        written = AsWritten(**{switch: allowed, other: not allowed})
        profile = predicted(spec.model_copy(update={"as_written": written}))
        # TF32's rate is half of BF16's, that of CUDA cores a fifteenth
        gain = total(row(profile, name, FP32)) / total(row(profile, name, BF16_O2))
        assert gain == pytest.approx(2.0, rel=0.15) if allowed else gain > 8.0
        assert getattr(profile.device, switch) is allowed
    radeon = predict_profile(spec, load_device_profile("mi300x"), options=())
    assert radeon.device.allow_tf32_conv is None  # no cuDNN
    assert not radeon.device.allow_tf32


def test_memory_by_precision() -> None:
    profile = predicted(model_of(linear_layer("up", 1024, 2048)))
    numel = 1024 * 2048
    fp32, bf16 = row(profile, "up", FP32), row(profile, "up", BF16_O2)
    assert (fp32.parameter_bytes, fp32.gradient_bytes, fp32.optimizer_bytes) == (
        4 * numel,
        4 * numel,
        8 * numel,
    )
    assert (bf16.parameter_bytes, bf16.gradient_bytes, bf16.optimizer_bytes) == (
        2 * numel,
        2 * numel,
        12 * numel,
    )
    assert fp32.activation_bytes == 2 * bf16.activation_bytes == 4 * 4096 * 1024


def test_every_kind_of_layer_has_a_time_in_both_precisions() -> None:
    spec = model_of(
        plain_layer("conv", LayerKind.CONV, (64, 3, 7, 7), (8, 3, 224, 224), "stride=(2, 2)"),
        plain_layer("norm", LayerKind.NORM, (512,), (8, 128, 512)),
        plain_layer("embed", LayerKind.EMBEDDING, (1000, 512), (8, 128)),
        plain_layer("attention", LayerKind.ATTENTION, (1536, 512), (8, 128, 512)),
        plain_layer("router", LayerKind.OTHER, (64, 512), (8, 128, 512)),
        plain_layer("positions", LayerKind.OTHER, (1, 128, 512), (8, 128, 512)),
        plain_layer("scale", LayerKind.OTHER, (512,), (8, 128, 512)),
    )
    profile = predicted(spec)
    for name in spec.names:
        slow, fast = total(row(profile, name, FP32)), total(row(profile, name, BF16_O2))
        assert 0 < fast <= slow


def test_a_linear_that_no_token_came_to_costs_no_gemm() -> None:
    idle = plain_layer("idle", LayerKind.LINEAR, (512, 512), (0, 512))
    profile = predicted(model_of(linear_layer("up", 512, 512), idle))
    for option in (FP32, BF16_O2):
        found = row(profile, "idle", option)
        assert found.output is not None
        assert found.output.median_ms == 0.0
        assert found.grad_weight is None


def test_of_complex_weights_no_time_is_said() -> None:
    weight = ParameterSpec(name="spectral", shape=(512, 512), dtype="complex64", is_trainable=True)
    spec = model_of(linear_layer("up", 512, 512)).model_copy(update={"uncovered": (weight,)})
    profile = predicted(spec)
    assert profile.unknown_times == {"spectral": "complex numbers"}
    assert profile.left_out == 0.5


def experts(name: str = "experts") -> LayerSpec:
    return plain_layer(name, LayerKind.OTHER, (8, 1024, 512), (1, 4096, 512))


def test_of_what_the_model_does_not_know_no_time_is_said_and_steps_say_what_they_leave_out() -> (
    None
):
    two = plain_layer("two", LayerKind.OTHER, (512, 512), (1, 4096, 512))
    two = two.model_copy(update={"parameters": two.parameters * 2})
    lstm = plain_layer("lstm", LayerKind.RECURRENT, (2048, 512), (8, 128, 512))
    loose = ParameterSpec(name="loose", shape=(8, 1024), dtype="float32", is_trainable=True)
    known = model_of(linear_layer("up", 512, 1024))
    spec = model_of(linear_layer("up", 512, 1024), experts(), two, lstm)
    spec = spec.model_copy(update={"uncovered": (loose,)})
    profile, without = predicted(spec), predicted(known)
    for name in ("experts", "two", "lstm"):
        for option in (FP32, BF16_O2):
            found = row(profile, name, option)
            assert found.total is found.output is found.cast is None
            assert found.unknown
            assert found.parameter_bytes > 0
    assert list(profile.unknown_times) == ["experts", "two", "lstm"]
    assert "stacked matrices" in profile.unknown_times["experts"]
    assert profile.left_out == pytest.approx(1 - (512 + 8) * 1024 / spec.numel)
    assert without.left_out == 0.0
    assert profile.fixed_bf16_ms > without.fixed_bf16_ms  # the optimizer trains every weight


def test_a_layer_s_one_matrix_is_the_gemm_of_its_shape_or_is_added() -> None:
    spec = model_of(
        plain_layer("router", LayerKind.OTHER, (64, 512), (8, 128, 512)),
        plain_layer("positions", LayerKind.OTHER, (1, 128, 512), (8, 128, 512)),
        plain_layer("scale", LayerKind.OTHER, (512,), (8, 128, 512)),
    )
    added = spec.layers[1].model_copy(update={"output_elements": 8 * 128 * 512})
    profile = predicted(model_of(spec.layers[0], added, spec.layers[2]))
    assert total(row(profile, "positions", BF16_O2)) == total(row(profile, "scale", BF16_O2))
    linear = predict_linear(H100, 1024, 512, 64).bf16
    gemms = linear.output_ms + linear.grad_input_ms + linear.grad_weight_ms
    assert total(row(profile, "router", BF16_O2)) == pytest.approx(gemms)


def test_eager_pays_for_every_kernel() -> None:
    spec = model_of(linear_layer("up", 1024, 1024, shape=(1, 64)))
    eager, compiled = (
        total(row(predicted(spec, compiled=c), "up", ROWWISE)) for c in (False, True)
    )
    assert eager > 2 * compiled


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.layers.0.self_attn.q_proj", Role.QUERY),
        ("layers.0.attention.wk", Role.KEY_VALUE),
        ("transformer.h.0.attn.c_attn", Role.QKV),
        ("transformer.h.0.attn.c_proj", Role.ATTENTION_OUT),
        ("transformer.h.0.mlp.c_proj", Role.DOWN),
        ("layers.0.feed_forward.w1", Role.UP),
        ("lm_head", Role.HEAD),
        ("layers.0.self_attn.q_proj.base_layer", Role.QUERY),
        ("layers.0.mlp.down_proj.lora_A.default", Role.OTHER),
        ("transformer_blocks.0.attn.to_out.0", Role.ATTENTION_OUT),
        ("transformer_blocks.0.ff.net.0.proj", Role.OTHER),
        ("classifier_thing", Role.OTHER),
    ],
)
def test_roles_are_read_from_the_usual_names(name: str, role: Role) -> None:
    assert role_of(linear_layer(name, 64, 64)) is role


def test_a_head_inside_a_fused_loss_costs_its_bf16_gemms_whatever_the_plan() -> None:
    spec = decoder()
    head = spec.layer("lm_head")
    assert head.gemm is not None
    fused = head.model_copy(update={"calls": (), "gemm": None, "is_used_uncalled": True})
    unused = fused.model_copy(update={"is_used_uncalled": False})

    def predicted_with(layer: LayerSpec) -> Profile:
        layers = (*(other for other in spec.layers if other.name != head.name), layer)
        return predicted(spec.model_copy(update={"layers": layers}))

    with_head, without = predicted_with(fused), predicted_with(unused)
    M = spec.tokens_per_step
    bf16 = predict_linear(H100, M, head.gemm.K, head.gemm.N).bf16
    gemms = bf16.output_ms + bf16.grad_input_ms + bf16.grad_weight_ms
    for label in ("bf16_o2", "fp8_o1"):
        assert step(with_head, label) - step(without, label) == pytest.approx(gemms, rel=0.01)
    assert with_head.fixed_bf16_ms - without.fixed_bf16_ms == pytest.approx(gemms, rel=0.01)
    assert not any("lm_head" in row.names for row in with_head.layers)


def test_what_runs_forward_alone_is_in_a_plans_time_too() -> None:
    """Of checkpointed layers and teachers: rows of layers have their other calls alone."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Linear(64, 64)
            self.student = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = self.teacher(x)
            y: Tensor = checkpoint(self.student, x, use_reentrant=False)
            loss: Tensor = (y - wanted).square().mean()
            return loss

    workload = workload_from(
        {
            "build_model": Checkpointed,
            "train_batches": lambda seed: iter([torch.ones(64, 64)] * 4),
            "loss_fn": lambda model, batch: model(batch),
        }
    )
    spec = capture_model(Context(workload, torch.device("cpu")))
    assert spec.layer("teacher").forward_calls
    assert spec.layer("student.0").forward_calls  # again, in backward
    profile = predict_profile(spec, H100, options=ALL, compiled=True)
    for option, fixed in ((FP32, profile.fixed_ms), (BF16_O2, profile.fixed_bf16_ms)):
        rows = [row for row in profile.layers if row.option == option and row.total is not None]
        of_layers = sum(len(row.names) * row.total.median_ms for row in rows if row.total)
        step = profile.step(option.key)
        assert step is not None
        assert fixed + of_layers == pytest.approx(step.timing.median_ms)
